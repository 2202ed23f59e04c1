"""Files of disparity and optical flow as data sets publish them: pfm, flo, 16-bit png, and Spring's HDF5.

Disparity is ``[1, H, W]`` float32 (x in the right image is x - disparity), flow ``[2, H, W]`` float32 (x, y), both in pixels and infinite
where unknown.
"""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from geossl.data.files import atomic_write, existing, read_h5
from geossl.data.image_files import DAMAGE
from geossl.errors import DataError

_FLO = 202021.25
_LARGEST = 1 << 28  # numbers in a file: a damaged header must not ask for all memory

SPRING = (".dsp5", ".flo5")
"""Suffixes of Spring's files of truth, which have four values a pixel."""


def read_pfm(path: Path) -> np.ndarray:
    """Read a portable float map: ``[H, W]`` or ``[H, W, 3]`` float32, first row on top.

    Raises:
        DataError: it is missing, damaged, truncated or no pfm; the message names it.
    """
    data = existing(path, "pfm file").read_bytes()
    parts = data[:256].split(None, 3)
    # Three lines: kind; width and height; scale, negative for little endian. One byte of white space, then the numbers.
    try:
        kind, width, height = parts[0], int(parts[1]), int(parts[2])
        word = parts[3].split(None, 1)[0]
        scale = float(word)
        channels = {b"PF": 3, b"Pf": 1}[kind]
        start = data.index(word, data.index(parts[2], data.index(parts[1]) + len(parts[1])) + len(parts[2])) + len(word) + 1
        values = _numbers(data, start, (height, width, channels), "<f4" if scale < 0 else ">f4")
    except (ValueError, LookupError) as error:
        raise DataError(f"{path}: cannot be read as pfm; it is damaged, truncated or of another kind ({error!r})") from error
    values = values[::-1]
    return np.ascontiguousarray(values[..., 0] if channels == 1 else values, dtype=np.float32)


def write_pfm(path: Path, values: np.ndarray) -> None:
    """Write ``[H, W]`` or ``[H, W, 3]`` as a portable float map."""
    kind = "PF" if values.ndim == 3 else "Pf"
    head = f"{kind}\n{values.shape[1]} {values.shape[0]}\n-1.0\n".encode()
    atomic_write(path, lambda file: file.write(head + np.ascontiguousarray(values[::-1], dtype="<f4").tobytes()))


def read_flo(path: Path) -> np.ndarray:
    """Read Middlebury's flow format: ``[H, W, 2]`` float32; errors as for :func:`read_pfm`."""
    data = existing(path, "flo file").read_bytes()
    try:
        magic, width, height = struct.unpack_from("<fii", data)
        if magic != _FLO:
            raise ValueError(f"it begins with {magic}, not {_FLO}")
        return _numbers(data, 12, (height, width, 2), "<f4")
    except (ValueError, struct.error) as error:
        raise DataError(f"{path}: cannot be read as flo; it is damaged, truncated or of another kind ({error})") from error


def write_flo(path: Path, flow: np.ndarray) -> None:
    """Write flow ``[H, W, 2]`` in Middlebury's format."""
    head = struct.pack("<fii", _FLO, flow.shape[1], flow.shape[0])
    atomic_write(path, lambda file: file.write(head + np.ascontiguousarray(flow, dtype="<f4").tobytes()))


def _numbers(data: bytes, start: int, shape: tuple[int, int, int], dtype: str) -> np.ndarray:
    if min(shape) < 1 or shape[0] * shape[1] > _LARGEST:
        raise ValueError(f"its size is {shape[1]} x {shape[0]}")
    count = shape[0] * shape[1] * shape[2]
    if len(data) < start + 4 * count:
        raise ValueError(f"it has {len(data)} bytes, {start + 4 * count} are needed for {shape[1]} x {shape[0]}")
    return np.frombuffer(data, dtype, count, start).reshape(shape).astype(np.float32)


def read_png(path: Path) -> np.ndarray:
    """Read an image of 8 or 16 bits and one or three channels: ``[H, W]`` or ``[H, W, 3]``, uint8 or uint16; errors as for pfm."""
    from PIL import Image

    try:
        with Image.open(existing(path, "png file")) as image:
            image.load()
            if image.mode != "RGB" or path.suffix.lower() != ".png" or _bit_depth(path) != 16:
                values = np.asarray(image)
                return values if values.dtype == np.uint8 else values.astype(np.uint16)
        # Pillow keeps one byte of each 16-bit colour: the upper one or, read as if the bytes were the other way round, the lower one.
        upper, lower = (_read_bytes_of_colors(path, order) for order in ("RGB;16B", "RGB;16L"))
    except DAMAGE as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path}: cannot be read as png; it is damaged, truncated or of another kind ({error})") from error
    return (upper.astype(np.uint16) << 8) | lower


def _bit_depth(path: Path) -> int:
    with path.open("rb") as file:
        return file.read(25)[24]


def _read_bytes_of_colors(path: Path, order: str) -> np.ndarray:
    from PIL import Image

    with Image.open(path) as image:
        for number, tile in enumerate(image.tile):
            image.tile[number] = tile._replace(args=order)
        return np.asarray(image)


def write_png16(path: Path, values: np.ndarray) -> None:
    """Write ``[H, W]`` or ``[H, W, 3]`` uint16 as png."""
    height, width = values.shape[:2]
    rows = np.ascontiguousarray(values, dtype=">u2").reshape(height, -1).view(np.uint8)
    data = np.concatenate([np.zeros((height, 1), np.uint8), rows], 1).tobytes()
    head = struct.pack(">IIBBBBB", width, height, 16, 2 if values.ndim == 3 else 0, 0, 0, 0)
    chunks = ((b"IHDR", head), (b"IDAT", zlib.compress(data, 6)), (b"IEND", b""))
    body = b"".join(struct.pack(">I", len(part)) + name + part + struct.pack(">I", zlib.crc32(name + part)) for name, part in chunks)
    atomic_write(path, lambda file: file.write(b"\x89PNG\r\n\x1a\n" + body))


def read_disparity(path: Path, png_scale: float = 256.0, *, all_four: bool = False) -> Tensor:
    """Read a disparity file, told by its suffix.

    Args:
        path: ``.pfm`` (not positive or infinite where unknown), ``.png`` (0 where unknown), ``.dsp5`` (Spring's HDF5) or ``.npy``.
        png_scale: Units of a png to the pixel: 256 for KITTI, 32 for CREStereo, 1 for Middlebury 2005 and 2006.
        all_four: Keep Spring's four values a pixel, which has twice the rows and columns; else the upper left of them.

    Returns:
        ``[1, H, W]`` float32, infinite where unknown.

    Raises:
        DataError: the file is missing, damaged or of another kind; the message names it.
    """
    suffix = path.suffix.lower()
    if suffix == ".png":
        values = read_png(path).astype(np.float32) / np.float32(png_scale)
    elif suffix == ".pfm":
        values = read_pfm(path)
    elif suffix == ".dsp5":
        values = _of_spring(read_h5(path, ["disparity"])["disparity"], path, all_four)
    elif suffix == ".npy":
        values = read_npy(path)
    else:
        raise DataError(f"{path}: disparity is read from .pfm, .png, .dsp5 and .npy, not {suffix!r}")
    if values.ndim == 3 and suffix == ".pfm":
        values = values[..., 0]
    if values.ndim != 2:
        raise DataError(f"{path}: disparity must be [H, W], got {list(values.shape)}")
    values = values.astype(np.float32)
    return torch.from_numpy(np.where(np.isfinite(values) & (values > 0), values, np.float32(np.inf)))[None]


def read_flow(path: Path, *, all_four: bool = False) -> Tensor:
    """Read a flow file, told by its suffix.

    Args:
        path: ``.flo``, ``.pfm`` (x, y and something else), ``.png`` (KITTI: (value - 2^15) / 64, the third channel says where it is
            known), ``.flo5`` (Spring's HDF5) or ``.npy``.
        all_four: As for :func:`read_disparity`.

    Returns:
        ``[2, H, W]`` float32, infinite where unknown (in files that have no other sign: where not finite or over 1e9).

    Raises:
        DataError: the file is missing, damaged or of another kind; the message names it.
    """
    suffix = path.suffix.lower()
    if suffix == ".png":
        stored = read_png(path)
        if stored.ndim != 3 or stored.dtype != np.uint16:
            raise DataError(f"{path}: flow in a png has three channels of 16 bits, got {list(stored.shape)} {stored.dtype}")
        values = (stored[..., :2].astype(np.float32) - 2**15) / 64
        values[stored[..., 2] == 0] = np.inf
    elif suffix == ".flo":
        values = read_flo(path)
    elif suffix == ".pfm":
        values = read_pfm(path)
    elif suffix == ".flo5":
        values = _of_spring(read_h5(path, ["flow"])["flow"], path, all_four)
    elif suffix == ".npy":
        values = read_npy(path)
    else:
        raise DataError(f"{path}: flow is read from .flo, .pfm, .png, .flo5 and .npy, not {suffix!r}")
    if values.ndim != 3 or values.shape[2] < 2:
        raise DataError(f"{path}: flow must be [H, W, 2], got {list(values.shape)}")
    values = values[..., :2].astype(np.float32)
    known = (np.isfinite(values) & (np.abs(values) < 1e9)).all(-1, keepdims=True)
    return torch.from_numpy(np.where(known, values, np.float32(np.inf)).transpose(2, 0, 1).copy())


def _of_spring(values: np.ndarray, path: Path, all_four: bool) -> np.ndarray:
    """Spring's truth has two rows and columns to a pixel, in units of the image's pixels."""
    if values.ndim < 2 or values.shape[0] % 2 or values.shape[1] % 2:
        raise DataError(f"{path}: Spring's truth has an even number of rows and columns, got {list(values.shape)}")
    return values if all_four else values[::2, ::2]


def read_npy(path: Path) -> np.ndarray:
    """Read an array of numbers; errors as for :func:`read_pfm`."""
    try:
        return np.load(existing(path), allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{path}: cannot be read as npy; it is damaged or of another kind ({error})") from error
