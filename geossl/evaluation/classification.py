"""Scores of a classifier of clouds: accuracy, and accuracy by voting over random views."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from geossl.data import PointCloud, Sample, build_loader, collate
from geossl.data.augment import AugmentConfig, augment
from geossl.errors import DataError
from geossl.evaluation.features import device_of, frozen


def evaluate_classification(module: Any, dataset: Any, *, batch_size: int = 32) -> dict[str, float]:
    """Overall accuracy and mean accuracy per class of a classifier on the evaluation form of a data set, in [0, 1].

    Args:
        module: Has ``logits(points)``, which gives class scores ``[B, K]`` of packed clouds (:class:`geossl.tasks.Classification`).
        dataset: A geossl data set with classes.
        batch_size: Clouds per forward pass.

    Returns:
        ``accuracy`` and ``class_accuracy``.

    Raises:
        DataError: the data set is empty.
    """
    if not len(dataset):
        raise DataError("evaluate_classification: the data set is empty")
    device = device_of(module)
    loader = build_loader(dataset, min(batch_size, len(dataset)), seed=0, shuffle=False, drop_last=False, augment=False)
    right, of = np.zeros(len(dataset.classes)), np.zeros(len(dataset.classes))
    with frozen(module):
        for batch in loader.one_pass():
            label = np.asarray(batch.label)
            guess = module.logits(batch.to(device).points).argmax(1).cpu().numpy()
            np.add.at(right, label, guess == label)
            np.add.at(of, label, 1)
    per_class = right[of > 0] / of[of > 0]
    return {"accuracy": float(right.sum() / of.sum()), "class_accuracy": float(per_class.mean())}


@dataclass(frozen=True)
class VotingScores:
    """Accuracies by voting, in [0, 1]: one for each repetition, whose random views are others.

    Args:
        accuracies: Of each repetition.
        votes: Views that each repetition averages over.
    """

    accuracies: tuple[float, ...]
    votes: int

    @property
    def mean(self) -> float:
        """Mean over the repetitions: what voting is expected to give."""
        return float(np.mean(self.accuracies))

    @property
    def std(self) -> float:
        """Sample standard deviation over the repetitions (0 for fewer than two)."""
        return float(np.std(self.accuracies, ddof=1)) if len(self.accuracies) > 1 else 0.0

    @property
    def best_on_test(self) -> float:
        """The best repetition, which is what Point-MAE, Point-M2AE and I2P-MAE report: chosen by looking at the test part."""
        return max(self.accuracies)

    def to_json(self) -> dict[str, Any]:
        """Plain numbers and lists."""
        chosen = {"best_on_test": self.best_on_test, "best_on_test_about": "the best repetition, selected on the test part, as published"}
        return {"votes": self.votes, "mean": self.mean, "std": self.std, "accuracies": list(self.accuracies), **chosen}


def evaluate_by_voting(
    module: Any,
    dataset: Any,
    *,
    points: int = 1024,
    votes: int = 10,
    repetitions: int = 10,
    views: AugmentConfig | None = None,
    batch_size: int = 32,
    seed: int = 0,
) -> VotingScores:
    """Score a classifier by the mean of its scores for several random views of each cloud (published for ModelNet40).

    Args:
        module: Has ``logits(points)``.
        dataset: A geossl data set with classes whose evaluation form gives the clouds to choose from: farthest-point sampling to 1,200
            points (``points=1200, evaluation_points="farthest"``), as published.
        points: Points of a view, chosen at random; of a cloud that has no more, all.
        votes: Views of each cloud whose scores are averaged.
        repetitions: Times all of it is done with other views (published: 299 by Point-MAE, 49 by Point-M2AE and I2P-MAE).
        views: Augmentation of the views; None scales and shifts, as published.
        batch_size: Clouds per forward pass.
        seed: Of the views; those of a cloud do not depend on the others.

    Raises:
        DataError: the data set is empty.
        ValueError: ``points``, ``votes`` or ``repetitions`` is less than 1.
    """
    for name, value in (("points", points), ("votes", votes), ("repetitions", repetitions)):
        if value < 1:
            raise ValueError(f"evaluate_by_voting: {name} must be at least 1, got {value}")
    if not len(dataset):
        raise DataError("evaluate_by_voting: the data set is empty")
    views, device = views or AugmentConfig(), device_of(module)
    right = np.zeros(repetitions)
    with frozen(module):
        for start in range(0, len(dataset), batch_size):
            samples = [dataset.get(row, None) for row in range(start, min(start + batch_size, len(dataset)))]
            label = np.array([sample.label for sample in samples])
            for repetition in range(repetitions):
                total = torch.zeros(())
                for vote in range(votes):
                    seen = [_view(sample, dataset.columns, points, views, (seed, repetition, vote, sample.index)) for sample in samples]
                    total = total + module.logits(collate(seen).to(device).points).cpu()
                right[repetition] += (total.argmax(1).numpy() == label).sum()
    return VotingScores(tuple((right / len(dataset)).tolist()), votes)


def _view(sample: Sample, columns: tuple[str, ...], points: int, views: AugmentConfig, key: tuple[int, ...]) -> Sample:
    """A random view of a sample."""
    rng = np.random.default_rng(key)
    parts = {name: sample.points[:, 3 * i : 3 * i + 3] for i, name in enumerate(columns)}
    cloud = PointCloud(parts["xyz"], parts.get("normal"), parts.get("rgb"))
    cloud = augment(cloud[rng.permutation(len(cloud))[:points]], rng, views)
    return Sample(cloud.stack(), sample.label, sample.index)
