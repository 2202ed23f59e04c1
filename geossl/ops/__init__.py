"""Native operators on point clouds: checked, documented, differentiable, the same on every device.

Each takes padded clouds ``[B, N, 3]`` (with optional ``lengths [B]``) or packed ones ``[M, 3]`` with ``offsets [B + 1]``, and gives the
same bits for both; :func:`rope_2d` alone works on the tokens of images. Kernels are in ``cuda_ext/``, their plain-torch twins in
:mod:`geossl.ops.reference`; :func:`native_info` says what is loaded.
"""

from geossl.ops._native import native_info
from geossl.ops.batching import batch_from_offsets, offsets_from_batch, offsets_from_ends, offsets_from_lengths
from geossl.ops.chamfer import chamfer_distance, chamfer_distance_packed, chamfer_distance_patches
from geossl.ops.fps import farthest_point_sample
from geossl.ops.gaussians import rasterize_gaussians
from geossl.ops.grouping import group, group_relative
from geossl.ops.interpolation import interpolate, three_nn_interpolate
from geossl.ops.neighbors import BallNeighbors, Neighbors, ball_query, knn
from geossl.ops.nms import CentralityNMS, centrality_nms
from geossl.ops.radius import RadiusNeighbors, radius_search
from geossl.ops.rope import rope_2d, rope_2d_table
from geossl.ops.segments import scatter_reduce, segment_reduce
from geossl.ops.sparse import NeighborMap, neighbor_map
from geossl.ops.voxels import VoxelMap, devoxelize, voxel_reduce, voxelize

__all__ = [
    "BallNeighbors",
    "CentralityNMS",
    "NeighborMap",
    "Neighbors",
    "RadiusNeighbors",
    "VoxelMap",
    "ball_query",
    "batch_from_offsets",
    "centrality_nms",
    "chamfer_distance",
    "chamfer_distance_packed",
    "chamfer_distance_patches",
    "devoxelize",
    "farthest_point_sample",
    "group",
    "group_relative",
    "interpolate",
    "knn",
    "native_info",
    "neighbor_map",
    "offsets_from_batch",
    "offsets_from_ends",
    "offsets_from_lengths",
    "radius_search",
    "rasterize_gaussians",
    "rope_2d",
    "rope_2d_table",
    "scatter_reduce",
    "segment_reduce",
    "three_nn_interpolate",
    "voxel_reduce",
    "voxelize",
]
