"""Measure operators, training steps or data loading: ``python tools/benchmark.py ops|steps|data --json FILE``.

The same as ``geossl benchmark``.
"""

from __future__ import annotations

import sys

from geossl.cli import run

if __name__ == "__main__":
    sys.exit(run("benchmark", sys.argv[1:]))
