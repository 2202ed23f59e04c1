"""Every operator on every kind of cloud: backends agree bit for bit, and so do padded and packed clouds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from geossl import ops

SIZES = (0, 40, 0, 1, 70, 0)  # empty first, in the middle and last
QUERY_SIZES = (3, 11, 0, 2, 9, 0)


class Batch:
    """Clouds and queries, given to operators padded or packed; results come back per cloud, with indices local to it."""

    def __init__(self, inputs: Any, form: str, clouds: list[Tensor], queries: list[Tensor]) -> None:
        self.packed, self.count = form == "packed", len(clouds)
        self.sizes, self.query_sizes = [len(c) for c in clouds], [len(q) for q in queries]
        if self.packed:
            (self.points, self.offsets), (self.query, self.query_offsets) = inputs.to_packed(clouds), inputs.to_packed(queries)
            self.batching = {"offsets": self.offsets}
            self.search = {"offsets": self.offsets, "query_offsets": self.query_offsets}
        else:
            (self.points, lengths), (self.query, query_lengths) = inputs.to_padded(clouds), inputs.to_padded(queries, extra=2)
            self.batching = {"lengths": lengths}
            self.search = {"lengths": lengths, "query_lengths": query_lengths}

    def cuda(self) -> Batch:
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                setattr(self, name, value.cuda())
        self.batching, self.search = ({k: v.cuda() for k, v in d.items()} for d in (self.batching, self.search))
        return self

    def rows(self, values: Tensor, sizes: list[int], index: bool = False) -> list[Tensor]:
        """Cut a result with one row per query (or per point) into clouds."""
        if not self.packed:
            return [values[b, :n] for b, n in enumerate(sizes)]
        parts = list(values.split(sizes))
        return [torch.where(p >= 0, p - o, p) for p, o in zip(parts, self.offsets.tolist(), strict=False)] if index else parts

    def neighbors(self, result: Any) -> list[Tensor]:
        out = [*self.rows(result.index, self.query_sizes, index=True), *self.rows(result.distance, self.query_sizes)]
        return out + (
            self.rows(result.count, self.query_sizes) if hasattr(result, "radius") or isinstance(result, ops.BallNeighbors) else []
        )


def sample(k: int, **fixed: Any) -> Callable[[Batch], list[Tensor]]:
    def run(b: Batch) -> list[Tensor]:
        options = dict(fixed)
        if "random" in options:
            options["start"] = torch.Generator().manual_seed(options.pop("random"))
        if not b.packed:
            picked = ops.farthest_point_sample(b.points, k, **b.batching, **options)
            return [row[: min(k, n)] for row, n in zip(picked, b.sizes, strict=True)]
        picked, offsets = ops.farthest_point_sample(b.points, k, **b.batching, **options)
        assert offsets.tolist() == [0, *torch.tensor([min(k, n) for n in b.sizes]).cumsum(0).tolist()]
        return b.rows(picked, offsets.diff().tolist(), index=True)

    return run


def sample_masked(b: Batch) -> list[Tensor]:
    sizes = b.sizes if b.packed else [b.points.shape[1]] * b.count
    mask = torch.cat([torch.arange(n) % 3 != 1 for n in sizes]).view(b.points.shape[:-1])
    return sample(9, mask=mask, start=torch.tensor([0, 7, 0, 0, 69, 5]).clamp(max=torch.tensor(b.sizes).clamp(min=1) - 1))(b)


def chamfer(norm: str, direction: str, channels: int = 3) -> Callable[[Batch], list[Tensor]]:
    def widened(points: Tensor) -> Tensor:
        """The coordinates again and again, until there are enough channels; another sign each time."""
        return torch.cat([points * (-1) ** i for i in range(-(-channels // 3))], dim=-1)[..., :channels]

    def run(b: Batch) -> list[Tensor]:
        batching = [None if b.packed else b.batching["lengths"], None if b.packed else b.search["query_lengths"]]
        offsets = [b.offsets, b.query_offsets] if b.packed else [None, None]
        loss, nearest = torch.ops.geossl.chamfer(widened(b.points), widened(b.query), *batching, *offsets, norm, direction)
        # Row numbers to numbers within the other cloud.
        entries = 0 if direction == "y" else b.points.numel() // 3
        sides = [(nearest[:entries], b.sizes, b.query), (nearest[entries:], b.query_sizes, b.points)]
        out = [loss]
        for (part, sizes, other), starts in zip(sides, (getattr(b, "query_offsets", None), getattr(b, "offsets", None)), strict=True):
            if len(part) == 0:
                continue
            begin = starts[:-1] if b.packed else torch.arange(b.count) * other.shape[1]
            rows = list(part.split(sizes)) if b.packed else [row[:n] for row, n in zip(part.view(b.count, -1), sizes, strict=True)]
            out += [torch.where(row >= 0, row - o, row) for row, o in zip(rows, begin, strict=True)]
        return out

    return run


def radius(radius: float, **options: Any) -> Callable[[Batch], list[Tensor]]:
    """Counts, indices and distances of every cloud."""

    def run(b: Batch) -> list[Tensor]:
        given = torch.nan_to_num(b.query[..., 0].abs(), 1, 1, 1) + 0.1 if radius == 0 else radius
        found = ops.radius_search(b.query, b.points, given, **options, **b.search)
        assert len(found.index) == len(found.distance) == found.row_splits[-1]
        starts = b.query_offsets[:-1] if b.packed else torch.arange(b.count) * b.query.shape[1]
        out = []
        for cloud, (start, n) in enumerate(zip(starts.tolist(), b.query_sizes, strict=True)):
            splits = found.row_splits[start : start + n + 1]
            part = slice(int(splits[0]), int(splits[-1]))
            base = b.offsets[cloud] if b.packed else 0
            out += [splits.diff(), found.index[part] - base, found.distance[part]]
        assert sum(len(index) for index in out[1::3]) == len(found.index)  # rows of padding have none
        return out

    return run


def group(b: Batch) -> list[Tensor]:
    index = ops.knn(b.query, b.points, 4, **b.search).index
    features = torch.stack([b.points[..., 0], b.points[..., 2]], dim=-1)
    return b.rows(ops.group(features, index, fill=7.0), b.query_sizes)


def relative(radius: float | None) -> Callable[[Batch], list[Tensor]]:
    def run(b: Batch) -> list[Tensor]:
        index = ops.ball_query(b.query, b.points, 0.6, 4, **b.search).index
        features = torch.stack([b.points[..., 0], b.points[..., 2]], dim=-1)
        alone = ops.group_relative(b.points, b.query, index, radius=radius)
        both = ops.group_relative(b.points, b.query, index, features, radius=radius)
        return [*b.rows(alone, b.query_sizes), *b.rows(both, b.query_sizes)]

    return run


def features_of(points: Tensor) -> Tensor:
    return torch.cat([points * 0.37, -points, points[..., :1] * 11], dim=-1)


def interpolate(b: Batch) -> list[Tensor]:
    index = ops.ball_query(b.query, b.points, 0.6, 5, **b.search).index
    weight = torch.linspace(-1, 2, 5, dtype=b.points.dtype).expand(index.shape)
    return b.rows(ops.interpolate(features_of(b.points), index, weight), b.query_sizes)


def three_nn(b: Batch) -> list[Tensor]:
    return b.rows(ops.three_nn_interpolate(b.query, b.points, features_of(b.points), **b.search), b.query_sizes)


def nms(radius: float, cap: int | None = None, voxels: bool = False) -> Callable[[Batch], list[Tensor]]:
    def run(b: Batch) -> list[Tensor]:
        points = (b.points.nan_to_num(0, 0, 0) * 8).clamp(-(2**40), 2**40).to(torch.int64) if voxels else b.points
        found = ops.centrality_nms(points, radius, max_neighbors=cap, **b.batching)
        sizes = found.offsets.diff().tolist()
        assert sum(sizes) == len(found.index) == found.keep.sum()
        bases = b.offsets[:-1].tolist() if b.packed else [0] * b.count
        kept = [part - base for part, base in zip(found.index.split(sizes), bases, strict=True)]
        return [*kept, *b.rows(found.keep, b.sizes), *b.rows(found.count, b.sizes)]

    return run


OPERATORS: dict[str, Callable[[Batch], list[Tensor]]] = {
    "fps": sample(9),
    "fps_all": sample(100, random=5),
    "fps_parity": sample(60, min_sq_norm=0.3),
    "fps_masked": sample_masked,
    "knn": lambda b: b.neighbors(ops.knn(b.query, b.points, 5, **b.search)),
    "knn_more_than_there_are": lambda b: b.neighbors(ops.knn(b.query, b.points, 80, **b.search)),
    "knn_radius_self": lambda b: b.neighbors(ops.knn(b.query, b.points, 6, radius=0.7, exclude_self=True, **b.search)),
    "ball_nearest": lambda b: b.neighbors(ops.ball_query(b.query, b.points, 0.6, 4, **b.search)),
    "ball_nearest_repeat": lambda b: b.neighbors(ops.ball_query(b.query, b.points, 0.3, 40, fill="repeat", **b.search)),
    "ball_first": lambda b: b.neighbors(ops.ball_query(b.query, b.points, 0.6, 4, mode="first", **b.search)),
    "ball_first_repeat": lambda b: b.neighbors(ops.ball_query(b.query, b.points, 0.3, 8, mode="first", fill="repeat", **b.search)),
    "ball_of_everything": lambda b: b.neighbors(ops.ball_query(b.query, b.points, float("inf"), 3, **b.search)),
    "ball_radius_per_query": lambda b: b.neighbors(
        ops.ball_query(b.query, b.points, torch.nan_to_num(b.query[..., 0].abs(), 1, 1, 1) + 0.1, 5, **b.search)
    ),
    "radius": radius(0.5),
    "radius_everything": radius(float("inf"), exclude_self=True),
    "radius_per_query": radius(0),
    "nms": nms(0.4),
    "nms_capped": nms(1.1, 6),
    "nms_of_everything": nms(float("inf"), 30),
    "nms_of_voxels": nms(2.7, voxels=True),
    "group": group,
    "group_relative": relative(None),
    "group_relative_radius": relative(0.3),
    "interpolate": interpolate,
    "three_nn_interpolate": three_nn,
    "chamfer": chamfer("l2sq", "both"),
    "chamfer_l2_from_x": chamfer("l2", "x"),
    "chamfer_l1_from_y": chamfer("l1", "y"),
    "chamfer_l1": chamfer("l1", "both"),
    "chamfer_one_channel": chamfer("l2sq", "both", 1),
    "chamfer_two_channels_l1": chamfer("l1", "x", 2),
    "chamfer_four_channels_l2": chamfer("l2", "both", 4),
    "chamfer_forty_channels": chamfer("l2sq", "y", 40),
}


def make(inputs: Any, kind: str, form: str, dtype: torch.dtype = torch.float32) -> Batch:
    clouds = inputs.make_clouds(kind, SIZES, dtype=dtype)
    # Queries: some of the points, some others.
    queries = []
    for cloud, other, n in zip(clouds, inputs.make_clouds(kind, QUERY_SIZES, seed=1, dtype=dtype), QUERY_SIZES, strict=True):
        queries.append(torch.cat([cloud[: n // 2], other])[:n])
    return Batch(inputs, form, clouds, queries)


def assert_same(got: list[Tensor], want: list[Tensor]) -> None:
    assert len(got) == len(want)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_backends_and_forms_agree(inputs, on_backend, kind, name, dtype):
    run = OPERATORS[name]
    with on_backend("twin"):
        want = run(make(inputs, kind, "padded", dtype))
        assert_same(run(make(inputs, kind, "packed", dtype)), want)
    for backend, seed in (("cpu", 0), ("cuda", 0), ("cuda", 3)):
        with on_backend(backend, seed):
            padded = run(make(inputs, kind, "padded", dtype))
            packed = run(make(inputs, kind, "packed", dtype))
        assert_same(packed, padded)
        if name.startswith("chamfer"):  # sums are taken in another order
            assert_same(padded[1:], want[1:])
            torch.testing.assert_close(padded[0], want[0], rtol=1e-6, atol=0)
        else:
            assert_same(padded, want)


@pytest.mark.parametrize("name", OPERATORS)
def test_every_schedule_gives_the_same(inputs, on_backend, name):
    """A result that depends on the schedule of the CUDA threads would be a race."""
    results = []
    for seed in range(4):
        with on_backend("cuda", seed):
            results.append(OPERATORS[name](make(inputs, "lattice", "padded")))
    for result in results[1:]:
        assert_same(result, results[0])


@pytest.mark.parametrize("name", OPERATORS)
def test_threads_do_not_matter(inputs, on_backend, name):
    results = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        try:
            with on_backend("cpu"):
                results.append(OPERATORS[name](make(inputs, "duplicates", "packed")))
        finally:
            torch.set_num_threads(1)
    assert_same(results[1], results[0])
    assert_same(results[2], results[0])


@pytest.mark.parametrize("name", OPERATORS)
def test_deterministic_algorithms_change_nothing(inputs, backend, name):
    """Nothing is refused, and memory that torch then fills with NaN (uninitialised outputs) is all written."""
    batch = make(inputs, "tracks", "packed")
    want = OPERATORS[name](batch)
    torch.use_deterministic_algorithms(True)
    try:
        assert_same(OPERATORS[name](batch), want)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("name", OPERATORS)
def test_strides_do_not_matter(inputs, backend, name):
    batch = make(inputs, "uniform", "padded")
    want = OPERATORS[name](batch)
    batch.points = batch.points.transpose(1, 2).contiguous().transpose(1, 2)
    batch.query = torch.stack([batch.query, batch.query], dim=2)[:, :, 0]
    assert not batch.points.is_contiguous()
    assert not batch.query.is_contiguous()
    assert_same(OPERATORS[name](batch), want)


@pytest.mark.parametrize("name", OPERATORS)
def test_input_is_not_changed_and_repeats_are_equal(inputs, backend, name):
    batch = make(inputs, "tracks", "padded")
    points, query = batch.points.clone(), batch.query.clone()
    first = OPERATORS[name](batch)
    assert_same(OPERATORS[name](batch), first)
    torch.testing.assert_close(batch.points, points, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(batch.query, query, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("form", ["padded", "packed"])
def test_no_clouds_at_all(inputs, backend, name, form):
    empty = torch.zeros(0, 3)
    batch = Batch(inputs, form, [empty], [empty])
    if form == "padded":
        batch.points, batch.query = torch.zeros(0, 5, 3), torch.zeros(0, 4, 3)
        batch.batching = {"lengths": torch.zeros(0, dtype=torch.int64)}
        batch.search = {**batch.batching, "query_lengths": torch.zeros(0, dtype=torch.int64)}
        batch.count, batch.sizes, batch.query_sizes = 0, [], []
    if name != "fps_masked":
        for result in OPERATORS[name](batch):
            assert result.numel() <= 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", [name for name in OPERATORS if name != "fps_masked"])
def test_a_gpu_gives_what_the_cpu_gives(inputs, name):
    for kind in inputs.KINDS:
        for form in ("padded", "packed"):
            want = OPERATORS[name](make(inputs, kind, form))
            got = [result.cpu() for result in OPERATORS[name](make(inputs, kind, form).cuda())]
            if name.startswith("chamfer"):
                torch.testing.assert_close(got.pop(0), want.pop(0), rtol=1e-6, atol=0)
            assert_same(got, want)
