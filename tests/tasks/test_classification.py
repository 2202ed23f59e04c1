"""The published classifier: it learns, resamples reproducibly, and says what is wrong with labels."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F

import geossl
from geossl.errors import ConfigError
from geossl.geometry import PackedPoints, PointBatch
from geossl.tasks import TASKS
from geossl.tasks.classification import smoothed_cross_entropy


def tiny(**options):
    torch.manual_seed(0)
    backbone = geossl.create_backbone("point_vit_tiny", dim=24, depth=2, heads=2, groups=6, group_size=4)
    return dataclasses.replace(TASKS.config("classification"), classes=3, **options).build(backbone)


def batch(count: int = 6, points: int = 30) -> PointBatch:
    cloud = torch.randn(count, points, 3, generator=torch.Generator().manual_seed(0))
    label = torch.arange(count) % 3
    return PointBatch(PackedPoints.from_padded(cloud * (1 + label)[:, None, None]), label)


@pytest.mark.parametrize("options", [{"dropout": 0.0}, {"dropout": 0.0, "points": 20, "label_smoothing": 0.2}])
def test_it_learns_one_batch(options):
    task, data = tiny(**options).train(), batch()
    optimiser = torch.optim.AdamW(task.parameters(), lr=3e-3)
    for _ in range(40):
        output = task(data, generator=torch.Generator().manual_seed(0))
        optimiser.zero_grad()
        output.loss.backward()
        optimiser.step()
    assert output.metrics["accuracy"] == 1.0
    assert all(p.grad is not None for p in task.parameters())


def test_evaluation_depends_on_each_cloud_alone():
    task, data = tiny(points=20).eval(), batch()
    together = task.logits(data.points)
    alone = torch.cat([task.logits(cloud[None]) for cloud in data.points.coord.view(6, 30, 3)])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


def test_ragged_clouds_put_the_class_token_first():
    task = tiny().eval()
    coord = torch.randn(14, 3)
    ragged = task.logits(PackedPoints(coord, torch.tensor([0, 3, 14])))
    alone = torch.cat([task.logits(part[None]) for part in coord.split([3, 11])])
    torch.testing.assert_close(ragged, alone, rtol=1e-4, atol=1e-5)


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
