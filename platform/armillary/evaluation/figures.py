"""Curves of several variants over several runs, as plotly figures for pages and as PNG files for artifacts.

PNGs are drawn with matplotlib: plotly's own image export needs a browser.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike

from armillary.evaluation.result import Floats

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

# Okabe and Ito's palette without yellow and black: told apart under all common colour blindness, on light and dark.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C6BB1", "#7F7F7F")
DASHES = ("solid", "dash", "dot", "dashdot")
_MATPLOTLIB_DASHES = {"solid": "-", "dash": "--", "dot": ":", "dashdot": "-."}
_POINTS = 200
LOWEST_FAR = 1e-6
CMC_RANKS = 20

RocCurves = Mapping[str, Sequence[tuple[ArrayLike, ArrayLike]]]


@dataclass(frozen=True)
class Band:
    """The mean curve of a variant, with the lowest and the highest of its runs at each place."""

    name: str
    x: Floats
    mean: Floats
    low: Floats
    high: Floats
    runs: int


_GRID = {"showgrid": True, "zeroline": False, "gridcolor": "rgba(128,128,128,0.25)", "automargin": True}


@dataclass(frozen=True)
class Axes:
    """What the axes say."""

    title: str
    x: str
    y: str
    log_x: bool
    # Shares, whose axis ends at 1; what else is measured fills its axis.
    share: bool = True


def roc_bands(curves: RocCurves) -> list[Band]:
    """Reads every run's curve off at common false accept rates: at each, the best TAR whose FAR is not above it.

    Args:
        curves: by variant, one ``(far, tar)`` a run, both ascending.

    Raises:
        ValueError: there is no curve.
    """
    arrays = {
        name: [(np.asarray(far, float), np.asarray(tar, float)) for far, tar in runs] for name, runs in curves.items()
    }
    smallest = [far[far > 0].min() for runs in arrays.values() for far, _ in runs if (far > 0).any()]
    if not smallest:
        raise ValueError("there is no ROC curve to draw")
    # Below one false accept a curve has nothing to say; the coarsest run sets where the common part begins.
    grid = np.geomspace(max(LOWEST_FAR, max(smallest)), 1.0, _POINTS)
    return [
        _band(name, grid, [_read_off(far, tar, grid) for far, tar in runs]) for name, runs in arrays.items() if runs
    ]


def cmc_bands(curves: Mapping[str, Sequence[ArrayLike]]) -> list[Band]:
    """CMC curves up to rank 20, or to the rank that all runs of all variants reach.

    Raises:
        ValueError: there is no curve.
    """
    arrays = {name: [np.asarray(run, float) for run in runs] for name, runs in curves.items() if runs}
    if not arrays:
        raise ValueError("there is no CMC curve to draw")
    deepest = min(CMC_RANKS, *(len(run) for runs in arrays.values() for run in runs))
    ranks = np.arange(1.0, deepest + 1)
    return [_band(name, ranks, [run[:deepest] for run in runs]) for name, runs in arrays.items()]


def _read_off(far: Floats, tar: Floats, grid: Floats) -> Floats:
    # Rates are quotients of counts: a hair of tolerance keeps 1/30 at 1/30.
    at = np.searchsorted(far, grid * (1 + 1e-12), side="right") - 1
    return np.where(at >= 0, tar[np.maximum(at, 0)], 0.0)


def _band(name: str, x: Floats, runs: Sequence[Floats]) -> Band:
    stack = np.stack(list(runs))
    return Band(name, x, stack.mean(axis=0), stack.min(axis=0), stack.max(axis=0), len(stack))


def roc_figure(curves: RocCurves, *, title: str = "Verification ROC") -> Figure:
    """The ROC curves of several variants: the mean over runs, with a band from the lowest to the highest run.

    Args:
        curves: by variant, one ``(far, tar)`` a run, both ascending (``roc_far`` and ``roc_tar`` of verification).
        title: above the figure.
    """
    return _figure(roc_bands(curves), _roc_axes(title))


def cmc_figure(curves: Mapping[str, Sequence[ArrayLike]], *, title: str = "Identification CMC") -> Figure:
    """The CMC curves of several variants, like :func:`roc_figure`; ``curves`` holds ``cmc`` of identification."""
    return _figure(cmc_bands(curves), _cmc_axes(title))


def line_figure(lines: Mapping[str, Mapping[float, Sequence[float]]], *, x: str, y: str) -> Figure:
    """Several lines over a number: the mean of the runs at each place, with a band from the lowest to the highest.

    Args:
        lines: by name, the runs' values at each place.
        x: what the horizontal axis says.
        y: what the vertical axis says.

    Raises:
        ValueError: there is nothing to draw.
    """
    bands = []
    for name, values in lines.items():
        places = sorted(values)
        runs = [np.asarray(values[place], float) for place in places]
        mean, low, high = (np.array([f(run) for run in runs]) for f in (np.mean, np.min, np.max))
        bands.append(Band(name, np.array(places), mean, low, high, max(map(len, runs))))
    if not bands:
        raise ValueError("there is no line to draw")
    return _figure(bands, Axes(f"{y} over {x}", x, y, log_x=False, share=False))


def box_figure(values: Mapping[str, Sequence[float]], *, y: str) -> Figure:
    """A box for each name, with every value beside it.

    Args:
        values: by name.
        y: what the vertical axis says.

    Raises:
        ValueError: there is nothing to draw.
    """
    import plotly.graph_objects as go

    if not values:
        raise ValueError("there is no box to draw")
    boxes = [
        go.Box(y=list(found), name=name, boxpoints="all", marker={"color": _style(index)[0]})
        for index, (name, found) in enumerate(values.items())
    ]
    figure = go.Figure(boxes)
    figure.update_layout(template="none", showlegend=False, margin={"l": 64, "r": 16, "t": 24, "b": 48}, height=440)
    figure.update_yaxes(title=y, **_GRID)
    return figure


def point_figure(
    points: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    *,
    x: str,
    y: str,
    shades: Mapping[str, float] | None = None,
    shade: str = "",
) -> Figure:
    """A named point for each name, the mean of its runs, with bars from the lowest run to the highest.

    Points that share the first word of their name are joined in order of ``x``.

    Args:
        points: by name, the runs' values of the two coordinates.
        x: what the horizontal axis says.
        y: what the vertical axis says.
        shades: by name, a third number, shown as the point's colour.
        shade: what that number is.

    Raises:
        ValueError: there is nothing to draw.
    """
    import plotly.graph_objects as go

    if not points:
        raise ValueError("there is no point to draw")
    means = {name: (float(np.mean(found[0])), float(np.mean(found[1]))) for name, found in points.items()}
    ordered = sorted(points, key=lambda name: means[name][0])
    # Neighbours' names stand on different sides, so that they do not cover each other.
    sides = {name: ("top center", "bottom center")[index % 2] for index, name in enumerate(ordered)}
    lines: dict[str, list[str]] = {}
    for name in ordered:
        lines.setdefault(name.split(" ")[0], []).append(name)
    figure = go.Figure()
    for index, (line, names) in enumerate(lines.items()):
        marker: dict[str, object] = {"size": 9, "color": _style(index)[0]}
        if shades is not None:
            marker |= {"color": [shades[name] for name in names], "coloraxis": "coloraxis"}
        figure.add_scatter(
            x=[means[name][0] for name in names],
            y=[means[name][1] for name in names],
            error_x=_bars([points[name][0] for name in names]),
            error_y=_bars([points[name][1] for name in names]),
            text=names,
            name=line,
            mode="lines+markers+text",
            textposition=[sides[name] for name in names],
            marker=marker,
            line={"color": _style(index)[0], "width": 2},
            cliponaxis=False,
        )
    figure.update_layout(
        template="none", showlegend=False, margin={"l": 72, "r": 16, "t": 24, "b": 56}, height=480, hovermode="closest"
    )
    if shades is not None:
        scale = {"colorscale": "Viridis", "cmin": min(shades.values()), "cmax": max(shades.values())}
        figure.update_layout(coloraxis={**scale, "colorbar": {"title": {"text": shade}}})
    grid = {"showgrid": True, "zeroline": False, "gridcolor": "rgba(128,128,128,0.25)", "automargin": True}
    figure.update_xaxes(title=x, **grid)
    figure.update_yaxes(title=y, **grid)
    return figure


def _bars(runs: Sequence[Sequence[float]]) -> dict[str, object]:
    """Bars from each mean to the lowest and the highest of its values."""
    above = [float(np.max(values) - np.mean(values)) for values in runs]
    below = [float(np.mean(values) - np.min(values)) for values in runs]
    return {"type": "data", "symmetric": False, "array": above, "arrayminus": below, "thickness": 1, "width": 3}


def save_roc_png(curves: RocCurves, path: Path, *, title: str = "Verification ROC") -> None:
    """Writes the picture of :func:`roc_figure` as PNG."""
    _save_png(roc_bands(curves), _roc_axes(title), path)


def save_cmc_png(curves: Mapping[str, Sequence[ArrayLike]], path: Path, *, title: str = "Identification CMC") -> None:
    """Writes the picture of :func:`cmc_figure` as PNG."""
    _save_png(cmc_bands(curves), _cmc_axes(title), path)


def _roc_axes(title: str) -> Axes:
    return Axes(title, "false accept rate", "true accept rate", log_x=True)


def _cmc_axes(title: str) -> Axes:
    return Axes(title, "rank", "share of queries found", log_x=False)


def _style(index: int) -> tuple[str, str]:
    return COLORS[index % len(COLORS)], DASHES[index // len(COLORS) % len(DASHES)]


def _legend(band: Band) -> str:
    return band.name if band.runs == 1 else f"{band.name} ({band.runs} runs)"


def _figure(bands: Sequence[Band], axes: Axes) -> Figure:
    import plotly.graph_objects as go

    figure = go.Figure()
    for index, band in enumerate(bands):
        color, dash = _style(index)
        if band.runs > 1:
            edge = {"mode": "lines", "line": {"width": 0}, "hoverinfo": "skip", "showlegend": False}
            red, green, blue = (int(color[i : i + 2], 16) for i in (1, 3, 5))
            fill = {"fill": "tonexty", "fillcolor": f"rgba({red},{green},{blue},0.18)"}
            figure.add_scatter(x=band.x, y=band.high, legendgroup=band.name, **edge)
            figure.add_scatter(x=band.x, y=band.low, legendgroup=band.name, **edge, **fill)
        figure.add_scatter(
            x=band.x,
            y=band.mean,
            name=_legend(band),
            legendgroup=band.name,
            mode="lines",
            line={"color": color, "dash": dash, "width": 2.5},
            hovertemplate="%{y:.4f} at %{x:.3g}",
        )
    figure.update_layout(
        title={"text": axes.title, "x": 0, "xref": "paper", "xanchor": "left"},
        template="none",
        hovermode="x unified",
        legend={"orientation": "h", "yanchor": "top", "y": -0.2, "xanchor": "left", "x": 0},
        margin={"l": 64, "r": 16, "t": 48, "b": 48},
        height=480,
    )
    figure.update_xaxes(title=axes.x, **_GRID)
    if axes.log_x:
        figure.update_xaxes(type="log", exponentformat="power", dtick=1)
    figure.update_yaxes(title=axes.y, range=_range(bands, axes), **_GRID)
    return figure


def _range(bands: Sequence[Band], axes: Axes) -> list[float]:
    """The vertical axis."""
    low, high = min(float(band.low.min()) for band in bands), max(float(band.high.max()) for band in bands)
    if axes.share:
        return [max(0.0, low - 0.03), 1.01]
    # At least a hundredth is shown, so that rounding does not look like a change.
    room = max(0.08 * (high - low), 0.005)
    return [low - room, high + room]


def _save_png(bands: Sequence[Band], axes: Axes, path: Path) -> None:
    # The object interface: pyplot would keep figures alive and look for a display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Drawing

    drawing = Drawing(figsize=(8, 5), dpi=120, layout="constrained")
    FigureCanvasAgg(drawing)
    plot = drawing.add_subplot()
    for index, band in enumerate(bands):
        color, dash = _style(index)
        plot.plot(band.x, band.mean, color=color, linestyle=_MATPLOTLIB_DASHES[dash], linewidth=2, label=_legend(band))
        if band.runs > 1:
            plot.fill_between(band.x, band.low, band.high, color=color, alpha=0.18, linewidth=0)
    if axes.log_x:
        plot.set_xscale("log")
    plot.set(title=axes.title, xlabel=axes.x, ylabel=axes.y)
    plot.set_ylim(max(0.0, min(float(band.low.min()) for band in bands) - 0.03), 1.01)
    plot.grid(visible=True, alpha=0.3)
    plot.legend(loc="lower right", frameon=False)
    drawing.savefig(path)
