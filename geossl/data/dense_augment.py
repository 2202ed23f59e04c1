"""The published augmentations of stereo and flow: images and their truth are scaled, cut, turned over and recoloured together.

Images are ``[3, H, W]`` float32 in 0..1, disparity ``[1, H, W]`` and flow ``[2, H, W]`` float32, not finite where unknown. Truth is never
mixed between pixels: resizing takes the nearest, and values grow with the image.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import grid_sample, interpolate

from geossl.config import require
from geossl.data.image_augment import (
    ColorJitterConfig,
    adjust_brightness,
    adjust_contrast,
    adjust_hue,
    adjust_saturation,
    crop,
    crop_corner,
    jitter_pair,
)


@dataclass(frozen=True)
class DensePair:
    """Images and truth of one sample; ``reference`` is None for depth."""

    image: Tensor
    reference: Tensor | None
    truth: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """Height and width."""
        return self.image.shape[1], self.image.shape[2]

    def images(self, change: Callable[[Tensor], Tensor]) -> DensePair:
        """Return the pair with ``change`` applied to both images."""
        return replace(self, image=change(self.image), reference=None if self.reference is None else change(self.reference))


@dataclass(kw_only=True)
class StereoAugmentConfig:
    """Augmentation of stereo training samples, as published for CroCo-Stereo. Probability 0 switches a part off."""

    scale: float = 0.5
    """Probability that the pair is stretched along x, by 2^U(0, 1) where its shorter side is below 800 pixels, else by 2^U(-0.2, 0.4)."""
    vertical_flip: float = 0.5
    """Probability of turning the pair upside down."""
    misalign: float = 0.5
    """Probability of turning the right image by up to 0.1 degrees and shifting it up or down by up to 2 pixels, as imperfect rectification
    does; the truth stays."""
    color: float = 1.0
    """Probability of changing colours: contrast 0.8 to 1.2, gamma 0.7 to 1.5, brightness 0.5 to 2, hue by up to 0.1, saturation 0.8 to 1.2;
    half of the time only one of these."""
    asymmetric: float = 0.5
    """Probability that the right image is changed differently from the left."""

    def __post_init__(self) -> None:
        for name in ("scale", "vertical_flip", "misalign", "color", "asymmetric"):
            require(0.0 <= getattr(self, name) <= 1.0, name, "is a probability and must lie in [0, 1]", getattr(self, name))


def _flow_jitter() -> ColorJitterConfig:
    return ColorJitterConfig(hue=0.5 / math.pi, asymmetric=0.2)


@dataclass(kw_only=True)
class FlowAugmentConfig:
    """Augmentation of flow training samples, as RAFT's and CroCo-Flow's. Probability 0 switches a part off."""

    scale: float = 0.8
    """Probability that the pair is resized, by 2^U(low, high)."""
    scale_range: tuple[float, float] = (-0.2, 0.5)
    """Low and high."""
    stretch: float = 0.8
    """Probability that x and y are then resized by another 2^U(-0.2, 0.2) each."""
    horizontal_flip: float = 0.5
    """Probability of mirroring."""
    vertical_flip: float = 0.1
    """Probability of turning upside down."""
    color: ColorJitterConfig = field(default_factory=_flow_jitter)
    """Colour changes."""

    def __post_init__(self) -> None:
        for name in ("scale", "stretch", "horizontal_flip", "vertical_flip"):
            require(0.0 <= getattr(self, name) <= 1.0, name, "is a probability and must lie in [0, 1]", getattr(self, name))
        require(self.scale_range[0] <= self.scale_range[1], "scale_range", "must hold low <= high", self.scale_range)


@dataclass(kw_only=True)
class DepthAugmentConfig:
    """Augmentation of training images with depth."""

    horizontal_flip: float = 0.5
    """Probability of mirroring."""
    color: ColorJitterConfig = field(default_factory=ColorJitterConfig)
    """Colour changes."""

    def __post_init__(self) -> None:
        require(0.0 <= self.horizontal_flip <= 1.0, "horizontal_flip", "is a probability and must lie in [0, 1]", self.horizontal_flip)


def resize_pair(pair: DensePair, size: tuple[int, int], scaled: tuple[float, ...]) -> DensePair:
    """Resize images (bilinear, with antialiasing) and truth (nearest) to ``size``; truth channel c is multiplied by ``scaled[c]``."""
    if size == pair.shape:
        return pair

    def images(values: Tensor) -> Tensor:
        return interpolate(values[None], size, mode="bilinear", align_corners=False, antialias=True)[0].clamp(0, 1)

    truth = interpolate(pair.truth[None], size, mode="nearest-exact")[0] * pair.truth.new_tensor(scaled)[:, None, None]
    return replace(pair.images(images), truth=truth)


def scale_pair(pair: DensePair, factor: tuple[float, float], crop_size: tuple[int, int], kind: str) -> DensePair:
    """Scale height and width by ``factor``, but not below the window; disparity and flow grow with the image.

    Args:
        pair: Images and truth.
        factor: Of height and width; 1 leaves a side as it is, whatever the window.
        crop_size: Height and width of the window.
        kind: ``disparity`` or ``flow``.
    """
    height, width = (
        side if ratio == 1 else max(round(side * ratio), least) for side, ratio, least in zip(pair.shape, factor, crop_size, strict=True)
    )
    y, x = height / pair.shape[0], width / pair.shape[1]
    return resize_pair(pair, (height, width), (x,) if kind == "disparity" else (x, y))


def crop_pair(pair: DensePair, size: tuple[int, int], rng: np.random.Generator | None, source: str) -> DensePair:
    """Cut the same random window (the middle one without ``rng``) out of images and truth; errors as for ``crop_corner``."""
    corner = crop_corner(pair.shape, size, rng, source)
    return replace(pair.images(lambda values: crop(values, corner, size)), truth=crop(pair.truth, corner, size))


def flip_pair(pair: DensePair, axis: int, signs: tuple[float, ...]) -> DensePair:
    """Turn images and truth over along ``axis`` (1: upside down, 2: mirrored); truth channel c is multiplied by ``signs[c]``."""
    truth = pair.truth.flip(axis) * pair.truth.new_tensor(signs)[:, None, None]
    return replace(pair.images(lambda values: values.flip(axis)), truth=truth)


def misalign(image: Tensor, degrees: float, shift: float) -> Tensor:
    """Turn an image about its middle (counter-clockwise) and shift it down by ``shift`` pixels; what comes in repeats the border."""
    _, height, width = image.shape
    angle = math.radians(degrees)
    cosine, sine = math.cos(angle), math.sin(angle)
    y, x = torch.meshgrid(torch.arange(height) + 0.5 - height / 2, torch.arange(width) + 0.5 - width / 2, indexing="ij")
    y = y - shift
    place = torch.stack([(cosine * x - sine * y) / (width / 2), (sine * x + cosine * y) / (height / 2)], -1)
    return grid_sample(image[None], place[None].float(), mode="bilinear", padding_mode="border", align_corners=False)[0]


_STEREO_COLORS = (
    ("contrast", 0.8, 1.2),
    ("gamma", 0.7, 1.5),
    ("brightness", 0.5, 2.0),
    ("hue", -0.1, 0.1),
    ("saturation", 0.8, 1.2),
)


def draw_stereo_colors(rng: np.random.Generator) -> list[tuple[str, float]]:
    """Draw the colour changes of one image of a stereo pair: all five or, half of the time, one of them."""
    changes = [(name, rng.uniform(low, high)) for name, low, high in _STEREO_COLORS]
    only = int(rng.integers(len(changes)))
    return [changes[only]] if rng.random() < 0.5 else changes


def adjust_gamma(image: Tensor, gamma: float) -> Tensor:
    """Raise the image to a power."""
    return image.clamp(min=1e-8) ** gamma


_CHANGES = {
    "contrast": adjust_contrast,
    "gamma": adjust_gamma,
    "brightness": adjust_brightness,
    "hue": adjust_hue,
    "saturation": adjust_saturation,
}


def _recolor(image: Tensor, changes: list[tuple[str, float]]) -> Tensor:
    for name, factor in changes:
        image = _CHANGES[name](image, factor)
    return image


def augment_stereo(pair: DensePair, rng: np.random.Generator, config: StereoAugmentConfig, size: tuple[int, int], source: str) -> DensePair:
    """Make a training sample of a rectified pair with disparity; ``size`` is its height and width.

    Raises:
        DataError: the images are smaller than that, before any scaling; the message names ``source``.
    """
    crop_corner(pair.shape, size, None, source)
    if rng.random() < config.scale:
        low, high = (0.0, 1.0) if min(pair.shape) < 800 else (-0.2, 0.4)
        pair = scale_pair(pair, (1.0, 2.0 ** rng.uniform(low, high)), size, "disparity")
    pair = crop_pair(pair, size, rng, source)
    if rng.random() < config.vertical_flip:
        pair = flip_pair(pair, 1, (1.0,))
    left, right = pair.image, pair.reference
    if right is None:
        raise ValueError("augment_stereo: a stereo pair needs its right image, got None as reference")
    if rng.random() < config.misalign:
        right = misalign(right, rng.uniform(-0.1, 0.1), rng.uniform(-2.0, 2.0))
    if rng.random() < config.color:
        changes = draw_stereo_colors(rng)
        left = _recolor(left, changes)
        right = _recolor(right, draw_stereo_colors(rng) if rng.random() < config.asymmetric else changes)
    return replace(pair, image=left, reference=right)


def augment_flow(pair: DensePair, rng: np.random.Generator, config: FlowAugmentConfig, size: tuple[int, int], source: str) -> DensePair:
    """Make a training sample of a pair with flow; ``size`` is its height and width.

    Raises:
        DataError: the images are smaller than that, before any scaling; the message names ``source``.
    """
    crop_corner(pair.shape, size, None, source)
    if rng.random() < config.scale:
        both = 2.0 ** rng.uniform(*config.scale_range)
        x, y = 2.0 ** rng.uniform(-0.2, 0.2, size=2) if rng.random() < config.stretch else (1.0, 1.0)
        pair = scale_pair(pair, (both * y, both * x), size, "flow")
    pair = crop_pair(pair, size, rng, source)
    if rng.random() < config.horizontal_flip:
        pair = flip_pair(pair, 2, (-1.0, 1.0))
    if rng.random() < config.vertical_flip:
        pair = flip_pair(pair, 1, (1.0, -1.0))
    image, reference = jitter_pair(pair.image, pair.reference, rng, config.color)
    return replace(pair, image=image, reference=reference)


def augment_depth(pair: DensePair, rng: np.random.Generator, config: DepthAugmentConfig, size: tuple[int, int], source: str) -> DensePair:
    """Make a training sample of an image with depth; ``size`` is its height and width.

    Raises:
        DataError: the images are smaller than that, before any scaling; the message names ``source``.
    """
    pair = crop_pair(pair, size, rng, source)
    if rng.random() < config.horizontal_flip:
        pair = flip_pair(pair, 2, (1.0,))
    image, _ = jitter_pair(pair.image, None, rng, config.color)
    return replace(pair, image=image)
