"""Rotations as matrices ``[..., 3, 3]`` and quaternions ``[..., 4]`` in the order w, x, y, z."""

from __future__ import annotations

import torch
from torch import Tensor


def quaternion_to_matrix(quaternion: Tensor) -> Tensor:
    """Return the rotation matrices ``[..., 3, 3]`` of quaternions ``[..., 4]`` (wxyz), which need not have length 1. Differentiable.

    The zero quaternion stands for no direction at all and gives the identity.
    """
    length = quaternion.norm(dim=-1, keepdim=True)
    identity = quaternion.new_tensor([1.0, 0.0, 0.0, 0.0])
    w, x, y, z = torch.where(length > 0, quaternion / torch.where(length > 0, length, 1.0), identity).unbind(-1)
    rows = (
        *(1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)),
        *(2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)),
        *(2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)),
    )
    return torch.stack(rows, -1).unflatten(-1, (3, 3))


def rotation_from_columns(columns: Tensor) -> Tensor:
    """Return rotation matrices ``[..., 3, 3]`` whose first two columns come as near as can be to two given vectors. Differentiable.

    Args:
        columns: ``[..., 6]``: the first vector, which gives the direction of the first column, then the second, which gives the plane of
            the second. They must not be parallel, nor 0.
    """
    first, second = columns.unflatten(-1, (2, 3)).unbind(-2)
    x = torch.nn.functional.normalize(first, dim=-1)
    y = torch.nn.functional.normalize(second - (x * second).sum(-1, keepdim=True) * x, dim=-1)
    return torch.stack([x, y, torch.linalg.cross(x, y)], -1)


def matrix_to_quaternion(matrix: Tensor) -> Tensor:
    """Return unit quaternions ``[..., 4]`` (wxyz, w not negative) of rotation matrices ``[..., 3, 3]``.

    The largest of the four components is computed first and the others divided by it, so turns by 180 degrees, where w is 0, are as
    precise as all others.
    """
    if matrix.shape[-2:] != (3, 3):
        raise ValueError(f"matrix_to_quaternion: matrix must be [..., 3, 3], got {list(matrix.shape)}")
    (a, b, c), (d, e, f), (g, h, i) = (row.unbind(-1) for row in matrix.unbind(-2))
    # Row k is the quaternion times four times its component k.
    candidates = torch.stack(
        [
            torch.stack([1 + a + e + i, h - f, c - g, d - b], -1),
            torch.stack([h - f, 1 + a - e - i, b + d, c + g], -1),
            torch.stack([c - g, b + d, 1 - a + e - i, f + h], -1),
            torch.stack([d - b, c + g, f + h, 1 - a - e + i], -1),
        ],
        -2,
    )
    best = candidates.diagonal(dim1=-2, dim2=-1).argmax(-1)
    chosen = candidates.gather(-2, best[..., None, None].expand(*best.shape, 1, 4)).squeeze(-2)
    chosen = torch.where(chosen[..., :1] < 0, -chosen, chosen)
    return chosen / chosen.norm(dim=-1, keepdim=True)


def euler_to_matrix(angles: Tensor) -> Tensor:
    """Return ``Rx(a) Ry(b) Rz(c)``, ``[..., 3, 3]``, for angles ``[..., 3]`` in radians: about z first, then y, then x. Differentiable."""
    (a, b, c), (sa, sb, sc) = angles.cos().unbind(-1), angles.sin().unbind(-1)
    rows = (
        *(b * c, -b * sc, sb),
        *(a * sc + sa * sb * c, a * c - sa * sb * sc, -sa * b),
        *(sa * sc - a * sb * c, sa * c + a * sb * sc, a * b),
    )
    return torch.stack(rows, -1).unflatten(-1, (3, 3))


def rotation_about_z(yaw: Tensor) -> Tensor:
    """Return the matrices ``[..., 3, 3]`` that turn counter-clockwise about z (seen from above) by ``yaw [...]`` radians."""
    cos, sin, zero, one = yaw.cos(), yaw.sin(), torch.zeros_like(yaw), torch.ones_like(yaw)
    return torch.stack([cos, -sin, zero, sin, cos, zero, zero, zero, one], -1).unflatten(-1, (3, 3))


def rotate_each(points: Tensor, matrix: Tensor) -> Tensor:
    """Rotate each point by its own matrix, in the type of the points whatever autocast says.

    Args:
        points: ``[N, 3]``.
        matrix: ``[N, 3, 3]``, of the same type.

    Returns:
        ``[N, 3]``; differentiable in both.
    """
    return (matrix * points.unsqueeze(1)).sum(2)
