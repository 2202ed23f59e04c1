"""The tree for large clouds on CUDA, on small ones: the switch to it is lowered, and the kernels run on the host."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from geossl import ops
from geossl.ops import _dispatch, _native, _tree

SEARCHES = [
    "knn", "knn_more_than_there_are", "knn_radius_self", "ball_nearest", "ball_nearest_repeat", "ball_first", "ball_first_repeat",
    "ball_of_everything", "ball_radius_per_query",
]  # fmt: skip


@pytest.fixture(scope="module")
def matrix(inputs):
    return inputs.load_module(Path(__file__).with_name("test_matrix.py"))


@pytest.fixture
def always(monkeypatch):
    """Make every search go through a tree and return the list of those that did."""
    used = []
    monkeypatch.setattr(_tree, "SMALLEST_CLOUD", 0)
    monkeypatch.setattr(_tree, "FEWEST_PAIRS", 0)
    monkeypatch.setattr(_tree, "POINTS_PER_NEIGHBOR", 0)
    search = _tree.search
    monkeypatch.setattr(_tree, "search", lambda *args: (used.append(args[2]), search(*args))[1])
    return used


@pytest.mark.parametrize("name", SEARCHES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_batches_of_clouds(inputs, matrix, on_backend, always, kind, name, dtype):
    """Empty clouds first, in the middle and last; several clouds under one box; padding of NaN."""
    run = matrix.OPERATORS[name]
    with on_backend("cpu"):
        want = run(matrix.make(inputs, kind, "padded", dtype))
    assert not always
    with on_backend("cuda", seed=2):
        for form in ("padded", "packed"):
            matrix.assert_same(run(matrix.make(inputs, kind, form, dtype)), want)
    assert len(always) == 2


@pytest.mark.parametrize("name", SEARCHES)
def test_every_schedule_gives_the_same(inputs, matrix, on_backend, always, name):
    results = []
    for seed in range(4):
        with on_backend("cuda", seed):
            results.append(matrix.OPERATORS[name](matrix.make(inputs, "lattice", "packed")))
    for result in results[1:]:
        matrix.assert_same(result, results[0])
    assert len(always) == 4


@pytest.mark.parametrize("name", SEARCHES)
def test_no_clouds_at_all(inputs, matrix, on_backend, always, name):
    with on_backend("cuda"):
        for form in ("padded", "packed"):
            matrix.test_no_clouds_at_all(inputs, "cuda", name, form)
        empty = torch.zeros(2, 0, 3)
        assert ops.knn(torch.zeros(2, 4, 3), empty, 3).index.unique().tolist() == [-1]
        assert ops.ball_query(torch.zeros(2, 4, 3), empty, 1.0, 3).count.unique().tolist() == [0]
    assert always


def reach_of(points):
    """A radius that holds about a hundred of the points."""
    return float(ops.knn(points[:, :1], points, 100).distance[0, 0, -1].clamp(min=1e-30).sqrt())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_levels(inputs, on_backend, always, kind, dtype):
    """Two levels of boxes; for the tracks more than 1,024 leaves, and so three."""
    points = inputs.make_cloud(kind, 33_000 if kind == "tracks" else 1500, dtype=dtype)[None]
    query = torch.cat([points[:, :: len(points[0]) // 8], inputs.make_cloud(kind, 6, seed=1, dtype=dtype)[None]], dim=1)
    query[0, 2] = torch.nan
    reach = reach_of(points)
    runs = [
        lambda: ops.knn(query, points, 9, exclude_self=True),
        lambda: ops.knn(query[:, :3], points, 40, radius=2 * reach),
        lambda: ops.ball_query(query, points, reach, 6),
        lambda: ops.ball_query(query, points, reach, 6, mode="first"),
        lambda: ops.ball_query(query[:, :3], points, 5 * reach, 150, mode="first", fill="repeat"),
    ]
    for run in runs:
        with on_backend("cpu"):
            want = run()
        with on_backend("cuda", seed=1):
            got = run()
        for a, b in zip(got, want, strict=True):
            assert torch.equal(a, b)
    assert len(always) == len(runs)


@pytest.mark.parametrize("k", [31, 32, 33, 127, 128, 129, 1024, 1100])
def test_any_number_of_neighbours(inputs, on_backend, always, k):
    for kind in ("lattice", "duplicates"):
        points = inputs.make_cloud(kind, 1060)[None]
        for run in (
            lambda p=points: ops.knn(p[:, 5:7], p, k, exclude_self=True),
            lambda p=points: ops.ball_query(p[:, 5:7], p, 2.1, k, fill="repeat"),
            lambda p=points: ops.ball_query(p[:, 5:7], p, 0.9, k, mode="first"),
        ):
            with on_backend("cpu"):
                want = run()
            with on_backend("cuda", seed=3):
                got = run()
            for a, b in zip(got, want, strict=True):
                assert torch.equal(a, b)
    assert len(always) == 6


def build(points, host_library):
    with _native.substitute("cuda", host_library), _dispatch.backend("cuda"):
        return _tree.build(points[None], None, None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_what_a_tree_holds(inputs, host_library, kind, dtype):
    points = inputs.make_cloud(kind, 1100, dtype=dtype)
    tree = build(points, host_library)
    valid = points.isfinite().all(1)
    rows = tree.rows.flatten()
    assert torch.equal(rows[rows >= 0].sort().values, torch.arange(1100, dtype=torch.int32)[valid])
    slots = tree.coordinates.permute(1, 2, 0)
    assert torch.equal(slots[tree.rows >= 0], points[rows[rows >= 0]])
    held = (tree.rows >= 0)[..., None]
    assert torch.equal(tree.boxes[:3, : tree.leaves].T, torch.where(held, slots, torch.inf).amin(1))
    assert torch.equal(tree.boxes[3:, : tree.leaves].T, torch.where(held, slots, -torch.inf).amax(1))
    # 35 leaves are padded to 64 under a level of 2 boxes, padded to 32.
    assert tree.leaves == 35
    assert tree.boxes.shape[1] == 64 + 32
    assert tree.numbers[1, 64:66].sum() == valid.sum()
    assert torch.equal(tree.boxes[:3, 64], tree.boxes[:3, :32].amin(1))
    assert torch.equal(tree.numbers[0, 64], tree.numbers[0, :32].amin())


@pytest.mark.parametrize(
    "kind", ["uniform", "mesh", "tracks", "duplicates", "identical", "collinear", "far", "tiny", "outlier", "invalid", "nested"]
)
def test_few_leaves_are_as_near_as_the_neighbours(inputs, host_library, kind):
    """The work of a search: how many leaves may hold one of the 8 nearest, by the order (distance, lowest row) it prunes by."""
    n = 6000
    if kind == "nested":  # three scales, a million apart
        points = inputs.make_cloud("uniform", n)
        points[: n // 2] *= 1e-6
        points[: n // 4] *= 1e-6
    else:
        points = inputs.make_cloud(kind, n)
    tree = build(points, host_library)
    low, high = tree.boxes[:3, : tree.leaves].T.double(), tree.boxes[3:, : tree.leaves].T.double()
    query = points[points.isfinite().all(1)][::60]
    found = ops.knn(query[None], points[None], 8)
    worst, last = found.distance[0, :, -1:].double(), found.index[0, :, -1:]
    q = query[:, None].double()
    nearest = torch.maximum(low - q, q - high).clamp(min=0).square().sum(-1)
    first = tree.numbers[0, : tree.leaves]
    leaves = ((nearest < worst * (1 - 1e-6)) | ((nearest <= worst * (1 + 1e-6)) & (first <= last))).sum(1).double()
    assert leaves.mean() < 25  # of 188
    assert (leaves > 60).double().mean() < 0.05


def test_a_far_outlier_and_a_dense_spot_take_one_more_round_each(inputs, host_library, monkeypatch):
    """The test above would see a sort of one round."""
    monkeypatch.setattr(_tree, "ROUNDS", 1)
    with pytest.raises(AssertionError):
        test_few_leaves_are_as_near_as_the_neighbours(inputs, host_library, "nested")


def test_the_switch_goes_by_sizes():
    big, small = torch.empty(1, 100_000, 3, device="meta"), torch.empty(64, 1024, 3, device="meta")
    assert _tree.pays(big, big, 16, None)
    assert not _tree.pays(big[:, :100], big, 16, None)  # few queries
    assert not _tree.pays(small, small, 16, None)  # small clouds
    assert not _tree.pays(big, big, 50_000, None)  # most of the points are wanted
    packed, offsets = torch.empty(200_000, 3, device="meta"), torch.empty(3, device="meta")
    assert _tree.pays(packed, packed, 16, offsets)
    assert not _tree.pays(packed, packed, 16, torch.empty(1001, device="meta"))
    huge = torch.empty(1, 1 << 31, 3, device="meta")
    assert not _tree.pays(big, huge, 16, None)  # refused by the kernels that compare all pairs
