"""Rows of rotary position encoding: part of the ``ops`` suite."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from geossl import ops
from geossl.cli.benchmark.measure import Case, gradient_of, nbytes, values_differ
from geossl.cli.benchmark.peers import twin

BASE = 100.0
PAIR_FLOP = 6  # four products, two sums


def cases(quick: bool) -> dict[str, Callable[[], Case]]:
    """Return the cases by name: images x tokens x heads x channels."""
    encoder, decoder = ((1, 16, 2, 8), (1, 16, 4, 4)) if quick else ((4, 196, 12, 64), (4, 196, 16, 32))
    found: dict[str, Callable[[], Case]] = {}

    def add(sizes: tuple[int, int, int, int], dtype: torch.dtype, backward: bool, target: float | None = None) -> None:
        words = [f"rope_2d/{'x'.join(map(str, sizes))}", *["bfloat16"] * (dtype == torch.bfloat16), *["backward"] * backward]
        found[", ".join(words)] = functools.partial(_case, sizes, dtype, backward, target)

    add(encoder, torch.float32, False, 0.15e-3)
    add(encoder, torch.float32, True, 0.5e-3)
    add(encoder, torch.bfloat16, True)
    add(decoder, torch.float32, True)
    return found


def _case(sizes: tuple[int, int, int, int], dtype: torch.dtype, backward: bool, target: float | None) -> Case:
    images, tokens, heads, dim = sizes
    generator = torch.Generator().manual_seed(0)
    x, grad = torch.randn(2, images * tokens, heads, dim, generator=generator).to(dtype)
    side = int(tokens**0.5)
    positions = torch.stack(torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij"), -1).view(-1, 2)
    table = ops.rope_2d_table(positions, dim, BASE)

    def run(x: Tensor, grad: Tensor, rotate: Callable[[Tensor], Tensor]) -> list[Tensor]:
        if not backward:
            return [rotate(x)]
        leaf = x.detach().requires_grad_()
        result = rotate(leaf)
        result.backward(grad)
        return [result.detach(), gradient_of(leaf)]

    # The peers' layout is [images, heads, tokens, channels].
    theirs = [t.view(images, tokens, heads, dim).transpose(1, 2).contiguous() for t in (x, grad)]

    def run_peer(rotate: Callable[[Tensor], Tensor]) -> list[Tensor]:
        return [t.transpose(1, 2) for t in run(theirs[0], theirs[1], rotate)]

    def call() -> list[Tensor]:
        return [t.view(images, tokens, heads, dim) for t in run(x, grad, lambda x: ops.rope_2d(x, table))]

    places = positions.expand(images, -1, -1)
    kept = _tables(positions, dim, dtype)
    peers: dict[str, Callable[[Tensor], Tensor]] = {
        "torch, tables anew in every call": lambda x: _rotate_halves(x, _tables(places, dim, x.dtype)),
        "torch, tables kept": lambda x: _rotate_halves(x, kept),
    }
    return Case(
        inputs=f"{images} x {tokens} tokens of {heads} heads of {dim} channels, {str(dtype).removeprefix('torch.')}",
        run=call,
        moved=nbytes(x) * (4 if backward else 2) + nbytes(table) * (1 + backward),
        moved_is="numbers and table read and results written once" + (", forward and backward" if backward else ""),
        flop=PAIR_FLOP * x.numel() // 2 * (1 + backward),
        flop_is="6 per pair of numbers" + (", forward and backward" if backward else ""),
        dtype=dtype,
        peers={name: functools.partial(run_peer, rotate) for name, rotate in peers.items()} | {"geossl.ops.reference": twin(call)},
        differs=values_differ if dtype == torch.float32 else lambda ours, theirs: "",
        target=target,
    )


def _tables(positions: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
    """Cosines and sines as plain torch code has them, once for each number of a pair: ``[2, ..., 1, tokens, 2, dim / 2]``.

    They are made for all positions up to the largest and then looked up.
    """
    frequency = 1.0 / BASE ** (torch.arange(0, dim // 2, 2) / (dim // 2))
    angle = torch.outer(torch.arange(int(positions.amax()) + 1, dtype=torch.float32), frequency)
    angle = torch.cat([angle, angle], dim=-1)
    return torch.stack([part.to(dtype)[positions].unsqueeze(-4) for part in (angle.cos(), angle.sin())])


def _rotate_halves(x: Tensor, tables: Tensor) -> Tensor:
    """Rotate ``[images, heads, tokens, channels]``: each half of the channels by the tables of its axis."""
    turned = []
    for axis, part in enumerate(x.chunk(2, dim=-1)):
        cosine, sine = tables[..., axis, :]
        u, v = part.chunk(2, dim=-1)
        turned.append(part * cosine + torch.cat([-v, u], dim=-1) * sine)
    return torch.cat(turned, dim=-1)
