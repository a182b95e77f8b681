"""What the first objectives ask for, and how their mistakes read."""

from __future__ import annotations

import pytest
import torch

from armillary import losses, objectives
from armillary.objectives import names
from armillary.spec.errors import UserError
from armillary.testing import tiny

FIRST = ["arcface", "cosface", "normface", "simclr", "softmax", "supcon", "triplet"]


def test_first_seven() -> None:
    assert set(FIRST) <= set(names())


def test_needs() -> None:
    for name in ("softmax", "normface", "cosface", "arcface"):
        needs = objectives.get(name).needs
        assert (needs.views, needs.recipe, needs.fields, needs.sampler) == (1, "faces", ("label",), "random")
        assert not needs.batch_coupled
    assert objectives.get("simclr").needs.fields == ()
    assert objectives.get("supcon").needs.fields == ("label",)
    assert {objectives.get(name).needs.views for name in ("simclr", "supcon")} == {2}
    assert all(objectives.get(name).needs.batch_coupled for name in ("simclr", "supcon", "triplet"))


def test_triplet_samples_per_class() -> None:
    triplet = objectives.get("triplet")
    values = objectives.hyperparameters("triplet", {"samples_per_class": 7})
    assert triplet.needs_for(values).samples_per_class == 7
    assert triplet.needs_for(values).sampler == "class_balanced"


def test_mistakes() -> None:
    with pytest.raises(UserError, match="did you mean 'arcface'"):
        objectives.get("arkface")
    with pytest.raises(UserError, match="did you mean 'margin'"):
        objectives.hyperparameters("arcface", {"margn": 0.3})
    with pytest.raises(UserError, match=r"(?s)less than or equal.*found 3.*number, >= 0 and <= 1.57"):
        objectives.hyperparameters("arcface", {"margin": 3})
    with pytest.raises(UserError, match=r"(?s)found 'wide'"):
        objectives.hyperparameters("arcface", {"margin": "wide"})
    with pytest.raises(UserError, match=r"(?s)mining.*semi_hard"):
        objectives.hyperparameters("triplet", {"mining": "hardest"})
    with pytest.raises(UserError):
        objectives.hyperparameters("cosface", {"scale": float("nan")})


def test_hyperparameters_reach_the_loss() -> None:
    arcface = tiny.build(objectives.get("arcface"), {"margin": 0.3, "scale": 12.0, "extension": False}).loss
    assert isinstance(arcface, losses.ArcFace)
    assert (arcface.margin, arcface.scale, arcface.extension) == (0.3, 12.0, False)
    supcon = tiny.build(objectives.get("supcon"), {"temperature": 0.2, "mode": "in", "projection_layers": 1})
    assert isinstance(supcon.loss, losses.SupCon)
    assert (supcon.loss.temperature, supcon.loss.mode) == (0.2, "in")
    assert [type(layer).__name__ for layer in supcon.projector.children()] == ["Linear"]  # type: ignore[union-attr]
    triplet = tiny.build(objectives.get("triplet"), {"mining": "batch_hard", "squared": False, "soft": True}).loss
    assert isinstance(triplet, losses.Triplet)
    assert (triplet.mining, triplet.squared, triplet.soft) == ("batch_hard", False, True)


def test_projector_is_dropped() -> None:
    simclr = tiny.build(objectives.get("simclr"))
    images = torch.rand(4, tiny.CHANNELS, tiny.HEIGHT, tiny.WIDTH)
    assert torch.equal(simclr.eval().embed(images), simclr.encoder(images))
