"""geossl: 3D and geometric self-supervised representation learning.

The everyday calls live here; everything else is found in the sub-package named for it (``geossl.ops``, ``geossl.models``,
``geossl.methods``, ``geossl.data``, ``geossl.evaluation``...). Both are imported on first use, so ``import geossl`` is quick.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_LAZY = {
    "create_backbone": "geossl.models",
    "list_backbones": "geossl.models",
    "load": "geossl.models",
    "load_reference": "geossl.methods",
    "extract_features": "geossl.evaluation",
    "fit_gaussians": "geossl.tasks",
    "native_info": "geossl.ops",
}

_PACKAGES = ("adapters", "data", "engine", "evaluation", "geometry", "layers", "methods", "models", "ops", "tasks", "vis")

__all__ = ["__version__", *sorted(_LAZY)]


def __getattr__(name: str) -> Any:
    if name in _PACKAGES:
        return importlib.import_module(f"geossl.{name}")
    if name not in _LAZY:
        offers = ", ".join((*__all__, *_PACKAGES))
        raise AttributeError(f"module 'geossl' has no attribute {name!r}; it offers {offers}")
    return getattr(importlib.import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return [*__all__, *_PACKAGES]
