"""PoLAr-MAE against tensors computed with the published implementation.

Every file of ``GEOSSL_GOLDEN/polar_mae`` is dispatched on its metadata and tensors, so further cases of the same form need no code:
point the variable at their folder.
"""

from __future__ import annotations

import dataclasses
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from golden_files import ROOT, GoldenFile, close, converted_names, golden_files
from torch import Tensor

import geossl
from geossl.geometry import PackedPoints, PointBatch, euler_to_matrix
from geossl.layers import Segments, VolumeTokenizer
from geossl.methods.polar_mae import HiddenPoints, PolarMAE, convert_reference_state
from geossl.models import VolumePointViT, VolumePointViTConfig
from geossl.models.point_vit_volume import VolumeGroups, convert_reference_encoder, reference_encoder_config


def cases(tensor: str) -> list[Path]:
    """Files that have a tensor of this name."""
    return golden_files("polar_mae", lambda metadata, names: tensor in names)


class Case(GoldenFile):
    """A model file: its tensors, the official state and the events in packed form."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.config |= {"center": 0.0, "scale": 1.0}  # the points of the files are already centred and scaled
        self.ctor: dict[str, Any] = json.loads(self.metadata["ctor"])
        self.state = {key: value.float() for key, value in self.part("state.").items()}
        self.state |= {key: value.float() / 16 for key, value in self.part("state_x16.").items()}
        lengths = self.tensors["in.lengths"]
        self.batch = PointBatch(PackedPoints.from_padded(self.tensors["in.points"], lengths))
        self.valid = self.tensors["tok.emb_mask"]
        self.begin = self.batch.points.offsets[:-1]

    def expected(self, name: str) -> Tensor:
        """A tensor ``[B, T, ...]`` where there are tokens, ``[sum T, ...]``."""
        return self.tensors[name][self.valid]

    def backbone(self) -> VolumePointViT:
        encoder = convert_reference_encoder({k.removeprefix("encoder."): v for k, v in self.state.items() if k.startswith("encoder.")})
        backbone = VolumePointViT(reference_encoder_config(encoder, self.config))
        backbone.load_state_dict(encoder)
        return backbone.eval()


@pytest.fixture(scope="module", params=cases("tok.tokens"), ids=lambda path: path.stem)
def case(request: pytest.FixtureRequest) -> Case:
    return Case(request.param)


class Pretraining(Case):
    """A pretraining file and its parity model."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.model: PolarMAE = geossl.load_reference("polar_mae", self.state, self.config)  # type: ignore[assignment]
        self.model.config = dataclasses.replace(self.model.config, rotation="none")
        self.mask = self.expected("mask.masked")
        self.weights = self.ctor.get("loss_weights", {})

    def names(self) -> dict[str, str]:
        names = converted_names(self.state, self.state, lambda filled: convert_reference_state(filled, self.config)[1])
        assert len(names) == len(self.state)
        return names


@pytest.fixture(scope="module", params=cases("mask.masked"), ids=lambda path: path.stem)
def pretraining(request: pytest.FixtureRequest) -> Pretraining:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return Pretraining(request.param)


def test_cases_are_found() -> None:
    assert cases("tok.tokens"), f"no case in {ROOT}; GEOSSL_GOLDEN must name a folder with a polar_mae sub-folder"
    assert cases("mask.masked")


# Tokens -----------------------------------------------------------------------------------------------------------------------------------


def tokenizer_cases() -> list[tuple[Path, str]]:
    files = golden_files("polar_mae", lambda metadata, names: "configs" in metadata)
    return [(path, name) for path in files for name in json.loads(GoldenFile(path).metadata["configs"])]


def check_tokens(groups: VolumeGroups, idx: Tensor, point_mask: Tensor, emb_mask: Tensor, begin: Tensor) -> None:
    """Every slot of every token holds the point that the published code puts there."""
    assert list(groups.segments.lengths) == emb_mask.sum(1).tolist()
    assert torch.equal(groups.row_splits.diff(), point_mask[emb_mask].sum(1))
    expected = (idx.long() + begin[:, None, None])[emb_mask][point_mask[emb_mask]]
    assert torch.equal(groups.index, expected)


@pytest.mark.golden
@pytest.mark.parametrize(("path", "name"), tokenizer_cases(), ids=lambda value: value if isinstance(value, str) else value.stem)
def test_tokens_of_full_events_are_exact(path: Path, name: str) -> None:
    file = GoldenFile(path)
    tensors = file.tensors
    events = PackedPoints.from_padded(tensors["in.points"], tensors["in.lengths"])
    config = {"tok": json.loads(file.metadata["configs"])[name], "center": 0.0, "scale": 1.0}
    stub = {
        "position.2.bias": torch.zeros(8),
        "blocks.blocks.0": torch.zeros(1),
        **{f"embed.conv{i}.weight": torch.zeros(8, 4) for i in (1, 2, 3)},
    }
    backbone = VolumePointViT(reference_encoder_config(stub, config | {"heads": 2}))
    groups = backbone.group(events)
    emb_mask = tensors[f"{name}.emb_mask"]
    check_tokens(groups, tensors[f"{name}.idx"], tensors[f"{name}.point_mask"], emb_mask, events.offsets[:-1])
    close(groups.centers, tensors[f"{name}.centers"][emb_mask][:, :3], rtol=1e-6, atol=1e-7)
    # The published sums count the copies of slot 0 in empty slots.
    slots = tensors[f"{name}.idx"].shape[2]
    count = groups.row_splits.diff()
    sums = geossl.ops.segment_reduce(groups.points, groups.row_splits, "sum")
    sums = sums + (slots - count)[:, None] * groups.points[groups.row_splits[:-1]]
    close(sums, tensors[f"{name}.groups_sum_over_points"][emb_mask], rtol=1e-4, atol=1e-4)


@pytest.mark.golden
def test_tokens_of_the_models_are_exact(case: Case) -> None:
    t = case.tensors
    groups = case.backbone().group(case.batch.points)
    check_tokens(groups, t["tok.idx"], t["tok.point_mask"], case.valid, case.begin)
    close(groups.points, t["tok.groups"][case.valid][t["tok.point_mask"][case.valid]], rtol=1e-5, atol=1e-6)
    close(groups.centers, case.expected("tok.centers")[:, :3], rtol=0, atol=1e-7)
    labels = t["in.semantic_id"].long()[..., 0]
    packed = torch.cat([row[:n] for row, n in zip(labels, t["in.lengths"].tolist(), strict=True)])
    assert torch.equal(packed[groups.index], t["tok.semantic_id_groups"][case.valid][..., 0][t["tok.point_mask"][case.valid]].long())


@pytest.mark.golden
def test_embedding_and_position(case: Case) -> None:
    backbone = case.backbone()
    groups = backbone.group(case.batch.points)
    with torch.no_grad():
        close(backbone.embed(groups.points, groups.row_splits), case.expected("tok.tokens"))
        close(backbone.position(groups.centers), case.expected("tok.pos_embed"))


@pytest.mark.golden
@pytest.mark.filterwarnings("ignore:this model normalises")
@pytest.mark.parametrize("path", sorted(set(cases("enc.hidden")) - set(cases("mask.masked"))), ids=lambda path: path.stem)
def test_hidden_states_of_all_tokens(path: Path) -> None:
    """Of files without a mask; the others hold those of visible tokens."""
    case = Case(path)
    with torch.no_grad():
        _, features = case.backbone().forward_intermediates(case.batch.points, norm=False)
    for feature, expected in zip(features, case.tensors["enc.hidden"], strict=True):
        close(feature, expected[case.valid])


# Pretraining ------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.golden
@pytest.mark.filterwarnings("ignore:this model normalises")
def test_activations_and_losses(pretraining: Pretraining) -> None:
    model, t, mask = pretraining.model.eval(), pretraining.tensors, pretraining.mask
    backbone = model.backbone
    with torch.no_grad():
        groups = backbone.group(pretraining.batch.points)
        visible = t["mask.unmasked"]
        seen = Segments(tuple(visible.sum(1).tolist()))
        hidden: list[Tensor] = []
        encoded = backbone.encode(groups, (~mask).nonzero()[:, 0], seen, intermediates=hidden)
        for feature, expected in zip(hidden, t["enc.hidden"], strict=True):
            close(feature, expected[visible])
        close(encoded, t["enc.out"][visible])
        close(backbone.encode(groups), pretraining.expected("enc.out_unmasked_input"))
        decoded = model.decode(groups, mask)
        close(decoded, t["dec.out"][t["mask.masked"]])
        output = model(pretraining.batch, mask=mask)
        hidden_points = HiddenPoints(groups, mask, model.slots)
        close(output.aux["prediction"], t["head.pred_points"])
        close(output.metrics["chamfer"], t["loss.eval.chamfer"], rtol=1e-5, atol=0)
        if model.config.energy:
            close(model.patch_embed(hidden_points.points[:, :3], hidden_points.row_splits), t["head.patch_embed"])
            close(output.aux["energy"], t["head.pred_energy"])
            close(output.metrics["energy"], t["loss.eval.energy"], rtol=1e-5, atol=0)


@pytest.mark.golden
@pytest.mark.filterwarnings("ignore:this model normalises")
def test_attention_of_visible_tokens(pretraining: Pretraining) -> None:
    """The last block's weights in the first event: the published ones of hidden keys are zero."""
    t, backbone = pretraining.tensors, pretraining.model.eval().backbone
    groups = backbone.group(pretraining.batch.points)
    rows = (~pretraining.mask).nonzero()[:, 0]
    seen = t["mask.unmasked"]
    visible = groups._replace(centers=groups.centers[rows], segments=Segments(tuple(seen.sum(1).tolist())))
    with torch.no_grad():
        tokens = backbone.embed(groups.points, groups.row_splits, rows)
        position = backbone.position(visible.centers)
        outputs = [tokens]
        backbone.blocks(tokens, position, visible.segments, intermediates=outputs)
        block: Any = backbone.blocks.blocks[-1]
        weights = block.attn.weights(block.norm1(outputs[-2] + position), visible.segments)
    close(weights[0][0], t["enc.attn_last_event0_head0"][seen[0]][:, seen[0]])


@pytest.mark.golden
def test_training_losses_gradients_and_running_means(pretraining: Pretraining) -> None:
    model, t = pretraining.model, pretraining.tensors
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.train()
    for stack in (model.backbone.blocks, model.decoder):
        stack.drop_path_rates = [0.0] * len(stack)
        for block in stack.blocks:
            block.attn.dropout = 0.0
    model.zero_grad()
    output = model(pretraining.batch, mask=pretraining.mask)
    output.loss.backward()
    close(output.loss, t["loss.train_nodrop.total"], rtol=1e-5, atol=0)
    for name in ("chamfer", "energy"):
        if f"loss.train_nodrop.{name}" in t:
            close(output.metrics[name], t[f"loss.train_nodrop.{name}"], rtol=1e-5, atol=0)
    ours, gradients = pretraining.names(), {name: p.grad for name, p in model.named_parameters()}
    for name, norm in zip(json.loads(pretraining.metadata["param_order"]), t["grad.norms"], strict=True):
        gradient = gradients[ours[name]]
        assert (gradient is None) == bool(norm.isnan()), name
        if gradient is not None:
            atol = 1e-6 if not name.endswith("first_conv.3.bias") else 1e-5
            close(gradient.norm(), norm, rtol=1e-3, atol=atol, name=name)
    for name, gradient in ((k.removeprefix("grad."), v) for k, v in t.items() if k.startswith("grad.") and k != "grad.norms"):
        close(gradients[ours[name]], gradient, rtol=1e-3, atol=1e-6, name=name)
    buffers = dict(model.named_buffers())
    for name, value in ((k.removeprefix("bn_after."), v) for k, v in t.items() if k.startswith("bn_after.")):
        close(buffers[ours[name]], value, rtol=0, atol=1e-6, name=name)
    model.load_state_dict(before)


@pytest.mark.golden
@pytest.mark.parametrize("path", cases("rot.matrix"), ids=lambda path: path.stem)
def test_euler_rotations(path: Path) -> None:
    t = GoldenFile(path).tensors
    matrix = euler_to_matrix(t["rot.euler_xyz"])
    close(matrix, t["rot.matrix"], atol=1e-6)
    close(t["knn.a"] @ matrix.T, t["rot.points_out"], atol=1e-6)


def test_the_released_tokenizer_is_the_preset() -> None:
    assert VolumePointViTConfig().tokenizer() == VolumeTokenizer(radius=5.0, overlap=0.72, max_neighbors=256, ball_points=256, slots=32)
