"""``geossl benchmark``: CPU time and memory beside the machine's own floor and beside peers.

    benchmark.py steps  --json FILE [--method polar_mae]    training steps, optimiser, feature extraction
    benchmark.py ops    --json FILE [--rows 'knn/*']        operators beside every peer, on four kinds of cloud, with 1 and 2 threads
    benchmark.py splat  --json FILE                         the Gaussian rasterizer, with 1 and 2 threads
    benchmark.py data   --json FILE                         a batch, as a share of the step it feeds
    benchmark.py import --json FILE                         what importing geossl adds to importing torch

Writes a JSON list of rows and prints a table; docs/benchmarks.md says what a row means. Peers are measured where they can be imported.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fnmatch
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from geossl.config import load_config, require, split_arguments
from geossl.errors import ConfigError, unknown_name

SUITES = ("steps", "ops", "splat", "data", "import")
ON_TWO = ("ops", "splat")  # suites measured with 1 and with 2 threads

# Pools of threads of torch and of the libraries peers use; read when each of them is loaded.
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "TBB_NUM_THREADS", "NUMEXPR_NUM_THREADS")


@dataclass(kw_only=True)
class BenchmarkConfig:
    """Measure CPU time and memory of training steps, operators, data loading or the import, beside floor and peers."""

    json: Path | None = None
    """File to write the rows to; none: only the table."""
    threads: str = ""
    """Threads torch, the operators and the peers may use; of several, each has its own process. Default: 1,2 for ops and splat, else 1."""
    chart: Path | None = None
    """Picture of the rows of ops beside their peers; default: beside the JSON file."""
    method: str = "point_mae"
    """Self-supervised method whose step is measured (steps, data)."""
    rows: str = "*"
    """Only rows whose name matches this shell-style pattern."""
    repeats: int = 7
    """Samples of each row; calls of more than two seconds are sampled three times at most."""
    quick: bool = False
    """Tiny inputs and two samples: shows that everything runs; the numbers mean nothing."""

    def __post_init__(self) -> None:
        counts = [part.strip() for part in self.threads.split(",")] if self.threads else []
        valid = all(part.isdecimal() and int(part) >= 1 for part in counts) and len(set(counts)) == len(counts)
        require(valid, "threads", "must be numbers of at least 1 without repeats, such as 1 or 1,2", self.threads)
        require(self.repeats >= 1, "repeats", "must be at least 1", self.repeats)


def main(argv: list[str] | None = None) -> int:
    """Run the program; returns its exit code, which does not depend on any time measured."""
    argv = sys.argv[1:] if argv is None else argv
    suite, args = split_arguments(argv)
    if suite is None:
        print((__doc__ or "").replace("``", ""))
        load_config(BenchmarkConfig, None, args, prog="benchmark steps|ops|splat|data|import")  # the flags, for --help
        raise ConfigError(f"benchmark: say first what to measure: {', '.join(SUITES)}")
    if suite not in SUITES:
        raise unknown_name("benchmark", suite, SUITES)
    config = load_config(BenchmarkConfig, None, args, prog=f"benchmark {suite}")
    counts = [int(part) for part in (config.threads or ("1,2" if suite in ON_TWO else "1")).split(",")]
    rows = _measure_here(suite, config, counts[0]) if len(counts) == 1 else _measure_elsewhere(suite, config, counts)
    _show(rows)
    if config.json is not None:
        from geossl.data.files import atomic_write

        text = json.dumps([row.as_json() for row in rows], indent=1, allow_nan=False) + "\n"
        atomic_write(config.json, lambda file: file.write(text.encode()))
        print(f"written to {config.json}")
    _draw(suite, config, rows)
    return 0


def _measure_here(suite: str, config: BenchmarkConfig, threads: int) -> list[Any]:
    for variable in _THREAD_VARIABLES:
        os.environ[variable] = str(threads)
    import torch

    torch.set_num_threads(threads)
    with _pinned(threads):
        return run_suite(suite, config)


def _measure_elsewhere(suite: str, config: BenchmarkConfig, counts: list[int]) -> list[Any]:
    """Measure with every number of threads in a process of its own: the pools of most libraries are made once, for good."""
    from geossl.cli.benchmark.row import Row

    rows = []
    with tempfile.TemporaryDirectory(prefix="geossl_benchmark_") as folder:
        for threads in counts:
            print(f"with {threads} thread{'s' * (threads > 1)}:", file=sys.stderr, flush=True)
            path = Path(folder) / f"{threads}.json"
            flags = {"threads": threads, "json": path, "method": config.method, "rows": config.rows, "repeats": config.repeats}
            command = [sys.executable, "-m", "geossl.cli", "benchmark", suite, *(f"--{key}={value}" for key, value in flags.items())]
            environment = os.environ | dict.fromkeys(_THREAD_VARIABLES, str(threads))
            with _pinned(threads):  # a process begins on the processors of the one that starts it
                ran = subprocess.run([*command, *["--quick"] * config.quick], env=environment, stdout=subprocess.DEVNULL, check=False)
            if ran.returncode:
                raise ConfigError(f"benchmark: the process with {threads} threads ended with code {ran.returncode}; its message is above")
            rows += [Row.from_json(values) for values in json.loads(path.read_text())]
    return rows


@contextlib.contextmanager
def _pinned(threads: int) -> Iterator[None]:
    """Keep this thread, and what it starts, on as many processors as there are threads, where the system can and has that many."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(before)[-threads:])
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def run_suite(suite: str, config: BenchmarkConfig) -> list[Any]:
    """Measure all rows of a suite that ``config.rows`` matches; returns :class:`geossl.cli.benchmark.row.Row` objects."""
    from geossl.cli.benchmark.bars import BARS
    from geossl.cli.benchmark.measure import measure

    with tempfile.TemporaryDirectory(prefix="geossl_benchmark_") as folder:
        found = _cases(suite, config, Path(folder))
        wanted = fnmatch.filter(found, config.rows)
        if not wanted:
            raise ConfigError(f"rows: no row of the {suite} benchmark matches {config.rows!r}; there are: {', '.join(found)}")
        rows: list[Any] = []
        lost: dict[str, set[str]] = {}  # peers not to be asked again on further kinds of cloud, by name without the kind
        for name in wanted:
            print(f"measuring {name}", file=sys.stderr, flush=True)
            case = found[name]()
            group = name.removesuffix(f"/{case.cloud}")
            peers = {title: run for title, run in case.peers.items() if title not in lost.get(group, ())}
            row = measure(
                suite,
                name,
                dataclasses.replace(case, peers=peers, warm=case.warm and not config.quick),
                *((2, 0.001) if config.quick else (config.repeats,)),
            )
            lost.setdefault(group, set()).update(peer.name for peer in row.peers if case.cloud and peer.repeats == 1)
            if bar := BARS.get(group):
                row.bar, row.aim = bar.mean, bar.aim
            rows.append(row)
    return rows


def _cases(suite: str, config: BenchmarkConfig, folder: Path) -> dict[str, Callable[[], Any]]:
    if suite == "steps":
        from geossl.cli.benchmark import steps

        return steps.cases(config.method, config.quick)
    if suite == "ops":
        from geossl.cli.benchmark import ops
        from geossl.cli.benchmark.measure import keep_memory

        if not config.quick:
            keep_memory()
        return ops.cases(config.quick)
    if suite == "splat":
        from geossl.cli.benchmark import splat
        from geossl.cli.benchmark.measure import keep_memory

        if not config.quick:
            keep_memory()
        return splat.cases(config.quick)
    if suite == "data":
        from geossl.cli.benchmark import data

        return data.cases(config.method, config.quick, folder)
    from geossl.cli.benchmark import imports

    return imports.cases(config.quick)


def _draw(suite: str, config: BenchmarkConfig, rows: list[Any]) -> None:
    chart = config.chart or (config.json.with_suffix(".png") if config.json is not None and suite == "ops" else None)
    if chart is not None:
        from geossl.cli.benchmark.chart import draw

        draw(rows, chart)
        print(f"drawn to {chart}")


def _show(rows: list[Any]) -> None:
    from rich.console import Console

    from geossl.cli.benchmark.bars import BUSY, groups_of, speed_ups, table_of_bars, table_of_growth
    from geossl.cli.benchmark.row import table_of

    console = Console() if sys.stdout.isatty() else Console(width=160)
    console.print(table_of(rows))
    if groups := groups_of(rows):
        console.print(table_of_bars(groups))
        if growth := table_of_growth(groups):
            console.print(growth)
        busiest = max(row.load_average for row in rows)
        if speed_ups(groups) and busiest > BUSY * (os.cpu_count() or 1):
            console.print(f"the machine was busy (load average up to {busiest}): wall times and speed-ups say little", markup=False)
    for row in rows:
        for peer in row.peers:
            if peer.differs:
                console.print(f"{row.name}: {peer.name}: {peer.differs}", markup=False)
    console.print(f"load average {rows[-1].load_average}; {rows[-1].machine}", markup=False, highlight=False)
