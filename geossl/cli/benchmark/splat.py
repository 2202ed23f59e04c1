"""The Gaussian rasterizer on scenes of growing size: all of the image and all gradients, beside plain torch that does the same by tiles.

And its first user: building a furnished room, and a picture of it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor

from geossl import ops
from geossl.cli.benchmark.measure import Case, nbytes, values_differ
from geossl.data.simulate import ViewOptions, build_room, sample_view

TARGETS = {(5_000, 128): (3e-3, 8e-3), (20_000, 128): (12e-3, 35e-3), (100_000, 512): (100e-3, 250e-3)}
"""CPU seconds, forward and forward with backward, by Gaussians and edge of the image."""

PLAIN_LIMIT = 20_000  # Gaussians for which plain torch is asked
PIXEL_FLOP, BACKWARD_FLOP = 40, 60  # exponential, blending of four channels; the same again, and their gradients


def cases(quick: bool) -> dict[str, Callable[[], Case]]:
    """Return the cases of this suite by name; each is built when it is called."""
    sizes = {(50, 20): (None, None)} if quick else TARGETS
    found: dict[str, Callable[[], Case]] = {}
    for (count, edge), targets in sizes.items():
        for backward, target in zip((False, True), targets, strict=True):
            name = f"rasterize_gaussians/{count} at {edge}x{edge}{', backward' * backward}"
            found[name] = functools.partial(_case, count, edge, backward, target)
    edge = 32 if quick else 224
    found["room/build"] = functools.partial(_build, 0.2 if quick else 1.0, 1.5)
    found[f"room/{edge}x{edge} colour, depth, instances"] = functools.partial(_picture, 0.2 if quick else 1.0, edge, 35e-3)
    return found


ROOM = 0
"""Number of the room of seed 0 that is measured; it has 83,000 surfels."""


def _build(detail: float, target: float) -> Case:
    room = build_room(0, ROOM, detail=detail)  # its objects are prepared once and kept
    surfels = nbytes(room.means, room.quats, room.scales, room.colors)
    return Case(
        inputs=f"a room of {len(room.boxes)} objects and {len(room):,} surfels; objects are prepared",
        run=lambda: build_room(0, ROOM, detail=detail),
        moved=surfels,
        moved_is="surfels written once",
        flop=0,
        flop_is="not counted",
        target=target,
    )


def _picture(detail: float, edge: int, target: float) -> Case:
    room = build_room(0, ROOM, detail=detail)
    camera = sample_view(room, room.rng(0), ViewOptions(width=edge, height=edge)).camera
    return Case(
        inputs=f"{len(room):,} surfels, {edge} x {edge} pixels",
        run=lambda: room.render(camera),
        moved=nbytes(room.means, room.quats, room.scales, room.colors) + 4 * 6 * edge * edge,
        moved_is="surfels read and images written once",
        flop=0,
        flop_is="not counted",
        target=target,
    )


def scene(count: int, edge: int) -> tuple[list[Tensor], Tensor, Tensor]:
    """Return means, quaternions, scales, opacities and colours of Gaussians in a cube, and the view and lens of a camera before it."""
    g = torch.Generator().manual_seed(0)
    means, quats = torch.rand(count, 3, generator=g) * 2 - 1, torch.randn(count, 4, generator=g)
    low, high = math.log(0.005), math.log(0.05)
    scales = torch.exp(torch.rand(count, 3, generator=g) * (high - low) + low)
    opacities, colors = 0.1 + 0.8 * torch.rand(count, generator=g), torch.rand(count, 3, generator=g)
    view = torch.eye(4)
    view[2, 3] = 3
    lens = torch.tensor([[0.9 * edge, 0, edge / 2], [0, 0.9 * edge, edge / 2], [0, 0, 1]])
    return [means, quats, scales, opacities, colors], view[None], lens[None]


def _case(count: int, edge: int, backward: bool, target: float | None) -> Case:
    gaussians, view, lens = scene(count, edge)

    def run(backend: ops.gaussians.Backend) -> list[Tensor]:
        leaves = [t.clone().requires_grad_(backward) for t in gaussians]
        means, quats, scales, opacities, colors = leaves
        render, alpha, _ = ops.rasterize_gaussians(
            means, quats, scales, opacities, colors, view, lens, edge, edge, render_mode="RGB+D", backend=backend
        )
        if not backward:
            return [render, alpha]
        return [render.detach(), *torch.autograd.grad(render.sum() + alpha.sum(), leaves)]

    means, quats, scales, opacities, colors = gaussians
    _, _, meta = ops.rasterize_gaussians(means, quats, scales, opacities, colors, view, lens, edge, edge)
    entries = len(meta["flatten_ids"])
    lit = 16 * entries  # at least a row of pixels for every Gaussian of a tile
    image = 4 * 5 * edge * edge
    return Case(
        inputs=f"{count:,} Gaussians, {entries:,} of them in tiles, {edge} x {edge} pixels: colour, depth and alpha",
        run=functools.partial(run, "native"),
        moved=(nbytes(*gaussians) + image) * (1 + backward),
        moved_is="Gaussians read and images written once" + (", images' gradients read and Gaussians' written" if backward else ""),
        flop=lit * (PIXEL_FLOP + backward * BACKWARD_FLOP),
        flop_is="40 per pixel of one row of every Gaussian in a tile" + (", 60 more for the gradient" if backward else ""),
        peers={"plain torch by tiles": functools.partial(run, "reference")} if count <= PLAIN_LIMIT else {},
        differs=values_differ,
        target=target,
    )
