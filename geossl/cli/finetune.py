"""``geossl finetune``: supervised training of a task on a pretrained backbone.

    finetune.py [CONFIG.yaml] --weights runs/quickstart [--data.name modelnet40]
    finetune.py [CONFIG.yaml] --weights runs/quickstart --few_shot.way 5 --few_shot.shot 10

``--weights`` takes what ``geossl.load`` takes (a run folder, one of its checkpoints or its export, a hub id) or an official checkpoint
file. Without it the backbone starts from random weights, the honest comparison.
"""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from geossl.cli.few_shot import FewShotConfig, run_few_shot
from geossl.cli.scores import BEST_SCORE, score_task
from geossl.cli.training import (
    batches,
    check_columns,
    exit_code,
    export_backbone,
    gives_images,
    log,
    read_weights,
    set_up_messages,
    tell_changes,
)
from geossl.config import load_config, registry_field, require, split_arguments, to_yaml
from geossl.data import DATASETS, Subset, collate, random_subset
from geossl.engine import Hooks, OptimConfig, Result, TrainConfig, World, seed_everything, start_world, stop_world, train
from geossl.errors import ConfigError, DataError
from geossl.evaluation import evaluate_segmentation, save_segmentation_data
from geossl.evaluation.dense import check_truth
from geossl.evaluation.dense_pictures import save_dense_data
from geossl.evaluation.token_probe import has_point_labels
from geossl.layers.dpt import STEP
from geossl.models import BACKBONES, CroCoPair, load_pair_backbone
from geossl.models.checkpoints import load_state
from geossl.models.croco_files import save_decoder
from geossl.tasks import TASKS, DenseConfig, PartSegmentationConfig, RelativePoseConfig, SegmentationConfig, save_task
from geossl.tasks.dense import PairDenseConfig
from geossl.tasks.segmentation import class_weights_of

PAIR_TASKS = (PairDenseConfig, RelativePoseConfig)
"""Tasks on pairs of images: they take encoder and decoder."""
IMAGE_TASKS = (DenseConfig, RelativePoseConfig)
"""Tasks on images."""


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig:
    """Supervised training of a task on a (pretrained) backbone."""

    task: Any = registry_field(TASKS, default="classification")  # noqa: RUF009 - makes a dataclass field
    """Task: head and loss."""
    weights: str | None = None
    """Pretrained weights: a run, a checkpoint or an export of it, a hub id, or an official checkpoint file (.pth, .ckpt); null starts from
    random ones."""
    backbone: Any = registry_field(BACKBONES, default=None)  # noqa: RUF009
    """Encoder; null is the one the weights belong to. Name it to change numbers the weights do not depend on (groups, drop_path)."""
    data: Any = registry_field(DATASETS, default="objects")  # noqa: RUF009
    """Data set with classes (of whole clouds or of points, as the task needs): trained on its training part, evaluated on its test part."""
    labelled_samples: int = 0
    """Train on so many samples only (100 labelled events, say), chosen at random by labelled_seed: smaller choices are part of larger
    ones, and train.seed does not change them. 0 takes all."""
    labelled_seed: int = 0
    """Which samples labelled_samples chooses."""
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=5e-4, warmup=50, clip=10.0))
    """Optimiser and schedule."""
    train: TrainConfig = field(default_factory=lambda: TrainConfig(run_folder=Path("runs/finetune"), steps=1000, batch_size=32))
    """Length, size and machinery of the training."""
    evaluate_every: int = 250
    """Steps between two evaluations on the test part, if there is one; the last step is always evaluated."""
    evaluate_samples: int = 0
    """Evaluate on the first so many samples of the test part; 0 takes all."""
    resume: str = "none"
    """`auto` continues the run in train.run_folder from its newest intact checkpoint, if it has any; or the path of a checkpoint or run
    folder; `none` starts anew."""
    few_shot: FewShotConfig = field(default_factory=FewShotConfig)
    """Few-shot episodes instead of one training: each is a training of its own in train.run_folder/fold_<n>."""

    def __post_init__(self) -> None:
        require(not (self.few_shot.way and self.labelled_samples), "labelled_samples", "must be 0 with few_shot", self.labelled_samples)
        require(self.evaluate_every >= 1, "evaluate_every", "must be at least 1", self.evaluate_every)
        for key in ("labelled_samples", "labelled_seed", "evaluate_samples"):
            require(getattr(self, key) >= 0, key, "must not be negative", getattr(self, key))


def main(argv: list[str] | None = None) -> int:
    """Run the program; returns its exit code."""
    path, args = split_arguments(sys.argv[1:] if argv is None else argv)
    set_up_messages()
    config = load_config(FinetuneConfig, path, args, prog="finetune [CONFIG.yaml]")
    world = start_world(config.train.device, config.train.parallel)
    code = finetune(config, world)
    stop_world()
    return code


def finetune(config: FinetuneConfig, world: World) -> int:
    """Fine-tune as ``config`` says, as one of the processes of ``world``; returns the exit code."""
    if config.few_shot.way:
        return run_few_shot(config, world, train_task, build_backbone)
    return exit_code(train_task(config, world, labelled_part(config), config.data.build("test")), config.train.run_folder)


def train_task(config: FinetuneConfig, world: World, dataset: Any, test: Any) -> Result:
    """Train the task of ``config`` on ``dataset`` and score it on ``test``, leaving a complete run folder."""
    if config.evaluate_samples:
        test = Subset(test, range(min(config.evaluate_samples, len(test))))
    check_labels(dataset, config.task)
    config = dataclasses.replace(config, task=with_classes(config.task, dataset))
    check_batch(config, world)
    loader = batches(dataset, config.train, world)
    seed_everything(config.train.seed)
    body = build_pair(config) if isinstance(config.task, PAIR_TASKS) else build_backbone(config)
    if isinstance(body, CroCoPair):
        config = dataclasses.replace(config, task=dataclasses.replace(config.task, decoder=body.decoder.config))
    check_columns(dataset, (body.backbone if isinstance(body, CroCoPair) else body).config)
    module = config.task.build(body)

    def export(module: nn.Module, folder: Path) -> None:
        def save_beside(place: Path) -> None:
            save_task(module, dataset.classes, place)
            if isinstance(pair := getattr(module, "body", None), CroCoPair):
                save_decoder(pair.decoder, place)

        export_backbone(module, folder, model_card(config, dataset.classes), save_beside)

    def report(module: nn.Module, folder: Path) -> None:
        from geossl.vis import write_report

        if not len(test):
            pass  # there is nothing to show but the curves
        elif isinstance(config.task, SegmentationConfig):
            found = evaluate_segmentation(module, test, batch_size=config.train.batch_size)
            save_segmentation_data(folder, module, test, found, seed=config.train.seed)
        elif isinstance(config.task, DenseConfig):
            save_dense_data(folder, module, test)
        log.info("report: %s", write_report(folder))

    if not len(test):
        log.warning("data: %s has no test part: the model is not scored, and no checkpoint is the best", config.data.name)
    hooks = Hooks(
        probe=(lambda module: score_task(module, test, config.train.batch_size)) if len(test) else None,
        probe_every=config.evaluate_every if len(test) else 0,
        best=BEST_SCORE[config.task.name],
        export=export,
        report=report,
    )
    settings = dataclasses.replace(config, resume="none", train=dataclasses.replace(config.train, overwrite=False))
    if config.resume != "none" and world.is_main:
        tell_changes(settings, config.train.run_folder)
    return train(module, loader, config.train, config.optim, world, hooks=hooks, resume=config.resume, settings=to_yaml(settings))


def labelled_part(config: FinetuneConfig) -> Any:
    """The training part, or the few samples of it that are to be used."""
    dataset = config.data.build("train")
    if not config.labelled_samples:
        return dataset
    if config.labelled_samples > len(dataset):
        raise ConfigError(f"labelled_samples: {config.labelled_samples} were asked for, but {config.data.name} has {len(dataset)}")
    return random_subset(dataset, config.labelled_samples, config.labelled_seed)


def check_labels(dataset: Any, task: Any) -> None:
    """Check that every training sample has a class, or its points have, or its pixels what is to be predicted, as ``task`` needs."""
    if isinstance(task, IMAGE_TASKS):
        check_images(dataset, task)
        return
    if gives_images(dataset):
        raise ConfigError(f"data: {dataset.config.name} gives images without classes, but task {task.name} needs clouds with classes")
    if isinstance(task, (SegmentationConfig, PartSegmentationConfig)):
        if not has_point_labels(dataset):
            hint = "lartpc" if isinstance(task, SegmentationConfig) else "shapenet_part"
            raise ConfigError(f"data: the points of {dataset.config.name} have no classes, which task {task.name} needs; choose {hint}")
        if isinstance(task, PartSegmentationConfig) and not hasattr(dataset, "part_counts"):
            raise ConfigError(f"data: {dataset.config.name} has no parts of categories, which task {task.name} needs; choose shapenet_part")
        return
    missing = int((dataset.labels < 0).sum())
    if not dataset.classes or missing:
        hint = "; use --data.subset labelled" if hasattr(dataset.config, "subset") else ""
        raise ConfigError(f"data: {missing} of the {len(dataset)} samples of {dataset.config.name} have no class{hint}")


def check_images(dataset: Any, task: Any, *, training: bool = True) -> None:
    """Check that the samples of ``dataset`` are images with the truth that ``task`` predicts, in ``training`` of a size that it takes."""
    if not gives_images(dataset):
        raise ConfigError(f"data: {dataset.config.name} gives point clouds, but task {task.name} needs images; choose room_pairs")
    batch = collate([dataset.get(0, np.random.default_rng(0) if training else None)])
    if isinstance(task, PAIR_TASKS) and batch.reference is None:
        raise ConfigError(f"data: {dataset.config.name} gives single images, but task {task.name} needs pairs; set data.views to 2")
    if isinstance(task, RelativePoseConfig):
        if batch.motion is None:
            raise ConfigError(
                f"data: {dataset.config.name} gives no motion between images; choose pose_pairs, or room_pairs with truth motion"
            )
        return
    try:
        check_truth(task.name, batch, dataset.config.name)
    except DataError as error:
        raise ConfigError(f"data: {error}") from error
    height, width = batch.image.shape[2:]
    if training and task.head == "dpt" and (height % STEP or width % STEP):
        raise ConfigError(f"data: images are {height} x {width}, but head dpt needs multiples of {STEP}; choose another data.crop")


def check_batch(config: FinetuneConfig, world: World) -> None:
    """Check that every forward pass has two clouds, where the task normalises something over the clouds of a batch."""
    parts = world.size * config.train.accumulate
    if not isinstance(config.task, (SegmentationConfig, *IMAGE_TASKS)) and config.train.batch_size < 2 * parts:
        raise ConfigError(
            f"train.batch_size: task {config.task.name} normalises over the clouds of each forward pass and needs two of them, so at least "
            f"{2 * parts} with {world.size} processes and train.accumulate {config.train.accumulate}, got {config.train.batch_size}"
        )


def with_classes(task: Any, dataset: Any) -> Any:
    """Fill in the number of classes (or parts), and how a segmentation weighs them, where the task leaves that to the data."""
    name = dataset.config.name
    if isinstance(task, IMAGE_TASKS):
        return task
    if isinstance(task, PartSegmentationConfig):
        if task.part_counts and task.part_counts != tuple(dataset.part_counts):
            raise ConfigError(f"task.part_counts is {task.part_counts}, but data set {name} has {dataset.part_counts}; leave it empty")
        return dataclasses.replace(task, part_counts=tuple(dataset.part_counts))
    if task.classes and task.classes != len(dataset.classes):
        raise ConfigError(f"task.classes is {task.classes}, but data set {name} has {len(dataset.classes)}; leave it at 0")
    task = dataclasses.replace(task, classes=len(dataset.classes))
    if isinstance(task, SegmentationConfig) and not task.class_weights:
        task = dataclasses.replace(task, class_weights=class_weights_of(count_points(dataset)))
        weights = ", ".join(f"{name} {weight:.3g}" for name, weight in zip(dataset.classes, task.class_weights, strict=True))
        log.info("task.class_weights, counted on up to 1,000 training events: %s", weights)
    return task


def count_points(dataset: Any, most: int = 1000) -> torch.Tensor:
    """Points of each class, ``[classes]`` int64, in the data set, or in ``most`` samples spread evenly over it where it has more."""
    counts = torch.zeros(len(dataset.classes), dtype=torch.int64)
    for row in np.unique(np.linspace(0, len(dataset) - 1, most).round().astype(int)):
        label = torch.from_numpy(dataset.get(int(row), None).point_label)
        counts += torch.bincount(label[label >= 0], minlength=len(counts))
    return counts


def build_backbone(config: FinetuneConfig) -> Any:
    """Make the backbone and fill it with the pretrained weights, all of them or none."""
    if config.weights is None:
        if config.backbone is None:
            raise ConfigError(
                "weights: give --weights (a run folder, an export or an official checkpoint), or --backbone.name for random weights"
            )
        log.warning("no --weights: the backbone starts from random ones")
        return config.backbone.build()
    pretrained = read_weights(config.weights)
    state = pretrained.state_dict()
    backbone = pretrained if config.backbone is None else config.backbone.build()
    if backbone is not pretrained:
        load_state(backbone, state, source=config.weights)
    log.info(
        "weights: all %d tensors of the encoder (%s) are from %s; the head is new", len(state), type(backbone).__name__, config.weights
    )
    return backbone


def build_pair(config: FinetuneConfig) -> CroCoPair | Any:
    """Make encoder and decoder and fill them with the pretrained weights; only the encoder where the decoder starts from random ones."""
    if config.weights is None or config.task.fresh_decoder:
        return build_backbone(config)
    pretrained = load_pair_backbone(config.weights)
    pair = pretrained
    if config.backbone is not None:
        encoder = config.backbone.build()
        load_state(encoder, pretrained.backbone.state_dict(), source=config.weights)
        pair = CroCoPair(encoder, pretrained.decoder)
    log.info("weights: all tensors of encoder and decoder are from %s; the head is new", config.weights)
    return pair


def model_card(config: FinetuneConfig, classes: list[str]) -> str:
    """What the exported files are, in Markdown."""
    return f"""# {config.task.name} on {config.data.name}, fine-tuned from {config.weights or "random weights"}

Made with geossl.

- {f"classes: {', '.join(classes)}" if classes else f"task: {config.task.name}"}
- training: {config.train.steps} steps of {config.train.batch_size} samples, seed {config.train.seed}; all settings are in `../config.yaml`
- files: `model.safetensors` and `config.json` (the backbone, read by `geossl.load`), `task.safetensors` and `task.json` (backbone and head)
"""
