"""The plain padded form of PoLAr-MAE, in the shape of the published computation: the peer of the training steps on events.

Composed of the weights of the package's own modules, with the same groups, draws and loss. Every event is padded to 512 tokens and every
token to its slots, all of which go through all layers under masks: the encoder computes hidden tokens and padding too, and a batch-wide
norm is masked sums. Both forms share the tokenizer.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from geossl.geometry import PackedPoints, PointBatch
from geossl.layers import BatchRandom, BlockStack
from geossl.methods.polar_mae import PolarMAE, draw_rotations, rotate_groups
from geossl.models.point_vit_volume import VolumeGroups, VolumePointViT

CONTEXT = 512  # published context length: tokens that an event is padded to


def polar_mae_loss(method: PolarMAE, batch: PointBatch, generator: torch.Generator) -> Tensor:
    """Loss of :class:`~geossl.methods.polar_mae.PolarMAE` with the same draws; for parity backbones without drop path or dropout."""
    backbone, random, slots = method.backbone, BatchRandom.of(batch, generator), method.slots
    groups = backbone.group(batch.points)
    mask = method.draw_mask(groups, random)
    groups = rotate_groups(groups, draw_rotations(method.config.rotation, random))
    points, filled = pad_slots(groups, slots)
    real = token_mask(groups)
    hidden = torch.zeros_like(real).masked_scatter(real, mask)
    position = pad_tokens(backbone.position(groups.centers), real)
    encoded = padded_blocks(backbone.blocks, pad_tokens(padded_embedding(backbone.embed, points, filled), real), position, real & ~hidden)
    tokens = torch.where(hidden[..., None], method.mask_token.to(encoded.dtype), encoded * (real & ~hidden)[..., None])
    decoded = masked_norm(method.decoder_norm, padded_blocks(method.decoder, tokens, position, real), real)[hidden]
    target, seen = points[mask], filled[mask]
    predicted = method.head(decoded).float().view(-1, slots, method.columns)
    loss = method.config.chamfer_weight * masked_chamfer(predicted, target[..., : method.columns], seen)
    if method.config.energy:
        patch = padded_embedding(method.patch_embed, target[..., :3], seen)
        energy = method.energy_head(torch.cat([patch, decoded.to(patch.dtype)], 1)).float()
        loss = loss + method.config.energy_weight * F.mse_loss(energy[seen], target[..., 3][seen])
    return loss


def volume_features(backbone: VolumePointViT, points: PackedPoints) -> Tensor:
    """Tokens ``[T, dim]`` of a parity :class:`~geossl.models.point_vit_volume.VolumePointViT`."""
    groups = backbone.group(points)
    real = token_mask(groups)
    tokens = pad_tokens(padded_embedding(backbone.embed, *pad_slots(groups, backbone.tokenizer.slots)), real)
    return padded_blocks(backbone.blocks, tokens, pad_tokens(backbone.position(groups.centers), real), real)[real]


def token_mask(groups: VolumeGroups) -> Tensor:
    """``[B, T]`` bool, True where a token is real; T is the context length, or that of the longest event."""
    lengths = torch.tensor(groups.segments.lengths)
    return torch.arange(max(CONTEXT, int(lengths.max()))) < lengths[:, None]


def pad_tokens(rows: Tensor, real: Tensor) -> Tensor:
    """``[T, C]`` to ``[B, T, C]``."""
    return rows.new_zeros(*real.shape, rows.shape[1]).masked_scatter(real[..., None], rows)


def pad_slots(groups: VolumeGroups, slots: int) -> tuple[Tensor, Tensor]:
    """The points of every token ``[T, slots, C]``, and which are there ``[T, slots]``."""
    filled = torch.arange(slots) < groups.row_splits.diff()[:, None]
    return groups.points.new_zeros(*filled.shape, groups.points.shape[1]).masked_scatter(filled[..., None], groups.points), filled


def padded_embedding(module: Any, points: Tensor, filled: Tensor) -> Tensor:
    """The mini-PointNet over all slots, in float32."""
    with torch.autocast("cpu", enabled=False):
        x = module.conv2(F.relu(masked_batch_norm(module.norm1, module.conv1(points), filled)))
        if module.slot_linear is not None:
            x = x + F.relu(module.slot_linear(module.slot_code))
        x = torch.cat([x.amax(1, keepdim=True).expand_as(x), x], 2)
        return module.conv4(F.relu(masked_batch_norm(module.norm2, module.conv3(x), filled))).amax(1)


def masked_batch_norm(norm: Any, x: Tensor, mask: Tensor) -> Tensor:
    """Batch norm by the statistics of the masked rows; the others give its bias."""
    if norm.training:
        variance, mean = torch.var_mean(x[mask], 0, correction=0)
    else:
        variance, mean = norm.running_var, norm.running_mean
    return (x - mean) * (variance + norm.eps).rsqrt() * mask[..., None] * norm.weight + norm.bias


def masked_norm(norm: Any, x: Tensor, mask: Tensor) -> Tensor:
    """The batch-wide norm over masked tokens."""
    count, keep = mask.sum() * x.shape[2], mask[..., None]
    mean = (x * keep).sum() / count
    deviation = ((((x - mean) * keep).square().sum() / count) + norm.eps).sqrt()
    return norm.weight * (x - mean) / deviation + norm.bias


def padded_blocks(stack: BlockStack, x: Tensor, position: Tensor, mask: Tensor) -> Tensor:
    """Transformer blocks over padded events: attention among masked tokens by an additive bias."""
    bias = torch.where(mask[:, None, :, None] & mask[:, None, None, :], 0.0, -1e9)
    batch, tokens, dim = x.shape
    blocks: Any = stack.blocks
    for block in blocks:
        attention = block.attn
        x = x + position
        qkv = attention.qkv(masked_norm(block.norm1, x, mask)).view(batch, tokens, 3, attention.heads, -1).permute(2, 0, 3, 1, 4)
        scores = (qkv[0] * qkv.shape[-1] ** -0.5) @ qkv[1].transpose(-1, -2) + bias
        x = x + attention.proj((scores.softmax(-1).to(qkv.dtype) @ qkv[2]).transpose(1, 2).reshape(batch, tokens, dim))
        x = x + mask[..., None] * block.mlp(masked_norm(block.norm2, x, mask))
    return x


def masked_chamfer(x: Tensor, y: Tensor, mask: Tensor) -> Tensor:
    """Chamfer distance through a table ``[M, N, N]``, of the masked points of both; mean over tokens."""
    square = (x[:, :, None] - y[:, None]).square().sum(-1)
    square = square.masked_fill(~(mask[:, :, None] & mask[:, None]), torch.inf)
    nearest = [torch.where(mask, square.amin(axis), 0.0).sum(1) / mask.sum(1) for axis in (2, 1)]
    return (nearest[0] + nearest[1]).mean()
