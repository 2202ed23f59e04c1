"""What a batch costs, as a share of the training step it feeds: made in the training process, without workers to hide the cost.

Batches of particle events have a rate to reach instead, 2,000 events a second, and are compared with reading them from the HDF5 file; so
have pairs of images, 25 a second, and mining them, 1,000 frames in five minutes.
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
    MiningOptions,
    PairShardOptions,
    ShardOptions,
    build_loader,
    simulate_event,
    write_event_shards,
    write_lartpc,
    write_pairs,
    write_shards,
)
from geossl.data.image_files import encode_image
from geossl.data.pair_mining import DepthGeometry, mine_pairs
from geossl.geometry import PointBatch, intrinsics_from_fov, look_at, pixel_centers

SHARE = 0.05
"""Largest share of a training step that loading its batch may cost."""
EVENTS_PER_SECOND = 2000
"""Events a core should read in a second."""
EVENT_TARGET = 0.03
"""CPU seconds a simulated event may cost."""
PAIRS_PER_SECOND = 25
"""Pairs of images a core should read and augment in a second."""
MINING_SECONDS = 300
"""CPU seconds within which pairs of 1,000 frames should be chosen."""


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
        "pairs/shards": functools.partial(_pair_batches, folder, quick),
        "pairs/mining": functools.partial(_mining, quick),
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


def _pair_batches(folder: Path, quick: bool) -> Case:
    """Augmented pairs from tars: noise with large patches, which JPEG stores in about as many bytes as photographs."""
    pairs, size, side = (4, 2, 32) if quick else (128, 16, 256)
    source = folder / "pairs_source"
    source.mkdir()
    rng = np.random.default_rng(0)
    for number, view in itertools.product(range(pairs), (1, 2)):
        patches = torch.from_numpy(rng.uniform(0, 200, (1, 3, side // 8, side // 8)))
        image = torch.nn.functional.interpolate(patches, (side, side), mode="bilinear") + torch.from_numpy(rng.uniform(0, 50, (side, side)))
        (source / f"{number:04d}_{view}.jpg").write_bytes(encode_image(image[0].byte(), "jpg"))
    root = folder / "pair_shards"
    write_pairs(source, root, PairShardOptions(size=side))
    config = DATASETS.config("pair_shards")
    config.root, config.resize, config.crop = root, side, side * 7 // 8
    loader = build_loader(config.build("all"), size, seed=0)
    stored = sum(path.stat().st_size for path in root.glob("*.tar")) // pairs // 1000
    return Case(
        inputs=f"{size} pairs of {side} x {side} JPEGs from tars ({stored} kB a pair): decoded, cropped to {config.crop}, colours changed",
        run=lambda: next(loader),
        moved=2 * size * 2 * 3 * 4 * config.crop**2,
        moved_is="images of the batch read and written once",
        flop=0,
        flop_is="none",
        target=None if quick else size / PAIRS_PER_SECOND,
    )


def _mining(quick: bool) -> Case:
    """Frames with exact depth anywhere in a bare room of 6 x 5 m."""
    count, rng = 12 if quick else 1000, np.random.default_rng(0)
    eyes = torch.from_numpy(rng.uniform([1, 1, 1.2], [5, 4, 1.8], (count, 3)))
    yaw = rng.uniform(-np.pi, np.pi, count)
    poses = look_at(eyes, eyes + torch.from_numpy(np.stack([np.cos(yaw), np.sin(yaw), rng.uniform(-0.3, 0.1, count)], 1)))
    k = intrinsics_from_fov(60, 128, 96)
    rays = torch.cat([(pixel_centers(96, 128) - k[:2, 2]) / k[0, 0], torch.ones(96, 128, 1)], -1).double()
    ways = rays @ poses[:, None, :3, :3]
    size, eye = torch.tensor([6.0, 5.0, 2.6], dtype=torch.float64), eyes[:, None, None]
    depth = torch.where(ways > 0, (size - eye) / ways, -eye / ways).amin(-1).float()
    geometry = DepthGeometry(depth, k.expand(count, 3, 3), poses)
    return Case(
        inputs=f"{count:,} frames with depth and pose, all compared with all",
        run=lambda: mine_pairs(geometry, MiningOptions()),
        moved=depth.nbytes,
        moved_is="depth images of 128 x 96 read once",
        flop=0,
        flop_is="none",
        target=None if quick else MINING_SECONDS,
        warm=False,
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
