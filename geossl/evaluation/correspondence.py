"""Which patch of one picture is which place in another, read off the attention between them without training for it.

A decoder that completes one view from another has to look up where things are in it; An et al., "Cross-View Completion Models are
Zero-shot Correspondence Estimators", CVPR 2025 (arXiv 2412.09072), read that out of CroCo's cross-attention.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

THRESHOLDS = (0.5, 1.0, 2.0)
"""Errors up to which a match counts as right, in patches."""


class Matches(NamedTuple):
    """For every patch of a picture, its place in the other one."""

    source: Tensor  # [N, 2], centres of the patches, (x, y) in pixels, the first pixel spans 0 to 1
    target: Tensor  # [N, 2], where they are in the other picture, in its pixels
    weight: Tensor  # [N], attention that the place and its neighbours get, 0..1


def match_patches(attention: Tensor, grid: tuple[int, int], patch: int) -> Matches:
    """Turn attention into matches: the patch that is looked at most, and the centre of gravity of the attention around it.

    Args:
        attention: How much each patch of the picture (rows) looks at each patch of the other (columns), ``[h * w, h * w]``, not negative;
            means over heads and blocks do well.
        grid: ``(h, w)``, patches of both pictures.
        patch: Pixels of a patch's side.

    Raises:
        ValueError: the attention does not belong to the grid.
    """
    rows, columns = grid
    count = rows * columns
    if tuple(attention.shape) != (count, count):
        raise ValueError(
            f"match_patches: attention must be [{count}, {count}] for a grid of {rows} x {columns}, got {list(attention.shape)}"
        )
    centers = _centers(rows, columns, attention)
    best = attention.argmax(1)
    near = ((centers[best][:, None] - centers).abs() <= 1).all(2)  # the best patch and the eight around it
    weight = torch.where(near, attention, 0.0)
    total = weight.sum(1)
    # A patch that looks at nothing at all is taken to be where the best one is: its first.
    target = torch.where(total[:, None] > 0, weight @ centers / total.clamp(min=1e-30)[:, None], centers[best])
    return Matches(centers * patch, target * patch, total)


class MatchScores(NamedTuple):
    """How good the matches of one or more pairs are, over the patches whose true place is known and inside the other picture."""

    median_error: float  # pixels
    within: dict[float, float]  # share of matches with an error of at most so many patches
    patches: int  # that were scored


def score_matches(matches: Matches | Sequence[Matches], flow: Tensor | Sequence[Tensor], patch: int) -> MatchScores:
    """Compare matches with the truth.

    Args:
        matches: Of one pair, or of several.
        flow: For each pair where every pixel of the first picture goes, ``[2, H, W]`` (x, y) in pixels, not finite where unknown. A patch
            is scored by the mean over its pixels where at least half of them are known, and only if it stays inside the picture.
        patch: Pixels of a patch's side.
    """
    pairs = [matches] if isinstance(matches, Matches) else list(matches)
    flows = [flow] if isinstance(flow, Tensor) else list(flow)
    errors = []
    for found, truth in zip(pairs, flows, strict=True):
        known = truth.isfinite().all(0)
        count = _per_patch(known.to(truth.dtype), patch)
        shift = torch.stack([_per_patch(torch.where(known, part, 0.0), patch) for part in truth], 1) / count.clamp(min=1)[:, None]
        wanted = found.source + shift
        size = wanted.new_tensor([truth.shape[2], truth.shape[1]])
        scored = (count >= 0.5 * patch * patch) & ((wanted >= 0) & (wanted < size)).all(1)
        errors.append((found.target - wanted)[scored].norm(dim=1))
    error = torch.cat(errors) if errors else torch.zeros(0)
    within = {limit: (error <= limit * patch).double().mean().item() if len(error) else float("nan") for limit in THRESHOLDS}
    return MatchScores(error.median().item() if len(error) else float("nan"), within, len(error))


def stay_put(grid: tuple[int, int], patch: int) -> Matches:
    """The matches of a picture with itself: what a method that knows nothing would say, and the baseline of every score."""
    centers = _centers(*grid, torch.zeros(())) * patch
    return Matches(centers, centers, torch.zeros(len(centers)))


def _centers(rows: int, columns: int, like: Tensor) -> Tensor:
    y, x = (torch.arange(count, dtype=like.dtype, device=like.device) + 0.5 for count in (rows, columns))
    return torch.stack(torch.meshgrid(x, y, indexing="xy"), -1).flatten(0, 1)


def _per_patch(values: Tensor, patch: int) -> Tensor:
    """Sums ``[h * w]`` over the patches of ``values [H, W]``."""
    height, width = (side // patch for side in values.shape)
    return values[: height * patch, : width * patch].unflatten(0, (height, patch)).unflatten(2, (width, patch)).sum((1, 3)).flatten()
