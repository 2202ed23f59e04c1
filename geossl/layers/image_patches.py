"""Images as packed patches, and back: cut, embedded, kept in part, laid out as maps."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from geossl.layers.attention import Segments


class ImagePatches(NamedTuple):
    """Patches of images of one size, packed: all of each image, or some."""

    pixels: Tensor  # [T, 3 * patch * patch]: channel, row, column
    grid: tuple[int, int]  # rows and columns of patches of a whole image
    segments: Segments  # patches of each image
    cells: Tensor | None = None  # [T] int64: which cell of its image a patch is, counted row by row; None: all of every image

    def keep(self, rows: Tensor, segments: Segments) -> ImagePatches:
        """Only the patches in ``rows [V]`` (ascending), of which each image has as many as ``segments`` says."""
        cells = rows % (self.grid[0] * self.grid[1]) if self.cells is None else self.cells.index_select(0, rows)
        return ImagePatches(self.pixels.index_select(0, rows), self.grid, segments, cells)

    def join(self, other: ImagePatches) -> ImagePatches:
        """The patches of both, those of ``self`` first; the images must be of one size."""
        cells = None if self.cells is None and other.cells is None else torch.cat([self.all_cells(), other.all_cells()])
        segments = Segments(self.segments.lengths + other.segments.lengths)
        return ImagePatches(torch.cat([self.pixels, other.pixels]), self.grid, segments, cells)

    def all_cells(self) -> Tensor:
        """``cells``, also where all are there."""
        if self.cells is not None:
            return self.cells
        return torch.arange(self.grid[0] * self.grid[1], device=self.pixels.device).repeat(len(self.segments.lengths))


def check_images(images: Tensor, patch: int, name: str = "images") -> None:
    """Refuse images of a wrong shape, type or size, and on the CPU (where looking is cheap) values that are not finite.

    Raises:
        ValueError: the message says what is wrong with ``name``.
    """
    if images.dim() != 4 or images.shape[1] != 3 or not images.is_floating_point():
        raise ValueError(
            f"{name} must be floating point [B, 3, H, W], normalised by geossl.geometry.normalize_images; "
            f"got {images.dtype} {list(images.shape)}"
        )
    height, width = images.shape[2:]
    if height < patch or width < patch or height % patch or width % patch:
        raise ValueError(
            f"{name} must have height and width that are multiples of the patch, {patch}, and at least that; got {height} x {width}. "
            "Crop or resize them"
        )
    if images.device.type == "cpu" and not torch.compiler.is_compiling() and not bool(images.isfinite().all()):
        wrong = (~images.isfinite()).flatten(1).any(1).nonzero().flatten().tolist()
        raise ValueError(f"{name} must be finite, but number {wrong[0]} of {len(images)} has NaN or infinite pixels")


def cut_patches(images: Tensor, patch: int) -> Tensor:
    """Cut ``[B, C, H, W]`` into patches row by row, ``[B * cells, C, patch, patch]``."""
    batch, channels, height, width = images.shape
    cut = images.reshape(batch, channels, height // patch, patch, width // patch, patch)
    return cut.permute(0, 2, 4, 1, 3, 5).reshape(-1, channels, patch, patch)


def paste_patches(patches: Tensor, grid: tuple[int, int]) -> Tensor:
    """The inverse of :func:`cut_patches`: ``[B * cells, C, patch, patch]`` to ``[B, C, H, W]``."""
    _, channels, patch, _ = patches.shape
    cut = patches.reshape(-1, *grid, channels, patch, patch)
    return cut.permute(0, 3, 1, 4, 2, 5).reshape(-1, channels, grid[0] * patch, grid[1] * patch)


def to_map(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """Tokens of whole images ``[B * cells, C]`` as maps ``[B, C, rows, columns]`` (a view)."""
    return tokens.view(-1, *grid, tokens.shape[1]).permute(0, 3, 1, 2)


class PatchEmbedding(nn.Linear):
    """Linear layer over the pixels of a patch, ``[T, 3 * patch * patch] -> [T, dim]``.

    In float32 on the CPU it is computed as the convolution it stands for, whose order of summation the published numbers have: in that of a
    matrix product, features are 1e-5 away from them after a few blocks.

    Args:
        patch: Rows and columns of a patch.
        dim: Channels of a token.
    """

    def __init__(self, patch: int, dim: int) -> None:
        super().__init__(3 * patch**2, dim)
        self.patch = patch
        nn.init.xavier_uniform_(self.weight)  # the bias keeps torch's own, as published

    def forward(self, pixels: Tensor) -> Tensor:
        """Embed patches."""
        if pixels.device.type != "cpu" or pixels.dtype != torch.float32 or torch.is_autocast_enabled("cpu"):
            return super().forward(pixels)
        count, patch = pixels.shape[0], self.patch
        strip = (
            pixels.view(count, 3, patch, patch).permute(1, 2, 0, 3).reshape(1, 3, patch, count * patch)
        )  # quicker than many small images
        return F.conv2d(strip, self.weight.view(-1, 3, patch, patch), self.bias, patch)[0, :, 0].T
