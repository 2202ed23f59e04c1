"""Matches between two pictures, scored through the program."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import geossl
from geossl.cli import run
from geossl.cli.evaluate_matches import as_flow, fitted
from geossl.models import CroCoDecoderConfig, CroCoPair, save_pair_backbone


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    encoder = geossl.create_backbone("croco_vit_tiny", dim=24, depth=1, heads=2, image_size=(32, 32))
    pair = CroCoPair(encoder, CroCoDecoderConfig(dim=24, depth=1, heads=2).build(encoder.config))
    return str(save_pair_backbone(pair, tmp_path_factory.mktemp("pair")))


@pytest.fixture(scope="module")
def stereo(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("stereo")
    for side in "lr":
        Image.fromarray(np.random.default_rng(0).integers(0, 255, (70, 100, 3), dtype=np.uint8)).save(folder / f"{side}.png")
    np.save(folder / "d.npy", np.full((70, 100), 20.0))
    (folder / "list.txt").write_text("l.png r.png d.npy")
    return ["--data.name", "stereo", "--data.layout", "list", "--data.root", str(folder / "list.txt"), "--split", "all"]


def scores(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())["scores"]


def test_matches_are_scored_beside_those_of_a_standstill(
    model: str, stereo: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("evaluate", ["matches", model, *stereo, "--out", str(tmp_path / "whole.json")]) == 0
    assert "matches on the part all of stereo, 20 patches" in " ".join(capsys.readouterr().out.split())  # 4 x 6, less a column that leaves
    still = scores(tmp_path / "whole.json")["every patch where it was"]
    assert (still["median_error"], still["patches"]) == (20.0, 20)
    assert still["within"] == {"0.5": 0.0, "1.0": 0.0, "2.0": 1.0}
    assert scores(tmp_path / "whole.json")["cross-attention"]["patches"] == 20
    assert run("evaluate", ["matches", model, *stereo, "--size", "35", "50", "--out", str(tmp_path / "half.json")]) == 0
    assert scores(tmp_path / "half.json")["every patch where it was"]["median_error"] == pytest.approx(10.0)


def test_flow_of_rendered_rooms_is_the_default(model: str, tmp_path: Path) -> None:
    small = ["--data.test_rooms", "1", "--data.pairs_per_room", "1", "--data.size", "40", "--data.crop", "32"]
    assert run("evaluate", ["matches", model, *small, "--data.cache", str(tmp_path), "--out", str(tmp_path / "rooms.json")]) == 0
    assert json.loads((tmp_path / "rooms.json").read_text())["data"] == "room_pairs"


@pytest.mark.parametrize(("flags", "words"), [
    (["--size", "8", "8"], "size must be at least 16 x 16"),
    (["--split", "test"], "nothing to score in this part"),
    (["--data.name", "objects"], "matches are scored on pairs with flow or disparity"),
])  # fmt: skip
def test_bad_requests_are_told(
    model: str, stereo: list[str], flags: list[str], words: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    data = [] if "--data.name" in flags else stereo[:-2] if "--split" in flags else stereo
    assert run("evaluate", ["matches", model, *data, *flags, "--out", str(tmp_path / "x.json")]) == 2
    assert words in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "x.json").exists()


def test_disparity_is_flow_to_the_left_and_follows_the_size() -> None:
    disparity = torch.full((1, 32, 48), 6.0)
    disparity[0, 0] = torch.inf
    flow = as_flow(disparity)
    assert flow[:, 1, 1].tolist() == [-6.0, 0.0]
    assert not flow[:, 0].isfinite().any()
    image = torch.rand(3, 32, 48)
    for size, shape, value in ((None, (32, 48), -6.0), ((16, 24), (16, 16), -3.0)):
        cut = fitted(image, image, flow, size, 16)
        assert [tuple(part.shape[1:]) for part in cut] == [shape] * 3
        assert cut[2][0, -1, -1] == value
    four = torch.arange(12.0).expand(2, 32, 12).repeat_interleave(8, 2)[:, :, :96].repeat_interleave(2, 1)  # Spring's
    assert torch.equal(fitted(image, image, four, None, 16)[2], four[:, ::2, ::2])
