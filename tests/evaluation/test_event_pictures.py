"""What reports show of events: colours of embeddings, attention, and the arrays that are written."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

import geossl
from geossl.data import DATASETS
from geossl.evaluation import TokenProbeProtocol, TokenProber, save_report_data
from geossl.evaluation.event_pictures import attention_bytes, position_residual, principal_colors, save_event_pictures
from geossl.methods import METHODS
from geossl.tasks import TASKS


@pytest.fixture(scope="module")
def events():
    config = dataclasses.replace(DATASETS.config("lartpc"), events=4, val_events=2)
    return config.build("train"), config.build("val")


def backbone():
    torch.manual_seed(0)
    return geossl.create_backbone("point_vit_volume_tiny", dim=24, depth=2, heads=2, embed_widths=(8, 16, 16))


def test_what_position_explains_is_gone():
    centers = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))
    meaning = torch.randn(40, 5, generator=torch.Generator().manual_seed(1))
    feats = meaning + 10 * centers @ torch.randn(3, 5, generator=torch.Generator().manual_seed(2)) + 3
    residual = position_residual(feats, centers)
    place = torch.cat([torch.ones(40, 1), centers], 1).double()
    expected = feats.double() - place @ torch.linalg.lstsq(place, feats.double()).solution
    torch.testing.assert_close(residual, expected, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(residual, position_residual(meaning, centers), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(position_residual(feats[:3], centers[:3]), torch.zeros(3, 5, dtype=torch.float64), rtol=0, atol=1e-6)


def test_colors_follow_the_main_components():
    feats = torch.zeros(100, 6)
    feats[:, 2] = torch.linspace(-1, 1, 100)
    colors = principal_colors(feats)
    assert colors.shape == (100, 3)
    assert colors.dtype == np.uint8
    assert set(colors[[0, -1], 0].tolist()) == {0, 255}
    assert principal_colors(torch.zeros(4, 2)).shape == (4, 3)
    assert attention_bytes(torch.eye(3)[None].repeat(2, 1, 1)).tolist() == [[255, 0, 0], [0, 255, 0], [0, 0, 255]]


@pytest.mark.parametrize("kind", ["method", "task"])
def test_arrays_of_a_method_and_of_a_task(kind, events, tmp_path):
    encoder = backbone()
    if kind == "method":
        module = dataclasses.replace(METHODS.config("polar_mae"), decoder_depth=1, decoder_heads=2).build(encoder)
    else:
        module = dataclasses.replace(TASKS.config("segmentation"), classes=4, layers=(0, 1), hidden=8).build(encoder)
    module.train()
    save_event_pictures(tmp_path / "events.npz", module, events[1], np.array([1, 0]), ["one", "two"])
    assert module.training
    arrays = dict(np.load(tmp_path / "events.npz"))
    for number, row in enumerate((1, 0)):
        sample = events[1].get(row)
        count = len(sample.points)
        np.testing.assert_array_equal(arrays[f"coord_{number}"], sample.points[:, :3])
        np.testing.assert_array_equal(arrays[f"label_{number}"], sample.point_label)
        centers, token = arrays[f"center_{number}"], arrays[f"token_{number}"]
        distance = np.linalg.norm(sample.points[:, None, :3] - centers, axis=2)
        np.testing.assert_allclose(distance[np.arange(count), token], distance.min(1), atol=1e-2)
        assert arrays[f"colors_{number}"].shape == arrays[f"colors_residual_{number}"].shape == (len(centers), 3)
        assert arrays[f"attention_{number}"].shape == (len(centers), len(centers))
        assert (arrays[f"attention_{number}"].max(1) == 255).all()
        assert (f"predicted_{number}" in arrays) == (kind == "task")
        if kind == "method":
            hidden = arrays[f"center_hidden_{number}"]
            assert hidden.sum() == int(0.6 * len(centers))
            assert arrays[f"reconstruction_{number}"].shape[1] == 4


def test_the_token_probe_of_a_backbone(events, tmp_path):
    protocol = TokenProbeProtocol(tokens=200, components=8, batch_size=2, calibration_batches=2)
    prober, encoder = TokenProber(*events, protocol=protocol), backbone()
    quick = prober.quick(encoder)
    assert quick["token_f1"] == pytest.approx(np.mean([value for name, value in quick.items() if name != "token_f1"]))
    baselines = prober.baselines(encoder)
    assert list(baselines) == ["always", "hand_made", "random_uncalibrated", "random"]
    assert prober.baselines(encoder) is baselines
    # The untrained twin is drawn anew: other weights of the same architecture give the same baselines.
    assert prober.baselines(backbone().requires_grad_(False)) is baselines
    tokens = prober.tokens(encoder, 0)
    assert tokens.values.shape == (200, 24)
    np.testing.assert_array_equal(tokens.values, prober.tokens(encoder, 0).values)
    always, share = baselines["always"], baselines["always"].share
    np.testing.assert_allclose(always.f1, np.where(share > 0, 2 * share / (1 + share), np.nan))
    module = dataclasses.replace(METHODS.config("polar_mae"), decoder_depth=1, decoder_heads=2).build(encoder)
    folder = save_report_data(tmp_path, module, prober, events[1], pictures=2)
    assert sorted(path.name for path in folder.iterdir()) == ["events.npz", "token_probe.json"]


def test_events_without_classes_are_refused(events):
    from geossl.errors import DataError

    with pytest.raises(DataError, match="the points of objects have no classes"):
        TokenProber(DATASETS.config("objects").build("train"), events[1])
