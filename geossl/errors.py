"""The exceptions geossl raises, and the two helpers that word them.

Every message says what came, what was expected and what to do. Catch :class:`GeosslError` to catch them all; each class also
derives from the builtin a caller would expect (``ValueError``, ``RuntimeError``...).
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable
from types import ModuleType


class GeosslError(Exception):
    """Base class of all exceptions raised on purpose by geossl."""


class ConfigError(GeosslError, ValueError):
    """A configuration value, key or command-line flag is wrong; the message names its dotted key."""


class UnknownNameError(GeosslError, ValueError):
    """A name (model, method, data set, configuration key) is not known; the message lists the nearest valid ones."""


class DataError(GeosslError, ValueError):
    """Input data is missing, truncated or malformed; the message names the file."""


class CheckpointError(GeosslError, RuntimeError):
    """A checkpoint cannot be read safely, is damaged, or belongs to another model."""


class ExtensionError(GeosslError, RuntimeError):
    """A native library is missing, stale or was refused by the system."""


class MissingDependencyError(GeosslError, ImportError):
    """An optional package is needed; the message names the extra that installs it."""


def unknown_name(kind: str, name: str, choices: Iterable[str]) -> UnknownNameError:
    """Build the error for an unknown ``name``: nearest valid names first, then all of them.

    Example:
        >>> str(unknown_name("backbone", "point_vit_smal", ["point_vit_small", "point_vit_tiny"]))
        "unknown backbone 'point_vit_smal'; did you mean 'point_vit_small'? Known: point_vit_small, point_vit_tiny"
    """
    choices = sorted(choices)
    near = difflib.get_close_matches(name, choices, n=3, cutoff=0.6)
    hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else "."
    return UnknownNameError(f"unknown {kind} {name!r}{hint} Known: {', '.join(choices) or 'none'}")


def optional_import(module: str, extra: str) -> ModuleType:
    """Import an optional ``module`` or raise :class:`MissingDependencyError` naming the geossl ``extra`` that brings it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingDependencyError(
            f"this needs the package {module!r}, which could not be imported ({error}); install it with: pip install 'geossl[{extra}]'"
        ) from error
