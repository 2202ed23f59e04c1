"""What all sets of memory-mapped shards share: a folder for each shard with flat arrays, an index, how both are written and mapped.

    index.json               format, kind, settings, and size and SHA-256 of every file; "complete" when all shards are there
    shard_00000/NAME.npy     arrays, those of all items of the shard one after the other
                offsets.npy  [n + 1] int64, item i is the rows offsets[i]:offsets[i + 1]
                shard.json   what the shard was made of; the same command makes none again that is there and of the same sources

A shard is written under a temporary name and renamed when it is whole, so an interrupted conversion loses one shard at most: the same
command continues it. ``shards`` holds point clouds in this form, ``event_shards`` particle events.
"""

from __future__ import annotations

import json
import os
import shutil
from collections import OrderedDict
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np

from geossl.data.files import atomic_write, existing, read_json, sha256
from geossl.errors import DataError

FORMAT, VERSION = "geossl-shards", 1

Kind = Literal["clouds", "events"]


def begin(out: Path, kind: Kind, settings: dict[str, Any]) -> None:
    """Begin a shard set, or check that the one that was begun has the same settings.

    Raises:
        DataError: ``out`` holds something else, or shards made with other settings.
    """
    index = out / "index.json"
    if index.exists():
        content = read_json(index)
        old = {"kind": content.get("kind", "clouds"), **content.get("settings", {})}
        changed = [f"{key}: {old.get(key)!r} -> {value!r}" for key, value in {"kind": kind, **settings}.items() if old.get(key) != value]
        if changed:
            raise DataError(f"{out}: holds shards made with other settings ({'; '.join(changed)}); remove it or choose another folder")
    elif out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise DataError(f"{out}: is not empty and holds no shard set; choose another folder")
    _write_index(out, kind=kind, settings=settings, complete=False, shards=[])
    for left in out.glob(".shard_*"):
        shutil.rmtree(left)


def finish(out: Path, kind: Kind, settings: dict[str, Any], shards: list[dict[str, Any]], **content: Any) -> dict[str, Any]:
    """Write the index of a whole set and return it; shards of an earlier run that are not among ``shards`` are removed.

    Args:
        out: Folder of the set.
        kind: What its items are.
        settings: As given to :func:`begin`.
        shards: What :func:`write_shard` returned for each, and its ``folder``.
        content: Further entries of the index.
    """
    for extra in sorted(out.glob("shard_*")):
        if extra.name not in {shard["folder"] for shard in shards}:
            shutil.rmtree(extra)
    return _write_index(out, kind=kind, settings=settings, complete=True, **content, shards=shards)


def _write_index(out: Path, **content: Any) -> dict[str, Any]:
    index = {"format": FORMAT, "version": VERSION, **content}
    atomic_write(out / "index.json", lambda file: file.write(json.dumps(index, indent=1).encode()))
    return index


def read_index(root: Path, kind: Kind | None = None) -> dict[str, Any]:
    """Read ``index.json`` of a finished shard set of the given kind (None: any).

    Raises:
        DataError: there is none, it is damaged, of another version or kind, or the conversion is not finished.
    """
    path = existing(existing(root, "folder") / "index.json", "index of a shard set (made by tools/prepare_data.py)")
    index = read_json(path)
    if index.get("format") != FORMAT or index.get("version") != VERSION:
        raise DataError(f"{path}: expected {FORMAT} version {VERSION}, got {index.get('format')} version {index.get('version')}")
    if not index.get("complete"):
        raise DataError(f"{path}: the conversion was interrupted; run the same prepare_data command again to finish it")
    found = index.get("kind", "clouds")
    if kind is not None and found != kind:
        names = {"clouds": "shards", "events": "event_shards"}
        raise DataError(f"{path}: holds {found}, not {kind}; read it with data.name {names.get(found)}")
    return index


def finished_shard(folder: Path, sources: list[Any]) -> dict[str, Any] | None:
    """Return what is known of a shard that is there already and made of the same ``sources``, else None."""
    if not (folder / "shard.json").exists():
        return None
    info = read_json(folder / "shard.json")
    return info if info.get("sources") == sources else None


def write_shard(
    folder: Path, arrays: dict[str, np.ndarray], info: dict[str, Any], sources: list[Any], names: list[str] | None = None
) -> dict[str, Any]:
    """Write one shard under a temporary name, flush it to disk and rename it.

    Args:
        folder: Where the shard goes; what is there is replaced.
        arrays: Each becomes ``NAME.npy``.
        info: What the index says of it.
        sources: What it was made of, as JSON gives it back.
        names: Lines of ``names.txt``; None writes none.

    Returns:
        What ``shard.json`` holds: ``info``, the files and the sources.

    Raises:
        DataError: it could not be written.
    """
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    for old in (temporary, folder):
        if old.exists():
            shutil.rmtree(old)
    try:
        temporary.mkdir(parents=True)
        for name, values in arrays.items():
            atomic_write(temporary / f"{name}.npy", partial(np.save, arr=values))
        if names is not None:
            text = "".join(f"{name}\n" for name in names)
            atomic_write(temporary / "names.txt", lambda file: file.write(text.encode()))
        files = {path.name: {"bytes": path.stat().st_size, "sha256": sha256(path)} for path in sorted(temporary.iterdir())}
        known = {**info, "files": files, "sources": sources}
        atomic_write(temporary / "shard.json", lambda file: file.write(json.dumps(known).encode()))
        temporary.rename(folder)
    except OSError as error:
        raise DataError(f"{folder}: could not be written ({error})") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return known


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


class ShardArrays:
    """The arrays of a shard set, mapped into memory when they are first used.

    Args:
        root: Folder of the set.
        shards: Entries of its index, all or some.
        keep: Shards that stay mapped, those used last; None: all.

    Raises:
        DataError: a file is missing or has another size than the index says.
    """

    def __init__(self, root: Path, shards: list[dict[str, Any]], keep: int | None = None) -> None:
        self.folders = [root / shard["folder"] for shard in shards]
        self._keep = keep
        self._maps: OrderedDict[int, dict[str, np.ndarray]] = OrderedDict()
        for folder, shard in zip(self.folders, shards, strict=True):
            for name, file in shard["files"].items():
                size = existing(folder / name).stat().st_size
                if size != file["bytes"]:
                    raise DataError(f"{folder / name}: has {size} bytes, the index says {file['bytes']}; remove {folder} and convert again")

    def __call__(self, shard: int, name: str) -> np.ndarray:
        """Return array ``name`` of a shard, read-only."""
        arrays = self._maps.get(shard)
        if arrays is None:
            arrays = self._maps[shard] = {}
            if self._keep is not None and len(self._maps) > self._keep:
                self._maps.popitem(last=False)
        elif self._keep is not None:
            self._maps.move_to_end(shard)
        if name not in arrays:
            path = self.folders[shard] / f"{name}.npy"
            try:
                # A plain array over the map: slicing numpy's own class costs microseconds.
                arrays[name] = np.asarray(np.load(path, mmap_mode="r", allow_pickle=False))
            except (OSError, ValueError) as error:
                raise DataError(f"{path}: cannot be mapped; it is damaged or truncated ({error})") from error
        return arrays[name]

    def __getstate__(self) -> dict[str, Any]:
        """Workers map the files themselves; the maps do not travel."""
        return {**self.__dict__, "_maps": OrderedDict()}
