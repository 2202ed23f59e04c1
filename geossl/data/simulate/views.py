"""Where to stand in a room: single views, walks at eye height, and pairs of views with what they share."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from geossl.config import require
from geossl.data.simulate.room_plan import Plan, RoomError
from geossl.data.simulate.rooms import Room, View
from geossl.geometry import Cameras, intrinsics_from_fov, invert_pose, look_at, pixel_centers, project

EYE_HEIGHT = (1.35, 1.65)
_CELL = 0.1


@dataclass(kw_only=True)
class ViewOptions:
    """Size and lens of the pictures."""

    width: int = 224
    """Columns of an image."""
    height: int = 224
    """Rows of an image."""
    fov: float = 72.0
    """Horizontal field of view in degrees."""

    def __post_init__(self) -> None:
        require(self.width >= 8, "width", "must be at least 8", self.width)
        require(self.height >= 8, "height", "must be at least 8", self.height)
        require(20 <= self.fov <= 130, "fov", "must lie in [20, 130] degrees", self.fov)

    def cameras(self, world_to_cam: Tensor) -> Cameras:
        """Return cameras at the poses ``[..., 4, 4]``."""
        intrinsics = intrinsics_from_fov(self.fov, self.width, self.height)
        return Cameras(world_to_cam, intrinsics.expand(*world_to_cam.shape[:-2], 3, 3), self.width, self.height)


@dataclass(frozen=True)
class ImagePair:
    """Two views of one room and what is known of how they correspond.

    Args:
        first: The first view.
        second: The second view.
        first_to_second: ``[4, 4]``, first camera's frame to the second's.
        flow: ``[H, W, 2]``, where each pixel of the first view is in the second, minus where it is (x, y).
        covisible: ``[H, W]`` bool, the second view shows that place too.
        flow_back: The same from the second view to the first.
        covisible_back: The same.
        overlap: Part of the pixels that the other view shows too: the smaller of both directions.
    """

    first: View
    second: View
    first_to_second: Tensor
    flow: Tensor
    covisible: Tensor
    flow_back: Tensor
    covisible_back: Tensor
    overlap: float


def optical_flow(first: View, second: View, absolute: float = 0.03, relative: float = 0.01) -> tuple[Tensor, Tensor]:
    """Return the flow ``[H, W, 2]`` from one view to another by exact depth, and where both show the same place.

    A pixel is covisible where its depth is sure, it falls into the other image and the depth found there is the one expected, within
    ``absolute`` metres plus ``relative`` of it.
    """
    camera = second.camera
    pixels, depth = project(first.points().flatten(0, 1), camera.world_to_cam, camera.intrinsics)
    height, width = first.depth.shape
    flow = pixels.view(height, width, 2) - pixel_centers(height, width)
    # In front of the camera and inside; anything else may be huge or not a number.
    inside = (depth > 0.05) & (pixels >= 0).all(1) & (pixels[:, 0] < camera.width) & (pixels[:, 1] < camera.height)
    place = torch.where(inside[:, None], pixels, 0).long()
    row = place[:, 1] * camera.width + place[:, 0]
    found, sure = second.depth.flatten()[row], second.valid.flatten()[row]
    same = (found - depth).abs() < absolute + relative * depth
    covisible = first.valid & (inside & same & sure).view(height, width)
    return torch.where((depth > 0.05).view(height, width, 1), flow, 0.0), covisible


def make_pair(first: View, second: View) -> ImagePair:
    """Work out how two views of a room correspond."""
    flow, covisible = optical_flow(first, second)
    back, covisible_back = optical_flow(second, first)
    overlap = min(float(covisible.float().mean()), float(covisible_back.float().mean()))
    relative = second.camera.world_to_cam @ invert_pose(first.camera.world_to_cam)
    return ImagePair(first, second, relative, flow, covisible, back, covisible_back, overlap)


def clearance(plan: Plan, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Return how far places ``[n]`` are from what reaches to eye height: furniture taller than 0.9 m, and the walls."""
    w, d, _ = plan.size
    free = np.minimum(np.minimum(x, w - x), np.minimum(y, d - y))
    if plan.notch is not None:
        x0, y0, x1, y1 = plan.notch
        free = np.minimum(free, np.maximum(np.maximum(x0 - x, x - x1), np.maximum(y0 - y, y - y1)))
    for item in plan.items:
        if item.top > 0.9 and item.z < 1.9:
            hx, hy = item.half
            free = np.minimum(free, np.maximum(np.abs(x - item.x) - hx, np.abs(y - item.y) - hy))
    return free


def _focus(plan: Plan) -> np.ndarray:
    """Return the middle of the furniture, ``[2]``."""
    weight = np.array([item.half[0] * item.half[1] for item in plan.items if item.z < 1.2] or [1.0])
    place = np.array([(item.x, item.y) for item in plan.items if item.z < 1.2] or [(plan.size[0] / 2, plan.size[1] / 2)])
    return (weight[:, None] * place).sum(0) / weight.sum()


def _standpoints(plan: Plan, rng: np.random.Generator, count: int) -> np.ndarray:
    """Return places ``[n, 2]`` with room for a camera, those with the widest views first."""
    w, d, _ = plan.size
    for need in (0.45, 0.3, 0.15, 0.05):
        x, y = rng.uniform(0.1, w - 0.1, 8 * count), rng.uniform(0.1, d - 0.1, 8 * count)
        good = clearance(plan, x, y) > min(need, 0.2 * min(w, d))
        for item in plan.items:  # not over a bed or table either
            if item.top > 0.3 and item.z < 1.2:
                hx, hy = item.half
                good &= np.hypot(x - item.x, y - item.y) > min(0.55, need) + 0.4 * min(hx, hy)
        places = np.stack([x, y], 1)[good][:count]
        if len(places) >= min(8, count):
            focus = _focus(plan)
            return places[np.argsort(-np.hypot(places[:, 0] - focus[0], places[:, 1] - focus[1]), kind="stable")]
    raise RoomError(f"room: a {plan.kind} of {plan.size} leaves no place for a camera; build it with fewer objects")


def _faults(view: View) -> float:
    """Return how bad a picture is, 0 for a good one: one thing fills it, or things stand close before the lens."""
    share = float(torch.bincount(view.instance[view.instance > 0].flatten(), minlength=1).max()) / view.instance.numel()
    depth = torch.where(view.depth > 0, view.depth, 0.0)  # nothing seen counts as close
    close, median = float((depth < 1.0).float().mean()), float(depth.median())
    return max(share - 0.3, 0.0) + max(close - 0.12, 0.0) + max(1.4 - median, 0.0)


def sample_view(room: Room, rng: np.random.Generator, options: ViewOptions | None = None) -> View:
    """Take a picture from a random good place at eye height, looking at the furniture."""
    options = options or ViewOptions()
    places = _standpoints(room.plan, rng, 60)
    focus = _focus(room.plan)
    small = (max(1, options.width // 4), max(1, options.height // 4))  # enough to tell a bad picture
    best, least = None, math.inf
    for attempt in range(8):
        good = places[: max(1, len(places) // (3 if attempt < 4 else 2))]
        eye = np.array([*good[int(rng.integers(len(good)))], rng.uniform(*EYE_HEIGHT)])
        target = np.array([*(focus + rng.normal(0, 0.35, 2)), rng.uniform(0.6, 1.0)])
        if np.hypot(*(target - eye)[:2]) < 0.5:
            target[:2] = eye[:2] + (focus - eye[:2]) + 0.5
        pose = look_at(torch.tensor(eye, dtype=torch.float32), torch.tensor(target, dtype=torch.float32))
        camera = options.cameras(pose)
        faults = _faults(room.render(camera.resized(*small)))
        if faults < least:
            best, least = camera, faults
        if faults == 0:
            break
    assert best is not None
    return room.render(best)


def sample_views(room: Room, count: int, rng: np.random.Generator, options: ViewOptions | None = None) -> list[View]:
    """Take ``count`` pictures by :func:`sample_view`."""
    return [sample_view(room, rng, options) for _ in range(count)]


def sample_pair(
    room: Room, rng: np.random.Generator, options: ViewOptions | None = None, overlap: tuple[float, float] = (0.4, 0.9)
) -> ImagePair:
    """Take two pictures, 0.2 to 0.8 m and up to 25 degrees apart, whose overlap lies in the range given (or comes closest, of 12)."""
    best: ImagePair | None = None
    miss = math.inf
    options = options or ViewOptions()
    for attempt in range(12):
        if attempt % 4 == 0:
            first = sample_view(room, rng, options)
        eye = first.camera.centers.numpy()
        angle, distance = rng.uniform(-math.pi, math.pi), rng.uniform(0.2, 0.8)
        moved = eye + np.array([math.cos(angle) * distance, math.sin(angle) * distance, rng.uniform(-0.15, 0.15)])
        if clearance(room.plan, moved[:1], moved[1:2])[0] < 0.15:
            continue
        forward = first.camera.world_to_cam[2, :3].numpy()
        yaw = math.radians(rng.uniform(-25, 25))
        turned = np.array(
            [
                forward[0] * math.cos(yaw) - forward[1] * math.sin(yaw), forward[0] * math.sin(yaw) + forward[1] * math.cos(yaw),
                forward[2] + rng.uniform(-0.08, 0.08),
            ]
        )  # fmt: skip
        pose = look_at(torch.tensor(moved, dtype=torch.float32), torch.tensor(moved + turned, dtype=torch.float32))
        pair = make_pair(first, room.render(options.cameras(pose)))
        off = max(overlap[0] - pair.overlap, pair.overlap - overlap[1], 0.0)
        if off < miss:
            best, miss = pair, off
        if off == 0:
            return pair
    if best is None:
        raise RoomError(
            f"room: no second view found its place in a {room.plan.kind} of {room.plan.size} (seed {room.seed}, room {room.number})"
        )
    return best


def camera_path(room: Room, frames: int, rng: np.random.Generator, options: ViewOptions | None = None) -> Cameras:
    """Return ``frames`` cameras along a smooth walk at eye height through free space, looking around at the furniture.

    Raises:
        RoomError: nothing is free at eye height.
    """
    require(frames >= 2, "frames", "must be at least 2", frames)
    options = options or ViewOptions()
    plan = room.plan
    w, d, _ = plan.size
    xs, ys = np.arange(_CELL / 2, w, _CELL), np.arange(_CELL / 2, d, _CELL)
    grid_x, grid_y = np.meshgrid(xs, ys, indexing="ij")
    room_around = clearance(plan, grid_x.ravel(), grid_y.ravel()).reshape(grid_x.shape)
    need = 0.35 if (room_around > 0.35).sum() > 30 else 0.15
    free = room_around > need
    if free.sum() < 2:
        raise RoomError(f"room: a {plan.kind} of {plan.size} has no free way for a camera; build it with fewer objects")
    cells = np.argwhere(free)
    start = cells[int(rng.integers(len(cells)))]
    reach = _flood(free, start)
    cells = np.argwhere(reach >= 0)
    # A walk through a few places, each the farthest of some random ones from those before.
    stops = [start]
    for _ in range(3):
        choice = cells[rng.integers(len(cells), size=12)]
        stops.append(choice[np.argmax(np.min([np.abs(choice - stop).sum(1) for stop in stops], axis=0))])
    way = [np.asarray(start)]
    for a, b in pairwise(stops):
        way += _walk(_flood(free, b), a)[1:]
    line = np.stack(way).astype(np.float64) * _CELL + _CELL / 2
    line = _resample(line, 6 * frames)
    for _ in range(max(4, len(line) // 8)):
        line[1:-1] = 0.25 * line[:-2] + 0.5 * line[1:-1] + 0.25 * line[2:]
    eyes = _resample(line, frames)
    phase = np.linspace(0, 1, frames)
    height = 1.5 + 0.04 * np.sin(2 * np.pi * (2 * phase + rng.uniform()))
    focus = _focus(plan) + 0.8 * np.stack([np.cos(2 * np.pi * (phase + rng.uniform())), np.sin(2 * np.pi * (phase + rng.uniform()))], 1)
    offset = focus - eyes
    length = np.maximum(np.linalg.norm(offset, axis=1, keepdims=True), 1e-6)
    ahead = np.gradient(eyes, axis=0)
    ahead /= np.maximum(np.linalg.norm(ahead, axis=1, keepdims=True), 1e-6)
    near = np.clip((0.9 - length) / 0.9, 0, 1)  # close to the middle of things, look ahead
    direction = (1 - near) * offset / length + near * ahead + 1e-4
    yaw = np.unwrap(np.arctan2(direction[:, 1], direction[:, 0]))
    for _ in range(frames):
        yaw[1:-1] = 0.25 * yaw[:-2] + 0.5 * yaw[1:-1] + 0.25 * yaw[2:]
    direction = np.stack([np.cos(yaw), np.sin(yaw)], 1)
    eye = torch.tensor(np.column_stack([eyes, height]), dtype=torch.float32)
    target = torch.tensor(np.column_stack([eyes + 2 * direction, height - 0.55]), dtype=torch.float32)
    return options.cameras(look_at(eye, target))


def _flood(free: np.ndarray, start: np.ndarray) -> np.ndarray:
    """Return the number of steps from ``start`` to every free cell, -1 where there is no way."""
    steps = np.full(free.shape, -1, dtype=np.int64)
    steps[tuple(start)] = 0
    queue = deque([(int(start[0]), int(start[1]))])
    while queue:
        i, j = queue.popleft()
        for a, b in ((i + 1, j), (i - 1, j), (i, j + 1), (i, j - 1)):
            if 0 <= a < free.shape[0] and 0 <= b < free.shape[1] and free[a, b] and steps[a, b] < 0:
                steps[a, b] = steps[i, j] + 1
                queue.append((a, b))
    return steps


def _walk(steps: np.ndarray, start: np.ndarray) -> list[np.ndarray]:
    """Return the cells from ``start`` downhill to where ``steps`` is 0."""
    way, here = [np.asarray(start)], (int(start[0]), int(start[1]))
    while steps[here] > 0:
        i, j = here
        options = [
            (a, b) for a, b in ((i + 1, j), (i, j + 1), (i - 1, j), (i, j - 1)) if 0 <= a < steps.shape[0] and 0 <= b < steps.shape[1]
        ]
        here = next(cell for cell in options if steps[cell] == steps[i, j] - 1)
        way.append(np.array(here))
    return way


def _resample(line: np.ndarray, count: int) -> np.ndarray:
    """Return ``[count, 2]`` places at equal distances along a line ``[n, 2]``."""
    length = np.concatenate([[0.0], np.cumsum(np.linalg.norm(np.diff(line, axis=0), axis=1))])
    at = np.linspace(0, length[-1], count)
    return np.stack([np.interp(at, length, line[:, axis]) for axis in range(2)], 1)
