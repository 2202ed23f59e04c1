from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import geossl
from geossl.cli import run
from geossl.cli.finetune import FinetuneConfig, accuracy, count_points, labelled_part
from geossl.cli.training import read_weights
from geossl.config import load_config
from geossl.data import DATASETS
from geossl.errors import CheckpointError
from geossl.methods.reference import find_system

ROOT = Path(__file__).parents[2]
SMOKE = str(ROOT / "configs/finetune/smoke.yaml")
QUICK = ["--train.steps", "4", "--train.batch_size", "8", "--train.log_every", "1", "--train.save_every", "2", "--evaluate_every", "2"]
QUICK += ["--data.points", "64", "--train.device", "cpu"]


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("path", sorted((ROOT / "configs/finetune").glob("*.yaml")), ids=lambda path: path.stem)
def test_configurations_are_valid(path: Path) -> None:
    config = load_config(FinetuneConfig, path)
    assert config.task.name == ("segmentation" if "segmentation" in path.stem else "classification")


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
    with pytest.raises(CheckpointError, match="of none of the systems point_mae, point_m2ae, polar_mae; its weights are"):
        find_system(tmp_path / "other.ckpt")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--data.name", "objects"], "the points of objects have no classes, which task segmentation needs"),
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
