"""The segmentation of events: it learns, equals the published network written plainly, keeps events apart, says what is wrong."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F

import geossl
from geossl.errors import ConfigError, UnknownNameError
from geossl.geometry import PackedPoints, PointBatch
from geossl.tasks import TASKS
from geossl.tasks.segmentation import class_weights_of, focal_loss, fuse_layers


def tiny(backbone=None, **options):
    torch.manual_seed(0)
    encoder = geossl.create_backbone("point_vit_volume_tiny", dim=24, depth=3, heads=2, embed_widths=(8, 16, 32), **(backbone or {}))
    options = {"classes": 3, "layers": (0, -1), "hidden": 16, "dropout": 0.0, "rotation": "none"} | options
    return dataclasses.replace(TASKS.config("segmentation"), **options).build(encoder)


def batch(sizes=(60, 90), seed: int = 0) -> PointBatch:
    """Three parallel lines of voxels, one class each, with energies that tell them apart."""
    generator = torch.Generator().manual_seed(seed)
    coord, label, offsets = [], [], [0]
    for size in sizes:
        kind = torch.arange(size) % 3
        place = torch.stack(
            [torch.arange(size) // 3 * 2 + 300, 340 + 20 * kind, 400 + torch.randint(0, 2, (size,), generator=generator)], 1
        )
        coord.append(place.float())
        label.append(kind)
        offsets.append(offsets[-1] + size)
    label = torch.cat(label)
    feats = (0.4 * label - 0.5 + 0.02 * torch.randn(len(label), generator=generator))[:, None]
    return PointBatch(PackedPoints(torch.cat(coord), torch.tensor(offsets), feats), point_label=label)


@pytest.mark.parametrize("options", [{}, {"rotation": "event", "gamma": 0.0}, {"decoder_depth": 1}, {"global_features": False}])
def test_it_learns_one_batch(options):
    task, data = tiny(**options).train(), batch()
    optimiser = torch.optim.AdamW(task.parameters(), lr=5e-3)
    for _ in range(40):
        output = task(data, generator=torch.Generator().manual_seed(0))
        optimiser.zero_grad()
        output.loss.backward()
        optimiser.step()
    assert output.metrics["accuracy"] > 0.97
    unused = {name for name, p in task.named_parameters() if p.grad is None}
    assert unused == set()


def test_the_head_is_the_published_network_written_plainly():
    task, data = tiny().eval(), batch((40, 70))
    with torch.no_grad():
        for norm in (task.head.up_norm1, task.head.up_norm2, task.head.norm1, task.head.norm2):
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2)
        ours = task.log_probs(data.points)
        groups = task.backbone.group(data.points)
        feats, head = task.token_features(groups), task.head
        found, start, first = [], 0, 0
        for points, tokens in zip(data.points.lengths.tolist(), groups.segments.lengths, strict=True):
            xyz = task.backbone.normalize(data.points.coord[start : start + points])
            own, centers = feats[first : first + tokens], groups.centers[first : first + tokens]
            distance, index = (xyz[:, None] - centers).square().sum(-1).topk(min(5, tokens), largest=False)
            weight = 1 / (distance + torch.finfo(torch.float32).eps)
            mixed = (own[index] * (weight / weight.sum(1, keepdim=True))[..., None]).sum(1)
            x = F.relu(head.up_norm1(head.up1(torch.cat([xyz, mixed], 1))))
            x = F.relu(head.up_norm2(head.up2(x)))
            x = torch.cat([x, own.max(0).values.expand(points, -1), own.mean(0).expand(points, -1)], 1)
            x = F.relu(head.norm2(head.conv2(F.relu(head.norm1(head.conv1(x))))))
            found.append(head.conv3(x).log_softmax(1))
            start, first = start + points, first + tokens
    torch.testing.assert_close(ours, torch.cat(found), rtol=1e-4, atol=1e-5)


def test_events_do_not_see_each_other():
    task, (one, two) = tiny().eval(), (batch((50,), 1), batch((80,), 2))
    coord, feats = (torch.cat([getattr(event.points, key) for event in (one, two)]) for key in ("coord", "feats"))
    together = task.log_probs(PackedPoints(coord, torch.tensor([0, 50, 130]), feats))
    apart = torch.cat([task.log_probs(event.points) for event in (one, two)])
    torch.testing.assert_close(together, apart, rtol=1e-4, atol=1e-5)


def test_padding_never_enters():
    task, data = tiny().eval(), batch((30, 50))
    rows = torch.cat([data.points.coord, data.points.feats], 1).split([30, 50])
    padded = torch.full((2, 64, 4), torch.nan)
    padded[0, :30], padded[1, :50] = rows
    packed = PackedPoints.from_padded(padded, torch.tensor([30, 50]))
    torch.testing.assert_close(task.log_probs(packed), task.log_probs(data.points), rtol=0, atol=0)


def test_few_tokens_are_a_quirk_by_choice():
    coord, centers = torch.tensor([[0.0, 0, 0], [1, 0, 0]]), torch.tensor([[0.0, 0, 0.5], [1, 0, 0]])
    offsets, token_offsets = torch.tensor([0, 2]), torch.tensor([0, 2])
    sound, published = (tiny(absent_neighbors_first=flag).head for flag in (False, True))
    index, weight = sound.token_weights(coord, offsets, centers, token_offsets)
    assert index.tolist() == [[0, 1, -1, -1, -1], [1, 0, -1, -1, -1]]
    torch.testing.assert_close(weight[0, :2], torch.tensor([0.8, 0.2]))
    assert weight.isfinite().all()
    index, weight = published.token_weights(coord, offsets, centers, token_offsets)
    assert index.tolist() == [[0, 1, 0, 0, 0], [1, 0, 0, 0, 0]]
    assert weight[0, 2:].sum() > 0.999  # the first token at distance 0 drowns the true neighbours
    torch.testing.assert_close(weight.sum(1), torch.ones(2))


@pytest.mark.parametrize("freeze", ["encoder", "encoder_published"])
def test_a_frozen_encoder_keeps_its_weights(freeze):
    task, data = tiny({"drop_path": 0.5}, freeze=freeze).train(), batch()
    before = {name: value.clone() for name, value in task.backbone.state_dict().items()}
    task(data).loss.backward()
    assert all(p.grad is None for p in task.backbone.parameters())
    assert all(p.grad is not None for p in task.head.parameters())
    assert task.backbone.training == (freeze == "encoder_published")
    moved = {name for name, value in task.backbone.state_dict().items() if not torch.equal(value, before[name])}
    assert all("norm" in name and ("running" in name or "tracked" in name) for name in moved)
    assert bool(moved) == (freeze == "encoder_published")


def test_what_is_never_read_is_not_trained():
    task = tiny({"final_norm": True}, layers=(0, 1)).train()
    task(batch()).loss.backward()
    trained, moved = ({n for n, p in task.named_parameters() if f(p)} for f in (lambda p: p.requires_grad, lambda p: p.grad is not None))
    assert trained == moved
    assert not any(name.startswith(("backbone.norm.", "backbone.blocks.blocks.2.")) for name in trained)
    task = tiny({"final_norm": True}, layers=(0, 1), decoder_depth=1).train()
    task(batch()).loss.backward()
    assert all(p.grad is not None for p in task.parameters())


def test_training_rotates_by_the_generator():
    task, data = tiny(rotation="event").train(), batch()
    losses = [task(data, generator=torch.Generator().manual_seed(seed)).loss.item() for seed in (0, 0, 1)]
    assert losses[0] == losses[1] != losses[2]
    coord, generator = data.points.coord, torch.Generator().manual_seed(0)
    seen = []
    task.head.register_forward_pre_hook(lambda module, inputs: seen.append(inputs))
    original = task.head.upsample
    task.head.upsample = lambda place, *rest: (seen.append(place), original(place, *rest))[1]
    task(data, generator=generator)
    rotated, still = seen[0], task.backbone.normalize(coord)
    torch.testing.assert_close(rotated.norm(dim=1), still.norm(dim=1))
    assert not torch.allclose(rotated, still, atol=1e-3)


def test_focal_loss():
    logits = torch.randn(7, 3, dtype=torch.float64, requires_grad=True)
    label, weight = torch.tensor([0, 1, 2, 2, 1, 0, 1]), torch.tensor([0.5, 2.0, 1.0], dtype=torch.float64)
    torch.testing.assert_close(
        focal_loss(logits.log_softmax(1), label, torch.ones(3, dtype=torch.float64), 0.0), F.cross_entropy(logits, label)
    )
    p = logits.softmax(1)[torch.arange(7), label]
    torch.testing.assert_close(focal_loss(logits.log_softmax(1), label, weight, 2.0), -(weight[label] * (1 - p) ** 2 * p.log()).mean())
    assert torch.autograd.gradcheck(lambda x: focal_loss(x.log_softmax(1), label, weight, 2.0), logits)
    sure = torch.tensor([[0.0, -200.0]], requires_grad=True)
    focal_loss(sure.log_softmax(1), torch.tensor([0]), torch.ones(2), 0.5).backward()
    assert sure.grad.isfinite().all()
    assert focal_loss(torch.zeros(0, 3), label[:0], weight, 2.0) == 0


def test_class_weights_are_the_published_ones():
    weights = class_weights_of(torch.tensor([1926651899, 2038240940, 34083197, 92015482]))
    assert weights == pytest.approx((2.12337, 2.00712, 120.0296, 44.4598), rel=1e-5)
    assert class_weights_of(torch.tensor([3, 0])) == (1.0, 0.0)
    assert tiny(class_weights=(1.0, 2.0, 3.0)).class_weights.tolist() == [1, 2, 3]


def test_batchwide_fusion_spans_the_batch():
    hidden = [torch.randn(5, 4), 3 * torch.randn(5, 4) + 1]
    wide, each = (fuse_layers(hidden, batchwide=flag) for flag in (True, False))
    torch.testing.assert_close(wide, sum((x - x.mean()) / x.std(correction=0) for x in hidden) / 2)
    torch.testing.assert_close(each, sum(F.layer_norm(x, (4,)) for x in hidden) / 2)


def test_unlabelled_points_do_not_count():
    task, data = tiny().eval(), batch((30,))
    few = dataclasses.replace(data, point_label=torch.where(torch.arange(30) < 10, data.point_label, -1))
    log_probs = task.log_probs(data.points)
    torch.testing.assert_close(task(few).loss, focal_loss(log_probs[:10], data.point_label[:10], task.class_weights, 2.0))
    none = task(dataclasses.replace(data, point_label=torch.full((30,), -1)))
    assert none.loss == 0
    assert none.metrics["accuracy"] == 0


def test_what_does_not_fit_is_refused():
    data = batch((30,))
    with pytest.raises(ValueError, match=r"point_label must lie in 0..2, or be -1 .*, got 0..3"):
        tiny()(dataclasses.replace(data, point_label=torch.arange(30) % 4))
    with pytest.raises(ValueError, match="the batch has no point_label"):
        tiny()(dataclasses.replace(data, point_label=None))
    with pytest.raises(ConfigError, match=r"layers: block 7 does not exist; the backbone has 3"):
        tiny(layers=(1, 7))
    with pytest.raises(ConfigError, match="needs a point_vit_volume_"):
        dataclasses.replace(TASKS.config("segmentation"), classes=3).build(geossl.create_backbone("point_vit_tiny"))
    with pytest.raises(ConfigError, match="classes must be at least 2, got 0"):
        tiny(classes=0)
    with pytest.raises(ConfigError, match="class_weights must be one number for each of the 3 classes"):
        tiny(class_weights=(1.0, 2.0))
    with pytest.raises(UnknownNameError, match="unknown freeze 'encodr'; did you mean 'encoder'"):
        tiny(freeze="encodr")


@pytest.mark.parametrize("rotation", ["none", "event", "batch"])
def test_it_trains_in_bfloat16(rotation):
    task, data = tiny(rotation=rotation).train(), batch()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = task(data, generator=torch.Generator().manual_seed(0))
    output.loss.backward()
    exact = task(data, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(output.loss, exact.loss, rtol=0.02, atol=0)
