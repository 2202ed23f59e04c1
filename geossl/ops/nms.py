"""Centrality non-maximum suppression: centres that cover a cloud without crowding, dense spots first."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any, NamedTuple

import torch
from torch import Tensor

from geossl.ops import _checks, _dispatch
from geossl.ops._native import DOUBLE, INT, INT64, PTR
from geossl.ops.reference import nms as reference

_OP = "centrality_nms"
_TYPES = (torch.float32, torch.float64, torch.int64)  # as the kernels number them
_LARGEST_STEP = 2**30  # radius between integer coordinates
_LARGEST_COORDINATE = 2**62 - 1  # differences fit into 64 bits

# type, points, offsets, lengths, n, batch, radius, limit, cap, workspace (on CUDA), keep, count
_nms_c = _dispatch.functions(_OP, INT, PTR, PTR, PTR, INT64, INT64, DOUBLE, INT64, INT64, PTR, PTR, PTR)


class CentralityNMS(NamedTuple):
    """Result of :func:`centrality_nms`."""

    index: Tensor  # type: ignore[assignment]  # hides tuple.index, which nobody needs here
    """Kept points of all clouds, ``[T]`` int64, ascending within each cloud: local rows (padded) or rows of the tensor (packed)."""
    offsets: Tensor
    """Where each cloud's kept points begin in ``index``, and the end: ``[B + 1]`` int64."""
    keep: Tensor
    """Whether each point is kept, bool ``[B, N]`` or ``[M]``."""
    count: Tensor  # type: ignore[assignment]
    """Length of each point's neighbour list (itself included), int64 ``[B, N]`` or ``[M]``."""


def _values(points: Tensor, lengths: Tensor | None, offsets: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Check the values of lengths, offsets and integer coordinates."""
    if lengths is not None:
        lengths = _checks.length_values(_OP, lengths, points.shape[-2])
    if offsets is not None:
        offsets = _checks.offset_values(_OP, offsets, points.shape[0])
    if not points.is_floating_point() and points.numel() and _checks.read_values(points):
        low, high = (int(value) for value in torch.aminmax(points))
        if max(-low, high) > _LARGEST_COORDINATE:
            raise ValueError(f"{_OP}: integer coordinates must be smaller than 2**62, got {low if -low > high else high}")
    return lengths, offsets


def _native(
    kind: Any, points: Tensor, lengths: Tensor | None, offsets: Tensor | None, radius: float, limit: int, cap: int
) -> tuple[Tensor, Tensor]:
    points = points.contiguous()
    lengths, offsets = _values(points, lengths, offsets)
    keep, count = _fake(points)
    workspace = torch.empty_like(count, dtype=torch.int32) if kind == "cuda" else None
    batch = points.shape[0] if offsets is None else offsets.shape[0] - 1
    _nms_c[kind](
        *_dispatch.place(kind, points), _TYPES.index(points.dtype), points.data_ptr(), _dispatch.pointer(offsets),
        _dispatch.pointer(lengths), points.shape[-2], batch, radius, limit, cap, _dispatch.pointer(workspace), keep.data_ptr(),
        count.data_ptr(),
    )  # fmt: skip
    return keep, count


def _twin(points: Tensor, lengths: Tensor | None, offsets: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor]:
    return reference.centrality_nms(points, *_values(points, lengths, offsets), *rest)


def _fake(points: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    shape = points.shape[:-1]
    return points.new_empty(shape, dtype=torch.bool), points.new_empty(shape, dtype=torch.int64)


_centrality_nms = _dispatch.define(
    f"{_OP}(Tensor points, Tensor? lengths, Tensor? offsets, float radius, int limit, int cap) -> (Tensor, Tensor)",
    native=_native,
    twin=_twin,
    fake=_fake,
)


def centrality_nms(
    points: Tensor,
    radius: float,
    *,
    max_neighbors: int | None = None,
    lengths: Tensor | None = None,
    offsets: Tensor | None = None,
) -> CentralityNMS:
    """Thin out points, keeping the most central ones: those with the most neighbours inside the radius.

    The C-NMS of PoLAr-MAE (Young et al. 2025, "Particle trajectory representation learning with masked point modeling"), which places the
    centres of its groups with ``radius = 2 * group_radius * overlap_factor`` and ``max_neighbors = 256``:

    1. the neighbour list of a point holds the points strictly inside the radius, itself included, or the first ``max_neighbors`` of them
       by row;
    2. points are visited from the longest list to the shortest, equal lengths by row;
    3. a point that is still kept removes all others in its list.

    Without ``max_neighbors``, kept points are at least ``radius`` apart and every valid point has a kept one inside the radius (a limit
    gives up both where it cuts lists). The published code sorts in an unstable way, so that its centres change with the padding of a batch;
    here they depend on the cloud alone, and are the same on CPU and GPU, padded and packed, for any number of threads.

    Args:
        points: ``[B, N, 3]`` or packed ``[M, 3]``. Float32 or float64 (half types are upcast to float32): a point is inside if
            ``(dx*dx + dy*dy) + dz*dz < radius * radius`` in the type of the points, and points with a NaN or infinite coordinate are
            nobody's neighbour and never kept. Int32 or int64, for voxels: compared exactly with the radius as given.
        radius: Positive, inf is allowed; between integer points at most 2**30.
        max_neighbors: Longest neighbour list, at least 1; None means no limit.
        lengths: Points in each padded cloud, ``[B]``; None means N. Rows past them are neither kept nor counted.
        offsets: First row of each packed cloud and the end, ``[B + 1]``.

    Returns:
        Indices and offsets of the kept points, and for every point whether it is kept and how long its list is. Not differentiable.

    Raises:
        ValueError: a shape, device or value is wrong; TypeError: a type is. Values on CUDA are only checked with ``GEOSSL_CHECKS=1``.

    Example:
        >>> points = torch.tensor([[[0, 0, 0], [2, 0, 0], [4, 0, 0], [9, 0, 0]]])
        >>> centrality_nms(points, 2.5).index
        tensor([1, 3])
    """
    packed = offsets is not None
    points = _checks.points(_OP, "points", points, packed, integers=True)
    lengths, offsets = _checks.batching(_OP, points, lengths, offsets)
    radius = _checks.radius(_OP, radius)
    limit = 0
    if not points.is_floating_point():
        if radius > _LARGEST_STEP:
            raise ValueError(f"{_OP}: radius between integer points must be at most 2**30, got {radius}; convert the points with .double()")
        points, limit = points.long(), math.ceil(Fraction(radius) ** 2)  # of integers: d < r**2 if and only if d < ceil(r**2)
    cap = (
        _checks.LARGEST_CLOUD
        if max_neighbors is None
        else min(_checks.positive(_OP, "max_neighbors", max_neighbors), _checks.LARGEST_CLOUD)
    )
    keep, count = _centrality_nms(points.detach(), lengths, offsets, radius, limit, cap)
    before = torch.cat([keep.new_zeros(1, dtype=torch.int64), keep.flatten().cumsum(0)])
    if offsets is not None:
        return CentralityNMS(keep.nonzero()[:, 0], before[offsets], keep, count)
    rows = torch.arange(points.shape[0] + 1, device=points.device) * points.shape[1]
    return CentralityNMS(keep.nonzero()[:, 1], before[rows], keep, count)
