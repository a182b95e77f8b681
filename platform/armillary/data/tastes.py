"""A synthetic dataset of users and the items they chose."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from armillary.data.store import Dataset, Record, write_dataset

USERS, ITEMS, FACTORS = 400, 300, 8
# How much taste says, and how fast popularity falls.
_TASTE, _SLOPE = 2.0, 0.7


def tastes(name: str, _source: Path | None, progress: Callable[[int, int | None], None]) -> Dataset:
    """400 users who chose 8 to 60 of 300 items each, by taste and by popularity.

    A user and an item have 8 hidden factors each; the chance of a choice grows with their product and with the item's
    popularity, which falls with its rank as in a long tail. Classes are users; the column ``item`` numbers items.
    """
    draw = np.random.default_rng(11)
    tables = [draw.standard_normal((count, FACTORS)) / FACTORS**0.5 for count in (USERS, ITEMS)]
    popularity = -_SLOPE * np.log(1 + draw.permutation(ITEMS))
    appeal = _TASTE * FACTORS**0.5 * tables[0] @ tables[1].T + popularity
    # The largest of appeal plus Gumbel noise are a draw without replacement.
    order = np.argsort(-(appeal + draw.gumbel(size=appeal.shape)), axis=1)
    counts = np.clip(draw.lognormal(3.0, 0.5, USERS).astype(int), 8, 60)
    total, blank = int(counts.sum()), np.zeros((1, 1, 1), np.uint8)

    def records() -> Iterator[Record]:
        done = 0
        for user, count in enumerate(counts):
            for item in order[user, :count]:
                done += 1
                yield Record(blank, user, {"item": int(item)})
            progress(done, total)

    return write_dataset(
        name,
        records(),
        class_names=[f"user_{user:03}" for user in range(USERS)],
        columns={"item": "int64"},
        credit="made by Armillary",
        licence="CC0",
    )
