"""The registry of downstream tasks."""

from __future__ import annotations

from typing import Any

from geossl.registry import Registry

TASKS: Registry[Any] = Registry("task")
"""Registered tasks; each entry returns a configuration dataclass with ``name`` and ``build(backbone)``."""
