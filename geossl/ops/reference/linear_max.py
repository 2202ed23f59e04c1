"""Gradient of a linear layer before a maximum over segments in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor


def linear_max_backward(grad: Tensor, arg: Tensor, row_splits: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of ``x`` and ``weight``: scatter the entries into the layer's output, then the usual two products."""
    rows = x.shape[0]
    target = torch.where(arg >= 0, arg, rows)  # entries of no row go to an extra one that is cut off
    out = grad.new_zeros(rows + 1, grad.shape[1]).scatter(0, target, grad)[:rows]
    return out @ weight, out.T @ x
