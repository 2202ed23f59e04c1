"""Configurations: dataclasses <-> YAML <-> dotted command-line flags.

A program's configuration is one dataclass whose fields are values, other dataclasses, or *choices* from a
:class:`~geossl.registry.Registry` (:func:`registry_field`). Values come from, in rising order: the defaults in the code, a YAML
file, flags such as ``--optim.lr 1e-4`` (parsed by tyro). Everything is checked on the way: unknown keys and flags are refused
with the nearest valid name, wrong types and values are reported with their dotted key. :func:`to_yaml` writes the resolved
configuration so that reading it back gives an equal one.

Example:
    >>> @dataclass(kw_only=True)
    ... class OptimConfig:
    ...     lr: float = 1e-3
    ...     "Peak learning rate."
    ...
    ...     def __post_init__(self) -> None:
    ...         require(self.lr > 0, "lr", "must be > 0", self.lr)
    >>> @dataclass(kw_only=True)
    ... class PretrainConfig:
    ...     backbone: Any = registry_field(BACKBONES, default="point_vit_tiny")
    ...     optim: OptimConfig = field(default_factory=OptimConfig)
    >>> load_config(PretrainConfig, "configs/my.yaml", ["--optim.lr", "1e-4", "--backbone.name", "point_vit_small"])
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import difflib
import inspect
import io
import itertools
import logging
import re
import textwrap
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from geossl.errors import ConfigError, UnknownNameError
from geossl.registry import Registry

log = logging.getLogger("geossl")

ConfigT = TypeVar("ConfigT")


def require(condition: bool, key: str, expected: str, value: Any) -> None:
    """Check one field in a dataclass's ``__post_init__``.

    Args:
        condition: What must hold.
        key: Name of the field, without the path to its dataclass; :func:`load_config` adds that.
        expected: What was expected, continuing the sentence "<key> ...": ``"must be > 0"``.
        value: What came.

    Raises:
        ConfigError: ``condition`` is false.
    """
    if not condition:
        raise ConfigError(f"{key} {expected}, got {value!r}")


def registry_field(registry: Registry[Any], default: str | None) -> Any:
    """Declare a dataclass field that is a choice: a variant of ``registry`` with its own configuration.

    In YAML ``{name: X, key: value}`` (or just ``X``) takes the default configuration of variant ``X`` and overrides its keys; on the
    command line ``--field.name X --field.key value`` does. With ``default=None`` the field is None (null in YAML) unless one is named.
    """
    return field(default_factory=lambda: None if default is None else registry.config(default), metadata={"registry": registry})


def registry_fields(registry: Registry[Any]) -> Any:
    """Declare a dataclass field that is a tuple of choices (see :func:`registry_field`), empty by default.

    In YAML it is a list of what ``registry_field`` takes; flags cannot set it.
    """
    return field(default=(), metadata={"registry_of_each": registry})


def load_config(cls: type[ConfigT], path: str | Path | None, args: Sequence[str] = (), *, prog: str | None = None) -> ConfigT:
    """Build a ``cls`` from its defaults, the YAML file ``path`` (or None) and the flags ``args``.

    Choosing another variant by flag (``--backbone.name``) starts from that variant's defaults: what the file says for the variant it
    names is left out, with a warning.

    Raises:
        ConfigError: the file cannot be read, or a value has the wrong type or range; the message names the dotted key.
        UnknownNameError: a key, flag or registered name is not known; the message gives the nearest valid ones.
        SystemExit: with status 0, after ``--help`` was printed.
    """
    data = read_yaml(path) if path is not None else {}
    config = from_dict(cls, data, source=str(path) if path is not None else "", names=_chosen_names(args))
    return _apply(config, _parse_flags(config, list(args), prog), "")


def split_arguments(argv: Sequence[str]) -> tuple[str | None, list[str]]:
    """Split a command line ``[CONFIG.yaml] --flags ...`` into the file (or None) and the flags."""
    if argv and not argv[0].startswith("-"):
        return argv[0], list(argv[1:])
    return None, list(argv)


def from_dict(cls: type[ConfigT], data: Mapping[str, Any], *, source: str = "", names: Mapping[str, str] | None = None) -> ConfigT:
    """Build a ``cls`` from plain nested ``data`` (as read from YAML), checking every key, type and value.

    Args:
        cls: Dataclass whose fields all have defaults.
        data: Nested mapping; missing keys keep their defaults.
        source: Where ``data`` comes from, for messages.
        names: Variants chosen elsewhere, by dotted key of the choice: ``{"backbone": "point_vit_tiny"}``; they win over ``data``.
    """
    root = cls()
    try:
        return _Builder(root, names or {}).merge(root, data, "")
    except (ConfigError, UnknownNameError) as error:
        if source:
            raise type(error)(f"{source}: {error}") from error
        raise


def to_dict(config: Any) -> dict[str, Any]:
    """Turn a configuration into nested dicts, lists and scalars, in the order of declaration (``name`` of a variant first)."""
    pairs = {f.name: _plain(getattr(config, f.name)) for f in fields(config) if f.init}
    return {"name": pairs.pop("name"), **pairs} if "name" in pairs else pairs


def to_yaml(config: Any) -> str:
    """Write ``config`` as YAML; :func:`load_config` reads it back to an equal configuration."""
    return yaml.dump(to_dict(config), Dumper=_Dumper, sort_keys=False, default_flow_style=False, allow_unicode=True, width=120)


def flatten(config: Any) -> dict[str, Any]:
    """All values of ``config`` by dotted key: ``{"optim.lr": 0.001, ...}``."""
    return dict(_walk(config, ""))


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Read a YAML file whose top level is a mapping. Numbers follow YAML 1.2 (``1e-3`` is one), ``on``/``off``/``yes``/``no`` are text."""
    try:
        data = yaml.load(Path(path).read_text(encoding="utf-8"), Loader=_Loader)
    except OSError as error:
        raise ConfigError(f"cannot read the configuration file {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise ConfigError(f"{path} must hold a mapping of keys to values, got {type(data).__name__}")
    return data


def field_docs(cls: type) -> dict[str, str]:
    """Read the docstrings written under the fields of dataclass ``cls`` (and of the classes it derives from), by field name."""
    docs: dict[str, str] = {}
    for klass in reversed([klass for klass in cls.__mro__ if is_dataclass(klass)]):
        try:
            source = inspect.getsource(klass)
        except (OSError, TypeError):
            continue  # made at run time: there is no source to read
        body = ast.parse(textwrap.dedent(source)).body[0]
        statements = body.body if isinstance(body, ast.ClassDef) else []
        for declared, text in itertools.pairwise(statements):
            match declared, text:
                case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(doc))):
                    docs[name] = " ".join(doc.split())
    return docs


# ---------------------------------------------------------------------------------------------------------------------
# From plain data to dataclasses


class _Builder:
    """Carries what every level of the tree needs while data is merged into the defaults."""

    def __init__(self, root: Any, names: Mapping[str, str]) -> None:
        self.root = root
        self.names = names

    def merge(self, default: Any, data: Any, path: str) -> Any:
        """Return ``default`` (a dataclass instance) with the keys of ``data`` replaced."""
        if not isinstance(data, Mapping):
            raise ConfigError(f"{path or 'the configuration'} must be a mapping of keys to values, got {data!r}")
        hints = get_type_hints(type(default))
        known = [f for f in fields(default) if f.init]
        for key in data:
            if key not in [f.name for f in known]:
                raise _unknown_key("key", _join(path, str(key)), default, path, self.root)
        changes: dict[str, Any] = {}
        for f in known:
            at, current = _join(path, f.name), getattr(default, f.name)
            if "registry" in f.metadata:
                changes[f.name] = self.choose(f.metadata["registry"], current, data.get(f.name, {}), at)
            elif "registry_of_each" in f.metadata:
                if f.name in data:
                    changes[f.name] = self.choose_each(f.metadata["registry_of_each"], data[f.name], at)
            elif is_dataclass(current):
                changes[f.name] = self.merge(current, data.get(f.name, {}), at)
            elif f.name in data:
                changes[f.name] = self.convert(hints[f.name], data[f.name], at)
        return _replace(default, changes, path)

    def choose(self, registry: Registry[Any], default: Any, data: Any, path: str) -> Any:
        """Return the variant that ``data`` or a flag names, else ``default``, with the other keys of ``data`` replaced."""
        data = {"name": data} if isinstance(data, str) else {} if data is None and default is None else data
        if not isinstance(data, Mapping):
            raise ConfigError(f"{path} must be a {registry.kind} name or a mapping with the key 'name', got {data!r}")
        if default is None and not data and path not in self.names:
            return None
        in_file = data.get("name", getattr(default, "name", None))
        name = self.names.get(path, in_file)
        if name != in_file and in_file is not None:
            dropped = [f"{path}.{key}" for key in data if key != "name"]
            if dropped:
                log.warning("%s.name is now %s: the file's %s belong to %s and are left out", path, name, ", ".join(dropped), in_file)
            data = {}
        if default is not None and "name" not in data and path not in self.names:
            return self.merge(default, data, path)
        if not isinstance(name, str):
            raise ConfigError(f"{path}.name must be the name of a {registry.kind}, got {name!r}")
        try:
            variant = registry.config(name)
        except UnknownNameError as error:
            raise UnknownNameError(f"{path}.name: {error}") from error
        return self.merge(variant, {key: value for key, value in data.items() if key != "name"}, path)

    def choose_each(self, registry: Registry[Any], data: Any, path: str) -> tuple[Any, ...]:
        """Return the variants that the entries of the list ``data`` name."""
        if not isinstance(data, list | tuple):
            raise ConfigError(f"{path} must be a list, each entry a {registry.kind} name or a mapping with the key 'name', got {data!r}")
        for number, entry in enumerate(data):
            if not entry:
                raise ConfigError(f"{path}[{number}] must be a {registry.kind} name or a mapping with the key 'name', got {entry!r}")
        return tuple(self.choose(registry, None, entry, f"{path}[{number}]") for number, entry in enumerate(data))

    def convert(self, hint: Any, value: Any, path: str) -> Any:
        """Check that ``value`` (from YAML) is a ``hint`` and return it as one."""
        origin, parts = get_origin(hint), get_args(hint)
        if origin is Annotated:
            return self.convert(parts[0], value, path)
        if hint is Any:
            return value
        if origin in (Union, types.UnionType):
            return self.convert_union(parts, value, path)
        if origin is Literal:
            if any(value == part and type(value) is type(part) for part in parts):
                return value
            near = difflib.get_close_matches(str(value), [str(part) for part in parts], n=1)
            hint_text = f" (did you mean {near[0]!r}?)" if near else ""
            raise ConfigError(f"{path} must be one of {', '.join(map(str, parts))}, got {value!r}{hint_text}")
        if origin in (tuple, list) or hint in (tuple, list):
            return self.convert_sequence(origin or hint, parts, value, path)
        if origin is dict or hint is dict:
            if not isinstance(value, Mapping):
                raise _wrong_type(path, "a mapping", value)
            return {key: self.convert(parts[1] if parts else Any, item, f"{path}.{key}") for key, item in value.items()}
        if is_dataclass(hint):
            return self.merge(hint(), value, path)  # type: ignore[operator]
        return _convert_scalar(hint, value, path)

    def convert_union(self, parts: tuple[Any, ...], value: Any, path: str) -> Any:
        errors = []
        for part in parts:
            try:
                return self.convert(part, value, path)
            except ConfigError as error:
                errors.append(error)
        expected = " or ".join(_type_name(part) for part in parts)
        raise errors[0] if len(errors) == 1 else _wrong_type(path, expected, value)

    def convert_sequence(self, kind: type, parts: tuple[Any, ...], value: Any, path: str) -> Any:
        if not isinstance(value, list | tuple):
            raise _wrong_type(path, "a list", value)
        if kind is tuple and parts and parts[-1] is not Ellipsis:
            if len(value) != len(parts):
                raise ConfigError(f"{path} must be a list of {len(parts)} values, got {value!r}")
            items = list(parts)
        else:
            items = [parts[0] if parts else Any] * len(value)
        return kind(self.convert(item, entry, f"{path}[{i}]") for i, (item, entry) in enumerate(zip(items, value, strict=True)))


def _convert_scalar(hint: Any, value: Any, path: str) -> Any:
    if hint is None or hint is type(None):
        if value is None:
            return None
    elif hint is bool:
        if isinstance(value, bool):
            return value
    elif hint is int:
        if isinstance(value, int) and not isinstance(value, bool):
            return value
        if isinstance(value, float) and value.is_integer():
            return int(value)  # 1e4 is how one writes ten thousand steps
    elif hint is float:
        if isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
    elif hint is str:
        if isinstance(value, str):
            return value
    elif hint is Path:
        if isinstance(value, str | Path):
            return Path(value)
    else:
        raise TypeError(f"{path}: geossl.config reads bool, int, float, str, Path, Literal and lists of them, not {hint!r}")
    raise _wrong_type(path, _type_name(hint), value)


def _type_name(hint: Any) -> str:
    known = {bool: "true or false", int: "an integer", float: "a number", str: "a text", Path: "a path", type(None): "null"}
    return known.get(hint) or str(hint)


def _wrong_type(path: str, expected: str, value: Any) -> ConfigError:
    return ConfigError(f"{path} must be {expected}, got {value!r} ({type(value).__name__})")


def _replace(config: Any, changes: Mapping[str, Any], path: str) -> Any:
    """``dataclasses.replace`` whose errors name the dotted key."""
    try:
        return replace(config, **changes)
    except ConfigError as error:  # from require(): starts with the name of the field
        raise ConfigError(_join(path, str(error))) from error
    except UnknownNameError as error:
        raise UnknownNameError(f"{path}: {error}" if path else str(error)) from error


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _walk(config: Any, path: str) -> Iterator[tuple[str, Any]]:
    for f in fields(config):
        if f.init:
            value = getattr(config, f.name)
            if is_dataclass(value):
                yield from _walk(value, _join(path, f.name))
            else:
                yield _join(path, f.name), value


def _unknown_key(kind: str, key: str, level: Any, path: str, root: Any) -> UnknownNameError:
    """Word the error for an unknown dotted ``key`` met at ``level`` (the dataclass at ``path``) of the tree ``root``."""
    elsewhere = [name for name in flatten(root) if not path or not name.startswith(f"{path}.")]
    valid = [name for name, _ in _walk(level, path)] + elsewhere
    near = [name for name in valid if name.rpartition(".")[2] == key.rpartition(".")[2]]  # the right name in the wrong place
    near += [name for name in difflib.get_close_matches(key, valid, n=2, cutoff=0.6) if name not in near]
    dashes = "--" if kind == "flag" else ""
    hint = f"; did you mean {' or '.join(repr(dashes + name) for name in near[:3])}?" if near else "."
    known = ", ".join(f.name for f in fields(level) if f.init)
    return UnknownNameError(f"unknown {kind} {dashes + key!r}{hint} Keys of {path or 'the configuration'}: {known}")


# ---------------------------------------------------------------------------------------------------------------------
# Flags


def _chosen_names(args: Sequence[str]) -> dict[str, str]:
    """Find ``--choice.name X`` in ``args``: variants must be known before the flags they bring can be."""
    chosen = {}
    for position, arg in enumerate(args):
        match = re.fullmatch(r"--([\w.-]+)\.name(?:=(.*))?", arg, re.DOTALL)
        if match:
            value = match[2] if match[2] is not None else next(iter(args[position + 1 : position + 2]), "")
            chosen[match[1].replace("-", "_")] = value
    return chosen


@dataclass
class _Unchosen:
    """Stands in the help for a choice that is not made."""

    name: str | None = None
    """Registered name; null for none."""


def _flags_class(config: Any, names: Sequence[str] = ()) -> type:
    """Make a plain dataclass with the fields, types, docs and present values of ``config``.

    tyro parses into this twin rather than into the configuration itself, so that the checks in ``__post_init__`` run in
    :func:`_apply`, where the dotted key is known, and so that a choice has the fields of the variant chosen. ``names`` are
    those ``config`` could have, for the help.
    """
    import tyro

    hints, docs = get_type_hints(type(config)), field_docs(type(config))
    members: list[tuple[str, Any, Any]] = []
    for f in fields(config):
        if not f.init or "registry_of_each" in f.metadata:
            continue
        value, hint = getattr(config, f.name), hints[f.name]
        variants = f.metadata["registry"].names() if "registry" in f.metadata else ()
        if variants and value is None:
            value = _Unchosen()
        if is_dataclass(value):
            hint = _flags_class(value, variants)
            default = field(default_factory=hint)
        else:
            default = field(default_factory=lambda value=value: value)  # type: ignore[misc]
        doc = docs.get(f.name, "") + (f" One of: {', '.join(names)}." if names and f.name == "name" else "")
        members.append((f.name, Annotated[hint, tyro.conf.arg(help=doc)], default))
    return dataclasses.make_dataclass(type(config).__name__, members)


def _parse_flags(config: Any, args: list[str], prog: str | None) -> Any:
    """Parse ``args`` with tyro into the flags class of ``config``."""
    import tyro

    description = inspect.getdoc(type(config)) or ""
    messages = io.StringIO()
    try:
        with contextlib.redirect_stderr(messages):
            flags, unknown = tyro.cli(  # type: ignore[var-annotated]
                _flags_class(config), args=args, prog=prog, description=description, use_underscores=True, return_unknown_args=True
            )
    except SystemExit as stop:
        if stop.code:
            raise ConfigError(_one_line(messages.getvalue())) from None
        raise
    for arg in unknown:
        if not arg.startswith("--"):
            raise ConfigError(
                f"unexpected argument {arg!r}: a configuration file comes before all flags, and switches take no value (--key or --no_key)"
            )
        key = arg[2:].partition("=")[0].replace("-", "_")
        level, path = config, ""
        for part in key.split(".")[:-1]:
            if not is_dataclass(getattr(level, part, None)):
                break
            level, path = getattr(level, part), _join(path, part)
        raise _unknown_key("flag", key, level, path, config)
    return flags


def _one_line(box: str) -> str:
    """Reduce the framed message that tyro prints to its first paragraph."""
    lines = [line.strip(" │|") for line in box.splitlines()]
    lines = [line for line in lines if not line.startswith(("╭", "╰"))]
    end = next((i for i, line in enumerate(lines) if line.startswith("───")), len(lines))
    return " ".join(" ".join(lines[:end]).split()) or "the command line could not be parsed"


def _apply(config: Any, flags: Any, path: str) -> Any:
    """Copy parsed ``flags`` into ``config``."""
    changes = {}
    for f in fields(flags):
        current, value = getattr(config, f.name), getattr(flags, f.name)
        if is_dataclass(current):
            changes[f.name] = _apply(current, value, _join(path, f.name))
        elif not is_dataclass(value):  # a choice that is not made has no values
            changes[f.name] = value
    return _replace(config, changes, path)


# ---------------------------------------------------------------------------------------------------------------------
# YAML


def _plain(value: Any) -> Any:
    if is_dataclass(value):
        return to_dict(value)
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


class _Loader(yaml.SafeLoader):
    """YAML 1.2 scalars and no repeated keys."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} appears twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Writes what :class:`_Loader` reads, short lists on one line."""

    def represent_sequence(self, tag: str, sequence: Any, flow_style: bool | None = None) -> Any:
        return super().represent_sequence(tag, sequence, flow_style=True)

    def ignore_aliases(self, data: Any) -> bool:
        return True


# PyYAML follows YAML 1.1, where `1e-3` is a text and `off` is false; both surprise in a configuration of a training run.
_SCALARS = [
    ("tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")),
    ("tag:yaml.org,2002:null", re.compile(r"^(?:~|null|Null|NULL|)$"), ["~", "n", "N", ""]),
    ("tag:yaml.org,2002:int", re.compile(r"^[-+]?[0-9]+$"), list("-+0123456789")),
    (
        "tag:yaml.org,2002:float",
        re.compile(r"^(?:[-+]?(?:[0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"),
        list("-+0123456789."),
    ),
]
for _class in (_Loader, _Dumper):
    _class.yaml_implicit_resolvers = {}
    for _tag, _pattern, _first in _SCALARS:
        _class.add_implicit_resolver(_tag, _pattern, _first)
_Loader.add_constructor("tag:yaml.org,2002:int", lambda loader, node: int(loader.construct_scalar(node)))  # type: ignore[arg-type]
