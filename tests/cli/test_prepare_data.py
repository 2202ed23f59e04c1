"""``geossl prepare-data`` as a user runs it, and as a power failure ends it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import trimesh

from geossl.cli import run
from geossl.data import (
    EventShardOptions,
    EventShardsConfig,
    FileOptions,
    LArTPCFileOptions,
    LArTPCOptions,
    ModelNet40Config,
    PILArNetConfig,
    ShardOptions,
    ShardsConfig,
    build_loader,
    check_shards,
    simulate_event,
    write_event_shards,
    write_lartpc,
    write_pilarnet,
    write_shards,
)
from geossl.errors import DataError

ROOT = Path(__file__).parents[2]


@pytest.fixture
def meshes(tmp_path: Path) -> Path:
    """Folders ``ball`` and ``box`` with three meshes each."""
    for number in range(3):
        for name, mesh in (("ball", trimesh.creation.icosphere(1)), ("box", trimesh.creation.box((1, 1, 1 + number)))):
            (tmp_path / "source" / name).mkdir(parents=True, exist_ok=True)
            mesh.export(tmp_path / "source" / name / f"{number}.ply")
    return tmp_path / "source"


def test_a_folder_becomes_a_data_set(meshes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    flags = ["--source", str(meshes), "--out", str(out), "--points", "100", "--test_fraction", "0"]
    assert run("prepare-data", ["folder", *flags]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "6 clouds in 1 shards, 2 classes" in printed
    assert f"use it with: --data.name shards --data.root {out}" in printed
    batch = next(build_loader(ShardsConfig(root=out, points=50).build("train"), 6, seed=0))
    assert batch.points.lengths.tolist() == [50] * 6
    assert sorted(batch.label.tolist()) == [0, 0, 0, 1, 1, 1]
    assert run("prepare-data", ["check", "--source", str(out)]) == 0
    assert "all 6 files have the checksums" in capsys.readouterr().out


def test_left_out_files_are_counted(meshes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (meshes / "ball" / "9.ply").write_text("ply\n")
    flags = ["folder", "--source", str(meshes), "--out", str(tmp_path / "out"), "--on_bad", "skip"]
    assert run("prepare-data", flags) == 0
    assert "warning: left out 1 files that could not be used; the first:" in capsys.readouterr().out


def test_modelnet_text_files_are_converted_as_documented(tmp_path: Path) -> None:
    root, rng = tmp_path / "modelnet40_normal_resampled", np.random.default_rng(0)
    for name in ("bed_0001", "bed_0002", "tv_stand_0001"):
        folder = root / name.rsplit("_", 1)[0]
        folder.mkdir(parents=True, exist_ok=True)
        np.savetxt(
            folder / f"{name}.txt", np.hstack([rng.normal(size=(40, 3)), np.tile([0.0, 1.0, 0.0], (40, 1))]), delimiter=",", fmt="%.6f"
        )
    (root / "modelnet40_shape_names.txt").write_text("bed\ntv_stand\n")
    (root / "modelnet40_train.txt").write_text("bed_0001\ntv_stand_0001\n")
    (root / "modelnet40_test.txt").write_text("bed_0002\n")
    (root / "filelist.txt").write_text("bed/bed_0001.txt\n")
    flags = ["folder", "--source", str(root), "--out", str(tmp_path / "out"), "--points", "10000", "--suffixes", ".txt"]
    flags += ["--exclude", "modelnet*.txt", "filelist.txt", "--test_list", str(root / "modelnet40_test.txt")]
    assert run("prepare-data", flags) == 0
    for split in ("train", "test"):
        text = ModelNet40Config(root=root, points=32, columns="xyz+normal").build(split)
        shards = ShardsConfig(root=tmp_path / "out", points=32, columns="xyz+normal", normalize="cloud").build(split)
        assert shards.classes == text.classes
        assert shards.labels.tolist() == text.labels.tolist()
        assert all(np.allclose(shards.get(row).points, text.get(row).points, atol=1e-5) for row in range(len(text)))


def test_events_are_simulated_and_read_with_the_printed_flags(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "train" / "events.h5"
    flags = ["lartpc", "--events", "20", "--seed", "3", "--version", "2", "--simulation.vertices", "2", "2", "--out", str(out)]
    assert run("prepare-data", flags) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "20 events" in printed
    assert f"use it with: --data.name pilarnet --data.root {out}" in printed
    dataset = PILArNetConfig(root=out).build("train")
    assert len(dataset) == 20
    assert np.array_equal(dataset.read(17).voxel, simulate_event(3, 17, LArTPCOptions(vertices=(2, 2))).voxel)
    first = out.read_bytes()
    out.unlink()
    assert run("prepare-data", [*flags, "--workers", "2"]) == 0
    assert out.read_bytes() == first


def test_files_of_events_become_shards(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = tmp_path / "train" / "events.h5", tmp_path / "out"
    write_lartpc(source, LArTPCFileOptions(events=5))
    flags = ["events", "--source", str(tmp_path), "--out", str(out), "--events_per_shard", "2"]
    assert run("prepare-data", flags) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "5 events of" in printed
    assert "points in 3 shards" in printed
    assert f"use it with: --data.name event_shards --data.root {out}" in printed
    assert len(EventShardsConfig(root=out).build("train")) == 5
    assert run("prepare-data", ["check", "--source", str(out)]) == 0
    assert "all 15 files have the checksums" in capsys.readouterr().out
    with h5py.File(source, "r+") as file:
        file["cluster"][2] = file["cluster"][2][:-1]
    assert run("prepare-data", [*flags, "--on_bad", "skip"]) == 0
    assert "warning: left out 1 events that could not be used; the first:" in capsys.readouterr().out
    assert run("prepare-data", flags) == 2
    assert "events.h5 event 2: cluster has" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["events", "--out", "x"], "--source is needed"),
        (["events", "--source", "nowhere", "--out", "x"], "nowhere: this file or folder does not exist"),
        (["lartpc", "--version", "3"], "version must be 1 or 2, got 3"),
        (["lartpc", "--events", "0"], "events must be at least 1, got 0"),
        (["lartpc", "--simulation.vertices", "3", "1"], "simulation.vertices must be two rising numbers of at least 1, got (3, 1)"),
        (["folder", "--out", "x"], "--source is needed"),
        (["folder", "--source", "nowhere", "--out", "x"], "nowhere: this folder does not exist"),
        (["folder", "--sauce", "x"], "unknown flag '--sauce'; did you mean '--source'"),
        (["folder", "--points", "1"], "points must be at least 2"),
        (["folder", "--workers", "0"], "workers must be at least 1"),
        (["foldr"], "unknown prepare-data command 'foldr'; did you mean 'folder'?"),
        (["check", "--source", "/"], "index.json: this index of a shard set"),
    ],
)
def test_mistakes_end_in_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("prepare-data", arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert "Traceback" not in error


def test_help_shows_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("prepare-data", ["--help"]) == 0
    assert "prepare_data.py folder --source" in capsys.readouterr().out
    assert run("prepare-data", []) == 2


def wait_for(condition: Callable[[], bool], seconds: float) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.02)
    return False


def group_is_gone(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return True
    return False


@pytest.fixture
def many_files(tmp_path: Path) -> Path:
    source = tmp_path / "many"
    source.mkdir()
    rng = np.random.default_rng(0)
    for number in range(400):
        np.save(source / f"{number:03d}.npy", rng.normal(size=(2000, 3)))
    return source


@pytest.fixture
def many_events(tmp_path: Path) -> Path:
    event = simulate_event(0, 0)
    write_pilarnet(tmp_path / "many.h5", [event] * 800)
    return tmp_path / "many.h5"


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_a_killed_conversion_continues(workers: int, many_files: Path, tmp_path: Path) -> None:
    flags = ["folder", "--source", str(many_files), "--points", "500", "--clouds_per_shard", "4", "--workers", str(workers)]
    index = killed_and_continued(flags, tmp_path / "out", 100, lambda out: ShardsConfig(root=out).build("all"))
    assert sum(shard["clouds"] for shard in index["shards"]) == 400
    assert check_shards(tmp_path / "out") == 500
    assert index == write_shards(many_files, tmp_path / "straight", FileOptions(points=500), ShardOptions(clouds_per_shard=4))


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_a_killed_conversion_of_events_continues(workers: int, many_events: Path, tmp_path: Path) -> None:
    flags = ["events", "--source", str(many_events), "--events_per_shard", "8", "--workers", str(workers)]
    index = killed_and_continued(flags, tmp_path / "out", 100, lambda out: EventShardsConfig(root=out).build("all"))
    assert sum(shard["events"] for shard in index["shards"]) == 800
    assert check_shards(tmp_path / "out") == 500
    assert index == write_event_shards(many_events, tmp_path / "straight", EventShardOptions(events_per_shard=8))


def written(root: Path) -> dict[str, int]:
    """When each shard was written."""
    return {path.parent.name: path.stat().st_mtime_ns for path in root.glob("shard_*/shard.json")}


def killed_and_continued(flags: list[str], out: Path, shards: int, build: Callable[[Path], object]) -> dict[str, Any]:
    """Run ``prepare-data``, kill it after some shards, run it again, and return the index."""
    program = [sys.executable, str(ROOT / "tools" / "prepare_data.py"), *flags, "--out", str(out)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(program, env=environment, start_new_session=True, stdout=subprocess.DEVNULL)
    try:
        assert wait_for(lambda: (out / "shard_00004" / "shard.json").exists() or process.poll() is not None, 60)
    finally:
        process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "it ended before it could be killed"
    assert wait_for(lambda: group_is_gone(process.pid), 20), "workers outlived the killed program"

    done = written(out)
    assert 5 <= len(done) < shards
    assert not json.loads((out / "index.json").read_text())["complete"]
    with pytest.raises(DataError, match="interrupted; run the same prepare_data command again"):
        build(out)

    subprocess.run(program, env=environment, capture_output=True, text=True, check=True)
    after = written(out)
    assert len(after) == shards
    assert {name: after[name] for name in done} == done, "finished shards were converted again"
    assert [path.name for path in out.iterdir() if path.name.startswith(".")] == []
    return dict(json.loads((out / "index.json").read_text()))
