"""``geossl pretrain``: self-supervised pretraining.

    pretrain.py [CONFIG.yaml] [--method.mask_ratio 0.6] [--train.steps 2000] [--resume auto]
    torchrun --nproc-per-node 2 tools/pretrain.py CONFIG.yaml

Without a configuration file it trains a small encoder on the embedded objects, in a few minutes on a laptop. The run folder then holds
the resolved configuration, metrics, checkpoints, the exported encoder and ``report.html``.
"""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from torch import nn

from geossl.cli.training import batches, check_columns, exit_code, export_backbone, gives_images, log, set_up_messages, tell_changes
from geossl.config import load_config, registry_field, require, split_arguments, to_yaml
from geossl.data import DATASETS, AugmentConfig
from geossl.engine import Hooks, OptimConfig, TrainConfig, World, seed_everything, start_world, stop_world, train
from geossl.errors import ConfigError
from geossl.evaluation import Prober, TokenProbeProtocol, TokenProber, quick_probe, save_report_data
from geossl.evaluation.token_probe import has_point_labels
from geossl.methods import METHODS
from geossl.models import BACKBONES


@dataclass(frozen=True, kw_only=True)
class ProbeConfig:
    """Probing the encoder while it trains, and for the report."""

    every: int = 0
    """Steps between two probes (linear SVM, a few seconds each); 0 does not probe while training."""
    report: bool = True
    """Fit all probes and their baselines for the report; switch off for large data sets."""
    data: Any = registry_field(DATASETS, default=None)  # noqa: RUF009 - makes a dataclass field
    """Labelled data set to probe on; null is the one trained on."""
    tokens: int = 15_000
    """Events (points with classes): tokens of each part that the token probe takes."""
    layers: tuple[int, ...] = ()
    """Blocks whose normed outputs are read, side by side (negative counts from the end); none given: the last."""
    pooling: Literal["mean", "mean_max", "max", "mean_plus_max"] = "mean"
    """How the tokens of an object become one vector."""

    def __post_init__(self) -> None:
        require(self.every >= 0, "every", "must not be negative", self.every)
        require(self.tokens >= 1, "tokens", "must be at least 1", self.tokens)


def quickstart_data() -> Any:
    """The embedded objects without the published scaling and shifting, which are made for epochs of ShapeNet and not for 300 steps."""
    return dataclasses.replace(DATASETS.config("objects"), augment=AugmentConfig(scale=(1.0, 1.0), shift=0.0))


@dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """Self-supervised pretraining of a backbone. The defaults are the quickstart."""

    method: Any = registry_field(METHODS, default="point_mae")  # noqa: RUF009
    """Self-supervised method."""
    backbone: Any = registry_field(BACKBONES, default="point_vit_tiny")  # noqa: RUF009
    """Encoder to pretrain."""
    data: Any = field(default_factory=quickstart_data, metadata={"registry": DATASETS})
    """Data set; its training part is used."""
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=5e-4, warmup=20))
    """Optimiser and schedule."""
    train: TrainConfig = field(
        default_factory=lambda: TrainConfig(run_folder=Path("runs/quickstart"), steps=300, batch_size=32, save_every=75)
    )
    """Length, size and machinery of the training."""
    probe: ProbeConfig = field(default_factory=lambda: ProbeConfig(every=75))
    """Probing while training."""
    resume: str = "none"
    """`auto` continues the run in train.run_folder from its newest intact checkpoint, if it has any; or the path of a checkpoint or run
    folder; `none` starts anew."""


def main(argv: list[str] | None = None) -> int:
    """Run the program; returns its exit code."""
    path, args = split_arguments(sys.argv[1:] if argv is None else argv)
    set_up_messages()
    config = load_config(PretrainConfig, path, args, prog="pretrain [CONFIG.yaml]")
    world = start_world(config.train.device, config.train.parallel)
    code = pretrain(config, world)
    stop_world()
    return code


def pretrain(config: PretrainConfig, world: World) -> int:
    """Pretrain as ``config`` says, as one of the processes of ``world``; returns the exit code."""
    dataset = config.data.build("train")
    check_columns(dataset, config.backbone)
    loader = batches(dataset, config.train, world)
    seed_everything(config.train.seed)
    module = config.method.build(config.backbone.build())
    if hasattr(module, "prepare"):  # what else the method needs is looked for before anything is written
        module.prepare(dataset)
    prober = build_prober(config, dataset) if world.is_main else None

    def export(module: nn.Module, folder: Path) -> None:
        export_backbone(module, folder, model_card(config), getattr(module, "save_beside", None))

    def report(module: nn.Module, folder: Path) -> None:
        from geossl.vis import write_report

        log.info("writing the report")
        save_report_data(folder, module, prober if config.probe.report else None, pictured(config, dataset), seed=config.train.seed)
        path = write_report(folder)
        log.info("encoder: geossl.load(%r)   report: %s", str(folder), path)

    hooks = Hooks(
        probe=None if prober is None else lambda module: quick_probe(module, prober),
        probe_every=config.probe.every if has_classes(config, dataset) else 0,
        best="" if prober is None else prober.best,
        export=export,
        report=report,
    )
    if config.resume != "none" and world.is_main:
        tell_changes(started_as(config), config.train.run_folder)
    result = train(
        module, loader, config.train, config.optim, world, hooks=hooks, resume=config.resume, settings=to_yaml(started_as(config))
    )
    return exit_code(result, config.train.run_folder)


def started_as(config: PretrainConfig) -> PretrainConfig:
    """The configuration as it is written into the run folder: fed back, it starts the same run, and overwrites nothing."""
    return dataclasses.replace(config, resume="none", train=dataclasses.replace(config.train, overwrite=False))


def has_classes(config: PretrainConfig, dataset: Any) -> bool:
    """Whether there are labels to probe with."""
    return config.probe.data is not None or bool((dataset.labels >= 0).any()) or has_point_labels(dataset)


def build_prober(config: PretrainConfig, dataset: Any) -> Prober | TokenProber | None:
    """Make what probes the encoder; None when nothing is to be probed or the data has no classes."""
    if not config.probe.every and not config.probe.report:
        return None
    if gives_images(dataset):
        if config.probe.data is not None:
            raise ConfigError("probe.data: encoders of images are not probed; leave it out")
        return None
    if not has_classes(config, dataset):
        log.info("data set %s has no classes: the encoder is not probed (choose a labelled one with --probe.data.name)", config.data.name)
        return None
    data = config.data if config.probe.data is None else config.probe.data
    train = dataset if config.probe.data is None else data.build("train")
    test = data.build("test")
    if test.channels != dataset.channels:
        raise ConfigError(
            f"probe.data {data.name} gives {', '.join(test.columns)}, data {config.data.name} {', '.join(dataset.columns)}: "
            "the encoder takes the latter; choose probe.data.columns alike"
        )
    if has_point_labels(train):
        if config.probe.layers:
            raise ConfigError("probe.layers: tokens of events are probed as the last block leaves them; leave it empty")
        return TokenProber(train, test, protocol=TokenProbeProtocol(tokens=config.probe.tokens))
    return Prober(train, test, layers=list(config.probe.layers) or None, pooling=config.probe.pooling)


def pictured(config: PretrainConfig, dataset: Any) -> Any:
    """The data the report's pictures are made of: the test part, or the training part where there is none."""
    test = config.data.build("test")
    return test if len(test) else dataset


def model_card(config: PretrainConfig) -> str:
    """What an exported encoder is and how to use it, in Markdown."""
    data, backbone, train = config.data, config.backbone, config.train
    length = f"{train.epochs} epochs" if train.epochs else f"{train.steps} steps"
    if hasattr(backbone, "in_channels"):
        kind, item, columns = "point clouds", "clouds", f" ({backbone.in_channels} numbers a point)"
        files = "`model.safetensors` (weights), `config.json` (architecture)"
        use = f"features = geossl.extract_features(backbone, points)  # points [B, N, {backbone.in_channels}] float32"
    else:
        kind, item, columns = "images", "pairs", ""
        files = "`model.safetensors`, `config.json` (the encoder), `decoder.safetensors`, `decoder.json` (the decoder for a second image)"
        use = f"""images = geossl.geometry.normalize_images(images)  # RGB in 0..1, [B, 3, H, W], sides multiples of {backbone.patch}
features = backbone(images)  # [B, {backbone.dim}, H / {backbone.patch}, W / {backbone.patch}]
pair = geossl.models.load_pair_backbone("path/to/this/folder")  # with the decoder, for stereo and flow"""
    return f"""# {backbone.name}, pretrained with {config.method.name} on {data.name}

An encoder of {kind} made with geossl.

- input: {data.describe()}{columns}
- output: {backbone.describe()}
- training: {length} of {train.batch_size} {item}, seed {train.seed}; all settings are in `../config.yaml`
- files: {files}

```python
import geossl

backbone = geossl.load("path/to/this/folder")
{use}
```
"""
