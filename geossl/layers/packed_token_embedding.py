"""Token embedding of groups with different numbers of points: the mini-PointNet of PoLAr-MAE, on packed points only.

The definition is :meth:`PackedTokenEmbedding.reference`, plain torch; training and evaluation run the same numbers and gradients through
:mod:`geossl.layers.fast_token_embedding`.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from geossl.layers.fast_token_embedding import Extras, Groups, embed_evaluation, embed_training
from geossl.layers.norm import BatchNorm, world_size
from geossl.ops import batch_from_offsets, segment_reduce


class PackedTokenEmbedding(nn.Module):
    """One token per group of up to ``slots`` points, whose number may differ: a small PointNet with a maximum over the group.

    The network of :class:`geossl.layers.PointTokenEmbedding` without the biases that its batch normalisations cancel. It always computes
    in the type of its weights, as published, whatever autocast says.

    Args:
        dim: Channels of a token.
        in_channels: Columns of a point: 3 relative coordinates and any further features.
        widths: Hidden channels after the first, second and third layer.
        slots: Most points that a group can have.
        empty_slots: Compute what the published PoLAr-MAE computes: there the slots that a group leaves empty take part in both maxima,
            each with one constant row (the bias of the batch normalisation before, passed through the next layers). False: a group is
            its points. Needed for official checkpoints.
        slot_embedding: Add a learned code of its slot number to every point before the first maximum (the energy branch of PoLAr-MAE,
            which has to tell the points of a group apart). Needs an even ``widths[1]``.
    """

    slot_code: Tensor

    def __init__(
        self,
        dim: int,
        in_channels: int,
        *,
        widths: tuple[int, int, int] = (128, 256, 512),
        slots: int = 32,
        empty_slots: bool,
        slot_embedding: bool = False,
    ) -> None:
        super().__init__()
        if slots < 1:
            raise ValueError(f"PackedTokenEmbedding: slots must be at least 1, got {slots}")
        first, second, third = widths
        self.slots, self.empty_slots = slots, empty_slots
        self.conv1 = nn.Linear(in_channels, first, bias=False)
        self.norm1 = BatchNorm(first, biased_running_var=True)
        self.conv2 = nn.Linear(first, second)
        self.conv3 = nn.Linear(2 * second, third, bias=False)
        self.norm2 = BatchNorm(third, biased_running_var=True)
        self.conv4 = nn.Linear(third, dim)
        self.slot_linear: nn.Linear | None = None
        if slot_embedding:
            if second % 2 or second < 4:
                raise ValueError(f"PackedTokenEmbedding: slot_embedding needs an even widths[1] of at least 4, got widths={widths}")
            self.slot_linear = nn.Linear(second, second)
            frequency = torch.exp(torch.arange(second // 2, dtype=torch.float32) * (-math.log(10000.0) / (second // 2 - 1)))
            angle = torch.arange(slots, dtype=torch.float32)[:, None] * frequency
            self.register_buffer("slot_code", torch.cat([angle.sin(), angle.cos()], dim=1), persistent=False)

    def forward(self, points: Tensor, row_splits: Tensor, keep: Tensor | None = None) -> Tensor:
        """Embed groups.

        Args:
            points: Points of all groups in turn, ``[S, in_channels]``, positions relative to the group's centre, in the order of slots.
                When several processes train together, each needs points: one without is refused.
            row_splits: Group g is the rows ``row_splits[g]:row_splits[g + 1]``, ``[G + 1]`` int64. At most ``slots`` rows.
            keep: Numbers of the groups whose token is wanted, ``[T]`` int64, none twice; None means all. The others only enter the batch
                statistics in training, and cost nothing in evaluation.

        Returns:
            ``[T, dim]``; zeros for a group without points. Differentiable in ``points`` and all parameters.

        Raises:
            ValueError: a shape or type is wrong, or a group has more than ``slots`` points.
        """
        smallest = self._check(points, row_splits, keep)
        count = row_splits.diff()
        kept = count if keep is None else count[keep]
        if points.shape[0] == 0:
            if self.training and world_size() > 1:  # the others wait for its part of the batch statistics
                raise ValueError(
                    "PackedTokenEmbedding: this process has no points, but batch statistics are summed over all processes; "
                    "train on larger events (min_points) or with more of them in a batch"
                )
            return points.new_zeros(kept.shape[0], self.conv4.out_features)
        if smallest == 0:
            return self._skip_empty_groups(points, row_splits, keep)
        with torch.autocast(points.device.type, enabled=False):
            code, groups = self._slot_codes(), Groups(row_splits)
            if self.training:
                extras = Extras(code, self._least_shared(count, code), self._least_token(kept))
                return embed_training(self, points, groups, keep, points.dtype, extras)
            groups, rows = groups.select(keep)
            extras = Extras(code, self._least_shared(kept, code), self._least_token(kept))
            return embed_evaluation(self, points if rows is None else points[rows], groups, points.dtype, extras)

    def reference(self, points: Tensor, row_splits: Tensor) -> Tensor:
        """The definition, in plain torch, for all groups: ``[S, in_channels], [G + 1] -> [G, dim]``. The twin of :meth:`forward`."""
        count = row_splits.diff()
        if points.shape[0] == 0:
            return points.new_zeros(count.shape[0], self.conv4.out_features)
        with torch.autocast(points.device.type, enabled=False):
            group = batch_from_offsets(row_splits, points.shape[0])
            local = self.conv2(F.relu(self.norm1(self.conv1(points))))
            code = self._slot_codes()
            if code is not None:
                local = local + code[torch.arange(points.shape[0], device=group.device) - row_splits[group]]
            shared = _maximum(local, row_splits, self._least_shared(count, code))
            x = self.conv4(F.relu(self.norm2(self.conv3(torch.cat([shared[group], local], dim=1)))))
            return torch.where(count[:, None] > 0, _maximum(x, row_splits, self._least_token(count)), 0)

    def _skip_empty_groups(self, points: Tensor, row_splits: Tensor, keep: Tensor | None) -> Tensor:
        """Embed the groups that have points; the others' tokens are zeros, and nothing else depends on them."""
        filled = row_splits.diff() > 0
        number = filled.cumsum(0) - 1  # of each group among those with points
        if keep is not None:
            filled, number = filled[keep], number[keep]
        ends = row_splits.unique_consecutive()
        return points.new_zeros(filled.shape[0], self.conv4.out_features).index_put((filled,), self(points, ends, number[filled]))

    def _slot_codes(self) -> Tensor | None:
        """Code of each slot, ``[slots, widths[1]]``."""
        return None if self.slot_linear is None else F.relu(self.slot_linear(self.slot_code))

    def _least_shared(self, count: Tensor, code: Tensor | None) -> Tensor | None:
        """What the empty slots of groups with ``count [G]`` points bring into the first maximum, ``[G, widths[1]]``; -inf if full."""
        if not self.empty_slots:
            return None
        row = self.conv2(F.relu(self.norm1.bias)).expand(self.slots, -1)
        if code is not None:  # the empty slots are the last ones: a maximum over the slots from `count` on
            row = row + code.flip(0).cummax(0).values.flip(0)
        return torch.cat([row, row.new_full((1, row.shape[1]), -torch.inf)])[count]

    def _least_token(self, count: Tensor) -> Tensor | None:
        """The same for the second maximum, ``[G, dim]``."""
        if not self.empty_slots:
            return None
        return torch.where(count[:, None] < self.slots, self.conv4(F.relu(self.norm2.bias)), -torch.inf)

    def _check(self, points: Tensor, row_splits: Tensor, keep: Tensor | None) -> int:
        """Check the arguments of :meth:`forward` and return the fewest points that a group has."""
        channels = self.conv1.in_features
        if points.dim() != 2 or points.shape[1] != channels or not points.is_floating_point():
            raise ValueError(
                f"PackedTokenEmbedding: points must be floating [S, {channels}] (the rows of all groups in turn), "
                f"got {points.dtype} {list(points.shape)}"
            )
        if row_splits.dim() != 1 or row_splits.shape[0] < 1 or row_splits.dtype != torch.int64:
            raise ValueError(
                f"PackedTokenEmbedding: row_splits must be int64 [G + 1] (0, end of group 0, ..., {points.shape[0]}), "
                f"got {row_splits.dtype} {list(row_splits.shape)}"
            )
        if keep is not None and (keep.dim() != 1 or keep.dtype != torch.int64):
            raise ValueError(
                f"PackedTokenEmbedding: keep must be the numbers of groups, int64 [T], got {keep.dtype} {list(keep.shape)}; "
                "a mask becomes numbers with mask.nonzero()[:, 0]"
            )
        fewest, most = row_splits.diff().aminmax() if row_splits.shape[0] > 1 else (row_splits[0], row_splits[0])
        first, last, fewest, most = torch.stack([row_splits[0], row_splits[-1], fewest, most]).tolist()
        if first != 0 or last != points.shape[0] or fewest < 0:
            raise ValueError(
                f"PackedTokenEmbedding: row_splits must start at 0, never decrease and end at the number of points ({points.shape[0]}); "
                f"they start at {first} and end at {last}. Make them with offsets_from_lengths of geossl.ops"
            )
        if most > self.slots:
            raise ValueError(
                f"PackedTokenEmbedding: a group has {most} points, but slots={self.slots}; group with at most that many or raise slots"
            )
        return fewest


def _maximum(x: Tensor, row_splits: Tensor, least: Tensor | None) -> Tensor:
    """Maximum of each group's rows, and of ``least`` where given; of equal values the first row gets the gradient."""
    largest = segment_reduce(x, row_splits, "max", fill=-torch.inf if least is not None else 0.0)
    return largest if least is None else torch.where(least > largest, least, largest)
