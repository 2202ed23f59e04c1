"""Few-shot episodes: mean and deviation of the accuracy over folds, fine-tuned or by a linear probe of the frozen encoder."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from geossl.cli.training import changed_settings, check_columns, exit_code, log, make_console
from geossl.config import require
from geossl.data import ModelNet40FewShotConfig, draw_episode
from geossl.data.files import read_json, write_json
from geossl.engine import Result, World, seed_everything
from geossl.engine.run_folder import clear_run_folder
from geossl.errors import ConfigError
from geossl.evaluation import Features, ProbeProtocol, embed, probe


@dataclass(frozen=True, kw_only=True)
class FewShotConfig:
    """Episodes of a few classes with a few labelled shapes each. The defaults are the published ones, once ``way`` is given."""

    way: int = 0
    """Classes of an episode (published: 5 and 10); 0 has no episodes, and trains on the whole training part."""
    shot: int = 10
    """Shapes of each class to learn from (published: 10 and 20)."""
    folds: int = 10
    """Episodes."""
    test_per_class: int = 20
    """Shapes of each class to be tested on. The published episodes of modelnet40_few_shot bring theirs."""
    seed: int = 0
    """Of the episodes drawn from any other data set, training and test part together; train.seed does not change them."""
    classifier: Literal["finetune", "linear", "svm"] = "finetune"
    """Train the task in each episode, or fit a logistic regression or a linear SVM on the frozen encoder's features."""
    pooling: Literal["mean", "mean_max", "max", "mean_plus_max"] = "mean_max"
    """How tokens become the features of a frozen encoder."""

    def __post_init__(self) -> None:
        require(self.way == 0 or self.way >= 2, "way", "must be at least 2, or 0 for no episodes", self.way)
        for key in ("shot", "folds", "test_per_class"):
            require(getattr(self, key) >= 1, key, "must be at least 1", getattr(self, key))
        require(self.seed >= 0, "seed", "must not be negative", self.seed)


# What all folds of a summary must have in common. The number of classes follows from the episode.
_EPISODE_KEYS = (
    *("task.", "weights", "backbone", "data.", "optim.", "few_shot.", "evaluate_samples"),
    *("train.steps", "train.epochs", "train.batch_size", "train.seed"),
)
_FREE_KEYS = ("few_shot.folds", "task.classes")


def run_few_shot(
    config: Any, world: World, train_task: Callable[[Any, World, Any, Any], Result], build_backbone: Callable[[Any], Any]
) -> int:
    """Run all episodes of ``config`` (a ``FinetuneConfig``); returns the exit code.

    Writes ``few_shot.json`` into the run folder: the accuracy of every fold, mean and sample standard deviation. With ``resume: auto``,
    folds that are complete are not run again; folds of other settings are refused.

    Args:
        config: The settings of the program.
        world: One process: every fold is a training from the start.
        train_task: Trains the task on one part and scores it on another.
        build_backbone: Makes the pretrained encoder that ``config`` names.
    """
    options: FewShotConfig = config.few_shot
    if world.size > 1:
        raise ConfigError(f"few_shot: runs in one process, but torchrun started {world.size}; its trainings are short")
    if config.task.name != "classification":
        raise ConfigError(f"few_shot: needs task classification, got {config.task.name}")
    if config.resume not in ("none", "auto"):
        raise ConfigError(f"resume: few_shot continues its own folds, with auto, got {config.resume!r}")
    folder = config.train.run_folder
    if folder.exists() and any(folder.iterdir()) and config.resume != "auto" and not config.train.overwrite:
        raise ConfigError(f"train.run_folder: {folder} is not empty; --resume auto continues it, --train.overwrite replaces its folds")
    folds = [one_fold(config, fold) for fold in range(options.folds)]
    if config.resume == "auto":
        for one in folds:
            check_same_episodes(one)
    seed_everything(config.train.seed)
    backbone = build_backbone(config)  # weights and episodes that cannot be had are told of before old folds go
    episode(folds[0], 0)
    if config.resume != "auto":  # all at once: an interrupted run must not be continued with folds of the one it replaces
        (folder / "few_shot.json").unlink(missing_ok=True)
        for place in folder.glob("fold_*"):
            (place / "score.json").unlink(missing_ok=True)
            clear_run_folder(place)
    rows = []
    for fold, one in enumerate(folds):
        train, test = episode(one, fold)
        if options.classifier != "finetune":
            rows.append({"last": probe_episode(one, backbone, train, test)})
        else:
            score = one.train.run_folder / "score.json"
            if config.resume != "auto" or not score.is_file():
                result = train_task(one, world, train, test)
                if result.signal is not None:
                    return exit_code(result, folder)
                curve = _accuracies(one.train.run_folder / "metrics.jsonl")
                write_json(score, {"last": curve[-1], "best_on_test": max(curve)})
            rows.append(read_json(score))
        log.info("fold %d of %d: accuracy %.3f (classes %s)", fold + 1, options.folds, rows[-1]["last"], ", ".join(train.classes))
    summary = summarise_folds(rows, config)
    write_json(folder / "few_shot.json", summary)
    show(summary)
    print(f"written to {folder / 'few_shot.json'}")
    return 0


def one_fold(config: Any, fold: int) -> Any:
    """The settings of the training of one fold: its folder, and its episode where the data set has them as published."""
    options, data = config.few_shot, config.data
    if isinstance(data, ModelNet40FewShotConfig):
        data = dataclasses.replace(data, way=options.way, shot=options.shot, fold=fold)
    return dataclasses.replace(
        config, data=data, train=dataclasses.replace(config.train, run_folder=config.train.run_folder / f"fold_{fold:02d}")
    )


def check_same_episodes(one: Any) -> None:
    """Refuse to continue beside a fold that was run with other settings: the mean would be of different things."""
    changed = [
        text for key, text in changed_settings(one, one.train.run_folder).items() if key.startswith(_EPISODE_KEYS) and key not in _FREE_KEYS
    ]
    if changed:
        raise ConfigError(
            f"resume: {one.train.run_folder} was run with other settings ({', '.join(changed)}); name another train.run_folder, or give "
            "--train.overwrite instead of --resume auto"
        )


def episode(config: Any, fold: int) -> tuple[Any, Any]:
    """The learning and the test part of one fold: as published, or drawn from both parts of any other data set."""
    options: FewShotConfig = config.few_shot
    if isinstance(config.data, ModelNet40FewShotConfig):
        return config.data.build("train"), config.data.build("test")
    return draw_episode(
        config.data.build("all"), options.way, options.shot, test_per_class=options.test_per_class, fold=fold, seed=options.seed
    )


def probe_episode(config: Any, backbone: Any, train: Any, test: Any) -> float:
    """Accuracy of a simple classifier on the features of a frozen encoder, in [0, 1]."""
    check_columns(train, backbone.config)
    values = [embed(backbone, part, pooling=config.few_shot.pooling, batch_size=config.train.batch_size) for part in (train, test)]
    labels = np.concatenate([train.labels, test.labels])
    is_test = np.arange(len(labels)) >= len(train)
    features = Features(np.concatenate(values), labels, np.full(len(labels), -1), is_test, train.classes)
    (score,) = probe(features, ProbeProtocol(probes=(config.few_shot.classifier,), resplit_seeds=()))
    assert score.official is not None
    return score.official


def summarise_folds(rows: list[dict[str, Any]], config: Any) -> dict[str, Any]:
    """The JSON object that is written: settings, every fold, mean and sample standard deviation of the last step's accuracy."""

    def spread(key: str) -> dict[str, float]:
        values = [row[key] for row in rows]
        return {"mean": float(np.mean(values)), "std": float(np.std(values, ddof=1)) if len(values) > 1 else 0.0}

    summary = {**dataclasses.asdict(config.few_shot), "data": config.data.name, "weights": config.weights, **spread("last")}
    summary["folds_accuracy"] = [row["last"] for row in rows]
    if "best_on_test" in rows[0]:
        summary["best_on_test"] = spread("best_on_test") | {"about": "the best evaluation of each fold, selected on its test part"}
    return summary


def show(summary: dict[str, Any]) -> None:
    """Print the table of the folds."""
    from rich.table import Table

    console, table = make_console(), Table()
    console.print(f"{summary['way']}-way {summary['shot']}-shot on {summary['data']}, {summary['classifier']}: accuracy in %")
    table.add_column("fold")
    table.add_column("accuracy", justify="right")
    for fold, value in enumerate(summary["folds_accuracy"]):
        table.add_row(str(fold), f"{100 * value:.1f}", end_section=fold == len(summary["folds_accuracy"]) - 1)
    table.add_row("mean ± deviation", f"{100 * summary['mean']:.1f} ± {100 * summary['std']:.1f}", style="bold")
    if "best_on_test" in summary:
        best = summary["best_on_test"]
        table.add_row("best evaluations, selected on the test parts", f"{100 * best['mean']:.1f} ± {100 * best['std']:.1f}")
    console.print(table)


def _accuracies(path: Path) -> list[float]:
    """The accuracies of a run's evaluations, in their order."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [row["probe/accuracy"] for row in rows if "probe/accuracy" in row]
