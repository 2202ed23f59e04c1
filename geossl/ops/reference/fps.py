"""Farthest point sampling in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from geossl.ops.reference.clouds import spans, squared_distance


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
