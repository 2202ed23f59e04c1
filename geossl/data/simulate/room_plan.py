"""Seeded plans of furnished rooms: outline, windows, doors, and objects of real size that stand where such things stand."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from geossl.data.objects import load_objects
from geossl.data.simulate.catalogue import candidates, object_size, surface_height
from geossl.errors import DataError, unknown_name

GAP = 0.04
"""Free space kept between objects, in metres."""
_TRIES = 30


class RoomError(DataError):
    """A room cannot be furnished as asked; the message says what found no place."""


class Wall(NamedTuple):
    """A straight wall seen from inside: from ``start`` along ``along`` (to the left of ``inward``... the outline runs counter-clockwise)."""

    start: tuple[float, float]
    along: tuple[float, float]
    inward: tuple[float, float]
    length: float

    def point(self, s: float, out: float = 0.0) -> tuple[float, float]:
        """Return the place ``s`` metres along the wall and ``out`` metres into the room."""
        return (
            self.start[0] + s * self.along[0] + out * self.inward[0],
            self.start[1] + s * self.along[1] + out * self.inward[1],
        )

    @property
    def facing(self) -> float:
        """Yaw of an object that turns its back (+y) to the wall."""
        return math.atan2(self.inward[0], -self.inward[1])


class Opening(NamedTuple):
    """A rectangle on a wall: a window, a door or a picture. ``s`` runs along the wall, ``z`` up."""

    wall: int
    s0: float
    s1: float
    z0: float
    z1: float


class Item(NamedTuple):
    """An object in the room: its base at ``z``, its middle at (x, y), turned by ``yaw``."""

    row: int
    role: str
    x: float
    y: float
    z: float
    yaw: float
    wall: int = -1

    @property
    def half(self) -> tuple[float, float]:
        """Half sizes of the axis-aligned footprint."""
        width, depth, _ = object_size(self.row)
        cos, sin = abs(math.cos(self.yaw)), abs(math.sin(self.yaw))
        return (width * cos + depth * sin) / 2, (width * sin + depth * cos) / 2

    @property
    def top(self) -> float:
        """Height of its highest point."""
        return self.z + object_size(self.row)[2]


class Rug(NamedTuple):
    """A rectangle on the floor: middle and half sizes."""

    x: float
    y: float
    hx: float
    hy: float


@dataclass
class Plan:
    """What is where in a room; z is up, the floor at 0, and the outline starts at the origin.

    Args:
        kind: One of :data:`KINDS`.
        size: Extent along x, y and z in metres.
        notch: Rectangle ``(x0, y0, x1, y1)`` cut off one corner of the floor (an L-shaped room), or None.
        windows: On which walls, where.
        doors: The same.
        pictures: The same.
        items: The objects.
        rugs: On the floor.
    """

    kind: str
    size: tuple[float, float, float]
    notch: tuple[float, float, float, float] | None = None
    windows: list[Opening] = field(default_factory=list)
    doors: list[Opening] = field(default_factory=list)
    pictures: list[Opening] = field(default_factory=list)
    items: list[Item] = field(default_factory=list)
    rugs: list[Rug] = field(default_factory=list)

    @property
    def outline(self) -> list[tuple[float, float]]:
        """Corners of the floor, counter-clockwise."""
        w, d, _ = self.size
        corners = [(0.0, 0.0), (w, 0.0), (w, d), (0.0, d)]
        if self.notch is None:
            return corners
        x0, y0, x1, y1 = self.notch
        if x0 > 0 and y0 > 0:  # the corner (w, d)
            return [(0.0, 0.0), (w, 0.0), (w, y0), (x0, y0), (x0, d), (0.0, d)]
        if y0 > 0:  # the corner (0, d)
            return [(0.0, 0.0), (w, 0.0), (w, d), (x1, d), (x1, y0), (0.0, y0)]
        if x0 > 0:  # the corner (w, 0)
            return [(0.0, 0.0), (x0, 0.0), (x0, y1), (w, y1), (w, d), (0.0, d)]
        return [(0.0, y1), (x1, y1), (x1, 0.0), (w, 0.0), (w, d), (0.0, d)]

    @property
    def walls(self) -> list[Wall]:
        """The walls, in the order of the outline."""
        corners = self.outline
        walls = []
        for a, b in zip(corners, [*corners[1:], corners[0]], strict=True):
            length = math.hypot(b[0] - a[0], b[1] - a[1])
            along = ((b[0] - a[0]) / length, (b[1] - a[1]) / length)
            walls.append(Wall(a, along, (-along[1], along[0]), length))
        return walls

    def inside(self, x: float, y: float, hx: float = 0.0, hy: float = 0.0) -> bool:
        """Whether a rectangle lies on the floor."""
        w, d, _ = self.size
        if x - hx < 0 or y - hy < 0 or x + hx > w or y + hy > d:
            return False
        if self.notch is None:
            return True
        x0, y0, x1, y1 = self.notch
        return x + hx <= x0 or x - hx >= x1 or y + hy <= y0 or y - hy >= y1


class _Builder:
    """Places objects in a plan, one after the other; every method that can find no place returns None."""

    def __init__(self, plan: Plan, rng: np.random.Generator, limit: int) -> None:
        self.plan, self.rng, self.limit = plan, rng, limit
        self.walls = plan.walls
        self.zones: list[tuple[float, float, float, float, float]] = []  # x0, x1, y0, y1 that must stay free above a height

    def uniform(self, low: float, high: float) -> float:
        return float(self.rng.uniform(low, high))

    def chance(self, probability: float) -> bool:
        return bool(self.rng.random() < probability)

    def pick(self, role: str, fits: Callable[[int], bool] = lambda row: True) -> int | None:
        rows = [row for row in candidates(role) if fits(row)]
        return rows[int(self.rng.integers(len(rows)))] if rows else None

    def wall_order(self) -> list[int]:
        """Return the walls, long ones first more often than not."""
        keys = [-wall.length * self.uniform(0.6, 1.4) for wall in self.walls]
        return sorted(range(len(keys)), key=lambda number: keys[number])

    def reserve(self, opening: Opening, depth: float, above: float) -> None:
        wall = self.walls[opening.wall]
        corners = [wall.point(s, out) for s in (opening.s0, opening.s1) for out in (0.0, depth)]
        xs, ys = [p[0] for p in corners], [p[1] for p in corners]
        self.zones.append((min(xs), max(xs), min(ys), max(ys), above))

    def fits(self, item: Item, gap: float = GAP, ignore: tuple[Item, ...] = ()) -> bool:
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
                row = given if given is not None else self.pick(role, lambda r: object_size(r)[0] < wall.length - 0.1)
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
        x, y = _local(base, dx, dy)
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
            x, y = _local(base, shift, -(object_size(base.row)[1] / 2 + gap + reach))
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
        placed = []
        for number in self.rng.permutation(len(places)):
            if len(placed) == count:
                break
            dx, dy, turn = places[int(number)]
            out = object_size(row)[1] / 2 - tuck * self.uniform(0.3, 1.0)
            norm = math.hypot(*((0.0, math.copysign(1, dy)) if abs(dy) > 1e-6 else (math.copysign(1, dx), 0.0)))
            ux, uy = (0.0, math.copysign(1, dy)) if abs(dy) > 1e-6 else (math.copysign(1, dx), 0.0)
            x, y = _local(base, dx + ux * out / norm, dy + uy * out / norm)
            item = Item(row, role, x, y, 0.0, base.yaw + turn + self.uniform(-0.12, 0.12), -1)
            if self.fits(item, gap=0.01, ignore=(base,)):
                placed.append(item)
                self.plan.items.append(item)
        return placed

    def free(self, role: str, row: int | None = None, near_wall: bool = False, yaw: float | None = None) -> Item | None:
        """Stand an object anywhere on the floor; ``near_wall`` prefers corners and walls."""
        w, d, _ = self.plan.size
        for _ in range(_TRIES):
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
        for _ in range(_TRIES // 2):
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
            x, y = _local(base, dx, dy)
            item = Item(row, role, x, y, base.z + height + 0.003, base.yaw + yaw, base.wall)
            if self.fits(item, gap=0.02, ignore=(base,)):
                return self.add(item)
            where = None
        return None

    def several(self, base: Item | None, role: str, low: int, high: int) -> None:
        for _ in range(int(self.rng.integers(low, high + 1))):
            self.on_top(base, role)

    def ceiling(self, role: str, x: float, y: float) -> Item | None:
        row = self.pick(role, lambda r: object_size(r)[2] < self.plan.size[2] - 1.95)
        if row is None:
            return None
        item = Item(row, role, x, y, self.plan.size[2] - object_size(row)[2] - 0.005, 0.0)
        return self.add(item) if self.fits(item) else None

    def rug(self, x: float, y: float, hx: float, hy: float) -> None:
        for _ in range(6):
            if self.plan.inside(x, y, hx + 0.05, hy + 0.05):
                self.plan.rugs.append(Rug(x, y, hx, hy))
                return
            hx, hy = 0.85 * hx, 0.85 * hy

    def need(self, item: Item | None, what: str) -> Item:
        if item is None:
            w, d, h = self.plan.size
            smallest = min((object_size(row) for row in candidates(what)), key=lambda s: s[0] * s[1])
            raise RoomError(
                f"room: no place for a {what} (the smallest takes {smallest[0]:.2f} x {smallest[1]:.2f} m) in a {self.plan.kind} "
                f"of {w:.2f} x {d:.2f} x {h:.2f} m with {len(self.plan.windows)} windows, {len(self.plan.doors)} doors and "
                f"{len(self.plan.items)} objects in it; give it a larger size"
            )
        return item


def _local(base: Item, dx: float, dy: float) -> tuple[float, float]:
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


def _bedroom(b: _Builder) -> None:
    child = b.chance(0.2)
    bed = b.need(b.at_wall("single bed" if child else "bed", where=b.uniform(0.35, 0.65)), "single bed" if child else "bed")
    table = b.pick("bedside table")
    for side in (-1, 1):
        stand = b.beside(bed, "bedside table", side, 0.08, table)
        b.on_top(stand, "table lamp", (0.0, 0.3))
        if b.chance(0.5):
            b.on_top(stand, "bedroom things")
    others = [wall for wall in b.wall_order() if wall != bed.wall]
    b.at_wall("wardrobe", others, b.uniform(0, 1))
    dresser = b.at_wall("dresser", others)
    b.several(dresser, "bedroom things", 2, 3)
    if b.chance(0.5) and (desk := b.at_wall("desk", others)):
        b.before(desk, "chair", -0.15, math.pi)
        b.on_top(desk, "laptop", (0.0, 0.2), 0.0)
        b.on_top(desk, "table lamp", (0.8, 0.5))
    elif b.chance(0.6):
        b.at_wall("armchair", others, 0.0)
    if child or b.chance(0.25):
        b.free("toys")
        b.free("toys")
    x, y = _local(bed, 0.0, -0.25 * object_size(bed.row)[1])
    hx, hy = bed.half
    if b.chance(0.75):
        b.rug(x, y, hx + 0.35, hy + 0.25)
    if b.chance(0.25):
        b.ceiling("ceiling fan", x, y)


def _living(b: _Builder) -> None:
    sofa = b.need(b.at_wall("corner sofa" if b.chance(0.2) else "sofa", where=b.uniform(0.35, 0.65)), "sofa")
    table = b.before(sofa, "coffee table", b.uniform(0.38, 0.5))
    b.several(table, "lounge things", 1, 3)
    opposite = [
        n
        for n, wall in enumerate(b.walls)
        if wall.inward[0] * b.walls[sofa.wall].inward[0] + wall.inward[1] * b.walls[sofa.wall].inward[1] < -0.5
    ]
    others = [n for n in b.wall_order() if n != sofa.wall]
    if b.chance(0.75):
        stand = b.at_wall("tv stand", opposite, _along(b, opposite, sofa))
        if stand is not None and (object_size(stand.row)[2] > 0.75 or b.on_top(stand, "tv", (0.0, 0.0), 0.0) is None):
            b.several(stand, "lounge things", 1, 2)
        elif stand is not None:
            b.on_top(stand, "lounge things", (0.9, 0.0))
    else:
        b.at_wall("fireplace", opposite + others, 0.5)
        b.at_wall("piano", others, 0.3)
    anchor, row = table or sofa, b.pick("armchair")
    for side in (-1, 1):
        if b.chance(0.75) and row is not None:
            x, y = _local(anchor, side * (object_size(anchor.row)[0] / 2 + 0.75), b.uniform(-0.5, -0.1))
            turn = math.atan2(anchor.x - x, -(anchor.y - y)) + b.uniform(-0.25, 0.25)
            item = Item(row, "armchair", x, y, 0.0, turn)
            if b.fits(item):
                b.add(item)
    b.at_wall("shelf", others)
    for side in (-1, 1):
        if b.chance(0.5):
            side_table = b.beside(sofa, "side table", side, 0.1)
            b.on_top(side_table, "table lamp", (0.0, 0.0))
    b.free("floor lamp", near_wall=True)
    if b.plan.size[0] * b.plan.size[1] > 21 and (dining := b.free("dining table", yaw=b.walls[others[0]].facing)):
        b.around(dining, "chair", 4)
        b.several(dining, "dining things", 1, 2)
    if table is not None:
        b.rug(table.x, table.y, table.half[0] + b.uniform(0.3, 0.55), table.half[1] + b.uniform(0.3, 0.55))


def _along(b: _Builder, walls: list[int], item: Item) -> float:
    """Return where along the first of ``walls`` an object faces ``item``, 0 to 1."""
    if not walls:
        return 0.5
    wall = b.walls[walls[0]]
    return ((item.x - wall.start[0]) * wall.along[0] + (item.y - wall.start[1]) * wall.along[1]) / wall.length


def _study(b: _Builder) -> None:
    desk = b.need(b.at_wall("desk", where=b.uniform(0.3, 0.7)), "desk")
    b.before(desk, "office chair", -0.12, math.pi + b.uniform(-0.3, 0.3), b.uniform(-0.1, 0.1)) or b.before(desk, "chair", 0.05, math.pi)
    b.on_top(desk, "laptop", (0.0, 0.3), 0.0)
    b.on_top(desk, "table lamp", (-0.85, 0.6))
    b.several(desk, "desk things", 1, 3)
    others = [wall for wall in b.wall_order() if wall != desk.wall]
    for _ in range(2):
        b.at_wall("shelf", others)
    cabinet = b.at_wall("filing cabinet")
    b.on_top(cabinet, "desk things")
    if b.chance(0.6):
        sofa = b.at_wall("sofa", others)
        if sofa is not None and (table := b.before(sofa, "coffee table", 0.4)):
            b.several(table, "lounge things", 1, 2)
            b.rug(table.x, table.y, table.half[0] + 0.4, table.half[1] + 0.4)
    else:
        b.free("armchair")
        b.rug(b.plan.size[0] / 2, b.plan.size[1] / 2, b.uniform(0.7, 1.0), b.uniform(0.9, 1.2))
    b.free("bin", near_wall=True)
    if b.chance(0.6):
        b.free("floor lamp", near_wall=True)


def _kitchen(b: _Builder) -> None:
    order = [n for n in b.wall_order() if b.walls[n].length > 2.3] or b.wall_order()
    wall_number = min(order[:2], key=lambda n: sum(o.wall == n for o in b.plan.doors))
    wall = b.walls[wall_number]
    placed, s = [], 0.03
    run: list[str] = ["fridge", "lower cabinet", "sink", "lower cabinet", "stove", "lower cabinet", "lower cabinet"]
    if b.chance(0.5):
        run.insert(3, "kitchen machine")
    if b.chance(0.5):
        run.append(run.pop(0))
    for role in run:
        row = b.pick(role, lambda r: object_size(r)[0] < wall.length - s - 0.02)
        if row is None:
            continue
        width, depth, height = object_size(row)
        x, y = wall.point(s + width / 2, 0.015 + depth / 2)
        item = Item(row, role, x, y, 0.0, wall.facing, wall_number)
        if not b.fits(item, gap=-0.01):
            s += 0.2
            continue
        b.add(item)
        placed.append(item)
        middle, s = s + width / 2, s + width + 0.005
        if height < 1.0 and role in ("lower cabinet", "stove", "kitchen machine"):
            above = b.pick("hood" if role == "stove" else "upper cabinet", lambda r: object_size(r)[0] < width + 0.45)
            if above is not None and b.chance(0.85):
                ax, ay = wall.point(middle, 0.01 + object_size(above)[1] / 2)
                hung = Item(above, "upper cabinet", ax, ay, 1.6 if role == "stove" else 1.42, wall.facing, wall_number)
                if b.fits(hung, gap=-0.01):
                    b.add(hung)
    b.need(placed[0] if placed else None, "lower cabinet")
    tops = [item for item in placed if item.role in ("lower cabinet", "kitchen machine")]
    for number in b.rng.permutation(len(tops))[:4]:
        b.on_top(tops[int(number)], "kitchen things", (0.0, 0.4), 0.0)
    yaw = wall.facing + (math.pi / 2 if b.chance(0.5) else 0.0)
    table = b.free("dining table", yaw=yaw)
    if table is not None:
        b.around(table, "chair", int(b.rng.integers(2, 6)))
        b.several(table, "dining things", 1, 3)
        if b.chance(0.4):
            b.rug(table.x, table.y, table.half[0] + 0.35, table.half[1] + 0.35)
    b.free("bin", near_wall=True)
    if b.chance(0.4):
        b.at_wall("narrow shelf")


def _dining(b: _Builder) -> None:
    w, d, _ = b.plan.size
    table = None
    for _ in range(_TRIES):
        row = b.pick("dining table")
        if row is None:
            break
        item = Item(
            row, "dining table", w / 2 + b.uniform(-0.5, 0.5), d / 2 + b.uniform(-0.5, 0.5), 0.0, float(b.rng.integers(2)) * math.pi / 2
        )
        if b.fits(item):
            table = b.add(item)
            break
    table = b.need(table, "dining table")
    b.around(table, "chair", int(b.rng.integers(4, 7)))
    b.several(table, "dining things", 2, 3)
    b.rug(table.x, table.y, table.half[0] + 0.5, table.half[1] + 0.5)
    cabinet = b.at_wall("dresser")
    b.several(cabinet, "lounge things", 2, 3)
    b.at_wall("shelf")
    b.at_wall("piano" if b.chance(0.3) else "fireplace")
    if b.chance(0.5):
        b.at_wall("sofa")
    b.ceiling("ceiling lamp", table.x, table.y)


def _bathroom(b: _Builder) -> None:
    basin = b.need(b.at_wall("washbasin"), "washbasin")
    b.on_top(basin, "bathroom things")
    b.at_wall("bath" if b.chance(0.65) else "shower", where=0.0 if b.chance(0.5) else 1.0)
    toilet = b.at_wall("toilet")
    if toilet is not None and b.chance(0.3):
        b.beside(toilet, "bidet", 1, 0.25)
    machine = b.at_wall("kitchen machine") if b.chance(0.6) else b.at_wall("narrow shelf")
    b.on_top(machine, "bathroom things")
    for _ in range(2):
        b.free("bathroom floor", near_wall=True)
    b.at_wall("towel rack", z=b.uniform(0.9, 1.2))
    if b.chance(0.7):
        x, y = _local(basin, 0.0, -object_size(basin.row)[1] / 2 - 0.4)
        b.rug(x, y, 0.4, 0.3)


def _hobby(b: _Builder) -> None:
    game = b.need(b.free("big game", yaw=float(b.rng.integers(2)) * math.pi / 2), "big game")
    bench = b.at_wall("workbench") if b.chance(0.5) else b.at_wall("desk")
    b.several(bench, "tools", 2, 3)
    b.at_wall("sofa")
    b.at_wall("shelf")
    for _ in range(2):
        b.free("garage things", near_wall=True)
    for _ in range(2):
        b.free("stool")
    b.free("toys")
    if b.chance(0.5):
        b.rug(game.x, game.y, game.half[0] + 0.4, game.half[1] + 0.4)


class Kind(NamedTuple):
    """How a kind of room is furnished and how large it is: ranges of the longer and the shorter side, in metres."""

    furnish: Callable[[_Builder], None]
    long: tuple[float, float]
    short: tuple[float, float]
    weight: float
    notch: float  # how often the room is L-shaped


KINDS: dict[str, Kind] = {
    "bedroom": Kind(_bedroom, (3.6, 5.2), (3.0, 4.2), 0.24, 0.15),
    "living room": Kind(_living, (4.2, 6.4), (3.6, 4.8), 0.28, 0.25),
    "study": Kind(_study, (3.4, 4.8), (2.9, 3.8), 0.16, 0.1),
    "kitchen": Kind(_kitchen, (3.6, 5.2), (2.9, 4.0), 0.12, 0.1),
    "dining room": Kind(_dining, (3.8, 5.4), (3.4, 4.4), 0.1, 0.1),
    "bathroom": Kind(_bathroom, (2.6, 3.6), (2.2, 2.9), 0.05, 0.0),
    "hobby room": Kind(_hobby, (4.6, 6.2), (3.6, 4.8), 0.05, 0.15),
}
"""Kinds of rooms: how often each is drawn and how large it is."""


def make_plan(
    rng: np.random.Generator, kind: str | None = None, size: tuple[float, float, float] | None = None, max_objects: int = 15
) -> Plan:
    """Draw a plan; the same generator state gives the same plan.

    Args:
        rng: Source of every choice.
        kind: One of :data:`KINDS`; None draws one.
        size: Extent along x, y and z in metres; None draws one that suits the kind.
        max_objects: No more objects than this, at least 4.

    Raises:
        RoomError: the furniture that makes the kind found no place in several attempts; the message says which.
    """
    names = list(KINDS)
    weights = np.array([KINDS[name].weight for name in names])
    if kind is None:
        kind = names[int(rng.choice(len(names), p=weights / weights.sum()))]
    if kind not in KINDS:
        raise unknown_name("kind of room", kind, KINDS)
    if max_objects < 4:
        raise RoomError(f"room: max_objects must be at least 4, got {max_objects}")
    if size is not None and not (min(size[:2]) >= 1.0 and 2.0 <= size[2] <= 6.0 and max(size[:2]) <= 20.0):
        raise RoomError(f"room: size must be 1 to 20 m along x and y and 2 to 6 m along z, got {size}")
    failure: RoomError | None = None
    for _ in range(12):
        plan = _shape(rng, kind, size)
        builder = _Builder(plan, rng, max_objects)
        _openings(builder)
        try:
            KINDS[kind].furnish(builder)
        except RoomError as error:
            failure = error
            continue
        _finish(builder)
        if len(plan.items) >= 4:
            return plan
        failure = RoomError(f"room: only {len(plan.items)} objects found a place in a {kind} of {plan.size}; give it a larger size")
    raise failure or RoomError(f"room: no {kind} could be furnished")


def _shape(rng: np.random.Generator, kind: str, size: tuple[float, float, float] | None) -> Plan:
    spec = KINDS[kind]
    if size is None:
        sides = [float(rng.uniform(*spec.long)), float(rng.uniform(*spec.short))]
        if rng.random() < 0.5:
            sides.reverse()
        size = (round(sides[0], 2), round(sides[1], 2), round(float(rng.uniform(2.4, 2.85)), 2))
    w, d, _ = size
    notch = None
    if rng.random() < spec.notch and w * d > 13:
        nw, nd = float(rng.uniform(0.22, 0.38)) * w, float(rng.uniform(0.22, 0.38)) * d
        x0 = 0.0 if rng.random() < 0.5 else round(w - nw, 2)
        y0 = 0.0 if rng.random() < 0.5 else round(d - nd, 2)
        notch = (x0, y0, w if x0 else round(nw, 2), d if y0 else round(nd, 2))
    return Plan(kind, size, notch)


def _openings(b: _Builder) -> None:
    """Cut one or two windows and a door, and keep the places before them free."""
    plan, height = b.plan, b.plan.size[2]
    order = b.wall_order()
    taken: list[Opening] = []
    for number in order[: 1 + (b.chance(0.4) and plan.kind != "bathroom")]:
        wall = b.walls[number]
        width = min(b.uniform(1.1, 2.2) if plan.kind != "bathroom" else b.uniform(0.6, 0.9), wall.length - 0.9)
        if width < 0.5:
            continue
        z0 = b.uniform(0.8, 1.0) if plan.kind not in ("bathroom", "kitchen") else 1.15
        if plan.kind == "living room" and b.chance(0.3):
            z0 = 0.12
        middle = wall.length / 2 + b.uniform(-0.25, 0.25) * (wall.length - width - 0.8)
        opening = Opening(number, middle - width / 2, middle + width / 2, z0, min(height - 0.28, b.uniform(2.05, 2.3)))
        plan.windows.append(opening)
        taken.append(opening)
        b.reserve(opening._replace(s0=opening.s0 - 0.1, s1=opening.s1 + 0.1), 0.45, opening.z0)
    for number in reversed(order):
        wall = b.walls[number]
        width = 0.86
        spans = [(0.12, wall.length - 0.12)]
        for window in (o for o in taken if o.wall == number):
            spans = [
                (a, z) for low, high in spans for a, z in ((low, min(high, window.s0 - 0.2)), (max(low, window.s1 + 0.2), high)) if z > a
            ]
        spans = [(a, z) for a, z in spans if z - a > width]
        if spans:
            low, high = max(spans, key=lambda span: span[1] - span[0])
            start = low if b.chance(0.5) else high - width
            door = Opening(number, start, start + width, 0.0, 2.05)
            plan.doors.append(door)
            b.reserve(door, 0.85, 0.0)
            return


def _finish(b: _Builder) -> None:
    """Add what every room has: plants, things left lying, a lamp, radiators and pictures."""
    plan = b.plan
    w, d, h = plan.size
    target = int(b.rng.integers(8, 14)) if plan.kind != "bathroom" else 7
    if plan.kind not in ("bathroom", "hobby room"):
        for _ in range(int(b.rng.integers(1, 3))):
            b.free("floor plant", near_wall=True)
    for window in plan.windows:
        if window.z0 > 0.75 and b.chance(0.6):
            row = b.pick("radiator", lambda r: object_size(r)[2] < window.z0 - 0.15)
            if row is not None:
                wall = b.walls[window.wall]
                x, y = wall.point((window.s0 + window.s1) / 2, 0.02 + object_size(row)[1] / 2)
                item = Item(row, "radiator", x, y, 0.1, wall.facing, window.wall)
                if b.fits(item):
                    b.add(item)
    if not any(item.role in ("ceiling lamp", "ceiling fan") for item in plan.items) and b.chance(0.75):
        for _ in range(4):
            x, y = w / 2 + b.uniform(-0.3, 0.3), d / 2 + b.uniform(-0.3, 0.3)
            if plan.inside(x, y, 0.3, 0.3) and b.ceiling("ceiling lamp", x, y):
                break
    for role, low, high, chance in (("clock", 1.4, 1.6, 0.3), ("wall lamp", 1.4, 1.6, 0.3), ("air conditioner", h - 0.5, h - 0.45, 0.15)):
        if b.chance(chance):
            b.at_wall(role, z=b.uniform(low, high))
    tries = 0
    while len(plan.items) < target and tries < 10 and plan.kind not in ("bathroom",):
        b.free("floor things" if b.chance(0.6) else "chair", near_wall=b.chance(0.6))
        tries += 1
    _pictures(b)


def _pictures(b: _Builder) -> None:
    """Hang pictures where no furniture, window or door hides them."""
    plan = b.plan
    count = int(b.rng.integers(2, 6)) if plan.kind not in ("bathroom", "kitchen") else int(b.rng.integers(0, 3))
    for _ in range(30):
        if len(plan.pictures) >= count:
            return
        number = int(b.rng.integers(len(b.walls)))
        wall = b.walls[number]
        width = b.uniform(0.35, 1.1)
        height = width * b.uniform(0.6, 0.9) if b.chance(0.6) else width * b.uniform(1.1, 1.4)
        if wall.length < width + 0.5 or height > 0.9:
            continue
        s, z = b.uniform(0.2, wall.length - 0.2 - width), b.uniform(1.25, 1.4)
        new = Opening(number, s, s + width, z, min(z + height, plan.size[2] - 0.2))
        if any(_overlap(new, other, 0.15) for other in (*plan.windows, *plan.doors, *plan.pictures)):
            continue
        if any(_hides(item, wall, new) for item in plan.items):
            continue
        plan.pictures.append(new)


def _overlap(a: Opening, b: Opening, gap: float) -> bool:
    return a.wall == b.wall and a.s0 < b.s1 + gap and b.s0 < a.s1 + gap and a.z0 < b.z1 + gap and b.z0 < a.z1 + gap


def _hides(item: Item, wall: Wall, picture: Opening) -> bool:
    """Whether an object near a wall reaches in front of a picture on it."""
    hx, hy = item.half
    dx, dy = item.x - wall.start[0], item.y - wall.start[1]
    s, out = dx * wall.along[0] + dy * wall.along[1], dx * wall.inward[0] + dy * wall.inward[1]
    across = hx * abs(wall.along[0]) + hy * abs(wall.along[1])
    deep = hx * abs(wall.inward[0]) + hy * abs(wall.inward[1])
    return out - deep < 0.5 and item.top > picture.z0 and item.z < picture.z1 and s - across < picture.s1 and s + across > picture.s0
