"""Point-MAE: what is hidden stays unseen, losses fall, every option works, and the batch may be split."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import geossl
from geossl.errors import ConfigError, UnknownNameError
from geossl.geometry import PackedPoints, PointBatch
from geossl.methods import METHODS, PointMAE
from geossl.methods.point_mae import matched_feature_error


def tiny(columns: int = 3, **options) -> PointMAE:
    torch.manual_seed(0)
    backbone = geossl.create_backbone("point_vit_tiny", dim=24, depth=2, heads=2, groups=8, group_size=4, in_channels=columns)
    options = {"decoder_depth": 1, "decoder_heads": 2, "decoder_drop_path": 0.0} | options
    return dataclasses.replace(METHODS.config("point_mae"), **options).build(backbone)


def clouds(*lengths: int, columns: int = 3, seed: int = 0) -> PointBatch:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(sum(lengths), columns, generator=generator)
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    return PointBatch(PackedPoints(rows[:, :3], offsets, rows[:, 3:] if columns > 3 else None))


@pytest.mark.parametrize("options", [{}, {"loss": "cdl1"}, {"mask": "block"}, {"mask_ratio": 0.25}, {"decoder_drop_path": 0.3}])
@pytest.mark.parametrize("columns", [3, 9])
def test_the_loss_falls_on_one_batch(options, columns):
    method, batch = tiny(columns, **options).train(), clouds(40, 40, 40, columns=columns)
    optimiser = torch.optim.AdamW(method.parameters(), lr=3e-3)
    losses = []
    for _ in range(40):
        loss = method(batch, generator=torch.Generator().manual_seed(1)).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.7 * losses[0]


def test_feature_columns_are_learned_when_asked_for():
    """Colour that is a function of position can be predicted, and the loss says how well."""
    method, batch = tiny(6, feature_weight=1.0).train(), clouds(60, 60, columns=6)
    batch.points.feats.copy_(batch.points.coord.sigmoid())
    optimiser = torch.optim.AdamW(method.parameters(), lr=3e-3)
    errors = []
    for _ in range(60):
        output = method(batch, generator=torch.Generator().manual_seed(1))
        optimiser.zero_grad()
        output.loss.backward()
        optimiser.step()
        errors.append(float(output.metrics["feature_error"]))
    assert output.aux["prediction"].shape[2] == 6
    assert errors[-1] < 0.3 * errors[0]


def test_feature_error_compares_nearest_points_both_ways():
    prediction = torch.tensor([[[0.0, 0, 0, 1], [5, 0, 0, 3]]])
    target = torch.tensor([[[0.1, 0, 0, 2], [0.2, 0, 0, 4], [5, 0, 0, 3]]])
    assert float(matched_feature_error(prediction, target)) == pytest.approx(0.5 * ((1 + 0) / 2 + (1 + 9 + 0) / 3))
    assert float(matched_feature_error(prediction[:0], target[:0])) == 0.0


def test_hidden_points_reach_the_prediction_only_through_their_centre():
    """Moving a hidden group's points, centre and neighbours' membership kept, changes no prediction in evaluation mode."""
    method, batch = tiny().eval(), clouds(40)
    groups = method.backbone.group(batch.points)
    mask = method.draw_mask(groups, geossl.layers.BatchRandom(1, torch.Generator().manual_seed(0)))
    points = groups.points.clone().requires_grad_()
    method.reconstruct(groups._replace(points=points), mask).sum().backward()
    touched = points.grad.abs().sum((1, 2)) > 0
    assert not touched[mask].any()
    assert touched[~mask].all()


def test_a_batch_of_ragged_clouds_equals_its_clouds_one_by_one():
    method, batch = tiny().eval(), clouds(40, 3, 17, 1)
    groups = method.backbone.group(batch.points)
    assert groups.segments.lengths == (8, 3, 8, 1)
    mask = torch.cat([torch.arange(n) < min(int(0.6 * n), n - 1) for n in groups.segments.lengths])
    together = method.reconstruct(groups, mask)
    alone = []
    for cloud, hidden in zip(batch.points.coord.split([40, 3, 17, 1]), mask.split(list(groups.segments.lengths)), strict=True):
        alone.append(method.reconstruct(method.backbone.group(cloud[None]), hidden))
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-5)


def test_halves_of_a_batch_hide_what_the_whole_batch_hides():
    method, batch = tiny().eval(), clouds(40, 40, 40, 40)
    whole = method(batch, generator=torch.Generator().manual_seed(5))
    losses, masks = [], []
    for rank in range(2):
        slot = torch.arange(rank, 4, 2)
        points = PackedPoints.from_padded(batch.points.coord.view(4, 40, 3)[slot])
        half = method(PointBatch(points, slot=slot, global_size=4), generator=torch.Generator().manual_seed(5))
        losses.append(half.loss)
        masks.append(half.aux["mask"].view(2, 8))
    assert torch.equal(torch.stack(masks, 1).view(4, 8), whole.aux["mask"].view(4, 8))
    torch.testing.assert_close(torch.stack(losses).mean(), whole.loss)


def test_pictures_hold_the_parts_of_each_cloud():
    pictures = tiny().eval().pictures(clouds(40, 12))
    assert [p["input"].shape for p in pictures] == [(40, 3), (12, 3)]
    assert all(p["visible"].shape == (16, 3) and p["reconstruction"].shape == (16, 3) for p in pictures)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"mask_ratio": 1.0}, ConfigError, "mask_ratio must lie strictly between 0 and 1, got 1.0"),
        ({"feature_weight": -1.0}, ConfigError, "feature_weight must be at least 0, got -1.0"),
        ({"feature_weight": 1.0}, ConfigError, "feature_weight needs points with columns after the coordinates"),
        ({"loss": "cdl3"}, UnknownNameError, "did you mean 'cdl"),
        ({"mask": "blok"}, UnknownNameError, "did you mean 'block'"),
        ({"decoder_heads": 5}, ConfigError, "decoder_heads must divide the backbone's dim 24, got 5"),
    ],
)
def test_wrong_options_are_refused_by_name(options, error, message):
    with pytest.raises(error, match=message):
        tiny(**options)


def test_wrong_columns_are_refused():
    with pytest.raises(ValueError, match=r"points have 9 columns but the backbone was made for in_channels=3"):
        tiny()(clouds(20, columns=9))


def test_an_empty_or_all_nan_cloud_is_refused_by_number():
    batch = clouds(20, 0, 20)
    with pytest.raises(ValueError, match=r"cloud\(s\) \[1\] of 3 have none"):
        tiny()(batch)
    batch = clouds(20, 20)
    batch.points.coord[20:] = torch.nan
    with pytest.raises(ValueError, match=r"cloud\(s\) \[1\] of 2 have none"):
        tiny()(batch)


def test_two_gradient_steps_in_bfloat16_stay_finite_and_close():
    batch = clouds(60, 60)
    losses = []
    for enabled in (False, True):
        method = tiny().train()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss = method(batch, generator=torch.Generator().manual_seed(0)).loss
        loss.backward()
        assert all(torch.isfinite(p.grad).all() for p in method.parameters())
        assert loss.dtype == torch.float32
        losses.append(float(loss.detach()))
    assert losses[1] == pytest.approx(losses[0], rel=0.02)
