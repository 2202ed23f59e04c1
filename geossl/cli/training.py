"""What the programs that train and evaluate share: batches, messages, weights, exports."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import sys
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from geossl.config import read_yaml, to_dict
from geossl.data import Loader, build_loader
from geossl.data.pairs import PairDataset
from geossl.engine import BatchLoader, Result, TrainConfig, World
from geossl.errors import CheckpointError, ConfigError
from geossl.geometry import ImageBatch, PackedPoints, PointBatch
from geossl.models import load, save_backbone

log = logging.getLogger("geossl")


class _Stderr(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        prefix = "" if record.levelno < logging.WARNING else f"{record.levelname.lower()}: "
        print(prefix + record.getMessage(), file=sys.stderr)  # looked up now: rich redirects it while it draws the progress line


def set_up_messages() -> None:
    """Show on stderr what geossl has to say; of several processes, only the first speaks below the level of errors."""
    if not any(isinstance(handler, _Stderr) for handler in log.handlers):
        log.addHandler(_Stderr())
    log.setLevel(logging.INFO if os.environ.get("RANK", "0") == "0" else logging.ERROR)


def batches(dataset: Any, config: TrainConfig, world: World) -> BatchLoader:
    """Make the endless stream of this process's training (micro-)batches of ``dataset``."""
    parts = world.size * config.accumulate
    if config.batch_size % parts:
        raise ConfigError(
            f"train.batch_size: {config.batch_size} does not divide by "
            f"the {world.size} processes times train.accumulate {config.accumulate}"
        )
    try:
        loader = build_loader(
            dataset,
            config.batch_size,
            seed=config.seed,
            rank=world.rank,
            world_size=world.size,
            workers=config.workers,
            pin_memory=world.device.type == "cuda",
        )
    except ConfigError as error:  # starts with the name of the argument, which is that of the field
        raise ConfigError(f"train.{error}") from error
    return loader if config.accumulate == 1 else MicroBatches(loader, config.accumulate)


class MicroBatches:
    """Hands out the batches of ``loader`` in ``parts`` pieces each. Its position is that of whole batches: save it between two of them."""

    def __init__(self, loader: Loader, parts: int) -> None:
        self.batches_per_epoch = loader.batches_per_epoch
        self._loader, self._parts = loader, parts
        self._ready: deque[Any] = deque()

    def __next__(self) -> Any:
        """Return the next piece."""
        if not self._ready:
            self._ready.extend(split_batch(next(self._loader), self._parts))
        return self._ready.popleft()

    def state_dict(self) -> dict[str, Any]:
        """Return the position of the loader."""
        return self._loader.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue at a saved position."""
        self._ready.clear()
        self._loader.load_state_dict(state)

    def close(self) -> None:
        """Stop the loader's workers."""
        self._loader.close()


def split_batch(batch: Any, parts: int) -> list[Any]:
    """Cut a batch into ``parts`` batches of nearly equal size that keep their slots in the global batch."""
    count = len(batch)
    slot = torch.arange(count) if batch.slot is None else batch.slot
    size = batch.global_size or count
    pieces: list[Any] = []
    for part in range(parts):
        rows = slice(count * part // parts, count * (part + 1) // parts)
        if isinstance(batch, ImageBatch):
            given = (batch.reference, batch.truth, batch.index, batch.motion)
            reference, truth, index, motion = (None if values is None else values[rows] for values in given)
            pieces.append(ImageBatch(batch.image[rows], reference, truth, index, slot[rows], size, motion))
            continue
        offsets = batch.points.offsets[rows.start : rows.stop + 1]
        begin, end = int(offsets[0]), int(offsets[-1])
        feats = None if batch.points.feats is None else batch.points.feats[begin:end]
        points = PackedPoints(batch.points.coord[begin:end], offsets - begin, feats)
        label, index = (None if values is None else values[rows] for values in (batch.label, batch.index))
        per_point = (None if values is None else values[begin:end] for values in (batch.point_label, batch.point_instance, batch.original))
        pieces.append(PointBatch(points, label, index, slot[rows], size, *per_point))
    return pieces


def read_weights(source: str) -> Any:
    """Read a pretrained backbone from a folder, a hub id or an official checkpoint file (of any system that can be read)."""
    if Path(source).is_file():
        from geossl.methods.reference import find_system, load_reference

        return getattr(load_reference(find_system(source), source), "backbone")  # noqa: B009 - of methods and tasks, unknown to nn.Module
    if Path(source).suffix in (".pth", ".pt", ".ckpt", ".safetensors"):
        raise CheckpointError(f"{source}: no such file")
    return load(source)


def check_columns(dataset: Any, backbone: Any) -> None:
    """Check that a backbone configuration takes what ``dataset`` gives: images, or points of as many columns."""
    takes, gives = ("points" if has_points else "images" for has_points in (hasattr(backbone, "in_channels"), not gives_images(dataset)))
    if takes != gives:
        choice = "pairs or room_pairs" if takes == "images" else "objects"
        raise ConfigError(
            f"backbone {backbone.name} takes {takes}, but data set {dataset.config.name} gives {gives}; "
            f"choose other data (--data.name, such as {choice}) or another backbone (--backbone.name)"
        )
    wanted = getattr(backbone, "in_channels", dataset.channels)
    if wanted != dataset.channels:
        raise ConfigError(
            f"backbone.in_channels is {wanted}, but data set {dataset.config.name} gives {dataset.channels} numbers a point "
            f"({', '.join(dataset.columns)}); use --backbone.in_channels {dataset.channels}, or other columns"
        )


def gives_images(dataset: Any) -> bool:
    """Whether the samples of a data set are images."""
    return tuple(dataset.columns) == PairDataset.columns


def tell_changes(config: Any, run_folder: Path) -> None:
    """When a run is continued, tell which settings differ from those it was started with."""
    changed = changed_settings(config, run_folder)
    if changed:
        log.warning("settings changed since the run was started: %s", ", ".join(changed.values()))


def changed_settings(config: Any, run_folder: Path) -> dict[str, str]:
    """The settings that differ from those the run in ``run_folder`` was started with: ``key before -> now``, by dotted key."""
    path = run_folder / "config.yaml"
    if not path.exists():
        return {}

    def leaves(tree: Any, prefix: str = "") -> dict[str, Any]:
        if not isinstance(tree, dict):
            return {prefix: tree}
        return {key: value for name, part in tree.items() for key, value in leaves(part, f"{prefix}.{name}".lstrip(".")).items()}

    before = leaves(read_yaml(path))
    now = leaves(to_dict(config))
    return {key: f"{key} {before.get(key)!r} -> {value!r}" for key, value in now.items() if before.get(key) != value}


def export_backbone(module: nn.Module, folder: Path, card: str, extra: Callable[[Path], Any] | None = None) -> None:
    """Write the backbone of ``module`` and a model card into ``folder``, replacing what is there in one go."""
    temporary = folder.with_name(f".{folder.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    save_backbone(getattr(module, "backbone"), temporary)  # noqa: B009 - the protocol of methods and tasks, unknown to nn.Module
    (temporary / "README.md").write_text(card, encoding="utf-8")
    if extra is not None:
        extra(temporary)
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)


def make_console() -> Any:
    """A console as wide as the terminal, or 120 columns where the output goes elsewhere."""
    from rich.console import Console

    return Console() if sys.stdout.isatty() else Console(width=120)


def exit_code(result: Result, run_folder: Path) -> int:
    """Say how a stopped run goes on, and return the exit code: 0, or 128 plus the signal's number."""
    if result.signal is None:
        return 0
    name = signal.Signals(result.signal).name
    log.info("%s: stopped after step %d of %d, checkpoint in %s; continue with --resume auto", name, result.step, result.total, run_folder)
    return 128 + result.signal
