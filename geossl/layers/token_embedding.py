"""Token embedding of point groups: the mini-PointNet of Point-BERT and Point-MAE, computed without the work nobody reads.

The definition is :meth:`PointTokenEmbedding.reference`, plain torch. Training runs the same numbers and gradients through
:mod:`geossl.layers.fast_token_embedding` at about a third of the cost.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from geossl.layers.fast_token_embedding import Groups, embed_evaluation, embed_training
from geossl.layers.norm import BatchNorm


class PointTokenEmbedding(nn.Module):
    """One token per group of neighbouring points: a small PointNet with a maximum over the group (Point-MAE section 3.1).

    Args:
        dim: Channels of a token.
        in_channels: Columns of a point: 3 relative coordinates and any further features.
        widths: Hidden channels after the first, second and third layer.
    """

    def __init__(self, dim: int, in_channels: int = 3, *, widths: tuple[int, int, int] = (128, 256, 512)) -> None:
        super().__init__()
        first, second, third = widths
        self.conv1 = nn.Linear(in_channels, first)
        self.norm1 = BatchNorm(first)
        self.conv2 = nn.Linear(first, second)
        self.conv3 = nn.Linear(2 * second, third)
        self.norm2 = BatchNorm(third)
        self.conv4 = nn.Linear(third, dim)

    def forward(self, groups: Tensor, keep: Tensor | None = None) -> Tensor:
        """Embed groups.

        Args:
            groups: Points of each group, ``[G, K, in_channels]``, positions relative to the group's centre.
            keep: Numbers of the groups whose token is wanted, ``[T]`` int64, none twice; None means all. The others only enter the batch
                statistics in training, and cost nothing in evaluation.

        Returns:
            ``[T, dim]``. Differentiable in ``groups`` and all parameters.
        """
        count, size, _ = groups.shape
        if count == 0:
            return groups.new_zeros(0, self.conv4.out_features)
        device = groups.device
        dtype = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else groups.dtype
        if self.training:
            return embed_training(self, groups.flatten(0, 1), Groups.of_size(count, size, device), keep, dtype)
        groups = groups if keep is None else groups[keep]
        return embed_evaluation(self, groups.flatten(0, 1), Groups.of_size(groups.shape[0], size, device), dtype)

    def reference(self, groups: Tensor) -> Tensor:
        """The definition, in plain torch, for all groups: ``[G, K, in_channels] -> [G, dim]``. The twin of :meth:`forward`."""
        count, size, _ = groups.shape
        x = self.conv2(F.relu(self.norm1(self.conv1(groups.flatten(0, 1))))).view(count, size, -1)
        x = torch.cat([x.max(1, keepdim=True).values.expand_as(x), x], dim=2)
        x = self.conv4(F.relu(self.norm2(self.conv3(x.flatten(0, 1))))).view(count, size, -1)
        return x.max(1).values  # unlike amax, the gradient goes to the first of equal maxima, as published
