"""Dense predictions as pictures, in the colours that are usual: disparity, optical flow, depth and normals.

Flow has the colour wheel of Baker et al., "A Database and Evaluation Methodology for Optical Flow", IJCV 2011: the hue tells the direction,
white is no motion. Disparity and depth go through a map of colours, near is bright. What is not known is dark grey.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from geossl.data import collate
from geossl.evaluation.features import device_of, frozen
from geossl.evaluation.report_data import cloud_name, save_images
from geossl.geometry import denormalize_images
from geossl.layers.dense_errors import ERRORS, nearest_truth

UNKNOWN = 0.2
"""Grey of pixels without a value."""


def color_wheel() -> np.ndarray:
    """The colours of the directions, ``[55, 3]`` in 0..1: red, yellow, green, cyan, blue, magenta and back, unevenly spaced for the eye."""
    anchors = np.array([[1, 0, 0], [1, 1, 0], [0, 1, 0], [0, 1, 1], [0, 0, 1], [1, 0, 1], [1, 0, 0]], dtype=np.float64)
    steps = (15, 6, 4, 11, 13, 6)
    return np.concatenate([a + (b - a) * np.arange(n)[:, None] / n for a, b, n in zip(anchors, anchors[1:], steps, strict=False)])


def paint_flow(flow: np.ndarray, largest: float) -> np.ndarray:
    """Paint flow ``[2, H, W]``; ``largest`` is the length that gets the full colour, longer ones are darker. ``[H, W, 3]`` in 0..1."""
    wheel = color_wheel()
    x, y = flow / max(largest, 1e-9)
    radius = np.hypot(x, y)[..., None]
    place = (np.arctan2(-y, -x) / np.pi + 1) / 2 * (len(wheel) - 1)
    low = np.floor(place).astype(int)
    share = (place - low)[..., None]
    color = (1 - share) * wheel[low] + share * wheel[(low + 1) % len(wheel)]
    return np.where(radius <= 1, 1 - radius * (1 - color), 0.75 * color)


def paint(kind: str, values: Tensor | np.ndarray, like: Tensor | np.ndarray | None = None) -> np.ndarray:
    """Show values as a picture.

    Args:
        kind: ``stereo``, ``flow``, ``depth`` or ``normals``.
        values: ``[C, H, W]``, not finite where unknown.
        like: Values whose range the colours span, such as the truth beside a prediction; None takes ``values``. Only what is known counts.

    Returns:
        ``[H, W, 3]`` float64 in 0..1.
    """
    from matplotlib import colormaps

    array = np.asarray(values, dtype=np.float64)
    scale = array if like is None else np.asarray(like, dtype=np.float64)
    known, counted = (np.asarray(np.isfinite(part).all(0)) for part in (array, scale))
    array = np.where(known, array, 0.0)
    if kind == "flow":
        lengths = np.hypot(*scale[:, counted])
        picture = paint_flow(array, float(np.quantile(lengths, 0.99)) if len(lengths) else 1.0)
    elif kind == "normals":
        # Up is green and towards the camera blue, as in the usual pictures of normals.
        picture = 0.5 + 0.5 * array.transpose(1, 2, 0) * [1, -1, -1]
    else:
        nearness = (lambda d: 1 / np.maximum(d, 1e-6)) if kind == "depth" else np.asarray
        span = nearness(scale[0][counted])
        low, high = np.quantile(span, [0.01, 0.99]) if len(span) else (0.0, 1.0)
        picture = colormaps["turbo"](((nearness(array[0]) - low) / max(high - low, 1e-9)).clip(0, 1))[..., :3]
    return np.where(known[..., None], picture.clip(0, 1), UNKNOWN)


def dense_pictures(kind: str, batch: Any, prediction: Tensor) -> list[dict[str, np.ndarray]]:
    """Lay images, prediction, truth and error side by side.

    Args:
        kind: As for :func:`paint`.
        batch: A :class:`geossl.geometry.ImageBatch` with truth.
        prediction: ``[B, C, H, W]``.

    Returns:
        Of each image its pictures ``[H, W, 3]`` in 0..1 by title; ``error`` is ``[H, W]`` in the unit of the task's first score, 0 where
        there is no truth.
    """
    prediction = prediction.cpu().float()
    truth = nearest_truth(prediction, batch.truth.cpu())
    error, known = next(iter(ERRORS[kind](prediction, truth).values()))
    error = torch.where(known, error, 0.0)
    seen = {"image": batch.image} if batch.reference is None else {"image": batch.image, "second image": batch.reference}
    rows = []
    for number in range(len(batch)):
        row = {title: denormalize_images(images[number].cpu()).permute(1, 2, 0).clamp(0, 1).numpy() for title, images in seen.items()}
        row["predicted"] = paint(kind, prediction[number], truth[number])
        row["true"] = paint(kind, truth[number])
        row["error"] = error[number].numpy()
        rows.append(row)
    return rows


def save_dense_data(run: Path, module: Any, dataset: Any, *, images: int = 6) -> Path:
    """Save the pictures that the report of a dense task shows, into ``run/report/images.npz``; returns ``run/report``.

    Args:
        run: The run folder.
        module: The task; its ``predict`` is called.
        dataset: The test part, from which the images come.
        images: How many.
    """
    folder = run / "report"
    folder.mkdir(parents=True, exist_ok=True)
    rows = np.linspace(0, len(dataset) - 1, min(images, len(dataset))).round().astype(int)
    made, device = [], device_of(module)
    with frozen(module):
        for row in rows:
            batch = collate([dataset.get(int(row), None)])
            moved = batch.to(device)
            made += dense_pictures(module.config.name, batch, module.predict(moved.image, moved.reference).values)
    save_images(folder / "images.npz", [cloud_name(dataset, int(row)) for row in rows], made)
    return folder
