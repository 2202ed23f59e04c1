"""Fine-tuning of tasks on images, and what is done with the result, through the programs."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import geossl
from geossl.cli import run
from geossl.cli.finetune import FinetuneConfig
from geossl.config import load_config, to_yaml
from geossl.data import MixtureConfig
from geossl.models import CroCoPair, load_pair_backbone, save_pair_backbone
from geossl.tasks import load_task

ROOT = Path(__file__).parents[2]
SCORES = {"stereo": "L1err", "flow": "EPE", "depth": "delta1", "normals": "mean_angle", "pose": "median_rotation"}
QUICK = ["--train.steps", "4", "--train.batch_size", "2", "--train.log_every", "1", "--train.save_every", "2", "--evaluate_every", "2"]
QUICK += ["--data.rooms", "1", "--data.test_rooms", "1", "--data.pairs_per_room", "2", "--train.device", "cpu"]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return ["--data.cache", str(tmp_path_factory.mktemp("rooms"))]


def smoke(kind: str) -> str:
    return str(ROOT / f"configs/finetune/croco_{kind}_smoke.yaml")


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def stereo_run(cache: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stereo") / "run"
    assert run("finetune", [smoke("stereo"), *QUICK, *cache, "--train.run_folder", str(folder)]) == 0
    return folder


@pytest.mark.parametrize("kind", ["flow", "depth", "normals", "pose"])
def test_every_task_leaves_a_run_that_loads(kind: str, cache: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert run("finetune", [smoke(kind), *QUICK, *cache, "--train.run_folder", str(folder)]) == 0
    name = f"probe/{SCORES[kind]}"
    assert [row["step"] for row in rows(folder) if name in row] == [2, 4]
    best = json.loads((folder / "checkpoints/best.json").read_text())
    values = [row[name] for row in rows(folder) if name in row]
    assert best["value"] == pytest.approx(max(values) if kind == "depth" else min(values), rel=1e-5)
    assert (folder / "report.html").exists()
    module: Any = load_task(folder)
    assert (load_pair_backbone(folder).decoder.config == module.config.decoder) if kind in ("flow", "pose") else True
    if kind == "pose":
        assert run("evaluate", ["dense", str(folder)]) == 0
        found = json.loads((folder / "evaluation_relative_pose_room_pairs.json").read_text())
        assert found["scores"]["median_rotation"] == pytest.approx(values[-1], rel=1e-4)
        assert run("evaluate", ["dense", str(folder), "--left", "x.png"]) == 2
        assert run("evaluate", ["task", str(folder)]) == 2


def test_data_without_a_test_part_trains_without_scores(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("left", "right"):
        Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(tmp_path / f"{name}.png")
    np.save(tmp_path / "truth.npy", np.full((64, 64), 3.0))
    (tmp_path / "list.txt").write_text("left.png right.png truth.npy\n" * 2)
    data = ["--data.name", "stereo", "--data.layout", "list", "--data.root", str(tmp_path / "list.txt"), "--data.crop", "64", "64"]
    quick = [*QUICK[: QUICK.index("--data.rooms")], "--train.device", "cpu"]
    assert run("finetune", [smoke("stereo"), *quick, *data, "--train.run_folder", str(tmp_path / "run")]) == 0
    assert "stereo has no test part: the model is not scored" in capsys.readouterr().err
    assert (tmp_path / "run/export/task.json").exists()
    assert (tmp_path / "run/report.html").exists()
    assert not any("probe/L1err" in row for row in rows(tmp_path / "run"))
    assert run("evaluate", ["dense", str(tmp_path / "run")]) == 2
    assert "has no test part to score" in capsys.readouterr().err


def test_a_mixture_of_data_sets_trains_and_goes_on(cache: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = load_config(FinetuneConfig, smoke("stereo"))
    small = dataclasses.replace(config.data, rooms=1, test_rooms=1, pairs_per_room=2, cache=Path(cache[1]))
    path = tmp_path / "mixture.yaml"
    data = MixtureConfig(parts=(small, dataclasses.replace(small, rooms=2)), times=(2, 1))
    path.write_text(to_yaml(dataclasses.replace(config, data=data)))
    quick = [*QUICK[: QUICK.index("--data.rooms")], "--train.device", "cpu", "--train.run_folder", str(tmp_path / "run")]
    assert run("finetune", [str(path), *quick]) == 0
    assert [row["step"] for row in rows(tmp_path / "run") if "probe/L1err" in row] == [2, 4]
    capsys.readouterr()
    assert run("finetune", [str(path), *quick, "--resume", "auto"]) == 0
    assert "settings changed" not in capsys.readouterr().err
    assert run("evaluate", ["dense", str(tmp_path / "run")]) == 2
    assert "what it was trained on, or a mixture; give --left, --data.name with its settings, or a file" in capsys.readouterr().err
    (tmp_path / "data.yaml").write_text("data:\n" + textwrap.indent(to_yaml(data), "  "))
    assert run("evaluate", ["dense", str(tmp_path / "run"), str(tmp_path / "data.yaml")]) == 0
    assert json.loads((tmp_path / "run/evaluation_stereo_mixture.json").read_text())["samples"] == 4
    path.write_text("data: {name: mixture, parts: [{name: stereo, layout: list, root: nothing.txt}]}\ntask: {name: stereo}\n")
    assert run("finetune", [str(path), *quick, "--train.overwrite"]) == 2
    assert "nothing.txt" in capsys.readouterr().err


def test_a_stereo_run(stereo_run: Path) -> None:
    pictures = np.load(stereo_run / "report/images.npz")
    assert pictures["titles"].tolist() == ["image", "second image", "predicted", "true", "error"]
    assert pictures["predicted_0"].shape == (64, 64, 3)
    whole, part = load_file(stereo_run / "export/task.safetensors"), geossl.load(stereo_run).state_dict()
    assert all(torch.equal(whole[f"body.backbone.{name}"], value) for name, value in part.items())
    assert {"loss", "avgerr", "bad@1.0", "grad_norm"} <= set(rows(stereo_run)[0])
    assert run("finetune", [str(stereo_run / "config.yaml"), "--train.steps", "5", "--resume", "auto"]) == 0
    assert rows(stereo_run)[-1]["step"] == 5


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = load_config(FinetuneConfig, smoke("stereo"))
    encoder = config.backbone.build()
    pair = CroCoPair(encoder, config.task.decoder.build(encoder.config))
    return save_pair_backbone(pair, tmp_path_factory.mktemp("pretrained"))


STILL = ["--train.steps", "1", "--optim.lr", "1e-30", "--optim.warmup_lr", "0", "--optim.weight_decay", "0"]


def test_encoder_and_decoder_come_from_the_weights(pretrained: Path, cache: list[str], tmp_path: Path) -> None:
    flags = [smoke("stereo"), *QUICK, *cache, *STILL, "--weights", str(pretrained)]
    given = load_pair_backbone(pretrained).state_dict()
    # The numbers of the decoder are those of the weights, whatever the configuration says.
    assert run("finetune", [*flags, "--task.decoder.depth", "3", "--train.run_folder", str(tmp_path / "a")]) == 0
    assert all(torch.equal(value, given[name]) for name, value in load_pair_backbone(tmp_path / "a").state_dict().items())
    assert run("finetune", [*flags, "--task.fresh_decoder", "--train.run_folder", str(tmp_path / "b")]) == 0
    fresh = load_pair_backbone(tmp_path / "b").state_dict()
    assert all(torch.equal(value, given[name]) for name, value in fresh.items() if name.startswith("backbone."))
    assert not torch.equal(fresh["decoder.embed.weight"], given["decoder.embed.weight"])


def test_an_encoder_alone_needs_a_fresh_decoder(cache: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    geossl.models.save_backbone(load_config(FinetuneConfig, smoke("stereo")).backbone.build(), tmp_path / "encoder")
    flags = [smoke("stereo"), *QUICK, *cache, *STILL, "--weights", str(tmp_path / "encoder"), "--train.run_folder", str(tmp_path / "run")]
    assert run("finetune", flags) == 2
    assert "holds an encoder alone" in capsys.readouterr().err
    assert run("finetune", [*flags, "--task.fresh_decoder"]) == 0


@pytest.mark.parametrize(
    ("kind", "arguments", "words"),
    [
        ("stereo", ["--data.truth", "flow"], "task stereo needs 1 channel(s) of truth a pixel, got truth of 2 channels"),
        ("stereo", ["--data.truth", "none"], "got no truth"),
        ("stereo", ["--data.truth", "depth", "--data.views", "1"], "gives single images, but task stereo needs pairs"),
        ("depth", ["--data.crop", "48"], "images are 48 x 48, but head dpt needs multiples of 32; choose another data.crop"),
        ("depth", ["--data.name", "objects"], "objects gives point clouds, but task depth needs images"),
        ("pose", ["--data.truth", "none"], "gives no motion between images"),
        ("depth", ["--task.name", "classification"], "gives images without classes"),
        ("stereo", ["--task.hooks", "0", "1", "2", "9"], "hooks: block 9 does not exist"),
    ],
)
def test_bad_input_is_one_line(
    kind: str, arguments: list[str], words: str, cache: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    quick = QUICK[: QUICK.index("--data.rooms")] if "objects" in arguments else [*QUICK, *cache]
    assert run("finetune", [smoke(kind), *quick, "--train.run_folder", str(tmp_path / "run"), *arguments]) == 2
    printed = capsys.readouterr().err
    assert words in printed
    assert len([line for line in printed.splitlines() if not line.startswith("warning: ")]) == 1
    assert not (tmp_path / "run").exists()


def test_scores_of_a_run(stereo_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("evaluate", ["dense", str(stereo_run)]) == 0
    found = json.loads((stereo_run / "evaluation_stereo_room_pairs.json").read_text())
    last = [row for row in rows(stereo_run) if "probe/L1err" in row][-1]
    assert found["scores"]["L1err"] == pytest.approx(last["probe/L1err"], rel=1e-4)
    assert "D1-all" in capsys.readouterr().out
    assert run("evaluate", ["task", str(stereo_run)]) == 2
    assert "use geossl evaluate dense MODEL" in capsys.readouterr().err


@pytest.fixture
def photos(tmp_path: Path) -> list[str]:
    rng, paths = np.random.default_rng(0), []
    for name in ("left", "right"):
        paths.append(str(tmp_path / f"{name}.png"))
        Image.fromarray(rng.integers(0, 256, (70, 90, 3), dtype=np.uint8)).save(paths[-1])
    return paths


def test_a_pair_of_files(stereo_run: Path, photos: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "disparity.npy"
    pair = ["dense", str(stereo_run), "--left", photos[0], "--right", photos[1], "--overlap", "0.2"]
    assert run("evaluate", [*pair, "--out", str(out)]) == 0
    values = np.load(out)
    assert values.shape == (70, 90)
    np.save(tmp_path / "truth.npy", np.abs(values) + 0.01)
    assert run("evaluate", [*pair, "--out", str(tmp_path / "picture.png"), "--truth", str(tmp_path / "truth.npy")]) == 0
    assert Image.open(tmp_path / "picture.png").size == (90, 70)
    assert "L1err" in capsys.readouterr().out
    with h5py.File(tmp_path / "spring.dsp5", "w") as file:  # one of the four values a pixel is what is predicted
        four = np.full((140, 180), values.max() + 100)
        four[1::2, ::2] = values.max() + 5
        file["disparity"] = four.clip(1)
    assert run("evaluate", [*pair, "--out", str(tmp_path / "picture.png"), "--truth", str(tmp_path / "spring.dsp5")]) == 0
    found = re.search(r"L1err *│ *([\d.]+)", capsys.readouterr().out)
    assert found is not None
    assert float(found[1]) == pytest.approx(np.abs(max(values.max() + 5, 1) - values).mean(), rel=1e-3)
    assert run("evaluate", [*pair, "--out", str(tmp_path / "disparity.pfm"), "--window", "32", "64", "--windows_at_once", "4"]) == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--left", "LEFT"], "right: task stereo predicts pairs; give the second image"),
        (["--left", "LEFT", "--right", "RIGHT"], "out: give a file to write"),
        (["--left", "LEFT", "--right", "RIGHT", "--out", "x.flo"], "out: must end in .npy, .png, .pfm for task stereo"),
        (["--left", "LEFT", "--right", "SMALL", "--out", "x.npy"], "pairs have one size"),
        (["--left", "LEFT", "--right", "absent.png", "--out", "x.npy"], "absent.png"),
        (["--right", "RIGHT"], "left must be given with right or truth"),
        (["--left", "LEFT", "--right", "RIGHT", "--out", "x.npy", "--overlap", "1"], "overlap must lie in [0, 1)"),
        (["--left", "LEFT", "--right", "RIGHT", "--out", "x.npy", "--window", "33", "64"], "multiples of 32"),
    ],
)
def test_wrong_files_and_flags(
    arguments: list[str], words: str, stereo_run: Path, photos: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    small = Path(photos[0]).with_name("small.png")
    Image.new("RGB", (64, 32)).save(small)
    named = [{"LEFT": photos[0], "RIGHT": photos[1], "SMALL": str(small)}.get(word, word) for word in arguments]
    assert run("evaluate", ["dense", str(stereo_run), *named]) == 2
    assert words in capsys.readouterr().err


@pytest.mark.slow
def test_two_processes(cache: list[str], tmp_path: Path) -> None:
    """Every trained parameter gets a gradient in every step of every process; otherwise the second step would stop the run."""
    flags = [smoke("stereo"), *QUICK, *cache, "--train.steps", "2"]
    assert run("finetune", [*flags, "--train.run_folder", str(tmp_path / "one")]) == 0
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(ROOT / "tools/finetune.py")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    for parallel in ("ddp", "fsdp"):
        folder = tmp_path / parallel
        ran = subprocess.run(
            [*launcher, *flags, "--train.run_folder", str(folder), "--train.parallel", parallel],
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert ran.returncode == 0, ran.stderr
        one, two = (load_file(max((f / "checkpoints").glob("step_*")) / "model.safetensors") for f in (tmp_path / "one", folder))
        assert {name: value.shape for name, value in one.items()} == {name: value.shape for name, value in two.items()}
        assert [row["step"] for row in rows(folder) if "loss" in row] == [1, 2]
