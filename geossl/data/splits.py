"""Train/test partitions that keep near-duplicates on one side."""

from __future__ import annotations

import numpy as np

from geossl.errors import DataError


def group_resplit(labels: np.ndarray, groups: np.ndarray, *, test_fraction: float = 0.3, seed: int = 0) -> np.ndarray:
    """Draw a test part of about ``test_fraction`` of every class such that no group straddles train and test.

    A group (near-duplicates: the same chair in three sizes) counts for the class most of its members have. Classes are filled one
    after the other with whole groups in random order, so the proportions of the classes are kept as far as the groups allow; a
    group larger than the rest of its class's share stays in the training part.

    Args:
        labels: Class of each sample, ``[n]`` integer, all >= 0.
        groups: Group of each sample, ``[n]`` integer; samples of one group go to the same side. A negative number stands for a
            sample that has no duplicate (it forms a group of its own).
        test_fraction: Share of each class wanted in the test part, in (0, 1).
        seed: Equal seeds give equal partitions, on every machine.

    Returns:
        ``[n]`` bool, True for the samples of the test part. Every class with at least two groups has a sample on both sides.

    Raises:
        DataError: a label is negative, or the arrays do not match.
        ValueError: ``test_fraction`` is not in (0, 1).
    """
    labels, groups = np.asarray(labels), np.asarray(groups)
    if labels.ndim != 1 or labels.shape != groups.shape:
        raise DataError(f"group_resplit: labels and groups must both be [n], got {list(labels.shape)} and {list(groups.shape)}")
    if len(labels) and labels.min() < 0:
        raise DataError("group_resplit: labels must be >= 0; leave unlabelled samples (label -1) out first")
    if not 0.0 < test_fraction < 1.0:
        raise ValueError(f"group_resplit: test_fraction must lie in (0, 1), got {test_fraction}")
    alone = groups < 0
    groups = np.where(alone, groups.max(initial=0) + 1 + np.arange(len(groups)), groups)
    names, member = np.unique(groups, return_inverse=True)
    sizes = np.bincount(member, minlength=len(names))
    votes = np.zeros((len(names), int(labels.max(initial=-1)) + 1), dtype=np.int64)
    np.add.at(votes, (member, labels), 1)
    group_class = votes.argmax(1)
    rng = np.random.default_rng(seed)
    chosen = np.zeros(len(names), dtype=bool)
    for wanted in range(votes.shape[1]):
        candidates = rng.permutation(np.flatnonzero(group_class == wanted))
        if len(candidates) < 2:
            continue
        room = max(1, round(test_fraction * sizes[candidates].sum()))
        for group in candidates:
            if sizes[group] <= room and chosen[candidates].sum() < len(candidates) - 1:
                chosen[group] = True
                room -= sizes[group]
    return chosen[member]
