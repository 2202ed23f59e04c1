"""What a data set of scenes is: posed images with what else is known of the place, whatever it was read from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from geossl.config import require
from geossl.data.files import existing
from geossl.errors import DataError
from geossl.geometry import Cameras, back_project, resize_intrinsics
from geossl.registry import Registry

SCENES: Registry[Any] = Registry("scene data set")
"""All data sets of scenes by name; ``SCENES.config("rooms").build("train")`` makes one."""


@dataclass(frozen=True)
class SceneSample:
    """Posed images of one place, and a cloud and boxes where they are known. Everything is in one frame, metres, z up.

    Args:
        image: ``[V, 3, H, W]`` float32 in 0..1.
        intrinsics: ``[V, 3, 3]`` float32 for these images; the centre of the first pixel is at (0.5, 0.5).
        world_to_cam: ``[V, 4, 4]`` float32, OpenCV axes.
        depth: ``[V, H, W]`` float32 along the optical axis in metres, 0 where unknown; or None.
        valid: ``[V, H, W]`` bool, where depth is sure; or None.
        instance: ``[V, H, W]`` int64, row of the box + 1, 0 for none, -1 where nothing is seen; or None.
        points: ``[N, 3]`` float32, or None.
        colors: ``[N, 3]`` float32 in 0..1, or None.
        point_instance: ``[N]`` int64 like ``instance``, or None.
        boxes: ``[n, 7]`` float32 (centre, full sizes, yaw counter-clockwise), or None.
        labels: ``[n]`` int64 into ``classes``, or None.
        visible: ``[n]`` int64, in how many pixels of all images each object is seen, or None.
        classes: Names of the classes.
        index: Row of the sample in its data set.
        source: What an error message calls it.
    """

    image: Tensor
    intrinsics: Tensor
    world_to_cam: Tensor
    depth: Tensor | None = None
    valid: Tensor | None = None
    instance: Tensor | None = None
    points: Tensor | None = None
    colors: Tensor | None = None
    point_instance: Tensor | None = None
    boxes: Tensor | None = None
    labels: Tensor | None = None
    visible: Tensor | None = None
    classes: tuple[str, ...] = ()
    index: int = 0
    source: str = ""

    @property
    def cameras(self) -> Cameras:
        """The cameras of the images."""
        return Cameras(self.world_to_cam, self.intrinsics, self.image.shape[3], self.image.shape[2])


TENSORS = ("image", "intrinsics", "world_to_cam", "depth", "valid", "instance", "points", "colors", "point_instance", "boxes", "labels")
"""The fields of a :class:`SceneSample` that hold tensors, without ``visible``."""


@dataclass(kw_only=True)
class SceneDataConfig:
    """Fields common to the data sets of scenes."""

    name: str
    """Registered name of the data set."""
    views: int = 4
    """Images of a sample."""
    points: int = 20000
    """Points of a sample's cloud, drawn from all that there are (with repetition if there are fewer); 0 makes none."""
    width: int | None = None
    """Columns to which images are resized; None keeps their size (both or neither of width and height)."""
    height: int | None = None
    """Rows to which images are resized."""

    def __post_init__(self) -> None:
        require(self.views >= 1, "views", "must be at least 1", self.views)
        require(self.points >= 0, "points", "must not be negative", self.points)
        require((self.width is None) == (self.height is None), "width", "must be given together with height", self.width)
        require(self.width is None or min(self.width, self.height or 0) >= 8, "width", "must be at least 8, and height too", self.width)


class SceneDataset:
    """A data set of scenes; sub-classes define :meth:`read`."""

    def __init__(self, config: SceneDataConfig, length: int, classes: tuple[str, ...] = ()) -> None:
        self.config, self.classes = config, classes
        self._length = length

    def __len__(self) -> int:
        """Number of samples."""
        return self._length

    def __getitem__(self, row: int) -> SceneSample:
        """Return sample ``row``; the same every time."""
        if not 0 <= row < len(self):
            raise IndexError(f"{self.config.name}: row {row} is outside 0..{len(self) - 1}")
        return self.read(row)

    def read(self, row: int) -> SceneSample:
        """Return sample ``row``, which is known to exist."""
        raise NotImplementedError


def read_image(path: Path, size: tuple[int, int] | None = None) -> tuple[Tensor, tuple[int, int]]:
    """Read a colour image ``[3, H, W]`` float32 in 0..1, resized to ``size`` (width, height), and its width and height in the file.

    Raises:
        DataError: the file is missing or no image.
    """
    from PIL import Image

    try:
        with Image.open(existing(path, "image")) as image:
            stored = image.size
            colored = image.convert("RGB")
            if size is not None and size != stored:
                colored = colored.resize(size, Image.Resampling.BOX if size[0] < stored[0] else Image.Resampling.BICUBIC)
            pixels = np.asarray(colored, dtype=np.float32) / np.float32(255)
    except (OSError, ValueError, SyntaxError) as error:
        raise DataError(f"{path}: cannot be read as an image; it is damaged, truncated or of another kind ({error})") from error
    return torch.from_numpy(pixels.transpose(2, 0, 1).copy()), stored


def read_depth(path: Path, scale: float = 1000.0, size: tuple[int, int] | None = None) -> tuple[Tensor, tuple[int, int]]:
    """Read a depth image with one 16-bit channel (``scale`` units a metre): ``[H, W]`` float32, 0 where unknown, and its stored size.

    Depth is never mixed: resizing takes the nearest pixel.
    """
    from PIL import Image

    try:
        with Image.open(existing(path, "depth image")) as image:
            stored = image.size
            if image.mode not in ("I;16", "I", "I;16B", "F"):
                raise DataError(f"{path}: a depth image has one channel of 16 bits, this one is {image.mode}")
            resized = image if size is None or size == stored else image.resize(size, Image.Resampling.NEAREST)
            values = np.asarray(resized).astype(np.float32)
    except DataError:
        raise
    except (OSError, ValueError, SyntaxError) as error:
        raise DataError(f"{path}: cannot be read as a depth image; it is damaged, truncated or of another kind ({error})") from error
    values[(values <= 0) | (values >= 65535)] = 0
    return torch.from_numpy(values / np.float32(scale)), stored


def fitted_intrinsics(intrinsics: Tensor, stored: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """Return the intrinsics of images of ``stored`` width and height after resizing to ``size``."""
    return resize_intrinsics(intrinsics, size[0] / stored[0], size[1] / stored[1])


def depth_cloud(
    image: Tensor, depth: Tensor, intrinsics: Tensor, world_to_cam: Tensor, count: int, rng: np.random.Generator, source: str
) -> Any:
    """Return ``coord [count, 3]`` and ``color [count, 3]`` drawn from the pixels with depth of ``V`` views, and their flat pixel rows.

    Raises:
        DataError: no pixel has depth.
    """
    places = back_project(depth, intrinsics, world_to_cam)
    rows = (depth > 0).flatten().nonzero()[:, 0]
    if not len(rows):
        raise DataError(f"{source}: none of its {len(depth)} views has a pixel with depth")
    rows = rows[torch.from_numpy(rng.choice(len(rows), count, replace=len(rows) < count))]
    return places.flatten(0, 2)[rows], image.permute(0, 2, 3, 1).flatten(0, 2)[rows], rows
