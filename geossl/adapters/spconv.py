"""Sparse voxel tokens as spconv's SparseConvTensor, and back."""

from __future__ import annotations

from typing import Any

from geossl.errors import optional_import
from geossl.geometry import SparseVoxelTokens


def to_spconv(tokens: SparseVoxelTokens) -> Any:
    """Make an ``spconv.pytorch.SparseConvTensor``; rows keep their order, axes become (z, y, x) as spconv has them.

    Positions (``voxel_size``, ``origin``) have no place in it; give them to :func:`from_spconv` again.

    Raises:
        MissingDependencyError: spconv is not installed.
    """
    spconv = optional_import("spconv.pytorch", "interop")
    indices = tokens.coords[:, [0, 3, 2, 1]].contiguous()
    return spconv.SparseConvTensor(tokens.feats, indices, list(reversed(tokens.spatial_shape)), tokens.batch_size)


def from_spconv(
    tensor: Any, voxel_size: tuple[float, float, float] | None = None, origin: tuple[float, float, float] = (0.0, 0.0, 0.0)
) -> SparseVoxelTokens:
    """Take features and voxels out of an ``spconv.pytorch.SparseConvTensor``; rows keep their order.

    Args:
        tensor: Object with ``features [V, C]``, ``indices [V, 4]`` (batch, z, y, x), ``spatial_shape`` (z, y, x) and ``batch_size``.
        voxel_size: Edge lengths of a cell (x, y, z) in metres; spconv does not keep them.
        origin: Position of the lower corner of cell (0, 0, 0).
    """
    z, y, x = (int(size) for size in tensor.spatial_shape)
    coords = tensor.indices[:, [0, 3, 2, 1]].int().contiguous()
    return SparseVoxelTokens(tensor.features, coords, (x, y, z), int(tensor.batch_size), voxel_size, origin)
