"""Reading weights safely: safetensors, and torch files without executing anything they contain."""

from __future__ import annotations

import difflib
import os
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from geossl.errors import CheckpointError

# Training scripts like to store accuracies as numpy scalars; rebuilding those runs nothing but numpy's own constructors.
_NUMPY_SCALARS: list[Any] = [np.dtype, np.float64(0).__reduce__()[0], *{type(np.dtype(kind)) for kind in "fdilq?"}]


def read_safetensors(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Read a safetensors file; a missing or damaged one raises :class:`CheckpointError` naming it."""
    try:
        return safetensors.torch.load_file(path)
    except (OSError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read as safetensors (missing, truncated or not such a file): {error}") from error


class _Skipped:
    """Stands for an object that a file asks for and nobody needs: takes whatever it is built from, and keeps none of it."""

    def __new__(cls, *args: Any, **kwargs: Any) -> _Skipped:
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def _ignore(self, *args: Any) -> None: ...

    __setstate__ = __setitem__ = append = extend = add = update = _ignore


class _Rebuild:
    """One of the functions that torch files rebuild their tensors with. Has no attributes that a file could change."""

    __slots__ = ("_name",)
    _name: str

    def __init__(self, name: str) -> None:
        object.__setattr__(self, "_name", name)

    def __setattr__(self, name: str, value: Any) -> None:
        raise pickle.UnpicklingError(f"the file tries to set {name}")

    def __call__(self, *args: Any) -> Tensor:
        return getattr(torch._utils, self._name)(*args)


class _DataOnly(pickle.Unpickler):
    """Reads tensors and plain containers. Of everything else that a file names, nothing is imported, looked up or called."""

    _allowed: ClassVar[dict[str, Any]] = {
        f"torch._utils.{name}": _Rebuild(name) for name in ("_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_parameter")
    } | {"collections.OrderedDict": OrderedDict}

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # A class of this file's own, so that nothing the file does to it outlives the reading.
        self._options = type("Namespace", (), {})

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("argparse", "Namespace"):  # the command line of the program that wrote the file: names and plain values
            return self._options
        return self._allowed.get(f"{module}.{name}", _Skipped)


class _DataOnlyPickle:
    """What :func:`torch.load` takes as ``pickle_module``."""

    __name__ = "geossl data-only pickle"
    Unpickler = _DataOnly

    @staticmethod
    def load(file: Any, **options: Any) -> Any:
        return _DataOnly(file, **options).load()


def read_torch_file(path: str | os.PathLike[str], *, skip_objects: bool = False) -> Any:
    """Read a ``.pth``/``.pt``/``.ckpt`` file: tensors and plain containers, never code.

    Args:
        path: The file.
        skip_objects: What to do with a file that holds other Python objects (Lightning checkpoints keep the classes of their
            hyper-parameters): read around them, putting an empty stand-in for each; nothing they name is imported or called. False
            refuses such a file.

    Raises:
        CheckpointError: the file is missing, truncated, or asks for anything but data.
    """
    try:
        if skip_objects:
            if _torchscript_root(path) is not None:
                raise CheckpointError(
                    f"{path} is a TorchScript program, which would run when read; not opened; read_torchscript_weights reads its tensors."
                )
            return torch.load(path, map_location="cpu", weights_only=False, pickle_module=_DataOnlyPickle)
        with torch.serialization.safe_globals(_NUMPY_SCALARS):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if skip_objects:  # objects are no reason then
            raise CheckpointError(f"{path} cannot be read as a torch file (truncated or not such a file): {error}") from error
        raise CheckpointError(
            f"{path} holds Python objects beyond tensors and plain containers, which would run code when read; it was not opened. "
            f"If you trust its author, re-save only its state_dict. ({str(error).splitlines()[0]})"
        ) from error
    except (
        *(OSError, RuntimeError, EOFError, ValueError, KeyError, TypeError, AttributeError, IndexError),
        *(zipfile.BadZipFile, AssertionError),  # what torch raises for damaged archives and records
    ) as error:
        raise CheckpointError(f"{path} cannot be read as a torch file (missing, truncated or not such a file): {error}") from error


class _Storage:
    """Kind of number that a stored tensor has, as TorchScript names it: ``torch.HalfStorage``."""

    kinds: ClassVar[dict[str, torch.dtype]] = {
        "torch.FloatStorage": torch.float32,
        "torch.HalfStorage": torch.float16,
        "torch.BFloat16Storage": torch.bfloat16,
        "torch.DoubleStorage": torch.float64,
        "torch.LongStorage": torch.int64,
        "torch.IntStorage": torch.int32,
        "torch.BoolStorage": torch.bool,
    }


class _TensorsOfProgram(pickle.Unpickler):
    """Reads the module tree of a TorchScript archive as plain objects; none of its code is looked at."""

    def __init__(self, archive: zipfile.ZipFile, root: str) -> None:
        super().__init__(archive.open(f"{root}/data.pkl"))
        self.archive = archive
        self.root = root

    def find_class(self, module: str, name: str) -> Any:
        path = f"{module}.{name}"
        if path in _Storage.kinds:
            return _Storage.kinds[path]
        if path == "torch._utils._rebuild_tensor_v2":
            return lambda storage, offset, size, stride, *_: storage.as_strided(size, stride, offset)
        return type("Module", (), {}) if module.startswith("__torch__") else _Skipped

    def persistent_load(self, pid: Any) -> Tensor:
        _, dtype, key, *_ = pid
        return torch.frombuffer(bytearray(self.archive.read(f"{self.root}/data/{key}")), dtype=dtype)


def _torchscript_root(path: str | os.PathLike[str]) -> str | None:
    """The folder inside a TorchScript archive; None for any other file."""
    try:
        with zipfile.ZipFile(path) as archive:
            return next((name.removesuffix("/constants.pkl") for name in archive.namelist() if name.endswith("/constants.pkl")), None)
    except (OSError, zipfile.BadZipFile):
        return None


def read_torchscript_weights(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Read the tensors of a TorchScript archive (the form in which OpenAI released CLIP) by name, without running the program in it.

    Raises:
        CheckpointError: it is damaged, or no such archive.
    """
    root = _torchscript_root(path)
    if root is None:
        raise CheckpointError(f"{path} is not a TorchScript archive; read it with read_reference_state")
    state: dict[str, Tensor] = {}

    def collect(value: Any, name: str) -> None:
        if isinstance(value, Tensor):
            state[name] = value
        elif hasattr(value, "__dict__") and type(value).__name__ == "Module":
            for key, child in vars(value).items():
                collect(child, f"{name}.{key}" if name else key)

    try:
        with zipfile.ZipFile(path) as archive:
            collect(_TensorsOfProgram(archive, root).load(), "")
    except (zipfile.BadZipFile, pickle.UnpicklingError, EOFError, RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} cannot be read as a TorchScript archive (truncated or damaged): {error}") from error
    return state


def read_reference_state(source: str | os.PathLike[str] | Mapping[str, Any], *, skip_objects: bool = False) -> dict[str, Tensor]:
    """Find the weights in an official checkpoint: a file (torch, TorchScript or safetensors), or what was read from one.

    Looks under the usual keys (``base_model``, ``model``, ``state_dict``) and strips the ``module.`` that data-parallel training
    leaves; float16 weights become float32. ``skip_objects``: see :func:`read_torch_file`.

    Raises:
        CheckpointError: no tensors are found.
    """
    if isinstance(source, Mapping):
        content, name = source, "the given state"
    else:
        name = str(source)
        if Path(source).suffix == ".safetensors":
            content = read_safetensors(source)
        elif _torchscript_root(source) is not None:
            content = read_torchscript_weights(source)
        else:
            content = read_torch_file(source, skip_objects=skip_objects)
    for key in ("base_model", "model", "state_dict"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    state = {k: v for k, v in content.items() if isinstance(v, Tensor)} if isinstance(content, Mapping) else {}
    if not state:
        keys = sorted(map(str, content))[:10] if isinstance(content, Mapping) else type(content).__name__
        raise CheckpointError(
            f"{name} holds no weights: expected tensors, or a dict of them under base_model, model or state_dict; found {keys}"
        )
    return {k.removeprefix("module."): v.float() if v.is_floating_point() else v for k, v in state.items()}


def load_state(module: nn.Module, state: Mapping[str, Tensor], *, source: str) -> None:
    """Load ``state`` into ``module``, strictly: nothing is skipped, and on any mismatch nothing is loaded.

    Args:
        module: The module to fill.
        state: Tensors by name.
        source: Where they come from, for the message.

    Raises:
        CheckpointError: names are missing, unexpected, or have another shape; the message lists them.
    """
    own = module.state_dict()
    missing = sorted(set(own) - set(state))
    unexpected = sorted(set(state) - set(own))
    shapes = [f"{k} {list(state[k].shape)} (expected {list(own[k].shape)})" for k in own if k in state and state[k].shape != own[k].shape]
    if not (missing or unexpected or shapes):
        module.load_state_dict(dict(state))
        return
    lines = [f"{source} does not fit {type(module).__name__}; nothing was loaded:"]
    for title, names in (("missing", missing), ("unexpected", unexpected), ("other shape", shapes)):
        if names:
            lines.append(f"  {title} ({len(names)}): {', '.join(names[:20])}{' ...' if len(names) > 20 else ''}")
    near = difflib.get_close_matches(missing[0], unexpected, n=1) if missing else []
    if near:
        lines.append(f"  ({near[0]!r} looks like {missing[0]!r}: official checkpoint files are read by geossl.load_reference)")
    raise CheckpointError("\n".join(lines))
