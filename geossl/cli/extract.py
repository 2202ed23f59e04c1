"""``geossl extract``: features of files, folders or a data set, as ``.npz`` or ``.safetensors``.

    extract_features.py MODEL SOURCE --out features.npz [--output points|tokens|global] [--layers 3 5] [--points 1024]
    extract_features.py MODEL IMAGE --out features.npz [--reference SECOND_IMAGE] [--size 480 640]
    extract_features.py MODEL --scene.name rgbd_folder --scene.root FRAMES --out features.npz

MODEL is a run folder, one of its checkpoints or its export, a hub id or an official checkpoint file.
SOURCE is a point cloud or mesh file, a folder of them, or a data set such as
``objects`` or ``objects:test``; for a model of particle events, PILArNet-M's HDF5 or an event as npz; for a model of images, an image
or a folder of them, of which every one gives a feature map. A data set of posed images gives features of points in space.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from geossl.cli.training import read_weights
from geossl.config import load_config, registry_field, require, split_arguments
from geossl.data import SCENES
from geossl.data.sample import Columns
from geossl.errors import ConfigError
from geossl.evaluation import extract_features, extract_image_features, extract_pair_features, extract_scene_features
from geossl.models import CroCoViT


@dataclass(kw_only=True)
class ExtractConfig:
    """Extract features of files, folders or a data set with a pretrained backbone."""

    out: Path | None = None
    """File to write: ``.npz`` or ``.safetensors`` with coord, offsets, feats and one name per cloud."""
    output: Literal["points", "tokens", "global"] = "points"
    """A feature for every point (interpolated from the nearest tokens), for every token, or one vector per cloud."""
    layers: tuple[int, ...] = ()
    """Blocks whose normed outputs are read, side by side (negative counts from the end); none given: the last."""
    pooling: Literal["mean_max", "mean", "max", "mean_plus_max"] = "mean_max"
    """How the tokens of a cloud become one vector (``--output global``)."""
    points: int | None = None
    """At most so many points of a cloud are shown to the encoder (default: 1,024 of a file, all of a data set's)."""
    normalize: bool | None = None
    """Bring a cloud into the unit sphere before encoding (default: files yes, data sets as they are)."""
    columns: Columns | None = None
    """Columns to read where the backbone does not say: xyz, xyz+normal, xyz+rgb or all."""
    batch_size: int | None = None
    """Clouds per forward pass (default: 32; 1 for a backbone that normalises over the whole batch); pictures: 8."""
    reference: Path | None = None
    """Second image (or folder of as many) for features of SOURCE in its light; the model needs its decoder."""
    size: tuple[int, int] | None = None
    """Rows and columns to which pictures are resized before encoding (default: the nearest multiples of the patch)."""
    scene: Any = registry_field(SCENES, default=None)  # noqa: RUF009 - makes a dataclass field
    """Data set of posed images, in place of SOURCE: every point of its clouds gets the mean of the maps that see it."""
    scene_split: str = "test"
    """Part of that data set (`all` where it has no parts)."""

    def __post_init__(self) -> None:
        require(self.batch_size is None or self.batch_size >= 1, "batch_size", "must be at least 1", self.batch_size)
        require(self.points is None or self.points >= 1, "points", "must be at least 1", self.points)


def main(argv: list[str] | None = None) -> int:
    """Run the program; returns its exit code."""
    argv = sys.argv[1:] if argv is None else argv
    model, args = split_arguments(argv)
    source, args = split_arguments(args)
    config = load_config(ExtractConfig, None, args, prog="extract MODEL SOURCE")
    if model is None or (source is None) == (config.scene is None):
        raise ConfigError("extract: give a model and a source (or --scene.name): extract MODEL SOURCE --out features.npz; see --help")
    if config.out is None or config.out.suffix not in (".npz", ".safetensors"):
        raise ConfigError(f"--out: give a file ending in .npz or .safetensors, got {config.out}")
    started = time.perf_counter()
    backbone = read_weights(model)
    if isinstance(backbone, CroCoViT):
        print(f"{_extract_pictures(model, backbone, source, config, config.out)} in {time.perf_counter() - started:.1f} s: {config.out}")
        return 0
    if source is None or config.reference is not None or config.size is not None:
        raise ConfigError(f"--scene, --reference and --size are for models of images; {backbone.config.name} reads point clouds")
    features = extract_features(
        backbone,
        source,
        output=config.output,
        layers=list(config.layers) or None,
        pooling=config.pooling,
        points=config.points,
        normalize=config.normalize,
        columns=config.columns,
        batch_size=config.batch_size,
    )
    path = features.save(config.out)
    rows, width = features.feats.shape
    print(f"{len(features)} clouds, {rows} x {width} {config.output} features in {time.perf_counter() - started:.1f} s: {path}")
    return 0


def _extract_pictures(model: str, backbone: CroCoViT, source: str | None, config: ExtractConfig, out: Path) -> str:
    """Write the features of pictures, pairs or scenes, and return what was written, in words."""
    _refuse_unread(config)
    batch_size, layers = config.batch_size or 8, list(config.layers) or None
    if config.scene is not None:
        scenes = config.scene.build(config.scene_split)
        samples = (scenes[row] for row in range(len(scenes)))
        lifted = extract_scene_features(backbone, samples, layers=layers, size=config.size, batch_size=batch_size)
        lifted.save(out)
        rows, width = lifted.feats.shape
        return f"{len(lifted)} scenes, {rows} x {width} features of points"
    if config.reference is not None:
        features = extract_pair_features(model, source, config.reference, layers=layers, size=config.size)
    else:
        features = extract_image_features(backbone, source, layers=layers, size=config.size, batch_size=batch_size)
    features.save(out)
    shapes = sorted({" x ".join(map(str, feats.shape)) for feats in features.maps})
    return f"{len(features)} images, maps of {', '.join(shapes)} (channels, rows, columns)"


def _refuse_unread(config: ExtractConfig) -> None:
    """Refuse options that a model of images does not read, instead of leaving them out silently."""
    plain = ExtractConfig()
    wrong = [f"--{key}" for key in ("output", "pooling", "points", "normalize", "columns") if getattr(config, key) != getattr(plain, key)]
    if wrong:
        raise ConfigError(f"{', '.join(wrong)}: for models of point clouds, but this one reads images; leave it out")
    if config.reference is not None and config.scene is not None:
        raise ConfigError("--reference: a data set of posed images (--scene) is read without second images; leave one of the two out")
    if config.reference is not None and config.batch_size is not None:
        raise ConfigError("--batch_size: pairs (--reference) are encoded one by one; leave it out")
