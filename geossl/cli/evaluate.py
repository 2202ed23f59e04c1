"""``geossl evaluate``: probe a pretrained backbone, honest baselines beside every number.

    evaluate.py MODEL [CONFIG.yaml] [--data.name objects] [--layers 3 5] [--per-class] [--out scores.json]
    evaluate.py svm MODEL [CONFIG.yaml] ...      short for --probes svm svm_cv svm_published; also knn, linear
    evaluate.py task MODEL [CONFIG.yaml] ...     score a fine-tuned model instead, see ``geossl.cli.evaluate_task``
    evaluate.py dense MODEL ...                  predict or score disparity, flow, depth, normals or pose, see ``geossl.cli.evaluate_dense``
    evaluate.py matches MODEL ...                matches between two pictures, without training, see ``geossl.cli.evaluate_matches``

MODEL is a run folder, one of its checkpoints or its export, a hub id, an official checkpoint file or the registered name of a backbone
(then with random weights). Without flags for the data, a run is probed on the data set it was trained on. On particle events, tokens are
probed for the classes of their points.
"""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

from geossl.cli.training import make_console, read_weights
from geossl.config import load_config, read_yaml, registry_field, require, split_arguments
from geossl.data import DATASETS, EventDataConfig, EventDataset, Subset
from geossl.data.files import write_json
from geossl.data.sample import COLUMN_NAMES
from geossl.errors import ConfigError, DataError
from geossl.evaluation import PROBES, InstanceScore, ProbeProtocol, Prober, TokenProbeProtocol, TokenProber, score_instances
from geossl.evaluation.instances import instance_table
from geossl.evaluation.summary import class_table, confusion_table, summarise, table_of
from geossl.evaluation.token_probe import token_table
from geossl.models import CloudTeacher, TeacherConfig, TeacherPoints

PROBE_FAMILIES = {"knn": ("knn",), "linear": ("linear",), "svm": ("svm", "svm_cv", "svm_published")}
"""What the name of a probe before the model stands for."""
INSTANCE_EVENTS = 50
"""Events whose particles are looked for."""

# What a run says about its data that a probe of it needs, too.
_RUN_DATA_KEYS = (
    *("name", "root", "points", "columns", "normalize", "evaluation_points", "variant", "subset", "categories"),
    *("way", "shot", "fold"),
    *("events", "val_events", "seed", "simulation", "files", "energy_threshold", "max_energy", "remove_led", "min_points"),
)


@dataclass(kw_only=True)
class EvaluateConfig:
    """Probe a pretrained backbone (k-NN, logistic regression, linear SVM) beside honest baselines."""

    data: Any = registry_field(DATASETS, default="objects")  # noqa: RUF009 - makes a dataclass field
    """Labelled data set to probe on."""
    official: bool = True
    """Score the data set's own train/test split, too. Switch off for data without a test part: then all of ``train`` is resplit."""
    probes: tuple[str, ...] = ProbeProtocol.probes
    """Which probes: knn, linear, svm (fixed C), svm_cv (C by cross-validation inside the training part), svm_published (features as they
    are, and published_c)."""
    published_c: float = ProbeProtocol.published_c
    """C of svm_published, on ModelNet40 and ScanObjectNN OBJ-BG: I2P-MAE 0.0093 and 0.018 (with pooling max), Point-M2AE 0.012 and 0.042
    (with pooling mean_plus_max). Their authors chose it by the accuracy on the test part."""
    resplits: int = 5
    """Group-aware resplits, seeds 0 to resplits - 1."""
    layers: tuple[int, ...] = ()
    """Blocks whose normed outputs are read, side by side (negative counts from the end); none given: the last."""
    pooling: Literal["mean", "mean_max", "max", "mean_plus_max"] = "mean"
    """How the tokens of an object become one vector: mean, max, both side by side, or their sum (mean_plus_max)."""
    batch_size: int = 32
    """Objects per forward pass. (The token probe takes 4 events, as published.)"""
    tokens: int = 15_000
    """Events: tokens of each part that the token probe takes (published)."""
    instances: bool = False
    """Events: also cluster tokens by their attention and print how well the clusters are the true particles."""
    seed: int = 0
    """Initialisation of the random baselines."""
    with_teacher: bool = False
    """One more baseline: the features of the 2D model `teacher` in three views, carried to the points, without any 3D network."""
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    """For with_teacher: which 2D model, and where its weights are."""
    per_class: bool = False
    """Also print the recall of every class."""
    confusion: bool = False
    """Also print the confusion matrix."""
    out: Path | None = None
    """JSON file to write; default: ``evaluation_<data>.json`` in the model's folder, or here."""

    def __post_init__(self) -> None:
        require(self.resplits >= 1, "resplits", "must be at least 1", self.resplits)
        require(self.batch_size >= 1, "batch_size", "must be at least 1", self.batch_size)
        require(self.published_c > 0, "published_c", "must be > 0", self.published_c)
        require(self.tokens >= 1, "tokens", "must be at least 1", self.tokens)
        require(len(self.probes) > 0, "probes", f"must name at least one of {', '.join(PROBES)}", self.probes)


def main(argv: list[str] | None = None) -> int:
    """Run the program; returns its exit code."""
    argv = sys.argv[1:] if argv is None else argv
    name, args = split_arguments(argv)
    if name == "task" and not Path(name).exists():
        from geossl.cli import evaluate_task

        return evaluate_task.main(args)
    if name == "dense" and not Path(name).exists():
        from geossl.cli import evaluate_dense

        return evaluate_dense.main(args)
    if name == "matches" and not Path(name).exists():
        from geossl.cli import evaluate_matches

        return evaluate_matches.main(args)
    if name in PROBE_FAMILIES and not Path(name).exists():
        family = PROBE_FAMILIES[name]
        if any(flag.partition("=")[0] == "--probes" for flag in args):
            raise ConfigError(f"probes: evaluate {name} stands for --probes {' '.join(family)}; leave out one of the two")
        name, args = split_arguments(args)
        args = [*args, "--probes", *family]
    if name is None:
        load_config(EvaluateConfig, None, args, prog="evaluate MODEL")  # prints --help, or names a wrong flag
        raise ConfigError("evaluate: name a model first: a run or export folder, a hub id, or a registered backbone; see --help")
    path, args = split_arguments(args)
    if path is None and not any(flag.partition("=")[0] == "--data.name" for flag in args):
        args = [*data_of_run(Path(name)), *args]
    config = load_config(EvaluateConfig, path, args, prog="evaluate MODEL")
    backbone = load_model(name, config.data)
    config.data = fitting_columns(config.data, int(backbone.in_channels))
    if isinstance(config.data, EventDataConfig):
        summary = evaluate_events(name, backbone, config)
        show_events(summary)
    else:
        summary = evaluate(name, backbone, config)
        show(summary, config)
    out = config.out or (Path(name) if Path(name).is_dir() else Path()) / f"evaluation_{config.data.name}.json"
    write_json(out, summary)
    print(f"written to {out}")
    return 0


def evaluate(name: str, backbone: Any, config: EvaluateConfig) -> dict[str, Any]:
    """Probe ``backbone`` and every baseline; returns the JSON object that is written."""
    protocol = ProbeProtocol(probes=config.probes, resplit_seeds=tuple(range(config.resplits)), published_c=config.published_c)
    train, test = config.data.build("train"), config.data.build("test") if config.official else None
    layers = list(config.layers) or None
    teacher = None
    if config.with_teacher:
        seen_by = CloudTeacher(config.teacher)
        seen_by.load()  # a missing file ends the program now, not after the encoder was probed
        teacher = TeacherPoints(seen_by)
    prober = Prober(train, test, protocol=protocol, layers=layers, pooling=config.pooling, batch_size=config.batch_size, teacher=teacher)
    return summarise(
        prober.probe(backbone),
        prober.baselines(backbone, config.seed),
        train.classes,
        protocol,
        model=name,
        backbone=backbone.config.name,
        data=config.data.name,
        points=config.data.points,
        columns=config.data.columns,
        layers=layers,
        pooling=config.pooling,
    )


def evaluate_events(name: str, backbone: Any, config: EvaluateConfig) -> dict[str, Any]:
    """Probe the tokens of ``backbone``, and on request its attention, and every baseline; returns the JSON object that is written."""
    if config.layers:
        raise ConfigError("layers: tokens of events are probed as the last block leaves them; leave it empty")
    if not hasattr(backbone, "attention_maps"):
        raise ConfigError(
            f"data: events need a point_vit_volume_* backbone, got {backbone.config.name}; choose other data, such as objects"
        )
    train, test = config.data.build("train"), config.data.build("test")
    prober = TokenProber(train, test, protocol=TokenProbeProtocol(tokens=config.tokens))
    summary = prober.summary(backbone, config.seed, model=name, architecture=backbone.config.name, data=config.data.name)
    if config.instances:
        few = Subset(test, range(min(len(test), INSTANCE_EVENTS)))
        layers = sorted({len(backbone.feature_info) // 2, len(backbone.feature_info) - 1})
        summary["instances"] = [asdict(score) for score in score_instances(backbone, few, layers=layers, seed=config.seed)]
    return summary


def show_events(summary: dict[str, Any]) -> None:
    """Print the tables of the token probe and of the clusters by attention, and how far the encoder is from the bar."""
    console = make_console()
    console.print(token_table(summary))
    found = summary["verdict"]
    lead = 100 * found["lead"]
    place = "above" if lead >= 0 else "below"
    console.print(f"macro F1: {100 * found['macro_f1']:.1f} %, {abs(lead):.1f} points {place} the calibrated random encoder")
    if "instances" in summary:
        console.print(instance_table([InstanceScore(**score) for score in summary["instances"]]))


def show(summary: dict[str, Any], config: EvaluateConfig) -> None:
    """Print the tables and one line that says how far the encoder is from the bar."""
    console = make_console()
    console.print(table_of(summary))
    shown = "svm" if "svm" in config.probes else config.probes[0]
    if config.per_class:
        console.print(class_table(summary, shown))
    if config.confusion:
        console.print(confusion_table(summary, shown))
    result = summary["verdict"]
    if result:
        lead = 100 * result["lead"]
        console.print(
            f"{result['probe']}: {100 * result['mean']:.1f} %, {abs(lead):.1f} points {'above' if lead >= 0 else 'below'} the calibrated "
            f"random encoder (deviation of the difference over the resplits: {100 * result['lead_std']:.1f})"
        )


def load_model(name: str, data: Any) -> Any:
    """Load the backbone at ``name``; a registered name (that is no folder) is created with random weights for the columns of ``data``."""
    import torch

    from geossl.models import create_backbone, list_backbones

    if name in list_backbones() and not Path(name).exists():
        torch.manual_seed(0)
        print(f"{name}: a registered name, so the weights are random", file=sys.stderr)
        return create_backbone(name, in_channels=_channels(data)).eval()
    return read_weights(name)


def fitting_columns(data: Any, in_channels: int) -> Any:
    """Return ``data`` with the columns the backbone takes, where its ``in_channels`` leaves no doubt.

    Raises:
        DataError: the columns do not fit and could be several things.
    """
    if _channels(data) == in_channels:
        return data
    if isinstance(data, EventDataConfig):
        raise DataError(f"the backbone takes {in_channels} columns but events have {_channels(data)} (position and energy)")
    columns = {3: "xyz", 9: "all"}.get(in_channels)
    if columns is None:
        raise DataError(
            f"the backbone takes {in_channels} columns but data.columns={data.columns!r} gives {_channels(data)}; "
            "say which with --data.columns xyz+normal or xyz+rgb"
        )
    return replace(data, columns=columns)


def _channels(data: Any) -> int:
    return EventDataset.channels if isinstance(data, EventDataConfig) else 3 * len(COLUMN_NAMES[data.columns])


def data_of_run(model: Path, *, whole: bool = False) -> list[str]:
    """Return the data flags of the run that made ``model`` (a run folder, its export or a checkpoint of it), or none.

    With ``whole`` all settings are kept, also those that a probe is to choose for itself.
    """
    model = model.absolute()
    run = model.parent if model.name == "export" else model.parents[1] if (model / "manifest.json").is_file() else model
    if not (run / "config.yaml").is_file() or (run == model and not (run / "export").is_dir()):
        return []
    section = read_yaml(run / "config.yaml").get("data")
    if not isinstance(section, dict) or section.get("name") not in DATASETS.names() or "parts" in section:
        return []  # flags cannot name the parts of a mixture
    known = {f.name for f in fields(DATASETS.config(section["name"]))}
    kept = [(key, section[key]) for key in (section if whole else _RUN_DATA_KEYS) if key in section and key in known]
    return [text for key, value in kept if value is not None for text in _flag(key, value)]


def _flag(key: str, value: Any) -> list[str]:
    """One data setting as it is said on the command line."""
    if isinstance(value, bool):
        return [f"--data.{key}" if value else f"--data.no_{key}"]
    if isinstance(value, dict):
        return [text for name, inner in value.items() for text in _flag(f"{key}.{name}", inner)]
    if isinstance(value, list):
        return [f"--data.{key}", *map(str, value)] if value else []
    return [f"--data.{key}", str(value)]
