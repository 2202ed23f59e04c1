"""A small finished run folder: curves, pictures, embeddings and probe scores of synthetic shapes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from geossl.evaluation import Features, ProbeProtocol, probe
from geossl.evaluation.probes import majority_score
from geossl.evaluation.summary import summarise

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
    )
    return folder
