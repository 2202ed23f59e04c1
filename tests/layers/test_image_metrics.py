"""L1, PSNR and SSIM against their definitions, other libraries and finite differences."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

from geossl.errors import UnknownNameError
from geossl.layers import l1, psnr, ssim


def images(*shape: int, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    image = torch.rand(shape, dtype=dtype)
    return image, (image + 0.2 * torch.randn(shape, dtype=dtype)).clamp(0, 1)


def test_l1_and_psnr():
    image, target = torch.zeros(2, 4, 5, 3), torch.zeros(2, 4, 5, 3)
    target[1, ..., 0] = 0.3
    torch.testing.assert_close(l1(image, target), torch.tensor([0.0, 0.1]))
    values = psnr(image, target)
    assert float(values[0]) == math.inf
    assert float(values[1]) == pytest.approx(10 * math.log10(1 / 0.03), rel=1e-5)
    assert float(psnr(image[1] * 255, target[1] * 255, data_range=255)) == pytest.approx(float(values[1]), rel=1e-5)


@pytest.mark.parametrize("data_range", [1.0, 255.0])
def test_ssim_is_that_of_gaussian_filters(data_range):
    image, target = images(3, 20, 17, 2)
    want = []
    for x, y in zip((image * data_range).numpy(), (target * data_range).numpy(), strict=True):
        values = []
        for c in range(2):
            a, b = x[..., c], y[..., c]

            def smooth(v: np.ndarray) -> np.ndarray:
                return gaussian_filter(v, 1.5, truncate=3.5)[5:-5, 5:-5]

            mx, my = smooth(a), smooth(b)
            vx, vy, vxy = smooth(a * a) - mx**2, smooth(b * b) - my**2, smooth(a * b) - mx * my
            c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
            values.append((2 * mx * my + c1) * (2 * vxy + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2)))
        want.append(np.mean(values))
    got = ssim(image * data_range, target * data_range, data_range)
    np.testing.assert_allclose(got.numpy(), want, rtol=1e-10)


def test_ssim_of_all_pixels_has_zeros_outside():
    image, target = images(20, 17, 3)
    padded = [torch.nn.functional.pad(t, (0, 0, 5, 5, 5, 5)) for t in (image, target)]
    torch.testing.assert_close(ssim(image, target, padding="same"), ssim(*padded))


def test_ssim_bounds_and_gradients():
    image, target = images(2, 12, 13, 3)
    torch.testing.assert_close(ssim(image, image), torch.ones(2, dtype=torch.float64))
    assert bool((ssim(image, 1 - image) < 0.1).all())
    torch.testing.assert_close(ssim(image, target), ssim(target, image))
    torch.testing.assert_close(ssim(image.float(), target.float()).double(), ssim(image, target), rtol=0, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(ssim(image.float(), target.float()).double(), ssim(image, target), rtol=0, atol=1e-5)
    for function in (l1, psnr, ssim):
        leaf = image[:1, :11, :11, :1].clone().requires_grad_()
        assert torch.autograd.gradcheck(function, (leaf, target[:1, :11, :11, :1]))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: ssim(torch.zeros(4, 4, 3), torch.zeros(4, 4, 3)), ValueError, "at least 11 x 11 pixels, got 4 x 4; or use padding='same'"),
        (lambda: ssim(torch.zeros(12, 12, 3), torch.zeros(12, 12, 1)), ValueError, r"one shape, got \[12, 12, 3\] and \[12, 12, 1\]"),
        (lambda: psnr(torch.zeros(2, 2), torch.zeros(2, 2)), ValueError, r"must be \[..., H, W, C\]"),
        (lambda: l1(torch.zeros(2, 2, 3).byte(), torch.zeros(2, 2, 3)), TypeError, "divide 8 bit images by 255"),
        (lambda: l1(torch.zeros(0, 2, 3), torch.zeros(0, 2, 3)), ValueError, "must have pixels"),
        (lambda: psnr(torch.zeros(2, 2, 3), torch.zeros(2, 2, 3), 0.0), ValueError, "data_range must be positive"),
        (lambda: ssim(torch.zeros(12, 12, 3), torch.zeros(12, 12, 3), padding="full"), UnknownNameError, "valid"),
    ],
)
def test_wrong_arguments(call, error, message):
    with pytest.raises(error, match=message):
        call()
