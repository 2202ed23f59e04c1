"""Centrality non-maximum suppression in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from geossl.ops.reference.clouds import CHUNK, spans, squared_distance


def _lists(cloud: Tensor, radius: float, limit: int, cap: int) -> Tensor:
    """Return which points are in the neighbour list of each point, ``[n, n]``: the first ``cap`` rows inside the radius."""
    n = cloud.shape[0]
    parts = [torch.zeros(0, n, dtype=torch.bool, device=cloud.device)]
    for rows in cloud.split(max(1, CHUNK // max(n, 1))):
        if cloud.is_floating_point():
            inside = squared_distance(rows[:, None], cloud) < torch.tensor(radius, dtype=cloud.dtype, device=cloud.device).square()
        else:
            d = (rows[:, None] - cloud).abs().clamp(max=2**30)  # the radius is at most that: further away is outside anyway
            inside = (d * d).sum(-1) < limit
        parts.append(inside & (inside.cumsum(1) <= cap))
    return torch.cat(parts)


def centrality_nms(
    points: Tensor, lengths: Tensor | None, offsets: Tensor | None, radius: float, limit: int, cap: int
) -> tuple[Tensor, Tensor]:
    """Return which points are kept, and the lengths of their neighbour lists, see :func:`geossl.ops.centrality_nms`."""
    rows = points.reshape(-1, 3)
    keep = torch.zeros(rows.shape[0], dtype=torch.bool, device=rows.device)
    count = torch.zeros(rows.shape[0], dtype=torch.int64, device=rows.device)
    for begin, end in spans(points, lengths, offsets):
        cloud, kept = rows[begin:end], keep[begin:end]
        valid = cloud.isfinite().all(1)
        near = _lists(cloud, radius, limit, cap) & valid[:, None]
        count[begin:end] = near.sum(1)
        kept[:] = valid
        for i in torch.sort(count[begin:end], descending=True, stable=True).indices.tolist():
            if kept[i]:
                kept &= ~near[i]
                kept[i] = True
    return keep.view(points.shape[:-1]), count.view(points.shape[:-1])
