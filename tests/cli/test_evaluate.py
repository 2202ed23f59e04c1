from __future__ import annotations

import json

import pytest
import torch

import geossl
from geossl.cli import evaluate, run
from geossl.data import DATASETS
from geossl.models import save_backbone

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


def test_flags_win_over_the_run(export, tmp_path, monkeypatch):
    seen = {}
    monkeypatch.setattr(evaluate, "evaluate", lambda name, backbone, config: seen.update(config=config) or {})
    monkeypatch.setattr(evaluate, "show", lambda summary, config: None)
    assert evaluate.main([str(export / "export"), "--data.points", "32", "--out", str(tmp_path / "a.json")]) == 0
    assert seen["config"].data.points == 32
    assert evaluate.main([str(export), "--data.name", "objects", "--out", str(tmp_path / "a.json")]) == 0
    assert seen["config"].data.points == 1024
    (tmp_path / "mine.yaml").write_text("resplits: 7\nlayers: [0, 1]\n")
    assert evaluate.main([str(export), str(tmp_path / "mine.yaml"), "--out", str(tmp_path / "a.json")]) == 0
    assert (seen["config"].resplits, seen["config"].layers) == (7, (0, 1))


def test_columns_follow_the_backbone():
    objects = DATASETS.config("objects")
    assert evaluate.fitting_columns(objects, 3).columns == "xyz"
    assert evaluate.fitting_columns(objects, 9).columns == "all"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "name a model first"),
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
