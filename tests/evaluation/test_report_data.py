from __future__ import annotations

import io
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from geossl.evaluation import ProbeProtocol, Prober, ProbeScore, save_report_data, summarise
from geossl.evaluation.report_data import cloud_name
from geossl.evaluation.summary import class_table, confusion_table, rows_of, table_of, verdict
from geossl.vis import write_report


class Method(torch.nn.Module):
    """Shows the first half of every cloud and "predicts" the other half."""

    def __init__(self, backbone: torch.nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.seeds: list[int] = []

    def pictures(self, batch, *, generator):
        assert not self.training
        self.seeds.append(generator.initial_seed())
        clouds = [cloud.numpy() for cloud in batch.points.coord.split(batch.points.lengths.tolist())]
        return [{"input": c, "visible": c[: len(c) // 2], "reconstruction": c[len(c) // 2 :]} for c in clouds]


def with_config(dataset):
    dataset.config = SimpleNamespace(name="shapes", points=96)
    dataset.columns = ("xyz",)
    return dataset


def test_everything_the_report_draws_is_saved(encoder, train_shapes, test_shapes, tmp_path):
    prober = Prober(with_config(train_shapes), with_config(test_shapes), protocol=ProbeProtocol(probes=("svm",), resplit_seeds=(0, 1)))
    method = Method(encoder).train()
    folder = save_report_data(tmp_path, method, prober, test_shapes, pictures=3, seed=5)
    assert method.seeds == [5]
    assert method.training
    with np.load(folder / "pictures.npz") as pictures:
        assert pictures["names"].tolist() == ["shapes[0]", "shapes[2]", "shapes[3]"]  # one of each class, evenly spaced
        np.testing.assert_array_equal(pictures["input_1"], test_shapes.points[2])
        assert pictures["colors_1"].shape == test_shapes.points[2].shape
        assert len(np.unique(pictures["colors_1"], axis=0)) > 3  # features differ from point to point
    with np.load(folder / "embedding.npz") as embedding:
        assert embedding["features"].shape == (68, 16)
        assert embedding["test"].sum() == 20
        assert embedding["thumbs"].dtype == np.int8
        assert np.abs(embedding["thumbs"]).max() == 127
    summary = json.loads((folder / "probes.json").read_text())
    assert summary["data"] == "shapes"
    assert list(summary["baselines"]) == ["majority", "shape_histogram", "random_uncalibrated", "random"]
    (tmp_path / "config.yaml").write_text("method: {name: point_mae}\ndata: {name: shapes}\n")
    assert write_report(tmp_path).stat().st_size > 50_000


def test_without_labels_only_pictures_are_saved(encoder, test_shapes, tmp_path):
    folder = save_report_data(tmp_path, Method(encoder), None, with_config(test_shapes), pictures=50)
    assert [path.name for path in folder.iterdir()] == ["pictures.npz"]
    with np.load(folder / "pictures.npz") as pictures:
        assert len(pictures["names"]) == 20  # no more than there are


@pytest.mark.parametrize(
    ("source", "name"), [("objects.npz row 3 (Wooden chair)", "Wooden chair"), ("data/mine/a/b.ply", "b.ply"), ("shapes[3]", "shapes[3]")]
)
def test_names_are_short(source, name):
    assert cloud_name(SimpleNamespace(source=lambda row: source), 3) == name


def score(probe: str, *resplits: float, official: float | None = 0.5) -> ProbeScore:
    return ProbeScore(probe, official, resplits, np.array([[3, 1], [0, 0]]))


def test_verdict_compares_equal_resplits():
    result = verdict([score("knn", 0.1), score("svm", 0.6, 0.7, 0.8)], [score("svm", 0.5, 0.6, 0.7)])
    assert result["probe"] == "svm"
    assert result["lead"] == pytest.approx(0.1)
    assert result["lead_std"] == pytest.approx(0.0, abs=1e-12)  # the resplits differ, the lead does not
    assert result["std"] == pytest.approx(0.1)
    assert verdict([score("knn", 0.1)], [score("svm", 0.5)]) is None


def test_tables_show_the_encoder_beside_every_baseline():
    from rich.console import Console

    protocol = ProbeProtocol(probes=("knn", "svm"))
    baselines = {"majority": [score("majority", 0.25)], "random": [score("svm", 0.5, official=None)]}
    summary = json.loads(json.dumps(summarise([score("svm", 0.6, 0.8)], baselines, ["rod", "ball"], protocol, model="m")))
    assert [row["name"] for row in rows_of(summary)] == ["majority", "random", "encoder"]
    console = Console(width=120, record=True, file=io.StringIO())
    for table in (table_of(summary), class_table(summary, "svm"), confusion_table(summary, "svm")):
        console.print(table)
    text = console.export_text()
    assert text.count("25.0 ± 0.0 (50.0)") == 2  # the majority class stands under both probes
    assert "70.0 ± 14.1 (50.0)" in text
    assert "50.0 ± 0.0 " in text
    assert "75" in text  # recall of the rods; balls have no test sample


def test_pictures_on_another_device_get_a_generator_of_the_host(encoder, test_shapes, tmp_path, monkeypatch):
    """Masks are drawn on the CPU wherever the method is; "meta" stands for a GPU."""

    class Stop(Exception):
        pass

    class Elsewhere(Method):
        def pictures(self, batch, *, generator):
            assert batch.points.coord.device.type == "meta"
            torch.rand(2, generator=generator)
            raise Stop

    monkeypatch.setattr("geossl.evaluation.report_data.device_of", lambda module: torch.device("meta"))
    with pytest.raises(Stop):
        save_report_data(tmp_path, Elsewhere(encoder), None, test_shapes)
