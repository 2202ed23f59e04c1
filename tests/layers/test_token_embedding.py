"""The fast training pass equals the plain definition, and runs only what is read."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from geossl.layers import PointTokenEmbedding


def both_forms(groups: int, size: int, columns: int, keep: list[int], seed: int, duplicates: bool = False):
    torch.manual_seed(seed)
    module = PointTokenEmbedding(12, columns, widths=(8, 10, 14)).double().train()
    for norm in (module.norm1, module.norm2):
        torch.nn.init.normal_(norm.weight, 1.0, 0.3)
        torch.nn.init.normal_(norm.bias)
    twin = copy.deepcopy(module)
    x = torch.randn(groups, size, columns, dtype=torch.float64)
    if duplicates:
        x[:, size // 2 :] = x[:, :1]
    x_fast, x_twin = (x.clone().requires_grad_() for _ in range(2))
    index = torch.tensor(keep)
    fast, plain = module(x_fast, index), twin.reference(x_twin)[index]
    weight = torch.randn_like(fast)
    (fast * weight).sum().backward()
    (plain * weight).sum().backward()
    return module, twin, x_fast, x_twin, fast, plain


@settings(max_examples=15, deadline=None)
@given(
    groups=st.integers(2, 9),
    size=st.integers(1, 6),
    columns=st.sampled_from([3, 6]),
    seed=st.integers(0, 99),
    duplicates=st.booleans(),
    data=st.data(),
)
def test_values_gradients_and_statistics_equal_the_definition(groups, size, columns, seed, duplicates, data):
    keep = sorted(data.draw(st.sets(st.integers(0, groups - 1), min_size=1)))
    module, twin, x_fast, x_twin, fast, plain = both_forms(groups, size, columns, keep, seed, duplicates)
    torch.testing.assert_close(fast, plain, rtol=1e-9, atol=1e-10)
    # Which of several equal points holds a maximum may differ by a last bit, so their gradients are compared summed.
    grads = [x.grad.sum(1) if duplicates else x.grad for x in (x_fast, x_twin)]
    torch.testing.assert_close(*grads, rtol=1e-7, atol=1e-8)
    for (name, a), (_, b) in zip(module.named_parameters(), twin.named_parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-7, atol=1e-8, msg=lambda text, name=name: f"{name}: {text}")
    for (name, a), (_, b) in zip(module.named_buffers(), twin.named_buffers(), strict=True):
        torch.testing.assert_close(a, b, msg=lambda text, name=name: f"{name}: {text}")


def test_chunks_do_not_change_the_result(monkeypatch):
    whole = both_forms(9, 4, 3, [0, 3, 8], seed=1)
    monkeypatch.setattr("geossl.layers.fast_token_embedding.ROWS_PER_CHUNK", 8)
    parts = both_forms(9, 4, 3, [0, 3, 8], seed=1)
    torch.testing.assert_close(parts[4], whole[4], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(parts[0].conv2.weight.grad, whole[0].conv2.weight.grad, rtol=1e-10, atol=1e-12)


def test_evaluation_uses_running_statistics_and_equals_the_definition():
    module = both_forms(9, 4, 3, [0, 3], seed=2)[0].eval()
    x = torch.randn(7, 4, 3, dtype=torch.float64)
    torch.testing.assert_close(module(x, torch.tensor([1, 6])), module.reference(x)[[1, 6]], rtol=1e-10, atol=1e-12)
    assert module(x[:0]).shape == (0, 12)


def test_bfloat16_autocast_stays_close_to_float32():
    torch.manual_seed(0)
    module = PointTokenEmbedding(24).train()
    x, keep = torch.randn(40, 16, 3), torch.arange(0, 40, 3)
    exact = module(x, keep)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = module(x, keep)
    assert rounded.dtype == torch.float32
    assert torch.nn.functional.cosine_similarity(rounded.flatten(), exact.flatten(), dim=0) > 0.999


@pytest.mark.parametrize("shift", [0.0, 1e3])
def test_statistics_survive_a_large_offset(shift):
    """Moments are taken about a shift, so a common offset of the inputs costs no digits beyond those of the input itself."""
    torch.manual_seed(0)
    module = PointTokenEmbedding(8, widths=(8, 8, 8)).train()
    twin = copy.deepcopy(module).double()
    x = torch.randn(64, 8, 3) + shift
    torch.testing.assert_close(module(x).double(), twin.reference(x.double()), rtol=2e-3, atol=2e-3)
