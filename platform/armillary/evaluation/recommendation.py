"""Which items a user is recommended, and how many of those that were held out are among them."""

from __future__ import annotations

import numpy as np

from armillary.evaluation.result import EvaluationSet, Flags, Floats, Interactions, Ints, ProtocolResult
from armillary.spec.errors import UserError

_DEPTHS = (10, 20)
# Scores held at a time.
_CELLS = 2**22


def recommendation(data: EvaluationSet) -> ProtocolResult:
    """Every user is shown the best items that were not trained on: how many of the held-out ones are among them?

    All items are ranked by the product of the two vectors, not by the cosine; the user's training items are left out.
    ``recall_at_k`` is the share of a user's held-out items among the first k, ``ndcg_at_k`` the discounted gain, each
    hit counted ``1 / log2(1 + rank)``, over that of the best order. Both are means over users who have held-out items.
    Of equal scores the held-out item comes last.
    """
    if data.interactions is None:
        raise UserError(
            "recommendation ranks items for users, and there are none",
            key="evaluate.protocols",
            hint="it judges objectives on interactions, such as simgcl",
        )
    given = data.interactions
    users, items = given.user_embeddings, given.item_embeddings
    known = _unique_pairs(given.train, len(items))
    sought = np.setdiff1d(_unique_pairs(given.held_out, len(items)), known)
    if not len(sought):
        raise UserError("no user has a held-out item that was not trained on", key="data")
    asked, counts = np.unique(sought // len(items), return_counts=True)
    gains = 1 / np.log2(2 + np.arange(max(_DEPTHS)))
    found: dict[str, list[Floats]] = {f"{name}_at_{k}": [] for name in ("recall", "ndcg") for k in _DEPTHS}
    step = max(1, _CELLS // len(items))
    for start in range(0, len(asked), step):
        rows, held = asked[start : start + step], counts[start : start + step]
        hits = _hits(users[rows] @ items.T, rows, known, sought, len(items))
        for k in _DEPTHS:
            first, best = hits[:, :k], gains[: min(k, len(items))].cumsum()
            found[f"recall_at_{k}"].append(first.sum(axis=1) / held)
            found[f"ndcg_at_{k}"].append(first @ gains[: first.shape[1]] / best[np.minimum(held, len(best)) - 1])
    return ProtocolResult(
        {f"recommendation/{name}": float(np.concatenate(values).mean()) for name, values in found.items()}
    )


def _unique_pairs(pairs: Ints, items: int) -> Ints:
    """``(2, n)`` users and items as sorted numbers ``user * items + item``."""
    return np.unique(pairs[0] * items + pairs[1])


def _hits(scores: Floats, rows: Ints, known: Ints, sought: Ints, items: int) -> Flags:
    """Which of the first places of each row hold a sought item, ``(rows, depth)``."""
    seen, held = (_marked(pairs, rows, items) for pairs in (known, sought))
    scores = np.where(seen, -np.inf, scores)
    order = np.lexsort((held, -scores), axis=1)[:, : max(_DEPTHS)]
    hits: Flags = np.take_along_axis(held, order, axis=1)
    return hits


def _marked(pairs: Ints, rows: Ints, items: int) -> Flags:
    marked = np.zeros((len(rows), items), np.bool_)
    for place, user in enumerate(rows):
        first, last = np.searchsorted(pairs, (user * items, (user + 1) * items))
        marked[place, pairs[first:last] - user * items] = True
    return marked


def interactions_of(nodes: Floats, users: int, train: Ints, held_out: Ints) -> Interactions:
    """A protocol's input of all nodes' embeddings, users first, and ids ``(n, 2)`` of a user's and an item's node."""

    def pairs(ids: Ints) -> Ints:
        found: Ints = np.stack([ids[:, 0], ids[:, 1] - users]).astype(np.int64)
        return found

    return Interactions(nodes[:users], nodes[users:], pairs(train), pairs(held_out))
