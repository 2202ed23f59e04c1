"""Neighbour maps of sparse voxels: which input voxel lies under which place of a convolution kernel."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from geossl.ops import _checks, _dispatch, _native
from geossl.ops._native import INT, INT64, PTR
from geossl.ops.reference import sparse as reference

_OP = "neighbor_map"
_INT32 = (-(2**31), 2**31 - 1)


class NeighborMap(NamedTuple):
    """Result of :func:`neighbor_map`."""

    index: Tensor  # type: ignore[assignment]  # hides tuple.index, which nobody needs here
    """Input row under every kernel place of every output voxel, ``[K, Vo]`` int64, -1 where there is no voxel."""
    coords: Tensor
    """Output voxels ``[Vo, 4]`` int32 (batch, x, y, z)."""
    offsets: Tensor
    """Offset of every kernel place from ``stride * coords``, ``[K, 3]`` int64 (x, y, z), dilation included."""


# keys, count, bits, sorted, order
_sort_c = _native.function("cpu", "geossl_sort_keys_cpu", INT, PTR, INT64, INT, PTR, PTR)
# keys, order, count, wanted, rows, count of wanted, shifts, count of shifts, out
_find_c = _dispatch.functions("find_keys", PTR, PTR, INT64, PTR, PTR, INT64, PTR, INT64, PTR)


def _sort_keys(kind: Any, keys: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    if kind == "cuda":
        return reference.sort_keys(keys)
    keys = keys.contiguous()
    ordered, order = torch.empty_like(keys), torch.empty_like(keys)
    _sort_c(_native.threads(), keys.data_ptr(), keys.shape[0], bits, ordered.data_ptr(), order.data_ptr())
    return ordered, order


def _find_keys(kind: Any, keys: Tensor, order: Tensor, wanted: Tensor, rows: Tensor | None, shifts: Tensor) -> Tensor:
    out = keys.new_empty(shifts.shape[0], wanted.shape[0])
    _find_c[kind](
        *_dispatch.place(kind, keys), keys.data_ptr(), order.data_ptr(), keys.shape[0], wanted.data_ptr(), _dispatch.pointer(rows),
        wanted.shape[0], shifts.data_ptr(), shifts.shape[0], out.data_ptr(),
    )  # fmt: skip
    return out


def _axis_offsets(size: int, dilation: int) -> list[int]:
    """Offsets along one axis: the centre is the middle place, of an even number the one before the middle."""
    return [dilation * (place - (size - 1) // 2) for place in range(size)]


class _Grid:
    """Packs (batch, x, y, z) into one ascending number, with room for the kernel around the voxels.

    Since no offset leaves that room, a neighbour's key is the voxel's key plus a constant, and keys are ordered as coordinates are.
    """

    def __init__(self, coords: Tensor, reach: list[int], shrinks: bool) -> None:
        low, high = ([int(v) for v in bound] for bound in torch.aminmax(coords.long(), dim=0)) if len(coords) else ([0] * 4, [0] * 4)
        if min(low) < _INT32[0] or max(high) > _INT32[1]:
            raise ValueError(f"{_OP}: coords must lie in the range of int32, but they go from {low} to {high}")
        room = [0, *reach]
        self.low = [a - r for a, r in zip(low, room, strict=True)]
        self.extent = [b - a + 1 + 2 * r for a, b, r in zip(low, high, room, strict=True)]
        self.cells = math.prod(self.extent)
        if self.cells >= 2**63:
            raise ValueError(
                f"{_OP}: the voxels span {' x '.join(map(str, self.extent))} cells (batch, x, y, z, with the kernel's reach), more than "
                f"63 bits can number; their coordinates go from {low} to {high}. Use larger voxels, or take out far-away ones"
            )
        if (
            shrinks
            and len(coords)
            and (min(self.low[1:]) < _INT32[0] or max(a + n for a, n in zip(self.low, self.extent, strict=True)) > _INT32[1])
        ):
            raise ValueError(f"{_OP}: output coordinates could leave the range of int32, as coords go from {low} to {high}")
        self.unit = [math.prod(self.extent[axis + 1 :]) for axis in range(4)]

    def pack(self, coords: Tensor) -> Tensor:
        key = torch.zeros(coords.shape[0], dtype=torch.int64, device=coords.device)
        for axis in range(4):
            key += (coords[:, axis].long() - self.low[axis]) * self.unit[axis]
        return key

    def coordinate(self, key: Tensor, axis: int) -> Tensor:
        place = key // self.unit[axis]
        return (place % self.extent[axis] if axis else place) + self.low[axis]


def _strided_keys(grid: _Grid, keys: Tensor, kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int]) -> Tensor:
    """Return the keys of ``stride * o`` for every output voxel o that has an input voxel under its kernel, with repetitions.

    A kernel is the product of its axes, so one axis after the other is shifted to multiples of the stride.
    """
    for axis in range(3):
        place = grid.coordinate(keys, axis + 1)
        shifts = _axis_offsets(kernel[axis], dilation[axis])
        keys = torch.cat([keys[(place - shift) % stride[axis] == 0] - shift * grid.unit[axis + 1] for shift in shifts])
    return keys


def _compute(
    coords: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    sort: Callable[..., Any],
    find: Callable[..., Any],
) -> tuple[Tensor, Tensor]:
    reach = [(size - 1) * d for size, d in zip(kernel, dilation, strict=True)]
    submanifold = all(s == 1 for s in stride)
    grid = _Grid(coords, reach, shrinks=not submanifold)
    bits = (grid.cells - 1).bit_length()
    keys, order = sort(grid.pack(coords), bits)
    _check_distinct(coords, keys, order)
    axes = [_axis_offsets(size, d) for size, d in zip(kernel, dilation, strict=True)]
    shifts = torch.tensor([sum(o * u for o, u in zip(offset, grid.unit[1:], strict=True)) for offset in itertools.product(*axes)])
    shifts = shifts.to(coords.device)
    if submanifold:
        return find(keys, order, keys, order, shifts), coords.new_empty(0, 4)
    outputs = torch.unique_consecutive(sort(_strided_keys(grid, keys, kernel, stride, dilation), bits)[0])
    columns = [grid.coordinate(outputs, axis) for axis in range(4)]
    columns[1:] = [torch.div(c, s, rounding_mode="floor") for c, s in zip(columns[1:], stride, strict=True)]
    return find(keys, order, outputs, None, shifts), torch.stack(columns, 1).int()


def _check_distinct(coords: Tensor, keys: Tensor, order: Tensor) -> None:
    """Refuse voxels that occur twice; the size of the result has been waited for anyway, so this is checked on every device."""
    equal = (keys.diff() == 0).nonzero().flatten()
    if len(equal):
        first, second = order[equal[0]], order[equal[0] + 1]
        raise ValueError(
            f"{_OP}: coords must be distinct, but {len(equal)} repeat others: rows {int(first)} and {int(second)} are both "
            f"{coords[first].tolist()}; merge such rows first, by torch.unique(coords, dim=0, return_inverse=True) and scatter_reduce"
        )


def _map_native(kind: Any, coords: Tensor, kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int]) -> tuple[Tensor, Tensor]:
    return _compute(
        coords, kernel, stride, dilation, lambda keys, bits: _sort_keys(kind, keys, bits), lambda *arguments: _find_keys(kind, *arguments)
    )


def _map_twin(coords: Tensor, kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int]) -> tuple[Tensor, Tensor]:
    return _compute(coords, kernel, stride, dilation, lambda keys, bits: reference.sort_keys(keys), reference.find_keys)


def _map_fake(coords: Tensor, kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int]) -> tuple[Tensor, Tensor]:
    submanifold = all(s == 1 for s in stride)
    count = coords.shape[0] if submanifold else torch.library.get_ctx().new_dynamic_size()
    return coords.new_empty(math.prod(kernel), count, dtype=torch.int64), coords.new_empty(0 if submanifold else count, 4)


_neighbor_map = _dispatch.define(
    "neighbor_map(Tensor coords, int[] kernel_size, int[] stride, int[] dilation) -> (Tensor, Tensor)",
    native=_map_native,
    twin=_map_twin,
    fake=_map_fake,
    autocast=None,
)


def _triple(name: str, given: Any) -> list[int]:
    values = list(given) if isinstance(given, (tuple, list)) else [given] * 3
    if len(values) != 3:
        raise ValueError(f"{_OP}: {name} must be one whole number or three (x, y, z), got {given!r}")
    return [_checks.positive(_OP, name, value) for value in values]


def neighbor_map(
    coords: Tensor,
    kernel_size: int | Sequence[int] = 3,
    stride: int | Sequence[int] = 1,
    dilation: int | Sequence[int] = 1,
) -> NeighborMap:
    """Find the input voxel under every place of a convolution kernel, for every output voxel.

    Place k of the kernel has the offset ``offsets[k]``, and ``index[k, o]`` is the row of the input voxel at
    ``stride * coords_out[o] + offsets[k]``. Places are in the order of ``weight.flatten(2)`` of ``torch.nn.Conv3d`` over (x, y, z).
    Along an axis of n places the offsets are ``dilation * (-((n - 1) // 2), ..., n // 2)``: -1, 0, 1 for 3, and 0, 1 for 2, so that
    kernel 2 with stride 2 pools the cells ``coords // 2``.

    * Stride 1: a submanifold convolution (Graham et al. 2018). Output voxels are the input voxels in their order.
    * Any other stride: a strided convolution. An output voxel is there if an input voxel lies under its kernel; output voxels are in
      lexicographic order. The grid has no borders: crop ``coords`` to have those of a dense convolution.

    The convolution itself is ``torch.einsum("kvc,kcd->vd", group(feats, index), weight)``. Exact, deterministic, not differentiable.

    Args:
        coords: Voxels ``[V, 4]`` int32 or int64 (batch, x, y, z), in any order, negative ones too, each once.
        kernel_size: Places along the axes, one number or three; even ones too.
        stride: Distance of output voxels in input cells, one number or three.
        dilation: Distance of the kernel's places in input cells, one number or three.

    Returns:
        ``index [K, Vo]`` int64, ``coords [Vo, 4]`` int32 and ``offsets [K, 3]`` int64. On CUDA the call waits for the device once or
        twice: for the extent of the voxels, and for the number of output voxels.

    Raises:
        ValueError: a shape or number is wrong, voxels repeat, or they span more cells than 63 bits can number; TypeError: a type is.

    Example:
        >>> neighbor_map(torch.tensor([[0, 5, 5, 5], [0, 5, 5, 6]], dtype=torch.int32), kernel_size=(1, 1, 3)).index
        tensor([[-1,  0],
                [ 0,  1],
                [ 1, -1]])
    """
    if not isinstance(coords, Tensor) or coords.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{_OP}: coords must be an int32 or int64 tensor (batch, x, y, z), got {_checks.describe(coords)}")
    if coords.dim() != 2 or coords.shape[1] != 4:
        raise ValueError(f"{_OP}: coords must be [V, 4] (batch, x, y, z), got {_checks.describe(coords)}")
    kernel, steps, spread = (
        _triple(name, given) for name, given in (("kernel_size", kernel_size), ("stride", stride), ("dilation", dilation))
    )
    index, out = _neighbor_map(coords, kernel, steps, spread)
    offsets = list(itertools.product(*(_axis_offsets(size, d) for size, d in zip(kernel, spread, strict=True))))
    submanifold = all(step == 1 for step in steps)
    return NeighborMap(index, (coords if submanifold else out).int(), torch.tensor(offsets, device=coords.device))
