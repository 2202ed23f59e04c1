"""What a user could call instead of geossl's operators: each function returns the peers that can be imported, by name.

A peer takes torch tensors and gives torch tensors: conversions and the building of trees are part of what a user pays. Answers have
the form of geossl's, so that they can be compared.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from geossl.cli.benchmark.plain import table_chamfer
from geossl.ops import _dispatch

Peers = dict[str, Callable[[], Any]]

TABLE_LIMIT = 1 << 26  # distances a peer may hold at once: 256 MiB
TWIN_LIMIT = 1 << 22  # the twins are written to be read: at larger sizes they take minutes


@functools.cache
def importable(name: str) -> Any:
    """Return the module ``name``, or None where it cannot be imported."""
    try:
        return importlib.import_module(name)
    except (ImportError, OSError):  # OSError: a shared library it needs is missing
        return None


def twin(call: Callable[[], Any]) -> Callable[[], Any]:
    """Return ``call`` with geossl's operators in plain torch (:mod:`geossl.ops.reference`)."""

    def run() -> Any:
        with _dispatch.backend("twin"):
            return call()

    return run


def each_cloud(search: Callable[[Tensor, Tensor], tuple[Any, Any]], query: Tensor, points: Tensor) -> tuple[Tensor, Tensor]:
    """Search cloud by cloud; ``search`` gives plain distances and indices as arrays or tensors."""
    found = [search(q, p) for q, p in zip(query, points, strict=True)]
    distance = torch.stack([torch.as_tensor(d, dtype=torch.float32) for d, _ in found]).square_()
    return distance, torch.stack([torch.as_tensor(np.asarray(i).astype(np.int64)) for _, i in found])


# Farthest point sampling ---------------------------------------------------------------------------------------------------------------


def farthest_point_peers(points: Tensor, k: int) -> Peers:
    """Peers of ``farthest_point_sample(points [B, N, 3], k)``: indices ``[B, k]``."""
    batch, n = points.shape[:2]
    peers: Peers = {}

    def each(sample: Callable[[np.ndarray], np.ndarray]) -> Callable[[], Tensor]:
        return lambda: torch.stack([torch.as_tensor(sample(cloud.numpy()).astype(np.int64)) for cloud in points])

    if fpsample := importable("fpsample"):
        peers["fpsample.fps_sampling"] = each(functools.partial(fpsample.fps_sampling, n_samples=k, start_idx=0))
        for height in (3, 5, 7, 9):
            if 2**height <= n // 4:
                bucket = functools.partial(fpsample.bucket_fps_kdline_sampling, n_samples=k, h=height, start_idx=0)
                peers[f"fpsample.bucket_fps_kdline_sampling h={height}"] = each(bucket)
    if torch_cluster := importable("torch_cluster"):
        owner, first = torch.arange(batch).repeat_interleave(n), n * torch.arange(batch)[:, None]
        peers["torch_cluster.fps"] = lambda: (
            torch_cluster.fps(points.reshape(-1, 3), owner, ratio=k / n, random_start=False).view(batch, k) - first
        )
    if pytorch3d := importable("pytorch3d.ops"):
        peers["pytorch3d.sample_farthest_points"] = lambda: pytorch3d.sample_farthest_points(points, K=k)[1]
    if torch_fpsample := importable("torch_fpsample"):
        for height in (3, 5, 7):
            if 2**height <= n // 4:
                title = f"torch_fpsample.sample h={height}"
                peers[title] = functools.partial(lambda h: torch_fpsample.sample(points, k, h=h, start_idx=0)[1], height)
    if learning := importable("open3d.ml.torch"):
        peers["open3d.ml.torch furthest_point_sampling"] = lambda: learning.ops.furthest_point_sampling(points, k).long()
    if open3d := importable("open3d"):
        peers["open3d.geometry farthest_point_down_sample"] = functools.partial(_open3d_samples, open3d, points, k)
    return peers


def _open3d_samples(open3d: Any, points: Tensor, k: int) -> Tensor:
    """Positions ``[B, k, 3]``: this one does not say which rows it picked."""
    found = []
    for cloud in points:
        vectors = open3d.utility.Vector3dVector(cloud.double().numpy())
        found.append(np.asarray(open3d.geometry.PointCloud(vectors).farthest_point_down_sample(k).points))
    return torch.from_numpy(np.stack(found)).float()


# Grouping ------------------------------------------------------------------------------------------------------------------------------


def group_peers(index: Tensor) -> dict[str, Callable[[Tensor], Tensor]]:
    """Peers of ``group(features [B, N, C], index [B, Q, k])`` for indices without -1, as functions of the features."""
    rows = torch.arange(index.shape[0])[:, None, None]

    def gather(features: Tensor) -> Tensor:
        wide = index.flatten(1)[..., None].expand(-1, -1, features.shape[2])
        return features.gather(1, wide).view(*index.shape, features.shape[2])

    peers: dict[str, Callable[[Tensor], Tensor]] = {"torch indexing": lambda features: features[rows, index], "torch.gather": gather}
    if pytorch3d := importable("pytorch3d.ops"):
        peers["pytorch3d.knn_gather"] = lambda features: pytorch3d.knn_gather(features, index)
    return peers


# Chamfer distance ----------------------------------------------------------------------------------------------------------------------


def chamfer_peers(x: Tensor, y: Tensor) -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    """Peers of ``chamfer_distance(x [B, N, 3], y [B, M, 3])``, differentiable functions of both clouds."""
    peers: dict[str, Callable[[Tensor, Tensor], Tensor]] = {}
    pairs = x.shape[0] * x.shape[1] * y.shape[1]
    if 3 * pairs <= TABLE_LIMIT:
        peers["torch table of differences"] = table_chamfer
    if pairs <= TABLE_LIMIT:

        def nearest_of_table(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
            distance = torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")
            return distance.argmin(2), distance.argmin(1)

        def nearest_of_product(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
            square = torch.baddbmm(b.square().sum(-1)[:, None], a, b.mT, alpha=-2).add_(a.square().sum(-1)[..., None])
            return square.argmin(2), square.argmin(1)

        peers["torch.cdist argmin + gather"] = functools.partial(_matched, nearest_of_table)
        peers["torch.baddbmm argmin + gather"] = functools.partial(_matched, nearest_of_product)
    if scipy := importable("scipy.spatial"):
        query = functools.partial(_scipy_nearest, scipy.cKDTree)
        peers["scipy.spatial.cKDTree + gather"] = functools.partial(_matched, functools.partial(_both_nearest, query))
    if pykdtree := importable("pykdtree.kdtree"):
        query = functools.partial(_pykdtree_nearest, pykdtree.KDTree)
        peers["pykdtree.KDTree + gather"] = functools.partial(_matched, functools.partial(_both_nearest, query))
    if torch_cluster := importable("torch_cluster"):
        peers["torch_cluster.knn + gather"] = functools.partial(_matched, functools.partial(_cluster_nearest, torch_cluster))
    if pytorch3d := importable("pytorch3d.loss"):
        peers["pytorch3d.chamfer_distance"] = lambda a, b: pytorch3d.chamfer_distance(a, b)[0]
    return peers


def _scipy_nearest(tree: Any, query: np.ndarray, points: np.ndarray) -> np.ndarray:
    return tree(points).query(query, workers=torch.get_num_threads())[1]


def _pykdtree_nearest(tree: Any, query: np.ndarray, points: np.ndarray) -> np.ndarray:
    return tree(points).query(query)[1].astype(np.int64)


def _cluster_nearest(torch_cluster: Any, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    (batch, n, _), m = x.shape, y.shape[1]
    of_x, of_y = torch.arange(batch).repeat_interleave(n), torch.arange(batch).repeat_interleave(m)
    flat_x, flat_y = x.reshape(-1, 3), y.reshape(-1, 3)
    to_y = torch_cluster.knn(flat_y, flat_x, 1, of_y, of_x)[1].view(batch, n) % m
    return to_y, torch_cluster.knn(flat_x, flat_y, 1, of_x, of_y)[1].view(batch, m) % n


def _both_nearest(nearest: Callable[[np.ndarray, np.ndarray], np.ndarray], x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    pairs = [(a.numpy(), b.numpy()) for a, b in zip(x, y, strict=True)]
    of_x, of_y = np.stack([nearest(a, b) for a, b in pairs]), np.stack([nearest(b, a) for a, b in pairs])
    return torch.from_numpy(of_x), torch.from_numpy(of_y)


def _matched(nearest: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]], x: Tensor, y: Tensor) -> Tensor:
    """Find the nearest points without a gradient, then measure the distances to them with one."""
    with torch.no_grad():
        of_x, of_y = nearest(x, y)
    to_y = x - y.gather(1, of_x[..., None].expand(-1, -1, 3))
    to_x = y - x.gather(1, of_y[..., None].expand(-1, -1, 3))
    return to_y.square().sum(-1).mean() + to_x.square().sum(-1).mean()
