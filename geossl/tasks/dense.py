"""Dense prediction: stereo and optical flow from two images, depth and normals from one, with the DPT head of CroCo v2 or a linear one.

Papers: Weinzaepfel et al., "CroCo", NeurIPS 2022, arXiv 2210.10716 (one image); "CroCo v2", ICCV 2023, arXiv 2211.10408 (stereo and flow).

A task on pairs keeps encoder and decoder of the pretraining: both images go through the encoder, whole, and the decoder reads the first in
the light of the second. The head sees the outputs of some blocks, counted through encoder and decoder. Images of any size are predicted in
windows as large as those of the training, see :mod:`geossl.tasks.tiling`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from geossl.config import require
from geossl.errors import CheckpointError, ConfigError, unknown_name
from geossl.geometry import ImageBatch, Output
from geossl.layers import DPTHead
from geossl.layers.dense_errors import CHANNELS, batch_scores
from geossl.layers.dpt import STEP
from geossl.models import CroCoDecoderConfig, CroCoPair, CroCoViT
from geossl.models.croco_files import CroCoFile, parse_call
from geossl.models.croco_vit import CroCoViTConfig
from geossl.tasks.body import BodyTask, with_decoder
from geossl.tasks.dense_losses import LOSSES, WITH_CONFIDENCE
from geossl.tasks.dpt_names import convert_dpt_state
from geossl.tasks.registry import TASKS
from geossl.tasks.tiling import Prediction, Weighting, predict_tiled, predict_whole

LOSSES_OF = {
    "stereo": ("laplacian_bounded2", "laplacian_bounded", "laplacian", "l1"),
    "flow": ("laplacian_bounded", "laplacian_bounded2", "laplacian", "l1"),
    "depth": ("scale_invariant_log", "l1_log"),
    "normals": ("cosine",),
}
"""Losses that fit each task."""


@dataclass(frozen=True, kw_only=True)
class DenseConfig:
    """Numbers common to the dense tasks. The defaults are the published ones of stereo and flow."""

    name: str = ""
    """Registered task."""
    loss: str = ""
    """Stereo and flow: laplacian, laplacian_bounded, laplacian_bounded2 (all with a confidence) or l1; depth: scale_invariant_log or
    l1_log; normals: cosine. See geossl.tasks.dense_losses."""
    head: Literal["dpt", "linear"] = "dpt"
    """`dpt` fuses four blocks from coarse to fine (images multiples of 32), `linear` is one matrix from the tokens of a patch to its
    pixels."""
    hooks: tuple[int, ...] = ()
    """Blocks whose outputs the head sees, from 0, those of the decoder after those of the encoder; negative ones count from the end. None
    given: for dpt the published ones (the last and three before it, a quarter of the encoder apart, with a decoder a third of it), for
    linear the last."""
    layer_dims: tuple[int, int, int, int] = (96, 192, 384, 768)
    """dpt: channels at 1/4, 1/8, 1/16 and 1/32 of the image."""
    feature_dim: int = 256
    """dpt: channels of the fusions, even."""
    last_dim: int = 32
    """dpt: channels before the last convolution."""
    freeze: bool = False
    """Train the head alone, on an encoder (and decoder) that stays as it is."""
    window: tuple[int, int] | None = None
    """Height and width of the windows in which images are predicted: those of the training. null predicts images at once."""
    overlap: float = 0.7
    """Share of a window that its neighbours cover as well (published: 0.7, and 0.9 for the benchmarks)."""
    tile_weighting: str = "equal"
    """How windows are weighed by their confidence: expsigmoid_<beta>_<scale> (published: stereo 15 and 3, flow 10 and 5), expbeta<beta>
    (ETH3D: 3), or equal, which is also what a loss without confidence takes."""
    windows_at_once: int = 1
    """Windows predicted together: more memory, on a GPU less time."""

    def __post_init__(self) -> None:
        losses = LOSSES_OF.get(self.name, tuple(LOSSES))
        if self.loss not in losses:
            raise unknown_name(f"loss of task {self.name}", self.loss, losses)
        if self.head not in ("dpt", "linear"):
            raise unknown_name("head", self.head, ("dpt", "linear"))
        fits = self.head == "linear" or len(self.hooks) in (0, 4)
        require(fits, "hooks", "must be four blocks for head dpt, or none for the published ones", self.hooks)
        require(len(self.layer_dims) == 4 and min(self.layer_dims) >= 1, "layer_dims", "must be four positive numbers", self.layer_dims)
        require(self.feature_dim >= 2 and self.feature_dim % 2 == 0, "feature_dim", "must be even and at least 2", self.feature_dim)
        for key in ("last_dim", "windows_at_once"):
            require(getattr(self, key) >= 1, key, "must be at least 1", getattr(self, key))
        require(0 <= self.overlap < 1, "overlap", "must lie in [0, 1)", self.overlap)
        Weighting.parse(self.tile_weighting)
        step = STEP if self.head == "dpt" else 1
        if self.window is not None:
            right = len(self.window) == 2 and all(side >= 1 and side % step == 0 for side in self.window)
            require(right, "window", f"must be a height and a width, with head dpt multiples of {STEP}", self.window)

    @property
    def channels(self) -> int:
        """Numbers predicted for a pixel, without the confidence."""
        return CHANNELS[self.name]

    @property
    def confident(self) -> bool:
        """Whether a confidence is predicted as well."""
        return self.loss in WITH_CONFIDENCE

    def build(self, backbone: nn.Module) -> Dense:
        """Create the task around ``backbone`` with a fresh head."""
        if not isinstance(backbone, CroCoViT):
            raise ConfigError(f"task {self.name} needs a croco_vit_* backbone, got {type(backbone).__name__}")
        return Dense(self, backbone)


@dataclass(frozen=True, kw_only=True)
class PairDenseConfig(DenseConfig):
    """Numbers of the tasks on pairs of images."""

    decoder: CroCoDecoderConfig = field(default_factory=lambda: CroCoDecoderConfig(dim=768, depth=12, heads=12))
    """The decoder, where the weights that are started from bring none; with theirs, its numbers are those."""
    fresh_decoder: bool = False
    """Start the decoder from random weights, even where the weights that are started from bring one."""

    def build(self, backbone: nn.Module) -> Dense:
        """Create the task around ``backbone`` with a fresh head, and a fresh decoder unless ``backbone`` is a pair of both."""
        return Dense(self, with_decoder(self, backbone))


@dataclass(frozen=True, kw_only=True)
class StereoConfig(PairDenseConfig):
    """Disparity from a rectified pair: the pixel at x of the left image is seen at x - disparity in the right one."""

    name: str = "stereo"
    loss: str = "laplacian_bounded2"
    window: tuple[int, int] | None = (352, 704)
    tile_weighting: str = "expsigmoid_15_3"


@dataclass(frozen=True, kw_only=True)
class FlowConfig(PairDenseConfig):
    """Optical flow: the pixel at (x, y) of the first image is seen at (x, y) + flow in the second."""

    name: str = "flow"
    loss: str = "laplacian_bounded"
    window: tuple[int, int] | None = (320, 384)
    tile_weighting: str = "expsigmoid_10_5"


@dataclass(frozen=True, kw_only=True)
class DepthConfig(DenseConfig):
    """Depth along the optical axis, in the unit of the truth, from one image; the network gives its logarithm."""

    name: str = "depth"
    loss: str = "scale_invariant_log"


@dataclass(frozen=True, kw_only=True)
class NormalsConfig(DenseConfig):
    """Unit normals of the surfaces, in the camera's axes, from one image."""

    name: str = "normals"
    loss: str = "cosine"


class LinearHead(nn.Module):
    """One matrix from the tokens of a patch to the values of its pixels.

    Args:
        inputs: Channels of the maps, which are laid side by side.
        channels: Values for each pixel.
        patch: Rows and columns of a patch.
    """

    def __init__(self, inputs: Sequence[int], channels: int, patch: int) -> None:
        super().__init__()
        self.patch = patch
        self.predict = nn.Conv2d(sum(inputs), channels * patch**2, 1)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Maps ``[B, C, H / patch, W / patch]`` -> ``[B, channels, H, W]``."""
        return F.pixel_shuffle(self.predict(torch.cat(list(maps), 1)), self.patch)


def default_hooks(head: str, encoder: int, decoder: int | None) -> tuple[int, ...]:
    """The blocks a head sees if none are named; ``encoder`` and ``decoder`` are their depths.

    Published for dpt: with a decoder of 8, 12 or 24 blocks its last one and three before it, 3, 4 or 8 apart; without, four of the encoder.
    For other depths the same rule holds: a third of the decoder apart, rounded up.

    Raises:
        ConfigError: there are fewer than four blocks to see.
    """
    last = encoder + (decoder or 0) - 1
    if head == "linear":
        return (last,)
    step = encoder // 4 if decoder is None else -(-decoder // 3)
    hooks = tuple(last - i * step for i in (3, 2, 1, 0))
    if step < 1 or hooks[0] < 0:
        raise ConfigError(f"hooks: with {encoder} blocks in the encoder and {decoder or 0} in the decoder, four must be named")
    return hooks


class Dense(BodyTask):
    """Dense prediction around CroCo's encoder, or its encoder and decoder; see the module's docstring.

    Args:
        config: Numbers of the task.
        body: The encoder; for stereo and flow encoder and decoder. Trained along, unless ``config.freeze``.

    Attributes:
        config: The numbers, with the hooks named.
        backbone: The encoder.
    """

    def __init__(self, config: DenseConfig, body: CroCoViT | CroCoPair) -> None:
        super().__init__(body, config.freeze)
        pair = body if isinstance(body, CroCoPair) else None
        depth = len(body.feature_info)
        wrong = [i for i in config.hooks if not -depth <= i < depth]
        if wrong:
            raise ConfigError(
                f"hooks: block {wrong[0]} does not exist; there are {depth} in encoder{' and decoder' if pair else ''} (0..{depth - 1}, or "
                "negative ones from the end)"
            )
        encoder = len(pair.backbone.feature_info) if pair else depth
        hooks = tuple(i % depth for i in config.hooks) or default_hooks(config.head, encoder, depth - encoder if pair else None)
        if pair and max(hooks) < encoder:
            raise ConfigError(
                f"hooks: at least one must be of the decoder ({encoder}..{depth - 1}), which alone sees the second image, got {hooks}"
            )
        self.config = dataclasses.replace(config, hooks=hooks)
        inputs = [body.feature_info[i].channels for i in hooks]
        channels, patch = config.channels + config.confident, self.backbone.config.patch
        if config.head == "dpt":
            if patch != 16:
                raise ConfigError(f"head: dpt is made for patches of 16 pixels, the backbone has {patch}; take head linear")
            self.head: nn.Module = DPTHead(
                inputs, channels, layer_dims=config.layer_dims, feature_dim=config.feature_dim, last_dim=config.last_dim
            )
        else:
            self.head = LinearHead(inputs, channels, patch)
        self._multiple = STEP if config.head == "dpt" else patch
        if config.window is not None and any(side % self._multiple for side in config.window):
            raise ConfigError(f"window: must be multiples of {self._multiple}, got {config.window}")
        if not config.freeze:
            freeze_unread(body, max(hooks))

    def forward(self, batch: ImageBatch, *, generator: torch.Generator | None = None) -> Output:
        """Loss of a batch with truth.

        Args:
            batch: Images with ``truth``; for stereo and flow with ``reference``. Sides are multiples of 32 (dpt) or of the patch.
            generator: Not used: nothing is random.

        Returns:
            The mean loss over the pixels with truth, 0 without any; the published ``metrics`` of a batch, see
            :func:`geossl.layers.dense_errors.batch_scores`; ``aux``: ``values [B, C, H, W]``.

        Raises:
            ValueError: there is no truth, or not that of this task; there is no reference; the size does not fit.
        """
        channels = self.config.channels
        if batch.truth is None or batch.truth.shape[1] != channels:
            found = "none" if batch.truth is None else list(batch.truth.shape)
            raise ValueError(f"task {self.config.name}: batch.truth must be [B, {channels}, H, W], got {found}")
        output = self.output(batch.image, batch.reference)
        loss = LOSSES[self.config.loss](output, batch.truth)
        values = self.values(output.detach())[:, :channels]
        metrics = {name: value.float() for name, value in batch_scores(self.config.name, values, batch.truth).items()}
        return Output(loss, metrics, {"values": values})

    def output(self, image: Tensor, reference: Tensor | None = None) -> Tensor:
        """What the head gives, ``[B, C, H, W]``: logarithms of depth, normals of any length, the confidence last where there is one.

        Raises:
            ValueError: the task needs a ``reference`` and got none; shapes or sizes do not fit.
        """
        if not isinstance(self.body, CroCoPair):
            last = len(self.body.feature_info) - 1
            final, maps = self.body.forward_intermediates(image, list(self.config.hooks), norm=False)
            # As in the published models, the last block alone is read after the final norm.
            return self.head([final if i == last else part for i, part in zip(self.config.hooks, maps, strict=True)])
        if reference is None:
            raise ValueError(f"task {self.config.name} needs two images: give the second one as reference")
        return self.head(self.body(image, reference, list(self.config.hooks)))

    def values(self, output: Tensor) -> Tensor:
        """What :meth:`output` stands for: depths, unit normals; disparity, flow and confidences are themselves. float32."""
        output = output.float()
        if self.config.name == "depth":
            return output.exp()
        return F.normalize(output, dim=1) if self.config.name == "normals" else output

    @torch.no_grad()
    def predict(self, image: Tensor, reference: Tensor | None = None, *, published: bool = False) -> Prediction:
        """Predict images of any size, in windows or at once, as ``config.window`` says.

        Args:
            image: ``[B, 3, H, W]``, normalised by :func:`geossl.geometry.normalize_images`.
            reference: The second images, as large; None for depth and normals.
            published: See :func:`geossl.tasks.predict_tiled`.

        Returns:
            ``values [B, C, H, W]`` float32 and, of losses that have one, ``confidence [B, H, W]``, smaller where surer.

        Raises:
            ValueError: images of wrong or unequal shapes, or not finite.
        """
        config, pixel_units = self.config, isinstance(self.body, CroCoPair)
        if config.window is None:
            found = predict_whole(
                self._network, image, reference, multiple=self._multiple, confident=config.confident, pixel_units=pixel_units
            )
        else:
            found = predict_tiled(
                self._network,
                image,
                reference,
                window=config.window,
                overlap=config.overlap,
                weighting=Weighting.parse(config.tile_weighting if config.confident else "equal"),
                confident=config.confident,
                pixel_units=pixel_units,
                windows_at_once=config.windows_at_once,
                published=published,
            )
        # Means of unit vectors, over windows or neighbours, are shorter.
        return Prediction(F.normalize(found.values, dim=1), None) if config.name == "normals" else found

    def _network(self, image: Tensor, reference: Tensor | None) -> Tensor:
        return self.values(self.output(image, reference))


def freeze_unread(body: CroCoViT | CroCoPair, deepest: int) -> None:
    """Do not train what the blocks up to ``deepest`` do not depend on: it would get no gradient, which several processes would wait for."""
    stack: CroCoViT | nn.Module = body
    if isinstance(body, CroCoPair):
        stack, deepest = body.decoder, deepest - len(body.backbone.feature_info)
    if deepest < len(stack.blocks) - 1:  # type: ignore[arg-type]
        stack.blocks[deepest + 1 :].requires_grad_(False)  # type: ignore[index]
        stack.norm.requires_grad_(False)


@TASKS.register
def stereo() -> StereoConfig:
    """Disparity of a rectified pair of images."""
    return StereoConfig()


@TASKS.register
def flow() -> FlowConfig:
    """Optical flow from one image to another."""
    return FlowConfig()


@TASKS.register
def depth() -> DepthConfig:
    """Depth of every pixel of one image."""
    return DepthConfig()


@TASKS.register
def normals() -> NormalsConfig:
    """Normal of the surface at every pixel of one image."""
    return NormalsConfig()


# ---------------------------------------------------------------------------------------------------------------------
# Official stereo and flow files

_CRITERIA = {
    "LaplacianLoss": "laplacian",
    "LaplacianLossBounded": "laplacian_bounded",
    "LaplacianLossBounded2": "laplacian_bounded2",
    "L1Loss": "l1",
}
TASK_OPTIONS = ("task", "criterion", "crop", "tile_conf_mode", "hooks")
"""What a file may say of its task, and a caller of :func:`geossl.load_reference` may say over it."""


def convert_reference_file(
    file: CroCoFile, options: Mapping[str, Any] | None = None
) -> tuple[tuple[CroCoViTConfig, PairDenseConfig], dict[str, Tensor]]:
    """Turn an official stereo or flow model into configurations and a state.

    Args:
        file: The file as read; its weights have ``head.dpt.*``.
        options: Over what the file says: ``task`` ("stereo" or "flow"), ``criterion``, ``crop``, ``tile_conf_mode``, ``hooks``.

    Raises:
        CheckpointError: what the file says cannot be understood.
    """
    said = {**file.options, **(options or {})}
    head = convert_dpt_state({key.removeprefix("head.dpt."): value for key, value in file.state.items() if key.startswith("head.dpt.")})
    try:
        channels = head["predict.weight"].shape[0]
        sizes = {
            "layer_dims": tuple(head[f"reassemble.{i}.0.weight"].shape[0] for i in range(4)),
            "feature_dim": head["smooth.weight"].shape[1],
            "last_dim": head["last.weight"].shape[0],
        }
    except KeyError as error:
        raise CheckpointError(f"{file.name}: not a stereo or flow model of CroCo: it has no weight for our head.{error.args[0]}") from error
    kind = said.get("task", "flow" if channels == 3 else "stereo")
    if kind not in ("stereo", "flow"):
        raise CheckpointError(f"{file.name}: task must be stereo or flow, got {kind!r}")
    values: dict[str, Any] = {"hooks": tuple(said.get("hooks") or ()), **sizes}
    if "criterion" in said:
        values["loss"] = _loss_of(str(said["criterion"]), file.name)
    elif channels == CHANNELS[kind]:
        values["loss"] = "l1"  # no confidence
    if said.get("crop"):
        values["window"] = tuple(said["crop"])
    if said.get("tile_conf_mode"):
        values["tile_weighting"] = str(said["tile_conf_mode"])
    encoder, encoder_state = file.encoder()
    decoder, decoder_state = file.decoder()
    try:
        config = dataclasses.replace(TASKS.config(kind), decoder=decoder, **values)
    except (ConfigError, TypeError) as error:
        raise CheckpointError(f"{file.name}: what it says of its task cannot be used: {error}") from error
    state = {f"body.backbone.{key}": value for key, value in encoder_state.items()}
    state |= {f"body.decoder.{key}": value for key, value in decoder_state.items()}
    state |= {f"head.{key}": value for key, value in head.items()}
    # Names of nothing known stay, so that loading reports them.
    return (encoder, config), state | {key: value for key, value in file.others().items() if not key.startswith("head.dpt.")}


def _loss_of(criterion: str, name: str) -> str:
    """Our name of a published criterion, such as ``LaplacianLossBounded2()``."""
    called = criterion.partition("(")[0].strip()
    if called not in _CRITERIA or parse_call(criterion, name):
        raise CheckpointError(
            f"{name}: its criterion is {criterion!r}, expected one of {', '.join(f'{key}()' for key in _CRITERIA)}; "
            "give the nearest as config={'criterion': ...}: it matters for training alone"
        )
    return _CRITERIA[called]
