"""Train a head and a pretrained backbone on labels: ``python tools/finetune.py CONFIG.yaml [--dotted.key value]``.

The same as ``geossl finetune``.
"""

from __future__ import annotations

import sys

from geossl.cli import run

if __name__ == "__main__":
    sys.exit(run("finetune", sys.argv[1:]))
