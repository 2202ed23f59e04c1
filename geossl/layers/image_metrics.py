"""How alike two images are: mean absolute difference, PSNR and SSIM, as measures and as differentiable losses.

Images are ``[..., H, W, C]`` as the Gaussian rasterizer renders them; each function gives one number per image, of the leading dimensions.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from geossl.errors import unknown_name

WINDOW, SIGMA = 11, 1.5
_PADDINGS = ("valid", "same")


def _pair(op: str, image: Tensor, target: Tensor) -> None:
    if image.shape != target.shape or image.dim() < 3:
        raise ValueError(f"{op}: both images must be [..., H, W, C] of one shape, got {list(image.shape)} and {list(target.shape)}")
    if not (image.is_floating_point() and target.is_floating_point()):
        raise TypeError(f"{op}: images must be floating, got {image.dtype} and {target.dtype}; divide 8 bit images by 255")
    if image.shape[-3:].numel() == 0:
        raise ValueError(f"{op}: images must have pixels and channels, got {list(image.shape)}")


def _range(op: str, data_range: float) -> None:
    if not data_range > 0:
        raise ValueError(f"{op}: data_range must be positive, the largest value less the smallest, got {data_range}")


def l1(image: Tensor, target: Tensor) -> Tensor:
    """Mean absolute difference of each image, ``[...]``; differentiable."""
    _pair("l1", image, target)
    return (image - target).abs().mean((-3, -2, -1))


def psnr(image: Tensor, target: Tensor, data_range: float = 1.0) -> Tensor:
    """Peak signal-to-noise ratio of each image in dB, ``10 log10(data_range^2 / mean squared difference)``; infinite for equal images.

    Args:
        image: ``[..., H, W, C]``.
        target: The same shape.
        data_range: Largest possible value less the smallest.

    Returns:
        ``[...]``, differentiable where the images differ.
    """
    _pair("psnr", image, target)
    _range("psnr", data_range)
    return 10 * torch.log10(data_range**2 / (image - target).square().mean((-3, -2, -1)))


def ssim(image: Tensor, target: Tensor, data_range: float = 1.0, padding: Literal["valid", "same"] = "valid") -> Tensor:
    """Structural similarity of each image (Wang et al. 2004): a Gaussian window of 11 x 11 with sigma 1.5, K1 = 0.01, K2 = 0.03.

    Args:
        image: ``[..., H, W, C]``; the mean is over pixels and channels.
        target: The same shape.
        data_range: Largest possible value less the smallest.
        padding: "valid" counts the places where the whole window lies inside, as the paper and scikit-image do; "same" counts all pixels
            with 0 outside, as the Gaussian splatting loss does.

    Returns:
        ``[...]``, 1 for equal images; differentiable. Computed in float32 at least.
    """
    _pair("ssim", image, target)
    _range("ssim", data_range)
    if padding not in _PADDINGS:
        raise unknown_name("ssim padding", padding, _PADDINGS)
    height, width, channels = image.shape[-3:]
    if padding == "valid" and min(height, width) < WINDOW:
        raise ValueError(f"ssim: images must have at least {WINDOW} x {WINDOW} pixels, got {height} x {width}; or use padding='same'")
    dtype = torch.promote_types(torch.promote_types(image.dtype, target.dtype), torch.float32)
    place = torch.arange(WINDOW, dtype=dtype, device=image.device) - WINDOW // 2
    window = torch.exp(-place.square() / (2 * SIGMA**2))
    window = window / window.sum()
    x, y = (t.to(dtype).reshape(-1, height, width, channels).movedim(-1, 1).reshape(-1, height, width) for t in (image, target))
    outside = WINDOW // 2 if padding == "same" else 0
    stacked = torch.cat([x, y, x * x, y * y, x * y])[None]
    groups = stacked.shape[1]
    # As channels of one image, each with its own copy of the window: the CPU has quick kernels for that, and for one channel it has none
    # (20 times slower with the backward pass).
    windows = window.expand(groups, 1, 1, WINDOW)
    with torch.autocast(image.device.type, enabled=False):  # variances are differences of large numbers
        stacked = torch.nn.functional.conv2d(stacked, windows.mT, padding=(outside, 0), groups=groups)
        stacked = torch.nn.functional.conv2d(stacked, windows, padding=(0, outside), groups=groups)[0]
    mean_x, mean_y, square_x, square_y, product = stacked.chunk(5)
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    covariance = product - mean_x * mean_y
    variances = square_x - mean_x * mean_x + square_y - mean_y * mean_y
    value = (2 * mean_x * mean_y + c1) * (2 * covariance + c2) / ((mean_x * mean_x + mean_y * mean_y + c1) * (variances + c2))
    return value.reshape(*image.shape[:-3], -1).mean(-1)
