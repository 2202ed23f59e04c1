"""Chamfer distance between point clouds, as loss and as metric."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from geossl.errors import unknown_name
from geossl.ops import _checks, _dispatch, reference
from geossl.ops._native import INT, INT64, PTR

Norm = Literal["l2sq", "l2", "l1"]
Direction = Literal["both", "x", "y"]
Reduction = Literal["mean", "sum", "none"]

_NORMS = ("l2sq", "l2", "l1")
_DIRECTIONS = ("both", "x", "y")
_REDUCTIONS = ("mean", "sum", "none")

# dtype, x, x_offsets, x_lengths, n, y, y_offsets, y_lengths, m, batch
_PAIRS = (INT, PTR, PTR, PTR, INT64, PTR, PTR, PTR, INT64, INT64)
# pairs, norm, direction, nearest_y, nearest_x, distances of x and y (workspace on CUDA), loss
_chamfer_c = _dispatch.functions("chamfer", *_PAIRS, INT, INT, PTR, PTR, PTR, PTR, PTR)
# pairs, norm, direction, nearest_y, nearest_x, grad, (order, starts) of nearest_y and nearest_x, grad_x, grad_y
_backward_c = _dispatch.functions("chamfer_backward", *_PAIRS, INT, INT, *[PTR] * 9)


def _pairs(
    x: Tensor, y: Tensor, x_lengths: Tensor | None, y_lengths: Tensor | None, x_offsets: Tensor | None, y_offsets: Tensor | None
) -> tuple[list[Tensor | None], tuple[int | None, ...]]:
    """Return contiguous tensors (to be kept alive) and the C arguments that describe them."""
    kept = [None if t is None else t.contiguous() for t in (x, x_offsets, x_lengths, y, y_offsets, y_lengths)]
    a, ao, al, b, bo, bl = (_dispatch.pointer(t) for t in kept)
    batch = x.shape[0] if x_offsets is None else x_offsets.shape[0] - 1
    return kept, (x.dtype == torch.float64, a, ao, al, x.shape[-2], b, bo, bl, y.shape[-2], batch)


def _check_values(
    x: Tensor, y: Tensor, x_lengths: Tensor | None, y_lengths: Tensor | None, x_offsets: Tensor | None, y_offsets: Tensor | None
) -> None:
    _checks.length_values("chamfer_distance", x_lengths, x.shape[-2], "x_")
    _checks.length_values("chamfer_distance", y_lengths, y.shape[-2], "y_")
    _checks.offset_values("chamfer_distance_packed", x_offsets, x.shape[0], "x_")
    _checks.offset_values("chamfer_distance_packed", y_offsets, y.shape[0], "y_")


def _empty_outputs(x: Tensor, y: Tensor, x_offsets: Tensor | None, direction: str) -> tuple[Tensor, Tensor, Tensor]:
    batch = x.shape[0] if x_offsets is None else x_offsets.shape[0] - 1
    rows = [0 if direction == other else cloud.numel() // 3 for cloud, other in ((x, "y"), (y, "x"))]
    indices = (torch.empty(n, dtype=torch.int64, device=x.device) for n in rows)
    return x.new_empty(batch), *indices


def _chamfer_native(
    kind: Any, x: Tensor, y: Tensor, x_lengths: Tensor | None, y_lengths: Tensor | None, x_offsets: Tensor | None,
    y_offsets: Tensor | None, norm: str, direction: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    _check_values(x, y, x_lengths, y_lengths, x_offsets, y_offsets)
    kept, pairs = _pairs(x, y, x_lengths, y_lengths, x_offsets, y_offsets)
    loss, nearest_y, nearest_x = _empty_outputs(x, y, x_offsets, direction)
    # A GPU finds all distances in one launch and sums them in another.
    workspace = [torch.empty(index.shape, dtype=x.dtype, device=x.device) if kind == "cuda" else None for index in (nearest_y, nearest_x)]
    _chamfer_c[kind](
        *_dispatch.place(kind, x), *pairs, _NORMS.index(norm), _DIRECTIONS.index(direction), nearest_y.data_ptr(), nearest_x.data_ptr(),
        *map(_dispatch.pointer, workspace), loss.data_ptr(),
    )  # fmt: skip
    del kept
    return loss, nearest_y, nearest_x


def _chamfer_twin(x: Tensor, y: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    _check_values(x, y, *rest[:4])
    return reference.chamfer(x, y, *rest)


def _chamfer_fake(x: Tensor, y: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _empty_outputs(x, y, rest[2], rest[5])


def _backward_native(
    kind: Any, grad: Tensor, x: Tensor, y: Tensor, nearest_y: Tensor, nearest_x: Tensor, x_lengths: Tensor | None,
    y_lengths: Tensor | None, x_offsets: Tensor | None, y_offsets: Tensor | None, norm: str, direction: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    kept, pairs = _pairs(x, y, x_lengths, y_lengths, x_offsets, y_offsets)
    grad, grad_x, grad_y = grad.contiguous(), torch.empty_like(x), torch.empty_like(y)
    inverses: list[Tensor | None] = [None] * 4
    if kind == "cuda":
        inverses = [
            *(_dispatch.inverse(nearest_y, 1, y.numel() // 3) if direction != "y" else (None, None)),
            *(_dispatch.inverse(nearest_x, 1, x.numel() // 3) if direction != "x" else (None, None)),
        ]
    _backward_c[kind](
        *_dispatch.place(kind, x), *pairs, _NORMS.index(norm), _DIRECTIONS.index(direction), nearest_y.data_ptr(), nearest_x.data_ptr(),
        grad.data_ptr(), *map(_dispatch.pointer, inverses), grad_x.data_ptr(), grad_y.data_ptr(),
    )  # fmt: skip
    del kept
    return grad_x, grad_y


_chamfer = _dispatch.define(
    "chamfer(Tensor x, Tensor y, Tensor? x_lengths, Tensor? y_lengths, Tensor? x_offsets, Tensor? y_offsets, str norm, str direction) "
    "-> (Tensor, Tensor, Tensor)",
    native=_chamfer_native,
    twin=_chamfer_twin,
    fake=_chamfer_fake,
)
_chamfer_backward = _dispatch.define(
    "chamfer_backward(Tensor grad, Tensor x, Tensor y, Tensor nearest_y, Tensor nearest_x, Tensor? x_lengths, Tensor? y_lengths, "
    "Tensor? x_offsets, Tensor? y_offsets, str norm, str direction) -> (Tensor, Tensor)",
    native=_backward_native,
    twin=reference.chamfer_backward,
    fake=lambda grad, x, y, *rest: (torch.empty_like(x), torch.empty_like(y)),
)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, y, *batching, ctx.norm, ctx.direction = inputs
    _, nearest_y, nearest_x = output
    ctx.save_for_backward(x, y, nearest_y, nearest_x, *batching)
    ctx.mark_non_differentiable(nearest_y, nearest_x)


def _backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    # With create_graph, the twin: it is made of differentiable torch operations.
    formula = reference.chamfer_backward if torch.is_grad_enabled() else _chamfer_backward
    return *formula(grad, *ctx.saved_tensors, ctx.norm, ctx.direction), *[None] * 6


torch.library.register_autograd("geossl::chamfer", _backward, setup_context=_save, lib=_dispatch.LIBRARY)


def _distance(
    op: str, x: Tensor, y: Tensor, x_lengths: Tensor | None, y_lengths: Tensor | None, x_offsets: Tensor | None, y_offsets: Tensor | None,
    norm: str, direction: str, reduction: str, weights: Tensor | None,
) -> Tensor:  # fmt: skip
    """Check the options, run the operator and reduce over clouds."""
    for name, value, known in (("norm", norm, _NORMS), ("direction", direction, _DIRECTIONS), ("reduction", reduction, _REDUCTIONS)):
        if value not in known:
            raise unknown_name(f"{op} {name}", value, known)
    batch = x.shape[0] if x_offsets is None else x_offsets.shape[0] - 1
    others = y.shape[0] if y_offsets is None else y_offsets.shape[0] - 1
    if batch != others:
        raise ValueError(f"{op}: x and y must have the same number of clouds, got {batch} and {others}")
    if weights is not None:
        if not isinstance(weights, Tensor) or weights.shape != (batch,) or not weights.is_floating_point():
            raise ValueError(f"{op}: weights must be floating [{batch}], one per pair of clouds, got {_checks.describe(weights)}")
        _checks.same_device(op, "weights", weights, x)
    loss, _, _ = _chamfer(x, y, x_lengths, y_lengths, x_offsets, y_offsets, norm, direction)
    if weights is not None:
        weights = weights.to(loss.dtype)
        loss = loss * weights
    if reduction == "none":
        return loss
    if reduction == "sum":
        return loss.sum()
    total = max(batch, 1) if weights is None else weights.sum().clamp(min=torch.finfo(loss.dtype).tiny)
    return loss.sum() / total


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
    * ``norm="l1"`` measures ``|dx| + |dy| + |dz|``, also to choose the nearest point, as pytorch3d's ``norm=1``. It is not "cdl1".

    Args:
        x: First clouds, ``[B, N, 3]``, float32 or float64 (half types are upcast to float32, also under autocast).
        y: Second clouds, ``[B, M, 3]``, same type and device.
        x_lengths: Points in each cloud of ``x``, ``[B]``; None means N.
        y_lengths: Points in each cloud of ``y``, ``[B]``; None means M.
        norm: Distance between two points.
        direction: "both", or only from the points of "x" to ``y`` or of "y" to ``x``.
        reduction: Over pairs of clouds: "mean", "sum", or "none" for ``[B]``. Over points it is always the mean.
        weights: One weight per pair of clouds ``[B]``; "mean" then divides by their sum (0 if it is not positive).

    Returns:
        The distance, a scalar or ``[B]``, in float32 or float64. Differentiable in ``x``, ``y`` (twice) and ``weights``; the gradient is
        deterministic, and 0 at distance 0. Points with a NaN or infinite coordinate are left out, of the means too. If either cloud of
        a pair has no valid point, the pair contributes 0 and counts as a pair.

    Raises:
        ValueError: a shape, device or value is wrong; TypeError: a type is. Values on CUDA are only checked with ``GEOSSL_CHECKS=1``.

    Example:
        >>> chamfer_distance(torch.zeros(1, 1, 3), torch.tensor([[[0.0, 0, 3], [0, 4, 0]]]))
        tensor(21.5000)
    """
    op = "chamfer_distance"
    x = _checks.points(op, "x", x, False)
    y = _checks.points(op, "y", y, False, like=x)
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
        x: Rows of the first clouds, ``[Mx, 3]``.
        x_offsets: First row of each cloud and the end, ``[B + 1]``.
        y: Rows of the second clouds, ``[My, 3]``.
        y_offsets: First row of each cloud and the end, ``[B + 1]``.
        norm: Distance between two points, see :func:`chamfer_distance`.
        direction: "both", "x" or "y", see :func:`chamfer_distance`.
        reduction: Over pairs of clouds: "mean", "sum" or "none".
        weights: One weight per pair of clouds, ``[B]``.

    Returns:
        A scalar or ``[B]``; differentiable as :func:`chamfer_distance`.
    """
    op = "chamfer_distance_packed"
    x = _checks.points(op, "x", x, True)
    y = _checks.points(op, "y", y, True, like=x)
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
        x: Patches, ``[..., K1, 3]``, for instance ``[P, 32, 3]``.
        y: Patches, ``[..., K2, 3]`` with the same leading dimensions; K2 may differ from K1.
        norm: Distance between two points, see :func:`chamfer_distance`.
        direction: "both", "x" or "y", see :func:`chamfer_distance`.
        reduction: Over patches: "mean", "sum", or "none" for a result of the leading dimensions.
        weights: One weight per patch, of the leading dimensions.

    Returns:
        A scalar or the leading dimensions; differentiable as :func:`chamfer_distance`.
    """
    op = "chamfer_distance_patches"
    for name, cloud in (("x", x), ("y", y)):
        if not isinstance(cloud, Tensor) or cloud.dim() < 3 or cloud.shape[-1] != 3:
            raise ValueError(f"{op}: {name} must be [..., K, 3] with at least one leading dimension, got {_checks.describe(cloud)}")
    leading = x.shape[:-2]
    if y.shape[:-2] != leading:
        raise ValueError(f"{op}: x and y must have the same leading dimensions, got {list(x.shape)} and {list(y.shape)}")
    if x.dim() > 3:
        x, y = x.flatten(0, -3), y.flatten(0, -3)
        weights = weights.flatten() if isinstance(weights, Tensor) and weights.shape == leading else weights
    x = _checks.points(op, "x", x, False)
    y = _checks.points(op, "y", y, False, like=x)
    loss = _distance(op, x, y, None, None, None, None, norm, direction, reduction, weights)
    return loss.view(leading) if reduction == "none" and len(leading) > 1 else loss
