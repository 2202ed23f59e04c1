"""A hand-made shape descriptor: the baseline that a learned feature must beat to be worth its training."""

from __future__ import annotations

import numpy as np

DESCRIPTOR_SIZE = 71

_PAIR_POINTS = 256


def shape_descriptor(points: np.ndarray) -> np.ndarray:
    """Describe a cloud by histograms of distances and a few moments (Osada et al., "Shape Distributions", TOG 2002, and moments).

    The cloud is centred on its bounding box and divided by its largest norm first, so neither place nor size counts; z is up.
    The 71 numbers: D2 histogram (32 bins, distances between all pairs of the first 256 points), height (16), distance from the
    centre (16), deviations along the principal axes (3), extents of the bounding box (3), mean distance from the vertical axis (1).
    Histograms are square roots of fractions (Hellinger), so that Euclidean distance compares them well.

    Args:
        points: ``[N, 3 + C]``, N >= 1; further columns are not looked at. The first points should be an even subsample.

    Returns:
        ``[71]`` float32.
    """
    cloud = np.asarray(points, np.float64)[:, :3]
    cloud = cloud - (cloud.max(0) + cloud.min(0)) / 2
    radius = np.linalg.norm(cloud, axis=1)
    scale = max(float(radius.max()), 1e-9)
    cloud, radius = cloud / scale, radius / scale
    few = cloud[:_PAIR_POINTS]
    squared = (few**2).sum(1)
    distance = np.sqrt(np.maximum(squared[:, None] + squared - 2 * few @ few.T, 0))[np.triu_indices(len(few), 1)]
    spread = np.sqrt(np.maximum(np.linalg.eigvalsh(np.cov(cloud.T, bias=True)), 0))[::-1]
    moments = [*spread, *np.ptp(cloud, axis=0), np.hypot(cloud[:, 0], cloud[:, 1]).mean()]
    parts = [_histogram(distance, 32, 0, 2), _histogram(cloud[:, 2], 16, -1, 1), _histogram(radius, 16, 0, 1), np.array(moments)]
    return np.concatenate(parts).astype(np.float32)


def _histogram(values: np.ndarray, bins: int, low: float, high: float) -> np.ndarray:
    counts, _ = np.histogram(np.clip(values, low, high), bins, (low, high))
    return np.sqrt(counts / max(len(values), 1))
