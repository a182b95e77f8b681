"""Contrastive objectives: queues and teachers over steps, banks, attacks, stages, videos."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from armillary import losses
from armillary.components.encoders import map_encoder
from armillary.components.second_norms import SecondNorms
from armillary.components.stage_parameters import only_learning, stage_parameters
from armillary.losses.tensors import normalize
from armillary.objectives import Batch
from armillary.objectives.instance_discrimination import PIRL, InstaDisc, cut_tiles
from armillary.objectives.registry import get
from armillary.testing import steps, tiny
from armillary.testing.gloo_pool import shared_pool
from armillary.testing.steps import Case


class Method(Case):
    """An objective whose own attributes the tests look at."""

    def build(self, **arguments: Any) -> Any:
        return super().build(**arguments)


def case(name: str, **options: Any) -> Method:
    return Method(get(name), options)


def trained(which: Method, count: int = 2, **arguments: Any) -> Any:
    objective = which.build(**arguments)
    steps.train(objective, [which.batch(seed=seed) for seed in range(count)])
    return objective


# Queue and teacher.


@pytest.mark.parametrize("name", ["moco_v1", "moco_v2", "looc"])
def test_keys_enter_the_queue_after_their_step(name: str) -> None:
    which = case(name, queue_size=30)
    objective = which.build()
    objective.train()
    before = objective.queue.rows.clone()
    objective(which.batch()).loss.backward()
    assert torch.equal(objective.queue.rows, before)
    objective.after_step(0)
    assert torch.equal(objective.queue.rows[12:], before[12:])
    assert not torch.equal(objective.queue.rows[:12], before[:12])
    torch.testing.assert_close(objective.queue.rows.norm(dim=-1), torch.ones(objective.queue.rows.shape[:-1]))


def test_a_full_queue_goes_round() -> None:
    objective = trained(case("moco_v1", queue_size=30), 3)
    assert int(objective.queue.pointer) == 36 % 30
    assert len(objective.queue) == 30


def test_the_key_encoder_follows_by_its_momentum() -> None:
    which = case("moco_v2", momentum=0.75)
    objective = which.build()
    old = objective.encoder.neck.weight.detach().clone()
    steps.train(objective, [which.batch()])
    expected = 0.75 * old + 0.25 * objective.encoder.neck.weight.detach()
    torch.testing.assert_close(objective.teacher["encoder"].neck.weight, expected)
    assert all(parameter.grad is None for parameter in objective.teacher.parameters())


def test_moco_v3_momentum_rises_to_one() -> None:
    momentum = case("moco_v3").build().teacher.momentum
    assert momentum(0) == pytest.approx(0.99)
    assert momentum(10) == pytest.approx(0.995)
    assert momentum(20) == 1


def test_moco_v3_does_not_care_which_view_is_first() -> None:
    which = case("moco_v3")
    batch = which.batch(dtype=torch.float64)
    swapped = Batch(batch.views[::-1], batch.index, batch.fields)
    first, second = (which.build(dtype=torch.float64)(given).loss for given in (batch, swapped))
    torch.testing.assert_close(first, second)


@pytest.mark.parametrize("frozen", [True, False])
def test_moco_v3_freezes_a_transformers_patches(frozen: bool) -> None:
    objective = case("moco_v3", freeze_patches=frozen).build(encoder=tiny.TinyTokenEncoder())
    learns = {name for name, parameter in objective.encoder.named_parameters() if parameter.requires_grad}
    patches = {name for name, _ in objective.encoder.named_parameters() if "patch_embed" in name}
    assert patches
    assert (patches & learns) == (set() if frozen else patches)


def test_simclr_v2_without_memory_is_simclr() -> None:
    deep = case("simclr", projection_layers=3)
    torch.testing.assert_close(
        case("simclr_v2").build()(case("simclr_v2").batch()).loss, deep.build()(deep.batch()).loss
    )


@pytest.mark.xdist_group("gloo")
def test_simclr_v2_memory_over_two_workers() -> None:
    which = case("simclr_v2", memory_size=16)
    parts = shared_pool().run(steps.train_part, which, 3, torch.float64)
    whole, both = steps.train_case(which, 3, torch.float64), steps.joined(parts)
    assert both.losses == pytest.approx(whole.losses, rel=1e-8)
    for name, buffer in whole.buffers.items():
        torch.testing.assert_close(both.buffers[name], buffer, rtol=1e-8, atol=1e-8)
    assert whole.losses[1] != pytest.approx(steps.train_case(case("simclr_v2"), 3, torch.float64).losses[1])


def test_looc_without_own_negatives_is_moco_in_every_space() -> None:
    """Each head learns from its own space alone."""
    which = case("looc")
    objective = which.build()
    queries = objective.heads(objective.encoder(which.batch().views[0]))
    objective.loss(queries[:, 1], torch.randn(12, 8), objective.queue.rows[:, 1]).backward()
    touched = [
        any(p.grad is not None and bool(p.grad.any()) for p in head.parameters()) for head in objective.heads.heads
    ]
    assert touched == [False, True, False]


# Banks.


def test_a_row_moves_by_the_memorys_momentum() -> None:
    memory = torch.tensor([[-1.0, 1.0, 0.0]])
    v = torch.tensor([[0.5, -1.2, 0.3]])
    expected = torch.tensor([[-0.74687392, -0.4322284, 0.50532956]])
    which = case("instadisc", projection_dim=3)
    bank = which.build().bank
    bank.rows[5] = normalize(memory)[0]
    bank.hold(0, torch.tensor([5]), normalize(v))
    bank.write(0.5)
    # Opposite vectors of unit length nearly cancel, so that the worked number pins the order of mixing and scaling.
    torch.testing.assert_close(bank.rows[5:6], expected, atol=1e-5, rtol=0)


def test_proximal_term() -> None:
    old, v = normalize(torch.tensor([[-1.0, 1.0, 0.0]])), normalize(torch.tensor([[0.5, -1.2, 0.3]]))
    assert float(30 * (v - old).square().sum()) == pytest.approx(114.05989188, abs=1e-4)
    near, far = (
        case("instadisc", estimator="softmax", proximal=weight).build()(case("instadisc").batch()).loss
        for weight in (0.0, 30.0)
    )
    objective = case("instadisc").build()
    batch = case("instadisc").batch()
    vectors = normalize(objective.projector(objective.encoder(batch.views[0])))
    distance = (vectors - objective.bank.lookup(batch.index)).square().sum(1).mean()
    torch.testing.assert_close(far - near, 30 * distance)


def test_noise_is_drawn_by_sample_and_step_among_training_rows() -> None:
    which = case("instadisc")
    objective = which.build()
    assert isinstance(objective, InstaDisc)
    index = torch.tensor([3, 9, 20])
    drawn = objective.draw(index, 50)
    assert torch.equal(objective.draw(index.flip(0), 50), drawn.flip(0))
    objective.step = 1
    assert not torch.equal(objective.draw(index, 50), drawn)
    steps.train(objective, [which.batch()])
    objective.epoch = 1
    assert set(objective.draw(index, 200).flatten().tolist()) == set(range(12))


def test_a_batch_changes_its_own_rows_alone() -> None:
    which = case("pirl")
    objective = which.build()
    before = objective.bank.rows.clone()
    steps.train(objective, [which.batch()])
    assert torch.equal(objective.bank.rows[12:], before[12:])
    torch.testing.assert_close(objective.bank.rows.norm(dim=1), torch.ones(64))


@pytest.mark.parametrize(("weight", "learns"), [(0.0, ("projector",)), (1.0, ("tile_head", "puzzle_head"))])
def test_pirl_branches(weight: float, learns: tuple[str, ...]) -> None:
    which = case("pirl", jigsaw_weight=weight)
    objective = which.build()
    assert isinstance(objective, PIRL)
    objective(which.batch()).loss.backward()
    for name in ("projector", "tile_head", "puzzle_head"):
        gradients = [parameter.grad for parameter in getattr(objective, name).parameters()]
        moved = any(gradient is not None and bool(gradient.any()) for gradient in gradients)
        assert moved == (name in learns), name


def test_tiles_of_a_puzzle() -> None:
    puzzle = torch.arange(2 * 6 * 9).view(2, 1, 6, 9)
    tiles = cut_tiles(puzzle, 3)
    assert tiles.shape == (18, 1, 2, 3)
    assert torch.equal(tiles[9 + 5, 0], puzzle[1, 0, 2:4, 6:9])


# Attacks.

A = [[0.5, -1.2, 0.3], [1.0, 0.4, -0.7], [-0.8, 0.9, 0.1], [0.2, -0.5, 1.1]]
B = [[0.6, -1.0, 0.1], [0.8, 0.6, -0.9], [-0.7, 1.1, -0.2], [0.0, -0.4, 1.3]]


class Identity(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1)


def test_clae_worked_numbers() -> None:
    objective = case("clae", epsilon=0.03).build(encoder=Identity(), embedding_dim=3, dtype=torch.float64)
    objective.projector = nn.Identity()
    objective.second = SecondNorms(objective, ("projector",))
    view1, view2 = (torch.tensor(values, dtype=torch.float64).view(4, 1, 1, 3) for values in (A, B))
    hard = objective.attacked(view1)
    signs = [[1, 1, 1], [1, -1, 1], [1, 1, 1], [1, -1, -1]]
    torch.testing.assert_close(hard - view1, 0.03 * torch.tensor(signs, dtype=torch.float64).view(4, 1, 1, 3))
    assert float(losses.NTXent(0.5)(view1.flatten(1), view1.flatten(1))) == pytest.approx(0.55979763, abs=1e-8)
    output = objective(Batch((view1, view2), torch.arange(4)))
    assert float(output.metrics["adversarial"]) == pytest.approx(0.57430607, abs=1e-8)
    assert float(output.metrics["standard"]) == pytest.approx(0.55672791, abs=1e-8)
    assert float(output.loss) == pytest.approx(1.13103398, abs=1e-8)


def test_the_attack_touches_no_parameter_and_stays_within_epsilon() -> None:
    which = case("clae", epsilon=0.02)
    objective, batch = which.build(), which.batch()
    change = objective.attacked(batch.views[0]) - batch.views[0]
    assert all(parameter.grad is None for parameter in objective.parameters())
    assert float(change.abs().max()) == pytest.approx(0.02, rel=1e-4)


def test_clae_without_attack_is_its_base() -> None:
    which = case("clae", alpha=0.0)
    base = case("simclr", temperature=0.5)
    torch.testing.assert_close(which.build()(which.batch()).loss, base.build()(base.batch()).loss)


def test_second_norms_keep_their_own_statistics() -> None:
    which = case("clae")
    objective = which.build()
    objective(which.batch())
    first, second = objective.encoder.first[1], objective.second.norms[0]
    assert objective.second.places[0] == "encoder.first.1"
    assert first is not second
    assert second.momentum == 0.01
    with objective.second.used_by(objective):
        assert objective.encoder.first[1] is second
    assert objective.encoder.first[1] is first
    assert not torch.equal(first.running_mean, second.running_mean)


# Stages.


class FourStages(nn.Module):
    """A network of four linear maps over channels."""

    any_size = True
    stage_channels = (3, 4, 5, 6)

    def __init__(self) -> None:
        super().__init__()
        sizes = [1, 3, 4, 5, 6]
        self.layers = nn.ModuleList(nn.Conv2d(a, b, 1) for a, b in pairwise(sizes))
        self.neck = nn.Linear(6, 8)

    def stages(self, images: Tensor) -> tuple[Tensor, ...]:
        maps = []
        hidden = images
        for layer in self.layers:
            hidden = torch.tanh(layer(hidden))
            maps.append(hidden)
        return tuple(maps)

    def embed_map(self, last_map: Tensor) -> Tensor:
        return self.neck(last_map.mean(dim=(2, 3)))  # type: ignore[no-any-return]

    def forward(self, images: Tensor) -> Tensor:
        return self.embed_map(self.stages(images)[-1])


def test_stages_own_their_parameters() -> None:
    owned = stage_parameters(FourStages(), 1, (6, 6))
    expected = [[f"layers.{stage}.weight", f"layers.{stage}.bias"] for stage in range(4)]
    assert owned == [*expected, ["neck.weight", "neck.bias"]]


@pytest.mark.parametrize(
    ("overlap", "wiring"), [(True, [{0, 1}, {1, 2}, {2, 3, "neck"}]), (False, [{0}, {1}, {2}, {3, "neck"}])]
)
def test_which_losses_reach_which_stage(overlap: bool, wiring: list[set[Any]]) -> None:
    which = case("loco", overlap=overlap)
    objective = which.build(encoder=FourStages())
    images = torch.cat(which.batch().views)
    found = []
    for unit in range(len(wiring)):
        objective.zero_grad()
        objective.unit_loss(unit, images).backward()
        reached: set[Any] = {
            stage for stage, layer in enumerate(objective.encoder.layers) if layer.weight.grad is not None
        }
        found.append(reached | ({"neck"} if objective.encoder.neck.weight.grad is not None else set()))
    assert found == wiring
    assert all(parameter.requires_grad for parameter in objective.parameters())


def test_loco_of_two_stages_is_simclr() -> None:
    which = case("loco", temperature=0.1)
    local, whole = which.build(), case("simclr", temperature=0.1).build()
    whole.projector.load_state_dict(local.projectors[0].state_dict())
    whole.encoder.load_state_dict(local.encoder.state_dict())
    for objective in (local, whole):
        objective(which.batch()).loss.backward()
    for name, parameter in whole.encoder.named_parameters():
        torch.testing.assert_close(local.encoder.get_parameter(name).grad, parameter.grad)


def test_only_learning_gives_back_what_learned() -> None:
    encoder = FourStages()
    encoder.neck.requires_grad_(False)
    with only_learning(encoder, ["layers.1.weight"]):
        assert [name for name, p in encoder.named_parameters() if p.requires_grad] == ["layers.1.weight"]
        assert not map_encoder(encoder).stages(torch.rand(2, 1, 4, 4))[0].requires_grad
    assert [name for name, p in encoder.named_parameters() if not p.requires_grad] == ["neck.weight", "neck.bias"]


# Videos.


def test_frames_that_are_asked_for() -> None:
    cls: Any = get("temporal_contrastive")
    counts = [
        cls.needs_for(cls.Hyperparameters(formulation=formulation, clip_length=4, horizon=2)).views
        for formulation in ("paper", "clips", "survey")
    ]
    assert counts == [12, 8, 4]
    assert cls.needs_for(cls.Hyperparameters()).views == cls.needs.views


def test_clips_are_simclr_on_their_means() -> None:
    which = case("temporal_contrastive", formulation="clips")
    objective, batch = which.build(), which.batch()
    frames = objective.projector(objective.encoder(torch.cat(batch.views))).chunk(4)
    expected = losses.NTXent(0.1)((frames[0] + frames[1]) / 2, (frames[2] + frames[3]) / 2)
    torch.testing.assert_close(which.build()(batch).loss, expected)


def test_a_context_does_not_see_what_comes_later() -> None:
    objective = case("temporal_contrastive").build()
    parts = torch.randn(2, 4, 8)
    changed = parts.clone()
    changed[:, 2:] += 1
    contexts, others = objective.contexts(parts), objective.contexts(changed)
    assert torch.equal(contexts[:, :2], others[:, :2])
    assert not torch.equal(contexts[:, 2:], others[:, 2:])
