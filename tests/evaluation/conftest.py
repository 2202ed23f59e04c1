"""A data set of four simple shapes and a small encoder with BatchNorm: enough to test every probe in a moment."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn

from geossl.data import Sample
from geossl.geometry import PackedPoints, Tokens


def make_shape(kind: int, rng: np.random.Generator, count: int) -> np.ndarray:
    """A rod, a plate, a ball or a ring, jittered, centred, in the unit sphere."""
    points = rng.normal(size=(count, 3))
    if kind == 0:
        points *= (0.08, 0.08, 1.0)
    elif kind == 1:
        points *= (1.0, 1.0, 0.05)
    elif kind == 2:
        points /= np.linalg.norm(points, axis=1, keepdims=True)
    else:
        points[:, 2] *= 0.1
        points[:, :2] /= np.linalg.norm(points[:, :2], axis=1, keepdims=True)
    points -= (points.max(0) + points.min(0)) / 2
    return (points / np.linalg.norm(points, axis=1).max()).astype(np.float32)


class Shapes:
    """The data-set protocol over synthetic shapes: every third object has a near-duplicate in the same group."""

    classes = ("rod", "plate", "ball", "ring")

    def __init__(self, per_class: int, seed: int, count: int = 96, unlabelled: int = 0, first_group: int = 0) -> None:
        rng = np.random.default_rng(seed)
        total = 4 * per_class
        self.labels = np.concatenate([np.arange(total) % 4, np.full(unlabelled, -1)])
        self.points = [make_shape(int(label) if label >= 0 else 2, rng, count) for label in self.labels]
        self.groups = first_group + np.arange(len(self.labels))
        self.groups[4:total:12] = self.groups[0 : total - 4 : 12]
        self.asked: list[np.random.Generator | None] = []

    def __len__(self) -> int:
        return len(self.labels)

    def source(self, row: int) -> str:
        return f"shapes[{row}]"

    def get(self, row: int, rng: np.random.Generator | None) -> Sample:
        self.asked.append(rng)
        return Sample(self.points[row], int(self.labels[row]), row)


@dataclass(frozen=True)
class TinyConfig:
    name: str = "tiny"
    channels: int = 8
    depth: int = 2

    def build(self) -> TinyEncoder:
        return TinyEncoder(self)


class TinyEncoder(nn.Module):
    """Every eighth point becomes a token; each block is Linear + BatchNorm + ReLU."""

    in_channels = 3

    def __init__(self, config: TinyConfig) -> None:
        super().__init__()
        self.config, self.num_features = config, config.channels
        sizes = [3] + [config.channels] * config.depth
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(a, b), nn.BatchNorm1d(b), nn.ReLU()) for a, b in pairwise(sizes))
        self.norm = nn.LayerNorm(config.channels)
        self.feature_info = list(self.blocks)
        self.passes = 0

    def forward_intermediates(self, points: PackedPoints, indices=None, *, norm: bool = True) -> tuple[Tokens, list[torch.Tensor]]:
        self.passes += 1
        chosen = torch.cat([torch.arange(int(a), int(b), 8) for a, b in pairwise(points.offsets)])
        offsets = torch.tensor([0, *((points.lengths + 7) // 8).cumsum(0).tolist()])
        x = points.coord[chosen]
        outputs = []
        for block in self.blocks:
            x = block(x)
            outputs.append(self.norm(x))
        wanted = range(len(outputs)) if indices is None else range(-indices, 0) if isinstance(indices, int) else indices
        return Tokens(outputs[-1], points.coord[chosen], offsets), [outputs[i] for i in wanted]

    def forward(self, points: PackedPoints | torch.Tensor) -> Tokens:
        if isinstance(points, torch.Tensor):
            points = PackedPoints.from_padded(points)
        return self.forward_intermediates(points)[0]


@pytest.fixture(scope="session")
def train_shapes() -> Shapes:
    return Shapes(12, seed=0, unlabelled=5)


@pytest.fixture(scope="session")
def test_shapes() -> Shapes:
    return Shapes(5, seed=1, first_group=1000)


@pytest.fixture
def encoder() -> TinyEncoder:
    torch.manual_seed(0)
    return TinyConfig().build()
