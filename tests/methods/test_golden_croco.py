"""CroCo against tensors computed with the published implementation.

Every file of ``GEOSSL_GOLDEN/croco`` with a mask is a case of pretraining, every one with the tokens of hooks a pair of encoder
and decoder, so further cases of the same form need no code: point the variable at their folder.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from golden_files import ROOT, GoldenFile, close, golden_files

import geossl
from geossl.geometry import ImageBatch
from geossl.layers import Segments
from geossl.layers.grid_positions import grid_positions, sincos_table
from geossl.layers.image_patches import to_map
from geossl.methods import CroCo
from geossl.models.croco_files import build_pair, read_croco_file

TOLERANCE = 1e-5


def pretraining_cases() -> list[Path]:
    return golden_files("croco", lambda metadata, names: {"in/mask", "in/img1", "out/pred"} <= names)


def pair_cases() -> list[Path]:
    return golden_files("croco", lambda metadata, names: "mid/hook0_tokens" in names)


class Case(GoldenFile):
    """One golden file and the parity model built from its weights."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.state, self.arguments = self.part("sd/"), self.config["cfg"]
        self.model: CroCo = geossl.load_reference("croco", {"model": self.state, "croco_kwargs": self.arguments})
        self.batch = ImageBatch(self.tensors["in/img1"], self.tensors["in/img2"])
        self.mask = self.tensors["in/mask"]
        size = self.arguments["img_size"] // self.arguments["patch_size"]
        self.grid = (size, size)

    def check(self, actual: torch.Tensor, name: str, atol: float = TOLERANCE) -> None:
        close(actual, self.tensors[name], rtol=0, atol=atol, name=name)


@pytest.fixture(scope="module", params=pretraining_cases(), ids=lambda path: path.stem)
def case(request: pytest.FixtureRequest) -> Case:
    return Case(request.param)


def published_gradients(model: CroCo) -> dict[str, torch.Tensor]:
    """Gradients under the names of the published code, keys and values of a cross-attention apart."""
    names = {"backbone.": "enc_", "decoder.": "dec_"}
    special = {
        "backbone.patch_embed.": "patch_embed.proj.",
        "backbone.norm.": "enc_norm.",
        "decoder.embed.": "decoder_embed.",
        "decoder.norm.": "dec_norm.",
        "head.": "prediction_head.",
    }
    found = {}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        old, new = next(((a, b) for a, b in (special | names).items() if name.startswith(a)), ("", ""))
        published = new + name.removeprefix(old)
        published = published.replace(".norm_memory.", ".norm_y.").replace(".cross_attn.q.", ".cross_attn.projq.")
        if ".cross_attn.kv." in published:
            for key, gradient in zip("kv", parameter.grad.chunk(2), strict=True):
                found[published.replace(".kv.", f".proj{key}.")] = gradient
        else:
            found[published] = parameter.grad
    return found


def test_cases_are_found() -> None:
    assert pretraining_cases(), f"no case of CroCo's pretraining in {ROOT}; GEOSSL_GOLDEN must name a folder with a croco sub-folder"
    assert pair_cases(), f"no case of a pair in {ROOT}/croco"


@pytest.mark.golden
@torch.no_grad()
def test_encoder(case: Case) -> None:
    backbone = case.model.backbone
    one, other = backbone.cut(case.batch.image), backbone.cut(case.tensors["in/img2"])
    close(grid_positions(*case.grid).expand(len(case.batch), -1, -1), case.tensors["mid/pos"], rtol=0, atol=0)
    case.check(backbone.patch_embed(one.pixels), "mid/patch_embed_img1")
    blocks: list[torch.Tensor] = []
    case.check(backbone.encode(other, intermediates=blocks), "mid/enc_img2")
    case.check(blocks[0], "mid/enc_img2_block0")
    visible = one.keep((~case.mask).flatten().nonzero()[:, 0], Segments(tuple((~case.mask).sum(1).tolist())))
    case.check(backbone.encode(visible), "mid/enc_img1_visible")
    both = backbone.encode(other.join(visible))  # as the method runs it
    case.check(both[: len(other.pixels)], "mid/enc_img2")
    case.check(both[len(other.pixels) :], "mid/enc_img1_visible")


@pytest.mark.golden
@torch.no_grad()
def test_decoder(case: Case) -> None:
    model, decoder = case.model, case.model.decoder
    memory = decoder.embed(case.tensors["mid/enc_img2"].flatten(0, 1))
    tokens = model.mask_token.repeat(case.mask.numel(), 1)
    tokens[~case.mask.flatten()] = decoder.embed(case.tensors["mid/enc_img1_visible"].flatten(0, 1))
    blocks: list[torch.Tensor] = []
    decoded = decoder(tokens, memory, case.grid, intermediates=blocks)
    case.check(blocks[0], "mid/dec_block0")
    case.check(decoded, "mid/dec_out")
    case.check(model.head(decoded), "out/pred")
    features = model.pair(case.batch.image, case.batch.reference)
    case.check(features[-1].flatten(2).transpose(1, 2), "mid/dec_out_unmasked")


@pytest.mark.golden
def test_prediction_and_reconstruction(case: Case) -> None:
    output = case.model(case.batch, mask=case.mask)
    close(output.aux["prediction"], case.tensors["out/pred"][case.mask], rtol=0, atol=TOLERANCE)
    case.check(case.model.reconstruct(case.batch.image, case.tensors["in/img2"], case.mask), "out/reconstruction")


@pytest.mark.golden
@pytest.mark.parametrize("normalised", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_the_four_losses(case: Case, normalised: bool, masked: bool) -> None:
    config = dataclasses.replace(case.model.config, norm_pix_loss=normalised, masked_loss=masked)
    model = config.build(case.model.backbone.config.build())
    model.load_state_dict(case.model.state_dict())
    case.check(model(case.batch, mask=case.mask).loss, f"out/loss_normpix{int(normalised)}_masked{int(masked)}")
    if not normalised:  # then the target is the raw patch, bit for bit
        one, other = model.backbone.cut(case.batch.image), model.backbone.cut(case.tensors["in/img2"])
        found = model.complete(one, other, case.mask, int(case.mask[0].sum()), all_patches=True)
        case.check(found.target, "out/target", atol=0)


@pytest.mark.golden
@pytest.mark.parametrize("checkpointing", [False, True])
def test_every_gradient(case: Case, checkpointing: bool) -> None:
    model = case.model.train()
    model.set_grad_checkpointing(checkpointing)
    model.zero_grad()
    reference = case.tensors["in/img2"].clone().requires_grad_()
    model(ImageBatch(case.batch.image, reference), mask=case.mask).loss.backward()
    model.set_grad_checkpointing(False)
    gradients = published_gradients(model) | {"img2": reference.grad}
    stored = case.part("grad/")
    norms = stored.pop("all_param_grad_norms")
    names = sorted(set(gradients) - {"img2"})
    assert names == sorted(set(case.state) - {"enc_pos_embed", "dec_pos_embed"})
    close(torch.stack([gradients[name].norm() for name in names]), norms, rtol=1e-5, atol=1e-5 * float(norms.max()), name="norms")
    assert stored
    for name, gradient in stored.items():
        close(gradients[name], gradient, rtol=0, atol=1e-5 * float(gradient.abs().max()), name=name)


@pytest.mark.golden
def test_position_tables(case: Case) -> None:
    found = case.part("pos/") | case.part("interp/")
    kind = case.model.backbone.position.kind
    assert bool(found) == (kind == "cosine")
    if kind == "rope":
        return  # their rotations are in the operator's tests
    for name, expected in found.items():
        rows, columns = map(int, name.rpartition("grid" if "grid" in name else "_")[2].split("x"))
        if name.startswith("sincos"):
            actual = sincos_table(rows, columns, int(name.split("_dim")[1].split("_")[0]))
        else:
            part = case.model.backbone if name.startswith("enc") else case.model.decoder
            actual = part.position.added((rows, columns))
        close(actual, expected, rtol=0, atol=1e-6, name=name)
    for part, name in ((case.model.backbone, "enc_pos_embed"), (case.model.decoder, "dec_pos_embed")):
        dim = case.state[name].shape[1]
        close(sincos_table(*case.grid, dim), case.state[name], rtol=0, atol=1e-6, name=name)
        assert torch.equal(part.position.added(case.grid), case.state[name])


@pytest.mark.golden
@pytest.mark.parametrize("path", pair_cases(), ids=lambda path: path.stem)
@torch.no_grad()
def test_the_features_of_a_pair(path: Path) -> None:
    file = GoldenFile(path)
    arguments = file.config["cfg"]
    pair = build_pair(read_croco_file({"model": file.part("sd/"), "croco_kwargs": arguments}))
    hooks = file.config["hooks_idx"]
    maps = pair(file.tensors["in/img1"], file.tensors["in/img2"], hooks)
    grid = tuple(side // 16 for side in arguments["img_size"])
    for number, features in enumerate(maps):
        expected = to_map(file.tensors[f"mid/hook{number}_tokens"].flatten(0, 1), grid)
        close(features, expected, rtol=0, atol=TOLERANCE, name=f"hook {number}")
