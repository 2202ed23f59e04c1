"""Augmentation of point clouds: small functions that can be composed, and the published recipe made of them.

Every function takes a :class:`~geossl.data.PointCloud` and a :class:`numpy.random.Generator` and returns a new cloud; the same
generator state gives the same result on every machine. Normals follow the geometry: under a linear map they are multiplied by
its inverse transpose and normalised again.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from geossl.config import require
from geossl.data.sample import PointCloud
from geossl.errors import DataError


@dataclass(kw_only=True)
class AugmentConfig:
    """Random changes made to every training sample; evaluation uses none of them.

    The defaults are those of Point-MAE, Point-M2AE and I2P-MAE: one scale and one shift per axis.
    """

    scale: tuple[float, float] = (2.0 / 3.0, 3.0 / 2.0)
    """Lowest and highest factor, drawn per sample and axis, uniform; (1, 1) switches scaling off."""
    shift: float = 0.2
    """Largest shift along each axis, drawn uniformly from -shift..shift, in units of the normalised cloud."""
    rotation: float = 0.0
    """Largest rotation about ``rotation_axis`` in degrees, drawn uniformly from -rotation..rotation; 180 is any angle."""
    rotation_axis: Literal["x", "y", "z"] = "z"
    """Axis of the rotation; z is up in geossl, y in ShapeNet55, ModelNet40 and ScanObjectNN as published."""
    jitter: float = 0.0
    """Standard deviation of the noise added to each coordinate, in units of the normalised cloud."""
    jitter_clip: float = 0.05
    """Largest noise; larger draws are clipped."""
    dropout: float = 0.0
    """Largest share of points left out: a share drawn uniformly from 0..dropout per sample, then each point by chance."""

    def __post_init__(self) -> None:
        low, high = self.scale
        require(0.0 < low <= high, "scale", "must hold 0 < low <= high", self.scale)
        for name in ("shift", "rotation", "jitter", "jitter_clip"):
            require(getattr(self, name) >= 0.0, name, "must not be negative", getattr(self, name))
        require(0.0 <= self.dropout < 1.0, "dropout", "must lie in [0, 1)", self.dropout)


def normalize(cloud: PointCloud, source: str = "point cloud") -> PointCloud:
    """Subtract the mean and divide by the largest norm, so that the cloud fills the unit sphere.

    Raises:
        DataError: all points coincide, so that there is no size to divide by; the message names ``source``.
    """
    coord = cloud.coord - cloud.coord.mean(axis=0, dtype=np.float64).astype(np.float32)
    size = np.sqrt(np.einsum("nc,nc->n", coord, coord).max())
    if not size > 0.0:
        raise DataError(f"{source}: all {len(cloud)} points coincide, so the cloud cannot be scaled to unit size")
    return replace(cloud, coord=coord / size)


def transform(cloud: PointCloud, matrix: np.ndarray, shift: np.ndarray | None = None) -> PointCloud:
    """Apply the linear map ``matrix [3, 3]`` and then ``shift [3]``; normals by the inverse transpose, renormalised."""
    coord = cloud.coord @ matrix.T.astype(np.float32)
    if shift is not None:
        coord += shift.astype(np.float32)
    normal = cloud.normal
    if normal is not None:
        normal = normal @ np.linalg.inv(matrix).astype(np.float32)
        length = np.sqrt(np.einsum("nc,nc->n", normal, normal))[:, None]
        normal = normal / np.where(length > 0.0, length, 1.0)  # a zero normal stays zero
    return replace(cloud, coord=coord, normal=normal)


def rotation_matrix(axis: Literal["x", "y", "z"], degrees: float) -> np.ndarray:
    """Return the ``[3, 3]`` float64 matrix of a right-handed rotation about a coordinate axis."""
    a, b = {"x": (1, 2), "y": (2, 0), "z": (0, 1)}[axis]
    angle = np.deg2rad(degrees)
    matrix = np.eye(3)
    matrix[a, a] = matrix[b, b] = np.cos(angle)
    matrix[a, b], matrix[b, a] = -np.sin(angle), np.sin(angle)
    return matrix


def scale_shift(
    cloud: PointCloud, rng: np.random.Generator, scale: tuple[float, float] = (2.0 / 3.0, 3.0 / 2.0), shift: float = 0.2
) -> PointCloud:
    """The published augmentation: a factor from U(scale) and a shift from U(-shift, shift), per axis, one draw per cloud."""
    return transform(cloud, np.diag(rng.uniform(*scale, size=3)), rng.uniform(-shift, shift, size=3))


def rotate(cloud: PointCloud, rng: np.random.Generator, degrees: float, axis: Literal["x", "y", "z"] = "z") -> PointCloud:
    """Rotate about a coordinate axis by an angle from U(-degrees, degrees)."""
    return transform(cloud, rotation_matrix(axis, rng.uniform(-degrees, degrees)))


def jitter(cloud: PointCloud, rng: np.random.Generator, std: float, clip: float = 0.05) -> PointCloud:
    """Add normal noise to the positions, clipped at ``clip``."""
    noise = np.clip(std * rng.standard_normal(cloud.coord.shape, dtype=np.float32), -clip, clip)
    return replace(cloud, coord=cloud.coord + noise)


def drop_points(cloud: PointCloud, rng: np.random.Generator, share: float) -> PointCloud:
    """Leave out each point with one probability drawn from U(0, share) per cloud; at least one point is kept."""
    keep = rng.random(len(cloud)) >= rng.uniform(0.0, share)
    keep[rng.integers(len(cloud))] = True
    return cloud[keep]


def augment(cloud: PointCloud, rng: np.random.Generator, config: AugmentConfig) -> PointCloud:
    """Apply what ``config`` switches on, in the order rotation, scale and shift, jitter, dropout."""
    if config.rotation > 0.0:
        cloud = rotate(cloud, rng, config.rotation, config.rotation_axis)
    if config.shift > 0.0 or tuple(config.scale) != (1.0, 1.0):
        cloud = scale_shift(cloud, rng, config.scale, config.shift)
    if config.jitter > 0.0:
        cloud = jitter(cloud, rng, config.jitter, config.jitter_clip)
    if config.dropout > 0.0:
        cloud = drop_points(cloud, rng, config.dropout)
    return cloud
