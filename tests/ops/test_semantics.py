"""What each operator promises, on inputs small enough to see, and properties on random ones."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from geossl import ops
from geossl.ops import _dispatch

INF = float("inf")


def cloud(*rows: tuple[float, float, float]) -> torch.Tensor:
    return torch.tensor([rows], dtype=torch.float32)


# Farthest point sampling ------------------------------------------------------------------------------------------------------------------


def test_ties_go_to_the_lower_index(backend):
    square = cloud((0, 0, 0), (1, 0, 0), (0, 1, 0), (1, 1, 0), (1, 1, 0))
    assert ops.farthest_point_sample(square, 5).tolist() == [[0, 3, 1, 2, 4]]


def test_no_point_is_picked_twice(backend):
    assert ops.farthest_point_sample(torch.ones(1, 6, 3), 6).tolist() == [[0, 1, 2, 3, 4, 5]]
    assert ops.farthest_point_sample(torch.ones(1, 6, 3), 4, start=4).tolist() == [[4, 0, 1, 2]]
    points = torch.randint(0, 2, (1, 40, 3)).float()
    assert ops.farthest_point_sample(points, 40)[0].sort().values.tolist() == list(range(40))


def test_too_few_points_are_filled_up(backend):
    points = cloud((0, 0, 0), (1, 0, 0), (np.nan, 0, 0), (9, 9, 9))
    assert ops.farthest_point_sample(points, 5, lengths=torch.tensor([3])).tolist() == [[0, 1, -1, -1, -1]]
    picked, offsets = ops.farthest_point_sample(points[0], 3, offsets=torch.tensor([0, 3, 3, 4]))
    assert picked.tolist() == [0, 1, -1, 3]
    assert offsets.tolist() == [0, 3, 3, 4]


def test_packed_counts(backend):
    points, offsets = torch.rand(40, 3), torch.tensor([0, 30, 40])
    assert ops.farthest_point_sample(points, 0.1, offsets=offsets)[1].tolist() == [0, 3, 4]
    assert ops.farthest_point_sample(points, 0.101, offsets=offsets)[1].tolist() == [0, 4, 6]
    assert ops.farthest_point_sample(points, 1.0, offsets=offsets)[1].tolist() == [0, 30, 40]
    assert ops.farthest_point_sample(points, torch.tensor([0, 50]), offsets=offsets)[1].tolist() == [0, 0, 10]


def test_an_invalid_or_masked_start_moves_on_round_the_cloud(backend):
    points = cloud((0, 0, 0), (1, 0, 0), (2, 0, 0), (np.inf, 0, 0))
    assert ops.farthest_point_sample(points, 2, start=3).tolist() == [[0, 2]]
    mask = torch.tensor([[False, False, True, True]])
    assert ops.farthest_point_sample(points, 4, mask=mask).tolist() == [[2, -1, -1, -1]]
    assert ops.farthest_point_sample(points, 2, mask=torch.zeros(1, 4, dtype=torch.bool)).tolist() == [[-1, -1]]


def test_random_starts_follow_the_generator(backend):
    points = torch.rand(200, 10, 3)
    first, second, other = (
        ops.farthest_point_sample(points, 1, start=torch.Generator().manual_seed(seed), lengths=torch.full((200,), 7)) for seed in (1, 1, 2)
    )
    assert torch.equal(first, second)
    assert not torch.equal(first, other)
    assert first.unique().tolist() == list(range(7))
    packed, _ = ops.farthest_point_sample(
        points[:, :7].reshape(-1, 3), 1, offsets=torch.arange(0, 1407, 7), start=torch.Generator().manual_seed(1)
    )
    assert torch.equal(packed - torch.arange(0, 1400, 7), first[:, 0])


def published_sampling(points: np.ndarray, k: int) -> list[int]:
    """The published loop: index 0 first, distances from 1e10, points within 1e-3 of the origin (squared) skipped."""
    distance, last, picked = np.full(len(points), 1e10, np.float32), 0, [0]
    far = (points * points).sum(1) > 1e-3
    for _ in range(1, k):
        new = ((points - points[last]) ** 2).sum(1)
        distance = np.where(far, np.minimum(distance, new), distance)
        candidates = np.where(far, distance, -1)
        last = int(candidates.argmax()) if far.any() else 0
        picked.append(last)
    return picked


def test_published_skip_near_the_origin(backend):
    rng = np.random.default_rng(0)
    points = rng.normal(size=(300, 3)).astype(np.float32)
    points[1::7] *= 0.005
    for first in (0, 1):  # once with an ordinary row 0, once with one near the origin
        cut = points[first:]
        got = ops.farthest_point_sample(torch.from_numpy(cut)[None], 250, min_sq_norm=1e-3)[0].tolist()
        assert got == published_sampling(cut, 250)
        # From a start near the origin, its neighbours would come last anyway.
        assert (got == ops.farthest_point_sample(torch.from_numpy(cut)[None], 250)[0].tolist()) == bool(first)
    # When all others are used up or skipped, row 0 comes again and again.
    few = cloud((0, 0, 0), (0.01, 0, 0), (1, 0, 0), (2, 0, 0))
    assert ops.farthest_point_sample(few, 6, min_sq_norm=1e-3).tolist() == [[0, 3, 2, 0, 0, 0]]
    assert ops.farthest_point_sample(few[:, :2], 3, min_sq_norm=1e-3).tolist() == [[0, 0, 0]]
    assert ops.farthest_point_sample(few[:, :1], 2, min_sq_norm=0.0).tolist() == [[0, 0]]


def test_extent_does_not_matter(backend):
    points = torch.rand(1, 50, 3, dtype=torch.float64)
    want = ops.farthest_point_sample(points, 20)
    assert torch.equal(ops.farthest_point_sample(points * 2.0**40, 20), want)
    assert torch.equal(ops.farthest_point_sample(points * 2.0**-40, 20), want)


# Neighbours -------------------------------------------------------------------------------------------------------------------------------


def test_neighbours_are_sorted_by_distance_then_index(backend):
    points = cloud((1, 0, 0), (0, 0, 0), (-1, 0, 0), (0, 0, 0), (0, 2, 0))
    found = ops.knn(points[:, 1:2], points, 6)
    assert found.index.tolist() == [[[1, 3, 0, 2, 4, -1]]]
    assert found.distance.tolist() == [[[0, 0, 1, 1, 4, INF]]]


def test_exclude_self_leaves_out_the_row_not_the_place(backend):
    points = torch.zeros(1, 3, 3)
    assert ops.knn(points, points, 3, exclude_self=True).index.tolist() == [[[1, 2, -1], [0, 2, -1], [0, 1, -1]]]
    # Queries beyond the points have no row to leave out.
    assert ops.knn(torch.zeros(1, 5, 3), points, 1, exclude_self=True).index[0, :, 0].tolist() == [1, 0, 0, 0, 0]


def test_a_point_on_the_sphere_is_outside(backend):
    points = cloud((3, 4, 0), (0, 0, 5), (4.9, 0, 0), (0, 0, 0))
    center = torch.zeros(1, 1, 3)
    ball = ops.ball_query(center, points, 5.0, 4)
    assert ball.index.tolist() == [[[3, 2, -1, -1]]]
    assert ball.count.tolist() == [[2]]
    assert ops.knn(center, points, 4, radius=5.0).index.tolist() == [[[3, 2, -1, -1]]]
    assert ops.ball_query(center, points, torch.tensor([[5.001]]), 4, mode="first").index.tolist() == [[[0, 1, 2, 3]]]


def test_empty_balls_are_never_neighbour_zero(backend):
    ball = ops.ball_query(torch.full((1, 1, 3), 9.0), torch.zeros(1, 4, 3), 1.0, 3, fill="repeat")
    assert ball.index.tolist() == [[[-1, -1, -1]]]
    assert ball.distance.tolist() == [[[INF, INF, INF]]]
    assert ball.count.tolist() == [[0]]


@pytest.mark.parametrize("mode", ["nearest", "first"])
def test_count_goes_beyond_the_cut(backend, mode):
    points = cloud(*[(0.1 * (9 - i), 0, 0) for i in range(10)])
    ball = ops.ball_query(torch.zeros(1, 1, 3), points, 0.75, 3, mode=mode, fill="repeat")
    assert ball.count.tolist() == [[8]]
    assert ball.index.tolist() == [[[9, 8, 7]]] if mode == "nearest" else ball.index.tolist() == [[[2, 3, 4]]]


def test_distances_that_overflow_are_out_of_reach(backend):
    points = cloud((0, 0, 0), (1e30, 0, 0))
    assert ops.knn(points, points, 2).index.tolist() == [[[0, -1], [1, -1]]]
    assert ops.knn(points.double(), points.double(), 2).index.tolist() == [[[0, 1], [1, 0]]]


# Chamfer distance -------------------------------------------------------------------------------------------------------------------------


def chamfer_by_hand(x: torch.Tensor, y: torch.Tensor, norm: str) -> torch.Tensor:
    d = x[:, None] - y[None]
    d = d.abs().sum(2) if norm == "l1" else d.square().sum(2)
    both = [d.amin(1), d.amin(0)]
    if norm == "l2":
        both = [b.sqrt() for b in both]
    return both[0].mean() + both[1].mean()


@pytest.mark.parametrize("norm", ["l2sq", "l2", "l1"])
def test_chamfer_is_the_sum_of_two_means(backend, norm):
    x, y = torch.rand(3, 7, 3), torch.rand(3, 5, 3)
    want = torch.stack([chamfer_by_hand(a, b, norm) for a, b in zip(x, y, strict=True)])
    torch.testing.assert_close(ops.chamfer_distance(x, y, norm=norm, reduction="none"), want)
    torch.testing.assert_close(ops.chamfer_distance(x, y, norm=norm), want.mean())
    torch.testing.assert_close(ops.chamfer_distance(x, y, norm=norm, reduction="sum"), want.sum())
    weights = torch.tensor([1.0, 0.0, 3.0])
    torch.testing.assert_close(ops.chamfer_distance(x, y, norm=norm, weights=weights), (want * weights).sum() / 4)
    assert ops.chamfer_distance(x, y, norm=norm, weights=torch.zeros(3)) == 0
    parts = [ops.chamfer_distance(x, y, norm=norm, direction=d) for d in ("x", "y")]
    torch.testing.assert_close(parts[0] + parts[1], want.mean())
    torch.testing.assert_close(ops.chamfer_distance_patches(x[:, None], y[:, None], norm=norm, reduction="none"), want[:, None])


def test_chamfer_of_nothing_is_zero(backend):
    x, y = torch.rand(3, 4, 3), torch.rand(3, 5, 3)
    loss = ops.chamfer_distance(x, y, x_lengths=torch.tensor([4, 0, 4]), y_lengths=torch.tensor([5, 5, 0]), reduction="none")
    assert loss[0] > 0
    assert loss[1:].tolist() == [0, 0]
    assert ops.chamfer_distance(torch.rand(2, 0, 3), y[:2]) == 0
    assert ops.chamfer_distance(torch.rand(0, 4, 3), torch.rand(0, 5, 3)) == 0


def test_invalid_points_are_left_out_of_the_mean(backend):
    x, y = torch.rand(1, 6, 3), torch.rand(1, 4, 3)
    with_nan = torch.cat([x, torch.full((1, 2, 3), torch.nan)], dim=1)
    torch.testing.assert_close(ops.chamfer_distance(with_nan, y), ops.chamfer_distance(x, y))


# Properties -------------------------------------------------------------------------------------------------------------------------------

coordinates = st.one_of(
    st.integers(-3, 3).map(float),  # ties
    st.floats(-100, 100, width=32),
    st.sampled_from([INF, -INF, float("nan"), 1e-30, 1e18]),
)


@st.composite
def batches(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Two packed batches of the same number of clouds, any of which may be empty."""
    out: list[torch.Tensor] = []
    count = draw(st.integers(1, 4))
    for _ in range(2):
        sizes = draw(st.lists(st.integers(0, 12), min_size=count, max_size=count))
        rows = draw(st.lists(st.tuples(coordinates, coordinates, coordinates), min_size=sum(sizes), max_size=sum(sizes)))
        out += [torch.tensor(rows, dtype=torch.float32).reshape(-1, 3), torch.tensor([0, *np.cumsum(sizes)])]
    return tuple(out)  # type: ignore[return-value]


def both_ways(run):
    with _dispatch.backend("twin"):
        want = run()
    with _dispatch.backend("cpu"):
        got = run()
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=0)


@settings(max_examples=60, deadline=None)
@given(batches(), st.integers(1, 15), st.sampled_from([None, 0.5, 4.0]), st.booleans())
def test_property_knn(batch, k, radius, exclude):
    query, query_offsets, points, offsets = batch
    both_ways(lambda: ops.knn(query, points, k, query_offsets=query_offsets, offsets=offsets, radius=radius, exclude_self=exclude))


@settings(max_examples=60, deadline=None)
@given(
    batches(),
    st.integers(1, 15),
    st.sampled_from([0.5, 4.0, INF]),
    st.sampled_from(["nearest", "first"]),
    st.sampled_from(["pad", "repeat"]),
)
def test_property_ball_query(batch, k, radius, mode, fill):
    query, query_offsets, points, offsets = batch
    both_ways(lambda: ops.ball_query(query, points, radius, k, query_offsets=query_offsets, offsets=offsets, mode=mode, fill=fill))


@settings(max_examples=60, deadline=None)
@given(batches(), st.integers(1, 15), st.sampled_from([None, 0.0, 2.0]), st.integers(0, 5))
def test_property_sampling(batch, k, min_sq_norm, seed):
    points, offsets, _, _ = batch

    def run():
        start = torch.Generator().manual_seed(seed)
        picked, ends = ops.farthest_point_sample(points, k, offsets=offsets, start=start, min_sq_norm=min_sq_norm)
        if min_sq_norm is None:
            kept = picked[picked >= 0]
            assert kept.unique().numel() == kept.numel()
            assert points[kept].isfinite().all()
        return picked, ends

    both_ways(run)


@settings(max_examples=60, deadline=None)
@given(batches(), st.sampled_from(["l2sq", "l2", "l1"]), st.sampled_from(["both", "x", "y"]))
def test_property_chamfer(batch, norm, direction):
    x, x_offsets, y, y_offsets = batch
    both_ways(lambda: torch.ops.geossl.chamfer(x, y, None, None, x_offsets, y_offsets, norm, direction))


def test_a_share_of_points_is_rounded_up(backend):
    points, offsets = torch.rand(40, 3), torch.tensor([0, 5, 35, 40])
    for ratio, want in ((1e-10, [1, 1, 1]), (0.1, [1, 3, 1]), (1.0, [5, 30, 5])):
        assert ops.farthest_point_sample(points, ratio, offsets=offsets)[1].diff().tolist() == want


def test_threads_build_the_same_tree(on_backend):
    """Clouds that are cut unevenly, and enough points for every stage of the spatial order to be dealt out."""
    rng = np.random.default_rng(0)
    uniform = rng.random((9000, 3))
    clouds = {
        "uniform": uniform,
        "outlier": np.concatenate([uniform, [[1e6, 0, 0]]]),
        "duplicates": np.round(uniform * 6) / 6,
        "geometric": uniform**12,
        "huge": (uniform - 0.5) * 6e37,
        "line": uniform * (1, 0, 0),
    }
    for name, cloud in clouds.items():
        points = torch.tensor(cloud, dtype=torch.float32)[None]
        results = []
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            try:
                with on_backend("cpu"):
                    near = ops.knn(points[:, :300], points, 9)
                    results.append((*near, ops.farthest_point_sample(points, 2000)))
            finally:
                torch.set_num_threads(1)
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True)), name
