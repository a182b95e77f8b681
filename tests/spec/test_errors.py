"""Every way a job file can be wrong: one message with place, key, value found, what is allowed, the nearest name."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import pytest

from armillary.spec.errors import UserError
from armillary.spec.loading import load_job
from armillary.spec.spaces import load_space

TRAIN = "objective:\n  name: arcface\n"
SWEEP = f"kind: sweep\nspace: arcface\nbase:\n  {TRAIN.strip().replace(chr(10), chr(10) + '  ')}\n"


@dataclass
class Bad:
    """A job file's text, and what the message must say: its place, and pieces of its text."""

    name: str
    text: str | bytes
    where: str
    says: list[str]
    overrides: list[str] = field(default_factory=list)


BAD = [
    Bad("empty", "", "job.yaml:1", ["empty", "objective: {name: arcface}"]),
    Bad("only comments", "# nothing\n\n", "job.yaml:1", ["empty"]),
    Bad("binary", b"\x7fELF\x02\x01\x00\xff\xfe", "job.yaml:1", ["binary", "UTF-8"]),
    Bad("binary later", TRAIN.encode() + b"name: \xc3\x28\n", "job.yaml:3", ["0xc3", "binary"]),
    Bad("control character", "name: a\x07b\n", "job.yaml:1", ["U+0007"]),
    Bad("nul byte", b"name: a\x00b\n", "job.yaml:1", ["0x00", "binary"]),
    Bad("list at top", "- name: arcface\n", "job.yaml:1", ["[{'name': 'arcface'}]", "a mapping"]),
    Bad("scalar at top", "arcface\n", "job.yaml:1", ["'arcface'", "a mapping"]),
    Bad("broken", f"{TRAIN}seed: 1: 2\n", "job.yaml:3", ["not valid YAML", "seed: 1: 2"]),
    Bad("unclosed", f"{TRAIN}data: [1,\n", "job.yaml:3", ["not valid YAML", "data: [1,"]),
    Bad("tab", "objective:\n\tname: arcface\n", "job.yaml:2", ["not valid YAML", "spaces, not tabs"]),
    Bad("two documents", f"{TRAIN}---\n{TRAIN}", "job.yaml:3", ["single document"]),
    Bad("duplicate key", f"{TRAIN}seed: 1\nseed: 2\n", "job.yaml:4", ["seed", "twice", "job.yaml:3"]),
    Bad("python tag", "name: !!python/name:os.system x\n", "job.yaml:1", ["name", "tag", "without tags"]),
    Bad("number as key", f"{TRAIN}7: x\n", "job.yaml:3", ["'7'", "text as a key"]),
    Bad("endless alias", "data: &a [*a]\n", "job.yaml:1", ["alias"]),
    Bad("deep", "[" * 3000, "job.yaml:1", ["nested more than 40 levels"]),
    Bad(
        "wrong type",
        f"{TRAIN}optimizer:\n  lr: fast\n",
        "job.yaml:4",
        ["optimizer.lr", "'fast'", "a number", "> 0 and <= 100"],
    ),
    Bad("out of range", f"{TRAIN}train: {{epochs: -1}}\n", "job.yaml:3", ["train.epochs", "-1", ">= 0 and <= 100000"]),
    Bad("fraction", f"{TRAIN}train: {{epochs: 2.5}}\n", "job.yaml:3", ["train.epochs", "2.5", "a whole number"]),
    Bad("not a number", f"{TRAIN}optimizer: {{lr: .nan}}\n", "job.yaml:3", ["optimizer.lr", "nan", "> 0"]),
    Bad("unknown key", f"{TRAIN}train:\n  epoch: 3\n", "job.yaml:4", ["train.epoch", "did you mean 'epochs'"]),
    Bad("key elsewhere", f"{TRAIN}weight_decay: 0.1\n", "job.yaml:3", ["did you mean 'optimizer.weight_decay'"]),
    Bad("misspelt required", "objectve: {name: arcface}\n", "job.yaml:1", ["objectve", "did you mean 'objective'"]),
    Bad("missing required", "seed: 1\n", "job.yaml:1", ["objective", "required", "a mapping with name"]),
    Bad("missing inner", "seed: 1\nobjective:\n  margin: 1\n", "job.yaml:2", ["objective.name", "required", "text"]),
    Bad("scalar for section", f"{TRAIN}data: orl\n", "job.yaml:3", ["data", "'orl'", "write data: {name: ...}"]),
    Bad("null for section", f"{TRAIN}train:\n", "job.yaml:3", ["train", "null", "a mapping with epochs"]),
    Bad("literal", f"{TRAIN}optimizer: {{name: adam2}}\n", "job.yaml:3", ["'adam2'", "'sgd'", "did you mean 'adam"]),
    Bad("list length", f"{TRAIN}data: {{image_size: [1, 2, 3]}}\n", "job.yaml:3", ["data.image_size", "a list of 2"]),
    Bad("name", f"{TRAIN}name: a/b\n", "job.yaml:3", ["name", "'a/b'", "matching"]),
    Bad("unknown kind", f"kind: sweeep\n{TRAIN}", "job.yaml:1", ["kind", "'sweeep'", "did you mean 'sweep'"]),
    Bad("kind of a list", f"kind: [train]\n{TRAIN}", "job.yaml:1", ["kind", "['train']", "regression"]),
    Bad("unset variable", f"{TRAIN}name: ${{env:ARMILLARY_NO_SUCH}}\n", "job.yaml:3", ["name", "ARMILLARY_NO_SUCH"]),
    Bad("bad variable", f"{TRAIN}name: ${{env:9-x}}\n", "job.yaml:3", ["${env:NAME:-default}"]),
    Bad("unclosed variable", f"{TRAIN}name: '${{env:HOME'\n", "job.yaml:3", ["${env:NAME:-default}"]),
    Bad("override without =", TRAIN, "command line", ["'seed'", "key.subkey=value"], ["seed"]),
    Bad("override unknown", TRAIN, "command line", ["train.epoch", "did you mean 'epochs'"], ["train.epoch=3"]),
    Bad("override section", TRAIN, "command line", ["optimzer", "did you mean 'optimizer'"], ["optimzer.lr=3"]),
    Bad("override value", TRAIN, "command line", ["train.epochs", "'many'", "a whole number"], ["train.epochs=many"]),
    Bad("override broken", TRAIN, "command line", ["data.name", "not valid YAML"], ["data.name=[1"]),
    Bad("override below a value", TRAIN, "command line", ["seed", "holds 3", "sections"], ["seed=3", "seed.x=1"]),
    Bad("override of nothing", TRAIN, "command line", ["objective.name", "null", "text"], ["objective.name="]),
    Bad("base missing", "kind: sweep\nspace: arcface\nbase: gone.yaml\n", "job.yaml:3", ["base", "'gone.yaml'"]),
    Bad("base number", "kind: sweep\nspace: arcface\nbase: 3\n", "job.yaml:3", ["base", "3", "a mapping with kind"]),
    Bad("base itself", "kind: sweep\nspace: arcface\nbase: job.yaml\n", "job.yaml", ["refers to itself"]),
    Bad("base of a kind", "kind: sweep\nspace: arcface\nbase: {kind: study}\n", "job.yaml:3", ["base", "'study'"]),
    Bad("in the base", f"{SWEEP}  train: {{epoch: 3}}\n", "job.yaml:6", ["base.train.epoch", "'epochs'"]),
    Bad("no space", SWEEP.replace("space: arcface\n", ""), "job.yaml:1", ["space", "required"]),
    Bad("space missing", SWEEP.replace("arcface", "arcfce", 1), "job.yaml:2", ["'arcfce'", "search_spaces/arcface"]),
    Bad("space empty", SWEEP.replace("space: arcface", "space: {}"), "job.yaml:2", ["space", "{}", "ranges"]),
    Bad("set in a sweep", f"{SWEEP}set:\n  data.houldout: test\n", "job.yaml:7", ["base.data.houldout", "'holdout'"]),
    Bad("both subjects", "kind: evaluate\nrun: a\nembeddings: b\n", "job.yaml:1", ["exactly one of run"]),
    Bad("no seeds", "kind: study\nbase: quickstart\nvariants: [{name: a}]\nseeds: []\n", "job.yaml:4", ["not empty"]),
    Bad(
        "variant twice",
        "kind: study\nbase: quickstart\nvariants:\n  - name: a\n  - name: a\n",
        "job.yaml:5",
        ["variants.1.name", "'a'", "once"],
    ),
    Bad(
        "variant's key",
        "kind: study\nbase: quickstart\nvariants:\n  - name: a\n    set: {train.epoch: 1}\n",
        "job.yaml:5",
        ["train.epoch", "did you mean 'epochs'"],
    ),
    Bad(
        "compare",
        "kind: study\nbase: quickstart\nvariants: [{name: arc}, {name: norm}]\ncompare: [arc, nrm]\n",
        "job.yaml:4",
        ["compare.1", "'nrm'", "did you mean 'norm'"],
    ),
    Bad(
        "regression's key",
        "kind: regression\nmetrics: [{name: a}]\njobs:\n  - job: quickstart\n    set: {optimizer.lr: 0}\n",
        "job.yaml:5",
        ["optimizer.lr", "0", "> 0"],
    ),
    Bad("position", SWEEP, "command line", ["base.seed", "holds 1"], ["base.seed=1", "base.seed.0=1"]),
]


@pytest.mark.parametrize("bad", BAD, ids=lambda bad: bad.name.replace(" ", "_"))
def test_bad_job(bad: Bad, tmp_path: Path, armillary_home: Path) -> None:
    Path("job.yaml").write_bytes(bad.text if isinstance(bad.text, bytes) else bad.text.encode())
    with pytest.raises(UserError) as caught:
        load_job("job.yaml", bad.overrides)
    message = str(caught.value)
    assert caught.value.where == bad.where, message
    for piece in bad.says:
        assert piece in message
    assert caught.value.allowed or caught.value.hint or "exactly one" in message
    assert len(message.splitlines()) <= 3
    assert len(message) < 900
    assert not armillary_home.exists(), "a refused job writes nothing"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["job.yaml"]


SPACES = [
    ("objective.margin: 0.5\n", ["objective.margin", "0.5", "{low: .., high: ..}"]),
    ("objective.margin: {low: 0.7, high: 0.1}\n", ["objective.margin", "low is 0.7 and high is 0.1", "below high"]),
    ("objective.margin: {low: 0.7}\n", ["objective.margin", "give low and high, or choices"]),
    ("objective.scale: {low: 0, high: 4, log: true}\n", ["objective.scale", "low is 0", "above 0"]),
    ("objective.k: {low: 0.5, high: 4, int: true}\n", ["objective.k", "whole"]),
    ("objective.k: {choices: []}\n", ["objective.k", "at least one"]),
    ("objective.k: {choices: [a, a]}\n", ["objective.k", "each once"]),
    ("objective.k: {choices: [1], low: 0}\n", ["objective.k", "choices alone"]),
    ("objective.k: {low: 0, hihg: 1}\n", ["objective.k.hihg", "did you mean 'high'"]),
    ("objective.k: {low: small, high: 1}\n", ["objective.k.low", "'small'", "a number"]),
    ("objective.k: {low: 0, high: .inf}\n", ["objective.k.high", "inf"]),
    ("optimizer.lrr: {low: 0.1, high: 1}\n", ["optimizer.lrr", "did you mean 'lr'"]),
    ("optimizer.lr: {low: 0.1, high: 1000}\n", ["optimizer.lr", "1000", "<= 100"]),
    ("optimizer.name: {choices: [adamw, lion]}\n", ["optimizer.name", "'lion'", "'adamw'"]),
    ("name: {choices: [a, b]}\n", ["name", "cannot be searched"]),
    ("- a\n", ["['a']", "ranges by dotted key"]),
]


@pytest.mark.parametrize(("text", "says"), SPACES)
def test_bad_space(text: str, says: list[str]) -> None:
    Path("space.yaml").write_text(text)
    with pytest.raises(UserError) as caught:
        load_space("space.yaml")
    assert caught.value.where == "space.yaml:1"
    for piece in says:
        assert piece in str(caught.value)


def test_bad_space_inside_a_sweep_names_its_own_file() -> None:
    Path("deep").mkdir()
    Path("deep/space.yaml").write_text("# ranges\noptimizer.lr: {low: 1, high: 0}\n")
    Path("deep/job.yaml").write_text(SWEEP.replace("space: arcface", "space: space.yaml"))
    with pytest.raises(UserError) as caught:
        load_job("deep/job.yaml")
    assert caught.value.where == "deep/space.yaml:2"


def test_mistake_in_a_base_names_the_base() -> None:
    Path("base.yaml").write_text(f"{TRAIN}seed: -1\n")
    Path("job.yaml").write_text("kind: sweep\nspace: arcface\nbase: base.yaml\n")
    with pytest.raises(UserError) as caught:
        load_job("job.yaml")
    assert (caught.value.where, caught.value.key) == ("base.yaml:3", "base.seed")


def test_circle_of_two_shows_the_way_round() -> None:
    for name, other in (("a.yaml", "b.yaml"), ("b.yaml", "a.yaml")):
        Path(name).write_text(f"kind: sweep\nspace: arcface\nbase: {other}\n")
    with pytest.raises(UserError, match=r"a\.yaml -> b\.yaml -> a\.yaml"):
        load_job("a.yaml")


def test_missing_file_shows_the_nearest() -> None:
    Path("mine.yaml").write_text(TRAIN)
    with pytest.raises(UserError) as caught:
        load_job("mnie.yaml")
    assert "'mnie.yaml'" in str(caught.value)
    assert caught.value.hint is not None
    assert "mine.yaml" in caught.value.hint
    with pytest.raises(UserError, match=r"did you mean jobs/quickstart\.yaml"):
        load_job("jobs/quikstart.yaml")


@pytest.mark.parametrize("name", ["", "a\0b", "x" * 5000, "/no/such/place/job.yaml"])
def test_impossible_path(name: str) -> None:
    with pytest.raises(UserError):
        load_job(name)


def test_directory_lists_what_is_inside() -> None:
    Path("mine").mkdir()
    Path("mine/one.yaml").write_text(TRAIN)
    with pytest.raises(UserError, match="directory") as caught:
        load_job("mine")
    assert caught.value.hint == "one.yaml"


def test_large_file_is_refused_without_parsing() -> None:
    Path("job.yaml").write_text("# x\n" * 70_000 + TRAIN)
    with pytest.raises(UserError, match="larger than 256 KiB"):
        load_job("job.yaml")


def test_other_kind_than_asked_for() -> None:
    Path("job.yaml").write_text(TRAIN)
    with pytest.raises(UserError) as caught:
        load_job("job.yaml", kind="sweep")
    assert (caught.value.where, caught.value.key, caught.value.allowed) == ("job.yaml:1", "kind", "'sweep'")
    assert "'train'" in str(caught.value)
