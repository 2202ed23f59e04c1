"""The clouds all suites measure on, the same ones on every machine.

Searches and samplers are ranked differently by different clouds, so operators are measured on four :data:`KINDS`; training steps and data
loading take :func:`surfaces`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

TRACKS, STEPS = 24, 400  # curves of a track-like cloud, and the straight pieces of each

OFF_GRID = 1.0003  # widens a radius taken from a distance: else, on a grid, many points lie on the sphere, where rounding decides


def surfaces(batch: int, points: int, seed: int = 0) -> Tensor:
    """Draw ``[batch, points, 3]`` float32 on bumpy spheres within the unit ball, in random order."""
    generator = torch.Generator().manual_seed(seed)
    direction = torch.nn.functional.normalize(torch.randn(batch, points, 3, generator=generator), dim=2)
    wave = 4 * torch.randn(batch, 3, 3, generator=generator)
    stretch = 0.4 + 0.6 * torch.rand(batch, 1, 3, generator=generator)
    return direction * stretch * (0.8 + 0.2 * torch.sin(direction @ wave).mean(2, keepdim=True))


def clouds(kind: str, batch: int, points: int, seed: int = 0) -> Tensor:
    """Draw ``[batch, points, 3]`` float32 of one of :data:`KINDS` in the unit cube, in random order; every cloud has its own seed."""
    drawn = []
    for row in range(batch):
        generator = np.random.default_rng([seed, row, points, list(KINDS).index(kind)])
        cloud = KINDS[kind](points, generator)
        drawn.append(np.clip(cloud, 0, 1 - 1e-6).astype(np.float32))
    return torch.from_numpy(np.stack(drawn))


def _uniform(points: int, generator: np.random.Generator) -> np.ndarray:
    return generator.random((points, 3))


def _mesh(points: int, generator: np.random.Generator) -> np.ndarray:
    """Sample the surface of a furnished room by area."""
    triangles, share = _room()
    chosen = triangles[np.minimum(np.searchsorted(share, generator.random(points)), len(triangles) - 1)]
    u, v = generator.random((2, points, 1))
    root = np.sqrt(u)
    return chosen[:, 0] * (1 - root) + chosen[:, 1] * root * (1 - v) + chosen[:, 2] * root * v


@functools.cache
def _room() -> tuple[np.ndarray, np.ndarray]:
    """Return triangles ``[T, 3, 3]`` and their running share of the area: boxes in a corner of walls, cylinders and a sphere."""
    import trimesh

    generator = np.random.default_rng(7)
    parts = [_box((0.5, 0.5, 0.01), (1.0, 1.0, 0.02)), _box((0.5, 0.01, 0.35), (1.0, 0.02, 0.7)), _box((0.01, 0.5, 0.35), (0.02, 1.0, 0.7))]
    for _ in range(12):  # furniture that stands on the floor, turned about the vertical
        size, place, angle = generator.uniform(0.05, 0.25, 3), generator.uniform(0.15, 0.85, 2), generator.uniform(0, np.pi)
        parts.append(_box((*place, 0.02 + size[2] / 2), size, angle))
    for _ in range(8):
        radius, height, place = generator.uniform(0.01, 0.04), generator.uniform(0.1, 0.5), generator.uniform(0.1, 0.9, 2)
        pillar = trimesh.creation.cylinder(radius=radius, height=height, sections=24)
        parts.append(pillar.apply_translation((*place, 0.02 + height / 2)))
    parts.append(trimesh.creation.icosphere(subdivisions=3, radius=0.12).apply_translation((0.5, 0.5, 0.8)))
    triangles = np.concatenate([np.asarray(part.triangles) for part in parts])
    edges = triangles[:, 1:] - triangles[:, :1]
    area = np.linalg.norm(np.cross(edges[:, 0], edges[:, 1]), axis=1)
    return triangles, np.cumsum(area) / area.sum()


def _box(center: tuple[float, ...], size: tuple[float, ...] | np.ndarray, angle: float = 0.0) -> Any:
    import trimesh

    turned = trimesh.transformations.rotation_matrix(angle, (0, 0, 1))
    return trimesh.creation.box(extents=size, transform=turned).apply_translation(center)


def _tracks(points: int, generator: np.random.Generator) -> np.ndarray:
    """Sample random-walk curves, blurred, with two dense blobs at the beginning of two of them: what particles leave in a detector."""
    direction = generator.normal(size=(TRACKS, 1, 3))
    direction /= np.linalg.norm(direction, axis=2, keepdims=True)
    step = direction + np.cumsum(generator.normal(scale=0.02, size=(TRACKS, STEPS, 3)), axis=1)
    step *= generator.uniform(0.2, 1.2, (TRACKS, 1, 1)) / STEPS / np.linalg.norm(step, axis=2, keepdims=True)
    curves = generator.random((TRACKS, 1, 3)) + np.cumsum(step, axis=1)
    in_blobs = points // 20
    along = points - in_blobs
    curve, place = generator.integers(0, TRACKS, along), generator.random(along) * (STEPS - 1.001)
    piece = place.astype(int)
    part = (place - piece)[:, None]
    on_curves = curves[curve, piece] * (1 - part) + curves[curve, piece + 1] * part + generator.normal(scale=8e-4, size=(along, 3))
    blobs = curves[generator.integers(0, 2, in_blobs), 0] + generator.normal(scale=6e-3, size=(in_blobs, 3))
    cloud = generator.permutation(np.concatenate([on_curves, blobs]))
    low, high = cloud.min(0), cloud.max(0)
    return (cloud - low) / (high - low).max()


def _duplicates(points: int, generator: np.random.Generator) -> np.ndarray:
    """Half of the points are exact copies of the others, which lie on a grid of 1/256."""
    first = np.floor(256 * generator.random((points - points // 2, 3))) / 256
    copies = first[generator.integers(0, len(first), points // 2)]
    return generator.permutation(np.concatenate([first, copies]))


KINDS: dict[str, Callable[[int, np.random.Generator], np.ndarray]] = {
    "uniform": _uniform,
    "mesh": _mesh,
    "tracks": _tracks,
    "duplicates": _duplicates,
}
"""Uniform in the cube, on surfaces, along curves, and half duplicates: name -> ``draw(points, generator)``."""
