"""Voxels in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from geossl.ops.reference.clouds import spans


def cells_of(points: Tensor, size: list[float], origin: list[float]) -> Tensor:
    """The definition: ``floor((p - origin) / size)`` in float64, as float64."""
    return torch.floor((points.double() - points.new_tensor(origin, dtype=torch.float64)) / points.new_tensor(size, dtype=torch.float64))


def kept_rows(rows: Tensor, within: list[float]) -> Tensor:
    """Which rows are finite and lie in ``low <= p < high`` (low x, y, z, then high)."""
    low, high = rows.new_tensor(within, dtype=torch.float64).view(2, 3)
    return (rows.isfinite() & (rows.double() >= low) & (rows.double() < high)).all(-1)


def interleave(x: Tensor, y: Tensor, z: Tensor, bits: int) -> Tensor:
    """Place on the Morton curve: bits of x, y and z in turn, from the highest, x first."""
    code = torch.zeros_like(x)
    for bit in range(bits - 1, -1, -1):
        for axis in (x, y, z):
            code = code << 1 | axis >> bit & 1
    return code


def hilbert(x: Tensor, y: Tensor, z: Tensor, bits: int) -> Tensor:
    """Place on the Hilbert curve through a cube of ``2 ** bits`` cells an axis, by Skilling's transform (2004)."""
    axes = [x.clone(), y.clone(), z.clone()]
    for bit in range(bits - 1, 0, -1):
        below = (1 << bit) - 1
        for i in range(3):
            is_set = (axes[i] >> bit & 1).bool()
            swap = torch.where(is_set, 0, (axes[0] ^ axes[i]) & below)
            axes[0] = axes[0] ^ torch.where(is_set, below, swap)
            axes[i] = axes[i] ^ swap if i else axes[0]
    axes[1] = axes[1] ^ axes[0]
    axes[2] = axes[2] ^ axes[1]
    flip = torch.zeros_like(x)
    for bit in range(bits - 1, 0, -1):
        flip = torch.where((axes[2] >> bit & 1).bool(), flip ^ ((1 << bit) - 1), flip)
    return interleave(axes[0] ^ flip, axes[1] ^ flip, axes[2] ^ flip, bits)


def sort_keys(cells: Tensor, order: str) -> Tensor:
    """Columns that order the cells ``[n, 3]`` of one cloud, the most significant first."""
    if order not in ("morton", "hilbert") or len(cells) == 0:
        return cells
    relative = cells - cells.amin(0)
    bits = int(relative.max()).bit_length()
    x, y, z = relative.unbind(1)
    code = (interleave if order == "morton" else hilbert)(x, y, z, bits)
    return torch.stack([code, torch.zeros_like(code), torch.zeros_like(code)], dim=1)


def voxelize(
    points: Tensor, lengths: Tensor | None, offsets: Tensor | None, size: list[float], origin: list[float], within: list[float],
    order: str, max_points: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the coordinates of voxels, the voxel of every row, counts, row splits and the rows sorted by voxel."""
    rows = points.reshape(-1, 3)
    device = rows.device
    cell, keys, chosen = [], [], []
    for b, (begin, end) in enumerate(spans(points, lengths, offsets)):
        inside = kept_rows(rows[begin:end], within).nonzero().squeeze(1)
        cells = cells_of(rows[begin:end][inside], size, origin).long()
        batch = torch.full_like(cells[:, :1], b)
        cell.append(torch.cat([batch, cells], dim=1))
        keys.append(torch.cat([batch, sort_keys(cells, order)], dim=1))
        chosen.append(inside + begin)
    empty = torch.zeros(0, 4, dtype=torch.int64, device=device)
    cells, key, row = torch.cat([empty, *cell]), torch.cat([empty, *keys]), torch.cat([empty[:, 0], *chosen])
    sequence = torch.arange(len(row), device=device)
    for column in (3, 2, 1, 0):  # stable sorts from the least significant column on: points of a voxel stay in order
        sequence = sequence[torch.sort(key[sequence, column], stable=True).indices]
    head = torch.ones(len(row), dtype=torch.bool, device=device)
    head[1:] = (cells[sequence[1:]] != cells[sequence[:-1]]).any(1)
    voxel, starts = head.cumsum(0) - 1, head.nonzero().squeeze(1)
    if order == "first":
        number = torch.argsort(torch.argsort(row[sequence[starts]]))
        voxel = number[voxel]
        by_number = torch.sort(voxel, stable=True).indices
        sequence, voxel = sequence[by_number], voxel[by_number]
        starts = torch.searchsorted(voxel, torch.arange(len(starts), device=device))
    kept = torch.arange(len(row), device=device) - starts[voxel] < max_points
    coords, perm, voxel = cells[sequence[starts]].int(), row[sequence[kept]], voxel[kept]
    counts = torch.bincount(voxel, minlength=len(starts))
    inverse = torch.full(rows.shape[:1], -1, dtype=torch.int64, device=device).index_put((perm,), voxel)
    splits = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    return coords, inverse.view(points.shape[:-1]), counts, splits, perm


def voxel_corners(
    points: Tensor, lengths: Tensor | None, offsets: Tensor | None, coords: Tensor, size: list[float], origin: list[float]
) -> tuple[Tensor, Tensor]:
    """Return the 8 voxels around every point ``[rows, 8]``, -1 where there is none, and their weights, which add up to 1."""
    rows = points.reshape(-1, 3)
    at = (rows.double() - rows.new_tensor(origin, dtype=torch.float64)) / rows.new_tensor(size, dtype=torch.float64) - 0.5
    cloud = torch.full(rows.shape[:1], -1, dtype=torch.int64, device=rows.device)
    for b, (begin, end) in enumerate(spans(points, lengths, offsets)):
        cloud[begin:end] = b
    cloud = torch.where(((at >= -(2.0**31 - 1)) & (at <= 2.0**31 - 3)).all(1), cloud, -1)
    at = torch.where((cloud >= 0).unsqueeze(1), at, 0.0)
    base = torch.floor(at)
    part = at - base
    corner = torch.tensor([[k >> 2, k >> 1 & 1, k & 1] for k in range(8)], device=rows.device)
    cells = torch.cat([cloud.view(-1, 1, 1).expand(-1, 8, 1), base.long().unsqueeze(1) + corner], dim=2)
    known = {tuple(cell): v for v, cell in enumerate(coords.tolist())}
    found = [[known.get(tuple(cell), -1) for cell in row] for row in cells.tolist()]
    index = torch.tensor(found, dtype=torch.int64, device=rows.device).view(-1, 8)
    weights = torch.where(corner.bool(), part.unsqueeze(1), 1 - part.unsqueeze(1))
    weights = torch.where(index >= 0, (weights[..., 0] * weights[..., 1]) * weights[..., 2], 0.0)
    total = torch.zeros_like(weights[:, 0])
    for k in range(8):  # one after the other, as the kernels do
        total = total + weights[:, k]
    weights = torch.where(total.unsqueeze(1) > 0, weights / total.unsqueeze(1), 0.0)
    return index.view(*points.shape[:-1], 8), weights.to(points.dtype).view(*points.shape[:-1], 8)
