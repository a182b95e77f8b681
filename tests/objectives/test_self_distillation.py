"""Objectives of self-distillation: what a step does to teacher and centre, masks, queries' places, attention."""

from __future__ import annotations

import copy
import json
import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from armillary.components.attention import attention_pictures, class_attention, class_weights, heaviest_patches, jaccard
from armillary.components.backbones import build_encoder
from armillary.components.counter import key, sample_keys
from armillary.components.frozen import ClassMeans
from armillary.components.rotary import RotaryDecoder
from armillary.components.transformers import small_transformer
from armillary.objectives import Batch, Objective, registry
from armillary.objectives.dense import independent_masks, spread_masks
from armillary.objectives.positional_queries import places_in
from armillary.spec.errors import UserError
from armillary.spec.home import runs_dir
from armillary.spec.jobs import BackboneSpec
from armillary.testing import convergence, tiny
from armillary.testing.gloo_pool import shared_pool

WITH_PROTOTYPES = ("dino", "ibot", "dinov2", "dinov3_gram", "pq", "cr2pq")


def made(name: str, options: dict[str, Any] | None = None, **arguments: Any) -> tuple[Any, Batch]:
    cls = registry.get(name)
    values = options or {}
    needs = cls.needs_for(tiny.hyperparameters(cls, values))
    return tiny.build(cls, values, **arguments), tiny.batch(needs)


def step(objective: Objective, batch: Batch, number: int = 0) -> None:
    """One step of plain gradient descent, with the hooks."""
    objective.step = number
    objective.zero_grad()
    objective(batch).loss.backward()
    with torch.no_grad():
        for parameter in objective.parameters():
            if parameter.grad is not None:
                parameter.sub_(0.1 * parameter.grad)
    objective.after_step(number)


@pytest.mark.parametrize("name", WITH_PROTOTYPES)
def test_behind_the_first_epoch_every_parameter_learns(name: str) -> None:
    options = {"formulation": "reconstruction"} if name == "cr2pq" else {}
    objective, batch = made(name, options)
    objective.epoch = 1
    objective(batch).loss.backward()
    still = {
        key
        for key, value in objective.named_parameters()
        if value.requires_grad and (value.grad is None or not value.grad.any())
    }
    # Without masks a mask token is idle.
    assert still == ({"encoder.body.mask_token"} if name == "cr2pq" else set())


@pytest.mark.parametrize("name", ["byol", *WITH_PROTOTYPES])
def test_a_teacher_has_no_gradient_and_follows(name: str) -> None:
    objective, batch = made(name, {"momentum": 0.75})
    before = copy.deepcopy(objective.teacher["encoder"])
    step(objective, batch)
    assert all(parameter.grad is None for parameter in objective.teacher.parameters())
    student = dict(objective.encoder.named_parameters())
    moved = 0.0
    for (path, now), old in zip(objective.teacher["encoder"].named_parameters(), before.parameters(), strict=True):
        torch.testing.assert_close(now, 0.75 * old + 0.25 * student[path])
        moved += float((now - old).abs().sum())
    assert moved > 0


@pytest.mark.parametrize("predictor", ["linear", "bias", "none"])
def test_predictors_of_the_collapse_study(predictor: str) -> None:
    objective, batch = made("simsiam", {"predictor": predictor})
    first = float(objective(batch).loss.detach())
    for number in range(5):
        step(objective, batch, number)
    assert float(objective(batch).loss.detach()) < first
    if predictor == "none":
        assert float(objective(batch).metrics["de_centering"]) == 0


@pytest.mark.parametrize(("momentum", "expected"), [(1.0, 0.0), (0.0, 1.0), (0.9, 0.1)])
def test_the_centre_is_that_of_earlier_steps(momentum: float, expected: float) -> None:
    objective, batch = made("dino", {"center_momentum": momentum})
    logits = objective.teacher(torch.cat(batch.views[:2]))
    loss = objective(batch).loss
    assert not objective.center.value.any()
    objective.after_step(0)
    torch.testing.assert_close(objective.center.value, expected * logits.mean(dim=0))
    if expected:
        assert objective(batch).loss != loss


def test_temperature_and_freezing_are_functions_of_the_epoch() -> None:
    objective, _ = made("dino", {"frozen_epochs": 2, "teacher_warmup_epochs": 30})
    found = []
    for objective.epoch in (0, 15, 29, 30):
        found.append(objective.teacher_temperature)
    assert found == pytest.approx([0.04, 0.05551724, 0.07, 0.07], abs=1e-8)
    for objective.epoch, frozen in ((0, True), (1, True), (2, False)):
        assert objective.frozen is frozen


def test_ibot_without_masks_is_dino() -> None:
    ibot, batch = made("ibot", {"patch_weight": 0.0, "mask_share": 0.0})
    dino: Any = tiny.build(registry.get("dino"), encoder=copy.deepcopy(ibot.encoder))
    dino.load_state_dict({name: value for name, value in ibot.state_dict().items() if "patch_center" not in name})
    torch.testing.assert_close(ibot(batch).loss, dino(batch).loss)
    assert float(ibot(batch).metrics["patch_loss"]) == 0


def test_dinov2_without_its_terms_is_dino_of_masked_crops() -> None:
    plain = {"patch_weight": 0.0, "koleo_weight": 0.0, "centering": "centering", "shared_head": True}
    dinov2, batch = made("dinov2", {**plain, "mask_share": 0.0})
    dino: Any = tiny.build(registry.get("dino"), encoder=copy.deepcopy(dinov2.encoder))
    dino.load_state_dict({name: value for name, value in dinov2.state_dict().items() if "patch_center" not in name})
    torch.testing.assert_close(dinov2(batch).loss, dino(batch).loss)


def test_gram_snapshots_come_when_they_are_due() -> None:
    objective, batch = made("dinov3_gram", {"start_step": 2, "update_every": 2, "max_updates": 1, "momentum": 0.5})
    follower, snapshot = objective.teacher["encoder"], objective.gram_teacher["encoder"]
    equal, losses = [], []
    for number in range(7):
        losses.append(float(objective(batch).metrics["gram"]) if number in (0, 6) else None)
        step(objective, batch, number)
        equal.append(torch.equal(follower.neck.weight, snapshot.neck.weight))
    # After steps 2 and 4 it is what the teacher was then; the one refresh is behind it after that.
    assert equal == [False, True, False, True, False, False, False]
    assert losses[0] == 0
    assert losses[6] is not None
    assert losses[6] > 0


# Masks.


def test_masks_of_single_crops() -> None:
    keys = sample_keys(key(1), torch.arange(4000))
    masked = independent_masks(keys, (8, 8), 0.5, (0.1, 0.5)).float().mean(dim=1)
    some = masked[masked > 0]
    assert len(some) / 4000 == pytest.approx(0.5, abs=0.03)
    assert float(some.min()) >= 6 / 64
    assert float(some.max()) <= 0.5
    assert float(some.mean()) == pytest.approx(0.3, abs=0.02)
    assert not independent_masks(keys, (8, 8), 0.0, (0.1, 0.5)).any()


def test_masks_dealt_out_over_the_batch() -> None:
    keys = sample_keys(key(1), torch.arange(40))
    masks = spread_masks(keys, (16, 16), 0.5, (0.1, 0.5))
    shares = masks.float().mean(dim=1).sort(descending=True).values
    assert int((shares > 0).sum()) == 20
    # One ratio out of each of 20 equal parts of [0.1, 0.5].
    edges = torch.linspace(0.5, 0.1, 21)
    assert ((shares[:20] <= edges[:-1] + 1e-6) & (shares[:20] >= edges[1:] - 1 / 256)).all()
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    assert torch.equal(spread_masks(keys[order], (16, 16), 0.5, (0.1, 0.5)), masks[order])
    assert not spread_masks(keys, (16, 16), 0.0, (0.1, 0.5)).any()


def masks_part(count: int) -> Tensor:
    from armillary import collectives

    keys = sample_keys(key(1), torch.arange(count * collectives.world_size()))
    return spread_masks(keys.chunk(collectives.world_size())[collectives.rank()], (4, 4), 0.5, (0.1, 0.5))


@pytest.mark.xdist_group("gloo")
def test_workers_deal_out_the_masks_of_one() -> None:
    keys = sample_keys(key(1), torch.arange(24))
    both = torch.cat(shared_pool().run(masks_part, 12))
    assert torch.equal(both, spread_masks(keys, (4, 4), 0.5, (0.1, 0.5)))


# Places.


def crop(box: list[float], flip: bool = False) -> dict[str, Tensor]:
    return {"box": torch.tensor([box]), "flip": torch.tensor([float(flip)])}


def test_a_crop_in_itself_lies_on_its_grid() -> None:
    whole = crop([0.1, 0.2, 0.7, 0.8])
    places = places_in(whole, (3, 3), whole, (3, 3))[0]
    expected = torch.tensor([[x, y] for y in range(3) for x in range(3)], dtype=torch.float32)
    torch.testing.assert_close(places, expected, atol=1e-5, rtol=0)
    moved = places_in(crop([0.3, 0.2, 0.5, 0.4]), (2, 2), crop([0.1, 0.0, 0.7, 0.6]), (3, 3))
    shifted = places_in(crop([0.4, 0.4, 0.6, 0.6]), (2, 2), crop([0.2, 0.2, 0.8, 0.8]), (3, 3))
    torch.testing.assert_close(moved, shifted, atol=1e-5, rtol=0)


@pytest.mark.parametrize("small_flip", [False, True])
@pytest.mark.parametrize("large_flip", [False, True])
def test_places_lead_to_the_same_pixels(small_flip: bool, large_flip: bool) -> None:
    """Where a patch of one view is said to lie in the other one, that one shows the same part of the image."""
    image = torch.arange(24 * 24).view(24, 24)
    boxes = {"small": (6, 12, 12, 18), "large": (0, 6, 18, 24)}  # x0, y0, x1, y1 in pixels
    flips = {"small": small_flip, "large": large_flip}
    shown = {}
    for name, (x0, y0, x1, y1) in boxes.items():
        part = image[y0:y1, x0:x1]
        shown[name] = part.flip(1) if flips[name] else part
    drawn = {name: crop([side / 24 for side in box], flips[name]) for name, box in boxes.items()}
    places = places_in(drawn["small"], (2, 2), drawn["large"], (6, 6))[0].view(2, 2, 2)
    for row in range(2):
        for column in range(2):
            x, y = (round(float(value) * 3) for value in places[row, column])
            patch = shown["small"][3 * row : 3 * row + 3, 3 * column : 3 * column + 3]
            there = shown["large"][y : y + 3, x : x + 3]
            assert set(patch.flatten().tolist()) == set(there.flatten().tolist())


def test_large_crops_do_not_see_queries() -> None:
    pq, batch = made("pq")
    pq.eval()
    torch.testing.assert_close(pq.see(batch, pq.queries(batch)).embeddings, pq.see(batch).embeddings)


def test_answers_depend_on_relative_places_alone() -> None:
    decoder, tokens = RotaryDecoder(16, depth=2).double(), torch.randn(2, 9, 16, dtype=torch.float64)
    places, wanted = torch.rand(9, 2) * 3, torch.rand(2, 4, 2) * 3
    answers = decoder(tokens, places, wanted)
    torch.testing.assert_close(decoder(tokens, places + 2.5, wanted + 2.5), answers, rtol=1e-5, atol=1e-6)
    assert (decoder(tokens, places, wanted + 2.5) - answers).abs().max() > 1e-3


# Distillation.


def finished_run(name: str, objective: str, classes: int) -> torch.nn.Module:
    """Writes what a finished run leaves behind; returns its encoder."""
    spec = BackboneSpec.model_validate({"name": "small_convnet", "embedding_dim": 6, "width": 4})
    encoder = build_encoder(spec, in_channels=1, image_size=(8, 8)).eval()
    folder = runs_dir() / name / "model"
    folder.mkdir(parents=True)
    save_file(encoder.state_dict(), folder / "encoder.safetensors")
    rows = {"loss.weight": torch.randn(classes, 6), "loss.bias": torch.randn(classes)}
    save_file(rows, folder / "head.safetensors")
    described = {"backbone": spec.model_dump(), "in_channels": 1, "image_size": [8, 8], "objective": objective}
    (folder / "model.json").write_text(json.dumps(described))
    encoder.rows = rows  # type: ignore[assignment]
    return encoder


def test_a_finished_run_teaches() -> None:
    encoder = finished_run("big", "softmax", tiny.NUM_CLASSES)
    cls: Any = registry.get("distillation")
    assert cls.needs_for(cls.Hyperparameters(teacher="big")).fields == ()
    assert cls.needs_for(cls.Hyperparameters(teacher="big", alpha=0.5)).fields == ("label",)
    objective: Any = tiny.build(cls, {"teacher": "big"}).train()
    images = torch.rand(5, 1, 8, 8)
    rows: Any = encoder.rows
    expected = encoder(images) @ rows["loss.weight"].T + rows["loss.bias"]
    torch.testing.assert_close(objective.teacher(images), expected.detach())
    assert not objective.teacher.training
    assert not any(parameter.requires_grad for parameter in objective.teacher.parameters())


def test_runs_that_cannot_teach() -> None:
    finished_run("margin", "arcface", 4)
    finished_run("few", "softmax", 3)
    cls: Any = registry.get("distillation")
    with pytest.raises(UserError, match="arcface"):
        cls.needs_for(cls.Hyperparameters(teacher="margin"))
    with pytest.raises(UserError, match="few"):
        cls.needs_for(cls.Hyperparameters(teacher="fev"))
    with pytest.raises(UserError, match="3 classes, the data has 4"):
        tiny.build(cls, {"teacher": "few"})


def test_class_means_find_the_nearest_class() -> None:
    encoder = torch.nn.Flatten()
    means = ClassMeans(encoder, 2, 3, scale=10.0)
    images = torch.tensor([[5.0, 1.0], [5.0, 1.2], [5.0, -1.0], [4.0, 0.0]]).view(4, 1, 1, 2)
    labels = torch.tensor([0, 0, 1, 2])
    means.fit([(images[:2], labels[:2]), (images[2:], labels[2:])])
    assert means(images).argmax(dim=1).tolist() == labels.tolist()
    torch.testing.assert_close(means.center, images.flatten(1).mean(dim=0))


# Attention (dino_attention).


def test_attention_of_the_class_token() -> None:
    torch.manual_seed(0)
    encoder = small_transformer(1, (16, 16), 8, width=24, depth=2, heads=3, patch=4)
    images = torch.rand(2, 1, 16, 16)
    attention = class_attention(encoder, images)
    assert attention.shape == (2, 3, 4, 4)
    assert (attention.sum(dim=(2, 3)) < 1).all()
    # The weights that the last layer uses: its output at the class token is their mean of the values.
    blocks: Any = encoder.body.blocks
    taken: dict[str, Tensor] = {}
    layer = blocks[-1].attn
    hooks = [
        layer.register_forward_pre_hook(lambda _, inputs: taken.update(hidden=inputs[0])),
        layer.proj.register_forward_pre_hook(lambda _, inputs: taken.update(mixed=inputs[0])),
    ]
    encoder.tokens(images)
    for hook in hooks:
        hook.remove()
    values = layer.qkv(taken["hidden"]).unflatten(2, (3, 3, 8))[:, :, 2].transpose(1, 2)
    mixed = (class_weights(layer, taken["hidden"])[:, :, None] @ values)[:, :, 0].flatten(1)
    torch.testing.assert_close(mixed, taken["mixed"][:, 0])


def test_heaviest_patches_and_overlap() -> None:
    attention = torch.tensor([[[0.5, 0.2], [0.2, 0.1]], [[0.1, 0.1], [0.1, 0.7]]])[None]
    kept = heaviest_patches(attention, 0.6)
    assert kept.tolist() == [[[[True, True], [False, False]], [[False, False], [False, True]]]]
    assert heaviest_patches(attention, 1.0).all()
    truth = torch.tensor([[[False, False], [False, True]]])
    assert jaccard(kept, truth).tolist() == [1.0]
    assert jaccard(kept.flip(1), truth).tolist() == [1.0]
    assert jaccard(kept, torch.tensor([[[True, True], [True, False]]])).tolist() == pytest.approx([2 / 3])


def test_pictures_of_attention() -> None:
    dino, batch = made("ibot")
    found = dino.pictures(batch.views[0][:2])["attention"]
    assert found.shape == (2, 2 + 2, 1, 6, 6)
    assert float(found.min()) >= 0
    assert float(found.max()) <= 1
    torch.testing.assert_close(found, attention_pictures(dino.teacher["encoder"], batch.views[0][:2]))
    assert made("dino")[0].pictures(batch.views[0][:2]) == {}


@pytest.mark.parametrize("name", ["byol", "moco_v1", "moco_v2", "moco_v3", "looc", "pcl", "hcsc", "mice"])
def test_student_or_teacher_is_exported(name: str) -> None:
    for export, part in (("student", "encoder"), ("teacher", "teacher.encoder")):
        objective, batch = made(name, {"export": export})
        step(objective, batch)
        objective.eval()
        module = objective.get_submodule(part)
        assert objective.exported() is module
        torch.testing.assert_close(objective.embed(batch.views[0]), module(batch.views[0]))


def test_needs_follow_the_number_of_small_crops() -> None:
    cls: Any = registry.get("dino")
    needs = cls.needs_for(cls.Hyperparameters(local_crops=3))
    assert needs == replace(cls.needs, views=5, recipe_options={"local_crops": 3})


@pytest.mark.slow
def test_the_command_prints_what_a_short_training_learns(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(convergence, "LIMIT", 0.01)
    assert convergence.main(["cr2pq", "train.epochs=1", "--seeds", "2", "data.fold=1"]) == 0
    first, second = capsys.readouterr().out.splitlines()
    number = r"-?\d+\.\d+"
    form = (
        rf"knn/top1 {number} to {number}, gain [+-]{number} \(margin 0.1\) BELOW; patch_loss {number} to {number}; "
        rf"{number} s OVER 0.01 s"
    )
    assert re.fullmatch(f"cr2pq seed 0: {form}; not collapsed", first)
    assert re.fullmatch(f"cr2pq seed 1: {form}; not collapsed", second)
    assert first.split(": ")[1].split("; ")[:2] != second.split(": ")[1].split("; ")[:2]
