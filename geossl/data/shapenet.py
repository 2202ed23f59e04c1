"""ShapeNet55 in the packaging of Point-BERT: lists of names, and one ``.npy [8192, 3]`` per shape."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from geossl.data.augment import AugmentConfig
from geossl.data.dataset import DATASETS, PointDataConfig, PointDataset
from geossl.data.files import existing, read_lines
from geossl.data.readers import read_points
from geossl.data.sample import PointCloud
from geossl.errors import DataError


@dataclass(kw_only=True)
class ShapeNet55Config(PointDataConfig):
    """ShapeNet55: ``ROOT/ShapeNet-55/{train,test}.txt`` and ``ROOT/shapenet_pc/<taxonomy>-<model>.npy``. The y axis is up."""

    name: str = "shapenet55"
    root: Path = Path("data/ShapeNet55-34")
    """Folder that holds ``ShapeNet-55`` and ``shapenet_pc``."""

    def build(self, split: str) -> ShapeNet55Dataset:
        """Make the data set of ``split``: ``train``, ``test`` or ``all`` (both lists)."""
        return ShapeNet55Dataset(self, split)


@DATASETS.register
def shapenet55() -> ShapeNet55Config:
    """Point-MAE's pretraining set: 1,024 points; Point-M2AE and I2P-MAE take 2,048."""
    return ShapeNet55Config(augment=AugmentConfig(rotation_axis="y"))


class ShapeNet55Dataset(PointDataset):
    """See :class:`ShapeNet55Config`; the classes are the taxonomy numbers of both lists, sorted."""

    def __init__(self, config: ShapeNet55Config, split: str) -> None:
        folder = existing(config.root, "folder") / "ShapeNet-55"
        lists = {name: read_lines(folder / f"{name}.txt") for name in ("train", "test")}
        lists["all"] = lists["train"] + lists["test"]
        if split not in lists:
            raise DataError(f"shapenet55: unknown split {split!r}; choose one of {', '.join(lists)}")
        self.names = lists[split]
        if not self.names:
            raise DataError(f"{folder / split}.txt: lists no shapes")
        bad = next((name for name in lists["all"] if "-" not in name or not name.endswith(".npy")), None)
        if bad is not None:
            raise DataError(f"{folder}: the lists must name <taxonomy>-<model>.npy, got {bad!r}")
        classes = sorted({name.split("-")[0] for name in lists["all"]})
        number = {name: index for index, name in enumerate(classes)}
        super().__init__(config, np.array([number[name.split("-")[0]] for name in self.names]), classes)
        self._folder = existing(config.root / "shapenet_pc", "folder")

    def read(self, row: int) -> PointCloud:
        """Return the stored cloud, ``[8192]`` points."""
        return read_points(self.source(row), columns="xyz")

    def source(self, row: int) -> str:
        """Return the path of the file."""
        return str(self._folder / self.names[row])
