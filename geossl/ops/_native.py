"""Finds, loads and calls the native libraries ``libgeossl_cpu`` and ``libgeossl_cuda``.

Operators declare each exported function once, at import, and call it like any Python function::

    _fps = _native.function("cpu", "geossl_fps_cpu", _native.INT, _native.PTR, _native.INT, _native.PTR)

    def _fps_cpu(points, k):
        out = torch.empty(...)
        _fps(_native.threads(), points.data_ptr(), k, out.data_ptr())     # raises what the status code stands for

Nothing is loaded before the first call (or :func:`available`, :func:`native_info`). A missing library is no error: operators ask
:func:`available` and run their plain-torch twin, after one warning; with ``GEOSSL_REQUIRE_NATIVE=1`` it is an error. A library that is
there but stale, or that the system refuses to load, is always an error. The C side of all this is ``cuda_ext/include/geossl_api.h``.
"""

from __future__ import annotations

import ctypes
import os
import struct
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

import geossl
from geossl.errors import ExtensionError

Kind = Literal["cpu", "cuda"]

ABI_VERSION = 4  # GEOSSL_ABI_VERSION in cuda_ext/include/geossl_api.h; raise both together

# Argument types of exported functions, by the names C gives them: formats of `struct`, one word of 64 bits each.
PTR = INT = INT64 = "q"
DOUBLE = "d"

REBUILD = "run `pip install -e .` again in the source tree (or reinstall geossl)"
_GET_CUDA = (
    "install geossl where torch is a CUDA build, or with FORCE_CUDA=1 (nvcc is taken from CUDA_HOME, /usr/local/cuda or PATH), "
    "or with GEOSSL_CUDA=pypi (compiler from the package index)"
)
_GET_CPU = f"install a C++17 compiler (g++ or clang++) and {REBUILD}"

# GeosslStatus of geossl_api.h.
_STATUS: dict[int, tuple[type[Exception], str]] = {
    -1: (ValueError, "invalid size or option"),
    -2: (MemoryError, "out of memory"),
    -3: (ValueError, "the input has more elements than the kernel can index; split it into smaller batches"),
    -4: (RuntimeError, "unexpected internal error; please report it with the call that caused it"),
}


@dataclass
class _Library:
    """One loaded library, or the reason why there is none."""

    kind: Kind
    path: Path | None
    handle: ctypes.CDLL | None
    reason: str = ""  # why handle is None


_libraries: dict[Kind, _Library] = {}
_functions: list[NativeFunction] = []
_warned: set[Kind] = set()


def library_name(kind: Kind) -> str:
    """Return the file name of a library: ``libgeossl_cpu.so``, on macOS and Windows as well (they are built as modules)."""
    return f"libgeossl_{kind}.dll" if sys.platform == "win32" else f"libgeossl_{kind}.so"


def find_library(kind: Kind) -> Path | None:
    """Return the library's path, or None.

    Looks into ``_lib/`` of every folder geossl's modules come from: an editable install keeps the Python files in the source tree and
    the libraries in site-packages. When both have one, the younger file wins, be it a developer's build or a fresh install.
    """
    candidates = [Path(folder) / "_lib" / library_name(kind) for folder in geossl.__path__]
    return max((path for path in candidates if path.is_file()), key=lambda path: path.stat().st_mtime, default=None)


def open_library(path: Path) -> ctypes.CDLL:
    """Load a library and check that it was built from this version of the sources.

    Raises:
        ExtensionError: the system refuses to load it, or it is stale (another ABI version).
    """
    try:
        handle = ctypes.CDLL(str(path))
    except OSError as error:
        raise ExtensionError(f"the native library {path} cannot be loaded: {error}. To build it for this machine, {REBUILD}.") from error
    try:
        version = handle.geossl_abi_version()
    except AttributeError as error:
        raise ExtensionError(f"{path} is not a geossl library (it has no geossl_abi_version). To build it anew, {REBUILD}.") from error
    if version != ABI_VERSION:
        age = "older" if version < ABI_VERSION else "newer"
        raise ExtensionError(
            f"the native library {path} is stale: it has ABI version {version}, {age} than the {ABI_VERSION} this geossl expects. "
            f"To bring both to the same state, {REBUILD}."
        )
    return handle


def _load(kind: Kind) -> _Library:
    library = _libraries.get(kind)
    if library is None:
        path = find_library(kind)
        if path is None:
            how = _GET_CPU if kind == "cpu" else _GET_CUDA
            reason = f"{library_name(kind)} was not found in {', '.join(f'{folder}/_lib' for folder in geossl.__path__)}; to get it, {how}"
            library = _Library(kind, None, None, reason)
        else:
            handle = open_library(path)
            problem = _gpu_problem(handle) if kind == "cuda" and torch.cuda.is_available() else ""
            library = _Library(kind, path, None if problem else handle, problem)
        _libraries[kind] = library
    return library


def _gpu_problem(handle: ctypes.CDLL) -> str:
    """Say why no kernel of the CUDA library can run on this machine's GPUs, or return ""."""
    runtime, driver = handle.geossl_cuda_runtime_version(), handle.geossl_cuda_driver_version()
    if runtime // 1000 > driver // 1000:
        return (
            f"{library_name('cuda')} was built with CUDA {_version(runtime)}, but the GPU driver supports {_version(driver)} at most; "
            f"update the driver, or set CUDA_HOME to an older CUDA toolkit and {REBUILD}"
        )
    archs = _text(handle, "geossl_cuda_archs").split()
    for device in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(device)
        if not any(_runs_on(arch, major, minor) for arch in archs):
            return (
                f"{library_name('cuda')} has kernels for architectures {', '.join(archs)}, but GPU {device} "
                f"({torch.cuda.get_device_name(device)}) has {major}{minor}; set CUDAARCHS={major}{minor}-real and {REBUILD}"
            )
    return ""


def _runs_on(arch: str, major: int, minor: int) -> bool:
    """Return whether code for ``arch`` (as CMake writes it: "80-real" machine code, "120" with PTX, "90-virtual") runs on a GPU."""
    number, _, kind = arch.partition("-")
    digits = number.rstrip("af")
    built = int(digits[:-1]), int(digits[-1])
    machine_code = kind != "virtual" and built[0] == major and built[1] <= minor
    return machine_code or (kind != "real" and built <= (major, minor))


def required() -> bool:
    """Return whether ``GEOSSL_REQUIRE_NATIVE=1`` forbids the plain-torch twins, as continuous integration does."""
    return os.environ.get("GEOSSL_REQUIRE_NATIVE", "0") not in ("", "0")


def available(kind: Kind) -> bool:
    """Return whether a library can be used; the first time it is missing, warn that the plain-torch twins run instead.

    Raises:
        ExtensionError: it is stale or refused by the system, or it is missing and ``GEOSSL_REQUIRE_NATIVE=1``.
    """
    library = _load(kind)
    if library.handle is not None:
        return True
    if required():
        raise ExtensionError(f"GEOSSL_REQUIRE_NATIVE is set, but {library.reason}.")
    if kind not in _warned:
        _warned.add(kind)
        what = "operators" if kind == "cpu" else "operators on CUDA tensors"
        warnings.warn(f"geossl's {what} run as plain torch, which is slower: {library.reason}.", RuntimeWarning, stacklevel=3)
    return False


class NativeFunction:
    """An exported C function that returns a status code; calling it raises what the code stands for.

    Args:
        kind: Library it lives in.
        name: Exported name, ``geossl_<operator>_<cpu|cuda>``.
        argtypes: Type of every argument, in order; the library is asked whether they are right. A call with another number of arguments
            or another type is a ``struct.error``.
    """

    __slots__ = ("_call", "_pack", "argtypes", "kind", "name")

    def __init__(self, kind: Kind, name: str, argtypes: tuple[str, ...]) -> None:
        self.kind, self.name, self.argtypes = kind, name, "".join(argtypes)
        self._pack = struct.Struct(f"={self.argtypes}").pack
        self._call: Any = None

    def __call__(self, *args: float) -> None:
        """Call the function; pointers are integers (``Tensor.data_ptr()``, :func:`stream`), 0 for none."""
        call = self._call if self._call is not None else self._bind()
        status = call(self._pack(*args))
        if status != 0:
            raise self._error(status)

    def _bind(self) -> Any:
        library = _load(self.kind)
        if library.handle is None:
            raise ExtensionError(f"{self._operator()} needs a native library, but {library.reason}.")
        try:
            call, types = getattr(library.handle, f"{self.name}_packed"), _text(library.handle, f"{self.name}_types")
        except AttributeError as error:
            raise ExtensionError(
                f"the native library {library.path} is stale: it lacks {self.name}. To build it anew, {REBUILD}."
            ) from error
        if types != self.argtypes:
            raise ExtensionError(
                f"the native library {library.path} is stale: {self.name} takes arguments {types}, not {self.argtypes} "
                f"(q is an integer or a pointer, d a double). To build it anew, {REBUILD}."
            )
        call.argtypes, call.restype = (ctypes.c_char_p,), ctypes.c_int
        self._call = call
        return call

    def _operator(self) -> str:
        return "geossl." + self.name.removeprefix("geossl_").removesuffix(f"_{self.kind}")

    def _error(self, status: int) -> Exception:
        if status > 0:
            text = _text(_load(self.kind).handle, "geossl_cuda_error_string", status)
            return ExtensionError(f"{self._operator()}: CUDA error {status}: {text}")
        kind, text = _STATUS.get(status, (RuntimeError, f"unknown status {status}"))
        return kind(f"{self._operator()}: {text}")


def function(kind: Kind, name: str, *argtypes: str) -> NativeFunction:
    """Declare the exported function ``name`` of the library ``kind`` with its argument types; it is looked up at the first call."""
    declared = NativeFunction(kind, name, argtypes)
    _functions.append(declared)
    return declared


@contextmanager
def substitute(kind: Kind, path: Path | str | None) -> Iterator[None]:
    """Use another file as the library ``kind`` inside a ``with`` block, or none at all when ``path`` is None.

    Tests run the CUDA wrappers on CPU tensors this way, with the kernels compiled for the host (``tests/cuda_on_host``). Not thread-safe.
    """
    saved = _libraries.get(kind)
    if path is None:
        _libraries[kind] = _Library(kind, None, None, f"{library_name(kind)} was switched off by geossl.ops._native.substitute")
    else:
        _libraries[kind] = _Library(kind, Path(path), open_library(Path(path)))
    _unbind(kind)
    try:
        yield
    finally:
        if saved is None:
            del _libraries[kind]
        else:
            _libraries[kind] = saved
        _unbind(kind)


def _unbind(kind: Kind) -> None:
    for declared in _functions:
        if declared.kind == kind:
            declared._call = None


def threads() -> int:
    """Return how many threads a CPU operator may use: torch's own setting, which is 1 in DataLoader workers."""
    return torch.get_num_threads()


def stream(tensor: Tensor) -> int:
    """Return the handle of torch's current CUDA stream on the tensor's device, 0 for a CPU tensor."""
    return int(torch.cuda.current_stream(tensor.device).cuda_stream) if tensor.is_cuda else 0


def device_index(tensor: Tensor) -> int:
    """Return the index of the tensor's CUDA device, 0 for a CPU tensor."""
    return tensor.get_device() if tensor.is_cuda else 0


def _text(handle: ctypes.CDLL | None, name: str, *args: int) -> str:
    """Call an exported function of integers that returns a C string."""
    exported = getattr(handle, name)
    exported.argtypes, exported.restype = [ctypes.c_int] * len(args), ctypes.c_char_p
    return str(exported(*args).decode())


def _version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"


def native_info() -> dict[str, dict[str, Any]]:
    """Describe the native libraries, loading them if need be; never raises and never warns.

    Returns:
        ``{"cpu": {...}, "cuda": {...}}``. Both have ``loaded`` (bool), ``path`` (str or None), ``abi`` (int or None), ``expected_abi`` and
        ``reason`` (why it is not loaded and what to do; "" when it is). A loaded CPU library adds ``compiler``, ``simd`` and ``threads``;
        a loaded CUDA library adds ``archs`` (list of str) and ``cuda`` (version of the runtime in it, as "13.0").
    """
    cpu, cuda = _describe("cpu"), _describe("cuda")
    if cpu["loaded"]:
        handle = _libraries["cpu"].handle
        cpu.update(compiler=_text(handle, "geossl_cpu_compiler"), simd=_text(handle, "geossl_cpu_simd"), threads=threads())
        why = _text(handle, "geossl_cpu_without_cuda")
        if why and cuda["path"] is None:
            cuda["reason"] = f"it was not built, because {why}; to get it, {_GET_CUDA}"
    if cuda["loaded"]:
        handle = _libraries["cuda"].handle
        runtime = int(handle.geossl_cuda_runtime_version()) if handle is not None else 0
        cuda.update(
            archs=_text(handle, "geossl_cuda_archs").split(), cuda=_version(runtime) if runtime else "none (kernels run on the CPU)"
        )
    return {"cpu": cpu, "cuda": cuda}


def _describe(kind: Kind) -> dict[str, Any]:
    entry: dict[str, Any] = {"loaded": False, "path": None, "abi": None, "expected_abi": ABI_VERSION, "reason": ""}
    try:
        library = _load(kind)
    except ExtensionError as error:
        return entry | {"path": str(find_library(kind)), "reason": str(error)}
    if library.handle is None:
        return entry | {"path": None if library.path is None else str(library.path), "reason": library.reason}
    return entry | {"loaded": True, "path": str(library.path), "abi": ABI_VERSION}
