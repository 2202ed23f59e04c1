"""Scores of dense prediction over a data set: disparity, optical flow, depth and normals.

Every pixel with truth counts alike. What is measured is in :mod:`geossl.layers.dense_errors`, beside the form that is shown in training.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from geossl.data import build_loader
from geossl.errors import DataError, unknown_name
from geossl.evaluation.features import device_of, frozen
from geossl.layers.dense_errors import CHANNELS, ERRORS, nearest_truth, pixel_sums


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
        if kind not in ERRORS:
            raise unknown_name("dense task", kind, ERRORS)
        self.kind = kind
        self._sums: dict[str, float] = {}
        self._counts: dict[str, int] = {}

    def update(self, prediction: Tensor, truth: Tensor) -> None:
        """Count the pixels of a batch.

        Args:
            prediction: ``[B, C, H, W]``.
            truth: Like it, not finite where unknown; or twice as high and wide, then a pixel's error is the least of four.

        Raises:
            ValueError: the shapes are wrong.
        """
        for name, (total, count) in pixel_sums(self.kind, prediction, nearest_truth(prediction, truth)).items():
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
