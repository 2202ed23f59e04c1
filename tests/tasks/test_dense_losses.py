from __future__ import annotations

import math

import pytest
import torch

from geossl.tasks.dense_losses import LOSSES, WITH_CONFIDENCE

INF = float("inf")
CHANNELS = {"scale_invariant_log": 1, "l1_log": 1, "cosine": 3}


def pixel(values: list[float]) -> torch.Tensor:
    """One pixel with these channels."""
    return torch.tensor(values).view(1, -1, 1, 1)


def example(name: str, channels: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    channels = channels or CHANNELS.get(name, 2)
    return torch.randn(2, channels + (name in WITH_CONFIDENCE), 4, 6), torch.rand(2, channels, 4, 6) + 0.5


@pytest.mark.parametrize(
    ("name", "output", "truth", "expected"),
    [
        ("laplacian", [1.0, 2.0, 0.5], [3.0, -1.0], 5 / math.exp(0.5) + 0.5),
        ("laplacian_bounded", [1.0, 2.0, 0.0], [3.0, -1.0], 5 / 2.125 + math.log(2.125)),
        ("laplacian_bounded2", [1.0, 2.0, 0.0], [3.0, -1.0], 5.0),
        ("laplacian_bounded2", [1.0, 2.0, 1e6], [3.0, -1.0], 5 / math.exp(3) + 3),
        ("l1", [1.0, 2.0], [3.0, -1.0], 2.5),
        ("l1_log", [0.5], [math.e], 0.5),
        ("scale_invariant_log", [0.5], [math.e], 0.25 - 0.5 * 0.25),
        ("cosine", [0.0, 2.0, 0.0], [0.0, 5.0, 0.0], 0.0),
        ("cosine", [0.0, 2.0, 0.0], [1.0, 0.0, 0.0], 1.0),
    ],
)
def test_values(name: str, output: list[float], truth: list[float], expected: float) -> None:
    assert LOSSES[name](pixel(output), pixel(truth)).item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("name", LOSSES)
def test_pixels_without_truth_do_not_count(name: str) -> None:
    output, truth = example(name)
    known = LOSSES[name](output[..., :3], truth[..., :3])
    for unknown in (INF, -INF, float("nan")):
        truth[:, 0, :, 3:] = unknown  # one component is enough
        if name == "l1":  # whose entries count one by one
            truth[..., 3:] = unknown
        leaf = output.clone().requires_grad_()
        loss = LOSSES[name](leaf, truth)
        torch.testing.assert_close(loss, known)
        loss.backward()
        assert leaf.grad.isfinite().all()
        assert (leaf.grad[..., 3:] == 0).all()
        assert (leaf.grad[..., :3] != 0).any()


@pytest.mark.parametrize("name", LOSSES)
def test_without_any_truth_the_loss_is_zero(name: str) -> None:
    output, truth = example(name)
    leaf = output.requires_grad_()
    loss = LOSSES[name](leaf, torch.full_like(truth, INF))
    loss.backward()
    assert loss.item() == 0
    assert (leaf.grad == 0).all()


def test_the_bounded_loss_leaves_out_truth_of_ten_thousand_and_more() -> None:
    output, truth = example("laplacian_bounded")
    truth[..., 3:] = 9_999.0
    counted = LOSSES["laplacian_bounded"](output, truth)
    truth[:, 1, :, 3:] = -10_000.0  # in one component
    torch.testing.assert_close(LOSSES["laplacian_bounded"](output, truth), LOSSES["laplacian_bounded"](output[..., :3], truth[..., :3]))
    assert counted > 100
    assert LOSSES["laplacian_bounded2"](output, truth) > 100  # only this loss does


def test_depth_that_is_not_positive_is_unknown_and_a_factor_costs_half() -> None:
    log_depth, depth = torch.randn(1, 1, 4, 4), None
    depth = log_depth.exp()
    assert LOSSES["scale_invariant_log"](log_depth + 2, depth).item() == pytest.approx(4 - 0.5 * 4, abs=1e-5)
    depth[..., 0], depth[..., 1] = 0.0, -3.0
    assert LOSSES["scale_invariant_log"](log_depth + 2, depth).item() == pytest.approx(2, abs=1e-5)
    assert LOSSES["l1_log"](log_depth + 2, depth).item() == pytest.approx(2, abs=1e-5)


def test_images_of_a_batch_count_alike_in_the_scale_invariant_loss() -> None:
    output, truth = torch.zeros(3, 1, 2, 2), torch.full((3, 1, 2, 2), math.e)
    truth[1, 0, 0], truth[2] = INF, INF  # half of one, and all of another
    truth[1, 0, 1] = math.e**2
    assert LOSSES["scale_invariant_log"](output, truth).item() == pytest.approx((0.5 + 2.0) / 2, abs=1e-5)


@pytest.mark.parametrize("name", LOSSES)
def test_half_precision_is_computed_in_float32(name: str) -> None:
    output, truth = example(name)
    loss = LOSSES[name](output.bfloat16(), truth)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, LOSSES[name](output.bfloat16().float(), truth))


def test_shapes_are_checked() -> None:
    with pytest.raises(ValueError, match="one channel more than truth"):
        LOSSES["laplacian"](torch.zeros(1, 2, 4, 4), torch.zeros(1, 2, 4, 4))
    with pytest.raises(ValueError, match=r"must have one shape, got \[1, 2, 4, 4\] and \[1, 1, 4, 4\]"):
        LOSSES["l1"](torch.zeros(1, 2, 4, 4), torch.zeros(1, 1, 4, 4))
