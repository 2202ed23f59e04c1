"""I2P-MAE: the teacher decides what is seen and stays outside the model, the losses fall, official files load whole or not at all."""

from __future__ import annotations

import copy
import dataclasses

import numpy as np
import pytest
import torch

import geossl
from geossl import ops
from geossl.engine.optim import OptimConfig, build_optimizer
from geossl.errors import CheckpointError, ConfigError, UnknownNameError
from geossl.geometry import PackedPoints, PointBatch
from geossl.layers import back_project
from geossl.methods import I2PMAE, METHODS, reference_teacher
from geossl.methods.i2p_mae import point_rows
from geossl.methods.reference import find_system
from geossl.models import CloudTeacher, Teacher, TeacherConfig
from geossl.models.image_vit import ImageViT, ImageViTConfig

SCALES = {
    "dims": (8, 12, 24),
    "depths": (1, 1, 1),
    "heads": 2,
    "groups": (24, 16, 8),
    "group_sizes": (6, 4, 4),
    "embed_widths": (8, 16, 16),
}
RANDOM = TeacherConfig(name="random")


def tiny(scales: dict | None = None, **options) -> I2PMAE:
    torch.manual_seed(0)
    backbone = geossl.create_backbone("point_m2ae_tiny", **SCALES | (scales or {}))
    options = {"decoder_heads": 2, "decoder_drop_path": 0.0, "predicted_points": 4, "teacher": RANDOM} | options
    return dataclasses.replace(METHODS.config("i2p_mae"), **options).build(backbone)


def clouds(*lengths: int) -> PointBatch:
    rows = torch.randn(sum(lengths), 3, generator=torch.Generator().manual_seed(0))
    return PointBatch(PackedPoints(rows, torch.tensor([0, *lengths]).cumsum(0)))


def fixed_draws() -> torch.Generator:
    return torch.Generator().manual_seed(1)


@pytest.mark.parametrize("options", [{}, {"decoder_depths": (1,)}, {"decoder_depths": (1, 1, 1)}, {"saliency_temperature": 0.5}])
def test_both_losses_fall_on_one_batch_whatever_scale_is_reconstructed(options):
    method, batch = tiny(**options).train(), clouds(60, 60, 60)
    optimiser = torch.optim.AdamW(method.parameters(), lr=5e-3)
    made = []
    for _ in range(20):
        output = method(batch, generator=fixed_draws())
        optimiser.zero_grad()
        output.loss.backward()
        optimiser.step()
        made.append({name: float(value) for name, value in output.metrics.items()})
    assert made[-1]["chamfer_x1000"] < 0.8 * made[0]["chamfer_x1000"]
    assert made[-1]["feature_x1000"] < 0.9 * made[0]["feature_x1000"]
    assert float(output.loss) * 1000 == pytest.approx(made[-1]["chamfer_x1000"] + made[-1]["feature_x1000"], rel=1e-5)


def test_targets_are_the_features_of_the_members_in_the_three_views():
    """A plain form: back-project to all finer centres, gather, compare."""
    method, batch = tiny().eval(), clouds(60, 44)
    output = method(batch, generator=fixed_draws())
    scales, hidden, seen = output.aux["scales"], output.aux["hidden"], method.look(batch)
    decoded = method.decoder(scales, method.backbone.encode(scales, hidden))
    visible = ~hidden[1]
    at_centers = PackedPoints(scales[0].centers, scales[0].segments.offsets())
    known = back_project(seen.features, at_centers, seen.frames)  # [T, 3, C]
    target = known[scales[1].index[visible]].flatten(1)
    expected = torch.nn.functional.mse_loss(method.feature_head(decoded[visible]), target)
    torch.testing.assert_close(output.metrics["feature_x1000"], 1000 * expected.detach())


def test_salient_tokens_stay_visible_more_often():
    method, batch = tiny(saliency_temperature=0.3).eval(), clouds(80)
    first = method(batch, generator=fixed_draws())
    probability = first.aux["probability"]
    seen = sum((~method(batch).aux["hidden"][-1]).float() for _ in range(60))
    assert float(torch.corrcoef(torch.stack([probability, seen]))[0, 1]) > 0.8
    assert float(first.metrics["mask_odds"]) > 5
    assert 0 < float(first.metrics["mask_entropy"]) < 0.95
    even = tiny().eval()(batch, generator=fixed_draws()).metrics  # as published: nearly even
    assert float(even["mask_entropy"]) > 0.99
    assert 1 < float(even["mask_odds"]) < 1.1


def test_saliency_is_that_of_the_coarsest_centres():
    method, batch = tiny().eval(), clouds(60, 9)
    output = method(batch)
    seen, coarsest = method.look(batch), output.aux["scales"][-1]
    maps = seen.saliency.view(6, 1, 14, 14)
    expected = back_project(maps, PackedPoints(coarsest.centers, coarsest.segments.offsets()), seen.frames)[..., 0].mean(1)
    torch.testing.assert_close(output.aux["saliency"], expected)
    softmax = ops.segment_reduce(expected, coarsest.segments.offsets(), "softmax")
    torch.testing.assert_close(output.aux["probability"], softmax)


def test_rows_of_the_points_at_the_centres():
    method, batch = tiny(), clouds(60, 9, 1)
    scales = method.backbone.group(batch.points)
    for scale, rows in zip(scales, point_rows(scales), strict=True):
        assert torch.equal(batch.points.coord[rows], scale.centers)


def test_random_masking_is_that_of_point_m2ae():
    torch.manual_seed(0)
    backbone = geossl.create_backbone("point_m2ae_tiny", **SCALES)
    twin = dataclasses.replace(METHODS.config("point_m2ae"), decoder_heads=2).build(backbone)
    batch = clouds(60, 60)
    ours = tiny(masking="random").eval()(batch, generator=fixed_draws()).aux["hidden"]
    assert all(map(torch.equal, ours, twin.eval()(batch, generator=fixed_draws()).aux["hidden"]))


def test_halves_of_a_batch_hide_what_the_whole_batch_hides():
    method, batch = tiny(saliency_temperature=1.0).eval(), clouds(60, 60, 60, 60)
    whole = method(batch, generator=fixed_draws()).aux["hidden"][-1].view(4, -1)
    for rank in range(2):
        slot = torch.arange(rank, 4, 2)
        points = PackedPoints.from_padded(batch.points.coord.view(4, 60, 3)[slot])
        part = method(PointBatch(points, slot=slot, global_size=4), generator=fixed_draws()).aux["hidden"][-1]
        assert torch.equal(part.view(2, -1), whole[slot])


# The teacher stays outside ------------------------------------------------------------------------------------------------------------


def test_no_weight_of_the_teacher_is_in_the_model():
    method = tiny().train()
    method(clouds(60)).loss.backward()
    teacher = method.teacher.load()
    assert teacher not in list(method.modules())
    assert not {id(x) for x in teacher.parameters()} & {id(x) for x in method.parameters()}
    assert not any("teacher" in name for name in method.state_dict())
    assert copy.deepcopy(method).teacher.load() is teacher
    assert not teacher.training
    assert all(p.grad is None for p in teacher.parameters())


def test_what_needs_no_teacher_loads_none(tmp_path):
    """The encoder's features, its export and the method's own weights."""
    missing = TeacherConfig(name="clip_vit_base_patch16", weights=str(tmp_path / "missing.pt"))
    method = tiny(teacher=missing).eval()
    geossl.extract_features(method.backbone, clouds(60).points)
    geossl.models.save_backbone(method.backbone, tmp_path / "encoder")
    geossl.load(tmp_path / "encoder")
    method.load_state_dict(method.state_dict())
    build_optimizer(method, OptimConfig())
    with pytest.raises(CheckpointError, match=r"missing.pt cannot be read"):
        method(clouds(60))
    with pytest.raises(CheckpointError, match=r"missing.pt cannot be read"):
        method.prepare()


def test_every_trained_parameter_gets_a_gradient_and_belongs_to_a_layer():
    method = tiny().train()
    method(clouds(60, 60)).loss.backward()
    assert all((p.grad is not None) == p.requires_grad for p in method.parameters())
    assert not method.backbone.norms[0].weight.requires_grad
    prefixes = tuple(prefix for group in method.layer_groups() for prefix in group)
    assert all(name.startswith(prefixes) for name, _ in method.named_parameters())


def test_a_teacher_of_other_channels_is_refused():
    method = tiny()
    method.teacher.use(Teacher(torch.nn.Conv2d(3, 5, 16, 16), name="other", channels=5, digest="1"))
    for use in (method.prepare, lambda: method(clouds(60))):
        with pytest.raises(ConfigError, match="the teacher 'other' gives 5 channels, the model was made for 32"):
            use()


# Views of the teacher -----------------------------------------------------------------------------------------------------------------


def test_the_original_cloud_is_looked_at_where_the_batch_has_it():
    batch = clouds(60, 40)
    moved = PointBatch(PackedPoints(batch.points.coord * torch.tensor([1.5, 0.7, 1.0]) + 0.1, batch.points.offsets))
    with_original = dataclasses.replace(moved, original=batch.points.coord)
    augmented, original = tiny().eval(), tiny(teacher_view="original").eval()
    assert torch.equal(augmented.look(with_original).features, augmented.look(moved).features)
    assert torch.equal(original.look(with_original).features, original.look(batch).features)
    assert not torch.allclose(original.look(with_original).features, augmented.look(with_original).features)
    output = original(with_original, generator=fixed_draws())
    coarsest, rows = output.aux["scales"][-1], point_rows(output.aux["scales"])[-1]
    seen = original.look(batch)
    places = PackedPoints(batch.points.coord[rows], coarsest.segments.offsets())
    expected = back_project(seen.saliency.view(6, 1, 14, 14), places, seen.frames)[..., 0].mean(1)
    torch.testing.assert_close(output.aux["saliency"], expected)


def test_without_augmentation_both_views_say_the_same():
    batch = clouds(60, 40)
    first, second = (tiny(teacher_view=view).eval()(batch, generator=fixed_draws()) for view in ("augmented", "original"))
    torch.testing.assert_close(first.loss, second.loss, rtol=1e-3, atol=0)  # half precision of the features
    assert all(map(torch.equal, first.aux["hidden"], second.aux["hidden"]))


@pytest.mark.parametrize("lengths", [(1,), (1, 60), (2, 3), (7,), (60,) * 8])
@pytest.mark.parametrize("options", [{}, {"saliency_temperature": 1.0}, {"saliency_temperature": 1e-3}, {"teacher_view": "original"}])
def test_clouds_of_few_points_and_certain_teachers_have_finite_numbers(lengths, options):
    method = tiny(**options).eval()
    output = method(clouds(*lengths))
    assert output.loss.isfinite()
    assert all(value.isfinite() for value in output.metrics.values())


@pytest.mark.parametrize("shape", ["plane", "line", "point"])
def test_flat_clouds_have_finite_losses_and_gradients(shape):
    batch = clouds(60, 60)
    flat = torch.tensor({"plane": [1.0, 1, 0], "line": [0, 1, 0], "point": [0, 0, 0]}[shape])
    method = tiny(saliency_temperature=1.0).train()
    output = method(PointBatch(PackedPoints(batch.points.coord * flat, batch.points.offsets)))
    output.loss.backward()
    assert output.loss.isfinite()
    assert all(p.grad.isfinite().all() for p in method.parameters() if p.grad is not None)


def test_points_that_are_not_finite_are_refused():
    batch = clouds(30, 30)
    batch.points.coord[40] = torch.nan
    with pytest.raises(ValueError, match=r"points must be finite, .*; clouds \[1\] hold NaN"):
        tiny()(batch)


def test_pictures_hold_what_the_teacher_sees():
    method, batch = tiny().eval(), clouds(60, 40)
    pictures = method.pictures(batch, generator=fixed_draws())
    assert [picture["input"].shape for picture in pictures] == [(60, 3), (40, 3)]
    for number, picture in enumerate(pictures):
        assert set(picture) == {"input", "visible", "reconstruction", "depth", "centers", "saliency"}
        assert picture["depth"].shape == (3, 224, 224)
        assert picture["centers"].shape == (8, 3)
        assert picture["saliency"].shape == (8,)
        alone = PackedPoints.from_padded(batch.points.coord.split([60, 40])[number][None])
        expected = geossl.layers.splat_depth(alone, geossl.layers.fit_views(alone)).sigmoid().numpy()
        np.testing.assert_allclose(picture["depth"], expected, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"mask_ratio": 1.0}, ConfigError, "mask_ratio must lie strictly between 0 and 1, got 1.0"),
        ({"masking": "salience"}, UnknownNameError, "unknown masking 'salience'; did you mean 'saliency'"),
        ({"teacher_view": "orignal"}, UnknownNameError, "unknown teacher_view 'orignal'; did you mean 'original'"),
        ({"saliency_temperature": 0.0}, ConfigError, "saliency_temperature must be above 0, or None for the published form, got 0.0"),
        ({"teacher_store": "somewhere"}, ConfigError, "teacher_store needs teacher_view: original"),
        ({"teacher": None}, ConfigError, "feature_channels must be given where there is no teacher to ask"),
        ({"feature_channels": 0}, ConfigError, "feature_channels must be at least 1, or None for those of the teacher, got 0"),
        ({"predicted_points": 0}, ConfigError, "predicted_points must be at least 1, got 0"),
    ],
)
def test_wrong_options_are_refused_by_name(options, error, message):
    with pytest.raises(error, match=message):
        tiny(**options)


def test_another_backbone_is_refused():
    with pytest.raises(ConfigError, match=r"method i2p_mae needs a point_m2ae_\* backbone, got PointViT"):
        METHODS.config("i2p_mae").build(geossl.create_backbone("point_vit_tiny"))


# Official files ---------------------------------------------------------------------------------------------------------------------------

CONFIG = {"num_groups": [24, 16, 8], "group_sizes": [6, 4, 4], "num_heads": 2}
TOWER = ImageViTConfig(dim=16, depth=2, heads=2, embed_dim=32, pre_norm=True, quick_gelu=True, eps=1e-5, resize_offset=0.0)


def published_tower() -> tuple[ImageViT, dict[str, torch.Tensor]]:
    """A narrow CLIP tower, and its weights as they are named in a file of I2P-MAE, with some of the text tower's."""
    tower = ImageViT(TOWER)
    for value in tower.state_dict().values():
        value.copy_(torch.randn(value.shape) * 0.2)
    names = {
        "cls_token": "class_embedding",
        "pos_embed": "positional_embedding",
        "patch_embed.": "conv1.",
        "norm_pre.": "ln_pre.",
        "attn.qkv.": "attn.in_proj_",
        "attn.proj.": "attn.out_proj.",
        "norm1.": "ln_1.",
        "norm2.": "ln_2.",
        "mlp.fc1.": "mlp.c_fc.",
        "mlp.fc2.": "mlp.c_proj.",
        "blocks.": "transformer.resblocks.",
        "head.weight": "proj",
    }
    state = {}
    for key, value in tower.state_dict().items():
        name = f"ln_post.{key.removeprefix('norm.')}" if key.startswith("norm.") else key
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        value = value.T if key == "head.weight" else value[0, 0] if key == "cls_token" else value[0] if key == "pos_embed" else value
        state[f"clip_model.visual.{name}"] = value.clone()
    return tower, state | {"clip_model.logit_scale": torch.ones(()), "clip_model.ln_final.weight": torch.ones(8)}


@pytest.mark.parametrize("prefix", ["", "module."])
def test_official_files_load_and_give_the_same_numbers(tmp_path, prefix, published_names):
    method, batch = tiny().eval(), clouds(60, 60)
    tower, clip = published_tower()
    path = tmp_path / "pre-train.pth"
    torch.save({"base_model": {prefix + key: value for key, value in (published_names(method) | clip).items()}, "epoch": 300}, path)
    assert find_system(path) == "i2p_mae"
    loaded = geossl.load_reference("i2p_mae", path, CONFIG)
    assert isinstance(loaded, I2PMAE)
    assert set(loaded.state_dict()) == set(method.state_dict())
    for name, value in method.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    assert loaded.backbone.config.local_radius == (0, 0, 0)
    assert (loaded.backbone.config.min_sq_norm, loaded.backbone.config.first_token_visible) == (1e-3, True)
    assert loaded.config.feature_channels == 32
    with pytest.raises(ConfigError, match=r"this model has no 2D teacher, .* model.teacher.use\(geossl.methods.reference_teacher"):
        loaded(batch)
    teacher = reference_teacher(path, heads=2)
    loaded.teacher.use(teacher)
    method.teacher.use(Teacher(tower, name="clip", channels=32, digest="1"))
    method.backbone.config = loaded.backbone.config
    mask = torch.arange(16) % 8 > 1
    assert torch.equal(loaded(batch, mask=mask).loss, method(batch, mask=mask).loss)
    geossl.models.save_backbone(loaded.backbone, tmp_path / "saved")
    assert torch.equal(geossl.load(tmp_path / "saved")(batch.points).feats, loaded.backbone(batch.points).feats)
    assert teacher.fingerprint == reference_teacher(path, heads=2).fingerprint
    assert teacher.fingerprint != reference_teacher(path, heads=1).fingerprint  # other answers from the same weights
    clip["clip_model.visual.proj"] += 1
    assert teacher.digest != reference_teacher(clip, heads=2).digest


def test_released_numbers_are_assumed_without_a_configuration(published_names):
    backbone = geossl.create_backbone("point_m2ae_small")
    options = {"teacher": None, "feature_channels": 512}
    method = dataclasses.replace(METHODS.config("i2p_mae"), **options).build(backbone)
    state = published_names(method)
    assert len(state) == 295
    assert sum(value.numel() for value in method.parameters()) == 17_622_808
    loaded = geossl.load_reference("i2p_mae", state)
    config = loaded.backbone.config
    assert (config.groups, config.group_sizes, config.depths, config.heads) == ((512, 256, 64), (16, 8, 8), (5, 5, 5), 6)
    assert (loaded.config.predicted_points, loaded.config.feature_channels, loaded.config.mask_ratio) == (8, 512, 0.8)


def test_files_of_two_scales_need_no_radius(published_names):
    scales = {"dims": (8, 24), "depths": (1, 1), "groups": (24, 8), "group_sizes": (6, 4), "local_radius": (0.0, 0.0)}
    state = published_names(tiny(scales))
    loaded = geossl.load_reference("i2p_mae", state, {"num_groups": [24, 8], "group_sizes": [6, 4], "num_heads": 2})
    assert loaded.backbone.config.local_radius == (0, 0)


def test_extra_missing_and_foreign_weights_are_listed(published_names):
    state = published_names(tiny()) | {"h_encoder.surprise.weight": torch.ones(1), "rec_head.weight": torch.ones(1)}
    del state["decoder_norm.bias"]
    with pytest.raises(
        CheckpointError, match=r"(?s)missing \(1\): decoder.norm.bias.*unexpected \(2\): h_encoder.surprise.*rec_head.weight"
    ):
        geossl.load_reference("i2p_mae", state, CONFIG)
    with pytest.raises(CheckpointError, match=r"not a pretraining checkpoint of I2P-MAE: expected .*rec_head_2d"):
        geossl.load_reference("i2p_mae", {"fc.weight": torch.ones(2, 2)})
    with pytest.raises(CheckpointError, match="holds no teacher"):
        reference_teacher(state)


def test_the_teacher_is_a_plain_object():
    assert not isinstance(tiny().teacher, torch.nn.Module)
    assert isinstance(tiny().teacher, CloudTeacher)
