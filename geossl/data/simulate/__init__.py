"""Simulated data: furnished rooms made of the embedded real objects, and particle events in liquid argon.

room = build_room(seed=0, number=3)
view = sample_view(room, room.rng(0))          # RGB, exact depth, instances
pair = sample_pair(room, room.rng(1))          # with flow, overlap and relative pose
cloud, instance = fuse_views([view], 20000, room.rng(2))
radiance_grid(room).save(Path("grids"), "room_3")
event = simulate_event(seed=0, number=3)
"""

from geossl.data.simulate.catalogue import room_classes
from geossl.data.simulate.furnish import KINDS
from geossl.data.simulate.grids import RadianceGrid, radiance_grid
from geossl.data.simulate.lartpc import LArTPCOptions, simulate_event
from geossl.data.simulate.room_plan import Plan, RoomError
from geossl.data.simulate.rooms import Room, View, build_room
from geossl.data.simulate.sensor import SensorOptions, fuse_views, sense
from geossl.data.simulate.surfels import Surfels, object_surfels
from geossl.data.simulate.views import ImagePair, ViewOptions, camera_path, make_pair, optical_flow, sample_pair, sample_view, sample_views

__all__ = [
    "KINDS",
    "ImagePair",
    "LArTPCOptions",
    "Plan",
    "RadianceGrid",
    "Room",
    "RoomError",
    "SensorOptions",
    "Surfels",
    "View",
    "ViewOptions",
    "build_room",
    "camera_path",
    "fuse_views",
    "make_pair",
    "object_surfels",
    "optical_flow",
    "radiance_grid",
    "room_classes",
    "sample_pair",
    "sample_view",
    "sample_views",
    "sense",
    "simulate_event",
]
