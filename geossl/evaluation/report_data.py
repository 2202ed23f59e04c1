"""What a run leaves behind for its report: pictures, embeddings and probe scores, as plain arrays under ``run/report/``."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from geossl.data import collate
from geossl.data.files import atomic_write, write_json
from geossl.evaluation.event_pictures import principal_colors, save_event_pictures
from geossl.evaluation.extract import interpolate
from geossl.evaluation.features import device_of, frozen, read_tokens
from geossl.evaluation.pair_pictures import add_pair_pictures
from geossl.evaluation.prober import Prober
from geossl.evaluation.probes import probe
from geossl.evaluation.segmentation import SegmentationScores
from geossl.evaluation.summary import summarise
from geossl.evaluation.token_probe import TokenProber
from geossl.geometry import ImageBatch

THUMB_POINTS = 320


def save_report_data(
    run: str | os.PathLike[str], module: nn.Module, prober: Prober | TokenProber | None, dataset: Any, *, pictures: int = 6, seed: int = 0
) -> Path:
    """Save what :func:`geossl.vis.write_report` draws besides the curves, into ``run/report/``.

    Args:
        run: The run folder.
        module: The trained method; its ``pictures(batch)`` is called where it has one, its ``backbone`` is embedded and probed.
        prober: Holds the labelled data; None where the data set has no labels: then embeddings and probes are left out.
        dataset: Where the pictured objects or events come from, best one the training did not see.
        pictures: Number of objects to picture, spread over the classes (over the rows, without classes); half as many events.
        seed: Masks of the pictures, and random baselines.

    Returns:
        ``run/report``, with ``pictures.npz`` (of images ``images.npz``), ``embedding.npz`` and ``probes.json`` as far as they apply; for
        events ``events.npz`` and ``token_probe.json``.
    """
    folder = Path(run) / "report"
    folder.mkdir(parents=True, exist_ok=True)
    backbone: Any = getattr(module, "backbone", module)
    if hasattr(backbone, "attention_maps"):
        _save_events(folder / "events.npz", module, dataset, -(-pictures // 2), seed)
    elif hasattr(module, "pictures"):
        _save_pictures(folder, module, dataset, pictures, seed)
    if isinstance(prober, TokenProber):
        write_json(
            folder / "token_probe.json",
            prober.summary(backbone, seed, model=backbone.config.name, data=prober.parts[0].config.name),
        )
    elif prober is not None:
        features = prober.features(backbone)
        summary = summarise(
            probe(features, prober.protocol),
            prober.baselines(backbone, seed),
            features.classes,
            prober.protocol,
            model=backbone.config.name,
            data=prober.parts[0].config.name,
            points=int(prober.points or prober.parts[0].config.points),
            layers=prober.layers,
            pooling=prober.pooling,
        )
        write_json(folder / "probes.json", summary)
        _save_embedding(folder / "embedding.npz", prober, features)
    return folder


def save_segmentation_data(
    run: str | os.PathLike[str], module: nn.Module, dataset: Any, scores: SegmentationScores, *, events: int = 3, seed: int = 0
) -> Path:
    """Save what the report of a fine-tuned segmentation draws besides the curves, into ``run/report/``.

    Args:
        run: The run folder.
        module: The task; ``predict`` and ``backbone`` are used.
        dataset: The test part, from which the pictured events come.
        scores: On the test part.
        events: Number of events to picture.
        seed: Of anything random in the pictures.

    Returns:
        ``run/report``, with ``events.npz`` and ``segmentation.json``.
    """
    folder = Path(run) / "report"
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "segmentation.json", scores.to_json())
    _save_events(folder / "events.npz", module, dataset, events, seed)
    return folder


def _save_events(path: Path, module: Any, dataset: Any, count: int, seed: int) -> None:
    rows = np.linspace(0, len(dataset) - 1, min(count, len(dataset))).round().astype(int)
    save_event_pictures(path, module, dataset, rows, [cloud_name(dataset, int(row)) for row in rows], seed)


def _save_pictures(folder: Path, module: Any, dataset: Any, count: int, seed: int) -> None:
    rows = _spread(np.asarray(dataset.labels), count)
    device = device_of(module)
    batch = collate([dataset.get(int(row), None) for row in rows]).to(device)
    names = [cloud_name(dataset, int(row)) for row in rows]
    with frozen(module):
        made = module.pictures(batch, generator=torch.Generator().manual_seed(seed))
        if isinstance(batch, ImageBatch):
            add_pair_pictures(module, batch, made)
            save_images(folder / "images.npz", names, made)
            return
        clouds = batch.points
        feats = interpolate(read_tokens(module.backbone, clouds), clouds.coord, clouds.offsets)
    arrays: dict[str, Any] = {"names": np.array(names)}
    colors = np.split(principal_colors(feats), clouds.offsets[1:-1].cpu())
    for number, picture in enumerate(made):
        for key in ("input", "visible", "reconstruction", "depth", "centers", "saliency"):
            if key in picture:
                arrays[f"{key}_{number}"] = np.asarray(picture[key], np.float32)
        arrays[f"colors_{number}"] = colors[number]
    atomic_write(folder / "pictures.npz", lambda file: np.savez_compressed(file, **arrays))


def save_images(path: Path, names: Sequence[str], made: Sequence[Mapping[str, np.ndarray]]) -> None:
    """Save rows of images for a report.

    Args:
        path: The npz file.
        names: What each row is called.
        made: Of each row its images in the order shown, by title: ``[H, W, 3]`` in 0..1, or ``[H, W]``, painted from dark for 0 to bright
            for the 99 % quantile over all rows.
    """
    from matplotlib import colormaps

    arrays: dict[str, Any] = {"names": np.array(names), "titles": np.array(list(made[0]) if made else [])}
    for title in arrays["titles"]:
        images = [np.asarray(row[title], np.float32) for row in made]
        if images[0].ndim == 2:
            top = max(float(np.quantile(np.concatenate([image.ravel() for image in images]), 0.99)), 1e-9)
            images = [colormaps["magma"](image / top)[..., :3] for image in images]
        for number, image in enumerate(images):
            arrays[f"{title}_{number}"] = np.round(255 * image.clip(0, 1)).astype(np.uint8)
    atomic_write(path, lambda file: np.savez_compressed(file, **arrays))


def _save_embedding(path: Path, prober: Prober, features: Any) -> None:
    thumbs, colors, names = [], [], []
    for part, rows in zip(prober.parts, prober.rows, strict=True):
        for row in rows:
            points = part.get(int(row), None).points
            chosen = points[np.resize(np.arange(len(points)), THUMB_POINTS)]
            thumbs.append(chosen[:, :3])
            if "rgb" in part.columns:
                colors.append(chosen[:, -3:])
            names.append(cloud_name(part, int(row)))
    clouds = np.stack(thumbs)
    clouds = clouds - (clouds.max(1, keepdims=True) + clouds.min(1, keepdims=True)) / 2
    clouds = clouds / np.linalg.norm(clouds, axis=2).max(1)[:, None, None].clip(1e-9)
    arrays: dict[str, Any] = {
        "features": features.values.astype(np.float32),
        "labels": features.labels,
        "groups": features.groups,
        "test": features.test,
        "classes": np.array(features.classes),
        "names": np.array(names),
        "thumbs": np.round(clouds * 127).astype(np.int8),
    }
    if colors:
        arrays["thumb_colors"] = np.round(np.stack(colors) * 255).clip(0, 255).astype(np.uint8)
    atomic_write(path, lambda file: np.savez_compressed(file, **arrays))


def cloud_name(dataset: Any, row: int) -> str:
    """Return a short name of cloud ``row``: the words in brackets of its source, or the last part of its path."""
    text = str(dataset.source(row))
    if text.endswith(")") and "(" in text:
        return text[text.rindex("(") + 1 : -1]
    return text.rsplit("/", 1)[-1]


def _spread(labels: np.ndarray, count: int) -> np.ndarray:
    """Choose ``count`` rows: the first of every class in turn, classes evenly spaced; evenly spaced rows where there are no classes."""
    first = [int(np.flatnonzero(labels == label)[0]) for label in np.unique(labels[labels >= 0])]
    pool = first if len(first) >= count else list(range(len(labels)))
    return np.array([pool[i] for i in np.linspace(0, len(pool) - 1, min(count, len(pool))).round().astype(int)])
