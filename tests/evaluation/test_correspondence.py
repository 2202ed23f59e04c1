"""Matches from attention, and their scores."""

from __future__ import annotations

import math

import pytest
import torch

from geossl.evaluation.correspondence import match_patches, score_matches, stay_put

GRID, PATCH = (3, 4), 16


def shifted_attention(dx: int, dy: int) -> torch.Tensor:
    """Every patch looks at the one ``dx`` columns and ``dy`` rows on, clamped to the picture."""
    attention = torch.zeros(12, 12)
    for row in range(3):
        for column in range(4):
            attention[row * 4 + column, min(row + dy, 2) * 4 + min(column + dx, 3)] = 1.0
    return attention


def test_the_patch_looked_at_most_is_the_match():
    matches = match_patches(shifted_attention(1, 0), GRID, PATCH)
    assert matches.source[0].tolist() == [8.0, 8.0]
    assert matches.source[5].tolist() == [24.0, 24.0]
    assert matches.target[5].tolist() == [40.0, 24.0]
    assert matches.weight.eq(1).all()


def test_attention_beside_it_moves_the_match_and_far_attention_does_not():
    attention = torch.zeros(12, 12)
    attention[:, 5], attention[:, 6], attention[:, 11] = 0.4, 0.2, 0.3  # column 1, column 2 beside it, and two columns away
    matches = match_patches(attention, GRID, PATCH)
    torch.testing.assert_close(matches.target[0], torch.tensor([(0.4 * 24 + 0.2 * 40) / 0.6, 24.0]))
    torch.testing.assert_close(matches.weight[0], torch.tensor(0.6))


def test_no_attention_at_all_is_no_nan():
    assert match_patches(torch.zeros(12, 12), GRID, PATCH).target.isfinite().all()


def test_scores_against_flow():
    flow = torch.zeros(2, 48, 64)
    flow[0] = 16.0
    flow[:, :16, :16] = torch.inf  # unknown: the first patch is not scored
    flow[:, 16:32, 16:24] = torch.nan  # half known: scored
    scores = score_matches(match_patches(shifted_attention(1, 0), GRID, PATCH), flow, PATCH)
    assert scores.patches == 12 - 1 - 3  # the last column leaves the picture
    assert scores.median_error == 0
    assert scores.within == {0.5: 1.0, 1.0: 1.0, 2.0: 1.0}
    wrong = score_matches([stay_put(GRID, PATCH)] * 2, [flow, flow], PATCH)
    assert wrong.patches == 16
    assert wrong.median_error == 16
    assert wrong.within == {0.5: 0.0, 1.0: 1.0, 2.0: 1.0}  # an error equal to the limit counts as right


def test_nothing_known():
    scores = score_matches(stay_put(GRID, PATCH), torch.full((2, 48, 64), torch.inf), PATCH)
    assert scores.patches == 0
    assert math.isnan(scores.median_error)
    assert score_matches([], [], PATCH).patches == 0


def test_attention_of_another_grid():
    with pytest.raises(ValueError, match=r"attention must be \[12, 12\] for a grid of 3 x 4, got \[9, 9\]"):
        match_patches(torch.zeros(9, 9), GRID, PATCH)
