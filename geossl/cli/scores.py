"""How a task is scored on a test part, whatever the task."""

from __future__ import annotations

from typing import Any

from geossl.evaluation import evaluate_classification, evaluate_dense, evaluate_part_segmentation, evaluate_poses, evaluate_segmentation
from geossl.layers.dense_errors import ERRORS

BEST_SCORE = {
    "classification": "accuracy",
    "segmentation": "macro_f1",
    "part_segmentation": "instance_miou",
    "stereo": "-L1err",
    "flow": "-EPE",
    "depth": "delta1",
    "normals": "-mean_angle",
    "relative_pose": "-median_rotation",
}
"""The score of each task that tells which checkpoint is the best; after a minus the lowest one is."""


def score_task(module: Any, dataset: Any, batch_size: int) -> dict[str, float]:
    """Scores of a task on the evaluation form of ``dataset`` by name: in [0, 1], of images in the units of the task."""
    if module.config.name in ERRORS:
        return evaluate_dense(module, dataset)  # one by one: images may differ in size
    if module.config.name == "relative_pose":
        return evaluate_poses(module, dataset)
    if module.config.name == "segmentation":
        return evaluate_segmentation(module, dataset, batch_size=batch_size).scalars()
    if module.config.name == "part_segmentation":
        return evaluate_part_segmentation(module, dataset, batch_size=batch_size).scalars()
    return evaluate_classification(module, dataset, batch_size=batch_size)
