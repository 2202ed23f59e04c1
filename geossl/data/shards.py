"""Memory-mapped shards: many clouds in a few flat files, for data sets that do not fit in memory or are slow to parse.

A shard set is a folder::

    index.json               format, settings, classes, and size and SHA-256 of every file; "complete" when all shards are there
    shard_00000/coord.npy    [M, 3] float32, the points of all clouds of the shard one after the other
                normal.npy   [M, 3] int8, 127 times the unit normal (where the sources have normals)
                rgb.npy      [M, 3] uint8 (where the sources have colours)
                offsets.npy  [n + 1] int64, cloud i is the rows offsets[i]:offsets[i + 1]
                label.npy    [n] int64 into classes, -1 where unlabelled
                test.npy     [n] bool, True for the clouds held out
                names.txt    the file each cloud came from

A shard is written under a temporary name and renamed when it is whole, so an interrupted conversion loses one shard at most: the
same command continues it.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np

from geossl.config import require
from geossl.data.dataset import DATASETS, PointDataConfig, PointDataset
from geossl.data.files import atomic_write, existing, read_json, sha256
from geossl.data.folder import SPLITS, FileList, FileOptions, find_files, read_file
from geossl.data.sample import COLUMN_NAMES, Columns, PointCloud
from geossl.data.workers import worker_map
from geossl.errors import DataError

FORMAT, VERSION = "geossl-shards", 1


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
    _start(out, settings)
    total, done, skipped, shards = len(found.names), 0, 0, []
    with worker_map(options.workers) as run:
        for number, first in enumerate(range(0, total, options.clouds_per_shard)):
            rows = range(first, min(first + options.clouds_per_shard, total))
            stamp = [_stamp(found, row) for row in rows]
            folder = out / f"shard_{number:05d}"
            info = _finished(folder, stamp)
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
    for extra in sorted(out.glob("shard_*")):
        if extra.name not in {shard["folder"] for shard in shards}:
            shutil.rmtree(extra)  # from an earlier run, when there were more files
    return _write_index(out, settings, complete=True, classes=found.classes, shards=shards)


def check_shards(root: Path) -> int:
    """Read every file of a shard set, compare it with its checksum, and return the number of files.

    Raises:
        DataError: a file is missing or differs; the message names it.
    """
    count = 0
    for shard in read_index(root)["shards"]:
        for name, file in shard["files"].items():
            path = existing(root / shard["folder"] / name)
            if sha256(path) != file["sha256"]:
                raise DataError(
                    f"{path}: its checksum is not that of the index; it was damaged or changed: remove {path.parent} and convert again"
                )
            count += 1
    return count


def read_index(root: Path) -> dict[str, Any]:
    """Read ``index.json`` of a finished shard set.

    Raises:
        DataError: there is none, it is damaged, of another version, or the conversion is not finished.
    """
    path = existing(existing(root, "folder") / "index.json", "index of a shard set (made by tools/prepare_data.py folder)")
    index = read_json(path)
    if index.get("format") != FORMAT or index.get("version") != VERSION:
        raise DataError(f"{path}: expected {FORMAT} version {VERSION}, got {index.get('format')} version {index.get('version')}")
    if not index.get("complete"):
        raise DataError(f"{path}: the conversion was interrupted; run the same prepare_data command again to finish it")
    return index


def _start(out: Path, settings: dict[str, Any]) -> None:
    """Begin a shard set, or check that the one that was begun has the same settings."""
    index = out / "index.json"
    if index.exists():
        old = read_json(index).get("settings", {})
        changed = [f"{key}: {old.get(key)!r} -> {value!r}" for key, value in settings.items() if old.get(key) != value]
        if changed:
            raise DataError(f"{out}: holds shards made with other settings ({'; '.join(changed)}); remove it or choose another folder")
    elif out.exists() and any(out.iterdir()):
        raise DataError(f"{out}: is not empty and holds no shard set; choose another folder")
    _write_index(out, settings, complete=False, classes=[], shards=[])
    for left in out.glob(".shard_*"):
        shutil.rmtree(left)


def _write_index(out: Path, settings: dict[str, Any], **content: Any) -> dict[str, Any]:
    index = {"format": FORMAT, "version": VERSION, "settings": settings, **content}
    atomic_write(out / "index.json", lambda file: file.write(json.dumps(index, indent=1).encode()))
    return index


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


def _finished(folder: Path, stamp: list[Any]) -> dict[str, Any] | None:
    """Return what is known of a shard that is there already and made of the same files, else None."""
    if not (folder / "shard.json").exists():
        return None
    info = read_json(folder / "shard.json")
    return info if info.get("sources") == stamp else None


def _read_one(task: tuple[Path, str, FileOptions, Columns]) -> PointCloud | str:
    """Read one file in a worker; a file that cannot be used comes back as its message."""
    root, name, files, columns = task
    try:
        return read_file(root, name, files, center=files.center).only(columns, str(root / name))
    except DataError as error:
        return str(error)


def _write_shard(folder: Path, found: FileList, rows: list[int], clouds: list[PointCloud | str], stamp: list[Any]) -> dict[str, Any]:
    """Write one shard under a temporary name, flush it to disk and rename it; return what ``shard.json`` holds."""
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
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    for old in (temporary, folder):
        if old.exists():
            shutil.rmtree(old)
    try:
        temporary.mkdir(parents=True)
        for name, values in parts.items():
            atomic_write(temporary / f"{name}.npy", partial(np.save, arr=values))
        names = "".join(f"{found.names[row]}\n" for row in kept)
        atomic_write(temporary / "names.txt", lambda file: file.write(names.encode()))
        info = {
            "clouds": len(good),
            "points": int(parts["offsets"][-1]),
            "skipped": [cloud for cloud in clouds if isinstance(cloud, str)],
            "files": {path.name: {"bytes": path.stat().st_size, "sha256": sha256(path)} for path in sorted(temporary.iterdir())},
            "sources": stamp,
        }
        atomic_write(temporary / "shard.json", lambda file: file.write(json.dumps(info).encode()))
        temporary.rename(folder)
    except OSError as error:
        raise DataError(f"{folder}: could not be written ({error})") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return info


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
        index = read_index(config.root)
        self._folders = [config.root / shard["folder"] for shard in index["shards"]]
        for folder, shard in zip(self._folders, index["shards"], strict=True):
            for name, file in shard["files"].items():
                size = existing(folder / name).stat().st_size
                if size != file["bytes"]:
                    raise DataError(f"{folder / name}: has {size} bytes, the index says {file['bytes']}; remove {folder} and convert again")
        self._first = np.cumsum([0] + [shard["clouds"] for shard in index["shards"]])
        self._maps: dict[tuple[int, str], np.ndarray] = {}
        present = {"xyz", *("normal" if "normal.npy" in shard["files"] else "" for shard in index["shards"])}
        present |= {"rgb" if "rgb.npy" in shard["files"] else "" for shard in index["shards"]}
        missing = [name for name in COLUMN_NAMES[config.columns] if name not in present]
        if missing:
            raise DataError(f"{config.root}: columns={config.columns!r} asks for {' and '.join(missing)}, which these shards do not have")
        test = np.concatenate([self._column(number, "test") for number in range(len(self._folders))])
        labels = np.concatenate([self._column(number, "label") for number in range(len(self._folders))])
        self.rows = np.flatnonzero({"train": ~test, "test": test, "all": np.ones(len(test), dtype=bool)}[split])
        if not len(self.rows):
            raise DataError(f"{config.root}: the {split} part is empty ({len(test)} clouds in all)")
        super().__init__(config, labels[self.rows], index["classes"])

    def _column(self, shard: int, name: str) -> np.ndarray:
        """Return a column of a shard, mapped into memory on first use."""
        if (shard, name) not in self._maps:
            path = self._folders[shard] / f"{name}.npy"
            try:
                self._maps[shard, name] = np.load(path, mmap_mode="r", allow_pickle=False)
            except (OSError, ValueError) as error:
                raise DataError(f"{path}: cannot be mapped; it is damaged or truncated ({error})") from error
        return self._maps[shard, name]

    def _locate(self, row: int) -> tuple[int, int]:
        stored = int(self.rows[row])
        shard = int(np.searchsorted(self._first, stored, side="right")) - 1
        return shard, stored - int(self._first[shard])

    def read(self, row: int) -> PointCloud:
        """Return a copy of the stored cloud."""
        shard, cloud = self._locate(row)
        start, stop = self._column(shard, "offsets")[cloud : cloud + 2]
        normal = color = None
        if "normal" in self.columns:
            normal = self._column(shard, "normal")[start:stop].astype(np.float32)
            normal /= np.maximum(np.linalg.norm(normal, axis=1, keepdims=True), 1.0)
        if "rgb" in self.columns:
            color = self._column(shard, "rgb")[start:stop].astype(np.float32) / np.float32(255.0)
        return PointCloud(np.array(self._column(shard, "coord")[start:stop]), normal, color)

    def source(self, row: int) -> str:
        """Return the shard and the cloud in it (line of its ``names.txt``, from 0)."""
        shard, cloud = self._locate(row)
        return f"{self._folders[shard]} cloud {cloud}"

    def __getstate__(self) -> dict[str, Any]:
        """Workers map the files themselves; the maps do not travel."""
        return {**self.__dict__, "_maps": {}}
