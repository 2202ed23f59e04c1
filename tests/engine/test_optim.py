from __future__ import annotations

import itertools
import math
from types import ModuleType

import pytest
import torch
from torch import nn

from geossl.engine.optim import OptimConfig, build_optimizer, learning_rate, set_learning_rate
from geossl.errors import ConfigError


def names_of(module: nn.Module, optimizer: torch.optim.Optimizer, **wanted: float) -> set[str]:
    chosen = {id(p) for g in optimizer.param_groups if all(g[k] == pytest.approx(v) for k, v in wanted.items()) for p in g["params"]}
    return {name for name, value in module.named_parameters() if id(value) in chosen}


def test_only_matrices_the_module_does_not_exclude_are_decayed(standin: ModuleType) -> None:
    module = standin.Autoencoder()
    optimizer = build_optimizer(module, OptimConfig(weight_decay=0.3))
    assert names_of(module, optimizer, weight_decay=0.3) == {"blocks.0.weight", "blocks.1.weight", "head.weight"}
    assert names_of(module, optimizer, weight_decay=0.0) == {"token", "blocks.0.bias", "blocks.1.bias", "head.bias"}
    everything = build_optimizer(module, OptimConfig(weight_decay=0.3, decay_all=True))
    assert names_of(module, everything, weight_decay=0.3) == {name for name, _ in module.named_parameters()}


def test_frozen_parameters_are_left_out(standin: ModuleType) -> None:
    module = standin.Autoencoder()
    module.head.requires_grad_(False)
    optimizer = build_optimizer(module, OptimConfig())
    assert not {"head.weight", "head.bias"} & names_of(module, optimizer)
    module.requires_grad_(False)
    with pytest.raises(ConfigError, match="no parameters to train"):
        build_optimizer(module, OptimConfig())


def test_layer_decay_scales_the_rate_from_the_output_down(standin: ModuleType) -> None:
    module = standin.Autoencoder()
    optimizer = build_optimizer(module, OptimConfig(layer_decay=0.5))
    set_learning_rate(optimizer, 0.8)
    assert names_of(module, optimizer, lr=0.8) == {"head.weight", "head.bias"}
    assert names_of(module, optimizer, lr=0.4) == {"blocks.1.weight", "blocks.1.bias"}
    assert names_of(module, optimizer, lr=0.1) == {"token"}
    with pytest.raises(ConfigError, match=r"optim\.layer_decay: Linear"):
        build_optimizer(nn.Linear(2, 2), OptimConfig(layer_decay=0.5))


def test_a_name_that_is_no_parameter_is_refused(standin: ModuleType) -> None:
    module = standin.Autoencoder()
    module.no_weight_decay = lambda: {"token", "tokne"}
    with pytest.raises(ValueError, match="tokne"):
        build_optimizer(module, OptimConfig())


def test_cosine_per_step() -> None:
    config = OptimConfig(lr=1.0, warmup=10, warmup_lr=0.1, min_lr=0.2)
    rates = [learning_rate(config, step, 110, 7) for step in range(111)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[5] == pytest.approx(0.55)
    assert rates[10] == 1.0
    assert rates[60] == pytest.approx(0.6)  # half way down
    assert rates[110] == pytest.approx(0.2)
    assert all(a >= b for a, b in itertools.pairwise(rates[10:]))
    constant = OptimConfig(lr=1.0, warmup=10, schedule="constant")
    assert learning_rate(constant, 100, 110, 7) == 1.0
    short = OptimConfig(lr=1.0, min_lr=0.2, cycle=50)
    assert learning_rate(short, 80, 110, 7) == pytest.approx(0.2)


def test_cosine_epochs_is_the_published_schedule() -> None:
    """lr of epoch e is that of t = max(e - 1, 0); t < 10 is the warm-up, the cosine is counted from t = 0 and ends at t = 400."""
    config = OptimConfig(lr=1e-3, warmup=10, warmup_lr=1e-6, min_lr=1e-6, schedule="cosine_epochs", cycle=400)
    for epoch in range(301):
        t = max(epoch - 1, 0)
        expected = 1e-6 + t * (1e-3 - 1e-6) / 10 if t < 10 else 1e-6 + 0.5 * (1e-3 - 1e-6) * (1 + math.cos(math.pi * t / 400))
        for step in (5 * epoch, 5 * epoch + 4):
            assert learning_rate(config, step, 301 * 5, 5) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    "values",
    [{"lr": 0}, {"weight_decay": -1}, {"betas": (0.9, 1.0)}, {"clip": 0}, {"warmup": -1}, {"layer_decay": 0}, {"cycle": 0}, {"eps": 0}],
)
def test_ranges(values: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=f"^{next(iter(values))} must"):
        OptimConfig(**values)
