"""Mean squared error of a linear layer against gathered rows, without ever holding its whole output.

The 2D head of I2P-MAE predicts twelve thousand numbers for every visible token. Written plainly, prediction, target, difference and
gradient are four tensors of that size; here they exist for a few rows and one slot of the target at a time, and the gradients are made on
the way, so that nothing is computed twice.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

_ROWS = 1024  # tokens at a time
_UNIT = 2.0**-5  # errors times this, summed over so many tokens, stay within half precision


def gathered_regression_loss(head: nn.Linear, tokens: Tensor, table: Tensor, index: Tensor) -> Tensor:
    """``mse_loss(head(tokens), table[index].flatten(1))``.

    Inside autocast the matrix products take its type; differences and sums are float32 (float64 for float64 tokens).

    Args:
        head: From ``D`` to ``K * W`` channels, with bias.
        tokens: ``[L, D]``.
        table: What may be predicted, ``[R, W]``, of the type of the head's weights.
        index: Rows of ``table`` that token ``i`` is to predict, one a slot, ``[L, K]`` int64.

    Returns:
        Scalar; 0 without tokens. Differentiable once, in the tokens and the head's weights.

    Raises:
        ValueError: the head does not predict as many channels as the slots have.
    """
    slots, width = index.shape[1], table.shape[1]
    if head.out_features != slots * width:
        raise ValueError(
            f"gathered_regression_loss: the head predicts {head.out_features} channels, but {slots} slots of {width} make {slots * width}"
        )
    kind = tokens.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else head.weight.dtype
    with torch.autocast(kind, enabled=False):
        return _GatheredRegression.apply(tokens, head.weight, head.bias, table, index, dtype, torch.is_grad_enabled())


class _GatheredRegression(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, tokens: Tensor, weight: Tensor, bias: Tensor, table: Tensor, index: Tensor, dtype: torch.dtype, wants_grad: bool
    ) -> Tensor:
        slots, width = index.shape[1], table.shape[1]
        total = table.new_zeros(())
        grads = [torch.zeros_like(x) for x in (weight, bias)] if wants_grad else []
        grad_tokens = table.new_zeros(tokens.shape) if wants_grad else None
        scale = 2 / max(len(tokens) * slots * width, 1)
        for slot in range(slots):
            own = slice(slot * width, (slot + 1) * width)
            layer, shift = weight[own].to(dtype), bias[own].to(dtype)
            for begin in range(0, len(tokens), _ROWS):
                rows = slice(begin, begin + _ROWS)
                x = tokens[rows].to(dtype)
                error = torch.addmm(shift, x, layer.T).to(table.dtype).sub_(table[index[rows, slot]])
                total += error.square().sum()
                if grad_tokens is None:
                    continue
                error *= _UNIT
                grads[1][own] += error.sum(0)
                error = error.to(dtype)
                grads[0][own] += error.T @ x
                grad_tokens[rows] += error @ layer
        if grad_tokens is not None:
            ctx.save_for_backward(grad_tokens, *grads)
            ctx.scale, ctx.dtypes = scale / _UNIT, (tokens.dtype, weight.dtype, bias.dtype)
        return total * (scale / 2)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        # Divided by their number only here: before the products, that would make zeros of them in half precision.
        made = zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        return (*((x * (grad.to(x.dtype) * ctx.scale)).to(dtype) for x, dtype in made), None, None, None, None)
