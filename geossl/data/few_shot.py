"""Few-shot episodes: a few labelled shapes of some classes to learn from, and others of the same classes to be tested on."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from geossl.config import require
from geossl.data.augment import AugmentConfig
from geossl.data.dataset import DATASETS, PointDataConfig, PointDataset
from geossl.data.files import existing
from geossl.data.pickles import read_pickled_arrays
from geossl.data.sample import PointCloud, Sample
from geossl.data.subset import Subset
from geossl.errors import DataError


class EpisodePart(Subset):
    """The learning or the test part of an episode: some rows of a data set whose classes are numbered anew.

    Args:
        dataset: A geossl data set with classes.
        rows: Rows of this part.
        chosen: Classes of the episode, as numbers in ``dataset``; the first becomes class 0.
    """

    def __init__(self, dataset: Any, rows: np.ndarray, chosen: np.ndarray) -> None:
        super().__init__(dataset, rows)
        number = np.full(len(dataset.classes), -1)
        number[chosen] = np.arange(len(chosen))
        self.labels = number[np.asarray(dataset.labels)[self.rows]]
        self.classes = [dataset.classes[label] for label in chosen]

    def get(self, row: int, rng: np.random.Generator | None = None) -> Sample:
        """Return sample ``row`` of the part with its class in the episode."""
        return dataclasses.replace(super().get(row, rng), label=int(self.labels[row]))


def draw_episode(
    dataset: Any, way: int, shot: int, *, test_per_class: int = 20, fold: int = 0, seed: int = 0
) -> tuple[EpisodePart, EpisodePart]:
    """Draw an episode: ``way`` classes, ``shot`` shapes of each to learn from, and ``test_per_class`` others to be tested on.

    No shape of the test part has a near-duplicate in the learning part. Equal arguments give equal episodes on every machine.

    Args:
        dataset: A geossl data set with classes (both parts of it: ``build("all")``).
        way: Classes, at least 2.
        shot: Shapes of each class to learn from.
        test_per_class: Shapes of each class in the test part.
        fold: Number of the episode; each is drawn for itself.
        seed: Of all folds.

    Returns:
        The learning and the test part, classes numbered ``0..way-1`` in both.

    Raises:
        DataError: fewer than ``way`` classes have enough shapes; the message tells how many each has.
    """
    require(way >= 2, "way", "must be at least 2", way)
    require(shot >= 1 and test_per_class >= 1, "shot", "and test_per_class must be at least 1", (shot, test_per_class))
    rng = np.random.default_rng([seed, fold])
    labels, groups = np.asarray(dataset.labels), np.asarray(dataset.groups)
    groups = np.where(groups < 0, groups.max(initial=0) + 1 + np.arange(len(groups)), groups)
    found: dict[int, tuple[np.ndarray, np.ndarray]] = {}
    for label in rng.permutation(len(dataset.classes)):
        rows = rng.permutation(np.flatnonzero(labels == label))
        learned = _whole_groups_last(rows, groups)[:shot]
        rest = rows[~np.isin(groups[rows], groups[learned])]
        if len(learned) == shot and len(rest) >= test_per_class:
            found[int(label)] = learned, rest
    # A near-duplicate may be of another class.
    chosen = np.sort(np.array(list(found)[:way], dtype=np.int64))
    train = np.concatenate([found[label][0] for label in chosen.tolist()]) if len(chosen) else np.zeros(0, np.int64)
    tests = [found[label][1] for label in chosen.tolist()]
    tests = [rows[~np.isin(groups[rows], groups[train])][:test_per_class] for rows in tests]
    if len(chosen) < way or any(len(rows) < test_per_class for rows in tests):
        has = ", ".join(f"{name} {int((labels == i).sum())}" for i, name in enumerate(dataset.classes))
        raise DataError(
            f"few-shot: {way} classes with {shot} + {test_per_class} shapes each, without near-duplicates between the two, were asked for; "
            f"{len(found)} classes of {dataset.config.name} have as many ({has}); lower way, shot or test_per_class"
        )
    return EpisodePart(dataset, train, chosen), EpisodePart(dataset, np.concatenate(tests), chosen)


def _whole_groups_last(rows: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Order rows so that near-duplicates stand together, and those without come first: a choice from the front spoils few others."""
    _, first, count = np.unique(groups[rows], return_index=True, return_counts=True)
    order = first[np.argsort(count + first / (len(rows) + 1), kind="stable")]
    rank = {group: place for place, group in enumerate(groups[rows][order].tolist())}
    return rows[np.argsort([rank[group] for group in groups[rows].tolist()], kind="stable")]


@dataclass(kw_only=True)
class ModelNet40FewShotConfig(PointDataConfig):
    """The published episodes of ModelNet40: ``ROOT/<way>way_<shot>shot/<fold>.pkl``. The y axis is up.

    Each pickle is a dictionary of ``train`` and ``test``, lists of (points ``[N, 3 or more]``, label, ...). It is read without executing
    anything it contains.
    """

    name: str = "modelnet40_few_shot"
    normalize: Literal["subset", "cloud", "none"] = "cloud"
    augment: AugmentConfig = field(default_factory=lambda: AugmentConfig(rotation_axis="y"))
    root: Path = Path("data/ModelNetFewshot")
    """Folder that holds ``5way_10shot`` and its relatives."""
    way: int = 5
    """Classes of an episode (published: 5 and 10)."""
    shot: int = 10
    """Shapes of each class to learn from (published: 10 and 20)."""
    fold: int = 0
    """Number of the episode (published: 0 to 9)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for key, least in (("way", 2), ("shot", 1), ("fold", 0)):
            require(getattr(self, key) >= least, key, f"must be at least {least}", getattr(self, key))

    def build(self, split: str) -> ModelNet40FewShotDataset:
        """Make the part ``train`` or ``test`` of the episode."""
        return ModelNet40FewShotDataset(self, split)


@DATASETS.register
def modelnet40_few_shot() -> ModelNet40FewShotConfig:
    """The published few-shot episodes of ModelNet40, 5 classes with 10 shapes each, fold 0."""
    return ModelNet40FewShotConfig()


class ModelNet40FewShotDataset(PointDataset):
    """See :class:`ModelNet40FewShotConfig`; all clouds are held in memory. Classes are named by their numbers in the file."""

    def __init__(self, config: ModelNet40FewShotConfig, split: str) -> None:
        if split not in ("train", "test"):
            raise DataError(f"modelnet40_few_shot: unknown split {split!r}; choose train or test")
        folder = existing(config.root, "folder") / f"{config.way}way_{config.shot}shot"
        self.path = folder / f"{config.fold}.pkl"
        content = read_pickled_arrays(self.path)
        if not isinstance(content, dict) or not {"train", "test"} <= set(content):
            raise DataError(f"{self.path}: expected a dictionary with train and test, got {str(content)[:80]}")
        clouds, labels = _entries(content[split], f"{self.path}, {split}")
        known = np.unique(_entries(content["train"], f"{self.path}, train")[1])
        if len(known) != config.way or not np.isin(labels, known).all():
            raise DataError(
                f"{self.path}: {config.way} classes were expected, the same in train and test, got {known.tolist()} in train and "
                f"{np.unique(labels).tolist()} in {split}"
            )
        super().__init__(config, np.searchsorted(known, labels), [f"class_{label}" for label in known.tolist()])
        self._clouds = clouds

    def read(self, row: int) -> PointCloud:
        """Return the stored cloud; of more than three columns, the next three are its normals."""
        points = self._clouds[row]
        return PointCloud(points[:, :3], points[:, 3:6] if points.shape[1] >= 6 else None)

    def source(self, row: int) -> str:
        """Return the path of the file and the row in it."""
        return f"{self.path} row {row}"


def _entries(entries: Any, source: str) -> tuple[list[np.ndarray], np.ndarray]:
    """Clouds ``[N, 3 or more]`` float32 and labels ``[n]`` of a list of (points, label, ...)."""
    clouds, labels = [], []
    if not isinstance(entries, (list, tuple)) or not len(entries):
        raise DataError(f"{source}: expected a list of (points, label, ...), got {str(entries)[:80]}")
    for row, entry in enumerate(entries):
        try:
            points, label = np.asarray(entry[0], dtype=np.float32), int(np.asarray(entry[1]).reshape(()))
        except (TypeError, ValueError, IndexError, KeyError) as error:
            raise DataError(f"{source} row {row}: expected (points, label, ...), got {str(entry)[:80]} ({error})") from error
        if points.ndim != 2 or points.shape[1] < 3:
            raise DataError(f"{source} row {row}: points must be [N, 3 or more], got {list(points.shape)}")
        clouds.append(points)
        labels.append(label)
    return clouds, np.array(labels, dtype=np.int64)
