"""Events in memory-mapped shards: what is stored, how a conversion is continued, and reading them as a stream."""

from __future__ import annotations

import json
import os
import pickle
import resource
import subprocess
import sys
import tracemalloc
from itertools import islice
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch

from geossl.data import (
    DATASETS,
    Event,
    EventShardOptions,
    EventShardsConfig,
    LArTPCOptions,
    PILArNetConfig,
    PILArNetFile,
    ShardsConfig,
    build_loader,
    check_shards,
    simulate_event,
    write_event_shards,
    write_pilarnet,
)
from geossl.data.shard_store import read_index
from geossl.errors import ConfigError, DataError

SMALL = LArTPCOptions(vertices=(1, 1), primaries=(2, 2))


@pytest.fixture(scope="module")
def events() -> list[Event]:
    return [simulate_event(0, number, SMALL, min_points=0) for number in range(37)]


@pytest.fixture
def source(events: list[Event], tmp_path: Path) -> Path:
    """Two files of training events, one held out."""
    write_pilarnet(tmp_path / "source" / "train" / "a.h5", events[:20])
    write_pilarnet(tmp_path / "source" / "train" / "b.h5", events[20:30])
    write_pilarnet(tmp_path / "source" / "val" / "c.h5", events[30:])
    return tmp_path / "source"


@pytest.fixture
def shard_set(source: Path, tmp_path: Path) -> Path:
    write_event_shards(source, tmp_path / "shards", EventShardOptions(events_per_shard=4))
    return tmp_path / "shards"


def build(root: Path, split: str = "train", **options: Any) -> Any:
    return EventShardsConfig(root=root, **{"min_points": 0, **options}).build(split)


@pytest.mark.parametrize("version", [1, 2])
def test_shards_hold_what_the_files_hold(version: int, events: list[Event], tmp_path: Path) -> None:
    write_pilarnet(tmp_path / "events.h5", events, version)
    index = write_event_shards(tmp_path / "events.h5", tmp_path / "out", EventShardOptions(events_per_shard=8))
    assert index == read_index(tmp_path / "out", "events")
    assert [shard["events"] for shard in index["shards"]] == [8, 8, 8, 8, 5]
    assert index["settings"] == {"version": version, "min_points": 0, "events_per_shard": 8}
    assert check_shards(tmp_path / "out") == 5 * (4 + version)
    file, stored = PILArNetFile(tmp_path / "events.h5"), build(tmp_path / "out")
    for row in range(len(events)):
        for name, value in vars(file.read(row)).items():
            assert np.array_equal(getattr(stored.read(row), name), value), name
    for least in (0, 400):
        direct = PILArNetConfig(root=tmp_path / "events.h5", min_points=least).build("train")
        dataset = build(tmp_path / "out", min_points=least)
        assert len(dataset) == len(direct) > 0
        for row in range(len(direct)):
            assert np.array_equal(dataset.get(row).points, direct.get(row).points)
            assert np.array_equal(dataset.get(row).point_label, direct.get(row).point_label)
            assert np.array_equal(dataset.get(row).point_instance, direct.get(row).point_instance)


def test_parts_stay_apart(shard_set: Path, events: list[Event]) -> None:
    assert [len(build(shard_set, split)) for split in ("train", "val", "test", "all")] == [30, 7, 7, 37]
    assert np.array_equal(build(shard_set, "val").read(6).voxel, events[36].voxel)
    assert build(shard_set).source(21).endswith("shard_00005 event 1")
    with pytest.raises(DataError, match="unknown split 'dev'; choose one of train, val, test, all"):
        build(shard_set, "dev")
    with pytest.raises(DataError, match="none of the 30 events of its train part has min_points=99999 points"):
        build(shard_set, min_points=99_999)


@pytest.mark.slow
def test_workers_do_not_change_the_shards(shard_set: Path, source: Path, tmp_path: Path) -> None:
    other = write_event_shards(source, tmp_path / "other", EventShardOptions(events_per_shard=4, workers=2))
    assert other == read_index(shard_set)
    for path in shard_set.rglob("*.np*"):
        assert path.read_bytes() == (tmp_path / "other" / path.relative_to(shard_set)).read_bytes()


def written(root: Path) -> dict[str, int]:
    """When each shard was written."""
    return {path.parent.name: path.stat().st_mtime_ns for path in root.glob("shard_*/shard.json")}


def test_finished_shards_are_kept_and_others_made_again(shard_set: Path, source: Path, events: list[Event]) -> None:
    options, before = EventShardOptions(events_per_shard=4), read_index(shard_set)
    made = written(shard_set)
    told: list[tuple[int, int, int]] = []
    assert write_event_shards(source, shard_set, options, lambda *values: told.append(values)) == before
    assert told[-1] == (37, 37, 0)
    assert written(shard_set) == made
    write_pilarnet(source / "val" / "c.h5", events[:3])
    after = write_event_shards(source, shard_set, options)
    assert {name for name, time in written(shard_set).items() if time != made[name]} == {"shard_00008"}
    assert [shard["events"] for shard in after["shards"]][-2:] == [2, 3]
    assert not (shard_set / "shard_00009").exists()


def test_bad_events_end_the_conversion_or_are_counted(source: Path, tmp_path: Path) -> None:
    with h5py.File(source / "train" / "b.h5", "r+") as file:
        row = file["point"][3]
        row[3] = np.nan
        file["point"][3] = row
    with pytest.raises(DataError, match=r"b\.h5 event 3: the energy of point 0 is nan.*leave such events out with on_bad=skip"):
        write_event_shards(source, tmp_path / "out", EventShardOptions(events_per_shard=4))
    assert sorted(path.name for path in (tmp_path / "out").glob("shard_*")) == [f"shard_{number:05d}" for number in range(5)]
    with pytest.raises(DataError, match="the conversion was interrupted; run the same prepare_data command again"):
        build(tmp_path / "out")
    index = write_event_shards(source, tmp_path / "out", EventShardOptions(events_per_shard=4, on_bad="skip"))
    assert [len(shard["skipped"]) for shard in index["shards"]] == [0] * 5 + [1] + [0] * 4
    assert len(build(tmp_path / "out")) == 29


def test_small_events_can_be_left_out_for_good(source: Path, events: list[Event], tmp_path: Path) -> None:
    write_event_shards(source, tmp_path / "out", EventShardOptions(events_per_shard=4, min_points=800))
    large = [len(event) for event in events[:30] if len(event) >= 800]
    dataset = build(tmp_path / "out", min_points=800)
    assert [len(dataset.read(row)) for row in range(len(dataset))] == large
    with pytest.raises(DataError, match="was converted with min_points=800; ask for at least as many, or convert again"):
        build(tmp_path / "out", min_points=799)
    with pytest.raises(DataError, match="none of its 37 events could be used, or has min_points=99999 points"):
        write_event_shards(source, tmp_path / "none", EventShardOptions(min_points=99_999))


def test_other_sets_are_refused(shard_set: Path, source: Path, events: list[Event], tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"holds shards made with other settings \(events_per_shard: 4 -> 5\)"):
        write_event_shards(source, shard_set, EventShardOptions(events_per_shard=5))
    with pytest.raises(DataError, match=r"holds events, not clouds; read it with data\.name event_shards"):
        ShardsConfig(root=shard_set).build("train")
    index = json.loads((shard_set / "index.json").read_text())
    (shard_set / "index.json").write_text(json.dumps({key: value for key, value in index.items() if key != "kind"}))
    with pytest.raises(DataError, match=r"holds clouds, not events; read it with data\.name shards"):
        build(shard_set)
    write_pilarnet(source / "train" / "d.h5", events[:3], 2)
    with pytest.raises(DataError, match=r"holds files of both versions \(.*, .*d\.h5\), which differ in events; convert them apart"):
        write_event_shards(source, tmp_path / "mixed", EventShardOptions())
    with pytest.raises(DataError, match="source: is not empty and holds no shard set"):
        write_event_shards(source / "val" / "c.h5", source, EventShardOptions())


def test_damage_is_found(shard_set: Path) -> None:
    path = shard_set / "shard_00002" / "energy.npy"
    content = bytearray(path.read_bytes())
    content[-2] ^= 1
    path.write_bytes(content)
    build(shard_set)  # sizes agree
    with pytest.raises(DataError, match=r"shard_00002/energy\.npy: its checksum is not that of the index"):
        build(shard_set, check=True)
    path.write_bytes(content[:-4])
    with pytest.raises(DataError, match=r"shard_00002/energy\.npy: has \d+ bytes, the index says \d+; remove"):
        build(shard_set)


def test_an_epoch_reads_a_few_shards_at_a_time(shard_set: Path) -> None:
    dataset = build(shard_set, mix_shards=2)  # the training part has 8 shards, of 4 events mostly
    order = dataset.order(np.random.default_rng(0))
    assert sorted(order.tolist()) == list(range(30))
    assert order.tolist() != dataset.order(np.random.default_rng(1)).tolist()
    shards = dataset._shard[order]
    runs = [list(dict.fromkeys(shards[first : first + 4].tolist())) for first in range(0, 30, 4)]
    assert max(map(len, runs)) > 1  # mixed
    last_of_first_pair = max(np.flatnonzero(np.isin(shards, shards[:1])))
    assert last_of_first_pair < 8  # and done with after two shards
    changes = [set(shards[:row]) & set(shards[row:]) for row in range(1, 30)]
    assert max(map(len, changes)) <= 2  # no more than two are begun and not finished
    for row in order.tolist():
        dataset.get(row)
        assert len(dataset._arrays._maps) <= 3
    everything = build(shard_set, mix_shards=0).order(np.random.default_rng(0))
    assert everything.tolist() == np.random.default_rng(0).permutation(30).tolist()


def test_a_position_is_saved_and_found_again(shard_set: Path) -> None:
    loader = build_loader(build(shard_set, mix_shards=2), 4, seed=3)
    list(islice(loader, 9))  # into the second epoch
    state = loader.state_dict()
    expected = list(islice(loader, 5))
    again = build_loader(build(shard_set, mix_shards=2), 4, seed=3)
    again.load_state_dict(state)
    for a, b in zip(expected, islice(again, 5), strict=True):
        assert torch.equal(a.points.coord, b.points.coord)
        assert a.index is not None
        assert b.index is not None
        assert torch.equal(a.index, b.index)


def test_processes_see_events_of_their_own(shard_set: Path) -> None:
    alone = build_loader(build(shard_set), 6, seed=0)
    ranks = [build_loader(build(shard_set), 6, seed=0, rank=rank, world_size=3) for rank in range(3)]
    seen: set[int] = set()
    for _ in range(alone.batches_per_epoch):
        parts = [next(rank).index for rank in ranks]
        whole = next(alone).index
        assert whole is not None
        assert torch.equal(torch.cat([part for part in parts if part is not None]), whole)
        assert not seen & set(whole.tolist())
        seen |= set(whole.tolist())
    assert len(seen) == 30


def test_shards_are_mapped_and_travel_to_workers_without_their_data(shard_set: Path) -> None:
    dataset = build(shard_set)
    event = dataset.read(0)
    assert not event.voxel.flags.writeable
    assert not event.energy.flags.owndata
    assert len(pickle.dumps(dataset)) < 10_000
    alone, parallel = (build_loader(dataset, 5, seed=0, workers=workers) for workers in (0, 2))
    for _ in range(3):
        assert torch.equal(next(alone).points.coord, next(parallel).points.coord)
    parallel.close()


READ_UNDER_A_LIMIT = """
import resource, sys
import numpy as np
from pathlib import Path
from geossl.data import EventShardsConfig

dataset = EventShardsConfig(root=Path(sys.argv[1]), min_points=0, mix_shards=2).build("train")
dataset.get(0)
used = 1024 * int(next(line for line in open("/proc/self/status") if line.startswith("VmData")).split()[1])
resource.setrlimit(resource.RLIMIT_DATA, (used + 16_000_000, used + 16_000_000))
print(sum(len(dataset.get(int(row)).points) for row in dataset.order(np.random.default_rng(0))))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists() or not hasattr(resource, "RLIMIT_DATA"), reason="needs Linux")
def test_more_is_read_than_the_memory_holds(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    count, voxels = 40, 200_000  # 80 MB of voxels and energies, read with 16 MB to spare

    def large() -> Any:
        for _ in range(count):
            voxel = rng.integers(0, 768, (voxels, 3)).astype(np.int16)
            yield Event(voxel, np.full(voxels, 0.1, np.float32), np.array([[0, -1, -1, -1, 4], [voxels, 0, 0, 0, 1]]))

    write_pilarnet(tmp_path / "large.h5", large())
    write_event_shards(tmp_path / "large.h5", tmp_path / "out", EventShardOptions(events_per_shard=4))
    # One voxel in a thousand passes the threshold: samples are small, what is mapped is not.
    for path in (tmp_path / "out").glob("shard_*/energy.npy"):
        values = np.load(path, mmap_mode="r+")
        values[::1000] = 1.0
    ran = subprocess.run(
        [sys.executable, "-c", READ_UNDER_A_LIMIT, str(tmp_path / "out")], capture_output=True, text=True, env={**os.environ}, check=False
    )
    assert ran.returncode == 0, ran.stderr
    assert int(ran.stdout) == count * voxels // 1000


def test_memory_does_not_grow_with_what_was_read(shard_set: Path) -> None:
    dataset = build(shard_set)
    for row in range(8):
        dataset.get(row)
    tracemalloc.start()
    for row in range(30):
        dataset.get(row)
    left, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert left < 100_000
    assert peak < 2_000_000


def test_wrong_settings() -> None:
    for options, message in (
        ({"events_per_shard": 0}, "events_per_shard must be at least 1"),
        ({"workers": 0}, "workers must be at least 1"),
        ({"min_points": -1}, "min_points must not be negative"),
        ({"on_bad": "ignore"}, "on_bad must be error or skip"),
    ):
        with pytest.raises(ConfigError, match=message):
            EventShardOptions(**options)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="mix_shards must not be negative"):
        EventShardsConfig(mix_shards=-1)
    with pytest.raises(DataError, match="data/pilarnet_shards: this folder does not exist"):
        DATASETS.config("event_shards").build("train")
