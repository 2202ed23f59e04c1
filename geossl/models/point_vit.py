"""Plain transformer over groups of neighbouring points (the Point-BERT / Point-MAE encoder).

Paper: Pang et al., "Masked Autoencoders for Point Cloud Self-supervised Learning", ECCV 2022, arXiv 2203.06604.

A cloud is cut into overlapping groups: farthest-point centres and their nearest neighbours, in coordinates relative to the
centre. A small PointNet turns each group into a token, a two-layer MLP codes the centre, transformer blocks mix the tokens.
Points ``[B, N, 3 + C]`` or packed -> tokens ``[T, dim]``, one per group.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from geossl import ops
from geossl.errors import ConfigError
from geossl.geometry import PackedPoints, Tokens
from geossl.layers import BatchRandom, BlockStack, PointTokenEmbedding, PositionMLP, Segments, init_transformer_weights
from geossl.models.factory import BACKBONES, FeatureInfo


@dataclass(frozen=True, kw_only=True)
class PointViTConfig:
    """Numbers of a :class:`PointViT`."""

    name: str = "point_vit_small"
    """Registered variant the numbers started from."""
    dim: int = 384
    """Channels of a token."""
    depth: int = 12
    """Transformer blocks."""
    heads: int = 6
    """Attention heads; must divide dim."""
    groups: int = 64
    """Tokens per cloud (fewer when a cloud has fewer points)."""
    group_size: int = 32
    """Points per token."""
    in_channels: int = 3
    """Columns of a point: 3 coordinates, then features such as a normal (3) and a colour (3)."""
    embed_widths: tuple[int, int, int] = (128, 256, 512)
    """Hidden channels of the token embedding after its first, second and third layer."""
    mlp_ratio: float = 4.0
    """Hidden width of the MLPs over dim."""
    drop_path: float = 0.0
    """Stochastic depth of the last block; grows linearly from 0 at the first."""
    min_sq_norm: float | None = None
    """Published parity option: points whose squared norm is at most this are never chosen as centres (1e-3 for official
    Point-MAE checkpoints). None treats all points alike, which is what a new training wants."""

    def __post_init__(self) -> None:
        for key in ("dim", "depth", "heads", "groups", "group_size"):
            if getattr(self, key) < 1:
                raise ConfigError(f"{key} must be at least 1, got {getattr(self, key)}")
        if len(self.embed_widths) != 3 or min(self.embed_widths) < 1:
            raise ConfigError(f"embed_widths must be three numbers of at least 1, got {self.embed_widths}")
        if self.dim % self.heads:
            raise ConfigError(f"heads must divide dim, got dim={self.dim} and heads={self.heads}")
        if self.in_channels < 3:
            raise ConfigError(f"in_channels must be at least 3 (the coordinates), got {self.in_channels}")
        if not 0 <= self.drop_path < 1:
            raise ConfigError(f"drop_path must lie in [0, 1), got {self.drop_path}")

    def describe(self) -> str:
        """What comes out, in words."""
        return f"{self.groups} tokens of {self.dim} channels"

    def build(self) -> PointViT:
        """Create the backbone with fresh weights."""
        return PointViT(self)


class PointGroups(NamedTuple):
    """A batch of clouds cut into groups."""

    points: Tensor  # [T, K, in_channels], coordinates relative to the centre, then features
    centers: Tensor  # [T, 3]
    segments: Segments  # groups of each cloud


class PointViT(nn.Module):
    """Transformer over point groups; see the module's docstring.

    Args:
        config: The numbers; the instance keeps it as ``config``.
    """

    def __init__(self, config: PointViTConfig) -> None:
        super().__init__()
        self.config = config
        self.in_channels = config.in_channels
        self.num_features = config.dim
        self.feature_info = [FeatureInfo(f"blocks.{i}", config.dim) for i in range(config.depth)]
        self.embed = PointTokenEmbedding(config.dim, config.in_channels, widths=config.embed_widths)
        self.position = PositionMLP(config.dim)
        self.blocks = BlockStack(config.dim, config.depth, config.heads, mlp_ratio=config.mlp_ratio, drop_path=config.drop_path)
        self.norm = nn.LayerNorm(config.dim)
        self.apply(init_transformer_weights)

    @torch.no_grad()
    def group(self, points: PackedPoints | Tensor) -> PointGroups:
        """Cut clouds into groups: farthest-point centres and their ``group_size`` nearest points (the centre included).

        A cloud with fewer points than ``groups`` gives one group per point; one with fewer than ``group_size`` repeats each
        group's nearest point. Not differentiable.

        Args:
            points: Packed clouds whose ``feats`` hold the columns after the coordinates, or ``[B, N, in_channels]``.

        Raises:
            ValueError: a cloud is empty, or the columns do not match ``in_channels``.
        """
        clouds, config = packed_clouds(points, self.in_channels), self.config
        with torch.autocast(clouds.coord.device.type, enabled=False):
            found = sample_groups(clouds.coord, clouds.offsets, config.groups, config.group_size, config.min_sq_norm)
            groups = ops.group_relative(clouds.coord, found.centers, found.index, clouds.feats)
        return PointGroups(groups, found.centers, found.segments)

    def encode(
        self,
        groups: PointGroups,
        keep: Tensor | None = None,
        keep_segments: Segments | None = None,
        *,
        random: BatchRandom | None = None,
        intermediates: list[Tensor] | None = None,
    ) -> Tensor:
        """Embed groups and run the blocks over those in ``keep`` only.

        Args:
            groups: From :meth:`group`.
            keep: Numbers of the groups to encode, ``[V]`` ascending int64; None means all.
            keep_segments: How many of ``keep`` belong to each cloud; needed with ``keep``.
            random: Source of drop-path draws.
            intermediates: When given, every block's output is appended to it.

        Returns:
            ``[V, dim]``, normalised.
        """
        tokens = self.embed(groups.points, keep)
        centers = groups.centers if keep is None else groups.centers[keep]
        segments = groups.segments if keep_segments is None else keep_segments
        return self.norm(self.blocks(tokens, self.position(centers), segments, random=random, intermediates=intermediates))

    def forward(self, points: PackedPoints | Tensor) -> Tokens:
        """Encode clouds.

        Args:
            points: Packed clouds, or ``[B, N, in_channels]`` float32. Any NaN or infinite point is left out.

        Returns:
            Normalised tokens of the last block with their centres.
        """
        groups = self.group(points)
        return Tokens(self.encode(groups), groups.centers, groups.segments.offsets(groups.centers.device))

    def forward_intermediates(
        self, points: PackedPoints | Tensor, indices: int | list[int] | None = None, *, norm: bool = True
    ) -> tuple[Tokens, list[Tensor]]:
        """Encode clouds and return the output of several blocks.

        Args:
            points: As in :meth:`forward`.
            indices: Blocks to return: a list (negative counts from the end), an int for the last so many, None for all.
            norm: Apply the final norm to each of them.

        Returns:
            What :meth:`forward` returns, and the features ``[T, dim]`` of the chosen blocks, in the order asked for.
        """
        chosen = resolve_indices(indices, self.config.depth)
        collected: list[Tensor] = []
        groups = self.group(points)
        feats = self.encode(groups, intermediates=collected)
        tokens = Tokens(feats, groups.centers, groups.segments.offsets(groups.centers.device))
        return tokens, [self.norm(collected[i]) if norm else collected[i] for i in chosen]

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that are not decayed beyond the 1-D ones: none; the published rule is an option of the method."""
        return set()

    def layer_groups(self) -> list[list[str]]:
        """Parameter name prefixes from input to output, for layer-wise learning-rate decay."""
        return [["embed.", "position."], *([f"blocks.blocks.{i}."] for i in range(self.config.depth)), ["norm."]]

    def set_grad_checkpointing(self, enabled: bool = True) -> None:
        """Recompute block activations in the backward pass instead of storing them."""
        self.blocks.grad_checkpointing = enabled


class SampledGroups(NamedTuple):
    """Groups of neighbouring points, as rows of the points they were cut from."""

    centers: Tensor  # [T, 3]
    index: Tensor  # type: ignore[assignment]  # [T, K] int64, nearest first
    segments: Segments  # groups of each cloud


def packed_clouds(points: PackedPoints | Tensor, in_channels: int) -> PackedPoints:
    """Pack ``points`` (``[B, N, in_channels]`` where they are not packed yet) and refuse other columns than ``in_channels``."""
    clouds = points if isinstance(points, PackedPoints) else PackedPoints.from_padded(points)
    columns = 3 + (clouds.feats.shape[1] if clouds.feats is not None else 0)
    if columns != in_channels:
        raise ValueError(
            f"points have {columns} columns but the backbone was made for in_channels={in_channels}; "
            "choose the data set's columns or create_backbone(..., in_channels=...) to match"
        )
    return clouds


def sample_groups(coord: Tensor, offsets: Tensor, groups: int, group_size: int, min_sq_norm: float | None = None) -> SampledGroups:
    """Cut clouds into groups: farthest-point centres and their ``group_size`` nearest points (the centre included).

    A cloud with fewer points than ``groups`` gives one group per point; one with fewer than ``group_size`` repeats each group's nearest
    point. Points that are not finite are left out.

    Args:
        coord: ``[M, 3]``, packed by ``offsets [B + 1]``.
        offsets: Row at which each cloud begins, and the end.
        groups: Groups of each cloud.
        group_size: Points of a group.
        min_sq_norm: See :func:`geossl.ops.farthest_point_sample`.

    Raises:
        ValueError: a cloud has no finite point.
    """
    picked, _ = ops.farthest_point_sample(coord, groups, offsets=offsets, min_sq_norm=min_sq_norm)
    valid = picked >= 0
    sizes = Segments(tuple(offsets.diff().clamp(max=groups).tolist())).count(valid).lengths
    if not sizes or min(sizes) == 0:
        empty = [i for i, n in enumerate(sizes) if n == 0]
        raise ValueError(f"every cloud needs at least one finite point; cloud(s) {empty[:8]} of {len(sizes)} have none")
    segments = Segments(sizes)
    centers = coord[picked[valid]]
    index = ops.knn(centers, coord, group_size, query_offsets=segments.offsets(coord.device), offsets=offsets).index
    return SampledGroups(centers, torch.where(index < 0, index[:, :1], index), segments)


def resolve_indices(indices: int | list[int] | None, depth: int, what: str = "block") -> list[int]:
    """Turn the ``indices`` argument of ``forward_intermediates`` into numbers 0..depth-1 of its blocks, or of what else it counts.

    Raises:
        ConfigError: there is no such block (a ValueError; the programs, which hand indices on, show its message alone).
    """
    if indices is None:
        return list(range(depth))
    if isinstance(indices, int) and not 1 <= indices <= depth:
        raise ConfigError(f"indices: the last {indices} {what}s were asked for, but the backbone has {depth} (give 1..{depth}, or a list)")
    wanted = list(range(depth - indices, depth)) if isinstance(indices, int) else list(indices)
    for i in wanted:
        if not -depth <= i < depth:
            raise ConfigError(f"indices: {what} {i} does not exist; the backbone has {depth} {what}s (0..{depth - 1}, or -1 for the last)")
    return [i % depth for i in wanted]


@BACKBONES.register
def point_vit_tiny() -> PointViTConfig:
    """192 channels, 6 blocks, groups of 16 and a narrower token embedding: trains on a laptop."""
    return PointViTConfig(name="point_vit_tiny", dim=192, depth=6, heads=3, group_size=16, embed_widths=(64, 128, 256))


@BACKBONES.register
def point_vit_small() -> PointViTConfig:
    """384 channels, 12 blocks: the published Point-MAE encoder (22 M parameters)."""
    return PointViTConfig(name="point_vit_small")


@BACKBONES.register
def point_vit_base() -> PointViTConfig:
    """768 channels, 12 blocks: the width of ViT-B."""
    return PointViTConfig(name="point_vit_base", dim=768, heads=12)


def convert_reference_encoder(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the encoder weights of Point-MAE (``encoder.*``, ``pos_embed.*``, ``blocks.blocks.*``, ``norm.*``) to :class:`PointViT`'s.

    1x1 convolutions become linear layers; other names are left out.
    """
    renamed = {}
    for key, value in state.items():
        for old, new in _REFERENCE_NAMES.items():
            if key.startswith(old):
                renamed[new + key.removeprefix(old)] = value.squeeze(-1) if key.endswith("weight") and value.dim() == 3 else value
                break
    return renamed


_REFERENCE_NAMES = {
    "encoder.first_conv.0.": "embed.conv1.",
    "encoder.first_conv.1.": "embed.norm1.",
    "encoder.first_conv.3.": "embed.conv2.",
    "encoder.second_conv.0.": "embed.conv3.",
    "encoder.second_conv.1.": "embed.norm2.",
    "encoder.second_conv.3.": "embed.conv4.",
    "pos_embed.": "position.",
    "blocks.blocks.": "blocks.blocks.",
    "norm.": "norm.",
}
