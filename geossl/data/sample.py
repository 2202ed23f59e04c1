"""What a data set of point clouds is: one cloud as read, one sample as trained on, and how samples become a batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch

from geossl.errors import DataError
from geossl.geometry import PackedPoints, PointBatch

Columns = Literal["xyz", "xyz+normal", "xyz+rgb", "all"]

COLUMN_NAMES: dict[Columns, tuple[str, ...]] = {
    "xyz": ("xyz",),
    "xyz+normal": ("xyz", "normal"),
    "xyz+rgb": ("xyz", "rgb"),
    "all": ("xyz", "normal", "rgb"),
}


@dataclass(frozen=True)
class PointCloud:
    """One point cloud as read from a file, before any resampling or augmentation.

    Args:
        coord: Positions, ``[N, 3]`` float32.
        normal: Unit normals, ``[N, 3]`` float32 (a zero row where there is none), or None.
        color: Red, green, blue in 0..1, ``[N, 3]`` float32, or None.
        label: Class of each point, ``[N]`` int64, or None.
        original: Positions before augmentation, ``[N, 3]`` float32; None where there was none.
    """

    coord: np.ndarray
    normal: np.ndarray | None = None
    color: np.ndarray | None = None
    label: np.ndarray | None = None
    original: np.ndarray | None = None

    def __len__(self) -> int:
        """Number of points."""
        return len(self.coord)

    def __getitem__(self, rows: np.ndarray | slice) -> PointCloud:
        """Return the cloud of the selected rows (in their order)."""
        parts = (self.coord, self.normal, self.color, self.label, self.original)
        return PointCloud(*(None if part is None else part[rows] for part in parts))  # type: ignore[arg-type]

    def only(self, columns: Columns, source: str = "point cloud") -> PointCloud:
        """Return the cloud with no more than ``columns``.

        Raises:
            DataError: a wanted column is missing; the message names ``source``.
        """
        wanted = COLUMN_NAMES[columns]
        missing = [name for name, values in (("normal", self.normal), ("rgb", self.color)) if name in wanted and values is None]
        if missing:
            raise DataError(f"{source}: columns={columns!r} asks for {' and '.join(missing)}, which this data does not have")
        normal, color = self.normal if "normal" in wanted else None, self.color if "rgb" in wanted else None
        return replace(self, normal=normal, color=color)

    def stack(self) -> np.ndarray:
        """Return ``[N, 3 | 6 | 9]`` float32: xyz, then normal, then rgb, as far as the cloud has them."""
        return np.concatenate([part for part in (self.coord, self.normal, self.color) if part is not None], axis=1, dtype=np.float32)


@dataclass(frozen=True)
class Sample:
    """One cloud as a method sees it.

    Args:
        points: ``[N, 3 + C]`` float32: xyz, then the further columns of the data set.
        label: Class, or -1 where unlabelled.
        index: Row of the cloud in its data set.
        point_label: Class of each point, ``[N]`` int64, -1 where unlabelled; None for data sets without.
        point_instance: Object each point belongs to, ``[N]`` int64, -1 for none; None for data sets without.
        original: Position of each point before augmentation, ``[N, 3]`` float32; None for a sample that was not augmented.
    """

    points: np.ndarray
    label: int
    index: int
    point_label: np.ndarray | None = None
    point_instance: np.ndarray | None = None
    original: np.ndarray | None = None


def collate(samples: Sequence[Sample]) -> PointBatch:
    """Pack samples (of equal columns, any sizes) into one :class:`~geossl.geometry.PointBatch`.

    Returns:
        points with ``coord [M, 3]`` and ``feats [M, C]`` (None without further columns), label and index ``[B]`` int64; slot and
        global_size are left None: this batch is the whole global batch.
    """
    if not samples:
        raise DataError("collate: got no samples; a batch needs at least one")
    widths = {sample.points.shape[1] for sample in samples}
    if len(widths) > 1:
        raise DataError(f"collate: the samples of a batch must have equal columns, got {sorted(widths)}")
    rows = np.concatenate([sample.points for sample in samples])
    offsets = np.cumsum([0] + [len(sample.points) for sample in samples], dtype=np.int64)
    feats = torch.from_numpy(np.ascontiguousarray(rows[:, 3:])) if rows.shape[1] > 3 else None
    return PointBatch(
        points=PackedPoints(torch.from_numpy(np.ascontiguousarray(rows[:, :3])), torch.from_numpy(offsets), feats),
        label=torch.tensor([sample.label for sample in samples], dtype=torch.int64),
        index=torch.tensor([sample.index for sample in samples], dtype=torch.int64),
        point_label=_per_point([sample.point_label for sample in samples]),
        point_instance=_per_point([sample.point_instance for sample in samples]),
        original=_per_point([sample.original for sample in samples]),
    )


def _per_point(parts: Sequence[np.ndarray | None]) -> torch.Tensor | None:
    known = [part for part in parts if part is not None]
    return torch.from_numpy(np.concatenate(known)) if len(known) == len(parts) else None
