"""data."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from armillary.data.store import Dataset

__all__ = ["from_pyg"]


def from_pyg(graphs: Any, name: str, **options: Any) -> Dataset:
    """Writes PyTorch Geometric's graphs into the store: see :func:`armillary.data.importers.pyg.from_pyg`."""
    from armillary.data.importers.pyg import from_pyg as write

    return write(graphs, name, **options)
