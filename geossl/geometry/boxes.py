"""Oriented boxes ``[n, 7] = (cx, cy, cz, dx, dy, dz, yaw)``: full sizes, yaw counter-clockwise about z."""

from __future__ import annotations

import torch
from torch import Tensor

from geossl.geometry.rotations import rotation_about_z

BOX_EDGES = ((0, 1), (1, 3), (3, 2), (2, 0), (4, 5), (5, 7), (7, 6), (6, 4), (0, 4), (1, 5), (2, 6), (3, 7))
"""Pairs of corners, as :func:`box_corners` numbers them, that an edge of a box joins."""


def _check(name: str, boxes: Tensor) -> None:
    if boxes.dim() != 2 or boxes.shape[1] != 7:
        raise ValueError(f"{name}: boxes must be [n, 7] (cx, cy, cz, dx, dy, dz, yaw), got {list(boxes.shape)}")


def box_corners(boxes: Tensor) -> Tensor:
    """Return the corners ``[n, 8, 3]`` of ``boxes [n, 7]``; corner ``4 a + 2 b + c`` is on the upper side in x, y, z if a, b, c are 1."""
    _check("box_corners", boxes)
    signs = torch.cartesian_prod(*[boxes.new_tensor([-0.5, 0.5])] * 3)
    return (signs * boxes[:, None, 3:6]) @ rotation_about_z(boxes[:, 6]).mT + boxes[:, None, :3]


def points_in_boxes(points: Tensor, boxes: Tensor, margin: float = 0.0) -> Tensor:
    """Return ``[N, n]`` bool, whether each of ``points [N, 3]`` lies in each of ``boxes [n, 7]`` enlarged by ``margin`` on every side."""
    _check("points_in_boxes", boxes)
    local = (points[:, None] - boxes[:, :3])[:, :, None] @ rotation_about_z(boxes[:, 6])
    return (local[:, :, 0].abs() <= boxes[:, 3:6] / 2 + margin).all(-1)
