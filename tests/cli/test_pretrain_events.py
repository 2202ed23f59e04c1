"""Pretraining on events through the program: it learns, leaves a usable encoder, and continues to the same weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import geossl
from geossl.cli import run

ROOT = Path(__file__).parents[2]
SMOKE = str(ROOT / "configs/polar_mae/smoke.yaml")
QUICK = ["--train.steps", "6", "--train.log_every", "1", "--train.save_every", "3", "--data.events", "16", "--data.val_events", "2"]
DROPS = ["--backbone.attention_dropout", "0.1", "--backbone.drop_path", "0.3"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("events") / "run"
    assert run("pretrain", [SMOKE, *QUICK, *DROPS, "--train.run_folder", str(folder), "--train.keep", "9"]) == 0
    return folder


def test_a_run_on_events_leaves_everything_behind(finished: Path) -> None:
    rows = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    losses = [row for row in rows if "loss" in row]
    assert {"loss", "chamfer", "energy", "grad_norm"} <= set(losses[0])
    assert losses[-1]["loss"] < losses[0]["loss"]
    assert (finished / "report.html").exists()
    backbone = geossl.load(finished)
    assert backbone.config.name == "point_vit_volume_tiny"
    assert "as many tokens as an event needs, balls of 5 voxels" in (finished / "export/README.md").read_text()
    assert geossl.extract_features(backbone, torch.rand(30, 4) + torch.tensor([380.0, 380, 380, 0])).feats.shape == (30, 48)


def test_a_continued_run_has_the_weights_of_one_never_stopped(finished: Path, tmp_path: Path) -> None:
    """Masks, rotations, drop path and attention dropout included."""
    folder = tmp_path / "again"
    shutil.copytree(finished, folder)
    last = max((folder / "checkpoints").glob("step_*"))
    expected = load_file(last / "model.safetensors")
    shutil.rmtree(last)
    assert run("pretrain", [SMOKE, *QUICK, *DROPS, "--train.run_folder", str(folder), "--train.keep", "9", "--resume", "auto"]) == 0
    again = load_file(last / "model.safetensors")
    assert set(again) == set(expected)
    assert all(torch.equal(again[key], expected[key]) for key in expected)
