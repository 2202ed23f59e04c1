"""Neighbour searches and distances to given neighbours in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from geossl.ops.reference.clouds import CHUNK, cloud_pairs, squared_distance
from geossl.ops.reference.grouping import group_backward, take


def _limits(query: Tensor, radius: float, radii: Tensor | None) -> Tensor:
    """Return the squared radius of every query, ``[rows]``, rounded as the kernels round it."""
    if radii is None:
        return torch.full(query.shape[:-1], radius, dtype=query.dtype, device=query.device).flatten().square()
    return radii.to(query.dtype).flatten().square()


def _within(query: Tensor, cloud: Tensor, limit: Tensor, exclude: Tensor | None) -> Tensor:
    """Squared distances ``[Q, n]``, +inf where they are not under the limit; ``exclude [Q]`` is a row each query leaves out."""
    d2 = squared_distance(query[:, None], cloud[None])
    inside = d2 < limit[:, None]
    if exclude is not None:
        inside &= torch.arange(cloud.shape[0], device=cloud.device) != exclude[:, None]
    return torch.where(inside, d2, torch.inf)


def _search(
    query: Tensor,
    points: Tensor,
    k: int,
    batching: tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None],
    limit: Tensor,
    exclude_self: bool,
    by_index: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    rows, cloud_rows = query.reshape(-1, 3), points.reshape(-1, 3)
    found = torch.full((rows.shape[0], k), torch.inf, dtype=rows.dtype, device=rows.device)
    index = torch.full((rows.shape[0], k), -1, dtype=torch.int64, device=rows.device)
    count = torch.zeros(rows.shape[0], dtype=torch.int64, device=rows.device)
    query_lengths, lengths, query_offsets, offsets = batching
    for q, p in cloud_pairs(query, points, query_lengths, lengths, query_offsets, offsets):
        n, base = p.stop - p.start, 0 if offsets is None else p.start
        if n == 0:
            continue
        step = max(1, CHUNK // n)
        for begin in range(q.start, q.stop, step):
            part = slice(begin, min(begin + step, q.stop))
            own = torch.arange(part.start, part.stop, device=rows.device) - q.start if exclude_self else None
            d2 = _within(rows[part], cloud_rows[p], limit[part], own)
            hit = d2 < torch.inf
            count[part] = hit.sum(1)
            # A stable sort keeps equal keys in index order; "first" only sorts hits before misses.
            order = torch.sort((~hit).to(torch.int8) if by_index else d2, dim=1, stable=True).indices[:, :k]
            best = d2.gather(1, order)
            found[part, : order.shape[1]] = best
            index[part, : order.shape[1]] = torch.where(best < torch.inf, order + base, -1)
    shape = query.shape[:-1]
    return found.view(*shape, k), index.view(*shape, k), count.view(shape)


def knn(
    query: Tensor, points: Tensor, k: int, query_lengths: Tensor | None, lengths: Tensor | None, query_offsets: Tensor | None,
    offsets: Tensor | None, radius: float, exclude_self: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return squared distances and indices of the k nearest points, see :func:`geossl.ops.knn`."""
    batching = (query_lengths, lengths, query_offsets, offsets)
    return _search(query, points, k, batching, _limits(query, radius, None), exclude_self, False)[:2]


def ball_query(
    query: Tensor, points: Tensor, k: int, query_lengths: Tensor | None, lengths: Tensor | None, query_offsets: Tensor | None,
    offsets: Tensor | None, radius: float, radii: Tensor | None, first: bool, repeat: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return indices, squared distances and counts of the points in a ball, see :func:`geossl.ops.ball_query`."""
    batching = (query_lengths, lengths, query_offsets, offsets)
    found, index, count = _search(query, points, k, batching, _limits(query, radius, radii), False, first)
    if repeat:
        missing = index < 0
        index = torch.where(missing, index[..., :1], index)
        found = torch.where(missing, found[..., :1], found)
    return index, found, count


def radius_search(
    query: Tensor, points: Tensor, query_lengths: Tensor | None, lengths: Tensor | None, query_offsets: Tensor | None,
    offsets: Tensor | None, radius: float, radii: Tensor | None, exclude_self: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return row splits, indices and squared distances of all points in a ball, see :func:`geossl.ops.radius_search`."""
    rows, cloud_rows, limit = query.reshape(-1, 3), points.reshape(-1, 3), _limits(query, radius, radii)
    count = torch.zeros(rows.shape[0] + 1, dtype=torch.int64, device=rows.device)
    indices, distances = [count[:0]], [rows.new_empty(0)]
    for q, p in cloud_pairs(query, points, query_lengths, lengths, query_offsets, offsets):
        n, base = p.stop - p.start, 0 if offsets is None else p.start
        step = max(1, CHUNK // max(n, 1))
        for begin in range(q.start, q.stop, step):
            part = slice(begin, min(begin + step, q.stop))
            own = torch.arange(part.start, part.stop, device=rows.device) - q.start if exclude_self else None
            d2, order = torch.sort(_within(rows[part], cloud_rows[p], limit[part], own), dim=1, stable=True)
            hit = d2 < torch.inf
            count[part.start + 1 : part.stop + 1] = hit.sum(1)
            indices.append(order[hit] + base)
            distances.append(d2[hit])
    return count.cumsum(0), torch.cat(indices), torch.cat(distances)


def neighbor_distance(query: Tensor, points: Tensor, index: Tensor) -> Tensor:
    """Squared distance of each query to its neighbours, +inf where the index is -1; differentiable."""
    if points.shape[-2] == 0:
        return query.new_full(index.shape, torch.inf)
    d2 = squared_distance(query.unsqueeze(-2), take(points, index))
    return torch.where(index >= 0, d2, torch.inf)


def neighbor_distance_backward(grad: Tensor, query: Tensor, points: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of :func:`neighbor_distance` with respect to query and points; differentiable once more."""
    if points.shape[-2] == 0:
        return torch.zeros_like(query), torch.zeros_like(points)
    found = (index >= 0).unsqueeze(-1)
    pull = torch.where(found, (2 * grad).unsqueeze(-1) * (query.unsqueeze(-2) - take(points, index)), 0.0)
    batch = points.shape[0] if points.dim() == 3 else 0
    return pull.sum(-2), -group_backward(pull, index, batch, points.shape[-2])
