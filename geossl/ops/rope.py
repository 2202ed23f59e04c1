"""Rotary position encoding of image tokens, by row and column (RoPE2D): the positions of CroCo v2, DUSt3R and their descendants."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from geossl.ops import _checks, _dispatch
from geossl.ops._native import INT, INT64, PTR
from geossl.ops.reference import rope as reference

_TYPES = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}  # FloatType of cuda_ext/include/half.h

# type, x, row stride, head stride, rows, heads, dim, table, positions, inverse, out
_rope_c = _dispatch.functions("rope_2d", INT, PTR, INT64, INT64, INT64, INT64, INT64, PTR, INT64, INT, PTR)


def _native(kind: Any, x: Tensor, table: Tensor, inverse: bool) -> Tensor:
    if x.stride(2) != 1:
        x = x.contiguous()
    table = table.contiguous()
    out = _fake(x, table, inverse)
    _rope_c[kind](
        *_dispatch.place(kind, x), _TYPES[x.dtype], x.data_ptr(), x.stride(0), x.stride(1), *x.shape, table.data_ptr(), table.shape[0],
        inverse, out.data_ptr(),
    )  # fmt: skip
    return out


def _fake(x: Tensor, table: Tensor, inverse: bool) -> Tensor:
    return x.new_empty(x.shape)


_rope_2d = _dispatch.define(
    "rope_2d(Tensor x, Tensor table, bool inverse) -> Tensor",
    native=_native,
    twin=reference.rope_2d,
    fake=_fake,
    autocast=None,
)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, table, ctx.inverse = inputs
    ctx.save_for_backward(table)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return _rope_2d(grad, ctx.saved_tensors[0], not ctx.inverse), None, None


torch.library.register_autograd("geossl::rope_2d", _backward, setup_context=_save, lib=_dispatch.LIBRARY)


def rope_2d(x: Tensor, table: Tensor) -> Tensor:
    """Rotate the channels of every token by angles that grow with its row and column.

    The first half of a head's channels belongs to the row, the second to the column. In each, channel k and channel k + D / 4 are a pair
    (u, v), which becomes ``(u cos - v sin, v cos + u sin)``. Norms are kept, and the product of a rotated query and a rotated key depends
    on the difference of their positions alone.

    The result is a new tensor, whatever the layout of ``x``: nothing is ever written through a view. Products are in float32 (float64 for
    float64) and rounded once to the type of ``x``; autocast changes nothing. The same bits come for any number of threads and on CUDA.

    Args:
        x: ``[T, H, D]`` float32, float64, float16 or bfloat16: T tokens of H heads; D is a multiple of 4. Tokens and heads may have any
            strides, as those of queries and keys inside a joint ``qkv``; where the last dimension is not contiguous, it is copied first.
        table: ``[N, 2, D // 2]``, cosines and sines of N positions, from :func:`rope_2d_table`: float32 (float64 for float64 ``x``), on the
            device of ``x``. T is a multiple of N: token t has the position ``t % N``, so that one table serves a batch of images.

    Returns:
        ``[T, H, D]`` of the type of ``x``, contiguous. Differentiable in ``x`` any number of times; not in the table.

    Raises:
        ValueError: shapes do not fit, devices differ, or the table wants a gradient; TypeError: a type is wrong.

    Example:
        >>> table = rope_2d_table(torch.tensor([[0, 0], [0, 1]]), dim=4, scale=torch.pi / 2)
        >>> rope_2d(torch.tensor([[[1.0, 2, 3, 4]], [[1, 2, 3, 4]]]), table).round()
        tensor([[[ 1.,  2.,  3.,  4.]],
        <BLANKLINE>
                [[ 1.,  2., -4.,  3.]]])
    """
    op = "rope_2d"
    if not isinstance(x, Tensor) or x.dtype not in _TYPES:
        raise TypeError(f"{op}: x must be a float32, float64, float16 or bfloat16 tensor [T, H, D], got {_checks.describe(x)}")
    if x.dim() != 3:
        raise ValueError(f"{op}: x must be [T, H, D], tokens by heads by channels, got {_checks.describe(x)}; flatten the batch into T")
    rows, _, dim = x.shape
    if dim < 4 or dim % 4 != 0:
        raise ValueError(
            f"{op}: the channels D of a head must be a multiple of 4 (pairs for the row, pairs for the column), got D = {dim} in x "
            f"{list(x.shape)}"
        )
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    if not isinstance(table, Tensor) or table.dtype != wide:
        raise TypeError(
            f"{op}: table must be {wide} for x of {x.dtype}, got {_checks.describe(table)}; make it with rope_2d_table(..., dtype={wide})"
        )
    if table.dim() != 3 or table.shape[1] != 2 or table.shape[2] != dim // 2:
        raise ValueError(
            f"{op}: table must be [N, 2, D // 2] = [N, 2, {dim // 2}] for x {list(x.shape)}, got {_checks.describe(table)}; make it with "
            f"rope_2d_table(positions, {dim})"
        )
    positions = table.shape[0]
    if rows % positions != 0 if positions else rows > 0:
        raise ValueError(
            f"{op}: the {rows} tokens of x must be a multiple of the {positions} positions of the table, as token t has position t % N; "
            "make the table of the tokens that are there (of the visible ones, if others were left out)"
        )
    _checks.same_device(op, "table", table, x)
    if table.requires_grad:
        raise ValueError(f"{op}: the table would get no gradient; pass table.detach()")
    return _rope_2d(x, table, False)


def rope_2d_table(positions: Tensor, dim: int, base: float = 100.0, scale: float = 1.0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return the cosines and sines by which :func:`rope_2d` rotates tokens at the given positions.

    Frequency k of D / 4 is ``scale / base ** (k / (D / 4))``. Angles are of type ``dtype``, as in the published models, whatever autocast
    says. A table depends on nothing but the grid: make it once and use it in all blocks.

    Args:
        positions: Row and column of every token, ``[N, 2]`` int64 or int32: whole patches, not pixels; any sign.
        dim: Channels D of one head, a multiple of 4.
        base: Ratio of the first frequency to the one after the last, positive; 100 is that of the published ``RoPE100``.
        scale: First frequency, in radians a patch; smaller than 1 squeezes larger grids into the range a model knows.
        dtype: float32, or float64 for float64 tokens.

    Returns:
        ``[N, 2, D // 2]`` on the device of ``positions``: ``[:, 0]`` the cosines and ``[:, 1]`` the sines; the first D / 4 of either are of
        the row, the others of the column.

    Raises:
        ValueError: a shape or number is wrong; TypeError: a type is.

    Example:
        >>> rope_2d_table(torch.tensor([[0, 3]]), dim=4, scale=torch.pi / 6).abs().round()
        tensor([[[1., 0.],
                 [0., 1.]]])
    """
    op = "rope_2d_table"
    if not isinstance(positions, Tensor) or positions.dtype not in (torch.int64, torch.int32):
        raise TypeError(
            f"{op}: positions must be an int64 or int32 tensor [N, 2] of patch rows and columns, got {_checks.describe(positions)}; use "
            "scale for other distances between patches"
        )
    if positions.dim() != 2 or positions.shape[1] != 2:
        raise ValueError(f"{op}: positions must be [N, 2], the row and column of every token, got {_checks.describe(positions)}")
    dim = _checks.positive(op, "dim", dim)
    if dim % 4 != 0:
        raise ValueError(f"{op}: dim, the channels of one head, must be a multiple of 4, got {dim}")
    if not 0 < base < math.inf:  # comparisons, which torch.compile traces, as it does not math.isfinite
        raise ValueError(f"{op}: base must be a finite number above 0, got {base}")
    if not -math.inf < scale < math.inf:
        raise ValueError(f"{op}: scale must be a finite number, got {scale}")
    if dtype not in (torch.float32, torch.float64):
        raise TypeError(f"{op}: dtype must be torch.float32 (for float32 and half types) or torch.float64, got {dtype}")
    quarter = dim // 4
    frequency = scale / base ** (torch.arange(quarter, dtype=dtype, device=positions.device) / quarter)
    angle = positions.to(dtype)[:, :, None] * frequency  # [N, 2, D // 4]
    return torch.stack([angle.cos(), angle.sin()], dim=1).flatten(2)
