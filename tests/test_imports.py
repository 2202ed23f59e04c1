"""Who may import whom: the layers of the package, read from the sources, and what an import costs and touches."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "geossl"

# What each part may import, besides itself. Arrows point downwards only:
#   errors, registry, config, geometry -> ops -> layers -> models -> methods, tasks -> cli
FOUNDATION = {"errors", "registry", "config", "geometry"}
MODELS = FOUNDATION | {"ops", "layers", "models"}
ALLOWED = {
    "errors": set(),
    "registry": {"errors"},
    "config": {"errors", "registry"},
    "geometry": {"errors"},
    "ops": FOUNDATION,
    "layers": FOUNDATION | {"ops"},
    "models": MODELS,
    "methods": MODELS | {"tasks"},  # one layer: a system and its fine-tuning head know each other
    "tasks": MODELS | {"methods"},
    "data": FOUNDATION | {"ops"},
    "engine": {"errors", "config"},  # a method is known to it by its protocol alone
    "evaluation": MODELS | {"data"},
    "adapters": MODELS,
    "vis": FOUNDATION | {"ops"},
    "cli": MODELS | {"methods", "tasks", "data", "engine", "evaluation", "adapters", "vis"},
}
LAZY = "vis"  # heavy and optional: imported inside functions alone, and there by evaluation too
MAY_USE_LAZY = {"evaluation", "cli"}

# Modules of optional packages (pyproject.toml has them in extras) and of required ones that are slow to import.
OPTIONAL = {"viser", "open3d", "gsplat", "spconv", "torch_scatter", "timm", "open_clip", "torchvision", "huggingface_hub", "pytorch3d"}
SLOW = {"matplotlib", "sklearn", "scipy", "trimesh", "tensorboard", "h5py", "webdataset", "tyro", "rich", "PIL"}


def imports(tree: ast.Module, package: str) -> Iterator[tuple[str, int, bool]]:
    """Yield (dotted name, line, whether it runs when the module is imported) of every import; names imported count as modules too."""
    functions = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        at_import = id(node) not in functions
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno, at_import) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*parents, *([node.module] if node.module else [])])
            yield from ((f"{base}.{alias.name}", node.lineno, at_import) for alias in node.names)


def part(dotted: str) -> str:
    """Return the part of geossl a dotted name is in; "" for the package itself and what it re-exports."""
    pieces = dotted.split(".")
    return pieces[1] if len(pieces) > 1 and pieces[1] in ALLOWED else ""


def violations(name: str, source: str) -> list[str]:
    """Return the forbidden imports in the module called ``name`` ("geossl.models.vit")."""
    found = []
    own = part(name)
    for dotted, line, at_import in imports(ast.parse(source), name.rpartition(".")[0]):
        top, other = dotted.split(".")[0], part(dotted)
        where = f"{name}:{line}"
        if top in OPTIONAL and at_import:
            found.append(f"{where} imports the optional package {top} outside a function")
        if top != "geossl" or other in ("", own):
            continue
        if other == LAZY and own in MAY_USE_LAZY:
            if at_import:
                found.append(f"{where} imports {dotted} outside a function")
        elif other not in ALLOWED.get(own, set()):
            found.append(f"{where} imports {dotted}: an upward arrow from {own or 'the package itself'} to {other}")
    return found


def modules() -> dict[str, Path]:
    """Map the dotted name of every module to its file; that of a package ends in ``__init__``."""
    return {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in sorted(PACKAGE.rglob("*.py"))}


@pytest.mark.parametrize("name", modules())
def test_imports_point_downwards(name):
    assert violations(name, modules()[name].read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("name", "source", "expected"),
    [
        ("geossl.ops.knn", "from geossl.layers import Block", "upward arrow from ops to layers"),
        ("geossl.ops.knn", "from geossl import models", "upward arrow from ops to models"),
        ("geossl.ops.knn", "from ..data.loader import Loader", "upward arrow from ops to data"),
        ("geossl.layers.__init__", "def f():\n    import geossl.methods.point_mae", "upward arrow from layers to methods"),
        ("geossl.engine.loop", "from geossl.models import load", "upward arrow from engine to models"),
        ("geossl.evaluation.report", "from geossl.vis import figures", "outside a function"),
        ("geossl.models.vit", "def f():\n    from geossl.vis import figures", "upward arrow from models to vis"),
        ("geossl.vis.viewer", "import open3d as o3d", "optional package open3d outside a function"),
        ("geossl.new_part", "from geossl.models import load", "upward arrow from the package itself to models"),
    ],
)
def test_forbidden_imports_are_seen(name, source, expected):
    (found,) = violations(name, source)
    assert expected in found


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("geossl.evaluation.report", "def f():\n    from geossl.vis import figures"),
        ("geossl.ops._native", "import geossl\nfrom geossl.errors import ExtensionError\nfrom . import reference"),
        ("geossl.models.factory", "def f():\n    import huggingface_hub"),
    ],
)
def test_allowed_imports_pass(name, source):
    assert violations(name, source) == []


def test_every_part_has_a_layer():
    parts = {path.stem for path in PACKAGE.glob("*.py")} | {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert parts - {"__init__"} == set(ALLOWED)


def test_optional_packages_are_those_of_the_extras():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    names = {
        line.split(">")[0].split("[")[0].replace("-", "_") for extra in ("vis", "interop", "teachers", "hub") for line in extras[extra]
    }
    assert {"open_clip" if name == "open_clip_torch" else name for name in names} == OPTIONAL - {
        "pytorch3d"
    }  # pytorch3d: used when importable


def test_no_cycle_among_modules():
    """Imports outside functions form no cycle, so every module can be imported first."""
    files = modules()
    graph: dict[str, set[str]] = {}
    for name, path in files.items():
        targets = set()
        for dotted, _, at_import in imports(ast.parse(path.read_text(encoding="utf-8")), name.rpartition(".")[0]):
            if at_import:  # the longest prefix that is a module; a name from a package stands for its __init__
                pieces = dotted.split(".")
                names = [".".join(pieces[:end]) for end in range(len(pieces), 1, -1)]
                targets |= {next((key for n in names for key in (n, f"{n}.__init__") if key in files), name)}
        graph[name] = targets - {name, "geossl.__init__"}
    done: set[str] = set()

    def visit(name: str, path: list[str]) -> None:
        assert name not in path, " -> ".join([*path[path.index(name) :], name])
        if name not in done:
            for target in sorted(graph[name]):
                visit(target, [*path, name])
            done.add(name)

    for name in graph:
        visit(name, [])


@pytest.fixture(scope="session")
def measure(tmp_path_factory) -> Callable[[str], dict]:
    """Run an import in a fresh process; return its CPU seconds after torch, the modules it brought, and whether it woke a GPU.

    As in an installed package, the bytecode is there already: the first of two runs leaves it, whatever PYTHONDONTWRITEBYTECODE says.
    """
    env = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    env["PYTHONPYCACHEPREFIX"] = str(tmp_path_factory.mktemp("bytecode"))

    def run(statement: str) -> dict:
        return [_measure(statement, env) for _ in range(2)][1]

    return run


def _measure(statement: str, env: dict[str, str]) -> dict:
    code = (
        "import json, sys, time, torch\n"
        "start = time.process_time()\n"
        f"{statement}\n"
        "seconds = time.process_time() - start\n"
        "print(json.dumps({'seconds': seconds, 'modules': sorted(sys.modules), 'gpu': torch.cuda.is_initialized()}))"
    )
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True, env=env)
    return json.loads(ran.stdout)


def test_sub_packages_are_attributes_on_first_use():
    """``import geossl`` and then ``geossl.ops.knn``, in a fresh interpreter, for all but the command line."""
    code = "import geossl; print(*(geossl.__getattr__(name).__name__ for name in geossl._PACKAGES)); geossl.opps"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    parts = sorted(path.parent.name for path in PACKAGE.glob("*/__init__.py") if path.parent.name != "cli")
    assert done.stdout.split() == [f"geossl.{name}" for name in parts], done.stderr
    assert "no attribute 'opps'; it offers" in done.stderr


def test_import_geossl_is_quick_and_brings_nothing_heavy(measure):
    result = measure("import geossl, geossl.cli")
    assert result["seconds"] < 1.0
    brought = {name.split(".")[0] for name in result["modules"]}
    assert brought.isdisjoint(OPTIONAL | SLOW)
    assert not any(name.startswith("geossl.") and name.split(".")[1] not in ("cli", "errors") for name in result["modules"])


def test_importing_every_part_touches_no_gpu_and_no_optional_package(measure):
    parts = [f"geossl.{path.parent.name}" for path in PACKAGE.glob("*/__init__.py")]
    result = measure(f"import {', '.join(sorted(parts))}")
    assert not result["gpu"]
    assert {name.split(".")[0] for name in result["modules"]}.isdisjoint(OPTIONAL)
    assert result["seconds"] < 1.0
