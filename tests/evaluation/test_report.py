"""Figures and pages: what is drawn is what was measured, and no text gets out of its place."""

import json
import re
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest
from matplotlib.image import imread

from armillary.evaluation.figures import (
    cmc_bands,
    cmc_figure,
    point_figure,
    roc_bands,
    roc_figure,
    save_cmc_png,
    save_roc_png,
)
from armillary.evaluation.protocols import evaluate
from armillary.evaluation.report import Code, Heading, Paragraph, Plot, Table, html_page


@pytest.fixture
def curves(blobs: Any) -> Any:
    def run(seed: Any, noise: Any) -> Any:
        result = evaluate("verification", *blobs(noise=noise, seed=seed))
        return result.curves["roc_far"], result.curves["roc_tar"]

    return {"a & <b>": [run(0, 1.0), run(1, 1.0)], "plain": [run(2, 2.0)]}


def test_bands_span_the_runs_and_read_the_curve_off_exactly(curves: Any) -> None:
    two, one = roc_bands(curves)
    assert (two.runs, one.runs) == (2, 1)
    assert (two.low <= two.mean).all()
    assert (two.mean <= two.high).all()
    assert (two.high - two.low).max() > 0
    np.testing.assert_array_equal(one.low, one.high)
    far, tar = curves["plain"][0]
    for x, y in zip(one.x, one.mean, strict=True):
        assert y == tar[far <= x * (1 + 1e-12)].max()
    assert one.mean[-1] == 1.0


def test_the_figure_shows_mean_and_band_on_a_log_axis(curves: Any) -> None:
    figure = roc_figure(curves)
    shown = [trace.name for trace in figure.data if trace.showlegend is not False]
    assert shown == ["a & <b> (2 runs)", "plain"]
    assert len(figure.data) == 4
    assert figure.layout.xaxis.type == "log"
    np.testing.assert_array_equal(figure.data[-1].y, roc_bands(curves)[1].mean)


def test_cmc_stops_where_a_run_stops() -> None:
    bands = cmc_bands({"a": [[0.5, 0.7, 1.0]], "b": [[0.25, 1.0], [0.75, 1.0]]})
    assert [band.x.tolist() for band in bands] == [[1, 2], [1, 2]]
    assert bands[1].mean.tolist() == [0.5, 1.0]
    assert len(cmc_figure({"a": [[0.5, 1.0]]}).data) == 1


def test_points_are_means_with_the_range_of_their_runs() -> None:
    points = {"crop 2": ([3.0, 5.0], [0.5, 0.9]), "crop 1": ([1.0], [0.2]), "other": ([2.0], [0.4])}
    crops, other = point_figure(points, x="a", y="b", shades={"crop 2": 7, "crop 1": 5, "other": 6}, shade="c").data
    assert list(crops.text) == ["crop 1", "crop 2"]
    assert list(crops.x) == [1.0, 4.0]
    assert list(crops.y) == pytest.approx([0.2, 0.7])
    assert list(crops.error_y.array) == pytest.approx([0, 0.2])
    assert list(crops.error_x.arrayminus) == [0, 1]
    assert list(crops.marker.color) == [5, 7]
    assert [crops.textposition[0], other.textposition[0], crops.textposition[1]] == [
        "top center", "bottom center", "top center",
    ]  # fmt: skip


def test_shades_span_what_is_shown() -> None:
    points = {"a": ([1.0], [2.0]), "b": ([2.0], [1.0])}
    axis = point_figure(points, x="x", y="y", shades={"a": 0.82, "b": 0.92}, shade="s").layout.coloraxis
    assert (axis.cmin, axis.cmax, axis.colorbar.title.text) == (0.82, 0.92, "s")
    assert point_figure(points, x="x", y="y").layout.coloraxis.cmin is None


def test_nothing_to_draw_is_refused() -> None:
    with pytest.raises(ValueError, match="no point"):
        point_figure({}, x="x", y="y")
    with pytest.raises(ValueError, match="no ROC curve"):
        roc_figure({"a": []})
    with pytest.raises(ValueError, match="no CMC curve"):
        cmc_figure({})


def test_png_files_hold_a_picture(curves: Any, tmp_path: Any) -> None:
    save_roc_png(curves, tmp_path / "roc.png")
    save_cmc_png({"a": [[0.5, 0.7, 1.0]]}, tmp_path / "cmc.png")
    for name in ("roc.png", "cmc.png"):
        picture = imread(tmp_path / name)
        assert min(picture.shape[:2]) > 300
        assert len(np.unique(picture.reshape(-1, picture.shape[-1]), axis=0)) > 10


class Structure(HTMLParser):
    """Elements, attributes and balanced tags."""

    VOID = ("meta", "link", "br", "img")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: Any, attrs: Any) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: Any) -> None:
        assert self.open.pop() == tag

    def count(self, tag: Any) -> Any:
        return sum(name == tag for name, _ in self.elements)


NASTY = "</script><script>alert(1)</script><img src=x onerror=alert(2)> & \"quoted\" 'too'"


@pytest.fixture
def page(curves: Any) -> Any:
    table = Table((NASTY, "runs", "auc"), [(NASTY, 2, 0.5), ("b", None, "0.91 ± 0.02")], NASTY, highlight=0)
    curves = {NASTY: curves["plain"]}
    plots = [Plot(roc_figure(curves, title=NASTY), NASTY), Plot(cmc_figure({NASTY: [[0.5, 1.0]]}), "two")]
    return html_page(NASTY, [Heading(NASTY), Paragraph(NASTY, strong=True), Code(NASTY, NASTY), table, *plots])


def test_text_never_becomes_markup(page: Any) -> None:
    structure = Structure()
    structure.feed(page)
    assert structure.open == []
    assert structure.count("img") == 0
    # plotly, ours, and the data of two figures.
    assert structure.count("script") == 4
    assert not [attrs for _, attrs in structure.elements if any(name.startswith("on") for name in attrs)]


def test_the_page_needs_no_network_and_holds_plotly_once(page: Any) -> None:
    structure = Structure()
    structure.feed(page)
    assert not [attrs for _, attrs in structure.elements if {"src", "href"} & attrs.keys()]
    assert page.count("plotly.js v") == 1
    assert "plotly.js" not in html_page("short", [Paragraph("no figure")])
    assert len(html_page("short", [Paragraph("no figure")])) < 10_000


def test_figures_keep_their_numbers(page: Any, curves: Any) -> None:
    data = re.findall(r'<script type="application/json">(.*?)</script>', page, re.DOTALL)
    cmc = json.loads(data[1])
    assert cmc["data"][0]["name"] == NASTY
    assert cmc["layout"]["yaxis"]["title"]["text"] == "share of queries found"


def test_tables_are_readable_by_machines_and_people(page: Any) -> None:
    structure = Structure()
    structure.feed(page)
    assert [attrs.get("scope") for tag, attrs in structure.elements if tag == "th"] == ["col"] * 3 + ["row"] * 2
    assert '<td class="number">0.5000</td>' in page
    assert '<td class="number">0.91 ± 0.02</td>' in page
    assert page.count('<tr class="best">') == 1
    assert structure.elements[0] == ("html", {"lang": "en"})


def test_rows_of_the_wrong_length_are_refused() -> None:
    with pytest.raises((ValueError, IndexError)):
        html_page("t", [Table(("a", "b"), [("x",)], "short row")])
