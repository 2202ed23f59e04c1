"""Radius search: what it promises, the tree of the CPU kernel, and inside torch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from geossl import ops
from geossl.ops import _dispatch

INF = float("inf")


def rows(found: ops.RadiusNeighbors) -> list[list[int]]:
    return [part.tolist() for part in found.index.split(found.row_splits.diff().tolist())]


def test_points_on_the_sphere_are_outside_and_rows_are_sorted(backend):
    lattice = torch.cartesian_prod(*[torch.arange(-2.0, 3)] * 3)[None]
    found = ops.radius_search(torch.zeros(1, 1, 3), lattice, 2.0)
    assert found.row_splits.tolist() == [0, 27]  # 8 corners at sqrt(3); the six points at distance 2 are outside
    assert found.distance.tolist() == sorted(found.distance.tolist())
    same = found.distance.diff() == 0
    assert (found.index.diff()[same] > 0).all()


def test_invalid_points_and_queries_find_nothing(backend):
    points = torch.tensor([[[0.0, 0, 0], [np.nan, 0, 0], [1, 0, 0], [np.inf, 0, 0]]])
    assert rows(ops.radius_search(points, points, INF)) == [[0, 2], [], [2, 0], []]
    assert rows(ops.radius_search(points, points, INF, exclude_self=True)) == [[2], [], [0], []]


def test_exclude_self_leaves_duplicates_in(backend):
    points = torch.ones(1, 3, 3)
    assert rows(ops.radius_search(points, points, 0.1, exclude_self=True)) == [[1, 2], [0, 2], [0, 1]]
    assert rows(ops.radius_search(torch.ones(1, 5, 3), points, 0.1, exclude_self=True))[3:] == [[0, 1, 2]] * 2


def test_numbering_of_padded_and_packed_rows(backend):
    points = torch.tensor([[[0.0, 0, 0], [5, 0, 0]], [[9, 0, 0], [0, 0, 0]]])
    padded = ops.radius_search(points[:, :1], points, 1.0, lengths=torch.tensor([2, 2]), query_lengths=torch.tensor([0, 1]))
    assert padded.row_splits.tolist() == [0, 0, 1]
    assert padded.index.tolist() == [0]
    packed = ops.radius_search(
        points[:, 0], points.flatten(0, 1), 1.0, query_offsets=torch.tensor([0, 1, 2]), offsets=torch.tensor([0, 2, 4])
    )
    assert packed.index.tolist() == [0, 2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("kind", ["uniform", "tracks", "duplicates", "lattice", "outlier", "invalid"])
def test_large_clouds_by_tree(inputs, kind, dtype):
    """All queries at once pay for a tree, a few at a time do not; threads and the order of queries change nothing."""
    points = inputs.make_cloud(kind, 5000, dtype=dtype)[None]
    radius = torch.rand(1, 5000, generator=torch.Generator().manual_seed(0)) * (1.5 if kind == "lattice" else 0.1) + 1e-3
    found = ops.radius_search(points, points, radius, exclude_self=True)
    some = slice(100, 125)
    few = ops.radius_search(points[:, some], points, radius[:, some])
    assert rows(found)[some] == [[j for j in row if j != i] for i, row in enumerate(rows(few), 100)]
    assert (found.row_splits.diff() == ops.ball_query(points, points, radius, 1).count[0] - (points[0].isfinite().all(1)).long()).all()
    torch.set_num_threads(3)
    try:
        again = ops.radius_search(points, points, radius, exclude_self=True)
    finally:
        torch.set_num_threads(1)
    for a, b in zip(found, again, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("count", [1, 2, 3, 31, 32, 33, 100, 129])
def test_rows_of_any_length_are_sorted_on_cuda(on_backend, count):
    points = torch.randint(0, 6, (2, count, 3), generator=torch.Generator().manual_seed(count)).float()
    results = []
    for name in ("twin", "cpu", "cuda"):
        with on_backend(name, seed=3):
            results.append(ops.radius_search(points[:, :4], points, INF))
    for result in results[1:]:
        for a, b in zip(result, results[0], strict=True):
            assert torch.equal(a, b)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 40), st.integers(0, 12), st.floats(0.1, 3), st.integers(0, 2**31 - 1), st.sampled_from(["twin", "cpu"]), st.booleans()
)
def test_properties(n, q, radius, seed, name, exclude):
    rng = np.random.default_rng(seed)
    points, query = (torch.tensor(rng.integers(0, 5, (1, m, 3)), dtype=torch.float32) for m in (n, q))
    with _dispatch.backend(name):
        found = ops.radius_search(query, points, radius, exclude_self=exclude)
    limit = torch.tensor(radius, dtype=torch.float32).square()
    d2 = (query[0, :, None] - points[0]).square().sum(-1)
    inside = d2 < limit
    if exclude:
        inside[range(min(n, q)), range(min(n, q))] = False
    assert torch.equal(found.row_splits.diff(), inside.sum(1))
    for i, row in enumerate(rows(found)):
        want = sorted((float(d2[i, j]), j) for j in range(n) if inside[i, j])
        assert row == [j for _, j in want]
    # The first k are the k nearest.
    if n and q and not exclude:
        near = ops.knn(query, points, n, radius=radius).index[0]
        assert torch.equal(near[near >= 0], found.index)


def test_compiled_with_gradient():
    torch._dynamo.reset()

    def run(query: torch.Tensor, points: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        found = ops.radius_search(query, points, 0.5)
        return found.distance.sum(), found.row_splits

    compiled = torch.compile(run, fullgraph=True, dynamic=True, backend="aot_eager")
    for size in (7, 12):
        query, points = torch.rand(2, size, 3), torch.rand(2, size + 3, 3)
        torch.testing.assert_close(compiled(query, points), run(query, points))


def test_half_coordinates_and_autocast(backend):
    points = torch.rand(1, 20, 3)
    half = points.bfloat16()
    want = ops.radius_search(half.float(), half.float(), 0.3)
    got = ops.radius_search(half, half, 0.3)
    assert got.distance.dtype == torch.float32
    assert torch.equal(got.index, want.index)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ops.radius_search(points, points, 0.3).distance, ops.radius_search(points.clone(), points, 0.3).distance)
