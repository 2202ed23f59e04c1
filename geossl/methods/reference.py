"""Official checkpoints: one call that builds the exact parity model of a published file."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any, Literal

from torch import Tensor, nn

from geossl.errors import CheckpointError, unknown_name
from geossl.methods import croco, i2p_mae, point_m2ae, point_mae, polar_mae
from geossl.models.checkpoints import load_state, read_reference_state
from geossl.models.croco_files import read_croco_file
from geossl.models.point_m2ae import PointM2AEEncoder
from geossl.models.point_vit import PointViT
from geossl.models.point_vit_volume import VolumePointViT


def load_reference(system: str, source: str | os.PathLike[str] | Mapping[str, Any], config: Mapping[str, Any] | None = None) -> nn.Module:
    """Build the parity model of an official checkpoint: the same numbers as the published code, reference quirks included.

    Files are read without executing pickled code; any missing or unexpected weight is an error that lists the names.

    Args:
        system: ``"point_mae"``, ``"point_m2ae"``, ``"i2p_mae"``, ``"polar_mae"`` (both its Point-MAE and its PoLAr-MAE) or ``"croco"`` (v1
            and v2). Pretraining and fine-tuned files are told apart by their weights. The 2D teacher in a file of I2P-MAE is left out;
            :func:`geossl.methods.reference_teacher` reads it.
        source: The file (``.pth``, ``.ckpt``, ``.safetensors``), or what was read from it.
        config: For files trained with other than the released numbers. point_mae, point_m2ae and i2p_mae: the ``model`` section of the
            published configuration, and of part segmentation files what :func:`geossl.tasks.part_segmentation.convert_part_state` knows.
            polar_mae: see :func:`geossl.models.point_vit_volume.reference_encoder_config`. croco: arguments of the published constructor
            (``enc_embed_dim``, ``pos_embed`` ...), where a file does not hold them.

    Returns:
        The model in evaluation mode: the method (:class:`geossl.methods.PointMAE`, :class:`geossl.methods.PointM2AE`,
        :class:`geossl.methods.I2PMAE`, :class:`geossl.methods.PolarMAE`, :class:`geossl.methods.CroCo`) for a pretraining file, the task
        (:class:`geossl.tasks.Classification`, :class:`geossl.tasks.PartSegmentation`, :class:`geossl.tasks.Segmentation`) for a fine-tuned
        one. Its ``backbone`` is the encoder.

    Raises:
        UnknownNameError: unknown ``system``.
        CheckpointError: the file is unsafe, damaged, or of another model.

    Example:
        >>> model = geossl.load_reference("point_mae", "pretrain.pth")
        >>> features = geossl.extract_features(model.backbone, points)
    """
    if system not in REFERENCES:
        raise unknown_name("reference system", system, REFERENCES)
    model = REFERENCES[system](source if isinstance(source, Mapping) else os.fspath(source), config)
    return model.eval()


def find_system(source: str | os.PathLike[str]) -> str:
    """Tell which system an official checkpoint file is of, by the names of its weights: a key of ``REFERENCES``.

    Raises:
        CheckpointError: the file is unsafe, damaged, or of no system that is known.
    """
    names = read_reference_state(source, skip_objects=True)
    for system, marker in (
        ("polar_mae", "encoder.pos_embed.pos_enc.0.weight"),
        ("croco", "enc_blocks.0.attn.qkv.weight"),
        ("point_mae", "pos_embed.0.weight"),
        ("point_m2ae", "rec_head.weight"),
        ("i2p_mae", "rec_head_2d.weight"),
        ("point_m2ae", "h_encoder.encoder_pos_embeds.0.0.weight"),  # fine-tuned, of I2P-MAE too: the weights do not tell them apart
    ):
        if any(name.endswith(marker) for name in names):
            return system
    raise CheckpointError(f"{source}: of none of the systems {', '.join(REFERENCES)}; its weights are {sorted(names)[:8]}")


def _point_mae(source: str | Mapping[str, Any], config: Mapping[str, Any] | None) -> nn.Module:
    from geossl.tasks import classification, part_segmentation

    state = read_reference_state(source)
    name = "the given state" if isinstance(source, Mapping) else source
    if any(key.startswith("cls_head_finetune.") for key in state):
        (backbone_config, task_config), converted = classification.convert_reference_state(state, config)
        model: nn.Module = task_config.build(PointViT(backbone_config))
    elif any(key.startswith("label_conv.") for key in state):
        (parts_config, parts_task), converted = part_segmentation.convert_part_state(state, config)
        model = parts_task.build(parts_config.build())
    else:
        (encoder_config, method_config), converted = point_mae.convert_reference_state(state, config)
        model = method_config.build(PointViT(encoder_config))
    load_state(model, converted, source=name)
    return model


def _hierarchical(
    system: Literal["point_m2ae", "i2p_mae"], convert: Callable[..., Any]
) -> Callable[[Any, Mapping[str, Any] | None], nn.Module]:
    """Reader of Point-M2AE or I2P-MAE; ``convert`` is that of its pretraining files."""

    def read(source: str | Mapping[str, Any], config: Mapping[str, Any] | None) -> nn.Module:
        state = read_reference_state(source)
        name = "the given state" if isinstance(source, Mapping) else source
        tuned = _load_tuned(state, config, name, system)
        if tuned is not None:
            return tuned
        (encoder_config, method_config), converted = convert(state, config)
        model = method_config.build(PointM2AEEncoder(encoder_config))
        load_state(model, converted, source=name)
        return model

    return read


def _load_tuned(
    state: Mapping[str, Tensor], config: Mapping[str, Any] | None, name: str, system: Literal["point_m2ae", "i2p_mae"]
) -> nn.Module | None:
    """The fine-tuned model of a Point-M2AE or I2P-MAE ``state`` called ``name``; None where it is no fine-tuned one."""
    from geossl.tasks import classification, part_segmentation

    if any(key.startswith("cls_head_finetune.") for key in state):
        (encoder_config, task_config), converted = classification.convert_coarsest_state(state, config, system=system)
        model: nn.Module = task_config.build(PointM2AEEncoder(encoder_config))
    elif any(key.startswith("label_conv.") for key in state):
        (parts_config, parts_task), converted = part_segmentation.convert_part_state(state, config)
        model = parts_task.build(parts_config.build())
    else:
        return None
    load_state(model, converted, source=name)
    return model


def _polar_mae(source: str | Mapping[str, Any], config: Mapping[str, Any] | None) -> nn.Module:
    state = polar_mae.strip_prefix(read_reference_state(source, skip_objects=True))  # Lightning files hold their hyper-parameters' classes
    name = "the given state" if isinstance(source, Mapping) else source
    if any(key.startswith("seg_head.") for key in state):
        from geossl.tasks import segmentation

        (backbone_config, task_config), converted = segmentation.convert_segmentation_state(state, config)
        model: nn.Module = task_config.build(VolumePointViT(backbone_config))
    else:
        (encoder_config, method_config), converted = polar_mae.convert_reference_state(state, config)
        model = method_config.build(VolumePointViT(encoder_config))
    load_state(model, converted, source=name)
    return model


def _croco(source: str | Mapping[str, Any], config: Mapping[str, Any] | None) -> nn.Module:
    file = read_croco_file(source, config)
    (encoder_config, method_config), converted = croco.convert_reference_state(file)
    model = method_config.build(encoder_config.build())
    load_state(model, converted, source=file.name)
    return model


REFERENCES: dict[str, Callable[[Any, Mapping[str, Any] | None], nn.Module]] = {
    "point_mae": _point_mae,
    "point_m2ae": _hierarchical("point_m2ae", point_m2ae.convert_reference_state),
    "i2p_mae": _hierarchical("i2p_mae", i2p_mae.convert_reference_state),
    "polar_mae": _polar_mae,
    "croco": _croco,
}
"""Systems whose official checkpoints can be read."""
