"""What a report shows of particle events: tokens, what a method makes of them, attention, and embeddings as colours."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from geossl import ops
from geossl.data import collate
from geossl.data.files import atomic_write
from geossl.evaluation.features import device_of, frozen
from geossl.geometry import PackedPoints

MOST_TOKENS = 400
"""Tokens of an event whose attention is kept (the square of it goes into the report); of larger events none is."""


def position_residual(feats: Tensor, centers: Tensor) -> Tensor:
    """Take out of token embeddings what position explains: residuals of the least squares of ``feats`` on ``[1, x, y, z]``.

    What is left shows meaning better than the embeddings themselves, in which position dominates (Young, Jwa, Terao, arXiv 2502.02558).

    Args:
        feats: ``[T, D]``.
        centers: ``[T, 3]``.

    Returns:
        ``[T, D]`` float64; zeros where four or fewer tokens leave nothing over.
    """
    place = torch.cat([torch.ones_like(centers[:, :1]), centers], 1).double()
    place = place / place.norm(dim=0).clamp(min=1e-12)
    wide = feats.double()
    return wide - place @ (torch.linalg.pinv(place) @ wide)


def principal_colors(feats: Tensor) -> np.ndarray:
    """Show embeddings ``[T, D]`` as colours ``[T, 3]`` uint8: their three main components, each from its 2nd to its 98th percentile."""
    centred = feats.double() - feats.double().mean(0)
    _, _, directions = torch.linalg.svd(centred, full_matrices=False)
    components = centred @ directions[:3].T
    components = torch.nn.functional.pad(components, (0, 3 - components.shape[1]))
    low, high = components.quantile(0.02, 0), components.quantile(0.98, 0)
    share = (components - low) / (high - low).clamp(min=1e-12)
    return (255 * share.clamp(0, 1)).round().byte().cpu().numpy()


def attention_bytes(attention: Tensor) -> np.ndarray:
    """Turn a map ``[heads, T, T]`` into ``[T, T]`` uint8: mean over the heads, each row to its largest, square root (for the eye)."""
    mean = attention.float().mean(0)
    return (255 * (mean / mean.amax(1, keepdim=True)).sqrt()).round().byte().cpu().numpy()


def save_event_pictures(path: Path, module: Any, dataset: Any, rows: np.ndarray, names: list[str], seed: int = 0) -> None:
    """Write what the report draws of the events ``rows`` of ``dataset`` to ``path`` (.npz).

    Args:
        path: File to write; it is there whole or not at all.
        module: A method (its ``pictures(batch)`` is used where it has one), a task (its ``predict``), around a volume ``backbone``.
        dataset: A data set of events.
        rows: Rows to picture.
        names: What the report calls them.
        seed: Masks.
    """
    batch = collate([dataset.get(int(row), None) for row in rows]).to(device_of(module))
    arrays: dict[str, Any] = {"names": np.array(names), "classes": np.array(dataset.classes)}
    with frozen(module):
        backbone = module.backbone
        # One event at a time: with norms over the whole batch, features must not depend on which events stand beside it.
        events = list(_one_by_one(batch.points))
        single = [backbone.group(event) for event in events]
        feats = torch.cat([backbone.encode(groups) for groups in single])
        attention = [backbone.attention_maps(groups, -1)[0] for groups in single]
        predicted = torch.cat([module.predict(event) for event in events]) if hasattr(module, "predict") else None
        pictures = module.pictures(batch, generator=torch.Generator().manual_seed(seed)) if hasattr(module, "pictures") else None
    normalized = torch.cat([groups.centers for groups in single])
    centers, tokens = backbone.denormalize(normalized), [len(groups.centers) for groups in single]
    offsets = ops.offsets_from_lengths(torch.tensor(tokens, device=centers.device))
    near = ops.knn(batch.points.coord, centers, 1, query_offsets=batch.points.offsets, offsets=offsets).index[:, 0]
    near = near - offsets[:-1].repeat_interleave(batch.points.lengths)
    points = batch.points.lengths.tolist()
    energy = torch.zeros_like(batch.points.coord[:, 0]) if batch.points.feats is None else batch.points.feats[:, 0]
    per_point = {"coord": batch.points.coord, "energy": energy, "token": near, "label": batch.point_label, "predicted": predicted}
    per_token = {
        "center": centers,
        "colors": torch.from_numpy(principal_colors(feats)),
        "colors_residual": torch.from_numpy(principal_colors(position_residual(feats, normalized))),
    }
    for values, lengths in ((per_point, points), (per_token, tokens)):
        for key, value in values.items():
            for number, part in enumerate(() if value is None else value.cpu().split(lengths)):
                arrays[f"{key}_{number}"] = _compact(part.numpy())
    for number, weights in enumerate(attention):
        if weights.shape[1] <= MOST_TOKENS:
            arrays[f"attention_{number}"] = attention_bytes(weights)
    for number, picture in enumerate(pictures or ()):
        for key in ("visible", "reconstruction", "center_hidden"):
            arrays[f"{key}_{number}"] = _compact(picture[key])
    atomic_write(path, lambda file: np.savez_compressed(file, **arrays))


def _one_by_one(points: PackedPoints) -> Iterator[PackedPoints]:
    """Yield every event of a batch as a batch of its own."""
    ends = points.offsets.tolist()
    for start, stop in itertools.pairwise(ends):
        feats = None if points.feats is None else points.feats[start:stop]
        yield PackedPoints(points.coord[start:stop], points.offsets.new_tensor([0, stop - start]), feats)


def _compact(values: np.ndarray) -> np.ndarray:
    """Narrow types: numbers of tokens and classes fit into int16."""
    return values.astype(np.int16 if values.dtype == np.int64 else np.float32 if values.dtype.kind == "f" else values.dtype)
