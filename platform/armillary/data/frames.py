"""Views that are the frames of a sequence."""

from __future__ import annotations

import torch
from torch import Tensor

from armillary.spec.errors import UserError

# What a recipe is called whose views are frames.
RECIPE = "frames"


def clips(sequence: Tensor, frame: Tensor, length: int) -> Tensor:
    """Every run of ``length`` consecutive frames of one sequence.

    Args:
        sequence: ``(N,)`` int64; images with a negative number belong to none.
        frame: ``(N,)`` int64, the place within the sequence.
        length: frames of a clip.

    Returns:
        ``(clips, length)`` int64 rows, in the order of the rows of the first frames. Frame f is followed by f + 1; a
        sequence with a gap gives no clip across it.

    Raises:
        UserError: no sequence is that long.
    """
    order = torch.argsort(frame, stable=True)
    order = order[torch.argsort(sequence[order], stable=True)]
    starts = torch.arange(max(0, len(order) - length + 1))
    runs = order[starts[:, None] + torch.arange(length)]
    follows = (frame[runs] - frame[runs[:, :1]]) == torch.arange(length)
    within = (sequence[runs] == sequence[runs[:, :1]]) & (sequence[runs] >= 0)
    found = runs[(follows & within).all(dim=1)]
    if not len(found):
        counts = torch.bincount(sequence[sequence >= 0])
        longest = int(counts.max()) if len(counts) else 0
        raise UserError(
            f"the recipe {RECIPE} needs sequences of {length} frames; the longest of the training part has {longest}",
            key="data.name",
            allowed="a dataset with the columns sequence and frame",
            hint="some objectives read fewer frames if asked to: armillary objectives show NAME" if longest else None,
        )
    return found[torch.argsort(found[:, 0])]
