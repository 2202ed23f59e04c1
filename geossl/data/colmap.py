"""Reading COLMAP models (text or binary): which reconstructed points each image sees, and where; poses and image sizes."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from geossl.data.files import existing
from geossl.errors import DataError
from geossl.geometry import quaternion_to_matrix

_PARAMETERS = (3, 4, 4, 5, 8, 8, 12, 5, 4, 5, 12)  # of COLMAP's camera models, by number


@dataclass(frozen=True)
class ColmapImage:
    """One registered image.

    Args:
        name: Its file, relative to the folder of the images.
        world_to_cam: ``[4, 4]`` float64.
        points: Numbers of the points it sees, ``[n]`` int64, sorted, without repetition.
        places: Where, ``[n, 2]`` float32, in parts of width and height.
    """

    name: str
    world_to_cam: np.ndarray
    points: np.ndarray
    places: np.ndarray


@dataclass(frozen=True)
class ColmapModel:
    """The registered images of a model, sorted by name, and the folder of their files."""

    images: list[ColmapImage]
    image_folder: Path


def _model_folder(root: Path) -> Path | None:
    for folder in (root / "sparse" / "0", root / "sparse", root):
        if any((folder / f"images{suffix}").is_file() and (folder / f"cameras{suffix}").is_file() for suffix in (".bin", ".txt")):
            return folder
    return None


def has_colmap(root: Path) -> bool:
    """Whether a folder holds a model, in itself, in ``sparse`` or in ``sparse/0``."""
    return _model_folder(root) is not None


def read_colmap(root: Path) -> ColmapModel:
    """Read the model of a folder; its images are in ``root/images``, or in ``root`` where there is no such folder.

    Raises:
        DataError: there is none, or it is damaged; the message names the file.
    """
    folder = _model_folder(root)
    if folder is None:
        raise DataError(f"{root}: holds no COLMAP model; expected cameras and images, .bin or .txt, in it, in sparse or in sparse/0")
    suffix = ".bin" if (folder / "images.bin").is_file() else ".txt"
    read_cameras, read_images = (_binary_cameras, _binary_images) if suffix == ".bin" else (_text_cameras, _text_images)
    path = folder / f"images{suffix}"
    try:
        sizes = read_cameras(existing(folder / f"cameras{suffix}"))
        images = [_image(*entry, sizes=sizes) for entry in read_images(path)]
    except (OSError, ValueError, LookupError, struct.error, UnicodeDecodeError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path}: cannot be read as a COLMAP model; it is damaged or truncated ({error!r})") from error
    return ColmapModel(sorted(images, key=lambda image: image.name), root / "images" if (root / "images").is_dir() else root)


def _image(name: str, pose: np.ndarray, camera: int, table: np.ndarray, sizes: dict[int, tuple[int, int]]) -> ColmapImage:
    """Make an image of a quaternion with a translation ``[7]`` and the rows x, y, point number ``[n, 3]``."""
    if not np.isfinite(pose).all() or not np.linalg.norm(pose[:4]) > 0:
        raise ValueError(f"the pose of {name} is not finite")
    world_to_cam = np.eye(4)
    quaternion = torch.from_numpy(pose[:4] / np.linalg.norm(pose[:4]))
    world_to_cam[:3, :3], world_to_cam[:3, 3] = quaternion_to_matrix(quaternion).numpy(), pose[4:]
    table = table[table[:, 2] >= 0]
    points, first = np.unique(table[:, 2].astype(np.int64), return_index=True)
    return ColmapImage(name, world_to_cam, points, (table[first, :2] / np.array(sizes[camera])).astype(np.float32))


def _lines(path: Path) -> list[str]:
    return [line for line in path.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]


def _text_cameras(path: Path) -> dict[int, tuple[int, int]]:
    words = [line.split() for line in _lines(path) if line.strip()]
    return {int(word[0]): (int(word[2]), int(word[3])) for word in words}


def _text_images(path: Path) -> list[tuple[str, np.ndarray, int, np.ndarray]]:
    lines, entries = _lines(path), []
    while lines and not lines[-1].strip():
        lines.pop()
    if len(lines) % 2:
        lines.append("")  # the last image sees no points
    for head, points in zip(lines[::2], lines[1::2], strict=True):
        words = head.split(maxsplit=9)
        if len(words) != 10:
            raise ValueError(f"expected 10 words for an image, got {head[:100]!r}")
        table = np.array(points.split(), dtype=np.float64).reshape(-1, 3)
        entries.append((words[9], np.array(words[1:8], dtype=np.float64), int(words[8]), table))
    return entries


def _binary_cameras(path: Path) -> dict[int, tuple[int, int]]:
    data, place, sizes = path.read_bytes(), 8, {}
    for _ in range(struct.unpack_from("<Q", data)[0]):
        number, model, width, height = struct.unpack_from("<IiQQ", data, place)
        sizes[number] = (width, height)
        place += 24 + 8 * _PARAMETERS[model]
    return sizes


def _binary_images(path: Path) -> list[tuple[str, np.ndarray, int, np.ndarray]]:
    data, place, entries = path.read_bytes(), 8, []
    row = np.dtype([("xy", "<f8", 2), ("point", "<i8")])
    for _ in range(struct.unpack_from("<Q", data)[0]):
        pose = np.frombuffer(data, "<f8", 7, place + 4)
        camera = struct.unpack_from("<I", data, place + 60)[0]
        end = data.index(b"\0", place + 64)
        count = struct.unpack_from("<Q", data, end + 1)[0]
        table = np.frombuffer(data, row, count, end + 9)
        entries.append((data[place + 64 : end].decode(), pose, camera, np.column_stack([table["xy"], table["point"].astype(np.float64)])))
        place = end + 9 + 24 * count
    return entries
