"""Points of the embedded objects become oriented surfels: flat discs that cover the object without holes."""

from __future__ import annotations

import functools
import hashlib
import inspect
import logging
import re
import shutil
import sys
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch

from geossl import ops
from geossl.data.files import atomic_write, cache_folder, read_npz
from geossl.data.objects import load_objects
from geossl.errors import DataError

log = logging.getLogger(__name__)

FLATNESS = 0.25
"""Standard deviation of a surfel along its normal, as part of the smaller one along its plane."""
_RAYS, _REACH = 20, 0.6  # rays to each side of a surfel, and how far they go as part of the object's size
_CLOSED, _INTERIOR = 0.12, 0.10  # openness under which a side is closed, and both sides are


@dataclass(frozen=True)
class Surfels:
    """Flat discs with a colour; row i of every array is surfel i.

    Args:
        center: ``[n, 3]`` float32, metres.
        normal: ``[n, 3]`` float32, unit, out of the solid it bounds.
        tangent: ``[n, 3]`` float32, unit, along ``sigma[:, 0]``.
        sigma: ``[n, 2]`` float32, standard deviations along the tangent and across.
        color: ``[n, 3]`` float32, reflectance in linear light, or radiance where ``glow``.
        solid: ``[n]`` bool, the back is inside a solid and never seen.
        glow: ``[n]`` bool, shines by itself: its colour is not lit.
        openness: ``[n]`` float32 in 0..1, part of the sky over the front that the object itself leaves free.
    """

    center: np.ndarray
    normal: np.ndarray
    tangent: np.ndarray
    sigma: np.ndarray
    color: np.ndarray
    solid: np.ndarray
    glow: np.ndarray
    openness: np.ndarray

    def __len__(self) -> int:
        """Number of surfels."""
        return len(self.center)

    def __getitem__(self, rows: np.ndarray | slice) -> Surfels:
        """Return the selected surfels."""
        return Surfels(**{f.name: getattr(self, f.name)[rows] for f in fields(self)})

    def moved(self, yaw: float, position: tuple[float, float, float]) -> Surfels:
        """Return the surfels turned by ``yaw`` about z, then shifted."""
        cos, sin = f32(np.cos(yaw)), f32(np.sin(yaw))

        def turn(vectors: np.ndarray) -> np.ndarray:
            x, y, z = vectors.T
            return np.stack([cos * x - sin * y, sin * x + cos * y, z], 1)

        moved = {"center": turn(self.center) + f32(position), "normal": turn(self.normal), "tangent": turn(self.tangent)}
        return replace(self, **moved)

    @classmethod
    def concatenate(cls, parts: list[Surfels]) -> Surfels:
        """Join several sets."""
        return cls(**{f.name: np.concatenate([getattr(part, f.name) for part in parts]) for f in fields(cls)})


def f32(values: Any) -> np.ndarray:
    """Return ``values`` as a float32 array."""
    return np.asarray(values, dtype=np.float32)


def dot(vectors: np.ndarray, direction: np.ndarray) -> np.ndarray:
    """Return ``[n]``, the product of ``vectors [n, 3]`` with one vector: written out, so that threads cannot change a bit."""
    return vectors[:, 0] * direction[0] + vectors[:, 1] * direction[1] + vectors[:, 2] * direction[2]


def linear(srgb: np.ndarray) -> np.ndarray:
    """Turn sRGB values in 0..1 into linear light."""
    srgb = np.asarray(srgb, dtype=np.float32)
    return np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4).astype(np.float32)


def srgb(light: np.ndarray) -> np.ndarray:
    """Turn linear light in 0..1 into sRGB values."""
    light = np.clip(light, 0.0, 1.0)
    return np.where(light <= 0.0031308, light * 12.92, 1.055 * light ** (1 / 2.4) - 0.055).astype(np.float32)


def tangents(normal: np.ndarray) -> np.ndarray:
    """Return ``[n, 3]`` unit vectors at right angles to ``normal [n, 3]``."""
    helper = np.where(np.abs(normal[:, 2:]) < 0.9, f32([[0, 0, 1]]), f32([[1, 0, 0]]))
    tangent = np.cross(helper, normal)
    return (tangent / np.linalg.norm(tangent, axis=1, keepdims=True)).astype(np.float32)


def neighbors(points: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Return distances and rows ``[n, k]`` of the nearest other points (fewer points repeat the last one)."""
    cloud = torch.from_numpy(np.ascontiguousarray(points, dtype=np.float32))[None]
    k_there = min(k, len(points) - 1)
    found = ops.knn(cloud, cloud, k_there, exclude_self=True)
    distance, index = found.distance[0].sqrt().numpy(), found.index[0].numpy()
    pad = ((0, 0), (0, k - k_there))
    return np.pad(distance, pad, mode="edge"), np.pad(index, pad, mode="edge")


class Occupancy:
    """Which cells of a regular grid hold something, and how far rays go through it.

    Args:
        points: ``[n, 3]``, what fills the cells they lie in.
        cell: Edge of a cell in metres.
    """

    def __init__(self, points: np.ndarray, cell: float) -> None:
        self.cell = f32(cell)
        low = points.min(0) if len(points) else np.zeros(3)
        high = points.max(0) if len(points) else np.zeros(3)
        self.origin = (low - 1.5 * cell).astype(np.float32)
        self.shape = np.ceil((high - self.origin) / cell).astype(np.int64) + 2
        self.filled = np.zeros(int(self.shape.prod()), dtype=bool)
        self.filled[self.flat(np.floor((points - self.origin) / self.cell).astype(np.int32))] = True

    def flat(self, cells: np.ndarray) -> np.ndarray:
        """Return the place of cells ``[..., 3]`` in the flat grid; those outside go to its empty rim."""
        x, y, z = (np.clip(cells[..., axis], 0, self.shape[axis] - 1) for axis in range(3))
        return (x * np.int32(self.shape[1]) + y) * np.int32(self.shape[2]) + z

    def free(self, start: np.ndarray, direction: np.ndarray, first: float, last: np.ndarray | float, step: float) -> np.ndarray:
        """Return ``[n]`` bool: from ``start [n, 3]`` along the unit ``direction [n, 3]``, nothing between ``first`` and ``last`` metres."""
        free = np.ones(len(start), dtype=bool)
        place, ray = (f32(start) - self.origin) / self.cell, f32(direction) / self.cell
        # Where the ray is inside the grid: there no sample needs a check of its bounds.
        safe = np.where(np.abs(ray) > 1e-9, ray, f32(1e-9))
        a, b = (f32(1e-3) - place) / safe, (self.shape.astype(np.float32) - f32(1e-3) - place) / safe
        begin = np.maximum(np.minimum(a, b).max(1), f32(first))
        end = np.minimum(np.maximum(a, b).min(1), f32(last))
        alive = np.flatnonzero(begin < end)
        at, end, move = place[alive] + ray[alive] * begin[alive, None], (end - begin)[alive], ray[alive] * f32(step)
        columns, rows = int(self.shape[1]), int(self.shape[2])
        gone = f32(0)
        while len(alive):
            x, y, z = at.astype(np.int32).T
            hit = self.filled[(x * columns + y) * rows + z]
            free[alive[hit]] = False
            gone = gone + f32(step)
            keep = np.flatnonzero(~hit & (end > gone))
            alive, at, move, end = alive[keep], at[keep] + move[keep], move[keep], end[keep]
        return free


def hemisphere(normal: np.ndarray, count: int, phase: np.ndarray) -> np.ndarray:
    """Return ``[n, count, 3]`` directions about ``normal [n, 3]``, as dense as the cosine, turned by ``phase [n]`` radians."""
    number = np.arange(count) + 0.5
    radius, angle = np.sqrt(number / count), np.pi * (1 + 5**0.5) * number + phase[:, None]
    up = np.sqrt(1 - radius**2)
    tangent = tangents(normal)
    across = np.cross(normal, tangent)
    x, y = (radius * np.cos(angle))[..., None], (radius * np.sin(angle))[..., None]
    return (x * tangent[:, None] + y * across[:, None] + up[:, None] * normal[:, None]).astype(np.float32)


def _midpoints(center: np.ndarray, normal: np.ndarray, color: np.ndarray, typical: float) -> tuple[np.ndarray, ...]:
    """Return one round of points halfway between neighbours on the same surface: center, normal, color, row of a parent."""
    distance, index = neighbors(center, 8)
    row = np.repeat(np.arange(len(center)), 8)
    other, gap = index.reshape(-1), distance.reshape(-1)
    difference = center[other] - center[row]
    same = (normal[row] * normal[other]).sum(1)
    off = np.maximum(np.abs((difference * normal[row]).sum(1)), np.abs((difference * normal[other]).sum(1)))
    keep = (row < other) | ~(index[other] == row[:, None]).any(1)  # each pair once
    keep &= (np.abs(same) > 0.77) & (off < 0.3 * gap) & (gap < 1.45 * typical) & (gap > 0.2 * typical)
    row, other, same = row[keep], other[keep], same[keep]
    middle = 0.5 * (center[row] + center[other])
    cells = np.floor(middle / (0.42 * typical)).astype(np.int64)  # thin out midpoints that nearly coincide
    _, first = np.unique(cells @ np.array([73856093, 19349663, 83492791]), return_index=True)
    first.sort()
    row, other, same, middle = row[first], other[first], same[first], middle[first]
    turned = normal[row] + np.sign(same)[:, None] * normal[other]
    turned /= np.maximum(np.linalg.norm(turned, axis=1, keepdims=True), 1e-6)
    # Mixing unlike colours greys textures; mixing like ones smooths the noise of the sampling.
    alike = np.abs(color[row] - color[other]).max(1, keepdims=True) < 0.08
    shade = np.where(alike, 0.5 * (color[row] + color[other]), color[row])
    return middle, turned.astype(np.float32), shade, row


def discs(center: np.ndarray, normal: np.ndarray, tangent: np.ndarray, radii: np.ndarray) -> np.ndarray:
    """Return ``[13 n, 3]`` points spread over flat ellipses of ``radii [n, 2]``: what fills a grid without leaks."""
    across = np.cross(normal, tangent)
    ring = [(0.0, 0.0)] + [(0.5, k) for k in np.arange(4) * np.pi / 2] + [(1.0, k) for k in np.arange(8) * np.pi / 4]
    x = f32([r * np.cos(angle) for r, angle in ring])[:, None] * radii[:, 0]
    y = f32([r * np.sin(angle) for r, angle in ring])[:, None] * radii[:, 1]
    return (center + x[..., None] * tangent + y[..., None] * across).reshape(-1, 3).astype(np.float32)


def _openness(center: np.ndarray, normal: np.ndarray, tangent: np.ndarray, sigma: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return how open the side of the normal and the other side are, ``[n]`` each in 0..1, averaged along the surface."""
    size = float(np.ptp(center, axis=0).max())
    cell = max(1.1 * float(np.median(sigma)), size / 100)
    grid = Occupancy(discs(center, normal, tangent, 1.6 * sigma), cell)
    phase = (np.arange(len(center)) * 2.399963).astype(np.float32)
    sides = []
    for side in (normal, -normal):
        ray = hemisphere(side, _RAYS, phase).reshape(-1, 3)
        start = np.repeat(center + side * f32(1.1 * cell), _RAYS, axis=0)
        sides.append(grid.free(start, ray, 0.7 * cell, _REACH * size, 0.9 * cell).reshape(-1, _RAYS).mean(1))
    _, index = neighbors(center, 12)
    front, back = sides
    for _ in range(4):
        same = (normal[index] * normal[:, None]).sum(2)  # a neighbour that looks the other way swaps its sides
        weight = np.maximum(np.abs(same) - 0.5, 0.0)
        ahead = np.where(same > 0, front[index], back[index])
        behind = np.where(same > 0, back[index], front[index])
        total = 1 + weight.sum(1)
        front, back = (front + (weight * ahead).sum(1)) / total, (back + (weight * behind).sum(1)) / total
    bright = (np.abs((normal[index] * normal[:, None]).sum(2)) > 0.7) * np.maximum(front[index], back[index])
    # Single points tucked into cracks would show as dark spots: lean towards what the open neighbours see.
    lifted = (bright * bright).sum(1) / np.maximum(bright.sum(1), 1e-3)
    return np.where(front >= back, np.maximum(front, 0.8 * lifted * (front > _INTERIOR)), front), np.where(
        back > front, np.maximum(back, 0.8 * lifted * (back > _INTERIOR)), back
    )


def _fit_to_edges(
    center: np.ndarray, normal: np.ndarray, sigma: np.ndarray, points: np.ndarray, directions: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Make discs end where the surface turns away, so that edges are sharp and do not fray: new center, tangent, sigma ``[n, 2]``.

    A neighbour that faces elsewhere bounds the disc by its own plane. On each axis of the disc the bounds on both sides give its new
    middle and its new width; an opaque disc is seen as far as about 1.5 standard deviations. The bounding planes are those of the stored
    ``points`` and their ``directions``: their normals are those of the faces.
    """
    reach = (1.5 * sigma)[:, None].astype(np.float32)
    found = ops.knn(torch.from_numpy(center.astype(np.float32))[None], torch.from_numpy(points)[None], min(28, len(points)))
    index = found.index[0].numpy()
    other = directions[index]
    cosine = (other * normal[:, None]).sum(2)
    lean = other - cosine[..., None] * normal[:, None]  # the neighbour's normal within the plane of the disc
    length = np.maximum(np.linalg.norm(lean, axis=2), 1e-6)
    difference = points[index] - center[:, None]
    signed = (other * difference).sum(2) / length
    toward = lean / length[..., None] * np.sign(signed)[..., None]
    bound = np.where(np.abs(cosine) < 0.6, np.abs(signed), np.inf)
    bound = np.where(np.linalg.norm(difference, axis=2) < 3.2 * reach, bound, np.inf)  # an edge far away bounds nothing here
    nearest = bound.argmin(1)
    rows = np.arange(len(center))

    gap, near = neighbors(center, 16)
    offset = center[near] - center[:, None]
    height = np.abs((offset * normal[:, None]).sum(2))
    level = height < 0.5 * reach
    offset = offset - (offset * normal[:, None]).sum(2, keepdims=True) * normal[:, None]
    mean = (level[..., None] * offset).sum(1) / np.maximum(level.sum(1, keepdims=True), 1)
    # Axes of the disc: across the nearest bound, else away from where the neighbours are.
    lopsided = np.linalg.norm(mean, axis=1) > 0.2 * reach[:, 0]
    tangent = np.where(
        np.isfinite(bound[rows, nearest])[:, None], toward[rows, nearest], np.where(lopsided[:, None], mean, tangents(normal))
    )
    tangent = (tangent / np.maximum(np.linalg.norm(tangent, axis=1, keepdims=True), 1e-6)).astype(np.float32)
    shifted, widths = center.copy(), []
    for axis in (tangent, np.cross(normal, tangent)):
        along, step = (toward * axis[:, None]).sum(2), (offset * axis[:, None]).sum(2)
        ends = []
        for side in (1, -1):
            end = np.clip(np.where(side * along > 0.75, bound, np.inf).min(1), 0.3 * reach[:, 0], reach[:, 0])
            goes_on = (
                (height < 1.5 * reach)
                & (side * step > 0.3 * reach)
                & (side * step > 0.7 * np.linalg.norm(offset, axis=2))
                & (gap < 2.6 * reach)
            )
            ends.append(np.where(goes_on.any(1), end, np.minimum(end, 0.45 * reach[:, 0])))  # the surface ends where no neighbour follows
        widths.append((ends[0] + ends[1]) / 3)
        shifted = shifted + ((ends[0] - ends[1]) / 2)[:, None] * axis
    return shifted.astype(np.float32), tangent, np.stack(widths, 1).astype(np.float32)


def _covered(center: np.ndarray, normal: np.ndarray, reach: np.ndarray, far: float) -> np.ndarray:
    """Return ``[n]`` bool: another layer lies close before the surfel (a blanket over a mattress), so that it is never seen."""
    _, index = neighbors(center, 20)
    difference = center[index] - center[:, None]
    height = (difference * normal[:, None]).sum(2)
    aside = np.linalg.norm(difference - height[..., None] * normal[:, None], axis=2)
    parallel = np.abs((normal[index] * normal[:, None]).sum(2)) > 0.8
    above = (height > np.maximum(0.004, 0.1 * reach)[:, None]) & (height < far) & (aside < 0.8 * reach[:, None])
    return (above & parallel).sum(1) >= 2


def _despot(center: np.ndarray, normal: np.ndarray, color: np.ndarray, reach: np.ndarray) -> np.ndarray:
    """Return colours ``[n, 3]`` without single points of a layer that shines through another: they take the colour all around them."""
    distance, index = neighbors(center, 14)
    difference = center[index] - center[:, None]
    height = np.abs((difference * normal[:, None]).sum(2))
    same = (np.abs((normal[index] * normal[:, None]).sum(2)) > 0.85) & (height < 0.6 * reach[:, None]) & (distance < 3 * reach[:, None])
    around = np.where(same[..., None], color[index], np.nan)
    enough = same.sum(1) >= 6
    around[~enough] = 0
    middle = np.nanmedian(around, axis=1)
    alike = (np.abs(color[index] - middle[:, None]).max(2) < 0.12) & same
    odd = enough & (np.abs(color - middle).max(1) > 0.15) & (alike.sum(1) >= 0.62 * same.sum(1))
    return np.where(odd[:, None], middle, color).astype(np.float32)


def prepare_object(row: int) -> Surfels:
    """Make the surfels of embedded object ``row``, in metres, its base at z = 0 and its middle at x = y = 0."""
    library = load_objects()
    scale = f32(library.scale_m[row])
    center = library.xyz[row].astype(np.float32) * scale
    size = float(np.ptp(center, axis=0).max())
    count = 1024 if size > 0.5 else 640 if size > 0.25 else 320
    center = center[:count]
    normal = library.normal[row, :count].astype(np.float32)
    length = np.linalg.norm(normal, axis=1, keepdims=True)
    normal = np.where(length > 0, normal / np.maximum(length, 1e-6), f32([[0, 0, 1]])).astype(np.float32)
    color = linear(library.rgb[row, :count].astype(np.float32) / 255)
    low, high = library.xyz[row].min(0).astype(np.float32) * scale, library.xyz[row].max(0).astype(np.float32) * scale
    center = center - f32([(low[0] + high[0]) / 2, (low[1] + high[1]) / 2, low[2]])

    leaves = str(library.classes[library.label[row]]) == "plant" if library.label[row] >= 0 else False
    distance, _ = neighbors(center, 5)
    typical = float(np.median(distance[:, 4]))
    sigma = np.clip(0.55 * distance[:, 4], 0.6 * 0.55 * typical, 1.6 * 0.55 * typical)

    # Which side is outside, and what is never seen, is settled for the stored points; what is put between them inherits it.
    placed, tangent, widths = _fit_to_edges(center, normal, sigma, center, normal)
    front, back = _openness(placed, normal, tangent, widths)
    flip = back > front
    normal = np.where(flip[:, None], -normal, normal)
    front, back = np.where(flip, back, front), np.where(flip, front, back)
    if not leaves:
        hidden = (front < _INTERIOR) | _covered(center, normal, np.maximum(1.5 * sigma, 0.01), 0.9 * float(np.median(sigma)))
        if hidden.mean() < 0.8:
            center, normal, color, sigma, front, back = (values[~hidden] for values in (center, normal, color, sigma, front, back))

        color = _despot(center, normal, color, np.maximum(1.5 * sigma, 0.01))
    points, directions = center, normal
    rounds, shrink = (2, (1.0, 0.8)) if typical > 0.09 else (1, (0.95,)) if typical > 0.014 else (0, ())
    for turn in range(rounds):
        middle, turned, shade, parent = _midpoints(center, normal, color, typical if turn == 0 else 0.72 * typical)
        sigma = np.concatenate([sigma, sigma[parent]]) * f32(shrink[turn])
        center, normal, color = np.concatenate([center, middle]), np.concatenate([normal, turned]), np.concatenate([color, shade])
        front, back = np.concatenate([front, front[parent]]), np.concatenate([back, back[parent]])
    placed, tangent, widths = _fit_to_edges(center, normal, sigma, points, directions)
    return Surfels(
        placed, normal.astype(np.float32), tangent, widths, color.astype(np.float32), (back < _CLOSED) & (not leaves),
        np.zeros(len(center), dtype=bool), front.astype(np.float32),
    )  # fmt: skip


@functools.cache
def surfels_version() -> str:
    """Return what the prepared objects depend on: this file and the embedded data, as a hash."""
    library = load_objects()
    digest = hashlib.sha256(inspect.getsource(sys.modules[__name__]).encode())
    for array in (library.xyz, library.normal, library.rgb, library.scale_m):
        digest.update(array.tobytes())
    return digest.hexdigest()[:16]


@functools.lru_cache(maxsize=512)
def object_surfels(row: int) -> Surfels:
    """Return :func:`prepare_object` of ``row``, from memory or disk where it was prepared before. The arrays cannot be written into."""
    path = cache_folder() / f"surfels-{surfels_version()}" / f"{row}.npz"
    names = [f.name for f in fields(Surfels)]
    try:
        surfels = Surfels(**read_npz(path, names))
    except DataError:  # not there yet, or damaged
        surfels = prepare_object(row)
        if not path.parent.exists():  # the first of this version
            for stale in cache_folder().glob("surfels-*"):
                if re.fullmatch(r"surfels-[0-9a-f]{16}", stale.name):
                    shutil.rmtree(stale, ignore_errors=True)
        try:
            atomic_write(path, lambda file: np.savez(file, **{name: getattr(surfels, name) for name in names}))
        except DataError as error:
            log.warning("prepared objects are not kept (%s); set GEOSSL_CACHE to a folder that can be written", error)
    for name in names:
        getattr(surfels, name).flags.writeable = False
    return surfels
