"""ShapeNetPart as published for part segmentation: 16 categories of shapes whose points carry one of 50 parts.

Layout of ``shapenetcore_partanno_segmentation_benchmark_v0_normal``: ``synsetoffset2category.txt`` (``Airplane<tab>02691156``),
``train_test_split/shuffled_{train,val,test}_file_list.json`` (lists of ``shape_data/<synset>/<id>``) and ``<synset>/<id>.txt`` with a line
``x y z nx ny nz part`` for each point, about 2,600 of them. The y axis is up.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Literal

import numpy as np

from geossl.data.augment import AugmentConfig
from geossl.data.dataset import DATASETS, PointDataConfig, PointDataset
from geossl.data.files import existing, read_json_names, read_lines
from geossl.data.readers import read_number_table
from geossl.data.sample import PointCloud
from geossl.errors import DataError, unknown_name

PARTS = {
    "airplane": 4,
    "bag": 2,
    "cap": 2,
    "car": 4,
    "chair": 4,
    "earphone": 3,
    "guitar": 3,
    "knife": 2,
    "lamp": 4,
    "laptop": 2,
    "motorbike": 6,
    "mug": 2,
    "pistol": 3,
    "rocket": 3,
    "skateboard": 3,
    "table": 3,
}
"""Parts of each category, numbered on from one category to the next: those of a bag are 4 and 5."""
FIRST_PART = dict(zip(PARTS, accumulate(PARTS.values(), initial=0), strict=False))
_LISTS = {"train": ("train", "val"), "test": ("test",), "all": ("train", "val", "test")}


@dataclass(kw_only=True)
class ShapeNetPartConfig(PointDataConfig):
    """ShapeNetPart: 14,007 training shapes (the published training takes the validation part along) and 2,874 test shapes."""

    name: str = "shapenet_part"
    points: int = 2048
    normalize: Literal["subset", "cloud", "none"] = "cloud"
    augment: AugmentConfig = field(default_factory=lambda: AugmentConfig(scale=(0.8, 1.25), same_scale=True, shift=0.1, rotation_axis="y"))
    root: Path = Path("data/shapenetcore_partanno_segmentation_benchmark_v0_normal")
    """Folder that holds ``synsetoffset2category.txt`` and ``train_test_split``."""
    categories: tuple[str, ...] = ()
    """Take only shapes of these categories (``chair``, ``table`` ...); none named takes all. Numbers of categories and parts stay."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for category in self.categories:
            if category not in PARTS:
                raise unknown_name("category", category, PARTS)

    def build(self, split: str) -> ShapeNetPartDataset:
        """Make the data set of ``split``: ``train`` (training and validation lists), ``test`` or ``all``."""
        return ShapeNetPartDataset(self, split)


@DATASETS.register
def shapenet_part() -> ShapeNetPartConfig:
    """ShapeNetPart, 2,048 points with parts, as published for Point-MAE and Point-M2AE."""
    return ShapeNetPartConfig()


class ShapeNetPartDataset(PointDataset):
    """See :class:`ShapeNetPartConfig`; one file per shape, read when it is asked for.

    Attributes:
        classes: The 16 categories; ``labels`` index them.
        parts: Names of the 50 parts, ``<category>_<number>``; ``point_label`` of a sample indexes them.
        part_counts: Parts of each category.
    """

    def __init__(self, config: ShapeNetPartConfig, split: str) -> None:
        if split not in _LISTS:
            raise DataError(f"shapenet_part: unknown split {split!r}; choose one of {', '.join(_LISTS)}")
        root = existing(config.root, "folder")
        number = _category_numbers(root / "synsetoffset2category.txt")
        wanted = {list(PARTS).index(category) for category in config.categories or PARTS}
        self.paths: list[Path] = []
        labels: list[int] = []
        for name in _LISTS[split]:
            path = root / "train_test_split" / f"shuffled_{name}_file_list.json"
            for entry in read_json_names(path):
                synset, shape = Path(entry).parts[-2:] if "/" in entry else ("", entry)
                if synset not in number:
                    raise DataError(f"{path}: {entry!r} is of no category in synsetoffset2category.txt; expected shape_data/<synset>/<id>")
                if number[synset] in wanted:
                    self.paths.append(root / synset / f"{shape}.txt")
                    labels.append(number[synset])
        if not labels:
            raise DataError(f"{root}: part {split!r} lists no shapes of {', '.join(config.categories) or 'any category'}")
        super().__init__(config, np.array(labels), list(PARTS))
        self.parts = [f"{category}_{i}" for category, count in PARTS.items() for i in range(count)]
        self.part_counts = tuple(PARTS.values())

    def read(self, row: int) -> PointCloud:
        """Return the stored cloud with normals and the part of each point.

        Raises:
            DataError: the file has other than 7 columns, or a part is not one of the shape's category.
        """
        path, category = self.paths[row], self.classes[self.labels[row]]
        values = read_number_table(existing(path))
        if values.shape[1] != 7:
            raise DataError(f"{path}: has {values.shape[1]} columns, expected 7: x y z nx ny nz part")
        part = values[:, 6].astype(np.int64)
        first, count = FIRST_PART[category], PARTS[category]
        wrong = np.flatnonzero((part < first) | (part >= first + count) | (part != values[:, 6]))
        if len(wrong):
            raise DataError(
                f"{path}: point row {wrong[0]} (from 0) has part {values[wrong[0], 6]:g}, but those of a {category} are "
                f"{first}..{first + count - 1}; {len(wrong)} such rows in all"
            )
        return PointCloud(values[:, :3].astype(np.float32), values[:, 3:6].astype(np.float32), label=part)

    def source(self, row: int) -> str:
        """Return the path of the file."""
        return str(self.paths[row])


def _category_numbers(path: Path) -> dict[str, int]:
    """Read which synset stands for which category, as the category's number."""
    names, numbers = list(PARTS), {}
    for line in read_lines(path):
        category, _, synset = line.partition("\t") if "\t" in line else line.partition(" ")
        if category.lower() not in PARTS:
            raise DataError(f"{path}: {unknown_name('category', category.lower(), PARTS)}")
        numbers[synset.strip()] = names.index(category.lower())
    return numbers
