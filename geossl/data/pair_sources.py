"""Where pairs are made from: places of which posed images are known, and lists of pairs that somebody else chose.

:func:`find_places` takes a folder or file and tells what it is. A :class:`Place` is one scene: pairs are only ever made within one, so no
pair shows two different scenes.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from geossl.data.colmap import has_colmap, read_colmap
from geossl.data.files import existing, read_json
from geossl.data.image_files import decode_image
from geossl.data.pair_mining import DepthGeometry, Geometry, MiningOptions, PointGeometry
from geossl.data.room_shards import NAME as ROOMS
from geossl.data.room_shards import RoomShardsConfig, RoomShardsDataset
from geossl.data.scene import fitted_intrinsics, read_depth
from geossl.data.scene_readers import RGBDFolderConfig, TransformsConfig
from geossl.errors import DataError

_COLUMNS = 128  # of the depth images that are compared
_DEPTH = 4  # folders below the source in which scenes are looked for


@dataclass(frozen=True)
class Place:
    """One scene of a source.

    Args:
        name: What it is called: its folder, relative to the source.
        open: Reads what is known of it.
    """

    name: str
    open: Callable[[MiningOptions], PosedImages]


@dataclass(frozen=True)
class PosedImages:
    """The images of one place that can be used, and what they see.

    Args:
        names: What the images are called: their files, where they have some.
        read: Decodes an image by its number, ``[3, H, W]`` uint8.
        geometry: What they see; None where pairs are not to be mined but are known (``pairs``).
        known: What ``geometry`` rests on: ``depth``, ``points`` or ``focus``.
        left_out: Why frames were left out, and how many for each reason.
        pairs: Pairs that are known, with the overlap of each; None where they are to be mined.
    """

    names: list[str]
    read: Callable[[int], Tensor]
    geometry: Geometry | None
    known: str
    left_out: dict[str, int] = field(default_factory=dict)
    pairs: list[tuple[int, int, float]] | None = None


def find_places(source: Path) -> list[Place]:
    """Find the scenes in a source, in a fixed order; none where it holds no posed images.

    Known are rooms written by ``prepare_data.py rooms``, folders of RGB-D frames (7-Scenes, ScanNet), a ``transforms.json`` or its folder,
    and COLMAP models with their ``images``; or a folder of such folders.
    """
    return list(_search(source, source, 0))


def _search(folder: Path, source: Path, depth: int) -> Iterator[Place]:
    name = "." if folder == source else folder.relative_to(source).as_posix()
    if folder.suffix == ".json" and folder.is_file():
        yield Place(folder.stem, functools.partial(_transforms, folder))
        return
    if not existing(folder, "source").is_dir():
        return
    index = folder / "index.json"
    if index.is_file() and read_json(index).get("format") == ROOMS:
        yield from _rooms(folder, name)
    elif (folder / "transforms.json").is_file():
        yield Place(name, functools.partial(_transforms, folder))
    elif has_colmap(folder):
        yield Place(name, functools.partial(_colmap, folder))
    elif (folder / "pose").is_dir() or next(folder.glob("frame-*.pose.txt"), None) is not None:
        yield Place(name, functools.partial(_frames, folder))
    elif depth < _DEPTH:
        for below in sorted(path for path in folder.iterdir() if path.is_dir()):
            yield from _search(below, source, depth + 1)


def _read_file(paths: list[Path], number: int) -> Tensor:
    return decode_image(paths[number], str(paths[number]))


def _small(size: tuple[int, int]) -> tuple[int, int]:
    """Return the width and height to which depth images of ``size`` are reduced to be compared."""
    return (_COLUMNS, max(1, round(_COLUMNS * size[1] / size[0]))) if size[0] > _COLUMNS else size


def _with_depth(
    paths: list[Path], frames: Iterator[tuple[int, Tensor, Tensor, Tensor]], options: MiningOptions, left_out: Counter[str]
) -> PosedImages:
    """Join the frames that have enough depth; those without are counted in ``left_out``."""
    kept, depths, intrinsics, poses = [], [], [], []
    for number, depth, k, pose in frames:
        if float((depth > 0).float().mean()) < options.min_known:
            left_out["depth in too few pixels"] += 1
            continue
        kept.append(paths[number])
        depths.append(depth)
        intrinsics.append(k)
        poses.append(pose)
    if not kept:
        raise DataError(f"{paths[0].parent if paths else 'source'}: no frame can be used ({_counts(left_out)})")
    shapes = {tuple(depth.shape) for depth in depths}
    if len(shapes) > 1:
        raise DataError(f"{paths[0].parent}: depth images of one place must have one shape, got {sorted(shapes)}")
    geometry = DepthGeometry(torch.stack(depths), torch.stack(intrinsics), torch.stack(poses), options.tolerance)
    return PosedImages([str(path) for path in kept], functools.partial(_read_file, kept), geometry, "depth", dict(left_out))


def _counts(left_out: Counter[str]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in left_out.items()) or "there is none"


def _frames(root: Path, options: MiningOptions) -> PosedImages:
    """Open a folder of RGB-D frames."""
    data = RGBDFolderConfig(root=root, views=1, step=1, points=0).build()
    left_out: Counter[str] = Counter({"pose not known": len(data.skipped)} if data.skipped else {})
    paths = [data.files(number)[0] for number in range(len(data.frames))]

    def frames() -> Iterator[tuple[int, Tensor, Tensor, Tensor]]:
        for number, color in enumerate(paths):
            try:
                existing(color, "image")
                depth, stored = _read_small_depth(data.files(number)[1])
            except DataError:
                left_out["image or depth missing or damaged"] += 1
                continue
            depth[depth > data.config.max_depth] = 0  # type: ignore[attr-defined]
            k = fitted_intrinsics(torch.from_numpy(data.intrinsics).float(), stored, (depth.shape[1], depth.shape[0]))
            yield number, depth, k, data.poses[number]

    return _with_depth(paths, frames(), options, left_out)


def _read_small_depth(path: Path) -> tuple[Tensor, tuple[int, int]]:
    """Read a depth image, reduced to be compared, and its stored width and height."""
    from PIL import Image

    try:
        with Image.open(existing(path, "depth image")) as image:
            size = image.size
    except OSError as error:
        raise DataError(f"{path}: cannot be read as a depth image ({error})") from error
    return read_depth(path, size=_small(size))


def _transforms(root: Path, options: MiningOptions) -> PosedImages:
    """Open a ``transforms.json``: with depth images where it names them, else as cameras around a common focus."""
    data = TransformsConfig(root=root, views=1).build()
    left_out: Counter[str] = Counter({"image missing": len(data.skipped)} if data.skipped else {})
    paths, cameras, sizes = [], [], []
    for number, path in enumerate(data.frames):
        try:
            stored = _image_size(path)
            k, pose = data.camera(number, stored)
        except DataError as error:
            left_out["pose not finite" if "not finite" in str(error) else "image or camera not usable"] += 1
            continue
        paths.append((path, data.depth_file(number)))
        cameras.append((k, pose))
        sizes.append(stored)
    files = [path for path, _ in paths]
    if not files:
        raise DataError(f"{root}: no frame can be used ({_counts(left_out)})")
    if all(depth is None for _, depth in paths):
        return _focused(root, files, sizes, cameras, left_out)

    def frames() -> Iterator[tuple[int, Tensor, Tensor, Tensor]]:
        for number, (_, file) in enumerate(paths):
            try:
                depth = None if file is None else _read_small_depth(file)[0]
            except DataError:
                depth = None
            if depth is None:
                left_out["depth missing or damaged"] += 1
                continue
            k, pose = cameras[number]
            yield number, depth, fitted_intrinsics(k, sizes[number], (depth.shape[1], depth.shape[0])), pose

    return _with_depth(files, frames(), options, left_out)


def _image_size(path: Path) -> tuple[int, int]:
    from PIL import Image

    try:
        with Image.open(path) as image:
            return image.size
    except OSError as error:
        raise DataError(f"{path}: cannot be read as an image ({error})") from error


def _focused(
    root: Path, paths: list[Path], sizes: list[tuple[int, int]], cameras: list[tuple[Tensor, Tensor]], left_out: Counter[str]
) -> PosedImages:
    """Images without depth: each is taken to show a plane across its axis, at the distance of the point nearest to all axes."""
    poses = torch.stack([pose for _, pose in cameras]).double()
    axes, centers = poses[:, 2, :3], -(poses[:, :3, :3].mT @ poses[:, :3, 3:])[..., 0]
    across = torch.eye(3, dtype=torch.float64) - axes[:, :, None] * axes[:, None, :]
    focus = torch.linalg.lstsq(across.sum(0), (across @ centers[..., None]).sum(0)).solution[:, 0]
    distance = ((focus - centers) * axes).sum(1)
    kept = torch.nonzero(distance > 0)[:, 0].tolist()
    if len(kept) < 0.75 * len(paths):
        raise DataError(
            f"{root}: has no depth images, and {len(paths) - len(kept)} of {len(paths)} cameras look away from the point nearest to all "
            "their axes, so what they see in common cannot be told; give depth_file_path for each frame, or a COLMAP model with points"
        )
    if len(kept) < len(paths):
        left_out["looks away from the common focus"] += len(paths) - len(kept)
    depths, intrinsics = [], []
    for number in kept:
        width, height = _COLUMNS, max(1, round(_COLUMNS * sizes[number][1] / sizes[number][0]))
        depths.append(torch.full((height, width), float(distance[number])))
        intrinsics.append(fitted_intrinsics(cameras[number][0], sizes[number], (width, height)))
    if len({tuple(depth.shape) for depth in depths}) > 1:
        raise DataError(f"{root}: images of one place must have one shape, portrait or landscape; split the list")
    geometry = DepthGeometry(torch.stack(depths), torch.stack(intrinsics), poses[kept], tolerance=math.inf)
    files = [paths[number] for number in kept]
    return PosedImages([str(path) for path in files], functools.partial(_read_file, files), geometry, "focus", dict(left_out))


def _colmap(root: Path, options: MiningOptions) -> PosedImages:
    """Open a COLMAP model: two images share the points that were triangulated from both."""
    model = read_colmap(root)
    left_out: Counter[str] = Counter()
    files, seen, places, poses = [], [], [], []
    for image in model.images:
        path = model.image_folder / image.name
        if not path.is_file():
            left_out["image missing"] += 1
            continue
        if len(image.points) < 20:
            left_out["fewer than 20 points"] += 1
            continue
        files.append(path)
        seen.append(image.points)
        places.append(image.places)
        poses.append(torch.from_numpy(image.world_to_cam))
    if not files:
        raise DataError(f"{root}: no image of the model can be used ({_counts(left_out)})")
    geometry = PointGeometry(seen, places, torch.stack(poses))
    return PosedImages([str(path) for path in files], functools.partial(_read_file, files), geometry, "points", dict(left_out))


def _rooms(root: Path, name: str) -> Iterator[Place]:
    """Yield the rooms of a set: with the pairs written with them where there are some, else to be mined from their views."""
    data = RoomShardsConfig(root=root, views=1, points=0).build()
    for row in range(len(data)):
        yield Place(f"{name}/room_{row:06d}".removeprefix("./"), functools.partial(_room, root, row))


@functools.lru_cache(maxsize=4)
def _room_shards(root: Path, views: int) -> RoomShardsDataset:
    return RoomShardsConfig(root=root, views=views, points=0).build()


def _room(root: Path, row: int, options: MiningOptions) -> PosedImages:
    first = _room_shards(root, 1)
    settings: dict[str, Any] = first.settings
    if settings.get("pairs") and settings.get("layout") == "webdataset":
        return _room_pairs(first, row)
    sample = _room_shards(root, settings["views"])[row]
    if sample.depth is None or sample.valid is None:
        raise DataError(f"{sample.source}: has no depth")
    images = (sample.image * 255).round().byte()
    height, width = sample.depth.shape[1:]
    step = max(1, round(width / _COLUMNS))
    depth = torch.where(sample.valid, sample.depth, 0.0)[:, step // 2 :: step, step // 2 :: step]
    k = fitted_intrinsics(sample.intrinsics, (width, height), (depth.shape[2], depth.shape[1]))
    geometry = DepthGeometry(depth, k, sample.world_to_cam, options.tolerance)
    names = [f"{sample.source} view {view}" for view in range(len(images))]
    return PosedImages(names, images.__getitem__, geometry, "depth")


def _room_pairs(data: RoomShardsDataset, row: int) -> PosedImages:
    """The pairs that ``prepare_data.py rooms --pairs`` wrote."""
    members = data.members(row)
    kind, source = data.settings["image"], f"{data.config.root} room {row}"  # type: ignore[attr-defined]
    images, names, pairs = [], [], []
    for number in range(data.settings["pairs"]):
        with np.load(_bytes(members[f"pair_{number:03d}.npz"]), allow_pickle=False) as arrays:
            overlap = float(arrays["overlap"])
        for side in (1, 2):
            member = f"pair_{number:03d}_{side}.{kind}"
            names.append(f"{source} {member}")
            images.append(decode_image(members[member], names[-1]))
        pairs.append((2 * number, 2 * number + 1, overlap))
    return PosedImages(names, images.__getitem__, None, "depth", pairs=pairs)


def _bytes(data: bytes) -> Any:
    import io

    return io.BytesIO(data)
