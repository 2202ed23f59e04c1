"""Geometry shared by all of geossl, and the conventions every module follows.

Conventions, stated here once:

* **Points** are ``[..., 3]`` in metres unless a data set says otherwise; z is up.
* **Batches of clouds** are packed: ``coord [M, 3]`` with ``offsets [B + 1]`` int64, ``offsets[0] == 0``; cloud ``b`` is the rows
  ``offsets[b]:offsets[b + 1]``. The padded form ``[B, N, 3]`` with ``lengths [B]`` is accepted at the public edge.
* **Boxes** are ``[n, 7] = (cx, cy, cz, dx, dy, dz, yaw)``; quaternions are ``wxyz``.
* **Cameras** follow OpenCV (x right, y down, z forward): ``world_to_cam [..., 4, 4]``, ``intrinsics [..., 3, 3]``; the centre of
  the first pixel lies at (0.5, 0.5).
* **Grids** are channels first, ``[B, C, X, Y, Z]``, z up.
"""

from geossl.geometry.boxes import BOX_EDGES, box_corners, points_in_boxes
from geossl.geometry.cameras import (
    Cameras,
    back_project,
    intrinsics_from_fov,
    invert_pose,
    look_at,
    pixel_centers,
    pose_matrix,
    project,
    resize_intrinsics,
    rotate,
    transform_points,
)
from geossl.geometry.containers import Batch, Gaussians, ImageBatch, Output, PackedPoints, PointBatch, SparseVoxelTokens, Tokens
from geossl.geometry.images import IMAGE_MEAN, IMAGE_STD, denormalize_images, normalize_images
from geossl.geometry.rotations import (
    euler_to_matrix,
    matrix_to_quaternion,
    quaternion_to_matrix,
    rotate_each,
    rotation_about_z,
    rotation_from_columns,
)
from geossl.geometry.spherical_harmonics import SH_C0, sh_basis, spherical_harmonics

__all__ = [
    "BOX_EDGES",
    "IMAGE_MEAN",
    "IMAGE_STD",
    "SH_C0",
    "Batch",
    "Cameras",
    "Gaussians",
    "ImageBatch",
    "Output",
    "PackedPoints",
    "PointBatch",
    "SparseVoxelTokens",
    "Tokens",
    "back_project",
    "box_corners",
    "denormalize_images",
    "euler_to_matrix",
    "intrinsics_from_fov",
    "invert_pose",
    "look_at",
    "matrix_to_quaternion",
    "normalize_images",
    "pixel_centers",
    "points_in_boxes",
    "pose_matrix",
    "project",
    "quaternion_to_matrix",
    "resize_intrinsics",
    "rotate",
    "rotate_each",
    "rotation_about_z",
    "rotation_from_columns",
    "sh_basis",
    "spherical_harmonics",
    "transform_points",
]
