"""The embedded objects: what the file holds, and the data set made of it."""

from __future__ import annotations

import collections
import os
import zipfile
from pathlib import Path

import numpy as np
import pytest

from geossl.data import DATASETS, ObjectsConfig, load_objects
from geossl.data.objects import PLACEMENTS, SAMPLES, farthest_order, pack_objects
from geossl.errors import ConfigError, DataError


def test_the_library_holds_820_objects_of_free_licences() -> None:
    library = load_objects()
    assert library.xyz.shape == (820, 1024, 3)
    assert (SAMPLES / "objects.npz").stat().st_size < 5.7e6
    assert {row["licence"] for row in library.table} == {"CC0-1.0", "CC-BY-3.0", "CC-BY-3.0-US"}
    assert "core" not in {row["source"] for row in library.table}
    assert all(row["creator"] for row in library.table if row["licence"] != "CC0-1.0")


def test_table_and_arrays_agree() -> None:
    library = load_objects()
    assert [int(row["index"]) for row in library.table] == list(range(820))
    assert [row["placement"] for row in library.table] == [PLACEMENTS[value] for value in library.placement]
    assert [row["class"] for row in library.table] == [library.classes[label] if label >= 0 else "-" for label in library.label]
    assert [row["split"] for row in library.table] == [{-1: "unlabelled", 0: "train", 1: "test"}[value] for value in library.split.tolist()]
    size = np.array([[float(row[f"{side}_m"]) for side in ("width", "depth", "height")] for row in library.table])
    extent = np.ptp(library.xyz.astype(np.float32), axis=1) * library.scale_m[:, None]
    assert np.median(np.abs(extent - size).max(axis=1) / size.max(axis=1)) < 0.02


def test_points_are_in_farthest_point_order() -> None:
    library = load_objects()
    for row in range(0, 820, 41):
        xyz = library.xyz[row].astype(np.float32)
        nearest = np.full(1024, np.inf)
        for step in range(1, 200):
            nearest = np.minimum(nearest, np.square(xyz - xyz[step - 1]).sum(axis=1))
            assert nearest[step] >= nearest.max() * (1 - 1e-5), f"object {row}: point {step} is not the farthest from those before it"


def test_a_prefix_is_an_even_subsample() -> None:
    xyz = load_objects().xyz[67].astype(np.float32)  # a wardrobe

    def gap(chosen: np.ndarray) -> float:
        return float(np.sqrt(np.square(xyz[:, None] - chosen).sum(-1).min(axis=1)).max())

    random = np.random.default_rng(0).permutation(1024)[:256]
    assert gap(xyz[:256]) < 0.75 * gap(xyz[random])


def test_groups_never_straddle_the_split() -> None:
    library = load_objects()
    assert not set(library.group[library.split == 1]) & set(library.group[library.split == 0])


@pytest.mark.parametrize(
    ("name", "placements"),
    [
        ("Street lamp", {"outdoor"}),
        ("Street light", {"outdoor"}),
        ("Outdoor lamp", {"outdoor"}),
        ("Ceiling lamp", {"ceiling"}),
        ("Chandelier lamp", {"ceiling"}),
        ("Wall light", {"wall"}),
        ("Desk lamp", {"on_top"}),
        ("Upper cabinet", {"wall"}),
        ("Lower cabinet", {"floor"}),
        ("Sink cabinet", {"floor"}),
        ("High hedge", {"outdoor"}),
        ("Yucca", {"floor"}),
        ("Hospital bed", {"never"}),
        ("Bunk bed", {"floor"}),
        ("Intercom", {"wall"}),
        ("Class seat", {"never"}),
        ("Sitting male", {"never"}),
        ("Ford Focus", {"outdoor"}),
        ("Car model", {"on_top"}),
        ("Exterior door", {"never"}),
        ("Wall flat TV", {"wall"}),
    ],
)
def test_objects_go_where_they_belong(name: str, placements: set[str]) -> None:
    found = {row["placement"] for row in load_objects().table if row["name"] == name}
    assert found == placements


def test_placements_are_plausible_for_size_and_class() -> None:
    for row in load_objects().table:
        height, place = float(row["height_m"]), row["placement"]
        largest = max(float(row[f"{side}_m"]) for side in ("width", "depth", "height"))
        if place == "on_top":
            assert largest < 1.05, row["name"]
        if place in ("floor", "wall", "ceiling"):
            assert height < 2.6, row["name"]
            assert largest < 3.5, row["name"]
        if row["class"] in ("person", "window_or_door") and row["name"] != "Window blind":
            assert place == "never", row["name"]
        if row["class"] in ("sofa", "table", "chair", "bed") and row["category"] != "Exterior":
            assert place in ("floor", "never"), row["name"]
        if row["category"] == "Exterior":
            assert place in ("outdoor", "on_top", "floor"), row["name"]


def test_splits_cover_everything_once() -> None:
    config = ObjectsConfig()
    train, test, everything = (config.build(split) for split in ("train", "test", "all"))
    assert (len(train), len(test), len(everything)) == (653, 167, 820)
    assert not set(train.rows) & set(test.rows)
    assert (train.labels == -1).sum() == 271
    assert len(ObjectsConfig(subset="labelled").build("train")) == 382
    assert collections.Counter(test.labels.tolist()).keys() == set(range(15))


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_resplit_keeps_groups_and_classes(seed: int) -> None:
    config = ObjectsConfig(resplit=seed)
    train, test = config.build("train"), config.build("test")
    assert not set(train.groups) & set(test.groups)
    assert set(test.labels) == set(range(15))
    assert -1 not in test.labels
    assert 0.25 < len(test) / 549 < 0.33
    assert set(test.rows) != set(ObjectsConfig().build("test").rows)
    assert np.array_equal(test.rows, ObjectsConfig(resplit=seed).build("test").rows)


def test_columns_are_xyz_then_normal_then_rgb() -> None:
    library = load_objects()
    config = ObjectsConfig(columns="all", normalize="none", points=64)
    dataset = config.build("all")
    sample = dataset.get(5, None)
    assert dataset.columns == ("xyz", "normal", "rgb")
    assert dataset.channels == 9
    assert sample.points.dtype == np.float32
    assert np.array_equal(sample.points[:, :3], library.xyz[5, :64].astype(np.float32))
    assert np.allclose(np.linalg.norm(sample.points[:, 3:6], axis=1), 1.0, atol=1e-5)
    assert np.allclose(sample.points[:, 6:] * 255, library.rgb[5, :64], atol=1e-3)
    assert ObjectsConfig(columns="xyz+rgb").build("all").get(5).points.shape == (1024, 6)
    assert np.array_equal(
        ObjectsConfig(columns="xyz+rgb", normalize="none", points=64).build("all").get(5).points[:, 3:], sample.points[:, 6:]
    )


def test_training_samples_are_random_subsets_and_evaluation_samples_prefixes() -> None:
    dataset = ObjectsConfig(points=256, normalize="none").build("train")
    dataset.config.augment.scale, dataset.config.augment.shift = (1.0, 1.0), 0.0
    stored = {tuple(point) for point in dataset.read(3).coord.tolist()}
    first, second = (dataset.get(3, np.random.default_rng(seed)).points for seed in (0, 1))
    assert first.shape == (256, 3)
    assert {tuple(point) for point in first.tolist()} <= stored
    assert not np.array_equal(first, second)
    assert np.array_equal(dataset.get(3, None).points, dataset.read(3).coord[:256])
    assert np.array_equal(dataset.get(3, None).points, dataset.get(3, None).points)


def test_more_points_than_stored_are_refused() -> None:
    with pytest.raises(ConfigError, match="points must be at most 1024"):
        ObjectsConfig(points=2048)


def test_an_unknown_split_lists_the_known_ones() -> None:
    with pytest.raises(DataError, match="train, test, all"):
        DATASETS.config("objects").build("val")


def test_stored_arrays_cannot_be_changed_by_accident() -> None:
    with pytest.raises(ValueError, match="read-only"):
        load_objects().xyz[0] = 0


def test_damaged_libraries_name_the_file(tmp_path: Path) -> None:
    broken = tmp_path / "objects.npz"
    whole = (SAMPLES / "objects.npz").read_bytes()
    for content in (whole[: len(whole) // 2], b"", whole[:1000] + bytes(1000) + whole[2000:]):
        broken.write_bytes(content)
        with pytest.raises(DataError, match=r"objects\.npz: cannot be read as npz"):
            load_objects.__wrapped__(broken)
    with zipfile.ZipFile(broken, "w") as archive:
        archive.writestr("xyz.npy", b"")
    with pytest.raises(DataError, match="has no array normal"):
        load_objects.__wrapped__(broken)
    with pytest.raises(DataError, match="does not exist"):
        load_objects.__wrapped__(tmp_path / "none.npz")


def test_farthest_order_never_repeats_even_among_coinciding_points() -> None:
    xyz = np.zeros((1, 6, 3), np.float32)
    xyz[0, 3] = 1.0
    assert farthest_order(xyz, 6).tolist() == [[0, 3, 1, 2, 4, 5]]


def test_packing_needs_a_placement_for_every_object(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    arrays = {key: np.zeros((2, 4, 3), np.float16) for key in ("xyz", "normal", "rgb")}
    arrays |= {key: np.zeros(2, np.int16) for key in ("scale_m", "label", "split", "group")}
    np.savez(source / "objects.npz", classes=np.array(["a"]), **arrays)
    header = (SAMPLES / "objects.tsv").read_text(encoding="utf-8").splitlines()[0]
    line = "{i}\tid{i}\tn\tc\tx\t{source}\tCC0-1.0\ta\ttrain\t1\t1\t1\t1\t{place}\t"
    (source / "objects.tsv").write_text(
        "\n".join([header, line.format(i=0, source="core", place=""), line.format(i=1, source="free", place="")]) + "\n"
    )
    (tmp_path / "objects.tsv").write_text("\n".join([header, line.format(i=7, source="free", place="floor")]) + "\n")
    with pytest.raises(DataError, match=r"no valid placement .* for \['id1'\]"):
        pack_objects(source, tmp_path / "objects.npz")


@pytest.mark.slow
def test_the_embedded_file_is_what_the_program_makes(tmp_path: Path) -> None:
    root = os.environ.get("GEOSSL_REAL_DATA")
    if root is None:
        pytest.skip("GEOSSL_REAL_DATA is not set: the full catalogue is needed")
    (tmp_path / "objects.tsv").write_bytes((SAMPLES / "objects.tsv").read_bytes())
    assert pack_objects(Path(root) / "objects", tmp_path / "objects.npz") == 820
    assert (tmp_path / "objects.tsv").read_bytes() == (SAMPLES / "objects.tsv").read_bytes()
    with np.load(tmp_path / "objects.npz") as made, np.load(SAMPLES / "objects.npz") as shipped:
        assert made.files == shipped.files
        for name in made.files:
            assert np.array_equal(made[name], shipped[name]), name
