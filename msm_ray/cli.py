"""The `msm-ray` command. Every verb is a few lines: read options, call the driver, show the result."""

import sys
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from msm_core.data_nodes.world import read_world
from msm_core.database import transaction
from msm_core.errors import MsmError, SelectionError
from msm_core.storage import verify_prepared
from msm_core.verification import verify as verify_storages
from msm_ray import ledger
from msm_ray.cli_accounts import accounts_app
from msm_ray.cli_db import db_app
from msm_ray.cli_kinds import kinds
from msm_ray.cli_prepare import EXIT_PENDING, FileOption, prepare
from msm_ray.cli_prices import prices_app, sources_app
from msm_ray.cli_run import AsOfOption, RefreshOption, SelectOption, demo, retry, run
from msm_ray.cli_show import show_app
from msm_ray.console import EXIT_CRASH, Output, OutputOption, configure_logging, emit_json, emit_table, out, tell_error
from msm_ray.events import HELP as EVENTS
from msm_ray.fleet import fleet_json_schema, load_fleet
from msm_ray.plan import make_plan
from msm_ray.session import choose_portfolios, connect, parse_as_of

app = typer.Typer(
    name="msm-ray",
    help="Recompute every portfolio of a fleet, every night, to the bit.\n\nFirst steps: msm-ray demo, then status, plan, verify.",
    epilog="Exit codes: 0 all landed, 1 crash, 2 usage or configuration, 3 partial, 4 nothing landed, 10 changes pending.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(db_app, name="db")
app.add_typer(sources_app, name="sources")
app.add_typer(prices_app, name="prices")
app.add_typer(accounts_app, name="accounts")
app.add_typer(show_app, name="show")


def main() -> None:
    """Console script: errors that msm raises on purpose become one clear sentence and an exit code."""
    try:
        app()
    except MsmError as error:
        sys.exit(tell_error(error, any(argument in ("json", "--output=json", "-ojson") for argument in sys.argv)))


@app.callback()
def _options(verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Debug messages on stderr.")] = False) -> None:
    configure_logging(verbose)


# -- fleet --------------------------------------------------------------------------------------------------------------------


@app.command()
def validate(
    file: Annotated[Path, typer.Option("--file", "-f", help="fleet.yaml", dir_okay=False)],
    show_resolved: Annotated[str | None, typer.Option(help="Print exactly what is hashed of this portfolio.")] = None,
    output: OutputOption = Output.table,
) -> None:
    """Parse, resolve and hash a fleet file; all problems at once, with lines. Needs no database."""
    fleet = load_fleet(file)
    if show_resolved is not None:
        found = [c for c in fleet.portfolios if c.identifier == show_resolved]
        if not found:
            raise SelectionError(selector=show_resolved, why="the file has no such portfolio")
        hashed = {
            "configuration_hash": found[0].configuration_hash,
            **found[0].portfolio_build_configuration.model_dump(mode="json", exclude_none=True),
        }
        emit_json(hashed)
        return
    document = {
        "portfolios": len(fleet.portfolios),
        "signals": len({c.signal_uid for c in fleet.portfolios}),
        "calendars": len(fleet.calendars),
        "configuration_hashes": {c.identifier: c.configuration_hash for c in fleet.portfolios},
    }
    if output == Output.json:
        emit_json(document)
    else:
        out.print(
            f"{file}: {document['portfolios']} portfolios, {document['signals']} signals, {document['calendars']} calendars. All valid."
        )


@app.command()
def schema() -> None:
    """JSON Schema of fleet.yaml, for editors: msm-ray schema > fleet.schema.json."""
    emit_json(fleet_json_schema())


app.command()(kinds)
app.command()(prepare)
for verb in (run, retry, demo):
    app.command(epilog=EVENTS)(verb)


@app.command()
def plan(
    file: FileOption = None,
    select_: SelectOption = None,
    as_of: AsOfOption = None,
    full_refresh: RefreshOption = False,
    exit_code: Annotated[bool, typer.Option("--exit-code", help="Exit 10 when there is work.")] = False,
    output: OutputOption = Output.table,
) -> None:
    """What a run would do, and why. Writes nothing."""
    engine, at = connect(), parse_as_of(as_of)
    configurations, signals, unreadable = choose_portfolios(engine, file, select_)
    with transaction(engine, read_only=True) as connection:
        failed = ledger.failed_portfolios(connection)
        world = read_world(connection, configurations, at)
    selection = {"failed_before": failed, "signals_selected": signals, "unreadable": unreadable}
    made = make_plan(configurations, world, at, full_refresh=full_refresh, **selection)
    if output == Output.json:
        emit_json(made.document())
    else:
        summary = made.summary()
        reasons = sorted({reason for counts in summary.values() for reason in counts})
        rows = [(reason, *(counts.get(reason, 0) for counts in summary.values())) for reason in reasons]
        emit_table(f"Plan as of {at:%Y-%m-%d %H:%MZ}", ("reason", *summary), rows)
        work = [p for p in made.portfolios if p.node or p.error]
        shown = [(p.identifier, p.reason, _day(p.start), _day(p.end), p.limited_by, p.error and p.error["message"]) for p in work[:30]]
        if shown:
            columns = ("portfolio", "reason", "after", "through", "limited by", "error")
            emit_table(f"{len(work)} portfolios with work" + (", the first 30" if len(work) > 30 else ""), columns, shown)
    if exit_code and made.work():
        raise typer.Exit(EXIT_PENDING)


@app.command()
def status(
    limit: Annotated[int, typer.Option(min=1, help="Recent runs to list.")] = 10,
    output: OutputOption = Output.table,
) -> None:
    """Recent runs, and where every portfolio stands."""
    engine = connect()
    with transaction(engine, read_only=True) as connection:
        verify_prepared(connection)
        runs = ledger.recent_runs(connection, limit)
        results = ledger.last_results(connection)
    counts: dict[str, int] = {}
    for result in results.values():
        counts[result["status"]] = counts.get(result["status"], 0) + 1
    if output == Output.json:
        emit_json({"portfolios": counts, "runs": runs, "failures": {i: r["error"] for i, r in results.items() if r["error"]}})
        return
    rows = [(r["run"][:8], r["status"], _day(r["as_of"]), _day(r["started_at"], "%m-%d %H:%M"), *_run_counts(r["summary"])) for r in runs]
    emit_table("Recent runs", ("run", "status", "as of", "started", "landed", "failed", "rows", "seconds"), rows)
    emit_table("Portfolios by their last result", ("status", "portfolios"), sorted(counts.items()))
    failures = [(i, r["status"], r["error"]["message"]) for i, r in sorted(results.items()) if r["error"]]
    if failures:
        emit_table("Not landed; repair, then msm-ray retry", ("portfolio", "status", "reason"), failures)


@app.command()
def verify(output: OutputOption = Output.table) -> None:
    """An exact, order-free checksum of everything stored, and an audit of what must always hold. Exit 1 on violations."""
    engine = connect()
    with transaction(engine, read_only=True) as connection:
        verify_prepared(connection)
        verification = verify_storages(connection)
    if output == Output.json:
        emit_json(verification.document())
    else:
        out.print(f"checksum {verification.checksum}\nrows     {verification.rows:,}\nviolations: {len(verification.violations)}")
        for violation in verification.violations:
            out.print(f"  {violation}", highlight=False)
    if verification.violations:
        raise typer.Exit(EXIT_CRASH)


def _day(value: datetime | None, form: str = "%Y-%m-%d") -> str | None:
    return value.strftime(form) if value else None


def _run_counts(summary: dict[str, Any] | None) -> tuple[Any, ...]:
    if not summary:
        return (None,) * 4
    return summary["landed"], summary["failed"] + summary["skipped"], f"{summary['rows_written']:,}", summary["seconds"]


if __name__ == "__main__":
    main()
