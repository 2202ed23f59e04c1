"""``prepare_data.py pairs``: mine or take pairs of images, cut corresponding windows, and write them to shards or a folder.

A set is a folder::

    index.json           format, settings, how many pairs, what was left out and why, and size and SHA-256 of every shard; "complete" when
                         all are there
    pairs-00000.tar      the pairs of one place, or of so many lines of a list; of pair 3 of it:
        p00000_00000003.1.jpg, p00000_00000003.2.jpg   the images
        p00000_00000003.json    names of the two, windows, and IoU, angle and score where they were mined
    pairs-00000.npy      where the images lie in the tar: [pairs, 2, 2] int64, offset and size
    pairs-00000.json     what the index says of this shard; there when the shard is whole
    crops.txt            the mined pairs and their windows in CroCo's format, for cutting them anew from the source
    contact_sheet.png    the first pairs

With ``layout: folder``, ``pairs-00000/`` holds ``NAME_1.jpg``, ``NAME_2.jpg`` and ``listing.txt`` instead of a tar, as CroCo's crops are
published.
"""

from __future__ import annotations

import functools
import hashlib
import io
import itertools
import json
import re
import shutil
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from geossl.config import require, to_dict
from geossl.data.files import atomic_write, existing, read_json, sha256, write_json
from geossl.data.image_files import decode_image, encode_image, shrink
from geossl.data.pair_crops import (
    CroppedPair,
    corresponding_boxes,
    cut,
    is_crop_list,
    quarter_turns,
    read_crop_list,
    relative_roll,
    write_crop_list,
)
from geossl.data.pair_mining import MiningOptions, mine_pairs
from geossl.data.pair_sources import Place, PosedImages, find_places
from geossl.data.pairs import find_pairs
from geossl.data.rooms import one_thread
from geossl.data.workers import worker_map
from geossl.errors import DataError

NAME, VERSION = "geossl-pairs", 1
_LEFT = re.compile(r"\.(index|pairs-\d{5,}|contact_sheet|crops)\.(tar|npy|json|png|txt)\.\d+\.tmp")  # half-written by a killed run


@dataclass(kw_only=True)
class PairShardOptions:
    """How pairs are chosen and written."""

    mining: MiningOptions = field(default_factory=MiningOptions)
    """Which pairs of posed images are taken."""
    size: int = 256
    """Side of the windows cut out of both images; whole images get this many pixels along their shorter side."""
    crops: int = 4
    """Most windows of a pair, each with its counterpart in the other image; 0 keeps whole images. Where what images see in common is only
    estimated (transforms.json without depth) images are kept whole."""
    min_crop_overlap: float = 0.4
    """Least part of the places in a window that its counterpart must show."""
    layout: Literal["webdataset", "folder"] = "webdataset"
    """Tars with an index, or folders of image files as CroCo's crops are published."""
    image: Literal["jpg", "png"] = "jpg"
    """How images are stored: as JPEG, or exactly."""
    quality: int = 95
    """Of the JPEGs."""
    pairs_per_shard: int = 1000
    """Lines of a list that go into one shard; of posed images, each place is one."""
    images: Path | None = None
    """Folder that the paths of a list are relative to; None takes that of the list."""
    workers: int = 1
    """Processes; the files are the same for any number."""

    def __post_init__(self) -> None:
        require(self.size >= 16, "size", "must be at least 16", self.size)
        require(self.crops >= 0, "crops", "must not be negative", self.crops)
        require(0.0 < self.min_crop_overlap <= 1.0, "min_crop_overlap", "must lie in (0, 1]", self.min_crop_overlap)
        require(1 <= self.quality <= 100, "quality", "must lie in 1..100", self.quality)
        for name in ("pairs_per_shard", "workers"):
            require(getattr(self, name) >= 1, name, "must be at least 1", getattr(self, name))


class LeftOut:
    """What was left out: how many for each reason, and the first of them."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.examples: dict[str, str] = {}

    def add(self, reason: str, example: str = "", count: int = 1) -> None:
        """Count something that was left out."""
        self.counts[reason] += count
        if example:
            self.examples.setdefault(reason, example)

    def __str__(self) -> str:
        return ", ".join(f"{count} {reason}" for reason, count in self.counts.items())


@dataclass(frozen=True)
class _Made:
    """One pair, ready to be written."""

    first: bytes
    second: bytes
    about: dict[str, Any]


@dataclass
class _Unit:
    """What one shard is made of, and what was left out of it."""

    number: int
    name: str
    place: Place | None = None
    listed: list[CroppedPair] = field(default_factory=list)
    images: Path | None = None

    def mark(self) -> str:
        """Tell the unit from others that a shard of this number may have been made of before: the source may have changed since."""
        return hashlib.sha256("".join([f"{self.name}\n", *write_crop_list(self.listed)]).encode()).hexdigest()[:16]


def write_pairs(
    source: Path, out: Path, options: PairShardOptions, progress: Callable[[float, int], None] = lambda done, total: None
) -> dict[str, Any]:
    """Write pairs of ``source`` to ``out``, or continue a set that was interrupted.

    Args:
        source: Posed images (see :func:`geossl.data.pair_sources.find_places`): pairs are mined. Or a list of crops
            (``crops_release.txt``), a list of two paths a line, or a folder of pairs: they are taken.
        out: Folder of the set.
        options: How.
        progress: Called with the shards done, and those there are.

    Returns:
        The content of ``index.json``.

    Raises:
        DataError: nothing is found, no pair passes the thresholds, or ``out`` holds something else or a set made with other settings.
    """
    source = existing(source, "source").resolve()
    units = _find_units(source, options)
    settings = {key: value for key, value in to_dict(options).items() if key not in ("workers", "images")}
    settings = json.loads(json.dumps({"source": str(source), "images": str(options.images), **settings}, default=str))
    _start(out, settings)
    tasks = [(out, options, settings, unit) for unit in units]
    workers = min(options.workers, len(tasks))
    shards: list[dict[str, Any]] = []
    # With one process, what is done of the present shard shows too.
    work = partial(_write_unit, tick=lambda part: progress(len(shards) + part, len(units))) if workers == 1 else _write_unit
    with worker_map(workers) as run:
        for info in run(work, tasks):
            shards.append(info)
            progress(len(shards), len(units))
    left_out = LeftOut()
    for info in shards:
        for reason, number in info["left_out"].items():
            left_out.add(reason, info["examples"].get(reason, ""), number)
    count = sum(info["pairs"] for info in shards)
    if not count:
        why = next(iter(left_out.examples.values()), "")
        raise DataError(f"{source}: no pair was made ({left_out}); lower --mining.min_iou and --mining.min_score, or see: {why}")
    listed = [line for unit in units for line in _kept_crops(out, unit.number)]
    atomic_write(out / "crops.txt", lambda file: file.write("".join(listed).encode()))
    index = _index(settings, complete=True, pairs=count, left_out=dict(left_out.counts), examples=left_out.examples, shards=shards)
    write_json(out / "index.json", index)
    _write_sheet(out, index)
    return index


def _find_units(source: Path, options: PairShardOptions) -> list[_Unit]:
    """Tell what the shards are made of."""
    places = find_places(source)
    if places:
        return [_Unit(number, place.name, place=place) for number, place in enumerate(places)]
    folder = options.images or (source if source.is_dir() else source.parent)
    if source.is_file() and is_crop_list(source):
        listed: Iterator[CroppedPair] = read_crop_list(source)
    else:
        listed = (CroppedPair(first, second, 0, []) for first, second in find_pairs(source))
    units = []
    for number in itertools.count():
        block = list(itertools.islice(listed, options.pairs_per_shard))
        if not block:
            break
        units.append(_Unit(number, f"{source.name} from {number * options.pairs_per_shard}", listed=block, images=folder))
    if not units:
        raise DataError(
            f"{source}: holds neither posed images (7-Scenes, ScanNet, transforms.json, COLMAP, rooms) nor pairs (pairs.txt, NAME_1.jpg "
            "with NAME_2.jpg, a list of two paths a line, crops_release.txt)"
        )
    return units


def _start(out: Path, settings: dict[str, Any]) -> None:
    """Begin a set, or check that the one that was begun has the same settings."""
    if out.exists() and not out.is_dir():
        raise DataError(f"{out}: is a file; pairs are written to a folder, choose another name")
    if (out / "index.json").exists():
        old = read_index(out, complete=False)["settings"]
        changed = [f"{key}: {old.get(key)!r} -> {value!r}" for key, value in settings.items() if old.get(key) != value]
        if changed:
            raise DataError(f"{out}: holds pairs made with other settings ({'; '.join(changed)}); remove it or choose another folder")
    elif out.exists() and any(out.iterdir()):
        raise DataError(f"{out}: is not empty and holds no set of pairs; choose another folder")
    out.mkdir(parents=True, exist_ok=True)
    for left in out.iterdir():
        if _LEFT.fullmatch(left.name) and left.is_file():
            left.unlink()
    write_json(out / "index.json", _index(settings, complete=False, pairs=0, shards=[]))


def _index(settings: dict[str, Any], **content: Any) -> dict[str, Any]:
    return {"format": NAME, "version": VERSION, "settings": settings, **content}


def read_index(root: Path, complete: bool = True) -> dict[str, Any]:
    """Read the ``index.json`` of a set of pairs.

    Raises:
        DataError: there is none, it is damaged, of something else or (with ``complete``) of an interrupted run.
    """
    path = existing(existing(root, "folder") / "index.json", "index of a set of pairs (made by tools/prepare_data.py pairs)")
    index = read_json(path)
    if index.get("format") != NAME or index.get("version") != VERSION:
        raise DataError(f"{path}: expected {NAME} version {VERSION}, got {index.get('format')} version {index.get('version')}")
    for name, kind in (("settings", dict), ("shards", list), ("pairs", int)):
        if not isinstance(index.get(name), kind):
            raise DataError(f"{path}: is damaged: {name} must be a {kind.__name__}, got {index.get(name)!r}")
    if complete and not index.get("complete"):
        raise DataError(f"{path}: writing the pairs was interrupted; run the same prepare_data command again to finish it")
    return index


def check_pairs(root: Path) -> int:
    """Compare every tar of a set with its checksum, and return how many there are.

    Raises:
        DataError: a file is missing or differs; the message names it. Or the set is folders of images, which have no checksums.
    """
    index = read_index(root)
    if index["settings"].get("layout") == "folder":
        raise DataError(
            f"{root}: holds folders of images, which have no checksums; PairsConfig(root=...).build('all').check() decodes them"
        )
    shards = [shard for shard in index["shards"] if shard["pairs"]]
    for shard in shards:
        path = existing(root / shard["file"], "shard")
        if sha256(path) != shard["sha256"]:
            raise DataError(f"{path}: its checksum is not that of the index; it was damaged or changed: remove it and write it again")
    return len(shards)


def _write_unit(
    task: tuple[Path, PairShardOptions, dict[str, Any], _Unit], tick: Callable[[float], None] = lambda part: None
) -> dict[str, Any]:
    """Make and write one shard, unless it is there already; return what the index says of it."""
    out, options, settings, unit = task
    stem = f"pairs-{unit.number:05d}"
    settings = {**settings, "unit": unit.mark()}
    info = _finished(out, stem, settings)
    if info is not None:
        return info
    left_out, crops, made = LeftOut(), list[CroppedPair](), list[_Made]()
    with one_thread():
        if unit.place is None:
            made = list(_listed(unit, options, left_out, tick))
        else:
            try:
                made = list(_mined(unit.place, options, left_out, crops, tick))
            except DataError as error:  # one scene of many; where it is the only one, that nothing was made is an error
                left_out.add("places: cannot be used", str(error))
    known = made[0].about.get("known") if made else None
    info = {"name": unit.name, "pairs": len(made), "known": known, "left_out": dict(left_out.counts), "examples": left_out.examples}
    if made:
        info |= _write_tar(out, stem, made, options) if options.layout == "webdataset" else _write_folder(out / stem, made, options)
    write_json(out / f"{stem}.json", {**info, "settings": settings, "crops": list(write_crop_list(crops))})
    return info


def _finished(out: Path, stem: str, settings: dict[str, Any]) -> dict[str, Any] | None:
    """Return what is known of a shard that is there already and was made of the same with the same settings, else None."""
    known = out / f"{stem}.json"
    if not known.exists():
        return None
    info = read_json(known)
    if info.get("settings") != settings:
        return None
    if info["pairs"]:
        file = out / info["file"]
        if not file.exists() or ("bytes" in info and file.stat().st_size != info["bytes"]):
            return None
    return {key: value for key, value in info.items() if key not in ("settings", "crops")}


def _kept_crops(out: Path, number: int) -> list[str]:
    return list(read_json(out / f"pairs-{number:05d}.json")["crops"])


def _mined(
    place: Place, options: PairShardOptions, left_out: LeftOut, crops: list[CroppedPair], tick: Callable[[float], None]
) -> Iterator[_Made]:
    """Yield the pairs of one place; half of the progress is for the mining."""
    posed = place.open(options.mining)
    for reason, count in posed.left_out.items():
        left_out.add(f"frames: {reason}", place.name, count)
    read = functools.lru_cache(maxsize=32)(posed.read)
    if posed.pairs is not None:
        chosen: list[tuple[int, int, dict[str, Any]]] = [(one, other, {"overlap": overlap}) for one, other, overlap in posed.pairs]
    else:
        chosen = _mine(posed, options, left_out, tick)
    for number, (one, other, about) in enumerate(chosen):
        tick(0.5 + 0.5 * number / len(chosen))
        about = {"images": [posed.names[one], posed.names[other]], "known": posed.known, **about}
        try:
            first, second = read(one), read(other)
        except DataError as error:
            left_out.add("pairs: image damaged", str(error))
            continue
        if posed.geometry is None or posed.known == "focus" or not options.crops:
            yield _whole(first, second, options, about)
            continue
        sizes = [(image.shape[2], image.shape[1]) for image in (first, second)]
        boxes = corresponding_boxes(
            posed.geometry.matches(one, other), sizes[0], sizes[1], options.size, options.crops, options.min_crop_overlap
        )
        if not boxes:
            left_out.add("pairs: no corresponding windows", posed.names[one])
            continue
        roll = relative_roll(posed.geometry.world_to_cam[one], posed.geometry.world_to_cam[other])
        if Path(posed.names[one]).is_file():  # views of rooms are no files of their own
            crops.append(CroppedPair(posed.names[one], posed.names[other], roll, [(a, b) for a, b, _ in boxes]))
        for a, b, seen in boxes:
            windows = cut(first, a, options.size), cut(second, b, options.size, quarter_turns(roll))
            yield _made(*windows, options, {**about, "boxes": [a, b], "overlap": round(seen, 3), "rotation": roll})


def _mine(
    posed: PosedImages, options: PairShardOptions, left_out: LeftOut, tick: Callable[[float], None]
) -> list[tuple[int, int, dict[str, Any]]]:
    if posed.geometry is None:
        raise DataError("pairs: neither pairs nor what the images see is known")
    mined = mine_pairs(posed.geometry, options.mining, lambda done, total: tick(0.5 * done / total))
    for reason, count in mined.rejected.items():
        left_out.add(f"pairs: {reason}", count=count)
    numbers = zip(mined.pairs.tolist(), mined.iou.tolist(), mined.angle.tolist(), mined.score.tolist(), strict=True)
    return [(one, other, {"iou": round(i, 3), "angle": round(a, 1), "score": round(s, 4)}) for (one, other), i, a, s in numbers]


def _listed(unit: _Unit, options: PairShardOptions, left_out: LeftOut, tick: Callable[[float], None]) -> Iterator[_Made]:
    """Yield the pairs of a list, cut where it says."""
    if unit.images is None:
        raise DataError("pairs: a list needs the folder of its images")
    for number, pair in enumerate(unit.listed):
        tick(number / len(unit.listed))
        about: dict[str, Any] = {"images": [pair.first, pair.second]}
        paths = unit.images / pair.first, unit.images / pair.second
        try:
            first, second = (decode_image(path, str(path)) for path in paths)
        except DataError as error:
            left_out.add("pairs: image missing" if not all(path.exists() for path in paths) else "pairs: image damaged", str(error))
            continue
        if not pair.boxes:
            yield _whole(first, second, options, about)
        turns = quarter_turns(pair.rotation)
        for a, b in pair.boxes:
            try:
                windows = cut(first, a, options.size, source=pair.first), cut(second, b, options.size, turns, pair.second)
            except DataError as error:
                left_out.add("windows: beyond the image", str(error))
                continue
            yield _made(*windows, options, {**about, "boxes": [a, b], "rotation": pair.rotation})


def _whole(first: Tensor, second: Tensor, options: PairShardOptions, about: dict[str, Any]) -> _Made:
    return _made(shrink(first, options.size), shrink(second, options.size), options, about)


def _made(first: Tensor, second: Tensor, options: PairShardOptions, about: dict[str, Any]) -> _Made:
    return _Made(encode_image(first, options.image, options.quality), encode_image(second, options.image, options.quality), about)


def _write_tar(out: Path, stem: str, made: list[_Made], options: PairShardOptions) -> dict[str, Any]:
    """Write a tar and where its images lie."""
    places = np.zeros((len(made), 2, 2), dtype=np.int64)

    def write(file: Any) -> None:
        with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
            for row, pair in enumerate(made):
                key = f"{_key(stem)}_{row:08d}"
                for side, data in enumerate((pair.first, pair.second)):
                    places[row, side] = _add(tar, f"{key}.{side + 1}.{options.image}", data), len(data)
                _add(tar, f"{key}.json", json.dumps(pair.about).encode())

    path = out / f"{stem}.tar"
    atomic_write(path, write)
    atomic_write(out / f"{stem}.npy", lambda file: np.save(file, places))
    return {"file": path.name, "bytes": path.stat().st_size, "sha256": sha256(path)}


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> int:
    """Add a file and return where its content begins."""
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))
    return int(tar.offset) - (-(-len(data) // 512) * 512)


def _key(stem: str) -> str:
    """Return how the keys of a shard begin: no two shards have a key in common."""
    return "p" + stem.removeprefix("pairs-")


def _write_folder(folder: Path, made: list[_Made], options: PairShardOptions) -> dict[str, Any]:
    """Write image files and ``listing.txt``."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    names = [f"{_key(folder.name)}_{row:08d}" for row in range(len(made))]
    for name, pair in zip(names, made, strict=True):
        for side, data in enumerate((pair.first, pair.second), 1):
            (folder / f"{name}_{side}.{options.image}").write_bytes(data)
    text = "".join(f"{name}\n" for name in ["# stems: NAME_1, NAME_2", *names])
    atomic_write(folder / "listing.txt", lambda file: file.write(text.encode()))
    return {"file": folder.name}


def _write_sheet(out: Path, index: dict[str, Any], limit: int = 12) -> None:
    """Write ``contact_sheet.png``: the first pairs of the first shards, the two images side by side."""
    from PIL import Image

    size, kind = index["settings"]["size"], index["settings"]["image"]
    tiles: list[Tensor] = []
    filled = [shard for shard in index["shards"] if shard["pairs"]]
    each = -(-limit // min(len(filled), limit))
    for shard in filled[:limit]:
        path = out / shard["file"]
        if path.is_dir():
            stems = sorted(path.glob(f"*_1.{kind}"))[:each]
            data = [(first.read_bytes(), first.with_name(first.name.replace("_1.", "_2.")).read_bytes()) for first in stems]
        else:
            places, content = np.load(path.with_suffix(".npy")), path.read_bytes()
            data = [tuple(content[offset : offset + length] for offset, length in pair) for pair in places[:each].tolist()]
        for pair in data:
            sides = [decode_image(side, str(path))[:, :size, :size] for side in pair]
            tile = torch.full((3, size, 2 * size), 255, dtype=torch.uint8)
            for number, side in enumerate(sides):
                tile[:, : side.shape[1], number * size : number * size + side.shape[2]] = side
            tiles.append(tile)
    tiles = tiles[:limit]
    columns = 3 if len(tiles) > 4 else min(2, len(tiles))
    sheet = Image.new("RGB", (columns * (2 * size + 8) + 8, -(-len(tiles) // columns) * (size + 8) + 8), "white")
    for number, tile in enumerate(tiles):
        place = 8 + number % columns * (2 * size + 8), 8 + number // columns * (size + 8)
        sheet.paste(Image.fromarray(tile.permute(1, 2, 0).contiguous().numpy()), place)
    atomic_write(out / "contact_sheet.png", lambda file: sheet.save(file, "PNG"))
