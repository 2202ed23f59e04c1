"""Memory-mapped shards: many clouds in a few flat files, for data sets that do not fit in memory or are slow to parse.

A set is in the form of ``shard_store``. Each shard holds::

    coord.npy    [M, 3] float32, the points of all clouds of the shard one after the other
    normal.npy   [M, 3] int8, 127 times the unit normal (where the sources have normals)
    rgb.npy      [M, 3] uint8 (where the sources have colours)
    offsets.npy  [n + 1] int64, cloud i is the rows offsets[i]:offsets[i + 1]
    label.npy    [n] int64 into classes, -1 where unlabelled
    test.npy     [n] bool, True for the clouds held out
    names.txt    the file each cloud came from
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from geossl.config import require
from geossl.data.dataset import DATASETS, PointDataConfig, PointDataset
from geossl.data.folder import SPLITS, FileList, FileOptions, find_files, read_file
from geossl.data.sample import COLUMN_NAMES, Columns, PointCloud
from geossl.data.shard_store import ShardArrays, begin, check_shards, finish, finished_shard, read_index, write_shard
from geossl.data.workers import worker_map
from geossl.errors import DataError


@dataclass(kw_only=True)
class ShardOptions:
    """How a folder of files is converted."""

    columns: Columns | Literal["auto"] = "auto"
    """What is stored of a point; ``auto`` takes what the first readable file has."""
    clouds_per_shard: int = 256
    """Files that make one shard: what an interruption can lose."""
    workers: int = 1
    """Processes that read and sample the files."""

    def __post_init__(self) -> None:
        require(self.clouds_per_shard >= 1, "clouds_per_shard", "must be at least 1", self.clouds_per_shard)
        require(self.workers >= 1, "workers", "must be at least 1", self.workers)


def write_shards(
    source: Path,
    out: Path,
    files: FileOptions,
    options: ShardOptions,
    progress: Callable[[int, int, int], None] = lambda done, total, skipped: None,
) -> dict[str, Any]:
    """Convert the clouds and meshes under ``source`` to a shard set at ``out``, or continue a conversion that was interrupted.

    Args:
        source: Folder of files, see :func:`~geossl.data.folder.find_files`.
        out: Folder of the shard set.
        files: Which files are read, and how.
        options: How they are stored.
        progress: Called after each file with the files done, those there are, and those left out.

    Returns:
        The content of ``index.json``.

    Raises:
        DataError: a file cannot be used (unless ``files.on_bad`` is ``skip``), or ``out`` holds something else.
    """
    found = find_files(source, files)
    columns = options.columns if options.columns != "auto" else _first_columns(found, files)
    # Which files there are, and in which part, is kept per shard; these decide what a shard holds.
    settings = {key: getattr(files, key) for key in ("points", "file_columns", "up", "center")}
    settings |= {"columns": columns, "clouds_per_shard": options.clouds_per_shard}
    begin(out, "clouds", settings)
    total, done, skipped, shards = len(found.names), 0, 0, []
    with worker_map(options.workers) as run:
        for number, first in enumerate(range(0, total, options.clouds_per_shard)):
            rows = range(first, min(first + options.clouds_per_shard, total))
            stamp = [_stamp(found, row) for row in rows]
            folder = out / f"shard_{number:05d}"
            info = finished_shard(folder, stamp)
            if info is None or (info["skipped"] and files.on_bad == "error"):
                clouds: list[PointCloud | str] = []
                bad = 0
                for cloud in run(_read_one, [(found.root, found.names[row], files, columns) for row in rows]):
                    if isinstance(cloud, str) and files.on_bad == "error":
                        raise DataError(
                            f"{cloud}; repair or remove the file, or leave such files out with on_bad=skip, then run this again"
                        )
                    clouds.append(cloud)
                    bad += isinstance(cloud, str)
                    progress(done + len(clouds), total, skipped + bad)
                info = _write_shard(folder, found, list(rows), clouds, stamp)
            done, skipped = done + len(rows), skipped + len(info["skipped"])
            progress(done, total, skipped)
            shards.append({"folder": folder.name, **{key: info[key] for key in ("clouds", "points", "skipped", "files")}})
    if not sum(shard["clouds"] for shard in shards):
        raise DataError(f"{source}: none of its {total} files could be used; the first: {shards[0]['skipped'][0]}")
    return finish(out, "clouds", settings, shards, classes=found.classes)


def _first_columns(found: FileList, files: FileOptions) -> Columns:
    """Return what the first readable file has."""
    for name in found.names:
        try:
            cloud = read_file(found.root, name, files, center=True)
        except DataError:
            continue  # reported when its turn comes
        present = ("xyz", *(["normal"] if cloud.normal is not None else []), *(["rgb"] if cloud.color is not None else []))
        return next(key for key, value in COLUMN_NAMES.items() if value == present)
    raise DataError(f"{found.root}: none of its {len(found.names)} files can be read; the first is {found.names[0]}")


def _stamp(found: FileList, row: int) -> list[Any]:
    """What tells whether a file is still the one that was converted, and for the same class and part."""
    status = (found.root / found.names[row]).stat()
    return [found.names[row], status.st_size, status.st_mtime_ns, int(found.labels[row]), bool(found.test[row])]


def _read_one(task: tuple[Path, str, FileOptions, Columns]) -> PointCloud | str:
    """Read one file in a worker; a file that cannot be used comes back as its message."""
    root, name, files, columns = task
    try:
        return read_file(root, name, files, center=files.center).only(columns, str(root / name))
    except DataError as error:
        return str(error)


def _write_shard(folder: Path, found: FileList, rows: list[int], clouds: list[PointCloud | str], stamp: list[Any]) -> dict[str, Any]:
    """Write one shard; return what ``shard.json`` holds."""
    good = [(row, cloud) for row, cloud in zip(rows, clouds, strict=True) if isinstance(cloud, PointCloud)]
    kept = [row for row, _ in good]
    parts: dict[str, np.ndarray] = {
        "coord": _concatenate([cloud.coord for _, cloud in good], np.float32),
        "offsets": np.cumsum([0] + [len(cloud) for _, cloud in good], dtype=np.int64),
        "label": found.labels[kept],
        "test": found.test[kept],
    }
    if any(cloud.normal is not None for _, cloud in good):
        parts["normal"] = _concatenate([np.rint(cloud.normal * 127.0) for _, cloud in good if cloud.normal is not None], np.int8)
    if any(cloud.color is not None for _, cloud in good):
        parts["rgb"] = _concatenate([np.rint(cloud.color * 255.0) for _, cloud in good if cloud.color is not None], np.uint8)
    info = {
        "clouds": len(good),
        "points": int(parts["offsets"][-1]),
        "skipped": [cloud for cloud in clouds if isinstance(cloud, str)],
    }
    return write_shard(folder, parts, info, stamp, [found.names[row] for row in kept])


def _concatenate(parts: list[np.ndarray], dtype: Any) -> np.ndarray:
    return np.concatenate(parts).astype(dtype) if parts else np.zeros((0, 3), dtype=dtype)


@dataclass(kw_only=True)
class ShardsConfig(PointDataConfig):
    """A shard set made by ``tools/prepare_data.py folder``; its files are mapped, not loaded, so memory does not grow with it."""

    name: str = "shards"
    root: Path = Path("data/my_shards")
    """Folder of the shard set."""
    check: bool = False
    """Compare every file with its checksum at the start (reads the whole set once)."""

    def build(self, split: str) -> ShardsDataset:
        """Make the data set of ``split``: ``train``, ``test`` or ``all``."""
        return ShardsDataset(self, split)


@DATASETS.register
def shards() -> ShardsConfig:
    """A user's own files, converted once."""
    return ShardsConfig()


class ShardsDataset(PointDataset):
    """See :class:`ShardsConfig`."""

    def __init__(self, config: ShardsConfig, split: str) -> None:
        if split not in SPLITS:
            raise DataError(f"shards: unknown split {split!r}; choose one of {', '.join(SPLITS)}")
        if config.check:
            check_shards(config.root)
        index = read_index(config.root, "clouds")
        self._arrays = ShardArrays(config.root, index["shards"])
        self._first = np.cumsum([0] + [shard["clouds"] for shard in index["shards"]])
        present = {"xyz", *("normal" if "normal.npy" in shard["files"] else "" for shard in index["shards"])}
        present |= {"rgb" if "rgb.npy" in shard["files"] else "" for shard in index["shards"]}
        missing = [name for name in COLUMN_NAMES[config.columns] if name not in present]
        if missing:
            raise DataError(f"{config.root}: columns={config.columns!r} asks for {' and '.join(missing)}, which these shards do not have")
        test, labels = (np.concatenate([self._arrays(shard, name) for shard in range(len(index["shards"]))]) for name in ("test", "label"))
        self.rows = np.flatnonzero({"train": ~test, "test": test, "all": np.ones(len(test), dtype=bool)}[split])
        if not len(self.rows):
            raise DataError(f"{config.root}: the {split} part is empty ({len(test)} clouds in all)")
        super().__init__(config, labels[self.rows], index["classes"])

    def _locate(self, row: int) -> tuple[int, int]:
        stored = int(self.rows[row])
        shard = int(np.searchsorted(self._first, stored, side="right")) - 1
        return shard, stored - int(self._first[shard])

    def read(self, row: int) -> PointCloud:
        """Return a copy of the stored cloud."""
        shard, cloud = self._locate(row)
        start, stop = self._arrays(shard, "offsets")[cloud : cloud + 2]
        normal = color = None
        if "normal" in self.columns:
            normal = self._arrays(shard, "normal")[start:stop].astype(np.float32)
            normal /= np.maximum(np.linalg.norm(normal, axis=1, keepdims=True), 1.0)
        if "rgb" in self.columns:
            color = self._arrays(shard, "rgb")[start:stop].astype(np.float32) / np.float32(255.0)
        return PointCloud(np.array(self._arrays(shard, "coord")[start:stop]), normal, color)

    def source(self, row: int) -> str:
        """Return the shard and the cloud in it (line of its ``names.txt``, from 0)."""
        shard, cloud = self._locate(row)
        return f"{self._arrays.folders[shard]} cloud {cloud}"
