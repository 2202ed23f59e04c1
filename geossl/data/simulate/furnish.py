"""Seeded plans: how each kind of room is shaped, opened and furnished."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from numbers import Integral, Real
from typing import Any, NamedTuple

import numpy as np

from geossl.data.simulate.catalogue import object_size
from geossl.data.simulate.placement import TRIES, Builder, local_place, narrower
from geossl.data.simulate.room_plan import Item, Opening, Plan, RoomError, Wall
from geossl.errors import unknown_name


def _bedroom(b: Builder) -> None:
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
    x, y = local_place(bed, 0.0, -0.25 * object_size(bed.row)[1])
    hx, hy = bed.half
    if b.chance(0.75):
        b.rug(x, y, hx + 0.35, hy + 0.25)
    if b.chance(0.25):
        b.ceiling("ceiling fan", x, y)


def _living(b: Builder) -> None:
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
            x, y = local_place(anchor, side * (object_size(anchor.row)[0] / 2 + 0.75), b.uniform(-0.5, -0.1))
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


def _along(b: Builder, walls: list[int], item: Item) -> float:
    """Return where along the first of ``walls`` an object faces ``item``, 0 to 1."""
    if not walls:
        return 0.5
    wall = b.walls[walls[0]]
    return ((item.x - wall.start[0]) * wall.along[0] + (item.y - wall.start[1]) * wall.along[1]) / wall.length


def _study(b: Builder) -> None:
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


def _lower(height: float) -> Callable[[int], bool]:
    return lambda row: object_size(row)[2] < height


def _kitchen(b: Builder) -> None:
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
        row = b.pick(role, narrower(wall.length - s - 0.02))
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
            above = b.pick("hood" if role == "stove" else "upper cabinet", narrower(width + 0.45))
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


def _dining(b: Builder) -> None:
    w, d, _ = b.plan.size
    table = None
    for _ in range(TRIES):
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


def _bathroom(b: Builder) -> None:
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
        x, y = local_place(basin, 0.0, -object_size(basin.row)[1] / 2 - 0.4)
        b.rug(x, y, 0.4, 0.3)


def _hobby(b: Builder) -> None:
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

    furnish: Callable[[Builder], None]
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
    if isinstance(max_objects, bool) or not isinstance(max_objects, Integral) or max_objects < 4:
        raise RoomError(f"room: max_objects must be a whole number of at least 4, got {max_objects!r}")
    if size is not None:
        size = _checked_size(size)
    failure: RoomError | None = None
    for _ in range(12):
        plan = _shape(rng, kind, size)
        builder = Builder(plan, rng, max_objects)
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


def _checked_size(size: Any) -> tuple[float, float, float]:
    good = isinstance(size, Sequence) and not isinstance(size, str) and len(size) == 3 and all(isinstance(side, Real) for side in size)
    if not good or not (all(1 <= side <= 20 for side in size[:2]) and 2 <= size[2] <= 6):
        raise RoomError(f"room: size must be three numbers, 1 to 20 m along x and y and 2 to 6 m along z, got {size!r}")
    x, y, z = map(float, size)
    return x, y, z


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
        wide, deep = float(rng.uniform(0.22, 0.38)) * w, float(rng.uniform(0.22, 0.38)) * d
        x0 = 0.0 if rng.random() < 0.5 else round(w - wide, 2)
        y0 = 0.0 if rng.random() < 0.5 else round(d - deep, 2)
        notch = (x0, y0, w if x0 else round(wide, 2), d if y0 else round(deep, 2))
    return Plan(kind, size, notch)


def _openings(b: Builder) -> None:
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


def _finish(b: Builder) -> None:
    """Add what every room has: plants, things left lying, a lamp, radiators and pictures."""
    plan = b.plan
    w, d, h = plan.size
    target = int(b.rng.integers(8, 14)) if plan.kind != "bathroom" else 7
    if plan.kind not in ("bathroom", "hobby room"):
        for _ in range(int(b.rng.integers(1, 3))):
            b.free("floor plant", near_wall=True)
    for window in plan.windows:
        if window.z0 > 0.75 and b.chance(0.6):
            row = b.pick("radiator", _lower(window.z0 - 0.15))
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


def _pictures(b: Builder) -> None:
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
