"""Farthest point sampling."""

from __future__ import annotations

import math
from itertools import accumulate, pairwise
from typing import Any, overload

import torch
from torch import Tensor

from geossl.ops import _checks, _dispatch
from geossl.ops._native import DOUBLE, INT, INT64, PTR
from geossl.ops.reference import fps as reference

_OP = "farthest_point_sample"

# dtype, points, offsets, lengths, batch, n, out_offsets, k, start, starts, mask, min_sq_norm, workspace, out
_sample = _dispatch.functions("fps", INT, PTR, PTR, PTR, INT64, INT64, PTR, INT64, INT64, PTR, PTR, DOUBLE, PTR, PTR)


_IN_REGISTERS = {torch.float32: 8192, torch.float64: 4096}  # a GPU block holds clouds of this size; larger ones need memory


def _run(
    kind: Any, points: Tensor, offsets: Tensor | None, lengths: Tensor | None, out_offsets: Tensor | None, largest: int, k: int,
    start: int, starts: Tensor | None, mask: Tensor | None, min_sq_norm: float, out: Tensor,
) -> Tensor:  # fmt: skip
    """Call the kernel; ``largest`` is the size of the largest cloud (or more) and ``k`` the largest number of picks."""
    points = points.contiguous()
    batch = points.shape[0] if offsets is None else offsets.shape[0] - 1
    workspace = None
    if kind == "cuda" and largest > _IN_REGISTERS[points.dtype]:
        # A distance for every row, and two sets of 256 (distance, index) pairs for every cloud.
        workspace = torch.empty(points.numel() // 3 * points.element_size() + batch * 2 * 256 * 16, dtype=torch.uint8, device=points.device)
    if lengths is not None or starts is not None or mask is not None:
        lengths, starts, mask = (None if t is None else t.contiguous() for t in (lengths, starts, mask))
    pointer = _dispatch.pointer
    _sample[kind](
        *_dispatch.place(kind, points), points.dtype == torch.float64, points.data_ptr(), pointer(offsets), pointer(lengths), batch,
        largest, pointer(out_offsets), k, start, pointer(starts), pointer(mask), min_sq_norm, pointer(workspace), out.data_ptr(),
    )  # fmt: skip
    return out


def _start_values(points: Tensor, sizes: list[int] | int, start: int, starts: Tensor | None) -> None:
    """Check that the first pick lies inside every cloud that has points; ``sizes`` is one size when all are equal."""
    if not _checks.read_values(points):
        return
    if isinstance(sizes, int):
        first = [start] if starts is None else starts.tolist()
        bad = [(b, s, sizes) for b, s in enumerate(first) if sizes and not 0 <= s < sizes]
    else:
        first = [start] * len(sizes) if starts is None else starts.tolist()
        bad = [(b, s, n) for b, (s, n) in enumerate(zip(first, sizes, strict=True)) if n and not 0 <= s < n]
    if bad:
        b, s, n = bad[0]
        raise ValueError(
            f"{_OP}: start must be a row of every cloud, but it is {s} for cloud {b}, which has {n} points (rows 0 to {n - 1})"
        )


def _padded_values(points: Tensor, lengths: Tensor | None, start: int, starts: Tensor | None) -> None:
    if lengths is not None:
        _checks.length_values(_OP, lengths, points.shape[1])
    if start != 0 or starts is not None:
        _start_values(points, points.shape[1] if lengths is None or points.is_cuda else lengths.tolist(), start, starts)


def _fps_native(
    kind: Any, points: Tensor, k: int, lengths: Tensor | None, start: int, starts: Tensor | None, mask: Tensor | None, min_sq_norm: float
) -> Tensor:
    _padded_values(points, lengths, start, starts)
    out = points.new_empty(points.shape[0], k, dtype=torch.int64)
    return _run(kind, points, None, lengths, None, points.shape[1], k, start, starts, mask, min_sq_norm, out)


def _fps_twin(points: Tensor, k: int, lengths: Tensor | None, start: int, starts: Tensor | None, *rest: Any) -> Tensor:
    _padded_values(points, lengths, start, starts)
    return reference.fps(points, k, lengths, start, starts, *rest)


def _fps_fake(points: Tensor, k: int, *rest: Any) -> Tensor:
    return points.new_empty((points.shape[0], k), dtype=torch.int64)


def _packed_sizes(
    points: Tensor, offsets: Tensor, counts: Tensor | None, k: int, ratio: float, start: int, starts: Tensor | None
) -> tuple[list[int], list[int]]:
    """Check the values; return the points and the picks of every cloud. This is where a call on a GPU waits for the device."""
    _checks.offset_values(_OP, offsets, points.shape[0])
    ends = offsets.tolist()
    sizes = [end - begin for begin, end in pairwise(ends)]
    if start != 0 or starts is not None:
        _start_values(points, sizes, start, starts)
    if counts is not None:
        wanted = counts.tolist()
        if wanted and min(wanted) < 0:
            raise ValueError(f"{_OP}: k must not be negative, got {min(wanted)} for cloud {wanted.index(min(wanted))}")
    elif ratio > 0:
        # The tolerance keeps ratio * n from being rounded up past a whole number: 0.1 of 30 points are 3.
        wanted = [math.ceil(ratio * size * (1 - 1e-12)) for size in sizes]
    else:
        wanted = [k] * len(sizes)
    return sizes, [min(pair) for pair in zip(sizes, wanted, strict=True)]


def _packed_native(
    kind: Any, points: Tensor, offsets: Tensor, counts: Tensor | None, k: int, ratio: float, start: int, starts: Tensor | None,
    mask: Tensor | None, min_sq_norm: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    offsets = offsets.contiguous()
    sizes, picks = _packed_sizes(points, offsets, counts, k, ratio, start, starts)
    ends = list(accumulate(picks, initial=0))
    out_offsets = torch.tensor(ends, device=points.device)
    out = points.new_empty(ends[-1], dtype=torch.int64)
    largest, most = max(sizes, default=0), max(picks, default=0)
    return _run(kind, points, offsets, None, out_offsets, largest, most, start, starts, mask, min_sq_norm, out), out_offsets


def _packed_twin(
    points: Tensor, offsets: Tensor, counts: Tensor | None, k: int, ratio: float, start: int, starts: Tensor | None, mask: Tensor | None,
    min_sq_norm: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    _, picks = _packed_sizes(points, offsets, counts, k, ratio, start, starts)
    out_offsets = torch.tensor(list(accumulate(picks, initial=0)), device=points.device)
    return reference.fps_packed(points, offsets, out_offsets, start, starts, mask, min_sq_norm), out_offsets


def _packed_fake(points: Tensor, offsets: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    total = torch.library.get_ctx().new_dynamic_size()
    return points.new_empty(total, dtype=torch.int64), torch.empty_like(offsets)


_fps = _dispatch.define(
    "fps(Tensor points, SymInt k, Tensor? lengths, SymInt start, Tensor? starts, Tensor? mask, float min_sq_norm) -> Tensor",
    native=_fps_native,
    twin=_fps_twin,
    fake=_fps_fake,
    direct=True,
)
_fps_packed = _dispatch.define(
    "fps_packed(Tensor points, Tensor offsets, Tensor? counts, SymInt k, float ratio, SymInt start, Tensor? starts, Tensor? mask, "
    "float min_sq_norm) -> (Tensor, Tensor)",
    native=_packed_native,
    twin=_packed_twin,
    fake=_packed_fake,
    direct=True,
)


@overload
def farthest_point_sample(
    points: Tensor, k: int, *, lengths: Tensor | None = ..., offsets: None = ..., start: int | Tensor | torch.Generator = ...,
    min_sq_norm: float | None = ..., mask: Tensor | None = ...,
) -> Tensor: ...  # fmt: skip
@overload
def farthest_point_sample(
    points: Tensor, k: int | float | Tensor, *, offsets: Tensor, start: int | Tensor | torch.Generator = ...,
    min_sq_norm: float | None = ..., mask: Tensor | None = ...,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
def farthest_point_sample(
    points: Tensor,
    k: int | float | Tensor,
    *,
    lengths: Tensor | None = None,
    offsets: Tensor | None = None,
    start: int | Tensor | torch.Generator = 0,
    min_sq_norm: float | None = None,
    mask: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Pick points that cover each cloud: every pick is the point farthest from all earlier ones (Eldar et al. 1997).

    Exact and deterministic: squared distances are ``(dx*dx + dy*dy) + dz*dz`` in the type of the points, equal distances go to the lower
    index, and the picks are the same on CPU and GPU, padded and packed, for any number of threads. No point is picked twice: once all
    remaining points coincide with picked ones, the lowest index not yet taken is next, so ``k = N`` gives a permutation. Points with a NaN
    or infinite coordinate are never picked. Indices are not differentiable.

    Args:
        points: Clouds, ``[B, N, 3]``, or with ``offsets`` all rows ``[M, 3]``; float32 or float64 (half types are upcast to float32).
        k: Points to pick per cloud, at least 1. Packed clouds also take one number per cloud ``[B]`` (int64 or int32, 0 allowed), or a
            float in (0, 1]: that share of each cloud's points, rounded up.
        lengths: Points in each padded cloud, ``[B]`` in 0..N; None means N. Rows past them are never looked at.
        offsets: Row at which each packed cloud begins, and the end: ``[B + 1]``.
        start: First pick: a row within each cloud, the same for all or one per cloud ``[B]``, or a ``torch.Generator`` to draw them from
            (one number per cloud, on the generator's device). If that point is invalid or masked, the next one that is not, going round.
        min_sq_norm: Parity with the published implementations, which leave out points near the origin: points with
            ``x*x + y*y + z*z <= min_sq_norm`` are only picked as start, and once all others are picked the start is returned again and
            again instead of -1. Point-MAE, Point-M2AE and I2P-MAE need 1e-3; None, the default, treats all points alike.
        mask: True where a point may be picked, ``[B, N]`` (packed: ``[M]``) bool.

    Returns:
        Padded: indices ``[B, k]`` int64 within each cloud, -1 where a cloud has no further valid points.
        Packed: indices ``[T]`` int64 of rows of ``points``, and their offsets ``[B + 1]``; cloud b gives ``min(k, its points)`` entries,
        of which the last are -1 if some of its points are invalid or masked.

    Raises:
        ValueError: a shape, device or value is wrong; TypeError: a type is. Values on CUDA are only checked with ``GEOSSL_CHECKS=1``.

    Example:
        >>> points = torch.tensor([[[0.0, 0, 0], [1, 0, 0], [5, 0, 0], [4, 0, 0]]])
        >>> farthest_point_sample(points, 3)
        tensor([[0, 2, 1]])
    """
    points = _checks.points(_OP, "points", points, offsets is not None)
    lengths, offsets = _checks.batching(_OP, points, lengths, offsets)
    if mask is not None:
        _check_mask(mask, points)
    batch = points.shape[0] if offsets is None else offsets.shape[0] - 1
    first, starts = (start, None) if isinstance(start, int) else _starts(start, points, batch, lengths, offsets)
    skip = -1.0 if min_sq_norm is None else _min_sq_norm(min_sq_norm)
    if offsets is None:
        return _fps(points, _checks.positive(_OP, "k", k), lengths, first, starts, mask, skip)
    if isinstance(k, Tensor):
        counts = _checks.integers(_OP, "k", k, batch, points, "[B], one number per cloud")
        return _fps_packed(points, offsets, counts, 0, 0.0, first, starts, mask, skip)
    if isinstance(k, float):
        if not 0 < k <= 1:
            raise ValueError(
                f"{_OP}: k as a float is the share of points to keep and must lie in (0, 1], got {k}; for a number give an int"
            )
        return _fps_packed(points, offsets, None, 0, k, first, starts, mask, skip)
    return _fps_packed(points, offsets, None, _checks.positive(_OP, "k", k), 0.0, first, starts, mask, skip)


def _check_mask(mask: Tensor, points: Tensor) -> None:
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.shape != points.shape[:-1]:
        raise ValueError(
            f"{_OP}: mask must be bool {list(points.shape[:-1])}, True where a point may be picked; got {_checks.describe(mask)}"
        )
    _checks.same_device(_OP, "mask", mask, points)


def _min_sq_norm(value: float) -> float:
    if not 0 <= value < float("inf"):
        raise ValueError(f"{_OP}: min_sq_norm must be a squared distance of at least 0, or None to treat all points alike; got {value}")
    return float(value)


def _starts(
    start: int | Tensor | torch.Generator, points: Tensor, batch: int, lengths: Tensor | None, offsets: Tensor | None
) -> tuple[int, Tensor | None]:
    """Return the first pick of every cloud as one number or a tensor ``[B]``."""
    if isinstance(start, torch.Generator):
        share = torch.rand(batch, dtype=torch.float64, device=start.device, generator=start).to(points.device)
        sizes = offsets.diff() if offsets is not None else points.shape[1] if lengths is None else lengths
        # Below 1 in exact arithmetic, but share * size can round up to size.
        return 0, torch.minimum((share * sizes).long(), torch.as_tensor(sizes, device=points.device) - 1).clamp_(min=0)
    if isinstance(start, Tensor):
        return 0, _checks.integers(_OP, "start", start, batch, points, "[B], one row per cloud")
    try:
        return start.__index__(), None  # numpy integers and the like
    except AttributeError:
        raise TypeError(f"{_OP}: start must be an int, a tensor [B] or a torch.Generator, got {_checks.describe(start)}") from None
