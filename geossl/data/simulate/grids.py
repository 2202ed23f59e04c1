"""Radiance and density grids of rooms, in the file layout of NeRF-MAE and NeRF-RPN."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np

from geossl.config import require
from geossl.data.files import atomic_write
from geossl.data.simulate.rooms import Room
from geossl.data.simulate.surfels import discs, f32
from geossl.errors import DataError
from geossl.geometry import quaternion_to_matrix

EMPTY = -10000.0
"""Log-density of a voxel with nothing in it."""
_MARGIN = 0.06


@dataclass(frozen=True)
class RadianceGrid:
    """A regular grid of colour and density; z is up.

    Args:
        rgbsigma: ``[X, Y, Z, 4]`` float32: colour in 0..1 and log-density (or opacity where ``density_type`` is "alpha").
        bbox_min: Position of voxel (0, 0, 0), ``[3]``.
        bbox_max: Position of the last voxel, ``[3]``.
        boxes: ``[n, 7]`` in voxels: centre, sizes, yaw.
        labels: ``[n]`` int64.
        density_type: What the fourth channel is.
    """

    rgbsigma: np.ndarray
    bbox_min: np.ndarray
    bbox_max: np.ndarray
    boxes: np.ndarray
    labels: np.ndarray
    density_type: Literal["log", "alpha"]

    def arrays(self) -> dict[str, Any]:
        """Return what is stored of the grid, by the published names."""
        return {
            "rgbsigma": self.rgbsigma, "resolution": np.array(self.rgbsigma.shape[:3]), "bbox_min": self.bbox_min,
            "bbox_max": self.bbox_max, "scale": f32(1), "offset": np.zeros(3, dtype=np.float32), "from_mitsuba": np.array(False),
            "density_type": np.array(self.density_type),
        }  # fmt: skip

    def save(self, root: Path, scene: str) -> None:
        """Write ``features/<scene>.npz`` and ``obb/<scene>.npy`` under ``root``."""
        arrays = self.arrays()
        atomic_write(root / "features" / f"{scene}.npz", lambda file: np.savez_compressed(file, **arrays))
        atomic_write(root / "obb" / f"{scene}.npy", partial(np.save, arr=self.boxes.astype(np.float32)))


def radiance_grid(room: Room, resolution: int = 160, density_type: Literal["log", "alpha"] = "log") -> RadianceGrid:
    """Sample a room to a grid with cubic voxels, ``resolution`` along the longest axis.

    The surfels of a voxel cover part of it: their area gives its opacity, the mean of their lit colours its colour, which is the same from
    all directions here. ``clip(1 - exp(-exp(s) / 100))`` of the log-density is that opacity again.

    Args:
        room: The room.
        resolution: Voxels along the longest axis, at least 8.
        density_type: "log" as published for Front3D and HM3D, or "alpha" as for Hypersim.
    """
    require(resolution >= 8, "resolution", "must be at least 8", resolution)
    if density_type not in ("log", "alpha"):
        raise DataError(f"radiance_grid: density_type must be 'log' or 'alpha', got {density_type!r}")
    low = np.full(3, -_MARGIN)
    extent = np.array(room.plan.size) + 2 * _MARGIN
    edge = float(extent.max()) / (resolution - 1)
    shape = np.minimum(np.ceil(extent / edge).astype(np.int64) + 1, resolution)
    shape = np.minimum(shape + shape % 2, resolution)  # even, as published

    frame = quaternion_to_matrix(room.quats)
    radii = 1.5 * room.scales[:, :2]
    spread = discs(room.means.numpy(), frame[..., 2].numpy(), frame[..., 0].numpy(), radii.numpy())
    voxel = np.rint((spread - low) / edge).astype(np.int64)
    inside = ((voxel >= 0) & (voxel < shape)).all(1)
    flat = (voxel[:, 0] * shape[1] + voxel[:, 1]) * shape[2] + voxel[:, 2]
    area = (np.pi * radii.prod(1) / 13).numpy()
    weights = np.tile(area, 13)[inside]
    cells = flat[inside]
    colors = np.tile(room.colors.numpy(), (13, 1))[inside]
    total = int(shape.prod())
    covered = np.bincount(cells, weights, total)
    summed = np.stack([np.bincount(cells, weights * colors[:, channel], total) for channel in range(3)], 1)
    mean = summed / np.maximum(covered, 1e-12)[:, None]
    alpha = np.minimum(1 - np.exp(-1.5 * covered / edge**2), 0.999)
    filled = covered > 0.02 * edge**2
    density = np.where(filled, np.log(-100 * np.log1p(-np.where(filled, alpha, 0.5))), EMPTY) if density_type == "log" else alpha * filled
    grid = np.concatenate([mean * filled[:, None], density[:, None]], 1).astype(np.float32).reshape(*shape, 4)
    boxes = room.boxes.numpy().copy()
    boxes[:, :3] = (boxes[:, :3] - low) / edge
    boxes[:, 3:6] /= edge
    return RadianceGrid(
        grid, low.astype(np.float32), (low + edge * (shape - 1)).astype(np.float32), boxes, room.labels.numpy().copy(), density_type
    )
