"""Particle events as memory-mapped shards: PILArNet-M's files converted once, and read as a stream.

A set is in the form of ``shard_store``. Each shard holds events of one file::

    voxel.npy            [M, 3] int16, the voxel indices of all events of the shard one after the other
    energy.npy           [M] float32, MeV
    offsets.npy          [n + 1] int64, event i is the rows offsets[i]:offsets[i + 1] of these
    cluster.npy          [K, 5 or 6] int32, as ``Event.clusters``
    extra.npy            [K, 5] float32, as ``Event.extra`` (version 2)
    cluster_offsets.npy  [n + 1] int64, event i has the rows cluster_offsets[i]:cluster_offsets[i + 1] of these

That is 10 bytes a voxel instead of 32: the energy deposit, time, electrons and dx are left behind, which no model here reads.

An epoch visits the shards in random order and mixes the events of a few of them at a time. So a disk or a network is read piece by piece,
each piece whole, and no more than those few are mapped. The order is a function of seed and epoch: the loader finds any position at once,
and its processes share out every batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from geossl.config import require
from geossl.data.dataset import DATASETS
from geossl.data.events import Event, EventDataConfig, EventDataset
from geossl.data.pilarnet import PILArNetFile, choose_split, find_event_files
from geossl.data.shard_store import ShardArrays, begin, check_shards, finish, finished_shard, read_index, write_shard
from geossl.data.workers import worker_map
from geossl.errors import DataError

_MAPPED = 64  # shards kept mapped when all events are mixed


@dataclass(kw_only=True)
class EventShardOptions:
    """How files of events are converted."""

    min_points: int = 0
    """Leave events of fewer voxels out for good; 0 stores all, and readers leave small ones out."""
    events_per_shard: int = 1024
    """Events that make one shard: what an interruption can lose."""
    on_bad: Literal["error", "skip"] = "error"
    """An event that cannot be used ends the conversion, or is left out with a warning that counts them."""
    workers: int = 1
    """Processes that convert; the shards are the same for any number."""

    def __post_init__(self) -> None:
        require(self.min_points >= 0, "min_points", "must not be negative", self.min_points)
        require(self.events_per_shard >= 1, "events_per_shard", "must be at least 1", self.events_per_shard)
        require(self.on_bad in ("error", "skip"), "on_bad", "must be error or skip", self.on_bad)
        require(self.workers >= 1, "workers", "must be at least 1", self.workers)


@dataclass(frozen=True)
class _Task:
    """One shard to make."""

    folder: Path
    file: PILArNetFile
    rows: range
    split: str
    options: EventShardOptions

    def sources(self) -> list[Any]:
        """What tells whether a shard that is there was made of the same events."""
        status = self.file.path.stat()
        return [self.file.path.name, status.st_size, status.st_mtime_ns, self.rows.start, self.rows.stop, self.split]


def write_event_shards(
    source: Path,
    out: Path,
    options: EventShardOptions,
    progress: Callable[[int, int, int], None] = lambda done, total, skipped: None,
) -> dict[str, Any]:
    """Convert PILArNet-M files to a shard set at ``out``, or continue a conversion that was interrupted.

    Args:
        source: A file or folder, see :func:`~geossl.data.pilarnet.find_event_files`; the parts stay apart.
        out: Folder of the shard set.
        options: What is stored, and how.
        progress: Called after each shard with the events done, those there are, and those left out as bad.

    Returns:
        The content of ``index.json``.

    Raises:
        DataError: an event cannot be used (unless ``options.on_bad`` is ``skip``), the files are of both versions, or ``out`` holds
            something else.
    """
    files = [(split, PILArNetFile(path)) for split, paths in find_event_files(source).items() for path in paths]
    versions = {file.version: file.path for _, file in files}
    if len(versions) > 1:
        raise DataError(
            f"{source}: holds files of both versions ({versions[1]}, {versions[2]}), which differ in events; convert them apart"
        )
    settings = {"version": min(versions), "min_points": options.min_points, "events_per_shard": options.events_per_shard}
    begin(out, "events", settings)
    per_shard = options.events_per_shard
    pieces = [
        (split, file, range(first, min(first + per_shard, len(file)))) for split, file in files for first in range(0, len(file), per_shard)
    ]
    tasks = [_Task(out / f"shard_{number:05d}", file, rows, split, options) for number, (split, file, rows) in enumerate(pieces)]
    total, done, skipped, shards = sum(len(task.rows) for task in tasks), 0, 0, []
    with worker_map(max(1, min(options.workers, len(tasks)))) as run:
        for task, info in zip(tasks, run(_convert, tasks), strict=True):
            done, skipped = done + len(task.rows), skipped + len(info["skipped"])
            progress(done, total, skipped)
            shards.append({"folder": task.folder.name, **{key: info[key] for key in ("split", "events", "points", "skipped", "files")}})
    if not sum(shard["events"] for shard in shards):
        raise DataError(f"{source}: none of its {total} events could be used, or has min_points={options.min_points} points")
    return finish(out, "events", settings, shards)


def _convert(task: _Task) -> dict[str, Any]:
    """Write one shard unless it is there already; return what ``shard.json`` holds."""
    sources = task.sources()
    info = finished_shard(task.folder, sources)
    if info is not None and not (info["skipped"] and task.options.on_bad == "error"):
        return info
    events: list[Event] = []
    skipped: list[str] = []
    for row in task.rows:
        try:
            event = task.file.read(row)
        except DataError as error:
            if task.options.on_bad == "error":
                raise DataError(f"{error}; or leave such events out with on_bad=skip, and run this again") from error
            skipped.append(str(error))
            continue
        if len(event) >= task.options.min_points:
            events.append(event)
    columns = 5 if task.file.version == 1 else 6
    arrays = {
        "voxel": _joined([event.voxel for event in events], (0, 3), np.int16),
        "energy": _joined([event.energy for event in events], (0,), np.float32),
        "offsets": np.cumsum([0] + [len(event) for event in events], dtype=np.int64),
        "cluster": _joined([event.clusters for event in events], (0, columns), np.int32),
        "cluster_offsets": np.cumsum([0] + [len(event.clusters) for event in events], dtype=np.int64),
    }
    extras = [event.extra for event in events if event.extra is not None]
    if extras:
        arrays["extra"] = _joined(extras, (0, 5), np.float32)
    known = {"split": task.split, "events": len(events), "points": int(arrays["offsets"][-1]), "skipped": skipped}
    return write_shard(task.folder, arrays, known, sources)


def _joined(parts: list[np.ndarray], empty: tuple[int, ...], kind: Any) -> np.ndarray:
    for part in parts:
        if np.issubdtype(kind, np.integer) and part.size and not np.iinfo(kind).min <= part.min() <= part.max() <= np.iinfo(kind).max:
            raise DataError(f"events hold whole numbers from {part.min()} to {part.max()}, more than shards can keep ({np.dtype(kind)})")
    return np.concatenate([np.empty(empty, dtype=kind), *parts], dtype=kind, casting="same_kind")


@dataclass(kw_only=True)
class EventShardsConfig(EventDataConfig):
    """A shard set made by ``tools/prepare_data.py events``; its files are mapped, not loaded, so memory does not grow with it."""

    name: str = "event_shards"
    root: Path = Path("data/pilarnet_shards")
    """Folder of the shard set."""
    mix_shards: int = 8
    """Shards whose events an epoch mixes at a time, which are read piece by piece; 0 mixes all, in random access to the whole set."""
    check: bool = False
    """Compare every file with its checksum at the start (reads the whole set once)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.mix_shards >= 0, "mix_shards", "must not be negative", self.mix_shards)

    def build(self, split: str) -> EventShardsDataset:
        """Make the data set of ``split``: ``train``, ``val``, ``test`` (``val`` where there is none) or ``all``."""
        return EventShardsDataset(self, split)


@DATASETS.register
def event_shards() -> EventShardsConfig:
    """Events of PILArNet-M or of a simulation, converted once."""
    return EventShardsConfig()


class EventShardsDataset(EventDataset):
    """See :class:`EventShardsConfig`."""

    def __init__(self, config: EventShardsConfig, split: str) -> None:
        if config.check:
            check_shards(config.root)
        index = read_index(config.root, "events")
        stored = index["settings"]["min_points"]
        if config.min_points < stored:
            raise DataError(f"{config.root}: was converted with min_points={stored}; ask for at least as many, or convert again with fewer")
        parts = choose_split([shard["split"] for shard in index["shards"]], split, config.root)
        shards = [shard for shard in index["shards"] if shard["split"] in parts and shard["events"]]
        self._arrays = ShardArrays(config.root, shards, keep=config.mix_shards + 1 if config.mix_shards else _MAPPED)
        kept = [np.flatnonzero(np.diff(self._arrays(shard, "offsets")) >= config.min_points) for shard in range(len(shards))]
        counts = [len(rows) for rows in kept]
        if not sum(counts):
            total = sum(shard["events"] for shard in shards)
            raise DataError(f"{config.root}: none of the {total} events of its {split} part has min_points={config.min_points} points")
        self._extra = all("extra.npy" in shard["files"] for shard in shards)
        self._shard = np.repeat(np.arange(len(shards), dtype=np.int32), counts)
        self._event = np.concatenate(kept).astype(np.int32)
        super().__init__(config, len(self._event))

    def order(self, rng: np.random.Generator) -> np.ndarray:
        """Return the order ``[n]`` in which an epoch visits the events: shards at random, the events of ``mix_shards`` of them mixed."""
        mixed = rng.permutation(len(self))
        if not self.config.mix_shards:
            return mixed
        count = len(self._arrays.folders)
        turn = np.empty(count, dtype=np.int32)
        turn[rng.permutation(count)] = np.arange(count) // self.config.mix_shards
        return mixed[np.argsort(turn[self._shard[mixed]], kind="stable")]

    def read(self, row: int) -> Event:
        """Return event ``row`` as stored; its arrays lie in the mapped files and cannot be written into."""
        shard, event = int(self._shard[row]), int(self._event[row])
        arrays = self._arrays
        start, stop = arrays(shard, "offsets")[event : event + 2].tolist()
        first, last = arrays(shard, "cluster_offsets")[event : event + 2].tolist()
        return Event(
            voxel=arrays(shard, "voxel")[start:stop],
            energy=arrays(shard, "energy")[start:stop],
            clusters=arrays(shard, "cluster")[first:last].astype(np.int64),
            extra=arrays(shard, "extra")[first:last] if self._extra else None,
        )

    def source(self, row: int) -> str:
        """Return the shard and the event in it, counted from 0."""
        return f"{self._arrays.folders[self._shard[row]]} event {self._event[row]}"
