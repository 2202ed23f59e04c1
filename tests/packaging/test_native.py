"""Loading, checking and calling the native libraries, with small libraries compiled for the purpose."""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
import sys
import time
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import geossl
from geossl.errors import ExtensionError
from geossl.ops import _native

ROOT = Path(__file__).parents[2]
THREADS = ROOT / "cuda_ext/cpu/threads.cpp"
CXX = next(filter(None, map(shutil.which, (os.environ.get("CXX", "c++"), "g++", "clang++"))), None)
needs_compiler = pytest.mark.skipif(CXX is None, reason="no C++ compiler on this machine")

SOURCE = r"""
#include <mutex>
#include <stdexcept>

#include "geossl_api.h"
#ifndef VERSION
#define VERSION GEOSSL_ABI_VERSION
#endif
GEOSSL_API int geossl_abi_version() { return VERSION; }
GEOSSL_API int geossl_status_cpu(int status) { return status; }
GEOSSL_PACKED(geossl_status_cpu)
GEOSSL_API int geossl_status_cuda(int status) { return status; }
GEOSSL_PACKED(geossl_status_cuda)
GEOSSL_API const char* geossl_cuda_error_string(int error) { return error == 719 ? "unspecified launch failure" : "other"; }
GEOSSL_API int geossl_throw_cpu(int what) {
  return geossl::guarded([&] {
    if (what == 1) throw std::bad_alloc();
    if (what == 2) throw std::runtime_error("surprise");
  });
}
GEOSSL_PACKED(geossl_throw_cpu)
// Counts how often each of n items is visited and notes the shortest piece; item `bad` throws.
GEOSSL_API int geossl_visit_cpu(int threads, int64_t n, int64_t grain, int64_t bad, int* visits, int64_t* shortest) {
  std::mutex mutex;
  *shortest = n;
  return geossl::guarded([&] {
    geossl::parallel_for(threads, n, grain, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        if (i == bad) throw std::bad_alloc();
        ++visits[i];
      }
      const std::lock_guard<std::mutex> lock(mutex);
      *shortest = std::min(*shortest, end - begin);
    });
  });
}
GEOSSL_PACKED(geossl_visit_cpu)
GEOSSL_SIMD static float total(const float* x, int n) {
  float sum = 0;
  for (int i = 0; i < n; ++i) sum += x[i];
  return sum;
}
GEOSSL_API int geossl_total_cpu(const float* x, int n, float* out) { *out = total(x, n); return GEOSSL_OK; }
GEOSSL_PACKED(geossl_total_cpu)
"""


def compile_library(folder: Path, name: str, *flags: str, source: str = SOURCE) -> Path:
    assert CXX is not None
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{name}.cpp"
    file.write_text(source)
    command = [CXX, "-std=c++17", "-O1", "-fPIC", "-shared", "-pthread", f"-I{ROOT / 'cuda_ext/include'}", *flags, str(file), str(THREADS)]
    subprocess.run([*command, "-o", str(folder / f"{name}.so")], check=True)
    return folder / f"{name}.so"


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compile_library(tmp_path_factory.mktemp("library"), "current")


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A geossl that has loaded nothing and whose only folder is an empty one."""
    monkeypatch.setattr(_native, "_libraries", {})
    monkeypatch.setattr(_native, "_warned", set())
    monkeypatch.setattr(_native, "_functions", [])
    monkeypatch.setattr(geossl, "__path__", [str(tmp_path)])
    monkeypatch.delenv("GEOSSL_REQUIRE_NATIVE", raising=False)
    return tmp_path


def test_missing_library_is_said_once(fresh):
    with pytest.warns(RuntimeWarning, match="operators run as plain torch.*libgeossl_cpu.so was not found in .*install a C"):
        assert not _native.available("cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not _native.available("cpu")
    with pytest.warns(RuntimeWarning, match="operators on CUDA tensors.*FORCE_CUDA=1.*GEOSSL_CUDA=pypi"):
        assert not _native.available("cuda")
    with pytest.raises(ExtensionError, match=r"geossl\.fps needs a native library, but libgeossl_cpu.so was not found"):
        _native.function("cpu", "geossl_fps_cpu", _native.INT)(1)


def test_missing_library_is_an_error_where_it_is_required(fresh, monkeypatch):
    monkeypatch.setenv("GEOSSL_REQUIRE_NATIVE", "1")
    with pytest.raises(ExtensionError, match=r"GEOSSL_REQUIRE_NATIVE is set, but libgeossl_cpu\.so was not found"):
        _native.available("cpu")


@needs_compiler
@pytest.mark.parametrize("age", ["older", "newer"])
def test_stale_library_is_refused(fresh, age):
    version = _native.ABI_VERSION + (1 if age == "newer" else -1)
    compile_library(fresh / "_lib", _native.library_name("cpu").removesuffix(".so"), f"-DVERSION={version}")
    with pytest.raises(ExtensionError, match=f"is stale: it has ABI version {version}, {age} than the .* run `pip install -e .` again"):
        _native.available("cpu")
    info = _native.native_info()["cpu"]
    assert not info["loaded"]
    assert info["path"] == str(fresh / "_lib" / "libgeossl_cpu.so")
    assert "is stale" in info["reason"]


@pytest.mark.parametrize("content", [b"", b"not a library", b"\x7fELF\x02\x01\x01\x00"])
def test_damaged_library_is_refused(fresh, content):
    (fresh / "_lib").mkdir()
    (fresh / "_lib" / "libgeossl_cpu.so").write_bytes(content)
    with pytest.raises(ExtensionError, match=r"libgeossl_cpu\.so cannot be loaded: .*run `pip install -e .` again"):
        _native.available("cpu")


@needs_compiler
def test_library_of_another_project_is_refused(fresh):
    path = compile_library(fresh, "foreign", source='extern "C" int hello() { return 1; }\n')
    with pytest.raises(ExtensionError, match="is not a geossl library"), _native.substitute("cpu", path):
        pass


@needs_compiler
def test_function_that_the_library_lacks(library):
    lacking = _native.function("cpu", "geossl_added_later_cpu", _native.INT)
    with _native.substitute("cpu", library), pytest.raises(ExtensionError, match="is stale: it lacks geossl_added_later_cpu"):
        lacking(1)


@needs_compiler
def test_youngest_library_wins(fresh, library, monkeypatch):
    folders = [fresh / "tree", fresh / "site-packages"]
    monkeypatch.setattr(geossl, "__path__", [str(folder) for folder in folders])
    for folder in folders:
        (folder / "_lib").mkdir(parents=True)
        shutil.copy(library, folder / "_lib" / "libgeossl_cpu.so")
    now = time.time()
    for youngest in (0, 1):
        for index, folder in enumerate(folders):
            age = 0 if index == youngest else 100
            os.utime(folder / "_lib" / "libgeossl_cpu.so", (now - age, now - age))
        assert _native.find_library("cpu") == folders[youngest] / "_lib" / "libgeossl_cpu.so"


@needs_compiler
@pytest.mark.parametrize(
    ("status", "error", "text"),
    [
        (-1, ValueError, r"geossl\.status: invalid size or option"),
        (-2, MemoryError, "out of memory"),
        (-3, ValueError, "split it into smaller batches"),
        (-4, RuntimeError, "please report it"),
        (-99, RuntimeError, "unknown status -99"),
    ],
)
def test_status_codes_become_exceptions(library, status, error, text):
    call = _native.function("cpu", "geossl_status_cpu", _native.INT)
    with _native.substitute("cpu", library):
        call(0)
        with pytest.raises(error, match=text):
            call(status)


@needs_compiler
def test_cuda_errors_carry_their_text(library):
    call = _native.function("cuda", "geossl_status_cuda", _native.INT)
    with (
        _native.substitute("cuda", library),
        pytest.raises(RuntimeError, match=r"geossl\.status: CUDA error 719: unspecified launch failure"),
    ):
        call(719)


@needs_compiler
def test_arguments_are_checked(library):
    call = _native.function("cpu", "geossl_status_cpu", _native.INT)
    with _native.substitute("cpu", library):
        with pytest.raises(struct.error):
            call()
        with pytest.raises(struct.error):
            call(1, 2)
        with pytest.raises(struct.error):
            call(1.5)
        with pytest.raises(struct.error):
            call(None)


@needs_compiler
@pytest.mark.parametrize("argtypes", [(), (_native.DOUBLE,), (_native.INT, _native.PTR)])
def test_function_with_other_arguments_than_declared(library, argtypes):
    declared = _native.function("cpu", "geossl_status_cpu", *argtypes)
    with _native.substitute("cpu", library), pytest.raises(ExtensionError, match="is stale: geossl_status_cpu takes arguments q, not"):
        declared(*range(len(argtypes)))


@needs_compiler
def test_substitute_puts_everything_back(fresh, library):
    call = _native.function("cpu", "geossl_status_cpu", _native.INT)
    with _native.substitute("cpu", library):
        call(0)
        with _native.substitute("cpu", None), pytest.raises(ExtensionError, match="switched off"):
            call(0)
        call(0)
    with pytest.raises(ExtensionError, match="was not found"):
        call(0)


@needs_compiler
def test_exceptions_do_not_leave_the_library(library):
    call = _native.function("cpu", "geossl_throw_cpu", _native.INT)
    with _native.substitute("cpu", library):
        call(0)
        with pytest.raises(MemoryError):
            call(1)
        with pytest.raises(RuntimeError, match="unexpected internal error"):
            call(2)


@pytest.fixture
def visit(library):
    call = _native.function("cpu", "geossl_visit_cpu", _native.INT, _native.INT64, _native.INT64, _native.INT64, _native.PTR, _native.PTR)

    def run(threads: int, n: int, grain: int, bad: int = -1) -> tuple[torch.Tensor, int]:
        visits, shortest = torch.zeros(n, dtype=torch.int32), torch.zeros(1, dtype=torch.int64)
        with _native.substitute("cpu", library):
            call(threads, n, grain, bad, visits.data_ptr(), shortest.data_ptr())
        return visits, int(shortest)

    return run


@needs_compiler
@pytest.mark.parametrize("threads", [-1, 0, 1, 2, 3, 16])
@pytest.mark.parametrize(("n", "grain"), [(0, 1), (1, 1), (2, 1), (5, 2), (17, 4), (1000, 1), (1000, 600), (1000, 0), (3, 100)])
def test_parallel_for_visits_every_item_once(visit, threads, n, grain):
    visits, shortest = visit(threads, n, grain)
    assert torch.equal(visits, torch.ones(n, dtype=torch.int32))
    assert shortest >= min(grain, n)


@needs_compiler
@pytest.mark.parametrize("bad", [0, 50, 99])
@pytest.mark.parametrize("threads", [1, 4])
def test_parallel_for_passes_exceptions_on(visit, threads, bad):
    with pytest.raises(MemoryError):
        visit(threads, 100, 10, bad)


@needs_compiler
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_parallel_for_works_after_fork(visit):
    visit(4, 1000, 1)  # the parent has had threads
    child = os.fork()
    if child == 0:
        visits, _ = visit(4, 1000, 1)
        os._exit(0 if int(visits.sum()) == 1000 else 1)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0


@needs_compiler
def test_vector_clones_load_and_run(library):
    call = _native.function("cpu", "geossl_total_cpu", _native.PTR, _native.INT, _native.PTR)
    x, out = torch.arange(100.0), torch.zeros(1)
    with _native.substitute("cpu", library):
        call(x.data_ptr(), 100, out.data_ptr())
    assert out.item() == 4950.0


@pytest.mark.parametrize(
    ("arch", "capability", "runs"),
    [
        ("80-real", (8, 0), True),
        ("80-real", (8, 9), True),
        ("80-real", (9, 0), False),
        ("86-real", (8, 0), False),
        ("90", (10, 0), True),  # by its PTX
        ("90-virtual", (9, 0), True),
        ("100-real", (10, 3), True),
        ("120", (12, 1), True),
        ("120", (10, 0), False),
        ("90a-real", (9, 0), True),
    ],
)
def test_architectures_that_run_on_a_gpu(arch, capability, runs):
    assert _native._runs_on(arch, *capability) is runs


def fake_cuda_library(monkeypatch: pytest.MonkeyPatch, driver: int, capability: tuple[int, int]) -> SimpleNamespace:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")
    monkeypatch.setattr(_native, "_text", lambda handle, name: "80-real 90-real 120")
    return SimpleNamespace(geossl_cuda_runtime_version=lambda: 13000, geossl_cuda_driver_version=lambda: driver)


def test_gpu_that_the_library_cannot_serve(monkeypatch):
    assert _native._gpu_problem(fake_cuda_library(monkeypatch, 13020, (8, 6))) == ""
    problem = _native._gpu_problem(fake_cuda_library(monkeypatch, 13020, (7, 5)))
    assert "GPU 0 (Some GPU) has 75; set CUDAARCHS=75-real" in problem
    problem = _native._gpu_problem(fake_cuda_library(monkeypatch, 12080, (8, 6)))
    assert "was built with CUDA 13.0, but the GPU driver supports 12.8 at most; update the driver" in problem


@needs_compiler
def test_cuda_library_that_cannot_serve_the_gpu_counts_as_missing(fresh, library, monkeypatch):
    (fresh / "_lib").mkdir()
    shutil.copy(library, fresh / "_lib" / "libgeossl_cuda.so")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(_native, "_gpu_problem", lambda handle: "the GPU is too old for it")
    with pytest.warns(RuntimeWarning, match="the GPU is too old for it"):
        assert not _native.available("cuda")
    assert _native.native_info()["cuda"]["reason"] == "the GPU is too old for it"


def test_helpers_on_cpu_tensors():
    tensor = torch.zeros(1)
    assert _native.stream(tensor) == 0
    assert _native.device_index(tensor) == 0
    assert _native.threads() == torch.get_num_threads()


def test_versions_on_both_sides_agree():
    header = (ROOT / "cuda_ext" / "include" / "geossl_api.h").read_text()
    assert f"#define GEOSSL_ABI_VERSION {_native.ABI_VERSION}\n" in header


def test_importing_the_operators_loads_no_library():
    code = "import geossl.ops, geossl.ops._native as n; print(n._libraries)"
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert ran.stdout == "{}\n"
