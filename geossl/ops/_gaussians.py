"""The registered operators behind :func:`geossl.ops.rasterize_gaussians`: projection, tile lists and compositing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple


class Pipeline(NamedTuple):
    """The three steps of a rasterizer, see :mod:`geossl.ops.reference.gaussians`."""

    project: Callable[..., Any]
    bin_tiles: Callable[..., Any]
    composite: Callable[..., Any]


PIPELINE: Pipeline
