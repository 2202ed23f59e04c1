"""Real isolated builds of the package by pip, into throw-away environments; they fetch scikit-build-core from the package index."""

from __future__ import annotations

import ctypes
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from geossl.ops import _native

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
SOURCES = ("pyproject.toml", "CMakeLists.txt", "README.md", "LICENSE", ".gitignore", "geossl", "cuda_ext", "tools", "tests/packaging")
HAS_NVCC = shutil.which("nvcc") is not None or Path("/usr/local/cuda/bin/nvcc").exists()
needs_nvcc = pytest.mark.skipif(not HAS_NVCC, reason="no nvcc on this machine")


@dataclass
class Builder:
    """Runs pip for a copy of the source tree inside an environment without packages of its own.

    The copy has no kernels, which take long to compile and are the same in every case; :meth:`add_kernels` brings them.
    """

    tree: Path
    python: Path
    base: dict[str, str] = field(default_factory=dict)

    def add_kernels(self) -> None:
        shutil.copytree(ROOT / "cuda_ext", self.tree / "cuda_ext", dirs_exist_ok=True)

    def pip(self, *args: str, check: bool = True, **environment: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "pip", "--python", str(self.python), "--disable-pip-version-check", *args]
        ran = subprocess.run(command, cwd=self.tree, env=self.base | environment, capture_output=True, text=True, check=False)
        if check and ran.returncode != 0:
            pytest.fail(f"{' '.join(args)} failed:\n{ran.stdout[-4000:]}\n{ran.stderr[-4000:]}")
        return ran

    def wheel(self, target: Path, source: str = ".", **environment: str) -> tuple[Path, str]:
        """Build a wheel in isolation; return its path and the log. A C++ error fails, it does not make a pure package."""
        ran = self.pip("wheel", "-v", "--no-deps", "-w", str(target), source, **{"GEOSSL_REQUIRE_NATIVE": "1"} | environment)
        (wheel,) = target.glob("*.whl")
        return wheel, ran.stdout + ran.stderr

    def purelib(self) -> Path:
        code = "import sysconfig; print(sysconfig.get_path('purelib'))"
        return Path(subprocess.check_output([self.python, "-c", code], text=True).strip())


@pytest.fixture
def builder(tmp_path: Path) -> Builder:
    tree = tmp_path / "tree"
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
        elif (ROOT / name).exists():
            tree.mkdir(exist_ok=True)
            shutil.copy(ROOT / name, tree / name)
    for source in [*(tree / "cuda_ext" / "cpu").glob("*.cpp"), *(tree / "cuda_ext" / "cuda").glob("*.cu")]:
        if source.stem != "info":
            source.unlink()
    # What a developer's tree may hold must not get into a package: a library built by hand and files of the tests.
    (tree / "geossl" / "_lib").mkdir(exist_ok=True)
    (tree / "geossl" / "_lib" / "libgeossl_cpu.so").write_text("left over")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "venv")], check=True)
    ours = ("GEOSSL_", "FORCE_CUDA", "CUDA", "PYTHON", "PIP_NO_", "VIRTUAL_ENV")
    return Builder(tree, tmp_path / "venv" / "bin" / "python", {k: v for k, v in os.environ.items() if not k.startswith(ours)})


def simulate_torch(builder: Builder, cuda: str) -> None:
    """Put a torch into the environment of which there is only what an installer looks at."""
    package = builder.purelib() / "torch"
    package.mkdir()
    (package / "__init__.py").write_text("raise SystemExit('the build must not import torch')\n")
    (package / "version.py").write_text(f"__version__ = '2.13.0'\ncuda = {cuda!r}\n")


def abi_versions(wheel: Path, target: Path) -> dict[str, int]:
    """Load every library in a wheel and ask for its ABI version."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(target)
    return {path.name: ctypes.CDLL(str(path)).geossl_abi_version() for path in sorted(target.glob("geossl/_lib/*"))}


def package_files() -> set[str]:
    """Files of the package as the version control or the .gitignore file has them: no caches, no libraries."""
    found = (path for path in (ROOT / "geossl").rglob("*") if path.is_file() and "__pycache__" not in path.parts and path.suffix != ".so")
    return {path.relative_to(ROOT).as_posix() for path in found}


def run_geossl(python: Path, code: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {k: v for k, v in os.environ.items() if not k.startswith(("GEOSSL_", "PYTHON"))} | environment
    return subprocess.run([python, "-c", code], cwd=folder, env=env, capture_output=True, text=True, check=False)


def test_default_wheel_holds_the_package_its_data_and_the_cpu_library(builder, tmp_path):
    builder.add_kernels()
    wheel, log = builder.wheel(tmp_path / "dist")
    assert "native code: cpu, because no torch was found" in log
    assert re.fullmatch(r"geossl-[\w.]+-py3-none-linux_\w+\.whl", wheel.name)
    assert abi_versions(wheel, tmp_path / "out") == {"libgeossl_cpu.so": _native.ABI_VERSION}
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert names == package_files() | {"geossl/_lib/libgeossl_cpu.so"}  # data of every kind is in, tests and tools are not
    with _native.substitute("cpu", tmp_path / "out" / "geossl" / "_lib" / "libgeossl_cpu.so"):
        info = _native.native_info()
    assert info["cpu"]["loaded"]
    assert "because no torch was found" in info["cuda"]["reason"]


def test_source_distribution_builds_the_same_wheel(builder, tmp_path):
    pytest.importorskip("scikit_build_core", reason="the build backend wraps scikit-build-core; it comes with the extra 'test'")
    code = "import sys; sys.path.insert(0, 'cuda_ext/build'); import geossl_build as b; print(b.build_sdist(sys.argv[1]))"
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=builder.tree, check=True, capture_output=True)
    (sdist,) = tmp_path.glob("geossl-*.tar.gz")
    wheel, _ = builder.wheel(tmp_path / "dist", source=str(sdist))
    assert abi_versions(wheel, tmp_path / "out") == {"libgeossl_cpu.so": _native.ABI_VERSION}
    with zipfile.ZipFile(wheel) as archive:
        assert package_files() <= set(archive.namelist())


@pytest.mark.parametrize("cause", ["GEOSSL_PURE", "no compiler"])
def test_pure_python_wheel(builder, tmp_path, cause):
    environment = {"GEOSSL_PURE": "1"}
    if cause == "no compiler":
        (tmp_path / "bin").mkdir()
        environment = {"PATH": str(tmp_path / "bin")}  # neither compilers nor cmake
    wheel, log = builder.wheel(tmp_path / "dist", **environment)
    assert "native code: pure" in log
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "out")
        assert not any(name.startswith("geossl/_lib") for name in archive.namelist())
    # Everything that is installed here, but for the hook by which an editable geossl goes before any other.
    packages = [entry for entry in sys.path if Path(entry).name == "site-packages"]
    (builder.purelib() / "installed.pth").write_text("\n".join(packages))
    code = "import geossl.ops._native as n; print(n.available('cpu'), n.available('cpu'), n.native_info()['cpu']['reason'])"
    ran = run_geossl(builder.python, code, tmp_path, PYTHONPATH=str(tmp_path / "out"))
    assert ran.stdout.startswith("False False libgeossl_cpu.so was not found in ")
    assert ran.stderr.count("RuntimeWarning") == 1  # said once
    ran = run_geossl(builder.python, code, tmp_path, PYTHONPATH=str(tmp_path / "out"), GEOSSL_REQUIRE_NATIVE="1")
    assert "ExtensionError: GEOSSL_REQUIRE_NATIVE is set, but libgeossl_cpu.so was not found" in ran.stderr


@needs_nvcc
@pytest.mark.parametrize("torch", ["forced", "simulated CUDA torch"])
def test_cuda_wheel(builder, tmp_path, torch):
    if torch == "forced":
        builder.add_kernels()
        wheel, log = builder.wheel(tmp_path / "dist", FORCE_CUDA="1", CUDAARCHS="80-real")
    else:
        simulate_torch(builder, "13.0")
        wheel, log = builder.wheel(tmp_path / "dist", CUDAARCHS="80-real")
    assert "native code: cuda, nvcc: system" in log
    expected = {"libgeossl_cpu.so": _native.ABI_VERSION, "libgeossl_cuda.so": _native.ABI_VERSION}
    assert abi_versions(wheel, tmp_path / "out") == expected  # the CUDA library loads on a machine without a driver
    with _native.substitute("cuda", tmp_path / "out" / "geossl" / "_lib" / "libgeossl_cuda.so"):
        info = _native.native_info()["cuda"]
    assert info["loaded"]
    assert info["archs"] == ["80-real"]
    assert re.fullmatch(r"\d+\.\d", info["cuda"])


def broken_nvcc(folder: Path) -> dict[str, str]:
    (folder / "cuda" / "bin").mkdir(parents=True)
    nvcc = folder / "cuda" / "bin" / "nvcc"
    nvcc.write_text("#!/bin/sh\necho 'nvcc is broken' >&2\nexit 1\n")
    nvcc.chmod(0o755)
    return {"CUDA_HOME": str(folder / "cuda")}


def test_broken_nvcc_beside_a_cuda_torch_leaves_the_cpu_library(builder, tmp_path):
    simulate_torch(builder, "13.0")
    wheel, log = builder.wheel(tmp_path / "dist", **broken_nvcc(tmp_path))
    assert "the CUDA build failed" in log
    assert abi_versions(wheel, tmp_path / "out") == {"libgeossl_cpu.so": _native.ABI_VERSION}
    with _native.substitute("cpu", tmp_path / "out" / "geossl" / "_lib" / "libgeossl_cpu.so"):
        assert "/cuda/bin/nvcc does not compile here: nvcc is broken" in _native.native_info()["cuda"]["reason"]


def test_broken_nvcc_fails_loudly_when_cuda_is_forced(builder, tmp_path):
    ran = builder.pip("wheel", "-v", "--no-deps", "-w", "dist", ".", check=False, FORCE_CUDA="1", **broken_nvcc(tmp_path))
    assert ran.returncode != 0
    assert "/cuda/bin/nvcc does not compile here: nvcc is broken" in ran.stdout + ran.stderr
    assert not list(builder.tree.glob("dist/*"))


@pytest.mark.parametrize("torch", ["cpu", "cuda switched off"])
def test_cuda_is_not_built(builder, tmp_path, torch):
    simulate_torch(builder, None if torch == "cpu" else "13.0")
    wheel, log = builder.wheel(tmp_path / "dist", **({} if torch == "cpu" else {"GEOSSL_CUDA": "0"}))
    assert f"native code: cpu, because {'torch was a CPU build' if torch == 'cpu' else 'GEOSSL_CUDA=0 was set'}" in log
    assert abi_versions(wheel, tmp_path / "out") == {"libgeossl_cpu.so": _native.ABI_VERSION}


@pytest.fixture
def with_packages(builder: Builder) -> Callable[[], None]:
    """Give the empty environment the packages of the one that runs this test, torch among them."""

    def link() -> None:
        (builder.purelib() / "outer.pth").write_text(sysconfig.get_path("purelib") + "\n")

    return link


def test_editable_install(builder, tmp_path, with_packages):
    with_packages()
    builder.add_kernels()
    shutil.rmtree(builder.tree / "geossl" / "_lib")
    builder.pip("install", "--no-deps", "-e", ".")
    code = (
        "import json, geossl, geossl.errors; from geossl.ops._native import native_info;"
        "print(json.dumps([geossl.errors.__file__, native_info()['cpu']['path'], native_info()['cuda']['reason']]))"
    )
    ran = run_geossl(builder.python, code, tmp_path, GEOSSL_REQUIRE_NATIVE="1")
    assert ran.returncode == 0, ran.stderr
    errors, library, reason = json.loads(ran.stdout)
    ran = run_geossl(builder.python, "import geossl.cli as c; raise SystemExit(c.main(['doctor']))", tmp_path, GEOSSL_REQUIRE_NATIVE="1")
    assert "geossl is usable" in ran.stdout, ran.stdout + ran.stderr  # which has run an operator
    assert errors == str(builder.tree / "geossl" / "errors.py")  # Python files stay in the tree: an edit shows at once
    assert library == str(builder.purelib() / "geossl" / "_lib" / "libgeossl_cpu.so")
    assert "because torch" in reason or "nvcc" in reason
    (builder.tree / "geossl" / "added_later.py").write_text("value = 1\n")
    ran = run_geossl(builder.python, "import geossl.added_later as m; print(m.value)", tmp_path)
    assert ran.stdout == "1\n", ran.stderr
    # A developer's build in the tree is younger than the installed one and wins.
    (builder.tree / "geossl" / "_lib").mkdir()
    shutil.copy(library, builder.tree / "geossl" / "_lib" / "libgeossl_cpu.so")
    ran = run_geossl(builder.python, code, tmp_path)
    assert json.loads(ran.stdout)[1] == str(builder.tree / "geossl" / "_lib" / "libgeossl_cpu.so")


def test_ordinary_install_runs_outside_the_tree(builder, tmp_path, with_packages):
    with_packages()
    builder.pip("install", "--no-deps", ".")
    code = "import geossl, geossl.ops._native as n; print(geossl.__file__, n.available('cpu'))"
    ran = run_geossl(builder.python, code, tmp_path, GEOSSL_REQUIRE_NATIVE="1")
    assert ran.stdout == f"{builder.purelib() / 'geossl' / '__init__.py'} True\n", ran.stderr
    ran = subprocess.run([builder.python.parent / "geossl", "--help"], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "pretrain" in ran.stdout
