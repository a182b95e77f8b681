"""Random numbers that are a pure function of their coordinates, for views, splits, masks and dropout.

A generator with state would make a sample's augmentation depend on what was drawn before it, hence on the batch, the
rank and the number of workers. Here every number is the hash of where it is used: SplitMix64 (Steele, Lea and Flood,
"Fast Splittable Pseudorandom Number Generators", OOPSLA 2014), whose finaliser passes BigCrush on plain counters,
computed in wrapping int64 tensors. The bits are the same on every device, worker count and torch version.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15
_MULTIPLIERS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
_SHIFTS = (30, 27, 31)
_MASK = (1 << 64) - 1


def _signed(value: int) -> int:
    """The int64 with the same 64 bits."""
    value &= _MASK
    return value - (1 << 64) if value >> 63 else value


def mix(words: Tensor) -> Tensor:
    """SplitMix64's finaliser: a bijection on 64-bit words that changes half of the bits when one input bit changes.

    Args:
        words: int64, any shape.
    """
    mixed = words + _signed(_GOLDEN)
    for position, shift in enumerate(_SHIFTS):
        # ``>>`` on int64 copies the sign bit; the mask makes it a logical shift.
        mixed = mixed ^ ((mixed >> shift) & ((1 << (64 - shift)) - 1))
        if position < len(_MULTIPLIERS):
            mixed = mixed * _signed(_MULTIPLIERS[position])
    return mixed


def key(*parts: int) -> int:
    """One int64 from several integers; their order counts."""
    word = 0
    for part in parts:
        word = (word ^ (int(part) & _MASK)) & _MASK
        word = (word + _GOLDEN) & _MASK
        for position, shift in enumerate(_SHIFTS):
            word ^= word >> shift
            if position < len(_MULTIPLIERS):
                word = (word * _MULTIPLIERS[position]) & _MASK
    return _signed(word)


def sample_keys(base: int, index: Tensor) -> Tensor:
    """One int64 key for every sample, ``index``'s shape, from :func:`key`'s word and the samples' positions."""
    return mix(mix(index) ^ base)


def words(keys: Tensor, count: int) -> Tensor:
    """``count`` random int64 words for every key, ``(len(keys), count)``."""
    counter = torch.arange(1, count + 1, device=keys.device, dtype=torch.int64) * _signed(_GOLDEN)
    return mix(keys[:, None] + counter)


def uniforms(keys: Tensor, count: int) -> Tensor:
    """``count`` float32 numbers, uniform in [0, 1) in steps of 2^-24, for every key: ``(len(keys), count)``."""
    return ((words(keys, count) >> 40) & ((1 << 24) - 1)).to(torch.float32) * 2.0**-24


def normals(keys: Tensor, count: int) -> Tensor:
    """``count`` float32 numbers of the standard normal distribution for every key (Box and Muller 1958)."""
    u = uniforms(keys, 2 * count)
    # 1 - u lies in (0, 1], where the logarithm is finite.
    return (-2 * (1 - u[:, :count]).log()).sqrt() * (2 * math.pi * u[:, count:]).cos()


def integers(keys: Tensor, count: int, high: int) -> Tensor:
    """``count`` int64 numbers in 0 .. high - 1 for every key; high at most 2^24."""
    return (uniforms(keys, count).double() * high).long()


def permutations(keys: Tensor, size: int) -> Tensor:
    """One order of 0 .. size - 1 for every key, ``(len(keys), size)`` int64."""
    return words(keys, size).argsort(dim=1, stable=True)


def shuffled(values: Tensor, base: int) -> Tensor:
    """A fixed order of distinct int64 values: by the hash of each with ``base``, whatever order they come in."""
    return values[torch.argsort(sample_keys(base, values), stable=True)]
