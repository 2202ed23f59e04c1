"""Classification of point clouds by fine-tuning, with the published heads of Point-MAE, Point-M2AE and I2P-MAE.

Papers: Pang et al., ECCV 2022, arXiv 2203.06604, section 4.2 (``PointTransformer``); Zhang et al., NeurIPS 2022, arXiv 2205.14401; Zhang
et al., CVPR 2023, arXiv 2212.06785, section 4.2.

A readout makes one vector of each cloud. On a ``point_vit_*`` backbone, a learned class token with its own position runs through the
encoder beside all group tokens; class token and the maximum over the others are laid side by side. On a ``point_m2ae_*`` backbone, mean
and maximum over the tokens of the coarsest scale are added, or laid side by side. A three-layer head classifies the vector.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from geossl import ops
from geossl.errors import CheckpointError, ConfigError, unknown_name
from geossl.geometry import Output, PackedPoints, PointBatch, euler_to_matrix
from geossl.layers import BatchNorm, BatchRandom, Segments
from geossl.methods.point_mae import reference_encoder_config
from geossl.models import point_m2ae
from geossl.models.point_m2ae import PointM2AEEncoder, PointM2AEEncoderConfig
from geossl.models.point_vit import PointViT, PointViTConfig, convert_reference_encoder
from geossl.tasks.registry import TASKS

AXES = ("x", "y", "z")


@dataclass(frozen=True, kw_only=True)
class ClassificationConfig:
    """Numbers of :class:`Classification`. The defaults are the published ones."""

    name: str = "classification"
    """Registered task."""
    classes: int = 0
    """Number of classes; 0 means: as many as the data set has."""
    pooling: Literal["mean_plus_max", "mean_max"] = "mean_plus_max"
    """point_m2ae_* backbones: mean and maximum over the coarsest tokens are added (published for ModelNet40), or laid side by side
    (ScanObjectNN). A point_vit_* backbone has its class token and the maximum instead."""
    max_skips_first: bool = False
    """Published quirk of Point-M2AE on ScanObjectNN (I2P-MAE has it not): the maximum leaves out the first token of each cloud."""
    fresh_norm: bool = False
    """point_m2ae_* backbones: start the norm of the coarsest tokens at 1 and 0, as published, instead of from the pretrained one."""
    hidden: int = 256
    """Width of the head's two hidden layers."""
    dropout: float = 0.5
    """Dropout after each hidden layer."""
    label_smoothing: float = 0.0
    """Share of the target spread evenly over the other classes, 0 <= share < 1 (on ModelNet40
    Point-M2AE 0.3, I2P-MAE 0.2; else 0)."""
    points: int = 0
    """Points the encoder gets, chosen farthest-first; in training a random subset of 75/64 as many (published: 1,024 of 1,200).
    0 takes the clouds as they come."""
    batch_rotation: Literal["none", "x", "y", "z"] = "none"
    """In training, turn all clouds of a batch about this axis by one random angle, as I2P-MAE does on ScanObjectNN (y). It comes after the
    augmentation of the data set, which turns each cloud for itself."""

    def __post_init__(self) -> None:
        for key, choices in (("pooling", ("mean_plus_max", "mean_max")), ("batch_rotation", ("none", *AXES))):
            if getattr(self, key) not in choices:
                raise unknown_name(key, getattr(self, key), choices)
        if self.classes < 0 or self.hidden < 1 or self.points < 0:
            raise ConfigError(
                f"classes and points must be at least 0 and hidden at least 1, got {self.classes}, {self.points}, {self.hidden}"
            )
        for key in ("dropout", "label_smoothing"):
            if not 0 <= getattr(self, key) < 1:
                raise ConfigError(f"{key} must lie in [0, 1), got {getattr(self, key)}")

    def build(self, backbone: nn.Module) -> Classification:
        """Create the task around ``backbone`` with a fresh head."""
        if not isinstance(backbone, (PointViT, PointM2AEEncoder)):
            raise ConfigError(f"task classification needs a point_vit_* or point_m2ae_* backbone, got {type(backbone).__name__}")
        if self.classes < 2:
            raise ConfigError(f"classes must be at least 2, got {self.classes}")
        if self.batch_rotation != "none" and backbone.in_channels > 3:
            raise ConfigError(
                f"batch_rotation turns positions alone, but the backbone takes {backbone.in_channels} columns; leave it at none"
            )
        return Classification(self, backbone)


class ClassTokenReadout(nn.Module):
    """One vector of each cloud from a :class:`PointViT`: a learned class token beside the maximum over the group tokens.

    Args:
        backbone: The encoder the vector is read from; not kept.
    """

    def __init__(self, backbone: PointViT) -> None:
        super().__init__()
        dim = backbone.config.dim
        self.width = 2 * dim
        self.cls_token = nn.Parameter(torch.zeros(dim))
        self.cls_position = nn.Parameter(torch.empty(dim))
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        nn.init.trunc_normal_(self.cls_position, std=0.02)

    def forward(self, backbone: PointViT, clouds: PackedPoints, random: BatchRandom | None = None) -> Tensor:
        """``[B, width]`` float32 of packed clouds."""
        groups = backbone.group(clouds)
        tokens = backbone.embed(groups.points)
        position = backbone.position(groups.centers)
        segments = Segments(tuple(n + 1 for n in groups.segments.lengths))
        first = segments.offsets(tokens.device)[:-1]
        others = torch.ones(tokens.shape[0] + len(first), dtype=torch.bool, device=tokens.device).index_fill_(0, first, False)

        x = self._insert(tokens, self.cls_token, others)
        x = backbone.norm(backbone.blocks(x, self._insert(position, self.cls_position, others), segments, random=random)).float()
        return torch.cat([x[first], ops.segment_reduce(x[others], groups.segments.offsets(x.device), "max")], dim=1)

    @staticmethod
    def _insert(rows: Tensor, token: Tensor, others: Tensor) -> Tensor:
        """Put ``token`` before the rows of every sample; ``others`` marks where the rows themselves go."""
        out = token.to(rows.dtype).expand(others.shape[0], -1)
        return out.index_copy(0, others.nonzero()[:, 0], rows)


class CoarsestReadout(nn.Module):
    """One vector of each cloud from a :class:`PointM2AEEncoder`: mean and maximum over the normed tokens of the coarsest scale.

    Args:
        backbone: The encoder the vector is read from; not kept.
        pooling: "mean_plus_max" adds the two, "mean_max" lays them side by side.
        max_skips_first: Leave the first token of each cloud out of the maximum, unless it is the only one.
    """

    def __init__(self, backbone: PointM2AEEncoder, pooling: str, max_skips_first: bool) -> None:
        super().__init__()
        self.width = backbone.num_features * (2 if pooling == "mean_max" else 1)
        self.pooling, self.max_skips_first = pooling, max_skips_first

    def forward(self, backbone: PointM2AEEncoder, clouds: PackedPoints, random: BatchRandom | None = None) -> Tensor:
        """``[B, width]`` float32 of packed clouds."""
        tokens = backbone.encode(backbone.group(clouds), random=random, norm=False)[-1]
        feats, offsets = backbone.norms[-1](tokens.feats).float(), tokens.segments.offsets(clouds.coord.device)
        mean, best = ops.segment_reduce(feats, offsets, "mean"), feats
        if self.max_skips_first:
            rest = torch.ones_like(feats[:, 0], dtype=torch.bool).index_fill_(0, offsets[:-1][offsets.diff() > 1], False)
            best, offsets = feats[rest], tokens.segments.count(rest).offsets(feats.device)
        best = ops.segment_reduce(best, offsets, "max")
        return torch.cat([mean, best], dim=1) if self.pooling == "mean_max" else mean + best


class Classification(nn.Module):
    """Classifier of point clouds; see the module's docstring.

    Args:
        config: Numbers of the task.
        backbone: The encoder; trained along. Of a :class:`PointM2AEEncoder`, the options for features of official pretraining files
            (``drop_uncovered``, ``padding_attended``, ``first_token_visible``) are switched off: the published classifiers see every token,
            and keep apart those that are not within ``local_radius``.
    """

    def __init__(self, config: ClassificationConfig, backbone: PointViT | PointM2AEEncoder) -> None:
        super().__init__()
        self.config = config
        self.backbone = backbone
        if isinstance(backbone, PointViT):
            self.readout: ClassTokenReadout | CoarsestReadout = ClassTokenReadout(backbone)
        else:
            see_all_tokens(backbone)
            self.readout = CoarsestReadout(backbone, config.pooling, config.max_skips_first)
            backbone.norms[:-1].requires_grad_(False)  # read by nothing: no gradient, which several processes would wait for
            if config.fresh_norm:
                backbone.norms[-1].reset_parameters()  # type: ignore[operator]
        layers: list[nn.Module] = []
        for width in (self.readout.width, config.hidden):
            layers += [nn.Linear(width, config.hidden), BatchNorm(config.hidden), nn.ReLU(), nn.Dropout(config.dropout)]
        self.head = nn.Sequential(*layers, nn.Linear(config.hidden, config.classes))

    def forward(self, batch: PointBatch, *, generator: torch.Generator | None = None) -> Output:
        """Cross-entropy of a labelled batch.

        Args:
            batch: Clouds with ``label`` in ``0..classes-1``.
            generator: Source of the resampling and drop-path draws; None uses torch's global one.

        Returns:
            Mean loss; metric ``accuracy`` in [0, 1]; ``aux``: ``logits [B, classes]``.

        Raises:
            ValueError: a cloud has no label, or one out of range.
        """
        check_cloud_labels("Classification", batch.label, self.config.classes)
        assert batch.label is not None
        logits = self.logits(batch.points, random=BatchRandom.of(batch, generator))
        loss = smoothed_cross_entropy(logits, batch.label, self.config.label_smoothing)
        accuracy = (logits.argmax(1) == batch.label).float().mean()
        return Output(loss, {"accuracy": accuracy}, {"logits": logits.detach()})

    def logits(self, points: PackedPoints | Tensor, *, random: BatchRandom | None = None) -> Tensor:
        """Class scores ``[B, classes]`` float32 of packed clouds or ``[B, N, C]``."""
        clouds = points if isinstance(points, PackedPoints) else PackedPoints.from_padded(points)
        clouds = self._rotate(self._resample(clouds, random), random)
        return self.head(self.readout(self.backbone, clouds, random)).float()

    @torch.no_grad()
    def _resample(self, clouds: PackedPoints, random: BatchRandom | None) -> PackedPoints:
        count = self.config.points
        if not count:
            return clouds
        wanted = -(-count * 75 // 64) if self.training else count
        index, offsets = ops.farthest_point_sample(
            clouds.coord, wanted, offsets=clouds.offsets, min_sq_norm=self.backbone.config.min_sq_norm
        )
        if self.training:
            # One subset for the whole batch, as published: the draw of the first slot, drawn alike on every process.
            rank = (random or BatchRandom(len(clouds))).shared(wanted).argsort().argsort().to(index.device)
            place = torch.arange(index.shape[0], device=index.device) - offsets[:-1].repeat_interleave(offsets.diff())
            chosen = (rank[place] < count) & (index >= 0)
        else:
            chosen = index >= 0
        lengths = torch.segment_reduce(chosen.double(), "sum", lengths=offsets.diff()).long()
        index, offsets = index[chosen], torch.cat([offsets[:1], lengths.cumsum(0)])
        return PackedPoints(clouds.coord[index], offsets, None if clouds.feats is None else clouds.feats[index])

    def _rotate(self, clouds: PackedPoints, random: BatchRandom | None) -> PackedPoints:
        if self.config.batch_rotation == "none" or not self.training:
            return clouds
        turn = torch.tensor([axis == self.config.batch_rotation for axis in AXES])
        angle = (2 * (random or BatchRandom(len(clouds))).shared(1) - 1) * math.pi
        matrix = euler_to_matrix(turn * angle).to(clouds.coord)
        return PackedPoints(clouds.coord @ matrix.T, clouds.offsets, clouds.feats)

    def no_weight_decay(self) -> set[str]:
        """The class token and its position are not decayed (being vectors), nor what the backbone names."""
        return {f"backbone.{name}" for name in self.backbone.no_weight_decay()}

    def layer_groups(self) -> list[list[str]]:
        """Parameter name prefixes from input to output, for layer-wise learning-rate decay."""
        encoder = [[f"backbone.{prefix}" for prefix in prefixes] for prefixes in self.backbone.layer_groups()]
        encoder[0] = [*encoder[0], "readout."]
        return [*encoder, ["head."]]

    def set_grad_checkpointing(self, enabled: bool = True) -> None:
        """Recompute block activations in the backward pass."""
        self.backbone.set_grad_checkpointing(enabled)


def smoothed_cross_entropy(logits: Tensor, label: Tensor, smoothing: float) -> Tensor:
    """Cross-entropy against ``1 - smoothing`` on the class and ``smoothing / (classes - 1)`` on each other one.

    This is the published form; torch's ``label_smoothing`` spreads over all classes.
    """
    if not smoothing:
        return F.cross_entropy(logits, label)
    log_probability = logits.log_softmax(1)
    other = smoothing / (logits.shape[1] - 1)
    target = torch.full_like(logits, other).scatter_(1, label[:, None], 1 - smoothing)
    return -(target * log_probability).sum(1).mean()


def check_cloud_labels(task: str, label: Tensor | None, classes: int) -> None:
    """Refuse a batch in which a cloud has no class, or one that is not in ``0..classes - 1``; the message begins with ``task``."""
    if label is None:
        raise ValueError(f"{task}: the batch has no labels; choose a data set with classes")
    low, high = int(label.min()), int(label.max())
    if low < 0 or high >= classes:
        raise ValueError(f"{task}: labels must lie in 0..{classes - 1}, got {low}..{high}; -1 marks an unlabelled cloud")


def see_all_tokens(backbone: PointM2AEEncoder) -> None:
    """Switch off the options that stand for the published pretraining and probe, neither of which the published fine-tuning does."""
    backbone.config = dataclasses.replace(backbone.config, first_token_visible=False, drop_uncovered=False, padding_attended=False)


@TASKS.register
def classification() -> ClassificationConfig:
    """Classification with the published head of the backbone's system."""
    return ClassificationConfig()


def convert_reference_state(
    state: Mapping[str, Tensor], config: Mapping[str, Any] | None = None
) -> tuple[tuple[PointViTConfig, ClassificationConfig], dict[str, Tensor]]:
    """Turn an official Point-MAE classifier checkpoint into configurations and a state for :class:`Classification`.

    Args:
        state: Weights, already without ``module.``.
        config: The ``model`` section of the published configuration (``num_group``, ``group_size``, ``num_heads``,
            ``drop_path_rate``); what it lacks is the released ModelNet40 1k setting. The number of groups and the group size leave no trace
            in the weights.

    Raises:
        CheckpointError: the state is not a Point-MAE classifier.
    """
    config = dict(config or {})
    encoder = convert_reference_encoder(state)
    if "cls_token" not in state or "cls_head_finetune.8.weight" not in state or "embed.conv1.weight" not in encoder:
        raise CheckpointError(
            f"not a Point-MAE classifier: expected encoder.*, blocks.*, cls_token, cls_head_finetune.*; found {sorted(state)[:8]}"
        )
    backbone = reference_encoder_config(encoder, config, group_size=32)
    hidden, classes = state["cls_head_finetune.0.weight"].shape[0], state["cls_head_finetune.8.weight"].shape[0]
    converted = {f"backbone.{key}": value for key, value in encoder.items()}
    for key, value in state.items():
        if key.startswith("cls_head_finetune."):
            converted[f"head.{key.removeprefix('cls_head_finetune.')}"] = value
        elif key in ("cls_token", "cls_pos"):
            converted[f"readout.{key.replace('cls_pos', 'cls_position')}"] = value.reshape(-1)
        elif not convert_reference_encoder({key: value}):
            converted[key] = value  # stays under its own name, so that loading reports it
    return (backbone, ClassificationConfig(classes=classes, hidden=hidden)), converted


def convert_coarsest_state(
    state: Mapping[str, Tensor], config: Mapping[str, Any] | None = None, *, system: Literal["point_m2ae", "i2p_mae"] = "point_m2ae"
) -> tuple[tuple[PointM2AEEncoderConfig, ClassificationConfig], dict[str, Tensor]]:
    """Turn an official classifier checkpoint of Point-M2AE or I2P-MAE into configurations and a state for :class:`Classification`.

    The weights tell how tokens are pooled. Their ``norm`` becomes that of the backbone's coarsest scale; the norms of the finer scales,
    which the file has not and nothing reads, are the identity.

    Args:
        state: Weights, already without ``module.``.
        config: The ``model`` section of the published configuration (``num_groups``, ``group_sizes``, ``local_radius``, ``num_heads``,
            ``drop_path_rate``, ``smooth``); what it lacks is the system's setting for ModelNet40, or for ScanObjectNN where the head is of
            that. Groups, their sizes and radii leave no trace in the weights.
        system: Whose it is. The weights do not tell, but the settings differ, and at ScanObjectNN what the head's maximum is over.

    Raises:
        CheckpointError: the state is not such a classifier.
    """
    config = dict(config or {})
    own = {key: value for key, value in state.items() if not key.startswith("h_encoder.encoder_norms.")}
    encoder = point_m2ae.convert_reference_encoder(own)
    if "norm.weight" not in state or "cls_head_finetune.8.weight" not in state or "embeds.0.conv1.weight" not in encoder:
        raise CheckpointError(
            f"not a Point-M2AE or I2P-MAE classifier: expected h_encoder.*, norm.*, cls_head_finetune.*; found {sorted(state)[:8]}"
        )
    hidden, width = state["cls_head_finetune.0.weight"].shape
    pooling: Literal["mean_plus_max", "mean_max"] = "mean_max" if width == 2 * len(state["norm.weight"]) else "mean_plus_max"
    if pooling == "mean_max":
        config = {"group_sizes": (32, 16, 16), **config}
    elif system == "i2p_mae":
        config = {"group_sizes": (48, 24, 24), "local_radius": (0.24, 0.48, 0.96), **config}
    backbone = point_m2ae.reference_encoder_config(encoder, config, fine_tuned=True)
    task = ClassificationConfig(
        classes=state["cls_head_finetune.8.weight"].shape[0],
        pooling=pooling,
        max_skips_first=system == "point_m2ae" and pooling == "mean_max",
        fresh_norm=True,
        hidden=hidden,
        label_smoothing=config.get("smooth", 0.0) if pooling == "mean_plus_max" else 0.0,
    )
    converted = {f"backbone.{key}": value for key, value in encoder.items()}
    for i, dim in enumerate(backbone.dims[:-1]):
        converted |= {f"backbone.norms.{i}.weight": torch.ones(dim), f"backbone.norms.{i}.bias": torch.zeros(dim)}
    for key, value in state.items():
        if key.startswith("cls_head_finetune."):
            converted[f"head.{key.removeprefix('cls_head_finetune.')}"] = value
        elif key in ("norm.weight", "norm.bias"):
            converted[f"backbone.norms.{len(backbone.dims) - 1}.{key.removeprefix('norm.')}"] = value
        elif key not in own or not point_m2ae.convert_reference_encoder({key: value}):
            converted[key] = value  # stays under its own name, so that loading reports it
    return (backbone, task), converted
