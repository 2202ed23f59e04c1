"""Draw the pictures of the operator pages into ``docs/ops/images``: ``python docs/ops/images.py [NAME ...]``.

Everything shown is computed by geossl on its embedded objects, so a picture that looks wrong is a finding about an operator.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from torch import Tensor

from geossl import ops
from geossl.data import DATASETS, load_objects

FOLDER = Path(__file__).parent / "images"
GREEN, RED, BLUE, GREY, INK = "#0b6e4f", "#d1495b", "#2e6f9e", "#c4c4c0", "#333333"


def cloud(row: int = 24, points: int = 1024) -> Tensor:
    """Return an embedded object ``[points, 3]``, scaled into the unit cube around the origin."""
    stored = DATASETS.config("objects").build("train").read(row)
    coord = torch.from_numpy(stored.coord)[:points]
    coord = coord - (coord.amax(0) + coord.amin(0)) / 2
    return coord / coord.abs().max()


def figure(columns: int, titles: list[str], height: float = 3.2, spatial: bool = True) -> tuple[Figure, list[Any]]:
    """Return a figure with one panel per title."""
    made = Figure(figsize=(3.2 * columns, height), layout="constrained")
    FigureCanvasAgg(made)
    panels = [made.add_subplot(1, columns, place + 1, **({"projection": "3d"} if spatial else {})) for place in range(columns)]
    for panel, title in zip(panels, titles, strict=True):
        panel.set_title(title, fontsize=10, color=INK)
        panel.set_axis_off()
        if spatial:
            panel.view_init(elev=18, azim=-60)
            panel.set_box_aspect((1, 1, 1), zoom=1.25)
            panel.set(xlim=(-1, 1), ylim=(-1, 1), zlim=(-1, 1))
    return made, panels


def dots(panel: Any, points: Tensor, color: Any = GREY, size: float = 4, alpha: float = 1.0, **more: Any) -> None:
    """Draw points of a spatial panel."""
    panel.scatter(*points.T.numpy(), c=color, s=size, alpha=alpha, linewidths=0, depthshade=False, **more)


def sampling() -> Figure:
    """Farthest points beside random ones, and their order."""
    points = cloud()
    picks = ops.farthest_point_sample(points[None], 64)[0]
    random = torch.randperm(len(points), generator=torch.Generator().manual_seed(0))[:64]
    made, (a, b, c) = figure(3, ["64 random points", "64 farthest points", "in the order they are picked"])
    for panel, chosen in ((a, random), (b, picks)):
        dots(panel, points, size=2)
        dots(panel, points[chosen], RED if panel is a else GREEN, 22)
    dots(c, points, size=2)
    dots(c, points[picks], np.arange(64), 22, cmap="viridis_r")
    return made


def neighbors() -> Figure:
    """Nearest neighbours of one query, and a ball."""
    points = cloud()
    query = points[ops.farthest_point_sample(points[None], 2)[0]][None]
    near = ops.knn(query, points[None], 48).index[0]
    ball = ops.ball_query(query, points[None], 0.35, 48)
    made, (a, b) = figure(2, ["knn: the 48 nearest", "ball_query: within 0.35, at most 48"])
    for panel, found in ((a, near), (b, ball.index[0])):
        dots(panel, points, size=2)
        for row, color in zip(found, (GREEN, BLUE), strict=True):
            dots(panel, points[row[row >= 0]], color, 14)
        dots(panel, query[0], RED, 60, marker="*")
    return made


def grouping() -> Figure:
    """Groups of a cloud, each in its own colour, and moved to its centre."""
    points = cloud()
    centers = points[ops.farthest_point_sample(points[None], 12)[0]]
    index = ops.knn(centers[None], points[None], 64).index
    groups = ops.group(points[None], index)[0]
    made, (a, b) = figure(2, ["12 groups of 64 neighbours", "moved apart: what a token sees"])
    colors = [f"C{row % 10}" for row in range(len(groups))]
    dots(a, points, size=2)
    for group, center, color in zip(groups, centers, colors, strict=True):
        dots(a, group, color, 7)
        dots(b, group + 0.55 * center, color, 7)
    dots(a, centers, INK, 26)
    b.set(xlim=(-1.3, 1.3), ylim=(-1.3, 1.3), zlim=(-1.3, 1.3))
    return made


def chamfer() -> Figure:
    """Matches of both directions, and a cloud moved down the gradient."""
    target, start = cloud(24, 256), torch.nn.functional.normalize(torch.randn(256, 3, generator=torch.Generator().manual_seed(0)), dim=1)
    moved = start.clone().requires_grad_()
    losses = []
    for _ in range(120):
        loss = ops.chamfer_distance(moved[None], target[None])
        (gradient,) = torch.autograd.grad(loss, moved)
        moved = (moved - 0.15 * len(moved) * gradient).detach().requires_grad_()
        losses.append(float(loss.detach()))
    after = f"after {len(losses)} steps: {losses[0]:.2g} to {losses[-1]:.2g}"
    made, panels = figure(3, ["a sphere and the target", "each point to its nearest", after])
    nearest = ops.knn(start[None], target[None], 1).index[0, :, 0]
    for panel, points in zip(panels, (start, start, moved.detach()), strict=True):
        dots(panel, target, GREY, 9)
        dots(panel, points, GREEN, 7)
    for a, b in zip(start.numpy(), target[nearest].numpy(), strict=True):
        panels[1].plot(*np.stack([a, b]).T, color=RED, linewidth=0.6, alpha=0.7)
    return made


def voxels() -> Figure:
    """Points, the voxels they are in, and the mean of each voxel."""
    points, size = cloud(), 0.2
    found = ops.voxelize(points[None], size)
    cells, count = found.coords[:, 1:], found.counts
    means = ops.voxel_reduce(points[None], found)
    made, (a, b, c) = figure(3, [f"{len(points):,} points", f"{len(cells)} voxels of {size}, by their points", "the mean of each voxel"])
    dots(a, points, GREEN, 4)
    low = cells.amin(0)
    filled = np.zeros((cells.amax(0) - low + 1).tolist(), bool)
    colors = np.zeros((*filled.shape, 4))
    place = tuple((cells - low).T.numpy())
    filled[place] = True
    shade = ListedColormap(["#cfe3da", "#9cc7b4", "#5da487", GREEN])((3 * count / count.max()).round().int().numpy())
    colors[place] = shade
    edges = np.indices(np.array(filled.shape) + 1) + low.numpy()[:, None, None, None]
    b.voxels(*(size * edges), filled, facecolors=colors, edgecolor="white", linewidth=0.3)
    dots(c, points, size=2)
    dots(c, means, RED, 14)
    return made


def segments() -> Figure:
    """Rows that follow each other, cut by row splits, and the mean of each."""
    lengths = torch.tensor([3, 5, 0, 4])
    splits = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    values = torch.tensor([2.0, 4, 3, 1, 1, 5, 2, 1, 3, 3, 4, 2])
    owner = torch.arange(len(lengths)).repeat_interleave(lengths)
    means = ops.segment_reduce(values, splits, "mean")
    made, (panel,) = figure(1, [""], 2.9, spatial=False)
    made.set_size_inches(8, 2.9)
    colors = (GREEN, BLUE, GREY, RED)
    for row, (value, of) in enumerate(zip(values.tolist(), owner.tolist(), strict=True)):
        panel.bar(row, 1, width=0.94, bottom=2.2, color=colors[of])
        panel.text(row, 2.7, f"{value:g}", ha="center", va="center", color="white", fontsize=11)
    for row, split in enumerate(splits.tolist()):
        shift = 0.14 if row == 3 else -0.14 if row == 2 else 0  # two splits at the same place: an empty row
        panel.plot([split - 0.5 + shift] * 2, [2.0, 3.4], color=INK, linewidth=1)
        panel.text(split - 0.5 + shift * 2, 3.5, str(split), ha="center", fontsize=9, color=INK)
    for row, (mean, length) in enumerate(zip(means.tolist(), lengths.tolist(), strict=True)):
        x = (1.5, 4.5, 7.5, 10.5)[row]
        panel.bar(x - 0.5, 0.9, width=1.6, bottom=0, color=colors[row])
        panel.text(x - 0.5, 0.45, f"{mean:.3g}", ha="center", va="center", color="white" if length else INK, fontsize=11)
        middle = (splits[row] + splits[row + 1]).item() / 2 - 0.5
        panel.plot([middle, x - 0.5], [2.1, 1.0], color=colors[row], linewidth=1.4)
    for y, text in ((3.55, "row_splits"), (2.7, "values"), (0.45, "means")):
        panel.text(-1.0, y, text, ha="right", va="center", fontsize=10, color=INK)
    panel.set(xlim=(-3.2, 12), ylim=(-0.1, 4))
    return made


def sparse() -> Figure:
    """The voxels a kernel of three reads around one voxel."""
    points, size = cloud(), 0.2
    coords = ops.voxelize(points[None], size).coords
    cells, index = coords[:, 1:], ops.neighbor_map(coords).index  # [27, V]
    center = int(((index >= 0).sum(0) - 14).abs().argmin())  # on a thin part, where half of the kernel meets nothing
    near = torch.zeros(len(cells), dtype=torch.bool)
    near[index[:, center][index[:, center] >= 0]] = True
    made, (a, b) = figure(2, [f"{len(cells)} voxels", f"kernel of 3: {int(near.sum())} of 27 places hold a voxel"])
    middle = (cells + 0.5) * size
    dots(a, middle, GREEN, 22)
    dots(b, middle[~near], GREY, 10)
    dots(b, middle[near], BLUE, 34)
    dots(b, middle[center : center + 1], RED, 60)
    for row in near.nonzero()[:, 0].tolist():
        b.plot(*np.stack([middle[center].numpy(), middle[row].numpy()]).T, color=BLUE, linewidth=0.8)
    return made


def gaussians() -> Figure:
    """An object as flat Gaussians along its surface: colour, depth, and which Gaussian each pixel is mostly made of."""
    library, row = load_objects(), 427
    coord, normal, color = (torch.from_numpy(array[row].astype(np.float32)) for array in (library.xyz, library.normal, library.rgb))
    coord = (coord - (coord.amax(0) + coord.amin(0)) / 2) / (coord.amax(0) - coord.amin(0)).max()
    normal, color = torch.nn.functional.normalize(normal, dim=1), color / 255
    spacing = ops.knn(coord[None], coord[None], 4).distance[0, :, 3].sqrt()
    # The rotation that turns the z axis, along which the Gaussian is thin, into the normal.
    quats = torch.stack([1 + normal[:, 2], -normal[:, 1], normal[:, 0], torch.zeros(len(normal))], 1) + 1e-6
    scales = torch.stack([0.7 * spacing, 0.7 * spacing, 0.05 * spacing], 1)
    eye = torch.tensor([1.1, -1.5, 0.8])
    forward = -eye / eye.norm()
    right = torch.linalg.cross(forward, torch.tensor([0.0, 0, 1]))
    right = right / right.norm()
    view = torch.eye(4)
    view[:3, :3] = torch.stack([right, torch.linalg.cross(forward, right), forward])
    view[:3, 3] = -view[:3, :3] @ eye
    size = 320
    lens = torch.tensor([[1.3 * size, 0, size / 2], [0, 1.3 * size, size / 2], [0, 0, 1]])
    render, alpha, meta = ops.rasterize_gaussians(
        coord, quats, scales, torch.full((len(coord),), 0.95), color, view[None], lens[None], size, size, backgrounds=torch.ones(1, 3),
        render_mode="RGB+ED", with_ids=True,
    )  # fmt: skip
    made, panels = figure(3, ["colour", "expected depth", "Gaussian of largest weight"], 3.4, spatial=False)
    depth = torch.where(alpha[0, ..., 0] > 0.5, render[0, ..., 3], torch.nan)
    palette = torch.rand(len(coord), 3, generator=torch.Generator().manual_seed(0))
    found = meta["largest_id"][0].long()
    panels[0].imshow(render[0, ..., :3].clamp(0, 1).numpy())
    panels[1].imshow(depth.numpy(), cmap="viridis_r")
    panels[2].imshow(torch.where(found[..., None] >= 0, palette[found.clamp(min=0)], 1.0).numpy())
    return made


def rope() -> Figure:
    """Products of one query with the same key at every patch: they follow the query, as only differences of positions count."""
    side, dim = 14, 64
    positions = torch.stack(torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij"), -1).view(-1, 2)
    table = ops.rope_2d_table(positions, dim)
    tokens = ops.rope_2d(torch.ones(side * side, 1, dim), table)[:, 0]
    titles = ["angle of a pair of the row", "angle of a pair of the column", "products with one query", "with another"]
    made, (a, b, c, d) = figure(4, titles, spatial=False)
    angles = torch.atan2(table[:, 1], table[:, 0]).view(side, side, 2, dim // 4)
    for axis, panel in enumerate((a, b)):
        panel.imshow(angles[:, :, axis, 4].numpy(), cmap="twilight")
    for panel, place in ((c, (3, 4)), (d, (10, 8))):
        panel.imshow((tokens @ tokens[place[0] * side + place[1]]).view(side, side).numpy(), cmap="viridis", vmin=-10, vmax=dim)
        panel.plot(place[1], place[0], marker="*", color=RED, markersize=12)
    return made


PICTURES: dict[str, Callable[[], Figure]] = {
    made.__name__: made for made in (sampling, neighbors, grouping, chamfer, voxels, segments, sparse, gaussians, rope)
}  # fmt: skip


def main(names: list[str]) -> None:
    """Draw the pictures named, or all."""
    FOLDER.mkdir(exist_ok=True)
    for name in names or PICTURES:
        path = FOLDER / f"{name}.png"
        PICTURES[name]().savefig(path, dpi=100, pil_kwargs={"optimize": True})
        print(f"{path}: {path.stat().st_size // 1024} kB")


if __name__ == "__main__":
    main(sys.argv[1:])
