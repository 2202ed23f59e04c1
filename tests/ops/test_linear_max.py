"""The sparse gradient of a linear layer before a maximum over segments: backends agree with each other and with autograd."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from geossl import ops
from geossl.ops.linear_max import linear_max_backward

SIZES = (0, 7, 0, 1, 40, 300, 0)


def case(sizes=SIZES, channels: int = 9, width: int = 13, dtype: torch.dtype = torch.float64, seed: int = 0) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    splits = ops.offsets_from_lengths(torch.tensor(sizes, dtype=torch.int64))
    x = torch.randn(sum(sizes), width, dtype=dtype, generator=generator)
    weight = torch.randn(channels, width, dtype=dtype, generator=generator)
    grad = torch.randn(len(sizes), channels, dtype=dtype, generator=generator)
    segment = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes, dtype=torch.int64))
    _, arg = ops.scatter_reduce(x @ weight.T, segment, len(sizes), "max", return_arg=True)
    return grad, arg, splits, x, weight


@settings(max_examples=20, deadline=None)
@given(sizes=st.lists(st.integers(0, 6), min_size=1, max_size=8), channels=st.integers(1, 9), width=st.integers(1, 20))
def test_is_the_gradient_of_the_composition(sizes, channels, width):
    grad, arg, splits, x, weight = case(sizes, channels, width)
    x.requires_grad_(), weight.requires_grad_()
    want = torch.autograd.grad(ops.segment_reduce(x @ weight.T, splits, "max"), (x, weight), grad)
    for mine, theirs in zip(linear_max_backward(grad, arg, splits, x.detach(), weight.detach()), want, strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_backends_agree(on_backend, dtype):
    arguments = case(dtype=dtype)
    arguments[1][1, :4] = -1  # these maxima came from no row
    with on_backend("twin"):
        want = linear_max_backward(*arguments)
    results = []
    for backend, seed in (("cpu", 0), ("cuda", 0), ("cuda", 1), ("cuda", 2)):
        with on_backend(backend, seed):
            results.append(linear_max_backward(*arguments))
    for got in results:
        for mine, first, theirs in zip(got, results[0], want, strict=True):
            assert torch.equal(mine, first)  # bit for bit between CPU and CUDA
            torch.testing.assert_close(mine, theirs, rtol=1e-4 if dtype == torch.float32 else 1e-10, atol=1e-5)


def test_threads_do_not_change_the_bits():
    arguments = case((50, 3, 70) * 9, 40, 65, torch.float32)
    want = linear_max_backward(*arguments)
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        got = linear_max_backward(*arguments)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("sizes", [(), (0, 0), (1,)])
def test_little_input(backend, sizes):
    grad, arg, splits, x, weight = (torch.zeros(len(sizes), 3), torch.full((len(sizes), 3), -1), ops.offsets_from_lengths(
        torch.tensor(sizes, dtype=torch.int64)), torch.ones(sum(sizes), 4), torch.ones(3, 4))  # fmt: skip
    grad_x, grad_weight = linear_max_backward(grad + 1, arg, splits, x, weight)
    assert torch.equal(grad_x, torch.zeros_like(x))
    assert torch.equal(grad_weight, torch.zeros_like(weight))


def test_strides_do_not_matter():
    grad, arg, splits, x, weight = case()
    want = linear_max_backward(grad, arg, splits, x, weight)
    got = linear_max_backward(grad.T.contiguous().T, arg.T.contiguous().T, splits, x.T.contiguous().T, weight.T.contiguous().T)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_bad_input_is_explained(backend, monkeypatch):
    monkeypatch.setenv("GEOSSL_CHECKS", "1")
    grad, arg, splits, x, weight = case()
    with pytest.raises(ValueError, match=r"expected grad and arg \[S, C\]"):
        linear_max_backward(grad, arg, splits[:-1], x, weight)
    with pytest.raises(TypeError, match="all be float32 or all float64"):
        linear_max_backward(grad.float(), arg, splits, x, weight)
    with pytest.raises(ValueError, match="must name a row of its own segment"):
        linear_max_backward(grad, torch.zeros_like(arg), splits, x, weight)
    with pytest.raises(ValueError, match="row_splits must start at 0"):
        linear_max_backward(grad, arg, splits + 1, x, weight)
