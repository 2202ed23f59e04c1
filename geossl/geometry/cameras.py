"""Pinhole cameras: OpenCV axes (x right, y down, z forward), ``world_to_cam``, and pixel centres at +0.5."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from geossl.geometry.containers import _Movable


@dataclass(frozen=True)
class Cameras(_Movable):
    """Pinhole cameras with images of one size.

    Args:
        world_to_cam: ``[..., 4, 4]``, world to OpenCV camera frame, acting on column vectors.
        intrinsics: ``[..., 3, 3]`` in pixels; the centre of the first pixel lies at (0.5, 0.5).
        width: Columns of an image.
        height: Rows of an image.
    """

    world_to_cam: Tensor
    intrinsics: Tensor
    width: int
    height: int

    def __post_init__(self) -> None:
        pose, k = self.world_to_cam.shape, self.intrinsics.shape
        if pose[-2:] != (4, 4) or k[-2:] != (3, 3) or pose[:-2] != k[:-2]:
            raise ValueError(f"Cameras: world_to_cam must be [..., 4, 4] and intrinsics [..., 3, 3], got {list(pose)} and {list(k)}")
        if self.width < 1 or self.height < 1:
            raise ValueError(f"Cameras: width and height must be at least 1, got {self.width} and {self.height}")

    def __len__(self) -> int:
        """Number of cameras along the first dimension."""
        return self.world_to_cam.shape[0] if self.world_to_cam.dim() > 2 else 1

    def __getitem__(self, index: int | slice | Tensor) -> Cameras:
        """Return the selected cameras."""
        return Cameras(self.world_to_cam[index], self.intrinsics[index], self.width, self.height)

    @property
    def centers(self) -> Tensor:
        """Positions of the cameras in the world, ``[..., 3]``."""
        return -(self.world_to_cam[..., :3, :3].mT @ self.world_to_cam[..., :3, 3:])[..., 0]

    def resized(self, width: int, height: int) -> Cameras:
        """Return the same cameras for images resized to ``width x height``."""
        return Cameras(self.world_to_cam, resize_intrinsics(self.intrinsics, width / self.width, height / self.height), width, height)


def intrinsics_from_fov(fov: float, width: int, height: int) -> Tensor:
    """Return ``[3, 3]`` float32 with square pixels, the horizontal field of view ``fov`` in degrees and a central principal point."""
    if not 0 < fov < 180:
        raise ValueError(f"intrinsics_from_fov: fov must lie between 0 and 180 degrees, got {fov}")
    focal = 0.5 * width / math.tan(math.radians(fov) / 2)
    return torch.tensor([[focal, 0.0, width / 2], [0.0, focal, height / 2], [0.0, 0.0, 1.0]])


def resize_intrinsics(intrinsics: Tensor, ratio_x: float, ratio_y: float) -> Tensor:
    """Return the intrinsics ``[..., 3, 3]`` of images that were resized by ``ratio_x`` and ``ratio_y``."""
    return intrinsics * intrinsics.new_tensor([ratio_x, ratio_y, 1.0])[:, None]


def look_at(eye: Tensor, target: Tensor, up: tuple[float, float, float] = (0.0, 0.0, 1.0)) -> Tensor:
    """Return ``world_to_cam [..., 4, 4]`` of a camera at ``eye [..., 3]`` looking at ``target [..., 3]``, ``up`` being up in the image.

    Raises:
        ValueError: eye and target coincide, or the view is along ``up``.
    """
    forward = target - eye
    right = torch.linalg.cross(forward, forward.new_tensor(up).expand_as(forward))
    if not bool((right.norm(dim=-1) > 1e-9 * forward.norm(dim=-1)).all()):
        raise ValueError("look_at: eye and target must differ, and the view must not be along up; give another up")
    forward, right = forward / forward.norm(dim=-1, keepdim=True), right / right.norm(dim=-1, keepdim=True)
    rotation = torch.stack([right, torch.linalg.cross(forward, right), forward], -2)
    return pose_matrix(rotation, -(rotation @ eye[..., None])[..., 0])


def pose_matrix(rotation: Tensor, translation: Tensor) -> Tensor:
    """Join ``rotation [..., 3, 3]`` and ``translation [..., 3]`` to ``[..., 4, 4]``."""
    top = torch.cat([rotation, translation[..., None]], -1)
    bottom = top.new_tensor([0.0, 0.0, 0.0, 1.0]).expand(*top.shape[:-2], 1, 4)
    return torch.cat([top, bottom], -2)


def invert_pose(pose: Tensor) -> Tensor:
    """Return the inverse of rigid poses ``[..., 4, 4]``: ``cam_to_world`` of ``world_to_cam`` and the other way round."""
    inverse = pose[..., :3, :3].mT
    return pose_matrix(inverse, -(inverse @ pose[..., :3, 3:])[..., 0])


def rotate(points: Tensor, matrix: Tensor) -> Tensor:
    """Apply ``matrix [..., 3, 3]`` to ``points [..., N, 3]``.

    Written out, so that a point gives the same bits however many there are beside it and however many threads share them; a matrix
    product promises neither.
    """
    columns = matrix[..., None, :, :]
    return points[..., :1] * columns[..., 0] + points[..., 1:2] * columns[..., 1] + points[..., 2:] * columns[..., 2]


def transform_points(points: Tensor, pose: Tensor) -> Tensor:
    """Apply ``pose [..., 4, 4]`` to ``points [..., N, 3]``."""
    return rotate(points, pose[..., :3, :3]) + pose[..., None, :3, 3]


def project(points: Tensor, world_to_cam: Tensor, intrinsics: Tensor) -> tuple[Tensor, Tensor]:
    """Project world points to the image.

    Args:
        points: ``[..., N, 3]``.
        world_to_cam: ``[..., 4, 4]``.
        intrinsics: ``[..., 3, 3]``.

    Returns:
        pixels ``[..., N, 2]`` (x, y), the first pixel spans 0 to 1; and depth ``[..., N]`` along the optical axis. Where depth is not
        positive the point lies behind the camera and its pixel means nothing.
    """
    in_camera = transform_points(points, world_to_cam)
    depth = in_camera[..., 2]
    pixels = rotate(in_camera, intrinsics)[..., :2] / torch.where(depth == 0, torch.ones_like(depth), depth)[..., None]
    return pixels, depth


def pixel_centers(height: int, width: int, like: Tensor | None = None) -> Tensor:
    """Return ``[height, width, 2]``, the (x, y) of all pixel centres: (0.5, 0.5) first."""
    options = {} if like is None else {"dtype": like.dtype, "device": like.device}
    y, x = torch.arange(height, **options) + 0.5, torch.arange(width, **options) + 0.5  # type: ignore[call-overload]
    return torch.stack(torch.meshgrid(x, y, indexing="xy"), -1)


def back_project(depth: Tensor, intrinsics: Tensor, world_to_cam: Tensor | None = None) -> Tensor:
    """Return the points ``[..., H, W, 3]`` seen at ``depth [..., H, W]`` (along the axis), in the world or, without a pose, the camera."""
    height, width = depth.shape[-2:]
    k = intrinsics[..., None, None, :, :]
    offset = pixel_centers(height, width, depth) - torch.stack([k[..., 0, 2], k[..., 1, 2]], -1)
    y = offset[..., 1] / k[..., 1, 1]
    x = (offset[..., 0] - k[..., 0, 1] * y) / k[..., 0, 0]
    points = torch.stack([x, y, torch.ones_like(x)], -1) * depth[..., None]
    if world_to_cam is None:
        return points
    cam_to_world = invert_pose(world_to_cam)
    return transform_points(points, cam_to_world[..., None, :, :])
