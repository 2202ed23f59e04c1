"""Windows of two images that show the same part of a place: how they are found, listed in CroCo's format, and cut out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from geossl.data.files import existing
from geossl.errors import DataError

Box = tuple[int, int, int, int]
"""Left, right, top and bottom in pixels, right and bottom exclusive: the order of CroCo's crop lists."""


@dataclass(frozen=True)
class CroppedPair:
    """Two images and the windows to cut out of them.

    Args:
        first: File of the first image, relative to some folder.
        second: File of the second.
        rotation: Degrees by which the second is turned counter-clockwise to stand like the first; cut windows are turned by the nearest
            multiple of 90, and not at all up to 60.
        boxes: Windows of the first and second image.
    """

    first: str
    second: str
    rotation: int
    boxes: list[tuple[Box, Box]]


def read_crop_list(path: Path) -> Iterator[CroppedPair]:
    """Read CroCo's crop lists (``crops_release.txt``): ``image1, image2, rotation``, then a line of eight numbers for each window.

    The eight are left, right, top, bottom of the first image's window and of the second's. Lines that begin with ``#`` are left out.

    Raises:
        DataError: the file is missing, or a line holds something else; the message gives its number.
    """
    pair: CroppedPair | None = None
    with existing(path).open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if not line.strip() or line.startswith("#"):
                continue
            words = [word.strip() for word in line.split(",")]
            try:
                if len(words) == 8 and pair is not None:
                    values = [int(word) for word in words]
                    pair.boxes.append((_box(values[:4]), _box(values[4:])))
                elif len(words) == 3:
                    if pair is not None:
                        yield pair
                    pair = CroppedPair(words[0], words[1], int(words[2]), [])
                else:
                    raise ValueError(f"expected 'image1, image2, rotation' or eight numbers, got {line.strip()[:120]!r}")
            except ValueError as error:
                raise DataError(f"{path} line {number}: {error}") from error
    if pair is not None:
        yield pair


def _box(values: list[int]) -> Box:
    left, right, top, bottom = values
    if not (0 <= left < right and 0 <= top < bottom):
        raise ValueError(f"a window must hold 0 <= left < right and 0 <= top < bottom, got {values}")
    return left, right, top, bottom


def is_crop_list(path: Path) -> bool:
    """Whether a text file is a crop list rather than a list of two paths a line: its first line has three entries."""
    with path.open(encoding="utf-8", errors="replace") as file:
        first = next((line for line in file if line.strip() and not line.startswith("#")), "")
    return first.count(",") == 2


def write_crop_list(pairs: Iterable[CroppedPair]) -> Iterator[str]:
    """Yield the lines of a crop list."""
    for pair in pairs:
        yield f"{pair.first}, {pair.second}, {pair.rotation}\n"
        yield from (f"{', '.join(map(str, (*one, *other)))}\n" for one, other in pair.boxes)


def quarter_turns(rotation: int) -> int:
    """Return by how many quarter turns (0..3, counter-clockwise) a window is turned: none up to 60 degrees, else the nearest."""
    rotation = (rotation + 180) % 360 - 180
    return 0 if abs(rotation) <= 60 else round(rotation / 90) % 4


def cut(image: Tensor, box: Box, size: int, turns: int = 0, source: str = "image") -> Tensor:
    """Cut a window out of ``image [3, H, W]`` uint8 and bring it to ``[3, size, size]``: Lanczos where it has over four times as many
    pixels, else bicubic; then turn it counter-clockwise.

    Raises:
        DataError: the window reaches beyond the image.
    """
    from PIL import Image

    left, right, top, bottom = box
    if right > image.shape[2] or bottom > image.shape[1]:
        shape = f"{image.shape[2]} x {image.shape[1]}"
        raise DataError(f"{source}: the window {list(box)} (left, right, top, bottom) reaches beyond its {shape} pixels")
    pixels = Image.fromarray(image[:, top:bottom, left:right].permute(1, 2, 0).contiguous().numpy())
    large = (right - left) * (bottom - top) > 4 * size * size
    resized = pixels.resize((size, size), Image.Resampling.LANCZOS if large else Image.Resampling.BICUBIC)
    return torch.from_numpy(np.rot90(np.asarray(resized), turns).copy()).permute(2, 0, 1)


def corresponding_boxes(
    matches: tuple[Tensor, Tensor, Tensor], first: tuple[int, int], second: tuple[int, int], size: int, most: int, least_overlap: float
) -> list[tuple[Box, Box, float]]:
    """Find square windows of two images that show the same, on a grid in the first.

    Windows are as large as the first image allows, then half as large and so on, not below ``size``. Each one's counterpart is centred
    where the second image shows its places, larger or smaller as they are spread there.

    Args:
        matches: As :meth:`geossl.data.pair_mining.DepthGeometry.matches` gives them.
        first: Width and height of the first image.
        second: Those of the second.
        size: Side to which windows will be brought.
        most: No more windows than this; those that overlap a better one by half are left out.
        least_overlap: Least part of the places of the first window that must lie in the second.

    Returns:
        Windows of both, and the part of the first one's places that the second shows; best first.
    """
    here, there, everywhere = (values.numpy() for values in matches)
    here, everywhere, there = here * np.array(first), everywhere * np.array(first), there * np.array(second)
    found = []
    side = min(first)
    while side >= min(size, min(first)):
        for left, top in _grid(first, side):
            inside, all_inside = (_within(places, left, top, side) for places in (here, everywhere))
            if inside.sum() < 8:
                continue
            spread = np.sqrt(np.maximum(there[inside].std(axis=0), 1) / np.maximum(here[inside].std(axis=0), 1)).prod()
            other = round(min(max(side * float(np.clip(spread, 0.5, 2.0)), 8), min(second)))
            corner = np.clip(np.median(there[inside], axis=0) - other / 2, 0, np.array(second) - other).round().astype(int)
            seen = (_within(there[inside], corner[0], corner[1], other)).sum() / max(1, all_inside.sum())
            if seen >= least_overlap:
                boxes = _square(left, top, side), _square(int(corner[0]), int(corner[1]), other)
                found.append((*boxes, float(seen)))
        side //= 2
    found.sort(key=lambda entry: -entry[2])
    kept: list[tuple[Box, Box, float]] = []
    for entry in found:
        if len(kept) < most and all(_box_iou(entry[0], better[0]) < 0.5 for better in kept):
            kept.append(entry)
    return kept


def _grid(size: tuple[int, int], side: int) -> list[tuple[int, int]]:
    """Corners of windows half a side apart that cover an image, the outermost at its borders."""
    lines = [np.linspace(0, total - side, 1 + -(-2 * (total - side) // side)).round().astype(int).tolist() for total in size]
    return [(left, top) for top in lines[1] for left in lines[0]]


def _within(places: np.ndarray, left: float, top: float, side: int) -> Any:
    return (places[:, 0] >= left) & (places[:, 0] < left + side) & (places[:, 1] >= top) & (places[:, 1] < top + side)


def _square(left: int, top: int, side: int) -> Box:
    return left, left + side, top, top + side


def _box_iou(a: Box, b: Box) -> float:
    width, height = min(a[1], b[1]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[2], b[2])
    common = max(width, 0) * max(height, 0)
    return common / ((a[1] - a[0]) * (a[3] - a[2]) + (b[1] - b[0]) * (b[3] - b[2]) - common)


def relative_roll(first: Tensor, second: Tensor) -> int:
    """Return by how many degrees the second camera's picture must be turned counter-clockwise to stand like the first's.

    Args:
        first: ``world_to_cam [4, 4]``.
        second: The same.
    """
    turn = (second[:3, :3] @ first[:3, :3].mT).double()  # first camera's directions as the second sees them
    # x right and y down: the first's x axis, seen in the second, points down where that camera was turned counter-clockwise.
    return round(float(torch.rad2deg(torch.atan2(turn[1, 0] - turn[0, 1], turn[0, 0] + turn[1, 1]))))
