"""Relative neighbourhoods and interpolation: what they promise, in every type."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from geossl import ops
from geossl.ops import _dispatch


def test_relative_is_gather_and_subtract_to_the_bit(backend):
    points, features, centers = torch.rand(2, 30, 3), torch.rand(2, 30, 5), torch.rand(2, 7, 3)
    index = torch.randint(0, 30, (2, 7, 4))
    cloud = torch.arange(2)[:, None, None]
    local = points[cloud, index] - centers[:, :, None]
    assert torch.equal(ops.group_relative(points, centers, index), local)
    got = ops.group_relative(points, centers, index.int(), features.half(), radius=0.3)
    assert torch.equal(got, torch.cat([local / torch.tensor(0.3), features.half().float()[cloud, index]], dim=-1))


def test_missing_neighbours_are_zero_whatever_their_weight(backend):
    points = torch.full((4, 3), torch.nan)
    points[0] = 1
    index = torch.tensor([[0, -1]])
    assert ops.group_relative(points, torch.zeros(1, 3), index, points).tolist() == [[[1.0] * 6, [0.0] * 6]]
    assert ops.interpolate(points, index, torch.tensor([[2.0, np.nan]])).tolist() == [[2.0] * 3]
    assert ops.interpolate(points[:0], index - 1 - index, torch.ones(1, 2)).tolist() == [[0.0] * 3]


def test_gradient_of_missing_neighbours_is_zero(backend):
    features, weight = torch.rand(3, 2, requires_grad=True), torch.tensor([[1.0, torch.nan]], requires_grad=True)
    grad_features, grad_weight = torch.autograd.grad(ops.interpolate(features, torch.tensor([[1, -1]]), weight).sum(), (features, weight))
    assert grad_features.tolist() == [[0.0, 0.0], [1.0, 1.0], [0.0, 0.0]]
    assert grad_weight[0, 1] == 0


@pytest.mark.parametrize("size", [0, 1, 2, 3])
def test_clouds_with_fewer_points_than_neighbours(backend, size):
    points, query = torch.rand(1, size, 3), torch.rand(1, 4, 3)
    ones = ops.three_nn_interpolate(query, points, torch.ones(1, size, 2))
    torch.testing.assert_close(ones, torch.full((1, 4, 2), float(size > 0)))


def test_a_query_at_a_point_takes_its_features(backend):
    points, features = torch.rand(1, 20, 3), torch.rand(1, 20, 4)
    torch.testing.assert_close(ops.three_nn_interpolate(points, points, features), features, rtol=1e-4, atol=1e-4)


def test_invalid_points_give_nothing(backend):
    points = torch.tensor([[[0.0, 0, 0], [torch.nan, 0, 0], [1, 0, 0]]])
    features = torch.tensor([[[1.0], [torch.nan], [3.0]]])
    assert ops.three_nn_interpolate(points, points, features, eps=1e-12)[0, :, 0].tolist() == [1.0, 0.0, 3.0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_types(backend, dtype):
    features, index = torch.rand(2, 9, 33).to(dtype), torch.randint(-1, 9, (2, 5, 2, 4))
    weight = torch.rand(2, 5, 2, 4)
    with torch.autocast("cpu", torch.bfloat16):
        got = ops.interpolate(features, index, weight)
    assert got.dtype == dtype
    wide = torch.where(index[..., None] >= 0, features.double()[torch.arange(2)[:, None, None, None], index.clamp(min=0)], 0.0)
    want = (wide * weight.double()[..., None]).sum(-2)
    torch.testing.assert_close(
        got.double(), want.to(dtype).double(), rtol=1e-2 if dtype in (torch.float16, torch.bfloat16) else 1e-5, atol=1e-5
    )
    half = features[..., :3]
    relative = ops.group_relative(half, half[:, :5], index[:, :, 0])
    assert relative.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@pytest.mark.parametrize("channels", [1, 15, 16, 17, 40])
def test_gradients_agree_on_all_backends(on_backend, channels):
    features, weight, index = torch.rand(2, 30, channels), torch.rand(2, 20, 3), torch.randint(-1, 30, (2, 20, 3))
    points, centers = torch.rand(2, 30, 3), torch.rand(2, 20, 3)
    results = {}
    for name, threads in (("twin", 1), ("cpu", 1), ("cpu", 3), ("cuda", 1)):
        torch.set_num_threads(threads)
        try:
            with on_backend(name, seed=2):
                inputs = [t.clone().requires_grad_() for t in (features, weight, points, centers)]
                f, w, p, c = inputs
                loss = ops.interpolate(f, index, w).sin().sum() + ops.group_relative(p, c, index, f, radius=0.5).cos().sum()
                results[name, threads] = torch.autograd.grad(loss, inputs)
        finally:
            torch.set_num_threads(1)
    for a, b in zip(results["cpu", 1], results["cpu", 3], strict=True):
        assert torch.equal(a, b)
    assert torch.equal(results["cpu", 1][0], results["cuda", 1][0])  # the same order of sums on both devices
    for name in (("cpu", 1), ("cuda", 1)):
        torch.testing.assert_close(results[name], results["twin", 1], rtol=1e-5, atol=1e-5)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 12), st.integers(0, 8), st.integers(1, 5), st.integers(0, 2**31 - 1), st.sampled_from(["twin", "cpu"]))
def test_interpolation_lies_between_the_features(n, q, k, seed, name):
    rng = np.random.default_rng(seed)
    points, query = (torch.tensor(rng.integers(0, 4, (1, m, 3)), dtype=torch.float32) for m in (n, q))
    features = torch.tensor(rng.normal(size=(1, n, 2)), dtype=torch.float32)
    with _dispatch.backend(name):
        got = ops.three_nn_interpolate(query, points, features, k=k)
        index = ops.knn(query, points, k).index
    chosen = ops.group(features, index, fill=float("nan"))
    assert (got <= chosen.nan_to_num(-100).amax(2) + 1e-5).all()
    assert (got >= chosen.nan_to_num(100).amin(2) - 1e-5).all()
