"""I2P-MAE: a hierarchical masked autoencoder of points that a frozen 2D model tells where to look and what is there.

Paper: Zhang et al., "Learning 3D Representations from 2D Pre-trained Models via Image-to-Point Masked Autoencoders", CVPR 2023, arXiv
2212.06785.

Three depth images of a cloud are shown to a 2D teacher. How much it attends to a place decides how likely the tokens there stay visible
(section 3.3). The encoder sees the visible tokens of every scale; the decoder is that of Point-M2AE. From the hidden tokens the points
are predicted, as there; from the visible ones the teacher's features of their members in the three views (section 3.4).
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import Tensor, nn

from geossl import ops
from geossl.errors import CheckpointError, ConfigError, unknown_name
from geossl.geometry import Output, PackedPoints, PointBatch
from geossl.layers import BatchRandom, back_project, fit_views, gathered_regression_loss, random_mask, splat_depth, weighted_mask
from geossl.layers.projection import VIEWS
from geossl.methods.point_m2ae import (
    PointM2AE,
    PointM2AEConfig,
    convert_reference_weights,
    fitting_backbone,
    reference_decoder_config,
)
from geossl.methods.registry import METHODS
from geossl.models.checkpoints import load_state, read_reference_state
from geossl.models.cloud_teacher import CloudOutput, CloudTeacher, fixed_cloud_key
from geossl.models.image_vit import ImageViT, ImageViTConfig, convert_clip_state
from geossl.models.point_m2ae import PointM2AEEncoder, PointM2AEEncoderConfig, Scale, reference_encoder_config
from geossl.models.teachers import Teacher, TeacherConfig, state_digest


@dataclass(frozen=True, kw_only=True)
class I2PMAEConfig(PointM2AEConfig):
    """Numbers of :class:`I2PMAE` around its backbone. The defaults are the published ones, save for the teacher."""

    name: str = "i2p_mae"
    """Registered method."""
    predicted_points: int = 8
    """Points predicted for each hidden token."""
    teacher: TeacherConfig | None = field(default_factory=TeacherConfig)
    """The 2D model. The paper's is `clip_vit_base_patch16`, whose weights you must have; the default one is a pip package of 13 MB.
    None: given later, as for official checkpoints."""
    teacher_view: Literal["augmented", "original"] = "augmented"
    """What the teacher looks at: the cloud as the encoder gets it (published), or as it was before augmentation. The two do not agree: a
    shift or a common scale leaves the outline of the images as it is but changes the depth in them, different scales along the axes and
    rotations change both. The original cloud gives the same answer whenever its points come again, so it can be stored."""
    teacher_store: Path | None = None
    """Folder that keeps the teacher's answers on disk, where any run finds them again. Needs teacher_view `original`, and data whose
    clouds come with the same points in every epoch."""
    masking: Literal["saliency", "random"] = "saliency"
    """How visible tokens are drawn: more likely where the teacher attends, or evenly, as in Point-M2AE."""
    saliency_temperature: float | None = None
    """Tokens stay visible in proportion to softmax(saliency / (temperature * its deviation over the cloud)): the lower, the more the
    teacher decides. None: softmax(saliency) as published, which is nearly even, for attention to one of 196 places is small."""
    feature_channels: int | None = None
    """Channels of the teacher's features; None asks the teacher, and only without one need it be said."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for key, known in (("teacher_view", ("augmented", "original")), ("masking", ("saliency", "random"))):
            if getattr(self, key) not in known:
                raise unknown_name(key, getattr(self, key), known)
        if self.teacher_store is not None and self.teacher_view != "original":
            raise ConfigError(
                "teacher_store needs teacher_view: original; what the teacher sees of augmented clouds never comes again, got "
                f"teacher_view={self.teacher_view!r}"
            )
        if self.saliency_temperature is not None and not self.saliency_temperature > 0:
            raise ConfigError(f"saliency_temperature must be above 0, or None for the published form, got {self.saliency_temperature}")
        if self.teacher is None and self.feature_channels is None:
            raise ConfigError("feature_channels must be given where there is no teacher to ask")
        if self.feature_channels is not None and self.feature_channels < 1:
            raise ConfigError(f"feature_channels must be at least 1, or None for those of the teacher, got {self.feature_channels}")

    def build(self, backbone: nn.Module) -> I2PMAE:
        """Create the method around ``backbone`` with fresh decoder weights. The teacher's weights are not read yet."""
        return I2PMAE(self, fitting_backbone(self, backbone))


class I2PMAE(PointM2AE):
    """Masked autoencoder of point groups with a 2D teacher; see the module's docstring.

    Args:
        config: Numbers of the method.
        backbone: The encoder to pretrain. Norms of scales that the decoder does not read get no gradient, so they are frozen.

    Attributes:
        teacher: The 2D model, a :class:`geossl.models.CloudTeacher`: no module, loaded by the first call that needs it.
    """

    config: I2PMAEConfig

    def __init__(self, config: I2PMAEConfig, backbone: PointM2AEEncoder) -> None:
        super().__init__(config, backbone)
        channels = config.feature_channels or cast(TeacherConfig, config.teacher).channels
        members = backbone.config.group_sizes[-self.stages]
        self.feature_head = nn.Linear(self.head.in_features, members * VIEWS * channels)
        self.teacher = CloudTeacher(config.teacher, config.teacher_store)

    def prepare(self, dataset: Any = None) -> None:
        """Load the teacher and check its store, before anything of a training is written.

        Args:
            dataset: What will be trained on; None: nothing is checked of it.

        Raises:
            CheckpointError: the teacher's weights are missing, damaged or another model's.
            ConfigError: answers are to be stored but the data set draws other points in every epoch.
            DataError: the store cannot be written.
        """
        self.check_teacher()
        if self.teacher.store is None:
            return
        self.teacher.store.check_writable()
        for row in sorted({0, len(dataset) // 2, len(dataset) - 1}) if dataset is not None and len(dataset) else ():
            samples = [dataset.get(row, np.random.default_rng(seed)) for seed in (0, 1)]
            clouds = [sample.points[:, :3] if sample.original is None else sample.original for sample in samples]
            first, second = (fixed_cloud_key(torch.from_numpy(np.ascontiguousarray(cloud))) for cloud in clouds)
            if first != second:
                raise ConfigError(
                    f"teacher_store: the data set gives cloud {row} with other points each time, so what is stored is never used again. "
                    "Use all points of each cloud, or the same ones (data.pool equal to data.points), and data.augment.dropout 0; or set "
                    "teacher_store: null"
                )

    def check_teacher(self) -> None:
        """Load the teacher, and refuse it (ConfigError) if its features are not those that the model predicts."""
        teacher = self.teacher.load()
        channels = self.feature_head.out_features // (VIEWS * self.backbone.config.group_sizes[-self.stages])
        if teacher.channels != channels:
            raise ConfigError(f"the teacher {teacher.name!r} gives {teacher.channels} channels, the model was made for {channels}")

    def forward(self, batch: PointBatch, *, generator: torch.Generator | None = None, mask: Tensor | None = None) -> Output:
        """Ask the teacher, hide tokens, reconstruct points and features, and measure how well.

        Args:
            batch: Clouds with the backbone's columns.
            generator: Source of the mask and drop-path draws, CPU; None uses torch's global one.
            mask: Hidden tokens of the coarsest scale, bool ``[B, groups]`` or packed ``[T]``; None draws them.

        Returns:
            Sum of the Chamfer loss over all tokens of the batch that are hidden at the reconstructed scale and the mean squared error of
            the teacher's features over those that are visible (section 3.4, weights 1 and 1). Metrics: ``chamfer_x1000`` and
            ``feature_x1000`` (the numbers the paper's code logs); ``mask_entropy``, that of the probabilities of a coarsest token, 1
            being even, and ``mask_odds``, the highest over the lowest, both means over the clouds. ``aux``: ``scales``, ``hidden`` (bool
            ``[T]`` of every scale, finest first), ``prediction [M, P, 3]`` relative to the hidden centres, and of the coarsest tokens
            ``saliency`` and ``probability [T]``.
        """
        random = BatchRandom.of(batch, generator)
        scales = self.backbone.group(batch.points)
        rows, seen = point_rows(scales), self.look(batch)
        saliency = self.saliency(batch, seen, scales[-1], rows[-1])
        segments, offsets = scales[-1].segments, scales[-1].segments.offsets(saliency.device)
        logits = self.logits(saliency, offsets)
        if mask is None:
            ratio = self.config.mask_ratio
            if self.config.masking == "saliency":
                mask = weighted_mask(logits, segments, ratio, random)
            else:
                mask = random_mask(segments, ratio, random, saliency.device, ragged=True)
        hidden = self.backbone.propagate_mask(scales, mask.reshape(-1).to(device=saliency.device, dtype=torch.bool))
        encoded = self.backbone.encode(scales, hidden, random=random)
        decoded = self.decoder(scales, encoded, random=random)
        rebuilt = hidden[-self.stages]
        prediction = self.predict(decoded[rebuilt])
        chamfer = self.chamfer(prediction, scales, hidden)
        features = self.feature_loss(decoded, batch, seen, scales, rows, ~rebuilt)
        probability = ops.segment_reduce(logits, offsets, "softmax")
        return Output(
            chamfer + features,
            {"chamfer_x1000": 1000 * chamfer.detach(), "feature_x1000": 1000 * features.detach(), **_evenness(probability, offsets)},
            {
                "scales": scales,
                "hidden": hidden,
                "prediction": prediction.detach(),
                "saliency": saliency,
                "probability": probability,
            },
        )

    def looked_at(self, batch: PointBatch) -> PackedPoints:
        """The clouds the teacher looks at, point for point those of the batch."""
        if self.config.teacher_view == "augmented" or batch.original is None:
            return PackedPoints(batch.points.coord, batch.points.offsets)
        return PackedPoints(batch.original, batch.points.offsets)

    def look(self, batch: PointBatch) -> CloudOutput:
        """What the teacher says of the three views of each cloud."""
        self.check_teacher()
        return self.teacher(self.looked_at(batch), fixed=self.config.teacher_view == "original")

    @torch.no_grad()
    def saliency(self, batch: PointBatch, seen: CloudOutput, scale: Scale, rows: Tensor) -> Tensor:
        """How much the teacher attends to each token of a scale, mean over the views, ``[T]``; ``rows [T]`` are the points they are at."""
        places = PackedPoints(self.looked_at(batch).coord[rows], scale.segments.offsets(rows.device))
        maps = seen.saliency.unflatten(1, (1, *seen.features.shape[2:]))
        return back_project(maps, places, seen.frames)[..., 0].mean(1)

    def logits(self, saliency: Tensor, offsets: Tensor) -> Tensor:
        """Logarithm of the chance of each coarsest token to stay visible, up to a constant of its cloud, ``[T]``."""
        temperature = self.config.saliency_temperature
        if temperature is None:
            return saliency
        cloud = ops.batch_from_offsets(offsets)
        centred = saliency - ops.segment_reduce(saliency, offsets, "mean")[cloud]
        deviation = ops.segment_reduce(centred.square(), offsets, "mean").sqrt()[cloud]
        return torch.where(deviation > 0, centred / (temperature * deviation), 0)

    def feature_loss(
        self, decoded: Tensor, batch: PointBatch, seen: CloudOutput, scales: Sequence[Scale], rows: Sequence[Tensor], visible: Tensor
    ) -> Tensor:
        """Mean squared error of the features that visible tokens predict of their members, in the order of the members and views."""
        clouds = self.looked_at(batch)
        index = scales[-self.stages].index[visible]
        finer = len(scales) - self.stages - 1
        offsets = clouds.offsets if finer < 0 else scales[finer].segments.offsets(index.device)
        with torch.no_grad():
            used, slots = index.unique(return_inverse=True)  # most members belong to several tokens
            places = clouds.coord[used if finer < 0 else rows[finer][used]]
            targets = back_project(seen.features, PackedPoints(places, torch.searchsorted(used, offsets)), seen.frames).flatten(1)
        loss = gathered_regression_loss(self.feature_head, decoded[visible], targets.to(self.feature_head.weight.dtype), slots)
        return loss * self.share(len(index), scales)

    @torch.no_grad()
    def pictures(self, batch: PointBatch, *, generator: torch.Generator | None = None) -> list[dict[str, np.ndarray]]:
        """What the method and its teacher see and make of each cloud, for a report.

        Returns:
            For each cloud ``input``, ``visible`` (points of the visible tokens of the finest scale), ``reconstruction`` (predicted points
            of the hidden tokens) and ``centers`` (of the coarsest tokens), float32 ``[n, 3]``; ``saliency [n]`` of those; ``depth``, the
            teacher's images in 0..1 (0.5 is empty), float32 ``[3, 224, 224]``.
        """
        return super().pictures(batch, generator=generator)

    def _draw(self, batch: PointBatch, output: Output) -> list[dict[str, np.ndarray]]:
        pictures = super()._draw(batch, output)
        clouds, coarsest = self.looked_at(batch), output.aux["scales"][-1]
        depth = splat_depth(clouds, fit_views(clouds, self.teacher.size)).sigmoid().unflatten(0, (VIEWS, -1)).transpose(0, 1)
        lengths = list(coarsest.segments.lengths)
        parts = (depth, coarsest.centers.split(lengths), output.aux["saliency"].split(lengths))
        for picture, *values in zip(pictures, *parts, strict=True):
            named = zip(("depth", "centers", "saliency"), values, strict=True)
            picture.update({name: value.float().cpu().numpy() for name, value in named})
        return pictures

    def layer_groups(self) -> list[list[str]]:
        """Parameter name prefixes from input to output, for layer-wise learning-rate decay."""
        *encoder, heads = super().layer_groups()
        return [*encoder, [*heads, "feature_head."]]


def point_rows(scales: Sequence[Scale]) -> list[Tensor]:
    """Which point of the batch each token's centre is, ``[T]`` int64 for every scale, finest first: the nearest member of each."""
    rows = [scales[0].index[:, 0]]
    for scale in scales[1:]:
        rows.append(rows[-1][scale.index[:, 0]])
    return rows


def _evenness(probability: Tensor, offsets: Tensor) -> dict[str, Tensor]:
    """How even the probabilities of the tokens of a cloud are; means over the clouds."""
    entropy = ops.segment_reduce(torch.special.entr(probability), offsets, "sum")
    highest, lowest = ops.segment_reduce(probability, offsets, "max"), ops.segment_reduce(probability, offsets, "min")
    most = offsets.diff().log()
    share = torch.where(most > 0, entropy / most, 1)
    return {"mask_entropy": share.mean(), "mask_odds": (highest / lowest.clamp(min=1e-30)).mean()}


@METHODS.register
def i2p_mae() -> I2PMAEConfig:
    """I2P-MAE with the published numbers."""
    return I2PMAEConfig()


def convert_reference_state(
    state: Mapping[str, Tensor], config: Mapping[str, Any] | None = None
) -> tuple[tuple[PointM2AEEncoderConfig, I2PMAEConfig], dict[str, Tensor]]:
    """Turn an official I2P-MAE pretraining checkpoint into configurations and a state for :class:`I2PMAE`, without its teacher.

    Widths and depths are read off the tensors. What they cannot tell (heads, groups, mask) is taken from ``config`` in the published
    layout (``num_groups``, ``group_sizes``, ``num_heads``, ``mask_ratio``), else from the released one.

    Args:
        state: Weights, already without ``module.`` (see :func:`geossl.models.checkpoints.read_reference_state`). ``clip_model.*`` is left
            out: see :func:`reference_teacher`.
        config: The ``model`` section of the published configuration.

    Raises:
        CheckpointError: the state is not an I2P-MAE pretraining checkpoint.
    """
    config = dict(config or {})
    config.setdefault("local_radius", [0.0] * len(config.get("num_groups", (512, 256, 64))))
    own = {key: value for key, value in state.items() if not key.startswith("clip_model.")}
    encoder, decoder, converted = convert_reference_weights(own, {"rec_head_3d.": "head.", "rec_head_2d.": "feature_head."}, "I2P-MAE")
    backbone = reference_encoder_config(encoder, config)
    options = reference_decoder_config(decoder, config)
    members = backbone.group_sizes[-len(options["decoder_depths"])]
    method = I2PMAEConfig(
        mask_ratio=config.get("mask_ratio", 0.8),
        predicted_points=own["rec_head_3d.weight"].shape[0] // 3,
        decay_token_layers=False,
        teacher=None,
        feature_channels=own["rec_head_2d.weight"].shape[0] // (members * VIEWS),
        **options,
    )
    return (backbone, method), converted


def reference_teacher(source: str | os.PathLike[str] | Mapping[str, Any], *, heads: int | None = None) -> Teacher:
    """Build the 2D teacher whose weights an official I2P-MAE checkpoint holds (``clip_model.*``).

    Args:
        source: The file, or what was read from it.
        heads: Attention heads; None: one for each 64 channels, as in all of CLIP.

    Raises:
        CheckpointError: there is no CLIP vision transformer in it.

    Example:
        >>> model = geossl.load_reference("i2p_mae", "pre-train.pth")
        >>> model.teacher.use(reference_teacher("pre-train.pth"))
    """
    read = read_reference_state(source)
    visual = {key: value for key, value in read.items() if key.startswith("clip_model.visual.")}
    name = "the given state" if isinstance(source, Mapping) else str(source)
    if not visual:
        raise CheckpointError(f"{name}: holds no teacher (clip_model.visual.*); build one from its own file with TeacherConfig")
    state = convert_clip_state(visual)
    dim, _, patch, _ = state["patch_embed.weight"].shape
    heads = heads or dim // 64
    tower = ImageViT(
        ImageViTConfig(
            dim=dim,
            depth=1 + max(int(key.split(".")[1]) for key in state if key.startswith("blocks.")),
            heads=heads,
            patch=patch,
            grid=round((state["pos_embed"].shape[1] - 1) ** 0.5),
            embed_dim=state["head.weight"].shape[0],
            pre_norm=True,
            quick_gelu=True,
            eps=1e-5,
            resize_offset=0.0,
        )
    )
    load_state(tower, state, source=name)
    return Teacher(tower, name=f"i2p_mae_clip_{heads}_heads", channels=tower.config.channels, digest=state_digest(state))
