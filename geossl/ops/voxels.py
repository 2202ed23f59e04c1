"""Sparse voxels: numbering the occupied cells of a grid, and features of voxels from points and back."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from geossl.errors import unknown_name
from geossl.ops import _checks, _dispatch, _native
from geossl.ops._native import INT, INT64, PTR
from geossl.ops.grouping import group
from geossl.ops.interpolation import interpolate
from geossl.ops.reference import voxels as reference
from geossl.ops.segments import reduce_rows

ORDERS = ("lexicographic", "morton", "hilbert", "first")
REDUCTIONS = ("sum", "mean", "max", "min")
_LAST_CELL = 2**31 - 1
_MOST_KEYS = 2.0**63 - 2.0**20  # below 2 ** 63 by more than a product of three float64 is off


class VoxelMap(NamedTuple):
    """Result of :func:`voxelize`: which voxels there are, and which points each of them holds."""

    coords: Tensor
    """``[V, 4]`` int32: number of the cloud, then the cell along x, y, z (negative below the origin)."""
    inverse: Tensor
    """Voxel of every point, ``[B, N]`` or packed ``[M]`` int64, counted over the whole batch; -1 for points that were dropped."""
    counts: Tensor
    """Points in each voxel, ``[V]`` int64, at least 1."""
    row_splits: Tensor
    """``[V + 1]`` int64: ``perm[row_splits[v]:row_splits[v + 1]]`` are the points of voxel v."""
    perm: Tensor
    """``[kept]`` int64: rows of ``points.reshape(-1, 3)`` sorted by voxel, and within a voxel by row."""
    voxel_size: tuple[float, float, float]
    """Edges of a voxel."""
    origin: tuple[float, float, float]
    """Corner of cell (0, 0, 0)."""


# dtype, points, offsets, lengths, n, batch
_CLOUDS = (INT, PTR, PTR, PTR, INT64, INT64)
# clouds, range, parts, bounds
_bounds_c = _dispatch.functions("voxel_bounds", *_CLOUDS, PTR, INT64, PTR)
# clouds, grid, bounds, frames, order, first, total, max_points, scratch...
_JOB = (*_CLOUDS, PTR, PTR, PTR, INT, INT, INT64, INT64, PTR)
# job, info
_count_c = _native.function("cpu", "geossl_voxel_count_cpu", INT, *_JOB, PTR)
# job, voxels, coords, inverse, counts, row_splits, perm
_fill_c = _native.function("cpu", "geossl_voxel_fill_cpu", INT, *_JOB, INT64, PTR, PTR, PTR, PTR, PTR)
# clouds, grid, bounds, frames, order, total, wide, keys, rows
_keys_cuda = _native.function("cuda", "geossl_voxel_keys_cuda", INT, PTR, *_CLOUDS, PTR, PTR, PTR, INT, INT64, INT, PTR, PTR)
# wide, temp, temp_bytes, keys, sorted keys, rows, sorted rows, count, bits
_sort_cuda = _native.function("cuda", "geossl_sort_pairs_cuda", INT, PTR, INT, PTR, PTR, PTR, PTR, PTR, PTR, INT64, INT)
# wide, keys, count, total, heads
_heads_cuda = _native.function("cuda", "geossl_voxel_heads_cuda", INT, PTR, INT, PTR, INT64, INT64, PTR)
# wide, keys, rows, count, total, numbers, starts, firsts
_starts_cuda = _native.function("cuda", "geossl_voxel_starts_cuda", INT, PTR, INT, PTR, PTR, INT64, INT64, PTR, PTR, PTR)
# wide, keys, rows, count, total, numbers, starts, rank, row_splits, inverse, perm
_fill_cuda = _native.function("cuda", "geossl_voxel_fill_cuda", INT, PTR, INT, PTR, PTR, INT64, INT64, PTR, PTR, PTR, PTR, PTR, PTR)
# clouds, grid, perm, row_splits, voxels, coords
_coords_cuda = _native.function("cuda", "geossl_voxel_coords_cuda", INT, PTR, *_CLOUDS, PTR, PTR, PTR, INT64, PTR)
# clouds, grid, coords, voxels, table, slots, index, weight
_corners_c = _dispatch.functions("voxel_corners", *_CLOUDS, PTR, PTR, INT64, PTR, INT64, PTR, PTR)


# Voxel numbers ----------------------------------------------------------------------------------------------------------------------


def _batching(op: str, points: Tensor, lengths: Tensor | None, offsets: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    if lengths is not None:
        lengths = _checks.length_values(op, lengths, points.shape[-2])
    if offsets is not None:
        offsets = _checks.offset_values(op, offsets, points.shape[0])
    return lengths, offsets


def _clouds(points: Tensor, lengths: Tensor | None, offsets: Tensor | None) -> tuple[Any, ...]:
    """Return the C arguments that describe contiguous clouds."""
    batch = points.shape[0] if offsets is None else offsets.shape[0] - 1
    double = points.dtype == torch.float64
    return double, points.data_ptr(), _dispatch.pointer(offsets), _dispatch.pointer(lengths), points.shape[-2], batch


def _doubles(*values: list[float]) -> Tensor:
    return torch.tensor([number for part in values for number in part], dtype=torch.float64)


def _number_cells(bounds: Tensor, size: list[float], origin: list[float], order: str) -> tuple[Tensor, int]:
    """Number all cells within the bounds of every cloud, in the order of voxels.

    Args:
        bounds: ``[B, 6]`` float64 on the CPU: lowest and highest coordinates of each cloud's kept points; +inf, -inf when it has none.
        size: Edges of a voxel.
        origin: Corner of cell (0, 0, 0).
        order: Order of voxels.

    Returns:
        ``[B, 7]`` int64, ``VoxelFrame`` of ``cuda_ext/include/voxels.h``, and how many numbers there are.

    Raises:
        ValueError: cells beyond int32, or more than 63 bits of numbers.
    """
    box = bounds.view(-1, 2, 3)
    used = box[:, 0, 0] <= box[:, 1, 0]
    cells = torch.where(used.view(-1, 1, 1), reference.cells_of(box, size, origin), 0.0)
    if not bool((cells.abs() <= _LAST_CELL).all()):
        cloud = int((~(cells.abs() <= _LAST_CELL)).flatten(1).any(1).nonzero()[0])
        raise ValueError(
            f"voxelize: points of cloud {cloud} reach from {box[cloud, 0].tolist()} to {box[cloud, 1].tolist()}; with voxel_size {size} "
            f"and origin {origin} their cells go beyond int32. Use larger voxels, or drop far points with range="
        )
    low, extent = cells[:, 0].long(), (cells[:, 1] - cells[:, 0] + 1) * used.unsqueeze(1)
    curve = order in ("morton", "hilbert")
    bits = torch.frexp((extent.amax(1) - 1).clamp(min=0)).exponent.long()
    keys = torch.where(used, torch.exp2(3.0 * bits), 0.0) if curve else extent.prod(1)
    if len(keys) and float(keys.sum()) >= _MOST_KEYS:
        raise ValueError(
            f"voxelize: clouds extend over up to {[int(e) for e in extent.amax(0)]} voxels of size {size}; numbering all cells of "
            f"{len(keys)} clouds in order {order!r} takes more than 63 bits. Use larger voxels, or drop far points with range="
        )
    number, extent = keys.long(), extent.long()
    if not curve:
        number = extent.prod(1)  # exact
    base = number.cumsum(0) - number
    frames = torch.stack([base, *low.unbind(1), extent[:, 1] * extent[:, 2], extent[:, 2], bits], dim=1)
    return frames.contiguous(), int(number.sum())


def _bounds(kind: Any, points: Tensor, clouds: tuple[Any, ...], within: list[float]) -> Tensor:
    """Return the bounds of every cloud's kept points, ``[B, 6]`` float64."""
    batch, average = clouds[-1], points.numel() // 3 // max(clouds[-1], 1)
    parts = max(1, min(_native.threads(), average >> 18)) if kind == "cpu" else max(1, min(256, average >> 11))
    bounds = torch.empty(batch, parts, 6, dtype=torch.float64, device=points.device)
    limits = _doubles(within)  # kept in a name: a pointer does not keep its tensor alive
    _bounds_c[kind](*_dispatch.place(kind, points), *clouds, limits.data_ptr(), parts, bounds.data_ptr())
    if parts == 1:
        return bounds[:, 0]
    return torch.cat([bounds[..., :3].amin(1), bounds[..., 3:].amax(1)], dim=1)


def _voxelize_native(
    kind: Any, points: Tensor, lengths: Tensor | None, offsets: Tensor | None, size: list[float], origin: list[float],
    within: list[float], order: str, max_points: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    points = points.contiguous()
    lengths, offsets = _batching("voxelize", points, lengths, offsets)
    clouds = _clouds(points, lengths, offsets)
    bounds = _bounds(kind, points, clouds, within)
    frames, total = _number_cells(bounds.cpu(), size, origin, order)
    run = _voxelize_cpu if kind == "cpu" else _voxelize_cuda
    return run(points, clouds, _doubles(size, origin), bounds, frames.to(points.device), total, order, max_points)


def _outputs(points: Tensor, voxels: Any, kept: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Allocate coords, inverse, counts, row_splits and perm; the sizes may be symbolic."""
    sizes: tuple[Any, ...] = (points.shape[:-1], (voxels,), (voxels + 1,), (kept,))
    inverse, counts, row_splits, perm = (points.new_empty(size, dtype=torch.int64) for size in sizes)
    return points.new_empty((voxels, 4), dtype=torch.int32), inverse, counts, row_splits, perm


def _voxelize_cpu(
    points: Tensor, clouds: tuple[Any, ...], grid: Tensor, bounds: Tensor, frames: Tensor, total: int, order: str, max_points: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    curve = ("lexicographic", "morton", "hilbert").index(order) if order != "first" else 0
    bounds = bounds.contiguous()
    job = (
        *_dispatch.place("cpu", points), *clouds, grid.data_ptr(), bounds.data_ptr(), frames.data_ptr(), curve, order == "first", total,
        max_points,
    )  # fmt: skip
    info = torch.zeros(2, dtype=torch.int64)
    _count_c(*job, 0, info.data_ptr())
    scratch = torch.empty(max(int(info[0]), 1), dtype=torch.uint8)
    _count_c(*job, scratch.data_ptr(), info.data_ptr())
    voxels, kept = info.tolist()
    out = _outputs(points, voxels, kept)
    _fill_c(*job, scratch.data_ptr(), voxels, *(tensor.data_ptr() for tensor in out))
    return out


def _voxelize_cuda(
    points: Tensor, clouds: tuple[Any, ...], grid: Tensor, bounds: Tensor, frames: Tensor, total: int, order: str, max_points: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    count, device, place = points.numel() // 3, points.device, _dispatch.place("cuda", points)
    if count == 0 or total == 0:
        out = _outputs(points, 0, 0)
        out[1].fill_(-1)
        out[3].zero_()
        return out
    wide = total >= 2**32 - 1 or count >= 2**31 - 1
    key_type, row_type = (torch.int64, torch.int64) if wide else (torch.int32, torch.int32)
    keys, ordered = (torch.empty(count, dtype=key_type, device=device) for _ in range(2))
    rows, by_key = (torch.empty(count, dtype=row_type, device=device) for _ in range(2))
    curve = ("lexicographic", "morton", "hilbert").index(order) if order != "first" else 0
    bounds = bounds.contiguous()
    _keys_cuda(*place, *clouds, grid.data_ptr(), bounds.data_ptr(), frames.data_ptr(), curve, total, wide, keys.data_ptr(), rows.data_ptr())
    size = torch.zeros(1, dtype=torch.int64)  # of the temporary memory; stays on the host
    pairs = (keys.data_ptr(), ordered.data_ptr(), rows.data_ptr(), by_key.data_ptr(), count, total.bit_length())
    _sort_cuda(*place, wide, 0, size.data_ptr(), *pairs)
    temporary = torch.empty(max(int(size), 1), dtype=torch.uint8, device=device)
    _sort_cuda(*place, wide, temporary.data_ptr(), size.data_ptr(), *pairs)
    heads = torch.empty(count, dtype=torch.int64, device=device)
    _heads_cuda(*place, wide, ordered.data_ptr(), count, total, heads.data_ptr())
    numbers = heads.cumsum(0)
    voxels = int(numbers[-1])
    starts, firsts = (torch.empty(voxels + 1, dtype=torch.int64, device=device) for _ in range(2))
    _starts_cuda(
        *place, wide, ordered.data_ptr(), by_key.data_ptr(), count, total, numbers.data_ptr(), starts.data_ptr(), firsts.data_ptr()
    )
    counts = starts.diff().clamp(max=max_points)
    rank = None
    if order == "first":
        by_first = torch.argsort(firsts[:-1])
        rank = torch.argsort(by_first)
        counts = counts[by_first]
    row_splits = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    kept = int(row_splits[-1])
    coords, inverse, _, _, perm = _outputs(points, voxels, kept)
    _fill_cuda(
        *place, wide, ordered.data_ptr(), by_key.data_ptr(), count, total, numbers.data_ptr(), starts.data_ptr(),
        _dispatch.pointer(rank), row_splits.data_ptr(), inverse.data_ptr(), perm.data_ptr(),
    )  # fmt: skip
    _coords_cuda(*place, *clouds, grid.data_ptr(), perm.data_ptr(), row_splits.data_ptr(), voxels, coords.data_ptr())
    return coords, inverse, counts, row_splits, perm


def _voxelize_twin(
    points: Tensor, lengths: Tensor | None, offsets: Tensor | None, size: list[float], origin: list[float], within: list[float],
    order: str, max_points: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    lengths, offsets = _batching("voxelize", points, lengths, offsets)
    rows, bounds = points.reshape(-1, 3), []
    for begin, end in reference.spans(points, lengths, offsets):
        inside = rows[begin:end][reference.kept_rows(rows[begin:end], within)].double()
        ends = (inside.amin(0), inside.amax(0)) if len(inside) else (torch.full((3,), math.inf), torch.full((3,), -math.inf))
        bounds.append(torch.cat(ends).cpu())
    _number_cells(torch.stack(bounds).double() if bounds else torch.zeros(0, 6, dtype=torch.float64), size, origin, order)
    return reference.voxelize(points, lengths, offsets, size, origin, within, order, max_points)


def _voxelize_fake(points: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    context = torch.library.get_ctx()
    return _outputs(points, context.new_dynamic_size(), context.new_dynamic_size())


_voxelize = _dispatch.define(
    "voxelize(Tensor points, Tensor? lengths, Tensor? offsets, float[] size, float[] origin, float[] within, str order, int max_points)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    native=_voxelize_native,
    twin=_voxelize_twin,
    fake=_voxelize_fake,
)


def _three(op: str, name: str, value: Any) -> tuple[float, float, float]:
    """Check a number or three, for x, y and z."""
    try:
        numbers = (
            tuple(float(v) for v in value) if isinstance(value, (Sequence, Tensor)) and not isinstance(value, str) else (float(value),) * 3
        )
    except (TypeError, ValueError):
        raise TypeError(f"{op}: {name} must be a number or three of them (x, y, z), got {_checks.describe(value)}") from None
    if len(numbers) != 3:
        raise ValueError(f"{op}: {name} must be a number or three of them (x, y, z), got {len(numbers)}")
    return numbers[0], numbers[1], numbers[2]


def _grid(op: str, voxel_size: Any, origin: Any) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    size = _three(op, "voxel_size", voxel_size)
    if not all(0 < edge < math.inf for edge in size):
        raise ValueError(f"{op}: voxel_size must be positive and finite, got {voxel_size}")
    corner = (0.0, 0.0, 0.0) if origin is None else _three(op, "origin", origin)
    if not all(math.isfinite(value) for value in corner):
        raise ValueError(f"{op}: origin must be finite, got {origin}")
    return size, corner


def _within(value: Any) -> list[float]:
    """Check a range and return its six numbers, low x, y, z, then high."""
    if value is None:
        return [-math.inf] * 3 + [math.inf] * 3
    if not isinstance(value, (Sequence, Tensor)) or len(value) != 2:
        raise TypeError(f"voxelize: range must be ((x0, y0, z0), (x1, y1, z1)), got {_checks.describe(value)}")
    low, high = _three("voxelize", "range[0]", value[0]), _three("voxelize", "range[1]", value[1])
    if not all(a < b for a, b in zip(low, high, strict=True)):
        raise ValueError(f"voxelize: range must begin below its end on every axis, got {low} to {high}")
    return [*low, *high]


def voxelize(
    points: Tensor,
    voxel_size: float | Sequence[float],
    *,
    lengths: Tensor | None = None,
    offsets: Tensor | None = None,
    origin: Sequence[float] | None = None,
    range: tuple[Sequence[float], Sequence[float]] | None = None,  # the field's word for it
    order: Literal["lexicographic", "morton", "hilbert", "first"] = "lexicographic",
    max_points: int | None = None,
) -> VoxelMap:
    """Find the occupied voxels of clouds: their coordinates, and which points lie in each.

    A point p lies in the cell ``floor((p - origin) / voxel_size)``, computed in float64 by a true division: cells below the origin are
    negative, and every device gives the same.

    Args:
        points: ``[B, N, 3]``, or packed ``[M, 3]``; float32 or float64, half types are upcast. Not differentiable.
        voxel_size: Edge of a voxel, or three for x, y and z.
        lengths: Points of each padded cloud, ``[B]``; rows behind are never looked at.
        offsets: Where packed clouds begin and end, ``[B + 1]``.
        origin: Corner of cell (0, 0, 0); the default is (0, 0, 0) and not the lowest point, so that a point's voxel does not depend on the
            other points, and equal coordinates mean equal places in all clouds and calls.
        range: ``((x0, y0, z0), (x1, y1, z1))``: points outside ``low <= p < high`` are dropped.
        order: Order of voxels within a cloud; clouds follow each other. "lexicographic": by x, then y, then z. "morton" and "hilbert":
            along that curve through the cells counted from the cloud's lowest one, x in the highest bit of each triple; for
            models that cut the
            sequence into pieces. "first": by the first point of each voxel. All but "first" do not depend on the order of points.
        max_points: Points a voxel keeps at most, those with the lowest rows; None keeps all.

    Returns:
        A :class:`VoxelMap`. Points that are invalid (NaN, infinite), out of range or beyond ``max_points`` have inverse -1.

    Raises:
        ValueError: arguments do not fit together; a cell leaves -(2^31 - 1) .. 2^31 - 1; or the numbers of all cells within the bounds of
            all clouds take more than 63 bits ("morton" and "hilbert": the bounding cube, up to 20 bits an axis).

    Example:
        >>> voxelize(torch.tensor([[[0.1, 0.0, 0.0], [-0.1, 0.0, 0.0], [0.2, 0.0, 0.0]]]), 1.0).coords
        tensor([[ 0, -1,  0,  0],
                [ 0,  0,  0,  0]], dtype=torch.int32)
    """
    points = _checks.points("voxelize", "points", points, offsets is not None)
    lengths, offsets = _checks.batching("voxelize", points, lengths, offsets)
    size, corner = _grid("voxelize", voxel_size, origin)
    if order not in ORDERS:
        raise unknown_name("voxelize order", order, ORDERS)
    limit = 2**63 - 1 if max_points is None else _checks.positive("voxelize", "max_points", max_points)
    coords, inverse, counts, row_splits, perm = _voxelize(points, lengths, offsets, list(size), list(corner), _within(range), order, limit)
    return VoxelMap(coords, inverse, counts, row_splits, perm, size, corner)


# Features ---------------------------------------------------------------------------------------------------------------------------


def _features(op: str, name: str, value: Any, shape: Any, what: str) -> Tensor:
    """Check floating features with one row per entry of ``shape``."""
    if not isinstance(value, Tensor) or not value.is_floating_point():
        raise TypeError(f"{op}: {name} must be a floating tensor, got {_checks.describe(value)}")
    if value.dim() != len(shape) + 1 or value.shape[:-1] != shape:
        raise ValueError(f"{op}: {name} must be {[*shape, 'C']}, one row per {what} of the voxel map, got {_checks.describe(value)}")
    return value


def _check_map(op: str, voxel_map: Any) -> VoxelMap:
    if not isinstance(voxel_map, VoxelMap):
        raise TypeError(f"{op}: voxel_map must be the VoxelMap that voxelize returns, got {_checks.describe(voxel_map)}")
    return voxel_map


def voxel_reduce(features: Tensor, voxel_map: VoxelMap, reduce: Literal["mean", "sum", "max", "min"] = "mean") -> Tensor:
    """Reduce the features of the points in each voxel.

    Args:
        features: ``[B, N, C]`` or packed ``[M, C]``, as the points were given to :func:`voxelize`; any floating type.
        voxel_map: The points' voxels.
        reduce: "mean", "sum", "max" or "min". NaN wins over every number in "max" and "min".

    Returns:
        ``[V, C]`` of the type of ``features``. Sums run over the points of a voxel in order, in float32 for half types, and have the same
        bits for any number of threads. Differentiable, also twice: a point gets the gradient of its voxel, divided by the count for "mean";
        for "max" and "min" the lowest row that has the value gets all of it. Dropped points get none.

    Raises:
        TypeError, ValueError: features do not fit the map.
    """
    voxel_map = _check_map("voxel_reduce", voxel_map)
    features = _features("voxel_reduce", "features", features, voxel_map.inverse.shape, "point")
    _checks.same_device("voxel_reduce", "features", features, voxel_map.inverse)
    if reduce not in REDUCTIONS:
        raise unknown_name("voxel_reduce reduction", reduce, REDUCTIONS)
    inverse, row_splits, perm = voxel_map.inverse.reshape(-1), voxel_map.row_splits, voxel_map.perm
    return reduce_rows(features.flatten(0, -2), inverse, row_splits, perm, row_splits.shape[0] - 1, reduce)[0]


def _corners_native(
    kind: Any, points: Tensor, lengths: Tensor | None, offsets: Tensor | None, coords: Tensor, size: list[float], origin: list[float]
) -> tuple[Tensor, Tensor]:
    points, coords = points.contiguous(), coords.contiguous()
    lengths, offsets = _batching("devoxelize", points, lengths, offsets)
    index, weight = _corners_fake(points)
    table = torch.full((1 << (2 * len(coords)).bit_length(),), -1, dtype=torch.int64, device=points.device)
    grid = _doubles(size, origin)
    _corners_c[kind](
        *_dispatch.place(kind, points), *_clouds(points, lengths, offsets), grid.data_ptr(), coords.data_ptr(),
        coords.shape[0], table.data_ptr(), table.shape[0], index.data_ptr(), weight.data_ptr(),
    )  # fmt: skip
    return index, weight


def _corners_twin(points: Tensor, lengths: Tensor | None, offsets: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor]:
    return reference.voxel_corners(points, *_batching("devoxelize", points, lengths, offsets), *rest)


def _corners_fake(points: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    shape = points.shape[:-1]
    return points.new_empty(*shape, 8, dtype=torch.int64), points.new_empty(*shape, 8)


_corners = _dispatch.define(
    "voxel_corners(Tensor points, Tensor? lengths, Tensor? offsets, Tensor coords, float[] size, float[] origin) -> (Tensor, Tensor)",
    native=_corners_native,
    twin=_corners_twin,
    fake=_corners_fake,
)


def devoxelize(
    voxel_features: Tensor,
    voxel_map: VoxelMap,
    points: Tensor | None = None,
    mode: Literal["nearest", "trilinear"] = "nearest",
    *,
    lengths: Tensor | None = None,
    offsets: Tensor | None = None,
) -> Tensor:
    """Carry features of voxels back to points.

    Args:
        voxel_features: ``[V, C]``, any floating type.
        voxel_map: The voxels.
        points: For "trilinear": clouds of the same batch, ``[B, N, 3]`` or packed ``[M, 3]``; the voxelized ones or any others.
        mode: "nearest" gives each voxelized point the features of its voxel, 0 if it was dropped. "trilinear" blends the 8 voxels whose
            centres surround a point; weights of cells without voxel are shared out among the others, and where there is none, or the point
            is invalid, the result is 0.
        lengths: Points of each padded cloud, ``[B]``, for "trilinear".
        offsets: Where packed clouds begin and end, ``[B + 1]``, for "trilinear".

    Returns:
        ``[B, N, C]`` or ``[M, C]`` of the type of ``voxel_features``, blended in float32 for half types. Differentiable in
        ``voxel_features``, also twice, with gradients that are summed in a fixed order; not in ``points``.

    Raises:
        TypeError, ValueError: features or points do not fit the map or the mode.
    """
    voxel_map = _check_map("devoxelize", voxel_map)
    voxel_features = _features("devoxelize", "voxel_features", voxel_features, voxel_map.counts.shape, "voxel")
    _checks.same_device("devoxelize", "voxel_features", voxel_features, voxel_map.inverse)
    if mode not in ("nearest", "trilinear"):
        raise unknown_name("devoxelize mode", mode, ("nearest", "trilinear"))
    if mode == "nearest":
        if points is not None or lengths is not None or offsets is not None:
            raise ValueError('devoxelize: mode "nearest" serves the voxelized points; give others to mode="trilinear"')
        return group(voxel_features, voxel_map.inverse)
    if points is None:
        raise ValueError('devoxelize: mode "trilinear" needs the points at which to blend')
    points = _checks.points("devoxelize", "points", points, offsets is not None)
    _checks.same_device("devoxelize", "voxel_features", voxel_features, points)
    lengths, offsets = _checks.batching("devoxelize", points, lengths, offsets)
    grid = list(voxel_map.voxel_size), list(voxel_map.origin)
    index, weight = _corners(points.detach(), lengths, offsets, voxel_map.coords, *grid)
    return interpolate(voxel_features, index, weight)
