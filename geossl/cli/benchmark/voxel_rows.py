"""Rows of voxels, reductions and neighbour maps: part of the ``ops`` suite."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from geossl import ops
from geossl.cli.benchmark.clouds import KINDS, OFF_GRID, clouds
from geossl.cli.benchmark.measure import Case, nbytes
from geossl.cli.benchmark.neighbor_peers import radius_peers
from geossl.cli.benchmark.peers import TWIN_LIMIT, twin
from geossl.cli.benchmark.voxel_peers import keys_of, neighbor_map_peers, reduce_peers, segment_peers, voxel_mean_peers

SLOW_CALL = 0.2  # CPU seconds above which a call is sampled less often
MOVED = "inputs read and results written once"


def cases(quick: bool) -> dict[str, Callable[[], Case]]:
    """Return the cases by name."""
    found: dict[str, Callable[[], Case]] = {}

    def add(name: str, build: Callable[..., Case], sizes: list[tuple[Any, ...]], small: tuple[Any, ...]) -> None:
        for size in [small] if quick else sizes:
            found[name.format(*size)] = functools.partial(build, *size)

    voxels = [(100_000, 0.02, 32), (1_000_000, 0.02, 32), (1_000_000, 0.05, 32)]
    for kind in KINDS:
        add("voxelize + mean/{} at {}, {} channels/{}", _voxel_case, [(*size, kind) for size in voxels], (256, 0.2, 4, kind))
        add("radius_search/{} of {}/{}", _radius_case, [(4096, 100_000, kind)], (16, 128, kind))
        add("neighbor_map/{} voxels, kernel 3/{}", _map_case, [(100_000, kind)], (100, kind))
    for operator, build in (("scatter_reduce", _scatter_case), ("segment_reduce", _segment_case)):
        add(operator + " mean/{} x {} to {}", build, [(1_000_000, 32, 10_000)], (256, 4, 8))
    return found


def _voxel_case(n: int, size: float, channels: int, kind: str) -> Case:
    points = _off_the_faces(clouds(kind, 1, n), size)
    features = torch.randn(1, n, channels, generator=torch.Generator().manual_seed(0))
    per_axis = math.ceil(1 / size) + 1

    def call() -> tuple[Tensor, Tensor]:
        voxels = ops.voxelize(points, size)
        return keys_of(voxels.coords[..., -3:], per_axis), ops.voxel_reduce(features, voxels, "mean")

    peers = voxel_mean_peers(points[0], features[0], size, per_axis)
    if n <= TWIN_LIMIT // 64:
        peers["geossl.ops.reference"] = twin(call)
    voxels = len(call()[0])
    return Case(
        inputs=f"{n:,} points in {voxels:,} voxels of {size}, mean of {channels} channels",
        run=call,
        moved=nbytes(points, features) + 8 * n + 4 * voxels * channels,
        moved_is="points and features read, voxel of each point and means written",
        flop=n * channels,
        flop_is="one addition per value",
        peers=peers,
        differs=_voxels_differ,
        cloud=kind,
        slow=SLOW_CALL,
    )


def _off_the_faces(points: Tensor, size: float) -> Tensor:
    """Move points a little from the faces of voxels, where the peers' rounding, in float32, decides which voxel holds them."""
    cells = (points.double() / size).floor()
    within = (points.double() / size - cells).clamp(1e-3, 1 - 1e-3)
    return ((cells + within) * size).float()


def _scatter_case(n: int, channels: int, rows: int) -> Case:
    values, index = _values(n, channels), torch.randint(rows, (n,), generator=torch.Generator().manual_seed(1))

    def call() -> Tensor:
        return torch.as_tensor(ops.scatter_reduce(values, index, rows, "mean"))

    inputs = f"{n:,} x {channels} to {rows:,} rows in random order"
    return _reduction(inputs, values, index, rows, call, reduce_peers(values, index, rows))


def _segment_case(n: int, channels: int, rows: int) -> Case:
    values, index = _values(n, channels), torch.randint(rows, (n,), generator=torch.Generator().manual_seed(1))
    row_splits = torch.cat([torch.zeros(1, dtype=torch.int64), torch.bincount(index, minlength=rows).cumsum(0)])
    return _reduction(f"{n:,} x {channels} to {rows:,} rows that follow each other", values, row_splits, rows,
                      lambda: ops.segment_reduce(values, row_splits, "mean"), segment_peers(values, row_splits))  # fmt: skip


def _reduction(
    inputs: str, values: Tensor, index: Tensor, rows: int, call: Callable[[], Tensor], peers: dict[str, Callable[[], Any]]
) -> Case:
    return Case(
        inputs=inputs,
        run=call,
        moved=nbytes(values, index) + 4 * rows * values.shape[1],
        moved_is=MOVED,
        flop=values.numel(),
        flop_is="one addition per value",
        peers=peers,
        differs=_means_differ,
        slow=SLOW_CALL,
    )


def _map_case(voxels: int, kind: str) -> Case:
    # As many cells per axis as give about so many voxels: drawn finer and finer, then cut off.
    per_axis, coords = 8, torch.empty(0, 3, dtype=torch.int32)
    points = clouds(kind, 1, 4 * voxels)[0]
    while len(coords) < voxels and per_axis < 4096:
        per_axis *= 2
        coords = (points * per_axis).int().unique(dim=0)[:voxels]
    coords = torch.cat([coords.new_zeros(len(coords), 1), coords], dim=1)
    axis = torch.arange(-1, 2)
    call = functools.partial(_neighbor_rows, coords)
    return Case(
        inputs=f"{len(coords):,} voxels of {per_axis} per axis, 27 neighbours each",
        run=call,
        moved=nbytes(coords) + 27 * 4 * len(coords),
        moved_is=MOVED,
        flop=0,
        flop_is="none",
        peers=neighbor_map_peers(coords, torch.cartesian_prod(axis, axis, axis), per_axis),
        differs=_maps_differ,
        cloud=kind,
        slow=SLOW_CALL,
    )


def _neighbor_rows(coords: Tensor) -> Tensor:
    return ops.neighbor_map(coords, kernel_size=3).index


def _radius_case(queries: int, n: int, kind: str) -> Case:
    points = clouds(kind, 1, n)[0]
    query = points[:queries].contiguous()
    radius = OFF_GRID * float(ops.knn(query[None], points[None], min(32, n)).distance[..., -1].median().sqrt())
    call = functools.partial(ops.radius_search, query[None], points[None], radius)
    pairs = len(call().index)
    return Case(
        inputs=f"{queries:,} balls of radius {radius:.3g} in {n:,} points, {pairs:,} pairs",
        run=call,
        moved=nbytes(query, points) + 12 * pairs + 8 * queries,
        moved_is=MOVED,
        flop=8 * queries * n,
        flop_is="8 per pair of points of an exhaustive search (a tree or buckets need fewer)",
        peers=radius_peers(query, points, radius),
        differs=_rows_differ,
        cloud=kind,
        slow=SLOW_CALL,
    )


def _values(n: int, channels: int) -> Tensor:
    return torch.randn(n, channels, generator=torch.Generator().manual_seed(0))


# Agreement -----------------------------------------------------------------------------------------------------------------------------


def _voxels_differ(ours: tuple[Tensor, Tensor], theirs: tuple[Tensor, Tensor]) -> str:
    (ours_keys, ours_order), (theirs_keys, theirs_order) = ours[0].sort(), theirs[0].sort()
    if not torch.equal(ours_keys, theirs_keys):
        return f"{len(theirs_keys)} voxels instead of {len(ours_keys)}, or other ones"
    return _means_differ(ours[1][ours_order], theirs[1][theirs_order])


def _means_differ(ours: Tensor, theirs: Tensor) -> str:
    if ours.shape != theirs.shape:
        return f"means of shape {list(theirs.shape)} instead of {list(ours.shape)}"
    wrong = ~torch.isclose(ours, theirs, rtol=1e-4, atol=1e-5)
    return f"{int(wrong.sum())} of {wrong.numel()} means differ" if bool(wrong.any()) else ""


def _maps_differ(ours: Tensor, theirs: Tensor) -> str:
    """Compare which rows are neighbours; kernel places may be numbered in another order."""
    if ours.numel() != theirs.numel():
        return f"{theirs.numel()} places instead of {ours.numel()}"
    ours = ours if ours.shape == theirs.shape else ours.mT
    wrong = int((ours.long().sort(dim=1).values != theirs.long().sort(dim=1).values).any(1).sum())
    return f"other neighbours of {wrong} of {len(ours)} voxels" if wrong else ""


def _rows_differ(ours: Any, row_splits: Tensor) -> str:
    away = int(((ours.row_splits.diff() - row_splits.long().diff()).abs() > 2).sum())
    return f"other numbers of neighbours for {away} queries" if away else ""
