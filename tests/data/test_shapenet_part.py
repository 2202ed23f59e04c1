"""ShapeNetPart in its published layout: what is read, and what is refused with the file's name."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from geossl.data import ShapeNetPartConfig, collate
from geossl.data.shapenet_part import FIRST_PART, PARTS
from geossl.errors import DataError, UnknownNameError
from geossl.tasks.part_segmentation import SHAPENET_PART_COUNTS


def test_the_published_table_of_parts():
    assert (len(PARTS), sum(PARTS.values())) == (16, 50)
    assert list(PARTS) == sorted(PARTS)
    assert tuple(PARTS.values()) == SHAPENET_PART_COUNTS
    assert [FIRST_PART[name] for name in ("airplane", "chair", "lamp", "motorbike", "table")] == [0, 12, 24, 30, 47]


def test_lists_labels_and_parts(shapenet_part_root: Path):
    config = ShapeNetPartConfig(root=shapenet_part_root, points=40)
    train, test = config.build("train"), config.build("test")
    assert (len(train), len(test), len(config.build("all"))) == (5, 3, 8)  # the validation part is trained on, as published
    assert [train.classes[label] for label in train.labels] == ["bag", "table", "bag", "table", "table"]
    assert (len(train.classes), len(train.parts), train.parts[4], train.parts[-1]) == (16, 50, "bag_0", "table_2")
    table = np.loadtxt(shapenet_part_root / "02773838" / "test0.txt")
    sample = test.get(0)
    assert np.array_equal(sample.point_label, table[:40, 6].astype(int))
    coord = table[:, :3] - table[:, :3].mean(0)
    assert np.allclose(sample.points, coord[:40] / np.linalg.norm(coord, axis=1).max(), atol=1e-5)
    assert ShapeNetPartConfig(root=shapenet_part_root, columns="xyz+normal").build("test").get(0).points.shape == (60, 6)


@pytest.mark.parametrize("options", [{"evaluation_points": "farthest"}, {}])
def test_parts_stay_with_their_points(shapenet_part_root: Path, options: dict):
    """However points are chosen and moved: the parts are slices along z, so that sorted by height they are in order."""
    dataset = ShapeNetPartConfig(root=shapenet_part_root, points=40, pool=50, **options).build("train")
    dataset.config.augment.dropout = 0.3
    for rng in (None, np.random.default_rng(0)):
        samples = [dataset.get(row, rng) for row in range(len(dataset))]
        for sample in samples:
            assert len(sample.point_label) == len(sample.points)
            assert (np.diff(sample.point_label[np.argsort(sample.points[:, 2])]) >= 0).all()
    batch = collate(samples)
    assert batch.point_label.shape == (len(batch.points.coord),)


def test_proportions_are_kept(shapenet_part_root: Path):
    config = ShapeNetPartConfig(root=shapenet_part_root, normalize="none")
    config.augment.shift = 0.0
    dataset = config.build("train")
    stored, moved = dataset.get(1).points, dataset.get(1, np.random.default_rng(1)).points
    ratio = np.sort(moved, axis=0) / np.sort(stored, axis=0)
    assert ratio.min() == pytest.approx(ratio.max(), rel=1e-4)
    assert 0.8 <= ratio.mean() <= 1.25


def test_one_category_alone(shapenet_part_root: Path):
    tables = ShapeNetPartConfig(root=shapenet_part_root, categories=("table",)).build("train")
    assert tables.labels.tolist() == [15, 15, 15]
    with pytest.raises(UnknownNameError, match="unknown category 'tabel'; did you mean 'table'"):
        ShapeNetPartConfig(root=shapenet_part_root, categories=("tabel",))
    with pytest.raises(DataError, match="part 'test' lists no shapes of rocket"):
        ShapeNetPartConfig(root=shapenet_part_root, categories=("rocket",)).build("test")


def test_errors_name_the_file(shapenet_part_root: Path):
    config, folder = ShapeNetPartConfig(root=shapenet_part_root), shapenet_part_root / "train_test_split"
    path = shapenet_part_root / "02773838" / "test0.txt"
    table = np.loadtxt(path)
    table[7, 6] = 12
    np.savetxt(path, table)
    with pytest.raises(DataError, match=r"test0\.txt: point row 7 \(from 0\) has part 12, but those of a bag are 4\.\.5; 1 such rows"):
        config.build("test").get(0)
    np.savetxt(path, table[:, :6])
    with pytest.raises(DataError, match=r"test0\.txt: has 6 columns, expected 7: x y z nx ny nz part"):
        config.build("test").get(0)
    path.unlink()
    with pytest.raises(DataError, match=r"test0\.txt: this file does not exist"):
        config.build("test").get(0)
    with pytest.raises(DataError, match="unknown split 'val'; choose one of train, test, all"):
        config.build("val")
    (folder / "shuffled_test_file_list.json").write_text(json.dumps(["shape_data/00000000/a"]))
    with pytest.raises(DataError, match=r"'shape_data/00000000/a' is of no category in synsetoffset2category\.txt"):
        config.build("test")
    (folder / "shuffled_test_file_list.json").write_text(json.dumps({"a": 1}))
    with pytest.raises(DataError, match=r"shuffled_test_file_list\.json: expected a list of names"):
        config.build("test")
    (folder / "shuffled_val_file_list.json").unlink()
    with pytest.raises(DataError, match=r"shuffled_val_file_list\.json: this file does not exist"):
        config.build("train")
    (shapenet_part_root / "synsetoffset2category.txt").write_text("Tabel\t04379243\n")
    with pytest.raises(DataError, match=r"synsetoffset2category\.txt: unknown category 'tabel'; did you mean 'table'"):
        config.build("test")
    with pytest.raises(DataError, match="nowhere: this folder does not exist"):
        ShapeNetPartConfig(root=shapenet_part_root / "nowhere").build("train")
