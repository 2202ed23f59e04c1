"""Random crops and colour changes of images, in plain torch: the published augmentation of pairs, and the pieces it is made of.

Images are ``[3, H, W]`` float32 in 0..1. Every random number is drawn from a :class:`numpy.random.Generator`, so the same generator
state gives the same image on every machine. The four colour changes mean what they mean in torchvision; with a factor ``f`` they are::

    brightness   f x
    contrast     f x + (1 - f) m        m the mean grey of the whole image
    saturation   f x + (1 - f) g        g the grey of the pixel
    hue          the hue, of 0..1 round the colour circle, plus f

each clipped to 0..1, with grey = 0.2989 R + 0.587 G + 0.114 B.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from geossl.config import require
from geossl.errors import DataError

_GREY = (0.2989, 0.587, 0.114)


@dataclass(kw_only=True)
class ColorJitterConfig:
    """Random colour changes of training images, in random order; evaluation makes none.

    The defaults are those of CroCo: brightness, contrast and saturation by a factor of 0.6 to 1.4, drawn for each image of a pair apart.
    """

    brightness: float = 0.4
    """Factor drawn uniformly from 1 - this to 1 + this; 0 switches it off."""
    contrast: float = 0.4
    """The same for contrast."""
    saturation: float = 0.4
    """The same for saturation."""
    hue: float = 0.0
    """Largest turn of the hue, as a part of the colour circle, drawn uniformly to either side; at most 0.5."""
    asymmetric: float = 1.0
    """Probability that the two images of a pair are changed differently; else both get the same changes."""

    def __post_init__(self) -> None:
        for name in ("brightness", "contrast", "saturation"):
            require(getattr(self, name) >= 0.0, name, "must not be negative", getattr(self, name))
        require(0.0 <= self.hue <= 0.5, "hue", "must lie in [0, 0.5]", self.hue)
        require(0.0 <= self.asymmetric <= 1.0, "asymmetric", "must lie in [0, 1]", self.asymmetric)


def grey(image: Tensor) -> Tensor:
    """Return the grey ``[1, H, W]`` of an image ``[3, H, W]``."""
    red, green, blue = image.unbind(0)
    return (_GREY[0] * red + _GREY[1] * green + _GREY[2] * blue)[None]


def adjust_brightness(image: Tensor, factor: float) -> Tensor:
    """Scale the image; see the head of this file."""
    return (image * factor).clamp_(0, 1)


def adjust_contrast(image: Tensor, factor: float) -> Tensor:
    """Draw the image away from its mean grey (``factor`` above 1), or towards it."""
    return (image * factor).add_((1 - factor) * grey(image).mean()).clamp_(0, 1)


def adjust_saturation(image: Tensor, factor: float) -> Tensor:
    """Draw each pixel away from its own grey (``factor`` above 1), or towards it; 0 leaves grey alone."""
    return (image * factor).add_(grey(image), alpha=1 - factor).clamp_(0, 1)


def adjust_hue(image: Tensor, turn: float) -> Tensor:
    """Turn the hue of each pixel by ``turn`` of the colour circle; 1/3 makes red green."""
    red, green, blue = image.unbind(0)
    value, least = image.amax(0), image.amin(0)
    chroma = value - least
    share = torch.where(chroma > 0, chroma, 1.0)
    hue = torch.where(
        value == red,
        (green - blue) / share,
        torch.where(value == green, 2 + (blue - red) / share, 4 + (red - green) / share),
    )
    # Of the six sectors of the circle a channel is full in two, falls or rises through one each, and is at its least in two.
    sector = (hue / 6 + turn).remainder(1.0) * 6
    channels = [value - chroma * torch.minimum(place, 4 - place).clamp(0, 1) for place in ((n + sector).remainder(6) for n in (5, 3, 1))]
    return torch.stack(channels)


def draw_jitter(rng: np.random.Generator, config: ColorJitterConfig) -> list[tuple[str, float]]:
    """Draw the colour changes of one image: names and factors, in the order in which they are made."""
    factors = [
        (name, rng.uniform(max(0.0, 1 - width), 1 + width))
        for name, width in (("brightness", config.brightness), ("contrast", config.contrast), ("saturation", config.saturation))
        if width
    ]
    if config.hue:
        factors.append(("hue", rng.uniform(-config.hue, config.hue)))
    return [factors[number] for number in rng.permutation(len(factors))]


_CHANGES = {"brightness": adjust_brightness, "contrast": adjust_contrast, "saturation": adjust_saturation, "hue": adjust_hue}


def apply_jitter(image: Tensor, changes: list[tuple[str, float]]) -> Tensor:
    """Make the changes that :func:`draw_jitter` drew."""
    for name, factor in changes:
        image = _CHANGES[name](image, factor)
    return image


def jitter_pair(first: Tensor, second: Tensor | None, rng: np.random.Generator, config: ColorJitterConfig) -> tuple[Tensor, Tensor | None]:
    """Change the colours of a pair (or of one image, with ``second`` None)."""
    changes = draw_jitter(rng, config)
    first = apply_jitter(first, changes)
    if second is None:
        return first, None
    if rng.random() < config.asymmetric:
        changes = draw_jitter(rng, config)
    return first, apply_jitter(second, changes)


def crop_corner(shape: tuple[int, int], size: tuple[int, int], rng: np.random.Generator | None, source: str) -> tuple[int, int]:
    """Return the top left corner (row, column) of a random window, or of the middle one without ``rng``.

    Args:
        shape: Height and width of the image.
        size: Height and width of the window.
        rng: Where the corner is drawn from, uniform over all places; None takes the middle.
        source: What an error message calls the image.

    Raises:
        DataError: the image is smaller than the window.
    """
    free = shape[0] - size[0], shape[1] - size[1]
    if min(free) < 0:
        raise DataError(
            f"{source}: the image has {shape[0]} x {shape[1]} pixels, less than the window of {size[0]} x {size[1]}; "
            "use a smaller crop, or larger images (resize enlarges them)"
        )
    if rng is None:
        return free[0] // 2, free[1] // 2
    return int(rng.integers(free[0] + 1)), int(rng.integers(free[1] + 1))


def crop(image: Tensor, corner: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """Return the window ``[..., *size]`` of ``image [..., H, W]`` whose top left pixel is ``corner``."""
    return image[..., corner[0] : corner[0] + size[0], corner[1] : corner[1] + size[1]]


def random_crop(image: Tensor, size: tuple[int, int], rng: np.random.Generator | None, source: str = "image") -> Tensor:
    """Return a random window of ``image [..., H, W]``, the middle one without ``rng``; errors as for :func:`crop_corner`."""
    return crop(image, crop_corner((image.shape[-2], image.shape[-1]), size, rng, source), size)
