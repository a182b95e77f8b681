"""Tokenizers of the training part, partners of sentences, and recipes that fit together."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from armillary.components.graphs import AUGMENTATIONS, GIN, augment, unpack
from armillary.data.text import Partners, encode, train_tokenizer
from armillary.spec.errors import UserError
from armillary.spec.jobs import TrainJob
from armillary.spec.loading import load_job
from armillary.training.preflight import plan

RECIPES = Path(__file__).parents[2] / "jobs" / "recipes"


def test_words_and_padding() -> None:
    tokenizer = train_tokenizer(["a bald person"] * 9 + ["a person with red hair"] * 9)
    ids, vocabulary = encode(tokenizer, ["A BALD person", "a", "Ω"])
    assert ids.shape == (3, 3)
    assert ids[1].tolist() == [int(ids[0, 0]), 0, 0]
    assert int(ids[2, 0]) == 1
    assert int(ids.max()) < vocabulary
    assert train_tokenizer(["a bald person"] * 9 + ["a person with red hair"] * 9) == tokenizer


def test_partners() -> None:
    label = torch.tensor([0, 1, 0, 2, 1, 0])
    ids = torch.tensor([[1, 2], [1, 3], [4, 5], [6, 7], [4, 8], [9, 9]])
    partners, rows = Partners(ids, label, torch.arange(6)), torch.arange(6)
    seen = set()
    for epoch in range(20):
        positive, negative = (draw(rows, 0, epoch) for draw in (partners.positives, partners.negatives))
        assert torch.equal(label[positive], label)
        assert (positive != rows)[label != 2].all()
        assert (label[negative] != label).all()
        assert torch.equal(partners.positives(rows[3:], 0, epoch), positive[3:])
        seen.add(tuple(positive.tolist()))
    assert len(seen) > 1
    # Of eight draws from others, the one that shares a word.
    assert int(partners.negatives(rows, 0, 0)[0]) == 1


@pytest.mark.parametrize("name", ["sentences", "image_text", "graphs"])
def test_recipes(name: str) -> None:
    job = load_job(RECIPES / f"{name}.yaml", kind="train")
    assert isinstance(job, TrainJob)
    ready = plan(job)
    batch = next(iter(ready.batches().epoch(0)))
    torch.manual_seed(0)
    assert torch.isfinite(ready.build()(batch).loss)
    assert bool(ready.data.tokenizer) == (name != "graphs")


def test_objective_and_network_of_two_kinds() -> None:
    job = load_job(RECIPES / "sentences.yaml", ["backbone.name=small_convnet"], kind="train")
    assert isinstance(job, TrainJob)
    with pytest.raises(UserError, match="simcse is given text and small_convnet takes image"):
        plan(job)


@pytest.mark.parametrize("name", [*AUGMENTATIONS, "random"])
def test_changes_of_graphs(name: str) -> None:
    job = load_job(RECIPES / "graphs.yaml", kind="train")
    assert isinstance(job, TrainJob)
    pictures = plan(job).data.train.images[torch.arange(16)].float() / 255
    keys = torch.arange(16)
    before, after = unpack(pictures), unpack(augment(pictures, keys, name, 0.2))
    torch.testing.assert_close(after.adjacency, after.adjacency.transpose(1, 2))
    assert not after.adjacency[~(after.mask[:, :, None] & after.mask[:, None, :])].any()
    assert not (after.mask & ~before.mask).any()
    size = before.mask.sum(1)
    if name in ("node_drop", "subgraph"):
        assert torch.equal(after.mask.sum(1), size - (0.2 * size).long())
    if name == "edge_perturbation":
        assert torch.equal(after.adjacency.sum((1, 2)), before.adjacency.sum((1, 2)))
        assert (after.adjacency != before.adjacency).any()
    half = augment(pictures[8:], keys[8:], name, 0.2)
    assert torch.equal(half, augment(pictures, keys, name, 0.2)[8:])


def test_gin_forgets_the_order_of_nodes() -> None:
    job = load_job(RECIPES / "graphs.yaml", kind="train")
    assert isinstance(job, TrainJob)
    pictures = plan(job).data.train.images[torch.arange(4)].float() / 255
    nodes, features = pictures.shape[2], pictures.shape[3] - pictures.shape[2] - 1
    order = torch.randperm(nodes, generator=torch.Generator().manual_seed(0))
    columns = torch.cat([torch.arange(1 + features), 1 + features + order])
    torch.manual_seed(0)
    encoder = GIN(features, 8)
    torch.testing.assert_close(encoder(pictures[:, :, order][..., columns]), encoder(pictures), rtol=1e-4, atol=1e-4)
