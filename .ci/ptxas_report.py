"""Print registers, shared memory and spills of every kernel from a build log made with ``GEOSSL_PTXAS_REPORT=ON``; fail on spills.

Usage: python .ci/ptxas_report.py BUILD_LOG
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

ENTRY = re.compile(r"Compiling entry function '(\w+)' for '(sm_\w+)'")
SPILL = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
USED = re.compile(r"Used (\d+) registers(?:.*?(\d+) bytes smem)?")


def kernels(log: str) -> list[dict[str, object]]:
    """Return one row per kernel and architecture, in the order of the log."""
    rows: list[dict[str, object]] = []
    for line in log.splitlines():
        if match := ENTRY.search(line):
            rows.append({"name": match[1], "arch": match[2], "spill": 0, "registers": 0, "shared": 0})
        elif rows and (match := SPILL.search(line)):
            rows[-1]["spill"] = max(int(match[2]), int(match[3]))
        elif rows and (match := USED.search(line)):
            rows[-1].update(registers=int(match[1]), shared=int(match[2] or 0))
    return rows


def readable(names: list[str]) -> list[str]:
    """Demangle C++ names where the machine has a tool for it."""
    tool = shutil.which("cu++filt") or shutil.which("c++filt")
    if tool is None or not names:
        return names
    shown = subprocess.run([tool, *names], capture_output=True, text=True, check=True).stdout.splitlines()
    return [re.sub(r"\(anonymous namespace\)::|^void ", "", name).split("(")[0] for name in shown]


def main(path: str) -> int:
    """Print the table and return 1 when a kernel spills or the log has none."""
    rows = kernels(Path(path).read_text(encoding="utf-8", errors="replace"))
    if not rows:
        print(f"{path} has no report of a kernel; was it built with GEOSSL_PTXAS_REPORT=ON?")
        return 1
    by_kernel: dict[str, list[dict[str, object]]] = defaultdict(list)
    for row in rows:
        by_kernel[str(row["name"])].append(row)
    print(f"{'registers':<40} {'shared':>7} {'spills':>7}  kernel")
    for shown, group in zip(readable(list(by_kernel)), by_kernel.values(), strict=True):
        registers = " ".join(f"{row['arch']}:{row['registers']}" for row in group)
        print(
            f"{registers:<40} {max(int(str(row['shared'])) for row in group):>7} {max(int(str(row['spill'])) for row in group):>7}  {shown}"
        )
    spilling = sorted({f"{row['name']} ({row['arch']}, {row['spill']} bytes)" for row in rows if row["spill"]})
    if spilling:
        print("these kernels spill registers to local memory: " + ", ".join(spilling))
    return 1 if spilling else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
