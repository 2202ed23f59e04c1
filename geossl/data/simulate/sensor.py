"""What a cheap RGB-D camera makes of a clean picture, and clouds fused from several pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from geossl.config import require
from geossl.data.simulate.rooms import View
from geossl.errors import DataError
from geossl.geometry import PackedPoints


@dataclass(kw_only=True)
class SensorOptions:
    """Faults of the camera; 0 leaves one out."""

    exposure: float = 0.4
    """Largest change of exposure, in stops."""
    white_balance: float = 0.05
    """Standard deviation of the gains of red and blue."""
    rgb_noise: float = 0.012
    """Standard deviation of the noise of a mid-grey pixel (shot noise: it grows with the root of the light)."""
    depth_noise: float = 0.0015
    """Standard deviation of depth at one metre, in metres; it grows with the square of depth."""
    depth_step: float = 0.0012
    """Quantisation of depth at one metre, in metres; it grows with the square of depth."""
    max_depth: float = 5.0
    """Metres beyond which there is no depth."""
    grazing: float = 0.12
    """Surfaces seen under a smaller sine of the angle give no depth."""
    dark: float = 0.04
    """Surfaces darker than this give no depth half of the time."""
    holes: float = 0.01
    """Part of the pixels without depth for no reason."""

    def __post_init__(self) -> None:
        for name in ("exposure", "white_balance", "rgb_noise", "depth_noise", "depth_step", "grazing", "dark"):
            require(getattr(self, name) >= 0, name, "must not be negative", getattr(self, name))
        require(self.max_depth > 0, "max_depth", "must be positive", self.max_depth)
        require(0 <= self.holes < 1, "holes", "must lie in [0, 1)", self.holes)


def sense(view: View, rng: np.random.Generator, options: SensorOptions | None = None) -> View:
    """Return the view as a cheap structured-light camera would give it: depth 0 (and not valid) in holes."""
    options = options or SensorOptions()
    gain = 2.0 ** rng.uniform(-options.exposure, options.exposure)
    balance = np.array([1 + rng.normal(0, options.white_balance), 1.0, 1 + rng.normal(0, options.white_balance)])
    light = view.rgb.numpy() ** 2.2 * gain * balance
    noise = rng.normal(0, options.rgb_noise, light.shape) * np.sqrt(np.maximum(light, 0.01) / 0.2) * 0.45
    rgb = np.clip(light + noise, 0, 1) ** (1 / 2.2)

    depth = view.depth.numpy()
    square = depth * depth
    found = depth + rng.normal(0, 1, depth.shape) * options.depth_noise * square
    step = np.maximum(options.depth_step * square, 1e-9)
    found = np.where(options.depth_step > 0, np.round(found / step) * step, found)
    hole = ~view.valid.numpy() | (depth > options.max_depth) | (rng.random(depth.shape) < options.holes)
    hole |= (view.rgb.numpy().mean(2) < options.dark) & (rng.random(depth.shape) < 0.5)
    hole |= _slant(view) < options.grazing
    found = np.where(hole, 0, np.maximum(found, 0)).astype(np.float32)
    return replace(
        view, rgb=torch.from_numpy(rgb.astype(np.float32)), depth=torch.from_numpy(found), valid=view.valid & torch.from_numpy(found > 0)
    )


def _slant(view: View) -> np.ndarray:
    """Return the sine of the angle between the ray and the surface, ``[H, W]``, from neighbouring depths."""
    from geossl.geometry import back_project

    points = back_project(view.depth, view.camera.intrinsics).numpy()
    right = np.diff(points, axis=1, append=points[:, -1:] * 2 - points[:, -2:-1])
    down = np.diff(points, axis=0, append=points[-1:] * 2 - points[-2:-1])
    normal = np.cross(right, down)
    length = np.linalg.norm(normal, axis=2) * np.linalg.norm(points, axis=2)
    return np.abs((normal * points).sum(2)) / np.maximum(length, 1e-12)


def fuse_views(views: Sequence[View], points: int, rng: np.random.Generator) -> tuple[PackedPoints, Tensor]:
    """Back-project the sure pixels of several views and draw ``points`` of them.

    Args:
        views: Pictures of one room, clean or from :func:`sense`.
        points: How many points; drawn with repetition if there are fewer pixels.
        rng: Draws them.

    Returns:
        One cloud with ``coord [points, 3]`` in the room and ``feats [points, 3]``, its colours in 0..1; and the object of every point,
        ``[points]`` int64, 0 for the room itself.

    Raises:
        DataError: no view has a pixel with depth, or ``points`` is less than 1.
    """
    if points < 1:
        raise DataError(f"fuse_views: points must be at least 1, got {points}")
    if not views:
        raise DataError("fuse_views: got no views; a cloud needs at least one")
    coord = torch.cat([view.points()[view.valid] for view in views])
    color = torch.cat([view.rgb[view.valid] for view in views])
    instance = torch.cat([view.instance[view.valid] for view in views])
    if not len(coord):
        raise DataError(f"fuse_views: none of the {len(views)} views has a pixel with depth")
    rows = torch.from_numpy(rng.choice(len(coord), points, replace=len(coord) < points))
    return PackedPoints(coord[rows], torch.tensor([0, points]), color[rows]), instance[rows]
