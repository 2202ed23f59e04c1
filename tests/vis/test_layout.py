from __future__ import annotations

import numpy as np
import pytest

from geossl.vis.layout import layout_2d, neighbors


def test_neighbors_skip_themselves_and_their_group():
    rng = np.random.default_rng(0)
    base = rng.normal(size=(10, 6))
    values = np.concatenate([base, base + 1e-3])
    alone = np.full(20, -1)
    index, cosine = neighbors(values, alone, 3)
    np.testing.assert_array_equal(index[:10, 0], np.arange(10, 20))
    assert (np.diff(cosine, axis=1) <= 0).all()
    grouped, _ = neighbors(values, np.tile(np.arange(10), 2), 3)
    assert not (grouped % 10 == np.tile(np.arange(10), 2)[:, None]).any()


def test_neighbors_of_too_few_samples_are_padded():
    index, cosine = neighbors(np.eye(3), np.full(3, -1), 5)
    assert (index[:, 2:] == -1).all()
    assert (index[:, :2] >= 0).all()
    assert (cosine[:, 2:] == 0).all()


def test_layout_keeps_clusters_apart_and_repeats():
    rng = np.random.default_rng(0)
    labels = np.arange(60) % 3
    values = rng.normal(size=(60, 8)) + 9 * np.eye(8)[labels]
    maps = layout_2d(values)
    for key in ("tsne", "pca"):
        assert maps[key].shape == (60, 2)
        assert np.abs(maps[key]).max() <= 1
        centers = np.stack([maps[key][labels == k].mean(0) for k in range(3)])
        spread = max(maps[key][labels == k].std() for k in range(3))
        assert np.linalg.norm(centers[0] - centers[1]) > 2 * spread
    np.testing.assert_array_equal(maps["tsne"], layout_2d(values)["tsne"])


@pytest.mark.parametrize("shape", [(1, 4), (3, 4), (6, 1)])
def test_layout_of_tiny_data(shape):
    maps = layout_2d(np.arange(np.prod(shape), dtype=float).reshape(shape))
    assert maps["tsne"].shape == (shape[0], 2)
    assert np.isfinite(maps["tsne"]).all()
