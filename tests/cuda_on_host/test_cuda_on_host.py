"""Tests of the instrument: correct kernels pass for every schedule, defective ones are caught and named."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

HERE = Path(__file__).parent
spec = importlib.util.spec_from_file_location("build_host", HERE / "build_host.py")
assert spec is not None
assert spec.loader is not None
build_host = sys.modules["build_host"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(build_host)

pytestmark = pytest.mark.skipif(not build_host.compiler_found(), reason="no C++ compiler on this machine")


def bugs(mode: str, name: str, seed: int = 0) -> tuple[int, str]:
    """Run one kernel of bugs.cu: 0 clean, 3 diagnosed by the instrument, 4 wrong result, else stopped by a sanitizer."""
    program = build_host.compile_sources("bugs", [HERE / "bugs.cu"], mode)
    env = dict(os.environ, ASAN_OPTIONS="detect_leaks=0", TSAN_OPTIONS="exitcode=66")
    done = subprocess.run([program, name, str(seed)], env=env, capture_output=True, text=True, timeout=120)
    return done.returncode, done.stdout + done.stderr


GOOD = ["reverse", "half_warps", "count_atomic", "syncwarp", "smem_optin", "last_block"]
SANITIZERS = [pytest.param(mode, marks=pytest.mark.sanitize) for mode in ("asan", "tsan")]


@pytest.mark.parametrize("mode", ["plain", *SANITIZERS])
@pytest.mark.parametrize("name", GOOD)
def test_correct_kernels_are_clean(name, mode):
    for seed in range(5):
        code, text = bugs(mode, name, seed)
        assert code == 0, text


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("divergent", "divergent __syncthreads"),
        ("early_exit", "24 have exited"),
        ("lane_missing", "deadlock"),
        ("lane_outside", "not in the mask"),
        ("smem_48k", "too much dynamic shared"),
        ("block_2048", "bad block size"),
    ],
)
def test_misuse_is_diagnosed(name, message):
    for seed in (0, 1, 7):
        code, text = bugs("plain", name, seed)
        assert code == 3, text
        assert message in text


def test_uninitialised_shared_memory_shows():
    assert bugs("plain", "uninitialised")[0] == 4


@pytest.mark.parametrize("name", ["missing_barrier", "no_syncwarp"])
def test_some_schedule_shows_a_missing_barrier(name):
    assert 4 in {bugs("plain", name, seed)[0] for seed in range(4)}


@pytest.mark.sanitize
@pytest.mark.parametrize("name", ["out_of_bounds", "shared_overrun"])
def test_address_sanitizer_sees_overruns(name):
    code, text = bugs("asan", name)
    assert code not in (0, 3, 4), text
    assert "AddressSanitizer" in text or "out of bounds" in text


@pytest.mark.sanitize
@pytest.mark.parametrize("name", ["missing_barrier", "no_syncwarp", "count_plain"])
def test_thread_sanitizer_sees_races(name):
    code, text = bugs("tsan", name)
    assert code == 66, text
    assert "data race" in text


@pytest.fixture(scope="module")
def sort_pairs() -> Callable[..., int]:
    library = ctypes.CDLL(str(build_host.compile_sources("sort.so", [HERE / "sort.cu"], "plain", "-shared")))
    library.sort_pairs.argtypes = [ctypes.c_void_p] * 6 + [ctypes.c_int] * 2 + [ctypes.c_void_p]
    return library.sort_pairs


def test_sort_is_stable_and_uses_the_given_bits(sort_pairs):
    rng = np.random.default_rng(3)
    key, value = rng.integers(0, 1 << 20, 500).astype(np.uint64), np.arange(500, dtype=np.int32)
    key_out, value_out, size = np.empty_like(key), np.empty_like(value), ctypes.c_size_t(0)
    arguments = (*(a.ctypes.data for a in (key, key_out, value, value_out)), 500, 8, None)
    assert sort_pairs(None, ctypes.addressof(size), *arguments) == 0
    assert size.value > 0
    temporary = np.empty(size.value, np.uint8)
    assert sort_pairs(temporary.ctypes.data, ctypes.addressof(size), *arguments) == 0
    order = np.argsort(key & 255, kind="stable")
    assert (key_out == key[order]).all()
    assert (value_out == value[order]).all()
