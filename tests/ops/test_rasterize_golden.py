"""The Gaussian rasterizer against gsplat's own projection and a brute-force compositing in float64: ``tests/golden/gaussian_splatting``."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from geossl import ops

ROOT = Path(os.environ.get("GEOSSL_GOLDEN", Path(__file__).parents[1] / "golden")) / "gaussian_splatting"
FILES = sorted(ROOT.glob("*.safetensors"))
INPUTS = ("means", "quats", "scales", "opacities", "colors", "viewmats")

pytestmark = pytest.mark.golden


class Case:
    """One golden file: tensors and options."""

    def __init__(self, path: Path) -> None:
        with safe_open(path, "pt") as file:
            self.tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            meta = file.metadata()
        degree = int(meta["sh_degree"])
        self.width, self.height = int(meta["width"]), int(meta["height"])
        self.options = {
            "sh_degree": None if degree < 0 else degree,
            "rasterize_mode": meta["rasterize_mode"],
            **{name: float(meta[name]) for name in ("eps2d", "near_plane", "far_plane")},
        }

    def render(self, dtype: torch.dtype, **options):
        x = {name[3:]: value.to(dtype) for name, value in self.tensors.items() if name.startswith("in.")}
        leaves = [x[name].requires_grad_() for name in INPUTS]
        out = ops.rasterize_gaussians(
            *leaves, x["Ks"], self.width, self.height, backgrounds=x.get("backgrounds"), **{"render_mode": "RGB+D"} | self.options | options
        )
        return x, leaves, out

    def worst(self, got: torch.Tensor, name: str) -> float:
        """Largest difference on pixels where no threshold is so close that rounding may decide."""
        clear = self.tensors["out.ambiguous"] == 0
        return float((got.detach().double() - self.tensors[f"out.{name}"].double())[clear].abs().max())


@pytest.fixture(params=FILES, ids=lambda path: path.stem)
def case(request: pytest.FixtureRequest) -> Case:
    return Case(request.param)


def test_there_are_cases():
    assert FILES


def check(case: Case, dtype: torch.dtype, **options) -> None:
    x, leaves, (render, alpha, meta) = case.render(dtype, **options)
    # Stored values are rounded to float32, and a float32 run of the same mathematics differs by 3e-5 of depth.
    image, gradient = (1e-5, 1e-5) if dtype == torch.float32 else (5e-7, 1e-7)
    assert case.worst(render[..., :-1], "render") < image
    assert case.worst(alpha[..., 0], "alpha") < image
    assert case.worst(render[..., -1], "depth_acc") < 4 * image
    assert torch.equal(meta["radii"], case.tensors["out.radii"])
    drawn = case.tensors["out.valid"] > 0
    torch.testing.assert_close(meta["means2d"][drawn].float(), case.tensors["out.means2d"][drawn], rtol=0, atol=5e-5)
    torch.testing.assert_close(meta["conics"][drawn].float(), case.tensors["out.conics"][drawn], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(meta["opacities"].float(), case.tensors["out.opacities_eff"] * drawn, rtol=1e-5, atol=1e-6)
    loss = (x["w_rgb"] * render[..., :-1]).sum()
    losses = {"rgb": loss, "all": loss + (x["w_alpha"] * alpha[..., 0]).sum() + (x["w_depth"] * render[..., -1]).sum()}
    for name, value in losses.items():
        for leaf, got in zip(INPUTS, torch.autograd.grad(value, leaves, retain_graph=True), strict=True):
            want = case.tensors[f"grad_{name}.{leaf}"].double()
            assert float((got - want).norm() / want.norm()) < gradient, (name, leaf)


def test_single_precision(case, backend):
    check(case, torch.float32)


@pytest.mark.parametrize("how", ["native", "reference"])
def test_double_precision(case, how):
    check(case, torch.float64, backend=how)


def test_expected_depth(case, backend):
    with torch.no_grad():
        _, _, (render, _, _) = case.render(torch.float32, render_mode="ED")
    assert render.shape[-1] == 1
    assert case.worst(render[..., 0], "depth_exp") < 1e-4
