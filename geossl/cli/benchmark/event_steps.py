"""Training steps of PoLAr-MAE on simulated events, and how they grow with the number of tokens.

The events are chosen for having about as many tokens as those that the published implementation was timed with: 99, 148, 195 and 201.
"""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from geossl import ops
from geossl.cli.benchmark.measure import Case, nbytes
from geossl.cli.benchmark.plain_polar_mae import polar_mae_loss, volume_features
from geossl.cli.benchmark.steps import DTYPES, Step, features_case, optimizer_case, points_bytes, step_case, step_run
from geossl.data import DATASETS, Sample, collate
from geossl.engine.optim import OptimConfig, build_optimizer
from geossl.geometry import PackedPoints
from geossl.layers import VolumeTokenizer
from geossl.methods import METHODS
from geossl.models import VolumePointViTConfig

TOKENS = (99, 148, 195, 201)
"""Of the events of a step."""
GROWTH = (1, 2, 4, 8, 16)
"""Events of the steps whose times are to grow like their tokens."""
PUBLISHED = {"polar_mae": 8.94, "point_mae": 8.01}
"""CPU seconds of a float32 step of the published code, one thread, on the machine the targets were set on."""
TARGETS = {
    ("polar_mae", False, torch.float32): 1.6,
    ("polar_mae", False, torch.bfloat16): 1.3,
    ("polar_mae", True, torch.float32): 1.8,
    ("point_mae", False, torch.float32): 1.4,
}
"""CPU seconds: which prediction, whether with drop path and dropout, type."""
TOKENIZER_TARGET = 0.1
GROUPING_TARGET = 0.02

_PARITY: dict[str, Any] = {"norm": "batchwide", "empty_slots": True, "exact_voxels": False}
_DROPS: dict[str, Any] = {"drop_path": 0.25, "attention_dropout": 0.05}
_QUICK: dict[str, Any] = {"dim": 24, "depth": 2, "heads": 2, "embed_widths": (8, 16, 16)}
_PARTS = "forward + backward + clip + AdamW, tokenizer included"


@functools.cache
def event_pool(quick: bool) -> tuple[tuple[Sample, int], ...]:
    """Simulated events and how many tokens of 5 voxels each has."""
    dataset = dataclasses.replace(DATASETS.config("lartpc"), events=4 if quick else 64, min_points=0 if quick else 1024).build("train")
    tokenizer, pool = VolumeTokenizer(radius=5.0), []
    for row in range(len(dataset)):
        sample = dataset.get(row)
        coord = torch.from_numpy(np.ascontiguousarray(sample.points[:, :3]))
        pool.append((sample, len(tokenizer(coord, torch.tensor([0, len(coord)])).centers)))
    return tuple(pool)


def typical_events(quick: bool) -> list[Sample]:
    """The events whose tokens come nearest to :data:`TOKENS`."""
    pool = list(event_pool(quick))
    chosen = [pool.pop(min(range(len(pool)), key=lambda i: abs(pool[i][1] - wanted))) for wanted in TOKENS]
    return [sample for sample, _ in chosen]


def larger_event(quick: bool) -> Sample:
    """Ten events in one."""
    points = np.concatenate([sample.points for sample, _ in event_pool(quick)[:10]])
    _, first = np.unique(points[:, :3], axis=0, return_index=True)
    return Sample(points[np.sort(first)], -1, 0)


def build_step(prediction: str, drops: bool, samples: Sequence[Sample], quick: bool = False) -> Step:
    """Make the step of the released configuration: "polar_mae" or "point_mae" on ``samples``, with the published drops or without any."""
    torch.manual_seed(0)
    options = _PARITY | (_DROPS if drops else {}) | (_QUICK if quick else {})
    backbone = VolumePointViTConfig(**options).build()
    method = dataclasses.replace(
        METHODS.config("polar_mae"), energy=prediction == "polar_mae", rotation="batch", decoder_drop_path=0.25 if drops else 0.0
    )
    if quick:
        method = dataclasses.replace(method, decoder_heads=2, decoder_depth=2)
    batch = collate(samples)
    groups = backbone.group(batch.points)
    words = (
        f"{len(samples)} events, {batch.points.coord.shape[0]:,} points, {groups.centers.shape[0]} tokens holding {len(groups.index):,}, "
        f"{backbone.config.name} {backbone.config.dim}/{backbone.config.depth}/{backbone.config.heads}"
    )
    return Step(method.build(backbone).train(), batch, words)


def whole_step(step: Step, dtype: torch.dtype, loss: Any = None) -> Callable[[], dict[str, Tensor]]:
    """Forward, backward, clip and AdamW at rate 0: all of the work, while the weights stay what they are."""
    optimizer = build_optimizer(step.module, OptimConfig(weight_decay=0.0))
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    backward = step_run(step, dtype, loss)

    def run() -> dict[str, Tensor]:
        answer = backward()
        torch.nn.utils.clip_grad_norm_(step.module.parameters(), 1e30)
        optimizer.step()
        return answer

    return run


def cases(quick: bool) -> dict[str, Callable[[], Case]]:
    """Return the cases of the step suite for events by name."""
    found: dict[str, Callable[[], Case]] = {}
    for prediction in ("polar_mae", "point_mae"):
        for drops in (False, True):
            for dtype in DTYPES:
                name = f"polar_mae/released{', drops' if drops else ''}/step/{str(dtype).removeprefix('torch.')}"
                found[name.replace("released", "point-mae") if prediction == "point_mae" else name] = functools.partial(
                    _step_case, prediction, drops, dtype, quick
                )
    found["polar_mae/released/tokenizer"] = functools.partial(_grouping_case, quick, True)
    found["polar_mae/released/grouping"] = functools.partial(_grouping_case, quick, False)
    found["polar_mae/released/optimizer"] = lambda: optimizer_case(build_step("polar_mae", False, typical_events(quick), quick))
    for dtype in DTYPES:
        found[f"polar_mae/released/features/{str(dtype).removeprefix('torch.')}"] = functools.partial(_features_case, quick, dtype)
    for events in GROWTH[: 2 if quick else None]:
        found[f"polar_mae/growth/{events} events"] = functools.partial(_growth_case, quick, events, False)
    found[f"polar_mae/growth/{GROWTH[-1]} events, one ten times larger"] = functools.partial(_growth_case, quick, GROWTH[-1], True)
    return found


def _step_case(prediction: str, drops: bool, dtype: torch.dtype, quick: bool) -> Case:
    step = build_step(prediction, drops, typical_events(quick), quick)
    # The published computation has other draws of its drops, and would give other answers.
    peers = {} if drops else {"plain torch, padded": whole_step(step, dtype, polar_mae_loss)}
    published = "" if drops or dtype != torch.float32 else f" (published code, on another machine: {PUBLISHED[prediction]} s)"
    target = None if quick else TARGETS.get((prediction, drops, dtype))
    return step_case(step, dtype, target, peers, whole_step(step, dtype), _PARTS + published)


def _growth_case(quick: bool, events: int, larger: bool) -> Case:
    samples = (typical_events(quick) * 4)[:events]
    if larger:
        samples[0] = larger_event(quick)
    step = build_step("polar_mae", False, samples, quick)
    return step_case(step, torch.float32, None, {}, whole_step(step, torch.float32), _PARTS)


def _grouping_case(quick: bool, whole: bool) -> Case:
    """The tokenizer whole, or without the choice of centres: ball query, reduction and gather."""
    step = build_step("polar_mae", False, typical_events(quick), quick)
    backbone, points = step.module.backbone, step.batch.points
    groups = backbone.group(points)
    run: Callable[[], Any] = functools.partial(backbone.group, points)
    if not whole:
        tokenizer = backbone.tokenizer.scaled(backbone.config.scale)
        coord = backbone.normalize(points.coord)
        centers = tokenizer.choose_centers(coord, points.offsets)
        run = functools.partial(_gather, tokenizer, coord, points, *centers)
    return Case(
        inputs=f"{step.inputs}; {'tokenizer' if whole else 'ball query, farthest points of each, gather; centres given'}",
        run=run,
        moved=points_bytes(points) + nbytes(groups.points, groups.index, groups.centers),
        moved_is="points read, members and centres written",
        flop=8 * 2 * groups.points.shape[0],
        flop_is="8 per member, once for the choice of centres and once for the ball query",
        target=None if quick else TOKENIZER_TARGET if whole else GROUPING_TARGET,
    )


def _gather(tokenizer: VolumeTokenizer, coord: Tensor, points: PackedPoints, centers: Tensor, offsets: Tensor) -> Tensor:
    tokens = tokenizer.members(coord, points.offsets, centers, offsets, None)
    owner = ops.batch_from_offsets(tokens.row_splits, len(tokens.index))
    return (coord[tokens.index] - coord[centers][owner]) / tokenizer.radius


def _features_case(quick: bool, dtype: torch.dtype) -> Case:
    warnings.filterwarnings("ignore", "this model normalises over the whole batch")  # as it should here
    step = build_step("polar_mae", False, typical_events(quick), quick)
    return features_case(step, dtype, {"plain torch, padded": volume_features})
