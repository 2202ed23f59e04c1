"""Decoding images to bytes of red, green and blue, whatever they were stored as."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from geossl.data.files import existing
from geossl.errors import DataError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".webp", ".tif", ".tiff")
_DAMAGE = (OSError, EOFError, ValueError, TypeError, LookupError, AttributeError, RuntimeError, OverflowError, SyntaxError, MemoryError)
"""What Pillow raises on damaged bytes."""


def decode_image(source: Path | bytes, name: str, short_side: int | None = None) -> Tensor:
    """Decode an image to ``[3, H, W]`` uint8.

    Grey images get three equal channels, palettes their colours, 16-bit grey its upper byte; what is transparent is laid on white.

    Args:
        source: A file, or what a file holds.
        name: What an error message calls it.
        short_side: Resize so that the shorter side has this many pixels; None keeps the size.

    Raises:
        DataError: it is missing, damaged, truncated or no image.
    """
    from PIL import Image

    try:
        with Image.open(existing(source, "image") if isinstance(source, Path) else io.BytesIO(source)) as image:
            colored = rgb(image)
            if short_side is not None:
                colored = resize_short_side(colored, short_side)
            pixels = np.array(colored)
    except _DAMAGE as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{name}: cannot be read as an image; it is damaged, truncated or of another kind ({error})") from error
    return torch.from_numpy(pixels).permute(2, 0, 1)


def rgb(image: Any) -> Any:
    """Convert a Pillow image to RGB as :func:`decode_image` says."""
    from PIL import Image

    if image.mode == "RGB":
        return image
    if image.mode in ("I;16", "I;16B", "I"):
        return Image.fromarray((np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        layer = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
    return image.convert("RGB")


def resize_short_side(image: Any, short_side: int) -> Any:
    """Resize a Pillow image so that its shorter side has ``short_side`` pixels: by area when it shrinks, else bicubic."""
    from PIL import Image

    width, height = image.size
    if min(width, height) == short_side:
        return image
    scale = short_side / min(width, height)
    size = max(short_side, round(width * scale)), max(short_side, round(height * scale))
    return image.resize(size, Image.Resampling.BOX if scale < 1 else Image.Resampling.BICUBIC)
