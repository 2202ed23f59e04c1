"""Point-MAE against tensors computed with the published implementation.

Every file of ``GEOSSL_GOLDEN/i2p_mae`` whose metadata says ``case = Point-MAE`` is run, so further cases of the same form need no
code: point the variable at their folder.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from golden_files import ROOT, GoldenFile, close, converted_names, golden_files

import geossl
from geossl.geometry import PackedPoints, PointBatch
from geossl.methods.point_mae import convert_reference_state


def point_mae_cases() -> list[Path]:
    return golden_files("i2p_mae", lambda metadata, names: metadata.get("case") == "Point-MAE")


class Case(GoldenFile):
    """One golden file and the parity model built from its weights."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.state = self.part("state_dict.")
        self.model = geossl.load_reference("point_mae", self.state, self.config)
        self.points = self.tensors["points"].float()
        self.batch = PointBatch(PackedPoints.from_padded(self.points))
        self.mask = self.tensors["mask"].bool()

    def names(self) -> dict[str, str]:
        return converted_names(self.state, self.state, lambda filled: convert_reference_state(filled, self.config)[1])


@pytest.fixture(scope="module", params=point_mae_cases(), ids=lambda path: path.stem)
def case(request: pytest.FixtureRequest) -> Case:
    return Case(request.param)


def test_a_case_is_found() -> None:
    assert point_mae_cases(), f"no Point-MAE case in {ROOT}; GEOSSL_GOLDEN must name a folder with an i2p_mae sub-folder"


@pytest.mark.golden
def test_groups_are_exact(case: Case) -> None:
    groups = case.model.backbone.group(case.batch.points)
    close(groups.centers, case.tensors["out.group.1"], rtol=0, atol=0)
    close(groups.points, case.tensors["out.group.0"], rtol=0, atol=0)


@pytest.mark.golden
def test_the_near_origin_rule_is_what_makes_them_exact(case: Case) -> None:
    plain = geossl.create_backbone("point_vit_tiny", groups=case.config["num_group"], group_size=case.config["group_size"])
    centers = plain.group(case.batch.points).centers
    assert not torch.equal(centers.view_as(case.tensors["out.group.1"]), case.tensors["out.group.1"])


@pytest.mark.golden
def test_activations_and_loss(case: Case) -> None:
    model, expected = case.model.eval(), case.tensors
    groups = model.backbone.group(case.batch.points)
    close(model.backbone.embed(groups.points), expected["out.tokens"])
    visible = (~case.mask).flatten().nonzero()[:, 0]
    seen = type(groups.segments)(tuple((~case.mask).sum(1).tolist()))
    close(model.backbone.encode(groups, visible, seen), expected["out.MAE_encoder.0"])
    output = model(case.batch, mask=case.mask)
    close(output.aux["prediction"], expected["out.loss.in.0"])
    close(groups.points[case.mask.flatten()], expected["out.loss.in.1"], rtol=0, atol=0)
    close(output.loss, expected["out.loss"], rtol=1e-5, atol=0)


@pytest.mark.golden
def test_training_loss_and_every_gradient(case: Case) -> None:
    model = case.model.train()
    model.zero_grad()
    loss = model(case.batch, mask=case.mask).loss
    loss.backward()
    close(loss, case.tensors["train.loss"], rtol=1e-5, atol=0)
    ours, gradients = case.names(), {name: p.grad for name, p in model.named_parameters()}
    norms = case.tensors["train.grad_norms"]
    for name, norm in zip(json.loads(case.metadata["grad_norm_names"]), norms, strict=True):
        torch.testing.assert_close(
            gradients[ours[name]].norm(), norm, rtol=1e-3, atol=1e-5 * float(norms.max()), msg=lambda m, n=name: f"{n}: {m}"
        )
    for name, gradient in case.part("train.grad.").items():
        close(gradients[ours[name]], gradient, rtol=1e-3, atol=1e-5 * float(gradient.abs().max()))


@pytest.mark.golden
def test_classifier_logits(case: Case) -> None:
    head = case.part("finetune.state_dict.")
    if not head:
        pytest.skip("this case has no classifier")
    state = {key.removeprefix("MAE_encoder."): value for key, value in case.state.items() if key.startswith("MAE_encoder.")} | head
    for layer in (1, 5):  # not stored in the fixture (0)
        state.setdefault(f"cls_head_finetune.{layer}.num_batches_tracked", torch.tensor(0))
    classifier = geossl.load_reference("point_mae", {"base_model": state}, case.config)
    close(classifier.logits(case.points), case.tensors["finetune.logits"])
