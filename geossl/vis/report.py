"""``report.html``: one self-contained file that shows a run - no network, no further files, no GPU needed to turn the clouds."""

from __future__ import annotations

import base64
import html
import io
import json
import os
import platform
import time
import zipfile
import zlib
from importlib import metadata, resources
from pathlib import Path
from typing import Any

import numpy as np
import yaml

import geossl
from geossl.errors import DataError
from geossl.vis.events import event_panel, packed, segmentation_panel, token_panel
from geossl.vis.images import image_panel
from geossl.vis.layout import layout_2d, neighbors

# Tableau's twenty colours; neighbours in this order are easy to tell apart.
PALETTE = (
    *("#4e79a7", "#17a2b0", "#b07aa1", "#e15759", "#79706e", "#edc948", "#ff9da7", "#59a14f", "#d37295", "#9c755f"),
    *("#f28e2b", "#86bcb6", "#b6992d", "#a0cbe8", "#8cd17d", "#499894", "#d4a6c8", "#ffbe7d", "#d7b5a6", "#f1ce63"),
)
TITLES = {
    "lr": "Learning rate",
    "grad_norm": "Gradient norm",
    "samples_per_s": "Samples per second",
    "data_wait": "Waiting for data",
    "ema_decay": "EMA decay",
    "memory_gb": "Memory, GB",
}
BASELINE_TITLES = {
    "always": "Every class always",
    "hand_made": "Hand-made description",
    "majority": "Majority class",
    "shape_histogram": "Shape histogram",
    "random_uncalibrated": "Random encoder, raw",
    "random": "Random encoder, calibrated",
    "teacher": "2D teacher, no 3D network",
    "encoder": "This encoder",
}
METHOD_TITLES = {
    "point_mae": "Point-MAE",
    "point_m2ae": "Point-M2AE",
    "i2p_mae": "I2P-MAE",
    "polar_mae": "PoLAr-MAE",
    "nerf_mae": "NeRF-MAE",
    "croco": "CroCo",
    "gaussian2scene": "Gaussian2Scene",
}
CURVE_TITLES = {
    "svm": "Probe: linear SVM on frozen features",
    "token_f1": "Probe: F1 of linear SVMs on frozen tokens",
    "macro_f1": "F1 on the test part",
    "instance_miou": "Instance mIoU on the test part",
    "accuracy": "Accuracy on the test part",
}
NOT_CURVES = ("step", "time", "epoch", "samples", "seconds", "wall", "eta")
MOST_STEPS = 1500
MOST_POINTS = 2048
SHELVES = 5


def write_report(run_folder: str | os.PathLike[str]) -> Path:
    """Write ``report.html`` into a run folder from what is in it.

    Args:
        run_folder: Holds ``metrics.jsonl`` and ``config.yaml``; ``report/`` (see :func:`geossl.evaluation.save_report_data`) and
            ``export/`` are used as far as they are there. A panel without data says what is missing.

    Returns:
        Path of the report. The file is there whole or not at all.

    Raises:
        DataError: the folder is not a run folder, or a file in it is damaged.
    """
    run = Path(run_folder)
    if not (run / "metrics.jsonl").is_file() and not (run / "config.yaml").is_file():
        raise DataError(f"{run}: not a run folder: neither metrics.jsonl nor config.yaml is in it")
    config_text = (run / "config.yaml").read_text() if (run / "config.yaml").is_file() else ""
    config = yaml.safe_load(config_text) or {}
    steps, columns, probed = read_metrics(run / "metrics.jsonl")
    summary = _read_json(run / "report" / "probes.json")
    token_probe = _read_json(run / "report" / "token_probe.json")
    embedding = _read_arrays(run / "report" / "embedding.npz")
    shown, shelf = _embedding_panel(embedding)
    pictures, error_scale = _picture_panel(_read_arrays(run / "report" / "pictures.npz"))
    data: dict[str, Any] = {
        "pretraining": "task" not in config,
        "header": _header(run, config, steps, columns, probed, _verdict(summary, token_probe)),
        "metrics": {"step": steps, "columns": columns, "titles": TITLES},
        "curve": _probe_curve(probed, _curve_baselines(summary, token_probe)),
        "pictures": pictures,
        "error_scale": error_scale,
        "images": image_panel(_read_arrays(run / "report" / "images.npz")),
        "events": event_panel(_read_arrays(run / "report" / "events.npz")),
        "segmentation": segmentation_panel(_read_json(run / "report" / "segmentation.json")),
        "token_probe": token_panel(token_probe, BASELINE_TITLES),
        "map": shown,
        "retrieval": shelf,
        "probes": _probe_panel(summary),
        "classes": [str(name) for name in embedding["classes"]] if embedding else (summary or {}).get("classes", []),
        "palette": PALETTE,
        "config": config_text,
        "environment": _environment(run),
    }
    path = run / "report.html"
    text = _assemble(f"{data['header']['title']} - geossl", data)
    _write_whole(path, text)
    return path


def read_metrics(path: Path) -> tuple[list[int], dict[str, list[float | None]], dict[str, list[Any]]]:
    """Read ``metrics.jsonl``.

    A row written twice (after a resume) counts once, the later one; a line cut off by a kill is left out; long runs are thinned.

    Returns:
        Steps, one column per number of the training rows (None where a row lacks it), and the ``probe/`` numbers with their own
        ``step`` list.
    """
    rows: dict[int, dict[str, float]] = {}
    for line in path.read_text().splitlines() if path.is_file() else ():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            rows.setdefault(row["step"], {}).update(
                {k: v for k, v in row.items() if isinstance(v, int | float) and not isinstance(v, bool)}
            )
    ordered = [rows[step] for step in sorted(rows)]
    probed = [row for row in ordered if any(key.startswith("probe/") for key in row)]
    training = [row for row in ordered if "loss" in row]
    training = training[:: -(-len(training) // MOST_STEPS) or 1]
    names = sorted({key for row in training for key in row if not key.startswith("probe/") and key not in NOT_CURVES}, key=_curve_order)
    columns = {name: [_finite(row.get(name)) for row in training] for name in names}
    columns = {name: values for name, values in columns.items() if name == "loss" or not _same_curve(values, columns["loss"])}
    curves: dict[str, list[Any]] = {"step": [int(row["step"]) for row in probed]}
    for key in sorted({key for row in probed for key in row if key.startswith("probe/")}):
        curves[key.removeprefix("probe/")] = [_finite(row.get(key)) for row in probed]
    return [int(row["step"]) for row in training], columns, curves


def _curve_order(name: str) -> tuple[int, str]:
    order = ("loss", *TITLES)
    return (order.index(name) if name in order else len(order), name)


def _same_curve(values: list[float | None], loss: list[float | None]) -> bool:
    """Whether a column is the loss in other units (a method that logs its only term): one curve is enough."""
    pairs = [(a, b) for a, b in zip(values, loss, strict=True) if a is not None and b]
    ratios = np.array([a / b for a, b in pairs])
    return len(ratios) > 1 and bool(np.ptp(ratios) < 1e-3 * abs(ratios[0]))


def _finite(value: float | None) -> float | None:
    return float(f"{value:.6g}") if value is not None and np.isfinite(value) else None


def _probe_curve(probed: dict[str, list[Any]], baselines: dict[str, float]) -> dict[str, Any] | None:
    """Return the curve of the scores taken during training: of a probe, or of a fine-tuned task on its test part."""
    key = next((name for name in CURVE_TITLES if name in probed), None)
    if key is None:
        return None
    lines = (("random", "random", "var(--bad)"), ("shape_histogram", "hand-made", "var(--soft)"), ("hand_made", "hand-made", "var(--soft)"))
    prefix = {"token_f1": "token_f1_", "macro_f1": "f1_"}.get(key)
    return {
        "title": CURVE_TITLES[key],
        "step": probed["step"],
        "mean": probed[key],
        "name": "mean" if prefix else "resplits" if f"{key}_std" in probed else "test",
        "std": [value or 0.0 for value in probed[f"{key}_std"]] if f"{key}_std" in probed else None,
        "official": probed.get(f"{key}_official"),
        "classes": {name.removeprefix(prefix): values for name, values in probed.items() if prefix and name.startswith(prefix)},
        "baselines": [{"name": short, "value": baselines[name], "color": color} for name, short, color in lines if name in baselines],
    }


def _curve_baselines(summary: dict[str, Any] | None, tokens: dict[str, Any] | None) -> dict[str, float]:
    """What the curve of the probe is compared with, by name."""
    if tokens is not None:
        return {name: score["macro_f1"] for name, score in tokens["baselines"].items() if score["macro_f1"] is not None}
    rows = summary["baselines"].items() if summary else ()
    return {name: score["mean"] for name, scores in rows for score in scores if score["probe"] == "svm"}


def _header(
    run: Path, config: dict[str, Any], steps: list[int], columns: dict[str, Any], probed: dict[str, Any], verdict: dict[str, Any] | None
) -> dict[str, Any]:
    what, data, backbone = (_name(config, "method") or _name(config, "task"), _name(config, "data"), _name(config, "backbone"))
    tiles: list[tuple[str, str, str]] = []
    if verdict:
        tiles.append((verdict["title"], _percent(verdict["value"]), verdict["note"]))
        tiles.append(("Random encoder, calibrated", _percent(verdict["bar"]), "the bar to beat"))
    for key, title in (("macro_f1", "Macro F1"), ("mean_iou", "Mean IoU"), ("accuracy", "Test accuracy")):
        reached = [value for value in probed.get(key, []) if value is not None]
        if reached:
            tiles.append((title, _percent(reached[-1]), f"best {_percent(max(reached))}"))
    losses = [value for value in columns.get("loss", []) if value is not None]
    if losses:
        tiles.append(("Loss", f"{np.mean(losses[-max(1, len(losses) // 20) :]):.3g}", f"from {losses[0]:.3g}"))
    if steps:
        batch = (config.get("train") or {}).get("batch_size")
        tiles.append(("Steps", f"{steps[-1]:,}", f"of {batch} clouds" if batch else ""))
    rates = [value for value in columns.get("samples_per_s", []) if value is not None]
    if rates:
        tiles.append(("Samples per second", f"{np.median(rates):.3g}", "median"))
    parameters = _parameters(run / "export" / "model.safetensors")
    if parameters:
        tiles.append(("Encoder parameters", f"{parameters / 1e6:.2f} M", backbone))
    return {
        "eyebrow": " · ".join(part for part in (backbone, data, run.resolve().name) if part),
        "title": f"{METHOD_TITLES.get(what, what.capitalize())} on {data}" if what and data else run.resolve().name,
        "verdict": _verdict_words(verdict),
        "tiles": [dict(zip(("label", "value", "note"), tile, strict=True)) for tile in tiles],
        "footer": f"Written by geossl {geossl.__version__} on {time.strftime('%Y-%m-%d %H:%M')}. One file, no network needed.",
    }


def _verdict(summary: dict[str, Any] | None, tokens: dict[str, Any] | None) -> dict[str, Any] | None:
    """How far the probed encoder is from the bar, in one form for both kinds of probe."""
    if tokens is not None:
        found = tokens["verdict"]
        return {
            "title": "Token probe, macro F1",
            "subject": "Linear SVMs on its frozen tokens reach a macro F1 of ",
            "value": found["macro_f1"],
            "bar": found["bar"],
            "lead": found["lead"],
            "note": "mean over the classes",
            "doubt": "",
        }
    found = summary.get("verdict") if summary else None
    if not found:
        return None
    return {
        "title": "Probe, linear SVM",
        "subject": "A linear SVM on its frozen features reaches ",
        "value": found["mean"],
        "bar": found["bar"],
        "lead": found["lead"],
        "note": f"± {100 * found['std']:.1f} over resplits",
        "doubt": "" if abs(found["lead"]) > found["lead_std"] else ", within the spread of the resplits",
    }


def _verdict_words(verdict: dict[str, Any] | None) -> list[dict[str, str]]:
    """Say how far the encoder is from the bar; each piece with the style it is set in."""
    if not verdict:
        return []
    lead = verdict["lead"]
    pieces = (
        (verdict["subject"], ""),
        (_percent(verdict["value"]), "b"),
        (", ", ""),
        (f"{abs(100 * lead):.1f} points {'above' if lead >= 0 else 'below'}", "up" if lead >= 0 else "down"),
        (f" the same encoder before training{verdict['doubt']}.", ""),
    )
    return [{"text": text, "style": style} for text, style in pieces]


def _name(config: dict[str, Any], section: str) -> str:
    value = config.get(section)
    return str(value.get("name", "")) if isinstance(value, dict) else str(value or "")


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _parameters(path: Path) -> int:
    if not path.is_file():
        return 0
    from safetensors import safe_open

    with safe_open(path, "np") as file:
        shapes = {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118 - not a mapping
    return sum(int(np.prod(shape)) for key, shape in shapes.items() if "running_" not in key and "num_batches" not in key)


def _picture_panel(arrays: dict[str, np.ndarray] | None) -> tuple[list[dict[str, Any]], float]:
    """Bring every object into the unit sphere of its input and measure how far predictions are from it.

    Files of older runs have no colours of features; only methods with a 2D teacher have its images and its saliency.
    """
    if arrays is None:
        return [], 1.0
    from scipy.spatial import cKDTree

    found, errors = [], []
    for number, name in enumerate(arrays["names"]):
        clouds = {key: arrays[f"{key}_{number}"] for key in ("input", "visible", "reconstruction")}
        center = (clouds["input"].max(0) + clouds["input"].min(0)) / 2
        size = max(float(np.linalg.norm(clouds["input"] - center, axis=1).max()), 1e-9)
        clouds = {key: ((cloud - center) / size)[: MOST_POINTS if key == "input" else None] for key, cloud in clouds.items()}
        tree = cKDTree(clouds["input"])
        shown = np.isfinite(clouds["reconstruction"]).all(1)
        clouds["reconstruction"] = clouds["reconstruction"][shown]
        errors.append(tree.query(clouds["reconstruction"])[0] if len(clouds["reconstruction"]) else np.zeros(0))
        covered = tree.query(clouds["visible"], distance_upper_bound=1e-3)[1] if len(clouds["visible"]) else np.zeros(0, int)
        share = len(np.unique(covered[covered < tree.n])) / max(tree.n, 1)
        found.append(
            {
                "name": str(name),
                "visible_share": share,
                **_beside_the_clouds(arrays, number),
                **{key: packed(np.unique(c, axis=0) if key == "visible" else c) for key, c in clouds.items()},
            }
        )
    scale = float(np.quantile(np.concatenate(errors), 0.97)) if errors and sum(map(len, errors)) else 1.0
    for picture, error in zip(found, errors, strict=True):
        picture["mean_error"] = float(error.mean()) if len(error) else 0.0
        picture["error"] = _base64(np.round(255 * np.clip(error / max(scale, 1e-9), 0, 1)).astype(np.uint8))
    return found, scale


def _beside_the_clouds(arrays: dict[str, np.ndarray], number: int) -> dict[str, Any]:
    """What a picture has besides the clouds: colours of the features of the points, saliency of the points, images of depth."""
    found: dict[str, Any] = {}
    if f"colors_{number}" in arrays:
        found["colors"] = _base64(arrays[f"colors_{number}"][:MOST_POINTS])
    if f"saliency_{number}" in arrays:
        from scipy.spatial import cKDTree

        saliency = arrays[f"saliency_{number}"]
        share = (saliency - saliency.min()) / max(float(np.ptp(saliency)), 1e-12)
        nearest = cKDTree(arrays[f"centers_{number}"]).query(arrays[f"input_{number}"][:MOST_POINTS])[1]
        found["saliency"] = _base64(np.round(255 * share[nearest]).astype(np.uint8))
    if f"depth_{number}" in arrays:
        found["depth"] = [_png(image) for image in arrays[f"depth_{number}"]]
    return found


def _png(image: np.ndarray) -> str:
    """A grey image with values in 0..1 as the address of a PNG."""
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(np.round(255 * image.clip(0, 1)).astype(np.uint8)).save(file, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def _base64(array: np.ndarray) -> str:
    return base64.b64encode(np.ascontiguousarray(array).tobytes()).decode()


def _embedding_panel(arrays: dict[str, np.ndarray] | None) -> tuple[dict[str, Any] | None, dict[str, Any]]:
    """Lay the embeddings out, and find the neighbours of every object."""
    if arrays is None:
        return None, {"rows": []}
    features, labels, test = arrays["features"], arrays["labels"], arrays["test"]
    maps = layout_2d(features)
    found, similarity = neighbors(features, arrays["groups"], SHELVES)
    asked = np.flatnonzero(test) if test.any() else np.arange(len(labels))
    firsts = [int(asked[labels[asked] == label][0]) for label in np.unique(labels[asked])]
    valid = found[asked] >= 0
    same = (labels[found[asked]] == labels[asked, None]) & valid
    share = np.bincount(labels) / len(labels)
    panel = {
        "labels": labels.tolist(),
        "test": test.astype(int).tolist(),
        "names": [str(name) for name in arrays["names"]],
        "dimensions": int(features.shape[1]),
        **{key: np.round(value, 4).tolist() for key, value in maps.items()},
        "nearest": [[int(j) for j in row[:5] if j >= 0] for row in found],
        "thumb_points": int(arrays["thumbs"].shape[1]),
        "thumbs": _base64(arrays["thumbs"]),
        "thumb_colors": _base64(arrays["thumb_colors"]) if "thumb_colors" in arrays else None,
    }
    rows = [
        {
            "query": i,
            "found": [int(j) for j in found[i] if j >= 0],
            "similarity": [round(float(s), 4) for s in similarity[i][found[i] >= 0]],
        }
        for i in firsts
    ]
    return panel, {
        "rows": rows,
        "k": SHELVES,
        "count": len(asked),
        "from": "test part" if test.any() else "data set",
        "precision": float(same.sum() / max(valid.sum(), 1)),
        "chance": float(share[labels[asked]].mean()),
    }


def _probe_panel(summary: dict[str, Any] | None) -> dict[str, Any] | None:
    if summary is None:
        return None
    probes = list(summary["protocol"]["probes"])
    rows = []
    for name, scores in (*summary["baselines"].items(), ("encoder", summary["scores"])):
        found = {score["probe"]: {key: score[key] for key in ("mean", "std", "official")} for score in scores}
        about = str(summary.get("model", "")) if name == "encoder" else summary["baselines_about"][name]
        about += " - the bar to beat" if name == "random" else ""
        # The majority class needs no probe: it stands under every one of them.
        cells = [found.get(probe) or found.get("majority") for probe in probes]
        rows.append({"name": BASELINE_TITLES.get(name, name), "about": about, "own": name == "encoder", "cells": cells})
    titles = {"knn": "k-NN", "linear": "Logistic regression", "svm": "Linear SVM", "svm_cv": "Linear SVM, tuned"}
    fixed = summary["protocol"]
    constants = {
        "knn": f"{fixed['neighbors']} neighbours, cosine",
        "linear": f"C = {fixed['linear_c']:g}",
        "svm": f"C = {fixed['svm_c']:g}",
        "svm_cv": "C chosen inside the training part",
    }
    shown = next((score for score in summary["scores"] if score["probe"] == "svm"), summary["scores"][0])
    part = "official test part" if shown["official"] is not None else "all resplits"
    return {
        "protocol": "Encoder in evaluation mode, features standardised on the training part, nothing chosen on a test part.",
        "resplits": len(summary["protocol"]["resplit_seeds"]),
        "columns": [{"name": titles.get(name, name), "about": constants.get(name, "")} for name in probes],
        "rows": rows,
        "confusion": {"counts": shown["confusion"], "recall": shown["per_class"], "title": f"{titles.get(shown['probe'])}, {part}"},
    }


def _environment(run: Path) -> list[tuple[str, str]]:
    """Versions and hardware, as the report is written."""
    import torch

    from geossl.ops import native_info

    facts = [("geossl", geossl.__version__), ("Python", platform.python_version())]
    for package in ("torch", "numpy", "scikit-learn", "scipy", "safetensors"):
        facts.append((package, metadata.version(package)))
    for kind, library in native_info().items():
        details = library.get("simd") or ", ".join(library.get("archs", []))
        facts.append(
            (f"Native operators, {kind}", f"loaded, {details}" if library["loaded"] else "not loaded: plain torch is used instead")
        )
    facts.append(("System", f"{platform.system()} {platform.release()}, {platform.machine()}"))
    facts.append(("Processor", _processor()))
    facts.append(("Threads", f"{torch.get_num_threads()} of {os.cpu_count()} cores"))
    if torch.cuda.is_available():
        facts.append(("GPU", f"{torch.cuda.get_device_name()} (CUDA {torch.version.cuda})"))
    checkpoints = sorted(path.name for path in (run / "checkpoints").glob("step_*")) if (run / "checkpoints").is_dir() else []
    if checkpoints:
        facts.append(("Checkpoints", ", ".join(checkpoints[-3:])))
    return facts


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _read_json(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        value = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise DataError(f"{path}: damaged ({error}); delete it, or write it anew with tools/evaluate.py") from error
    return dict(value)


def _read_arrays(path: Path) -> dict[str, np.ndarray] | None:
    if not path.is_file():
        return None
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except (OSError, EOFError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(f"{path}: cannot be read as npz ({error}); delete it to write the report without this panel") from error


def _write_whole(path: Path, text: str) -> None:
    """Write a file under a temporary name and rename it: it is there whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        raise DataError(f"{path}: could not be written ({error})") from error
    finally:
        temporary.unlink(missing_ok=True)


def _assemble(title: str, data: dict[str, Any]) -> str:
    """Put style, scripts and data into the page. Data cannot break out of its element: every "<" in it is escaped."""
    folder = resources.files("geossl.vis") / "templates"
    page = (folder / "report.html").read_text()
    script = "\n".join((folder / name).read_text() for name in ("points.js", "charts.js", "panels.js", "events.js", "start.js"))
    payload = json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    page = page.replace("/*TITLE*/", html.escape(title)).replace("/*STYLE*/", (folder / "report.css").read_text())
    return page.replace("/*SCRIPT*/", script).replace("/*DATA*/", payload)
