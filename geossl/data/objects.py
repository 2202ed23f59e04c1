"""The embedded data set: 820 real furniture, household and street models, 1,024 points each (see ``samples/README.md``)."""

from __future__ import annotations

import csv
import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from geossl.config import require
from geossl.data.dataset import DATASETS, PointDataConfig, PointDataset
from geossl.data.files import atomic_write, existing, read_npz
from geossl.data.sample import PointCloud
from geossl.data.splits import group_resplit
from geossl.errors import DataError

SAMPLES = Path(__file__).parent / "samples"
PLACEMENTS = ("floor", "on_top", "wall", "ceiling", "outdoor", "never")
STORED_POINTS = 1024
TABLE_COLUMNS = (
    *("index", "id", "name", "category", "creator", "source", "licence", "class", "split", "faces"),
    *("width_m", "depth_m", "height_m", "placement", "note"),
)


@dataclass(kw_only=True)
class ObjectsConfig(PointDataConfig):
    """The embedded objects: CC0 and CC-BY models in 15 classes, 549 labelled and 271 not.

    The training part is everything outside the test part, unlabelled objects included. Near-duplicates never straddle the parts.
    """

    name: str = "objects"
    subset: Literal["all", "labelled"] = "all"
    """``labelled`` leaves the unlabelled objects out (for probes and fine-tuning)."""
    resplit: int | None = None
    """Seed of another group-aware train/test split of the labelled objects; None is the shipped one."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.points <= STORED_POINTS, "points", f"must be at most {STORED_POINTS}, what the embedded objects have", self.points)

    def build(self, split: str) -> ObjectsDataset:
        """Make the data set of ``split``: ``train``, ``test`` or ``all``."""
        return ObjectsDataset(self, split)


@DATASETS.register
def objects() -> ObjectsConfig:
    """The 820 embedded objects."""
    return ObjectsConfig()


@dataclass(frozen=True)
class ObjectLibrary:
    """The content of ``objects.npz`` and ``objects.tsv``; row i of every array is line i of the table.

    Args:
        xyz: ``[n, 1024, 3]`` float16, in farthest-point order (every prefix is an even subsample), bounding-box centre at 0,
            largest norm 1, z up, front is -y.
        normal: ``[n, 1024, 3]`` int8, 127 times the unit normal of the face; not oriented.
        rgb: ``[n, 1024, 3]`` uint8.
        scale_m: ``[n]`` float32; ``xyz * scale_m`` is in metres.
        label: ``[n]`` int8 into ``classes``, -1 where unlabelled.
        split: ``[n]`` int8: 0 train, 1 test, -1 unlabelled.
        group: ``[n]`` int16, near-duplicate group.
        placement: ``[n]`` int8 into ``PLACEMENTS``: where the object goes in a furnished room.
        classes: Names of the 15 classes.
        table: The attribution table, one dictionary per object.
    """

    xyz: np.ndarray
    normal: np.ndarray
    rgb: np.ndarray
    scale_m: np.ndarray
    label: np.ndarray
    split: np.ndarray
    group: np.ndarray
    placement: np.ndarray
    classes: np.ndarray
    table: list[dict[str, str]]


ARRAYS = ("xyz", "normal", "rgb", "scale_m", "label", "split", "group", "placement", "classes")


def read_table(path: Path) -> list[dict[str, str]]:
    """Read a tab-separated table with a header line."""
    with existing(path, "table").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))


@functools.cache
def load_objects(path: Path = SAMPLES / "objects.npz") -> ObjectLibrary:
    """Read the embedded objects (once per process). The arrays are shared and cannot be written into."""
    arrays = read_npz(path, ARRAYS)
    for array in arrays.values():
        array.flags.writeable = False
    table = read_table(path.with_suffix(".tsv"))
    if len(table) != len(arrays["xyz"]):
        raise DataError(f"{path}: {len(arrays['xyz'])} objects, but its table lists {len(table)}; build both with tools/prepare_data.py")
    return ObjectLibrary(**arrays, table=table)


class ObjectsDataset(PointDataset):
    """See :class:`ObjectsConfig`. ``rows [n]`` are the rows of the samples in :func:`load_objects`."""

    def __init__(self, config: ObjectsConfig, split: str) -> None:
        library = load_objects()
        test = library.split == 1
        if config.resplit is not None:
            test = np.zeros(len(library.label), dtype=bool)
            labelled = library.label >= 0
            test[labelled] = group_resplit(library.label[labelled], library.group[labelled], seed=config.resplit)
        # An unlabelled near-duplicate of a test object would let pretraining see the test part.
        near_test = np.isin(library.group, library.group[test])
        parts = {"train": ~near_test, "test": test, "all": np.ones(len(test), dtype=bool)}
        if split not in parts:
            raise DataError(f"objects: unknown split {split!r}; choose one of {', '.join(parts)}")
        wanted = parts[split] & ((library.label >= 0) | (config.subset == "all"))
        self.rows = np.flatnonzero(wanted)
        super().__init__(config, library.label[self.rows], [str(name) for name in library.classes], library.group[self.rows])
        self._library = library

    def read(self, row: int) -> PointCloud:
        """Return the stored cloud, ``[1024]`` points in farthest-point order."""
        library, stored = self._library, self.rows[row]
        normal = color = None
        if "normal" in self.columns:
            normal = library.normal[stored].astype(np.float32)
            normal /= np.maximum(np.linalg.norm(normal, axis=1, keepdims=True), 1.0)
        if "rgb" in self.columns:
            color = library.rgb[stored].astype(np.float32) / np.float32(255.0)
        return PointCloud(library.xyz[stored].astype(np.float32), normal, color)

    def source(self, row: int) -> str:
        """Return the catalogue name and the row in the attribution table."""
        return f"objects.npz row {self.rows[row]} ({self._library.table[self.rows[row]]['name']})"


def pack_objects(source: Path, out: Path) -> int:
    """Build ``objects.npz`` and ``objects.tsv`` from the full sampled catalogue, and return the number of objects.

    Objects of the ``core`` library (GPL) are left out; of each of the others, 1,024 of the 2,048 points are kept in farthest-point
    order. Where each object goes is a decision made by hand: it is taken from the ``placement`` and ``note`` columns of the table
    that already stands beside ``out``.

    Args:
        source: Folder with the catalogue's ``objects.npz`` and ``objects.tsv``.
        out: The npz to write; its table is the same path ending in ``.tsv``.

    Raises:
        DataError: a file is missing or damaged, or an object has no placement.
    """
    names = [name for name in ARRAYS if name != "placement"]
    arrays, table = read_npz(source / "objects.npz", names), read_table(source / "objects.tsv")
    decided = {row["id"]: row for row in read_table(out.with_suffix(".tsv"))}
    keep = [index for index, row in enumerate(table) if row["source"] != "core"]
    missing = [table[index]["id"] for index in keep if decided.get(table[index]["id"], {}).get("placement") not in PLACEMENTS]
    if missing:
        raise DataError(
            f"{out.with_suffix('.tsv')}: no valid placement ({', '.join(PLACEMENTS)}) for {missing[:5]} ({len(missing)} objects)"
        )
    order = farthest_order(arrays["xyz"][keep].astype(np.float32), STORED_POINTS)
    packed: dict[str, Any] = {name: arrays[name][keep] for name in names if name != "classes"}
    for name in ("xyz", "normal", "rgb"):
        packed[name] = np.take_along_axis(packed[name], order[:, :, None], axis=1)
    packed["placement"] = np.array([PLACEMENTS.index(decided[table[index]["id"]]["placement"]) for index in keep], dtype=np.int8)
    atomic_write(out, lambda file: np.savez_compressed(file, **packed, classes=arrays["classes"]))
    lines = ["\t".join(TABLE_COLUMNS)]
    for row, index in enumerate(keep):
        entry = {**table[index], **{key: decided[table[index]["id"]][key] for key in ("name", "placement", "note")}, "index": str(row)}
        lines.append("\t".join(entry[column] for column in TABLE_COLUMNS))
    atomic_write(out.with_suffix(".tsv"), lambda file: file.write(("\n".join(lines) + "\n").encode()))
    return len(keep)


def farthest_order(xyz: np.ndarray, count: int) -> np.ndarray:
    """Return ``[n, count]`` rows of ``xyz [n, N, 3]`` in farthest-point order from row 0 on; ties go to the lower row.

    Plain numpy, so that the file comes out the same with and without the native operators.
    """
    order = np.zeros((len(xyz), count), dtype=np.int64)
    for item, (x, y, z) in enumerate(xyz.transpose(0, 2, 1).astype(np.float32)):
        nearest, current = np.full(len(x), np.inf, dtype=np.float32), 0
        for step in range(1, count):
            distance = (x - x[current]) ** 2 + (y - y[current]) ** 2 + (z - z[current]) ** 2
            distance[current] = -1.0  # never chosen again, also among coinciding points
            np.minimum(nearest, distance, out=nearest)
            current = int(nearest.argmax())
            order[item, step] = current
    return order
