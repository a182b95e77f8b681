"""Reports as one HTML file each: no network, readable in light and dark, on a telephone and by a screen reader."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from plotly.graph_objects import Figure


@dataclass(frozen=True)
class Heading:
    """The title of what follows."""

    text: str


@dataclass(frozen=True)
class Paragraph:
    """Plain text; ``strong`` marks the answer a reader came for."""

    text: str
    strong: bool = False


@dataclass(frozen=True)
class Code:
    """Text as it is, e.g. a job file or a command."""

    text: str
    caption: str | None = None


@dataclass(frozen=True)
class Table:
    """A table.

    Args:
        columns: headings.
        rows: cells; the first names its row, ``None`` is empty, floats show 4 decimals, numbers align right.
        caption: says what the table shows.
        highlight: index of the row to set off, e.g. the best one.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[object]]
    caption: str
    highlight: int | None = None


@dataclass(frozen=True)
class Plot:
    """A plotly figure.

    Args:
        figure: its colours are set by the page.
        caption: says in words what it shows; read aloud in its place.
    """

    figure: Figure
    caption: str


Section = Heading | Paragraph | Code | Table | Plot

_CSS = """
:root { color-scheme: light dark; --back: #ffffff; --text: #1b1f24; --soft: #57606a; --line: #d0d7de;
  --panel: #f6f8fa; --accent: #0b62a8; --mark: #e7f1fa; }
@media (prefers-color-scheme: dark) { :root { --back: #14171c; --text: #e4e8ee; --soft: #a0a9b5; --line: #363c45;
  --panel: #1c2129; --accent: #6fb6f2; --mark: #1b3147; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--back); color: var(--text);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 64rem; margin: 0 auto; padding: 2rem 1.25rem 4rem; }
h1 { font-size: 1.75rem; line-height: 1.25; margin: 0 0 1.25rem; text-wrap: balance; }
h2 { font-size: 1.25rem; margin: 2.5rem 0 .75rem; padding-top: 1rem; border-top: 1px solid var(--line); }
p { margin: 0 0 1rem; max-width: 46rem; overflow-wrap: anywhere; }
p.strong { padding: .75rem 1rem; border-left: 4px solid var(--accent); background: var(--panel); font-weight: 600; }
.scroll { overflow-x: auto; margin: 1rem 0 1.5rem; }
.scroll:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; }
table { border-collapse: collapse; min-width: 100%; font-variant-numeric: tabular-nums; }
caption, figcaption { text-align: left; color: var(--soft); font-size: .9rem; padding: 0 0 .5rem; }
th, td { padding: .4rem .75rem; border-bottom: 1px solid var(--line); text-align: left; white-space: nowrap; }
thead th { border-bottom: 2px solid var(--line); }
tbody th { font-weight: 600; }
td.number, th.number { text-align: right; }
tr.best { background: var(--mark); }
figure { margin: 1rem 0 1.5rem; }
figure .plot { min-height: 480px; }
pre { margin: 0; padding: 1rem; background: var(--panel); border: 1px solid var(--line); border-radius: 6px;
  overflow-x: auto; font: .85rem/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
@media print { .scroll, pre { overflow: visible; } }
"""

# Plotly draws with fixed colours: this gives it the page's, again whenever the reader's preference changes.
_SCRIPT = """
(() => {
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const colors = () => {
    const style = getComputedStyle(document.documentElement);
    const read = (name) => style.getPropertyValue(name).trim();
    const axis = { linecolor: read("--line"), tickcolor: read("--line") };
    const layout = { paper_bgcolor: read("--back"), plot_bgcolor: read("--back"),
      "font.color": read("--text"), "hoverlabel.bgcolor": read("--panel"), "hoverlabel.font.color": read("--text") };
    for (const side of ["xaxis", "yaxis"]) for (const key in axis) layout[side + "." + key] = axis[key];
    return layout;
  };
  const plots = [...document.querySelectorAll(".plot")];
  const drawn = plots.map((element) => {
    const figure = JSON.parse(element.nextElementSibling.textContent);
    return Plotly.newPlot(element, figure.data, figure.layout, { responsive: true, displaylogo: false })
      .then(() => Plotly.relayout(element, colors()));
  });
  const repaint = () => plots.forEach((element) => Plotly.relayout(element, colors()));
  Promise.all(drawn).then(() => dark.addEventListener("change", repaint));
})();
"""


def html_page(title: str, sections: Sequence[Section]) -> str:
    """One self-contained page; plotly's script is in it once, and only when there is a :class:`Plot`.

    Every text is escaped, so that names from jobs and datasets cannot put markup into the page.

    Args:
        title: the page's title and first heading.
        sections: what it shows, in order.
    """
    body = "\n".join(_render(section) for section in sections)
    scripts = ""
    if any(isinstance(section, Plot) for section in sections):
        from plotly.offline import get_plotlyjs

        scripts = f"<script>{get_plotlyjs()}</script>\n<script>{_SCRIPT}</script>\n"
    head = (
        '<meta charset="utf-8">\n<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_CSS}</style>"
    )
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n{head}\n</head>\n<body>\n<main>\n<h1>{escape(title)}</h1>\n'
        f"{body}\n</main>\n{scripts}</body>\n</html>\n"
    )


def _render(section: Section) -> str:
    match section:
        case Heading(text):
            return f"<h2>{escape(text)}</h2>"
        case Paragraph(text, strong):
            return f'<p class="strong">{escape(text)}</p>' if strong else f"<p>{escape(text)}</p>"
        case Code(text, caption):
            note = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
            return f'<figure>{note}<pre tabindex="0"><code>{escape(text)}</code></pre></figure>'
        case Table():
            return _render_table(section)
        case Plot(figure, caption):
            return _render_plot(figure, caption)


def _render_table(table: Table) -> str:
    numeric = [
        all(_is_number(row[i]) for row in table.rows if row[i] is not None) and i > 0 for i in range(len(table.columns))
    ]
    kinds = [' class="number"' if number else "" for number in numeric]
    heads = "".join(
        f'<th scope="col"{kind}>{escape(name)}</th>' for name, kind in zip(table.columns, kinds, strict=True)
    )
    lines = []
    for index, row in enumerate(table.rows):
        cells = [f'<th scope="row">{escape(_cell(row[0]))}</th>']
        cells += [f"<td{kind}>{escape(_cell(cell))}</td>" for cell, kind in zip(row[1:], kinds[1:], strict=True)]
        best = ' class="best"' if index == table.highlight else ""
        lines.append(f"<tr{best}>{''.join(cells)}</tr>")
    caption = escape(table.caption)
    return (
        f'<div class="scroll" role="region" aria-label="{caption}" tabindex="0"><table><caption>{caption}</caption>'
        f"<thead><tr>{heads}</tr></thead><tbody>{''.join(lines)}</tbody></table></div>"
    )


def _render_plot(figure: Any, caption: str) -> str:
    # A closing tag inside a string of the data would end the script element.
    data = json.dumps(json.loads(figure.to_json())).replace("<", "\\u003c")
    note = escape(caption)
    return (
        f'<figure><figcaption>{note}</figcaption><div class="plot" role="img" aria-label="{note}"></div>'
        f'<script type="application/json">{data}</script></figure>'
    )


def _is_number(cell: object) -> bool:
    if isinstance(cell, str):
        # "0.912 ± 0.004" and "91.2%" are numbers to a reader.
        return cell.lstrip("+-−")[:1].isdigit()
    return isinstance(cell, int | float) and not isinstance(cell, bool)


def _cell(cell: object) -> str:
    if cell is None:
        return ""
    return f"{cell:.4f}" if isinstance(cell, float) else str(cell)
