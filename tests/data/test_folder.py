"""A user's own folder of files as a data set."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from geossl.data import FileOptions, FolderConfig, build_loader
from geossl.data.folder import find_files
from geossl.errors import ConfigError, DataError


@pytest.fixture
def clouds(tmp_path: Path, rng: np.random.Generator) -> Path:
    """Twelve clouds in two classes, and one outside of them."""
    root = tmp_path / "mine"
    for number in range(12):
        folder = root / ("cup" if number % 2 else "lid")
        folder.mkdir(parents=True, exist_ok=True)
        np.save(folder / f"{number}.npy", rng.normal(size=(30, 3)))
    np.save(root / "loose.npy", rng.normal(size=(30, 3)))
    (root / "cup" / "notes.md").write_text("not a cloud")
    (root / ".cache").mkdir()
    (root / ".cache" / "hidden.npy").write_bytes(b"")
    return root


def test_classes_are_the_sub_folders(clouds: Path) -> None:
    dataset = FolderConfig(root=clouds, points=16).build("all")
    assert dataset.classes == ["cup", "lid"]
    assert len(dataset) == 13
    assert dataset.labels[dataset.names.index("loose.npy")] == -1
    assert dataset.labels[dataset.names.index("cup/3.npy")] == 0
    assert next(build_loader(dataset, 13, seed=0)).points.lengths.tolist() == [16] * 13


def test_held_out_files_depend_on_their_names(clouds: Path) -> None:
    options = FileOptions(test_fraction=0.3)
    train, test = (set(FolderConfig(root=clouds, points=16, files=options).build(split).names) for split in ("train", "test"))
    assert len(test) == 4
    assert not train & test
    assert len(train | test) == 13
    clouds.rename(clouds.with_name("moved"))
    assert set(FolderConfig(root=clouds.with_name("moved"), points=16, files=options).build("test").names) == test


def test_folders_named_for_the_split_and_lists_go_first(clouds: Path, tmp_path: Path) -> None:
    (clouds / "cup").rename(clouds / "cups")
    (clouds / "test" / "cups").mkdir(parents=True)
    (clouds / "cups" / "1.npy").rename(clouds / "test" / "cups" / "1.npy")
    found = find_files(clouds, FileOptions())
    assert [name for name, test in zip(found.names, found.test, strict=True) if test] == ["test/cups/1.npy"]
    assert found.classes == ["cups", "lid"]
    (tmp_path / "held_out.txt").write_text("lid/0\n2.npy\n4\n")
    found = find_files(clouds, FileOptions(test_list=tmp_path / "held_out.txt"))
    assert [name for name, test in zip(found.names, found.test, strict=True) if test] == ["lid/0.npy", "lid/2.npy", "lid/4.npy"]
    (tmp_path / "held_out.txt").write_text("nothing\n")
    with pytest.raises(DataError, match=r"held_out\.txt: none of its lines names a file"):
        find_files(clouds, FileOptions(test_list=tmp_path / "held_out.txt"))


def test_a_bad_file_is_an_error_or_left_out_with_a_count(clouds: Path, caplog: pytest.LogCaptureFixture) -> None:
    np.save(clouds / "cup" / "bad.npy", np.full((30, 3), np.nan))
    (clouds / "lid" / "worse.ply").write_bytes(b"ply")
    with pytest.raises(DataError, match=r"cup/bad\.npy: coord row 0 \(from 0\) is not finite"):
        FolderConfig(root=clouds).build("all")
    with caplog.at_level(logging.WARNING, logger="geossl"):
        dataset = FolderConfig(root=clouds, files=FileOptions(on_bad="skip")).build("all")
    assert len(dataset) == 13
    assert len(dataset.skipped) == 2
    assert "left out 2 of 15 files; the first:" in caplog.text
    assert "cup/bad.npy" in caplog.text


def test_suffixes_choose_the_files(clouds: Path) -> None:
    (clouds / "cup" / "1.xyz").write_text("0 0 0\n1 1 1\n")
    assert find_files(clouds, FileOptions(suffixes=("XYZ",))).names == ["cup/1.xyz"]
    with pytest.raises(ConfigError, match="suffixes must be among"):
        FileOptions(suffixes=("blend",))


def test_excluded_names_are_no_clouds(clouds: Path) -> None:
    assert find_files(clouds, FileOptions(exclude=("cup/*", "*/1?.npy"))).names == [
        "lid/0.npy",
        "lid/2.npy",
        "lid/4.npy",
        "lid/6.npy",
        "lid/8.npy",
        "loose.npy",
    ]


def test_large_clouds_are_thinned_and_y_up_is_turned(tmp_path: Path, rng: np.random.Generator) -> None:
    points = rng.normal(size=(500, 3)).astype(np.float32)
    np.save(tmp_path / "a.npy", points)
    options = FileOptions(points=100, up="y", test_fraction=0.0)
    one, two = (FolderConfig(root=tmp_path, normalize="none", files=options).build("train").read(0).coord for _ in range(2))
    assert one.shape == (100, 3)
    assert np.array_equal(one, two)
    stored = {tuple(point) for point in points.tolist()}
    assert {(x, z, -y) for x, y, z in one.tolist()} <= stored  # (x, y, z) of the file becomes (x, -z, y)


def test_normals_turn_with_the_points(tmp_path: Path) -> None:
    (tmp_path / "floor.obj").write_text("v 0 0 0\nv 0 0 1\nv 1 0 0\nf 1 2 3\n")  # y is up
    dataset = FolderConfig(root=tmp_path, columns="xyz+normal", points=8, files=FileOptions(up="y", test_fraction=0.0)).build("train")
    assert np.allclose(dataset.get(0).points[:, 3:], [0, 0, 1], atol=1e-6)


def test_empty_parts_and_folders_say_so(clouds: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"the test part is empty \(13 files in all, 0 left out\)"):
        FolderConfig(root=clouds, files=FileOptions(test_fraction=0.0)).build("test")
    (tmp_path / "void").mkdir()
    with pytest.raises(DataError, match=r"void: no file ends in .*; is this the right folder"):
        FolderConfig(root=tmp_path / "void").build("train")
    with pytest.raises(DataError, match="this folder does not exist"):
        FolderConfig(root=tmp_path / "none").build("train")
    with pytest.raises(DataError, match="unknown split 'dev'"):
        FolderConfig(root=clouds).build("dev")


def test_meshes_and_clouds_mix(mesh_folder: Callable[[int], Path], rng: np.random.Generator) -> None:
    root = mesh_folder(2)
    np.savetxt(root / "slab" / "scan.xyz", rng.normal(size=(40, 3)))
    dataset = FolderConfig(root=root, points=32).build("all")
    assert len(dataset) == 5
    assert {len(dataset.read(row)) for row in range(5)} == {8192, 40}
    with pytest.raises(DataError, match=r"scan\.xyz: columns='xyz\+normal' asks for normal"):
        FolderConfig(root=root, points=32, columns="xyz+normal").build("all")
