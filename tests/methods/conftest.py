"""The weights of hierarchical methods under the names of the published code."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from geossl.methods import PointM2AE


@pytest.fixture(scope="session")
def published_names() -> Callable[[PointM2AE], dict[str, torch.Tensor]]:
    """A function that names the weights of a method as the published code does."""
    return _published_names


def _published_names(method: PointM2AE) -> dict[str, torch.Tensor]:
    """Name the weights of a method as the published code does."""
    layers = {
        "conv1.": "first_conv.0.",
        "norm1.": "first_conv.1.",
        "conv2.": "first_conv.3.",
        "conv3.": "second_conv.0.",
        "norm2.": "second_conv.1.",
        "conv4.": "second_conv.3.",
    }
    steps = {"fuse.": "fuse.net.0.", "fuse_norm.": "fuse.net.1.", "units.": "extraction.operation."}
    units = {"conv1.": "net1.0.", "norm1.": "net1.1.", "conv2.": "net2.0.", "norm2.": "net2.1."}
    tops = {
        "backbone.embeds.": ("h_encoder.token_embed.", [layers]),
        "backbone.positions.": ("h_encoder.encoder_pos_embeds.", []),
        "backbone.blocks.": ("h_encoder.encoder_blocks.", []),
        "backbone.norms.": ("h_encoder.encoder_norms.", []),
        "decoder.stages.": ("h_decoder.", []),
        "decoder.positions.": ("decoder_pos_embeds.", []),
        "decoder.propagations.": ("token_prop.", [steps, units]),
        "decoder.norm.": ("decoder_norm.", []),
        "head.": ("rec_head_3d." if hasattr(method, "feature_head") else "rec_head.", []),
        "feature_head.": ("rec_head_2d.", []),
        "decoder.mask_token": ("mask_token", []),
    }
    state = {}
    for name, value in method.state_dict().items():
        ours, (top, tables) = next(item for item in tops.items() if name.startswith(item[0]))
        rest = name.removeprefix(ours)
        for table in tables:
            for one, other in table.items():
                rest = rest.replace(f".{one}", f".{other}")
        is_convolution = tables or ours.endswith("head.")
        state[top + rest] = (
            value[None] if ours == "decoder.mask_token" else value[..., None] if is_convolution and value.dim() == 2 else value
        )
    return state
