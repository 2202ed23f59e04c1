"""Memory-mapped shards: what is written, what is read back, and what damage is found."""

from __future__ import annotations

import errno
import json
import pickle
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from geossl.data import FileOptions, FolderConfig, ShardOptions, ShardsConfig, build_loader, check_shards, write_shards
from geossl.errors import DataError

SMALL = ShardOptions(clouds_per_shard=3)


def convert(source: Path, out: Path, options: ShardOptions = SMALL, **files: object) -> dict:
    return write_shards(source, out, FileOptions(**{"points": 64, **files}), options)


@pytest.fixture
def shard_set(mesh_folder: Callable[[int], Path], tmp_path: Path) -> Path:
    convert(mesh_folder(4), tmp_path / "shards", test_fraction=0.25)
    return tmp_path / "shards"


def test_shards_hold_what_the_folder_holds(shard_set: Path, tmp_path: Path) -> None:
    index = json.loads((shard_set / "index.json").read_text())
    assert index["complete"]
    assert [shard["clouds"] for shard in index["shards"]] == [3, 3, 2]
    assert check_shards(shard_set) == 3 * 6
    files = FileOptions(points=64, test_fraction=0.25)
    for split in ("train", "test", "all"):
        config = FolderConfig(root=tmp_path / "meshes", points=32, columns="xyz+normal", normalize="none", files=files)
        direct, stored = config.build(split), ShardsConfig(root=shard_set, points=32, columns="xyz+normal", normalize="none").build(split)
        direct.config.files.center = False
        assert stored.classes == direct.classes == ["slab", "tent"]
        assert stored.labels.tolist() == direct.labels.tolist()
        for row in range(len(direct)):
            assert np.array_equal(stored.read(row).coord, direct.read(row).coord)
            assert np.abs(stored.get(row).points[:, 3:] - direct.get(row).points[:, 3:]).max() < 0.01  # 8-bit normals
    names = [name for shard in index["shards"] for name in (shard_set / shard["folder"] / "names.txt").read_text().split()]
    assert names == config.build("all").names


def test_clouds_of_different_sizes_and_colours(tmp_path: Path, rng: np.random.Generator) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for count in (2, 7, 30):
        np.savez(source / f"{count:02d}.npz", xyz=rng.normal(size=(count, 3)), rgb=rng.integers(0, 256, (count, 3)).astype(np.uint8))
    index = convert(source, tmp_path / "out", test_fraction=0.0)
    assert index["settings"]["columns"] == "xyz+rgb"
    dataset = ShardsConfig(root=tmp_path / "out", columns="xyz+rgb", normalize="none").build("train")
    for row, count in enumerate((2, 7, 30)):
        with np.load(source / f"{count:02d}.npz") as stored:
            assert np.array_equal(dataset.read(row).coord, stored["xyz"].astype(np.float32))
            assert np.array_equal(np.rint(dataset.get(row).points[:, 3:] * 255), stored["rgb"])
    with pytest.raises(DataError, match="asks for normal, which these shards do not have"):
        ShardsConfig(root=tmp_path / "out", columns="all").build("train")


def test_shards_are_mapped_and_travel_to_workers_without_their_data(tmp_path: Path, rng: np.random.Generator) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for number in range(12):
        np.save(source / f"{number}.npy", rng.normal(size=(40_000, 3)).astype(np.float32))
    convert(source, tmp_path / "out", points=40_000, test_fraction=0.0)
    tracemalloc.start()
    dataset = ShardsConfig(root=tmp_path / "out", points=100).build("train")
    for row in range(12):
        dataset.get(row, np.random.default_rng(row))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4e6  # 5.8 MB are stored; one cloud is 0.48 MB
    assert len(pickle.dumps(dataset)) < 10_000
    alone, parallel = (build_loader(dataset, 4, seed=0, workers=workers) for workers in (0, 2))
    for _ in range(3):
        assert torch.equal(next(alone).points.coord, next(parallel).points.coord)
    parallel.close()


@pytest.mark.slow
def test_workers_do_not_change_the_shards(mesh_folder: Callable[[int], Path], tmp_path: Path) -> None:
    source = mesh_folder(4)
    one = convert(source, tmp_path / "one")
    two = convert(source, tmp_path / "two", ShardOptions(clouds_per_shard=3, workers=2))
    assert one == two


def test_finished_shards_are_kept_and_changed_files_are_converted_again(mesh_folder: Callable[[int], Path], tmp_path: Path) -> None:
    source, out = mesh_folder(4), tmp_path / "out"
    first = convert(source, out)
    times = {path.name: path.stat().st_mtime_ns for path in out.glob("shard_*/coord.npy")}
    inodes = [path.stat().st_ino for path in sorted(out.glob("shard_*"))]
    assert convert(source, out) == first
    assert [path.stat().st_ino for path in sorted(out.glob("shard_*"))] == inodes
    changed = source / "tent" / "tent_001.obj"  # the sixth file: in the second shard
    changed.write_text(changed.read_text().replace("1.25", "9.25"))
    second = convert(source, out)
    assert [a == b for a, b in zip(first["shards"], second["shards"], strict=True)] == [True, False, True]
    assert times
    for name in ("tent_002", "tent_003"):
        (source / "tent" / f"{name}.obj").unlink()
    third = convert(source, out)
    assert [shard["clouds"] for shard in third["shards"]] == [3, 3]
    assert sorted(path.name for path in out.iterdir()) == ["index.json", "shard_00000", "shard_00001"]
    assert check_shards(out) == 12


def test_bad_files_end_the_conversion_or_are_counted(mesh_folder: Callable[[int], Path], tmp_path: Path) -> None:
    source, out = mesh_folder(3), tmp_path / "out"
    for number in range(3):  # one whole shard of bad files, and one bad file in another
        (source / "slab" / f"slab_{number:03d}.obj").write_text("v 0 0 0\nv 1 1 1\nv 2 2 2\nf 1 2 3\n")
    (source / "tent" / "tent_002.obj").write_text("v 0 0 nan\nv 1 0 0\nv 0 1 0\nf 1 2 3\n")
    with pytest.raises(DataError, match=r"slab_000\.obj: all its faces have no area.*; repair or remove the file.*on_bad=skip"):
        convert(source, out)
    with pytest.raises(DataError, match="the conversion was interrupted"):
        ShardsConfig(root=out).build("all")
    index = convert(source, out, on_bad="skip")
    assert [len(shard["skipped"]) for shard in index["shards"]] == [3, 1]
    dataset = ShardsConfig(root=out, points=16).build("all")
    assert len(dataset) == 2
    assert dataset.get(1).points.shape == (16, 3)
    with pytest.raises(DataError, match=r"slab_000\.obj: all its faces have no area"):
        convert(source, out)  # a shard with files left out does not count as finished
    for path in source.rglob("*.obj"):
        path.write_text("")
    with pytest.raises(DataError, match=r"can be read|could be used"):
        convert(source, tmp_path / "nothing", on_bad="skip")


def test_other_folders_and_settings_are_not_overwritten(mesh_folder: Callable[[int], Path], shard_set: Path, tmp_path: Path) -> None:
    source = tmp_path / "meshes"
    with pytest.raises(DataError, match=r"holds shards made with other settings \(points: 64 -> 99.*remove it or choose another"):
        convert(source, shard_set, points=99)
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("")
    with pytest.raises(DataError, match="thesis: is not empty and holds no shard set"):
        convert(source, tmp_path / "thesis")
    assert (tmp_path / "thesis" / "chapter.tex").exists()


def test_a_full_disk_leaves_no_half_written_shard(
    mesh_folder: Callable[[int], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out, save, written = mesh_folder(4), tmp_path / "out", np.save, []

    def full(file: object, arr: np.ndarray) -> None:
        written.append(arr)
        if len(written) == 8:  # in the middle of the second shard
            raise OSError(errno.ENOSPC, "No space left on device")
        save(file, arr)

    monkeypatch.setattr(np, "save", full)
    with pytest.raises(DataError, match=r"could not be written .*No space left on device"):
        convert(source, out)
    assert sorted(path.name for path in out.iterdir()) == ["index.json", "shard_00000"]
    monkeypatch.undo()
    assert len(convert(source, out)["shards"]) == 3
    assert check_shards(out) == 18


def damage_truncate(root: Path) -> str:
    path = root / "shard_00001" / "coord.npy"
    path.write_bytes(path.read_bytes()[:-40])
    return r"shard_00001/coord\.npy: has \d+ bytes, the index says"


def damage_missing(root: Path) -> str:
    (root / "shard_00002" / "label.npy").unlink()
    return r"shard_00002/label\.npy: this file does not exist"


def damage_index(root: Path) -> str:
    (root / "index.json").write_text('{"format": "geossl-sh')
    return r"index\.json: is damaged or truncated"


def damage_version(root: Path) -> str:
    (root / "index.json").write_text(json.dumps({"format": "geossl-shards", "version": 99}))
    return r"expected geossl-shards version 1, got geossl-shards version 99"


def damage_no_index(root: Path) -> str:
    (root / "index.json").unlink()
    return r"index of a shard set \(made by tools/prepare_data\.py\) does not exist"


@pytest.mark.parametrize("damage", [damage_truncate, damage_missing, damage_index, damage_version, damage_no_index])
def test_damage_is_found_when_the_set_is_opened(damage: Callable[[Path], str], shard_set: Path) -> None:
    message = damage(shard_set)
    with pytest.raises(DataError, match=message):
        ShardsConfig(root=shard_set).build("train")


def test_a_flipped_byte_is_found_by_the_checksum(shard_set: Path) -> None:
    path = shard_set / "shard_00001" / "coord.npy"
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    ShardsConfig(root=shard_set).build("train")  # sizes agree
    with pytest.raises(DataError, match=r"shard_00001/coord\.npy: its checksum is not that of the index"):
        ShardsConfig(root=shard_set, check=True).build("train")


def test_a_nan_in_a_shard_is_located(shard_set: Path) -> None:
    path = shard_set / "shard_00001" / "coord.npy"
    coord = np.load(path)
    coord[64 + 5, 2] = np.nan
    np.save(path, coord)
    dataset = ShardsConfig(root=shard_set).build("all")
    with pytest.raises(DataError, match=r"shard_00001 cloud 1: coord row 5 \(from 0\) is not finite"):
        dataset.get(4)


def test_splits(shard_set: Path) -> None:
    config = ShardsConfig(root=shard_set)
    assert [len(config.build(split)) for split in ("train", "test", "all")] == [6, 2, 8]
    with pytest.raises(DataError, match="unknown split"):
        config.build("dev")
