"""Volumetric tokens: centres that cover an event without crowding, and the points in a ball around each (PoLAr-MAE section 3).

Paper: Young et al., "Particle Trajectory Representation Learning with Masked Point Modeling", 2025, arXiv 2502.02558.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from geossl import ops
from geossl.errors import ConfigError, unknown_name


class VolumeTokens(NamedTuple):
    """Which points make up the tokens of a batch of events."""

    centers: Tensor  # rows of the points that are centres, [T] int64
    offsets: Tensor  # tokens of event b are offsets[b]:offsets[b + 1], [B + 1] int64
    index: Tensor  # type: ignore[assignment]  # rows of the points in each token, one token after the other, in the order of slots: [S] int64
    row_splits: Tensor  # members of token t are row_splits[t]:row_splits[t + 1], [T + 1] int64


@dataclass(frozen=True, kw_only=True)
class VolumeTokenizer:
    """Cuts events into tokens: centrality non-maximum suppression for the centres, a ball query around each, a reduction to few slots.

    Deterministic: the tokens of an event depend on its points and their order alone, not on the batch, the device or the threads.

    Example:
        >>> tokens = VolumeTokenizer(radius=5.0)(points.coord, points.offsets)  # coord in voxels
        >>> tokens.offsets.diff()  # tokens of each event
    """

    radius: float
    """Radius of a token, in the unit of the coordinates; points on the sphere are outside."""
    overlap: float = 0.72
    """Centres are at least 2 * radius * overlap apart (except where lists are cut by max_neighbors)."""
    max_neighbors: int | None = 256
    """Neighbours that the suppression looks at, the first so many of each point by row; None looks at all."""
    seeds: int | None = None
    """Candidates for centres, chosen by farthest-point sampling from the first point; None takes every point."""
    ball_points: int = 256
    """Points that the ball query finds at most, the first by row."""
    slots: int = 32
    """Points a token keeps of those."""
    reduction: Literal["fps", "energy"] = "fps"
    """Which ones: by farthest-point sampling from the first, or those of highest energy (the first column after the coordinates)."""
    full_coverage: bool = False
    """Give every point that is in no token to the nearest one, behind its other points. Tokens may then hold more than `slots`."""

    def __post_init__(self) -> None:
        for key in ("radius", "overlap", "max_neighbors", "seeds", "ball_points", "slots"):
            value = getattr(self, key)
            if value is not None and not value > 0:
                raise ConfigError(f"{key} must be positive, got {value}")
        if self.reduction not in ("fps", "energy"):
            raise unknown_name("reduction", self.reduction, ("fps", "energy"))

    def scaled(self, factor: float) -> VolumeTokenizer:
        """The same tokenizer for coordinates multiplied by ``factor``."""
        return replace(self, radius=self.radius * factor)

    @torch.no_grad()
    def __call__(self, coord: Tensor, offsets: Tensor, energy: Tensor | None = None) -> VolumeTokens:
        """Cut packed events into tokens. Not differentiable.

        Args:
            coord: Positions, ``[M, 3]`` float32 or float64. Voxel indices (whole numbers) make every comparison exact.
            offsets: First row of each event and the end, ``[B + 1]`` int64. An event without finite points has no token.
            energy: ``[M]``, needed for ``reduction="energy"``.

        Raises:
            ValueError: a shape or type is wrong, or the energy is missing.
        """
        if self.reduction == "energy" and energy is None:
            raise ValueError('VolumeTokenizer: reduction="energy" needs the energy of every point, got None')
        return self.members(coord, offsets, *self.choose_centers(coord, offsets), energy)

    def choose_centers(self, coord: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
        """The first half: rows of the points that become centres ``[T]``, and the tokens of each event ``[B + 1]``."""
        distance = 2 * self.radius * self.overlap
        if self.seeds is None:
            kept = ops.centrality_nms(coord, distance, max_neighbors=self.max_neighbors, offsets=offsets)
            return kept.index, kept.offsets
        candidates, candidate_offsets = ops.farthest_point_sample(coord, self.seeds, offsets=offsets)
        rows = torch.where(candidates < 0, torch.nan, coord[candidates].T).T  # -1: an event with fewer finite points
        kept = ops.centrality_nms(rows, distance, max_neighbors=self.max_neighbors, offsets=candidate_offsets)
        return candidates[kept.index], kept.offsets

    def members(self, coord: Tensor, offsets: Tensor, centers: Tensor, center_offsets: Tensor, energy: Tensor | None) -> VolumeTokens:
        """The second half: the points around given centres."""
        ball = ops.ball_query(
            coord[centers], coord, self.radius, self.ball_points, query_offsets=center_offsets, offsets=offsets, mode="first"
        )
        index = ball.index[ball.index >= 0]
        row_splits = ops.offsets_from_lengths(ball.count.clamp(max=self.ball_points))
        if self.reduction == "fps":
            picked, row_splits = ops.farthest_point_sample(coord[index], self.slots, offsets=row_splits)
            index = index[picked]
        elif energy is not None:
            index, row_splits = _highest(index, row_splits, energy[index], self.slots)
        tokens = VolumeTokens(centers, center_offsets, index, row_splits)
        return _cover(tokens, coord, offsets) if self.full_coverage else tokens


TOKENIZERS = {
    "2.5": VolumeTokenizer(radius=2.5, overlap=0.73, ball_points=64, slots=16),
    "5": VolumeTokenizer(radius=5.0),
    "25": VolumeTokenizer(radius=25.0, seeds=256, ball_points=2048, slots=128),
}
"""The published presets, in voxels. The one of radius 25 goes with centres replaced by the mean of their token."""


def _highest(index: Tensor, row_splits: Tensor, energy: Tensor, slots: int) -> tuple[Tensor, Tensor]:
    """The ``slots`` members of each token with most energy, descending; equal ones in order."""
    count = row_splits.diff()
    token = ops.batch_from_offsets(row_splits, index.shape[0])
    order = energy.argsort(descending=True, stable=True)
    order = order[token[order].argsort(stable=True)]
    rank = torch.arange(index.shape[0], device=index.device) - row_splits[token]
    return index[order[rank < slots]], ops.offsets_from_lengths(count.clamp(max=slots))


def _cover(tokens: VolumeTokens, coord: Tensor, offsets: Tensor) -> VolumeTokens:
    """Append the points that are in no token to those of the nearest centre, in order of rows."""
    missing = coord.isfinite().all(1)
    missing[tokens.index] = False
    rows = missing.nonzero()[:, 0]
    before = torch.cat([offsets.new_zeros(1), missing.cumsum(0)])
    nearest = ops.knn(coord[rows], coord[tokens.centers], 1, query_offsets=before[offsets], offsets=tokens.offsets).index[:, 0]
    count = tokens.row_splits.diff()
    owner = torch.cat([ops.batch_from_offsets(tokens.row_splits, tokens.index.shape[0]), nearest])
    index = torch.cat([tokens.index, rows])[owner.argsort(stable=True)]
    return tokens._replace(index=index, row_splits=ops.offsets_from_lengths(count + torch.bincount(nearest, minlength=count.shape[0])))
