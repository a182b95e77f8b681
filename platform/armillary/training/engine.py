"""The training engine: DeepSpeed at ZeRO stages 0-3 around one objective. The only module that imports deepspeed."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from armillary import collectives
from armillary.objectives import Batch, Objective
from armillary.spec.errors import UserError
from armillary.spec.jobs import TrainJob
from armillary.training.head_rows import HeadRows
from armillary.training.optimizers import make_optimizer, set_learning_rate
from armillary.training.shards import ShardReader, write_shard

# Stands for a module that DeepSpeed does not know and that is using parameters.
_READER = -1


@dataclass
class Fragment:
    """The part of one parameter that this worker owns: views, so that writing them writes the engine's state.

    ``start`` counts in the flattened parameter. ``state`` maps optimizer state names to views (or scalars).
    """

    name: str
    start: int
    master: Tensor
    state: dict[str, Tensor]


def _quiet_deepspeed() -> Any:
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed
    from deepspeed.utils import logger

    logger.setLevel(logging.ERROR)
    # On a CPU DeepSpeed would compile a shared-memory reduction at first use: a minute, and a compiler that a user's
    # machine may lack. gloo does the same work.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


class Engine:
    """Trains one objective; every worker holds one. Stage, precision, clipping and accumulation come from the job.

    The rows of class heads are split over the workers and trained beside DeepSpeed (:mod:`training.head_rows`).

    Args:
        objective: the whole training graph; its parameters are taken over (and sharded at stage 3).
        job: the resolved job.
    """

    def __init__(self, objective: Objective, job: TrainJob, device: torch.device) -> None:
        deepspeed = _quiet_deepspeed()
        # Ray Train sets it; DeepSpeed insists on it wherever the process group came from.
        os.environ.setdefault("LOCAL_RANK", str(collectives.rank()))
        self.job, self.device = job, device
        self.stage = job.train.zero
        self.names = [name for name, _ in objective.named_parameters()]
        self.shapes = {name: tuple(parameter.shape) for name, parameter in objective.named_parameters()}
        if not torch.distributed.is_initialized():
            deepspeed.init_distributed("nccl" if device.type == "cuda" else "gloo", verbose=False)
        objective.to(device)
        self._rows = HeadRows(objective, job)
        self._engine, *_ = deepspeed.initialize(
            model=objective,
            optimizer=make_optimizer(objective, job.optimizer),
            config=self._settings(),
            dist_init_required=False,
        )
        self._rows.join_norms(self._engine)
        self.objective = objective

    def _settings(self) -> dict[str, Any]:
        train = self.job.train
        micro = train.batch_size // (train.workers * train.accumulate)
        return {
            "train_micro_batch_size_per_gpu": micro,
            "gradient_accumulation_steps": train.accumulate,
            "gradient_clipping": train.clip_norm,
            "zero_optimization": {"stage": self.stage},
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "steps_per_print": 2**62,
            **train.deepspeed,
        }

    def step(self, batches: list[Batch], lr: float) -> dict[str, Tensor]:
        """One optimizer step over this worker's micro-batches; returns its mean loss and metrics, detached."""
        set_learning_rate(self._engine.optimizer, lr)
        bf16 = self.job.train.precision == "bf16"
        totals: dict[str, Tensor] = {}
        for batch in batches:
            with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=bf16):
                output = self._engine(batch)
            self._engine.backward(output.loss)
            self._engine.step()
            for name, value in {"loss": output.loss, **output.metrics}.items():
                totals[name] = totals.get(name, 0.0) + value.detach().float() / len(batches)
        self._rows.step(lr, applied=self._engine.was_step_applied())
        return totals

    def encoder_copy(self, template: nn.Module) -> nn.Module:
        """Fills ``template`` (an encoder of the same shape) with the whole exported encoder, on every worker."""
        import deepspeed

        encoder = self.objective.exported()
        sharded = [p for p in encoder.parameters() if hasattr(p, "ds_id")]
        with torch.no_grad(), deepspeed.zero.GatheredParameters(sharded, enabled=bool(sharded)):
            state = encoder.state_dict()
            for name, target in template.state_dict().items():
                target.copy_(state[name])
        return template

    def class_rows(self) -> dict[str, Tensor]:
        """The whole row tensors of all class heads by name, on every worker."""
        return self._rows.whole()

    @contextmanager
    def whole_parameters(self) -> Iterator[None]:
        """Within it the objective's modules may be called one by one, by some workers more often than by others.

        At stage 3 every worker holds all parameters whole meanwhile, to read: what is written to them is lost.
        """
        import deepspeed

        sharded: list[Any] = [p for p in self.objective.parameters() if hasattr(p, "ds_id")]
        with deepspeed.zero.GatheredParameters(sharded, enabled=bool(sharded)):
            # DeepSpeed's hooks drop a parameter after each module's forward pass, unless another module is using it.
            for parameter in sharded:
                parameter.ds_active_sub_modules.add(_READER)
            try:
                yield
            finally:
                for parameter in sharded:
                    parameter.ds_active_sub_modules.discard(_READER)

    def close(self) -> None:
        """Frees the engine's hooks and buffers, so that another run can start in this process."""
        self._engine.destroy()

    # Checkpoints ------------------------------------------------------------------------------------------------

    def fragments(self, *, share: bool) -> Iterator[Fragment]:
        """This worker's part of every parameter, with optimizer state.

        What every worker holds whole is divided among them if ``share`` (to write it once), else given whole (to fill
        it).
        """
        # DeepSpeed hangs attributes of its own on parameters; Any lets the type checker pass.
        parameters: dict[str, Any] = dict(self.objective.named_parameters())
        optimizer = self._engine.optimizer
        for name, parameter in parameters.items():
            if not parameter.requires_grad:
                yield self._frozen(name, parameter, share)
            elif self.stage == 0:
                yield _replicated(name, parameter, optimizer.state.get(parameter, {}), share)
            elif self.stage == 3:
                group, offset, length = optimizer.grad_position[optimizer.get_param_id(parameter)]
                start = collectives.rank() * parameter.ds_tensor.numel()
                valid = max(0, min(length, parameter.ds_numel - start))
                yield _cut(optimizer, optimizer.fp32_partitioned_groups_flat[group], name, start, offset, valid)
            elif getattr(parameter, "_hp_mapping", None) is not None:
                mapping = parameter._hp_mapping
                flat = optimizer.single_partition_of_fp32_groups[mapping.param_group_index]
                here = mapping.hp_fragment_address
                yield _cut(optimizer, flat, name, mapping.lp_fragment_address.start, here.start, here.numel)

    def _frozen(self, name: str, parameter: Any, share: bool) -> Fragment:
        if self.stage < 3:
            return _replicated(name, parameter, {}, share)
        shard = parameter.ds_tensor
        start = collectives.rank() * shard.numel()
        return Fragment(name, start, shard.data[: max(0, parameter.ds_numel - start)], {})

    def save(self, folder: Path) -> None:
        """Writes this worker's shard into ``folder``."""
        slices: dict[tuple[str, str, int], Tensor] = {}
        for fragment in self.fragments(share=True):
            if fragment.master.numel() == 0:
                continue
            slices["param", fragment.name, fragment.start] = fragment.master
            for key, value in fragment.state.items():
                slices[key, fragment.name, fragment.start] = value
        slices.update(self._rows.slices())
        if collectives.rank() == 0:
            for name, value in self.objective.named_buffers():
                slices["buffer", name, 0] = value.reshape(-1)
        write_shard(folder, collectives.rank(), slices)

    def load(self, folder: Path) -> None:
        """Continues from a checkpoint written by any number of workers at any stage.

        Raises:
            UserError: the checkpoint is of another model.
        """
        reader = ShardReader(folder)
        self._check_names(reader)
        self._make_optimizer_state(reader)
        for fragment in self.fragments(share=False):
            length = fragment.master.numel()
            for key in reader.kinds(fragment.name):
                target = fragment.master if key == "param" else fragment.state.get(key)
                if target is None:
                    continue
                whole = target.ndim == 0
                value = (
                    reader.whole(key, fragment.name)
                    if whole
                    else reader.cut(key, fragment.name, fragment.start, length)
                )
                target.copy_(value)
        self._spread(reader)
        self._rows.load(reader)
        for name, buffer in self.objective.named_buffers():
            buffer.copy_(reader.whole("buffer", name).view(buffer.shape))

    def _check_names(self, reader: ShardReader) -> None:
        stored, here = set(reader.names("param")), set(self.names)
        if stored != here:
            only = sorted(stored ^ here)
            raise UserError(
                f"the checkpoint is of another model: {len(only)} parameters stand on one side only, e.g. {only[0]}",
                hint="resume with the job file the run was started with",
            )
        for name in self.names:
            size = math.prod(self.shapes[name])
            if reader.length("param", name) != size:
                raise UserError(f"the checkpoint is of another model: {name} has another size than {self.shapes[name]}")

    def _make_optimizer_state(self, reader: ShardReader) -> None:
        # Optimizers create their state at the first step; a resumed one needs it before.
        optimizer = self._engine.optimizer
        torch_optimizer = optimizer if self.stage == 0 else optimizer.optimizer
        owners = self._state_owners()
        for owner, name in owners:
            state = torch_optimizer.state[owner]
            for key in reader.kinds(name):
                if key not in {"param", "buffer"} and key not in state:
                    scalar = reader.length(key, name) is None
                    state[key] = reader.whole(key, name).clone() if scalar else torch.zeros_like(owner)

    def _state_owners(self) -> list[tuple[Tensor, str]]:
        """The tensors that key the optimizer's state, each with a parameter that lives in it."""
        optimizer = self._engine.optimizer
        trainable = [(name, p) for name, p in self.objective.named_parameters() if p.requires_grad]
        if self.stage == 0:
            return [(parameter, name) for name, parameter in trainable]
        if self.stage == 3:
            flats = optimizer.fp32_partitioned_groups_flat
            return [(flats[optimizer.grad_position[optimizer.get_param_id(p)][0]], name) for name, p in trainable]
        group_of = {id(p): number for number, group in enumerate(optimizer.bit16_groups) for p in group}
        return [(optimizer.single_partition_of_fp32_groups[group_of[id(p)]], name) for name, p in trainable]

    def _spread(self, reader: ShardReader) -> None:
        """Brings the working parameters in line with the master copies."""
        parameters: dict[str, Any] = dict(self.objective.named_parameters())
        for name, parameter in parameters.items():
            if self.stage < 3:
                parameter.data.copy_(reader.whole("param", name).view(parameter.shape))
                continue
            shard = parameter.ds_tensor.data
            start = collectives.rank() * shard.numel()
            valid = max(0, min(shard.numel(), parameter.ds_numel - start))
            shard[:valid].copy_(reader.cut("param", name, start, valid))


def _replicated(name: str, parameter: Tensor, state: dict[str, Tensor], share: bool) -> Fragment:
    length = math.ceil(parameter.numel() / collectives.world_size()) if share else parameter.numel()
    start = min(collectives.rank() * length, parameter.numel()) if share else 0
    views = {key: value if value.ndim == 0 else value.view(-1)[start : start + length] for key, value in state.items()}
    return Fragment(name, start, parameter.data.view(-1)[start : start + length], views)


def _cut(optimizer: Any, flat: Tensor, name: str, start: int, offset: int, length: int) -> Fragment:
    state = optimizer.optimizer.state.get(flat, {})
    views = {key: value if value.ndim == 0 else value.narrow(0, offset, length) for key, value in state.items()}
    return Fragment(name, start, flat.data.narrow(0, offset, length), views)
