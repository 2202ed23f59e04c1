"""Training pass of the mini-PointNet that computes only what is read, with the numbers and gradients of the plain form.

See :class:`geossl.layers.token_embedding.PointTokenEmbedding` for the network. What makes it quick, each step exact:

* both batch normalisations are folded into the linear layer before them (:mod:`geossl.layers.norm`), so the second half runs only
  for the groups whose token is read, while the statistics still count every group;
* the half of the third layer that acts on the group maximum runs once per group, not once per point;
* the last layer is followed by a maximum over the group, so its gradient has one entry per group and channel: the weight gradient
  is a weighted sum of rows and the input gradient a sparse product;
* passes run over chunks of groups that stay in the cache.

Names: ``hidden`` = relu(BN(conv1)) of every point; ``local`` = conv2 of every point; ``shared`` = maximum of ``local`` over a
group; ``wide`` = relu(BN(conv3)) of every point of the kept groups; ``*_slot`` = which point of the group held a maximum.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from geossl.layers.norm import Folded, Moments, fold_batchnorm, fold_batchnorm_backward, sum_over_ranks

COLUMNS_PER_CHUNK = 2048  # 2,048 columns of 512 float32 channels are 4 MB: elementwise passes stay in the cache


class Parameters(NamedTuple):
    """Weights in the order of :class:`FastEmbedding`'s arguments; ``bias1`` and ``bias3`` cancel in the normalisation after them."""

    conv1: Tensor
    bias1: Tensor
    gamma1: Tensor
    beta1: Tensor
    conv2: Tensor
    bias2: Tensor
    conv3: Tensor
    bias3: Tensor
    gamma2: Tensor
    beta2: Tensor
    conv4: Tensor
    bias4: Tensor


class FastEmbedding(torch.autograd.Function):
    """``(groups [G, K, D], input moments, keep [T]) -> (tokens [T, C], mean and covariance of the input of conv3)``."""

    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx,
        groups: Tensor,
        mean: Tensor,
        covariance: Tensor,
        count: float,
        keep: Tensor,
        dtype: torch.dtype,
        eps1: float,
        eps2: float,
        *weights: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Compute the tokens of the groups ``keep``; matrix products run in ``dtype``, statistics in the dtype of ``groups``."""
        p = Parameters(*weights)
        fold1 = fold_batchnorm(p.conv1, p.gamma1, p.beta1, eps1, Moments(mean, covariance, count))
        hidden, local, shared, shared_slot, second = _first_half(groups, fold1, p, dtype, count)
        fold2 = fold_batchnorm(p.conv3, p.gamma2, p.beta2, eps2, second)
        wide, tokens, token_slot = _second_half(local, shared, fold2, p, keep, dtype)
        ctx.save_for_backward(
            groups,
            keep,
            hidden,
            local,
            shared,
            shared_slot,
            wide,
            token_slot,
            mean,
            covariance,
            second.mean,
            second.covariance,
            *fold1,
            *fold2,
            *p,
        )
        ctx.count = count
        ctx.mark_non_differentiable(second.mean, second.covariance)
        return tokens, second.mean, second.covariance

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_tokens: Tensor, *_: Any) -> tuple[Tensor | None, ...]:  # type: ignore[no-untyped-def]
        """Gradients of ``groups``, its moments and all weights."""
        groups, keep, hidden, local, shared, shared_slot, wide, token_slot, mean1, cov1, mean2, cov2, *rest = ctx.saved_tensors
        fold1, fold2, p = Folded(*rest[:4]), Folded(*rest[4:8]), Parameters(*rest[8:])
        first, second = Moments(mean1, cov1, ctx.count), Moments(mean2, cov2, ctx.count)

        grad_conv4, grad_folded3, grad_bias3, grad_local_kept, grad_shared_kept = _second_half_backward(
            grad_tokens, local, shared, wide, token_slot, keep, fold2, p
        )
        back2 = fold_batchnorm_backward(grad_folded3, grad_bias3, p.conv3, p.gamma2, fold2, second)
        grad_conv2, grad_bias2, grad_folded1, grad_bias1, grad_groups = _first_half_backward(
            groups, hidden, local, shared, shared_slot, keep, grad_local_kept, grad_shared_kept,
            sum_over_ranks(back2.mean), sum_over_ranks(back2.covariance), second, fold1, p, ctx.needs_input_grad[0],
        )  # fmt: skip
        back1 = fold_batchnorm_backward(grad_folded1, grad_bias1, p.conv1, p.gamma1, fold1, first)
        return (
            grad_groups, back1.mean, back1.covariance, None, None, None, None, None,
            back1.weight, torch.zeros_like(p.bias1), back1.norm_weight, back1.norm_bias, grad_conv2, grad_bias2,
            back2.weight, torch.zeros_like(p.bias3), back2.norm_weight, back2.norm_bias, grad_conv4, grad_tokens.sum(0),
        )  # fmt: skip


def _chunks(groups: int, size: int) -> list[slice]:
    step = max(1, COLUMNS_PER_CHUNK // max(size, 1))
    return [slice(i, min(i + step, groups)) for i in range(0, groups, step)]


def _first_maximum(x: Tensor) -> tuple[Tensor, Tensor]:
    """Maximum of ``x [G, K, C]`` over K and the slot of its first occurrence (several times quicker than ``max(1)`` on the CPU)."""
    size = x.shape[1]
    maximum = x.amax(1)
    countdown = torch.arange(size, 0, -1, dtype=torch.float32, device=x.device)[:, None]
    slot = size - ((x == maximum[:, None]) * countdown).amax(1)
    return maximum, slot.long()


def _first_half(
    groups: Tensor, fold: Folded, p: Parameters, dtype: torch.dtype, count: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Moments]:
    total, size, _ = groups.shape
    channels = p.conv2.shape[0]
    conv2, bias2 = p.conv2.T.to(dtype), p.bias2.to(dtype)
    hidden = torch.empty(total, size, p.conv2.shape[1], dtype=dtype, device=groups.device)
    local = torch.empty(total, size, channels, dtype=dtype, device=groups.device)
    shared = torch.empty(total, channels, dtype=dtype, device=groups.device)
    shared_slot = torch.empty(total, channels, dtype=torch.int64, device=groups.device)
    group_sum = groups.new_empty(total, channels)
    gram = groups.new_zeros(channels, channels)
    shift = groups.new_empty(0)  # moments are taken about the first chunk's mean: no cancellation
    for part in _chunks(total, size):
        hidden[part] = torch.addmm(fold.bias, groups[part].flatten(0, 1), fold.weight.T).relu_().view(-1, size, hidden.shape[2])
        torch.addmm(bias2, hidden[part].flatten(0, 1), conv2, out=local[part].view(-1, channels))
        shared[part], shared_slot[part] = _first_maximum(local[part])
        rows = local[part].flatten(0, 1).to(groups.dtype)
        shift = shift if len(shift) else rows.mean(0)
        rows = rows - shift
        gram.addmm_(rows.T, rows)
        group_sum[part] = rows.view(-1, size, channels).sum(1)

    best = shared.to(groups.dtype)
    mean = sum_over_ranks(torch.cat([best.sum(0) * size, group_sum.sum(0) + total * size * shift])) / count
    mean_shared, mean_local = mean.chunk(2)
    offset, best, group_sum = mean_local - shift, best - mean_shared, group_sum - size * (mean_local - shift)
    drift = torch.outer(group_sum.sum(0), offset)  # zero up to rounding in a single process
    gram = gram - drift - drift.T - total * size * torch.outer(offset, offset)
    cross = best.T @ group_sum
    blocks = torch.cat([torch.cat([size * (best.T @ best), cross], 1), torch.cat([cross.T, gram], 1)])
    return hidden, local, shared, shared_slot, Moments(mean, sum_over_ranks(blocks) / count, count)


def _second_half(
    local: Tensor, shared: Tensor, fold: Folded, p: Parameters, keep: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    size, channels = local.shape[1:]
    weight, conv4 = fold.weight.to(dtype), p.conv4.T.to(dtype)
    per_group = torch.addmm(fold.bias.to(dtype), shared[keep], weight[:, :channels].T)
    own = weight[:, channels:].T
    wide = torch.empty(keep.shape[0], size, weight.shape[0], dtype=dtype, device=local.device)
    tokens = torch.empty(keep.shape[0], conv4.shape[1], dtype=fold.weight.dtype, device=local.device)
    slot = torch.empty(tokens.shape, dtype=torch.int64, device=local.device)
    for part in _chunks(keep.shape[0], size):
        torch.mm(local[keep[part]].flatten(0, 1), own, out=wide[part].view(-1, wide.shape[2]))
        wide[part].add_(per_group[part, None]).relu_()
        tokens[part], slot[part] = _first_maximum((wide[part].flatten(0, 1) @ conv4).view(-1, size, conv4.shape[1]))
    return wide, tokens + p.bias4, slot


def _second_half_backward(
    grad_tokens: Tensor, local: Tensor, shared: Tensor, wide: Tensor, slot: Tensor, keep: Tensor, fold: Folded, p: Parameters
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of conv4, of the folded conv3 weight and bias, and of ``local`` and ``shared`` of the kept groups."""
    kept, size, width = wide.shape
    channels, dtype = local.shape[2], wide.dtype
    weight = fold.weight.to(dtype)
    row = slot + size * torch.arange(kept, device=slot.device)[:, None]
    grad_conv4 = _weighted_row_sums(wide.view(-1, width), row.T, grad_tokens.T)
    grad_weight = torch.zeros_like(fold.weight)
    grad_local = torch.empty(kept, size, channels, dtype=dtype, device=local.device)
    per_group = torch.empty(kept, width, dtype=fold.weight.dtype, device=local.device)
    for part in _chunks(kept, size):
        grad_wide = _scatter_product(slot[part], grad_tokens[part], p.conv4, size).to(dtype)
        grad_wide.mul_(wide[part].flatten(0, 1) > 0)
        grad_weight[:, channels:] += grad_wide.T @ local[keep[part]].flatten(0, 1)
        torch.mm(grad_wide, weight[:, channels:], out=grad_local[part].view(-1, channels))
        per_group[part] = grad_wide.view(-1, size, width).sum(1)
    grad_weight[:, :channels] = per_group.T @ shared[keep].to(per_group.dtype)
    grad_shared = per_group @ fold.weight[:, :channels]
    return grad_conv4, grad_weight, per_group.sum(0), grad_local, grad_shared


def _first_half_backward(
    groups: Tensor, hidden: Tensor, local: Tensor, shared: Tensor, shared_slot: Tensor, keep: Tensor, grad_local_kept: Tensor,
    grad_shared_kept: Tensor, grad_mean: Tensor, grad_covariance: Tensor, second: Moments, fold: Folded, p: Parameters, want_groups: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:  # fmt: skip
    """Gradients of conv2, its bias, the folded conv1 weight and bias, and of the groups."""
    total, size, channels = local.shape
    dtype = local.dtype
    mean_shared, mean_local = second.mean.chunk(2)
    g_shared, g_local = grad_mean.chunk(2)
    block_ss, block_sl, block_ll = (
        grad_covariance[:channels, :channels],
        grad_covariance[:channels, channels:],
        grad_covariance[channels:, channels:],
    )

    # What the statistics ask of each group: of every one of its points alike (from_shared), and of its maximum.
    best = shared.to(groups.dtype) - mean_shared
    group_sum = local.sum(1, dtype=groups.dtype) - size * mean_local
    from_shared = torch.addmm(g_local, best, block_sl, alpha=2) / second.rows
    grad_shared = (2 * (group_sum @ block_sl.T) + size * (2 * (best @ block_ss) + g_shared)) / second.rows
    grad_shared.index_add_(0, keep, grad_shared_kept)
    from_shared -= (2 / second.rows) * (mean_local @ block_ll)

    own = ((2 / second.rows) * block_ll).to(dtype)
    conv2 = p.conv2.to(dtype)
    place = torch.full((total,), -1, dtype=torch.int64)
    place[keep.cpu()] = torch.arange(keep.shape[0])
    grad_conv2, grad_bias2 = torch.zeros_like(p.conv2), torch.zeros_like(p.bias2)
    grad_weight, grad_bias = torch.zeros_like(fold.weight), torch.zeros_like(fold.bias)
    grad_groups = torch.empty_like(groups) if want_groups else None
    for part in _chunks(total, size):
        rows = hidden[part].flatten(0, 1)
        grad = (local[part].flatten(0, 1) @ own).view(-1, size, channels)
        grad += from_shared[part, None].to(dtype)
        grad.scatter_add_(1, shared_slot[part, None], grad_shared[part, None].to(dtype))
        kept = place[part] >= 0
        grad.index_add_(0, kept.nonzero()[:, 0].to(grad.device), grad_local_kept[place[part][kept].to(grad.device)])
        grad = grad.flatten(0, 1)
        grad_conv2 += grad.T @ rows
        grad_bias2 += grad.sum(0, dtype=grad_bias2.dtype)
        grad_hidden = (grad @ conv2).mul_(rows > 0).to(groups.dtype)
        grad_weight.addmm_(grad_hidden.T, groups[part].flatten(0, 1))
        grad_bias += grad_hidden.sum(0)
        if grad_groups is not None:
            grad_groups[part] = (grad_hidden @ fold.weight).view(-1, size, groups.shape[2])
    return grad_conv2, grad_bias2, grad_weight, grad_bias, grad_groups


def _weighted_row_sums(rows: Tensor, index: Tensor, weight: Tensor) -> Tensor:
    """``out[i] = sum_j weight[i, j] * rows[index[i, j]]``: ``[N, C], [I, J], [I, J] -> [I, C]`` in the dtype of ``weight``."""
    return F.embedding_bag(index, rows.to(weight.dtype), per_sample_weights=weight.contiguous(), mode="sum")


def _scatter_product(slot: Tensor, grad: Tensor, weight: Tensor, size: int) -> Tensor:
    """``D @ weight`` where ``D [G * size, C]`` holds ``grad [G, C]`` at the rows ``slot [G, C]`` of each group and zeros elsewhere."""
    groups = grad.shape[0]
    order = slot.argsort(dim=1, stable=True)
    counts = torch.zeros(groups, size, dtype=torch.int64, device=slot.device).scatter_add_(1, slot, torch.ones_like(slot))
    offsets = counts.flatten().cumsum(0) - counts.flatten()
    return F.embedding_bag(order.flatten(), weight, offsets, per_sample_weights=grad.gather(1, order).flatten(), mode="sum")
