"""Checkpoints on disk: written whole or not at all, checked when read, and never executing what they contain.

A checkpoint is a folder ``step_00000100`` with ``model.safetensors``, ``ema.safetensors`` (when there is one), ``optimizer.pt``,
``trainer.pt`` (step, random states of every process, data position, gradient scaler, best probe) and ``manifest.json`` (sizes and CRC-32
of the others). The ``.pt`` files hold tensors and plain values and are read with ``weights_only=True``.
"""

from __future__ import annotations

import json
import logging
import os
import pickle
import re
import shutil
import uuid
import zlib
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from geossl.errors import CheckpointError

log = logging.getLogger("geossl")

FORMAT = 1
_TEMPORARY = ".writing_"


def step_folder(root: Path, step: int) -> Path:
    """Folder of the checkpoint of ``step`` under ``root``."""
    return root / f"step_{step:08d}"


def list_checkpoints(root: Path) -> list[Path]:
    """Checkpoint folders under ``root``, intact or not, newest first."""
    found = [path for path in root.glob("step_*") if re.fullmatch(r"step_\d{8,}", path.name)]
    return sorted(found, key=step_of, reverse=True)


def step_of(folder: Path) -> int:
    """Step in the name of a checkpoint folder."""
    return int(folder.name.removeprefix("step_"))


def write_checkpoint(root: Path, step: int, tensors: Mapping[str, Mapping[str, Tensor]], states: Mapping[str, Any]) -> Path:
    """Write the checkpoint of ``step`` under ``root`` and return its folder.

    Everything goes into a temporary folder that is flushed to the disk and then renamed: whatever happens meanwhile, a folder named
    ``step_*`` is complete, and earlier checkpoints are untouched.

    Args:
        root: Folder of the run's checkpoints; made if missing.
        step: Optimiser steps done.
        tensors: For each name, a flat state to be written as ``<name>.safetensors``.
        states: For each name, tensors and plain values to be written as ``<name>.pt``.

    Raises:
        CheckpointError: the checkpoint could not be written (full disk, no permission).
    """
    temporary = root / f"{_TEMPORARY}{step:08d}_{uuid.uuid4().hex[:8]}"
    final = step_folder(root, step)
    try:
        temporary.mkdir(parents=True)
        for name, state in tensors.items():
            _write_synced(temporary / f"{name}.safetensors", _safetensors_writer(state))
        for name, state in states.items():
            _write_synced(temporary / f"{name}.pt", partial(torch.save, state))
        entries = {path.name: {"bytes": path.stat().st_size, "crc32": _crc32(path)} for path in sorted(temporary.iterdir())}
        manifest = json.dumps({"format": FORMAT, "step": step, "torch": torch.__version__, "files": entries}, indent=2) + "\n"
        _write_synced(temporary / "manifest.json", lambda path: path.write_text(manifest))
        _sync_folder(temporary)
        _put_in_place(temporary, final)
    except (OSError, RuntimeError, safetensors.SafetensorError) as error:  # torch reports a full disk as a RuntimeError
        shutil.rmtree(temporary, ignore_errors=True)
        earlier = next((path.name for path in list_checkpoints(root)), None)
        kept = f"earlier checkpoints are untouched, the newest is {earlier}" if earlier else "there is no earlier checkpoint"
        reason = getattr(error, "strerror", None) or _first_line(error)
        raise CheckpointError(
            f"could not write the checkpoint of step {step} into {root}: {reason}; {kept}. Make room and continue with --resume auto"
        ) from error
    return final


def _put_in_place(temporary: Path, final: Path) -> None:
    if final.exists():  # a damaged one, or the same step written again after resuming
        old = temporary.with_name(temporary.name + "_old")
        final.rename(old)
        temporary.rename(final)
        shutil.rmtree(old, ignore_errors=True)
    else:
        temporary.rename(final)
    _sync_folder(final.parent)


def _safetensors_writer(state: Mapping[str, Tensor]) -> Callable[[Path], None]:
    own: dict[str, Tensor] = {}
    storages = set()
    for name, value in state.items():
        value = value.detach().cpu().contiguous()
        storage = value.untyped_storage().data_ptr()
        own[name] = value.clone() if storage in storages else value  # tied weights: the format wants separate ones
        storages.add(storage)

    def write(path: Path) -> None:
        safetensors.torch.save_file(own, path, metadata={"format": "pt"})
        path.chmod(path.parent.stat().st_mode & 0o666)  # safetensors makes private files, whatever the umask says

    return write


def _write_synced(path: Path, write: Callable[[Path], Any]) -> None:
    write(path)
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text_atomically(path: Path, text: str) -> None:
    """Replace the content of ``path`` with ``text``, whole or not at all."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        _write_synced(temporary, lambda target: target.write_text(text, encoding="utf-8"))
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def prune_checkpoints(root: Path, keep: int, best_step: int | None) -> None:
    """Delete all but the newest ``keep`` checkpoints and that of ``best_step``."""
    for folder in list_checkpoints(root)[keep:]:
        if step_of(folder) != best_step:
            shutil.rmtree(folder, ignore_errors=True)


def remove_unfinished(root: Path) -> None:
    """Delete what a killed process left half written."""
    for folder in root.glob(f"{_TEMPORARY}*"):
        shutil.rmtree(folder, ignore_errors=True)


def damage(folder: Path) -> str | None:
    """Say what is wrong with a checkpoint folder, or None when every file is as it was written."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        if manifest["format"] != FORMAT:
            return f"its format is {manifest['format']!r}, this version reads {FORMAT}"
        for name, entry in manifest["files"].items():
            path = folder / name
            if path.stat().st_size != entry["bytes"]:
                return f"{name} has {path.stat().st_size} bytes instead of {entry['bytes']}"
            if _crc32(path) != entry["crc32"]:
                return f"{name} does not have the content that was written"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"manifest.json cannot be read ({error})"
    return None


def _crc32(path: Path) -> int:
    value = 0
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            value = zlib.crc32(chunk, value)
    return value


def newest_intact(root: Path) -> Path | None:
    """Return the newest intact checkpoint under ``root``, with a warning for each damaged newer one; None when there are none at all.

    Raises:
        CheckpointError: there are checkpoints and all of them are damaged.
    """
    folders = list_checkpoints(root)
    for folder in folders:
        problem = damage(folder)
        if problem is None:
            return folder
        log.warning("checkpoint %s is damaged (%s); taking the one before it", folder, problem)
    if folders:
        raise CheckpointError(f"all {len(folders)} checkpoints in {root} are damaged; start anew with --train.overwrite")
    return None


def find_checkpoint(resume: str, run_folder: Path) -> Path | None:
    """Find the checkpoint to continue from.

    Args:
        resume: ``none``; ``auto``, the newest intact one of ``run_folder`` if there is any; or the path of a checkpoint or run folder.
        run_folder: The run's folder.

    Raises:
        CheckpointError: no checkpoint at the given path, or a damaged one.
    """
    if resume == "none":
        return None
    if resume == "auto":
        return newest_intact(run_folder / "checkpoints")
    path = Path(resume)
    if (path / "checkpoints").is_dir():
        path = newest_intact(path / "checkpoints") or path
    if not re.fullmatch(r"step_\d{8,}", path.name) or not path.is_dir():
        raise CheckpointError(f"{resume}: no checkpoint there; give a folder checkpoints/step_XXXXXXXX, a run folder, 'auto' or 'none'")
    problem = damage(path)
    if problem is not None:
        raise CheckpointError(f"{path} is damaged: {problem}; --resume auto takes the newest intact one")
    return path


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read a ``.safetensors`` file to the CPU.

    Raises:
        CheckpointError: the file is missing or damaged.
    """
    try:
        return safetensors.torch.load_file(path)
    except (OSError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"cannot read {path}: {error}") from error


def read_state(path: Path) -> Any:
    """Read a ``.pt`` file of tensors and plain values to the CPU; nothing in it is executed.

    Raises:
        CheckpointError: the file is missing or damaged, or holds something that would run code.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        name = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = f"it refers to {name[1]}" if name else _first_line(error)
        raise CheckpointError(f"refused to read {path}: it holds more than tensors and plain values and could run code ({what})") from error
    except (OSError, RuntimeError, EOFError, ValueError) as error:
        raise CheckpointError(f"cannot read {path}: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def check_state(expected: Mapping[str, Tensor], state: Mapping[str, Tensor], source: str) -> None:
    """Check that ``state`` has the names and shapes of the module state ``expected``.

    Raises:
        CheckpointError: it does not; the message lists missing, unexpected and mismatched names.
    """
    mismatched = [
        f"{name} {list(state[name].shape)} instead of {list(value.shape)}"
        for name, value in expected.items()
        if name in state and state[name].shape != value.shape
    ]
    findings = {"missing": sorted(set(expected) - set(state)), "unexpected": sorted(set(state) - set(expected)), "mismatched": mismatched}
    parts = [
        f"{len(names)} {kind} ({', '.join(names[:8])}{', ...' if len(names) > 8 else ''})" for kind, names in findings.items() if names
    ]
    if parts:
        raise CheckpointError(f"{source} belongs to another model: {'; '.join(parts)}")
