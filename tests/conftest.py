"""Shared fixtures. Tests never change the global random state of the next one."""

from __future__ import annotations

import os
from pathlib import Path

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
