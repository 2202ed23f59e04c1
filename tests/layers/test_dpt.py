from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from geossl.layers import DPTHead
from geossl.layers.dpt import Fusion, double

SMALL = {"layer_dims": (4, 6, 8, 10), "feature_dim": 8, "last_dim": 5}


def maps(height: int = 4, width: int = 6, batch: int = 2) -> list[torch.Tensor]:
    return [torch.randn(batch, channels, height, width) for channels in (12, 12, 8, 8)]


def test_output_has_the_size_of_the_picture_and_everything_is_trained() -> None:
    head = DPTHead((12, 12, 8, 8), 3, **SMALL)
    output = head(maps())
    assert output.shape == (2, 3, 64, 96)
    output.square().mean().backward()
    assert all(value.grad is not None and value.grad.abs().sum() > 0 for value in head.parameters())


def test_published_size() -> None:
    head = DPTHead((768, 768, 768, 768), 2)
    unread = 2 * (256 * 256 * 9 + 256)  # refinenet4.resConfUnit1, which this head does not have
    assert sum(value.numel() for value in head.parameters()) + unread == pytest.approx(20.1e6, rel=0.02)


def test_projecting_before_upsampling_changes_nothing() -> None:
    fusion = Fusion(8, skip=True).double()
    coarse, fine = torch.randn(2, 1, 8, 3, 5, dtype=torch.float64)
    plain = coarse + fine + fusion.skip.conv2(F.relu(fusion.skip.conv1(F.relu(fine))))
    plain = plain + fusion.unit.conv2(F.relu(fusion.unit.conv1(F.relu(plain))))
    upsample = nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True)
    torch.testing.assert_close(fusion(coarse, fine), fusion.project(upsample(plain)), rtol=1e-12, atol=1e-12)


def test_doubling_keeps_the_corners() -> None:
    x = torch.arange(6.0).view(1, 1, 2, 3)
    wide = double(x)
    assert wide.shape == (1, 1, 4, 6)
    assert [wide[0, 0, i, j].item() for i in (0, -1) for j in (0, -1)] == [0, 2, 3, 5]
    assert wide[0, 0, 1, 0].item() == pytest.approx(1.0)  # a third of the way from 0 to 3


@pytest.mark.parametrize(("height", "width"), [(3, 6), (4, 5)])
def test_sizes_that_are_no_multiples_of_32(height: int, width: int) -> None:
    with pytest.raises(ValueError, match=f"multiples of 32, got {16 * height} x {16 * width}.*predict_tiled"):
        DPTHead((12, 12, 8, 8), 1, **SMALL)(maps(height, width))


def test_wrong_maps() -> None:
    head = DPTHead((12, 12, 8, 8), 1, **SMALL)
    with pytest.raises(ValueError, match="expected four maps of one size, got 3"):
        head(maps()[:3])
    with pytest.raises(ValueError, match="expected four maps of one size, got 4 of the sizes"):
        head([*maps()[:3], torch.randn(2, 8, 4, 4)])
    with pytest.raises(ValueError, match="must be four numbers each"):
        DPTHead((12, 12, 8), 1)
