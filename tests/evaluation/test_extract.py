from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors import safe_open

from geossl.errors import CheckpointError, DataError
from geossl.evaluation import extract_features
from geossl.evaluation.extract import interpolate
from geossl.geometry import PackedPoints, Tokens


@pytest.fixture
def cloud() -> torch.Tensor:
    return torch.randn(40, 3)


def test_points_of_a_tensor(encoder, cloud):
    features = extract_features(encoder, cloud)
    assert features.output == "points"
    assert features.feats.shape == (40, 8)
    assert features.offsets.tolist() == [0, 40]
    torch.testing.assert_close(features.coord, cloud)
    tokens = extract_features(encoder, cloud, output="tokens")
    # A point that is a token centre has (up to the 1e-8 in the weights) the feature of that token.
    torch.testing.assert_close(features.feats[::8], tokens.feats, atol=1e-4, rtol=1e-4)
    assert not features.feats.requires_grad


def test_interpolation_is_inverse_squared_distance():
    centers = torch.tensor([[0.0, 0, 0], [3, 0, 0], [0, 4, 0], [100, 0, 0]])
    tokens = Tokens(torch.eye(4), centers, torch.tensor([0, 4]))
    weights = interpolate(tokens, torch.tensor([[1.0, 0, 0]]), torch.tensor([0, 1]))[0]
    raw = torch.tensor([1.0, 1 / 4, 1 / 17, 0.0])
    torch.testing.assert_close(weights, raw / raw.sum())


@pytest.mark.parametrize("count", [1, 2, 9])
def test_clouds_of_one_or_two_tokens(encoder, count):
    features = extract_features(encoder, torch.randn(count, 3))
    tokens = extract_features(encoder, features.coord, output="tokens")
    assert len(tokens.feats) == (count + 7) // 8
    assert features.feats.isfinite().all()
    if count < 9:
        torch.testing.assert_close(features.feats, tokens.feats.expand(count, 8))


def test_batches_do_not_mix_clouds(encoder):
    clouds = [torch.randn(n, 3) for n in (40, 3, 17)]
    packed = PackedPoints(torch.cat(clouds), torch.tensor([0, 40, 43, 60]))
    for output in ("points", "tokens", "global"):
        together = extract_features(encoder, packed, output=output, batch_size=2)
        assert together.names == ["cloud 0", "cloud 1", "cloud 2"]
        for number, cloud in enumerate(clouds):
            coord, feats = together[number]
            alone = extract_features(encoder, cloud, output=output)
            torch.testing.assert_close(feats, alone.feats)
            torch.testing.assert_close(coord, alone.coord)


def test_padded_batch_layers_and_pooling(encoder):
    batch = torch.randn(3, 24, 3)
    assert extract_features(encoder, batch.numpy(), output="global").feats.shape == (3, 16)
    assert extract_features(encoder, batch, output="global", pooling="max").feats.shape == (3, 8)
    assert extract_features(encoder, batch, output="tokens", layers=[0, -1]).feats.shape == (9, 16)
    assert extract_features(encoder, batch, layers=2).feats.shape == (72, 16)
    method = torch.nn.Module()
    method.backbone = encoder.train()
    torch.testing.assert_close(extract_features(method, batch).feats, extract_features(encoder, batch).feats)
    assert encoder.training


def test_features_can_be_trained_on(encoder, cloud):
    head = torch.nn.Linear(8, 2)
    head(extract_features(encoder, cloud).feats).sum().backward()
    assert head.weight.grad.abs().sum() > 0


def test_file_is_normalised_and_subsampled_but_keeps_every_point(encoder, cloud, tmp_path):
    placed = cloud * 7 + torch.tensor([100.0, 50, -20])
    path = tmp_path / "scan.npy"
    np.save(path, placed.numpy())
    features = extract_features(encoder, path, points=16)
    assert features.names == ["scan.npy"]
    assert features.feats.shape == (40, 8)
    torch.testing.assert_close(features.coord, placed)
    tokens = extract_features(encoder, path, points=16, output="tokens")
    assert len(tokens.feats) == 2  # every eighth of the sixteen
    nearest = (tokens.coord[:, None] - placed).norm(dim=2).min(1).values
    assert (nearest < 1e-3).all()  # back in the file's own coordinates
    unit = cloud - cloud.mean(0)
    unit = unit / unit.norm(dim=1).max()
    wanted = extract_features(encoder, unit, output="tokens")
    torch.testing.assert_close(extract_features(encoder, path, output="tokens").feats, wanted.feats, atol=1e-4, rtol=1e-4)


def test_folder_and_dataset(encoder, test_shapes, tmp_path):
    (tmp_path / "b").mkdir()
    np.save(tmp_path / "b" / "two.npy", test_shapes.points[1])
    np.save(tmp_path / "one.npy", test_shapes.points[0])
    features = extract_features(encoder, tmp_path, output="global")
    assert features.names == ["b/two.npy", "one.npy"]
    rows = extract_features(encoder, test_shapes, output="global")
    assert len(rows) == len(test_shapes)
    assert rows.names[3] == "shapes[3]"


def test_save(encoder, cloud, tmp_path):
    features = extract_features(encoder, cloud, output="tokens")
    with np.load(features.save(tmp_path / "f.npz")) as archive:
        np.testing.assert_array_equal(archive["feats"], features.feats.numpy())
        assert archive["names"].tolist() == ["cloud 0"]
        assert str(archive["output"]) == "tokens"
    with safe_open(features.save(tmp_path / "f.safetensors"), "pt") as file:
        torch.testing.assert_close(file.get_tensor("coord"), features.coord)
        assert json.loads(file.metadata()["names"]) == ["cloud 0"]
    with pytest.raises(DataError, match=r"end the name in one of these"):
        features.save(tmp_path / "f.pt")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["f.npz", "f.safetensors"]


def test_bad_clouds_are_named(encoder, cloud, tmp_path):
    holes = cloud.clone()
    holes[7, 1] = torch.nan
    with pytest.raises(DataError, match=r"cloud 0: 1 of 40 points are not finite \(first: row 7\)"):
        extract_features(encoder, holes)
    with pytest.raises(DataError, match="cloud 1: the cloud is empty"):
        extract_features(encoder, PackedPoints(cloud, torch.tensor([0, 40, 40])))
    with pytest.raises(DataError, match=r"takes points \[N, 3\] \(in_channels=3\), got \[40, 6\]"):
        extract_features(encoder, torch.cat([cloud, cloud], 1))
    with pytest.raises(DataError, match=r"must be \[N, 3 \+ C\] or \[B, N, 3 \+ C\], got \[3\]"):
        extract_features(encoder, cloud[0])
    with pytest.raises(DataError, match="nowhere: neither a file, a folder nor a data set"):
        extract_features(encoder, "nowhere")
    with pytest.raises(TypeError, match="got float"):
        extract_features(encoder, 1.0)
    with pytest.raises(CheckpointError, match="no such folder"):
        extract_features(tmp_path / "run", cloud)
    with pytest.raises(ValueError, match="output must be one of points, tokens, global"):
        extract_features(encoder, cloud, output="pixels")
    bad = tmp_path / "bad.npy"
    np.save(bad, holes.numpy())
    with pytest.raises(DataError, match=r"bad\.npy.*row 7"):
        extract_features(encoder, bad)
    np.save(bad, np.zeros((1, 3), np.float32))
    with pytest.raises(DataError, match=r"bad\.npy"):
        extract_features(encoder, bad)
    np.save(bad, np.ones((5, 3), np.float32))
    with pytest.raises(DataError, match=r"bad\.npy: all 5 points coincide"):
        extract_features(encoder, bad)
    bad.write_bytes(bad.read_bytes()[:90])
    with pytest.raises(DataError, match=r"bad\.npy"):
        extract_features(encoder, bad)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="empty"):
        extract_features(encoder, tmp_path / "empty")
