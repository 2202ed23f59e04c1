from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from geossl.data import group_resplit
from geossl.errors import DataError


@settings(max_examples=40, deadline=None)
@given(
    labels=st.lists(st.integers(0, 4), min_size=4, max_size=60),
    group_of=st.integers(1, 30),
    seed=st.integers(0, 2**31),
    fraction=st.sampled_from([0.2, 0.3, 0.5]),
)
def test_groups_never_straddle(labels, group_of, seed, fraction):
    labels = np.array(labels)
    groups = np.random.default_rng(seed).integers(-1, group_of, len(labels))
    test = group_resplit(labels, groups, test_fraction=fraction, seed=seed)
    named = groups >= 0
    assert not set(groups[named & test]) & set(groups[named & ~test])


def test_proportions_and_seeds():
    labels = np.repeat(np.arange(5), 40)
    groups = np.arange(200) // 2
    splits = [group_resplit(labels, groups, test_fraction=0.3, seed=seed) for seed in range(5)]
    for test in splits:
        assert np.bincount(labels[test]).tolist() == [12] * 5
    assert all((splits[0] != other).any() for other in splits[1:])
    np.testing.assert_array_equal(splits[3], group_resplit(labels, groups, test_fraction=0.3, seed=3))


def test_a_huge_group_stays_in_training():
    labels = np.zeros(20, int)
    groups = np.array([7] * 15 + list(range(100, 105)))
    for seed in range(10):
        test = group_resplit(labels, groups, test_fraction=0.3, seed=seed)
        assert not test[:15].any()
        assert test[15:].any()


def test_negative_groups_stand_alone():
    labels = np.repeat([0, 1], 10)
    test = group_resplit(labels, np.full(20, -1), test_fraction=0.3, seed=0)
    assert np.bincount(labels[test]).tolist() == [3, 3]


def test_every_class_is_on_both_sides():
    labels = np.array([0, 0, 1, 1, 2])
    test = group_resplit(labels, np.arange(5), test_fraction=0.3, seed=1)
    assert set(labels[test]) == {0, 1}
    assert set(labels[~test]) == {0, 1, 2}


@pytest.mark.parametrize(
    ("labels", "groups", "fraction", "message"),
    [
        ([0, -1], [0, 1], 0.3, "leave unlabelled samples"),
        ([0, 1], [0, 1, 2], 0.3, r"\[2\] and \[3\]"),
        ([0, 1], [0, 1], 1.0, r"test_fraction must lie in \(0, 1\), got 1.0"),
    ],
)
def test_bad_arguments(labels, groups, fraction, message):
    with pytest.raises((DataError, ValueError), match=message):
        group_resplit(np.array(labels), np.array(groups), test_fraction=fraction)
