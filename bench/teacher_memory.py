"""What a teacher adds to the memory of a DINO step at ZeRO stage 3, over two workers.

``python bench/teacher_memory.py`` trains a student with and without its teacher on two gloo workers and counts, on each
worker and between steps, the bytes of parameters (shards, and what is whole), of all live tensors, and of the resident
set, which also holds what the C library has not given back. The floor is one sharded copy: half of the student's bytes
on each of two workers.
"""

from __future__ import annotations

import ctypes
import gc
import sys
import warnings
from typing import Any

import psutil
import torch
from torch import Tensor, nn

from _measure import Report, parser
from armillary import collectives
from armillary.components.heads import DINOHead
from armillary.components.schedules import Schedule
from armillary.components.teacher import Teacher
from armillary.components.transformers import small_transformer
from armillary.objectives import Batch, BuildContext, Citation, Hyperparameters, Objective, Output
from armillary.spec.jobs import TrainJob
from armillary.testing.gloo_pool import GlooPool

BATCH, SIDE, MEBIBYTE = 8, 32, 2**20


class Step(Objective):
    """DINO's step on two views; the student is its own target when there is no teacher."""

    name, family, citation = "step", "bench", Citation("nobody", "nothing")
    with_teacher = True

    def build(self, context: BuildContext) -> None:
        """Makes head and teacher."""
        self.head = DINOHead(context.embedding_dim, 4096)
        if self.with_teacher:
            self.teacher = Teacher(self, ("encoder", "head"), Schedule(0.996, 1.0, 100))

    def forward(self, batch: Batch) -> Output:
        """Cross-entropy between the views."""
        with torch.no_grad():
            target = self.teacher(batch.views[1]) if self.with_teacher else self.head(self.encoder(batch.views[1]))
        logits = self.head(self.encoder(batch.views[0]))
        loss = -((target / 0.04).softmax(dim=1) * (logits / 0.1).log_softmax(dim=1)).sum(dim=1).mean()
        return Output(loss)

    def after_step(self, step: int) -> None:
        """Moves the teacher."""
        if self.with_teacher:
            self.teacher.update(self, step)


class Alone(Step):
    """The same without a teacher."""

    with_teacher = False


def measure(kind: type[Step], width: int, depth: int, zero: int) -> dict[str, float]:
    """Bytes on this worker after three steps."""
    from armillary.training.engine import Engine

    warnings.simplefilter("ignore", FutureWarning)  # DeepSpeed calls names that torch has renamed
    gc.collect()
    before = psutil.Process().memory_info().rss
    encoder = small_transformer(3, (SIDE, SIDE), width, width=width, depth=depth, heads=4, patch=8)
    objective = kind(Hyperparameters(), BuildContext(encoder, width, 1, 100))
    job = TrainJob.model_validate(
        {
            "objective": {"name": "step"},
            "train": {"batch_size": BATCH, "workers": collectives.world_size(), "zero": zero},
        }
    )
    engine = Engine(objective, job, torch.device("cpu"))
    for step in range(3):
        views = tuple(torch.rand(BATCH // collectives.world_size(), 3, SIDE, SIDE) for _ in range(2))
        engine.step([Batch(views, torch.arange(len(views[0])))], lr=1e-3)
        objective.step = step
        objective.after_step(step)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    storages = {
        item.untyped_storage().data_ptr(): item.untyped_storage().nbytes()
        for item in gc.get_objects()
        if type(item) in (Tensor, nn.Parameter)
    }
    result = {"held": held(objective), "live": float(sum(storages.values()))}
    result["resident"] = float(psutil.Process().memory_info().rss - before)
    result["student"] = sum(4.0 * size(p) for name, p in objective.named_parameters() if "teacher" not in name)
    engine.close()
    return result


def size(parameter: Any) -> int:
    """Values of a parameter, sharded or not."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def held(module: nn.Module) -> float:
    """Bytes of parameters on this worker: shards, and whole values that are there beside them."""
    tensors: list[Tensor] = []
    for parameter in module.parameters():
        tensors += [parameter.data, *([parameter.ds_tensor.data] if hasattr(parameter, "ds_tensor") else [])]
    return float(sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor.numel() > 1))


def main() -> int:
    """Prints the figures."""
    options = parser(__doc__)
    options.add_argument("--width", type=int, default=512)
    options.add_argument("--depth", type=int, default=6)
    options.add_argument("--zero", type=int, default=3)
    arguments = options.parse_args()
    report = Report("teacher_memory", arguments.json)
    found = {}
    for kind in (Alone, Step):
        with GlooPool(2) as pool:
            found[kind] = pool.run(measure, kind, arguments.width, arguments.depth, arguments.zero, timeout=600)
    for rank in range(2):
        alone, taught = found[Alone][rank], found[Step][rank]
        floor = alone["student"] / (2 if arguments.zero == 3 else 1)
        print(f"worker {rank}: a student of {alone['student'] / MEBIBYTE:.1f} MiB; its teacher adds")
        for name in ("held", "live", "resident"):
            added = taught[name] - alone[name]
            print(f"  {name:10}{added / MEBIBYTE:8.1f} MiB, {added / floor:.2f} of one share")
            report.figure(f"{name}, worker {rank}, of one share", added / floor)
        report.goal(
            f"worker {rank}: what a teacher holds, of one sharded copy",
            (taught["held"] - alone["held"]) / floor,
            at_most=1.05,
            unit="x",
        )
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
