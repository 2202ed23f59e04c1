"""Downstream tasks: a head and its loss on a (pretrained) backbone, trained by the same loop as the methods."""

from geossl.tasks.classification import Classification, ClassificationConfig
from geossl.tasks.registry import TASKS

__all__ = ["TASKS", "Classification", "ClassificationConfig"]
