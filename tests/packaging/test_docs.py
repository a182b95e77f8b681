"""The pages on data and evaluation name what there is: kinds, recipes, protocols and their metrics."""

import re
from pathlib import Path

import numpy as np
import pytest

from armillary.data.importers import IMPORTERS
from armillary.data.views.recipes import RECIPES
from armillary.evaluation import protocols

DOCS = Path(__file__).parents[2] / "docs"


@pytest.mark.parametrize("name", sorted(IMPORTERS))
def test_every_kind_of_source_is_on_the_page(name: str) -> None:
    words = re.escape(name)
    pattern = rf"`{words}`" if IMPORTERS[name].embedded else rf"armillary data import {words} '?/"
    assert re.search(pattern, (DOCS / "data.md").read_text())


def test_the_page_names_the_recipes_there_are() -> None:
    listed = re.search(r"^Recipes: (.*?)\. Parameters", (DOCS / "data.md").read_text(), re.MULTILINE | re.DOTALL)
    assert listed is not None
    named = set(re.findall(r"`(\w+)`", re.sub(r"\(also[^)]*\)", "", listed[1])))
    assert named == set(RECIPES)


@pytest.mark.parametrize("name", protocols.names())
def test_every_protocol_is_defined(name: str) -> None:
    assert f"**{name}**" in (DOCS / "evaluation.md").read_text()


def test_metrics_of_the_tables_exist() -> None:
    """What the page promises of verification, retrieval, clustering and geometry is what a small set is given."""
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(8), 6)
    points, quality = rng.standard_normal((48, 8)) + 2 * rng.standard_normal((8, 8))[labels], rng.random(48)
    page = (DOCS / "evaluation.md").read_text()
    for name in ("verification", "identification", "retrieval", "clustering", "geometry"):
        section = page[page.index(f"**{name}**") :]
        section = section[: section.index("\n**")]
        found = protocols.evaluate(name, points, labels, columns={"quality": quality}).metrics
        named = re.findall(r"`([a-z]\w+)`", section)
        promised = {f"{name}/{word}" for word in named if not word.startswith(("quality", "dir_", "tar_"))}
        # A word that continues a series (`_recall`) is left out by the pattern.
        assert promised - {f"{name}/roc_curve"} <= set(found), promised - set(found)
