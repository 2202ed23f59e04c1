"""What the operators are asked to reach, and how far they do: the ratio to the quickest peer over all kinds of cloud, and growth with size.

A bar never decides the exit code: on a busy machine it would decide at random.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from geossl.cli.benchmark.row import Row, seconds

BUSY = 1.2  # load average per core above which wall times are doubtful; the benchmark itself adds up to one


class Bar(NamedTuple):
    """CPU time of the quickest peer over ours."""

    mean: float
    """At least this as the geometric mean over the kinds of cloud."""
    aim: float
    """What is hoped for."""
    least: float = 1.0
    """At least this on every kind of cloud."""


BARS = {
    "farthest_point_sample/2048->512": Bar(3, 4),
    "farthest_point_sample/8x2048->512": Bar(3, 4),
    "farthest_point_sample/10000->1024": Bar(1.5, 2.5),
    "farthest_point_sample/100000->4096": Bar(1.3, 2, least=1.15),
    "knn/512 of 2048, k=16": Bar(1.2, 2),
    "knn/512 of 2048, k=32": Bar(1.4, 2),
    "knn/4096 of 100000, k=16": Bar(1.3, 2),
    "knn/4096 of 100000, k=32": Bar(1.5, 2),
    "knn/100000 of 100000, k=16": Bar(1.5, 2),
    "ball_query/512 of 2048, k=32": Bar(2, 4),
    "ball_query/4096 of 100000, k=32": Bar(1.5, 3),
    "ball_query/100000 of 100000, k=32": Bar(1.5, 2.5),
    "voxelize + mean/100000 at 0.02, 32 channels": Bar(1.8, 3),
    "voxelize + mean/1000000 at 0.02, 32 channels": Bar(1.8, 3),
    "voxelize + mean/1000000 at 0.05, 32 channels": Bar(1.8, 3),
    "chamfer_distance_patches/128x32 to 32, backward": Bar(5, 10),
    "chamfer_distance/8x2048 to 2048, backward": Bar(1.7, 3),
    "rasterize_gaussians/5000 at 128x128": Bar(20, 40),
    "rasterize_gaussians/5000 at 128x128, backward": Bar(20, 32),
    "rasterize_gaussians/20000 at 128x128": Bar(20, 37),
    "rasterize_gaussians/20000 at 128x128, backward": Bar(15, 25),
    "rasterize_gaussians/100000 at 512x512": Bar(1, 1),  # no peer is asked
    "rasterize_gaussians/100000 at 512x512, backward": Bar(1, 1),
}
"""By the name of a row without its kind of cloud."""

GROWTH = (
    ("farthest_point_sample/10000->1024", 10_000, "farthest_point_sample/100000->4096", 100_000),
    ("knn/512 of 2048, k=16", 2048, "knn/4096 of 100000, k=16", 100_000),
    ("knn/4096 of 100000, k=16", 4096, "knn/100000 of 100000, k=16", 100_000),
    ("ball_query/512 of 2048, k=32", 2048, "ball_query/4096 of 100000, k=32", 100_000),
    ("ball_query/4096 of 100000, k=32", 4096, "ball_query/100000 of 100000, k=32", 100_000),
    ("voxelize + mean/100000 at 0.02, 32 channels", 100_000, "voxelize + mean/1000000 at 0.02, 32 channels", 1_000_000),
    *(
        (f"rasterize_gaussians/{small}{backward}", entries, f"rasterize_gaussians/{large}{backward}", more)
        for small, entries, large, more in (
            ("5000 at 128x128", 8_804, "20000 at 128x128", 35_294),
            ("20000 at 128x128", 35_294, "100000 at 512x512", 473_363),
        )
        for backward in ("", ", backward")
    ),
)
"""Pairs of rows, small and large, each with its size: points, queries where the points stay the same, or Gaussians in tiles."""


@dataclass(frozen=True)
class Group:
    """The rows of one name at one number of threads, over all kinds of cloud."""

    name: str
    threads: int
    rows: tuple[Row, ...]

    @property
    def ratios(self) -> list[float]:
        """The quickest peer's CPU time over ours, by kind; rows without a peer are left out."""
        return [row.peer_ratio for row in self.rows if row.peer_ratio is not None]

    @property
    def mean(self) -> float | None:
        """Geometric mean of :attr:`ratios`."""
        return math.exp(sum(map(math.log, self.ratios)) / len(self.ratios)) if self.ratios else None

    @property
    def least(self) -> float | None:
        """The smallest of :attr:`ratios`."""
        return min(self.ratios, default=None)

    def reaches(self, mean: float, least: float = 1.0) -> bool | None:
        """Whether the mean and every single ratio are large enough; None where there is no peer to tell."""
        return None if self.mean is None or self.least is None else self.mean >= mean and self.least >= least


def groups_of(rows: Sequence[Row]) -> list[Group]:
    """Gather the rows that have a bar, in their order."""
    found: dict[tuple[str, int], list[Row]] = {}
    for row in rows:
        if row.group in BARS:
            found.setdefault((row.group, row.threads), []).append(row)
    return [Group(name, threads, tuple(members)) for (name, threads), members in found.items()]


def exponent(small: float, large: float, size: float, larger: float) -> float:
    """Return the power of the size that a time grows with: 1 is proportional, 2 is quadratic."""
    return math.log(large / small) / math.log(larger / size)


def growth_of(groups: Sequence[Group]) -> list[dict[str, Any]]:
    """Return the exponents of ours and of the quickest peers, by pair of :data:`GROWTH`, number of threads and kind of cloud."""
    rows = {(group.name, group.threads, row.cloud): row for group in groups for row in group.rows}
    found = []
    for small, size, large, larger in GROWTH:
        for (name, threads, cloud), row in rows.items():
            other = rows.get((large, threads, cloud))
            if name != small or other is None:
                continue
            theirs = row.peer_cpu_s and other.peer_cpu_s and exponent(row.peer_cpu_s, other.peer_cpu_s, size, larger)
            ours = exponent(row.cpu_s, other.cpu_s, size, larger)
            found.append({"small": small, "large": large, "threads": threads, "cloud": cloud, "ours": ours, "peer": theirs})
    return found


def speed_ups(groups: Sequence[Group], time: str = "wall_s") -> dict[str, dict[int, float]]:
    """Return a time with one thread over that with more, summed over the kinds of cloud: name -> threads -> times."""
    total = {(group.name, group.threads): sum(getattr(row, time) or 0.0 for row in group.rows) for group in groups}
    kinds = {(group.name, group.threads): {row.cloud for row in group.rows} for group in groups}
    found: dict[str, dict[int, float]] = {}
    for (name, threads), value in total.items():
        if threads > 1 and value > 0 and kinds.get((name, 1)) == kinds[name, threads]:
            found.setdefault(name, {})[threads] = total[name, 1] / value
    return found


def table_of_bars(groups: Sequence[Group]) -> Any:
    """Return the table of all bars, over all kinds of cloud, for the terminal."""
    from rich.table import Table

    table = Table(
        caption="x peer: CPU time of the quickest peer over ours; speed-up: wall time with one thread over that with more; of caller: "
        "the same for the CPU time of the calling thread, which other work on the machine does not touch"
    )
    table.add_column("name", overflow="fold")
    for title in ("threads", "CPU", "x peer: mean", "least", "bar", "aim", "speed-up", "of caller"):
        table.add_column(title, justify="right", no_wrap=True)
    quicker, alone = speed_ups(groups), speed_ups(groups, "caller_s")
    for group in groups:
        bar = BARS[group.name]
        times = [row.cpu_s for row in group.rows]
        table.add_row(
            group.name,
            str(group.threads),
            f"{seconds(min(times))} - {seconds(max(times))}",
            _times(group.mean),
            _times(group.least),
            _verdict(group.reaches(bar.mean, bar.least), f"{bar.mean:g}" + (f" ({bar.least:g} each)" if bar.least != 1 else "")),
            _verdict(group.reaches(bar.aim, bar.least), f"{bar.aim:g}"),
            _times(quicker.get(group.name, {}).get(group.threads)),
            _times(alone.get(group.name, {}).get(group.threads)),
        )
    return table


def table_of_growth(groups: Sequence[Group]) -> Any:
    """Return the table of the exponents for the terminal, each the range over the kinds of cloud; None when there are none."""
    from rich.table import Table

    table = Table(caption="growth: power of the size that CPU time grows with, range over all kinds of cloud")
    table.add_column("from")
    table.add_column("to")
    for title in ("threads", "ours", "quickest peer"):
        table.add_column(title, justify="right", no_wrap=True)
    ranges: dict[tuple[str, str, int], dict[str, list[float]]] = {}
    for found in growth_of(groups):
        both = ranges.setdefault((found["small"], found["large"], found["threads"]), {"ours": [], "peer": []})
        for who, values in both.items():
            if found[who] is not None:
                values.append(found[who])
    for (small, large, threads), both in ranges.items():
        table.add_row(small, large, str(threads), *(f"{min(v):.2f} - {max(v):.2f}" if v else "" for v in both.values()))
    return table if ranges else None


def _times(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


def _verdict(met: bool | None, text: str) -> str:
    return text if met is None else f"[{'green' if met else 'red'}]{'met' if met else 'missed'}: {text}[/]"
