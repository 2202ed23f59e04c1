"""Downstream tasks: a head and its loss on a (pretrained) backbone, trained by the same loop as the methods."""

from geossl.tasks.classification import Classification, ClassificationConfig
from geossl.tasks.files import load_task, save_task
from geossl.tasks.gaussian_density import DensityConfig
from geossl.tasks.gaussian_fitting import GaussianFit, GaussianFitConfig, GaussianFitResult, RatesConfig, StartConfig, fit_gaussians
from geossl.tasks.part_segmentation import PartSegmentation, PartSegmentationConfig
from geossl.tasks.registry import TASKS
from geossl.tasks.segmentation import Segmentation, SegmentationConfig

__all__ = [
    "TASKS",
    "Classification",
    "ClassificationConfig",
    "DensityConfig",
    "GaussianFit",
    "GaussianFitConfig",
    "GaussianFitResult",
    "PartSegmentation",
    "PartSegmentationConfig",
    "RatesConfig",
    "Segmentation",
    "SegmentationConfig",
    "StartConfig",
    "fit_gaussians",
    "load_task",
    "save_task",
]
