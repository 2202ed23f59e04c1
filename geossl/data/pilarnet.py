"""PILArNet-M: simulated events of a liquid-argon detector, as published in HDF5 files (versions 1 and 2), read and written.

A file holds one row of variable length per event in each of these arrays:

    point          [N * 8] float   voxel x, y, z (0..767), value and energy deposit in MeV, time in ns, electrons, dx in mm
    cluster        [C * 5] or [C * 6] integer   points, fragment, group, interaction, semantic class (version 2: and particle)
    cluster_extra  [C * 5] float   version 2 only: mass in MeV, momentum, vertex x, y, z

The energy used is the value (column 3). Beside ``X.h5`` stands ``X_points.npy``, the number of points of every event, from which small
events are left out without reading them; it is made where it is missing.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from geossl.data.dataset import DATASETS
from geossl.data.events import GRID, SIZE, SPLITS, VOXEL_MM, Event, EventDataConfig, EventDataset, check_event
from geossl.data.files import atomic_write, cache_folder, existing
from geossl.errors import DataError

log = logging.getLogger("geossl")

POINT_COLUMNS = 8
HDF5_SUFFIXES = (".h5", ".hdf5")
CLUSTER_COLUMNS = {1: 5, 2: 6}
"""Columns of a cluster by version."""
EXTRA_COLUMNS = 5
ELECTRONS_PER_MEV = 0.7 / 23.6e-6
"""Electrons that reach the wires: 23.6 eV ionise an atom, and 0.7 of the electrons do not recombine."""
_LOOKED_AT = 64  # events looked at to tell the version
_AT_ONCE = 1024  # events of which the index is made at a time


class PILArNetFile:
    """One HDF5 file, opened when it is first read, and again in every process that reads it.

    Args:
        path: The file.

    Attributes:
        version: 1 or 2, told by the number of columns of a cluster.

    Raises:
        DataError: the file is missing, damaged, or holds something else.
    """

    def __init__(self, path: Path) -> None:
        self.path = existing(path)
        self._opened: tuple[int, dict[str, Any]] | None = None
        arrays = self._arrays()
        self._count = len(arrays["point"])
        differing = [f"{name} {len(array)}" for name, array in arrays.items() if len(array) != self._count]
        if differing:
            raise DataError(f"{path}: has {self._count} events in point, but {', '.join(differing)}; the file is incomplete")
        self.version = self._find_version()

    def __len__(self) -> int:
        """Number of events."""
        return self._count

    def _arrays(self) -> dict[str, Any]:
        """Return this process's handles of the arrays, by name: HDF5's must not be shared with a forked one."""
        if self._opened is not None and self._opened[0] == os.getpid():
            return self._opened[1]
        import h5py

        try:
            # Nothing is written, so no lock is needed; many network file systems have none to give.
            file = h5py.File(self.path, "r", locking=False)
        except OSError as error:
            raise DataError(f"{self.path}: cannot be read as HDF5; it is damaged, truncated or of another kind ({error})") from error
        arrays = {}
        for name in ("point", "cluster", *(["cluster_extra"] if "cluster_extra" in file else [])):
            if name not in file:
                raise DataError(f"{self.path}: has no array {name}; it holds {', '.join(file) or 'none'}, PILArNet-M has point and cluster")
            array = arrays[name] = file[name]
            inner = h5py.check_vlen_dtype(array.dtype) if isinstance(array, h5py.Dataset) else None
            if inner is None or np.dtype(inner).kind not in "iuf" or array.ndim != 1:
                raise DataError(f"{self.path}: {name} must hold one row of numbers of variable length for each event, got {array}")
        self._opened = os.getpid(), arrays
        return arrays

    def _rows(self, name: str, key: int | slice) -> Any:
        try:
            return self._arrays()[name][key]
        except (OSError, RuntimeError) as error:
            raise DataError(f"{self.path}: {name} of event {key} cannot be read; the file is damaged or truncated ({error})") from error

    def _find_version(self) -> int:
        """Tell the version by which number of columns makes sense; a row of 30 numbers alone could be of either."""
        possible, wrong, any_fits = set(CLUSTER_COLUMNS), "", False
        for row in range(min(self._count, _LOOKED_AT)):
            points, flat = len(self._rows("point", row)) // POINT_COLUMNS, self._rows("cluster", row)
            fitting = {v for v in possible if len(flat) % CLUSTER_COLUMNS[v] == 0 and flat[:: CLUSTER_COLUMNS[v]].sum() == points}
            if fitting:
                possible, any_fits = fitting, True
            else:  # one such event is refused when it is read; the file, if all are like it
                wrong = wrong or (
                    f"{self.path}: event {row} fits neither version of PILArNet-M: {len(flat)} numbers in cluster, expected 5 (version 1) "
                    f"or 6 (version 2) for each, whose first sum to the {points} points"
                )
            if len(possible) == 1:
                break
        if wrong and not any_fits:
            raise DataError(wrong)
        return min(possible)

    def read(self, row: int) -> Event:
        """Return event ``row``, checked.

        Raises:
            DataError: the event is damaged or malformed; the message names the file and the event.
        """
        source = self.source(row)
        point, width = self._rows("point", row), CLUSTER_COLUMNS[self.version]
        cluster = self._rows("cluster", row)
        for name, flat, columns in (("point", point, POINT_COLUMNS), ("cluster", cluster, width)):
            if len(flat) % columns:
                raise DataError(f"{source}: {name} has {len(flat)} numbers, which is not a multiple of its {columns} columns")
        point = point.reshape(-1, POINT_COLUMNS)
        coord = point[:, :3]
        # NaN fails both comparisons.
        whole = ((coord >= 0) & (coord < GRID) & (coord == np.floor(coord))).all(1)
        if not whole.all():
            bad = int(whole.argmin())
            raise DataError(f"{source}: point {bad} lies at {coord[bad].tolist()}, expected voxel indices 0..{GRID - 1}")
        extra = None
        if "cluster_extra" in self._arrays():
            extra = self._rows("cluster_extra", row)
            if len(extra) * width != len(cluster) * EXTRA_COLUMNS:
                raise DataError(f"{source}: cluster_extra has {len(extra)} numbers, expected {EXTRA_COLUMNS} for each cluster")
            extra = extra.astype(np.float32).reshape(-1, EXTRA_COLUMNS)
        clusters = cluster.astype(np.int64).reshape(-1, width)
        return check_event(Event(coord.astype(np.int16), point[:, 3].astype(np.float32), clusters, extra), source)

    def source(self, row: int) -> str:
        """Return what an error message calls event ``row``."""
        return f"{self.path} event {row}"

    def counts(self) -> np.ndarray:
        """Return the number of points of every event, ``[n]`` int64, from its index; made and kept when missing.

        It is kept beside the file or, where that cannot be written, in the cache folder (``$GEOSSL_CACHE``).

        Raises:
            DataError: the index is damaged or that of another file.
        """
        beside = index_path(self.path)
        status = self.path.stat()
        key = hashlib.sha256(f"{self.path.resolve()} {status.st_size} {status.st_mtime_ns}".encode()).hexdigest()[:16]
        cached = cache_folder() / "pilarnet" / f"{beside.stem}_{key}.npy"
        for path in (beside, cached):
            if path.exists():
                return self._read_index(path)
        log.info("%s: counting the points of its %d events, once", self.path, self._count)
        counts = np.empty(self._count, dtype=np.int64)
        width = CLUSTER_COLUMNS[self.version]
        for start in range(0, self._count, _AT_ONCE):
            rows = self._rows("cluster", slice(start, start + _AT_ONCE))
            counts[start : start + len(rows)] = [flat[SIZE::width].sum() for flat in rows]
        path = beside if os.access(self.path.parent, os.W_OK) else cached
        try:
            atomic_write(path, lambda file: np.save(file, counts))
        except DataError as error:
            log.warning("the counted points are not kept (%s); set GEOSSL_CACHE to a folder that can be written", error)
        return counts

    def _read_index(self, path: Path) -> np.ndarray:
        hint = "remove it, it is then made again"
        try:
            counts = np.load(path, allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise DataError(f"{path}: is damaged or truncated ({error}); {hint}") from error
        if counts.shape != (self._count,) or counts.dtype.kind not in "iu":
            raise DataError(f"{path}: must be [{self._count}] integers, one an event, got {list(counts.shape)} {counts.dtype}; {hint}")
        return counts.astype(np.int64)

    def __getstate__(self) -> dict[str, Any]:
        """Handles do not travel to other processes."""
        return {**self.__dict__, "_opened": None}


def index_path(path: Path) -> Path:
    """Return where the index of an HDF5 file stands: ``X_points.npy`` beside ``X.h5``."""
    return path.with_name(f"{path.stem}_points.npy")


def find_event_files(root: Path, files: Iterable[Path] = ()) -> dict[str, list[Path]]:
    """Return the HDF5 files of every part, by name: ``train``, ``val``, ``test``.

    A folder that holds folders of these names (or is one of them) has those parts. All other files belong to the part that their own
    folder is named for, or to ``train``.

    Raises:
        DataError: there is no such file or folder, or no HDF5 file in it.
    """
    given = list(files)
    if not given:
        root = existing(root, "file or folder")
        if root.is_dir() and root.name in SPLITS:
            root = root.parent
        folders = [root / name for name in SPLITS if (root / name).is_dir()] or [root]
        given = (
            [root] if root.is_file() else sorted(path for folder in folders for path in folder.iterdir() if path.suffix in HDF5_SUFFIXES)
        )
        if not given:
            raise DataError(
                f"{root}: holds no {' or '.join(HDF5_SUFFIXES)} files, nor do folders train, val and test in it; check the path"
            )
    parts: dict[str, list[Path]] = {}
    for path in given:
        parts.setdefault(path.parent.name if path.parent.name in SPLITS else "train", []).append(existing(path))
    return parts


def choose_split(parts: Iterable[str], split: str, source: object) -> list[str]:
    """Return which of the ``parts`` there are make up ``split``: itself, or all of them for ``all``; ``val`` stands in for ``test``.

    Raises:
        DataError: there is no such part; the message begins with ``source``.
    """
    present = [name for name in SPLITS if name in set(parts)]
    if split == "all":
        return present
    if split not in SPLITS:
        raise DataError(f"{source}: unknown split {split!r}; choose one of {', '.join(SPLITS)}, all")
    if split == "test" and "test" not in present:
        split = "val"  # version 1 has no test part, and is reported on its val part
    if split not in present:
        raise DataError(f"{source}: has no {split} part, only {', '.join(present)}; put its files into a folder named {split}")
    return [split]


@dataclass(kw_only=True)
class PILArNetConfig(EventDataConfig):
    """PILArNet-M's HDF5 files, versions 1 and 2."""

    name: str = "pilarnet"
    root: Path = Path("data/pilarnet")
    """A file, or a folder: of files, or of folders ``train``, ``val`` and ``test`` with files."""
    files: tuple[Path, ...] = ()
    """Read these files instead; each belongs to the part that its folder is named for, else to ``train``."""

    def build(self, split: str) -> PILArNetDataset:
        """Make the data set of ``split``: ``train``, ``val``, ``test`` (``val`` where there is none) or ``all``."""
        return PILArNetDataset(self, split)


@DATASETS.register
def pilarnet() -> PILArNetConfig:
    """Events of PILArNet-M, read from its HDF5 files."""
    return PILArNetConfig()


class PILArNetDataset(EventDataset):
    """See :class:`PILArNetConfig`."""

    def __init__(self, config: PILArNetConfig, split: str) -> None:
        parts = find_event_files(config.root, config.files)
        source = config.root if not config.files else f"{config.name}.files"
        self._files = [PILArNetFile(path) for part in choose_split(parts, split, source) for path in parts[part]]
        counts = [file.counts() for file in self._files]
        rows = [np.flatnonzero(count >= config.min_points) for count in counts]
        self._file = np.repeat(np.arange(len(rows)), [len(kept) for kept in rows])
        self._row = np.concatenate(rows)
        self._points = np.concatenate([count[kept] for count, kept in zip(counts, rows, strict=True)])
        if not len(self._row):
            total = sum(map(len, counts))
            raise DataError(f"{source}: none of the {total} events of its {split} part has min_points={config.min_points} points")
        super().__init__(config, len(self._row))

    def read(self, row: int) -> Event:
        """Return event ``row`` as stored."""
        event = self._files[self._file[row]].read(int(self._row[row]))
        if len(event) != self._points[row]:
            raise DataError(
                f"{self.source(row)}: has {len(event)} points, but {self._points[row]} in its index; remove the file "
                f"{index_path(self._files[self._file[row]].path).name}, it is then made again"
            )
        return event

    def source(self, row: int) -> str:
        """Return the file and the event in it, counted from 0."""
        return self._files[self._file[row]].source(int(self._row[row]))


def write_pilarnet(path: Path, events: Iterable[Event], version: int = 1) -> int:
    """Write events in the layout of PILArNet-M, and the index beside the file; each is there whole or not at all.

    ``energy`` is written as value and as energy deposit; time is 0, dx the voxel's side.

    Args:
        path: HDF5 file to write.
        events: Events with a particle column (and ``extra``) for version 2; version 1 leaves both out.
        version: 1 or 2.

    Returns:
        How many events were written.

    Raises:
        DataError: an event is malformed or lacks what version 2 needs, or the file cannot be written.
    """
    import h5py

    if version not in CLUSTER_COLUMNS:
        raise DataError(f"write_pilarnet: version must be 1 or 2, got {version!r}")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    kinds = {"point": np.float32, "cluster": np.int64} | ({"cluster_extra": np.float32} if version == 2 else {})
    counts: list[int] = []
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with h5py.File(temporary, "w", libver="latest") as file:
            arrays = {
                name: file.create_dataset(name, (0,), h5py.vlen_dtype(np.dtype(kind)), maxshape=(None,), chunks=(_AT_ONCE,))
                for name, kind in kinds.items()
            }
            for row, event in enumerate(events):
                rows = _to_rows(event, version, f"event {row}")
                if row % _AT_ONCE == 0:
                    for array in arrays.values():
                        array.resize((row + _AT_ONCE,))
                for name, array in arrays.items():
                    array[row] = rows[name]
                counts.append(len(event))
            for array in arrays.values():
                array.resize((len(counts),))
        with temporary.open("rb+") as written:
            os.fsync(written.fileno())
        index_path(path).unlink(missing_ok=True)  # never that of another file; a missing one is made when the file is read
        temporary.replace(path)
        atomic_write(index_path(path), lambda file: np.save(file, np.array(counts, dtype=np.int64)))
    except OSError as error:
        raise DataError(f"{path}: could not be written ({error})") from error
    finally:
        temporary.unlink(missing_ok=True)
    return len(counts)


def _to_rows(event: Event, version: int, source: str) -> dict[str, np.ndarray]:
    """Return the flat rows of an event."""
    check_event(event, source)
    width = CLUSTER_COLUMNS[version]
    if event.clusters.shape[1] < width or (version == 2 and event.extra is None):
        raise DataError(f"{source}: version 2 needs the particle of each cluster and extra [C, 5], which the event does not have")
    point = np.zeros((len(event), POINT_COLUMNS), dtype=np.float32)
    point[:, :3] = event.voxel
    point[:, 3] = point[:, 4] = event.energy
    point[:, 6] = event.energy * ELECTRONS_PER_MEV
    point[:, 7] = VOXEL_MM
    rows: dict[str, np.ndarray] = {"point": point.reshape(-1), "cluster": event.clusters[:, :width].astype(np.int64).reshape(-1)}
    if event.extra is not None:
        rows["cluster_extra"] = event.extra.astype(np.float32).reshape(-1)
    return rows
