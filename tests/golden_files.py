"""Finding and reading golden files: tensors computed with the published implementations, in folders of ``GEOSSL_GOLDEN``.

Tests run every file of the form they know, so further cases need no code: point the variable at their folder.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

ROOT = Path(os.environ.get("GEOSSL_GOLDEN", Path(__file__).parent / "golden"))


def golden_files(folder: str, wanted: Callable[[dict[str, str], set[str]], bool]) -> list[Path]:
    """Files of ``folder`` whose metadata and names of tensors are ``wanted``, sorted."""
    found = []
    for path in sorted((ROOT / folder).glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            if wanted(file.metadata() or {}, set(file.keys())):
                found.append(path)
    return found


class GoldenFile:
    """One golden file: its tensors, its metadata, and the configuration in it."""

    def __init__(self, path: Path) -> None:
        with safe_open(path, "pt") as file:
            self.tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a mapping)
            self.metadata = file.metadata() or {}
        self.config: dict[str, Any] = json.loads(self.metadata.get("config", "{}"))

    def part(self, prefix: str) -> dict[str, Tensor]:
        """Tensors whose names begin with ``prefix``, by the rest of their names."""
        return {key.removeprefix(prefix): value for key, value in self.tensors.items() if key.startswith(prefix)}


def converted_names(
    keys: Iterable[str], state: dict[str, Tensor], convert: Callable[[dict[str, Tensor]], dict[str, Tensor]]
) -> dict[str, str]:
    """Our parameter name for each of the published ``keys``, found by converting tensors filled with a number each."""
    keys = list(keys)
    converted = convert({key: torch.full_like(state[key].float(), i) for i, key in enumerate(keys)})
    return {keys[int(value.flatten()[0])]: name for name, value in converted.items() if not name.endswith("num_batches_tracked")}


def close(actual: Tensor, expected: Tensor, *, rtol: float = 1e-4, atol: float = 2e-5, name: str = "") -> None:
    """Compare in the shape of the golden tensor and the type of ours; the default tolerances are those of the golden files."""
    torch.testing.assert_close(
        actual.reshape(expected.shape),
        expected.to(actual.dtype),
        rtol=rtol,
        atol=atol,
        msg=lambda text: f"{name}: {text}" if name else text,
    )
