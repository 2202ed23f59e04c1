"""Centrality suppression: what it promises, and the published tokenizer's own results."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from geossl import ops
from geossl.ops import _dispatch

GOLDEN = Path(os.environ.get("GEOSSL_GOLDEN", Path(__file__).parents[1] / "golden")) / "polar_mae"
INF = float("inf")


def line(*at: float) -> torch.Tensor:
    return torch.tensor([[[x, 0, 0] for x in at]], dtype=torch.float32)


def test_most_neighbours_first_then_the_lower_row(backend):
    # The middle of five in a row has the most neighbours; among the two pairs left over, the lower row of each.
    found = ops.centrality_nms(line(0, 1, 2, 3, 4, 10, 11), 2.5)
    assert found.index.tolist() == [2, 5]
    assert found.count[0].tolist() == [3, 4, 5, 4, 3, 2, 2]
    assert found.offsets.tolist() == [0, 2]
    assert ops.centrality_nms(line(0, 1), 1.5).index.tolist() == [0]


def test_exactly_the_radius_apart_is_apart(backend):
    points = line(0, 1, 2, 3)
    assert ops.centrality_nms(points, 1.0).index.tolist() == [0, 1, 2, 3]
    assert ops.centrality_nms(points.int(), 1.0).index.tolist() == [0, 1, 2, 3]
    assert ops.centrality_nms(points.int(), 1.0000001).index.tolist() == [1, 3]


def test_a_limit_cuts_lists_by_row(backend):
    found = ops.centrality_nms(line(0, 0, 0, 0), 1.0, max_neighbors=2)
    assert found.count[0].tolist() == [2, 2, 2, 2]
    # Row 0 removes row 1; the lists of rows 2 and 3 hold rows 0 and 1, which were dealt with: row 2 removes row 0 after all.
    assert found.index.tolist() == [2, 3]


def test_integers_are_compared_exactly(backend):
    """In float32 these distances could not be told apart, and in float64 the coordinates could not."""
    far = 2**61 - 1
    points = torch.tensor([[[far, 0, 0], [far - 2**20, 0, 0], [-far, 0, 0], [far, 2**30, 2**30]]])
    assert ops.centrality_nms(points, float(2**20)).index.tolist() == [0, 1, 2, 3]
    assert ops.centrality_nms(points, 2**20 + 2.0**-20).index.tolist() == [0, 2, 3]
    assert ops.centrality_nms(points, 2**30).count[0].tolist() == [2, 2, 1, 1]


def test_invalid_points_are_neither_kept_nor_counted(backend):
    points = line(0, np.nan, 1, np.inf)
    for radius in (5.0, INF):
        found = ops.centrality_nms(points, radius)
        assert found.keep[0].tolist() == [True, False, False, False]
        assert found.count[0].tolist() == [2, 0, 2, 0]
    assert ops.centrality_nms(points, 1e-60).index.tolist() == [0, 2]  # the radius vanishes in float32: nothing is inside


@pytest.mark.parametrize("kind", ["uniform", "tracks", "duplicates", "lattice", "outlier", "far", "invalid"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_many_points(inputs, on_backend, kind, dtype):
    points = inputs.make_cloud(kind, 1500, dtype=dtype)[None]
    radius = 1.2 if kind == "lattice" else 0.11
    results = []
    for name, threads in (("twin", 1), ("cpu", 1), ("cpu", 3), ("cuda", 1)):
        torch.set_num_threads(threads)
        try:
            with on_backend(name, seed=1):
                results.append(ops.centrality_nms(points, radius, max_neighbors=50 if kind == "duplicates" else None))
        finally:
            torch.set_num_threads(1)
    for result in results[1:]:
        for a, b in zip(result, results[0], strict=True):
            assert torch.equal(a, b)


def test_far_doubles_near_the_origin_and_away(on_backend):
    """Cells so narrow that their numbers would be rounded: 1e15 away from the origin neighbours are still found."""
    cluster = torch.tensor([[0.0, 0, 0], [0.25, 0, 0], [5, 0, 0]], dtype=torch.float64)
    points = torch.cat([cluster, cluster + 1e15])[None]
    results = []
    for name in ("twin", "cpu", "cuda"):
        with on_backend(name):
            results.append(ops.centrality_nms(points, 0.3).index.tolist())
    assert results == [[0, 2, 3, 5]] * 3


def test_time_is_not_quadratic(inputs):
    points = inputs.make_cloud("uniform", 200_000)[None] * 100
    found = ops.centrality_nms(points, 2.0)
    assert found.count.float().mean() > 5  # comparing all pairs would take minutes
    voxels = points.int()
    assert ops.centrality_nms(voxels, 2.5).offsets[-1] < 200_000


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 40), st.floats(0.5, 4), st.one_of(st.none(), st.integers(1, 12)), st.integers(0, 2**31 - 1),
    st.sampled_from(["twin", "cpu"]), st.sampled_from([torch.float32, torch.float64, torch.int32]),
)  # fmt: skip
def test_against_the_definition(n, radius, cap, seed, name, dtype):
    cloud = np.random.default_rng(seed).integers(0, 6, (n, 3))
    with _dispatch.backend(name):
        found = ops.centrality_nms(torch.tensor(cloud)[None].to(dtype), radius, max_neighbors=cap)
    limit = radius**2 if dtype == torch.int32 else float(torch.tensor(radius, dtype=dtype).square())
    lists = [[j for j in range(n) if ((cloud[i] - cloud[j]) ** 2).sum() < limit][:cap] for i in range(n)]
    keep = [True] * n
    for i in sorted(range(n), key=lambda i: (-len(lists[i]), i)):
        if keep[i]:
            for j in lists[i]:
                keep[j] = keep[j] and j == i
    assert found.keep[0].tolist() == keep
    assert found.count[0].tolist() == [len(row) for row in lists]
    if cap is None:
        kept = cloud[keep]
        apart = ((kept[:, None] - kept) ** 2).sum(-1)
        assert (apart + np.eye(len(kept)) * 1e9 >= limit).all()
        assert (((cloud[:, None] - kept) ** 2).sum(-1).min(1) < limit).all()


def test_compiled():
    torch._dynamo.reset()

    def run(points: torch.Tensor) -> tuple[torch.Tensor, ...]:
        found = ops.centrality_nms(points, 0.3, max_neighbors=20)
        return found.index, found.offsets, found.count

    compiled = torch.compile(run, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        for size in (20, 31):
            points = torch.rand(2, size, 3)
            for a, b in zip(compiled(points), run(points), strict=True):
                assert torch.equal(a, b)


def test_half_coordinates_and_autocast(backend):
    points = torch.rand(1, 40, 3)
    half = points.half()
    assert torch.equal(ops.centrality_nms(half, 0.3).index, ops.centrality_nms(half.float(), 0.3).index)
    with torch.autocast("cpu", torch.bfloat16):
        inside = ops.centrality_nms(points, 0.3).keep
    assert torch.equal(inside, ops.centrality_nms(points, 0.3).keep)
    assert torch.equal(ops.centrality_nms((points * 9).int(), 2.5).keep, ops.centrality_nms((points * 9).long(), 2.5).keep)


# The published tokenizer ------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def golden() -> tuple[dict[str, torch.Tensor], dict[str, dict]]:
    with safe_open(GOLDEN / "dev3_tokenizer_full_events.safetensors", "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, json.loads(file.metadata()["configs"])  # noqa: SIM118 (not a mapping)


@pytest.mark.golden
@pytest.mark.parametrize("name", ["vox5_default", "vox2p5_default", "vox5_saturated_K8", "vox5_energy"])
def test_centres_of_polar_mae(golden, backend, name):
    tensors, configs = golden
    points, lengths, config = tensors["in.points"][..., :3].contiguous(), tensors["in.lengths"], configs[name]
    radius = 2 * config["group_radius"] * config["overlap_factor"]
    found = ops.centrality_nms(points, radius, max_neighbors=config["num_groups"], lengths=lengths)
    assert torch.equal(found.count, tensors[f"{name}.overlap_counts"].long())
    assert torch.equal(found.offsets.diff(), tensors[f"{name}.n_centers"])
    for b, (kept, n) in enumerate(zip(found.index.split(found.offsets.diff().tolist()), tensors[f"{name}.n_centers"], strict=True)):
        assert torch.equal(kept, tensors[f"{name}.center_point_index"][b, :n].long())


@pytest.mark.golden
def test_chamfer_over_four_channels_of_polar_mae(golden, backend):
    tensors, _ = golden
    x, y, lengths = tensors["chamfer.x"].clone().requires_grad_(), tensors["chamfer.y"], tensors["chamfer.lengths"]
    loss = ops.chamfer_distance(x, y, x_lengths=lengths, y_lengths=lengths)
    torch.testing.assert_close(loss, tensors["chamfer.loss"][0], rtol=1e-5, atol=0)
    torch.testing.assert_close(torch.autograd.grad(loss, x)[0], tensors["chamfer.grad_x"], rtol=1e-4, atol=1e-7)
