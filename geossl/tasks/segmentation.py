"""Semantic segmentation of particle events: a class for every point, from the tokens of a volume backbone.

Paper: Young, Jwa, Terao, "Particle Trajectory Representation Learning with Masked Point Modeling", 2025, arXiv 2502.02558, the
fine-tuning section. Three hidden layers of the encoder are normalised and averaged; every point takes the weighted mean of its five
nearest tokens beside its own position, goes through a small MLP, meets the maximum and the mean of its event's tokens, and is
classified. Events stay packed throughout: padding exists nowhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from geossl import ops
from geossl.config import require
from geossl.errors import CheckpointError, ConfigError, unknown_name
from geossl.geometry import Output, PackedPoints, PointBatch, rotate_each
from geossl.layers import BatchNorm, BatchRandom, BlockStack, Segments, init_transformer_weights
from geossl.layers.norm import make_norm
from geossl.methods.polar_mae import ROTATIONS, draw_rotations, rotate_groups
from geossl.models.point_vit_volume import (
    VolumeGroups,
    VolumePointViT,
    VolumePointViTConfig,
    convert_names,
    convert_reference_encoder,
    reference_encoder_config,
)
from geossl.tasks.registry import TASKS

# Added to squared distances of normalised positions before they are inverted: the rounding unit of float32, as published.
_EPS = 1.1920929e-07


@dataclass(frozen=True, kw_only=True)
class SegmentationConfig:
    """Numbers of :class:`Segmentation`. The defaults are the published ones."""

    name: str = "segmentation"
    """Registered task."""
    classes: int = 0
    """Number of classes; 0 means: as many as the data set has."""
    layers: tuple[int, ...] = (3, 7, 11)
    """Encoder blocks whose outputs are averaged (from 0; negative ones count from the end). Those behind the deepest are not trained."""
    hidden: int = 512
    """Width of the head's first layer; its second has half of it."""
    dropout: float = 0.5
    """Dropout between the head's first and second layer."""
    neighbors: int = 5
    """Tokens each point takes its features from."""
    global_features: bool = True
    """Show the head the maximum and the mean over the event's tokens as well."""
    decoder_depth: int = 0
    """Blocks of a decoder on the last hidden layer, which then replaces the averaged layers and the global features; 0 has none."""
    freeze: Literal["none", "encoder", "encoder_published"] = "none"
    """`none` trains everything. `encoder` trains upsampling and head on an encoder in evaluation mode; `encoder_published` does so with
    its drop path on and its batch statistics moving on, as the published comparison does."""
    gamma: float = 2.0
    """Exponent of the focal loss (Lin et al., ICCV 2017): how much less points count that are right already; 0 is cross-entropy."""
    class_weights: tuple[float, ...] = ()
    """Factor on the loss of each class. None given: 1, and in `geossl finetune` (all points) / (points of the class), counted on the
    training events."""
    rotation: Literal["none", "event", "batch"] = "event"
    """Random rotation in training: of every event for itself, uniformly; or, as published, one for the batch, of uniform Euler angles."""
    absent_neighbors_first: bool = False
    """Published quirk: in an event with fewer tokens than `neighbors`, the missing ones count as its first token at distance 0, which
    drowns the others. False leaves them out."""

    def __post_init__(self) -> None:
        for key in ("hidden", "neighbors"):
            require(getattr(self, key) >= 1, key, "must be at least 1", getattr(self, key))
        for key in ("classes", "decoder_depth", "gamma"):
            require(getattr(self, key) >= 0, key, "must not be negative", getattr(self, key))
        for key, choices in (("freeze", ("none", "encoder", "encoder_published")), ("rotation", ROTATIONS)):
            if getattr(self, key) not in choices:
                raise unknown_name(key, getattr(self, key), choices)
        require(self.hidden % 2 == 0, "hidden", "must be even (the second layer has half of it)", self.hidden)
        require(0 <= self.dropout < 1, "dropout", "must lie in [0, 1)", self.dropout)
        require(len(self.layers) > 0, "layers", "must name at least one block", self.layers)
        weights = self.class_weights
        require(all(0 <= weight < float("inf") for weight in weights), "class_weights", "must be finite and not negative", weights)
        if self.classes and weights:
            require(len(weights) == self.classes, "class_weights", f"must be one number for each of the {self.classes} classes", weights)

    def build(self, backbone: nn.Module) -> Segmentation:
        """Create the task around ``backbone`` with a fresh head."""
        if not isinstance(backbone, VolumePointViT):
            raise ConfigError(f"task segmentation needs a point_vit_volume_* backbone, got {type(backbone).__name__}")
        if self.classes < 2:
            raise ConfigError(f"classes must be at least 2, got {self.classes}")
        depth = backbone.config.depth
        wrong = [i for i in self.layers if not -depth <= i < depth]
        if wrong and not self.decoder_depth:
            raise ConfigError(f"layers: block {wrong[0]} does not exist; the backbone has {depth} (0..{depth - 1}, or -1 for the last)")
        return Segmentation(self, backbone)


class PointHead(nn.Module):
    """Classifies points by the tokens around them.

    The published network is ``MLP([position, interpolated token])``, then ``MLP([that, global features])``. Its first layers are linear
    in what all points of a token's neighbourhood, or of an event, share; so that part is computed once a token, or once an event.

    Args:
        dim: Channels of a token.
        classes: Classes to tell apart.
        hidden: Width of the first layer of the head; the second has half of it.
        global_dim: Channels of an event's global features; 0 for none.
        dropout: Between the head's first and second layer.
        neighbors: Tokens each point takes its features from.
        absent_neighbors_first: See :class:`SegmentationConfig`.
    """

    def __init__(
        self, dim: int, classes: int, *, hidden: int, global_dim: int, dropout: float, neighbors: int, absent_neighbors_first: bool
    ) -> None:
        super().__init__()
        self.neighbors, self.absent_neighbors_first = neighbors, absent_neighbors_first
        self.up1 = nn.Linear(3 + dim, dim, bias=False)
        self.up_norm1 = BatchNorm(dim, biased_running_var=True)
        self.up2 = nn.Linear(dim, dim, bias=False)
        self.up_norm2 = BatchNorm(dim, biased_running_var=True)
        self.conv1 = nn.Linear(dim + global_dim, hidden, bias=False)
        self.norm1 = BatchNorm(hidden, biased_running_var=True)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Linear(hidden, hidden // 2, bias=False)
        self.norm2 = BatchNorm(hidden // 2, biased_running_var=True)
        self.conv3 = nn.Linear(hidden // 2, classes)

    def upsample(self, coord: Tensor, offsets: Tensor, feats: Tensor, centers: Tensor, token_offsets: Tensor) -> Tensor:
        """Carry token features to points.

        Args:
            coord: Normalised positions of the points, ``[M, 3]``.
            offsets: Events of the points, ``[B + 1]`` int64.
            feats: Tokens, ``[T, dim]``.
            centers: Normalised positions of the tokens, ``[T, 3]``.
            token_offsets: Events of the tokens, ``[B + 1]`` int64.

        Returns:
            ``[M, dim]``; differentiable in ``feats``. Zero tokens give zero interpolated features.
        """
        index, weight = self.token_weights(coord, offsets, centers, token_offsets)
        with torch.autocast(coord.device.type, enabled=False):  # neighbouring voxels are one point in bfloat16
            from_position = F.linear(coord, self.up1.weight[:, :3])
        from_tokens = F.linear(feats, self.up1.weight[:, 3:])
        x = from_position + ops.interpolate(from_tokens, index, weight).float()
        x = F.relu(self.up_norm1(x))
        return F.relu(self.up_norm2(self.up2(x)))

    @torch.no_grad()
    def token_weights(self, coord: Tensor, offsets: Tensor, centers: Tensor, token_offsets: Tensor) -> tuple[Tensor, Tensor]:
        """The nearest tokens of each point and their shares: rows of ``centers`` (-1 for none) and weights, both ``[M, neighbors]``."""
        near = ops.knn(coord, centers, self.neighbors, query_offsets=offsets, offsets=token_offsets)
        index, distance = near.index, near.distance
        if self.absent_neighbors_first:
            first = token_offsets[:-1].repeat_interleave(offsets.diff())[:, None]
            occupied = (token_offsets.diff() > 0).repeat_interleave(offsets.diff())[:, None]
            absent = (index < 0) & occupied
            index, distance = torch.where(absent, first, index), torch.where(absent, 0.0, distance)
        weight = 1 / (distance + _EPS)  # of an absent token: 1 / inf
        total = weight.sum(1, keepdim=True)
        return index, weight / torch.where(total > 0, total, 1.0)

    def forward(self, x: Tensor, offsets: Tensor, global_features: Tensor | None) -> Tensor:
        """Score the classes.

        Args:
            x: From :meth:`upsample`, ``[M, dim]``.
            offsets: Events of the points, ``[B + 1]`` int64.
            global_features: ``[B, global_dim]``, or None where the head was made without.

        Returns:
            Logits ``[M, classes]`` float32.
        """
        hidden = linear_with_shared(self.conv1, x, global_features, offsets)
        hidden = self.dropout(F.relu(self.norm1(hidden)))
        return self.conv3(F.relu(self.norm2(self.conv2(hidden)))).float()


class Segmentation(nn.Module):
    """Semantic segmentation around a volume backbone; see the module's docstring.

    Args:
        config: Numbers of the task; ``classes`` must be at least 2.
        backbone: The encoder (``point_vit_volume_*``).
    """

    class_weights: Tensor

    def __init__(self, config: SegmentationConfig, backbone: VolumePointViT) -> None:
        super().__init__()
        self.config = config
        self.backbone = backbone
        dim = backbone.config.dim
        self.decoder: BlockStack | None = None
        if config.decoder_depth:
            self.decoder = backbone.block_stack(config.decoder_depth, backbone.config.heads, backbone.config.drop_path)
            self.decoder_norm = make_norm(backbone.config.norm, dim)
            self.decoder.apply(init_transformer_weights)
        self.head = PointHead(
            dim,
            config.classes,
            hidden=config.hidden,
            global_dim=2 * dim if config.global_features and not config.decoder_depth else 0,
            dropout=config.dropout,
            neighbors=config.neighbors,
            absent_neighbors_first=config.absent_neighbors_first,
        )
        self.register_buffer("class_weights", torch.tensor(config.class_weights or (1.0,) * config.classes))
        if config.freeze != "none":
            backbone.requires_grad_(False)
        elif not config.decoder_depth:
            # What lies behind the deepest layer that is read gets no gradient, which several processes would wait for.
            deepest = max(i % backbone.config.depth for i in config.layers)
            backbone.blocks.blocks[deepest + 1 :].requires_grad_(False)
            backbone.norm.requires_grad_(False)

    def train(self, mode: bool = True) -> Segmentation:
        """Set the mode of all parts; a frozen encoder stays in evaluation mode."""
        super().train(mode)
        if self.config.freeze == "encoder":
            self.backbone.eval()
        return self

    def forward(self, batch: PointBatch, *, generator: torch.Generator | None = None) -> Output:
        """Focal loss of a labelled batch.

        Args:
            batch: Events with ``point_label`` in ``0..classes-1``, -1 for points that do not count.
            generator: Source of the rotation and drop-path draws, CPU; None uses torch's global one.

        Returns:
            Loss, the mean over the labelled points of the batch; metric ``accuracy`` in [0, 1];
            ``aux``: ``log_probs [M, classes]`` float32.

        Raises:
            ValueError: the points have no labels, or a label is out of range.
        """
        label = checked_point_label("Segmentation", batch, self.config.classes)
        known = label >= 0
        log_probs = self.log_probs(batch.points, random=BatchRandom.of(batch, generator))
        loss = focal_loss(log_probs[known], label[known], self.class_weights, self.config.gamma)
        right = log_probs.argmax(1) == label
        accuracy = right[known].float().mean() if known.any() else loss.new_zeros(())
        return Output(loss, {"accuracy": accuracy}, {"log_probs": log_probs.detach()})

    def log_probs(self, points: PackedPoints | Tensor, *, random: BatchRandom | None = None) -> Tensor:
        """Log-probabilities of the classes, ``[M, classes]`` float32, of packed events or ``[B, N, C]`` in voxel units."""
        events = points if isinstance(points, PackedPoints) else PackedPoints.from_padded(points)
        groups = self.backbone.group(events)
        coord = self.backbone.normalize(events.coord)
        if self.training:
            matrix = draw_rotations(self.config.rotation, random or BatchRandom(len(events)))
            groups = rotate_groups(groups, matrix)
            if matrix is not None:
                per_point = Segments.from_offsets(events.offsets).repeat(matrix.to(coord.device, coord.dtype))
                coord = rotate_each(coord, per_point)
        feats = self.token_features(groups, random)
        token_offsets = groups.segments.offsets(coord.device)
        x = self.head.upsample(coord, events.offsets, feats, groups.centers, token_offsets)
        return self.head(x, events.offsets, self.global_features(feats, token_offsets)).log_softmax(1)

    def predict(self, points: PackedPoints | Tensor) -> Tensor:
        """The likeliest class of every point, ``[M]`` int64."""
        return self.log_probs(points).argmax(1)

    def token_features(self, groups: VolumeGroups, random: BatchRandom | None = None) -> Tensor:
        """What the points are classified by, ``[T, dim]``: the mean of the normalised layers, or the decoder's output."""
        hidden: list[Tensor] = []
        last = self.backbone.encode(groups, random=random, intermediates=hidden)
        if self.decoder is None:
            return fuse_layers([hidden[i] for i in self.config.layers], batchwide=self.backbone.config.norm == "batchwide")
        return self.decoder_norm(self.decoder(last, self.backbone.position(groups.centers), groups.segments, random=random))

    def global_features(self, feats: Tensor, token_offsets: Tensor) -> Tensor | None:
        """Maximum and mean over each event's tokens, ``[B, 2 dim]``; zeros for an event without; None where the head takes none."""
        if not self.config.global_features or self.decoder is not None:
            return None
        return torch.cat([ops.segment_reduce(feats, token_offsets, kind) for kind in ("max", "mean")], dim=1)

    def no_weight_decay(self) -> set[str]:
        """Nothing beyond what the backbone names."""
        return {f"backbone.{name}" for name in self.backbone.no_weight_decay()}

    def layer_groups(self) -> list[list[str]]:
        """Parameter name prefixes from input to output, for layer-wise learning-rate decay."""
        return [
            *([f"backbone.{prefix}" for prefix in prefixes] for prefixes in self.backbone.layer_groups()),
            ["decoder.", "decoder_norm.", "head."],
        ]

    def set_grad_checkpointing(self, enabled: bool = True) -> None:
        """Recompute block activations in the backward pass."""
        self.backbone.set_grad_checkpointing(enabled)
        if self.decoder is not None:
            self.decoder.grad_checkpointing = enabled


def linear_with_shared(layer: nn.Linear, x: Tensor, shared: Tensor | None, offsets: Tensor) -> Tensor:
    """``layer([point, what its cloud shares])``, the latter's part computed once a cloud.

    Args:
        layer: Takes the columns of ``x``, then those of ``shared``.
        x: ``[M, C]``.
        shared: ``[B, D]``; None where the layer takes the points alone.
        offsets: Clouds of the points, ``[B + 1]`` int64.
    """
    if shared is None:
        return layer(x)
    dim = x.shape[1]
    from_cloud = F.linear(shared.to(x.dtype), layer.weight[:, dim:], layer.bias)
    return F.linear(x, layer.weight[:, :dim]) + from_cloud.repeat_interleave(offsets.diff(), 0, output_size=x.shape[0])


def checked_point_label(task: str, batch: PointBatch, classes: int) -> Tensor:
    """The classes of the points of ``batch``, ``[M]`` in ``0..classes - 1`` or -1; any other is refused by a message beginning ``task``."""
    label = batch.point_label
    if label is None:
        raise ValueError(f"{task}: the batch has no point_label; choose a data set with a class for each point")
    if label.numel() and not -1 <= int(label.min()) <= int(label.max()) < classes:
        raise ValueError(
            f"{task}: point_label must lie in 0..{classes - 1}, or be -1 for points that do not count, "
            f"got {int(label.min())}..{int(label.max())}"
        )
    return label


def fuse_layers(hidden: list[Tensor], *, batchwide: bool) -> Tensor:
    """Mean of several layers ``[T, dim]`` after each was normalised without learned scale, float32.

    Args:
        hidden: Outputs of the layers.
        batchwide: Normalise by one mean and one deviation over all tokens and channels of the batch, as published, instead of over the
            channels of each token. An event's result then depends on the other events of its batch.
    """
    fused = [F.layer_norm(x.float(), x.shape if batchwide else x.shape[1:], eps=1e-13 if batchwide else 1e-5) for x in hidden]
    return torch.stack(fused).mean(0)


def focal_loss(log_probs: Tensor, label: Tensor, class_weights: Tensor, gamma: float) -> Tensor:
    """Focal loss ``mean(w * (1 - p)**gamma * -log(p))``, p being the probability of the right class (Lin et al., ICCV 2017).

    Args:
        log_probs: ``[M, classes]`` float32.
        label: ``[M]`` int64, each in ``0..classes-1``.
        class_weights: w of each class, ``[classes]``. They are not normalised: the divisor is M.
        gamma: At least 0; 0 gives (weighted) cross-entropy.

    Returns:
        Scalar, differentiable in ``log_probs``; 0 for no points.
    """
    if not label.numel():
        return log_probs.sum()
    right = log_probs.gather(1, label[:, None])[:, 0]
    wrong = -torch.expm1(right)
    # The bound keeps the gradient of powers below 1 finite where p is 1.
    easing = wrong.clamp(min=torch.finfo(wrong.dtype).tiny) ** gamma
    return -(class_weights[label] * easing * right).mean()


def class_weights_of(counts: Tensor) -> tuple[float, ...]:
    """The published weights of :func:`focal_loss` for ``counts [classes]`` of points: all points over those of the class.

    A class that never occurs gets 0.
    """
    total = float(counts.sum())
    return tuple(total / count if count else 0.0 for count in counts.tolist())


@TASKS.register
def segmentation() -> SegmentationConfig:
    """A class for every point of an event, with the published PoLAr-MAE head."""
    return SegmentationConfig()


def convert_segmentation_state(
    state: Mapping[str, Tensor], config: Mapping[str, Any] | None = None
) -> tuple[tuple[VolumePointViTConfig, SegmentationConfig], dict[str, Tensor]]:
    """Turn an official PoLAr-MAE segmentation checkpoint into configurations and a state for :class:`Segmentation`.

    Args:
        state: Weights, already without a common prefix (see :func:`geossl.methods.polar_mae.strip_prefix`).
        config: What the weights cannot tell, where other than released: ``layers`` (the blocks that are averaged), and what
            :func:`geossl.models.point_vit_volume.reference_encoder_config` knows.

    Raises:
        CheckpointError: the state is not a PoLAr-MAE segmentation checkpoint.
    """
    config = dict(config or {})
    encoder = convert_reference_encoder({k.removeprefix("encoder."): v for k, v in state.items() if k.startswith("encoder.")})
    if "seg_head.conv1.weight" not in state or "seg_head.conv3.weight" not in state or "embed.conv1.weight" not in encoder:
        raise CheckpointError(
            f"not a PoLAr-MAE segmentation checkpoint: expected encoder.*, upsampler.*, seg_head.*; found {sorted(state)[:8]}"
        )
    backbone = reference_encoder_config(encoder, config)
    hidden, width = state["seg_head.conv1.weight"].shape[:2]
    weights = state.get("loss_func.weight")
    task = SegmentationConfig(
        classes=state["seg_head.conv3.weight"].shape[0],
        layers=tuple(config.get("layers", (3, 7, 11))),
        hidden=hidden,
        global_features=width > backbone.dim,
        decoder_depth=len({key.split(".")[3] for key in state if key.startswith("seg_decoder.transformer.blocks.")}),
        class_weights=() if weights is None else tuple(weights.tolist()),
        rotation="batch",
        absent_neighbors_first=True,
    )
    converted = {f"backbone.{key}": value for key, value in encoder.items()}
    converted |= convert_names({key: value for key, value in state.items() if not key.startswith("encoder.")}, _REFERENCE_NAMES)
    if weights is None:  # the plain likelihood has none
        converted["class_weights"] = torch.ones(task.classes)
    return (backbone, task), converted


_REFERENCE_NAMES = {
    "upsampler.mlp_convs.0.": "head.up1.",
    "upsampler.mlp_bns.0.": "head.up_norm1.",
    "upsampler.mlp_convs.1.": "head.up2.",
    "upsampler.mlp_bns.1.": "head.up_norm2.",
    "seg_head.conv1.": "head.conv1.",
    "seg_head.bn1.": "head.norm1.",
    "seg_head.conv2.": "head.conv2.",
    "seg_head.bn2.": "head.norm2.",
    "seg_head.conv3.": "head.conv3.",
    "seg_decoder.transformer.blocks.": "decoder.blocks.",
    "seg_decoder.transformer.norm.": "decoder_norm.",
    "loss_func.weight": "class_weights",
}
