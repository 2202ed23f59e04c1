"""Plain transformer over volumetric tokens of sparse events (the encoder of PoLAr-MAE).

Paper: Young et al., "Particle Trajectory Representation Learning with Masked Point Modeling", 2025, arXiv 2502.02558.

An event is a list of voxels with an energy each. Centres are chosen so that balls around them cover the event without crowding, however
many that takes; the points in a ball, in coordinates relative to its centre, become a token by a small PointNet; transformer blocks mix
the tokens, the code of their position added before every block. Points ``[M, 4]`` packed -> tokens ``[T, dim]``, as many as an event needs.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from geossl import ops
from geossl.errors import CheckpointError, ConfigError, unknown_name
from geossl.geometry import PackedPoints, Tokens
from geossl.layers import (
    TOKENIZERS,
    BatchRandom,
    BlockStack,
    PackedTokenEmbedding,
    PositionMLP,
    Segments,
    VolumeTokenizer,
    init_transformer_weights,
)
from geossl.layers.norm import make_norm
from geossl.models.factory import BACKBONES, FeatureInfo
from geossl.models.point_vit import packed_clouds, resolve_indices

DETECTOR_CENTER = 384.0
DETECTOR_SCALE = 2 / (768 * math.sqrt(3))  # brings the 768 voxel cube into the unit ball


@dataclass(frozen=True, kw_only=True)
class VolumePointViTConfig:
    """Numbers of a :class:`VolumePointViT`. Those of the tokens that are left at null are the preset's."""

    name: str = "point_vit_volume_small"
    """Registered variant the numbers started from."""
    dim: int = 384
    """Channels of a token."""
    depth: int = 12
    """Transformer blocks."""
    heads: int = 6
    """Attention heads; must divide dim."""
    in_channels: int = 4
    """Columns of a point: 3 coordinates (voxels), then features, the energy first."""
    embed_widths: tuple[int, int, int] = (128, 256, 512)
    """Hidden channels of the token embedding after its first, second and third layer."""
    mlp_ratio: float = 4.0
    """Hidden width of the MLPs over dim."""
    drop_path: float = 0.0
    """Stochastic depth of the last block, drawn for each token; grows linearly from 0 at the first. Published: 0.25."""
    attention_dropout: float = 0.0
    """Share of the attention weights dropped in training. Published: 0.05."""
    final_norm: bool = False
    """Normalise the output of the last block. The published encoder does not."""
    tokens: Literal["2.5", "5", "25"] = "5"
    """Published tokenizer preset, named for the radius of a token in voxels."""
    radius: float | None = None
    """Radius of a token in voxels."""
    overlap: float | None = None
    """Centres are at least 2 * radius * overlap apart."""
    max_neighbors: int | None = None
    """Neighbours the choice of centres looks at, see :class:`geossl.layers.VolumeTokenizer`."""
    seeds: int | None = None
    """Candidates for centres by farthest-point sampling, instead of all points."""
    ball_points: int | None = None
    """Points found in a ball at most, the first by row."""
    slots: int | None = None
    """Points a token keeps of those."""
    reduction: Literal["fps", "energy"] = "fps"
    """Which ones: spread out (farthest-point sampling), or those of highest energy."""
    mean_centers: bool | None = None
    """Replace a centre by the mean of its token's points (published with the preset "25")."""
    full_coverage: bool = False
    """Give points that are in no token (about a tenth of an event) to the nearest one."""
    exact_voxels: bool = True
    """Measure distances on the voxel indices, exactly. False, for official checkpoints: on the scaled float32 coordinates as published,
    where rounding decides whether a voxel at exactly the radius belongs to a token."""
    center: float = DETECTOR_CENTER
    """Subtracted from voxel indices before they are scaled: the middle of the detector."""
    scale: float = DETECTOR_SCALE
    """Factor on the centred voxel indices, for the code of a position."""
    norm: Literal["layer", "batchwide"] = "layer"
    """Norm of the blocks. "batchwide", for official checkpoints: one mean and deviation over all tokens of a batch, so that the features
    of an event depend on the others in its batch."""
    empty_slots: bool = False
    """For official checkpoints: let the unfilled slots of a token take part in the maxima of its embedding, as published."""

    def __post_init__(self) -> None:
        for key in ("dim", "depth", "heads"):
            if getattr(self, key) < 1:
                raise ConfigError(f"{key} must be at least 1, got {getattr(self, key)}")
        if len(self.embed_widths) != 3 or min(self.embed_widths) < 1:
            raise ConfigError(f"embed_widths must be three numbers of at least 1, got {self.embed_widths}")
        if self.dim % self.heads:
            raise ConfigError(f"heads must divide dim, got dim={self.dim} and heads={self.heads}")
        if self.in_channels < 3 + (self.reduction == "energy"):
            raise ConfigError(f"in_channels must be at least 3 (4 with reduction=energy), got {self.in_channels}")
        for key in ("drop_path", "attention_dropout"):
            if not 0 <= getattr(self, key) < 1:
                raise ConfigError(f"{key} must lie in [0, 1), got {getattr(self, key)}")
        if not self.scale > 0:
            raise ConfigError(f"scale must be positive, got {self.scale}")
        if self.norm not in ("layer", "batchwide"):
            raise unknown_name("norm", self.norm, ("layer", "batchwide"))
        if self.full_coverage and self.empty_slots:
            raise ConfigError(
                "full_coverage and empty_slots exclude each other: a token with left-over points has no fixed number of slots"
            )
        self.tokenizer()

    def tokenizer(self) -> VolumeTokenizer:
        """The tokenizer in voxels: the preset with the numbers given here."""
        if self.tokens not in TOKENIZERS:
            raise unknown_name("tokens", str(self.tokens), TOKENIZERS)
        names = ("radius", "overlap", "max_neighbors", "seeds", "ball_points", "slots")
        given: dict[str, Any] = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        return dataclasses.replace(TOKENIZERS[self.tokens], reduction=self.reduction, full_coverage=self.full_coverage, **given)

    def describe(self) -> str:
        """What comes out, in words."""
        return f"as many tokens as an event needs, balls of {self.tokenizer().radius:g} voxels, of {self.dim} channels"

    def build(self) -> VolumePointViT:
        """Create the backbone with fresh weights."""
        return VolumePointViT(self)


class VolumeGroups(NamedTuple):
    """A batch of events cut into tokens; the members of token t are the rows ``row_splits[t]:row_splits[t + 1]``, in slot order."""

    points: Tensor  # [S, in_channels]: (position - centre) / radius, in [-1, 1] (beyond for left-over points), then features
    index: Tensor  # type: ignore[assignment]  # [S] int64, rows of the packed input
    row_splits: Tensor  # [T + 1] int64
    centers: Tensor  # [T, 3], centred and scaled
    segments: Segments  # tokens of each event

    def token_of_row(self) -> Tensor:
        """Which token each member belongs to, ``[S]`` int64."""
        return ops.batch_from_offsets(self.row_splits, self.points.shape[0])


class VolumePointViT(nn.Module):
    """Transformer over volumetric tokens; see the module's docstring.

    Args:
        config: The numbers; the instance keeps it as ``config``.
    """

    def __init__(self, config: VolumePointViTConfig) -> None:
        super().__init__()
        self.config = config
        self.in_channels = config.in_channels
        self.num_features = config.dim
        self.feature_info = [FeatureInfo(f"blocks.{i}", config.dim) for i in range(config.depth)]
        self.tokenizer = config.tokenizer()
        # How features reach points, as published: from so many tokens, with this added to squared distances (in voxels).
        self.interpolation = 5, torch.finfo(torch.float32).eps / config.scale**2
        self.embed = PackedTokenEmbedding(
            config.dim,
            config.in_channels,
            widths=config.embed_widths,
            slots=2**31 - 1 if config.full_coverage else self.tokenizer.slots,  # left-over points may be many
            empty_slots=config.empty_slots,
        )
        self.position = PositionMLP(config.dim)
        self.blocks = self.block_stack(config.depth, config.heads, config.drop_path)
        self.norm = make_norm(config.norm, config.dim) if config.final_norm else nn.Identity()
        self.apply(init_transformer_weights)
        self._warned = False

    def block_stack(self, depth: int, heads: int, drop_path: float) -> BlockStack:
        """Blocks of this backbone's width and kind, for itself or for a decoder behind it."""
        config = self.config
        return BlockStack(
            config.dim,
            depth,
            heads,
            mlp_ratio=config.mlp_ratio,
            qkv_bias=True,
            norm=config.norm,
            attention_dropout=config.attention_dropout,
            drop_path=drop_path,
            drop_path_per="token",
        )

    @torch.no_grad()
    def group(self, points: PackedPoints | Tensor) -> VolumeGroups:
        """Cut events into tokens (:class:`geossl.layers.VolumeTokenizer`). Not differentiable.

        Args:
            points: Packed events with ``coord`` in voxels and the further columns in ``feats``, or ``[B, N, in_channels]``.

        Raises:
            ValueError: an event has no finite point, or the columns do not match ``in_channels``.
        """
        events = packed_clouds(points, self.in_channels)
        config, tokenizer = self.config, self.tokenizer
        coord = events.coord
        if events.feats is not None:  # points without coordinates are left out
            coord = coord.masked_fill(~events.feats.isfinite().all(1, keepdim=True), torch.nan)
        if not config.exact_voxels:
            coord, tokenizer = self.normalize(coord), tokenizer.scaled(config.scale)
        found = tokenizer(coord, events.offsets, None if events.feats is None else events.feats[:, 0])
        segments = Segments.from_offsets(found.offsets)
        if not segments.lengths or min(segments.lengths) == 0:
            empty = [i for i, n in enumerate(segments.lengths) if n == 0]
            raise ValueError(
                f"VolumePointViT: every event needs at least one finite point; event(s) {empty[:8]} of {len(segments.lengths)} have none"
            )
        position, centers = coord[found.index], coord[found.centers]
        if config.mean_centers if config.mean_centers is not None else config.tokens == "25":
            centers = ops.segment_reduce(position, found.row_splits, "mean")
        groups = VolumeGroups(position, found.index, found.row_splits, centers, segments)
        local = (position - centers[groups.token_of_row()]) / tokenizer.radius
        if events.feats is not None:
            local = torch.cat([local, events.feats[found.index]], 1)
        return groups._replace(points=local, centers=self.normalize(centers) if config.exact_voxels else centers)

    def normalize(self, coord: Tensor) -> Tensor:
        """Voxel indices ``[..., 3]`` as the position code sees them: centred and scaled."""
        return (coord - self.config.center) * self.config.scale

    def denormalize(self, centers: Tensor) -> Tensor:
        """The inverse of :meth:`normalize`."""
        return centers / self.config.scale + self.config.center

    def encode(
        self,
        groups: VolumeGroups,
        keep: Tensor | None = None,
        keep_segments: Segments | None = None,
        *,
        random: BatchRandom | None = None,
        intermediates: list[Tensor] | None = None,
    ) -> Tensor:
        """Embed tokens and run the blocks over those in ``keep`` only.

        Args:
            groups: From :meth:`group`.
            keep: Numbers of the tokens to encode, ``[V]`` ascending int64; None means all.
            keep_segments: How many of ``keep`` belong to each event; needed with ``keep``.
            random: Source of drop-path draws.
            intermediates: When given, every block's output is appended to it.

        Returns:
            ``[V, dim]``.
        """
        tokens = self.embed(groups.points, groups.row_splits, keep)
        centers = groups.centers if keep is None else groups.centers[keep]
        segments = groups.segments if keep_segments is None else keep_segments
        self._warn_of_batch(segments)
        return self.norm(self.blocks(tokens, self.position(centers), segments, random=random, intermediates=intermediates))

    def forward(self, points: PackedPoints | Tensor) -> Tokens:
        """Encode events.

        Args:
            points: Packed events with ``coord`` in voxels, or ``[B, N, in_channels]`` float32. Any NaN or infinite point is left out.

        Returns:
            Tokens of the last block with their centres in voxels.
        """
        groups = self.group(points)
        return self._tokens(self.encode(groups), groups)

    def forward_intermediates(
        self, points: PackedPoints | Tensor, indices: int | list[int] | None = None, *, norm: bool = True
    ) -> tuple[Tokens, list[Tensor]]:
        """Encode events and return the output of several blocks.

        Args:
            points: As in :meth:`forward`.
            indices: Blocks to return: a list (negative counts from the end), an int for the last so many, None for all.
            norm: Apply the final norm to each of them, where there is one.

        Returns:
            What :meth:`forward` returns, and the features ``[T, dim]`` of the chosen blocks, in the order asked for.
        """
        chosen = resolve_indices(indices, self.config.depth)
        collected: list[Tensor] = []
        groups = self.group(points)
        tokens = self._tokens(self.encode(groups, intermediates=collected), groups)
        return tokens, [self.norm(collected[i]) if norm else collected[i] for i in chosen]

    def attention_maps(self, groups: VolumeGroups, layer: int = -1) -> list[Tensor]:
        """The attention weights of one block between all tokens of each event.

        Args:
            groups: From :meth:`group`.
            layer: Block; negative counts from the end.

        Returns:
            For each event ``[heads, n, n]`` float32, the weights of each query (row) over the keys, without dropout.
        """
        (chosen,) = resolve_indices([layer], self.config.depth)
        outputs = [self.embed(groups.points, groups.row_splits)]
        position = self.position(groups.centers)
        self._warn_of_batch(groups.segments)
        self.blocks(outputs[0], position, groups.segments, intermediates=outputs)
        block: Any = self.blocks.blocks[chosen]
        return block.attn.weights(block.norm1(outputs[chosen] + position), groups.segments)

    def _tokens(self, feats: Tensor, groups: VolumeGroups) -> Tokens:
        return Tokens(feats, self.denormalize(groups.centers), groups.segments.offsets(groups.centers.device))

    def _warn_of_batch(self, segments: Segments) -> None:
        if self.config.norm == "batchwide" and not self.training and len(segments.lengths) > 1 and not self._warned:
            self._warned = True
            warnings.warn(
                f'this model normalises over the whole batch (norm="batchwide", as its official checkpoint needs): the features of each of '
                f"these {len(segments.lengths)} events depend on the others. Give it one event at a time for features that do not.",
                stacklevel=3,
            )

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that are not decayed beyond the 1-D ones: none."""
        return set()

    def layer_groups(self) -> list[list[str]]:
        """Parameter name prefixes from input to output, for layer-wise learning-rate decay."""
        return [["embed.", "position."], *([f"blocks.blocks.{i}."] for i in range(self.config.depth)), ["norm."]]

    def set_grad_checkpointing(self, enabled: bool = True) -> None:
        """Recompute block activations in the backward pass instead of storing them."""
        self.blocks.grad_checkpointing = enabled


@BACKBONES.register
def point_vit_volume_tiny() -> VolumePointViTConfig:
    """192 channels, 6 blocks and a narrower token embedding: trains on a laptop."""
    return VolumePointViTConfig(name="point_vit_volume_tiny", dim=192, depth=6, heads=3, embed_widths=(64, 128, 256))


@BACKBONES.register
def point_vit_volume_small() -> VolumePointViTConfig:
    """384 channels, 12 blocks: the published PoLAr-MAE encoder (22 M parameters)."""
    return VolumePointViTConfig(name="point_vit_volume_small")


@BACKBONES.register
def point_vit_volume_base() -> VolumePointViTConfig:
    """768 channels, 12 blocks: the width of ViT-B."""
    return VolumePointViTConfig(name="point_vit_volume_base", dim=768, heads=12)


# Official checkpoints ---------------------------------------------------------------------------------------------------------------------


def convert_reference_encoder(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the encoder weights of PoLAr-MAE (``transformer.*``, ``tokenizer.embedding.*``, ``pos_embed.*``) to :class:`VolumePointViT`'s.

    1x1 convolutions become linear layers; names it does not know are kept, to be reported as unexpected.
    """
    return convert_names(state, _REFERENCE_NAMES)


def convert_names(state: Mapping[str, Tensor], names: Mapping[str, str]) -> dict[str, Tensor]:
    """Rename by prefix (the first that fits), and give weights the shapes of linear layers and vectors."""
    converted = {}
    for key, value in state.items():
        old = next((old for old in names if key.startswith(old)), None)
        renamed = key if old is None else names[old] + key.removeprefix(old)
        renamed = renamed.replace(".gamma", ".weight").replace(".beta", ".bias")
        vector = key.endswith((".gamma", ".beta"))
        converted[renamed] = value.reshape(-1) if vector else value.squeeze(-1) if value.dim() == 3 else value
        if renamed.endswith(".running_var"):  # counted by our batch norms alone
            converted[renamed.replace("running_var", "num_batches_tracked")] = torch.tensor(0)
    return converted


def embedding_names(prefix: str, ours: str) -> dict[str, str]:
    """Prefixes of a published mini-PointNet's weights and ours."""
    return {
        f"{prefix}first_conv.0.": f"{ours}conv1.",
        f"{prefix}first_conv.1.": f"{ours}norm1.",
        f"{prefix}first_conv.3.": f"{ours}conv2.",
        f"{prefix}second_conv.0.": f"{ours}conv3.",
        f"{prefix}second_conv.1.": f"{ours}norm2.",
        f"{prefix}second_conv.3.": f"{ours}conv4.",
        f"{prefix}position_encoder.time_embed.1.": f"{ours}slot_linear.",
    }


_REFERENCE_NAMES = {
    **embedding_names("tokenizer.embedding.", "embed."),
    "pos_embed.pos_enc.": "position.",
    "transformer.blocks.": "blocks.blocks.",
    "transformer.norm.": "norm.",
}


def reference_encoder_config(encoder: Mapping[str, Tensor], config: Mapping[str, Any]) -> VolumePointViTConfig:
    """The parity configuration of a converted encoder.

    Args:
        encoder: Converted weights, from which widths and depths are read.
        config: What they cannot tell, where other than released: ``heads``, ``center`` and ``scale`` of the coordinates, and under ``tok``
            the published grouping keys (``group_radius`` in scaled coordinates, ``overlap_factor``, ``num_groups`` or ``num_init_groups``,
            ``group_upscale_points``, ``group_max_points``, ``reduction_method``, ``use_fps_seed``, ``normalize_group_centers``).
    """
    grouping = dict(config.get("tok") or {})
    scale = float(config.get("scale", DETECTOR_SCALE))
    cap = grouping.get("num_init_groups", grouping.get("num_groups", 256))
    seeded = bool(grouping.get("use_fps_seed", False))
    needed = ("position.2.bias", "blocks.blocks.0", *(f"embed.conv{i}.weight" for i in (1, 2, 3)))
    if missing := [name for name in needed if not any(key.startswith(name) for key in encoder)]:
        raise CheckpointError(
            f"not an encoder of PoLAr-MAE: {', '.join(missing)} (in this package's names) missing; found {sorted(encoder)[:8]}"
        )
    return VolumePointViTConfig(
        dim=encoder["position.2.bias"].shape[0],
        depth=1 + max(int(key.split(".")[2]) for key in encoder if key.startswith("blocks.blocks.")),
        heads=config.get("heads", 6),
        in_channels=encoder["embed.conv1.weight"].shape[1],
        embed_widths=tuple(encoder[f"embed.conv{i}.weight"].shape[0] for i in (1, 2, 3)),  # type: ignore[arg-type]
        drop_path=0.25,
        attention_dropout=0.05,
        final_norm="norm.weight" in encoder,
        radius=grouping["group_radius"] / scale if "group_radius" in grouping else None,
        overlap=grouping.get("overlap_factor"),
        max_neighbors=None if seeded else cap,
        seeds=cap if seeded else None,
        ball_points=grouping.get("group_upscale_points"),
        slots=grouping.get("group_max_points"),
        reduction=grouping.get("reduction_method", "fps"),
        mean_centers=bool(grouping.get("normalize_group_centers", False)),
        exact_voxels=False,
        center=float(config.get("center", DETECTOR_CENTER)),
        scale=scale,
        norm="batchwide",
        empty_slots=True,
    )
