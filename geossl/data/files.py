"""Opening and writing files so that every failure is one clear error and no half-written file is left behind."""

from __future__ import annotations

import os
import zipfile
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import IO

import numpy as np

from geossl.errors import DataError


def existing(path: Path | str, what: str = "file") -> Path:
    """Return ``path`` if it exists, or raise a :class:`DataError` that names it and what it was expected to be."""
    path = Path(path)
    if not path.exists():
        near = f" (its folder {path.parent} exists)" if path.parent.is_dir() else f" (nor does its folder {path.parent})"
        raise DataError(f"{path}: this {what} does not exist{near}; check the path")
    return path


def open_npz(path: Path, names: Iterable[str]) -> dict[str, np.ndarray]:
    """Read the arrays ``names`` of an npz file, never executing pickled code.

    Raises:
        DataError: the file is missing, truncated or not an npz, or lacks an array; the message names it.
    """
    names = list(names)
    existing(path)
    try:
        with np.load(path, allow_pickle=False) as archive:
            missing = [name for name in names if name not in archive.files]
            if missing:
                raise DataError(f"{path}: the arrays {missing} are missing; it holds {archive.files}")
            return {name: archive[name] for name in names}
    except (OSError, EOFError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path}: cannot be read as npz; it is damaged, truncated or of another kind ({error})") from error


def atomic_write(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Write a file by ``write(file)`` under a temporary name, flush it to disk, then rename: it is there whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise DataError(f"{path}: could not be written ({error})") from error
    finally:
        temporary.unlink(missing_ok=True)
