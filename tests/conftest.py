"""Shared fixtures. Tests never change the global random state of the next one."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def golden_root() -> Path:
    """Folder of golden cases: ``GEOSSL_GOLDEN``, or the ones shipped with the tests."""
    return Path(os.environ.get("GEOSSL_GOLDEN", Path(__file__).parent / "golden"))


@pytest.fixture
def shapenet_part_root(tmp_path: Path) -> Path:
    """ShapeNetPart as published, with four small shapes of two categories for training, one for validation and three for testing.

    A bag's parts (4 and 5) are its lower and its upper half, a table's (47 to 49) three slices.
    """
    root = tmp_path / "shapenetcore_partanno_segmentation_benchmark_v0_normal"
    synsets, rng = {"Bag": "02773838", "Table": "04379243"}, np.random.default_rng(3)
    (root / "train_test_split").mkdir(parents=True)
    (root / "synsetoffset2category.txt").write_text("".join(f"{name}\t{synset}\n" for name, synset in synsets.items()))
    for split, names in {"train": ["Bag", "Table", "Bag", "Table"], "val": ["Table"], "test": ["Bag", "Table", "Table"]}.items():
        entries = []
        for number, name in enumerate(names):
            folder = root / synsets[name]
            folder.mkdir(exist_ok=True)
            coord, normal = rng.normal(size=(60, 3)), rng.normal(size=(60, 3))
            first, count = {"Bag": (4, 2), "Table": (47, 3)}[name]
            part = first + np.digitize(coord[:, 2], np.quantile(coord[:, 2], np.arange(1, count) / count))
            normal /= np.linalg.norm(normal, axis=1, keepdims=True)
            np.savetxt(folder / f"{split}{number}.txt", np.column_stack([coord, normal, part]), fmt="%.6f")
            entries.append(f"shape_data/{synsets[name]}/{split}{number}")
        (root / "train_test_split" / f"shuffled_{split}_file_list.json").write_text(json.dumps(entries))
    return root
