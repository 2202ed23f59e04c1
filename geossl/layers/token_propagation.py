"""Carrying token features from coarse positions to fine ones: the step up in the decoder of Point-M2AE and I2P-MAE."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from geossl.layers.attention import Segments
from geossl.layers.norm import BatchNorm
from geossl.ops import three_nn_interpolate


class ResidualUnit(nn.Module):
    """``GELU(norm(linear(GELU(norm(linear(x))))) + x)``, batch norms."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv1 = nn.Linear(dim, dim)
        self.norm1 = BatchNorm(dim)
        self.conv2 = nn.Linear(dim, dim)
        self.norm2 = BatchNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        """``[T, C] -> [T, C]``."""
        return F.gelu(self.norm2(self.conv2(F.gelu(self.norm1(self.conv1(x))))) + x)


class TokenPropagation(nn.Module):
    """Fine tokens from coarse ones, by interpolation, and from what is known at the fine positions already (PointNet++, Point-MLP).

    At every fine position the features of the 3 nearest coarse tokens, weighted by ``1 / (squared distance + 1e-8)``, are laid beside
    those known there (zeros where none are), then a linear layer with batch norm and GELU, and residual units.

    Args:
        dim: Channels of a fine token.
        coarse_dim: Channels of a coarse token.
        units: Residual units.
    """

    def __init__(self, dim: int, coarse_dim: int, units: int = 1) -> None:
        super().__init__()
        self.fuse = nn.Linear(dim + coarse_dim, dim)
        self.fuse_norm = BatchNorm(dim)
        self.units = nn.Sequential(*(ResidualUnit(dim) for _ in range(units)))

    def forward(
        self,
        centers: Tensor,
        segments: Segments,
        known: Tensor,
        rows: Tensor,
        coarse: Tensor,
        coarse_centers: Tensor,
        coarse_segments: Segments,
    ) -> Tensor:
        """Make the fine tokens.

        Args:
            centers: Fine positions, ``[T, 3]``.
            segments: How many each sample has.
            known: Features known at some of them, ``[V, dim]``.
            rows: At which, ``[V]`` int64, none twice.
            coarse: Coarse tokens, ``[S, coarse_dim]``; at least one in each sample.
            coarse_centers: Their positions, ``[S, 3]``.
            coarse_segments: How many each sample has.

        Returns:
            ``[T, dim]``; differentiable in ``known``, ``coarse`` and all parameters.
        """
        dim, device = self.fuse.out_features, centers.device
        known_weight, coarse_weight = self.fuse.weight.split([dim, self.fuse.in_features - dim], dim=1)
        # Interpolation commutes with a linear layer, so each half of the layer runs where its input is not zero and not repeated.
        fused = three_nn_interpolate(
            centers,
            coarse_centers,
            F.linear(coarse, coarse_weight),
            query_offsets=segments.offsets(device),
            offsets=coarse_segments.offsets(device),
        )
        fused = fused.index_add(0, rows, F.linear(known, known_weight).to(fused.dtype)) + self.fuse.bias
        return self.units(F.gelu(self.fuse_norm(fused)))

    def reference(self, centers: Tensor, known: Tensor, coarse: Tensor, coarse_centers: Tensor) -> Tensor:
        """The definition for one sample, in plain torch: ``[T, 3], [T, dim], [S, coarse_dim], [S, 3] -> [T, dim]``."""
        near = (centers[:, None] - coarse_centers).square().sum(-1).topk(min(3, len(coarse)), largest=False)
        weight = 1 / (near.values + 1e-8)
        carried = (coarse[near.indices] * (weight / weight.sum(1, keepdim=True))[..., None]).sum(1)
        return self.units(F.gelu(self.fuse_norm(self.fuse(torch.cat([known, carried], 1)))))
