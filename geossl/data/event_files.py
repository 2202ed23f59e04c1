"""Particle events out of single files, for using a trained model: PILArNet-M's HDF5, or one event as ``.npz``."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from geossl.data.events import CLASSES, LED, Event, EventDataConfig, EventDataset, check_event, event_sample
from geossl.data.files import read_npz
from geossl.data.pilarnet import PILArNetConfig
from geossl.data.sample import Sample
from geossl.errors import DataError

EVENT_SUFFIXES = (".h5", ".hdf5", ".npz")
_ENERGIES = ("energy", "energy_mev")
_CLASSES = ("semantic", "motif")


def read_events(path: Path, config: EventDataConfig | None = None) -> Iterator[tuple[str, Sample]]:
    """Yield every event of a file or folder with its name, as a model sees it.

    Args:
        path: An HDF5 file of PILArNet-M, or a folder of them; or an npz file with one event: ``voxel [N, 3]``, its energy in MeV as
            ``energy`` or ``energy_mev`` ``[N]``, and where known the class of each point as ``semantic`` or ``motif`` ``[N]``.
        config: Cuts and normalisation; None takes the published ones, and events of any size.

    Yields:
        A name, and the sample: points ``[n, 4]`` (voxel indices, normalised log energy).

    Raises:
        DataError: the file is damaged or of another kind, or no point of an event passes the cuts.
    """
    config = EventDataConfig(name="events", min_points=0) if config is None else config
    if path.suffix == ".npz":
        yield path.name, event_sample(read_event_npz(path), config, source=str(path))
        return
    if path.is_file() and path.suffix not in EVENT_SUFFIXES:
        raise DataError(f"{path}: events are read from {', '.join(EVENT_SUFFIXES)}")
    cuts = {key: getattr(config, key) for key in ("energy_threshold", "max_energy", "remove_led", "min_points")}
    files = {"files": (path,)} if path.is_file() else {"root": path}
    dataset: EventDataset = PILArNetConfig(**files, **cuts).build("all")
    for row in range(len(dataset)):
        yield dataset.source(row), event_sample(dataset.read(row), config, row, dataset.source(row))


def read_event_npz(path: Path) -> Event:
    """Read one event from an npz file, see :func:`read_events`; without classes, no point counts as low-energy deposit."""
    arrays = read_npz(path)
    energy = next((arrays[name] for name in _ENERGIES if name in arrays), None)
    voxel = arrays.get("voxel")
    if voxel is None or energy is None:
        raise DataError(f"{path}: an event needs the arrays voxel and {' or '.join(_ENERGIES)}; it holds {', '.join(arrays) or 'none'}")
    semantic = next((arrays[name] for name in _CLASSES if name in arrays), np.zeros(len(voxel), np.int64)).astype(np.int64)
    if voxel.ndim != 2 or voxel.shape[1] != 3 or energy.shape != (len(voxel),) or semantic.shape != (len(voxel),):
        raise DataError(
            f"{path}: voxel must be [N, 3] with an energy (and class) for each, got {voxel.shape}, {energy.shape} and {semantic.shape}"
        )
    if len(semantic) and not 0 <= semantic.min() <= semantic.max() < len(CLASSES):
        raise DataError(f"{path}: classes must lie in 0..{len(CLASSES) - 1} ({', '.join(CLASSES)}), got {semantic.min()}..{semantic.max()}")
    if voxel.size and not np.array_equal(voxel, np.round(voxel)):
        raise DataError(
            f"{path}: voxel must hold whole numbers (the cells of the detector), got {voxel[(voxel != np.round(voxel)).any(1)][0]}"
        )
    deposits = np.flatnonzero(semantic == LED)
    order = np.concatenate([deposits, np.flatnonzero(semantic != LED)])
    # As stored: one cluster of low-energy deposits, then one for each run of equal classes.
    rest = semantic[order[len(deposits) :]]
    starts = np.flatnonzero(np.diff(rest, prepend=-1))
    sizes = np.diff(np.append(starts, len(rest)))
    clusters = np.full((1 + len(starts), 5), -1, dtype=np.int64)
    clusters[0, 0], clusters[0, 4] = len(deposits), LED
    clusters[1:, 0], clusters[1:, 4] = sizes, rest[starts]
    return check_event(Event(voxel[order].astype(np.int16), energy[order].astype(np.float32), clusters), str(path))
