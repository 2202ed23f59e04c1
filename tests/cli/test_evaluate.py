from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import geossl
from geossl.cli import evaluate, run
from geossl.config import load_config
from geossl.data import DATASETS
from geossl.errors import ConfigError, DataError
from geossl.models import save_backbone

ROOT = Path(__file__).parents[2]
TINY = {"dim": 12, "depth": 2, "heads": 2, "groups": 4, "group_size": 4}


@pytest.fixture
def export(tmp_path):
    """The export of a run: a small encoder with a configuration beside it that names the data it was trained on."""
    torch.manual_seed(0)
    folder = tmp_path / "run"
    save_backbone(geossl.create_backbone("point_vit_tiny", **TINY), folder / "export")
    (folder / "config.yaml").write_text("data: {name: objects, points: 64, columns: xyz, augment: {shift: 0.1}}\nextra: {x: 1}\n")
    return folder


def test_a_run_is_probed_on_its_own_data_with_every_baseline(export, tmp_path, capsys):
    out = tmp_path / "scores.json"
    assert evaluate.main([str(export), "--resplits", "2", "--probes", "knn", "svm", "--out", str(out), "--per-class", "--confusion"]) == 0
    summary = json.loads(out.read_text())
    assert summary["points"] == 64
    assert summary["backbone"] == "point_vit_tiny"
    assert list(summary["baselines"]) == ["majority", "shape_histogram", "random_uncalibrated", "random"]
    assert [score["probe"] for score in summary["scores"]] == ["knn", "svm"]
    assert all(len(score["resplits"]) == 2 for score in summary["scores"])
    # Its weights are those of a random encoder, so the verdict says it does not beat one that was calibrated.
    assert summary["verdict"]["lead"] < 0.1
    printed = capsys.readouterr().out
    for name in (*summary["baselines"], "encoder", "Recall of each class", "Confusion", "the calibrated", str(out)):
        assert name in printed


def test_a_2d_teacher_stands_beside(export, tmp_path, capsys):
    out = tmp_path / "scores.json"
    args = ["--resplits", "1", "--probes", "svm", "--with_teacher", "--teacher.name", "random", "--out", str(out)]
    assert evaluate.main([str(export), *args]) == 0
    summary = json.loads(out.read_text())
    assert list(summary["baselines"])[-1] == "teacher"
    assert 0.1 < summary["baselines"]["teacher"][0]["mean"] < 0.9
    assert "no 3D network" in capsys.readouterr().out


def test_flags_win_over_the_run(export, tmp_path, monkeypatch):
    seen = {}
    monkeypatch.setattr(evaluate, "evaluate", lambda name, backbone, config: seen.update(config=config) or {})
    monkeypatch.setattr(evaluate, "show", lambda summary, config: None)
    assert evaluate.main([str(export / "export"), "--data.points", "32", "--out", str(tmp_path / "a.json")]) == 0
    assert seen["config"].data.points == 32
    assert evaluate.main([str(export), "--data.name", "objects", "--out", str(tmp_path / "a.json")]) == 0
    assert seen["config"].data.points == 1024
    checkpoint = export / "checkpoints/step_00000003"
    save_backbone(geossl.create_backbone("point_vit_tiny", **TINY), checkpoint)
    (checkpoint / "manifest.json").write_text("{}")
    assert evaluate.data_of_run(checkpoint) == evaluate.data_of_run(export) == evaluate.data_of_run(export / "export") != []
    (tmp_path / "mine.yaml").write_text("resplits: 7\nlayers: [0, 1]\n")
    assert evaluate.main([str(export), str(tmp_path / "mine.yaml"), "--out", str(tmp_path / "a.json")]) == 0
    assert (seen["config"].resplits, seen["config"].layers) == (7, (0, 1))


@pytest.mark.parametrize("path", sorted((ROOT / "configs/evaluate").glob("*.yaml")), ids=lambda path: path.stem)
def test_configurations_are_valid(path):
    config = load_config(evaluate.EvaluateConfig, path)
    if "svm" in path.stem:
        assert config.pooling == ("max" if "i2p_mae" in path.stem else "mean_plus_max")
        assert "svm_published" in config.probes


def test_a_probe_before_the_model(export, tmp_path, capsys):
    out = tmp_path / "scores.json"
    flags = ["--resplits", "1", "--pooling", "mean_plus_max", "--published_c", "0.012", "--out", str(out)]
    assert evaluate.main(["svm", str(export), *flags]) == 0
    summary = json.loads(out.read_text())
    assert [score["probe"] for score in summary["scores"]] == ["svm", "svm_cv", "svm_published"]
    assert (summary["pooling"], summary["protocol"]["published_c"]) == ("mean_plus_max", 0.012)
    assert "chose it by looking at the test part" in " ".join(capsys.readouterr().out.split())


def test_an_official_file_is_probed(tmp_path, capsys):
    golden = load_file(ROOT / "tests/golden/i2p_mae/point_mae_tiny.safetensors")
    state = {name.removeprefix("state_dict."): value for name, value in golden.items() if name.startswith("state_dict.")}
    torch.save({"base_model": state}, tmp_path / "pretrain.pth")
    args = ["knn", str(tmp_path / "pretrain.pth"), "--data.points", "64", "--resplits", "1", "--out", str(tmp_path / "a.json")]
    assert evaluate.main(args) == 0
    assert json.loads((tmp_path / "a.json").read_text())["scores"][0]["probe"] == "knn"


def test_columns_follow_the_backbone():
    objects = DATASETS.config("objects")
    assert evaluate.fitting_columns(objects, 3).columns == "xyz"
    assert evaluate.fitting_columns(objects, 9).columns == "all"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "name a model first"),
        (["svm"], "name a model first"),
        (["svm", "point_vit_tiny", "--probes", "knn"], "probes: evaluate svm stands for --probes svm svm_cv svm_published; leave out one"),
        (["no_such.pth"], "no_such.pth: no such file"),
        (["point_vit_tiny", "--with_teacher", "--teacher.weights", "none.pth"], "none.pth"),
        (["point_vit_tiny", "--published_c", "0"], "published_c must be > 0, got 0"),
        (["point_vit_tiny", "--data.name", "object"], "did you mean 'objects'"),
        (["point_vit_tiny", "--resplit", "3"], "resplits"),
        (["point_vit_tiny", "--resplits", "0"], "resplits must be at least 1, got 0"),
        (["no/such/run"], "no/such/run"),
        (["point_vit_tyni"], "point_vit_tyni"),
    ],
)
def test_mistakes_end_in_one_line(args, message, capsys):
    assert run("evaluate", args) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("geossl evaluate: error:")
    assert message in error


def test_six_columns_need_a_word(tmp_path, capsys):
    save_backbone(geossl.create_backbone("point_vit_tiny", in_channels=6, **TINY), tmp_path / "export")
    assert run("evaluate", [str(tmp_path / "export")]) == 2
    assert "say which with --data.columns" in capsys.readouterr().err


def test_a_folder_that_cannot_be_written_is_named(export, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    args = [str(export), "--resplits", "1", "--probes", "knn", "--out", str(tmp_path / "file" / "x.json")]
    assert run("evaluate", args) == 2
    assert "x.json" in capsys.readouterr().err


@pytest.fixture
def events_export(tmp_path):
    """The export of a run on events."""
    torch.manual_seed(0)
    folder = tmp_path / "events_run"
    tiny = {"dim": 24, "depth": 2, "heads": 2, "embed_widths": (8, 16, 16)}
    save_backbone(geossl.create_backbone("point_vit_volume_tiny", **tiny), folder / "export")
    (folder / "config.yaml").write_text("data: {name: lartpc, events: 6, val_events: 3, seed: 2, remove_led: true}\n")
    return folder


def test_tokens_of_events_are_probed_with_every_baseline(events_export, tmp_path, capsys):
    out = tmp_path / "scores.json"
    assert evaluate.main([str(events_export), "--tokens", "300", "--instances", "--out", str(out)]) == 0
    summary = json.loads(out.read_text())
    assert (summary["data"], summary["architecture"]) == ("lartpc", "point_vit_volume_tiny")
    assert list(summary["baselines"]) == ["always", "hand_made", "random_uncalibrated", "random"]
    assert summary["classes"] == ["shower", "track", "michel", "delta"]
    assert summary["verdict"]["lead"] == pytest.approx(summary["score"]["macro_f1"] - summary["baselines"]["random"]["macro_f1"])
    assert {score["what"].split(",")[0] for score in summary["instances"]} == {"position", "attention of block 1"}
    assert all(0 <= score["purity"] <= 1 and score["events"] <= 3 for score in summary["instances"])
    printed = capsys.readouterr().out
    for words in (*summary["baselines"], "encoder", "the calibrated random encoder", "Particles found by clustering", "untrained"):
        assert words in printed


def test_what_events_need_is_said(events_export, export, tmp_path):
    with pytest.raises(ConfigError, match="layers: tokens of events are probed as the last block leaves them"):
        evaluate.main([str(events_export), "--layers", "0"])
    with pytest.raises(DataError, match="the backbone takes 3 columns but events have 4"):
        evaluate.main([str(export), "--data.name", "lartpc"])
