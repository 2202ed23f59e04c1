"""Where the patches of an image are: sin-cos codes added to tokens (CroCo), and rotations of queries and keys (CroCo v2)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from geossl.ops import rope_2d_table

MOST_TABLES = 8
"""Tables of rotations kept, one for each size of image."""


def grid_positions(height: int, width: int, device: torch.device | str | None = None) -> Tensor:
    """Row and column of every cell of a grid, row by row, ``[height * width, 2]`` int64."""
    rows, columns = torch.arange(height, device=device), torch.arange(width, device=device)
    return torch.stack([rows.repeat_interleave(width), columns.repeat(height)], 1)


def sincos_table(height: int, width: int, dim: int) -> Tensor:
    """Sin-cos code of every cell of a grid, ``[height * width, dim]`` float32: half of the channels for its column, then half for its row.

    Each half holds the sines, then the cosines, of the position at ``dim / 4`` frequencies from 1 down to nearly 1 / 10,000.
    """
    frequency = 10000.0 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    angle = grid_positions(height, width).flip(1)[:, :, None] * frequency  # [cells, column and row, dim / 4]
    return torch.stack([angle.sin(), angle.cos()], 2).flatten(1).float()


class GridPositions(nn.Module):
    """Where the cells of a grid are, for transformer blocks: something to add to the tokens, and rotations of queries and keys.

    A sin-cos table belongs to the state, as fine-tuned models keep an interpolated one; it is interpolated (bicubic) to grids of other
    sizes than its own. Rotations are in float32 whatever autocast says, and kept for the last few sizes.

    Args:
        kind: "cosine" or "rope".
        dim: Channels of the tokens.
        heads: Attention heads of the blocks.
        grid: Rows and columns that the sin-cos table is made for.
        base: Base of the frequencies of the rotations.
    """

    def __init__(self, kind: str, dim: int, heads: int, grid: tuple[int, int], base: float) -> None:
        super().__init__()
        self.kind, self.head_dim, self.grid, self.base = kind, dim // heads, grid, base
        self._tables: dict[Any, Tensor] = {}
        if kind == "cosine":
            self.register_buffer("table", sincos_table(*grid, dim))

    def added(self, grid: tuple[int, int]) -> Tensor | None:
        """Code to add to the token of each cell, ``[cells, dim]``; None for rotations."""
        if self.kind != "cosine":
            return None
        table: Tensor = self.get_buffer("table")
        if grid == self.grid:
            return table
        wide = torch.float64 if table.dtype == torch.float64 else torch.float32
        cells = table.unflatten(0, self.grid).permute(2, 0, 1)[None].to(wide)
        return F.interpolate(cells, grid, mode="bicubic", align_corners=False)[0].flatten(1).T.to(table.dtype)

    def rotations(self, grid: tuple[int, int], x: Tensor) -> Tensor | None:
        """Table of :func:`geossl.ops.rope_2d` for each cell, on the device of ``x``; None for the sin-cos code.

        ``[cells, 2, dim / heads / 2]`` float32, or float64 for float64 tokens.
        """
        if self.kind != "rope":
            return None
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        if torch.compiler.is_compiling():
            return self._rotations(grid, x.device, dtype)
        key = (grid, x.device, dtype)
        if key not in self._tables:
            if len(self._tables) >= MOST_TABLES:
                del self._tables[next(iter(self._tables))]
            with torch.inference_mode(False):  # one made inside could not be trained with later
                self._tables[key] = self._rotations(*key)
        return self._tables[key]

    def _rotations(self, grid: tuple[int, int], device: torch.device, dtype: torch.dtype) -> Tensor:
        return rope_2d_table(grid_positions(*grid, device), self.head_dim, self.base, dtype=dtype)

    def extra_repr(self) -> str:
        """What printing a model shows."""
        return f"{self.kind}, grid={self.grid}" if self.kind == "cosine" else f"{self.kind}, base={self.base:g}"
