"""The clouds all suites measure on: points on random closed surfaces, the same ones on every machine."""

from __future__ import annotations

import torch
from torch import Tensor


def surfaces(batch: int, points: int, seed: int = 0) -> Tensor:
    """Draw ``[batch, points, 3]`` float32 on bumpy spheres within the unit ball, in random order."""
    generator = torch.Generator().manual_seed(seed)
    direction = torch.nn.functional.normalize(torch.randn(batch, points, 3, generator=generator), dim=2)
    wave = 4 * torch.randn(batch, 3, 3, generator=generator)
    stretch = 0.4 + 0.6 * torch.rand(batch, 1, 3, generator=generator)
    return direction * stretch * (0.8 + 0.2 * torch.sin(direction @ wave).mean(2, keepdim=True))
