"""Rotary position encoding in two dimensions in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor


def rope_2d(x: Tensor, table: Tensor, inverse: bool = False) -> Tensor:
    """Rotate ``x [T, H, D]`` by ``table [N, 2, D // 2]``, back if ``inverse``; the kernels' operations, so the bits are theirs."""
    (rows, heads, dim), positions = x.shape, table.shape[0]
    images = rows // positions if positions else 0
    u, v = x.to(table.dtype).reshape(images, positions, heads, 2, 2, dim // 4).unbind(4)  # the halves of a head stay beside each other
    cosine, sine = table.reshape(positions, 2, 1, 2, dim // 4).unbind(1)
    if inverse:
        sine = -sine
    return torch.stack([u * cosine - v * sine, v * cosine + u * sine], dim=4).reshape(x.shape).to(x.dtype)
