"""A user's own folder of point clouds and meshes, as a data set."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Literal

import numpy as np

from geossl.config import require
from geossl.data.dataset import DATASETS, PointDataConfig, PointDataset
from geossl.data.files import existing, read_lines
from geossl.data.readers import SUFFIXES, name_seed, read_points
from geossl.data.sample import Columns, PointCloud
from geossl.errors import DataError

log = logging.getLogger("geossl")

SPLITS = ("train", "test", "all")


@dataclass(kw_only=True)
class FileOptions:
    """Which files of a folder are clouds, how they are read, and which are held out."""

    suffixes: tuple[str, ...] = ()
    """Ends of the file names to read, such as ``.obj .ply``; none means every kind that can be read."""
    exclude: tuple[str, ...] = ()
    """Patterns of names (relative to the folder) that are no clouds, such as ``*/low_res/*`` or ``lists_*.txt``."""
    file_columns: Columns | Literal["auto"] = "auto"
    """What the columns of text and NPY files are; ``auto`` tells normals from colours by their values."""
    points: int = 8192
    """Points drawn from each mesh; a point cloud that has more is thinned to as many at random, one that has fewer is kept whole."""
    up: Literal["z", "y"] = "z"
    """Axis that is up in the files; ``y`` (most downloaded meshes) is turned to z."""
    center: bool = False
    """Subtract the middle of the bounding box while reading; needed for map coordinates, which float32 cannot hold."""
    test_fraction: float = 0.1
    """Share of the files held out for testing, chosen by a hash of their names; folders named ``train`` and ``test`` go before."""
    test_list: Path | None = None
    """File naming the held-out files, one per line, with or without folders and suffix; goes before the two above."""
    on_bad: Literal["error", "skip"] = "error"
    """A file that cannot be used ends the reading, or is left out with a warning that counts them."""

    def __post_init__(self) -> None:
        self.suffixes = tuple(suffix.lower() if suffix.startswith(".") else f".{suffix.lower()}" for suffix in self.suffixes)
        unknown = [suffix for suffix in self.suffixes if suffix not in SUFFIXES]
        require(not unknown, "suffixes", f"must be among {', '.join(SUFFIXES)}", unknown)
        require(self.points >= 2, "points", "must be at least 2", self.points)
        require(0.0 <= self.test_fraction < 1.0, "test_fraction", "must lie in [0, 1)", self.test_fraction)


@dataclass(frozen=True)
class FileList:
    """The clouds found under ``root``, sorted by name.

    Args:
        root: The folder.
        names: Path of each file relative to ``root``, with forward slashes.
        labels: Class of each file, ``[n]`` int64, -1 for files that lie in no sub-folder.
        test: ``[n]`` bool, True for the files held out.
        classes: Names of the sub-folders.
    """

    root: Path
    names: list[str]
    labels: np.ndarray
    test: np.ndarray
    classes: list[str]


def find_files(root: Path, options: FileOptions) -> FileList:
    """List the clouds under ``root``. The class of a file is the first folder on its path that is not a split.

    Raises:
        DataError: the folder does not exist or holds no file that can be read.
    """
    root = existing(root, "folder")
    wanted = options.suffixes or SUFFIXES
    paths = (path.relative_to(root) for path in root.rglob("*") if path.suffix.lower() in wanted and path.is_file())
    visible = (path.as_posix() for path in paths if not any(part.startswith(".") for part in path.parts))
    names = sorted(name for name in visible if not any(fnmatchcase(name, pattern) for pattern in options.exclude))
    if not names:
        raise DataError(f"{root}: no file ends in {', '.join(wanted)} (and is not excluded); is this the right folder?")
    folders = [[part for part in name.split("/")[:-1] if part not in SPLITS] for name in names]
    classes = sorted({parts[0] for parts in folders if parts})
    number = {name: index for index, name in enumerate(classes)}
    labels = np.array([number[parts[0]] if parts else -1 for parts in folders], dtype=np.int64)
    return FileList(root, names, labels, _held_out(names, options), classes)


def _held_out(names: list[str], options: FileOptions) -> np.ndarray:
    """Return ``[n]`` bool, True for the files of the test part."""
    if options.test_list is not None:
        listed = set(read_lines(options.test_list))
        test = np.array([bool(listed & {name, name.rsplit(".", 1)[0], Path(name).name, Path(name).stem}) for name in names])
        if not test.any():
            raise DataError(f"{options.test_list}: none of its lines names a file of the folder")
        return test
    split = [next((part for part in name.split("/")[:-1] if part in ("train", "test")), None) for name in names]
    if any(split):
        return np.array([part == "test" for part in split])
    test = np.zeros(len(names), dtype=bool)
    by_hash = sorted(range(len(names)), key=lambda row: name_seed(names[row]))
    test[by_hash[: round(options.test_fraction * len(names))]] = True
    return test


def read_file(root: Path, name: str, options: FileOptions, *, center: bool) -> PointCloud:
    """Read one file of a folder, thin it to ``options.points`` and turn it z up; the same file always gives the same points."""
    cloud = read_points(root / name, columns=options.file_columns, mesh_points=options.points, center=center)
    if len(cloud) > options.points:
        cloud = cloud[np.random.default_rng(name_seed(Path(name).name)).choice(len(cloud), options.points, replace=False)]
    if options.up == "z":
        return cloud
    turn = np.array([[1, 0, 0], [0, 0, -1], [0, 1, 0]], dtype=np.float32)
    return PointCloud(cloud.coord @ turn.T, None if cloud.normal is None else cloud.normal @ turn.T, cloud.color)


@dataclass(kw_only=True)
class FolderConfig(PointDataConfig):
    """A folder of PLY, OBJ, OFF, STL, GLB, XYZ, TXT, CSV, PTS, NPY, NPZ and HDF5 files, one cloud or mesh each.

    All files are read at the start and held in memory; for more than a few thousand, convert the folder once with
    ``tools/prepare_data.py folder`` and use the data set ``shards``.
    """

    name: str = "folder"
    root: Path = Path("data/my_objects")
    """The folder. The names of its sub-folders are the classes."""
    files: FileOptions = field(default_factory=FileOptions)
    """Which files are read, and how."""

    def build(self, split: str) -> FolderDataset:
        """Make the data set of ``split``: ``train``, ``test`` or ``all``."""
        return FolderDataset(self, split)


@DATASETS.register
def folder() -> FolderConfig:
    """A user's own files."""
    return FolderConfig()


class FolderDataset(PointDataset):
    """See :class:`FolderConfig`. ``names [n]`` are the files, ``skipped`` the messages of those left out."""

    def __init__(self, config: FolderConfig, split: str) -> None:
        if split not in SPLITS:
            raise DataError(f"folder: unknown split {split!r}; choose one of {', '.join(SPLITS)}")
        found = find_files(config.root, config.files)
        wanted = {"train": ~found.test, "test": found.test, "all": np.ones(len(found.test), dtype=bool)}[split]
        self.names: list[str] = []
        self.skipped: list[str] = []
        self._clouds: list[PointCloud] = []
        labels = []
        for row in np.flatnonzero(wanted):
            try:
                # Without normalisation the place of the cloud matters and must be kept.
                cloud = read_file(config.root, found.names[row], config.files, center=config.files.center or config.normalize != "none")
                cloud = cloud.only(config.columns, str(config.root / found.names[row]))
            except DataError as error:
                if config.files.on_bad == "error":
                    raise
                self.skipped.append(str(error))
                continue
            self._clouds.append(cloud)
            self.names.append(found.names[row])
            labels.append(found.labels[row])
        if self.skipped:
            log.warning("%s: left out %d of %d files; the first: %s", config.root, len(self.skipped), int(wanted.sum()), self.skipped[0])
        if not self.names:
            raise DataError(f"{config.root}: the {split} part is empty ({len(found.names)} files in all, {len(self.skipped)} left out)")
        super().__init__(config, np.array(labels, dtype=np.int64), found.classes)

    def read(self, row: int) -> PointCloud:
        """Return the cloud as read, z up."""
        return self._clouds[row]

    def source(self, row: int) -> str:
        """Return the path of the file."""
        return str(self.config.root / self.names[row])  # type: ignore[attr-defined]
