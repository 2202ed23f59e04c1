"""PoLAr-MAE's segmentation against tensors computed with the published implementation.

Every file of ``GEOSSL_GOLDEN/polar_mae`` whose metadata says ``model = SemanticSegmentation`` is run, so further cases of the same form
need no code: point the variable at their folder.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from golden_files import ROOT, GoldenFile, close, converted_names, golden_files
from torch import Tensor

import geossl
from geossl.geometry import PackedPoints, PointBatch
from geossl.tasks.segmentation import Segmentation, convert_segmentation_state, fuse_layers

pytestmark = [pytest.mark.golden, pytest.mark.filterwarnings("ignore:this model normalises")]


def segmentation_cases() -> list[Path]:
    return golden_files("polar_mae", lambda metadata, names: metadata.get("model") == "SemanticSegmentation")


class Case(GoldenFile):
    """One golden file: its tensors, packed, and the parity model built from its weights."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.extra, self.param_order = json.loads(self.metadata["ctor"]), json.loads(self.metadata["param_order"])
        self.config |= {"center": 0.0, "scale": 1.0}  # the points of the files are already centred and scaled
        self.config["layers"] = self.extra.get("seg_head_fetch_layers", (3, 7, 11))
        self.state = {key: value.float() for key, value in self.part("state.").items()}
        self.state |= {key: value.float() / 16 for key, value in self.part("state_x16.").items()}
        self.model: Segmentation = geossl.load_reference("polar_mae", self.state, self.config)  # type: ignore[assignment]
        self.model.config = dataclasses.replace(self.model.config, rotation="none")
        self.point_mask, self.token_mask = self.tensors["seg.point_mask"], self.tensors["tok.emb_mask"]
        events = PackedPoints.from_padded(self.tensors["in.points"], self.tensors["in.lengths"])
        self.batch = PointBatch(events, point_label=self.tensors["in.semantic_id"][..., 0].long()[self.point_mask])

    def points(self, name: str) -> Tensor:
        return self.tensors[name][self.point_mask]

    def tokens(self, name: str) -> Tensor:
        return self.tensors[name][self.token_mask]

    def names(self) -> dict[str, str]:
        return converted_names(self.state, self.state, lambda filled: convert_segmentation_state(filled, self.config)[1])


@pytest.fixture(scope="module", params=segmentation_cases(), ids=lambda path: path.stem)
def case(request: pytest.FixtureRequest) -> Case:
    return Case(request.param)


def test_a_case_is_found() -> None:
    assert segmentation_cases(), f"no segmentation case in {ROOT}; GEOSSL_GOLDEN must name a folder with a polar_mae sub-folder"


def test_layers_are_fused_as_published(case: Case) -> None:
    if case.model.decoder is not None:
        pytest.skip("this case has a decoder instead")
    hidden = [layer[case.token_mask] for layer in case.tensors["enc.hidden"]]
    close(fuse_layers([hidden[i] for i in case.model.config.layers], batchwide=True), case.tokens("seg.token_features"))


@torch.no_grad()
def test_the_head_on_given_token_features(case: Case) -> None:
    model, events, feats, centers = case.model.eval(), case.batch.points, case.tokens("seg.token_features"), case.tokens("tok.centers")
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), case.token_mask.sum(1).cumsum(0)])
    index, _ = model.head.token_weights(events.coord, events.offsets, centers[:, :3], offsets)
    local = index - offsets[:-1].repeat_interleave(events.lengths)[:, None]
    close(local, case.points("seg.knn_idx").long(), rtol=0, atol=0)
    x = model.head.upsample(events.coord, events.offsets, feats, centers[:, :3], offsets)
    close(x[:, :8], case.points("seg.upsampled_first8"))
    close(x.mean(1), case.points("seg.upsampled_mean_over_channels"))
    shared = model.global_features(feats, offsets)
    if shared is not None:
        close(shared, torch.cat([case.tensors["seg.global_max"], case.tensors["seg.global_mean"]], 1))
    close(model.head(x, events.offsets, shared).log_softmax(1), case.points("seg.log_probs"), rtol=0, atol=1e-4)


@torch.no_grad()
def test_the_whole_model(case: Case) -> None:
    model = case.model.eval()
    close(model.token_features(model.backbone.group(case.batch.points)), case.tokens("seg.token_features"))
    output = model(case.batch)
    close(output.aux["log_probs"], case.points("seg.log_probs"), rtol=0, atol=1e-4)
    close(output.loss, case.tensors["loss.eval.focal"], rtol=1e-5, atol=0)
    assert torch.equal(model.predict(case.batch.points), case.points("seg.pred").long())


def test_training_loss_and_every_gradient(case: Case) -> None:
    model, t = case.model, case.tensors
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.train()
    model.head.dropout.p = 0.0
    for stack in (model.backbone.blocks, *([] if model.decoder is None else [model.decoder])):
        stack.drop_path_rates = [0.0] * len(stack)
        for block in stack.blocks:
            block.attn.dropout = 0.0
    model.zero_grad()
    loss = model(case.batch).loss
    loss.backward()
    close(loss, t["loss.train_nodrop.focal"], rtol=1e-5, atol=0)
    ours, gradients = case.names(), {name: p.grad for name, p in model.named_parameters()}
    for name, norm in zip(case.param_order, t["grad.norms"], strict=True):
        gradient = gradients[ours[name]]
        assert (gradient is None) == bool(norm.isnan()), name
        if gradient is not None:
            close(gradient.norm(), norm, rtol=1e-3, atol=1e-5 if name.endswith("first_conv.3.bias") else 1e-6, name=name)
    for name, gradient in ((k.removeprefix("grad."), v) for k, v in t.items() if k.startswith("grad.") and k != "grad.norms"):
        close(gradients[ours[name]], gradient, rtol=1e-3, atol=1e-6, name=name)
    buffers = dict(model.named_buffers())
    for name, value in ((k.removeprefix("bn_after."), v) for k, v in t.items() if k.startswith("bn_after.")):
        close(buffers[ours[name]], value, rtol=0, atol=1e-6, name=name)
    model.load_state_dict(before)


def test_another_state_is_refused(case: Case) -> None:
    from geossl.errors import CheckpointError

    with pytest.raises(CheckpointError, match="not a PoLAr-MAE segmentation checkpoint"):
        convert_segmentation_state({k: v for k, v in case.state.items() if not k.startswith("seg_head.conv3")})
    with pytest.raises(CheckpointError, match=r"unexpected \(1\): seg_head\.extra"):
        geossl.load_reference("polar_mae", case.state | {"seg_head.extra": torch.zeros(1)}, case.config)
    with pytest.raises(CheckpointError, match=r"missing \(1\): head\.norm1\.running_mean"):
        geossl.load_reference("polar_mae", {k: v for k, v in case.state.items() if k != "seg_head.bn1.running_mean"}, case.config)
