"""Masks hide the published number of tokens, reproducibly, and blocks are contiguous."""

from __future__ import annotations

import pytest
import torch

from geossl.layers import Segments, block_mask, random_mask, weighted_mask
from geossl.layers.sampling import BatchRandom


def draws(size: int, seed: int = 0) -> BatchRandom:
    return BatchRandom(size, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("lengths", [(64, 64), (10, 1, 0, 3)])
def test_counts_follow_the_published_rounding_and_leave_one_visible(lengths):
    centers = torch.rand(sum(lengths), 3)
    for mask in (
        random_mask(Segments(lengths), 0.6, draws(len(lengths))),
        block_mask(centers, Segments(lengths), 0.6, draws(len(lengths))),
        weighted_mask(torch.randn(sum(lengths)), Segments(lengths), 0.6, draws(len(lengths))),
    ):
        hidden = [int(part.sum()) for part in mask.split(list(lengths))]
        assert hidden == [min(int(0.6 * n), max(n - 1, 0)) for n in lengths]


def test_random_masks_are_reproducible_uniform_and_differ_between_samples():
    segments = Segments((8,) * 2000)
    first, again = (random_mask(segments, 0.5, draws(2000)) for _ in range(2))
    assert torch.equal(first, again)
    rows = first.view(2000, 8).float()
    assert len(rows.unique(dim=0)) == 70  # all 8-choose-4 subsets
    assert (rows.mean(0) - 0.5).abs().max() < 0.05


def test_a_block_is_the_nearest_centres_of_one_of_them():
    centers = torch.rand(40, 3)
    for seed in range(5):
        hidden = block_mask(centers, Segments((40,)), 0.4, draws(1, seed)).nonzero()[:, 0].tolist()
        nearest = torch.cdist(centers, centers).argsort(1)[:, : int(0.4 * 40)]
        assert any(set(hidden) == set(row.tolist()) for row in nearest)


def test_a_ragged_mask_does_not_depend_on_the_other_samples():
    whole = random_mask(Segments((5, 40, 1, 12)), 0.6, BatchRandom(4, torch.Generator().manual_seed(1)), ragged=True)
    random = BatchRandom(2, torch.Generator().manual_seed(1), slot=torch.tensor([0, 3]), global_size=4)
    half = random_mask(Segments((5, 12)), 0.6, random, ragged=True)
    assert [int(part.sum()) for part in whole.split([5, 40, 1, 12])] == [3, 24, 0, 7]
    assert torch.equal(half, torch.cat([whole[:5], whole[46:]]))


def test_a_weighted_mask_keeps_what_multinomial_draws():
    """Chances of every visible pair, drawn one after the other without putting back."""
    weight = torch.tensor([0.5, 0.2, 0.2, 0.1])
    mask = weighted_mask(weight.log().repeat(20_000) + 3.0, Segments((4,) * 20_000), 0.5, draws(20_000)).view(-1, 4)
    seen = (~mask).float()
    for i, j in ((0, 1), (1, 2), (2, 3), (0, 3)):
        pair = weight[i] * weight[j] * (1 / (1 - weight[i]) + 1 / (1 - weight[j]))
        assert abs(float((seen[:, i] * seen[:, j]).mean() - pair)) < 0.012


def test_a_weighted_mask_does_not_depend_on_the_other_samples():
    weights = torch.randn(58)
    whole = weighted_mask(weights, Segments((5, 40, 1, 12)), 0.6, BatchRandom(4, torch.Generator().manual_seed(1)))
    random = BatchRandom(2, torch.Generator().manual_seed(1), slot=torch.tensor([0, 3]), global_size=4)
    half = weighted_mask(torch.cat([weights[:5], weights[46:]]), Segments((5, 12)), 0.6, random)
    assert torch.equal(half, torch.cat([whole[:5], whole[46:]]))
