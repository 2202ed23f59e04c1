"""Token propagation is its plain definition, sample by sample, in value and gradient."""

from __future__ import annotations

import pytest
import torch

from geossl.layers import Segments, TokenPropagation


def make(dim: int = 5, coarse: int = 7, units: int = 2) -> TokenPropagation:
    torch.manual_seed(0)
    return TokenPropagation(dim, coarse, units).double().eval()


def test_it_equals_its_definition_in_ragged_samples():
    """Also where a sample has one or two coarse tokens, and where nothing is known at fine positions."""
    module, fine, coarse = make(), Segments((9, 4, 3)), Segments((4, 1, 2))
    centers, coarse_centers = torch.randn(16, 3).double(), torch.randn(7, 3).double()
    tokens, grid = torch.randn(7, 7).double().requires_grad_(), torch.randn(16, 5).double()
    rows = torch.tensor([1, 2, 7, 13])
    known = grid[rows].requires_grad_()
    out = module(centers, fine, known, rows, tokens, coarse_centers, coarse)
    full = torch.zeros_like(grid).index_copy(0, rows, known)
    parts = [x.split(list(s.lengths)) for x, s in ((centers, fine), (full, fine), (tokens, coarse), (coarse_centers, coarse))]
    expected = torch.cat([module.reference(*sample) for sample in zip(*parts, strict=True)])
    torch.testing.assert_close(out, expected)
    inputs = (known, tokens, *module.parameters())
    weight = torch.randn_like(out)
    for ours, plain in zip(*(torch.autograd.grad((x * weight).sum(), inputs) for x in (out, expected)), strict=True):
        torch.testing.assert_close(ours, plain)


def test_a_fine_position_that_is_a_coarse_one_takes_its_feature():
    module, centers = make(units=1), torch.tensor([[0.0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]]).double()
    tokens, none = torch.randn(4, 7).double(), torch.zeros(0, dtype=torch.int64)
    out = module(centers, Segments((4,)), torch.zeros(0, 5).double(), none, tokens, centers, Segments((4,)))
    own = module.units(torch.nn.functional.gelu(module.fuse_norm(module.fuse(torch.cat([torch.zeros(4, 5).double(), tokens], 1)))))
    torch.testing.assert_close(out, own, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("training", [False, True])
def test_gradients_are_those_of_finite_differences(training):
    module = make(2, 3, 1).train(training)
    centers, coarse_centers = torch.randn(5, 3).double(), torch.randn(3, 3).double()
    known, tokens = (torch.randn(*shape).double().requires_grad_() for shape in ((2, 2), (3, 3)))

    def run(known, tokens):
        return module(centers, Segments((5,)), known, torch.tensor([0, 3]), tokens, coarse_centers, Segments((3,)))

    assert torch.autograd.gradcheck(run, (known, tokens))
