"""Stand-in."""

from __future__ import annotations

import torch
from torch import Tensor


def rope_2d_table(positions: Tensor, dim: int, base: float = 100.0, scale: float = 1.0, dtype: torch.dtype = torch.float32) -> Tensor:
    q = dim // 4
    theta = scale / base ** (torch.arange(q, device=positions.device, dtype=torch.float64) / q)
    angle = (positions[:, :, None].double() * theta).flatten(1)
    return torch.stack([angle.cos(), angle.sin()], 1).to(dtype)


def rope_2d(x: Tensor, table: Tensor) -> Tensor:
    t, h, d = x.shape
    q = d // 4
    parts = x.to(table.dtype).reshape(-1, table.shape[0], h, 2, 2, q)
    u, v = parts.unbind(4)
    cos, sin = table.view(-1, 2, 1, 2, q).unbind(1)
    return torch.stack([u * cos - v * sin, v * cos + u * sin], 4).reshape(t, h, d).to(x.dtype)
