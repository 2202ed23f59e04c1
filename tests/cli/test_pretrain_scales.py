"""Point-M2AE through the program: it learns, leaves a usable encoder, features of every scale, and continues to the same weights."""

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
SMOKE = str(ROOT / "configs/point_m2ae/smoke.yaml")
QUICK = ["--train.steps", "6", "--train.log_every", "1", "--train.save_every", "3", "--train.keep", "9", "--probe.every", "0"]
DROPS = ["--backbone.drop_path", "0.3", "--backbone.local_radius", "0.3", "0.6", "1.2"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scales") / "run"
    assert run("pretrain", [SMOKE, *QUICK, *DROPS, "--train.run_folder", str(folder)]) == 0
    return folder


def test_a_run_leaves_everything_behind(finished: Path) -> None:
    losses = [row["loss"] for row in map(json.loads, (finished / "metrics.jsonl").read_text().splitlines()) if "loss" in row]
    assert losses[-1] < losses[0]
    assert (finished / "report.html").exists()
    backbone = geossl.load(finished)
    assert "64, 32, 16 tokens of 12, 24, 48 channels" in (finished / "export/README.md").read_text()
    points = torch.rand(90, 3)
    assert geossl.extract_features(backbone, points).feats.shape == (90, 48)
    assert geossl.extract_features(backbone, points, layers=[0, 1, 2]).feats.shape == (90, 12 + 24 + 48)


def test_a_continued_run_has_the_weights_of_one_never_stopped(finished: Path, tmp_path: Path) -> None:
    """Masks and drop path included."""
    folder = tmp_path / "again"
    shutil.copytree(finished, folder)
    last = max((folder / "checkpoints").glob("step_*"))
    expected = load_file(last / "model.safetensors")
    shutil.rmtree(last)
    assert run("pretrain", [SMOKE, *QUICK, *DROPS, "--train.run_folder", str(folder), "--resume", "auto"]) == 0
    again = load_file(last / "model.safetensors")
    assert set(again) == set(expected)
    assert all(torch.equal(again[key], expected[key]) for key in expected)
