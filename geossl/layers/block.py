"""The transformer block all backbones and decoders are made of, and a stack of them."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from geossl.layers.attention import Attention, Segments
from geossl.layers.sampling import BatchRandom


class Mlp(nn.Module):
    """Two linear layers with exact GELU between them."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        """``[T, C] -> [T, C]``."""
        return self.fc2(self.act(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm transformer block: ``x += attention(norm(x)); x += mlp(norm(x))``, over packed sequences.

    Args:
        dim: Channels.
        heads: Attention heads.
        mlp_ratio: Hidden width of the MLP over ``dim``.
        qkv_bias: Bias of the query/key/value projection.
    """

    def __init__(self, dim: int, heads: int, *, mlp_ratio: float = 4.0, qkv_bias: bool = False) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = Attention(dim, heads, qkv_bias=qkv_bias)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))

    def forward(
        self,
        x: Tensor,
        segments: Segments,
        rows: Tensor | None = None,
        row_segments: Segments | None = None,
        keep: Tensor | None = None,
    ) -> Tensor:
        """Transform packed tokens.

        Args:
            x: ``[T, C]`` packed by ``segments``.
            segments: Rows of each sample.
            rows: When only some rows are read afterwards, their numbers ``[R]`` (ascending); the others still serve as keys and
                values, but their own output is not computed.
            row_segments: How many of ``rows`` each sample has.
            keep: Multiplier of the attention and the MLP branch of each sample, ``[B, 2]``: 0 drops a branch (stochastic depth).

        Returns:
            ``[T, C]``, or ``[R, C]`` with ``rows``.
        """
        attended = self.attn(self.norm1(x), segments, rows=rows, row_segments=row_segments)
        if rows is not None and row_segments is not None:
            x, segments = x[rows], row_segments
        if keep is None:
            x = x + attended
            return x + self.mlp(self.norm2(x))
        keep = segments.repeat(keep)
        x = x + attended * keep[:, :1]
        return x + self.mlp(self.norm2(x)) * keep[:, 1:]


class BlockStack(nn.Module):
    """Blocks applied in turn, the position code added again before each one (as Point-BERT and Point-MAE do).

    Args:
        dim: Channels.
        depth: Number of blocks.
        heads: Attention heads.
        mlp_ratio: Hidden width of the MLPs over ``dim``.
        drop_path: Probability of dropping a residual branch of the last block for a whole sample in training (stochastic depth,
            Huang et al., 2016); it grows linearly from 0 at the first block, and kept branches are scaled by ``1 / (1 - rate)``.
    """

    def __init__(self, dim: int, depth: int, heads: int, *, mlp_ratio: float = 4.0, drop_path: float = 0.0) -> None:
        super().__init__()
        rates = torch.linspace(0, drop_path, depth).tolist()
        self.drop_path_rates = rates
        self.blocks = nn.ModuleList(Block(dim, heads, mlp_ratio=mlp_ratio) for _ in rates)
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
            intermediates: When given, the output of every block is appended to it.

        Returns:
            ``[T, C]`` (or ``[R, C]``) after the last block, not normalised.
        """
        keeps = self._draw_drop_path(segments, random, x.device)
        for i, block in enumerate(self.blocks):
            only = (rows, row_segments) if i == len(self.blocks) - 1 else (None, None)
            if self.grad_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x + position, segments, *only, keeps[i], use_reentrant=False)
            else:
                x = block(x + position, segments, *only, keeps[i])
            if intermediates is not None:
                intermediates.append(x)
        return x

    def _draw_drop_path(self, segments: Segments, random: BatchRandom | None, device: torch.device) -> list[Tensor | None]:
        """The multipliers ``[B, 2]`` of each block in this pass; None where nothing can be dropped."""
        rates = self.drop_path_rates
        if not self.training or not any(rates):
            return [None] * len(rates)
        random = random or BatchRandom(len(segments.lengths))
        noise = random.rand(len(rates), 2, device=device)
        return [(noise[:, i] >= rate).float() / (1 - rate) if rate else None for i, rate in enumerate(rates)]


def init_transformer_weights(module: nn.Module) -> None:
    """Initialise as ViT and Point-MAE do: weights truncated normal (std 0.02), biases 0, LayerNorm 1 and 0. Use with ``apply``."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.LayerNorm):
        nn.init.ones_(module.weight)
        nn.init.zeros_(module.bias)
