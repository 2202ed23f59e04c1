from __future__ import annotations

import torch
from torch import nn

from geossl.engine.ema import EMA


def test_average_follows_its_formula() -> None:
    module = nn.Linear(1, 1, bias=False)
    nn.init.constant_(module.weight, 0.0)
    ema = EMA(module, 0.5)
    expected = 0.0
    for step in range(1, 20):
        nn.init.constant_(module.weight, float(step))
        ema.update(step)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * step
    with ema.applied():
        assert abs(module.weight.item() - expected) < 1e-5
    assert module.weight.item() == 19.0


def test_buffers_are_copied_and_weights_come_back() -> None:
    module = nn.BatchNorm1d(2)
    ema = EMA(module, 0.9)
    module(torch.randn(8, 2))
    ema.update(1)
    own = {name: value.clone() for name, value in module.state_dict().items()}
    with ema.applied():
        assert torch.equal(module.running_mean, own["running_mean"])
        assert int(module.num_batches_tracked) == 1
        module.weight.data.zero_()  # whatever is done to the average stays with it
    assert all(torch.equal(value, own[name]) for name, value in module.state_dict().items())
    with ema.applied():
        assert not module.weight.any()


def test_reset() -> None:
    module = nn.Linear(2, 2)
    ema = EMA(module, 0.999)
    nn.init.constant_(module.weight, 3.0)
    ema.reset()
    with ema.applied():
        assert torch.equal(module.weight, torch.full((2, 2), 3.0))
