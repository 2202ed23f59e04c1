"""Three orthographic views of a point cloud as images, and values of feature maps at the points again (I2P-MAE, section 3.1).

Paper: Zhang et al., "Learning 3D Representations from 2D Pre-trained Models via Image-to-Point Masked Autoencoders", CVPR 2023,
arXiv 2212.06785. The images are made for a frozen 2D model: nothing is learned, and points that hide each other add up.

The views are the cyclic permutations of the axes, as (row, column, depth): ``(x, y, z)``, ``(z, x, y)``, ``(y, z, x)``. Wherever three
views lie in one batch dimension, view 1 of all clouds comes first, then view 2, then view 3. Clouds are ``[B, N, 3]`` or packed; what is
computed of a cloud depends on that cloud alone.
"""

from __future__ import annotations

from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from geossl import ops
from geossl.geometry import IMAGE_MEAN, IMAGE_STD, PackedPoints

_ROW_COLUMN = ((0, 1), (2, 0), (1, 2))
_DEPTH = (2, 1, 0)
VIEWS = len(_DEPTH)
_REACH = 2  # a point paints the square of pixels up to so far from its own
_CUBIC = -0.75  # the parameter of torch's bicubic interpolation


class ViewFrames(NamedTuple):
    """How each of the ``3B`` views of a batch maps coordinates to pixels."""

    minimum: Tensor  # least (row, column) coordinate, [3, B, 2]
    cell: Tensor  # width of a pixel in the unit of the coordinates, [3, B]
    shift: Tensor  # pixels (row, column) that centre the cloud in the image, [3, B, 2] int64
    size: int  # rows and columns of the image


class ProjectedViews(NamedTuple):
    """Images of a batch of clouds, and what is needed to find points in them."""

    images: Tensor  # [3B, 3, S, S], normalised with the mean and deviation of ImageNet
    frames: ViewFrames


def fit_views(points: Tensor | PackedPoints, size: int = 224) -> ViewFrames:
    """Find the frames in which the three views of each cloud fill an image. Not differentiable.

    A view whose points all lie on one line of sight (a single point, copies of one, a line along an axis) has no extent: its pixels are
    taken one unit wide, and the points share the one in the middle.

    Args:
        points: Clouds ``[B, N, 3]`` or packed, float32 or float64, each with at least one point.
        size: Rows and columns of the image, even and at least 8.

    Raises:
        TypeError: ``points`` is not float32 or float64.
        ValueError: a shape or the size is wrong, or a cloud holds no point, or coordinates that are not finite or whose range overflows.
    """
    clouds = _clouds("fit_views", points)
    if isinstance(size, bool) or not isinstance(size, int) or size < 8 or size % 2:
        raise ValueError(f"fit_views: size must be an even whole number of at least 8 pixels, got {size!r}")
    empty = (clouds.lengths == 0).nonzero()[:10, 0].tolist()
    if empty:
        raise ValueError(f"fit_views: a view needs at least one point, got clouds without any: {empty}")
    coord = clouds.coord.detach()
    low, high = ops.segment_reduce(coord, clouds.offsets, "min"), ops.segment_reduce(coord, clouds.offsets, "max")
    extent = high - low
    _check_finite("fit_views", extent, torch.arange(len(clouds), device=coord.device))
    plane = torch.tensor(_ROW_COLUMN, device=coord.device)
    cell = extent[:, plane].amax(-1).T / (size - 3)
    cell = torch.where(cell > 0, cell, 1)
    minimum = low[:, plane].transpose(0, 1)
    frames = ViewFrames(minimum, cell, torch.zeros_like(minimum, dtype=torch.int64), size)
    # The cell of a coordinate grows with it, so the highest cell is the one of the highest coordinate.
    last = _cells(high, torch.arange(len(clouds), device=coord.device), frames)
    return frames._replace(shift=size // 2 - (last + _REACH) // 2 - 1)


def splat_depth(points: Tensor | PackedPoints, frames: ViewFrames) -> Tensor:
    """Draw each view: a point adds its depth coordinate to the 5x5 pixels around it.

    Every pixel holds the plain sum (no point hides another, signs are kept), so surfaces behind each other saturate or cancel. What
    would fall one pixel outside is added to the border.

    Args:
        points: The clouds that the frames were fitted to, ``[B, N, 3]`` or packed.
        frames: See :func:`fit_views`.

    Returns:
        ``[3B, S, S]``; 0 where nothing was painted. Differentiable in the depth of the points, not in where they fall.
    """
    clouds = _clouds("splat_depth", points, frames)
    batch, cloud = len(clouds), ops.batch_from_offsets(clouds.offsets, len(clouds.coord))
    side = frames.size + 2  # one pixel around the image
    center = _pixels(clouds.coord, cloud, frames) + 1
    index = (_image_of_rows(cloud, batch) * side + center[..., 0]) * side + center[..., 1]
    depth = clouds.coord[:, list(_DEPTH)].T
    canvas = cast(Tensor, ops.scatter_reduce(depth.reshape(-1), index.reshape(-1), VIEWS * batch * side * side, "sum"))
    # Painting 5x5 pixels for every point is a box filter over single pixels; it is separable.
    canvas = F.pad(canvas.view(VIEWS * batch, side, side), (_REACH,) * 4)
    return _fold(_box_sum(_fold(_box_sum(canvas, 2), 2), 1), 1)


def project_views(points: Tensor | PackedPoints, size: int = 224) -> ProjectedViews:
    """Make the images that the 2D teacher sees: ``sigmoid`` of :func:`splat_depth` in three equal channels, normalised as for ImageNet.

    Args:
        points: Clouds ``[B, N, 3]`` or packed, float32 or float64, centred (the depth is the raw coordinate).
        size: Rows and columns of the images, even and at least 8.

    Returns:
        The images ``[3B, 3, S, S]`` and their frames. Background pixels hold ``(0.5 - mean) / std``. Differentiable as
        :func:`splat_depth`.

    Raises:
        TypeError: see :func:`fit_views`.
        ValueError: see :func:`fit_views`.

    Example:
        >>> views = project_views(points)  # [B, N, 3]
        >>> features = back_project(teacher(views.images).features, points, views.frames)  # [B, N, 3, C]
    """
    frames = fit_views(points, size)
    like = {"dtype": frames.cell.dtype, "device": frames.cell.device}
    mean, std = (torch.tensor(x, **like)[:, None, None] for x in (IMAGE_MEAN, IMAGE_STD))  # type: ignore[arg-type]
    brightness = splat_depth(points, frames).sigmoid()[:, None]
    return ProjectedViews((brightness - mean).div_(std), frames)  # in place: the largest tensor here


def back_project(maps: Tensor, points: Tensor | PackedPoints, frames: ViewFrames) -> Tensor:
    """Read maps of the three views at points.

    The value is that of the nearest pixel after bicubic interpolation of the map to the size of the image (as
    ``interpolate(mode="bicubic", align_corners=False)``), computed at the wanted pixels alone.

    Args:
        maps: A map of each view, ``[3B, C, h, w]`` floating point, ordered as the images.
        points: Where to read, ``[B, Q, 3]`` or packed: any points of the clouds. A point outside the frame reads the nearest pixel in it.
        frames: See :func:`fit_views`.

    Returns:
        ``[B, Q, 3, C]`` (packed points: ``[Q, 3, C]``), the dimension of 3 over views; in the type of the points. Differentiable in
        ``maps``.

    Raises:
        TypeError: an argument is not a tensor of the right type.
        ValueError: shapes do not belong together, or a point is not finite.
    """
    clouds = _clouds("back_project", points, frames)
    coord, batch, cloud = clouds.coord, len(clouds), ops.batch_from_offsets(clouds.offsets, len(clouds.coord))
    if not isinstance(maps, Tensor) or not maps.is_floating_point():
        raise TypeError(f"back_project: maps must be a floating-point tensor [3B, C, h, w], got {getattr(maps, 'dtype', type(maps))}")
    if maps.dim() != 4 or maps.shape[0] != VIEWS * batch or 0 in maps.shape[1:]:
        raise ValueError(
            f"back_project: maps must be [{VIEWS * batch}, C, h, w], one for each of three views of {batch} clouds, got {list(maps.shape)}"
        )
    _check_finite("back_project", coord, cloud)
    height, width = maps.shape[2:]
    pixel = _pixels(coord, cloud, frames)
    row, row_weight = _bicubic(pixel[..., 0], height, frames.size, coord.dtype)
    column, column_weight = _bicubic(pixel[..., 1], width, frames.size, coord.dtype)
    taps = (_image_of_rows(cloud, batch)[..., None, None] * height + row[..., None]) * width + column[..., None, :]
    weights = row_weight[..., None] * column_weight[..., None, :]
    # Points first, so that the sums come out in the order of the result.
    taps, weights = (x.transpose(0, 1).reshape(len(coord) * VIEWS, 16) for x in (taps, weights))
    table = maps.to(coord.dtype).permute(0, 2, 3, 1).flatten(0, 2)
    read = F.embedding_bag(taps, table, mode="sum", per_sample_weights=weights).view(len(coord), VIEWS, maps.shape[1])
    return read if isinstance(points, PackedPoints) else read.view(*points.shape[:2], *read.shape[1:])


def _clouds(name: str, points: Tensor | PackedPoints, frames: ViewFrames | None = None) -> PackedPoints:
    """Check ``points``, and that ``frames`` are of as many clouds; return them packed."""
    coord = points.coord if isinstance(points, PackedPoints) else points
    if not isinstance(coord, Tensor) or coord.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"{name}: points must be a float32 or float64 tensor, got {getattr(coord, 'dtype', type(coord))}; call .float()")
    if not isinstance(points, PackedPoints):
        if points.dim() != 3 or points.shape[2] != 3:
            raise ValueError(f"{name}: points must be [B, N, 3], got {list(points.shape)}; a single cloud needs points[None]")
        points = PackedPoints(points.reshape(-1, 3), torch.arange(len(points) + 1, device=points.device) * points.shape[1])
    if frames is not None and frames.cell.shape[1] != len(points):
        raise ValueError(f"{name}: the frames are of {frames.cell.shape[1]} clouds, the points of {len(points)}")
    if frames is not None and frames.cell.dtype != points.coord.dtype:
        raise TypeError(f"{name}: points are {points.coord.dtype}, the frames were fitted to {frames.cell.dtype}; convert the points")
    return points


def _image_of_rows(cloud: Tensor, batch: int) -> Tensor:
    """Which of the ``3B`` images each point is in, in each view, ``[3, M]`` int64."""
    return torch.arange(VIEWS, device=cloud.device)[:, None] * batch + cloud


def _check_finite(name: str, values: Tensor, cloud: Tensor) -> None:
    finite = values.isfinite().all(1)
    if not bool(finite.all()):
        clouds = cloud[~finite].unique()[:10].tolist()
        raise ValueError(
            f"{name}: points must be finite, with a range that fits their type; clouds {clouds} hold NaN, infinite or overflowing "
            "coordinates: remove them, or centre and scale the clouds"
        )


def _cells(coord: Tensor, cloud: Tensor, frames: ViewFrames) -> Tensor:
    """Cell (row, column) of each point in each view, before centring: ``[3, M, 2]`` int64 in 0..size-3."""
    plane = coord.detach()[:, torch.tensor(_ROW_COLUMN, device=coord.device)].transpose(0, 1)
    # Dividing is part of the definition: multiplying by the inverse moves points that lie on an edge to the next cell.
    cell = ((plane - frames.minimum[:, cloud]) / frames.cell[:, cloud, None]).floor()
    return cell.clamp(0, frames.size - 3).long()  # also for own points: ranges near the smallest numbers divide inexactly


def _pixels(coord: Tensor, cloud: Tensor, frames: ViewFrames) -> Tensor:
    """Pixel (row, column) of each point in each view, ``[3, M, 2]`` int64."""
    return _cells(coord, cloud, frames) + 1 + frames.shift[:, cloud]


def _box_sum(x: Tensor, dim: int) -> Tensor:
    """Sum of five neighbours along ``dim``, which gets 4 shorter."""
    length = x.shape[dim] - 2 * _REACH
    pairs = x.narrow(dim, 0, length + 3) + x.narrow(dim, 1, length + 3)
    return pairs.narrow(dim, 0, length) + pairs.narrow(dim, 2, length) + x.narrow(dim, 4, length)


def _fold(x: Tensor, dim: int) -> Tensor:
    """Add the pixel before and the one behind the image along ``dim`` to its borders, and cut them off."""
    size = x.shape[dim] - 2
    inside = x.narrow(dim, 1, size).clone()
    inside.narrow(dim, 0, 1).add_(x.narrow(dim, 0, 1))
    inside.narrow(dim, size - 1, 1).add_(x.narrow(dim, size + 1, 1))
    return inside


def _bicubic(pixel: Tensor, length: int, size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The four entries of an axis of ``length`` that a pixel of the axis stretched to ``size`` mixes, and their weights: ``[..., 4]``."""
    source = (pixel.to(dtype) + 0.5) * (length / size) - 0.5
    first = source.floor()
    near = source - first
    a = _CUBIC

    def inner(t: Tensor) -> Tensor:
        return ((a + 2) * t - (a + 3)) * t * t + 1

    def outer(t: Tensor) -> Tensor:
        return ((a * t - 5 * a) * t + 8 * a) * t - 4 * a

    weights = torch.stack([outer(near + 1), inner(near), inner(1 - near), outer(2 - near)], -1)
    taps = first.long()[..., None] + torch.arange(-1, 3, device=pixel.device)
    return taps.clamp(0, length - 1), weights
