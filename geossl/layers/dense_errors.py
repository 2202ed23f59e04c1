"""Errors of dense prediction at each pixel, and their means over a batch: disparity, optical flow, depth and normals.

Errors are in the unit of the truth (pixels, metres, degrees), shares in per cent; an error that equals a threshold is not beyond it. A
prediction that is not a number makes every mean it is part of NaN.

Stereo and flow: the published ones of CroCo v2 (``bad@t``: error above t pixels), and KITTI's ``D1-all`` and ``F1-all``: error above 3
pixels and above 5 % of the truth. The error of flow is the length of the difference (``EPE``); its ``L1err`` adds both components.
Depth: the usual ones since Eigen et al., NeurIPS 2014. Normals: angles.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from geossl.errors import unknown_name

Quantities = dict[str, tuple[Tensor, Tensor]]
"""By name: a number for each pixel and whether the pixel counts, both ``[B, H, W]``."""


def nearest_truth(prediction: Tensor, truth: Tensor) -> Tensor:
    """Return truth of the prediction's size: of four values a pixel (Spring's, twice as many rows and columns), the one nearest to it.

    Args:
        prediction: ``[B, C, H, W]``.
        truth: ``[B, C, H, W]``, returned as it is, or ``[B, C, 2 H, 2 W]``.
    """
    height, width = prediction.shape[2:]
    if tuple(truth.shape[2:]) != (2 * height, 2 * width):
        return truth
    four = truth.unflatten(3, (width, 2)).unflatten(2, (height, 2)).permute(3, 5, 0, 1, 2, 4).flatten(0, 1)  # [4, B, C, H, W]
    distance = (four - prediction).square().sum(2, keepdim=True)  # infinite where unknown
    best = torch.where(distance.isnan(), torch.inf, distance).argmin(0, keepdim=True)
    return four.gather(0, best.expand(1, *four.shape[1:]))[0]


def stereo_errors(prediction: Tensor, truth: Tensor) -> Quantities:
    """Of disparities ``[B, 1, H, W]``."""
    known = truth.isfinite().all(1)
    error = (torch.where(known[:, None], truth, 0.0) - prediction).abs()[:, 0]
    found = {"L1err": (error, known), "squared": (error.square(), known)}
    found |= {f"bad@{limit:.1f}": _share(error > limit, error, known) for limit in (0.5, 1.0, 2.0, 3.0)}
    return found | {"D1-all": _share((error > 3) & (error > 0.05 * truth[:, 0].abs()), error, known)}


def flow_errors(prediction: Tensor, truth: Tensor) -> Quantities:
    """Of flow ``[B, 2, H, W]`` (x, y)."""
    known = truth.isfinite().all(1)
    truth = torch.where(known[:, None], truth, 0.0)
    difference = truth - prediction
    error, speed = difference.square().sum(1).sqrt(), truth.square().sum(1).sqrt()
    found = {"EPE": (error, known), "L1err": (difference.abs().sum(1), known)}
    found |= {f"bad@{limit:.1f}": _share(error > limit, error, known) for limit in (0.5, 1.0, 3.0, 5.0)}
    found["F1-all"] = _share((error > 3) & (error > 0.05 * speed), error, known)
    slow, fast = speed < 10, speed >= 40
    return found | {"s0-10": (error, known & slow), "s10-40": (error, known & ~slow & ~fast), "s40+": (error, known & fast)}


def depth_errors(prediction: Tensor, truth: Tensor) -> Quantities:
    """Of depths ``[B, 1, H, W]``; truth that is not positive is unknown. ``delta<k>``: larger over smaller depth below 1.25^k."""
    known = (truth.isfinite() & (truth > 0))[:, 0]
    truth = torch.where(known, truth[:, 0], 1.0)
    guess = prediction[:, 0]
    ratio = torch.where(guess > 0, torch.maximum(guess / truth, truth / guess), torch.inf)
    found = {"absrel": ((guess - truth).abs() / truth, known), "squared": ((guess - truth).square(), known)}
    return found | {f"delta{k}": _share(ratio < 1.25**k, guess, known) for k in (1, 2, 3)}


def normals_errors(prediction: Tensor, truth: Tensor) -> Quantities:
    """Of normals ``[B, 3, H, W]`` of any length but 0: the angle between them in degrees."""
    known = truth.isfinite().all(1) & (truth != 0).any(1)
    unit = F.normalize(torch.where(known[:, None], truth, 1.0).double(), dim=1)
    guess = F.normalize(prediction.double(), dim=1)
    # The arc tangent tells small angles apart, which the arc cosine does not.
    angle = torch.rad2deg(torch.atan2(torch.linalg.cross(guess, unit, dim=1).norm(dim=1), (guess * unit).sum(1)))
    found = {"mean_angle": (angle, known)}
    return found | {f"within{limit:g}": _share(angle < limit, angle, known) for limit in (11.25, 22.5, 30.0)}


ERRORS: dict[str, Callable[[Tensor, Tensor], Quantities]] = {
    "stereo": stereo_errors,
    "flow": flow_errors,
    "depth": depth_errors,
    "normals": normals_errors,
}
"""What is measured at each pixel, by task."""

CHANNELS = {"stereo": 1, "flow": 2, "depth": 1, "normals": 3}
"""Numbers that each task predicts for a pixel."""

_BATCH_NAMES = {
    "stereo": {"L1err": "avgerr", "rmse": "rmse", **{f"bad@{t}": f"bad@{t}" for t in ("0.5", "1.0", "2.0", "3.0")}},
    "flow": {"EPE": "EPE", "L1err": "L1err", **{f"bad@{t}": f"bad@{t}" for t in ("1.0", "3.0", "5.0")}},
}
"""Published names of the scores of a batch, where they differ from those of a data set."""


def pixel_sums(kind: str, prediction: Tensor, truth: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Add the errors of a batch up, image by image.

    Args:
        kind: A key of :data:`ERRORS`.
        prediction: ``[B, C, H, W]``.
        truth: Like it, not finite where unknown.

    Returns:
        By name: the sum over the pixels that count, and how many those are; both ``[B]`` float64.

    Raises:
        UnknownNameError: there is no such task.
        ValueError: the shapes are wrong.
    """
    if kind not in ERRORS:
        raise unknown_name("dense task", kind, ERRORS)
    if prediction.shape != truth.shape or truth.dim() != 4 or truth.shape[1] != CHANNELS[kind]:
        raise ValueError(
            f"scores of {kind}: prediction and truth must be [B, {CHANNELS[kind]}, H, W], got {list(prediction.shape)} and "
            f"{list(truth.shape)}"
        )
    return {
        name: (torch.where(known, values.double(), 0.0).sum((1, 2)), known.double().sum((1, 2)))
        for name, (values, known) in ERRORS[kind](prediction.float(), truth.float()).items()
    }


def batch_scores(kind: str, prediction: Tensor, truth: Tensor) -> dict[str, Tensor]:
    """Scores of a batch: of each image by itself, then the mean over the images with truth; NaN where there is none.

    This is what is shown during training. A data set is scored by :class:`geossl.evaluation.DenseMeter`, where every pixel counts alike.

    Args:
        kind: A key of :data:`ERRORS`.
        prediction: ``[B, C, H, W]``.
        truth: Like it, not finite where unknown.

    Returns:
        Scalars float64 on the device of the prediction, by their published names; no device is waited for.
    """
    found = {}
    for name, (total, count) in pixel_sums(kind, prediction, truth).items():
        each = total / count.clamp(min=1)
        each = each.sqrt() if name == "squared" else each
        found["rmse" if name == "squared" else name] = torch.where(count > 0, each, 0.0).sum() / (count > 0).sum()
    names = _BATCH_NAMES.get(kind, {name: name for name in found})
    return {names[name]: value for name, value in found.items() if name in names}


def _share(which: Tensor, value: Tensor, known: Tensor) -> tuple[Tensor, Tensor]:
    """A share in per cent, as a number for each pixel; NaN where ``value``, which was compared, is: no comparison is true of it."""
    return torch.where(value.isnan(), torch.nan, 100.0 * which), known
