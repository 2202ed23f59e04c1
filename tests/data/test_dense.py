"""Data sets of stereo, flow and depth: their published layouts written here, what is held out, and augmentation that keeps truth true."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import grid_sample

from geossl.data import DepthDataConfig, FlowDataConfig, StereoDataConfig, build_loader
from geossl.data.dense import DenseDataset
from geossl.data.dense_augment import (
    DensePair,
    FlowAugmentConfig,
    StereoAugmentConfig,
    augment_flow,
    augment_stereo,
    draw_stereo_colors,
    flip_pair,
    misalign,
    scale_pair,
)
from geossl.data.dense_files import write_flo, write_pfm, write_png16
from geossl.data.image_augment import ColorJitterConfig
from geossl.errors import ConfigError, DataError, UnknownNameError
from geossl.geometry import denormalize_images, pixel_centers

SIZE = (20, 30)
STILL = ColorJitterConfig(brightness=0, contrast=0, saturation=0)


def picture(path: Path, value: int = 0, size: tuple[int, int] = SIZE) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.full((*size, 3), 100 + value, np.uint8)
    pixels[..., 0] = 3 * np.arange(size[1])
    Image.fromarray(pixels).save(path)


def disparity(path: Path, scale: float = 256.0) -> None:
    """3.0 everywhere, unknown in the first row."""
    path.parent.mkdir(parents=True, exist_ok=True)
    values = np.full(SIZE, 3.0, np.float32)
    values[0] = 0
    if path.suffix == ".pfm":
        write_pfm(path, np.where(values, values, np.inf).astype(np.float32))
    elif path.suffix == ".dsp5":
        with h5py.File(path, "w") as file:
            file["disparity"] = np.repeat(np.repeat(np.where(values, values, np.nan), 2, 0), 2, 1)
    else:
        Image.fromarray((values * scale).astype(np.uint16 if scale > 1 else np.uint8)).save(path)


def optical_flow(path: Path) -> None:
    """(2, -1) everywhere, unknown in the first row."""
    path.parent.mkdir(parents=True, exist_ok=True)
    values = np.full((*SIZE, 2), (2.0, -1.0), np.float32)
    if path.suffix == ".png":
        known = np.ones((*SIZE, 1))
        known[0] = 0
        write_png16(path, np.concatenate([values * 64 + 2**15, known], -1).astype(np.uint16))
        return
    values[0] = np.nan
    if path.suffix == ".flo":
        write_flo(path, values)
    elif path.suffix == ".pfm":
        write_pfm(path, np.concatenate([values, np.zeros((*SIZE, 1), np.float32)], -1))
    elif path.suffix == ".npy":
        np.save(path, values)
    else:
        with h5py.File(path, "w") as file:
            file["flow"] = np.repeat(np.repeat(values, 2, 0), 2, 1)


def kitti(root: Path, first: str, second: str, truth: str, write: Callable[[Path], None], count: int, step: bool) -> None:
    for number in range(count):
        picture(root / "training" / first / f"{number:06d}_10.png", number)
        picture(root / "training" / second / f"{number:06d}_1{int(step)}.png", 100)
        write(root / "training" / truth / f"{number:06d}_10.png")


def scene_folders(root: Path, names: list[str], left: str, right: str, truth: str, scale: float = 256.0) -> None:
    for number, name in enumerate(names):
        picture(root / name / left, number)
        picture(root / name / right, 100)
        disparity(root / name / truth, scale)


def sceneflow(root: Path, flow: bool) -> None:
    for number, inner in enumerate(("TRAIN/A/0000", "TEST/B/0003")):
        for kind in ("frames_cleanpass", "frames_finalpass"):
            for frame in (6, 7):
                picture(root / kind / inner / "left" / f"{frame:04d}.png", 10 * number + frame)
                picture(root / kind / inner / "right" / f"{frame:04d}.png", 100)
        for frame in (6, 7):
            disparity(root / "disparity" / inner / "left" / f"{frame:04d}.pfm")
            if flow:
                optical_flow(root / "optical_flow" / inner / "into_future" / "left" / f"OpticalFlowIntoFuture_{frame:04d}_L.pfm")


def spring(root: Path) -> None:
    for scene in ("0001", "0041"):
        for frame in ("0001", "0002"):
            for side in ("left", "right"):
                picture(root / "train" / scene / f"frame_{side}" / f"frame_{side}_{frame}.png", int(frame) if side == "left" else 100)
            disparity(root / "train" / scene / "disp1_left" / f"disp1_left_{frame}.dsp5")
        optical_flow(root / "train" / scene / "flow_FW_left" / "flow_FW_left_0001.flo5")


def crestereo(root: Path) -> None:
    for name in ("tree/a", "hole/b"):
        picture(root / f"{name}_left.jpg")
        picture(root / f"{name}_right.jpg", 100)
        disparity(root / f"{name}_left.disp.png", 32.0)


OLD, NEW = ("view1.png", "view5.png", "disp1.png", 1.0), ("im0.png", "im1.png", "disp0.pfm")
STEREO_CASES: dict[str, tuple[Callable[[Path], None], int, int]] = {
    "kitti2012": (lambda root: kitti(root, "colored_0", "colored_1", "disp_occ", disparity, 3, False), 3, 0),
    "kitti2015": (lambda root: kitti(root, "image_2", "image_3", "disp_occ_0", disparity, 7, False), 2, 5),
    "middlebury2005": (lambda root: scene_folders(root, ["Art", "Reindeer"], *OLD), 1, 1),
    "middlebury2006": (lambda root: scene_folders(root, ["Aloe", "Rocks1", "Wood1", "Wood2"], *OLD), 2, 2),
    "middlebury2014": (lambda root: scene_folders(root, ["Pipes-perfect", "Umbrella-imperfect", "Vintage-perfect"], *NEW), 1, 2),
    "middlebury2021": (lambda root: scene_folders(root, ["a1", "b1", "c1"], *NEW), 1, 2),
    "middlebury_eval3": (lambda root: scene_folders(root / "trainingF", ["Adirondack", "Vintage"], *NEW[:2], "disp0GT.pfm"), 1, 1),
    "eth3d": (lambda root: scene_folders(root, ["delivery_area_1l", "electro_3l"], *NEW[:2], "disp0GT.pfm"), 1, 1),
    "sceneflow": (lambda root: sceneflow(root, False), 4, 4),
    "crestereo": (crestereo, 2, 0),
    "spring": (spring, 2, 2),
}


def sintel(root: Path) -> None:
    for scene in ("alley_1", "temple_2"):
        for frame in (1, 2, 3):
            for kind in ("clean", "final"):
                picture(root / "training" / kind / scene / f"frame_{frame:04d}.png", frame)
            if frame < 3:
                optical_flow(root / "training" / "flow" / scene / f"frame_{frame:04d}.flo")


def flying_chairs(root: Path) -> None:
    for number in (1, 2, 4):
        picture(root / "data" / f"{number:05d}_img1.ppm", number)
        picture(root / "data" / f"{number:05d}_img2.ppm", 100)
        optical_flow(root / "data" / f"{number:05d}_flow.flo")
    (root / "FlyingChairs_train_val.txt").write_text("1\n2\n1\n1\n")


def tartanair(root: Path) -> None:
    place = root / "abandonedfactory" / "Easy" / "P000"
    for frame in range(3):
        picture(place / "image_left" / f"{frame:06d}_left.png", frame)
        if frame < 2:
            optical_flow(place / "flow" / f"{frame:06d}_{frame + 1:06d}_flow.npy")


FLOW_CASES: dict[str, tuple[Callable[[Path], None], int, int]] = {
    "flyingchairs": (flying_chairs, 2, 1),
    "flyingthings": (lambda root: sceneflow(root, True), 2, 2),
    "sintel": (sintel, 4, 4),
    "spring": (spring, 1, 1),
    "tartanair": (tartanair, 2, 0),
    "kitti2012": (lambda root: kitti(root, "colored_0", "colored_0", "flow_occ", optical_flow, 3, True), 3, 0),
    "kitti2015": (lambda root: kitti(root, "image_2", "image_2", "flow_occ", optical_flow, 12, True), 2, 10),
}


def check(train: DenseDataset, test: DenseDataset, truth: list[float], sizes: tuple[int, int]) -> None:
    assert (len(train), len(test)) == sizes
    assert len(train.config.build("all")) == sum(sizes)
    sample = train.get(0)
    assert sample.image.shape == sample.reference.shape == (3, *SIZE)  # type: ignore[union-attr]
    assert not torch.equal(sample.image, sample.reference)  # type: ignore[arg-type]
    assert sample.truth is not None
    assert sample.truth[:, 5, 5].tolist() == truth
    assert not sample.truth[:, 0].isfinite().any()
    again, other, third = (train.get(0, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert again.image.shape == again.reference.shape == (3, 12, 16)  # type: ignore[union-attr]
    assert again.truth.shape == (len(truth), 12, 16)  # type: ignore[union-attr]
    assert torch.equal(again.image, other.image)
    assert torch.equal(again.truth, other.truth)  # type: ignore[arg-type]
    assert not torch.equal(again.image, third.image)


def test_spring_is_scored_against_four_values_a_pixel(tmp_path: Path) -> None:
    spring(tmp_path)
    for config in (
        StereoDataConfig(layout="spring", root=tmp_path, crop=(12, 16)),
        FlowDataConfig(layout="spring", root=tmp_path, crop=(12, 16)),
    ):
        data = config.build("test")
        assert data.get(0).truth.shape[1:] == (2 * SIZE[0], 2 * SIZE[1])
        assert data.get(0, np.random.default_rng(0)).truth.shape[1:] == (12, 16)
        config.evaluation = "crop"
        assert config.build("test").get(0).truth.shape[1:] == (12, 16)


def test_every_layout_has_a_case() -> None:
    assert set(STEREO_CASES) == set(StereoDataConfig().layouts()) - {"list"}
    assert set(FLOW_CASES) == set(FlowDataConfig().layouts()) - {"list"}


@pytest.mark.parametrize("layout", STEREO_CASES)
def test_stereo_layouts(tmp_path: Path, layout: str) -> None:
    write, train, test = STEREO_CASES[layout]
    write(tmp_path)
    config = StereoDataConfig(layout=layout, root=tmp_path, crop=(12, 16))
    check(config.build("train"), config.build("test"), [3.0], (train, test))


@pytest.mark.parametrize("layout", FLOW_CASES)
def test_flow_layouts(tmp_path: Path, layout: str) -> None:
    write, train, test = FLOW_CASES[layout]
    write(tmp_path)
    config = FlowDataConfig(layout=layout, root=tmp_path, crop=(12, 16))
    check(config.build("train"), config.build("test"), [2.0, -1.0], (train, test))


def test_frames_follow_each_other(tmp_path: Path) -> None:
    sintel(tmp_path)
    data = FlowDataConfig(layout="sintel", root=tmp_path, crop=(12, 16)).build("train")
    names = [(files.image.name, files.reference.name, files.truth.name) for files in data.files]  # type: ignore[union-attr]
    assert names[:2] == [("frame_0001.png", "frame_0002.png", "frame_0001.flo"), ("frame_0002.png", "frame_0003.png", "frame_0002.flo")]


def test_lists(tmp_path: Path) -> None:
    picture(tmp_path / "a b.png")
    picture(tmp_path / "r.png", 100)
    disparity(tmp_path / "d.pfm")
    (tmp_path / "list.txt").write_text(f"# mine\na b.png, r.png, {tmp_path / 'd.pfm'}\n")
    config = StereoDataConfig(layout="list", root=tmp_path / "list.txt", crop=(12, 16))
    check(config.build("train"), config.build("test"), [3.0], (1, 0))
    (tmp_path / "list.txt").write_text("a.png b.png\n")
    with pytest.raises(DataError, match=r"stereo: .*list\.txt: expected 3 paths a line"):
        config.build("train")
    with pytest.raises(DataError, match="root is a text file with 3 paths a line"):
        StereoDataConfig(layout="list", root=tmp_path).build("train")


def write_depth(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    values = np.full(SIZE, 2500, np.uint16)
    values[0], values[1] = 0, 20000
    Image.fromarray(values).save(path)


def test_depth_folders_and_lists(tmp_path: Path) -> None:
    for split, name in (("train", "a"), ("train", "b"), ("test", "c")):
        picture(tmp_path / split / "rgb" / f"{name}.jpg")
        write_depth(tmp_path / split / "depth" / f"{name}.png")
    config = DepthDataConfig(root=tmp_path, crop=(12, 16), resize=None)
    train, test = config.build("train"), config.build("test")
    assert (len(train), len(test)) == (2, 1)
    sample = train.get(1)
    assert sample.reference is None
    assert sample.truth is not None
    assert sample.truth.shape == (1, *SIZE)
    assert sample.truth[0, 5, 5] == 2.5
    assert not sample.truth[0, :2].isfinite().any()  # unknown, and too far
    batch = next(build_loader(train, 2, seed=0))
    assert batch.image.shape == (2, 3, 12, 16)
    assert batch.truth.shape == (2, 1, 12, 16)
    resized = DepthDataConfig(root=tmp_path, crop=(12, 16), resize=40, evaluation="crop").build("train")
    assert resized.pair(0).shape == SIZE
    assert resized.config.fitted(resized.pair(0)).shape == (40, 60)
    assert resized.get(0).truth.shape == (1, 12, 16)  # type: ignore[union-attr]
    (tmp_path / "nyu.txt").write_text("/train/rgb/a.jpg /train/depth/a.png 518.8579\n")
    assert DepthDataConfig(layout="list", root=tmp_path / "nyu.txt").build("train").get(0).truth.max() > 0  # type: ignore[union-attr]


# ---------------------------------------------------------------------------------------------------------------------
# Bad input


def test_missing_damaged_and_unequal_files(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    scene_folders(tmp_path, ["a", "b", "c", "d", "e", "f"], *NEW)
    (tmp_path / "b" / "disp0.pfm").unlink()
    (tmp_path / "c" / "im1.png").write_bytes(b"junk")
    picture(tmp_path / "d" / "im1.png", 0, (20, 31))
    config = StereoDataConfig(layout="middlebury2021", root=tmp_path, crop=(12, 16))
    with caplog.at_level(logging.WARNING, "geossl"):
        data = config.build("train")
        assert len(data) == 3
        assert data.get(1).index == 0  # c, then d cannot be used, then again a
    assert f"1 of 4 samples lack a file; the first: {tmp_path / 'b' / 'disp0.pfm'}" in caplog.text
    assert "left out 2 pairs" in caplog.text
    assert sorted(data.unusable) == [1, 2]
    assert "has 20 x 31 pixels, but" in data.unusable[2]
    with pytest.raises(DataError, match="1 of 4 samples lack a file"):
        StereoDataConfig(layout="middlebury2021", root=tmp_path, damaged="error").build("train")


def test_errors(tmp_path: Path) -> None:
    with pytest.raises(UnknownNameError, match="unknown layout of stereo 'kitti'; did you mean 'kitti2015' or 'kitti2012'"):
        StereoDataConfig(layout="kitti")
    with pytest.raises(DataError, match=r"stereo: .*: holds nothing of this layout; expected training/image_2, image_3"):
        StereoDataConfig(layout="kitti2015", root=tmp_path).build("train")
    with pytest.raises(DataError, match="unknown split 'val'"):
        FlowDataConfig(layout="sintel", root=tmp_path).build("val")
    scene_folders(tmp_path, ["a", "b", "c"], *NEW)
    small = StereoDataConfig(layout="middlebury2021", root=tmp_path, damaged="error").build("train")
    for seed in range(4):
        with pytest.raises(DataError, match=r"im0\.png: the image has 20 x 30 pixels, less than the window of 352 x 704"):
            small.get(0, np.random.default_rng(seed))


@pytest.mark.parametrize(
    "wrong", [{"crop": (4, 100)}, {"evaluation": "tiles"}, {"damaged": "no"}, {"resize": 2}, {"depth_scale": 0.0}, {"max_depth": 0.0}]
)
def test_settings_are_checked(wrong: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        DepthDataConfig(**wrong)  # type: ignore[arg-type]
    for config in (StereoAugmentConfig, FlowAugmentConfig):
        with pytest.raises(ConfigError, match="scale"):
            config(scale=1.5)


# ---------------------------------------------------------------------------------------------------------------------
# Augmentation


def textured(height: int = 48, width: int = 64, kind: str = "flow") -> DensePair:
    """A smooth pattern and the same moved, so that the flow is 3 and -2 pixels (the disparity 4); truth is unknown in a corner."""
    motion = torch.tensor([3.0, -2.0]) if kind == "flow" else torch.tensor([-4.0, 0.0])

    def pattern(places: torch.Tensor) -> torch.Tensor:
        x, y = places.unbind(-1)
        return torch.stack([0.5 + 0.4 * torch.sin(x / 7 + y / 11), 0.5 + 0.4 * torch.cos(y / 9), 0.5 + 0.3 * torch.sin(x / 13)])

    places = pixel_centers(height, width)
    values = motion if kind == "flow" else -motion[:1]
    truth = values[:, None, None].expand(-1, height, width).clone()
    truth[:, :10, :10] = torch.inf
    return DensePair(pattern(places), pattern(places - motion), truth)


def mismatch(pair: DensePair, kind: str) -> float:
    """Median difference between the image and the reference taken where truth says, where that is inside."""
    assert pair.reference is not None
    known = pair.truth.isfinite().all(0)
    motion = pair.truth if kind == "flow" else torch.cat([-pair.truth, torch.zeros_like(pair.truth)])
    height, width = pair.shape
    place = (pixel_centers(height, width) + torch.where(known, motion, 0.0).permute(1, 2, 0)) / torch.tensor([width, height]) * 2 - 1
    warped = grid_sample(pair.reference[None], place[None], align_corners=False)[0]
    inside = known & (place.abs() < 0.95).all(-1)
    assert inside.sum() > 100
    return float((warped - pair.image).abs().amax(0)[inside].quantile(0.9))


@pytest.mark.parametrize("seed", range(8))
def test_flow_stays_true(seed: int) -> None:
    pair = textured()
    assert mismatch(pair, "flow") < 0.01
    config = FlowAugmentConfig(scale=1.0, stretch=1.0, vertical_flip=0.5, color=STILL)
    changed = augment_flow(pair, np.random.default_rng(seed), config, (36, 40), "x")
    assert changed.shape == (36, 40)
    assert changed.truth.shape == (2, 36, 40)
    assert mismatch(changed, "flow") < 0.02


@pytest.mark.parametrize("seed", range(8))
def test_disparity_stays_true(seed: int) -> None:
    pair = textured(kind="disparity")
    config = StereoAugmentConfig(scale=1.0, misalign=0.0, color=0.0)
    changed = augment_stereo(pair, np.random.default_rng(seed), config, (36, 40), "x")
    assert changed.shape == (36, 40)
    assert mismatch(changed, "disparity") < 0.02
    assert 4 <= float(changed.truth[changed.truth.isfinite()].max()) <= 8.1  # stretched by 1 to 2


def test_scaling_by_hand() -> None:
    pair = textured(20, 40, "disparity")
    wider = scale_pair(pair, (1.0, 1.5), (10, 10), "disparity")
    assert wider.shape == (20, 60)
    assert wider.truth[0, 15, 30] == 6.0
    assert wider.truth[0].isinf().sum() == 10 * 15  # nothing mixes with the unknown
    smaller = scale_pair(textured(20, 40), (0.5, 0.75), (12, 10), "flow")
    assert smaller.shape == (12, 30)  # not below the window
    assert smaller.truth[:, 11, 20].tolist() == pytest.approx([3 * 0.75, -2 * 0.6])


def test_flips_by_hand() -> None:
    pair = textured()
    mirrored = flip_pair(pair, 2, (-1.0, 1.0))
    assert torch.equal(mirrored.image, pair.image.flip(2))
    assert mirrored.truth[:, 20, 20].tolist() == [-3, -2]
    assert not mirrored.truth[:, 0, -1].isfinite().any()
    assert mismatch(mirrored, "flow") < 0.01
    assert flip_pair(pair, 1, (1.0, -1.0)).truth[:, 20, 20].tolist() == [3, 2]


def test_misalignment() -> None:
    image = textured().image
    assert torch.allclose(misalign(image, 0.0, 0.0), image, atol=1e-5)
    assert torch.allclose(misalign(image, 0.0, 2.0)[:, 2:], image[:, :-2], atol=1e-4)  # down
    turned = misalign(image[:, :48, :48], 90.0, 0.0)
    assert torch.allclose(turned, torch.rot90(image[:, :48, :48], 1, (1, 2)), atol=1e-4)


def test_stereo_colors() -> None:
    rng = np.random.default_rng(0)
    draws = [draw_stereo_colors(rng) for _ in range(800)]
    assert 0.44 < np.mean([len(draw) == 1 for draw in draws]) < 0.56
    assert {draw[0][0] for draw in draws if len(draw) == 1} == {"contrast", "gamma", "brightness", "hue", "saturation"}
    saturation = [dict(draw)["saturation"] for draw in draws if "saturation" in dict(draw)]
    assert 0.8 <= min(saturation) < 0.82  # not the negative factors of the published code
    pair = textured(kind="disparity")
    config = StereoAugmentConfig(scale=0.0, vertical_flip=0.0, misalign=0.0, asymmetric=0.0)
    same = augment_stereo(DensePair(pair.image, pair.image, pair.truth), np.random.default_rng(3), config, (48, 64), "x")
    assert torch.equal(same.image, same.reference)  # type: ignore[arg-type]
    assert not torch.equal(same.image, pair.image)
    config.asymmetric = 1.0
    apart = augment_stereo(DensePair(pair.image, pair.image, pair.truth), np.random.default_rng(3), config, (48, 64), "x")
    assert not torch.equal(apart.image, apart.reference)  # type: ignore[arg-type]


def test_the_published_probabilities_are_the_defaults() -> None:
    stereo, flow = StereoAugmentConfig(), FlowAugmentConfig()
    assert (stereo.scale, stereo.vertical_flip, stereo.misalign, stereo.asymmetric) == (0.5, 0.5, 0.5, 0.5)
    assert (flow.scale, flow.scale_range, flow.stretch, flow.horizontal_flip, flow.vertical_flip) == (0.8, (-0.2, 0.5), 0.8, 0.5, 0.1)
    assert (flow.color.brightness, flow.color.contrast, flow.color.saturation, flow.color.asymmetric) == (0.4, 0.4, 0.4, 0.2)
    assert flow.color.hue == pytest.approx(0.159, abs=2e-4)
    assert (StereoDataConfig().crop, FlowDataConfig().crop) == ((352, 704), (320, 384))


@pytest.mark.skipif("GEOSSL_REAL_DATA" not in os.environ, reason="GEOSSL_REAL_DATA is not set")
@pytest.mark.parametrize(("name", "least"), [("aloe", 3.5), ("cones", 3.5), ("teddy", 3.5), ("adirondack", 1.8)])
def test_real_disparity_carries_the_right_photograph_onto_the_left(tmp_path: Path, name: str, least: float) -> None:
    root = Path(os.environ["GEOSSL_REAL_DATA"]) / "image_pairs"
    line = "\t".join(str(root / part) for part in (f"images/{name}_left.jpg", f"images/{name}_right.jpg", f"gt/{name}_left_disp.png"))
    (tmp_path / "list.txt").write_text(line)
    sample = StereoDataConfig(layout="list", root=tmp_path / "list.txt").build("all").get(0)
    assert sample.truth is not None
    assert sample.reference is not None
    images = [denormalize_images(image).mean(0) for image in (sample.image, sample.reference)]
    known = sample.truth[0].isfinite()
    height, width = images[0].shape
    place = pixel_centers(height, width)
    place[..., 0] -= torch.where(known, sample.truth[0], 0.0)
    warped = grid_sample(images[1][None, None], (place / torch.tensor([width, height]) * 2 - 1)[None], align_corners=False)[0, 0]
    known &= place[..., 0] > 0
    before, after = (float((image - images[0]).abs()[known].mean()) for image in (images[1], warped))
    assert before > least * after
