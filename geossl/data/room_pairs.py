"""Pairs of pictures of simulated rooms, rendered when they are first asked for and kept: with depth, normals, flow or disparity."""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections import OrderedDict
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from geossl.config import require, to_dict
from geossl.data.dataset import DATASETS
from geossl.data.files import atomic_write, cache_folder, read_npz
from geossl.data.image_augment import crop, crop_corner, jitter_pair
from geossl.data.pairs import PairDataConfig, PairDataset
from geossl.data.rooms import TEST_ROOM, one_thread, rooms_version
from geossl.data.sample import ImageSample
from geossl.data.simulate import KINDS, Room, View, ViewOptions, build_room, sample_pair, sample_view
from geossl.errors import DataError
from geossl.geometry import Cameras, back_project, normalize_images

log = logging.getLogger("geossl")

Truth = Literal["none", "depth", "normals", "flow", "disparity"]
TRUTH_CHANNELS: dict[Truth, int] = {"none": 0, "depth": 1, "normals": 3, "flow": 2, "disparity": 1}

_PAIR = 1000  # what a room's generator is for: pair n takes _PAIR + n, far from the uses in rooms.py and room_shards.py


@dataclass(kw_only=True)
class RoomPairsConfig(PairDataConfig):
    """Pairs of pictures of simulated furnished rooms; every room is another, and the same number always the same.

    The truth is that of ``image``: ``depth`` in metres along the optical axis, ``normals`` of unit length in the camera's frame (x right, y
    down, z away; towards the camera), ``flow`` in pixels to the same place in ``reference`` (x, y), ``disparity`` in pixels, where
    ``reference`` was taken ``baseline`` metres to the right: x in it is x - disparity. It is infinite where not known: where surfaces
    mix in a pixel and, of flow, where ``reference`` does not show the place.

    Without truth the two windows of a training sample are drawn apart, as for all pairs; with truth both are the same window, so that the
    truth stays what it is.
    """

    name: str = "room_pairs"
    rooms: int = 200
    """Rooms of the training part."""
    test_rooms: int = 20
    """Rooms of the test part; none of them is in the training part."""
    pairs_per_room: int = 8
    """Pairs of every room, all rendered when the first of them is asked for."""
    seed: int = 0
    """Another seed gives other rooms."""
    kind: str | None = None
    """Only rooms of one kind, for example ``living room``; None mixes all."""
    size: int = 256
    """Rows and columns of the pictures; windows of ``crop`` are cut out of them."""
    resize: int | None = None
    """Not used: pictures are rendered in their size."""
    fov: float = 60.0
    """Horizontal field of view in degrees."""
    overlap: tuple[float, float] = (0.4, 0.9)
    """Least and largest part of a picture that the other one shows too."""
    truth: Truth = "none"
    """What is to be predicted."""
    views: int = 2
    """2 gives pairs; 1 leaves ``reference`` out, for depth and normals of single images."""
    baseline: tuple[float, float] = (0.05, 0.2)
    """Least and largest distance of the two cameras for disparity, in metres, drawn for each pair."""
    cache: Path | None = None
    """Folder where pictures are kept once rendered; None takes ``room_pairs`` in the package's own (see ``GEOSSL_CACHE``)."""
    keep: int = 256
    """Megabytes of rooms kept in memory, in every process that loads data."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("rooms", "test_rooms", "pairs_per_room"):
            require(getattr(self, name) >= 1, name, "must be at least 1", getattr(self, name))
        require(self.rooms < TEST_ROOM, "rooms", f"must be less than {TEST_ROOM}", self.rooms)
        require(self.seed >= 0, "seed", "must not be negative", self.seed)
        require(self.kind is None or self.kind in KINDS, "kind", f"must be one of {', '.join(KINDS)}", self.kind)
        require(self.size >= self.crop, "size", f"must be at least crop ({self.crop})", self.size)
        require(self.resize is None, "resize", "must be None: pictures are rendered with `size` pixels", self.resize)
        low, high = self.overlap
        require(0.0 <= low < high <= 1.0, "overlap", "must hold 0 <= low < high <= 1", self.overlap)
        require(self.truth in TRUTH_CHANNELS, "truth", f"must be one of {', '.join(TRUTH_CHANNELS)}", self.truth)
        require(self.views in (1, 2), "views", "must be 1 or 2", self.views)
        single = self.truth in ("depth", "normals")
        require(self.views == 2 or single, "views", f"must be 2 with truth={self.truth}, which needs two images", self.views)
        low, high = self.baseline
        require(0.0 < low <= high, "baseline", "must hold 0 < low <= high", self.baseline)
        require(self.keep >= 0, "keep", "must not be negative", self.keep)
        self.view_options()

    def view_options(self) -> ViewOptions:
        """Return size and lens of the pictures."""
        return ViewOptions(width=self.size, height=self.size, fov=self.fov)

    def describe(self) -> str:
        """Return what a sample is, in words."""
        what = "pairs of pictures" if self.views == 2 else "pictures"
        truth = "" if self.truth == "none" else f" with {self.truth}"
        return f"{what} of simulated rooms, {self.crop} x {self.crop} pixels{truth}"

    def build(self, split: str = "train") -> RoomPairsDataset:
        """Make the data set of ``split``: ``train`` or ``test``."""
        return RoomPairsDataset(self, split)


@DATASETS.register
def room_pairs() -> RoomPairsConfig:
    """Pairs of pictures of simulated rooms; needs no files."""
    return RoomPairsConfig()


class RoomPairsDataset(PairDataset):
    """See :class:`RoomPairsConfig`. Pair ``n`` of room ``r`` is row ``r * pairs_per_room + n``."""

    config: RoomPairsConfig

    def __init__(self, config: RoomPairsConfig, split: str) -> None:
        if split not in ("train", "test"):
            raise DataError(f"room_pairs: unknown split {split!r}; choose one of train, test")
        self._first = TEST_ROOM if split == "test" else 0
        self._kept: OrderedDict[int, dict[str, np.ndarray]] = OrderedDict()
        shapes = ("pairs_per_room", "seed", "kind", "size", "fov", "overlap", "truth", "views", "baseline")
        made_from = {key: value for key, value in to_dict(config).items() if key in shapes}
        text = json.dumps({"version": rooms_version(), "file": _own_version(), **made_from}, sort_keys=True, default=str)
        self._folder = (config.cache or cache_folder() / "room_pairs") / f"pairs-{hashlib.sha256(text.encode()).hexdigest()[:16]}"
        rooms = config.test_rooms if split == "test" else config.rooms
        super().__init__(config, rooms * config.pairs_per_room)

    def source(self, row: int) -> str:
        """Return what an error message calls pair ``row``."""
        room, pair = divmod(row, self.config.pairs_per_room)
        return f"room_pairs: pair {pair} of room {self._first + room} of seed {self.config.seed}"

    def read(self, row: int) -> tuple[Tensor, Tensor]:
        """Return the pictures of pair ``row``, ``[3, size, size]`` uint8 (twice the same with ``views=1``)."""
        images = self._pair(row)["images"]
        return torch.from_numpy(images[0]), torch.from_numpy(images[-1])

    def truth(self, row: int) -> Tensor | None:
        """Return the truth of the whole first picture, ``[C, size, size]`` float32, infinite where unknown; None with truth=none."""
        return None if self.config.truth == "none" else torch.from_numpy(self._pair(row)["truth"])

    def room(self, row: int) -> Room:
        """Build the room of pair ``row``."""
        return build_room(self.config.seed, self._first + row // self.config.pairs_per_room, kind=self.config.kind)

    def _sample(self, row: int, rng: np.random.Generator | None) -> ImageSample:
        config, truth = self.config, self.truth(row)
        if truth is None:
            return super()._sample(row, rng)
        size = config.crop, config.crop
        corner = crop_corner((config.size, config.size), size, rng, self.source(row))
        first, second = (crop(image, corner, size).float() / 255 for image in self.read(row))
        reference = second if config.views == 2 else None
        if rng is not None:
            first, reference = jitter_pair(first, reference, rng, config.augment)
        reference = None if reference is None else normalize_images(reference)
        return ImageSample(normalize_images(first), row, reference, crop(truth, corner, size).clone())

    def _pair(self, row: int) -> dict[str, np.ndarray]:
        """Return ``images [views, 3, size, size]`` uint8 and ``truth [C, size, size]`` of one pair."""
        number, pair = divmod(row, self.config.pairs_per_room)
        return {name: values[pair] for name, values in self._room(number).items()}

    def _room(self, number: int) -> dict[str, np.ndarray]:
        """Return all pairs of a room: in memory, on disk, or rendered now."""
        if number in self._kept:
            self._kept.move_to_end(number)
            return self._kept[number]
        path = self._folder / f"{self._first + number}.npz"
        arrays = _read_kept(path)
        if arrays is None:
            with one_thread():
                arrays = render_pairs(self.room(number * self.config.pairs_per_room), self.config)
            parts: dict[str, Any] = dict(arrays)
            atomic_write(path, lambda file: np.savez_compressed(file, **parts))
        self._kept[number] = arrays
        bytes_each = sum(values.nbytes for values in arrays.values())
        while len(self._kept) > 1 and len(self._kept) * bytes_each > self.config.keep * 1_000_000:
            self._kept.popitem(last=False)
        return arrays

    def __getstate__(self) -> dict[str, Any]:
        """Pictures kept in memory do not travel to workers."""
        return {**self.__dict__, "_kept": OrderedDict()}


def _read_kept(path: Path) -> dict[str, np.ndarray] | None:
    """Read a kept room; None where there is none, or where it is damaged, which is told: it can be rendered again."""
    if not path.exists():
        return None
    try:
        return read_npz(path)
    except DataError as error:
        log.warning("%s; rendering the room again", error)
        return None


def _own_version() -> str:
    return hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:16]


def render_pairs(room: Room, config: RoomPairsConfig) -> dict[str, np.ndarray]:
    """Render all pairs of a room.

    Returns:
        ``images [pairs, views, 3, size, size]`` uint8 and, unless ``config.truth`` is ``none``, ``truth [pairs, C, size, size]`` float32.
    """
    images, truths = [], []
    for number in range(config.pairs_per_room):
        views, truth = _render_pair(room, room.rng(_PAIR + number), config)
        images.append(torch.stack([(view.rgb.permute(2, 0, 1) * 255).round().byte() for view in views]))
        truths.append(truth)
    arrays = {"images": torch.stack(images).numpy()}
    if config.truth != "none":
        arrays["truth"] = torch.stack([truth for truth in truths if truth is not None]).numpy()
    return arrays


def _render_pair(room: Room, rng: np.random.Generator, config: RoomPairsConfig) -> tuple[list[View], Tensor | None]:
    """Return one or two views and the truth of the first."""
    options = config.view_options()
    if config.views == 1:
        first = sample_view(room, rng, options)
        return [first], depth_truth(first) if config.truth == "depth" else normals_truth(first)
    if config.truth == "disparity":
        first = sample_view(room, rng, options)
        baseline = math.exp(rng.uniform(*np.log(config.baseline)))
        disparity = float(first.camera.intrinsics[0, 0]) * baseline / depth_truth(first)
        return [first, room.render(moved_right(first.camera, baseline))], torch.where(first.valid, disparity, math.inf)
    pair = sample_pair(room, rng, options, config.overlap)
    truth = None
    if config.truth == "depth":
        truth = depth_truth(pair.first)
    elif config.truth == "normals":
        truth = normals_truth(pair.first)
    elif config.truth == "flow":
        truth = torch.where(pair.covisible, pair.flow.permute(2, 0, 1), math.inf)
    return [pair.first, pair.second], truth


def moved_right(camera: Cameras, distance: float) -> Cameras:
    """Return the camera moved ``distance`` to its right: the second one of a rectified stereo pair."""
    pose = camera.world_to_cam.clone()
    pose[0, 3] -= distance
    return replace(camera, world_to_cam=pose)


def depth_truth(view: View) -> Tensor:
    """Return the depth of a view, ``[1, H, W]``, infinite where it is not sure."""
    return torch.where(view.valid & (view.depth > 0), view.depth, math.inf)[None]


def normals_truth(view: View) -> Tensor:
    """Return the surface normals of a view in its camera's frame, ``[3, H, W]``, infinite where they are not known."""
    camera = view.camera
    return normals_from_depth(torch.where(view.valid, view.depth, 0.0), camera.intrinsics)


def normals_from_depth(depth: Tensor, intrinsics: Tensor, bend: float = 0.02) -> Tensor:
    """Return the normals of the surface that a depth image shows.

    They are the cross product of the differences to the left and right, and to the upper and lower neighbours, which is exact for planes.

    Args:
        depth: ``[H, W]``, along the optical axis; 0 where unknown.
        intrinsics: ``[3, 3]``.
        bend: Inverse depth is linear across a plane. Where it departs from that by more than this part of itself, from one neighbour over
            the pixel to the other, the surface ends or folds.

    Returns:
        ``[3, H, W]``, unit length, in the camera's frame and towards it; infinite at the border, where depth is unknown and where a
        neighbour is unknown or on another surface.
    """
    points = back_project(depth, intrinsics).permute(2, 0, 1)
    normals = torch.full_like(points, math.inf)
    across, down = points[:, 1:-1, 2:] - points[:, 1:-1, :-2], points[:, 2:, 1:-1] - points[:, :-2, 1:-1]
    inner = torch.linalg.cross(down, across, dim=0)
    inner = inner / inner.norm(dim=0, keepdim=True).clamp(min=1e-12)
    inner = torch.where((inner * points[:, 1:-1, 1:-1]).sum(0) > 0, -inner, inner)
    inverse = 1 / depth  # infinite where unknown, which no comparison passes
    middle = inverse[1:-1, 1:-1]
    known = middle.isfinite()
    for one, other in ((inverse[1:-1, 2:], inverse[1:-1, :-2]), (inverse[2:, 1:-1], inverse[:-2, 1:-1])):
        known = known & ((one + other - 2 * middle).abs() <= bend * middle)
    normals[:, 1:-1, 1:-1] = torch.where(known, inner, math.inf)
    return normals
