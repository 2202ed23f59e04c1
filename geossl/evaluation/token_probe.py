"""The token probe of PoLAr-MAE: linear SVMs that tell which classes of particles a token's points belong to.

Paper: Young, Jwa, Terao, arXiv 2502.02558, evaluation section. Every token of an unmasked event is a sample with several labels: class c
is present where one of its points is of class c. Features are reduced to 128 principal components of the training tokens; one linear SVM a
class, balanced, is fitted on the first 15,000 tokens of the training part and scored on the first 15,000 of the other one.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from geossl import ops
from geossl.config import require
from geossl.data import build_loader
from geossl.errors import DataError
from geossl.evaluation.baselines import calibrate_batchnorm, random_twin
from geossl.evaluation.features import device_of, frozen
from geossl.geometry import PointBatch

TOKEN_BASELINES = {
    "always": "every class said to be present in every token",
    "hand_made": "hand-made description of the token, 16 numbers, standardised",
    "random_uncalibrated": "random weights, BatchNorm statistics untouched (the published comparison)",
    "random": "random weights, BatchNorm statistics calibrated on the training set",
}
BAR = "random"


@dataclass(frozen=True, kw_only=True)
class TokenProbeProtocol:
    """The constants of the token probe. The defaults are the published ones."""

    tokens: int = 15_000
    """Tokens of each part, in the order of the data set."""
    components: int = 128
    """Principal components kept (fewer where the features have fewer)."""
    svm_c: float = 0.005
    """Inverse regularisation of the SVMs."""
    batch_size: int = 4
    """Events per forward pass. With a backbone whose norms are batch-wide it changes the result a little."""
    calibration_batches: int = 30
    """Batches that the BatchNorm statistics of the random encoder are calibrated with."""

    def __post_init__(self) -> None:
        for key in ("tokens", "components", "batch_size", "calibration_batches"):
            require(getattr(self, key) >= 1, key, "must be at least 1", getattr(self, key))
        require(self.svm_c > 0, "svm_c", "must be > 0", self.svm_c)


@dataclass(frozen=True)
class TokenSet:
    """Tokens with what they are probed for.

    Args:
        values: Features, ``[n, D]`` float32.
        present: Whether a token has points of each class, ``[n, K]`` bool.
        described: Hand-made description, ``[n, 16]`` float32, see :func:`describe_groups`.
    """

    values: np.ndarray
    present: np.ndarray
    described: np.ndarray


@dataclass(frozen=True)
class TokenProbeScore:
    """How well the classes present in a token are found; all in [0, 1].

    Args:
        precision: Right among the tokens said to have the class, ``[K]``; 0 where none is said to.
        recall: Found among the tokens that have it, ``[K]``.
        f1: Harmonic mean of both, ``[K]``. All three are NaN for a class that no probed token has.
        share: Tokens that have the class, ``[K]``.
    """

    precision: np.ndarray
    recall: np.ndarray
    f1: np.ndarray
    share: np.ndarray

    @property
    def macro_f1(self) -> float:
        """Mean F1 over the classes that occur."""
        return float(np.nanmean(self.f1)) if not np.isnan(self.f1).all() else float("nan")

    def to_json(self) -> dict[str, Any]:
        """Plain numbers and lists, None for NaN."""
        columns = {name: getattr(self, name) for name in ("precision", "recall", "f1", "share")}
        plain = {name: [None if np.isnan(x) else round(float(x), 6) for x in values] for name, values in columns.items()}
        return {"macro_f1": None if np.isnan(self.macro_f1) else self.macro_f1, **plain}


def describe_groups(points: Tensor, row_splits: Tensor) -> Tensor:
    """Describe every group of points by simple numbers: what a probe can tell without any network.

    Args:
        points: ``[S, 4]``: position relative to the group's centre, energy; groups in turn.
        row_splits: ``[T + 1]`` int64.

    Returns:
        ``[T, 16]`` float32: number of points / 32; mean, deviation, least and most energy; mean position (3), standard deviations along
        the principal axes (3, ascending), moments of energy with position (3), mean and largest distance from the centre.
    """
    of = ops.batch_from_offsets(row_splits, points.shape[0])

    def reduced(values: Tensor, kind: Literal["mean", "min", "max"] = "mean") -> Tensor:
        return ops.segment_reduce(values, row_splits, kind)

    place, energy = points[:, :3].float(), points[:, 3:4].float()
    center, level = reduced(place), reduced(energy)
    away, excess = place - center[of], energy - level[of]
    covariance = reduced((away[:, :, None] * away[:, None, :]).flatten(1)).view(-1, 3, 3)
    spread = torch.linalg.eigvalsh(covariance).clamp(min=0).sqrt()
    distance = place.norm(dim=1, keepdim=True)
    parts = [row_splits.diff()[:, None] / 32, level, reduced(excess.square()).sqrt(), reduced(energy, "min"), reduced(energy, "max")]
    parts += [center, spread, reduced(away * excess), reduced(distance), reduced(distance, "max")]
    return torch.cat(parts, 1)


def classes_present(index: Tensor, row_splits: Tensor, label: Tensor, classes: int) -> Tensor:
    """Mark the classes that occur in each group.

    Args:
        index: Point behind each slot, ``[S]`` rows of ``label``; groups in turn.
        row_splits: ``[T + 1]`` int64.
        label: Class of each point, ``[M]``, -1 for none.
        classes: K.

    Returns:
        ``[T, K]`` bool.
    """
    of = ops.batch_from_offsets(row_splits, index.shape[0])
    found = label[index]
    present = torch.zeros(row_splits.shape[0] - 1, classes, dtype=torch.bool, device=index.device)
    present[of[found >= 0], found[found >= 0]] = True
    return present


def probe_tokens(
    train: np.ndarray, train_present: np.ndarray, test: np.ndarray, test_present: np.ndarray, protocol: TokenProbeProtocol
) -> TokenProbeScore:
    """Fit one SVM for each class on training tokens and score it on others.

    Args:
        train: Features, ``[n, D]``.
        train_present: ``[n, K]`` bool.
        test: ``[m, D]``.
        test_present: ``[m, K]`` bool.
        protocol: The constants.

    Raises:
        DataError: a feature is not finite.
    """
    from sklearn.decomposition import PCA
    from sklearn.svm import LinearSVC

    for values in (train, test):
        if not np.isfinite(values).all():
            raise DataError("token probe: a feature is NaN or infinite; the encoder has diverged or was given such points")
    pca = PCA(min(protocol.components, *train.shape), svd_solver="full").fit(train)
    train, test = pca.transform(train), pca.transform(test)
    predicted = np.zeros(test_present.shape, dtype=bool)
    for number in range(train_present.shape[1]):
        target = train_present[:, number]
        if target.all() or not target.any():  # nothing to separate
            predicted[:, number] = target[0]
        else:
            model = LinearSVC(C=protocol.svm_c, class_weight="balanced", dual=False, random_state=0)
            predicted[:, number] = model.fit(train, target).predict(test)
    return presence_score(predicted, test_present)


def presence_score(predicted: np.ndarray, present: np.ndarray) -> TokenProbeScore:
    """Score predicted presences ``[m, K]`` bool against the true ones."""
    right, said, true = (predicted & present).sum(0), predicted.sum(0), present.sum(0)

    def share(of: np.ndarray) -> np.ndarray:
        return np.where(true > 0, right / np.maximum(of, 1), np.nan)

    return TokenProbeScore(share(said), share(true), np.where(true > 0, 2 * right / np.maximum(said + true, 1), np.nan), present.mean(0))


class TokenProber:
    """Probes the tokens of volume backbones on events whose points have classes. Baselines are computed once and remembered.

    Args:
        train: Training part of a data set of events.
        test: The part to score on.
        protocol: The constants; None for the published ones.

    Raises:
        DataError: a part is empty or its points have no classes.

    Example:
        >>> events = geossl.data.DATASETS.config("lartpc")
        >>> prober = TokenProber(events.build("train"), events.build("val"))
        >>> prober.probe(geossl.load("runs/mine")).macro_f1
    """

    best = "token_f1"
    """The score of :meth:`quick` that tells which checkpoint is the best."""

    def __init__(self, train: Any, test: Any, *, protocol: TokenProbeProtocol | None = None) -> None:
        self.parts = [train, test]
        self.protocol = protocol or TokenProbeProtocol()
        self.classes = list(train.classes)
        for part in self.parts:
            if not has_point_labels(part):
                raise DataError(
                    f"token probe: the points of {part.config.name} have no classes, or there is no event; use a labelled data set"
                )
        self._seen: list[list[PointBatch]] = [[], []]
        self._unseen = [self._open(part) for part in self.parts]
        self._sets: dict[tuple[str, int], dict[str, TokenProbeScore]] = {}

    def tokens(self, backbone: nn.Module, part: int) -> TokenSet:
        """Encode the first events of a part (0 training, 1 test), as many as the wanted tokens need."""
        device, rows = device_of(backbone), 0
        columns: list[tuple[Tensor, Tensor, Tensor]] = []
        with frozen(backbone):
            for batch in self._batches(part):
                groups = backbone.group(batch.points.to(device))  # type: ignore[operator]
                present = classes_present(groups.index, groups.row_splits, batch.point_label.to(device), len(self.classes))  # type: ignore[union-attr]
                described = describe_groups(groups.points, groups.row_splits)
                columns.append((backbone.encode(groups).float().cpu(), present.cpu(), described.cpu()))  # type: ignore[operator]
                rows += present.shape[0]
                if rows >= self.protocol.tokens:
                    break
        return TokenSet(*(torch.cat(column)[: self.protocol.tokens].numpy() for column in zip(*columns, strict=True)))

    def probe(self, backbone: nn.Module) -> TokenProbeScore:
        """Score the frozen ``backbone``."""
        train, test = (self.tokens(backbone, part) for part in (0, 1))
        return probe_tokens(train.values, train.present, test.values, test.present, self.protocol)

    def baselines(self, backbone: nn.Module, seed: int = 0) -> dict[str, TokenProbeScore]:
        """Score each of ``TOKEN_BASELINES``; the second call for the same architecture and seed is free.

        Args:
            backbone: Its architecture is what the random encoders take over; its weights are not looked at.
            seed: Initialisation of the random encoders and order of the calibration batches.
        """
        key = (repr(backbone.config), seed)
        if key not in self._sets:
            twin = random_twin(backbone, seed)
            sets = [self.tokens(twin, part) for part in (0, 1)]
            present = [part.present for part in sets]
            center, spread = sets[0].described.mean(0), sets[0].described.std(0).clip(1e-6)
            described = [(part.described - center) / spread for part in sets]
            scores = {
                "always": presence_score(np.ones_like(present[1]), present[1]),
                "hand_made": probe_tokens(described[0], present[0], described[1], present[1], self.protocol),
                "random_uncalibrated": probe_tokens(sets[0].values, present[0], sets[1].values, present[1], self.protocol),
            }
            calibrate_batchnorm(
                twin, self.parts[0], batches=self.protocol.calibration_batches, batch_size=self.protocol.batch_size, seed=seed
            )
            self._sets[key] = {**scores, "random": self.probe(twin)}
        return self._sets[key]

    def quick(self, backbone: nn.Module) -> dict[str, float]:
        """Scores for a log: ``token_f1`` (macro) and ``token_f1_<class>``; classes that do not occur are left out."""
        score = self.probe(backbone)
        scores = {"token_f1": score.macro_f1, **{f"token_f1_{name}": float(x) for name, x in zip(self.classes, score.f1, strict=True)}}
        return {name: value for name, value in scores.items() if np.isfinite(value)}

    def summary(self, backbone: nn.Module, seed: int = 0, **about: Any) -> dict[str, Any]:
        """Probe ``backbone`` and every baseline; one JSON object that holds all a reader needs, ``about`` included."""
        score, baselines = self.probe(backbone), self.baselines(backbone, seed)
        return {
            **about,
            "kind": "tokens",
            "protocol": asdict(self.protocol),
            "classes": self.classes,
            "score": score.to_json(),
            "baselines": {name: baselines[name].to_json() for name in TOKEN_BASELINES},
            "baselines_about": TOKEN_BASELINES,
            "verdict": {"macro_f1": score.macro_f1, "bar": baselines[BAR].macro_f1, "lead": score.macro_f1 - baselines[BAR].macro_f1},
        }

    def _open(self, part: Any) -> Iterator[PointBatch]:
        size = min(self.protocol.batch_size, len(part))
        return build_loader(part, size, seed=0, shuffle=False, drop_last=False, augment=False).one_pass()

    def _batches(self, part: int) -> Iterator[PointBatch]:
        """The batches of a part in the order of the data set; each is read once and kept, since every probe sees the same first ones."""
        seen = self._seen[part]
        for number in itertools.count():
            if number == len(seen):
                batch = next(self._unseen[part], None)
                if batch is None:
                    return
                seen.append(batch)
            yield seen[number]


def has_point_labels(dataset: Any) -> bool:
    """Whether the points of a data set have classes (then clouds are segmented and tokens probed, instead of whole clouds)."""
    return len(dataset) > 0 and bool(dataset.classes) and dataset.get(0, None).point_label is not None


def token_table(summary: dict[str, Any]) -> Any:
    """Return a rich table of a summary: a line for each baseline and one for the encoder, F1 of each class and their mean."""
    from rich.table import Table

    protocol = summary["protocol"]
    table = Table(
        title=f"F1 in %: linear SVM on tokens, is the class present (PCA {protocol['components']}, C {protocol['svm_c']}, "
        f"{protocol['tokens']:,} tokens)",
        title_justify="left",
    )
    table.add_column("features")
    for name in (*summary["classes"], "macro"):
        table.add_column(name, justify="right")
    rows = [*summary["baselines"].items(), ("encoder", summary["score"])]
    for name, score in rows:
        cells = ["-" if x is None else f"{100 * x:.1f}" for x in (*score["f1"], score["macro_f1"])]
        table.add_row(name, *cells, style="bold" if name == "encoder" else None, end_section=name == rows[-2][0])
    table.add_row("(share of tokens)", *("-" if x is None else f"{100 * x:.1f}" for x in summary["score"]["share"]), "")
    table.caption = "\n".join(f"{name}: {text}" for name, text in summary["baselines_about"].items())
    table.caption_justify = "left"
    return table
