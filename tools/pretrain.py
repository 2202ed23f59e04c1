"""Pretrain a backbone: ``python tools/pretrain.py [CONFIG.yaml] [--dotted.key value]``, under torchrun too.

The same as ``geossl pretrain``.
"""

from __future__ import annotations

import sys

from geossl.cli import run

if __name__ == "__main__":
    sys.exit(run("pretrain", sys.argv[1:]))
