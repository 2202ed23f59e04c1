"""Fit a scene of Gaussian splats to posed images.

The same as ``geossl fit-gaussians``.
"""

from __future__ import annotations

import sys

from geossl.cli import run

if __name__ == "__main__":
    sys.exit(run("fit-gaussians", sys.argv[1:]))
