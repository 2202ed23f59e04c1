"""Scores of part segmentation: mean intersection over union of the shapes, and of the categories."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from geossl.data import build_loader
from geossl.errors import DataError
from geossl.evaluation.features import device_of, frozen


@dataclass(frozen=True)
class PartSegmentationScores:
    """The published scores (Yi et al., SIGGRAPH Asia 2016), in [0, 1].

    The score of a shape is the mean of the intersections over unions of all parts that its category has; a part that occurs neither among
    its labels nor among its predictions counts 1.

    Args:
        classes: Names of the categories.
        shape_iou: Score of each shape, ``[n]`` float64.
        category: Category of each shape, ``[n]`` int64.
        accuracy: Share of labelled points that are right.
    """

    classes: tuple[str, ...]
    shape_iou: np.ndarray
    category: np.ndarray
    accuracy: float

    @property
    def instance_miou(self) -> float:
        """Mean over all shapes."""
        return float(self.shape_iou.mean())

    @property
    def category_iou(self) -> dict[str, float]:
        """Mean over the shapes of each category that has any."""
        return {name: float(self.shape_iou[self.category == i].mean()) for i, name in enumerate(self.classes) if i in self.category}

    @property
    def class_miou(self) -> float:
        """Mean of the categories' means."""
        return float(np.mean(list(self.category_iou.values())))

    def scalars(self) -> dict[str, float]:
        """Flat names for a log: ``instance_miou``, ``class_miou``, ``accuracy``, then ``iou_<category>`` of each that has shapes."""
        pooled = {"instance_miou": self.instance_miou, "class_miou": self.class_miou, "accuracy": self.accuracy}
        return pooled | {f"iou_{name}": value for name, value in self.category_iou.items()}


def part_iou(predicted: np.ndarray, label: np.ndarray, parts: range) -> float:
    """Score of one shape: mean over ``parts`` of intersection over union; 1 for a part that is in neither.

    Args:
        predicted: Part of each point, ``[N]`` integers.
        label: The true ones, ``[N]``; points with -1 do not count.
        parts: Numbers of the parts that the shape's category has.
    """
    predicted, known = predicted[label >= 0], label[label >= 0]
    scores = []
    for part in parts:
        guess, truth = predicted == part, known == part
        union = int((guess | truth).sum())
        scores.append(int((guess & truth).sum()) / union if union else 1.0)
    return float(np.mean(scores))


def evaluate_part_segmentation(module: Any, dataset: Any, *, batch_size: int = 16) -> PartSegmentationScores:
    """Score a part segmentation model on the evaluation form of a data set.

    Args:
        module: Has ``predict(points, category)``, which gives a part for every packed point (:class:`geossl.tasks.PartSegmentation`).
        dataset: A geossl data set whose samples have ``label`` and ``point_label``, and that has ``part_counts``.
        batch_size: Shapes per forward pass; does not change the result beyond rounding.

    Raises:
        DataError: the samples have no parts, or there is no sample.
    """
    if not len(dataset):
        raise DataError("evaluate_part_segmentation: the data set is empty")
    ends = np.cumsum(dataset.part_counts)
    parts = [range(int(end - count), int(end)) for end, count in zip(ends, dataset.part_counts, strict=True)]
    scores, categories, right, of, device = [], [], 0, 0, device_of(module)
    loader = build_loader(dataset, min(batch_size, len(dataset)), seed=0, shuffle=False, drop_last=False, augment=False)
    with frozen(module):
        for batch in loader.one_pass():
            if batch.point_label is None or batch.label is None:
                raise DataError(f"evaluate_part_segmentation: samples of {dataset.config.name} have no part for each point (point_label)")
            moved = batch.to(device)
            predicted = module.predict(moved.points, moved.label).cpu()
            lengths = batch.points.lengths.tolist()
            for guess, truth, category in zip(
                predicted.split(lengths), batch.point_label.split(lengths), batch.label.tolist(), strict=True
            ):
                scores.append(part_iou(guess.numpy(), truth.numpy(), parts[category]))
                categories.append(category)
                right, of = right + int((guess == truth).sum()), of + int((truth >= 0).sum())
    return PartSegmentationScores(tuple(dataset.classes), np.array(scores), np.array(categories), right / max(of, 1))
