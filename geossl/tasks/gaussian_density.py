"""Adding Gaussians where the image asks for more detail and removing those that show nothing, the optimiser's state with them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from geossl.config import require
from geossl.errors import CheckpointError
from geossl.geometry import quaternion_to_matrix, rotate

_SHRINK = 1.6  # a Gaussian that is split becomes two of its size divided by this (Kerbl et al. 2023)
_ADAM = {"betas": (0.9, 0.999), "eps": 1e-15}


@dataclass(frozen=True, kw_only=True)
class DensityConfig:
    """Where Gaussians are added (cloned and split) and removed, after Kerbl et al. 2023."""

    every: int = 100
    """Steps between two times that Gaussians are added and removed; 0 keeps the first ones throughout."""
    begin: float = 0.05
    """When that begins, as a part of all steps."""
    end: float = 0.5
    """When that ends, as a part of all steps."""
    gradient: float = 2e-4
    """A Gaussian is cloned or split when the mean gradient of its place in the image exceeds this (the image being 2 wide and high).
    With absgrad, 8e-4 is usual."""
    absgrad: bool = False
    """Take the sum of absolute gradients of the pixels, which does not cancel where a large Gaussian covers fine texture."""
    split_size: float = 0.01
    """Gaussians with a larger standard deviation, in radii of the scene, are split; smaller ones are cloned."""
    max_count: int | None = None
    """No Gaussians are added beyond this number; those with the largest gradients come first. Null is a quarter of the number of pixels
    that are learned from: more learn the images by heart."""
    min_opacity: float = 0.005
    """Fainter Gaussians are removed."""
    max_size: float = 0.5
    """Gaussians with a larger standard deviation, in radii of the scene, are removed."""
    reset_every: int = 3000
    """Steps between two times that all opacities are lowered to twice min_opacity, so that what is not needed fades; 0 never does."""

    def __post_init__(self) -> None:
        require(self.every >= 0, "every", "must not be negative", self.every)
        require(0 <= self.begin <= 1, "begin", "must lie in [0, 1], a part of all steps", self.begin)
        require(self.begin <= self.end <= 1, "end", "must lie in [begin, 1], a part of all steps", self.end)
        require(self.gradient > 0, "gradient", "must be positive", self.gradient)
        require(self.split_size > 0, "split_size", "must be positive", self.split_size)
        require(self.max_count is None or self.max_count >= 1, "max_count", "must be at least 1, or null", self.max_count)
        require(0 <= self.min_opacity < 0.5, "min_opacity", "must lie in [0, 0.5)", self.min_opacity)
        require(self.max_size > 0, "max_size", "must be positive", self.max_size)
        require(self.reset_every >= 0, "reset_every", "must not be negative", self.reset_every)

    def active(self, step: int, steps: int) -> bool:
        """Whether what densification looks at is gathered in step number ``step`` (from 1) of ``steps``."""
        return self.every > 0 and step <= self.end * steps


class GaussianRows:
    """Parameters of Gaussians, Adam's moments and the image gradients gathered, a row each; rows come and go together.

    Args:
        values: What is optimised, ``[N, ...]`` each.
        rates: Learning rate of each.

    Attributes:
        values: The parameters by name.
        gradient: Sum of the gradients of the places in the image, ``[N]``.
        seen: In how many images each was seen, ``[N]``.
    """

    def __init__(self, values: Mapping[str, Tensor], rates: Mapping[str, float]) -> None:
        self.values = {name: nn.Parameter(value.detach().clone()) for name, value in values.items()}
        groups = [{"params": [self.values[name]], "lr": rates[name], "name": name} for name in values]
        self._adam = torch.optim.Adam(groups, fused=True, **_ADAM)  # type: ignore[arg-type]
        for value in self.values.values():
            moments = {"exp_avg": torch.zeros_like(value), "exp_avg_sq": torch.zeros_like(value)}
            self._adam.state[value] = {"step": torch.zeros((), device=value.device), **moments}
        self._clear()

    def __len__(self) -> int:
        """Number of Gaussians."""
        return len(self.values["means"])

    def _clear(self) -> None:
        self.gradient, self.seen = (self.values["means"].new_zeros(len(self)) for _ in range(2))

    def adam_step(self, rates: Mapping[str, float]) -> None:
        """Do one step of Adam at these learning rates with the gradients that are there, and forget them."""
        for group in self._adam.param_groups:
            group["lr"] = rates[group["name"]]
        self._adam.step()
        self._adam.zero_grad(set_to_none=True)

    @torch.no_grad()
    def gather(self, meta: Mapping[str, Any], absgrad: bool) -> None:
        """Add up the gradients of places in the images of one step, as for images that are 2 wide and high."""
        means2d, radii = meta["means2d"], meta["radii"]
        grad = means2d.absgrad if absgrad else means2d.grad
        # The loss is a mean over the cameras of the step; undo that, so that the threshold does not depend on their number.
        half = grad.new_tensor([meta["width"], meta["height"]]) / 2 * len(grad)
        visible = (radii > 0).all(-1)
        self.gradient += ((grad * half).norm(dim=-1) * visible).sum(0)
        self.seen += visible.sum(0)

    @torch.no_grad()
    def change(self, kept: Tensor, added: Mapping[str, Tensor] | None = None) -> None:
        """Keep the rows ``kept`` and put others behind them, whose moments begin at 0. What was gathered is forgotten."""
        for group in self._adam.param_groups:
            name, old = group["name"], group["params"][0]
            state = self._adam.state.pop(old)
            more = old[:0] if added is None else added[name]
            new = nn.Parameter(torch.cat([old.detach()[kept], more]))
            moments = {key: torch.cat([state[key][kept], torch.zeros_like(more)]) for key in ("exp_avg", "exp_avg_sq")}
            self._adam.state[new] = {"step": state["step"], **moments}
            self.values[name] = new
            group["params"] = [new]
        self._clear()

    @torch.no_grad()
    def cap_opacities(self, most: float) -> None:
        """Lower opacities to at most ``most`` and forget their moments."""
        logits = self.values["opacities"]
        logits.clamp_(max=math.log(most / (1 - most)))
        for key in ("exp_avg", "exp_avg_sq"):
            self._adam.state[logits][key].zero_()

    def state_dict(self) -> dict[str, Tensor]:
        """Return everything as flat tensors."""
        state = {name: value.detach() for name, value in self.values.items()}
        for name, value in self.values.items():
            state |= {f"{name}.{key}": self._adam.state[value][key] for key in ("exp_avg", "exp_avg_sq", "step")}
        return {**state, "gradient": self.gradient, "seen": self.seen}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take the state of other rows with the same parameters.

        Raises:
            CheckpointError: names or shapes do not fit.
        """
        own = self.state_dict()
        wrong = sorted(set(own) ^ set(state)) or [name for name in own if own[name].shape[1:] != state[name].shape[1:]]
        if wrong:
            raise CheckpointError(f"the saved Gaussians are those of another configuration; {', '.join(wrong[:6])} do not fit")
        like = self.values["means"]
        for group in self._adam.param_groups:
            name = group["name"]
            self._adam.state.pop(self.values[name])
            new = nn.Parameter(state[name].to(like, copy=True))
            self._adam.state[new] = {key: state[f"{name}.{key}"].to(like, copy=True) for key in ("exp_avg", "exp_avg_sq", "step")}
            self.values[name], group["params"] = new, [new]
        self.gradient, self.seen = (state[name].to(like, copy=True) for name in ("gradient", "seen"))


@torch.no_grad()
def densify(rows: GaussianRows, config: DensityConfig, step: int, steps: int, radius: float, most: int, generator: torch.Generator) -> None:
    """Add and remove Gaussians after step number ``step``, if it is time.

    Args:
        rows: The Gaussians; changed.
        config: When and which.
        step: Steps done.
        steps: Steps of the whole fit.
        radius: Size of the scene.
        most: Number of Gaussians beyond which none are added.
        generator: What splitting draws from.
    """
    if step % config.every == 0 and step >= config.begin * steps:
        size, opacity = rows.values["scales"].exp().amax(1), rows.values["opacities"].sigmoid()
        drop = (opacity < config.min_opacity) | (size > config.max_size * radius)
        if bool(drop.all()):  # a fit that has gone wrong; without Gaussians it could not even say so
            drop = torch.zeros_like(drop)
        wanted = (rows.gradient / rows.seen.clamp(min=1) > config.gradient) & ~drop
        room = max(0, most - int((~drop).sum()))
        if int(wanted.sum()) > room:
            mean = torch.where(wanted, rows.gradient / rows.seen.clamp(min=1), -1.0)
            wanted = torch.zeros_like(wanted).index_fill(0, mean.argsort(descending=True, stable=True)[:room], True)
        large = wanted & (size > config.split_size * radius)
        rows.change(~drop & ~large, _children(rows, wanted & ~large, large, generator))
    if config.reset_every and step % config.reset_every == 0 and step < config.end * steps and config.min_opacity > 0:
        rows.cap_opacities(2 * config.min_opacity)


def _children(rows: GaussianRows, clone: Tensor, split: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
    """Return copies of the Gaussians ``clone``, and two smaller ones drawn from each of ``split``."""
    children = {name: torch.cat([value[clone], value[split], value[split]]) for name, value in rows.values.items()}
    count = int(split.sum())
    if count:
        scales, quats = rows.values["scales"][split].exp(), rows.values["quats"][split]
        offset = torch.randn(2, count, 3, generator=generator).to(scales) * scales
        moved = rotate(offset.unsqueeze(-2), quaternion_to_matrix(quats).expand(2, count, 3, 3)).squeeze(-2)
        children["means"][-2 * count :] += moved.flatten(0, 1)
        children["scales"][-2 * count :] -= math.log(_SHRINK)
    return children
