"""Folders and lists of image pairs: what is found, what a sample is, and what happens to damaged and missing files."""

from __future__ import annotations

import json
import logging
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from geossl.data import ColorJitterConfig, PairsConfig, build_loader
from geossl.data.image_files import decode_image
from geossl.errors import ConfigError, DataError
from geossl.geometry import denormalize_images

STILL = ColorJitterConfig(brightness=0, contrast=0, saturation=0)
SMALL = {"crop": 16, "resize": None}


def picture(number: int, size: tuple[int, int] = (24, 20)) -> Image.Image:
    """An image in which every pixel tells its place (red column, green row) and blue the number."""
    width, height = size
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[..., 0], pixels[..., 1], pixels[..., 2] = np.arange(width), np.arange(height)[:, None], number
    return Image.fromarray(pixels)


@pytest.fixture
def habitat(tmp_path: Path) -> Path:
    """Habitat's layout with two scenes of training and one of validation, and files that belong to no pair."""
    root = tmp_path / "habitat_release"
    for number, name in enumerate(("hm3d/scene_b/00000000", "hm3d/scene_a/00000001", "hm3d/scene_a/00000000", "hm3d_val/scene_c/00000000")):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        for side in (1, 2):
            picture(10 * number + side).save(root / f"{name}_{side}.png")
    (root / "hm3d" / "scene_a" / "metadata.json").write_text("{}")
    picture(99).save(root / "hm3d" / "scene_a" / "00000002_1.png")
    return root


def blues(data, row: int) -> tuple[int, int]:  # type: ignore[no-untyped-def]
    return tuple(int(image[2, 0, 0]) for image in data.read(row))  # type: ignore[return-value]


def test_folders_are_searched_in_a_fixed_order_and_val_is_held_out(habitat: Path) -> None:
    config = PairsConfig(root=habitat, **SMALL)
    train, test, everything = (config.build(split) for split in ("train", "test", "all"))
    assert [blues(train, row) for row in range(len(train))] == [(21, 22), (11, 12), (1, 2)]
    assert [blues(test, row) for row in range(len(test))] == [(31, 32)]
    assert len(everything) == 4
    assert train.labels.tolist() == [-1] * 3
    with pytest.raises(DataError, match="unknown split 'val'"):
        config.build("val")


def test_lists_are_taken_instead_of_a_search(habitat: Path) -> None:
    (habitat / "pairs.txt").write_text("hm3d/scene_b/00000000_1.png hm3d/scene_b/00000000_2.png\nhm3d_val/scene_c/00000000_1.png "
                                       "hm3d_val/scene_c/00000000_2.png\n")  # fmt: skip
    train, test = (PairsConfig(root=habitat, **SMALL).build(split) for split in ("train", "test"))
    assert ([blues(train, 0)], [blues(test, 0)], len(train), len(test)) == ([(1, 2)], [(31, 32)], 1, 1)


def test_extracted_crops_are_found_by_their_listing(tmp_path: Path) -> None:
    for name in ("ARKitScenes/0/a0", "ARKitScenes/1/b0", "MegaDepth/0/c0"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        for side in (1, 2):
            picture(side).save(tmp_path / f"{name}_{side}.jpg")
    (tmp_path / "ARKitScenes" / "listing.txt").write_text("# stems\n1/b0\n0/a0\n")
    (tmp_path / "MegaDepth" / "listing.txt").write_text("# stems\n0/c0\n")
    data = PairsConfig(root=tmp_path, **SMALL).build("all")
    assert [data.paths(row)[0].parent.relative_to(tmp_path).as_posix() for row in range(3)] == [
        "ARKitScenes/1",
        "ARKitScenes/0",
        "MegaDepth/0",
    ]


@pytest.mark.parametrize("line", ["a b.png\tc d.png", "a b.png, c d.png"])
def test_own_lists(tmp_path: Path, line: str) -> None:
    picture(1).save(tmp_path / "a b.png")
    picture(2).save(tmp_path / "c d.png")
    path = tmp_path / "mine.txt"
    path.write_text(f"# mine\n\n{line}\n")
    assert blues(PairsConfig(root=path, **SMALL).build("train"), 0) == (1, 2)
    path.write_text("a.png\n")
    with pytest.raises(DataError, match=r"mine\.txt: expected two paths a line, .* got 'a\.png'"):
        PairsConfig(root=path).build("train")


def test_test_fraction(tmp_path: Path) -> None:
    for number in range(5):
        for side in (1, 2):
            picture(side).save(tmp_path / f"{number}_{side}.png")
    parts = [PairsConfig(root=tmp_path, test_fraction=0.4, **SMALL).build(split) for split in ("train", "test")]
    assert [len(part) for part in parts] == [3, 2]
    assert parts[1].paths(0)[0].name == "3_1.png"
    assert len(PairsConfig(root=tmp_path, **SMALL).build("test")) == 0


def test_samples(habitat: Path) -> None:
    data = PairsConfig(root=habitat, **SMALL, augment=STILL).build("train")
    middle = data.get(0)
    image = (denormalize_images(middle.image) * 255).round().int()
    assert image.shape == (3, 16, 16)
    assert image[:, 0, 0].tolist() == [4, 2, 21]  # the middle of 24 x 20
    assert middle.truth is None
    assert middle.reference is not None
    assert int((denormalize_images(middle.reference) * 255).round()[2, 0, 0]) == 22
    corners = []
    for seed in range(40):
        sample = data.get(0, np.random.default_rng(seed))
        assert sample.reference is not None
        corners.append(
            [tuple((denormalize_images(part) * 255).round().int()[:2, 0, 0].tolist()) for part in (sample.image, sample.reference)]
        )
    assert len({first for first, _ in corners}) > 10
    assert sum(first != second for first, second in corners) > 30  # drawn apart
    jittered = PairsConfig(root=habitat, **SMALL).build("train")
    a, b, c = (jittered.get(0, np.random.default_rng(seed)) for seed in (0, 0, 1))
    assert torch.equal(a.image, b.image)
    assert not torch.equal(a.image, c.image)


def test_sizes_are_brought_to_one_and_small_ones_enlarged(tmp_path: Path) -> None:
    picture(1, (40, 30)).save(tmp_path / "x_1.png")
    picture(2, (12, 9)).save(tmp_path / "x_2.png")
    data = PairsConfig(root=tmp_path, crop=16, resize=20).build("train")
    assert [tuple(image.shape) for image in data.read(0)] == [(3, 20, 27), (3, 20, 27)]
    assert data.get(0).image.shape == (3, 16, 16)
    with pytest.raises(DataError, match=r"x_2\.png: the image has 9 x 12 pixels, less than the window of 16 x 16"):
        PairsConfig(root=tmp_path, crop=16, resize=None, damaged="error").build("train").get(0)


def test_batches_do_not_depend_on_workers_and_continue(habitat: Path) -> None:
    data = PairsConfig(root=habitat, **SMALL).build("all")
    plain = build_loader(data, 2, seed=3)
    batches = [next(plain) for _ in range(5)]
    assert batches[0].image.shape == batches[0].reference.shape == (2, 3, 16, 16)
    other = build_loader(pickle.loads(pickle.dumps(data)), 2, seed=3, workers=2)
    other.load_state_dict({**plain.state_dict(), "step": 3})
    for expected in batches[3:]:
        got = next(other)
        assert torch.equal(got.image, expected.image)
        assert torch.equal(got.reference, expected.reference)
        assert torch.equal(got.index, expected.index)


# ---------------------------------------------------------------------------------------------------------------------
# Bad input


def test_damaged_files_are_skipped_and_counted(habitat: Path, caplog: pytest.LogCaptureFixture) -> None:
    broken = habitat / "hm3d" / "scene_a" / "00000000_2.png"
    broken.write_bytes(broken.read_bytes()[:60])
    data = PairsConfig(root=habitat, **SMALL).build("train")
    with caplog.at_level(logging.WARNING, "geossl"):
        sample = data.get(0)
        again = data.get(0)
    assert sample.index == again.index == 1  # the next one, in any process
    assert list(data.unusable) == [0]
    assert len(caplog.messages) == 1  # told once
    assert "left out 1 pairs" in caplog.text
    assert "00000000_2.png: cannot be read as an image" in caplog.text
    assert len(data.check()) == 1
    with pytest.raises(DataError, match=r"00000000_2\.png: cannot be read"):
        PairsConfig(root=habitat, **SMALL, damaged="error").build("train").get(0)
    for path in habitat.rglob("*_1.png"):
        path.write_bytes(b"")
    with pytest.raises(DataError, match=r"3 pairs in a row cannot be used; the first: .*_1\.png"):
        PairsConfig(root=habitat, **SMALL).build("train").get(2)


def test_missing_files_of_a_list_are_counted_and_the_first_named(habitat: Path, caplog: pytest.LogCaptureFixture) -> None:
    good = "hm3d/scene_b/00000000_1.png hm3d/scene_b/00000000_2.png"
    (habitat / "pairs.txt").write_text(f"{good}\nhm3d/gone_1.png hm3d/gone_2.png\nnowhere/a_1.png nowhere/a_2.png\n{good}\n")
    with caplog.at_level(logging.WARNING, "geossl"):
        data = PairsConfig(root=habitat, **SMALL).build("train")
    assert (len(data), data.missing) == (2, 2)
    assert "2 of 4 listed pairs name files that do not exist; the first: hm3d/gone_1.png, hm3d/gone_2.png" in caplog.text
    with pytest.raises(DataError, match="2 of 4 listed pairs"):
        PairsConfig(root=habitat, **SMALL, damaged="error").build("train")
    (habitat / "pairs.txt").write_text("a_1.png a_2.png\n")
    with pytest.raises(DataError, match=r"1 of 1 .* check that the list belongs to this folder"):
        PairsConfig(root=habitat, **SMALL).build("train")


def test_folders_without_pairs(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"holds no pairs of the train part; expected pairs\.txt"):
        PairsConfig(root=tmp_path).build("train")
    with pytest.raises(DataError, match="does not exist"):
        PairsConfig(root=tmp_path / "no").build("train")


def test_grey_transparent_and_16_bit_images(tmp_path: Path) -> None:
    Image.fromarray(np.full((3, 4), 77, np.uint8)).save(tmp_path / "grey.png")
    assert decode_image(tmp_path / "grey.png", "x").unique().tolist() == [77]
    layered = np.zeros((3, 4, 4), np.uint8)
    layered[..., 0], layered[:, 2:, 3] = 200, 255  # red, the left half transparent
    Image.fromarray(layered, "RGBA").save(tmp_path / "alpha.png")
    decoded = decode_image(tmp_path / "alpha.png", "x")
    assert decoded[:, 0, 0].tolist() == [255, 255, 255]
    assert decoded[:, 0, 3].tolist() == [200, 0, 0]
    Image.fromarray(np.full((3, 4), 77 * 256 + 13, np.uint16)).save(tmp_path / "deep.png")
    assert decode_image(tmp_path / "deep.png", "x").unique().tolist() == [77]


@pytest.mark.parametrize("wrong", [{"crop": 4}, {"crop": 300}, {"damaged": "ignore"}, {"test_fraction": 1.0}])
def test_settings_are_checked(wrong: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="resize" if wrong == {"crop": 300} else next(iter(wrong))):
        PairsConfig(**wrong)  # type: ignore[arg-type]


@pytest.mark.skipif("GEOSSL_REAL_DATA" not in os.environ, reason="GEOSSL_REAL_DATA is not set")
def test_real_photographs(tmp_path: Path) -> None:
    root = Path(os.environ["GEOSSL_REAL_DATA"]) / "image_pairs"
    table = json.loads((root / "pairs.json").read_text())
    lines = [f"{root / table['images'][pair['img1']]['file']}\t{root / table['images'][pair['img2']]['file']}" for pair in table["pairs"]]
    (tmp_path / "list.txt").write_text("\n".join(lines))
    data = PairsConfig(root=tmp_path / "list.txt").build("train")
    assert len(data) == 37
    assert data.check() == []
    assert data.get(5, np.random.default_rng(0)).image.shape == (3, 224, 224)
