"""``armillary objectives``: what can be trained, and what it needs."""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from armillary.objectives import Objective

app = typer.Typer(help="List objectives and show what they need.", no_args_is_help=True, add_completion=False)

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]


class Format(StrEnum):
    """How the list is printed."""

    table = "table"
    md = "md"
    json = "json"


def _complete_family(incomplete: str) -> list[str]:
    from armillary.objectives import registry

    families = {registry.get(name).family for name in registry.names()}
    return sorted(family for family in families if family.startswith(incomplete))


@app.command("list")
def list_objectives(
    words: Annotated[list[str] | None, typer.Argument(help="Only those whose entry holds all of these words.")] = None,
    family: Annotated[str | None, typer.Option(help="Only this family.", autocompletion=_complete_family)] = None,
    terms: Annotated[bool, typer.Option("--terms", help="The regularizers of objective.terms instead.")] = False,
    format: Annotated[Format, typer.Option(help="How to print.")] = Format.table,
    as_json: AsJson = False,
) -> None:
    """List every registered objective: what it is, what it needs, where it comes from."""
    if terms:
        _list_terms(as_json or format is Format.json)
        return
    from armillary.cli.console import print_json, print_note, print_table, table
    from armillary.objectives import card, registry
    from armillary.spec.errors import unknown_name

    found = [registry.get(name) for name in registry.names()]
    if family is not None:
        families = sorted({cls.family for cls in found})
        if family not in families:
            raise unknown_name("family", family, families, where="--family")
        found = [cls for cls in found if cls.family == family]
    rows = [(cls, _row(cls)) for cls in found]
    wanted = [word.lower() for word in words or ()]
    rows = [(cls, row) for cls, row in rows if all(word in " ".join(row).lower() for word in wanted)]
    if as_json or format is Format.json:
        print_json([card.describe(cls.name) for cls, _ in rows])
    elif format is Format.md:
        typer.echo(_markdown([row for _, row in rows], {cls.name: cls.citation.url for cls, _ in rows}), nl=False)
    else:
        print_table(table(["objective", "family", "needs", "what it is", "paper"], [row for _, row in rows]))
        if wanted and not rows:
            print_note(f"no objective speaks of {' '.join(wanted)}")


def _list_terms(as_json: bool) -> None:
    from armillary.cli.console import print_json, print_table, table
    from armillary.objectives.terms import describe_term, term_names

    found = [describe_term(name) for name in term_names()]
    if as_json:
        print_json(found)
        return
    rows = [
        (item["name"], "yes" if item["labels"] else "no", ", ".join(item["hyperparameters"]) or "none", item["summary"])
        for item in found
    ]
    print_table(table(["term", "labels", "hyperparameters", "what it is"], rows))


def _complete_objective(incomplete: str) -> list[str]:
    from armillary.objectives import registry

    return [name for name in registry.names() if name.startswith(incomplete)]


@app.command()
def show(
    name: Annotated[str, typer.Argument(help="An objective's name.", autocompletion=_complete_objective)],
    as_json: AsJson = False,
) -> None:
    """Show one objective: its equation, what it needs, its hyperparameters and their ranges, how to run it."""
    from armillary.cli.console import out, print_json, print_table, table
    from armillary.objectives import describe

    item = describe(name)
    if as_json:
        print_json(item)
        return
    out.print(f"[bold]{item['name']}[/bold]  {item['family']}", soft_wrap=True)
    for text in (item["summary"], *item["definition"]):
        out.print(text + "\n", markup=False, soft_wrap=True)
    print_table(table(["needs", ""], [(key, value) for key, value in _needs(item["needs"])]))
    out.print()
    if item["hyperparameters"]:
        rows = [_hyperparameter(entry, item["search_space"] or {}) for entry in item["hyperparameters"]]
        print_table(table(["hyperparameter", "default", "allowed", "searched", "meaning"], rows))
    else:
        out.print("no hyperparameters")
    out.print("\n" + _citation(item["citation"]), markup=False, soft_wrap=True)
    if item["recipe"]:
        words = ["armillary run", f"recipes/{item['recipe']}", f"objective.name={item['name']}", *item["overrides"]]
        out.print("\n" + " ".join(words), markup=False, soft_wrap=True)


def _row(cls: type[Objective]) -> tuple[str, ...]:
    from armillary.objectives import card

    return cls.name, cls.family, card.needs_in_words(cls.needs), card.summary(cls), card.short_citation(cls)


def _markdown(rows: list[tuple[str, ...]], links: dict[str, str | None]) -> str:
    """A page by family, one table row an objective."""
    lines = [
        "# Objectives",
        "",
        f"{len(rows)} objectives, each under its name in `objective.name` of a job. `armillary objectives show NAME`",
        "prints one's equations, hyperparameters, legal and searched ranges, and the command that trains it.",
        "This page is printed by `armillary objectives list --format md`.",
    ]
    for family in sorted({row[1] for row in rows}):
        lines += [
            "",
            f"## {family.replace('_', ' ')}",
            "",
            "| objective | what it is | needs | paper |",
            "|---|---|---|---|",
        ]
        for name, _, needs, what, paper in (row for row in rows if row[1] == family):
            source = f"[{paper}]({links[name]})" if links[name] else paper
            lines.append(
                "| " + " | ".join(cell.replace("|", "\\|") for cell in (f"`{name}`", what, needs, source)) + " |"
            )
    return "\n".join(lines) + "\n"


def _hyperparameter(entry: dict[str, Any], space: dict[str, Any]) -> tuple[object, ...]:
    key = f"objective.{entry['name']}"
    return key, entry["default"], entry["allowed"], _searched(space.get(key)), entry["description"]


def _searched(searched: dict[str, Any] | None) -> str:
    if searched is None:
        return ""
    if "choices" in searched:
        return ", ".join(str(choice) for choice in searched["choices"])
    return f"{searched['low']:g} to {searched['high']:g}" + (", log" if searched.get("log") else "")


def _needs(needs: dict[str, Any]) -> list[tuple[str, object]]:
    sampler = needs["sampler"]
    if needs["samples_per_class"]:
        sampler = f"{sampler}, {needs['samples_per_class']} of each class"
    return [
        ("views", f"{needs['views']} ({needs['recipe']})"),
        ("batch fields", ", ".join(needs["fields"]) or "images only"),
        ("sampler", sampler),
        ("components", ", ".join(needs["components"]) or "none"),
        ("loss couples the batch", "yes" if needs["batch_coupled"] else "no"),
    ]


def _citation(citation: dict[str, Any]) -> str:
    year = f" ({citation['year']})" if citation["year"] else ""
    parts = [f"{citation['authors']}{year}: {citation['title']}.", citation["venue"], citation["url"]]
    return " ".join(part for part in parts if part)
