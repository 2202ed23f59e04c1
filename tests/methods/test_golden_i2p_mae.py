"""I2P-MAE against tensors computed with the published implementation: every file of ``GEOSSL_GOLDEN/i2p_mae`` with a teacher inside.

Tokens, encoder and decoder it shares with Point-M2AE; ``test_golden_point_m2ae.py`` runs these files too.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from golden_files import ROOT, GoldenFile, close, converted_names, golden_files

import geossl
from geossl.geometry import PackedPoints, PointBatch
from geossl.layers import project_views
from geossl.methods import reference_teacher
from geossl.methods.i2p_mae import I2PMAE, convert_reference_state, point_rows


def cases() -> list[Path]:
    return golden_files("i2p_mae", lambda metadata, names: metadata.get("case") == "I2P-MAE" and "out.mask_probs" in names)


class Case(GoldenFile):
    """One golden file, and how to build the parity model with its teacher."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.state = self.part("state_dict.")
        self.teacher = reference_teacher(self.state, heads=json.loads(self.metadata["clip_visual"])["heads"])
        self.batch = PointBatch(PackedPoints.from_padded(self.tensors["points"].float()))
        ids = self.tensors["mask.ids_shuffle"].long()
        visible = ids.shape[1] - int(self.config["mask_ratio"] * ids.shape[1])
        self.mask = torch.ones(ids.shape, dtype=torch.bool).scatter(1, ids[:, :visible], False)

    def model(self) -> I2PMAE:
        model = geossl.load_reference("i2p_mae", self.state, self.config)
        assert isinstance(model, I2PMAE)
        model.teacher.use(self.teacher)
        return model

    def names(self) -> dict[str, str]:
        published = [key for key in self.state if not key.startswith("clip_model.")]
        return converted_names(published, self.state, lambda filled: convert_reference_state(filled, self.config)[1])


@pytest.fixture(scope="module", params=cases(), ids=lambda path: path.stem)
def case(request: pytest.FixtureRequest) -> Case:
    return Case(request.param)


def test_a_case_is_found() -> None:
    assert cases(), f"no I2P-MAE case in {ROOT}; GEOSSL_GOLDEN must name a folder with an i2p_mae sub-folder"


@pytest.mark.golden
def test_images_and_what_the_teacher_says_of_them(case: Case) -> None:
    images = project_views(case.batch.points).images
    close(images[:, 0, ::8, ::8], case.tensors["out.images_stride8"])
    torch.testing.assert_close(images.double().sum((1, 2, 3)).float(), case.tensors["out.images_sum"], rtol=1e-4, atol=0.05)
    seen = case.model().teacher(case.batch.points)
    close(seen.features, case.tensors["out.clip_feats"])
    close(seen.saliency, case.tensors["out.clip_saliency"])


@pytest.mark.golden
def test_masks_and_both_losses(case: Case) -> None:
    model, expected = case.model().eval(), case.tensors
    output = model(case.batch, mask=case.mask)
    close(output.aux["probability"], expected["out.mask_probs"])
    scales, hidden = output.aux["scales"], output.aux["hidden"]
    for i, (scale, mask) in enumerate(zip(scales, hidden, strict=True)):
        close(scale.members, expected[f"out.group.{i}.0"], rtol=0, atol=0)
        close(scale.centers, expected[f"out.group.{i}.1"], rtol=0, atol=0)
        assert torch.equal(scale.index.flatten(), expected[f"out.group.{i}.2"].long())
        assert torch.equal(mask, expected[f"out.h_encoder.bool_masked_pos.{i}"].bool().flatten())
    close(output.aux["prediction"], expected["out.loss_3d.in.0"])
    rebuilt = hidden[-model.stages]
    close(scales[-model.stages].members[rebuilt], expected["out.loss_3d.in.1"], rtol=0, atol=0)
    decoded = model.decoder(scales, model.backbone.encode(scales, hidden))
    close(decoded, expected["out.decoder_norm"])
    close(model.feature_head(decoded[~rebuilt]), expected["out.loss_2d.in.0"])
    close(output.metrics["chamfer_x1000"], 1000 * expected["out.loss_3d"], rtol=1e-5, atol=0)
    close(output.metrics["feature_x1000"], 1000 * expected["out.loss_2d"], rtol=1e-5, atol=0)
    close(output.loss, expected["out.loss_3d"] + expected["out.loss_2d"], rtol=1e-5, atol=0)


@pytest.mark.golden
def test_targets_of_the_visible_tokens(case: Case) -> None:
    """A head that predicts nothing has the mean square of the targets as its loss; one that predicts them all, none."""
    model, expected = case.model().eval(), case.tensors["out.loss_2d.in.1"].float()
    scales = model.backbone.group(case.batch.points)
    hidden = model.backbone.propagate_mask(scales, case.mask.flatten())
    visible = ~hidden[-model.stages]
    count = int(visible.sum())
    model.feature_head = torch.nn.Linear(count, expected[0].numel())  # a token that is one row of the identity reads one column
    torch.nn.init.zeros_(model.feature_head.bias)
    with torch.no_grad():
        model.feature_head.weight.copy_(expected.flatten(1).T)
    decoded = torch.zeros(len(visible), count)
    decoded[visible] = torch.eye(count)
    loss = model.feature_loss(decoded, case.batch, model.look(case.batch), scales, point_rows(scales), visible)
    assert float(loss.sqrt()) < 2e-5
    nothing = model.feature_loss(0 * decoded, case.batch, model.look(case.batch), scales, point_rows(scales), visible)
    close(nothing, expected.square().mean())


@pytest.mark.golden
def test_linear_probe_feature(case: Case) -> None:
    tokens = case.model().eval().backbone(case.batch.points)
    largest = tokens.feats.view(len(case.batch), -1, tokens.feats.shape[1]).max(1).values
    close(largest, case.tensors["eval.svm_feature"])


@pytest.mark.golden
def test_training_losses_and_gradients(case: Case) -> None:
    """Gradients in float64: in float32 the rounding of the machine at hand decides on which side of a ReLU a value of 1e-6 lies."""
    tensors = case.tensors
    output = case.model().train()(case.batch, mask=case.mask)
    close(output.metrics["chamfer_x1000"], 1000 * tensors["train.loss_3d"], rtol=1e-5, atol=0)
    close(output.metrics["feature_x1000"], 1000 * tensors["train.loss_2d"], rtol=1e-5, atol=0)
    model = case.model().double().train()
    group = model.backbone.group
    model.backbone.group = lambda points: [s._replace(centers=s.centers.double(), members=s.members.double()) for s in group(points)]
    model(case.batch, mask=case.mask).loss.backward()
    gradients, ours = {name: parameter.grad for name, parameter in model.named_parameters()}, case.names()
    names, norms = json.loads(case.metadata["grad_norm_names"]), tensors["train.grad_norms"]
    assert {ours[name] for name in names} == {name for name, gradient in gradients.items() if gradient is not None}
    for name, norm in zip(names, norms, strict=True):
        torch.testing.assert_close(
            gradients[ours[name]].norm(), norm.double(), rtol=1e-3, atol=1e-5 * float(norms.max()), msg=lambda m, n=name: f"{n}: {m}"
        )
    for name, gradient in case.part("train.grad.").items():
        close(gradients[ours[name]], gradient, rtol=1e-3, atol=1e-5 * float(gradient.abs().max()))
