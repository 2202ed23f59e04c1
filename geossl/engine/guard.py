"""What happens when loss or gradients are not finite: the batch is kept for inspection, the step skipped, the run stopped if it goes on."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from geossl.errors import GeosslError


class NonFiniteError(GeosslError, ArithmeticError):
    """Loss or gradients were not finite for too many steps in a row."""


def save_offending(
    run_folder: Path, *, step: int, rank: int, seed: int, batches: list[Any], rng: dict[str, Any], found: dict[str, float]
) -> Path:
    """Write what is needed to repeat a bad step into ``run_folder/nonfinite_step_<step>_rank_<rank>.pt``.

    ``torch.load(path, weights_only=True)`` gives ``step``, ``seed`` (the step's generator is ``step_generator(seed, step)``), ``rng`` (the
    global random states before the step), ``found`` (loss and gradient norm) and ``batches``, a list of micro-batches as flat
    dictionaries of tensors and numbers.
    """
    path = run_folder / f"nonfinite_step_{step}_rank_{rank}.pt"
    content = {"step": step, "seed": seed, "rng": rng, "found": found, "batches": [flatten_batch(batch) for batch in batches]}
    torch.save(content, path)
    return path


def flatten_batch(batch: Any, prefix: str = "") -> dict[str, Any]:
    """Turn nested dataclasses, mappings and sequences into ``{"points.coord": tensor, ...}``; what is no tensor or number becomes text."""
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        items: Any = [(f.name, getattr(batch, f.name)) for f in dataclasses.fields(batch)]
    elif isinstance(batch, Mapping):
        items = batch.items()
    elif isinstance(batch, list | tuple):
        items = enumerate(batch)
    else:
        value = batch.detach().cpu() if isinstance(batch, Tensor) else batch
        return {prefix: value if value is None or isinstance(value, Tensor | bool | int | float | str) else repr(value)}
    flat: dict[str, Any] = {}
    for key, value in items:
        flat.update(flatten_batch(value, f"{prefix}.{key}" if prefix else str(key)))
    return flat
