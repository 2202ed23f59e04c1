"""PILArNet-M's HDF5 files: both versions, the published pipeline, the index, and what is wrong with damaged files."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from safetensors import safe_open

from geossl.data import (
    DATASETS,
    Event,
    LArTPCOptions,
    PILArNetConfig,
    PILArNetFile,
    build_loader,
    event_sample,
    simulate_event,
    write_pilarnet,
)
from geossl.data.events import EventDataConfig
from geossl.errors import ConfigError, DataError


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GEOSSL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def events() -> list[Event]:
    """Four events, the first of fewer points than are used."""
    small = simulate_event(0, 0, LArTPCOptions(vertices=(1, 1), primaries=(1, 1)), min_points=0)
    return [small, *(simulate_event(0, number, min_points=least) for number, least in enumerate((1024, 1024, 2000)))]


@pytest.fixture
def file(events: list[Event], tmp_path: Path) -> Path:
    write_pilarnet(tmp_path / "events.h5", events)
    return tmp_path / "events.h5"


def write_raw(path: Path, rows: dict[str, list[np.ndarray]], kinds: dict[str, Any] | None = None) -> Path:
    with h5py.File(path, "w") as file:
        for name, values in rows.items():
            array = file.create_dataset(name, (len(values),), h5py.vlen_dtype(np.dtype((kinds or {}).get(name, values[0].dtype))))
            for row, value in enumerate(values):
                array[row] = value
    return path


def rows_of(path: Path) -> dict[str, list[np.ndarray]]:
    with h5py.File(path) as file:
        return {name: list(file[name][()]) for name in file}


@pytest.mark.parametrize("version", [1, 2])
def test_what_is_written_is_read_back(version: int, events: list[Event], tmp_path: Path) -> None:
    path = tmp_path / "out" / "events.h5"
    assert write_pilarnet(path, iter(events), version) == len(events)
    file = PILArNetFile(path)
    assert file.version == version
    assert len(file) == len(events)
    for row, event in enumerate(events):
        got = file.read(row)
        assert np.array_equal(got.voxel, event.voxel)
        assert np.array_equal(got.energy, event.energy)
        assert np.array_equal(got.clusters, event.clusters[:, : 4 + version])
        assert (got.extra is None) == (version == 1)
        if got.extra is not None:
            assert np.array_equal(got.extra, event.extra)
    assert np.load(tmp_path / "out" / "events_points.npy").tolist() == [len(event) for event in events]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["events.h5", "events_points.npy"]


def test_the_layout_is_the_published_one(events: list[Event], tmp_path: Path) -> None:
    write_pilarnet(tmp_path / "events.h5", events, 2)
    with h5py.File(tmp_path / "events.h5") as file:
        assert sorted(file) == ["cluster", "cluster_extra", "point"]
        kinds = [h5py.check_vlen_dtype(file[name].dtype) for name in ("point", "cluster", "cluster_extra")]
        assert kinds == [np.float32, np.int64, np.float32]
        point, cluster = file["point"][1].reshape(-1, 8), file["cluster"][1].reshape(-1, 6)
    assert cluster[0].tolist()[1:] == [-1, -1, -1, 4, -1]
    assert np.array_equal(point[:, 3], point[:, 4])
    assert np.allclose(point[:, 6], point[:, 3] * 0.7 / 23.6e-6)
    assert (point[:, 5] == 0).all()
    assert (point[:, 7] == 3).all()


def test_the_pipeline_by_hand() -> None:
    voxel = np.array([[9, 9, 9], [0, 1, 2], [3, 4, 5], [767, 0, 0], [1, 1, 1], [2, 2, 2]], dtype=np.int16)
    energy = np.array([5.0, 0.13, 0.131, 20.0, 25.0, 1.0], dtype=np.float32)
    clusters = np.array([[1, -1, -1, -1, 4], [2, 0, 0, 0, 0], [2, 1, 1, 0, 2], [1, 2, 2, 0, 4]])
    event = Event(voxel, energy, clusters)
    sample = event_sample(event, EventDataConfig(name="x"), row=5)
    assert sample.points[:, :3].tolist() == [[3, 4, 5], [767, 0, 0], [1, 1, 1], [2, 2, 2]]
    assert sample.points.dtype == np.float32
    assert sample.points[0, 3] == pytest.approx(-0.7234, abs=2e-3)
    assert sample.points[1, 3] == pytest.approx(1.0)
    assert sample.points[2, 3] > 1
    assert sample.point_label is not None
    assert sample.point_instance is not None
    assert sample.point_label.tolist() == [0, 2, 2, -1]  # low-energy deposits that are not first have no class left
    assert sample.point_instance.tolist() == [0, 1, 1, 2]
    assert (sample.label, sample.index) == (-1, 5)
    whole = event_sample(event, EventDataConfig(name="x", remove_led=False, energy_threshold=0.0))
    assert whole.point_label is not None
    assert whole.point_instance is not None
    assert whole.point_label.tolist() == [4, 0, 0, 2, 2, 4]
    assert whole.point_instance.tolist() == [-1, 0, 0, 1, 1, 2]
    assert whole.points[3, 3] == pytest.approx(1.0)
    low, high = np.log10(0.01), np.log10(20.01)
    assert whole.points[1, 3] == pytest.approx(2 * (np.log10(0.14) - low) / (high - low) - 1)
    with pytest.raises(DataError, match=r"here: none of its 6 points is left \(energy_threshold=19"):
        event_sample(Event(voxel, np.minimum(energy, 18), clusters), EventDataConfig(name="x", energy_threshold=19.0), source="here")


@pytest.mark.skipif("GEOSSL_REAL_DATA" not in os.environ, reason="GEOSSL_REAL_DATA is not set")
def test_a_real_event_gives_the_numbers_of_the_published_code(golden_root: Path) -> None:
    path = Path(os.environ["GEOSSL_REAL_DATA"]) / "lartpc" / "pilarnet_m_test_event7675.h5"
    dataset = PILArNetConfig(root=path).build("train")
    (sample,) = [dataset.get(row) for row in range(len(dataset))]
    with safe_open(golden_root / "polar_mae" / "dev3_tokenizer_full_events.safetensors", "np") as golden:
        length = int(golden.get_tensor("in.lengths")[0])
        expected, semantic = golden.get_tensor("in.points")[0, :length], golden.get_tensor("in.semantic_id")[0, :length, 0]
    points = np.concatenate([(sample.points[:, :3] - 384) * np.float32(2 / (768 * np.sqrt(3))), sample.points[:, 3:]], 1)
    assert np.allclose(points, expected, rtol=0, atol=1e-6)
    assert sample.point_label is not None
    assert np.array_equal(sample.point_label, semantic)
    assert sample.point_instance is not None
    assert np.unique(sample.point_instance).tolist() == list(range(10))


def test_small_events_are_left_out_by_their_number_of_points(file: Path, events: list[Event]) -> None:
    sizes = [len(event) for event in events]
    assert sizes[0] < 1024
    assert len(PILArNetConfig(root=file).build("train")) == 3
    assert len(PILArNetConfig(root=file, min_points=0).build("all")) == 4
    dataset = PILArNetConfig(root=file, min_points=2000).build("train")
    assert [len(dataset.read(row)) for row in range(len(dataset))] == [size for size in sizes if size >= 2000]
    assert dataset.source(len(dataset) - 1) == f"{file} event 3"
    with pytest.raises(DataError, match="none of the 4 events of its train part has min_points=99999 points"):
        PILArNetConfig(root=file, min_points=99_999).build("train")


def test_a_missing_index_is_made_beside_the_file(file: Path, events: list[Event], cache: Path) -> None:
    index = file.with_name("events_points.npy")
    index.unlink()
    assert PILArNetFile(file).counts().tolist() == [len(event) for event in events]
    assert np.load(index).tolist() == [len(event) for event in events]
    assert not cache.exists()


def test_the_index_of_a_folder_that_cannot_be_written_is_kept_in_the_cache(
    file: Path, events: list[Event], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = file.with_name("events_points.npy")
    index.unlink()
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert PILArNetFile(file).counts().tolist() == [len(event) for event in events]
    assert not index.exists()
    (kept,) = (cache / "pilarnet").iterdir()
    with monkeypatch.context() as patch:
        patch.setattr(PILArNetFile, "_rows", lambda *_: pytest.fail("counted again"))
        patch.setattr(PILArNetFile, "_find_version", lambda _: 1)
        assert len(PILArNetFile(file).counts()) == 4
    os.utime(file, ns=(0, 0))  # another file of the same name
    PILArNetFile(file).counts()
    assert len(list(kept.parent.iterdir())) == 2
    monkeypatch.setenv("GEOSSL_CACHE", str(file / "under_a_file"))
    assert len(PILArNetFile(file).counts()) == 4  # told in a warning


def test_parts_are_folders(events: list[Event], tmp_path: Path) -> None:
    for name, count in (("train/a", 2), ("train/b", 1), ("val/c", 3)):
        write_pilarnet(tmp_path / f"{name}.h5", events[1 : 1 + count])
    build = PILArNetConfig(root=tmp_path).build
    assert [len(build(split)) for split in ("train", "val", "test", "all")] == [3, 3, 3, 6]
    assert len(PILArNetConfig(root=tmp_path / "train").build("val")) == 3
    files = PILArNetConfig(files=(tmp_path / "train" / "a.h5", tmp_path / "val" / "c.h5"))
    assert [len(files.build(split)) for split in ("train", "val")] == [2, 3]
    single = PILArNetConfig(root=tmp_path / "train" / "b.h5")
    assert len(single.build("train")) == 1
    with pytest.raises(DataError, match=r"b\.h5: has no val part, only train; put its files into a folder named val"):
        single.build("val")
    with pytest.raises(DataError, match="unknown split 'dev'; choose one of train, val, test, all"):
        build("dev")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"empty: holds no \.h5 or \.hdf5 files, nor do folders train, val and test"):
        PILArNetConfig(root=tmp_path / "empty").build("train")
    with pytest.raises(DataError, match="nowhere: this file or folder does not exist"):
        PILArNetConfig(root=tmp_path / "nowhere").build("train")


@pytest.mark.slow
@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_workers_open_the_file_themselves(context: str, file: Path) -> None:
    if context not in multiprocessing.get_all_start_methods():
        pytest.skip(f"this system cannot {context}")
    dataset = PILArNetConfig(root=file).build("train")
    dataset.get(0)  # open in this process
    alone, parallel = build_loader(dataset, 3, seed=0), build_loader(dataset, 3, seed=0, workers=2, context=context)
    for _ in range(4):
        a, b = next(alone), next(parallel)
        assert torch.equal(a.points.coord, b.points.coord)
        assert a.index is not None
        assert b.index is not None
        assert torch.equal(a.index, b.index)
    parallel.close()


def test_the_loader_shuffles_and_packs(file: Path) -> None:
    loader = build_loader(DATASETS.config("pilarnet").__class__(root=file).build("train"), 3, seed=0)
    seen = [next(loader) for _ in range(6)]
    assert all(batch.index is not None and sorted(batch.index.tolist()) == [0, 1, 2] for batch in seen)
    assert len({tuple(batch.index.tolist()) for batch in seen if batch.index is not None}) > 1
    batch = seen[0]
    assert batch.points.feats is not None
    assert batch.point_label is not None
    assert batch.point_instance is not None
    assert batch.points.feats.shape == (len(batch.points.coord), 1)
    assert batch.point_label.shape == batch.point_instance.shape == (len(batch.points.coord),)
    assert 0 <= int(batch.point_label.min()) <= int(batch.point_label.max()) <= 3
    assert batch.points.coord.min() >= 0
    assert batch.points.coord.max() <= 767


def test_the_version_is_told_by_the_columns(tmp_path: Path) -> None:
    points = np.tile(np.arange(8, dtype=np.float32), (12, 1))
    # 30 numbers that are 6 clusters of 5 columns or 5 of 6, and sum to the points either way; the next event decides.
    both = np.zeros(30, dtype=np.int64)
    both[[10, 12]] = 12
    assert both[::5].sum() == both[::6].sum() == 12
    second = np.array([[0, -1, -1, -1, 4, -1], [12, 0, 0, 0, 1, 2]]).reshape(-1)
    for version, cluster in ((2, second), (1, second.reshape(2, 6)[:, :5].reshape(-1))):
        path = write_raw(tmp_path / f"v{version}.h5", {"point": [points.reshape(-1)] * 2, "cluster": [both, cluster]})
        assert PILArNetFile(path).version == version


Rows = dict[str, list[np.ndarray]]


def change(name: str, edit: Callable[[np.ndarray], np.ndarray]) -> Callable[[Rows], None]:
    def apply(rows: Rows) -> None:
        rows[name][1] = edit(rows[name][1].copy())

    return apply


def put(index: int, value: float) -> Callable[[np.ndarray], np.ndarray]:
    def edit(flat: np.ndarray) -> np.ndarray:
        flat[index] = value
        return flat

    return edit


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (change("cluster", put(5, 10**6)), r"event 1: its \d+ cluster sizes sum to \d+, but there are \d+ points; the file is damaged"),
        (change("cluster", lambda flat: flat[:-1]), r"event 1: cluster has \d+ numbers, which is not a multiple of its 5 columns"),
        (change("cluster", lambda flat: flat[:0]), "event 1: has no clusters; the first must be that of the low-energy deposits"),
        (change("cluster", put(4, 1)), r"event 1: its first cluster has class 1 \(track\), expected 4"),
        (change("cluster", put(9, 7)), r"event 1: cluster 1 has class 7, expected 0..4"),
        (change("point", lambda flat: flat[:-3]), r"event 1: point has \d+ numbers, which is not a multiple of its 8 columns"),
        (change("point", put(3, np.nan)), r"event 1: the energy of point 0 is nan, which is not finite"),
        (change("point", put(8, np.nan)), r"event 1: point 1 lies at \[nan, .*expected voxel indices 0..767"),
        (change("point", put(9, 768)), r"event 1: point 1 lies at .*768.0.*expected voxel indices 0..767"),
        (change("point", put(10, 3.5)), r"event 1: point 1 lies at .*3.5.*expected voxel indices 0..767"),
    ],
)
def test_malformed_events_are_named(damage: Callable[[Rows], None], message: str, file: Path, tmp_path: Path) -> None:
    rows = rows_of(file)
    damage(rows)
    path = write_raw(tmp_path / "bad.h5", rows)
    with pytest.raises(DataError, match=rf"bad\.h5 {message}"):
        PILArNetFile(path).read(1)


def test_files_of_another_kind_are_refused(file: Path, tmp_path: Path) -> None:
    rows = rows_of(file)
    for kept, message in (
        ({"point": rows["point"]}, "has no array cluster; it holds point"),
        ({**rows, "cluster": rows["cluster"][:2]}, "has 4 events in point, but cluster 2; the file is incomplete"),
        ({**rows, "cluster": [flat[:-2] for flat in rows["cluster"]]}, "event 0 fits neither version"),
    ):
        with pytest.raises(DataError, match=message):
            PILArNetFile(write_raw(tmp_path / "bad.h5", kept))
    with h5py.File(tmp_path / "flat.h5", "w") as bad:
        bad["point"] = np.zeros((3, 8))
    with pytest.raises(DataError, match="point must hold one row of numbers of variable length for each event"):
        PILArNetFile(tmp_path / "flat.h5")
    with pytest.raises(DataError, match=r"absent\.h5: this file does not exist"):
        PILArNetFile(tmp_path / "absent.h5")


def test_truncated_files_are_named(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-5000])
    with pytest.raises(DataError, match=r"events\.h5: cannot be read as HDF5; it is damaged, truncated"):
        PILArNetFile(file)


def test_an_index_of_another_file_is_refused(file: Path) -> None:
    index = file.with_name("events_points.npy")
    good = np.load(index)
    np.save(index, good[:-1])
    with pytest.raises(DataError, match=r"events_points\.npy: must be \[4\] integers, one an event, got \[3\]"):
        PILArNetConfig(root=file).build("train")
    np.save(index, good + 1)
    with pytest.raises(DataError, match=r"event 1: has \d+ points, but \d+ in its index; remove the file events_points\.npy"):
        PILArNetConfig(root=file).build("train").get(0)
    index.write_bytes(b"\x93NUMPY")
    with pytest.raises(DataError, match=r"events_points\.npy: is damaged or truncated"):
        PILArNetConfig(root=file).build("train")


def test_an_interrupted_writing_leaves_nothing(events: list[Event], tmp_path: Path) -> None:
    def stops() -> Any:
        yield events[0]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_pilarnet(tmp_path / "events.h5", stops())
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(DataError, match="version must be 1 or 2, got 3"):
        write_pilarnet(tmp_path / "events.h5", events, 3)
    with pytest.raises(DataError, match="event 0: version 2 needs the particle of each cluster"):
        write_pilarnet(tmp_path / "events.h5", [Event(events[0].voxel, events[0].energy, events[0].clusters[:, :5])], 2)
    with pytest.raises(DataError, match="event 0: point 0 lies at voxel"):
        write_pilarnet(tmp_path / "events.h5", [Event(events[0].voxel + 768, events[0].energy, events[0].clusters)])
    assert list(tmp_path.iterdir()) == []


def test_files_can_be_read_only(file: Path) -> None:
    file.chmod(stat.S_IREAD)
    assert len(PILArNetFile(file)) == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"energy_threshold": -0.1}, "energy_threshold must not be negative"),
        ({"max_energy": 0.1}, "max_energy must be more than 0.13"),
        ({"min_points": -1}, "min_points must not be negative"),
    ],
)
def test_wrong_settings(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PILArNetConfig(**options)


def test_an_event_that_is_cut_away_does_not_end_a_training(events: list[Event], tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    faint = dataclasses.replace(events[1], energy=np.full_like(events[1].energy, 0.01))
    write_pilarnet(tmp_path / "a.hdf5", [faint, events[2]])
    data = PILArNetConfig(root=tmp_path).build("train")
    with caplog.at_level("WARNING", "geossl"):
        sample = data.get(0)
    assert np.array_equal(sample.points, data.get(1).points)
    assert "none of its" in caplog.text
    with pytest.raises(DataError, match="no event has a point left"):
        PILArNetConfig(root=tmp_path, energy_threshold=1e4, max_energy=1e5).build("train").get(0)


def test_negative_energies_count_as_none(events: list[Event]) -> None:
    odd = dataclasses.replace(events[1], energy=events[1].energy.copy())
    odd.energy[-1] = -1.0
    points = event_sample(odd, EventDataConfig(name="events", energy_threshold=0.0)).points
    assert points[-1, 3] == -1.0
    assert np.isfinite(points).all()


def test_a_bad_first_event_does_not_hide_the_others(events: list[Event], tmp_path: Path) -> None:
    write_pilarnet(tmp_path / "whole.h5", events)
    with h5py.File(tmp_path / "whole.h5") as file:
        rows = {name: list(file[name]) for name in ("point", "cluster")}
    rows["cluster"][0] = np.append(rows["cluster"][0], 7)
    bad = PILArNetFile(write_raw(tmp_path / "bad.h5", rows))
    assert len(bad.read(1)) == len(events[1])
    with pytest.raises(DataError, match=r"event 0"):
        bad.read(0)
