"""The published scores of part segmentation, by hand."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from geossl.data import ShapeNetPartConfig
from geossl.errors import DataError
from geossl.evaluation import evaluate_part_segmentation
from geossl.evaluation.part_segmentation import PartSegmentationScores, part_iou


def test_score_of_a_shape():
    label = np.array([4, 4, 4, 5])
    assert part_iou(label, label, range(4, 6)) == 1.0
    assert part_iou(np.array([4, 4, 5, 5]), label, range(4, 6)) == pytest.approx((2 / 3 + 1 / 2) / 2)
    only = np.array([4, 4, 4, 4])
    assert part_iou(only, only, range(4, 6)) == 1.0  # the absent part counts 1
    assert part_iou(np.array([4, 4, 4, 5]), only, range(4, 6)) == pytest.approx((3 / 4 + 0) / 2)
    assert part_iou(np.array([4, 5]), np.array([4, -1]), range(4, 6)) == 1.0


def test_means_over_shapes_and_over_categories():
    scores = PartSegmentationScores(("bag", "cap", "mug"), np.array([0.5, 1.0, 0.3]), np.array([0, 0, 2]), 0.9)
    assert scores.instance_miou == pytest.approx(0.6)
    assert scores.category_iou == pytest.approx({"bag": 0.75, "mug": 0.3})
    assert scores.class_miou == pytest.approx((0.75 + 0.3) / 2)
    assert set(scores.scalars()) == {"instance_miou", "class_miou", "accuracy", "iou_bag", "iou_mug"}


class Slices(torch.nn.Module):
    """Knows how the stand-in's parts lie for bags, and answers the first part for tables."""

    def predict(self, points, category):
        parts = []
        for cloud, kind in zip(points.coord.split(points.lengths.tolist()), category.tolist(), strict=True):
            upper = cloud[:, 2] > cloud[:, 2].median()
            parts.append(4 + upper.long() if kind == 1 else torch.full_like(upper, 47, dtype=torch.int64))
        return torch.cat(parts)


def test_a_data_set_in_batches(shapenet_part_root):
    test = ShapeNetPartConfig(root=shapenet_part_root).build("test")
    scores = [evaluate_part_segmentation(Slices(), test, batch_size=size) for size in (1, 2, 100)]
    assert scores[0].scalars() == scores[1].scalars() == scores[2].scalars()
    assert scores[0].category_iou["table"] == pytest.approx((1 / 3 + 0 + 0) / 3)
    assert scores[0].category_iou["bag"] > 0.9
    assert scores[0].instance_miou == pytest.approx((scores[0].category_iou["bag"] + 2 * scores[0].category_iou["table"]) / 3)
    with pytest.raises(DataError, match="the data set is empty"):
        evaluate_part_segmentation(Slices(), [])
    from geossl.data import ObjectsConfig

    bare = ObjectsConfig(points=32, subset="labelled").build("test")
    bare.part_counts = (2,) * len(bare.classes)  # type: ignore[attr-defined]
    with pytest.raises(DataError, match="samples of objects have no part for each point"):
        evaluate_part_segmentation(SimpleNamespace(modules=list, parameters=list, buffers=list, eval=lambda: None), bare)
