"""View recipes: what an objective sees of an image, and how it is made."""

from __future__ import annotations

from armillary.data.views.pipeline import View, Views, make_views
from armillary.data.views.recipes import RECIPES, Recipe

__all__ = ["RECIPES", "Recipe", "View", "Views", "make_views"]
