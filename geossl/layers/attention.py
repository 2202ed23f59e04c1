"""Attention over packed sequences: one function for every device, dtype and length, and the multi-head layer around it."""

from __future__ import annotations

import itertools
from collections import defaultdict
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Segments:
    """Lengths of the samples in a packed sequence, known on the host so that no device has to be asked.

    Args:
        lengths: Rows of each sample, in order; their sum is the number of rows of the packed tensor.
    """

    lengths: tuple[int, ...]

    @classmethod
    def from_offsets(cls, offsets: Tensor) -> Segments:
        """Read the lengths out of ``offsets [B + 1]`` (one device synchronisation)."""
        return cls(tuple(offsets.diff().tolist()))

    @property
    def uniform(self) -> int | None:
        """The common length when all samples have the same one, else None."""
        return self.lengths[0] if len(set(self.lengths)) == 1 else None

    def offsets(self, device: torch.device | str = "cpu") -> Tensor:
        """``[B + 1]`` int64."""
        return torch.tensor([0, *itertools.accumulate(self.lengths)], dtype=torch.int64, device=device)

    def repeat(self, per_sample: Tensor) -> Tensor:
        """Give every row its sample's entry: ``[B, ...] -> [rows, ...]``."""
        if self.uniform is not None:
            return per_sample.repeat_interleave(self.uniform, dim=0)
        return per_sample.repeat_interleave(torch.tensor(self.lengths, device=per_sample.device), dim=0)


def scaled_dot_product(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Softmax attention in whichever exact form is quicker here.

    ``scaled_dot_product_attention`` on a GPU and for long sequences. On the CPU the fused kernel loses to a materialised softmax
    in bfloat16 (2 to 4 times up to 1,024 keys) and for the shortest float32 sequences, so those take the plain form.

    Args:
        query: ``[B, H, Lq, D]``.
        key: ``[B, H, Lk, D]``, same dtype and device.
        value: ``[B, H, Lk, D]``.

    Returns:
        ``[B, H, Lq, D]``; differentiable in all three.
    """
    materialise = query.device.type == "cpu" and (key.shape[2] <= 32 or (query.dtype == torch.bfloat16 and key.shape[2] <= 1024))
    if not materialise:
        return F.scaled_dot_product_attention(query, key, value)
    scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2)
    return scores.softmax(-1) @ value


def packed_attention(query: Tensor, key: Tensor, value: Tensor, query_segments: Segments, key_segments: Segments) -> Tensor:
    """Attention in which every sample sees only itself.

    Samples of equal lengths run together, so nothing is padded and no mask is built.

    Args:
        query: ``[Tq, H, D]`` packed by ``query_segments``.
        key: ``[Tk, H, D]`` packed by ``key_segments``.
        value: ``[Tk, H, D]``.
        query_segments: Query rows of each sample.
        key_segments: Key rows of each sample, as many samples.

    Returns:
        ``[Tq, H * D]``.
    """
    heads, channels = query.shape[1:]
    count = len(query_segments.lengths)
    if query_segments.uniform is not None and key_segments.uniform is not None:
        q, k, v = (
            x.view(count, n, heads, channels).transpose(1, 2)
            for x, n in ((query, query_segments.uniform), (key, key_segments.uniform), (value, key_segments.uniform))
        )
        return scaled_dot_product(q, k, v).transpose(1, 2).reshape(query.shape[0], heads * channels)

    buckets: dict[tuple[int, int], list[int]] = defaultdict(list)
    for sample, sizes in enumerate(zip(query_segments.lengths, key_segments.lengths, strict=True)):
        buckets[sizes].append(sample)
    query_start, key_start = query_segments.offsets(query.device), key_segments.offsets(query.device)
    rows, pieces = [], []
    for (query_length, key_length), samples in buckets.items():
        which = torch.tensor(samples, device=query.device)
        query_rows = (query_start[which, None] + torch.arange(query_length, device=query.device)).flatten()
        key_rows = (key_start[which, None] + torch.arange(key_length, device=query.device)).flatten()
        same = Segments((query_length,) * len(samples)), Segments((key_length,) * len(samples))
        rows.append(query_rows)
        if key_length:
            pieces.append(packed_attention(query[query_rows], key[key_rows], value[key_rows], *same))
        else:
            pieces.append(query.new_zeros(query_rows.shape[0], heads * channels))
    order = torch.cat(rows).argsort()
    return torch.cat(pieces)[order]


class Attention(nn.Module):
    """Multi-head self-attention over packed sequences (Vaswani et al., 2017), as in ViT.

    Args:
        dim: Channels, a multiple of ``heads``.
        heads: Attention heads.
        qkv_bias: Whether the joint query/key/value projection has a bias.
    """

    def __init__(self, dim: int, heads: int, *, qkv_bias: bool = False) -> None:
        super().__init__()
        if dim % heads:
            raise ValueError(f"Attention: dim must be a multiple of heads, got dim={dim}, heads={heads}")
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, segments: Segments, *, rows: Tensor | None = None, row_segments: Segments | None = None) -> Tensor:
        """Attend within each sample.

        Args:
            x: ``[T, C]`` packed by ``segments``.
            segments: Rows of each sample.
            rows: Rows of ``x`` whose output is wanted, ``[R]`` ascending int64; None means all. Keys and values always come
                from all rows.
            row_segments: How many of ``rows`` belong to each sample; needed with ``rows``.

        Returns:
            ``[T, C]``, or ``[R, C]`` with ``rows``.
        """
        dim = x.shape[1]
        if rows is None or row_segments is None:
            q, k, v = self.qkv(x).view(-1, 3, self.heads, dim // self.heads).unbind(1)
            return self.proj(packed_attention(q, k, v, segments, segments))
        bias = self.qkv.bias
        q = F.linear(x[rows], self.qkv.weight[:dim], None if bias is None else bias[:dim])
        kv = F.linear(x, self.qkv.weight[dim:], None if bias is None else bias[dim:])
        k, v = kv.view(-1, 2, self.heads, dim // self.heads).unbind(1)
        return self.proj(packed_attention(q.view(-1, self.heads, dim // self.heads), k, v, row_segments, segments))
