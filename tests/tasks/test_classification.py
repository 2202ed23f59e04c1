"""The published classifier: it learns, resamples reproducibly, and says what is wrong with labels."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F

import geossl
from geossl.errors import ConfigError, UnknownNameError
from geossl.geometry import PackedPoints, PointBatch
from geossl.tasks import TASKS
from geossl.tasks.classification import smoothed_cross_entropy


def tiny(**options):
    torch.manual_seed(0)
    backbone = geossl.create_backbone("point_vit_tiny", dim=24, depth=2, heads=2, groups=6, group_size=4)
    return dataclasses.replace(TASKS.config("classification"), classes=3, **options).build(backbone)


def tiny_scales(backbone_options: dict | None = None, **options):
    torch.manual_seed(0)
    scales = {
        "dims": (8, 12, 16),
        "depths": (1, 1, 1),
        "heads": 2,
        "groups": (16, 8, 4),
        "group_sizes": (6, 4, 4),
        "embed_widths": (8, 8, 8),
    }
    backbone = geossl.create_backbone("point_m2ae_tiny", **scales | (backbone_options or {}))
    return dataclasses.replace(TASKS.config("classification"), classes=3, **options).build(backbone)


def batch(count: int = 6, points: int = 30) -> PointBatch:
    cloud = torch.randn(count, points, 3, generator=torch.Generator().manual_seed(0))
    label = torch.arange(count) % 3
    return PointBatch(PackedPoints.from_padded(cloud * (1 + label)[:, None, None]), label)


@pytest.mark.parametrize("make", [tiny, tiny_scales])
@pytest.mark.parametrize("options", [{"dropout": 0.0}, {"dropout": 0.0, "points": 20, "label_smoothing": 0.2, "pooling": "mean_max"}])
def test_it_learns_one_batch(make, options):
    task, data = make(**options).train(), batch()
    optimiser = torch.optim.AdamW(task.parameters(), lr=3e-3)
    for _ in range(40):
        output = task(data, generator=torch.Generator().manual_seed(0))
        optimiser.zero_grad()
        output.loss.backward()
        optimiser.step()
    assert output.metrics["accuracy"] == 1.0
    assert all(p.grad is not None for p in task.parameters() if p.requires_grad)
    idle = [name for name, p in task.named_parameters() if not p.requires_grad]
    assert idle == ([] if make is tiny else [f"backbone.norms.{i}.{kind}" for i in (0, 1) for kind in ("weight", "bias")])


@pytest.mark.parametrize("make", [tiny, tiny_scales])
def test_evaluation_depends_on_each_cloud_alone(make):
    task, data = make(points=20).eval(), batch()
    together = task.logits(data.points)
    alone = torch.cat([task.logits(cloud[None]) for cloud in data.points.coord.view(6, 30, 3)])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


def test_ragged_clouds_put_the_class_token_first():
    task = tiny().eval()
    coord = torch.randn(14, 3)
    ragged = task.logits(PackedPoints(coord, torch.tensor([0, 3, 14])))
    alone = torch.cat([task.logits(part[None]) for part in coord.split([3, 11])])
    torch.testing.assert_close(ragged, alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("pooling", ["mean_plus_max", "mean_max"])
@pytest.mark.parametrize("skips", [False, True])
def test_readout_of_the_coarsest_scale(pooling, skips):
    """Against the definition, on clouds of which one has fewer points than there are tokens, and one a single point."""
    task = tiny_scales({"local_radius": (0.5, 0.8, 1.2)}, pooling=pooling, max_skips_first=skips, fresh_norm=True).eval()
    clouds = PackedPoints(torch.randn(34, 3), torch.tensor([0, 30, 33, 34]))
    read = task.readout(task.backbone, clouds)
    assert read.shape == (3, task.readout.width)
    for row, points in zip(read, clouds.coord.split([30, 3, 1]), strict=True):
        tokens = task.backbone(points[None]).feats
        best = (tokens[1:] if skips and len(tokens) > 1 else tokens).max(0).values
        expected = tokens.mean(0) + best if pooling == "mean_plus_max" else torch.cat([tokens.mean(0), best])
        torch.testing.assert_close(row, expected, rtol=1e-4, atol=1e-5)


def test_options_of_pretraining_files_are_left_behind():
    """An official pretraining file makes a backbone that drops tokens and attends to padding; a classifier on it does neither."""
    published = {"local_radius": (0.5, 0.8, 1.2), "drop_uncovered": True, "padding_attended": True, "first_token_visible": True}
    task, plain = tiny_scales(published).eval(), tiny_scales({"local_radius": (0.5, 0.8, 1.2)}).eval()
    assert task.backbone.config == plain.backbone.config
    points = torch.randn(2, 40, 3)
    assert torch.equal(task.logits(points), plain.logits(points))


def test_the_norm_is_the_pretrained_one_unless_a_fresh_one_is_asked_for():
    torch.manual_seed(0)
    kept, fresh = (geossl.create_backbone("point_m2ae_tiny") for _ in range(2))
    for backbone in (kept, fresh):
        backbone.norms[-1].weight.data.fill_(2.0)
    config = dataclasses.replace(TASKS.config("classification"), classes=3)
    assert config.build(kept).backbone.norms[-1].weight.eq(2.0).all()
    assert dataclasses.replace(config, fresh_norm=True).build(fresh).backbone.norms[-1].weight.eq(1.0).all()


def test_one_rotation_for_the_whole_batch():
    task, data = tiny_scales(batch_rotation="y").train(), batch()
    random = geossl.layers.BatchRandom(6, torch.Generator().manual_seed(3))
    turned = task._rotate(data.points, random).coord
    assert torch.equal(turned[:, 1], data.points.coord[:, 1])
    flat, before = torch.view_as_complex(turned[:, [2, 0]]), torch.view_as_complex(data.points.coord[:, [2, 0]].contiguous())
    torch.testing.assert_close(flat / before, (flat / before)[:1].expand(len(flat)), rtol=1e-3, atol=1e-3)
    assert (turned - data.points.coord).abs().max() > 0.1
    assert task.eval()._rotate(data.points, random) is data.points


def test_training_resamples_by_the_generator():
    task, data = tiny(points=20).train(), batch()
    clouds = [task._resample(data.points, geossl.layers.BatchRandom(6, torch.Generator().manual_seed(seed))) for seed in (0, 0, 1)]
    assert clouds[0].lengths.tolist() == [20] * 6
    assert torch.equal(clouds[0].coord, clouds[1].coord)
    assert not torch.equal(clouds[0].coord, clouds[2].coord)


def test_smoothing_is_the_published_form():
    logits, label = torch.randn(5, 4), torch.tensor([0, 3, 1, 1, 2])
    torch.testing.assert_close(smoothed_cross_entropy(logits, label, 0.0), F.cross_entropy(logits, label))
    target = torch.full((5, 4), 0.2 / 3).scatter_(1, label[:, None], 0.8)
    torch.testing.assert_close(smoothed_cross_entropy(logits, label, 0.2), F.cross_entropy(logits, target))


def test_labels_out_of_range_are_refused():
    data = batch()
    with pytest.raises(ValueError, match=r"labels must lie in 0..2, got -1..1"):
        tiny()(dataclasses.replace(data, label=data.label - 1))
    with pytest.raises(ValueError, match="the batch has no labels"):
        tiny()(dataclasses.replace(data, label=None))
    with pytest.raises(ConfigError, match="classes must be at least 2, got 0"):
        TASKS.config("classification").build(geossl.create_backbone("point_vit_tiny"))
    with pytest.raises(ConfigError, match=r"needs a point_vit_\* or point_m2ae_\* backbone, got VolumePointViT"):
        TASKS.config("classification").build(geossl.create_backbone("point_vit_volume_tiny"))
    with pytest.raises(UnknownNameError, match="unknown pooling 'mean'; did you mean 'mean_max'"):
        dataclasses.replace(TASKS.config("classification"), pooling="mean")
    with pytest.raises(ConfigError, match="batch_rotation turns positions alone, but the backbone takes 6 columns"):
        tiny_scales({"in_channels": 6}, batch_rotation="y")
