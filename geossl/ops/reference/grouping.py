"""Gathering rows and summing them back in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor


def take(rows: Tensor, index: Tensor) -> Tensor:
    """Gather ``rows[b, index[b]]`` (``[B, N, C]``) or ``rows[index]`` (``[M, C]``); row 0 stands in where the index is -1."""
    index = index.clamp(min=0)
    if rows.dim() == 2:
        return rows[index]
    return rows[torch.arange(rows.shape[0], device=rows.device).view(-1, *[1] * (index.dim() - 1)), index]


def group(features: Tensor, index: Tensor, fill: float) -> Tensor:
    """Gather rows, ``fill`` where the index is -1; differentiable."""
    filled = features.new_full((), fill)
    if features.shape[-2] == 0:
        return filled.expand(*index.shape, features.shape[-1]).contiguous()
    return torch.where((index >= 0).unsqueeze(-1), take(features, index), filled)


def group_relative(points: Tensor, centers: Tensor, index: Tensor, features: Tensor | None, radius: float) -> Tensor:
    """Gather positions relative to centres, divided by the radius unless it is 0, and features after them; 0 where the index is -1."""
    if points.shape[-2] == 0:
        return points.new_zeros(*index.shape, 3 + (0 if features is None else features.shape[-1]))
    local = take(points, index) - centers.unsqueeze(-2)
    local = local / radius if radius > 0 else local
    rows = local if features is None else torch.cat([local, take(features, index)], dim=-1)
    return torch.where((index >= 0).unsqueeze(-1), rows, 0.0)


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
