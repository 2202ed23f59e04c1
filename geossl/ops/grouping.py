"""Gathering rows by index, the step after every neighbour search."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from geossl.ops import _checks, _dispatch
from geossl.ops._native import DOUBLE, INT, INT64, PTR
from geossl.ops.reference import grouping as reference

# row_bytes, features, n, batch, index, entries per cloud, fill row, out
_group_c = _dispatch.functions("group", INT64, PTR, INT64, INT64, PTR, INT64, PTR, PTR)
# dtype, points, n, batch, centers, queries, features, channels, index, k, radius, out
_relative_c = _dispatch.functions("group_relative", INT, PTR, INT64, INT64, PTR, INT64, PTR, INT64, PTR, INT64, DOUBLE, PTR)
# dtype, grad, channels, n, batch, index, entries per cloud, order, starts, out
_backward_c = _dispatch.functions("group_backward", INT, PTR, INT64, INT64, INT64, PTR, INT64, PTR, PTR, PTR)


def _check_index_values(op: str, features: Tensor, index: Tensor, name: str = "features") -> None:
    rows = features.shape[-2]
    low, high = (int(value) for value in torch.aminmax(index)) if index.numel() else (0, -1)
    if low < -1 or high >= rows:
        raise ValueError(
            f"{op}: index must lie between -1 (no row) and {rows - 1}, as {name} have {rows} rows; got {low if low < -1 else high}"
        )


def _group_native(kind: Any, features: Tensor, index: Tensor, fill: float) -> Tensor:
    if kind == "cuda" and _checks.read_values(features):
        _check_index_values("group", features, index)
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
        _check_index_values("group", features, index)
        raise
    return out


def _group_twin(features: Tensor, index: Tensor, fill: float) -> Tensor:
    if _checks.read_values(features):
        _check_index_values("group", features, index)
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


# The second has no autograd rule and costs half to call: it serves where no gradient is asked for.
_group, _group_plain = (
    _dispatch.define(
        f"{name}(Tensor features, Tensor index, float fill) -> Tensor",
        native=_group_native,
        twin=_group_twin,
        fake=lambda features, index, fill: features.new_empty((*index.shape, features.shape[-1])),
        autocast=None,
        direct=name.endswith("plain"),
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


def _relative_native(kind: Any, points: Tensor, centers: Tensor, index: Tensor, features: Tensor | None, radius: float) -> Tensor:
    if kind == "cuda" and _checks.read_values(points):
        _check_index_values("group_relative", points, index, "points")
    points, centers, index = points.contiguous(), centers.contiguous(), index.contiguous()
    features = None if features is None else features.contiguous()
    out = _relative_fake(points, centers, index, features, radius)
    batch = points.shape[0] if points.dim() == 3 else 1
    try:
        _relative_c[kind](
            *_dispatch.place(kind, points), points.dtype == torch.float64, points.data_ptr(), points.shape[-2], batch, centers.data_ptr(),
            centers.shape[-2], _dispatch.pointer(features), out.shape[-1] - 3, index.data_ptr(), index.shape[-1], radius, out.data_ptr(),
        )  # fmt: skip
    except ValueError:  # the CPU kernel reads all indices before it starts
        _check_index_values("group_relative", points, index, "points")
        raise
    return out


def _relative_twin(points: Tensor, centers: Tensor, index: Tensor, features: Tensor | None, radius: float) -> Tensor:
    if _checks.read_values(points):
        _check_index_values("group_relative", points, index, "points")
    return reference.group_relative(points, centers, index, features, radius)


def _relative_fake(points: Tensor, centers: Tensor, index: Tensor, features: Tensor | None, radius: float) -> Tensor:
    return points.new_empty((*index.shape, 3 + (0 if features is None else features.shape[-1])))


_group_relative = _dispatch.define(
    "group_relative(Tensor points, Tensor centers, Tensor index, Tensor? features, float radius) -> Tensor",
    native=_relative_native,
    twin=_relative_twin,
    fake=_relative_fake,
)


def _save_relative(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    points, _, index, features, ctx.radius = inputs
    ctx.save_for_backward(index)
    ctx.batch, ctx.rows, ctx.has_features = points.shape[0] if points.dim() == 3 else 0, points.shape[-2], features is not None


def _relative_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (index,) = ctx.saved_tensors
    grad_points = grad_centers = grad_features = None
    if ctx.needs_input_grad[0] or ctx.needs_input_grad[3]:  # one sum over the neighbourhoods serves both
        summed = _group_backward(grad, index, ctx.batch, ctx.rows)
        grad_points, grad_features = summed[..., :3], summed[..., 3:] if ctx.has_features else None
    if ctx.needs_input_grad[1]:
        grad_centers = -torch.where((index >= 0).unsqueeze(-1), grad[..., :3], 0.0).sum(-2)
    if ctx.radius > 0:
        grad_points = None if grad_points is None else grad_points / ctx.radius
        grad_centers = None if grad_centers is None else grad_centers / ctx.radius
    return grad_points, grad_centers, None, grad_features, None


torch.library.register_autograd("geossl::group_relative", _relative_backward, setup_context=_save_relative, lib=_dispatch.LIBRARY)


# Public -----------------------------------------------------------------------------------------------------------------------------------


def _check_features(op: str, features: Tensor, index: Tensor, name: str = "features", width: str = "C") -> Tensor:
    """Check features and an index of their rows; return the index as int64."""
    if not isinstance(features, Tensor) or features.dim() not in (2, 3):
        raise ValueError(f"{op}: {name} must be [B, N, {width}] or packed [M, {width}], got {_checks.describe(features)}")
    if not isinstance(index, Tensor) or index.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{op}: index must be an int64 or int32 tensor, got {_checks.describe(index)}")
    if features.dim() == 3 and (index.dim() < 1 or index.shape[0] != features.shape[0]):
        raise ValueError(
            f"{op}: index must be [B, ...] with B = {features.shape[0]} as {name} are padded [B, N, {width}], got {_checks.describe(index)}"
        )
    _checks.same_device(op, "index", index, features)
    return index if index.dtype == torch.int64 else index.long()


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
    index = _check_features("group", features, index)
    operator = _group if features.requires_grad and torch.is_grad_enabled() else _group_plain
    return operator(features, index, fill)


def group_relative(
    points: Tensor, centers: Tensor, index: Tensor, features: Tensor | None = None, *, radius: float | None = None
) -> Tensor:
    """Gather neighbourhoods in coordinates relative to their centres, with features after the coordinates, in one pass.

    ``out[..., :3] = (points[index] - centers) / radius`` and ``out[..., 3:] = features[index]``; rows with index -1 are 0.

    Args:
        points: ``[B, N, 3]`` with indices local to each cloud, or packed ``[M, 3]`` with indices of rows; float32 or float64 (half types
            are upcast to float32).
        centers: ``[B, G, 3]`` or packed ``[G, 3]``, same type and device.
        index: ``[B, G, k]`` or packed ``[G, k]``, int64 or int32; -1 means no point.
        features: ``[B, N, C]`` or packed ``[M, C]``, floating, converted to the type of the points; None for coordinates alone.
        radius: Positive number that the relative coordinates are divided by; None leaves them as they are.

    Returns:
        ``[B, G, k, 3 + C]`` or packed ``[G, k, 3 + C]``, of the type of ``points``. Differentiable in points, centres and features, twice;
        the gradient is deterministic on every device.

    Raises:
        ValueError: shapes do not match, or an index is out of range (on CUDA only checked with ``GEOSSL_CHECKS=1``).

    Example:
        >>> points = torch.tensor([[1.0, 0.0, 0.0], [2.0, 2.0, 0.0]])
        >>> group_relative(points, points[:1], torch.tensor([[0, 1, -1]]), radius=2.0)
        tensor([[[0.0000, 0.0000, 0.0000],
                 [0.5000, 1.0000, 0.0000],
                 [0.0000, 0.0000, 0.0000]]])
    """
    op = "group_relative"
    packed = isinstance(points, Tensor) and points.dim() == 2
    points, centers = _checks.two_clouds(op, ("points", "centers"), points, centers, packed)
    index = _check_features(op, points, index, "points", "3")
    if index.dim() != centers.dim() or index.shape[:-1] != centers.shape[:-1]:
        raise ValueError(f"{op}: index must be {[*centers.shape[:-1], 'k']}, one row per center, got {_checks.describe(index)}")
    if features is not None:
        if not isinstance(features, Tensor) or features.shape[:-1] != points.shape[:-1] or not features.is_floating_point():
            raise ValueError(
                f"{op}: features must be floating with one row per point, {[*points.shape[:-1], 'C']}, got {_checks.describe(features)}"
            )
        _checks.same_device(op, "features", features, points)
        features = features.to(points.dtype)
    divisor = 0.0 if radius is None else _checks.radius(op, radius)
    if radius is not None and not torch.finfo(points.dtype).tiny <= divisor < math.inf:
        raise ValueError(f"{op}: radius must be finite and not underflow in {points.dtype}, got {radius}; without it, pass None")
    return _group_relative(points, centers, index, features, divisor)
