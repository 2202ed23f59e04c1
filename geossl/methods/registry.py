"""The registry of self-supervised methods."""

from __future__ import annotations

from typing import Any

from geossl.registry import Registry

METHODS: Registry[Any] = Registry("method")
"""Registered methods; each entry returns a configuration dataclass with ``name`` and ``build(backbone)``."""
