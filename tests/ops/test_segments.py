"""Reductions over segments: backends agree, both forms agree, gradients, and the rules for empty segments, ties and NaN."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from geossl import ops
from geossl.ops import _dispatch

REDUCTIONS = ("sum", "mean", "max", "min", "softmax", "logsumexp")
SIZES = (0, 7, 0, 1, 40, 300, 0)  # empty first, in the middle and last


def values(inputs, kind: str, dtype: torch.dtype = torch.float32, columns: int = 1) -> Tensor:
    """Coordinates of a cloud as features, ``[M, 3 * columns]``."""
    return inputs.make_cloud(kind, sum(SIZES) * columns, dtype=dtype).reshape(sum(SIZES), -1)


def unsorted(x: Tensor, seed: int = 0) -> tuple[Tensor, Tensor]:
    """The rows of the segments mixed, their order within a segment kept, and rows without a segment between them: rows and index."""
    generator = torch.Generator().manual_seed(seed)
    segment = torch.arange(len(SIZES)).repeat_interleave(torch.tensor(SIZES))
    index = torch.cat([segment, torch.full((20,), -1)])[torch.randperm(len(segment) + 20, generator=generator)]
    mixed = x.new_full((len(index), *x.shape[1:]), torch.nan)  # what is left out is never looked at
    mixed[index >= 0] = x[torch.argsort(torch.argsort(index[index >= 0], stable=True))]
    return mixed, index


def all_results(x: Tensor) -> dict[str, Tensor]:
    splits = ops.offsets_from_lengths(torch.tensor(SIZES))
    mixed, index = unsorted(x)
    out = {}
    for reduce in REDUCTIONS:
        sorted_form = ops.segment_reduce(x, splits, reduce, fill=5.0)
        form = ops.scatter_reduce(mixed, index, len(SIZES), reduce, fill=5.0)
        if reduce == "softmax":
            assert not form[index < 0].any()
            form = form[index >= 0][torch.argsort(index[index >= 0], stable=True)]
        if not (reduce in ("sum", "mean", "softmax", "logsumexp") and _dispatch._forced == "twin"):
            torch.testing.assert_close(form, sorted_form, rtol=0, atol=0, equal_nan=True)
        out[reduce] = sorted_form
        if reduce in ("max", "min"):
            best, out[f"arg{reduce}"] = ops.scatter_reduce(mixed, index, len(SIZES), reduce, fill=5.0, return_arg=True)
            torch.testing.assert_close(best, sorted_form, rtol=0, atol=0, equal_nan=True)
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("columns", [1, 13])
def test_backends_agree(inputs, on_backend, kind, dtype, columns):
    x = values(inputs, kind, dtype, columns)
    with on_backend("twin"):
        want = all_results(x)
    results = []
    for backend, seed in (("cpu", 0), ("cuda", 0), ("cuda", 1), ("cuda", 2), ("cuda", 3)):
        with on_backend(backend, seed):
            results.append(all_results(x))
    for got in results[1:]:
        for name, result in got.items():
            torch.testing.assert_close(result, results[0][name], rtol=0, atol=0, equal_nan=True)
    tight = 1e-12 if dtype == torch.float64 else 2e-5
    scale = float(torch.nan_to_num(x, 0, 0, 0).abs().max())
    for name, result in results[0].items():
        exact = name in ("max", "min", "argmax", "argmin")
        limits = {"rtol": 0, "atol": 0} if exact else {"rtol": tight, "atol": tight * (scale if name in ("sum", "mean") else 1e-2)}
        torch.testing.assert_close(result, want[name], equal_nan=True, **limits)


def test_definition(backend):
    x, splits = torch.rand(12, 2, 3, dtype=torch.float64) - 0.5, torch.tensor([0, 0, 5, 6, 6, 12])
    parts = [x[a:b] for a, b in zip(splits[:-1].tolist(), splits[1:].tolist(), strict=True)]
    want = {
        "sum": [p.sum(0) for p in parts],
        "mean": [p.mean(0) if len(p) else torch.zeros(2, 3) for p in parts],
        "max": [p.amax(0) if len(p) else torch.full((2, 3), -7.0) for p in parts],
        "min": [p.amin(0) if len(p) else torch.full((2, 3), -7.0) for p in parts],
        "logsumexp": [p.logsumexp(0) if len(p) else torch.full((2, 3), -torch.inf) for p in parts],
    }
    for reduce, rows in want.items():
        torch.testing.assert_close(ops.segment_reduce(x, splits, reduce, fill=-7), torch.stack([r.double() for r in rows]))
    torch.testing.assert_close(ops.segment_reduce(x, splits, "softmax"), torch.cat([p.softmax(0) for p in parts]))
    assert torch.equal(ops.segment_reduce(x[:, 0, 0], splits, "max"), ops.segment_reduce(x, splits, "max")[:, 0, 0])  # [M] too


def test_exponential_is_accurate(on_backend):
    x = torch.cat([torch.linspace(-110, 0, 20001), torch.rand(1000) * -1e-3, -torch.logspace(-6, 2, 500)])
    pairs = torch.stack([x, torch.zeros_like(x)], 1).flatten()  # segments (x, 0): softmax is e^x / (e^x + 1)
    splits = torch.arange(0, len(pairs) + 1, 2)
    want = torch.sigmoid(x.double())
    with on_backend("cpu"):
        got = ops.segment_reduce(pairs, splits, "softmax")[::2]
    normal = want > 1e-37
    assert float(((got - want)[normal] / want[normal]).abs().max()) < 5e-7
    assert float((got - want)[~normal].abs().max()) < 1e-44


def test_infinities_and_nan(backend):
    inf, nan = torch.inf, torch.nan
    x = torch.tensor([1.0, nan, 3.0, nan, inf, 1.0, -inf, -inf, 2.0, -inf])
    splits = torch.tensor([0, 4, 6, 8, 10])
    results = {reduce: ops.segment_reduce(x, splits, reduce) for reduce in REDUCTIONS}
    for reduce in REDUCTIONS[:4]:
        want = torch.stack([getattr(part, {"max": "amax", "min": "amin"}.get(reduce, reduce))() for part in x.split([4, 2, 2, 2])])
        torch.testing.assert_close(results[reduce], want, equal_nan=True)
    torch.testing.assert_close(results["logsumexp"], torch.tensor([nan, inf, -inf, 2.0]), equal_nan=True)
    torch.testing.assert_close(results["softmax"], torch.cat([part.softmax(0) for part in x.split([4, 2, 2, 2])]), equal_nan=True)
    index = torch.arange(4).repeat_interleave(splits.diff())
    assert ops.scatter_reduce(x, index, 4, "max", return_arg=True)[1].tolist() == [1, 4, 6, 8]
    assert ops.scatter_reduce(x, index, 4, "min", return_arg=True)[1].tolist() == [1, 5, 6, 9]


@settings(max_examples=60, deadline=None)
@given(
    index=st.lists(st.integers(-1, 4), max_size=30),
    columns=st.integers(0, 3),
    seed=st.integers(0, 1000),
    reduce=st.sampled_from(REDUCTIONS),
)
def test_properties(index, columns, seed, reduce):
    x = torch.randint(-3, 4, (len(index), columns), generator=torch.Generator().manual_seed(seed)).float()
    target = torch.tensor(index, dtype=torch.int64)
    out = ops.scatter_reduce(x, target, 5, reduce, fill=9.0)
    kept = target >= 0
    # Whole numbers: no rounding, so any order of rows gives the same sums.
    order = torch.randperm(len(index))
    again = ops.scatter_reduce(x[order], target[order], 5, reduce, fill=9.0)
    torch.testing.assert_close(again, out[order] if reduce == "softmax" else out)
    if reduce == "sum":
        assert torch.equal(out.sum(0), x[kept].sum(0))
    if reduce in ("max", "min"):
        best, arg = ops.scatter_reduce(x, target, 5, reduce, fill=9.0, return_arg=True)
        for s in range(5):
            for c in range(columns):
                rows = [row for row in range(len(index)) if index[row] == s and x[row, c] == best[s, c]]
                assert int(arg[s, c]) == min(rows, default=-1)
                assert rows or best[s, c] == 9
    if reduce == "softmax":
        total = ops.scatter_reduce(out, target, 5, "sum")
        torch.testing.assert_close(total, torch.stack([torch.full((columns,), float(s in index)) for s in range(5)]))


def test_shapes_strides_and_types(backend):
    x = torch.rand(4, 6, 10).transpose(0, 2)
    index = torch.tensor([3, 0, 0, -1, 1, 3, 3, 0, 1, 0], dtype=torch.int32)
    for reduce in REDUCTIONS:
        want = ops.scatter_reduce(x.contiguous(), index.long(), 4, reduce)
        assert want.shape == ((10, 6, 4) if reduce == "softmax" else (4, 6, 4))
        assert torch.equal(ops.scatter_reduce(x, index.repeat_interleave(2)[::2], 4, reduce), want)
        for dtype in (torch.float16, torch.bfloat16):
            half = ops.scatter_reduce(x.to(dtype), index, 4, reduce)
            assert half.dtype == dtype
            torch.testing.assert_close(half, ops.scatter_reduce(x.to(dtype).float(), index, 4, reduce).to(dtype), rtol=1e-2, atol=0)
            with torch.autocast("cpu", dtype):
                assert ops.scatter_reduce(x, index, 4, reduce).dtype == torch.float32
    ones = torch.ones(1001, dtype=torch.bfloat16)
    assert ops.segment_reduce(ones, torch.tensor([0, 1001]), "sum").item() == 1000  # summed in bfloat16 it would stop at 256


def test_nothing_to_reduce(backend):
    for reduce in REDUCTIONS:
        for rows, size, columns in ((0, 3, 2), (0, 0, 2), (4, 0, 2), (4, 3, 0), (0, 0, 0)):
            x, index = torch.rand(rows, columns), torch.full((rows,), -1)
            out = ops.scatter_reduce(x, index, size, reduce, fill=2.0)
            assert out.shape == ((rows if reduce == "softmax" else size), columns)
            expected = {"max": 2.0, "min": 2.0, "logsumexp": -torch.inf}.get(reduce, 0.0)
            assert bool((out == expected).all())
        assert ops.segment_reduce(torch.rand(0, 2), torch.tensor([0, 0]), reduce).shape[1] == 2


@pytest.mark.parametrize("reduce", REDUCTIONS)
def test_gradients(backend, reduce):
    index, splits = torch.tensor([2, 0, -1, 2, 4, 0, 0]), torch.tensor([0, 3, 3, 6, 7])
    x = torch.rand(7, 2, dtype=torch.float64, requires_grad=True)

    def run(x: Tensor) -> tuple[Tensor, Tensor]:
        a, b = ops.scatter_reduce(x, index, 5, reduce, fill=2.0), ops.segment_reduce(x, splits, reduce)
        return a.where(a.isfinite(), 0), b.where(b.isfinite(), 0)

    assert torch.autograd.gradcheck(run, x)
    assert torch.autograd.gradgradcheck(run, x)


def test_gradients_of_ties_and_half_types(backend):
    x = torch.tensor([[1.0], [3.0], [3.0]], requires_grad=True)
    ops.scatter_reduce(x, torch.zeros(3, dtype=torch.int64), 2, "max").sum().backward()
    assert x.grad.flatten().tolist() == [0, 1, 0]
    for reduce in REDUCTIONS:
        full = torch.rand(9, 3).bfloat16().float().requires_grad_()
        half = full.detach().bfloat16().requires_grad_()
        index, weight = torch.arange(9) % 4 - 1, torch.rand(9 if reduce == "softmax" else 3, 3).bfloat16()
        (want,) = torch.autograd.grad((ops.scatter_reduce(full, index, 3, reduce) * weight.float()).sum(), full)
        (got,) = torch.autograd.grad((ops.scatter_reduce(half, index, 3, reduce) * weight).sum(), half)
        assert got.dtype == torch.bfloat16
        torch.testing.assert_close(got.float(), want, rtol=3e-2, atol=1e-2)


def test_threads_do_not_matter(on_backend):
    x, index = torch.randn(60000, 24), torch.randint(-1, 700, (60000,))
    splits = ops.offsets_from_lengths(torch.randint(0, 100, (700,)))
    splits[-1] = 60000
    results = []
    torch.use_deterministic_algorithms(True)
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            with on_backend("cpu"):
                leaf = x.clone().requires_grad_()
                outs = [ops.scatter_reduce(leaf, index, 700, reduce) for reduce in REDUCTIONS]
                outs += [ops.segment_reduce(leaf, splits, reduce) for reduce in REDUCTIONS]
                loss = sum(torch.nan_to_num(out, 0, 0, 0).square().sum() for out in outs)
                results.append([*outs, *torch.autograd.grad(loss, leaf)])
    finally:
        torch.use_deterministic_algorithms(False)
        torch.set_num_threads(1)
    for other in results[1:]:
        for a, b in zip(other, results[0], strict=True):
            assert torch.equal(a, b)


def test_compile_any_size():
    torch._dynamo.reset()

    def run(x: Tensor, index: Tensor, splits: Tensor) -> Tensor:
        total = x.new_zeros(())
        for reduce in REDUCTIONS:
            total = total + ops.scatter_reduce(x, index, 5, reduce).square().sum()
            total = total + ops.segment_reduce(x, splits, reduce).square().sum()
        return total

    compiled = torch.compile(run, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for rows in (20, 31, 47):
            x, index = torch.rand(rows, 3), torch.arange(rows) % 5
            results = []
            for function in (run, compiled):
                leaf = x.clone().requires_grad_()
                loss = function(leaf, index, torch.tensor([0, 4, 9, rows]))
                results.append((loss.detach(), *torch.autograd.grad(loss, leaf)))
            torch.testing.assert_close(results[1], results[0])


X, INDEX = torch.rand(6, 2), torch.tensor([0, 1, 1, 2, -1, 0])
segment, scatter = ops.segment_reduce, ops.scatter_reduce
CASES = [
    (lambda: scatter(X.long(), INDEX, 3, "sum"), TypeError, "scatter_reduce: x must be a floating tensor .*int64"),
    (lambda: scatter(X.sum(), INDEX, 3, "sum"), TypeError, r"x must be a floating tensor \[M\] or \[M, ...\], got float32 \[\]"),
    (lambda: scatter(X, INDEX, 3, "avg"), ValueError, "unknown scatter_reduce reduction 'avg'.*Known: logsumexp, max"),
    (lambda: scatter(X, INDEX.float(), 3, "sum"), TypeError, "index must be an int64 or int32 tensor"),
    (lambda: scatter(X, INDEX[:4], 3, "sum"), ValueError, r"index must be \[M\], one per row of x = \[6\], got int64 \[4\]"),
    (lambda: scatter(X, INDEX, 2, "sum"), ValueError, "index must lie between -1 .* and 1, as dim_size is 2; got 2"),
    (lambda: scatter(X, INDEX - 1, 3, "max"), ValueError, "got -2"),
    (lambda: scatter(X, INDEX, -1, "sum"), ValueError, "dim_size must not be negative, got -1"),
    (lambda: scatter(X, INDEX, 3.0, "sum"), TypeError, "dim_size must be a whole number, got float 3.0"),
    (lambda: scatter(X, INDEX, True, "sum"), TypeError, "dim_size must be a whole number"),
    (lambda: scatter(X, INDEX, 3, "sum", return_arg=True), ValueError, "return_arg needs reduce 'max' or 'min', got 'sum'"),
    (lambda: scatter(X, INDEX, 3, "max", fill="0"), TypeError, "fill must be a number, got str '0'"),
    (lambda: scatter(X, INDEX.to("meta"), 3, "sum"), ValueError, "index is on meta"),
    (lambda: segment(X, INDEX[None], "sum"), ValueError, r"row_splits must be an int64 tensor \[S \+ 1\]"),
    (lambda: segment(X, [0, 6], "sum"), ValueError, "segment_reduce: row_splits must be an int64 tensor"),
    (lambda: segment(X, torch.tensor([0, 5]), "sum"), ValueError, r"end at the number of rows \(6\); they start at 0 and end at 5"),
    (lambda: segment(X, torch.tensor([0, 4, 3, 6]), "softmax"), ValueError, "never decrease"),
    (lambda: segment(X, torch.tensor([1, 6]), "logsumexp"), ValueError, "start at 1"),
    (lambda: segment(X, torch.tensor([0.0, 6.0]), "min"), TypeError, "row_splits must be an int64 or int32 tensor"),
]


@pytest.mark.parametrize("number", range(len(CASES)), ids=lambda i: str(CASES[i][2])[:40])
def test_wrong_arguments(backend, number):
    call, error, message = CASES[number]
    with pytest.raises(error, match=message):
        call()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("reduce", REDUCTIONS)
def test_a_gpu_gives_what_the_cpu_gives(inputs, reduce):
    for kind in inputs.KINDS:
        x, index = unsorted(values(inputs, kind, columns=13))
        want = ops.scatter_reduce(x, index, len(SIZES), reduce)
        got = ops.scatter_reduce(x.cuda(), index.cuda(), len(SIZES), reduce).cpu()
        torch.testing.assert_close(got, want, equal_nan=True, **({} if reduce == "logsumexp" else {"rtol": 0, "atol": 0}))
