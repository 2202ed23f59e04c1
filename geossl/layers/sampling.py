"""Random draws that do not depend on how a batch was split over processes or accumulated micro-batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from geossl.geometry import Batch


@dataclass(frozen=True)
class BatchRandom:
    """Draws uniform numbers for the *global* batch and hands each sample its own rows.

    With the same generator state, two processes (or two micro-batches) that hold halves of a batch see exactly the numbers one
    process with the whole batch sees.

    Args:
        size: Samples in this batch, B.
        generator: CPU generator to draw from; None draws from torch's global one.
        slot: Place of each sample in the global batch, ``[B]`` int64; None means ``arange(B)``.
        global_size: Samples in the global batch; None means B.
    """

    size: int
    generator: torch.Generator | None = None
    slot: Tensor | None = None
    global_size: int | None = None

    @classmethod
    def of(cls, batch: Batch, generator: torch.Generator | None = None) -> BatchRandom:
        """The draws belonging to ``batch``."""
        return cls(len(batch), generator, batch.slot, batch.global_size)

    def rand(self, *shape: int, device: torch.device | str = "cpu") -> Tensor:
        """Uniform numbers in [0, 1), ``[B, *shape]`` float32 on ``device`` (drawn on the CPU: equal on every device)."""
        noise = torch.rand(self.global_size or self.size, *shape, generator=self.generator)
        if self.slot is not None:
            noise = noise[self.slot]
        return noise.to(device)

    def rows(self, lengths: Sequence[int], *shape: int) -> Tensor:
        """Uniform numbers for each row of packed samples, ``[sum(lengths), *shape]`` float32 on the CPU.

        Those of a sample depend on its place in the global batch alone, not on how many rows the other samples have: every sample gets
        a seed of its own.
        """
        seeds = (self.rand(2).double() @ torch.tensor([2.0**48, 2.0**24], dtype=torch.float64)).long()  # 24 random bits each
        parts = [torch.rand(n, *shape, generator=torch.Generator().manual_seed(s)) for n, s in zip(lengths, seeds.tolist(), strict=True)]
        return torch.cat(parts) if parts else torch.rand(0, *shape)

    def shared(self, *shape: int) -> Tensor:
        """Uniform numbers that are the same for the whole global batch, ``shape`` float32 on the CPU."""
        return torch.rand(shape, generator=self.generator)
