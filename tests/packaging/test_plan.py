"""The build backend's decision: what is built for every combination of torch, compilers and environment variables."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]
VARIABLES = ("GEOSSL_CUDA", "FORCE_CUDA", "GEOSSL_PURE", "GEOSSL_REQUIRE_NATIVE", "CUDA_HOME", "CUDA_PATH", "CXX")


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The backend on a Linux machine with a C++ compiler, no nvcc and no torch, whatever this one has."""
    pytest.importorskip("scikit_build_core", reason="the build backend wraps scikit-build-core; it comes with the extra 'test'")
    spec = importlib.util.spec_from_file_location("geossl_build", ROOT / "cuda_ext" / "build" / "geossl_build.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "geossl_build", module)
    spec.loader.exec_module(module)
    for variable in VARIABLES:
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(module.sys, "platform", "linux")
    monkeypatch.setattr(module, "_has_compiler", lambda: True)
    monkeypatch.setattr(module, "_find_nvcc", lambda: None)
    monkeypatch.setattr(module, "_check_nvcc", lambda nvcc: None)
    monkeypatch.setattr(module, "_torch_version_file", lambda: None)
    return module


def set_torch(backend: ModuleType, monkeypatch: pytest.MonkeyPatch, folder: Path, torch: str) -> None:
    if torch == "none":
        return
    cuda = {"cpu": "None", "cuda": "'13.0'"}[torch]
    (folder / "version.py").write_text(
        f"__version__ = '2.13.0'\ndebug = False\ncuda: Optional[str] = {cuda}\ngit_version = 'cuda'\nhip: Optional[str] = None\n"
    )
    monkeypatch.setattr(backend, "_torch_version_file", lambda: str(folder / "version.py"))


TABLE = [  # torch, nvcc on the machine, GEOSSL_CUDA, FORCE_CUDA -> native, nvcc used, forced
    *[(torch, nvcc, "", "", "cpu", "", False) for torch in ("none", "cpu") for nvcc in (False, True)],
    ("cuda", True, "", "", "cuda", "system", False),
    ("cuda", False, "", "", "cuda", "pypi", False),
    ("cuda", True, "auto", "0", "cuda", "system", False),
    *[(torch, True, "0", "", "cpu", "", False) for torch in ("none", "cpu", "cuda")],
    ("cuda", True, "0", "1", "cpu", "", False),
    *[(torch, True, "1", "", "cuda", "system", True) for torch in ("none", "cpu", "cuda")],
    *[(torch, False, "1", "", "cuda", "pypi", True) for torch in ("none", "cpu", "cuda")],
    *[(torch, True, "", "1", "cuda", "system", True) for torch in ("none", "cpu", "cuda")],
    *[(torch, False, "", "1", "cuda", "pypi", True) for torch in ("none", "cpu", "cuda")],
    *[(torch, nvcc, "pypi", "", "cuda", "pypi", True) for torch in ("none", "cpu", "cuda") for nvcc in (False, True)],
]


@pytest.mark.parametrize(("torch", "nvcc", "geossl_cuda", "force_cuda", "native", "source", "forced"), TABLE)
def test_plan_follows_the_table(backend, monkeypatch, tmp_path, torch, nvcc, geossl_cuda, force_cuda, native, source, forced):
    set_torch(backend, monkeypatch, tmp_path, torch)
    if nvcc:
        monkeypatch.setattr(backend, "_find_nvcc", lambda: "/opt/cuda/bin/nvcc")
    for variable, value in (("GEOSSL_CUDA", geossl_cuda), ("FORCE_CUDA", force_cuda)):
        if value:
            monkeypatch.setenv(variable, value)
    plan = backend.plan()
    assert (plan.native, plan.nvcc, plan.forced) == (native, source, forced)
    assert bool(plan.reason) == (native != "cuda")  # a missing CUDA library always comes with its reason


@pytest.mark.parametrize("torch", ["none", "cpu", "cuda"])
@pytest.mark.parametrize("cause", ["GEOSSL_PURE", "no compiler"])
def test_pure_package(backend, monkeypatch, tmp_path, torch, cause):
    set_torch(backend, monkeypatch, tmp_path, torch)
    if cause == "GEOSSL_PURE":
        monkeypatch.setenv("GEOSSL_PURE", "1")
    else:
        monkeypatch.setattr(backend, "_has_compiler", lambda: False)
    plan = backend.plan()
    assert plan.native == "pure"
    assert (cause in plan.reason) or ("no C++ compiler" in plan.reason)
    assert backend._settings({}, plan) == {"wheel.cmake": "false"}
    monkeypatch.setenv("FORCE_CUDA", "1")
    with pytest.raises(SystemExit, match="CUDA kernels were asked for, but"):
        backend.plan()


def test_unknown_mode_is_refused(backend, monkeypatch):
    monkeypatch.setenv("GEOSSL_CUDA", "yes")
    with pytest.raises(SystemExit, match="use 0, 1, auto or pypi"):
        backend.plan()


def test_no_compiler_from_the_index_outside_linux(backend, monkeypatch, tmp_path):
    set_torch(backend, monkeypatch, tmp_path, "cuda")
    monkeypatch.setattr(backend.sys, "platform", "darwin")
    assert backend.plan().native == "cpu"
    monkeypatch.setenv("GEOSSL_CUDA", "1")
    with pytest.raises(SystemExit, match="CUDA_HOME"):
        backend.plan()


@pytest.mark.parametrize("hook", ["get_requires_for_build_wheel", "get_requires_for_build_editable"])
def test_compiler_packages_are_required_only_when_used(backend, monkeypatch, tmp_path, hook):
    monkeypatch.chdir(ROOT)
    set_torch(backend, monkeypatch, tmp_path, "cuda")
    assert any(name.startswith("nvidia-cuda-nvcc") for name in getattr(backend, hook)())
    monkeypatch.setattr(backend, "_find_nvcc", lambda: "/opt/cuda/bin/nvcc")
    assert not any("nvidia" in name for name in getattr(backend, hook)())
    monkeypatch.setenv("GEOSSL_PURE", "1")
    monkeypatch.setenv("PATH", str(tmp_path))  # no cmake and no ninja here, and none is asked for
    assert not any(name.startswith(("nvidia", "cmake", "ninja")) for name in getattr(backend, hook)())


def test_settings_leave_the_users_own_alone(backend, monkeypatch):
    monkeypatch.setattr(backend, "_find_nvcc", lambda: "/opt/cuda/bin/nvcc")
    own = {"cmake.define.CMAKE_CUDA_COMPILER": "/mine/nvcc", "build-dir": "elsewhere"}
    settings = backend._settings(own, backend.Plan("cuda", "system"))
    assert settings["cmake.define.CMAKE_CUDA_COMPILER"] == "/mine/nvcc"
    assert settings["build-dir"] == "elsewhere"
    assert settings["cmake.define.GEOSSL_CUDA"] == "ON"
    assert backend._settings(None, backend.Plan("cuda", "system"))["cmake.define.CMAKE_CUDA_COMPILER"] == "/opt/cuda/bin/nvcc"


def test_reason_survives_as_a_c_string(backend):
    settings = backend._settings({}, backend.Plan("cpu", reason='the build failed: "x"; \\ $PATH (see /tmp/a-b.log)'))
    assert settings["cmake.define.GEOSSL_WITHOUT_CUDA"] == "the build failed: x  PATH (see /tmp/a-b.log)"


def test_compiler_of_the_index_gets_its_library_path(backend, monkeypatch, tmp_path):
    nvcc = tmp_path / "nvidia" / "cu13" / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.touch()
    monkeypatch.setenv("LIBRARY_PATH", "/already")
    monkeypatch.setattr(backend.sys, "path", [str(tmp_path)])
    settings = backend._settings({}, backend.Plan("cuda", "pypi"))
    assert settings["cmake.define.CMAKE_CUDA_COMPILER"] == str(nvcc)
    assert os.environ["LIBRARY_PATH"] == f"{tmp_path}/nvidia/cu13/lib:/already"
    monkeypatch.setattr(backend.sys, "path", [])
    with pytest.raises(RuntimeError, match="pip install 'nvidia-cuda-nvcc"):
        backend._settings({}, backend.Plan("cuda", "pypi"))


class Hook:
    """Stands in for scikit-build-core: fails while native code of the kinds in ``broken`` is asked for."""

    def __init__(self, *broken: str) -> None:
        self.broken, self.tried = broken, []

    def __call__(self, directory: str, settings: dict, metadata_directory: str | None) -> str:
        native = "pure" if settings.get("wheel.cmake") == "false" else {"ON": "cuda", "OFF": "cpu"}[settings["cmake.define.GEOSSL_CUDA"]]
        self.tried.append((native, settings.get("cmake.define.GEOSSL_WITHOUT_CUDA")))
        if native in self.broken:
            raise SystemExit(1)
        return f"{native}.whl"


def build(backend: ModuleType, monkeypatch: pytest.MonkeyPatch, folder: Path, hook: Hook) -> str:
    monkeypatch.chdir(folder)
    monkeypatch.setattr(backend, "_find_nvcc", lambda: "/opt/cuda/bin/nvcc")
    monkeypatch.setattr(backend._backend, "build_wheel", hook)
    return backend.build_wheel("dist", None, None)


def test_failed_cuda_build_falls_back_to_the_cpu(backend, monkeypatch, tmp_path):
    set_torch(backend, monkeypatch, tmp_path, "cuda")
    (tmp_path / "build" / "py3-none-linux_x86_64").mkdir(parents=True)
    (tmp_path / "build" / "dev").mkdir()
    hook = Hook("cuda")
    assert build(backend, monkeypatch, tmp_path, hook) == "cpu.whl"
    assert hook.tried == [("cuda", None), ("cpu", "the CUDA build failed: pip install -v shows why")]
    assert [path.name for path in (tmp_path / "build").iterdir()] == ["dev"]  # nobody else's build folder is touched


@pytest.mark.parametrize("variable", ["FORCE_CUDA", "GEOSSL_CUDA"])
def test_forced_cuda_build_fails_loudly(backend, monkeypatch, tmp_path, variable):
    monkeypatch.setenv(variable, "1")
    hook = Hook("cuda")
    with pytest.raises(SystemExit):
        build(backend, monkeypatch, tmp_path, hook)
    assert [native for native, _ in hook.tried] == ["cuda"]


def test_broken_cpp_compiler_falls_back_to_pure_python_unless_refused(backend, monkeypatch, tmp_path):
    hook = Hook("cpu")
    assert build(backend, monkeypatch, tmp_path, hook) == "pure.whl"
    monkeypatch.setenv("GEOSSL_REQUIRE_NATIVE", "1")
    with pytest.raises(SystemExit):
        build(backend, monkeypatch, tmp_path, Hook("cpu"))


def test_everything_broken_is_an_error(backend, monkeypatch, tmp_path):
    set_torch(backend, monkeypatch, tmp_path, "cuda")
    hook = Hook("cuda", "cpu", "pure")
    with pytest.raises(SystemExit):
        build(backend, monkeypatch, tmp_path, hook)
    assert [native for native, _ in hook.tried] == ["cuda", "cpu", "pure"]


def real_backend_finds(tmp_path: Path, code: str, **environment: str) -> str:
    """Run ``code`` with the unpatched backend in a fresh virtual environment that has a torch of CUDA 12.6 (a version.py alone)."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "venv")], check=True)
    python = tmp_path / "venv" / "bin" / "python"
    purelib = Path(subprocess.check_output([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], text=True).strip())
    (purelib / "torch").mkdir()
    (purelib / "torch" / "__init__.py").write_text("raise SystemExit('the build must not import torch')\n")
    (purelib / "torch" / "version.py").write_text("__version__ = '2.6.0+cu126'\ncuda: Optional[str] = '12.6'\n")
    overlay = os.pathsep.join([str(ROOT / "cuda_ext" / "build"), *(path for path in sys.path if "site-packages" in path)])
    base = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    ran = subprocess.run(
        [python, "-c", f"import geossl_build as b; {code}"],
        env=base | {"PYTHONPATH": overlay, "PYTHONNOUSERSITE": "1"} | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return ran.stdout.strip()


def test_torch_of_the_environment_is_found_from_an_isolated_build(backend, tmp_path):
    # PYTHONPATH holds another torch (the one running this test); an isolated build hides the user's the same way.
    assert real_backend_finds(tmp_path, "print(b._torch_cuda())") == "(True, 'torch is built for CUDA 12.6')"


def test_compilers_are_looked_up_where_users_say(backend, tmp_path):
    (tmp_path / "cuda" / "bin").mkdir(parents=True)
    nvcc = tmp_path / "cuda" / "bin" / "nvcc"
    nvcc.write_text("#!/bin/sh\n")
    nvcc.chmod(0o755)
    found = real_backend_finds(
        tmp_path, "print(b._find_nvcc(), b._has_compiler())", CUDA_HOME=str(tmp_path / "cuda"), CXX="/nonexistent/g++ -m64"
    )
    assert found == f"{nvcc} False"
