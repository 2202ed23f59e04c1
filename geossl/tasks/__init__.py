"""Downstream tasks: a head and its loss on a (pretrained) backbone, trained by the same loop as the methods."""

from geossl.tasks.classification import Classification, ClassificationConfig
from geossl.tasks.dense import Dense, DenseConfig, DepthConfig, FlowConfig, NormalsConfig, StereoConfig
from geossl.tasks.files import load_task, save_task
from geossl.tasks.gaussian_density import DensityConfig
from geossl.tasks.gaussian_fitting import GaussianFit, GaussianFitConfig, GaussianFitResult, RatesConfig, StartConfig, fit_gaussians
from geossl.tasks.part_segmentation import PartSegmentation, PartSegmentationConfig
from geossl.tasks.pose import RelativePose, RelativePoseConfig
from geossl.tasks.registry import TASKS
from geossl.tasks.segmentation import Segmentation, SegmentationConfig
from geossl.tasks.tiling import Prediction, Weighting, predict_tiled

__all__ = [
    "TASKS",
    "Classification",
    "ClassificationConfig",
    "Dense",
    "DenseConfig",
    "DensityConfig",
    "DepthConfig",
    "FlowConfig",
    "GaussianFit",
    "GaussianFitConfig",
    "GaussianFitResult",
    "NormalsConfig",
    "PartSegmentation",
    "PartSegmentationConfig",
    "Prediction",
    "RatesConfig",
    "RelativePose",
    "RelativePoseConfig",
    "Segmentation",
    "SegmentationConfig",
    "StartConfig",
    "StereoConfig",
    "Weighting",
    "fit_gaussians",
    "load_task",
    "predict_tiled",
    "save_task",
]
