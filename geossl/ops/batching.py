"""Offsets of packed clouds from the other forms in which public code keeps them."""

from __future__ import annotations

import torch
from torch import Tensor

from geossl.ops import _checks


def offsets_from_lengths(lengths: Tensor) -> Tensor:
    """Turn ``lengths [B]`` (int64 or int32, not negative) into ``offsets [B + 1]`` int64 on the same device."""
    if not isinstance(lengths, Tensor) or lengths.dim() != 1 or lengths.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"offsets_from_lengths: lengths must be int64 or int32 [B], got {_checks.describe(lengths)}")
    if lengths.numel() and _checks.read_values(lengths) and int(lengths.min()) < 0:
        raise ValueError(f"offsets_from_lengths: lengths must not be negative, got {int(lengths.min())}")
    return torch.cat([lengths.new_zeros(1, dtype=torch.int64), lengths.cumsum(0, dtype=torch.int64)])


def offsets_from_batch(batch: Tensor, size: int | None = None) -> Tensor:
    """Turn the cloud number of every row, as PyTorch Geometric keeps it, into offsets.

    Args:
        batch: ``[M]`` int64 or int32, sorted: rows of one cloud must stand together.
        size: Number of clouds; None means the last number + 1. Clouds without rows are empty.

    Returns:
        ``[B + 1]`` int64.

    Raises:
        ValueError: the numbers are not sorted, negative, or reach ``size``.
    """
    if not isinstance(batch, Tensor) or batch.dim() != 1 or batch.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"offsets_from_batch: batch must be int64 or int32 [M], got {_checks.describe(batch)}")
    if bool((batch[1:] < batch[:-1]).any()):
        raise ValueError(
            "offsets_from_batch: batch must be sorted, since packed clouds are consecutive rows; "
            "sort it with torch.argsort(batch, stable=True) and reorder the points alike"
        )
    first, last = (int(batch[0]), int(batch[-1])) if batch.numel() else (0, -1)
    size = last + 1 if size is None else size
    if first < 0 or last >= size:
        raise ValueError(f"offsets_from_batch: cloud numbers must lie in 0..{size - 1}, got {first if first < 0 else last}")
    return torch.searchsorted(batch, torch.arange(size + 1, device=batch.device, dtype=batch.dtype))


def batch_from_offsets(offsets: Tensor, rows: int | None = None) -> Tensor:
    """Turn offsets (or any row splits) into the number of the cloud that every row belongs to: what :func:`offsets_from_batch` inverts.

    Args:
        offsets: ``[B + 1]`` int64.
        rows: Number of rows, ``offsets[-1]``, where it is known: a GPU is then not waited for.

    Returns:
        ``[M]`` int64, ascending.
    """
    clouds = torch.arange(offsets.shape[0] - 1, device=offsets.device)
    return torch.repeat_interleave(clouds, offsets.diff(), output_size=rows)


def offsets_from_ends(ends: Tensor) -> Tensor:
    """Turn the end row of each cloud ``[B]``, as Pointcept keeps it in ``offset``, into ``offsets [B + 1]`` int64."""
    if not isinstance(ends, Tensor) or ends.dim() != 1 or ends.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"offsets_from_ends: ends must be int64 or int32 [B], got {_checks.describe(ends)}")
    offsets = torch.cat([ends.new_zeros(1), ends]).long()
    if _checks.read_values(ends) and bool((offsets.diff() < 0).any()):
        raise ValueError(f"offsets_from_ends: ends must not decrease or be negative, got {ends[:8].tolist()}")
    return offsets
