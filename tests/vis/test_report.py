from __future__ import annotations

import base64
import io
import json
import re

import numpy as np
import pytest
from PIL import Image

from geossl.errors import DataError
from geossl.vis import write_report
from geossl.vis.report import read_metrics


def payload(html: str) -> dict:
    (text,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', html, re.DOTALL)
    return json.loads(text)


def test_report_is_one_file_that_names_nothing_outside(run):
    path = write_report(run)
    assert path == run / "report.html"
    html = path.read_text()
    assert not re.findall(r"(?:src|href)\s*=\s*[\"'](?!#|data:)[^\"']+", html)
    assert not re.findall(r"(?:https?:)?//(?!www\.w3\.org/2000/svg)[a-z0-9-]+\.[a-z]", html)
    assert "default-src 'none'" in html
    assert not list(run.glob(".*"))


def test_payload_holds_every_panel(run):
    data = payload(write_report(run).read_text())
    assert data["header"]["title"] == "Point-MAE on objects"
    assert data["metrics"]["step"] == list(range(1, 61))
    assert list(data["metrics"]["columns"])[:2] == ["loss", "lr"]
    assert data["curve"]["step"] == [20, 40, 60]
    assert {line["name"] for line in data["curve"]["baselines"]} == {"random", "hand-made"}
    picture = data["pictures"][0]
    assert picture["name"] == "a plate"
    assert picture["visible_share"] == pytest.approx(0.5, abs=0.02)
    assert 0.01 < picture["mean_error"] < 0.1
    assert len(data["map"]["tsne"]) == 36
    assert len(data["retrieval"]["rows"]) == 3
    assert data["retrieval"]["precision"] > data["retrieval"]["chance"]
    assert [row["name"] for row in data["probes"]["rows"]][-1] == "This encoder"
    assert data["probes"]["rows"][-1]["own"]
    assert data["config"].startswith("method:")
    assert dict(data["environment"])["geossl"]


def test_verdict_states_the_lead_over_the_calibrated_random_encoder(run):
    data = payload(write_report(run).read_text())
    summary = json.loads((run / "report" / "probes.json").read_text())
    own, bar = ({s["probe"]: s["mean"] for s in rows}["svm"] for rows in (summary["scores"], summary["baselines"]["random"]))
    words = "".join(part["text"] for part in data["header"]["verdict"])
    assert own > bar
    assert f"{100 * (own - bar):.1f} points above" in words


def test_hostile_names_stay_data(run):
    html = write_report(run).read_text()
    assert "</script> 3" not in html
    assert payload(html)["map"]["names"][3] == "object </script> 3"


def test_metrics_survive_kill_resume_and_nan(tmp_path):
    path = tmp_path / "metrics.jsonl"
    rows = [
        '{"step": 1, "loss": 3.0}',
        '{"step": 2, "loss": 2.0}',
        '{"step": 2, "loss": 2.5, "lr": 0.1}',
        '{"step": 3, "loss": NaN}',
        '{"step": 4, "lo',
    ]
    path.write_text("\n".join(rows))
    steps, columns, probed = read_metrics(path)
    assert steps == [1, 2, 3]
    assert columns == {"loss": [3.0, 2.5, None], "lr": [None, 0.1, None]}
    assert probed == {"step": []}


def test_the_loss_in_other_units_is_not_drawn_twice(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("\n".join(json.dumps({"step": n, "loss": 1 / n, "chamfer_x1000": 1000 / n, "kl": 1.0}) for n in range(1, 9)))
    assert list(read_metrics(path)[1]) == ["loss", "kl"]


def test_long_runs_are_thinned(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("\n".join(json.dumps({"step": step, "loss": 1.0}) for step in range(5000)))
    assert len(read_metrics(path)[0]) <= 1500


def test_report_of_a_bare_run(run):
    for name in ("probes.json", "embedding.npz", "pictures.npz"):
        (run / "report" / name).unlink()
    data = payload(write_report(run).read_text())
    assert data["map"] is None
    assert data["probes"] is None
    assert data["pictures"] == []
    assert data["metrics"]["step"]


def test_report_of_a_fine_tuning(run):
    for name in ("probes.json", "embedding.npz", "pictures.npz"):
        (run / "report" / name).unlink()
    (run / "config.yaml").write_text("task: {name: classification}\nbackbone: null\ndata: {name: objects}\n")
    rows = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}, {"step": 2, "probe/accuracy": 0.7}, {"step": 4, "probe/accuracy": 0.6}]
    (run / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = payload(write_report(run).read_text())
    assert data["header"]["title"] == "Classification on objects"
    assert {"label": "Test accuracy", "value": "60.0 %", "note": "best 70.0 %"} in data["header"]["tiles"]
    assert data["curve"]["mean"] == [0.7, 0.6]
    assert data["curve"]["std"] is None
    assert not data["pretraining"]


def test_predictions_that_are_not_finite_are_left_out(run):
    path = run / "report" / "pictures.npz"
    arrays = dict(np.load(path))
    arrays["reconstruction_0"][3] = np.nan
    np.savez(path, **arrays)
    assert np.isfinite(payload(write_report(run).read_text())["pictures"][0]["mean_error"])


def test_what_a_teacher_saw_is_shown_where_there_is_one(run):
    first, second = payload(write_report(run).read_text())["pictures"]
    count = len(np.load(run / "report" / "pictures.npz")["input_0"])
    assert len(base64.b64decode(first["colors"])) == 3 * count
    saliency = np.frombuffer(base64.b64decode(first["saliency"]), np.uint8)
    assert len(saliency) == count
    assert saliency[:4].tolist() == [0, 85, 170, 255]  # the centres are the first points
    assert [image.split(",")[0] for image in first["depth"]] == ["data:image/png;base64"] * 3
    assert (
        np.asarray(Image.open(io.BytesIO(base64.b64decode(first["depth"][0].split(",")[1])))).tolist() == np.full((224, 224), 128).tolist()
    )
    assert not {"colors", "saliency", "depth"} & second.keys()


def test_bad_folders_teach(run, tmp_path):
    with pytest.raises(DataError, match="not a run folder"):
        write_report(tmp_path / "nothing")
    (run / "report" / "probes.json").write_text("{")
    with pytest.raises(DataError, match=r"probes\.json: damaged"):
        write_report(run)
    (run / "report" / "probes.json").unlink()
    broken = run / "report" / "embedding.npz"
    broken.write_bytes(broken.read_bytes()[:300])
    with pytest.raises(DataError, match=r"embedding\.npz: cannot be read"):
        write_report(run)
    assert not (run / "report.html").exists()


def test_events_are_packed_for_the_page(events_run):
    path = write_report(events_run)
    data = payload(path.read_text())
    assert path.stat().st_size < 600_000
    assert data["events"]["classes"] == ["shower", "track", "michel", "delta"]
    arrays = np.load(events_run / "report" / "events.npz")
    item = data["events"]["items"][0]
    assert item["name"] == "event </script> 0"
    assert (item["points"], item["tokens"]) == (500, 30)
    coord = np.frombuffer(base64.b64decode(item["coord"]), "<i2").reshape(-1, 3) / 16384
    assert np.linalg.norm(coord, axis=1).max() == pytest.approx(1, abs=1e-3)
    spread = np.ptp(arrays["coord_0"], axis=0)
    np.testing.assert_allclose(np.ptp(coord, axis=0) / np.ptp(coord[:, 0]), spread / spread[0], atol=1e-3)
    np.testing.assert_array_equal(np.frombuffer(base64.b64decode(item["token"]), "<u2"), arrays["token_0"])
    np.testing.assert_array_equal(np.frombuffer(base64.b64decode(item["label"]), np.int8), arrays["label_0"])
    assert len(base64.b64decode(item["attention"])) == 900
    assert np.frombuffer(base64.b64decode(item["hidden"]), np.uint8).sum() == 20


def test_scores_of_events(events_run):
    data = payload(write_report(events_run).read_text())
    assert data["header"]["title"] == "PoLAr-MAE on lartpc"
    assert "reach a macro F1 of" in data["header"]["verdict"][0]["text"]
    assert data["header"]["verdict"][3]["style"] == "up"
    assert data["curve"]["mean"] == [0.25, 0.5]
    assert list(data["curve"]["classes"]) == ["delta", "michel", "shower", "track"]
    assert {line["name"] for line in data["curve"]["baselines"]} == {"random", "hand-made"}
    assert [row["name"] for row in data["token_probe"]["rows"]][-1] == "This encoder"
    assert len(data["token_probe"]["rows"]) == 5
    assert all(len(row["cells"]) == 5 for row in data["token_probe"]["rows"])
    assert data["segmentation"]["points"] == 1000


def test_many_points_are_thinned_and_an_event_may_have_little_to_show(events_run):
    path = events_run / "report" / "events.npz"
    arrays = dict(np.load(path))
    rows = np.random.default_rng(0).integers(0, 500, 9000)
    for key in ("coord", "energy", "token", "label", "predicted"):
        arrays[f"{key}_0"] = arrays[f"{key}_0"][rows]
        if key in ("label", "predicted"):
            del arrays[f"{key}_1"]
    del arrays["attention_1"], arrays["reconstruction_1"]
    np.savez(path, **arrays)
    first, second = payload(write_report(events_run).read_text())["events"]["items"]
    assert first["points"] == 9000
    assert len(base64.b64decode(first["token"])) == 2 * 3000
    assert {"label", "predicted", "attention", "reconstruction", "hidden"}.isdisjoint(second)
