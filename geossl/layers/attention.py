"""Attention over packed sequences: one function for every device, dtype and length, and the multi-head layer around it."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from geossl.ops import rope_2d

MOST_CALLS = 4
"""Calls of attention, one for each run of equal lengths, above which a GPU takes padded samples instead."""


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

    def count(self, chosen: Tensor) -> Segments:
        """Rows of each sample that are True in ``chosen [rows]`` (one device synchronisation)."""
        parts = [part.sum() for part in chosen.split(list(self.lengths))]
        return Segments(tuple(torch.stack(parts).tolist()) if parts else ())

    def repeat(self, per_sample: Tensor) -> Tensor:
        """Give every row its sample's entry: ``[B, ...] -> [rows, ...]``."""
        if self.uniform is not None:
            return per_sample.repeat_interleave(self.uniform, dim=0)
        return per_sample.repeat_interleave(torch.tensor(self.lengths, device=per_sample.device), dim=0)


def scaled_dot_product(query: Tensor, key: Tensor, value: Tensor, *, mask: Tensor | None = None, dropout: float = 0.0) -> Tensor:
    """Softmax attention in whichever exact form is quicker here.

    ``scaled_dot_product_attention`` on a GPU and for long sequences. On the CPU the fused kernel loses to a materialised softmax
    in bfloat16 (2 to 4 times up to 1,024 keys) and for the shortest float32 sequences, and has no dropout; those take the plain form.

    Args:
        query: ``[B, H, Lq, D]``.
        key: ``[B, H, Lk, D]``, same dtype and device.
        value: ``[B, H, Lk, D]``.
        mask: True where a query may look, bool, broadcast to ``[B, H, Lq, Lk]``; every query needs such a key. None: everywhere.
        dropout: Share of the weights that are dropped after the softmax, the others scaled by ``1 / (1 - dropout)``. Drawn from torch's
            global generator.

    Returns:
        ``[B, H, Lq, D]``; differentiable in all three.
    """
    materialise = query.device.type == "cpu" and (
        dropout > 0 or key.shape[2] <= 32 or (query.dtype == torch.bfloat16 and key.shape[2] <= 1024)
    )
    if not materialise:
        return F.scaled_dot_product_attention(query, key, value, mask, dropout)
    scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    weights = scores.softmax(-1)
    return (F.dropout(weights, dropout) if dropout else weights) @ value


def packed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_segments: Segments,
    key_segments: Segments,
    *,
    masks: Sequence[Tensor] | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Attention in which every sample sees only itself.

    Samples of equal lengths that follow each other run together, so nothing is padded and no mask is built. Runs of different lengths are
    taken one after the other; a GPU, for which more than a few would be many small calls, then takes all padded and masked.

    Args:
        query: ``[Tq, H, D]`` packed by ``query_segments``.
        key: ``[Tk, H, D]`` packed by ``key_segments``.
        value: ``[Tk, H, D]``.
        query_segments: Query rows of each sample.
        key_segments: Key rows of each sample, as many samples.
        masks: For each sample True where a query may look, bool ``[its queries, its keys]``; every query needs such a key. None means
            everywhere.
        dropout: See :func:`scaled_dot_product`.

    Returns:
        ``[Tq, H * D]``; zeros for a sample without keys.
    """
    width = query.shape[1] * query.shape[2]
    sizes = list(zip(query_segments.lengths, key_segments.lengths, strict=True))
    runs = [(*size, len(list(same))) for size, same in itertools.groupby(sizes)]
    if len(runs) > MOST_CALLS and query.device.type != "cpu":
        return padded_attention(query, key, value, query_segments, key_segments, masks=masks, dropout=dropout)
    queries = query.split([asked * samples for asked, _, samples in runs])
    keys, values = (x.split([seen * samples for _, seen, samples in runs]) for x in (key, value))
    outputs, first = [], 0
    for (asked, seen, samples), *parts in zip(runs, queries, keys, values, strict=True):
        mask = None if masks is None else torch.stack(list(masks[first : first + samples]))[:, None]
        first += samples
        if asked == 0 or seen == 0:
            outputs.append(query.new_zeros(asked * samples, width))
            continue
        q, k, v = (x.view(samples, -1, *query.shape[1:]).transpose(1, 2) for x in parts)
        outputs.append(scaled_dot_product(q, k, v, mask=mask, dropout=dropout).transpose(1, 2).reshape(-1, width))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs) if outputs else query.new_zeros(0, width)


def padded_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_segments: Segments,
    key_segments: Segments,
    *,
    masks: Sequence[Tensor] | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """:func:`packed_attention` in one call over padded samples, the keys that are padding masked."""
    samples = len(query_segments.lengths)
    padded, real_rows = [], []
    for x, segments in ((query, query_segments), (key, key_segments), (value, key_segments)):
        lengths = torch.tensor(segments.lengths, device=x.device)
        real = torch.arange(max(segments.lengths), device=x.device) < lengths[:, None]
        padded.append(x.new_zeros(samples, real.shape[1], *x.shape[1:]).masked_scatter(real[..., None, None], x).transpose(1, 2))
        real_rows.append(real)
    asked, seen = real_rows[0], real_rows[1]
    # A sample without keys looks at its padding, which is zeros.
    visible = (seen | ~seen.any(1, keepdim=True))[:, None, None]
    if masks is not None:
        visible = (~asked)[:, None, :, None].repeat(1, 1, 1, seen.shape[1])  # a query that is padding may look anywhere
        for sample, mask in enumerate(masks):
            visible[sample, 0, : mask.shape[0], : mask.shape[1]] = mask
    return scaled_dot_product(*padded, mask=visible, dropout=dropout).transpose(1, 2)[asked].flatten(1)


def _softmax_weights(query: Tensor, key: Tensor, query_segments: Segments, key_segments: Segments) -> list[Tensor]:
    """What :func:`packed_attention` mixes the values of each sample by, ``[H, n, m]``."""
    queries, keys = query.split(list(query_segments.lengths)), key.split(list(key_segments.lengths))
    return [(q.transpose(0, 1) * q.shape[-1] ** -0.5 @ k.permute(1, 2, 0)).softmax(-1) for q, k in zip(queries, keys, strict=True)]


class Attention(nn.Module):
    """Multi-head self-attention over packed sequences (Vaswani et al., 2017), as in ViT.

    Args:
        dim: Channels, a multiple of ``heads``.
        heads: Attention heads.
        qkv_bias: Whether the joint query/key/value projection has a bias.
        dropout: Share of the attention weights that training drops, see :func:`scaled_dot_product`.
    """

    def __init__(self, dim: int, heads: int, *, qkv_bias: bool = False, dropout: float = 0.0) -> None:
        super().__init__()
        if dim % heads:
            raise ValueError(f"Attention: dim must be a multiple of heads, got dim={dim}, heads={heads}")
        self.heads = heads
        self.dropout = dropout
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def forward(
        self,
        x: Tensor,
        segments: Segments,
        *,
        rows: Tensor | None = None,
        row_segments: Segments | None = None,
        masks: Sequence[Tensor] | None = None,
        rope: Tensor | None = None,
    ) -> Tensor:
        """Attend within each sample.

        Args:
            x: ``[T, C]`` packed by ``segments``.
            segments: Rows of each sample.
            rows: Rows of ``x`` whose output is wanted, ``[R]`` ascending int64; None means all. Keys and values always come
                from all rows.
            row_segments: How many of ``rows`` belong to each sample; needed with ``rows``.
            masks: Where a query may look, see :func:`packed_attention`; with ``rows``, a row of each mask for each of them.
            rope: Rotations of queries and keys by their positions, see :func:`geossl.ops.rope_2d`: a row for each of the ``T`` tokens, or
                for each cell of a grid that the tokens fill over and over. None: no positions.

        Returns:
            ``[T, C]``, or ``[R, C]`` with ``rows``.
        """
        dim, width = x.shape[1], x.shape[1] // self.heads
        dropout = self.dropout if self.training else 0.0
        if rows is None or row_segments is None:
            qkv = self.qkv(x).view(-1, 3 * self.heads, width)
            if rope is None:
                q, k, v = qkv.unflatten(1, (3, self.heads)).unbind(1)
            else:
                moved, v = qkv.split([2 * self.heads, self.heads], 1)
                q, k = rope_2d(moved, rope).unflatten(1, (2, self.heads)).unbind(1)
            return self.proj(packed_attention(q, k, v, segments, segments, masks=masks, dropout=dropout))
        bias = self.qkv.bias
        q = F.linear(x.index_select(0, rows), self.qkv.weight[:dim], None if bias is None else bias[:dim]).view(-1, self.heads, width)
        kv = F.linear(x, self.qkv.weight[dim:], None if bias is None else bias[dim:])
        k, v = kv.view(-1, 2, self.heads, width).unbind(1)
        if rope is not None:
            q, k = rope_2d(q, rope.index_select(0, rows % rope.shape[0])), rope_2d(k, rope)
        return self.proj(packed_attention(q, k, v, row_segments, segments, masks=masks, dropout=dropout))

    def weights(self, x: Tensor, segments: Segments) -> list[Tensor]:
        """The softmax weights of each sample's tokens (queries) over its tokens (keys), ``[H, n, n]`` float32, rows summing to 1."""
        q, k, _ = self.qkv(x).view(-1, 3, self.heads, x.shape[1] // self.heads).float().unbind(1)
        return _softmax_weights(q, k, segments, segments)


class CrossAttention(nn.Module):
    """Multi-head attention of packed sequences to others, sample by sample.

    Args:
        dim: Channels of both, a multiple of ``heads``.
        heads: Attention heads.
        qkv_bias: Whether the projections to queries, keys and values have a bias.
    """

    def __init__(self, dim: int, heads: int, *, qkv_bias: bool = False) -> None:
        super().__init__()
        if dim % heads:
            raise ValueError(f"CrossAttention: dim must be a multiple of heads, got dim={dim}, heads={heads}")
        self.heads = heads
        self.q = nn.Linear(dim, dim, bias=qkv_bias)
        self.kv = nn.Linear(dim, 2 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def forward(
        self,
        x: Tensor,
        memory: Tensor,
        segments: Segments,
        memory_segments: Segments,
        *,
        rope: Tensor | None = None,
        memory_rope: Tensor | None = None,
    ) -> Tensor:
        """Let every token of a sample look at all memory tokens of the same sample.

        Args:
            x: Queries ``[T, C]`` packed by ``segments``.
            memory: What is looked at, ``[M, C]`` packed by ``memory_segments``, as many samples.
            segments: Rows of ``x`` of each sample.
            memory_segments: Rows of ``memory`` of each sample.
            rope: Rotations of the queries by their positions, see :class:`Attention`; None: no positions.
            memory_rope: Rotations of the keys; needed with ``rope``.

        Returns:
            ``[T, C]``.
        """
        q = self.q(x).view(-1, self.heads, x.shape[1] // self.heads)
        k, v = self.kv(memory).view(-1, 2, self.heads, memory.shape[1] // self.heads).unbind(1)
        q, k = _rotate_both(q, k, rope, memory_rope)
        return self.proj(packed_attention(q, k, v, segments, memory_segments))

    def weights(
        self,
        x: Tensor,
        memory: Tensor,
        segments: Segments,
        memory_segments: Segments,
        *,
        rope: Tensor | None = None,
        memory_rope: Tensor | None = None,
    ) -> list[Tensor]:
        """The softmax weights of each sample's tokens over its memory, ``[H, n, m]`` float32, rows summing to 1; see :meth:`forward`."""
        q = self.q(x).view(-1, self.heads, x.shape[1] // self.heads).float()
        k = self.kv(memory)[:, : memory.shape[1]].view(-1, self.heads, memory.shape[1] // self.heads).float()
        q, k = _rotate_both(q, k, rope, memory_rope)
        return _softmax_weights(q, k, segments, memory_segments)


def _rotate_both(q: Tensor, k: Tensor, rope: Tensor | None, memory_rope: Tensor | None) -> tuple[Tensor, Tensor]:
    """Rotate queries and keys by their positions, if there are any."""
    if rope is None and memory_rope is None:
        return q, k
    if rope is None or memory_rope is None:
        raise ValueError("CrossAttention: give both rope and memory_rope, or none of them: positions of one side alone mean nothing")
    return rope_2d(q, rope), rope_2d(k, memory_rope)
