from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors import safe_open

import geossl
from geossl.cli import extract, run
from geossl.models import save_backbone


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
