"""Position codes."""

from __future__ import annotations

from torch import Tensor, nn


class PositionMLP(nn.Sequential):
    """Learned code of an absolute position: ``Linear(3, hidden), GELU, Linear(hidden, dim)`` (Point-BERT, Point-MAE).

    Args:
        dim: Channels of the code.
        hidden: Width of the hidden layer.
    """

    def __init__(self, dim: int, hidden: int = 128) -> None:
        super().__init__(nn.Linear(3, hidden), nn.GELU(), nn.Linear(hidden, dim))

    def forward(self, coord: Tensor) -> Tensor:
        """``[T, 3] -> [T, dim]``."""
        return super().forward(coord)
