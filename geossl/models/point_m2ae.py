"""Transformer over groups of points at several scales (the encoder of Point-M2AE and I2P-MAE).

Papers: Zhang et al., "Point-M2AE: Multi-scale Masked Autoencoders for Hierarchical Point Cloud Pre-training", NeurIPS 2022, arXiv
2205.14401; Zhang et al., "Learning 3D Representations from 2D Pre-trained Models via Image-to-Point Masked Autoencoders", CVPR 2023, arXiv
2212.06785.

The points are grouped around farthest-point centres, those centres again around fewer of them, and so on. At the finest scale a small
PointNet makes each group of points a token; transformer blocks mix the tokens; at every further scale another small PointNet merges the
tokens of each group into one. Points ``[B, N, 3 + C]`` or packed -> a pyramid of tokens, finest scale first.

The published code pads the visible tokens of a batch to the longest sample. Here they are packed, so that no sample feels another; what
its checkpoints need of the published behaviour is an option of the configuration (``min_sq_norm``, ``first_token_visible``,
``drop_uncovered``, ``padding_attended``), which :func:`geossl.load_reference` switches on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from geossl import ops
from geossl.errors import ConfigError
from geossl.geometry import PackedPoints, Tokens
from geossl.layers import BatchRandom, BlockStack, PointTokenEmbedding, PositionMLP, Segments, init_transformer_weights
from geossl.models.factory import BACKBONES, FeatureInfo
from geossl.models.point_vit import packed_clouds, resolve_indices, sample_groups


@dataclass(frozen=True, kw_only=True)
class PointM2AEEncoderConfig:
    """Numbers of a :class:`PointM2AEEncoder`; those in tuples have one entry for each scale, finest first."""

    name: str = "point_m2ae_small"
    """Registered variant the numbers started from."""
    dims: tuple[int, ...] = (96, 192, 384)
    """Channels of a token."""
    depths: tuple[int, ...] = (5, 5, 5)
    """Transformer blocks."""
    heads: int = 6
    """Attention heads at every scale; must divide all dims."""
    groups: tuple[int, ...] = (512, 256, 64)
    """Tokens per cloud (fewer when a cloud has fewer points)."""
    group_sizes: tuple[int, ...] = (16, 8, 8)
    """Points of a token at the finest scale; at the others, tokens of the scale before that are merged into one."""
    local_radius: tuple[float, ...] = (0.0, 0.0, 0.0)
    """A token attends to those closer than this; 0 for all. The papers fine-tune with 0.32, 0.64, 1.28."""
    in_channels: int = 3
    """Columns of a point: 3 coordinates, then features such as a normal (3) and a colour (3)."""
    embed_widths: tuple[int, int, int] = (128, 256, 512)
    """Hidden channels of the finest scale's token embedding after its first, second and third layer."""
    mlp_ratio: float = 4.0
    """Hidden width of the MLPs over the channels."""
    drop_path: float = 0.0
    """Stochastic depth of the last block of the last scale; grows linearly from 0 at the first of the first. Published: 0.1."""
    min_sq_norm: float | None = None
    """For official checkpoints, 1e-3: points and centres whose squared norm is at most this are never chosen as centres."""
    first_token_visible: bool = False
    """For official checkpoints: as soon as any token is hidden at a scale, token 0 of the first cloud of the batch is visible at the
    next finer one, whatever it belongs to."""
    drop_uncovered: bool = False
    """For official checkpoints: features are extracted without the finer tokens that belong to no coarser one, as the published linear
    probe does."""
    padding_attended: bool = False
    """For official checkpoints of Point-M2AE: local_radius does not keep tokens apart. Instead tokens closer to the origin than it attend
    to the padding of their sample, so that features depend on which clouds share a batch."""

    def __post_init__(self) -> None:
        for key in ("dims", "depths", "groups", "group_sizes"):
            values = getattr(self, key)
            if len(values) != len(self.dims) or not values or min(values) < 1:
                raise ConfigError(f"{key} must be one number of at least 1 for each of the {len(self.dims)} scales of dims, got {values}")
        if len(self.local_radius) != len(self.dims) or min(self.local_radius) < 0:
            raise ConfigError(
                f"local_radius must be one number of at least 0 for each of the {len(self.dims)} scales, got {self.local_radius}"
            )
        if list(self.groups) != sorted(self.groups, reverse=True):
            raise ConfigError(f"groups must not grow from one scale to the next coarser one, got {self.groups}")
        if self.heads < 1 or any(dim % self.heads for dim in self.dims):
            raise ConfigError(f"heads must divide all dims, got dims={self.dims} and heads={self.heads}")
        if len(self.embed_widths) != 3 or min(self.embed_widths) < 1:
            raise ConfigError(f"embed_widths must be three numbers of at least 1, got {self.embed_widths}")
        if self.in_channels < 3:
            raise ConfigError(f"in_channels must be at least 3 (the coordinates), got {self.in_channels}")
        if not 0 <= self.drop_path < 1:
            raise ConfigError(f"drop_path must lie in [0, 1), got {self.drop_path}")

    def describe(self) -> str:
        """What comes out, in words."""
        return f"{', '.join(map(str, self.groups))} tokens of {', '.join(map(str, self.dims))} channels"

    def build(self) -> PointM2AEEncoder:
        """Create the backbone with fresh weights."""
        return PointM2AEEncoder(self)


class Scale(NamedTuple):
    """The tokens of one scale of a batch of clouds."""

    centers: Tensor  # [T, 3]
    index: Tensor  # type: ignore[assignment]  # [T, K] int64: rows of the points, or of the next finer scale's tokens; nearest first
    segments: Segments  # tokens of each cloud
    members: Tensor  # [T, K, 3]: coordinates of those relative to the centre (at the finest scale all columns of the points)


class VisibleTokens(NamedTuple):
    """Encoded tokens of one scale."""

    feats: Tensor  # [V, C]
    rows: Tensor  # [V] int64, which tokens of the scale
    segments: Segments  # how many of each cloud


class PointM2AEEncoder(nn.Module):
    """Transformer over point groups at several scales; see the module's docstring.

    Args:
        config: The numbers; the instance keeps it as ``config``.
    """

    def __init__(self, config: PointM2AEEncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.in_channels = config.in_channels
        self.num_features = config.dims[-1]
        self.feature_info = [FeatureInfo(f"norms.{i}", dim) for i, dim in enumerate(config.dims)]
        finer = [(config.in_channels, config.embed_widths), *((dim, (dim, dim, wide)) for dim, wide in pairwise(config.dims))]
        self.embeds = nn.ModuleList(
            PointTokenEmbedding(dim, columns, widths=widths) for dim, (columns, widths) in zip(config.dims, finer, strict=True)
        )
        self.positions = nn.ModuleList(PositionMLP(dim, dim) for dim in config.dims)
        self.blocks = block_stacks(config.dims, config.depths, config.heads, config.drop_path, config.mlp_ratio)
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for dim in config.dims)
        self.apply(init_transformer_weights)

    @torch.no_grad()
    def group(self, points: PackedPoints | Tensor) -> list[Scale]:
        """Cut clouds into groups, and the centres of those into groups, up to the coarsest scale. Not differentiable.

        A cloud with fewer points than tokens gives one token per point; one with fewer than ``group_sizes`` repeats each group's nearest.

        Args:
            points: Packed clouds whose ``feats`` hold the columns after the coordinates, or ``[B, N, in_channels]``.

        Returns:
            The scales, finest first.

        Raises:
            ValueError: a cloud has no finite point, or the columns do not match ``in_channels``.
        """
        clouds, config = packed_clouds(points, self.in_channels), self.config
        coord, offsets, feats = clouds.coord, clouds.offsets, clouds.feats
        scales: list[Scale] = []
        with torch.autocast(coord.device.type, enabled=False):
            for groups, size in zip(config.groups, config.group_sizes, strict=True):
                found = sample_groups(coord, offsets, groups, size, config.min_sq_norm)
                members = ops.group_relative(coord, found.centers, found.index, feats)
                scales.append(Scale(*found, members))
                coord, offsets, feats = found.centers, found.segments.offsets(coord.device), None
        return scales

    def propagate_mask(self, scales: Sequence[Scale], hidden: Tensor) -> list[Tensor]:
        """Hide at every finer scale the tokens that belong to no visible token of the next coarser one (Point-M2AE section 3.2).

        Args:
            scales: From :meth:`group`.
            hidden: Hidden tokens of the coarsest scale, ``[T]`` bool.

        Returns:
            Hidden tokens of every scale, ``[T]`` bool, finest first.
        """
        masks = [hidden]
        for finer, scale in zip(scales[-2::-1], scales[:0:-1], strict=True):
            finer_hidden = hidden.new_ones(len(finer.centers))
            finer_hidden[scale.index[~hidden].flatten()] = False
            if self.config.first_token_visible:
                finer_hidden[:1] &= ~hidden.any()
            hidden = finer_hidden
            masks.append(hidden)
        return masks[::-1]

    def encode(
        self, scales: Sequence[Scale], hidden: Sequence[Tensor] | None = None, *, random: BatchRandom | None = None, norm: bool = True
    ) -> list[VisibleTokens]:
        """Run all scales over their visible tokens only.

        Args:
            scales: From :meth:`group`.
            hidden: Hidden tokens of every scale, from :meth:`propagate_mask`; None means none. They count in the batch statistics of the
                embeddings in training, and nowhere else.
            random: Source of drop-path draws.
            norm: Apply each scale's norm to its output (not to what the next scale gets).

        Returns:
            The visible tokens of every scale, finest first.
        """
        encoded: list[VisibleTokens] = []
        finer, distances = torch.empty(0), None
        for i, scale in enumerate(scales):
            visible, grid, rows = self._embed(i, scale, finer, None if hidden is None else hidden[i])
            segments = scale.segments if hidden is None else scale.segments.count(~hidden[i])
            centers, radius = scale.centers[rows], self.config.local_radius[i]
            if self.config.padding_attended and radius > 0:
                visible, distances = self._attend_padding(i, visible, centers, segments, distances, random)
            else:
                masks = near_masks(centers, segments, radius)
                visible = self.blocks[i](visible, self.positions[i](centers), segments, random=random, masks=masks)
            finer = grid.index_copy(0, rows, visible.to(grid.dtype))
            encoded.append(VisibleTokens(self.norms[i](visible) if norm else visible, rows, segments))
        return encoded

    def _embed(self, i: int, scale: Scale, finer: Tensor, hidden: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Visible tokens of scale ``i`` before its blocks, the grid of all tokens that they are written into afterwards, and where.

        Training makes the hidden ones too: the batch statistics count them, and at the next scale what they are merged into. Where they
        are not read, the grid holds zeros.
        """
        count, device, last = len(scale.centers), scale.centers.device, i == len(self.embeds) - 1
        rows = torch.arange(count, device=device) if hidden is None else (~hidden).nonzero()[:, 0]
        made = slice(None) if self.training or hidden is None else rows
        members = scale.members[made] if i == 0 else ops.group(finer, scale.index[made])
        if hidden is None or (self.training and not last):
            grid = self.embeds[i](members)
            return grid if hidden is None else grid[rows], grid, rows
        visible = self.embeds[i](members, rows if self.training else None)
        return visible, visible.new_zeros(count, visible.shape[1]), rows

    def _attend_padding(
        self, i: int, visible: Tensor, centers: Tensor, segments: Segments, distances: Tensor | None, random: BatchRandom | None
    ) -> tuple[Tensor, Tensor]:
        """Run the blocks of scale ``i`` over samples padded with zeros to the longest one, as published with a radius.

        No pair of tokens is masked, but every one where padding takes part and which is at least the radius apart, padding lying at the
        origin. The distances of the scale before are used again where it was padded to the same length.
        """
        samples, longest = len(segments.lengths), max(segments.lengths)
        real = torch.arange(longest, device=centers.device) < torch.tensor(segments.lengths, device=centers.device)[:, None]
        place = real.flatten().nonzero()[:, 0]
        padded = visible.new_zeros(samples * longest, visible.shape[1]).index_copy(0, place, visible)
        padded_centers = centers.new_zeros(samples * longest, 3).index_copy(0, place, centers)
        if distances is None or distances.shape[1] != longest:
            padded_view = padded_centers.view(samples, longest, 3)
            distances = torch.cdist(padded_view, padded_view)
        masks = (distances < self.config.local_radius[i]) | (real[:, :, None] & real[:, None])
        mixed = self.blocks[i](padded, self.positions[i](padded_centers), Segments((longest,) * samples), random=random, masks=list(masks))
        return mixed[place], distances

    def forward_pyramid(self, points: PackedPoints | Tensor) -> list[Tokens]:
        """Encode clouds and return the normalised tokens of every scale with their centres, finest first.

        Args:
            points: Packed clouds, or ``[B, N, in_channels]`` float32. Any NaN or infinite point is left out.
        """
        return self._features(points, norm=True)

    def forward(self, points: PackedPoints | Tensor) -> Tokens:
        """Encode clouds and return the normalised tokens of the coarsest scale with their centres; see :meth:`forward_pyramid`."""
        return self.forward_pyramid(points)[-1]

    def forward_intermediates(
        self, points: PackedPoints | Tensor, indices: int | list[int] | None = None, *, norm: bool = True
    ) -> tuple[Tokens, list[Tensor]]:
        """Encode clouds and return the output of several scales. Where their tokens are, :meth:`forward_pyramid` tells.

        Args:
            points: As in :meth:`forward_pyramid`.
            indices: Scales to return: a list (negative counts from the coarsest), an int for the coarsest so many, None for all.
            norm: Apply each scale's norm to its tokens.

        Returns:
            What :meth:`forward` returns, and the features ``[T, C]`` of the chosen scales, in the order asked for.
        """
        chosen = resolve_indices(indices, len(self.config.dims), "scale")
        pyramid = self._features(points, norm=False)
        features = [self.norms[i](pyramid[i].feats) if norm else pyramid[i].feats for i in chosen]
        coarsest = pyramid[-1]
        return Tokens(self.norms[-1](coarsest.feats), coarsest.centers, coarsest.offsets), features

    def _features(self, points: PackedPoints | Tensor, norm: bool) -> list[Tokens]:
        scales = self.group(points)
        hidden = None
        if self.config.drop_uncovered:
            hidden = self.propagate_mask(scales, torch.zeros_like(scales[-1].index[:, 0], dtype=torch.bool))
        encoded = self.encode(scales, hidden, norm=norm)
        return [
            Tokens(tokens.feats, scale.centers[tokens.rows], tokens.segments.offsets(scale.centers.device))
            for tokens, scale in zip(encoded, scales, strict=True)
        ]

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that are not decayed beyond the 1-D ones: none; the published rule is an option of the method."""
        return set()

    def layer_groups(self) -> list[list[str]]:
        """Parameter name prefixes from input to output, for layer-wise learning-rate decay."""
        groups = []
        for i, depth in enumerate(self.config.depths):
            groups += [[f"embeds.{i}.", f"positions.{i}."], *([f"blocks.{i}.blocks.{j}."] for j in range(depth))]
        return [*groups, ["norms."]]

    def set_grad_checkpointing(self, enabled: bool = True) -> None:
        """Recompute block activations in the backward pass instead of storing them."""
        set_stacks_checkpointing(self.blocks, enabled)


def block_stacks(dims: Sequence[int], depths: Sequence[int], heads: int, drop_path: float, mlp_ratio: float = 4.0) -> nn.ModuleList:
    """Blocks of every stage, stochastic depth growing linearly from 0 at the first block of the first to the last of the last."""
    rates = torch.linspace(0, drop_path, sum(depths)).tolist()
    ends = list(accumulate(depths))
    return nn.ModuleList(
        BlockStack(dim, depth, heads, mlp_ratio=mlp_ratio, drop_path=rates[end - depth : end])
        for dim, depth, end in zip(dims, depths, ends, strict=True)
    )


def set_stacks_checkpointing(stacks: nn.ModuleList, enabled: bool) -> None:
    """Recompute the activations of all blocks of :func:`block_stacks` in the backward pass."""
    for stack in stacks:
        stack.grad_checkpointing = enabled  # type: ignore[assignment]


def near_masks(centers: Tensor, segments: Segments, radius: float) -> list[Tensor] | None:
    """For each sample which of its tokens lie closer together than ``radius``, bool ``[n, n]``; None for radius 0: no limit.

    Args:
        centers: ``[T, 3]`` packed by ``segments``.
        segments: Tokens of each sample.
        radius: In the units of the centres.
    """
    if radius <= 0:
        return None
    exact = "donot_use_mm_for_euclid_dist"  # differences first: the same on every device, and 0 on the diagonal
    return [torch.cdist(part, part, compute_mode=exact) < radius for part in centers.split(list(segments.lengths))]


@BACKBONES.register
def point_m2ae_tiny() -> PointM2AEEncoderConfig:
    """128, 64 and 16 tokens of 48, 96 and 192 channels, two blocks each: trains on a laptop."""
    return PointM2AEEncoderConfig(
        name="point_m2ae_tiny", dims=(48, 96, 192), depths=(2, 2, 2), heads=3, groups=(128, 64, 16), embed_widths=(32, 64, 128)
    )


@BACKBONES.register
def point_m2ae_small() -> PointM2AEEncoderConfig:
    """512, 256 and 64 tokens of 96, 192 and 384 channels, five blocks each: the published encoder (12.7 M parameters)."""
    return PointM2AEEncoderConfig(name="point_m2ae_small")


def convert_reference_encoder(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the encoder weights of Point-M2AE and I2P-MAE (``h_encoder.*``) to :class:`PointM2AEEncoder`'s; others are left out.

    1x1 convolutions become linear layers. The older released files, which say ``MAE_encoder.blocks``, are understood.
    """
    renamed = {}
    for key, value in state.items():
        if key.startswith("MAE_encoder.blocks."):
            key = "h_encoder.encoder_blocks." + key.removeprefix("MAE_encoder.blocks.")
        part, _, rest = key.removeprefix("h_encoder.").partition(".")
        if not key.startswith("h_encoder.") or part not in _REFERENCE_NAMES:
            continue
        for old, new in _EMBED_NAMES.items() if part == "token_embed" else ():
            rest = rest.replace(old, new)
        renamed[f"{_REFERENCE_NAMES[part]}.{rest}"] = value.squeeze(-1) if value.dim() == 3 else value
    return renamed


def reference_encoder_config(
    encoder: Mapping[str, Tensor], config: Mapping[str, Any], *, fine_tuned: bool = False
) -> PointM2AEEncoderConfig:
    """The parity configuration of a converted encoder: widths and depths are the weights', the rest is ``config``'s or as released.

    Args:
        encoder: From :func:`convert_reference_encoder`.
        config: The ``model`` section of the published configuration: ``num_groups``, ``group_sizes``, ``local_radius``, ``num_heads``,
            ``drop_path_rate``.
        fine_tuned: Whether the weights are of a fine-tuned model, which sees every token and for which ``local_radius`` keeps tokens apart.
    """
    scales = 1 + max(int(key.split(".")[1]) for key in encoder if key.startswith("embeds."))
    blocks = [{int(key.split(".")[3]) for key in encoder if key.startswith(f"blocks.{i}.")} for i in range(scales)]
    first = encoder["embeds.0.conv1.weight"]
    return PointM2AEEncoderConfig(
        name="point_m2ae_small",
        dims=tuple(encoder[f"embeds.{i}.conv4.weight"].shape[0] for i in range(scales)),
        depths=tuple(map(len, blocks)),
        heads=config.get("num_heads", 6),
        groups=tuple(config.get("num_groups", (512, 256, 64))),
        group_sizes=tuple(config.get("group_sizes", (16, 8, 8))),
        local_radius=tuple(map(float, config.get("local_radius", (0.32, 0.64, 1.28)))),
        in_channels=first.shape[1],
        embed_widths=(first.shape[0], encoder["embeds.0.conv2.weight"].shape[0], encoder["embeds.0.conv3.weight"].shape[0]),
        drop_path=config.get("drop_path_rate", 0.1),
        min_sq_norm=1e-3,
        first_token_visible=not fine_tuned,
        drop_uncovered=not fine_tuned,
        padding_attended=not fine_tuned,
    )


_REFERENCE_NAMES = {"token_embed": "embeds", "encoder_pos_embeds": "positions", "encoder_blocks": "blocks", "encoder_norms": "norms"}
_EMBED_NAMES = {
    "first_conv.0.": "conv1.",
    "first_conv.1.": "norm1.",
    "first_conv.3.": "conv2.",
    "second_conv.0.": "conv3.",
    "second_conv.1.": "norm2.",
    "second_conv.3.": "conv4.",
}
