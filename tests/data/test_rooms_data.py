"""Rooms as a data set: on the fly, kept, and written to shards by one or several processes."""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from geossl.cli import run
from geossl.data import RoomsConfig, RoomShardOptions, RoomShardsConfig, check_rooms, write_rooms
from geossl.data import rooms as rooms_module
from geossl.data.scene import SCENES, TENSORS, SceneSample
from geossl.errors import ConfigError, DataError

ROOT = Path(__file__).parents[2]
TINY = {"width": 32, "height": 24, "views": 2, "points": 64, "kind": "bathroom"}  # the quickest rooms


pytestmark = pytest.mark.usefixtures("surfel_cache")


def same(a: SceneSample, b: SceneSample) -> bool:
    return all(torch.equal(getattr(a, name), getattr(b, name)) for name in (*TENSORS, "visible"))


def test_samples_are_complete_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = RoomsConfig(**TINY, count=3, cache=tmp_path)
    data = config.build("train")
    assert len(data) == 3
    first = data[1]
    assert first.image.shape == (2, 3, 24, 32)
    assert first.intrinsics.shape == (2, 3, 3)
    assert first.depth is not None
    assert first.depth.shape == first.valid.shape == first.instance.shape == (2, 24, 32)  # type: ignore[union-attr]
    assert first.points.shape == first.colors.shape == (64, 3)  # type: ignore[union-attr]
    assert len(first.boxes) == len(first.labels) == len(first.visible) >= 4  # type: ignore[arg-type]
    assert max(first.labels.tolist()) < len(first.classes)  # type: ignore[union-attr]
    assert len(first.cameras) == 2
    assert data[1] is first
    monkeypatch.setattr(rooms_module, "build_room", lambda *a, **k: pytest.fail("built again"))
    copy = pickle.loads(pickle.dumps(data))
    assert same(copy[1], first)  # from disk
    assert same(config.build("train")[1], first)
    monkeypatch.undo()
    (path,) = tmp_path.glob("rooms-*/1.npz")
    path.write_bytes(b"junk")
    with pytest.raises(DataError, match=r"1\.npz: cannot be read as npz"):
        config.build("train")[1]
    other = RoomsConfig(**TINY, seed=1, cache=tmp_path)
    assert not list((tmp_path / f"rooms-{other.build('train')._key}").glob("*"))  # other settings, other folder


def test_a_kept_sample_is_made_anew_when_the_simulator_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from geossl.data import simulate

    folder = tmp_path / "simulate"
    folder.mkdir()
    (folder / "light.py").write_text("a = 1")
    monkeypatch.setattr(simulate, "__file__", str(folder / "__init__.py"))
    versions = []
    for text in ("a = 1", "a = 2", "a = 1"):
        (folder / "light.py").write_text(text)
        versions.append(rooms_module.rooms_version.__wrapped__())
    assert versions[0] == versions[2] != versions[1]
    assert len(rooms_module.rooms_version()) == 16


def test_parts_share_no_room() -> None:
    config = RoomsConfig(**TINY, count=2, test_count=2)
    train, test = config.build("train"), config.build("test")
    assert not torch.equal(train[0].image, test[0].image)
    with pytest.raises(DataError, match="unknown split 'val'"):
        config.build("val")
    with pytest.raises(IndexError, match=r"row 2 is outside 0\.\.1"):
        train[2]


def test_noise_leaves_the_instances_clean() -> None:
    clean, noisy = RoomsConfig(**TINY).build()[0], RoomsConfig(**TINY, noisy=True).build()[0]
    assert torch.equal(clean.instance, noisy.instance)  # type: ignore[arg-type]
    assert torch.equal(clean.world_to_cam, noisy.world_to_cam)
    assert not torch.equal(clean.image, noisy.image)
    assert bool((noisy.depth == 0).any())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"views": 0}, "views must be at least 1"),
        ({"width": 32, "height": None}, "width must be given together with height"),
        ({"width": None, "height": None}, "rooms have no size of their own|width must be given"),
        ({"kind": "cellar"}, "kind must be one of bedroom"),
        ({"seed": -1}, "seed must not be negative"),
        ({"points": -1}, "points must not be negative"),
    ],
)
def test_wrong_settings_are_refused(change: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RoomsConfig(**{**TINY, **change})


def test_scene_data_sets_are_found_by_name() -> None:
    assert set(SCENES.names()) == {"rooms", "room_shards", "rgbd_folder", "sunrgbd", "transforms"}
    assert SCENES.config("rooms") == RoomsConfig()


OPTIONS = {**TINY, "count": 3, "rooms_per_shard": 1, "pairs": 1, "grid": 16}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory, surfel_cache: Path) -> Path:
    out = tmp_path_factory.mktemp("rooms") / "one"
    write_rooms(out, RoomShardOptions(**OPTIONS))
    return out


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}


def test_any_number_of_processes_writes_the_same_bytes(written: Path, tmp_path: Path) -> None:
    write_rooms(tmp_path / "two", RoomShardOptions(**OPTIONS, workers=2))
    assert files(tmp_path / "two") == files(written)
    assert set(files(written)) == {"index.json", "contact_sheet.png", *(f"rooms-0000{n}.{s}" for n in range(3) for s in ("tar", "json"))}


def test_a_set_is_finished_and_extended_but_never_shortened(written: Path, tmp_path: Path) -> None:
    out = tmp_path / "set"
    write_rooms(out, RoomShardOptions(**{**OPTIONS, "count": 2}))
    kept = (out / "rooms-00000.tar").stat().st_ino
    (out / "rooms-00001.json").unlink()  # as if the power had failed in the second
    (out / ".rooms-00001.tar.7.tmp").write_bytes(b"half")
    mine = {"rooms_notes.txt": b"mine", "rooms-mine.tar": b"mine", "room_mine.npz": b"mine", ".mine.tmp": b"mine"}
    for name, content in mine.items():
        (out / name).write_bytes(content)
    (out / "rooms-backup").mkdir()
    done: list[int] = []
    write_rooms(out, RoomShardOptions(**OPTIONS), lambda rooms, total: done.append(rooms))
    assert done == [1, 2, 3]
    assert (out / "rooms-00000.tar").stat().st_ino == kept
    assert (out / "rooms-backup").is_dir()
    assert files(out) == {**files(written), **mine}
    with pytest.raises(DataError, match=r"was begun with 3 rooms, more than count=1; use another folder"):
        write_rooms(out, RoomShardOptions(**{**OPTIONS, "count": 1}))
    assert files(out) == {**files(written), **mine}
    with pytest.raises(DataError, match=r"other settings \(seed: 0 -> 1\)"):
        write_rooms(out, RoomShardOptions(**{**OPTIONS, "seed": 1}))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("")
    with pytest.raises(DataError, match="is not empty and holds no set of rooms"):
        write_rooms(tmp_path / "full", RoomShardOptions(**OPTIONS))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"format": "geossl-shards", "settings": {"points": 5}}, "expected the index of geossl-rooms, got 'geossl-shards'"),
        ({"format": "geossl-rooms", "settings": []}, r"is damaged: settings must be a dict, got \[\]"),
        ({"format": "geossl-rooms", "settings": {}, "classes": [], "count": 3}, "is damaged: shards must be a list, got None"),
        (
            {"format": "geossl-rooms", "settings": {}, "classes": [], "count": 3, "shards": [{"file": "../x.tar"}]},
            "a shard must have file, rooms, bytes and sha256",
        ),
    ],
)
def test_a_foreign_or_damaged_index_is_refused(tmp_path: Path, content: dict, message: str) -> None:
    (tmp_path / "index.json").write_text(json.dumps({"complete": True, **content}))
    with pytest.raises(DataError, match=message):
        write_rooms(tmp_path, RoomShardOptions(**OPTIONS))
    with pytest.raises(DataError, match=message):
        RoomShardsConfig(root=tmp_path).build()
    with pytest.raises(DataError, match=message):
        check_rooms(tmp_path)
    assert json.loads((tmp_path / "index.json").read_text()) == {"complete": True, **content}


def test_rooms_need_a_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="file: is a file; rooms are written to a folder"):
        write_rooms(tmp_path / "file", RoomShardOptions(**OPTIONS))
    with pytest.raises(ConfigError, match="first must leave the last room below 1073741824"):
        RoomShardOptions(**{**OPTIONS, "first": (1 << 30) - 2})


def test_what_is_read_is_what_was_made(written: Path) -> None:
    data = RoomShardsConfig(root=written, views=2, points=64).build()
    made = RoomsConfig(**TINY).build()
    assert len(data) == 3
    for row in range(3):
        a, b = data[row], made[row]
        assert float((a.image - b.image).abs().max()) < 0.003  # 8 bits
        assert float((a.depth - b.depth).abs().max()) < 0.00051  # type: ignore[operator]  # millimetres
        for name in ("intrinsics", "world_to_cam", "instance", "valid", "points", "point_instance", "boxes", "labels", "visible"):
            assert torch.equal(getattr(a, name), getattr(b, name)), name
        assert a.classes == b.classes
    assert data[0].image.shape == (2, 3, 24, 32)
    one = RoomShardsConfig(root=written, views=1, points=0).build()[2]
    assert one.points is None
    assert len(one.image) == 1
    assert same(pickle.loads(pickle.dumps(data))[1], data[1])
    members = data.members(0)
    assert {"pair_000_1.png", "pair_000_2.png", "pair_000.npz", "grid.npz", "obb.npy", "json"} <= set(members)
    meta = json.loads(members["json"])
    assert len(meta["names"]) == len(meta["boxes"])


def test_webdataset_reads_the_shards(written: Path) -> None:
    import webdataset

    samples = list(webdataset.WebDataset([str(path) for path in sorted(written.glob("*.tar"))], shardshuffle=False))
    assert [sample["__key__"] for sample in samples] == ["room_00000000", "room_00000001", "room_00000002"]
    assert {"json", "rgb_000.png", "depth_001.png", "points.npz"} <= set(samples[0])


def test_one_npz_a_room(written: Path, tmp_path: Path) -> None:
    options = {**OPTIONS, "layout": "npz", "count": 2}
    write_rooms(tmp_path / "npz", RoomShardOptions(**options))
    assert [path.name for path in sorted((tmp_path / "npz").glob("*.npz"))] == ["room_00000000.npz", "room_00000001.npz"]
    data = RoomShardsConfig(root=tmp_path / "npz", views=2, points=64).build()
    assert same(data[1], RoomShardsConfig(root=written, views=2, points=64).build()[1])
    with np.load(tmp_path / "npz" / "room_00000000.npz") as arrays:
        assert arrays["pair_000_flow"].shape == (24, 32, 2)
        assert arrays["grid_rgbsigma"].shape[3] == 4


def test_damage_is_noticed(written: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import shutil

    out = tmp_path / "set"
    shutil.copytree(written, out)
    assert run("prepare-data", ["check", "--source", str(out)]) == 0
    assert "all 3 shards have the checksums" in capsys.readouterr().out
    data = bytearray((out / "rooms-00001.tar").read_bytes())
    data[5000] ^= 1
    (out / "rooms-00001.tar").write_bytes(data)
    with pytest.raises(DataError, match=r"rooms-00001\.tar: its checksum is not that of the index"):
        check_rooms(out)
    (out / "rooms-00001.tar").write_bytes(data[:-10])
    with pytest.raises(DataError, match="the index says"):
        RoomShardsConfig(root=out, views=2, points=64).build()
    with pytest.raises(DataError, match=r"2 views and 64 points, but views=9"):
        RoomShardsConfig(root=written, views=9).build()
    index = json.loads((out / "index.json").read_text())
    (out / "index.json").write_text(json.dumps({**index, "complete": False}))
    with pytest.raises(DataError, match="interrupted; run the same prepare_data command again"):
        check_rooms(out)
    with pytest.raises(DataError, match="interrupted; run the same prepare_data command again"):
        RoomShardsConfig(root=out).build()
    (out / "index.json").write_text(json.dumps({"format": "other"}))
    with pytest.raises(DataError, match="expected the index of geossl-rooms"):
        RoomShardsConfig(root=out).build()


def spoil(path: Path, room: str, member: str, how: str) -> None:
    """Damage a member of a room without changing the size of the tar."""
    with tarfile.open(path) as tar:
        info = tar.getmember(f"{room}.{member}")
    data = bytearray(path.read_bytes())
    start, stop = (info.offset, info.offset_data) if how == "header" else (info.offset_data, info.offset_data + info.size)
    if how == "middle":
        start = (start + stop) // 2
    data[start:stop] = bytes(stop - start)
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("member", "how"),
    [
        ("rgb_000.png", "all"), ("depth_001.png", "middle"), ("json", "all"), ("json", "middle"), ("points.npz", "all"),
        ("points.npz", "middle"), ("json", "header"), ("rgb_000.png", "header"),
    ],
)  # fmt: skip
def test_a_damaged_shard_of_the_right_size_is_named(two_rooms: Path, tmp_path: Path, member: str, how: str) -> None:
    import shutil

    shutil.copytree(two_rooms, tmp_path / "set")
    spoil(tmp_path / "set" / "rooms-00000.tar", "room_00000008", member, how)
    data = RoomShardsConfig(root=tmp_path / "set", views=2, points=64).build()
    with pytest.raises(DataError, match=r"rooms-00000\.tar room 8: cannot be read, the shard is damaged") as caught:
        data[1]
    assert "remove it and run the same prepare_data command again" in str(caught.value)


@pytest.fixture(scope="module")
def two_rooms(tmp_path_factory: pytest.TempPathFactory, surfel_cache: Path) -> Path:
    out = tmp_path_factory.mktemp("rooms") / "two"
    write_rooms(out, RoomShardOptions(**TINY, count=2, first=7))
    return out


def test_a_damaged_npz_is_named(tmp_path: Path) -> None:
    write_rooms(tmp_path / "npz", RoomShardOptions(**TINY, count=1, layout="npz"))
    path = tmp_path / "npz" / "room_00000000.npz"
    path.write_bytes(bytes(path.stat().st_size))
    with pytest.raises(DataError, match=r"room_00000000\.npz room 0: cannot be read"):
        RoomShardsConfig(root=tmp_path / "npz", views=1, points=8).build()[0]


def test_the_command_builds_rooms(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "rooms"
    flags = ["--count", "2", "--views", "1", "--points", "0", "--width", "32", "--height", "24", "--kind", "bathroom", "--out", str(out)]
    assert run("prepare-data", ["rooms", *flags]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "2 rooms in 1 shards" in printed
    assert (out / "contact_sheet.png").exists()
    with tarfile.open(out / "rooms-00000.tar") as tar:
        assert all(member.mtime == 0 for member in tar)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["rooms"], "--out is needed"),
        (["rooms", "--out", "x", "--count", "0"], "count must be at least 1"),
        (["rooms", "--out", "x", "--grid", "4"], "grid must be 0 or at least 8"),
        (["rooms", "--out", "x", "--kind", "cellar"], "kind must be one of"),
        (["rooms", "--out", "x", "--vews", "2"], "unknown flag '--vews'; did you mean '--views'"),
    ],
)
def test_mistakes_end_in_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("prepare-data", arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.slow
def test_a_killed_run_continues(written: Path, tmp_path: Path) -> None:
    out = tmp_path / "killed"
    program = [sys.executable, str(ROOT / "tools" / "prepare_data.py"), "rooms", "--out", str(out)]
    for name, value in OPTIONS.items():
        program += [f"--{name}", str(value)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(program, env=environment, start_new_session=True, stdout=subprocess.DEVNULL)
    try:
        end = time.monotonic() + 60
        while not (out / "rooms-00000.json").exists() and process.poll() is None and time.monotonic() < end:
            time.sleep(0.02)
    finally:
        process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "it ended before it could be killed"
    subprocess.run(program, env=environment, check=True, stdout=subprocess.DEVNULL)
    assert files(out) == files(written)
