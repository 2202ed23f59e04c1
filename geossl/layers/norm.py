"""Batch normalisation that sums its statistics over all processes, and its exact fold into the linear layer before it.

In training, the output of ``BatchNorm(W x + b)`` depends on the batch only through the mean ``m`` and covariance ``C`` of ``x``:
``mean = W m + b`` and ``variance = diag(W C W^T)``. So linear layer and normalisation together are one linear layer

    W' = s W,    b' = beta - s W m,    s = gamma / sqrt(diag(W C W^T) + eps),

whose statistics cost one Gram matrix of the *input*. Columns whose output nobody reads still count in the statistics without ever
being computed, which is what a masked autoencoder wants.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from geossl.errors import unknown_name


class Moments(NamedTuple):
    """Mean ``[D]`` and biased covariance ``[D, D]`` of the rows entering a linear layer, and how many rows there were."""

    mean: Tensor
    covariance: Tensor
    rows: float


def world_size() -> int:
    """Processes that train together; 1 outside ``torchrun``."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


class _SumOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        total = x.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        return _SumOverRanks.apply(grad.contiguous())


def sum_over_ranks(x: Tensor) -> Tensor:
    """Sum ``x`` over all processes (differentiable: the gradient is summed too); ``x`` itself for a single process."""
    return _SumOverRanks.apply(x) if world_size() > 1 else x


@torch.no_grad()
def share_of_rows(rows: int, samples: int, device: torch.device) -> Tensor | float:
    """How much more than by its share of the samples this process counts in a mean over the rows of all processes.

    The training loop weighs the loss of every process by its share of the samples. A loss that is a mean over rows, of which samples have
    different numbers, times this then adds up to the mean over all rows, whatever the number of processes.

    Args:
        rows: Rows of this process's mean.
        samples: Samples of this process.
        device: Where the processes talk.
    """
    if world_size() == 1:
        return 1.0
    all_rows, all_samples = sum_over_ranks(torch.tensor([rows, samples], dtype=torch.float64, device=device))
    return rows / all_rows.clamp(min=1) * all_samples / max(samples, 1)


class BatchNorm(nn.BatchNorm1d):
    """``BatchNorm1d`` over rows ``[N, C]`` whose training statistics are those of the rows of *all* processes.

    State and numbers are those of :class:`torch.nn.BatchNorm1d`; unlike ``SyncBatchNorm`` it works on every device.

    Args:
        channels: Columns ``C``.
        biased_running_var: Keep the running mean of the biased variance, as the masked batch norm of PoLAr-MAE does, instead of the
            unbiased one.
    """

    def __init__(self, channels: int, *, biased_running_var: bool = False) -> None:
        super().__init__(channels)
        self.biased_running_var = biased_running_var

    def forward(self, x: Tensor) -> Tensor:
        """Normalise ``[N, C]``."""
        if not self.training or (world_size() == 1 and not self.biased_running_var):
            return super().forward(x)
        if world_size() == 1 and x.shape[0] > 1:
            mean, unbiased = torch.zeros_like(self.weight), torch.zeros_like(self.weight)
            out = F.batch_norm(x, mean, unbiased, self.weight, self.bias, training=True, momentum=1.0, eps=self.eps)
            self.update(mean, unbiased * ((x.shape[0] - 1) / x.shape[0]), x.shape[0])
            return out
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        count = sum_over_ranks(wide.new_tensor(float(x.shape[0])))
        mean = sum_over_ranks(wide.sum(0)) / count
        centred = wide - mean
        variance = sum_over_ranks(centred.square().sum(0)) / count
        self.update(mean.detach(), variance.detach(), float(count))
        return (centred * (variance + self.eps).rsqrt() * self.weight + self.bias).to(x.dtype)

    @torch.no_grad()
    def update(self, mean: Tensor, variance: Tensor, count: float) -> None:
        """Move the running statistics towards those of a batch of ``count`` rows (``variance`` biased, as used to normalise)."""
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return
        self.num_batches_tracked += 1
        momentum = self.momentum if self.momentum is not None else 1.0 / float(self.num_batches_tracked)
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), momentum)
        if not self.biased_running_var:
            variance = variance * (count / max(count - 1, 1))
        self.running_var.lerp_(variance.to(self.running_var.dtype), momentum)

    @torch.no_grad()
    def update_from_input(self, moments: Moments, linear: nn.Linear) -> None:
        """Move the running statistics towards those of ``linear``'s output, given the ``moments`` of its input."""
        weight = linear.weight.to(moments.mean.dtype)
        mean = weight @ moments.mean
        if linear.bias is not None:
            mean = mean + linear.bias
        self.update(mean, ((weight @ moments.covariance) * weight).sum(1), moments.rows)


def row_moments(rows: Tensor) -> Moments:
    """Mean and covariance of ``rows [N, D]`` over all processes, summed in float64 and returned in the rows' dtype; differentiable."""
    wide = rows.double()
    count = float(rows.shape[0])
    if world_size() > 1:
        count = float(sum_over_ranks(wide.new_tensor(count)))
    mean = sum_over_ranks(wide.sum(0)) / count
    centred = wide - mean
    covariance = sum_over_ranks(centred.T @ centred) / count
    return Moments(mean.to(rows.dtype), covariance.to(rows.dtype), count)


class BatchwideNorm(nn.Module):
    """The "masked layer norm" of PoLAr-MAE: one mean and one deviation over all rows *and* channels of the whole batch.

    ``y = weight * (x - mean) / sqrt(variance + 1e-13) + bias``, without running statistics, so that in evaluation too the features of a
    sample depend on the others in its batch. For official checkpoints; new models want ``LayerNorm``. Under several processes, each
    normalises its own rows, as published.

    Args:
        dim: Channels.
    """

    eps = 1e-13

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise ``[T, C]``; statistics and result are float32 (float64 for float64)."""
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        if x.numel() == 0:
            return x
        if x.device.type == "cpu":
            normed = F.layer_norm(x, x.shape, eps=self.eps)
        else:  # there, layer_norm would give this single row to a single block of threads
            variance, mean = torch.var_mean(x, correction=0)
            normed = (x - mean) * (variance + self.eps).rsqrt()
        return torch.addcmul(self.bias, normed, self.weight)


def make_norm(kind: str, dim: int, eps: float = 1e-5) -> nn.Module:
    """Make the norm of a transformer: "layer" (each token over its channels) or "batchwide" (:class:`BatchwideNorm`, with its own eps)."""
    kinds: dict[str, Callable[[], nn.Module]] = {"layer": lambda: nn.LayerNorm(dim, eps), "batchwide": lambda: BatchwideNorm(dim)}
    if kind not in kinds:
        raise unknown_name("norm", kind, kinds)
    return kinds[kind]()


class Folded(NamedTuple):
    """A linear layer with the batch normalisation after it folded in, and what the gradient of the fold needs."""

    weight: Tensor  # [out, in]
    bias: Tensor  # [out]
    scale: Tensor  # [out], gamma / std
    inverse_std: Tensor  # [out]


def fold_batchnorm(weight: Tensor, norm_weight: Tensor, norm_bias: Tensor, eps: float, moments: Moments) -> Folded:
    """Fold a training-mode batch normalisation into the weight ``[out, in]`` before it (the layer's own bias cancels)."""
    inverse_std = (((weight @ moments.covariance) * weight).sum(1).clamp(min=0) + eps).rsqrt()
    scale = norm_weight * inverse_std
    return Folded(scale[:, None] * weight, norm_bias - scale * (weight @ moments.mean), scale, inverse_std)


def fold_running(linear: nn.Linear, norm: BatchNorm) -> tuple[Tensor, Tensor]:
    """Weight and bias of ``linear`` with the evaluation-mode normalisation after it folded in; differentiable."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
    shift = norm.running_mean if linear.bias is None else norm.running_mean - linear.bias
    return scale[:, None] * linear.weight, norm.bias - scale * shift


class FoldGradient(NamedTuple):
    """Gradients of a loss with respect to everything that entered :func:`fold_batchnorm`."""

    weight: Tensor
    norm_weight: Tensor
    norm_bias: Tensor
    mean: Tensor
    covariance: Tensor  # symmetric


def fold_batchnorm_backward(
    grad_weight: Tensor, grad_bias: Tensor, weight: Tensor, norm_weight: Tensor, folded: Folded, moments: Moments
) -> FoldGradient:
    """Gradient of :func:`fold_batchnorm` for the gradients of the folded weight and bias."""
    grad_scale = (grad_weight * weight).sum(1) - grad_bias * (weight @ moments.mean)
    grad_projected_mean = -folded.scale * grad_bias
    grad_variance = -0.5 * grad_scale * norm_weight * folded.inverse_std**3
    return FoldGradient(
        weight=folded.scale[:, None] * grad_weight
        + torch.outer(grad_projected_mean, moments.mean)
        + (2 * grad_variance)[:, None] * (weight @ moments.covariance),
        norm_weight=grad_scale * folded.inverse_std,
        norm_bias=grad_bias,
        mean=weight.T @ grad_projected_mean,
        covariance=weight.T @ (grad_variance[:, None] * weight),
    )
