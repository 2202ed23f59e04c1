"""Do tokens attend to their own particle? How well clusters made by attention are the true particles.

PoLAr-MAE's encoder is never told which points one particle left; its attention shows it all the same (Young, Jwa, Terao,
arXiv 2502.02558, the figure on emergent attention). Here that is put in numbers: the tokens of an event are clustered by how much they
attend to each other, and the clusters are compared with the true particles, beside the same clustering by position alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from geossl import ops
from geossl.data import build_loader
from geossl.errors import DataError
from geossl.evaluation.baselines import random_twin
from geossl.evaluation.features import device_of, frozen

Linkage = Literal["average", "single"]
LINKAGES: tuple[Linkage, ...] = ("average", "single")


def token_instances(index: Tensor, row_splits: Tensor, instance: Tensor) -> Tensor:
    """The particle that most points of each group belong to.

    Args:
        index: Point behind each slot, ``[S]`` rows of ``instance``; groups in turn.
        row_splits: ``[T + 1]`` int64.
        instance: Particle of each point, ``[M]`` int64, -1 for none.

    Returns:
        ``[T]`` int64; of equally frequent ones the lowest; -1 where most points belong to none.
    """
    tokens = row_splits.shape[0] - 1
    of = ops.batch_from_offsets(row_splits, index.shape[0])
    found = instance[index] + 1
    size = int(found.max()) + 1 if len(found) else 1
    counts = torch.bincount(of * size + found, minlength=tokens * size).view(tokens, size)
    return counts.argmax(1) - 1


def cluster(distance: np.ndarray, count: int, linkage: Linkage) -> np.ndarray:
    """Agglomerative clustering of ``[T, T]`` distances into ``count`` clusters; returns their numbers ``[T]``."""
    from sklearn.cluster import AgglomerativeClustering

    return AgglomerativeClustering(count, metric="precomputed", linkage=linkage).fit_predict(distance)


def attention_distance(attention: Tensor) -> np.ndarray:
    """Turn a map ``[heads, T, T]`` into distances ``[T, T]``: minus the logarithm of the mean attention both ways, 0 on the diagonal."""
    mean = attention.double().mean(0)
    distance = -((mean + mean.T) / 2).clamp(min=1e-30).log()
    return distance.fill_diagonal_(0).clamp(min=0).cpu().numpy()


def purity(clusters: np.ndarray, truth: np.ndarray) -> float:
    """Share of samples that belong to the most frequent truth of their cluster."""
    table = np.zeros((clusters.max() + 1, truth.max() + 1), dtype=np.int64)
    np.add.at(table, (clusters, truth), 1)
    return float(table.max(1).sum() / len(truth))


@dataclass(frozen=True)
class InstanceScore:
    """Agreement of clusters of tokens with the true particles, the mean over events.

    Args:
        what: What was clustered.
        linkage: Distance of two clusters: the mean ("average") or the least ("single") of their members'.
        adjusted_rand: Adjusted Rand index, 1 for equal partitions, 0 for chance.
        purity: Share of tokens in whose cluster their particle is the most frequent one.
        events: Events scored: those with two or more particles.
    """

    what: str
    linkage: Linkage
    adjusted_rand: float
    purity: float
    events: int


def score_instances(
    backbone: Any, dataset: Any, *, layers: Sequence[int] = (-1,), batch_size: int = 4, seed: int = 0
) -> list[InstanceScore]:
    """Cluster the tokens of every event by attention and compare with the true particles.

    Every clustering is told the true number of particles, so that only the distances are compared. Tokens without a particle are left
    out, and events with fewer than two particles.

    Args:
        backbone: The encoder (``point_vit_volume_*``).
        dataset: A data set whose samples have ``point_instance``; :class:`geossl.data.Subset` makes it smaller.
        layers: Blocks whose attention is used, each by itself.
        batch_size: Events per forward pass.
        seed: Initialisation of the untrained encoder.

    Returns:
        For each linkage: position alone, then for each layer the untrained encoder and this one.

    Raises:
        DataError: the points belong to no particles, or no event has two.
    """
    twin: Any = random_twin(backbone, seed)
    found: dict[tuple[str, Linkage], list[tuple[float, float]]] = {}
    with frozen(backbone), frozen(twin):
        for batch in _labelled_batches(dataset, batch_size):
            points = batch.points.to(device_of(backbone))
            groups = backbone.group(points)
            truth = token_instances(groups.index, groups.row_splits, batch.point_instance.to(points.coord.device))
            maps = {
                f"attention of block {layer}, {name}": model.attention_maps(groups, layer)
                for layer in layers
                for name, model in (("untrained", twin), ("this encoder", backbone))
            }
            lengths = list(groups.segments.lengths)
            for event, (own, centers) in enumerate(zip(truth.split(lengths), groups.centers.split(lengths), strict=True)):
                attention = {name: events[event] for name, events in maps.items()}
                for key, pair in _score_event(own, centers, attention).items():
                    found.setdefault(key, []).append(pair)
    if not found:
        raise DataError(f"score_instances: no event of {dataset.config.name} has tokens of two particles")
    means = {key: np.mean(pairs, axis=0) for key, pairs in found.items()}
    return [InstanceScore(*key, float(mean[0]), float(mean[1]), len(found[key])) for key, mean in means.items()]


def _score_event(own: Tensor, centers: Tensor, attention: Mapping[str, Tensor]) -> dict[tuple[str, Linkage], tuple[float, float]]:
    """Adjusted Rand index and purity of every clustering of one event; nothing for fewer than two particles."""
    from sklearn.metrics import adjusted_rand_score

    kept = own >= 0
    truth = np.unique(own[kept].cpu().numpy(), return_inverse=True)[1]
    count = int(truth.max()) + 1 if len(truth) else 0
    if count < 2:
        return {}
    place = centers[kept].double()
    distances = {"position": torch.cdist(place, place).cpu().numpy()}
    distances |= {name: attention_distance(weights[:, kept][:, :, kept]) for name, weights in attention.items()}
    scores = {}
    for linkage in LINKAGES:
        for name, distance in distances.items():
            clusters = cluster(distance, count, linkage)
            scores[name, linkage] = (float(adjusted_rand_score(truth, clusters)), purity(clusters, truth))
    return scores


def _labelled_batches(dataset: Any, batch_size: int) -> Iterator[Any]:
    if not len(dataset):
        raise DataError("score_instances: the data set is empty")
    loader = build_loader(dataset, min(batch_size, len(dataset)), seed=0, shuffle=False, drop_last=False, augment=False)
    for batch in loader.one_pass():
        if batch.point_instance is None:
            raise DataError(f"score_instances: the points of {dataset.config.name} belong to no particles (point_instance)")
        yield batch


def instance_table(scores: Sequence[InstanceScore]) -> Any:
    """Return a rich table of the scores, a line for each thing clustered."""
    from rich.table import Table

    table = Table(title=f"Particles found by clustering tokens, {scores[0].events} events, number of particles given", title_justify="left")
    table.add_column("clustered by")
    for linkage in LINKAGES:
        table.add_column(f"ARI, {linkage} linkage", justify="right")
        table.add_column("purity", justify="right")
    by_key = {(score.what, score.linkage): score for score in scores}
    for name in dict.fromkeys(score.what for score in scores):
        cells = [cell for linkage in LINKAGES for score in [by_key[name, linkage]] for cell in (score.adjusted_rand, score.purity)]
        table.add_row(name, *(f"{cell:.3f}" for cell in cells))
    return table
