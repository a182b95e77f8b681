"""From a dataset whose classes are users and whose column ``item`` says what they chose, to nodes of a graph."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import torch
from torch import Tensor

from armillary.components.counter import integers, key, sample_keys
from armillary.data.ids import IdRows
from armillary.data.splits import ImageSet, PreparedData
from armillary.spec.errors import UserError

ITEM = "item"
# Tries to find an item that a user did not choose.
TRIES = 16
_NEGATIVE = 73


def with_interactions(data: PreparedData) -> PreparedData:
    """Prepared data whose samples have become rows of two nodes: users are numbered first, then items.

    Args:
        data: a fold of a dataset split by sample, so that every user is trained on.

    Returns:
        The data, with ``inputs["edges"] (2, E)`` int64, the distinct training pairs.

    Raises:
        UserError: the dataset has no column ``item``, or one of its numbers is negative.
    """
    if ITEM not in data.train.fields:
        raise UserError(
            f"{data.name} has no column {ITEM!r}",
            key="data.name",
            allowed="a dataset of interactions: classes are users, the column item holds numbers of items",
            hint="data.name: tastes, or `armillary data import edges FILE`",
        )
    parts = [part.fields[ITEM].long() for part in (data.train, data.evaluation)]
    if min(int(part.min()) for part in parts) < 0:
        raise UserError(f"{data.name} has a negative number in its column {ITEM!r}", key="data.name")
    users, items = data.num_classes, 1 + max(int(part.max()) for part in parts)
    edges = torch.unique(torch.stack([data.train.label, users + parts[0]]), dim=1)
    size = (users, edges.shape[1])

    def nodes(part: ImageSet) -> ImageSet:
        ids = torch.stack([part.label, users + part.fields[ITEM].long()], dim=1)
        return replace(part, images=IdRows(ids, users + items, size))

    fingerprint = hashlib.sha256(f"{data.fingerprint}-interactions".encode()).hexdigest()
    return replace(
        data,
        train=nodes(data.train),
        evaluation=nodes(data.evaluation),
        fingerprint=fingerprint,
        inputs={**data.inputs, "edges": edges},
    )


class NegativeItems:
    """To each interaction an item that its user did not choose, as a function of (seed, epoch, sample).

    Every item is as likely as any other. A user who chose nearly everything may get a chosen one after 16 tries.

    Args:
        rows: ``(N, 2)`` nodes of all training interactions.
        index: ``(N,)`` the samples' positions in the dataset.
    """

    def __init__(self, rows: IdRows, index: Tensor) -> None:
        self.rows, self.index = rows, index
        self.users, self.nodes = rows.size[0], rows.kinds
        self._chosen = torch.unique(rows.ids[:, 0] * self.nodes + rows.ids[:, 1])

    def __call__(self, rows: Tensor, seed: int, epoch: int) -> Tensor:
        """Nodes ``(b,)`` of items for the interactions ``rows (b,)``."""
        keys = sample_keys(key(_NEGATIVE, seed, epoch), self.index[rows])
        drawn = self.users + integers(keys, TRIES, self.nodes - self.users)
        pairs = self.rows.ids[rows, :1] * self.nodes + drawn
        place = torch.searchsorted(self._chosen, pairs).clamp_max(len(self._chosen) - 1)
        free = self._chosen[place] != pairs
        return drawn.gather(1, free.long().argmax(dim=1, keepdim=True))[:, 0]
