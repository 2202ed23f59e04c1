from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from geossl.errors import ConfigError
from geossl.tasks.tiling import Weighting, enlarged_size, predict_tiled, window_offsets

EQUAL = Weighting("equal")


@pytest.mark.parametrize("text", ["conf_expsigmoid_15_3", "expsigmoid_10_5", "expbeta3", "conf_expbeta3", "equal", "expsigmoid_1.5_0.5"])
def test_weightings_are_read(text: str) -> None:
    weighting = Weighting.parse(text)
    c = torch.tensor([-1.0, 0.0, 2.0])
    expected = {
        "conf_expsigmoid_15_3": torch.exp(-30 * (torch.sigmoid(c / 3) - 0.5)),
        "expsigmoid_10_5": torch.exp(-20 * (torch.sigmoid(c / 5) - 0.5)),
        "expsigmoid_1.5_0.5": torch.exp(-3 * (torch.sigmoid(2 * c) - 0.5)),
        "equal": torch.ones(3),
    }.get(text, torch.exp(-3 * c))
    torch.testing.assert_close(weighting(c), expected)


@pytest.mark.parametrize("text", ["", "expsigmoid_15", "expsigmoid_15_0", "expbeta", "expbeta-3", "uniform"])
def test_other_weightings_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="expsigmoid_<beta>_<scale>"):
        Weighting.parse(text)


@pytest.mark.parametrize(
    ("total", "window", "overlap", "expected"),
    [(64, 64, 0.7, [0]), (96, 64, 0.5, [0, 32]), (97, 64, 0.5, [0, 16, 33]), (65, 64, 0.0, [0, 1]), (128, 64, 0.0, [0, 64])],
)
def test_offsets(total: int, window: int, overlap: float, expected: list[int]) -> None:
    assert window_offsets(total, window, overlap) == expected


@pytest.mark.parametrize("arguments", [(63, 64, 0.5), (64, 0, 0.5), (64, 32, 1.0), (64, 32, -0.1)])
def test_wrong_offsets(arguments: tuple[int, int, float]) -> None:
    with pytest.raises(ValueError, match="0 < window <= total"):
        window_offsets(*arguments)


def test_sizes_of_small_images() -> None:
    window = (64, 96)
    assert enlarged_size((64, 96), window) == (64, 96)
    assert enlarged_size((100, 90), window) == (107, 96)
    assert enlarged_size((40, 64), window) == (64, 103)  # 102.4 is rounded up
    assert enlarged_size((32, 64), window) == (64, 128)
    assert enlarged_size((50, 200), window) == (64, 256)
    assert enlarged_size((48, 64), window, published=True) == enlarged_size((48, 64), window) == (72, 96)
    assert enlarged_size((64, 40), (96, 64), published=True) == (154, 96)  # 96 / 40, where 64 / 40 would do
    with pytest.raises(ValueError, match="published=True enlarges images of 40 x 64 to 60 x 96, less than the window 64 x 96"):
        enlarged_size((40, 64), window, published=True)


def position(left: Tensor, right: Tensor | None) -> Tensor:
    """A network that reads its answer from the picture, and is sure where the second channel says so."""
    return torch.cat([left[:, :1], left[:, 1:2]], 1)


@pytest.mark.parametrize("at_once", [1, 3, 100])
def test_windows_are_put_together(at_once: int) -> None:
    image = torch.randn(2, 3, 20, 30)
    seen = []

    def network(left: Tensor, right: Tensor | None) -> Tensor:
        assert right is not None
        assert torch.equal(left, right)
        seen.append(len(left))
        return position(left, right)

    found = predict_tiled(network, image, image, window=(8, 12), weighting=Weighting("expbeta", 1.0), windows_at_once=at_once)
    torch.testing.assert_close(found.values, image[:, :1])
    torch.testing.assert_close(found.confidence, image[:, 1])
    assert max(seen) == 2 * min(at_once, sum(seen) // 2)


def test_surer_windows_count_more() -> None:
    numbers = iter([(1.0, 0.0), (3.0, 1.0)])

    def network(left: Tensor, right: Tensor | None) -> Tensor:
        value, confidence = next(numbers)
        return torch.stack([torch.full_like(left[:, 0], value), torch.full_like(left[:, 0], confidence)], 1)

    found = predict_tiled(network, torch.zeros(1, 3, 4, 6), window=(4, 4), overlap=0.5, weighting=Weighting("expbeta", 2.0))
    low = math.exp(-2.0)
    torch.testing.assert_close(found.values[0, 0, 0], torch.tensor([1, 1, *[(1 + 3 * low) / (1 + low)] * 2, 3, 3]))
    assert found.confidence[0, 0, 2].item() == pytest.approx(low / (1 + low))


def constant(left: Tensor, right: Tensor | None) -> Tensor:
    return torch.tensor([6.0, 12.0, 0.5]).view(1, 3, 1, 1).expand(len(left), 3, *left.shape[2:])


def test_values_in_pixels_follow_the_size_of_small_images() -> None:
    image = torch.randn(1, 3, 40, 64)  # becomes 64 x 103
    found = predict_tiled(constant, image, image, window=(64, 96), weighting=Weighting.parse("expsigmoid_10_5"))
    assert found.values.shape == (1, 2, 40, 64)
    torch.testing.assert_close(found.values[0, :, 0, 0], torch.tensor([6 * 64 / 103, 12 * 40 / 64]))
    assert found.confidence.shape == (1, 40, 64)
    kept = predict_tiled(constant, image, image, window=(64, 96), weighting=Weighting.parse("expsigmoid_10_5"), pixel_units=False)
    torch.testing.assert_close(kept.values[0, :, 0, 0], torch.tensor([6.0, 12.0]))


def test_published_confidence_stays_enlarged() -> None:
    image = torch.randn(1, 3, 48, 64)
    found = predict_tiled(constant, image, image, window=(64, 96), weighting=Weighting("expbeta", 3.0), published=True)
    assert found.values.shape == (1, 2, 48, 64)
    assert found.confidence.shape == (1, 72, 96)


def test_without_confidence() -> None:
    image = torch.randn(1, 3, 20, 30)
    found = predict_tiled(lambda left, right: left, image, window=(8, 12), weighting=EQUAL, confident=False)
    assert found.confidence is None
    torch.testing.assert_close(found.values, image)


def test_bad_images() -> None:
    good, bad = torch.zeros(1, 3, 8, 8), torch.zeros(1, 3, 8, 8)
    bad[0, 0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match="reference has 1 values that are not finite"):
        predict_tiled(position, good, bad, window=(8, 8), weighting=EQUAL)
    with pytest.raises(ValueError, match=r"reference must be \[1, 3, 8, 8\] like image"):
        predict_tiled(position, good, bad[..., :4], window=(8, 8), weighting=EQUAL)
    with pytest.raises(ValueError, match=r"image must be \[B, 3, H, W\]"):
        predict_tiled(position, good[0], window=(8, 8), weighting=EQUAL)
