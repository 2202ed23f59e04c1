"""Turn an official checkpoint into safetensors and config.json: ``python tools/convert_checkpoint.py IN OUT``.

The same as ``geossl convert``.
"""

from __future__ import annotations

import sys

from geossl.cli import run

if __name__ == "__main__":
    sys.exit(run("convert", sys.argv[1:]))
