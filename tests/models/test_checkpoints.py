"""Official checkpoints are found under their usual keys, and no pickle is ever executed."""

from __future__ import annotations

import os
import pickle
import zipfile
from collections import OrderedDict

import numpy as np
import pytest
import torch

import geossl
from geossl.errors import CheckpointError, UnknownNameError
from geossl.models.checkpoints import read_reference_state, read_torch_file, read_torchscript_weights


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_pickle_that_would_run_code_is_refused_and_does_not_run(tmp_path):
    torch.save({"base_model": {"w": torch.ones(1)}, "metrics": Bomb(tmp_path / "ran")}, tmp_path / "bad.pth")
    (tmp_path / "plain.pth").write_bytes(pickle.dumps(Bomb(tmp_path / "ran")))
    for name in ("bad.pth", "plain.pth"):
        with pytest.raises(CheckpointError, match=f"{name}.*would run code when read; it was not opened"):
            geossl.load_reference("point_mae", tmp_path / name)
    assert not (tmp_path / "ran").exists()


def test_numpy_scalars_that_training_scripts_store_are_read(tmp_path):
    torch.save({"model": {"w": torch.ones(1)}, "best": np.float64(0.5), "epoch": np.int64(3), "ok": np.bool_(True)}, tmp_path / "a.pth")
    assert read_torch_file(tmp_path / "a.pth")["best"] == 0.5


@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"base_model": s}, lambda s: {"model": s}, lambda s: {"state_dict": s}])
def test_weights_are_found_and_data_parallel_prefixes_stripped(wrap):
    state = read_reference_state(wrap({"module.a.weight": torch.ones(2, dtype=torch.float16), "module.n": torch.tensor(3)}))
    assert list(state) == ["a.weight", "n"]
    assert state["a.weight"].dtype == torch.float32
    assert state["n"].dtype == torch.int64


def test_what_is_not_a_checkpoint_is_named(tmp_path):
    (tmp_path / "cut.pth").write_bytes(b"PK\x03\x04 not a zip")
    with pytest.raises(CheckpointError, match=r"cut\.pth cannot be read as a torch file"):
        geossl.load_reference("point_mae", tmp_path / "cut.pth")
    with pytest.raises(CheckpointError, match=r"missing.pth cannot be read as a torch file \(missing"):
        geossl.load_reference("point_mae", tmp_path / "missing.pth")
    with pytest.raises(CheckpointError, match=r"holds no weights.*found \['epoch'\]"):
        read_reference_state({"epoch": 3})
    with pytest.raises(CheckpointError, match=r"not a Point-MAE pretraining checkpoint: expected MAE_encoder"):
        geossl.load_reference("point_mae", {"fc.weight": torch.ones(2, 2)})
    with pytest.raises(UnknownNameError, match="did you mean 'point_mae'"):
        geossl.load_reference("point_ma", tmp_path)


def test_extra_and_missing_weights_are_listed(tmp_path):
    method = geossl.methods.METHODS.config("point_mae").build(geossl.create_backbone("point_vit_tiny", dim=24, depth=1, heads=6))
    state = published_names(method)
    assert torch.equal(geossl.load_reference("point_mae", state).mask_token, method.mask_token)
    torch.save({"base_model": {f"module.{k}": v for k, v in state.items()}, "epoch": 300}, tmp_path / "ok.pth")
    assert geossl.load_reference("point_mae", tmp_path / "ok.pth").backbone.config.min_sq_norm == 1e-3
    del state["MAE_decoder.norm.bias"]
    state["MAE_encoder.surprise"] = torch.ones(1)
    with pytest.raises(CheckpointError, match=r"(?s)missing \(1\): decoder_norm.bias.*unexpected \(1\): MAE_encoder.surprise"):
        geossl.load_reference("point_mae", state)


def published_names(method) -> dict[str, torch.Tensor]:
    """Name the weights of a method as the published code does."""
    table = [
        ("backbone.embed.conv1.", "MAE_encoder.encoder.first_conv.0."),
        ("backbone.embed.norm1.", "MAE_encoder.encoder.first_conv.1."),
        ("backbone.embed.conv2.", "MAE_encoder.encoder.first_conv.3."),
        ("backbone.embed.conv3.", "MAE_encoder.encoder.second_conv.0."),
        ("backbone.embed.norm2.", "MAE_encoder.encoder.second_conv.1."),
        ("backbone.embed.conv4.", "MAE_encoder.encoder.second_conv.3."),
        ("backbone.position.", "MAE_encoder.pos_embed."),
        ("backbone.", "MAE_encoder."),
        ("decoder_position.", "decoder_pos_embed."),
        ("decoder.", "MAE_decoder."),
        ("decoder_norm.", "MAE_decoder.norm."),
        ("head.", "increase_dim.0."),
    ]
    state = {}
    for name, value in method.state_dict().items():
        old, new = next(((old, new) for old, new in table if name.startswith(old)), ("", ""))
        if ("conv" in name and name.endswith("weight")) or name == "head.weight":
            value = value[..., None]
        state[new + name.removeprefix(old)] = value.view(1, 1, -1) if name == "mask_token" else value
    return state


# Lightning files --------------------------------------------------------------------------------------------------------------------------


class Foreign:
    """Stands for the classes that hyper-parameters hold: called, built, filled and nested."""

    def __init__(self, value):
        self.value = value

    def __reduce__(self):
        return Foreign, (self.value,), {"state": self}, iter([1, 2]), iter([("a", 1)])


def lightning_file(path, state, **more) -> None:
    torch.save(
        {"state_dict": state, "hyper_parameters": {"model": Foreign({1, 2}), "options": [Foreign(None)], **more}, "global_step": 3}, path
    )


def test_objects_of_a_lightning_file_are_passed_over(tmp_path):
    state = {
        "a": torch.randn(3, 2),
        "half": torch.ones(2).half(),
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "view": torch.eye(4)[1:, ::2],
    }
    lightning_file(tmp_path / "l.ckpt", state)
    read = read_reference_state(tmp_path / "l.ckpt", skip_objects=True)
    assert set(read) == set(state)
    assert all(torch.equal(read[key], value.float()) for key, value in state.items())
    with pytest.raises(CheckpointError, match="holds Python objects beyond tensors"):
        read_reference_state(tmp_path / "l.ckpt")


@pytest.mark.parametrize("legacy", [False, True])
def test_a_malicious_lightning_file_runs_nothing(tmp_path, legacy):
    lightning_file(tmp_path / "bad.ckpt", {"a": torch.ones(1)}, bomb=Bomb(tmp_path / "ran"))
    if legacy:
        content = {"state_dict": {"a": torch.ones(1)}, "bomb": Bomb(tmp_path / "ran")}
        torch.save(content, tmp_path / "bad.ckpt", _use_new_zipfile_serialization=False)
    assert torch.equal(read_reference_state(tmp_path / "bad.ckpt", skip_objects=True)["a"], torch.ones(1))
    assert not (tmp_path / "ran").exists()


# Pickles by hand: each would call something, or change something of this process, if it were read as usual.
HOSTILE = {
    "call": b"cos\nmkdir\n(V{path}\ntR.",
    "call as a new object": b"\x80\x02cos\nmkdir\n(V{path}\nt\x81.",
    "call what was built by a call": b"cbuiltins\ngetattr\n(cos\nsystem\nVmkdir {path}\ntR(VtR.",
    "change a function": b"ctorch._utils\n_rebuild_tensor_v2\n(N}}V__defaults__\nI1\nstb.",
    "change a class": b"ccollections\nOrderedDict\n}}Vmove_to_end\nI1\nsb.",
    "extension registry": b"\x80\x02\x82\x01.",
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_pickles_are_refused_or_read_as_nothing(tmp_path, kind):
    text = HOSTILE[kind].decode("latin-1").replace("{path}", str(tmp_path / "ran")).replace("}}", "}")
    defaults, method = torch._utils._rebuild_tensor_v2.__defaults__, OrderedDict.move_to_end
    (tmp_path / "bad.ckpt").write_bytes(text.encode("latin-1"))
    with pytest.raises(CheckpointError, match=r"bad\.ckpt"):
        read_reference_state(tmp_path / "bad.ckpt", skip_objects=True)
    with zipfile.ZipFile(tmp_path / "bad.ckpt", "w") as archive:  # the same where torch keeps its pickle today
        archive.writestr("archive/data.pkl", text.encode("latin-1"))
        archive.writestr("archive/version", "3\n")
    with pytest.raises(CheckpointError, match=r"bad\.ckpt"):
        read_reference_state(tmp_path / "bad.ckpt", skip_objects=True)
    assert not (tmp_path / "ran").exists()
    assert (torch._utils._rebuild_tensor_v2.__defaults__, OrderedDict.move_to_end) == (defaults, method)


def test_a_torchscript_program_is_not_run(tmp_path):
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), tmp_path / "program.ckpt")
    with pytest.raises(CheckpointError, match="is a TorchScript program"):
        read_torch_file(tmp_path / "program.ckpt", skip_objects=True)


class Program(torch.nn.Module):
    """Parameters of several types and strides, a buffer, an attribute that is no tensor."""

    def __init__(self):
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
        self.scale = torch.nn.Parameter(torch.rand(2, 3).T.half())
        self.sizes = [1, 2]

    def forward(self, x):
        return self.layers(x)


def test_weights_of_a_torchscript_program_are_read_without_running_it(tmp_path):
    model = Program()
    torch.jit.save(torch.jit.script(model), tmp_path / "program.pt")
    state = read_torchscript_weights(tmp_path / "program.pt")
    assert set(state) == set(model.state_dict())
    assert all(torch.equal(state[key], value) and state[key].dtype == value.dtype for key, value in model.state_dict().items())
    assert torch.equal(read_reference_state(tmp_path / "program.pt")["scale"], model.scale.float())


def test_a_damaged_torchscript_program_is_refused(tmp_path):
    torch.jit.save(torch.jit.script(Program()), tmp_path / "program.pt")
    with zipfile.ZipFile(tmp_path / "program.pt") as whole, zipfile.ZipFile(tmp_path / "short.pt", "w") as short:
        for name in whole.namelist():
            short.writestr(name, whole.read(name)[:20] if "/data/" in name else whole.read(name))
    with pytest.raises(CheckpointError, match=r"short\.pt cannot be read as a TorchScript archive"):
        read_reference_state(tmp_path / "short.pt")
    with pytest.raises(CheckpointError, match="is not a TorchScript archive"):
        read_torchscript_weights(tmp_path / "nothing.pt")


def test_a_program_that_names_code_runs_none(tmp_path):
    torch.jit.save(torch.jit.script(Program()), tmp_path / "program.pt")
    with zipfile.ZipFile(tmp_path / "program.pt") as whole, zipfile.ZipFile(tmp_path / "bomb.pt", "w") as bomb:
        for name in whole.namelist():
            bomb.writestr(name, pickle.dumps(Bomb(tmp_path / "ran"), 2) if name.endswith("/data.pkl") else whole.read(name))
    with pytest.raises(CheckpointError):
        read_reference_state(tmp_path / "bomb.pt")
    assert not (tmp_path / "ran").exists()
