"""Training steps of I2P-MAE with its teacher's answers stored and with the teacher inside, and the parts that only it has.

The teacher is the tower of CLIP ViT-B/16 with random weights, which costs what the released ones cost.
"""

from __future__ import annotations

import dataclasses
import functools
import tempfile
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch

from geossl.cli.benchmark.clouds import surfaces
from geossl.cli.benchmark.measure import Case, nbytes
from geossl.cli.benchmark.plain_i2p_mae import enlarged, i2p_mae_loss, plain_images
from geossl.cli.benchmark.plain_point_m2ae import point_m2ae_features
from geossl.cli.benchmark.steps import (
    DTYPES,
    STEPS,
    Step,
    features_case,
    grouping_case,
    optimizer_case,
    points_bytes,
    relative_difference,
    step_case,
    step_run,
    words_of,
)
from geossl.geometry import PackedPoints, PointBatch
from geossl.layers import back_project, project_views
from geossl.methods import METHODS
from geossl.methods.i2p_mae import point_rows
from geossl.models import BACKBONES, Teacher
from geossl.models.image_vit import ImageViT
from geossl.models.teachers import VIT_TEACHERS

Inside = Literal["stored", "float32", "bfloat16"]

TARGETS: dict[tuple[Inside, torch.dtype], float] = {
    ("stored", torch.float32): 3.0,
    ("stored", torch.bfloat16): 2.0,
    ("float32", torch.float32): 15.0,
    ("bfloat16", torch.float32): 9.5,
}
"""CPU seconds of a step: where the teacher's answers come from (its precision, where it is inside), type of the encoder's products."""


def build_step(inside: Inside, quick: bool = False) -> Step:
    """Make the released step on 8 clouds of 2,048 points, with the teacher's answers stored or the teacher inside."""
    values = dict(STEPS["point_m2ae"].released)
    backbone, method = dataclasses.replace(BACKBONES.config(values.pop("name")), **values), METHODS.config("i2p_mae")
    tower, clouds, points = VIT_TEACHERS["clip_vit_base_patch16"], 8, 2048
    if quick:
        tiny, small_decoder = STEPS["point_m2ae"].quick
        backbone, method = dataclasses.replace(backbone, **tiny), dataclasses.replace(method, **small_decoder)
        tower, clouds, points = dataclasses.replace(tower, dim=16, depth=1, heads=2, embed_dim=8), 2, 256
    folder = tempfile.TemporaryDirectory(prefix="geossl_teacher_")
    store = {"teacher_view": "original", "teacher_store": Path(folder.name)} if inside == "stored" else {}
    torch.manual_seed(0)
    module = dataclasses.replace(method, teacher=None, feature_channels=tower.channels, **store).build(backbone.build())
    module.teacher.use(random_teacher(tower, "bfloat16" if inside == "bfloat16" else "float32"))
    batch = PointBatch(PackedPoints.from_padded(surfaces(clouds, points)))
    if inside == "stored":
        module.look(batch)
    weakref.finalize(module, folder.cleanup)
    answers = "teacher's answers stored" if inside == "stored" else f"CLIP ViT-B/16 inside, {inside}"
    return Step(module.train(), batch, f"{clouds} x {points:,} points, {words_of(backbone)}, {answers}")


def random_teacher(config: Any, precision: Literal["float32", "bfloat16"]) -> Teacher:
    """A tower that has learned nothing."""
    tower = ImageViT(config)
    for value in tower.parameters():
        torch.nn.init.normal_(value, std=0.02)
    return Teacher(tower, name="benchmark", channels=config.channels, digest="random", precision=precision)


def cases(quick: bool) -> dict[str, Callable[[], Case]]:
    """Return the cases of the step suite for I2P-MAE by name."""
    found: dict[str, Callable[[], Case]] = {}
    for inside, dtype in TARGETS:
        where = "stored" if inside == "stored" else f"clip {_short(inside)}"
        name = f"i2p_mae/released, {where}/step/{str(dtype).removeprefix('torch.')}"
        found[name] = functools.partial(_step_case, inside, dtype, quick)
    found["i2p_mae/released/grouping"] = lambda: grouping_case(build_step("stored", quick))
    found["i2p_mae/released/projection"] = functools.partial(_projection_case, quick)
    found["i2p_mae/released/back-projection"] = functools.partial(_back_projection_case, quick)
    found["i2p_mae/released/optimizer"] = lambda: optimizer_case(build_step("stored", quick))
    for dtype in DTYPES:
        found[f"i2p_mae/released/features/{str(dtype).removeprefix('torch.')}"] = functools.partial(_features_case, quick, dtype)
    return found


def _short(inside: str) -> str:
    return {"float32": "fp32", "bfloat16": "bf16"}[inside]


def _step_case(inside: Inside, dtype: torch.dtype, quick: bool) -> Case:
    step = build_step(inside, quick)
    peers = {"plain torch": step_run(step, dtype, i2p_mae_loss)} if inside == "stored" else {}
    target = None if quick else TARGETS[inside, dtype]
    return step_case(step, dtype, target, peers, step_run(step, dtype), half=STEPS["point_m2ae"].half)


def _features_case(quick: bool, dtype: torch.dtype) -> Case:
    return features_case(build_step("stored", quick), dtype, {"plain torch": point_m2ae_features})


def _projection_case(quick: bool) -> Case:
    step = build_step("stored", quick)
    points = step.batch.points
    images = project_views(points).images
    return Case(
        inputs=f"{_words(points)}, three images of each",
        run=lambda: project_views(points).images,
        moved=points_bytes(points) + nbytes(images),
        moved_is="points read, images written",
        flop=3 * 25 * len(points.coord),
        flop_is="one addition for each of the 25 pixels of a point and view",
        peers={"plain torch": lambda: plain_images(points)},
        differs=lambda a, b: relative_difference(a, b, 1e-5, "images"),
    )


def _words(points: PackedPoints) -> str:
    return f"{len(points)} x {len(points.coord) // len(points):,} points"


def _back_projection_case(quick: bool) -> Case:
    step = build_step("stored", quick)
    method, points = step.module, step.batch.points
    scales, seen = method.backbone.group(points), method.look(step.batch)
    finest = scales[0]
    places = PackedPoints(points.coord[point_rows(scales)[0]], finest.segments.offsets())
    return Case(
        inputs=f"{_words(points)}, maps {list(seen.features.shape)} read at the {len(places.coord):,} finest centres",
        run=lambda: back_project(seen.features, places, seen.frames),
        moved=nbytes(seen.features, places.coord) + 4 * 3 * len(places.coord) * seen.features.shape[1],
        moved_is="maps and points read, values written",
        flop=2 * 16 * 3 * len(places.coord) * seen.features.shape[1],
        flop_is="16 bicubic taps of each value",
        peers={"plain torch": lambda: enlarged(seen.features, places.coord, finest.segments.lengths, seen.frames)},
        differs=lambda a, b: relative_difference(a, b, 1e-4, "values"),
    )
