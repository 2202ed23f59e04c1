"""The row of the benchmark's JSON, and the table drawn of them."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(kw_only=True)
class Peer:
    """Another way to the same answer."""

    name: str
    differs: str = ""
    """How its answer differs from ours, in words; "" when they agree. A peer that differs is shown but never the row's ``peer``."""
    cpu_s: float | None = None
    """Median CPU seconds of a call; None when it failed."""
    wall_s: float | None = None
    """Median wall seconds."""
    peak_mib: float | None = None
    """Highest resident memory of the process during one call."""
    ratio: float | None = None
    """Its CPU time over ours: above 1, ours is quicker."""
    repeats: int = 0
    """Samples the medians are of; 1 for one that is so much slower that more would say nothing."""


@dataclass(kw_only=True)
class Row:
    """One measured thing. Times are seconds per call; ``None`` stands where there is nothing to say."""

    suite: str
    """Which benchmark: steps, ops, splat, data or import."""
    name: str
    """What was measured, unique within the suite."""
    inputs: str
    """What it was given."""
    threads: int
    """Threads torch and the operators may use."""
    dtype: str
    """Type of the matrix products."""
    cpu_s: float
    """Median process CPU time of a call, over all threads."""
    wall_s: float
    """Median wall time of a call; on a shared machine it also measures the neighbours."""
    repeats: int
    """Samples the medians are of."""
    calls_per_repeat: int
    """Calls in each sample: quick ones are repeated."""
    peak_mib: float | None
    """Highest resident memory of the whole process during one call; None where the system does not tell."""
    rise_mib: float | None
    """How far that lies over what was resident just before: what stays between calls (weights, gradients) does not count."""
    flop: int
    """Floating point operations of a call."""
    flop_is: str
    """What ``flop`` counts."""
    gemm_flops: float
    """Floating point operations per CPU second of the best matrix product timed in this process."""
    bytes: int
    """Bytes that must at least be read and written."""
    bytes_is: str
    """What ``bytes`` counts."""
    copy_bytes_per_s: float
    """Bytes per CPU second of a copy of about that size."""
    floor_s: float
    """The larger of ``flop / gemm_flops`` and ``bytes / copy_bytes_per_s``."""
    floor_ratio: float
    """``cpu_s / floor_s``: 1 is as quick as this machine multiplies or copies."""
    peer: str | None
    """The quickest peer that gives the same answer."""
    peer_cpu_s: float | None
    """Its median CPU time."""
    peer_ratio: float | None
    """``peer_cpu_s / cpu_s``: above 1, ours is quicker."""
    peers: list[Peer] = field(default_factory=list)
    """All peers that could be imported."""
    target_s: float | None = None
    """CPU seconds to stay below."""
    step_cpu_s: float | None = None
    """CPU time of the training step this is a part of."""
    share_of_step: float | None = None
    """``cpu_s / step_cpu_s``."""
    load_average: float
    """Of the last minute, at the end of the row: how busy the machine was."""
    machine: str
    """Processor, versions, and what ran the operators."""
    cloud: str = ""
    """Kind of cloud, which the name ends in; "" where there is only one."""
    bar: float | None = None
    """What the geometric mean of ``peer_ratio`` over the kinds of cloud should reach."""
    aim: float | None = None
    """What it is hoped to reach."""

    @property
    def group(self) -> str:
        """The name without the kind of cloud."""
        return self.name.removesuffix(f"/{self.cloud}")

    @classmethod
    def of(cls, *, cpu_s: float, flop: int, gemm_flops: float, copy_bytes_per_s: float, peers: list[Peer], **known: Any) -> Row:
        """Make a row of what was measured, working out the floor, the best peer and the ratios."""
        floor = max(flop / gemm_flops, known["bytes"] / copy_bytes_per_s)
        agreeing = [peer for peer in peers if peer.cpu_s is not None and not peer.differs]
        best = min(agreeing, key=lambda peer: peer.cpu_s or 0.0, default=None)
        step = known.get("step_cpu_s")
        return cls(
            cpu_s=cpu_s,
            flop=flop,
            gemm_flops=gemm_flops,
            copy_bytes_per_s=copy_bytes_per_s,
            floor_s=floor,
            floor_ratio=cpu_s / floor,
            peer=best.name if best else None,
            peer_cpu_s=best.cpu_s if best else None,
            peer_ratio=best.ratio if best else None,
            peers=peers,
            share_of_step=cpu_s / step if step else None,
            **known,
        )

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Row:
        """Make a row of what :meth:`as_json` gave."""
        return cls(**{**values, "peers": [Peer(**peer) for peer in values["peers"]]})

    def as_json(self) -> dict[str, Any]:
        """Return the row as plain values."""
        return asdict(self)


def seconds(value: float | None) -> str:
    """Write a time with three figures and its unit."""
    if value is None:
        return ""
    for limit, factor, unit in ((1e-3, 1e6, "us"), (1.0, 1e3, "ms")):
        if value < limit:
            return f"{value * factor:.3g} {unit}"
    return f"{value:.3g} s"


def table_of(rows: list[Row]) -> Any:
    """Return a table for the terminal."""
    from rich.table import Table

    table = Table(caption="CPU time of the process, medians; x floor: times the floor; x peer: the peer's CPU time over ours")
    for title in ("name", "inputs"):
        table.add_column(title, overflow="fold")
    for title in ("CPU", "wall", "peak MiB", "floor", "x floor"):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("quickest peer", overflow="fold")
    for title in ("x peer", "target"):
        table.add_column(title, justify="right", no_wrap=True)
    for row in rows:
        target = ""
        if row.target_s is not None:
            met = row.cpu_s <= row.target_s
            share = f"{100 * row.share_of_step:.2g} % of the step, " if row.share_of_step is not None else ""
            target = f"[{'green' if met else 'red'}]{share}{'met' if met else 'missed'}: {seconds(row.target_s)}[/]"
        table.add_row(
            row.name,
            row.inputs,
            seconds(row.cpu_s),
            seconds(row.wall_s),
            "" if row.peak_mib is None else f"{row.peak_mib:.0f}",
            seconds(row.floor_s),
            f"{row.floor_ratio:.3g}",
            row.peer or "",
            "" if row.peer_ratio is None else f"{row.peer_ratio:.3g}",
            target,
        )
    return table
