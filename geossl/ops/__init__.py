"""Native operators on point clouds: checked, documented, differentiable, the same on every device.

Each takes padded clouds ``[B, N, 3]`` (with optional ``lengths [B]``) or packed ones ``[M, 3]`` with ``offsets [B + 1]``, and gives the
same bits for both. Kernels are in ``cuda_ext/``, their plain-torch twins in :mod:`geossl.ops.reference`; :func:`native_info` says what is
loaded.
"""

from geossl.ops._native import native_info
from geossl.ops.batching import offsets_from_batch, offsets_from_ends, offsets_from_lengths
from geossl.ops.chamfer import chamfer_distance, chamfer_distance_packed, chamfer_distance_patches
from geossl.ops.fps import farthest_point_sample
from geossl.ops.grouping import group
from geossl.ops.neighbors import BallNeighbors, Neighbors, ball_query, knn
from geossl.ops.voxels import VoxelMap, devoxelize, voxel_reduce, voxelize

__all__ = [
    "BallNeighbors",
    "Neighbors",
    "VoxelMap",
    "ball_query",
    "chamfer_distance",
    "chamfer_distance_packed",
    "chamfer_distance_patches",
    "devoxelize",
    "farthest_point_sample",
    "group",
    "knn",
    "native_info",
    "offsets_from_batch",
    "offsets_from_ends",
    "offsets_from_lengths",
    "voxel_reduce",
    "voxelize",
]
