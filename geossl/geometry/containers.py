"""Typed containers that travel between the layers of geossl. They hold tensors, check shapes and convert; they compute nothing.

Packed is the native form (see :mod:`geossl.geometry`): several clouds of different sizes are rows of one tensor, cut by ``offsets``.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from geossl.geometry.spherical_harmonics import SH_C0

Self = TypeVar("Self", bound="_Movable")


class _Movable:
    """Adds ``to`` and ``pin_memory`` to a dataclass of tensors (and nested containers)."""

    _stays_on_host: ClassVar[tuple[str, ...]] = ()

    def _map(self: Self, move: Any) -> Self:
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in self._stays_on_host}  # type: ignore[arg-type]
        return replace(self, **{name: move(value) for name, value in values.items() if isinstance(value, (Tensor, _Movable))})  # type: ignore[type-var]

    def to(self: Self, *args: Any, **kwargs: Any) -> Self:
        """Move every tensor as :meth:`torch.Tensor.to` does. Give a device; dtypes of index tensors must not change."""
        return self._map(lambda value: value.to(*args, **kwargs))

    def pin_memory(self: Self) -> Self:
        """Copy every tensor to page-locked memory."""
        return self._map(lambda value: value.pin_memory())


def offsets_from_lengths(lengths: Tensor) -> Tensor:
    """Turn ``lengths [B]`` (integer) into ``offsets [B + 1]`` int64 on the same device."""
    offsets = torch.zeros(lengths.shape[0] + 1, dtype=torch.int64, device=lengths.device)
    torch.cumsum(lengths, 0, out=offsets[1:])
    return offsets


@dataclass(frozen=True)
class PackedPoints(_Movable):
    """A batch of point clouds in packed form.

    Args:
        coord: Positions of all clouds, ``[M, 3]``, float32 (float64 and half types are allowed).
        offsets: ``[B + 1]`` int64, ``offsets[0] == 0``, non-decreasing, ``offsets[B] == M``.
        feats: Features of the points, ``[M, C]``, or None.
    """

    coord: Tensor
    offsets: Tensor
    feats: Tensor | None = None

    def __post_init__(self) -> None:
        if self.coord.dim() != 2 or self.coord.shape[1] != 3:
            raise ValueError(f"PackedPoints: coord must be [M, 3], got {list(self.coord.shape)}")
        if self.offsets.dim() != 1 or self.offsets.shape[0] < 1 or self.offsets.dtype != torch.int64:
            raise ValueError(f"PackedPoints: offsets must be [B + 1] int64, got {list(self.offsets.shape)} {self.offsets.dtype}")
        if self.feats is not None and (self.feats.dim() != 2 or self.feats.shape[0] != self.coord.shape[0]):
            raise ValueError(f"PackedPoints: feats must be [{self.coord.shape[0]}, C], got {list(self.feats.shape)}")

    @classmethod
    def from_padded(cls, points: Tensor, lengths: Tensor | None = None) -> PackedPoints:
        """Pack ``points [B, N, 3 + C]`` (columns beyond the third become ``feats``); rows past ``lengths[b]`` are left out."""
        if points.dim() != 3 or points.shape[2] < 3:
            raise ValueError(f"PackedPoints.from_padded: points must be [B, N, 3 + C], got {list(points.shape)}")
        batch, count, columns = points.shape
        if lengths is None:
            offsets = (
                torch.arange(0, (batch + 1) * count, max(count, 1), device=points.device)[: batch + 1]
                if count
                else torch.zeros(batch + 1, dtype=torch.int64, device=points.device)
            )
            rows = points.reshape(batch * count, columns)
        else:
            offsets = offsets_from_lengths(lengths)
            rows = points[torch.arange(count, device=points.device) < lengths[:, None]]
        return cls(rows[:, :3], offsets, rows[:, 3:] if columns > 3 else None)

    def __len__(self) -> int:
        """Number of clouds."""
        return self.offsets.shape[0] - 1

    @property
    def lengths(self) -> Tensor:
        """Points per cloud, ``[B]`` int64."""
        return self.offsets.diff()


@dataclass(frozen=True)
class Tokens(_Movable):
    """What a token backbone returns: features at positions, packed.

    Args:
        feats: ``[T, C]``.
        centers: Position of each token, ``[T, 3]``.
        offsets: ``[B + 1]`` int64; the tokens of sample ``b`` are rows ``offsets[b]:offsets[b + 1]``.
    """

    feats: Tensor
    centers: Tensor
    offsets: Tensor

    def __len__(self) -> int:
        """Number of samples."""
        return self.offsets.shape[0] - 1

    @property
    def lengths(self) -> Tensor:
        """Tokens per sample, ``[B]`` int64."""
        return self.offsets.diff()

    def to_padded(self) -> tuple[Tensor, Tensor]:
        """Return ``feats [B, Tmax, C]`` padded with zeros and ``mask [B, Tmax]`` bool, True where a token is real."""
        lengths = self.lengths
        longest = int(lengths.max()) if len(self) else 0
        mask = torch.arange(longest, device=lengths.device) < lengths[:, None]
        padded = self.feats.new_zeros(len(self), longest, self.feats.shape[1])
        padded[mask] = self.feats
        return padded, mask


@dataclass(frozen=True)
class SparseVoxelTokens(_Movable):
    """Features of the occupied voxels of a batch of grids.

    Args:
        feats: ``[V, C]``.
        coords: Voxel of each row, ``[V, 4]`` int32 (batch, x, y, z), each voxel once.
        spatial_shape: Cells of each grid along x, y, z; coordinates lie in ``0..shape - 1``.
        batch_size: Number of grids.
        voxel_size: Edge lengths of a cell (x, y, z) in metres, or None where positions do not matter.
        origin: Position of the lower corner of cell (0, 0, 0) in metres.
    """

    feats: Tensor
    coords: Tensor
    spatial_shape: tuple[int, int, int]
    batch_size: int
    voxel_size: tuple[float, float, float] | None = None
    origin: tuple[float, float, float] = (0.0, 0.0, 0.0)

    def __post_init__(self) -> None:
        if self.coords.dim() != 2 or self.coords.shape[1] != 4 or self.coords.dtype != torch.int32:
            raise ValueError(
                f"SparseVoxelTokens: coords must be [V, 4] int32 (batch, x, y, z), got {list(self.coords.shape)} {self.coords.dtype}"
            )
        if self.feats.dim() != 2 or self.feats.shape[0] != self.coords.shape[0]:
            raise ValueError(f"SparseVoxelTokens: feats must be [{self.coords.shape[0]}, C], got {list(self.feats.shape)}")
        if len(self.spatial_shape) != 3 or min(self.spatial_shape) < 1 or self.batch_size < 0:
            raise ValueError(
                f"SparseVoxelTokens: spatial_shape must be three sizes of at least 1 and batch_size not negative, "
                f"got {self.spatial_shape} and {self.batch_size}"
            )
        if self.voxel_size is not None and not min(self.voxel_size) > 0:
            raise ValueError(f"SparseVoxelTokens: voxel_size must be positive, got {self.voxel_size}")
        if not self.coords.is_cuda and not self.coords.is_meta and len(self.coords):  # on a GPU this would wait for it
            limit = torch.tensor([self.batch_size, *self.spatial_shape])
            wrong = ((self.coords < 0) | (self.coords >= limit)).any(1).nonzero().flatten()
            if len(wrong):
                raise ValueError(
                    f"SparseVoxelTokens: coords must lie under (batch_size, *spatial_shape) = {limit.tolist()}, "
                    f"but row {int(wrong[0])} is {self.coords[wrong[0]].tolist()}"
                )

    def __len__(self) -> int:
        """Number of grids."""
        return self.batch_size

    @property
    def offsets(self) -> Tensor:
        """Rows of each grid as ``offsets [B + 1]`` int64; rows must be sorted by batch."""
        batch = self.coords[:, 0].long()
        if not batch.is_cuda and bool((batch.diff() < 0).any()):
            raise ValueError("SparseVoxelTokens: offsets need rows sorted by batch; sort them by coords[:, 0] (stable) first")
        return torch.searchsorted(batch.contiguous(), torch.arange(self.batch_size + 1, device=batch.device))

    @property
    def centers(self) -> Tensor:
        """Centre of each voxel in metres, ``[V, 3]`` float32: ``origin + (coords + 0.5) * voxel_size``."""
        if self.voxel_size is None:
            raise ValueError("SparseVoxelTokens: centers need a voxel_size, which was not given")
        cells = self.coords[:, 1:].double() + 0.5
        return (cells * cells.new_tensor(self.voxel_size) + cells.new_tensor(self.origin)).float()

    def to_dense(self) -> Tensor:
        """Return the grids ``[B, C, X, Y, Z]``, 0 where there is no voxel. Differentiable."""
        grid = self.feats.new_zeros(self.batch_size, *self.spatial_shape, self.feats.shape[1])
        return grid.index_put(tuple(self.coords.long().unbind(1)), self.feats).movedim(-1, 1)

    @classmethod
    def from_dense(
        cls,
        grid: Tensor,
        mask: Tensor | None = None,
        voxel_size: tuple[float, float, float] | None = None,
        origin: tuple[float, float, float] = (0.0, 0.0, 0.0),
    ) -> SparseVoxelTokens:
        """Take the voxels of ``grid [B, C, X, Y, Z]`` where ``mask [B, X, Y, Z]`` is True, or any channel is not 0. Differentiable.

        Rows come in lexicographic order (batch, x, y, z).
        """
        if grid.dim() != 5:
            raise ValueError(f"SparseVoxelTokens.from_dense: grid must be [B, C, X, Y, Z], got {list(grid.shape)}")
        expected = (grid.shape[0], *grid.shape[2:])
        if mask is None:
            mask = (grid != 0).any(1)
        elif mask.dtype != torch.bool or mask.shape != expected:
            raise ValueError(f"SparseVoxelTokens.from_dense: mask must be bool {list(expected)}, got {mask.dtype} {list(mask.shape)}")
        x, y, z = grid.shape[2:]
        return cls(grid.movedim(1, -1)[mask], mask.nonzero().int(), (x, y, z), grid.shape[0], voxel_size, origin)


@dataclass(frozen=True)
class Gaussians(_Movable):
    """A scene of Gaussian splats, with the activations applied: what a rasterizer takes.

    Args:
        means: Centres, ``[N, 3]``.
        quats: Rotations wxyz of any length but 0, ``[N, 4]``.
        scales: Standard deviations along the axes, ``[N, 3]``.
        opacities: In [0, 1], ``[N]``.
        sh: Coefficients of spherical harmonics, ``[N, K, 3]`` with K of 1, 4, 9 or 16; the colour is ``max(0, 0.5 + sum)``.
    """

    means: Tensor
    quats: Tensor
    scales: Tensor
    opacities: Tensor
    sh: Tensor

    def __post_init__(self) -> None:
        count = self.means.shape[0] if self.means.dim() == 2 else -1
        for name, shape in (("means", (count, 3)), ("quats", (count, 4)), ("scales", (count, 3)), ("opacities", (count,))):
            given = getattr(self, name).shape
            if tuple(given) != shape:
                raise ValueError(f"Gaussians: {name} must be {['N', *shape[1:]]}, here N = {max(count, 0)}, got {list(given)}")
        if self.sh.dim() != 3 or self.sh.shape[0] != count or self.sh.shape[1] not in (1, 4, 9, 16) or self.sh.shape[2] != 3:
            raise ValueError(f"Gaussians: sh must be [{count}, 1, 4, 9 or 16, 3], got {list(self.sh.shape)}")

    @classmethod
    def from_colors(cls, means: Tensor, quats: Tensor, scales: Tensor, opacities: Tensor, colors: Tensor) -> Gaussians:
        """Make Gaussians of one colour ``[N, 3]`` in [0, 1] from all sides."""
        return cls(means, quats, scales, opacities, ((colors - 0.5) / SH_C0)[:, None])

    def __len__(self) -> int:
        """Number of Gaussians."""
        return self.means.shape[0]

    @property
    def sh_degree(self) -> int:
        """Degree of the spherical harmonics, 0 to 3."""
        return {1: 0, 4: 1, 9: 2, 16: 3}[self.sh.shape[1]]

    @property
    def colors(self) -> Tensor:
        """Colour without the part that depends on the view, ``[N, 3]``, at least 0."""
        return (self.sh[:, 0] * SH_C0 + 0.5).clamp(min=0)


@dataclass(frozen=True)
class PointBatch(_Movable):
    """One batch of a point data set, as collated by :mod:`geossl.data` and consumed by methods and tasks.

    Args:
        points: The clouds, packed.
        label: Class of each cloud, ``[B]`` int64, -1 where unlabelled; None for data sets without classes.
        index: Row of each cloud in its data set, ``[B]`` int64, or None.
        slot: Place of each cloud in the *global* batch (over all ranks and accumulated micro-batches), ``[B]`` int64. Random
            draws that are made for the whole global batch and then cut by ``slot`` do not depend on how it was split.
            None means ``arange(B)``. Stays on the CPU, where the draws are made, so that no draw waits for a device.
        global_size: Clouds in the global batch; None means ``B``.
        point_label: Class of each point, ``[M]`` int64, -1 where unlabelled; None for data sets without.
        point_instance: Object each point belongs to, numbered within its cloud, ``[M]`` int64, -1 for none; None for data sets without.
        original: Position of each point before augmentation, ``[M, 3]``; None: the points are as they were.
    """

    points: PackedPoints
    label: Tensor | None = None
    index: Tensor | None = None
    slot: Tensor | None = None
    global_size: int | None = None
    point_label: Tensor | None = None
    point_instance: Tensor | None = None
    original: Tensor | None = None

    _stays_on_host: ClassVar[tuple[str, ...]] = ("slot",)

    def __len__(self) -> int:
        """Number of clouds in this batch."""
        return len(self.points)


@dataclass(frozen=True)
class ImageBatch(_Movable):
    """One batch of images or pairs of images, as collated by :mod:`geossl.data` and consumed by methods and tasks.

    Args:
        image: ``[B, 3, H, W]`` float32, normalised by :func:`geossl.geometry.normalize_images`. Of a pair, the image that is completed or
            for which depth, disparity or flow is wanted.
        reference: The second image of each pair, like ``image``; None for single images.
        truth: What is to be predicted for each pixel of ``image``, ``[B, C, H, W]`` float32, not finite where unknown; None without.
        index: Row of each image or pair in its data set, ``[B]`` int64, or None.
        slot: See :class:`PointBatch`.
        global_size: See :class:`PointBatch`.
        motion: How the camera of ``reference`` stands to that of ``image``, ``[B, 4, 4]`` float32 rigid: it takes points from the camera
            frame of ``image`` to that of ``reference``. None where unknown.
    """

    image: Tensor
    reference: Tensor | None = None
    truth: Tensor | None = None
    index: Tensor | None = None
    slot: Tensor | None = None
    global_size: int | None = None
    motion: Tensor | None = None

    _stays_on_host: ClassVar[tuple[str, ...]] = ("slot",)

    def __post_init__(self) -> None:
        if self.image.dim() != 4 or self.image.shape[1] != 3:
            raise ValueError(f"ImageBatch: image must be [B, 3, H, W], got {list(self.image.shape)}")
        if self.reference is not None and self.reference.shape != self.image.shape:
            raise ValueError(f"ImageBatch: reference must be {list(self.image.shape)} like image, got {list(self.reference.shape)}")
        samples, _, height, width = self.image.shape
        truth = None if self.truth is None else list(self.truth.shape)
        if truth is not None and (len(truth) != 4 or truth[:1] + truth[2:] != [samples, height, width]):
            raise ValueError(f"ImageBatch: truth must be [{samples}, C, {height}, {width}] like image, got {truth}")
        if self.motion is not None and self.motion.shape != (samples, 4, 4):
            raise ValueError(f"ImageBatch: motion must be [{samples}, 4, 4], one for each image, got {list(self.motion.shape)}")

    def __len__(self) -> int:
        """Number of images or pairs in this batch."""
        return self.image.shape[0]


Batch = PointBatch | ImageBatch
"""What a data set's samples become: methods and tasks take one of them."""


@dataclass(frozen=True)
class Output:
    """What every method and task returns to the training loop.

    Args:
        loss: Scalar to minimise, float32, differentiable.
        metrics: Scalars to log, detached, by name.
        aux: Anything a report may want to draw (predictions, masks); never read by the loop.
    """

    loss: Tensor
    metrics: dict[str, Tensor] = field(default_factory=dict)
    aux: dict[str, Any] = field(default_factory=dict)
