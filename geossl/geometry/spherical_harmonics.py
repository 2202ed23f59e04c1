"""Real spherical harmonics of degree 0 to 3, in the order and with the signs of the Gaussian splatting papers and viewers."""

from __future__ import annotations

import torch
from torch import Tensor

SH_C0 = 0.28209479177387814
"""The constant of degree 0: a colour c has the coefficient ``(c - 0.5) / SH_C0``."""

_C1 = 0.4886025119029199
_C2 = (1.0925484305920792, 0.31539156525252005, 0.5462742152960396)
_C3 = (0.5900435899266435, 2.890611442640554, 0.4570457994644658, 0.3731763325901154, 1.445305721320277)


def sh_basis(degree: int, directions: Tensor) -> list[Tensor]:
    """Return the ``(degree + 1)^2`` basis functions of unit ``directions [..., 3]``, each ``[...]`` (the first is ``[1]``)."""
    if not 0 <= degree <= 3:
        raise ValueError(f"sh_basis: degree must lie between 0 and 3, got {degree}")
    basis = [directions.new_full((1,), SH_C0)]
    if degree == 0:
        return basis
    x, y, z = directions.unbind(-1)
    basis += [-_C1 * y, _C1 * z, -_C1 * x]
    if degree == 1:
        return basis
    xx, yy, zz, xy, yz, xz = x * x, y * y, z * z, x * y, y * z, x * z
    basis += [_C2[0] * xy, -_C2[0] * yz, _C2[1] * (2 * zz - xx - yy), -_C2[0] * xz, _C2[2] * (xx - yy)]
    if degree == 2:
        return basis
    basis += [-_C3[0] * y * (3 * xx - yy), _C3[1] * xy * z, -_C3[2] * y * (4 * zz - xx - yy), _C3[3] * z * (2 * zz - 3 * xx - 3 * yy)]
    return [*basis, -_C3[2] * x * (4 * zz - xx - yy), _C3[4] * z * (xx - yy), -_C3[0] * x * (xx - 3 * yy)]


def _unit(directions: Tensor) -> Tensor:
    """Return directions of length 1; 0 where the largest coordinate is under the smallest normal number.

    The sum of squares is written out, because reductions of torch add in an order that depends on the vector unit of the processor, and
    the root is ``rsqrt``, because ``sqrt`` may be MKL's, whose last bit depends on the processor.
    """
    largest = directions.detach().abs().amax(-1, keepdim=True)  # squares of very large or small coordinates would leave the range
    there = largest >= torch.finfo(directions.dtype).tiny
    scaled = torch.where(there, directions, 1.0) / torch.where(there, largest, 1.0)
    x, y, z = scaled.unbind(-1)
    return torch.where(there, scaled * ((x * x + y * y) + z * z).rsqrt()[..., None], 0.0)


def spherical_harmonics(degree: int, directions: Tensor, coefficients: Tensor) -> Tensor:
    """Evaluate ``sum_k B_k(direction) * coefficient_k``.

    Args:
        degree: 0 to 3; the first ``(degree + 1)^2`` coefficients are used.
        directions: ``[..., 3]``, of any length but 0 (normalised inside).
        coefficients: ``[..., K, C]`` with ``K >= (degree + 1)^2``; leading dimensions broadcast with those of ``directions``.

    Returns:
        ``[..., C]``; differentiable in both.
    """
    needed = (degree + 1) ** 2
    if coefficients.dim() < 2 or coefficients.shape[-2] < needed:
        raise ValueError(f"spherical_harmonics: degree {degree} needs coefficients [..., K >= {needed}, C], got {list(coefficients.shape)}")
    basis = sh_basis(degree, _unit(directions))
    # A running sum: the order of additions is the same on every device.
    total = basis[0] * coefficients[..., 0, :]
    for k in range(1, needed):
        total = total + basis[k][..., None] * coefficients[..., k, :]
    return total if degree else total.expand(torch.broadcast_shapes(total.shape, (*directions.shape[:-1], 1)))
