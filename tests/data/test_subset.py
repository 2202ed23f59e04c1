from __future__ import annotations

import pickle

import numpy as np
import pytest

from geossl.data import DATASETS, Subset, build_loader, random_subset
from geossl.errors import DataError


@pytest.fixture(scope="module")
def objects():
    return DATASETS.config("objects").build("train")


def test_a_subset_is_a_data_set(objects):
    part = Subset(objects, [5, 2, 9])
    assert len(part) == 3
    assert part.classes == objects.classes
    np.testing.assert_array_equal(part.labels, objects.labels[[5, 2, 9]])
    np.testing.assert_array_equal(part.get(1, None).points, objects.get(2, None).points)
    assert part.get(1, None).index == 2
    assert part.source(0) == objects.source(5)
    assert sorted(next(build_loader(part, 3, seed=0)).index.tolist()) == [2, 5, 9]
    assert len(pickle.loads(pickle.dumps(part))) == 3


def test_random_subsets_are_fixed_and_nested(objects):
    small, large, other = random_subset(objects, 5), random_subset(objects, 20), random_subset(objects, 5, seed=1)
    assert set(small.rows) < set(large.rows)
    np.testing.assert_array_equal(small.rows, random_subset(objects, 5).rows)
    assert set(small.rows) != set(other.rows)
    assert (np.diff(large.rows) > 0).all()


def test_rows_that_do_not_exist_are_refused(objects):
    with pytest.raises(DataError, match=r"rows must lie in 0..\d+, got -1..3"):
        Subset(objects, [3, -1])
    with pytest.raises(DataError, match=r"count must lie in 1..\d+ \(the samples there are\), got 0"):
        random_subset(objects, 0)
    with pytest.raises(IndexError, match=r"row 2 is outside 0..1"):
        Subset(objects, [0, 1]).get(2)
