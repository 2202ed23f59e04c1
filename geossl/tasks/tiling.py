"""Dense prediction of images of any size in overlapping windows, each as large as what the network was trained on.

The windows are weighed by the network's own confidence (Weinzaepfel et al., "CroCo v2", ICCV 2023, arXiv 2211.10408). They are predicted
one after the other, so memory does not grow with the image beyond the images and sums themselves.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from geossl.errors import ConfigError

SMALLEST_WEIGHT = 1e-16
"""What the sum of the weights of a pixel starts with, as published."""


class Prediction(NamedTuple):
    """What is predicted for images: ``values [B, C, H, W]`` and ``confidence [B, H, W]``, smaller where surer; None without."""

    values: Tensor
    confidence: Tensor | None


@dataclass(frozen=True)
class Weighting:
    """How much a window counts in a pixel of confidence c.

    Args:
        kind: ``expsigmoid``: exp(-2 beta (sigmoid(c / scale) - 1/2)); ``expbeta``: exp(-beta c); ``equal``: 1.
        beta: How much more sure windows count.
        scale: What c is divided by in ``expsigmoid``.
    """

    kind: Literal["expsigmoid", "expbeta", "equal"]
    beta: float = 0.0
    scale: float = 1.0

    @classmethod
    def parse(cls, text: str) -> Weighting:
        """Read ``expsigmoid_<beta>_<scale>``, ``expbeta<beta>`` or ``equal``, with or without the published ``conf_`` before it.

        Raises:
            ConfigError: it is none of them.
        """
        number = r"(\d+(?:\.\d+)?)"
        name = text.removeprefix("conf_")
        if name == "equal":
            return cls("equal")
        if match := re.fullmatch(f"expsigmoid_{number}_{number}", name):
            if float(match[2]) > 0:
                return cls("expsigmoid", float(match[1]), float(match[2]))
        elif match := re.fullmatch(f"expbeta_?{number}", name):
            return cls("expbeta", float(match[1]))
        raise ConfigError(
            f"tile_weighting must be expsigmoid_<beta>_<scale>, expbeta<beta> or equal, such as expsigmoid_15_3, got {text!r}"
        )

    def __call__(self, confidence: Tensor) -> Tensor:
        """Weights like ``confidence``, which may have any shape."""
        if self.kind == "expsigmoid":
            return torch.exp(-2 * self.beta * ((confidence / self.scale).sigmoid() - 0.5))
        return torch.exp(-self.beta * confidence) if self.kind == "expbeta" else torch.ones_like(confidence)


def window_offsets(total: int, window: int, overlap: float) -> list[int]:
    """Where windows begin along an axis of ``total`` pixels: evenly spaced, neighbours sharing at least ``overlap`` of their length.

    Raises:
        ValueError: the window is longer than the axis, or ``overlap`` is not in [0, 1).
    """
    if not 0 < window <= total or not 0 <= overlap < 1:
        raise ValueError(
            f"window_offsets: expected 0 < window <= total and 0 <= overlap < 1, got window {window}, total {total}, overlap {overlap}"
        )
    count = 1 + math.ceil((total - window) / ((1 - overlap) * window))
    return np.linspace(0, total - window, count).round().astype(int).tolist()


def enlarged_size(size: tuple[int, int], window: tuple[int, int], *, published: bool = False) -> tuple[int, int]:
    """Height and width that an image of ``size`` (height, width) is enlarged to so that the window fits, at equal proportions.

    With ``published``, the height of the window is divided by the width of the image, as the published code does by mistake. Its sizes are
    rounded up, as ours are.

    Raises:
        ValueError: the published factor leaves the image smaller than the window (there the published code stops, too).
    """
    (height, width), (rows, columns) = size, window
    if height >= rows and width >= columns:
        return size
    across, upright = (columns, width), (rows, width if published else height)  # factors: target over size
    large, small = across if across[0] * upright[1] >= upright[0] * across[1] else upright
    big = (-(-height * large // small), -(-width * large // small))
    if big[0] < rows or big[1] < columns:
        raise ValueError(
            f"published=True enlarges images of {height} x {width} to {big[0]} x {big[1]}, less than the window {rows} x {columns} "
            "(it divides by the width twice); leave it off, or give larger images"
        )
    return big


@torch.no_grad()
def predict_tiled(
    network: Callable[[Tensor, Tensor | None], Tensor],
    image: Tensor,
    reference: Tensor | None = None,
    *,
    window: tuple[int, int],
    overlap: float = 0.7,
    weighting: Weighting,
    confident: bool = True,
    pixel_units: bool = True,
    windows_at_once: int = 1,
    published: bool = False,
) -> Prediction:
    """Predict images in windows.

    Args:
        network: Takes windows of both images ``[n, 3, *window]`` and gives ``[n, C + 1, *window]``, the confidence last; without it
            (``[n, C, *window]``) where not ``confident``.
        image: ``[B, 3, H, W]``, normalised, finite, of any size.
        reference: Second images, like ``image``, or None. A window covers the same pixels of both.
        window: Height and width. Smaller images are enlarged until it fits (bicubic), and what is predicted brought back to their size.
        overlap: Share of a window that its neighbours cover as well, at least; in [0, 1). Published: 0.7, and 0.9 for the benchmarks.
        weighting: How windows are weighed where they overlap.
        confident: Whether the network gives a confidence; without, windows count alike whatever ``weighting`` says.
        pixel_units: Values are lengths in pixels (along x, or along x and y) and follow the size of the image; False: they do not, and are
            brought back bilinearly, since beyond the range of the neighbours there may be no depth or direction.
        windows_at_once: Windows of each image that are predicted together: more memory, and on a GPU less time.
        published: Enlarge as the published code does, see :func:`enlarged_size`, and leave the confidence at that size.

    Returns:
        Values ``[B, C, H, W]`` and confidence ``[B, H, W]``, the weighted means over the windows.

    Raises:
        ValueError: images of wrong or unequal shapes, or with pixels that are not finite.
    """
    check_images(image, reference)
    size = (image.shape[2], image.shape[3])
    big = enlarged_size(size, window, published=published)
    offsets = itertools.product(*(window_offsets(total, side, overlap) for total, side in zip(big, window, strict=True)))
    found = _weighted_mean(
        network, _resized(image, big), _resized(reference, big), window, offsets, weighting if confident else None, windows_at_once
    )
    brought = _brought_to(found, size, pixel_units)
    return Prediction(brought.values, found.confidence if published else brought.confidence)


@torch.no_grad()
def predict_whole(
    network: Callable[[Tensor, Tensor | None], Tensor],
    image: Tensor,
    reference: Tensor | None = None,
    *,
    multiple: int,
    confident: bool,
    pixel_units: bool = True,
) -> Prediction:
    """Predict images at once, whatever their size: memory grows with it.

    Args:
        network: See :func:`predict_tiled`.
        image: ``[B, 3, H, W]``, normalised, finite.
        reference: Second images, like ``image``, or None.
        multiple: What the network's images must be multiples of. Others are enlarged to the next ones (bicubic), and what is predicted
            brought back to their size.
        confident: Whether the network gives a confidence.
        pixel_units: See :func:`predict_tiled`.

    Returns:
        Values ``[B, C, H, W]``, and confidence ``[B, H, W]`` or None.

    Raises:
        ValueError: see :func:`check_images`.
    """
    check_images(image, reference)
    size = (image.shape[2], image.shape[3])
    big = (-(-size[0] // multiple) * multiple, -(-size[1] // multiple) * multiple)
    output = network(_resized(image, big), _resized(reference, big)).float()
    found = Prediction(output[:, :-1], output[:, -1]) if confident else Prediction(output, None)
    return _brought_to(found, size, pixel_units)


def _weighted_mean(
    network: Callable[[Tensor, Tensor | None], Tensor],
    image: Tensor,
    reference: Tensor | None,
    window: tuple[int, int],
    offsets: Iterator[tuple[int, ...]],
    weighting: Weighting | None,
    windows_at_once: int,
) -> Prediction:
    """Run the windows that begin at ``offsets`` and average them; without a ``weighting`` there is no confidence."""
    samples, (height, width) = image.shape[0], image.shape[2:]
    total, weights = None, image.new_full((samples, 1, height, width), SMALLEST_WEIGHT, dtype=torch.float32)
    for group in _groups(offsets, windows_at_once):
        places = [(slice(y, y + window[0]), slice(x, x + window[1])) for y, x in group]
        left, right = (None if part is None else torch.cat([part[..., y, x] for y, x in places]) for part in (image, reference))
        assert left is not None
        output = network(left, right).float()
        for (y, x), part in zip(places, output.split(samples), strict=True):
            weight = torch.ones_like(part[:, :1]) if weighting is None else weighting(part[:, -1:])
            if total is None:
                total = part.new_zeros((samples, part.shape[1], height, width))
            total[..., y, x] += part * weight
            weights[..., y, x] += weight
    assert total is not None
    total /= weights
    return Prediction(total, None) if weighting is None else Prediction(total[:, :-1], total[:, -1])


def check_images(image: Tensor, reference: Tensor | None) -> None:
    """Check that images are ``[B, 3, H, W]``, finite, and both alike.

    Raises:
        ValueError: they are not.
    """
    if image.dim() != 4 or image.shape[1] != 3 or not image.numel():
        raise ValueError(f"image must be [B, 3, H, W] and not empty, got {list(image.shape)}")
    if reference is not None and reference.shape != image.shape:
        raise ValueError(f"reference must be {list(image.shape)} like image, got {list(reference.shape)}")
    for name, part in (("image", image), ("reference", reference)):
        if part is not None and not bool(part.isfinite().all()):
            raise ValueError(f"{name} has {int((~part.isfinite()).sum())} values that are not finite; replace or crop them")


def _resized(images: Tensor | None, size: tuple[int, int], mode: str = "bicubic") -> Tensor:
    """Images ``[B, C, h, w]`` at ``size`` (height, width); None stays None."""
    if images is None or images.shape[2:] == size:
        return images  # type: ignore[return-value]
    return F.interpolate(images, size=size, mode=mode, align_corners=False)


def _brought_to(found: Prediction, size: tuple[int, int], pixel_units: bool) -> Prediction:
    """A prediction at ``size`` (height, width); lengths in pixels follow."""
    (height, width), (rows, columns) = size, found.values.shape[2:]
    if (rows, columns) == size:
        return found
    values = _resized(found.values, size, "bicubic" if pixel_units else "bilinear")
    if pixel_units:
        values = values * values.new_tensor([width / columns, height / rows])[: values.shape[1], None, None]
    return Prediction(values, None if found.confidence is None else _resized(found.confidence[:, None], size)[:, 0])


def _groups(items: Iterator[tuple[int, ...]], size: int) -> Iterator[list[tuple[int, ...]]]:
    while group := list(itertools.islice(items, size)):
        yield group
