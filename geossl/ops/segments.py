"""Reductions of rows that share a segment: sums, means, extremes, softmax and logsumexp, by index or by row splits."""

from __future__ import annotations

import operator
from typing import Any, Literal

import torch
from torch import Tensor

from geossl.errors import unknown_name
from geossl.ops import _checks, _dispatch
from geossl.ops._native import DOUBLE, INT, INT64, PTR
from geossl.ops.grouping import group
from geossl.ops.reference import segments as reference

Reduce = Literal["sum", "mean", "max", "min", "softmax", "logsumexp"]

_REDUCTIONS = ("sum", "mean", "max", "min", "softmax", "logsumexp")

# dtype, x, rows, channels, index, splits, order, size
_ROWS = (INT, PTR, INT64, INT64, PTR, PTR, PTR, INT64)
# rows, out, count
_sum_c = _dispatch.functions("segment_sum", *_ROWS, PTR, PTR)
# rows, largest, fill, out, arg
_extreme_c = _dispatch.functions("segment_extreme", *_ROWS, INT, DOUBLE, PTR, PTR)
# rows, out
_softmax_c = _dispatch.functions("segment_softmax", *_ROWS, PTR)
_logsumexp_c = _dispatch.functions("segment_logsumexp", *_ROWS, PTR)


# Which segment each row belongs to, in one of three forms: `index`; `row_splits` of rows that stand in the order of segments; or, as in a
# VoxelMap, `index` together with `order`, the rows sorted by segment, and `row_splits` of that, which spares a GPU the sorting.


def _check_values(x: Tensor, index: Tensor | None, row_splits: Tensor | None, size: int) -> None:
    """Check that indices lie in range, or that splits ascend from 0 to the number of rows."""
    if index is not None:
        low, high = (int(value) for value in torch.aminmax(index)) if index.numel() else (-1, -1)
        if low < -1 or high >= size:
            op = "scatter_reduce" if row_splits is None else "voxel_reduce"
            raise ValueError(
                f"{op}: index must lie between -1 (row left out) and {size - 1}, as dim_size is {size}; got {low if low < -1 else high}"
            )
    elif row_splits is not None:
        first, last, rows = int(row_splits[0]), int(row_splits[-1]), x.shape[0]
        if first != 0 or last != rows or bool((row_splits.diff() < 0).any()):
            raise ValueError(
                f"segment_reduce: row_splits must start at 0, never decrease, and end at the number of rows ({rows}); they start "
                f"at {first} and end at {last}. Make them with offsets_from_lengths or offsets_from_batch of geossl.ops"
            )


def _run(
    c: Any, kind: Any, x: Tensor, index: Tensor | None, row_splits: Tensor | None, order: Tensor | None, size: int, *rest: Any
) -> None:
    """Call a C function with contiguous rows of float32 or float64; ``rest`` are its arguments after the rows."""
    pointer = _dispatch.pointer
    if kind == "cuda":
        if _checks.read_values(x):
            _check_values(x, index, row_splits, size)
        if index is not None and order is None:
            order, row_splits = _dispatch.inverse(index, 1, size)
    arguments = x.data_ptr(), *x.shape, pointer(index), pointer(row_splits), pointer(order), size, *rest
    try:
        c[kind](*_dispatch.place(kind, x), x.dtype == torch.float64, *arguments)
    except ValueError:  # the CPU kernel reads all indices before it starts
        _check_values(x, index, row_splits, size)
        raise


def _prepare(x: Tensor, *indices: Tensor | None) -> tuple[Any, ...]:
    wide = x if x.dtype == torch.float64 else x.float()
    return wide.contiguous(), *(None if i is None else i.contiguous() for i in indices)


def _sum_native(
    kind: Any, x: Tensor, index: Tensor | None, row_splits: Tensor | None, order: Tensor | None, size: int, mean: bool
) -> tuple[Tensor, Tensor]:
    wide, index, row_splits, order = _prepare(x, index, row_splits, order)
    out, count = _sum_fake(wide, index, row_splits, order, size, mean)
    _run(_sum_c, kind, wide, index, row_splits, order, size, out.data_ptr(), count.data_ptr() if mean else 0)
    return out.to(x.dtype), count


def _sum_fake(
    x: Tensor, index: Tensor | None, row_splits: Tensor | None, order: Tensor | None, size: int, mean: bool
) -> tuple[Tensor, Tensor]:
    return x.new_empty(size, x.shape[1]), x.new_empty(size if mean else 0, dtype=torch.int64)


def _extreme_native(
    kind: Any,
    x: Tensor,
    index: Tensor | None,
    row_splits: Tensor | None,
    order: Tensor | None,
    size: int,
    largest: bool,
    fill: float,
    with_arg: bool,
) -> tuple[Tensor, Tensor]:
    wide, index, row_splits, order = _prepare(x, index, row_splits, order)
    out, arg = _extreme_fake(wide, index, row_splits, order, size, largest, fill, with_arg)
    where = arg.data_ptr() if with_arg else 0
    _run(_extreme_c, kind, wide, index, row_splits, order, size, largest, fill, out.data_ptr(), where)
    return out.to(x.dtype), arg


def _extreme_fake(
    x: Tensor, index: Tensor | None, row_splits: Tensor | None, order: Tensor | None, size: int, largest: bool, fill: float, with_arg: bool
) -> tuple[Tensor, Tensor]:
    arg = x.new_empty(size, x.shape[1], dtype=torch.int64) if with_arg else x.new_empty(0, dtype=torch.int64)
    return x.new_empty(size, x.shape[1]), arg


def _softmax_native(kind: Any, x: Tensor, index: Tensor | None, row_splits: Tensor | None, order: Tensor | None, size: int) -> Tensor:
    wide, index, row_splits, order = _prepare(x, index, row_splits, order)
    out = torch.zeros_like(wide) if kind == "cuda" and index is not None else torch.empty_like(wide)  # rows without a segment are 0
    _run(_softmax_c, kind, wide, index, row_splits, order, size, out.data_ptr())
    return out.to(x.dtype)


def _logsumexp_native(kind: Any, x: Tensor, index: Tensor | None, row_splits: Tensor | None, order: Tensor | None, size: int) -> Tensor:
    wide, index, row_splits, order = _prepare(x, index, row_splits, order)
    out = wide.new_empty(size, wide.shape[1])
    _run(_logsumexp_c, kind, wide, index, row_splits, order, size, out.data_ptr())
    return out.to(x.dtype)


def _checked(twin: Any) -> Any:
    def run(x: Tensor, index: Tensor | None, row_splits: Tensor | None, order: Tensor | None, size: int, *rest: Any) -> Any:
        if _checks.read_values(x):
            _check_values(x, index, row_splits, size)
        return twin(x, index, row_splits, size, *rest)  # `order` says nothing that `index` does not

    return run


_INPUTS = "Tensor x, Tensor? index, Tensor? row_splits, Tensor? order, SymInt size"
_segment_sum = _dispatch.define(
    f"segment_sum({_INPUTS}, bool mean) -> (Tensor, Tensor)",
    native=_sum_native,
    twin=_checked(reference.segment_sum),
    fake=_sum_fake,
    autocast=None,
)
_segment_extreme = _dispatch.define(
    f"segment_extreme({_INPUTS}, bool largest, float fill, bool with_arg) -> (Tensor, Tensor)",
    native=_extreme_native,
    twin=_checked(reference.segment_extreme),
    fake=_extreme_fake,
    autocast=None,
)
_segment_softmax = _dispatch.define(
    f"segment_softmax({_INPUTS}) -> Tensor",
    native=_softmax_native,
    twin=_checked(reference.segment_softmax),
    fake=lambda x, index, row_splits, order, size: torch.empty_like(x, memory_format=torch.contiguous_format),
    autocast=None,
)
_segment_logsumexp = _dispatch.define(
    f"segment_logsumexp({_INPUTS}) -> Tensor",
    native=_logsumexp_native,
    twin=_checked(reference.segment_logsumexp),
    fake=lambda x, index, row_splits, order, size: x.new_empty(size, x.shape[1]),
    autocast=None,
)


# Gradients: written with differentiable operators, so that there are second derivatives -----------------------------------------------


def _spread(values: Tensor, index: Tensor | None, row_splits: Tensor | None, rows: int) -> Tensor:
    """Give every row the values of its segment, zeros to rows without one."""
    return group(values, reference.row_segments(index, row_splits, rows))


def _save_sum(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, index, row_splits, _, _, mean = inputs
    ctx.save_for_backward(index, row_splits, output[1] if mean else None)
    ctx.rows = x.shape[0]


def _sum_backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    index, row_splits, count = ctx.saved_tensors
    if count is not None:
        grad = grad / count.clamp(min=1)[:, None]
    return _spread(grad, index, row_splits, ctx.rows), *[None] * 5


def _save_extreme(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(output[1])
    ctx.rows, ctx.with_arg = inputs[0].shape[0], inputs[7]


def _extreme_backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    if not ctx.with_arg:
        raise RuntimeError("segment_extreme: gradients need with_arg=True; the public functions see to it")
    # Each entry goes to a row of its own segment, so that no two meet; those of empty segments go to an extra row that is cut off.
    (arg,) = ctx.saved_tensors
    target = torch.where(arg >= 0, arg, ctx.rows)
    return grad.new_zeros(ctx.rows + 1, grad.shape[1]).scatter(0, target, grad)[: ctx.rows], *[None] * 7


def _save_softmax(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, index, row_splits, order, ctx.size = inputs
    ctx.save_for_backward(output, index, row_splits, order)


def _softmax_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    out, index, row_splits, order = ctx.saved_tensors
    dtype = out.dtype
    out, grad = (t if dtype == torch.float64 else t.float() for t in (out, grad))
    weighted = _segment_sum(out * grad, index, row_splits, order, ctx.size, False)[0]
    return (out * (grad - _spread(weighted, index, row_splits, out.shape[0]))).to(dtype), *[None] * 4


def _save_logsumexp(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, index, row_splits, order, ctx.size = inputs
    ctx.save_for_backward(x, index, row_splits, order)


def _logsumexp_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, index, row_splits, order = ctx.saved_tensors
    wide, grad = (t if x.dtype == torch.float64 else t.float() for t in (x, grad))
    share = _segment_softmax(wide, index, row_splits, order, ctx.size)
    return (share * _spread(grad, index, row_splits, x.shape[0])).to(x.dtype), *[None] * 4


for _name, _backward, _save in (
    ("segment_sum", _sum_backward, _save_sum),
    ("segment_extreme", _extreme_backward, _save_extreme),
    ("segment_softmax", _softmax_backward, _save_softmax),
    ("segment_logsumexp", _logsumexp_backward, _save_logsumexp),
):
    torch.library.register_autograd(f"geossl::{_name}", _backward, setup_context=_save, lib=_dispatch.LIBRARY)


# Public functions ---------------------------------------------------------------------------------------------------------------------


def _check_rows(op: str, x: Tensor, reduce: str, fill: float) -> None:
    if not isinstance(x, Tensor) or not x.is_floating_point() or x.dim() < 1:
        raise TypeError(f"{op}: x must be a floating tensor [M] or [M, ...], got {_checks.describe(x)}; convert it with x.float()")
    if reduce not in _REDUCTIONS:
        raise unknown_name(f"{op} reduction", str(reduce), _REDUCTIONS)
    if isinstance(fill, bool) or not isinstance(fill, (int, float)):
        raise TypeError(f"{op}: fill must be a number, got {_checks.describe(fill)}")


def reduce_rows(
    x: Tensor, index: Tensor | None, row_splits: Tensor | None, order: Tensor | None, size: int, reduce: str, fill: float = 0.0,
    return_arg: bool = False,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Reduce rows whose segments are given in any of the three forms; the arguments have been checked."""
    channels = x.shape[1:]
    flat = x.reshape(x.shape[0], channels.numel())  # -1 cannot be told where there are no rows
    arg = None
    if reduce in ("sum", "mean"):
        out = _segment_sum(flat, index, row_splits, order, size, reduce == "mean")[0]
    elif reduce in ("max", "min"):
        with_arg = return_arg or (x.requires_grad and torch.is_grad_enabled())
        out, arg = _segment_extreme(flat, index, row_splits, order, size, reduce == "max", float(fill), with_arg)
    elif reduce == "softmax":
        return _segment_softmax(flat, index, row_splits, order, size).view(x.shape), None
    else:
        out = _segment_logsumexp(flat, index, row_splits, order, size)
    shape = (size, *channels)
    return out.view(shape), arg.view(shape) if return_arg and arg is not None else None


def segment_reduce(x: Tensor, row_splits: Tensor, reduce: Reduce, *, fill: float = 0.0) -> Tensor:
    """Reduce consecutive rows: segment s is the rows ``row_splits[s]:row_splits[s + 1]`` of ``x``.

    Every reduction takes the rows of a segment in order, so the result is deterministic, and the same for any number of threads. It is
    done in float32 (float64 for float64) whatever the type of ``x``. NaN in a segment makes its result NaN; infinities behave as in
    torch: ``logsumexp`` of a segment with +inf is +inf, of -inf alone -inf, while ``softmax`` of both is NaN.

    Args:
        x: ``[M]`` or ``[M, ...]``: float32, float64, float16 or bfloat16, any strides. Trailing dimensions are reduced apart.
        row_splits: ``[S + 1]`` int64 or int32: 0, end of segment 0, ..., M (the ``offsets`` of packed clouds). Segments may be empty.
        reduce: "sum", "mean", "max", "min", "logsumexp", or "softmax", which normalises within each segment.
        fill: Value of empty segments for "max" and "min". They give 0 for "sum" and "mean", -inf for "logsumexp".

    Returns:
        ``[S, ...]`` of the type of ``x``; for "softmax" ``[M, ...]``, like ``x``. Differentiable twice in ``x``; of equal extremes the
        lowest row gets the gradient.

    Raises:
        ValueError: a shape, device or value is wrong; TypeError: a type is. Values on CUDA are only checked with ``GEOSSL_CHECKS=1``.

    Example:
        >>> segment_reduce(torch.tensor([1.0, 2, 3, 4]), torch.tensor([0, 1, 1, 4]), "mean")
        tensor([1., 0., 3.])
    """
    op = "segment_reduce"
    _check_rows(op, x, reduce, fill)
    if not isinstance(row_splits, Tensor) or row_splits.dim() != 1 or row_splits.shape[0] < 1:
        raise ValueError(
            f"{op}: row_splits must be an int64 tensor [S + 1] (0, end of segment 0, ..., number of rows), "
            f"got {_checks.describe(row_splits)}"
        )
    row_splits = _checks.integers(op, "row_splits", row_splits, row_splits.shape[0], x, "[S + 1]")
    return reduce_rows(x, None, row_splits, None, row_splits.shape[0] - 1, reduce, fill)[0]


def scatter_reduce(
    x: Tensor, index: Tensor, dim_size: int, reduce: Reduce, *, fill: float = 0.0, return_arg: bool = False
) -> Tensor | tuple[Tensor, Tensor]:
    """Reduce the rows of ``x`` that have the same index, in any order of indices.

    The same numbers as :func:`segment_reduce` gives for rows sorted by index (stably), bit for bit, without sorting on the CPU.

    Args:
        x: ``[M]`` or ``[M, ...]``: float32, float64, float16 or bfloat16, any strides. Trailing dimensions are reduced apart.
        index: ``[M]`` int64 or int32: segment of each row, in 0..dim_size-1, or -1 for a row that is left out.
        dim_size: Number of segments S; those without rows are empty.
        reduce: "sum", "mean", "max", "min", "logsumexp", or "softmax", which normalises within each segment (0 in rows left out).
        fill: Value of empty segments for "max" and "min". They give 0 for "sum" and "mean", -inf for "logsumexp".
        return_arg: Also return the rows of the extremes ("max" and "min" only).

    Returns:
        ``[S, ...]`` of the type of ``x``; for "softmax" ``[M, ...]``, like ``x``. With ``return_arg`` also the row of every value,
        ``[S, ...]`` int64, -1 for empty segments; of equal values the lowest row, of NaN the first. Differentiable twice in ``x``.

    Raises:
        ValueError: a shape, device or value is wrong; TypeError: a type is. Values on CUDA are only checked with ``GEOSSL_CHECKS=1``.

    Example:
        >>> scatter_reduce(torch.tensor([1.0, 5, 3, 5]), torch.tensor([1, 0, -1, 0]), 3, "max", return_arg=True)
        (tensor([5., 1., 0.]), tensor([ 1,  0, -1]))
    """
    op = "scatter_reduce"
    _check_rows(op, x, reduce, fill)
    index = _checks.integers(op, "index", index, x.shape[0], x, "[M], one per row of x")
    if isinstance(dim_size, bool) or not (isinstance(dim_size, torch.SymInt) or hasattr(dim_size, "__index__")):
        raise TypeError(f"{op}: dim_size must be a whole number, got {_checks.describe(dim_size)}")
    size = dim_size if isinstance(dim_size, torch.SymInt) else operator.index(dim_size)
    if size < 0:
        raise ValueError(f"{op}: dim_size must not be negative, got {size}")
    if return_arg and reduce not in ("max", "min"):
        raise ValueError(f"{op}: return_arg needs reduce 'max' or 'min', got {reduce!r}: other reductions choose no row")
    out, arg = reduce_rows(x, index, None, None, size, reduce, fill, return_arg)
    return out if arg is None else (out, arg)
