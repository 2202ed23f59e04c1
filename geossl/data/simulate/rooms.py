"""Furnished rooms: a seed becomes a room of real objects, and a room becomes images, depth, boxes, clouds, grids and image pairs."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from geossl import ops
from geossl.data.simulate.catalogue import object_class, room_classes
from geossl.data.simulate.furnish import make_plan
from geossl.data.simulate.light import bake, draw_lights
from geossl.data.simulate.room_plan import Plan, RoomError
from geossl.data.simulate.shell import make_shell
from geossl.data.simulate.surfels import FLATNESS, Surfels, f32, object_surfels
from geossl.geometry import Cameras, Gaussians, back_project, matrix_to_quaternion, pixel_centers

OPACITY = 0.999
_NEAR = 0.1
_MIXED = 0.02  # relative difference of depths above which a pixel shows more than one surface


@dataclass(frozen=True)
class View:
    """One picture of a room.

    Args:
        camera: Where it was taken from.
        rgb: ``[H, W, 3]`` float32 in 0..1.
        depth: ``[H, W]`` float32, metres along the optical axis; 0 where nothing is seen.
        instance: ``[H, W]`` int64: 0 for the room itself, 1.. for its objects (row ``instance - 1`` of the boxes), -1 for nothing.
        valid: ``[H, W]`` bool, False where the pixel mixes surfaces at different depths, or shows nothing.
    """

    camera: Cameras
    rgb: Tensor
    depth: Tensor
    instance: Tensor
    valid: Tensor

    def points(self) -> Tensor:
        """Return where in the room every pixel is, ``[H, W, 3]``."""
        return back_project(self.depth, self.camera.intrinsics, self.camera.world_to_cam)


@dataclass(frozen=True)
class Room:
    """A furnished room; z is up and its corner at the origin. Made by :func:`build_room`.

    Args:
        plan: What is where.
        means: Surfel centres ``[n, 3]`` float32.
        quats: Their orientations ``[n, 4]`` (wxyz); the third axis is the normal.
        scales: Standard deviations ``[n, 3]``.
        colors: Lit colours ``[n, 3]``, sRGB in 0..1.
        solid: ``[n]`` bool, only seen from the side of the normal.
        instance: ``[n]`` int64, 0 for the room itself, 1.. for its objects.
        boxes: ``[objects, 7]`` float32, the extent of every object.
        labels: ``[objects]`` int64 into :attr:`classes`.
        rows: ``[objects]`` int64, the objects' rows in :func:`~geossl.data.load_objects`.
        seed: What it was built from.
        number: What it was built from.
    """

    plan: Plan
    means: Tensor
    quats: Tensor
    scales: Tensor
    colors: Tensor
    solid: Tensor
    instance: Tensor
    boxes: Tensor
    labels: Tensor
    rows: Tensor
    seed: int
    number: int
    _table: Tensor = field(repr=False)  # [8, n]: centre, normal, normal times centre, larger standard deviation

    def __len__(self) -> int:
        """Number of surfels."""
        return len(self.means)

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes of objects."""
        return room_classes()

    @property
    def opacities(self) -> Tensor:
        """Opacities of the surfels, ``[n]``."""
        return self.means.new_full((len(self.means),), OPACITY)

    @property
    def gaussians(self) -> Gaussians:
        """The surfels as Gaussian splats, for :func:`geossl.ops.rasterize_gaussians`, fitting and viewers."""
        return Gaussians.from_colors(self.means, self.quats, self.scales, self.opacities, self.colors)

    def rng(self, purpose: int) -> np.random.Generator:
        """Return the generator for one use of the room (views, noise...); the same for every process."""
        return np.random.default_rng(np.random.SeedSequence(self.seed, spawn_key=(self.number, 100 + purpose)))

    @torch.no_grad()
    def render(self, camera: Cameras, *, backend: Literal["auto", "native", "reference"] = "auto") -> View:
        """Take a picture.

        Colour is blended as Gaussian splats are. Depth is that of the surfels' planes: inverse depth, which is linear in the pixel for a
        plane, is blended by its coefficients; where a pixel mixes surfaces, the plane that gives most of the colour decides.

        Args:
            camera: One camera, ``world_to_cam [4, 4]``.
            backend: See :func:`geossl.ops.rasterize_gaussians`.

        Returns:
            The picture; where nothing is in view it is black, with depth 0 and instance -1.

        Raises:
            ValueError: there are several cameras, or pose or intrinsics are not finite or cannot be inverted.
        """
        if camera.world_to_cam.dim() != 2:
            raise ValueError(f"Room.render: takes one camera, got world_to_cam {list(camera.world_to_cam.shape)}; select one, cameras[i]")
        width, height, k = camera.width, camera.height, camera.intrinsics.float()
        pose = camera.world_to_cam.float()
        for name, matrix in (("world_to_cam", pose), ("intrinsics", k)):
            if (
                not bool(matrix.isfinite().all())
                or abs(float(torch.linalg.det(matrix))) < 1e-6
                or (matrix is k and not float(k.diagonal().amin()) > 0)
            ):
                raise ValueError(f"Room.render: {name} must be finite and invertible, with positive focal lengths, got {matrix.tolist()}")
        rows, plane, center, reach = self._seen(pose, k, width, height)
        if not len(rows):
            dark = torch.zeros(height, width)
            return View(camera, torch.zeros(height, width, 3), dark, torch.full((height, width), -1), dark > 0)
        features = torch.cat([self.colors.index_select(0, rows), plane], 1)
        image, alpha, meta = ops.rasterize_gaussians(
            self.means.index_select(0, rows), self.quats.index_select(0, rows), self.scales.index_select(0, rows),
            self.means.new_full((len(rows),), OPACITY), features, pose[None], k[None],
            width, height, near_plane=_NEAR, with_ids=True, backend=backend,
        )  # fmt: skip
        image, alpha, largest = image[0], alpha[0], meta["largest_id"][0].long()
        seen = alpha[..., 0] > 0.5
        share = alpha.clamp(min=1e-6)
        offset = pixel_centers(height, width) - torch.tensor([width / 2, height / 2])
        pixel = torch.cat([offset, torch.ones(height, width, 1)], -1)
        blended = (image[..., 3:] / share * pixel).sum(-1)
        first = largest.clamp(min=0).flatten()
        top = (plane.index_select(0, first).view(height, width, 3) * pixel).sum(-1)
        # A plane holds as far as its surfel reaches; beyond, at silhouettes, it may run off anywhere.
        near, size = (values.index_select(0, first).view(height, width) for values in (center, 4 * reach + 0.01))
        mixed = ~((blended - top).abs() < _MIXED * top) | ((1 / top - near).abs() > size)
        depth = torch.where(mixed, torch.minimum(torch.maximum(1 / top, near - size), near + size), 1 / blended)
        depth = torch.where(seen, depth, 0.0)
        instance = torch.where(seen, self.instance.index_select(0, rows.index_select(0, first)).view(height, width), -1)
        return View(camera, (image[..., :3] / share).clamp(0, 1) * seen[..., None], depth, instance, seen & ~mixed)

    def _seen(self, pose: Tensor, k: Tensor, width: int, height: int) -> tuple[Tensor, ...]:
        """Return the rows of surfels that can be in the picture, inverse depth of their planes ``[n, 3]``, their depth and size ``[n]``.

        Inverse depth is ``a x + b y + c`` of the pixel counted from the image's middle; of a surfel seen edge-on, that of its centre.
        """
        mx, my, mz, nx, ny, nz, offset, reach = self._table  # long rows: every step is one pass over few of them
        r, t = pose[:3, :3].tolist(), pose[:3, 3].tolist()
        x, y, z = (mx * a[0] + my * a[1] + mz * a[2] + b for a, b in zip(r, t, strict=True))
        eye = [-sum(r[row][column] * t[row] for row in range(3)) for column in range(3)]
        across = offset - (nx * eye[0] + ny * eye[1] + nz * eye[2])  # normal times centre, in the camera's frame
        seen = (z > _NEAR) & ((across < 0) | ~self.solid)
        margin = 4 * reach  # a splat is cut off at less than 4 standard deviations
        for values, center, focal, size in ((x, k[0, 2], k[0, 0], width), (y, k[1, 2], k[1, 1], height)):
            low, high = -float(center / focal), float((size - center) / focal)
            seen &= (values - low * z > -math.hypot(1, low) * margin) & (values - high * z < math.hypot(1, high) * margin)
        rows = seen.nonzero()[:, 0]
        nx, ny, nz, across, x, y, z = (values.index_select(0, rows) for values in (nx, ny, nz, across, x, y, z))
        centred = k.clone()
        centred[0, 2] -= width / 2
        centred[1, 2] -= height / 2
        turn = (torch.linalg.inv(centred).mT @ pose[:3, :3]).tolist()
        edge_on = across.abs() < 0.06 * (x * x + y * y + z * z).sqrt()
        share = torch.where(edge_on, 0.0, 1 / across)
        a, b, c = ((nx * m[0] + ny * m[1] + nz * m[2]) * share for m in turn)
        return rows, torch.stack([a, b, torch.where(edge_on, 1 / z, c)], 1), z, reach.index_select(0, rows)

    def visible_counts(self, view: View) -> Tensor:
        """Return how many pixels of each object a view shows, ``[objects]`` int64."""
        return torch.bincount((view.instance.flatten() + 1).clamp(min=0), minlength=len(self.boxes) + 2)[2:]


def build_room(
    seed: int, number: int = 0, *, kind: str | None = None, size: tuple[float, float, float] | None = None, max_objects: int = 15,
    detail: float = 1.0,
) -> Room:  # fmt: skip
    """Build room ``number`` of the endless row that ``seed`` stands for: bit-identical in every process, in any order.

    Args:
        seed: At least 0.
        number: At least 0.
        kind: One of :data:`~geossl.data.simulate.KINDS`; None draws one.
        size: Extent along x, y and z in metres; None draws one that suits the kind.
        max_objects: No more objects than this, at least 4.
        detail: 2 halves the spacing of the surfels of floor, walls and what hangs on them, 0.5 doubles it; at most 8.

    Raises:
        RoomError: an argument is out of range, or the furniture of this kind finds no place in ``size``; the message says what.
    """
    for name, value in (("seed", seed), ("number", number)):
        if isinstance(value, bool) or not isinstance(value, Integral) or value < 0:
            raise RoomError(f"room: {name} must be a whole number of at least 0, got {value!r}")
    if not (isinstance(detail, Real) and 0 < detail <= 8):
        raise RoomError(f"room: detail must be positive and at most 8, got {detail!r}")
    seed, number = int(seed), int(number)
    streams = np.random.SeedSequence(seed, spawn_key=(number,)).spawn(3)
    plan_rng, shell_rng, light_rng = (np.random.default_rng(stream) for stream in streams)
    try:
        plan = make_plan(plan_rng, kind, size, max_objects)
    except RoomError as error:
        raise RoomError(f"{error} (seed {seed}, room {number})") from error
    shell = make_shell(plan, shell_rng, detail)
    parts = [object_surfels(item.row).moved(item.yaw, (item.x, item.y, item.z)) for item in plan.items]
    instance = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
    objects = Surfels.concatenate(parts)
    colors = bake(plan, shell, objects, instance, draw_lights(plan, light_rng), light_rng)
    surfels = Surfels.concatenate([shell, objects])
    means, normals = torch.from_numpy(surfels.center), torch.from_numpy(surfels.normal)
    tangent = torch.from_numpy(surfels.tangent)
    frame = torch.stack([tangent, torch.linalg.cross(normals, tangent), normals], -1)
    sigma = torch.from_numpy(surfels.sigma)
    return Room(
        plan=plan,
        means=means,
        quats=matrix_to_quaternion(frame),
        scales=torch.cat([sigma, FLATNESS * sigma.amin(1, keepdim=True)], 1),
        colors=torch.from_numpy(colors),
        solid=torch.from_numpy(surfels.solid),
        instance=torch.from_numpy(np.concatenate([np.zeros(len(shell), dtype=np.int64), instance + 1])),
        boxes=torch.from_numpy(_boxes(plan)),
        labels=torch.tensor([object_class(item.row) for item in plan.items], dtype=torch.int64),
        rows=torch.tensor([item.row for item in plan.items], dtype=torch.int64),
        seed=seed,
        number=number,
        _table=torch.cat([means.T, normals.T, (means * normals).sum(1)[None], sigma.amax(1)[None]]),
    )


def _boxes(plan: Plan) -> np.ndarray:
    """Return ``[objects, 7]``: the extent of the stored points of every object, as placed."""
    from geossl.data.objects import load_objects

    library = load_objects()
    boxes = np.zeros((len(plan.items), 7), dtype=np.float32)
    for number, item in enumerate(plan.items):
        xyz = library.xyz[item.row].astype(np.float32) * f32(library.scale_m[item.row])
        extent = np.ptp(xyz, axis=0)
        yaw = math.remainder(item.yaw, 2 * math.pi)
        boxes[number] = (item.x, item.y, item.z + extent[2] / 2, *extent, yaw)
    return boxes
