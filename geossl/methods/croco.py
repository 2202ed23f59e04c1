"""CroCo: cross-view completion, a masked autoencoder of images that may look at the same place from elsewhere.

Papers: Weinzaepfel et al., "CroCo: Self-Supervised Pre-training for 3D Vision Tasks by Cross-View Completion", NeurIPS 2022, arXiv
2210.10716; Weinzaepfel et al., "CroCo v2: Improved Cross-view Completion Pre-training for Stereo Matching and Optical Flow", ICCV 2023,
arXiv 2211.10408.

Nine tenths of the patches of one image are hidden. The encoder sees the others, and all of a second image of the same scene. A decoder gets
the features of the visible patches, a learned mask token at every hidden one, and reads the second image in every block; a linear layer
predicts the pixels. The loss is the squared error on hidden patches, whose pixels have mean 0 and variance 1 in each patch.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from geossl.errors import CheckpointError, ConfigError
from geossl.geometry import ImageBatch, Output, denormalize_images
from geossl.layers import BatchRandom, Segments, random_mask
from geossl.layers.image_patches import ImagePatches, paste_patches, to_map
from geossl.layers.masking import hidden_counts
from geossl.methods.registry import METHODS
from geossl.models.croco_files import ARGUMENTS, CroCoFile, save_decoder
from geossl.models.croco_vit import (
    CroCoDecoderConfig,
    CroCoPair,
    CroCoViT,
    CroCoViTConfig,
    check_width,
    init_xavier,
)

PIXEL_EPS = 1e-6
"""Added to the variance of a patch when its pixels are normalised."""


@dataclass(frozen=True, kw_only=True)
class CroCoConfig:
    """Numbers of :class:`CroCo` around its backbone. The defaults are the published ones, with the small decoder."""

    name: str = "croco"
    """Registered method."""
    mask_ratio: float = 0.9
    """Share of hidden patches, 0 < ratio < 1; int(ratio * patches) are hidden."""
    decoder: CroCoDecoderConfig = field(default_factory=CroCoDecoderConfig)
    """The decoder that reads the second image."""
    norm_pix_loss: bool = True
    """Predict the pixels of each patch with their mean and variance taken out; false predicts them as they are."""
    masked_loss: bool = True
    """Count hidden patches only; false counts all of them."""
    symmetric: bool = False
    """Complete each image of a pair with the help of the other, instead of the first one only: twice the work a pair."""
    single_view: bool = False
    """Complete without the second image: a masked autoencoder of single images with the same network, the comparison that shows what the
    second view gives. The cross-attention is not trained, it stays as it was initialised."""

    def __post_init__(self) -> None:
        if not 0 < self.mask_ratio < 1:
            raise ConfigError(f"mask_ratio must lie strictly between 0 and 1, got {self.mask_ratio}")
        if self.symmetric and self.single_view:
            raise ConfigError("symmetric completes both images of a pair, single_view knows no pair; choose one of them")

    def build(self, backbone: nn.Module) -> CroCo:
        """Create the method around ``backbone`` with fresh decoder weights."""
        if not isinstance(backbone, CroCoViT):
            raise ConfigError(f"method croco needs a croco_vit_* backbone, got {type(backbone).__name__}")
        check_width(self.decoder.dim, self.decoder.heads, backbone.config.position, "decoder.")
        return CroCo(self, backbone)


class Completion(NamedTuple):
    """What :meth:`CroCo.complete` predicts."""

    prediction: Tensor  # [R, 3 * patch * patch] float32: row, column, channel
    target: Tensor  # [R, 3 * patch * patch]: the true patches in the form that is predicted
    mean: Tensor  # [R, 1] of the true patches
    deviation: Tensor  # [R, 1] of the true patches


class CroCo(nn.Module):
    """Cross-view completion; see the module's docstring.

    Args:
        config: Numbers of the method.
        backbone: The encoder to pretrain.
    """

    def __init__(self, config: CroCoConfig, backbone: CroCoViT) -> None:
        super().__init__()
        self.config = config
        self.backbone = backbone
        self.decoder = config.decoder.build(backbone.config)
        self.mask_token = nn.Parameter(torch.zeros(1, config.decoder.dim))  # two dimensions: decayed, as published
        self.head = nn.Linear(config.decoder.dim, 3 * backbone.config.patch**2)
        nn.init.normal_(self.mask_token, std=0.02)
        self.head.apply(init_xavier)
        if config.single_view:  # several processes would wait for gradients that never come
            for block in self.decoder.blocks:
                for part in ("norm2", "norm_memory", "cross_attn"):
                    block.get_submodule(part).requires_grad_(False)

    def forward(self, batch: ImageBatch, *, generator: torch.Generator | None = None, mask: Tensor | None = None) -> Output:
        """Hide patches, complete them, and measure how well.

        Args:
            batch: Pairs of images, ``image`` to complete and ``reference`` to look at.
            generator: Source of the mask, CPU; None uses torch's global one.
            mask: Hidden patches, bool ``[B, cells]`` with as many True in every row (``symmetric``: ``[2 B, cells]``, rows of ``image``,
                then of ``reference``); None draws one as configured.

        Returns:
            Mean squared error; ``aux``: ``mask [B, cells]`` (or ``[2 B, cells]``) and ``prediction [R, 3 * patch * patch]`` (row, column,
            channel) of the patches that count.

        Raises:
            ValueError: there is no reference, or images or mask are not as they should be.
        """
        one, other = self._cut(batch)
        if self.config.symmetric and other is not None:
            one, other = one.join(other), other.join(one)
        hidden = self.count_hidden(one) if mask is None else check_mask(mask, one)
        mask = self.draw_mask(one, BatchRandom.of(batch, generator)) if mask is None else mask
        found = self.complete(one, other, mask, hidden, all_patches=not self.config.masked_loss)
        loss = (found.prediction - found.target).square().mean()  # patches are equally large
        return Output(loss, {}, {"mask": mask, "prediction": found.prediction.detach()})

    def _cut(self, batch: ImageBatch) -> tuple[ImagePatches, ImagePatches | None]:
        """The patches of the images, and of the second images where they are read."""
        one = self.backbone.cut(batch.image, "image")
        if self.config.single_view:
            return one, None
        if batch.reference is None:
            raise ValueError(
                "CroCo completes an image with the help of a second one, but the batch has no reference; use data of pairs, or single_view"
            )
        return one, self.backbone.cut(batch.reference, "reference")

    def count_hidden(self, patches: ImagePatches) -> int:
        """How many patches of each image are hidden.

        Raises:
            ValueError: so few patches that it would be none.
        """
        cells = patches.segments.lengths[0]
        hidden = hidden_counts(Segments((cells,)), self.config.mask_ratio)[0]
        if not hidden:
            raise ValueError(f"mask_ratio {self.config.mask_ratio} hides none of the {cells} patches of an image; take larger images")
        return hidden

    def draw_mask(self, patches: ImagePatches, random: BatchRandom) -> Tensor:
        """Draw the hidden patches of each image, ``[images, cells]`` bool; those of a sample do not depend on how the batch was split."""
        cells = patches.segments.lengths[0]
        segments = Segments((cells,) * random.size)
        draws = len(patches.segments.lengths) // random.size  # for both images of a pair with `symmetric`
        drawn = [random_mask(segments, self.config.mask_ratio, random, patches.pixels.device) for _ in range(draws)]
        return torch.cat(drawn).view(-1, cells)

    def complete(
        self, one: ImagePatches, other: ImagePatches | None, mask: Tensor, hidden: int, *, all_patches: bool = False
    ) -> Completion:
        """Predict the hidden patches of images with the help of others; nothing hidden is read.

        Args:
            one: Images to complete, whole.
            other: Images to look at, whole, as many and as large; None: there are none.
            mask: Hidden patches of ``one``, ``[images, cells]`` bool.
            hidden: How many each row hides. Shapes follow from it, so that no device has to be asked.
            all_patches: Predict the visible ones too.

        Returns:
            Of the hidden patches in order of the images and cells, or of all.
        """
        images, cells = mask.shape
        # A stable sort puts the visible cells of each image before the hidden ones.
        order = mask.byte().argsort(stable=True, dim=1) + torch.arange(0, images * cells, cells, device=mask.device)[:, None]
        visible_rows, hidden_rows = order[:, : cells - hidden].flatten(), order[:, cells - hidden :].flatten()
        visible = one.keep(visible_rows, Segments((cells - hidden,) * images))
        # Both images go through the encoder together, so that its weights are read, and their gradients added up, once.
        encoded = self.decoder.embed(self.backbone.encode(visible if other is None else other.join(visible)))
        memory, seen = (None, encoded) if other is None else encoded.tensor_split([images * cells])
        tokens = self.mask_token.to(encoded.dtype).expand(images * cells, -1).index_copy(0, visible_rows, seen)
        only = (None, None) if all_patches else (hidden_rows, Segments((hidden,) * images))
        decoded = self.decoder(tokens, memory, one.grid, rows=only[0], row_segments=only[1])
        pixels = one.pixels if all_patches else one.pixels.index_select(0, hidden_rows)
        return Completion(self.head(decoded).float(), *self._target(pixels))

    def _target(self, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """True patches ``[R, channel x row x column]`` as they are predicted, and what was taken out of them: mean and deviation."""
        patch = self.backbone.config.patch
        true = pixels.detach().float().view(-1, 3, patch * patch).transpose(1, 2).flatten(1)
        variance, mean = torch.var_mean(true, 1, keepdim=True)
        deviation = (variance + PIXEL_EPS).sqrt()
        return ((true - mean) / deviation if self.config.norm_pix_loss else true), mean, deviation

    @torch.no_grad()
    def reconstruct(self, image: Tensor, reference: Tensor | None, mask: Tensor) -> Tensor:
        """Complete images, shown as the network makes them: visible patches are predicted too, not copied.

        Args:
            image: ``[B, 3, H, W]``, normalised.
            reference: The second images, as large; not read with ``single_view``.
            mask: Hidden patches, ``[B, cells]`` bool.

        Returns:
            ``[B, 3, H, W]`` float32, normalised like the input. With ``norm_pix_loss``, mean and deviation are those of the true patch.
        """
        one, other = self._cut(ImageBatch(image, reference))
        found = self.complete(one, other, mask, check_mask(mask, one), all_patches=True)
        pixels = found.prediction * found.deviation + found.mean if self.config.norm_pix_loss else found.prediction
        patch = self.backbone.config.patch
        return paste_patches(pixels.view(-1, patch, patch, 3).permute(0, 3, 1, 2), one.grid)

    @torch.no_grad()
    def pictures(self, batch: ImageBatch, *, generator: torch.Generator | None = None) -> list[dict[str, np.ndarray]]:
        """What the method sees and makes of the first image of each pair, for a report.

        Returns:
            For each pair ``image``, ``masked`` (hidden patches grey), ``reference`` (not with ``single_view``) and ``completion`` (see
            :meth:`reconstruct`), float32 ``[H, W, 3]`` in 0..1, and ``error [H, W]``, the mean absolute difference of completion and image.
        """
        whole, _ = self._cut(batch)
        self.count_hidden(whole)
        mask = self.draw_mask(whole, BatchRandom.of(batch, generator))
        made = self.reconstruct(batch.image, batch.reference, mask)
        image, completion = (denormalize_images(x.float()).clamp(0, 1) for x in (batch.image, made))
        hidden = to_map(mask.view(-1, 1), whole.grid)
        hidden = hidden.repeat_interleave(self.backbone.config.patch, 2).repeat_interleave(self.backbone.config.patch, 3)
        shown = {"image": image, "masked": image.masked_fill(hidden, 0.5)}
        if batch.reference is not None and not self.config.single_view:
            shown["reference"] = denormalize_images(batch.reference.float()).clamp(0, 1)
        shown |= {"completion": completion, "error": (completion - image).abs().mean(1)}
        arrays = {name: (x.movedim(1, -1) if x.dim() == 4 else x).cpu().numpy() for name, x in shown.items()}
        return [{name: x[i] for name, x in arrays.items()} for i in range(len(batch))]

    @property
    def pair(self) -> CroCoPair:
        """Encoder and decoder, sharing their weights with the method: what tasks on pairs of images go on with."""
        return CroCoPair(self.backbone, self.decoder)

    def save_beside(self, folder: Path) -> None:
        """Write the decoder beside an exported encoder; :func:`geossl.models.load_pair_backbone` reads both."""
        save_decoder(self.decoder, folder)

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that are not decayed beyond the 1-D ones: none."""
        return {f"backbone.{name}" for name in self.backbone.no_weight_decay()}

    def layer_groups(self) -> list[list[str]]:
        """Parameter name prefixes from input to output, for layer-wise learning-rate decay."""
        groups = [*self.pair.layer_groups(), ["head."]]
        groups[0].append("mask_token")
        return groups

    def set_grad_checkpointing(self, enabled: bool = True) -> None:
        """Recompute block activations of encoder and decoder in the backward pass."""
        self.pair.set_grad_checkpointing(enabled)


def check_mask(mask: Tensor, patches: ImagePatches) -> int:
    """How many patches ``mask`` hides in every image of ``patches`` (one device synchronisation).

    Raises:
        ValueError: it has another shape or type, hides unequal numbers, nothing or everything.
    """
    images, cells = len(patches.segments.lengths), patches.segments.lengths[0]
    if mask.dtype != torch.bool or mask.shape != (images, cells):
        raise ValueError(f"mask must be bool [{images}, {cells}] (images, patches of each), got {mask.dtype} {list(mask.shape)}")
    counts = sorted(set(mask.sum(1).tolist()))
    if len(counts) != 1 or not 0 < counts[0] < cells:
        raise ValueError(f"mask must hide as many patches of every image, at least one and not all {cells}; it hides {counts}")
    return counts[0]


@METHODS.register
def croco() -> CroCoConfig:
    """CroCo with the published numbers; v1 and v2 differ in their backbone and their data."""
    return CroCoConfig()


def convert_reference_state(file: CroCoFile) -> tuple[tuple[CroCoViTConfig, CroCoConfig], dict[str, Tensor]]:
    """Turn an official pretraining checkpoint into configurations and a state for :class:`CroCo`.

    Raises:
        CheckpointError: the file is not one of pretraining.
    """
    if not file.is_pretraining:
        raise CheckpointError(
            f"{file.name}: not a pretraining checkpoint of CroCo: it has no mask_token or no prediction_head; "
            "geossl.models.load_pair_backbone reads encoder and decoder of any CroCo file"
        )
    encoder, encoder_state = file.encoder()
    decoder, decoder_state = file.decoder()
    method = CroCoConfig(mask_ratio=(ARGUMENTS | file.arguments)["mask_ratio"], decoder=decoder)
    converted = {f"backbone.{key}": value for key, value in encoder_state.items()}
    converted |= {f"decoder.{key}": value for key, value in decoder_state.items()}
    for key, value in file.others().items():
        converted[key.replace("prediction_head.", "head.")] = value[0] if key == "mask_token" else value
    return (encoder, method), converted
