"""``geossl evaluate task``: runs and official files of fine-tuned models, with and without voting."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import geossl
from geossl.cli import run
from geossl.data import DATASETS
from geossl.evaluation import evaluate_classification
from geossl.models import save_backbone
from geossl.tasks import TASKS, load_task, save_task

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder as geossl finetune leaves it, with a model that has learnt nothing."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("task") / "run"
    backbone = geossl.create_backbone("point_vit_tiny", dim=12, depth=1, heads=2, groups=4, group_size=4)
    module = dataclasses.replace(TASKS.config("classification"), classes=15, hidden=8).build(backbone)
    save_backbone(module.backbone, folder / "export")
    save_task(module, DATASETS.config("objects").build("test").classes, folder / "export")
    (folder / "config.yaml").write_text("data: {name: objects, points: 48, subset: labelled, evaluation_points: farthest}\n")
    return folder


def test_a_run_is_scored_on_its_own_data(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("evaluate", ["task", str(trained), "--votes", "2", "--repetitions", "3", "--pool", "64"]) == 0
    summary = json.loads((trained / "evaluation_classification_objects.json").read_text())
    test = DATASETS.config("objects")
    test.points, test.evaluation_points = 48, "farthest"
    assert summary["scores"] == pytest.approx(evaluate_classification(load_task(trained), test.build("test")))
    assert (summary["points"], summary["voting"]["votes"], len(summary["voting"]["accuracies"])) == (48, 2, 3)
    assert summary["voting"]["mean"] == pytest.approx(np.mean(summary["voting"]["accuracies"]))
    printed = " ".join(capsys.readouterr().out.split())
    assert "accuracy by 2 votes, 3 repetitions" in printed
    assert "the best of them, selected on the test part as published" in printed


def test_an_official_classifier(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Point-MAE's classifier of five classes on clouds of five classes, its groups told by its configuration file."""
    golden = load_file(ROOT / "tests/golden/i2p_mae/point_mae_tiny.safetensors")
    state = {k.removeprefix("state_dict.MAE_encoder."): v for k, v in golden.items() if k.startswith("state_dict.MAE_encoder.")}
    state |= {k.removeprefix("finetune.state_dict."): v for k, v in golden.items() if k.startswith("finetune.state_dict.")}
    for layer in (1, 5):
        state.setdefault(f"cls_head_finetune.{layer}.num_batches_tracked", torch.tensor(0))
    torch.save({"base_model": {f"module.{key}": value for key, value in state.items()}}, tmp_path / "modelnet.pth")
    (tmp_path / "published.yaml").write_text("model: {num_group: 8, group_size: 8, num_heads: 2}\n")
    rng = np.random.default_rng(0)
    for name in "abcde":
        for split in ("train", "test"):
            (tmp_path / "data" / name / split).mkdir(parents=True)
            np.save(tmp_path / "data" / name / split / "0.npy", rng.normal(size=(64, 3)).astype(np.float32))
    flags = ["--data.name", "modelnet40", "--data.root", str(tmp_path / "data"), "--data.points", "64", "--out", str(tmp_path / "out.json")]
    published = ["--published_config", str(tmp_path / "published.yaml")]
    assert run("evaluate", ["task", str(tmp_path / "modelnet.pth"), *published]) == 2
    assert "modelnet.pth does not tell what it was trained on; give --data.name, one of" in capsys.readouterr().err
    assert run("evaluate", ["task", str(tmp_path / "modelnet.pth"), *flags, *published]) == 0
    assert set(json.loads((tmp_path / "out.json").read_text())["scores"]) == {"accuracy", "class_accuracy"}


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ([], "evaluate task: name a fine-tuned model first"),
        (["RUN", "--votes", "2", "--pool", "8"], "pool must be at least data.points (48), got 8"),
        (["RUN", "--votes", "2", "--pool", "2000"], "pool: objects has no 2000 points to choose views from, give a smaller one"),
        (["RUN", "--votes", "-1"], "votes must not be negative, got -1"),
        (["RUN", "--data.name", "lartpc", "--data.events", "2", "--data.val_events", "1"], "1 of the 1 samples of lartpc have no class"),
        (["RUN/export/model.safetensors"], "of none of the systems"),
        (["no/such"], "holds no task.json"),
    ],
)
def test_mistakes_end_in_one_line(args: list[str], words: str, trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("evaluate", ["task", *(arg.replace("RUN", str(trained)) for arg in args)]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("geossl evaluate: error:")
    assert words in error


def test_other_data_and_pretraining_files_are_refused(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "data/a/train").mkdir(parents=True)
    (tmp_path / "data/a/test").mkdir()
    for split in ("train", "test"):
        np.save(tmp_path / f"data/a/{split}/0.npy", np.random.default_rng(0).normal(size=(64, 3)).astype(np.float32))
    assert run("evaluate", ["task", str(trained), "--data.name", "modelnet40", "--data.root", str(tmp_path / "data")]) == 2
    assert "modelnet40 has 1 classes, but" in capsys.readouterr().err
    about = json.loads((trained / "export/task.json").read_text())
    (tmp_path / "other").mkdir()
    for path in (trained / "export").iterdir():
        (tmp_path / "other" / path.name).write_bytes(path.read_bytes())
    about["classes"] = about["classes"][::-1]  # as many, but others: the numbers would mean nothing
    (tmp_path / "other/task.json").write_text(json.dumps(about))
    assert run("evaluate", ["task", str(tmp_path / "other"), "--data.name", "objects", "--data.points", "48"]) == 2
    assert "objects has the classes appliance, bath_fixture, bed ..., but" in capsys.readouterr().err
    golden = load_file(ROOT / "tests/golden/i2p_mae/point_mae_tiny.safetensors")
    state = {name.removeprefix("state_dict."): value for name, value in golden.items() if name.startswith("state_dict.")}
    torch.save({"base_model": state}, tmp_path / "pretrain.pth")
    assert run("evaluate", ["task", str(tmp_path / "pretrain.pth")]) == 2
    assert "is a pretraining file of point_mae, not of a fine-tuned model; probe it with geossl evaluate MODEL" in capsys.readouterr().err
