"""ScanObjectNN in its published HDF5 files: real scans of 15 classes of indoor objects, 2,048 points each."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np

from geossl.data.augment import AugmentConfig
from geossl.data.dataset import DATASETS, PointDataConfig, PointDataset
from geossl.data.files import existing, read_h5_clouds
from geossl.data.sample import PointCloud
from geossl.errors import DataError

CLASSES = ["bag", "bin", "box", "cabinet", "chair", "desk", "display", "door", "shelf", "table", "bed", "pillow", "sink", "sofa", "toilet"]

_FILES = {  # folder and end of the file name
    "obj_bg": ("main_split", "objectdataset.h5"),
    "obj_only": ("main_split_nobg", "objectdataset.h5"),
    "pb_t50_rs": ("main_split", "objectdataset_augmentedrot_scale75.h5"),
}


@dataclass(kw_only=True)
class ScanObjectNNConfig(PointDataConfig):
    """ScanObjectNN: ``ROOT/main_split/training_objectdataset.h5`` and its relatives. The y axis is up."""

    name: str = "scanobjectnn"
    points: int = 2048
    normalize: Literal["subset", "cloud", "none"] = "none"
    augment: AugmentConfig = field(default_factory=lambda: AugmentConfig(rotation_axis="y"))
    root: Path = Path("data/ScanObjectNN/h5_files")
    """Folder that holds ``main_split`` and ``main_split_nobg``."""
    variant: Literal["obj_bg", "obj_only", "pb_t50_rs"] = "pb_t50_rs"
    """Objects with background, without background, or the hardest: perturbed boxes, rotated and scaled."""

    def build(self, split: str) -> ScanObjectNNDataset:
        """Make the data set of ``split``: ``train``, ``test`` or ``all``."""
        return ScanObjectNNDataset(self, split)


@DATASETS.register
def scanobjectnn() -> ScanObjectNNConfig:
    """The hardest variant, PB-T50-RS, 2,048 points, as published not normalised."""
    return ScanObjectNNConfig()


class ScanObjectNNDataset(PointDataset):
    """See :class:`ScanObjectNNConfig`; all clouds are held in memory."""

    def __init__(self, config: ScanObjectNNConfig, split: str) -> None:
        prefixes = {"train": ("training_",), "test": ("test_",), "all": ("training_", "test_")}
        if split not in prefixes:
            raise DataError(f"scanobjectnn: unknown split {split!r}; choose one of {', '.join(prefixes)}")
        folder, end = _FILES[config.variant]
        self.files = [existing(config.root, "folder") / folder / (prefix + end) for prefix in prefixes[split]]
        parts = [read_h5_clouds(path, classes=len(CLASSES)) for path in self.files]
        self._first = np.cumsum([0] + [len(part["data"]) for part in parts])
        self._coord = np.concatenate([part["data"] for part in parts])
        super().__init__(config, np.concatenate([part["label"] for part in parts]), CLASSES)

    def read(self, row: int) -> PointCloud:
        """Return the stored cloud, ``[2048]`` points."""
        return PointCloud(self._coord[row])

    def source(self, row: int) -> str:
        """Return the path of the file and the row in it."""
        file = int(np.searchsorted(self._first, row, side="right")) - 1
        return f"{self.files[file]} row {row - self._first[file]}"
