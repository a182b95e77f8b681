"""``schema``, ``objectives`` and ``data``: what they print for people and for programs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from jsonschema import Draft202012Validator
from PIL import Image

from armillary.objectives import registry


def test_schema_is_one_that_editors_can_use(run: Any) -> None:
    result = run("schema")
    assert result.exit_code == 0
    schema = json.loads(result.stdout)
    Draft202012Validator.check_schema(schema)
    assert schema["$defs"]["ObjectiveSpec"]["properties"]["name"]["enum"] == registry.names()


def test_objectives_list_names_them_all(run: Any) -> None:
    lines = run("objectives", "list").stdout.splitlines()
    assert [line.split()[0] for line in lines[1:]] == registry.names()


def test_the_page_of_objectives_is_what_the_command_prints(run: Any) -> None:
    page = Path(__file__).parents[2] / "docs" / "objectives.md"
    assert page.read_text() == run("objectives", "list", "--format", "md").stdout


def test_objectives_are_found_by_words(run: Any) -> None:
    found = json.loads(run("objectives", "list", "Teacher", "patch tokens", "--json").stdout)
    assert {"dinov2", "ibot"} <= {item["name"] for item in found} < set(registry.names())
    nothing = run("objectives", "list", "phlogiston")
    assert nothing.exit_code == 0
    assert "phlogiston" in nothing.stderr


def test_objectives_show_equations_ranges_and_the_command(run: Any) -> None:
    shown = run("objectives", "show", "arcface").stdout
    assert "T_i = cos(theta_iy + m)" in shown
    assert "0.1 to 0.7" in shown
    assert "armillary run recipes/faces objective.name=arcface" in shown
    assert ":class:" not in shown


def test_objectives_list_as_json(run: Any) -> None:
    found = {item["name"]: item for item in json.loads(run("objectives", "list", "--json").stdout)}
    assert list(found) == registry.names()
    assert found["simclr"]["needs"]["views"] == 2
    assert found["arcface"]["needs"]["fields"] == ["label"]
    assert all(item["citation"]["title"] for item in found.values())


def test_objectives_of_a_family(run: Any) -> None:
    family = registry.get("arcface").family
    found = json.loads(run("objectives", "list", "--family", family, "--json").stdout)
    assert "arcface" in [item["name"] for item in found]
    assert {item["family"] for item in found} == {family}
    wrong = run("objectives", "list", "--family", family[:-1])
    assert wrong.exit_code == 2
    assert f"did you mean '{family}'" in wrong.stderr


@pytest.mark.parametrize("name", registry.names())
def test_objectives_show_every_hyperparameter_and_the_citation(run: Any, name: str) -> None:
    result = run("objectives", "show", name)
    assert result.exit_code == 0
    described = json.loads(run("objectives", "show", name, "--json").stdout)
    assert described["name"] == name
    for item in described["hyperparameters"]:
        assert f"objective.{item['name']}" in result.stdout
    assert described["citation"]["title"] in result.stdout


def test_unknown_objective_shows_the_nearest(run: Any) -> None:
    result = run("objectives", "show", "arcfce")
    assert result.exit_code == 2
    assert "unknown objective 'arcfce'" in result.stderr
    assert "did you mean 'arcface'" in result.stderr


def test_names_complete(run: Any, pictures: Path) -> None:
    from armillary.cli import data, objectives

    assert objectives._complete_objective("arcf") == ["arcface"]
    run("data", "import", "folder", str(pictures), "--name", "friends")
    assert data._complete_dataset("fr") == ["friends"]
    assert data._complete_dataset("x") == []


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Two classes of two 4 x 6 images each, and one file that is no image."""
    for number, name in enumerate(("ada", "ada", "bob", "bob")):
        folder = tmp_path / "pictures" / name
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((4, 6), number, dtype=np.uint8)).save(folder / f"{number}.png")
    (tmp_path / "pictures/bob/torn.png").write_bytes(b"\x89PNG\r\n")
    return tmp_path / "pictures"


def test_data_from_import_to_inspection(run: Any, pictures: Path) -> None:
    before = json.loads(run("data", "list", "--json").stdout)
    assert before["datasets"] == []
    assert before["importers"]["digits"]["embedded"] is True

    imported = run("data", "import", "folder", str(pictures), "--name", "friends")
    assert imported.exit_code == 0
    assert "imported friends: 4 images of 2 classes, 4 x 6 px, grey" in imported.stdout
    assert "torn.png" in imported.stderr

    (listed,) = json.loads(run("data", "list", "--json").stdout)["datasets"]
    assert (listed["name"], listed["images"], listed["classes"]) == ("friends", 4, 2)
    assert "friends" in run("data", "list").stdout

    details = json.loads(run("data", "inspect", "friends", "--verify", "--json").stdout)
    assert details["images_per_class"] == {"ada": 2, "bob": 2}
    assert details["fingerprint"] == listed["fingerprint"]
    assert [item["file"] for item in details["left_out"]] == ["bob/torn.png"]
    text = run("data", "inspect", "friends").stdout
    assert "bob/torn.png" in text
    assert details["fingerprint"] in text


def test_data_inspect_notices_changed_content(run: Any, pictures: Path) -> None:
    run("data", "import", "folder", str(pictures), "--name", "friends")
    (location,) = [item["location"] for item in json.loads(run("data", "list", "--json").stdout)["datasets"]]
    manifest = Path(location) / "manifest.json"
    content = json.loads(manifest.read_text())
    content["fingerprint"] = "0" * 64
    manifest.write_text(json.dumps(content))
    result = run("data", "inspect", "friends", "--verify")
    assert result.exit_code == 2
    assert "fingerprint differs" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["inspect", "nosuch"], "there is no dataset 'nosuch'"),
        (["import", "foldr", "x"], "did you mean 'folder'"),
        (["import", "folder", "no/such/folder"], "no/such/folder'"),
        (["import", "digits", "somewhere"], "takes no source"),
    ],
)
def test_wrong_data_commands_exit_2_and_write_nothing(
    run: Any, arguments: list[str], says: str, armillary_home: Path
) -> None:
    result = run("data", *arguments)
    assert result.exit_code == 2
    assert says in result.stderr
    assert not armillary_home.exists()
