"""Fit a scene of Gaussians to posed images (3D Gaussian Splatting, Kerbl et al. 2023): the rasterizer's original purpose.

    result = geossl.fit_gaussians(scene, steps=2000)
    result.psnr, result.ssim, result.gaussians

``scene`` holds posed images (a :class:`~geossl.data.scene.SceneSample`); depth is used for where to begin, if there is any. On the CPU the
same scene and configuration give the same bits, whatever the number of threads. :class:`GaussianFit` is the same step by step, with a
state to be saved.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from geossl.config import require
from geossl.errors import CheckpointError, ConfigError, DataError
from geossl.geometry import Gaussians
from geossl.layers import l1, psnr, ssim
from geossl.layers.image_metrics import WINDOW
from geossl.ops import rasterize_gaussians
from geossl.tasks.gaussian_density import DensityConfig, GaussianRows, densify
from geossl.tasks.gaussian_start import (
    PosedImages,
    Views,
    check_views,
    first_gaussians,
    radius,
    split_views,
    start_at_random,
    start_from_depth,
    start_from_points,
)


@dataclass(frozen=True, kw_only=True)
class StartConfig:
    """The first Gaussians."""

    source: Literal["auto", "depth", "points", "random"] = "auto"
    """Where they lie: on the pixels with depth, on the points of the scene, or at random in the volume that the cameras have in common.
    `auto` takes the first of these that there is."""
    count: int = 20000
    """How many at most; depth and points are thinned by voxels to that."""
    opacity: float | None = None
    """Their opacity; null is 0.5 on depth and points, which are surfaces, and 0.1 at random."""
    size: float = 1.0
    """Their standard deviation, in mean distances of the three nearest neighbours."""

    def __post_init__(self) -> None:
        require(self.count >= 1, "count", "must be at least 1", self.count)
        require(self.opacity is None or 0 < self.opacity < 1, "opacity", "must lie between 0 and 1, or be null", self.opacity)
        require(self.size > 0, "size", "must be positive", self.size)


@dataclass(frozen=True, kw_only=True)
class RatesConfig:
    """Learning rates of Adam, one for each kind of parameter.

    These are for a few thousand steps. For their 30,000, Kerbl et al. 2023 have 1.6e-4 to 1.6e-6, 1e-3, 5e-3, 5e-2 and 2.5e-3.
    """

    means: float = 6e-4
    """Of positions at the beginning, in radii of the scene."""
    means_final: float = 6e-6
    """Of positions at the end; it decays exponentially."""
    quats: float = 2e-3
    """Of rotations."""
    scales: float = 1e-2
    """Of logarithms of standard deviations."""
    opacities: float = 5e-2
    """Of logits of opacities."""
    colors: float = 5e-3
    """Of spherical harmonics of degree 0; those of higher degrees get a twentieth."""

    def __post_init__(self) -> None:
        for key in ("means", "means_final", "quats", "scales", "opacities", "colors"):
            require(getattr(self, key) > 0, key, "must be positive", getattr(self, key))


@dataclass(frozen=True, kw_only=True)
class GaussianFitConfig:
    """How Gaussians are fitted to posed images."""

    steps: int = 2000
    """Optimiser steps."""
    views_per_step: int = 1
    """Images rendered in each step."""
    seed: int = 0
    """Seed of the first Gaussians, the order of the views and what splitting draws."""
    test_every: int = 8
    """Every how many-th view is held out, to measure on; 0 holds none out, and there is no PSNR then."""
    sh_degree: int = 1
    """Degree of the spherical harmonics at the end, 0 to 3: how much colour may change with the side it is seen from."""
    sh_every: int = 500
    """The degree begins at 0 and is raised by one after as many steps."""
    ssim_weight: float = 0.2
    """Part of 1 - SSIM in the loss; the rest is the mean absolute difference."""
    antialiased: bool = False
    """Render antialiased. Most viewers of the result do not."""
    background: tuple[float, float, float] | None = None
    """Colour behind everything; null is the mean colour of the views that are learned from, the best guess at what none of them shows."""
    start: StartConfig = field(default_factory=StartConfig)
    """The first Gaussians."""
    rates: RatesConfig = field(default_factory=RatesConfig)
    """Learning rates."""
    density: DensityConfig = field(default_factory=DensityConfig)
    """Where Gaussians are added and removed."""

    def __post_init__(self) -> None:
        for key in ("steps", "views_per_step", "sh_every"):
            require(getattr(self, key) >= 1, key, "must be at least 1", getattr(self, key))
        require(self.seed >= 0, "seed", "must not be negative", self.seed)
        require(self.test_every == 0 or self.test_every >= 2, "test_every", "must be 0 or at least 2", self.test_every)
        require(0 <= self.sh_degree <= 3, "sh_degree", "must lie in 0..3", self.sh_degree)
        require(0 <= self.ssim_weight <= 1, "ssim_weight", "must lie in [0, 1]", self.ssim_weight)
        require(all(0 <= value <= 1 for value in self.background or ()), "background", "must lie in [0, 1], or be null", self.background)


@dataclass(frozen=True)
class Score:
    """How like the true ones rendered views are: ``psnr`` (dB) and ``ssim`` ``[n]`` of each, and their means."""

    psnrs: Tensor
    ssims: Tensor

    @property
    def psnr(self) -> float:
        """Mean over views, in dB; NaN of no views."""
        return float(self.psnrs.mean())

    @property
    def ssim(self) -> float:
        """Mean over views; NaN of no views."""
        return float(self.ssims.mean())


@dataclass(frozen=True)
class GaussianFitResult:
    """What a fit gives.

    Args:
        gaussians: The scene, on the CPU.
        psnr: Mean over the held-out views in dB; NaN when none were held out.
        ssim: The same of SSIM.
        psnr_start: What ``psnr`` was of the first Gaussians.
        ssim_start: The same of SSIM.
        held_out: Rows of the views that were held out.
        losses: Loss of every step.
    """

    gaussians: Gaussians
    psnr: float
    ssim: float
    psnr_start: float
    ssim_start: float
    held_out: tuple[int, ...]
    losses: tuple[float, ...]


def fit_gaussians(
    scene: PosedImages | Sequence[PosedImages],
    config: GaussianFitConfig | None = None,
    *,
    row: int = 0,
    device: torch.device | str = "cpu",
    progress: Callable[[GaussianFit, float], object] | None = None,
    **changes: Any,
) -> GaussianFitResult:
    """Fit Gaussians to posed images and measure them on views that were held out.

    Args:
        scene: Posed images with ``image [V, 3, H, W]`` in 0..1, ``intrinsics [V, 3, 3]``, ``world_to_cam [V, 4, 4]`` and, if there is
            any, ``depth [V, H, W]`` or ``points``; or a data set of such scenes.
        config: How to fit; None takes the defaults.
        row: Which scene of a data set.
        device: Where to compute.
        progress: Called after every step with the fit and the step's loss.
        **changes: Fields of the configuration to change, for example ``steps=500``.

    Raises:
        DataError: the images cannot be fitted: too few, without poses, of shapes that do not fit, not finite.
        ConfigError: a setting is not known or out of its range.

    Example:
        >>> scene = SCENES.config("rooms").build("train")[0]
        >>> result = geossl.fit_gaussians(scene, steps=500)
        >>> geossl.data.write_gaussians("room.ply", result.gaussians)
    """
    config = config or GaussianFitConfig()
    unknown = sorted(set(changes) - set(config.__dataclass_fields__))
    if unknown:
        raise ConfigError(f"fit_gaussians: unknown settings {', '.join(unknown)}; known are {', '.join(config.__dataclass_fields__)}")
    if not hasattr(scene, "image") and hasattr(scene, "__getitem__"):
        if not 0 <= row < len(scene):
            raise DataError(f"fit_gaussians: row {row} is outside 0..{len(scene) - 1} of the data set")
        scene = scene[row]
    fit = GaussianFit(scene, replace(config, **changes), device)  # type: ignore[arg-type]
    before, losses = fit.score(), []
    while fit.step < fit.config.steps:
        losses.append(fit.train_step())
        if progress is not None:
            progress(fit, losses[-1])
    after = fit.score()
    return GaussianFitResult(
        fit.gaussians.to("cpu"), after.psnr, after.ssim, before.psnr, before.ssim, tuple(fit.held_out.tolist()), tuple(losses)
    )


class GaussianFit:
    """A fit in progress: :meth:`train_step` until ``step`` is ``config.steps``.

    Args:
        scene: Posed images.
        config: How to fit.
        device: Where to compute.

    Attributes:
        step: Steps done.
        held_out: Rows of the views that are not learned from.
        background: Colour behind everything, ``[3]``.

    Raises:
        DataError: the images cannot be fitted; nothing has been computed then.
    """

    def __init__(self, scene: PosedImages, config: GaussianFitConfig, device: torch.device | str = "cpu") -> None:
        self.config, self.step = config, 0
        views = check_views(scene, held_out=config.test_every > 0)
        train, self.held_out = split_views(len(views), config.test_every)
        self.views = views
        points, colors, sure = self._start(scene, views[train])
        opacity = config.start.opacity or (0.5 if sure else 0.1)
        first = first_gaussians(points, colors, opacity, config.start.size, config.sh_degree)
        self.radius = radius(views[train], first.means)
        self._images, self._cameras = views.image.to(device), views.cameras.to(device)
        mean = torch.from_numpy(views.image[train].numpy().mean((0, 1, 2), dtype=np.float64)).float()  # torch's depends on the threads
        self.background = (mean if config.background is None else torch.tensor(config.background)).to(device)
        self._train = train
        self._most = config.density.max_count or max(1000, len(train) * views.cameras.width * views.cameras.height // 4)
        rates = config.rates
        self._rates = {
            "means": rates.means * self.radius, "quats": rates.quats, "scales": rates.scales, "opacities": rates.opacities,
            "sh0": rates.colors, "sh_rest": rates.colors / 20,
        }  # fmt: skip
        self.rows = GaussianRows(to_parameters(first.to(device)), self._rates)

    def _start(self, scene: PosedImages, views: Views) -> tuple[Tensor, Tensor, bool]:
        """Return points and colours to begin with, and whether they are on surfaces. Only views that are learned from are looked at."""
        source, count = self.config.start.source, self.config.start.count
        if source == "depth" and views.depth is None:
            raise DataError(f"{views.source}: start.source is 'depth', but no pixel of the views has any; take 'auto' or 'random'")
        if source == "points" and getattr(scene, "points", None) is None:
            raise DataError(f"{views.source}: start.source is 'points', but the scene has none; take 'auto' or 'random'")
        if source == "depth" or (source == "auto" and views.depth is not None and bool((views.depth > 0).any())):
            return *start_from_depth(views, count), True
        if source == "points" or (source == "auto" and getattr(scene, "points", None) is not None):
            return *start_from_points(scene, views, count), True
        return *start_at_random(views, count, _generator(self.config.seed, 0)), False

    @property
    def gaussians(self) -> Gaussians:
        """A copy of the scene as it is now, with activations applied; not differentiable."""
        return to_gaussians({name: value.detach().clone() for name, value in self.rows.values.items()})

    @property
    def sh_degree(self) -> int:
        """Degree of the spherical harmonics that is used now."""
        return min(self.config.sh_degree, self.step // self.config.sh_every)

    def next_views(self) -> Tensor:
        """Return the rows of the views of the next step; every view comes once before any comes again."""
        count, batch = len(self._train), self.config.views_per_step
        places = range(self.step * batch, (self.step + 1) * batch)
        orders = {epoch: torch.randperm(count, generator=_generator(self.config.seed, 1, epoch)) for epoch in {p // count for p in places}}
        return self._train[torch.stack([orders[place // count][place % count] for place in places])]

    def _rasterize(self, gaussians: Gaussians, rows: Tensor, sh_degree: int, absgrad: bool) -> tuple[Tensor, dict[str, Any]]:
        cameras = self._cameras[rows.to(self._images.device)]
        image, _, meta = rasterize_gaussians(
            gaussians.means, gaussians.quats, gaussians.scales, gaussians.opacities, gaussians.sh, cameras.world_to_cam,
            cameras.intrinsics, cameras.width, cameras.height, sh_degree=sh_degree, absgrad=absgrad,
            backgrounds=self.background.expand(len(rows), 3), rasterize_mode="antialiased" if self.config.antialiased else "classic",
        )  # fmt: skip
        return image, meta

    def train_step(self) -> float:
        """Do one step and return its loss.

        Raises:
            DataError: the loss is not finite.
        """
        config, rows = self.config, self.next_views()
        density = config.density
        gathering = density.active(self.step + 1, config.steps)
        image, meta = self._rasterize(to_gaussians(self.rows.values), rows, self.sh_degree, gathering and density.absgrad)
        if gathering:
            meta["means2d"].retain_grad()
        target = self._images[rows.to(self._images.device)]
        loss = (1 - config.ssim_weight) * l1(image, target).mean()
        if config.ssim_weight:
            loss = loss + config.ssim_weight * (1 - ssim(image, target, padding="same").mean())
        value = float(loss.detach())
        if not math.isfinite(value):
            raise DataError(f"{self.views.source}: the loss of step {self.step + 1} is not finite; lower the learning rates (rates)")
        loss.backward()
        decayed = math.log(config.rates.means_final / config.rates.means) * self.step / config.steps
        self.rows.adam_step({**self._rates, "means": self._rates["means"] * math.exp(decayed)})
        self.step += 1
        if gathering:
            self.rows.gather(meta, density.absgrad)
            densify(self.rows, density, self.step, config.steps, self.radius, self._most, _generator(config.seed, 2, self.step))
        return value

    def render(self, rows: Sequence[int] | Tensor) -> Tensor:
        """Return the images ``[n, H, W, 3]`` of the views ``rows`` as the Gaussians show them now, in 0..1."""
        rows = torch.as_tensor(rows, dtype=torch.int64)
        gaussians, degree = self.gaussians, self.sh_degree
        with torch.no_grad():
            images = [self._rasterize(gaussians, rows[i : i + 1], degree, False)[0] for i in range(len(rows))]
        return torch.cat(images).clamp(0, 1) if images else self._images[:0]

    def score(self, rows: Sequence[int] | Tensor | None = None) -> Score:
        """Measure views: those held out, or ``rows``."""
        rows = self.held_out if rows is None else torch.as_tensor(rows, dtype=torch.int64)
        image, target = self.render(rows), self._images[rows.to(self._images.device)]
        if not len(rows):
            return Score(torch.empty(0), torch.empty(0))
        small = min(image.shape[1:3]) < WINDOW
        return Score(psnr(image, target).cpu(), ssim(image, target, padding="same" if small else "valid").cpu())

    def state_dict(self) -> dict[str, Tensor]:
        """Return all that a fit of the same scene and configuration needs to go on: flat, tensors only."""
        return {**self.rows.state_dict(), "step": torch.tensor(self.step)}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on from a saved state.

        Raises:
            CheckpointError: it is not the state of such a fit.
        """
        if "step" not in state or int(state["step"]) > self.config.steps:
            raise CheckpointError(f"fit_gaussians: the saved state is of step {state.get('step')}, this fit ends at {self.config.steps}")
        self.rows.load_state_dict({name: value for name, value in state.items() if name != "step"})
        self.step = int(state["step"])


def to_parameters(gaussians: Gaussians) -> dict[str, Tensor]:
    """Return what is optimised: logarithms of scales, logits of opacities, the harmonics of degree 0 and the others."""
    return {
        "means": gaussians.means, "quats": gaussians.quats, "scales": gaussians.scales.log(), "opacities": gaussians.opacities.logit(),
        "sh0": gaussians.sh[:, :1], "sh_rest": gaussians.sh[:, 1:],
    }  # fmt: skip


def to_gaussians(values: Mapping[str, Tensor]) -> Gaussians:
    """Return the Gaussians of optimised values. Differentiable."""
    sh = torch.cat([values["sh0"], values["sh_rest"]], 1)
    return Gaussians(values["means"], values["quats"], values["scales"].exp(), values["opacities"].sigmoid(), sh)


def _generator(*numbers: int) -> torch.Generator:
    """Return a generator for a seed, a purpose and a step: a fit that goes on after a stop draws what it would have drawn."""
    mixed = 0
    for number in numbers:
        mixed = (mixed * 6364136223846793005 + number + 1442695040888963407) % 2**63
    return torch.Generator().manual_seed(mixed)
