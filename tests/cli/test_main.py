"""The root command: what it lists, what it imports, and how it ends."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer

from armillary import __version__
from armillary.cli.main import COMMANDS, Entry
from armillary.spec.errors import UserError

HEAVY = ("torch", "ray", "mlflow", "deepspeed", "optuna", "pyarrow", "sklearn", "timm", "scipy", "numpy", "pandas")

probe = typer.Typer(add_completion=False)


class RemoteError(Exception):
    """Stands for Ray's wrapper: the worker's error is its ``cause`` attribute."""

    def __init__(self, cause: Exception) -> None:
        super().__init__("the worker failed\n" * 30)
        self.cause = cause


@probe.command()
def fail(how: str) -> None:
    mistake = UserError("found [red]3[/red]", where="job.yaml:4", key="train.epochs", allowed="a number", hint="try 4")
    if how == "mistake":
        raise mistake
    if how == "long":
        raise UserError("no such file " * 30 + "!")
    if how == "remote":
        raise RemoteError(mistake)
    if how == "caused":
        raise RuntimeError("outer") from mistake
    if how == "interrupt":
        raise KeyboardInterrupt("resume with: armillary run --resume abc")
    if how == "exit":
        raise typer.Exit(1)
    if how == "pipe":
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")
    if how != "fine":
        raise RuntimeError(f"broken: {how}\nsecond line")


@pytest.fixture(autouse=True)
def probe_command(monkeypatch: pytest.MonkeyPatch) -> None:
    """Adds a command that fails as told, the way any command group is added: one entry of the table."""
    monkeypatch.setitem(sys.modules, "armillary_probe", sys.modules[__name__])
    monkeypatch.setitem(COMMANDS, "probe", Entry("armillary_probe:probe", "Fails as told."))


@pytest.mark.parametrize("how", ["mistake", "remote", "caused"])
def test_mistake_exits_2_with_its_message_alone(run: Any, how: str, armillary_home: Path) -> None:
    result = run("probe", how)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.splitlines() == [
        "error: job.yaml:4: train.epochs: found [red]3[/red]",
        "  allowed: a number",
        "  hint: try 4",
    ]
    assert not armillary_home.exists()


def test_long_mistakes_are_not_broken_into_lines(run: Any) -> None:
    result = run("probe", "long")
    assert result.exit_code == 2
    assert f"error: {'no such file ' * 30}!" in result.stderr.splitlines()


def test_interrupt_exits_130_and_says_how_to_go_on(run: Any) -> None:
    result = run("probe", "interrupt")
    assert result.exit_code == 130
    assert "interrupted. resume with: armillary run --resume abc" in result.stderr
    assert "Traceback" not in result.stderr


def test_internal_error_exits_1_with_one_line_and_a_traceback_on_disk(run: Any, armillary_home: Path) -> None:
    result = run("probe", "a [bold] way")
    assert result.exit_code == 1
    first, second = result.stderr.strip().splitlines()
    assert first == "internal error: RuntimeError: broken: a [bold] way"
    (log,) = armillary_home.glob("errors/*.log")
    assert str(log) in second
    assert "Traceback" in log.read_text()
    assert "second line" in log.read_text()


def test_internal_error_still_reports_when_the_state_folder_cannot_be_written(
    run: Any, armillary_home: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    armillary_home.write_text("a file where the folder should be")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    result = run("probe", "oops")
    assert result.exit_code == 1
    (log,) = tmp_path.glob("armillary-*.log")
    assert str(log) in result.stderr


def test_debug_shows_the_traceback_and_writes_nothing(run: Any, armillary_home: Path) -> None:
    result = run("--debug", "probe", "oops")
    assert result.exit_code == 1
    assert "Traceback" in result.stderr
    assert not armillary_home.exists()


@pytest.mark.parametrize(("how", "code"), [("fine", 0), ("exit", 1), ("pipe", 1)])
def test_commands_choose_their_exit_code(run: Any, how: str, code: int) -> None:
    result = run("probe", how)
    assert result.exit_code == code
    assert "internal error" not in result.stderr


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["objetives"], "Did you mean 'objectives'"),
        (["probe"], "Missing argument"),
        (["probe", "fine", "extra"], "unexpected extra argument"),
        (["objectives", "show", "--nosuch"], "No such option"),
        (["--nosuch"], "No such option"),
    ],
)
def test_wrong_usage_exits_2(run: Any, arguments: list[str], says: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert says in result.stderr


def test_version(run: Any) -> None:
    assert run("--version").stdout.strip() == f"armillary {__version__}"


def test_help_lists_every_command_with_its_line(run: Any) -> None:
    text = run("--help").stdout
    for name, entry in COMMANDS.items():
        assert name in text
        assert entry.help.split(",")[0].split(":")[0] in text


@pytest.mark.parametrize("name", [name for name in COMMANDS if name != "probe"])
def test_every_command_of_the_table_loads(run: Any, name: str) -> None:
    result = run(name, "--help")
    assert result.exit_code == 0, result.stderr
    assert f"armillary {name}" in result.stdout


def imported_by(code: str) -> set[str]:
    script = f"import sys\n{code}\nprint('\\n'.join(sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return {name.partition(".")[0] for name in done.stdout.splitlines()}


def test_importing_the_package_imports_nothing_else() -> None:
    loaded = imported_by("import armillary")
    assert "armillary" in loaded
    assert loaded.isdisjoint({*HEAVY, "pydantic", "yaml", "typer", "rich"})


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["nosuch"]])
def test_listing_commands_imports_no_heavy_package(arguments: list[str]) -> None:
    code = f"from armillary.cli.main import main\ntry:\n    main({arguments!r})\nexcept SystemExit:\n    pass"
    loaded = imported_by(code)
    assert "typer" in loaded
    assert loaded.isdisjoint(HEAVY)


def test_loading_a_job_imports_no_heavy_package() -> None:
    loaded = imported_by("from armillary.spec.loading import load_job\nload_job('sweep_arcface')")
    assert "pydantic" in loaded
    assert loaded.isdisjoint(HEAVY)


@pytest.mark.parametrize("name", [name for name in COMMANDS if name != "probe"])
def test_help_of_a_command_starts_no_engine(name: str) -> None:
    code = f"from armillary.cli.main import main\ntry:\n    main([{name!r}, '--help'])\nexcept SystemExit as end:\n"
    assert imported_by(code + "    assert end.code == 0").isdisjoint({"torch", "ray", "mlflow", "deepspeed", "optuna"})


def test_completion_offers_commands_and_subcommands() -> None:
    def complete(words: str) -> str:
        environment = os.environ | {"_ARMILLARY_COMPLETE": "complete_bash", "COMP_WORDS": words}
        environment["COMP_CWORD"] = str(len(words.split(" ")) - 1)
        code = "from armillary.cli.main import main; main([])"
        return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True).stdout

    assert complete("armillary obj").split() == ["objectives"]
    assert set(complete("armillary objectives ").split()) == {"list", "show"}
