"""Radius search: all points in a ball around each query, as many as there are."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from geossl.ops import _checks, _dispatch
from geossl.ops._native import DOUBLE, INT, INT64, PTR
from geossl.ops.batching import batch_from_offsets
from geossl.ops.grouping import group
from geossl.ops.neighbors import _batching, _check_clouds, _clouds, _distance, _needs_grad
from geossl.ops.reference import neighbors as reference

_OP = "radius_search"


class RadiusNeighbors(NamedTuple):
    """Result of :func:`radius_search`: the neighbours of query r are the entries ``row_splits[r]`` to ``row_splits[r + 1]``."""

    row_splits: Tensor
    """First entry of each query and the end, ``[rows + 1]`` int64; query q of padded cloud b is row ``b * Q + q``."""
    index: Tensor  # type: ignore[assignment]  # hides tuple.index, which nobody needs here
    """Indices, ``[T]`` int64."""
    distance: Tensor
    """Squared distances, ``[T]``, ascending within a query."""


# query, query_offsets, query_lengths, queries, points, offsets, lengths, n, batch
_CLOUDS = (PTR, PTR, PTR, INT64, PTR, PTR, PTR, INT64, INT64)
# dtype, clouds, radius, radii, exclude_self, count
_count_c = _dispatch.functions("radius_count", INT, *_CLOUDS, DOUBLE, PTR, INT, PTR)
# dtype, clouds, radius, radii, exclude_self, row_splits, index, distance
_fill_c = _dispatch.functions("radius_fill", INT, *_CLOUDS, DOUBLE, PTR, INT, PTR, PTR, PTR)


def _native(
    kind: Any, query: Tensor, points: Tensor, query_lengths: Tensor | None, lengths: Tensor | None, query_offsets: Tensor | None,
    offsets: Tensor | None, radius: float, radii: Tensor | None, exclude_self: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    query, points = query.contiguous(), points.contiguous()
    batching = _batching(_OP, query, points, query_lengths, lengths, query_offsets, offsets)
    radii = _checks.radii_values(_OP, radii, query.dtype)
    arguments = (
        *_dispatch.place(kind, query), query.dtype == torch.float64, *_clouds(query, points, *batching), radius,
        _dispatch.pointer(radii), exclude_self,
    )  # fmt: skip
    row_splits = query.new_zeros(query.shape[:-1].numel() + 1, dtype=torch.int64)
    _count_c[kind](*arguments, row_splits[1:].data_ptr())
    row_splits = row_splits.cumsum(0)
    total = int(row_splits[-1])  # where a call on a GPU waits for the device
    index, distance = query.new_empty(total, dtype=torch.int64), query.new_empty(total)
    _fill_c[kind](*arguments, row_splits.data_ptr(), index.data_ptr(), distance.data_ptr())
    return row_splits, index, distance


def _twin(query: Tensor, points: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    _batching(_OP, query, points, *rest[:4])
    _checks.radii_values(_OP, rest[5], query.dtype)
    return reference.radius_search(query, points, *rest)


def _fake(query: Tensor, points: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    rows = query.shape[0] if query.dim() == 2 else query.shape[0] * query.shape[1]
    total = torch.library.get_ctx().new_dynamic_size()
    return query.new_empty(rows + 1, dtype=torch.int64), query.new_empty(total, dtype=torch.int64), query.new_empty(total)


_radius_search = _dispatch.define(
    "radius_search(Tensor query, Tensor points, Tensor? query_lengths, Tensor? lengths, Tensor? query_offsets, Tensor? offsets, "
    "float radius, Tensor? radii, bool exclude_self) -> (Tensor, Tensor, Tensor)",
    native=_native,
    twin=_twin,
    fake=_fake,
    direct=True,
)


def _differentiable(query: Tensor, points: Tensor, row_splits: Tensor, index: Tensor, packed: bool) -> Tensor:
    """Compute the distances once more, by operators that have a gradient."""
    row = batch_from_offsets(row_splits, index.shape[0])
    if not packed:
        index = index + row // max(query.shape[1], 1) * points.shape[1]
        query, points = query.flatten(0, 1), points.flatten(0, 1)
    return _distance(group(query, row), points, index[:, None]).squeeze(1)


def radius_search(
    query: Tensor,
    points: Tensor,
    radius: float | Tensor,
    *,
    query_lengths: Tensor | None = None,
    lengths: Tensor | None = None,
    query_offsets: Tensor | None = None,
    offsets: Tensor | None = None,
    exclude_self: bool = False,
) -> RadiusNeighbors:
    """Find all points strictly inside a ball around each query.

    A point is inside if ``(dx*dx + dy*dy) + dz*dz < radius * radius``, computed in the type of the points: a point exactly on the sphere
    is outside. There is no limit on the number of neighbours; use :func:`geossl.ops.ball_query` for at most k of them in a rectangular
    result. Neighbours are sorted by (distance, index) and are the same on CPU and GPU, padded and packed, for any number of threads. A
    point with a NaN or infinite coordinate is nobody's neighbour, and such a query has none.

    Args:
        query: Ball centres, ``[B, Q, 3]`` or packed ``[Mq, 3]``, float32 or float64 (half types are upcast to float32).
        points: Searched positions, ``[B, N, 3]`` or packed ``[M, 3]``, same type and device.
        radius: Positive, inf is allowed; one for all queries or one for each (``[B, Q]`` or ``[Mq]``).
        query_lengths: Queries in each padded cloud, ``[B]``; None means Q. Rows past them get nothing.
        lengths: Points in each padded cloud, ``[B]``; None means N.
        query_offsets: First row of each packed cloud of queries, and the end: ``[B + 1]``; given together with ``offsets``.
        offsets: The same for the points, ``[B + 1]``.
        exclude_self: Leave out the point whose row in its cloud is the query's row in its cloud: for queries that are the points
            themselves. Other points at the same position stay.

    Returns:
        Row splits, indices and squared distances of all T neighbours, query after query; T depends on the data. Indices are local to the
        cloud when padded and rows of ``points`` when packed. Distances are differentiable in ``query`` and ``points``, twice.

    Raises:
        ValueError: a shape, device or value is wrong; TypeError: a type is. Values on CUDA are only checked with ``GEOSSL_CHECKS=1``.

    Example:
        >>> points = torch.tensor([[[0.0, 0, 0], [1, 0, 0], [3, 0, 0]]])
        >>> radius_search(points, points, 1.5)
        RadiusNeighbors(row_splits=tensor([0, 2, 4, 5]), index=tensor([0, 1, 1, 0, 2]), distance=tensor([0., 1., 0., 1., 0.]))
    """
    query, points, query_lengths, lengths, query_offsets, offsets = _check_clouds(
        _OP, query, points, query_lengths, lengths, query_offsets, offsets
    )
    limit, radii = _checks.radius_or_radii(_OP, radius, query)
    row_splits, index, distance = _radius_search(
        query, points, query_lengths, lengths, query_offsets, offsets, limit, radii, bool(exclude_self)
    )
    if _needs_grad(query, points):
        distance = _differentiable(query, points, row_splits, index, offsets is not None)
    return RadiusNeighbors(row_splits, index, distance)
