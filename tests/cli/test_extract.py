from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

import geossl
from geossl.cli import extract, run
from geossl.errors import DataError
from geossl.models import CroCoDecoderConfig, CroCoPair, load_pair_backbone, save_backbone, save_pair_backbone


@pytest.fixture
def export(tmp_path):
    torch.manual_seed(0)
    backbone = geossl.create_backbone("point_vit_tiny", dim=12, depth=2, heads=2, groups=4, group_size=4)
    return save_backbone(backbone, tmp_path / "export")


@pytest.fixture
def scans(tmp_path):
    rng = np.random.default_rng(0)
    (tmp_path / "scans").mkdir()
    for name, count in (("a.npy", 30), ("b.npy", 3)):
        np.save(tmp_path / "scans" / name, rng.normal(size=(count, 3)).astype(np.float32))
    np.savetxt(tmp_path / "scans" / "c.xyz", rng.normal(size=(20, 3)))
    return tmp_path / "scans"


@pytest.mark.parametrize(("output", "rows"), [("points", 53), ("tokens", 11), ("global", 3)])
def test_folder_to_npz(export, scans, tmp_path, output, rows, capsys):
    out = tmp_path / "f.npz"
    assert extract.main([str(export), str(scans), "--out", str(out), "--output", output, "--layers", "0", "1"]) == 0
    with np.load(out) as archive:
        assert archive["feats"].shape == (rows, 48 if output == "global" else 24)
        assert archive["names"].tolist() == ["a.npy", "b.npy", "c.xyz"]
        assert archive["offsets"][-1] == rows
        assert np.isfinite(archive["feats"]).all()
    assert f"3 clouds, {rows} x" in capsys.readouterr().out


def test_the_call_and_the_program_agree(export, scans, tmp_path):
    out = tmp_path / "f.safetensors"
    assert extract.main([str(export), str(scans / "a.npy"), "--out", str(out), "--points", "16"]) == 0
    wanted = geossl.extract_features(export, scans / "a.npy", points=16)
    with safe_open(out, "pt") as file:
        torch.testing.assert_close(file.get_tensor("feats"), wanted.feats, rtol=0, atol=0)


def test_named_data_set(export, tmp_path):
    out = tmp_path / "f.npz"
    assert extract.main([str(export), "objects:test", "--out", str(out), "--output", "global", "--batch-size", "64"]) == 0
    with np.load(out) as archive:
        assert archive["feats"].shape == (167, 24)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "give a model and a source"),
        (["{export}", "{scans}"], "--out: give a file ending in .npz or .safetensors, got None"),
        (["{export}", "{scans}", "--out", "x.pt"], "got x.pt"),
        (["{export}", "nowhere", "--out", "x.npz"], "nowhere: neither a file, a folder nor a data set"),
        (["{export}", "{scans}", "--out", "x.npz", "--points", "0"], "points must be at least 1, got 0"),
        (["{export}", "{scans}", "--out", "x.npz", "--layers", "9"], "block 9 does not exist"),
        (["nowhere", "{scans}", "--out", "x.npz"], "nowhere: no such folder"),
    ],
)
def test_mistakes_end_in_one_line(args, message, export, scans, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run("extract", [arg.format(export=export, scans=scans) for arg in args]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "x.npz").exists()


def test_a_bad_file_of_a_folder_is_named(export, scans, capsys, tmp_path):
    np.save(scans / "b.npy", np.full((9, 3), np.nan, np.float32))
    assert run("extract", [str(export), str(scans), "--out", str(tmp_path / "x.npz")]) == 2
    assert "b.npy" in capsys.readouterr().err


@pytest.fixture
def image_export(tmp_path):
    torch.manual_seed(0)
    backbone = geossl.create_backbone("croco_vit_tiny", dim=16, depth=2, heads=2, image_size=(32, 32))
    return save_pair_backbone(CroCoPair(backbone, CroCoDecoderConfig(dim=16, depth=1, heads=2).build(backbone.config)), tmp_path / "images")


@pytest.fixture
def photos(tmp_path):
    (tmp_path / "photos").mkdir()
    for name in ("a.png", "b.png"):
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 64, 3), dtype=np.uint8)).save(tmp_path / "photos" / name)
    return tmp_path / "photos"


def test_images_to_maps(image_export, photos, tmp_path, capsys):
    out = tmp_path / "f.npz"
    assert extract.main([str(image_export), str(photos), "--out", str(out), "--layers", "0", "1"]) == 0
    with np.load(out) as archive:
        assert archive["map_1"].shape == (32, 2, 4)
        assert archive["names"].tolist() == ["a.png", "b.png"]
    assert "2 images, maps of 32 x 2 x 4" in capsys.readouterr().out
    pair = [str(image_export), str(photos / "a.png"), "--reference", str(photos / "b.png"), "--size", "32", "32", "--out", str(out)]
    assert extract.main(pair) == 0
    with np.load(out) as archive:
        assert archive["map_0"].shape == (16, 2, 2)
        found = geossl.evaluation.extract_pair_features(image_export, photos / "a.png", photos / "b.png", size=(32, 32))
        np.testing.assert_array_equal(archive["map_0"], found.maps[0].numpy())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--output", "global", "--points", "5"], "--output, --points: for models of point clouds, but this one reads images"),
        (["--layers", "9"], "block 9 does not exist; the backbone has 2 blocks"),
        (["--reference", "b.png", "--batch_size", "2"], "--batch_size: pairs (--reference) are encoded one by one"),
        (
            ["--reference", "b.png", "--scene.name", "rooms"],
            "--reference: a data set of posed images (--scene) is read without second images",
        ),
    ],
)
def test_options_that_images_do_not_read_are_refused(image_export, photos, tmp_path, capsys, options, words):
    source = [] if "--scene.name" in options else [str(photos)]
    assert run("extract", [str(image_export), *source, *options, "--out", str(tmp_path / "f.npz")]) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "f.npz").exists()


def test_posed_images_to_points(image_export, tmp_path, capsys):
    out = tmp_path / "f.npz"
    scene = ["--scene.name", "rooms", "--scene.test_count", "1", "--scene.views", "2", "--scene.points", "500"]
    assert extract.main([str(image_export), *scene, "--scene.width", "32", "--scene.height", "32", "--out", str(out)]) == 0
    with np.load(out) as archive:
        assert archive["coord"].shape == (500, 3)
        assert archive["feats"].shape == (500, 16)
        assert (archive["feats"] != 0).any(1).mean() > 0.9  # the cloud is what the pictures see
    assert "1 scenes, 500 x 16" in capsys.readouterr().out


def test_models_of_the_wrong_kind_of_input(export, image_export, photos, tmp_path, capsys):
    out = ["--out", str(tmp_path / "f.npz")]
    assert run("extract", [str(export), str(photos), "--size", "32", "32", *out]) == 2
    assert "are for models of images; point_vit_tiny reads point clouds" in capsys.readouterr().err
    with pytest.raises(TypeError, match="reads images: use extract_image_features"):
        geossl.extract_features(geossl.load(image_export), torch.rand(10, 3))
    with pytest.raises(TypeError, match="need an encoder and its decoder"):
        geossl.evaluation.extract_pair_features(geossl.load(image_export), torch.rand(3, 32, 32), torch.rand(3, 32, 32))
    assert not (tmp_path / "f.npz").exists()


def test_pairs_that_do_not_come_out_even(image_export, photos, tmp_path):
    pair = load_pair_backbone(image_export)
    both = geossl.evaluation.extract_pair_features(pair, photos, photos)
    assert both.names == ["a.png", "b.png"]
    with pytest.raises(DataError, match="there are only 1 second pictures"):
        geossl.evaluation.extract_pair_features(pair, photos, photos / "a.png")
    with pytest.raises(DataError, match="there are only 1 pictures"):
        geossl.evaluation.extract_pair_features(pair, photos / "a.png", photos)
    (tmp_path / "none").mkdir()
    with pytest.raises(DataError, match="holds no picture"):
        geossl.evaluation.extract_pair_features(pair, tmp_path / "none", tmp_path / "none")
