"""Voxels: numbering against the twin, the promises about order, reductions and their gradients, and the way back to points."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from geossl import ops
from geossl.ops.voxels import ORDERS, REDUCTIONS, VoxelMap

SIZES = (0, 40, 0, 1, 70, 0)
VARIANTS = {
    "plain": {"voxel_size": 0.3},
    "three_sizes": {"voxel_size": (0.01, 0.5, 2.0), "origin": (0.05, -3.0, 0.2)},
    "range": {"voxel_size": 0.25, "range": ((0.0, -1.0, 0.1), (0.7, 5.0, 3.0))},
    "capped": {"voxel_size": 0.5, "max_points": 2},
    "one_voxel": {"voxel_size": 1e9, "origin": (-5e8, -5e8, -5e8)},
}


def batch(inputs, kind, form, dtype=torch.float32):
    clouds = inputs.make_clouds(kind, SIZES, dtype=dtype)
    points, cut = (inputs.to_padded if form == "padded" else inputs.to_packed)(clouds)
    return points, {"lengths" if form == "padded" else "offsets": cut}


def attempt(points, options, batching):
    """The map, or the error, which must then be the same everywhere."""
    try:
        return ops.voxelize(points, **options, **batching)
    except ValueError as error:
        assert "beyond int32" in str(error) or "63 bits" in str(error)  # noqa: PT017
        return str(error)


def assert_same(got, want):
    if isinstance(want, str):
        assert got == want
        return
    for a, b in zip(got[:5], want[:5], strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


def check_invariants(points: torch.Tensor, found: VoxelMap) -> None:
    flat, inverse = points.reshape(-1, 3), found.inverse.reshape(-1)
    assert torch.equal(found.row_splits.diff(), found.counts)
    assert bool((found.counts >= 1).all())
    assert torch.equal(inverse[found.perm], torch.repeat_interleave(found.counts))
    assert int((inverse >= 0).sum()) == len(found.perm)
    cells = torch.floor(
        (flat.double() - torch.tensor(found.origin, dtype=torch.float64)) / torch.tensor(found.voxel_size, dtype=torch.float64)
    )
    assert torch.equal(cells[found.perm].int(), found.coords[inverse[found.perm], 1:])
    assert len(torch.unique(found.coords, dim=0)) == len(found.coords)
    inside = torch.repeat_interleave(found.counts)
    same = inside[1:] == inside[:-1]
    assert bool((found.perm.diff()[same] > 0).all())


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_backends_and_forms_agree(inputs, on_backend, kind, dtype, order):
    for options in VARIANTS.values():
        results = {}
        for form in ("padded", "packed"):
            points, batching = batch(inputs, kind, form, dtype)
            for backend, seed in (("twin", 0), ("cpu", 0), ("cuda", 0), ("cuda", 3)):
                with on_backend(backend, seed):
                    results[form, backend, seed] = attempt(points, options | {"order": order}, batching)
            want = results[form, "twin", 0]
            for key, got in results.items():
                if key[0] == form:
                    assert_same(got, want)
            if not isinstance(want, str):
                check_invariants(points, want)
        padded, packed = results["padded", "twin", 0], results["packed", "twin", 0]
        if isinstance(padded, str):
            assert padded == packed
            continue
        assert torch.equal(padded.coords, packed.coords)
        assert torch.equal(padded.counts, packed.counts)
        rows = torch.cat([row[:n] for row, n in zip(padded.inverse, SIZES, strict=True)])
        assert torch.equal(rows, packed.inverse)
        behind = [row[n:] for row, n in zip(padded.inverse, SIZES, strict=True)]
        assert bool((torch.cat(behind) == -1).all())


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("voxel_size", [0.3, 0.01, 1e-6], ids=["table", "packed_sort", "wide_sort"])
@pytest.mark.parametrize("max_points", [None, 3], ids=["all", "capped"])
def test_threads_and_schedules_do_not_matter(inputs, on_backend, order, voxel_size, max_points):
    """200,000 rows are cut into three pieces; every way to number voxels gives what the others give."""
    points = torch.cat([inputs.make_cloud("uniform", 99_999), inputs.make_cloud("duplicates", 100_000), inputs.make_cloud("invalid", 1)])
    offsets = torch.tensor([0, 70_000, 70_000, 200_000])
    options = {"order": order, "max_points": max_points, "offsets": offsets}
    results = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        try:
            with on_backend("cpu"):
                results.append(attempt(points, {"voxel_size": voxel_size} | options, {}))
        finally:
            torch.set_num_threads(1)
    if voxel_size < 0.3 or (order, max_points) == ("first", 3):
        with on_backend("twin"):
            results.append(attempt(points, {"voxel_size": voxel_size} | options, {}))
    for result in results[1:]:
        assert_same(result, results[0])


def test_every_schedule_gives_the_same(inputs, on_backend):
    points, batching = batch(inputs, "lattice", "padded")
    features = torch.rand(*points.shape[:2], 5)
    results = []
    for seed in range(4):
        with on_backend("cuda", seed):
            found = ops.voxelize(points, 0.7, order="first", **batching)
            blend = ops.devoxelize(torch.rand(len(found.coords), 2, generator=torch.manual_seed(0)), found, points, "trilinear", **batching)
            results.append((*found[:5], *(ops.voxel_reduce(features, found, r) for r in REDUCTIONS), blend))
    for result in results[1:]:
        for a, b in zip(result, results[0], strict=True):
            assert torch.equal(a, b)


def test_wide_keys(inputs, on_backend):
    """Records of a key and a row that do not fit one word, and 64-bit keys on the GPU."""
    points = torch.rand(1, 3000, 3, dtype=torch.float64)
    points[0, 1] = torch.nan
    results = []
    for backend in ("twin", "cpu", "cuda"):
        with on_backend(backend):
            results.append([ops.voxelize(points, (1e-6, 1e-6, 2e-6), order=order) for order in ("lexicographic", "first")])
    for result in results[1:]:
        for got, want in zip(result, results[0], strict=True):
            assert_same(got, want)


def test_cells_floor_and_ranges_are_half_open(backend):
    points = torch.tensor([[[-0.5, 0.0, 0.999], [-1.0, 1.0, 0.0], [-1.001, 0.0, 0.0], [1.0, 0.0, 0.0]]])
    assert ops.voxelize(points, 1.0, order="first").coords[:, 1:].tolist() == [[-1, 0, 0], [-1, 1, 0], [-2, 0, 0], [1, 0, 0]]
    found = ops.voxelize(points, 1.0, range=((-1, 0, 0), (1, 1, 1)))
    assert found.inverse.tolist() == [[0, -1, -1, -1]]
    # A bound that float32 cannot hold exactly: 0.1 in float32 is above 0.1.
    tenth = torch.full((1, 1, 3), 0.1)
    assert ops.voxelize(tenth, 1.0, range=((0.1,) * 3, (1,) * 3)).inverse.tolist() == [[0]]
    assert ops.voxelize(tenth, 1.0, range=((0,) * 3, (0.1,) * 3)).inverse.tolist() == [[-1]]
    # True division: 0.3 / 0.1 rounds to 3, multiplied by the reciprocal it is 3.0000000000000004, and 0.6 / 0.2 is 2.9999999999999996.
    exact = torch.tensor([[[0.3, 0.6, 0.7]]], dtype=torch.float64)
    want = [math.floor(value / 0.1) for value in (0.3, 0.6, 0.7)]
    assert ops.voxelize(exact, 0.1).coords[0, 1:].tolist() == want


NARROW, WIDE = torch.float32, torch.float64


@pytest.mark.parametrize(
    ("dtype", "size"), [(NARROW, 0.1), (NARROW, 0.02), (WIDE, 0.1), (WIDE, 0.02), (WIDE, 1 / 3), (WIDE, 2.0**-400), (WIDE, 2.0**400)]
)
def test_cells_next_to_whole_numbers(backend, dtype, size):
    """Kernels may divide by other means than a division, but not be off by one where a quotient is all but whole."""
    edge = (torch.arange(-300, 301, dtype=torch.float64) * size).to(dtype)
    infinite = torch.full_like(edge, torch.inf)
    beside = torch.cat([edge, torch.nextafter(edge, infinite), torch.nextafter(edge, -infinite), edge + edge[-1] / 1000])
    zero = torch.zeros_like(beside)
    for points in (torch.stack([beside, zero, zero], 1), torch.stack([zero, zero, beside], 1)):
        found = ops.voxelize(points[None], size)
        assert len(found.perm) == len(points)
        check_invariants(points, found)


def test_orders(backend):
    grid = torch.cartesian_prod(*[torch.arange(4.0)] * 3)
    points = (grid[torch.randperm(64, generator=torch.manual_seed(1))] - 7)[None]
    cells = {order: ops.voxelize(points, 1.0, order=order).coords[:, 1:].long() for order in ORDERS}
    assert torch.equal(cells["lexicographic"], (grid - 7).long())
    assert torch.equal(cells["first"], points[0].long())
    place = torch.arange(64)
    morton = torch.stack([(place >> s & 1) | (place >> (s + 3) & 1) << 1 for s in (2, 1, 0)], dim=1)
    assert torch.equal(cells["morton"] + 7, morton)
    # The Hilbert curve goes from neighbour to neighbour through all cells.
    assert torch.equal(cells["hilbert"].diff(dim=0).abs().sum(1), torch.ones(63, dtype=torch.int64))


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 2**31), st.integers(1, 60), st.floats(0.05, 3), st.sampled_from(ORDERS[:3]))
def test_permuting_points_permutes_only_inverse(seed, n, size, order):
    generator = torch.manual_seed(seed)
    points = torch.randn(1, n, 3, generator=generator)
    shuffle = torch.randperm(n, generator=generator)
    a, b = ops.voxelize(points, size, order=order), ops.voxelize(points[:, shuffle], size, order=order)
    check_invariants(points, a)
    assert torch.equal(a.coords, b.coords)
    assert torch.equal(a.counts, b.counts)
    assert torch.equal(a.inverse[:, shuffle], b.inverse)
    features = torch.randn(1, n, 2, generator=generator)
    assert torch.equal(ops.voxel_reduce(features, a, "max"), ops.voxel_reduce(features[:, shuffle], b, "max"))
    assert torch.equal(ops.devoxelize(ops.voxel_reduce(features, a, "max"), a) >= features, torch.ones_like(features, dtype=torch.bool))


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (2, 4)])
def test_nothing_to_find(backend, shape):
    found = ops.voxelize(torch.full((*shape, 3), torch.nan), 1.0)
    assert found.coords.shape == (0, 4)
    assert found.row_splits.tolist() == [0]
    assert torch.equal(found.inverse, torch.full(shape, -1))
    features = torch.rand(*shape, 3, requires_grad=True)
    for reduce in REDUCTIONS:
        out = ops.voxel_reduce(features, found, reduce)
        assert out.shape == (0, 3)
        out.sum().backward()
    assert torch.equal(features.grad, torch.zeros(*shape, 3))
    assert torch.equal(ops.devoxelize(torch.zeros(0, 2), found), torch.zeros(*shape, 2))
    assert torch.equal(ops.devoxelize(torch.zeros(0, 2), found, torch.rand(*shape, 3), "trilinear"), torch.zeros(*shape, 2))


@pytest.mark.parametrize("reduce", REDUCTIONS)
@pytest.mark.parametrize("channels", [0, 1, 3, 32, 37])
def test_reduce_agrees(inputs, on_backend, reduce, channels):
    points, batching = batch(inputs, "uniform", "packed")
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        features = torch.randint(-3, 4, (len(points), channels)).to(dtype) + torch.rand(len(points), channels).to(dtype)
        results = []
        for backend, threads in (("twin", 1), ("cpu", 1), ("cpu", 2), ("cuda", 1)):
            torch.set_num_threads(threads)
            try:
                with on_backend(backend):
                    found = ops.voxelize(points, 0.4, range=((0.1,) * 3, (1,) * 3), **batching)
                    results.append(ops.voxel_reduce(features, found, reduce))
            finally:
                torch.set_num_threads(1)
        assert results[0].dtype == dtype
        for result in results[1:]:
            torch.testing.assert_close(result, results[0], rtol=0, atol=0)


@pytest.mark.parametrize("channels", [5, 32])
def test_reduce_threads_are_bit_equal(inputs, channels):
    """Large enough for two threads: voxels are shared out."""
    points, features = torch.rand(1, 120_000, 3), torch.randn(1, 120_000, channels)
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        try:
            found = ops.voxelize(points, 0.05)
            results.append([ops.voxel_reduce(features, found, reduce) for reduce in REDUCTIONS])
        finally:
            torch.set_num_threads(1)
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)
    want = torch.zeros(len(found.counts), channels).index_add_(0, found.inverse[0], features[0]) / found.counts[:, None]
    torch.testing.assert_close(results[0][REDUCTIONS.index("mean")], want)


def test_extrema_take_nan_and_the_lowest_row(backend):
    found = ops.voxelize(torch.zeros(1, 4, 3), 1.0)
    features = torch.tensor([[[1.0, 2], [3, torch.nan], [3, 5], [0, torch.nan]]], requires_grad=True)
    out = ops.voxel_reduce(features, found, "max")
    torch.testing.assert_close(out, torch.tensor([[3.0, torch.nan]]), equal_nan=True)
    out.sum().backward()
    assert features.grad.tolist() == [[[0, 0], [1, 1], [0, 0], [0, 0]]]
    infinite = torch.full((1, 4, 1), -torch.inf)
    assert ops.voxel_reduce(infinite, found, "max").item() == -torch.inf


@pytest.mark.parametrize("reduce", REDUCTIONS)
def test_gradients(backend, reduce):
    found = ops.voxelize(torch.rand(2, 6, 3, generator=torch.manual_seed(3)), 0.6, lengths=torch.tensor([6, 4]), max_points=2)
    features = torch.rand(2, 6, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: ops.voxel_reduce(x, found, reduce), features)
    assert torch.autograd.gradgradcheck(lambda x: ops.voxel_reduce(x, found, reduce), features)


def test_devoxelize_gradients(backend):
    points = torch.rand(2, 6, 3)
    found = ops.voxelize(points, 0.6)
    features = torch.rand(len(found.counts), 2, dtype=torch.float64, requires_grad=True)
    for arguments in ((), (points, "trilinear")):
        assert torch.autograd.gradcheck(lambda x, a=arguments: ops.devoxelize(x, found, *a), features)
        assert torch.autograd.gradgradcheck(lambda x, a=arguments: ops.devoxelize(x, found, *a), features)


def test_trilinear_agrees(inputs, on_backend, kind):
    for form in ("padded", "packed"):
        points, batching = batch(inputs, kind, form)
        results = []
        for backend in ("twin", "cpu", "cuda"):
            with on_backend(backend):
                found = attempt(points, {"voxel_size": 0.3}, batching)
                if isinstance(found, str):
                    continue
                query = points + 0.2
                features = torch.arange(2.0 * len(found.counts)).view(-1, 2)
                results.append(ops.devoxelize(features, found, query, "trilinear", **batching))
        for result in results[1:]:
            assert torch.equal(result, results[0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_trilinear_blends_half_types_in_float32(backend, dtype):
    points = torch.rand(1, 300, 3, generator=torch.manual_seed(2))
    found = ops.voxelize(points, 0.3)
    assert torch.equal(
        ops.devoxelize(torch.full((len(found.counts), 1), 3.0, dtype=dtype), found, points, "trilinear"),
        torch.full((1, 300, 1), 3.0, dtype=dtype),
    )
    features = torch.rand(len(found.counts), 4).to(dtype)
    want = ops.devoxelize(features.float(), found, points, "trilinear").to(dtype)
    assert torch.equal(ops.devoxelize(features, found, points, "trilinear"), want)


def test_trilinear_is_linear_between_centres(backend):
    grid = torch.cartesian_prod(*[torch.arange(3.0)] * 3)
    found = ops.voxelize(grid[None] * 0.5 + 0.25, 0.5)
    field = (found.coords[:, 1:] * 0.5 + 0.25) @ torch.tensor([[1.0], [2.0], [-3.0]])
    points = torch.rand(1, 50, 3) + 0.25
    torch.testing.assert_close(ops.devoxelize(field, found, points, "trilinear"), points @ torch.tensor([[1.0], [2.0], [-3.0]]))
    far = torch.tensor([[[9.0, 9, 9], [torch.nan, 0, 0], [1e30, 0, 0]]])
    assert torch.equal(ops.devoxelize(field, found, far, "trilinear"), torch.zeros(1, 3, 1))
    assert torch.equal(
        ops.devoxelize(torch.full((27, 1), 2.0), found, torch.tensor([[[-0.1, 0.3, 0.3]]]), "trilinear"), torch.full((1, 1, 1), 2.0)
    )


P, F = torch.rand(2, 8, 3), torch.rand(2, 8, 4)
FOUND = VoxelMap(*(torch.zeros(shape, dtype=torch.int64) for shape in ((1, 4), (2, 8), (1,), (2,), (16,))), (1.0,) * 3, (0.0,) * 3)
CASES = [
    (lambda: ops.voxelize(P[0], 1.0), ValueError, r"voxelize: points must be \[B, N, 3\]"),
    (lambda: ops.voxelize(P, 0.0), ValueError, "voxelize: voxel_size must be positive and finite, got 0.0"),
    (lambda: ops.voxelize(P, (1.0, math.nan, 1.0)), ValueError, "voxel_size must be positive and finite"),
    (lambda: ops.voxelize(P, (1.0, 1.0)), ValueError, "voxel_size must be a number or three of them .* got 2"),
    (lambda: ops.voxelize(P, "big"), TypeError, "voxel_size must be a number or three of them"),
    (lambda: ops.voxelize(P, 1.0, origin=(0, 0, math.inf)), ValueError, "origin must be finite"),
    (lambda: ops.voxelize(P, 1.0, range=((0, 0, 0), (1, 0, 1))), ValueError, "range must begin below its end"),
    (lambda: ops.voxelize(P, 1.0, range=(0, 0, 0, 1, 1, 1)), TypeError, r"range must be \(\(x0, y0, z0\)"),
    (lambda: ops.voxelize(P, 1.0, order="zyx"), ValueError, "voxelize order"),
    (lambda: ops.voxelize(P, 1.0, max_points=0), ValueError, "max_points must be at least 1"),
    (lambda: ops.voxelize(P, 1.0, lengths=torch.tensor([9, 1])), ValueError, "lengths must lie between 0 and 8"),
    (lambda: ops.voxelize(P * 1e9, 0.01), ValueError, r"cloud 0 reach from .* beyond int32. Use larger voxels"),
    (lambda: ops.voxelize(P * 2e9 - 1e9, 1.0), ValueError, "extend over up to .* more than 63 bits"),
    (lambda: ops.voxelize(P * 4e6, 1.0, order="hilbert"), ValueError, "in order 'hilbert' takes more than 63 bits"),
    (lambda: ops.voxel_reduce(F[:1], FOUND), ValueError, r"features must be \[2, 8, 'C'\]"),
    (lambda: ops.voxel_reduce(F.long(), FOUND), TypeError, "features must be a floating tensor"),
    (lambda: ops.voxel_reduce(F, FOUND, "median"), ValueError, "voxel_reduce reduction"),
    (lambda: ops.voxel_reduce(F, FOUND[:5]), TypeError, "voxel_map must be the VoxelMap that voxelize returns"),
    (lambda: ops.devoxelize(F[0], FOUND), ValueError, r"voxel_features must be \[1, 'C'\]"),
    (lambda: ops.devoxelize(F[0, :1], FOUND, P), ValueError, 'give others to mode="trilinear"'),
    (lambda: ops.devoxelize(F[0, :1], FOUND, mode="trilinear"), ValueError, "needs the points"),
    (lambda: ops.devoxelize(F[0, :1], FOUND, P, "cubic"), ValueError, "devoxelize mode"),
]


@pytest.mark.parametrize("number", range(len(CASES)), ids=lambda i: str(CASES[i][2])[:40])
def test_wrong_arguments(backend, number):
    call, error, message = CASES[number]
    with pytest.raises(error, match=message):
        call()


def test_compile_autocast_and_strides():
    def run(points, features):
        found = ops.voxelize(points, 0.4)
        mean = ops.voxel_reduce(features, found)
        return found.coords, ops.devoxelize(mean, found) + ops.devoxelize(mean, found, points, "trilinear")

    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        for n in (20, 33):
            points, features = torch.rand(2, n, 3), torch.rand(2, n, 4)
            want = run(points, features)
            for got in (compiled(points, features), run(points.mT.contiguous().mT, features.mT.contiguous().mT)):
                torch.testing.assert_close(got, want)
    half = points.bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        found = ops.voxelize(half, 0.4)
        assert ops.voxel_reduce(features.bfloat16(), found).dtype == torch.bfloat16
    assert_same(found, ops.voxelize(half.float(), 0.4))


def test_deterministic_algorithms(backend):
    torch.use_deterministic_algorithms(True)
    try:
        points = torch.rand(1, 50, 3)
        features = torch.rand(1, 50, 2, requires_grad=True)
        for reduce in REDUCTIONS:
            ops.voxel_reduce(features, ops.voxelize(points, 0.3, order="first"), reduce).sum().backward()
    finally:
        torch.use_deterministic_algorithms(False)
    assert np.isfinite(features.grad.numpy()).all()
