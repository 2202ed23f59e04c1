from __future__ import annotations

import json
import math
import signal

import numpy as np
import pytest
import torch
from PIL import Image

from geossl.cli import fit_gaussians, run
from geossl.config import load_config
from geossl.data import read_gaussians
from geossl.geometry import intrinsics_from_fov, invert_pose, look_at
from geossl.ops import rasterize_gaussians
from geossl.tasks import GaussianFit

SIZE, VIEWS = 32, 12


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    """A folder with transforms.json and images of 100 Gaussians."""
    folder = tmp_path_factory.mktemp("scene")
    rng = torch.Generator().manual_seed(1)
    means, quats = torch.rand(100, 3, generator=rng) - 0.5, torch.randn(100, 4, generator=rng)
    scales, colors = 0.1 + 0.1 * torch.rand(100, 3, generator=rng), 0.5 + means + 0.2 * torch.randn(100, 3, generator=rng)
    angle = torch.arange(VIEWS) / VIEWS * 2 * math.pi
    pose = look_at(torch.stack([2 * angle.cos(), 2 * angle.sin(), 0.5 + 0 * angle], 1), torch.zeros(VIEWS, 3))
    k = intrinsics_from_fov(45.0, SIZE, SIZE).expand(VIEWS, 3, 3)
    images = rasterize_gaussians(means, quats, scales, torch.full((100,), 0.9), colors.clamp(0, 1), pose, k, SIZE, SIZE)[0]
    frames = []
    for number in range(VIEWS):
        Image.fromarray((images[number].clamp(0, 1) * 255).byte().numpy()).save(folder / f"{number}.png")
        opengl = invert_pose(pose)[number] * torch.tensor([1.0, -1, -1, 1])
        frames.append({"file_path": f"{number}.png", "transform_matrix": opengl.tolist()})
    (folder / "transforms.json").write_text(json.dumps({"fl_x": float(k[0, 0, 0]), "frames": frames}))
    return folder


QUICK = ["--fit.steps", "24", "--fit.start.count", "200", "--fit.density.every", "8", "--train.log_every", "8", "--train.save_every", "8"]


def test_a_folder_of_images_becomes_a_scene(scene, tmp_path, capsys):
    out = tmp_path / "run"
    args = [str(scene), *QUICK, "--fit.steps", "80", "--train.score_every", "40", "--train.run_folder", str(out)]
    assert run("fit-gaussians", args) == 0
    printed = capsys.readouterr()
    assert "12 views of 32 x 32, 1 held out" in printed.err
    assert "held-out views (1 of 12): PSNR" in printed.out
    assert "step 80/80  loss" in printed.out
    assert {path.name for path in out.iterdir()} == {
        *("gaussians.ply", "views.png", "summary.json", "metrics.jsonl", "config.yaml", "checkpoints", "tensorboard")
    }
    summary = json.loads((out / "summary.json").read_text())
    assert summary["held_out"] == [4]
    assert summary["psnr"] > summary["psnr_start"] + 2.5
    assert summary["psnr"] > 13.5
    gaussians = read_gaussians(out / "gaussians.ply")
    assert len(gaussians) == summary["gaussians"]
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(8, 81, 8))
    assert rows[-1]["test/psnr"] == pytest.approx(summary["psnr"])
    assert [row["step"] for row in rows if "test/psnr" in row] == [40, 80]
    assert sorted(path.name for path in (out / "checkpoints").iterdir()) == ["step_00000072", "step_00000080"]
    sheet = np.asarray(Image.open(out / "views.png").convert("RGB"))
    assert sheet.shape == (18 + (256 + 4), 3 * (256 + 4) + 4, 3)
    # The last column is the image as it is, the middle one comes nearer to it than the first.
    columns = [sheet[18:274, 4 + 260 * i : 260 + 260 * i].astype(float) for i in range(3)]
    assert np.abs(columns[2][4::8, 4::8] - np.asarray(Image.open(scene / f"{summary['held_out'][0]}.png"), float)).max() <= 1
    assert np.abs(columns[1] - columns[2]).mean() < 0.8 * np.abs(columns[0] - columns[2]).mean()


def test_a_run_that_is_stopped_continues_to_the_same_bytes(scene, tmp_path, monkeypatch, capsys):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert run("fit-gaussians", [str(scene), *QUICK, "--train.run_folder", str(whole)]) == 0
    step = GaussianFit.train_step

    def stopping(self):
        loss = step(self)
        if self.step == 13:
            signal.raise_signal(signal.SIGTERM)
        return loss

    monkeypatch.setattr(GaussianFit, "train_step", stopping)
    assert run("fit-gaussians", [str(scene), *QUICK, "--train.run_folder", str(parts)]) == 128 + signal.SIGTERM
    assert "stopped after step 13 of 24" in capsys.readouterr().err
    assert not (parts / "gaussians.ply").exists()
    monkeypatch.undo()
    assert run("fit-gaussians", [str(scene), *QUICK, "--train.run_folder", str(parts), "--resume", "auto"]) == 0
    for name in ("gaussians.ply", "views.png", "summary.json"):
        assert (whole / name).read_bytes() == (parts / name).read_bytes()
    assert run("fit-gaussians", [str(scene), *QUICK, "--train.run_folder", str(parts)]) == 2
    assert "holds a run already, its newest checkpoint is of step 24" in capsys.readouterr().err
    # What it was started with starts it again.
    again = load_config(fit_gaussians.FitGaussiansConfig, parts / "config.yaml")
    assert again.data.root == scene
    assert again.fit.density.every == 8


def test_a_room_is_the_default(tmp_path, capsys):
    args = ["--data.views", "5", "--data.width", "24", "--data.height", "16", "--fit.steps", "15", "--fit.test_every", "4"]
    assert run("fit-gaussians", [*args, "--fit.start.count", "1000", "--train.run_folder", str(tmp_path / "room")]) == 0
    assert "room 0 of seed 0: 5 views of 24 x 16, 1 held out" in capsys.readouterr().err
    summary = json.loads((tmp_path / "room" / "summary.json").read_text())
    assert summary["psnr"] > summary["psnr_start"]


def test_no_view_held_out_is_said(scene, tmp_path, capsys):
    args = [str(scene), *QUICK, "--fit.steps", "2", "--fit.test_every", "0", "--train.run_folder", str(tmp_path / "run")]
    assert run("fit-gaussians", args) == 0
    assert "no view was held out: no PSNR" in capsys.readouterr().out
    assert "psnr" not in json.loads((tmp_path / "run" / "summary.json").read_text())


def test_flags_of_a_folder(scene, tmp_path):
    assert fit_gaussians.folder_flags(scene, []) == ["--data.name", "transforms", "--data.root", str(scene), "--data.all_views"]
    for number in range(230):
        (tmp_path / f"frame-{number:06}.pose.txt").write_text("1 0 0 0\n0 1 0 0\n0 0 1 0\n0 0 0 1\n")
    flags = fit_gaussians.folder_flags(tmp_path, ["--data.views=9"])
    assert flags == ["--data.name", "rgbd_folder", "--data.root", str(tmp_path), "--data.step", "3"]
    assert fit_gaussians.folder_flags(tmp_path, [])[-2:] == ["--data.views", "77"]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["no/such/folder"], "no/such/folder"),
        (["a", "b"], "takes one folder and one configuration"),
        (["--fit.stepz", "5"], "did you mean '--fit.steps'"),
        (["--fit.steps", "0"], "fit.steps must be at least 1, got 0"),
        (["--fit.density.begin", "0.9"], "fit.density.end must lie in [begin, 1]"),
        (["--row", "5", "--data.count", "2"], "row: 5 is outside 0..1"),
        (["SCENE", "--train.run_folder", "FILE/deep/run"], "cannot be written"),
        (["SCENE", "--fit.start.source", "depth"], "start.source is 'depth', but no pixel"),
        (["SCENE", "--data.views", "1"], "needs at least 3 views"),
    ],
)
def test_mistakes_end_in_one_line(args, message, scene, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "FILE").write_text("")
    monkeypatch.setattr(GaussianFit, "train_step", lambda self: pytest.fail("work has begun"))
    assert run("fit-gaussians", [str(scene) if word == "SCENE" else word for word in args]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("geossl fit-gaussians: error:")
    assert message in error
    assert [path.name for path in tmp_path.iterdir()] == ["FILE"]
