"""Accuracy by voting: views are random, reproducible and each cloud's own; the mean of scores decides."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from geossl.data import AugmentConfig, ObjectsConfig
from geossl.errors import DataError
from geossl.evaluation import evaluate_by_voting, evaluate_classification

TEST = ObjectsConfig(points=64, subset="labelled", evaluation_points="farthest").build("test")


class Height(torch.nn.Module):
    """Scores class 3 by the mean height of what it sees, class 0 by a threshold; keeps the clouds it saw."""

    def __init__(self):
        super().__init__()
        self.seen = []
        self.dropout = torch.nn.Dropout()

    def logits(self, points):
        self.seen.append(points)
        assert not self.dropout.training
        heights = torch.stack([cloud[:, 2].mean() for cloud in points.coord.split(points.lengths.tolist())])
        scores = torch.zeros(len(points), len(TEST.classes))
        scores[:, 3], scores[:, 0] = heights, 0.01
        return scores


def test_views_are_random_subsets_of_the_pool():
    model = Height()
    evaluate_by_voting(model, TEST, points=40, votes=2, repetitions=1, views=AugmentConfig(scale=(1, 1), shift=0.0), batch_size=5)
    first, second = model.seen[:2]
    assert first.lengths.tolist() == [40] * 5
    pool = {tuple(point) for point in TEST.get(0).points.tolist()}
    views = [{tuple(point) for point in view.coord[:40].tolist()} for view in (first, second)]
    assert views[0] < pool
    assert views[1] < pool
    assert views[0] != views[1]


def test_votes_do_not_depend_on_the_batch_and_repeat():
    scores = [evaluate_by_voting(Height(), TEST, points=40, votes=3, repetitions=4, batch_size=size) for size in (7, 64)]
    assert scores[0].accuracies == scores[1].accuracies
    assert len(set(scores[0].accuracies)) > 1
    assert evaluate_by_voting(Height(), TEST, points=40, votes=3, repetitions=4, seed=1).accuracies != scores[0].accuracies
    assert scores[0].mean == pytest.approx(np.mean(scores[0].accuracies))
    assert scores[0].std == pytest.approx(np.std(scores[0].accuracies, ddof=1))
    assert scores[0].best_on_test == max(scores[0].accuracies)
    assert "selected on the test part" in scores[0].to_json()["best_on_test_about"]


def test_one_whole_view_is_the_plain_accuracy():
    whole = evaluate_by_voting(Height(), TEST, points=64, votes=1, repetitions=1, views=AugmentConfig(scale=(1, 1), shift=0.0))
    assert whole.accuracies == pytest.approx((evaluate_classification(Height(), TEST)["accuracy"],))
    assert whole.std == 0


def test_scores_are_averaged_not_counted():
    """One view that is sure outvotes two that are not: the sum of scores decides."""

    class Scripted(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.calls = 0

        def logits(self, points):
            self.calls += 1
            scores = torch.zeros(len(points), len(TEST.classes))
            scores[:, 3 if self.calls == 1 else 0] = 5.0 if self.calls == 1 else 1.0
            return scores

    found = evaluate_by_voting(Scripted(), TEST, points=8, votes=3, repetitions=1, batch_size=1000)
    assert found.accuracies == pytest.approx((float((TEST.labels == 3).mean()),))


def test_normals_follow_and_bad_numbers_are_told():
    normals = ObjectsConfig(points=16, subset="labelled", columns="xyz+normal").build("test")
    model = Height()
    evaluate_by_voting(model, normals, points=8, votes=1, repetitions=1)
    assert model.seen[0].feats.shape[1] == 3
    assert torch.allclose(model.seen[0].feats.norm(dim=1), torch.ones(len(model.seen[0].feats)), atol=1e-4)
    with pytest.raises(ValueError, match="votes must be at least 1, got 0"):
        evaluate_by_voting(model, normals, votes=0)
    for call in (evaluate_by_voting, evaluate_classification):
        with pytest.raises(DataError, match="the data set is empty"):
            call(model, [])
