"""Opening and writing files so that every failure is one clear error and no half-written file is left behind."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import zipfile
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import IO, Any

import numpy as np

from geossl.errors import DataError


def existing(path: Path | str, what: str = "file") -> Path:
    """Return ``path`` if it exists, or raise a :class:`DataError` that names it and what it was expected to be."""
    path = Path(path)
    if not path.exists():
        near = f" (its folder {path.parent} exists)" if path.parent.is_dir() else f" (nor does its folder {path.parent})"
        raise DataError(f"{path}: this {what} does not exist{near}; check the path")
    return path


def read_npz(path: Path, names: Iterable[str] | None = None) -> dict[str, np.ndarray]:
    """Read the arrays ``names`` (None: all) of an npz file, never executing pickled code.

    Raises:
        DataError: the file is missing, truncated or not an npz, or lacks an array; the message names it.
    """
    existing(path)
    try:
        with np.load(path, allow_pickle=False) as archive:
            wanted = _wanted(path, archive.files, names)
            return {name: archive[name] for name in wanted}
    except (OSError, EOFError, TypeError, ValueError, AttributeError, zipfile.BadZipFile, zlib.error) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path}: cannot be read as npz; it is damaged, truncated or of another kind ({error})") from error


def read_h5(path: Path, names: Iterable[str] | None = None) -> dict[str, np.ndarray]:
    """Read the arrays ``names`` (None: all at the top level) of an HDF5 file.

    Raises:
        DataError: as for :func:`read_npz`.
    """
    import h5py

    existing(path)
    try:
        with h5py.File(path, "r") as file:
            wanted = _wanted(path, [name for name in file if isinstance(file[name], h5py.Dataset)], names)
            return {name: file[name][()] for name in wanted}
    except (OSError, RuntimeError, KeyError) as error:
        raise DataError(f"{path}: cannot be read as HDF5; it is damaged, truncated or of another kind ({error})") from error


def read_h5_clouds(path: Path, classes: int) -> dict[str, np.ndarray]:
    """Read a file of many labelled clouds: ``data [n, N, 3]`` float32, ``label [n]`` int64, and ``normal [n, N, 3]`` if present.

    Raises:
        DataError: shapes do not fit, or a label is not in ``0..classes - 1``; the message names the file and the row.
    """
    arrays = {name: values for name, values in read_h5(path).items() if name in ("data", "label", "normal")}
    missing = [name for name in ("data", "label") if name not in arrays]
    if missing:
        raise DataError(f"{path}: has no array {', '.join(missing)}; expected data [n, N, 3] and label [n]")
    count = len(arrays["data"])
    for name in ("data", "normal"):
        if name in arrays and (arrays[name].ndim != 3 or arrays[name].shape[2] != 3 or len(arrays[name]) != count):
            raise DataError(f"{path}: {name} must be [{count}, N, 3], got {list(arrays[name].shape)}")
        if name in arrays:
            arrays[name] = arrays[name].astype(np.float32, copy=False)
    label = arrays["label"].reshape(-1).astype(np.int64)
    if len(label) != count:
        raise DataError(f"{path}: has {count} clouds, but {len(label)} labels")
    wrong = np.flatnonzero((label < 0) | (label >= classes))
    if len(wrong):
        raise DataError(f"{path}: label row {wrong[0]} (from 0) is {label[wrong[0]]}, expected 0..{classes - 1}")
    arrays["label"] = label
    return arrays


def _wanted(path: Path, present: list[str], names: Iterable[str] | None) -> list[str]:
    wanted = list(present if names is None else names)
    missing = [name for name in wanted if name not in present]
    if missing:
        raise DataError(f"{path}: has no array {', '.join(missing)}; it holds {', '.join(present) or 'none'}")
    return wanted


def read_lines(path: Path) -> list[str]:
    """Return the lines of a text file that are not blank, stripped."""
    try:
        return [line.strip() for line in existing(path).read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: is not a readable text file ({error})") from error


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON file that holds a mapping.

    Raises:
        DataError: it is missing, damaged or holds something else; the message names it.
    """
    content = _parse_json(path)
    if not isinstance(content, dict):
        raise DataError(f"{path}: expected a mapping, got {type(content).__name__}")
    return content


def read_json_names(path: Path) -> list[str]:
    """Read a JSON file that holds a list of texts; errors as for :func:`read_json`."""
    content = _parse_json(path)
    if not isinstance(content, list) or not all(isinstance(item, str) for item in content):
        raise DataError(f"{path}: expected a list of names, got {str(content)[:80]}")
    return content


def _parse_json(path: Path) -> Any:
    try:
        return json.loads(existing(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path}: is damaged or truncated ({error})") from error


def cache_folder() -> Path:
    """Folder of what was prepared once and can be made again: ``$GEOSSL_CACHE``, or ``geossl`` in the user's cache folder."""
    given = os.environ.get("GEOSSL_CACHE")
    return Path(given) if given else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "geossl"


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_finite(source: str, **arrays: np.ndarray | None) -> None:
    """Raise a :class:`DataError` naming ``source``, the array and its first row with a NaN or an infinity."""
    for name, values in arrays.items():
        # A finite sum has finite terms: the row-wise search is only made when something is wrong.
        if values is None or values.dtype.kind in "iu" or np.isfinite(values.sum(dtype=np.float64)):
            continue
        finite = np.isfinite(values).all(axis=1)
        if not finite.all():
            row = int(finite.argmin())
            raise DataError(
                f"{source}: {name} row {row} (from 0) is not finite: {values[row].tolist()}; {int((~finite).sum())} such rows in all"
            )


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as a JSON file, whole or not at all."""
    atomic_write(path, lambda file: file.write((json.dumps(value, indent=1) + "\n").encode()))


def atomic_write(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Write a file by ``write(file)`` under a temporary name, flush it to disk, then rename: it is there whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise DataError(f"{path}: could not be written ({error})") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
