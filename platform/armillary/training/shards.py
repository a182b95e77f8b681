"""Checkpoints that load on any number of workers and at any ZeRO stage.

Every worker writes only what it owns: for each parameter the slice ``[start, start + length)`` of its flattened float32
master copy and of each optimizer state. A reader asks for the slices *it* owns; they are cut together from whatever
files hold them. Files are safetensors: nothing is pickled.

::

    meta.json                      world size, epoch, digest of the model, names and shapes
    shard-00000.safetensors        keys "<kind>/<parameter>/<start>"; kind is param, buffer or an optimizer state
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from armillary.spec.errors import UserError

META = "meta.json"


def write_shard(folder: Path, rank: int, slices: Mapping[tuple[str, str, int], Tensor]) -> None:
    """Writes one worker's slices, keyed by (kind, name, start), as 1-D or scalar tensors."""
    tensors = {
        f"{kind}/{name}/{start}": value.detach().to("cpu", copy=True).contiguous()
        for (kind, name, start), value in slices.items()
    }
    save_file(tensors, folder / f"shard-{rank:05d}.safetensors")


def write_meta(folder: Path, meta: Mapping[str, Any]) -> None:
    """Writes what describes the checkpoint as a whole; one worker does."""
    (folder / META).write_text(json.dumps(meta, indent=1))


def read_meta(folder: Path) -> dict[str, Any]:
    """The description of a checkpoint.

    Raises:
        UserError: the folder holds no complete checkpoint.
    """
    path = folder / META
    if not path.is_file():
        raise UserError(
            f"{folder} holds no checkpoint: {META} is missing", hint="name a run folder or one of its checkpoints"
        )
    meta: dict[str, Any] = json.loads(path.read_text())
    return meta


class ShardReader:
    """Cuts any slice of any stored tensor out of a checkpoint's files."""

    def __init__(self, folder: Path) -> None:
        self._files = [safe_open(path, framework="pt") for path in sorted(folder.glob("shard-*.safetensors"))]
        self._pieces: dict[tuple[str, str], list[tuple[int, int, str]]] = defaultdict(list)
        for number, file in enumerate(self._files):
            for key in file.keys():  # noqa: SIM118 - a safetensors handle is no mapping
                kind, rest = key.split("/", 1)
                name, start = rest.rsplit("/", 1)
                self._pieces[kind, name].append((int(start), number, key))
        for pieces in self._pieces.values():
            pieces.sort()

    def kinds(self, name: str) -> list[str]:
        """What is stored under a name, e.g. ``["exp_avg", "exp_avg_sq", "param", "step"]``."""
        return sorted(kind for kind, stored in self._pieces if stored == name)

    def names(self, kind: str) -> list[str]:
        """The names stored under a kind."""
        return sorted(name for stored, name in self._pieces if stored == kind)

    def length(self, kind: str, name: str) -> int | None:
        """How many elements are stored, without reading them; ``None`` for a scalar state."""
        shapes = [self._files[number].get_slice(key).get_shape() for _, number, key in self._pieces[kind, name]]
        return sum(shape[0] for shape in shapes) if all(shapes) else None

    def whole(self, kind: str, name: str) -> Tensor:
        """The whole tensor, flattened; a scalar state stays a scalar."""
        pieces = self._pieces[kind, name]
        tensors = [self._files[number].get_tensor(key) for _, number, key in pieces]
        return tensors[0] if tensors[0].ndim == 0 else torch.cat(tensors)

    def cut(self, kind: str, name: str, start: int, length: int) -> Tensor:
        """Elements ``[start, start + length)`` of the flattened tensor."""
        parts = []
        for piece_start, number, key in self._pieces[kind, name]:
            view = self._files[number].get_slice(key)
            size = view.get_shape()[0]
            low, high = max(start, piece_start), min(start + length, piece_start + size)
            if low < high:
                parts.append(view[low - piece_start : high - piece_start])
        found = torch.cat(parts) if parts else torch.empty(0)
        if found.numel() != length:
            raise UserError(
                f"the checkpoint is incomplete: {kind} of {name} misses elements of [{start}, {start + length})"
            )
        return found
