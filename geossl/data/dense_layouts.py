"""Where published data sets of stereo and flow keep their files, and which of them are held out for validation as CroCo v2 does."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from geossl.data.files import existing, read_lines
from geossl.errors import DataError


@dataclass(frozen=True)
class DenseFiles:
    """The files of one sample: image, reference (None for depth) and truth; ``held_out`` ones are the test part."""

    image: Path
    reference: Path | None
    truth: Path
    held_out: bool = False


Find = Callable[[Path], Iterator[DenseFiles]]


HeldOut = Callable[[str, int, int], bool]


@dataclass(frozen=True)
class Layout:
    """How a data set lies on disk.

    Args:
        find: Yields the files below a root, in a fixed order.
        png_scale: Units of disparity in a png to the pixel.
        needs: What an error says the root should hold.
    """

    find: Find
    needs: str
    png_scale: float = 256.0


def _last(files: list[DenseFiles], count: int) -> Iterator[DenseFiles]:
    """Yield all files, the last ``count`` as held out."""
    for number, one in enumerate(files):
        yield DenseFiles(one.image, one.reference, one.truth, number >= len(files) - count)


def _kitti(first: str, second: str, truth: str, step: bool, held_out: int) -> Find:
    """KITTI: ``training/FIRST/000000_10.png``; the reference is another camera's, or (``step``) the next frame, ``_11``."""

    def find(root: Path) -> Iterator[DenseFiles]:
        base = root / "training" if (root / "training").is_dir() else root
        images = sorted((base / first).glob("*_10.png"))
        names = [(path, path.name.replace("_10", "_11") if step else path.name) for path in images]
        return _last([DenseFiles(path, base / second / name, base / truth / path.name) for path, name in names], held_out)

    return find


def _middlebury(left: str, right: str, truths: tuple[str, ...], held_out: Callable[[str, int, int], bool]) -> Find:
    """Middlebury and ETH3D: a folder for each scene. ``held_out`` is told the scene's name, its number and how many there are."""

    def find(root: Path) -> Iterator[DenseFiles]:
        scenes = sorted(path.parent for path in root.rglob(left) if (path.parent / right).is_file())
        for number, scene in enumerate(scenes):
            truth = next((scene / name for name in truths if (scene / name).is_file()), scene / truths[0])
            yield DenseFiles(scene / left, scene / right, truth, held_out(scene.name, number, len(scenes)))

    return find


def _named(*names: str) -> HeldOut:
    return lambda name, number, count: name in names


def _final(last: int) -> HeldOut:
    return lambda name, number, count: number >= count - last


def _sceneflow(kind: str) -> Find:
    """FlyingThings3D, Monkaa and Driving: ``frames_cleanpass`` and ``frames_finalpass`` beside ``disparity`` or ``optical_flow``."""

    def find(root: Path) -> Iterator[DenseFiles]:
        for image in sorted(path for folder in ("frames_cleanpass", "frames_finalpass") for path in root.rglob(f"{folder}/**/left/*.png")):
            parts = list(image.parts)
            place = next(n for n in range(len(parts) - 1, -1, -1) if parts[n] in ("frames_cleanpass", "frames_finalpass"))
            inner = parts[place + 1 : -2]
            base, held_out = Path(*parts[:place]), bool(inner) and inner[0] == "TEST"
            if kind == "disparity":
                truth = Path(base, "disparity", *inner, "left", f"{image.stem}.pfm")
                yield DenseFiles(image, image.parent.parent / "right" / image.name, truth, held_out)
                continue
            following = image.with_name(f"{int(image.stem) + 1:0{len(image.stem)}d}.png")
            if following.is_file():  # the last frame of a film has none
                truth = Path(base, "optical_flow", *inner, "into_future", "left", f"OpticalFlowIntoFuture_{image.stem}_L.pfm")
                yield DenseFiles(image, following, truth, held_out)

    return find


def _crestereo(root: Path) -> Iterator[DenseFiles]:
    for image in sorted(root.rglob("*_left.jpg")):
        stem = image.name.removesuffix("_left.jpg")
        yield DenseFiles(image, image.with_name(f"{stem}_right.jpg"), image.with_name(f"{stem}_left.disp.png"))


def _spring(kind: str) -> Find:
    """Spring: ``train/0001/frame_left/frame_left_0001.png``; scene 0041 is held out."""

    def find(root: Path) -> Iterator[DenseFiles]:
        for image in sorted(root.rglob("frame_left/frame_left_*.png")):
            scene, number = image.parent.parent, image.stem.rsplit("_", 1)[1]
            held_out = scene.name == "0041"
            if kind == "disparity":
                truth = scene / "disp1_left" / f"disp1_left_{number}.dsp5"
                yield DenseFiles(image, scene / "frame_right" / f"frame_right_{number}.png", truth, held_out)
                continue
            following = image.with_name(f"frame_left_{int(number) + 1:04d}.png")
            if following.is_file():
                yield DenseFiles(image, following, scene / "flow_FW_left" / f"flow_FW_left_{number}.flo5", held_out)

    return find


def _sintel(root: Path) -> Iterator[DenseFiles]:
    """Sintel: ``training/clean`` and ``training/final`` beside ``training/flow``; temple_2 and temple_3 are held out."""
    base = root / "training" if (root / "training").is_dir() else root
    for image in sorted(path for kind in ("clean", "final") for path in (base / kind).glob("*/frame_*.png")):
        following = image.with_name(f"frame_{int(image.stem[-4:]) + 1:04d}.png")
        if following.is_file():
            scene = image.parent.name
            yield DenseFiles(image, following, base / "flow" / scene / f"{image.stem}.flo", scene in ("temple_2", "temple_3"))


def _tartanair(root: Path) -> Iterator[DenseFiles]:
    """TartanAir: ``ENVIRONMENT/Easy/P000/image_left/000000_left.png`` beside ``flow/000000_000001_flow.npy``; nothing is held out."""
    for image in sorted(root.rglob("image_left/*_left.png")):
        number = image.stem.removesuffix("_left")
        following = f"{int(number) + 1:0{len(number)}d}"
        reference = image.with_name(f"{following}_left.png")
        if reference.is_file():  # the last frame of a trajectory has none
            yield DenseFiles(image, reference, image.parent.parent / "flow" / f"{number}_{following}_flow.npy")


_CHAIRS_PARTS = "FlyingChairs_train_val.txt"


def _flying_chairs(root: Path) -> Iterator[DenseFiles]:
    """FlyingChairs: ``00001_img1.ppm``, in ``data`` or here; ``FlyingChairs_train_val.txt`` says with a 2 what is held out."""
    base = root / "data" if (root / "data").is_dir() else root
    images = sorted(base.glob("*_img1.ppm"))
    path = next((file for file in (root / _CHAIRS_PARTS, base / _CHAIRS_PARTS) if file.is_file()), None)
    marks = None if path is None else read_lines(path)
    for image in images:
        stem = image.name.removesuffix("_img1.ppm")
        if marks is not None and not (stem.isdecimal() and 0 < int(stem) <= len(marks)):
            raise DataError(f"{path}: has {len(marks)} lines, so none for pair {stem}")
        held_out = marks is not None and marks[int(stem) - 1] == "2"
        yield DenseFiles(image, base / f"{stem}_img2.ppm", base / f"{stem}_flow.flo", held_out)


def _listed(columns: int) -> Find:
    """A text file of one's own: paths a line, relative to it: image, reference (not for depth) and truth."""

    def find(root: Path) -> Iterator[DenseFiles]:
        if not root.is_file():
            raise DataError(f"{root}: with layout=list, root is a text file with {columns} paths a line")
        for line in read_lines(root):
            if line.startswith("#"):
                continue
            words = [word.strip() for word in line.split("\t" if "\t" in line else "," if "," in line else None)]
            if len(words) < columns or (columns == 3 and len(words) > 3):
                raise DataError(f"{root}: expected {columns} paths a line, parted by a tab, a comma or spaces, got {line[:200]!r}")
            paths = [_placed(word, root.parent) for word in words[:columns]]
            yield DenseFiles(paths[0], paths[1] if columns == 3 else None, paths[-1])

    return find


def _placed(name: str, folder: Path) -> Path:
    """Return a path of a list; lists of NYUv2 begin relative paths with a slash."""
    path = folder / name
    return path if path.exists() or not name.startswith("/") else folder / name.lstrip("/")


def _depth_folder(root: Path) -> Iterator[DenseFiles]:
    """``rgb/NAME.jpg`` (or png) with ``depth/NAME.png``, below ``train`` and ``test`` or without these."""
    parts = [(root / name, name == "test") for name in ("train", "test") if (root / name).is_dir()] or [(root, False)]
    for base, held_out in parts:
        for folder, below, files in os.walk(base):
            below.sort()
            if Path(folder).name == "rgb":
                for name in sorted(files):
                    yield DenseFiles(Path(folder) / name, None, Path(folder).parent / "depth" / f"{Path(name).stem}.png", held_out)


_SCENE_2005 = "SCENE/view1.png, view5.png and disp1.png"
_SCENE_2014 = "SCENE/im0.png, im1.png and disp0.pfm"
_SCENE_GT = "SCENE/im0.png, im1.png and disp0GT.pfm"
_views = partial(_middlebury, "view1.png", "view5.png", ("disp1.png",))
_images = partial(_middlebury, "im0.png", "im1.png")

STEREO: dict[str, Layout] = {
    "kitti2012": Layout(_kitti("colored_0", "colored_1", "disp_occ", False, 0), "training/colored_0, colored_1 and disp_occ"),
    "kitti2015": Layout(_kitti("image_2", "image_3", "disp_occ_0", False, 5), "training/image_2, image_3 and disp_occ_0"),
    "middlebury2005": Layout(_views(_named("Reindeer")), _SCENE_2005, 1.0),
    "middlebury2006": Layout(_views(_named("Rocks1", "Wood2")), _SCENE_2005, 1.0),
    "middlebury2014": Layout(_images(("disp0.pfm",), _named("Umbrella-imperfect", "Vintage-perfect")), _SCENE_2014),
    "middlebury2021": Layout(_images(("disp0.pfm",), _final(2)), _SCENE_2014),
    "middlebury_eval3": Layout(_images(("disp0GT.pfm", "disp0.pfm"), _final(1)), _SCENE_GT),
    "eth3d": Layout(_images(("disp0GT.pfm",), _named("delivery_area_3s", "electro_3l", "playground_3l")), _SCENE_GT),
    "sceneflow": Layout(_sceneflow("disparity"), "frames_cleanpass/.../left, right and disparity/.../left"),
    "crestereo": Layout(_crestereo, "NAME_left.jpg, NAME_right.jpg and NAME_left.disp.png", 32.0),
    "spring": Layout(_spring("disparity"), "train/SCENE/frame_left, frame_right and disp1_left"),
    "list": Layout(_listed(3), "a text file: left image, right image, disparity a line"),
}
"""Layouts of stereo data by name."""
FLOW: dict[str, Layout] = {
    "flyingchairs": Layout(_flying_chairs, "data/00001_img1.ppm, 00001_img2.ppm and 00001_flow.flo"),
    "flyingthings": Layout(_sceneflow("flow"), "frames_cleanpass/.../left and optical_flow/.../into_future/left"),
    "sintel": Layout(_sintel, "training/clean, training/final and training/flow"),
    "spring": Layout(_spring("flow"), "train/SCENE/frame_left and flow_FW_left"),
    "tartanair": Layout(_tartanair, "ENVIRONMENT/Easy/P000/image_left and flow"),
    "kitti2012": Layout(_kitti("colored_0", "colored_0", "flow_occ", True, 0), "training/colored_0 and flow_occ"),
    "kitti2015": Layout(_kitti("image_2", "image_2", "flow_occ", True, 10), "training/image_2 and flow_occ"),
    "list": Layout(_listed(3), "a text file: first image, second image, flow a line"),
}
"""Layouts of flow data by name."""
DEPTH: dict[str, Layout] = {
    "folder": Layout(_depth_folder, "rgb/NAME.jpg and depth/NAME.png, below train and test or without these"),
    "list": Layout(_listed(2), "a text file: image, depth image a line (further columns are not read)"),
}
"""Layouts of depth data by name."""


def find_files(layout: Layout, root: Path, split: str) -> tuple[list[DenseFiles], list[DenseFiles]]:
    """Return the samples of a split whose files are all there, and those of which one is missing.

    Raises:
        DataError: there is nothing of this layout, or the split is unknown.
    """
    if split not in ("train", "test", "all"):
        raise DataError(f"unknown split {split!r}; choose one of train, test, all")
    everything = list(layout.find(existing(root, "folder or list")))
    if not everything:
        raise DataError(f"{root}: holds nothing of this layout; expected {layout.needs}")
    chosen = [files for files in everything if split == "all" or files.held_out == (split == "test")]
    there: list[DenseFiles] = []
    missing: list[DenseFiles] = []
    for files in chosen:
        whole = all(path is None or path.is_file() for path in (files.image, files.reference, files.truth))
        (there if whole else missing).append(files)
    return there, missing
