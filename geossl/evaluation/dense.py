"""Scores of dense prediction: disparity, optical flow, depth and normals.

Two forms. :class:`DenseMeter` gathers a whole data set; every pixel with truth counts alike. :func:`batch_scores` is what is shown during
training: every image with truth counts alike. Errors are in the unit of the truth (pixels, metres, degrees), shares in per cent; an error
that equals a threshold is not beyond it. A prediction that is not a number makes every mean it is part of NaN.

Stereo and flow: the published ones of CroCo v2 (``bad@t``: error above t pixels), and KITTI's ``D1-all`` and ``F1-all``: error above 3
pixels and above 5 % of the truth. The error of flow is the length of the difference (``EPE``); its ``L1err`` adds both components.
Depth: the usual ones since Eigen et al., NeurIPS 2014. Normals: angles.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from geossl.data import build_loader
from geossl.errors import DataError, unknown_name
from geossl.evaluation.features import device_of, frozen

Quantities = dict[str, tuple[Tensor, Tensor]]
"""By name: a number for each pixel and whether the pixel counts, both ``[B, H, W]``."""


def stereo_errors(prediction: Tensor, truth: Tensor) -> Quantities:
    """Of disparities ``[B, 1, H, W]``."""
    known = truth.isfinite().all(1)
    error = (torch.where(known[:, None], truth, 0.0) - prediction).abs()[:, 0]
    found = {"L1err": (error, known), "squared": (error.square(), known)}
    found |= {f"bad@{limit:.1f}": _beyond(error > limit, known) for limit in (0.5, 1.0, 2.0, 3.0)}
    return found | {"D1-all": _beyond((error > 3) & (error > 0.05 * truth[:, 0].abs()), known)}


def flow_errors(prediction: Tensor, truth: Tensor) -> Quantities:
    """Of flow ``[B, 2, H, W]`` (x, y)."""
    known = truth.isfinite().all(1)
    truth = torch.where(known[:, None], truth, 0.0)
    difference = truth - prediction
    error, speed = difference.square().sum(1).sqrt(), truth.square().sum(1).sqrt()
    found = {"EPE": (error, known), "L1err": (difference.abs().sum(1), known)}
    found |= {f"bad@{limit:.1f}": _beyond(error > limit, known) for limit in (0.5, 1.0, 3.0, 5.0)}
    found["F1-all"] = _beyond((error > 3) & (error > 0.05 * speed), known)
    slow, fast = speed < 10, speed >= 40
    return found | {"s0-10": (error, known & slow), "s10-40": (error, known & ~slow & ~fast), "s40+": (error, known & fast)}


def depth_errors(prediction: Tensor, truth: Tensor) -> Quantities:
    """Of depths ``[B, 1, H, W]``; truth that is not positive is unknown. ``delta<k>``: larger over smaller depth below 1.25^k."""
    known = (truth.isfinite() & (truth > 0))[:, 0]
    truth = torch.where(known, truth[:, 0], 1.0)
    guess = prediction[:, 0]
    ratio = torch.where(guess > 0, torch.maximum(guess / truth, truth / guess), torch.inf)
    found = {"absrel": ((guess - truth).abs() / truth, known), "squared": ((guess - truth).square(), known)}
    return found | {f"delta{k}": _beyond(ratio < 1.25**k, known) for k in (1, 2, 3)}


def normals_errors(prediction: Tensor, truth: Tensor) -> Quantities:
    """Of normals ``[B, 3, H, W]`` of any length but 0: the angle between them in degrees."""
    known = truth.isfinite().all(1) & (truth != 0).any(1)
    unit = F.normalize(torch.where(known[:, None], truth, 1.0).double(), dim=1)
    guess = F.normalize(prediction.double(), dim=1)
    # The arc tangent tells small angles apart, which the arc cosine does not.
    angle = torch.rad2deg(torch.atan2(torch.linalg.cross(guess, unit, dim=1).norm(dim=1), (guess * unit).sum(1)))
    found = {"mean_angle": (angle, known)}
    return found | {f"within{limit:g}": _beyond(angle < limit, known) for limit in (11.25, 22.5, 30.0)}


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


class DenseMeter:
    """Gathers errors batch by batch; memory does not grow with the number of pixels.

    Args:
        kind: ``stereo``, ``flow``, ``depth`` or ``normals``.

    Example:
        >>> meter = DenseMeter("stereo")
        >>> meter.update(torch.zeros(1, 1, 2, 2), torch.tensor([[[[0.0, 2.0], [4.0, float("inf")]]]]))
        >>> meter.scores()["L1err"]
        2.0
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        _errors_of(kind)
        self._sums: dict[str, float] = {}
        self._counts: dict[str, int] = {}

    def update(self, prediction: Tensor, truth: Tensor) -> None:
        """Count the pixels of a batch.

        Args:
            prediction: ``[B, C, H, W]``.
            truth: Like it, not finite where unknown.

        Raises:
            ValueError: the shapes are wrong.
        """
        for name, (total, count) in _sums(self.kind, prediction, truth).items():
            self._sums[name] = self._sums.get(name, 0.0) + float(total.sum())
            self._counts[name] = self._counts.get(name, 0) + int(count.sum())

    def scores(self) -> dict[str, float]:
        """Scores of all pixels so far; those of flow by speed are 0 where no pixel is so fast, all others NaN without any pixel."""
        found = {}
        for name, total in self._sums.items():
            count = self._counts[name]
            empty = 0.0 if name in ("s0-10", "s10-40", "s40+") else float("nan")
            found["rmse" if name == "squared" else name] = empty if not count else (total / count) ** (0.5 if name == "squared" else 1)
        return found


def batch_scores(kind: str, prediction: Tensor, truth: Tensor) -> dict[str, float]:
    """Scores of a batch: of each image by itself, then the mean over the images with truth; NaN where there is none.

    Args:
        kind: ``stereo``, ``flow``, ``depth`` or ``normals``.
        prediction: ``[B, C, H, W]``.
        truth: Like it, not finite where unknown.
    """
    found = {}
    for name, (total, count) in _sums(kind, prediction, truth).items():
        means = (total / count)[count > 0]
        value = means.sqrt() if name == "squared" else means
        found["rmse" if name == "squared" else name] = float(value.mean()) if len(value) else float("nan")
    names = _BATCH_NAMES.get(kind, {name: name for name in found})
    return {names[name]: value for name, value in found.items() if name in names}


def evaluate_dense(module: Any, dataset: Any, *, batch_size: int = 1) -> dict[str, float]:
    """Score a dense task on the evaluation form of a data set.

    Args:
        module: Has ``config.name`` (stereo, flow, depth or normals) and ``predict(image, reference)``, see :class:`geossl.tasks.Dense`.
        dataset: Gives :class:`geossl.data.ImageSample` with ``truth``. Images may differ in size where ``batch_size`` is 1.
        batch_size: Images per forward pass.

    Returns:
        The scores of :meth:`DenseMeter.scores`.

    Raises:
        DataError: there is no sample, or samples have no truth, or that of another task.
    """
    if not len(dataset):
        raise DataError("evaluate_dense: the data set is empty")
    meter, device = DenseMeter(module.config.name), device_of(module)
    loader = build_loader(dataset, min(batch_size, len(dataset)), seed=0, shuffle=False, drop_last=False, augment=False)
    with frozen(module):
        for batch in loader.one_pass():
            check_truth(module.config.name, batch, dataset.config.name)
            moved = batch.to(device)
            meter.update(module.predict(moved.image, moved.reference).values, moved.truth)
    return meter.scores()


def check_truth(kind: str, batch: Any, source: str) -> None:
    """Check that a batch has what is to be predicted.

    Raises:
        DataError: it has not, or something with other channels; the message names ``source``.
    """
    truth = getattr(batch, "truth", None)
    if truth is None or truth.shape[1] != CHANNELS[kind]:
        found = "no truth" if truth is None else f"truth of {truth.shape[1]} channels"
        raise DataError(f"{source}: task {kind} needs {CHANNELS[kind]} channel(s) of truth a pixel, got {found}; choose data with {kind}")


def _errors_of(kind: str) -> Callable[[Tensor, Tensor], Quantities]:
    if kind not in ERRORS:
        raise unknown_name("dense task", kind, ERRORS)
    return ERRORS[kind]


def _beyond(which: Tensor, known: Tensor) -> tuple[Tensor, Tensor]:
    """A share in per cent, as a number for each pixel."""
    return 100.0 * which, known


def _sums(kind: str, prediction: Tensor, truth: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Of each quantity: sum over the pixels of each image, and their number; both ``[B]`` float64."""
    errors = _errors_of(kind)
    if prediction.shape != truth.shape or truth.dim() != 4 or truth.shape[1] != CHANNELS[kind]:
        raise ValueError(
            f"scores of {kind}: prediction and truth must be [B, {CHANNELS[kind]}, H, W], got {list(prediction.shape)} and "
            f"{list(truth.shape)}"
        )
    found = {}
    for name, (values, known) in errors(prediction.float(), truth.float()).items():
        found[name] = torch.where(known, values.double(), 0.0).sum((1, 2)), known.double().sum((1, 2))
    return found
