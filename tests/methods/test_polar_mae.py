"""PoLAr-MAE: what is hidden stays unseen, losses are what they say, every option works, and the batch may be split."""

from __future__ import annotations

import dataclasses
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import geossl
from geossl.errors import CheckpointError, ConfigError, UnknownNameError
from geossl.geometry import PackedPoints, PointBatch
from geossl.layers import BatchRandom
from geossl.methods import METHODS, PolarMAE
from geossl.methods.polar_mae import HiddenPoints, draw_rotations, random_quaternion, rotate_groups

PARITY = {"norm": "batchwide", "empty_slots": True, "exact_voxels": False}


def tiny(backbone: dict | None = None, **options) -> PolarMAE:
    torch.manual_seed(0)
    values = {"dim": 24, "depth": 2, "heads": 2, "slots": 12, "embed_widths": (8, 16, 16)} | (backbone or {})
    options = {"decoder_depth": 1, "decoder_heads": 2, "decoder_drop_path": 0.0} | options
    return dataclasses.replace(METHODS.config("polar_mae"), **options).build(geossl.create_backbone("point_vit_volume_tiny", **values))


def events(*lengths: int, seed: int = 0) -> PointBatch:
    """Voxels along a few straight tracks near the middle of the detector, their energies a function of where they are."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for n in lengths:
        start = torch.rand(3, generator=generator) * 60 + 350
        direction = F.normalize(torch.randn(3, generator=generator), dim=0)
        place = start + torch.arange(n)[:, None] * 0.9 * direction + torch.randn(n, 3, generator=generator)
        coord = place.floor().unique(dim=0)
        rows.append(torch.cat([coord, (coord.sum(1, keepdim=True) / 3 - 384) / 50], 1))
    offsets = torch.tensor([0, *(len(part) for part in rows)]).cumsum(0)
    packed = torch.cat(rows)
    return PointBatch(PackedPoints(packed[:, :3].contiguous(), offsets, packed[:, 3:].contiguous()))


def seeded(seed: int = 1) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(
    ("backbone", "options"),
    [
        ({}, {}),
        ({}, {"energy": False, "rotation": "none"}),
        ({}, {"predict": "positions", "rotation": "batch"}),
        (PARITY, {"rotation": "none"}),
        ({"drop_path": 0.2, "attention_dropout": 0.1, "reduction": "energy"}, {"decoder_drop_path": 0.2}),
        ({"full_coverage": True, "slots": 4, "mean_centers": True, "final_norm": True}, {}),
        ({"tokens": "2.5", "slots": None}, {}),
        ({"tokens": "25", "slots": None, "radius": 12.0}, {}),
    ],
)
def test_the_loss_falls_on_one_batch(backbone, options):
    method, batch = tiny(backbone, **options).train(), events(60, 90, 120)
    optimiser = torch.optim.AdamW(method.parameters(), lr=5e-3)
    losses = []
    for _ in range(20):
        loss = method(batch, generator=seeded()).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0]


def test_hidden_points_reach_no_prediction_of_theirs():
    """In evaluation, moving a hidden token's points changes nothing but, through where they are, the energies predicted for them."""
    method, batch = tiny().eval(), events(60, 90)
    groups = method.backbone.group(batch.points)
    mask = method.draw_mask(groups, BatchRandom(2, seeded()))
    points = groups.points.clone().requires_grad_()
    decoded = method.decode(groups._replace(points=points), mask)
    touched = torch.autograd.grad(decoded.square().sum(), points, retain_graph=True)[0].abs().sum(1) > 0
    of_hidden = mask[groups.token_of_row()]
    assert not touched[of_hidden].any()
    assert touched[~of_hidden].float().mean() > 0.7  # not those that hold no maximum
    hidden = HiddenPoints(groups._replace(points=points), mask, method.slots)
    energy = method.predict_energy(hidden, decoded.detach())
    grad = torch.autograd.grad(energy.square().sum(), points)[0]
    assert grad[of_hidden, :3].abs().sum() > 0
    assert not grad[:, 3].any()  # the true energy stays unseen


def plain_losses(prediction: Tensor, energy: Tensor, tokens: list[Tensor]) -> tuple[float, float]:
    chamfer, errors = [], []
    for guess, level, points in zip(prediction, energy, tokens, strict=True):
        n = len(points)
        distance = (guess[:n, None] - points[None]).square().sum(2)
        chamfer.append(distance.amin(1).mean() + distance.amin(0).mean())
        errors += (level[:n] - points[:, 3]).square().tolist()
    return float(torch.stack(chamfer).mean()), sum(errors) / len(errors)


@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.5, 3.0)])
def test_losses_are_the_specified_ones_and_weighted_once(weights):
    method, batch = tiny(chamfer_weight=weights[0], energy_weight=weights[1]).eval(), events(60, 90)
    output = method(batch, generator=seeded())
    groups, mask = output.aux["groups"], output.aux["mask"]
    tokens = [p for p, m in zip(groups.points.split(groups.row_splits.diff().tolist()), mask, strict=True) if m]
    chamfer, energy = plain_losses(output.aux["prediction"], output.aux["energy"], tokens)
    assert float(output.metrics["chamfer"]) == pytest.approx(chamfer, rel=1e-5)
    assert float(output.metrics["energy"]) == pytest.approx(energy, rel=1e-5)
    assert float(output.loss) == pytest.approx(weights[0] * chamfer + weights[1] * energy, rel=1e-5)


def test_a_batch_equals_its_events_one_by_one():
    method, batch = tiny().eval(), events(60, 5, 120)
    groups = method.backbone.group(batch.points)
    mask = method.draw_mask(groups, BatchRandom(3, seeded()))
    together = method.decode(groups, mask)
    alone, rows = [], torch.cat([batch.points.coord, batch.points.feats], 1).split(batch.points.lengths.tolist())
    for event, hidden in zip(rows, mask.split(list(groups.segments.lengths)), strict=True):
        alone.append(method.decode(method.backbone.group(event[None]), hidden))
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-5)


def test_parts_of_a_batch_draw_what_the_whole_batch_draws():
    """Masks, rotations and drop path of an event depend on its place in the global batch alone, whatever the sizes of the others."""
    batch = events(60, 200, 30, 90)
    method = tiny({"drop_path": 0.5}, decoder_drop_path=0.5).train()
    for norm in (m for m in method.modules() if isinstance(m, torch.nn.BatchNorm1d)):
        norm.eval()  # whose statistics are those of the batch
    for part in (method.backbone.embed, *([method.patch_embed] if method.config.energy else [])):
        part.eval()
    whole = method(batch, generator=seeded(5)).aux
    splits = whole["groups"].row_splits
    rows = torch.cat([batch.points.coord, batch.points.feats], 1).split(batch.points.lengths.tolist())
    for slot in ([0, 2], [1], [3]):
        packed = torch.cat([rows[i] for i in slot])
        offsets = torch.tensor([0, *(len(rows[i]) for i in slot)]).cumsum(0)
        points = PackedPoints(packed[:, :3].contiguous(), offsets, packed[:, 3:].contiguous())
        half = method(PointBatch(points, slot=torch.tensor(slot), global_size=4), generator=seeded(5)).aux
        owner = torch.repeat_interleave(torch.arange(4), torch.tensor(whole["groups"].segments.lengths))
        mine = torch.isin(owner, torch.tensor(slot))
        assert torch.equal(half["mask"], whole["mask"][mine])
        torch.testing.assert_close(half["groups"].centers, whole["groups"].centers[mine])
        torch.testing.assert_close(half["prediction"], whole["prediction"][mine[whole["mask"]]], rtol=1e-4, atol=1e-5)
    assert len(splits) == len(owner) + 1


@pytest.mark.parametrize("rotation", ["event", "batch", "none"])
def test_rotations_turn_events_about_the_middle_and_keep_distances(rotation):
    method, batch = tiny().eval(), events(60, 90, 70)
    groups = method.backbone.group(batch.points)
    turned = rotate_groups(groups, draw_rotations(rotation, BatchRandom(3, seeded())))
    assert torch.equal(turned.points[:, 3:], groups.points[:, 3:])
    torch.testing.assert_close(turned.points[:, :3].norm(dim=1), groups.points[:, :3].norm(dim=1))
    torch.testing.assert_close(turned.centers.norm(dim=1), groups.centers.norm(dim=1))
    radius = method.backbone.tokenizer.radius * method.backbone.config.scale
    place, before = (g.points[:, :3] * radius + g.centers[g.token_of_row()] for g in (turned, groups))
    first = groups.segments.lengths[0]
    rows = int(groups.row_splits[first])
    torch.testing.assert_close(torch.cdist(place[:rows], place[:rows]), torch.cdist(before[:rows], before[:rows]), rtol=1e-3, atol=1e-4)
    matrices = [torch.linalg.lstsq(a.double(), b.double()).solution for a, b in
                zip(before.split([rows, len(before) - rows]), place.split([rows, len(place) - rows]), strict=True)]  # fmt: skip
    assert torch.allclose(matrices[0], torch.eye(3, dtype=torch.float64), atol=1e-3) == (rotation == "none")
    if rotation == "batch":
        torch.testing.assert_close(matrices[0], matrices[1], rtol=0, atol=1e-3)


def test_quaternions_are_uniform_over_rotations():
    q = random_quaternion(torch.rand(20000, 3, generator=seeded()))
    torch.testing.assert_close(q.norm(dim=1), torch.ones(20000))
    torch.testing.assert_close(q.T @ q / 20000, torch.eye(4) / 4, rtol=0, atol=0.01)


def test_pictures_hold_the_parts_of_each_event_in_voxels():
    method, batch = tiny().eval(), events(60, 90)
    pictures = method.pictures(batch, generator=seeded())
    inputs = torch.cat([batch.points.coord, batch.points.feats], 1).split(batch.points.lengths.tolist())
    for picture, points in zip(pictures, inputs, strict=True):
        assert torch.equal(torch.from_numpy(picture["input"]), points)
        known = {tuple(row) for row in points[:, :3].tolist()}
        for name in ("visible", "hidden"):
            assert {tuple(row) for row in picture[name][:, :3].round().tolist()} <= known
            assert abs(picture[name][:, :3] - picture[name][:, :3].round()).max() < 0.01
        assert picture["reconstruction"].shape == picture["hidden"].shape
        assert picture["hidden_energy"].shape == (len(picture["hidden"]),)
        assert picture["centers"].shape == (len(picture["center_hidden"]), 3)
        assert picture["center_hidden"].sum() == int(0.6 * len(picture["centers"]))


def test_attention_maps_are_weights_of_each_event_alone():
    backbone, batch = tiny().eval().backbone, events(60, 90)
    maps = backbone.attention_maps(backbone.group(batch.points), 0)
    rows = torch.cat([batch.points.coord, batch.points.feats], 1).split(batch.points.lengths.tolist())
    for weights, event in zip(maps, rows, strict=True):
        assert weights.shape[0] == 2
        assert weights.shape[1] == weights.shape[2]
        torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:2]))
        torch.testing.assert_close(backbone.attention_maps(backbone.group(event[None]), 0)[0], weights, rtol=1e-4, atol=1e-6)
    with pytest.raises(ValueError, match="block 2 does not exist; the backbone has 2 blocks"):
        backbone.attention_maps(backbone.group(batch.points), 2)


def test_events_of_one_token_hide_nothing_and_lose_nothing():
    batch = PointBatch(PackedPoints(torch.full((2, 3), 380.0), torch.tensor([0, 1, 2]), torch.zeros(2, 1)))
    output = tiny().eval()(batch)
    assert not output.aux["mask"].any()
    assert float(output.loss) == 0.0


@pytest.mark.parametrize("backbone", [{}, PARITY])
def test_bfloat16_stays_close(backbone):
    batch, losses = events(90, 120), []
    for enabled in (False, True):
        method = tiny(backbone).train()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss = method(batch, generator=seeded()).loss
        loss.backward()
        assert all(torch.isfinite(p.grad).all() for p in method.parameters())
        assert loss.dtype == torch.float32
        losses.append(float(loss.detach()))
    assert losses[1] == pytest.approx(losses[0], rel=0.02)


def test_gradient_checkpointing_changes_nothing():
    grads = []
    for enabled in (False, True):
        method = tiny({"drop_path": 0.3, "attention_dropout": 0.2}).train()
        method.set_grad_checkpointing(enabled)
        torch.manual_seed(3)
        method(events(60, 90), generator=seeded()).loss.backward()
        grads.append(method.backbone.blocks.blocks[0].attn.qkv.weight.grad)
    torch.testing.assert_close(*grads)


def test_a_model_with_a_batchwide_norm_warns_once_of_a_batch():
    method = tiny(PARITY).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        method.backbone(torch.cat([events(60).points.coord, events(60).points.feats], 1)[None])
        method.train()(events(60, 90))
        method.eval()
        tiny().eval().backbone(events(60, 90).points)
    with pytest.warns(UserWarning, match="the features of each of these 2 events depend on the others"):
        method.backbone(events(60, 90).points)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        method.backbone(events(60, 90).points)


@pytest.mark.parametrize(
    ("backbone", "options", "error", "message"),
    [
        ({}, {"mask_ratio": 1.0}, ConfigError, "mask_ratio must lie strictly between 0 and 1, got 1.0"),
        ({}, {"energy_weight": -1.0}, ConfigError, "chamfer_weight and energy_weight must be at least 0"),
        ({}, {"rotation": "events"}, UnknownNameError, "did you mean 'event'"),
        ({}, {"predict": "position"}, UnknownNameError, "did you mean 'positions'"),
        ({}, {"decoder_heads": 5}, ConfigError, "decoder_heads must divide the backbone's dim 24, got 5"),
        ({}, {"decoder_depth": 0}, ConfigError, "decoder_depth and decoder_heads must be at least 1"),
        ({}, {"decoder_drop_path": 1.0}, ConfigError, r"decoder_drop_path must lie in \[0, 1\)"),
        ({"in_channels": 3}, {}, ConfigError, "energy needs points with an energy"),
        ({"tokens": "7"}, {}, UnknownNameError, "tokens '7'"),
        ({"radius": -1.0}, {}, ConfigError, "radius must be positive"),
        ({"norm": "batch"}, {}, UnknownNameError, "did you mean 'batchwide'"),
        ({"full_coverage": True, "empty_slots": True}, {}, ConfigError, "full_coverage and empty_slots exclude each other"),
        ({"attention_dropout": 1.0}, {}, ConfigError, r"attention_dropout must lie in \[0, 1\)"),
        ({"scale": 0.0}, {}, ConfigError, "scale must be positive"),
        ({"in_channels": 3, "reduction": "energy"}, {}, ConfigError, "in_channels must be at least 3"),
    ],
)
def test_wrong_options_are_refused_by_name(backbone, options, error, message):
    with pytest.raises(error, match=message):
        tiny(backbone, **options)


def test_wrong_backbones_columns_and_events_are_refused():
    with pytest.raises(ConfigError, match=r"needs a point_vit_volume_\* backbone, got PointViT"):
        METHODS.config("polar_mae").build(geossl.create_backbone("point_vit_tiny"))
    with pytest.raises(ValueError, match="points have 3 columns but the backbone was made for in_channels=4"):
        tiny()(PointBatch(PackedPoints(torch.zeros(5, 3), torch.tensor([0, 5]))))
    batch = events(60, 60)
    batch.points.coord[int(batch.points.offsets[1]) :] = torch.nan
    with pytest.raises(ValueError, match=r"event\(s\) \[1\] of 2 have none"):
        tiny()(batch)


# Official checkpoints ---------------------------------------------------------------------------------------------------------------------


def published_names(method: PolarMAE) -> dict[str, Tensor]:
    """Name the weights of a parity method as the published code does."""
    convs = {"conv1": "first_conv.0", "norm1": "first_conv.1", "conv2": "first_conv.3"}
    convs |= {"conv3": "second_conv.0", "norm2": "second_conv.1", "conv4": "second_conv.3"}
    embedding = {f"{ours}.": f"{theirs}." for ours, theirs in convs.items()} | {"slot_linear.": "position_encoder.time_embed.1."}
    table = {f"backbone.embed.{k}": f"encoder.tokenizer.embedding.{v}" for k, v in embedding.items()}
    table |= {f"patch_embed.{k}": f"equivariant_patch_encoder.{v}" for k, v in embedding.items()}
    table |= {"backbone.position.": "encoder.pos_embed.pos_enc.", "backbone.blocks.": "encoder.transformer."}
    table |= {"decoder.": "decoder.transformer.", "decoder_norm.": "decoder.transformer.norm."}
    table |= {"head.": "increase_dim.", "energy_head.": "energy_decoder."}
    state = {}
    for name, value in method.state_dict().items():
        old, new = next(((old, new) for old, new in table.items() if name.startswith(old)), ("", ""))
        key = new + name.removeprefix(old)
        if key.endswith("num_batches_tracked"):
            continue
        if ".norm" in key and "conv" not in key:
            key = key.replace("weight", "gamma").replace("bias", "beta")
            value = value[None, None]
        elif ("_conv" in key and value.dim() == 2) or key in ("increase_dim.weight", "energy_decoder.weight"):
            value = value[..., None]
        state[key] = value
    return state


@pytest.mark.parametrize("energy", [True, False])
@pytest.mark.parametrize("prefix", ["", "model.", "module.backbone.net."])
def test_official_files_give_the_parity_model(tmp_path, energy, prefix):
    method = tiny(PARITY, energy=energy, rotation="batch").eval()
    config = {"heads": 2, "tok": {"group_max_points": 12}}
    state = {prefix + key: value for key, value in published_names(method).items()}
    torch.save({"state_dict": state, "hyper_parameters": {"tokenizer": dataclasses.make_dataclass}}, tmp_path / "mae.ckpt")
    loaded = geossl.load_reference("polar_mae", tmp_path / "mae.ckpt", config)
    assert loaded.config.rotation == "batch"
    assert loaded.config.energy == energy
    assert (loaded.backbone.config.norm, loaded.backbone.config.empty_slots, loaded.backbone.config.drop_path) == ("batchwide", True, 0.25)
    batch = events(90)
    assert torch.equal(loaded(batch, generator=seeded()).loss, method(batch, generator=seeded()).loss)


def test_missing_and_unexpected_weights_are_listed():
    config, state = {"heads": 2, "tok": {"group_max_points": 12}}, published_names(tiny(PARITY))
    state["encoder.surprise"] = state.pop("encoder.transformer.blocks.1.norm1.gamma")
    with pytest.raises(CheckpointError, match=r"(?s)missing \(1\): backbone.blocks.blocks.1.norm1.weight.*unexpected \(1\): .*surprise"):
        geossl.load_reference("polar_mae", state, config)
    with pytest.raises(CheckpointError, match="not a PoLAr-MAE pretraining checkpoint: expected encoder"):
        geossl.load_reference("polar_mae", {"fc.weight": torch.ones(2, 2)})
    with pytest.raises(UnknownNameError, match="did you mean 'polar_mae'"):
        geossl.load_reference("polar_ma", state)


def test_the_released_sizes_are_the_published_ones():
    """Parameters as counted in the published models."""
    backbone = geossl.create_backbone("point_vit_volume_small", **PARITY)
    assert sum(p.numel() for p in backbone.parameters()) == 21_837_568
    method = METHODS.config("polar_mae").build(backbone)
    assert sum(p.numel() for p in method.parameters()) == 29_570_080
    point_mae = dataclasses.replace(METHODS.config("polar_mae"), energy=False).build(backbone)
    assert sum(p.numel() for p in point_mae.parameters()) == 28_985_856


@pytest.mark.parametrize("rotation", ["event", "batch"])
def test_positions_stay_float32_under_autocast(rotation):
    method, batch = tiny().eval(), events(60, 90)
    groups = method.backbone.group(batch.points)
    matrix = draw_rotations(rotation, BatchRandom(2, seeded()))
    exact = rotate_groups(groups, matrix)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        turned = rotate_groups(groups, matrix)
    assert torch.equal(turned.centers, exact.centers)
    assert torch.equal(turned.points, exact.points)


def test_a_mask_of_another_length_is_refused():
    method, batch = tiny().eval(), events(60, 90)
    with pytest.raises(ValueError, match="one entry per token"):
        method(batch, mask=torch.zeros(3, dtype=torch.bool))


def test_points_without_an_energy_are_left_out():
    backbone, batch = tiny().eval().backbone, events(60, 90)
    feats = batch.points.feats.clone()
    feats[0] = torch.nan
    points = dataclasses.replace(batch.points, feats=feats)
    assert backbone(points).feats.isfinite().all()
    assert not (backbone.group(points).index == 0).any()
