"""Gradients: against finite differences in float64, deterministic, and 0 where there is nothing to pull."""

from __future__ import annotations

import pytest
import torch

from geossl import ops


def double(*shape: int) -> torch.Tensor:
    return torch.rand(*shape, dtype=torch.float64, requires_grad=True)


def found(distance: torch.Tensor) -> torch.Tensor:
    return torch.where(distance.isfinite(), distance, 0.0)


LENGTHS = {"lengths": torch.tensor([6, 0, 4]), "query_lengths": torch.tensor([3, 2, 4])}
OFFSETS = {"offsets": torch.tensor([0, 6, 6, 10]), "query_offsets": torch.tensor([0, 3, 5, 9])}

INDEX = torch.tensor([[[0, 1, -1, 1], [4, 0, 2, 2]], [[3, 3, 3, -1], [-1, -1, -1, -1]]])

CASES = {
    "knn": (lambda q, p: found(ops.knn(q, p, 3, **LENGTHS).distance), lambda: (double(3, 4, 3), double(3, 7, 3))),
    "knn_packed": (lambda q, p: found(ops.knn(q, p, 5, **OFFSETS).distance), lambda: (double(9, 3), double(10, 3))),
    "ball_query": (
        lambda q, p: found(ops.ball_query(q, p, 0.7, 3, fill="repeat", **LENGTHS).distance),
        lambda: (double(3, 4, 3), double(3, 7, 3)),
    ),
    "radius_search": (
        lambda q, p: ops.radius_search(q, p, 0.8, exclude_self=True, **LENGTHS).distance,
        lambda: (double(3, 4, 3), double(3, 7, 3)),
    ),
    "radius_search_packed": (lambda q, p: ops.radius_search(q, p, 0.8, **OFFSETS).distance, lambda: (double(9, 3), double(10, 3))),
    "group": (lambda f: ops.group(f, torch.tensor([[0, 1, -1, 1], [4, 4, 4, 0]]), fill=3.0), lambda: (double(2, 5, 3),)),
    "group_packed": (lambda f: ops.group(f, torch.tensor([[0, 1, -1], [4, 4, 0]])), lambda: (double(5, 3),)),
    "group_relative": (
        lambda p, c, f: ops.group_relative(p, c, INDEX, f, radius=0.7),
        lambda: (double(2, 5, 3), double(2, 2, 3), double(2, 5, 2)),
    ),
    "group_relative_packed_centers": (lambda c: ops.group_relative(torch.ones(5, 3).double(), c, INDEX[0]), lambda: (double(2, 3),)),
    "interpolate": (lambda f, w: ops.interpolate(f, INDEX, w), lambda: (double(2, 5, 3), double(2, 2, 4))),
    "interpolate_packed": (lambda f, w: ops.interpolate(f, INDEX[0], w), lambda: (double(5, 18), double(2, 4))),
    "three_nn_interpolate": (
        lambda q, p, f: ops.three_nn_interpolate(q, p, f, eps=0.01, **LENGTHS),
        lambda: (double(3, 4, 3), double(3, 7, 3), double(3, 7, 2)),
    ),
    **{
        f"chamfer_{norm}_{direction}": (
            lambda x, y, n=norm, d=direction: ops.chamfer_distance(
                x, y, x_lengths=torch.tensor([5, 0, 3]), norm=n, direction=d, reduction="none"
            ),
            lambda: (double(3, 6, 3), double(3, 4, 3)),
        )
        for norm in ("l2sq", "l2", "l1")
        for direction in ("both", "x", "y")
    },
    **{
        f"chamfer_{norm}_{channels}_channels": (
            lambda x, y, n=norm: ops.chamfer_distance(x, y, x_lengths=torch.tensor([5, 0, 3]), norm=n, reduction="none"),
            lambda c=channels: (double(3, 6, c), double(3, 4, c)),
        )
        for norm, channels in (("l2sq", 1), ("l2", 4), ("l1", 5))
    },
    "chamfer_many_points_of_five_channels": (  # too many for the patches of a GPU
        lambda x, y: ops.chamfer_distance(torch.cat([x] * 11, dim=1) + torch.arange(66, dtype=x.dtype)[:, None], y, norm="l2"),
        lambda: (double(1, 6, 5), double(1, 3, 5)),
    ),
    "chamfer_packed": (
        lambda x, y: ops.chamfer_distance_packed(x, torch.tensor([0, 4, 4, 9]), y, torch.tensor([0, 3, 5, 8]), reduction="sum"),
        lambda: (double(9, 3), double(8, 3)),
    ),
    "chamfer_patches_weighted": (
        lambda x, y, w: ops.chamfer_distance_patches(x, y, norm="l2", weights=w),
        lambda: (double(2, 3, 5, 3), double(2, 3, 4, 3), double(2, 3)),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_gradcheck(backend, name):
    function, make = CASES[name]
    assert torch.autograd.gradcheck(function, make())


@pytest.mark.parametrize("name", CASES)
def test_second_derivatives(name):
    function, make = CASES[name]
    assert torch.autograd.gradgradcheck(function, make())


def test_distance_zero_has_gradient_zero(backend):
    x = torch.ones(2, 4, 3, requires_grad=True)
    y = torch.ones(2, 5, 3, requires_grad=True)
    for norm in ("l2sq", "l2", "l1"):
        for loss in (ops.chamfer_distance(x, y, norm=norm), ops.knn(x, y, 3).distance.sum()):
            for gradient in torch.autograd.grad(loss, (x, y)):
                assert torch.equal(gradient, torch.zeros_like(gradient))


def test_missing_and_invalid_points_get_no_gradient(backend):
    points = torch.rand(1, 6, 3)
    points[0, 2] = torch.nan
    points.requires_grad_()
    distance = ops.knn(points, points, 9).distance
    found(distance).sum().backward()
    assert torch.equal(points.grad[0, 2], torch.zeros(3))
    assert points.grad.isfinite().all()

    x, y = torch.rand(2, 5, 3), torch.rand(2, 4, 3)
    x[0, 1], y[1] = torch.inf, torch.nan  # and the second pair has nothing to compare with
    x.requires_grad_()
    y.requires_grad_()
    for norm in ("l2sq", "l2", "l1"):
        loss = ops.chamfer_distance(x, y, norm=norm, reduction="none")
        assert loss[1] == 0
        gradients = torch.autograd.grad(loss.sum(), (x, y))
        assert all(g.isfinite().all() for g in gradients)
        assert torch.equal(gradients[0][0, 1], torch.zeros(3))
        assert torch.equal(gradients[0][1], torch.zeros(5, 3))


def test_gradients_are_deterministic_and_independent_of_threads(on_backend):
    points, index = torch.rand(2, 300, 3), torch.randint(-1, 300, (2, 200, 8))
    features = torch.rand(2, 300, 40)

    def gradients() -> list[torch.Tensor]:
        p, q, f = (t.clone().requires_grad_() for t in (points, points[:, :200], features))
        loss = ops.group(f, index).sin().sum() + found(ops.knn(q, p, 8).distance).sum() + ops.chamfer_distance(p, q)
        return list(torch.autograd.grad(loss, (p, q, f)))

    torch.use_deterministic_algorithms(True)
    try:
        with on_backend("cpu"):
            want = gradients()
            torch.set_num_threads(2)
            again = gradients()
    finally:
        torch.use_deterministic_algorithms(False)
        torch.set_num_threads(1)
    for a, b in zip(again, want, strict=True):
        assert torch.equal(a, b)


def test_half_features_are_summed_in_float32(backend):
    features = torch.zeros(1, 1, dtype=torch.bfloat16, requires_grad=True)
    ops.group(features, torch.zeros(1001, dtype=torch.int64)).sum().backward()
    assert features.grad.item() == 1000  # 1001 rounded to bfloat16; adding ones in bfloat16 would stop at 256


def test_no_gradient_is_recorded_where_none_is_asked_for():
    points = torch.rand(1, 5, 3, requires_grad=True)
    with torch.no_grad():
        assert not ops.knn(points, points, 2).distance.requires_grad
        assert not ops.chamfer_distance(points, points).requires_grad
    assert not ops.knn(points, points, 2).index.requires_grad
    assert not ops.farthest_point_sample(points, 2).requires_grad
    assert ops.knn(points.detach(), points, 2).distance.requires_grad


FORWARD_MODE = {
    "group": lambda x: ops.group(x, torch.zeros(2, 5).long()),
    "knn": lambda x: ops.knn(x, x, 2).distance,
    "chamfer": lambda x: ops.chamfer_distance(x, x + 1),
    "fps": lambda x: ops.farthest_point_sample(x, 2).float(),
    "segment": lambda x: ops.scatter_reduce(x[0], torch.zeros(5).long(), 2, "sum"),
}


@pytest.mark.parametrize("name", FORWARD_MODE)
def test_forward_mode_is_refused(backend, name):
    """Torch would return no tangent, or zeros, in silence."""
    function, x = FORWARD_MODE[name], torch.rand(2, 5, 3)
    with pytest.raises(NotImplementedError, match=r"has no forward-mode derivative .* use reverse mode"):
        torch.func.jvp(function, (x,), (torch.ones_like(x),))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        with pytest.raises(NotImplementedError, match="has no forward-mode derivative"):
            function(dual)
        function(x)  # without a tangent there is nothing to lose


def test_weights_that_cancel_give_zero(backend):
    x, y = torch.rand(2, 5, 3), torch.rand(2, 4, 3)
    for weights in ((1.0, -1.0), (-1.0, -1.0), (0.0, 0.0)):
        w = torch.tensor(weights, requires_grad=True)
        loss = ops.chamfer_distance(x, y, weights=w)
        assert loss == 0
        assert torch.autograd.grad(loss, w)[0].isfinite().all()
