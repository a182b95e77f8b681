"""The engine: every ZeRO stage, one worker or two, a checkpoint or none: the same training."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from armillary import collectives
from armillary.components.normalization import convert_batch_norm
from armillary.objectives import Batch, BuildContext, Citation, Hyperparameters, Objective, Output
from armillary.spec.jobs import TrainJob
from armillary.testing.gloo_pool import GlooPool, shared_pool
from armillary.training.engine import Engine

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("gloo")]


class Toy(Objective):
    """A small classifier with a batch norm and a frozen parameter: everything a checkpoint must carry."""

    name, family, citation = "toy", "test", Citation("nobody", "nothing")

    def build(self, context: BuildContext) -> None:
        self.head = nn.Linear(context.embedding_dim, context.num_classes)

    def forward(self, batch: Batch) -> Output:
        logits = self.head(self.encoder(batch.views[0]))
        return Output(nn.functional.cross_entropy(logits, batch.label), {"logit": logits.detach().mean()})


def make() -> Toy:
    torch.manual_seed(0)
    # No bias before the norm: its gradient is zero but for rounding, which Adam would blow up to full steps.
    encoder = nn.Sequential(nn.Linear(5, 7, bias=False), nn.BatchNorm1d(7), nn.ReLU(), nn.Linear(7, 6))
    encoder[3].bias.requires_grad_(False)
    toy = Toy(Hyperparameters(), BuildContext(encoder, 6, 3, 100))
    convert_batch_norm(toy)
    return toy


def train(options: dict[str, Any], first: int, last: int, load: str | None, save: str | None) -> dict[str, Tensor]:
    """Steps ``first`` to ``last`` of a fixed stream on this rank's part; returns the encoder."""
    workers = collectives.world_size()
    job = TrainJob.model_validate(
        {
            "objective": {"name": "toy"},
            "optimizer": {"name": options.get("optimizer", "adamw")},
            "train": {"batch_size": 8, "workers": workers, "zero": options["zero"], "clip_norm": 0.5},
        }
    )
    engine = Engine(make(), job, torch.device("cpu"))
    if load:
        engine.load(Path(load))
    stream = torch.Generator().manual_seed(5)
    share = 8 // workers
    mine = slice(collectives.rank() * share, (collectives.rank() + 1) * share)
    for step in range(last):
        images, labels = torch.randn(8, 5, generator=stream), torch.randint(0, 3, (8,), generator=stream)
        if step >= first:
            engine.step([Batch((images[mine],), torch.arange(share), {"label": labels[mine]})], lr=0.01)
    if save:
        Path(save).mkdir(parents=True, exist_ok=True)
        engine.save(Path(save))
    state = {name: value.clone() for name, value in engine.encoder_copy(make().encoder).state_dict().items()}
    engine.close()
    return state


def close_to(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    for name, value in expected.items():
        assert torch.allclose(found[name].double(), value.double(), atol=tolerance, rtol=0), name


@pytest.fixture(scope="module")
def alone() -> Iterator[GlooPool]:
    """A group of one, in a process of its own: DeepSpeed remembers the first group it saw."""
    with GlooPool(1) as pool:
        yield pool


@pytest.fixture(scope="module")
def one_worker(alone: GlooPool) -> dict[str, Tensor]:
    state: dict[str, Tensor] = alone.run(train, {"zero": 0}, 0, 6, None, None)[0]
    return state


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_two_workers_at_every_stage_equal_one(one_worker: dict[str, Tensor], zero: int) -> None:
    first, second = shared_pool().run(train, {"zero": zero}, 0, 6, None, None)
    close_to(first, second, 0.0)
    close_to(first, one_worker, 1e-6)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize(("saved", "loaded"), [(0, 3), (3, 0), (1, 2), (3, 3), (2, 1), (0, 0)])
def test_a_checkpoint_goes_on_at_another_stage(tmp_path: Path, optimizer: str, saved: int, loaded: int) -> None:
    folder = str(tmp_path / "checkpoint")
    options = {"zero": saved, "optimizer": optimizer}
    whole = shared_pool().run(train, options, 0, 6, None, None)[0]
    shared_pool().run(train, options, 0, 3, None, folder)
    resumed = shared_pool().run(train, {**options, "zero": loaded}, 3, 6, folder, None)[0]
    close_to(resumed, whole, 0.0 if saved == loaded else 1e-6)


@pytest.mark.parametrize("zero", [0, 3])
def test_a_checkpoint_of_two_workers_goes_on_with_one(
    tmp_path: Path, alone: GlooPool, one_worker: dict[str, Tensor], zero: int
) -> None:
    folder = str(tmp_path / "checkpoint")
    shared_pool().run(train, {"zero": zero}, 0, 3, None, folder)
    close_to(alone.run(train, {"zero": 0}, 3, 6, folder, None)[0], one_worker, 1e-6)


def test_a_checkpoint_of_another_model(tmp_path: Path, alone: GlooPool) -> None:
    alone.run(train, {"zero": 0}, 0, 1, None, str(tmp_path))
    file = tmp_path / "shard-00000.safetensors"
    stored = load_file(file)
    stored["param/other.weight/0"] = stored.pop("param/head.weight/0")
    save_file(stored, file)
    with pytest.raises(RuntimeError, match=r"UserError.*another model"):
        alone.run(train, {"zero": 0}, 1, 2, str(tmp_path), None)
