"""Rooms written to shards: webdataset tars (or one npz a room) with a manifest; the same bytes for a seed, whatever made them.

A set is a folder::

    index.json            format, settings, classes, and size and SHA-256 of every file; "complete" when all rooms are there
    rooms-00000.tar       rooms 0 .. rooms_per_shard - 1; of room 3, for example:
        room_00000003.json            seed, kind, size, cameras, boxes, labels, names, visible pixels, pairs
        room_00000003.rgb_000.png     view 0 (or .jpg)
        room_00000003.depth_000.png   16 bit, millimetres, 0 where unknown
        room_00000003.instance_000.png  8 bit: row of the box + 1, 0 for the room itself, 255 where nothing is seen
        room_00000003.valid_000.png   8 bit, 255 where depth is sure
        room_00000003.points.npz      coord, color, instance of the fused cloud
        room_00000003.pair_000_1.png, pair_000_2.png, pair_000.npz   a pair: flow, covisible (both directions), depth, relative pose
        room_00000003.grid.npz, room_00000003.obb.npy   radiance and density in NeRF-MAE's layout, boxes in voxels
    rooms-00000.json      what the manifest says of this shard; there when the shard is whole
    contact_sheet.png     the first view of the first rooms
"""

from __future__ import annotations

import io
import json
import re
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from geossl.config import require, to_dict
from geossl.data.files import atomic_write, existing, read_json, sha256
from geossl.data.objects import load_objects
from geossl.data.rooms import TEST_ROOM, RoomsConfig, one_thread, room_sample, rooms_version
from geossl.data.scene import SCENES, SceneDataConfig, SceneDataset, SceneSample
from geossl.data.simulate import Room, SensorOptions, build_room, radiance_grid, room_classes, sample_pair
from geossl.data.workers import worker_map
from geossl.errors import DataError

NAME = "geossl-rooms"
_NAMES = r"(rooms-\d{5,}\.tar|room_\d{8,}\.npz)"  # shards
_LEFT = re.compile(
    r"\.(index\.json|contact_sheet\.png|(rooms-\d{5,}|room_\d{8,})\.(tar|npz|json))\.\d+\.tmp"
)  # half-written by a killed run
_PAIRS = 3  # what a room's generator is for, after those in rooms.py


@dataclass(kw_only=True)
class RoomShardOptions:
    """What is written of every room."""

    count: int = 100
    """Rooms."""
    views: int = 8
    """Images of a room."""
    points: int = 20000
    """Points of its fused cloud; 0 writes none."""
    pairs: int = 0
    """Image pairs of a room, with flow."""
    grid: int = 0
    """Voxels along the longest axis of its radiance grid; 0 writes none."""
    seed: int = 0
    """Another seed gives other rooms."""
    first: int = 0
    """Number of the first room."""
    width: int = 224
    """Columns of an image."""
    height: int = 224
    """Rows of an image."""
    fov: float = 72.0
    """Horizontal field of view in degrees."""
    kind: str | None = None
    """Only rooms of one kind; None mixes all."""
    noisy: bool = False
    """Give images and depth the faults of a cheap camera."""
    sensor: SensorOptions = field(default_factory=SensorOptions)
    """Which faults those are."""
    image: Literal["png", "jpg"] = "png"
    """How images are stored: exactly, or as JPEG of quality 95."""
    layout: Literal["webdataset", "npz"] = "webdataset"
    """Tars of many rooms, or one npz a room."""
    rooms_per_shard: int = 32
    """Rooms of a tar: what an interruption can lose."""
    workers: int = 1
    """Processes that build rooms; the files are the same for any number."""

    def __post_init__(self) -> None:
        for name in ("count", "rooms_per_shard", "workers", "views"):
            require(getattr(self, name) >= 1, name, "must be at least 1", getattr(self, name))
        for name in ("points", "pairs", "first"):
            require(getattr(self, name) >= 0, name, "must not be negative", getattr(self, name))
        last = self.first + self.count - 1
        require(last < TEST_ROOM, "first", f"must leave the last room below {TEST_ROOM}, where the test part begins", self.first)
        require(self.grid == 0 or self.grid >= 8, "grid", "must be 0 or at least 8", self.grid)
        self.rooms_config()

    def rooms_config(self) -> RoomsConfig:
        """Return the configuration that makes these rooms on the fly."""
        return RoomsConfig(
            views=self.views, points=self.points, width=self.width, height=self.height, seed=self.seed, fov=self.fov, kind=self.kind,
            noisy=self.noisy, sensor=self.sensor,
        )  # fmt: skip


def write_rooms(out: Path, options: RoomShardOptions, progress: Callable[[int, int], None] = lambda done, total: None) -> dict[str, Any]:
    """Write rooms to ``out``, or continue a set that was interrupted.

    Args:
        out: Folder of the set.
        options: What is written.
        progress: Called after each shard with the rooms done and those there are.

    Returns:
        The content of ``index.json``.

    Raises:
        DataError: ``out`` holds something else, more rooms than ``options.count``, or a set made with other settings.
    """
    settings = {key: value for key, value in to_dict(options).items() if key not in ("count", "workers")}
    settings = json.loads(json.dumps({"version": rooms_version(), **settings}, default=str))
    _start(out, settings, options.count)
    per_shard = options.rooms_per_shard if options.layout == "webdataset" else 1
    tasks = [
        (out, options, settings, number, range(first, min(first + per_shard, options.count)))
        for number, first in enumerate(range(0, options.count, per_shard))
    ]
    shards, done = [], 0
    with worker_map(min(options.workers, len(tasks))) as run:
        for info in run(_write_shard, tasks):
            shards.append(info)
            done += info["rooms"]
            progress(done, options.count)
    index = _write_index(out, settings, complete=True, count=options.count, shards=shards)
    _write_sheet(out, options, shards)
    return index


def _start(out: Path, settings: dict[str, Any], count: int) -> None:
    """Begin a set, or check that the one that was begun has the same settings and no more rooms: nothing finished is ever deleted."""
    if out.exists() and not out.is_dir():
        raise DataError(f"{out}: is a file; rooms are written to a folder, choose another name")
    index = out / "index.json"
    if index.exists():
        found = _read_index(index)
        old = found["settings"]
        changed = [f"{key}: {old.get(key)!r} -> {value!r}" for key, value in settings.items() if old.get(key) != value]
        if changed:
            raise DataError(f"{out}: holds rooms made with other settings ({'; '.join(changed)}); remove it or choose another folder")
        if found["count"] > count:
            raise DataError(f"{out}: was begun with {found['count']} rooms, more than count={count}; use another folder for fewer rooms")
    elif out.exists() and any(out.iterdir()):
        raise DataError(f"{out}: is not empty and holds no set of rooms; choose another folder")
    _write_index(out, settings, complete=False, count=count, shards=[])
    for left in out.iterdir():
        if _LEFT.fullmatch(left.name) and left.is_file():
            left.unlink()


def _read_index(path: Path, complete: bool = False) -> dict[str, Any]:
    """Read and check an ``index.json``; ``complete`` refuses that of an interrupted run."""
    index = read_json(existing(path, "index of rooms (made by tools/prepare_data.py rooms)"))
    if index.get("format") != NAME:
        raise DataError(f"{path}: expected the index of {NAME}, got {index.get('format')!r}")
    for name, kind in (("settings", dict), ("classes", list), ("shards", list), ("count", int)):
        if not isinstance(index.get(name), kind):
            raise DataError(f"{path}: is damaged: {name} must be a {kind.__name__}, got {index.get(name)!r}")
    for shard in index["shards"]:
        good = isinstance(shard, dict) and all(isinstance(shard.get(name), int) for name in ("rooms", "bytes"))
        if not good or not re.fullmatch(_NAMES, str(shard.get("file"))) or not isinstance(shard.get("sha256"), str):
            raise DataError(f"{path}: is damaged: a shard must have file, rooms, bytes and sha256, got {shard!r}")
    if complete and not index.get("complete"):
        raise DataError(f"{path}: writing the rooms was interrupted; run the same prepare_data command again to finish it")
    return index


def _write_index(out: Path, settings: dict[str, Any], **content: Any) -> dict[str, Any]:
    index = {"format": NAME, "classes": list(room_classes()), "settings": settings, **content}
    atomic_write(out / "index.json", lambda file: file.write(json.dumps(index, indent=1).encode()))
    return index


def _write_shard(task: tuple[Path, RoomShardOptions, dict[str, Any], int, range]) -> dict[str, Any]:
    """Write one shard unless it is there already; return what the manifest says of it."""
    out, options, settings, number, rows = task
    tar = options.layout == "webdataset"
    path = out / (f"rooms-{number:05d}.tar" if tar else f"room_{options.first + rows[0]:08d}.npz")
    note = path.with_suffix(".json")
    if note.exists() and path.exists():
        info = read_json(note)
        same = info.get("rooms") == len(rows) and info.get("settings") == settings and path.stat().st_size == info.get("bytes")
        if same and info.get("file") == path.name and isinstance(info.get("sha256"), str):
            return {key: info[key] for key in ("file", "rooms", "bytes", "sha256")}
    with one_thread():
        if tar:
            atomic_write(path, partial(_write_tar, options=options, rows=rows))
        else:
            arrays = _arrays(dict(room_members(options.first + rows[0], options)))
            atomic_write(path, lambda file: np.savez(file, **arrays))
    info = {"file": path.name, "rooms": len(rows), "bytes": path.stat().st_size, "sha256": sha256(path)}
    atomic_write(note, lambda file: file.write(json.dumps({**info, "settings": settings}).encode()))
    return info


def _write_tar(file: Any, options: RoomShardOptions, rows: range) -> None:
    with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for row in rows:
            number = options.first + row
            for name, data in room_members(number, options):
                member = tarfile.TarInfo(f"room_{number:08d}.{name}")
                member.size, member.mode = len(data), 0o644
                tar.addfile(member, io.BytesIO(data))


def _arrays(members: dict[str, bytes]) -> dict[str, Any]:
    """Return the members of a room as arrays: images decoded, npz files opened, text kept."""
    from PIL import Image

    arrays: dict[str, Any] = {}
    for name, data in members.items():
        stem, _, suffix = name.rpartition(".")
        if suffix == "npz":
            with np.load(io.BytesIO(data), allow_pickle=False) as inner:
                arrays |= {f"{stem}_{key}": inner[key] for key in inner.files}
        elif suffix == "npy":
            arrays[stem] = np.load(io.BytesIO(data), allow_pickle=False)
        elif suffix in ("png", "jpg"):
            Image.open(io.BytesIO(data)).verify()  # the checksums of a PNG, which decoding leaves out
            arrays[stem] = np.asarray(Image.open(io.BytesIO(data)))
        else:
            arrays["meta"] = np.frombuffer(data, dtype=np.uint8)
    return arrays


def room_members(number: int, options: RoomShardOptions) -> Iterator[tuple[str, bytes]]:
    """Yield the name and content of everything written of one room."""
    config = options.rooms_config()
    room = build_room(options.seed, number, kind=options.kind)
    sample = room_sample(room, config)
    pairs = [sample_pair(room, room.rng(_PAIRS + index), config.view_options()) for index in range(options.pairs)]
    yield "json", json.dumps(_description(room, sample, [pair.overlap for pair in pairs])).encode()
    assert sample.depth is not None
    assert sample.instance is not None
    assert sample.valid is not None
    for view in range(options.views):
        yield f"rgb_{view:03d}.{options.image}", _encode_rgb(sample.image[view].permute(1, 2, 0), options.image)
        yield f"depth_{view:03d}.png", _encode_depth(sample.depth[view])
        yield f"instance_{view:03d}.png", _encode(torch.where(sample.instance[view] < 0, 255, sample.instance[view]).byte().numpy())
        yield f"valid_{view:03d}.png", _encode(255 * sample.valid[view].byte().numpy())
    if sample.points is not None and sample.colors is not None and sample.point_instance is not None:
        color = (sample.colors * 255).round().byte().numpy()
        yield "points.npz", _npz(coord=sample.points.numpy(), color=color, instance=sample.point_instance.byte().numpy())
    for index, pair in enumerate(pairs):
        for side, view_ in enumerate((pair.first, pair.second), 1):
            yield f"pair_{index:03d}_{side}.{options.image}", _encode_rgb(view_.rgb, options.image)
        yield f"pair_{index:03d}.npz", _npz(
            flow=pair.flow.numpy(), flow_back=pair.flow_back.numpy(), covisible=pair.covisible.numpy(),
            covisible_back=pair.covisible_back.numpy(), depth=pair.first.depth.numpy(), depth_back=pair.second.depth.numpy(),
            intrinsics=pair.first.camera.intrinsics.numpy(), world_to_cam=pair.first.camera.world_to_cam.numpy(),
            world_to_cam_second=pair.second.camera.world_to_cam.numpy(), first_to_second=pair.first_to_second.numpy(),
            overlap=np.float32(pair.overlap),
        )  # fmt: skip
    if options.grid:
        grid = radiance_grid(room, options.grid)
        yield "grid.npz", _npz(**grid.arrays())
        buffer = io.BytesIO()
        np.save(buffer, grid.boxes.astype(np.float32))
        yield "obb.npy", buffer.getvalue()


def _description(room: Room, sample: SceneSample, overlaps: list[float]) -> dict[str, Any]:
    table = load_objects().table
    assert sample.visible is not None
    return {
        "seed": room.seed, "number": room.number, "kind": room.plan.kind, "size": list(room.plan.size), "notch": room.plan.notch,
        "intrinsics": sample.intrinsics.tolist(), "world_to_cam": sample.world_to_cam.tolist(), "boxes": room.boxes.tolist(),
        "labels": room.labels.tolist(), "names": [table[row]["name"] for row in room.rows.tolist()], "objects": room.rows.tolist(),
        "visible": sample.visible.tolist(), "pair_overlaps": overlaps,
    }  # fmt: skip


def _npz(**arrays: Any) -> bytes:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    return buffer.getvalue()


def _encode(pixels: np.ndarray, format: str = "PNG", **options: Any) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format, **options)
    return buffer.getvalue()


def _encode_rgb(image: Tensor, kind: str) -> bytes:
    pixels = (image * 255).round().byte().contiguous().numpy()
    return _encode(pixels) if kind == "png" else _encode(pixels, "JPEG", quality=95, subsampling=0)


def _encode_depth(depth: Tensor) -> bytes:
    return _encode((depth * 1000).round().clamp(0, 65534).numpy().astype(np.uint16))


def _write_sheet(out: Path, options: RoomShardOptions, shards: list[dict[str, Any]], limit: int = 24) -> None:
    """Write ``contact_sheet.png``: the first view of the first rooms."""
    from PIL import Image

    tiles: list[Any] = []
    for shard in shards:
        if len(tiles) >= limit:
            break
        path = out / shard["file"]
        if path.suffix == ".tar":
            with tarfile.open(path) as tar:
                names = [name for name in tar.getnames() if ".rgb_000." in name][: limit - len(tiles)]
                for name in names:
                    member = tar.extractfile(name)
                    assert member is not None
                    tiles.append(Image.open(io.BytesIO(member.read())).convert("RGB"))
        else:
            with np.load(path, allow_pickle=False) as arrays:
                tiles.append(Image.fromarray(arrays["rgb_000"]))
    columns = min(len(tiles), 6 if len(tiles) > 12 else 4)
    width, height = options.width, options.height
    sheet = Image.new("RGB", (columns * (width + 4) + 4, -(-len(tiles) // columns) * (height + 4) + 4), "white")
    for number, tile in enumerate(tiles):
        sheet.paste(tile, (4 + number % columns * (width + 4), 4 + number // columns * (height + 4)))
    atomic_write(out / "contact_sheet.png", lambda file: sheet.save(file, "PNG"))


# What decoding damaged bytes raises; Pillow's PNG reader has SyntaxError too.
_DAMAGE = (
    OSError, EOFError, ValueError, TypeError, LookupError, AttributeError, RuntimeError, OverflowError, SyntaxError, struct.error,
    tarfile.TarError, zipfile.BadZipFile, zlib.error,
)  # fmt: skip


@dataclass(kw_only=True)
class RoomShardsConfig(SceneDataConfig):
    """Rooms written by ``tools/prepare_data.py rooms``."""

    name: str = "room_shards"
    root: Path = Path("data/rooms")
    """Folder of the set."""
    views: int = 4
    """Images of a sample: the first of those stored."""
    points: int = 20000
    """Points of a sample: the first of those stored, which are in random order; 0 reads none."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.width is None, "width", "cannot be changed here: images have the size they were written in", self.width)

    def build(self, split: str = "all") -> RoomShardsDataset:
        """Make the data set; there are no parts: ``split`` is ``all``."""
        if split != "all":
            raise DataError(f"room_shards: has no parts; the split must be 'all', got {split!r} (write another set with another seed)")
        return RoomShardsDataset(self)


@SCENES.register
def room_shards() -> RoomShardsConfig:
    """Rooms from shards."""
    return RoomShardsConfig()


class RoomShardsDataset(SceneDataset):
    """See :class:`RoomShardsConfig`. Tars are read in place, any room without those before it."""

    def __init__(self, config: RoomShardsConfig) -> None:
        path = existing(config.root, "folder") / "index.json"
        index = _read_index(path, complete=True)
        settings = index["settings"]
        self.settings = settings
        for name in ("views", "points", "first"):
            if not isinstance(settings.get(name), int):
                raise DataError(f"{path}: is damaged: the setting {name} must be a number, got {settings.get(name)!r}")
        if config.views > settings["views"] or config.points > settings["points"]:
            raise DataError(
                f"{path}: rooms were written with {settings['views']} views and {settings['points']} points, "
                f"but views={config.views} and points={config.points} are asked for; lower them"
            )
        self._places: list[tuple[Path, int]] = []
        for shard in index["shards"]:
            file = existing(config.root / shard["file"], "shard")
            if file.stat().st_size != shard["bytes"]:
                raise DataError(f"{file}: has {file.stat().st_size} bytes, the index says {shard['bytes']}; remove it and write it again")
            self._places += [(file, number) for number in range(shard["rooms"])]
        self._offsets: dict[Path, list[dict[str, tuple[int, int]]]] = {}
        super().__init__(config, len(self._places), tuple(index["classes"]))

    @contextmanager
    def _reading(self, row: int) -> Iterator[None]:
        """Turn whatever a damaged shard makes its decoders raise into one error that names file and room."""
        try:
            yield
        except DataError:
            raise
        except _DAMAGE as error:
            path, number = self._places[row][0], self.settings["first"] + row
            raise DataError(
                f"{path} room {number}: cannot be read, the shard is damaged ({type(error).__name__}: {error}); "
                "remove it and run the same prepare_data command again"
            ) from error

    def members(self, row: int) -> dict[str, bytes]:
        """Return everything stored of a room in a tar, by its name.

        Raises:
            DataError: the tar is damaged; the message names it and the room.
        """
        path, number = self._places[row]
        with self._reading(row):
            if path not in self._offsets:
                rooms: dict[str, dict[str, tuple[int, int]]] = {}
                with tarfile.open(path) as tar:
                    for member in tar:
                        key, _, name = member.name.partition(".")
                        rooms.setdefault(key, {})[name] = (member.offset_data, member.size)
                if len(rooms) != sum(place == path for place, _ in self._places):  # a header of zeros ends a tar early
                    raise ValueError(f"its table of contents has {len(rooms)} rooms")
                self._offsets[path] = list(rooms.values())
            result = {}
            with path.open("rb") as file:
                for name, (offset, size) in self._offsets[path][number].items():
                    file.seek(offset)
                    result[name] = file.read(size)
        return result

    def read(self, row: int) -> SceneSample:
        """Return the room of ``row``.

        Raises:
            DataError: the shard is damaged; the message names it and the room.
        """
        with self._reading(row):
            return self._sample(row)

    def _sample(self, row: int) -> SceneSample:
        config: Any = self.config
        path, _ = self._places[row]
        kinds, views = ("rgb", "depth", "instance", "valid"), range(config.views)
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as stored:
                arrays = {name: stored[name] for name in stored.files}
        else:
            wanted = {"json", *(f"{kind}_{view:03d}" for kind in kinds for view in views), *(["points"] if config.points else [])}
            members = self.members(row)
            arrays = _arrays({name: data for name, data in members.items() if name.partition(".")[0] in wanted})
        meta = json.loads(arrays["meta"].tobytes())
        stack = {kind: np.stack([arrays[f"{kind}_{view:03d}"] for view in views]) for kind in kinds}
        if len({values.shape[:3] for values in stack.values()}) > 1:
            raise ValueError(f"its images differ in size: { {kind: values.shape for kind, values in stack.items()} }")
        instance = torch.from_numpy(stack["instance"].astype(np.int64))
        has = config.points > 0
        return SceneSample(
            image=torch.from_numpy(stack["rgb"].astype(np.float32).transpose(0, 3, 1, 2).copy()) / 255,
            intrinsics=torch.tensor(meta["intrinsics"][: config.views]),
            world_to_cam=torch.tensor(meta["world_to_cam"][: config.views]),
            depth=torch.from_numpy(stack["depth"].astype(np.float32)) / 1000,
            valid=torch.from_numpy(stack["valid"] > 127),
            instance=torch.where(instance == 255, -1, instance),
            points=torch.from_numpy(arrays["points_coord"][: config.points]) if has else None,
            colors=torch.from_numpy(arrays["points_color"][: config.points].astype(np.float32)) / 255 if has else None,
            point_instance=torch.from_numpy(arrays["points_instance"][: config.points].astype(np.int64)) if has else None,
            boxes=torch.tensor(meta["boxes"], dtype=torch.float32), labels=torch.tensor(meta["labels"], dtype=torch.int64),
            visible=torch.tensor(meta["visible"], dtype=torch.int64), classes=self.classes, index=row,
            source=f"{path} room {meta['number']}",
        )  # fmt: skip

    def __getstate__(self) -> dict[str, Any]:
        """Workers read the tables of contents themselves."""
        return {**self.__dict__, "_offsets": {}}


def check_rooms(root: Path) -> int:
    """Compare every shard of a set with its checksum, and return how many there are.

    Raises:
        DataError: a file is missing or differs, or the set is not finished; the message names it.
    """
    index = _read_index(existing(root, "folder") / "index.json", complete=True)
    for shard in index["shards"]:
        path = existing(root / shard["file"])
        if sha256(path) != shard["sha256"]:
            raise DataError(f"{path}: its checksum is not that of the index; it was damaged or changed: remove it and write it again")
    return len(index["shards"])
