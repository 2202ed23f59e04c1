"""Part segmentation of shapes whose category is known, with the published heads of Point-MAE and Point-M2AE.

Papers: Pang et al., ECCV 2022, arXiv 2203.06604, section 4.2; Zhang et al., NeurIPS 2022, arXiv 2205.14401, section 4.2 and appendix.

Several outputs of the encoder (three blocks of a ``point_vit_*`` backbone, the scales of a ``point_m2ae_*`` one) are carried to all points
by interpolation between the three nearest tokens, beside the positions of the points, and go through a small MLP. What the whole shape
shares, maximum and mean of its features and an embedding of its category, is laid beside that, and another MLP names the part.

The published training takes each optimiser step twice, once before the gradient is clipped; here it is taken once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from geossl import ops
from geossl.config import require
from geossl.errors import CheckpointError, ConfigError
from geossl.geometry import Output, PackedPoints, PointBatch, Tokens
from geossl.layers import BatchNorm, BatchRandom
from geossl.methods.point_mae import reference_encoder_config
from geossl.models import point_m2ae
from geossl.models.point_m2ae import PointM2AEEncoder, PointM2AEEncoderConfig
from geossl.models.point_vit import PointViT, PointViTConfig, convert_reference_encoder
from geossl.tasks.classification import check_cloud_labels, see_all_tokens
from geossl.tasks.registry import TASKS
from geossl.tasks.segmentation import checked_point_label, linear_with_shared

SHAPENET_PART_COUNTS = (4, 2, 2, 4, 4, 3, 3, 2, 4, 2, 6, 2, 3, 3, 3, 3)
"""Parts of the 16 categories of ShapeNetPart in alphabetical order, airplane to table."""


@dataclass(frozen=True, kw_only=True)
class PartSegmentationConfig:
    """Numbers of :class:`PartSegmentation`. The defaults are the published ones."""

    name: str = "part_segmentation"
    """Registered task."""
    part_counts: tuple[int, ...] = ()
    """Parts of each category, numbered on from one category to the next; none given means: those of the data set."""
    layers: tuple[int, ...] = ()
    """What of the encoder is read (from 0; negative ones count from the end): blocks of a point_vit_* backbone, scales of a
    point_m2ae_* one. None given: the blocks at one third, two thirds and the end (of 12: 3, 7 and 11), or all scales. Those behind the
    last are not trained."""
    label_dim: int = 64
    """Channels of the category's embedding."""
    propagation: tuple[int, ...] = (1536, 1024)
    """Widths of the MLP after the interpolation."""
    hidden: tuple[int, ...] = ()
    """Widths of the head's hidden layers; none given: 512, 256 with a point_vit_* backbone, 1024, 512, 256 with a point_m2ae_* one."""
    dropout: float = 0.5
    """Dropout after the head's first layer."""

    def __post_init__(self) -> None:
        for key in ("part_counts", "propagation", "hidden"):
            values = getattr(self, key)
            require(all(value >= 1 for value in values), key, "must be numbers of at least 1", values)
        require(len(self.propagation) > 0, "propagation", "must have at least one layer", self.propagation)
        require(self.label_dim >= 1, "label_dim", "must be at least 1", self.label_dim)
        require(0 <= self.dropout < 1, "dropout", "must lie in [0, 1)", self.dropout)

    @property
    def parts(self) -> int:
        """Parts of all categories together."""
        return sum(self.part_counts)

    def build(self, backbone: nn.Module) -> PartSegmentation:
        """Create the task around ``backbone`` with a fresh head."""
        if not isinstance(backbone, (PointViT, PointM2AEEncoder)):
            raise ConfigError(f"task part_segmentation needs a point_vit_* or point_m2ae_* backbone, got {type(backbone).__name__}")
        require(len(self.part_counts) > 0, "part_counts", "must name the parts of at least one category", self.part_counts)
        depth = len(backbone.feature_info)
        wrong = [i for i in self.layers if not -depth <= i < depth]
        if wrong:
            unit = "block" if isinstance(backbone, PointViT) else "scale"
            raise ConfigError(f"layers: {unit} {wrong[0]} does not exist; the backbone has {depth} (0..{depth - 1}, or -1 for the last)")
        return PartSegmentation(self, backbone)


class PointPropagation(nn.Module):
    """Token features at points: interpolated between the 3 nearest tokens, beside the point's position, through an MLP.

    Every layer is linear, with batch norm and ReLU. The first is linear in what it interpolates, so it is applied to tokens.

    Args:
        dim: Channels of a token.
        widths: Of the layers.
    """

    def __init__(self, dim: int, widths: Sequence[int]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in zip((3 + dim, *widths), widths, strict=False))
        self.norms = nn.ModuleList(BatchNorm(width) for width in widths)

    def forward(self, points: PackedPoints, tokens: Tokens) -> Tensor:
        """Packed points and the tokens of their clouds -> ``[M, widths[-1]]``; differentiable in the tokens' features."""
        first = self.layers[0]
        with torch.autocast(points.coord.device.type, enabled=False):  # close points are one point in bfloat16
            x = F.linear(points.coord, first.weight[:, :3], first.bias)  # type: ignore[arg-type, index]
        from_tokens = F.linear(tokens.feats, first.weight[:, 3:])  # type: ignore[index]
        x = x + ops.three_nn_interpolate(
            points.coord, tokens.centers, _at_least_float32(from_tokens), query_offsets=points.offsets, offsets=tokens.offsets
        )
        x = F.relu(self.norms[0](x))
        for layer, norm in zip(self.layers[1:], self.norms[1:], strict=True):
            x = F.relu(norm(layer(x)))
        return x


class PartSegmentation(nn.Module):
    """Part segmentation around an encoder of points; see the module's docstring.

    Args:
        config: Numbers of the task; ``part_counts`` must not be empty.
        backbone: The encoder; trained along. See :class:`geossl.tasks.Classification` on what is switched off in a ``point_m2ae_*`` one.
    """

    parts_of_category: Tensor

    def __init__(self, config: PartSegmentationConfig, backbone: PointViT | PointM2AEEncoder) -> None:
        super().__init__()
        depth, scales = len(backbone.feature_info), isinstance(backbone, PointM2AEEncoder)
        default = range(depth) if scales else sorted({max(depth * i // 3 - 1, 0) for i in (1, 2, 3)})
        layers = tuple(i % depth for i in config.layers) or tuple(default)
        hidden = config.hidden or ((1024, 512, 256) if scales else (512, 256))
        self.config = dataclasses.replace(config, layers=layers, hidden=hidden)
        self.backbone = backbone
        if isinstance(backbone, PointM2AEEncoder):
            see_all_tokens(backbone)
        freeze_unread(backbone, layers)
        dims = [backbone.feature_info[i].channels for i in layers]
        inputs = dims if scales else [sum(dims)]
        self.propagations = nn.ModuleList(PointPropagation(dim, config.propagation) for dim in inputs)
        self.label_embedding = nn.Linear(len(config.part_counts), config.label_dim, bias=False)
        self.label_norm = BatchNorm(config.label_dim)
        per_point = len(inputs) * config.propagation[-1]
        shared = (per_point if scales else 2 * sum(dims)) + config.label_dim
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in zip((per_point + shared, *hidden), hidden, strict=False))
        self.norms = nn.ModuleList(BatchNorm(width) for width in hidden)
        self.dropout = nn.Dropout(config.dropout)
        self.classify = nn.Linear(hidden[-1], config.parts)
        ends = list(accumulate(config.part_counts))
        part = torch.arange(config.parts)
        starts, stops = torch.tensor([0, *ends[:-1]])[:, None], torch.tensor(ends)[:, None]
        self.register_buffer("parts_of_category", (part >= starts) & (part < stops), persistent=False)  # bool [categories, parts]

    def forward(self, batch: PointBatch, *, generator: torch.Generator | None = None) -> Output:
        """Cross-entropy over the points of a labelled batch, among the parts of all categories.

        Args:
            batch: Shapes with ``label`` (category) and ``point_label`` (part), -1 for points that do not count.
            generator: Source of the drop-path draws; None uses torch's global one.

        Returns:
            Mean loss over the labelled points; metric ``accuracy`` in [0, 1]; ``aux``: ``logits [M, parts]`` float32.

        Raises:
            ValueError: labels are missing, out of range, or of a part that the shape's category has not.
        """
        label, known = self._checked_labels(batch)
        assert batch.label is not None
        logits = self.logits(batch.points, batch.label, random=BatchRandom.of(batch, generator))
        loss = F.cross_entropy(logits[known], label[known]) if bool(known.any()) else logits.sum() * 0
        right = (logits.argmax(1) == label)[known].float()
        return Output(loss, {"accuracy": right.mean() if len(right) else loss.detach()}, {"logits": logits.detach()})

    def _checked_labels(self, batch: PointBatch) -> tuple[Tensor, Tensor]:
        check_cloud_labels("PartSegmentation", batch.label, len(self.config.part_counts))
        label = checked_point_label("PartSegmentation", batch, self.config.parts)
        known = label >= 0
        category = batch.label.repeat_interleave(batch.points.lengths)  # type: ignore[union-attr]
        wrong = known & ~self.parts_of_category[category, label.clamp(min=0)]
        if bool(wrong.any()):
            row = int(wrong.nonzero()[0, 0])
            has = self.parts_of_category[category[row]].nonzero()[:, 0]
            raise ValueError(
                f"PartSegmentation: point {row} of the batch has part {int(label[row])}, but its shape is of category "
                f"{int(category[row])}, whose parts are {int(has[0])}..{int(has[-1])}"
            )
        return label, known

    def logits(self, points: PackedPoints | Tensor, category: Tensor, *, random: BatchRandom | None = None) -> Tensor:
        """Scores of all parts, ``[M, parts]`` float32.

        Args:
            points: Packed shapes or ``[B, N, C]``.
            category: ``[B]`` int64.
            random: Source of drop-path draws.

        Raises:
            ValueError: ``category`` has not one entry for each shape, or one that does not exist.
        """
        clouds = points if isinstance(points, PackedPoints) else PackedPoints.from_padded(points)
        if category.shape != (len(clouds),):
            raise ValueError(f"PartSegmentation: category must be [{len(clouds)}], one for each shape, got {list(category.shape)}")
        check_cloud_labels("PartSegmentation", category, len(self.config.part_counts))
        tokens = self._tokens(clouds, random)
        x = torch.cat([carry(clouds, read) for carry, read in zip(self.propagations, tokens, strict=True)], dim=1)
        one_hot = F.one_hot(category, len(self.config.part_counts)).to(x.dtype)
        name = F.leaky_relu(self.label_norm(self.label_embedding(one_hot)), 0.2)
        if isinstance(self.backbone, PointViT):
            feats, offsets = tokens[0].feats, tokens[0].offsets
            shared = [ops.segment_reduce(feats, offsets, "max"), ops.segment_reduce(feats, offsets, "mean"), name]
        else:
            shared = [ops.segment_reduce(x, clouds.offsets, "max") + ops.segment_reduce(x, clouds.offsets, "mean"), name]
        x = linear_with_shared(self.layers[0], x, torch.cat(shared, dim=1), clouds.offsets)  # type: ignore[arg-type]
        x = self.dropout(F.relu(self.norms[0](x)))
        for layer, norm in zip(self.layers[1:], self.norms[1:], strict=True):
            x = F.relu(norm(layer(x)))
        return self.classify(x).float()

    def predict(self, points: PackedPoints | Tensor, category: Tensor) -> Tensor:
        """The likeliest part of every point among those of its shape's category, ``[M]`` int64; arguments as for :meth:`logits`."""
        clouds = points if isinstance(points, PackedPoints) else PackedPoints.from_padded(points)
        scores = self.logits(clouds, category)
        allowed = self.parts_of_category[category].repeat_interleave(clouds.lengths, 0)
        return scores.masked_fill(~allowed, -torch.inf).argmax(1)

    def _tokens(self, clouds: PackedPoints, random: BatchRandom | None) -> list[Tokens]:
        """What is carried to the points: the named blocks side by side, or the named scales one by one."""
        if isinstance(self.backbone, PointM2AEEncoder):
            scales = self.backbone.group(clouds)
            encoded = self.backbone.encode(scales, random=random)
            return [
                Tokens(_at_least_float32(encoded[i].feats), scales[i].centers, encoded[i].segments.offsets(clouds.coord.device))
                for i in self.config.layers
            ]
        hidden: list[Tensor] = []
        groups = self.backbone.group(clouds)
        self.backbone.encode(groups, random=random, intermediates=hidden)
        feats = _at_least_float32(torch.cat([self.backbone.norm(hidden[i]) for i in self.config.layers], dim=1))
        return [Tokens(feats, groups.centers, groups.segments.offsets(clouds.coord.device))]

    def no_weight_decay(self) -> set[str]:
        """Nothing beyond what the backbone names."""
        return {f"backbone.{name}" for name in self.backbone.no_weight_decay()}

    def layer_groups(self) -> list[list[str]]:
        """Parameter name prefixes from input to output, for layer-wise learning-rate decay."""
        encoder = [[f"backbone.{prefix}" for prefix in prefixes] for prefixes in self.backbone.layer_groups()]
        return [*encoder, ["propagations.", "label_embedding.", "label_norm.", "layers.", "norms.", "classify."]]

    def set_grad_checkpointing(self, enabled: bool = True) -> None:
        """Recompute block activations in the backward pass."""
        self.backbone.set_grad_checkpointing(enabled)


def _at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def freeze_unread(backbone: PointViT | PointM2AEEncoder, layers: Sequence[int]) -> None:
    """Do not train what the named blocks or scales do not depend on: it would get no gradient, which several processes would wait for."""
    deepest = max(layers)
    if isinstance(backbone, PointViT):
        backbone.blocks.blocks[deepest + 1 :].requires_grad_(False)
        return
    for part in (backbone.embeds, backbone.positions, backbone.blocks):
        part[deepest + 1 :].requires_grad_(False)
    for i, norm in enumerate(backbone.norms):
        norm.requires_grad_(i in layers)


@TASKS.register
def part_segmentation() -> PartSegmentationConfig:
    """A part for every point of a shape of known category, with the published head of the backbone's system."""
    return PartSegmentationConfig()


def convert_part_state(
    state: Mapping[str, Tensor], config: Mapping[str, Any] | None = None
) -> tuple[tuple[PointViTConfig | PointM2AEEncoderConfig, PartSegmentationConfig], dict[str, Tensor]]:
    """Turn an official part segmentation checkpoint of Point-MAE or Point-M2AE into configurations and a state.

    Args:
        state: Weights, already without ``module.``.
        config: What the weights cannot tell, where other than released: of Point-MAE ``num_group`` (128), ``group_size`` (32), ``layers``
            (3, 7, 11); of Point-M2AE ``num_groups``, ``group_sizes``, ``local_radius``; of both ``num_heads``, ``drop_path_rate``, and
            ``part_counts`` where they are not those of ShapeNetPart.

    Raises:
        CheckpointError: the state is not such a checkpoint.
    """
    config = dict(config or {})
    scales = any(key.startswith(("h_encoder.", "MAE_encoder.blocks.")) for key in state)
    convert = point_m2ae.convert_reference_encoder if scales else convert_reference_encoder
    encoder = convert(state)
    last = max((int(key.split(".")[0]) for key in (k.removeprefix("convs") for k in state if k.startswith("convs"))), default=0)
    propagation = "propagations.0" if scales else "propagation_0"
    if (
        "label_conv.0.weight" not in state
        or f"{propagation}.mlp_convs.0.weight" not in state
        or not {"embed.conv1.weight", "embeds.0.conv1.weight"} & set(encoder)
    ):
        raise CheckpointError(
            "not a part segmentation checkpoint of Point-MAE or Point-M2AE: expected an encoder, label_conv.*, propagation*.*, convs*.*; "
            f"found {sorted(state)[:8]}"
        )
    parts, categories = state[f"convs{last}.weight"].shape[0], state["label_conv.0.weight"].shape[1]
    part_counts = tuple(config.get("part_counts", SHAPENET_PART_COUNTS))
    if (sum(part_counts), len(part_counts)) != (parts, categories):
        raise CheckpointError(
            f"the checkpoint has {parts} parts in {categories} categories, part_counts {sum(part_counts)} in {len(part_counts)}: say in "
            "config how many parts each category has"
        )
    backbone: PointViTConfig | PointM2AEEncoderConfig
    if scales:
        backbone = point_m2ae.reference_encoder_config(encoder, config, fine_tuned=True)
    else:
        backbone = reference_encoder_config(encoder, {"num_group": 128, **config}, group_size=32)
    task = PartSegmentationConfig(
        part_counts=part_counts,
        layers=tuple(range(len(backbone.dims)))
        if isinstance(backbone, PointM2AEEncoderConfig)
        else tuple(config.get("layers", (3, 7, 11))),
        label_dim=state["label_conv.0.weight"].shape[0],
        propagation=tuple(state[f"{propagation}.mlp_convs.{i}.weight"].shape[0] for i in range(_count(state, f"{propagation}.mlp_convs."))),
        hidden=tuple(state[f"convs{i}.weight"].shape[0] for i in range(1, last)),
    )
    converted = {f"backbone.{key}": value for key, value in encoder.items()}
    for key, value in state.items():
        if convert({key: value}):
            continue
        name = _part_name(key, last)
        converted[name] = value.squeeze(-1) if value.dim() == 3 else value  # an unknown name stays, so that loading reports it
    return (backbone, task), converted


def _count(state: Mapping[str, Tensor], prefix: str) -> int:
    return len({key.removeprefix(prefix).split(".")[0] for key in state if key.startswith(prefix)})


def _part_name(key: str, last: int) -> str:
    """Our name of a weight of the published heads; ``last`` is the number of the convolution that names the part."""
    first, _, rest = key.partition(".")
    if first == "label_conv":
        return rest.replace("0.", "label_embedding.", 1) if rest.startswith("0.") else rest.replace("1.", "label_norm.", 1)
    if first in ("propagation_0", "propagations"):
        rest = f"0.{rest}" if first == "propagation_0" else rest
        return f"propagations.{rest.replace('.mlp_convs.', '.layers.').replace('.mlp_bns.', '.norms.')}"
    if first == f"convs{last}":
        return f"classify.{rest}"
    for old, new in (("convs", "layers"), ("bns", "norms")):
        if first.startswith(old) and first.removeprefix(old).isdigit():
            return f"{new}.{int(first.removeprefix(old)) - 1}.{rest}"
    return key
