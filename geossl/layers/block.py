"""The transformer block all backbones and decoders are made of, and a stack of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from geossl.errors import unknown_name
from geossl.layers.attention import Attention, CrossAttention, Segments
from geossl.layers.norm import make_norm
from geossl.layers.sampling import BatchRandom


class Mlp(nn.Module):
    """Two linear layers with exact GELU between them."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.act: nn.Module = nn.GELU()
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        """``[T, C] -> [T, C]``."""
        return self.fc2(self.act(self.fc1(x)))


class Kept(NamedTuple):
    """The tokens whose residual branch is not dropped, when each token draws for itself."""

    rows: Tensor  # their numbers, [n] ascending int64
    segments: Segments  # how many there are in each sample
    scale: float  # 1 / (1 - rate)


class Block(nn.Module):
    """Pre-norm transformer block: ``x += attention(norm(x)); x += mlp(norm(x))``, over packed sequences.

    Args:
        dim: Channels.
        heads: Attention heads.
        mlp_ratio: Hidden width of the MLP over ``dim``.
        qkv_bias: Bias of the query/key/value projection.
        norm: "layer" or "batchwide", see :func:`geossl.layers.norm.make_norm`.
        norm_eps: Added to the variance in "layer" norms.
        attention_dropout: Share of the attention weights that training drops.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = False,
        norm: str = "layer",
        norm_eps: float = 1e-5,
        attention_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.norm1 = make_norm(norm, dim, norm_eps)
        self.attn = Attention(dim, heads, qkv_bias=qkv_bias, dropout=attention_dropout)
        self.norm2 = make_norm(norm, dim, norm_eps)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))

    def forward(
        self,
        x: Tensor,
        segments: Segments,
        rows: Tensor | None = None,
        row_segments: Segments | None = None,
        keep: Tensor | tuple[Kept, Kept] | None = None,
        masks: Sequence[Tensor] | None = None,
        rope: Tensor | None = None,
    ) -> Tensor:
        """Transform packed tokens.

        Args:
            x: ``[T, C]`` packed by ``segments``.
            segments: Rows of each sample.
            rows: When only some rows are read afterwards, their numbers ``[R]`` (ascending); the others still serve as keys and
                values, but their own output is not computed. Not with ``norm="batchwide"``, whose second norm reads all of them.
            row_segments: How many of ``rows`` each sample has.
            keep: Stochastic depth. A multiplier of the attention and the MLP branch of each sample, ``[B, 2]``: 0 drops a branch. Or the
                tokens that keep each branch, numbered within ``rows`` where given: the others take no part in projections and MLP.
            masks: For each sample True where a query may look, bool ``[its rows, its rows]``; None: everywhere. Not with ``rows`` or with
                tokens in ``keep``.
            rope: Rotations of queries and keys by their positions, see :class:`~geossl.layers.attention.Attention`; None: none.

        Returns:
            ``[T, C]``, or ``[R, C]`` with ``rows``.
        """
        if masks is not None and (rows is not None or isinstance(keep, tuple)):
            raise ValueError("Block: masks have a row for every token; give them without rows and with drop_path_per='sample'")
        if isinstance(keep, tuple):
            return self._forward_kept(x, segments, rows, *keep, rope)
        attended = self.attn(self.norm1(x), segments, rows=rows, row_segments=row_segments, masks=masks, rope=rope)
        if rows is not None and row_segments is not None:
            x, segments = x.index_select(0, rows), row_segments
        if keep is None:
            x = x + attended
            return x + self.mlp(self.norm2(x))
        keep = segments.repeat(keep)
        x = x + attended * keep[:, :1]
        return x + self.mlp(self.norm2(x)) * keep[:, 1:]

    def _forward_kept(self, x: Tensor, segments: Segments, rows: Tensor | None, first: Kept, second: Kept, rope: Tensor | None) -> Tensor:
        asking = first.rows if rows is None else rows[first.rows]
        attended = self.attn(self.norm1(x), segments, rows=asking, row_segments=first.segments, rope=rope)
        if rows is not None:
            x = x[rows]
        x = x.index_add(0, first.rows, attended.to(x.dtype), alpha=first.scale)
        changed = self.mlp(self.norm2(x)[second.rows])
        return x.index_add(0, second.rows, changed.to(x.dtype), alpha=second.scale)


class CrossBlock(nn.Module):
    """Pre-norm decoder block: ``x += attention(norm(x)); x += cross_attention(norm(x), norm(memory)); x += mlp(norm(x))``.

    The memory itself stays what it is. Over packed sequences.

    Args:
        dim: Channels of tokens and memory.
        heads: Attention heads of both attentions.
        mlp_ratio: Hidden width of the MLP over ``dim``.
        norm_eps: Added to the variance in the norms.
        norm_memory: Whether the memory is normalised; False takes it as it comes.
    """

    def __init__(self, dim: int, heads: int, *, mlp_ratio: float = 4.0, norm_eps: float = 1e-5, norm_memory: bool = True) -> None:
        super().__init__()
        self.norm1 = make_norm("layer", dim, norm_eps)
        self.attn = Attention(dim, heads, qkv_bias=True)
        self.norm2 = make_norm("layer", dim, norm_eps)
        self.norm_memory = make_norm("layer", dim, norm_eps) if norm_memory else nn.Identity()
        self.cross_attn = CrossAttention(dim, heads, qkv_bias=True)
        self.norm3 = make_norm("layer", dim, norm_eps)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))

    def forward(
        self,
        x: Tensor,
        memory: Tensor | None,
        segments: Segments,
        memory_segments: Segments,
        rows: Tensor | None = None,
        row_segments: Segments | None = None,
        rope: Tensor | None = None,
        memory_rope: Tensor | None = None,
    ) -> Tensor:
        """Transform packed tokens.

        Args:
            x: ``[T, C]`` packed by ``segments``.
            memory: ``[M, C]`` packed by ``memory_segments``, as many samples. None leaves the cross-attention out.
            segments: Rows of each sample.
            memory_segments: Rows of the memory of each sample.
            rows: Rows whose output is wanted, see :class:`Block`.
            row_segments: How many of ``rows`` each sample has.
            rope: Rotations of the tokens, see :class:`~geossl.layers.attention.Attention`; None: none.
            memory_rope: Rotations of the memory; needed with ``rope``.

        Returns:
            ``[T, C]``, or ``[R, C]`` with ``rows``.
        """
        attended = self.attn(self.norm1(x), segments, rows=rows, row_segments=row_segments, rope=rope)
        if rows is not None and row_segments is not None:
            x, segments = x.index_select(0, rows), row_segments
            rope = None if rope is None else rope.index_select(0, rows % rope.shape[0])
        x = x + attended
        if memory is not None:
            x = x + self.cross_attn(self.norm2(x), self.norm_memory(memory), segments, memory_segments, rope=rope, memory_rope=memory_rope)
        return x + self.mlp(self.norm3(x))


def run_block(block: nn.Module, checkpointing: bool, *args: Any, **kwargs: Any) -> Tensor:
    """``block(*args, **kwargs)``; with ``checkpointing``, what is computed inside is not kept but computed again in the backward pass."""
    if checkpointing and torch.is_grad_enabled():
        return checkpoint(block, *args, use_reentrant=False, **kwargs)
    return block(*args, **kwargs)


class BlockStack(nn.Module):
    """Blocks applied in turn, the position code added again before each one (as Point-BERT, Point-MAE and PoLAr-MAE do).

    Args:
        dim: Channels.
        depth: Number of blocks.
        heads: Attention heads.
        mlp_ratio: Hidden width of the MLPs over ``dim``.
        qkv_bias: Bias of the query/key/value projections.
        norm: "layer" or "batchwide", see :func:`geossl.layers.norm.make_norm`.
        attention_dropout: Share of the attention weights that training drops.
        drop_path: Probability of dropping a residual branch of the last block in training (stochastic depth, Huang et al., 2016); it
            grows linearly from 0 at the first block, and kept branches are scaled by ``1 / (1 - rate)``. Or the rate of every block.
        drop_path_per: What a branch is dropped for: a whole "sample", or each "token" for itself (PoLAr-MAE).
    """

    def __init__(
        self,
        dim: int,
        depth: int,
        heads: int,
        *,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = False,
        norm: str = "layer",
        attention_dropout: float = 0.0,
        drop_path: float | Sequence[float] = 0.0,
        drop_path_per: Literal["sample", "token"] = "sample",
    ) -> None:
        super().__init__()
        if drop_path_per not in ("sample", "token"):
            raise unknown_name("drop_path_per", drop_path_per, ("sample", "token"))
        rates = torch.linspace(0, drop_path, depth).tolist() if isinstance(drop_path, (int, float)) else list(drop_path)
        if len(rates) != depth:
            raise ValueError(f"BlockStack: drop_path must be one number or one for each of the {depth} blocks, got {len(rates)}")
        self.drop_path_rates = rates
        self.drop_path_per = drop_path_per
        self.reads_all_rows = norm == "batchwide"
        self.blocks = nn.ModuleList(
            Block(dim, heads, mlp_ratio=mlp_ratio, qkv_bias=qkv_bias, norm=norm, attention_dropout=attention_dropout) for _ in rates
        )
        self.grad_checkpointing = False

    def __len__(self) -> int:
        return len(self.blocks)

    def forward(
        self,
        x: Tensor,
        position: Tensor,
        segments: Segments,
        *,
        random: BatchRandom | None = None,
        rows: Tensor | None = None,
        row_segments: Segments | None = None,
        masks: Sequence[Tensor] | None = None,
        intermediates: list[Tensor] | None = None,
    ) -> Tensor:
        """Run all blocks.

        Args:
            x: Tokens ``[T, C]``, packed by ``segments``.
            position: Position code of every token, ``[T, C]``.
            segments: Rows of each sample.
            random: Source of the drop-path draws in training; None draws from torch's global generator.
            rows: Rows read from the last block's output (see :class:`Block`).
            row_segments: How many of ``rows`` each sample has.
            masks: For each sample True where a query may look, bool ``[its rows, its rows]``; None: everywhere. Not with ``rows``.
            intermediates: When given, the output of every block is appended to it.

        Returns:
            ``[T, C]`` (or ``[R, C]``) after the last block, not normalised.
        """
        select, last = None, len(self.blocks) - 1
        if self.reads_all_rows:
            select, rows, row_segments = rows, None, None
        keeps = self._draw_drop_path(segments, random, x.device, rows, row_segments)
        for i, block in enumerate(self.blocks):
            only = (rows, row_segments) if i == last else (None, None)
            x = run_block(block, self.grad_checkpointing, x + position, segments, *only, keeps[i], masks)
            if intermediates is not None:
                intermediates.append(x)
        return x if select is None else x[select]

    def _draw_drop_path(
        self,
        segments: Segments,
        random: BatchRandom | None,
        device: torch.device,
        rows: Tensor | None = None,
        row_segments: Segments | None = None,
    ) -> list[Any]:
        """The argument ``keep`` of each block in this pass; None where nothing can be dropped."""
        rates = self.drop_path_rates
        if not self.training or not any(rates):
            return [None] * len(rates)
        random = random or BatchRandom(len(segments.lengths))
        if self.drop_path_per == "sample":
            noise = random.rand(len(rates), 2, device=device)
            return [(noise[:, i] >= rate).float() / (1 - rate) if rate else None for i, rate in enumerate(rates)]
        noise = random.rows(segments.lengths, len(rates), 2)  # on the host, where the lengths are wanted
        keeps: list[Any] = [None] * len(rates)
        for i, rate in enumerate(rates):
            if rate:
                keep, groups = noise[:, i] >= rate, segments
                if rows is not None and row_segments is not None and i == len(rates) - 1:
                    keep, groups = keep[rows.cpu()], row_segments
                keeps[i] = tuple(_kept(keep[:, branch], groups, 1 / (1 - rate), device) for branch in range(2))
        return keeps


def _kept(keep: Tensor, segments: Segments, scale: float, device: torch.device) -> Kept:
    return Kept(keep.nonzero()[:, 0].to(device, non_blocking=True), segments.count(keep), scale)


def init_transformer_weights(module: nn.Module) -> None:
    """Initialise as ViT and Point-MAE do: weights truncated normal (std 0.02), biases 0, LayerNorm 1 and 0. Use with ``apply``."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.LayerNorm):
        nn.init.ones_(module.weight)
        nn.init.zeros_(module.bias)
