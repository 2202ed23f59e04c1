"""Argument checks shared by the operators. Every message names the operator and the argument, says what came and what to do.

Functions used by the public operators look at shapes, types and devices only, so they need no device synchronisation and can be traced by
``torch.compile``. Those under "values" read data; they run inside the operator: always on the CPU, on CUDA only with ``GEOSSL_CHECKS=1``.
"""

from __future__ import annotations

import math
import numbers
import operator
import os
from typing import Any

import torch
from torch import Tensor

_FULL = (torch.float32, torch.float64)
_HALF = (torch.float16, torch.bfloat16)

LARGEST_CLOUD = 2**31 - 1 - 1024  # rows inside one cloud are counted in 32 bits; batches may be larger


def describe(value: Any) -> str:
    """Describe an argument in an error message: type, shape and device of a tensor, the value of anything else."""
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)} on {value.device}"
    return f"{type(value).__name__} {value!r}"


def points(
    op: str, name: str, value: Tensor, packed: bool, like: Tensor | None = None, any_channels: bool = False, integers: bool = False
) -> Tensor:
    """Check coordinates ``[B, N, 3]`` (packed: ``[M, 3]``) and return them, half precision as float32.

    Args:
        op: Operator, for messages.
        name: Argument, for messages.
        value: What the caller gave.
        packed: Whether offsets cut the rows into clouds.
        like: Coordinates already checked, whose type and device these must share.
        any_channels: Take any number of columns, at least 1 and as many as ``like`` has, instead of 3.
        integers: Take int32 and int64 as well, as they are.
    """
    if like is None and value.__class__ is Tensor and value.dtype is torch.float32:
        shape = value.shape
        if len(shape) == (2 if packed else 3) and (shape[-1] == 3 or (any_channels and shape[-1] > 0)):
            return value  # the usual case, soon over
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor of coordinates, got {describe(value)}; convert it with torch.as_tensor")
    if value.dtype not in _FULL and not (integers and value.dtype in (torch.int32, torch.int64)):
        if value.dtype not in _HALF:
            raise TypeError(f"{op}: {name} must be float32 or float64 (half types are upcast), got {describe(value)}; call {name}.float()")
        value = value.float()
    rank = 2 if packed else 3
    if value.dim() != rank or (value.shape[-1] < 1 if any_channels else value.shape[-1] != 3):
        width = "D" if any_channels else "3"
        if packed:
            form = f"[M, {width}] because offsets were given (the packed form)"
        else:
            form = f"[B, N, {width}]; a single cloud [N, {width}] needs points[None], and packed clouds need their offsets"
        advice = "D is at least 1" if any_channels else "Pass coordinates only: points[..., :3]"
        raise ValueError(f"{op}: {name} must be {form}; got {describe(value)}. {advice}")
    if like is not None:
        if value.dtype != like.dtype:
            raise TypeError(f"{op}: {name} is {value.dtype} but the other cloud is {like.dtype}; convert one of them")
        same_device(op, name, value, like)
        if value.shape[-1] != like.shape[-1]:
            raise ValueError(
                f"{op}: both clouds must have the same number of channels D, got {like.shape[-1]} and {value.shape[-1]} in {name}"
            )
    return value


def two_clouds(
    op: str, names: tuple[str, str], one: Tensor, other: Tensor, packed: bool, any_channels: bool = False
) -> tuple[Tensor, Tensor]:
    """Check the coordinates of two clouds, which must share their type, device and number of channels; see :func:`points`."""
    if one.__class__ is Tensor is other.__class__ and one.dtype is torch.float32 is other.dtype and one.device == other.device:
        shape, others = one.shape, other.shape
        alike = len(shape) == len(others) == (2 if packed else 3) and shape[-1] == others[-1]
        if alike and (shape[-1] == 3 or (any_channels and shape[-1] > 0)):
            return one, other  # the usual case, soon over
    one = points(op, names[0], one, packed, any_channels=any_channels)
    return one, points(op, names[1], other, packed, like=one, any_channels=any_channels)


def same_device(op: str, name: str, value: Tensor, like: Tensor) -> None:
    """Check that a tensor lies on the device of the points."""
    if value.device != like.device:
        raise ValueError(f"{op}: {name} is on {value.device} but the points are on {like.device}; move one of them")


def positive(op: str, name: str, given: Any) -> int:
    """Check a count of at least 1 and return it as an int."""
    if given.__class__ is int and given > 0:
        return given  # the usual case, soon over
    value = given
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        try:
            value = None if isinstance(value, bool) else operator.index(value)
        except TypeError:
            value = None
        if value is None:
            raise TypeError(f"{op}: {name} must be a whole number, got {describe(given)}")
    if value < 1:
        raise ValueError(f"{op}: {name} must be at least 1, got {value}")
    return value


def radius(op: str, value: Any) -> float:
    """Check a radius and return it as a float."""
    if value.__class__ is float and value > 0:
        return value  # the usual case, soon over
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{op}: radius must be a number, got {describe(value)}")
    number = float(value)
    if not number > 0:
        raise ValueError(f"{op}: radius must be positive (inf is allowed), got {value}")
    return number


def radius_or_radii(op: str, value: Any, query: Tensor) -> tuple[float, Tensor | None]:
    """Check one radius for all queries or one for each; return the first, inf if there are several, and the others."""
    if value.__class__ is float or not isinstance(value, Tensor):
        return radius(op, value), None
    if value.shape != query.shape[:-1] or not value.is_floating_point():
        raise ValueError(
            f"{op}: radius must be a number or a floating tensor with one radius per query, {list(query.shape[:-1])}; got {describe(value)}"
        )
    same_device(op, "radius", value, query)
    return math.inf, value.detach()


def integers(op: str, name: str, value: Any, size: int, like: Tensor, what: str) -> Tensor:
    """Check an integer tensor ``[size]`` on the device of the points and return it as contiguous int64."""
    if not isinstance(value, Tensor) or value.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{op}: {name} must be an int64 or int32 tensor {what}, got {describe(value)}; convert it with .long()")
    if value.dim() != 1 or value.shape[0] != size:
        raise ValueError(f"{op}: {name} must be {what} = [{size}], got {describe(value)}")
    same_device(op, name, value, like)
    return value if value.dtype == torch.int64 else value.long()


def batching(
    op: str, value: Tensor, lengths: Tensor | None, offsets: Tensor | None, prefix: str = ""
) -> tuple[Tensor | None, Tensor | None]:
    """Check ``lengths`` or ``offsets`` of one cloud argument, whose coordinates have been checked, and return both as int64 or None."""
    if offsets is not None:
        plain = lengths is None and offsets.__class__ is Tensor and offsets.dtype is torch.int64 and offsets.dim() == 1
        if plain and offsets.shape[0] > 0 and offsets.device == value.device:
            return None, offsets  # the usual case, soon over
        if lengths is not None:
            raise ValueError(f"{op}: give {prefix}lengths (padded clouds) or {prefix}offsets (packed clouds), not both")
        if not isinstance(offsets, Tensor) or offsets.dim() != 1 or offsets.shape[0] < 1:
            raise ValueError(
                f"{op}: {prefix}offsets must be an int64 tensor [B + 1] (0, end of cloud 0, ..., number of rows), got {describe(offsets)}"
            )
        return None, integers(op, f"{prefix}offsets", offsets, offsets.shape[0], value, "[B + 1]")
    if lengths is not None:
        return integers(op, f"{prefix}lengths", lengths, value.shape[0], value, "[B], one per cloud"), None
    return None, None


# Values -----------------------------------------------------------------------------------------------------------------------------


def read_values(tensor: Tensor) -> bool:
    """Return whether the values of arguments on this tensor's device are checked."""
    return not tensor.is_cuda or os.environ.get("GEOSSL_CHECKS", "0") not in ("", "0")


def radii_values(op: str, radii: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Check that all radii are positive; return them contiguous, in the type of the points."""
    if radii is None:
        return None
    if read_values(radii) and not bool((radii > 0).all()):
        raise ValueError(f"{op}: radius must be positive for every query, got {radii[~(radii > 0)].flatten()[0].item()}")
    return radii.to(dtype).contiguous()


def offset_values(op: str, offsets: Tensor, rows: int, prefix: str = "") -> Tensor:
    """Check that offsets start at 0, never fall, and end at the number of rows; return them contiguous."""
    if read_values(offsets):
        values = offsets.tolist()
        if values[0] != 0 or values[-1] != rows or values != sorted(values):
            shown = f"{values[:8]}{'...' if len(values) > 8 else ''}"
            raise ValueError(
                f"{op}: {prefix}offsets must start at 0, never decrease, and end at the number of rows ({rows}), got {shown} ending at "
                f"{values[-1]}; make them with offsets_from_batch, offsets_from_lengths or offsets_from_ends of geossl.ops"
            )
    if rows > LARGEST_CLOUD and int(offsets.diff().max()) > LARGEST_CLOUD:
        raise ValueError(f"{op}: a cloud has more than {LARGEST_CLOUD} rows, more than kernels can count; cut it into smaller clouds")
    return offsets.contiguous()


def length_values(op: str, lengths: Tensor, capacity: int, prefix: str = "") -> Tensor:
    """Check that lengths lie between 0 and the padded size; return them contiguous."""
    if read_values(lengths):
        values = lengths.tolist()
        wrong = [value for value in (min(values, default=0), max(values, default=0)) if not 0 <= value <= capacity]
        if wrong:
            raise ValueError(f"{op}: {prefix}lengths must lie between 0 and {capacity}, the padded size of the clouds; got {wrong[0]}")
    return lengths.contiguous()
