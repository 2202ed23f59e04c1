"""Simulated particle events as a data set, made on the fly, and as files in the layout of PILArNet-M."""

from __future__ import annotations

import functools
import hashlib
import json
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from geossl.config import require, to_dict
from geossl.data.dataset import DATASETS
from geossl.data.events import SPLITS, Event, EventDataConfig, EventDataset
from geossl.data.files import atomic_write, read_npz
from geossl.data.pilarnet import write_pilarnet
from geossl.data.simulate import lartpc as simulator
from geossl.data.simulate.lartpc import LArTPCOptions, simulate_event
from geossl.data.workers import worker_map
from geossl.errors import DataError

_AT_ONCE = 16  # events a worker makes at a time


@functools.cache
def lartpc_version() -> str:
    """Return a hash of the simulator's source: what the event of a seed depends on."""
    return hashlib.sha256(Path(simulator.__file__).read_bytes()).hexdigest()[:16]


@dataclass(kw_only=True)
class LArTPCConfig(EventDataConfig):
    """Simulated particle events; the same number is always the same event."""

    name: str = "lartpc"
    events: int = 2000
    """Events of the training part."""
    val_events: int = 200
    """Events of the val part and of the test part; both are simulated apart from the training part and from each other."""
    seed: int = 0
    """Another seed gives other events."""
    simulation: LArTPCOptions = field(default_factory=LArTPCOptions)
    """What is in an event."""
    keep: int = 4096
    """Events kept in memory once made, some 25 kB each, in every process that loads data."""
    cache: Path | None = None
    """Folder where events are kept once made; None keeps none on disk."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.events >= 1, "events", "must be at least 1", self.events)
        require(self.val_events >= 1, "val_events", "must be at least 1", self.val_events)
        require(self.seed >= 0, "seed", "must not be negative", self.seed)
        require(self.keep >= 0, "keep", "must not be negative", self.keep)

    def build(self, split: str) -> LArTPCDataset:
        """Make the data set of ``split``: ``train``, ``val`` or ``test``."""
        return LArTPCDataset(self, split)


@DATASETS.register
def lartpc() -> LArTPCConfig:
    """Simulated events of a liquid-argon detector; needs no files."""
    return LArTPCConfig()


class LArTPCDataset(EventDataset):
    """See :class:`LArTPCConfig`."""

    def __init__(self, config: LArTPCConfig, split: str) -> None:
        if split not in SPLITS:
            raise DataError(f"lartpc: unknown split {split!r}; choose one of {', '.join(SPLITS)}")
        self._stream = SPLITS.index(split)
        self._kept: OrderedDict[int, Event] = OrderedDict()
        made_from = {"version": lartpc_version(), "seed": config.seed, "min_points": config.min_points, **to_dict(config.simulation)}
        key = hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()[:16]
        self._folder = None if config.cache is None else config.cache / f"lartpc-{key}" / split
        super().__init__(config, config.events if split == "train" else config.val_events)

    def read(self, row: int) -> Event:
        """Return event ``row``, made now or kept from before."""
        if row in self._kept:
            self._kept.move_to_end(row)
            return self._kept[row]
        config = self.config
        path = None if self._folder is None else self._folder / f"{row:08d}.npz"
        if path is not None and path.exists():
            event = Event(**read_npz(path, ("voxel", "energy", "clusters", "extra")))
        else:
            event = simulate_event(config.seed, row, config.simulation, min_points=config.min_points, stream=self._stream)
            if path is not None:
                atomic_write(path, lambda file: np.savez(file, **vars(event)))
        if config.keep:
            self._kept[row] = event
            while len(self._kept) > config.keep:
                self._kept.popitem(last=False)
        return event

    def source(self, row: int) -> str:
        """Return what an error message calls event ``row``."""
        return f"lartpc event {row} of seed {self.config.seed}"

    def __getstate__(self) -> dict[str, Any]:
        """Events kept in memory do not travel to workers."""
        return {**self.__dict__, "_kept": OrderedDict()}


@dataclass(kw_only=True)
class LArTPCFileOptions:
    """What ``tools/prepare_data.py lartpc`` writes."""

    events: int = 1000
    """Events."""
    seed: int = 0
    """Another seed gives other events."""
    version: int = 1
    """Layout of PILArNet-M: 2 has the particle, mass, momentum and vertex of every cluster."""
    min_points: int = 1024
    """Events of fewer voxels are drawn anew; 0 takes them as they come."""
    simulation: LArTPCOptions = field(default_factory=LArTPCOptions)
    """What is in an event."""
    workers: int = 1
    """Processes that simulate; the file is the same for any number."""

    def __post_init__(self) -> None:
        require(self.events >= 1, "events", "must be at least 1", self.events)
        require(self.seed >= 0, "seed", "must not be negative", self.seed)
        require(self.version in (1, 2), "version", "must be 1 or 2", self.version)
        require(self.min_points >= 0, "min_points", "must not be negative", self.min_points)
        require(self.workers >= 1, "workers", "must be at least 1", self.workers)


def write_lartpc(path: Path, options: LArTPCFileOptions, progress: Callable[[int], None] = lambda done: None) -> int:
    """Simulate events and write them in the layout of PILArNet-M, see :func:`~geossl.data.pilarnet.write_pilarnet`.

    Args:
        path: HDF5 file to write; its index stands beside it.
        options: Which events.
        progress: Called after each event with the number done.

    Returns:
        How many events were written.
    """

    def events() -> Iterator[Event]:
        tasks = [(options, range(first, min(first + _AT_ONCE, options.events))) for first in range(0, options.events, _AT_ONCE)]
        done = 0
        with worker_map(min(options.workers, len(tasks))) as run:
            for made in run(_simulate, tasks):
                for event in made:
                    yield event
                    done += 1
                    progress(done)

    return write_pilarnet(path, events(), options.version)


def _simulate(task: tuple[LArTPCFileOptions, range]) -> list[Event]:
    options, numbers = task
    return [simulate_event(options.seed, number, options.simulation, min_points=options.min_points) for number in numbers]
