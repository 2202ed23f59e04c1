"""Readers of posed images in the layouts in which they are published: 7-Scenes, ScanNet, SUN RGB-D and ``transforms.json``."""

from __future__ import annotations

import json
import logging
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from geossl.config import require
from geossl.data.files import check_finite, existing, read_lines, read_npz
from geossl.data.readers import name_seed
from geossl.data.scene import SCENES, SceneDataConfig, SceneDataset, SceneSample, depth_cloud, fitted_intrinsics, read_depth, read_image
from geossl.errors import DataError
from geossl.geometry import invert_pose

log = logging.getLogger(__name__)

SUNRGBD_CLASSES = ("bed", "table", "sofa", "chair", "toilet", "desk", "dresser", "night_stand", "bookshelf", "bathtub")
_SEVEN_SCENES_K = ((585.0, 0.0, 320.0), (0.0, 585.0, 240.0), (0.0, 0.0, 1.0))


def read_matrix(path: Path, rows: int, columns: int) -> np.ndarray:
    """Read a matrix written as text, one row a line (further rows and columns are left out); it may hold infinities.

    Raises:
        DataError: the file is missing or holds something else.
    """
    lines = [line.replace(",", " ").split() for line in read_lines(path)]
    try:
        values = np.array([[float(word) for word in line[:columns]] for line in lines[:rows]])
    except ValueError as error:
        raise DataError(f"{path}: is not a matrix of numbers ({error})") from error
    if values.shape != (rows, columns):
        raise DataError(f"{path}: expected at least {rows} x {columns} numbers, got {[len(line) for line in lines]} a line")
    return values


def checked_intrinsics(k: np.ndarray, source: str) -> np.ndarray:
    """Return ``k [3, 3]``.

    Raises:
        DataError: it is not finite, or a focal length is not positive.
    """
    if not np.isfinite(k).all() or k[0, 0] <= 0 or k[1, 1] <= 0:
        raise DataError(f"{source}: intrinsics must be finite with positive focal lengths, got {k.tolist()}")
    return k


def rigid(pose: np.ndarray, source: str) -> Tensor:
    """Return a pose ``[4, 4]`` float32 with its rotation made exact.

    Raises:
        DataError: the upper left part is no rotation, not even nearly.
    """
    u, s, v = np.linalg.svd(pose[:3, :3])
    if s.min() < 0.95 or s.max() > 1.05 or np.linalg.det(u @ v) < 0:
        raise DataError(f"{source}: is not a rotation and a translation (singular values {s.round(4).tolist()})")
    exact = np.eye(4)
    exact[:3, :3], exact[:3, 3] = u @ v, pose[:3, 3]
    return torch.from_numpy(exact).float()


@dataclass(kw_only=True)
class RGBDFolderConfig(SceneDataConfig):
    """RGB-D frames with poses, as 7-Scenes or ScanNet publish them.

    7-Scenes: ``frame-000000.color.png``, ``.depth.png`` (millimetres), ``.pose.txt`` (camera to world), and ``camera-intrinsics.txt``
    here or above (585 without one). ScanNet: ``color/0.jpg``, ``depth/0.png``, ``pose/0.txt``, ``intrinsic/intrinsic_depth.txt``, and
    ``<folder>.txt`` with the axis alignment. Frames without a pose are left out. A sample is ``views`` frames, ``step`` apart.
    """

    name: str = "rgbd_folder"
    root: Path = Path("data/7scenes/chess/seq-01")
    """Folder of the frames."""
    step: int = 20
    """Frames from one image of a sample to the next."""
    stride: int | None = None
    """Frames from one sample to the next; None takes what a sample spans."""
    max_depth: float = 10.0
    """Larger depths, in metres, are taken as unknown."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.step >= 1, "step", "must be at least 1", self.step)
        require(self.stride is None or self.stride >= 1, "stride", "must be at least 1", self.stride)
        require(self.max_depth > 0, "max_depth", "must be positive", self.max_depth)

    def build(self, split: str = "all") -> RGBDFolderDataset:
        """Make the data set; there are no parts: ``split`` is ``all``."""
        _only_all(self.name, split)
        return RGBDFolderDataset(self)


@SCENES.register
def rgbd_folder() -> RGBDFolderConfig:
    """A folder of RGB-D frames."""
    return RGBDFolderConfig()


def _only_all(name: str, split: str) -> None:
    if split != "all":
        raise DataError(f"{name}: has no parts; the split must be 'all', got {split!r} (give another root for another part)")


class RGBDFolderDataset(SceneDataset):
    """See :class:`RGBDFolderConfig`.

    ``frames`` are the names of the usable frames, ``poses`` their ``world_to_cam [4, 4]``, ``skipped`` the names of those without a pose;
    ``intrinsics [3, 3]`` float64 are those of the depth images.
    """

    def __init__(self, config: RGBDFolderConfig) -> None:
        root = existing(config.root, "folder")
        self.layout: Literal["7scenes", "scannet"] = "scannet" if (root / "pose").is_dir() else "7scenes"
        if self.layout == "scannet":
            poses = sorted((root / "pose").glob("*.txt"), key=lambda path: (len(path.stem), path.stem))
            self.intrinsics = read_matrix(root / "intrinsic" / "intrinsic_depth.txt", 3, 3)
        else:
            poses = sorted(root.glob("frame-*.pose.txt"))
            found = next((f / "camera-intrinsics.txt" for f in (root, root.parent) if (f / "camera-intrinsics.txt").exists()), None)
            self.intrinsics = np.array(_SEVEN_SCENES_K) if found is None else read_matrix(found, 3, 3)
        checked_intrinsics(self.intrinsics, f"{root} (camera)")
        if not poses:
            raise DataError(f"{root}: holds neither frame-*.pose.txt (7-Scenes) nor pose/*.txt (ScanNet); is this the right folder?")
        align = _axis_alignment(root) if self.layout == "scannet" else np.eye(4)
        self.frames: list[str] = []
        self.skipped: list[str] = []
        self.poses: list[Tensor] = []
        for path in poses:
            name = path.name.removesuffix(".txt").removesuffix(".pose")
            pose = read_matrix(path, 4, 4)
            if not np.isfinite(pose).all():
                self.skipped.append(name)
                continue
            self.frames.append(name)
            self.poses.append(invert_pose(rigid(align @ pose, str(path))))
        if self.skipped:
            log.warning("%s: left out %d of %d frames, whose pose is not known", root, len(self.skipped), len(poses))
        span = (config.views - 1) * config.step + 1
        if len(self.frames) < span:
            raise DataError(
                f"{root}: has {len(self.frames)} frames with a pose, a sample needs {span} (views={config.views}, step={config.step}); "
                "lower views or step"
            )
        stride = config.stride or span
        self._first = list(range(0, len(self.frames) - span + 1, stride))
        super().__init__(config, len(self._first))

    def files(self, frame: int) -> tuple[Path, Path]:
        """Return the files with colour and depth of a frame."""
        root, name = self.config.root, self.frames[frame]  # type: ignore[attr-defined]
        if self.layout == "scannet":
            return root / "color" / f"{name}.jpg", root / "depth" / f"{name}.png"
        color = root / f"{name}.color.png"
        return (color if color.exists() else color.with_suffix(".jpg")), root / f"{name}.depth.png"

    def read(self, row: int) -> SceneSample:
        """Return the frames of sample ``row``; colour is brought to the size of depth."""
        config: Any = self.config
        numbers = [self._first[row] + view * config.step for view in range(config.views)]
        images, depths, intrinsics = [], [], []
        for number in numbers:
            color, depth_file = self.files(number)
            wanted = None if config.width is None else (config.width, config.height)
            depth, stored = read_depth(depth_file, size=wanted)
            size = wanted or stored
            images.append(read_image(color, size)[0])
            depths.append(torch.where(depth <= config.max_depth, depth, 0.0))
            intrinsics.append(fitted_intrinsics(torch.from_numpy(self.intrinsics).float(), stored, size))
        source = f"{config.root} frames {', '.join(self.frames[number] for number in numbers)}"
        image, depth, k, pose = (
            torch.stack(images),
            torch.stack(depths),
            torch.stack(intrinsics),
            torch.stack([self.poses[n] for n in numbers]),
        )
        points = colors = None
        if config.points:
            rng = np.random.default_rng(name_seed(self.frames[numbers[0]]))
            points, colors, _ = depth_cloud(image, depth, k, pose, config.points, rng, source)
        return SceneSample(image, k, pose, depth, depth > 0, points=points, colors=colors, index=row, source=source)


def _axis_alignment(root: Path) -> np.ndarray:
    """Return ScanNet's rotation that turns a scan upright along its walls; the identity without one."""
    path = root / f"{root.name}.txt"
    if not path.exists():
        return np.eye(4)
    for line in read_lines(path):
        key, _, values = line.partition("=")
        if key.strip() == "axisAlignment":
            numbers = [float(word) for word in values.split()]
            if len(numbers) != 16:
                raise DataError(f"{path}: axisAlignment must have 16 numbers, got {len(numbers)}")
            return np.array(numbers).reshape(4, 4)
    return np.eye(4)


@dataclass(kw_only=True)
class SUNRGBDConfig(SceneDataConfig):
    """SUN RGB-D as VoteNet packages it: one image with a cloud and boxes.

    ``000001_pc.npz``, ``000001_bbox.npy`` in ``root``; ``calib/000001.txt`` and ``image/000001.jpg`` in ``images`` (None: in ``root``).
    The frame is the upright depth frame: x right, y forward, z up.
    """

    name: str = "sunrgbd"
    views: int = 1
    root: Path = Path("data/sunrgbd/sunrgbd_pc_bbox_votes_50k_v1_train")
    """Folder of the clouds and boxes."""
    images: Path | None = None
    """Folder with ``calib`` and ``image``."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.views == 1, "views", "must be 1: there is one image of each scene", self.views)

    def build(self, split: str = "all") -> SUNRGBDDataset:
        """Make the data set; there are no parts: ``split`` is ``all``."""
        _only_all(self.name, split)
        return SUNRGBDDataset(self)


@SCENES.register
def sunrgbd() -> SUNRGBDConfig:
    """SUN RGB-D in VoteNet's layout."""
    return SUNRGBDConfig()


class SUNRGBDDataset(SceneDataset):
    """See :class:`SUNRGBDConfig`. ``names`` are the numbers of the scenes."""

    def __init__(self, config: SUNRGBDConfig) -> None:
        root = existing(config.root, "folder")
        self.names = sorted(path.name.removesuffix("_pc.npz") for path in root.glob("*_pc.npz"))
        if not self.names:
            raise DataError(f"{root}: holds no *_pc.npz; expected VoteNet's files of SUN RGB-D")
        super().__init__(config, len(self.names), SUNRGBD_CLASSES)

    def read(self, row: int) -> SceneSample:
        """Return scene ``row``."""
        config: Any = self.config
        name, images = self.names[row], config.images or config.root
        path = config.root / f"{name}_pc.npz"
        cloud = read_npz(path, ["pc"])["pc"].astype(np.float32)
        if cloud.ndim != 2 or cloud.shape[1] < 6:
            raise DataError(f"{path}: pc must be [N, 6] (xyz, rgb), got {list(cloud.shape)}")
        check_finite(str(path), pc=cloud)
        boxes, labels = _votenet_boxes(config.root / f"{name}_bbox.npy")
        wanted = None if config.width is None else (config.width, config.height)
        image, stored = read_image(images / "image" / f"{name}.jpg", wanted)
        intrinsics, pose = _sunrgbd_camera(images / "calib" / f"{name}.txt")
        k = fitted_intrinsics(intrinsics, stored, wanted or stored)
        points = colors = None
        if config.points:
            rng = np.random.default_rng(name_seed(name))
            cloud = cloud[rng.choice(len(cloud), config.points, replace=len(cloud) < config.points)]
            points, colors = torch.from_numpy(cloud[:, :3].copy()), torch.from_numpy(cloud[:, 3:6].copy())
        return SceneSample(
            image[None], k[None], pose[None], points=points, colors=colors, boxes=boxes, labels=labels, classes=SUNRGBD_CLASSES, index=row,
            source=str(path),
        )  # fmt: skip


def _votenet_boxes(path: Path) -> tuple[Tensor, Tensor]:
    """Read VoteNet's boxes (centre, half sizes, clockwise heading, class) as ours."""
    try:
        table = np.load(existing(path), allow_pickle=False)
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read as npy; it is damaged or of another kind ({error})") from error
    table = table.reshape(-1, 8) if table.size == 0 else table
    if table.ndim != 2 or table.shape[1] != 8:
        raise DataError(f"{path}: boxes must be [n, 8] (centre, half sizes, heading, class), got {list(table.shape)}")
    check_finite(str(path), boxes=table)
    boxes = np.concatenate([table[:, :3], 2 * table[:, 3:6], -table[:, 6:7]], 1).astype(np.float32)
    labels = table[:, 7].astype(np.int64)
    if len(labels) and not (labels.min() >= 0 and labels.max() < len(SUNRGBD_CLASSES)):
        raise DataError(f"{path}: classes must lie in 0..{len(SUNRGBD_CLASSES) - 1}, got {labels.min()}..{labels.max()}")
    return torch.from_numpy(boxes), torch.from_numpy(labels)


def _sunrgbd_camera(path: Path) -> tuple[Tensor, Tensor]:
    """Read Rtilt and K (nine numbers a line, by columns): intrinsics in our convention, and world_to_cam."""
    lines = read_lines(path)
    try:
        tilt, k = (np.array([float(word) for word in line.split()]).reshape(3, 3).T for line in lines[:2])
    except ValueError as error:
        raise DataError(f"{path}: expected two lines of nine numbers, Rtilt and K ({error})") from error
    k[:2, 2] -= 0.5  # the first pixel's centre is at 1 there, at 0.5 here
    axes = np.array([[1.0, 0.0, 0.0], [0.0, 0.0, -1.0], [0.0, 1.0, 0.0]])
    pose = np.eye(4)
    pose[:3, :3] = axes @ tilt.T
    return torch.from_numpy(k).float(), rigid(pose, str(path))


@dataclass(kw_only=True)
class TransformsConfig(SceneDataConfig):
    """Posed images listed in a ``transforms.json`` (instant-ngp, nerfstudio): camera-to-world poses with OpenGL axes.

    Frames whose image is missing are left out. Lens distortion is not undone. A sample is ``views`` images spread over the list.
    """

    name: str = "transforms"
    root: Path = Path("data/nerf/fox")
    """Folder of ``transforms.json``, or that file."""
    all_views: bool = False
    """One sample with every image; ``views`` is not used then."""

    def build(self, split: str = "all") -> TransformsDataset:
        """Make the data set; there are no parts: ``split`` is ``all``."""
        _only_all(self.name, split)
        return TransformsDataset(self)


@SCENES.register
def transforms() -> TransformsConfig:
    """Images with a transforms.json."""
    return TransformsConfig()


class TransformsDataset(SceneDataset):
    """See :class:`TransformsConfig`. ``frames`` are the files of the usable images, ``skipped`` those that are missing."""

    def __init__(self, config: TransformsConfig) -> None:
        path = config.root if config.root.suffix == ".json" else config.root / "transforms.json"
        try:
            self._table = json.loads(existing(path).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise DataError(f"{path}: is not readable JSON ({error})") from error
        if not isinstance(self._table, dict) or not isinstance(self._table.get("frames"), list):
            raise DataError(f"{path}: has no list 'frames'; expected the transforms.json of instant-ngp or nerfstudio")
        self.frames: list[Path] = []
        self.skipped: list[str] = []
        self._entries: list[dict[str, Any]] = []
        for number, entry in enumerate(self._table["frames"]):
            if not isinstance(entry, dict) or "file_path" not in entry or not _is_matrix(entry.get("transform_matrix")):
                raise DataError(f"{path}: frame {number} needs a file_path and a 4 x 4 transform_matrix")
            image = _image_file(path.parent, str(entry["file_path"]))
            if image is None:
                self.skipped.append(str(entry["file_path"]))
                continue
            self.frames.append(image)
            self._entries.append(entry)
        if self.skipped:
            log.warning("%s: left out %d of %d frames, whose image is missing", path, len(self.skipped), len(self._table["frames"]))
        count = len(self.frames) if config.all_views else config.views
        if len(self.frames) < max(count, 1):
            raise DataError(f"{path}: lists {len(self.frames)} images that exist, a sample needs {max(count, 1)}; lower views")
        self._path, self._count = path, count
        super().__init__(config, max(1, len(self.frames) // count))

    def read(self, row: int) -> SceneSample:
        """Return ``views`` images, every n-th of the list, beginning with the ``row``-th."""
        config: Any = self.config
        numbers = [row + view * len(self) for view in range(self._count)]
        images, intrinsics, poses = [], [], []
        for number in numbers:
            wanted = None if config.width is None else (config.width, config.height)
            image, stored = read_image(self.frames[number], wanted)
            images.append(image)
            k, pose = self.camera(number, stored)
            intrinsics.append(fitted_intrinsics(k, stored, wanted or stored))
            poses.append(pose)
        shapes = {tuple(image.shape) for image in images}
        if len(shapes) > 1:
            raise DataError(f"{self._path}: images differ in size ({sorted(shapes)}); give width and height to bring them to one")
        return SceneSample(torch.stack(images), torch.stack(intrinsics), torch.stack(poses), index=row, source=str(self._path))

    def camera(self, number: int, stored: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Return intrinsics ``[3, 3]`` and ``world_to_cam [4, 4]`` of image ``number``, which has ``stored`` width and height.

        Raises:
            DataError: they are not known, or not finite.
        """
        k = _transforms_intrinsics({**self._table, **self._entries[number]}, stored, str(self._path))
        pose = np.array(self._entries[number]["transform_matrix"], dtype=np.float64)
        if not np.isfinite(pose).all():
            raise DataError(f"{self._path}: transform_matrix of {self.frames[number].name} is not finite")
        pose[:3, 1:3] *= -1  # OpenGL's y up and z backward become OpenCV's y down and z forward
        return k, invert_pose(rigid(pose, f"{self._path} {self.frames[number].name}"))

    def depth_file(self, number: int) -> Path | None:
        """Return the depth image of image ``number`` (nerfstudio's ``depth_file_path``), None without."""
        name = self._entries[number].get("depth_file_path")
        return None if name is None else self._path.parent / str(name)


def _is_matrix(value: Any) -> bool:
    """Whether JSON holds 4 x 4 numbers."""
    try:
        return np.array(value, dtype=np.float64).shape == (4, 4)
    except (TypeError, ValueError):
        return False


def _image_file(folder: Path, name: str) -> Path | None:
    """Return the file of an image; names may lack their suffix."""
    for candidate in (name, f"{name}.png", f"{name}.jpg", f"{name}.jpeg"):
        if (folder / candidate).is_file():
            return folder / candidate
    return None


def _transforms_intrinsics(table: dict[str, Any], stored: tuple[int, int], source: str) -> Tensor:
    """Return ``[3, 3]`` for an image of ``stored`` width and height."""
    try:
        width, height = float(table.get("w", stored[0])), float(table.get("h", stored[1]))
        if not (1 <= width < math.inf and 1 <= height < math.inf):
            raise DataError(f"{source}: w and h must be at least 1, got {width} and {height}")
        if "fl_x" in table:
            fx = float(table["fl_x"])
        elif "camera_angle_x" in table:
            angle = float(table["camera_angle_x"])
            if not 0 < angle < math.pi:
                raise DataError(f"{source}: camera_angle_x must lie between 0 and pi, got {angle}")
            fx = 0.5 * width / math.tan(angle / 2)
        else:
            raise DataError(f"{source}: gives neither fl_x nor camera_angle_x: the focal length is not known")
        fy, cx, cy = float(table.get("fl_y", fx)), float(table.get("cx", width / 2)), float(table.get("cy", height / 2))
    except (TypeError, ValueError, OverflowError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{source}: w, h, fl_x, fl_y, cx, cy and camera_angle_x must be numbers ({error})") from error
    k = checked_intrinsics(np.array([[fx, 0.0, cx], [0.0, fy, cy], [0.0, 0.0, 1.0]]), source)
    return fitted_intrinsics(torch.from_numpy(k).float(), (int(width), int(height)), stored)
