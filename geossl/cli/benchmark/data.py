"""What a batch costs, as a share of the training step it feeds: made in the training process, without workers to hide the cost.

Batches of particle events have a rate to reach instead, 2,000 events a second, and are compared with reading them from the HDF5 file.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from geossl.cli.benchmark.clouds import surfaces
from geossl.cli.benchmark.measure import Case, clock
from geossl.cli.benchmark.steps import DTYPES, build_step, points_bytes, step_run
from geossl.cli.pretrain import PretrainConfig
from geossl.data import (
    DATASETS,
    EventShardOptions,
    FileOptions,
    LArTPCFileOptions,
    ShardOptions,
    build_loader,
    simulate_event,
    write_event_shards,
    write_lartpc,
    write_shards,
)
from geossl.geometry import PointBatch

SHARE = 0.05
"""Largest share of a training step that loading its batch may cost."""
EVENTS_PER_SECOND = 2000
"""Events a core should read in a second."""
EVENT_TARGET = 0.03
"""CPU seconds a simulated event may cost."""


def cases(method: str, quick: bool, folder: Path) -> dict[str, Callable[[], Case]]:
    """Return the cases of this suite by name; ``folder`` is a place for a shard set, which is gone afterwards."""
    default = PretrainConfig()
    released, quickstart = ((2, 64), (4, 64)) if quick else ((8, 2048), (default.train.batch_size, default.data.points))
    shards = functools.partial(_shards, folder, *((16, 256) if quick else (64, 8192)))
    objects = functools.partial(_objects, default.data.columns)
    make = functools.partial(_case, method, quick)
    return {
        f"objects/{quickstart[0]}x{quickstart[1]}": functools.partial(make, objects, quickstart, "quickstart"),
        f"shards/{released[0]}x{released[1]}": functools.partial(make, shards, released, "released"),
        f"shards/{quickstart[0]}x{quickstart[1]}": functools.partial(make, shards, quickstart, "quickstart"),
        "events/shards": functools.partial(_event_batches, folder, quick),
        "events/simulated": functools.partial(_simulated_events, quick),
    }


def _case(method: str, quick: bool, build: Callable[[int], tuple[Any, str]], size: tuple[int, int], step: str) -> Case:
    clouds, points = size
    dataset, stored = build(points)
    loader = build_loader(dataset, clouds, seed=0)
    columns = points_bytes(next(loader).points)
    seconds = _step_seconds(method, step, quick)
    return Case(
        inputs=f"{clouds} x {points:,} points from {stored}: random subset, normalised and augmented",
        run=lambda: next(loader),
        moved=2 * columns,
        moved_is="columns of the batch read and written once",
        flop=0,
        flop_is="none",
        target=None if quick else SHARE * seconds,
        share_of=seconds,
    )


def _objects(columns: Any, points: int) -> tuple[Any, str]:
    config = DATASETS.config("objects")
    config.columns, config.points = columns, points
    return config.build("train"), f"the embedded objects (in memory, {columns})"


def _shards(folder: Path, clouds: int, stored: int, points: int) -> tuple[Any, str]:
    root = folder / "shards"
    if not root.exists():
        source = folder / "source"
        source.mkdir()
        for row, cloud in enumerate(surfaces(clouds, stored)):
            np.save(source / f"{row:04d}.npy", cloud.numpy())
        write_shards(source, root, FileOptions(points=stored, test_fraction=0.0), ShardOptions(columns="xyz"))
    config = DATASETS.config("shards")
    config.root, config.points = root, points
    return config.build("train"), f"shards of {stored:,} points per cloud (mapped)"


def _event_batches(folder: Path, quick: bool) -> Case:
    events, size = (8, 4) if quick else (512, 32)
    file, root = folder / "events.h5", folder / "event_shards"
    write_lartpc(file, LArTPCFileOptions(events=events))
    write_event_shards(file, root, EventShardOptions(events_per_shard=max(4, events // 8)))
    loaders = []
    for name, place in (("event_shards", root), ("pilarnet", file)):
        config = DATASETS.config(name)
        config.root = place
        loaders.append(build_loader(config.build("train"), size, seed=0))
    shards, hdf5 = loaders
    mean = sum(points_bytes(batch.points) for batch in shards.one_pass()) // (events // size)
    return Case(
        inputs=f"{size} events of {mean // 16 // size:,} voxels on average, from event shards (mapped), shuffled",
        run=lambda: next(shards),
        moved=2 * mean,
        moved_is="columns of the batch read and written once",
        flop=0,
        flop_is="none",
        peers={"PILArNet-M HDF5": lambda: next(hdf5)},
        differs=_other_events,
        target=None if quick else size / EVENTS_PER_SECOND,
    )


def _other_events(ours: PointBatch, theirs: PointBatch) -> str:
    a, b = ours.points, theirs.points
    same = torch.equal(a.coord, b.coord) and a.feats is not None and b.feats is not None and torch.equal(a.feats, b.feats)
    return "" if same else "other events"


def _simulated_events(quick: bool) -> Case:
    numbers = itertools.count()
    event = simulate_event(0, 0)
    return Case(
        inputs="one simulated event with at least 1,024 voxels",
        run=lambda: simulate_event(0, next(numbers)),
        moved=sum(array.nbytes for array in (event.voxel, event.energy, event.clusters)),
        moved_is="columns of one event written once",
        flop=0,
        flop_is="none",
        target=None if quick else EVENT_TARGET,
    )


@functools.cache
def _step_seconds(method: str, size: str, quick: bool) -> float:
    """CPU seconds of the training step, in the quicker data type: the best of three."""
    seconds = []
    for dtype in DTYPES:
        run = step_run(build_step(method, size, quick), dtype)
        run()
        seconds += [clock(run, 1).cpu for _ in range(3)]
    torch.manual_seed(0)
    return min(seconds)
