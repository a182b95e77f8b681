"""Jigsaw puzzles: tiles of an image in one of a set of orders (Noroozi and Favaro, ECCV 2016)."""

from __future__ import annotations

import math
from functools import cache

import numpy as np
import torch
from torch import Tensor

from armillary.components.counter import key, mix, uniforms
from armillary.data.views.recipes import Recipe

_ORDERS = 13
# All orders of up to nine tiles are looked at, of sixteen so many drawn ones.
_CANDIDATES, _DRAWN = 362_880, 50_000


@cache
def permutations(tiles: int, count: int) -> Tensor:
    """``count`` orders of ``tiles ** 2`` tiles, far from each other in Hamming distance, int64 ``(count, tiles ** 2)``.

    Greedy, as in the paper (algorithm 1): the next order is that of the largest summed distance to those chosen so far.
    Ties fall to the first in an order hashed once and for all, so that every process has the same set. A thousand
    orders of nine tiles take about a second, once a process.
    """
    number = tiles * tiles
    candidates = _candidates(number)
    columns = np.ascontiguousarray(candidates.T)
    agreement = np.zeros(len(candidates), dtype=np.int32)
    chosen = [0]
    while len(chosen) < count:
        latest = candidates[chosen[-1]]
        for place in range(number):
            agreement += columns[place] == latest[place]
        # What is chosen agrees with the set more than anything new can.
        agreement[chosen[-1]] = np.iinfo(np.int32).max // 2
        chosen.append(int(agreement.argmin()))
    return torch.from_numpy(candidates[chosen].astype(np.int64))


def _candidates(number: int) -> np.ndarray[tuple[int, int], np.dtype[np.int8]]:
    if math.factorial(number) > _CANDIDATES:
        drawn = uniforms(mix(torch.arange(_DRAWN) + key(_ORDERS, number)), number)
        return drawn.argsort(dim=1, stable=True).numpy().astype(np.int8)
    orders = np.zeros((1, 1), dtype=np.int8)
    for tile in range(1, number):
        orders = np.concatenate([np.insert(orders, place, tile, axis=1) for place in range(tile + 1)])
    shuffle = mix(torch.arange(len(orders)) + key(_ORDERS, number)).argsort().numpy()
    return np.take(orders, shuffle, axis=0)


def draw(recipe: Recipe, keys: Tensor) -> dict[str, Tensor]:
    """``permutation (B,)`` int64, the number of an order, and ``tile_offset (B, tiles ** 2, 2)`` in [0, 1), y and x."""
    number = recipe.tiles**2
    u = uniforms(keys, 1 + 2 * number)
    return {
        "permutation": (u[:, 0] * recipe.permutations).long(),
        "tile_offset": u[:, 1:].view(-1, number, 2),
    }


def puzzle(pixels: Tensor, drawn: dict[str, Tensor], recipe: Recipe) -> Tensor:
    """The tiles in their new order as one image, ``(B, C, tiles * t, tiles * t')``.

    Place p (row by row) shows a tile of ``t x t'`` pixels from cell ``permutations(...)[permutation][p]``, cut at a
    random whole-pixel offset, so that edges do not continue across cells. For a network that looks at single tiles,
    ``view.unflatten(2, (tiles, t)).unflatten(4, (tiles, t')).permute(0, 2, 4, 1, 3, 5).flatten(0, 2)`` is
    ``(B * tiles ** 2, C, t, t')``, the tiles of an image one after the other.
    """
    batch, channels, height, width = pixels.shape
    tiles = recipe.tiles
    order = permutations(tiles, recipe.permutations).to(pixels.device)[drawn["permutation"]]
    offset = drawn["tile_offset"].gather(1, order[..., None].expand(-1, -1, 2))
    lines = []
    for axis, side in ((0, height), (1, width)):
        cell = side // tiles
        tile = max(1, round(cell * recipe.tile_ratio))
        within = (offset[..., axis] * (cell - tile + 1)).long()
        number = order // tiles if axis == 0 else order % tiles
        lines.append((number * cell + within)[..., None] + torch.arange(tile, device=pixels.device))
    rows, columns = lines
    index = (rows[..., :, None] * width + columns[..., None, :]).view(batch, tiles, tiles, rows.shape[-1], -1)
    index = index.transpose(2, 3).reshape(batch, 1, -1).expand(-1, channels, -1)
    return pixels.flatten(2).gather(2, index).view(batch, channels, tiles * rows.shape[-1], -1)
