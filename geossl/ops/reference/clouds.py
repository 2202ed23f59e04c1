"""Distances, and the clouds of padded and packed batches, for the twins."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

from torch import Tensor

CHUNK = 1 << 22  # pairs of points held in memory at once


def squared_distance(x: Tensor, y: Tensor) -> Tensor:
    """Squared Euclidean distance over the last dimension, in the one order of operations that all kernels share."""
    d = x - y
    return _sum_channels(d * d)


def _sum_channels(values: Tensor) -> Tensor:
    """Sum over the last dimension from left to right: for three channels ``(v0 + v1) + v2``."""
    first, *rest = values.unbind(-1)
    for channel in rest:
        first = first + channel
    return first


def distance(x: Tensor, y: Tensor, norm: str) -> Tensor:
    """Distance over the last dimension: "l2sq", or "l1" (sum of absolute differences)."""
    if norm != "l1":
        return squared_distance(x, y)
    return _sum_channels((x - y).abs())


def spans(rows: Tensor, lengths: Tensor | None, offsets: Tensor | None) -> list[tuple[int, int]]:
    """Return the begin and end of every cloud in ``rows.reshape(-1, C)``: padded ``[B, N, C]`` with lengths, or packed ``[M, C]``."""
    if offsets is not None:
        ends = offsets.tolist()
        return list(pairwise(ends))
    batch, count = rows.shape[:2]
    sizes = [count] * batch if lengths is None else lengths.tolist()
    return [(b * count, b * count + size) for b, size in enumerate(sizes)]


def cloud_pairs(
    x: Tensor, y: Tensor, x_lengths: Tensor | None, y_lengths: Tensor | None, x_offsets: Tensor | None, y_offsets: Tensor | None
) -> Iterator[tuple[slice, slice]]:
    """Yield the rows of the clouds of two batches, pair by pair."""
    for (a, b), (c, d) in zip(spans(x, x_lengths, x_offsets), spans(y, y_lengths, y_offsets), strict=True):
        yield slice(a, b), slice(c, d)
