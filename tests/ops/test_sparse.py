"""Neighbour maps of sparse voxels: against a dictionary, against dense convolutions, and the rules for order, range and errors."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from geossl import ops

KERNELS = [
    (3, 1, 1),
    (2, 2, 1),
    (3, 2, 1),
    ((1, 2, 3), 1, (1, 2, 1)),
    ((3, 1, 2), (1, 1, 2), 1),
    (4, 3, 2),
    (1, 1, 1),
    (5, 1, 1),
    (1, 2, 1),
]


def voxels(inputs, kind: str, batch: int = 2) -> Tensor:
    """The cells that clouds of one kind fill, ``[V, 4]`` int32 in a random order, negative coordinates too."""
    parts = []
    for b, cloud in enumerate(inputs.make_clouds(kind, (70,) * batch)):
        cloud = cloud[cloud.isfinite().all(1)]
        size = float((cloud.amax(0) - cloud.amin(0)).clamp(max=1e3).max()) / 6 + 1e-9
        cells = ((cloud - cloud[0]) / size).floor().clamp(-1e6, 1e6).int()  # three axes of more cells would not fit 63 bits
        parts.append(torch.cat([torch.full((len(cells), 1), 3 * b - 1, dtype=torch.int32), cells], 1))
    found = torch.unique(torch.cat(parts), dim=0)
    return found[torch.randperm(len(found), generator=torch.Generator().manual_seed(0))]


def triple(value) -> tuple[int, int, int]:
    return value if isinstance(value, tuple) else (value,) * 3


def by_dictionary(coords: Tensor, kernel, stride, dilation) -> tuple[list[list[int]], list[tuple], list[tuple]]:
    """The definition, one voxel after the other."""
    kernel, stride, dilation = triple(kernel), triple(stride), triple(dilation)
    axes = [[d * (i - (n - 1) // 2) for i in range(n)] for n, d in zip(kernel, dilation, strict=True)]
    offsets = list(itertools.product(*axes))
    rows = {tuple(c): row for row, c in enumerate(coords.tolist())}
    if stride == (1, 1, 1):
        outputs = list(rows)
    else:
        outputs = set()
        for b, *xyz in rows:
            for offset in offsets:
                q = [c - o for c, o in zip(xyz, offset, strict=True)]
                if all(v % s == 0 for v, s in zip(q, stride, strict=True)):
                    outputs.add((b, *(v // s for v, s in zip(q, stride, strict=True))))
        outputs = sorted(outputs)
    index = [
        [rows.get((b, *(c * s + o for c, s, o in zip(xyz, stride, offset, strict=True))), -1) for b, *xyz in outputs] for offset in offsets
    ]
    return index, outputs, offsets


@pytest.mark.parametrize("form", KERNELS, ids=str)
def test_definition_on_every_backend(inputs, on_backend, kind, form):
    coords = voxels(inputs, kind)
    index, outputs, offsets = by_dictionary(coords, *form)
    for backend, seed in (("twin", 0), ("cpu", 0), ("cuda", 0), ("cuda", 3)):
        with on_backend(backend, seed):
            found = ops.neighbor_map(coords, *form)
        assert found.index.tolist() == index
        assert found.coords.tolist() == [list(c) for c in outputs]
        assert found.coords.dtype == torch.int32
        assert found.offsets.tolist() == [list(o) for o in offsets]


@settings(max_examples=60, deadline=None)
@given(
    cells=st.sets(st.tuples(st.integers(0, 2), st.integers(-3, 3), st.integers(-3, 3), st.integers(-3, 3)), max_size=20),
    kernel=st.tuples(*[st.integers(1, 4)] * 3),
    stride=st.tuples(*[st.integers(1, 3)] * 3),
    dilation=st.tuples(*[st.integers(1, 2)] * 3),
    seed=st.integers(0, 99),
)
def test_properties(cells, kernel, stride, dilation, seed):
    coords = torch.tensor(sorted(cells), dtype=torch.int32).view(-1, 4)
    coords = coords[torch.randperm(len(coords), generator=torch.Generator().manual_seed(seed))]
    index, outputs, _ = by_dictionary(coords, kernel, stride, dilation)
    found = ops.neighbor_map(coords, kernel, stride, dilation)
    assert found.index.tolist() == [list(row) for row in index]
    assert found.coords.tolist() == [list(c) for c in outputs]
    if stride != (1, 1, 1) and len(coords):
        assert bool((found.index >= 0).any(0).all())


def dense(coords: Tensor, feats: Tensor, size: int) -> Tensor:
    grid = feats.new_zeros(2, size, size, size, feats.shape[1])
    return grid.index_put(tuple(coords.long().T), feats).permute(0, 4, 1, 2, 3)


@pytest.mark.parametrize(("kernel", "stride", "dilation"), [(3, 1, 1), (3, 1, 2), (3, 2, 1), (2, 2, 1), (5, 1, 1)])
def test_convolution_equals_the_dense_one(backend, kernel, stride, dilation):
    size, generator = 8, torch.Generator().manual_seed(0)
    coords = torch.nonzero(torch.rand(2, size, size, size, generator=generator) < 0.15).int()
    coords = coords[torch.randperm(len(coords), generator=generator)]
    feats = torch.randn(len(coords), 3, dtype=torch.float64, generator=generator).requires_grad_()
    weight = torch.randn(5, 3, *[kernel] * 3, dtype=torch.float64, generator=generator).requires_grad_()
    found = ops.neighbor_map(coords, kernel, stride, dilation)
    sparse = torch.einsum("kvc,dck->vd", ops.group(feats, found.index), weight.flatten(2))
    padding = (kernel - 1) // 2 * dilation
    full = torch.nn.functional.conv3d(dense(coords, feats, size), weight, stride=stride, padding=padding, dilation=dilation)
    inside = (found.coords[:, 1:] < torch.tensor(full.shape[2:])).all(1) & (found.coords[:, 1:] >= 0).all(1)
    b, x, y, z = found.coords[inside].long().T
    want, got = full[b, :, x, y, z], sparse[inside]
    torch.testing.assert_close(got, want)
    cotangent = torch.randn(want.shape, dtype=torch.float64, generator=generator)
    for a, e in zip(
        torch.autograd.grad(got, (feats, weight), cotangent), torch.autograd.grad(want, (feats, weight), cotangent), strict=True
    ):
        torch.testing.assert_close(a, e)
    if stride > 1:  # where no voxel lies under the kernel, the dense result is 0
        assert int((full.abs().sum(1) > 0).sum()) == int(inside.sum())


def test_large_coordinates_and_order(backend):
    far = torch.tensor([[0, 2**31 - 1, -(2**31), 7], [0, 2**31 - 2, -(2**31), 7], [0, 2**31 - 1, 5, 7]], dtype=torch.int32)
    assert ops.neighbor_map(far, (3, 1, 1)).index.tolist() == [[1, -1, -1], [0, 1, 2], [-1, 0, -1]]
    with pytest.raises(ValueError, match=r"more than 63 bits can number; their coordinates go from \[0, -2147483647, -2147483648"):
        ops.neighbor_map(torch.cat([far, -far]), 3)
    with pytest.raises(ValueError, match="output coordinates could leave the range of int32"):
        ops.neighbor_map(far, 3, (1, 1, 2))


def test_no_voxels_strides_and_wide_integers(backend):
    none = ops.neighbor_map(torch.zeros(0, 4, dtype=torch.int32), 3)
    assert none.index.shape == (27, 0)
    none = ops.neighbor_map(torch.zeros(0, 4, dtype=torch.int32), 3, 2)
    assert none.index.shape == (27, 0)
    assert none.coords.shape == (0, 4)
    coords = torch.randperm(4**4)[:60]
    coords = torch.stack([coords // 64, coords // 16 % 4, coords // 4 % 4, coords % 4], 1).int()
    for stride in (1, 2):
        want = ops.neighbor_map(coords, 3, stride)
        for same in (coords.long(), coords.T.contiguous().T, coords.repeat_interleave(2, 0)[::2]):
            for a, b in zip(ops.neighbor_map(same, 3, stride), want, strict=True):
                assert torch.equal(a, b)


def test_threads_do_not_matter(on_backend):
    cells = torch.randperm(40**3)[:20000]
    coords = torch.stack([cells * 0, cells // 1600, cells // 40 % 40, cells % 40], 1).int()
    results = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        try:
            with on_backend("cpu"):
                results.append([*ops.neighbor_map(coords, 3), *ops.neighbor_map(coords, 3, 2)])
        finally:
            torch.set_num_threads(1)
    with on_backend("twin"):
        results.append([*ops.neighbor_map(coords, 3), *ops.neighbor_map(coords, 3, 2)])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, results[0], strict=True))


def test_compile():
    torch._dynamo.reset()

    def run(coords: Tensor, feats: Tensor) -> tuple[Tensor, Tensor]:
        same, half = ops.neighbor_map(coords, 3), ops.neighbor_map(coords, 2, 2)
        return ops.group(feats, same.index).sum(0), ops.group(feats, half.index).sum(0)

    compiled = torch.compile(run, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True, error_on_recompile=True):
        for count in (20, 50):
            cells = torch.randperm(500)[:count]
            coords = torch.stack([cells * 0, cells // 64, cells // 8 % 8, cells % 8], 1).int()
            torch.testing.assert_close(compiled(coords, torch.ones(count, 2)), run(coords, torch.ones(count, 2)))


C = torch.tensor([[0, 1, 2, 3], [0, 0, 0, 0]], dtype=torch.int32)
CASES = [
    (lambda: ops.neighbor_map(C.long() + 2**33), ValueError, "neighbor_map: coords must lie in the range of int32, but they go from"),
    (lambda: ops.neighbor_map(C.float()), TypeError, "neighbor_map: coords must be an int32 or int64 tensor .*float32"),
    (lambda: ops.neighbor_map(C[:, 1:]), ValueError, r"coords must be \[V, 4\] \(batch, x, y, z\), got int32 \[2, 3\]"),
    (lambda: ops.neighbor_map(C, 0), ValueError, "kernel_size must be at least 1, got 0"),
    (lambda: ops.neighbor_map(C, (3, 3)), ValueError, r"kernel_size must be one whole number or three \(x, y, z\), got \(3, 3\)"),
    (lambda: ops.neighbor_map(C, 3, (1, -1, 1)), ValueError, "stride must be at least 1, got -1"),
    (lambda: ops.neighbor_map(C, 3, 1, 1.5), TypeError, "dilation must be a whole number, got float 1.5"),
    (
        lambda: ops.neighbor_map(C[[0, 1, 0]]),
        ValueError,
        r"coords must be distinct, but 1 repeat others: rows 0 and 2 are both \[0, 1, 2, 3\]",
    ),
]


@pytest.mark.parametrize("number", range(len(CASES)), ids=lambda i: str(CASES[i][2])[:40])
def test_wrong_arguments(backend, number):
    call, error, message = CASES[number]
    with pytest.raises(error, match=message):
        call()
