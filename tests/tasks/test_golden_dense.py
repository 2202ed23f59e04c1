"""The DPT stereo model against tensors computed with the published implementation.

Every file of ``GEOSSL_GOLDEN/croco`` with the weights of a DPT head is run, so further cases of the same form need no code.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from golden_files import ROOT, GoldenFile, close, golden_files

import geossl
from geossl.cli import run
from geossl.errors import CheckpointError
from geossl.evaluation import DenseMeter
from geossl.geometry import ImageBatch
from geossl.layers.dense_errors import batch_scores
from geossl.layers.dpt import STEP
from geossl.methods.reference import find_system
from geossl.tasks.dense import default_hooks
from geossl.tasks.dense_losses import LOSSES
from geossl.tasks.tiling import window_offsets

pytestmark = pytest.mark.golden

PUBLISHED_LOSSES = {
    "laplacian": "LaplacianLoss",
    "laplacian_bounded": "LaplacianLossBounded",
    "laplacian_bounded2": "LaplacianLossBounded2",
    "l1": "L1",
}


def cases() -> list[Path]:
    return golden_files("croco", lambda metadata, names: "sd/head.dpt.head.0.weight" in names)


class Case(GoldenFile):
    """A golden file and the parity model built from its weights."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.options: dict[str, Any] = {"hooks": self.config["hooks_idx"], "tile_conf_mode": self.config["conf_mode"]}
        self.options |= {"task": self.config["task"], "crop": self.config["cfg"]["img_size"]}
        self.content = {"model": self.part("sd/"), "croco_kwargs": self.config["cfg"]}
        self.model: Any = geossl.load_reference("croco", self.content, self.options)
        self.model.config = dataclasses.replace(self.model.config, overlap=self.config["overlap"])
        self.images = self.tensors["in/img1"], self.tensors["in/img2"]


@pytest.fixture(scope="module", params=cases(), ids=lambda path: path.stem)
def case(request: pytest.FixtureRequest) -> Case:
    return Case(request.param)


def test_a_case_is_found() -> None:
    assert cases(), f"no DPT head in {ROOT}; GEOSSL_GOLDEN must name a folder with a croco sub-folder"


@torch.no_grad()
def test_every_stage_of_the_head(case: Case) -> None:
    model, expected = case.model, case.tensors
    maps = model.body(*case.images, list(model.config.hooks))
    for number, part in enumerate(maps):
        tokens = expected[f"mid/hook{number}_tokens"]
        close(part.flatten(2).transpose(1, 2), tokens, rtol=0, atol=1e-5, name=f"hook {number}")
        close(model.head.reassemble[number](part), expected[f"mid/act_postprocess{number}"], rtol=0, atol=2e-4, name=f"layer {number}")
    layers = model.head.layers(maps)
    path = model.head.fuse[3](layers[3])
    for number in (4, 3, 2):
        close(path, expected[f"mid/path{number}"], rtol=0, atol=2e-4, name=f"path {number}")
        path = model.head.fuse[number - 2](path, layers[number - 2])
    close(model.output(*case.images), expected["out/head"], rtol=0, atol=2e-4, name="head")


@torch.no_grad()
def test_the_convert_program_keeps_encoder_decoder_and_head(case: Case, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = argparse.Namespace(**case.options, criterion="LaplacianLossBounded2()", croco_args=case.config["cfg"])
    torch.save({"model": case.part("sd/"), "args": args}, tmp_path / "official.pth")
    assert run("convert", [str(tmp_path / "official.pth"), str(tmp_path / "out")]) == 0
    shown = capsys.readouterr().out
    assert "load_pair_backbone" in shown
    task: Any = geossl.tasks.load_task(tmp_path / "out")
    assert task.config == dataclasses.replace(case.model.config, overlap=task.config.overlap)
    assert torch.equal(task.output(*case.images), case.model.output(*case.images))
    pair = geossl.models.load_pair_backbone(tmp_path / "out")
    assert all(torch.equal(a, b) for a, b in zip(pair(*case.images), case.model.body(*case.images), strict=True))


def test_losses_and_metrics(case: Case) -> None:
    output, truth = case.tensors["out/head"], case.tensors["in/gt"]
    for name, published in PUBLISHED_LOSSES.items():
        loss = LOSSES[name](output[:, :-1] if name == "l1" else output, truth)
        close(loss, case.tensors[f"out/loss_{published}"][0], rtol=0, atol=1e-5, name=name)
    found = batch_scores(case.config["task"], output[:, :-1], truth)
    assert set(found) == set(case.part("out/metric_"))
    meter = DenseMeter(case.config["task"])
    meter.update(output[:, :-1], truth)
    for scores, prefix in ((found, "out/metric_"), (meter.scores(), "out/dsmetric_")):
        for name, value in case.part(prefix).items():
            assert float(scores[name]) == pytest.approx(float(value), abs=1e-4), name


def test_the_task_trains_on_the_published_loss(case: Case) -> None:
    output = case.model(ImageBatch(*case.images, case.tensors["in/gt"]))
    assert output.loss.item() == pytest.approx(float(case.tensors["out/loss_LaplacianLossBounded2"]), abs=1e-4)
    assert set(output.metrics) == set(case.part("out/metric_"))


def test_windows(case: Case) -> None:
    height, width = case.tensors["tile/img1"].shape[2:]
    window = case.model.config.window
    assert window_offsets(height, window[0], case.config["overlap"]) == case.config["tile_offsets_y"]
    assert window_offsets(width, window[1], case.config["overlap"]) == case.config["tile_offsets_x"]
    found = case.model.predict(case.tensors["tile/img1"], case.tensors["tile/img2"])
    close(found.values, case.tensors["tile/pred"], rtol=0, atol=2e-4)
    close(found.confidence, case.tensors["tile/conf"], rtol=0, atol=2e-4)


def test_images_smaller_than_the_window(case: Case) -> None:
    small = case.tensors["tile_small/img1"], case.tensors["tile_small/img2"]
    published = case.model.predict(*small, published=True)
    close(published.values, case.tensors["tile_small/pred"], rtol=0, atol=2e-4)
    close(published.confidence, case.tensors["tile_small/conf"], rtol=0, atol=2e-4)
    assert published.confidence.shape == case.tensors["tile_small/conf"].shape
    ours = case.model.predict(*small)
    close(ours.values, published.values)  # in these cases the published factor is the right one
    assert ours.confidence.shape[1:] == small[0].shape[2:]


def test_published_files_round_trip(case: Case, tmp_path: Path) -> None:
    """As the published training programs write them: a command line with classes, half precision is not used there."""
    options = argparse.Namespace(
        task=case.config["task"],
        criterion="LaplacianLossBounded2()",
        croco_args=case.config["cfg"],
        crop=case.config["cfg"]["img_size"],
        tile_conf_mode=case.config["conf_mode"],
    )
    torch.save({"model": case.content["model"], "args": options, "epoch": 3, "best_so_far": 1.0}, tmp_path / "checkpoint-best.pth")
    assert find_system(tmp_path / "checkpoint-best.pth") == "croco"
    loaded: Any = geossl.load_reference("croco", tmp_path / "checkpoint-best.pth", {"hooks": case.config["hooks_idx"]})
    assert dataclasses.replace(loaded.config, overlap=case.config["overlap"]) == case.model.config
    assert all(torch.equal(value, case.model.state_dict()[name]) for name, value in loaded.state_dict().items())


def test_aliases_may_be_absent_but_not_differ(case: Case) -> None:
    state = dict(case.content["model"])
    alias = "head.dpt.act_postprocess.0.1.weight"
    without = {key: value for key, value in state.items() if ".act_postprocess." not in key and ".layer_rn." not in key}
    loaded = geossl.load_reference("croco", {**case.content, "model": without}, case.options)
    assert all(torch.equal(value, case.model.state_dict()[name]) for name, value in loaded.state_dict().items())
    with pytest.raises(CheckpointError, match="must be the same tensor, but differ"):
        geossl.load_reference("croco", {**case.content, "model": state | {alias: state[alias] + 1}}, case.options)


def test_other_files_are_refused(case: Case) -> None:
    state = dict(case.content["model"])
    with pytest.raises(CheckpointError, match=r"unexpected \(1\): head.dpt2.x"):
        geossl.load_reference("croco", {**case.content, "model": state | {"head.dpt2.x": torch.zeros(1)}}, case.options)
    less = {key: value for key, value in state.items() if key != "head.dpt.scratch.refinenet1.resConfUnit2.conv1.bias"}
    with pytest.raises(CheckpointError, match=r"missing \(1\): head.fuse.0.unit.conv1.bias"):
        geossl.load_reference("croco", {**case.content, "model": less}, case.options)
    for key, value, words in (
        ("criterion", "LaplacianLossBounded(a=1)", "expected one of LaplacianLoss"),
        ("criterion", "__import__('os').system('true')", "expected one of LaplacianLoss"),
        ("task", "depth", "task must be stereo or flow"),
        ("hooks", [1, 2], "must be four blocks"),
        ("hooks", [1, 2, 3, 40], "block 40 does not exist"),
        ("crop", [60, 96], "multiples of 32"),
    ):
        with pytest.raises((CheckpointError, geossl.errors.ConfigError), match=words):
            geossl.load_reference("croco", case.content, {**case.options, key: value})


def test_published_hooks() -> None:
    assert default_hooks("dpt", 24, 12) == (23, 27, 31, 35)
    assert default_hooks("dpt", 12, 12) == (11, 15, 19, 23)
    assert default_hooks("dpt", 12, 8) == (10, 13, 16, 19)
    assert default_hooks("dpt", 24, 24) == (23, 31, 39, 47)
    assert default_hooks("dpt", 12, None) == (2, 5, 8, 11)
    assert default_hooks("linear", 12, 8) == (19,)
    assert STEP == 32
