"""What all point data sets share: the configuration fields, and the way from a cloud as read to a sample."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

import numpy as np

from geossl.config import require
from geossl.data.augment import AugmentConfig, augment, normalize
from geossl.data.files import check_finite
from geossl.data.sample import COLUMN_NAMES, Columns, PointCloud, Sample
from geossl.errors import DataError
from geossl.registry import Registry

DATASETS: Registry[Any] = Registry("data set")
"""All data sets by name; ``DATASETS.config("objects").build("train")`` makes one."""


class SampleSource(Protocol):
    """What the loader needs of a data set, whatever it holds."""

    def __len__(self) -> int:
        """Number of samples."""

    def order(self, rng: np.random.Generator) -> np.ndarray:
        """Return the order ``[n]`` in which an epoch visits the rows."""

    def get(self, row: int, rng: np.random.Generator | None = None) -> Any:
        """Return sample ``row``, as :func:`geossl.data.collate` takes it; every random choice is drawn from ``rng``, None
        asks for the evaluation form.
        """


@dataclass(kw_only=True)
class PointDataConfig:
    """Fields common to all point data sets; each data set adds where its files are."""

    name: str
    """Registered name of the data set."""
    points: int = 1024
    """Points per sample. A cloud that has fewer is used whole, so samples may differ in size."""
    columns: Columns = "xyz"
    """What a point carries: ``xyz``, ``xyz+normal``, ``xyz+rgb`` (0..1) or ``all`` (xyz, normal, rgb)."""
    normalize: Literal["subset", "cloud", "none"] = "subset"
    """Subtract the mean and divide by the largest norm: of the chosen points (as published for ShapeNet55), of the whole cloud
    before choosing (ModelNet40 as published for fine-tuning), or not at all (ScanObjectNN as published)."""
    pool: int | None = None
    """Training samples: choose this many points by farthest-point sampling first and draw ``points`` of them at random
    (published fine-tuning: 1200 for 1024, 2400 for 2048). None draws from all points."""
    evaluation_points: Literal["first", "farthest"] = "first"
    """Evaluation samples: the first ``points`` of the file, or farthest-point sampling to ``points``."""
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    """Augmentation of training samples."""

    def __post_init__(self) -> None:
        require(self.points >= 2, "points", "must be at least 2", self.points)
        require(self.pool is None or self.pool >= self.points, "pool", f"must be at least points ({self.points})", self.pool)
        require(self.columns in COLUMN_NAMES, "columns", f"must be one of {', '.join(COLUMN_NAMES)}", self.columns)

    def describe(self) -> str:
        """Return what a sample is, in words."""
        return f"{self.points} points, columns {self.columns}, normalised with `{self.normalize}`"


class PointDataset:
    """A data set of point clouds.

    Sub-classes hold the data and define :meth:`read`; everything else follows from the configuration.

    Args:
        config: The fields above.
        labels: Class of each cloud, ``[n]``, -1 where unlabelled.
        classes: Names of the classes.
        groups: Near-duplicate group of each cloud, ``[n]``; a resplit keeps a group on one side; -1 has no
            duplicate. None: none has.

    Attributes:
        labels: ``[n]`` int64.
        groups: ``[n]`` int64, numbered across the parts of a data set; -1 where a cloud has no near-duplicate.
        classes: Class names; ``labels`` index them.
        columns: What the columns of a sample are, three each: ``("xyz", "normal", "rgb")`` or fewer.
    """

    def __init__(self, config: PointDataConfig, labels: np.ndarray, classes: list[str], groups: np.ndarray | None = None) -> None:
        self.config = config
        self.labels = np.asarray(labels, dtype=np.int64)
        self.groups = np.full(len(self.labels), -1) if groups is None else np.asarray(groups, dtype=np.int64)
        self.classes = list(classes)
        self.columns = COLUMN_NAMES[config.columns]

    @property
    def channels(self) -> int:
        """Columns of a sample, 3, 6 or 9: the ``in_channels`` a backbone needs."""
        return 3 * len(self.columns)

    def __len__(self) -> int:
        """Number of clouds."""
        return len(self.labels)

    def order(self, rng: np.random.Generator) -> np.ndarray:
        """Return the order ``[n]`` in which an epoch visits the clouds."""
        return rng.permutation(len(self))

    def read(self, row: int) -> PointCloud:
        """Return cloud ``row`` as stored: all its points, not resampled, not augmented."""
        raise NotImplementedError

    def source(self, row: int) -> str:
        """Return what an error message calls cloud ``row`` (its file)."""
        return f"{self.config.name}[{row}]"

    def get(self, row: int, rng: np.random.Generator | None = None) -> Sample:
        """Return sample ``row``: a random subset, normalised and augmented, or the deterministic evaluation form.

        Args:
            row: 0 <= row < len(self).
            rng: Source of every random choice; equal states give equal samples. None asks for the evaluation form.

        Raises:
            DataError: the cloud cannot be used; the message names its file.
        """
        if not 0 <= row < len(self):
            raise IndexError(f"{self.config.name}: row {row} is outside 0..{len(self) - 1}")
        config, source = self.config, self.source(row)
        cloud = self.read(row).only(config.columns, source)
        if len(cloud) < 2:
            raise DataError(f"{source}: a point cloud needs at least 2 points, got {len(cloud)}")
        check_finite(source, coord=cloud.coord, normal=cloud.normal, color=cloud.color)
        if config.normalize == "cloud":
            cloud = normalize(cloud, source)
        cloud = self._choose(cloud, rng)
        if config.normalize == "subset":
            cloud = normalize(cloud, source)
        if rng is not None:
            cloud = augment(replace(cloud, original=cloud.coord), rng, config.augment)
        return Sample(cloud.stack(), int(self.labels[row]), row, cloud.label, original=cloud.original)

    def _choose(self, cloud: PointCloud, rng: np.random.Generator | None) -> PointCloud:
        """Return ``config.points`` points of ``cloud`` (all, if it has fewer)."""
        config, count = self.config, min(self.config.points, len(cloud))
        if rng is None:
            return cloud[farthest_points(cloud.coord, count)] if config.evaluation_points == "farthest" else cloud[:count]
        if config.pool is not None and config.pool < len(cloud):
            cloud = cloud[farthest_points(cloud.coord, config.pool)]
        return cloud[rng.choice(len(cloud), count, replace=False)]


def farthest_points(coord: np.ndarray, count: int) -> np.ndarray:
    """Return ``[count]`` rows of ``coord [N, 3]`` in farthest-point order, from row 0 on; ``count <= N``."""
    import torch

    from geossl import ops

    return ops.farthest_point_sample(torch.from_numpy(np.ascontiguousarray(coord))[None], count)[0].numpy()
