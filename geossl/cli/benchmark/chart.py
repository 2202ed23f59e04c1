"""The picture of the ``ops`` suite: every row's CPU time, ours and the peers', on one logarithmic scale."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from geossl.cli.benchmark.row import Row

OURS, BEST, OTHER, FLOOR = "#0b6e4f", "#d1495b", "#b8b8b8", "#444444"
LEAST_FLOOR = 1e-6  # seconds; what is smaller says nothing and would only widen the picture


def draw(rows: Sequence[Row], path: Path) -> None:
    """Write a PNG: one panel per number of threads, one line per name with its kinds of cloud side by side."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from geossl.data.files import atomic_write

    counts = sorted({row.threads for row in rows})
    names = list(dict.fromkeys(row.group for row in rows))
    figure = Figure(figsize=(4.6 + 6.2 * len(counts), 1.6 + 0.34 * len(names)), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(counts), sharey=True, sharex=True, squeeze=False)[0]
    for panel, threads in zip(panels, counts, strict=True):
        _panel(panel, [row for row in rows if row.threads == threads], names)
        panel.set_title(f"{threads} thread{'s' * (threads > 1)}", loc="left", fontsize=11, fontweight="bold")
    panels[0].set_yticks(range(len(names)), names, fontsize=8.5)
    panels[0].set_ylim(len(names) - 0.4, -0.6)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False, fontsize=9)
    figure.suptitle(
        "CPU time of a call; the number is the quickest peer's time over ours, smallest and largest over the kinds of cloud", fontsize=10
    )
    atomic_write(path, lambda file: figure.savefig(file, format="png", dpi=110))


def _panel(panel: Any, rows: Sequence[Row], names: Sequence[str]) -> None:
    for line, name in enumerate(names):
        members = [row for row in rows if row.group == name]
        if line % 2 == 0:
            panel.axhspan(line - 0.5, line + 0.5, color="#f4f4f2", zorder=0)
        for place, row in enumerate(members):
            height = line + (place - (len(members) - 1) / 2) * 0.17
            _marks(panel, row, height, labelled=line == place == 0)
        ratios = [row.peer_ratio for row in members if row.peer_ratio is not None]
        if ratios:
            text = f"{min(ratios):.2g}" if len(ratios) == 1 else f"{min(ratios):.2g} - {max(ratios):.2g}"
            bar = members[0].bar
            color = "#222222" if bar is None or min(ratios) >= bar else BEST
            panel.text(1.01, line, f"{text}x", transform=panel.get_yaxis_transform(), va="center", fontsize=8, color=color)
    panel.set_xscale("log")
    panel.set_xlabel("CPU milliseconds")
    panel.grid(axis="x", color="#dddddd", linewidth=0.6)
    panel.tick_params(axis="y", length=0)
    for side in ("top", "right", "left"):
        panel.spines[side].set_visible(False)


def _marks(panel: Any, row: Row, height: float, labelled: bool) -> None:
    others = [1e3 * peer.cpu_s for peer in row.peers if peer.cpu_s is not None and not peer.differs]
    ours, best = 1e3 * row.cpu_s, None if row.peer_cpu_s is None else 1e3 * row.peer_cpu_s

    def label(text: str) -> str:
        return text if labelled else "_"

    if best is not None:
        panel.plot([ours, best], [height, height], color=OURS if best > ours else BEST, linewidth=1.6, alpha=0.55, zorder=2)
    panel.scatter(others, [height] * len(others), s=9, color=OTHER, label=label("other peers"), zorder=2, linewidths=0)
    if row.floor_s > LEAST_FLOOR:
        panel.scatter(
            [1e3 * row.floor_s], [height], s=18, color=FLOOR, marker="|", label=label("floor of the machine"), zorder=2, linewidths=1
        )
    if best is not None:
        panel.scatter([best], [height], s=14, color=BEST, label=label("quickest peer"), zorder=3, linewidths=0)
    panel.scatter([ours], [height], s=20, color=OURS, label=label("geossl"), zorder=4, linewidths=0)
