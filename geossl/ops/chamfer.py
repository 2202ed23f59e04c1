"""Chamfer distance between point clouds, as loss and as metric."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from geossl.errors import unknown_name
from geossl.ops import _checks, _dispatch
from geossl.ops._native import INT, INT64, PTR
from geossl.ops.reference import chamfer as reference

Norm = Literal["l2sq", "l2", "l1"]
Direction = Literal["both", "x", "y"]
Reduction = Literal["mean", "sum", "none"]

_NORMS = ("l2sq", "l2", "l1")
_DIRECTIONS = ("both", "x", "y")
_REDUCTIONS = ("mean", "sum", "none")

# dtype, x, x_offsets, x_lengths, n, y, y_offsets, y_lengths, m, batch, channels
_PAIRS = (INT, PTR, PTR, PTR, INT64, PTR, PTR, PTR, INT64, INT64, INT64)
# pairs, norm, direction, nearest, distances (workspace on CUDA), loss
_chamfer_c = _dispatch.functions("chamfer", *_PAIRS, INT, INT, PTR, PTR, PTR)
# pairs, norm, direction, nearest, grad, order and starts (from _dispatch.inverse, on CUDA), weights (workspace on CUDA), grad_x, grad_y
_backward_c = _dispatch.functions("chamfer_backward", *_PAIRS, INT, INT, *[PTR] * 7)

_PATCH = 64  # up to this many points, a GPU looks through all points of the other patch instead of inverting the map of nearest points


def _batching(
    x: Tensor, y: Tensor, x_lengths: Tensor | None, y_lengths: Tensor | None, x_offsets: Tensor | None, y_offsets: Tensor | None
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Check the values of lengths and offsets and return them contiguous."""
    if x_lengths is not None:
        x_lengths = _checks.length_values("chamfer_distance", x_lengths, x.shape[-2], "x_")
    if y_lengths is not None:
        y_lengths = _checks.length_values("chamfer_distance", y_lengths, y.shape[-2], "y_")
    if x_offsets is not None and y_offsets is not None:
        x_offsets = _checks.offset_values("chamfer_distance_packed", x_offsets, x.shape[0], "x_")
        y_offsets = _checks.offset_values("chamfer_distance_packed", y_offsets, y.shape[0], "y_")
    return x_lengths, y_lengths, x_offsets, y_offsets


def _pairs(
    x: Tensor, y: Tensor, x_lengths: Tensor | None, y_lengths: Tensor | None, x_offsets: Tensor | None, y_offsets: Tensor | None
) -> tuple[int, ...]:
    """Return the C arguments that describe contiguous clouds."""
    is_double = x.dtype == torch.float64
    if x_offsets is None and x_lengths is None and y_lengths is None:
        batch, n, channels = x.shape
        return is_double, x.data_ptr(), 0, 0, n, y.data_ptr(), 0, 0, y.shape[1], batch, channels
    pointer = _dispatch.pointer
    batch = x.shape[0] if x_offsets is None else x_offsets.shape[0] - 1
    return (
        is_double, x.data_ptr(), pointer(x_offsets), pointer(x_lengths), x.shape[-2],
        y.data_ptr(), pointer(y_offsets), pointer(y_lengths), y.shape[-2], batch, x.shape[-1],
    )  # fmt: skip


def _rows(points: Tensor) -> int:
    return points.numel() // points.shape[-1]


def _chamfer_fake(
    x: Tensor, y: Tensor, x_lengths: Tensor | None, y_lengths: Tensor | None, x_offsets: Tensor | None, y_offsets: Tensor | None,
    norm: str, direction: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    batch = x.shape[0] if x_offsets is None else x_offsets.shape[0] - 1
    rows = (0 if direction == "y" else _rows(x)) + (0 if direction == "x" else _rows(y))
    return x.new_empty(batch), x.new_empty(rows, dtype=torch.int64)


def _chamfer_native(
    kind: Any, x: Tensor, y: Tensor, x_lengths: Tensor | None, y_lengths: Tensor | None, x_offsets: Tensor | None,
    y_offsets: Tensor | None, norm: str, direction: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    x, y = x.contiguous(), y.contiguous()
    batching = _batching(x, y, x_lengths, y_lengths, x_offsets, y_offsets)
    loss, nearest = _chamfer_fake(x, y, *batching, norm, direction)
    distances = x.new_empty(nearest.shape[0]) if kind == "cuda" else None
    _chamfer_c[kind](
        *_dispatch.place(kind, x), *_pairs(x, y, *batching), _NORMS.index(norm), _DIRECTIONS.index(direction), nearest.data_ptr(),
        _dispatch.pointer(distances), loss.data_ptr(),
    )  # fmt: skip
    return loss, nearest


def _chamfer_twin(x: Tensor, y: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    _batching(x, y, *rest[:4])
    return reference.chamfer(x, y, *rest)


def _backward_native(
    kind: Any, grad: Tensor, x: Tensor, y: Tensor, nearest: Tensor, x_lengths: Tensor | None, y_lengths: Tensor | None,
    x_offsets: Tensor | None, y_offsets: Tensor | None, norm: str, direction: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    x, y, grad = x.contiguous(), y.contiguous(), grad.contiguous()
    batching = (None if t is None else t.contiguous() for t in (x_lengths, y_lengths, x_offsets, y_offsets))
    grad_x, grad_y = torch.empty_like(x), torch.empty_like(y)
    order = starts = weights = None
    if kind == "cuda":
        weights = grad.new_empty(2 * grad.shape[0])
        if x_offsets is not None or max(x.shape[1], y.shape[1]) > _PATCH:
            # Each row gets the pulls of the rows of the other cloud to which it is the nearest, in order. The entries of x come first and
            # name rows of y; in the map, the rows of y come first.
            x_entries = 0 if direction == "y" else _rows(x)
            target = nearest.clone()
            target[x_entries:] += torch.where(nearest[x_entries:] < 0, 0, _rows(y))
            order, starts = _dispatch.inverse(target, 1, _rows(x) + _rows(y))
    _backward_c[kind](
        *_dispatch.place(kind, x), *_pairs(x, y, *batching), _NORMS.index(norm), _DIRECTIONS.index(direction), nearest.data_ptr(),
        *map(_dispatch.pointer, (grad, order, starts, weights, grad_x, grad_y)),
    )  # fmt: skip
    return grad_x, grad_y


# The second has no autograd rule and costs half to call: it serves where no gradient is asked for.
_chamfer, _chamfer_plain = (
    _dispatch.define(
        f"{name}(Tensor x, Tensor y, Tensor? x_lengths, Tensor? y_lengths, Tensor? x_offsets, Tensor? y_offsets, str norm, "
        "str direction) -> (Tensor, Tensor)",
        native=_chamfer_native,
        twin=_chamfer_twin,
        fake=_chamfer_fake,
        direct=name.endswith("plain"),
    )
    for name in ("chamfer", "chamfer_plain")
)
_chamfer_backward = _dispatch.define(
    "chamfer_backward(Tensor grad, Tensor x, Tensor y, Tensor nearest, Tensor? x_lengths, Tensor? y_lengths, "
    "Tensor? x_offsets, Tensor? y_offsets, str norm, str direction) -> (Tensor, Tensor)",
    native=_backward_native,
    twin=reference.chamfer_backward,
    fake=lambda grad, x, y, *rest: (torch.empty_like(x), torch.empty_like(y)),
)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, y, *batching, ctx.norm, ctx.direction = inputs
    ctx.save_for_backward(x, y, output[1], *batching)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    # With create_graph, the twin: it is made of differentiable torch operations.
    formula: Any = reference.chamfer_backward if torch.is_grad_enabled() else _chamfer_backward
    return *formula(grad, *ctx.saved_tensors, ctx.norm, ctx.direction), *[None] * 6


torch.library.register_autograd("geossl::chamfer", _backward, setup_context=_save, lib=_dispatch.LIBRARY)


def _distance(
    op: str, x: Tensor, y: Tensor, x_lengths: Tensor | None, y_lengths: Tensor | None, x_offsets: Tensor | None, y_offsets: Tensor | None,
    norm: str, direction: str, reduction: str, weights: Tensor | None,
) -> Tensor:  # fmt: skip
    """Check the options, run the operator and reduce over clouds."""
    if norm not in _NORMS:
        raise unknown_name(f"{op} norm", norm, _NORMS)
    if direction not in _DIRECTIONS:
        raise unknown_name(f"{op} direction", direction, _DIRECTIONS)
    if reduction not in _REDUCTIONS:
        raise unknown_name(f"{op} reduction", reduction, _REDUCTIONS)
    batch = x.shape[0] if x_offsets is None else x_offsets.shape[0] - 1
    others = y.shape[0] if y_offsets is None else y_offsets.shape[0] - 1
    if batch != others:
        raise ValueError(f"{op}: x and y must have the same number of clouds, got {batch} and {others}")
    if weights is not None:
        if not isinstance(weights, Tensor) or weights.shape != (batch,) or not weights.is_floating_point():
            raise ValueError(f"{op}: weights must be floating [{batch}], one per pair of clouds, got {_checks.describe(weights)}")
        _checks.same_device(op, "weights", weights, x)
    operator = _chamfer if (x.requires_grad or y.requires_grad) and torch.is_grad_enabled() else _chamfer_plain
    loss, _ = operator(x, y, x_lengths, y_lengths, x_offsets, y_offsets, norm, direction)
    if weights is not None:
        weights = weights.to(loss.dtype)
        loss = loss * weights
    if reduction == "none":
        return loss
    if batch == 1 and (reduction == "sum" or weights is None):
        return loss.squeeze(0)  # the sum and the mean of one number, at a fraction of the time
    if reduction == "sum" or batch == 0:
        return loss.sum()
    if weights is None:
        return loss.mean()
    total = weights.sum()
    return torch.where(total > 0, loss.sum() / torch.where(total > 0, total, 1.0), 0.0)


def chamfer_distance(
    x: Tensor,
    y: Tensor,
    *,
    x_lengths: Tensor | None = None,
    y_lengths: Tensor | None = None,
    norm: Norm = "l2sq",
    direction: Direction = "both",
    reduction: Reduction = "mean",
    weights: Tensor | None = None,
) -> Tensor:
    """Chamfer distance between padded clouds: how far each point is, on average, from the nearest point of the other cloud.

    For one pair of clouds, ``mean_i min_j d(x_i, y_j) + mean_j min_i d(x_i, y_j)``. The choice of nearest point is exact, equal distances
    go to the lower index, and the result does not depend on padding, packing or the number of threads.

    Relation to other implementations:

    * ``norm="l2sq"`` (default) is the published "cdl2" of Point-MAE, Point-M2AE and I2P-MAE, and pytorch3d's default: the *sum* of both
      directions of mean squared distances, not halved;
    * ``norm="l2"`` is the sum of both directions of mean Euclidean distances; the published "cdl1" is half of it,
      ``0.5 * chamfer_distance(x, y, norm="l2")``;
    * ``norm="l1"`` measures ``|dx| + |dy| + ...``, also to choose the nearest point, as pytorch3d's ``norm=1``. It is not "cdl1".

    Args:
        x: First clouds, ``[B, N, D]``, float32 or float64 (half types are upcast to float32, also under autocast). D is any number of
            channels, at least 1: the distance is over all of them, summed from left to right.
        y: Second clouds, ``[B, M, D]``, same type and device.
        x_lengths: Points in each cloud of ``x``, ``[B]``; None means N.
        y_lengths: Points in each cloud of ``y``, ``[B]``; None means M.
        norm: Distance between two points.
        direction: "both", or only from the points of "x" to ``y`` or of "y" to ``x``.
        reduction: Over pairs of clouds: "mean", "sum", or "none" for ``[B]``. Over points it is always the mean.
        weights: One weight per pair of clouds ``[B]``; "mean" then divides by their sum (0 if it is not positive).

    Returns:
        The distance, a scalar or ``[B]``, in float32 or float64. Differentiable in ``x``, ``y`` (twice) and ``weights``; the gradient is
        deterministic, and 0 at distance 0. Points with a NaN or infinite coordinate are left out, of the means too. If either cloud of
        a pair has no valid point, the pair contributes 0 and counts as a pair. A point is left out as well if its squared distance from
        all points of the other cloud overflows (beyond 1.8e19 in float32); ``norm="l1"`` does not square.

    Raises:
        ValueError: a shape, device or value is wrong; TypeError: a type is. Values on CUDA are only checked with ``GEOSSL_CHECKS=1``.

    Example:
        >>> chamfer_distance(torch.zeros(1, 1, 3), torch.tensor([[[0.0, 0, 3], [0, 4, 0]]]))
        tensor(21.5000)
    """
    op = "chamfer_distance"
    x, y = _checks.two_clouds(op, ("x", "y"), x, y, False, any_channels=True)
    if x_lengths is not None:
        x_lengths, _ = _checks.batching(op, x, x_lengths, None, "x_")
    if y_lengths is not None:
        y_lengths, _ = _checks.batching(op, y, y_lengths, None, "y_")
    return _distance(op, x, y, x_lengths, y_lengths, None, None, norm, direction, reduction, weights)


def chamfer_distance_packed(
    x: Tensor,
    x_offsets: Tensor,
    y: Tensor,
    y_offsets: Tensor,
    *,
    norm: Norm = "l2sq",
    direction: Direction = "both",
    reduction: Reduction = "mean",
    weights: Tensor | None = None,
) -> Tensor:
    """Chamfer distance between packed clouds; see :func:`chamfer_distance`, with which it agrees bit for bit.

    Args:
        x: Rows of the first clouds, ``[Mx, D]``.
        x_offsets: First row of each cloud and the end, ``[B + 1]``.
        y: Rows of the second clouds, ``[My, D]``.
        y_offsets: First row of each cloud and the end, ``[B + 1]``.
        norm: Distance between two points, see :func:`chamfer_distance`.
        direction: "both", "x" or "y", see :func:`chamfer_distance`.
        reduction: Over pairs of clouds: "mean", "sum" or "none".
        weights: One weight per pair of clouds, ``[B]``.

    Returns:
        A scalar or ``[B]``; differentiable as :func:`chamfer_distance`.
    """
    op = "chamfer_distance_packed"
    for name, offsets in (("x_offsets", x_offsets), ("y_offsets", y_offsets)):
        if offsets is None:
            raise ValueError(f"{op}: {name} must be an int64 tensor [B + 1], got None; padded clouds go to chamfer_distance")
    x, y = _checks.two_clouds(op, ("x", "y"), x, y, True, any_channels=True)
    _, x_offsets = _checks.batching(op, x, None, x_offsets, "x_")  # type: ignore[assignment]
    _, y_offsets = _checks.batching(op, y, None, y_offsets, "y_")  # type: ignore[assignment]
    return _distance(op, x, y, None, None, x_offsets, y_offsets, norm, direction, reduction, weights)


def chamfer_distance_patches(
    x: Tensor,
    y: Tensor,
    *,
    norm: Norm = "l2sq",
    direction: Direction = "both",
    reduction: Reduction = "mean",
    weights: Tensor | None = None,
) -> Tensor:
    """Chamfer distance between many small patches, as masked autoencoders use it to compare predicted and true neighbourhoods.

    The same as :func:`chamfer_distance` for full clouds, with any leading dimensions. Since all patches have equal sizes, the mean over
    patches of means over points is the published mean over all points of all patches: ``norm="l2sq"`` is "cdl2",
    ``0.5 * chamfer_distance_patches(x, y, norm="l2")`` is "cdl1".

    Args:
        x: Patches, ``[..., K1, D]``, for instance ``[P, 32, 3]``.
        y: Patches, ``[..., K2, D]`` with the same leading dimensions; K2 may differ from K1.
        norm: Distance between two points, see :func:`chamfer_distance`.
        direction: "both", "x" or "y", see :func:`chamfer_distance`.
        reduction: Over patches: "mean", "sum", or "none" for a result of the leading dimensions.
        weights: One weight per patch, of the leading dimensions.

    Returns:
        A scalar or the leading dimensions; differentiable as :func:`chamfer_distance`.
    """
    op = "chamfer_distance_patches"
    for name, cloud in (("x", x), ("y", y)):
        if not isinstance(cloud, Tensor) or cloud.dim() < 3:
            raise ValueError(f"{op}: {name} must be [..., K, D] with at least one leading dimension, got {_checks.describe(cloud)}")
    leading = x.shape[:-2]
    if y.shape[:-2] != leading:
        raise ValueError(f"{op}: x and y must have the same leading dimensions, got {list(x.shape)} and {list(y.shape)}")
    if x.dim() > 3:
        x, y = x.flatten(0, -3), y.flatten(0, -3)
        weights = weights.flatten() if isinstance(weights, Tensor) and weights.shape == leading else weights
    x, y = _checks.two_clouds(op, ("x", "y"), x, y, False, any_channels=True)
    loss = _distance(op, x, y, None, None, None, None, norm, direction, reduction, weights)
    return loss.view(leading) if reduction == "none" and len(leading) > 1 else loss
