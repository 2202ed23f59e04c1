"""The value range of images: stored as 0..1, read by networks with ImageNet's mean and deviation taken out."""

from __future__ import annotations

import torch
from torch import Tensor

IMAGE_MEAN = (0.485, 0.456, 0.406)
"""Mean of red, green and blue over ImageNet."""
IMAGE_STD = (0.229, 0.224, 0.225)
"""Their standard deviations."""


def normalize_images(images: Tensor) -> Tensor:
    """``(images - IMAGE_MEAN) / IMAGE_STD`` of RGB in 0..1, ``[..., 3, H, W]`` floating point; differentiable."""
    return (images - _per_channel(IMAGE_MEAN, images)) / _per_channel(IMAGE_STD, images)


def denormalize_images(images: Tensor) -> Tensor:
    """The inverse of :func:`normalize_images`."""
    return images * _per_channel(IMAGE_STD, images) + _per_channel(IMAGE_MEAN, images)


def _per_channel(values: tuple[float, float, float], images: Tensor) -> Tensor:
    return torch.tensor(values, dtype=images.dtype, device=images.device)[:, None, None]
