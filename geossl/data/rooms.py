"""Furnished rooms as a data set: made on the fly, or written once to shards."""

from __future__ import annotations

import functools
import hashlib
import json
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

import geossl
from geossl.config import require, to_dict
from geossl.data import simulate
from geossl.data.files import atomic_write, read_npz
from geossl.data.scene import SCENES, TENSORS, SceneDataConfig, SceneDataset, SceneSample
from geossl.data.simulate import KINDS, Room, SensorOptions, View, ViewOptions, build_room, fuse_views, room_classes, sample_views, sense
from geossl.data.simulate.surfels import surfels_version
from geossl.errors import DataError

TEST_ROOM = 1 << 30
"""Number of the first test room: no training set is that long."""
_VIEWS, _NOISE, _CLOUD = 0, 1, 2  # what a room's generator is for


@functools.cache
def rooms_version() -> str:
    """Return what the room of a seed depends on, as a hash: the version, the simulator's sources and the embedded objects."""
    digest = hashlib.sha256(f"{geossl.__version__} {surfels_version()}".encode())
    for path in (*sorted(Path(simulate.__file__).parent.glob("*.py")), Path(__file__)):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


@dataclass(kw_only=True)
class RoomsConfig(SceneDataConfig):
    """Simulated furnished rooms: every room is another, and the same number always the same."""

    name: str = "rooms"
    width: int | None = 224
    height: int | None = 224
    count: int = 1000
    """Rooms of the training part."""
    test_count: int = 100
    """Rooms of the test part; none of them is in the training part."""
    seed: int = 0
    """Another seed gives other rooms."""
    kind: str | None = None
    """Only rooms of one kind, for example ``living room``; None mixes all."""
    fov: float = 72.0
    """Horizontal field of view in degrees."""
    noisy: bool = False
    """Give images and depth the faults of a cheap camera (the instance images stay clean)."""
    sensor: SensorOptions = field(default_factory=SensorOptions)
    """Which faults those are."""
    keep: int = 32
    """Samples kept in memory."""
    cache: Path | None = None
    """Folder where samples are kept once made; None keeps none on disk."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.width is not None, "width", "must be given: rooms have no size of their own", self.width)
        require(self.count >= 1 and self.count < TEST_ROOM, "count", f"must lie in 1..{TEST_ROOM - 1}", self.count)
        require(self.test_count >= 1, "test_count", "must be at least 1", self.test_count)
        require(self.seed >= 0, "seed", "must not be negative", self.seed)
        require(self.kind is None or self.kind in KINDS, "kind", f"must be one of {', '.join(KINDS)}", self.kind)
        require(self.keep >= 0, "keep", "must not be negative", self.keep)
        self.view_options()

    def view_options(self) -> ViewOptions:
        """Return size and lens of the images."""
        return ViewOptions(width=self.width or 224, height=self.height or 224, fov=self.fov)

    def build(self, split: str = "train") -> RoomsDataset:
        """Make the data set of ``split``: ``train`` or ``test``."""
        return RoomsDataset(self, split)


@SCENES.register
def rooms() -> RoomsConfig:
    """Simulated furnished rooms."""
    return RoomsConfig()


class RoomsDataset(SceneDataset):
    """See :class:`RoomsConfig`."""

    def __init__(self, config: RoomsConfig, split: str) -> None:
        if split not in ("train", "test"):
            raise DataError(f"rooms: unknown split {split!r}; choose one of train, test")
        self._first = TEST_ROOM if split == "test" else 0
        self._kept: OrderedDict[int, SceneSample] = OrderedDict()
        made_from = {key: value for key, value in to_dict(config).items() if key not in ("count", "test_count", "keep", "cache", "name")}
        text = json.dumps({"version": rooms_version(), **made_from}, sort_keys=True, default=str)
        self._key = hashlib.sha256(text.encode()).hexdigest()[:16]
        super().__init__(config, config.test_count if split == "test" else config.count, room_classes())

    def room(self, row: int) -> Room:
        """Build the room of sample ``row``."""
        config: Any = self.config
        return build_room(config.seed, self._first + row, kind=config.kind)

    def read(self, row: int) -> SceneSample:
        """Return sample ``row``, made now or kept from before."""
        config: Any = self.config
        if row in self._kept:
            self._kept.move_to_end(row)
            return self._kept[row]
        path = None if config.cache is None else config.cache / f"rooms-{self._key}" / f"{self._first + row}.npz"
        if path is not None and path.exists():
            sample = load_sample(path, row, self.classes)
        else:
            with one_thread():
                sample = room_sample(self.room(row), config, row)
            if path is not None:
                save_sample(path, sample)
        if config.keep:
            self._kept[row] = sample
            while len(self._kept) > config.keep:
                self._kept.popitem(last=False)
        return sample

    def __getstate__(self) -> dict[str, Any]:
        """Samples kept in memory do not travel to workers."""
        return {**self.__dict__, "_kept": OrderedDict()}


@contextmanager
def one_thread() -> Iterator[None]:
    """Run torch with one thread: processes are what runs side by side here."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def room_views(room: Room, config: RoomsConfig) -> tuple[list[View], list[View]]:
    """Return the clean views of a room, and those the configuration asks for (the same where it wants no noise)."""
    clean = sample_views(room, config.views, room.rng(_VIEWS), config.view_options())
    if not config.noisy:
        return clean, clean
    rng = room.rng(_NOISE)
    return clean, [sense(view, rng, config.sensor) for view in clean]


def room_sample(room: Room, config: RoomsConfig, row: int = 0) -> SceneSample:
    """Return the sample that a configuration makes of a room."""
    clean, views = room_views(room, config)
    points = colors = point_instance = None
    if config.points:
        cloud, point_instance = fuse_views(views, config.points, room.rng(_CLOUD))
        points, colors = cloud.coord, cloud.feats
    return SceneSample(
        image=torch.stack([view.rgb for view in views]).permute(0, 3, 1, 2).contiguous(),
        intrinsics=torch.stack([view.camera.intrinsics for view in views]),
        world_to_cam=torch.stack([view.camera.world_to_cam for view in views]),
        depth=torch.stack([view.depth for view in views]),
        valid=torch.stack([view.valid for view in views]),
        instance=torch.stack([view.instance for view in clean]),
        points=points, colors=colors, point_instance=point_instance, boxes=room.boxes, labels=room.labels,
        visible=torch.stack([room.visible_counts(view) for view in clean]).sum(0), classes=room.classes, index=row,
        source=f"room {room.number} of seed {room.seed}",
    )  # fmt: skip


def save_sample(path: Path, sample: SceneSample) -> None:
    """Write the tensors of a sample to an npz, losslessly."""
    arrays: dict[str, Any] = {name: value.numpy() for name in (*TENSORS, "visible") if (value := getattr(sample, name)) is not None}
    arrays["source"] = np.array(sample.source)
    atomic_write(path, lambda file: np.savez_compressed(file, **arrays))


def load_sample(path: Path, row: int, classes: tuple[str, ...]) -> SceneSample:
    """Read what :func:`save_sample` wrote.

    Raises:
        DataError: the file is damaged or of another kind; the message names it.
    """
    arrays = read_npz(path)
    missing = [name for name in ("image", "intrinsics", "world_to_cam") if name not in arrays]
    if missing:
        raise DataError(f"{path}: has no {', '.join(missing)}; it is not a kept scene")
    tensors = {name: torch.from_numpy(arrays[name]) for name in (*TENSORS, "visible") if name in arrays}
    return replace(
        SceneSample(tensors["image"], tensors["intrinsics"], tensors["world_to_cam"]), **tensors, classes=classes, index=row,
        source=str(arrays.get("source", path)),
    )  # fmt: skip
