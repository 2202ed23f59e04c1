"""Tiny data sets written in the layouts in which the real ones are published."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import h5py
import numpy as np
import pytest

from geossl.data.simulate.surfels import object_surfels


@pytest.fixture(scope="module")
def surfel_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder of its own for prepared objects, empty at first."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setenv("GEOSSL_CACHE", str(folder))
        object_surfels.cache_clear()
        yield folder
        object_surfels.cache_clear()


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(7)


@pytest.fixture
def shapenet_root(tmp_path: Path, rng: np.random.Generator) -> Path:
    """ShapeNet55 as packaged by Point-BERT: lists, and one npy of 8,192 points per shape."""
    names = {"train": ["02691156-a1.npy", "02691156-b2.npy", "04379243-c3.npy"], "test": ["04379243-d4.npy"]}
    root = tmp_path / "ShapeNet55-34"
    (root / "ShapeNet-55").mkdir(parents=True)
    (root / "shapenet_pc").mkdir()
    for split, files in names.items():
        (root / "ShapeNet-55" / f"{split}.txt").write_text("\n".join(files) + "\n")
        for file in files:
            np.save(root / "shapenet_pc" / file, rng.normal(size=(8192, 3)).astype(np.float32))
    return root


def unit_rows(rng: np.random.Generator, count: int) -> np.ndarray:
    normal = rng.normal(size=(count, 3))
    return normal / np.linalg.norm(normal, axis=1, keepdims=True)


@pytest.fixture
def modelnet_resampled(tmp_path: Path, rng: np.random.Generator) -> Path:
    """modelnet40_normal_resampled: comma-separated x,y,z,nx,ny,nz, names of shapes and lists."""
    root = tmp_path / "modelnet40_normal_resampled"
    root.mkdir()
    (root / "modelnet40_shape_names.txt").write_text("airplane\nnight_stand\n")
    (root / "modelnet40_train.txt").write_text("airplane_0001\nnight_stand_0001\nnight_stand_0002\n")
    (root / "modelnet40_test.txt").write_text("airplane_0002\n")
    for name in ("airplane_0001", "airplane_0002", "night_stand_0001", "night_stand_0002"):
        folder = root / name.rsplit("_", 1)[0]
        folder.mkdir(exist_ok=True)
        table = np.concatenate([rng.normal(size=(50, 3)), unit_rows(rng, 50)], axis=1)
        np.savetxt(folder / f"{name}.txt", table, delimiter=",", fmt="%.6f")
    return root


@pytest.fixture
def modelnet_hdf5(tmp_path: Path, rng: np.random.Generator) -> Path:
    """modelnet40_ply_hdf5_2048: files of many clouds; the lists name paths that only existed on the makers' machine."""
    root = tmp_path / "modelnet40_ply_hdf5_2048"
    root.mkdir()
    (root / "shape_names.txt").write_text("airplane\nbathtub\nbed\n")
    for split, sizes in {"train": (3, 2), "test": (2,)}.items():
        names = []
        for number, size in enumerate(sizes):
            names.append(f"data/modelnet40_ply_hdf5_2048/ply_data_{split}{number}.h5")
            with h5py.File(root / Path(names[-1]).name, "w") as file:
                file["data"] = rng.normal(size=(size, 2048, 3)).astype(np.float32)
                file["normal"] = np.stack([unit_rows(rng, 2048) for _ in range(size)]).astype(np.float32)
                file["label"] = rng.integers(0, 3, size=(size, 1)).astype(np.uint8)
        (root / f"{split}_files.txt").write_text("\n".join(names) + "\n")
    return root


@pytest.fixture
def scanobjectnn_root(tmp_path: Path, rng: np.random.Generator) -> Path:
    """ScanObjectNN's h5_files: data and label, several variants."""
    root = tmp_path / "h5_files"
    for folder, end in (
        ("main_split", "objectdataset.h5"),
        ("main_split", "objectdataset_augmentedrot_scale75.h5"),
        ("main_split_nobg", "objectdataset.h5"),
    ):
        (root / folder).mkdir(parents=True, exist_ok=True)
        for prefix, size in (("training_", 3), ("test_", 2)):
            with h5py.File(root / folder / (prefix + end), "w") as file:
                file["data"] = rng.normal(size=(size, 2048, 3)).astype(np.float32)
                file["label"] = np.arange(size, dtype=np.int32) * 7
    return root


@pytest.fixture
def mesh_folder(tmp_path: Path) -> Callable[[int], Path]:
    """A folder with two classes of small meshes; call it with the number of files per class."""

    def make(per_class: int) -> Path:
        root = tmp_path / "meshes"
        for name in ("tent", "slab"):
            (root / name).mkdir(parents=True, exist_ok=True)
            for number in range(per_class):
                height = 1.0 + number / per_class if name == "tent" else 0.1
                write_pyramid(root / name / f"{name}_{number:03d}.obj", height)
        return root

    return make


def write_pyramid(path: Path, height: float) -> None:
    """A square pyramid as OBJ."""
    corners = "v 0 0 0\nv 1 0 0\nv 1 1 0\nv 0 1 0\n"
    path.write_text(f"{corners}v 0.5 0.5 {height}\nf 1 2 3\nf 1 3 4\nf 1 2 5\nf 2 3 5\nf 3 4 5\nf 4 1 5\n")
