"""The operators in plain torch: the definition that kernels are tested against, and what runs when no native library is there.

Same arguments and results as the registered operators. Written to be read and to be exact, not to be fast: squared distances are
``(dx * dx + dy * dy) + dz * dz``, one rounding per operation, so that these give the same indices as the kernels, bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor

_CHUNK = 1 << 22  # pairs of points held in memory at once


def squared_distance(x: Tensor, y: Tensor) -> Tensor:
    """Squared Euclidean distance over the last dimension, in the one order of operations that all kernels share."""
    d = x - y
    square = d * d
    return (square[..., 0] + square[..., 1]) + square[..., 2]


def distance(x: Tensor, y: Tensor, norm: str) -> Tensor:
    """Distance over the last dimension: "l2sq", or "l1" (sum of absolute differences)."""
    if norm != "l1":
        return squared_distance(x, y)
    d = (x - y).abs()
    return (d[..., 0] + d[..., 1]) + d[..., 2]


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


# Farthest point sampling --------------------------------------------------------------------------------------------------------------


def sample_one(cloud: Tensor, k: int, start: int, mask: Tensor | None, min_sq_norm: float) -> Tensor:
    """Sample one cloud ``[n, 3]``; returns ``[k]`` row numbers within it, see :func:`geossl.ops.farthest_point_sample`."""
    n = cloud.shape[0]
    picked = torch.full((k,), -1, dtype=torch.int64, device=cloud.device)
    eligible = cloud.isfinite().all(1)
    if mask is not None:
        eligible &= mask
    row = torch.arange(n, device=cloud.device)
    if n == 0 or k == 0 or not bool(eligible.any()):
        return picked
    # The first pick is the start, or else the next eligible row after it, going round.
    last = int(torch.where(eligible, (row - start) % n, n).argmin())
    if min_sq_norm >= 0:
        picked[:] = last
        square = cloud * cloud
        eligible &= ((square[:, 0] + square[:, 1]) + square[:, 2]).double() > min_sq_norm
    picked[0] = last
    # Rows that cannot be picked (again) have distance -1, which stays the minimum.
    nearest = torch.where(eligible, torch.inf, -1.0).to(cloud.dtype)
    for step in range(1, k):
        nearest[last] = -1
        new = squared_distance(cloud, cloud[last])
        nearest = torch.where(new < nearest, new, nearest)
        largest = nearest.max()
        if largest < 0:
            break
        last = int(torch.where(nearest == largest, row, n).min())
        picked[step] = last
    return picked


def fps(
    points: Tensor, k: int, lengths: Tensor | None, start: int, starts: Tensor | None, mask: Tensor | None, min_sq_norm: float
) -> Tensor:
    """Padded farthest point sampling."""
    out = torch.full((points.shape[0], k), -1, dtype=torch.int64, device=points.device)
    for b, cloud in enumerate(points):
        size = points.shape[1] if lengths is None else int(lengths[b])
        first = start if starts is None else int(starts[b])
        out[b] = sample_one(cloud[:size], k, first, None if mask is None else mask[b, :size], min_sq_norm)
    return out


def fps_packed(
    points: Tensor, offsets: Tensor, out_offsets: Tensor, start: int, starts: Tensor | None, mask: Tensor | None, min_sq_norm: float
) -> Tensor:
    """Packed farthest point sampling; cloud b gives ``out_offsets[b + 1] - out_offsets[b]`` rows of ``points``."""
    counts = out_offsets.diff().tolist()
    out = [torch.empty(0, dtype=torch.int64, device=points.device)]
    for b, (begin, end) in enumerate(spans(points, None, offsets)):
        first = start if starts is None else int(starts[b])
        picked = sample_one(points[begin:end], counts[b], first, None if mask is None else mask[begin:end], min_sq_norm)
        out.append(torch.where(picked >= 0, picked + begin, picked))
    return torch.cat(out)


# Neighbours ---------------------------------------------------------------------------------------------------------------------------


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
        step = max(1, _CHUNK // n)
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


def take(rows: Tensor, index: Tensor) -> Tensor:
    """Gather ``rows[b, index[b]]`` (``[B, N, C]``) or ``rows[index]`` (``[M, C]``); row 0 stands in where the index is -1."""
    index = index.clamp(min=0)
    if rows.dim() == 2:
        return rows[index]
    return rows[torch.arange(rows.shape[0], device=rows.device).view(-1, *[1] * (index.dim() - 1)), index]


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


# Grouping -----------------------------------------------------------------------------------------------------------------------------


def group(features: Tensor, index: Tensor, fill: float) -> Tensor:
    """Gather rows, ``fill`` where the index is -1; differentiable."""
    filled = features.new_full((), fill)
    if features.shape[-2] == 0:
        return filled.expand(*index.shape, features.shape[-1]).contiguous()
    return torch.where((index >= 0).unsqueeze(-1), take(features, index), filled)


def group_backward(grad: Tensor, index: Tensor, batch: int, rows: int) -> Tensor:
    """Add the rows of ``grad [*index.shape, C]`` up by destination, in order, in float32 at least; differentiable.

    Returns ``[batch, rows, C]`` for an index local to its first dimension, ``[rows, C]`` when ``batch`` is 0.
    """
    channels = grad.shape[-1]
    wide = grad.reshape(-1, channels)
    wide = wide if wide.dtype == torch.float64 else wide.float()
    target = index if batch == 0 else index + rows * torch.arange(batch, device=index.device).view(-1, *[1] * (index.dim() - 1))
    kept = (index >= 0).flatten().nonzero().squeeze(1)
    out = wide.new_zeros(max(batch, 1) * rows, channels).index_add(0, target.flatten()[kept], wide[kept]).to(grad.dtype)
    return out if batch == 0 else out.view(batch, rows, channels)


# Chamfer distance ---------------------------------------------------------------------------------------------------------------------


def _nearest(query: Tensor, cloud: Tensor, norm: str) -> tuple[Tensor, Tensor]:
    """Distance ``[Q]`` to the nearest row of ``cloud [n, 3]`` and its number, -1 where there is none."""
    best = query.new_full((query.shape[0],), torch.inf)
    index = torch.full((query.shape[0],), -1, dtype=torch.int64, device=query.device)
    n = cloud.shape[0]
    if n == 0:
        return best, index
    step = max(1, _CHUNK // n)
    for begin in range(0, query.shape[0], step):
        part = slice(begin, begin + step)
        d = distance(query[part, None], cloud[None], norm)
        d = torch.where(d < torch.inf, d, torch.inf)
        best[part] = d.amin(1)
        first = torch.where(d == best[part, None], torch.arange(n, device=query.device), n).amin(1)
        index[part] = torch.where(best[part] < torch.inf, first, -1)
    return best, index


def chamfer(
    x: Tensor, y: Tensor, x_lengths: Tensor | None, y_lengths: Tensor | None, x_offsets: Tensor | None, y_offsets: Tensor | None,
    norm: str, direction: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return the loss of every pair of clouds ``[B]``, and the nearest row of ``y`` for each row of ``x``, followed by the reverse.

    Rows are numbered as in ``reshape(-1, 3)``, -1 for none; a direction that is not asked for has no entries.
    """
    x_rows, y_rows = x.reshape(-1, 3), y.reshape(-1, 3)
    x_entries, y_entries = (0 if direction == "y" else x_rows.shape[0]), (0 if direction == "x" else y_rows.shape[0])
    both = torch.full((x_entries + y_entries,), -1, dtype=torch.int64, device=x.device)
    nearest_y, nearest_x = both.split([x_entries, y_entries])
    losses = []

    def mean_distance(rows: Tensor, own: slice, others: Tensor, other: slice, nearest: Tensor) -> Tensor:
        d, index = _nearest(rows[own], others[other], norm)
        found = index >= 0
        nearest[own] = torch.where(found, index + other.start, -1)
        d = (d.sqrt() if norm == "l2" else d)[found]
        return d.double().sum() / max(d.numel(), 1)

    for a, b in cloud_pairs(x, y, x_lengths, y_lengths, x_offsets, y_offsets):
        total = torch.zeros((), dtype=torch.float64, device=x.device)
        if direction != "y":
            total = total + mean_distance(x_rows, a, y_rows, b, nearest_y)
        if direction != "x":
            total = total + mean_distance(y_rows, b, x_rows, a, nearest_x)
        losses.append(total)
    return torch.stack(losses).to(x.dtype) if losses else x.new_zeros(0), both


def _cloud_of_row(rows: Tensor, offsets: Tensor | None) -> Tensor:
    if offsets is None:
        return torch.arange(rows.shape[0], device=rows.device).repeat_interleave(rows.shape[1])
    return torch.searchsorted(offsets, torch.arange(rows.shape[0], device=rows.device), right=True) - 1


def _pull(grad: Tensor, rows: Tensor, others: Tensor, index: Tensor, cloud: Tensor, norm: str) -> Tensor:
    """Gradient of the mean distance to the matched rows with respect to ``rows``, ``[R, 3]``."""
    found = index >= 0
    count = torch.zeros_like(grad).index_add(0, cloud, found.to(grad.dtype))
    weight = (grad / count.clamp(min=1))[cloud, None]
    d = torch.where(found[:, None], rows - others[index.clamp(min=0)], 0.0)
    if norm == "l2sq":
        return 2 * weight * d
    if norm == "l1":
        return weight * d.sign()
    square = (d * d).sum(1, keepdim=True)
    apart = square > 0
    return torch.where(apart, weight * d / torch.where(apart, square, 1.0).sqrt(), 0.0)


def chamfer_backward(
    grad: Tensor, x: Tensor, y: Tensor, nearest: Tensor, x_lengths: Tensor | None, y_lengths: Tensor | None, x_offsets: Tensor | None,
    y_offsets: Tensor | None, norm: str, direction: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gradients of :func:`chamfer` with respect to both clouds; differentiable once more."""
    x_rows, y_rows = x.reshape(-1, 3), y.reshape(-1, 3)
    grad_x, grad_y = torch.zeros_like(x_rows), torch.zeros_like(y_rows)
    x_entries = 0 if direction == "y" else x_rows.shape[0]
    nearest_y, nearest_x = nearest[:x_entries], nearest[x_entries:]
    if x_rows.shape[0] and y_rows.shape[0]:
        if direction != "y":
            pull = _pull(grad, x_rows, y_rows, nearest_y, _cloud_of_row(x, x_offsets), norm)
            grad_x = grad_x + pull
            grad_y = grad_y.index_add(0, nearest_y.clamp(min=0), -pull)
        if direction != "x":
            pull = _pull(grad, y_rows, x_rows, nearest_x, _cloud_of_row(y, y_offsets), norm)
            grad_y = grad_y + pull
            grad_x = grad_x.index_add(0, nearest_x.clamp(min=0), -pull)
    return grad_x.view_as(x), grad_y.view_as(y)
