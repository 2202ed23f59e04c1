"""CroCo without its second view: the comparison that shows what the view gives."""

from __future__ import annotations

import pytest
import torch

from geossl.errors import ConfigError
from geossl.geometry import ImageBatch
from geossl.methods import CroCoConfig
from geossl.models import CroCoDecoderConfig, create_backbone


def small_method(**settings):
    torch.manual_seed(0)
    backbone = create_backbone("croco_vit_tiny", dim=16, depth=1, heads=2, image_size=(32, 64))
    return CroCoConfig(decoder=CroCoDecoderConfig(dim=16, depth=2, heads=2), mask_ratio=0.5, **settings).build(backbone)


def test_single_view_reads_no_reference_and_trains_no_cross_attention():
    method = small_method(single_view=True)
    image, reference = torch.randn(2, 2, 3, 32, 64)
    mask = torch.tensor([[True, False] * 4] * 2)
    output = method(ImageBatch(image, reference), mask=mask)
    assert torch.equal(output.loss, method(ImageBatch(image), mask=mask).loss)
    output.loss.backward()
    assert all((value.grad is not None) == value.requires_grad for value in method.parameters())  # nothing DDP would wait for
    idle = {name for name, value in method.named_parameters() if value.grad is None}
    reading = (".cross_attn.", ".norm_memory.", ".norm2.")  # norm2 is the one before the cross-attention
    assert idle == {name for name, _ in method.named_parameters() if name.startswith("decoder.") and any(part in name for part in reading)}
    pictures = method.pictures(ImageBatch(image))
    assert set(pictures[0]) == {"image", "masked", "completion", "error"}


def test_with_a_second_view_everything_is_trained():
    method = small_method()
    image, reference = torch.randn(2, 2, 3, 32, 64)
    method(ImageBatch(image, reference)).loss.backward()
    assert all(value.grad is not None for value in method.parameters())
    with pytest.raises(ValueError, match="use data of pairs, or single_view"):
        method(ImageBatch(image))


def test_symmetric_and_single_view_exclude_each_other():
    with pytest.raises(ConfigError, match="choose one of them"):
        CroCoConfig(symmetric=True, single_view=True)
