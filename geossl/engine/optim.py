"""AdamW, its parameter groups, and the learning rate as a function of the step."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from geossl.config import require
from geossl.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW with warm-up and a cosine."""

    lr: float = 1e-3
    """Peak learning rate, used as it is: not scaled with the batch size."""
    weight_decay: float = 0.05
    """Decoupled weight decay of weight matrices; vectors, biases and what the method names are not decayed."""
    decay_all: bool = False
    """Decay all parameters alike, as PoLAr-MAE was trained."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of AdamW's first and second moment."""
    eps: float = 1e-8
    """Added to the square root of the second moment."""
    clip: float | None = None
    """Largest gradient norm; null does not clip."""
    schedule: Literal["cosine", "constant", "cosine_epochs"] = "cosine"
    """`cosine`: warm-up, then half a cosine to min_lr, per step. `constant`: warm-up only. `cosine_epochs`: the published Point-MAE
    form, changed once per epoch, the first two epochs at warmup_lr, the cosine counted from the start of the warm-up."""
    warmup: int = 0
    """Length of the warm-up, in steps (`cosine_epochs`: in epochs)."""
    warmup_lr: float = 1e-6
    """Learning rate at the start of the warm-up."""
    min_lr: float = 1e-6
    """Learning rate at the end of the cosine."""
    cycle: int | None = None
    """Steps (`cosine_epochs`: epochs) at which the cosine ends; null is the length of the training."""
    layer_decay: float = 1.0
    """Factor on the learning rate from one layer group to the one before it; 1 treats all layers alike."""

    def __post_init__(self) -> None:
        require(self.lr > 0, "lr", "must be > 0", self.lr)
        require(self.weight_decay >= 0, "weight_decay", "must not be negative", self.weight_decay)
        require(all(0 <= beta < 1 for beta in self.betas), "betas", "must lie in [0, 1)", self.betas)
        require(self.eps > 0, "eps", "must be > 0", self.eps)
        require(self.clip is None or self.clip > 0, "clip", "must be > 0, or null for none", self.clip)
        require(self.warmup >= 0, "warmup", "must not be negative", self.warmup)
        require(self.warmup_lr >= 0, "warmup_lr", "must not be negative", self.warmup_lr)
        require(self.min_lr >= 0, "min_lr", "must not be negative", self.min_lr)
        require(self.cycle is None or self.cycle > 0, "cycle", "must be > 0, or null for the whole training", self.cycle)
        require(0 < self.layer_decay <= 1, "layer_decay", "must lie in (0, 1]", self.layer_decay)


def learning_rate(config: OptimConfig, step: int, total: int, steps_per_epoch: int) -> float:
    """Learning rate of ``step`` (counted from 0) in a training of ``total`` steps."""
    if config.schedule == "cosine_epochs":
        position = max(step // steps_per_epoch - 1, 0)
        start, end = 0, config.cycle or math.ceil(total / steps_per_epoch)
    else:
        position, start, end = step, config.warmup, config.cycle or total
    if position < config.warmup:
        return config.warmup_lr + (config.lr - config.warmup_lr) * position / config.warmup
    if config.schedule == "constant":
        return config.lr
    progress = min((position - start) / max(end - start, 1), 1.0)
    return config.min_lr + 0.5 * (config.lr - config.min_lr) * (1 + math.cos(math.pi * progress))


def build_optimizer(module: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """Make AdamW over the trainable parameters of ``module``, grouped by weight decay and layer.

    Not decayed (unless ``decay_all``): parameters with fewer than two dimensions, biases, and the names in
    ``module.no_weight_decay()``. With ``layer_decay``, ``module.layer_groups()`` gives prefixes of parameter names from input to
    output; each group carries its factor on the learning rate as ``lr_scale``.

    Raises:
        ConfigError: nothing to train, or layer decay with a module that has no ``layer_groups``.
        ValueError: ``no_weight_decay()`` names something that is no parameter.
    """
    trainable = {name: value for name, value in module.named_parameters() if value.requires_grad}
    if not trainable:
        raise ConfigError(f"{type(module).__name__} has no parameters to train")
    excluded = set(getattr(module, "no_weight_decay", set)())
    unknown = excluded - {name for name, _ in module.named_parameters()}
    if unknown:
        raise ValueError(f"{type(module).__name__}.no_weight_decay() names {sorted(unknown)}, which are no parameters of it")
    scales = _layer_scales(module, trainable, config.layer_decay)
    groups: dict[tuple[bool, float], list[nn.Parameter]] = {}
    for name, value in trainable.items():
        decayed = config.decay_all or (value.ndim > 1 and not name.endswith("bias") and name not in excluded)
        groups.setdefault((decayed, scales[name]), []).append(value)
    options: list[dict[str, Any]] = [
        {"params": values, "lr_scale": scale, "weight_decay": config.weight_decay if decayed else 0.0}
        for (decayed, scale), values in groups.items()
    ]
    return torch.optim.AdamW(options, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)


def _layer_scales(module: nn.Module, names: Iterable[str], decay: float) -> dict[str, float]:
    """Factor on the learning rate of each parameter; 1 for the last group and for parameters in no group."""
    if decay == 1.0:
        return dict.fromkeys(names, 1.0)
    layer_groups = getattr(module, "layer_groups", None)
    if layer_groups is None:
        raise ConfigError(f"optim.layer_decay: {type(module).__name__} does not tell its layers (no layer_groups()); leave it at 1")
    groups: Sequence[Sequence[str]] = layer_groups()
    scales = {}
    for name in names:
        depth = next((i for i, prefixes in enumerate(groups) if name.startswith(tuple(prefixes))), len(groups) - 1)
        scales[name] = decay ** (len(groups) - 1 - depth)
    return scales


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of every group, times the group's ``lr_scale``."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]
