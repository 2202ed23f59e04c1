"""Packed attention equals attention of each sample alone, whatever the lengths."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from geossl.layers import Attention, Block, BlockStack, Segments, scaled_dot_product
from geossl.layers.sampling import BatchRandom


@settings(max_examples=20, deadline=None)
@given(lengths=st.lists(st.integers(0, 5), min_size=1, max_size=5))
def test_packed_attention_equals_each_sample_alone(lengths):
    torch.manual_seed(0)
    layer = Attention(8, 2).double()
    x = torch.randn(sum(lengths), 8, dtype=torch.float64)
    packed = layer(x, Segments(tuple(lengths)))
    alone = [layer(part, Segments((len(part),))) for part in x.split(lengths)]
    torch.testing.assert_close(packed, torch.cat(alone), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("lengths", [(4, 4, 4), (2, 5, 1)])
def test_rows_compute_what_all_rows_compute(lengths):
    torch.manual_seed(0)
    block, segments = Block(8, 2).double(), Segments(lengths)
    x = torch.randn(sum(lengths), 8, dtype=torch.float64)
    keep = torch.rand(sum(lengths)) < 0.5
    counts = Segments(tuple(int(part.sum()) for part in keep.split(list(lengths))))
    some = block(x, segments, rows=keep.nonzero()[:, 0], row_segments=counts)
    torch.testing.assert_close(some, block(x, segments)[keep], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("length", [7, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_form_of_attention_agrees(length, dtype):
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 2, length, 8).to(dtype)
    expected = F.scaled_dot_product_attention(q.double(), k.double(), v.double())
    torch.testing.assert_close(scaled_dot_product(q, k, v).double(), expected, rtol=0, atol=2e-6 if dtype == torch.float32 else 3e-2)


def test_heads_must_divide_channels():
    with pytest.raises(ValueError, match="dim must be a multiple of heads, got dim=10, heads=4"):
        Attention(10, 4)


def test_drop_path_drops_whole_samples_and_keeps_the_mean():
    torch.manual_seed(0)
    stack = BlockStack(8, 2, 2, drop_path=0.5).train()
    segments, x = Segments((3,) * 400), torch.randn(3, 8).repeat(400, 1)
    out = stack(x, torch.zeros_like(x), segments, random=BatchRandom(400, torch.Generator().manual_seed(0)))
    per_sample = out.view(400, 3, 8)
    distinct = {tuple(sample.flatten().tolist()) for sample in per_sample.detach().round(decimals=4)}
    assert len(distinct) == 4  # attention and MLP of the second block, each kept or dropped for all tokens of a sample
    assert stack._draw_drop_path(segments, None, x.device)[0] is None  # the first block never drops


def test_draws_do_not_depend_on_how_the_batch_was_split():
    whole = BatchRandom(6, torch.Generator().manual_seed(3)).rand(4)
    half = BatchRandom(3, torch.Generator().manual_seed(3), slot=torch.tensor([1, 3, 5]), global_size=6).rand(4)
    assert torch.equal(half, whole[1::2])


def test_gradient_checkpointing_changes_nothing():
    torch.manual_seed(0)
    stack, segments = BlockStack(8, 3, 2, drop_path=0.3).train(), Segments((4, 4))
    x = torch.randn(8, 8)
    grads = []
    for enabled in (False, True):
        stack.grad_checkpointing = enabled
        stack.zero_grad()
        stack(x, x, segments, random=BatchRandom(2, torch.Generator().manual_seed(1))).sum().backward()
        grads.append(stack.blocks[0].attn.qkv.weight.grad.clone())
    torch.testing.assert_close(*grads)
