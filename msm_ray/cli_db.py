"""`msm-ray db`: the embedded Postgres."""

import os
import sys

import typer

from msm_core.embedded import embedded
from msm_core.errors import DatabaseNotConfigured
from msm_ray.console import Output, OutputOption, emit_json, emit_table, out

db_app = typer.Typer(help="The embedded Postgres under MSM_HOME.", no_args_is_help=True)


@db_app.command("start")
def db_start(output: OutputOption = Output.table) -> None:
    """Start it, or find it running; prints where it is."""
    embedded().start()
    db_status(output)


@db_app.command("stop")
def db_stop(output: OutputOption = Output.table) -> None:
    """Stop it; the data stay."""
    stopped = embedded().stop()
    if output == Output.json:
        emit_json({"stopped": stopped})
    else:
        out.print("Stopped." if stopped else "It was not running.")


@db_app.command("status")
def db_status(output: OutputOption = Output.table) -> None:
    """Whether it runs, and where its files are."""
    facts = embedded().status()
    if output == Output.json:
        emit_json(facts)
    else:
        emit_table("Embedded Postgres", ("fact", "value"), list(facts.items()))


@db_app.command("url")
def db_url(output: OutputOption = Output.table) -> None:
    """Its address, password included: for export MSM_DATABASE_URL=$(msm-ray db url)."""
    url = embedded().url()
    if url is None:
        raise DatabaseNotConfigured(url_file=str(embedded().url_file))
    if output == Output.json:
        emit_json({"url": url})
    else:
        sys.stdout.write(url + "\n")


@db_app.command("psql", context_settings={"ignore_unknown_options": True, "allow_extra_args": True})
def db_psql(context: typer.Context) -> None:
    """A psql session; further arguments go to psql."""
    embedded().start()
    argv, environment = embedded().psql_argv()
    os.execvpe(argv[0], [*argv, *context.args], environment)
