"""Gaussian splatting in plain torch: projection, tile lists and compositing, differentiable by autograd and in any floating type.

Shapes: B scenes of N Gaussians, C cameras each; ``height x width`` pixels, whose centres lie at +0.5; tiles of 16 x 16 pixels.
"""

from __future__ import annotations

import torch
from torch import Tensor

TILE = 16
MIN_ALPHA = 1 / 255  # fainter contributions are skipped
MAX_ALPHA = 0.999
MIN_TRANSMITTANCE = 1e-4  # a pixel ends before the Gaussian that would leave it this or less


def _scaled(quats: Tensor) -> tuple[Tensor, Tensor]:
    """Divide by the largest component, so that squares stay in range; also return that component."""
    largest = quats.detach().abs().amax(-1, keepdim=True)
    return quats / largest, largest


def rotation(quats: Tensor) -> Tensor:
    """Turn quaternions (w, x, y, z) of any length but 0 into rotation matrices ``[..., 3, 3]``."""
    scaled, _ = _scaled(quats)
    w, x, y, z = (scaled / scaled.norm(dim=-1, keepdim=True)).unbind(-1)
    rows = (
        1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y),
        2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x),
        2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y),
    )  # fmt: skip
    return torch.stack(rows, -1).unflatten(-1, (3, 3))


def _valid(means: Tensor, quats: Tensor | None, scales: Tensor | None, covars: Tensor | None, opacities: Tensor) -> Tensor:
    """Which Gaussians ``[B, N]`` can be drawn: every number finite, no scale negative, quaternions not 0.

    A quaternion shorter than the smallest normal number counts as 0: its gradient leaves the range.
    """
    valid = means.isfinite().all(-1) & opacities.isfinite()
    if covars is not None:
        return valid & covars.isfinite().flatten(-2).all(-1)
    assert quats is not None
    assert scales is not None
    scaled, largest = _scaled(quats.detach())
    there = scaled.norm(dim=-1) * largest[..., 0] >= torch.finfo(quats.dtype).tiny  # False of NaN
    return valid & quats.isfinite().all(-1) & there & scales.isfinite().all(-1) & (scales >= 0).all(-1)


def project(
    means: Tensor, quats: Tensor | None, scales: Tensor | None, covars: Tensor | None, opacities: Tensor, viewmats: Tensor, Ks: Tensor,
    width: int, height: int, near_plane: float, far_plane: float, radius_clip: float, eps2d: float, antialiased: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Project Gaussians onto images (EWA splatting).

    Args:
        means: ``[B, N, 3]``.
        quats: ``[B, N, 4]`` wxyz, any length; None with ``covars``.
        scales: ``[B, N, 3]`` standard deviations; None with ``covars``.
        covars: ``[B, N, 3, 3]`` or None.
        opacities: ``[B, N]``.
        viewmats: World to camera, ``[B, C, 4, 4]``.
        Ks: Intrinsics in pixels, ``[B, C, 3, 3]``.
        width: Of the images.
        height: Of the images.
        near_plane: Nearest depth that is drawn.
        far_plane: Farthest.
        radius_clip: Gaussians whose radii do not exceed it, in pixels, are left out.
        eps2d: Added to the variances in the image.
        antialiased: Whether opacities make up for the blur.

    Returns:
        means2d ``[B, C, N, 2]``, depths ``[B, C, N]``, conics ``[B, C, N, 3]`` (xx, xy, yy of the inverse covariance), opacities
        ``[B, C, N]``, radii ``[B, C, N, 2]`` int32, tiles touched ``[B, C, N]`` int32. All 0 where a Gaussian is not drawn.
    """
    scene = (means, quats, scales, covars, opacities, viewmats, Ks, width, height, near_plane, far_plane, radius_clip, eps2d, antialiased)
    with torch.no_grad():
        drawn = (_project(None, *scene)[4] > 0).any(-1)
    # Only those enter the graph: what is infinite in another would make its zero gradient NaN.
    return _project(drawn, *scene)


def _project(
    drawn: Tensor | None, means: Tensor, quats: Tensor | None, scales: Tensor | None, covars: Tensor | None, opacities: Tensor,
    viewmats: Tensor, Ks: Tensor, width: int, height: int, near_plane: float, far_plane: float, radius_clip: float, eps2d: float,
    antialiased: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    valid = _valid(means, quats, scales, covars, opacities)
    means, opacities = torch.where(valid[..., None], means, 0.0), torch.where(valid, opacities, 0.0)
    known = viewmats.isfinite().flatten(-2).all(-1, keepdim=True)  # [B, C, 1]
    viewmats = torch.where(known[..., None], viewmats, 0.0)
    view = viewmats[:, :, None, :3, :3]
    p = (view @ means[:, None, :, :, None])[..., 0] + viewmats[:, :, None, :3, 3]
    fx, fy, cx, cy = (Ks[..., i, j, None] for i, j in ((0, 0), (1, 1), (0, 2), (1, 2)))
    keep = known & valid[:, None] & (p[..., 2] > 0) & (p[..., 2] >= near_plane) & (p[..., 2] <= far_plane) & p.isfinite().all(-1)
    if drawn is not None:
        keep = keep & drawn
    x, y, z = torch.where(keep[..., None], p, 1.0).unbind(-1)
    u, v = fx * x / z + cx, fy * y / z + cy
    # The Jacobian is taken at a point clamped to a little outside the image: far outside, the approximation would explode.
    tan_x, tan_y = 0.3 * 0.5 * width / fx, 0.3 * 0.5 * height / fy
    tx = z * torch.minimum(torch.maximum(x / z, -(cx / fx + tan_x)), (width - cx) / fx + tan_x)
    ty = z * torch.minimum(torch.maximum(y / z, -(cy / fy + tan_y)), (height - cy) / fy + tan_y)
    zero = torch.zeros_like(z)
    jacobian = torch.stack([fx / z, zero, -fx * tx / (z * z), zero, fy / z, -fy * ty / (z * z)], -1).unflatten(-1, (2, 3)) @ view
    jacobian = torch.where(keep[..., None, None], jacobian, 0.0)
    if covars is None:
        assert quats is not None
        assert scales is not None
        quats = torch.where(valid[..., None], quats, 1.0)
        scales = torch.where(valid[..., None], scales, 1.0)
        a = jacobian @ (rotation(quats) * scales[..., None, :])[:, None]
        (xx, xy), (_, yy) = ((a[..., i, None, :] * a).sum(-1).unbind(-1) for i in (0, 1))
        minors = torch.stack([a[..., 0, i] * a[..., 1, j] - a[..., 0, j] * a[..., 1, i] for i, j in ((0, 1), (0, 2), (1, 2))], -1)
        det = (minors * minors).sum(-1)  # of the covariance, without cancellation
    else:
        symmetric = torch.where(valid[..., None, None], 0.5 * (covars + covars.mT), 0.0)
        s = jacobian @ symmetric[:, None] @ jacobian.mT
        xx, xy, yy = s[..., 0, 0], s[..., 0, 1], s[..., 1, 1]
        det = xx * yy - xy * xy
    blurred = det + eps2d * (xx + yy) + eps2d * eps2d
    xx, yy = xx + eps2d, yy + eps2d
    keep = keep & (blurred > 0) & blurred.isfinite() & (xx > 0) & (yy > 0)
    blurred = torch.where(keep, blurred, 1.0)
    conics = torch.stack([yy / blurred, -xy / blurred, xx / blurred], -1)
    opacity = opacities[:, None].expand_as(z)
    if antialiased:
        ratio = det / blurred
        opacity = opacity * torch.where(ratio > 0, torch.where(ratio > 0, ratio, 1.0).sqrt(), 0.0)
    keep = keep & (opacity >= MIN_ALPHA)
    with torch.no_grad():
        extent = torch.log(255 * torch.where(keep, opacity, 1.0)).mul(2).clamp(min=0).sqrt().clamp(max=3.33)
        rx, ry = (torch.ceil(extent * torch.where(keep, variance, 1.0).sqrt()) for variance in (xx, yy))
        keep = keep & ((rx > radius_clip) | (ry > radius_clip))
        keep = keep & (u + rx > 0) & (u - rx < width) & (v + ry > 0) & (v - ry < height)
        radii = torch.where(keep[..., None], torch.stack([rx, ry], -1).clamp(max=2**30), 0.0).int()
        means2d = torch.where(keep[..., None], torch.stack([u, v], -1), 0.0)
        box = tile_box(means2d, radii, width, height)
        tiles = ((box[..., 2] - box[..., 0]) * (box[..., 3] - box[..., 1])).int()
    means2d = torch.where(keep[..., None], torch.stack([u, v], -1), 0.0)
    return (
        means2d, torch.where(keep, z, 0.0), torch.where(keep[..., None], conics, 0.0), torch.where(keep, opacity, 0.0), radii, tiles,
    )  # fmt: skip


def tile_box(means2d: Tensor, radii: Tensor, width: int, height: int) -> Tensor:
    """First and past-the-last tile along x and y that a Gaussian's box touches, ``[..., 4]`` int64 (x0, y0, x1, y1)."""
    last = torch.tensor([-(-width // TILE), -(-height // TILE)], device=radii.device)
    first = torch.floor((means2d - radii) / TILE).clamp(min=0).long()
    end = torch.minimum(torch.ceil((means2d + radii) / TILE).clamp(min=0, max=2**30).long(), last)
    first = torch.minimum(first, last)
    end = torch.where(radii > 0, torch.maximum(end, first), first)
    return torch.cat([first, end], -1)


def bin_tiles(
    means2d: Tensor, conics: Tensor, opacities: Tensor, depths: Tensor, radii: Tensor, tiles: Tensor, width: int, height: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """List the Gaussians of every tile, nearest first, equal depths in index order.

    Returns:
        Rows of the flattened ``[B, C, N]`` Gaussians by tile ``[P]`` int32; which of its Gaussian's tiles each entry is ``[P]`` int32;
        first entry of every tile of every image ``[B * C * tiles + 1]`` int64; entries before each Gaussian's ``[B * C * N + 1]`` int64.
    """
    across, down = -(-width // TILE), -(-height // TILE)
    images, count = means2d.shape[0] * means2d.shape[1], means2d.shape[2]
    box = tile_box(means2d, radii, width, height).reshape(-1, 4)
    wide, counts = box[:, 2] - box[:, 0], (box[:, 2] - box[:, 0]) * (box[:, 3] - box[:, 1])
    starts = torch.zeros(len(counts) + 1, dtype=torch.int64, device=counts.device)
    starts[1:] = counts.cumsum(0)
    row = torch.repeat_interleave(counts)
    place = torch.arange(len(row), device=row.device) - starts[row]
    width_of_row = wide[row].clamp(min=1)
    tile = (box[row, 1] + place // width_of_row) * across + box[row, 0] + place % width_of_row
    tile = tile + torch.div(row, max(count, 1), rounding_mode="floor") * (across * down)
    by_depth = torch.sort(depths.reshape(-1)[row], stable=True).indices
    order = by_depth[torch.sort(tile[by_depth], stable=True).indices]
    tile_starts = torch.searchsorted(tile[order], torch.arange(images * across * down + 1, device=row.device))
    return row[order].int(), place[order].int(), tile_starts, starts


def composite(
    means2d: Tensor, conics: Tensor, opacities: Tensor, features: Tensor, depths: Tensor | None, backgrounds: Tensor | None,
    ids: Tensor, tile_starts: Tensor, width: int, height: int, with_ids: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Blend the Gaussians of every tile front to back.

    Args:
        means2d: ``[B, C, N, 2]``.
        conics: ``[B, C, N, 3]``.
        opacities: ``[B, C, N]``.
        features: ``[B, C, N, D]`` or ``[B, 1, N, D]`` for all cameras.
        depths: ``[B, C, N]`` to be blended as one more channel, or None.
        backgrounds: ``[B, C, D]`` or None; the depth has none.
        ids: Rows by tile, of :func:`bin_tiles`.
        tile_starts: First entry of each tile.
        width: Of the images.
        height: Of the images.
        with_ids: Whether to find the Gaussian of largest weight.

    Returns:
        render ``[B, C, H, W, X]``, alpha ``[B, C, H, W]``, index of the Gaussian of largest weight ``[B, C, H, W]`` int32 (-1: none), and
        that weight; the last two are empty without ``with_ids``.
    """
    batch, cameras, count = opacities.shape
    values = features.expand(batch, cameras, count, features.shape[-1])
    if depths is not None:
        values = torch.cat([values, depths[..., None]], -1)
    channels = values.shape[-1]
    finite = values.isfinite().all(-1, keepdim=True)  # a Gaussian with a NaN in its features is not drawn
    values = torch.where(finite, values, 0.0).flatten(0, 2)
    opacity = torch.where(finite[..., 0], opacities, 0.0).reshape(-1)
    points, shapes = means2d.reshape(-1, 2), conics.reshape(-1, 3)
    across, down = -(-width // TILE), -(-height // TILE)
    bounds = tile_starts.tolist()
    pixels, colours, left, largest, weights = [], [], [], [], []
    for tile in range(batch * cameras * across * down):
        if bounds[tile] == bounds[tile + 1]:
            continue
        rows = ids[bounds[tile] : bounds[tile + 1]].long()
        image, y0, x0 = tile // (across * down), tile // across % down * TILE, tile % across * TILE
        ys = torch.arange(y0, min(y0 + TILE, height), device=ids.device)
        xs = torch.arange(x0, min(x0 + TILE, width), device=ids.device)
        grid = torch.cartesian_prod(ys, xs)
        dx, dy = (points[rows, i, None] - (grid[:, 1 - i] + 0.5) for i in (0, 1))
        a, b, c = shapes[rows].T[..., None]
        sigma = 0.5 * (a * dx * dx + c * dy * dy) + b * dx * dy
        alpha = (opacity[rows, None] * torch.exp(-sigma.clamp(min=0))).clamp(max=MAX_ALPHA)
        alpha = torch.where((sigma >= 0) & (alpha >= MIN_ALPHA), alpha, 0.0)
        after = torch.cat([torch.ones_like(alpha[:1]), torch.cumprod(1 - alpha, 0)])
        live = after[1:] > MIN_TRANSMITTANCE  # falls from True to False once: transmittance never grows
        weight = torch.where(live, alpha * after[:-1], 0.0)
        pixels.append((image * height + grid[:, 0]) * width + grid[:, 1])
        colours.append(weight.T @ values[rows])
        left.append(after.gather(0, live.sum(0, keepdim=True))[0])
        if with_ids:
            best = weight.detach().max(0)
            largest.append(torch.where(best.values > 0, rows[best.indices] % count, -1).int())
            weights.append(best.values)
    total, shape = batch * cameras * height * width, (batch, cameras, height, width)
    render, rest = means2d.new_zeros(total, channels), means2d.new_ones(total)
    found = torch.full((total if with_ids else 0,), -1, dtype=torch.int32, device=ids.device)
    found_weight = means2d.new_zeros(total if with_ids else 0)
    if pixels:
        where = (torch.cat(pixels),)
        render, rest = render.index_put(where, torch.cat(colours)), rest.index_put(where, torch.cat(left))
        if with_ids:
            found, found_weight = found.index_put(where, torch.cat(largest)), found_weight.index_put(where, torch.cat(weights))
    render, rest = render.view(*shape, channels), rest.view(shape)
    if backgrounds is not None:
        behind = backgrounds if depths is None else torch.nn.functional.pad(backgrounds, (0, 1))
        render = render + rest[..., None] * behind[:, :, None, None]
    image_shape = shape if with_ids else (0,)
    return render, 1 - rest, found.view(image_shape), found_weight.view(image_shape)
