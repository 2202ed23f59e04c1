from __future__ import annotations

import numpy as np
import pytest
import torch

from geossl.evaluation.dense_pictures import UNKNOWN, color_wheel, dense_pictures, paint
from geossl.geometry import ImageBatch

INF = float("inf")


def test_the_wheel_has_the_published_colours() -> None:
    wheel = color_wheel()
    assert wheel.shape == (55, 3)
    np.testing.assert_allclose(wheel[[0, 15, 21, 25, 36, 49]], [[1, 0, 0], [1, 1, 0], [0, 1, 0], [0, 1, 1], [0, 0, 1], [1, 0, 1]])


def test_flow_to_the_right_is_red_to_the_left_cyan_and_none_is_white() -> None:
    flow = torch.tensor([[[5.0, -5.0, 0.0, 0.0]], [[0.0, 0.0, 0.0, 5.0]]])
    right, left, still, down = paint("flow", flow)[0]
    np.testing.assert_allclose(right, [1, 0, 0], atol=0.05)
    np.testing.assert_allclose(still, [1, 1, 1], atol=1e-6)
    assert left[0] < 0.2 < 0.8 < left[2]
    assert down[1] > 0.8 > down[2]  # yellow


@pytest.mark.parametrize(("kind", "channels"), [("stereo", 1), ("depth", 1), ("flow", 2), ("normals", 3)])
def test_unknown_pixels_are_grey_and_nothing_known_is_no_failure(kind: str, channels: int) -> None:
    values = torch.rand(channels, 4, 6) + 0.5
    values[0, 1] = INF
    picture = paint(kind, values)
    assert picture.shape == (4, 6, 3)
    assert ((picture >= 0) & (picture <= 1)).all()
    assert (picture[1] == UNKNOWN).all()
    assert (paint(kind, torch.full((channels, 2, 2), INF)) == UNKNOWN).all()


def test_colours_of_a_prediction_are_those_of_the_truth() -> None:
    truth = torch.linspace(1, 10, 24).view(1, 4, 6)
    np.testing.assert_allclose(paint("stereo", truth, truth), paint("stereo", truth))
    assert np.abs(paint("stereo", 2 * truth, truth) - paint("stereo", truth)).max() > 0.3
    near, far = paint("depth", truth)[0, 0], paint("depth", truth)[-1, -1]
    np.testing.assert_allclose(near, paint("stereo", truth)[-1, -1], atol=0.05)  # near in depth is large in disparity
    assert near[0] > near[2]
    assert far[2] > far[0]


def test_what_is_laid_side_by_side() -> None:
    image, truth = torch.randn(2, 3, 4, 6), torch.rand(2, 1, 4, 6)
    truth[0, 0, 0, 0] = INF
    rows = dense_pictures("stereo", ImageBatch(image, image, truth), truth.nan_to_num(posinf=9.0) + 0.25)
    assert list(rows[0]) == ["image", "second image", "predicted", "true", "error"]
    assert rows[0]["error"][0, 0] == 0
    np.testing.assert_allclose(rows[1]["error"], 0.25, atol=1e-6)
    assert list(dense_pictures("depth", ImageBatch(image, None, truth), truth)[0]) == ["image", "predicted", "true", "error"]
