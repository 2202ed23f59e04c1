"""Point-M2AE: masked autoencoding of point groups at several scales.

Paper: Zhang et al., "Point-M2AE: Multi-scale Masked Autoencoders for Hierarchical Point Cloud Pre-training", NeurIPS 2022, arXiv
2205.14401.

A share of the coarsest tokens is hidden, and at the finer scales whatever belongs to hidden tokens alone. The encoder sees only the
visible tokens of every scale. A light decoder starts from the coarsest ones and a learned mask token at every hidden centre, carries them
to the next finer scale, where the encoder's tokens of that scale come in, and predicts the points of each token that is hidden there. The
loss is the Chamfer distance.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from geossl import ops
from geossl.errors import CheckpointError, ConfigError
from geossl.geometry import Output, PointBatch
from geossl.layers import BatchRandom, PositionMLP, TokenPropagation, random_mask, share_of_rows
from geossl.methods.registry import METHODS
from geossl.models.point_m2ae import (
    PointM2AEEncoder,
    PointM2AEEncoderConfig,
    Scale,
    VisibleTokens,
    block_stacks,
    convert_reference_encoder,
    reference_encoder_config,
    set_stacks_checkpointing,
)


@dataclass(frozen=True, kw_only=True)
class PointM2AEConfig:
    """Numbers of :class:`PointM2AE` around its backbone. The defaults are the published ones."""

    name: str = "point_m2ae"
    """Registered method."""
    mask_ratio: float = 0.8
    """Share of hidden tokens at the coarsest scale, 0 < ratio < 1; the published rounding hides int(ratio * tokens) of each cloud."""
    predicted_points: int = 16
    """Points predicted for each hidden token, compared with as many true ones as the tokens of that scale have members (8)."""
    decoder_depths: tuple[int, ...] = (1, 1)
    """Decoder blocks at the coarsest scale, the one before it, and so on; the last scale named is the one that is reconstructed."""
    decoder_heads: int = 6
    """Attention heads of the decoder; must divide the backbone's dims at the decoder's scales."""
    decoder_units: int = 1
    """Residual units after each step to a finer scale."""
    decoder_drop_path: float = 0.1
    """Stochastic depth of the last decoder block; grows linearly from 0 at the first."""
    decay_token_layers: bool = True
    """Weight decay acts on the layers that embed and carry tokens too. The published rule leaves out every name with "token" in it."""

    def __post_init__(self) -> None:
        check_decoder(self)

    def build(self, backbone: nn.Module) -> PointM2AE:
        """Create the method around ``backbone`` with fresh decoder weights."""
        return PointM2AE(self, fitting_backbone(self, backbone))


def check_decoder(config: Any) -> None:
    """Refuse numbers that no hierarchical masked autoencoder can have, by name."""
    if not 0 < config.mask_ratio < 1:
        raise ConfigError(f"mask_ratio must lie strictly between 0 and 1, got {config.mask_ratio}")
    if not config.decoder_depths or min(config.decoder_depths) < 1:
        raise ConfigError(f"decoder_depths must be numbers of at least 1, coarsest scale first, got {config.decoder_depths}")
    for key in ("predicted_points", "decoder_heads", "decoder_units"):
        if getattr(config, key) < 1:
            raise ConfigError(f"{key} must be at least 1, got {getattr(config, key)}")
    if not 0 <= config.decoder_drop_path < 1:
        raise ConfigError(f"decoder_drop_path must lie in [0, 1), got {config.decoder_drop_path}")


def fitting_backbone(config: Any, backbone: nn.Module) -> PointM2AEEncoder:
    """Return ``backbone`` if the decoder of ``config`` can stand behind it."""
    if not isinstance(backbone, PointM2AEEncoder):
        raise ConfigError(f"method {config.name} needs a point_m2ae_* backbone, got {type(backbone).__name__}")
    stages, dims = len(config.decoder_depths), backbone.config.dims
    if stages > len(dims):
        raise ConfigError(f"decoder_depths has {stages} scales but the backbone only {len(dims)}; leave out the last ones")
    if any(dim % config.decoder_heads for dim in dims[-stages:]):
        raise ConfigError(f"decoder_heads must divide the backbone's dims {dims[-stages:]}, got {config.decoder_heads}")
    return backbone


class HierarchicalDecoder(nn.Module):
    """From the visible tokens of every scale to all tokens of the scale that is reconstructed (Point-M2AE section 3.3).

    Args:
        dims: Channels at each of its scales, coarsest first.
        depths: Blocks at each.
        heads: Attention heads.
        units: Residual units after each step to a finer scale.
        drop_path: Stochastic depth of the last block.
    """

    def __init__(self, dims: Sequence[int], depths: Sequence[int], heads: int, *, units: int = 1, drop_path: float = 0.0) -> None:
        super().__init__()
        self.mask_token = nn.Parameter(torch.zeros(dims[0]))
        self.positions = nn.ModuleList(PositionMLP(dim, dim) for dim in dims)
        self.stages = block_stacks(dims, depths, heads, drop_path)
        self.propagations = nn.ModuleList(TokenPropagation(fine, coarse, units) for coarse, fine in pairwise(dims))
        self.norm = nn.LayerNorm(dims[-1])
        nn.init.trunc_normal_(self.mask_token, std=0.02)
        for module in self.stages.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(
        self,
        scales: Sequence[Scale],
        encoded: Sequence[VisibleTokens],
        *,
        wanted: Tensor | None = None,
        random: BatchRandom | None = None,
    ) -> Tensor:
        """Decode.

        Args:
            scales: Of the backbone, finest first.
            encoded: Their visible tokens.
            wanted: Tokens of the reconstructed scale whose features are read, ``[T]`` bool; None means all.
            random: Source of drop-path draws.

        Returns:
            ``[n, C]`` normalised, in order of the tokens.
        """
        x: Tensor = self.mask_token
        last = len(self.stages) - 1
        for j, (stage, position) in enumerate(zip(self.stages, self.positions, strict=True)):
            scale, visible = scales[-1 - j], encoded[-1 - j]
            if j == 0:
                x = self.mask_token.to(visible.feats.dtype).expand(len(scale.centers), -1).index_copy(0, visible.rows, visible.feats)
            else:
                coarse = scales[-j]
                x = self.propagations[j - 1](scale.centers, scale.segments, visible.feats, visible.rows, x, coarse.centers, coarse.segments)
            rows = row_segments = None
            if j == last and wanted is not None:
                rows, row_segments = wanted.nonzero()[:, 0], scale.segments.count(wanted)
            x = stage(x, position(scale.centers), scale.segments, random=random, rows=rows, row_segments=row_segments)
        return self.norm(x)


class PointM2AE(nn.Module):
    """Masked autoencoder of point groups at several scales; see the module's docstring.

    Args:
        config: Numbers of the method.
        backbone: The encoder to pretrain. Norms of scales that the decoder does not read get no gradient, so they are frozen.
    """

    def __init__(self, config: PointM2AEConfig, backbone: PointM2AEEncoder) -> None:
        super().__init__()
        self.config = config
        self.backbone = backbone
        self.stages = len(config.decoder_depths)
        dims = backbone.config.dims[: -1 - self.stages : -1]
        self.decoder = HierarchicalDecoder(
            dims, config.decoder_depths, config.decoder_heads, units=config.decoder_units, drop_path=config.decoder_drop_path
        )
        self.head = nn.Linear(dims[-1], 3 * config.predicted_points)
        for norm in backbone.norms[: -self.stages]:
            norm.requires_grad_(False)

    def forward(self, batch: PointBatch, *, generator: torch.Generator | None = None, mask: Tensor | None = None) -> Output:
        """Hide tokens, reconstruct them, and measure how well.

        Args:
            batch: Clouds with the backbone's columns.
            generator: Source of the mask and drop-path draws, CPU; None uses torch's global one.
            mask: Hidden tokens of the coarsest scale, bool ``[B, groups]`` or packed ``[T]``; None draws them.

        Returns:
            Chamfer loss over all tokens of the batch that are hidden at the reconstructed scale; metric ``chamfer_x1000`` (the number the
            paper's code logs); ``aux``: ``scales``, ``hidden`` (bool ``[T]`` of every scale, finest first), ``prediction [M, P, 3]``
            relative to the hidden centres.
        """
        random = BatchRandom.of(batch, generator)
        scales = self.backbone.group(batch.points)
        coarsest = scales[-1]
        if mask is None:
            mask = random_mask(coarsest.segments, self.config.mask_ratio, random, coarsest.centers.device, ragged=True)
        hidden = self.backbone.propagate_mask(scales, mask.reshape(-1).to(device=coarsest.centers.device, dtype=torch.bool))
        prediction = self.reconstruct(scales, hidden, random)
        loss = self.chamfer(prediction, scales, hidden)
        return Output(
            loss,
            {"chamfer_x1000": 1000 * loss.detach()},
            {"scales": scales, "hidden": hidden, "prediction": prediction.detach()},
        )

    def reconstruct(self, scales: Sequence[Scale], hidden: Sequence[Tensor], random: BatchRandom | None = None) -> Tensor:
        """Predict the members of the tokens hidden at the reconstructed scale, ``[M, P, 3]`` relative to their centres, in token order."""
        encoded = self.backbone.encode(scales, hidden, random=random)
        decoded = self.decoder(scales, encoded, wanted=hidden[-self.stages], random=random)
        return self.predict(decoded)

    def predict(self, decoded: Tensor) -> Tensor:
        """Points of decoded tokens ``[M, C]`` relative to their centres, ``[M, P, 3]`` in the type of the head's weights."""
        return self.head(decoded).to(self.head.weight.dtype).view(-1, self.config.predicted_points, 3)

    def chamfer(self, prediction: Tensor, scales: Sequence[Scale], hidden: Sequence[Tensor]) -> Tensor:
        """Mean Chamfer distance of predicted points from the members of the tokens hidden at the reconstructed scale."""
        target = scales[-self.stages].members[hidden[-self.stages]][..., :3]
        return ops.chamfer_distance_patches(prediction, target, norm="l2sq") * self.share(len(target), scales)

    def share(self, rows: int, scales: Sequence[Scale]) -> Tensor | float:
        """What makes the mean over ``rows`` tokens of this process its part of the mean over those of all processes."""
        segments = scales[0].segments
        return share_of_rows(rows, len(segments.lengths), scales[0].centers.device) if self.training else 1.0

    @torch.no_grad()
    def pictures(self, batch: PointBatch, *, generator: torch.Generator | None = None) -> list[dict[str, np.ndarray]]:
        """What the method sees and makes of each cloud, for a report.

        Returns:
            For each cloud ``input``, ``visible`` (points of the visible tokens of the finest scale) and ``reconstruction`` (predicted
            points of the hidden tokens), float32 ``[n, 3]``.
        """
        return self._draw(batch, self(batch, generator=generator))

    def _draw(self, batch: PointBatch, output: Output) -> list[dict[str, np.ndarray]]:
        scales, hidden = output.aux["scales"], output.aux["hidden"]
        finest, made = scales[0], scales[-self.stages]
        points = finest.members[..., :3] + finest.centers[:, None]
        guess = output.aux["prediction"] + made.centers[hidden[-self.stages]][:, None]
        parts = {
            "input": batch.points.coord.split(batch.points.lengths.tolist()),
            "visible": points[~hidden[0]].split(list(finest.segments.count(~hidden[0]).lengths)),
            "reconstruction": guess.split(list(made.segments.count(hidden[-self.stages]).lengths)),
        }
        return [
            {name: part.reshape(-1, 3).float().cpu().numpy() for name, part in zip(parts, cloud, strict=True)}
            for cloud in zip(*parts.values(), strict=True)
        ]

    def no_weight_decay(self) -> set[str]:
        """The mask token is not decayed; by the published rule, neither are the layers that embed and carry tokens."""
        undecayed = {"decoder.mask_token"} | {f"backbone.{name}" for name in self.backbone.no_weight_decay()}
        if not self.config.decay_token_layers:
            layers = ("backbone.embeds.", "decoder.propagations.")
            undecayed |= {name for name, _ in self.named_parameters() if name.startswith(layers)}
        return undecayed

    def layer_groups(self) -> list[list[str]]:
        """Parameter name prefixes from input to output, for layer-wise learning-rate decay."""
        encoder = [[f"backbone.{prefix}" for prefix in prefixes] for prefixes in self.backbone.layer_groups()]
        return [*encoder, ["decoder.", "head."]]

    def set_grad_checkpointing(self, enabled: bool = True) -> None:
        """Recompute block activations of encoder and decoder in the backward pass."""
        self.backbone.set_grad_checkpointing(enabled)
        set_stacks_checkpointing(self.decoder.stages, enabled)


@METHODS.register
def point_m2ae() -> PointM2AEConfig:
    """Point-M2AE with the published numbers."""
    return PointM2AEConfig()


def convert_reference_state(
    state: Mapping[str, Tensor], config: Mapping[str, Any] | None = None
) -> tuple[tuple[PointM2AEEncoderConfig, PointM2AEConfig], dict[str, Tensor]]:
    """Turn an official Point-M2AE pretraining checkpoint into configurations and a state for :class:`PointM2AE`.

    Widths and depths are read off the tensors. What they cannot tell (heads, groups, radius, mask) is taken from ``config`` in the
    published layout (``num_groups``, ``group_sizes``, ``local_radius``, ``num_heads``, ``mask_ratio``), else from the released one.

    Args:
        state: Weights, already without ``module.`` (see :func:`geossl.models.checkpoints.read_reference_state`).
        config: The ``model`` section of the published configuration.

    Raises:
        CheckpointError: the state is not a Point-M2AE pretraining checkpoint.
    """
    config = dict(config or {})
    encoder, decoder, converted = convert_reference_weights(state, {"rec_head.": "head."}, "Point-M2AE")
    method = PointM2AEConfig(
        mask_ratio=config.get("mask_ratio", 0.8),
        predicted_points=state["rec_head.weight"].shape[0] // 3,
        decay_token_layers=False,
        **reference_decoder_config(decoder, config),
    )
    return (reference_encoder_config(encoder, config), method), converted


def convert_reference_weights(
    state: Mapping[str, Tensor], heads: Mapping[str, str], system: str
) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """Rename the weights of a pretraining checkpoint of Point-M2AE or I2P-MAE.

    Args:
        state: Its weights.
        heads: Our names of its heads.
        system: What an error calls it.

    Returns:
        Encoder, decoder, and the whole state of the method; what is of neither keeps its name there, to be reported as unexpected.

    Raises:
        CheckpointError: it is no such checkpoint.
    """
    encoder, decoder = convert_reference_encoder(state), convert_reference_decoder(state)
    if "embeds.0.conv1.weight" not in encoder or any(f"{head}weight" not in state for head in heads):
        expected = ", ".join(f"{part}*" for part in ("h_encoder.", "h_decoder.", *heads))
        raise CheckpointError(f"not a pretraining checkpoint of {system}: expected {expected}; found {sorted(state)[:8]}")
    converted = {f"backbone.{key}": value for key, value in encoder.items()} | {f"decoder.{key}": value for key, value in decoder.items()}
    known = (*heads, "mask_token", "MAE_encoder.blocks.", *_ENCODER_PARTS, *_REFERENCE_NAMES)
    for key, value in state.items():
        head = next((head for head in heads if key.startswith(head)), None)
        if head is not None:
            converted[heads[head] + key.removeprefix(head)] = value.squeeze(-1) if value.dim() == 3 else value
        elif not key.startswith(known):
            converted[key] = value
    return encoder, decoder, converted


def convert_reference_decoder(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the decoder weights of Point-M2AE and I2P-MAE to :class:`HierarchicalDecoder`'s; others are left out."""
    renamed = {}
    for key, value in state.items():
        old = next((old for old in _REFERENCE_NAMES if key.startswith(old)), None)
        if key == "mask_token":
            renamed[key] = value.reshape(-1)
        elif old is not None:
            name = _REFERENCE_NAMES[old] + key.removeprefix(old)
            for part, layer in _PROPAGATION_NAMES.items() if old == "token_prop." else ():
                name = name.replace(part, layer)
            renamed[name] = value.squeeze(-1) if value.dim() == 3 else value
    return renamed


def reference_decoder_config(decoder: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Any]:
    """The options ``decoder_*`` of a converted decoder: depths are the weights', the rest is ``config``'s or as released."""
    blocks = {tuple(key.split(".")[1:4:2]) for key in decoder if key.startswith("stages.")}
    units = {key.split(".")[3] for key in decoder if key.startswith("propagations.") and ".units." in key}
    stages = sorted({int(stage) for stage, _ in blocks})
    return {
        "decoder_depths": tuple(sum(int(stage) == j for stage, _ in blocks) for j in stages),
        "decoder_heads": config.get("num_heads", 6),
        "decoder_units": max(len(units), 1),
        "decoder_drop_path": config.get("drop_path_rate", 0.1),
    }


_ENCODER_PARTS = tuple(f"h_encoder.{part}." for part in ("token_embed", "encoder_pos_embeds", "encoder_blocks", "encoder_norms"))
_REFERENCE_NAMES = {
    "h_decoder.": "stages.",
    "decoder_pos_embeds.": "positions.",
    "token_prop.": "propagations.",
    "decoder_norm.": "norm.",
}
_PROPAGATION_NAMES = {
    ".fuse.net.0.": ".fuse.",
    ".fuse.net.1.": ".fuse_norm.",
    ".extraction.operation.": ".units.",
    ".net1.0.": ".conv1.",
    ".net1.1.": ".norm1.",
    ".net2.0.": ".conv2.",
    ".net2.1.": ".norm2.",
}
