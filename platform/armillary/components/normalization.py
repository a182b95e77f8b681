"""Batch norm over the global batch, on CPU (gloo) and GPU (NCCL) alike.

torch's own ``SyncBatchNorm`` refuses CPU tensors; this one is written over :mod:`armillary.collectives`.

It also takes the place of MoCo's shuffled batch norm. That one keeps a key from sharing its statistics with its query
alone, which would give the pair away; here both see the statistics of the whole global batch, which say nothing of a
pair, and N workers still equal one, which batches shuffled over workers would not.
"""

from __future__ import annotations

import torch
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


class SyncBatchNormAct(SyncBatchNorm):
    """The counterpart of timm's ``BatchNormAct2d``: batch norm, then ``drop``, then ``act``."""

    drop: nn.Module
    act: nn.Module

    def forward(self, input: Tensor) -> Tensor:
        """The normalised and activated input."""
        activated: Tensor = self.act(self.drop(super().forward(input)))
        return activated


def convert_batch_norm(module: nn.Module) -> nn.Module:
    """Turns every batch norm inside ``module`` into a :class:`SyncBatchNorm`, sharing parameters and buffers.

    State-dict keys stay as they are. timm's norm-and-activation layers are converted too.

    Returns:
        ``module`` itself, changed in place, or its replacement if it is a batch norm.

    Raises:
        TypeError: a batch norm of a kind whose own ``forward`` would be lost.
    """
    if isinstance(module, _BatchNorm) and not isinstance(module, SyncBatchNorm):
        return _converted(module)
    for name, child in module.named_children():
        replacement = convert_batch_norm(child)
        if replacement is not child:
            setattr(module, name, replacement)
    return module


def _converted(module: _BatchNorm) -> SyncBatchNorm:
    with_activation = isinstance(getattr(module, "drop", None), nn.Module) and isinstance(
        getattr(module, "act", None), nn.Module
    )
    if type(module) not in _PLAIN and not with_activation and not isinstance(module, nn.SyncBatchNorm):
        raise TypeError(f"cannot synchronise {type(module).__name__} over workers: it is not a known batch norm")
    kind = SyncBatchNormAct if with_activation else SyncBatchNorm
    # On the meta device the new module holds no values of its own until it takes over the old one's.
    converted = kind(
        module.num_features, module.eps, module.momentum, module.affine, module.track_running_stats, device="meta"
    )
    for name in ("weight", "bias"):
        converted.register_parameter(name, getattr(module, name))
    for name, buffer in module.named_buffers(recurse=False):
        setattr(converted, name, buffer)
    for name, child in module.named_children():
        converted.add_module(name, child)
    return converted.train(module.training)
