"""Data sets of images with dense truth: stereo with disparity, pairs with optical flow, images with depth, in their published layouts."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from geossl.config import require
from geossl.data.dataset import DATASETS
from geossl.data.dense_augment import (
    DensePair,
    DepthAugmentConfig,
    FlowAugmentConfig,
    StereoAugmentConfig,
    augment_depth,
    augment_flow,
    augment_stereo,
    crop_pair,
    resize_pair,
)
from geossl.data.dense_files import SPRING, read_disparity, read_flow
from geossl.data.dense_layouts import DEPTH, FLOW, STEREO, DenseFiles, Layout, find_files
from geossl.data.image_files import decode_image
from geossl.data.pairs import PairDataset
from geossl.data.sample import ImageSample
from geossl.data.scene import read_depth
from geossl.errors import DataError, unknown_name
from geossl.geometry import normalize_images

log = logging.getLogger("geossl")


@dataclass(kw_only=True)
class DenseDataConfig:
    """Fields common to the data sets with dense truth."""

    name: str
    """Registered name of the data set."""
    root: Path
    """Folder of the data set, or with ``layout: list`` a text file."""
    layout: str
    """How it lies on disk: the name of the published data set, or ``list``."""
    crop: tuple[int, int]
    """Height and width of a training sample."""
    evaluation: Literal["whole", "crop"] = "whole"
    """Evaluation samples: whole images, which may differ in size (batches of one, tiled inference), or the middle window."""
    damaged: Literal["skip", "error"] = "skip"
    """A sample that cannot be used: take the next one in its place, with a warning that counts, or stop."""

    def __post_init__(self) -> None:
        require(min(self.crop) >= 8, "crop", "must be at least 8 x 8", self.crop)
        require(self.evaluation in ("whole", "crop"), "evaluation", "must be whole or crop", self.evaluation)
        require(self.damaged in ("skip", "error"), "damaged", "must be skip or error", self.damaged)
        if self.layout not in self.layouts():
            raise unknown_name(f"layout of {self.name}", self.layout, self.layouts())

    def layouts(self) -> dict[str, Layout]:
        """Return the layouts that can be read, by name."""
        raise NotImplementedError

    def describe(self) -> str:
        """Return what a sample is, in words."""
        return f"{self.name} of {self.layout}, windows of {self.crop[0]} x {self.crop[1]} pixels"

    def build(self, split: str = "train") -> DenseDataset:
        """Make the data set of ``split``: ``train``, ``test`` (what is held out for validation, which may be nothing) or ``all``."""
        return DenseDataset(self, split)

    def read_truth(self, path: Path, *, all_four: bool = False) -> Tensor:
        """Read the truth of a sample, ``[C, H, W]`` float32, infinite where unknown; with ``all_four`` Spring's four values a pixel."""
        raise NotImplementedError

    def augmented(self, pair: DensePair, rng: np.random.Generator, source: str) -> DensePair:
        """Make a training sample."""
        raise NotImplementedError

    def fitted(self, pair: DensePair) -> DensePair:
        """Bring a sample to the size that training and evaluation begin with."""
        return pair


@dataclass(kw_only=True)
class StereoDataConfig(DenseDataConfig):
    """Rectified stereo pairs: ``image`` is the left one, ``truth [1, H, W]`` its disparity in pixels (x in the right is x - disparity).

    Layouts: kitti2012, kitti2015, middlebury2005, middlebury2006, middlebury2014, middlebury2021, middlebury_eval3, eth3d, sceneflow
    (FlyingThings3D, Monkaa, Driving), crestereo, spring, and ``list``: a text file with left image, right image and disparity a line. What
    CroCo-Stereo validates on is held out.
    """

    name: str = "stereo"
    root: Path = Path("data/sceneflow")
    layout: str = "sceneflow"
    crop: tuple[int, int] = (352, 704)
    png_scale: float | None = None
    """Units of disparity in a png to the pixel; None is what the data set has, and for lists KITTI's 256."""
    augment: StereoAugmentConfig = field(default_factory=StereoAugmentConfig)
    """Augmentation of training samples."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.png_scale is None or self.png_scale > 0, "png_scale", "must be positive", self.png_scale)

    def layouts(self) -> dict[str, Layout]:
        """Return the layouts that can be read, by name."""
        return STEREO

    def read_truth(self, path: Path, *, all_four: bool = False) -> Tensor:
        """Read disparity, ``[1, H, W]``."""
        return read_disparity(path, self.png_scale or STEREO[self.layout].png_scale, all_four=all_four)

    def augmented(self, pair: DensePair, rng: np.random.Generator, source: str) -> DensePair:
        """Make a training sample."""
        return augment_stereo(pair, rng, self.augment, self.crop, source)


@dataclass(kw_only=True)
class FlowDataConfig(DenseDataConfig):
    """Pairs of images with optical flow: ``truth [2, H, W]`` is where each pixel of ``image`` is in ``reference``, minus where it is here
    (x, y).

    Layouts: flyingchairs, flyingthings, sintel (clean and final), spring, tartanair, kitti2012, kitti2015, and ``list``: a text file with
    first image, second image and flow a line. What CroCo-Flow validates on is held out.
    """

    name: str = "flow"
    root: Path = Path("data/sintel")
    layout: str = "sintel"
    crop: tuple[int, int] = (320, 384)
    augment: FlowAugmentConfig = field(default_factory=FlowAugmentConfig)
    """Augmentation of training samples."""

    def layouts(self) -> dict[str, Layout]:
        """Return the layouts that can be read, by name."""
        return FLOW

    def read_truth(self, path: Path, *, all_four: bool = False) -> Tensor:
        """Read flow, ``[2, H, W]``."""
        return read_flow(path, all_four=all_four)

    def augmented(self, pair: DensePair, rng: np.random.Generator, source: str) -> DensePair:
        """Make a training sample."""
        return augment_flow(pair, rng, self.augment, self.crop, source)


@dataclass(kw_only=True)
class DepthDataConfig(DenseDataConfig):
    """Images with depth, without reference: ``truth [1, H, W]`` in metres along the optical axis.

    Layouts: ``folder``: ``rgb/NAME.jpg`` with ``depth/NAME.png`` (16 bits), below ``train`` and ``test`` or without these; ``list``: a text
    file with image and depth image a line, as those of NYUv2 (further columns, the focal length, are not read).
    """

    name: str = "depth"
    root: Path = Path("data/nyuv2")
    layout: str = "folder"
    crop: tuple[int, int] = (224, 224)
    resize: int | None = 256
    """Pixels along the shorter side to which samples are brought first; None leaves them as they are."""
    depth_scale: float = 1000.0
    """Units of the depth images to the metre."""
    max_depth: float = 10.0
    """Larger depths, in metres, are taken as unknown."""
    augment: DepthAugmentConfig = field(default_factory=DepthAugmentConfig)
    """Augmentation of training samples."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.resize is None or self.resize >= 8, "resize", "must be at least 8", self.resize)
        require(self.depth_scale > 0, "depth_scale", "must be positive", self.depth_scale)
        require(self.max_depth > 0, "max_depth", "must be positive", self.max_depth)

    def layouts(self) -> dict[str, Layout]:
        """Return the layouts that can be read, by name."""
        return DEPTH

    def read_truth(self, path: Path, *, all_four: bool = False) -> Tensor:
        """Read depth, ``[1, H, W]``."""
        depth = read_depth(path, self.depth_scale)[0]
        return torch.where((depth > 0) & (depth <= self.max_depth), depth, torch.inf)[None]

    def augmented(self, pair: DensePair, rng: np.random.Generator, source: str) -> DensePair:
        """Make a training sample."""
        return augment_depth(pair, rng, self.augment, self.crop, source)

    def fitted(self, pair: DensePair) -> DensePair:
        """Bring a sample to ``resize``."""
        if self.resize is None:
            return pair
        ratio = self.resize / min(pair.shape)
        height, width = (max(self.resize, round(side * ratio)) for side in pair.shape)
        return resize_pair(pair, (height, width), (1.0,))


@DATASETS.register
def stereo() -> StereoDataConfig:
    """Stereo pairs with disparity, in the layouts of KITTI, Middlebury, ETH3D, SceneFlow, CREStereo and Spring."""
    return StereoDataConfig()


@DATASETS.register
def flow() -> FlowDataConfig:
    """Image pairs with optical flow, in the layouts of FlyingChairs, FlyingThings, Sintel, Spring, TartanAir and KITTI."""
    return FlowDataConfig()


@DATASETS.register
def depth() -> DepthDataConfig:
    """Images with depth, in folders or a list as of NYUv2."""
    return DepthDataConfig()


class DenseDataset(PairDataset):
    """See :class:`StereoDataConfig`, :class:`FlowDataConfig` and :class:`DepthDataConfig`.

    Attributes:
        files: The files of every sample.
        missing: How many samples were left out since a file does not exist.
    """

    config: Any

    def __init__(self, config: DenseDataConfig, split: str) -> None:
        try:
            self.files, missing = find_files(config.layouts()[config.layout], config.root, split)
        except DataError as error:
            raise DataError(f"{config.name}: {error}") from error
        self.missing = len(missing)
        if missing:
            text = (
                f"{config.root}: {len(missing)} of {len(missing) + len(self.files)} samples lack a file; the first: {_lacking(missing[0])}"
            )
            if not self.files or config.damaged == "error":
                raise DataError(f"{config.name}: {text}; expected {config.layouts()[config.layout].needs}")
            log.warning("left out: %s", text)
        super().__init__(config, len(self.files))  # type: ignore[arg-type]

    def source(self, row: int) -> str:
        """Return what an error message calls sample ``row``."""
        return str(self.files[row].image)

    def read(self, row: int) -> tuple[Tensor, Tensor]:
        """Return the images of sample ``row``, ``[3, H, W]`` uint8 (of depth, twice the same)."""
        files = self.files[row]
        first = decode_image(files.image, str(files.image))
        return first, first if files.reference is None else decode_image(files.reference, str(files.reference))

    def pair(self, row: int, *, all_four: bool = False) -> DensePair:
        """Return sample ``row`` as stored: images in 0..1 and truth, infinite where unknown.

        With ``all_four``, Spring's truth has its four values a pixel, so twice the rows and columns of the images.

        Raises:
            DataError: a file is damaged, or they differ in size; the message names it.
        """
        files = self.files[row]
        first, second = (image.float() / 255 for image in self.read(row))
        truth = self.config.read_truth(files.truth, all_four=all_four)
        fits = first.shape[1:] if not all_four or files.truth.suffix not in SPRING else torch.Size(2 * side for side in first.shape[1:])
        for path, shape, wanted in ((files.reference, second.shape[1:], first.shape[1:]), (files.truth, truth.shape[1:], fits)):
            if shape != wanted:
                raise DataError(f"{path}: has {shape[0]} x {shape[1]} pixels, but {files.image} has {first.shape[1]} x {first.shape[2]}")
        return DensePair(first, None if files.reference is None else second, truth)

    def _sample(self, row: int, rng: np.random.Generator | None) -> ImageSample:
        config: DenseDataConfig = self.config
        whole = rng is None and config.evaluation == "whole"
        pair, source = config.fitted(self.pair(row, all_four=whole)), self.source(row)
        if rng is not None:
            pair = config.augmented(pair, rng, source)
        elif not whole:
            pair = crop_pair(pair, config.crop, None, source)
        pair = pair.images(normalize_images)
        return ImageSample(pair.image, row, pair.reference, pair.truth.contiguous())


def _lacking(files: DenseFiles) -> str:
    return next(str(path) for path in (files.image, files.reference, files.truth) if path is not None and not path.is_file())
