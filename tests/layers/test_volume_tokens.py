"""Volumetric tokens: what is promised of their members, whatever the batch, and every option."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from geossl.errors import ConfigError, UnknownNameError
from geossl.layers import TOKENIZERS, VolumeTokenizer, VolumeTokens
from geossl.ops import offsets_from_lengths


def voxels(*lengths: int, seed: int = 0, box: int = 24) -> tuple[Tensor, Tensor, Tensor]:
    """Distinct voxels of several events along crooked lines, their offsets and energies."""
    generator = torch.Generator().manual_seed(seed)
    events = []
    for n in lengths:
        cells = torch.randperm(box**3, generator=generator)[:n]
        events.append(torch.stack([cells // box**2, cells // box % box, cells % box], 1).float())
    return torch.cat(events), offsets_from_lengths(torch.tensor(lengths)), torch.rand(sum(lengths), generator=generator)


def members(tokens: VolumeTokens) -> list[Tensor]:
    return list(tokens.index.split(tokens.row_splits.diff().tolist()))


def plain(tokenizer: VolumeTokenizer, coord: Tensor, energy: Tensor) -> tuple[list[int], list[list[int]]]:
    """One event by loops: centres and members."""
    distance = (coord[:, None] - coord).square().sum(2)
    near = [row.nonzero()[: tokenizer.max_neighbors, 0].tolist() for row in distance < (2 * tokenizer.radius * tokenizer.overlap) ** 2]
    kept = set(range(len(coord)))
    for i in sorted(range(len(coord)), key=lambda i: -len(near[i])):
        if i in kept:
            kept -= set(near[i]) - {i}
    tokens = []
    for center in sorted(kept):
        ball = (distance[center] < tokenizer.radius**2).nonzero()[: tokenizer.ball_points, 0].tolist()
        if tokenizer.reduction == "energy":
            chosen = sorted(ball, key=lambda i: -float(energy[i]))
        else:
            chosen, gap = [ball[0]], distance[ball[0]][ball]
            while len(chosen) < len(ball):
                chosen.append(ball[int(gap.argmax())])
                gap = torch.minimum(gap, distance[chosen[-1]][ball])
        tokens.append(chosen[: tokenizer.slots])
    return sorted(kept), tokens


@settings(max_examples=25, deadline=None)
@given(
    length=st.integers(1, 120),
    radius=st.sampled_from([1.5, 2.5, 5.0]),
    reduction=st.sampled_from(["fps", "energy"]),
    limits=st.sampled_from([(256, 256, 32), (4, 6, 5), (8, 3, 9)]),
    seed=st.integers(0, 50),
)
def test_tokens_equal_the_plain_form(length, radius, reduction, limits, seed):
    coord, offsets, energy = voxels(length, seed=seed, box=10)
    max_neighbors, ball_points, slots = limits
    tokenizer = VolumeTokenizer(radius=radius, reduction=reduction, max_neighbors=max_neighbors, ball_points=ball_points, slots=slots)
    tokens = tokenizer(coord, offsets, energy)
    centers, expected = plain(tokenizer, coord, energy)
    assert tokens.centers.tolist() == centers
    assert [part.tolist() for part in members(tokens)] == expected


@pytest.mark.parametrize("options", [{}, {"reduction": "energy"}, {"seeds": 20, "max_neighbors": None}, {"full_coverage": True}])
def test_tokens_do_not_depend_on_the_batch(options):
    coord, offsets, energy = voxels(150, 1, 400, 77)
    tokenizer = VolumeTokenizer(radius=3.0, **options)
    together = tokenizer(coord, offsets, energy)
    centers, index, count = [], [], []
    for begin, end in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True):
        alone = tokenizer(coord[begin:end], torch.tensor([0, end - begin]), energy[begin:end])
        centers.append(alone.centers + begin)
        index.append(alone.index + begin)
        count.append(alone.row_splits.diff())
    assert torch.equal(together.centers, torch.cat(centers))
    assert torch.equal(together.index, torch.cat(index))
    assert torch.equal(together.row_splits.diff(), torch.cat(count))


def test_whole_voxels_are_compared_exactly_wherever_the_event_lies():
    """A voxel at exactly the radius is outside; shifting all voxels changes nothing, which rounded coordinates cannot promise."""
    coord, offsets, _ = voxels(500, box=16)
    tokens = VolumeTokenizer(radius=5.0)(coord, offsets)
    moved = VolumeTokenizer(radius=5.0)(coord + torch.tensor([700.0, 333, 128]), offsets)
    assert torch.equal(tokens.index, moved.index)
    line = torch.tensor([[0.0, 0, 0], [3, 4, 0], [3, 3, 0]])
    alone = VolumeTokenizer(radius=5.0, overlap=1.0)(line, torch.tensor([0, 3]))
    assert [part.tolist() for part in members(alone)] == [[0, 2]]
    assert VolumeTokenizer(radius=5.0).scaled(0.1).radius == 0.5


def test_full_coverage_gives_every_point_to_a_token_and_the_nearest_one():
    coord, offsets, _ = voxels(300, 500)
    partial = VolumeTokenizer(radius=3.0, slots=8)(coord, offsets)
    whole = VolumeTokenizer(radius=3.0, slots=8, full_coverage=True)(coord, offsets)
    assert len(partial.index.unique()) < len(coord)
    assert torch.equal(whole.index.unique(), torch.arange(len(coord)))
    assert torch.equal(whole.centers, partial.centers)
    for token, (some, more) in enumerate(zip(members(partial), members(whole), strict=True)):
        assert torch.equal(more[: len(some)], some)
        event = int(token >= partial.offsets[1])
        rivals = coord[partial.centers[partial.offsets[event] : partial.offsets[event + 1]]]
        for row in more[len(some) :]:
            assert (coord[row] - coord[partial.centers[token]]).norm() == (coord[row] - rivals).norm(dim=1).min()


def test_seeds_choose_among_spread_out_candidates_only():
    coord, offsets, _ = voxels(600, 10)
    tokens = VolumeTokenizer(radius=4.0, seeds=30, max_neighbors=None)(coord, offsets)
    assert 0 < int(tokens.offsets[1]) <= 30
    assert set(TOKENIZERS) == {"2.5", "5", "25"}
    assert TOKENIZERS["25"].slots == 128


def test_points_that_are_not_finite_and_empty_events_have_no_token():
    coord, offsets, _ = voxels(40, 30)
    coord[45] = torch.nan
    for options in ({}, {"full_coverage": True}, {"seeds": 50}):
        tokens = VolumeTokenizer(radius=3.0, **options)(coord, offsets)
        assert 45 not in tokens.index.tolist() + tokens.centers.tolist()
    coord[:40] = torch.inf
    tokens = VolumeTokenizer(radius=3.0)(coord, torch.tensor([0, 40, 40, 70]))
    assert tokens.offsets.diff().tolist()[:2] == [0, 0]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"radius": 0.0}, ConfigError, "radius must be positive, got 0.0"),
        ({"slots": 0}, ConfigError, "slots must be positive, got 0"),
        ({"overlap": -1.0}, ConfigError, "overlap must be positive"),
        ({"reduction": "fsp"}, UnknownNameError, "did you mean 'fps'"),
    ],
)
def test_wrong_options_are_refused(options, error, message):
    with pytest.raises(error, match=message):
        VolumeTokenizer(**{"radius": 5.0} | options)


def test_energy_is_asked_for():
    coord, offsets, _ = voxels(10)
    with pytest.raises(ValueError, match="needs the energy of every point, got None"):
        VolumeTokenizer(radius=5.0, reduction="energy")(coord, offsets)
