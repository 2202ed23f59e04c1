"""What a plan of a room consists of: outline, walls, openings, and objects of real size at their places."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import NamedTuple

from geossl.data.simulate.catalogue import object_size
from geossl.errors import DataError


class RoomError(DataError):
    """A room cannot be furnished as asked; the message says what found no place."""


class Wall(NamedTuple):
    """A straight wall: from ``start`` on along ``along``; the room lies to the left, where ``inward`` points."""

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
        kind: One of :data:`~geossl.data.simulate.KINDS`.
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
