"""Terms beside objectives: what they add, what they refuse, and that workers agree."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from armillary.components.normalization import convert_batch_norm
from armillary.losses.self_distillation import KoLeo
from armillary.objectives import Needs, Objective, get
from armillary.objectives.base import BuildContext
from armillary.objectives.terms import (
    ChosenTerm,
    WithTerms,
    choose_terms,
    describe_term,
    needs_with_terms,
    term_names,
    with_terms,
)
from armillary.spec.errors import UserError
from armillary.spec.jobs import TermSpec, TrainJob
from armillary.testing import steps, tiny
from armillary.testing.gloo_pool import shared_pool
from armillary.training.preflight import plan

SMALL: dict[str, dict[str, Any]] = {
    "vib": {"size": 4},
    "ceb": {"size": 4},
    "sufficient_contrastive": {"decoder_hidden": 8},
}
OBJECTIVES = ("arcface", "simclr", "triplet")


def chosen(name: str, weight: float = 0.5, **options: Any) -> tuple[ChosenTerm, ...]:
    return choose_terms([TermSpec(name=name, weight=weight, **{**SMALL.get(name, {}), **options})])


def built(objective: str, terms: tuple[ChosenTerm, ...], dtype: torch.dtype) -> tuple[Objective, Needs]:
    cls = get(objective)
    torch.manual_seed(0)
    values = tiny.hyperparameters(cls, {})
    context = BuildContext(
        encoder=tiny.encoder_for(cls.needs_for(values)),
        embedding_dim=tiny.EMBEDDING_DIM,
        num_classes=tiny.NUM_CLASSES,
        num_samples=64,
        dataset_size=64,
        batch_size=12,
        image_size=(tiny.HEIGHT, tiny.WIDTH),
        tables={"class_graph": torch.tensor([[0, 1], [1, 0]]), "class_graph_weight": torch.tensor([0.5, 0.5])},
    )
    whole = with_terms(cls(values, context), terms, context).to(dtype)
    return whole, needs_with_terms(cls.needs_for(values), terms, objective)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("name", term_names())
def test_a_term_trains_with_its_objective(name: str, objective: str) -> None:
    whole, needs = built(objective, chosen(name), torch.float32)
    plain, _ = built(objective, (), torch.float32)
    batch = tiny.batch(needs, seed=0)
    output, alone = whole(batch), plain(batch)
    assert output.loss.requires_grad
    expected = alone.loss + 0.5 * output.metrics[f"term_{name}"]
    torch.testing.assert_close(output.loss, expected)
    assert not plain.state_dict().keys() & {"terms"}
    trace = steps.train(whole, [tiny.batch(needs, seed=seed) for seed in range(3)])
    assert all(torch.isfinite(torch.tensor(trace.losses)))
    for key, parameter in whole.named_parameters():
        if key.startswith("terms."):
            assert parameter.grad is not None, key
            assert parameter.grad.abs().max() > 0, key


def test_what_a_term_adds() -> None:
    whole, needs = built("simclr", chosen("koleo", 0.25), torch.float64)
    plain, _ = built("simclr", (), torch.float64)
    batch = tiny.batch(needs, dtype=torch.float64)
    views = plain.encoder(torch.cat(batch.views)).chunk(2)
    expected = plain(batch).loss + 0.25 * (KoLeo()(views[0]) + KoLeo()(views[1])) / 2
    torch.testing.assert_close(whole(batch).loss, expected)
    assert isinstance(whole, WithTerms)
    assert whole.exported() is whole.objective.encoder


def test_the_lower_bound_variant() -> None:
    whole, needs = built("simclr", chosen("sufficient_contrastive", variant="LBE"), torch.float64)
    assert torch.isfinite(whole(tiny.batch(needs, dtype=torch.float64)).loss)


def test_state_of_terms_moves_after_a_step() -> None:
    whole, needs = built("arcface", chosen("center_loss"), torch.float32)
    batch = tiny.batch(needs)
    before = {key: value.clone() for key, value in whole.named_buffers() if "centers" in key}
    whole(batch).loss.backward()
    assert all(torch.equal(dict(whole.named_buffers())[key], value) for key, value in before.items())
    whole.after_step(0)
    assert before
    assert not any(torch.equal(dict(whole.named_buffers())[key], value) for key, value in before.items())


def part(objective: str, name: str) -> steps.Trace:
    whole, needs = built(objective, chosen(name), torch.float64)
    convert_batch_norm(whole)
    rank, size = dist.get_rank(), dist.get_world_size()
    batches = [tiny.part(tiny.batch(needs, dtype=torch.float64, seed=seed), rank, size) for seed in range(2)]
    return steps.train(whole, batches, average=True)


@pytest.mark.xdist_group("gloo")
@pytest.mark.parametrize("name", [name for name in term_names() if name != "ring_loss"])
@pytest.mark.parametrize("objective", ["arcface", "simclr"])
def test_two_workers_equal_one(objective: str, name: str) -> None:
    whole, needs = built(objective, chosen(name), torch.float64)
    trace = steps.train(whole, [tiny.batch(needs, dtype=torch.float64, seed=seed) for seed in range(2)])
    both = steps.joined(shared_pool().run(part, objective, name))
    assert both.losses == pytest.approx(trace.losses, rel=1e-8, abs=1e-8)
    for key, value in trace.gradients.items():
        torch.testing.assert_close(both.gradients[key], value, rtol=1e-7, atol=1e-8)
    for key, value in trace.buffers.items():
        torch.testing.assert_close(both.buffers[key], value, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize(
    ("terms", "says"),
    [
        ([{"name": "koleos", "weight": 1}], r"objective\.terms\.0\.name: unknown term 'koleos'"),
        ([{"name": "koleo", "weight": 1, "neighbors": 2}], r"no hyperparameter 'neighbors'"),
        ([{"name": "koleo", "weight": 1, "neighbours": 0}], r"objective\.terms\.0\.neighbours"),
        ([{"name": "koleo", "weight": 1}, {"name": "koleo", "weight": 2}], r"terms\.1\.name: 'koleo' is there twice"),
    ],
)
def test_mistakes_are_named(terms: list[dict[str, Any]], says: str) -> None:
    with pytest.raises(UserError, match=says):
        choose_terms([TermSpec(**term) for term in terms])


def test_terms_need_embeddings() -> None:
    with pytest.raises(UserError, match="takes no embeddings"):
        needs_with_terms(Needs(encoder="maps"), chosen("koleo"))
    needs = needs_with_terms(replace(get("simclr").needs, batch_coupled=False), chosen("vib"))
    assert needs.fields == ("label",)
    assert not needs.batch_coupled


def test_a_job_with_terms_is_planned(orl: object) -> None:
    objective = {"name": "arcface", "terms": [{"name": "koleo", "weight": 0.1}]}
    values = {"data": {"name": "orl", "image_size": [32, 32]}, "objective": objective, "train": {"epochs": 1}}
    ready = plan(TrainJob.model_validate(values))
    assert ready.needs.batch_coupled
    assert isinstance(ready.build(), WithTerms)
    broken = TrainJob.model_validate(
        {**values, "objective": {"name": "arcface", "terms": [{"name": "x", "weight": 1}]}}
    )
    with pytest.raises(UserError, match="unknown term"):
        plan(broken)
    with pytest.raises(ValueError, match="greater than 0"):
        TermSpec(name="koleo", weight=0)


@pytest.mark.parametrize("name", term_names())
def test_every_term_is_described(name: str) -> None:
    described = describe_term(name)
    assert len(described["summary"]) > 20
    assert all(option["description"] for option in described["hyperparameters"].values())
