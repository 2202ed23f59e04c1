"""The hierarchical encoder: packed equals padded, masks propagate as defined, published behaviour is an option, odd clouds are defined."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import pytest
import torch
from torch import Tensor

import geossl
from geossl.errors import ConfigError
from geossl.evaluation.features import pool_tokens, read_tokens
from geossl.geometry import PackedPoints
from geossl.layers import Segments
from geossl.models import PointM2AEEncoder
from geossl.models.point_m2ae import Scale, convert_reference_encoder

SCALES = {"dims": (8, 12, 16), "depths": (1, 2, 1), "heads": 2, "groups": (20, 12, 6), "group_sizes": (6, 4, 4), "embed_widths": (8, 8, 8)}
RADII = (0.6, 0.9, 1.5)


def encoder(**options) -> PointM2AEEncoder:
    torch.manual_seed(0)
    return geossl.create_backbone("point_m2ae_tiny", **SCALES | options).eval()  # type: ignore[return-value]


def clouds(*lengths: int) -> PackedPoints:
    generator = torch.Generator().manual_seed(1)
    return PackedPoints(torch.randn(sum(lengths), 3, generator=generator), torch.tensor([0, *lengths]).cumsum(0))


def hide(backbone: PointM2AEEncoder, scales: Sequence[Scale], *visible: int) -> list[Tensor]:
    """Hide all but the first so many coarsest tokens of each cloud."""
    top = torch.cat([torch.arange(n) >= seen for n, seen in zip(scales[-1].segments.lengths, visible, strict=True)])
    return backbone.propagate_mask(scales, top)


def test_the_published_encoder_has_the_published_size():
    backbone = geossl.create_backbone("point_m2ae_small")
    norms = sum(p.numel() for p in backbone.norms.parameters())
    method = geossl.methods.METHODS.config("point_m2ae").build(backbone)
    assert sum(p.numel() for p in method.parameters()) == 15_255_856
    assert sum(p.numel() for p in backbone.parameters()) - norms == 12_653_632


def test_centres_of_a_scale_are_centres_of_the_finer_one():
    scales = encoder().group(clouds(50, 9))
    assert [scale.segments.lengths for scale in scales] == [(20, 9), (12, 9), (6, 6)]
    for finer, scale in pairwise(scales):
        torch.testing.assert_close(finer.centers[scale.index[:, 0]], scale.centers, rtol=0, atol=0)
        torch.testing.assert_close(finer.centers[scale.index] - scale.centers[:, None], scale.members, rtol=0, atol=0)
        assert (scale.index[:6] < finer.segments.lengths[0]).all()  # no group reaches into another cloud


def test_a_finer_token_is_hidden_where_no_visible_coarser_one_has_it():
    backbone = encoder()
    scales = backbone.group(clouds(50, 40))
    hidden = hide(backbone, scales, 2, 3)
    for fine in (0, 1):
        visible = {int(row) for token, row_list in enumerate(scales[fine + 1].index) if not hidden[fine + 1][token] for row in row_list}
        assert hidden[fine].tolist() == [token not in visible for token in range(len(hidden[fine]))]


def test_the_published_always_visible_token_is_an_option():
    """Token 0 of the first cloud, as soon as anything is hidden at the scale above it; no token of another cloud."""
    scales = encoder().group(clouds(50, 50))
    top = torch.arange(12) % 6 != 4  # one visible token in each cloud, not the first
    sound, published = (encoder(first_token_visible=option).propagate_mask(scales, top)[1] for option in (False, True))
    assert sound[0]
    assert (sound != published).nonzero().tolist() == [[0]]
    nothing = torch.zeros(12, dtype=torch.bool)
    sound, published = (encoder(first_token_visible=option).propagate_mask(scales, nothing)[1] for option in (False, True))
    assert torch.equal(sound, published)


@pytest.mark.parametrize("local_radius", [(0.0, 0.0, 0.0), RADII])
def test_a_batch_of_ragged_clouds_equals_its_clouds_one_by_one(local_radius):
    backbone, points = encoder(local_radius=local_radius), clouds(50, 3, 17, 1)
    scales = backbone.group(points)
    together = backbone.encode(scales, hide(backbone, scales, 2, 1, 3, 1))
    for number, cloud in enumerate(points.coord.split(points.lengths.tolist())):
        own = backbone.group(cloud[None])
        alone = backbone.encode(own, hide(backbone, own, (2, 1, 3, 1)[number]))
        for batch, single in zip(together, alone, strict=True):
            part = batch.feats.split(list(batch.segments.lengths))[number]
            torch.testing.assert_close(part, single.feats, rtol=1e-4, atol=1e-5)


def plain_encode(backbone: PointM2AEEncoder, scales: Sequence[Scale], hidden: Sequence[Tensor]) -> list[Tensor]:
    """The published form: samples padded with zeros, attention by an additive mask, the whole grid of tokens kept."""
    config, grid, outputs, distances = backbone.config, torch.empty(0), [], None
    for i, (scale, mask) in enumerate(zip(scales, hidden, strict=True)):
        grid = backbone.embeds[i].reference(scale.members if i == 0 else grid[scale.index])
        visible = [part.nonzero()[:, 0] + start for part, start in _parts(~mask, scale.segments)]
        longest = max(map(len, visible))
        x, centers, padding = (torch.zeros(len(visible), longest, n) for n in (grid.shape[1], 3, 1))
        for sample, rows in enumerate(visible):
            x[sample, : len(rows)], centers[sample, : len(rows)] = grid[rows], scale.centers[rows]
            padding[sample, len(rows) :] = 1
        valid = 1 - padding
        blocked = 1 - valid @ valid.transpose(1, 2)
        if config.local_radius[i] > 0:
            if distances is None or not config.padding_attended or distances.shape[1] != longest:
                distances = torch.cdist(centers, centers)
            far = (distances >= config.local_radius[i]).float()
            blocked = far * blocked if config.padding_attended else (far + blocked).clamp(max=1)
        for block in backbone.blocks[i].blocks:
            x = x + backbone.positions[i](centers)
            q, k, v = block.attn.qkv(block.norm1(x)).view(*x.shape[:2], 3, config.heads, -1).permute(2, 0, 3, 1, 4)
            weights = (q @ k.transpose(2, 3) * q.shape[-1] ** -0.5 - 100000 * blocked[:, None]).softmax(-1)
            x = x + block.attn.proj((weights @ v).transpose(1, 2).flatten(2))
            x = x + block.mlp(block.norm2(x))
        grid = grid.clone()
        for sample, rows in enumerate(visible):
            grid[rows] = x[sample, : len(rows)]
        outputs.append(backbone.norms[i](grid[~mask]))
    return outputs


def _parts(mask: Tensor, segments: Segments) -> list[tuple[Tensor, int]]:
    return list(zip(mask.split(list(segments.lengths)), segments.offsets().tolist(), strict=False))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("options", [{}, {"local_radius": RADII}, {"local_radius": RADII, "padding_attended": True}], ids=str)
def test_packed_tokens_give_the_numbers_of_the_padded_form(options, training):
    backbone = encoder(**options).train(training)
    scales = backbone.group(clouds(50, 50, 30))
    hidden = hide(backbone, scales, 1, 4, 2)
    for ours, plain in zip(backbone.encode(scales, hidden), plain_encode(backbone, scales, hidden), strict=True):
        torch.testing.assert_close(ours.feats, plain, rtol=1e-4, atol=2e-5)


def test_padding_is_attended_with_the_published_option_alone():
    """Then the features of a cloud depend on what it shares the batch with, where the other cloud has more visible tokens."""
    points = clouds(50, 50)
    for attended in (False, True):
        backbone = encoder(local_radius=(3.0, 3.0, 3.0), padding_attended=attended)
        pair, single = backbone.group(points), backbone.group(points.coord[None, :50])
        batch, alone = backbone.encode(pair, hide(backbone, pair, 1, 5))[-1], backbone.encode(single, hide(backbone, single, 1))[-1]
        assert torch.allclose(batch.feats[:1], alone.feats, atol=1e-5) is not attended


def test_distances_of_the_scale_before_are_used_again_at_equal_padded_length():
    """Published, and part of the numbers of its checkpoints: here every scale has the same number of tokens."""
    options = {"groups": (6, 6, 6), "group_sizes": (6, 1, 1), "local_radius": (0.8, 0.8, 0.8), "padding_attended": True}
    backbone = encoder(**options)
    scales = backbone.group(clouds(50, 50))
    hidden = hide(backbone, scales, 2, 5)
    for ours, plain in zip(backbone.encode(scales, hidden), plain_encode(backbone, scales, hidden), strict=True):
        torch.testing.assert_close(ours.feats, plain, rtol=1e-4, atol=2e-5)


def test_features_leave_out_uncovered_tokens_with_the_published_option_alone():
    points = clouds(50, 50)
    sound, published = (encoder(group_sizes=(6, 2, 2), drop_uncovered=drop).forward_pyramid(points) for drop in (False, True))
    assert [tokens.lengths.tolist() for tokens in sound] == [[20, 20], [12, 12], [6, 6]]
    assert int(published[0].lengths.min()) < 20
    assert published[-1].lengths.tolist() == [6, 6]
    assert len(published[0].centers) == len(published[0].feats) == int(published[0].offsets[-1])


def test_features_of_several_scales_meet_at_the_finest_one_named():
    backbone, points = encoder(), clouds(50, 30)
    pyramid = backbone.forward_pyramid(points)
    tokens = read_tokens(backbone, points, [1, -1])
    assert tokens.feats.shape == (24, 12 + 16)
    assert torch.equal(tokens.feats[:, :12], pyramid[1].feats)
    assert torch.equal(tokens.centers, pyramid[1].centers)
    nearest = torch.cdist(pyramid[1].centers[:12], pyramid[2].centers[:6]).argmin(1)
    same = (pyramid[1].centers[:12] == pyramid[2].centers[:6][nearest]).all(1)
    torch.testing.assert_close(tokens.feats[:12][same, 12:], pyramid[2].feats[:6][nearest[same]], rtol=1e-3, atol=1e-4)
    assert pool_tokens(tokens, "mean").shape == (2, 28)
    assert torch.equal(read_tokens(backbone, points, 1).feats, pyramid[-1].feats)
    with pytest.raises(ConfigError, match=r"scale 3 does not exist; the backbone has 3 scales \(0..2"):
        read_tokens(backbone, points, [3])


@pytest.mark.parametrize(
    "points",
    [
        torch.zeros(1, 1, 3),
        torch.ones(1, 30, 3),
        torch.cat([torch.rand(1, 40, 2), torch.zeros(1, 40, 1)], 2),
        torch.full((1, 30, 3), 0.01),
    ],
    ids=["one point", "one position", "a plane", "inside the near-origin radius"],
)
@pytest.mark.parametrize("parity", [False, True])
def test_degenerate_clouds_give_finite_features(points, parity):
    options = {"min_sq_norm": 1e-3, "first_token_visible": True, "drop_uncovered": True, "padding_attended": True, "local_radius": RADII}
    for tokens in encoder(**(options if parity else {})).forward_pyramid(points):
        assert tokens.feats.isfinite().all()
        assert len(tokens.feats)


def test_empty_clouds_and_wrong_columns_are_refused():
    with pytest.raises(ValueError, match=r"every cloud needs at least one finite point; cloud\(s\) \[1\] of 2 have none"):
        encoder()(clouds(20, 0))
    with pytest.raises(ValueError, match="points have 6 columns but the backbone was made for in_channels=3"):
        encoder()(torch.randn(1, 20, 6))


def test_gradient_checkpointing_and_bfloat16_change_little():
    points, losses, gradients = clouds(50, 30), [], []
    for recompute, half in ((False, False), (True, False), (False, True)):
        backbone = encoder(local_radius=RADII).train()
        backbone.set_grad_checkpointing(recompute)
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            loss = sum(tokens.feats.square().mean() * (tokens.feats[:, 0].mean() + 1) for tokens in backbone.forward_pyramid(points))
        loss.backward()
        losses.append(float(loss.detach()))
        gradients.append(backbone.embeds[0].conv1.weight.grad)
    assert losses[1] == losses[0]
    assert torch.equal(gradients[1], gradients[0])
    assert losses[2] == pytest.approx(losses[0], rel=0.05)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depths": (1, 2)}, r"depths must be one number of at least 1 for each of the 3 scales of dims, got \(1, 2\)"),
        ({"group_sizes": (4, 0, 4)}, r"group_sizes must be one number of at least 1"),
        ({"groups": (20, 30, 6)}, r"groups must not grow from one scale to the next coarser one, got \(20, 30, 6\)"),
        ({"local_radius": (0.1, -1.0, 0.0)}, r"local_radius must be one number of at least 0 for each of the 3 scales"),
        ({"heads": 3}, r"heads must divide all dims, got dims=\(8, 12, 16\) and heads=3"),
        ({"embed_widths": (8, 8)}, r"embed_widths must be three numbers of at least 1"),
        ({"in_channels": 2}, r"in_channels must be at least 3"),
        ({"drop_path": 1.0}, r"drop_path must lie in \[0, 1\), got 1.0"),
    ],
)
def test_wrong_numbers_are_refused_by_name(options, message):
    with pytest.raises(ConfigError, match=message):
        encoder(**options)


def test_names_of_the_older_released_files_are_understood():
    new = {"h_encoder.encoder_blocks.1.blocks.2.norm1.weight": torch.ones(2)}
    old = {"MAE_encoder.blocks.1.blocks.2.norm1.weight": torch.ones(2)}
    assert list(convert_reference_encoder(old)) == list(convert_reference_encoder(new)) == ["blocks.1.blocks.2.norm1.weight"]
