"""``armillary schema``: the JSON Schema of job files."""

from __future__ import annotations

import typer

app = typer.Typer(add_completion=False)


@app.command()
def schema() -> None:
    """Print the JSON Schema of job files, with every objective's hyperparameters.

    Save it (armillary schema > armillary.schema.json), and an editor with YAML support completes and checks job files
    that begin with: # yaml-language-server: $schema=armillary.schema.json
    """
    from armillary.cli.console import print_json
    from armillary.objectives import registry
    from armillary.spec.schema import job_schema

    print_json(job_schema({name: registry.get(name).Hyperparameters.model_json_schema() for name in registry.names()}))
