"""The dense prediction head of DPT: token maps of four depths of a transformer, fused from coarse to fine into one value a pixel.

Paper: Ranftl, Bochkovskiy, Koltun, "Vision Transformers for Dense Prediction", ICCV 2021, arXiv 2103.13413, in the form of CroCo v2
(Weinzaepfel et al., ICCV 2023, arXiv 2211.10408). Two steps are taken in another order than in the papers, with equal results: the 1x1
convolution at the end of each fusion comes before the upsampling, where it has a quarter of the pixels (both are linear, and the weights of
the interpolation add up to 1).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

STEP = 32
"""Height and width of the pictures must be multiples of this: the deepest map has one cell for every 32 pixels."""


class ResidualUnit(nn.Module):
    """``x + conv(relu(conv(relu(x))))`` with 3x3 convolutions."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(dim, dim, 3, padding=1)
        self.conv2 = nn.Conv2d(dim, dim, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, C, h, w]`` of any size."""
        return x + self.conv2(F.relu(self.conv1(F.relu(x))))


class Fusion(nn.Module):
    """Adds a finer map to what comes from the coarser ones and doubles the resolution.

    Args:
        dim: Channels.
        skip: Whether a finer map is added. The deepest fusion has none, and so no unit for it: published files keep one that nothing reads.
    """

    def __init__(self, dim: int, *, skip: bool) -> None:
        super().__init__()
        self.skip = ResidualUnit(dim) if skip else None
        self.unit = ResidualUnit(dim)
        self.project = nn.Conv2d(dim, dim, 1)

    def forward(self, coarse: Tensor, fine: Tensor | None = None) -> Tensor:
        """``[B, C, h, w]``, and ``fine`` like it where the fusion has a skip -> ``[B, C, 2 h, 2 w]``."""
        x = coarse if self.skip is None else coarse + self.skip(fine)
        return double(self.project(self.unit(x)))


class DPTHead(nn.Module):
    """Fuses four token maps into ``channels`` values for each pixel; see the module's docstring. Patches are 16 pixels wide.

    Args:
        inputs: Channels of the four maps, from the shallowest to the deepest.
        channels: Values for each pixel.
        layer_dims: Channels that the maps get at 1/4, 1/8, 1/16 and 1/32 of the picture.
        feature_dim: Channels of the fusions, even.
        last_dim: Channels before the last convolution.
    """

    def __init__(
        self,
        inputs: Sequence[int],
        channels: int,
        *,
        layer_dims: Sequence[int] = (96, 192, 384, 768),
        feature_dim: int = 256,
        last_dim: int = 32,
    ) -> None:
        super().__init__()
        if len(inputs) != 4 or len(layer_dims) != 4:
            raise ValueError(f"DPTHead: inputs and layer_dims must be four numbers each, got {list(inputs)} and {list(layer_dims)}")
        one, two, _, four = layer_dims
        resize = (
            nn.ConvTranspose2d(one, one, 4, 4),
            nn.ConvTranspose2d(two, two, 2, 2),
            nn.Identity(),
            nn.Conv2d(four, four, 3, 2, padding=1),
        )
        self.reassemble = nn.ModuleList(
            nn.Sequential(nn.Conv2d(given, dim, 1), layer) for given, dim, layer in zip(inputs, layer_dims, resize, strict=True)
        )
        self.reduce = nn.ModuleList(nn.Conv2d(dim, feature_dim, 3, padding=1, bias=False) for dim in layer_dims)
        self.fuse = nn.ModuleList(Fusion(feature_dim, skip=number < 3) for number in range(4))
        self.smooth = nn.Conv2d(feature_dim, feature_dim // 2, 3, padding=1)
        self.last = nn.Conv2d(feature_dim // 2, last_dim, 3, padding=1)
        self.predict = nn.Conv2d(last_dim, channels, 1)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Fuse the maps.

        Args:
            maps: Four maps ``[B, C, H / 16, W / 16]``, from the shallowest to the deepest; H and W multiples of 32.

        Returns:
            ``[B, channels, H, W]``.

        Raises:
            ValueError: not four maps, maps of unequal sizes, or an odd number of rows or columns.
        """
        sizes = {tuple(part.shape[-2:]) for part in maps}
        if len(maps) != 4 or len(sizes) != 1:
            raise ValueError(f"DPTHead: expected four maps of one size, got {len(maps)} of the sizes {sorted(sizes)}")
        height, width = maps[0].shape[-2:]
        if height % 2 or width % 2 or not height or not width:
            raise ValueError(
                f"DPTHead: height and width of the pictures must be multiples of {STEP}, got {16 * height} x {16 * width}; "
                "crop or resize them, or predict in windows (geossl.tasks.predict_tiled)"
            )
        layers = self.layers(maps)
        x = self.fuse[3](layers[3])
        for number in (2, 1, 0):
            x = self.fuse[number](x, layers[number])
        return self.predict(F.relu(self.last(double(self.smooth(x)))))

    def layers(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """The maps with ``feature_dim`` channels at 1/4, 1/8, 1/16 and 1/32 of the picture."""
        return [reduce(reassemble(part)) for part, reassemble, reduce in zip(maps, self.reassemble, self.reduce, strict=True)]


def double(x: Tensor) -> Tensor:
    """Interpolate ``[B, C, h, w]`` to twice the size so that the corners stay where they are."""
    return F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True)
