"""pfm, flo, 16-bit png and Spring's files, written here byte by byte, and what their readers make of what is unknown or damaged."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import h5py
import numpy as np
import pytest
from PIL import Image

from geossl.data import read_disparity, read_flow
from geossl.data.dense_files import read_flo, read_pfm, read_png, write_flo, write_pfm, write_png16
from geossl.errors import DataError

INF = float("inf")


def filtered_png(values: np.ndarray) -> bytes:
    """A 16-bit png whose rows use all five filters of the standard in turn, encoded by the letter of it."""
    height, width = values.shape[:2]
    step = 6 if values.ndim == 3 else 2
    rows = values.astype(">u2").reshape(height, -1).view(np.uint8).astype(int)
    data = b""
    for number, row in enumerate(rows):
        above = rows[number - 1] if number else np.zeros_like(row)
        kind, coded = number % 5, []
        for k, byte in enumerate(row):
            a, b, c = (row[k - step] if k >= step else 0), above[k], (above[k - step] if k >= step else 0)
            nearest = min((a, b, c), key=lambda value, p=a + b - c: abs(p - value))
            coded.append((byte - (0, a, b, (a + b) // 2, nearest)[kind]) % 256)
        data += bytes([kind, *coded])
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 16, 2 if values.ndim == 3 else 0, 0, 0, 0)),
        (b"IDAT", zlib.compress(data)),
        (b"IEND", b""),
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(part)) + name + part + struct.pack(">I", zlib.crc32(name + part)) for name, part in chunks
    )


@pytest.mark.parametrize("shape", [(11, 7, 3), (11, 7)])
def test_png_of_16_bits(tmp_path: Path, shape: tuple[int, ...]) -> None:
    values = np.random.default_rng(0).integers(0, 65536, shape).astype(np.uint16)
    (tmp_path / "a.png").write_bytes(filtered_png(values))
    write_png16(tmp_path / "b.png", values)
    for name in ("a.png", "b.png"):
        read = read_png(tmp_path / name)
        assert read.dtype == np.uint16
        assert np.array_equal(read, values)
    small = np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)
    Image.fromarray(small).save(tmp_path / "c.png")
    assert np.array_equal(read_png(tmp_path / "c.png"), small)


def test_pfm_by_hand(tmp_path: Path) -> None:
    path = tmp_path / "a.pfm"
    path.write_bytes(b"Pf\n3 2\n-1.0\n" + struct.pack("<6f", 4, 5, 6, 1, 2, 3))  # the lowest row comes first
    assert read_pfm(path).tolist() == [[1, 2, 3], [4, 5, 6]]
    path.write_bytes(b"PF 1 2 1.0\n" + struct.pack(">6f", 4, 5, 6, 1, 2, 3))
    assert read_pfm(path).tolist() == [[[1, 2, 3]], [[4, 5, 6]]]
    for values in (np.random.default_rng(0).normal(size=(5, 4)), np.random.default_rng(0).normal(size=(5, 4, 3))):
        write_pfm(path, values.astype(np.float32))
        assert np.array_equal(read_pfm(path), values.astype(np.float32))
    path.write_bytes(b"Pf\n10 10\n-1\n" + struct.pack("<4f", 10, 10, 1, 1))  # digits of the numbers occur in each other
    with pytest.raises(DataError, match=r"a\.pfm: cannot be read as pfm"):
        read_pfm(path)


def test_flo_by_hand(tmp_path: Path) -> None:
    path = tmp_path / "a.flo"
    path.write_bytes(struct.pack("<fii4f", 202021.25, 2, 1, 1.5, -2, 3, 4))
    assert read_flo(path).tolist() == [[[1.5, -2], [3, 4]]]
    assert read_flow(path).tolist() == [[[1.5, 3]], [[-2, 4]]]
    write_flo(tmp_path / "b.flo", read_flo(path))
    assert (tmp_path / "b.flo").read_bytes() == path.read_bytes()


def test_disparity(tmp_path: Path) -> None:
    write_pfm(tmp_path / "a.pfm", np.array([[1.5, INF, -2.0], [0.0, np.nan, 7.0]], np.float32))
    assert read_disparity(tmp_path / "a.pfm").tolist() == [[[1.5, INF, INF], [INF, INF, 7]]]
    Image.fromarray(np.array([[0, 256, 640]], np.uint16)).save(tmp_path / "kitti.png")
    assert read_disparity(tmp_path / "kitti.png").tolist() == [[[INF, 1, 2.5]]]
    assert read_disparity(tmp_path / "kitti.png", 32).tolist() == [[[INF, 8, 20]]]
    Image.fromarray(np.array([[0, 30, 255]], np.uint8)).save(tmp_path / "middlebury.png")
    assert read_disparity(tmp_path / "middlebury.png", 1).tolist() == [[[INF, 30, 255]]]
    with h5py.File(tmp_path / "spring.dsp5", "w") as file:
        file["disparity"] = np.array([[1, 2, 3, 4], [5, 6, 7, 8]], np.float32)
    assert read_disparity(tmp_path / "spring.dsp5").tolist() == [[[1, 3]]]
    assert read_disparity(tmp_path / "spring.dsp5", all_four=True).shape == (1, 2, 4)
    np.save(tmp_path / "a.npy", np.array([[2.0, np.nan]]))
    assert read_disparity(tmp_path / "a.npy").tolist() == [[[2, INF]]]


def test_flow(tmp_path: Path) -> None:
    stored = np.array([[[2**15 + 64, 2**15 - 32, 1], [2**15 + 5, 7, 0]]], np.uint16)
    write_png16(tmp_path / "kitti.png", stored)
    assert read_flow(tmp_path / "kitti.png").tolist() == [[[1, INF]], [[-0.5, INF]]]
    write_pfm(tmp_path / "things.pfm", np.array([[[1, 2, 0], [3, np.nan, 0]]], np.float32))
    assert read_flow(tmp_path / "things.pfm").tolist() == [[[1, INF]], [[2, INF]]]
    write_flo(tmp_path / "unknown.flo", np.array([[[1e10, 1], [3, 4]]], np.float32))  # Middlebury's sign
    assert read_flow(tmp_path / "unknown.flo").tolist() == [[[INF, 3]], [[INF, 4]]]
    with h5py.File(tmp_path / "spring.flo5", "w") as file:
        file["flow"] = np.arange(16, dtype=np.float32).reshape(2, 4, 2)
    assert read_flow(tmp_path / "spring.flo5").tolist() == [[[0, 4]], [[1, 5]]]


@pytest.mark.parametrize("name", ["a.pfm", "a.flo", "a.png", "a.dsp5", "a.flo5", "a.npy"])
@pytest.mark.parametrize("damage", ["empty", "junk", "cut"])
def test_damaged_files_are_named(tmp_path: Path, name: str, damage: str) -> None:
    path = tmp_path / name
    values = np.random.default_rng(0).uniform(1, 9, (8, 8)).astype(np.float32)
    if name == "a.pfm":
        write_pfm(path, values)
    elif name == "a.flo":
        write_flo(path, np.stack([values, values], -1))
    elif name == "a.png":
        write_png16(path, (values[..., None] * np.ones(3) * 1000).astype(np.uint16))
    elif name == "a.npy":
        np.save(path, values)
    else:
        with h5py.File(path, "w") as file:
            file["disparity" if name == "a.dsp5" else "flow"] = values
    data = path.read_bytes()
    path.write_bytes({"empty": b"", "junk": b"junk" * 50, "cut": data[: len(data) // 2]}[damage])
    with pytest.raises(DataError, match=name.replace(".", r"\.")):
        (read_flow if name in ("a.flo", "a.png", "a.flo5") else read_disparity)(path)


def test_errors(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no\.flo: this flo file does not exist"):
        read_flow(tmp_path / "no.flo")
    with pytest.raises(DataError, match=r"disparity is read from \.pfm, .* not '\.exr'"):
        read_disparity(tmp_path / "a.exr")
    with pytest.raises(DataError, match=r"flow is read from \.flo, .* not '\.exr'"):
        read_flow(tmp_path / "a.exr")
    Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(tmp_path / "eight.png")
    with pytest.raises(DataError, match="flow in a png has three channels of 16 bits"):
        read_flow(tmp_path / "eight.png")
    with h5py.File(tmp_path / "odd.dsp5", "w") as file:
        file["disparity"] = np.ones((3, 4), np.float32)
    with pytest.raises(DataError, match="even number of rows and columns"):
        read_disparity(tmp_path / "odd.dsp5")
    (tmp_path / "huge.flo").write_bytes(struct.pack("<fii", 202021.25, 1 << 30, 1 << 30))
    with pytest.raises(DataError, match="its size is"):
        read_flow(tmp_path / "huge.flo")
