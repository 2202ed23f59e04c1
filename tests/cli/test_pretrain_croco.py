"""Pretraining on pairs of images through the program: encoder and decoder are left for others, and every way of running gives the same."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import geossl
from geossl.cli import run
from geossl.geometry import normalize_images
from geossl.models import load_pair_backbone

ROOT = Path(__file__).parents[2]
SMOKE = str(ROOT / "configs/croco/smoke.yaml")
QUICK = ["--train.steps", "4", "--train.batch_size", "4", "--train.log_every", "1", "--train.save_every", "2", "--train.device", "cpu"]


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six pairs of small images, two of them held out."""
    from PIL import Image

    folder, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for number in range(6):
        wide = np.kron(rng.integers(0, 255, (10, 12, 3), np.uint8), np.ones((8, 8, 1), np.uint8))
        Image.fromarray(wide[:, :80]).save(folder / f"{number}_1.png")
        Image.fromarray(wide[:, 16:]).save(folder / f"{number}_2.png")
    return folder


@pytest.fixture(scope="module")
def finished(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("croco") / "run"
    config = folder.parent / "pairs.yaml"
    lines = [line for line in Path(SMOKE).read_text().splitlines() if not line.startswith("data:")]
    config.write_text("\n".join([*lines, f"data: {{name: pairs, root: {photos}, crop: 64, resize: 72, test_fraction: 0.34}}"]))
    assert run("pretrain", [str(config), *QUICK, "--train.run_folder", str(folder), "--train.keep", "9"]) == 0
    return folder


def test_a_run_on_pairs_leaves_everything_behind(finished: Path) -> None:
    rows = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert len([row for row in rows if np.isfinite(row["loss"])]) == 4
    pair = load_pair_backbone(finished)
    backbone = geossl.load(finished)
    images = normalize_images(torch.rand(1, 3, 64, 96))
    with torch.no_grad():
        assert backbone(images).shape == (1, 48, 4, 6)
        assert torch.equal(pair.backbone(images), backbone(images))
        assert [features.shape[1] for features in pair(images, images)] == [48] * 4
    trained = load_file(max((finished / "checkpoints").glob("step_*")) / "model.safetensors")
    assert torch.equal(pair.decoder.embed.weight, trained["decoder.embed.weight"])
    card = (finished / "export/README.md").read_text()
    assert "load_pair_backbone" in card
    assert "4 steps of 4 pairs" in card


def test_the_report_shows_completions(finished: Path) -> None:
    arrays = np.load(finished / "report/images.npz")
    assert arrays["titles"].tolist() == ["image", "masked", "reference", "completion", "error", "features", "matches"]
    assert len(arrays["names"]) == 2  # the test part
    assert arrays["completion_1"].shape == (64, 64, 3)
    page = (finished / "report.html").read_text()
    shown = json.loads(page.split('id="data">')[1].split("</script>")[0])["images"]
    assert [cell["title"] for cell in shown[0]["cells"]] == arrays["titles"].tolist()
    assert shown[1]["cells"][4]["src"].startswith("data:image/jpeg;base64,")


def test_a_continued_run_has_the_weights_of_one_never_stopped(finished: Path, tmp_path: Path) -> None:
    folder = tmp_path / "again"
    shutil.copytree(finished, folder)
    last = max((folder / "checkpoints").glob("step_*"))
    expected = load_file(last / "model.safetensors")
    shutil.rmtree(last)
    config = str(finished.parent / "pairs.yaml")
    assert run("pretrain", [config, *QUICK, "--train.run_folder", str(folder), "--train.keep", "9", "--resume", "auto"]) == 0
    again = load_file(last / "model.safetensors")
    assert all(torch.equal(again[key], expected[key]) for key in expected)


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_processes_train_as_one(finished: Path, tmp_path: Path, parallel: str) -> None:
    flags = ["--train.parallel", parallel, "--train.run_folder", str(tmp_path / "run"), "--train.grad_checkpointing"]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(ROOT / "tools/pretrain.py")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [*launcher, str(finished.parent / "pairs.yaml"), *QUICK, "--train.accumulate", "2", *flags]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found, expected = (
        load_file(max((folder / "checkpoints").glob("step_*")) / "model.safetensors") for folder in (tmp_path / "run", finished)
    )
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--backbone.name", "point_vit_tiny"], "backbone point_vit_tiny takes points, but data set pairs gives images"),
        (["--probe.data.name", "objects"], "probe.data: encoders of images are not probed; leave it out"),
        (["--method.name", "point_mae"], "point_mae needs a point_vit_"),
    ],
)
def test_what_does_not_go_together_is_told(finished: Path, tmp_path: Path, arguments: list[str], words: str, capsys) -> None:
    config = str(finished.parent / "pairs.yaml")
    code = run("pretrain", [config, *QUICK, "--train.run_folder", str(tmp_path / "run"), *arguments])
    assert code == 2
    assert words in capsys.readouterr().err


def test_images_are_told_from_points_the_other_way_round(tmp_path: Path, capsys) -> None:
    code = run("pretrain", ["--backbone.name", "croco_vit_tiny", "--train.run_folder", str(tmp_path / "run")])
    assert code == 2
    assert "backbone croco_vit_tiny takes images, but data set objects gives points" in capsys.readouterr().err
