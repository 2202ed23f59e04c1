"""Files of CroCo: encoder and decoder saved side by side, and the published checkpoints of all three generations.

The published files are dictionaries: the first release holds the weights alone, the second the arguments of the constructor beside them,
and what the training programs write (also all stereo and flow models) their whole command line.
"""

from __future__ import annotations

import ast
import dataclasses
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from geossl.errors import CheckpointError, ConfigError, unknown_name
from geossl.models.checkpoints import load_state, read_reference_state, read_safetensors, read_torch_file
from geossl.models.croco_vit import CroCoDecoder, CroCoDecoderConfig, CroCoPair, CroCoViT, CroCoViTConfig
from geossl.models.factory import load, locate_folder, save_backbone, save_weights

DECODER_WEIGHTS, DECODER_CONFIG = "decoder.safetensors", "decoder.json"

ARGUMENTS: dict[str, Any] = {
    "img_size": 224,
    "patch_size": 16,
    "mask_ratio": 0.9,
    "enc_embed_dim": 768,
    "enc_depth": 12,
    "enc_num_heads": 12,
    "dec_embed_dim": 512,
    "dec_depth": 8,
    "dec_num_heads": 16,
    "mlp_ratio": 4,
    "norm_im2_in_dec": True,
    "pos_embed": "cosine",
}
"""What the published constructor takes, and its defaults."""


# ---------------------------------------------------------------------------------------------------------------------
# Folders


def save_decoder(decoder: CroCoDecoder, folder: str | os.PathLike[str]) -> Path:
    """Write the decoder beside its encoder, as ``decoder.safetensors`` and ``decoder.json``; returns the folder (made if missing)."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_weights(decoder, folder / DECODER_WEIGHTS)
    (folder / DECODER_CONFIG).write_text(json.dumps({"decoder": dataclasses.asdict(decoder.config)}, indent=2) + "\n")
    return folder


def save_pair_backbone(pair: CroCoPair, folder: str | os.PathLike[str]) -> Path:
    """Write encoder and decoder into ``folder`` (made if missing); :func:`geossl.load` reads the encoder alone; returns the folder."""
    save_backbone(pair.backbone, folder)
    return save_decoder(pair.decoder, folder)


def load_pair_backbone(source: str | os.PathLike[str]) -> CroCoPair:
    """Load an encoder together with the decoder it was pretrained with, to start stereo, flow and other tasks on pairs from.

    Args:
        source: An official CroCo file (``.pth``, also of stereo and flow, whose head is left out), or what :func:`geossl.load` takes: the
            folder of a run with method croco or its export, a folder of ``tools/convert_checkpoint.py``, ``hf-hub:owner/name``.

    Returns:
        Both in evaluation mode.

    Raises:
        CheckpointError: files are missing, damaged or belong to another model.
    """
    if Path(source).is_file():
        return build_pair(read_croco_file(source))
    if Path(source).suffix in (".pth", ".pt", ".safetensors"):
        raise CheckpointError(f"{source}: no such file")
    folder = locate_folder(source)
    backbone = load(folder)
    if not isinstance(backbone, CroCoViT):
        raise CheckpointError(
            f"{folder} holds a {type(backbone).__name__}, which has no decoder for pairs; expected a croco_vit_* backbone"
        )
    config_path, weights_path = folder / DECODER_CONFIG, folder / DECODER_WEIGHTS
    if not config_path.is_file() or not weights_path.is_file():
        raise CheckpointError(
            f"{folder}: expected {DECODER_WEIGHTS} and {DECODER_CONFIG} in it; it holds an encoder alone, which geossl.load reads"
        )
    try:
        decoder = CroCoDecoderConfig(**json.loads(config_path.read_text())["decoder"]).build(backbone.config)
    except (json.JSONDecodeError, KeyError, TypeError, ConfigError) as error:
        raise CheckpointError(f"{config_path} is not a configuration geossl wrote: {error!r}") from error
    load_state(decoder, read_safetensors(weights_path), source=str(weights_path))
    return CroCoPair(backbone, decoder).eval()


# ---------------------------------------------------------------------------------------------------------------------
# Published files


@dataclass(frozen=True)
class CroCoFile:
    """A published checkpoint as read.

    Args:
        name: What messages call it.
        state: Its weights by their published names.
        arguments: Arguments of the published constructor that the file, or the caller, gives.
        options: Command line of the training that wrote it (``task``, ``criterion``, ``crop``, ``tile_conf_mode`` ...); empty for releases.
    """

    name: str
    state: dict[str, Tensor]
    arguments: dict[str, Any]
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def is_pretraining(self) -> bool:
        """Whether it can complete images: it has a mask token and a head for pixels."""
        return "mask_token" in self.state and "prediction_head.weight" in self.state

    def encoder(self) -> tuple[CroCoViTConfig, dict[str, Tensor]]:
        """Configuration and weights of a :class:`~geossl.models.CroCoViT`."""
        return encoder_config(self.arguments), _renamed(self.state, _ENCODER_NAMES)

    def decoder(self) -> tuple[CroCoDecoderConfig, dict[str, Tensor]]:
        """Configuration and weights of a :class:`~geossl.models.CroCoDecoder`."""
        return decoder_config(self.arguments), _renamed(_join_keys_and_values(self.state), _DECODER_NAMES)

    def others(self) -> dict[str, Tensor]:
        """Weights that belong to neither, by their published names: mask token, heads."""
        known = tuple(old for old, _ in (*_ENCODER_NAMES, *_DECODER_NAMES))
        return {key: value for key, value in self.state.items() if not key.startswith(known)}


def read_croco_file(source: str | os.PathLike[str] | Mapping[str, Any], config: Mapping[str, Any] | None = None) -> CroCoFile:
    """Read a published checkpoint of any generation, without executing anything in it.

    Args:
        source: The file, or what was read from it: weights, or a dictionary with ``model`` and what else files hold.
        config: Arguments of the published constructor, over those in the file.

    Raises:
        CheckpointError: it is unsafe, damaged, or of another model (DUSt3R among them), or its arguments cannot be understood.
    """
    name = "the given state" if isinstance(source, Mapping) else os.fspath(source)
    content = source
    if not isinstance(source, Mapping):
        is_plain = Path(source).suffix == ".safetensors"
        content = read_safetensors(source) if is_plain else read_torch_file(source, skip_objects=True)
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{name} holds a {type(content).__name__}, expected a dictionary of weights")
    state = read_reference_state(content)
    if any(key.startswith("dec_blocks2.") for key in state):
        raise CheckpointError(
            f"{name} has two decoders (dec_blocks and dec_blocks2), as DUSt3R and MASt3R do; each of them reads the other's changing "
            "features, which CroCo's decoder does not. Only CroCo files with one decoder can be read"
        )
    if "enc_blocks.0.attn.qkv.weight" not in state:
        raise CheckpointError(f"{name}: not a CroCo checkpoint: expected enc_blocks.*, dec_blocks.*; found {sorted(state)[:8]}")
    options = _options(content, name)
    arguments = _arguments(content, options, name) | dict(config or {})
    for key in arguments:
        if key not in ARGUMENTS:
            raise CheckpointError(f"{name}: {unknown_name('argument of CroCo', key, ARGUMENTS)}")
    position = (ARGUMENTS | arguments)["pos_embed"]
    if position == "cosine" and "enc_pos_embed" not in state:
        raise CheckpointError(
            f"{name} has no sin-cos table (enc_pos_embed), so its positions are rotary, and it does not say with which base; "
            "give what it was made with, for example config={'pos_embed': 'RoPE100', 'enc_embed_dim': 768, ...}"
        )
    return CroCoFile(name, state, arguments, options)


def build_pair(file: CroCoFile) -> CroCoPair:
    """Make encoder and decoder of a published file, in evaluation mode; a head, mask token and such are left out."""
    (encoder_numbers, encoder_state), (decoder_numbers, decoder_state) = file.encoder(), file.decoder()
    backbone = encoder_numbers.build()
    decoder = decoder_numbers.build(encoder_numbers)
    load_state(backbone, encoder_state, source=f"{file.name} (encoder)")
    load_state(decoder, decoder_state, source=f"{file.name} (decoder)")
    return CroCoPair(backbone, decoder).eval()


def encoder_config(arguments: Mapping[str, Any]) -> CroCoViTConfig:
    """The encoder that the published constructor makes of ``arguments``."""
    values = ARGUMENTS | dict(arguments)
    size, position = values["img_size"], str(values["pos_embed"])
    rotary = re.fullmatch(r"RoPE(\d+(?:\.\d+)?)", position)
    if position != "cosine" and rotary is None:
        raise CheckpointError(f"pos_embed must be 'cosine' or 'RoPE' with a number, such as 'RoPE100'; got {position!r}")
    try:
        config = CroCoViTConfig(
            image_size=tuple(size) if isinstance(size, tuple | list) else (size, size),
            patch=values["patch_size"],
            dim=values["enc_embed_dim"],
            depth=values["enc_depth"],
            heads=values["enc_num_heads"],
            mlp_ratio=float(values["mlp_ratio"]),
            position="cosine" if rotary is None else "rope",
            rope_base=100.0 if rotary is None else float(rotary[1]),
        )
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"the arguments of the model make no encoder: {error}") from error
    variant = "croco_vit_large" if config.dim == 1024 else "croco_vit_base_cosine" if rotary is None else "croco_vit_base"
    return dataclasses.replace(config, name=variant)


def decoder_config(arguments: Mapping[str, Any]) -> CroCoDecoderConfig:
    """The decoder that the published constructor makes of ``arguments``."""
    values = ARGUMENTS | dict(arguments)
    try:
        return CroCoDecoderConfig(
            dim=values["dec_embed_dim"],
            depth=values["dec_depth"],
            heads=values["dec_num_heads"],
            mlp_ratio=float(values["mlp_ratio"]),
            norm_memory=bool(values["norm_im2_in_dec"]),
        )
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"the arguments of the model make no decoder: {error}") from error


def parse_call(text: str, name: str) -> dict[str, Any]:
    """Read the keyword arguments of a call written as text, ``CroCoNet(enc_depth=24, ...)``, without running it.

    Raises:
        CheckpointError: it is anything but a call with plain values as keyword arguments; the message quotes it.
    """
    try:
        call = ast.parse(text.strip(), mode="eval").body
        if not isinstance(call, ast.Call) or call.args or not isinstance(call.func, ast.Name) or any(k.arg is None for k in call.keywords):
            raise ValueError("not a call with keyword arguments only")
        return {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in call.keywords}
    except (SyntaxError, ValueError, MemoryError, RecursionError) as error:
        raise CheckpointError(
            f"{name}: the model is given as {text[:120]!r}, expected a call with plain values, as CroCoNet(enc_depth=24, dec_depth=12): "
            f"{error}. It is not run; give the weights alone and the arguments as config={{'enc_depth': 24, ...}}"
        ) from error


def _options(content: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The command line in a file of a training program; {} in a release."""
    args = content.get("args")
    if args is None:
        return {}
    if not isinstance(args, Mapping) and not hasattr(args, "__dict__"):
        raise CheckpointError(f"{name}: args is a {type(args).__name__}, expected the command line of the training (argparse.Namespace)")
    return dict(args if isinstance(args, Mapping) else vars(args))


def _arguments(content: Mapping[str, Any], options: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Arguments of the constructor, wherever a file of any generation keeps them."""
    found = content.get("croco_kwargs", options.get("croco_args"))
    if found is None and "model" in options:
        if not isinstance(options["model"], str):
            raise CheckpointError(
                f"{name}: args.model is a {type(options['model']).__name__}, expected a text such as CroCoNet(enc_depth=24)"
            )
        return parse_call(options["model"], name)
    if found is None:
        return {}
    if not isinstance(found, Mapping):
        raise CheckpointError(f"{name}: the arguments of the model are a {type(found).__name__}, expected a dictionary")
    return dict(found)


_ENCODER_NAMES = (
    ("enc_pos_embed", "position.table"),
    ("patch_embed.proj.", "patch_embed."),
    ("enc_blocks.", "blocks."),
    ("enc_norm.", "norm."),
)
_DECODER_NAMES = (
    ("dec_pos_embed", "position.table"),
    ("decoder_embed.", "embed."),
    ("dec_blocks.", "blocks."),
    ("dec_norm.", "norm."),
)
_WITHIN_BLOCKS = ((".norm_y.", ".norm_memory."), (".cross_attn.projq.", ".cross_attn.q."))


def _renamed(state: Mapping[str, Tensor], names: tuple[tuple[str, str], ...]) -> dict[str, Tensor]:
    """The weights whose published names begin with one of ``names``, under ours."""
    found = {}
    for key, value in state.items():
        for old, new in names:
            if key.startswith(old):
                renamed = new + key.removeprefix(old)
                for published, ours in _WITHIN_BLOCKS:
                    renamed = renamed.replace(published, ours)
                found[renamed] = value.flatten(1) if key == "patch_embed.proj.weight" else value
                break
    return found


def _join_keys_and_values(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Put the projections to keys and to values of every cross-attention, apart in published files, one under the other."""
    joined = {}
    for key, value in state.items():
        if ".cross_attn.projk." in key:
            partner = key.replace(".projk.", ".projv.")
            if partner in state:
                joined[key.replace(".projk.", ".kv.")] = torch.cat([value, state[partner]])
        elif ".cross_attn.projv." not in key:
            joined[key] = value
    return joined
