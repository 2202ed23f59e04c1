"""What stands still in a room: floor, walls, ceiling, windows, doors, rugs, pictures and curtains, as textured surfels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from geossl.data.simulate.room_plan import Opening, Plan, Rug, Wall
from geossl.data.simulate.surfels import Surfels, dot, f32, linear

OVERLAP = 0.66
"""Standard deviation of a surfel of a plane as part of the spacing: at 0.5 the weave shows, beyond 0.75 textures only blur."""
Shade = Callable[[np.ndarray, np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Palette:
    """Colours of a room (sRGB in 0..1), drawn once."""

    wall: np.ndarray
    accent: np.ndarray
    accent_wall: int
    stripes: float
    trim: np.ndarray
    ceiling: np.ndarray
    fabric: np.ndarray


_WALLS = ["#e9e4d8", "#dcdcd6", "#cfd8d3", "#e6d9c6", "#d4dce4", "#e8e8e4", "#dfd2c4", "#d9e0cf", "#f0e6d2", "#c9cfd6", "#e3cfc4"]
_ACCENTS = [
    "#6d8f7b",
    "#8a6f86",
    "#5f7896",
    "#a8735a",
    "#4f6b6b",
    "#b59a5b",
    "#7d3f46",
    "#46566e",
    "#8c8f6a",
    "#c08b7b",
    "#39506b",
    "#5a5f52",
]
_HOUSES = ["#c9b8a0", "#b98d74", "#d9d2c4", "#a9a39a", "#c4a88a", "#9c7463", "#e0d8c8"]
_FABRICS = ["#b9a28a", "#8fa3ad", "#a65f4e", "#d9cfbd", "#5f7050", "#6f5a7d", "#c9b458", "#4d5b73"]
_WOODS = [
    ("#8a5a33", 0.16),
    ("#b98a56", 0.12),
    ("#5d3a22", 0.18),
    ("#c9a77a", 0.10),
    ("#7a4a2c", 0.16),
    ("#a8794a", 0.14),
    ("#9a8a78", 0.10),
]


def _rgb(text: str) -> np.ndarray:
    return np.array([int(text[i : i + 2], 16) / 255 for i in (1, 3, 5)], dtype=np.float32)


def _choice(rng: np.random.Generator, values: list[str]) -> np.ndarray:
    return _rgb(values[int(rng.integers(len(values)))])


def draw_palette(rng: np.random.Generator, plan: Plan) -> Palette:
    """Draw the colours of a room."""
    wall = np.clip(_choice(rng, _WALLS) * rng.uniform(0.88, 1.03), 0, 1).astype(np.float32)
    longest = int(np.argmax([w.length * rng.uniform(0.7, 1.3) for w in plan.walls]))
    accent_wall = longest if rng.random() < 0.7 else -1
    trim = _rgb("#f2f0ea") if rng.random() < 0.75 else _rgb(_WOODS[int(rng.integers(len(_WOODS)))][0])
    stripes = float(rng.uniform(0.12, 0.3)) if rng.random() < 0.3 else 0.0
    return Palette(
        wall,
        _choice(rng, _ACCENTS),
        accent_wall,
        stripes,
        trim,
        _rgb("#f4f3ef") * f32(rng.uniform(0.93, 1.0)),
        _choice(rng, _FABRICS),
    )


def noise(rng: np.random.Generator, cell: float, octaves: int = 3) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """Return a smooth random function of two coordinates in -1..1 (value noise; ``cell`` metres between random values)."""
    table = rng.uniform(-1, 1, (64, 64)).astype(np.float32)

    def value(u: np.ndarray, v: np.ndarray) -> np.ndarray:
        total, scale, weight = np.zeros(np.broadcast(u, v).shape, dtype=np.float32), 1 / cell, 0.5
        for octave in range(octaves):
            x, y = u * scale + 17.3 * octave, v * scale + 5.1 * octave
            i, j = np.floor(x).astype(np.int64), np.floor(y).astype(np.int64)
            fx, fy = (x - i).astype(np.float32), (y - j).astype(np.float32)
            fx, fy = fx * fx * (3 - 2 * fx), fy * fy * (3 - 2 * fy)
            corner = [table[(i + a) % 64, (j + b) % 64] for a in (0, 1) for b in (0, 1)]
            total += weight * ((corner[0] * (1 - fy) + corner[1] * fy) * (1 - fx) + (corner[2] * (1 - fy) + corner[3] * fy) * fx)
            scale, weight = 2 * scale, 0.5 * weight
        return total

    return value


def plane(
    origin: np.ndarray, u: np.ndarray, v: np.ndarray, size: tuple[float, float], step: tuple[float, float], shade: Shade,
    glow: bool = False, keep: Callable[[np.ndarray, np.ndarray], np.ndarray] | None = None, extend: float = 0.0,
) -> Surfels:  # fmt: skip
    """Cover a rectangle with a regular grid of surfels.

    Args:
        origin: Corner, ``[3]``.
        u: Unit direction of the first side; ``u x v`` is the visible side.
        v: Unit direction of the second side.
        size: Lengths of the sides.
        step: Spacing along the sides.
        shade: Function of the two coordinates ``[n]`` that returns sRGB colours ``[n, 3]``.
        glow: The surfels shine by themselves.
        keep: Function of the coordinates: which surfels there are.
        extend: Go on this far beyond the rectangle, so that the edge is covered.
    """
    counts = [max(1, round((length + 2 * extend) / s)) for length, s in zip(size, step, strict=True)]
    spacing = [(length + 2 * extend) / count for length, count in zip(size, counts, strict=True)]
    a = (np.arange(counts[0], dtype=np.float32) + 0.5) * spacing[0] - extend
    b = (np.arange(counts[1], dtype=np.float32) + 0.5) * spacing[1] - extend
    s, t = (grid.reshape(-1).astype(np.float32) for grid in np.meshgrid(a, b, indexing="ij"))
    if keep is not None:
        rows = keep(s, t)
        s, t = s[rows], t[rows]
    u, v = f32(u), f32(v)
    count = len(s)
    color = np.broadcast_to(np.clip(shade(s, t), 0, 1), (count, 3))
    return Surfels(
        (f32(origin) + s[:, None] * u + t[:, None] * v).astype(np.float32),
        np.tile(np.cross(u, v).astype(np.float32), (count, 1)),
        np.tile(u, (count, 1)),
        np.tile(f32(spacing) * f32(OVERLAP), (count, 1)),
        linear(color),
        np.ones(count, dtype=bool),
        np.full(count, glow),
        np.ones(count, dtype=np.float32),
    )


def make_shell(plan: Plan, rng: np.random.Generator, detail: float = 1.0) -> Surfels:
    """Return the surfels of everything that is not an object; ``detail`` 2 halves every spacing (four times the surfels)."""
    palette = draw_palette(rng, plan)
    parts = [_floor(plan, rng, detail), _ceiling(plan, palette, detail)]
    for number, wall in enumerate(plan.walls):
        parts += _wall(plan, number, wall, palette, rng, detail)
    parts += [_rug(rug, rng, detail) for rug in plan.rugs]
    for opening in plan.windows:
        parts += _window(plan, opening, palette, rng, detail)
    for opening in plan.doors:
        parts += _door(plan.walls[opening.wall], opening, palette, rng, detail)
    for opening in plan.pictures:
        parts += _picture(plan.walls[opening.wall], opening, rng, detail)
    return Surfels.concatenate(parts)


def _on_floor(plan: Plan, margin: float) -> Callable[[np.ndarray, np.ndarray], np.ndarray] | None:
    if plan.notch is None:
        return None
    x0, y0, x1, y1 = plan.notch
    return lambda x, y: ~((x > x0 + margin) & (x < x1 - margin) & (y > y0 + margin) & (y < y1 - margin))


def _floor(plan: Plan, rng: np.random.Generator, detail: float) -> Surfels:
    w, d, _ = plan.size
    wet = plan.kind in ("bathroom", "kitchen")
    kind = "tiles" if rng.random() < (0.85 if wet else 0.1) else "carpet" if rng.random() < 0.18 else "planks"
    grain = noise(rng, 0.35)
    if kind == "carpet":
        base, fine = _choice(rng, [*_FABRICS, "#9a948c", "#77736d"]), noise(rng, 0.07, 2)
        step = (0.045 / detail, 0.045 / detail)

        def shade(x: np.ndarray, y: np.ndarray) -> np.ndarray:
            return base * (1 + 0.05 * grain(x, y) + 0.1 * fine(x, y))[:, None]

    elif kind == "tiles":
        edge = float(rng.choice([0.25, 0.33, 0.5]))
        one = _choice(rng, ["#e4e0d6", "#cfc8bc", "#b9aa98", "#d8dcdc", "#a3a6a6"])
        two = one * f32(rng.uniform(0.35, 0.75)) if rng.random() < 0.45 else one
        tone = rng.uniform(-0.05, 0.05, (64, 64)).astype(np.float32)
        step = (0.028 / detail, 0.028 / detail)

        def shade(x: np.ndarray, y: np.ndarray) -> np.ndarray:
            i, j = np.floor(x / edge).astype(np.int64), np.floor(y / edge).astype(np.int64)
            joint = np.minimum(np.minimum(x / edge - i, i + 1 - x / edge), np.minimum(y / edge - j, j + 1 - y / edge)) * edge < 0.009
            color = np.where(((i + j) % 2 == 0)[:, None], one, two) * (1 + tone[i % 64, j % 64] + 0.03 * grain(x, y))[:, None]
            return np.where(joint[:, None], 0.55 * one, color)

    else:
        name, spread = _WOODS[int(rng.integers(len(_WOODS)))]
        base, wide, long = _rgb(name), float(rng.uniform(0.09, 0.2)), float(rng.uniform(0.9, 1.8))
        along_y = d > w
        tone = rng.uniform(-1, 1, (64, 64)).astype(np.float32)
        shift = rng.uniform(0, long, 64).astype(np.float32)
        fiber = noise(rng, 1.0, 3)
        step = (0.018 / detail, 0.055 / detail) if along_y else (0.055 / detail, 0.018 / detail)

        def shade(x: np.ndarray, y: np.ndarray) -> np.ndarray:
            across, along = (x, y) if along_y else (y, x)
            row = np.floor(across / wide).astype(np.int64)
            at = (along + shift[row % 64]) / long
            board = np.floor(at).astype(np.int64)
            off = across / wide - row
            gap = (np.minimum(off, 1 - off) * wide < 0.006) | (np.minimum(at - board, board + 1 - at) * long < 0.02)
            streak = fiber(across * 22 + 3.1 * row, along * 1.1 + 7.7 * board)
            shade_ = 1 + spread * tone[row % 64, board % 64] + 0.22 * spread / 0.14 * streak * 0.6
            color = base * shade_[:, None] * np.where(tone[board % 64, row % 64] > 0, 1, f32([1.02, 0.99, 0.95]).reshape(1, 3).T).T
            return np.where(gap[:, None], 0.45 * base, color)

    return plane(np.zeros(3), f32([1, 0, 0]), f32([0, 1, 0]), (w, d), step, shade, keep=_on_floor(plan, 0.05), extend=0.05)


def _ceiling(plan: Plan, palette: Palette, detail: float) -> Surfels:
    w, d, h = plan.size
    keep = _on_floor(plan, 0.12)
    flipped = None if keep is None else (lambda y, x: keep(x, y))
    step = (0.13 / detail, 0.13 / detail)
    return plane(
        np.array([0, 0, h]), f32([0, 1, 0]), f32([1, 0, 0]), (d, w), step, lambda y, x: np.tile(palette.ceiling, (len(x), 1)),
        keep=flipped, extend=0.13,
    )  # fmt: skip


def _axes(wall: Wall) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return directions along the wall, up, and into the room; a plane along (u, v) = (-along, up)... faces the room."""
    return f32([*wall.along, 0]), f32([0, 0, 1]), f32([*wall.inward, 0])


def _panel(
    wall: Wall, s: tuple[float, float], z: tuple[float, float], out: float, step: float | tuple[float, float], shade: Shade, **more: object
) -> Surfels:
    """Cover a rectangle parallel to a wall, ``out`` metres before it; shade gets metres from (s0, z0)."""
    along, up, _ = _axes(wall)
    x, y = wall.point(s[0], out)
    steps = step if isinstance(step, tuple) else (step, step)
    # Along x up points against the room's side for a counter-clockwise outline: cross(along, up) = -(inward); so go up first.
    return plane(np.array([x, y, z[0]]), up, along, (z[1] - z[0], s[1] - s[0]), steps[::-1], lambda t, q: shade(q, t), **more)  # type: ignore[arg-type]


def _plain(color: np.ndarray) -> Shade:
    return lambda s, z: np.broadcast_to(color, (len(s), 3))


def _wall(plan: Plan, number: int, wall: Wall, palette: Palette, rng: np.random.Generator, detail: float) -> list[Surfels]:
    height = plan.size[2]
    base = palette.accent if number == palette.accent_wall else palette.wall
    stripes = palette.stripes if number == palette.accent_wall else 0.0
    soft = noise(rng, 0.8)
    tiled = plan.kind == "bathroom"
    holes = [o for o in plan.windows if o.wall == number]
    tile = _rgb("#e8ecec") if rng.random() < 0.6 else palette.accent * f32(0.4) + f32(0.55)

    def shade(s: np.ndarray, z: np.ndarray) -> np.ndarray:
        color = base * (1 + 0.03 * soft(s, z))[:, None]
        if stripes:
            color = color * np.where(np.floor(s / stripes) % 2 == 0, 1.0, 0.86)[:, None].astype(np.float32)
        if tiled:
            joint = (np.minimum(s % 0.2, 0.2 - s % 0.2) < 0.008) | (np.minimum(z % 0.2, 0.2 - z % 0.2) < 0.008)
            color = np.where((z < 1.9)[:, None], np.where(joint[:, None], 0.86 * tile, tile), color)
        return color

    def keep(z: np.ndarray, s: np.ndarray) -> np.ndarray:
        free = np.ones(len(s), dtype=bool)
        for hole in holes:
            free &= ~((s > hole.s0) & (s < hole.s1) & (z > hole.z0) & (z < hole.z1))
        return free

    step = 0.03 / detail if tiled else (0.042 / detail if stripes else 0.062 / detail)
    spacing = (step, step if tiled or not stripes else 0.09 / detail)
    parts = [_panel(wall, (0.0, wall.length), (0.0, height), 0.0, spacing, shade, keep=keep, extend=0.05)]
    doors = [o for o in plan.doors if o.wall == number]
    spans = [(0.0, wall.length)]
    for door in doors:
        spans = [part for a, z in spans for part in ((a, door.s0 - 0.06), (door.s1 + 0.06, z)) if part[1] - part[0] > 0.03]
    spans = spans if not tiled else []
    for a, z in spans:
        parts.append(_panel(wall, (a, z), (0.0, 0.09), 0.012, (0.045 / detail, 0.022 / detail), _plain(palette.trim)))
    return parts


def _frame(wall: Wall, o: Opening, width: float, out: float, color: np.ndarray, step: float, sides: str = "lrtb") -> list[Surfels]:
    """Return four bars around a rectangle on a wall."""
    rails = {
        "l": ((o.s0 - width, o.s0), (o.z0 - (width if "b" in sides else 0), o.z1 + width)),
        "r": ((o.s1, o.s1 + width), (o.z0 - (width if "b" in sides else 0), o.z1 + width)),
        "t": ((o.s0, o.s1), (o.z1, o.z1 + width)),
        "b": ((o.s0, o.s1), (o.z0 - width, o.z0)),
    }
    across = max(1, round(width / step))
    fine = width / across
    return [
        _panel(wall, *rails[side], out, (fine if side in "lr" else 2 * step, 2 * step if side in "lr" else fine), _plain(color))
        for side in sides
    ]


def _window(plan: Plan, o: Opening, palette: Palette, rng: np.random.Generator, detail: float) -> list[Surfels]:
    """A window: view outside, reveal, frame with a cross, sill, and curtains."""
    wall = plan.walls[o.wall]
    along, up, inward = _axes(wall)
    deep = 0.1
    white = _rgb("#f4f4f0")
    frame = Opening(o.wall, o.s0 + 0.045, o.s1 - 0.045, o.z0 + 0.045, o.z1 - 0.045)
    parts = [_panel(wall, (o.s0, o.s1), (o.z0, o.z1), -deep, 0.03 / detail, _view(rng, o), glow=True)]
    parts += _frame(wall, frame, 0.05, -deep + 0.02, white, 0.022 / detail)
    panes = max(1, round((o.s1 - o.s0) / 0.8))
    for number in range(1, panes):
        s = o.s0 + number * (o.s1 - o.s0) / panes
        parts.append(_panel(wall, (s - 0.03, s + 0.03), (o.z0, o.z1), -deep + 0.02, (0.03 / detail, 0.05 / detail), _plain(white)))
    if o.z1 - o.z0 > 1.0 and rng.random() < 0.6:
        z = o.z0 + 0.68 * (o.z1 - o.z0)
        parts.append(_panel(wall, (o.s0, o.s1), (z - 0.02, z + 0.02), -deep + 0.02, (0.05 / detail, 0.02 / detail), _plain(white)))
    reveal, step = palette.wall * f32(1.02), (0.035 / detail, 0.06 / detail)
    for s, u in ((o.s0, up), (o.s1, -up)):
        x, y = wall.point(s, -deep)
        z = o.z0 if u[2] > 0 else o.z1
        # cross(u, inward) must point into the opening
        parts.append(
            _facing(plane, np.array([x, y, z]), u, inward, (o.z1 - o.z0, deep + 0.01), step[::-1], reveal, along if s == o.s0 else -along)
        )
    x, y = wall.point(o.s0, -deep)
    parts.append(_facing(plane, np.array([x, y, o.z1]), along, inward, (o.s1 - o.s0, deep + 0.01), step[::-1], reveal, -up))
    x, y = wall.point(o.s0 - 0.04, -deep)
    parts.append(
        _facing(plane, np.array([x, y, o.z0]), along, inward, (o.s1 - o.s0 + 0.08, deep + 0.09), (0.05 / detail, 0.032 / detail), white, up)
    )
    parts.append(_panel(wall, (o.s0 - 0.04, o.s1 + 0.04), (o.z0 - 0.03, o.z0), 0.09, (0.05 / detail, 0.015), _plain(white * f32(0.96))))
    if plan.kind not in ("bathroom", "kitchen") and rng.random() < 0.65:
        color = palette.fabric if rng.random() < 0.7 else white
        bottom = 0.06 if rng.random() < 0.6 else o.z0 - 0.12
        wide = float(rng.uniform(0.25, 0.4))
        for s0 in (o.s0 - wide + 0.08, o.s1 - 0.08):
            low, high = max(0.02, s0), min(wall.length - 0.02, s0 + wide)
            if high - low > 0.1:
                parts.append(_curtain(wall, low, high, bottom, o.z1 + 0.14, color, float(rng.uniform(0, 6)), detail))
        along_rod = (max(0.0, o.s0 - wide), min(wall.length, o.s1 + wide))
        parts.append(_panel(wall, along_rod, (o.z1 + 0.14, o.z1 + 0.17), 0.1, (0.05, 0.015), _plain(_rgb("#4a4038"))))
    return parts


def _facing(
    make: Callable[..., Surfels], origin: np.ndarray, u: np.ndarray, v: np.ndarray, size: tuple[float, float], step: tuple[float, float],
    color: np.ndarray, normal: np.ndarray,
) -> Surfels:  # fmt: skip
    """Return a plain rectangle whose visible side is that of ``normal``, whichever way its sides run."""
    if float(np.cross(u, v) @ normal) > 0:
        return make(origin, u, v, size, step, _plain(color))
    return make(origin, v, u, size[::-1], step[::-1], _plain(color))


def _curtain(wall: Wall, s0: float, s1: float, z0: float, z1: float, color: np.ndarray, phase: float, detail: float) -> Surfels:
    """Cloth in folds: a rectangle whose distance from the wall goes up and down like a sine."""
    fold = 0.11
    flat = _panel(wall, (s0, s1), (z0, z1), 0.07, (0.014 / detail, 0.06 / detail), _plain(color))
    along, _, inward = _axes(wall)
    s = dot(flat.center - f32([*wall.point(0.0), 0]), along)
    angle = 2 * np.pi * s / fold + phase
    center = flat.center + (0.028 * np.sin(angle))[:, None].astype(np.float32) * inward
    slope = (0.028 * 2 * np.pi / fold * np.cos(angle))[:, None].astype(np.float32)
    normal = inward - slope * along
    normal /= np.linalg.norm(normal, axis=1, keepdims=True)
    sigma = flat.sigma * np.sqrt(1 + slope**2) ** f32([0, 1])  # the second axis runs along the wall
    return Surfels(
        center, normal, flat.tangent, sigma.astype(np.float32), flat.color, np.zeros(len(s), dtype=bool), flat.glow, flat.openness
    )


def _view(rng: np.random.Generator, o: Opening) -> Shade:
    """What is seen through a window: sky with clouds over trees, hills or houses."""
    horizon, rough, cloud = float(rng.uniform(0.3, 0.5)), noise(rng, 0.28), noise(rng, 0.5, 4)
    low = _choice(rng, ["#7d9a52", "#5f8046", "#93a868", "#6b7f5a"])
    kind = rng.random()
    edge, tall = float(rng.uniform(0.18, 0.35)), rng.uniform(0, 1, 64).astype(np.float32)
    walls = np.stack([_choice(rng, _HOUSES) for _ in range(64)])
    height = o.z1 - o.z0

    def shade(s: np.ndarray, z: np.ndarray) -> np.ndarray:
        t = z / height
        sky = np.stack([0.55 + 0.3 * (1 - t), 0.74 + 0.18 * (1 - t), 0.97 + 0 * t], 1)
        white = np.clip(cloud(s, 2 * z) * 2.2, 0, 1)[:, None]
        sky = sky * (1 - 0.8 * white) + 0.8 * white
        hill = horizon + 0.1 * rough(s, np.zeros_like(s))
        land = low * (0.75 + 0.35 * rough(3 * s, 3 * z))[:, None] * (0.75 + 0.5 * t)[:, None]
        color = np.where((t < hill)[:, None], land, sky)
        if kind < 0.35:
            house = np.floor(s / edge).astype(np.int64) % 64
            wallcolor = walls[house]
            windows = ((s / edge % 0.5 > 0.15) & (s / edge % 0.5 < 0.35) & (z % 0.22 > 0.06) & (z % 0.22 < 0.16))[:, None]
            color = np.where((t < horizon + 0.25 * tall[house])[:, None], np.where(windows, 0.45 * wallcolor, wallcolor), color)
        return np.clip(1.02 * color, 0, 1)

    return shade


def _door(wall: Wall, o: Opening, palette: Palette, rng: np.random.Generator, detail: float) -> list[Surfels]:
    """A closed door: leaf with four panels, frame and handle."""
    leaf = palette.trim * f32(0.97) if rng.random() < 0.6 else _rgb(_WOODS[int(rng.integers(len(_WOODS)))][0])
    width = o.s1 - o.s0
    split = float(rng.uniform(0.9, 1.15))

    def shade(s: np.ndarray, z: np.ndarray) -> np.ndarray:
        inside = np.minimum(
            np.minimum(s - 0.11, width - 0.11 - s),
            np.where(z < split, np.minimum(z - 0.15, split - 0.06 - z), np.minimum(z - split - 0.06, 1.92 - z)),
        )
        color = np.where((np.abs(inside) < 0.014)[:, None], 0.72 * leaf, np.where((inside > 0)[:, None], 0.95 * leaf, leaf))
        handle = (np.abs(s - 0.07) < 0.022) & (np.abs(z - 1.03) < 0.09)
        return np.where(handle[:, None], _rgb("#8d8a84"), color)

    parts = [_panel(wall, (o.s0, o.s1), (o.z0, o.z1), 0.006, (0.022 / detail, 0.03 / detail), shade)]
    parts += _frame(wall, o, 0.07, 0.02, palette.trim, 0.025 / detail, sides="lrt")
    handle = (0.05, 0.16) if rng.random() < 0.5 else (width - 0.16, width - 0.05)
    parts.append(_panel(wall, (o.s0 + handle[0], o.s0 + handle[1]), (1.02, 1.045), 0.06, 0.012, _plain(_rgb("#a8a49c"))))
    return parts


def _rug(rug: Rug, rng: np.random.Generator, detail: float) -> Surfels:
    """A rug with a border and a pattern."""
    colors = [_choice(rng, [*_ACCENTS, *_FABRICS, "#9c2f2f", "#27425f", "#d8c9a8", "#3d3a37"]) for _ in range(4)]
    kind, period = int(rng.integers(4)), float(rng.uniform(0.18, 0.4))
    border, fuzz = float(rng.uniform(0.06, 0.14)), noise(rng, 0.05, 2)
    wide, deep = 2 * rug.hx, 2 * rug.hy

    def shade(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        edge = np.minimum(np.minimum(x, wide - x), np.minimum(y, deep - y))
        u, v = (x - rug.hx) / period, (y - rug.hy) / period
        if kind == 0:  # diamonds
            level = np.abs((u + 0.5) % 1 - 0.5) + np.abs((v + 0.5) % 1 - 0.5)
        elif kind == 1:  # stripes
            level = np.abs((u * 0.7 + 0.5) % 1 - 0.5) * 1.4
        elif kind == 2:  # rings about the middle
            level = np.abs((np.hypot(u, v * wide / deep) * 0.8) % 1 - 0.5) * 1.5
        else:  # plain with a mottle
            level = 0.3 + 0.25 * fuzz(3 * x, 3 * y)
        color = np.where((level < 0.22)[:, None], colors[1], np.where((level < 0.5)[:, None], colors[0], colors[2]))
        color = np.where((edge < border)[:, None], colors[3], color)
        color = np.where(((edge > 0.35 * border) & (edge < 0.6 * border))[:, None], colors[1], color)
        return color * (1 + 0.14 * fuzz(x, y))[:, None]

    step = (0.02 / detail, 0.02 / detail)
    return plane(np.array([rug.x - rug.hx, rug.y - rug.hy, 0.01]), f32([1, 0, 0]), f32([0, 1, 0]), (wide, deep), step, shade)


def _picture(wall: Wall, o: Opening, rng: np.random.Generator, detail: float) -> list[Surfels]:
    """A framed picture: a landscape, fields of colour or brush strokes, often with a white mount."""
    wide, high = o.s1 - o.s0, o.z1 - o.z0
    mount = 0.1 * min(wide, high) if rng.random() < 0.6 else 0.0
    kind, rough, fine = int(rng.integers(4)), noise(rng, 0.2), noise(rng, 0.09)
    tones = [_choice(rng, [*_ACCENTS, *_FABRICS, "#d94f3d", "#f1d9a0", "#20303f", "#e8e2d0"]) for _ in range(5)]
    cuts = np.sort(rng.uniform(0.1, 0.9, 4))
    seed = rng.uniform(-2, 2, 4).astype(np.float32)

    def shade(s: np.ndarray, z: np.ndarray) -> np.ndarray:
        u, v = s / wide, z / high
        if kind == 0:  # landscape
            sky = np.stack([0.62 + 0.3 * (1 - v), 0.75 + 0.1 * (1 - v), 0.9 - 0.15 * (1 - v)], 1)
            color = sky
            for number, level in enumerate((0.62, 0.45, 0.25)):
                ridge = level + 0.22 * rough(s + seed[number], np.full_like(s, seed[3]))
                color = np.where((v < ridge)[:, None], tones[number] * (0.8 + 0.3 * fine(s, z))[:, None], color)
        elif kind == 1:  # fields
            band = (u > cuts[0]).astype(np.int64) + (u > cuts[2]) + 2 * (v > cuts[1])
            line = np.minimum(np.abs(u - cuts[0]), np.minimum(np.abs(u - cuts[2]), np.abs(v - cuts[1]))) < 0.018
            color = np.where(line[:, None], 0.12, np.stack(tones)[band % 5])
        elif kind == 2:  # strokes
            angle = rough(s + 0.3 * fine(s, z), z) * 2.2
            color = np.stack(tones)[np.clip(((angle + 1) * 2.5).astype(np.int64), 0, 4)] * (0.9 + 0.2 * fine(s, z))[:, None]
        else:  # a vase or a sun: one shape on a ground
            inside = ((u - 0.5) / 0.28) ** 2 + ((v - cuts[1]) / 0.26) ** 2 < 1
            color = (
                np.where(inside[:, None], tones[0], np.where((v < 0.35)[:, None], tones[1], tones[2])) * (1 + 0.12 * fine(s, z))[:, None]
            )
        edge = np.minimum(np.minimum(s, wide - s), np.minimum(z, high - z))
        return np.where((edge < mount)[:, None], 0.95, color)

    frame = _choice(rng, ["#2a2420", "#5a4028", "#b08d57", "#e6e2da", "#1c1c1c"])
    step = 0.014 / detail
    return [_panel(wall, (o.s0, o.s1), (o.z0, o.z1), 0.018, step, shade), *_frame(wall, o, 0.03, 0.025, frame, step)]
