"""``geossl doctor``: what is installed, built and found on this machine, and what to do about each thing missing.

Exit code 0 when geossl is usable, 1 when something it requires is broken. It imports nothing before looking, so that it also runs where
torch does not.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import geossl
from geossl.errors import GeosslError

# Distributions whose module is not their name with "-" turned into "_". Only those named in pyproject.toml matter.
_MODULES = {"pyyaml": "yaml", "pillow": "PIL", "scikit-learn": "sklearn", "open_clip_torch": "open_clip"}
_IMPORT_TIMEOUT = 120  # seconds; open3d takes ten on a cold disk


@dataclass(frozen=True)
class Finding:
    """One line of the report. ``missing`` is harmless, ``broken`` makes geossl unusable; both come with advice."""

    section: str
    name: str
    state: Literal["ok", "missing", "broken"]
    value: str
    advice: str = ""


def _requirements() -> dict[str, list[str]]:
    """Return the names of required distributions under "" and of optional ones under the extra that brings them."""
    try:
        lines = importlib.metadata.requires("geossl") or []
    except importlib.metadata.PackageNotFoundError:  # used from the source tree without being installed
        project = tomllib.loads((Path(geossl.__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        lines = list(project["dependencies"])
        lines += [f'{line}; extra == "{extra}"' for extra, group in project["optional-dependencies"].items() for line in group]
    found: dict[str, list[str]] = {}
    for line in lines:
        name = re.match(r"[\w.-]+", line)
        extra = re.search(r"extra\s*==\s*['\"]([\w-]+)['\"]", line)
        if name is not None and name[0] != "geossl":
            found.setdefault(extra[1] if extra else "", []).append(name[0])
    return found


def _module(distribution: str) -> str:
    return _MODULES.get(distribution.lower(), distribution.replace("-", "_"))


def _version(distribution: str) -> str:
    """Return the installed version; "" without one: another distribution may have the module, as spconv-cu120 has spconv."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _import_problem(module: str) -> str:
    """Import a module in a process of its own and return what went wrong, or ""."""
    try:
        ran = subprocess.run(
            [sys.executable, "-c", f"import {module}"], capture_output=True, text=True, timeout=_IMPORT_TIMEOUT, check=False
        )
    except subprocess.TimeoutExpired:
        return f"no end after {_IMPORT_TIMEOUT} s"
    lines = ran.stderr.strip().splitlines()
    return "" if ran.returncode == 0 else (lines[-1] if lines else f"exit status {ran.returncode}")


def _versions() -> Iterator[Finding]:
    section = "versions"
    yield Finding(section, "python", "ok", f"{platform.python_version()} ({sys.executable})")
    yield Finding(section, "system", "ok", f"{platform.system()} {platform.release()} {platform.machine()}")
    yield Finding(section, "geossl", "ok", f"{geossl.__version__} ({Path(geossl.__file__).parent})")
    for name in _requirements()[""]:
        if importlib.util.find_spec(_module(name)) is None:
            yield Finding(section, name, "broken", "not installed", f"pip install {name}")
        elif name == "torch":
            yield _torch(section)
        else:
            yield Finding(section, name, "ok", _version(name))


def _torch(section: str) -> Finding:
    try:
        torch = importlib.import_module("torch")
    except (ImportError, OSError, RuntimeError, AttributeError, ValueError) as error:  # a library of it is missing or of another version
        return Finding(section, "torch", "broken", f"{_version('torch')}, cannot be imported: {error}", "reinstall torch for this machine")
    built = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU"
    return Finding(section, "torch", "ok", f"{torch.__version__} (build for {built})")


def _libraries() -> Iterator[Finding]:
    import torch

    from geossl.ops import _native

    section = "native libraries"
    info = _native.native_info()
    for kind, entry in info.items():
        name = f"libgeossl_{kind}"
        if entry["loaded"]:
            known = [f"ABI {entry['abi']}"]
            if kind == "cpu":
                known += [f"compiler {entry['compiler']}", entry["simd"]]
            else:
                known += [f"CUDA {entry['cuda']}", f"architectures {' '.join(entry['archs'])}"]
            yield Finding(section, name, "ok", f"{entry['path']} ({', '.join(known)})")
        elif entry["path"] is not None:
            yield Finding(section, name, "broken", str(entry["path"]), str(entry["reason"]))
        elif kind == "cpu":
            state: Literal["missing", "broken"] = "broken" if _native.required() else "missing"
            yield Finding(section, name, state, "not built: operators run as plain torch, which is slower", str(entry["reason"]))
        elif torch.cuda.is_available():
            yield Finding(section, name, "missing", "not built: operators run as plain torch on the GPU", str(entry["reason"]))
        else:
            yield Finding(section, name, "ok", f"not built, and not needed without a GPU ({entry['reason'].split(';')[0]})")


def _devices() -> Iterator[Finding]:
    import torch

    section = "devices"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    yield Finding(section, "cpu", "ok", f"{_processor()}, {cores} cores, {torch.get_num_threads()} used by torch")
    if not torch.cuda.is_available():
        why = (
            "torch is a CPU build"
            if torch.version.cuda is None
            else "torch sees no CUDA device; a GPU needs a driver that nvidia-smi can talk to"
        )
        yield Finding(section, "cuda", "missing", "none", f"{why}; everything runs on the CPU")
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        value = f"{properties.name}, compute capability {properties.major}.{properties.minor}, {properties.total_memory / 2**30:.0f} GiB"
        yield Finding(section, f"cuda:{index}", "ok", value)


def _processor() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor() or "unknown processor"
    model = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return model[1] if model else platform.machine()


def _operators() -> Iterator[Finding]:
    """Run one operator on every device: what loads may still not run."""
    import torch

    from geossl import ops

    for device in ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]:
        points = torch.arange(24.0, device=device).reshape(1, 8, 3)
        try:
            chosen = ops.farthest_point_sample(points, 2).tolist()
        except (GeosslError, RuntimeError) as error:
            yield Finding("operators", device, "broken", "farthest_point_sample failed", str(error))
            continue
        right = chosen == [[0, 7]]
        advice = "" if right else "the library or the driver is defective; please report it with this page"
        yield Finding("operators", device, "ok" if right else "broken", f"farthest_point_sample returned {chosen}", advice)


def _optional() -> Iterator[Finding]:
    found = _requirements()
    for extra in sorted(set(found) - {""}):
        section, is_tool = f"optional packages: {extra}", extra in ("test", "dev")
        for name in found[extra]:
            version, module = _version(name), _module(name)
            if version == "" and (is_tool or importlib.util.find_spec(module) is None):
                yield Finding(section, name, "missing", "not installed", f"pip install 'geossl[{extra}]'")
            elif not is_tool and (problem := _import_problem(module)):
                advice = f"reinstall {name} to match the installed torch and numpy, or do without it"
                yield Finding(section, name, "missing", f"{version or 'found'}, cannot be imported: {problem}", advice)
            else:
                yield Finding(section, name, "ok", version or "found")
    if importlib.util.find_spec("pytorch3d") is not None:
        yield Finding("optional packages: interop", "pytorch3d", "ok", _version("pytorch3d") or "found")


def _data() -> Iterator[Finding]:
    section = "data"
    objects = Path(geossl.__file__).parent / "data" / "samples" / "objects.npz"
    if objects.is_file():
        yield Finding(section, "embedded objects", "ok", f"{objects} ({objects.stat().st_size / 1e6:.1f} MB)")
    else:
        yield Finding(section, "embedded objects", "broken", f"{objects} is missing", "reinstall geossl; the quickstart trains on them")
    for variable, what in (("GEOSSL_REAL_DATA", "real samples for the tests"), ("GEOSSL_GOLDEN", "golden cases for the tests")):
        folder = os.environ.get(variable)
        if not folder:
            default = "the ones in tests/golden are used" if variable == "GEOSSL_GOLDEN" else "tests that need them skip"
            yield Finding(section, variable, "missing", f"not set; {default}", f"only for tests: {variable}=FOLDER with {what}")
        elif not Path(folder).is_dir():
            yield Finding(section, variable, "missing", f"{folder} is not a folder", f"point {variable} at {what}, or unset it")
        else:
            names = sorted(path.name for path in Path(folder).iterdir() if path.is_dir())
            yield Finding(section, variable, "ok", f"{folder} ({', '.join(names) or 'empty'})")


def examine() -> list[Finding]:
    """Look at everything and return the findings in the order they are printed. When torch is broken, what needs it is left out."""
    findings = list(_versions())
    if not any(finding.name == "torch" and finding.state == "broken" for finding in findings):
        for part in (_libraries, _devices, _operators):
            findings += part()
    return [*findings, *_optional(), *_data()]


def _print_plain(findings: list[Finding]) -> None:
    section = ""
    width = max(len(finding.name) for finding in findings)
    for finding in findings:
        if finding.section != section:
            section = finding.section
            print(f"\n{section}")
        line = f"  {finding.state:<7}  {finding.name:<{width}}  {finding.value}"
        short = len(line) + len(finding.advice) <= 120
        print(f"{line}  -> {finding.advice}" if finding.advice and short else line)
        if finding.advice and not short:
            print(f"  {'':<7}  {'':<{width}}  -> {finding.advice}")


def _print_rich(findings: list[Finding]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    colours = {"ok": "green", "missing": "yellow", "broken": "bold red"}
    table = Table(show_header=False, box=None, pad_edge=False, padding=(0, 1))
    section = ""
    for finding in findings:
        if finding.section != section:
            section = finding.section
            table.add_row()
            table.add_row("", f"[bold]{escape(section)}[/bold]")
        advice = f"\n[dim]-> {escape(finding.advice)}[/dim]" if finding.advice else ""
        colour = colours[finding.state]
        table.add_row(f"[{colour}]{finding.state}[/{colour}]", escape(finding.name), escape(finding.value) + advice)
    Console().print(table)


def main(argv: list[str] | None = None) -> int:
    """Run ``geossl doctor``; return 0 when geossl is usable and 1 when something required is broken."""
    parser = argparse.ArgumentParser(prog="geossl doctor", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the findings to FILE")
    arguments = parser.parse_args(argv)
    findings = examine()
    broken = [finding for finding in findings if finding.state == "broken"]
    if sys.stdout.isatty() and importlib.util.find_spec("rich") is not None:
        _print_rich(findings)
    else:
        _print_plain(findings)
    names = ", ".join(f"{finding.section}: {finding.name}" for finding in broken)
    print(f"\ngeossl is not usable; broken: {names}" if broken else "\ngeossl is usable")
    if arguments.json is not None:
        report: dict[str, Any] = {"usable": not broken, "findings": [asdict(finding) for finding in findings]}
        arguments.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return 1 if broken else 0
