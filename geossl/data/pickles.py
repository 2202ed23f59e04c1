"""Reading pickles that hold arrays and plain containers, without executing anything they contain."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from geossl.data.files import existing
from geossl.errors import DataError

_RECONSTRUCT = np.zeros(1).__reduce__()[0]
_SCALAR = np.float64(0).__reduce__()[0]


def _encode(text: str, encoding: str = "latin1") -> bytes:
    """How pickles of Python 2, and of protocol 2, hold bytes."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"bytes are encoded as {encoding!r}")
    return text.encode("latin1")


class _ArraysOnly(pickle.Unpickler):
    """Makes arrays, numpy scalars and plain containers. Nothing else that a file names is imported, looked up or called."""

    _allowed: ClassVar[dict[str, Any]] = {
        "numpy.ndarray": np.ndarray,
        "numpy.dtype": np.dtype,
        "_codecs.encode": _encode,
        **{f"numpy.{core}.multiarray._reconstruct": _RECONSTRUCT for core in ("core", "_core")},
        **{f"numpy.{core}.multiarray.scalar": _SCALAR for core in ("core", "_core")},
    }

    def find_class(self, module: str, name: str) -> Any:
        try:
            return self._allowed[f"{module}.{name}"]
        except KeyError:
            raise pickle.UnpicklingError(f"it names {module}.{name}") from None


def read_pickled_arrays(path: Path) -> Any:
    """Read a pickle of numpy arrays, numbers, texts, and lists, tuples, sets and dictionaries of them.

    Raises:
        DataError: the file is missing or damaged, or it asks for anything else, which could run code; the message names the file.
    """
    try:
        with existing(path).open("rb") as file:
            return _ArraysOnly(file, encoding="latin1").load()
    except pickle.UnpicklingError as error:
        raise DataError(
            f"{path}: is damaged, or holds more than arrays and plain containers, which would run code when read; it was not opened "
            f"({error})"
        ) from error
    except (OSError, EOFError, ValueError, TypeError, KeyError, IndexError, AttributeError, MemoryError, RuntimeError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path}: cannot be read as a pickle; it is damaged, truncated or of another kind ({error})") from error
