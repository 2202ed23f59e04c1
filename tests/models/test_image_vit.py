"""The image transformer: CLIP's golden tower, and DINOv2 by a plain form that reads the official names."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from golden_files import GoldenFile, golden_files

from geossl.errors import CheckpointError
from geossl.layers import project_views
from geossl.models.checkpoints import load_state
from geossl.models.image_vit import ImageViT, ImageViTConfig, convert_clip_state, convert_dino_state


def golden_cases() -> pytest.MarkDecorator:
    """Run a test on every golden file that holds a CLIP tower."""
    paths = golden_files("i2p_mae", lambda metadata, names: "clip_visual" in metadata)
    return pytest.mark.parametrize("path", [pytest.param(path, id=path.stem, marks=pytest.mark.golden) for path in paths])


def golden_tower(path: Path) -> tuple[ImageViT, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The tower of a golden case with its weights, the state dict (reference names), and all tensors."""
    file = GoldenFile(path)
    numbers = json.loads(file.metadata["clip_visual"])
    state = {key: value.float() for key, value in file.part("state_dict.").items()}
    config = ImageViTConfig(
        dim=numbers["width"],
        depth=numbers["layers"],
        heads=numbers["heads"],
        patch=numbers["patch_size"],
        grid=numbers["input_resolution"] // numbers["patch_size"],
        embed_dim=numbers["output_dim"],
        pre_norm=True,
        quick_gelu=True,
        eps=1e-5,
        resize_offset=0.0,
    )
    tower = ImageViT(config).eval().requires_grad_(False)
    load_state(tower, convert_clip_state(state), source=path.name)
    return tower, state, file.tensors


@golden_cases()
def test_golden_clip_tower(path):
    tower, _, case = golden_tower(path)
    features, saliency = tower(project_views(case["points"]).images)
    torch.testing.assert_close(features, case["out.clip_feats"], rtol=1e-4, atol=2e-5)
    torch.testing.assert_close(saliency, case["out.clip_saliency"], rtol=1e-4, atol=1e-7)


@golden_cases()
def test_clip_weights_are_found_under_every_usual_prefix(path):
    tower, state, _ = golden_tower(path)
    visual = {k.split("visual.")[1]: v for k, v in state.items() if "clip_model.visual." in k}
    text = {"transformer.resblocks.0.ln_1.weight": torch.ones(4), "positional_embedding": torch.ones(77, 4), "logit_scale": torch.ones(())}
    for given in (visual, {f"visual.{k}": v for k, v in visual.items()} | text):
        converted = convert_clip_state(given)
        assert set(converted) == set(tower.state_dict())
        assert all(torch.equal(converted[key], value) for key, value in tower.state_dict().items())
    with pytest.raises(CheckpointError, match=r"expected visual\.class_embedding, found logit_scale"):
        convert_clip_state(text)


def dino_state(config: ImageViTConfig, layer_scale: bool) -> dict[str, torch.Tensor]:
    """Random weights under the names of the official releases."""
    state = {
        key.replace("patch_embed.", "patch_embed.proj."): torch.randn(value.shape, dtype=torch.float64) * 0.3
        for key, value in ImageViT(config).state_dict().items()
    }
    if layer_scale:
        state["mask_token"] = torch.zeros(1, config.dim)
        for i in range(config.depth):
            for branch in ("ls1", "ls2"):
                state[f"blocks.{i}.{branch}.gamma"] = torch.rand(config.dim, dtype=torch.float64)
    return state


def plain_dino(state: dict[str, torch.Tensor], config: ImageViTConfig, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """DINO or DINOv2 with the official weights, step by step."""

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], 1e-6)

    def linear(x: torch.Tensor, name: str) -> torch.Tensor:
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    x = F.conv2d(images, state["patch_embed.proj.weight"], state["patch_embed.proj.bias"], stride=config.patch)
    height, width = x.shape[2:]
    position = state["pos_embed"]
    if (height, width) != (config.grid, config.grid):
        code = position[:, 1:].view(1, config.grid, config.grid, -1).permute(0, 3, 1, 2)
        if config.registers:
            code = F.interpolate(code, size=(height, width), mode="bicubic", antialias=True)
        else:
            scale = tuple(float(side + 0.1) / config.grid for side in (height, width))
            code = F.interpolate(code, scale_factor=scale, mode="bicubic")
        position = torch.cat([position[:, :1], code.permute(0, 2, 3, 1).reshape(1, height * width, -1)], 1)
    x = torch.cat([state["cls_token"].expand(len(images), -1, -1), x.flatten(2).mT], 1) + position
    if config.registers:
        x = torch.cat([x[:, :1], state["register_tokens"].expand(len(images), -1, -1), x[:, 1:]], 1)
    for i in range(config.depth):
        q, k, v = (
            linear(norm(x, f"blocks.{i}.norm1"), f"blocks.{i}.attn.qkv").view(*x.shape[:2], 3, config.heads, -1).permute(2, 0, 3, 1, 4)
        )
        weights = (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1)
        attended = linear((weights @ v).transpose(1, 2).flatten(2), f"blocks.{i}.attn.proj")
        x = x + attended * state.get(f"blocks.{i}.ls1.gamma", 1)
        hidden = F.gelu(linear(norm(x, f"blocks.{i}.norm2"), f"blocks.{i}.mlp.fc1"))
        x = x + linear(hidden, f"blocks.{i}.mlp.fc2") * state.get(f"blocks.{i}.ls2.gamma", 1)
    first = 1 + config.registers
    features = norm(x, "norm")[:, first:].mT.unflatten(2, (height, width))
    return features, weights.mean(1)[:, 0, first:]


@pytest.mark.parametrize("size", [(32, 32), (24, 40)])
@pytest.mark.parametrize("version", ["dino", "dinov2", "registers"])
def test_dino_equals_the_plain_form(version, size):
    registers = {"registers": 2, "resize_offset": 0.0, "resize_antialias": True} if version == "registers" else {}
    config = ImageViTConfig(dim=24, depth=2, heads=3, patch=8, grid=4, **registers)
    state = dino_state(config, layer_scale=version != "dino")
    tower = ImageViT(config).double()
    load_state(tower, convert_dino_state(state), source="official")
    images = torch.randn(2, 3, *size, dtype=torch.float64)
    features, saliency = tower(images)
    expected_features, expected_saliency = plain_dino(state, config, images)
    torch.testing.assert_close(features, expected_features)
    torch.testing.assert_close(saliency.double(), expected_saliency, rtol=1e-5, atol=1e-8)


def test_the_giant_dinov2_is_refused():
    with pytest.raises(CheckpointError, match="SwiGLU"):
        convert_dino_state({"blocks.0.mlp.w12.weight": torch.ones(1)})


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 1, 32, 32), (1, 3, 32, 30), (1, 3, 0, 32)])
def test_images_of_a_wrong_shape_are_refused(shape):
    tower = ImageViT(ImageViTConfig(dim=8, depth=1, heads=1, patch=8, grid=4))
    with pytest.raises(ValueError, match=r"sides that are multiples of 8, got \["):
        tower(torch.zeros(shape))
