from __future__ import annotations

import contextlib
import dataclasses
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import geossl
from geossl.cli import run
from geossl.cli.finetune import FinetuneConfig, count_points, labelled_part
from geossl.cli.training import read_weights
from geossl.config import load_config
from geossl.data import DATASETS
from geossl.errors import CheckpointError
from geossl.evaluation import evaluate_classification, evaluate_part_segmentation
from geossl.methods.reference import find_system
from geossl.tasks import load_task

ROOT = Path(__file__).parents[2]
SMOKE = str(ROOT / "configs/finetune/smoke.yaml")
QUICK = ["--train.steps", "4", "--train.batch_size", "8", "--train.log_every", "1", "--train.save_every", "2", "--evaluate_every", "2"]
QUICK += ["--data.points", "64", "--train.device", "cpu"]


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("path", sorted((ROOT / "configs/finetune").glob("*.yaml")), ids=lambda path: path.stem)
def test_configurations_are_valid(path: Path) -> None:
    config = load_config(FinetuneConfig, path)
    parts, events = path.stem.startswith(("part_", "shapenet_part")), "polar_mae" in path.stem
    if path.stem.startswith("croco_"):
        kind = path.stem.split("_")[1]
        assert config.task.name == ("relative_pose" if kind == "pose" else kind)
        if config.backbone is not None:
            config.task.build(config.backbone.build())
        return
    assert config.task.name == ("part_segmentation" if parts else "segmentation" if events else "classification")
    assert bool(config.few_shot.way) is ("few_shot" in path.stem)
    if path.stem.startswith(("modelnet40", "scanobjectnn")):
        assert (config.data.pool, config.data.evaluation_points) == (config.data.points * 75 // 64, "farthest")  # as published
    if not parts:
        config = dataclasses.replace(config, task=dataclasses.replace(config.task, classes=4))
    else:
        config = dataclasses.replace(config, task=dataclasses.replace(config.task, part_counts=(2, 3)))
    if config.backbone is not None:
        config.task.build(config.backbone.build())  # task and backbone fit together


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pretrained") / "run"
    config = load_config(FinetuneConfig, SMOKE)
    backbone = config.backbone.build()
    geossl.models.save_backbone(backbone, folder / "export")
    return folder


def test_fine_tuning_from_a_run(pretrained: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert run("finetune", [SMOKE, *QUICK, "--weights", str(pretrained), "--train.run_folder", str(folder)]) == 0
    assert [row["step"] for row in rows(folder) if "probe/accuracy" in row] == [2, 4]
    assert {"loss", "accuracy", "grad_norm"} <= set(rows(folder)[0])
    assert (folder / "report.html").exists()
    assert load_config(FinetuneConfig, folder / "config.yaml").task.classes == 15
    whole, part = load_file(folder / "export/task.safetensors"), geossl.load(folder).state_dict()
    assert all(torch.equal(whole[f"backbone.{name}"], value) for name, value in part.items())
    assert len(json.loads((folder / "export/task.json").read_text())["classes"]) == 15
    assert run("finetune", [str(folder / "config.yaml"), "--train.steps", "5", "--resume", "auto"]) == 0
    assert rows(folder)[-1]["step"] == 5


def test_without_training_the_backbone_is_the_pretrained_one(pretrained: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    flags = [SMOKE, *QUICK, "--weights", str(pretrained), "--train.run_folder", str(folder), "--train.steps", "1"]
    assert run("finetune", [*flags, "--optim.lr", "1e-30", "--optim.warmup_lr", "0", "--optim.weight_decay", "0"]) == 0
    ours, theirs = geossl.load(folder).state_dict(), geossl.load(pretrained).state_dict()
    assert all(torch.equal(ours[name], value) for name, value in theirs.items() if "running" not in name and "num_batches" not in name)


def test_the_architecture_comes_from_the_weights_unless_named(pretrained: Path, tmp_path: Path) -> None:
    flags = ["--weights", str(pretrained), "--data.subset", "labelled", *QUICK, "--train.steps", "1"]
    assert run("finetune", [*flags, "--train.run_folder", str(tmp_path / "a")]) == 0
    assert geossl.load(tmp_path / "a").config == geossl.load(pretrained).config
    assert run("finetune", [SMOKE, *flags, "--backbone.groups", "8", "--train.run_folder", str(tmp_path / "b")]) == 0
    assert geossl.load(tmp_path / "b").config.groups == 8


def test_an_official_checkpoint_file(tmp_path: Path) -> None:
    golden = load_file(ROOT / "tests/golden/i2p_mae/point_mae_tiny.safetensors")
    state = {f"module.{name.removeprefix('state_dict.')}": value for name, value in golden.items() if name.startswith("state_dict.")}
    torch.save({"base_model": state, "epoch": 300}, tmp_path / "pretrain.pth")
    backbone = read_weights(str(tmp_path / "pretrain.pth"))
    assert torch.equal(backbone.state_dict()["norm.weight"], state["module.MAE_encoder.norm.weight"])
    flags = ["--weights", str(tmp_path / "pretrain.pth"), "--data.subset", "labelled", "--train.run_folder", str(tmp_path / "run")]
    assert run("finetune", [*QUICK, *flags, "--train.steps", "1"]) == 0


def test_accuracy_counts() -> None:
    dataset = DATASETS.config("objects").build("test")

    class Guess(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))

        def logits(self, points: Any) -> torch.Tensor:
            return torch.eye(len(dataset.classes))[torch.full((len(points),), 3)]

    share = float((dataset.labels == 3).mean())
    scores = evaluate_classification(Guess(), dataset, batch_size=50)
    assert scores["accuracy"] == pytest.approx(share)
    assert scores["class_accuracy"] == pytest.approx(1 / len(set(dataset.labels.tolist())))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--weights", "absent"], "absent: no such folder"),
        (["--weights", "absent.pth"], "absent.pth: no such file"),
        (["--data.subset", "all"], "have no class; use --data.subset labelled"),
        (["--task.classes", "7"], "task.classes is 7, but data set objects has 15"),
        (["--task.name", "clasification"], "did you mean 'classification'"),
        (["--evaluate_every", "0"], "evaluate_every must be at least 1"),
        (["--optim.layer_decay", "2"], "optim.layer_decay must lie in (0, 1]"),
        (
            ["--train.batch_size", "4", "--train.accumulate", "4"],
            "train.batch_size: task classification normalises over the clouds of each",
        ),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(
    arguments: list[str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run("finetune", [SMOKE, *QUICK, *arguments]) == 2
    printed = capsys.readouterr()
    assert words in printed.err
    assert len([line for line in printed.err.splitlines() if not line.startswith("warning: ")]) == 1
    assert not list(tmp_path.iterdir())


def test_weights_of_another_model(pretrained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--weights", str(pretrained), "--backbone.dim", "96", "--train.run_folder", str(tmp_path / "run")]
    assert run("finetune", [SMOKE, *QUICK, *flags]) == 2
    err = capsys.readouterr().err
    assert "does not fit PointViT" in err
    assert "other shape" in err


def test_neither_weights_nor_a_backbone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("finetune", ["--data.subset", "labelled", "--train.run_folder", str(tmp_path / "run")]) == 2
    assert "give --weights" in capsys.readouterr().err


def test_a_hierarchical_encoder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From a pretraining run with its own radius: the classifier's configuration decides, all weights of the encoder are loaded."""
    path = ROOT / "configs/finetune/point_m2ae_smoke.yaml"
    config = load_config(FinetuneConfig, path)
    backbone = dataclasses.replace(config.backbone, local_radius=(0.0, 0.0, 0.0)).build()
    geossl.models.save_backbone(backbone, tmp_path / "pretrained")
    flags = [str(path), *QUICK, "--train.run_folder", str(tmp_path / "run")]
    assert run("finetune", [*flags, "--weights", str(tmp_path / "pretrained")]) == 0
    assert f"weights: all {len(backbone.state_dict())} tensors of the encoder (PointM2AEEncoder) are from" in capsys.readouterr().err
    task = load_task(tmp_path / "run")
    assert task.backbone.config.local_radius == (0.32, 0.64, 1.28)
    assert len(task.classes) == 15
    points = torch.rand(2, 64, 3)
    whole = load_file(tmp_path / "run/export/task.safetensors")
    assert torch.equal(task.state_dict()["head.8.weight"], whole["head.8.weight"])
    assert task.logits(points).shape == (2, 15)


def test_a_task_that_is_none(pretrained: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"holds no task\.json, nor does its export"):
        load_task(pretrained)
    folder = geossl.models.save_backbone(geossl.load(pretrained), tmp_path / "folder")
    (folder / "task.json").write_text('{"task": {"name": "clasification"}, "classes": []}')
    with pytest.raises(CheckpointError, match=r"task\.json is not a task geossl wrote: .*did you mean 'classification'"):
        load_task(folder)


PARTS = str(ROOT / "configs/finetune/part_segmentation_smoke.yaml")


@pytest.mark.parametrize("backbone", ["point_vit", "point_m2ae"])
def test_part_segmentation(backbone: str, shapenet_part_root: Path, tmp_path: Path) -> None:
    folder, flags = tmp_path / "run", [*QUICK, "--train.batch_size", "4", "--data.root", str(shapenet_part_root), "--train.steps", "3"]
    if backbone == "point_m2ae":
        flags += ["--backbone.name", "point_m2ae_tiny", "--backbone.groups", "32", "16", "8"]
    assert run("finetune", [PARTS, *flags, "--train.run_folder", str(folder)]) == 0
    probed = [row for row in rows(folder) if "probe/instance_miou" in row]
    assert {"probe/class_miou", "probe/accuracy", "probe/iou_bag", "probe/iou_table"} <= set(probed[-1])
    assert "Instance mIoU on the test part" in (folder / "report.html").read_text()
    task = load_task(folder)
    assert task.config.part_counts[1] == 2
    test = load_config(FinetuneConfig, folder / "config.yaml").data.build("test")
    assert evaluate_part_segmentation(task, test).instance_miou == pytest.approx(probed[-1]["probe/instance_miou"])


FEW_SHOT = str(ROOT / "configs/finetune/few_shot_smoke.yaml")
QUICK_FEW = [*QUICK, "--train.steps", "2", "--few_shot.test_per_class", "3", "--few_shot.way", "3"]


def test_few_shot_episodes(pretrained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "episodes"
    flags = [FEW_SHOT, *QUICK_FEW, "--weights", str(pretrained), "--train.run_folder", str(folder)]
    assert run("finetune", flags) == 0
    summary = json.loads((folder / "few_shot.json").read_text())
    last = [[row["probe/accuracy"] for row in rows(folder / f"fold_0{fold}") if "probe/accuracy" in row][-1] for fold in (0, 1)]
    assert summary["folds_accuracy"] == last
    assert summary["mean"] == pytest.approx(sum(last) / 2)
    assert summary["std"] == pytest.approx(abs(last[0] - last[1]) / 2**0.5)
    assert "selected on its test part" in summary["best_on_test"]["about"]
    assert load_task(folder / "fold_01").config.classes == 3
    assert "3-way 5-shot on objects" in capsys.readouterr().out
    assert run("finetune", flags) == 2
    assert "is not empty; --resume auto continues it" in capsys.readouterr().err
    before = (folder / "fold_00/metrics.jsonl").stat().st_mtime_ns
    assert run("finetune", [*flags, "--resume", "auto", "--few_shot.folds", "3"]) == 0
    assert (folder / "fold_00/metrics.jsonl").stat().st_mtime_ns == before
    assert json.loads((folder / "few_shot.json").read_text())["folds_accuracy"][:2] == last
    capsys.readouterr()
    for other in (["--few_shot.way", "4"], ["--optim.lr", "1e-2"], ["--few_shot.classifier", "linear"]):
        assert run("finetune", [*flags, "--resume", "auto", *other]) == 2
        error = capsys.readouterr().err
        assert "fold_00 was run with other settings" in error
        assert other[0].removeprefix("--") in error
    for bad in (["--weights", "absent"], ["--few_shot.way", "14", "--few_shot.shot", "50"]):
        assert run("finetune", [*flags, "--train.overwrite", *bad]) == 2
    assert json.loads((folder / "few_shot.json").read_text())["way"] == 3

    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("geossl.cli.finetune.train", interrupted)
    with contextlib.suppress(KeyboardInterrupt):
        run("finetune", [*flags, "--train.overwrite", "--optim.lr", "1e-2"])
    assert not [*folder.rglob("score.json"), *folder.rglob("config.yaml"), *folder.glob("few_shot.json")]  # nothing to be continued with


def test_the_settings_of_a_fold_name_its_episode(tmp_path: Path) -> None:
    """So that ``geossl evaluate task`` scores a fold on its own test part."""
    rng = np.random.default_rng(0)
    (tmp_path / "data/2way_4shot").mkdir(parents=True)
    for fold in (0, 1):
        parts = {
            part: [(rng.normal(size=(80, 3)).astype(np.float32), label) for label in (5, 9) for _ in range(4)] for part in ("train", "test")
        }
        (tmp_path / f"data/2way_4shot/{fold}.pkl").write_bytes(pickle.dumps(parts))
    flags = [FEW_SHOT, *QUICK_FEW, "--data.name", "modelnet40_few_shot", "--data.root", str(tmp_path / "data"), "--data.points", "64"]
    flags += ["--few_shot.way", "2", "--few_shot.shot", "4", "--train.run_folder", str(tmp_path / "run")]
    assert run("finetune", flags) == 0
    for fold in (0, 1):
        data = load_config(FinetuneConfig, tmp_path / f"run/fold_0{fold}/config.yaml").data
        assert (data.way, data.shot, data.fold) == (2, 4, fold)
        assert run("evaluate", ["task", str(tmp_path / f"run/fold_0{fold}")]) == 0
        scores = json.loads((tmp_path / f"run/fold_0{fold}/evaluation_classification_modelnet40_few_shot.json").read_text())["scores"]
        assert scores["accuracy"] == json.loads((tmp_path / "run/few_shot.json").read_text())["folds_accuracy"][fold]


def test_a_probe_takes_the_named_encoder(pretrained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = [FEW_SHOT, *QUICK_FEW, "--weights", str(pretrained), "--few_shot.classifier", "linear", "--train.run_folder", str(tmp_path)]
    assert run("finetune", [*flags, "--backbone.dim", "24"]) == 2
    assert "does not fit" in capsys.readouterr().err


@pytest.mark.parametrize("classifier", ["linear", "svm"])
def test_few_shot_by_a_probe(classifier: str, pretrained: Path, tmp_path: Path) -> None:
    flags = [FEW_SHOT, *QUICK_FEW, "--weights", str(pretrained), "--train.run_folder", str(tmp_path / "run")]
    assert run("finetune", [*flags, "--few_shot.classifier", classifier]) == 0
    summary = json.loads((tmp_path / "run/few_shot.json").read_text())
    assert len(summary["folds_accuracy"]) == 2
    assert "best_on_test" not in summary
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["few_shot.json"]


def test_published_episodes(pretrained: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    (tmp_path / "data/2way_4shot").mkdir(parents=True)
    for fold in (0, 1):
        part = [
            (rng.normal(size=(80, 3)).astype(np.float32) * (1, 1, 0.02 if label == 5 else 1), label) for label in (5, 9) for _ in range(8)
        ]
        (tmp_path / f"data/2way_4shot/{fold}.pkl").write_bytes(pickle.dumps({"train": part, "test": part}))
    flags = [
        str(ROOT / "configs/finetune/modelnet40_few_shot_point_mae.yaml"),
        "--data.root",
        str(tmp_path / "data"),
        "--data.points",
        "64",
    ]
    flags += ["--few_shot.way", "2", "--few_shot.shot", "4", "--few_shot.folds", "2", "--few_shot.classifier", "linear"]
    flags += ["--backbone.dim", "48", "--backbone.depth", "2", "--backbone.heads", "3", "--backbone.embed_widths", "16", "32", "64"]
    flags += ["--backbone.groups", "16", "--backbone.group_size", "16", "--data.pool", "75"]
    assert run("finetune", [*flags, "--weights", str(pretrained), "--train.run_folder", str(tmp_path / "run")]) == 0
    summary = json.loads((tmp_path / "run/few_shot.json").read_text())
    assert (summary["way"], summary["shot"], len(summary["folds_accuracy"])) == (2, 4, 2)
    assert min(summary["folds_accuracy"]) > 0.7  # trained and tested on the same shapes, balls and discs


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([FEW_SHOT, "--few_shot.way", "1"], "few_shot.way must be at least 2, or 0 for no episodes, got 1"),
        ([FEW_SHOT, "--few_shot.shot", "50"], "lower way, shot or test_per_class"),
        ([FEW_SHOT, "--resume", "runs/other"], "resume: few_shot continues its own folds, with auto, got 'runs/other'"),
        ([FEW_SHOT, "--labelled_samples", "5"], "labelled_samples must be 0 with few_shot, got 5"),
        ([FEW_SHOT, "--task.name", "part_segmentation"], "few_shot: needs task classification, got part_segmentation"),
        ([SMOKE, "--task.name", "part_segmentation"], "the points of objects have no classes, which task part_segmentation needs; choose"),
        ([PARTS, "--data.root", "nowhere"], "nowhere: this folder does not exist"),
        ([PARTS, "--data.categories", "tabel"], "data: unknown category 'tabel'; did you mean 'table'"),
    ],
)
def test_bad_input_of_episodes_and_parts(
    arguments: list[str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run("finetune", arguments) == 2
    assert words in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


EVENTS = str(ROOT / "configs/finetune/polar_mae_segmentation_smoke.yaml")
QUICK_EVENTS = ["--train.steps", "3", "--train.batch_size", "2", "--train.log_every", "1", "--evaluate_every", "2", "--train.device", "cpu"]
QUICK_EVENTS += ["--backbone.dim", "24", "--backbone.embed_widths", "8", "16", "16", "--data.events", "6", "--data.val_events", "3"]
QUICK_EVENTS += ["--labelled_samples", "4"]


def test_segmentation_of_few_labelled_events(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert run("finetune", [EVENTS, *QUICK_EVENTS, "--train.run_folder", str(folder), "--evaluate_samples", "2"]) == 0
    probed = [row for row in rows(folder) if "probe/macro_f1" in row]
    assert [row["step"] for row in probed] == [2, 3]
    assert {"probe/accuracy", "probe/mean_iou", "probe/f1_track", "probe/iou_shower"} <= set(probed[-1])
    config = load_config(FinetuneConfig, folder / "config.yaml")
    assert config.task.classes == 4
    assert len(config.task.class_weights) == 4
    assert config.task.class_weights[2] > config.task.class_weights[1] > 1
    scores = json.loads((folder / "report/segmentation.json").read_text())
    assert scores["micro"]["accuracy"] == pytest.approx(probed[-1]["probe/accuracy"])
    test = config.data.build("test")
    assert scores["points"] == sum(len(test.get(row).points) for row in (0, 1))
    assert 'id="segmentation"' in (folder / "report.html").read_text()
    whole = load_file(folder / "export/task.safetensors")
    assert torch.equal(whole["class_weights"], torch.tensor(config.task.class_weights))


def test_few_labels_are_the_same_whatever_the_training_seed() -> None:
    config = load_config(FinetuneConfig, EVENTS, QUICK_EVENTS)
    chosen = [labelled_part(load_config(FinetuneConfig, EVENTS, [*QUICK_EVENTS, *more])).rows for more in ([], ["--train.seed", "7"])]
    assert chosen[0].tolist() == chosen[1].tolist()
    assert len(labelled_part(config)) == 4
    counts = count_points(labelled_part(config))
    assert counts.sum() == sum(len(config.data.build("train").get(int(row)).points) for row in chosen[0])


def test_an_official_checkpoint_of_polar_mae(tmp_path: Path) -> None:
    golden = load_file(ROOT / "tests/golden/polar_mae/dev1_polarmae_pretrain.safetensors")
    state = {k.removeprefix("state."): v.float() for k, v in golden.items() if k.startswith("state.")}
    state |= {k.removeprefix("state_x16."): v.float() / 16 for k, v in golden.items() if k.startswith("state_x16.")}
    torch.save({"state_dict": state, "global_step": 500000}, tmp_path / "polarmae.ckpt")
    # The weights cannot tell the number of heads: the released one does not divide the width of this small model.
    assert find_system(tmp_path / "polarmae.ckpt") == "polar_mae"
    torch.save({"state_dict": {"something.weight": torch.zeros(2)}}, tmp_path / "other.ckpt")
    with pytest.raises(CheckpointError, match="of none of the systems point_mae, point_m2ae, i2p_mae, polar_mae, croco; its weights are"):
        find_system(tmp_path / "other.ckpt")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--data.name", "objects"], "the points of objects have no classes, which task segmentation needs; choose lartpc"),
        (["--labelled_samples", "7"], "labelled_samples: 7 were asked for, but lartpc has 6"),
        (["--labelled_samples", "-1"], "labelled_samples must not be negative"),
        (["--task.layers", "5"], "layers: block 5 does not exist; the backbone has 2"),
        (["--task.classes", "5"], "task.classes is 5, but data set lartpc has 4"),
    ],
)
def test_bad_input_of_a_segmentation(
    arguments: list[str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    flags = [flag for flag in QUICK_EVENTS if "objects" not in arguments or not flag.startswith("--data.")]
    if "objects" in arguments:
        flags = ["--labelled_samples", "0"]
    assert run("finetune", [EVENTS, *flags, *arguments]) == 2
    assert words in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
