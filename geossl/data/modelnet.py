r"""ModelNet40 in its published packagings, told apart by what the folder holds.

* ``modelnet40_normal_resampled``: ``modelnet40_shape_names.txt``, ``modelnet40_{train,test}.txt`` and ``<class>/<class>_0001.txt`` (10,000
  lines ``x,y,z,nx,ny,nz``), or the same tree with ``.npy`` files. Used for fine-tuning.
* ``modelnet40_ply_hdf5_2048``: ``shape_names.txt``, ``{train,test}_files.txt`` and ``ply_data_*.h5`` (2,048 points, normals). Used
  for the linear SVM.
* ``<class>/{train,test}/*.npy``, or the original meshes ``*.off``.

Published numbers depend on which one was used. The y axis is up in the first two.

Parsing the text of the first takes about 12 ms a shape, more than a training step can hide. Convert it once and use ``shards``::

    python tools/prepare_data.py folder --source modelnet40_normal_resampled --out modelnet40_shards --points 10000 \
        --suffixes .txt --exclude "modelnet*.txt" filelist.txt --test_list modelnet40_normal_resampled/modelnet40_test.txt
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np

from geossl.data.augment import AugmentConfig
from geossl.data.dataset import DATASETS, PointDataConfig, PointDataset
from geossl.data.files import existing, read_h5_clouds, read_lines
from geossl.data.readers import read_points
from geossl.data.sample import PointCloud
from geossl.errors import DataError

SPLITS = {"train": ("train",), "test": ("test",), "all": ("train", "test")}


@dataclass(kw_only=True)
class ModelNet40Config(PointDataConfig):
    """ModelNet40: 9,843 training and 2,468 test shapes in 40 classes."""

    name: str = "modelnet40"
    normalize: Literal["subset", "cloud", "none"] = "cloud"
    augment: AugmentConfig = field(default_factory=lambda: AugmentConfig(rotation_axis="y"))
    root: Path = Path("data/modelnet40_normal_resampled")
    """Folder of one of the published packagings."""

    def build(self, split: str) -> ModelNet40Files | ModelNet40Hdf5:
        """Make the data set of ``split``: ``train``, ``test`` or ``all``."""
        root = existing(self.root, "folder")
        if split not in SPLITS:
            raise DataError(f"modelnet40: unknown split {split!r}; choose one of {', '.join(SPLITS)}")
        if (root / "train_files.txt").exists():
            return ModelNet40Hdf5(self, SPLITS[split])
        if (root / "modelnet40_train.txt").exists():
            return ModelNet40Files(self, *_listed(root, SPLITS[split]))
        if any(root.glob("*/train")):
            return ModelNet40Files(self, *_in_folders(root, SPLITS[split]))
        raise DataError(
            f"{root}: is no known packaging of ModelNet40; expected modelnet40_train.txt (normal_resampled), train_files.txt "
            "(ply_hdf5_2048) or folders <class>/train"
        )


@DATASETS.register
def modelnet40() -> ModelNet40Config:
    """ModelNet40, 1,024 points, any published packaging."""
    return ModelNet40Config()


def _listed(root: Path, splits: tuple[str, ...]) -> tuple[list[Path], list[int], list[str]]:
    """Return files, labels and classes of ``modelnet40_normal_resampled``."""
    classes = read_lines(root / "modelnet40_shape_names.txt")
    number = {name: index for index, name in enumerate(classes)}
    paths, labels = [], []
    for split in splits:
        for name in read_lines(root / f"modelnet40_{split}.txt"):
            shape_class = name.rsplit("_", 1)[0]
            if shape_class not in number:
                raise DataError(
                    f"{root / f'modelnet40_{split}.txt'}: {name!r} is of class {shape_class!r}, not in modelnet40_shape_names.txt"
                )
            text = root / shape_class / f"{name}.txt"
            paths.append(text if text.exists() else text.with_suffix(".npy"))
            labels.append(number[shape_class])
    return paths, labels, classes


def _in_folders(root: Path, splits: tuple[str, ...]) -> tuple[list[Path], list[int], list[str]]:
    """Return files, labels and classes of ``<class>/<split>/*``."""
    classes = sorted({path.parent.name for path in root.glob("*/*") if path.name in SPLITS})
    folders = [(root / name / split, label) for split in splits for label, name in enumerate(classes)]
    found = [(path, label) for folder, label in folders for path in sorted(folder.glob("*.*"))]
    return [path for path, _ in found], [label for _, label in found], classes


class ModelNet40Files(PointDataset):
    """See :class:`ModelNet40Config`; one file per shape, read when it is asked for."""

    def __init__(self, config: ModelNet40Config, paths: list[Path], labels: list[int], classes: list[str]) -> None:
        if not paths:
            raise DataError(f"{config.root}: this part of ModelNet40 lists no shapes")
        super().__init__(config, np.array(labels), classes)
        self.paths = paths

    def read(self, row: int) -> PointCloud:
        """Return the stored cloud, with normals where the file has them."""
        return read_points(self.paths[row])

    def source(self, row: int) -> str:
        """Return the path of the file."""
        return str(self.paths[row])


class ModelNet40Hdf5(PointDataset):
    """See :class:`ModelNet40Config`; all clouds are held in memory."""

    def __init__(self, config: ModelNet40Config, splits: tuple[str, ...]) -> None:
        root = config.root
        classes = read_lines(root / "shape_names.txt")
        lists = [root / f"{split}_files.txt" for split in splits]
        self.files = [root / Path(line).name for path in lists for line in read_lines(path)]
        if not self.files:
            raise DataError(f"{', '.join(map(str, lists))}: lists no files")
        parts = [read_h5_clouds(path, classes=len(classes)) for path in self.files]
        super().__init__(config, np.concatenate([part["label"] for part in parts]), classes)
        self._first = np.cumsum([0] + [len(part["data"]) for part in parts])
        self._coord = np.concatenate([part["data"] for part in parts])
        self._normal = np.concatenate([part["normal"] for part in parts]) if all("normal" in part for part in parts) else None

    def read(self, row: int) -> PointCloud:
        """Return the stored cloud, ``[2048]`` points, with normals where the files have them."""
        return PointCloud(self._coord[row], None if self._normal is None else self._normal[row])

    def source(self, row: int) -> str:
        """Return the path of the file and the row in it."""
        file = int(np.searchsorted(self._first, row, side="right")) - 1
        return f"{self.files[file]} row {row - self._first[file]}"
