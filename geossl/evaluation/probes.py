"""Probes of frozen features: k nearest neighbours, logistic regression and linear SVM under one fixed protocol.

The protocol (all of it in :class:`ProbeProtocol`): features are standardised with the mean and deviation of the *training part*,
a simple classifier is fitted on the training part and its accuracy taken on the test part; once on the official split and once on
each of at least five group-aware resplits (:func:`geossl.data.group_resplit`). Nothing is ever chosen by looking at a
test part: where a constant is searched (probe ``svm_cv``), it is by cross-validation inside the training part. The one exception has to be
asked for: ``svm_published`` repeats the protocol of Point-M2AE and I2P-MAE, whose C was chosen on the test part for each model.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from geossl.data import group_resplit
from geossl.errors import DataError, unknown_name

PROBES = {
    "knn": "k nearest neighbours, cosine",
    "linear": "logistic regression",
    "svm": "linear SVM, fixed C",
    "svm_cv": "linear SVM, C by cross-validation in the training part",
    "svm_published": "linear SVM as published: features as they are, C as its authors chose it by looking at the test part",
}


@dataclass(frozen=True)
class Features:
    """Feature vectors of a labelled data set, with what a fair probe of them needs.

    Args:
        values: One vector per sample, ``[n, D]`` float32.
        labels: Class of each sample, ``[n]`` int64, -1 where unlabelled.
        groups: Near-duplicate group of each sample, ``[n]`` int64, negative where a sample has no duplicate.
        test: ``[n]`` bool, True for the test part of the official split; all False where there is none.
        classes: Name of each class.
    """

    values: np.ndarray
    labels: np.ndarray
    groups: np.ndarray
    test: np.ndarray
    classes: list[str]

    def __post_init__(self) -> None:
        rows = len(self.values)
        for name in ("labels", "groups", "test"):
            if np.shape(getattr(self, name)) != (rows,):
                raise DataError(f"Features: {name} must be [{rows}] as values has {rows} rows, got {list(np.shape(getattr(self, name)))}")
        if not np.isfinite(self.values).all():
            bad = int(np.flatnonzero(~np.isfinite(self.values).all(1))[0])
            raise DataError(f"Features: row {bad} holds NaN or infinity; the encoder has diverged or was given such points")

    def labelled(self) -> Features:
        """Leave out the unlabelled samples."""
        keep = self.labels >= 0
        return replace(self, values=self.values[keep], labels=self.labels[keep], groups=self.groups[keep], test=self.test[keep])


@dataclass(frozen=True, kw_only=True)
class ProbeProtocol:
    """The constants of the probes. The defaults are what every number of this project is measured with."""

    probes: tuple[str, ...] = ("knn", "linear", "svm", "svm_cv")
    """Which probes to fit: names of ``PROBES``."""
    resplit_seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    """One group-aware resplit per seed."""
    test_fraction: float = 0.3
    """Share of each class in the test part of a resplit."""
    neighbors: int = 5
    """Neighbours of the k-NN probe, weighted by inverse cosine distance."""
    linear_c: float = 0.1
    """Inverse regularisation of the logistic regression."""
    svm_c: float = 0.003
    """Inverse regularisation of the SVM with fixed C."""
    search_c: tuple[float, ...] = (0.001, 0.006, 0.04, 0.25)
    """Values tried by ``svm_cv`` inside the training part (three group-aware parts)."""
    published_c: float = 0.01
    """Inverse regularisation of ``svm_published``. On ModelNet40 and ScanObjectNN OBJ-BG: I2P-MAE 0.0093 and 0.018, Point-M2AE 0.012 and
    0.042; 0.01 is what both take while pretraining."""

    def __post_init__(self) -> None:
        for name in self.probes:
            if name not in PROBES:
                raise unknown_name("probe", name, PROBES)
        for name in ("neighbors", "linear_c", "svm_c", "published_c"):
            if getattr(self, name) <= 0:
                raise ValueError(f"ProbeProtocol: {name} must be > 0, got {getattr(self, name)}")


@dataclass(frozen=True)
class ProbeScore:
    """Accuracies of one probe on one set of features, in [0, 1].

    Args:
        probe: Name of the probe.
        official: Accuracy on the official split, or None where the data has none.
        resplits: Accuracy on each group-aware resplit.
        confusion: ``[K, K]`` int64 counts on the official test part (on all resplits together where there is no official split);
            rows are true classes, columns predictions.
    """

    probe: str
    official: float | None
    resplits: tuple[float, ...]
    confusion: np.ndarray

    @property
    def mean(self) -> float:
        """Mean accuracy over the resplits."""
        return float(np.mean(self.resplits)) if self.resplits else float("nan")

    @property
    def std(self) -> float:
        """Sample standard deviation over the resplits (0 for fewer than two)."""
        return float(np.std(self.resplits, ddof=1)) if len(self.resplits) > 1 else 0.0

    @property
    def per_class(self) -> np.ndarray:
        """Recall of each class, ``[K]``, NaN for a class without test samples."""
        total = self.confusion.sum(1)
        return np.where(total > 0, np.diag(self.confusion) / np.maximum(total, 1), np.nan)

    def to_json(self) -> dict[str, Any]:
        """Return plain numbers and lists."""
        per_class = [None if np.isnan(value) else round(float(value), 6) for value in self.per_class]
        return {
            "probe": self.probe,
            "official": self.official,
            "mean": self.mean,
            "std": self.std,
            "resplits": list(self.resplits),
            "per_class": per_class,
            "confusion": self.confusion.tolist(),
        }


def probe(features: Features, protocol: ProbeProtocol | None = None) -> list[ProbeScore]:
    """Score frozen ``features`` with every probe of the ``protocol``.

    Args:
        features: Vectors with labels, groups and the official split; unlabelled rows are left out.
        protocol: Constants of the probes; None for the project's own.

    Returns:
        One :class:`ProbeScore` per probe, in the order of ``protocol.probes``.

    Raises:
        DataError: fewer than two classes are labelled, or the official training part holds fewer than two.
    """
    protocol = protocol or ProbeProtocol()
    features = features.labelled()
    parts, has_official = _test_parts(features, protocol)
    return [_score(name, [_confusion(name, features, test, protocol) for test in parts], has_official) for name in protocol.probes]


def majority_score(features: Features, protocol: ProbeProtocol | None = None) -> ProbeScore:
    """Score the classifier that always answers the most frequent class of the training part."""
    features = features.labelled()
    parts, has_official = _test_parts(features, protocol or ProbeProtocol())
    confusions = []
    for test in parts:
        winner = np.bincount(features.labels[~test]).argmax()
        confusions.append(_count(features.labels[test], np.full(int(test.sum()), winner), len(features.classes)))
    return _score("majority", confusions, has_official)


def _test_parts(features: Features, protocol: ProbeProtocol) -> tuple[list[np.ndarray], bool]:
    """Return the test masks, the official one first, and whether there is an official one."""
    labels, test = features.labels, features.test
    if len(np.unique(labels)) < 2:
        raise DataError(
            f"probe: needs labelled samples of at least two classes, got {len(labels)} labelled samples of {len(np.unique(labels))}; "
            "choose a data set with classes"
        )
    has_official = bool(test.any())
    if has_official and len(np.unique(labels[~test])) < 2:
        raise DataError("probe: the official training part holds fewer than two classes; give both the training and the test split")
    parts = [group_resplit(labels, features.groups, test_fraction=protocol.test_fraction, seed=seed) for seed in protocol.resplit_seeds]
    return ([test, *parts] if has_official else parts), has_official


def _score(name: str, confusions: list[np.ndarray], has_official: bool) -> ProbeScore:
    accuracy = [float(np.trace(counts) / max(counts.sum(), 1)) for counts in confusions]
    official = accuracy.pop(0) if has_official else None
    return ProbeScore(name, official, tuple(accuracy), confusions[0] if has_official else np.sum(confusions, axis=0))


def _count(true: np.ndarray, predicted: np.ndarray, classes: int) -> np.ndarray:
    counts = np.zeros((classes, classes), dtype=np.int64)
    np.add.at(counts, (true, predicted), 1)
    return counts


def _confusion(name: str, features: Features, test: np.ndarray, protocol: ProbeProtocol) -> np.ndarray:
    """Fit probe ``name`` on the rows outside ``test``; return its confusion matrix on ``test``."""
    train = ~test
    x, y = features.values, features.labels
    if name == "svm_cv":
        constant = _search_c(x[train], y[train], features.groups[train], protocol)
        model = _classifier("svm", protocol, constant)
    else:
        model = _classifier(name, protocol, protocol.svm_c, samples=int(train.sum()))
    return _count(y[test], _fit(model, x[train], y[train]).predict(x[test]), len(features.classes))


def _classifier(name: str, protocol: ProbeProtocol, svm_c: float, samples: int = 1 << 30) -> Any:
    from sklearn.linear_model import LogisticRegression  # imported here: scikit-learn takes a second that features alone need not pay
    from sklearn.neighbors import KNeighborsClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
    from sklearn.svm import SVC, LinearSVC

    if name == "svm_published":
        return SVC(C=protocol.published_c, kernel="linear")
    if name == "knn":
        model = KNeighborsClassifier(min(protocol.neighbors, samples), metric="cosine", weights="distance")
    elif name == "linear":
        model = LogisticRegression(C=protocol.linear_c, max_iter=300)
    else:
        # The primal and the dual solver reach the same optimum; on correlated features the primal one is up to ten times quicker.
        model = LinearSVC(C=svm_c, dual=False, max_iter=2000)
    return make_pipeline(StandardScaler(), model)


def _fit(model: Any, x: np.ndarray, y: np.ndarray) -> Any:
    from sklearn.exceptions import ConvergenceWarning

    with warnings.catch_warnings():
        # The iteration limits are part of the protocol: the last digits of the weights do not move the accuracy.
        warnings.simplefilter("ignore", ConvergenceWarning)
        return model.fit(x, y)


def _search_c(x: np.ndarray, y: np.ndarray, groups: np.ndarray, protocol: ProbeProtocol) -> float:
    """Return the C with the best mean accuracy on three inner group-aware resplits; the smaller one on a tie."""
    inner = [group_resplit(y, groups, test_fraction=protocol.test_fraction, seed=1000 + fold) for fold in range(3)]
    best, best_accuracy = protocol.svm_c, -1.0
    for constant in sorted(protocol.search_c):
        accuracy = []
        for test in inner:
            model = _fit(_classifier("svm", protocol, constant), x[~test], y[~test])
            accuracy.append(float((model.predict(x[test]) == y[test]).mean()))
        if np.mean(accuracy) > best_accuracy + 1e-9:
            best, best_accuracy = constant, float(np.mean(accuracy))
    return best
