"""Procedural faces: determinism, and truth that is in the pictures."""

from __future__ import annotations

import dataclasses
from collections import Counter
from itertools import islice

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from pydantic import ValidationError

from armillary.data.identities import (
    COLUMNS,
    EMBEDDED,
    IdentitiesSpec,
    NoiseSpec,
    images_per_identity,
    make_identities,
    records,
    render_identity_frames,
    similarity_graph,
)
from armillary.data.identities.captions import captions
from armillary.data.identities.degrade import degrade, quality
from armillary.data.identities.labels import STRANGERS, call_roll
from armillary.data.identities.people import traits, vectors
from armillary.data.identities.render import render
from armillary.data.identities.scene import MASKS, Scenes, scenes_of_images
from armillary.data.importers import ensure_dataset
from armillary.data.layout import Record
from armillary.data.store import Dataset
from armillary.spec.errors import UserError

SMALL = IdentitiesSpec(identities=8, images_per_identity=6, size=32)


def generated(spec: IdentitiesSpec) -> list[Record]:
    return list(records(spec))


def pixels(record: Record) -> NDArray[np.uint8]:
    assert isinstance(record.image, np.ndarray)
    return record.image


def studio(count: int, **changes: float | bool) -> Scenes:
    """Frontal, evenly lit, undegraded scenes in front of various backgrounds, and what is changed about them."""
    scenes = scenes_of_images(SMALL, np.arange(count))
    still = dict.fromkeys(("yaw", "pitch", "roll", "shift_x", "shift_y", "smile", "mouth_open", "brow_raise"), 0.0)
    clear = {"scale": 0.8, "ambient": 1.0, "intensity": 1.0, "cast": 1.0, "blur": 0.0, "noise": 0.0, "resolution": 64}
    plain: dict[str, float | bool] = still | clear | {"masked": False}
    values = {}
    for name, value in (plain | changes).items():
        like = getattr(scenes, name)
        values[name] = np.full_like(like, value)
    return dataclasses.replace(scenes, **values)


def dark_room(scenes: Scenes) -> Scenes:
    black = {name: np.zeros_like(getattr(scenes, name)) for name in ("background", "background_end", "blob", "clothes")}
    return dataclasses.replace(scenes, **black)


def pictures(scenes: Scenes, size: int = 64) -> NDArray[np.float64]:
    people = traits(SMALL, np.arange(len(scenes.yaw)))
    return degrade(render(people, scenes, size), scenes, size, 3).astype(np.float64)


def test_a_picture_is_a_function_of_the_specification_and_its_number() -> None:
    spec = IdentitiesSpec(identities=40, images_per_identity=30, size=32, noise=NoiseSpec(flip=0.1, outlier=0.1))
    threads = torch.get_num_threads()
    whole = generated(spec)
    torch.set_num_threads(1 + threads % 2)
    try:
        # Other blocks and other starts: 1,024 pictures are drawn at once.
        for start in (0, 517, 1023, 1199):
            for one, other in zip(whole[start : start + 40], islice(records(spec, start), 40), strict=False):
                assert pixels(one).tobytes() == pixels(other).tobytes()
                assert (one.label, one.fields) == (other.label, other.fields)
    finally:
        torch.set_num_threads(threads)
    changed = generated(spec.model_copy(update={"seed": 1}))
    assert all(pixels(one).tobytes() != pixels(other).tobytes() for one, other in zip(whole, changed, strict=True))


def test_a_picture_does_not_depend_on_its_neighbours() -> None:
    scenes = scenes_of_images(IdentitiesSpec(difficulty=1), np.arange(24))
    people = traits(SMALL, np.arange(24))
    together = degrade(render(people, scenes, 64), scenes, 64, 3)
    for row in range(0, 24, 5):
        alone, at = scenes.take(slice(row, row + 1)), np.array([row])
        assert np.array_equal(degrade(render(people.take(at), alone, 64), alone, 64, 3)[0], together[row])


@pytest.mark.parametrize("yaw", [25.0, 70.0])
def test_turned_left_and_right_are_mirror_images(yaw: float) -> None:
    people = traits(SMALL, np.arange(16))
    people = dataclasses.replace(people, mole=np.zeros(16, dtype=np.float32))
    left, right = (render(people, dark_room(studio(16, yaw=side * yaw)), 64).reshape(3, 16, 64, 64) for side in (-1, 1))
    assert np.abs(left - right).mean() > 0.02
    np.testing.assert_allclose(left, right[..., ::-1], atol=2e-3)


def test_eyes_move_with_yaw() -> None:
    """The whites of the eyes, the brightest of a dark face, lie on the side the face turns to."""
    dark, one = np.full((16, 3), 0.15, dtype=np.float32), np.ones(16, dtype=np.float32)
    people = dataclasses.replace(
        traits(SMALL, np.arange(16)),
        skin=dark,
        hair=dark,
        lip_color=dark,
        iris=dark,
        wears_glasses=one < 0,
        eye_width=0.21 * one,
        eye_height=0.13 * one,
    )
    for yaw in (-40.0, 40.0):
        bright = render(people, dark_room(studio(16, yaw=yaw)), 64).mean(axis=0).reshape(16, 64, 64) > 0.4
        assert bright.any(axis=(1, 2)).all()
        place = (bright * (np.arange(64) - 31.5)).sum(axis=(1, 2)) / bright.sum(axis=(1, 2))
        assert (np.sign(place) == np.sign(yaw)).all()


def test_pitch_lifts_the_face() -> None:
    people = traits(SMALL, np.arange(8))
    white = np.ones((8, 3), dtype=np.float32)
    people = dataclasses.replace(people, skin=white, lip_color=white, beard=np.zeros(8, dtype=np.float32))
    rows = []
    for pitch in (-25.0, 25.0):
        image = render(people, studio(8, pitch=pitch), 64).mean(axis=0).reshape(8, 64, 64)[:, 16:48, 24:40]
        dark = (1 - image).clip(0.5) - 0.5
        rows.append((dark * np.arange(32)[:, None]).sum(axis=(1, 2)) / dark.sum(axis=(1, 2)))
    assert np.median(rows[1] - rows[0]) < -3


def test_masks_have_their_colour() -> None:
    scenes = studio(32, masked=True)
    lower = pictures(scenes)[:, 46:50, 28:36].mean(axis=(1, 2)) / 255
    bare = pictures(studio(32))[:, 46:50, 28:36].mean(axis=(1, 2)) / 255
    wanted = MASKS[scenes.mask_color]
    assert np.abs(lower - wanted).max() < 0.12
    assert (np.abs(bare - wanted).mean(axis=1) > np.abs(lower - wanted).mean(axis=1)).all()


@pytest.mark.parametrize(("name", "value"), [("blur", 0.03), ("resolution", 16)])
def test_degradations_lower_sharpness_and_quality(name: str, value: float) -> None:
    sharp, worse = studio(16), studio(16, **{name: value})
    energy = [np.abs(np.diff(pictures(scenes), axis=2)).mean() for scenes in (sharp, worse)]
    assert energy[1] < 0.7 * energy[0]
    assert (quality(worse, 64) < quality(sharp, 64)).all()


def test_noise_has_the_deviation_it_says() -> None:
    clean, noisy = pictures(studio(16)), pictures(studio(16, noise=0.05))
    inside = (clean > 50) & (clean < 205)
    assert (noisy - clean)[inside].std() == pytest.approx(255 * 0.05, rel=0.03)
    assert (quality(studio(16, noise=0.05), 64) < quality(studio(16), 64)).all()


def test_quality_is_a_share_and_dim_light_costs() -> None:
    everything = quality(scenes_of_images(IdentitiesSpec(difficulty=1), np.arange(2000)), 64)
    assert 0 < everything.min() < 0.1
    assert 0.85 < everything.max() <= 1
    dim = studio(4, intensity=0.5)
    np.testing.assert_allclose(quality(dim, 64), 0.5 * quality(studio(4), 64), rtol=1e-6)


def test_captions_tell_the_truth() -> None:
    spec = IdentitiesSpec(difficulty=0.8, mask_share=0.3, glasses=0.5)
    scenes, people = scenes_of_images(spec, np.arange(600)), traits(spec, np.arange(600))
    words = captions(people, scenes)
    for row, text in enumerate(words):
        assert ("facing left" in text) == (scenes.yaw[row] <= -15)
        assert ("facing right" in text) == (scenes.yaw[row] >= 15)
        assert ("face mask" in text) == bool(scenes.masked[row])
        assert ("bald" in text) == bool(people.bald[row])
        assert ("dim light" in text) == (scenes.intensity[row] < 0.75)
        assert not ("smiling" in text and (scenes.masked[row] or scenes.smile[row] < 0.35))
        assert not ("glasses" in text and not people.wears_glasses[row])
    hair = {color for color in ("black", "brown", "red", "blond", "grey") if any(f"{color} hair" in t for t in words)}
    assert hair == {"black", "brown", "red", "blond", "grey"}


def test_scenes_say_nothing_about_people() -> None:
    """Backgrounds, casts and clothes differ as much within a person as between people."""
    scenes = scenes_of_images(IdentitiesSpec(), np.arange(4000))
    for values in (scenes.background, scenes.cast, scenes.clothes, scenes.light):
        groups = values.reshape(200, 20, 3).astype(np.float64)
        between, within = groups.mean(axis=1).var(axis=0), groups.var(axis=1).mean(axis=0) / 20
        assert np.all(between < 1.4 * within)


def test_noise_shares_are_exact() -> None:
    spec = IdentitiesSpec(identities=50, images_per_identity=11, noise=NoiseSpec(flip=0.15, outlier=0.08, split=0.06))
    roll = call_roll(spec)
    total = 550
    counts = np.bincount(roll.noise, minlength=4)
    assert counts.tolist() == [total - 83 - 44 - 33, 83, 44, 33]
    clean, flipped, strangers, split = (roll.noise == kind for kind in range(4))
    assert (roll.label[clean] == roll.clean[clean]).all()
    assert (roll.label[flipped] != roll.clean[flipped]).all()
    assert roll.label[flipped].max() < 50
    assert (roll.clean[strangers] == -1).all()
    assert (roll.person[strangers] >= STRANGERS).all()
    assert len(np.unique(roll.person[strangers])) == 44
    assert (roll.label[split] >= 50).all()
    assert len(roll.class_names) == roll.label.max() + 1
    for label in np.unique(roll.label[split]):
        assert len(np.unique(roll.person[roll.label == label])) == 1


def test_long_tail() -> None:
    counts = images_per_identity(IdentitiesSpec(identities=30, images_per_identity=100, long_tail=1.0))
    assert counts[:4].tolist() == [100, 50, 33, 25]
    assert (np.diff(counts) <= 0).all()
    assert images_per_identity(IdentitiesSpec(identities=90, images_per_identity=100, long_tail=2.0))[-1] == 2
    rows = generated(IdentitiesSpec(identities=30, images_per_identity=10, long_tail=1.0, size=32))
    histogram = Counter(row.label for row in rows)
    assert [histogram[label] for label in range(5)] == [10, 5, 3, 2, 2]


def test_sequences_and_sets_number_runs_of_a_person() -> None:
    rows = generated(SMALL.model_copy(update={"sequence_length": 4, "sets": 3}))
    assert [row.fields["sequence"] for row in rows[:8]] == [0, 0, 0, 0, 1, 1, 2, 2]
    assert [row.fields["frame"] for row in rows[:8]] == [0, 1, 2, 3, 0, 1, 0, 1]
    assert [row.fields["image_set"] for row in rows[:8]] == [0, 0, 0, 1, 1, 1, 2, 2]
    assert {row.fields["sequence"] for row in generated(SMALL)} == {-1}


def test_frames_move_smoothly() -> None:
    spec = IdentitiesSpec(size=32)
    video = render_identity_frames(spec, identity=3, frames=40)
    yaw = np.array(video.truth["yaw"])
    assert 0 < np.abs(np.diff(yaw)).max() < 15
    assert np.ptp(yaw) > 1
    assert len(set(video.truth["masked"])) == 1
    stills = scenes_of_images(spec, np.arange(40))
    assert np.abs(np.diff(yaw)).mean() < 0.3 * np.abs(np.diff(stills.yaw)).mean()
    assert np.array_equal(render_identity_frames(spec, 3, 7).images, video.images[:7])
    with pytest.raises(UserError, match="frames"):
        render_identity_frames(spec, 0, 0)


def test_the_graph_joins_those_who_look_alike() -> None:
    spec = IdentitiesSpec(identities=120, neighbours=4)
    table = similarity_graph(spec, block=50)
    source, target, weight = (table[name].to_numpy() for name in ("source", "target", "weight"))
    edges = dict(zip(zip(source.tolist(), target.tolist(), strict=True), weight.tolist(), strict=True))
    assert len(edges) == len(source)
    assert (source != target).all()
    assert all(edges[b, a] == value for (a, b), value in edges.items())
    assert np.bincount(source, minlength=120).min() >= 4
    points = vectors(spec, np.arange(120))
    distance = np.linalg.norm(points[:, None] - points[None], axis=-1)
    assert distance[source, target].mean() < 0.85 * distance[~np.eye(120, dtype=bool)].mean()
    order = np.argsort(weight)
    assert (np.diff(distance[source, target][order]) < 1e-6).all()
    # And they look alike: the undegraded frontal pictures of joined people differ less.
    faces = render(traits(spec, np.arange(120)), dark_room(studio(120)), 32)[:, :, 200:900]
    joined = np.abs(faces[:, source] - faces[:, target]).mean(axis=(0, 2))
    others = np.abs(faces[:, source] - faces[:, (target + 60) % 120]).mean(axis=(0, 2))
    assert joined.mean() < 0.9 * others.mean()


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [32, 45, 112])
def test_sizes_and_channels(size: int, channels: int) -> None:
    rows = list(islice(records(IdentitiesSpec(size=size, channels=channels, low_res_share=1.0)), 4))
    for row in rows:
        assert pixels(row).shape == (size, size, channels)
        assert pixels(row).std() > 3
        assert set(row.fields) == set(COLUMNS)
        assert row.fields["resolution"] <= 0.5 * size + 1


def test_difficulty_brings_people_together_and_degrades() -> None:
    easy, hard = IdentitiesSpec(difficulty=0), IdentitiesSpec(difficulty=1)
    spread = [traits(spec, np.arange(500)).mouth_width.std() for spec in (easy, hard)]
    assert spread[1] < 0.7 * spread[0]
    number = np.arange(500)
    scenes = [scenes_of_images(spec, number) for spec in (easy, hard)]
    assert np.abs(scenes[0].yaw).mean() < 0.4 * np.abs(scenes[1].yaw).mean()
    assert quality(scenes[0], 64).mean() > quality(scenes[1], 64).mean() + 0.15
    assert np.abs(scenes[1].yaw).max() <= 90
    assert np.abs(scenes[1].pitch).max() <= 30


def test_into_the_store_and_back() -> None:
    spec = SMALL.model_copy(update={"graph": True, "noise": NoiseSpec(split=0.1)})
    done: list[tuple[int, int | None]] = []
    dataset = make_identities("faces", spec, lambda *report: done.append(report))
    assert done == [(count, 48) for count in range(1, 49)]
    dataset.verify()
    assert dataset.manifest.columns == COLUMNS
    wanted = generated(spec)
    at = 0
    for rows in dataset.rows():
        for image, label, caption in zip(rows.images, rows.label, rows.fields["caption"], strict=True):
            assert np.array_equal(image, pixels(wanted[at]))
            assert (label, caption) == (wanted[at].label, wanted[at].fields["caption"])
            at += 1
    assert at == 48
    assert dataset.table("graph").equals(similarity_graph(spec))
    with pytest.raises(UserError, match="exists already"):
        make_identities("faces", spec)


def test_identities_small_imports_itself() -> None:
    dataset: Dataset = ensure_dataset("identities_small")
    assert len(dataset) == 64 * 12
    assert dataset.manifest.image_shape == (32, 32, 3)
    assert EMBEDDED["identities"].size == 64


def test_specifications_are_checked() -> None:
    with pytest.raises(ValidationError):
        IdentitiesSpec(size=16)
    with pytest.raises(ValidationError, match="together"):
        NoiseSpec(flip=0.5, outlier=0.5)
