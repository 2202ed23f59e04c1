"""From image features to 3D: points read the feature maps of the pictures that see them, and average over the pictures."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from geossl.geometry import Cameras, project

_NEAR = 1e-3


class LiftedFeatures(NamedTuple):
    """What points read from feature maps."""

    feats: Tensor  # [M, C], zeros where no picture sees the point
    views: Tensor  # [M] int64, pictures that see it


def visible_in(points: Tensor, camera: Cameras, depth: Tensor | None = None, tolerance: float = 0.05) -> tuple[Tensor, Tensor]:
    """Project points into one picture and tell which of them it shows.

    Args:
        points: ``[M, 3]`` in the world.
        camera: One camera, ``world_to_cam [4, 4]``.
        depth: ``[H, W]`` along the optical axis in metres, 0 or not finite where unknown, of any size: the point is compared with the
            depth of the pixel that it falls in. None takes every point in front of the camera and inside the picture as seen, also behind
            others.
        tolerance: A point is hidden when it lies farther than the depth there by more than this many metres plus 1 %; a point
            that lies nearer by more is not on the surface that the picture shows either. Pixels of unknown depth see nothing.

    Returns:
        Places ``[M, 2]`` as (x, y), 0..1 across the picture, and visible ``[M]`` bool.
    """
    pixels, z = project(points, camera.world_to_cam, camera.intrinsics)
    place = pixels / pixels.new_tensor([camera.width, camera.height])
    inside = (z > _NEAR) & ((place >= 0) & (place < 1)).all(-1)
    if depth is None:
        return place, inside
    rows, columns = depth.shape
    x, y = (torch.where(inside, place[:, axis], 0.0) * size for axis, size in ((0, columns), (1, rows)))
    # A place just under 1 times a size can round up to the size.
    shown = depth[y.long().clamp(max=rows - 1), x.long().clamp(max=columns - 1)]
    return place, inside & (shown > 0) & shown.isfinite() & ((z - shown).abs() <= tolerance + 0.01 * shown)


def lift_features(
    points: Tensor, maps: Tensor, cameras: Cameras, depth: Tensor | None = None, *, tolerance: float = 0.05
) -> LiftedFeatures:
    """Give points the mean of the features at the places where pictures show them.

    A map spreads evenly over its picture whatever its size, and is read bilinearly between the centres of its cells (at the border, its
    outermost cells continue). Pictures are taken one after the other: memory grows with points and channels, not with pictures.

    Args:
        points: ``[M, 3]``, floating point, in the world; points that are not finite are seen by no picture.
        maps: Features of ``V`` pictures, ``[V, C, h, w]``.
        cameras: Their ``V`` cameras.
        depth: ``[V, H, W]``, see :func:`visible_in`; None: nothing hides anything.
        tolerance: See :func:`visible_in`.

    Returns:
        ``feats [M, C]`` in the dtype of the maps, differentiable in them, and how many pictures see each point.

    Raises:
        ValueError: the shapes do not belong together.

    Example:
        >>> scene = geossl.data.SCENES.config("rooms").build("test")[0]
        >>> maps = backbone(normalize_images(scene.image))  # [V, C, h, w]
        >>> feats, views = lift_features(scene.points, maps, scene.cameras, scene.depth)
    """
    if points.dim() != 2 or points.shape[1] != 3:
        raise ValueError(f"lift_features: points must be [M, 3], got {list(points.shape)}")
    if maps.dim() != 4 or cameras.world_to_cam.dim() != 3 or maps.shape[0] != len(cameras):
        raise ValueError(
            f"lift_features: maps must be [V, C, h, w] with one camera for each of the V pictures, "
            f"got {list(maps.shape)} and world_to_cam {list(cameras.world_to_cam.shape)}"
        )
    if depth is not None and (depth.dim() != 3 or depth.shape[0] != maps.shape[0]):
        raise ValueError(f"lift_features: depth must be [{maps.shape[0]}, H, W], one image for each map, got {list(depth.shape)}")
    total = maps.new_zeros(len(points), maps.shape[1])
    views = torch.zeros(len(points), dtype=torch.int64, device=points.device)
    for view in range(maps.shape[0]):
        place, visible = visible_in(points, cameras[view], None if depth is None else depth[view], tolerance)
        rows = visible.nonzero()[:, 0]
        grid = (2 * place[rows] - 1)[None, None].to(maps.dtype)
        read = F.grid_sample(maps[view : view + 1], grid, mode="bilinear", padding_mode="border", align_corners=False)
        total = total.index_add(0, rows, read[0, :, 0].T)
        views[rows] += 1
    return LiftedFeatures(total / views.clamp(min=1)[:, None].to(total.dtype), views)
