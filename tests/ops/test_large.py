"""Sizes at which kernels take another path: trees and buckets on the CPU, other launch shapes on a GPU."""

from __future__ import annotations

import pytest
import torch

from geossl import ops

LARGE_KINDS = ["uniform", "tracks", "duplicates", "identical", "lattice", "outlier", "invalid", "tiny"]


def agree(on_backend, run, backends=("cpu",)):
    with on_backend("twin"):
        want = run()
    for backend in backends:
        with on_backend(backend):
            got = run()
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0)


SEARCHES = {
    "knn": lambda q, p, reach: ops.knn(q, p, 7),
    "many": lambda q, p, reach: ops.knn(q, p, 70, radius=2 * reach),
    "nearest": lambda q, p, reach: ops.ball_query(q, p, reach, 6),
    "first": lambda q, p, reach: ops.ball_query(q, p, reach, 6, mode="first"),
    "everything": lambda q, p, reach: ops.ball_query(q, p, float("inf"), 4),
}


@pytest.mark.parametrize("kind", LARGE_KINDS)
@pytest.mark.parametrize("name", SEARCHES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_a_tree_finds_what_comparing_all_pairs_finds(inputs, kind, name, dtype):
    """Thousands of queries at once go through a tree; a hundred at a time do not pay for one."""
    points = inputs.make_cloud(kind, 6000, dtype=dtype)[None]
    query = torch.cat([points[:, ::40], inputs.make_cloud(kind, 4300, seed=1, dtype=dtype)[None]], dim=1)
    query[0, 100] = torch.nan
    reach = {"tiny": 1e-7, "tracks": 0.5}.get(kind, 0.1)
    together = SEARCHES[name](query, points, reach)
    parts = [SEARCHES[name](part, points, reach) for part in query.split(100, dim=1)]
    for whole, pieces in zip(together, zip(*parts, strict=True), strict=True):
        assert torch.equal(whole, torch.cat(pieces, dim=1))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["uniform", "lattice"])
def test_a_tree_finds_what_the_twin_finds(inputs, on_backend, kind):
    points = inputs.make_cloud(kind, 6000)[None]
    agree(on_backend, lambda: ops.knn(points[:, :4400], points, 5, exclude_self=True))
    agree(on_backend, lambda: ops.ball_query(points[:, :1500], points, 0.1, 6))


@pytest.mark.parametrize("kind", LARGE_KINDS)
def test_sampling_in_buckets(inputs, on_backend, kind):
    points = inputs.make_cloud(kind, 7000)[None]
    # A third of the points have distinct places in some kinds; the picks go on through the rest.
    agree(on_backend, lambda: [ops.farthest_point_sample(points, 1000)])
    agree(on_backend, lambda: [ops.farthest_point_sample(points.double(), 900, start=55, min_sq_norm=0.2)])


@pytest.mark.parametrize("kind", LARGE_KINDS)
def test_sampling_in_buckets_shared_by_threads(inputs, on_backend, kind):
    points = inputs.make_cloud(kind, 70_000)[None]
    with on_backend("twin"):
        want = ops.farthest_point_sample(points, 250, start=7)
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            with on_backend("cpu"):
                assert torch.equal(ops.farthest_point_sample(points, 250, start=7), want)
    finally:
        torch.set_num_threads(1)


def test_sampling_all_of_many_points_is_a_permutation(inputs):
    for kind in ("lattice", "identical", "uniform"):
        points = inputs.make_cloud(kind, 20000)
        picked = ops.farthest_point_sample(points[None], 20000)
        assert torch.equal(picked[0].sort().values, torch.arange(20000))


@pytest.mark.parametrize("kind", LARGE_KINDS)
@pytest.mark.parametrize("norm", ["l2sq", "l1"])
@pytest.mark.parametrize(("n", "dtype"), [(1000, torch.float32), (1000, torch.float64), (6000, torch.float32), (17000, torch.float32)])
def test_chamfer_by_blocks_or_a_tree(inputs, kind, norm, n, dtype):
    """All points at once pay for blocks of neighbours, or in the largest clouds for a tree; a hundred at a time do not."""
    x, y = inputs.make_cloud(kind, n, dtype=dtype)[None], inputs.make_cloud(kind, n + 100, seed=1, dtype=dtype)[None]
    x[0, 5, 1], y[0, 7] = torch.nan, torch.inf
    nearest = torch.ops.geossl.chamfer(x, y, None, None, None, None, norm, "both")[1]
    for direction, a, b, found in (("x", x, y, nearest[:n]), ("y", y, x, nearest[n:])):
        parts = [torch.ops.geossl.chamfer(part, b, None, None, None, None, norm, "x")[1] for part in a.split(100, dim=1)]
        assert torch.equal(found, torch.cat(parts)), direction


def test_chamfer_by_blocks_in_a_batch(inputs, on_backend):
    """Clouds of several lengths, far apart, equal, and without any valid point."""
    x = torch.stack([inputs.make_cloud(kind, 900, seed=seed) for seed, kind in enumerate(("uniform", "lattice", "tracks", "uniform"))])
    y = torch.stack([x[0, :800] + 50, x[1, 100:], x[2, :800].flip(0), x[3, :800] * torch.nan])
    lengths = torch.tensor([900, 850, 768, 900])
    for norm in ("l2sq", "l2", "l1"):
        agree(on_backend, lambda norm=norm: [torch.ops.geossl.chamfer(x, y, lengths, None, None, None, norm, "both")[1]])
    packed = [torch.cat([cloud[:n] for cloud, n in zip(x, lengths, strict=True)]), torch.cat(list(y))]
    offsets = [torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]), torch.arange(5) * 800]
    padded = ops.chamfer_distance(x, y, x_lengths=lengths, reduction="none")
    assert torch.equal(ops.chamfer_distance_packed(packed[0], offsets[0], packed[1], offsets[1], reduction="none"), padded)


def test_nothing_is_quadratic(inputs):
    """A hundred thousand points, half of them at one place: by comparing all pairs this would take minutes."""
    points = inputs.make_cloud("duplicates", 100_000)[None]
    found = ops.knn(points, points, 3)
    assert torch.equal(found.distance[..., 0], torch.zeros(1, 100_000))
    ball = ops.ball_query(points, points, 0.01, 3)
    assert ball.count.max() >= 50_000
    assert ops.farthest_point_sample(points, 3000).unique().numel() == 3000
    assert ops.chamfer_distance(points, points) == 0


# One for each way a CUDA kernel can be launched.
@pytest.mark.parametrize(("n", "k", "dtype"), [
    (129, 40, torch.float32), (513, 5, torch.float32), (2049, 4, torch.float32), (8193, 3, torch.float32), (9000, 3, torch.float32),
    (513, 5, torch.float64), (2049, 4, torch.float64), (4097, 3, torch.float64),
])  # fmt: skip
def test_sampling_variants_on_cuda(inputs, on_backend, n, k, dtype):
    points = inputs.make_cloud("duplicates", n, dtype=dtype)
    points[3] = torch.nan
    offsets = torch.tensor([0, n - 7, n - 7, n])
    agree(on_backend, lambda: [ops.farthest_point_sample(points[None], k, start=2)], backends=("cpu", "cuda"))
    agree(on_backend, lambda: ops.farthest_point_sample(points, k, offsets=offsets, min_sq_norm=0.5), backends=("cpu", "cuda"))


@pytest.mark.parametrize("k", [1, 31, 32, 33, 127, 128, 129, 300])
def test_neighbour_variants_on_cuda(inputs, on_backend, k):
    points = inputs.make_cloud("lattice", 260)[None]
    agree(on_backend, lambda: ops.knn(points[:, :3], points, k, exclude_self=True), backends=("cpu", "cuda"))
    agree(on_backend, lambda: ops.ball_query(points[:, :3], points, 2.1, k, fill="repeat"), backends=("cpu", "cuda"))


@pytest.mark.parametrize(
    ("n", "channels"), [*((n, 3) for n in (31, 32, 33, 64, 65, 255, 256, 257)), (40, 1), (33, 4), (33, 5), (70, 2), (257, 4), (65, 33)]
)
def test_chamfer_variants_on_cuda(inputs, on_backend, n, channels):
    sizes = {0: n, 1: 70 if n > 64 else 40}
    x, y = (torch.rand(1, m, channels, generator=torch.Generator().manual_seed(seed)) for seed, m in sizes.items())
    x[0, 5] = torch.inf
    results = []
    for backend in ("twin", "cpu", "cuda"):
        with on_backend(backend, seed=2):
            a, b = x.clone().requires_grad_(), y.clone().requires_grad_()
            loss = ops.chamfer_distance(a, b, norm="l2")
            results.append((loss.detach(), *torch.autograd.grad(loss, (a, b))))
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=1e-5, atol=1e-7)
    assert torch.equal(results[1][1], results[2][1])  # the same order of sums on both devices
    assert torch.equal(results[1][2], results[2][2])


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.int64, torch.uint8, torch.bool], ids=str)
def test_group_variants(backend, channels, dtype):
    """Rows of every width and alignment are moved as they are."""
    features = torch.randint(0, 2, (2, 9, channels)).to(dtype)
    index = torch.randint(-1, 9, (2, 3, 4))
    want = torch.where(index[..., None] < 0, torch.ones((), dtype=dtype), features[torch.arange(2)[:, None, None], index.clamp(min=0)])
    assert torch.equal(ops.group(features, index, fill=1), want)
    assert torch.equal(
        ops.group(features[0], index, fill=1), torch.where(index[..., None] < 0, torch.ones((), dtype=dtype), features[0][index])
    )


@pytest.mark.slow
def test_coordinates_beyond_32_bits(on_backend):
    """The last cloud begins at element 2**31 + 2**20; the pages before it are never touched, so they take no memory."""
    rows = (2**30 + 2**19) // 3 + 1
    points = torch.empty(3, rows, 3)
    cloud = torch.rand(1, 40, 3)
    points[2, :40] = cloud[0]
    query = torch.zeros(3, 5, 3)
    query[2] = cloud[0, :5]
    lengths, first = torch.tensor([0, 0, 40]), torch.arange(2, 3)
    assert points[2].storage_offset() > 2**31
    with on_backend("cpu"):
        picked = ops.farthest_point_sample(points, 8, lengths=lengths)[2:]
        assert torch.equal(picked, ops.farthest_point_sample(cloud, 8))
    for backend in ("cpu", "cuda"):
        with on_backend(backend):
            for search in (
                lambda q, p, **more: ops.knn(q, p, 7, **more),
                lambda q, p, **more: ops.ball_query(q, p, 0.4, 7, **more),
                lambda q, p, **more: ops.ball_query(q, p, 0.4, 7, mode="first", **more),
            ):
                for got, want in zip(search(query, points, lengths=lengths), search(query[2:], cloud), strict=True):
                    assert torch.equal(got[first], want)
            got, want = ops.radius_search(query, points, 0.4, lengths=lengths), ops.radius_search(query[2:], cloud, 0.4)
            assert torch.equal(got.row_splits[10:], want.row_splits)
            assert torch.equal(got.index, want.index)


@pytest.mark.slow
def test_features_beyond_32_bits(backend):
    features = torch.empty(2, 2**20 + 8, 1024, dtype=torch.uint8)  # the second half begins beyond 2**30, its last row beyond 2**31
    features[1, -3:] = torch.arange(3, dtype=torch.uint8)[:, None]
    last = features.shape[1] - 1
    index = torch.tensor([[-1, -1], [last, last - 2]])
    assert torch.equal(ops.group(features, index)[..., 0], torch.tensor([[0, 0], [2, 0]], dtype=torch.uint8))
    rows = torch.cat([torch.full((3, 2), -1), torch.tensor([[2 * last + 1, last]])])
    assert torch.equal(ops.group(features.view(-1, 1024), rows)[3, 0, -4:], torch.full((4,), 2, dtype=torch.uint8))
