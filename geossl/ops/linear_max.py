"""Gradient of a linear layer that is followed by a maximum over segments, the end of every PointNet.

``segment_reduce(x @ weight.T, row_splits, "max")`` sends each segment and channel's gradient to one row. The two products of the usual
gradient are then mostly zeros: with 32 rows a segment, 31 of 32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from geossl.ops import _checks, _dispatch
from geossl.ops._native import INT, INT64, PTR
from geossl.ops.reference import linear_max as reference

# dtype, grad, arg, splits, segments, channels, x, rows, width, weight, grad_x, grad_weight
_backward_c = _dispatch.functions("linear_max_backward", INT, PTR, PTR, PTR, INT64, INT64, PTR, INT64, INT64, PTR, PTR, PTR)


def _check_values(arg: Tensor, row_splits: Tensor, rows: int) -> None:
    first, last = int(row_splits[0]), int(row_splits[-1])
    if first != 0 or last != rows or bool((row_splits.diff() < 0).any()):
        raise ValueError(
            f"linear_max_backward: row_splits must start at 0, never decrease and end at the number of rows ({rows}); they start at "
            f"{first} and end at {last}"
        )
    if bool(((arg != -1) & ((arg < row_splits[:-1, None]) | (arg >= row_splits[1:, None]))).any()):
        raise ValueError("linear_max_backward: arg must name a row of its own segment, or be -1 for none")


def _native(kind: Any, grad: Tensor, arg: Tensor, row_splits: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    grad, arg, row_splits, x, weight = (t.contiguous() for t in (grad, arg, row_splits, x, weight))
    grad_x, grad_weight = _fake(grad, arg, row_splits, x, weight)
    if kind == "cuda" and _checks.read_values(x):
        _check_values(arg, row_splits, x.shape[0])
    try:
        _backward_c[kind](
            *_dispatch.place(kind, x), x.dtype == torch.float64, grad.data_ptr(), arg.data_ptr(), row_splits.data_ptr(), *grad.shape,
            x.data_ptr(), *x.shape, weight.data_ptr(), grad_x.data_ptr(), grad_weight.data_ptr(),
        )  # fmt: skip
    except ValueError:  # the CPU kernel looks at all values before it starts
        _check_values(arg, row_splits, x.shape[0])
        raise
    return grad_x, grad_weight


def _twin(grad: Tensor, arg: Tensor, row_splits: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    if _checks.read_values(x):
        _check_values(arg, row_splits, x.shape[0])
    return reference.linear_max_backward(grad, arg, row_splits, x, weight)


def _fake(grad: Tensor, arg: Tensor, row_splits: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


_backward = _dispatch.define(
    "linear_max_backward(Tensor grad, Tensor arg, Tensor row_splits, Tensor x, Tensor weight) -> (Tensor, Tensor)",
    native=_native,
    twin=_twin,
    fake=_fake,
)


def linear_max_backward(grad: Tensor, arg: Tensor, row_splits: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of ``x`` and ``weight`` for that of the maximum of ``x @ weight.T`` over each segment. Not differentiable itself.

    Sums run in the order of channels and of segments: deterministic, and the same for any number of threads and on CUDA.

    Args:
        grad: Gradient of the maxima, ``[S, C]`` float32 or float64.
        arg: Row of each maximum, ``[S, C]`` int64, -1 where it came from none.
        row_splits: Segment s is the rows ``row_splits[s]:row_splits[s + 1]``, ``[S + 1]`` int64.
        x: Input of the layer, ``[M, D]`` of the type of ``grad``.
        weight: ``[C, D]`` of that type.

    Returns:
        ``[M, D]`` and ``[C, D]``.

    Raises:
        ValueError: shapes do not fit or a row lies outside of its segment (on CUDA only looked at with ``GEOSSL_CHECKS=1``).
        TypeError: types differ.
    """
    (segments, channels), width = grad.shape, x.shape[1]
    if arg.shape != grad.shape or row_splits.shape != (segments + 1,) or weight.shape != (channels, width):
        raise ValueError(
            f"linear_max_backward: expected grad and arg [S, C], row_splits [S + 1], x [M, D] and weight [C, D]; got "
            f"{', '.join(_checks.describe(t) for t in (grad, arg, row_splits, x, weight))}"
        )
    if not grad.dtype == x.dtype == weight.dtype or x.dtype not in (torch.float32, torch.float64):
        raise TypeError(
            f"linear_max_backward: grad, x and weight must all be float32 or all float64, got {grad.dtype}, {x.dtype} and {weight.dtype}"
        )
    return _backward(grad, arg, row_splits, x, weight)
