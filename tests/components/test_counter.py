"""Numbers that are a function of their coordinates: known outputs, distribution, independence."""

from __future__ import annotations

import math

import numpy as np
import torch
from scipy import stats

from armillary.components.counter import key, mix, sample_keys, shuffled, uniforms


def test_counter_is_splitmix64() -> None:
    # The first outputs of the reference generator seeded with 0: mix(0), mix(golden), mix(2 golden).
    golden = 0x9E3779B97F4A7C15
    states = torch.tensor([0, golden - 2**64, (2 * golden) % 2**64], dtype=torch.int64)
    expected = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    assert [value % 2**64 for value in mix(states).tolist()] == expected


def test_uniforms_are_uniform_and_independent() -> None:
    drawn = uniforms(sample_keys(key(1, 2), torch.arange(20_000)), 6).numpy()
    assert drawn.min() >= 0
    assert drawn.max() < 1
    for column in drawn.T:
        assert stats.kstest(column, "uniform").pvalue > 1e-5
    correlation = np.corrcoef(drawn.T) - np.eye(6)
    neighbours = [np.corrcoef(column[1:], column[:-1])[0, 1] for column in drawn.T]
    # Six standard errors of a correlation of 20,000 pairs.
    assert max(np.abs(correlation).max(), np.abs(neighbours).max()) < 6 / math.sqrt(20_000)


def test_keys_depend_on_every_part_and_on_order() -> None:
    keys = {key(a, b, c) for a in range(8) for b in range(8) for c in range(8)}
    assert len(keys) == 512


def test_shuffling_does_not_see_the_order_it_gets() -> None:
    values = torch.arange(100) * 7
    order = torch.randperm(100, generator=torch.Generator().manual_seed(0))
    assert torch.equal(shuffled(values, 3), shuffled(values[order], 3))
    assert not torch.equal(shuffled(values, 3), shuffled(values, 4))
