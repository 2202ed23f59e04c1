"""Several data sets as one, each some times over: the mixtures that stereo, flow and cross-view completion are published with."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from geossl.config import registry_fields, require
from geossl.data.dataset import DATASETS
from geossl.errors import DataError


@dataclass(kw_only=True)
class MixtureConfig:
    """Data sets whose samples are alike, and for training in batches of one size. Truth of pixels and points is used, classes are not.

    In YAML: ``data: {name: mixture, parts: [{name: stereo, layout: eth3d, root: data/eth3d}, ...], times: [30, ...]}``. Flags cannot
    reach into the parts.
    """

    name: str = "mixture"
    """The data set: ``mixture``."""
    parts: tuple[Any, ...] = registry_fields(DATASETS)
    """The data sets, each with its own keys."""
    times: tuple[int, ...] = ()
    """How often an epoch visits every sample of each part, each time with other random windows and colours; none: once. The test part has
    each sample once."""

    def __post_init__(self) -> None:
        require(all(count >= 1 for count in self.times), "times", "must be at least 1", self.times)
        require(len(self.times) in (0, len(self.parts)), "times", f"must have a number for each of the {len(self.parts)} parts", self.times)
        crops = [crop if isinstance(crop, tuple) else (crop, crop) for crop in (part.crop for part in self.parts if hasattr(part, "crop"))]
        require(len(set(crops)) <= 1, "parts", "must give images of one size, so have the same crop", crops)

    def describe(self) -> str:
        """Return what a sample is, in words."""
        return "one of: " + "; ".join(part.describe() for part in self.parts)

    def build(self, split: str = "train") -> Mixture:
        """Make the data set of ``split``, from the same split of every part.

        Raises:
            DataError: there are no parts, or a part does not fit the others.
        """
        times = self.times if self.times and split != "test" else (1,) * len(self.parts)
        return Mixture(self, [part.build(split) for part in self.parts], times)


@DATASETS.register
def mixture() -> MixtureConfig:
    """Several data sets as one, each some times over."""
    return MixtureConfig()


class Mixture:
    """See :class:`MixtureConfig`. The rows of each part follow one another, as often as it is repeated.

    Args:
        config: The fields above.
        parts: The data sets.
        times: How often each is repeated.

    Attributes:
        labels: ``[n]`` int64, all -1: classes of different data sets do not have the same numbers.

    Raises:
        DataError: there are no parts, or their columns differ.
    """

    def __init__(self, config: MixtureConfig, parts: list[Any], times: tuple[int, ...]) -> None:
        if not parts:
            raise DataError("mixture: data.parts names no data sets; list them in a configuration file: parts: [{name: stereo, ...}, ...]")
        for number, part in enumerate(parts):
            if part.columns != parts[0].columns:
                name, first = part.config.name, parts[0].config.name
                raise DataError(f"mixture: parts[{number}], {name}, gives {part.columns}, but parts[0], {first}, gives {parts[0].columns}")
        self.config, self.parts = config, parts
        self.columns, self.channels = parts[0].columns, parts[0].channels
        self._part = np.repeat(np.arange(len(parts)), [len(part) * count for part, count in zip(parts, times, strict=True)])
        self._row = np.concatenate([np.tile(np.arange(len(part)), count) for part, count in zip(parts, times, strict=True)])
        self.labels = self.groups = np.full(len(self._row), -1)
        self.classes: list[str] = []

    def __len__(self) -> int:
        """Number of samples, repeated ones included."""
        return len(self._part)

    def order(self, rng: np.random.Generator) -> np.ndarray:
        """Return the order ``[n]`` in which an epoch visits the rows."""
        return rng.permutation(len(self))

    def get(self, row: int, rng: np.random.Generator | None = None) -> Any:
        """Return sample ``row`` as its part gives it, with ``index`` the row here."""
        part, inner = self._place(row)
        return replace(part.get(inner, rng), index=row)

    def source(self, row: int) -> str:
        """Return what an error message calls sample ``row``."""
        part, inner = self._place(row)
        return part.source(inner)

    def _place(self, row: int) -> tuple[Any, int]:
        if not 0 <= row < len(self):
            raise IndexError(f"mixture: row {row} is outside 0..{len(self) - 1}")
        return self.parts[self._part[row]], int(self._row[row])
