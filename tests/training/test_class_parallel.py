"""Class heads split over workers: every stage and number of workers trains what one plain PyTorch process trains."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from armillary import collectives
from armillary.losses import class_head
from armillary.objectives import Batch, BuildContext, Objective, registry
from armillary.spec.jobs import TrainJob
from armillary.testing.gloo_pool import GlooPool, shared_pool
from armillary.training.engine import Engine
from armillary.training.head_rows import ClassSampler
from armillary.training.optimizers import optimizer_over
from armillary.training.shards import ShardReader

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("gloo")]

BATCH, CLASSES, STEPS, LR, CLIP = 12, 7, 6, 0.02, 0.4
HEADS = {"arcface": {"scale": 8.0}, "softmax": {}, "normface": {"scale": 8.0}}


def make(head: str, classes: int = CLASSES) -> Objective:
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Linear(5, 9), nn.Tanh(), nn.Linear(9, 6))
    hyperparameters = registry.hyperparameters(head, HEADS.get(head, {}))
    return registry.get(head)(hyperparameters, BuildContext(encoder, 6, classes, 100))


def job(head: str, options: dict[str, Any]) -> TrainJob:
    settings = {"batch_size": BATCH, "workers": collectives.world_size(), "clip_norm": CLIP, **options}
    optimizer = {"name": settings.pop("optimizer", "adamw"), "weight_decay": 0.1}
    return TrainJob.model_validate({"objective": {"name": head}, "optimizer": optimizer, "train": settings})


def batches(classes: int = CLASSES) -> list[Batch]:
    stream = torch.Generator().manual_seed(5)
    return [
        Batch(
            (torch.randn(BATCH, 5, generator=stream),),
            torch.arange(BATCH),
            {"label": torch.randint(0, classes, (BATCH,), generator=stream)},
        )
        for _ in range(STEPS)
    ]


def plain(head: str, optimizer: str = "adamw") -> dict[str, Tensor]:
    """What PyTorch alone makes of it: one process, replicated rows, one clip over all gradients."""
    objective = make(head)
    made = optimizer_over(objective.parameters(), job(head, {"optimizer": optimizer}).optimizer)
    for group in made.param_groups:
        group["lr"] = LR
    for batch in batches():
        made.zero_grad()
        objective(batch).loss.backward()
        nn.utils.clip_grad_norm_(objective.parameters(), CLIP)
        made.step()
    return {name: value.detach() for name, value in objective.named_parameters()}


def train(
    head: str, options: dict[str, Any], first: int, last: int, load: str | None, save: str, classes: int = CLASSES
) -> list[float]:
    """Steps of the engine on this rank's part of each batch, and a checkpoint; returns the losses."""
    objective = make(head, classes)
    settings = job(head, options)
    engine = Engine(objective, settings, torch.device("cpu"))
    if load:
        engine.load(Path(load))
    share = BATCH // collectives.world_size()
    mine = slice(collectives.rank() * share, (collectives.rank() + 1) * share)
    losses = []
    for step, batch in enumerate(batches(classes)[:last]):
        if step >= first:
            objective.step = step
            parts, accumulate = batch.rows(mine), settings.train.accumulate
            size = share // accumulate
            micro = [parts.rows(slice(part * size, (part + 1) * size)) for part in range(accumulate)]
            losses.append(float(engine.step(micro, LR)["loss"]))
    Path(save).mkdir(parents=True, exist_ok=True)
    engine.save(Path(save))
    engine.close()
    return losses


def stored(folder: Path | str, kind: str = "param") -> dict[str, Tensor]:
    reader = ShardReader(Path(folder))
    return {name: reader.whole(kind, name) for name in reader.names(kind)}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name].flatten(), value.flatten(), rtol=0, atol=tolerance, msg=name)


@pytest.fixture(scope="module")
def alone() -> Iterator[GlooPool]:
    with GlooPool(1) as pool:
        yield pool


@pytest.fixture(scope="module")
def three() -> Iterator[GlooPool]:
    with GlooPool(3) as pool:
        yield pool


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_two_workers_equal_plain_pytorch(tmp_path: Path, head: str, zero: int) -> None:
    shared_pool().run(train, head, {"zero": zero}, 0, STEPS, None, str(tmp_path))
    assert_same(stored(tmp_path), plain(head), 1e-5)


@pytest.mark.parametrize("zero", [0, 3])
def test_one_worker_equals_plain_pytorch(tmp_path: Path, alone: GlooPool, zero: int) -> None:
    alone.run(train, "softmax", {"zero": zero, "optimizer": "sgd"}, 0, STEPS, None, str(tmp_path))
    assert_same(stored(tmp_path), plain("softmax", "sgd"), 1e-5)


def test_micro_batches_equal_one_batch(tmp_path: Path) -> None:
    shared_pool().run(train, "arcface", {"zero": 2, "accumulate": 3}, 0, STEPS, None, str(tmp_path))
    assert_same(stored(tmp_path), plain("arcface"), 1e-5)


def test_clipping_counts_the_rows(tmp_path: Path) -> None:
    """Without the rows' part in the norm the step would be another: the test above would fail by far more."""
    options = {"zero": 1, "optimizer": "sgd"}
    shared_pool().run(train, "arcface", {**options, "clip_norm": 0.0}, 0, STEPS, None, str(tmp_path / "free"))
    free, clipped = stored(tmp_path / "free"), plain("arcface", "sgd")
    assert (free["loss.weight"] - clipped["loss.weight"].flatten()).abs().max() > 0.05
    shared_pool().run(train, "arcface", options, 0, STEPS, None, str(tmp_path / "clipped"))
    assert_same(stored(tmp_path / "clipped"), clipped, 1e-5)


def test_rows_are_stored_by_class(tmp_path: Path) -> None:
    """Each worker's file holds its own classes' rows, with their momentum, and nothing of the others'."""
    shared_pool().run(train, "arcface", {"zero": 0}, 0, 1, None, str(tmp_path))
    from safetensors import safe_open

    for rank, (start, count) in enumerate([(0, 4), (4, 3)]):
        with safe_open(tmp_path / f"shard-0000{rank}.safetensors", framework="pt") as file:
            for kind in ("param", "exp_avg", "exp_avg_sq"):
                assert file.get_tensor(f"{kind}/loss.weight/{start * 6}").shape == (count * 6,)
            assert sum("loss.weight" in key for key in file.keys()) == 4  # noqa: SIM118 - those three and step


@pytest.mark.parametrize("workers", [1, 2, 3])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_a_checkpoint_of_two_goes_on_with_any(
    tmp_path: Path, alone: GlooPool, three: GlooPool, workers: int, optimizer: str
) -> None:
    options = {"zero": 3, "optimizer": optimizer}
    pool = {1: alone, 2: shared_pool(), 3: three}[workers]
    shared_pool().run(train, "softmax", options, 0, 3, None, str(tmp_path / "half"))
    pool.run(train, "softmax", options, 3, STEPS, str(tmp_path / "half"), str(tmp_path / "end"))
    assert_same(stored(tmp_path / "end"), plain("softmax", optimizer), 1e-5)
    if workers == 2:
        shared_pool().run(train, "softmax", options, 0, STEPS, None, str(tmp_path / "whole"))
        assert_same(stored(tmp_path / "end"), stored(tmp_path / "whole"), 0)


def margins(load: str | None, save: str | None) -> dict[str, Tensor]:
    """Fair Loss' margins of all classes, set to their numbers or loaded."""
    objective: Any = make("fair_loss")
    engine = Engine(objective, job("fair_loss", {}), torch.device("cpu"))
    if load:
        engine.load(Path(load))
    else:
        objective.loss.set_margins(torch.arange(CLASSES) / 10)
    if save:
        Path(save).mkdir(parents=True, exist_ok=True)
        engine.save(Path(save))
    found = engine.class_rows()
    engine.close()
    return found


def test_what_belongs_to_a_class_goes_with_its_row(tmp_path: Path, alone: GlooPool, three: GlooPool) -> None:
    """Margins of classes are no parameters, but split like them: any number of workers finds them by class."""
    folder = str(tmp_path)
    before = shared_pool().run(margins, None, folder)[0]
    assert torch.equal(before["loss.class_margins"], torch.arange(CLASSES) / 10)
    assert "loss.class_margins" not in stored(tmp_path)
    for pool in (alone, shared_pool(), three):
        for found in pool.run(margins, folder, None):
            assert_same(found, before, 0)


def test_fewer_classes_than_workers(tmp_path: Path, three: GlooPool) -> None:
    """Two classes over three workers: the last one owns no row."""
    losses = three.run(train, "arcface", {"zero": 0}, 0, STEPS, None, str(tmp_path), 2)
    assert torch.isfinite(torch.tensor(losses)).all()
    assert stored(tmp_path)["loss.weight"].numel() == 12


@pytest.mark.parametrize("workers", [1, 2])
def test_sampled_classes_alone_are_touched(tmp_path: Path, alone: GlooPool, workers: int) -> None:
    """Partial FC: rows outside the batch and the draw keep their values, and have no optimizer state."""
    classes, options = 60, {"zero": 0, "sample_rate": 0.2, "accumulate": 2}
    pool = alone if workers == 1 else shared_pool()
    losses = pool.run(train, "arcface", options, 0, 1, None, str(tmp_path), classes)
    again = pool.run(train, "arcface", options, 0, 1, None, str(tmp_path / "again"), classes)
    before = make("arcface", classes).get_parameter("loss.weight").detach()
    after, moment = (stored(tmp_path, kind)["loss.weight"].view(classes, 6) for kind in ("param", "exp_avg"))
    moved = (after != before).any(dim=1)
    assert losses == again
    assert moved[batches(classes)[0].label].all()
    assert 12 <= int(moved.sum()) < 40
    assert torch.equal(moved, (moment != 0).any(dim=1))


def test_sampling_everything_is_no_sampling(tmp_path: Path) -> None:
    """Rows picked, updated and put back make the same steps as rows updated in place."""
    whole = ClassSampler(0.999, 0, 4, make("arcface"), 0)
    assert whole(torch.tensor([1])).tolist() == [0, 1, 2, 3]
    shared_pool().run(train, "softmax", {"zero": 0, "sample_rate": 0.999}, 0, STEPS, None, str(tmp_path))
    assert_same(stored(tmp_path), plain("softmax"), 1e-5)


def test_the_draw_changes_with_the_step_and_holds_the_positives() -> None:
    objective = make("arcface")
    sampler, drawn = ClassSampler(0.1, 100, 1000, objective, seed=3), []
    for step in (0, 0, 1):
        objective.step = step
        ids = sampler(torch.tensor([5, 999]))
        assert {5, 999} <= set(ids.tolist())
        assert len(ids) == 100
        assert ids.tolist() == sorted(set(ids.tolist()))
        drawn.append(ids.tolist())
    assert drawn[0] == drawn[1]
    assert drawn[1] != drawn[2]
    assert len(sampler(torch.arange(300))) == 300


def train_half(*given: Any) -> list[float]:
    """As ``train``, with products in half precision whatever the processor."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(class_head, "half_products_pay", lambda *_: True)
        return train(*given)


@pytest.mark.parametrize("zero", [0, 3])
def test_bf16_stays_near_float32(tmp_path: Path, zero: int) -> None:
    """With more classes than a chunk, so that the products run in bfloat16 too."""
    losses = [
        shared_pool().run(
            train_half, "arcface", {"zero": zero, **kind}, 0, 3, None, str(tmp_path / str(len(kind))), 4500
        )
        for kind in ({}, {"precision": "bf16"})
    ]
    torch.testing.assert_close(torch.tensor(losses[1]), torch.tensor(losses[0]), rtol=2e-2, atol=0)
    exact, found = (stored(tmp_path / name)["loss.weight"] for name in ("0", "1"))
    start = make("arcface", 4500).get_parameter("loss.weight").detach().flatten()
    assert torch.cosine_similarity(exact - start, found - start, dim=0) > 0.9
