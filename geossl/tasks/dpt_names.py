"""Names of the DPT head's weights in official stereo and flow files of CroCo."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from geossl.errors import CheckpointError

_RULES = (
    (r"act_(\d)_postprocess\.(\d)\.(\w+)", "reassemble.{0}.{2}.{3}"),
    (r"scratch\.layer(\d)_rn\.(\w+)", "reduce.{0}.{2}"),
    (r"scratch\.refinenet(\d)\.out_conv\.(\w+)", "fuse.{0}.project.{2}"),
    (r"scratch\.refinenet(\d)\.resConfUnit1\.(.+)", "fuse.{0}.skip.{2}"),
    (r"scratch\.refinenet(\d)\.resConfUnit2\.(.+)", "fuse.{0}.unit.{2}"),
)
_LAST = {"head.0.": "smooth.", "head.2.": "last.", "head.4.": "predict."}
_UNREAD = "fuse.3.skip."


def convert_dpt_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Turn the weights of an official DPT head into those of :class:`geossl.layers.DPTHead`.

    Files hold some tensors twice: ``scratch.layer_rn.*`` and ``act_postprocess.*`` are the same as ``scratch.layer*_rn`` and
    ``act_*_postprocess``. They are read from either name. ``scratch.refinenet4.resConfUnit1`` is left out: no computation reads it.

    Args:
        state: Weights without ``head.dpt.``. Names that are none of a DPT head are kept, so that loading reports them.

    Raises:
        CheckpointError: the two names of a tensor hold different values.
    """
    converted: dict[str, Tensor] = {}
    for key, value in state.items():
        name = _name(_main_name(key))
        if name.startswith(_UNREAD):
            continue
        if name in converted and not torch.equal(converted[name], value):
            raise CheckpointError(f"head.dpt.{key} and head.dpt.{_main_name(key)} must be the same tensor, but differ; the file is damaged")
        converted[name] = value
    return converted


def _main_name(key: str) -> str:
    """The name that carries a number from 1 on, of the two that a tensor may have."""
    if match := re.fullmatch(r"act_postprocess\.(\d)\.(.+)", key):
        return f"act_{int(match[1]) + 1}_postprocess.{match[2]}"
    if match := re.fullmatch(r"scratch\.layer_rn\.(\d)\.(.+)", key):
        return f"scratch.layer{int(match[1]) + 1}_rn.{match[2]}"
    return key


def _name(key: str) -> str:
    for pattern, form in _RULES:
        if match := re.fullmatch(pattern, key):
            return form.format(int(match[1]) - 1, *match.groups())
    for old, new in _LAST.items():
        if key.startswith(old):
            return new + key.removeprefix(old)
    return key
