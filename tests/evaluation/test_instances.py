"""Clusters of tokens against true particles."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from geossl.evaluation.instances import InstanceScore, _score_event, attention_distance, cluster, instance_table, purity, token_instances


def test_a_token_belongs_to_the_particle_of_most_of_its_points():
    instance = torch.tensor([4, 4, 0, 0, -1, -1])
    index, splits = torch.tensor([0, 1, 2, 2, 3, 4, 4, 5, 0]), torch.tensor([0, 3, 5, 8, 8, 9])
    assert token_instances(index, splits, instance).tolist() == [4, 0, -1, -1, 4]


def test_attention_within_particles_finds_them_where_position_does_not():
    truth = torch.tensor([0, 1] * 6)
    centers = torch.randn(12, 3, generator=torch.Generator().manual_seed(0))  # both particles all over the place
    same = (truth[:, None] == truth).float()
    attention = (same + 0.05 * torch.rand(3, 12, 12, generator=torch.Generator().manual_seed(1))).softmax(-1)
    scores = _score_event(truth + 5, centers, {"attention": attention})
    assert scores["attention", "average"] == (1.0, 1.0)
    assert scores["attention", "single"] == (1.0, 1.0)
    assert scores["position", "average"][0] < 0.5
    assert _score_event(torch.full((12,), 3), centers, {"attention": attention}) == {}
    assert _score_event(torch.full((12,), -1), centers, {"attention": attention}) == {}


def test_distances_are_symmetric_and_fall_with_attention():
    attention = torch.tensor([[[0.5, 0.5, 0.0], [0.25, 0.25, 0.5], [0.0, 0.5, 0.5]]])
    distance = attention_distance(attention)
    np.testing.assert_allclose(distance, distance.T)
    np.testing.assert_array_equal(np.diag(distance), 0)
    assert distance[1, 2] < distance[0, 1] < distance[0, 2]
    assert cluster(distance, 2, "single").tolist() in ([1, 0, 0], [0, 1, 1])


def test_purity_and_table():
    assert purity(np.array([0, 0, 0, 1]), np.array([1, 1, 0, 0])) == pytest.approx(0.75)
    table = instance_table([InstanceScore("position", linkage, 0.5, 0.7, 3) for linkage in ("average", "single")])
    assert table.row_count == 1
