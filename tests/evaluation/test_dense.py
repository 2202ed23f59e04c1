from __future__ import annotations

import math

import pytest
import torch

from geossl.errors import UnknownNameError
from geossl.evaluation.dense import DenseMeter
from geossl.layers.dense_errors import CHANNELS, batch_scores, nearest_truth

INF = float("inf")


def scores(kind: str, prediction: torch.Tensor, truth: torch.Tensor) -> dict[str, float]:
    meter = DenseMeter(kind)
    meter.update(prediction, truth)
    return meter.scores()


def row(*values: float) -> torch.Tensor:
    return torch.tensor(values).view(1, 1, 1, -1)


def test_stereo_errors_that_equal_a_threshold_are_not_beyond_it() -> None:
    truth = row(10, 10, 10, 10, INF, 100, 61)
    found = scores("stereo", row(10.5, 9, 12, 13, 7, 104, 64), truth)
    assert found["L1err"] == pytest.approx((0.5 + 1 + 2 + 3 + 4 + 3) / 6)
    assert found["rmse"] == pytest.approx(math.sqrt((0.25 + 1 + 4 + 9 + 16 + 9) / 6))
    assert {name: round(found[name] * 6 / 100) for name in ("bad@0.5", "bad@1.0", "bad@2.0", "bad@3.0")} == {
        "bad@0.5": 5,
        "bad@1.0": 4,
        "bad@2.0": 3,
        "bad@3.0": 1,
    }
    assert found["D1-all"] == 0  # the error of 4 is below 5 % of 100
    assert scores("stereo", row(24), row(20))["D1-all"] == 100
    assert scores("stereo", row(105), row(100))["D1-all"] == 0  # 5 % exactly


def test_flow() -> None:
    truth = torch.tensor([[3.0, 10.0, 0.0, 24.0, INF], [0.0, 0.0, 40.0, 32.0, 0.0]]).view(1, 2, 1, 5)
    prediction = torch.tensor([[6.0, 10.0, 0.0, 24.0, 5.0], [4.0, 1.0, 43.0, 22.0, 5.0]]).view(1, 2, 1, 5)
    found = scores("flow", prediction, truth)
    assert found["EPE"] == pytest.approx((5 + 1 + 3 + 10) / 4)
    assert found["L1err"] == pytest.approx((7 + 1 + 3 + 10) / 4)
    assert [found[f"bad@{t}"] for t in ("0.5", "1.0", "3.0", "5.0")] == [100, 75, 50, 25]
    assert (found["s0-10"], found["s10-40"], found["s40+"]) == (5.0, 1.0, 6.5)  # 10 and 40 belong to the faster bin
    assert found["F1-all"] == 50
    assert scores("flow", prediction[..., :1], truth[..., :1])["s40+"] == 0  # an empty bin


def test_of_four_true_values_a_pixel_the_nearest_counts() -> None:
    truth = torch.tensor([[[[1.0, 2.0, 9.0, INF], [3.0, 4.0, INF, INF], [INF, INF, 5.0, 5.0], [INF, INF, 5.0, 5.0]]]])
    prediction = torch.tensor([[[[3.2, 0.0], [7.0, 5.5]]]])
    assert nearest_truth(prediction, truth).tolist() == [[[[3.0, 9.0], [INF, 5.0]]]]
    assert nearest_truth(prediction, prediction) is prediction
    meter = DenseMeter("stereo")
    meter.update(prediction, truth)
    assert meter.scores()["L1err"] == pytest.approx((0.2 + 9 + 0.5) / 3)
    flow = torch.cat([truth, -truth], 1)
    assert nearest_truth(torch.cat([prediction, -prediction], 1), flow)[0, :, 0, 0].tolist() == [3.0, -3.0]
    meter = DenseMeter("stereo")
    meter.update(torch.full_like(prediction, torch.nan), truth)
    assert torch.isnan(torch.tensor(meter.scores()["L1err"]))


def test_depth() -> None:
    found = scores("depth", row(1.25, 2.0, 1.0, -1.0, 5.0), row(1.0, 2.0, 2.0, 1.0, 0.0))
    assert found["delta1"] == 25  # a ratio of 1.25 is not below 1.25, and no negative depth is near
    assert found["delta2"] == 50
    assert found["absrel"] == pytest.approx((0.25 + 0 + 0.5 + 2) / 4)
    assert found["rmse"] == pytest.approx(math.sqrt((0.0625 + 0 + 1 + 4) / 4))


def test_normals() -> None:
    angle = torch.tensor([0.0, 20.0, 90.0, 180.0, 1e-3]).deg2rad()
    prediction = torch.stack([angle.cos(), angle.sin(), torch.zeros(5)]).view(1, 3, 1, 5)
    truth = torch.tensor([2.0, 0.0, 0.0]).view(1, 3, 1, 1).repeat(1, 1, 1, 5)
    found = scores("normals", prediction, truth)
    assert found["mean_angle"] == pytest.approx((20 + 90 + 180 + 1e-3) / 5, abs=1e-5)
    assert (found["within11.25"], found["within22.5"]) == (pytest.approx(40), pytest.approx(60))
    truth[..., 1:] = 0.0  # no direction: unknown
    assert scores("normals", prediction, truth)["mean_angle"] == pytest.approx(0, abs=1e-6)


def test_a_data_set_weighs_pixels_and_a_batch_weighs_images() -> None:
    truth = torch.zeros(3, 1, 1, 4)
    truth[1, ..., 1:], truth[2] = INF, INF
    prediction = torch.zeros(3, 1, 1, 4)
    prediction[1] = 5.0
    assert scores("stereo", prediction, truth)["L1err"] == 1.0
    assert batch_scores("stereo", prediction, truth)["avgerr"] == 2.5
    meter = DenseMeter("stereo")
    for one in range(3):
        meter.update(prediction[one : one + 1], truth[one : one + 1])
    assert meter.scores()["L1err"] == 1.0


def test_published_names() -> None:
    flow = torch.zeros(1, 2, 2, 2)
    assert set(batch_scores("flow", flow, flow)) == {"EPE", "L1err", "bad@1.0", "bad@3.0", "bad@5.0"}
    names = {"L1err", "bad@0.5", "bad@1.0", "bad@2.0", "bad@3.0"}
    assert names <= set(scores("stereo", flow[:, :1], flow[:, :1]))
    assert set(batch_scores("stereo", flow[:, :1], flow[:, :1])) == {"avgerr", "rmse", *(names - {"L1err"})}


def test_nothing_known_and_nothing_predicted() -> None:
    unknown = torch.full((1, 1, 2, 2), INF)
    assert math.isnan(scores("stereo", torch.zeros(1, 1, 2, 2), unknown)["L1err"])
    assert math.isnan(batch_scores("stereo", torch.zeros(1, 1, 2, 2), unknown)["avgerr"])


@pytest.mark.parametrize("kind", CHANNELS)
def test_a_prediction_that_is_not_a_number_is_never_good(kind: str) -> None:
    truth = torch.ones(1, CHANNELS[kind], 2, 2)
    prediction = truth.clone()
    prediction[0, 0, 0, 0] = math.nan
    found = scores(kind, prediction, truth)
    assert all(math.isnan(value) for name, value in found.items() if name not in ("s10-40", "s40+")), found  # no pixel is that fast
    truth[0, :, 0, 0] = INF  # where nothing is known, nothing is asked
    assert not any(math.isnan(value) for value in scores(kind, prediction, truth).values())


def test_wrong_input() -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'stereo'"):
        DenseMeter("stere")
    with pytest.raises(ValueError, match=r"scores of flow: prediction and truth must be \[B, 2, H, W\]"):
        DenseMeter("flow").update(torch.zeros(1, 1, 2, 2), torch.zeros(1, 1, 2, 2))
