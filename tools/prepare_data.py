"""Convert a folder of meshes or clouds to memory-mapped shards, or build furnished rooms; resumes when interrupted.

The same as ``geossl prepare-data``.
"""

from __future__ import annotations

import sys

from geossl.cli import run

if __name__ == "__main__":
    sys.exit(run("prepare-data", sys.argv[1:]))
