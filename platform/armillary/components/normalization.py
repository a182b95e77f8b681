"""Batch norm over the global batch, on CPU (gloo) and GPU (NCCL) alike, and over parts of it where a method wants that.

torch's own ``SyncBatchNorm`` refuses CPU tensors; :class:`SyncBatchNorm` is written over
:mod:`armillary.collectives`. :class:`PartBatchNorm` is for methods that shuffle their keys
(:mod:`armillary.components.shuffled_keys`): there it matters who is normalised together with whom.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from armillary.collectives import all_reduce_sum, world_size

_PLAIN = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


class SyncBatchNorm(_BatchNorm):
    """Batch norm whose mean and variance are those of all workers' samples; arguments of ``nn.BatchNorm2d``.

    Input ``(batch, channels, ...)``. Running statistics are equal on all workers, and to one process's on the joined
    batch. With one worker, and in evaluation mode, it is ``F.batch_norm``. Statistics are taken in float32 at least.
    """

    def _check_input_dim(self, input: Tensor) -> None:
        if input.ndim < 2:
            raise ValueError(f"expected (batch, channels, ...), found shape {tuple(input.shape)}")

    def forward(self, input: Tensor) -> Tensor:
        """The normalised input, same shape and type."""
        batch_statistics = self.training or self.running_mean is None
        if world_size() == 1 or not batch_statistics:
            return super().forward(input)
        self._check_input_dim(input)
        values = input if input.dtype == torch.float64 else input.float()
        dims = [dim for dim in range(values.ndim) if dim != 1]
        shape = [1, -1] + [1] * (values.ndim - 2)
        size = values.new_full((1,), values.numel() / values.shape[1])
        sums = all_reduce_sum(torch.cat([values.sum(dims), size]))
        count = sums[-1].detach()
        mean = sums[:-1] / count
        centred = values - mean.view(shape)
        # The second pass costs one more reduction and does not cancel as E[x^2] - E[x]^2 does.
        variance = all_reduce_sum(centred.square().sum(dims)) / count
        self._track(mean.detach(), variance.detach(), count)
        output = centred * torch.rsqrt(variance + self.eps).view(shape)
        if self.weight is not None:
            output = output * self.weight.to(values.dtype).view(shape)
        if self.bias is not None:
            output = output + self.bias.to(values.dtype).view(shape)
        return output.to(input.dtype)

    def _track(self, mean: Tensor, variance: Tensor, count: Tensor) -> None:
        if not self.training or self.running_mean is None or self.running_var is None:
            return
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        momentum = 1.0 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        unbiased = variance * (count / (count - 1))
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), momentum)
        self.running_var.lerp_(unbiased.to(self.running_var.dtype), momentum)


class PartBatchNorm(_BatchNorm):
    """Batch norm of ``part`` samples at a time, whose statistics no other worker and no other part has a share in.

    A worker's rows are cut in order into as many parts of at least ``part`` rows as there are, of sizes that differ by
    one at most; fewer rows than that are one part. So N workers equal one where each worker's share of the batch is a
    multiple of ``part``. Running statistics move once a pass, by the mean over the parts of all workers: they are equal
    on all workers, where with a batch norm for each GPU they would be those of one GPU.

    (Hoffer, Hubara and Soudry, "Train longer, generalize better", 2017, call it ghost batch norm.)
    """

    part: int = 1

    def _check_input_dim(self, input: Tensor) -> None:
        if input.ndim < 2:
            raise ValueError(f"expected (batch, channels, ...), found shape {tuple(input.shape)}")

    def forward(self, input: Tensor) -> Tensor:
        """The normalised input, same shape and type."""
        if not self.training and self.running_mean is not None:
            return super().forward(input)
        self._check_input_dim(input)
        parts = input.tensor_split(max(1, len(input) // self.part))
        like = self.running_mean if self.running_mean is not None else input.new_zeros(input.shape[1])
        # With momentum 1 these are a part's own mean and unbiased variance.
        means, variances = like.new_zeros(len(parts), len(like)), like.new_ones(len(parts), len(like))
        output = torch.cat(
            [
                F.batch_norm(rows, mean, variance, self.weight, self.bias, True, 1.0, self.eps)
                for rows, mean, variance in zip(parts, means, variances, strict=True)
            ]
        )
        self._track(torch.stack([means, variances]))
        return output

    @torch.no_grad()
    def _track(self, statistics: Tensor) -> None:
        if not self.training or self.running_mean is None or self.running_var is None:
            return
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        momentum = 1.0 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        mean, variance = all_reduce_sum(statistics.mean(dim=1)) / world_size()
        self.running_mean.lerp_(mean, momentum)
        self.running_var.lerp_(variance, momentum)


class _Activated(nn.Module):
    """What timm's norm-and-activation layers do behind the norm."""

    drop: nn.Module
    act: nn.Module

    def forward(self, input: Tensor) -> Tensor:
        """The normalised and activated input."""
        activated: Tensor = self.act(self.drop(super().forward(input)))
        return activated


class SyncBatchNormAct(_Activated, SyncBatchNorm):
    """The counterpart of timm's ``BatchNormAct2d``: batch norm, then ``drop``, then ``act``."""


class PartBatchNormAct(_Activated, PartBatchNorm):
    """The same with statistics of a part of the batch at a time."""


def convert_batch_norm(module: nn.Module, part: int | None = None) -> nn.Module:
    """Turns every batch norm inside ``module`` into a :class:`SyncBatchNorm`, sharing parameters and buffers.

    State-dict keys stay as they are. timm's norm-and-activation layers are converted too. What was converted before
    stays as it is, so that an objective may choose for itself in ``build`` and the platform converts the rest.

    Args:
        module: what holds the batch norms.
        part: makes them :class:`PartBatchNorm` of so many samples instead.

    Returns:
        ``module`` itself, changed in place, or its replacement if it is a batch norm.

    Raises:
        TypeError: a batch norm of a kind whose own ``forward`` would be lost.
    """
    if isinstance(module, _BatchNorm) and not isinstance(module, (SyncBatchNorm, PartBatchNorm)):
        return _converted(module, part)
    for name, child in module.named_children():
        replacement = convert_batch_norm(child, part)
        if replacement is not child:
            setattr(module, name, replacement)
    return module


def _converted(module: _BatchNorm, part: int | None) -> _BatchNorm:
    with_activation = isinstance(getattr(module, "drop", None), nn.Module) and isinstance(
        getattr(module, "act", None), nn.Module
    )
    if type(module) not in _PLAIN and not with_activation and not isinstance(module, nn.SyncBatchNorm):
        raise TypeError(f"cannot synchronise {type(module).__name__} over workers: it is not a known batch norm")
    if part is None:
        kind: type[_BatchNorm] = SyncBatchNormAct if with_activation else SyncBatchNorm
    else:
        kind = PartBatchNormAct if with_activation else PartBatchNorm
    # On the meta device the new module holds no values of its own until it takes over the old one's.
    converted = kind(
        module.num_features, module.eps, module.momentum, module.affine, module.track_running_stats, device="meta"
    )
    if isinstance(converted, PartBatchNorm) and part is not None:
        converted.part = part
    for name in ("weight", "bias"):
        converted.register_parameter(name, getattr(module, name))
    for name, buffer in module.named_buffers(recurse=False):
        setattr(converted, name, buffer)
    for name, child in module.named_children():
        converted.add_module(name, child)
    return converted.train(module.training)
