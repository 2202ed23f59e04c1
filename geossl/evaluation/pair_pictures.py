"""Pictures of what an encoder of images and its decoder see: features as colours, and matches between the two images of a pair."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from geossl.evaluation.correspondence import Matches, match_patches
from geossl.evaluation.event_pictures import principal_colors
from geossl.geometry import ImageBatch, denormalize_images

_LINES = 24
_HEIGHT = 224  # of a picture of matches, at least


def feature_colors(maps: Tensor, patch: int) -> np.ndarray:
    """Show feature maps ``[B, C, h, w]`` as images ``[B, h * patch, w * patch, 3]`` in 0..1: the main components over all of them."""
    samples, _, rows, columns = maps.shape
    colors = principal_colors(maps.movedim(1, -1).flatten(0, 2)).reshape(samples, rows, columns, 3)
    return colors.repeat(patch, 1).repeat(patch, 2).astype(np.float32) / 255


def draw_matches(image: np.ndarray, reference: np.ndarray, matches: Matches, lines: int = _LINES) -> np.ndarray:
    """Draw the surest matches between two images side by side.

    Args:
        image: ``[H, W, 3]`` in 0..1.
        reference: As large.
        matches: Of the patches of ``image``; the colour of a line tells where in it the match begins.
        lines: How many are drawn.

    Returns:
        ``[h, 2 * w, 3]`` float32 in 0..1, enlarged by a whole number where the images are small.
    """
    from matplotlib import colormaps
    from PIL import Image, ImageDraw

    height, width = image.shape[:2]
    factor = -(-_HEIGHT // height)
    both = np.concatenate([image, reference], 1).repeat(factor, 0).repeat(factor, 1)
    canvas = Image.fromarray(np.round(255 * both.clip(0, 1)).astype(np.uint8))
    pen = ImageDraw.Draw(canvas)
    for number in matches.weight.argsort(descending=True)[:lines].tolist():
        (x, y), (u, v) = matches.source[number].tolist(), matches.target[number].tolist()
        color = tuple(round(255 * part) for part in colormaps["hsv"]((x / width + y / height) / 2)[:3])
        start, end = (x * factor, y * factor), ((u + width) * factor, v * factor)
        pen.line([start, end], color, width=2)
        for place in (start, end):
            pen.ellipse([place[0] - 3, place[1] - 3, place[0] + 3, place[1] + 3], color)
    return np.asarray(canvas, np.float32) / 255


def add_pair_pictures(module: Any, batch: ImageBatch, made: list[dict[str, np.ndarray]]) -> None:
    """Add to the pictures ``made`` of a batch the ``features`` of each image and, where the method has a decoder that reads a second one,
    the ``matches`` its cross-attention finds.
    """
    patch = module.backbone.config.patch
    with torch.no_grad():
        for row, colors in zip(made, feature_colors(module.backbone(batch.image), patch), strict=True):
            row["features"] = colors
        if batch.reference is None or not hasattr(module, "pair") or getattr(module.config, "single_view", False):
            return
        attention = module.pair.cross_attention(batch.image, batch.reference).cpu()
    grid = batch.image.shape[2] // patch, batch.image.shape[3] // patch
    images = [denormalize_images(x.float()).clamp(0, 1).movedim(1, -1).cpu().numpy() for x in (batch.image, batch.reference)]
    for row, image, reference, weights in zip(made, *images, attention, strict=True):
        row["matches"] = draw_matches(image, reference, match_patches(weights, grid, patch))
