"""Few-shot episodes: drawn reproducibly without near-duplicates, and read from the published pickles without executing them."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from geossl.data import ModelNet40FewShotConfig, ObjectsConfig, PointDataset, collate, draw_episode
from geossl.data.dataset import PointDataConfig
from geossl.data.pickles import read_pickled_arrays
from geossl.errors import ConfigError, DataError

OBJECTS = ObjectsConfig(points=32, subset="labelled").build("all")


def episode(**options):
    return draw_episode(OBJECTS, 5, 6, **{"test_per_class": 8} | options)


def test_an_episode_of_the_embedded_objects():
    train, test = episode()
    assert (len(train), len(test)) == (30, 40)
    assert train.classes == test.classes
    assert np.bincount(train.labels).tolist() == [6] * 5
    assert np.bincount(test.labels).tolist() == [8] * 5
    assert not set(train.rows) & set(test.rows)
    assert not set(train.groups[train.groups >= 0]) & set(test.groups[test.groups >= 0])
    for part in (train, test):
        for row in range(len(part)):
            assert part.classes[part.labels[row]] == OBJECTS.classes[OBJECTS.labels[part.rows[row]]]
            assert part.get(row).label == part.labels[row]
    assert collate([train.get(row, np.random.default_rng(row)) for row in range(30)]).label.tolist() == train.labels.tolist()


def test_folds_and_seeds_differ_and_repeat():
    first, again, other, reseeded = (episode(**options)[0] for options in ({}, {}, {"fold": 1}, {"seed": 1}))
    assert np.array_equal(first.rows, again.rows)
    assert not np.array_equal(first.rows, other.rows)
    assert not np.array_equal(first.rows, reseeded.rows)


class Labels(PointDataset):
    def __init__(self, labels, groups):
        super().__init__(PointDataConfig(name="labels"), np.array(labels), [f"c{i}" for i in range(4)], np.array(groups))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(-1, 3), st.integers(-1, 12)), min_size=12, max_size=60), st.integers(0, 3))
def test_no_group_is_on_both_sides(rows, fold):
    dataset = Labels(*zip(*rows, strict=True))
    try:
        train, test = draw_episode(dataset, 2, 2, test_per_class=2, fold=fold)
    except DataError:
        return  # too few shapes
    assert np.bincount(train.labels).tolist() == np.bincount(test.labels).tolist() == [2, 2]
    assert not set(train.rows) & set(test.rows)
    assert not set(train.groups[train.groups >= 0]) & set(test.groups[test.groups >= 0])


def test_too_much_is_refused():
    with pytest.raises(
        DataError, match=r"10 classes with 20 \+ 20 shapes each.*classes of objects have as many \(appliance 45, bath_fixture 23"
    ):
        draw_episode(OBJECTS, 10, 20)
    with pytest.raises(ConfigError, match="way must be at least 2, got 1"):
        draw_episode(OBJECTS, 1, 20)
    with pytest.raises(ConfigError, match="shot and test_per_class must be at least 1"):
        draw_episode(OBJECTS, 2, 0)


# --- the published pickles


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Episodes of 2 classes and 3 shapes each, with normals, as lists of (points, label, name)."""
    rng = np.random.default_rng(0)

    def entries(count: int) -> list:
        return [(rng.normal(size=(64, 6)).astype(np.float32), np.int64(label), "shape") for label in (3, 17) for _ in range(count)]

    folder = tmp_path / "ModelNetFewshot" / "2way_3shot"
    folder.mkdir(parents=True)
    for fold in range(2):
        (folder / f"{fold}.pkl").write_bytes(pickle.dumps({"train": entries(3), "test": entries(4)}, protocol=2 + 2 * fold))
    return folder.parent


@pytest.mark.parametrize("fold", [0, 1])
def test_a_published_episode(root, fold):
    config = ModelNet40FewShotConfig(root=root, way=2, shot=3, fold=fold, points=40, columns="xyz+normal")
    train, test = config.build("train"), config.build("test")
    assert (train.labels.tolist(), test.labels.tolist()) == ([0] * 3 + [1] * 3, [0] * 4 + [1] * 4)
    assert train.classes == test.classes == ["class_3", "class_17"]
    assert train.get(2).points.shape == (40, 6)
    whole = test.read(1).coord
    centred = whole - whole.mean(0)
    assert np.allclose(test.get(1).points[:, :3], (centred / np.linalg.norm(centred, axis=1).max())[:40], atol=1e-5)


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_pickle_that_would_run_code_is_refused_and_does_not_run(root, tmp_path):
    path = root / "2way_3shot" / "0.pkl"
    named = r"it names (posix|nt)\.mkdir"
    for content, found in (
        (Bomb(tmp_path / "ran"), named),
        ({"train": [(Bomb(tmp_path / "ran"), 0)], "test": []}, named),
        (np.array([Bomb(tmp_path / "ran")], object), "it has an array of type object"),
    ):
        path.write_bytes(pickle.dumps(content))
        with pytest.raises(DataError, match=rf"0\.pkl: .*would run code when read; it was not opened \({found}\)"):
            ModelNet40FewShotConfig(root=root, way=2, shot=3).build("train")
    path.write_bytes(b"cbuiltins\neval\n(S'1'\ntR.")
    with pytest.raises(DataError, match=r"it names builtins\.eval"):
        read_pickled_arrays(path)
    path.write_bytes(b"\x80\x04\x8c\x05numpy\x94\x8c\x0endarray.resize\x94\x93.")
    with pytest.raises(DataError, match=r"it names numpy\.ndarray\.resize"):
        read_pickled_arrays(path)
    assert not (tmp_path / "ran").exists()


class Reduced:
    """Pickled as a call of ``make`` and a state, which nothing checks when it is written."""

    def __init__(self, make, args, state):
        self.parts = make, args, state

    def __reduce__(self):
        return self.parts


def forged(kind, state):
    dtype = Reduced(np.dtype, (kind, False, True), state)
    return Reduced(np.zeros(1).__reduce__()[0], (np.ndarray, (0,), b"b"), (1, (4,), dtype, False, b"A" * 32))


@pytest.mark.parametrize(
    "content",
    [
        forged("O8", (3, "|", None, None, None, -1, -1, 0)),  # bytes of the file as addresses of objects
        forged("V8", (3, "|", None, ("a",), {"a": (np.dtype("f8"), 1 << 40)}, 8, 1, 0)),  # a field far outside of the array
        np.array([None, 1], object),
    ],
    ids=["objects", "field", "objects as they should be"],
)
def test_arrays_of_anything_but_numbers_and_texts_are_refused(content, tmp_path):
    """numpy trusts what a file says of memory; a damaged or malicious one would end the process."""
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(content, protocol=4))
    with pytest.raises(DataError, match=r"a\.pkl: .*it has an array of type (object|\|V8)"):
        read_pickled_arrays(tmp_path / "a.pkl")


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_arrays_scalars_and_texts_come_back_as_they_were(protocol, tmp_path):
    content = {
        "big endian": np.arange(6, dtype=">i4").reshape(2, 3),
        "fortran": np.asfortranarray(np.random.default_rng(0).random((3, 2))),
        "no axis": np.array(3),
        "scalar": np.float32(2.5),
        "truth": np.bool_(True),
        "texts": np.array(["chair", "table"]),
        "bytes": b"chair",
    }
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(content, protocol=protocol))
    read = read_pickled_arrays(tmp_path / "a.pkl")
    assert list(read) == list(content)
    for name, value in content.items():
        np.testing.assert_array_equal(read[name], value)
        assert np.asarray(read[name]).dtype == np.asarray(value).dtype.newbyteorder("=")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ([1], r"0\.pkl: expected a dictionary with train and test, got \[1\]"),
        ({"train": [], "test": []}, r"0\.pkl, train: expected a list of \(points, label, \.\.\.\), got \[\]"),
        ({"train": [(np.zeros((4, 2)), 0)], "test": []}, r"0\.pkl, train row 0: points must be \[N, 3 or more\], got \[4, 2\]"),
        ({"train": ["chair"], "test": []}, r"0\.pkl, train row 0: expected \(points, label, \.\.\.\)"),
        (
            {"train": [(np.zeros((4, 3)), 0)], "test": []},
            r"0\.pkl: 2 classes were expected, the same in train and test, got \[0\] in train",
        ),
    ],
)
def test_what_is_no_episode_is_named(root, content, words):
    (root / "2way_3shot" / "0.pkl").write_bytes(pickle.dumps(content))
    with pytest.raises(DataError, match=words):
        ModelNet40FewShotConfig(root=root, way=2, shot=3).build("train")


def test_missing_and_damaged_files_are_named(root):
    config = ModelNet40FewShotConfig(root=root, way=2, shot=3)
    path = root / "2way_3shot" / "0.pkl"
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(DataError, match=r"0\.pkl: "):
        config.build("train")
    path.write_bytes(b"\x80\x05\x96" + b"\xff" * 8)  # a length that no memory has
    with pytest.raises(DataError, match=r"0\.pkl: cannot be read as a pickle"):
        config.build("train")
    with pytest.raises(DataError, match=r"9\.pkl: this file does not exist"):
        ModelNet40FewShotConfig(root=root, way=2, shot=3, fold=9).build("train")
    with pytest.raises(DataError, match="unknown split 'all'; choose train or test"):
        config.build("all")
    with pytest.raises(ConfigError, match="way must be at least 2, got 1"):
        ModelNet40FewShotConfig(way=1)
