"""Training steps of CroCo on pairs of images: ViT-Base with the small decoder, with rotary and with sin-cos positions.

Beside each step stands a row with its linear layers as bare matrix products, forward and backward: what no form can go below that computes
the same tokens.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import torch
from torch import Tensor

from geossl.cli.benchmark.measure import Case, nbytes
from geossl.cli.benchmark.plain_croco import croco_features, croco_loss
from geossl.cli.benchmark.steps import DTYPES, Step, optimizer_case, relative_difference, step_case, step_run
from geossl.geometry import ImageBatch
from geossl.methods import METHODS
from geossl.models import BACKBONES

VARIANTS = {"rope": "croco_vit_base", "cosine": "croco_vit_base_cosine"}
TARGETS = {torch.float32: 8.0, torch.bfloat16: 4.0}
"""CPU seconds of a step of four pairs of 224 x 224 pixels, one thread, on a machine with bfloat16 products."""


def build_step(variant: str, quick: bool = False) -> Step:
    """Make the step: "rope" or "cosine" on four pairs of images."""
    torch.manual_seed(0)
    backbone, method, size, pairs = BACKBONES.config(VARIANTS[variant]), METHODS.config("croco"), 224, 4
    if quick:
        size, pairs = 64, 2
        backbone = dataclasses.replace(backbone, image_size=(size, size), dim=24, depth=2, heads=2)
        method = dataclasses.replace(method, decoder=dataclasses.replace(method.decoder, dim=16, depth=2, heads=2))
    batch = ImageBatch(torch.randn(pairs, 3, size, size), torch.randn(pairs, 3, size, size))
    words = f"{pairs} pairs of {size} x {size} pixels, {backbone.name} {backbone.dim}/{backbone.depth}/{backbone.heads}"
    decoder = method.decoder
    return Step(method.build(backbone.build()).train(), batch, f"{words}, decoder {decoder.dim}/{decoder.depth}/{decoder.heads}")


def cases(quick: bool) -> dict[str, Callable[[], Case]]:
    """Return the cases of the step suite for pairs of images by name."""
    found: dict[str, Callable[[], Case]] = {}
    for variant in VARIANTS:
        for dtype in DTYPES:
            found[f"croco/{variant}/step/{_short(dtype)}"] = functools.partial(_step_case, variant, dtype, quick)
            found[f"croco/{variant}/linear layers/{_short(dtype)}"] = functools.partial(_products_case, variant, dtype, quick)
    found["croco/rope/optimizer"] = lambda: optimizer_case(build_step("rope", quick))
    for dtype in DTYPES:
        found[f"croco/rope/features/{_short(dtype)}"] = functools.partial(_features_case, dtype, quick)
    return found


def _step_case(variant: str, dtype: torch.dtype, quick: bool) -> Case:
    step = build_step(variant, quick)
    peers = {"plain torch": step_run(step, dtype, croco_loss)}
    return step_case(step, dtype, None if quick else TARGETS[dtype], peers, step_run(step, dtype), "forward + backward")


def _products_case(variant: str, dtype: torch.dtype, quick: bool) -> Case:
    step = build_step(variant, quick)
    tensors = []
    for rows, inner, columns, needs_input_gradient in linear_shapes(step):
        x, weight, gradient = (torch.randn(shape).to(dtype) for shape in ((rows, inner), (columns, inner), (rows, columns)))
        tensors.append((x, weight, gradient, needs_input_gradient))

    def run() -> None:
        for x, weight, gradient, needs_input_gradient in tensors:
            _ = x @ weight.T
            _ = gradient.T @ x
            if needs_input_gradient:
                _ = gradient @ weight

    return Case(
        inputs=f"{step.inputs}; {len(tensors)} linear layers, output and both gradients of each, nothing else",
        run=run,
        moved=sum(nbytes(*parts[:3]) for parts in tensors),
        moved_is="inputs, weights and gradients read once",
        dtype=dtype,
    )


def linear_shapes(step: Step) -> list[tuple[int, int, int, bool]]:
    """Rows, columns in, columns out of every product of a linear layer in one forward pass, and whether its input gets a gradient."""
    shapes: list[tuple[int, int, int, bool]] = []

    def record(module: torch.nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        shapes.append((args[0].shape[0], args[0].shape[1], output.shape[1], args[0].requires_grad))

    hooks = [part.register_forward_hook(record) for part in step.module.modules() if isinstance(part, torch.nn.Linear)]
    step.module(step.batch, generator=torch.Generator().manual_seed(0))
    for hook in hooks:
        hook.remove()
    rows, dim = shapes[-1][0], step.module.decoder.config.dim
    cells = step.batch.image[0, 0].numel() // step.module.backbone.config.patch**2 * len(step.batch)
    # The last decoder block asks for hidden patches only: its joint projection is two products, which no hook sees.
    return [*shapes, (rows, dim, dim, True), (cells, dim, 2 * dim, True)]


def _features_case(dtype: torch.dtype, quick: bool) -> Case:
    step = build_step("rope", quick)
    backbone, images = step.module.backbone.eval(), step.batch.image

    def run(features: Callable[[Tensor], Tensor]) -> Tensor:
        with torch.inference_mode(), torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            return features(images)

    ours = functools.partial(run, lambda images: backbone(images).flatten(2).transpose(1, 2))
    return Case(
        inputs=f"{step.inputs}; all patches of the first images, no gradient",
        run=ours,
        moved=nbytes(images, *backbone.parameters()) + 4 * ours().numel(),
        moved_is="images and weights read, features written",
        dtype=dtype,
        peers={"plain torch": functools.partial(run, functools.partial(croco_features, backbone))},
        differs=lambda a, b: relative_difference(a, b, 1e-4 if dtype == torch.float32 else 0.05, "features"),
    )


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
