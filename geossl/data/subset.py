"""Some of the samples of a data set, as a data set of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from geossl.data.sample import Sample
from geossl.errors import DataError


class Subset:
    """The rows ``rows`` of ``dataset``; everything else (classes, columns, configuration) is that of the data set.

    Args:
        dataset: A geossl data set.
        rows: Rows to keep, in the order they are to have; ``sample.index`` stays the row in ``dataset``.

    Raises:
        DataError: a row does not exist.
    """

    def __init__(self, dataset: Any, rows: Sequence[int] | np.ndarray) -> None:
        self.dataset = dataset
        self.rows = np.asarray(rows, dtype=np.int64)
        if len(self.rows) and not 0 <= self.rows.min() <= self.rows.max() < len(dataset):
            raise DataError(f"Subset: rows must lie in 0..{len(dataset) - 1}, got {self.rows.min()}..{self.rows.max()}")

    def __getattr__(self, name: str) -> Any:
        """Return what the data set itself says, that of the kept rows where it says it row by row."""
        if name.startswith("__") or name == "dataset":  # asked for by copy and pickle before there is a data set
            raise AttributeError(name)
        value = getattr(self.dataset, name)
        return value[self.rows] if name in ("labels", "groups") else value

    def __len__(self) -> int:
        """Number of kept rows."""
        return len(self.rows)

    def order(self, rng: np.random.Generator) -> np.ndarray:
        """Return the order ``[n]`` in which an epoch visits the kept rows."""
        return rng.permutation(len(self))

    def get(self, row: int, rng: np.random.Generator | None = None) -> Sample:
        """Return sample ``row`` of the kept ones, as the data set gives it."""
        return self.dataset.get(self._row(row), rng)

    def source(self, row: int) -> str:
        """Return what an error message calls sample ``row`` of the kept ones."""
        return self.dataset.source(self._row(row))

    def _row(self, row: int) -> int:
        if not 0 <= row < len(self):
            raise IndexError(f"Subset: row {row} is outside 0..{len(self) - 1}")
        return int(self.rows[row])


def random_subset(dataset: Any, count: int, seed: int = 0) -> Subset:
    """Choose ``count`` rows at random, always the same ones for the same ``seed`` and data set; smaller choices are part of larger ones.

    Args:
        dataset: A geossl data set.
        count: Rows to choose, ``1 <= count <= len(dataset)``.
        seed: Of the choice.

    Returns:
        The chosen rows in ascending order.

    Raises:
        DataError: there are not that many rows.
    """
    if not 1 <= count <= len(dataset):
        raise DataError(f"random_subset: count must lie in 1..{len(dataset)} (the samples there are), got {count}")
    return Subset(dataset, np.sort(np.random.default_rng(seed).permutation(len(dataset))[:count]))
