"""Two-dimensional maps of embeddings, and their nearest neighbours."""

from __future__ import annotations

import numpy as np


def standardised(features: np.ndarray) -> np.ndarray:
    """Scale every column of ``features [n, D]`` to mean 0 and deviation 1 (constant columns become 0)."""
    values = features.astype(np.float64)
    return (values - values.mean(0)) / np.maximum(values.std(0), 1e-9)


def layout_2d(features: np.ndarray) -> dict[str, np.ndarray]:
    """Lay ``features [n, D]`` out in the plane, deterministically.

    Returns:
        "pca" and "tsne", each ``[n, 2]`` in [-1, 1] (t-SNE of the leading 50 principal components; the PCA map itself for fewer than
        five samples).
    """
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    values = standardised(features)
    if len(values) < 2:
        return {"pca": np.zeros((len(values), 2)), "tsne": np.zeros((len(values), 2))}
    rank = min(50, *values.shape)
    reduced = PCA(rank, random_state=0).fit_transform(values)
    flat = np.pad(reduced[:, :2], ((0, 0), (0, max(0, 2 - rank))))
    if len(values) < 5:
        return {"pca": _fit_square(flat), "tsne": _fit_square(flat)}
    perplexity = min(30.0, (len(values) - 1) / 3)
    tsne = TSNE(2, perplexity=perplexity, init="pca" if rank > 1 else "random", random_state=0).fit_transform(reduced)
    return {"pca": _fit_square(flat), "tsne": _fit_square(tsne)}


def neighbors(features: np.ndarray, groups: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Find the ``k`` nearest samples of each sample by cosine of standardised features, none of its own near-duplicate group.

    Args:
        features: ``[n, D]``.
        groups: ``[n]``; a negative number stands for a sample without duplicates.
        k: Neighbours per sample.

    Returns:
        Indices ``[n, k]`` int64, nearest first, -1 where there are too few others; and cosines ``[n, k]``.
    """
    values = standardised(features)
    values /= np.maximum(np.linalg.norm(values, axis=1, keepdims=True), 1e-12)
    cosine = values @ values.T
    same = (groups[:, None] == groups) & (groups[:, None] >= 0)
    cosine[same | np.eye(len(values), dtype=bool)] = -np.inf
    order = np.argsort(-cosine, axis=1, kind="stable")[:, :k]
    order = np.pad(order, ((0, 0), (0, k - order.shape[1])))
    best = np.take_along_axis(cosine, order, 1)
    best[:, len(values) :] = -np.inf
    return np.where(np.isfinite(best), order, -1), np.where(np.isfinite(best), best, 0.0)


def _fit_square(points: np.ndarray) -> np.ndarray:
    """Centre and scale to [-1, 1] on each axis; the outermost half percent is pulled to the edge."""
    low, high = np.quantile(points, 0.005, axis=0), np.quantile(points, 0.995, axis=0)
    return np.clip((points - (low + high) / 2) / np.maximum((high - low) / 2, 1e-9), -1, 1)
