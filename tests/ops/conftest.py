"""Inputs and backends for the operator tests.

``backend`` runs operators on CPU tensors by the plain-torch twins, by the CPU kernels, and by the CUDA kernels built for the host
(``tests/cuda_on_host``), through the same Python wrapper that serves a GPU.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import Tensor

from geossl.ops import _dispatch, _native

BACKENDS = ("twin", "cpu", "cuda")


def load_module(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[path.stem] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


build_host = load_module(Path(__file__).parents[1] / "cuda_on_host" / "build_host.py")


@pytest.fixture(scope="session", autouse=True)
def several_threads_for_any_size() -> None:
    """With more than one thread, CPU kernels start them all, also for inputs as small as those of these tests."""
    if _native.available("cpu"):
        _native.function("cpu", "geossl_divide_grain_cpu", _native.INT64)(2**40)


@pytest.fixture(scope="session")
def host_library() -> Path:
    """The CUDA kernels for the CPU; ``GEOSSL_TEST_HOST_LIBRARY`` names another build of them (with a sanitizer)."""
    if given := os.environ.get("GEOSSL_TEST_HOST_LIBRARY"):
        return Path(given)
    if not build_host.compiler_found():
        pytest.skip("no C++ compiler on this machine")
    return build_host.host_library()


@pytest.fixture(scope="session")
def on_backend(host_library: Path) -> Callable:
    """``with on_backend("cuda", seed=1): ...`` runs operators on CPU tensors by one backend, CUDA kernels in the given schedule."""

    @contextmanager
    def use(name: str, seed: int = 0) -> Iterator[None]:
        with ExitStack() as stack:
            if name == "cuda":
                stack.enter_context(_native.substitute("cuda", host_library))
                handle = _native._libraries["cuda"].handle
                assert handle is not None
                handle.coh_set_seed(seed)
            stack.enter_context(_dispatch.backend(name))  # type: ignore[arg-type]
            yield

    if not _native.available("cpu"):
        pytest.skip("the CPU library is not built")
    return use


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest, on_backend: Callable) -> Iterator[str]:
    with on_backend(request.param):
        yield request.param


# Clouds ----------------------------------------------------------------------------------------------------------------------------------


def _mesh(rng: np.random.Generator, n: int) -> np.ndarray:
    """Area-weighted samples of an icosahedron-like surface: a cube's faces pushed onto an ellipsoid."""
    face = rng.integers(0, 3, n)
    points = rng.uniform(-1, 1, (n, 3))
    points[np.arange(n), face] = np.sign(points[np.arange(n), face])
    return points / np.linalg.norm(points, axis=1, keepdims=True) * (1, 2, 0.5)


def _tracks(rng: np.random.Generator, n: int) -> np.ndarray:
    """Random walks with a dense blob: densities differ by more than 10,000."""
    walk = np.cumsum(rng.normal(size=(n, 3)), 0) + rng.normal(size=(n, 3)) * 1e-3
    walk[: n // 4] = walk[:1] + rng.normal(size=(n // 4, 3)) * 1e-4
    return walk


def _duplicates(rng: np.random.Generator, n: int) -> np.ndarray:
    points = rng.random((n, 3))
    points[rng.permutation(n)[: n // 2]] = points[:1]
    return points


def _invalid(rng: np.random.Generator, n: int) -> np.ndarray:
    points = rng.random((n, 3))
    points[rng.permutation(n)[: n // 4], rng.integers(0, 3, n // 4)] = rng.choice([np.nan, np.inf, -np.inf], n // 4)
    return points


KINDS: dict[str, Callable[[np.random.Generator, int], np.ndarray]] = {
    "uniform": lambda rng, n: rng.random((n, 3)),
    "mesh": _mesh,
    "tracks": _tracks,
    "duplicates": _duplicates,
    "identical": lambda rng, n: np.broadcast_to(rng.random(3), (n, 3)),
    "lattice": lambda rng, n: rng.integers(0, 4, (n, 3)).astype(float),
    "collinear": lambda rng, n: rng.random((n, 1)) * (1, 2, 3),
    "coplanar": lambda rng, n: rng.random((n, 3)) * (1, 1, 0),
    "far": lambda rng, n: rng.random((n, 3)) + 1e6,
    "tiny": lambda rng, n: rng.random((n, 3)) * 1e-6,
    "outlier": lambda rng, n: np.concatenate([rng.random((max(n - 1, 0), 3)), np.full((min(n, 1), 3), 1e15)]),
    "invalid": _invalid,
}


def make_cloud(kind: str, n: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.tensor(np.ascontiguousarray(KINDS[kind](np.random.default_rng(seed), n)), dtype=dtype)


def make_clouds(kind: str, sizes: tuple[int, ...], seed: int = 0, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [make_cloud(kind, n, 100 * seed + i, dtype) for i, n in enumerate(sizes)]


def to_padded(clouds: list[Tensor], extra: int = 3) -> tuple[Tensor, Tensor]:
    """Padded clouds and lengths; the padding is NaN, which must never be looked at."""
    size = max(len(c) for c in clouds) + extra
    padded = clouds[0].new_full((len(clouds), size, *clouds[0].shape[1:]), torch.nan)
    for b, cloud in enumerate(clouds):
        padded[b, : len(cloud)] = cloud
    return padded, torch.tensor([len(c) for c in clouds])


def to_packed(clouds: list[Tensor]) -> tuple[Tensor, Tensor]:
    return torch.cat(clouds), torch.tensor([0, *np.cumsum([len(c) for c in clouds])])


@pytest.fixture(params=list(KINDS))
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="session")
def inputs() -> ModuleType:
    """This module: ``inputs.make_cloud``, ``inputs.to_padded``..."""
    return sys.modules[__name__]
