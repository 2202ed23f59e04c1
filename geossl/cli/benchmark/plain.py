"""The plain torch form of what geossl computes quickly: the peer of the training steps.

Composed of the package's own modules, so it has the same weights, draws and loss; what it leaves out is everything that makes the
package quick: every group goes through the whole mini-PointNet, the decoder computes all rows, and the loss is a table of distances.
Both forms share the grouping, which would take plain torch longer than the rest.
"""

from __future__ import annotations

import torch
from torch import Tensor

from geossl.geometry import PackedPoints, PointBatch
from geossl.layers import BatchRandom, Segments
from geossl.methods.point_mae import PointMAE
from geossl.models.point_vit import PointViT


def point_mae_loss(method: PointMAE, batch: PointBatch, generator: torch.Generator) -> Tensor:
    """Loss of :class:`~geossl.methods.point_mae.PointMAE` with the same draws."""
    backbone, random = method.backbone, BatchRandom.of(batch, generator)
    groups = backbone.group(batch.points)
    mask = method.draw_mask(groups, random)
    position = backbone.position(groups.centers)
    tokens = backbone.embed.reference(groups.points)
    visible = Segments(tuple(int((~part).sum()) for part in mask.split(list(groups.segments.lengths))))
    encoded = backbone.norm(backbone.blocks(tokens[~mask], position[~mask], visible, random=random))
    full = method.mask_token.to(encoded.dtype).repeat(mask.shape[0], 1)
    full[~mask] = encoded
    decoded = method.decoder(full, method.decoder_position(groups.centers), groups.segments, random=random)
    predicted = method.head(method.decoder_norm(decoded))[mask].float().view(-1, backbone.config.group_size, 3)
    return table_chamfer(predicted, groups.points[mask][..., :3])


def point_vit_features(backbone: PointViT, points: PackedPoints) -> Tensor:
    """Normalised tokens ``[T, dim]`` of :class:`~geossl.models.point_vit.PointViT`."""
    groups = backbone.group(points)
    tokens = backbone.embed.reference(groups.points)
    return backbone.norm(backbone.blocks(tokens, backbone.position(groups.centers), groups.segments))


def table_chamfer(x: Tensor, y: Tensor) -> Tensor:
    """Chamfer distance (sum of both mean squared distances) between ``[B, N, 3]`` and ``[B, M, 3]`` through all ``[B, N, M]`` distances."""
    square = (x[:, :, None] - y[:, None]).square().sum(-1)
    return square.amin(2).mean() + square.amin(1).mean()
