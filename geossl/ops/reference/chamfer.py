"""Chamfer distance in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from geossl.ops.reference.clouds import CHUNK, cloud_pairs, distance


def _nearest(query: Tensor, cloud: Tensor, norm: str) -> tuple[Tensor, Tensor]:
    """Distance ``[Q]`` to the nearest row of ``cloud [n, D]`` and its number, -1 where there is none."""
    best = query.new_full((query.shape[0],), torch.inf)
    index = torch.full((query.shape[0],), -1, dtype=torch.int64, device=query.device)
    n = cloud.shape[0]
    if n == 0:
        return best, index
    step = max(1, CHUNK // n)
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

    Rows are numbered as in ``reshape(-1, D)``, -1 for none; a direction that is not asked for has no entries.
    """
    x_rows, y_rows = x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1])
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
    """Gradient of the mean distance to the matched rows with respect to ``rows``, ``[R, D]``."""
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
    x_rows, y_rows = x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1])
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
