from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import geossl
from geossl.cli import run
from geossl.cli.finetune import FinetuneConfig, accuracy, read_weights
from geossl.config import load_config
from geossl.data import DATASETS

ROOT = Path(__file__).parents[2]
SMOKE = str(ROOT / "configs/finetune/smoke.yaml")
QUICK = ["--train.steps", "4", "--train.batch_size", "8", "--train.log_every", "1", "--train.save_every", "2", "--evaluate_every", "2"]
QUICK += ["--data.points", "64", "--train.device", "cpu"]


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("path", sorted((ROOT / "configs/finetune").glob("*.yaml")), ids=lambda path: path.stem)
def test_configurations_are_valid(path: Path) -> None:
    config = load_config(FinetuneConfig, path)
    assert config.task.name == "classification"


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
    scores = accuracy(Guess(), dataset, 50)
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
