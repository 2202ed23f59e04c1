"""Image transformer of CroCo and CroCo v2, the cross-attention decoder that reads a second image, and the pair of both.

Papers: Weinzaepfel et al., "CroCo: Self-Supervised Pre-training for 3D Vision Tasks by Cross-View Completion", NeurIPS 2022, arXiv
2210.10716; Weinzaepfel et al., "CroCo v2: Improved Cross-view Completion Pre-training for Stereo Matching and Optical Flow", ICCV 2023,
arXiv 2211.10408.

Images ``[B, 3, H, W]`` are cut into patches; a plain transformer without class token turns them into features ``[B, C, H/16, W/16]``. The
position of a patch is a sin-cos table added to it (v1), or rotates its queries and keys by its row and its column (v2, RoPE), which
works for images of any size alike. Downstream models on pairs of images keep encoder and decoder: :class:`CroCoPair`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from geossl.errors import ConfigError, unknown_name
from geossl.layers import Block, CrossBlock, Segments, run_block
from geossl.layers.grid_positions import GridPositions
from geossl.layers.image_patches import ImagePatches, PatchEmbedding, check_images, cut_patches, to_map
from geossl.models.factory import BACKBONES, FeatureInfo
from geossl.models.point_vit import resolve_indices

NORM_EPS = 1e-6
"""Of every LayerNorm in encoder and decoder."""


@dataclass(frozen=True, kw_only=True)
class CroCoViTConfig:
    """Numbers of a :class:`CroCoViT`."""

    name: str = "croco_vit_base"
    """Registered variant the numbers started from."""
    image_size: tuple[int, int] = (224, 224)
    """Height and width that the model is meant for. Other sizes are taken too: a sin-cos table is interpolated from this one."""
    patch: int = 16
    """Rows and columns of a patch, in pixels."""
    dim: int = 768
    """Channels of a token."""
    depth: int = 12
    """Transformer blocks."""
    heads: int = 12
    """Attention heads; must divide dim."""
    mlp_ratio: float = 4.0
    """Hidden width of the MLPs over dim."""
    position: Literal["cosine", "rope"] = "rope"
    """How a patch knows where it is: `cosine` adds a sin-cos table (v1), `rope` rotates queries and keys (v2)."""
    rope_base: float = 100.0
    """Base of the frequencies of `rope`."""

    def __post_init__(self) -> None:
        for key in ("patch", "dim", "depth", "heads"):
            if getattr(self, key) < 1:
                raise ConfigError(f"{key} must be at least 1, got {getattr(self, key)}")
        if len(self.image_size) != 2 or any(side < self.patch or side % self.patch for side in self.image_size):
            raise ConfigError(f"image_size must be height and width, multiples of the patch {self.patch}, got {self.image_size}")
        if not 0 < self.rope_base < math.inf:
            raise ConfigError(f"rope_base must be a finite number above 0, got {self.rope_base}")
        check_mlp(self.dim, self.mlp_ratio)
        check_width(self.dim, self.heads, self.position, "")

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches of an image of ``image_size``."""
        return self.image_size[0] // self.patch, self.image_size[1] // self.patch

    def describe(self) -> str:
        """What comes out, in words."""
        return f"a map of {self.dim} channels, one cell for {self.patch} x {self.patch} pixels"

    def build(self) -> CroCoViT:
        """Create the backbone with fresh weights."""
        return CroCoViT(self)


@dataclass(frozen=True, kw_only=True)
class CroCoDecoderConfig:
    """Numbers of a :class:`CroCoDecoder`. The defaults are the "small" decoder as published; the "base" one is 768, 12, 12."""

    dim: int = 512
    """Channels of a token."""
    depth: int = 8
    """Decoder blocks."""
    heads: int = 16
    """Attention heads; must divide dim."""
    mlp_ratio: float = 4.0
    """Hidden width of the MLPs over dim."""
    norm_memory: bool = True
    """Whether each block normalises the features of the second image."""

    def __post_init__(self) -> None:
        for key in ("dim", "depth", "heads"):
            if getattr(self, key) < 1:
                raise ConfigError(f"{key} must be at least 1, got {getattr(self, key)}")
        if self.dim % self.heads:
            raise ConfigError(f"heads must divide dim, got dim={self.dim} and heads={self.heads}")
        check_mlp(self.dim, self.mlp_ratio)

    def build(self, encoder: CroCoViTConfig) -> CroCoDecoder:
        """Create the decoder for the features of ``encoder`` with fresh weights."""
        check_width(self.dim, self.heads, encoder.position, "decoder.")
        return CroCoDecoder(self, encoder)


def check_mlp(dim: int, mlp_ratio: float) -> None:
    """Refuse MLPs without hidden channels."""
    if not 1 <= mlp_ratio * dim < math.inf:
        raise ConfigError(f"mlp_ratio must give the MLPs hidden channels (mlp_ratio * dim >= 1), got {mlp_ratio} for dim {dim}")


def check_width(dim: int, heads: int, position: str, prefix: str) -> None:
    """Refuse widths that heads or position codes do not divide; ``prefix`` is what the message puts before the names."""
    if position not in ("cosine", "rope"):
        raise unknown_name("position", position, ("cosine", "rope"))
    if dim % heads:
        raise ConfigError(f"{prefix}heads must divide {prefix}dim, got dim={dim} and heads={heads}")
    if position == "rope" and dim // heads % 4:
        raise ConfigError(f"{prefix}dim / {prefix}heads must be a multiple of 4 for position=rope, got {dim} / {heads} = {dim // heads}")
    if position == "cosine" and dim % 4:
        raise ConfigError(f"{prefix}dim must be a multiple of 4 for position=cosine, got {dim}")


# ---------------------------------------------------------------------------------------------------------------------
# The encoder


class CroCoViT(nn.Module):
    """Image transformer; see the module's docstring.

    Args:
        config: The numbers; the instance keeps it as ``config``.
    """

    def __init__(self, config: CroCoViTConfig) -> None:
        super().__init__()
        self.config = config
        self.num_features = config.dim
        self.feature_info = [FeatureInfo(f"blocks.{i}", config.dim, config.patch) for i in range(config.depth)]
        self.patch_embed = PatchEmbedding(config.patch, config.dim)
        self.position = GridPositions(config.position, config.dim, config.heads, config.grid, config.rope_base)
        self.blocks = nn.ModuleList(
            Block(config.dim, config.heads, mlp_ratio=config.mlp_ratio, qkv_bias=True, norm_eps=NORM_EPS) for _ in range(config.depth)
        )
        self.norm = nn.LayerNorm(config.dim, NORM_EPS)
        self.grad_checkpointing = False
        self.blocks.apply(init_xavier)

    def cut(self, images: Tensor, name: str = "images") -> ImagePatches:
        """Cut images ``[B, 3, H, W]`` into patches. Differentiable.

        Raises:
            ValueError: see :func:`check_images`; the message calls them ``name``.
        """
        check_images(images, self.config.patch, name)
        grid = images.shape[2] // self.config.patch, images.shape[3] // self.config.patch
        pixels = cut_patches(images, self.config.patch).flatten(1)
        return ImagePatches(pixels, grid, Segments((grid[0] * grid[1],) * images.shape[0]))

    def encode(self, patches: ImagePatches, *, intermediates: list[Tensor] | None = None) -> Tensor:
        """Embed patches and run the blocks over them; those of an image see each other.

        Args:
            patches: From :meth:`cut`, whole or with only some kept.
            intermediates: When given, every block's output is appended to it, ``[T, dim]``, not normalised.

        Returns:
            ``[T, dim]``, normalised.
        """
        x = self.patch_embed(patches.pixels)
        added, rope = self.position.added(patches.grid), self.position.rotations(patches.grid, x)
        if added is not None:
            x = x + added[patches.all_cells()]
        if rope is not None and patches.cells is not None:
            rope = rope.index_select(0, patches.cells)
        for block in self.blocks:
            x = run_block(block, self.grad_checkpointing, x, patches.segments, rope=rope)
            if intermediates is not None:
                intermediates.append(x)
        return self.norm(x)

    def forward(self, images: Tensor) -> Tensor:
        """Encode images.

        Args:
            images: ``[B, 3, H, W]``, normalised by :func:`geossl.geometry.normalize_images`; H and W multiples of the patch, any such size.

        Returns:
            Normalised features of the last block, ``[B, dim, H / patch, W / patch]``.

        Raises:
            ValueError: see :func:`check_images`.
        """
        patches = self.cut(images)
        return to_map(self.encode(patches), patches.grid)

    def forward_intermediates(
        self, images: Tensor, indices: int | list[int] | None = None, *, norm: bool = True
    ) -> tuple[Tensor, list[Tensor]]:
        """Encode images and return the output of several blocks.

        Args:
            images: As in :meth:`forward`.
            indices: Blocks to return: a list (negative counts from the end), an int for the last so many, None for all.
            norm: Apply the final norm to each of them.

        Returns:
            What :meth:`forward` returns, and the maps ``[B, dim, H / patch, W / patch]`` of the chosen blocks, in the order asked for.
        """
        chosen = resolve_indices(indices, self.config.depth)
        collected: list[Tensor] = []
        patches = self.cut(images)
        feats = self.encode(patches, intermediates=collected)
        maps = [to_map(self.norm(collected[i]) if norm else collected[i], patches.grid) for i in chosen]
        return to_map(feats, patches.grid), maps

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that are not decayed beyond the 1-D ones: none."""
        return set()

    def layer_groups(self) -> list[list[str]]:
        """Parameter name prefixes from input to output, for layer-wise learning-rate decay."""
        groups = [["patch_embed."], *([f"blocks.{i}."] for i in range(self.config.depth))]
        groups[-1].append("norm.")
        return groups

    def set_grad_checkpointing(self, enabled: bool = True) -> None:
        """Recompute block activations in the backward pass instead of storing them."""
        self.grad_checkpointing = enabled


def init_xavier(module: nn.Module) -> None:
    """Initialise as CroCo does: linear weights Xavier-uniform, biases 0, LayerNorm 1 and 0. Use with ``apply``."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.LayerNorm):
        nn.init.ones_(module.weight)
        nn.init.zeros_(module.bias)


# ---------------------------------------------------------------------------------------------------------------------
# The decoder


class CroCoDecoder(nn.Module):
    """Transformer over the patches of one image that reads the encoded other one in every block.

    Args:
        config: The numbers; the instance keeps it as ``config``.
        encoder: Numbers of the encoder whose features it takes.
    """

    def __init__(self, config: CroCoDecoderConfig, encoder: CroCoViTConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Linear(encoder.dim, config.dim)
        self.position = GridPositions(encoder.position, config.dim, config.heads, encoder.grid, encoder.rope_base)
        self.blocks = nn.ModuleList(
            CrossBlock(config.dim, config.heads, mlp_ratio=config.mlp_ratio, norm_eps=NORM_EPS, norm_memory=config.norm_memory)
            for _ in range(config.depth)
        )
        self.norm = nn.LayerNorm(config.dim, NORM_EPS)
        self.grad_checkpointing = False
        self.apply(init_xavier)

    def forward(
        self,
        x: Tensor,
        memory: Tensor | None,
        grid: tuple[int, int],
        *,
        rows: Tensor | None = None,
        row_segments: Segments | None = None,
        intermediates: list[Tensor] | None = None,
    ) -> Tensor:
        """Run all blocks.

        Args:
            x: Tokens of all patches of the images that are completed, ``[B * cells, dim]``, after ``embed`` (or mask tokens).
            memory: The same of the images that are read, after ``embed``. None: nothing is read, the tokens see each other alone.
            grid: Rows and columns of patches of each image.
            rows: Tokens whose output is wanted from the last block, ``[R]`` ascending int64; None: all.
            row_segments: How many of ``rows`` each image has; needed with ``rows``.
            intermediates: When given, the output of every block is appended to it, not normalised.

        Returns:
            ``[B * cells, dim]`` (or ``[R, dim]`` with ``rows``), normalised.
        """
        segments = Segments((grid[0] * grid[1],) * (x.shape[0] // (grid[0] * grid[1])))
        added, rope = self.position.added(grid), self.position.rotations(grid, x)
        if added is not None:
            x = (x.unflatten(0, (-1, len(added))) + added).flatten(0, 1)
            memory = None if memory is None else (memory.unflatten(0, (-1, len(added))) + added).flatten(0, 1)
        last = len(self.blocks) - 1
        for i, block in enumerate(self.blocks):
            only = (rows, row_segments) if i == last else (None, None)
            x = run_block(block, self.grad_checkpointing, x, memory, segments, segments, *only, rope, rope)
            if intermediates is not None:
                intermediates.append(x)
        return self.norm(x)

    def layer_groups(self) -> list[list[str]]:
        """Parameter name prefixes from input to output; ``embed`` belongs to the last group of the encoder (see :class:`CroCoPair`)."""
        groups = [[f"blocks.{i}."] for i in range(self.config.depth)]
        groups[-1].append("norm.")
        return groups

    def set_grad_checkpointing(self, enabled: bool = True) -> None:
        """Recompute block activations in the backward pass instead of storing them."""
        self.grad_checkpointing = enabled


class CroCoPair(nn.Module):
    """Encoder and decoder on two whole images: the backbone of stereo, flow and other tasks on pairs.

    Args:
        backbone: The encoder.
        decoder: The decoder made for it.
    """

    def __init__(self, backbone: CroCoViT, decoder: CroCoDecoder) -> None:
        super().__init__()
        self.backbone = backbone
        self.decoder = decoder
        stride = backbone.config.patch
        self.feature_info = [FeatureInfo(f"backbone.blocks.{i}", backbone.config.dim, stride) for i in range(backbone.config.depth)]
        self.feature_info += [FeatureInfo(f"decoder.blocks.{i}", decoder.config.dim, stride) for i in range(decoder.config.depth)]

    def forward(self, image: Tensor, reference: Tensor, indices: int | list[int] | None = None) -> list[Tensor]:
        """Features of ``image``, from what it shows itself to what it shows in the light of ``reference``.

        Args:
            image: ``[B, 3, H, W]``, see :meth:`CroCoViT.forward`.
            reference: The other images, as large.
            indices: Which features: numbers of blocks, those of the encoder before those of the decoder (see
                :func:`geossl.models.point_vit.resolve_indices`); None for all.

        Returns:
            Maps ``[B, C, H / patch, W / patch]`` in the order asked for: outputs of the blocks, of which the last one of the encoder and
            the last one of the decoder are normalised, as the published models read them.

        Raises:
            ValueError: see :func:`check_images`, or the sizes differ.
        """
        if image.shape != reference.shape:
            raise ValueError(f"image and reference must have the same shape, got {list(image.shape)} and {list(reference.shape)}")
        chosen = resolve_indices(indices, len(self.feature_info))
        one, other = self.backbone.cut(image, "image"), self.backbone.cut(reference, "reference")
        encoded: list[Tensor] = []
        feats = self.backbone.encode(one.join(other), intermediates=encoded)
        count = one.pixels.shape[0]
        outputs = [*(x[:count] for x in encoded[:-1]), feats[:count]]
        if max(chosen, default=0) >= len(outputs):
            decoded: list[Tensor] = []
            x, memory = self.decoder.embed(feats).tensor_split([count])
            last = self.decoder(x, memory, one.grid, intermediates=decoded)
            outputs += [*decoded[:-1], last]
        return [to_map(outputs[i], one.grid) for i in chosen]

    @torch.no_grad()
    def cross_attention(self, image: Tensor, reference: Tensor) -> Tensor:
        """How much each patch of ``image`` looks at each patch of ``reference``: the mean over all blocks and heads of the decoder.

        Returns:
            ``[B, cells, cells]`` float32, rows summing to 1; :func:`geossl.evaluation.match_patches` turns it into matches.

        Raises:
            ValueError: see :meth:`forward`.
        """
        found: list[Tensor] = []

        def collect(module: Any, args: Any, kwargs: Any) -> None:
            found.append(torch.stack([weights.mean(0) for weights in module.weights(*args, **kwargs)]))

        handles = [block.cross_attn.register_forward_pre_hook(collect, with_kwargs=True) for block in cast(Any, self.decoder.blocks)]
        try:
            self(image, reference, [-1])
        finally:
            for handle in handles:
                handle.remove()
        return torch.stack(found).mean(0)

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that are not decayed beyond the 1-D ones: none."""
        return set()

    def layer_groups(self) -> list[list[str]]:
        """Parameter name prefixes from input to output, for layer-wise learning-rate decay, as published for fine-tuning."""
        groups = [[f"backbone.{prefix}" for prefix in prefixes] for prefixes in self.backbone.layer_groups()]
        groups[-1].append("decoder.embed.")
        return groups + [[f"decoder.{prefix}" for prefix in prefixes] for prefixes in self.decoder.layer_groups()]

    def set_grad_checkpointing(self, enabled: bool = True) -> None:
        """Recompute block activations in the backward pass instead of storing them."""
        self.backbone.set_grad_checkpointing(enabled)
        self.decoder.set_grad_checkpointing(enabled)


# ---------------------------------------------------------------------------------------------------------------------
# Variants


@BACKBONES.register
def croco_vit_tiny() -> CroCoViTConfig:
    """192 channels, 6 blocks: trains on a laptop."""
    return CroCoViTConfig(name="croco_vit_tiny", dim=192, depth=6, heads=3)


@BACKBONES.register
def croco_vit_base_cosine() -> CroCoViTConfig:
    """ViT-Base with sin-cos positions: the published CroCo encoder (86 M parameters)."""
    return CroCoViTConfig(name="croco_vit_base_cosine", position="cosine")


@BACKBONES.register
def croco_vit_base() -> CroCoViTConfig:
    """ViT-Base with rotary positions: the published CroCo v2 encoder (86 M parameters)."""
    return CroCoViTConfig()


@BACKBONES.register
def croco_vit_large() -> CroCoViTConfig:
    """ViT-Large with rotary positions: the larger published CroCo v2 encoder (303 M parameters)."""
    return CroCoViTConfig(name="croco_vit_large", dim=1024, depth=24, heads=16)
