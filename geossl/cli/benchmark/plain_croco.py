"""CroCo in plain torch, operation by operation as published: the peer of its training step.

The two images go through the encoder one after the other, keys and values are projected apart, softmax is materialised, tables of rotations
are made in every call and the decoder computes all patches. Weights and mask are those of the package's own form.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from geossl.geometry import ImageBatch
from geossl.layers import Attention, BatchRandom, Block, CrossAttention, CrossBlock
from geossl.layers.grid_positions import GridPositions, grid_positions
from geossl.methods.croco import PIXEL_EPS, CroCo
from geossl.models import CroCoViT


def croco_loss(method: CroCo, batch: ImageBatch, generator: torch.Generator) -> Tensor:
    """Loss of :class:`~geossl.methods.croco.CroCo` (published options) with the same mask."""
    assert batch.reference is not None
    backbone, decoder, patch = method.backbone, method.decoder, method.backbone.config.patch
    mask = method.draw_mask(backbone.cut(batch.image), BatchRandom.of(batch, generator))
    grid = (batch.image.shape[2] // patch, batch.image.shape[3] // patch)
    place = grid_positions(*grid).expand(len(batch), -1, -1)
    seen = plain_encode(backbone, batch.image, place, ~mask)
    memory = decoder.embed(plain_encode(backbone, batch.reference, place, None))
    embedded = decoder.embed(seen)
    tokens = method.mask_token.to(embedded.dtype).repeat(len(batch), mask.shape[1], 1)
    tokens[~mask] = embedded.flatten(0, 1)
    added = decoder.position.added(grid)
    if added is not None:
        tokens, memory = tokens + added, memory + added
    for block in decoder.blocks:
        tokens = plain_cross_block(block, tokens, memory, place, decoder.position)
    predicted = method.head(decoder.norm(tokens)).float()
    true = F.unfold(batch.image, patch, stride=patch).transpose(1, 2)  # channel, row, column
    true = true.unflatten(2, (3, patch * patch)).transpose(2, 3).flatten(2)
    variance, mean = torch.var_mean(true, 2, keepdim=True)
    error = ((predicted - (true - mean) / (variance + PIXEL_EPS).sqrt()) ** 2).mean(2)
    return (error * mask).sum() / mask.sum()


def croco_features(backbone: CroCoViT, images: Tensor) -> Tensor:
    """Normalised tokens ``[B, cells, dim]`` of whole images."""
    grid = (images.shape[2] // backbone.config.patch, images.shape[3] // backbone.config.patch)
    return plain_encode(backbone, images, grid_positions(*grid).expand(len(images), -1, -1), None)


def plain_encode(backbone: CroCoViT, images: Tensor, place: Tensor, visible: Tensor | None) -> Tensor:
    """Encode all patches, or those ``visible [B, cells]``, as many of every image: ``[B, n, dim]``."""
    patch, samples = backbone.config.patch, len(images)
    weight = backbone.patch_embed.weight.unflatten(1, (3, patch, patch))
    x = F.conv2d(images, weight, backbone.patch_embed.bias, patch)
    added = backbone.position.added((x.shape[2], x.shape[3]))
    x = x.flatten(2).transpose(1, 2)
    x = x if added is None else x + added
    if visible is not None:
        x, place = x[visible].unflatten(0, (samples, -1)), place[visible].unflatten(0, (samples, -1))
    for block in backbone.blocks:
        x = plain_block(block, x, place, backbone.position)
    return backbone.norm(x)


def plain_block(block: Block | Any, x: Tensor, place: Tensor, position: GridPositions) -> Tensor:
    """A block of the encoder."""
    x = x + plain_self_attention(block.attn, block.norm1(x), place, position)
    return x + block.mlp(block.norm2(x))


def plain_cross_block(block: CrossBlock | Any, x: Tensor, memory: Tensor, place: Tensor, position: GridPositions) -> Tensor:
    """A block of the decoder."""
    x = x + plain_self_attention(block.attn, block.norm1(x), place, position)
    x = x + plain_cross_attention(block.cross_attn, block.norm2(x), block.norm_memory(memory), place, position)
    return x + block.mlp(block.norm3(x))


def plain_self_attention(attention: Attention, x: Tensor, place: Tensor, position: GridPositions) -> Tensor:
    """Multi-head attention over ``[B, n, dim]``."""
    q, k, v = attention.qkv(x).unflatten(2, (3, attention.heads, -1)).permute(2, 0, 3, 1, 4)
    return attention.proj(materialised(rotate(q, place, position), rotate(k, place, position), v))


def plain_cross_attention(attention: CrossAttention, x: Tensor, memory: Tensor, place: Tensor, position: GridPositions) -> Tensor:
    """Multi-head attention of ``[B, n, dim]`` to ``[B, m, dim]``."""
    (key_weight, value_weight), (key_bias, value_bias) = attention.kv.weight.chunk(2), attention.kv.bias.chunk(2)
    parts = (attention.q(x), F.linear(memory, key_weight, key_bias), F.linear(memory, value_weight, value_bias))
    q, k, v = (part.unflatten(2, (attention.heads, -1)).transpose(1, 2) for part in parts)
    return attention.proj(materialised(rotate(q, place, position), rotate(k, place, position), v))


def materialised(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax attention through its table of weights, ``[B, H, n, D] -> [B, n, H * D]``."""
    weights = ((q @ k.transpose(-1, -2)) * q.shape[-1] ** -0.5).softmax(-1)
    return (weights @ v).transpose(1, 2).flatten(2)


def rotate(x: Tensor, place: Tensor, position: GridPositions) -> Tensor:
    """Rotate ``[B, H, n, D]`` by row and column ``place [B, n, 2]``; as it is with a sin-cos code."""
    if position.kind != "rope":
        return x
    quarter = x.shape[3] // 4
    frequency = position.base ** -(torch.arange(quarter) / quarter)
    halves = []
    for half, where in zip(x.chunk(2, 3), place.unbind(2), strict=True):
        angle = (where[..., None] * frequency).repeat(1, 1, 2)[:, None]
        u, v = half.chunk(2, 3)
        halves.append(half * angle.cos() + torch.cat([-v, u], 3) * angle.sin())
    return torch.cat(halves, 3).to(x.dtype)
