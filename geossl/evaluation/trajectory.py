"""Scores of camera motion: errors of single poses, and of whole trajectories after they are laid on the true one.

Umeyama, "Least-squares estimation of transformation parameters between two point patterns", PAMI 1991; Sturm et al., "A Benchmark for the
Evaluation of RGB-D SLAM Systems", IROS 2012 (absolute trajectory error). Poses are rigid ``[N, 4, 4]``, lengths in the unit of the data.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from geossl.data import build_loader
from geossl.errors import DataError
from geossl.evaluation.features import device_of, frozen
from geossl.geometry import invert_pose


class PoseErrors(NamedTuple):
    """How far poses are from the true ones: ``translation [N]`` (length of the difference) and ``rotation [N]`` in degrees; float64."""

    translation: np.ndarray
    rotation: np.ndarray

    def medians(self) -> dict[str, float]:
        """``median_translation`` and ``median_rotation``, as 7-Scenes is scored; NaN without poses."""
        found = (float(np.median(values)) if len(values) else float("nan") for values in self)
        return dict(zip(("median_translation", "median_rotation"), found, strict=True))


class Alignment(NamedTuple):
    """The map ``scale * rotation @ x + translation`` that lays one set of points on another."""

    rotation: np.ndarray
    translation: np.ndarray
    scale: float


@dataclass(frozen=True)
class TrajectoryScores:
    """Absolute trajectory error: distances between true positions and the aligned ones.

    Args:
        rmse: Root of the mean square, the usual figure.
        mean: Mean.
        median: Median.
        worst: Largest.
        rotation: Median angle between true and aligned orientations, degrees.
        alignment: How the estimated trajectory was laid on the true one.
    """

    rmse: float
    mean: float
    median: float
    worst: float
    rotation: float
    alignment: Alignment


def rotation_angle(matrix: Tensor | np.ndarray) -> np.ndarray:
    """Angles ``[...]`` in degrees, 0 to 180, of rotations ``[..., 3, 3]``; small ones are as precise as large ones."""
    r = np.asarray(matrix, dtype=np.float64)
    sine = np.stack([r[..., 2, 1] - r[..., 1, 2], r[..., 0, 2] - r[..., 2, 0], r[..., 1, 0] - r[..., 0, 1]], -1)
    return np.degrees(np.arctan2(np.linalg.norm(sine, axis=-1), np.trace(r, axis1=-2, axis2=-1) - 1))


def pose_errors(estimated: Tensor, truth: Tensor) -> PoseErrors:
    """Compare poses one by one.

    Args:
        estimated: ``[N, 4, 4]``.
        truth: ``[N, 4, 4]``.

    Raises:
        ValueError: the shapes are wrong, or a pose is not finite.
    """
    mine, true = _checked("pose_errors", estimated, truth, least=0)
    turned = mine[:, :3, :3] @ true[:, :3, :3].transpose(0, 2, 1)
    return PoseErrors(np.linalg.norm(mine[:, :3, 3] - true[:, :3, 3], axis=1), rotation_angle(turned))


def chain_motions(motions: Tensor, start: Tensor | None = None) -> Tensor:
    """Make a trajectory of the motions between its frames.

    Args:
        motions: ``[N, 4, 4]``; motion i takes points from the camera of frame i + 1 to that of frame i.
        start: Pose (camera to world) of frame 0, ``[4, 4]``; None: the identity.

    Returns:
        Poses, camera to world, of the N + 1 frames.
    """
    poses = [torch.eye(4, dtype=torch.float64) if start is None else start.double()]
    for motion in motions.double():
        poses.append(poses[-1] @ motion)
    return torch.stack(poses)


def align_points(points: np.ndarray, target: np.ndarray, *, with_scale: bool = False) -> Alignment:
    """Find the rotation and translation (and scale) that lay ``points [N, 3]`` on ``target [N, 3]`` with the least squares.

    Where the points lie on a line, one of the equally good rotations is taken.

    Raises:
        ValueError: the shapes differ or are not ``[N, 3]``, there is no point, or the scale of coincident points is wanted.
    """
    from scipy.spatial.transform import Rotation

    if points.shape != target.shape or points.ndim != 2 or points.shape[1] != 3 or not len(points):
        raise ValueError(f"align_points: expected two arrays [N, 3] of one length, got {list(points.shape)} and {list(target.shape)}")
    center, goal = points.mean(0), target.mean(0)
    around, wanted = points - center, target - goal
    spread = float(np.square(around).sum())
    if not spread:
        if with_scale:
            raise ValueError("align_points: all points coincide, so the scale cannot be found; leave with_scale off")
        return Alignment(np.eye(3), goal - center, 1.0)
    if not wanted.any():
        rotation = np.eye(3)
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # points on a line: the docstring says what happens
            rotation = Rotation.align_vectors(wanted, around)[0].as_matrix()
    scale = float((wanted * (around @ rotation.T)).sum()) / spread if with_scale else 1.0
    return Alignment(rotation, goal - scale * rotation @ center, scale)


def absolute_trajectory_error(estimated: Tensor, truth: Tensor, *, with_scale: bool = False) -> TrajectoryScores:
    """Lay a trajectory on the true one and measure what is left.

    Args:
        estimated: Poses, camera to world, ``[N, 4, 4]``.
        truth: The true ones of the same frames.
        with_scale: Fit the scale as well, for trajectories from single cameras.

    Raises:
        ValueError: the shapes are wrong, there is no frame, or a pose is not finite.
    """
    mine, true = _checked("absolute_trajectory_error", estimated, truth, least=1)
    alignment = align_points(mine[:, :3, 3], true[:, :3, 3], with_scale=with_scale)
    placed = alignment.scale * mine[:, :3, 3] @ alignment.rotation.T + alignment.translation
    distance = np.linalg.norm(placed - true[:, :3, 3], axis=1)
    angle = rotation_angle(alignment.rotation @ mine[:, :3, :3] @ true[:, :3, :3].transpose(0, 2, 1))
    return TrajectoryScores(
        rmse=float(np.sqrt(np.square(distance).mean())),
        mean=float(distance.mean()),
        median=float(np.median(distance)),
        worst=float(distance.max()),
        rotation=float(np.median(angle)),
        alignment=alignment,
    )


def evaluate_poses(module: Any, dataset: Any, *, batch_size: int = 8) -> dict[str, float]:
    """Score a relative pose task on the evaluation form of a data set.

    Args:
        module: Has ``predict(image, reference)``, which gives motions ``[B, 4, 4]`` (:class:`geossl.tasks.RelativePose`).
        dataset: Gives :class:`geossl.data.ImageSample` with ``reference`` and ``motion``. Where it has ``chains`` (rows that follow each
            other, :class:`geossl.data.PosePairsConfig`), their motions are strung together to trajectories.
        batch_size: Pairs per forward pass.

    Returns:
        ``median_translation`` and ``median_rotation`` of the motions: also the errors of the absolute pose of the first image, if that of
        the second is known. With ``chains`` the mean over them of ``ate`` (:attr:`TrajectoryScores.rmse`).

    Raises:
        DataError: there is no sample, or samples have no motion.
    """
    if not len(dataset):
        raise DataError("evaluate_poses: the data set is empty")
    found, true, device = [], [], device_of(module)
    loader = build_loader(dataset, min(batch_size, len(dataset)), seed=0, shuffle=False, drop_last=False, augment=False)
    with frozen(module):
        for batch in loader.one_pass():
            if batch.motion is None or batch.reference is None:
                raise DataError(f"evaluate_poses: samples of {dataset.config.name} have no motion between two images")
            moved = batch.to(device)
            found.append(module.predict(moved.image, moved.reference).cpu())
            true.append(batch.motion)
    estimated, truth = torch.cat(found).double(), torch.cat(true).double()
    scores = pose_errors(estimated, truth).medians()
    chains = [torch.from_numpy(rows) for rows in getattr(dataset, "chains", ()) if len(rows)]
    if chains:
        strung = [[chain_motions(invert_pose(motions[rows])) for motions in (estimated, truth)] for rows in chains]
        scores["ate"] = float(np.mean([absolute_trajectory_error(*pair).rmse for pair in strung]))
    return scores


def relative_motion(world_to_cam: Tensor, other_world_to_cam: Tensor) -> Tensor:
    """The motion ``[..., 4, 4]`` that takes points from the first camera to the other."""
    return other_world_to_cam @ invert_pose(world_to_cam)


def _checked(what: str, estimated: Tensor, truth: Tensor, *, least: int) -> tuple[np.ndarray, np.ndarray]:
    if estimated.shape != truth.shape or estimated.dim() != 3 or estimated.shape[1:] != (4, 4) or len(estimated) < least:
        raise ValueError(f"{what}: expected two tensors [N, 4, 4], N at least {least}, got {list(estimated.shape)} and {list(truth.shape)}")
    for name, poses in (("estimated", estimated), ("truth", truth)):
        if not bool(poses.isfinite().all()):
            row = int((~poses.isfinite()).flatten(1).any(1).nonzero()[0, 0])
            raise ValueError(f"{what}: pose {row} of {name} is not finite; leave such frames out")
    return estimated.detach().cpu().double().numpy(), truth.detach().cpu().double().numpy()
