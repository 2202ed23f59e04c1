"""The loss of a linear layer against gathered rows equals its plain form: values, gradients, any split into chunks."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from geossl.layers import gathered_regression, gathered_regression_loss


def plain(head, tokens, table, index):
    return F.mse_loss(head(tokens), table[index].flatten(1))


def case(tokens=7, dtype=torch.float64):
    torch.manual_seed(0)
    head = nn.Linear(5, 3 * 4).to(dtype)
    return head, torch.randn(tokens, 5, dtype=dtype, requires_grad=True), torch.randn(6, 4, dtype=dtype), torch.randint(6, (tokens, 3))


@pytest.mark.parametrize("rows", [1, 3, 1024])
def test_equals_the_plain_form(rows, monkeypatch):
    monkeypatch.setattr(gathered_regression, "_ROWS", rows)
    head, tokens, table, index = case()
    inputs = (tokens, head.weight, head.bias)
    ours, theirs = gathered_regression_loss(head, tokens, table, index), plain(head, tokens, table, index)
    torch.testing.assert_close(ours, theirs)
    for a, b in zip(torch.autograd.grad(3 * ours, inputs), torch.autograd.grad(3 * theirs, inputs), strict=True):
        torch.testing.assert_close(a, b)


def test_gradients():
    head, tokens, table, index = case()
    assert torch.autograd.gradcheck(lambda x: gathered_regression_loss(head, x, table, index), tokens)


def test_without_gradients_none_are_made(monkeypatch):
    head, tokens, table, index = case()
    with torch.no_grad():
        loss = gathered_regression_loss(head, tokens, table, index)
    torch.testing.assert_close(loss, plain(head, tokens, table, index).detach())
    assert not loss.requires_grad


def test_no_tokens_give_zero():
    head, tokens, table, index = case(tokens=0)
    loss = gathered_regression_loss(head, tokens, table, index)
    loss.backward()
    assert float(loss) == 0
    assert not head.weight.grad.any()


@pytest.mark.parametrize("size", [0.01, 100.0])
def test_gradients_survive_half_precision(size):
    """With as many numbers as there are in a batch, each has less of a mean than half precision can hold."""
    torch.manual_seed(0)
    head, tokens = nn.Linear(16, 2 * 1024), torch.randn(3000, 16).abs().requires_grad_()
    table, index = size * (2 + torch.randn(50, 1024)), torch.randint(50, (3000, 2))
    with torch.no_grad():
        head.weight.zero_()
        head.bias.zero_()
    inputs = (tokens, head.weight, head.bias)
    head.weight.data[:, 0] = 0.1  # some way back to the tokens
    exact = torch.autograd.grad(gathered_regression_loss(head, tokens, table, index), inputs)
    with torch.autocast("cpu", torch.float16):
        loss = gathered_regression_loss(head, tokens, table, index)
    for a, b in zip(torch.autograd.grad(loss * 2.0**16, inputs), exact, strict=True):
        torch.testing.assert_close(a / 2.0**16, b, rtol=0.02, atol=0.01 * float(b.abs().max()))


def test_a_head_of_other_channels_is_refused():
    head, tokens, table, index = case()
    with pytest.raises(ValueError, match="the head predicts 12 channels, but 3 slots of 3 make 9"):
        gathered_regression_loss(head, tokens, table[:, :3], index)


def test_autocast_takes_its_type_for_the_products():
    head, tokens, table, index = case(40, torch.float32)
    exact = gathered_regression_loss(head, tokens, table, index)
    (gradient,) = torch.autograd.grad(exact, head.weight)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = gathered_regression_loss(head, tokens, table, index)
    assert rounded.dtype == torch.float32
    (near,) = torch.autograd.grad(rounded, head.weight)
    assert near.dtype == torch.float32
    assert not torch.equal(exact, rounded)
    torch.testing.assert_close(rounded, exact, rtol=0.02, atol=0)
    assert float(F.cosine_similarity(near.flatten(), gradient.flatten(), 0)) > 0.999
