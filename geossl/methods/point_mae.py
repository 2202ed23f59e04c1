"""Point-MAE: masked autoencoding of point groups.

Paper: Pang et al., "Masked Autoencoders for Point Cloud Self-supervised Learning", ECCV 2022, arXiv 2203.06604.

A share of the groups is hidden. The encoder sees only the visible ones; a light decoder gets their features, a learned mask token
at every hidden centre, and predicts the points of each hidden group relative to its centre. The loss is the Chamfer distance.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from geossl import ops
from geossl.errors import CheckpointError, ConfigError, unknown_name
from geossl.geometry import Output, PointBatch
from geossl.layers import BatchRandom, BlockStack, PositionMLP, block_mask, random_mask
from geossl.methods.registry import METHODS
from geossl.models.point_vit import PointGroups, PointViT, PointViTConfig, convert_reference_encoder


@dataclass(frozen=True, kw_only=True)
class PointMAEConfig:
    """Numbers of :class:`PointMAE` around its backbone. The defaults are the published ones."""

    name: str = "point_mae"
    """Registered method."""
    mask: Literal["random", "block"] = "random"
    """Which groups are hidden: random ones, or one block of neighbouring ones."""
    mask_ratio: float = 0.6
    """Share of hidden groups, 0 < ratio < 1; the published rounding hides int(ratio * groups)."""
    loss: Literal["cdl2", "cdl1"] = "cdl2"
    """Chamfer distance: cdl2 is mean d1 + mean d2 of squared distances, cdl1 is (mean sqrt d1 + mean sqrt d2) / 2."""
    feature_weight: float = 0.0
    """Weight of predicting the columns after the coordinates (normal, colour) too: the mean squared difference between each point
    and its nearest one in the other cloud. 0, as published, predicts positions only."""
    decoder_depth: int = 4
    """Decoder blocks."""
    decoder_heads: int = 6
    """Attention heads of the decoder; must divide the backbone's dim."""
    decoder_drop_path: float = 0.1
    """Stochastic depth of the last decoder block."""

    def __post_init__(self) -> None:
        if self.mask not in ("random", "block"):
            raise unknown_name("mask", self.mask, ("random", "block"))
        if self.loss not in ("cdl2", "cdl1"):
            raise unknown_name("loss", self.loss, ("cdl2", "cdl1"))
        if not 0 < self.mask_ratio < 1:
            raise ConfigError(f"mask_ratio must lie strictly between 0 and 1, got {self.mask_ratio}")
        if self.feature_weight < 0:
            raise ConfigError(f"feature_weight must be at least 0, got {self.feature_weight}")
        if self.decoder_depth < 1 or self.decoder_heads < 1:
            raise ConfigError(f"decoder_depth and decoder_heads must be at least 1, got {self.decoder_depth} and {self.decoder_heads}")
        if not 0 <= self.decoder_drop_path < 1:
            raise ConfigError(f"decoder_drop_path must lie in [0, 1), got {self.decoder_drop_path}")

    def build(self, backbone: nn.Module) -> PointMAE:
        """Create the method around ``backbone`` with fresh decoder weights."""
        if not isinstance(backbone, PointViT):
            raise ConfigError(f"method point_mae needs a point_vit_* backbone, got {type(backbone).__name__}")
        if backbone.config.dim % self.decoder_heads:
            raise ConfigError(f"decoder_heads must divide the backbone's dim {backbone.config.dim}, got {self.decoder_heads}")
        if self.feature_weight and backbone.config.in_channels == 3:
            raise ConfigError("feature_weight needs points with columns after the coordinates, but the backbone has in_channels=3")
        return PointMAE(self, backbone)


class PointMAE(nn.Module):
    """Masked autoencoder of point groups; see the module's docstring.

    Args:
        config: Numbers of the method.
        backbone: The encoder to pretrain.
    """

    def __init__(self, config: PointMAEConfig, backbone: PointViT) -> None:
        super().__init__()
        self.config = config
        self.backbone = backbone
        dim = backbone.config.dim
        self.mask_token = nn.Parameter(torch.zeros(dim))
        self.decoder_position = PositionMLP(dim)
        self.decoder = BlockStack(dim, config.decoder_depth, config.decoder_heads, drop_path=config.decoder_drop_path)
        self.decoder_norm = nn.LayerNorm(dim)
        self.columns = backbone.config.in_channels if config.feature_weight else 3
        self.head = nn.Linear(dim, self.columns * backbone.config.group_size)
        nn.init.trunc_normal_(self.mask_token, std=0.02)
        for module in self.decoder.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, batch: PointBatch, *, generator: torch.Generator | None = None, mask: Tensor | None = None) -> Output:
        """Hide groups, reconstruct them, and measure how well.

        Args:
            batch: Clouds with the backbone's columns.
            generator: Source of the mask and drop-path draws, CPU; None uses torch's global one.
            mask: Hidden groups, bool ``[B, groups]`` or packed ``[T]``; None draws one as configured.

        Returns:
            Chamfer loss over all hidden groups of the batch; metric ``chamfer_x1000`` (the number the papers log);
            ``aux``: ``groups``, ``mask [T]``, ``prediction [M, K, 3]`` relative to the hidden centres. With ``feature_weight``,
            predictions have all columns and metric ``feature_error`` is their mean squared difference.
        """
        random = BatchRandom.of(batch, generator)
        groups = self.backbone.group(batch.points)
        mask = self.draw_mask(groups, random) if mask is None else mask.reshape(-1).to(device=groups.centers.device, dtype=torch.bool)
        prediction = self.reconstruct(groups, mask, random)
        target = groups.points[mask]
        loss = self.reconstruction_loss(prediction[..., :3], target[..., :3])
        metrics = {"chamfer_x1000": 1000 * loss.detach()}
        if self.config.feature_weight:
            error = matched_feature_error(prediction, target)
            metrics["feature_error"] = error.detach()
            loss = loss + self.config.feature_weight * error
        return Output(loss, metrics, {"groups": groups, "mask": mask, "prediction": prediction.detach()})

    def draw_mask(self, groups: PointGroups, random: BatchRandom) -> Tensor:
        """Draw the hidden groups, ``[T]`` bool."""
        if self.config.mask == "block":
            return block_mask(groups.centers, groups.segments, self.config.mask_ratio, random)
        return random_mask(groups.segments, self.config.mask_ratio, random, groups.centers.device)

    def reconstruct(self, groups: PointGroups, mask: Tensor, random: BatchRandom | None = None) -> Tensor:
        """Predict the points of the hidden groups, ``[M, K, columns]`` relative to their centres, in order of the groups."""
        visible_rows, hidden_rows = (~mask).nonzero()[:, 0], mask.nonzero()[:, 0]
        hidden, visible = groups.segments.count(mask), groups.segments.count(~mask)

        encoded = self.backbone.encode(groups, visible_rows, visible, random=random)
        tokens = self.mask_token.to(encoded.dtype).expand(mask.shape[0], -1).index_copy(0, visible_rows, encoded)
        position = self.decoder_position(groups.centers)
        decoded = self.decoder(tokens, position, groups.segments, random=random, rows=hidden_rows, row_segments=hidden)
        prediction = self.head(self.decoder_norm(decoded)).to(groups.points.dtype)
        return prediction.view(-1, self.backbone.config.group_size, self.columns)

    def reconstruction_loss(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Chamfer distance between groups ``[M, K, 3]``, the mean over all groups: scalar."""
        if self.config.loss == "cdl2":
            return ops.chamfer_distance_patches(prediction, target, norm="l2sq")
        return 0.5 * ops.chamfer_distance_patches(prediction, target, norm="l2")

    @torch.no_grad()
    def pictures(self, batch: PointBatch, *, generator: torch.Generator | None = None) -> list[dict[str, np.ndarray]]:
        """What the method sees and makes of each cloud, for a report.

        Returns:
            For each cloud ``input``, ``visible`` (points of the visible groups) and ``reconstruction`` (predicted points of the
            hidden groups), float32 ``[n, 3]``.
        """
        output = self(batch, generator=generator)
        groups, mask = output.aux["groups"], output.aux["mask"]
        absolute = groups.points[..., :3] + groups.centers[:, None]
        predicted = torch.full_like(absolute, torch.nan)
        predicted[mask] = output.aux["prediction"][..., :3] + groups.centers[mask][:, None]
        clouds = batch.points.coord.split(batch.points.lengths.tolist())
        pictures = []
        for cloud, points, guess, hidden in zip(
            clouds, *(x.split(list(groups.segments.lengths)) for x in (absolute, predicted, mask)), strict=True
        ):
            shown = {"input": cloud, "visible": points[~hidden].reshape(-1, 3), "reconstruction": guess[hidden].reshape(-1, 3)}
            pictures.append({name: value.float().cpu().numpy() for name, value in shown.items()})
        return pictures

    def no_weight_decay(self) -> set[str]:
        """The mask token is not decayed (published rule: no name containing "token")."""
        return {"mask_token"} | {f"backbone.{name}" for name in self.backbone.no_weight_decay()}

    def layer_groups(self) -> list[list[str]]:
        """Parameter name prefixes from input to output, for layer-wise learning-rate decay."""
        encoder = [[f"backbone.{prefix}" for prefix in prefixes] for prefixes in self.backbone.layer_groups()]
        return [*encoder, ["mask_token", "decoder_position.", "decoder.", "decoder_norm.", "head."]]

    def set_grad_checkpointing(self, enabled: bool = True) -> None:
        """Recompute block activations of encoder and decoder in the backward pass."""
        self.backbone.set_grad_checkpointing(enabled)
        self.decoder.grad_checkpointing = enabled


def matched_feature_error(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean squared difference of the feature columns between each point and its nearest one in the other cloud, both ways.

    Args:
        prediction: Groups ``[M, K, 3 + C]``: coordinates, then features.
        target: Groups ``[M, L, 3 + C]``.

    Returns:
        Scalar, 0 for no groups; differentiable in the features, not in who matches whom.
    """
    if prediction.shape[0] == 0:
        return prediction.sum()
    with torch.no_grad():
        distance = (prediction[:, :, None, :3] - target[:, None, :, :3]).square().sum(-1)
        forward, backward = distance.argmin(2), distance.argmin(1)
    features, wanted = prediction[..., 3:], target[..., 3:]
    columns = features.shape[2]
    one = features - wanted.gather(1, forward[..., None].expand(-1, -1, columns))
    other = wanted - features.gather(1, backward[..., None].expand(-1, -1, columns))
    return 0.5 * (one.square().mean() + other.square().mean())


@METHODS.register
def point_mae() -> PointMAEConfig:
    """Point-MAE with the published numbers."""
    return PointMAEConfig()


def convert_reference_state(
    state: Mapping[str, Tensor], config: Mapping[str, Any] | None = None
) -> tuple[tuple[PointViTConfig, PointMAEConfig], dict[str, Tensor]]:
    """Turn an official Point-MAE pretraining checkpoint into configurations and a state for :class:`PointMAE`.

    Widths and depths are read off the tensors. What they cannot tell (heads, number of groups, mask, loss) is taken from
    ``config`` in the published layout (``num_group``, ``group_size``, ``loss``, ``transformer_config``), else from the released one.

    Args:
        state: Weights, already without ``module.`` (see :func:`geossl.models.checkpoints.read_reference_state`).
        config: The ``model`` section of the published configuration.

    Raises:
        CheckpointError: the state is not a Point-MAE pretraining checkpoint.
    """
    config = dict(config or {})
    transformer = dict(config.get("transformer_config") or {})
    encoder = convert_reference_encoder({k.removeprefix("MAE_encoder."): v for k, v in state.items() if k.startswith("MAE_encoder.")})
    if "increase_dim.0.weight" not in state or "embed.conv1.weight" not in encoder:
        raise CheckpointError(
            f"not a Point-MAE pretraining checkpoint: expected MAE_encoder.*, MAE_decoder.*, increase_dim.*; found {sorted(state)[:8]}"
        )
    backbone = reference_encoder_config(encoder, config, group_size=state["increase_dim.0.weight"].shape[0] // 3)
    method = PointMAEConfig(
        mask="block" if transformer.get("mask_type") == "block" else "random",
        mask_ratio=transformer.get("mask_ratio", 0.6),
        loss=config.get("loss", "cdl2"),
        decoder_depth=1 + max((int(k.split(".")[2]) for k in state if k.startswith("MAE_decoder.blocks.")), default=0),
        decoder_heads=transformer.get("decoder_num_heads", 6),
        decoder_drop_path=transformer.get("drop_path_rate", 0.1),
    )
    converted = {f"backbone.{key}": value for key, value in encoder.items()}
    for key, value in state.items():
        if convert_reference_encoder({key.removeprefix("MAE_encoder."): value}) and key.startswith("MAE_encoder."):
            continue
        for old, new in _REFERENCE_NAMES.items():
            if key.startswith(old):
                key = new + key.removeprefix(old)
                break
        converted[key] = value.reshape(-1) if key == "mask_token" else value.squeeze(-1) if value.dim() == 3 else value
    return (backbone, method), converted


def reference_encoder_config(encoder: Mapping[str, Tensor], config: Mapping[str, Any], group_size: int) -> PointViTConfig:
    """The backbone configuration of a converted Point-MAE encoder, the published near-origin rule of the sampling included."""
    transformer = config.get("transformer_config") or config
    return PointViTConfig(
        name="point_vit_small",
        dim=encoder["norm.weight"].shape[0],
        depth=1 + max(int(k.split(".")[2]) for k in encoder if k.startswith("blocks.blocks.")),
        heads=transformer.get("num_heads", 6),
        groups=config.get("num_group", 64),
        group_size=config.get("group_size", group_size),
        in_channels=encoder["embed.conv1.weight"].shape[1],
        embed_widths=(
            encoder["embed.conv1.weight"].shape[0],
            encoder["embed.conv2.weight"].shape[0],
            encoder["embed.conv3.weight"].shape[0],
        ),
        drop_path=transformer.get("drop_path_rate", 0.1),
        min_sq_norm=1e-3,
    )


_REFERENCE_NAMES = {
    "decoder_pos_embed.": "decoder_position.",
    "MAE_decoder.blocks.": "decoder.blocks.",
    "MAE_decoder.norm.": "decoder_norm.",
    "increase_dim.0.": "head.",
}
