"""What ``import geossl`` adds to ``import torch``, each time in a fresh process."""

from __future__ import annotations

import functools
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import geossl
from geossl.cli.benchmark.measure import Case, Sample

TARGET = 1.0
"""CPU seconds on top of torch."""

_PARTS = ("ops", "models", "methods", "tasks", "data", "engine", "evaluation")

STATEMENTS = {
    "import geossl": "import geossl",
    "import geossl, all parts": "import " + ", ".join(f"geossl.{part}" for part in _PARTS),
}

# Prints CPU and wall seconds and peak MiB of the two imports, and the bytes of the modules the second one read.
_CODE = """
import json, sys, time
sys.path[:0] = {path!r}

def now():
    try:
        lines = open("/proc/self/status").read().splitlines()
        memory = [int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM")][0]
    except OSError:
        memory = None
    return time.process_time(), time.perf_counter(), memory

marks = [now()]
import torch
marks.append(now())
known = set(sys.modules)
{statement}
marks.append(now())
import os
specs = [getattr(sys.modules[name], "__spec__", None) for name in set(sys.modules) - known]
files = [(spec.cached, spec.origin) for spec in specs if spec is not None]
sizes = [next((os.path.getsize(file) for file in pair if file and os.path.exists(file)), 0) for pair in files]
print(json.dumps([marks, sum(sizes)]))
"""


def cases(quick: bool) -> dict[str, Callable[[], Case]]:
    """Return the cases of this suite by name."""
    statements = dict(list(STATEMENTS.items())[:1]) if quick else STATEMENTS
    return {name: functools.partial(_case, statement) for name, statement in statements.items()}


def _case(statement: str) -> Case:
    torch_samples: list[Sample] = []
    warm_up = [_import(statement)]  # writes the byte code, as the first import of an installation does; not timed
    moved = warm_up[0][2]

    def run() -> Sample:
        first, second, _ = warm_up.pop() if warm_up else _import(statement)
        torch_samples.append(first)
        return second

    return Case(
        inputs="fresh process, after import torch",
        run=run,
        moved=moved,
        moved_is="byte code of the modules it brings, read (source where there is none)",
        flop=0,
        flop_is="none",
        peers={"import torch": lambda: torch_samples[-1]},  # measured in the same processes
        target=TARGET,
        clock=lambda run, calls: run(),
        warm=False,
    )


def _import(statement: str) -> tuple[Sample, Sample, int]:
    """Import torch, then ``statement``, in a fresh process; return a sample of each and the bytes of byte code."""
    path = [str(Path(folder).parent) for folder in geossl.__path__]
    # An installed package has its byte code; without this a setting of the caller's would have every run compile it again.
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
    command = [sys.executable, "-c", _CODE.format(path=path, statement=statement)]
    ran = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    marks, moved = json.loads(ran.stdout)
    samples: list[Any] = []
    for before, after in itertools.pairwise(marks):
        rise = None if after[2] is None else after[2] - before[2]
        samples.append(Sample(after[0] - before[0], after[1] - before[1], after[2], rise))
    return samples[0], samples[1], moved
