"""Frozen features of pictures: maps and patches of one image, of a pair, and what they give to points in space."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from geossl.data import SceneSample
from geossl.data.scene import read_image
from geossl.errors import DataError
from geossl.evaluation.extract import ExtractedFeatures, resolve_backbone, save_features
from geossl.evaluation.features import device_of, frozen
from geossl.geometry import normalize_images
from geossl.layers import lift_features
from geossl.models import CroCoPair, load_pair_backbone

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".ppm", ".tif", ".tiff")


@dataclass(frozen=True)
class ImageFeatures:
    """Feature maps of several pictures.

    Args:
        maps: One for each picture, ``[C, h, w]`` float32 on the CPU, spread evenly over the whole picture.
        sizes: Rows and columns of each picture as it was given.
        names: The file (relative to its folder), or the number of the picture.
    """

    maps: list[Tensor]
    sizes: list[tuple[int, int]]
    names: list[str]

    def __len__(self) -> int:
        """Number of pictures."""
        return len(self.maps)

    def tokens(self, picture: int) -> tuple[Tensor, Tensor]:
        """Return the features of one picture's patches, ``[h * w, C]`` row by row, and where their centres lie, ``[h * w, 2]``: (x, y) in
        pixels of the picture as given (the first pixel spans 0 to 1).
        """
        feats, (height, width) = self.maps[picture], self.sizes[picture]
        rows, columns = feats.shape[1:]
        y, x = (torch.arange(rows) + 0.5) * (height / rows), (torch.arange(columns) + 0.5) * (width / columns)
        return feats.flatten(1).T, torch.stack(torch.meshgrid(x, y, indexing="xy"), -1).flatten(0, 1)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write to ``.npz`` or ``.safetensors``: ``map_0``, ``map_1``, ..., ``sizes [B, 2]`` and the names; whole or not at all."""
        arrays = {f"map_{number}": feats.numpy() for number, feats in enumerate(self.maps)}
        return save_features(path, {**arrays, "sizes": np.array(self.sizes, dtype=np.int64)}, self.names)


def extract_image_features(
    model: nn.Module | str | os.PathLike[str],
    source: Any,
    *,
    layers: int | Sequence[int] | None = None,
    size: tuple[int, int] | None = None,
    batch_size: int = 8,
) -> ImageFeatures:
    """Extract frozen feature maps of pictures.

    Args:
        model: An image backbone, a pretraining method (its backbone is taken), a run or export folder, or a hub id.
        source: ``[3, H, W]`` or ``[B, 3, H, W]`` RGB in 0..1; an image file; a folder of images (and of folders of them); or a sequence of
            files.
        layers: Blocks to read; None for the normed last one, a list (or the last so many) for several side by side along the channels.
        size: Rows and columns to which pictures are resized before encoding, multiples of the patch. None: the nearest multiples.
        batch_size: Pictures of one size that are encoded together.

    Returns:
        A map for each picture, in the order of the source.

    Raises:
        DataError: a file is no image, a tensor has another shape or range, or there is no picture.

    Example:
        >>> features = geossl.evaluation.extract_image_features("runs/croco", "photos/")
        >>> features.maps[0]  # [C, H / 16, W / 16]
    """
    backbone = resolve_backbone(model)
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    found = ImageFeatures([], [], [])
    with frozen(backbone):
        for batch in _batches(_pictures(source), batch_size):
            maps = image_maps(backbone, torch.stack([image for _, image in batch]), layers, size)
            found.maps.extend(maps.cpu().float())
            found.sizes.extend((image.shape[1], image.shape[2]) for _, image in batch)
            found.names.extend(name for name, _ in batch)
    if not len(found):
        raise DataError(f"extract_image_features: {source!r} holds no picture; image files end in {', '.join(IMAGE_SUFFIXES)}")
    return found


def extract_pair_features(
    model: nn.Module | str | os.PathLike[str],
    image: Any,
    reference: Any,
    *,
    layers: int | Sequence[int] | None = None,
    size: tuple[int, int] | None = None,
) -> ImageFeatures:
    """Extract frozen features of pictures in the light of second ones: what a stereo, flow or pose head would read.

    Args:
        model: Encoder and decoder (:class:`geossl.models.CroCoPair`), a pretraining method that has both, a run or export folder with the
            decoder in it, or an official CroCo file.
        image: Pictures, see :func:`extract_image_features`.
        reference: As many second pictures; they may have other sizes.
        layers: Blocks to read, those of the encoder before those of the decoder; None for the normed last one of the decoder.
        size: Rows and columns to which both are resized; None: the nearest multiples of the patch of the first.

    Returns:
        A map of each of ``image``.

    Raises:
        DataError: a picture cannot be used, or there are not as many of both.
    """
    pair = resolve_pair(model)
    found = ImageFeatures([], [], [])
    wanted = [-1] if layers is None else layers if isinstance(layers, int) else list(layers)
    with frozen(pair):
        for number, (one, other) in enumerate(itertools.zip_longest(_pictures(image), _pictures(reference))):
            if one is None or other is None:
                which = "second pictures" if other is None else "pictures"
                raise DataError(f"extract_pair_features: every picture needs a second one, but there are only {number} {which}")
            fitted = fit_patches(one[1][None], pair.backbone.config.patch, size)
            both = [fitted, fit_patches(other[1][None], pair.backbone.config.patch, (fitted.shape[2], fitted.shape[3]))]
            maps = pair(*(normalize_images(x.to(device_of(pair))) for x in both), wanted)
            found.maps.append(torch.cat(maps, 1)[0].cpu().float())
            found.sizes.append((one[1].shape[1], one[1].shape[2]))
            found.names.append(one[0])
    if not len(found):
        raise DataError(f"extract_pair_features: {image!r} holds no picture; image files end in {', '.join(IMAGE_SUFFIXES)}")
    return found


def resolve_pair(model: nn.Module | str | os.PathLike[str]) -> CroCoPair:
    """Return the encoder and decoder that ``model`` means: itself, its ``pair``, or those saved in that folder or file."""
    if not isinstance(model, nn.Module):
        return load_pair_backbone(model)
    pair = getattr(model, "pair", model)
    if not isinstance(pair, CroCoPair):
        raise TypeError(
            f"model: features of pairs need an encoder and its decoder (CroCoPair, or method croco), got {type(model).__name__}"
        )
    return pair


def image_maps(backbone: Any, images: Tensor, layers: int | Sequence[int] | None = None, size: tuple[int, int] | None = None) -> Tensor:
    """Encode pictures ``[B, 3, H, W]`` in 0..1; see :func:`extract_image_features`. Returns ``[B, C, h, w]`` on the backbone's device."""
    images = normalize_images(fit_patches(images.to(device_of(backbone)), backbone.config.patch, size))
    if layers is None:
        return backbone(images)
    return torch.cat(backbone.forward_intermediates(images, layers if isinstance(layers, int) else list(layers))[1], 1)


def fit_patches(images: Tensor, patch: int, size: tuple[int, int] | None = None) -> Tensor:
    """Resize pictures ``[B, 3, H, W]`` to ``size``, or to the nearest multiples of the patch (bilinear, smoothed where they shrink)."""
    height, width = images.shape[2:]
    if size is not None and any(side < patch or side % patch for side in size):
        raise DataError(f"size: rows and columns must be multiples of the patch ({patch}), got {size[0]} x {size[1]}")
    if min(height, width) < patch:
        raise DataError(f"a picture of {height} x {width} pixels is smaller than one patch ({patch} x {patch}); use a larger one")
    wanted = size or tuple(max(patch, patch * round(side / patch)) for side in (height, width))
    if wanted == (height, width):
        return images
    return F.interpolate(images, wanted, mode="bilinear", antialias=True, align_corners=False)


def extract_scene_features(
    model: nn.Module | str | os.PathLike[str],
    scenes: SceneSample | Iterable[SceneSample],
    *,
    layers: int | Sequence[int] | None = None,
    size: tuple[int, int] | None = None,
    batch_size: int = 8,
    tolerance: float = 0.05,
) -> ExtractedFeatures:
    """Give the points of posed pictures the mean of the image features that see them, so that a 3D detector can read them.

    Args:
        model: See :func:`extract_image_features`.
        scenes: Posed pictures with a cloud, one sample or several: a row of an RGB-D folder, SUN RGB-D, simulated rooms, or any of your
            own (``SceneSample(image, intrinsics, world_to_cam, depth=..., points=...)``; give one picture and its back-projected points
            for a single RGB-D frame). Where depth is known, a picture gives nothing to points hidden in it.
        layers: See :func:`extract_image_features`.
        size: See :func:`extract_image_features`.
        batch_size: Pictures that are encoded together.
        tolerance: Metres by which a point may differ from the depth image, see :func:`geossl.layers.visible_in`.

    Returns:
        A feature for every point, packed; zeros for points that no picture sees.

    Raises:
        DataError: a scene has no cloud.
    """
    backbone = resolve_backbone(model)
    coords: list[Tensor] = []
    feats: list[Tensor] = []
    names: list[str] = []
    with frozen(backbone):
        for scene in [scenes] if isinstance(scenes, SceneSample) else scenes:
            name = scene.source or f"scene {len(names)}"
            if scene.points is None:
                raise DataError(f"{name}: has no points to give features to; it needs depth images, or points of its own")
            maps = torch.cat([image_maps(backbone, part, layers, size) for part in scene.image.split(batch_size)])
            depth = None if scene.depth is None else scene.depth.to(maps.device)
            lifted = lift_features(scene.points.to(maps.device), maps, scene.cameras.to(maps.device), depth, tolerance=tolerance)
            coords.append(scene.points)
            feats.append(lifted.feats.cpu().float())
            names.append(name)
    if not names:
        raise DataError("extract_scene_features: got no scene")
    lengths = torch.tensor([0, *map(len, coords)])
    return ExtractedFeatures(torch.cat(coords), lengths.cumsum(0), torch.cat(feats), names, "points")


def _pictures(source: Any) -> Iterator[tuple[str, Tensor]]:
    """Yield name and picture ``[3, H, W]`` float32 in 0..1."""
    if isinstance(source, Tensor | np.ndarray):
        images = torch.as_tensor(source)
        if images.dim() not in (3, 4) or images.shape[-3] != 3 or not images.is_floating_point():
            raise DataError(
                "extract_image_features: pictures must be floating point [3, H, W] or [B, 3, H, W], "
                f"got {images.dtype} {list(images.shape)}"
            )
        if images.numel() and not (images.min() >= 0 and images.max() <= 1):  # NaN fails too
            raise DataError("extract_image_features: pictures must be RGB in 0..1, not normalised and without NaN; divide bytes by 255")
        for number, image in enumerate(images[None] if images.dim() == 3 else images):
            yield f"image {number}", image.float()
        return
    if isinstance(source, str | os.PathLike):
        folder = Path(source)
        if not folder.is_dir():
            yield folder.name, read_image(folder)[0]
            return
        files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
        names = [path.relative_to(folder).as_posix() for path in files]
    else:
        files = [Path(path) for path in source]
        names = [str(path) for path in files]
    for name, path in zip(names, files, strict=True):
        yield name, read_image(path)[0]


def _batches(pictures: Iterator[tuple[str, Tensor]], size: int) -> Iterator[list[tuple[str, Tensor]]]:
    """Neighbours of one size, at most ``size`` of them."""
    batch: list[tuple[str, Tensor]] = []
    for picture in pictures:
        if batch and (len(batch) == size or batch[0][1].shape != picture[1].shape):
            yield batch
            batch = []
        batch.append(picture)
    if batch:
        yield batch
