"""The backbone of CroCo: images of any size, features as promised, positions that stay float32, and clear refusals."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

import geossl
from geossl.cli.pretrain import PretrainConfig
from geossl.config import load_config
from geossl.errors import ConfigError, UnknownNameError
from geossl.layers.grid_positions import MOST_TABLES, grid_positions
from geossl.layers.image_patches import cut_patches, paste_patches
from geossl.models import CroCoDecoderConfig, CroCoPair

ROOT = Path(__file__).parents[2]
SMALL = {"image_size": (32, 48), "patch": 8, "dim": 24, "depth": 3, "heads": 2, "mlp_ratio": 2.0}


@pytest.fixture(params=geossl.list_backbones("croco_vit_*"))
def backbone(request):
    torch.manual_seed(0)
    return geossl.create_backbone(request.param, **SMALL)


def images(height: int = 32, width: int = 48) -> torch.Tensor:
    return torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(0))


def pair(position: str = "rope") -> CroCoPair:
    torch.manual_seed(0)
    encoder = geossl.create_backbone("croco_vit_tiny", **SMALL, position=position)
    return CroCoPair(encoder, CroCoDecoderConfig(dim=16, depth=2, heads=2).build(encoder.config))


@pytest.mark.parametrize("size", [(32, 48), (24, 24), (40, 16)])
def test_features_have_the_promised_shape_and_gradients_reach_every_parameter(backbone, size):
    features = backbone(images(*size))
    assert features.shape == (2, backbone.num_features, size[0] // 8, size[1] // 8)
    (features * torch.randn_like(features)).sum().backward()
    assert all(p.grad is not None for p in backbone.parameters())


def test_intermediates_agree_with_the_forward_pass_and_feature_info(backbone):
    features, blocks = backbone.forward_intermediates(images())
    assert [(x.shape[1], 48 // x.shape[3]) for x in blocks] == [(info.channels, info.stride) for info in backbone.feature_info]
    assert torch.equal(blocks[-1], features)
    assert torch.equal(features, backbone(images()))
    _, raw = backbone.forward_intermediates(images(), [0, -1], norm=False)
    torch.testing.assert_close(backbone.norm(raw[1].movedim(1, 3)).movedim(3, 1), features)
    with pytest.raises(ValueError, match="block 3 does not exist; the backbone has 3 blocks"):
        backbone.forward_intermediates(images(), [3])


def test_images_do_not_see_each_other_and_a_part_of_them_can_be_encoded(backbone):
    backbone.double()
    x = images().double()
    whole = backbone.cut(x)
    torch.testing.assert_close(backbone(x[1:]), backbone(x)[1:])
    part = whole.keep(torch.tensor([3, 7, 30, 40]), type(whole.segments)((2, 2)))
    assert part.cells.tolist() == [3, 7, 6, 16]
    alone = [backbone.encode(whole.keep(rows, type(whole.segments)((2, 0)))) for rows in (torch.tensor([3, 7]), torch.tensor([30, 40]))]
    torch.testing.assert_close(backbone.encode(part)[:2], alone[0])
    assert not torch.allclose(backbone.encode(part)[:2], backbone.encode(whole)[[3, 7]])


def test_saving_and_loading_gives_the_same_features(backbone, tmp_path):
    geossl.models.save_backbone(backbone.eval(), tmp_path / "export")
    again = geossl.load(tmp_path)
    assert again.config == backbone.config
    assert torch.equal(again(images()), backbone(images()))


def test_positions_matter_and_tables_are_kept_for_a_few_sizes():
    """Swapping two patches changes the features of others."""
    encoder = pair().backbone
    x = images(32, 32)
    swapped = torch.cat([x[..., 8:16], x[..., :8], x[..., 16:]], 3)
    assert not torch.allclose(encoder(x)[..., 3], encoder(swapped)[..., 3], atol=1e-5)
    tables = [encoder.position.rotations((2, 3), x) for _ in range(2)]
    assert tables[0] is tables[1]  # made once
    for width in range(1, 2 * MOST_TABLES):
        encoder.position.rotations((1, width), x)
    assert len(encoder.position._tables) == MOST_TABLES


def test_tables_made_without_gradients_can_be_trained_with():
    encoder = pair().backbone
    with torch.inference_mode():
        encoder(images())
    encoder(images()).sum().backward()
    assert encoder.double()(images().double()).dtype == torch.float64  # other tables than those of float32


@pytest.mark.parametrize("position", ["rope", "cosine"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_types_take_other_sizes_too(position, dtype):
    """The sin-cos table is interpolated there, and stays of the type of the tokens."""
    both, x = pair(position), images(24, 40)
    wanted = both(x, x.flip(3))
    maps = both.to(dtype)(x.to(dtype), x.flip(3).to(dtype))
    assert all(found.dtype == dtype for found in maps)
    torch.testing.assert_close(maps[-1].float(), wanted[-1], rtol=0, atol=0.1 if dtype == torch.bfloat16 else 1e-4)


def test_a_pair_gives_the_encoder_and_what_the_second_image_tells():
    both = pair()
    with torch.no_grad():
        maps = both(images(), images().flip(3))
        assert [x.shape[1] for x in maps] == [info.channels for info in both.feature_info] == [24] * 3 + [16] * 2
        assert maps[0].shape == (2, 24, 4, 6)
        torch.testing.assert_close(maps[2], both.backbone(images()))
        chosen = both(images(), images().flip(3), [4, 1])
        assert torch.equal(chosen[0], maps[4])
        assert torch.equal(chosen[1], maps[1])
        other = both(images(), images())
        assert torch.equal(other[2], maps[2])
        assert not torch.allclose(other[4], maps[4], atol=1e-4)
    both.set_grad_checkpointing()
    sum(x.sum() for x in both(images(), images())).backward()
    prefixes = [prefix for group in both.layer_groups() for prefix in group]
    for name, parameter in both.named_parameters():
        assert parameter.grad is not None, name
        assert sum(name.startswith(prefix) for prefix in prefixes) == 1, name
    assert len(both.layer_groups()) == 1 + 3 + 2
    with pytest.raises(ValueError, match=r"same shape, got \[2, 3, 32, 48\] and \[2, 3, 32, 32\]"):
        both(images(), images(32, 32))


def test_patches_are_cut_row_by_row_and_pasted_again():
    x = images()
    patches = cut_patches(x, 8)
    row, column = grid_positions(4, 6)[9].tolist()
    assert (row, column) == (1, 3)
    assert torch.equal(patches[24 + 9], x[1, :, 8:16, 24:32])
    assert torch.equal(paste_patches(patches, (4, 6)), x)


def test_embedding_as_a_convolution_and_as_a_product_agree():
    embed = pair().backbone.patch_embed
    pixels = cut_patches(images(), 8).flatten(1)
    torch.testing.assert_close(embed(pixels), torch.nn.functional.linear(pixels, embed.weight, embed.bias), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (images(36, 48), "multiples of the patch, 8, and at least that; got 36 x 48. Crop or resize them"),
        (images(0, 48), "got 0 x 48"),
        (
            images()[0],
            r"must be floating point \[B, 3, H, W\], normalised by geossl.geometry.normalize_images; got torch.float32 \[3, 32, 48\]",
        ),
        (images()[:, :1], r"got torch.float32 \[2, 1, 32, 48\]"),
        ((images() * 100).byte(), "got torch.uint8"),
        (
            images().index_put((torch.tensor(1), torch.tensor(2)), torch.tensor(torch.inf)),
            "must be finite, but number 1 of 2 has NaN or inf",
        ),
    ],
)
def test_wrong_images_are_refused(wrong, words):
    with pytest.raises(ValueError, match=words):
        pair().backbone(wrong)


def test_wrong_numbers_are_refused():
    with pytest.raises(ConfigError, match=r"image_size must be height and width, multiples of the patch 16, got \(224, 200\)"):
        geossl.create_backbone("croco_vit_base", image_size=(224, 200))
    with pytest.raises(ConfigError, match="heads must divide dim, got dim=768 and heads=5"):
        geossl.create_backbone("croco_vit_base", heads=5)
    with pytest.raises(ConfigError, match="dim must be a multiple of 4 for position=cosine, got 6"):
        geossl.create_backbone("croco_vit_base_cosine", dim=6, heads=2)
    with pytest.raises(UnknownNameError, match="unknown position 'cosin'; did you mean 'cosine'"):
        geossl.create_backbone("croco_vit_base", position="cosin")
    with pytest.raises(ConfigError, match="heads must divide dim, got dim=512 and heads=7"):
        CroCoDecoderConfig(heads=7)
    with pytest.raises(ConfigError, match="rope_base must be a finite number above 0, got 0"):
        geossl.create_backbone("croco_vit_base", rope_base=0)
    with pytest.raises(ConfigError, match=r"mlp_ratio must give the MLPs hidden channels \(mlp_ratio \* dim >= 1\), got -1.0 for dim 768"):
        geossl.create_backbone("croco_vit_base", mlp_ratio=-1.0)
    with pytest.raises(ConfigError, match="got nan for dim 512"):
        CroCoDecoderConfig(mlp_ratio=float("nan"))


@pytest.mark.parametrize("path", sorted((ROOT / "configs/croco").glob("*.yaml")), ids=lambda path: path.stem)
def test_configurations_are_valid_and_as_published(path):
    config = load_config(PretrainConfig, path, [], prog="pretrain")
    with torch.device("meta"):
        config.method.build(dataclasses.replace(config.backbone, depth=1).build())
    if path.stem in ("smoke", "rooms_tiny"):
        return
    assert config.method == dataclasses.replace(config.method, mask_ratio=0.9, norm_pix_loss=True, masked_loss=True, symmetric=False)
    assert config.optim.lr == pytest.approx(1.5e-4 * config.train.batch_size / 256)
    assert (config.optim.betas, config.optim.weight_decay, config.optim.clip) == ((0.9, 0.95), 0.05, None)
    assert config.optim.cycle == config.train.save_every * 2 * config.train.epochs  # stopped half-way
