"""What a data set holds: one cloud as read, one sample as trained on, and how samples become a batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch

from geossl.errors import DataError
from geossl.geometry import ImageBatch, PackedPoints, PointBatch

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


@dataclass(frozen=True)
class ImageSample:
    """One image or pair of images as a method sees it.

    Args:
        image: ``[3, H, W]`` float32, normalised.
        index: Row in the data set.
        reference: Second image of the pair, as large; None for a single image.
        truth: ``[C, H, W]`` float32, what is to be predicted, not finite where unknown; None without.
        motion: ``[4, 4]`` float32, takes points from the camera frame of ``image`` to that of ``reference``; None where unknown.
    """

    image: torch.Tensor
    index: int
    reference: torch.Tensor | None = None
    truth: torch.Tensor | None = None
    motion: torch.Tensor | None = None


def collate(samples: Sequence[Any]) -> Any:
    """Make one batch of samples: a :class:`~geossl.geometry.PointBatch` of :class:`Sample` s, of :class:`ImageSample` s a
    :class:`~geossl.geometry.ImageBatch`.

    ``slot`` and ``global_size`` are left None: this batch is the whole global batch.

    Raises:
        DataError: there is no sample, clouds have unequal columns, or images unequal sizes.
    """
    if not samples:
        raise DataError("collate: got no samples; a batch needs at least one")
    return collate_images(samples) if isinstance(samples[0], ImageSample) else collate_points(samples)


def collate_images(samples: Sequence[ImageSample]) -> ImageBatch:
    """Stack images of equal sizes; what not every sample has is left out."""
    sizes = {tuple(sample.image.shape) for sample in samples}
    if len(sizes) > 1:
        raise DataError(f"collate: the images of a batch must have equal sizes, got {sorted(sizes)}")
    found = [[getattr(sample, name) for sample in samples] for name in ("reference", "truth", "motion")]
    reference, truth, motion = (None if any(part is None for part in parts) else torch.stack(parts) for parts in found)
    index = torch.tensor([sample.index for sample in samples], dtype=torch.int64)
    return ImageBatch(torch.stack([sample.image for sample in samples]), reference, truth, index, motion=motion)


def collate_points(samples: Sequence[Sample]) -> PointBatch:
    """Pack clouds of equal columns and any sizes; label and index are ``[B]`` int64."""
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
