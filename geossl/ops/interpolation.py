"""Interpolation of features: weighted sums over neighbours, the step up in every encoder-decoder on points."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from geossl.ops import _checks, _dispatch
from geossl.ops._native import INT, INT64, PTR
from geossl.ops.grouping import _check_features, _check_index_values
from geossl.ops.neighbors import knn
from geossl.ops.reference import interpolation as reference

# dtype, features, channels, n, batch, index, weight, queries, k, out
_interpolate_c = _dispatch.functions("interpolate", INT, PTR, INT64, INT64, INT64, PTR, PTR, INT64, INT64, PTR)
# dtype, grad, features, channels, n, batch, index, weight, queries, k, order, starts, grad_features, grad_weight
_backward_c = _dispatch.functions("interpolate_backward", INT, PTR, PTR, INT64, INT64, INT64, PTR, PTR, INT64, INT64, *[PTR] * 4)


def _sizes(features: Tensor, index: Tensor) -> tuple[int, int, int, int, int]:
    """Return channels, rows and clouds of the features, and queries of each cloud and their neighbours."""
    batch, k = features.shape[0] if features.dim() == 3 else 1, index.shape[-1]
    return features.shape[-1], features.shape[-2], batch, index.shape[:-1].numel() // max(batch, 1), k


def _native(kind: Any, features: Tensor, index: Tensor, weight: Tensor) -> Tensor:
    if kind == "cuda" and _checks.read_values(features):
        _check_index_values("interpolate", features, index)
    features, index, weight = features.contiguous(), index.contiguous(), weight.contiguous()
    out = _fake(features, index, weight)
    channels, n, batch, queries, k = _sizes(features, index)
    try:
        _interpolate_c[kind](
            *_dispatch.place(kind, features), features.dtype == torch.float64, features.data_ptr(), channels, n, batch, index.data_ptr(),
            weight.data_ptr(), queries, k, out.data_ptr(),
        )  # fmt: skip
    except ValueError:  # the CPU kernel reads all indices before it starts
        _check_index_values("interpolate", features, index)
        raise
    return out


def _twin(features: Tensor, index: Tensor, weight: Tensor) -> Tensor:
    if _checks.read_values(features):
        _check_index_values("interpolate", features, index)
    return reference.interpolate(features, index, weight)


def _fake(features: Tensor, index: Tensor, weight: Tensor) -> Tensor:
    return features.new_empty((*index.shape[:-1], features.shape[-1]))


def _backward_native(kind: Any, grad: Tensor, features: Tensor, index: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    grad, features, index, weight = grad.contiguous(), features.contiguous(), index.contiguous(), weight.contiguous()
    grad_features, grad_weight = torch.empty_like(features), torch.empty_like(weight)
    channels, n, batch, queries, k = _sizes(features, index)
    order, starts = _dispatch.inverse(index, batch, n) if kind == "cuda" else (None, None)
    _backward_c[kind](
        *_dispatch.place(kind, features), features.dtype == torch.float64, grad.data_ptr(), features.data_ptr(), channels, n, batch,
        index.data_ptr(), weight.data_ptr(), queries, k, *map(_dispatch.pointer, (order, starts, grad_features, grad_weight)),
    )  # fmt: skip
    return grad_features, grad_weight


_interpolate = _dispatch.define(
    "interpolate(Tensor features, Tensor index, Tensor weight) -> Tensor",
    native=_native,
    twin=_twin,
    fake=_fake,
    autocast=None,
)
_interpolate_backward = _dispatch.define(
    "interpolate_backward(Tensor grad, Tensor features, Tensor index, Tensor weight) -> (Tensor, Tensor)",
    native=_backward_native,
    twin=reference.interpolate_backward,
    fake=lambda grad, features, index, weight: (torch.empty_like(features), torch.empty_like(weight)),
    autocast=None,
)


def _save(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    # With create_graph, the twin: it is made of differentiable torch operations.
    formula = reference.interpolate_backward if torch.is_grad_enabled() else _interpolate_backward
    grad_features, grad_weight = formula(grad, *ctx.saved_tensors)
    return grad_features, None, grad_weight


torch.library.register_autograd("geossl::interpolate", _backward, setup_context=_save, lib=_dispatch.LIBRARY)


def interpolate(features: Tensor, index: Tensor, weight: Tensor) -> Tensor:
    """Sum the features of neighbours, each times a weight: ``out[q] = sum_j weight[q, j] * features[index[q, j]]``.

    The neighbours' features are never held in memory together, and of entries with index -1 neither features nor weight are read: a NaN
    there does no harm.

    Args:
        features: ``[B, N, C]`` with indices local to each cloud, or packed ``[M, C]`` with indices of rows; any floating type.
        index: ``[B, ..., k]`` or, packed, ``[..., k]``; int64 or int32. -1 means no neighbour, which counts as 0.
        weight: Of the shape of ``index``, any floating type.

    Returns:
        ``[*index.shape[:-1], C]`` of the type of ``features``; sums run from the first neighbour to the last, in float32 for half types.
        Differentiable in ``features`` and ``weight``, twice; the gradient is deterministic on every device.

    Raises:
        ValueError: shapes do not match, or an index is out of range (on CUDA only checked with ``GEOSSL_CHECKS=1``).

    Example:
        >>> interpolate(torch.tensor([[1.0], [10.0]]), torch.tensor([[0, 1], [1, -1]]), torch.tensor([[0.5, 0.25], [2.0, 9.0]]))
        tensor([[ 3.],
                [20.]])
    """
    index = _check_features("interpolate", features, index)
    if not features.is_floating_point():
        raise TypeError(f"interpolate: features must be floating, got {_checks.describe(features)}; convert them with .float()")
    if index.dim() < features.dim() - 1:
        raise ValueError(f"interpolate: index must be [..., k], with one row of k per query, got {_checks.describe(index)}")
    if not isinstance(weight, Tensor) or weight.shape != index.shape or not weight.is_floating_point():
        raise ValueError(
            f"interpolate: weight must be floating with one number per index, {list(index.shape)}, got {_checks.describe(weight)}"
        )
    _checks.same_device("interpolate", "weight", weight, features)
    wide = torch.float64 if features.dtype == torch.float64 else torch.float32
    return _interpolate(features.to(wide), index, weight.to(wide)).to(features.dtype)


def three_nn_interpolate(
    query: Tensor,
    points: Tensor,
    features: Tensor,
    *,
    k: int = 3,
    eps: float = 1e-8,
    query_lengths: Tensor | None = None,
    lengths: Tensor | None = None,
    query_offsets: Tensor | None = None,
    offsets: Tensor | None = None,
) -> Tensor:
    """Carry features from points to queries: the mean of the k nearest points' features, weighted by ``1 / (squared distance + eps)``.

    The feature propagation of PointNet++ and its descendants. Weights are normalised over the neighbours that exist, so clouds of one or
    two points work; a query of an empty cloud, an invalid one and one in the padding get zeros.

    Args:
        query: Where features are wanted, ``[B, Q, 3]`` or packed ``[Mq, 3]``, float32 or float64 (half types are upcast to float32).
        points: Where features are known, ``[B, N, 3]`` or packed ``[M, 3]``, same type and device.
        features: Their features, ``[B, N, C]`` or packed ``[M, C]``, any floating type.
        k: Neighbours per query, at least 1.
        eps: Positive number added to squared distances, so that a query at a point takes that point's features.
        query_lengths: Queries in each padded cloud, ``[B]``; None means Q.
        lengths: Points in each padded cloud, ``[B]``; None means N.
        query_offsets: First row of each packed cloud of queries, and the end: ``[B + 1]``; given together with ``offsets``.
        offsets: The same for the points, ``[B + 1]``.

    Returns:
        ``[B, Q, C]`` or packed ``[Mq, C]`` of the type of ``features``; differentiable in all three, twice.

    Raises:
        ValueError: a shape, device or value is wrong; TypeError: a type is. Values on CUDA are only checked with ``GEOSSL_CHECKS=1``.

    Example:
        >>> points = torch.tensor([[[0.0, 0, 0], [1, 0, 0]]])
        >>> three_nn_interpolate(torch.tensor([[[0.5, 0.0, 0.0]]]), points, torch.tensor([[[2.0], [4.0]]]))
        tensor([[[3.]]])
    """
    op = "three_nn_interpolate"
    if isinstance(eps, bool) or not isinstance(eps, (int, float)) or not 0 < eps < float("inf"):
        raise ValueError(f"{op}: eps must be a positive number, got {_checks.describe(eps)}")
    points = _checks.points(op, "points", points, offsets is not None)
    if not isinstance(features, Tensor) or features.shape[:-1] != points.shape[:-1]:
        raise ValueError(f"{op}: features must have one row per point, {[*points.shape[:-1], 'C']}, got {_checks.describe(features)}")
    near = knn(
        query, points, k, query_lengths=query_lengths, lengths=lengths, query_offsets=query_offsets, offsets=offsets
    )  # missing neighbours are infinitely far: weight 0
    weight = 1 / (near.distance + eps)
    total = weight.sum(-1, keepdim=True)
    return interpolate(features, near.index, weight / torch.where(total > 0, total, 1.0))
