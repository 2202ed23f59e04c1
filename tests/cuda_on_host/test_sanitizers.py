"""All kernels, CPU and CUDA, under AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer, in several schedules."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
spec = importlib.util.spec_from_file_location("build_host", HERE / "build_host.py")
assert spec is not None
assert spec.loader is not None
build_host = sys.modules["build_host"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(build_host)

pytestmark = pytest.mark.skipif(not build_host.compiler_found(), reason="no C++ compiler on this machine")


def run_driver(mode: str, seed: int) -> None:
    kernels = [
        path for folder, ending in (("cpu", "*.cpp"), ("cuda", "*.cu")) for path in sorted((ROOT / "cuda_ext" / folder).glob(ending))
    ]
    sources = [*sorted(HERE.glob("drive*.cpp")), *(path for path in kernels if path.stem != "info")]
    program = build_host.compile_sources("drive", sources, mode)
    env = dict(os.environ, ASAN_OPTIONS="detect_leaks=1", TSAN_OPTIONS="exitcode=66")
    done = subprocess.run([program, str(seed)], env=env, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    assert "all equal" in done.stdout


def test_drivers_call_every_launcher():
    """Every operator a library exports is named in a driver."""
    exported = set()
    for path in (ROOT / "cuda_ext").glob("c*/*.c*"):
        exported |= set(re.findall(r"GEOSSL_API [\w *]*?\b(geossl_\w+)\(", path.read_text()))
    drivers = "".join(path.read_text() for path in HERE.glob("drive*.cpp"))
    called = set(re.findall(r"geossl_\w+", drivers))
    called |= {f"geossl_{name}_{kind}" for name in re.findall(r"BOTH\((\w+)", drivers) for kind in ("cpu", "cuda")}
    operators = {name for name in exported if name.endswith(("_cpu", "_cuda")) and not name.startswith("geossl_cpu_")}
    assert operators - called == set()
    assert len(operators) > 60


@pytest.mark.parametrize("seed", range(4))
def test_kernels_agree_in_every_schedule(seed):
    run_driver("plain", seed)


@pytest.mark.sanitize
@pytest.mark.slow
@pytest.mark.parametrize(("mode", "seed"), [("asan", 0), ("asan", 3), ("tsan", 3)])
def test_kernels_under_sanitizers(mode, seed):
    run_driver(mode, seed)


@pytest.mark.sanitize
@pytest.mark.slow
def test_python_wrappers_under_address_sanitizer():
    """What the wrappers allocate is large enough: the kernels write into torch tensors under AddressSanitizer."""
    runtime = subprocess.run([build_host.CXX, "-print-file-name=libasan.so"], capture_output=True, text=True, check=True).stdout.strip()
    env = dict(
        os.environ,
        LD_PRELOAD=runtime,
        ASAN_OPTIONS="detect_leaks=0:verify_asan_link_order=0",
        GEOSSL_TEST_HOST_LIBRARY=str(build_host.host_library("asan")),
        PYTHONPATH=str(ROOT),
        PYTHONMALLOC="malloc",
    )
    files = [ROOT / "tests" / "ops" / name for name in ("test_matrix.py", "test_large.py", "test_voxels.py", "test_segments.py")]
    tests = [*files, "-k", "uniform or schedule or variant or reduce_agrees or backends_agree"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *map(str, tests)],
        env=env,
        capture_output=True,
        text=True,
        timeout=900,
        cwd=ROOT,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
