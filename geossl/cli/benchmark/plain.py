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
from geossl.methods.point_mae import PointMAE, matched_feature_error
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
    predicted = method.head(method.decoder_norm(decoded))[mask].float().view(-1, backbone.config.group_size, method.columns)
    target, config = groups.points[mask], method.config
    loss = table_chamfer(predicted[..., :3], target[..., :3], root=config.loss == "cdl1") * (0.5 if config.loss == "cdl1" else 1.0)
    return loss + config.feature_weight * matched_feature_error(predicted, target) if config.feature_weight else loss


def point_vit_features(backbone: PointViT, points: PackedPoints) -> Tensor:
    """Normalised tokens ``[T, dim]`` of :class:`~geossl.models.point_vit.PointViT`."""
    groups = backbone.group(points)
    tokens = backbone.embed.reference(groups.points)
    return backbone.norm(backbone.blocks(tokens, backbone.position(groups.centers), groups.segments))


def table_chamfer(x: Tensor, y: Tensor, *, root: bool = False) -> Tensor:
    """Chamfer distance between ``[B, N, 3]`` and ``[B, M, 3]`` through a table ``[B, N, M]``: the sum of both mean squared distances.

    With ``root`` it is the sum of the mean distances, not squared.
    """
    square = (x[:, :, None] - y[:, None]).square().sum(-1)
    to_y, to_x = square.amin(2), square.amin(1)
    return to_y.sqrt().mean() + to_x.sqrt().mean() if root else to_y.mean() + to_x.mean()
