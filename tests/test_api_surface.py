"""Every public name with its signature, as recorded in ``api_surface.json``: a change of the API is made on purpose and shows in review.

After a change that is meant: ``python tests/test_api_surface.py --update``.
"""

from __future__ import annotations

import importlib
import inspect
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

RECORD = Path(__file__).with_name("api_surface.json")
PACKAGE = Path(__file__).parents[1] / "geossl"
PLAIN = (bool, int, float, str, type(None))


def public_modules() -> list[str]:
    """The package, its modules and sub-packages; files inside a sub-package are reached through its ``__init__``."""
    names = [path.stem for path in PACKAGE.glob("*.py")] + [path.parent.name for path in PACKAGE.glob("*/__init__.py")]
    return ["geossl", *sorted(f"geossl.{name}" for name in names if not name.startswith("_"))]


def public_names(module: ModuleType) -> list[str]:
    """What ``__all__`` says or, without it, what the module defines itself."""
    if hasattr(module, "__all__"):
        return sorted(module.__all__)
    own = {name for name, value in vars(module).items() if getattr(value, "__module__", "") == module.__name__}
    return sorted(name for name in own if not name.startswith("_") and not isinstance(getattr(module, name), TypeVar))


def default(value: Any) -> str:
    if isinstance(value, PLAIN) or (isinstance(value, tuple) and all(isinstance(item, PLAIN) for item in value)):
        return repr(value)
    return "..."  # an object: its text may hold an address


def signature(function: Any) -> str:
    """``(points: Tensor, k: int = 3, *, radius: float | None = None) -> Neighbors``, the same on every version of Python."""
    try:
        found = inspect.signature(function)
    except (TypeError, ValueError):
        return "(...)"
    marks = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
    parts: list[str] = []
    for parameter in found.parameters.values():
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY and not any(part.startswith("*") for part in parts):
            parts.append("*")
        text = marks.get(parameter.kind, "") + parameter.name
        if parameter.annotation is not parameter.empty:
            text += f": {annotation(parameter.annotation)}"
        if parameter.default is not parameter.empty:
            text += f" = {default(parameter.default)}"
        parts.append(text)
    result = "" if found.return_annotation is found.empty else f" -> {annotation(found.return_annotation)}"
    return f"({', '.join(parts)}){result}"


def annotation(value: Any) -> str:
    return value if isinstance(value, str) else inspect.formatannotation(value)


def describe(value: Any) -> str | dict[str, str]:
    """A function is its signature; a class its constructor and the public methods and properties it defines; a value its type."""
    if not inspect.isclass(value):
        return signature(value) if callable(value) and hasattr(value, "__name__") else f"a {type(value).__name__}"
    if issubclass(value, BaseException):  # what their constructor shows depends on the version of Python
        return f"exception ({', '.join(base.__name__ for base in value.__bases__)})"
    members = {"()": signature(value)}
    for name, member in sorted(vars(value).items()):
        if name.startswith("_"):
            continue
        if isinstance(member, (staticmethod, classmethod)):
            members[f".{name}"] = f"{type(member).__name__} {signature(member.__func__)}"
        elif inspect.isfunction(member):
            members[f".{name}"] = signature(member)
        elif isinstance(member, property):
            members[f".{name}"] = "property"
    return members


def surface() -> dict[str, dict[str, Any]]:
    """Describe every public name of every public module; a class that several modules offer is spelt out where it is at home."""
    described: dict[str, dict[str, Any]] = {}
    for module_name in public_modules():
        module = importlib.import_module(module_name)
        described[module_name] = {}
        for name in public_names(module):
            value = getattr(module, name)
            defined = inspect.isclass(value) or inspect.isfunction(value)
            home = ".".join(str(value.__module__).split(".")[:2]) if defined else module_name
            elsewhere = home.startswith("geossl.") and home != module_name
            described[module_name][name] = f"from {home}" if elsewhere else describe(value)
    return described


def test_public_names_are_those_on_record():
    recorded, now = json.loads(RECORD.read_text(encoding="utf-8")), surface()
    flat = [{f"{module}.{name}": text for module, names in record.items() for name, text in names.items()} for record in (recorded, now)]
    changes = [
        f"{key}: {flat[0].get(key, 'not there')} -> {flat[1].get(key, 'gone')}"
        for key in sorted({*flat[0], *flat[1]})
        if flat[0].get(key) != flat[1].get(key)
    ]
    assert not changes, "the public API changed; when this is meant, run: python tests/test_api_surface.py --update\n" + "\n".join(changes)
    assert sorted(recorded) == sorted(now)


def test_every_public_name_is_documented():
    missing = []
    for module_name in public_modules():
        module = importlib.import_module(module_name)
        for name in public_names(module):
            value = getattr(module, name)
            text = (value.__doc__ or "").strip()
            made_by_dataclass = text.startswith(f"{name}(")
            if (inspect.isclass(value) or inspect.isfunction(value)) and (not text or made_by_dataclass):
                missing.append(f"{module_name}.{name}")
    assert missing == []


def test_signatures_are_written_the_same_everywhere():
    def example(points: int, /, k: int = 3, *rest: str, radius: float | None = None, fill: object = object(), **more: int) -> list[int]: ...

    expected = "(points: int, k: int = 3, *rest: str, radius: float | None = None, fill: object = ..., **more: int) -> list[int]"
    assert signature(example) == expected


if __name__ == "__main__":
    if sys.argv[1:] != ["--update"]:
        sys.exit("usage: python tests/test_api_surface.py --update")
    sys.path.insert(0, str(PACKAGE.parent))
    RECORD.write_text(json.dumps(surface(), indent=1, sort_keys=True) + "\n", encoding="utf-8")
