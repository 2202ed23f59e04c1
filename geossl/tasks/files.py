"""Fine-tuned models on disk: the backbone's files, and the whole task beside them."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Sequence
from pathlib import Path

import safetensors.torch
from torch import nn

from geossl.config import from_dict
from geossl.errors import CheckpointError, ConfigError, UnknownNameError
from geossl.models import load
from geossl.models.checkpoints import load_state, read_safetensors
from geossl.tasks.registry import TASKS


def save_task(module: nn.Module, classes: Sequence[str], folder: str | os.PathLike[str]) -> None:
    """Write ``task.safetensors`` (backbone and head) and ``task.json`` into ``folder``, beside the backbone's own files."""
    folder = Path(folder)
    state = {name: value.detach().cpu().contiguous() for name, value in module.state_dict().items()}
    safetensors.torch.save_file(state, folder / "task.safetensors", metadata={"format": "pt"})
    about = {"task": dataclasses.asdict(module.config), "classes": list(classes)}  # type: ignore[call-overload]
    (folder / "task.json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")


def load_task(source: str | os.PathLike[str]) -> nn.Module:
    """Load a fine-tuned model with its head.

    Args:
        source: A run folder of ``tools/finetune.py``, or its ``export/``.

    Returns:
        The task in evaluation mode, such as :class:`geossl.tasks.Classification`; its ``classes`` are the names of the classes.

    Raises:
        CheckpointError: the folder holds no task, or files are damaged.

    Example:
        >>> model = geossl.tasks.load_task("runs/finetune_objects")
        >>> names = [model.classes[i] for i in model.logits(points).argmax(1)]
    """
    folder = Path(source)
    folder = folder if (folder / "task.json").is_file() else folder / "export"
    path = folder / "task.json"
    if not path.is_file():
        raise CheckpointError(f"{source}: holds no task.json, nor does its export/; expected a run folder of geossl finetune")
    backbone = load(folder)
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
        module = from_dict(type(TASKS.config(about["task"]["name"])), about["task"]).build(backbone)
        module.classes = list(about["classes"])
    except (ValueError, KeyError, TypeError, ConfigError, UnknownNameError) as error:
        raise CheckpointError(f"{path} is not a task geossl wrote: {error!r}") from error
    load_state(module, read_safetensors(folder / "task.safetensors"), source=str(folder / "task.safetensors"))
    return module.eval()
