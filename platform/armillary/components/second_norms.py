"""A second set of batch norms for inputs of another distribution, with statistics and affine maps of their own."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


class SecondNorms(nn.Module):
    """Copies of all batch norms in some of an owner's modules (Xie et al., "AdvProp", CVPR 2020).

    ::

        self.second = SecondNorms(self, ("encoder", "projector"), momentum=0.01)   # in build
        with self.second.used_by(self):                                           # in forward
            projections = self.projector(self.encoder(other_images))

    Norms are found by name whenever they are used, so that an engine may have replaced them, and are registered here,
    so that it shards and saves the copies too.

    Args:
        owner: holds the modules.
        parts: names of its modules.
        momentum: of the copies' running statistics, in (0, 1].
    """

    def __init__(self, owner: nn.Module, parts: Sequence[str], momentum: float = 0.1) -> None:
        super().__init__()
        self.places = [
            f"{part}.{name}".rstrip(".")
            for part in parts
            for name, module in owner.get_submodule(part).named_modules()
            if isinstance(module, _BatchNorm)
        ]
        self.norms = nn.ModuleList(copy.deepcopy(owner.get_submodule(place)) for place in self.places)
        for norm in self.norms:
            norm.momentum = momentum  # type: ignore[assignment]

    @contextmanager
    def used_by(self, owner: nn.Module) -> Iterator[None]:
        """Within it the owner's modules use these norms in place of their own."""
        parents = [(owner.get_submodule(place.rpartition(".")[0]), place.rpartition(".")[2]) for place in self.places]
        first = [parent.get_submodule(leaf) for parent, leaf in parents]
        try:
            for (parent, leaf), norm in zip(parents, self.norms, strict=True):
                setattr(parent, leaf, norm)
            yield
        finally:
            for (parent, leaf), norm in zip(parents, first, strict=True):
                setattr(parent, leaf, norm)
