"""Operators at the sizes models use, and at 8 points, where only the overhead of a call is left.

The process keeps its memory (:func:`~geossl.cli.benchmark.measure.keep_memory`), so what the system takes to hand out new pages is in
none of the times, ours or the peers'. Steps, in contrast, are measured as they run.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from geossl import ops
from geossl.cli.benchmark import rope_rows, voxel_rows
from geossl.cli.benchmark.clouds import KINDS, OFF_GRID, clouds, surfaces
from geossl.cli.benchmark.measure import Case, gradient_of, nbytes, values_differ
from geossl.cli.benchmark.neighbor_peers import balls_differ, distances_differ, first_in_ball_peers, neighbor_peers
from geossl.cli.benchmark.peers import TWIN_LIMIT, chamfer_peers, farthest_point_peers, group_peers, twin

CALL_TARGET = 15e-6  # CPU seconds of a call on 8 points
SLOW_CALL = 0.2  # CPU seconds: there are many rows, and slower calls are sampled less often
PAIR_FLOP = 8  # three differences, three squares, two sums
PER_PAIR = "8 per pair of points of an exhaustive search (a tree or buckets need fewer)"
MOVED = "inputs read and results written once"
MOVED_BACK = "inputs and the gradient of the result read, results and gradients of the inputs written once"


def cases(quick: bool) -> dict[str, Callable[[], Case]]:
    """Return the cases of this suite by name; each is built when it is called. Names of the table's rows end in the kind of cloud."""
    make = functools.partial
    if quick:
        return {
            "farthest_point_sample/8->4": make(_fps_case, 1, 8, 4),
            **_every_kind("farthest_point_sample/2x128->16", make(_fps_case, 2, 128, 16)),
            "knn/2x16 of 128, k=4": make(_knn_case, 2, 16, 128, 4),
            "knn/16 of 128, k=4/tracks": make(_knn_case, 1, 16, 128, 4, kind="tracks"),
            "ball_query/2x16 of 128, k=4": make(_ball_case, 2, 16, 128, 4, "nearest"),
            "ball_query/2x16 of 128, k=4, first": make(_ball_case, 2, 16, 128, 4, "first"),
            "group/2x16x4 of 128, 8 channels": make(_group_case, 2, 128, 16, 4, 8, False),
            "group/2x16x4 of 128, 8 channels, backward": make(_group_case, 2, 128, 16, 4, 8, True),
            "chamfer_distance/2x64 to 64, backward": make(_chamfer_case, "padded", 2, 64, True),
            "chamfer_distance_patches/16x8 to 8": make(_chamfer_case, "patches", 16, 8, False),
            **voxel_rows.cases(quick),
            **rope_rows.cases(quick),
        }
    return {
        **_every_kind("farthest_point_sample/2048->512", make(_fps_case, 1, 2048, 512)),
        **_every_kind("farthest_point_sample/8x2048->512", make(_fps_case, 8, 2048, 512)),
        **_every_kind("farthest_point_sample/10000->1024", make(_fps_case, 1, 10_000, 1024)),
        **_every_kind("farthest_point_sample/100000->4096", make(_fps_case, 1, 100_000, 4096)),
        **_every_kind("knn/512 of 2048, k=16", make(_knn_case, 1, 512, 2048, 16)),
        **_every_kind("knn/512 of 2048, k=32", make(_knn_case, 1, 512, 2048, 32)),
        **_every_kind("knn/4096 of 100000, k=16", make(_knn_case, 1, 4096, 100_000, 16)),
        **_every_kind("knn/4096 of 100000, k=32", make(_knn_case, 1, 4096, 100_000, 32)),
        **_every_kind("knn/100000 of 100000, k=16", make(_knn_case, 1, 100_000, 100_000, 16)),
        **_every_kind("ball_query/512 of 2048, k=32", make(_ball_case, 1, 512, 2048, 32, "nearest")),
        **_every_kind("ball_query/4096 of 100000, k=32", make(_ball_case, 1, 4096, 100_000, 32, "nearest")),
        **_every_kind("ball_query/100000 of 100000, k=32", make(_ball_case, 1, 100_000, 100_000, 32, "nearest")),
        **_every_kind("chamfer_distance_patches/128x32 to 32, backward", make(_chamfer_case, "patches", 128, 32, True)),
        **_every_kind("chamfer_distance/8x2048 to 2048, backward", make(_chamfer_case, "padded", 8, 2048, True)),
        **voxel_rows.cases(quick),
        **rope_rows.cases(quick),
        "farthest_point_sample/8x2048->64": make(_fps_case, 8, 2048, 64),
        "knn/8x64 of 2048, k=32": make(_knn_case, 8, 64, 2048, 32),
        "ball_query/512 of 2048, k=32, first": make(_ball_case, 1, 512, 2048, 32, "first"),
        "group/8x512x32 of 2048, 32 channels": make(_group_case, 8, 2048, 512, 32, 32, False),
        "group/8x512x32 of 2048, 32 channels, backward": make(_group_case, 8, 2048, 512, 32, 32, True),
        "chamfer_distance/8x2048 to 2048": make(_chamfer_case, "padded", 8, 2048, False),
        "chamfer_distance_patches/304x32 to 32": make(_chamfer_case, "patches", 304, 32, False),
        "chamfer_distance_patches/304x32 to 32, backward": make(_chamfer_case, "patches", 304, 32, True),
        "farthest_point_sample/8->4": make(_fps_case, 1, 8, 4, CALL_TARGET),
        "knn/8 of 8": make(_knn_case, 1, 8, 8, 4, CALL_TARGET),
        "ball_query/8 of 8": make(_ball_case, 1, 8, 8, 4, "nearest", CALL_TARGET),
        "group/8 of 8": make(_group_case, 1, 8, 8, 4, 3, False, CALL_TARGET),
        "chamfer_distance/8 to 8": make(_chamfer_case, "padded", 1, 8, False, CALL_TARGET),
        "chamfer_distance_patches/8 to 8": make(_chamfer_case, "patches", 1, 8, False, CALL_TARGET),
    }


def _every_kind(name: str, make: Callable[..., Case]) -> dict[str, Callable[[], Case]]:
    return {f"{name}/{kind}": functools.partial(make, kind=kind) for kind in KINDS}


def _points(kind: str, batch: int, n: int, seed: int = 0) -> Tensor:
    return clouds(kind, batch, n, seed) if kind else surfaces(batch, n, seed)


def _fps_case(batch: int, n: int, k: int, target: float | None = None, kind: str = "") -> Case:
    points = _points(kind, batch, n)
    call = functools.partial(ops.farthest_point_sample, points, k)
    peers = farthest_point_peers(points, k)
    if batch * n * k <= TWIN_LIMIT:
        peers["geossl.ops.reference"] = twin(call)
    return Case(
        inputs=f"{batch} x {n:,} points -> {k:,}",
        run=call,
        moved=nbytes(points) + 8 * batch * k,
        moved_is=MOVED,
        flop=PAIR_FLOP * batch * n * k,
        flop_is="8 per point and pick (buckets need fewer)",
        peers=peers,
        differs=functools.partial(_picks_differ, points),
        target=target,
        cloud=kind,
        slow=SLOW_CALL,
    )


def _knn_case(batch: int, queries: int, n: int, k: int, target: float | None = None, kind: str = "") -> Case:
    points = _points(kind, batch, n)
    query = points[:, :queries].contiguous()
    call = functools.partial(ops.knn, query, points, k)
    peers = neighbor_peers(query, points, k)
    if batch * queries * n <= TWIN_LIMIT:
        peers["geossl.ops.reference"] = twin(call)
    return Case(
        inputs=f"{batch} x {queries:,} queries of {n:,} points, k={k}",
        run=call,
        moved=nbytes(query, points) + 12 * batch * queries * k,
        moved_is=MOVED,
        flop=PAIR_FLOP * batch * queries * n,
        flop_is=PER_PAIR,
        peers=peers,
        differs=distances_differ,
        target=target,
        cloud=kind,
        slow=SLOW_CALL,
    )


def _ball_case(batch: int, queries: int, n: int, k: int, mode: Any, target: float | None = None, kind: str = "") -> Case:
    points = _points(kind, batch, n)
    query = points[:, :queries].contiguous()
    # The median distance of the k-th neighbour: about half the balls hold more than k points.
    radius = OFF_GRID * float(ops.knn(query, points, k).distance[..., -1].median().sqrt())

    def call() -> tuple[Tensor, Tensor, Tensor]:
        index, distance, count = ops.ball_query(query, points, radius, k, mode=mode)
        return distance, index, count

    peers = (neighbor_peers if mode == "nearest" else first_in_ball_peers)(query, points, k, radius)
    if batch * queries * n <= TWIN_LIMIT:
        peers["geossl.ops.reference"] = twin(call)
    return Case(
        inputs=f"{batch} x {queries:,} balls of radius {radius:.3g} in {n:,} points, k={k}, {mode}; also counts all points in a ball",
        run=call,
        moved=nbytes(query, points) + (12 * k + 8) * batch * queries,
        moved_is=MOVED,
        flop=PAIR_FLOP * batch * queries * n,
        flop_is=PER_PAIR,
        peers=peers,
        differs=functools.partial(balls_differ, query, points, radius, mode),
        target=target,
        cloud=kind,
        slow=SLOW_CALL,
    )


def _group_case(batch: int, n: int, queries: int, k: int, channels: int, backward: bool, target: float | None = None) -> Case:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(batch, n, channels, generator=generator)
    index = torch.randint(n, (batch, queries, k), generator=generator)
    grad = torch.randn(batch, queries, k, channels, generator=generator)

    def run(gather: Callable[[Tensor], Tensor]) -> list[Tensor]:
        if not backward:
            return [gather(features)]
        leaf = features.clone().requires_grad_()
        result = gather(leaf)
        result.backward(grad)
        return [result.detach(), gradient_of(leaf)]

    call = functools.partial(run, lambda x: ops.group(x, index))
    return Case(
        inputs=f"features {batch} x {n:,} x {channels}, index {batch} x {queries} x {k}",
        run=call,
        moved=nbytes(features, index, grad) + backward * (nbytes(index, grad) + nbytes(features)),
        moved_is=MOVED_BACK if backward else MOVED,
        flop=backward * grad.numel(),
        flop_is="one addition per gathered value backward" if backward else "none",
        peers={name: functools.partial(run, gather) for name, gather in group_peers(index).items()} | {"geossl.ops.reference": twin(call)},
        differs=values_differ,
        target=target,
    )


def _chamfer_case(form: str, batch: int, n: int, backward: bool, target: float | None = None, kind: str = "") -> Case:
    x, y = _points(kind, batch, n), _points(kind, batch, n, seed=1)
    distance = ops.chamfer_distance_patches if form == "patches" else ops.chamfer_distance

    def run(measure: Callable[[Tensor, Tensor], Tensor]) -> list[Tensor]:
        if not backward:
            return [measure(x, y)]
        a, b = x.clone().requires_grad_(), y.clone().requires_grad_()
        loss = measure(a, b)
        loss.backward()
        return [loss.detach(), gradient_of(a), gradient_of(b)]

    call = functools.partial(run, distance)
    peers: dict[str, Callable[[], Any]] = {name: functools.partial(run, peer) for name, peer in chamfer_peers(x, y).items()}
    if batch * n * n <= TWIN_LIMIT:
        peers["geossl.ops.reference"] = twin(call)
    return Case(
        inputs=f"{batch} x {n:,} points to {n:,}, squared distances, both directions",
        run=call,
        moved=nbytes(x, y) * (2 if backward else 1),
        moved_is=MOVED_BACK if backward else MOVED,
        flop=PAIR_FLOP * batch * n * n,
        flop_is=PER_PAIR + ", both directions sharing it",
        peers=peers,
        differs=functools.partial(_losses_differ, x, y) if kind == "duplicates" and backward else values_differ,
        target=target,
        cloud=kind,
        slow=SLOW_CALL,
    )


# Agreement -----------------------------------------------------------------------------------------------------------------------------


def _picks_differ(points: Tensor, ours: Tensor, theirs: Tensor) -> str:
    """Compare picks; others than ours are right, too, if each is farthest from those before it (a peer may start elsewhere).

    A peer may give positions ``[B, k, 3]`` in another order.
    """
    if theirs.is_floating_point():
        positions = points.gather(1, ours[..., None].expand(-1, -1, 3))
        same = all(torch.equal(a.unique(dim=0), b.unique(dim=0)) for a, b in zip(positions, theirs, strict=True))
        return "" if same else "other positions"
    if torch.equal(ours, theirs):
        return ""
    if ours.shape != theirs.shape:
        return f"picks of shape {list(theirs.shape)} instead of {list(ours.shape)}"
    for cloud, picks in zip(points, theirs, strict=True):
        nearest = torch.full((cloud.shape[0],), torch.inf)
        for step, pick in enumerate(picks[:256].tolist()):
            if step and float(nearest[pick]) < float(nearest.max()) * (1 - 1e-5):
                return f"pick {step} is not farthest from those before it"
            nearest = torch.minimum(nearest, (cloud - cloud[pick]).square().sum(1))
    return ""


def _losses_differ(x: Tensor, y: Tensor, ours: list[Tensor], theirs: list[Tensor]) -> str:
    """Compare losses where ties let a point choose among neighbours, and with it the gradients.

    Whatever is chosen, the loss is a square of the coordinates, so by Euler's theorem their product with the gradient is twice the loss.
    """
    if different := values_differ(ours[:1], theirs[:1]):
        return different
    loss, of_x, of_y = theirs
    product = float((of_x * x).double().sum() + (of_y * y).double().sum())
    error = abs(product - 2 * float(loss)) / max(2 * float(loss), 1e-30)
    return "" if error < 1e-3 else f"the gradient is off by {error:.2g}"
