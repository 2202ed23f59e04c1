"""The folder of a run: what lies in it, and never overwriting one by accident."""

from __future__ import annotations

import shutil
from pathlib import Path

from geossl.engine.checkpoint import list_checkpoints, remove_unfinished, step_of, write_text_atomically
from geossl.errors import ConfigError

_MADE_BY_A_FIT = ("gaussians.ply", "views.png", "summary.json")
_MADE_BY_A_RUN = (
    *("config.yaml", "metrics.jsonl", "tensorboard", "checkpoints", "export", "report", "report.html", "profile"),
    *_MADE_BY_A_FIT,
)


def check_run_folder(folder: Path, *, overwrite: bool, automatic: bool, start: int | None) -> None:
    """Refuse to write into the folder of another run. Nothing is changed.

    Args:
        folder: The run's folder.
        overwrite: What is there may be replaced.
        automatic: The newest checkpoint there is continued if there is one; a run that did not get as far as that may be replaced.
        start: Step of the checkpoint of this folder that is continued; None for a new run.

    Raises:
        ConfigError: the folder holds a run that is neither continued nor to be replaced, or checkpoints later than ``start``.
    """
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"train.run_folder: {folder} is a file; give the path of a folder")
    newest = next(iter(list_checkpoints(folder / "checkpoints")), None)
    if start is None and not overwrite and any((folder / name).exists() for name in (("export",) if automatic else _MADE_BY_A_RUN)):
        there = f", its newest checkpoint is of step {step_of(newest)}" if newest else ", without checkpoints"
        raise ConfigError(
            f"train.run_folder: {folder} holds a run already{there}. Continue it with --resume auto, "
            "choose another --train.run_folder, or replace it with --train.overwrite"
        )
    if start is not None and not automatic and newest is not None and step_of(newest) > start:
        raise ConfigError(
            f"resume: {folder} has later checkpoints, up to step {step_of(newest)}; "
            f"to branch off at step {start}, choose another --train.run_folder"
        )


def prepare_run_folder(folder: Path, settings: str, *, fresh: bool) -> None:
    """Make the run's folder and write ``config.yaml``; with ``fresh``, first delete what an earlier run made there (and only that)."""
    if fresh:
        clear_run_folder(folder)
    (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    remove_unfinished(folder / "checkpoints")
    write_text_atomically(folder / "config.yaml", settings)


def clear_run_folder(folder: Path) -> None:
    """Delete what an earlier run made in ``folder``, and only that."""
    for name in _MADE_BY_A_RUN:
        if (folder / name).is_dir():
            shutil.rmtree(folder / name)
        else:
            (folder / name).unlink(missing_ok=True)
    for path in folder.glob("nonfinite_step_*_rank_*.pt"):
        path.unlink()
