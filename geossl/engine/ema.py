"""Exponential moving average of a module's weights."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn


class EMA:
    """Keeps a moving average of the parameters of ``module``; its buffers are copied as they are.

    Args:
        module: The module being trained.
        decay: Share of the old average kept at each step, 0 < decay < 1. Early on less is kept, ``(1 + step) / (10 + step)``,
            so that a short training does not end with its initial weights.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self._parameters = list(module.parameters())
        self._buffers = list(module.buffers())
        self._average = [value.detach().clone() for value in self._parameters]
        self._copies = [value.detach().clone() for value in self._buffers]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move the average towards the weights after optimiser step ``step`` (counted from 1)."""
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(self._average, [value.detach() for value in self._parameters], 1 - decay)
        for copy, value in zip(self._copies, self._buffers, strict=True):
            copy.copy_(value)

    @torch.no_grad()
    def reset(self) -> None:
        """Make the present weights the average."""
        for average, value in zip(self._pairs()[0], self._pairs()[1], strict=True):
            average.copy_(value)

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """The module holds the averaged weights inside the block, and its own again after it."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _pairs(self) -> tuple[list[Tensor], list[Tensor]]:
        return [*self._average, *self._copies], [*(value.detach() for value in self._parameters), *self._buffers]

    @torch.no_grad()
    def _swap(self) -> None:
        for average, value in zip(*self._pairs(), strict=True):
            kept = value.clone()
            value.copy_(average)
            average.copy_(kept)
