"""The classifier heads of I2P-MAE and Point-M2AE against tensors computed with published implementations.

Every file of ``GEOSSL_GOLDEN/i2p_mae`` whose ``case`` ends in "fine-tuning heads" is run, so further cases of the same form need no code:
point the variable at their folder. A file names the one that its encoder's weights are in.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from golden_files import ROOT, GoldenFile, golden_files

import geossl
from geossl.geometry import PackedPoints, PointBatch
from geossl.methods.reference import find_system

pytestmark = pytest.mark.golden


def cases() -> list[tuple[Path, str]]:
    files = golden_files("i2p_mae", lambda metadata, names: metadata.get("case", "").endswith("fine-tuning heads"))
    return [(path, name.removesuffix(".logits")) for path in files for name in GoldenFile(path).tensors if name.endswith(".logits")]


class Case(GoldenFile):
    """One head of a golden file: its tensors, and the parity model built from its weights and the encoder's."""

    def __init__(self, path: Path, head: str) -> None:
        super().__init__(path)
        self.head = head
        named = re.search(r"[\w.-]+\.safetensors", self.metadata.get("note", ""))
        encoder = GoldenFile(path.with_name(named[0] if named else f"{path.stem.replace('_finetune', '')}.safetensors")).part("state_dict.")
        self.state = {key: value for key, value in encoder.items() if key.startswith("h_encoder.") and "encoder_norms" not in key}
        self.state |= self.part(f"{head}.state_dict.")
        system = "point_m2ae" if self.metadata["case"].startswith("Point-M2AE") else "i2p_mae"
        self.model = geossl.load_reference(system, self.state, self.config)


@pytest.fixture(scope="module", params=cases(), ids=lambda case: f"{case[0].stem}-{case[1]}")
def case(request: pytest.FixtureRequest) -> Case:
    return Case(*request.param)


def test_a_case_is_found() -> None:
    assert cases(), f"no fine-tuning heads in {ROOT}; GEOSSL_GOLDEN must name a folder with an i2p_mae sub-folder"


@torch.no_grad()
def test_encoder_output_logits_and_loss(case: Case) -> None:
    expected, model = case.tensors, case.model
    points = expected["points"].float()
    tokens = model.backbone.encode(model.backbone.group(points), norm=False)[-1].feats
    encoder_out = expected[f"{case.head}.encoder_out"]
    torch.testing.assert_close(tokens.view_as(encoder_out), encoder_out, rtol=1e-4, atol=2e-5)
    output = model(PointBatch(PackedPoints.from_padded(points), expected["labels"].long()))
    torch.testing.assert_close(output.aux["logits"], expected[f"{case.head}.logits"], rtol=1e-4, atol=2e-5)
    torch.testing.assert_close(output.loss, expected[f"{case.head}.loss"], rtol=1e-5, atol=0.0)


def test_the_radius_is_what_makes_them_equal(case: Case) -> None:
    """A classifier that attended to all tokens would be told apart."""
    if not any(case.config.get("local_radius", ())):
        pytest.skip("this case has no radius")
    wide = geossl.load_reference("point_m2ae", case.state, case.config | {"local_radius": [0.0] * len(case.config["num_groups"])})
    ours, other = (model.backbone.forward_pyramid(case.tensors["points"].float())[-1].feats for model in (case.model, wide))
    assert (ours - other).abs().max() > 1e-3


def test_an_official_file_round_trips(case: Case, tmp_path: Path) -> None:
    """The prefix of data-parallel training, half precision and the key ``base_model``, as in released files."""
    torch.save({"base_model": {f"module.{key}": value for key, value in case.state.items()}, "epoch": 3}, tmp_path / "ckpt-best.pth")
    assert find_system(tmp_path / "ckpt-best.pth") == "point_m2ae"
    loaded = geossl.load_reference("point_m2ae", tmp_path / "ckpt-best.pth", case.config)
    assert loaded.config.max_skips_first is (loaded.config.pooling == "mean_max")
    assert all(torch.equal(value, case.model.state_dict()[name]) for name, value in loaded.state_dict().items())
    if not loaded.config.max_skips_first:
        points = case.tensors["points"].float()
        torch.testing.assert_close(loaded.logits(points), case.model.logits(points), rtol=0, atol=0)


def test_groups_are_those_of_the_head_unless_told(case: Case) -> None:
    """Released ModelNet40 and ScanObjectNN classifiers group differently; the weights do not tell, but the width of the head does."""
    config = {key: value for key, value in case.config.items() if key != "group_sizes"}
    loaded = geossl.load_reference("point_m2ae", case.state, config)
    assert loaded.backbone.config.group_sizes == ((32, 16, 16) if loaded.config.pooling == "mean_max" else (16, 8, 8))
    guided = geossl.load_reference("i2p_mae", case.state, config).backbone.config
    assert guided.group_sizes == ((32, 16, 16) if loaded.config.pooling == "mean_max" else (48, 24, 24))


def test_another_state_is_refused(case: Case) -> None:
    from geossl.errors import CheckpointError

    with pytest.raises(CheckpointError, match=r"unexpected \(1\): h_encoder\.encoder_norms\.0\.weight"):
        geossl.load_reference("point_m2ae", case.state | {"h_encoder.encoder_norms.0.weight": torch.ones(12)}, case.config)
    with pytest.raises(CheckpointError, match=r"missing \(1\): head\.5\.running_mean"):
        geossl.load_reference("point_m2ae", {k: v for k, v in case.state.items() if k != "cls_head_finetune.5.running_mean"}, case.config)
    with pytest.raises(CheckpointError, match="not a Point-M2AE or I2P-MAE classifier"):
        geossl.load_reference("point_m2ae", {k: v for k, v in case.state.items() if not k.startswith("h_encoder.")}, case.config)
