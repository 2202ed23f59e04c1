"""Quaternions, matrices and frames."""

from __future__ import annotations

import math

import pytest
import torch

from geossl.geometry import matrix_to_quaternion, quaternion_to_matrix, rotation_about_z


def random_quaternions(count: int) -> torch.Tensor:
    q = torch.randn(count, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    q = q / q.norm(dim=-1, keepdim=True)
    return torch.where(q[:, :1] < 0, -q, q)


def test_there_and_back() -> None:
    q = random_quaternions(200)
    matrix = quaternion_to_matrix(3 * q)
    assert torch.allclose(matrix @ matrix.mT, torch.eye(3, dtype=torch.float64).expand(200, 3, 3), atol=1e-12)
    assert torch.allclose(torch.linalg.det(matrix), torch.ones(200, dtype=torch.float64))
    assert torch.allclose(matrix_to_quaternion(matrix), q, atol=1e-12)


@pytest.mark.parametrize("axis", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0), (1, -2, 3), (0, 1e-4, 1)])
@pytest.mark.parametrize("angle", [math.pi, math.pi - 1e-4, -math.pi + 1e-7, 1e-6, 0.0])
def test_half_turns_are_as_precise_as_others(axis: tuple[float, float, float], angle: float) -> None:
    direction = torch.tensor(axis, dtype=torch.float32)
    direction = direction / direction.norm()
    quaternion = torch.cat([torch.tensor([math.cos(angle / 2)]), math.sin(angle / 2) * direction])
    matrix = quaternion_to_matrix(quaternion)
    back = quaternion_to_matrix(matrix_to_quaternion(matrix))
    assert torch.allclose(back, matrix, atol=3e-7)


def test_the_zero_quaternion_is_the_identity_with_finite_gradients() -> None:
    q = torch.zeros(2, 4, requires_grad=True)
    matrix = quaternion_to_matrix(q)
    assert torch.equal(matrix, torch.eye(3).expand(2, 3, 3))


def test_rotation_about_z_is_counter_clockwise() -> None:
    turned = rotation_about_z(torch.tensor(math.pi / 2)) @ torch.tensor([1.0, 0.0, 0.0])
    assert torch.allclose(turned, torch.tensor([0.0, 1.0, 0.0]), atol=1e-6)


def test_a_matrix_must_be_square() -> None:
    with pytest.raises(ValueError, match=r"\[\.\.\., 3, 3\], got \[2, 3\]"):
        matrix_to_quaternion(torch.zeros(2, 3))
