"""The operators inside torch: opcheck, torch.compile, autocast, workers, and what runs when no library is there."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import time
import warnings
from pathlib import Path

import pytest
import torch

from geossl import ops
from geossl.errors import ExtensionError
from geossl.ops import (
    _dispatch,
    _native,
    linear_max,  # noqa: F401 - registers an operator that geossl.ops does not export
)

ROOT = Path(__file__).parents[2]
INF = float("inf")


def samples() -> dict[str, list[tuple]]:
    """Arguments for every registered operator: padded, packed, empty, and with a gradient."""
    x, y = torch.rand(2, 9, 3), torch.rand(2, 5, 3)
    xg, yg = x.clone().requires_grad_(), y.clone().requires_grad_()
    flat, lengths, offsets, ends = torch.rand(9, 3), torch.tensor([9, 0]), torch.tensor([0, 4, 9]), torch.tensor([0, 0, 5])
    empty, index, weight = torch.zeros(0, 4, 3), torch.randint(-1, 9, (2, 5, 3)), torch.rand(2, 9, 4, requires_grad=True)
    rows = torch.randint(-1, 9, (28,))
    return {
        **search_samples(),
        "fps": [
            *((p, 4, None, 0, None, None, -1.0) for p in (x, xg, empty)),
            (x, 3, lengths, 0, torch.tensor([1, 0]), x[..., 0] > 0, 0.1),
        ],
        "fps_packed": [
            (flat, offsets, None, 3, 0.0, 0, None, None, -1.0),
            (flat, offsets, torch.tensor([2, 0]), 0, 0.0, 0, None, None, -1.0),
        ],
        "knn": [
            (y, x, 4, None, None, None, None, INF, False),
            (y, x, 4, None, lengths, None, None, 0.5, True),
            (flat[:5], flat, 3, None, None, ends, offsets, INF, False),
            (empty, empty, 2, None, None, None, None, INF, False),
        ],
        "ball_query": [
            (y, x, 4, None, lengths, None, None, 0.5, None, True, True),
            (y, x, 4, None, None, None, None, INF, torch.rand(2, 5), False, False),
        ],
        "neighbor_distance": [(y, x, index), (yg, xg, index), (flat[:5].clone().requires_grad_(), flat, index[0])],
        "neighbor_distance_backward": [(torch.rand(2, 5, 3), y, x, index)],
        "group": [(x, index, 0.0), (weight, index, 2.0), (flat.clone().requires_grad_(), index, 0.0)],
        "group_plain": [(x, index, 0.0)],
        "group_backward": [(torch.rand(2, 5, 3, 4), index, 2, 9), (torch.rand(2, 5, 3, 4, requires_grad=True), index, 0, 9)],
        "chamfer": [
            (x, y, None, None, None, None, "l2", "both"),
            (xg, yg, None, None, None, None, "l2", "both"),
            (flat, flat[:5].clone().requires_grad_(), None, None, offsets, ends, "l1", "x"),
            (empty, empty, None, None, None, None, "l2sq", "y"),
        ],
        "chamfer_plain": [
            (torch.rand(2, 6, 5), torch.rand(2, 3, 5), None, None, None, None, "l1", "both"),
            (x, y, lengths, None, None, None, "l2sq", "both"),
        ],
        "chamfer_backward": [(torch.rand(2), x, y, rows, None, None, None, None, "l2sq", "both")],
        **segments_samples(),
        **sparse_samples(),
        **voxels_samples(),
        **gaussians_samples(),
        **rope_samples(),
    }


def rope_samples() -> dict[str, list[tuple]]:
    qkv, table = torch.rand(6, 3, 2, 8, requires_grad=True), ops.rope_2d_table(torch.tensor([[0, 1], [2, 0], [5, 3]]), 8)
    plain = qkv.detach()
    return {
        "rope_2d": [
            (qkv[:, 0], table, False),
            (plain[:, 1], table, True),
            (plain[:, 2].bfloat16(), table, False),
            (plain[:, 0].double().requires_grad_(), table.double(), False),
            (torch.zeros(0, 2, 8), table, False),
        ]
    }


def voxels_samples() -> dict[str, list[tuple]]:
    points, flat, size, origin = torch.rand(2, 9, 3), torch.rand(9, 3), [0.4] * 3, [0.0] * 3
    everywhere, inside = [-INF] * 3 + [INF] * 3, [0.1] * 3 + [0.8] * 3
    found = ops.voxelize(flat, 0.4, offsets=torch.tensor([0, 4, 9]))
    return {
        "voxelize": [
            (points, None, None, size, origin, everywhere, "lexicographic", 100),
            (points, torch.tensor([9, 0]), None, size, origin, inside, "hilbert", 1),
            (flat, None, torch.tensor([0, 4, 9]), size, origin, everywhere, "first", 2),
        ],
        "voxel_corners": [
            (points, torch.tensor([9, 3]), None, found.coords, size, origin),
            (flat, None, torch.tensor([0, 4, 9]), found.coords, size, origin),
        ],
    }


def gaussians_samples() -> dict[str, list[tuple]]:
    """Arguments of the steps of rasterize_gaussians: two scenes of one camera each, and none at all."""
    view = torch.eye(4).expand(2, 1, 4, 4) + torch.tensor([[0.0] * 4] * 2 + [[0, 0, 0, 3.0], [0.0] * 4])
    lens = torch.tensor([[18.0, 0, 10], [0, 18, 9], [0, 0, 1]]).expand(2, 1, 3, 3).contiguous()
    means, quats, scales, opacities = torch.rand(2, 7, 3), torch.rand(2, 7, 4), torch.rand(2, 7, 3) * 0.2, torch.rand(2, 7)
    numbers = (20, 18, 0.01, 1e10, 0.0, 0.3, True)
    scene = (means, quats, scales, None, opacities, view, lens, *numbers)
    free = [t.clone().requires_grad_() for t in (means, quats, scales, opacities)]
    covars = (means, None, None, torch.eye(3).expand(2, 7, 3, 3) * 0.01, opacities, view.clone().requires_grad_(), lens, *numbers)
    means2d, depths, conics, seen, radii, tiles = torch.ops.geossl.gaussians_project(*scene)
    lists = torch.ops.geossl.gaussians_bin(means2d, conics, seen, depths, radii, tiles, 20, 18)
    splats, colors, behind = (means2d, conics, seen), torch.rand(2, 1, 7, 5), torch.rand(2, 1, 5)
    moving = [t.clone().requires_grad_() for t in (*splats, colors, depths, behind, means2d)]
    drawing = (*splats, colors, depths, behind, None, *lists, 20, 18)
    _, _, rest, last, _, _ = torch.ops.geossl.gaussians_composite(*drawing, False)
    return {
        "gaussians_project": [scene, (*free[:3], None, free[3], view, lens, *numbers), covars],
        "gaussians_project_backward": [
            (means2d, depths, conics, seen, radii, True, *scene),
            (means2d, depths, conics, seen, radii, False, *covars[:5], view, *covars[6:]),
        ],
        "gaussians_bin": [(means2d, conics, seen, depths, radii, tiles, 20, 18)],
        "gaussians_composite": [
            *((*drawing, with_ids) for with_ids in (False, True)),
            (*moving[:5], None, None, *lists, 20, 18, False),
            (*moving, *lists, 20, 18, True),
        ],
        "gaussians_composite_backward": [
            (torch.rand(2, 1, 18, 20, 6), rest.clone(), rest, last, *splats, colors, depths, behind, probe, *lists, 20, 18, False)
            for probe in (None, means2d)
        ],
    }


def search_samples() -> dict[str, list[tuple]]:
    """Arguments of what radius.py and its like register."""
    x, y, offsets, ends = torch.rand(2, 9, 3), torch.rand(2, 5, 3), torch.tensor([0, 4, 9]), torch.tensor([0, 0, 5])
    xg, yg, index = x.clone().requires_grad_(), y.clone().requires_grad_(), torch.randint(-1, 9, (2, 5, 4))
    weight, empty = torch.rand(2, 5, 4), torch.zeros(0, 4, 3)
    return {
        "centrality_nms": [
            (x, torch.tensor([9, 0]), None, 0.5, 0, 100),
            (x[0], None, offsets, INF, 0, 2),
            ((x * 9).long(), None, None, 2.5, 7, 4),
            (empty, None, None, 0.5, 0, 100),
        ],
        "group_relative": [
            (x, y, index, None, 0.0),
            (xg, yg, index, torch.rand(2, 9, 2, requires_grad=True), 0.5),
            (x[0], yg[0], index[0], x[0], 0.0),
            (empty, empty, torch.zeros(0, 4, 2, dtype=torch.int64), None, 0.0),
        ],
        "interpolate": [(x, index, weight), (xg, index, weight.clone().requires_grad_()), (xg[0], index[0], weight[0])],
        "interpolate_backward": [(y, x, index, weight), (y[0], x[0], index[0], weight[0])],
        "radius_search": [
            (y, x, None, torch.tensor([9, 0]), None, None, 0.5, None, True),
            (y[0], x[0], None, None, ends, offsets, INF, None, False),
            (y, x, None, None, None, None, INF, torch.rand(2, 5), False),
        ],
    }


def segments_samples() -> dict[str, list[tuple]]:
    x, g = torch.rand(9, 3), torch.rand(9, 3, requires_grad=True)
    index, splits, none = torch.tensor([3, 0, -1, 1, 1, 0, 3, 3, 0]), torch.tensor([0, 4, 4, 9]), torch.rand(0, 3)
    order, starts = index.argsort(stable=True)[1:], torch.tensor([0, 3, 5, 5, 8])  # of the index without its -1
    forms = [
        (x, index, None, None, 4),
        (g, index, None, None, 4),
        (g, index, starts, order, 4),
        (g, None, splits, None, 3),
        (none, None, torch.zeros(4).long(), None, 3),
        (x.bfloat16(), None, splits, None, 3),
    ]
    return {
        "segment_sum": [(*form, mean) for form in forms for mean in (False, True)],
        "segment_extreme": [(*form, True, 2.0, True) for form in forms] + [(x, index, None, None, 4, False, 0.0, False)],
        "segment_softmax": forms,
        "segment_logsumexp": forms,
        "linear_max_backward": [
            (torch.rand(3, 2), torch.tensor([[0, 3], [-1, -1], [8, 4]]), splits, x, torch.rand(2, 3)),
            (torch.rand(0, 2), torch.zeros(0, 2).long(), torch.zeros(1).long(), none, torch.rand(2, 3)),
        ],
    }


def sparse_samples() -> dict[str, list[tuple]]:
    coords, three, one, two = torch.randperm(40).view(10, 4).int(), [3, 3, 3], [1, 1, 1], [2, 2, 2]
    return {"neighbor_map": [(coords, three, one, one), (coords, [1, 2, 3], two, one), (coords[:0], three, two, one)]}


def test_every_operator_is_checked():
    assert set(samples()) == {name.split("::")[1] for name in _dispatch.LIBRARY._op_defs}


@pytest.mark.parametrize("name", samples())
def test_opcheck(name):
    for arguments in samples()[name]:
        torch.library.opcheck(getattr(torch.ops.geossl, name).default, arguments)


class Everything(torch.nn.Module):
    """A module that calls the operators of a point network, one after the other."""

    def forward(self, points: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        picked = ops.farthest_point_sample(points, 4)
        centers = ops.group(points, picked)
        near = ops.knn(centers, points, 3)
        ball = ops.ball_query(centers, points, 0.5, 3, mode="first")
        spread = ops.three_nn_interpolate(points, centers, ops.group_relative(points, centers, near.index, features, radius=2.0).amax(2))
        grouped = ops.group(features, near.index).amax(2).sum() + ops.group(features, ball.index, 1.0).sum()
        loss = ops.chamfer_distance_patches(ops.group(points, near.index), torch.ones(1, 1, 2, 3).expand(len(points), 4, 2, 3), norm="l2")
        return grouped + near.distance.sum() + loss + spread.sin().sum()


@pytest.mark.parametrize("engine", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compile_whole_graph_for_any_size(engine):
    torch._dynamo.reset()
    module = Everything()
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend=engine)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for size in (20, 33, 47):
            arguments = [torch.rand(2, size, 3), torch.rand(2, size, 5)]
            results = []
            for function in (module, compiled):
                inputs = [a.clone().requires_grad_() for a in arguments]
                loss = function(*inputs)
                results.append((loss.detach(), *torch.autograd.grad(loss, inputs)))
            torch.testing.assert_close(results[1], results[0])


def test_compile_packed():
    torch._dynamo.reset()

    def run(points: torch.Tensor, offsets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        picked, ends = ops.farthest_point_sample(points, 4, offsets=offsets)
        near = ops.knn(ops.group(points, picked), points, 3, query_offsets=ends, offsets=offsets)
        return near.index, ops.chamfer_distance_packed(points, offsets, points * 2, offsets)

    compiled = torch.compile(run, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        for sizes in ([5, 9], [20, 3]):
            points, offsets = torch.rand(sum(sizes), 3), torch.tensor([0, sizes[0], sum(sizes)])
            torch.testing.assert_close(compiled(points, offsets), run(points, offsets))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_coordinates_and_autocast_compute_in_float32(dtype):
    x, y = torch.rand(1, 30, 3), torch.rand(1, 20, 3)
    half, other = x.to(dtype), y.to(dtype)
    want = ops.knn(half.float(), other.float(), 4)
    got = ops.knn(half, other, 4)
    assert got.distance.dtype == torch.float32
    assert torch.equal(got.index, want.index)
    assert torch.equal(ops.farthest_point_sample(half, 5), ops.farthest_point_sample(half.float(), 5))
    with torch.autocast("cpu", dtype):
        assert torch.equal(ops.knn(x, y, 4).distance, ops.knn(x.clone(), y.clone(), 4).distance)
        assert ops.chamfer_distance(half, other).dtype == torch.float32
        assert ops.chamfer_distance(x, y).dtype == torch.float32
        # Called below the public functions, autocast's own rule applies.
        assert torch.ops.geossl.knn(half, other, 4, None, None, None, None, INF, False)[0].dtype == torch.float32
        assert ops.group(half, got.index[..., :1].clamp(max=5)).dtype == dtype


def test_meta_and_fake_tensors():
    points = torch.empty(2, 7, 3, device="meta")
    assert ops.farthest_point_sample(points, 4).shape == (2, 4)
    assert ops.knn(points, points, 3).index.device.type == "meta"
    assert ops.chamfer_distance(points, points).shape == ()


WORKERS = """
    import sys
    import torch
    from geossl import ops

    class Clouds(torch.utils.data.Dataset):
        def __len__(self):
            return 8

        def __getitem__(self, row):
            points = torch.rand(1, 3000, 3, generator=torch.Generator().manual_seed(row))
            return ops.knn(points, points, 4).index[0], ops.farthest_point_sample(points, 16)[0]

    if __name__ == "__main__":
        torch.set_num_threads(2)
        want = [Clouds()[row] for row in range(8)]  # native threads ran here before the workers were forked
        loader = torch.utils.data.DataLoader(Clouds(), batch_size=None, num_workers=2, multiprocessing_context=sys.argv[1])
        for got, expected in zip(loader, want, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
        print("equal")
"""


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers(tmp_path, method):
    script = tmp_path / "workers.py"
    script.write_text(textwrap.dedent(WORKERS))
    done = subprocess.run([sys.executable, str(script), method], capture_output=True, text=True, timeout=240, env={"PYTHONPATH": str(ROOT)})
    assert done.stdout.strip() == "equal", done.stderr


def test_without_library_the_twin_runs_after_one_warning(monkeypatch):
    monkeypatch.delenv("GEOSSL_REQUIRE_NATIVE", raising=False)
    monkeypatch.setattr(_native, "_warned", set())
    points = torch.rand(1, 20, 3)
    want = ops.knn(points, points, 3)
    with _native.substitute("cpu", None):
        with pytest.warns(RuntimeWarning, match="run as plain torch, which is slower"):
            got = ops.knn(points, points, 3)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            ops.farthest_point_sample(points, 3)
        monkeypatch.setenv("GEOSSL_REQUIRE_NATIVE", "1")
        with pytest.raises(ExtensionError, match="GEOSSL_REQUIRE_NATIVE is set"):
            ops.knn(points, points, 3)
    assert torch.equal(got.index, want.index)
    assert torch.equal(got.distance, want.distance)


def test_direct_calls_are_seen_by_whoever_listens():
    """Plain calls skip the dispatcher; tracing, functional transforms and profilers still see the operator."""
    points = torch.rand(1, 20, 3)
    traced = torch.fx.experimental.proxy_tensor.make_fx(lambda p: ops.knn(p, p, 3).index)(points)
    assert any("geossl.knn" in str(node.target) for node in traced.graph.nodes)
    with torch.profiler.profile() as profiler:
        ops.ball_query(points, points, 0.5, 3)
    assert "geossl::ball_query" in {event.name for event in profiler.events()}
    with torch._subclasses.FakeTensorMode() as mode:
        assert ops.farthest_point_sample(mode.from_tensor(points), 4).shape == (1, 4)
    with pytest.raises(RuntimeError, match="functorch"):  # which torch's library operators do not support, and say so
        torch.func.grad(lambda p: ops.knn(p, p, 3).distance.sum())(points)


def test_calls_are_cheap():
    """The cost of a call is measured by tools/benchmark.py; here only that nothing made it absurd."""
    points = torch.rand(1, 8, 3)
    ops.knn(points, points, 2)
    begin = time.process_time()
    for _ in range(200):
        ops.knn(points, points, 2)
    assert time.process_time() - begin < 200 * 500e-6


def test_jit_trace_records_the_operators():
    points, index = torch.rand(1, 20, 3), torch.randint(0, 20, (1, 4))
    traced = torch.jit.trace(lambda x: ops.knn(ops.group(x, index), x, 3).distance, (points,), check_trace=False)
    other = torch.rand(1, 20, 3)
    torch.testing.assert_close(traced(other), ops.knn(ops.group(other, index), other, 3).distance)
