"""The parts of a report that show particle events: pictures in three dimensions, scores of a segmentation, the token probe."""

from __future__ import annotations

import base64
from typing import Any

import numpy as np

MOST_POINTS = 3000


def event_panel(arrays: dict[str, np.ndarray] | None) -> dict[str, Any]:
    """Pack what :func:`geossl.evaluation.event_pictures.save_event_pictures` wrote for the page.

    Every event is brought into the unit sphere; of more than ``MOST_POINTS`` points a random part is shown.
    """
    if arrays is None:
        return {"items": [], "classes": []}
    items = [
        _item({key.rpartition("_")[0]: value for key, value in arrays.items() if key.endswith(f"_{i}")})
        for i in range(len(arrays["names"]))
    ]
    for item, name in zip(items, arrays["names"], strict=True):
        item["name"] = str(name)
    return {"items": items, "classes": [str(name) for name in arrays["classes"]]}


def _item(event: dict[str, np.ndarray]) -> dict[str, Any]:
    coord = event["coord"].astype(np.float64)
    middle = (coord.max(0) + coord.min(0)) / 2
    size = max(float(np.linalg.norm(coord - middle, axis=1).max()), 1e-9)
    shown = np.sort(np.random.default_rng(0).permutation(len(coord))[:MOST_POINTS])

    def place(points: np.ndarray) -> str:
        return packed((points[:, :3] - middle) / size)

    item: dict[str, Any] = {
        "points": len(coord),
        "tokens": len(event["center"]),
        "coord": place(coord[shown]),
        "energy": _bytes(_energy_byte(event["energy"][shown])),
        "token": _bytes(event["token"][shown].astype("<u2")),
        "center": place(event["center"]),
        "colors": _bytes(event["colors"]),
        "colors_residual": _bytes(event["colors_residual"]),
    }
    for key in ("label", "predicted"):
        if key in event:
            item[key] = _bytes(event[key][shown].astype(np.int8))
    if "attention" in event:
        item["attention"] = _bytes(event["attention"])
    if "reconstruction" in event:
        item["hidden"] = _bytes(event["center_hidden"].astype(np.uint8))
        for key in ("visible", "reconstruction"):
            rows = event[key][np.isfinite(event[key]).all(1)][: 2 * MOST_POINTS]
            item[key] = place(rows)
            item[f"{key}_energy"] = _bytes(_energy_byte(rows[:, 3] if rows.shape[1] > 3 else np.zeros(len(rows))))
    return item


def segmentation_panel(scores: dict[str, Any] | None) -> dict[str, Any] | None:
    """The table of a segmentation's scores; ``scores`` is :meth:`geossl.evaluation.SegmentationScores.to_json`."""
    if scores is None:
        return None
    return {key: scores[key] for key in ("classes", "points", "micro", "macro", "per_class", "confusion")}


def token_panel(summary: dict[str, Any] | None, titles: dict[str, str]) -> dict[str, Any] | None:
    """The table of the token probe; ``summary`` is :meth:`geossl.evaluation.TokenProber.summary`."""
    if summary is None:
        return None
    rows = []
    for name, score in (*summary["baselines"].items(), ("encoder", summary["score"])):
        about = str(summary.get("model", "")) if name == "encoder" else summary["baselines_about"][name]
        about += " - the bar to beat" if name == "random" else ""
        rows.append({"name": titles.get(name, name), "about": about, "own": name == "encoder", "cells": [*score["f1"], score["macro_f1"]]})
    protocol, shares = summary["protocol"], summary["score"]["share"]
    columns = [{"name": name, "about": f"in {100 * share:.1f} % of tokens"} for name, share in zip(summary["classes"], shares, strict=True)]
    return {
        "columns": [*columns, {"name": "mean", "about": "over the classes"}],
        "rows": rows,
        "protocol": "F1 of linear SVMs that tell from a token which classes its points have: "
        f"{protocol['tokens']:,} tokens of each part, {protocol['components']} principal components, C = {protocol['svm_c']:g}.",
    }


def packed(cloud: np.ndarray) -> str:
    """Positions within the unit sphere as base64 of int16, 1/16384 each."""
    return _bytes(np.round(np.clip(cloud, -1.99, 1.99) * 16384).astype("<i2"))


def _energy_byte(energy: np.ndarray) -> np.ndarray:
    """The normalised log energy from -0.7 to 0.3 as 0..255: where nearly all voxels are (0.14 to 3.3 MeV as published)."""
    return np.round(255 * np.clip(energy + 0.7, 0, 1)).astype(np.uint8)


def _bytes(array: np.ndarray) -> str:
    return base64.b64encode(np.ascontiguousarray(array).tobytes()).decode()
