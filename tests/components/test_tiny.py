"""Tiny batches by the recipes whose draws objectives learn from."""

from __future__ import annotations

import pytest
import torch

from armillary.objectives import Needs
from armillary.testing import tiny


def test_local_crops() -> None:
    batch = tiny.batch(Needs(views=5, recipe="multicrop_small", recipe_options={"local_crops": 3}), dtype=torch.float64)
    assert [view.shape[-1] for view in batch.views] == [6, 6, 4, 4, 4]
    assert all(view.dtype == torch.float64 for view in batch.views)
    assert len(batch.parameters) == 5
    assert all(drawn["box"].shape == (12, 4) for drawn in batch.parameters)
    again = tiny.batch(Needs(views=5, recipe="multicrop_small", recipe_options={"local_crops": 3}), dtype=torch.float64)
    assert all(torch.equal(one, other) for one, other in zip(batch.views, again.views, strict=True))
    half = tiny.part(batch, 1, 2)
    assert torch.equal(half.parameters[3]["box"], batch.parameters[3]["box"][6:])


@pytest.mark.parametrize(("recipe", "name"), [("rotation", "rotation_class"), ("jigsaw", "permutation")])
def test_what_a_recipe_draws(recipe: str, name: str) -> None:
    batch = tiny.batch(Needs(recipe=recipe))
    assert batch.parameters[0][name].dtype == torch.int64
    assert batch.views[0].shape == (12, 1, 6, 6)
    assert batch.parameters[0][name].unique().numel() > 1


def test_other_batches_say_that_nothing_was_cut() -> None:
    batch = tiny.batch(Needs(views=2, recipe="simclr"))
    assert batch.parameters[1]["box"].tolist() == [[0, 0, 1, 1]] * 12


def test_encoders_by_need() -> None:
    assert isinstance(tiny.encoder_for(Needs(encoder="tokens")), tiny.TinyTokenEncoder)
    assert isinstance(tiny.encoder_for(Needs(encoder="maps")), tiny.TinyEncoder)
