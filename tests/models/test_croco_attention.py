"""Where CroCo's decoder looks: the weights it mixes values by, and what they match."""

from __future__ import annotations

import pytest
import torch

from geossl.evaluation import match_patches
from geossl.layers import CrossAttention, CrossBlock, Segments
from geossl.models import CroCoDecoderConfig, CroCoPair, create_backbone


def small_pair(position: str = "rope") -> CroCoPair:
    torch.manual_seed(0)
    backbone = create_backbone("croco_vit_tiny", dim=16, depth=1, heads=2, image_size=(32, 48), position=position)
    return CroCoPair(backbone, CroCoDecoderConfig(dim=16, depth=2, heads=2).build(backbone.config)).eval()


@pytest.mark.parametrize("position", ["rope", "cosine"])
def test_cross_attention_is_what_the_blocks_mix_values_by(position):
    pair = small_pair(position)
    image, reference = torch.randn(2, 2, 3, 32, 48)
    attention = pair.cross_attention(image, reference)
    assert attention.shape == (2, 6, 6)
    torch.testing.assert_close(attention.sum(2), torch.ones(2, 6))
    # With values that say which patch they come from and an identity after them, a block returns its own weights.
    seen = []
    for block in pair.decoder.blocks:

        def record(module, args, kwargs, output):
            memory = args[1]
            weights = torch.stack(module.weights(*args, **kwargs))
            value = module.kv(memory)[:, memory.shape[1] :].view(2, 6, 2, 8).transpose(1, 2)
            torch.testing.assert_close(module.proj((weights @ value).transpose(1, 2).reshape(12, 16)), output)
            seen.append(weights.mean(1))

        block.cross_attn.register_forward_hook(record, with_kwargs=True)
    pair(image, reference, [-1])
    torch.testing.assert_close(torch.stack(seen).mean(0), attention)
    assert not any(block.cross_attn._forward_pre_hooks for block in pair.decoder.blocks)  # nothing is left behind


def test_a_decoder_that_copies_positions_matches_places():
    attention = torch.eye(6)[[1, 2, 2, 4, 5, 5]]
    matches = match_patches(attention, (2, 3), 16)
    assert (matches.target - matches.source).tolist() == [[16, 0], [16, 0], [0, 0]] * 2


def test_without_memory_a_block_reads_none():
    torch.manual_seed(0)
    block, x = CrossBlock(16, 2), torch.randn(6, 16)
    segments = Segments((6,))
    alone = block(x, None, segments, segments)
    torch.testing.assert_close(alone, x + (y := block.attn(block.norm1(x), segments)) + block.mlp(block.norm3(x + y)))
    assert not torch.equal(alone, block(x, torch.randn(6, 16), segments, segments))


def test_samples_do_not_look_at_each_other():
    torch.manual_seed(0)
    layer, x, memory = CrossAttention(8, 2), torch.randn(5, 8), torch.randn(7, 8)
    first, second = layer.weights(x, memory, Segments((2, 3)), Segments((4, 3)))
    assert first.shape == (2, 2, 4)
    assert second.shape == (2, 3, 3)
    torch.testing.assert_close(layer.weights(x[:2], memory[:4], Segments((2,)), Segments((4,)))[0], first)
