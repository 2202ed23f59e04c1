"""Features of anything, in one call: a tensor, a file, a folder of files or a data set; per point, per token or per cloud."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from geossl import ops
from geossl.data import DATASETS, read_events, read_points
from geossl.data.files import atomic_write
from geossl.data.folder import FileOptions, find_files
from geossl.data.sample import Columns
from geossl.errors import DataError
from geossl.evaluation.features import Pooling, device_of, frozen, pack, pool_tokens, read_tokens
from geossl.geometry import PackedPoints, Tokens
from geossl.models import VolumePointViT, load

OUTPUTS = ("points", "tokens", "global")
FILE_POINTS = 1024

_COLUMNS_OF: dict[int, Columns] = {3: "xyz", 9: "all"}


@dataclass(frozen=True)
class ExtractedFeatures:
    """Features of several clouds, packed.

    Args:
        coord: Where each feature sits, ``[M, 3]``, in the coordinates of the source: the points themselves, the token centres, or
            the mean of the cloud.
        offsets: ``[B + 1]`` int64; the features of cloud ``b`` are the rows ``offsets[b]:offsets[b + 1]``.
        feats: ``[M, D]`` float32.
        names: One name per cloud: the file (relative to its folder), or what the data set calls the row.
        output: "points", "tokens" or "global".
    """

    coord: Tensor
    offsets: Tensor
    feats: Tensor
    names: list[str]
    output: str

    def __len__(self) -> int:
        """Number of clouds."""
        return len(self.names)

    def __getitem__(self, cloud: int) -> tuple[Tensor, Tensor]:
        """Return ``(coord, feats)`` of one cloud."""
        rows = slice(int(self.offsets[cloud]), int(self.offsets[cloud + 1]))
        return self.coord[rows], self.feats[rows]

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write to ``path``: ``.npz`` (arrays coord, offsets, feats, names, output) or ``.safetensors`` (names in its metadata).

        The file is there whole or not at all.
        """
        arrays = {"coord": self.coord.numpy(), "offsets": self.offsets.numpy(), "feats": self.feats.numpy()}
        return save_features(path, arrays, self.names, output=self.output)


def save_features(path: str | os.PathLike[str], arrays: dict[str, np.ndarray], names: list[str], **words: str) -> Path:
    """Write arrays, names and further words as ``.npz`` or ``.safetensors`` (the texts in its metadata), whole or not at all.

    Raises:
        DataError: the file is called otherwise.
    """
    path = Path(path)
    if path.suffix == ".npz":
        texts = {"names": np.array(names), **{key: np.array(word) for key, word in words.items()}}
        atomic_write(path, lambda file: np.savez(file, **arrays, **texts))  # type: ignore[arg-type]
    elif path.suffix == ".safetensors":
        from safetensors.numpy import save

        # It writes the memory of an array whatever its strides.
        packed = {key: np.ascontiguousarray(values) for key, values in arrays.items()}
        payload = save(packed, metadata={"names": json.dumps(names), **words})
        atomic_write(path, lambda file: file.write(payload))
    else:
        raise DataError(f"{path}: features are written as .npz or .safetensors; end the name in one of these")
    return path


def extract_features(
    model: nn.Module | str | os.PathLike[str],
    source: Any,
    *,
    output: Literal["points", "tokens", "global"] = "points",
    layers: int | Sequence[int] | None = None,
    pooling: Pooling = "mean_max",
    points: int | None = None,
    normalize: bool | None = None,
    columns: Columns | None = None,
    batch_size: int | None = None,
) -> ExtractedFeatures:
    """Extract frozen features.

    Args:
        model: A backbone, a pretraining method (its backbone is taken), a run or export folder, or a hub id (see
            :func:`geossl.load`).
        source: What to describe. ``[N, 3 + C]`` or ``[B, N, 3 + C]`` tensor or array; :class:`~geossl.geometry.PackedPoints`; a
            point cloud or mesh file; a folder of such files (and of folders of them); a data set, or the name of one ("objects",
            "objects:test"). Backbones of particle events take files of events instead: PILArNet-M's HDF5 (or a folder of them), or an
            npz (see :func:`geossl.data.read_events`); a tensor of an event holds voxel indices and normalised energies.
        output: "points": a feature for every point, interpolated from the nearest tokens (three, or as many as the backbone names) with
            inverse squared distances (PointNet++, Qi et al., NIPS 2017); "tokens": the tokens at their centres; "global": one vector per
            cloud.
        layers: Blocks to read; None for the normed last block, a list (or the last so many) for several side by side.
        pooling: How tokens become one vector for output="global": "mean_max", "mean", "max" or "mean_plus_max".
        points: At most so many points of a cloud are shown to the encoder, chosen by farthest-point sampling. Features still come
            for every point. None: all points of tensors, data sets and events, 1,024 of other files (about the density that the shipped
            configurations train at).
        normalize: Subtract the mean and divide by the largest norm before encoding. None: for files (as in pretraining) except
            events, not for tensors and data sets, which are taken as they are.
        columns: Columns of a file or named data set; None takes those the backbone needs where its ``in_channels`` says so (3: xyz,
            9: xyz, normal, rgb).
        batch_size: Clouds per forward pass. None: 32, or 1 where the backbone normalises over the whole batch (``norm="batchwide"``), so
            that the features of a cloud do not depend on the others.

    Returns:
        :class:`ExtractedFeatures` on the CPU, float32, in the order of the source; ``coord`` is never normalised.

    Raises:
        DataError: a cloud is empty, has NaN rows or cannot be read; the message names the file or the position.
        CheckpointError: the model cannot be loaded.
        TypeError: the model reads images.

    Example:
        >>> features = geossl.extract_features("runs/mine", "scans/", output="points")
        >>> coord, feats = features[0]
        >>> features.save("scans.npz")
    """
    if output not in OUTPUTS:
        raise ValueError(f"output must be one of {', '.join(OUTPUTS)}, got {output!r}")
    if points is not None and points < 1:
        raise ValueError(f"points must be at least 1, got {points}")
    backbone = resolve_backbone(model)
    if not hasattr(backbone, "in_channels"):
        raise TypeError(
            f"extract_features is for encoders of point clouds; {type(backbone).__name__} reads images: use extract_image_features, "
            "extract_pair_features, or extract_scene_features for points seen in posed images"
        )
    is_file = isinstance(source, str | os.PathLike) and Path(source).exists()
    of_events = isinstance(backbone, VolumePointViT)
    normalize = is_file and not of_events if normalize is None else normalize
    points = FILE_POINTS if points is None and is_file and not of_events else points
    if batch_size is None:
        batch_size = 1 if of_events and backbone.config.norm == "batchwide" else 32
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    names: list[str] = []
    with frozen(backbone):
        for batch in _batches(_clouds(source, backbone, columns, normalize), batch_size):
            names += [cloud.name for cloud in batch]
            parts.append(_describe(backbone, batch, output, layers, pooling, points))
    if not parts:
        raise DataError(f"extract_features: {source!r} holds no cloud")
    coord, lengths, feats = (torch.cat(column).cpu() for column in zip(*parts, strict=True))
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    return ExtractedFeatures(coord, offsets, feats.float(), names, output)


def resolve_backbone(model: nn.Module | str | os.PathLike[str]) -> Any:
    """Return the backbone that ``model`` means: itself, its ``backbone``, or the one saved in that folder or hub repository."""
    if isinstance(model, nn.Module):
        return getattr(model, "backbone", model)
    return load(model)


def interpolate(tokens: Tokens, coord: Tensor, offsets: Tensor, neighbors: int = 3, epsilon: float = 1e-8) -> Tensor:
    """Carry token features to points: mean of the nearest tokens of the same cloud, weighted by inverse squared distance.

    Args:
        tokens: ``feats [T, C]`` at ``centers [T, 3]``; clouds with fewer than ``neighbors`` tokens use those they have.
        coord: Positions, ``[M, 3]``.
        offsets: ``[B + 1]`` int64, clouds of ``coord``, as many as in ``tokens``.
        neighbors: Tokens that a point takes its feature from.
        epsilon: Added to squared distances.

    Returns:
        ``[M, C]``; differentiable in ``tokens.feats``.
    """
    near = ops.knn(coord, tokens.centers, neighbors, query_offsets=offsets, offsets=tokens.offsets)
    weight = torch.where(near.index >= 0, 1.0 / (near.distance + epsilon), 0.0)
    return ops.interpolate(tokens.feats, near.index, weight / weight.sum(1, keepdim=True))


class _Cloud(NamedTuple):
    """One cloud and the frame the encoder sees it in: ``coord = points[:, :3] * size + center``."""

    name: str
    coord: Tensor  # [N, 3], as in the source
    points: Tensor  # [N, 3 + C], for the encoder
    center: Tensor  # [3]
    size: Tensor  # []


def _describe(
    backbone: Any, batch: list[_Cloud], output: str, layers: int | Sequence[int] | None, pooling: Pooling, points: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return ``coord [m, 3]``, ``lengths [b]`` and ``feats [m, D]`` of a batch of clouds."""
    device = device_of(backbone)
    shown = pack([cloud.points if points is None else _even_subset(cloud.points, points) for cloud in batch]).to(device)
    tokens = read_tokens(backbone, shown, layers)
    if output == "points":
        full = pack([cloud.points[:, :3] for cloud in batch]).to(device)
        feats = interpolate(tokens, full.coord, full.offsets, *getattr(backbone, "interpolation", ()))
        return torch.cat([cloud.coord for cloud in batch]), full.lengths.cpu(), feats
    if output == "tokens":
        centers = tokens.centers.cpu().split(tokens.lengths.tolist())
        coord = torch.cat([place * cloud.size + cloud.center for place, cloud in zip(centers, batch, strict=True)])
        return coord, tokens.lengths.cpu(), tokens.feats
    coord = torch.stack([cloud.coord.mean(0) for cloud in batch])
    return coord, torch.ones(len(batch), dtype=torch.int64), pool_tokens(tokens, pooling)


def _even_subset(points: Tensor, count: int) -> Tensor:
    if len(points) <= count:
        return points
    return points[ops.farthest_point_sample(points[None, :, :3].contiguous(), count)[0]]


def _batches(clouds: Iterator[_Cloud], size: int) -> Iterator[list[_Cloud]]:
    while batch := list(itertools.islice(clouds, size)):
        yield batch


def _clouds(source: Any, backbone: Any, columns: Columns | None, normalize: bool) -> Iterator[_Cloud]:
    """Yield every cloud of ``source``, checked and in the encoder's frame."""
    in_channels = int(backbone.in_channels)
    is_path = isinstance(source, str | os.PathLike) and Path(source).exists()
    if is_path and isinstance(backbone, VolumePointViT):
        found: Iterator[tuple[str, Any]] = ((name, sample.points) for name, sample in read_events(Path(source)))
    else:
        found = _read(source, in_channels, columns)
    for name, points in found:
        yield _checked(name, torch.as_tensor(points, dtype=torch.float32).cpu(), in_channels, normalize)


def _checked(name: str, points: Tensor, in_channels: int, normalize: bool) -> _Cloud:
    if points.dim() != 2 or points.shape[1] != in_channels:
        raise DataError(
            f"{name}: the backbone takes points [N, {in_channels}] (in_channels={in_channels}), got {list(points.shape)}; "
            "give the columns it was trained with"
        )
    if len(points) == 0:
        raise DataError(f"{name}: the cloud is empty; at least one point is needed")
    finite = points.isfinite().all(1)
    if not finite.all():
        raise DataError(
            f"{name}: {int((~finite).sum())} of {len(points)} points are not finite (first: row {int((~finite).nonzero()[0])}); "
            "remove these rows first"
        )
    coord, center, size = points[:, :3], torch.zeros(3), torch.tensor(1.0)
    if normalize:
        center = coord.double().mean(0).float()
        size = (coord - center).norm(dim=1).max()
        if not size > 0:
            raise DataError(f"{name}: all {len(points)} points coincide, so the cloud cannot be scaled to unit size; needs two or more")
        points = torch.cat([(coord - center) / size, points[:, 3:]], 1)
    return _Cloud(name, coord, points, center, size)


def _read(source: Any, in_channels: int, columns: Columns | None) -> Iterator[tuple[str, Any]]:
    """Yield ``(name, points)`` for every cloud of ``source``."""
    if isinstance(source, str | os.PathLike):
        path = Path(source)
        if path.is_dir():
            for name in find_files(path, FileOptions()).names:
                yield name, read_points(path / name).only(_columns(in_channels, columns), str(path / name)).stack()
        elif path.exists():
            yield path.name, read_points(path).only(_columns(in_channels, columns), str(path)).stack()
        else:
            yield from _read(_named_dataset(str(source), in_channels, columns), in_channels, columns)
    elif isinstance(source, PackedPoints):
        rows = source.coord if source.feats is None else torch.cat([source.coord, source.feats], 1)
        for number, points in enumerate(rows.split(source.lengths.tolist())):
            yield f"cloud {number}", points
    elif isinstance(source, Tensor | np.ndarray):
        if source.ndim not in (2, 3):
            raise DataError(f"extract_features: a tensor must be [N, 3 + C] or [B, N, 3 + C], got {list(source.shape)}")
        for number, points in enumerate(source[None] if source.ndim == 2 else source):
            yield f"cloud {number}", points
    elif hasattr(source, "get") and hasattr(source, "__len__"):
        for row in range(len(source)):
            yield source.source(row), source.get(row, None).points
    else:
        raise TypeError(
            "extract_features: source must be a tensor or array, PackedPoints, a file, a folder, a data set or the name of one, "
            f"got {type(source).__name__}"
        )


def _columns(in_channels: int, columns: Columns | None) -> Columns:
    if columns is None and in_channels not in _COLUMNS_OF:
        raise DataError(
            f"the backbone takes {in_channels} columns, which could be several things; say columns='xyz+normal' or columns='xyz+rgb'"
        )
    return columns or _COLUMNS_OF[in_channels]


def _named_dataset(text: str, in_channels: int, columns: Columns | None) -> Any:
    """Build the data set ``name`` or ``name:split``; without a split, all of it."""
    name, _, split = text.partition(":")
    if name not in DATASETS.names():
        raise DataError(f"{text}: neither a file, a folder nor a data set; the data sets are {', '.join(DATASETS.names())}")
    config = DATASETS.config(name)
    if hasattr(config, "columns"):  # events have but one form
        config = dataclasses.replace(config, columns=_columns(in_channels, columns))
    return config.build(split or "all")
