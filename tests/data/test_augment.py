"""Augmentations: what is published, what happens to normals, and what a seed fixes."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from geossl.cli.training import split_batch
from geossl.data import DATASETS, AugmentConfig, PointCloud, collate
from geossl.data.augment import augment, drop_points, jitter, normalize, rotate, rotation_matrix, scale_shift, transform
from geossl.errors import ConfigError, DataError


def plane(rng: np.random.Generator, normal: np.ndarray, count: int = 20) -> PointCloud:
    """Points of the plane through (1, 2, 3) with this unit normal."""
    points = rng.normal(size=(count, 3))
    points -= (points @ normal)[:, None] * normal
    return PointCloud((points + np.array([1.0, 2.0, 3.0])).astype(np.float32), np.tile(normal, (count, 1)).astype(np.float32))


seeds = st.integers(0, 2**32 - 1)


@settings(deadline=None)
@given(seed=seeds)
def test_normals_stay_perpendicular_under_every_linear_map(seed: int) -> None:
    rng = np.random.default_rng(seed)
    normal = rng.normal(size=3)
    cloud = plane(rng, normal / np.linalg.norm(normal))
    stretch = np.diag(rng.uniform(0.3, 3.0, size=3)) @ rotation_matrix("x", rng.uniform(-180, 180))
    out = transform(cloud, stretch, rng.normal(size=3))
    assert out.normal is not None
    assert np.allclose(np.linalg.norm(out.normal, axis=1), 1.0, atol=1e-5)
    assert np.abs((out.coord - out.coord[0]) @ out.normal[0]).max() < 1e-3


def test_a_naive_normal_transform_would_fail_the_test_above(rng: np.random.Generator) -> None:
    normal = np.array([1.0, 1.0, 0.0]) / np.sqrt(2)
    out = transform(plane(rng, normal), np.diag([3.0, 1.0, 1.0]))
    assert out.normal is not None
    assert np.allclose(out.normal[0], np.array([1.0, 3.0, 0.0]) / np.sqrt(10), atol=1e-6)


def test_a_zero_normal_stays_zero() -> None:
    out = transform(PointCloud(np.ones((2, 3), np.float32), np.zeros((2, 3), np.float32)), np.eye(3) * 2)
    assert out.normal is not None
    assert (out.normal == 0).all()


def test_scale_and_shift_are_one_draw_per_axis_in_the_published_range() -> None:
    corners = PointCloud(np.array([[0, 0, 0], [1, 1, 1], [0.5, 0.5, 0.5]], dtype=np.float32))
    draws = [scale_shift(corners, np.random.default_rng(seed)) for seed in range(300)]
    shift = np.stack([out.coord[0] for out in draws])
    scale = np.stack([out.coord[1] - out.coord[0] for out in draws])
    assert all(np.allclose(out.coord[2], (out.coord[0] + out.coord[1]) / 2, atol=1e-6) for out in draws)
    assert -0.2 <= shift.min() < -0.19
    assert 0.19 < shift.max() <= 0.2
    assert 2 / 3 - 1e-6 <= scale.min() < 0.68
    assert 1.48 < scale.max() <= 1.5 + 1e-6
    assert abs(np.corrcoef(scale.T)[0, 1]) < 0.2  # axes are independent
    assert abs(scale.mean() - 13 / 12) < 0.03  # uniform, not log-uniform


def test_normalize_subtracts_the_mean_and_divides_by_the_largest_norm(rng: np.random.Generator) -> None:
    out = normalize(PointCloud((rng.normal(size=(100, 3)) * [1, 5, 2] + 40).astype(np.float32)))
    assert np.abs(out.coord.mean(axis=0)).max() < 1e-5
    assert np.linalg.norm(out.coord, axis=1).max() == pytest.approx(1.0, abs=1e-6)


def test_normalize_refuses_coinciding_points() -> None:
    with pytest.raises(DataError, match=r"chair\.ply: all 5 points coincide"):
        normalize(PointCloud(np.ones((5, 3), np.float32)), "chair.ply")


def test_rotation_is_right_handed_and_keeps_the_axis() -> None:
    assert np.allclose(rotation_matrix("z", 90) @ [1, 0, 0], [0, 1, 0])
    assert np.allclose(rotation_matrix("x", 90) @ [0, 1, 0], [0, 0, 1])
    assert np.allclose(rotation_matrix("y", 90) @ [0, 0, 1], [1, 0, 0])
    cloud = PointCloud(np.array([[1, 2, 3], [4, 5, 6]], np.float32))
    turned = rotate(cloud, np.random.default_rng(0), 180.0, "z")
    assert np.array_equal(turned.coord[:, 2], cloud.coord[:, 2])
    assert not np.allclose(turned.coord, cloud.coord)


def test_jitter_is_clipped() -> None:
    still = PointCloud(np.zeros((2000, 3), np.float32))
    moved = jitter(still, np.random.default_rng(0), std=0.02, clip=0.03).coord
    assert np.abs(moved).max() == pytest.approx(0.03)
    assert moved.std() == pytest.approx(0.017, abs=0.002)


def test_dropout_keeps_rows_together_and_at_least_one(rng: np.random.Generator) -> None:
    coord = rng.normal(size=(50, 3)).astype(np.float32)
    cloud = PointCloud(coord, coord + 1, coord + 2)
    sizes = []
    for seed in range(100):
        out = drop_points(cloud, np.random.default_rng(seed), 0.9)
        assert out.normal is not None
        assert out.color is not None
        assert np.array_equal(out.normal, out.coord + 1)
        assert np.array_equal(out.color, out.coord + 2)
        sizes.append(len(out))
    assert min(sizes) < 15
    assert max(sizes) > 45
    assert len(drop_points(cloud[:1], np.random.default_rng(0), 0.999)) == 1


@settings(deadline=None)
@given(seed=seeds)
def test_equal_generators_give_equal_samples(seed: int) -> None:
    config = AugmentConfig(rotation=180.0, jitter=0.01, dropout=0.3)
    cloud = PointCloud(np.random.default_rng(1).normal(size=(30, 3)).astype(np.float32))
    first, second = (augment(cloud, np.random.default_rng(seed), config) for _ in range(2))
    assert np.array_equal(first.coord, second.coord)


def test_everything_switched_off_changes_nothing(rng: np.random.Generator) -> None:
    cloud = PointCloud(rng.normal(size=(30, 3)).astype(np.float32))
    off = AugmentConfig(scale=(1.0, 1.0), shift=0.0)
    assert augment(cloud, rng, off).coord is cloud.coord


@pytest.mark.parametrize(
    ("values", "message"),
    [({"scale": (2.0, 1.0)}, "scale"), ({"scale": (0.0, 1.0)}, "scale"), ({"shift": -1.0}, "shift"), ({"dropout": 1.0}, "dropout")],
)
def test_settings_out_of_range_are_refused(values: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        AugmentConfig(**values)


def test_positions_before_augmentation_go_along() -> None:
    data = dataclasses.replace(DATASETS.config("objects"), points=200, augment=AugmentConfig(rotation=90, jitter=0.01, dropout=0.5))
    dataset = data.build("test")
    sample = dataset.get(3, np.random.default_rng(1))
    plain = dataclasses.replace(data, augment=AugmentConfig(scale=(1, 1), shift=0)).build("test").get(3, np.random.default_rng(1))
    assert sample.original is not None
    assert len(sample.original) == len(sample.points) < 200
    assert {tuple(row) for row in sample.original.tolist()} <= {tuple(row) for row in plain.points.tolist()}
    still = dataclasses.replace(data, augment=AugmentConfig(scale=(0.5, 0.5), shift=0)).build("test").get(3, np.random.default_rng(1))
    np.testing.assert_allclose(still.points[:, :3], 0.5 * still.original, rtol=1e-6)
    assert dataset.get(3).original is None
    batch = collate([sample, still])
    assert batch.original is not None
    assert batch.original.shape == batch.points.coord.shape
    assert collate([sample, dataset.get(3)]).original is None
    halves = split_batch(batch, 2)
    assert torch.equal(torch.cat([half.original for half in halves]), batch.original)
