"""``armillary jobs``: what was submitted to a cluster, and what became of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from armillary.cli.console import print_json, print_note, print_table, table

if TYPE_CHECKING:
    from armillary.cluster.submission import Cluster, ClusterJob

app = typer.Typer(help="List, follow and stop what was submitted to a cluster.", no_args_is_help=True)

Address = Annotated[str | None, typer.Option(help="The cluster; else RAY_ADDRESS.", metavar="URL")]
JobId = Annotated[str, typer.Argument(help="A job's id, or an unambiguous beginning of one.", metavar="ID")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]


def cluster_at(address: str | None) -> Cluster:
    """The cluster of ``--address`` or of the environment, connected."""
    from armillary.cluster.connection import resolve_address
    from armillary.cluster.submission import Cluster

    return Cluster.at(resolve_address(address))


def follow_job(cluster: Cluster, job_id: str) -> ClusterJob:
    """Prints a job's log until the job ends; an interrupt leaves the job alone and says how to come back."""
    try:
        return cluster.follow(job_id, lambda text: typer.echo(text, nl=False))
    except KeyboardInterrupt:
        message = f"the job goes on; see it again: armillary jobs logs {job_id} --follow --address {cluster.address}"
        raise KeyboardInterrupt(message) from None


def finish(job: ClusterJob) -> None:
    """Says on standard error how a followed job ended.

    Raises:
        typer.Exit: with the job's own exit code when it failed.
    """
    print_note(f"{job.id}: {job.state} after {job.seconds:.0f} s. {job.message}".rstrip())
    if job.result:
        raise typer.Exit(job.result)


@app.command("list")
def list_(address: Address = None, as_json: AsJson = False) -> None:
    """List the cluster's jobs, newest first."""
    jobs = cluster_at(address).jobs()
    if as_json:
        print_json([job.as_dict() for job in jobs])
        return
    rows = [(job.id, job.state, job.kind, job.started, f"{job.seconds:.0f}") for job in jobs]
    print_table(table(["id", "state", "kind", "started", ("seconds", "right")], rows))


@app.command()
def status(job_id: JobId, address: Address = None, as_json: AsJson = False) -> None:
    """Show one job's state."""
    job = cluster_at(address).find(job_id)
    if as_json:
        print_json(job.as_dict())
        return
    print_table(table(["", ""], [(key, value) for key, value in job.as_dict().items() if value not in (None, "")]))


@app.command()
def logs(
    job_id: JobId,
    address: Address = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the job ends.")] = False,
) -> None:
    """Print what a job printed; with --follow, end with the job's exit code."""
    cluster = cluster_at(address)
    if follow:
        finish(follow_job(cluster, cluster.find(job_id).id))
    else:
        typer.echo(cluster.logs(job_id), nl=False)


@app.command()
def stop(job_id: JobId, address: Address = None, as_json: AsJson = False) -> None:
    """Stop a job and wait until it has stopped."""
    job = cluster_at(address).stop(job_id)
    if as_json:
        print_json(job.as_dict())
    else:
        typer.echo(f"{job.id}: {job.state}")
    if not job.finished:
        print_note("it was asked to stop and has not yet; ask again with: armillary jobs status " + job.id)
        raise typer.Exit(1)
