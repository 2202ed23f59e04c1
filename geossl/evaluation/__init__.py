"""Evaluation of frozen representations: probes with honest baselines, and feature extraction.

The everyday calls: :func:`extract_features` (features of clouds: a tensor, a file, a folder or a data set), :func:`extract_image_features`
and :func:`extract_scene_features` (of pictures, and of points seen in posed pictures), :class:`Prober` (k-NN, linear
and SVM probes of an encoder on a labelled data set, baselines beside them) and :func:`quick_probe` (the cheap form for the middle of
a training).
"""

from geossl.evaluation.baselines import BASELINES, calibrate_batchnorm, random_twin
from geossl.evaluation.classification import VotingScores, evaluate_by_voting, evaluate_classification
from geossl.evaluation.correspondence import Matches, MatchScores, match_patches, score_matches, stay_put
from geossl.evaluation.dense import DenseMeter, evaluate_dense
from geossl.evaluation.descriptors import shape_descriptor
from geossl.evaluation.extract import ExtractedFeatures, extract_features
from geossl.evaluation.features import embed, pool_tokens, read_tokens
from geossl.evaluation.image_features import ImageFeatures, extract_image_features, extract_pair_features, extract_scene_features
from geossl.evaluation.instances import InstanceScore, score_instances
from geossl.evaluation.part_segmentation import PartSegmentationScores, evaluate_part_segmentation
from geossl.evaluation.prober import Prober, quick_probe
from geossl.evaluation.probes import PROBES, Features, ProbeProtocol, ProbeScore, probe
from geossl.evaluation.report_data import save_report_data, save_segmentation_data
from geossl.evaluation.segmentation import SegmentationMeter, SegmentationScores, evaluate_segmentation
from geossl.evaluation.summary import summarise
from geossl.evaluation.token_probe import TOKEN_BASELINES, TokenProbeProtocol, TokenProber, TokenProbeScore
from geossl.evaluation.trajectory import TrajectoryScores, absolute_trajectory_error, evaluate_poses, pose_errors

__all__ = [
    "BASELINES",
    "PROBES",
    "TOKEN_BASELINES",
    "DenseMeter",
    "ExtractedFeatures",
    "Features",
    "ImageFeatures",
    "InstanceScore",
    "MatchScores",
    "Matches",
    "PartSegmentationScores",
    "ProbeProtocol",
    "ProbeScore",
    "Prober",
    "SegmentationMeter",
    "SegmentationScores",
    "TokenProbeProtocol",
    "TokenProbeScore",
    "TokenProber",
    "TrajectoryScores",
    "VotingScores",
    "absolute_trajectory_error",
    "calibrate_batchnorm",
    "embed",
    "evaluate_by_voting",
    "evaluate_classification",
    "evaluate_dense",
    "evaluate_part_segmentation",
    "evaluate_poses",
    "evaluate_segmentation",
    "extract_features",
    "extract_image_features",
    "extract_pair_features",
    "extract_scene_features",
    "match_patches",
    "pool_tokens",
    "pose_errors",
    "probe",
    "quick_probe",
    "random_twin",
    "read_tokens",
    "save_report_data",
    "save_segmentation_data",
    "score_instances",
    "score_matches",
    "shape_descriptor",
    "stay_put",
    "summarise",
]
