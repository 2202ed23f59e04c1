"""Cameras: conventions, projection and its inverse."""

from __future__ import annotations

import pytest
import torch

from geossl.geometry import (
    Cameras,
    back_project,
    intrinsics_from_fov,
    invert_pose,
    look_at,
    pixel_centers,
    project,
    transform_points,
)


def test_conventions() -> None:
    pose = look_at(torch.tensor([1.0, 2.0, 1.5]), torch.tensor([1.0, 5.0, 1.5]))  # from the south, looking north
    k = intrinsics_from_fov(90.0, 200, 100)
    assert k.tolist() == [[pytest.approx(100.0), 0.0, 100.0], [0.0, pytest.approx(100.0), 50.0], [0.0, 0.0, 1.0]]
    points = torch.tensor([[1.0, 4.0, 1.5], [2.0, 4.0, 1.5], [1.0, 4.0, 2.5], [1.0, 0.0, 1.5]])
    pixels, depth = project(points, pose, k)
    assert torch.allclose(depth, torch.tensor([2.0, 2.0, 2.0, -2.0]))
    assert torch.allclose(pixels[:3], torch.tensor([[100.0, 50.0], [150.0, 50.0], [100.0, 0.0]]), atol=1e-4)  # east is right, up is up
    assert torch.allclose(torch.linalg.det(pose[:3, :3]), torch.tensor(1.0))


def test_back_projection_inverts_projection() -> None:
    generator = torch.Generator().manual_seed(0)
    eye = torch.rand(3, 3, generator=generator, dtype=torch.float64)
    pose = look_at(eye, eye + torch.rand(3, 3, generator=generator, dtype=torch.float64) - 0.5)
    k = intrinsics_from_fov(70.0, 8, 6).double().expand(3, 3, 3).clone()
    k[:, 0, 1] = 0.3  # skew
    depth = 1 + torch.rand(3, 6, 8, generator=generator, dtype=torch.float64)
    points = back_project(depth, k, pose)
    pixels, found = project(points.flatten(1, 2), pose, k)
    assert torch.allclose(found, depth.flatten(1), atol=1e-9)
    assert torch.allclose(pixels, pixel_centers(6, 8).double().flatten(0, 1).expand(3, -1, -1), atol=1e-7)
    in_camera = back_project(depth, k)
    assert torch.allclose(transform_points(in_camera.flatten(1, 2), invert_pose(pose)), points.flatten(1, 2), atol=1e-9)


def test_cameras_check_resize_and_select() -> None:
    pose = look_at(torch.tensor([[1.0, 2.0, 3.0], [0.0, 0.0, 1.0]]), torch.zeros(2, 3) + torch.tensor([0.0, 1.0, 0.0]))
    cameras = Cameras(pose, intrinsics_from_fov(60.0, 64, 48).expand(2, 3, 3), 64, 48)
    assert len(cameras) == 2
    assert torch.allclose(cameras.centers, torch.tensor([[1.0, 2.0, 3.0], [0.0, 0.0, 1.0]]), atol=1e-6)
    half = cameras.resized(32, 12)
    assert torch.allclose(half.intrinsics[0, :2, 2], torch.tensor([16.0, 6.0]))
    assert torch.equal(half[1].world_to_cam, pose[1])
    with pytest.raises(ValueError, match=r"world_to_cam must be \[\.\.\., 4, 4\]"):
        Cameras(pose, torch.eye(3), 64, 48)
    with pytest.raises(ValueError, match="at least 1"):
        Cameras(pose, torch.eye(3).expand(2, 3, 3), 0, 48)


@pytest.mark.parametrize("target", [(0.0, 0.0, 1.0), (0.0, 0.0, 2.0)])
def test_look_at_refuses_views_without_direction(target: tuple[float, float, float]) -> None:
    with pytest.raises(ValueError, match="eye and target must differ"):
        look_at(torch.tensor([0.0, 0.0, 1.0]), torch.tensor(target))


@pytest.mark.parametrize("fov", [0.0, 180.0, -10.0])
def test_field_of_view_is_checked(fov: float) -> None:
    with pytest.raises(ValueError, match="between 0 and 180"):
        intrinsics_from_fov(fov, 10, 10)
