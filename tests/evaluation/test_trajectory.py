from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from geossl.evaluation.trajectory import (
    absolute_trajectory_error,
    align_points,
    chain_motions,
    pose_errors,
    relative_motion,
    rotation_angle,
)
from geossl.geometry import euler_to_matrix, invert_pose, pose_matrix


def poses(count: int, size: float = 1.0) -> torch.Tensor:
    return pose_matrix(euler_to_matrix(torch.randn(count, 3, dtype=torch.float64)), size * torch.randn(count, 3, dtype=torch.float64))


def test_angles_large_and_small() -> None:
    degrees = [0.0, 1e-6, 30.0, 90.0, 179.9999, 180.0]
    turns = euler_to_matrix(torch.tensor([[0.0, 0.0, math.radians(angle)] for angle in degrees], dtype=torch.float64))
    assert rotation_angle(turns) == pytest.approx(degrees, abs=1e-9)


def test_errors_of_poses_and_their_medians() -> None:
    truth = poses(3)
    moved = truth.clone()
    moved[1, 0, 3] += 2
    moved[2, :3, :3] = euler_to_matrix(torch.tensor([0.3, 0.0, 0.0], dtype=torch.float64)) @ moved[2, :3, :3]
    found = pose_errors(moved, truth)
    assert found.translation == pytest.approx([0, 2, 0], abs=1e-12)
    assert found.rotation == pytest.approx([0, 0, math.degrees(0.3)], abs=1e-9)
    assert found.medians() == {"median_translation": pytest.approx(0, abs=1e-12), "median_rotation": pytest.approx(0, abs=1e-9)}
    assert all(math.isnan(value) for value in pose_errors(truth[:0], truth[:0]).medians().values())


@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_a_moved_trajectory_has_no_error(scale: float) -> None:
    truth = poses(12)
    world = poses(1)[0]
    moved = world @ truth
    moved[:, :3, 3] = moved[:, :3, 3] / scale
    found = absolute_trajectory_error(moved, truth, with_scale=True)
    assert (found.rmse, found.worst, found.rotation) == (pytest.approx(0, abs=1e-9),) * 3
    assert found.alignment.scale == pytest.approx(scale)
    if scale != 1:
        assert absolute_trajectory_error(moved, truth).rmse > 0.1


def test_the_alignment_is_the_best_one() -> None:
    rng = np.random.default_rng(0)
    points = rng.normal(size=(30, 3))
    target = points @ np.asarray(euler_to_matrix(torch.tensor([0.4, -0.2, 1.0]))).T + [1.0, 2.0, 3.0] + 0.1 * rng.normal(size=(30, 3))
    found = align_points(points, target, with_scale=True)

    def left(rotation: np.ndarray, translation: np.ndarray, scale: float) -> float:
        return float(np.square(scale * points @ rotation.T + translation - target).sum())

    best = left(*found)
    for _ in range(50):
        nudge = np.asarray(euler_to_matrix(torch.from_numpy(1e-3 * rng.normal(size=3))))
        assert left(nudge @ found.rotation, found.translation + 1e-3 * rng.normal(size=3), found.scale * (1 + 1e-3 * rng.normal())) > best


def test_a_mirrored_trajectory_is_not_laid_on_its_image() -> None:
    points = np.random.default_rng(1).normal(size=(20, 3))
    assert np.linalg.det(align_points(points, points * [1, 1, -1]).rotation) == pytest.approx(1)


@pytest.mark.parametrize("points", [np.zeros((4, 3)), np.outer(np.arange(4.0), [1.0, 2.0, 3.0]), np.ones((1, 3))])
def test_points_at_one_place_or_on_a_line(points: np.ndarray) -> None:
    shifted = points + np.array([5.0, 0.0, -1.0])
    found = align_points(points, shifted)
    np.testing.assert_allclose(points @ found.rotation.T + found.translation, shifted, atol=1e-9)


def test_motions_make_the_trajectory_again() -> None:
    world_to_cam = poses(6)
    cam_to_world = invert_pose(world_to_cam)
    back = invert_pose(relative_motion(world_to_cam[:-1], world_to_cam[1:]))  # from frame i + 1 to frame i
    torch.testing.assert_close(chain_motions(back, cam_to_world[0]), cam_to_world)
    torch.testing.assert_close(chain_motions(back)[0], torch.eye(4, dtype=torch.float64))


def test_wrong_input() -> None:
    good, bad = poses(3), poses(3)
    bad[1, 0, 3] = math.inf
    with pytest.raises(ValueError, match="pose 1 of estimated is not finite"):
        absolute_trajectory_error(bad, good)
    with pytest.raises(ValueError, match="N at least 1, got"):
        absolute_trajectory_error(good[:0], good[:0])
    with pytest.raises(ValueError, match="the scale cannot be found"):
        align_points(np.zeros((4, 3)), np.ones((4, 3)), with_scale=True)
