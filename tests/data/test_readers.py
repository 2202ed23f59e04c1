"""Reading single files: every format, and every way in which one can be wrong."""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
import trimesh
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from geossl.data import read_points
from geossl.data.readers import name_seed, split_columns
from geossl.errors import DataError

XYZ = np.array([[0.0, 1.0, 2.0], [3.0, 4.5, 5.0], [-6.0, 7.0, 8.25]])
NORMAL = np.array([[0.0, 0.0, 1.0], [0.6, 0.8, 0.0], [1.0, 0.0, 0.0]])
RGB = np.array([[255, 0, 51], [0, 102, 0], [10, 20, 30]])


def write_ply_cloud(path: Path) -> None:
    fields = "".join(f"property float {name}\n" for name in ("x", "y", "z", "nx", "ny", "nz"))
    fields += "".join(f"property uchar {name}\n" for name in ("red", "green", "blue"))
    rows = "".join(" ".join(map(str, [*p, *n, *c])) + "\n" for p, n, c in zip(XYZ, NORMAL, RGB, strict=True))
    path.write_text(f"ply\nformat ascii 1.0\nelement vertex 3\n{fields}end_header\n{rows}")


WRITERS: dict[str, Callable[[Path], object]] = {
    "blanks.xyz": lambda path: np.savetxt(path, np.hstack([XYZ, NORMAL]), header="x y z nx ny nz"),
    "commas.txt": lambda path: np.savetxt(path, np.hstack([XYZ, NORMAL, RGB]), delimiter=","),
    "header.csv": lambda path: np.savetxt(path, np.hstack([XYZ, RGB]), delimiter=";", header="x;y;z;r;g;b", comments=""),
    "scanner.pts": lambda path: np.savetxt(path, np.insert(np.hstack([XYZ, RGB]), 3, -900.0, axis=1), header="3", comments=""),
    "plain.npy": lambda path: np.save(path, XYZ),
    "table.npy": lambda path: np.save(path, np.hstack([XYZ, RGB / 255, NORMAL])),
    "named.npz": lambda path: np.savez(path, points=XYZ, normals=NORMAL, colors=RGB.astype(np.uint8), label=3),
    "cloud.ply": write_ply_cloud,
    "vertices.obj": lambda path: path.write_text("".join(f"v {x} {y} {z}\n" for x, y, z in XYZ)),
}


@pytest.mark.parametrize("name", WRITERS)
def test_point_files_are_read_as_they_are(name: str, tmp_path: Path) -> None:
    WRITERS[name](tmp_path / name)
    cloud = read_points(tmp_path / name)
    assert cloud.coord.dtype == np.float32
    assert np.array_equal(cloud.coord, XYZ.astype(np.float32))
    has_normal = name in ("blanks.xyz", "commas.txt", "table.npy", "named.npz", "cloud.ply")
    has_color = name in ("commas.txt", "header.csv", "scanner.pts", "table.npy", "named.npz", "cloud.ply")
    assert (cloud.normal is not None, cloud.color is not None) == (has_normal, has_color)
    if cloud.normal is not None:
        assert np.allclose(cloud.normal, NORMAL)
    if cloud.color is not None:
        assert np.allclose(cloud.color, RGB / 255)


def test_hdf5_of_one_cloud_is_read(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "one.h5", "w") as file:
        file["xyz"], file["normal"] = XYZ, NORMAL
    assert np.allclose(read_points(tmp_path / "one.h5").coord, XYZ)
    with h5py.File(tmp_path / "many.h5", "w") as file:
        file["data"] = np.zeros((4, 5, 3))
    with pytest.raises(DataError, match=r"many\.h5: holds 4 clouds"):
        read_points(tmp_path / "many.h5")


def test_columns_can_be_told_instead_of_guessed(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    np.savetxt(path, np.hstack([XYZ, np.eye(3)]))  # pure red, green and blue, or axis-aligned normals
    assert read_points(path).normal is not None
    cloud = read_points(path, columns="xyz+rgb")
    assert cloud.normal is None
    assert cloud.color is not None
    with pytest.raises(DataError, match=r"a\.txt: has 6 columns, but columns='xyz' means 3"):
        read_points(path, columns="xyz")


# --- meshes


def box(tmp_path: Path, suffix: str, **visual: object) -> Path:
    mesh = trimesh.creation.box((1.0, 2.0, 4.0))
    for key, value in visual.items():
        setattr(mesh.visual, key, value)
    mesh.export(tmp_path / f"box{suffix}")
    return tmp_path / f"box{suffix}"


@pytest.mark.parametrize("suffix", [".ply", ".obj", ".off", ".stl", ".glb"])
def test_meshes_are_sampled_by_area(suffix: str, tmp_path: Path) -> None:
    cloud = read_points(box(tmp_path, suffix), mesh_points=4000)
    assert cloud.normal is not None
    half = np.array([0.5, 1.0, 2.0])
    on_face = np.abs(np.abs(cloud.coord) - half) < 1e-5
    assert on_face.any(axis=1).all()
    axis = np.abs(cloud.normal).argmax(axis=1)
    assert np.take_along_axis(on_face, axis[:, None], axis=1).all()
    assert (np.take_along_axis(cloud.coord * cloud.normal, axis[:, None], axis=1) > 0).all()  # outward, as the faces are wound
    share = np.bincount(axis, minlength=3) / 4000
    assert np.allclose(share, np.array([8, 4, 2]) / 14, atol=0.03)
    first = np.bincount(axis[:1000], minlength=3) / 1000
    assert np.allclose(first, share, atol=0.06)  # every prefix covers the whole surface


def test_sampling_depends_on_the_name_alone(tmp_path: Path) -> None:
    path = box(tmp_path, ".ply")
    assert np.array_equal(read_points(path).coord, read_points(path).coord)
    (tmp_path / "sub").mkdir()
    same, other = tmp_path / "sub" / "box.ply", tmp_path / "other.ply"
    for copy in (same, other):
        copy.write_bytes(path.read_bytes())
    assert np.array_equal(read_points(path).coord, read_points(same).coord)
    assert not np.array_equal(read_points(path).coord, read_points(other).coord)
    assert name_seed("box.ply") == int.from_bytes(hashlib.blake2b(b"box.ply", digest_size=8).digest(), "little")  # on every machine


def test_colours_of_vertices_and_faces(tmp_path: Path) -> None:
    red = read_points(box(tmp_path, ".ply", face_colors=[255, 0, 51, 255]), mesh_points=50).color
    assert red is not None
    assert np.allclose(red, np.array([255, 0, 51]) / 255)
    path = tmp_path / "ramp.obj"
    path.write_text("v 0 0 0 0 0 0\nv 1 0 0 1 0 0\nv 0 1 0 0 1 0\nf 1 2 3\n")
    ramp = read_points(path, mesh_points=200)
    assert ramp.color is not None
    assert np.allclose(ramp.color[:, :2], ramp.coord[:, :2], atol=0.01)


def test_colours_of_a_texture_follow_its_coordinates(tmp_path: Path) -> None:
    pixels = np.zeros((10, 10, 3), np.uint8)
    pixels[:, 5:] = (0, 0, 255)  # right half blue
    pixels[:5, :5] = (0, 255, 0)  # top left green: v above one half
    Image.fromarray(pixels).save(tmp_path / "map.png")
    (tmp_path / "quad.mtl").write_text("newmtl m\nKd 1 1 1\nmap_Kd map.png\n")
    faces = "vt 0 0\nvt 1 0\nvt 1 1\nvt 0 1\nusemtl m\nf 1/1 2/2 3/3\nf 1/1 3/3 4/4\n"
    (tmp_path / "quad.obj").write_text("mtllib quad.mtl\nv 0 0 0\nv 1 0 0\nv 1 1 0\nv 0 1 0\n" + faces)
    cloud = read_points(tmp_path / "quad.obj", mesh_points=400)
    assert cloud.color is not None
    x, y = cloud.coord[:, 0], cloud.coord[:, 1]
    clear = (np.abs(x - 0.5) > 0.02) & (np.abs(y - 0.5) > 0.02)
    expected = np.where((x > 0.5)[:, None], [0, 0, 1], np.where((y > 0.5)[:, None], [0, 1, 0], [0, 0, 0]))
    assert np.array_equal(cloud.color[clear], expected[clear].astype(np.float32))


def test_a_scene_is_placed_as_its_graph_says(tmp_path: Path) -> None:
    scene = trimesh.Scene([trimesh.creation.box()])
    scene.add_geometry(trimesh.creation.box(), transform=trimesh.transformations.translation_matrix([10, 0, 0]))
    scene.export(tmp_path / "two.glb")
    coord = read_points(tmp_path / "two.glb", mesh_points=1000).coord
    assert coord[:, 0].min() == pytest.approx(-0.5, abs=0.01)
    assert coord[:, 0].max() == pytest.approx(10.5, abs=0.01)
    assert 400 < (coord[:, 0] > 5).sum() < 600


# --- bad input


BAD: dict[str, tuple[bytes, str]] = {
    "empty.xyz": (b"", "at least 2 points"),
    "comments.txt": (b"# nothing\n", "at least 2 points"),
    "one.xyz": (b"1 2 3\n", "needs at least 2 points, got 1"),
    "nan.xyz": (b"1 2 3\n4 5 6\nnan 8 9\n7 inf 9\n", r"coord row 2 \(from 0\) is not finite: \[nan, 8\.0, 9\.0\]; 2 such rows"),
    "two.xyz": (b"1 2\n3 4\n", "has 2 columns; expected 3"),
    "four.txt": (b"1 2 3 4\n5 6 7 8\n", "has 4 columns; expected 3"),
    "odd.txt": (b"1 2 3 -9 9 9\n5 6 7 8 300 9\n", "columns 4-6 are neither unit normals nor colours"),
    "ragged.xyz": (b"1 2 3\n4 5 6\n7 8\n", "not a table of numbers, or it is truncated .*row"),
    "words.xyz": (b"1 2 3\n4 five 6\n", "not a table of numbers.*five"),
    "binary.xyz": (b"\xff\xfe\x00\x01" * 10, "not a readable text file"),
    "empty.npy": (b"", "cannot be read as npy"),
    "garbage.npy": (b"no numpy here", "cannot be read as npy"),
    "garbage.npz": (b"no numpy here", "cannot be read as npz"),
    "garbage.h5": (b"no hdf5 here", "cannot be read as HDF5"),
    "garbage.ply": (b"\x00\x01garbage", "cannot be read as PLY"),
    "garbage.stl": (b"\x00\x01garbage", "cannot be read as STL|neither faces nor points"),
    "garbage.glb": (b"\x00\x01garbage", "cannot be read as GLB"),
    "empty.obj": (b"", "neither faces nor points|cannot be read"),
    "short.off": (b"OFF\n30 10 0\n0 0 0\n1 0 0\n", "cannot be read as OFF"),
    "flat.obj": (b"v 0 0 0\nv 1 1 1\nv 2 2 2\nf 1 2 3\n", "no area"),
    "nanmesh.off": (b"OFF\n3 1 0\n0 0 0\n1 0 nan\n0 1 0\n3 0 1 2\n", r"vertices row 1 \(from 0\) is not finite"),
    "movie.mp4": (b"", r"files ending in '\.mp4' cannot be read; supported are \.xyz"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files_end_in_one_error_that_names_them(name: str, tmp_path: Path) -> None:
    content, message = BAD[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        read_points(tmp_path / name)
    assert str(tmp_path / name) in str(caught.value)


@pytest.mark.parametrize("suffix", [".npy", ".npz", ".h5", ".ply", ".stl", ".glb"])
def test_truncated_files(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"a{suffix}"
    if suffix == ".npy":
        np.save(path, np.random.default_rng(0).normal(size=(100, 3)))
    elif suffix == ".npz":
        np.savez(path, points=np.random.default_rng(0).normal(size=(100, 3)))
    elif suffix == ".h5":
        with h5py.File(path, "w") as file:
            file["data"] = np.random.default_rng(0).normal(size=(100, 3))
    else:
        trimesh.creation.icosphere(2).export(path)
    read_points(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) * 2 // 3])
    with pytest.raises(DataError, match=f"a\\{suffix}: (cannot be read as|has neither faces nor points).*(damaged|truncated)"):
        read_points(path)


def test_a_missing_file_says_what_is_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.ply: this file does not exist \(its folder .* exists\)"):
        read_points(tmp_path / "none.ply")
    with pytest.raises(DataError, match="nor does its folder"):
        read_points(tmp_path / "no" / "none.ply")


def test_a_pickle_is_not_executed(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple:
            return Path.touch, (tmp_path / "executed",)

    np.save(tmp_path / "trap.npy", np.array([Trap()], dtype=object), allow_pickle=True)
    np.savez(tmp_path / "trap.npz", points=np.array([Trap()], dtype=object))
    (tmp_path / "plain.npy").write_bytes(pickle.dumps(Trap()))
    for name in ("trap.npy", "trap.npz", "plain.npy"):
        with pytest.raises(DataError, match=name):
            read_points(tmp_path / name)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"vertices": XYZ}, "none of the arrays coord, xyz.* is in it; it holds vertices"),
        ({"coord": XYZ[:, :2]}, r"coord must be \[3, 3\], got \[3, 2\]"),
        ({"coord": XYZ, "normal": NORMAL[:2]}, r"normal must be \[3, 3\], got \[2, 3\]"),
        ({"coord": XYZ.astype(str)}, "coord must be numbers"),
        ({"coord": XYZ, "rgb": RGB - 20.0}, "colours must lie in"),
        ({"coord": XYZ, "rgb": RGB * np.nan}, r"color row 0 \(from 0\) is not finite"),
    ],
)
def test_wrong_arrays_in_an_archive(arrays: dict, message: str, tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(DataError, match=message):
        read_points(tmp_path / "a.npz")


def test_map_coordinates_are_refused_unless_centred(tmp_path: Path) -> None:
    scan = XYZ + np.array([5.4e6, 3.2e5, 100.0])
    np.save(tmp_path / "utm.npy", scan)
    with pytest.raises(DataError, match="lose their detail in float32; subtract an offset"):
        read_points(tmp_path / "utm.npy")
    assert np.allclose(read_points(tmp_path / "utm.npy", center=True).coord, XYZ - (XYZ.min(axis=0) + XYZ.max(axis=0)) / 2, atol=1e-5)


@settings(deadline=None)
@given(width=st.integers(1, 12), columns=st.sampled_from(["auto", "xyz", "xyz+normal", "xyz+rgb", "all"]))
def test_only_documented_widths_are_accepted(width: int, columns: str) -> None:
    rng = np.random.default_rng(width)
    table = rng.normal(size=(20, width))
    table[:, 3:6] /= np.linalg.norm(table[:, 3:6], axis=1, keepdims=True) if width >= 6 else 1.0
    table[:, 6:] = np.abs(table[:, 6:])
    allowed = {"auto": (3, 6, 9), "xyz": (3,), "xyz+normal": (6,), "xyz+rgb": (6,), "all": (9,)}[columns]
    if width in allowed:
        coord, _, _ = split_columns(table, columns, "t")
        assert np.array_equal(coord, table[:, :3])
    else:
        with pytest.raises(DataError, match=f"t: has {width} columns"):
            split_columns(table, columns, "t")
