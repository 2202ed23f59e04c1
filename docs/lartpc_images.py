"""Draw the picture of ``docs/lartpc.md`` into ``docs/images``: ``GEOSSL_REAL_DATA=... python docs/lartpc_images.py``.

The folder holds ``lartpc/pilarnet_m_test_event7675.h5``: event 7675 of PILArNet-M's test part (Apache-2.0), which ours are compared with.
"""

from __future__ import annotations

import io
import os
from pathlib import Path

import matplotlib as mpl
import numpy as np

from geossl.data import Event, PILArNetFile, simulate_event
from geossl.data.events import CLASSES
from geossl.data.simulate import lartpc

mpl.use("Agg")
from matplotlib import pyplot as plt
from PIL import Image

OUT = Path(__file__).parent / "images" / "lartpc.png"
COLORS = np.array(["#e6550d", "#1f77b4", "#c51b8a", "#2ca02c", "#999999"])
SHOWN = (9, 13, 22)  # events of seed 0
COMPARED = 200


def labels(event: Event) -> np.ndarray:
    """Class of every voxel."""
    return np.repeat(event.clusters[:, 4], event.clusters[:, 0])


def draw_event(axes: tuple, event: Event, title: str) -> None:
    """Draw an event in two colourings, seen along the z axis."""
    kept = event.energy > 0.13
    x, y, _ = event.voxel[kept].T
    axes[0].scatter(x, y, s=1.2, c=COLORS[labels(event)[kept]], linewidths=0)
    axes[1].scatter(x, y, s=1.2, c=np.log10(event.energy[kept]), cmap="turbo", vmin=-0.9, vmax=0.8, linewidths=0)
    axes[0].set_title(title, fontsize=9)
    middle = (event.voxel[kept][:, :2].min(0) + event.voxel[kept][:, :2].max(0)) / 2
    reach = max(np.ptp(x), np.ptp(y)) / 2 + 15
    for ax in axes:
        ax.set(
            xlim=(middle[0] - reach, middle[0] + reach), ylim=(middle[1] - reach, middle[1] + reach), aspect="equal", xticks=[], yticks=[]
        )


def draw_energies(ax: plt.Axes, semantic: int, ours: list[Event], real: Event) -> None:
    """Draw how often a voxel of a class has which energy."""
    edges = np.geomspace(0.13, 10, 28)
    mine = np.concatenate([event.energy[labels(event) == semantic] for event in ours])
    theirs = real.energy[labels(real) == semantic]
    for values, style in ((mine, {"color": COLORS[semantic], "alpha": 0.5}), (theirs, {"color": "black", "histtype": "step"})):
        values = values[values > 0.13]
        ax.hist(values, edges, weights=np.full(len(values), 100 / len(values)), label=f"{len(values):,} voxels", **style)
    ax.set_xscale("log")
    ax.set_title(f"{CLASSES[semantic]}: MeV in a voxel, %", fontsize=9)
    ax.legend(["simulated", "real event"], fontsize=7, frameon=False)
    ax.tick_params(labelsize=7)


def draw_bragg(ax: plt.Axes) -> None:
    """Draw the mean loss along the last 30 cm of simulated tracks."""
    for particle, name in ((lartpc.MUON, "muon"), (lartpc.PROTON, "proton")):
        range_cm, count = 30.0, 200
        made, steps = lartpc._Simulation(np.random.default_rng(0), lartpc.LArTPCOptions()), []
        made.deposit = lambda *step, into=steps: into.append(step)  # whole steps, not their shares of voxels
        rows = np.array([made.new_fragment(-1, 0, lartpc.TRACK, particle, 0.0, np.zeros(3)) for _ in range(count)])
        start, way = np.full((count, 3), lartpc.BOX / 2), np.tile([1.0, 0.0, 0.0], (count, 1))
        made.track(lartpc._Bunch(start, way, np.full(count, range_cm), rows), particle)
        loss = steps[0][2].reshape(count, -1).mean(0) / lartpc.STEP
        ax.plot(range_cm - (np.arange(len(loss)) + 0.5) * lartpc.STEP, loss, label=name, lw=1)
    ax.set(xlim=(30, 0), ylim=(0, 30))
    ax.set_title("mean loss, MeV/cm, by cm to the end", fontsize=9)
    ax.legend(fontsize=7, frameon=False)
    ax.tick_params(labelsize=7)


def main() -> None:
    """Draw the picture."""
    real = PILArNetFile(Path(os.environ["GEOSSL_REAL_DATA"]) / "lartpc" / "pilarnet_m_test_event7675.h5").read(0)
    figure, axes = plt.subplots(3, 4, figsize=(11, 8), layout="constrained", height_ratios=(1, 1, 0.7))
    for column, number in enumerate(SHOWN):
        draw_event((axes[0, column], axes[1, column]), simulate_event(0, number), f"simulated, event {number} of seed 0")
    draw_event((axes[0, 3], axes[1, 3]), real, "real: PILArNet-M, test event 7675")
    ours = [simulate_event(0, number) for number in range(COMPARED)]
    for column, name in enumerate(("shower", "track", "led")):
        draw_energies(axes[2, column], CLASSES.index(name), ours, real)
    draw_bragg(axes[2, 3])
    handles = [plt.Line2D([], [], marker="o", ls="", ms=4, color=color, label=name) for name, color in zip(CLASSES, COLORS, strict=True)]
    axes[0, 0].legend(handles=handles, fontsize=7, loc="lower left", frameon=False, borderpad=0, handletextpad=0)
    axes[1, 0].set_ylabel("energy: blue 0.13, red 6 MeV", fontsize=8)
    axes[0, 0].set_ylabel("class", fontsize=8)
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=100)
    OUT.parent.mkdir(exist_ok=True)
    Image.open(buffer).convert("RGB").quantize(128).save(OUT, optimize=True)


if __name__ == "__main__":
    main()
