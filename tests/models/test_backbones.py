"""What every registered backbone offers."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

import geossl
from geossl.errors import CheckpointError, ConfigError, UnknownNameError
from geossl.geometry import PackedPoints, Tokens
from geossl.methods import METHODS
from geossl.tasks import TASKS

SMALL = {"dim": 24, "depth": 3, "heads": 2, "groups": 6, "group_size": 4}


SCALES = {
    "dims": (8, 16, 24),
    "depths": (1, 2, 1),
    "heads": 2,
    "groups": (20, 12, 6),
    "group_sizes": (8, 4, 4),
    "embed_widths": (8, 16, 16),
}
VOLUME = {"dim": 24, "depth": 3, "heads": 2, "radius": 0.6, "slots": 8, "center": 0.0, "scale": 0.3}


@pytest.fixture(params=geossl.list_backbones("point_*"))
def backbone(request):
    torch.manual_seed(0)
    kind = request.param.removeprefix("point_").rsplit("_", 1)[0]
    return geossl.create_backbone(request.param, **{"vit": SMALL, "vit_volume": VOLUME, "m2ae": SCALES}[kind])


@pytest.fixture
def points(request) -> torch.Tensor:
    columns = request.getfixturevalue("backbone").in_channels if "backbone" in request.fixturenames else 3
    return torch.randn(2, 50, columns, generator=torch.Generator().manual_seed(0))


def test_features_have_the_promised_shape_and_gradients_reach_every_parameter(backbone, points):
    tokens = backbone.train()(points)
    assert isinstance(tokens, Tokens)
    count = int(tokens.offsets[-1])
    assert tokens.feats.shape == (count, backbone.num_features)
    assert tokens.centers.shape == (count, 3)
    if "volume" not in backbone.config.name:  # there, events take as many tokens as they need
        assert tokens.offsets.tolist() == [0, 6, 12]
    outputs = backbone.forward_pyramid(points) if hasattr(backbone, "forward_pyramid") else [tokens]
    sum((output.feats * torch.randn_like(output.feats)).sum() for output in outputs).backward()
    assert all(p.grad is not None for p in backbone.parameters())


def test_intermediates_agree_with_the_forward_pass_and_feature_info(backbone, points):
    backbone.eval()
    tokens, features = backbone.forward_intermediates(points)
    assert len(features) == len(backbone.feature_info) == SMALL["depth"]
    assert [f.shape[1] for f in features] == [info.channels for info in backbone.feature_info]
    torch.testing.assert_close(features[-1], tokens.feats)
    torch.testing.assert_close(tokens.feats, backbone(points).feats)
    _, chosen = backbone.forward_intermediates(points, [0, -1], norm=False)
    norm = backbone.norms[-1] if hasattr(backbone, "norms") else backbone.norm
    torch.testing.assert_close(norm(chosen[1]), features[-1])
    _, last = backbone.forward_intermediates(points, 2)
    assert len(last) == 2
    torch.testing.assert_close(last[0], features[1])
    with pytest.raises(ValueError, match=r"(block|scale) 3 does not exist; the backbone has 3 \1s"):
        backbone.forward_intermediates(points, [3])
    with pytest.raises(ValueError, match=r"the last 4 (block|scale)s were asked for, but the backbone has 3"):
        backbone.forward_intermediates(points, 4)


def test_packed_equals_padded_bit_for_bit(backbone, points):
    backbone.eval()
    rows = points.flatten(0, 1)
    packed = PackedPoints(rows[:, :3].contiguous(), torch.tensor([0, 50, 100]), rows[:, 3:] if rows.shape[1] > 3 else None)
    assert torch.equal(backbone(packed).feats, backbone(points).feats)


def test_saving_and_loading_gives_the_same_features(backbone, points, tmp_path):
    folder = geossl.models.save_backbone(backbone.eval(), tmp_path / "export")
    again = geossl.load(tmp_path)  # a run folder: its export/ is found
    assert not again.training
    assert again.config == backbone.config
    assert torch.equal(again(points).feats, backbone(points).feats)
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "model.safetensors"]


@pytest.mark.parametrize(
    ("name", "options", "wrap"),
    [
        ("point_vit_tiny", SMALL, lambda backbone: backbone),
        ("point_vit_tiny", SMALL, METHODS.config("point_mae").build),
        ("point_vit_tiny", SMALL, replace(TASKS.config("classification"), classes=3).build),
        ("point_vit_volume_tiny", VOLUME | {"final_norm": True}, lambda backbone: backbone),
        ("point_vit_volume_tiny", VOLUME, METHODS.config("polar_mae").build),
        ("point_m2ae_tiny", SCALES, lambda backbone: backbone),
        ("point_m2ae_tiny", SCALES | {"dims": (8, 12, 24)}, METHODS.config("point_m2ae").build),
    ],
)
def test_every_parameter_belongs_to_exactly_one_layer_group(name, options, wrap):
    """Also with more than ten blocks, where one number is the beginning of another."""
    deep = {"depths": (12, 12, 12), "heads": 2} if "m2ae" in name else {"depth": 12, "heads": 6}
    module = wrap(geossl.create_backbone(name, **options | deep))
    prefixes = [prefix for group in module.layer_groups() for prefix in group]
    for name, _ in module.named_parameters():
        assert sum(name.startswith(prefix) for prefix in prefixes) == 1, name


def test_points_that_are_not_finite_are_left_out(backbone, points):
    backbone.eval()
    spoiled = torch.cat([points, points.new_full((2, 3, points.shape[2]), torch.nan)], dim=1)
    assert torch.equal(backbone(spoiled).feats, backbone(points).feats)


def test_compiles(points):
    backbone = geossl.create_backbone("point_vit_tiny", **SMALL).eval()
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(backbone, backend="eager")(points).feats, backbone(points).feats)


def test_unknown_names_and_options_suggest_the_nearest():
    with pytest.raises(UnknownNameError, match=r"unknown backbone 'point_vit_smal'; did you mean 'point_vit_small'"):
        geossl.create_backbone("point_vit_smal")
    with pytest.raises(UnknownNameError, match=r"option of backbone 'point_vit_tiny' 'group'; did you mean 'groups'"):
        geossl.create_backbone("point_vit_tiny", group=3)
    with pytest.raises(ConfigError, match="heads must divide dim, got dim=192 and heads=5"):
        geossl.create_backbone("point_vit_tiny", heads=5)


def test_loading_reports_what_is_wrong(tmp_path):
    with pytest.raises(CheckpointError, match=r"no such folder; 'point_vit_tiny' is a registered backbone: geossl.create_backbone"):
        geossl.load("point_vit_tiny")
    with pytest.raises(CheckpointError, match=r"expected model.safetensors and config.json"):
        geossl.load(tmp_path)
    folder = geossl.models.save_backbone(geossl.create_backbone("point_vit_tiny", **SMALL), tmp_path / "export")
    config = json.loads((folder / "config.json").read_text())
    config["backbone"]["depth"] = 4
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"does not fit PointViT; nothing was loaded:\n  missing \(11\): blocks.blocks.3"):
        geossl.load(folder)
    config["backbone"]["depht"] = 3
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"config.json is not a configuration geossl wrote.*depht"):
        geossl.load(folder)
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    del config["backbone"]["depht"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"model.safetensors cannot be read as safetensors \(missing, truncated"):
        geossl.load(folder)
