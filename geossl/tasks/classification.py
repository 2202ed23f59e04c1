"""Classification of point clouds by fine-tuning: the published Point-MAE head (``PointTransformer``).

Paper: Pang et al., ECCV 2022, arXiv 2203.06604, section 4.2. A learned class token with its own position runs through the encoder
beside all group tokens; class token and the maximum over the others feed a three-layer head.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from geossl import ops
from geossl.errors import CheckpointError, ConfigError
from geossl.geometry import Output, PackedPoints, PointBatch
from geossl.layers import BatchNorm, BatchRandom, Segments
from geossl.methods.point_mae import reference_encoder_config
from geossl.models.point_vit import PointViT, PointViTConfig, convert_reference_encoder
from geossl.tasks.registry import TASKS


@dataclass(frozen=True, kw_only=True)
class ClassificationConfig:
    """Numbers of :class:`Classification`. The defaults are the published ones."""

    name: str = "classification"
    """Registered task."""
    classes: int = 0
    """Number of classes; 0 means: as many as the data set has."""
    hidden: int = 256
    """Width of the head's two hidden layers."""
    dropout: float = 0.5
    """Dropout after each hidden layer."""
    label_smoothing: float = 0.0
    """Share of the target spread evenly over the other classes, 0 <= share < 1 (Point-MAE 0, I2P-MAE 0.2 on ModelNet40)."""
    points: int = 0
    """Points the encoder gets, chosen farthest-first; in training a random subset of 75/64 as many (published: 1,024 of 1,200).
    0 takes the clouds as they come."""

    def __post_init__(self) -> None:
        if self.classes < 0 or self.hidden < 1 or self.points < 0:
            raise ConfigError(
                f"classes and points must be at least 0 and hidden at least 1, got {self.classes}, {self.points}, {self.hidden}"
            )
        for key in ("dropout", "label_smoothing"):
            if not 0 <= getattr(self, key) < 1:
                raise ConfigError(f"{key} must lie in [0, 1), got {getattr(self, key)}")

    def build(self, backbone: nn.Module) -> Classification:
        """Create the task around ``backbone`` with a fresh head."""
        if not isinstance(backbone, PointViT):
            raise ConfigError(f"task classification needs a point_vit_* backbone, got {type(backbone).__name__}")
        if self.classes < 2:
            raise ConfigError(f"classes must be at least 2, got {self.classes}")
        return Classification(self, backbone)


class Classification(nn.Module):
    """Classifier of point clouds; see the module's docstring.

    Args:
        config: Numbers of the task.
        backbone: The encoder; trained along.
    """

    def __init__(self, config: ClassificationConfig, backbone: PointViT) -> None:
        super().__init__()
        self.config = config
        self.backbone = backbone
        dim = backbone.config.dim
        self.cls_token = nn.Parameter(torch.zeros(dim))
        self.cls_position = nn.Parameter(torch.empty(dim))
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        nn.init.trunc_normal_(self.cls_position, std=0.02)
        layers: list[nn.Module] = []
        for width in (2 * dim, config.hidden):
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
        if batch.label is None:
            raise ValueError("Classification: the batch has no labels; choose a data set with classes")
        low, high = int(batch.label.min()), int(batch.label.max())
        if low < 0 or high >= self.config.classes:
            raise ValueError(
                f"Classification: labels must lie in 0..{self.config.classes - 1}, got {low}..{high}; -1 marks an unlabelled cloud"
            )
        logits = self.logits(batch.points, random=BatchRandom.of(batch, generator))
        loss = smoothed_cross_entropy(logits, batch.label, self.config.label_smoothing)
        accuracy = (logits.argmax(1) == batch.label).float().mean()
        return Output(loss, {"accuracy": accuracy}, {"logits": logits.detach()})

    def logits(self, points: PackedPoints | Tensor, *, random: BatchRandom | None = None) -> Tensor:
        """Class scores ``[B, classes]`` float32 of packed clouds or ``[B, N, C]``."""
        clouds = points if isinstance(points, PackedPoints) else PackedPoints.from_padded(points)
        groups = self.backbone.group(self._resample(clouds, random))
        tokens = self.backbone.embed(groups.points)
        position = self.backbone.position(groups.centers)
        segments = Segments(tuple(n + 1 for n in groups.segments.lengths))
        first = segments.offsets(tokens.device)[:-1]
        others = torch.ones(tokens.shape[0] + len(first), dtype=torch.bool, device=tokens.device).index_fill_(0, first, False)

        x = self._insert(tokens, self.cls_token, others)
        x = self.backbone.norm(self.backbone.blocks(x, self._insert(position, self.cls_position, others), segments, random=random))
        best = torch.segment_reduce(x[others].float(), "max", lengths=torch.tensor(groups.segments.lengths, device=x.device))
        return self.head(torch.cat([x[first].float(), best], dim=1)).float()

    @staticmethod
    def _insert(rows: Tensor, token: Tensor, others: Tensor) -> Tensor:
        """Put ``token`` before the rows of every sample; ``others`` marks where the rows themselves go."""
        out = token.to(rows.dtype).expand(others.shape[0], -1)
        return out.index_copy(0, others.nonzero()[:, 0], rows)

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
            noise = torch.rand(wanted, generator=random.generator if random else None)
            rank = noise.argsort().argsort().to(index.device)
            place = torch.arange(index.shape[0], device=index.device) - offsets[:-1].repeat_interleave(offsets.diff())
            chosen = (rank[place] < count) & (index >= 0)
        else:
            chosen = index >= 0
        lengths = torch.segment_reduce(chosen.double(), "sum", lengths=offsets.diff()).long()
        index, offsets = index[chosen], torch.cat([offsets[:1], lengths.cumsum(0)])
        return PackedPoints(clouds.coord[index], offsets, None if clouds.feats is None else clouds.feats[index])

    def no_weight_decay(self) -> set[str]:
        """The class token and its position are not decayed."""
        return {"cls_token", "cls_position"} | {f"backbone.{name}" for name in self.backbone.no_weight_decay()}

    def layer_groups(self) -> list[list[str]]:
        """Parameter name prefixes from input to output, for layer-wise learning-rate decay."""
        encoder = [[f"backbone.{prefix}" for prefix in prefixes] for prefixes in self.backbone.layer_groups()]
        encoder[0] = [*encoder[0], "cls_token", "cls_position"]
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


@TASKS.register
def classification() -> ClassificationConfig:
    """Classification with the published Point-MAE head."""
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
            converted[key.replace("cls_pos", "cls_position")] = value.reshape(-1)
        elif not convert_reference_encoder({key: value}):
            converted[key] = value  # stays under its own name, so that loading reports it
    return (backbone, ClassificationConfig(classes=classes, hidden=hidden)), converted
