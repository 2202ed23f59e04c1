"""Say what is installed, built and found on this machine, and what to do about each thing missing.

The same as ``geossl doctor``.
"""

from __future__ import annotations

import sys

from geossl.cli import run

if __name__ == "__main__":
    sys.exit(run("doctor", sys.argv[1:]))
