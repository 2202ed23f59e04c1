"""The plain torch form of I2P-MAE: as published, maps are enlarged to the size of the images to be read, and predictions are made whole.

Composed of the package's own modules, so it has the same weights, draws and loss; see :mod:`geossl.cli.benchmark.plain`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from geossl.cli.benchmark.plain import table_chamfer
from geossl.cli.benchmark.plain_point_m2ae import padded_encode, propagated
from geossl.geometry import IMAGE_MEAN, IMAGE_STD, PackedPoints, PointBatch
from geossl.layers import BatchRandom, TokenPropagation, ViewFrames, project_views, weighted_mask
from geossl.methods import I2PMAE
from geossl.methods.i2p_mae import point_rows

_VIEWS = ((0, 1, 2), (2, 0, 1), (1, 2, 0))  # coordinates that are row, column and depth


def i2p_mae_loss(method: I2PMAE, batch: PointBatch, generator: torch.Generator) -> Tensor:
    """Loss of a two-stage :class:`~geossl.methods.I2PMAE` of a backbone of three scales, with the same draws."""
    backbone, decoder, random = method.backbone, method.decoder, BatchRandom.of(batch, generator)
    finest, fine, coarse = scales = backbone.group(batch.points)
    seen, coord = method.look(batch), method.looked_at(batch).coord
    rows = point_rows(scales)
    size = seen.features.shape[2:]
    saliency = enlarged(seen.saliency.unflatten(1, (1, *size)), coord[rows[2]], coarse.segments.lengths, seen.frames)[..., 0].mean(1)
    top = weighted_mask(method.logits(saliency, coarse.segments.offsets()), coarse.segments, method.config.mask_ratio, random)
    hidden = backbone.propagate_mask(scales, top)
    encoded = padded_encode(backbone, scales, hidden, random)
    x = decoder.mask_token.expand(len(top), -1).clone()
    x[~top] = encoded[2].to(x.dtype)
    x = decoder.stages[0](x, decoder.positions[0](coarse.centers), coarse.segments, random=random)
    known = x.new_zeros(len(fine.centers), encoded[1].shape[1])
    known[~hidden[1]] = encoded[1].to(x.dtype)
    propagate: TokenPropagation = decoder.propagations[0]  # type: ignore[assignment]
    x = propagated(propagate, fine, known, coarse, x)
    x = decoder.norm(decoder.stages[1](x, decoder.positions[1](fine.centers), fine.segments, random=random))
    points = method.head(x)[hidden[1]].float().view(-1, method.config.predicted_points, 3)
    targets = enlarged(seen.features, coord[rows[0]], finest.segments.lengths, seen.frames)[fine.index[~hidden[1]]]
    features = method.feature_head(x[~hidden[1]]).float()
    return table_chamfer(points, fine.members[hidden[1]]) + F.mse_loss(features, targets.flatten(1))


def enlarged(maps: Tensor, points: Tensor, lengths: Sequence[int], frames: ViewFrames) -> Tensor:
    """Read maps ``[3B, C, h, w]`` at packed points: ``[Q, 3, C]``."""
    clouds = len(lengths)
    read = []
    for b, own in enumerate(points.split(list(lengths))):
        views = []
        for v, (row, column, _) in enumerate(_VIEWS):
            large = F.interpolate(maps[v * clouds + b][None], (frames.size, frames.size), mode="bicubic")[0]
            cell = ((own[:, [row, column]] - frames.minimum[v, b]) / frames.cell[v, b]).floor().long() + 1 + frames.shift[v, b]
            views.append(large[:, cell[:, 0], cell[:, 1]].T)
        read.append(torch.stack(views, 1))
    return torch.cat(read)


def plain_images(points: PackedPoints) -> Tensor:
    """The images as published: 25 painted pixels a point, added one by one."""
    _, (minimum, cell, shift, size) = project_views(points)
    clouds, images = len(points), []
    reach = torch.cartesian_prod(torch.arange(-2, 3), torch.arange(-2, 3))
    for v, (row, column, depth) in enumerate(_VIEWS):
        for b, own in enumerate(points.coord.split(points.lengths.tolist())):
            center = ((own[:, [row, column]] - minimum[v, b]) / cell[v, b]).floor().long() + 1 + shift[v, b]
            painted = center[:, None] + reach
            painted = painted + (painted < 0).long() - (painted > size - 1).long()
            index = (painted[..., 0] * size + painted[..., 1]).flatten()
            images.append(own.new_zeros(size * size).scatter_add(0, index, own[:, depth, None].expand(-1, 25).flatten()))
    brightness = torch.stack(images).view(3 * clouds, 1, size, size).sigmoid()
    mean, std = (torch.tensor(x)[:, None, None] for x in (IMAGE_MEAN, IMAGE_STD))
    return (brightness - mean) / std
