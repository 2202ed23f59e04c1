"""Weighted sums of the features of neighbours in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from geossl.ops.reference.grouping import group_backward, take


def _neighbors(features: Tensor, index: Tensor) -> Tensor:
    """Features of every neighbour ``[*index.shape, C]``, 0 where the index is -1."""
    if features.shape[-2] == 0:
        return features.new_zeros(*index.shape, features.shape[-1])
    return torch.where((index >= 0).unsqueeze(-1), take(features, index), 0.0)


def interpolate(features: Tensor, index: Tensor, weight: Tensor) -> Tensor:
    """Sum the neighbours' features, each times its weight, from the first to the last; differentiable."""
    found = _neighbors(features, index)
    weight = torch.where(index >= 0, weight, 0.0)
    out = features.new_zeros(*index.shape[:-1], features.shape[-1])
    for j in range(index.shape[-1]):
        out = out + weight[..., j, None] * found[..., j, :]
    return out


def interpolate_backward(grad: Tensor, features: Tensor, index: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of :func:`interpolate` with respect to features and weight; differentiable once more."""
    grad_weight = (grad.unsqueeze(-2) * _neighbors(features, index)).sum(-1)
    spread = grad.unsqueeze(-2) * torch.where(index >= 0, weight, 0.0).unsqueeze(-1)
    batch = features.shape[0] if features.dim() == 3 else 0
    return group_backward(spread, index, batch, features.shape[-2]), grad_weight
