"""Light of a room, baked once per surfel: sky through windows, lamps, a sun patch, ambient occlusion and one bounce."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from geossl.data.simulate.room_plan import Plan
from geossl.data.simulate.surfels import Occupancy, Surfels, discs, dot, f32, hemisphere, neighbors, srgb

_CELL = 0.06  # of the grid of furniture that light rays cross
_AMBIENT_RAYS, _AMBIENT_REACH = 16, 0.55
_WINDOW_SAMPLES = 5


@dataclass(frozen=True)
class Lights:
    """What shines in a room; colours are linear."""

    ambient: np.ndarray
    sky: np.ndarray
    lamp: np.ndarray
    lamp_places: np.ndarray
    small: np.ndarray
    small_places: np.ndarray
    sun: np.ndarray
    sun_direction: np.ndarray
    exposure: float


def draw_lights(plan: Plan, rng: np.random.Generator) -> Lights:
    """Draw the lights of a room: by day with or without sun, or in the evening by lamps."""
    warm = f32([1.0, rng.uniform(0.84, 0.96), rng.uniform(0.62, 0.88)])
    cool = f32([rng.uniform(0.86, 1.0), rng.uniform(0.94, 1.0), 1.05])
    evening = rng.random() < 0.2
    w, d, h = plan.size
    lamps = [(i.x, i.y, i.z - 0.02) for i in plan.items if i.role == "ceiling lamp"] or [(w / 2, d / 2, h - 0.1)]
    small = [(i.x, i.y, i.top - 0.1) for i in plan.items if i.role in ("table lamp", "floor lamp", "wall lamp")]
    lit = evening or rng.random() < 0.45
    level = f32(rng.uniform(0.85, 1.15))
    angle, height = rng.uniform(-1.0, 1.0), rng.uniform(0.45, 1.0)
    sun = np.zeros(3, dtype=np.float32)
    direction = f32([0, 0, 1])
    if plan.windows and not evening and rng.random() < 0.55:
        inward = plan.walls[plan.windows[0].wall].inward
        turned = (inward[0] * np.cos(angle) - inward[1] * np.sin(angle), inward[0] * np.sin(angle) + inward[1] * np.cos(angle))
        direction = f32([-turned[0], -turned[1], height])
        direction /= np.linalg.norm(direction)
        sun = f32(rng.uniform(1.3, 2.1)) * f32([1.0, 0.93, 0.8])
    return Lights(
        ambient=level * f32(0.19 if evening else 0.3) * (0.5 * warm + 0.5 * cool),
        sky=level * f32(0.05 if evening else rng.uniform(1.6, 2.4)) * cool,
        lamp=level * f32(1.0 if evening else rng.uniform(0.25, 0.6)) * warm,
        lamp_places=f32(lamps),
        small=f32(0.16 if lit else 0.0) * warm * f32([1, 0.95, 0.85]),
        small_places=f32(small).reshape(-1, 3),
        sun=sun, sun_direction=direction, exposure=float(rng.uniform(1.05, 1.3)),
    )  # fmt: skip


def bake(plan: Plan, shell: Surfels, objects: Surfels, instance: np.ndarray, lights: Lights, rng: np.random.Generator) -> np.ndarray:
    """Return the sRGB colours ``[shell + objects, 3]`` as lit.

    Light that changes slowly is found on a thinned set of surfels and carried over to the others; the sun's edge is found for every one.

    Args:
        plan: The room.
        shell: Its surfels.
        objects: The surfels of the things in it, placed.
        instance: Object of each of these, ``[n]``.
        lights: What shines.
        rng: Source of the ray directions' jitter.
    """
    grid = (
        Occupancy(discs(objects.center, objects.normal, objects.tangent, 1.5 * objects.sigma), _CELL)
        if len(objects)
        else Occupancy(np.zeros((0, 3)), _CELL)
    )
    phase = float(rng.uniform(0, 6))
    shell_light = _shell_light(plan, shell, lights, grid, phase)
    object_light = _object_light(plan, objects, instance, lights, grid, phase)
    everything = Surfels.concatenate([shell, objects])
    light = np.concatenate([shell_light, object_light]) + _sun(plan, everything, lights, grid)
    shine = np.where(everything.glow[:, None], f32(1.25) * everything.color, everything.color * light * f32(lights.exposure))
    return srgb(_shoulder(shine))


def _shoulder(light: np.ndarray) -> np.ndarray:
    """Compress highlights: the identity near 0, 1 far up."""
    return 1.12 * light / (1 + 0.12 * light + 0.28 * light * light) ** 0.75


def _shell_light(plan: Plan, shell: Surfels, lights: Lights, grid: Occupancy, phase: float) -> np.ndarray:
    """Light on planes from a coarse set of their own places, by interpolation between the nearest of equal direction."""
    light = np.zeros((len(shell), 3), dtype=np.float32)
    code = np.rint(shell.normal).astype(np.int64) @ np.array([9, 3, 1])  # planes face along axes; curtains lean a little
    for value in np.unique(code):
        rows = np.flatnonzero(code == value)
        cell = 0.10 if abs(shell.normal[rows[0], 2]) > 0.5 and shell.center[rows[0], 2] < 0.5 else 0.16
        coarse = np.floor(shell.center[rows] / cell).astype(np.int64) @ np.array([1000003, 1009, 1])
        _, first = np.unique(coarse, return_index=True)
        probe = rows[first]
        found = irradiance(plan, shell.center[probe], shell.normal[probe], np.ones(len(probe), dtype=bool), lights, grid, phase)
        light[rows] = _spread(shell.center[probe], found, shell.center[rows], 6, 1.1 * cell)
    return light


def _spread(places: np.ndarray, values: np.ndarray, targets: np.ndarray, k: int, width: float) -> np.ndarray:
    """Carry ``values [n, c]`` over to ``targets [m, 3]`` by a Gaussian-weighted mean over the nearest ``k`` places."""
    import torch

    from geossl import ops

    found = ops.knn(torch.from_numpy(targets)[None], torch.from_numpy(np.ascontiguousarray(places))[None], min(k, len(places)))
    weight = np.exp(-found.distance[0].numpy() / (2 * width**2)) + f32(1e-6)
    return ((weight[..., None] * values[found.index[0].numpy()]).sum(1) / weight.sum(1, keepdims=True)).astype(np.float32)


def _object_light(plan: Plan, objects: Surfels, instance: np.ndarray, lights: Lights, grid: Occupancy, phase: float) -> np.ndarray:
    """Light on objects: found on a thinned set, smoothed over the surface, times the object's own openness."""
    if not len(objects):
        return np.zeros((0, 3), dtype=np.float32)
    light = np.zeros((len(objects), 3), dtype=np.float32)
    starts = np.flatnonzero(np.diff(instance, prepend=-1))
    probes = np.concatenate([np.arange(a, min(b, a + 700)) for a, b in zip(starts, [*starts[1:], len(objects)], strict=True)])
    found = irradiance(plan, objects.center[probes], objects.normal[probes], objects.solid[probes], lights, grid, phase, own=True)
    for a, b in zip(starts, [*starts[1:], len(objects)], strict=True):
        mine = (probes >= a) & (probes < b)
        chosen, value = probes[mine], found[mine]
        place, normal = objects.center[chosen], objects.normal[chosen]
        # What is tucked away is seldom seen, and its darkness must not blot its open neighbours.
        trust = np.square(np.maximum(objects.openness[chosen], 0.05))
        _, near = neighbors(place, 14)
        same = np.abs((normal[near] * normal[:, None]).sum(2))
        weight = trust[near] * np.maximum(same - 0.7, 0) * np.where(objects.solid[chosen][near] == objects.solid[chosen][:, None], 1, 0.3)
        mine_weight = 0.3 * trust[:, None]
        for _ in range(2):
            value = (mine_weight * value + (weight[..., None] * value[near]).sum(1)) / (mine_weight + weight.sum(1, keepdims=True))
        # Carry over among surfels that face the same way: the normal counts as a fourth to sixth coordinate.
        scale = f32(0.35 * max(0.2, float(np.ptp(place, axis=0).max())))
        light[a:b] = _carry(place, normal, trust, value, objects.center[a:b], objects.normal[a:b], scale)
    own = np.maximum(0.3, 0.35 + 0.65 * objects.openness)[:, None].astype(np.float32)
    return light * own


def _carry(
    places: np.ndarray,
    normals: np.ndarray,
    trust: np.ndarray,
    values: np.ndarray,
    targets: np.ndarray,
    directions: np.ndarray,
    scale: np.ndarray,
) -> np.ndarray:
    """Carry values over to the nearest places that face the same way."""
    import torch

    from geossl import ops

    k = min(8, len(places))
    found = ops.knn(torch.from_numpy(targets)[None], torch.from_numpy(np.ascontiguousarray(places))[None], k)
    index, distance = found.index[0].numpy(), found.distance[0].numpy()
    same = np.maximum((normals[index] * directions[:, None]).sum(2), 0.02) ** 3 * trust[index]
    weight = same * np.exp(-distance / (2 * (0.12 * scale) ** 2 + 1e-9)) + 1e-6 * same
    return ((weight[..., None] * values[index]).sum(1) / weight.sum(1, keepdims=True)).astype(np.float32)


def irradiance(
    plan: Plan, place: np.ndarray, normal: np.ndarray, solid: np.ndarray, lights: Lights, grid: Occupancy, phase: float, own: bool = False
) -> np.ndarray:
    """Return the light ``[n, 3]`` that falls on surfels, without the sun; open sheets are lit from both sides."""
    n = len(place)
    w, d, h = plan.size
    first = 1.7 * _CELL if own else 0.5 * _CELL
    start = place + normal * f32(0.9 * _CELL)
    turn = phase + np.arange(n, dtype=np.float32) * f32(2.399963)
    rays = hemisphere(normal, _AMBIENT_RAYS, turn)
    free = grid.free(np.repeat(start, _AMBIENT_RAYS, 0), rays.reshape(-1, 3), first, _AMBIENT_REACH, 0.75 * _CELL).reshape(n, _AMBIENT_RAYS)
    # Corners of the room: how near the walls, floor and ceiling are along the rays.
    up = rays[..., 2]
    x, y, z = place.T
    edges = np.stack([x, w - x, y, d - y, z, h - z], 1)
    edges = np.where(edges < 0.02, 9.0, edges)  # the plane it lies in does not shade it
    corner = np.prod(1 - 0.28 * np.exp(-edges / 0.25), axis=1)
    # One bounce: from below comes the floor's light, from above the ceiling's.
    bounce = np.where(up[..., None] > 0, f32([1.06, 1.04, 1.0]), f32([0.78, 0.68, 0.58]))
    light = lights.ambient * (free[..., None] * bounce).mean(1) * corner[:, None]

    for window in plan.windows:
        wall = plan.walls[window.wall]
        inward = f32([*wall.inward, 0])
        area = (window.s1 - window.s0) * (window.z1 - window.z0)
        for number in range(_WINDOW_SAMPLES):
            fraction = ((0.5 + number) / _WINDOW_SAMPLES, (0.5 + number * 0.618034) % 1)
            s, t = window.s0 + fraction[0] * (window.s1 - window.s0), window.z0 + fraction[1] * (window.z1 - window.z0)
            source = f32([*wall.point(s, 0.0), t])
            light += lights.sky * (area / _WINDOW_SAMPLES) * _point(place, start, normal, solid, source, grid, first, facing=inward)
    for number in range(3 * len(lights.lamp_places)):
        angle = 2.0 * number + phase
        source = lights.lamp_places[number // 3] + f32([0.22 * np.cos(angle), 0.22 * np.sin(angle), -0.03])
        share = lights.lamp * f32(2.2 / (3 * len(lights.lamp_places)))
        light += share * _point(place, start, normal, solid, source, grid, first, soften=1.2)
    for source in lights.small_places:
        light += lights.small * _point(place, start, normal, solid, source, None, first, soften=0.12)
    return light.astype(np.float32)


def _point(
    place: np.ndarray, start: np.ndarray, normal: np.ndarray, solid: np.ndarray, source: np.ndarray, grid: Occupancy | None, first: float,
    facing: np.ndarray | None = None, soften: float = 0.5,
) -> np.ndarray:  # fmt: skip
    """Return the light ``[n, 1]`` of a point source of strength 1: cosine over squared distance, where nothing is in between."""
    to = source - place
    squared = (to * to).sum(1) + f32(soften)
    distance = np.linalg.norm(to, axis=1) + f32(1e-6)
    ray = to / distance[:, None]
    cosine = (normal * ray).sum(1)
    cosine = np.where(solid, np.maximum(cosine, 0), np.abs(cosine))
    if facing is not None:
        cosine = cosine * np.maximum((ray * -facing).sum(1), 0) * f32(0.6)
    seen = np.zeros(len(place), dtype=np.float32)
    lit = np.flatnonzero(cosine > 0.01)
    if grid is None:
        seen[lit] = 1
    elif len(lit):
        side = np.sign((normal[lit] * ray[lit]).sum(1))[:, None]
        begin = place[lit] + (start[lit] - place[lit]) * side
        seen[lit] = grid.free(begin, ray[lit], first, distance[lit] - f32(0.25), 0.9 * _CELL)
    return (cosine * seen / squared)[:, None]


def _sun(plan: Plan, surfels: Surfels, lights: Lights, grid: Occupancy) -> np.ndarray:
    """Return the light ``[n, 3]`` of the sun through the windows, with sharp edges."""
    light = np.zeros((len(surfels), 3), dtype=np.float32)
    if not lights.sun.any():
        return light
    ray = lights.sun_direction
    cosine = dot(surfels.normal, ray)
    cosine = np.where(surfels.solid, np.maximum(cosine, 0), np.abs(cosine))
    for window in plan.windows:
        wall = plan.walls[window.wall]
        inward, along = f32([*wall.inward, 0]), f32([*wall.along, 0])
        toward = float(ray @ inward)
        if toward > -0.05:
            continue  # the sun stands behind this wall's inner side
        origin = f32([*wall.start, 0])
        out = dot(surfels.center - origin, inward)
        reach = out / -toward
        at = surfels.center + reach[:, None] * ray
        s, z = dot(at - origin, along), at[:, 2]
        margin = 0.03
        through = (s > window.s0 + margin) & (s < window.s1 - margin) & (z > window.z0 + margin) & (z < window.z1 - margin)
        rows = np.flatnonzero(through & (out > 0.005) & (cosine > 0.02))
        if not len(rows):
            continue
        side = np.sign(dot(surfels.normal[rows], ray))[:, None]
        start = surfels.center[rows] + surfels.normal[rows] * side * f32(0.9 * _CELL)
        free = grid.free(start, np.tile(ray, (len(rows), 1)), 1.5 * _CELL, np.maximum(reach[rows] - 0.1, 0.0), 0.7 * _CELL)
        light[rows[free]] += lights.sun * cosine[rows[free]][:, None]
    return light
