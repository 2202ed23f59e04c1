"""Losses of dense prediction. Each takes what a head gives, ``[B, C, H, W]``, and the truth, not finite where unknown.

Stereo and flow: Weinzaepfel et al., "CroCo v2", ICCV 2023, arXiv 2211.10408; the head gives one channel more than the truth has, the
confidence c of each pixel: a Laplace distribution's scale is read from it. Depth: Eigen, Puhrsch, Fergus, "Depth Map Prediction from a
Single Image using a Multi-Scale Deep Network", NeurIPS 2014, arXiv 1406.2283 (scale-invariant logarithm), or the mean absolute difference
of logarithms; the head gives the logarithm. Normals: one minus the cosine.

Pixels without truth count nowhere. Where no pixel has truth the loss is 0, with gradients of 0. All are computed in float32 at least,
autocast or not.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

FARTHEST = 10_000.0
"""Truth from here on is taken for a mistake by the bounded Laplacian loss, as published."""


def laplacian(output: Tensor, truth: Tensor) -> Tensor:
    """``e / exp(c) + c``; e is the absolute difference, summed over the channels."""
    error, scale, valid = _error_and_confidence(output, truth)
    return _mean(error / scale.exp() + scale, valid)


def laplacian_bounded(output: Tensor, truth: Tensor, *, lowest: float = 0.25, highest: float = 4.0) -> Tensor:
    """``e / s + log s`` with s = lowest + (highest - lowest) sigmoid(c); truth of 10,000 or more in any channel does not count."""
    error, confidence, valid = _error_and_confidence(output, truth)
    valid = valid & (truth.abs() < FARTHEST).all(1)
    scale = (highest - lowest) * confidence.sigmoid() + lowest
    return _mean(error / scale + scale.log(), valid)


def laplacian_bounded2(output: Tensor, truth: Tensor, *, bound: float = 3.0, slope: float = 3.0) -> Tensor:
    """``e / exp(s) + s`` with s = 2 bound (sigmoid(c / slope) - 1/2), so that the logarithm of the scale stays within +-bound."""
    error, confidence, valid = _error_and_confidence(output, truth)
    scale = 2 * bound * ((confidence / slope).sigmoid() - 0.5)
    return _mean(error / scale.exp() + scale, valid)


def l1(output: Tensor, truth: Tensor) -> Tensor:
    """Mean absolute difference over the finite entries of the truth (of flow: over pixels and both components)."""
    output = _same_channels(output, truth)
    known = truth.isfinite()
    return _mean((torch.where(known, truth, 0.0) - output).abs(), known)


def scale_invariant_log(output: Tensor, truth: Tensor, *, invariance: float = 0.5) -> Tensor:
    """Mean of g^2 less ``invariance`` times (mean of g)^2, of each image; g is ``log truth - output``. Mean over the images with truth."""
    difference, known = _log_difference(output, truth)
    count = known.sum((1, 2, 3))
    mean = difference.sum((1, 2, 3)) / count.clamp(min=1)
    square = difference.square().sum((1, 2, 3)) / count.clamp(min=1)
    return (square - invariance * mean.square()).sum() / (count > 0).sum().clamp(min=1)


def l1_log(output: Tensor, truth: Tensor) -> Tensor:
    """Mean of ``|log truth - output|``; truth that is not positive counts as unknown."""
    difference, known = _log_difference(output, truth)
    return _mean(difference.abs(), known)


def cosine(output: Tensor, truth: Tensor) -> Tensor:
    """Mean of one minus the cosine between ``output`` and ``truth``, both of any length but 0."""
    output = _same_channels(output, truth)
    known = truth.isfinite().all(1) & (truth != 0).any(1)
    return _mean(1 - F.cosine_similarity(output, torch.where(known[:, None], truth, 1.0), dim=1), known)


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "laplacian": laplacian,
    "laplacian_bounded": laplacian_bounded,
    "laplacian_bounded2": laplacian_bounded2,
    "l1": l1,
    "scale_invariant_log": scale_invariant_log,
    "l1_log": l1_log,
    "cosine": cosine,
}
"""All losses by name."""

WITH_CONFIDENCE = ("laplacian", "laplacian_bounded", "laplacian_bounded2")
"""Those that read a confidence from one more channel."""


def _error_and_confidence(output: Tensor, truth: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Absolute difference summed over channels, confidence, and which pixels have truth; all ``[B, H, W]``."""
    if output.dim() != 4 or output.shape[1] != truth.shape[1] + 1 or output.shape[2:] != truth.shape[2:]:
        raise ValueError(
            f"output must have one channel more than truth (the confidence) and its size, got {list(output.shape)} for {list(truth.shape)}"
        )
    output = _wide(output)
    known = truth.isfinite().all(1)
    error = (torch.where(known[:, None], truth, 0.0) - output[:, :-1]).abs().sum(1)
    return error, output[:, -1], known


def _log_difference(output: Tensor, truth: Tensor) -> tuple[Tensor, Tensor]:
    """``log truth - output``, 0 where unknown, and where it is known; both like ``truth``."""
    output = _same_channels(output, truth)
    known = truth.isfinite() & (truth > 0)
    return torch.where(known, torch.where(known, truth, 1.0).log() - output, 0.0), known


def _same_channels(output: Tensor, truth: Tensor) -> Tensor:
    if output.shape != truth.shape:
        raise ValueError(f"output and truth must have one shape, got {list(output.shape)} and {list(truth.shape)}")
    return _wide(output)


def _wide(output: Tensor) -> Tensor:
    return output.to(torch.promote_types(output.dtype, torch.float32))


def _mean(values: Tensor, valid: Tensor) -> Tensor:
    """Mean of ``values`` where ``valid``; 0 where nothing is. Written with ``where``, which waits for no device."""
    return torch.where(valid, values, 0.0).sum() / valid.sum().clamp(min=1)
