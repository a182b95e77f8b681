"""``armillary doctor``: what this machine has, what it lacks, and how to get it."""

from __future__ import annotations

from itertools import groupby
from typing import Annotated

import typer
from rich.text import Text

from armillary.cli.console import out, print_json, print_table, table

app = typer.Typer(help="Check versions, devices, memory, disk and the cluster.")

_MARKS = {
    "ok": Text("ok", style="green"),
    "note": Text("note", style="yellow"),
    "missing": Text("MISSING", style="red"),
}


@app.command()
def doctor(
    address: Annotated[
        str | None, typer.Option(help="A cluster to reach as well; else RAY_ADDRESS, else none.", metavar="URL")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for programs.")] = False,
) -> None:
    """Check this machine; exit code 1 when something that Armillary needs is missing."""
    from armillary.cluster.doctor import examine, healthy

    checks = examine(address)
    ok = healthy(checks)
    if as_json:
        print_json({"ok": ok, "checks": [check.as_dict() for check in checks]})
    else:
        rows = [
            (group if place == 0 else "", check.name, _MARKS[check.state], check.found)
            for group, members in groupby(checks, key=lambda check: check.group)
            for place, check in enumerate(members)
        ]
        print_table(table(["", "", "state", "found"], rows))
        todo = [check for check in checks if check.advice]
        if todo:
            out.print()
        for check in todo:
            style = "red" if check.state == "missing" else "default"
            out.print(Text(f"{check.name}: {check.advice}", style=style), soft_wrap=True)
    if not ok:
        raise typer.Exit(1)
