"""Gaussians in PLY files: the layout, the way there and back, and files that hold something else."""

from __future__ import annotations

import sys
import types

import numpy as np
import pytest
import torch

from geossl import ops
from geossl.data import read_gaussians, write_gaussians
from geossl.errors import DataError, MissingDependencyError
from geossl.geometry import SH_C0, Gaussians, quaternion_to_matrix, rotate, spherical_harmonics


def scene(count: int = 7, degree: int = 3) -> Gaussians:
    quats = torch.nn.functional.normalize(torch.randn(count, 4), dim=1)
    sh = torch.randn(count, (degree + 1) ** 2, 3)
    return Gaussians(torch.randn(count, 3), quats, torch.rand(count, 3) + 0.01, torch.rand(count) * 0.98 + 0.01, sh)


@pytest.mark.parametrize("degree", [0, 1, 2, 3])
@pytest.mark.parametrize("count", [0, 1, 7])
def test_there_and_back(tmp_path, degree, count):
    before = scene(count, degree)
    write_gaussians(tmp_path / "a.ply", before)
    after = read_gaussians(tmp_path / "a.ply")
    assert after.sh_degree == degree
    for name in ("means", "quats", "scales", "opacities", "sh"):
        torch.testing.assert_close(getattr(after, name), getattr(before, name), rtol=1e-5, atol=1e-6)


def test_the_layout_is_that_of_the_viewers(tmp_path):
    before = scene(2, 1)
    write_gaussians(tmp_path / "a.ply", before)
    header, _, data = (tmp_path / "a.ply").read_bytes().partition(b"end_header\n")
    names = [line.split()[2] for line in header.decode().splitlines() if line.startswith("property float")]
    assert names[:9] == ["x", "y", "z", "nx", "ny", "nz", "f_dc_0", "f_dc_1", "f_dc_2"]
    assert names[9:18] == [f"f_rest_{i}" for i in range(9)]
    assert names[18:] == ["opacity", *(f"scale_{i}" for i in range(3)), *(f"rot_{i}" for i in range(4))]
    row = dict(zip(names, np.frombuffer(data, "<f4").reshape(2, -1)[1], strict=True))
    assert row["f_rest_4"] == before.sh[1, 2, 1]  # the second of green
    assert row["scale_2"] == pytest.approx(float(before.scales[1, 2].log()))
    assert row["opacity"] == pytest.approx(float(torch.logit(before.opacities[1])), rel=1e-5)
    assert row["rot_0"] == pytest.approx(float(before.quats[1, 0]))


@pytest.mark.parametrize("form", ["binary_big_endian", "ascii"])
def test_other_orders_and_types(tmp_path, form):
    before = scene(3, 0)
    names = [
        "rot_3",
        "rot_2",
        "rot_1",
        "rot_0",
        "x",
        "y",
        "z",
        "red",
        *(f"f_dc_{i}" for i in range(3)),
        "opacity",
        "scale_0",
        "scale_1",
        "scale_2",
    ]
    values = {
        **{f"rot_{i}": before.quats[:, i] for i in range(4)},
        **{axis: before.means[:, i] for i, axis in enumerate("xyz")},
        **{f"f_dc_{i}": before.sh[:, 0, i] for i in range(3)},
        **{f"scale_{i}": before.scales[:, i].log() for i in range(3)},
        "opacity": torch.logit(before.opacities),
        "red": torch.zeros(3),
    }  # fmt: skip
    lines = ["ply", f"format {form} 1.0", "comment made by a test", "element vertex 3"]
    lines += [f"property {'uchar' if name == 'red' else 'double'} {name}" for name in names]
    head = "\n".join([*lines, "element face 0", "property list uchar int vertex_indices", "end_header", ""]).encode()
    rows = np.zeros(3, np.dtype([(name, ">u1" if name == "red" else ">f8") for name in names]))
    for name in names:
        rows[name] = values[name].numpy()
    text = "".join(" ".join(repr(float(values[name][i])) for name in names) + "\n" for i in range(3)).encode()
    (tmp_path / "a.ply").write_bytes(head + (text if form == "ascii" else rows.tobytes()))
    after = read_gaussians(tmp_path / "a.ply")
    for name in ("means", "quats", "scales", "opacities", "sh"):
        torch.testing.assert_close(getattr(after, name), getattr(before, name), rtol=1e-5, atol=1e-6)


def test_extremes_are_kept_finite(tmp_path):
    before = scene(3, 0)
    before = Gaussians(before.means, before.quats * 5, torch.zeros(3, 3), torch.tensor([0.0, 1.0, 0.5]), before.sh)
    write_gaussians(tmp_path / "a.ply", before)
    after = read_gaussians(tmp_path / "a.ply")
    torch.testing.assert_close(after.opacities, before.opacities, rtol=0, atol=2e-6)
    assert float(after.scales.max()) < 1e-11
    torch.testing.assert_close(after.quats.norm(dim=1), torch.ones(3))
    spoilt = Gaussians(before.means / 0, before.quats, before.scales, before.opacities, before.sh)
    with pytest.raises(DataError, match="3 Gaussians hold numbers that are not finite; the first is in row 0"):
        write_gaussians(tmp_path / "b.ply", spoilt)
    assert not (tmp_path / "b.ply").exists()


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("means", float("nan"), "hold numbers that are not finite; the first is in row 1"),
        ("scales", float("inf"), "hold numbers that are not finite"),
        ("opacities", float("nan"), "hold numbers that are not finite"),
        ("sh", float("-inf"), "hold numbers that are not finite"),
        ("quats", 0.0, "have the quaternion 0"),
        ("scales", -1.0, "have negative scales"),
        ("opacities", -0.1, r"have opacities outside \[0, 1\]"),
        ("opacities", 1.1, r"have opacities outside \[0, 1\]"),
    ],
)
def test_what_cannot_be_drawn_is_not_written(tmp_path, name, value, message):
    spoilt = scene(3, 1)
    getattr(spoilt, name)[1:] = value
    with pytest.raises(DataError, match=f"2 Gaussians {message}"):
        write_gaussians(tmp_path / "a.ply", spoilt)
    assert not (tmp_path / "a.ply").exists()


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("y", np.nan, "hold numbers that are not finite"),
        ("f_rest_3", np.inf, "hold numbers that are not finite"),
        ("opacity", np.nan, "hold numbers that are not finite"),
        ("scale_1", 100.0, "hold numbers that are not finite"),  # its exponential
        ("rot", 0.0, "have the quaternion 0"),
    ],
)
def test_what_cannot_be_drawn_is_not_read(tmp_path, name, value, message):
    path = tmp_path / "a.ply"
    write_gaussians(path, scene(3, 1))
    header, end, data = path.read_bytes().partition(b"end_header\n")
    names = [line.split()[2] for line in header.decode().splitlines() if line.startswith("property float")]
    rows = np.frombuffer(data, "<f4").reshape(3, -1).copy()
    rows[1, [i for i, column in enumerate(names) if column == name or (name == "rot" and column.startswith("rot_"))]] = value
    path.write_bytes(header + end + rows.tobytes())
    with pytest.raises(DataError, match=f"1 Gaussians {message}.* the first is in row 1"):
        read_gaussians(path)


def test_infinite_logits_are_opacities_of_0_and_1(tmp_path):
    path = tmp_path / "a.ply"
    before = scene(2, 0)
    write_gaussians(path, before)
    header, end, data = path.read_bytes().partition(b"end_header\n")
    rows = np.frombuffer(data, "<f4").reshape(2, -1).copy()
    rows[:, 9] = -np.inf, np.inf
    path.write_bytes(header + end + rows.tobytes())
    assert read_gaussians(path).opacities.tolist() == [0, 1]


def test_quaternions_of_any_length_are_written_with_length_1(tmp_path):
    before = scene(2, 0)
    for length in (1e30, 1e-30):
        write_gaussians(tmp_path / "a.ply", Gaussians(before.means, before.quats * length, before.scales, before.opacities, before.sh))
        torch.testing.assert_close(read_gaussians(tmp_path / "a.ply").quats, before.quats)


MESH = b"ply\nformat ascii 1.0\nelement vertex 1\nproperty float x\nproperty float y\nproperty float z\nend_header\n0 0 0\n"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "does not begin with 'ply'"),
        (b"solid cube\n", "does not begin with 'ply'"),
        (b"ply\nformat ascii 1.0\n", "its header has no end"),
        (b"ply\nformat tar 1.0\nend_header\n", "format 'tar' is not known"),
        (b"ply\nformat ascii 1.0\nelement face 2\nend_header\n", "its first element is 'face'"),
        (b"ply\nformat ascii 1.0\nend_header\n", "lacks the format or the vertices"),
        (b"ply\nformat ascii 1.0\nelement vertex x\nend_header\n", "number of vertices is 'x'"),
        (b"ply\nformat ascii 1.0\nelement vertex 1\nproperty list uchar int i\nend_header\n", "'list uchar int i' of its vertices cannot"),
        (MESH, "holds no Gaussians; its vertices lack f_dc_0, .* and have x, y, z"),
    ],
)
def test_files_of_another_kind(tmp_path, data, message):
    (tmp_path / "a.ply").write_bytes(data)
    with pytest.raises(DataError, match=message) as raised:
        read_gaussians(tmp_path / "a.ply")
    assert "a.ply" in str(raised.value)


def test_damaged_files(tmp_path):
    path = tmp_path / "a.ply"
    write_gaussians(path, scene())
    data = path.read_bytes()
    for size in (len(data) - 1, len(data) // 2, 200, 3):
        path.write_bytes(data[:size])
        with pytest.raises(DataError, match=r"a\.ply"):
            read_gaussians(path)
    path.write_bytes(data.replace(b"property float f_rest_44\n", b"property float f_more_44\n"))
    with pytest.raises(DataError, match="has 44 properties f_rest"):
        read_gaussians(path)
    path.write_bytes(data.replace(b"binary_little_endian", b"ascii"))
    with pytest.raises(DataError, match="cannot be read as PLY"):
        read_gaussians(path)
    with pytest.raises(DataError, match="does not exist"):
        read_gaussians(tmp_path / "none.ply")


def test_containers_check_shapes_and_render():
    made = Gaussians.from_colors(
        torch.zeros(1, 3), torch.eye(4)[:1], torch.full((1, 3), 0.3), torch.ones(1), torch.tensor([[0.2, 0.5, 0.9]])
    )
    torch.testing.assert_close(made.colors, torch.tensor([[0.2, 0.5, 0.9]]))
    assert len(made) == 1
    view = torch.eye(4)[None].clone()
    view[0, 2, 3] = 2
    lens = torch.tensor([[[20.0, 0, 4], [0, 20, 4], [0, 0, 1]]])
    render, _, _ = ops.rasterize_gaussians(made.means, made.quats, made.scales, made.opacities, made.sh, view, lens, 8, 8, sh_degree=0)
    torch.testing.assert_close(render[0, 4, 4], made.colors[0], rtol=0.04, atol=0)
    with pytest.raises(ValueError, match=r"quats must be \['N', 4\], here N = 1, got \[2, 4\]"):
        Gaussians(made.means, torch.zeros(2, 4), made.scales, made.opacities, made.sh)
    with pytest.raises(ValueError, match=r"sh must be \[1, 1, 4, 9 or 16, 3\], got \[1, 2, 3\]"):
        Gaussians(made.means, made.quats, made.scales, made.opacities, torch.zeros(1, 2, 3))


def test_spherical_harmonics_are_orthonormal():
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(200_000, 3, generator=generator, dtype=torch.float64)
    values = spherical_harmonics(3, directions, torch.eye(16, dtype=torch.float64)[None])
    products = 4 * torch.pi * values.T @ values / len(values)
    torch.testing.assert_close(products, torch.eye(16, dtype=torch.float64), rtol=0, atol=0.03)
    assert float(values[0, 0]) == pytest.approx(SH_C0)
    with pytest.raises(ValueError, match="degree 2 needs coefficients"):
        spherical_harmonics(2, directions[:1], torch.zeros(1, 4, 3))


def test_viewer_names_the_extra(monkeypatch):
    from geossl.vis import view_gaussians

    monkeypatch.setitem(__import__("sys").modules, "viser", None)
    with pytest.raises(MissingDependencyError, match=r"geossl\[vis\]"):
        view_gaussians(scene())


def test_viewer_shows_covariances_and_colours(monkeypatch):
    from geossl.vis import view_gaussians

    calls: dict = {}

    class Scene:
        def set_up_direction(self, direction):
            calls["up"] = direction

        def add_gaussian_splats(self, name, centers, covariances, rgbs, opacities):
            calls.update(name=name, centers=centers, covariances=covariances, rgbs=rgbs, opacities=opacities)

    class Server:
        def __init__(self, host, port):
            calls.update(host=host, port=port)
            self.scene = Scene()

    viser = types.ModuleType("viser")
    viser.ViserServer = Server
    monkeypatch.setitem(sys.modules, "viser", viser)
    gaussians = scene(5, 2)
    gaussians.quats.mul_(3)
    gaussians.means.requires_grad_()
    server = view_gaussians(gaussians, port=1234)
    assert isinstance(server, Server)
    assert (calls["host"], calls["port"], calls["up"]) == ("127.0.0.1", 1234, "+z")
    for name, shape in (("centers", (5, 3)), ("covariances", (5, 3, 3)), ("rgbs", (5, 3)), ("opacities", (5, 1))):
        assert isinstance(calls[name], np.ndarray)
        assert calls[name].shape == shape
        assert calls[name].dtype == np.float32
    np.testing.assert_array_equal(calls["centers"], gaussians.means.detach())
    np.testing.assert_array_equal(calls["opacities"][:, 0], gaussians.opacities)
    np.testing.assert_allclose(calls["rgbs"], gaussians.colors.clamp(max=1), rtol=1e-6)
    # A covariance has the squared scales along the axes that the quaternion turns.
    axes = rotate(torch.eye(3).expand(5, 3, 3), quaternion_to_matrix(gaussians.quats))  # row i: where axis i points
    along = np.einsum("nik,nkl,njl->nij", axes, calls["covariances"], axes)
    np.testing.assert_allclose(along, torch.diag_embed(gaussians.scales.square()), atol=1e-5)
