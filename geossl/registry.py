"""Named, documented variants: backbones, methods, tasks and data sets are all looked up through one class."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable
from typing import Generic, TypeVar

from geossl.errors import unknown_name

ConfigT = TypeVar("ConfigT")


class Registry(Generic[ConfigT]):
    """Maps a name to a function without arguments that returns that variant's default configuration (a dataclass).

    The dataclass has a field ``name`` (the registered name) and a method ``build(...)`` that makes the object.

    Args:
        kind: What the names stand for, in one word; used in error messages.

    Example:
        >>> backbones = Registry("backbone")
        >>> @backbones.register
        ... def point_vit_small() -> PointViTConfig:
        ...     return PointViTConfig(name="point_vit_small", dim=384)
        >>> backbones.config("point_vit_small").build()
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._entries: dict[str, Callable[[], ConfigT]] = {}

    def register(self, entry: Callable[[], ConfigT]) -> Callable[[], ConfigT]:
        """Decorator: register ``entry`` under its function name."""
        name = entry.__name__
        if name in self._entries:
            raise ValueError(f"{self.kind} {name!r} is registered twice; names must be unique")
        self._entries[name] = entry
        return entry

    def config(self, name: str) -> ConfigT:
        """Return a fresh default configuration of variant ``name``.

        Raises:
            UnknownNameError: the name is not registered; the message suggests the nearest ones.
        """
        if name not in self._entries:
            raise unknown_name(self.kind, name, self._entries)
        return self._entries[name]()

    def names(self, pattern: str = "*") -> list[str]:
        """Return the registered names matching a shell-style ``pattern``, sorted."""
        return sorted(fnmatch.filter(self._entries, pattern))
