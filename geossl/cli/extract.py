"""``geossl extract``: features of files, folders or a data set, as ``.npz`` or ``.safetensors``.

    extract_features.py MODEL SOURCE --out features.npz [--output points|tokens|global] [--layers 3 5] [--points 1024]

MODEL is a run folder, an export folder or a hub id. SOURCE is a point cloud or mesh file, a folder of them, or a data set such as
``objects`` or ``objects:test``; for a model of particle events, PILArNet-M's HDF5 or an event as npz.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from geossl.config import load_config, require, split_arguments
from geossl.data.sample import Columns
from geossl.errors import ConfigError
from geossl.evaluation import extract_features


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
    """Clouds per forward pass (default: 32; 1 for a backbone that normalises over the whole batch)."""

    def __post_init__(self) -> None:
        require(self.batch_size is None or self.batch_size >= 1, "batch_size", "must be at least 1", self.batch_size)
        require(self.points is None or self.points >= 1, "points", "must be at least 1", self.points)


def main(argv: list[str] | None = None) -> int:
    """Run the program; returns its exit code."""
    argv = sys.argv[1:] if argv is None else argv
    model, args = split_arguments(argv)
    source, args = split_arguments(args)
    config = load_config(ExtractConfig, None, args, prog="extract MODEL SOURCE")
    if model is None or source is None:
        raise ConfigError("extract: give a model and a source: extract MODEL SOURCE --out features.npz; see --help")
    if config.out is None or config.out.suffix not in (".npz", ".safetensors"):
        raise ConfigError(f"--out: give a file ending in .npz or .safetensors, got {config.out}")
    started = time.perf_counter()
    features = extract_features(
        model,
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
