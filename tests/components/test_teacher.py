"""The teacher: a moving average by name, and the same one when an engine shards it."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from armillary import collectives
from armillary.components.backbones import build_encoder
from armillary.components.bank import encode_all
from armillary.components.heads import Projector
from armillary.components.normalization import convert_batch_norm
from armillary.components.queue import Queue
from armillary.components.schedules import Schedule
from armillary.components.teacher import Teacher, reset_teachers
from armillary.objectives import Batch, BuildContext, Citation, Hyperparameters, Objective, Output
from armillary.objectives.base import Samples
from armillary.spec.errors import UserError
from armillary.spec.jobs import BackboneSpec, TrainJob
from armillary.testing.gloo_pool import GlooPool, shared_pool


class Student(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
        self.head = nn.Linear(4, 2)
        self.predictor = nn.Linear(2, 2)


def moved(student: Student) -> Student:
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(torch.randn_like(parameter))
        student.encoder(torch.randn(8, 3))
    return student


def test_two_steps_on_a_scalar() -> None:
    class One(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.part = nn.Linear(1, 1, bias=False)

    owner = One()
    owner.part.weight.data.fill_(1.0)
    teacher = Teacher(owner, ("part",), lambda _: 0.9)
    found = []
    for step, value in enumerate((2.0, 3.0)):
        owner.part.weight.data.fill_(value)
        teacher.update(owner, step)
        found.append(float(teacher.get_parameter("part.weight")))
    assert found == pytest.approx([1.1, 1.29], rel=1e-6)


def test_momentum_of_one_and_of_nothing() -> None:
    torch.manual_seed(0)
    student = Student()
    still, follower = Teacher(student, ("encoder",), lambda _: 1.0), Teacher(student, ("encoder",), lambda _: 0.0)
    before = copy.deepcopy(still.state_dict())
    moved(student)
    for teacher in (still, follower):
        teacher.update(student, 0)
    assert all(torch.equal(value, before[name]) for name, value in still.state_dict().items())
    expected = dict(student.encoder.named_parameters())
    assert all(torch.equal(value, expected[name]) for name, value in follower["encoder"].named_parameters())


@pytest.mark.parametrize("rule", ["own", "copy", "ema"])
def test_buffers_by_rule(rule: Any) -> None:
    torch.manual_seed(0)
    student = Student()
    teacher = Teacher(student, ("encoder",), lambda _: 0.75, buffers=rule)
    moved(student)
    teacher.update(student, 0)
    mean = student.get_buffer("encoder.1.running_mean")
    found = teacher.get_buffer("encoder.1.running_mean")
    torch.testing.assert_close(found, {"own": 0 * mean, "copy": mean, "ema": 0.25 * mean}[rule])


def test_no_gradient_and_a_reset() -> None:
    torch.manual_seed(0)
    student = Student()
    teacher = Teacher(student, ("encoder", "head"), Schedule(0.9, 1.0, 10))
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert not any("predictor" in name for name, _ in teacher.named_parameters())
    assert not teacher(torch.randn(4, 3)).requires_grad
    moved(student)
    holder = nn.Module()
    holder.encoder, holder.head, holder.teacher = student.encoder, student.head, teacher
    reset_teachers(holder)
    for part in ("encoder", "head"):
        expected = student.get_submodule(part).state_dict()
        assert all(torch.equal(value, expected[name]) for name, value in teacher[part].state_dict().items())


def test_half_precision_is_refused() -> None:
    student = Student()
    teacher = Teacher(student, ("head",), lambda _: 0.9).bfloat16()
    with pytest.raises(UserError, match="bfloat16"):
        teacher.update(student.bfloat16(), 0)


# Under the engine -----------------------------------------------------------------------------------------------------

EPOCH, BATCH, SIZE = 2, 8, 12


class Distilled(Objective):
    """A student that follows its own teacher, with a queue and a pass over the data: all that state an engine meets."""

    name, family, citation = "distilled", "test", Citation("nobody", "nothing")

    mean_code: Tensor

    def build(self, context: BuildContext) -> None:
        self.projector = Projector(context.embedding_dim, 16, 6)
        self.predictor = nn.Linear(6, 6)
        self.teacher = Teacher(self, ("encoder", "projector"), Schedule(0.5, 1.0, 8))
        self.queue = Queue(12, (6,))
        self.register_buffer("mean_code", torch.zeros(6))

    def forward(self, batch: Batch) -> Output:
        targets = F.normalize(self.teacher(batch.views[1]), dim=-1)
        student = F.normalize(self.predictor(self.projector(self.encoder(batch.views[0]))), dim=-1)
        loss = (2 - 2 * (student * (targets + 0.1 * self.mean_code)).sum(dim=1)).mean()
        loss = loss + 0.1 * (student @ self.queue.rows.T).square().mean()
        self.queue.hold(self.step, targets)
        return Output(loss, {"cosine": (student * targets).sum(dim=1).mean().detach()})

    def before_epoch(self, epoch: int, samples: Samples) -> None:
        def encode(batch: Batch) -> Tensor:
            return F.normalize(self.teacher(batch.views[0]), dim=-1)

        codes, _ = encode_all(samples(), encode, SIZE, self.teacher)
        self.mean_code.copy_(codes.mean(dim=0))

    def after_step(self, step: int) -> None:
        self.teacher.update(self, step)
        self.queue.write()

    def exported(self) -> nn.Module:
        return self.teacher["encoder"]


def make(backbone: str) -> Distilled:
    torch.manual_seed(0)
    options = {"width": 16, "depth": 1, "heads": 2} if backbone == "small_vit" else {"width": 4, "pool": "mean"}
    spec = BackboneSpec(name=backbone, embedding_dim=5, **options)
    encoder = build_encoder(spec, in_channels=1, image_size=(8, 8))
    objective = Distilled(Hyperparameters(), BuildContext(encoder, 5, 1, SIZE, dataset_size=SIZE))
    convert_batch_norm(objective)
    return objective


def part_of(images: Tensor, uneven: bool = False) -> Iterator[Batch]:
    """This worker's batches of a pass: with two workers 5 and 7 images, in 2 and 3 batches."""
    workers, rank = collectives.world_size(), collectives.rank()
    bounds = [0, *([5] if workers == 2 else []), SIZE]
    for start in range(bounds[rank], bounds[rank + 1], 3):
        rows = torch.arange(start, min(start + 3, bounds[rank + 1]))
        yield Batch((images[rows],), rows)


def train(backbone: str, zero: int, threshold: int, first: int, last: int, folder: str | None) -> dict[str, Any]:
    """Steps of a fixed stream; the teacher, a plain average of the student beside it, and what is held of it."""
    from armillary.training.engine import Engine

    workers = collectives.world_size()
    zero_options = {"stage": zero, "stage3_param_persistence_threshold": threshold}
    job = TrainJob.model_validate(
        {
            "objective": {"name": "distilled"},
            "optimizer": {"name": "sgd"},
            "train": {
                "batch_size": BATCH,
                "workers": workers,
                "zero": zero,
                "deepspeed": {"zero_optimization": zero_options},
            },
        }
    )
    engine = Engine(make(backbone), job, torch.device("cpu"))
    objective: Any = engine.objective
    plain = make(backbone)
    if folder and first:
        engine.load(Path(folder))
    stream = torch.Generator().manual_seed(5)
    share = BATCH // workers
    mine = slice(collectives.rank() * share, (collectives.rank() + 1) * share)
    data = torch.rand(SIZE, 1, 8, 8, generator=torch.Generator().manual_seed(6))
    losses = []
    for step in range(last):
        views = torch.rand(2, BATCH, 1, 8, 8, generator=stream)
        if step < first:
            continue
        if step % EPOCH == 0:
            with engine.whole_parameters():
                objective.before_epoch(step // EPOCH, lambda: part_of(data))
        objective.step = step
        batch = Batch((views[0, mine], views[1, mine]), torch.arange(BATCH)[mine])
        loss = engine.step([batch], lr=0.1)["loss"]
        losses.append(float(collectives.all_reduce_sum(loss) / workers))
        objective.after_step(step)
        student = whole(engine, objective.encoder)
        weight = 1 - Schedule(0.5, 1.0, 8)(step)
        with torch.no_grad():
            for name, value in plain.teacher["encoder"].named_parameters():
                value.lerp_(student[name], weight)
    if folder and not first:
        engine.save(Path(folder))
    found = whole(engine, objective.teacher["encoder"])
    exported = engine.encoder_copy(make(backbone).encoder).state_dict()
    held = {name: p.ds_tensor.numel() if zero == 3 else p.numel() for name, p in objective.teacher.named_parameters()}
    result = {
        "losses": losses,
        "teacher": found,
        "exported": {name: value.clone() for name, value in exported.items()},
        "plain": {name: value.detach().clone() for name, value in plain.teacher["encoder"].named_parameters()},
        "queue": objective.queue.rows.clone(),
        "held": held,
        "whole": {name: value.numel() for name, value in plain.teacher.named_parameters()},
        "grads": [name for name, p in objective.teacher.named_parameters() if p.grad is not None],
    }
    engine.close()
    return result


def whole(engine: Any, module: nn.Module) -> dict[str, Tensor]:
    with engine.whole_parameters():
        return {name: value.detach().clone() for name, value in module.named_parameters()}


def close_to(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=tolerance, msg=name)


@pytest.fixture(scope="module")
def alone() -> Iterator[GlooPool]:
    with GlooPool(1) as pool:
        yield pool


@pytest.mark.slow
@pytest.mark.xdist_group("gloo")
@pytest.mark.parametrize("backbone", ["small_convnet", "small_vit"])
def test_sharded_teachers_are_plain_moving_averages(alone: GlooPool, backbone: str) -> None:
    single = alone.run(train, backbone, 0, 0, 0, 5, None)[0]
    close_to(single["teacher"], single["plain"], 1e-6)
    stages = [(0, 0), (1, 0), (2, 0), (3, 0), (3, 100_000)] if backbone == "small_convnet" else [(3, 0)]
    for zero, threshold in stages:
        first, second = shared_pool().run(train, backbone, zero, threshold, 0, 5, None)
        assert first["losses"] == pytest.approx(single["losses"], abs=1e-4)
        close_to(first["teacher"], second["teacher"], 0)
        close_to(first["teacher"], first["plain"], 0 if zero < 3 else 1e-7)
        close_to(first["teacher"], single["teacher"], 1e-4)
        close_to(first["exported"], first["teacher"], 0)
        torch.testing.assert_close(first["queue"], second["queue"], rtol=0, atol=0)
        torch.testing.assert_close(first["queue"], single["queue"], rtol=0, atol=2e-4)
        assert not first["grads"]
        for name, count in first["whole"].items():
            assert first["held"][name] == (-(-count // 2) if zero == 3 else count), name


@pytest.mark.slow
@pytest.mark.xdist_group("gloo")
@pytest.mark.parametrize(("saved", "loaded"), [(3, 3), (3, 0), (0, 3)])
def test_a_teacher_resumes(tmp_path: Path, saved: int, loaded: int) -> None:
    folder = str(tmp_path / "checkpoint")
    straight = shared_pool().run(train, "small_convnet", saved, 100_000, 0, 6, None)[0]
    Path(folder).mkdir()
    shared_pool().run(train, "small_convnet", saved, 100_000, 0, 4, folder)
    resumed = shared_pool().run(train, "small_convnet", loaded, 100_000, 4, 6, folder)[0]
    close_to(resumed["teacher"], straight["teacher"], 0.0 if saved == loaded else 1e-6)
    torch.testing.assert_close(resumed["queue"], straight["queue"], rtol=0, atol=0.0 if saved == loaded else 1e-5)
