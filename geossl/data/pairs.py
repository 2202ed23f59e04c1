"""Pairs of images of one place, for cross-view completion: folders and lists as CroCo publishes them, or a list of one's own.

What all data sets of pairs share is here too: :class:`PairDataset` turns two decoded images into a sample.
"""

from __future__ import annotations

import logging
import os
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
from torch import Tensor

from geossl.config import require
from geossl.data.dataset import DATASETS
from geossl.data.files import existing, read_lines
from geossl.data.image_augment import ColorJitterConfig, jitter_pair, random_crop
from geossl.data.image_files import IMAGE_SUFFIXES, decode_image
from geossl.data.sample import ImageSample
from geossl.errors import DataError
from geossl.geometry import normalize_images

log = logging.getLogger("geossl")

_IN_A_ROW = 100  # unusable pairs one after the other, after which something else is wrong than a few files


@dataclass(kw_only=True)
class PairDataConfig:
    """Fields common to the data sets of image pairs.

    A training sample is a random window of each image, drawn apart, with its own colour changes, as published for CroCo (no flips).
    """

    name: str
    """Registered name of the data set."""
    crop: int = 224
    """Rows and columns of a sample's images."""
    resize: int | None = 256
    """Images are brought to this many pixels along their shorter side before windows are cut (smaller ones are enlarged); CroCo's are
    256 x 256. None leaves them as they are."""
    augment: ColorJitterConfig = field(default_factory=ColorJitterConfig)
    """Colour changes of training samples."""
    damaged: Literal["skip", "error"] = "skip"
    """A pair that cannot be used (a file damaged, missing or too small): take the next one in its place, with a warning that counts, or
    stop."""

    def __post_init__(self) -> None:
        require(self.crop >= 8, "crop", "must be at least 8", self.crop)
        require(self.resize is None or self.resize >= self.crop, "resize", f"must be at least crop ({self.crop})", self.resize)
        require(self.damaged in ("skip", "error"), "damaged", "must be skip or error", self.damaged)

    def describe(self) -> str:
        """Return what a sample is, in words."""
        return f"pairs of images of {self.crop} x {self.crop} pixels"


class PairDataset:
    """A data set of image pairs; sub-classes define :meth:`read` and :meth:`source`.

    Attributes:
        labels: ``[n]`` int64, all -1: pairs have no classes.
        unusable: Rows found to be unusable so far, in this process, with the reason.
    """

    columns = ("rgb",)
    channels = 3

    def __init__(self, config: PairDataConfig, length: int) -> None:
        self.config = config
        self.labels = np.full(length, -1, dtype=np.int64)
        self.groups = self.labels
        self.classes: list[str] = []
        self.unusable: dict[int, str] = {}

    def __len__(self) -> int:
        """Number of pairs."""
        return len(self.labels)

    def order(self, rng: np.random.Generator) -> np.ndarray:
        """Return the order ``[n]`` in which an epoch visits the pairs."""
        return rng.permutation(len(self))

    def read(self, row: int) -> tuple[Tensor, Tensor]:
        """Return the images of pair ``row`` as stored, ``[3, H, W]`` uint8 (brought to ``config.resize``)."""
        raise NotImplementedError

    def source(self, row: int) -> str:
        """Return what an error message calls pair ``row``."""
        return f"{self.config.name}[{row}]"

    def get(self, row: int, rng: np.random.Generator | None = None) -> ImageSample:
        """Return sample ``row``: random windows with colour changes, or the middle windows as they are.

        Args:
            row: 0 <= row < len(self).
            rng: Source of every random choice; equal states give equal samples. None asks for the evaluation form.

        Returns:
            Normalised images ``[3, crop, crop]``. ``index`` is another row where pair ``row`` could not be used and ``config.damaged``
            is ``skip``: the next one that can be.

        Raises:
            DataError: the pair cannot be used; the message names its file.
        """
        if not 0 <= row < len(self):
            raise IndexError(f"{self.config.name}: row {row} is outside 0..{len(self) - 1}")
        for step in range(min(len(self), _IN_A_ROW)):
            place = (row + step) % len(self)
            if place in self.unusable:
                continue
            try:
                return self._sample(place, rng)
            except DataError as error:
                if self.config.damaged == "error":
                    raise
                self.unusable[place] = str(error)
                log.warning("left out %d pairs that cannot be used (counted by each process); the latest: %s", len(self.unusable), error)
        first = next(iter(self.unusable.values()))
        raise DataError(f"{self.config.name}: {min(len(self), _IN_A_ROW)} pairs in a row cannot be used; the first: {first}")

    def _sample(self, row: int, rng: np.random.Generator | None) -> ImageSample:
        config, source, size = self.config, self.source(row), (self.config.crop, self.config.crop)
        first, second = (random_crop(image, size, rng, source).float() / 255 for image in self.read(row))
        if rng is not None:
            first, second = jitter_pair(first, second, rng, config.augment)  # type: ignore[assignment]
        return ImageSample(normalize_images(first), row, normalize_images(second))

    def check(self) -> list[str]:
        """Read every pair and return why those that cannot be used cannot, one text each."""
        problems = []
        for row in range(len(self)):
            try:
                self._sample(row, None)
            except DataError as error:
                problems.append(str(error))
        return problems


@dataclass(kw_only=True)
class PairsConfig(PairDataConfig):
    """Pairs of image files.

    ``root`` is a folder or a list. A folder is searched, with its sub-folders, for ``pairs.txt`` (two paths a line, relative to it), for
    ``listing.txt`` (stems: ``0/12_1.jpg``, ``0/12_2.jpg`` is ``0/12``, as CroCo's extracted crops have it) and, where neither is, for files
    ``NAME_1.jpeg``, ``NAME_2.jpeg`` (Habitat; also png and others). A list is a text file with two paths a line, relative to its own
    folder, parted by a tab, a comma or spaces; lines that begin with ``#`` are left out. Listed pairs whose files are missing are left
    out with a warning that counts them.

    That two images show the same place is not checked: use ``tools/prepare_data.py pairs`` where poses are known.
    """

    name: str = "pairs"
    root: Path = Path("data/habitat_release")
    """Folder, or text file."""
    test_fraction: float = 0.0
    """Part of the pairs, the last ones, that is the test part, where no folder's name contains ``val``; those folders are the test part."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0.0 <= self.test_fraction < 1.0, "test_fraction", "must lie in [0, 1)", self.test_fraction)

    def build(self, split: str = "train") -> PairsDataset:
        """Make the data set of ``split``: ``train``, ``test`` (which may be empty) or ``all``."""
        return PairsDataset(self, split)


@DATASETS.register
def pairs() -> PairsConfig:
    """Folders and lists of image pairs, as Habitat renders and CroCo v2's real crops are published."""
    return PairsConfig()


class PairsDataset(PairDataset):
    """See :class:`PairsConfig`. ``missing`` counts the listed pairs that were left out since a file does not exist."""

    def __init__(self, config: PairsConfig, split: str) -> None:
        if split not in ("train", "test", "all"):
            raise DataError(f"pairs: unknown split {split!r}; choose one of train, test, all")
        self.folder = config.root.parent if existing(config.root, "folder or list").is_file() else config.root
        found = _choose_part(list(find_pairs(config.root)), split, config.test_fraction)
        there = [pair for pair, is_there in zip(found, _exist(self.folder, found), strict=True) if is_there]
        self.missing = len(found) - len(there)
        if self.missing:
            gone = set(there)
            first = next(pair for pair in found if pair not in gone)
            count = f"{self.missing} of {len(found)} listed pairs"
            text = f"{config.root}: {count} name files that do not exist; the first: {first[0]}, {first[1]}"
            if not there or config.damaged == "error":
                raise DataError(f"{text}; check that the list belongs to this folder")
            log.warning("left out: %s", text)
        if not there and split != "test":
            raise DataError(
                f"{config.root}: holds no pairs of the {split} part; expected pairs.txt, listing.txt or files NAME_1.jpeg and NAME_2.jpeg, "
                "or a list of two paths a line"
            )
        self._paths = _Texts(f"{first}\t{second}" for first, second in there)
        super().__init__(config, len(there))

    def paths(self, row: int) -> tuple[Path, Path]:
        """Return the files of pair ``row``."""
        first, second = self._paths[row].split("\t")
        return self.folder / first, self.folder / second

    def source(self, row: int) -> str:
        """Return what an error message calls pair ``row``."""
        return " and ".join(map(str, self.paths(row)))

    def read(self, row: int) -> tuple[Tensor, Tensor]:
        """Return the images of pair ``row``, ``[3, H, W]`` uint8."""
        first, second = (decode_image(path, str(path), self.config.resize) for path in self.paths(row))
        return first, second


class _Texts:
    """Many short texts in two arrays: a list of millions would be copied into every worker."""

    def __init__(self, texts: Iterable[str]) -> None:
        parts = [text.encode() for text in texts]
        self._ends = np.cumsum([0] + [len(part) for part in parts], dtype=np.int64)
        self._bytes = np.frombuffer(b"".join(parts), dtype=np.uint8)

    def __getitem__(self, row: int) -> str:
        return self._bytes[self._ends[row] : self._ends[row + 1]].tobytes().decode()


def find_pairs(root: Path) -> Iterator[tuple[str, str]]:
    """Yield the pairs of a folder or list (see :class:`PairsConfig`), as paths relative to it, in a fixed order.

    Raises:
        DataError: ``root`` does not exist, or a list is damaged; the message names its line.
    """
    if root.is_file():
        yield from read_pair_list(root)
        return
    for folder, below, files in os.walk(existing(root, "folder"), followlinks=True):
        below.sort()
        place = os.path.relpath(folder, root)
        prefix = "" if place == "." else f"{place}/"
        for name, read in (("pairs.txt", read_pair_list), ("listing.txt", _read_stems)):
            if name in files:
                yield from ((prefix + first, prefix + second) for first, second in read(Path(folder) / name))
                below.clear()
                break
        else:
            names = set(files)
            for first in sorted(files):
                stem, suffix = os.path.splitext(first)
                second = f"{stem[:-2]}_2{suffix}"
                if stem.endswith("_1") and suffix.lower() in IMAGE_SUFFIXES and second in names:
                    yield prefix + first, prefix + second


def read_pair_list(path: Path) -> list[tuple[str, str]]:
    """Read a list of two paths a line, parted by a tab, a comma or spaces; lines that begin with ``#`` are left out.

    Raises:
        DataError: a line holds something else; the message gives it.
    """
    pairs = []
    for line in read_lines(path):
        if line.startswith("#"):
            continue
        separator = "\t" if "\t" in line else "," if "," in line else None
        words = [word.strip() for word in line.split(separator)]
        if len(words) != 2 or not all(words):
            raise DataError(f"{path}: expected two paths a line, parted by a tab, a comma or spaces, got {line[:200]!r}")
        pairs.append((words[0], words[1]))
    return pairs


def _read_stems(path: Path) -> list[tuple[str, str]]:
    """Read ``listing.txt`` of extracted crops: the part of the names before ``_1.jpg`` and ``_2.jpg``."""
    return [(f"{line}_1.jpg", f"{line}_2.jpg") for line in read_lines(path) if not line.startswith("#")]


def _choose_part(found: list[tuple[str, str]], split: str, test_fraction: float) -> list[tuple[str, str]]:
    """Return the pairs of a split; as published, folders whose names contain ``val`` are not trained on."""
    held_out = ["val" in os.path.dirname(first) for first, _ in found]
    if not any(held_out):
        kept = len(found) - round(test_fraction * len(found))
        held_out = [row >= kept for row in range(len(found))]
    return [pair for pair, held in zip(found, held_out, strict=True) if split == "all" or held == (split == "test")]


def _exist(root: Path, pairs: list[tuple[str, str]]) -> Iterator[bool]:
    """Tell of each pair whether both files exist; folders are listed once, which is much quicker than asking for every file."""
    listed: OrderedDict[str, set[str]] = OrderedDict()

    def exists(name: str) -> bool:
        folder, file = os.path.split(os.path.join(root, name))
        if folder not in listed:
            listed[folder] = set(os.listdir(folder)) if os.path.isdir(folder) else set()
            if len(listed) > 16:  # lists go from folder to folder
                listed.popitem(last=False)
        return file in listed[folder]

    return (exists(first) and exists(second) for first, second in pairs)
