"""Point-M2AE: what is hidden stays unseen, the loss falls, batches may be split, official files load whole or not at all."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import geossl
from geossl.engine.optim import OptimConfig, build_optimizer
from geossl.errors import CheckpointError, ConfigError
from geossl.geometry import PackedPoints, PointBatch
from geossl.methods import METHODS, PointM2AE
from geossl.methods.reference import find_system

SCALES = {
    "dims": (8, 12, 24),
    "depths": (1, 1, 1),
    "heads": 2,
    "groups": (24, 16, 8),
    "group_sizes": (6, 4, 4),
    "embed_widths": (8, 16, 16),
}


def tiny(columns: int = 3, scales: dict | None = None, **options) -> PointM2AE:
    torch.manual_seed(0)
    backbone = geossl.create_backbone("point_m2ae_tiny", **SCALES | (scales or {}), in_channels=columns)
    options = {"decoder_heads": 2, "decoder_drop_path": 0.0, "predicted_points": 5} | options
    return dataclasses.replace(METHODS.config("point_m2ae"), **options).build(backbone)


def clouds(*lengths: int, columns: int = 3) -> PointBatch:
    rows = torch.randn(sum(lengths), columns, generator=torch.Generator().manual_seed(0))
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    return PointBatch(PackedPoints(rows[:, :3], offsets, rows[:, 3:] if columns > 3 else None))


@pytest.mark.parametrize(
    ("columns", "options"),
    [(3, {}), (6, {}), (3, {"decoder_depths": (1,)}), (3, {"decoder_depths": (1, 2, 1), "decoder_units": 2, "decoder_drop_path": 0.2})],
)
def test_the_loss_falls_on_one_batch_whatever_scale_is_reconstructed(columns, options):
    method, batch = tiny(columns, **options).train(), clouds(60, 60, 60, columns=columns)
    optimiser = torch.optim.AdamW(method.parameters(), lr=3e-3)
    losses = []
    for _ in range(40):
        output = method(batch, generator=torch.Generator().manual_seed(1))
        optimiser.zero_grad()
        output.loss.backward()
        optimiser.step()
        losses.append(float(output.loss.detach()))
    assert losses[-1] < 0.7 * losses[0]
    hidden = output.aux["hidden"][-len(method.config.decoder_depths)]
    assert output.aux["prediction"].shape == (int(hidden.sum()), 5, 3)


def test_every_parameter_that_is_trained_gets_a_gradient():
    method = tiny().train()
    method(clouds(60, 60)).loss.backward()
    assert {name for name, p in method.named_parameters() if p.grad is None} == {"backbone.norms.0.weight", "backbone.norms.0.bias"}
    assert all((p.grad is not None) == p.requires_grad for p in method.parameters())


def test_hidden_points_reach_the_prediction_only_through_their_centres():
    method, batch = tiny().eval(), clouds(60)
    scales = method.backbone.group(batch.points)
    hidden = method.backbone.propagate_mask(scales, torch.arange(8) >= 2)
    members = scales[0].members.clone().requires_grad_()
    method.reconstruct([scales[0]._replace(members=members), *scales[1:]], hidden).sum().backward()
    touched = members.grad.abs().sum((1, 2)) > 0
    assert torch.equal(touched, ~hidden[0])


def test_a_batch_of_ragged_clouds_equals_its_clouds_one_by_one():
    method, batch = tiny().eval(), clouds(60, 5, 17)
    scales = method.backbone.group(batch.points)
    tops = [torch.arange(n) >= max(n // 4, 1) for n in scales[-1].segments.lengths]
    together = method.reconstruct(scales, method.backbone.propagate_mask(scales, torch.cat(tops)))
    alone = []
    for cloud, top in zip(batch.points.coord.split([60, 5, 17]), tops, strict=True):
        own = method.backbone.group(cloud[None])
        alone.append(method.reconstruct(own, method.backbone.propagate_mask(own, top)))
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-5)


def test_halves_of_a_batch_hide_what_the_whole_batch_hides():
    method, batch = tiny().eval(), clouds(60, 60, 60, 60)
    whole = method(batch, generator=torch.Generator().manual_seed(5)).aux["hidden"]
    parts = []
    for rank in range(2):
        slot = torch.arange(rank, 4, 2)
        points = PackedPoints.from_padded(batch.points.coord.view(4, 60, 3)[slot])
        parts.append(method(PointBatch(points, slot=slot, global_size=4), generator=torch.Generator().manual_seed(5)).aux["hidden"])
    for mask, first, second in zip(whole, *parts, strict=True):
        assert torch.equal(torch.stack([first.view(2, -1), second.view(2, -1)], 1).flatten(0, 1), mask.view(4, -1))
    assert whole[-1].view(4, 8).sum(1).tolist() == [6] * 4  # int(0.8 * 8)


@pytest.mark.parametrize("lengths", [(1,), (1, 60), (2, 3)])
def test_clouds_of_few_points_have_a_finite_loss(lengths):
    output = tiny().eval()(clouds(*lengths))
    assert output.loss.isfinite()
    assert all(p["input"].shape == (n, 3) for p, n in zip(tiny().eval().pictures(clouds(*lengths)), lengths, strict=True))


def test_pictures_hold_the_parts_of_each_cloud():
    method, batch = tiny().eval(), clouds(60, 40)
    pictures = method.pictures(batch, generator=torch.Generator().manual_seed(0))
    output = method(batch, generator=torch.Generator().manual_seed(0))
    hidden = [part.split(sizes) for part, sizes in zip(output.aux["hidden"], ([24, 24], [16, 16], [8, 8]), strict=True)]
    for number, picture in enumerate(pictures):
        assert picture["visible"].shape == (6 * int((~hidden[0][number]).sum()), 3)
        assert picture["reconstruction"].shape == (5 * int(hidden[1][number].sum()), 3)
        inputs = {tuple(point) for point in picture["input"].round(3).tolist()}
        assert {tuple(point) for point in picture["visible"].round(3).tolist()} <= inputs


def test_the_published_weight_decay_rule_is_an_option():
    config = OptimConfig(weight_decay=0.05)
    for decay_all_layers, undecayed in ((True, False), (False, True)):
        method = tiny(decay_token_layers=decay_all_layers)
        groups = {id(p): group["weight_decay"] for group in build_optimizer(method, config).param_groups for p in group["params"]}
        for weight in (method.backbone.embeds[1].conv3.weight, method.decoder.propagations[0].fuse.weight):
            assert (groups[id(weight)] == 0) is undecayed
        assert groups[id(method.decoder.mask_token)] == 0
        assert groups[id(method.backbone.blocks[0].blocks[0].attn.qkv.weight)] == 0.05


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mask_ratio": 0.0}, "mask_ratio must lie strictly between 0 and 1, got 0.0"),
        ({"decoder_depths": ()}, "decoder_depths must be numbers of at least 1, coarsest scale first"),
        ({"decoder_depths": (1, 1, 1, 1)}, "decoder_depths has 4 scales but the backbone only 3; leave out the last ones"),
        ({"predicted_points": 0}, "predicted_points must be at least 1, got 0"),
        ({"decoder_heads": 5}, r"decoder_heads must divide the backbone's dims \(12, 24\), got 5"),
        ({"decoder_drop_path": 1.0}, r"decoder_drop_path must lie in \[0, 1\), got 1.0"),
    ],
)
def test_wrong_options_are_refused_by_name(options, message):
    with pytest.raises(ConfigError, match=message):
        tiny(**options)


def test_another_backbone_is_refused():
    with pytest.raises(ConfigError, match=r"method point_m2ae needs a point_m2ae_\* backbone, got PointViT"):
        METHODS.config("point_m2ae").build(geossl.create_backbone("point_vit_tiny"))


# Official files ---------------------------------------------------------------------------------------------------------------------------


CONFIG = {"num_groups": [24, 16, 8], "group_sizes": [6, 4, 4], "num_heads": 2, "local_radius": [0.3, 0.6, 1.2]}


def test_official_files_load_with_all_published_behaviour_and_give_the_same_numbers(tmp_path, published_names):
    method, batch = tiny().eval(), clouds(60, 60)
    state = published_names(method)
    torch.save({"base_model": {f"module.{key}": value for key, value in state.items()}, "epoch": 300}, tmp_path / "pretrain.pth")
    assert find_system(tmp_path / "pretrain.pth") == "point_m2ae"
    loaded = geossl.load_reference("point_m2ae", tmp_path / "pretrain.pth", CONFIG)
    assert isinstance(loaded, PointM2AE)
    for name, value in method.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    geossl.models.save_backbone(loaded.backbone, tmp_path / "saved")
    config = loaded.backbone.config
    assert geossl.load(tmp_path / "saved").config == config
    assert (config.min_sq_norm, config.first_token_visible, config.drop_uncovered, config.padding_attended) == (1e-3, True, True, True)
    assert config.local_radius == (0.3, 0.6, 1.2)
    assert not loaded.config.decay_token_layers
    sound = dataclasses.replace(method.backbone.config, min_sq_norm=1e-3, first_token_visible=True, padding_attended=True)
    method.backbone.config = dataclasses.replace(sound, local_radius=config.local_radius)
    assert torch.equal(loaded(batch, mask=torch.arange(16) % 8 > 1).loss, method(batch, mask=torch.arange(16) % 8 > 1).loss)


def test_released_numbers_are_assumed_without_a_configuration(published_names):
    backbone = geossl.create_backbone("point_m2ae_small")
    state = published_names(METHODS.config("point_m2ae").build(backbone))
    assert len(state) == 293
    config = geossl.load_reference("point_m2ae", state).backbone.config
    assert (config.groups, config.group_sizes, config.depths, config.heads) == ((512, 256, 64), (16, 8, 8), (5, 5, 5), 6)
    assert config.local_radius == (0.32, 0.64, 1.28)


def test_extra_missing_and_foreign_weights_are_listed(published_names):
    state = published_names(tiny()) | {"h_encoder.surprise.weight": torch.ones(1), "clip_model.proj": torch.ones(1)}
    del state["decoder_norm.bias"]
    message = r"(?s)missing \(1\): decoder.norm.bias.*unexpected \(2\): .*clip_model.proj.*h_encoder.surprise"
    with pytest.raises(CheckpointError, match=message):
        geossl.load_reference("point_m2ae", state, CONFIG)
    with pytest.raises(CheckpointError, match="not a pretraining checkpoint of Point-M2AE: expected h_encoder"):
        geossl.load_reference("point_m2ae", {"fc.weight": torch.ones(2, 2)})
