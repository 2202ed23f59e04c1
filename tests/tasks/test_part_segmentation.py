"""Part segmentation: equal to the published heads written out in plain torch, official files round-trip, and it learns."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import geossl
from geossl.errors import CheckpointError, ConfigError
from geossl.geometry import PackedPoints, PointBatch
from geossl.methods.reference import find_system
from geossl.models.point_m2ae import PointM2AEEncoder
from geossl.tasks import TASKS, PartSegmentation

COUNTS = (2, 3)
PLAIN = {"dim": 24, "depth": 3, "heads": 2, "groups": 8, "group_size": 4, "embed_widths": (8, 8, 8)}
SCALES = {"dims": (8, 12, 16), "depths": (1, 1, 1), "heads": 2, "groups": (16, 8, 4), "group_sizes": (6, 4, 4), "embed_widths": (8, 8, 8)}
KINDS = ("point_vit_tiny", "point_m2ae_tiny")


def make(kind: str, backbone: dict | None = None, **options) -> PartSegmentation:
    torch.manual_seed(0)
    encoder = geossl.create_backbone(kind, **(PLAIN if kind == KINDS[0] else SCALES) | (backbone or {}))
    options = {"part_counts": COUNTS, "label_dim": 6, "propagation": (20, 16), "hidden": (16, 12), "dropout": 0.0} | options
    return dataclasses.replace(TASKS.config("part_segmentation"), **options).build(encoder)


def batch(count: int = 4, points: int = 30) -> PointBatch:
    """Two categories; the parts are slices along x."""
    coord = torch.rand(count, points, 3, generator=torch.Generator().manual_seed(0))
    category = torch.arange(count) % 2
    first, parts = torch.tensor([0, 2])[category], torch.tensor(COUNTS)[category]
    part = first[:, None] + (coord[..., 0] * parts[:, None]).long()
    return PointBatch(PackedPoints.from_padded(coord), category, point_label=part.flatten())


@pytest.mark.parametrize("kind", KINDS)
def test_it_learns_one_batch(kind):
    task, data = make(kind).train(), batch()
    optimiser = torch.optim.AdamW(task.parameters(), lr=5e-3)
    for _ in range(60):
        output = task(data, generator=torch.Generator().manual_seed(0))
        optimiser.zero_grad()
        output.loss.backward()
        optimiser.step()
    assert output.metrics["accuracy"] > 0.95
    assert all(p.grad is not None for p in task.parameters())


UNREAD = [f"backbone.{part}.2." for part in ("embeds", "positions", "blocks", "norms")] + ["backbone.norms.0."]


@pytest.mark.parametrize(("kind", "layers", "idle"), [(KINDS[0], (0, 1), ["backbone.blocks.blocks.2."]), (KINDS[1], (1,), UNREAD)])
def test_what_is_not_read_is_not_trained(kind, layers, idle):
    task = make(kind, layers=layers).train()
    task(batch()).loss.backward()
    without = {name for name, p in task.named_parameters() if p.grad is None}
    assert without == {name for name, p in task.named_parameters() if not p.requires_grad}
    assert all(any(name.startswith(prefix) for name in without) for prefix in idle)
    assert all(name.startswith(tuple(idle)) for name in without)


def interpolated(points: Tensor, centers: Tensor, feats: Tensor) -> Tensor:
    near = (points[:, None] - centers).square().sum(-1).topk(min(3, len(centers)), largest=False)
    weight = 1 / (near.values + 1e-8)
    return (feats[near.indices] * (weight / weight.sum(1, keepdim=True))[..., None]).sum(1)


def published(task: PartSegmentation, shapes: PackedPoints, category: Tensor) -> Tensor:
    """The head as published: everything repeated for every point, laid side by side, and only then multiplied."""
    backbone, lengths = task.backbone, shapes.lengths.tolist()
    if isinstance(backbone, PointM2AEEncoder):
        taps = [(t.centers.split(t.lengths.tolist()), t.feats.split(t.lengths.tolist())) for t in backbone.forward_pyramid(shapes)]
    else:
        tokens, hidden = backbone.forward_intermediates(shapes, list(task.config.layers))
        sizes = tokens.lengths.tolist()
        taps = [(tokens.centers.split(sizes), torch.cat(hidden, 1).split(sizes))]
    carried = []
    for propagation, (centers, feats) in zip(task.propagations, taps, strict=True):
        clouds = zip(shapes.coord.split(lengths), centers, feats, strict=True)
        x = torch.cat([torch.cat([points, interpolated(points, c, f)], 1) for points, c, f in clouds])
        for layer, norm in zip(propagation.layers, propagation.norms, strict=True):
            x = F.relu(norm(layer(x)))
        carried.append(x)
    x = torch.cat(carried, 1)
    one_hot = F.one_hot(category, len(task.config.part_counts)).to(x)
    names = F.leaky_relu(task.label_norm(task.label_embedding(one_hot)), 0.2)
    if isinstance(backbone, PointM2AEEncoder):
        shared = [part.max(0).values + part.mean(0) for part in x.split(lengths)]
    else:
        shared = [torch.cat([part.max(0).values, part.mean(0)]) for part in taps[0][1]]
    repeated = [torch.cat([row, name]).expand(n, -1) for row, name, n in zip(shared, names, lengths, strict=True)]
    x = torch.cat([x, torch.cat(repeated)], 1)
    for layer, norm in zip(task.layers, task.norms, strict=True):
        x = F.relu(norm(layer(x)))
    return task.classify(x)


def stirred(task: nn.Module) -> nn.Module:
    """Give every norm statistics and weights that are not the identity."""
    generator = torch.Generator().manual_seed(5)
    for value in task.state_dict().values():
        if value.dim() == 1 and value.is_floating_point():
            value.copy_(0.5 + torch.rand(value.shape, generator=generator))
    return task.eval()


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_equal_to_the_published_head(kind, training):
    """Also for a shape of fewer points than there are tokens, and one of a single point; in training, every gradient too."""
    task = stirred(make(kind)).train(training).double()
    shapes = PackedPoints(torch.rand(36, 3, dtype=torch.float64), torch.tensor([0, 30, 35, 36]))
    category, direction = torch.tensor([1, 0, 1]), torch.randn(36, sum(COUNTS)).double()
    found = []
    for logits in (task.logits(shapes, category), published(task, shapes, category)):
        task.zero_grad()
        (logits * direction).sum().backward()
        found.append((logits, {name: p.grad.clone() for name, p in task.named_parameters()}))
    torch.testing.assert_close(found[0][0].double(), found[1][0], rtol=1e-5, atol=1e-6)
    for name, gradient in found[0][1].items():
        expected = found[1][1][name]
        atol = 1e-5 * max(float(expected.abs().max()), 1.0)
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=atol, msg=lambda text, name=name: f"{name}: {text}")


def test_only_parts_of_the_category_are_predicted():
    task, data = make(KINDS[0]).eval(), batch()
    task.classify.bias.data[:] = torch.tensor([9.0, 0, 0, 0, 0])
    predicted = task.predict(data.points, data.label).view(4, -1)
    assert set(predicted[::2].flatten().tolist()) <= {0, 1}
    assert set(predicted[1::2].flatten().tolist()) <= {2, 3, 4}


def test_the_published_sizes():
    plain = TASKS.config("part_segmentation")
    counts = geossl.tasks.part_segmentation.SHAPENET_PART_COUNTS
    task = dataclasses.replace(plain, part_counts=counts).build(geossl.create_backbone("point_vit_small", groups=128))
    assert task.config.layers == (3, 7, 11)
    assert task.propagations[0].layers[0].in_features == 1152 + 3
    assert task.layers[0].in_features == 1024 + 2 * 1152 + 64 == 3392
    task = dataclasses.replace(plain, part_counts=counts).build(geossl.create_backbone("point_m2ae_small"))
    assert [p.layers[0].in_features for p in task.propagations] == [99, 195, 387]
    assert [layer.in_features for layer in task.layers] == [6208, 1024, 512]
    assert task.classify.out_features == 50


def official(task: PartSegmentation) -> dict[str, Tensor]:
    """The weights of ``task`` under the published names, with 1x1 convolutions."""
    scales = isinstance(task.backbone, PointM2AEEncoder)
    names = {
        "label_embedding.": "label_conv.0.",
        "label_norm.": "label_conv.1.",
        "classify.": f"convs{len(task.layers) + 1}.",
        "backbone.embeds.": "h_encoder.token_embed.",
        "backbone.positions.": "h_encoder.encoder_pos_embeds.",
        "backbone.blocks.": "h_encoder.encoder_blocks." if scales else "blocks.",
        "backbone.norms.": "h_encoder.encoder_norms.",
        "backbone.embed.": "encoder.",
        "backbone.position.": "pos_embed.",
        "backbone.norm.": "norm.",
    }
    inner = {"conv1.": "first_conv.0.", "norm1.": "first_conv.1.", "conv2.": "first_conv.3."}
    inner |= {"conv3.": "second_conv.0.", "norm2.": "second_conv.1.", "conv4.": "second_conv.3."}
    state = {}
    for name, value in task.state_dict().items():
        old = next((old for old in names if name.startswith(old)), None)
        convolution = value.dim() == 2 and not (".attn." in name or ".mlp." in name or "position" in name)
        if old is not None:
            key = names[old] + name.removeprefix(old)
            for ours, theirs in inner.items() if "embed." in old or "embeds." in old else ():
                key = key.replace(ours, theirs)
        elif name.startswith("propagations."):
            key = name.replace(".layers.", ".mlp_convs.").replace(".norms.", ".mlp_bns.")
            key = key if scales else key.replace("propagations.0.", "propagation_0.")
        else:
            part, number, rest = name.split(".", 2)
            key = f"{'convs' if part == 'layers' else 'bns'}{int(number) + 1}.{rest}"
        state[key] = value[..., None] if convolution else value
    return state


@pytest.mark.parametrize(("kind", "system"), [(KINDS[0], "point_mae"), (KINDS[1], "point_m2ae")])
def test_an_official_file_gives_the_same_logits(kind, system, tmp_path):
    radius = {} if kind == KINDS[0] else {"local_radius": (0.4, 0.6, 0.9)}
    hidden = (16, 12) if kind == KINDS[0] else (16, 12, 10)
    task = stirred(make(kind, {**radius, "min_sq_norm": 1e-3}, hidden=hidden))
    config = {"num_group": 8, "group_size": 4, "num_heads": 2, "layers": task.config.layers, "part_counts": COUNTS}
    config |= {"num_groups": SCALES["groups"], "group_sizes": SCALES["group_sizes"], **radius}
    state = official(task)
    expected = {
        "label_conv.0.weight",
        "label_conv.1.running_var",
        "convs1.weight",
        f"bns{len(hidden)}.bias",
        f"convs{len(hidden) + 1}.bias",
    }
    expected |= {"propagation_0.mlp_convs.1.bias" if kind == KINDS[0] else "propagations.2.mlp_bns.1.weight"}
    assert expected <= set(state)
    assert state["convs1.weight"].dim() == 3
    torch.save({"model": {f"module.{key}": value for key, value in state.items()}}, tmp_path / "part_seg.pth")
    assert find_system(tmp_path / "part_seg.pth") == system
    loaded = geossl.load_reference(system, tmp_path / "part_seg.pth", config)
    points, category = torch.rand(2, 40, 3), torch.tensor([1, 0])
    assert torch.equal(loaded.logits(points, category), task.logits(points, category))
    with pytest.raises(CheckpointError, match=r"unexpected \(1\): vote\.weight"):
        geossl.load_reference(system, state | {"vote.weight": torch.zeros(1)}, config)
    with pytest.raises(CheckpointError, match=r"missing \(1\): layers\.0\.bias"):
        geossl.load_reference(system, {k: v for k, v in state.items() if k != "convs1.bias"}, config)
    with pytest.raises(CheckpointError, match="has 5 parts in 2 categories, part_counts 50 in 16: say in config"):
        geossl.load_reference(system, state, {k: v for k, v in config.items() if k != "part_counts"})
    with pytest.raises(CheckpointError, match="not a part segmentation checkpoint of Point-MAE or Point-M2AE"):
        geossl.load_reference(system, {k: v for k, v in state.items() if "embed" not in k and not k.startswith("encoder.")}, config)


def test_bad_input_is_told():
    task, data = make(KINDS[0]).eval(), batch()
    with pytest.raises(ValueError, match="the batch has no labels"):
        task(dataclasses.replace(data, label=None))
    with pytest.raises(ValueError, match=r"labels must lie in 0\.\.1, got 0\.\.2"):
        task(dataclasses.replace(data, label=torch.tensor([0, 1, 2, 1])))
    with pytest.raises(ValueError, match="the batch has no point_label"):
        task(dataclasses.replace(data, point_label=None))
    with pytest.raises(ValueError, match=r"point_label must lie in 0\.\.4, or be -1"):
        task(dataclasses.replace(data, point_label=data.point_label + 3))
    with pytest.raises(ValueError, match=r"point 0 of the batch has part 0, but its shape is of category 1, whose parts are 2\.\.4"):
        task(dataclasses.replace(data, label=1 - data.label))
    unknown = task(dataclasses.replace(data, point_label=torch.full_like(data.point_label, -1)))
    assert unknown.loss == 0
    points = torch.rand(2, 30, 3)
    for call in (make(KINDS[0]).eval().logits, make(KINDS[0]).eval().predict):
        with pytest.raises(ValueError, match=r"PartSegmentation: labels must lie in 0\.\.1, got 0\.\.2"):
            call(points, torch.tensor([0, 2]))
        with pytest.raises(ValueError, match=r"category must be \[2\], one for each shape, got \[1\]"):
            call(points, torch.tensor([0]))
    with pytest.raises(ConfigError, match="layers: block 3 does not exist; the backbone has 3"):
        make(KINDS[0], layers=(3,))
    with pytest.raises(ConfigError, match="layers: scale 5 does not exist; the backbone has 3"):
        make(KINDS[1], layers=(5,))
    with pytest.raises(ConfigError, match="part_counts must name the parts of at least one category"):
        make(KINDS[0], part_counts=())
    with pytest.raises(ConfigError, match=r"needs a point_vit_\* or point_m2ae_\* backbone, got VolumePointViT"):
        TASKS.config("part_segmentation").build(geossl.create_backbone("point_vit_volume_tiny"))
