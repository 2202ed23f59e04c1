"""Scores of segmentations against scikit-learn, and how they are counted."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics

from geossl.evaluation import SegmentationMeter

NAMES = ["shower", "track", "michel", "delta"]


def counted(predicted, label, chunk: int | None = None):
    meter = SegmentationMeter(NAMES)
    for start in range(0, len(label), chunk or max(len(label), 1)):
        stop = start + (chunk or len(label))
        meter.update(torch.as_tensor(predicted[start:stop]), torch.as_tensor(label[start:stop]))
    return meter.scores()


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=40))
def test_scores_are_those_of_scikit_learn(pairs):
    label, predicted = np.array(pairs).T
    scores = counted(predicted, label)
    precision, recall, f1, support = metrics.precision_recall_fscore_support(label, predicted, labels=range(4), zero_division=0)
    iou = metrics.jaccard_score(label, predicted, labels=range(4), average=None, zero_division=0)
    present = np.isin(range(4), np.concatenate([label, predicted]))
    for ours, theirs in ((scores.precision, precision), (scores.recall, recall), (scores.f1, f1), (scores.iou, iou)):
        np.testing.assert_allclose(ours[present], theirs[present], rtol=1e-12)
        assert np.isnan(ours[~present]).all()
    macro = scores.macro()
    kwargs = {"average": "macro", "zero_division": 0}
    assert macro["f1"] == pytest.approx(metrics.f1_score(label, predicted, **kwargs))
    assert macro["precision"] == pytest.approx(metrics.precision_score(label, predicted, **kwargs))
    assert macro["accuracy"] == macro["recall"] == pytest.approx(metrics.recall_score(label, predicted, **kwargs))
    assert macro["iou"] == pytest.approx(metrics.jaccard_score(label, predicted, **kwargs))
    assert scores.accuracy == pytest.approx(metrics.accuracy_score(label, predicted))
    assert scores.accuracy == pytest.approx(metrics.f1_score(label, predicted, average="micro"))
    assert scores.micro_iou == pytest.approx(metrics.jaccard_score(label, predicted, average="micro"))
    np.testing.assert_array_equal(scores.confusion, metrics.confusion_matrix(label, predicted, labels=range(4)))
    np.testing.assert_array_equal(scores.confusion.sum(1), support)


def test_batches_add_up_and_unlabelled_points_do_not_count():
    rng = np.random.default_rng(0)
    label, predicted = rng.integers(-1, 4, 1000), rng.integers(0, 4, 1000)
    whole, parts = counted(predicted, label), counted(predicted, label, chunk=37)
    np.testing.assert_array_equal(whole.confusion, parts.confusion)
    np.testing.assert_array_equal(whole.confusion, counted(predicted[label >= 0], label[label >= 0]).confusion)


def test_names_for_a_log_and_plain_numbers():
    scores = counted([0, 0, 1], [0, 1, 1])
    scalars = scores.scalars()
    assert scalars["accuracy"] == pytest.approx(2 / 3)
    assert scalars["f1_shower"] == pytest.approx(2 / 3)
    assert "f1_delta" not in scalars
    assert {"macro_f1", "macro_precision", "macro_recall", "macro_accuracy", "mean_iou"} <= set(scalars)
    plain = scores.to_json()
    assert plain["per_class"]["iou"] == [0.5, 0.5, None, None]
    assert plain["points"] == 3


def test_nothing_counted_is_no_score():
    scores = SegmentationMeter(NAMES).scores()
    assert np.isnan(scores.accuracy)
    assert scores.scalars() == {}
    assert scores.to_json()["micro"] == {"accuracy": None, "iou": None}


@pytest.mark.parametrize(
    ("predicted", "label", "message"),
    [
        ([0, 4], [0, 1], r"predictions must lie in 0..3, got 0..4"),
        ([0, 1], [0, -2], r"labels must lie in 0..3 \(or -1: not counted\), got -2..0"),
        ([0], [0, 1], "one prediction for each label is needed, got 1 and 2"),
    ],
)
def test_wrong_classes_are_refused(predicted, label, message):
    with pytest.raises(ValueError, match=message):
        SegmentationMeter(NAMES).update(torch.tensor(predicted), torch.tensor(label))
