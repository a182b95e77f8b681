"""Every registered objective under DeepSpeed: two workers at ZeRO 3 compute what they compute at ZeRO 0, and resume."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from armillary import collectives
from armillary.components.normalization import convert_batch_norm
from armillary.objectives import names, registry
from armillary.spec.jobs import TrainJob
from armillary.testing import tiny
from armillary.testing.gloo_pool import shared_pool
from armillary.training.engine import Engine

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("gloo")]

BATCH = 12
# Steps an epoch: checkpoints are made between epochs.
EPOCH = 2


@dataclass
class Trained:
    """Each step's loss, and the exported encoder at the end."""

    losses: list[float]
    encoder: dict[str, Tensor]


def train(name: str, zero: int, first: int, last: int, load: str | None, save: str | None) -> Trained:
    """Steps ``first`` to ``last`` of a fixed stream of tiny batches on this rank's part."""
    cls, workers = registry.get(name), collectives.world_size()
    job = TrainJob.model_validate(
        {
            "objective": {"name": name},
            "optimizer": {"name": "sgd"},
            "train": {"batch_size": BATCH, "workers": workers, "zero": zero, "clip_norm": 10.0},
        }
    )
    objective = tiny.build(cls)
    template = tiny.build(cls).exported()
    convert_batch_norm(objective)
    convert_batch_norm(template)
    needs = cls.needs_for(tiny.hyperparameters(cls, {}))
    batches = [tiny.part(tiny.batch(needs, BATCH, seed=seed), collectives.rank(), workers) for seed in range(last)]
    engine = Engine(objective, job, torch.device("cpu"))
    try:
        if load:
            engine.load(Path(load))
        objective.train()
        losses = []
        for step in range(first, last):
            if step % EPOCH == 0:
                objective.epoch = step // EPOCH
                with engine.whole_parameters():
                    objective.before_epoch(step // EPOCH, lambda: iter(batches[:1]))
                objective.train()
            objective.step = step
            losses.append(float(engine.step([batches[step]], lr=0.01)["loss"]))
            objective.after_step(step)
        if save:
            Path(save).mkdir(parents=True, exist_ok=True)
            engine.save(Path(save))
        encoder = {key: value.clone() for key, value in engine.encoder_copy(template).state_dict().items()}
        return Trained(losses, encoder)
    finally:
        engine.close()


def close_to(found: Trained, expected: Trained, tolerance: float) -> None:
    assert found.losses == pytest.approx(expected.losses, rel=tolerance, abs=tolerance)
    for key, value in expected.encoder.items():
        assert torch.allclose(found.encoder[key], value, rtol=tolerance, atol=tolerance), key


@pytest.mark.parametrize("name", names())
def test_stages_agree_and_a_checkpoint_resumes(name: str, tmp_path: Path) -> None:
    folder = str(tmp_path / "checkpoint")
    whole = shared_pool().run(train, name, 0, 0, 4, None, None)
    for rank in whole:
        assert all(torch.isfinite(torch.tensor(rank.losses)))
    sharded = shared_pool().run(train, name, 3, 0, 2, None, folder)
    resumed = shared_pool().run(train, name, 3, 2, 4, folder, None)
    for rank in range(2):
        joined = Trained(sharded[rank].losses + resumed[rank].losses, resumed[rank].encoder)
        close_to(joined, whole[rank], 1e-4)
