"""Several protocols at once: on an encoder and prepared data, and the check that they fit the split."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from armillary.evaluation import protocols
from armillary.evaluation.result import ProtocolResult
from armillary.spec.errors import UserError

if TYPE_CHECKING:
    import torch
    from torch import nn

    from armillary.data.splits import PreparedData


def check_protocols(names: Sequence[str], split: Literal["identity", "sample"], *, where: str | None = None) -> None:
    """Checks that protocols exist and make sense on a split.

    Raises:
        UserError: an unknown protocol, none at all, or one that needs trained classes on unseen ones or the reverse.
    """
    key = "evaluate.protocols"
    if not names:
        raise UserError("no protocol is named", where=where, key=key, allowed=", ".join(protocols.names()))
    closed = split == "sample"
    fitting = [name for name in protocols.names() if protocols.requirements(name).closed_set in (None, closed)]
    for name in names:
        if protocols.get(name, where=where, key=key).requirements.closed_set in (None, closed):
            continue
        shared = "shares" if closed else "does not share"
        raise UserError(
            f"{name} cannot judge data.split {split!r}, which {shared} classes between training and evaluation",
            where=where,
            key=key,
            allowed=", ".join(fitting),
            hint=f"or set data.split: {'identity' if closed else 'sample'}",
        )


def evaluate_encoder(
    encoder: nn.Module,
    data: PreparedData,
    names: Sequence[str],
    *,
    batch_size: int = 256,
    flip: bool = False,
    device: str | torch.device = "cpu",
    seed: int = 0,
) -> dict[str, ProtocolResult]:
    """Embeds the evaluated part (and the training part, where a protocol needs it) and runs the protocols.

    The arguments are those of :func:`armillary.evaluation.extract.extract` and of
    :func:`armillary.evaluation.protocols.evaluate`. Check the names with :func:`check_protocols` before.

    Returns:
        One result by protocol, in the order asked for.
    """
    from armillary.evaluation.extract import extract

    def embed(images: torch.Tensor) -> torch.Tensor:
        return extract(encoder, images, batch_size=batch_size, flip=flip, device=device)

    embeddings = embed(data.evaluation.images)
    needs_train = any(protocols.requirements(name).needs_train for name in names)
    train = embed(data.train.images) if needs_train else None
    train_labels = data.train.label if needs_train else None
    return {
        name: protocols.evaluate(
            name, embeddings, data.evaluation.label, train_embeddings=train, train_labels=train_labels, seed=seed
        )
        for name in names
    }


def metrics_of(results: dict[str, ProtocolResult]) -> dict[str, float]:
    """The metrics of several protocols in one mapping."""
    return {name: value for result in results.values() for name, value in result.metrics.items()}


def save_curves(results: dict[str, ProtocolResult], folder: Path) -> list[Path]:
    """Writes ``<protocol>.npz`` for every protocol that has curves; returns the files."""
    import numpy as np

    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, result in results.items():
        if result.curves:
            path = folder / f"{name}.npz"
            np.savez_compressed(path, allow_pickle=False, **result.curves)
            written.append(path)
    return written
