"""CroCo's files: every published generation is read, without running anything, and what is not one is told."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import geossl
from geossl.cli import run
from geossl.errors import CheckpointError
from geossl.methods.reference import find_system
from geossl.models import CroCoDecoderConfig, CroCoPair, load_pair_backbone, save_pair_backbone
from geossl.models.croco_files import parse_call, read_croco_file

ARGUMENTS = {
    "img_size": (32, 48),
    "enc_embed_dim": 24,
    "enc_depth": 2,
    "enc_num_heads": 2,
    "dec_embed_dim": 16,
    "dec_depth": 2,
    "dec_num_heads": 2,
    "mlp_ratio": 2,
    "pos_embed": "RoPE50",
}


def published_state(arguments: dict = ARGUMENTS) -> dict[str, Tensor]:
    """Weights under their published names, random, of a model with these arguments."""
    e, d, r = arguments["enc_embed_dim"], arguments["dec_embed_dim"], arguments["mlp_ratio"]
    shapes: dict[str, tuple[int, ...]] = {"mask_token": (1, 1, d), "patch_embed.proj.weight": (e, 3, 16, 16), "patch_embed.proj.bias": (e,)}

    def linear(name: str, rows: int, columns: int) -> None:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (rows, columns), (rows,)

    def block(name: str, dim: int, norms: tuple[str, ...]) -> None:
        for norm in norms:
            shapes[f"{name}.{norm}.weight"] = shapes[f"{name}.{norm}.bias"] = (dim,)
        linear(f"{name}.attn.qkv", 3 * dim, dim)
        linear(f"{name}.attn.proj", dim, dim)
        linear(f"{name}.mlp.fc1", r * dim, dim)
        linear(f"{name}.mlp.fc2", dim, r * dim)

    for i in range(arguments["enc_depth"]):
        block(f"enc_blocks.{i}", e, ("norm1", "norm2"))
    for i in range(arguments["dec_depth"]):
        block(f"dec_blocks.{i}", d, ("norm1", "norm2", "norm3", *(("norm_y",) if arguments.get("norm_im2_in_dec", True) else ())))
        for part in ("projq", "projk", "projv", "proj"):
            linear(f"dec_blocks.{i}.cross_attn.{part}", d, d)
    for name, dim in (("enc_norm", e), ("dec_norm", d)):
        shapes[f"{name}.weight"] = shapes[f"{name}.bias"] = (dim,)
    linear("decoder_embed", d, e)
    linear("prediction_head", 768, d)
    if arguments["pos_embed"] == "cosine":
        cells = arguments["img_size"][0] * arguments["img_size"][1] // 256
        shapes |= {"enc_pos_embed": (cells, e), "dec_pos_embed": (cells, d)}
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) * 0.2 for name, shape in shapes.items()}


def images(seed: int = 0, size: tuple[int, int] = (32, 48)) -> Tensor:
    return torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(seed))


def assert_same(pair: CroCoPair, other: CroCoPair) -> None:
    with torch.no_grad():
        for one, two in zip(pair(images(), images(1)), other(images(), images(1)), strict=True):
            assert torch.equal(one, two)


def written(arguments: dict = ARGUMENTS) -> str:
    return f"CroCoNet({', '.join(f'{key}={value!r}' for key, value in arguments.items())})"


def test_all_generations_give_the_same_model(tmp_path):
    state = published_state()
    (tmp_path / "v2.pth").parent.mkdir(exist_ok=True)
    torch.save({"model": state, "croco_kwargs": ARGUMENTS}, tmp_path / "v2.pth")
    options = argparse.Namespace(model=written(), lr=1e-4, output_dir=Path("out"), mask=np.float64(0.9))
    training = {
        "model": {f"module.{k}": v for k, v in state.items()},
        "optimizer": {"state": {}},
        "scaler": {},
        "args": options,
        "epoch": 3,
    }
    torch.save(training, tmp_path / "checkpoint-last.pth")
    stereo = {k: v for k, v in state.items() if not k.startswith(("mask_token", "prediction_head"))}
    stereo["head.dpt.act_1_postprocess.0.weight"] = torch.ones(3, 24, 1, 1)
    tuned = argparse.Namespace(croco_args=ARGUMENTS, task="stereo", criterion="LaplacianLossBounded2()", crop=[32, 48], tile_conf_mode="x")
    torch.save({"model": stereo, "args": tuned, "best_so_far": np.float64(1.5)}, tmp_path / "crocostereo.pth")

    method = geossl.load_reference("croco", tmp_path / "v2.pth")
    assert find_system(tmp_path / "v2.pth") == "croco"
    assert not method.training
    assert method.backbone.config.image_size == (32, 48)
    assert method.backbone.config.rope_base == 50
    again = geossl.load_reference("croco", tmp_path / "checkpoint-last.pth")
    assert all(torch.equal(again.state_dict()[key], value) for key, value in method.state_dict().items())
    told = geossl.load_reference("croco", state, ARGUMENTS)
    assert torch.equal(told.mask_token, method.mask_token)
    for name in ("v2.pth", "checkpoint-last.pth", "crocostereo.pth"):
        assert_same(load_pair_backbone(tmp_path / name), method.pair)
    file = read_croco_file(tmp_path / "crocostereo.pth")
    assert (file.options["task"], file.options["crop"], file.options["criterion"]) == ("stereo", [32, 48], "LaplacianLossBounded2()")
    assert list(file.others()) == ["head.dpt.act_1_postprocess.0.weight"]
    with pytest.raises(CheckpointError, match="not a stereo or flow model of CroCo: it has no weight for our head"):
        geossl.load_reference("croco", tmp_path / "crocostereo.pth")


def test_the_first_release_has_the_defaults():
    file = read_croco_file({"model": {"enc_blocks.0.attn.qkv.weight": torch.ones(2, 2), "enc_pos_embed": torch.ones(196, 768)}})
    encoder, decoder = file.encoder()[0], file.decoder()[0]
    assert encoder == geossl.models.BACKBONES.config("croco_vit_base_cosine")
    assert decoder == CroCoDecoderConfig()


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"enc_embed_dim": 1024, "enc_depth": 24, "enc_num_heads": 16, "pos_embed": "RoPE100"}, "croco_vit_large"),
        ({"pos_embed": "RoPE100"}, "croco_vit_base"),
    ],
)
def test_released_variants_are_the_registered_ones(arguments, name):
    state = {"enc_blocks.0.attn.qkv.weight": torch.ones(2, 2)}
    assert read_croco_file({"model": state, "croco_kwargs": arguments}).encoder()[0] == geossl.models.BACKBONES.config(name)


def test_parameters_of_the_released_sizes():
    """Counts that were measured with the published code."""
    with torch.device("meta"):
        for name, decoder, whole, encoder in (
            ("croco_vit_base", CroCoDecoderConfig(), 120_076_288, 85_646_592),
            ("croco_vit_large", CroCoDecoderConfig(dim=768, depth=12, heads=12), 417_918_720, 303_098_880),
        ):
            backbone = geossl.create_backbone(name)
            method = geossl.methods.CroCoConfig(decoder=decoder).build(backbone)
            assert sum(p.numel() for p in backbone.parameters()) == encoder
            assert sum(p.numel() for p in method.parameters()) == whole


def test_sin_cos_tables_of_a_file_are_kept_and_no_memory_norm_is_taken():
    arguments = ARGUMENTS | {"pos_embed": "cosine", "norm_im2_in_dec": False}
    state = published_state(arguments)
    method = geossl.load_reference("croco", {"model": state, "croco_kwargs": arguments})
    assert torch.equal(method.backbone.position.added((2, 3)), state["enc_pos_embed"])
    assert torch.equal(method.decoder.position.added((2, 3)), state["dec_pos_embed"])
    assert method.backbone.position.added((3, 5)).shape == (15, 24)  # also from a grid that is not square
    assert not method.decoder.config.norm_memory


def test_nothing_in_a_file_is_run(tmp_path):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    options = argparse.Namespace(model=written(), surprise=Bomb())
    torch.save({"model": published_state(), "args": options, "bomb": Bomb()}, tmp_path / "a.pth")
    geossl.load_reference("croco", tmp_path / "a.pth")
    assert not (tmp_path / "ran").exists()
    assert not hasattr(argparse.Namespace, "surprise")
    for text in (
        "CroCoNet(enc_depth=__import__('os').mkdir('ran'))",
        "CroCoNet(**{})",
        "a.b(enc_depth=1)",
        "CroCoNet(768)",
        "CroCoNet(",
        "",
    ):
        with pytest.raises(CheckpointError, match=r"file: the model is given as .*expected a call with plain values.*It is not run"):
            parse_call(text, "file")
    assert parse_call(" CroCoNet(img_size=(224, 224), pos_embed='RoPE100', norm_im2_in_dec=True)", "file")["img_size"] == (224, 224)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda c: c["model"].update({"dec_blocks2.0.norm1.weight": torch.ones(16)}),
            r"two decoders \(dec_blocks and dec_blocks2\), as DUSt3R",
        ),
        (
            lambda c: c.update(model={"encoder.blocks.0.weight": torch.ones(2)}),
            r"not a CroCo checkpoint: expected enc_blocks.*found \['enc",
        ),
        (lambda c: c["croco_kwargs"].update(enc_dept=3), r"unknown argument of CroCo 'enc_dept'; did you mean 'enc_depth'"),
        (lambda c: c["croco_kwargs"].update(pos_embed="rotary"), r"pos_embed must be 'cosine' or 'RoPE' with a number.*got 'rotary'"),
        (lambda c: c["croco_kwargs"].update(enc_num_heads=5), r"make no encoder: heads must divide dim, got dim=24 and heads=5"),
        (lambda c: c["croco_kwargs"].update(dec_depth="two"), r"the arguments of the model make no decoder"),
        (lambda c: c.update(croco_kwargs=3), r"the arguments of the model are a int, expected a dictionary"),
        (lambda c: c.pop("croco_kwargs"), r"no sin-cos table \(enc_pos_embed\).*does not say with which base; give.*config="),
        (lambda c: c["croco_kwargs"].update(enc_depth=3), r"(?s)does not fit CroCo; nothing was loaded.*missing \(12\): backbone.blocks.2"),
        (lambda c: c["model"].update(extra=torch.ones(1)), r"(?s)does not fit CroCo.*unexpected \(1\): extra"),
    ],
)
def test_what_is_wrong_with_a_file_is_told(change, words):
    content = {"model": published_state(), "croco_kwargs": dict(ARGUMENTS)}
    change(content)
    with pytest.raises(CheckpointError, match=words):
        geossl.load_reference("croco", content)


def test_a_pair_is_saved_and_loaded(tmp_path):
    method = geossl.load_reference("croco", published_state(), ARGUMENTS)
    folder = save_pair_backbone(method.pair, tmp_path / "export")
    assert_same(load_pair_backbone(tmp_path), method.pair)  # a run folder: its export/ is found
    assert torch.equal(geossl.load(folder)(images()), method.backbone(images()))
    config = json.loads((folder / "decoder.json").read_text())
    (folder / "decoder.json").write_text(json.dumps({"decoder": config["decoder"] | {"depht": 2}}))
    with pytest.raises(CheckpointError, match=r"decoder.json is not a configuration geossl wrote.*depht"):
        load_pair_backbone(folder)
    (folder / "decoder.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"expected decoder.safetensors and decoder.json in it; it holds an encoder alone"):
        load_pair_backbone(folder)
    points = geossl.models.save_backbone(geossl.create_backbone("point_vit_tiny", dim=24, depth=1, heads=2), tmp_path / "points")
    with pytest.raises(CheckpointError, match=r"holds a PointViT, which has no decoder for pairs; expected a croco_vit_\* backbone"):
        load_pair_backbone(points)


def test_a_missing_file_is_no_folder(tmp_path):
    with pytest.raises(CheckpointError, match=r"croco\.pth: no such file"):
        load_pair_backbone(tmp_path / "croco.pth")


def test_the_convert_program_writes_encoder_and_decoder(tmp_path, capsys):
    torch.save({"model": published_state(), "croco_kwargs": ARGUMENTS}, tmp_path / "official.pth")
    assert run("convert", [str(tmp_path / "official.pth"), str(tmp_path / "out")]) == 0
    shown = capsys.readouterr().out
    assert "CroCo of system croco" in shown
    assert "geossl.models.load_pair_backbone" in shown
    method = geossl.load_reference("croco", tmp_path / "official.pth")
    assert_same(load_pair_backbone(tmp_path / "out"), method.pair)
    assert torch.equal(geossl.load(tmp_path / "out")(images()), method.backbone(images()))
