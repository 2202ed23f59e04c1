"""Pairs of images from webdataset tars, read in place: any pair without those before it, in any order."""

from __future__ import annotations

import logging
import re
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from geossl.config import require
from geossl.data.dataset import DATASETS
from geossl.data.files import existing
from geossl.data.image_files import IMAGE_SUFFIXES, decode_image
from geossl.data.pair_writer import read_index
from geossl.data.pairs import PairDataConfig, PairDataset
from geossl.errors import DataError

log = logging.getLogger("geossl")

_SIDE = re.compile(rf"(.+)\.([12])({'|'.join(re.escape(suffix) for suffix in IMAGE_SUFFIXES)})", re.IGNORECASE)


@dataclass(kw_only=True)
class PairShardsConfig(PairDataConfig):
    """Pairs in webdataset tars: those of ``tools/prepare_data.py pairs``, or any with ``KEY.1.jpg`` and ``KEY.2.jpg`` in them.

    A tar that was cut off gives the pairs before the cut; those lost are counted in a warning.
    """

    name: str = "pair_shards"
    root: Path = Path("data/pairs")
    """Folder of the tars."""
    test_fraction: float = 0.0
    """Part of the pairs, the last ones, that is the test part. Shards are not torn: of few shards the test part may be empty."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0.0 <= self.test_fraction < 1.0, "test_fraction", "must lie in [0, 1)", self.test_fraction)

    def build(self, split: str = "train") -> PairShardsDataset:
        """Make the data set of ``split``: ``train``, ``test`` (which may be empty) or ``all``."""
        return PairShardsDataset(self, split)


@DATASETS.register
def pair_shards() -> PairShardsConfig:
    """Image pairs in webdataset tars."""
    return PairShardsConfig()


class PairShardsDataset(PairDataset):
    """See :class:`PairShardsConfig`. ``lost`` counts pairs that are beyond the end of a tar or lack one image."""

    def __init__(self, config: PairShardsConfig, split: str) -> None:
        if split not in ("train", "test", "all"):
            raise DataError(f"pair_shards: unknown split {split!r}; choose one of train, test, all")
        root = existing(config.root, "folder")
        if (root / "index.json").is_file():
            index = read_index(root)
            if index["settings"].get("layout") == "folder":
                raise DataError(f"{root}: holds folders of images, not tars; read it with data.name pairs")
            files = [root / shard["file"] for shard in index["shards"] if shard["pairs"]]
        else:
            files = sorted(root.glob("*.tar"))
        if not files:
            raise DataError(f"{root}: holds no *.tar; expected those of tools/prepare_data.py pairs, or tars with KEY.1.jpg and KEY.2.jpg")
        self._files, places, shards, self.lost, first_lost = files, [], [], 0, ""
        for number, path in enumerate(files):
            found, lost, why = _places(path)
            if lost and not first_lost:
                first_lost = f"{path}: {why}"
            self.lost += lost
            places.append(found)
            shards.append(np.full(len(found), number))
        self._places, self._shard = np.concatenate(places), np.concatenate(shards)
        if self.lost:
            text = f"{self.lost} pairs are lost; the first in {first_lost}"
            if config.damaged == "error" or not len(self._places):
                raise DataError(f"{text}; copy or write that tar again")
            log.warning("left out: %s", text)
        if not len(self._places):
            raise DataError(f"{root}: its tars hold no pairs KEY.1.jpg, KEY.2.jpg")
        part = _part(self._shard, config.test_fraction, split)
        self._places, self._shard = self._places[part], self._shard[part]
        super().__init__(config, len(self._places))

    def source(self, row: int) -> str:
        """Return what an error message calls pair ``row``."""
        return f"{self._files[self._shard[row]]} pair at byte {self._places[row, 0, 0]}"

    def read(self, row: int) -> tuple[Tensor, Tensor]:
        """Return the images of pair ``row``, ``[3, H, W]`` uint8."""
        path = self._files[self._shard[row]]
        data = []
        try:
            with path.open("rb") as file:
                for offset, size in self._places[row].tolist():
                    file.seek(offset)
                    data.append(file.read(size))
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error})") from error
        first, second = (decode_image(part, self.source(row), self.config.resize) for part in data)
        return first, second


def _part(shard: np.ndarray, test_fraction: float, split: str) -> Any:
    """Return which pairs belong to a split; the test part is the last shards that together hold no more than its share."""
    if split == "all":
        return slice(None)
    allowed = round(test_fraction * len(shard))
    sizes = np.bincount(shard)[::-1].cumsum()
    torn = len(sizes) - int(np.searchsorted(sizes, allowed, side="right"))
    return (shard >= torn) == (split == "test")


def _places(path: Path) -> tuple[np.ndarray, int, str]:
    """Tell where the images of a tar lie, ``[pairs, 2, 2]`` (offset and size), how many pairs are lost, and why."""
    end = existing(path, "shard").stat().st_size
    index = path.with_suffix(".npy")
    if index.is_file():
        try:
            places = np.load(index, allow_pickle=False)
            if places.ndim != 3 or places.shape[1:] != (2, 2) or places.dtype != np.int64:
                raise ValueError(f"expected [pairs, 2, 2] int64, got {list(places.shape)} {places.dtype}")
        except (OSError, ValueError, EOFError) as error:
            raise DataError(f"{index}: cannot be read; it is damaged ({error}); remove it and the tar is searched instead") from error
        whole = places.sum(2).max(1) <= end if len(places) else np.zeros(0, dtype=bool)
        return places[whole], int((~whole).sum()), f"it was cut off at {end} bytes"
    return _search(path)


def _search(path: Path) -> tuple[np.ndarray, int, str]:
    """The same for a tar without an index."""
    sides: dict[str, dict[int, tuple[int, int]]] = {}
    end, why = path.stat().st_size, ""
    try:
        with tarfile.open(path, mode="r:") as tar:
            for member in tar:
                match = _SIDE.fullmatch(member.name)
                if match and member.isfile() and member.offset_data + member.size <= end:
                    sides.setdefault(match[1], {})[int(match[2])] = (member.offset_data, member.size)
                elif match and member.isfile():
                    sides.setdefault(match[1], {})
                    why = f"it was cut off at {end} bytes"
    except (tarfile.TarError, OSError, EOFError) as error:
        if not sides:
            raise DataError(f"{path}: cannot be read as a tar; it is damaged ({error})") from error
        why = f"it is damaged ({error})"
    whole = [(pair[1], pair[2]) for pair in sides.values() if len(pair) == 2]
    lost = len(sides) - len(whole)
    return np.array(whole, dtype=np.int64).reshape(-1, 2, 2), lost, why or "a pair lacks one of its images"
