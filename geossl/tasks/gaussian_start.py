"""Where the fitting of Gaussians begins: the posed images, checked, and the first Gaussians, from depth, from points or at random."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from geossl.errors import DataError
from geossl.geometry import Cameras, Gaussians, back_project, invert_pose, project, transform_points
from geossl.ops import knn, voxel_reduce, voxelize

NEAREST = 0.01
"""Depth in the scene's unit before which nothing is drawn."""
_PIXELS_PER_GAUSSIAN = 20  # of the pixels with depth, no more than this many times the wanted Gaussians are looked at
_NEAR, _FAR = 2 / 3, 8.0  # depth of random Gaussians, in distances at which the optical axes come together
_MIXED = 4  # candidates drawn for each random Gaussian


class PosedImages(Protocol):
    """What is fitted: posed images of one place, as ``geossl.data`` reads them (:class:`~geossl.data.scene.SceneSample`).

    Optional attributes: ``depth [V, H, W]`` along the optical axis, 0 or not finite where unknown; ``valid [V, H, W]``, where it is sure;
    ``points [N, 3]`` with ``colors [N, 3]``; ``source``, what an error message calls it.
    """

    @property
    def image(self) -> Tensor:
        """``[V, 3, H, W]`` in 0..1."""

    @property
    def intrinsics(self) -> Tensor:
        """``[V, 3, 3]``."""

    @property
    def world_to_cam(self) -> Tensor:
        """``[V, 4, 4]``."""


@dataclass(frozen=True)
class Views:
    """Posed images, checked: ``image [V, H, W, 3]`` float32, the cameras, and ``depth [V, H, W]`` (0: unknown) if there is any."""

    image: Tensor
    cameras: Cameras
    depth: Tensor | None
    source: str

    def __len__(self) -> int:
        """Number of views."""
        return len(self.image)

    def __getitem__(self, rows: Tensor) -> Views:
        """Return some of the views."""
        return Views(self.image[rows], self.cameras[rows], None if self.depth is None else self.depth[rows], self.source)


def _field(scene: Any, name: str, shape: tuple[int, ...], form: str, source: str) -> Tensor:
    """Return a floating field of ``scene`` as float32, refusing what is missing, of another shape or not finite."""
    value = getattr(scene, name, None)
    if value is None:
        raise DataError(f"{source}: has no {name}; fitting needs image, intrinsics and world_to_cam of every view")
    if not isinstance(value, Tensor) or not value.is_floating_point():
        kind = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise DataError(f"{source}: {name} must be a floating tensor {form}, got {kind}" + ("; divide by 255" if name == "image" else ""))
    if len(shape) != value.dim() or any(want not in (-1, have) for want, have in zip(shape, value.shape, strict=True)):
        raise DataError(f"{source}: {name} must be {form}, got {list(value.shape)}")
    wrong = (~value.isfinite()).flatten(1).any(1).nonzero().flatten()
    if len(wrong) and name != "depth":
        raise DataError(
            f"{source}: {name} of view {int(wrong[0])} is not finite ({len(wrong)} of {len(value)} views); leave such views out"
        )
    return value.detach().float().cpu()


def check_views(scene: PosedImages, held_out: bool = True) -> Views:
    """Check posed images before any work is done.

    Args:
        scene: The images.
        held_out: Whether some of them will be kept from training.

    Raises:
        DataError: too few views, missing poses, shapes that do not fit, numbers that are not finite, values outside 0..1, a pose that is
            no rotation and translation, a focal length that is not positive.
    """
    source = str(getattr(scene, "source", "") or "fit_gaussians")
    image = _field(scene, "image", (-1, 3, -1, -1), "[V, 3, H, W]", source)
    count, _, height, width = image.shape
    if count < (3 if held_out else 2):
        what = "3 views, 2 to learn from and 1 to measure on (test_every=0 measures on none)" if held_out else "2 views"
        raise DataError(f"{source}: fitting needs at least {what}, got {count}")
    if min(height, width) < 8:
        raise DataError(f"{source}: images must have at least 8 x 8 pixels, got {height} x {width}")
    low, high = (float(value) for value in image.aminmax())
    if low < -1e-3 or high > 1 + 1e-3:
        raise DataError(f"{source}: image must lie in 0..1, got values from {low:g} to {high:g}; divide 8 bit images by 255")
    intrinsics = _field(scene, "intrinsics", (count, 3, 3), f"[V, 3, 3] with V = {count}", source)
    pose = _field(scene, "world_to_cam", (count, 4, 4), f"[V, 4, 4] with V = {count}", source)
    if not bool((intrinsics[:, [0, 1], [0, 1]] > 0).all()):
        raise DataError(f"{source}: intrinsics must have positive focal lengths")
    turn = pose[:, :3, :3]
    off = (turn @ turn.mT - torch.eye(3)).abs().amax((1, 2)).maximum((pose[:, 3] - torch.tensor([0.0, 0, 0, 1])).abs().amax(1))
    wrong = ((off > 1e-2) | (torch.linalg.det(turn) < 0)).nonzero().flatten()
    if len(wrong):
        raise DataError(f"{source}: world_to_cam of view {int(wrong[0])} is no rotation and translation ({len(wrong)} of {count} views)")
    depth = None
    if getattr(scene, "depth", None) is not None:
        depth = _field(scene, "depth", (count, height, width), f"[V, H, W] = {[count, height, width]}", source)
        known = depth.isfinite() & (depth > NEAREST)
        valid = getattr(scene, "valid", None)
        if valid is not None:
            if tuple(valid.shape) != (count, height, width) or valid.dtype != torch.bool:
                raise DataError(f"{source}: valid must be bool {[count, height, width]}, got {valid.dtype} {list(valid.shape)}")
            known &= valid.cpu()
        depth = torch.where(known, depth, 0.0) if bool(known.any()) else None
    return Views(image.movedim(1, -1).contiguous(), Cameras(pose, intrinsics, width, height), depth, source)


def split_views(count: int, every: int) -> tuple[Tensor, Tensor]:
    """Return the rows of the views that are learned from, and of every ``every``-th, which are held out (``every`` 0: none).

    The first one held out is in the middle of its group, so that a camera path is not measured at its ends, where there is least to
    know it from.
    """
    rows = torch.arange(count)
    if every == 0:
        return rows, rows[:0]
    held_out = rows % every == min(every // 2, count // 2)
    return rows[~held_out], rows[held_out]


def radius(views: Views, means: Tensor) -> float:
    """Return the size of the scene, to which learning rates and thresholds are relative.

    It is 1.1 times the distance of the farthest camera from the middle of all (Kerbl et al. 2023), but at least 0.3 times the median
    distance of the first Gaussians from there, so that a camera that only turns on the spot does not make the scene a point.
    """
    centers = views.cameras.centers
    middle = centers.mean(0)
    spread = float((centers - middle).norm(dim=1).max())
    return max(1.1 * spread, 0.3 * float((means - middle).norm(dim=1).median()))


def start_from_depth(views: Views, count: int) -> tuple[Tensor, Tensor]:
    """Return at most ``count`` points ``[N, 3]`` and their colours: the pixels with depth, back-projected and thinned by voxels.

    The voxel is as large as a pixel at the median depth, or as much larger as ``count`` asks for.
    """
    assert views.depth is not None
    cameras, depth = views.cameras, views.depth
    rows = (depth > 0).flatten().nonzero()[:, 0]
    rows = rows[:: max(1, len(rows) // (_PIXELS_PER_GAUSSIAN * count))]
    points = back_project(depth, cameras.intrinsics, cameras.world_to_cam).flatten(0, 2)[rows]
    colors = views.image.flatten(0, 2)[rows]
    return thin(points, colors, count, float(depth.flatten()[rows].median() / cameras.intrinsics[0, 0, 0]))


def thin(points: Tensor, colors: Tensor, count: int, voxel: float) -> tuple[Tensor, Tensor]:
    """Return one point, the mean, for each voxel, the voxels being as large as it takes to have at most ``count``."""
    offsets = torch.tensor([0, len(points)])
    found = voxelize(points, voxel, offsets=offsets)
    while len(found.counts) > count:
        voxel *= 1.1
        found = voxelize(points, voxel, offsets=offsets)
    return voxel_reduce(points, found), voxel_reduce(colors, found)


def start_from_points(scene: Any, views: Views, count: int) -> tuple[Tensor, Tensor]:
    """Return the points of a scene that some view sees, thinned to at most ``count``, and their colours.

    Raises:
        DataError: no view sees any of them.
    """
    points = _field(scene, "points", (-1, 3), "[N, 3]", views.source)
    given = getattr(scene, "colors", None) is not None
    form = f"[N, 3] with N = {len(points)}"
    colors = _field(scene, "colors", (len(points), 3), form, views.source) if given else torch.full_like(points, 0.5)
    seen = seen_by(points, views.cameras) > 0
    if not bool(seen.any()):
        behind = transform_points(points.expand(len(views), -1, -1), views.cameras.world_to_cam)[..., 2].max() <= NEAREST
        why = "all lie behind the cameras" if bool(behind) else "all lie outside the images"
        raise DataError(f"{views.source}: none of its {len(points)} points is seen by any view, they {why}; are the poses world_to_cam?")
    spread = points[seen].std(0).norm() if int(seen.sum()) > 1 else points.new_ones(())
    return thin(points[seen], colors[seen], count, max(float(spread) / 2000, 1e-6))


def start_at_random(views: Views, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return ``count`` random points in the volume that the cameras have in common, and the colours of the pixels they lie behind.

    Each lies on the ray of a random pixel, from two thirds of the distance at which the optical axes come together to eight times that,
    its inverse depth uniform; nearer ones would stay before the cameras as fog. Points in three images or more are taken, if there are
    none those in two.
    """
    cameras = views.cameras
    views_count, height, width = views.image.shape[:3]
    distance = _distance(cameras)
    drawn = _MIXED * count
    pixel = torch.randint(views_count * height * width, (drawn,), generator=generator)
    inverse = torch.empty(drawn).uniform_(1 / (_FAR * distance), 1 / (_NEAR * distance), generator=generator)
    view, inside = pixel // (height * width), pixel % (height * width)
    x, y = inside % width + 0.5, inside // width + 0.5
    k, pose = cameras.intrinsics[view], invert_pose(cameras.world_to_cam)[view]
    ray = torch.stack([(x - k[:, 0, 2]) / k[:, 0, 0], (y - k[:, 1, 2]) / k[:, 1, 1], torch.ones_like(x)], 1)
    points = transform_points((ray / inverse[:, None])[:, None], pose)[:, 0]
    seen = seen_by(points, cameras)
    rows = next(rows for need in (3, 2, 1) if len(rows := (seen >= need).nonzero().flatten()) or need == 1)[:count]
    return points[rows], views.image.flatten(0, 2)[pixel[rows]]


def seen_by(points: Tensor, cameras: Cameras) -> Tensor:
    """Return in how many images each point lies, ``[N]``, whatever may hide it."""
    pixels, depth = project(points.expand(len(cameras), -1, -1), cameras.world_to_cam, cameras.intrinsics)
    x, y = pixels.unbind(-1)
    return ((depth > NEAREST) & (x >= 0) & (y >= 0) & (x < cameras.width) & (y < cameras.height)).sum(0)


def _distance(cameras: Cameras) -> float:
    """Return how far from the cameras their optical axes come closest to each other; if they part, how far apart the cameras are."""
    centers, axes = cameras.centers, cameras.world_to_cam[:, 2, :3]
    across = torch.eye(3) - axes[:, :, None] * axes[:, None]
    middle = centers.mean(0)
    # A weak pull to the middle of the cameras settles what parallel axes leave open.
    focus = torch.linalg.solve(across.sum(0) + 1e-4 * torch.eye(3), (across @ (centers - middle)[..., None]).sum(0))[:, 0] + middle
    ahead = float(((focus - centers) * axes).sum(1).median())
    spread = float((centers - middle).norm(dim=1).max())
    return max(ahead, spread) or 1.0


def first_gaussians(points: Tensor, colors: Tensor, opacity: float, size: float, sh_degree: int) -> Gaussians:
    """Return round Gaussians at ``points``, each as large as its three nearest neighbours are far (Kerbl et al. 2023).

    Args:
        points: Centres ``[N, 3]``.
        colors: ``[N, 3]`` in 0..1.
        opacity: Of all of them.
        size: Factor on the distance to the neighbours.
        sh_degree: Degree of the spherical harmonics; all but the first coefficient are 0.
    """
    count = len(points)
    offsets = torch.tensor([0, count])
    squared = knn(points, points, 3, query_offsets=offsets, offsets=offsets, exclude_self=True).distance
    near = torch.where(squared.isfinite(), squared, 0.0).mean(1).sqrt()
    typical = float(near[near > 0].median()) if bool((near > 0).any()) else 1e-2
    near = near.clamp(0.1 * typical, 10 * typical)  # points in one place, and points alone
    quats = torch.zeros(count, 4)
    quats[:, 0] = 1
    plain = Gaussians.from_colors(points, quats, (size * near)[:, None].repeat(1, 3), torch.full((count,), opacity), colors)
    rest = torch.zeros(count, (sh_degree + 1) ** 2 - 1, 3)
    return Gaussians(plain.means, plain.quats, plain.scales, plain.opacities, torch.cat([plain.sh, rest], 1))
