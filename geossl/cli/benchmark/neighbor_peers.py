"""Peers of the neighbour searches; :mod:`geossl.cli.benchmark.peers` says what a peer is.

An answer is a tuple of squared distances ``[B, Q, k]`` and indices; where a peer answers a looser question, indices alone or
:class:`Counts`. What has to be worked out only to compare answers is worked out by :func:`balls_differ`, outside the time of the peer.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from geossl.cli.benchmark.peers import TABLE_LIMIT, Peers, each_cloud, importable

ON_SPHERE = 2  # neighbours of a query that rounding may put inside the ball or outside


class Counts(NamedTuple):
    """How many neighbours each query got from a search that does not rank them: ``found [B, Q]``."""

    found: Tensor
    limit: int | None
    """The most it gives; None: all within the radius."""


def neighbor_peers(query: Tensor, points: Tensor, k: int, radius: float | None = None) -> Peers:
    """Peers of ``knn`` and, with a radius, of ``ball_query(mode="nearest")``."""
    limit = {} if radius is None else {"distance_upper_bound": radius}
    peers: Peers = {}
    if scipy := importable("scipy.spatial"):

        def tree(q: Tensor, p: Tensor) -> tuple[Any, Any]:
            return scipy.cKDTree(p.numpy()).query(q.numpy(), k, workers=torch.get_num_threads(), **limit)

        peers["scipy.spatial.cKDTree"] = functools.partial(each_cloud, tree, query, points)
    if pykdtree := importable("pykdtree.kdtree"):

        def kdtree(q: Tensor, p: Tensor) -> tuple[Any, Any]:
            return pykdtree.KDTree(p.numpy()).query(q.numpy(), k=k, **limit)

        peers["pykdtree.KDTree"] = functools.partial(each_cloud, kdtree, query, points)
    if open3d := importable("open3d"):
        peers["open3d.core.nns"] = functools.partial(each_cloud, functools.partial(_open3d_search, open3d.core, k, radius), query, points)
    if radius is None:
        return peers | _tree_peers(query, points, k) | _table_peers(query, points, k)
    return peers | _radius_peers(query, points, k, radius)


def _open3d_search(core: Any, k: int, radius: float | None, query: Tensor, points: Tensor) -> tuple[Any, Any]:
    search = core.nns.NearestNeighborSearch(core.Tensor.from_numpy(points.numpy()), core.int32)
    wanted = core.Tensor.from_numpy(query.numpy())
    if radius is None:
        search.knn_index()
        index, square = search.knn_search(wanted, k)
        return np.sqrt(square.numpy()), index.numpy()
    search.hybrid_index(radius)
    index, square, _ = search.hybrid_search(wanted, radius, k)
    rows = index.numpy()
    return np.where(rows < 0, np.inf, np.sqrt(square.numpy())), rows


def _tree_peers(query: Tensor, points: Tensor, k: int) -> Peers:
    peers: Peers = {}
    if pynanoflann := importable("pynanoflann"):

        def nanoflann(q: Tensor, p: Tensor) -> tuple[Any, Any]:
            tree = pynanoflann.KDTree(n_neighbors=k, leaf_size=16, metric="L2")
            tree.fit(p.numpy())
            return tree.kneighbors(q.numpy(), n_jobs=torch.get_num_threads())

        peers["pynanoflann.KDTree"] = functools.partial(each_cloud, nanoflann, query, points)
    if small_gicp := importable("small_gicp"):

        def gicp(q: Tensor, p: Tensor) -> tuple[Any, Any]:
            threads = torch.get_num_threads()
            index, square = small_gicp.KdTree(p.double().numpy(), num_threads=threads).batch_knn_search(
                q.double().numpy(), k, num_threads=threads
            )
            return np.sqrt(square), index

        peers["small_gicp.KdTree"] = functools.partial(each_cloud, gicp, query, points)
    if open3d := importable("open3d.ml.torch"):

        def learned(q: Tensor, p: Tensor) -> tuple[Any, Any]:
            splits = (torch.tensor([0, len(p)]), torch.tensor([0, len(q)]))
            found = open3d.ops.knn_search(p, q, k, *splits, metric="L2", return_distances=True)
            return found.neighbors_distance.view(-1, k).sqrt(), found.neighbors_index.view(-1, k)

        peers["open3d.ml.torch knn_search"] = functools.partial(each_cloud, learned, query, points)
    return peers


def _table_peers(query: Tensor, points: Tensor, k: int) -> Peers:
    """Peers that compare every query with every point."""
    batch, n = points.shape[:2]
    peers: Peers = {}
    if torch_cluster := importable("torch_cluster"):
        rows, of_point, of_query = query.reshape(-1, 3), *(torch.arange(batch).repeat_interleave(x.shape[1]) for x in (points, query))

        def cluster() -> tuple[Tensor, Tensor]:
            found = torch_cluster.knn(points.reshape(-1, 3), rows, k, of_point, of_query)[1]
            square = (rows[:, None] - points.reshape(-1, 3)[found.view(-1, k)]).square().sum(-1)
            return square.view(batch, -1, k), (found % n).view(batch, -1, k)

        peers["torch_cluster.knn"] = cluster
    if pytorch3d := importable("pytorch3d.ops"):
        peers["pytorch3d.knn_points"] = lambda: pytorch3d.knn_points(query, points, K=k)[:2]
    if query.shape[0] * query.shape[1] * n > TABLE_LIMIT:
        return peers

    def table() -> tuple[Tensor, Tensor]:
        distance, index = torch.cdist(query, points, compute_mode="donot_use_mm_for_euclid_dist").topk(k, largest=False)
        return distance.square_(), index

    peers["torch.cdist + topk"] = table
    if faiss := importable("faiss"):

        def flat(q: Tensor, p: Tensor) -> tuple[Any, Any]:
            index = faiss.IndexFlatL2(3)
            index.add(p.numpy())
            square, found = index.search(q.numpy(), k)
            return np.sqrt(np.maximum(square, 0)), found

        peers["faiss.IndexFlatL2"] = functools.partial(each_cloud, flat, query, points)
    return peers


def _radius_peers(query: Tensor, points: Tensor, k: int, radius: float) -> Peers:
    """Peers that give other neighbours within the radius than the nearest: the first by index, or all of them."""
    peers: Peers = {}
    if open3d := importable("open3d.ml.torch"):

        def every() -> Counts:
            found = [_open3d_ball_splits(open3d, q, p, radius) for q, p in zip(query, points, strict=True)]
            return Counts(torch.stack(found).diff(), None)

        peers["open3d.ml.torch fixed_radius_search (all in the ball)"] = every
    if torch_cluster := importable("torch_cluster"):
        flat, rows = points.reshape(-1, 3), query.reshape(-1, 3)
        of_point, of_query = (torch.arange(len(x)).repeat_interleave(x.shape[1]) for x in (points, query))

        def cluster() -> Counts:
            found = torch_cluster.radius(flat, rows, radius, of_point, of_query, max_num_neighbors=k)[0]
            return Counts(torch.bincount(found, minlength=len(rows)).view(query.shape[:2]), k)

        peers["torch_cluster.radius (any in the ball)"] = cluster
    return peers | {f"{name} (first in the ball)": run for name, run in _first_peers(query, points, k, radius).items()}


def _open3d_ball_splits(open3d: Any, query: Tensor, points: Tensor, radius: float) -> Tensor:
    """Row splits ``[Q + 1]`` of all points within the radius."""
    splits = (torch.tensor([0, len(points)]), torch.tensor([0, len(query)]))
    table = open3d.ops.build_spatial_hash_table(points, radius, splits[0], hash_table_size_factor=1 / 32)
    hashed = (table.hash_table_splits, table.hash_table_index, table.hash_table_cell_splits)
    return open3d.ops.fixed_radius_search(points, query, radius, *splits, *hashed).neighbors_row_splits


def radius_peers(query: Tensor, points: Tensor, radius: float) -> Peers:
    """Peers of ``radius_search(query [Q, 3], points [N, 3], radius)``; they find the pairs, and the row splits ``[Q + 1]`` are compared."""
    peers: Peers = {}
    if scipy := importable("scipy.spatial"):

        def tree() -> Tensor:
            found = scipy.cKDTree(points.numpy()).query_ball_point(query.numpy(), radius, workers=torch.get_num_threads())
            lengths = np.fromiter(map(len, found), np.int64, len(found))
            np.concatenate(found)  # the pairs a caller wants; the comparison does without
            return torch.from_numpy(np.concatenate([[0], lengths.cumsum()]))

        peers["scipy.spatial.cKDTree query_ball_point"] = tree
    if open3d := importable("open3d.ml.torch"):
        peers["open3d.ml.torch fixed_radius_search"] = functools.partial(_open3d_ball_splits, open3d, query, points, radius)
    if package := importable("open3d"):
        core = package.core

        def fixed() -> Tensor:
            search = core.nns.NearestNeighborSearch(core.Tensor.from_numpy(points.numpy()), core.int32)
            search.fixed_radius_index(radius)
            return torch.from_numpy(search.fixed_radius_search(core.Tensor.from_numpy(query.numpy()), radius)[2].numpy())

        peers["open3d.core.nns fixed_radius_search"] = fixed
    return peers


def _first_peers(query: Tensor, points: Tensor, k: int, radius: float) -> Peers:
    """Indices ``[B, Q, k]`` of the first ``k`` points in each ball."""
    peers: Peers = {}
    if pytorch3d := importable("pytorch3d.ops"):
        peers["pytorch3d.ball_query"] = lambda: pytorch3d.ball_query(query, points, K=k, radius=radius, return_nn=False).idx
    if open3d := importable("open3d.ml.torch"):
        peers["open3d.ml.torch ball_query"] = lambda: open3d.ops.ball_query(points, query, radius, k).long()
    return peers


def first_in_ball_peers(query: Tensor, points: Tensor, k: int, radius: float) -> Peers:
    """Peers of ``ball_query(mode="first")``; they give indices alone, ``[B, Q, k]``."""
    return _first_peers(query, points, k, radius)


# Agreement -----------------------------------------------------------------------------------------------------------------------------


def distances_differ(ours: Any, theirs: Any, radius: float = math.inf) -> str:
    """Compare distances of the neighbours found; indices may differ where distances are equal, and what lies on the sphere may be out."""
    a, b = (found[0].sqrt().clamp(max=radius * (1 - 1e-5)) for found in (ours, theirs))
    if a.shape != b.shape:
        return f"distances of shape {list(b.shape)} instead of {list(a.shape)}"
    wrong = ~torch.isclose(a, b, rtol=1e-4, atol=1e-5)
    return f"{int(wrong.sum())} of {wrong.numel()} distances differ" if bool(wrong.any()) else ""


def balls_differ(query: Tensor, points: Tensor, radius: float, mode: str, ours: Any, theirs: Any) -> str:
    """Compare the balls of ours, ``(distance, index, count)``, with those of a peer, whichever form its answer has."""
    if isinstance(theirs, Tensor):
        index = without_repeats(theirs)
        square = (points[torch.arange(len(points))[:, None, None], index.clamp(min=0)] - query[:, :, None]).square().sum(-1)
        if mode == "first":
            return distances_differ(ours, (torch.where(index < 0, torch.inf, square), index), radius)
        outside = int(((square.sqrt() > radius * (1 + 1e-5)) & (index >= 0)).sum())
        if outside:
            return f"{outside} neighbours outside the radius"
        theirs = Counts((index >= 0).sum(-1), index.shape[-1])
    if not isinstance(theirs, Counts):
        return distances_differ(ours, theirs, radius)
    wanted = ours[2] if theirs.limit is None else ours[2].clamp(max=theirs.limit)
    away = int(((theirs.found - wanted).abs() > ON_SPHERE).sum())
    return f"other numbers of neighbours for {away} of {wanted.numel()} queries" if away > wanted.numel() // 1000 else ""


def without_repeats(index: Tensor) -> Tensor:
    """Put -1 into empty places of ``[B, Q, k]`` that hold, as in PointNet++, the first neighbour again."""
    again = torch.zeros_like(index, dtype=torch.bool)
    again[..., 1:] = index[..., 1:] == index[..., :1]
    return index.masked_fill(again, -1)
