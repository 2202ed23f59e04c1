"""What every probe number is compared with: chance, a hand-made descriptor, and the same encoder before any training.

A randomly initialised encoder with BatchNorm is a strong baseline once its running statistics have seen data, and a misleadingly
weak one before; both are reported, the calibrated one is the bar.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

from geossl.errors import DataError
from geossl.evaluation.features import device_of, load_points

BASELINES = {
    "majority": "most frequent class",
    "shape_histogram": "hand-made shape descriptor, 71 numbers",
    "random_uncalibrated": "random weights, BatchNorm statistics untouched (misleading: see random)",
    "random": "random weights, BatchNorm statistics calibrated on the training set",
    "teacher": "features of a 2D model in three views, carried to the points, no 3D network",
}
"""In the order of the tables. `teacher` only where one is given."""


def random_twin(backbone: nn.Module, seed: int = 0) -> nn.Module:
    """Build the architecture of ``backbone`` with fresh random weights on the same device, leaving torch's own generator as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        twin: nn.Module = backbone.config.build()  # type: ignore[operator, union-attr]
    return twin.to(device_of(backbone))


def calibrate_batchnorm(
    backbone: nn.Module, dataset: Any, *, batches: int = 30, batch_size: int = 32, points: int | None = None, seed: int = 0
) -> None:
    """Let the BatchNorm running statistics of ``backbone`` see ``dataset``: train-mode forward passes without gradient, in place.

    Args:
        backbone: The encoder; weights do not change. Its mode is put back afterwards.
        dataset: Training part; clouds are drawn without repetition within an epoch, un-augmented.
        batches: Train-mode forward passes. With the usual momentum of 0.1, 30 leave 4 % of the initial statistics.
        batch_size: Clouds per pass (the whole data set where it is smaller).
        points: Points per cloud; None for all.
        seed: Order of the clouds, and drop path.
    """
    if len(dataset) == 0:
        raise DataError("calibrate_batchnorm: the data set is empty")
    device = device_of(backbone)
    batch_size = min(batch_size, len(dataset))
    per_epoch = len(dataset) // batch_size
    rng = np.random.default_rng(seed)
    modes = {child: child.training for child in backbone.modules()}
    backbone.train()
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(seed)
            for step in range(batches):
                if step % per_epoch == 0:
                    order = rng.permutation(len(dataset))
                rows = order[step % per_epoch * batch_size :][:batch_size]
                backbone(load_points(dataset, rows, points, backbone.in_channels).to(device))  # type: ignore[arg-type]
    finally:
        for child, mode in modes.items():
            child.training = mode
