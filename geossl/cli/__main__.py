"""``python -m geossl.cli <command>``: the ``geossl`` console command where its script is not on the PATH."""

from __future__ import annotations

import sys

from geossl.cli import main

sys.exit(main())
