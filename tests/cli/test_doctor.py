"""``geossl doctor`` on good and on broken machines."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import json
import sys
from types import SimpleNamespace

import pytest
import torch

from geossl.cli import doctor
from geossl.ops import _native


@pytest.fixture(autouse=True)
def _ordinary_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """No GPU, no optional package, no variable; findings do not depend on the machine that runs the test."""
    for variable in ("GEOSSL_REAL_DATA", "GEOSSL_GOLDEN", "GEOSSL_REQUIRE_NATIVE"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    found, find, version = doctor._requirements(), importlib.util.find_spec, doctor._version
    absent = {name for extra, names in found.items() if extra for name in names}
    monkeypatch.setattr(doctor, "_version", lambda name: "" if name in absent else version(name))
    optional = {doctor._module(name) for name in absent} | {"pytorch3d"}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name in optional else find(name, *rest))


def by_name(findings: list[doctor.Finding]) -> dict[str, doctor.Finding]:
    return {finding.name: finding for finding in findings}


def native_info(monkeypatch: pytest.MonkeyPatch, kind: str, **entry: object) -> None:
    info = _native.native_info()
    info[kind] = {"loaded": False, "path": None, "abi": None, "expected_abi": 1, "reason": ""} | entry
    monkeypatch.setattr(_native, "native_info", lambda: info)


def test_report_names_everything_and_exits_with_zero(capsys, tmp_path):
    assert doctor.main(["--json", str(tmp_path / "report.json")]) == 0
    text = capsys.readouterr().out
    for section in ("versions", "native libraries", "devices", "operators", "optional packages: vis", "data"):
        assert f"\n{section}\n" in text
    assert f"torch                {torch.__version__} (build for" in text or torch.__version__ in text
    assert text.endswith("\ngeossl is usable\n")
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["usable"] is True
    names = [finding["name"] for finding in report["findings"]]
    assert {"python", "torch", "numpy", "libgeossl_cpu", "libgeossl_cuda", "cpu", "open3d", "embedded objects"} <= set(names)
    assert all(finding["advice"] for finding in report["findings"] if finding["state"] != "ok")  # each comes with what to do


def test_missing_requirement(monkeypatch, capsys):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "h5py" else find(name, *rest))
    assert doctor.main([]) == 1
    text = capsys.readouterr().out
    assert "-> pip install h5py" in text
    assert text.endswith("geossl is not usable; broken: versions: h5py\n")


def test_broken_torch_does_not_stop_the_rest(monkeypatch, capsys):
    import_module = importlib.import_module

    def fail(name):
        if name == "torch":
            raise OSError("libcudart.so.13: cannot open shared object file")
        return import_module(name)

    monkeypatch.setattr(importlib, "import_module", fail)
    assert doctor.main([]) == 1
    text = capsys.readouterr().out
    assert "cannot be imported: libcudart.so.13: cannot open shared object file" in text
    assert "embedded objects" in text
    assert "native libraries" not in text


def test_stale_library_is_broken(monkeypatch):
    native_info(monkeypatch, "cpu", path="/somewhere/libgeossl_cpu.so", reason="it is stale; build it again")
    found = by_name(list(doctor._libraries()))["libgeossl_cpu"]
    assert (found.state, found.value, found.advice) == ("broken", "/somewhere/libgeossl_cpu.so", "it is stale; build it again")


def test_missing_cpu_library_is_broken_only_where_it_is_required(monkeypatch):
    native_info(monkeypatch, "cpu", reason="no compiler; install one")
    found = by_name(list(doctor._libraries()))["libgeossl_cpu"]
    assert (found.state, found.advice) == ("missing", "no compiler; install one")
    monkeypatch.setenv("GEOSSL_REQUIRE_NATIVE", "1")
    assert by_name(list(doctor._libraries()))["libgeossl_cpu"].state == "broken"


def test_cuda_library_matters_only_beside_a_gpu(monkeypatch):
    native_info(monkeypatch, "cuda", reason="it was not built, because of this; do that")
    assert by_name(list(doctor._libraries()))["libgeossl_cuda"].state == "ok"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    found = by_name(list(doctor._libraries()))["libgeossl_cuda"]
    assert (found.state, found.advice) == ("missing", "it was not built, because of this; do that")


def test_loaded_libraries_show_what_is_in_them(monkeypatch):
    entry = {"loaded": True, "path": "/lib/libgeossl_cuda.so", "abi": 1, "archs": ["80-real", "120"], "cuda": "13.0"}
    native_info(monkeypatch, "cuda", **entry)
    value = by_name(list(doctor._libraries()))["libgeossl_cuda"].value
    assert value == "/lib/libgeossl_cuda.so (ABI 1, CUDA 13.0, architectures 80-real 120)"


def test_devices(monkeypatch):
    found = by_name(list(doctor._devices()))
    assert f" cores, {torch.get_num_threads()} used by torch" in found["cpu"].value
    assert found["cuda"].state == "missing"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    properties = SimpleNamespace(name="Some GPU", major=9, minor=0, total_memory=80 * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    assert by_name(list(doctor._devices()))["cuda:0"].value == "Some GPU, compute capability 9.0, 80 GiB"


@pytest.mark.parametrize("defect", ["wrong result", "error"])
def test_operator_that_does_not_work_is_broken(monkeypatch, defect):
    def sample(points, k):
        if defect == "error":
            raise RuntimeError("geossl.fps: CUDA error 719")
        return torch.zeros(1, k, dtype=torch.int64)

    monkeypatch.setattr("geossl.ops.farthest_point_sample", sample)
    (found,) = doctor._operators()
    assert found.state == "broken"
    assert found.advice


def test_optional_package_that_cannot_be_imported(monkeypatch, tmp_path):
    (tmp_path / "viser.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')\n")
    (tmp_path / "open3d.py").write_text("")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.syspath_prepend(str(tmp_path))
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: True if name in ("viser", "open3d") else find(name, *rest))
    found = by_name(list(doctor._optional()))
    assert found["viser"].value == "found, cannot be imported: RuntimeError: operator torchvision::nms does not exist"
    assert found["viser"].state == "missing"
    assert found["open3d"].state == "ok"
    assert found["timm"].advice == "pip install 'geossl[teachers]'"


def test_requirements_are_the_same_installed_or_not(monkeypatch):
    lines = ["torch>=2.6", "scikit-learn>=1.4", 'timm>=1.0; extra == "teachers"', "geossl[test]; extra == 'dev'"]
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: lines)
    assert doctor._requirements() == {"": ["torch", "scikit-learn"], "teachers": ["timm"]}

    def absent(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "requires", absent)
    found = doctor._requirements()
    assert {"torch", "numpy", "trimesh"} <= set(found[""])
    assert "timm" in found["teachers"]


def test_data_folders(monkeypatch, tmp_path):
    (tmp_path / "objects").mkdir()
    monkeypatch.setenv("GEOSSL_REAL_DATA", str(tmp_path))
    monkeypatch.setenv("GEOSSL_GOLDEN", str(tmp_path / "nowhere"))
    found = by_name(list(doctor._data()))
    assert found["GEOSSL_REAL_DATA"].value == f"{tmp_path} (objects)"
    assert found["GEOSSL_GOLDEN"].value == f"{tmp_path / 'nowhere'} is not a folder"
    assert found["embedded objects"].state == "ok"


def test_terminal_gets_a_table(monkeypatch, capsys):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    findings = [doctor.Finding("versions", "a", "missing", "value [red]", "do [this]")]
    monkeypatch.setattr(doctor, "examine", lambda: findings)
    assert doctor.main([]) == 0
    text = capsys.readouterr().out
    assert "value [red]" in text  # shown as it is, not taken for a colour
    assert "-> do [this]" in text
