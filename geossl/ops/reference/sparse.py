"""Where the neighbours of sparse voxels are, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor


def sort_keys(keys: Tensor) -> tuple[Tensor, Tensor]:
    """Return the keys in order and the row of each."""
    return torch.sort(keys, stable=True)


def find_keys(keys: Tensor, order: Tensor, wanted: Tensor, rows: Tensor | None, shifts: Tensor) -> Tensor:
    """Look for ``wanted + shifts[k]`` among sorted ``keys [V]``.

    Args:
        keys: Ascending, each once.
        order: What to return for each key, ``[V]``.
        wanted: ``[W]``.
        rows: Column of the result for each of ``wanted``; None for their own order.
        shifts: ``[K]``.

    Returns:
        ``[K, W]`` int64, -1 where there is no such key.
    """
    target = shifts[:, None] + wanted
    if keys.shape[0] == 0:
        return torch.full_like(target, -1)
    place = torch.searchsorted(keys, target).clamp(max=keys.shape[0] - 1)
    found = torch.where(keys[place] == target, order[place], -1)
    if rows is None:
        return found
    out = torch.empty_like(found)
    out[:, rows] = found
    return out
