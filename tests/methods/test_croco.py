"""CroCo: what is hidden stays unseen, the second image is used, options do what they say, and the batch may be split."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

import geossl
from geossl.engine.optim import OptimConfig, build_optimizer
from geossl.errors import ConfigError
from geossl.geometry import ImageBatch
from geossl.layers import BatchRandom
from geossl.layers.image_patches import cut_patches
from geossl.methods import METHODS, CroCo
from geossl.models.croco_vit import CroCoDecoderConfig

DECODER = CroCoDecoderConfig(dim=16, depth=2, heads=2, mlp_ratio=2.0)


def tiny(position: str = "rope", patch: int = 8, **options) -> CroCo:
    torch.manual_seed(0)
    backbone = geossl.create_backbone(
        "croco_vit_tiny", image_size=(32, 32), patch=patch, dim=24, depth=2, heads=2, mlp_ratio=2.0, position=position
    )
    return dataclasses.replace(METHODS.config("croco"), **{"mask_ratio": 0.75, "decoder": DECODER} | options).build(backbone)


def pairs(count: int = 2, size: tuple[int, int] = (32, 32), seed: int = 0) -> ImageBatch:
    generator = torch.Generator().manual_seed(seed)
    return ImageBatch(torch.randn(count, 3, *size, generator=generator), torch.randn(count, 3, *size, generator=generator))


def seeded(seed: int = 1) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def hidden_pixels(mask: Tensor, grid: tuple[int, int], patch: int) -> Tensor:
    """``[B, 1, H, W]`` bool."""
    return mask.view(-1, 1, *grid).repeat_interleave(patch, 2).repeat_interleave(patch, 3)


@pytest.mark.parametrize("position", ["rope", "cosine"])
@pytest.mark.parametrize("size", [(32, 32), (24, 40)])  # 24 x 40: neither square nor of the size the model is meant for
def test_hidden_pixels_are_not_seen_and_the_reference_is(position, size):
    method, batch = tiny(position), pairs(size=size)
    grid = (size[0] // 8, size[1] // 8)
    with torch.no_grad():
        output = method(batch, generator=seeded())
        mask = output.aux["mask"]
        assert mask.sum(1).tolist() == [int(0.75 * grid[0] * grid[1])] * 2
        assert not torch.equal(mask[0], mask[1])
        other = torch.randn_like(batch.image)
        hidden = hidden_pixels(mask, grid, 8)
        replaced = ImageBatch(torch.where(hidden, other, batch.image), batch.reference)
        assert torch.equal(method(replaced, mask=mask).aux["prediction"], output.aux["prediction"])
        seen = ImageBatch(torch.where(hidden, batch.image, other), batch.reference)
        assert not torch.allclose(method(seen, mask=mask).aux["prediction"], output.aux["prediction"])
        moved = method(ImageBatch(batch.image, torch.randn_like(batch.image)), mask=mask)
        assert not torch.allclose(moved.aux["prediction"], output.aux["prediction"], atol=1e-3)


def test_the_loss_is_the_mean_over_hidden_patches_with_unbiased_variance():
    method, batch = tiny(), pairs()
    output = method(batch, generator=seeded())
    mask = output.aux["mask"].flatten()
    true = cut_patches(batch.image, 8).permute(0, 2, 3, 1).flatten(1)[mask]
    true = (true - true.mean(1, keepdim=True)) / (true.var(1, keepdim=True, unbiased=True) + 1e-6).sqrt()
    torch.testing.assert_close(output.loss, (output.aux["prediction"] - true).square().mean(1).mean())


def test_what_only_hidden_patches_need_is_computed_for_them_alone():
    """Predictions of hidden patches are those of a pass that predicts all."""
    method, batch = tiny(), pairs()
    one, other = method.backbone.cut(batch.image), method.backbone.cut(batch.reference)
    mask = method.draw_mask(one, BatchRandom.of(batch, seeded()))
    with torch.no_grad():
        some = method.complete(one, other, mask, 12).prediction
        everything = method.complete(one, other, mask, 12, all_patches=True).prediction
    torch.testing.assert_close(some, everything[mask.flatten()], rtol=1e-5, atol=1e-6)


def test_symmetric_is_the_mean_of_both_directions():
    method, batch = tiny(symmetric=True), pairs()
    output = method(batch, generator=seeded())
    mask = output.aux["mask"]
    assert mask.shape == (4, 16)
    assert not torch.equal(mask[:2], mask[2:])
    single = tiny()
    single.load_state_dict(method.state_dict())
    there = single(batch, mask=mask[:2]).loss
    back = single(ImageBatch(batch.reference, batch.image), mask=mask[2:]).loss
    torch.testing.assert_close(output.loss, (there + back) / 2)


def test_masks_do_not_depend_on_how_the_batch_is_split():
    method, batch = tiny(symmetric=True), pairs(4)
    whole = method(batch, generator=seeded()).aux["mask"].unflatten(0, (2, 4))
    rows = torch.tensor([1, 3])
    part = ImageBatch(batch.image[rows], batch.reference[rows], slot=rows, global_size=4)
    assert torch.equal(method(part, generator=seeded()).aux["mask"].unflatten(0, (2, 2)), whole[:, rows])


def test_bfloat16_and_gradient_checkpointing_agree_with_float32():
    method, batch = tiny(), pairs()
    plain = method(batch, generator=seeded()).loss
    plain.backward()
    expected = {name: p.grad.clone() for name, p in method.named_parameters()}
    method.zero_grad()
    method.set_grad_checkpointing()
    loss = method(batch, generator=seeded()).loss
    loss.backward()
    assert torch.equal(loss, plain)
    for name, p in method.named_parameters():
        torch.testing.assert_close(p.grad, expected[name], msg=name)
    with torch.autocast("cpu", torch.bfloat16):
        half = method(batch, generator=seeded()).loss
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, plain, rtol=0.02, atol=0)
    table = method.backbone.position.rotations((4, 4), torch.zeros(1, dtype=torch.bfloat16))
    assert table.dtype == torch.float32


@pytest.mark.slow
@pytest.mark.parametrize("position", ["rope", "cosine"])
def test_compiles_without_a_break(position):
    method, batch = tiny(position), pairs()
    one, other = method.backbone.cut(batch.image), method.backbone.cut(batch.reference)
    mask = method.draw_mask(one, BatchRandom.of(batch, seeded()))
    compiled = torch.compile(method.complete, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(one, other, mask, 12).prediction, method.complete(one, other, mask, 12).prediction)


def test_pictures_of_every_pair():
    method, batch = tiny(), pairs()
    made = method.pictures(batch, generator=seeded())
    assert len(made) == 2
    assert list(made[0]) == ["image", "masked", "reference", "completion", "error"]
    for name, image in made[0].items():
        assert image.shape == ((32, 32) if name == "error" else (32, 32, 3))
        assert 0 <= image.min() <= image.max() <= 1
    mask = method(batch, generator=seeded()).aux["mask"]
    grey = (made[0]["masked"] == 0.5).all(2)
    assert torch.equal(torch.from_numpy(grey), hidden_pixels(mask, (4, 4), 8)[0, 0])


def test_layers_from_input_to_output_as_published():
    method = tiny()
    prefixes = [prefix for group in method.layer_groups() for prefix in group]
    for name, _ in method.named_parameters():
        assert sum(name.startswith(prefix) for prefix in prefixes) == 1, name
    groups = build_optimizer(method, OptimConfig(layer_decay=0.5, weight_decay=0.1)).param_groups
    scale = {id(p): (group["lr_scale"], group["weight_decay"]) for group in groups for p in group["params"]}
    found = {name: scale[id(p)] for name, p in method.named_parameters()}
    # Two encoder and two decoder blocks: ids 0 (patches), 1, 2, 3, 4 and 5 (head), the rate halved from each to the one before.
    assert found["mask_token"] == (0.5**5, 0.1)  # decayed, as published
    assert found["backbone.patch_embed.bias"] == (0.5**5, 0.0)
    assert found["backbone.blocks.0.norm1.weight"] == (0.5**4, 0.0)
    assert found["backbone.norm.weight"][0] == found["decoder.embed.weight"][0] == found["backbone.blocks.1.mlp.fc1.weight"][0] == 0.5**3
    assert found["decoder.blocks.0.cross_attn.kv.weight"] == (0.5**2, 0.1)
    assert found["decoder.norm.bias"] == (0.5, 0.0)
    assert found["head.weight"] == (1.0, 0.1)


def test_initial_weights_are_as_published():
    method = dataclasses.replace(METHODS.config("croco"), decoder=dataclasses.replace(DECODER, dim=64, heads=4)).build(
        geossl.create_backbone("croco_vit_tiny", depth=1)
    )
    weight = method.backbone.patch_embed.weight  # [192, 768]
    bound = (6 / (192 + 768)) ** 0.5
    assert 0.99 * bound < weight.abs().max() <= bound
    assert 0 < method.backbone.patch_embed.bias.abs().max() <= 768**-0.5
    qkv = method.decoder.blocks[0].attn.qkv
    assert qkv.weight.abs().max() <= (6 / (64 + 192)) ** 0.5
    assert not qkv.bias.any()
    assert method.mask_token.std().item() == pytest.approx(0.02, rel=0.4)
    assert {m.eps for m in method.modules() if isinstance(m, torch.nn.LayerNorm)} == {1e-6}


def test_what_is_wrong_with_a_batch_is_told():
    method, batch = tiny(), pairs()
    with pytest.raises(ValueError, match="the batch has no reference; use data of pairs"):
        method(ImageBatch(batch.image))
    spoiled = batch.reference.clone()
    spoiled[1, 0, 3, 3] = torch.nan
    with pytest.raises(ValueError, match="reference must be finite, but number 1 of 2 has NaN"):
        method(ImageBatch(batch.image, spoiled))
    with pytest.raises(ValueError, match=r"multiples of the patch, 8, and at least that; got 36 x 32"):
        method(pairs(size=(36, 32)))
    with pytest.raises(ValueError, match=r"multiples of the patch, 8, and at least that; got 4 x 32"):
        method(pairs(size=(4, 32)))
    with pytest.raises(ValueError, match=r"mask_ratio 0.75 hides none of the 1 patches"):
        method(pairs(size=(8, 8)))
    with pytest.raises(ValueError, match=r"mask must be bool \[2, 16\]"):
        method(batch, mask=torch.ones(2, 9, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"hide as many patches of every image, at least one and not all 16; it hides \[3, 4\]"):
        method(batch, mask=torch.arange(16) < torch.tensor([[3], [4]]))
    with pytest.raises(ValueError, match=r"it hides \[16\]"):
        method(batch, mask=torch.ones(2, 16, dtype=torch.bool))


def test_settings_that_make_no_method_are_refused():
    with pytest.raises(ConfigError, match=r"needs a croco_vit_\* backbone, got PointViT"):
        METHODS.config("croco").build(geossl.create_backbone("point_vit_tiny", dim=24, depth=1, heads=2))
    with pytest.raises(ConfigError, match="mask_ratio must lie strictly between 0 and 1, got 1"):
        dataclasses.replace(METHODS.config("croco"), mask_ratio=1.0)
    with pytest.raises(ConfigError, match=r"decoder.dim / decoder.heads must be a multiple of 4 for position=rope, got 20 / 2 = 10"):
        tiny(decoder=dataclasses.replace(DECODER, dim=20))


def test_it_learns_to_look_at_the_second_image():
    """Images of noise that the reference shows shifted by one patch: after some steps the true second view helps, another's does not."""
    torch.manual_seed(0)
    backbone = geossl.create_backbone("croco_vit_tiny", image_size=(16, 16), patch=4, dim=32, depth=1, heads=2)
    config = dataclasses.replace(METHODS.config("croco"), mask_ratio=0.75, decoder=CroCoDecoderConfig(dim=32, depth=1, heads=2))
    method = config.build(backbone)
    optimizer = torch.optim.AdamW(method.parameters(), lr=3e-3)

    def batch(seed: int) -> ImageBatch:
        wide = torch.randn(16, 1, 4, 5, generator=seeded(seed)).repeat(1, 3, 1, 1)
        ramp = torch.linspace(-1, 1, 4).expand(4, 4)
        patterns = wide.repeat_interleave(4, 2).repeat_interleave(4, 3).sign() * ramp.repeat(4, 5)
        return ImageBatch(patterns[..., :16].contiguous(), patterns[..., 4:].contiguous())

    for step in range(80):
        optimizer.zero_grad()
        method(batch(step), generator=seeded(step)).loss.backward()
        optimizer.step()
    unseen = batch(10_000)
    with torch.no_grad():
        true = method(unseen, generator=seeded()).loss
        shuffled = method(ImageBatch(unseen.image, unseen.reference.roll(1, 0)), generator=seeded()).loss
    assert true < 0.5 * shuffled, (float(true), float(shuffled))
