"""Probing an encoder on a data set, with baselines beside every result."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from torch import nn

from geossl.errors import DataError
from geossl.evaluation.baselines import BASELINES, calibrate_batchnorm, random_twin
from geossl.evaluation.descriptors import shape_descriptor
from geossl.evaluation.features import Pooling, embed
from geossl.evaluation.probes import Features, ProbeProtocol, ProbeScore, majority_score, probe
from geossl.evaluation.token_probe import TokenProber


class Prober:
    """Probes encoders on one labelled data set. Baselines are computed once per architecture and seed, then remembered.

    Args:
        train: Training part of a geossl data set with classes; its unlabelled clouds serve to calibrate BatchNorm only.
        test: Official test part, or None where the data has no official split. Group numbers are shared by both parts.
        protocol: Constants of the probes; None for the project's own.
        layers: Blocks to read, see :func:`geossl.evaluation.features.read_tokens`.
        pooling: How tokens become one vector.
        points: Points per cloud, a prefix of the stored farthest-point order; None for all stored.
        batch_size: Clouds per forward pass.
        teacher: A 2D model whose features of the points are one more baseline, see :class:`geossl.models.TeacherPoints`.

    Raises:
        DataError: the data set has no classes or no labelled cloud.

    Example:
        >>> objects = geossl.data.DATASETS.config("objects")
        >>> prober = Prober(objects.build("train"), objects.build("test"))
        >>> for score in prober.probe(geossl.load("runs/mine/export")):
        ...     print(score.probe, score.official, score.mean, score.std)
    """

    best = "svm"
    """The score of :meth:`quick` that tells which checkpoint is the best."""

    def __init__(
        self,
        train: Any,
        test: Any | None = None,
        *,
        protocol: ProbeProtocol | None = None,
        layers: int | Sequence[int] | None = None,
        pooling: Pooling = "mean_max",
        points: int | None = None,
        batch_size: int = 32,
        teacher: nn.Module | None = None,
    ) -> None:
        self.teacher = teacher
        self.parts = [train] if test is None else [train, test]
        self.protocol = protocol or ProbeProtocol()
        self.layers, self.pooling, self.points, self.batch_size = layers, pooling, points, batch_size
        self.rows = [np.flatnonzero(np.asarray(part.labels) >= 0) for part in self.parts]
        if not list(train.classes) or not any(len(rows) for rows in self.rows):
            raise DataError("the data set has no labelled cloud, so there is nothing to probe; choose one with classes, such as 'objects'")
        self._fixed: dict[str, list[ProbeScore]] = {}
        self._random: dict[tuple[str, int], dict[str, list[ProbeScore]]] = {}

    def features(self, backbone: nn.Module) -> Features:
        """Embed the labelled clouds of both parts, training part first. Layers are blocks of a 3D encoder: a teacher has none."""
        return self._with_labels(
            [
                embed(
                    backbone,
                    part,
                    rows=rows,
                    layers=None if backbone is self.teacher else self.layers,
                    pooling=self.pooling,
                    points=self.points,
                    batch_size=self.batch_size,
                )
                for part, rows in zip(self.parts, self.rows, strict=True)
                if len(rows)
            ]
        )

    def probe(self, backbone: nn.Module) -> list[ProbeScore]:
        """Score the frozen ``backbone`` with every probe of the protocol."""
        return probe(self.features(backbone), self.protocol)

    def baselines(self, backbone: nn.Module, seed: int = 0) -> dict[str, list[ProbeScore]]:
        """Score each of :data:`geossl.evaluation.BASELINES`; the second call for the same architecture and seed is free.

        Args:
            backbone: Its architecture is what the random encoders take over; its weights are not looked at.
            seed: Initialisation of the random encoders and order of the calibration batches.
        """
        if not self._fixed:
            pairs = [(part, rows) for part, rows in zip(self.parts, self.rows, strict=True) if len(rows)]
            descriptors = self._with_labels(
                [np.stack([shape_descriptor(part.get(int(row), None).points[: self.points]) for row in rows]) for part, rows in pairs]
            )
            self._fixed = {"majority": [majority_score(descriptors, self.protocol)], "shape_histogram": probe(descriptors, self.protocol)}
            if self.teacher is not None:
                self._fixed["teacher"] = self.probe(self.teacher)
        key = (repr(backbone.config), seed)
        if key not in self._random:
            twin = random_twin(backbone, seed)
            uncalibrated = self.probe(twin)
            calibrate_batchnorm(twin, self.parts[0], points=self.points, seed=seed)
            self._random[key] = {"random_uncalibrated": uncalibrated, "random": self.probe(twin)}
        scores = {**self._fixed, **self._random[key]}
        return {name: scores[name] for name in BASELINES if name in scores}

    def quick(self, backbone: nn.Module) -> dict[str, float]:
        """Scores for a log: linear SVM with fixed C on the resplits (``svm``, ``svm_std``) and, where there is one, the official split."""
        (score,) = probe(self.features(backbone), replace(self.protocol, probes=("svm",)))
        result = {"svm": score.mean, "svm_std": score.std}
        return result if score.official is None else {**result, "svm_official": score.official}

    def _with_labels(self, values: list[np.ndarray]) -> Features:
        parts = [(part, rows) for part, rows in zip(self.parts, self.rows, strict=True) if len(rows)]
        return Features(
            values=np.concatenate(values),
            labels=np.concatenate([np.asarray(part.labels, np.int64)[rows] for part, rows in parts]),
            groups=np.concatenate([np.asarray(part.groups, np.int64)[rows] for part, rows in parts]),
            test=np.concatenate([np.full(len(rows), part is not self.parts[0]) for part, rows in parts]),
            classes=list(self.parts[0].classes),
        )


def quick_probe(module: nn.Module, prober: Prober | TokenProber) -> dict[str, float]:
    """Probe a method in the middle of its training, in a few seconds.

    Args:
        module: A pretraining method (its ``backbone`` is probed) or a backbone.
        prober: Holds the data; make it once and keep it.

    Returns:
        What :meth:`Prober.quick` or :meth:`geossl.evaluation.TokenProber.quick` says, all in [0, 1].
    """
    return prober.quick(getattr(module, "backbone", module))
