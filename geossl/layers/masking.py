"""Which tokens a masked autoencoder hides. All masks are bool, True where a token is hidden, packed like the tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from geossl.layers.attention import Segments
from geossl.layers.sampling import BatchRandom


def hidden_counts(segments: Segments, ratio: float) -> list[int]:
    """Hidden tokens of each sample: ``int(ratio * tokens)``, the published rounding, but at least one token stays visible."""
    return [min(int(ratio * n), max(n - 1, 0)) for n in segments.lengths]


def _hide_lowest(score: Tensor, segments: Segments, ratio: float) -> Tensor:
    """Hide the tokens with the lowest ``score [B, Tmax]`` of each sample (ties: the lower index); returns ``[T]`` bool."""
    device = score.device
    rank = score.argsort(dim=1, stable=True).argsort(dim=1)
    hidden = rank < torch.tensor(hidden_counts(segments, ratio), device=device)[:, None]
    real = torch.arange(score.shape[1], device=device) < torch.tensor(segments.lengths, device=device)[:, None]
    return hidden[real]


def random_mask(
    segments: Segments, ratio: float, random: BatchRandom, device: torch.device | str = "cpu", *, ragged: bool = False
) -> Tensor:
    """Hide ``int(ratio * tokens)`` random tokens of each sample (Point-MAE, "rand").

    Args:
        segments: Tokens of each sample.
        ratio: Share to hide, 0 <= ratio < 1.
        random: Source of the draws.
        device: Where the mask is wanted.
        ragged: Draw for each sample apart, so that its mask does not depend on the longest sample it shares a batch with. (False gives
            the masks that earlier Point-MAE runs drew, whose samples all have as many tokens.)

    Returns:
        ``[T]`` bool, packed like the tokens.
    """
    longest = max(segments.lengths, default=0)
    if ragged:
        score = torch.zeros(len(segments.lengths), longest, device=device)
        score[~_beyond(segments, longest, device)] = random.rows(segments.lengths).to(device)
    else:
        score = random.rand(longest, device=device)
    score = score.masked_fill(_beyond(segments, longest, device), torch.inf)
    return _hide_lowest(score, segments, ratio)


def weighted_mask(log_weight: Tensor, segments: Segments, ratio: float, random: BatchRandom) -> Tensor:
    """Keep tokens visible by chance in proportion to their weights, and hide ``int(ratio * tokens)`` of each sample (I2P-MAE, section 3.3).

    The visible ones are drawn one after the other without putting back, as ``multinomial`` does: the largest of the sums of logarithm and
    Gumbel noise. The mask of a sample does not depend on the samples it shares a batch with.

    Args:
        log_weight: Logarithm of each token's weight, up to a constant of its sample, ``[T]`` floating point, packed by ``segments``.
        segments: Tokens of each sample.
        ratio: Share to hide, 0 <= ratio < 1.
        random: Source of the draws.

    Returns:
        ``[T]`` bool.
    """
    device = log_weight.device
    gumbel = -(-random.rows(segments.lengths).log()).log()
    beyond = _beyond(segments, max(segments.lengths, default=0), device)
    score = torch.full(beyond.shape, torch.inf, device=device)
    score[~beyond] = log_weight.float() + gumbel.to(device)
    return _hide_lowest(score, segments, ratio)


def block_mask(centers: Tensor, segments: Segments, ratio: float, random: BatchRandom) -> Tensor:
    """Hide one contiguous block: a random centre and the centres nearest to it (Point-BERT and Point-MAE, "block").

    Args:
        centers: ``[T, 3]`` packed by ``segments``.
        segments: Tokens of each sample.
        ratio: Share to hide, 0 <= ratio < 1.
        random: Source of the draw of the central token.

    Returns:
        ``[T]`` bool.
    """
    longest = max(segments.lengths, default=0)
    beyond = _beyond(segments, longest, centers.device)
    padded = centers.new_zeros(len(segments.lengths), longest, 3)
    padded[~beyond] = centers
    lengths = torch.tensor(segments.lengths, device=centers.device)
    chosen = (random.rand(device=centers.device) * lengths).long().clamp(max=(lengths - 1).clamp(min=0))
    distance = (padded - padded[torch.arange(len(lengths), device=centers.device), chosen][:, None]).square().sum(-1)
    return _hide_lowest(distance.masked_fill(beyond, torch.inf), segments, ratio)


def _beyond(segments: Segments, longest: int, device: torch.device | str) -> Tensor:
    """``[B, longest]`` bool, True past the end of a sample."""
    return torch.arange(longest, device=device) >= torch.tensor(segments.lengths, device=device)[:, None]
