from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from geossl.errors import ConfigError, DataError
from geossl.evaluation import BASELINES, ProbeProtocol, Prober, calibrate_batchnorm, embed, quick_probe, random_twin, shape_descriptor
from geossl.models import CloudTeacher, TeacherConfig, TeacherPoints


def test_descriptor_is_71_numbers_free_of_place_and_size(train_shapes):
    cloud = train_shapes.points[3]
    vector = shape_descriptor(cloud)
    assert vector.shape == (71,)
    np.testing.assert_allclose(vector, shape_descriptor(cloud * 7 + [1, -2, 3]), atol=1e-4)
    assert np.isfinite(shape_descriptor(np.zeros((1, 3)))).all()


def test_embed_leaves_the_encoder_alone(encoder, train_shapes):
    encoder.train()
    encoder.blocks[0][1].eval()
    before = copy.deepcopy(encoder.state_dict())
    train_shapes.asked.clear()
    values = embed(encoder, train_shapes, batch_size=7)
    assert values.shape == (53, 16)
    assert values.dtype == np.float32
    assert set(train_shapes.asked) == {None}  # the deterministic form, never augmented
    assert encoder.training
    assert not encoder.blocks[0][1].training
    for name, tensor in encoder.state_dict().items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=0)
    np.testing.assert_allclose(values, embed(encoder, train_shapes, batch_size=53), atol=1e-6)


def test_embed_options(encoder, train_shapes):
    both = embed(encoder, train_shapes)
    np.testing.assert_array_equal(both[:, :8], embed(encoder, train_shapes, pooling="mean"))
    np.testing.assert_array_equal(both[:, 8:], embed(encoder, train_shapes, pooling="max"))
    np.testing.assert_array_equal(both[:, :8] + both[:, 8:], embed(encoder, train_shapes, pooling="mean_plus_max"))
    np.testing.assert_array_equal(both, embed(encoder, train_shapes, layers=[-1]))
    assert embed(encoder, train_shapes, layers=[0, 1]).shape == (53, 32)
    assert (embed(encoder, train_shapes, points=16) != both).any()
    with pytest.raises(ValueError, match="pooling must be one of mean_max, mean, max, mean_plus_max, got 'sum'"):
        embed(encoder, train_shapes, pooling="sum")
    with pytest.raises(ConfigError, match="layers: no block is named; the backbone has 2 blocks"):
        embed(encoder, train_shapes, layers=[])
    with pytest.raises(ConfigError, match="layers: block -3 does not exist"):
        embed(encoder, train_shapes, layers=3)


def test_calibration_moves_statistics_only(encoder, train_shapes):
    before = copy.deepcopy(encoder.state_dict())
    encoder.eval()
    calibrate_batchnorm(encoder, train_shapes, batches=30, batch_size=16, seed=0)
    assert not encoder.training
    for name, tensor in encoder.state_dict().items():
        if "running" in name:
            assert (tensor - before[name]).abs().max() > 1e-3
        elif "num_batches" in name:
            assert tensor == 30
        else:
            torch.testing.assert_close(tensor, before[name], rtol=0, atol=0)
    # They approach the statistics of the data itself: 0.9 ** 30 = 4 % of the initial ones are left.
    points = torch.from_numpy(np.concatenate([cloud[::8] for cloud in train_shapes.points]))
    wanted = encoder.blocks[0][0](points).mean(0)
    assert (encoder.blocks[0][1].running_mean - wanted).abs().max() < 0.05 * wanted.abs().max() + 0.02


def test_random_twin_depends_on_its_seed_alone(encoder):
    state = torch.random.get_rng_state()
    one, two, other = random_twin(encoder, 0), random_twin(encoder, 0), random_twin(encoder, 1)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(one.blocks[0][0].weight, two.blocks[0][0].weight)
    assert not torch.equal(one.blocks[0][0].weight, other.blocks[0][0].weight)


def test_baselines_stand_beside_and_are_computed_once(encoder, train_shapes, test_shapes):
    prober = Prober(train_shapes, test_shapes, protocol=ProbeProtocol(probes=("knn", "svm")))
    baselines = prober.baselines(encoder)
    assert list(baselines) == [name for name in BASELINES if name != "teacher"]
    assert baselines["majority"][0].official == 0.25
    assert baselines["shape_histogram"][1].mean > 0.9
    assert baselines["random"] != baselines["random_uncalibrated"]
    assert [score.probe for score in baselines["random"]] == ["knn", "svm"]
    train_shapes.asked.clear()
    assert prober.baselines(encoder)["random"] is baselines["random"]
    assert not train_shapes.asked


def test_a_teacher_is_one_more_baseline(encoder, train_shapes, test_shapes):
    teacher = TeacherPoints(CloudTeacher(TeacherConfig(name="random")))
    prober = Prober(train_shapes, test_shapes, protocol=ProbeProtocol(probes=("svm",)), layers=[0], pooling="mean", teacher=teacher)
    baselines = prober.baselines(encoder)
    assert list(baselines) == list(BASELINES)
    values = np.concatenate([embed(teacher, part, rows=rows, pooling="mean") for part, rows in zip(prober.parts, prober.rows, strict=True)])
    np.testing.assert_array_equal(prober.features(teacher).values, values)
    assert baselines["teacher"][0].resplits == prober.probe(teacher)[0].resplits


def test_probe_uses_official_split_and_skips_unlabelled(encoder, train_shapes, test_shapes):
    features = Prober(train_shapes, test_shapes).features(encoder)
    assert len(features.values) == 48 + 20
    assert features.test.sum() == 20
    assert not features.test[:48].any()
    np.testing.assert_array_equal(features.labels[48:], test_shapes.labels)


def test_quick_probe_takes_a_method_or_a_backbone(encoder, train_shapes, test_shapes):
    method = torch.nn.Module()
    method.backbone = encoder
    prober = Prober(train_shapes, test_shapes)
    scores = quick_probe(method, prober)
    assert list(scores) == ["svm", "svm_std", "svm_official"]
    assert scores == quick_probe(encoder, prober)
    assert 0.5 < scores["svm"] <= 1.0
    assert "svm_official" not in quick_probe(encoder, Prober(train_shapes))


def test_bad_data_teaches(encoder, train_shapes):
    bare = copy.copy(train_shapes)
    bare.labels = np.full(len(train_shapes), -1)
    with pytest.raises(DataError, match="no labelled cloud"):
        Prober(bare)
    holes = copy.copy(train_shapes)
    holes.points = [cloud.copy() for cloud in train_shapes.points]
    holes.points[2][5] = np.nan
    with pytest.raises(DataError, match="row 2 of the data set holds NaN"):
        Prober(holes).features(encoder)
    holes.points[2] = np.zeros((0, 3), np.float32)
    with pytest.raises(DataError, match="row 2 of the data set is an empty cloud"):
        Prober(holes).features(encoder)
    holes.points[2] = np.zeros((9, 6), np.float32)
    with pytest.raises(DataError, match="has 6 columns but the backbone takes 3"):
        Prober(holes).features(encoder)
