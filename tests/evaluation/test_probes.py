from __future__ import annotations

import numpy as np
import pytest

from geossl.errors import DataError, UnknownNameError
from geossl.evaluation import Features, ProbeProtocol, probe
from geossl.evaluation.probes import majority_score


def blobs(separation: float, *, seed: int = 0, official: bool = True) -> Features:
    """Three classes of 40 samples around centres ``separation`` apart in ten dimensions, of very different scales."""
    rng = np.random.default_rng(seed)
    labels = np.arange(120) % 3
    values = rng.normal(size=(120, 10)) + separation * np.eye(10)[labels]
    test = (np.arange(120) >= 84) & official
    return Features((values * np.logspace(-3, 3, 10)).astype(np.float32), labels, np.arange(120), test, ["a", "b", "c"])


def test_easy_and_hopeless_features():
    for score in probe(blobs(8.0)):
        assert score.official == 1.0
        assert score.mean > 0.97
        assert score.std < 0.03
    for score in probe(blobs(0.0)):
        assert 0.1 < score.mean < 0.6
        assert len(score.resplits) == 5


def test_score_reads_its_own_confusion():
    (score,) = probe(blobs(1.5), ProbeProtocol(probes=("svm",)))
    assert score.confusion.sum() == 36
    assert score.official == pytest.approx(np.trace(score.confusion) / 36)
    np.testing.assert_allclose(score.per_class, np.diag(score.confusion) / score.confusion.sum(1))
    assert score.mean == pytest.approx(np.mean(score.resplits))
    assert score.std == pytest.approx(np.std(score.resplits, ddof=1))
    assert score.to_json()["confusion"] == score.confusion.tolist()


def test_without_an_official_split_all_resplits_are_counted():
    (score,) = probe(blobs(1.5, official=False), ProbeProtocol(probes=("knn",)))
    assert score.official is None
    assert score.confusion.sum() == 5 * 36


def test_probe_is_deterministic_and_ignores_unlabelled_rows():
    features = blobs(1.0)
    extra = Features(
        np.concatenate([features.values, np.full((7, 10), 1e4, np.float32)]),
        np.concatenate([features.labels, np.full(7, -1)]),
        np.concatenate([features.groups, np.full(7, -1)]),
        np.concatenate([features.test, np.zeros(7, bool)]),
        features.classes,
    )
    for one, two in zip(probe(features), probe(extra), strict=True):
        assert one.official == two.official
        assert one.resplits == two.resplits


def test_test_rows_do_not_reach_the_scaler_or_each_other():
    """Twenty absurd further test rows of class 2 add a row of counts and change nothing else."""
    features = blobs(1.5)
    protocol = ProbeProtocol(probes=("knn", "linear", "svm", "svm_cv"), resplit_seeds=())
    absurd = np.random.default_rng(1).normal(size=(20, 10)).astype(np.float32) * 1e6
    more = Features(
        np.concatenate([features.values, absurd]),
        np.concatenate([features.labels, np.full(20, 2)]),
        np.concatenate([features.groups, np.arange(1000, 1020)]),
        np.concatenate([features.test, np.ones(20, bool)]),
        features.classes,
    )
    for own, both in zip(probe(features, protocol), probe(more, protocol), strict=True):
        added = both.confusion - own.confusion
        assert (added[:2] == 0).all()
        assert added[2].sum() == 20
        assert (added >= 0).all()


def test_near_duplicates_inflate_a_split_that_ignores_groups():
    """Noise features, each sample present twice: only a group-blind split can 'recognise' the test samples."""
    rng = np.random.default_rng(0)
    values = np.repeat(rng.normal(size=(100, 20)), 2, axis=0).astype(np.float32)
    labels = np.repeat(np.arange(100) % 4, 2)
    none = np.zeros(200, bool)
    protocol = ProbeProtocol(probes=("knn",), neighbors=1)
    (blind,) = probe(Features(values, labels, np.full(200, -1), none, list("abcd")), protocol)
    (aware,) = probe(Features(values, labels, np.repeat(np.arange(100), 2), none, list("abcd")), protocol)
    assert blind.mean > 0.6
    assert aware.mean < 0.4


def test_majority():
    labels = np.array([0] * 30 + [1] * 20)
    score = majority_score(Features(np.zeros((50, 1), np.float32), labels, np.arange(50), np.zeros(50, bool), ["a", "b"]))
    assert score.mean == pytest.approx(9 / 15)


def test_bad_features_teach():
    features = blobs(1.0)
    with pytest.raises(DataError, match=r"labels must be \[120\]"):
        Features(features.values, features.labels[:-1], features.groups, features.test, features.classes)
    broken = features.values.copy()
    broken[3, 0] = np.nan
    with pytest.raises(DataError, match="row 3 holds NaN"):
        Features(broken, features.labels, features.groups, features.test, features.classes)
    with pytest.raises(DataError, match="at least two classes"):
        probe(Features(features.values, features.labels * 0, features.groups, features.test, ["a"]))
    with pytest.raises(UnknownNameError, match="did you mean 'svm'"):
        ProbeProtocol(probes=("svn",))
    with pytest.raises(ValueError, match="svm_c must be > 0, got 0"):
        ProbeProtocol(svm_c=0.0)


def test_the_published_svm_is_neither_scaled_nor_searched():
    from sklearn.svm import SVC

    features = blobs(1.5)
    (score,) = probe(features, ProbeProtocol(probes=("svm_published",), resplit_seeds=(), published_c=0.0093))
    train = ~features.test
    expected = SVC(C=0.0093, kernel="linear").fit(features.values[train], features.labels[train])
    assert score.official == pytest.approx(expected.score(features.values[features.test], features.labels[features.test]))
    assert "svm_published" not in ProbeProtocol().probes  # its C was chosen on the test part: only where it is asked for
    with pytest.raises(ValueError, match="published_c must be > 0, got 0"):
        ProbeProtocol(published_c=0)
