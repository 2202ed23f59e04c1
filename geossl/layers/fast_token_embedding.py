"""The mini-PointNet that computes only what is read, for groups of one size or of any, with the numbers and gradients of the plain form.

See :class:`geossl.layers.token_embedding.PointTokenEmbedding` and :class:`geossl.layers.packed_token_embedding.PackedTokenEmbedding` for
the networks. What makes it quick, each step exact:

* both batch normalisations are folded into the linear layer before them (:mod:`geossl.layers.norm`), so the second half runs only
  for the groups whose token is read, while the statistics still count every group;
* the half of the third layer that acts on the group maximum runs once per group, not once per point;
* the last layer is followed by a maximum over the group, so its gradient has one entry per group and channel: the weight gradient
  is a weighted sum of rows and the input gradient a sparse product;
* passes run over chunks of groups that stay in the cache.

Names: ``hidden`` = relu(BN(conv1)) of every point; ``local`` = conv2 of every point (and the code of its slot); ``shared`` = maximum of
``local`` over a group; ``wide`` = relu(BN(conv3)) of every point of the kept groups; ``*_row`` = which row of a chunk held a maximum,
-1 where it was the value that the maximum is at least (``least_*``).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from geossl.layers.norm import Folded, Moments, fold_batchnorm, fold_batchnorm_backward, fold_running, row_moments, sum_over_ranks
from geossl.ops import batch_from_offsets, offsets_from_lengths
from geossl.ops.linear_max import linear_max_backward
from geossl.ops.segments import reduce_rows

ROWS_PER_CHUNK = 2048  # 2,048 rows of 512 float32 channels are 4 MB: elementwise passes stay in the cache


class Chunk(NamedTuple):
    """Consecutive groups and their rows."""

    groups: slice
    rows: slice
    row_splits: Tensor  # of its groups, counted from its first row

    def sum(self, x: Tensor) -> Tensor:
        """Sum of ``x [rows, C]`` over each group, ``[G, C]``."""
        return reduce_rows(x, None, self.row_splits, None, self.row_splits.shape[0] - 1, "sum")[0]

    def maximum(self, x: Tensor) -> Tensor:
        """Maximum of ``x [rows, C]`` over each group, ``[G, C]``; of equal values the first row gets the gradient."""
        return reduce_rows(x, None, self.row_splits, None, self.row_splits.shape[0] - 1, "max")[0]

    def first_maximum(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Maximum of ``x [rows, C]`` over each group and the row of its first occurrence, counted from the chunk's first."""
        value, row = reduce_rows(x, None, self.row_splits, None, self.row_splits.shape[0] - 1, "max", return_arg=True)
        assert row is not None
        return value, row


class Groups:
    """Rows cut into consecutive groups of at least one row: group g is the rows ``row_splits[g]:row_splits[g + 1]`` (``[G + 1]`` int64)."""

    def __init__(self, row_splits: Tensor) -> None:
        self.row_splits, self.count = row_splits, row_splits.diff()
        # Groups whose last rows lie in the same stretch of ROWS_PER_CHUNK rows are a chunk.
        group_ends = ((row_splits[1:] - 1) // ROWS_PER_CHUNK).unique_consecutive(return_counts=True)[1].cumsum(0)
        self.chunks: list[Chunk] = []
        group = row = 0
        for group_end, row_end in torch.stack([group_ends, row_splits[group_ends]], 1).tolist():
            self.chunks.append(Chunk(slice(group, group_end), slice(row, row_end), row_splits[group : group_end + 1] - row))
            group, row = group_end, row_end
        self.rows = row
        self.member = batch_from_offsets(row_splits, row)  # group of each row

    @classmethod
    def of_size(cls, count: int, size: int, device: torch.device) -> Groups:
        """``count`` groups of ``size`` rows each."""
        return cls(torch.arange(0, count * size + 1, size, device=device))

    def select(self, keep: Tensor | None) -> tuple[Groups, Tensor | None]:
        """The groups ``keep`` in that order, packed, and where their rows are among those of all; None stands for all, as they are."""
        if keep is None:
            return self, None
        kept = Groups(offsets_from_lengths(self.count[keep]))
        start = self.row_splits[keep] - kept.row_splits[:-1]
        return kept, start[kept.member] + torch.arange(kept.rows, device=start.device)

    def slots(self) -> Tensor:
        """Place of each row in its group, ``[S]``."""
        return torch.arange(self.rows, device=self.member.device) - self.row_splits[self.member]


class Parameters(NamedTuple):
    """Weights in the order of :class:`FastEmbedding`'s arguments; ``bias1`` and ``bias3`` cancel in the normalisation after them."""

    conv1: Tensor
    bias1: Tensor | None
    gamma1: Tensor
    beta1: Tensor
    conv2: Tensor
    bias2: Tensor
    conv3: Tensor
    bias3: Tensor | None
    gamma2: Tensor
    beta2: Tensor
    conv4: Tensor
    bias4: Tensor


class Extras(NamedTuple):
    """What can be added to the plain network."""

    code: Tensor | None = None  # [slots, C2], added to `local` of each row by its place in the group
    least_shared: Tensor | None = None  # [G, C2], what each group's first maximum is at least
    least_token: Tensor | None = None  # [T, C4], the same for the second maximum of the kept groups


NOTHING = Extras()


def embed_training(
    module: nn.Module, points: Tensor, groups: Groups, keep: Tensor | None, dtype: torch.dtype, extras: Extras = NOTHING
) -> Tensor:
    """Tokens of the groups ``keep`` by the statistics of this batch, which move the running ones.

    Args:
        module: Has the layers conv1, norm1, conv2, conv3, norm2 and conv4.
        points: ``[S, D]``.
        groups: Which rows belong together.
        keep: Numbers of the groups whose token is wanted, ``[T]`` int64, none twice; None means all.
        dtype: Type of the matrix products; statistics are kept in that of ``points``.
        extras: Additions to the network.

    Returns:
        ``[T, C4]``, differentiable in ``points``, ``extras`` and all parameters.
    """
    conv1, norm1, _, conv3, norm2, _ = layers = _layers(module)
    with torch.autocast(points.device.type, enabled=False):
        first = row_moments(points)
        weights = [parameter for layer in layers for parameter in (layer.weight, layer.bias)]
        tokens, mean, covariance = FastEmbedding.apply(points, *first, groups, keep, dtype, norm1.eps, norm2.eps, *extras, *weights)
        norm1.update_from_input(first, conv1)
        norm2.update_from_input(Moments(mean, covariance, first.rows), conv3)
    return tokens


def embed_evaluation(module: nn.Module, points: Tensor, groups: Groups, dtype: torch.dtype, extras: Extras = NOTHING) -> Tensor:
    """Tokens of all groups by the running statistics: ``[G, C4]``, differentiable like those of :func:`embed_training`."""
    conv1, norm1, conv2, conv3, norm2, conv4 = _layers(module)
    if not groups.chunks:
        return points.new_zeros(0, conv4.out_features)
    slot = groups.slots() if extras.code is not None else None
    tokens = []
    with torch.autocast(points.device.type, enabled=False):
        weight1, bias1 = fold_running(conv1, norm1)
        weight3, bias3 = (x.to(dtype) for x in fold_running(conv3, norm2))
        shared_weight, own_weight = weight3.chunk(2, dim=1)
        weight2, bias2, weight4 = (x.to(dtype) for x in (conv2.weight, conv2.bias, conv4.weight))
        for chunk in groups.chunks:
            local = F.linear(F.linear(points[chunk.rows], weight1, bias1).relu_().to(dtype), weight2, bias2)
            if slot is not None and extras.code is not None:
                local = local + extras.code.to(dtype).index_select(0, slot[chunk.rows])
            shared = _at_least(chunk.maximum(local), extras.least_shared, chunk.groups)
            per_group = F.linear(shared, shared_weight, bias3).index_select(0, groups.member[chunk.rows] - chunk.groups.start)
            wide = torch.addmm(per_group, local, own_weight.T).relu_()
            largest = chunk.maximum(wide @ weight4.T).to(points.dtype) + conv4.bias
            tokens.append(_at_least(largest, extras.least_token, chunk.groups))
    return torch.cat(tokens)


def _layers(module: nn.Module) -> tuple[Any, ...]:
    return module.conv1, module.norm1, module.conv2, module.conv3, module.norm2, module.conv4


def _at_least(value: Tensor, least: Tensor | None, groups: slice) -> Tensor:
    """The larger of both; of equal ones ``value``, which gets the gradient (``torch.maximum`` would halve it)."""
    return value if least is None else torch.where(least[groups] > value, least[groups].to(value.dtype), value)


class FastEmbedding(torch.autograd.Function):
    """``(points [S, D], their moments, ..., weights) -> (tokens [T, C], mean and covariance of the input of conv3)``."""

    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx,
        points: Tensor,
        mean: Tensor,
        covariance: Tensor,
        count: float,
        groups: Groups,
        keep: Tensor | None,
        dtype: torch.dtype,
        eps1: float,
        eps2: float,
        *extras_and_weights: Any,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Compute the tokens of the groups ``keep``; matrix products run in ``dtype``, statistics in the dtype of ``points``."""
        extras, p = Extras(*extras_and_weights[:3]), Parameters(*extras_and_weights[3:])
        kept, kept_rows = groups.select(keep)
        fold1 = fold_batchnorm(p.conv1, p.gamma1, p.beta1, eps1, Moments(mean, covariance, count))
        hidden, local, shared, shared_row, second = _first_half(points, groups, fold1, p, extras, dtype, count)
        fold2 = fold_batchnorm(p.conv3, p.gamma2, p.beta2, eps2, second)
        kept_shared = shared if keep is None else shared[keep]
        wide, tokens, token_row = _second_half(local, kept_shared, kept, kept_rows, fold2, p, extras, dtype)
        ctx.save_for_backward(
            points, keep, kept_rows, hidden, local, shared, shared_row, wide, token_row,
            mean, covariance, second.mean, second.covariance, *fold1, *fold2, *extras, *p,
        )  # fmt: skip
        ctx.count, ctx.groups, ctx.kept = count, groups, kept
        ctx.mark_non_differentiable(second.mean, second.covariance)
        return tokens, second.mean, second.covariance

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_tokens: Tensor, *_: Any) -> tuple[Tensor | None, ...]:  # type: ignore[no-untyped-def]
        """Gradients of ``points``, its moments, the extras and all weights."""
        with torch.autocast(grad_tokens.device.type, enabled=False):
            return _backward(ctx, grad_tokens)


def _backward(ctx: Any, grad_tokens: Tensor) -> tuple[Tensor | None, ...]:
    points, keep, kept_rows, hidden, local, shared, shared_row, wide, token_row, mean1, cov1, mean2, cov2, *rest = ctx.saved_tensors
    fold1, fold2, extras, p = Folded(*rest[:4]), Folded(*rest[4:8]), Extras(*rest[8:11]), Parameters(*rest[11:])
    first, second = Moments(mean1, cov1, ctx.count), Moments(mean2, cov2, ctx.count)

    grad_tokens, grad_least_token = _split_least(grad_tokens, token_row, extras.least_token)
    kept_shared = shared if keep is None else shared[keep]
    grad_conv4, grad_folded3, grad_bias3, grad_local_kept, grad_shared_kept = _second_half_backward(
        grad_tokens, local, kept_shared, wide, token_row, ctx.kept, kept_rows, fold2, p
    )
    back2 = fold_batchnorm_backward(grad_folded3, grad_bias3, p.conv3, p.gamma2, fold2, second)
    grad_shared, from_shared, own = _statistics_backward(
        local, shared, ctx.groups, sum_over_ranks(back2.mean), sum_over_ranks(back2.covariance), second
    )
    if keep is None:
        grad_shared += grad_shared_kept
    else:
        grad_shared.index_add_(0, keep, grad_shared_kept)
    grad_shared, grad_least_shared = _split_least(grad_shared, shared_row, extras.least_shared)
    grad_conv2, grad_bias2, grad_folded1, grad_bias1, grad_code, grad_points = _first_half_backward(
        points, hidden, local, shared_row, ctx.groups, kept_rows, grad_local_kept, grad_shared, from_shared, own, fold1, p,
        extras.code, ctx.needs_input_grad[0],
    )  # fmt: skip
    back1 = fold_batchnorm_backward(grad_folded1, grad_bias1, p.conv1, p.gamma1, fold1, first)
    return (
        grad_points, back1.mean, back1.covariance, None, None, None, None, None, None,
        grad_code, grad_least_shared, grad_least_token,
        back1.weight, _zeros_like(p.bias1), back1.norm_weight, back1.norm_bias, grad_conv2, grad_bias2,
        back2.weight, _zeros_like(p.bias3), back2.norm_weight, back2.norm_bias, grad_conv4, grad_tokens.sum(0),
    )  # fmt: skip


def _zeros_like(x: Tensor | None) -> Tensor | None:
    return None if x is None else torch.zeros_like(x)


def _raise_to(value: Tensor, row: Tensor, least: Tensor | None) -> tuple[Tensor, Tensor]:
    """Raise maxima to ``least`` where that is larger; their row is -1 there."""
    if least is None:
        return value, row
    least = least.to(value.dtype)
    above = least > value
    return torch.where(above, least, value), row.masked_fill_(above, -1)


def _split_least(grad: Tensor, row: Tensor, least: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Gradient of maxima, cut into that of the rows and that of ``least``."""
    if least is None:
        return grad, None
    above = row < 0
    return grad.masked_fill(above, 0), grad.masked_fill(~above, 0)


def _first_half(
    points: Tensor, groups: Groups, fold: Folded, p: Parameters, extras: Extras, dtype: torch.dtype, count: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Moments]:
    rows, channels, total = points.shape[0], p.conv2.shape[0], groups.count.shape[0]
    conv2, bias2 = p.conv2.T.to(dtype), p.bias2.to(dtype)
    hidden = torch.empty(rows, p.conv2.shape[1], dtype=dtype, device=points.device)
    local = torch.empty(rows, channels, dtype=dtype, device=points.device)
    shared = torch.empty(total, channels, dtype=dtype, device=points.device)
    shared_row = torch.empty(total, channels, dtype=torch.int64, device=points.device)
    group_sum = points.new_empty(total, channels)
    gram = points.new_zeros(channels, channels)
    shift = points.new_empty(0)  # moments are taken about the first chunk's mean: no cancellation
    slot = groups.slots() if extras.code is not None else None
    for chunk in groups.chunks:
        part = chunk.rows
        hidden[part] = torch.addmm(fold.bias, points[part], fold.weight.T).relu_()
        torch.addmm(bias2, hidden[part], conv2, out=local[part])
        if slot is not None and extras.code is not None:
            local[part] += extras.code.to(dtype).index_select(0, slot[part])
        shared[chunk.groups], shared_row[chunk.groups] = chunk.first_maximum(local[part])
        wide = local[part].to(points.dtype)
        shift = shift if len(shift) else wide.mean(0)
        wide = wide - shift
        gram.addmm_(wide.T, wide)
        group_sum[chunk.groups] = chunk.sum(wide)

    shared, shared_row = _raise_to(shared, shared_row, extras.least_shared)
    best, size = shared.to(points.dtype), groups.count[:, None].to(points.dtype)
    mean = sum_over_ranks(torch.cat([(best * size).sum(0), group_sum.sum(0) + rows * shift])) / count
    mean_shared, mean_local = mean.chunk(2)
    offset, best, group_sum = mean_local - shift, best - mean_shared, group_sum - size * (mean_local - shift)
    drift = torch.outer(group_sum.sum(0), offset)  # zero up to rounding in a single process
    gram = gram - drift - drift.T - rows * torch.outer(offset, offset)
    cross = best.T @ group_sum
    blocks = torch.cat([torch.cat([(size * best).T @ best, cross], 1), torch.cat([cross.T, gram], 1)])
    return hidden, local, shared, shared_row, Moments(mean, sum_over_ranks(blocks) / count, count)


def _second_half(
    local: Tensor, shared: Tensor, kept: Groups, kept_rows: Tensor | None, fold: Folded, p: Parameters, extras: Extras, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    channels = local.shape[1]
    weight, conv4 = fold.weight.to(dtype), p.conv4.T.to(dtype)
    per_group = torch.addmm(fold.bias.to(dtype), shared, weight[:, :channels].T)
    own = weight[:, channels:].T
    wide = torch.empty(kept.rows, weight.shape[0], dtype=dtype, device=local.device)
    tokens = torch.empty(shared.shape[0], conv4.shape[1], dtype=fold.weight.dtype, device=local.device)
    row = torch.empty(tokens.shape, dtype=torch.int64, device=local.device)
    for chunk in kept.chunks:
        part = chunk.rows
        torch.index_select(per_group, 0, kept.member[part], out=wide[part])
        wide[part].addmm_(_rows(local, kept_rows, part), own).relu_()
        tokens[chunk.groups], row[chunk.groups] = chunk.first_maximum(wide[part] @ conv4)
    return wide, *_raise_to(tokens.add_(p.bias4), row, extras.least_token)


def _rows(x: Tensor, index: Tensor | None, part: slice) -> Tensor:
    """The rows ``index[part]`` of ``x``, or ``x[part]`` without an index."""
    return x[part] if index is None else x.index_select(0, index[part])


def _second_half_backward(
    grad_tokens: Tensor, local: Tensor, shared: Tensor, wide: Tensor, row: Tensor, kept: Groups, kept_rows: Tensor | None,
    fold: Folded, p: Parameters,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of conv4, of the folded conv3 weight and bias, and of ``local`` and ``shared`` of the kept groups.

    That of ``local`` has a row of zeros after its last one.
    """
    width, channels, dtype = wide.shape[1], local.shape[1], wide.dtype
    weight = fold.weight.to(dtype)
    grad_conv4 = torch.zeros_like(p.conv4)
    grad_weight = torch.zeros_like(fold.weight)
    grad_local = torch.zeros(kept.rows + 1, channels, dtype=dtype, device=local.device)
    per_group = torch.empty(shared.shape[0], width, dtype=fold.weight.dtype, device=local.device)
    for chunk in kept.chunks:
        part = chunk.rows
        entries = grad_tokens[chunk.groups], row[chunk.groups], chunk.row_splits
        grad_wide, grad_conv4_part = linear_max_backward(*entries, wide[part].to(p.conv4.dtype), p.conv4)
        grad_conv4 += grad_conv4_part
        grad_wide = _relu_backward(grad_wide.to(dtype), wide[part])
        grad_weight[:, channels:] += grad_wide.T @ _rows(local, kept_rows, part)
        torch.mm(grad_wide, weight[:, channels:], out=grad_local[part])
        per_group[chunk.groups] = chunk.sum(grad_wide).to(per_group.dtype)
    grad_weight[:, :channels] = per_group.T @ shared.to(per_group.dtype)
    grad_shared = per_group @ fold.weight[:, :channels]
    return grad_conv4, grad_weight, per_group.sum(0), grad_local, grad_shared


def _statistics_backward(
    local: Tensor, shared: Tensor, groups: Groups, grad_mean: Tensor, grad_covariance: Tensor, second: Moments
) -> tuple[Tensor, Tensor, Tensor]:
    """What the statistics ask of each group's maximum, of all its rows alike, and the matrix that acts on each row of ``local``."""
    channels, dtype = local.shape[1], second.mean.dtype
    mean_shared, mean_local = second.mean.chunk(2)
    g_shared, g_local = grad_mean.chunk(2)
    block_ss, block_sl, block_ll = (
        grad_covariance[:channels, :channels],
        grad_covariance[:channels, channels:],
        grad_covariance[channels:, channels:],
    )
    size = groups.count[:, None].to(dtype)
    best = shared.to(dtype) - mean_shared
    group_sum = torch.cat([chunk.sum(local[chunk.rows].to(dtype)) for chunk in groups.chunks]) - size * mean_local
    from_shared = torch.addmm(g_local, best, block_sl, alpha=2) / second.rows
    grad_shared = (2 * (group_sum @ block_sl.T) + size * (2 * (best @ block_ss) + g_shared)) / second.rows
    from_shared -= (2 / second.rows) * (mean_local @ block_ll)
    return grad_shared, from_shared, (2 / second.rows) * block_ll


def _first_half_backward(
    points: Tensor, hidden: Tensor, local: Tensor, shared_row: Tensor, groups: Groups, kept_rows: Tensor | None, grad_local_kept: Tensor,
    grad_shared: Tensor, from_shared: Tensor, own: Tensor, fold: Folded, p: Parameters, code: Tensor | None, want_points: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """Gradients of conv2, its bias, the folded conv1 weight and bias, the code, and of the points."""
    dtype = local.dtype
    own, from_shared, grad_shared, conv2 = own.to(dtype), from_shared.to(dtype), grad_shared.to(dtype), p.conv2.to(dtype)
    place = None
    if kept_rows is not None:  # where the gradient of each row lies; those that are not kept read the zeros at the end
        place = torch.full((groups.rows,), kept_rows.shape[0], dtype=torch.int64, device=local.device)
        place[kept_rows] = torch.arange(kept_rows.shape[0], device=local.device)
    slot = groups.slots() if code is not None else None
    grad_conv2, grad_bias2, grad_code = torch.zeros_like(p.conv2), torch.zeros_like(p.bias2), _zeros_like(code)
    grad_weight, grad_bias = torch.zeros_like(fold.weight), torch.zeros_like(fold.bias)
    grad_points = torch.empty_like(points) if want_points else None
    for chunk in groups.chunks:
        part = chunk.rows
        grad = from_shared.index_select(0, groups.member[part]).addmm_(local[part], own)
        grad += _rows(grad_local_kept, place, part)
        grad.scatter_add_(0, shared_row[chunk.groups].clamp(min=0), grad_shared[chunk.groups])
        grad_conv2 += grad.T @ hidden[part]
        grad_bias2 += grad.sum(0, dtype=grad_bias2.dtype)
        if slot is not None and grad_code is not None:
            grad_code += reduce_rows(grad.to(grad_code.dtype), slot[part], None, None, grad_code.shape[0], "sum")[0]
        grad_hidden = _relu_backward(grad @ conv2, hidden[part]).to(points.dtype)
        grad_weight.addmm_(grad_hidden.T, points[part])
        grad_bias += grad_hidden.sum(0)
        if grad_points is not None:
            grad_points[part] = grad_hidden @ fold.weight
    return grad_conv2, grad_bias2, grad_weight, grad_bias, grad_code, grad_points


def _relu_backward(grad: Tensor, output: Tensor) -> Tensor:
    """``grad`` with zeros where the output of the relu is 0, in place (multiplying by a mask takes ten times as long)."""
    return torch.ops.aten.threshold_backward.grad_input(grad, output, 0, grad_input=grad)
