"""What is built: one top-level package with its jobs and search spaces; and what is pinned."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    # The environment's own hatchling: a build of its own would have to be downloaded.
    code = "import sys; from hatchling.build import build_wheel; build_wheel(sys.argv[1])"
    subprocess.run([sys.executable, "-c", code, str(folder)], cwd=ROOT, check=True, capture_output=True)
    built: Path = next(folder.glob("*.whl"))
    return built


def test_the_top_level_is_the_package_alone(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names} == {"armillary", f"armillary-{PROJECT['version']}.dist-info"}
    assert "armillary/py.typed" in names
    assert f"armillary-{PROJECT['version']}.dist-info/licenses/LICENSE" in names
    assert not [name for name in names if name.endswith((".keep", ".pyc"))]


@pytest.mark.parametrize("folder", ["jobs", "search_spaces"])
def test_every_job_and_search_space_is_in_it(wheel: Path, folder: str) -> None:
    expected = {f"armillary/resources/{path.relative_to(ROOT).as_posix()}" for path in (ROOT / folder).rglob("*.yaml")}
    assert expected
    assert expected <= set(zipfile.ZipFile(wheel).namelist())


def test_every_module_is_in_it(wheel: Path) -> None:
    platform = ROOT / "platform"
    expected = {path.relative_to(platform).as_posix() for path in (platform / "armillary").rglob("*.py")}
    assert expected <= set(zipfile.ZipFile(wheel).namelist())


def test_it_runs_unpacked_and_finds_its_jobs(wheel: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    code = "import armillary, armillary.spec.loading as l; print(armillary.__file__, l.load_job('quickstart').name)"
    # A folder on PYTHONPATH comes before the installed checkout.
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "site")}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(tmp_path / "site" / "armillary" / "__init__.py"), "quickstart"]


def test_platform_stays_the_standard_librarys_module() -> None:
    assert not (ROOT / "platform" / "__init__.py").exists()


def test_the_version_stands_in_one_way() -> None:
    import armillary

    assert armillary.__version__ == PROJECT["version"]
    assert f"## [{PROJECT['version']}]" in (ROOT / "CHANGELOG.md").read_text()


def pins() -> dict[str, str]:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][A-Za-z0-9.]*", line) for line in lines), "one exact version a line"
    assert lines == sorted(lines, key=str.upper)
    return {canonicalize_name(line.split("==")[0]): line.split("==")[1] for line in lines}


def test_every_dependency_is_pinned_within_its_range() -> None:
    pinned = pins()
    assert "armillary" not in pinned
    extras = [line for lines in PROJECT["optional-dependencies"].values() for line in lines]
    for requirement in map(Requirement, [*PROJECT["dependencies"], *extras]):
        version = pinned.get(canonicalize_name(requirement.name))
        assert version, f"{requirement.name} has no line in constraints.txt"
        assert requirement.specifier.contains(version), f"{requirement}: {version} is pinned"


def test_what_is_imported_is_declared() -> None:
    """Every third-party package that a module imports is a dependency of its own, not one that came along."""
    declared = {canonicalize_name(Requirement(line).name) for line in PROJECT["dependencies"]}
    # What only an extra brings is imported where it is used, not at the top of a module.
    extra = {canonicalize_name(Requirement(line).name) for line in PROJECT["optional-dependencies"]["graph"]}
    from importlib.metadata import packages_distributions

    distributions = packages_distributions()
    for path in (ROOT / "platform" / "armillary").rglob("*.py"):
        inside = path.relative_to(ROOT / "platform" / "armillary").parts[0]
        found = set(re.findall(r"^(\s*)(?:from|import) ([A-Za-z_][A-Za-z0-9_]*)", path.read_text(), re.MULTILINE))
        for indent, name in found:
            if name in sys.stdlib_module_names or name == "armillary":
                continue
            sources = {canonicalize_name(source) for source in distributions.get(name, [])}
            # The conformance suite is pytest's: whoever uses it has pytest.
            suite = {"pytest"} if inside == "testing" else set()
            allowed = declared | suite | (extra if indent.strip("\n") else set())
            assert not sources or sources & allowed, f"{path} imports {name}, which pyproject.toml does not name"
