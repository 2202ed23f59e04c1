"""Features of particle events: files, tensors and data sets; per point, per token and per event."""

from __future__ import annotations

import dataclasses
import os
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

import geossl
from geossl.cli import extract
from geossl.data import DATASETS, read_events, write_pilarnet
from geossl.data.events import Event
from geossl.errors import DataError
from geossl.evaluation import extract_features
from geossl.models import VolumePointViT, save_backbone

REAL = Path(os.environ.get("GEOSSL_REAL_DATA", "")) / "lartpc" / "pilarnet_m_test_event7675"
SMALL = {"dim": 24, "depth": 2, "heads": 2, "embed_widths": (8, 16, 16)}


@pytest.fixture
def backbone() -> VolumePointViT:
    torch.manual_seed(0)
    return geossl.create_backbone("point_vit_volume_tiny", **SMALL).eval()  # type: ignore[return-value]


def event(points: int = 120, deposits: int = 7, seed: int = 0) -> Event:
    rng = np.random.default_rng(seed)
    cells = rng.permutation(24**3)[:points]
    voxel = (np.stack([cells // 576, cells // 24 % 24, cells % 24], 1) + 380).astype(np.int16)
    clusters = np.array([[deposits, -1, -1, -1, 4], [points - deposits - 20, 0, 0, 0, 1], [20, 1, 1, 0, 0]])
    return Event(voxel, rng.uniform(0.05, 5, points).astype(np.float32), clusters)


@pytest.fixture
def files(tmp_path: Path) -> Path:
    write_pilarnet(tmp_path / "two.h5", [event(), event(90, 0, 1)])
    one = event()
    semantic = np.repeat(one.clusters[:, 4], one.clusters[:, 0])
    np.savez(tmp_path / "one.npz", voxel=one.voxel, energy_mev=one.energy, motif=semantic.astype(np.int8))
    return tmp_path


def test_the_same_event_gives_the_same_features_from_any_file(backbone, files):
    from_h5, from_npz = (extract_features(backbone, files / name) for name in ("two.h5", "one.npz"))
    assert len(from_h5) == 2
    assert len(from_npz) == 1
    for a, b in zip(from_h5[0], from_npz[0], strict=True):
        torch.testing.assert_close(a, b)
    config = dataclasses.replace(DATASETS.config("pilarnet"), files=(files / "two.h5",), min_points=0)
    dataset = config.build("all")
    torch.testing.assert_close(extract_features(backbone, dataset).feats, from_h5.feats)
    tensor = extract_features(backbone, dataset.get(0).points)
    torch.testing.assert_close(tensor.feats, from_h5[0][1])
    assert torch.equal(tensor.coord, from_h5[0][0])
    assert torch.equal(tensor.coord, tensor.coord.round())  # voxels, as in the source


def test_points_take_after_the_five_nearest_tokens(backbone, files):
    points, tokens = (extract_features(backbone, files / "one.npz", output=output) for output in ("points", "tokens"))
    assert points.feats.shape == (len(points.coord), 24)
    distance, nearest = torch.cdist(points.coord, tokens.coord).topk(5, largest=False)
    weight = 1 / (distance.square() + 1.1920929e-07 / backbone.config.scale**2)
    expected = (tokens.feats[nearest] * (weight / weight.sum(1, keepdim=True))[..., None]).sum(1)
    ties = torch.cdist(points.coord, tokens.coord).topk(6, largest=False).values[:, 4:].diff()[:, 0] < 1e-3
    torch.testing.assert_close(points.feats[~ties], expected[~ties], rtol=1e-3, atol=1e-4)
    assert extract_features(backbone, files / "one.npz", output="global", layers=[0, 1]).feats.shape == (1, 96)


def test_a_batchwide_model_describes_each_event_alone(files):
    backbone = geossl.create_backbone("point_vit_volume_tiny", norm="batchwide", **SMALL).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        features = extract_features(backbone, files / "two.h5")
    alone = extract_features(backbone, files / "one.npz")
    torch.testing.assert_close(features[0][1], alone.feats)
    with pytest.warns(UserWarning, match="normalises over the whole batch"):
        together = extract_features(backbone, files / "two.h5", batch_size=2)
    assert not torch.allclose(together.feats, features.feats)


def test_the_program_reads_events(backbone, files, capsys):
    save_backbone(backbone, files / "export")
    out = files / "features.npz"
    assert extract.main([str(files / "export"), str(files / "two.h5"), "--out", str(out), "--output", "tokens"]) == 0
    with np.load(out) as archive:
        assert archive["offsets"][-1] == len(archive["feats"]) == len(archive["coord"])
    assert "2 clouds" in capsys.readouterr().out


def test_simulated_events_by_the_name_of_the_data_set(backbone, monkeypatch):
    config = dataclasses.replace(DATASETS.config("lartpc"), events=2)
    monkeypatch.setattr(DATASETS, "config", lambda name: config)
    features = extract_features(backbone, "lartpc:train", output="tokens")
    assert len(features) == 2
    assert 50 < int(features.offsets[1]) < 700


def test_without_classes_no_point_of_an_npz_counts_as_deposit(tmp_path):
    one = event()
    np.savez(tmp_path / "plain.npz", voxel=one.voxel.astype(np.float32), energy=one.energy)
    ((name, sample),) = read_events(tmp_path / "plain.npz")
    assert name == "plain.npz"
    assert len(sample.points) == int((one.energy > np.float32(0.13)).sum())


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"voxel": np.zeros((3, 3))}, "an event needs the arrays voxel and energy or energy_mev; it holds voxel"),
        ({"voxel": np.zeros((3, 2)), "energy": np.ones(3)}, r"voxel must be \[N, 3\]"),
        ({"voxel": np.zeros((3, 3)), "energy": np.ones(2)}, r"voxel must be \[N, 3\]"),
        ({"voxel": np.full((3, 3), 0.5), "energy": np.ones(3)}, "must hold whole numbers"),
        ({"voxel": np.full((3, 3), 900), "energy": np.ones(3)}, "outside 0..767"),
        ({"voxel": np.zeros((3, 3)), "energy": np.ones(3), "motif": np.array([0, 9, 0])}, r"classes must lie in 0\.\.4"),
        ({"voxel": np.zeros((3, 3)), "energy": np.full(3, 0.01)}, "none of its 3 points is left"),
    ],
)
def test_wrong_event_files_are_refused(backbone, tmp_path, arrays, message):
    np.savez(tmp_path / "bad.npz", **arrays)
    with pytest.raises(DataError, match=message):
        extract_features(backbone, tmp_path / "bad.npz")


def test_other_files_are_refused(backbone, tmp_path):
    (tmp_path / "cloud.xyz").write_text("1 2 3\n")
    with pytest.raises(DataError, match=r"events are read from \.h5, \.hdf5, \.npz"):
        extract_features(backbone, tmp_path / "cloud.xyz")


@pytest.mark.skipif(not REAL.with_suffix(".h5").exists(), reason="needs the real event: set GEOSSL_REAL_DATA")
def test_the_real_event(backbone):
    from_h5, from_npz = (extract_features(backbone, REAL.with_suffix(suffix), output="points") for suffix in (".h5", ".npz"))
    assert from_h5.feats.shape == from_npz.feats.shape == (1277, 24)
    assert from_h5.feats.isfinite().all()
    tokens = extract_features(backbone, REAL.with_suffix(".h5"), output="tokens")
    assert 60 < len(tokens.coord) < 120
