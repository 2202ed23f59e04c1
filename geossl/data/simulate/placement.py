"""Finding places for objects in a plan: against walls, beside, before, around and on top of each other, without collision."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from geossl.data.objects import load_objects
from geossl.data.simulate.catalogue import candidates, object_size, surface_height
from geossl.data.simulate.room_plan import Item, Opening, Plan, RoomError, Rug

GAP = 0.04
"""Free space kept between objects, in metres."""
TRIES = 30


def narrower(width: float) -> Callable[[int], bool]:
    """Return whether an object is less wide than ``width``."""
    return lambda row: object_size(row)[0] < width


class Builder:
    """Places objects in a plan, one after the other; every method that can find no place returns None."""

    def __init__(self, plan: Plan, rng: np.random.Generator, limit: int) -> None:
        self.plan, self.rng, self.limit = plan, rng, limit
        self.walls = plan.walls
        self.zones: list[tuple[float, float, float, float, float]] = []  # x0, x1, y0, y1 that must stay free above a height

    def uniform(self, low: float, high: float) -> float:
        """Draw a number."""
        return float(self.rng.uniform(low, high))

    def chance(self, probability: float) -> bool:
        """Draw yes or no."""
        return bool(self.rng.random() < probability)

    def pick(self, role: str, fits: Callable[[int], bool] = lambda row: True) -> int | None:
        """Draw an object for a role among those that fit."""
        rows = [row for row in candidates(role) if fits(row)]
        return rows[int(self.rng.integers(len(rows)))] if rows else None

    def wall_order(self) -> list[int]:
        """Return the walls, long ones first more often than not."""
        keys = [-wall.length * self.uniform(0.6, 1.4) for wall in self.walls]
        return sorted(range(len(keys)), key=lambda number: keys[number])

    def reserve(self, opening: Opening, depth: float, above: float) -> None:
        """Keep the place before an opening free of what reaches higher than ``above``."""
        wall = self.walls[opening.wall]
        corners = [wall.point(s, out) for s in (opening.s0, opening.s1) for out in (0.0, depth)]
        xs, ys = [p[0] for p in corners], [p[1] for p in corners]
        self.zones.append((min(xs), max(xs), min(ys), max(ys), above))

    def fits(self, item: Item, gap: float = GAP, ignore: tuple[Item, ...] = ()) -> bool:
        """Whether an object stands inside the room, clear of windows, doors and other objects."""
        hx, hy = item.half
        if len(self.plan.items) >= self.limit:
            return False
        if not self.plan.inside(item.x, item.y, hx, hy) or item.top > self.plan.size[2] + 1e-3:
            return False
        for x0, x1, y0, y1, above in self.zones:
            if item.top > above and item.x + hx > x0 and item.x - hx < x1 and item.y + hy > y0 and item.y - hy < y1:
                return False
        for other in self.plan.items:
            if other in ignore or item.z >= other.top - 1e-3 or other.z >= item.top - 1e-3:
                continue
            ox, oy = other.half
            if abs(item.x - other.x) < hx + ox + gap and abs(item.y - other.y) < hy + oy + gap:
                return False
        return True

    def add(self, item: Item | None) -> Item | None:
        """Put an object that fits into the plan."""
        if item is not None:
            self.plan.items.append(item)
        return item

    def at_wall(
        self, role: str, walls: list[int] | None = None, where: float | None = None, z: float = 0.0, row: int | None = None
    ) -> Item | None:
        """Stand (or hang, at height ``z``) an object with its back to a wall; ``where`` is its place along the wall, 0 to 1."""
        given = row
        for wall_number in self.wall_order() if walls is None else walls:
            wall = self.walls[wall_number]
            for attempt in range(8):
                row = given if given is not None else self.pick(role, narrower(wall.length - 0.1))
                if row is None:
                    break
                width, depth, _ = object_size(row)
                room = wall.length - width - 0.08
                if room < 0:
                    continue
                s = (
                    0.04
                    + width / 2
                    + room * (self.uniform(0, 1) if where is None else min(1, max(0, where + (attempt > 0) * self.uniform(-0.3, 0.3))))
                )
                x, y = wall.point(s, (0.03 if z == 0 else 0.012) + depth / 2)
                item = Item(row, role, x, y, z, wall.facing, wall_number)
                if self.fits(item):
                    return self.add(item)
        return None

    def beside(self, base: Item, role: str, side: int, gap: float = 0.06, row: int | None = None) -> Item | None:
        """Stand an object beside ``base``, backs in line: ``side`` -1 is its left, 1 its right."""
        row = self.pick(role) if row is None else row
        if row is None:
            return None
        width, depth, _ = object_size(row)
        dx, dy = side * (object_size(base.row)[0] / 2 + gap + width / 2), (object_size(base.row)[1] - depth) / 2
        x, y = local_place(base, dx, dy)
        item = Item(row, role, x, y, 0.0, base.yaw, base.wall)
        return self.add(item) if self.fits(item) else None

    def before(self, base: Item, role: str, gap: float, turn: float = 0.0, shift: float = 0.0, row: int | None = None) -> Item | None:
        """Stand an object before ``base``, ``gap`` metres away; ``turn`` 0 faces the same way, pi faces it."""
        for _ in range(4):
            chosen = self.pick(role) if row is None else row
            if chosen is None:
                return None
            width, depth, _ = object_size(chosen)
            reach = (width * abs(math.sin(turn)) + depth * abs(math.cos(turn))) / 2
            x, y = local_place(base, shift, -(object_size(base.row)[1] / 2 + gap + reach))
            item = Item(chosen, role, x, y, 0.0, base.yaw + turn, -1)
            if self.fits(item):
                return self.add(item)
        return None

    def around(self, base: Item, role: str, count: int, tuck: float = 0.18) -> list[Item]:
        """Stand chairs around a table, facing it, pushed under by ``tuck``; all of one model."""
        row = self.pick(role)
        if row is None:
            return []
        width, depth, _ = object_size(base.row)
        places: list[tuple[float, float, float]] = []
        per_side = 2 if width > 1.25 else 1
        for side in (-1, 1):
            for number in range(per_side):
                places.append(((number - (per_side - 1) / 2) * width / 2.2, side * (depth / 2), math.pi if side < 0 else 0.0))
            places.append((side * width / 2, 0.0, -side * math.pi / 2))
        placed: list[Item] = []
        for number in self.rng.permutation(len(places)):
            if len(placed) == count:
                break
            dx, dy, turn = places[int(number)]
            out = object_size(row)[1] / 2 - tuck * self.uniform(0.3, 1.0)
            norm = math.hypot(*((0.0, math.copysign(1, dy)) if abs(dy) > 1e-6 else (math.copysign(1, dx), 0.0)))
            ux, uy = (0.0, math.copysign(1, dy)) if abs(dy) > 1e-6 else (math.copysign(1, dx), 0.0)
            x, y = local_place(base, dx + ux * out / norm, dy + uy * out / norm)
            item = Item(row, role, x, y, 0.0, base.yaw + turn + self.uniform(-0.12, 0.12), -1)
            if self.fits(item, gap=0.01, ignore=(base,)):
                placed.append(item)
                self.plan.items.append(item)
        return placed

    def free(self, role: str, row: int | None = None, near_wall: bool = False, yaw: float | None = None) -> Item | None:
        """Stand an object anywhere on the floor; ``near_wall`` prefers corners and walls."""
        w, d, _ = self.plan.size
        for _ in range(TRIES):
            chosen = self.pick(role) if row is None else row
            if chosen is None:
                return None
            turn = self.uniform(-math.pi, math.pi) if yaw is None else yaw
            item = Item(chosen, role, 0.0, 0.0, 0.0, turn)
            hx, hy = item.half
            if 2 * hx + 0.1 > w or 2 * hy + 0.1 > d:
                continue
            x, y = self.uniform(hx + 0.04, w - hx - 0.04), self.uniform(hy + 0.04, d - hy - 0.04)
            if near_wall:
                if self.chance(0.5):
                    x = hx + 0.06 if self.chance(0.5) else w - hx - 0.06
                else:
                    y = hy + 0.06 if self.chance(0.5) else d - hy - 0.06
            item = item._replace(x=x, y=y)
            if self.fits(item):
                return self.add(item)
        return None

    def on_top(self, base: Item | None, role: str, where: tuple[float, float] | None = None, turn: float | None = None) -> Item | None:
        """Stand an object on the level top of ``base``; ``where`` is its place there, -1 to 1 across and along."""
        if base is None:
            return None
        surface = surface_height(base.row)
        bw, bd, _ = object_size(base.row)
        for _ in range(TRIES // 2):
            row = self.pick(role, lambda r: max(object_size(r)[:2]) < 0.9 * max(bw, bd) and min(object_size(r)[:2]) < 0.95 * min(bw, bd))
            if row is None:
                return None
            width, depth, _ = object_size(row)
            yaw = self.uniform(-0.5, 0.5) if turn is None else turn + self.uniform(-0.12, 0.12)
            rx, ry = (
                (width * abs(math.cos(yaw)) + depth * abs(math.sin(yaw))) / 2,
                (width * abs(math.sin(yaw)) + depth * abs(math.cos(yaw))) / 2,
            )
            if bw / 2 - rx < 0.02 or bd / 2 - ry < 0.01:
                continue
            px, py = (self.uniform(-1, 1), self.uniform(-1, 1)) if where is None else where
            dx, dy = px * (bw / 2 - rx - 0.02), py * max(bd / 2 - ry - 0.02, 0.0)
            height = _support(base.row, dx, dy, rx, ry, surface)
            if height is None:
                where = None
                continue
            x, y = local_place(base, dx, dy)
            item = Item(row, role, x, y, base.z + height + 0.003, base.yaw + yaw, base.wall)
            if self.fits(item, gap=0.02, ignore=(base,)):
                return self.add(item)
            where = None
        return None

    def several(self, base: Item | None, role: str, low: int, high: int) -> None:
        """Stand some things on top."""
        for _ in range(int(self.rng.integers(low, high + 1))):
            self.on_top(base, role)

    def ceiling(self, role: str, x: float, y: float) -> Item | None:
        """Hang an object from the ceiling, clear of heads."""
        row = self.pick(role, lambda r: object_size(r)[2] < self.plan.size[2] - 1.95)
        if row is None:
            return None
        item = Item(row, role, x, y, self.plan.size[2] - object_size(row)[2] - 0.005, 0.0)
        return self.add(item) if self.fits(item) else None

    def rug(self, x: float, y: float, hx: float, hy: float) -> None:
        """Lay a rug, smaller where the room is."""
        for _ in range(6):
            if self.plan.inside(x, y, hx + 0.05, hy + 0.05):
                self.plan.rugs.append(Rug(x, y, hx, hy))
                return
            hx, hy = 0.85 * hx, 0.85 * hy

    def need(self, item: Item | None, what: str) -> Item:
        """Return the item, or fail for want of a place for ``what``."""
        if item is None:
            w, d, h = self.plan.size
            smallest = min((object_size(row) for row in candidates(what)), key=lambda s: s[0] * s[1])
            raise RoomError(
                f"room: no place for a {what} (the smallest takes {smallest[0]:.2f} x {smallest[1]:.2f} m) in a {self.plan.kind} "
                f"of {w:.2f} x {d:.2f} x {h:.2f} m with {len(self.plan.windows)} windows, {len(self.plan.doors)} doors and "
                f"{len(self.plan.items)} objects in it; give it a larger size"
            )
        return item


def local_place(base: Item, dx: float, dy: float) -> tuple[float, float]:
    """Return the place in the room of (dx, dy) in the frame of ``base``."""
    cos, sin = math.cos(base.yaw), math.sin(base.yaw)
    return base.x + cos * dx - sin * dy, base.y + sin * dx + cos * dy


def _support(row: int, dx: float, dy: float, rx: float, ry: float, surface: float) -> float | None:
    """Return the height on which a footprint stands on object ``row``, or None where it would hang over or hit something."""
    library = load_objects()
    xyz = library.xyz[row].astype(np.float32)
    low, high = xyz.min(0), xyz.max(0)
    local = (xyz - (low + high) / 2) * np.float32(library.scale_m[row])
    z = local[:, 2] - local[:, 2].min()
    size = object_size(row)
    reach = 0.5 * max(0.06, 0.09 * max(size))  # a few points are needed even under a cup
    under = (np.abs(local[:, 0] - dx) < rx + reach) & (np.abs(local[:, 1] - dy) < ry + reach)
    tight = (np.abs(local[:, 0] - dx) < rx + 0.02) & (np.abs(local[:, 1] - dy) < ry + 0.02)
    if (z[tight] > surface + 0.03).any():
        return None
    near = under & (np.abs(z - surface) < 0.03)
    wide = (
        (local[near, 0].min() <= dx <= local[near, 0].max()) and (local[near, 1].min() <= dy <= local[near, 1].max())
        if near.any()
        else False
    )
    return surface if near.sum() >= 3 and wide else None
