"""Readers of the published formats, on tiny files in the published layouts."""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np
import pytest

from geossl.config import from_dict, to_dict, to_yaml
from geossl.data import DATASETS, ModelNet40Config, ObjectsConfig, PointDataset, ScanObjectNNConfig, ShapeNet55Config
from geossl.errors import DataError


def check_protocol(dataset: PointDataset, points: int) -> None:
    """What every data set promises."""
    assert len(dataset) == len(dataset.labels) == len(dataset.groups) > 0
    assert dataset.labels.dtype == np.int64
    assert dataset.labels.min() >= -1
    assert dataset.labels.max() < len(dataset.classes)
    for row in (0, len(dataset) - 1):
        still, again = dataset.get(row), dataset.get(row)
        assert still.points.shape == (points, dataset.channels)
        assert still.points.dtype == np.float32
        assert np.array_equal(still.points, again.points)
        assert (still.index, still.label) == (row, dataset.labels[row])
        moved = [dataset.get(row, np.random.default_rng(seed)).points for seed in (0, 0, 1)]
        assert np.array_equal(moved[0], moved[1])
        assert not np.array_equal(moved[0], moved[2])
        if dataset.config.normalize == "subset":
            assert np.linalg.norm(still.points[:, :3], axis=1).max() == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize("name", DATASETS.names())
def test_every_configuration_survives_yaml(name: str) -> None:
    config = DATASETS.config(name)
    assert config.name == name
    assert from_dict(type(config), to_dict(config)) == config
    assert f"name: {name}" in to_yaml(config)


def test_objects_follow_the_protocol() -> None:
    check_protocol(ObjectsConfig(points=128, columns="all").build("test"), 128)


# --- ShapeNet55


def test_shapenet_lists_and_files(shapenet_root: Path) -> None:
    config = ShapeNet55Config(root=shapenet_root, points=2048)
    train, test, everything = (config.build(split) for split in ("train", "test", "all"))
    assert (len(train), len(test), len(everything)) == (3, 1, 4)
    assert train.classes == test.classes == ["02691156", "04379243"]
    assert train.labels.tolist() == [0, 0, 1]
    assert test.labels.tolist() == [1]
    check_protocol(train, 2048)
    stored = np.load(shapenet_root / "shapenet_pc" / "02691156-a1.npy")[:2048]
    stored = stored - stored.mean(axis=0)
    assert np.allclose(train.get(0).points, stored / np.linalg.norm(stored, axis=1).max(), atol=1e-6)


def test_shapenet_errors_name_the_file(shapenet_root: Path) -> None:
    config = ShapeNet55Config(root=shapenet_root)
    (shapenet_root / "shapenet_pc" / "02691156-b2.npy").unlink()
    with pytest.raises(DataError, match=r"02691156-b2\.npy: this file does not exist"):
        config.build("train").get(1)
    np.save(shapenet_root / "shapenet_pc" / "02691156-a1.npy", np.zeros((8192, 4)))
    with pytest.raises(DataError, match=r"02691156-a1\.npy: has 4 columns, but columns='xyz' means 3"):
        config.build("train").get(0)
    with pytest.raises(DataError, match="unknown split 'val'; choose one of train, test, all"):
        config.build("val")
    (shapenet_root / "ShapeNet-55" / "train.txt").write_text("chair.obj\n")
    with pytest.raises(DataError, match=r"must name <taxonomy>-<model>\.npy, got 'chair\.obj'"):
        config.build("train")
    (shapenet_root / "ShapeNet-55" / "train.txt").unlink()
    with pytest.raises(DataError, match=r"train\.txt: this file does not exist"):
        config.build("train")
    with pytest.raises(DataError, match="nowhere: this folder does not exist"):
        ShapeNet55Config(root=shapenet_root / "nowhere").build("train")


def test_columns_the_data_does_not_have_are_refused(shapenet_root: Path) -> None:
    with pytest.raises(DataError, match=r"a1\.npy: columns='all' asks for normal and rgb, which this data does not have"):
        ShapeNet55Config(root=shapenet_root, columns="all").build("train").get(0)


# --- ModelNet40


def test_modelnet_normal_resampled(modelnet_resampled: Path) -> None:
    config = ModelNet40Config(root=modelnet_resampled, points=32, columns="xyz+normal")
    train, test = config.build("train"), config.build("test")
    assert train.classes == ["airplane", "night_stand"]
    assert train.labels.tolist() == [0, 1, 1]
    assert test.labels.tolist() == [0]
    check_protocol(train, 32)
    table = np.loadtxt(modelnet_resampled / "night_stand" / "night_stand_0001.txt", delimiter=",")
    cloud = table[:, :3] - table[:, :3].mean(axis=0)  # normalised as a whole, before the points are chosen
    expected = cloud / np.linalg.norm(cloud, axis=1).max()
    assert np.allclose(train.get(1).points[:, :3], expected[:32], atol=1e-5)
    assert np.allclose(train.get(1).points[:, 3:], table[:32, 3:], atol=1e-5)


def test_modelnet_resampled_as_npy(modelnet_resampled: Path) -> None:
    before = ModelNet40Config(root=modelnet_resampled, points=32).build("train")
    expected = [before.get(row).points for row in range(3)]
    for path in modelnet_resampled.glob("*/*.txt"):
        np.save(path.with_suffix(".npy"), np.loadtxt(path, delimiter=",").astype(np.float32))
        path.unlink()
    after = ModelNet40Config(root=modelnet_resampled, points=32).build("train")
    assert all(np.allclose(after.get(row).points, expected[row], atol=1e-6) for row in range(3))


def test_modelnet_hdf5(modelnet_hdf5: Path) -> None:
    config = ModelNet40Config(root=modelnet_hdf5, columns="xyz+normal", normalize="none")
    train, test = config.build("train"), config.build("test")
    assert (len(train), len(test)) == (5, 2)
    assert train.classes == ["airplane", "bathtub", "bed"]
    check_protocol(train, 1024)
    with h5py.File(modelnet_hdf5 / "ply_data_train1.h5") as file:
        assert np.array_equal(train.get(3).points[:, :3], file["data"][0, :1024])
        assert np.array_equal(train.get(3).points[:, 3:], file["normal"][0, :1024])
        assert train.labels[3:].tolist() == file["label"][:, 0].tolist()
    assert train.source(3).endswith("ply_data_train1.h5 row 0")


def test_modelnet_class_folders(tmp_path: Path, rng: np.random.Generator) -> None:
    for name, split in (("bed", "train"), ("bed", "test"), ("sofa", "train")):
        folder = tmp_path / name / split
        folder.mkdir(parents=True)
        np.save(folder / f"{name}_0001.npy", rng.normal(size=(64, 3)))
    train = ModelNet40Config(root=tmp_path, points=16).build("train")
    assert train.classes == ["bed", "sofa"]
    assert train.labels.tolist() == [0, 1]
    check_protocol(train, 16)


def test_modelnet_errors(modelnet_resampled: Path, modelnet_hdf5: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"is no known packaging of ModelNet40; expected modelnet40_train\.txt"):
        ModelNet40Config(root=tmp_path).build("train")
    with pytest.raises(DataError, match="unknown split 'val'; choose one of train, test, all"):
        ModelNet40Config(root=modelnet_resampled).build("val")
    path = modelnet_resampled / "airplane" / "airplane_0001.txt"
    path.write_text(path.read_text()[:-30])  # cut within the last line
    with pytest.raises(DataError, match=r"airplane_0001\.txt: is not a table of numbers, or it is truncated"):
        ModelNet40Config(root=modelnet_resampled).build("train").get(0)
    (modelnet_resampled / "modelnet40_test.txt").write_text("spaceship_0001\n")
    with pytest.raises(DataError, match="'spaceship_0001' is of class 'spaceship', not in"):
        ModelNet40Config(root=modelnet_resampled).build("test")
    broken = modelnet_hdf5 / "ply_data_test0.h5"
    broken.write_bytes(broken.read_bytes()[:5000])
    with pytest.raises(DataError, match=r"ply_data_test0\.h5: cannot be read as HDF5"):
        ModelNet40Config(root=modelnet_hdf5).build("test")
    (modelnet_hdf5 / "shape_names.txt").write_text("airplane\n")
    with pytest.raises(DataError, match=r"ply_data_train\d\.h5: label row \d \(from 0\) is [12], expected 0\.\.0"):
        ModelNet40Config(root=modelnet_hdf5).build("train")


# --- ScanObjectNN


@pytest.mark.parametrize("variant", ["obj_bg", "obj_only", "pb_t50_rs"])
def test_scanobjectnn(variant: str, scanobjectnn_root: Path) -> None:
    config = ScanObjectNNConfig(root=scanobjectnn_root, variant=variant)
    train, test = config.build("train"), config.build("test")
    assert (len(train), len(test)) == (3, 2)
    assert [train.classes[label] for label in train.labels] == ["bag", "door", "toilet"]
    check_protocol(train, 2048)
    folder = "main_split_nobg" if variant == "obj_only" else "main_split"
    end = "_augmentedrot_scale75" if variant == "pb_t50_rs" else ""
    with h5py.File(scanobjectnn_root / folder / f"test_objectdataset{end}.h5") as file:
        assert np.array_equal(test.get(1).points, file["data"][1])  # as published: not normalised


def test_scanobjectnn_errors(scanobjectnn_root: Path) -> None:
    path = scanobjectnn_root / "main_split" / "training_objectdataset.h5"
    for content, message in (
        ({"data": np.zeros((2, 8, 3)), "label": np.zeros(3, int)}, "has 2 clouds, but 3 labels"),
        ({"data": np.zeros((2, 8, 2)), "label": np.zeros(2, int)}, r"data must be \[2, N, 3\], got \[2, 8, 2\]"),
        ({"data": np.zeros((2, 8, 3))}, "has no array label"),
        ({"data": np.zeros((2, 8, 3)), "label": np.array([0, 15])}, r"label row 1 \(from 0\) is 15, expected 0\.\.14"),
    ):
        with h5py.File(path, "w") as file:
            for name, values in content.items():
                file[name] = values
        with pytest.raises(DataError, match=message) as caught:
            ScanObjectNNConfig(root=scanobjectnn_root, variant="obj_bg").build("train")
        assert str(path) in str(caught.value)


def test_a_nan_inside_a_file_of_many_clouds_is_located(scanobjectnn_root: Path) -> None:
    with h5py.File(scanobjectnn_root / "main_split" / "test_objectdataset.h5", "r+") as file:
        file["data"][1, 77, 2] = np.nan
    dataset = ScanObjectNNConfig(root=scanobjectnn_root, variant="obj_bg").build("test")
    dataset.get(0)
    with pytest.raises(DataError, match=r"test_objectdataset\.h5 row 1: coord row 77 \(from 0\) is not finite"):
        dataset.get(1)


def test_all_is_train_then_test(modelnet_resampled: Path, modelnet_hdf5: Path, scanobjectnn_root: Path) -> None:
    for config in (
        ModelNet40Config(root=modelnet_resampled, points=8),
        ModelNet40Config(root=modelnet_hdf5),
        ScanObjectNNConfig(root=scanobjectnn_root),
    ):
        train, test, everything = (config.build(split) for split in ("train", "test", "all"))
        assert everything.labels.tolist() == train.labels.tolist() + test.labels.tolist()
        assert [everything.source(row) for row in range(len(everything))] == [
            *[train.source(row) for row in range(len(train))],
            *[test.source(row) for row in range(len(test))],
        ]
        assert np.array_equal(everything.get(len(train)).points, test.get(0).points)


# --- choosing points


def test_points_can_be_chosen_by_farthest_point_sampling(scanobjectnn_root: Path) -> None:
    config = ScanObjectNNConfig(root=scanobjectnn_root, points=64, pool=128, evaluation_points="farthest")
    config.augment.scale, config.augment.shift = (1.0, 1.0), 0.0
    dataset = config.build("train")
    coord = dataset.read(0).coord

    def farthest(count: int) -> np.ndarray:
        chosen, nearest = [0], np.full(len(coord), np.inf)
        while len(chosen) < count:
            nearest = np.minimum(nearest, np.square(coord - coord[chosen[-1]]).sum(axis=1))
            chosen.append(int(nearest.argmax()))
        return coord[chosen]

    assert np.array_equal(dataset.get(0, None).points, farthest(64))
    drawn = dataset.get(0, np.random.default_rng(0)).points
    pool = {tuple(point) for point in farthest(128).tolist()}
    assert {tuple(point) for point in drawn.tolist()} <= pool
    assert len(np.unique(drawn, axis=0)) == 64
