"""``armillary objectives``: what can be trained, and what it needs."""

from __future__ import annotations

from typing import Annotated, Any

import typer

app = typer.Typer(help="List objectives and show what they need.", no_args_is_help=True, add_completion=False)

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]


@app.command("list")
def list_objectives(
    family: Annotated[str | None, typer.Option(help="Only this family.")] = None,
    terms: Annotated[bool, typer.Option("--terms", help="The regularizers of objective.terms instead.")] = False,
    as_json: AsJson = False,
) -> None:
    """List every registered objective."""
    if terms:
        _list_terms(as_json)
        return
    from armillary.cli.console import print_json, print_table, table
    from armillary.objectives import registry
    from armillary.spec.errors import unknown_name

    found = [registry.describe(name) for name in registry.names()]
    families = sorted({item["family"] for item in found})
    if family is not None:
        if family not in families:
            raise unknown_name("family", family, families, where="--family")
        found = [item for item in found if item["family"] == family]
    if as_json:
        print_json(found)
        return
    rows = [
        (item["name"], item["family"], item["needs"]["views"], _labels(item["needs"]), item["summary"])
        for item in found
    ]
    print_table(table(["objective", "family", ("views", "right"), "labels", "what it is"], rows))


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
    """Show one objective: what it needs, its hyperparameters, where it comes from."""
    from armillary.cli.console import out, print_json, print_table, table
    from armillary.objectives import registry

    item = registry.describe(name)
    if as_json:
        print_json(item)
        return
    out.print(f"[bold]{item['name']}[/bold]  {item['family']}", soft_wrap=True)
    out.print(item["summary"] + "\n", markup=False, soft_wrap=True)
    print_table(table(["needs", ""], [(key, value) for key, value in _needs(item["needs"])]))
    out.print()
    if item["hyperparameters"]:
        rows = [
            (f"objective.{h['name']}", h["default"], h["allowed"], h["description"]) for h in item["hyperparameters"]
        ]
        print_table(table(["hyperparameter", "default", "allowed", "meaning"], rows))
    else:
        out.print("no hyperparameters")
    out.print("\n" + _citation(item["citation"]), markup=False, soft_wrap=True)


def _labels(needs: dict[str, Any]) -> str:
    return "yes" if "label" in needs["fields"] else "no"


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
