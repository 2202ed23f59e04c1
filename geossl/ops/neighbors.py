"""Neighbour search: k nearest neighbours and ball query."""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from geossl.errors import unknown_name
from geossl.ops import _checks, _dispatch, _tree
from geossl.ops._native import DOUBLE, INT, INT64, PTR
from geossl.ops.reference import neighbors as reference


class Neighbors(NamedTuple):
    """Result of :func:`knn`; rows follow the queries, ``[B, Q, k]`` or packed ``[M, k]``."""

    distance: Tensor
    """Squared distances, ascending, +inf where there is no neighbour."""
    index: Tensor  # type: ignore[assignment]  # hides tuple.index, which nobody needs here
    """Indices int64, -1 where there is no neighbour."""


class BallNeighbors(NamedTuple):
    """Result of :func:`ball_query`; rows follow the queries, ``[B, Q, k]`` or packed ``[M, k]``."""

    index: Tensor  # type: ignore[assignment]  # hides tuple.index, which nobody needs here
    """Indices int64, -1 where there is no neighbour."""
    distance: Tensor
    """Squared distances, +inf where there is no neighbour."""
    count: Tensor  # type: ignore[assignment]
    """Number of points in the ball, also those beyond k: ``[B, Q]`` or ``[M]`` int64."""


# query, query_offsets, query_lengths, queries, points, offsets, lengths, n, batch
_CLOUDS = (PTR, PTR, PTR, INT64, PTR, PTR, PTR, INT64, INT64)
# dtype, clouds, k, radius, exclude_self, distance, index
_knn_c = _dispatch.functions("knn", INT, *_CLOUDS, INT64, DOUBLE, INT, PTR, PTR)
# dtype, clouds, k, radius, radii, first, repeat, distance, index, count
_ball_c = _dispatch.functions("ball_query", INT, *_CLOUDS, INT64, DOUBLE, PTR, INT, INT, PTR, PTR, PTR)
# dtype, query, queries, points, n, batch, index, k, grad, order, starts, grad_query, grad_points
_distance_c = _dispatch.functions("neighbor_distance", INT, PTR, INT64, PTR, INT64, INT64, PTR, INT64, PTR)
_backward_c = _dispatch.functions("neighbor_distance_backward", INT, PTR, INT64, PTR, INT64, INT64, PTR, INT64, PTR, PTR, PTR, PTR, PTR)


def _clouds(
    query: Tensor, points: Tensor, query_lengths: Tensor | None, lengths: Tensor | None, query_offsets: Tensor | None,
    offsets: Tensor | None,
) -> tuple[int, ...]:  # fmt: skip
    """Return the C arguments that describe contiguous clouds, whose batching has been through :func:`_batching`."""
    q, p = query.data_ptr(), points.data_ptr()
    if offsets is None and lengths is None and query_lengths is None:
        batch, n, _ = points.shape
        return q, 0, 0, query.shape[1], p, 0, 0, n, batch
    pointer = _dispatch.pointer
    batch = points.shape[0] if offsets is None else offsets.shape[0] - 1
    return (
        q, pointer(query_offsets), pointer(query_lengths), query.shape[-2],
        p, pointer(offsets), pointer(lengths), points.shape[-2], batch,
    )  # fmt: skip


def _batching(
    op: str, query: Tensor, points: Tensor, query_lengths: Tensor | None, lengths: Tensor | None, query_offsets: Tensor | None,
    offsets: Tensor | None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """Check the values of lengths and offsets and return them contiguous."""
    if query_lengths is lengths is query_offsets is offsets is None:
        return None, None, None, None
    if query_lengths is not None:
        query_lengths = _checks.length_values(op, query_lengths, query.shape[-2], "query_")
    if lengths is not None:
        lengths = _checks.length_values(op, lengths, points.shape[-2])
    if offsets is not None and query_offsets is not None:
        query_offsets = _checks.offset_values(op, query_offsets, query.shape[0], "query_")
        offsets = _checks.offset_values(op, offsets, points.shape[0])
    return query_lengths, lengths, query_offsets, offsets


def _knn_native(
    kind: Any, query: Tensor, points: Tensor, k: int, query_lengths: Tensor | None, lengths: Tensor | None,
    query_offsets: Tensor | None, offsets: Tensor | None, radius: float, exclude_self: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    query, points = query.contiguous(), points.contiguous()
    batching = _batching("knn", query, points, query_lengths, lengths, query_offsets, offsets)
    distance, index = _knn_fake(query, points, k)
    if kind == "cuda" and _tree.pays(query, points, k, batching[3]):
        _tree.search(query, points, k, *batching, radius, None, exclude_self, False, False, distance, index, None)
        return distance, index
    _knn_c[kind](
        *_dispatch.place(kind, query), query.dtype == torch.float64, *_clouds(query, points, *batching), k, radius, exclude_self,
        distance.data_ptr(), index.data_ptr(),
    )  # fmt: skip
    return distance, index


def _knn_twin(query: Tensor, points: Tensor, k: int, *rest: Any) -> tuple[Tensor, Tensor]:
    _batching("knn", query, points, *rest[:4])
    return reference.knn(query, points, k, *rest)


def _knn_fake(query: Tensor, points: Tensor, k: int, *rest: Any) -> tuple[Tensor, Tensor]:
    if query.dim() == 3:
        batch, queries, _ = query.shape  # numbers one by one: torch takes them twice as fast as a tuple
        distance = query.new_empty(batch, queries, k)
    else:
        distance = query.new_empty(query.shape[0], k)
    return distance, torch.empty_like(distance, dtype=torch.int64)


_knn = _dispatch.define(
    "knn(Tensor query, Tensor points, SymInt k, Tensor? query_lengths, Tensor? lengths, Tensor? query_offsets, Tensor? offsets, "
    "float radius, bool exclude_self) -> (Tensor, Tensor)",
    native=_knn_native,
    twin=_knn_twin,
    fake=_knn_fake,
    direct=True,
)


def _ball_native(
    kind: Any, query: Tensor, points: Tensor, k: int, query_lengths: Tensor | None, lengths: Tensor | None,
    query_offsets: Tensor | None, offsets: Tensor | None, radius: float, radii: Tensor | None, first: bool, repeat: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    query, points = query.contiguous(), points.contiguous()
    batching = _batching("ball_query", query, points, query_lengths, lengths, query_offsets, offsets)
    radii = _checks.radii_values("ball_query", radii, query.dtype)
    index, distance, count = _ball_fake(query, points, k)
    if kind == "cuda" and _tree.pays(query, points, k, batching[3]):
        _tree.search(query, points, k, *batching, radius, radii, False, first, repeat, distance, index, count)
        return index, distance, count
    _ball_c[kind](
        *_dispatch.place(kind, query), query.dtype == torch.float64, *_clouds(query, points, *batching), k, radius,
        _dispatch.pointer(radii), first, repeat, distance.data_ptr(), index.data_ptr(), count.data_ptr(),
    )  # fmt: skip
    return index, distance, count


def _ball_twin(query: Tensor, points: Tensor, k: int, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    _batching("ball_query", query, points, *rest[:4])
    _checks.radii_values("ball_query", rest[5], query.dtype)
    return reference.ball_query(query, points, k, *rest)


def _ball_fake(query: Tensor, points: Tensor, k: int, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    distance, index = _knn_fake(query, points, k)
    if query.dim() == 3:
        batch, queries, _ = query.shape
        return index, distance, index.new_empty(batch, queries)
    return index, distance, index.new_empty(query.shape[0])


_ball_query = _dispatch.define(
    "ball_query(Tensor query, Tensor points, SymInt k, Tensor? query_lengths, Tensor? lengths, Tensor? query_offsets, Tensor? offsets, "
    "float radius, Tensor? radii, bool first, bool repeat) -> (Tensor, Tensor, Tensor)",
    native=_ball_native,
    twin=_ball_twin,
    fake=_ball_fake,
    direct=True,
)


# Distances with a gradient ----------------------------------------------------------------------------------------------------------------


def _distance_native(kind: Any, query: Tensor, points: Tensor, index: Tensor) -> Tensor:
    query, points, index = query.contiguous(), points.contiguous(), index.contiguous()
    out = torch.empty(index.shape, dtype=query.dtype, device=query.device)
    batch = points.shape[0] if points.dim() == 3 else 1
    _distance_c[kind](
        *_dispatch.place(kind, query), query.dtype == torch.float64, query.data_ptr(), query.shape[-2], points.data_ptr(),
        points.shape[-2], batch, index.data_ptr(), index.shape[-1], out.data_ptr(),
    )  # fmt: skip
    return out


def _backward_native(kind: Any, grad: Tensor, query: Tensor, points: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    grad, query, points, index = grad.contiguous(), query.contiguous(), points.contiguous(), index.contiguous()
    grad_query, grad_points = torch.empty_like(query), torch.empty_like(points)
    batch = points.shape[0] if points.dim() == 3 else 1
    order, starts = _dispatch.inverse(index, batch, points.shape[-2]) if kind == "cuda" else (None, None)
    _backward_c[kind](
        *_dispatch.place(kind, query), query.dtype == torch.float64, query.data_ptr(), query.shape[-2], points.data_ptr(),
        points.shape[-2], batch, index.data_ptr(), index.shape[-1], grad.data_ptr(), _dispatch.pointer(order), _dispatch.pointer(starts),
        grad_query.data_ptr(), grad_points.data_ptr(),
    )  # fmt: skip
    return grad_query, grad_points


_distance = _dispatch.define(
    "neighbor_distance(Tensor query, Tensor points, Tensor index) -> Tensor",
    native=_distance_native,
    twin=reference.neighbor_distance,
    fake=lambda query, points, index: query.new_empty(index.shape),
)
_distance_backward = _dispatch.define(
    "neighbor_distance_backward(Tensor grad, Tensor query, Tensor points, Tensor index) -> (Tensor, Tensor)",
    native=_backward_native,
    twin=reference.neighbor_distance_backward,
    fake=lambda grad, query, points, index: (torch.empty_like(query), torch.empty_like(points)),
)


def _save(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    # With create_graph, the twin: it is made of differentiable torch operations.
    formula = reference.neighbor_distance_backward if torch.is_grad_enabled() else _distance_backward
    return *formula(grad, *ctx.saved_tensors), None


torch.library.register_autograd("geossl::neighbor_distance", _backward, setup_context=_save, lib=_dispatch.LIBRARY)


# Public -----------------------------------------------------------------------------------------------------------------------------------


def _check_clouds(
    op: str, query: Tensor, points: Tensor, query_lengths: Tensor | None, lengths: Tensor | None, query_offsets: Tensor | None,
    offsets: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    packed = offsets is not None
    if packed != (query_offsets is not None):
        missing = "query_offsets" if packed else "offsets"
        raise ValueError(f"{op}: packed clouds need both query_offsets and offsets, but {missing} is missing; both have B + 1 entries")
    query, points = _checks.two_clouds(op, ("query", "points"), query, points, packed)
    if query_lengths is not None or query_offsets is not None:
        query_lengths, query_offsets = _checks.batching(op, query, query_lengths, query_offsets, "query_")
    if lengths is not None or offsets is not None:
        lengths, offsets = _checks.batching(op, points, lengths, offsets)
    if packed:
        if query_offsets.shape != offsets.shape:  # type: ignore[union-attr]
            raise ValueError(
                f"{op}: query_offsets and offsets must have the same length B + 1, got {query_offsets.shape[0]} and {offsets.shape[0]}"  # type: ignore[union-attr]
            )
    elif query.shape[0] != points.shape[0]:
        raise ValueError(f"{op}: query and points must have the same number of clouds B, got {query.shape[0]} and {points.shape[0]}")
    return query, points, query_lengths, lengths, query_offsets, offsets


def _needs_grad(query: Tensor, points: Tensor) -> bool:
    return (query.requires_grad or points.requires_grad) and torch.is_grad_enabled()


def knn(
    query: Tensor,
    points: Tensor,
    k: int,
    *,
    query_lengths: Tensor | None = None,
    lengths: Tensor | None = None,
    query_offsets: Tensor | None = None,
    offsets: Tensor | None = None,
    radius: float | None = None,
    exclude_self: bool = False,
) -> Neighbors:
    """Find the k nearest points of each query.

    Exact: squared distances are ``(dx*dx + dy*dy) + dz*dz`` in the type of the points, neighbours are sorted by (distance, index), so
    equal distances go to the lower index, and indices are the same on CPU and GPU, padded and packed, for any number of threads. A point
    with a NaN or infinite coordinate is nobody's neighbour, and such a query has none. There is no limit on k or on distances, except that
    pairs whose squared distance overflows the type (beyond 1.8e19 in float32) are no neighbours.

    Args:
        query: Query positions, ``[B, Q, 3]`` or packed ``[Mq, 3]``, float32 or float64 (half types are upcast to float32).
        points: Searched positions, ``[B, N, 3]`` or packed ``[M, 3]``, same type and device.
        k: Neighbours per query, at least 1; may exceed the number of points.
        query_lengths: Queries in each padded cloud, ``[B]``; None means Q. Rows past them get no neighbours.
        lengths: Points in each padded cloud, ``[B]``; None means N.
        query_offsets: First row of each packed cloud of queries, and the end: ``[B + 1]``; given together with ``offsets``.
        offsets: The same for the points, ``[B + 1]``.
        radius: Only points with ``distance < radius**2`` are neighbours (strictly inside). None means no limit.
        exclude_self: Leave out the point whose row in its cloud is the query's row in its cloud: for queries that are the points
            themselves. Other points at the same position stay.

    Returns:
        Squared distances and indices, sorted; +inf and -1 where a query has fewer than k neighbours. Indices are local to the cloud when
        padded and rows of ``points`` when packed. Distances are differentiable in both inputs (0 where the index is -1), twice.

    Raises:
        ValueError: a shape, device or value is wrong; TypeError: a type is. Values on CUDA are only checked with ``GEOSSL_CHECKS=1``.

    Example:
        >>> points = torch.tensor([[[0.0, 0, 0], [1, 0, 0], [3, 0, 0]]])
        >>> knn(points, points, 2).index
        tensor([[[0, 1],
                 [1, 0],
                 [2, 1]]])
    """
    query, points, query_lengths, lengths, query_offsets, offsets = _check_clouds(
        "knn", query, points, query_lengths, lengths, query_offsets, offsets
    )
    limit = math.inf if radius is None else _checks.radius("knn", radius)
    distance, index = _knn(
        query, points, _checks.positive("knn", "k", k), query_lengths, lengths, query_offsets, offsets, limit, bool(exclude_self)
    )
    if _needs_grad(query, points):
        distance = _distance(query, points, index)
    return Neighbors(distance, index)


def ball_query(
    query: Tensor,
    points: Tensor,
    radius: float | Tensor,
    k: int,
    *,
    query_lengths: Tensor | None = None,
    lengths: Tensor | None = None,
    query_offsets: Tensor | None = None,
    offsets: Tensor | None = None,
    mode: Literal["nearest", "first"] = "nearest",
    fill: Literal["pad", "repeat"] = "pad",
) -> BallNeighbors:
    """Find up to k points strictly inside a ball around each query.

    A point is inside if ``(dx*dx + dy*dy) + dz*dz < radius * radius``, computed in the type of the points: a point exactly on the sphere
    is outside. Order, ties, invalid points and batching are those of :func:`knn`.

    Args:
        query: Ball centres, ``[B, Q, 3]`` or packed ``[Mq, 3]``, float32 or float64 (half types are upcast to float32).
        points: Searched positions, ``[B, N, 3]`` or packed ``[M, 3]``, same type and device.
        radius: Positive, inf is allowed; one for all queries or one for each (``[B, Q]`` or ``[Mq]``).
        k: Points kept per ball, at least 1.
        query_lengths: Queries in each padded cloud, ``[B]``; None means Q. Rows past them get nothing.
        lengths: Points in each padded cloud, ``[B]``; None means N.
        query_offsets: First row of each packed cloud of queries, and the end: ``[B + 1]``; given together with ``offsets``.
        offsets: The same for the points, ``[B + 1]``.
        mode: Which k are kept when there are more: the "nearest", sorted by (distance, index), or the "first" by index, as in PointNet++.
        fill: What stands in free slots: "pad" -1 and +inf, or "repeat" the first kept point, as in PointNet++. A ball without any
            point is -1 and +inf in either case.

    Returns:
        Indices, squared distances and the number of points in the ball before the cut to k. Indices are local to the cloud when padded
        and rows of ``points`` when packed. Distances are differentiable in ``query`` and ``points``, twice.

    Raises:
        ValueError: a shape, device or value is wrong; TypeError: a type is. Values on CUDA are only checked with ``GEOSSL_CHECKS=1``.

    Example:
        >>> points = torch.tensor([[[0.0, 0, 0], [1, 0, 0], [3, 0, 0]]])
        >>> ball_query(points[:, :1], points, 2.0, 3)
        BallNeighbors(index=tensor([[[ 0,  1, -1]]]), distance=tensor([[[0., 1., inf]]]), count=tensor([[2]]))
    """
    query, points, query_lengths, lengths, query_offsets, offsets = _check_clouds(
        "ball_query", query, points, query_lengths, lengths, query_offsets, offsets
    )
    limit, radii = _checks.radius_or_radii("ball_query", radius, query)
    if mode not in ("nearest", "first"):
        raise unknown_name("ball_query mode", mode, ("nearest", "first"))
    if fill not in ("pad", "repeat"):
        raise unknown_name("ball_query fill", fill, ("pad", "repeat"))
    index, distance, count = _ball_query(
        query, points, _checks.positive("ball_query", "k", k), query_lengths, lengths, query_offsets, offsets, limit, radii,
        mode == "first", fill == "repeat",
    )  # fmt: skip
    if _needs_grad(query, points):
        distance = _distance(query, points, index)
    return BallNeighbors(index, distance, count)
