"""Peers of means over voxels, reductions by index and neighbour maps; :mod:`geossl.cli.benchmark.peers` says what a peer is.

Voxels are numbered by one key each, ``(x * cells + y) * cells + z``; voxel peers answer ``(keys [V], means [V, C])`` in any order.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from geossl.cli.benchmark.peers import Peers, importable

TABLE_CELLS = 1 << 24  # cells of a table over all places voxels may have: 128 MiB


def keys_of(cells: Tensor, per_axis: int) -> Tensor:
    """Number voxels ``[..., 3]`` by one int64 each."""
    x, y, z = cells.long().unbind(-1)
    return (x * per_axis + y) * per_axis + z


def voxel_mean_peers(points: Tensor, features: Tensor, size: float, per_axis: int) -> Peers:
    """Peers of the means of ``features [N, C]`` over voxels of ``points [N, 3]``, which lie in the unit cube."""

    def keys() -> Tensor:
        return keys_of((points / size).floor_(), per_axis)

    def of_unique() -> tuple[Tensor, Tensor]:
        found, inverse, count = keys().unique(return_inverse=True, return_counts=True)
        return found, features.new_zeros(len(found), features.shape[1]).index_add_(0, inverse, features).div_(count[:, None])

    def of_table() -> tuple[Tensor, Tensor]:
        all_keys = keys()
        count = torch.bincount(all_keys, minlength=per_axis**3)
        found = count.nonzero().squeeze(1)
        row = torch.empty_like(count)
        row[found] = torch.arange(len(found))
        sums = features.new_zeros(len(found), features.shape[1]).index_add_(0, row[all_keys], features)
        return found, sums.div_(count[found][:, None])

    def of_sorted() -> tuple[Tensor, Tensor]:
        ordered, order = keys().sort()
        found, count = ordered.unique_consecutive(return_counts=True)
        return found, torch.segment_reduce(features[order], "mean", lengths=count)

    peers: Peers = {"torch.unique + index_add_": of_unique, "torch.sort + segment_reduce": of_sorted}
    if per_axis**3 <= TABLE_CELLS:
        peers["torch table of cells + index_add_"] = of_table
    if torch_scatter := importable("torch_scatter"):

        def scattered() -> tuple[Tensor, Tensor]:
            found, inverse = keys().unique(return_inverse=True)
            return found, torch_scatter.scatter_mean(features, inverse, 0, dim_size=len(found))

        peers["torch.unique + torch_scatter.scatter_mean"] = scattered
    return peers | _package_peers(points, features, size, per_axis)


def _package_peers(points: Tensor, features: Tensor, size: float, per_axis: int) -> Peers:
    peers: Peers = {}
    if open3d := importable("open3d.ml.torch"):

        def pooled() -> tuple[Tensor, Tensor]:
            found = open3d.ops.voxel_pooling(points, features, size, position_fn="center", feature_fn="average")
            return keys_of((found.pooled_positions / size).floor_(), per_axis), found.pooled_features

        peers["open3d.ml.torch voxel_pooling"] = pooled
    if spconv := importable("spconv.pytorch.utils"):
        most = 32  # points per voxel; the others are dropped, so its means agree only where no voxel holds more

        def padded() -> tuple[Tensor, Tensor]:
            bounds = [0.0, 0.0, 0.0, *([per_axis * size] * 3)]
            voxels = min(len(points), per_axis**3)
            generator = spconv.PointToVoxel([size] * 3, bounds, 3 + features.shape[1], voxels, most, device=torch.device("cpu"))
            rows, cells, count = generator(torch.cat([points, features], dim=1))
            return keys_of(cells.flip(1), per_axis), rows[:, :, 3:].sum(1) / count[:, None]

        peers[f"spconv PointToVoxel (at most {most} points) + mean"] = padded
    return peers


def reduce_peers(values: Tensor, index: Tensor, size: int) -> Peers:
    """Peers of the means of ``values [M, C]`` by ``index [M]``: ``[size, C]``, zero where there is none."""
    wide = index[:, None].expand_as(values)

    def added() -> Tensor:
        count = torch.bincount(index, minlength=size).clamp_(min=1)
        return values.new_zeros(size, values.shape[1]).index_add_(0, index, values).div_(count[:, None])

    def reduced() -> Tensor:
        return values.new_zeros(size, values.shape[1]).scatter_reduce_(0, wide, values, "mean", include_self=False)

    peers: Peers = {"torch index_add_ + bincount": added, "torch scatter_reduce": reduced}
    if torch_scatter := importable("torch_scatter"):
        peers["torch_scatter.scatter_mean"] = functools.partial(torch_scatter.scatter_mean, values, index, 0, dim_size=size)
    return peers


def segment_peers(values: Tensor, row_splits: Tensor) -> Peers:
    """Peers of the means of ``values [M, C]`` over rows that follow each other: ``[len(row_splits) - 1, C]``."""
    lengths = row_splits.diff()
    owner = torch.arange(len(lengths)).repeat_interleave(lengths)

    def added() -> Tensor:
        sums = values.new_zeros(len(lengths), values.shape[1]).index_add_(0, owner, values)
        return sums.div_(lengths.clamp(min=1)[:, None])

    peers: Peers = {
        "torch.segment_reduce": lambda: torch.segment_reduce(values, "mean", lengths=lengths, initial=0),
        "torch index_add_": added,
    }
    if torch_scatter := importable("torch_scatter"):
        peers["torch_scatter.segment_csr"] = functools.partial(torch_scatter.segment_csr, values, row_splits, reduce="mean")
    return peers


def neighbor_map_peers(coords: Tensor, offsets: Tensor, per_axis: int) -> dict[str, Callable[[], Any]]:
    """Peers of the map of ``coords [V, 4]`` (cloud, x, y, z): rows ``[V, K]`` of the voxels at ``offsets [K, 3]``, else -1."""
    wide = per_axis + 2  # a border keeps neighbours beyond the last cell from wrapping around
    cloud = coords[:, :1].long() * wide**3
    neighbors = coords[:, None, 1:].long() + offsets + 1

    def searched() -> Tensor:
        keys = cloud[:, 0] + keys_of(coords[:, 1:] + 1, wide)
        wanted = cloud + keys_of(neighbors, wide)
        ordered, order = keys.sort()
        place = torch.searchsorted(ordered, wanted).clamp_(max=len(ordered) - 1)
        return torch.where(ordered[place] == wanted, order[place], -1)

    def looked_up() -> Tensor:
        table = torch.full((wide**3,), -1)
        table[keys_of(coords[:, 1:] + 1, wide)] = torch.arange(len(coords))
        return table[keys_of(neighbors, wide)]

    peers: dict[str, Callable[[], Any]] = {"torch.sort + searchsorted": searched}
    if wide**3 <= TABLE_CELLS and int(coords[:, 0].max()) == 0:
        peers["torch table of cells"] = looked_up
    return peers
