"""Colour changes against numbers worked out by hand, Pillow and colorsys; windows and their errors."""

from __future__ import annotations

import colorsys

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance

from geossl.data import ColorJitterConfig
from geossl.data.image_augment import (
    adjust_brightness,
    adjust_contrast,
    adjust_hue,
    adjust_saturation,
    apply_jitter,
    crop_corner,
    draw_jitter,
    jitter_pair,
    random_crop,
)
from geossl.errors import ConfigError, DataError


@pytest.fixture
def image() -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(3).integers(0, 256, (3, 12, 10)).astype(np.float32) / 255)


def test_one_pixel_by_hand() -> None:
    pixel = torch.tensor([0.2, 0.4, 0.8])[:, None, None]  # grey 0.2989 * 0.2 + 0.587 * 0.4 + 0.114 * 0.8 = 0.38578
    assert adjust_brightness(pixel, 1.4).flatten().tolist() == pytest.approx([0.28, 0.56, 1.0])
    expected = [0.6 * value + 0.4 * 0.38578 for value in (0.2, 0.4, 0.8)]
    assert adjust_saturation(pixel, 0.6).flatten().tolist() == pytest.approx(expected)
    assert adjust_contrast(pixel, 0.6).flatten().tolist() == pytest.approx(expected)  # one pixel is its own mean
    pair = torch.cat([pixel, torch.zeros(3, 1, 1)], 2)
    assert adjust_contrast(pair, 1.5)[:, 0, 0].tolist() == pytest.approx([1.5 * v - 0.5 * 0.19289 for v in (0.2, 0.4)] + [1.0])


@pytest.mark.parametrize(
    ("change", "enhance"),
    [
        (adjust_brightness, ImageEnhance.Brightness),
        (adjust_contrast, ImageEnhance.Contrast),
        (adjust_saturation, ImageEnhance.Color),
    ],
)
@pytest.mark.parametrize("factor", [0.0, 0.6, 1.0, 1.4])
def test_changes_agree_with_pillow(image: torch.Tensor, change, enhance, factor: float) -> None:  # type: ignore[no-untyped-def]
    pillow = enhance(Image.fromarray((image * 255).round().byte().permute(1, 2, 0).numpy())).enhance(factor)
    theirs = torch.from_numpy(np.array(pillow)).permute(2, 0, 1).float()
    assert (255 * change(image, factor) - theirs).abs().max() <= 1.5  # Pillow rounds grey and result to whole steps


@pytest.mark.parametrize("turn", [-0.5, -0.13, 0.0, 0.2, 0.5])
def test_hue_agrees_with_colorsys(image: torch.Tensor, turn: float) -> None:
    ours = adjust_hue(image, turn)
    for row, column in np.ndindex(12, 10):
        hue, saturation, value = colorsys.rgb_to_hsv(*image[:, row, column].tolist())
        theirs = colorsys.hsv_to_rgb((hue + turn) % 1.0, saturation, value)
        assert ours[:, row, column].tolist() == pytest.approx(theirs, abs=1e-5)
    grey = torch.full((3, 2, 2), 0.3)
    assert torch.equal(adjust_hue(grey, turn), grey)


def test_draws_cover_their_ranges_and_all_orders() -> None:
    config = ColorJitterConfig(hue=0.1)
    rng = np.random.default_rng(0)
    draws = [draw_jitter(rng, config) for _ in range(600)]
    assert len({tuple(name for name, _ in draw) for draw in draws}) == 24
    for name, low, high in (("brightness", 0.6, 1.4), ("contrast", 0.6, 1.4), ("saturation", 0.6, 1.4), ("hue", -0.1, 0.1)):
        values = [dict(draw)[name] for draw in draws]
        assert low <= min(values) < low + 0.02 * (high - low)
        assert high - 0.02 * (high - low) < max(values) <= high
    assert draw_jitter(rng, ColorJitterConfig(brightness=0, contrast=0, saturation=0)) == []
    assert [name for name, _ in draw_jitter(rng, ColorJitterConfig(brightness=0, contrast=0))] == ["saturation"]


def test_the_order_of_changes_matters(image: torch.Tensor) -> None:
    changes = [("brightness", 1.4), ("contrast", 0.6)]
    assert not torch.allclose(apply_jitter(image, changes), apply_jitter(image, changes[::-1]))
    assert torch.equal(apply_jitter(image, changes), adjust_contrast(adjust_brightness(image, 1.4), 0.6))


def test_images_of_a_pair_change_apart_or_together(image: torch.Tensor) -> None:
    apart = jitter_pair(image, image, np.random.default_rng(1), ColorJitterConfig())
    again = jitter_pair(image, image, np.random.default_rng(1), ColorJitterConfig())
    together = jitter_pair(image, image, np.random.default_rng(1), ColorJitterConfig(asymmetric=0.0))
    assert not torch.equal(apart[0], apart[1])  # type: ignore[arg-type]
    assert torch.equal(together[0], together[1])  # type: ignore[arg-type]
    assert all(torch.equal(a, b) for a, b in zip(apart, again, strict=True))  # type: ignore[arg-type]


def test_windows() -> None:
    ramp = torch.arange(5 * 7).view(1, 5, 7)
    assert random_crop(ramp, (3, 3), None)[0, 1, 1] == ramp[0, 2, 3]  # the middle
    rng = np.random.default_rng(0)
    corners = {crop_corner((5, 7), (3, 3), rng, "x") for _ in range(300)}
    assert corners == {(row, column) for row in range(3) for column in range(5)}
    assert torch.equal(random_crop(ramp, (5, 7), rng), ramp)
    with pytest.raises(DataError, match=r"a\.jpg: the image has 5 x 7 pixels, less than the window of 6 x 6; use a smaller crop"):
        random_crop(ramp, (6, 6), rng, "a.jpg")


@pytest.mark.parametrize("wrong", [{"brightness": -0.1}, {"hue": 0.6}, {"asymmetric": 2.0}])
def test_settings_are_checked(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        ColorJitterConfig(**wrong)  # type: ignore[arg-type]
