"""PoLAr-MAE and its Point-MAE: masked autoencoding of the volumetric tokens of sparse events with energies.

Paper: Young et al., "Particle Trajectory Representation Learning with Masked Point Modeling", 2025, arXiv 2502.02558.

A share of the tokens is hidden. The encoder sees only the visible ones; a decoder gets their features and a learned mask token for every
hidden one, position codes added throughout. From each hidden token a head predicts the points relative to its centre, compared by the
Chamfer distance. PoLAr-MAE predicts the energies too, one for each true point: a small PointNet that numbers the points tells the decoder
which is which.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from geossl import ops
from geossl.errors import CheckpointError, ConfigError, unknown_name
from geossl.geometry import Output, PointBatch, euler_to_matrix, quaternion_to_matrix, rotate_each
from geossl.layers import BatchRandom, PackedTokenEmbedding, init_transformer_weights, random_mask
from geossl.layers.norm import make_norm
from geossl.methods.registry import METHODS
from geossl.models.point_vit_volume import (
    VolumeGroups,
    VolumePointViT,
    VolumePointViTConfig,
    convert_names,
    convert_reference_encoder,
    embedding_names,
    reference_encoder_config,
)

ROTATIONS = ("none", "event", "batch")


@dataclass(frozen=True, kw_only=True)
class PolarMAEConfig:
    """Numbers of :class:`PolarMAE` around its backbone. The defaults are the published ones, but for the rotation."""

    name: str = "polar_mae"
    """Registered method."""
    energy: bool = True
    """Predict the energy of each true point of the hidden tokens (PoLAr-MAE); false is the Point-MAE of the same paper."""
    mask_ratio: float = 0.6
    """Share of hidden tokens, 0 < ratio < 1; the published rounding hides int(ratio * tokens) of each event."""
    predict: Literal["all", "positions"] = "all"
    """What the Chamfer distance compares: all columns of a point, or the three coordinates."""
    chamfer_weight: float = 1.0
    """Weight of the Chamfer distance."""
    energy_weight: float = 1.0
    """Weight of the mean squared error of the energies."""
    rotation: Literal["none", "event", "batch"] = "event"
    """Random rotation in training: of every event for itself, uniformly; or, as published, one for the batch, of uniform Euler angles."""
    decoder_depth: int = 4
    """Decoder blocks."""
    decoder_heads: int = 6
    """Attention heads of the decoder; must divide the backbone's dim."""
    decoder_drop_path: float = 0.25
    """Stochastic depth of the last decoder block, drawn for each token."""

    def __post_init__(self) -> None:
        for key, value, choices in (("predict", self.predict, ("all", "positions")), ("rotation", self.rotation, ROTATIONS)):
            if value not in choices:
                raise unknown_name(key, value, choices)
        if not 0 < self.mask_ratio < 1:
            raise ConfigError(f"mask_ratio must lie strictly between 0 and 1, got {self.mask_ratio}")
        if self.chamfer_weight < 0 or self.energy_weight < 0:
            raise ConfigError(f"chamfer_weight and energy_weight must be at least 0, got {self.chamfer_weight} and {self.energy_weight}")
        if self.decoder_depth < 1 or self.decoder_heads < 1:
            raise ConfigError(f"decoder_depth and decoder_heads must be at least 1, got {self.decoder_depth} and {self.decoder_heads}")
        if not 0 <= self.decoder_drop_path < 1:
            raise ConfigError(f"decoder_drop_path must lie in [0, 1), got {self.decoder_drop_path}")

    def build(self, backbone: nn.Module) -> PolarMAE:
        """Create the method around ``backbone`` with fresh decoder weights."""
        if not isinstance(backbone, VolumePointViT):
            raise ConfigError(f"method polar_mae needs a point_vit_volume_* backbone, got {type(backbone).__name__}")
        if backbone.config.dim % self.decoder_heads:
            raise ConfigError(f"decoder_heads must divide the backbone's dim {backbone.config.dim}, got {self.decoder_heads}")
        if self.energy and backbone.config.in_channels < 4:
            raise ConfigError("energy needs points with an energy after the coordinates, but the backbone has in_channels=3")
        return PolarMAE(self, backbone)


class PolarMAE(nn.Module):
    """Masked autoencoder of volumetric tokens; see the module's docstring.

    Args:
        config: Numbers of the method.
        backbone: The encoder to pretrain.
    """

    def __init__(self, config: PolarMAEConfig, backbone: VolumePointViT) -> None:
        super().__init__()
        self.config = config
        self.backbone = backbone
        dim, self.slots = backbone.config.dim, backbone.tokenizer.slots
        self.columns = backbone.config.in_channels if config.predict == "all" else 3
        self.mask_token = nn.Parameter(torch.zeros(dim))
        self.decoder = backbone.block_stack(config.decoder_depth, config.decoder_heads, config.decoder_drop_path)
        self.decoder_norm = make_norm(backbone.config.norm, dim)
        self.head = nn.Linear(dim, self.slots * self.columns)
        for module in (self.decoder, self.decoder_norm, self.head):
            module.apply(init_transformer_weights)
        nn.init.trunc_normal_(self.mask_token, std=0.02, a=-0.02, b=0.02)
        if config.energy:
            self.patch_embed = PackedTokenEmbedding(
                dim,
                3,
                widths=backbone.config.embed_widths,
                slots=self.slots,
                empty_slots=backbone.config.empty_slots,
                slot_embedding=True,
            )
            self.energy_head = nn.Linear(2 * dim, self.slots)
            self.patch_embed.apply(init_transformer_weights)
            self.energy_head.apply(init_transformer_weights)

    def forward(self, batch: PointBatch, *, generator: torch.Generator | None = None, mask: Tensor | None = None) -> Output:
        """Hide tokens, reconstruct them, and measure how well.

        Args:
            batch: Events in voxels with the backbone's columns.
            generator: Source of the mask, rotation and drop-path draws, CPU; None uses torch's global one (as attention dropout does).
            mask: Hidden tokens, bool ``[T]`` packed; None draws them.

        Returns:
            The weighted sum of the losses, means over the hidden tokens of this batch (each process and micro-batch takes its own, as
            published); metrics ``chamfer`` (mean over hidden tokens) and ``energy`` (mean squared error over their
            points), unweighted; ``aux``: ``groups``, ``mask [T]``, ``prediction [M, slots, columns]`` relative to the hidden centres, and
            with ``energy`` the predicted energies ``energy [M, slots]`` of the true points.
        """
        random = BatchRandom.of(batch, generator)
        groups = self.backbone.group(batch.points)
        mask = self.draw_mask(groups, random) if mask is None else mask.reshape(-1).to(device=groups.centers.device, dtype=torch.bool)
        if len(mask) != len(groups.centers):
            raise ValueError(f"PolarMAE: mask must have one entry per token, {len(groups.centers)} for these events; got {len(mask)}")
        if self.training:
            groups = rotate_groups(groups, draw_rotations(self.config.rotation, random))
        decoded = self.decode(groups, mask, random)
        hidden = HiddenPoints(groups, mask, self.slots)
        prediction = self.head(decoded).to(groups.points.dtype).view(-1, self.slots, self.columns)
        chamfer = hidden.chamfer(prediction)
        loss, metrics = self.config.chamfer_weight * chamfer, {"chamfer": chamfer.detach()}
        aux = {"groups": groups, "mask": mask, "prediction": prediction.detach()}
        if self.config.energy:
            energy = self.predict_energy(hidden, decoded)
            error = hidden.energy_error(energy)
            loss = loss + self.config.energy_weight * error
            metrics["energy"], aux["energy"] = error.detach(), energy.detach()
        return Output(loss, metrics, aux)

    def draw_mask(self, groups: VolumeGroups, random: BatchRandom) -> Tensor:
        """Draw the hidden tokens, ``[T]`` bool."""
        return random_mask(groups.segments, self.config.mask_ratio, random, groups.centers.device, ragged=True)

    def decode(self, groups: VolumeGroups, mask: Tensor, random: BatchRandom | None = None) -> Tensor:
        """Encode the visible tokens and decode the hidden ones, ``[M, dim]`` normalised, in order of the tokens."""
        visible_rows, hidden_rows = (~mask).nonzero()[:, 0], mask.nonzero()[:, 0]
        hidden, visible = groups.segments.count(mask), groups.segments.count(~mask)

        encoded = self.backbone.encode(groups, visible_rows, visible, random=random)
        tokens = self.mask_token.to(encoded.dtype).expand(mask.shape[0], -1).index_copy(0, visible_rows, encoded)
        position = self.backbone.position(groups.centers)
        if self.decoder.reads_all_rows:  # so does the norm behind the last block
            return self.decoder_norm(self.decoder(tokens, position, groups.segments, random=random))[hidden_rows]
        return self.decoder_norm(self.decoder(tokens, position, groups.segments, random=random, rows=hidden_rows, row_segments=hidden))

    def predict_energy(self, hidden: HiddenPoints, decoded: Tensor) -> Tensor:
        """Predict the energy of each true point of the hidden tokens from where it is, ``[M, slots]`` (rubbish beyond its points)."""
        patch = self.patch_embed(hidden.points[hidden.paired, :3], hidden.paired_splits)
        return self.energy_head(torch.cat([patch, decoded.to(patch.dtype)], 1)).to(hidden.points.dtype)

    @torch.no_grad()
    def pictures(self, batch: PointBatch, *, generator: torch.Generator | None = None) -> list[dict[str, np.ndarray]]:
        """What the method sees and makes of each event, for a report. Call it in evaluation mode: training would rotate.

        Returns:
            For each event, float32, positions in voxels: ``input [N, 3 + C]``; ``visible`` and ``hidden``, the true points of the visible
            and of the hidden tokens; ``reconstruction``, the predicted points of the hidden tokens, as many of each as it has (with
            ``predict="positions"`` without features); ``centers [T, 3]`` and ``center_hidden [T]`` bool; with ``energy``,
            ``hidden_energy``, the energy predicted for each row of ``hidden``.
        """
        output = self(batch, generator=generator)
        groups, mask = output.aux["groups"], output.aux["mask"]
        hidden = HiddenPoints(groups, mask, self.slots)
        token = groups.token_of_row()
        event_of = groups.segments.repeat(torch.arange(len(batch), device=mask.device))
        of_hidden = token[mask[token]][hidden.paired]

        def place(points: Tensor, tokens: Tensor) -> Tensor:
            position = points[:, :3] * self.backbone.tokenizer.radius + self.backbone.denormalize(groups.centers[tokens])
            return torch.cat([position, points[:, 3:]], 1)

        of_visible = token[~mask[token]]
        made = {
            "visible": (place(groups.points[~mask[token]], of_visible), of_visible),
            "hidden": (place(hidden.points[hidden.paired], of_hidden), of_hidden),
            "reconstruction": (place(hidden.predicted(output.aux["prediction"]), of_hidden), of_hidden),
            "centers": (self.backbone.denormalize(groups.centers), torch.arange(len(mask), device=mask.device)),
            "center_hidden": (mask, torch.arange(len(mask), device=mask.device)),
        }
        if self.config.energy:
            made["hidden_energy"] = (hidden.predicted(output.aux["energy"]), of_hidden)
        columns = [batch.points.coord] + ([] if batch.points.feats is None else [batch.points.feats])
        inputs = torch.cat(columns, 1).split(batch.points.lengths.tolist())
        pictures = []
        for event, points in enumerate(inputs):
            shown = {"input": points} | {name: values[event_of[tokens] == event] for name, (values, tokens) in made.items()}
            pictures.append({name: value.cpu().numpy() for name, value in shown.items()})
        return pictures

    def no_weight_decay(self) -> set[str]:
        """The mask token is not decayed."""
        return {"mask_token"} | {f"backbone.{name}" for name in self.backbone.no_weight_decay()}

    def layer_groups(self) -> list[list[str]]:
        """Parameter name prefixes from input to output, for layer-wise learning-rate decay."""
        encoder = [[f"backbone.{prefix}" for prefix in prefixes] for prefixes in self.backbone.layer_groups()]
        return [*encoder, ["mask_token", "decoder.", "decoder_norm.", "head.", "patch_embed.", "energy_head."]]

    def set_grad_checkpointing(self, enabled: bool = True) -> None:
        """Recompute block activations of encoder and decoder in the backward pass."""
        self.backbone.set_grad_checkpointing(enabled)
        self.decoder.grad_checkpointing = enabled


class HiddenPoints:
    """The true points of the hidden tokens, and which prediction of a token belongs to which of them: the n-th to the n-th.

    Args:
        groups: All tokens.
        mask: Which are hidden, ``[T]`` bool.
        slots: Predictions for each. Only with left-over points (``full_coverage``) can a token have more points than that: they are
            targets of the Chamfer distance, but no energy is predicted for them.

    Attributes:
        points: ``[S, in_channels]``, relative to the centre, one hidden token after the other.
        row_splits: Hidden token m has the rows ``row_splits[m]:row_splits[m + 1]``, ``[M + 1]``.
        paired: Rows of ``points`` that have a prediction, ``[P]``.
        paired_splits: The same for hidden token m among those, ``[M + 1]``.
        place: Where the prediction stands among all ``M * slots``, ``[P]``.
    """

    def __init__(self, groups: VolumeGroups, mask: Tensor, slots: int) -> None:
        count = groups.row_splits.diff()[mask]
        self.points = groups.points[mask[groups.token_of_row()]]
        self.row_splits = ops.offsets_from_lengths(count)
        token = ops.batch_from_offsets(self.row_splits, self.points.shape[0])
        slot = torch.arange(self.points.shape[0], device=count.device) - self.row_splits[token]
        self.paired = (slot < slots).nonzero()[:, 0]
        self.paired_splits = ops.offsets_from_lengths(count.clamp(max=slots))
        self.place = (token * slots + slot)[self.paired]

    def predicted(self, prediction: Tensor) -> Tensor:
        """The predictions for the paired points, ``[M, slots, ...] -> [P, ...]``."""
        return prediction.flatten(0, 1).index_select(0, self.place)

    def chamfer(self, prediction: Tensor) -> Tensor:
        """Chamfer distance of the first predictions ``[M, slots, columns]``, as many as a token has points; mean over tokens."""
        target = self.points[:, : prediction.shape[2]].contiguous()
        return ops.chamfer_distance_packed(self.predicted(prediction), self.paired_splits, target, self.row_splits)

    def energy_error(self, energy: Tensor) -> Tensor:
        """Mean squared error of the energies ``[M, slots]`` over all points of the batch; 0 without any."""
        error = F.mse_loss(self.predicted(energy), self.points[self.paired, 3], reduction="sum")
        return error / max(self.paired.shape[0], 1)


def draw_rotations(rotation: str, random: BatchRandom) -> Tensor | None:
    """Draw a rotation matrix for each event of a batch.

    Args:
        rotation: "event": each event gets its own, all equally likely. "batch": all get the same, ``Rx(a) Ry(b) Rz(c)`` of uniform angles
            in [-pi, pi), as published. "none".
        random: Source of the draws.

    Returns:
        ``[B, 3, 3]`` float32, or None for "none".
    """
    if rotation == "none":
        return None
    if rotation == "batch":
        return euler_to_matrix((2 * random.shared(3) - 1) * math.pi).expand(random.size, 3, 3)
    return quaternion_to_matrix(random_quaternion(random.rand(3)))


def rotate_groups(groups: VolumeGroups, matrix: Tensor | None) -> VolumeGroups:
    """Rotate events about the middle of the detector; which points make up a token does not change.

    Args:
        groups: From ``backbone.group``.
        matrix: Rotation of each event, ``[B, 3, 3]``; None leaves them as they are.
    """
    if matrix is None:
        return groups
    matrix = groups.segments.repeat(matrix.to(groups.centers.device, groups.points.dtype))  # [T, 3, 3]
    position = rotate_each(groups.points[:, :3], matrix[groups.token_of_row()])
    return groups._replace(points=torch.cat([position, groups.points[:, 3:]], 1), centers=rotate_each(groups.centers, matrix))


def random_quaternion(uniform: Tensor) -> Tensor:
    """Unit quaternions ``[..., 4]`` (wxyz), uniform over rotations, of three uniform numbers ``[..., 3]`` in [0, 1) (Shoemake, 1992)."""
    share, first, second = uniform[..., 0], *(2 * math.pi * uniform[..., 1:]).unbind(-1)
    low, high = (1 - share).sqrt(), share.sqrt()
    return torch.stack([low * first.sin(), low * first.cos(), high * second.sin(), high * second.cos()], -1)


@METHODS.register
def polar_mae() -> PolarMAEConfig:
    """PoLAr-MAE with the published numbers."""
    return PolarMAEConfig()


def convert_reference_state(
    state: Mapping[str, Tensor], config: Mapping[str, Any] | None = None
) -> tuple[tuple[VolumePointViTConfig, PolarMAEConfig], dict[str, Tensor]]:
    """Turn an official pretraining checkpoint (Point-MAE or PoLAr-MAE) into configurations and a state for :class:`PolarMAE`.

    Args:
        state: Weights, already without a common prefix (see :func:`strip_prefix`).
        config: What the weights cannot tell, where other than released; see
            :func:`geossl.models.point_vit_volume.reference_encoder_config`. ``heads`` serves the decoder too.

    Raises:
        CheckpointError: the state is not a pretraining checkpoint.
    """
    config = dict(config or {})
    encoder = convert_reference_encoder({k.removeprefix("encoder."): v for k, v in state.items() if k.startswith("encoder.")})
    if "increase_dim.weight" not in state or "embed.conv1.weight" not in encoder or "mask_token" not in state:
        raise CheckpointError(
            f"not a PoLAr-MAE pretraining checkpoint: expected encoder.*, decoder.*, increase_dim.*, mask_token; found {sorted(state)[:8]}"
        )
    backbone = reference_encoder_config(encoder, config)
    columns = state["increase_dim.weight"].shape[0] // backbone.tokenizer().slots
    method = PolarMAEConfig(
        energy="energy_decoder.weight" in state,
        predict="positions" if columns == 3 else "all",
        rotation="batch",
        decoder_depth=1 + max((int(k.split(".")[3]) for k in state if k.startswith("decoder.transformer.blocks.")), default=0),
        decoder_heads=config.get("heads", 6),
    )
    converted = {f"backbone.{key}": value for key, value in encoder.items()}
    converted |= convert_names({k: v for k, v in state.items() if not k.startswith("encoder.")}, _REFERENCE_NAMES)
    return (backbone, method), converted


def strip_prefix(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Remove what repackaged files put before every name (``model.`` and the like), found from where the encoder's names begin."""
    marker = "encoder.pos_embed.pos_enc.0.weight"
    prefix = next((key.removesuffix(marker) for key in state if key.endswith(marker)), "")
    return {key.removeprefix(prefix): value for key, value in state.items()}


_REFERENCE_NAMES = {
    "decoder.transformer.blocks.": "decoder.blocks.",
    "decoder.transformer.norm.": "decoder_norm.",
    "increase_dim.": "head.",
    **embedding_names("equivariant_patch_encoder.", "patch_embed."),
    "energy_decoder.": "energy_head.",
}
