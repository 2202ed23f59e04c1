"""A small finished run folder: curves, pictures, embeddings and probe scores of synthetic shapes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from geossl.evaluation import Features, ProbeProtocol, SegmentationMeter, probe
from geossl.evaluation.probes import majority_score
from geossl.evaluation.summary import summarise
from geossl.evaluation.token_probe import TOKEN_BASELINES, TokenProbeProtocol, presence_score

CLASSES = ["rod", "plate", "<ball>"]


def write_metrics(run: Path, steps: int = 60) -> None:
    rng = np.random.default_rng(0)
    with (run / "metrics.jsonl").open("w") as file:
        for step in range(1, steps + 1):
            row = {"step": step, "loss": float(np.exp(-step / 20) + 0.1 + 0.02 * rng.random()), "lr": 1e-3 * step / steps, "grad_norm": 1.0}
            file.write(json.dumps({**row, "samples_per_s": 30.0, "data_wait": 0.01}) + "\n")
            if step % 20 == 0:
                file.write(
                    json.dumps({"step": step, "probe/svm": 0.5 + step / 200, "probe/svm_std": 0.02, "probe/svm_official": 0.6}) + "\n"
                )


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "my_run"
    (folder / "report").mkdir(parents=True)
    (folder / "config.yaml").write_text(
        "method: {name: point_mae, mask_ratio: 0.6}\nbackbone:\n  name: point_vit_tiny\ndata:\n  name: objects\ntrain:\n  batch_size: 8\n"
    )
    write_metrics(folder)
    rng = np.random.default_rng(0)
    count = 36
    labels = np.arange(count) % 3
    thumbs = rng.normal(size=(count, 64, 3)) * np.array([[0.1, 0.1, 1.0], [1.0, 1.0, 0.1], [0.6, 0.6, 0.6]])[labels][:, None]
    thumbs /= np.linalg.norm(thumbs, axis=2).max(1)[:, None, None]
    values = (rng.normal(size=(count, 12)) + 2.0 * np.eye(12)[labels]).astype(np.float32)
    features = Features(values, labels, np.arange(count), np.arange(count) >= 24, CLASSES)
    noise = Features(rng.normal(size=(count, 12)).astype(np.float32), labels, np.arange(count), np.arange(count) >= 24, CLASSES)
    protocol = ProbeProtocol(probes=("knn", "svm"))
    baselines = {"majority": [majority_score(features)], "shape_histogram": probe(noise, protocol), "random": probe(noise, protocol)}
    summary = summarise(probe(features, protocol), baselines, CLASSES, protocol, model="point_vit_tiny")
    (folder / "report" / "probes.json").write_text(json.dumps(summary))
    np.savez(
        folder / "report" / "embedding.npz",
        features=values,
        labels=labels,
        groups=np.arange(count),
        test=np.arange(count) >= 24,
        classes=np.array(CLASSES),
        names=np.array([f"object </script> {i}" for i in range(count)]),
        thumbs=np.round(thumbs * 127).astype(np.int8),
    )
    cloud = thumbs[1].astype(np.float32)
    np.savez(
        folder / "report" / "pictures.npz",
        names=np.array(["a plate", "another"]),
        **{f"input_{i}": cloud for i in range(2)},
        **{f"visible_{i}": cloud[:32] for i in range(2)},
        **{f"reconstruction_{i}": cloud[32:] + np.float32(0.05) for i in range(2)},
        colors_0=np.full((len(cloud), 3), 200, np.uint8),
        centers_0=cloud[:4],
        saliency_0=np.arange(4, dtype=np.float32),
        depth_0=np.full((3, 224, 224), 0.5, np.float32),
    )
    return folder


PARTICLES = ["shower", "track", "michel", "delta"]


@pytest.fixture
def events_run(tmp_path: Path) -> Path:
    """A run folder that shows everything that can be shown of events: a pretraining and a segmentation at once."""
    folder = tmp_path / "events_run"
    (folder / "report").mkdir(parents=True)
    (folder / "config.yaml").write_text("method: {name: polar_mae}\nbackbone: {name: point_vit_volume_tiny}\ndata: {name: lartpc}\n")
    with (folder / "metrics.jsonl").open("w") as file:
        for step in range(1, 21):
            file.write(json.dumps({"step": step, "loss": 1 / step, "lr": 1e-3}) + "\n")
        for step in (10, 20):
            scores = {f"probe/token_f1_{name}": step / (25 + 10 * k) for k, name in enumerate(PARTICLES)}
            file.write(json.dumps({"step": step, "probe/token_f1": step / 40, **scores}) + "\n")
    rng = np.random.default_rng(0)
    arrays = {"names": np.array(["event </script> 0", "event 1"]), "classes": np.array(PARTICLES)}
    for number in range(2):
        count, tokens = 500, 30
        along = np.sort(rng.random(count))[:, None]
        coord = 384 + along * np.array([[300.0, 40 * (-1) ** number, 60]]) + rng.normal(size=(count, 3))
        token = np.minimum((along[:, 0] * tokens).astype(np.int16), tokens - 1)
        hidden = np.arange(tokens) % 3 > 0
        attention = np.exp(-np.abs(np.subtract.outer(np.arange(tokens), np.arange(tokens))) / 4)
        event = {
            "coord": coord.astype(np.float32),
            "energy": rng.uniform(-0.7, 0.5, count).astype(np.float32),
            "token": token,
            "label": (token // 8).astype(np.int16),
            "predicted": np.roll(token // 8, 20).astype(np.int16),
            "center": np.stack([coord[token == t].mean(0) for t in range(tokens)]).astype(np.float32),
            "colors": rng.integers(0, 255, (tokens, 3)).astype(np.uint8),
            "colors_residual": rng.integers(0, 255, (tokens, 3)).astype(np.uint8),
            "attention": (255 * attention).astype(np.uint8),
            "center_hidden": hidden,
            "visible": np.concatenate([coord, rng.normal(size=(count, 1))], 1)[~hidden[token]].astype(np.float32),
            "reconstruction": np.concatenate([coord + 2, rng.normal(size=(count, 1))], 1)[hidden[token]].astype(np.float32),
        }
        arrays.update({f"{key}_{number}": value for key, value in event.items()})
    np.savez(folder / "report" / "events.npz", **arrays)
    meter = SegmentationMeter(PARTICLES)
    label = rng.integers(0, 4, 1000)
    meter.update(np.where(rng.random(1000) < 0.7, label, 1), label)
    (folder / "report" / "segmentation.json").write_text(json.dumps(meter.scores().to_json()))
    present = rng.random((200, 4)) < [0.5, 0.6, 0.1, 0.2]
    noisy = {share: presence_score(present ^ (rng.random(present.shape) < share), present).to_json() for share in (0.1, 0.4)}
    summary = {
        "model": "point_vit_volume_tiny",
        "protocol": vars(TokenProbeProtocol()),
        "classes": PARTICLES,
        "score": noisy[0.1],
        "baselines": dict.fromkeys(TOKEN_BASELINES, noisy[0.4]),
        "baselines_about": TOKEN_BASELINES,
        "verdict": {
            "macro_f1": noisy[0.1]["macro_f1"],
            "bar": noisy[0.4]["macro_f1"],
            "lead": noisy[0.1]["macro_f1"] - noisy[0.4]["macro_f1"],
        },
    }
    (folder / "report" / "token_probe.json").write_text(json.dumps(summary))
    return folder
