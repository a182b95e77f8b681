"""MoCo's shuffled batch norm: keys are normalised in other company than their queries (He et al. 2020, section 3.3).

A batch norm writes into every row who else was in the batch. Queries and keys of one batch carry the same mark, the
keys of a queue those of earlier batches, so that an encoder can tell its key from the queue without looking at the
image. In the paper each GPU's batch norm sees its own samples, and the keys' samples are dealt to other GPUs than the
queries'. Synchronised batch norm does not take the mark away: it gives the same one to all queries and keys of a batch.

Here a part of the batch is what a GPU's samples are in the paper (:class:`armillary.components.normalization.
PartBatchNorm`), so that one worker has something to shuffle too, and N workers equal one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from armillary.collectives import gather_no_grad, rank
from armillary.components.counter import key, sample_keys
from armillary.components.normalization import PartBatchNorm, convert_batch_norm

_ORDER = 94


class ShuffledKeys:
    """Makes keys in an order that all workers share; ``build`` and ``forward`` of a method with a key encoder.

    ::

        self.make_keys = ShuffledKeys(32, context.seed)
        self.make_keys.convert(self.encoder, self.projector)              # before the teacher copies them
        (keys,) = self.make_keys(self.teacher, [view], batch.index, self.step)

    The order is a function of seed, step, view and the samples' indices: nothing has to be saved to go on.

    Args:
        part: samples that are normalised together; 0: nothing is shuffled, batch norm is over the global batch.
        seed: the run's.
    """

    def __init__(self, part: int, seed: int) -> None:
        self.part, self.seed = part, seed

    def convert(self, *modules: nn.Module) -> None:
        """Gives the modules the batch norm that goes with it."""
        for module in modules if self.part else ():
            convert_batch_norm(module, self.part)

    @torch.no_grad()
    def __call__(
        self, encode: Callable[[Tensor], Tensor], views: Sequence[Tensor], index: Tensor, step: int
    ) -> list[Tensor]:
        """The keys of each view, rows in the order of the views'.

        Args:
            encode: the key encoder, from images to ``(rows, ...)``.
            views: images ``(batch, ...)`` each, as many on every worker.
            index: ``(batch,)`` of the samples.
            step: the number of the optimizer step.
        """
        if not (self.part and isinstance(encode, nn.Module) and _normalises(encode)):
            return list(encode(torch.cat(tuple(views))).chunk(len(views)))
        everyone = gather_no_grad(index)
        mine = slice(rank() * len(index), (rank() + 1) * len(index))
        keys = []
        for number, view in enumerate(views):
            order = sample_keys(key(_ORDER, self.seed, step, number), everyone).argsort(stable=True)
            made = gather_no_grad(encode(gather_no_grad(view)[order[mine]]))
            keys.append(made[order.argsort()[mine]])
        return keys


def _normalises(module: nn.Module) -> bool:
    """Whether a batch norm of parts is inside; a transformer has none, and nothing to shuffle for."""
    return any(isinstance(inner, PartBatchNorm) for inner in module.modules())
