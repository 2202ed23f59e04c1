"""Training steps, their parts, the optimiser and feature extraction."""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from geossl.cli.benchmark.clouds import surfaces
from geossl.cli.benchmark.measure import Case, nbytes
from geossl.cli.benchmark.plain import point_mae_loss, point_vit_features
from geossl.cli.benchmark.plain_point_m2ae import point_m2ae_features, point_m2ae_loss
from geossl.cli.pretrain import PretrainConfig
from geossl.errors import ConfigError
from geossl.geometry import ImageBatch, PackedPoints, PointBatch
from geossl.methods import METHODS
from geossl.models import BACKBONES

DTYPES = (torch.float32, torch.bfloat16)
Loss = Callable[[Any, Any, torch.Generator], Tensor]


class Step(NamedTuple):
    """A method on its backbone, a batch for it, and both in words."""

    module: Any
    batch: Any  # PointBatch or ImageBatch
    inputs: str


class Published(NamedTuple):
    """What the step benchmark needs to know of a method."""

    released: dict[str, Any]  # backbone and its overrides, as released
    targets: dict[torch.dtype, float]  # CPU seconds of a step: released configuration, 8 clouds of 2,048 points, one thread
    plain: Loss  # the plain torch form
    plain_features: Callable[[Any, PackedPoints], Tensor]
    quick: tuple[dict[str, Any], dict[str, Any]]  # overrides of backbone and method for tiny runs
    half: tuple[float, float] = (0.02, 0.99)  # how far two bfloat16 forms may differ: relative error of the loss, cosine of the gradients


STEPS = {
    "point_mae": Published(
        released={"name": "point_vit_small", "drop_path": 0.1},
        targets={torch.float32: 1.0, torch.bfloat16: 0.65},
        plain=point_mae_loss,
        plain_features=point_vit_features,
        quick=(
            {"dim": 24, "depth": 2, "heads": 2, "groups": 16, "group_size": 8, "embed_widths": (16, 32, 64)},
            {"decoder_heads": 2, "decoder_depth": 2},
        ),
    ),
    "point_m2ae": Published(
        released={"name": "point_m2ae_small", "drop_path": 0.1},
        targets={torch.float32: 2.5, torch.bfloat16: 1.6},
        plain=point_m2ae_loss,
        plain_features=point_m2ae_features,
        quick=(
            {"dims": (8, 16, 24), "depths": (1, 1, 1), "heads": 2, "groups": (96, 48, 24), "embed_widths": (16, 32, 64)},
            {"decoder_heads": 2},
        ),
        # Rounding decides near-ties of maxima of maxima: at fresh weights either form has a cosine of 0.95 to 0.96 with float32, and the
        # two of 0.95 with each other (0.89 at tiny sizes). Whether they agree, the float32 rows say.
        half=(0.1, 0.8),
    ),
}


def build_step(method: str, size: str, quick: bool = False) -> Step:
    """Make the step of ``method``: ``released``, or ``quickstart``, what is trained when no configuration is given.

    The released one has 8 clouds of 2,048 points.
    """
    if size == "released":
        values = dict(_published(method).released)
        backbone, config = dataclasses.replace(BACKBONES.config(values.pop("name")), **values), METHODS.config(method)
        clouds, points = 8, 2048
    else:
        quickstart = PretrainConfig()
        backbone, config = quickstart.backbone, quickstart.method
        clouds, points = quickstart.train.batch_size, quickstart.data.points
    if quick:
        tiny, small_decoder = _published(method).quick
        backbone, config = dataclasses.replace(backbone, **tiny), dataclasses.replace(config, **small_decoder)
        clouds, points = 2, 256
    torch.manual_seed(0)
    backbone = backbone.build()
    module = config.build(backbone)
    features = torch.rand(clouds, points, backbone.in_channels - 3)
    batch = PointBatch(PackedPoints.from_padded(torch.cat([surfaces(clouds, points), features], dim=2)))
    return Step(module.train(), batch, f"{clouds} x {points:,} points, {words_of(backbone.config)}")


def points_bytes(points: PackedPoints) -> int:
    """Bytes of the columns of ``points``."""
    return nbytes(points.coord) + (0 if points.feats is None else nbytes(points.feats))


def batch_bytes(batch: Any) -> int:
    """Bytes of the points or images of ``batch``."""
    if isinstance(batch, ImageBatch):
        return nbytes(*(images for images in (batch.image, batch.reference) if images is not None))
    return points_bytes(batch.points)


def step_run(step: Step, dtype: torch.dtype, loss: Loss | None = None) -> Callable[[], dict[str, Tensor]]:
    """Return a call that runs forward and backward (from zero gradients, always the same draws) and gives loss and gradients."""

    def run() -> dict[str, Tensor]:
        step.module.zero_grad(set_to_none=True)
        generator = torch.Generator().manual_seed(0)
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            value = step.module(step.batch, generator=generator).loss if loss is None else loss(step.module, step.batch, generator)
        value.backward()
        return {"loss": value.detach(), **{name: p.grad for name, p in step.module.named_parameters() if p.grad is not None}}

    return run


def cases(method: str, quick: bool) -> dict[str, Callable[[], Case]]:
    """Return the cases of this suite by name; each is built when it is called."""
    if method == "polar_mae":
        from geossl.cli.benchmark import event_steps

        return event_steps.cases(quick)
    if method == "i2p_mae":
        from geossl.cli.benchmark import teacher_steps

        return teacher_steps.cases(quick)
    if method == "croco":
        from geossl.cli.benchmark import croco_steps

        return croco_steps.cases(quick)
    published = _published(method)
    found: dict[str, Callable[[], Case]] = {}
    sizes = ("released", "quickstart") if PretrainConfig().method.name == method else ("released",)
    for size in sizes:
        for dtype in DTYPES:
            target = published.targets.get(dtype) if size == "released" and not quick else None
            name = f"{method}/{size}/step/{_short(dtype)}"
            found[name] = functools.partial(_step_case, method, size, quick, dtype, target)
    found[f"{method}/released/grouping"] = functools.partial(_grouping_case, method, quick)
    found[f"{method}/released/optimizer"] = functools.partial(_optimizer_case, method, quick)
    for dtype in DTYPES:
        found[f"{method}/released/features/{_short(dtype)}"] = functools.partial(_features_case, method, quick, dtype)
    return found


def _step_case(method: str, size: str, quick: bool, dtype: torch.dtype, target: float | None) -> Case:
    step = build_step(method, size, quick)
    published = _published(method)
    return step_case(
        step, dtype, target, {"plain torch": step_run(step, dtype, published.plain)}, step_run(step, dtype), half=published.half
    )


def step_case(
    step: Step,
    dtype: torch.dtype,
    target: float | None,
    peers: dict[str, Callable[[], dict[str, Tensor]]],
    run: Callable[[], dict[str, Tensor]],
    parts: str = "forward + backward, grouping included",
    half: tuple[float, float] = (0.02, 0.99),
) -> Case:
    """Return the case of a training step; runs return loss and gradients, as :func:`step_run` makes them."""
    weights = sum(p.numel() for p in step.module.parameters())
    return Case(
        inputs=f"{step.inputs}; {parts}",
        run=run,
        moved=batch_bytes(step.batch) + weights * (4 + dtype.itemsize + 4),
        moved_is="batch read, weights read once forward (float32) and once backward, gradients written",
        dtype=dtype,
        peers=peers,
        differs=functools.partial(_gradients_differ, dtype=dtype, half=half),
        target=target,
    )


def _grouping_case(method: str, quick: bool) -> Case:
    return grouping_case(build_step(method, "released", quick))


def grouping_case(step: Step) -> Case:
    """Return the case of cutting the clouds of ``step`` into groups, at every scale there is."""
    backbone, points = step.module.backbone, step.batch.points
    groups = backbone.group(points)
    scales = groups if isinstance(groups, list) else [groups]
    searched = [points.coord, *(scale.centers for scale in scales)]  # points, then the centres of each scale but the last
    tensors = [value for scale in scales for value in scale if isinstance(value, Tensor)]
    pairs = sum(len(found) * len(scale.centers) for found, scale in zip(searched, scales, strict=False)) // len(points)
    return Case(
        inputs=f"{step.inputs}; the grouping of the step alone",
        run=lambda: backbone.group(points),
        moved=points_bytes(points) + nbytes(*tensors),
        moved_is="points read, groups and centres written",
        flop=2 * 8 * pairs,
        flop_is="8 per pair of point and centre, once to sample and once to search",
    )


def _optimizer_case(method: str, quick: bool) -> Case:
    return optimizer_case(build_step(method, "released", quick))


def optimizer_case(step: Step) -> Case:
    """Return the case of an optimiser step over the weights of ``step``."""
    from geossl.engine.optim import OptimConfig, build_optimizer

    step_run(step, torch.float32)()
    twin = copy.deepcopy(step.module)
    for ours, theirs in zip(step.module.parameters(), twin.parameters(), strict=True):
        theirs.grad = None if ours.grad is None else ours.grad.clone()
    optimizer = build_optimizer(step.module, OptimConfig())
    groups = build_optimizer(twin, OptimConfig()).param_groups
    same = [{key: group[key] for key in ("params", "lr", "weight_decay")} for group in groups]
    plain = torch.optim.AdamW(same, foreach=False, fused=False)
    weights = nbytes(*(p for p in step.module.parameters() if p.grad is not None))

    def run(optimizer: torch.optim.Optimizer, module: nn.Module) -> list[Tensor]:
        optimizer.step()
        return [p.detach() for p in module.parameters()]

    return Case(
        inputs=f"{weights // 4 / 1e6:.1f} M weights, AdamW as the engine builds it",
        run=functools.partial(run, optimizer, step.module),
        moved=7 * weights,
        moved_is="weights and both moments read and written, gradients read",
        flop=0,
        flop_is="none",
        peers={"torch.optim.AdamW, one tensor at a time": functools.partial(run, plain, twin)},
        differs=_tensors_differ,
    )


def _features_case(method: str, quick: bool, dtype: torch.dtype) -> Case:
    return features_case(build_step(method, "released", quick), dtype, {"plain torch": _published(method).plain_features})


def features_case(step: Step, dtype: torch.dtype, peers: dict[str, Callable[[Any, PackedPoints], Tensor]]) -> Case:
    """Return the case of extracting all tokens of the batch of ``step``, compared with other forms of the backbone's forward pass."""
    backbone = step.module.backbone.eval()

    def run(features: Callable[[], Tensor]) -> Tensor:
        with torch.inference_mode(), torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            return features()

    ours = functools.partial(run, lambda: backbone(step.batch.points).feats)
    weights = sum(p.numel() for p in backbone.parameters())
    return Case(
        inputs=f"{step.inputs}; all tokens, no gradient, grouping included",
        run=ours,
        moved=points_bytes(step.batch.points) + 4 * ours().numel() + 4 * weights,
        moved_is="points and weights read, tokens written",
        dtype=dtype,
        peers={title: functools.partial(run, functools.partial(plain, backbone, step.batch.points)) for title, plain in peers.items()},
        differs=lambda a, b: relative_difference(a, b, 1e-4 if dtype == torch.float32 else 0.05, "tokens"),
    )


# Agreement -----------------------------------------------------------------------------------------------------------------------------


def _gradients_differ(
    ours: dict[str, Tensor], theirs: dict[str, Tensor], dtype: torch.dtype, half: tuple[float, float] = (0.02, 0.99)
) -> str:
    """Compare losses and the direction of the whole gradient; half precision and near-ties of maxima move single entries."""
    loss = float((ours["loss"] - theirs["loss"]).abs() / theirs["loss"].abs())
    if loss > (1e-5 if dtype == torch.float32 else half[0]):
        return f"loss {float(theirs['loss']):.7g} instead of {float(ours['loss']):.7g}"
    missing = [name for name in ours if name not in theirs]
    if missing:
        return f"no gradient for {missing[:3]}"
    a, b = (torch.cat([x[name].double().flatten() for name in ours if name != "loss"]) for x in (ours, theirs))
    cosine = float(a @ b / (a.norm() * b.norm()))
    return "" if cosine > (0.99999 if dtype == torch.float32 else half[1]) else f"cosine of the gradients is {cosine:.6f}"


def _tensors_differ(ours: list[Tensor], theirs: list[Tensor]) -> str:
    return next((text for a, b in zip(ours, theirs, strict=True) if (text := relative_difference(a, b, 1e-5, "weights"))), "")


def relative_difference(ours: Tensor, theirs: Tensor, tolerance: float, what: str) -> str:
    """Say how far two tensors are apart where it is more than ``tolerance`` of the norm, "" otherwise."""
    error = float((ours.double() - theirs.double()).norm() / ours.double().norm().clamp(min=1e-30))
    return "" if error <= tolerance else f"{what} differ by {error:.2g} of their norm"


# Words ---------------------------------------------------------------------------------------------------------------------------------


def _published(method: str) -> Published:
    METHODS.config(method)  # an unknown name ends here, with the known ones
    if method not in STEPS:
        raise ConfigError(
            f"method {method} has no step benchmark yet; there is one for {', '.join([*STEPS, 'i2p_mae', 'polar_mae', 'croco'])}"
        )
    return STEPS[method]


def words_of(config: Any) -> str:
    """A backbone in a few words."""
    if hasattr(config, "dims"):
        each = "/".join(map(str, config.dims)), "/".join(map(str, config.groups)), "/".join(map(str, config.group_sizes))
        return f"{config.name} {each[0]}, {each[1]} groups of {each[2]}"
    return f"{config.name} {config.dim}/{config.depth}/{config.heads}, {config.groups} groups of {config.group_size}"


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
