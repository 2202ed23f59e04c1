"""Particle events of a liquid-argon detector: what one holds, and the published way from an event to a sample.

An event is a set of voxels with deposited energy, ordered by cluster (the fragments of particles). The first cluster is always that of the
low-energy deposits (LED), which belong to no particle. Data sets of events, all registered in ``DATASETS``: ``pilarnet`` (PILArNet-M's
HDF5 files), ``event_shards`` (those converted to memory-mapped shards), ``lartpc`` (simulated).
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import numpy as np

from geossl.config import require
from geossl.data.sample import Sample
from geossl.errors import DataError

log = logging.getLogger("geossl")

GRID = 768
"""Voxels along each side of the detector."""
VOXEL_MM = 3.0
"""Side of a voxel."""
CLASSES = ("shower", "track", "michel", "delta", "led")
"""Semantic classes, by number; ``led`` is the low-energy deposits."""
LED = CLASSES.index("led")
SPLITS = ("train", "val", "test")
UNCUT_ENERGY = 0.01
"""Energy in MeV that takes the place of the threshold in the normalisation when there is none (published ``emin``)."""

SIZE, FRAGMENT, GROUP, INTERACTION, SEMANTIC, PARTICLE = range(6)
"""Columns of ``Event.clusters``; the last one is there in version 2 only."""


@dataclass(frozen=True)
class Event:
    """One event as stored.

    Args:
        voxel: Voxel indices, ``[N, 3]`` int16 in 0..767, in the order of the clusters.
        energy: Deposited energy, ``[N]`` float32, MeV.
        clusters: ``[C, 5]`` int64 (version 1) or ``[C, 6]`` (version 2): number of points, fragment, group and interaction (-1 for none),
            semantic class 0..4, particle (0 photon, 1 electron, 2 muon, 3 pion, 4 proton, -1 none). The first is the low-energy deposits.
        extra: Version 2: ``[C, 5]`` float32: mass in MeV, momentum in GeV, and the three coordinates of the vertex; None where unknown.
    """

    voxel: np.ndarray
    energy: np.ndarray
    clusters: np.ndarray
    extra: np.ndarray | None = None

    def __len__(self) -> int:
        """Number of voxels."""
        return len(self.energy)


def check_event(event: Event, source: str) -> Event:
    """Return ``event`` if its arrays fit together.

    Raises:
        DataError: cluster sizes do not sum to the points, a class or voxel is out of range, an energy is not finite, or the first cluster
            is not that of the low-energy deposits; the message begins with ``source``.
    """
    clusters = event.clusters
    if not len(clusters):
        raise DataError(f"{source}: has no clusters; the first must be that of the low-energy deposits, even when it is empty")
    total, points = int(clusters[:, SIZE].sum()), len(event)
    if total != points or clusters[:, SIZE].min() < 0:
        raise DataError(
            f"{source}: its {len(clusters)} cluster sizes sum to {total}, but there are {points} points; the file is damaged, or its "
            "clusters have other columns than size, fragment, group, interaction, semantic class (and particle)"
        )
    semantic = clusters[:, SEMANTIC]
    if semantic.min() < 0 or semantic.max() >= len(CLASSES):
        row = int(np.flatnonzero((semantic < 0) | (semantic >= len(CLASSES)))[0])
        raise DataError(f"{source}: cluster {row} has class {semantic[row]}, expected 0..{len(CLASSES) - 1} ({', '.join(CLASSES)})")
    if semantic[0] != LED:
        raise DataError(
            f"{source}: its first cluster has class {semantic[0]} ({CLASSES[semantic[0]]}), expected {LED}: PILArNet-M begins every event "
            "with the low-energy deposits; put them first (a cluster of size 0 if there are none)"
        )
    if points and not (event.voxel.min() >= 0 and event.voxel.max() < GRID):
        row = int(((event.voxel < 0) | (event.voxel >= GRID)).any(1).argmax())
        raise DataError(f"{source}: point {row} lies at voxel {event.voxel[row].tolist()}, outside 0..{GRID - 1}")
    if points and not np.isfinite(event.energy.sum(dtype=np.float64)):
        row = int((~np.isfinite(event.energy)).argmax())
        raise DataError(f"{source}: the energy of point {row} is {event.energy[row]}, which is not finite")
    return event


@dataclass(kw_only=True)
class EventDataConfig:
    """Fields common to all data sets of events; the defaults are the published ones."""

    name: str
    """Registered name of the data set."""
    energy_threshold: float = 0.13
    """Voxels of no more than this energy (MeV) are dropped; it also stands for m in the normalisation. 0 keeps all (m is then 0.01)."""
    max_energy: float = 20.0
    """Energy (MeV) that the normalisation maps to 1; higher ones exceed it."""
    remove_led: bool = True
    """Drop the low-energy deposits, which leaves 4 classes; else they are a fifth."""
    min_points: int = 1024
    """Events of fewer voxels, all of them counted, are left out. A kept event may have fewer once voxels have been dropped."""

    def __post_init__(self) -> None:
        require(self.energy_threshold >= 0, "energy_threshold", "must not be negative", self.energy_threshold)
        least = self.energy_threshold or UNCUT_ENERGY
        require(self.max_energy > least, "max_energy", f"must be more than {least}", self.max_energy)
        require(self.min_points >= 0, "min_points", "must not be negative", self.min_points)

    def describe(self) -> str:
        """Return what a sample is, in words."""
        kept = f"above {self.energy_threshold} MeV" if self.energy_threshold else "all"
        led = "" if self.remove_led else ", low-energy deposits included"
        return f"voxels ({kept}{led}) of an event: voxel index x, y, z and log energy, {self.max_energy} MeV at 1"


def event_sample(event: Event, config: EventDataConfig, row: int = 0, source: str = "event") -> Sample:
    """Return the sample of an event: low-energy deposits dropped, energies cut and normalised, labels for every point.

    With m the threshold and M the largest energy, ``e`` becomes ``2 (log10(e + m) - log10(m)) / (log10(M + m) - log10(m)) - 1``: -0.725 at
    the threshold of 0.13 MeV, 1 at 20 MeV (as PoLAr-MAE was trained).

    Args:
        event: As read.
        config: What is dropped, and the normalisation.
        row: Row of the event in its data set.
        source: What an error message calls the event.

    Returns:
        points ``[n, 4]`` float32 (voxel indices 0..767, then the normalised energy), label -1, point_label ``[n]`` int64 (0..3, with
        the low-energy deposits 0..4; -1 for a cluster of low-energy deposits that is not the first, when those are removed),
        point_instance ``[n]`` int64 (the number of the cluster from 0, -1 for the low-energy deposits).

    Raises:
        DataError: no point is left.
    """
    sizes, semantic = event.clusters[:, SIZE], event.clusters[:, SEMANTIC]
    if config.remove_led:
        semantic = np.where(semantic == LED, -1, semantic)
    start = int(sizes[0]) if config.remove_led else 0
    energy = event.energy[start:]
    kept = np.flatnonzero(energy > np.float32(config.energy_threshold)) if config.energy_threshold else np.arange(len(energy))
    if not len(kept):
        raise NoPointLeftError(
            f"{source}: none of its {len(event)} points is left (energy_threshold={config.energy_threshold}, "
            f"remove_led={config.remove_led}); lower energy_threshold, or leave such events out with a higher min_points"
        )
    points = np.empty((len(kept), 4), dtype=np.float32)
    points[:, :3] = event.voxel[start:][kept]
    least = config.energy_threshold or UNCUT_ENERGY
    span = np.log10(config.max_energy + least) - np.log10(least)
    positive = np.maximum(energy[kept], 0)  # a voxel below zero is as empty as one at zero
    points[:, 3] = 2 * (np.log10(positive + least, dtype=np.float64) - np.log10(least)) / span - 1
    cluster = np.repeat(np.arange(len(sizes)), sizes)[start:][kept]
    return Sample(points, -1, row, semantic[cluster], cluster - 1)


class NoPointLeftError(DataError):
    """An event all of whose voxels are cut."""


class EventDataset:
    """A data set of events. Sub-classes define :meth:`read`; samples follow from the configuration.

    Attributes:
        config: The fields above.
        labels: ``[n]`` int64, all -1: an event has no class, its points have.
        groups: ``[n]`` int64, all -1: no event is another's near-duplicate.
        classes: Names of the classes of points.
        columns: What the columns of a sample are: ``xyz`` three, ``energy`` one.
        channels: Columns of a sample: the ``in_channels`` a backbone needs.
    """

    columns = ("xyz", "energy")
    channels = 4

    def __init__(self, config: EventDataConfig, count: int) -> None:
        self.config: Any = config
        self.labels = np.full(count, -1, dtype=np.int64)
        self.groups = self.labels
        self.classes = list(CLASSES[:LED] if config.remove_led else CLASSES)

    def __len__(self) -> int:
        """Number of events."""
        return len(self.labels)

    def read(self, row: int) -> Event:
        """Return event ``row`` as stored."""
        raise NotImplementedError

    def source(self, row: int) -> str:
        """Return what an error message calls event ``row``."""
        return f"{self.config.name}[{row}]"

    def order(self, rng: np.random.Generator) -> np.ndarray:
        """Return the order ``[n]`` in which an epoch visits the events."""
        return rng.permutation(len(self))

    def get(self, row: int, rng: np.random.Generator | None = None) -> Sample:
        """Return sample ``row``, see :func:`event_sample`; for an event that the cuts leave nothing of, the next one that has points.

        ``min_points`` counts the voxels before the cuts, so such events pass it. One among millions must not end a training.

        Args:
            row: 0 <= row < len(self).
            rng: Not used: nothing about an event is random here; methods draw its rotation.

        Raises:
            DataError: the event is damaged, or no event has points left; the message names its file.
        """
        if not 0 <= row < len(self):
            raise IndexError(f"{self.config.name}: row {row} is outside 0..{len(self) - 1}")
        for at in (*range(row, len(self)), *range(row)):
            try:
                return event_sample(self.read(at), self.config, row, self.source(at))
            except NoPointLeftError as error:
                log.warning("%s; the next event stands in for it", error)
        raise NoPointLeftError(f"{self.config.name}: no event has a point left; lower energy_threshold")
