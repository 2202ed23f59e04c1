"""``geossl prepare-data``: bring data into the form the package reads quickly.

    prepare_data.py folder --source MESHES --out SHARDS --points 8192     a folder of meshes or clouds -> memory-mapped shards
    prepare_data.py rooms --count 1000 --views 8 --out ROOMS --workers 4  build furnished rooms -> webdataset shards, contact sheet
    prepare_data.py pairs --source SCENES --out PAIRS --workers 4         posed images or lists of pairs -> webdataset shards of pairs
    prepare_data.py lartpc --events 1000 --out data/lartpc.h5             simulate particle events -> HDF5 as PILArNet-M has it
    prepare_data.py events --source PILARNET --out SHARDS --workers 4     PILArNet-M's HDF5 files -> memory-mapped shards
    prepare_data.py check --source SHARDS                                 compare every file of a set with its checksum
    prepare_data.py objects --source CATALOGUE --out FILE.npz             rebuild the embedded objects

``folder``, ``rooms``, ``pairs`` and ``events`` continue where they were interrupted when the same command is given again. Then: ``data:
{name: shards, root: SHARDS}`` (``event_shards`` for events, ``pair_shards`` for pairs), or ``RoomShardsConfig(root=ROOMS).build()``.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path

from geossl.config import load_config
from geossl.data import (
    EventShardOptions,
    FileOptions,
    LArTPCFileOptions,
    ShardOptions,
    check_shards,
    write_event_shards,
    write_lartpc,
    write_shards,
)
from geossl.data.files import read_json
from geossl.data.objects import pack_objects
from geossl.data.pair_writer import NAME as PAIRS
from geossl.data.pair_writer import PairShardOptions, check_pairs, write_pairs
from geossl.data.room_shards import NAME as ROOMS
from geossl.data.room_shards import RoomShardOptions, check_rooms, write_rooms
from geossl.errors import ConfigError, unknown_name


@dataclass(kw_only=True)
class FolderCommand(FileOptions, ShardOptions):
    """Convert a folder of meshes or clouds to memory-mapped shards; give the same command again to continue."""

    source: Path | None = None
    """Folder to convert; the names of its sub-folders are the classes."""
    out: Path | None = None
    """Folder of the shard set to write."""

    def __post_init__(self) -> None:
        FileOptions.__post_init__(self)
        ShardOptions.__post_init__(self)


@dataclass(kw_only=True)
class RoomsCommand(RoomShardOptions):
    """Build furnished rooms and write them to shards; give the same command again to continue, or a larger count to add rooms."""

    out: Path | None = None
    """Folder to write."""


@dataclass(kw_only=True)
class PairsCommand(PairShardOptions):
    """Mine pairs of posed images, or take listed ones, and write them to shards; give the same command again to continue."""

    source: Path | None = None
    """Scenes: folders of RGB-D frames (7-Scenes, ScanNet), transforms.json, COLMAP models, rooms of this program, or a folder of such.
    Pairs: a folder of them, a list of two paths a line, or a crop list as CroCo publishes it (crops_release.txt)."""
    out: Path | None = None
    """Folder to write."""


@dataclass(kw_only=True)
class LArTPCCommand(LArTPCFileOptions):
    """Simulate particle events in liquid argon and write them in the layout of PILArNet-M."""

    out: Path = Path("data/lartpc.h5")
    """HDF5 file to write; its index is written beside it."""


@dataclass(kw_only=True)
class EventsCommand(EventShardOptions):
    """Convert PILArNet-M's HDF5 files to memory-mapped shards; give the same command again to continue."""

    source: Path | None = None
    """File, or folder of files, or of folders ``train``, ``val`` and ``test``."""
    out: Path | None = None
    """Folder of the shard set to write."""


@dataclass(kw_only=True)
class CheckCommand:
    """Compare every file of a set of shards, rooms or pairs with its checksum."""

    source: Path | None = None
    """Folder of the set."""


@dataclass(kw_only=True)
class ObjectsCommand:
    """Rebuild the embedded objects; where each one goes is taken from the table that stands beside ``out``."""

    source: Path | None = None
    """Folder with the sampled catalogue: ``objects.npz`` (2,048 points each) and ``objects.tsv``."""
    out: Path | None = None
    """The npz to write."""


def _given(path: Path | None, flag: str) -> Path:
    if path is None:
        raise ConfigError(f"--{flag} is needed; see --help")
    return path


@contextmanager
def _converting() -> Iterator[Callable[[int, int, int], None]]:
    """Draw a bar, and give the function that is told how far a conversion is."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("converting"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[skipped]}"), TimeRemainingColumn())
    with Progress(*columns) as bar:
        task = bar.add_task("", total=None, skipped="")

        def progress(done: int, total: int, skipped: int) -> None:
            bar.update(task, completed=done, total=total, skipped=f"{skipped} left out" if skipped else "")

        yield progress


def _folder(args: list[str]) -> int:
    command = load_config(FolderCommand, None, args, prog="prepare-data folder")
    source, out = _given(command.source, "source"), _given(command.out, "out")
    files = FileOptions(**{f.name: getattr(command, f.name) for f in fields(FileOptions)})
    options = ShardOptions(**{f.name: getattr(command, f.name) for f in fields(ShardOptions)})
    started = time.perf_counter()
    with _converting() as progress:
        index = write_shards(source, out, files, options, progress)
    clouds, skipped = sum(shard["clouds"] for shard in index["shards"]), [text for shard in index["shards"] for text in shard["skipped"]]
    print(
        f"{out}: {clouds} clouds in {len(index['shards'])} shards, {len(index['classes'])} classes, {time.perf_counter() - started:.1f} s"
    )
    if skipped:
        print(f"warning: left out {len(skipped)} files that could not be used; the first: {skipped[0]}")
    print(f"use it with: --data.name shards --data.root {out}")
    return 0


def _rooms(args: list[str]) -> int:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    command = load_config(RoomsCommand, None, args, prog="prepare-data rooms")
    out = _given(command.out, "out")
    options = RoomShardOptions(**{f.name: getattr(command, f.name) for f in fields(RoomShardOptions)})
    started = time.perf_counter()
    with Progress(TextColumn("building rooms"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()) as bar:
        task = bar.add_task("", total=options.count)
        index = write_rooms(out, options, lambda done, total: bar.update(task, completed=done, total=total))
    size = sum(shard["bytes"] for shard in index["shards"]) / 1e6
    print(f"{out}: {index['count']} rooms in {len(index['shards'])} shards, {size:.1f} MB, {time.perf_counter() - started:.1f} s")
    print(f"look at: {out / 'contact_sheet.png'}")
    print(f"use it with: RoomShardsConfig(root={str(out)!r}).build(), or webdataset")
    return 0


def _pairs(args: list[str]) -> int:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    command = load_config(PairsCommand, None, args, prog="prepare-data pairs")
    source, out = _given(command.source, "source"), _given(command.out, "out")
    options = PairShardOptions(**{f.name: getattr(command, f.name) for f in fields(PairShardOptions)})
    started = time.perf_counter()
    with Progress(TextColumn("making pairs"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()) as bar:
        task = bar.add_task("", total=None)
        index = write_pairs(source, out, options, lambda done, total: bar.update(task, completed=done, total=total))
    shards = [shard for shard in index["shards"] if shard["pairs"]]
    size = sum(shard.get("bytes", 0) for shard in shards) / 1e6
    print(f"{out}: {index['pairs']} pairs in {len(shards)} shards, {size:.1f} MB, {time.perf_counter() - started:.1f} s")
    for reason, count in index["left_out"].items():
        example = index["examples"].get(reason)
        print(f"left out {count} {reason}" + (f"; the first: {example}" if example else ""))
    if any(shard.get("known") == "focus" for shard in shards):
        print("note: some places have poses but no depth; what their images have in common was estimated from where the cameras look")
    print(f"look at: {out / 'contact_sheet.png'}")
    print(f"use it with: --data.name {'pair_shards' if options.layout == 'webdataset' else 'pairs'} --data.root {out}")
    return 0


def _lartpc(args: list[str]) -> int:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    command = load_config(LArTPCCommand, None, args, prog="prepare-data lartpc")
    options = LArTPCFileOptions(**{f.name: getattr(command, f.name) for f in fields(LArTPCFileOptions)})
    started = time.perf_counter()
    with Progress(TextColumn("simulating events"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()) as bar:
        task = bar.add_task("", total=options.events)
        count = write_lartpc(command.out, options, lambda done: bar.update(task, completed=done))
    print(f"{command.out}: {count} events, {command.out.stat().st_size / 1e6:.1f} MB, {time.perf_counter() - started:.1f} s")
    print(f"use it with: --data.name pilarnet --data.root {command.out}")
    return 0


def _events(args: list[str]) -> int:
    command = load_config(EventsCommand, None, args, prog="prepare-data events")
    source, out = _given(command.source, "source"), _given(command.out, "out")
    options = EventShardOptions(**{f.name: getattr(command, f.name) for f in fields(EventShardOptions)})
    started = time.perf_counter()
    with _converting() as progress:
        index = write_event_shards(source, out, options, progress)
    events, points = (sum(shard[key] for shard in index["shards"]) for key in ("events", "points"))
    skipped = [text for shard in index["shards"] for text in shard["skipped"]]
    print(f"{out}: {events} events of {points:,} points in {len(index['shards'])} shards, {time.perf_counter() - started:.1f} s")
    if skipped:
        print(f"warning: left out {len(skipped)} events that could not be used; the first: {skipped[0]}")
    print(f"use it with: --data.name event_shards --data.root {out}")
    return 0


def _check(args: list[str]) -> int:
    source = _given(load_config(CheckCommand, None, args, prog="prepare-data check").source, "source")
    index = source / "index.json"
    if index.is_file() and read_json(index).get("format") == PAIRS:
        print(f"{source}: all {check_pairs(source)} shards have the checksums of the index")
        return 0
    if index.is_file() and read_json(index).get("format") == ROOMS:
        print(f"{source}: all {check_rooms(source)} shards have the checksums of the index")
        return 0
    print(f"{source}: all {check_shards(source)} files have the checksums of the index")
    return 0


def _objects(args: list[str]) -> int:
    command = load_config(ObjectsCommand, None, args, prog="prepare-data objects")
    source, out = _given(command.source, "source"), _given(command.out, "out")
    count = pack_objects(source, out)
    print(f"{out}: {count} objects, {out.stat().st_size / 1e6:.2f} MB")
    return 0


_COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "folder": _folder,
    "rooms": _rooms,
    "pairs": _pairs,
    "lartpc": _lartpc,
    "events": _events,
    "check": _check,
    "objects": _objects,
}


def main(argv: list[str]) -> int:
    """Run ``prepare-data`` and return the exit code."""
    if not argv or argv[0] in ("-h", "--help"):
        print((__doc__ or "").replace("``", ""))
        return 0 if argv else 2
    if argv[0] not in _COMMANDS:
        raise unknown_name("prepare-data command", argv[0], _COMMANDS)
    return _COMMANDS[argv[0]](argv[1:])
