"""The registry of backbones, and how they are created, saved and loaded.

A saved backbone is a folder with ``model.safetensors`` (weights) and ``config.json`` (registered name and all numbers), readable
without executing anything.
"""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import nn

from geossl.config import read_yaml
from geossl.errors import CheckpointError, ConfigError, optional_import, unknown_name
from geossl.models.checkpoints import load_state, read_safetensors
from geossl.registry import Registry

BACKBONES: Registry[Any] = Registry("backbone")
"""Registered backbone variants; each entry returns a configuration dataclass with ``name`` and ``build()``."""


@dataclass(frozen=True)
class FeatureInfo:
    """What one entry of ``forward_intermediates`` looks like.

    Args:
        module: Where it is taken, for example ``blocks.3``.
        channels: Its channels.
        stride: Input units (voxels, pixels) per feature; None for point tokens, whose positions travel with them.
    """

    module: str
    channels: int
    stride: float | None = None


def list_backbones(pattern: str = "*") -> list[str]:
    """Names of the registered backbones that match a shell-style ``pattern``, sorted.

    Example:
        >>> geossl.list_backbones("point_vit_*")
        ['point_vit_base', 'point_vit_small', 'point_vit_tiny']
    """
    return BACKBONES.names(pattern)


def create_backbone(name: str, **overrides: Any) -> nn.Module:
    """Create a backbone with fresh weights.

    Args:
        name: A registered name, see :func:`list_backbones`.
        **overrides: Fields of the variant's configuration to change; those given as None keep their default.

    Returns:
        The backbone, in training mode; its configuration is ``backbone.config``.

    Raises:
        UnknownNameError: for an unknown name or override; the message names the nearest valid ones.
        ConfigError: a value is out of range.

    Example:
        >>> backbone = geossl.create_backbone("point_vit_small", groups=128)
        >>> tokens = backbone(points)  # points [B, N, 3] -> Tokens
    """
    config = BACKBONES.config(name)
    known = {f.name for f in dataclasses.fields(config)} - {"name"}
    for key in overrides:
        if key not in known:
            raise unknown_name(f"option of backbone {name!r}", key, known)
    return dataclasses.replace(config, **{key: value for key, value in overrides.items() if value is not None}).build()


def save_backbone(backbone: nn.Module, folder: str | os.PathLike[str]) -> Path:
    """Write ``model.safetensors`` and ``config.json`` of a backbone into ``folder`` (made if missing); returns the folder."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_weights(backbone, folder / "model.safetensors")
    config = {"backbone": dataclasses.asdict(backbone.config)}  # type: ignore[call-overload]
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    return folder


def save_weights(module: nn.Module, path: Path) -> None:
    """Write the state of ``module`` as a safetensors file into an existing folder."""
    state = {key: value.detach().cpu().contiguous() for key, value in module.state_dict().items()}
    safetensors.torch.save_file(state, path, metadata={"format": "pt"})
    path.chmod(path.parent.stat().st_mode & 0o666)  # safetensors makes private files, whatever the umask says


def load(source: str | os.PathLike[str]) -> nn.Module:
    """Load a backbone with its weights.

    Args:
        source: A folder written by :func:`save_backbone` (or ``tools/convert_checkpoint.py``), a run folder of
            ``tools/pretrain.py`` (its ``export/`` is taken), one of its checkpoints, as ``runs/mine/checkpoints/step_00000500`` (the
            averaged weights, where it has them, as they are what an export holds), or the id of a model hub repository holding these
            two files, as ``hf-hub:owner/name`` (needs ``geossl[hub]``).

    Returns:
        The backbone in evaluation mode.

    Raises:
        CheckpointError: files are missing, damaged or belong to another model; the message lists the keys.
    """
    checkpoint = Path(source).absolute()
    if (checkpoint / "manifest.json").is_file():  # of the training loop, holding the whole method or task
        config_path, average, prefix = checkpoint.parents[1] / "config.yaml", checkpoint / "ema.safetensors", "backbone."
        weights_path = average if average.is_file() else checkpoint / "model.safetensors"
    else:
        folder = locate_folder(source)
        config_path, weights_path, prefix = folder / "config.json", folder / "model.safetensors", ""
    try:
        values = read_yaml(config_path)["backbone"]  # JSON is YAML
        if values is None:
            raise CheckpointError(f"{source}: this run took its backbone from its weights; load its export, which is written at its end")
        config = BACKBONES.config(values["name"])
        backbone = dataclasses.replace(config, **{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}).build()
    except (KeyError, TypeError, ConfigError) as error:
        raise CheckpointError(f"{config_path} is not a configuration geossl wrote: {error!r}") from error
    state = {name.removeprefix(prefix): value for name, value in read_safetensors(weights_path).items() if name.startswith(prefix)}
    load_state(backbone, state, source=str(weights_path))
    return backbone.eval()


def locate_folder(source: str | os.PathLike[str]) -> Path:
    """Find the folder with ``model.safetensors`` and ``config.json`` that ``source`` means; see :func:`load`."""
    text = os.fspath(source)
    if text.startswith("hf-hub:"):
        hub = optional_import("huggingface_hub", "hub")
        files = ["config.json", "model.safetensors", "decoder.json", "decoder.safetensors"]
        return Path(hub.snapshot_download(text.removeprefix("hf-hub:"), allow_patterns=files))
    folder = Path(text)
    for candidate in (folder, folder / "export"):
        if (candidate / "config.json").is_file() and (candidate / "model.safetensors").is_file():
            return candidate
    if not folder.exists():
        hint = (
            f"; {text!r} is a registered backbone: geossl.create_backbone({text!r}) makes one with fresh weights"
            if text in BACKBONES.names()
            else ""
        )
        raise CheckpointError(f"{text}: no such folder{hint}")
    if checkpoints := sorted(folder.glob("checkpoints/step_*")):
        raise CheckpointError(
            f"{text}: this run has not reached its end and holds no export; continue it with --resume auto, "
            f"or take a checkpoint: {checkpoints[-1]}"
        )
    found = sorted(p.name for p in folder.iterdir())[:10] if folder.is_dir() else "a file"
    raise CheckpointError(
        f"{text}: expected model.safetensors and config.json in it (or in its export/), found {found}; "
        "official checkpoint files are read by geossl.load_reference"
    )
