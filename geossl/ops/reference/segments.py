"""Reductions of rows that share a segment in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor


def row_segments(index: Tensor | None, row_splits: Tensor | None, rows: int) -> Tensor:
    """Return the segment of every row ``[M]``, -1 for none: ``index`` itself, or from where the segments begin and end."""
    if index is not None:
        return index
    assert row_splits is not None
    segments = torch.arange(row_splits.shape[0] - 1, device=row_splits.device)
    return torch.repeat_interleave(segments, row_splits.diff(), output_size=rows)


def _kept(x: Tensor, index: Tensor | None, row_splits: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Return the rows that have a segment, in float32 at least, their segments and their numbers."""
    segment = row_segments(index, row_splits, x.shape[0])
    rows = (segment >= 0).nonzero().squeeze(1)
    wide = x if x.dtype == torch.float64 else x.float()
    return wide[rows], segment[rows], rows


def segment_sum(x: Tensor, index: Tensor | None, row_splits: Tensor | None, size: int, mean: bool) -> tuple[Tensor, Tensor]:
    """Return sums or means ``[size, C]`` and the rows of each segment ``[size]`` (empty for sums)."""
    values, segment, _ = _kept(x, index, row_splits)
    total = values.new_zeros(size, x.shape[1]).index_add(0, segment, values)
    if not mean:
        return total.to(x.dtype), segment.new_empty(0)
    count = segment.new_zeros(size).index_add(0, segment, torch.ones_like(segment))
    return (total / count.clamp(min=1)[:, None]).to(x.dtype), count


def segment_extreme(
    x: Tensor, index: Tensor | None, row_splits: Tensor | None, size: int, largest: bool, fill: float, with_arg: bool
) -> tuple[Tensor, Tensor]:
    """Return the largest or smallest values ``[size, C]``, NaN before all, and their rows ``[size, C]`` (empty if not wanted)."""
    values, segment, rows = _kept(x, index, row_splits)
    out, arg = _best(values, segment, rows, size, x.shape[0], largest)
    out = torch.where(arg >= 0, out, fill).to(x.dtype)
    return out, arg if with_arg else arg.new_empty(0)


def _best(values: Tensor, segment: Tensor, rows: Tensor, size: int, count: int, largest: bool) -> tuple[Tensor, Tensor]:
    channels = values.shape[1]
    target = segment[:, None].expand(-1, channels)
    worst = -torch.inf if largest else torch.inf
    out = values.new_full((size, channels), worst).scatter_reduce(0, target, values, "amax" if largest else "amin")
    best = out[segment]
    hit = (values == best) | (values.isnan() & best.isnan())
    number = torch.where(hit, rows[:, None], count)
    arg = rows.new_full((size, channels), count).scatter_reduce(0, target, number, "amin")
    return out, torch.where(arg < count, arg, -1)


def segment_softmax(x: Tensor, index: Tensor | None, row_splits: Tensor | None, size: int) -> Tensor:
    """Return ``x`` normalised within each segment, 0 in rows without one."""
    values, segment, rows = _kept(x, index, row_splits)
    shift, _ = _best(values, segment, rows, size, x.shape[0], True)
    powers = (values - shift[segment]).exp()
    total = powers.new_zeros(size, x.shape[1]).index_add(0, segment, powers)
    return torch.zeros_like(x).index_put((rows,), (powers / total[segment]).to(x.dtype))


def segment_logsumexp(x: Tensor, index: Tensor | None, row_splits: Tensor | None, size: int) -> Tensor:
    """Return the logarithm of the sum of exponentials ``[size, C]``, -inf for empty segments."""
    values, segment, rows = _kept(x, index, row_splits)
    shift, _ = _best(values, segment, rows, size, x.shape[0], True)
    shift = torch.where(shift.isinf(), 0.0, shift)
    powers = (values - shift[segment]).exp()
    return (shift + powers.new_zeros(size, x.shape[1]).index_add(0, segment, powers).log()).to(x.dtype)
