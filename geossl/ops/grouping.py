"""Gathering rows by index, the step after every neighbour search."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from geossl.ops import _checks, _dispatch
from geossl.ops._native import INT, INT64, PTR
from geossl.ops.reference import grouping as reference

# row_bytes, features, n, batch, index, entries per cloud, fill row, out
_group_c = _dispatch.functions("group", INT64, PTR, INT64, INT64, PTR, INT64, PTR, PTR)
# dtype, grad, channels, n, batch, index, entries per cloud, order, starts, out
_backward_c = _dispatch.functions("group_backward", INT, PTR, INT64, INT64, INT64, PTR, INT64, PTR, PTR, PTR)


def _check_index_values(features: Tensor, index: Tensor) -> None:
    rows = features.shape[-2]
    low, high = (int(value) for value in torch.aminmax(index)) if index.numel() else (0, -1)
    if low < -1 or high >= rows:
        raise ValueError(
            f"group: index must lie between -1 (no row: fill) and {rows - 1}, as features have {rows} rows; got {low if low < -1 else high}"
        )


def _group_native(kind: Any, features: Tensor, index: Tensor, fill: float) -> Tensor:
    if kind == "cuda" and _checks.read_values(features):
        _check_index_values(features, index)
    features, index = features.contiguous(), index.contiguous()
    channels = features.shape[-1]
    out = features.new_empty(*index.shape, channels)
    batch = features.shape[0] if features.dim() == 3 else 1
    # A null pointer stands for zeros, whatever the type.
    filler = torch.full((channels,), fill, dtype=features.dtype, device=features.device) if fill != 0 else None
    try:
        _group_c[kind](
            *_dispatch.place(kind, features), channels * features.element_size(), features.data_ptr(), features.shape[-2], batch,
            index.data_ptr(), index.numel() // max(batch, 1), _dispatch.pointer(filler), out.data_ptr(),
        )  # fmt: skip
    except ValueError:  # the CPU kernel reads all indices before it starts
        _check_index_values(features, index)
        raise
    return out


def _group_twin(features: Tensor, index: Tensor, fill: float) -> Tensor:
    if _checks.read_values(features):
        _check_index_values(features, index)
    return reference.group(features, index, fill)


def _backward_native(kind: Any, grad: Tensor, index: Tensor, batch: int, rows: int) -> Tensor:
    dtype = grad.dtype
    grad = (grad if dtype == torch.float64 else grad.float()).contiguous()
    index = index.contiguous()
    channels, clouds = grad.shape[-1], max(batch, 1)
    out = torch.empty((batch, rows, channels) if batch else (rows, channels), dtype=grad.dtype, device=grad.device)
    order, starts = _dispatch.inverse(index, clouds, rows) if kind == "cuda" else (None, None)
    _backward_c[kind](
        *_dispatch.place(kind, grad), grad.dtype == torch.float64, grad.data_ptr(), channels, rows, clouds, index.data_ptr(),
        index.numel() // clouds, _dispatch.pointer(order), _dispatch.pointer(starts), out.data_ptr(),
    )  # fmt: skip
    return out.to(dtype)


def _backward_fake(grad: Tensor, index: Tensor, batch: int, rows: int) -> Tensor:
    return grad.new_empty((batch, rows, grad.shape[-1]) if batch else (rows, grad.shape[-1]))


# The second has no autograd rule and costs a third less to call: it serves where no gradient is asked for.
_group, _group_plain = (
    _dispatch.define(
        f"{name}(Tensor features, Tensor index, float fill) -> Tensor",
        native=_group_native,
        twin=_group_twin,
        fake=lambda features, index, fill: features.new_empty((*index.shape, features.shape[-1])),
        autocast=None,
    )
    for name in ("group", "group_plain")
)
_group_backward = _dispatch.define(
    "group_backward(Tensor grad, Tensor index, SymInt batch, SymInt rows) -> Tensor",
    native=_backward_native,
    twin=reference.group_backward,
    fake=_backward_fake,
    autocast=None,
)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    features, index, _ = inputs
    ctx.save_for_backward(index)
    ctx.batch, ctx.rows = features.shape[0] if features.dim() == 3 else 0, features.shape[-2]


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return _group_backward(grad, ctx.saved_tensors[0], ctx.batch, ctx.rows), None, None


def _save_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1])


def _double_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return _group(grad, ctx.saved_tensors[0], 0.0), None, None, None


torch.library.register_autograd("geossl::group", _backward, setup_context=_save, lib=_dispatch.LIBRARY)
torch.library.register_autograd("geossl::group_backward", _double_backward, setup_context=_save_backward, lib=_dispatch.LIBRARY)


def group(features: Tensor, index: Tensor, fill: float = 0.0) -> Tensor:
    """Gather the features of neighbours: rows of ``features`` by index.

    Args:
        features: ``[B, N, C]`` with indices local to each cloud, or packed ``[M, C]`` with indices of rows; any type.
        index: ``[B, ...]`` or, packed, any shape; int64 or int32. -1 means no row.
        fill: Value of all channels where the index is -1.

    Returns:
        ``[*index.shape, C]`` of the type of ``features``. Differentiable in ``features``: rows with index -1 pass no gradient on, and the
        gradients of one row are added up in a fixed order (in float32 for half types), so the result is deterministic on every device.

    Raises:
        ValueError: shapes do not match, or an index is out of range (on CUDA only checked with ``GEOSSL_CHECKS=1``).

    Example:
        >>> group(torch.tensor([[1.0, 2], [3, 4]]), torch.tensor([[1, -1]]))
        tensor([[[3., 4.],
                 [0., 0.]]])
    """
    if not isinstance(features, Tensor) or features.dim() not in (2, 3):
        raise ValueError(f"group: features must be [B, N, C] or packed [M, C], got {_checks.describe(features)}")
    if not isinstance(index, Tensor) or index.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"group: index must be an int64 or int32 tensor, got {_checks.describe(index)}")
    if features.dim() == 3 and (index.dim() < 1 or index.shape[0] != features.shape[0]):
        raise ValueError(
            f"group: index must be [B, ...] with B = {features.shape[0]} as features are padded [B, N, C], got {_checks.describe(index)}"
        )
    _checks.same_device("group", "index", index, features)
    index = index if index.dtype == torch.int64 else index.long()
    operator = _group if features.requires_grad and torch.is_grad_enabled() else _group_plain
    return operator(features, index, fill)
