"""``geossl evaluate task``: score a fine-tuned model on the test part of its data, by voting too.

    evaluate.py task MODEL [CONFIG.yaml] [--data.name modelnet40] [--votes 10]

MODEL is a run folder of ``geossl finetune``, its export, or an official file of a fine-tuned model. A run is scored on the data it was
trained on unless flags name others.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from geossl.cli.convert import numbered_classes, read_published_config
from geossl.cli.evaluate import data_of_run
from geossl.cli.finetune import check_labels
from geossl.cli.scores import score_task
from geossl.cli.training import check_columns, make_console
from geossl.config import load_config, registry_field, require, split_arguments
from geossl.data import DATASETS
from geossl.data.files import write_json
from geossl.errors import CheckpointError, ConfigError
from geossl.evaluation import evaluate_by_voting
from geossl.methods.reference import find_system, load_reference
from geossl.tasks import Dense, RelativePose, load_task


@dataclass(kw_only=True)
class EvaluateTaskConfig:
    """Score a fine-tuned model on a test part."""

    data: Any = registry_field(DATASETS, default="objects")  # noqa: RUF009 - makes a dataclass field
    """Data set with the classes the model was trained on."""
    batch_size: int = 32
    """Clouds per forward pass."""
    votes: int = 0
    """Classification: average the scores of so many random views of each cloud (published: 10); 0 does not vote. A view is data.points
    points of the pool, augmented as data.augment says."""
    repetitions: int = 10
    """Times the voting is repeated with other views: mean and deviation are reported, and the best repetition, which the published numbers
    are, as selected on the test part (published: 299 by Point-MAE, 49 by Point-M2AE and I2P-MAE)."""
    pool: int = 0
    """Points the views are chosen from, by farthest-point sampling; 0 takes 75/64 of data.points: the published 1,200 for 1,024."""
    seed: int = 0
    """Of the views."""
    system: str | None = None
    """Which system published an official file; null finds out (Point-M2AE and I2P-MAE have the same weights: the first is assumed)."""
    published_config: Path | None = None
    """The configuration file an official one was trained with, for what its weights cannot tell: groups, their sizes, radii, heads."""
    out: Path | None = None
    """JSON file to write; default: ``evaluation_<task>_<data>.json`` in the model's folder, or here."""

    def __post_init__(self) -> None:
        for key in ("batch_size", "repetitions"):
            require(getattr(self, key) >= 1, key, "must be at least 1", getattr(self, key))
        for key in ("votes", "seed", "pool"):
            require(getattr(self, key) >= 0, key, "must not be negative", getattr(self, key))


def main(argv: list[str]) -> int:
    """Run the program; returns its exit code."""
    name, args = split_arguments(argv)
    if name is None:
        load_config(EvaluateTaskConfig, None, args, prog="evaluate task MODEL")  # prints --help, or names a wrong flag
        raise ConfigError("evaluate task: name a fine-tuned model first: a run folder, or an official file; see --help")
    path, args = split_arguments(args)
    data_told = path is not None or any(flag.partition("=")[0] == "--data.name" for flag in args)
    if not data_told and (found := data_of_run(Path(name))):
        args, data_told = [*found, *args], True
    config = load_config(EvaluateTaskConfig, path, args, prog="evaluate task MODEL")
    module = load_model(name, config)
    if not data_told:
        raise ConfigError(f"data: {name} does not tell what it was trained on; give --data.name, one of {', '.join(DATASETS.names())}")
    summary = evaluate_task(name, module, config)
    show(summary)
    folder = Path(name) if Path(name).is_dir() else Path()
    out = config.out or folder / f"evaluation_{summary['task']}_{config.data.name}.json"
    write_json(out, summary)
    print(f"written to {out}")
    return 0


def load_model(name: str, config: EvaluateTaskConfig) -> Any:
    """Load a fine-tuned model from a run folder or an official file."""
    if not Path(name).is_file():
        return checked_kind(name, load_task(name))
    system = config.system or find_system(name)
    model = load_reference(system, name, read_published_config(config.published_config))
    if not type(model).__module__.startswith("geossl.tasks."):
        raise CheckpointError(f"{name}: is a pretraining file of {system}, not of a fine-tuned model; probe it with geossl evaluate MODEL")
    return checked_kind(name, model)


def checked_kind(name: str, model: Any) -> Any:
    """Return ``model``, if it predicts classes."""
    if isinstance(model, Dense | RelativePose):
        raise CheckpointError(f"{name}: is a model of task {model.config.name}, which has no classes; use geossl evaluate dense MODEL")
    return model


def evaluate_task(name: str, module: Any, config: EvaluateTaskConfig) -> dict[str, Any]:
    """Score ``module``; returns the JSON object that is written."""
    test = config.data.build("test")
    check_labels(test, module.config)
    check_columns(test, module.backbone.config)
    known = len(module.config.part_counts) if hasattr(module.config, "part_counts") else module.config.classes
    if known != len(test.classes):
        raise ConfigError(
            f"data: {config.data.name} has {len(test.classes)} classes, but {name} was trained on {known}; choose its data set"
        )
    named = getattr(module, "classes", test.classes)
    if named != test.classes and named != numbered_classes(known):
        raise ConfigError(f"data: {config.data.name} has the classes {_short(test.classes)}, but {name} was trained on {_short(named)}")
    summary = {"model": name, "task": module.config.name, "data": config.data.name, "points": getattr(config.data, "points", None)}
    whole = views_data(module, config).build("test") if config.votes else None
    summary["scores"] = score_task(module, test, config.batch_size)
    if whole is not None:
        votes = evaluate_by_voting(
            module,
            whole,
            points=config.data.points,
            votes=config.votes,
            repetitions=config.repetitions,
            views=config.data.augment,
            batch_size=config.batch_size,
            seed=config.seed,
        )
        summary["voting"] = votes.to_json()
    return summary


def _short(names: list[str]) -> str:
    return ", ".join(names[:3]) + (" ..." if len(names) > 3 else "")


def views_data(module: Any, config: EvaluateTaskConfig) -> Any:
    """The data set whose farthest-point samples the views of the voting are chosen from."""
    if module.config.name != "classification":
        raise ConfigError(f"votes: only task classification votes, not {module.config.name}; leave it at 0")
    pool = config.pool or -(-config.data.points * 75 // 64)
    if pool < config.data.points:
        raise ConfigError(f"pool must be at least data.points ({config.data.points}), got {config.pool}")
    try:
        return replace(config.data, points=pool, pool=None, evaluation_points="farthest")
    except ConfigError as error:
        raise ConfigError(f"pool: {config.data.name} has no {pool} points to choose views from, give a smaller one ({error})") from error


def show(summary: dict[str, Any]) -> None:
    """Print the table of the scores."""
    from rich.table import Table

    console, table = make_console(), Table()
    console.print(f"{summary['task']} on the test part of {summary['data']}, in %")
    table.add_column("score")
    table.add_column("value", justify="right")
    for name, value in summary["scores"].items():
        table.add_row(name, f"{100 * value:.2f}")
    voting = summary.get("voting")
    if voting:
        table.add_row(
            f"accuracy by {voting['votes']} votes, {len(voting['accuracies'])} repetitions",
            f"{100 * voting['mean']:.2f} ± {100 * voting['std']:.2f}",
        )
        table.add_row("the best of them, selected on the test part as published", f"{100 * voting['best_on_test']:.2f}")
    console.print(table)
