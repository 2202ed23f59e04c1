"""Write features of files, folders or a data set: ``python tools/extract_features.py BACKBONE INPUT OUTPUT``.

The same as ``geossl extract``.
"""

from __future__ import annotations

import sys

from geossl.cli import run

if __name__ == "__main__":
    sys.exit(run("extract", sys.argv[1:]))
