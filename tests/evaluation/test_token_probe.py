"""The token probe: its labels, its classifier against scikit-learn's one-vs-rest, its scores."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn import metrics
from sklearn.decomposition import PCA
from sklearn.multiclass import OneVsRestClassifier
from sklearn.pipeline import make_pipeline
from sklearn.svm import LinearSVC

from geossl.errors import DataError
from geossl.evaluation.token_probe import TokenProbeProtocol, classes_present, describe_groups, presence_score, probe_tokens


def test_a_class_is_present_where_a_point_of_it_is():
    label = torch.tensor([0, 2, 2, -1, 1])
    index, splits = torch.tensor([0, 1, 1, 2, 3, 4, 0]), torch.tensor([0, 2, 4, 5, 5, 7])
    present = classes_present(index, splits, label, 4)
    assert present.int().tolist() == [[1, 0, 1, 0], [0, 0, 1, 0], [0, 0, 0, 0], [0, 0, 0, 0], [1, 1, 0, 0]]


def test_descriptions_are_those_of_each_group_alone():
    points = torch.randn(9, 4, generator=torch.Generator().manual_seed(0))
    together = describe_groups(points, torch.tensor([0, 4, 4, 9]))
    assert together.shape == (3, 16)
    assert together.isfinite().all()
    torch.testing.assert_close(together[:1], describe_groups(points[:4], torch.tensor([0, 4])))
    torch.testing.assert_close(together[2:], describe_groups(points[4:], torch.tensor([0, 5])))
    torch.testing.assert_close(together[0, 1], points[:4, 3].mean())
    torch.testing.assert_close(together[0, 8:11].square().sum(), points[:4, :3].var(0, correction=0).sum())


def tokens(count: int, seed: int):
    rng = np.random.default_rng(seed)
    present = rng.random((count, 4)) < [0.7, 0.4, 0.05, 0.0]
    mixing = np.random.default_rng(9).normal(size=(4, 20))
    return (present @ mixing + 0.7 * rng.normal(size=(count, 20))).astype(np.float32), present


def test_the_probe_is_one_vs_rest_behind_principal_components():
    (train, present), (test, truth) = tokens(600, 0), tokens(300, 1)
    score = probe_tokens(train, present, test, truth, TokenProbeProtocol(components=10))
    model = make_pipeline(
        PCA(10, svd_solver="full"), OneVsRestClassifier(LinearSVC(C=0.005, class_weight="balanced", dual=False, random_state=0))
    )
    predicted = model.fit(train, present[:, :3]).predict(test)
    np.testing.assert_allclose(score.f1[:3], metrics.f1_score(truth[:, :3], predicted, average=None, zero_division=0), atol=1e-12)
    assert np.isnan(score.f1[3])
    assert score.macro_f1 == pytest.approx(metrics.f1_score(truth[:, :3], predicted, average="macro", zero_division=0))
    assert score.to_json()["f1"][3] is None


def test_a_class_the_training_never_shows_is_never_found():
    (train, present), (test, truth) = tokens(200, 0), tokens(100, 1)
    present = present.copy()
    present[:, 2], present[:, 0] = False, True
    score = probe_tokens(train, present, test, truth, TokenProbeProtocol())
    assert score.recall[2] == 0
    assert score.recall[0] == 1


def test_scores_against_scikit_learn():
    rng = np.random.default_rng(0)
    predicted, truth = rng.random((50, 3)) < 0.4, rng.random((50, 3)) < 0.3
    score = presence_score(predicted, truth)
    precision, recall, f1, _ = metrics.precision_recall_fscore_support(truth, predicted, average=None)
    for ours, theirs in ((score.precision, precision), (score.recall, recall), (score.f1, f1), (score.share, truth.mean(0))):
        np.testing.assert_allclose(ours, theirs)


def test_what_cannot_be_probed_is_refused():
    values, present = tokens(20, 0)
    broken = values.copy()
    broken[3, 1] = np.nan
    with pytest.raises(DataError, match="a feature is NaN or infinite"):
        probe_tokens(values, present, broken, present, TokenProbeProtocol())
    with pytest.raises(ValueError, match="svm_c must be > 0, got 0"):
        TokenProbeProtocol(svm_c=0)
