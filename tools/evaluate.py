"""Probe a pretrained backbone (kNN, linear, SVM) beside honest baselines.

The same as ``geossl evaluate``.
"""

from __future__ import annotations

import sys

from geossl.cli import run

if __name__ == "__main__":
    sys.exit(run("evaluate", sys.argv[1:]))
