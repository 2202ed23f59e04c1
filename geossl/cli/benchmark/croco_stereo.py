"""Stereo with CroCo: a forward pass of encoder, decoder and DPT head on one window, and images predicted in windows.

The rows in windows show the memory: it must not grow with the image beyond what the images and sums themselves take.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from geossl.cli.benchmark.measure import Case, nbytes
from geossl.cli.benchmark.steps import relative_difference
from geossl.layers.dpt import DPTHead
from geossl.models import BACKBONES, CroCoDecoderConfig
from geossl.tasks import TASKS

WINDOW = (352, 704)
"""Rows and columns of the published training crops."""


def cases(quick: bool) -> dict[str, Callable[[], Case]]:
    """Return the cases by name: ViT-Base with the base decoder and the published head, float32."""
    found: dict[str, Callable[[], Case]] = {
        "croco/stereo/forward": functools.partial(_forward_case, quick),
        "croco/stereo/head": functools.partial(_head_case, quick),
    }
    for times in (1, 2):
        found[f"croco/stereo/in windows, {times * times} of them"] = functools.partial(_tiled_case, times, quick)
    return found


def _build(quick: bool) -> tuple[Any, str]:
    torch.manual_seed(0)
    backbone, task = BACKBONES.config("croco_vit_base"), TASKS.config("stereo")
    if quick:
        backbone = dataclasses.replace(backbone, dim=24, depth=2, heads=2)
        task = dataclasses.replace(
            task, decoder=CroCoDecoderConfig(dim=16, depth=2, heads=2), hooks=(0, 1, 2, 3), layer_dims=(4, 6, 8, 10), feature_dim=8
        )
    task = dataclasses.replace(task, overlap=0.0, window=(64, 64) if quick else WINDOW)
    numbers = task.decoder
    words = f"{backbone.name} {backbone.dim}/{backbone.depth}/{backbone.heads}, decoder {numbers.dim}/{numbers.depth}/{numbers.heads}, DPT"
    return task.build(backbone.build()).eval(), words


def _pair(module: Any, times: int = 1) -> tuple[Tensor, Tensor]:
    height, width = module.config.window
    image, reference = torch.randn(2, 1, 3, times * height, times * width)
    return image, reference


@torch.inference_mode()
def _forward_case(quick: bool) -> Case:
    module, words = _build(quick)
    pair = _pair(module)
    return Case(
        inputs=f"one pair of {pair[0].shape[2]} x {pair[0].shape[3]} pixels, {words}; no gradient",
        run=torch.inference_mode()(lambda: module.output(*pair)),
        moved=nbytes(*pair, *module.parameters()),
        moved_is="images and weights read",
    )


@torch.inference_mode()
def _head_case(quick: bool) -> Case:
    module, words = _build(quick)
    pair = _pair(module)
    maps = module.body(*pair, list(module.config.hooks))
    return Case(
        inputs=f"the head of that alone, {words}",
        run=torch.inference_mode()(lambda: module.head(maps)),
        moved=nbytes(*maps, *module.head.parameters()),
        moved_is="maps and weights read",
        peers={"plain torch": torch.inference_mode()(lambda: plain_head(module.head, maps))},
        differs=lambda a, b: relative_difference(a, b, 1e-4, "output"),
    )


def _tiled_case(times: int, quick: bool) -> Case:
    module, words = _build(quick)
    pair = _pair(module, times)
    return Case(
        inputs=f"one pair of {pair[0].shape[2]} x {pair[0].shape[3]} pixels in windows without overlap, {words}",
        run=lambda: module.predict(*pair).values,
        moved=nbytes(*pair, *module.parameters()),
        moved_is="images and weights read",
    )


def plain_head(head: DPTHead, maps: Sequence[Tensor]) -> Tensor:
    """The head in the order of the papers: each fusion upsamples before its 1x1 convolution."""

    def up(x: Tensor) -> Tensor:
        return F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True)

    layers, x = head.layers(maps), None
    for number in (3, 2, 1, 0):
        fusion: Any = head.fuse[number]
        joined = layers[number] if x is None else x + fusion.skip(layers[number])
        x = fusion.project(up(fusion.unit(joined)))
    assert x is not None
    return head.predict(F.relu(head.last(up(head.smooth(x)))))
