"""Masks, dropout and the numbers they are drawn from: by key alone."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from armillary.components.counter import integers, key, normals, permutations, sample_keys
from armillary.components.dropout import CounterDropout, counter_dropout, dropout_keys
from armillary.components.masks import block_mask, random_keep, random_mask

KEYS = sample_keys(key(1, 2), torch.arange(400))


def test_distributions() -> None:
    drawn = normals(KEYS, 500)
    assert abs(float(drawn.mean())) < 0.01
    assert abs(float(drawn.std()) - 1) < 0.01
    assert abs(float((drawn < -1.6449).float().mean()) - 0.05) < 0.003
    whole = integers(KEYS, 500, 7)
    counts = torch.bincount(whole.flatten(), minlength=7) / whole.numel()
    assert len(counts) == 7
    assert float((counts - 1 / 7).abs().max()) < 0.005
    orders = permutations(KEYS, 5)
    assert torch.equal(orders.sort(dim=1).values, torch.arange(5).expand(400, 5))
    first = torch.bincount(orders[:, 0], minlength=5) / 400
    assert float((first - 0.2).abs().max()) < 0.08


def test_random_masks() -> None:
    keep, hidden = random_keep(KEYS, 64, 0.75)
    assert keep.shape == (400, 16)
    assert torch.equal(hidden.sum(dim=1), torch.full((400,), 48))
    assert not hidden.gather(1, keep).any()
    assert torch.equal(random_mask(KEYS[7:9], 64, 0.75), hidden[7:9])
    share = hidden.float().mean(dim=0)
    assert float((share - 0.75).abs().max()) < 0.1
    assert random_keep(KEYS, 10, 0.9)[0].shape == (400, 1)
    with pytest.raises(ValueError, match="none stays"):
        random_keep(KEYS, 10, 0.95)


def test_block_masks_have_the_count_that_is_asked_for() -> None:
    count = torch.arange(400) % 49
    hidden = block_mask(KEYS, (6, 8), count)
    assert torch.equal(hidden.sum(dim=1), count)
    assert torch.equal(block_mask(KEYS[30:33], (6, 8), count[30:33]), hidden[30:33])


def test_block_masks_are_blocks() -> None:
    count = torch.full((400,), 26)

    def neighbours(hidden: torch.Tensor) -> float:
        image = hidden.view(-1, 8, 8).float()
        return float((image[:, 1:] * image[:, :-1]).sum() + (image[:, :, 1:] * image[:, :, :-1]).sum()) / 400

    blocks, single = block_mask(KEYS, (8, 8), count), random_mask(KEYS, 64, 38 / 64)
    assert single.sum() == blocks.sum() + 400 * 12
    assert neighbours(blocks) > 1.5 * neighbours(random_mask(KEYS, 64, 26 / 64))
    share = blocks.float().mean(dim=0)
    assert float(share.min()) > 0.08


def test_dropout_by_sample() -> None:
    layer, twin = CounterDropout(0.3, layer=1), CounterDropout(0.3, layer=2)
    values = torch.ones(400, 6, 20)
    assert torch.equal(layer(values), values)
    with dropout_keys(nn.ModuleList([layer, twin]), KEYS):
        dropped = layer(values)
        assert not torch.equal(dropped, twin(values))
        assert torch.equal(layer.eval()(values), values)
        layer.train()
    with dropout_keys(layer, KEYS[50:60]):
        assert torch.equal(layer(values[50:60]), dropped[50:60])
    assert layer.keys is None
    assert sorted(set(dropped.flatten().tolist())) == pytest.approx([0, 1 / 0.7])
    assert abs(float((dropped == 0).float().mean()) - 0.3) < 0.01
    with pytest.raises(ValueError, match="found 1"):
        CounterDropout(1.0)


def test_dropout_takes_the_place_of_torchs() -> None:
    model = counter_dropout(nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5), nn.Sequential(nn.Dropout(0.1))))
    layers = [module for module in model.modules() if isinstance(module, CounterDropout)]
    assert sorted((layer.p, layer.layer) for layer in layers) == [(0.1, 2), (0.5, 1)]
    assert not any(isinstance(module, nn.Dropout) for module in model.modules())
