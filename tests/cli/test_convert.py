"""``tools/convert_checkpoint.py`` from an official file to features."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors import safe_open

import geossl
from geossl.cli import run
from geossl.tasks import load_task

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests/golden/i2p_mae"


@pytest.fixture
def official(golden_root, tmp_path) -> tuple[Path, Path, torch.Tensor]:
    """An official-looking ``.pth`` and ``.yaml`` made of the golden weights, and the points of that case."""
    with safe_open(golden_root / "i2p_mae" / "point_mae_tiny.safetensors", "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a mapping)
        config = json.loads(file.metadata()["config"])
    state = {f"module.{k.removeprefix('state_dict.')}": v.float() for k, v in tensors.items() if k.startswith("state_dict.")}
    torch.save({"base_model": state, "epoch": 300}, tmp_path / "pretrain.pth")
    (tmp_path / "pretrain.yaml").write_text(yaml.safe_dump({"model": config, "max_epoch": 300}))
    return tmp_path / "pretrain.pth", tmp_path / "pretrain.yaml", tensors["points"].float()


@pytest.mark.parametrize("system", ["point_m2ae", "i2p_mae"])
def test_hierarchical_encoders_are_written_too(golden_root, tmp_path, system, capsys):
    """The weights of I2P-MAE, its teacher beside them; without its second head and teacher they are named as those of Point-M2AE."""
    with safe_open(golden_root / "i2p_mae" / "i2p_mae_tiny.safetensors", "pt") as file:
        state = {key.removeprefix("state_dict."): file.get_tensor(key) for key in file.keys() if key.startswith("state_dict.")}  # noqa: SIM118
        config, points = json.loads(file.metadata()["config"]), file.get_tensor("points").float()
    if system == "point_m2ae":
        shared = {key: value for key, value in state.items() if not key.startswith(("clip_model.", "rec_head_2d."))}
        state = {key.replace("rec_head_3d.", "rec_head."): value for key, value in shared.items()}
    torch.save({"base_model": {f"module.{key}": value for key, value in state.items()}}, tmp_path / "pretrain.pth")
    (tmp_path / "pretrain.yaml").write_text(yaml.safe_dump({"model": config}))
    arguments = [tmp_path / "pretrain.pth", tmp_path / "out", "--config", tmp_path / "pretrain.yaml"]  # which it is, the weights tell
    assert run("convert", [str(argument) for argument in arguments]) == 0
    assert f"of system {system}" in capsys.readouterr().out
    model = geossl.load_reference(system, tmp_path / "pretrain.pth", config)
    assert torch.equal(geossl.load(tmp_path / "out")(points).feats, model.backbone(points).feats)


def test_the_written_folder_gives_the_same_features(official, tmp_path):
    weights, config, points = official
    out = tmp_path / "converted"
    program = [sys.executable, ROOT / "tools" / "convert_checkpoint.py", weights, out, "--config", config]
    done = subprocess.run(program, capture_output=True, text=True, check=True)
    assert f"geossl.load({str(out)!r})" in done.stdout
    model = geossl.load_reference("point_mae", weights, yaml.safe_load(config.read_text())["model"])
    assert torch.equal(geossl.load(out)(points).feats, model.backbone(points).feats)


def test_a_classifier_keeps_its_head(tmp_path, capsys):
    from safetensors.torch import load_file

    head, encoder = (load_file(GOLDEN / f"i2p_mae_{name}.safetensors") for name in ("finetune_tiny", "tiny"))
    state = {k.removeprefix("state_dict."): v for k, v in encoder.items() if k.startswith("state_dict.h_encoder.") and "norms" not in k}
    state |= {k.removeprefix("modelnet.state_dict."): v for k, v in head.items() if k.startswith("modelnet.state_dict.")}
    with safe_open(GOLDEN / "i2p_mae_finetune_tiny.safetensors", "pt") as file:
        config = json.loads(file.metadata()["config"])
    torch.save({"base_model": state}, tmp_path / "modelnet.pth")
    (tmp_path / "modelnet.yaml").write_text(yaml.safe_dump({"model": config}))
    flags = ["--system", "point_m2ae", "--config", str(tmp_path / "modelnet.yaml")]
    assert run("convert", [str(tmp_path / "modelnet.pth"), str(tmp_path / "out"), *flags]) == 0
    assert "geossl.tasks.load_task" in capsys.readouterr().out
    model = load_task(tmp_path / "out")
    assert (len(model.classes), model.config.label_smoothing) == (40, config["smooth"])
    torch.testing.assert_close(model.logits(head["points"].float()), head["modelnet.logits"], rtol=1e-4, atol=2e-5)
    assert geossl.load(tmp_path / "out").config.local_radius == tuple(config["local_radius"])


def test_errors_are_one_line_and_write_nothing(official, tmp_path, capsys):
    weights, config, _ = official
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("keep me")
    for arguments, message in (
        ([weights, tmp_path / "full"], "is not an empty folder"),
        ([tmp_path / "none.pth", tmp_path / "out"], "none.pth cannot be read"),
        ([weights, tmp_path / "out", "--system", "pointmae"], "did you mean 'point_mae'"),
        ([weights, tmp_path / "out", "--config", tmp_path / "none.yaml"], "none.yaml cannot be read as YAML"),
    ):
        assert run("convert", [str(a) for a in arguments]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert len(error.splitlines()) == 1
    assert not (tmp_path / "out").exists()
    assert config.exists()
