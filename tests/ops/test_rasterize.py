"""The Gaussian rasterizer: against a brute-force loop, its gradients, its promises about order and bits, and bad input."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from geossl import ops
from geossl.errors import UnknownNameError
from geossl.geometry import SH_C0, spherical_harmonics
from geossl.ops import _native
from geossl.ops.gaussians import _position

ROOT = Path(__file__).parents[2]


def scene(count: int = 30, cameras: int = 2, channels: int = 3, size: tuple[int, int] = (37, 21), lead: tuple[int, ...] = (), seed: int = 0,
          dtype: torch.dtype = torch.float64, spread: float = 0.3) -> dict:  # fmt: skip
    """Gaussians in the unit cube seen from about three units away, cameras turned a little, images that are no multiples of tiles."""
    g = torch.Generator().manual_seed(seed)

    def uniform(*shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        return torch.rand(*lead, *shape, generator=g, dtype=torch.float64) * (high - low) + low

    width, height = size
    view = torch.eye(4, dtype=torch.float64).expand(*lead, cameras, 4, 4).clone()
    angle = uniform(cameras, low=-0.3, high=0.3)
    view[..., 0, 0], view[..., 0, 2], view[..., 2, 0], view[..., 2, 2] = angle.cos(), angle.sin(), -angle.sin(), angle.cos()
    view[..., :3, 3] = uniform(cameras, 3, low=-0.1, high=0.1) + torch.tensor([0, 0, 3.0])
    k = torch.tensor([[0.9 * width, 0, width / 2], [0, 0.8 * width, height / 2 + 1], [0, 0, 1]], dtype=torch.float64)
    tensors = {
        "means": uniform(count, 3, low=-1, high=1),
        "quats": uniform(count, 4, low=-1, high=1),
        "scales": uniform(count, 3, low=0.01, high=spread),
        "opacities": uniform(count, low=0.02, high=0.98),
        "colors": uniform(count, channels),
        "viewmats": view,
        "Ks": k.expand(*lead, cameras, 3, 3).clone(),
    }
    return {name: value.to(dtype) for name, value in tensors.items()} | {"width": width, "height": height}


def with_harmonics(x: dict, degree: int | None) -> dict:
    """The same Gaussians with coefficients of spherical harmonics for colours."""
    if degree is None:
        return x
    count, terms = x["means"].shape[-2], (degree + 1) ** 2
    g = torch.Generator().manual_seed(degree)
    return x | {"colors": 0.3 * torch.randn(count, terms + 1, 3, generator=g, dtype=x["means"].dtype), "sh_degree": degree}


def brute_force(means2d: Tensor, conics: Tensor, opacities: Tensor, depths: Tensor, values: Tensor, width: int, height: int):
    """One image, every Gaussian on every pixel in the order of depth, as the definition says. Also the weights ``[N, H, W]``."""
    ys, xs = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    render = values.new_zeros(height, width, values.shape[-1])
    rest, live = values.new_ones(height, width), torch.ones(height, width, dtype=torch.bool)
    weights = [None] * len(depths)
    for i in torch.sort(depths, stable=True).indices.tolist():
        dx, dy = means2d[i, 0] - (xs + 0.5), means2d[i, 1] - (ys + 0.5)
        a, b, c = conics[i]
        sigma = 0.5 * (a * dx * dx + c * dy * dy) + b * dx * dy
        alpha = (opacities[i] * torch.exp(-sigma)).clamp(max=0.999)
        alpha = torch.where((sigma >= 0) & (alpha >= 1 / 255), alpha, 0.0)
        after = rest * (1 - alpha)
        live = live & ~((after <= 1e-4) & (alpha > 0))
        weights[i] = torch.where(live, alpha * rest, 0.0)
        render = render + weights[i][..., None] * values[i]
        rest = torch.where(live, after, rest)
    return render, rest, torch.stack(weights)


def leaves_of(x: dict, *names: str) -> list[Tensor]:
    return [x[name].requires_grad_() for name in names]


def close(got: Tensor, want: Tensor, relative: float) -> None:
    assert float((got.double() - want.double()).norm()) <= relative * float(want.double().norm()) + 1e-12


EVERYTHING = ("means", "quats", "scales", "opacities", "colors", "viewmats")


@pytest.mark.parametrize("channels", [1, 3, 4, 9])
@pytest.mark.parametrize("mode", ["RGB", "D", "RGB+ED"])
def test_images_are_those_of_the_definition(backend, channels, mode):
    x = scene(channels=channels, dtype=torch.float32)
    x["opacities"][:5] = 1.0  # saturates
    behind = torch.rand(2, channels)
    render, alpha, meta = ops.rasterize_gaussians(**x, backgrounds=behind, render_mode=mode, with_ids=True)
    for camera in range(2):
        depths = meta["depths"][camera].double()
        values = torch.cat([x["colors"].double(), depths[:, None]], -1)
        splats = (meta[name][camera].double() for name in ("means2d", "conics", "opacities"))
        drawn = (meta["radii"][camera] > 0).any(-1)
        want, rest, weights = brute_force(*splats, torch.where(drawn, depths, 1e9), values, 37, 21)
        want = torch.cat([want[..., :-1] + rest[..., None] * behind[camera], want[..., -1:]], -1)
        if "ED" in mode:
            want[..., -1] /= (1 - rest).clamp(min=1e-10)
        want = want[..., :-1] if mode == "RGB" else want[..., -1:] if mode == "D" else want
        assert render[camera].shape == want.shape
        torch.testing.assert_close(render[camera].double(), want, rtol=1e-5, atol=2e-5)
        torch.testing.assert_close(alpha[camera, ..., 0].double(), 1 - rest, rtol=0, atol=2e-6)
        heaviest = weights.max(0).values
        torch.testing.assert_close(meta["largest_weight"][camera].double(), heaviest, rtol=1e-5, atol=1e-6)
        found = meta["largest_id"][camera]
        assert torch.equal(found < 0, heaviest == 0)
        chosen = weights.gather(0, found.clamp(min=0)[None].long())[0]
        torch.testing.assert_close(torch.where(found < 0, 0.0, chosen), heaviest, rtol=1e-5, atol=1e-6)


VARIANTS = {
    "plain": {},
    "antialiased": {"rasterize_mode": "antialiased", "render_mode": "RGB+D"},
    "no_blur": {"eps2d": 0.01, "radius_clip": 2.0},
    "depth": {"render_mode": "ED"},
    "planes": {"near_plane": 2.5, "far_plane": 3.5, "render_mode": "RGB+ED"},
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("form", ["shared", "per_camera", "many_channels", "harmonics", "covariances"])
def test_double_precision_equals_the_reference(variant, form):
    options = dict(VARIANTS[variant])
    x = scene(lead=(2,), channels=6 if form == "many_channels" else 3)
    names = list(EVERYTHING)
    if form == "per_camera":
        x["colors"] = torch.rand(2, 2, 30, 3, dtype=torch.float64)
    if form == "harmonics":
        x["colors"], options["sh_degree"] = torch.randn(2, 30, 10, 3, dtype=torch.float64) * 0.5, 2
    if form == "covariances":
        factor = torch.randn(2, 30, 3, 3, dtype=torch.float64) * 0.1
        x |= {"covars": factor @ factor.mT, "quats": None, "scales": None}
        names[1:3] = ["covars"]
    if "RGB" in options.get("render_mode", "RGB"):
        x["backgrounds"] = torch.rand(2, 2, x["colors"].shape[-1], dtype=torch.float64)
        names.append("backgrounds")
    else:
        names.remove("colors")
    results = []
    for backend in ("native", "reference"):
        leaves = leaves_of(x, *names)
        render, alpha, meta = ops.rasterize_gaussians(**x, **options, backend=backend)
        loss = (render * torch.sin(torch.arange(render.numel()).view(render.shape))).sum() + alpha.square().sum() + meta["depths"].sum()
        results.append((render.detach(), alpha.detach(), *torch.autograd.grad(loss, leaves)))
    for got, want in zip(*results, strict=True):
        close(got, want, 1e-10)
    assert all(float(g.norm()) > 0 for g in results[0])


def test_finite_differences():
    x = scene(5, 1, size=(11, 9), seed=3)
    x["opacities"] = x["opacities"] * 0.5 + 0.2  # far from the caps, where the image is smooth but for the rim
    behind = torch.rand(1, 3, dtype=torch.float64)

    def run(means, quats, scales, opacities, colors, viewmats, backgrounds):
        out = ops.rasterize_gaussians(
            means, quats, scales, opacities, colors, viewmats, x["Ks"], 11, 9, backgrounds=backgrounds, render_mode="RGB+ED",
            rasterize_mode="antialiased", backend="native",
        )  # fmt: skip
        # Where a Gaussian ends at alpha = 1/255, a step of the difference may cross the threshold: weigh the pixels that all see.
        return out[0] * (out[1] > 0.2), out[1] * (out[1] > 0.2)

    assert torch.autograd.gradcheck(run, (*leaves_of(x, *EVERYTHING), behind.requires_grad_()), eps=1e-7, atol=2e-5, rtol=1e-4)


def test_second_derivatives_are_refused_but_for_the_reference():
    x = scene(3, 1, size=(8, 8))
    means = x["means"].requires_grad_()
    gradient = torch.autograd.grad(ops.rasterize_gaussians(**x)[0].square().sum(), means, create_graph=True)[0]
    with pytest.raises(RuntimeError, match=r"can be differentiated once.*backend='reference'"):
        gradient.sum().backward()
    gradient = torch.autograd.grad(ops.rasterize_gaussians(**x, backend="reference")[0].square().sum(), means, create_graph=True)[0]
    assert torch.autograd.grad(gradient.square().sum(), means)[0].isfinite().all()


def test_gradients_of_single_precision(backend):
    x = scene(lead=(2,), dtype=torch.float32, channels=5)
    names = (*EVERYTHING, "backgrounds")
    x["backgrounds"] = torch.rand(2, 2, 5)
    results = []
    for how, dtype in (("native", torch.float32), ("reference", torch.float64)):
        y = {name: value.detach().to(dtype) if isinstance(value, Tensor) else value for name, value in x.items()}
        leaves = leaves_of(y, *names)
        render, alpha, _ = ops.rasterize_gaussians(**y, backend=how, render_mode="RGB+D")
        weight = torch.sin(torch.arange(render.numel(), dtype=torch.float64)).view(render.shape)
        results.append(torch.autograd.grad((render * weight).sum() + (alpha * weight[..., :1]).sum(), leaves))
    for got, want in zip(*results, strict=True):
        close(got, want, 2e-5)


def test_absolute_gradients(backend):
    if backend == "twin":
        pytest.skip("a sum of absolute values is no derivative; the twin has none")
    x = scene(8, 1, channels=5, size=(10, 9), dtype=torch.float32)
    weight = torch.randn(1, 9, 10, 5)
    leaves_of(x, *EVERYTHING)
    render, _, meta = ops.rasterize_gaussians(**x, absgrad=True)
    meta["means2d"].retain_grad()
    (render * weight).sum().backward()
    y = {name: value.detach().double() if isinstance(value, Tensor) else value for name, value in x.items()}
    leaves_of(y, *EVERYTHING)
    render, _, want = ops.rasterize_gaussians(**y, backend="reference")
    total = torch.zeros(1, 8, 2, dtype=torch.float64)
    signed = torch.zeros_like(total)
    for pixel in (render * weight).sum(-1).flatten():
        gradient = torch.autograd.grad(pixel, want["means2d"], retain_graph=True)[0]
        total, signed = total + gradient.abs(), signed + gradient
    close(meta["means2d"].absgrad, total, 2e-5)
    close(meta["means2d"].grad, signed, 2e-5)


# Order and bits ------------------------------------------------------------------------------------------------------------------------


def everything(x: dict, **options) -> list[Tensor]:
    leaves = leaves_of(x, *EVERYTHING)
    render, alpha, meta = ops.rasterize_gaussians(**x, **options)
    gradients = torch.autograd.grad((render * render.detach().cos()).sum() + alpha.sum(), leaves)
    return [render.detach(), alpha.detach(), meta["radii"], meta["flatten_ids"], meta["isect_offsets"], *gradients]


def test_any_number_of_threads_gives_the_same_bits():
    x = scene(40_000, 2, channels=3, size=(150, 130), dtype=torch.float32, spread=0.03)
    results, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(everything(x, render_mode="RGB+D"))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_schedules_of_the_gpu_agree_and_images_equal_those_of_the_cpu(on_backend):
    x = scene(60, 2, channels=6, dtype=torch.float32)
    with on_backend("cpu"):
        cpu = everything(x, render_mode="RGB+D")
    results = []
    for seed in range(4):
        with on_backend("cuda", seed):
            results.append(everything(x, render_mode="RGB+D"))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(results[0][2:5], cpu[2:5], strict=True))
    for a, b in zip(results[0], cpu, strict=True):
        close(a, b, 1e-5)
    assert torch.equal(results[0][1], cpu[1])


def test_under_deterministic_algorithms():
    x = scene(dtype=torch.float32)
    want = everything(x, render_mode="RGB+ED")
    torch.use_deterministic_algorithms(True)
    try:
        got = everything(x, render_mode="RGB+ED")
        everything(x, backend="reference")
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_the_gpu_equals_the_cpu():
    x = scene(2000, 2, channels=6, size=(90, 70), dtype=torch.float32, spread=0.1)
    want = everything(x, render_mode="RGB+D")
    y = {name: value.detach().cuda() if isinstance(value, Tensor) else value for name, value in x.items()}
    got, again = (everything(y, render_mode="RGB+D", backend="native") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(got, again, strict=True))
    assert all(torch.equal(a.cpu(), b) for a, b in zip(got[2:5], want[2:5], strict=True))
    for a, b in zip(got, want, strict=True):
        close(a.cpu(), b, 1e-4)


@pytest.mark.slow
def test_every_vector_width_gives_the_same_bits(tmp_path):
    if shutil.which("g++") is None or platform.machine() != "x86_64":
        pytest.skip("needs g++ on x86-64")
    flags = Path("/proc/cpuinfo").read_text()
    levels = ["x86-64", *(["x86-64-v3"] if " avx2 " in flags else []), *(["x86-64-v4"] if " avx512vl " in flags else [])]
    sources = [*sorted((ROOT / "cuda_ext/cpu").glob("gaussians*.cpp")), *(ROOT / "cuda_ext/cpu" / f for f in ("info.cpp", "threads.cpp"))]
    x = scene(3000, 1, size=(100, 90), dtype=torch.float32, channels=6, spread=0.1)
    results = [everything(x)]
    for level in levels:
        library = tmp_path / f"{level}.so"
        options = [
            "-O2",
            "-fvect-cost-model=dynamic",
            "-funswitch-loops",
            "-ffp-contract=off",
            "-fno-trapping-math",
            "-fno-math-errno",
            "-fPIC",
            "-shared",
            f"-march={level}",
        ]
        without_clones = ["-D__SANITIZE_ADDRESS__", '-DGEOSSL_WITHOUT_CUDA=""']
        files = [f"-I{ROOT / 'cuda_ext/include'}", *map(str, sources), "-o", str(library)]
        subprocess.run(["g++", "-std=c++17", *options, *without_clones, *files, "-lpthread"], check=True)
        with _native.substitute("cpu", library):
            results.append(everything(x))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


HARMONICS = """
import sys
import torch
from geossl import ops

torch.set_num_threads(1)
x, weight = torch.load(sys.argv[1])
leaves = [x[name].requires_grad_() for name in ("means", "quats", "scales", "opacities", "colors", "viewmats")]
render, alpha, _ = ops.rasterize_gaussians(**x)
torch.save([render.detach(), alpha.detach(), *torch.autograd.grad((render * weight).sum() + alpha.sum(), leaves)], sys.argv[2])
"""


def test_harmonics_are_the_same_bits_on_any_processor(tmp_path):
    """Torch itself and MKL choose their code by the processor; both can be told to take that of an old one."""
    x = with_harmonics(scene(5000, 3, size=(80, 60), dtype=torch.float32, spread=0.1), 3)
    torch.save((x, torch.rand(3, 60, 80, 3)), tmp_path / "scene.pt")
    results = []
    for name, changes in (("old", {"ATEN_CPU_CAPABILITY": "default", "MKL_ENABLE_INSTRUCTIONS": "SSE4_2"}), ("this", {})):
        command = [sys.executable, "-W", "ignore", "-c", HARMONICS, str(tmp_path / "scene.pt"), str(tmp_path / name)]
        subprocess.run(command, check=True, cwd=ROOT, env={**os.environ, **changes})
        results.append(torch.load(tmp_path / name))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_spherical_harmonics_of_directions_of_any_length(dtype):
    tiny, largest = torch.finfo(dtype).tiny, torch.finfo(dtype).max / 2
    directions = torch.randn(20, 3, dtype=dtype)
    directions /= directions.abs().amax(1, keepdim=True)
    coefficients = torch.randn(20, 16, 3, dtype=dtype)
    want = spherical_harmonics(3, directions, coefficients)
    for length in (4 * tiny, 1e-30, 1e30, largest):
        torch.testing.assert_close(spherical_harmonics(3, directions * length, coefficients), want, rtol=1e-4, atol=1e-5)
    for length in (0.0, tiny / 8):  # no direction: degree 0 alone, and 0 as the gradient
        zero = (directions * length).requires_grad_()
        values = spherical_harmonics(1, zero, coefficients)
        torch.testing.assert_close(values, SH_C0 * coefficients[:, 0])
        assert not torch.autograd.grad(values.sum(), zero)[0].any()


def test_positions_of_cameras_are_those_of_the_inverse():
    poses = torch.randn(2, 3, 4, 4, dtype=torch.float64).requires_grad_()
    position, failed = _position(poses)
    want = torch.linalg.inv(poses)[..., :3, 3]
    torch.testing.assert_close(position, want)
    assert not failed.any()
    weight = torch.randn_like(want)
    got, expected = (torch.autograd.grad((p * weight).sum(), poses)[0] for p in (position, want))
    torch.testing.assert_close(got, expected)


def test_equal_depths_are_drawn_in_index_order(backend):
    x = scene(6, 1, dtype=torch.float32)
    x["viewmats"] = torch.eye(4)[None].clone()
    x["viewmats"][0, 2, 3] = 3
    x["means"] = torch.zeros(6, 3)
    x["opacities"] = torch.full((6,), 0.5)
    x["colors"] = torch.eye(6)
    render, _, meta = ops.rasterize_gaussians(**x)
    center = render[0, 11, 18]
    assert bool((center.diff() < 0).all())
    for row in meta["flatten_ids"].split(meta["isect_offsets"].flatten().diff(append=torch.tensor([len(meta["flatten_ids"])])).tolist()):
        assert row.tolist() == sorted(row.tolist())


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10_000), count=st.integers(0, 40), width=st.integers(1, 40), height=st.integers(1, 40), spread=st.floats(0.02, 3.0)
)
def test_properties(seed, count, width, height, spread):
    x = scene(count, 1, size=(width, height), seed=seed, spread=spread, dtype=torch.float32)
    render, alpha, meta = ops.rasterize_gaussians(**x, render_mode="RGB+D", with_ids=True)
    assert bool((alpha >= 0).all())
    assert bool((alpha <= 1).all())
    assert bool((render[..., :3] <= alpha + 1e-5).all())  # colours are at most 1
    assert bool((meta["largest_weight"] <= alpha[..., 0] + 1e-5).all())
    # The order in which Gaussians are given does not matter.
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    y = x | {name: x[name][order] for name in ("means", "quats", "scales", "opacities", "colors")}
    other, _, _ = ops.rasterize_gaussians(**y, render_mode="RGB+D")
    assert torch.equal(render, other)
    # A background adds what the Gaussians leave.
    behind = torch.rand(1, 3)
    over, _, _ = ops.rasterize_gaussians(**x, render_mode="RGB+D", backgrounds=behind)
    torch.testing.assert_close(over[..., :3], render[..., :3] + (1 - alpha) * behind[:, None, None], rtol=0, atol=1e-6)
    assert torch.equal(over[..., 3], render[..., 3])
    # The length and sign of quaternions do not matter.
    turned, _, _ = ops.rasterize_gaussians(**x | {"quats": x["quats"] * -4.0}, render_mode="RGB+D")
    torch.testing.assert_close(turned, render, rtol=1e-4, atol=1e-4)


def test_views_are_batched_views_one_by_one(backend):
    x = scene(lead=(2, 1), cameras=2, dtype=torch.float32)
    render, alpha, meta = ops.rasterize_gaussians(**x)
    assert render.shape == (2, 1, 2, 21, 37, 3)
    assert alpha.shape == (2, 1, 2, 21, 37, 1)
    assert meta["radii"].shape == (2, 1, 2, 30, 2)
    assert meta["isect_offsets"].shape == (2, 1, 2, 2, 3)
    for b in range(2):
        for c in range(2):
            one = {name: x[name][b, 0] for name in ("means", "quats", "scales", "opacities", "colors")}
            alone, _, _ = ops.rasterize_gaussians(
                **one, viewmats=x["viewmats"][b, 0, c, None], Ks=x["Ks"][b, 0, c, None], width=37, height=21
            )
            torch.testing.assert_close(render[b, 0, c], alone[0], rtol=0, atol=0 if backend != "twin" else 1e-6)


def test_strides_and_half_precision():
    x = scene(dtype=torch.float32)
    want, _, _ = ops.rasterize_gaussians(**x)
    strided = {n: v.mT.contiguous().mT if isinstance(v, Tensor) and v.dim() > 1 else v for n, v in x.items()}
    assert torch.equal(ops.rasterize_gaussians(**strided)[0], want)
    half = {n: v.half() if isinstance(v, Tensor) else v for n, v in x.items()}
    render = ops.rasterize_gaussians(**half)[0]
    assert render.dtype == torch.float32
    assert torch.equal(render, ops.rasterize_gaussians(**{n: v.float() if isinstance(v, Tensor) else v for n, v in half.items()})[0])
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ops.rasterize_gaussians(**x)[0], want)


# Bad input ------------------------------------------------------------------------------------------------------------------------------

NAN, INF = float("nan"), float("inf")
SPOILT = {
    "zero quaternion": ("quats", 0.0),
    "quaternion of NaN": ("quats", NAN),
    "infinite quaternion": ("quats", INF),
    "negative scale": ("scales", -0.1),
    "scale of NaN": ("scales", NAN),
    "infinite scale": ("scales", INF),
    "mean of NaN": ("means", NAN),
    "infinite mean": ("means", INF),
    "opacity of NaN": ("opacities", NAN),
    "colour of NaN": ("colors", NAN),
    "infinite colour": ("colors", INF),
}


@pytest.mark.parametrize("degree", [None, 0, 3])
@pytest.mark.parametrize("kind", SPOILT)
def test_invalid_gaussians_are_not_drawn(backend, kind, degree):
    name, value = SPOILT[kind]
    x = with_harmonics(scene(dtype=torch.float32, channels=5), degree)
    spoilt = torch.arange(30) % 3 == 1
    if name == "colors" and degree is not None:
        x[name][spoilt, degree, 1] = value  # one coefficient
    else:
        x[name][spoilt] = value
    leaves = leaves_of(x, *EVERYTHING)
    render, alpha, _ = ops.rasterize_gaussians(**x)
    gradients = torch.autograd.grad(render.sum() + alpha.sum(), leaves)
    rest = x | {n: x[n].detach()[~spoilt] for n in EVERYTHING[:5]}
    torch.testing.assert_close(render, ops.rasterize_gaussians(**rest)[0], rtol=0, atol=0 if backend != "twin" else 1e-6)
    assert all(bool(g.isfinite().all()) for g in gradients)
    for gradient in gradients[:5]:
        assert not gradient[spoilt].any()
        assert gradient[~spoilt].any()
    # Nor do they reach the gradients of cameras.
    view = x["viewmats"].detach().clone().requires_grad_()
    render, alpha, _ = ops.rasterize_gaussians(**rest | {"viewmats": view})
    close(gradients[5], torch.autograd.grad(render.sum() + alpha.sum(), view)[0], 1e-5)


@pytest.mark.parametrize("degree", [None, 3])
@pytest.mark.parametrize("value", [NAN, INF])
def test_one_invalid_pose_leaves_the_others_alone(backend, value, degree):
    x = with_harmonics(scene(dtype=torch.float32), degree)
    alone = x | {"viewmats": x["viewmats"][:1].clone(), "Ks": x["Ks"][:1]}
    x["viewmats"][1, 0, 3] = value
    results = []
    for y in (x, alone):
        leaves = leaves_of(y, *EVERYTHING)
        render, alpha, _ = ops.rasterize_gaussians(**y, render_mode="RGB+D")
        results.append((render[0].detach(), alpha[0].detach(), *torch.autograd.grad(render.square().sum() + alpha.sum(), leaves)))
    assert not results[0][-1][1].any()
    for got, want in zip(results[0], results[1], strict=True):
        close(got[:1] if got.shape != want.shape else got, want, 1e-6)


@pytest.mark.parametrize("length", [1e30, 1e-22, 1e-30, 1e-37, 1e-42])
def test_quaternions_of_any_length(backend, length):
    x = scene(dtype=torch.float32)
    quats = torch.nn.functional.normalize(x["quats"], dim=1)
    y = x | {"quats": quats * length}
    leaves = leaves_of(y, *EVERYTHING)
    render, alpha, _ = ops.rasterize_gaussians(**y)
    gradients = torch.autograd.grad(1e-3 * render.sum(), leaves)
    assert all(bool(g.isfinite().all()) for g in gradients)
    if length < torch.finfo(torch.float32).tiny:  # counts as zero
        assert not alpha.any()
        assert not any(bool(g.any()) for g in gradients)
    else:
        torch.testing.assert_close(render, ops.rasterize_gaussians(**x | {"quats": quats})[0], rtol=1e-4, atol=1e-5)
        leaf = quats.double().requires_grad_()
        z = {n: v.detach().double() if isinstance(v, Tensor) else v for n, v in x.items()} | {"quats": leaf}
        want = torch.autograd.grad(1e-3 * ops.rasterize_gaussians(**z, backend="reference")[0].sum(), leaf)[0]
        close(gradients[1].double() * length, want, 1e-4)


@pytest.mark.parametrize("degree", [None, 3])
def test_degenerate_scenes(backend, degree):
    x = with_harmonics(scene(20, 1, dtype=torch.float32), degree)
    behind = torch.tensor([[0.2, 0.4, 0.6]])
    empty = x | {n: x[n][:0] for n in EVERYTHING[:5]}
    away = x | {"means": x["means"] - torch.tensor([0, 0, 10.0])}
    faint = x | {"opacities": x["opacities"] * 0.003}
    nan_view = x | {"viewmats": torch.full((1, 4, 4), NAN)}
    for y in (empty, away, faint, nan_view):
        leaves = leaves_of(y := {n: v.detach().clone() if isinstance(v, Tensor) else v for n, v in y.items()}, *EVERYTHING)
        render, alpha, meta = ops.rasterize_gaussians(**y, backgrounds=behind, render_mode="RGB+ED", with_ids=True)
        assert torch.equal(render[0, ..., :3], behind.expand(21, 37, 3))
        assert not render[..., 3].any()
        assert not alpha.any()
        assert bool((meta["largest_id"] == -1).all())
        gradients = torch.autograd.grad(render.sum(), leaves, allow_unused=True)
        assert not any(g is not None and g.any() for g in gradients)
    assert ops.rasterize_gaussians(**x | {"viewmats": x["viewmats"][:0], "Ks": x["Ks"][:0]})[0].shape == (0, 21, 37, 3)
    flat = x | {"scales": torch.zeros(20, 3)}  # points: the blur alone
    huge = x | {"scales": torch.full((20, 3), 1e4)}
    far = x | {"means": x["means"] + 1e6, "viewmats": torch.eye(4)[None].clone()}
    far["viewmats"][0, :3, 3] = torch.tensor([-1e6, -1e6, -1e6 + 3])
    singular = x | {"viewmats": torch.zeros(1, 4, 4)}
    singular["viewmats"][0, 2, 3] = 2.0  # every Gaussian at one place
    large = x | {"means": x["means"] * 1e30, "scales": x["scales"] * 1e25}
    for y in (flat, huge, far, large) if degree else (flat, huge, far, singular, large):  # a singular pose has no directions
        y = {n: v.detach().clone() if isinstance(v, Tensor) else v for n, v in y.items()}
        leaves = leaves_of(y, *EVERYTHING)
        render, alpha, _ = ops.rasterize_gaussians(**y, render_mode="RGB+ED", backgrounds=behind)
        assert bool(render.isfinite().all())
        assert bool(alpha.isfinite().all())
        assert all(bool(g.isfinite().all()) for g in torch.autograd.grad(render.sum(), leaves))
    render, alpha, meta = ops.rasterize_gaussians(**huge)
    assert bool((alpha > 0.9).all())
    assert int(meta["tiles_per_gauss"].max()) == 6


def test_one_pixel():
    x = scene(5, 1, size=(1, 1), dtype=torch.float32)
    x["Ks"] = torch.tensor([[[1.0, 0, 0.5], [0, 1, 0.5], [0, 0, 1]]])
    assert ops.rasterize_gaussians(**x)[0].shape == (1, 1, 1, 3)


X = scene(4, 1, dtype=torch.float32)
rasterize = ops.rasterize_gaussians
ERRORS = [
    ({"means": X["means"][:, :2]}, ValueError, r"means must be \[..., N, 3\], got float32 \[4, 2\]"),
    ({"means": [1.0]}, TypeError, "means must be a floating tensor, got list"),
    ({"means": X["means"].long()}, TypeError, "means must be a floating tensor, got int64"),
    ({"quats": X["quats"][:3]}, ValueError, r"quats must be \[..., N, 4\], here \[4, 4\], got float32 \[3, 4\]"),
    ({"quats": None}, ValueError, "give quats and scales, or covars"),
    ({"covars": torch.zeros(4, 3, 3)}, ValueError, "give quats and scales, or covars"),
    ({"scales": X["scales"].double()}, TypeError, "scales is torch.float64 but means is torch.float32"),
    ({"scales": X["scales"].to("meta")}, ValueError, "scales is on meta but the points are on cpu"),
    ({"opacities": X["opacities"][:, None]}, ValueError, r"opacities must be \[..., N\], here \[4\]"),
    ({"opacities": X["opacities"] * 5 - 2}, ValueError, r"opacities must lie in \[0, 1\].*torch.sigmoid"),
    ({"colors": X["colors"][:3]}, ValueError, r"colors must be \[..., N, D\] or \[..., C, N, D\], here N = 4 and C = 1"),
    ({"colors": torch.rand(4, 4, 3)}, ValueError, "coefficients of spherical harmonics need sh_degree"),
    ({"colors": torch.rand(4, 4, 3), "sh_degree": 2}, ValueError, "K >= 9 for sh_degree 2"),
    ({"colors": torch.rand(4, 4, 3), "sh_degree": 1.0}, ValueError, "sh_degree must be None, 0, 1, 2 or 3, got 1.0"),
    ({"colors": torch.rand(4, 4, 3), "sh_degree": True}, ValueError, "sh_degree must be None, 0, 1, 2 or 3, got True"),
    ({"Ks": X["Ks"].index_fill(2, torch.tensor([2]), NAN)}, ValueError, r"Ks must be finite, got \[\[.*nan"),
    ({"Ks": X["Ks"] / 0}, ValueError, "Ks must be finite"),
    ({"backgrounds": torch.tensor([[0.5, NAN, 0.5]])}, ValueError, r"backgrounds must be finite, got \[0.5, nan, 0.5\]"),
    ({"backgrounds": torch.tensor([[0.5, NAN, 0.5]]), "backend": "reference"}, ValueError, "backgrounds must be finite"),
    ({"width": 2**33}, ValueError, "width must be at most 8388608, got 8589934592"),
    ({"near_plane": "x"}, TypeError, "near_plane must be a number, got str 'x'"),
    ({"radius_clip": None}, TypeError, "radius_clip must be a number, got NoneType None"),
    ({"sh_degree": 4}, ValueError, "sh_degree must be None, 0, 1, 2 or 3, got 4"),
    ({"viewmats": X["viewmats"][0]}, ValueError, r"viewmats must be \[..., C, 4, 4\].*one camera needs viewmats\[None\]"),
    ({"viewmats": torch.zeros(1, 4, 4), "colors": torch.rand(4, 4, 3), "sh_degree": 1}, ValueError, r"viewmats\[0\] is singular"),
    ({"Ks": X["Ks"][0]}, ValueError, r"Ks must be \[..., C, 3, 3\], one per viewmat, here \[1, 3, 3\], got float32 \[3, 3\]"),
    ({"Ks": X["Ks"] * 0}, ValueError, "Ks must have positive focal lengths"),
    ({"width": 0}, ValueError, "width must be at least 1, got 0"),
    ({"height": 2.5}, TypeError, "height must be a whole number, got float 2.5"),
    ({"backgrounds": torch.zeros(3)}, ValueError, r"backgrounds must be \[..., C, D\], here \[1, 3\], got float32 \[3\]"),
    ({"near_plane": -1.0}, ValueError, "near_plane must be a number of at least 0, got -1.0"),
    ({"eps2d": NAN}, ValueError, "eps2d must be a number of at least 0, got nan"),
    ({"render_mode": "RGBD"}, UnknownNameError, r"unknown rasterize_gaussians render_mode 'RGBD'; did you mean 'RGB\+D'"),
    ({"rasterize_mode": "antialias"}, UnknownNameError, "did you mean 'antialiased'"),
    ({"backend": "cuda_native"}, UnknownNameError, "did you mean 'native'"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "error", "message"), ERRORS)
def test_wrong_arguments(change, error, message):
    with pytest.raises(error, match=message):
        ops.rasterize_gaussians(**X | change)


def test_no_channels(backend):
    x = scene(dtype=torch.float32, channels=0)
    render, alpha, _ = ops.rasterize_gaussians(**x)
    assert render.shape == (2, 21, 37, 0)
    assert float(alpha.max()) > 0.5
    assert ops.rasterize_gaussians(**x, render_mode="RGB+D")[0].shape == (2, 21, 37, 1)


def test_gsplat_needs_a_gpu():
    with pytest.raises((ValueError, ImportError), match="gsplat"):
        ops.rasterize_gaussians(**X, backend="gsplat")


# The arguments of gsplat.rasterization 1.5.3 that are used.
GSPLAT = (
    "means", "quats", "scales", "opacities", "colors", "viewmats", "Ks", "width", "height", "near_plane", "far_plane", "radius_clip",
    "eps2d", "sh_degree", "packed", "tile_size", "backgrounds", "render_mode", "sparse_grad", "absgrad", "rasterize_mode",
)  # fmt: skip


@pytest.fixture
def gsplat_calls(monkeypatch):
    """A module gsplat that notes its arguments and answers with the native kernels; and the CPU counts as a GPU."""
    calls: list[dict] = []

    def rasterization(*positional, **named):
        assert len(positional) == 9
        assert set(named) <= set(GSPLAT[9:])
        call = dict(zip(GSPLAT, positional, strict=False)) | named
        calls.append(call)
        taken = {name: value for name, value in call.items() if name != "packed"}
        return ops.rasterize_gaussians(**taken, backend="native")

    module = types.ModuleType("gsplat")
    module.rasterization = rasterization
    monkeypatch.setitem(sys.modules, "gsplat", module)
    monkeypatch.setattr(sys.modules["geossl.ops.gaussians"], "_choose", lambda backend, means: backend)
    return calls


@pytest.mark.parametrize("lead", [(), (2,), (2, 1)])
@pytest.mark.parametrize("mode", ["RGB", "ED", "RGB+D"])
@pytest.mark.parametrize("form", ["shared", "per_camera", "harmonics"])
def test_gsplat_gets_and_returns_what_it_defines(gsplat_calls, lead, mode, form):
    x = scene(lead=lead, dtype=torch.float32)
    options: dict = {"render_mode": mode, "rasterize_mode": "antialiased", "absgrad": True, "near_plane": 0.5, "eps2d": 0.2}
    if form == "per_camera":
        x["colors"] = x["colors"].unsqueeze(-3).repeat_interleave(2, -3)
    elif form == "harmonics":
        x["colors"] = torch.randn(*lead, 30, 4, 3) * 0.3
        options["sh_degree"] = 1
    if "RGB" in mode:
        options["backgrounds"] = torch.rand(*lead, 2, 3)
    render, alpha, meta = ops.rasterize_gaussians(**x, **options, backend="gsplat")
    want = ops.rasterize_gaussians(**x, **options, backend="native")
    assert torch.equal(render, want[0])
    assert torch.equal(alpha, want[1])
    assert {n: v.shape for n, v in meta.items() if isinstance(v, Tensor)} == {
        n: v.shape for n, v in want[2].items() if isinstance(v, Tensor)
    }
    (call,) = gsplat_calls
    for name in ("means", "quats", "scales", "opacities", "viewmats", "Ks"):
        assert torch.equal(call[name], x[name])
    assert call["colors"].shape == (x["colors"].shape if "RGB" in mode else (*lead, 30, 3))
    assert call["packed"] is False
    chosen = {"near_plane": 0.5, "eps2d": 0.2, "far_plane": 1e10, "absgrad": True, "rasterize_mode": "antialiased", "render_mode": mode}
    assert {name: call[name] for name in chosen} == chosen


def test_gsplat_gets_checked_values(gsplat_calls):
    for change, message in (
        ({"opacities": X["opacities"] + 1}, r"opacities must lie in \[0, 1\]"),
        ({"Ks": X["Ks"] * 0}, "Ks must have positive focal lengths"),
        ({"backgrounds": torch.full((1, 3), NAN)}, "backgrounds must be finite"),
        ({"with_ids": True}, "backend 'gsplat' has no with_ids"),
    ):
        with pytest.raises(ValueError, match=message):
            ops.rasterize_gaussians(**X | change, backend="gsplat")
    assert not gsplat_calls


def test_compiles_as_a_whole():
    torch._dynamo.reset()
    x = scene(dtype=torch.float32)

    def run(means: Tensor, colors: Tensor) -> Tensor:
        render, alpha, _ = ops.rasterize_gaussians(**x | {"means": means, "colors": colors}, render_mode="RGB+ED")
        return render.sum() + alpha.square().sum()

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        for function in (run, compiled):
            leaves = leaves_of(x, "means", "colors")
            results = torch.autograd.grad(function(*leaves), leaves)
            if function is run:
                want = results
    for a, b in zip(results, want, strict=True):
        torch.testing.assert_close(a, b)
