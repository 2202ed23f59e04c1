"""Frozen features of a backbone: from points to tokens, from tokens to one vector per cloud."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from geossl import ops
from geossl.errors import ConfigError, DataError
from geossl.geometry import PackedPoints, Tokens

Pooling = Literal["mean_max", "mean", "max", "mean_plus_max"]
POOLINGS = ("mean_max", "mean", "max", "mean_plus_max")


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """Hold ``module`` in evaluation mode without gradients; every sub-module gets its own mode back, even after an error."""
    modes = {child: child.training for child in module.modules()}
    module.eval()
    try:
        with torch.no_grad():  # not inference_mode: its tensors could not be trained on afterwards
            yield
    finally:
        for child, mode in modes.items():
            child.training = mode


def read_tokens(backbone: Any, points: PackedPoints | Tensor, layers: int | Sequence[int] | None = None) -> Tokens:
    """Run ``backbone`` and return the tokens of the wanted layers.

    Args:
        backbone: Any geossl backbone (``forward``, ``forward_intermediates``).
        points: Packed clouds, or padded ``[B, N, 3 + C]``.
        layers: None for the normed output of the last block. A list of block numbers (negative ones count from the end) or an
            integer (the last so many): their normed outputs are concatenated along the channels, in the order given. Of a backbone with
            several scales, these count scales, finest first; the tokens are those of the finest one named, to which features of coarser
            ones are carried by interpolation.

    Returns:
        Tokens with ``feats [T, C]`` or ``[T, len(layers) * C]``.

    Raises:
        ConfigError: a block does not exist.
    """
    if layers is None:
        return backbone(points)
    depth = len(backbone.feature_info)
    wanted = list(range(-layers, 0)) if isinstance(layers, int) else list(layers)
    wrong = [block for block in wanted if not -depth <= block < depth]
    if not wanted or wrong:
        unit = "scale" if hasattr(backbone, "forward_pyramid") else "block"
        what = f"{unit} {wrong[0]} does not exist" if wrong else f"no {unit} is named"
        raise ConfigError(f"layers: {what}; the backbone has {depth} {unit}s (0..{depth - 1}, or -1 for the last)")
    if hasattr(backbone, "forward_pyramid"):
        pyramid = backbone.forward_pyramid(points)
        finest = pyramid[min(scale % depth for scale in wanted)]
        carried = [_carry(pyramid[scale], finest) for scale in wanted]
        return Tokens(torch.cat(carried, 1), finest.centers, finest.offsets)
    tokens, outputs = backbone.forward_intermediates(points, wanted, norm=True)
    return Tokens(torch.cat(outputs, 1), tokens.centers, tokens.offsets)


def _carry(tokens: Tokens, to: Tokens) -> Tensor:
    """Features of ``tokens`` at the centres of ``to``, by the 3 nearest."""
    if tokens is to:
        return tokens.feats
    return ops.three_nn_interpolate(to.centers, tokens.centers, tokens.feats, query_offsets=to.offsets, offsets=tokens.offsets)


def pool_tokens(tokens: Tokens, pooling: Pooling = "mean_max") -> Tensor:
    """Reduce the tokens of each sample to one vector.

    Args:
        tokens: ``feats [T, C]`` of ``B`` samples; each sample has at least one token.
        pooling: "mean" or "max" over the tokens, or "mean_plus_max", their sum (``[B, C]``), or "mean_max", both side by side
            (``[B, 2 C]``).

    Returns:
        ``[B, C]`` or ``[B, 2 C]``, dtype of ``feats``.
    """
    if pooling not in POOLINGS:
        raise ValueError(f"pooling must be one of {', '.join(POOLINGS)}, got {pooling!r}")
    lengths, feats = tokens.lengths, tokens.feats
    if len(tokens) and int(lengths.min()) == 0:
        raise DataError(f"pool_tokens: sample {int(lengths.argmin())} has no token; clouds must have at least one point")
    sample = torch.repeat_interleave(torch.arange(len(tokens), device=feats.device), lengths)
    parts = []
    if pooling != "max":
        total = feats.new_zeros(len(tokens), feats.shape[1]).index_add_(0, sample, feats)
        parts.append(total / lengths[:, None].to(feats.dtype))
    if pooling != "mean":
        empty = feats.new_zeros(len(tokens), feats.shape[1])
        parts.append(empty.scatter_reduce_(0, sample[:, None].expand_as(feats), feats, "amax", include_self=False))
    return sum(parts) if pooling == "mean_plus_max" else torch.cat(parts, 1)  # type: ignore[return-value]


def device_of(module: nn.Module) -> torch.device:
    """Return the device of the first parameter (or buffer) of ``module``; the CPU if it has none."""
    for tensor in (*module.parameters(), *module.buffers()):
        return tensor.device
    return torch.device("cpu")


def load_points(dataset: Any, rows: Sequence[int] | np.ndarray, points: int | None, in_channels: int) -> PackedPoints:
    """Read ``rows`` of ``dataset`` in their deterministic form, packed.

    Args:
        dataset: A geossl data set (``get(row, None)``).
        rows: Rows to read.
        points: Keep the first so many points of each cloud (data sets store farthest-point order, so a prefix is an even
            subsample); None keeps all.
        in_channels: Columns the backbone takes.

    Raises:
        DataError: a cloud is empty, has NaN rows, or other columns than the backbone takes.
    """
    clouds = []
    for row in rows:
        cloud = np.asarray(dataset.get(int(row), None).points)[:points]
        if len(cloud) == 0:
            raise DataError(f"row {row} of the data set is an empty cloud")
        if cloud.shape[1] != in_channels:
            raise DataError(
                f"row {row} of the data set has {cloud.shape[1]} columns but the backbone takes {in_channels}; "
                "set the data set's columns to those the backbone was trained with"
            )
        if not np.isfinite(cloud).all():
            raise DataError(f"row {row} of the data set holds NaN or infinity; clean the data with tools/prepare_data.py")
        clouds.append(torch.from_numpy(np.ascontiguousarray(cloud, dtype=np.float32)))
    return pack(clouds)


def pack(clouds: Sequence[Tensor]) -> PackedPoints:
    """Pack clouds ``[n_i, 3 + C]`` of different sizes; columns beyond the third become ``feats``."""
    rows = torch.cat(list(clouds))
    lengths = torch.tensor([len(cloud) for cloud in clouds])
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    return PackedPoints(rows[:, :3].contiguous(), offsets, rows[:, 3:].contiguous() if rows.shape[1] > 3 else None)


def embed(
    backbone: nn.Module,
    dataset: Any,
    *,
    layers: int | Sequence[int] | None = None,
    pooling: Pooling = "mean_max",
    points: int | None = None,
    batch_size: int = 32,
    rows: Sequence[int] | np.ndarray | None = None,
) -> np.ndarray:
    """Embed every cloud of ``dataset`` with the frozen ``backbone``: evaluation mode, no gradient, no augmentation.

    Args:
        backbone: The encoder; its training mode is put back afterwards.
        dataset: A geossl data set.
        layers: See :func:`read_tokens`.
        pooling: See :func:`pool_tokens`.
        points: Points per cloud, a prefix of the stored farthest-point order; None for all.
        batch_size: Clouds per forward pass. Does not change the result beyond rounding.
        rows: Rows to embed; None for all.

    Returns:
        ``[n, D]`` float32.
    """
    rows = range(len(dataset)) if rows is None else rows
    device = device_of(backbone)
    vectors = []
    with frozen(backbone):
        for start in range(0, len(rows), batch_size):
            batch = load_points(dataset, rows[start : start + batch_size], points, backbone.in_channels)  # type: ignore[arg-type]
            vectors.append(pool_tokens(read_tokens(backbone, batch.to(device), layers), pooling).float().cpu())
    if not vectors:
        raise DataError("embed: the data set is empty")
    return torch.cat(vectors).numpy()
