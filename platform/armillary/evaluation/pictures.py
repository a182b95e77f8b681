"""PNG pictures of one run's results: ROC, CMC, error versus reject, angles to class centers, embedding map."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from armillary.evaluation.figures import COLORS, save_cmc_png, save_roc_png
from armillary.evaluation.result import ProtocolResult

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Classes that the map colours; the rest is grey.
MAPPED_CLASSES = 20
_UNNAMED = "embeddings"
_REJECTED_BY = {"norm": "by norm", "quality": "by true quality"}
_ANGLES_TO = {"own": "own center", "other": "nearest other center"}
Curves = Mapping[str, NDArray[Any]]


def save_pictures(results: Mapping[str, ProtocolResult], folder: Path, *, name: str = "") -> list[Path]:
    """Draws what the results have curves for.

    ``roc.png`` (verification), ``<protocol>_roc.png`` (others with a ROC curve), ``cmc.png``, ``reject.png``,
    ``angles.png``, ``map.png``.

    Args:
        results: by protocol.
        folder: made if it is missing.
        name: what was judged, for legends.

    Returns:
        The files, in the order drawn.
    """
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for protocol, result in results.items():
        for file, needed, draw in _PICTURES:
            if needed in result.curves:
                plain = needed != "roc_far" or protocol == "verification"
                path = folder / (file if plain else f"{protocol}_{file}")
                draw(result.curves, path, name)
                written.append(path)
    return written


def _roc(curves: Curves, path: Path, name: str) -> None:
    save_roc_png({name or _UNNAMED: [(curves["roc_far"], curves["roc_tar"])]}, path)


def _cmc(curves: Curves, path: Path, name: str) -> None:
    save_cmc_png({name or _UNNAMED: [curves["cmc"]]}, path)


def _reject(curves: Curves, path: Path, name: str) -> None:
    title = ("Error versus reject", name)
    with _drawing(path, title, "share of genuine pairs rejected", "false non-match rate") as plot:
        for color, (key, label) in zip(COLORS, _REJECTED_BY.items(), strict=False):
            if f"reject_fnmr_{key}" in curves:
                plot.plot(curves["reject_share"], curves[f"reject_fnmr_{key}"], color=color, label=label, linewidth=2)
        plot.set_ylim(bottom=0)
        plot.legend(frameon=False)


def _angles(curves: Curves, path: Path, name: str) -> None:
    with _drawing(path, ("Angles to class centers", name), "degrees", "share of images") as plot:
        middle = np.arange(180) + 0.5
        for color, (key, label) in zip(COLORS, _ANGLES_TO.items(), strict=False):
            if f"angle_{key}" in curves:
                counts = curves[f"angle_{key}"]
                plot.fill_between(middle, counts / counts.sum(), color=color, alpha=0.4, step="mid", label=label)
        plot.legend(frameon=False)


def _map(curves: Curves, path: Path, name: str) -> None:
    points, labels = curves["map"], curves["map_label"]
    with _drawing(path, ("Embedding map (PCA)", name), "first axis", "second axis") as plot:
        classes, counts = np.unique(labels, return_counts=True)
        shown = classes[np.argsort(-counts, kind="stable")[:MAPPED_CLASSES]]
        rest = ~np.isin(labels, shown)
        plot.scatter(points[rest, 0], points[rest, 1], s=8, color="#C8C8C8", linewidths=0)
        for index, label in enumerate(shown):
            own = points[labels == label]
            marker = "osD^v"[index // len(COLORS) % 5]
            plot.scatter(own[:, 0], own[:, 1], s=14, color=COLORS[index % len(COLORS)], marker=marker, linewidths=0)
        plot.set_aspect("equal", adjustable="datalim")


_PICTURES: tuple[tuple[str, str, Callable[[Curves, Path, str], None]], ...] = (
    ("roc.png", "roc_far", _roc),
    ("cmc.png", "cmc", _cmc),
    ("reject.png", "reject_share", _reject),
    ("angles.png", "angle_own", _angles),
    ("map.png", "map", _map),
)


@contextmanager
def _drawing(path: Path, title: tuple[str, str], x: str, y: str) -> Iterator[Axes]:
    """Axes to draw on; written as PNG at the end."""
    # The object interface: pyplot would keep figures alive and look for a display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    drawing = Figure(figsize=(8, 5), dpi=120, layout="constrained")
    FigureCanvasAgg(drawing)
    plot = drawing.add_subplot()
    plot.set(title=": ".join(part for part in title if part), xlabel=x, ylabel=y)
    plot.grid(visible=True, alpha=0.3)
    yield plot
    drawing.savefig(path)
