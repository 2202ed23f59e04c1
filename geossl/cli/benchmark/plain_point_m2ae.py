"""The plain torch form of Point-M2AE: as published, every sample is padded to the longest of its batch, and every group is embedded.

Composed of the package's own modules, so it has the same weights, draws and loss; see :mod:`geossl.cli.benchmark.plain`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from geossl.cli.benchmark.plain import table_chamfer
from geossl.geometry import PackedPoints, PointBatch
from geossl.layers import BatchRandom, Segments, TokenPropagation, random_mask
from geossl.methods.point_m2ae import PointM2AE
from geossl.models.point_m2ae import PointM2AEEncoder, Scale


def point_m2ae_loss(method: PointM2AE, batch: PointBatch, generator: torch.Generator) -> Tensor:
    """Loss of a two-stage :class:`~geossl.methods.point_m2ae.PointM2AE` without local radius, with the same draws."""
    backbone, decoder, random = method.backbone, method.decoder, BatchRandom.of(batch, generator)
    scales = backbone.group(batch.points)
    top = random_mask(scales[-1].segments, method.config.mask_ratio, random, scales[-1].centers.device, ragged=True)
    hidden = backbone.propagate_mask(scales, top)
    encoded = padded_encode(backbone, scales, hidden, random)
    coarse, fine = scales[-1], scales[-2]
    x = decoder.mask_token.expand(len(top), -1).clone()
    x[~top] = encoded[-1].to(x.dtype)
    x = decoder.stages[0](x, decoder.positions[0](coarse.centers), coarse.segments, random=random)
    known = x.new_zeros(len(fine.centers), encoded[-2].shape[1])
    known[~hidden[-2]] = encoded[-2].to(x.dtype)
    propagate: TokenPropagation = decoder.propagations[0]  # type: ignore[assignment]
    x = propagated(propagate, fine, known, coarse, x)
    x = decoder.stages[1](x, decoder.positions[1](fine.centers), fine.segments, random=random)
    predicted = method.head(decoder.norm(x))[hidden[-2]].float().view(-1, method.config.predicted_points, 3)
    return table_chamfer(predicted, fine.members[hidden[-2]])


def point_m2ae_features(backbone: PointM2AEEncoder, points: PackedPoints) -> Tensor:
    """Normalised tokens ``[T, dim]`` of the coarsest scale of :class:`~geossl.models.point_m2ae.PointM2AEEncoder`."""
    scales = backbone.group(points)
    nothing = [torch.zeros(len(scale.centers), dtype=torch.bool, device=scale.centers.device) for scale in scales]
    return padded_encode(backbone, scales, nothing)[-1]


def padded_encode(
    backbone: PointM2AEEncoder, scales: Sequence[Scale], hidden: Sequence[Tensor], random: BatchRandom | None = None
) -> list[Tensor]:
    """Normalised visible tokens ``[V, C]`` of every scale."""
    grid, outputs = torch.empty(0), []
    for i, (scale, mask) in enumerate(zip(scales, hidden, strict=True)):
        grid = backbone.embeds[i].reference(scale.members if i == 0 else grid[scale.index])  # type: ignore[operator]
        lengths = torch.tensor(scale.segments.count(~mask).lengths, device=mask.device)
        samples, longest = len(lengths), int(lengths.max())
        valid = torch.arange(longest, device=mask.device) < lengths[:, None]
        x, centers = grid.new_zeros(samples, longest, grid.shape[1]), scale.centers.new_zeros(samples, longest, 3)
        x[valid], centers[valid] = grid[~mask], scale.centers[~mask]
        seen = valid[:, None].expand(-1, longest, -1)
        position = backbone.positions[i](centers.flatten(0, 1))
        x = backbone.blocks[i](x.flatten(0, 1), position, Segments((longest,) * samples), random=random, masks=list(seen))
        visible = x[valid.flatten()]
        grid = grid.clone()
        grid[~mask] = visible.to(grid.dtype)
        outputs.append(backbone.norms[i](visible))
    return outputs


def propagated(layer: TokenPropagation, fine: Scale, known: Tensor, coarse: Scale, tokens: Tensor) -> Tensor:
    """Tokens of the fine scale, the carried ones laid beside the known ones before the layer."""
    parts = [x.split(list(s.segments.lengths)) for x, s in ((fine.centers, fine), (coarse.centers, coarse), (tokens, coarse))]
    carried = []
    for centers, others, features in zip(*parts, strict=True):
        near = (centers[:, None] - others).square().sum(-1).topk(min(3, len(others)), largest=False)
        weight = 1 / (near.values + 1e-8)
        carried.append((features[near.indices] * (weight / weight.sum(1, keepdim=True))[..., None]).sum(1))
    return layer.units(F.gelu(layer.fuse_norm(layer.fuse(torch.cat([known, torch.cat(carried)], 1)))))
