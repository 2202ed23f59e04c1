"""Neighbour search in large clouds on CUDA: a hierarchy of boxes over points sorted along a Morton curve (``cuda_ext/cuda/tree.cu``).

Points are sorted here, by torch's own sort, in rounds: a round cuts the bounding cube of every group of points into 1024**3 cells along a
Morton curve, and the points of one cell are a group of the next round, whose cube is drawn around them anew. So neither a far outlier nor a
dense spot leaves many different points in one cell, and equal points stay together in index order.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from geossl.ops import _dispatch, _native
from geossl.ops._native import DOUBLE, INT, INT64, PTR

ROUNDS = 3
FANOUT = 32  # points in a leaf, and boxes under a box

# When the tree pays, from sizes alone, as reading lengths would wait for the GPU. Comparing all pairs costs about 25 instructions per 32
# pairs. A query in the tree costs about 60 for each of some 15 groups of boxes and leaves, as comparing with 1,000 to 2,000 points does,
# and building it about 40 launches, 0.3 ms, in which a large GPU (4 * 132 instructions per cycle) compares 2**29 pairs. Both are estimates
# by arithmetic with a margin of two, not measurements.
SMALLEST_CLOUD = 4096
FEWEST_PAIRS = 1 << 30
POINTS_PER_NEIGHBOR = 16  # points there must be for each wanted neighbour

_LARGEST = 1 << 30  # rows; beyond, keys or 32-bit rows might not do

_PLACE = (INT, PTR, INT)  # device, stream, dtype
_CLOUDS = (PTR, PTR, PTR, INT64, INT64)  # points, offsets, lengths, n, batch
_TREE = (PTR, INT64, PTR, PTR, PTR, PTR)  # leaf_begin, leaves, coordinates, rows, boxes, numbers
# order, group, groups, bounds, key
_keys_c = _native.function("cuda", "geossl_tree_keys_cuda", *_PLACE, *_CLOUDS, PTR, PTR, INT64, PTR, PTR)
_build_c = _native.function("cuda", "geossl_tree_build_cuda", *_PLACE, *_CLOUDS, PTR, *_TREE)
# query, query_offsets, query_lengths, queries; k, radius, radii, exclude_self, first, repeat; distance, index, count
_search_c = _native.function(
    "cuda", "geossl_tree_search_cuda", *_PLACE, PTR, PTR, PTR, INT64, *_CLOUDS, INT64, DOUBLE, PTR, INT, INT, INT, *_TREE, PTR, PTR, PTR
)


def pays(query: Tensor, points: Tensor, k: int, offsets: Tensor | None) -> bool:
    """Return whether building a tree is less work than comparing all pairs."""
    rows, queries = points.numel() // 3, query.numel() // 3
    cloud = rows // max(1, points.shape[0] if offsets is None else offsets.shape[0] - 1)
    return cloud >= max(SMALLEST_CLOUD, POINTS_PER_NEIGHBOR * k) and queries * cloud >= FEWEST_PAIRS and rows <= _LARGEST


def _order(points: Tensor, clouds: tuple[Any, ...], offsets: Tensor | None) -> Tensor:
    """Return the rows of contiguous ``points`` sorted along the curve within their clouds, invalid ones and padding last, ``[rows]``."""
    rows, batch = points.numel() // 3, clouds[-1]
    order = torch.arange(rows, device=points.device)
    group = order // points.shape[-2] if offsets is None else (torch.searchsorted(offsets, order, right=True) - 1).clamp(0, batch)
    bounds = torch.empty(max(rows, batch + 1) * 6, dtype=points.dtype, device=points.device)
    for again in reversed(range(ROUNDS)):
        key = torch.empty_like(order)
        _keys_c(
            *_dispatch.place("cuda", points), points.dtype == torch.float64, *clouds, order.data_ptr(), group.data_ptr(),
            bounds.numel() // 6, bounds.data_ptr(), key.data_ptr(),
        )  # fmt: skip
        key, moved = torch.sort(key, stable=True)
        order = order[moved]
        if again:
            group = torch.zeros_like(key)
            torch.cumsum(key[1:] != key[:-1], 0, out=group[1:])
    return order


def _nodes(leaves: int) -> int:
    """Number of boxes over so many leaves: levels are rounded up to whole groups of 32, the last level is one group."""
    nodes, level = 0, leaves
    while True:
        level = -(-level // FANOUT) * FANOUT
        nodes += level
        if level == FANOUT:
            return nodes
        level = level // FANOUT


class Tree(NamedTuple):
    """Workspaces of a tree, laid out in ``cuda_ext/cuda/tree.cu``."""

    leaf_begin: Tensor  # first leaf of each cloud, and the end, [B + 1]
    leaves: int  # of all clouds, at most
    coordinates: Tensor  # x, y and z of the slots, [3, leaves, 32]
    rows: Tensor  # row within its cloud of the point in a slot, -1 for none, [leaves, 32]
    boxes: Tensor  # low x, y, z and high x, y, z of the nodes, [6, nodes]; leaves come first
    numbers: Tensor  # lowest row in a node and number of its points, [2, nodes]

    def arguments(self) -> tuple[Any, ...]:
        """Return what the C functions take."""
        begin, leaves, *workspaces = self
        return begin.data_ptr(), leaves, *(workspace.data_ptr() for workspace in workspaces)


def build(points: Tensor, lengths: Tensor | None, offsets: Tensor | None) -> Tree:
    """Build the trees of a batch of clouds with at least one row; tensors are contiguous and checked."""
    device, n, rows = points.device, points.shape[-2], points.numel() // 3
    batch = points.shape[0] if offsets is None else offsets.shape[0] - 1
    clouds = (points.data_ptr(), _dispatch.pointer(offsets), _dispatch.pointer(lengths), n, batch)
    order = _order(points, clouds, offsets)
    if offsets is None:
        leaves = batch * -(-n // FANOUT)
        leaf_begin = torch.arange(0, leaves + 1, leaves // batch, device=device)
    else:
        leaves = rows // FANOUT + batch  # sizes are not read
        leaf_begin = torch.zeros_like(offsets)
        torch.cumsum((offsets.diff().clamp(min=0) + (FANOUT - 1)) // FANOUT, 0, out=leaf_begin[1:])
        leaf_begin.clamp_(max=leaves)
    nodes = _nodes(leaves)
    tree = Tree(
        leaf_begin,
        leaves,
        points.new_empty(3, leaves, FANOUT),
        torch.empty(leaves, FANOUT, dtype=torch.int32, device=device),
        points.new_empty(6, nodes),
        torch.empty(2, nodes, dtype=torch.int32, device=device),
    )
    _build_c(*_dispatch.place("cuda", points), points.dtype == torch.float64, *clouds, order.data_ptr(), *tree.arguments())
    return tree


def search(
    query: Tensor, points: Tensor, k: int, query_lengths: Tensor | None, lengths: Tensor | None, query_offsets: Tensor | None,
    offsets: Tensor | None, radius: float, radii: Tensor | None, exclude_self: bool, first: bool, repeat: bool, distance: Tensor,
    index: Tensor, count: Tensor | None,
) -> None:  # fmt: skip
    """Fill ``distance``, ``index`` and ``count`` as the operators ``knn`` and ``ball_query`` do; tensors are contiguous and checked."""
    pointer = _dispatch.pointer
    batch = points.shape[0] if offsets is None else offsets.shape[0] - 1
    if points.numel() == 0 or batch == 0:
        distance.fill_(torch.inf)
        index.fill_(-1)
        if count is not None:
            count.zero_()
        return
    tree = build(points, lengths, offsets)
    _search_c(
        *_dispatch.place("cuda", points), points.dtype == torch.float64, query.data_ptr(), pointer(query_offsets), pointer(query_lengths),
        query.shape[-2], points.data_ptr(), pointer(offsets), pointer(lengths), points.shape[-2], batch, k, radius, pointer(radii),
        exclude_self, first, repeat, *tree.arguments(), distance.data_ptr(), index.data_ptr(), pointer(count),
    )  # fmt: skip
