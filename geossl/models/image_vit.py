"""Vision transformer for images, as the towers of CLIP, DINO and DINOv2: patch features and where the class token looks.

Papers: Dosovitskiy et al., "An Image is Worth 16x16 Words", ICLR 2021; Radford et al., "Learning Transferable Visual Models From Natural
Language Supervision", ICML 2021 (CLIP); Caron et al., "Emerging Properties in Self-Supervised Vision Transformers", ICCV 2021 (DINO);
Oquab et al., "DINOv2", TMLR 2024; Darcet et al., "Vision Transformers Need Registers", ICLR 2024.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from geossl.errors import CheckpointError
from geossl.layers import Block, Segments


class QuickGELU(nn.Module):
    """``x * sigmoid(1.702 x)``, the activation of OpenAI's CLIP."""

    def forward(self, x: Tensor) -> Tensor:
        """Any shape."""
        return x * (1.702 * x).sigmoid()


@dataclass(frozen=True, kw_only=True)
class ImageViTConfig:
    """Numbers of an image transformer. The defaults are those of a plain ViT; the published towers are in ``geossl.models.teachers``."""

    dim: int
    """Channels of the tokens."""
    depth: int
    """Transformer blocks."""
    heads: int
    """Attention heads."""
    patch: int = 16
    """Rows and columns of a patch, in pixels."""
    grid: int = 14
    """Patches along each side of the images that the position code was learned on."""
    registers: int = 0
    """Tokens without position that are thrown away at the end (DINOv2 with registers)."""
    embed_dim: int | None = None
    """Channels of the joint space with text that CLIP projects its output to; None: no projection."""
    pre_norm: bool = False
    """LayerNorm before the first block, and patches cut without bias (CLIP)."""
    quick_gelu: bool = False
    """QuickGELU in place of GELU."""
    eps: float = 1e-6
    """Added to the variance in every LayerNorm; 1e-5 in CLIP."""
    resize_offset: float = 0.1
    """Added to the size of the grid when the position code is resized, as DINO and DINOv2 do; 0 where they do not."""
    resize_antialias: bool = False
    """Smooth the position code when it is made smaller (DINOv2 with registers)."""

    @property
    def channels(self) -> int:
        """Channels of the features."""
        return self.embed_dim or self.dim


class ImageViT(nn.Module):
    """Image transformer that returns patch features and the attention of the class token.

    Args:
        config: Its numbers.
    """

    def __init__(self, config: ImageViTConfig) -> None:
        super().__init__()
        self.config = config
        dim = config.dim
        self.patch_embed = nn.Conv2d(3, dim, config.patch, config.patch, bias=not config.pre_norm)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + config.grid**2, dim))
        if config.registers:
            self.register_tokens = nn.Parameter(torch.zeros(1, config.registers, dim))
        self.norm_pre = nn.LayerNorm(dim, config.eps) if config.pre_norm else nn.Identity()
        self.blocks = nn.ModuleList(_make_block(config) for _ in range(config.depth))
        self.norm = nn.LayerNorm(dim, config.eps)
        self.head = nn.Linear(dim, config.embed_dim, bias=False) if config.embed_dim else nn.Identity()

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Encode images.

        Args:
            images: ``[M, 3, H, W]``, sides multiples of the patch; the position code is resized (bicubic) to other sizes than its own.

        Returns:
            Features ``[M, C, h, w]`` after the last norm (and projection), and the attention of the class token to the patches in the
            last block, mean over heads, ``[M, h * w]``: softmax over all tokens, so the patches sum to less than 1.

        Raises:
            ValueError: the shape of the images is wrong.
        """
        patch = self.config.patch
        if images.dim() != 4 or images.shape[1] != 3 or any(side % patch or not side for side in images.shape[2:]):
            raise ValueError(f"ImageViT: images must be [M, 3, H, W] with sides that are multiples of {patch}, got {list(images.shape)}")
        x = self.patch_embed(images)
        samples, _, height, width = x.shape
        position = self._position(height, width)
        x = x.flatten(2).transpose(1, 2) + position[:, 1:]
        tokens = [(self.cls_token + position[:, :1]).expand(samples, -1, -1), x]
        if self.config.registers:
            tokens.insert(1, self.register_tokens.expand(samples, -1, -1))
        x = self.norm_pre(torch.cat(tokens, 1))
        length = x.shape[1]
        x, segments = x.flatten(0, 1), Segments((length,) * samples)
        for block in self.blocks[:-1]:
            x = block(x, segments)
        first = length - height * width
        saliency = self._class_attention(x.view(samples, length, -1))[:, first:]
        x = self.blocks[-1](x, segments).view(samples, length, -1)[:, first:]
        return self.head(self.norm(x)).transpose(1, 2).unflatten(2, (height, width)), saliency

    def _class_attention(self, x: Tensor) -> Tensor:
        """Where the class token looks in the last block, whose input is ``x [M, n, C]``: mean over heads, ``[M, n]``."""
        block, dim = cast(Block, self.blocks[-1]), self.config.dim
        x = block.norm1(x)
        weight, bias = block.attn.qkv.weight, block.attn.qkv.bias
        query = F.linear(x[:, 0], weight[:dim], bias[:dim]).float().unflatten(1, (self.config.heads, 1, -1))
        key = F.linear(x, weight[dim : 2 * dim], bias[dim : 2 * dim]).float().unflatten(2, (self.config.heads, -1))
        scores = query * query.shape[-1] ** -0.5 @ key.permute(0, 2, 3, 1)
        return scores.softmax(-1).mean(1)[:, 0]

    def _position(self, height: int, width: int) -> Tensor:
        """Position code of the class token and ``height * width`` patches, ``[1, 1 + h * w, C]``."""
        grid, offset, antialias = self.config.grid, self.config.resize_offset, self.config.resize_antialias
        if (height, width) == (grid, grid):
            return self.pos_embed
        code = self.pos_embed[:, 1:].unflatten(1, (grid, grid)).permute(0, 3, 1, 2)
        if offset:  # the published models were trained with the rounding of this form
            scale = ((height + offset) / grid, (width + offset) / grid)
            code = F.interpolate(code, scale_factor=scale, mode="bicubic", antialias=antialias)
        else:
            code = F.interpolate(code, (height, width), mode="bicubic", antialias=antialias)
        return torch.cat([self.pos_embed[:, :1], code.flatten(2).transpose(1, 2)], 1)


def _make_block(config: ImageViTConfig) -> Block:
    block = Block(config.dim, config.heads, qkv_bias=True, norm_eps=config.eps)
    if config.quick_gelu:
        block.mlp.act = QuickGELU()
    return block


_CLIP_NAMES = (
    ("class_embedding", "cls_token"),
    ("positional_embedding", "pos_embed"),
    ("conv1.", "patch_embed."),
    ("ln_pre.", "norm_pre."),
    ("ln_post.", "norm."),
    ("proj", "head.weight"),
    ("transformer.resblocks.", "blocks."),
)
_CLIP_BLOCK_NAMES = ((".attn.in_proj_", ".attn.qkv."), (".attn.out_proj.", ".attn.proj."), (".ln_1.", ".norm1."), (".ln_2.", ".norm2."))
_CLIP_MLP_NAMES = ((".mlp.c_fc.", ".mlp.fc1."), (".mlp.c_proj.", ".mlp.fc2."))


def convert_clip_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the visual tower of CLIP (OpenAI, open_clip, or inside an I2P-MAE checkpoint) for :class:`ImageViT`; the text tower is left.

    Args:
        state: Whole CLIP (``visual.*``) or its visual tower alone.

    Raises:
        CheckpointError: there is no visual tower that is a transformer.
    """
    prefix = next((key.removesuffix("class_embedding") for key in state if key.endswith("class_embedding")), None)
    if prefix is None:
        raise CheckpointError(
            f"no CLIP vision transformer among the weights: expected visual.class_embedding, found {', '.join(sorted(state)[:5])} ..."
        )
    out = {}
    for key, value in state.items():
        if not key.startswith(prefix):
            continue  # the text tower
        name = key.removeprefix(prefix)
        old, new = next(((a, b) for a, b in _CLIP_NAMES if name.startswith(a)), ("", ""))
        name = new + name.removeprefix(old)
        for old, new in (*_CLIP_BLOCK_NAMES, *_CLIP_MLP_NAMES):
            name = name.replace(old, new)
        if name == "head.weight":
            value = value.T
        elif name == "cls_token":
            value = value.view(1, 1, -1)
        elif name == "pos_embed":
            value = value[None]
        out[name] = value.contiguous()
    return out


def convert_dino_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the official backbone of DINO or DINOv2 for :class:`ImageViT`.

    DINOv2 scales every residual branch by a learned factor for each channel; it is multiplied into the layer before it. Its mask token,
    used in pretraining alone, is left out.

    Raises:
        CheckpointError: it is the giant variant, whose MLP is gated.
    """
    if any(".mlp.w12." in key for key in state):
        raise CheckpointError("the weights are of DINOv2 giant, whose gated MLP (SwiGLU) is not supported; use small, base or large")
    out = {key.replace("patch_embed.proj.", "patch_embed."): value for key, value in state.items() if key != "mask_token"}
    for key in [key for key in out if key.endswith((".ls1.gamma", ".ls2.gamma"))]:
        gamma = out.pop(key)
        layer = key.replace("ls1.gamma", "attn.proj").replace("ls2.gamma", "mlp.fc2")
        for kind in ("weight", "bias"):
            name = f"{layer}.{kind}"
            if name in out:
                out[name] = out[name] * (gamma[:, None] if kind == "weight" else gamma)
    return out
