"""Packed attention equals attention of each sample alone, whatever the lengths."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from geossl.errors import UnknownNameError
from geossl.layers import Attention, BatchwideNorm, Block, BlockStack, CrossAttention, CrossBlock, Segments, scaled_dot_product
from geossl.layers.attention import packed_attention, padded_attention
from geossl.layers.block import Kept
from geossl.layers.sampling import BatchRandom
from geossl.ops import rope_2d_table


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


@settings(max_examples=20, deadline=None)
@given(sizes=st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=5))
def test_padded_and_packed_attention_agree(sizes):
    """The forms of a GPU and of the CPU, for any numbers of queries and keys, none included: values and gradients."""
    torch.manual_seed(0)
    asked, seen = (Segments(tuple(column)) for column in zip(*sizes, strict=True))
    inputs = [torch.randn(sum(s.lengths), 2, 4, dtype=torch.float64, requires_grad=True) for s in (asked, seen, seen)]
    outputs = [form(*inputs, asked, seen) for form in (packed_attention, padded_attention)]
    torch.testing.assert_close(*outputs, rtol=1e-10, atol=1e-12)
    weight = torch.randn_like(outputs[0])
    grads = [torch.autograd.grad((out * weight).sum() + 0 * sum(x.sum() for x in inputs), inputs) for out in outputs]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_attention_dropout_keeps_the_mean_and_rests_in_evaluation():
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 400, 2, 6, 8).unbind(0)
    exact = scaled_dot_product(q, k, v)
    dropped = torch.stack([scaled_dot_product(q, k, v, dropout=0.3) for _ in range(40)])
    assert float((dropped.mean(0) - exact).abs().mean()) < 0.1 * float(exact.abs().mean()) + 0.05
    assert not torch.equal(dropped[0], dropped[1])
    layer, x, segments = Attention(8, 2, dropout=0.5), torch.randn(7, 8), Segments((7,))
    assert torch.equal(layer.eval()(x, segments), layer(x, segments))
    assert not torch.equal(layer.train()(x, segments), layer(x, segments))


def test_weights_are_those_attention_uses():
    torch.manual_seed(0)
    layer, segments, x = Attention(8, 2).double(), Segments((3, 5)), torch.randn(8, 8, dtype=torch.float64)
    value = layer.qkv(x).view(8, 3, 2, 4)[:, 2]
    for weights, v, out in zip(layer.weights(x, segments), value.split([3, 5]), layer(x, segments).split([3, 5]), strict=True):
        torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:2]))
        mixed = (weights.double() @ v.transpose(0, 1)).transpose(0, 1).flatten(1)
        torch.testing.assert_close(layer.proj(mixed), out, rtol=1e-4, atol=1e-5)


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


def plain_block(block: Block, x: torch.Tensor, segments: Segments, keep: torch.Tensor) -> torch.Tensor:
    """A block in which every token's branches are multiplied by ``keep [T, 2]``."""
    x = x + block.attn(block.norm1(x), segments) * keep[:, :1]
    return x + block.mlp(block.norm2(x)) * keep[:, 1:]


@pytest.mark.parametrize("norm", ["layer", "batchwide"])
@pytest.mark.parametrize("some", [False, True])
def test_drop_path_of_tokens_leaves_dropped_rows_out_of_the_work_and_nothing_else(norm, some):
    torch.manual_seed(0)
    stack = BlockStack(8, 3, 2, drop_path=0.6, drop_path_per="token", norm=norm, qkv_bias=True).double().train()
    segments = Segments((6, 9, 1))
    x, position = torch.randn(2, 16, 8, dtype=torch.float64).unbind(0)
    rows = torch.tensor([1, 4, 7, 8, 15]) if some else None
    row_segments = Segments((2, 2, 1)) if some else None

    def random() -> BatchRandom:
        return BatchRandom(3, torch.Generator().manual_seed(5))

    out = stack(x, position, segments, random=random(), rows=rows, row_segments=row_segments)
    noise = random().rows(segments.lengths, 3, 2)
    expected = x
    for i, (block, rate) in enumerate(zip(stack.blocks, stack.drop_path_rates, strict=True)):
        expected = plain_block(block, expected + position, segments, (noise[:, i] >= rate).double() / (1 - rate))
    torch.testing.assert_close(out, expected if rows is None else expected[rows], rtol=1e-9, atol=1e-11)
    dropped = (noise < torch.tensor(stack.drop_path_rates)[None, :, None]).double().mean((0, 2))
    assert dropped[0] == 0
    assert dropped[2] > 0.3


def test_rows_of_samples_do_not_depend_on_the_other_samples():
    whole = BatchRandom(3, torch.Generator().manual_seed(3)).rows((5, 2, 7), 2)
    half = BatchRandom(2, torch.Generator().manual_seed(3), slot=torch.tensor([0, 2]), global_size=3).rows((5, 7), 2)
    assert torch.equal(half, torch.cat([whole[:5], whole[7:]]))
    assert BatchRandom(0).rows(()).shape == (0,)


def test_batchwide_norm_has_one_mean_for_all_rows_and_channels():
    torch.manual_seed(0)
    norm, x = BatchwideNorm(6).double(), 3 * torch.randn(11, 6, dtype=torch.float64) + 5
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    expected = norm.weight * (x - x.mean()) / x.std(correction=0) + norm.bias
    torch.testing.assert_close(norm(x), expected)
    variance, mean = torch.var_mean(x, correction=0)  # the form for a GPU
    torch.testing.assert_close(torch.addcmul(norm.bias, (x - mean) * (variance + norm.eps).rsqrt(), norm.weight), expected)
    assert norm.float()(x.bfloat16()).dtype == torch.float32
    assert norm(x[:0].float()).shape == (0, 6)


def test_unknown_kinds_are_refused_by_name():
    with pytest.raises(UnknownNameError, match=r"unknown norm 'batch'.*'batchwide'"):
        Block(8, 2, norm="batch")
    with pytest.raises(UnknownNameError, match="drop_path_per"):
        BlockStack(8, 1, 2, drop_path_per="event")


@pytest.mark.parametrize("sizes", [(4, 4, 4), (5, 2, 7), (1, 40, 40)])
def test_masks_keep_tokens_apart_in_every_form(sizes):
    torch.manual_seed(0)
    segments, total = Segments(sizes), sum(sizes)
    q, k, v = torch.randn(3, total, 2, 4, dtype=torch.float64).unbind(0)
    masks = [(torch.rand(n, n) < 0.5) | torch.eye(n, dtype=torch.bool) for n in sizes]
    expected = []
    for mask, *parts in zip(masks, *(x.split(list(sizes)) for x in (q, k, v)), strict=True):
        one, other, value = (x.transpose(0, 1) for x in parts)
        weights = (one @ other.transpose(1, 2) / 2).masked_fill(~mask, -torch.inf).softmax(-1)
        expected.append((weights @ value).transpose(0, 1).flatten(1))
    for form in (packed_attention, padded_attention):
        torch.testing.assert_close(form(q, k, v, segments, segments, masks=masks), torch.cat(expected))
        everywhere = [torch.ones_like(mask) for mask in masks]
        torch.testing.assert_close(form(q, k, v, segments, segments, masks=everywhere), form(q, k, v, segments, segments))


def test_masks_of_a_stack_are_one_for_each_block_and_not_with_rows():
    torch.manual_seed(0)
    stack, segments, x = BlockStack(8, 2, 2), Segments((3, 2)), torch.randn(5, 8)
    alone = [torch.eye(n, dtype=torch.bool) for n in segments.lengths]
    each = stack(x, torch.zeros_like(x), Segments((1,) * 5))
    torch.testing.assert_close(stack(x, torch.zeros_like(x), segments, masks=alone), each)
    with pytest.raises(ValueError, match="masks have a row for every token; give them without rows"):
        stack(x, torch.zeros_like(x), segments, masks=alone, rows=torch.tensor([0, 3]), row_segments=Segments((1, 1)))


def test_drop_path_takes_a_rate_for_every_block():
    assert BlockStack(8, 2, 2, drop_path=[0.1, 0.3]).drop_path_rates == [0.1, 0.3]
    with pytest.raises(ValueError, match="drop_path must be one number or one for each of the 2 blocks, got 3"):
        BlockStack(8, 2, 2, drop_path=[0.1, 0.2, 0.3])


def test_segments_count_the_chosen_rows_of_each_sample():
    assert Segments((2, 0, 3)).count(torch.tensor([True, False, True, True, False])) == Segments((1, 0, 2))
    assert Segments(()).count(torch.zeros(0, dtype=torch.bool)) == Segments(())


def test_rotations_are_those_of_each_row_and_some_rows_agree_with_all():
    """A table of one grid serves every sample; a table with a row for each token gives the same."""
    torch.manual_seed(0)
    block = Block(16, 2, qkv_bias=True)
    segments, table = Segments((6, 6)), rope_2d_table(torch.tensor([[i // 3, i % 3] for i in range(6)]), 8)
    x = torch.randn(12, 16)
    whole = block(x, segments, rope=table)
    torch.testing.assert_close(block(x, segments, rope=table.repeat(2, 1, 1)), whole)
    assert not torch.allclose(block(x, segments), whole, atol=1e-4)
    rows = torch.tensor([1, 4, 5, 6, 11])
    torch.testing.assert_close(block(x, segments, rows, Segments((3, 2)), rope=table), whole[rows])
    kept = torch.arange(12)
    keep = tuple(Kept(kept, segments, 1.0) for _ in range(2))
    torch.testing.assert_close(block(x, segments, keep=keep, rope=table), whole)


def test_attention_with_rotations_sees_differences_of_positions_alone():
    torch.manual_seed(0)
    attention = Attention(16, 2, qkv_bias=True)
    position, x = torch.tensor([[0, 0], [0, 2], [3, 1], [2, 2]]), torch.randn(4, 16)
    here, there = (rope_2d_table(position + shift, 8) for shift in (torch.tensor([0, 0]), torch.tensor([5, 9])))
    torch.testing.assert_close(attention(x, Segments((4,)), rope=here), attention(x, Segments((4,)), rope=there), rtol=1e-4, atol=1e-5)


def test_cross_attention_is_softmax_over_the_memory_of_the_same_sample():
    torch.manual_seed(0)
    attention = CrossAttention(8, 2, qkv_bias=True)
    x, memory = torch.randn(5, 8), torch.randn(7, 8)
    found = attention(x, memory, Segments((2, 3)), Segments((4, 3)))
    for rows, columns in ((slice(0, 2), slice(0, 4)), (slice(2, 5), slice(4, 7))):
        q = attention.q(x[rows]).view(-1, 2, 4).transpose(0, 1)
        k, v = attention.kv(memory[columns]).view(-1, 2, 2, 4).unbind(1)
        weights = (q @ k.permute(1, 2, 0) / 2).softmax(-1)
        expected = attention.proj((weights @ v.transpose(0, 1)).transpose(0, 1).flatten(1))
        torch.testing.assert_close(found[rows], expected)
    with pytest.raises(ValueError, match="dim must be a multiple of heads, got dim=8, heads=3"):
        CrossAttention(8, 3)
    with pytest.raises(ValueError, match="give both rope and memory_rope, or none of them"):
        attention(torch.randn(2, 8), torch.randn(3, 8), Segments((2,)), Segments((3,)), rope=torch.randn(2, 2, 2))


def test_a_cross_block_leaves_its_memory_and_can_give_some_rows():
    torch.manual_seed(0)
    block = CrossBlock(16, 2)
    table = rope_2d_table(torch.tensor([[0, 0], [0, 1], [1, 0], [1, 1]]), 8)
    segments, x, memory = Segments((4, 4)), torch.randn(8, 16), torch.randn(8, 16)
    before = memory.clone()
    whole = block(x, memory, segments, segments, rope=table, memory_rope=table)
    assert torch.equal(memory, before)
    rows = torch.tensor([0, 3, 6])
    some = block(x, memory, segments, segments, rows, Segments((2, 1)), table, table)
    torch.testing.assert_close(some, whole[rows])
    assert not torch.allclose(block(x, memory.flip(0), segments, segments, rope=table, memory_rope=table), whole, atol=1e-4)
