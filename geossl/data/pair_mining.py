"""Which images of a place make good pairs: how much they show in common, from how different directions, and a choice without repetition.

Two images are compared by what they see: ``share[i, j]`` is the part of what image i sees that image j sees too (depth agrees, so nothing
hidden counts). With both directions a and b, the intersection over union of the two visible surfaces is ``1 / (1/a + 1/b - 1)``, from any
distances: exactly for points that either sees or not, and for surfaces as the pixels weigh them. As CroCo v2 does, a pair scores
``IoU * 4 cos(angle) (1 - cos(angle))``, where the angle is the one between the optical axes: nothing for the same view twice, most at 60
degrees on the same place. The best pairs are taken first, and images that show more than three quarters of what a used one shows are left
out from then on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from geossl.config import require
from geossl.errors import DataError
from geossl.geometry import back_project, pixel_centers


@dataclass(kw_only=True)
class MiningOptions:
    """Which pairs are good enough, and how different the chosen ones must be from each other."""

    min_iou: float = 0.2
    """Least intersection over union of what the two images show."""
    max_iou: float = 0.9
    """Largest one: more is nearly the same picture twice."""
    max_angle: float = 80.0
    """Largest angle between the optical axes, in degrees."""
    min_score: float = 0.02
    """Least score IoU * 4 cos(angle) (1 - cos(angle)), which is at most 1; 10 degrees at full overlap give 0.06."""
    redundant: float | None = 0.75
    """Once a pair is chosen, images whose IoU with one of its two exceeds this are left out, these two with them: each image is used once.
    None keeps every pair that passes the thresholds."""
    tolerance: float = 0.05
    """Largest relative difference of depth at which two images see the same surface."""
    min_known: float = 0.5
    """Frames with depth in a smaller part of their pixels are left out."""

    def __post_init__(self) -> None:
        require(0.0 < self.min_iou < self.max_iou <= 1.0, "min_iou", f"must lie in (0, max_iou={self.max_iou})", self.min_iou)
        require(0.0 < self.max_angle <= 90.0, "max_angle", "must lie in (0, 90]: beyond, the score is negative", self.max_angle)
        require(0.0 <= self.min_score <= 1.0, "min_score", "must lie in [0, 1]", self.min_score)
        require(self.redundant is None or 0.0 < self.redundant < 1.0, "redundant", "must lie in (0, 1), or be None", self.redundant)
        require(self.tolerance > 0.0, "tolerance", "must be positive", self.tolerance)
        require(0.0 <= self.min_known <= 1.0, "min_known", "must lie in [0, 1]", self.min_known)


@dataclass(frozen=True)
class MinedPairs:
    """The chosen pairs of one place, best first.

    Args:
        pairs: ``[n, 2]`` int64, numbers of the images, the smaller first.
        iou: ``[n]`` float32.
        angle: ``[n]`` float32, degrees between the optical axes.
        score: ``[n]`` float32.
        rejected: How many pairs of images that see anything in common were not chosen, by reason.
    """

    pairs: np.ndarray
    iou: np.ndarray
    angle: np.ndarray
    score: np.ndarray
    rejected: dict[str, int]

    def __len__(self) -> int:
        """Number of pairs."""
        return len(self.pairs)


class DepthGeometry:
    """What images with depth and pose see.

    Args:
        depth: ``[N, h, w]`` float32 along the optical axis, 0 where unknown; small images are enough (100 columns).
        intrinsics: ``[N, 3, 3]`` for images of that size.
        world_to_cam: ``[N, 4, 4]``.
        tolerance: See :class:`MiningOptions`; infinity asks for no agreement of depths.
        points: About how many pixels of each image are looked for in the others.
    """

    def __init__(self, depth: Tensor, intrinsics: Tensor, world_to_cam: Tensor, tolerance: float = 0.05, points: int = 600) -> None:
        self.depth, self.tolerance, self.world_to_cam = depth.float().contiguous(), tolerance, world_to_cam.double()
        count, height, width = depth.shape
        if not bool(world_to_cam.isfinite().all()) or not bool(intrinsics.isfinite().all()):
            raise DataError("pair mining: poses and intrinsics must be finite; leave frames without a pose out")
        full = torch.zeros(count, 4, 4, dtype=torch.float64)
        full[:, :3, :3], full[:, 3, 3] = intrinsics.double(), 1
        self._to_pixel = (full @ self.world_to_cam)[:, :3]
        step = max(1, round((height * width / points) ** 0.5))
        rows, columns = torch.arange(step // 2, height, step), torch.arange(step // 2, width, step)
        self._chosen = (rows[:, None] * width + columns).flatten()
        places = back_project(self.depth.double(), intrinsics.double(), self.world_to_cam).view(count, -1, 3)
        self._places = places[:, self._chosen]
        self._known = self.depth.view(count, -1)[:, self._chosen] > 0
        self._centers = pixel_centers(height, width).view(-1, 2)[self._chosen] / torch.tensor([width, height])

    def __len__(self) -> int:
        """Number of images."""
        return len(self.depth)

    def _look(self, image: int, others: Tensor | slice) -> tuple[Tensor, Tensor, Tensor]:
        """Look for the chosen pixels of an image in ``n`` others: seen, lost where the other's depth is unknown, and pixels.

        Returns:
            ``[n, P]`` bool, ``[n, P]`` bool and ``[n, 2, P]`` float32.
        """
        _, height, width = self.depth.shape
        # Relative to the image's own middle: float32 keeps a tenth of a pixel, wherever the world's origin lies.
        places = self._places[image]
        origin = places[self._known[image]].mean(0) if bool(self._known[image].any()) else places.mean(0)
        matrix = self._to_pixel[others].clone()
        matrix[:, :, 3] += (matrix[:, :, :3] @ origin).view(-1, 3)
        ones = torch.ones(len(places), 1, dtype=torch.float64)
        homogeneous = torch.cat([places - origin, ones], 1).float().T
        x, y, z = (matrix.float().view(-1, 4) @ homogeneous).view(-1, 3, len(places)).unbind(1)
        u, v = x / z, y / z
        inside = (z > 0) & (u >= 0) & (u < width) & (v >= 0) & (v < height) & self._known[image]
        index = torch.where(inside, v, 0.0).long().mul_(width).add_(torch.where(inside, u, 0.0).long())
        found = self.depth[others].flatten(1).gather(1, index)
        unknown = inside & (found <= 0)
        same = inside & (found > 0)
        if self.tolerance != float("inf"):
            same &= (found - z).abs() <= self.tolerance * z
        return same, unknown, torch.stack([u, v], 1)

    def shares(self, progress: Callable[[int, int], None] = lambda done, total: None) -> Tensor:
        """Return ``[N, N]`` float32: which part of what image i sees image j sees too. Pixels without depth in either do not count."""
        count = len(self)
        shares = torch.zeros(count, count)
        for image in range(count):
            same, unknown, _ = self._look(image, slice(None))
            known = self._known[image].sum() - unknown.sum(1)
            shares[image] = same.sum(1) / known.clamp(min=1)
            progress(image + 1, count)
        return shares

    def matches(self, first: int, second: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return corresponding places ``[n, 2]`` in both images, and all places ``[m, 2]`` looked for in the first.

        Places are (x, y) in parts of width and height: 0..1.
        """
        same, _, pixels = self._look(first, torch.tensor([second]))
        _, height, width = self.depth.shape
        there = pixels[0].T / torch.tensor([width, height])
        return self._centers[same[0]], there[same[0]], self._centers[self._known[first]]


class PointGeometry:
    """What images see of a cloud of reconstructed points, as structure from motion gives it.

    Args:
        seen: For each image the numbers of the points it sees, ``[n_i]`` int64 without repetition.
        places: Where it sees them, ``[n_i, 2]`` float32, in parts of width and height.
        world_to_cam: ``[N, 4, 4]``.
    """

    def __init__(self, seen: list[np.ndarray], places: list[np.ndarray], world_to_cam: Tensor) -> None:
        self._seen, self._places, self.world_to_cam = seen, places, world_to_cam.double()

    def __len__(self) -> int:
        """Number of images."""
        return len(self._seen)

    def shares(self, progress: Callable[[int, int], None] = lambda done, total: None) -> Tensor:
        """Return ``[N, N]`` float32: which part of the points that image i sees image j sees too."""
        from scipy.sparse import csr_matrix

        counts = np.array([len(seen) for seen in self._seen])
        _, columns = np.unique(np.concatenate(self._seen), return_inverse=True)
        rows = np.repeat(np.arange(len(self)), counts)
        table = csr_matrix((np.ones(len(rows), np.float32), (rows, columns)))
        common = torch.from_numpy((table @ table.T).toarray())
        progress(len(self), len(self))
        return common / torch.from_numpy(np.maximum(counts, 1)).float()[:, None]

    def matches(self, first: int, second: int) -> tuple[Tensor, Tensor, Tensor]:
        """See :meth:`DepthGeometry.matches`."""
        _, here, there = np.intersect1d(self._seen[first], self._seen[second], assume_unique=True, return_indices=True)
        places = [torch.from_numpy(self._places[image]).float() for image in (first, second)]
        return places[0][here], places[1][there], places[0]


Geometry = DepthGeometry | PointGeometry


def overlap_iou(shares: Tensor) -> Tensor:
    """Return the intersection over union ``[N, N]`` of what two images see, from both directions of ``shares [N, N]``."""
    return torch.where((shares > 0) & (shares.T > 0), 1 / (1 / shares + 1 / shares.T - 1), 0.0)


def view_angles(world_to_cam: Tensor) -> Tensor:
    """Return the angles ``[N, N]`` between the optical axes, in degrees."""
    axes = world_to_cam[:, 2, :3]
    return torch.rad2deg(torch.arccos((axes @ axes.T).clamp(-1, 1))).float()


def pair_scores(iou: Tensor, angle: Tensor) -> Tensor:
    """Return ``IoU * 4 cos(angle) (1 - cos(angle))`` (angle in degrees): 0 for equal directions, IoU at 60 degrees."""
    cosine = torch.cos(torch.deg2rad(angle))
    return iou * 4 * cosine * (1 - cosine)


def mine_pairs(geometry: Geometry, options: MiningOptions, progress: Callable[[int, int], None] = lambda done, total: None) -> MinedPairs:
    """Choose pairs of the images of one place.

    Args:
        geometry: What they see.
        options: Thresholds.
        progress: Called with the images compared and those there are.
    """
    iou = overlap_iou(geometry.shares(progress))
    angle = view_angles(geometry.world_to_cam)
    return choose_pairs(iou, angle, pair_scores(iou, angle), options)


def choose_pairs(iou: Tensor, angle: Tensor, score: Tensor, options: MiningOptions) -> MinedPairs:
    """Choose pairs greedily by score; see the head of this file.

    Args:
        iou: ``[N, N]``, symmetric.
        angle: ``[N, N]`` degrees.
        score: ``[N, N]``.
        options: Thresholds.
    """
    first, second = np.triu_indices(len(iou), 1)
    i, a, s = (values.numpy()[first, second] for values in (iou, angle, score))
    rejected: dict[str, int] = {}
    good = i > 0
    for reason, passes in (
        ("too little in common", i >= options.min_iou),
        ("too much in common", i <= options.max_iou),
        ("directions too different", a <= options.max_angle),
        ("score too low", s >= options.min_score),
    ):
        rejected[reason] = int((good & ~passes).sum())
        good &= passes
    rows = np.flatnonzero(good)
    rows = rows[np.argsort(-s[rows], kind="stable")]
    if options.redundant is not None:
        kept = _without_repetition(first[rows], second[rows], iou.numpy(), options.redundant)
        rejected["like a better pair"] = len(rows) - len(kept)
        rows = rows[kept]
    pairs = np.stack([first[rows], second[rows]], 1)
    return MinedPairs(pairs, i[rows], a[rows], s[rows], {reason: count for reason, count in rejected.items() if count})


def _without_repetition(first: np.ndarray, second: np.ndarray, iou: np.ndarray, redundant: float) -> np.ndarray:
    """Return which of the pairs, best first, are kept when images like a used one are left out."""
    free = np.ones(len(iou), dtype=bool)
    kept = []
    for row, (one, other) in enumerate(zip(first.tolist(), second.tolist(), strict=True)):
        if free[one] and free[other]:
            kept.append(row)
            free &= (iou[one] <= redundant) & (iou[other] <= redundant)
            free[[one, other]] = False
            if free.sum() < 2:
                break
    return np.array(kept, dtype=np.int64)
