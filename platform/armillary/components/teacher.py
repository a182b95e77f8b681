"""A teacher: a copy of an objective's modules that follows them as an exponential moving average of their weights.

The copy is made while the objective is built, so that an engine shards teacher and student alike. Each worker then
updates the part of the teacher that it holds from the same part of the student: no communication, and at ZeRO stage 3
one more sharded copy of the parameters, not a whole one. (Catalog: ema_teacher.)
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from armillary import collectives
from armillary.spec.errors import UserError


class Teacher(nn.Module):
    """Copies of some of an objective's modules, without gradient; ``teacher["encoder"]`` is that of ``encoder``.

    ::

        self.teacher = Teacher(self, ("encoder", "projector"), Schedule(0.996, 1.0, steps))   # in build
        targets = self.teacher(images)                                                        # in forward
        self.teacher.update(self, step)                                                       # in after_step

    Methods that evaluate the teacher return ``self.teacher["encoder"]`` from ``exported``.

    Args:
        owner: the objective, or another teacher.
        parts: names of its modules, in the order in which ``forward`` runs them.
        momentum: share of the old teacher that an update after step k (from 0) keeps, in [0, 1]. Averages over about
            ``1 / (1 - momentum)`` steps.
        buffers: what becomes of batch-norm statistics and other buffers: ``own``, the teacher's own forward passes
            change them; ``copy``, each update takes the student's; ``ema``, each update averages them too.
    """

    def __init__(
        self,
        owner: nn.Module,
        parts: Sequence[str],
        momentum: Callable[[int], float],
        buffers: Literal["own", "copy", "ema"] = "own",
    ) -> None:
        super().__init__()
        self.parts, self.momentum, self.buffer_rule = tuple(parts), momentum, buffers
        for name in self.parts:
            self.add_module(name, copy.deepcopy(owner.get_submodule(name)).requires_grad_(False))

    def __getitem__(self, part: str) -> nn.Module:
        """The copy of a module."""
        return self.get_submodule(part)

    @torch.no_grad()
    def forward(self, inputs: Tensor) -> Tensor:
        """What the parts make of ``inputs`` one after the other, without gradient."""
        hidden = inputs
        for name in self.parts:
            hidden = self[name](hidden)
        return hidden

    def update(self, owner: nn.Module, step: int) -> None:
        """Moves the teacher towards the student; call it once after an optimizer step.

        Args:
            owner: what the modules were copied from.
            step: number of that optimizer step over the whole run, from 0.

        Raises:
            UserError: the parameters are in half precision, in which such small steps round to nothing.
        """
        self._follow(owner, 1 - self.momentum(step), self.buffer_rule)

    def reset(self, owner: nn.Module) -> None:
        """Makes the teacher equal to the student: after the student was loaded, or to take a snapshot."""
        self._follow(owner, 1.0, "copy")

    @torch.no_grad()
    def _follow(self, owner: nn.Module, weight: float, buffers: str) -> None:
        for part in self.parts:
            student = owner.get_submodule(part)
            leading = dict(student.named_parameters())
            for name, parameter in self[part].named_parameters():
                _check_precision(parameter)
                _move(parameter, leading[name], weight)
            if buffers != "own":
                _follow_buffers(self[part], student, weight if buffers == "ema" else 1.0)


def reset_teachers(objective: nn.Module) -> None:
    """Makes every teacher of an objective equal to its student; for whoever loads the student's weights."""
    for teacher in teachers(objective):
        teacher.reset(objective)


def teachers(objective: nn.Module) -> Iterator[Teacher]:
    """The teachers an objective holds."""
    return (module for module in objective.children() if isinstance(module, Teacher))


def _follow_buffers(teacher: nn.Module, student: nn.Module, weight: float) -> None:
    leading = dict(student.named_buffers())
    for name, buffer in teacher.named_buffers():
        if buffer.is_floating_point():
            buffer.lerp_(leading[name], weight)
        else:
            buffer.copy_(leading[name])


def _check_precision(parameter: Any) -> None:
    dtype = parameter.ds_tensor.dtype if hasattr(parameter, "ds_tensor") else parameter.dtype
    if dtype in (torch.float16, torch.bfloat16):
        raise UserError(
            f"a teacher's parameters are {dtype}, in which the small steps of a moving average round to nothing",
            key="train.deepspeed",
            hint="use train.precision: bf16, which keeps parameters in float32",
        )


def _move(teacher: Any, student: Any, weight: float) -> None:
    """``teacher += weight * (student - teacher)`` on what this worker holds of both."""
    if not hasattr(teacher, "ds_tensor"):
        teacher.data.lerp_(student.data, weight)
        return
    shard = teacher.ds_tensor.data
    if _is_whole(teacher) and _is_whole(student):
        # Small parameters stay whole on every worker beside their shards; both must say the same to the last bit.
        teacher.data.lerp_(student.data, weight)
        start = collectives.rank() * shard.numel()
        own = teacher.data.view(-1)[start : start + shard.numel()]
        shard[: own.numel()].copy_(own)
        return
    shard.lerp_(student.ds_tensor.data, weight)
    if _is_whole(teacher):
        teacher.partition()  # drops the copy that is now out of date; the next use gathers it


def _is_whole(parameter: Any) -> bool:
    """Whether a sharded parameter's whole value is there too."""
    return bool(parameter.data.numel() == parameter.ds_numel and parameter.ds_status.name == "AVAILABLE")
