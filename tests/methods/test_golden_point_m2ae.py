"""Point-M2AE against tensors computed with published implementations.

I2P-MAE shares Point-M2AE's tokens, encoder, masks, decoder and 3D loss, so every file of ``GEOSSL_GOLDEN/i2p_mae`` of either case is run:
an I2P-MAE file as a Point-M2AE whose head is the 3D one. Its training gradients are those of both losses, so the 2D head is put beside it.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from golden_files import ROOT, GoldenFile, close, converted_names, golden_files

import geossl
from geossl import ops
from geossl.geometry import PackedPoints, PointBatch
from geossl.methods.point_m2ae import convert_reference_state


def cases() -> list[Path]:
    return golden_files("i2p_mae", lambda metadata, names: metadata.get("case") in ("Point-M2AE", "I2P-MAE") and "points" in names)


class Case(GoldenFile):
    """One golden file and the parity model built from its weights."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.two_heads = self.metadata["case"] == "I2P-MAE"
        state = self.part("state_dict.")
        self.names_of_file = [key for key in state if not key.startswith(("clip_model.", "rec_head_2d."))]
        self.state = {self.plain(key): state[key] for key in self.names_of_file}
        self.model = geossl.load_reference("point_m2ae", self.state, self.config)
        self.points = self.tensors["points"].float()
        self.batch = PointBatch(PackedPoints.from_padded(self.points))
        self.masks = [self.tensors[f"out.h_encoder.bool_masked_pos.{i}"].bool() for i in range(len(self.config["num_groups"]))]
        self.loss = "loss_3d" if self.two_heads else "rec_loss"

    @staticmethod
    def plain(key: str) -> str:
        return key.replace("rec_head_3d.", "rec_head.")

    def names(self) -> dict[str, str]:
        state = {key: self.state[self.plain(key)] for key in self.names_of_file}
        return converted_names(
            state, state, lambda filled: convert_reference_state({self.plain(key): value for key, value in filled.items()}, self.config)[1]
        )


@pytest.fixture(scope="module", params=cases(), ids=lambda path: path.stem)
def case(request: pytest.FixtureRequest) -> Case:
    return Case(request.param)


def test_a_case_is_found() -> None:
    assert cases(), f"no Point-M2AE or I2P-MAE case in {ROOT}; GEOSSL_GOLDEN must name a folder with an i2p_mae sub-folder"


@pytest.mark.golden
def test_groups_of_every_scale_are_exact(case: Case) -> None:
    for i, scale in enumerate(case.model.backbone.group(case.points)):
        close(scale.members, case.tensors[f"out.group.{i}.0"], rtol=0, atol=0)
        close(scale.centers, case.tensors[f"out.group.{i}.1"], rtol=0, atol=0)
        assert torch.equal(scale.index.flatten(), case.tensors[f"out.group.{i}.2"].long())


@pytest.mark.golden
def test_masks_of_every_scale_are_exact(case: Case) -> None:
    backbone = case.model.backbone
    scales = backbone.group(case.points)
    for hidden, expected in zip(backbone.propagate_mask(scales, case.masks[-1].flatten()), case.masks, strict=True):
        assert torch.equal(hidden, expected.flatten())
    for i in range(len(scales)):
        dropped = case.tensors.get(f"eval.bool_masked_pos.{i}")
        if dropped is not None:
            hidden = backbone.propagate_mask(scales, torch.zeros_like(case.masks[-1].flatten()))
            assert torch.equal(hidden[i], dropped.bool().flatten())


@pytest.mark.golden
def test_tokens_encoder_decoder_and_loss(case: Case) -> None:
    model, expected = case.model.eval(), case.tensors
    scales = model.backbone.group(case.points)
    hidden = [mask.flatten() for mask in case.masks]
    close(model.backbone.embeds[0](scales[0].members), expected["out.token_embed.0"])
    raw = model.backbone.encode(scales, hidden, norm=False)
    encoded = model.backbone.encode(scales, hidden)
    for i, (before, after) in enumerate(zip(raw, encoded, strict=True)):
        seen = expected[f"out.h_encoder.mask_vis.{i}"].bool()
        close(before.feats, expected[f"out.encoder_blocks.{i}"][seen])
        close(after.feats, expected[f"out.h_encoder.x_vis.{i}"][seen])
    decoder, top = model.decoder, scales[-1]
    tokens = decoder.mask_token.expand(len(top.centers), -1).index_copy(0, encoded[-1].rows, encoded[-1].feats)
    first = decoder.stages[0](tokens, decoder.positions[0](top.centers), top.segments)
    visible_first = case.masks[-1].long().argsort(dim=1, stable=True)[..., None]  # the published order: visible tokens, then hidden ones
    close(first.view(*case.masks[-1].shape, -1).take_along_dim(visible_first, 1), expected["out.h_decoder.0"])
    fine = scales[-2]
    known = encoded[-2]
    carried = decoder.propagations[0](fine.centers, fine.segments, known.feats, known.rows, first, top.centers, top.segments)
    close(carried, expected["out.token_prop.0"])
    close(decoder(scales, encoded), expected["out.decoder_norm"])
    output = model(case.batch, mask=case.masks[-1])
    close(output.aux["prediction"], expected[f"out.{case.loss}.in.0"])
    close(fine.members[hidden[-2]], expected[f"out.{case.loss}.in.1"], rtol=0, atol=0)
    close(output.loss, expected[f"out.{case.loss}"], rtol=1e-5, atol=0)


@pytest.mark.golden
def test_linear_probe_feature(case: Case) -> None:
    """The published probe leaves out tokens that no coarser one covers; forward does so too with the options of an official file."""
    tokens = case.model.eval().backbone(case.points)
    per_cloud = tokens.feats.view(len(case.points), -1, tokens.feats.shape[1])
    largest = per_cloud.max(1).values
    close(largest if case.two_heads else largest + per_cloud.mean(1), case.tensors["eval.svm_feature"])


@pytest.mark.golden
def test_training_losses_and_gradients(case: Case) -> None:
    """In float64: in float32 the rounding of the machine at hand decides on which side of a ReLU a value of 1e-6 lies."""
    model = geossl.load_reference("point_m2ae", case.state, case.config).double().train()
    tensors, hidden = case.tensors, [mask.flatten() for mask in case.masks]
    loss = model(PointBatch(PackedPoints.from_padded(case.points.double())), mask=case.masks[-1]).loss
    if case.two_heads:
        close(loss, tensors["train.loss_3d"], rtol=1e-5, atol=0)
        image = torch.nn.Linear(*reversed(tensors["state_dict.rec_head_2d.weight"].shape[:2])).double()
        image.load_state_dict({k: v.float().reshape(image.state_dict()[k].shape) for k, v in case.part("state_dict.rec_head_2d.").items()})
        scales = model.backbone.group(case.points.double())
        decoded = model.decoder(scales, model.backbone.encode(scales, hidden))
        prediction = model.head(decoded[hidden[-2]]).view(-1, model.config.predicted_points, 3)
        image_loss = F.mse_loss(image(decoded[~hidden[-2]]).view_as(tensors["out.loss_2d.in.1"]), tensors["out.loss_2d.in.1"].double())
        close(image_loss, tensors["train.loss_2d"], rtol=1e-5, atol=0)
        loss = ops.chamfer_distance_patches(prediction, scales[-2].members[hidden[-2]]) + image_loss
    else:
        close(loss, tensors["train.loss"], rtol=1e-5, atol=0)
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    ours = case.names()
    if case.two_heads:
        gradients |= {"weight": image.weight.grad, "bias": image.bias.grad}
        ours |= {f"rec_head_2d.{key}": key for key in ("weight", "bias")}
    names, norms = json.loads(case.metadata["grad_norm_names"]), tensors["train.grad_norms"]
    assert {ours[name] for name in names} == {name for name, gradient in gradients.items() if gradient is not None}
    for name, norm in zip(names, norms, strict=True):
        torch.testing.assert_close(
            gradients[ours[name]].norm(), norm.double(), rtol=1e-3, atol=1e-5 * float(norms.max()), msg=lambda m, n=name: f"{n}: {m}"
        )
    for name, gradient in case.part("train.grad.").items():
        close(gradients[ours[name]], gradient, rtol=1e-3, atol=1e-5 * float(gradient.abs().max()))
