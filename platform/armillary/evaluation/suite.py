"""Several protocols at once: on an encoder and prepared data, and the check that they fit the split."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from armillary.evaluation import protocols
from armillary.evaluation.result import Interactions, Ints, Pairs, ProtocolResult, Templates
from armillary.spec.errors import UserError

if TYPE_CHECKING:
    import pyarrow as pa
    import torch
    from torch import nn

    from armillary.components.recommendation import LightGCN
    from armillary.data.splits import ImageSet, PreparedData

# What a run's evaluation folder calls its warnings, one a line.
WARNINGS = "warnings.txt"


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
    :func:`armillary.evaluation.protocols.evaluate`. Check the names with :func:`check_protocols` before. A table
    ``pairs`` or ``templates`` of the dataset is used when all its rows are in the evaluated part.

    Returns:
        One result by protocol, in the order asked for.
    """
    train = data.train if any(protocols.requirements(name).needs_train for name in names) else None
    options: dict[str, Any] = {"batch_size": batch_size, "flip": flip, "device": device}
    return judge(encoder, data.evaluation, data.tables, names, train=train, seed=seed, **options)


def judge(
    encoder: nn.Module,
    images: ImageSet,
    tables: Mapping[str, pa.Table],
    names: Sequence[str],
    *,
    train: ImageSet | None = None,
    seed: int = 0,
    **options: Any,
) -> dict[str, ProtocolResult]:
    """Embeds images and runs the protocols on them, with the images' fields as columns.

    Args:
        encoder: see :func:`armillary.evaluation.extract.extract`, which gets ``options`` too.
        images: what is judged.
        tables: ``pairs``, ``templates``, ``matches`` of the dataset that the images are of.
        names: protocols.
        train: for protocols that need a training part.
        seed: fixes what protocols draw.
        options: batch size, flip, device.
    """
    from armillary.components.recommendation import LightGCN
    from armillary.evaluation.extract import extract

    interactions, train_embeddings = None, None
    if isinstance(encoder, LightGCN) and train is not None:
        embeddings, train_embeddings, interactions = _embedded_nodes(encoder, images, train)
    else:
        embeddings = extract(encoder, images.images, **options)
        if train is not None:
            train_embeddings = extract(encoder, train.images, **options)
    columns = {**images.fields, **_embedded_captions(encoder, images, options)}
    pairs, templates, warnings = comparisons(tables, images.index.numpy())
    results = {
        name: protocols.evaluate(
            name,
            embeddings,
            images.label,
            train_embeddings=train_embeddings,
            train_labels=None if train is None else train.label,
            columns=columns,
            pairs=pairs,
            templates=templates,
            interactions=interactions,
            seed=seed,
        )
        for name in names
    }
    return {
        name: replace(result, warnings=(*result.warnings, *warnings.get(name, ()))) for name, result in results.items()
    }


def _embedded_nodes(
    encoder: LightGCN, images: ImageSet, train: ImageSet
) -> tuple[torch.Tensor, torch.Tensor, Interactions]:
    """The users of held-out and of training interactions, and all that ``recommendation`` reads: one pass for all."""
    import torch

    from armillary.data.ids import IdRows
    from armillary.evaluation.recommendation import interactions_of

    with torch.no_grad():
        nodes = encoder.nodes().float().cpu()
    parts = [part.images for part in (images, train)]
    ids = [part.ids for part in parts if isinstance(part, IdRows)]
    held_out, trained = (part.numpy() for part in ids)
    interactions = interactions_of(nodes.double().numpy(), encoder.users, trained, held_out)
    return nodes[ids[0][:, 0]], nodes[ids[1][:, 0]], interactions


def _embedded_captions(encoder: nn.Module, images: ImageSet, options: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """The column ``caption_embedding (n, d)``, where the encoder has a tower for texts and the images have captions."""
    from armillary.components.towers import TwoTowers
    from armillary.data.ids import IdRows
    from armillary.evaluation.extract import extract

    if not isinstance(encoder, TwoTowers) or "caption" not in images.fields:
        return {}
    ids = images.fields["caption"]
    rows = IdRows(ids, encoder.text_options["vocabulary"], (1, ids.shape[1]))
    return {"caption_embedding": extract(encoder.text, rows, **{**options, "flip": False})}


def comparisons(
    tables: Mapping[str, pa.Table], index: Ints
) -> tuple[Pairs | None, Templates | None, dict[str, tuple[str, ...]]]:
    """The pairs and templates of a dataset, in positions of a part of it.

    Args:
        tables: ``pairs``, ``templates`` and ``matches``, as far as there are any.
        index: ``(n,)`` the rows of the dataset that the part holds.

    Returns:
        Pairs and templates, ``None`` where there is none or a row of it is not in the part; and, by protocol, warnings
        that say so.
    """
    from armillary.evaluation.tables import located, pairs_of, table_columns, templates_of

    columns = {name: table_columns(table) for name, table in tables.items()}
    pairs, templates = None, None
    warnings: dict[str, tuple[str, ...]] = {}
    if "pairs" in columns:
        rows = {name: located(columns["pairs"][name], index) for name in ("first", "second")}
        outside = np.count_nonzero((rows["first"] < 0) | (rows["second"] < 0))
        if outside:
            total = len(rows["first"])
            sentence = (
                f"compared all pairs: {outside} of the dataset's {total} pairs have images that are not evaluated"
            )
            warnings = {"verification": (sentence,), "quality_verification": (sentence,)}
        else:
            pairs = pairs_of(columns["pairs"] | rows)
    if "templates" in columns:
        row = located(columns["templates"]["row"], index)
        if (row >= 0).all():
            templates = templates_of(columns["templates"] | {"row": row}, columns.get("matches"))
    return pairs, templates, warnings


def metrics_of(results: dict[str, ProtocolResult]) -> dict[str, float]:
    """The metrics of several protocols in one mapping."""
    return {name: value for result in results.values() for name, value in result.metrics.items()}


def warnings_of(results: dict[str, ProtocolResult]) -> list[str]:
    """The warnings of several protocols, each once."""
    return list(dict.fromkeys(sentence for result in results.values() for sentence in result.warnings))


def save_curves(results: dict[str, ProtocolResult], folder: Path, *, name: str = "") -> list[Path]:
    """Writes ``<protocol>.npz`` for every protocol that has curves, and their pictures; returns the files.

    ``warnings.txt`` holds the warnings, if there are any. See :func:`armillary.evaluation.pictures.save_pictures`.
    """
    from armillary.evaluation.pictures import save_pictures

    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for protocol, result in results.items():
        if result.curves:
            path = folder / f"{protocol}.npz"
            np.savez_compressed(path, allow_pickle=False, **result.curves)
            written.append(path)
    if sentences := warnings_of(results):
        path = folder / WARNINGS
        path.write_text("".join(f"{sentence}\n" for sentence in sentences))
        written.append(path)
    return [*written, *save_pictures(results, folder, name=name)]
