"""Reading pickles that hold arrays and plain containers, without executing anything they contain."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from geossl.data.files import existing
from geossl.errors import DataError


class _Type:
    """Type of an array's entries. A file chooses among numbers and texts; their layout in memory, which it tells too, is numpy's own."""

    def __init__(self, text: str, *_: Any) -> None:
        self.dtype = np.dtype(text)
        if self.dtype.kind not in "biufSU":
            raise pickle.UnpicklingError(f"it has an array of type {self.dtype}")

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        if state[1] in ("<", ">"):
            self.dtype = self.dtype.newbyteorder(state[1])


class _Array(np.ndarray):
    """An array that checks what a file says of it: numpy itself would trust a forged state, and read outside of its memory."""

    __slots__ = ()

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        shape, kind, fortran, raw = state[-4:]
        if not isinstance(kind, _Type):
            raise pickle.UnpicklingError(f"it has an array of {str(kind)[:80]}")
        super().__setstate__((1, shape, kind.dtype, bool(fortran), raw))  # type: ignore[arg-type]


def _empty(*_: Any) -> _Array:
    """An array that is to be given its state."""
    return _Array((0,))


def _of_bytes(raw: bytes, kind: _Type, shape: tuple[int, ...], order: str = "C") -> np.ndarray:
    """How pickles of protocol 5 hold an array; in the machine's byte order, as numpy does for the other protocols."""
    values = np.frombuffer(bytes(raw), kind.dtype).reshape(shape, order=order)  # type: ignore[call-overload]
    return values.astype(kind.dtype.newbyteorder("="))


def _scalar(kind: _Type, raw: bytes) -> Any:
    return np.frombuffer(raw, kind.dtype, count=1)[0]


def _encode(text: str, encoding: str = "latin1") -> bytes:
    """How pickles of Python 2, and of protocol 2, hold bytes."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"bytes are encoded as {encoding!r}")
    return text.encode("latin1")


class _ArraysOnly(pickle.Unpickler):
    """Makes arrays, numpy scalars and plain containers. Nothing else that a file names is imported, looked up or called."""

    _allowed: ClassVar[dict[str, Any]] = {
        "numpy.ndarray": None,  # what _reconstruct is to make; never called
        "numpy.dtype": _Type,
        "_codecs.encode": _encode,
        **{f"numpy.{core}.multiarray._reconstruct": _empty for core in ("core", "_core")},
        **{f"numpy.{core}.multiarray.scalar": _scalar for core in ("core", "_core")},
        **{f"numpy.{core}.numeric._frombuffer": _of_bytes for core in ("core", "_core")},
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
    except (OSError, EOFError, ArithmeticError, ValueError, TypeError, LookupError, AttributeError, MemoryError, RuntimeError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path}: cannot be read as a pickle; it is damaged, truncated or of another kind ({error})") from error
