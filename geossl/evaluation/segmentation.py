"""Scores of a segmentation: what share of the points, and of each class, is right."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from geossl.data import build_loader
from geossl.errors import DataError
from geossl.evaluation.features import device_of, frozen


@dataclass(frozen=True)
class SegmentationScores:
    """Scores of all points together and of each class, in [0, 1]; float64.

    A class that occurs neither among the labels nor among the predictions has the score NaN and no part in the means over classes; one
    that occurs in only one of them scores 0. This is how scikit-learn averages the classes it finds.

    Args:
        classes: Class names.
        confusion: Points of class ``row`` predicted as class ``column``, ``[K, K]`` int64.
        precision: Right among the points predicted as the class, ``[K]``.
        recall: Right among the points of the class, ``[K]``: the accuracy of the class.
        f1: Harmonic mean of both, ``[K]``.
        iou: Right among the points that are of the class or predicted as it, ``[K]`` (intersection over union).
    """

    classes: tuple[str, ...]
    confusion: np.ndarray
    precision: np.ndarray
    recall: np.ndarray
    f1: np.ndarray
    iou: np.ndarray

    @property
    def accuracy(self) -> float:
        """Share of points that are right: what precision, recall and F1 of all points pooled ("micro") come to. NaN without points."""
        total = int(self.confusion.sum())
        return float(np.trace(self.confusion) / total) if total else float("nan")

    @property
    def micro_iou(self) -> float:
        """Intersection over union with the points of all classes pooled; NaN without points."""
        total, right = int(self.confusion.sum()), int(np.trace(self.confusion))
        return right / (2 * total - right) if total else float("nan")

    def macro(self) -> dict[str, float]:
        """Means over the classes: ``accuracy`` (that of each class is its recall), ``precision``, ``recall``, ``f1`` and ``iou`` (mIoU)."""
        means = {name: _mean(getattr(self, name)) for name in ("precision", "recall", "f1", "iou")}
        return {"accuracy": means["recall"], **means}

    def scalars(self) -> dict[str, float]:
        """Flat names for a log: ``accuracy``, ``macro_f1``, ``mean_iou`` ..., then ``f1_<class>`` and ``iou_<class>`` of each class.

        Classes that did not occur are left out.
        """
        macro = self.macro()
        named = {"accuracy": self.accuracy, "mean_iou": macro.pop("iou"), **{f"macro_{name}": value for name, value in macro.items()}}
        for kind in ("f1", "iou"):
            named.update({f"{kind}_{name}": float(value) for name, value in zip(self.classes, getattr(self, kind), strict=True)})
        return {name: value for name, value in named.items() if np.isfinite(value)}

    def to_json(self) -> dict[str, Any]:
        """Plain numbers and lists, None for NaN."""
        per_class = {
            name: [None if np.isnan(value) else round(float(value), 6) for value in getattr(self, name)]
            for name in ("precision", "recall", "f1", "iou")
        }
        pooled = {"accuracy": self.accuracy, "iou": self.micro_iou}
        return {
            "classes": list(self.classes),
            "points": int(self.confusion.sum()),
            "micro": {name: _plain(value) for name, value in pooled.items()},
            "macro": {name: _plain(value) for name, value in self.macro().items()},
            "per_class": per_class,
            "confusion": self.confusion.tolist(),
        }


class SegmentationMeter:
    """Counts predictions batch by batch; memory does not grow with the number of points.

    Args:
        classes: Class names; labels and predictions are their numbers.

    Example:
        >>> meter = SegmentationMeter(["track", "shower"])
        >>> meter.update(torch.tensor([0, 1, 1]), torch.tensor([0, 1, -1]))
        >>> meter.scores().accuracy
        1.0
    """

    def __init__(self, classes: Sequence[str]) -> None:
        self.classes = tuple(classes)
        self.confusion = np.zeros((len(self.classes), len(self.classes)), dtype=np.int64)

    def update(self, predicted: Tensor | np.ndarray, label: Tensor | np.ndarray) -> None:
        """Count points.

        Args:
            predicted: Predicted classes, ``[M]`` integers in ``0..K-1``.
            label: True classes, ``[M]``; points with label -1 are left out.

        Raises:
            ValueError: the shapes differ, or a class is out of range.
        """
        guess, truth = (np.asarray(torch.as_tensor(values).cpu()).reshape(-1).astype(np.int64) for values in (predicted, label))
        if guess.shape != truth.shape:
            raise ValueError(f"SegmentationMeter: one prediction for each label is needed, got {len(guess)} and {len(truth)}")
        known = truth != -1
        guess, truth = guess[known], truth[known]
        count = len(self.classes)
        for name, values, allowed in (("predictions", guess, ""), ("labels", truth, " (or -1: not counted)")):
            if len(values) and not 0 <= values.min() <= values.max() < count:
                raise ValueError(f"SegmentationMeter: {name} must lie in 0..{count - 1}{allowed}, got {values.min()}..{values.max()}")
        self.confusion += np.bincount(truth * count + guess, minlength=count * count).reshape(count, count)

    def scores(self) -> SegmentationScores:
        """Scores of everything counted so far."""
        right = np.diag(self.confusion).astype(np.float64)
        true, predicted = self.confusion.sum(1), self.confusion.sum(0)
        absent = true + predicted == 0

        def share(of: np.ndarray) -> np.ndarray:
            return np.where(absent, np.nan, right / np.maximum(of, 1))

        return SegmentationScores(
            self.classes,
            self.confusion.copy(),
            precision=share(predicted),
            recall=share(true),
            f1=share((true + predicted) / 2),
            iou=share(true + predicted - right),
        )


def evaluate_segmentation(module: Any, dataset: Any, *, batch_size: int = 4) -> SegmentationScores:
    """Score a segmentation model on the evaluation form of a data set.

    Args:
        module: Has ``predict(points)``, which gives a class for every packed point (:class:`geossl.tasks.Segmentation`).
        dataset: A geossl data set whose samples have ``point_label``; :class:`geossl.data.Subset` makes it smaller.
        batch_size: Clouds per forward pass. With a backbone whose norms are batch-wide it changes the result a little.

    Raises:
        DataError: the samples have no class for each point, or there is no sample.
    """
    if not len(dataset):
        raise DataError("evaluate_segmentation: the data set is empty")
    meter, device = SegmentationMeter(dataset.classes), device_of(module)
    loader = build_loader(dataset, min(batch_size, len(dataset)), seed=0, shuffle=False, drop_last=False, augment=False)
    with frozen(module):
        for batch in loader.one_pass():
            if batch.point_label is None:
                raise DataError(f"evaluate_segmentation: samples of {dataset.config.name} have no class for each point (point_label)")
            meter.update(module.predict(batch.to(device).points), batch.point_label)
    return meter.scores()


def _mean(values: np.ndarray) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else float("nan")


def _plain(value: float) -> float | None:
    return None if np.isnan(value) else value
