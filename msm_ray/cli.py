"""The `msm-ray` command. Every verb is a few lines: read options, call the driver, show the result."""

import json
import sys
from datetime import datetime
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from sqlalchemy import Engine

from msm_core.configuration import PortfolioConfiguration
from msm_core.data_nodes.base import failure_facts
from msm_core.data_nodes.planning import read_world
from msm_core.data_nodes.registration import read_configurations
from msm_core.database import get_engine, transaction
from msm_core.errors import (
    CalendarNotFound,
    ConfigurationError,
    CyclicPlan,
    DatabaseNotConfigured,
    EmptySchedule,
    InvalidNamespace,
    MsmError,
    RunNotFound,
    SelectionError,
    SourceConflict,
    SourceNotRegistered,
    SourceUnusable,
    StorageCollision,
    StorageMismatch,
    StorageNotPrepared,
    UnknownKind,
    UnusableFile,
)
from msm_core.storage import verify_prepared
from msm_core.verification import checksum as compute_checksum
from msm_core.verification import verify as verify_storages
from msm_ray import ledger
from msm_ray import prepare as preparation
from msm_ray.cli_db import db_app
from msm_ray.cli_kinds import kinds
from msm_ray.cli_prepare import EXIT_PENDING, FileOption, prepare
from msm_ray.cli_prices import prices_app, sources_app
from msm_ray.console import Output, OutputOption, configure_logging, emit_json, emit_table, err, narrate, out, watching
from msm_ray.executors import make_executor
from msm_ray.fleet import fleet_json_schema, load_fleet
from msm_ray.plan import make_plan
from msm_ray.run import Options, RunReport, run_fleet
from msm_ray.session import choose_portfolios, connect, own_server, parse_as_of

EXIT_CRASH, EXIT_USAGE = 1, 2
USAGE_ERRORS = (
    *(ConfigurationError, SelectionError, DatabaseNotConfigured, InvalidNamespace, StorageNotPrepared, RunNotFound),
    *(SourceNotRegistered, SourceUnusable, SourceConflict, UnusableFile, CalendarNotFound, EmptySchedule),
    *(StorageMismatch, StorageCollision, UnknownKind, CyclicPlan),
)

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


class ExecutorName(StrEnum):
    local = "local"
    ray = "ray"


SelectOption = Annotated[
    list[str] | None,
    typer.Option("--select", "-s", help="portfolio:ew-*, tag:core, signal:equal+, asset:AAPL+, status:failed. Repeat = or, comma = and."),
]
AsOfOption = Annotated[
    str | None, typer.Option("--as-of", help="Use nothing later: 2024-06-28 (the whole UTC day) or 2024-06-28T20:00:00Z. Default: now.")
]
RefreshOption = Annotated[bool, typer.Option("--full-refresh", help="Compute from scratch; each portfolio is replaced atomically.")]
ExecutorOption = Annotated[ExecutorName, typer.Option(help="local: in this process; ray: RAY_ADDRESS, or a local Ray.")]
BatchOption = Annotated[int | None, typer.Option("--batch-size", min=1, help="Most nodes per batch; by default batches are sized by work.")]
WorkersOption = Annotated[int | None, typer.Option("--workers", min=1, help="Workers of a local Ray; default: one per core.")]
TimeoutOption = Annotated[float, typer.Option("--task-timeout", min=1, help="Wall-clock limit of one batch, seconds.")]
RESULTS_FILE = Path("run_results.json")


def main() -> None:
    """Console script: errors that msm raises on purpose become one clear sentence and an exit code."""
    try:
        app()
    except MsmError as error:
        facts = failure_facts(error)
        if any(argument in ("json", "--output=json", "-ojson") for argument in sys.argv):
            emit_json({"error": facts})
        err.print(f"[red]error:[/red] {escape(facts['message'])}", highlight=False, markup=True, soft_wrap=True)
        sys.exit(EXIT_USAGE if isinstance(error, USAGE_ERRORS) else EXIT_CRASH)


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
def run(
    file: FileOption = None,
    select_: SelectOption = None,
    as_of: AsOfOption = None,
    full_refresh: RefreshOption = False,
    executor: ExecutorOption = ExecutorName.ray,
    batch_size: BatchOption = None,
    workers: WorkersOption = None,
    task_timeout: TimeoutOption = 1800.0,
    output: OutputOption = Output.table,
) -> None:
    """Bring the fleet up to date. A portfolio that fails is named and left as it was; the rest land."""
    engine, at = connect(), parse_as_of(as_of)
    configurations, signals, unreadable = choose_portfolios(engine, file, select_)
    arguments = {"file": str(file) if file else None, "select": select_, "full_refresh": full_refresh, "executor": executor.value}
    options = Options(batch_size, full_refresh, signals, unreadable, arguments=arguments)
    report = execute(engine, configurations, at, options, executor, workers, task_timeout)
    show_report(report, output)
    raise typer.Exit(report.exit_code)


@app.command()
def retry(
    run_: Annotated[
        str | None, typer.Argument(metavar="[RUN]", help="Run to retry, or the beginning of its uid; default: the last one.")
    ] = None,
    executor: ExecutorOption = ExecutorName.ray,
    batch_size: BatchOption = None,
    workers: WorkersOption = None,
    task_timeout: TimeoutOption = 1800.0,
    output: OutputOption = Output.table,
) -> None:
    """Run again exactly what failed or was skipped, at the original as-of."""
    engine = connect()
    with transaction(engine, read_only=True) as connection:
        verify_prepared(connection)
        try:
            root, at = ledger.find_run(connection, run_)
        except RunNotFound:
            if run_ is not None:
                raise
            _nothing_to_retry(output)
            return
        todo = set(ledger.unfinished(connection, root))
        stored, unreadable = read_configurations(connection)
    chosen = [c for c in stored if ("portfolio", c.identifier) in todo]
    signals = {uid for kind, uid in todo if kind == "signal"}
    still = {identifier: facts for identifier, facts in unreadable.items() if ("portfolio", identifier) in todo}
    options = Options(
        batch_size=batch_size,
        signals_selected=signals,
        unreadable=still,
        retry_of=root,
        arguments={"retry": str(root), "executor": executor.value},
    )
    report = execute(engine, chosen, at, options, executor, workers, task_timeout)
    show_report(report, output)
    raise typer.Exit(report.exit_code)


def _nothing_to_retry(output: Output) -> None:
    if output == Output.json:
        emit_json({"status": "nothing to retry", "landed": 0, "failed": 0, "rows_written": 0})
    else:
        out.print("Nothing to retry: every node of every run has landed.")


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


@app.command()
def demo(
    portfolios: Annotated[int, typer.Option("--portfolios", "-n", min=1, max=100_000, help="Size of the fleet.")] = 200,
    executor: ExecutorOption = ExecutorName.ray,
    keep_db: Annotated[bool, typer.Option("--keep-db", help="Leave the embedded database running.")] = False,
    batch_size: BatchOption = None,
    workers: WorkersOption = None,
    output: OutputOption = Output.table,
) -> None:
    """A fleet on real prices, from nothing: database, tables, bars, portfolios, valuation, picture. Again, it writes 0 rows."""
    from msm_ray import demo as show

    server = own_server()
    try:
        engine = connect()
        preparation.prepare(engine)
        show.load(engine, narrate)
        configurations = show.fleet(engine, portfolios)
        narrate(f"fleet: {portfolios} portfolios over {len({c.signal_uid for c in configurations})} signals; running on {executor.value}")
        options = Options(batch_size=batch_size, arguments={"demo": portfolios, "executor": executor.value})
        report = execute(engine, configurations, show.AS_OF, options, executor, workers)
        _show_demo(engine, report, output)
    finally:
        if server and not keep_db:
            get_engine().dispose()
            server.stop()
    raise typer.Exit(report.exit_code)


def _show_demo(engine: Engine, report: RunReport, output: Output) -> None:
    from msm_ray.report import read_performance, write_report

    page = Path("demo.html").resolve()
    with transaction(engine, read_only=True) as connection:
        digest = compute_checksum(connection)
        performance = read_performance(connection, [r.identifier for r in report.results if r.kind == "portfolio"])
        facts = {
            "portfolios landed": report.counts()["landed"],
            "up to date": report.counts()["up_to_date"],
            "rows written": f"{report.rows_written:,}",
        }
        write_report(connection, page, "msm-ray demo: a fleet over 20 US stocks, 1990-2022", performance, facts)
    if output == Output.json:
        emit_json({**report.summary(), "checksum": digest, "report": str(page)})
        return
    best, worst = (f"{p.identifier} ({100 * p.growth:+.2f} % a year)" for p in (performance[0], performance[-1]))
    counts = report.counts()
    rows = [
        (counts["landed"], counts["up_to_date"], counts["failed"] + counts["skipped"], f"{report.rows_written:,}", f"{report.seconds:.1f}")
    ]
    emit_table("Demo fleet", ("landed", "up to date", "failed", "rows written", "seconds"), rows)
    out.print(f"best     {best}\nworst    {worst}\nchecksum {digest}\nreport   {page}", highlight=False, soft_wrap=True)
    if not report.rows_written:
        out.print("Nothing to do: every portfolio was up to date, 0 rows written.")
    _show_failures(report)
    out.print("Next: ./run status · ./run plan --as-of 2022-12-31 · ./run verify · ./run db psql", highlight=False, soft_wrap=True)


# -- shared -------------------------------------------------------------------------------------------------------------------


def execute(
    engine: Engine,
    configurations: list[PortfolioConfiguration],
    as_of: datetime,
    options: Options,
    executor: ExecutorName,
    workers: int | None,
    task_timeout: float = 1800.0,
) -> RunReport:
    """Run with a live bar and write `run_results.json`."""
    running = make_executor(executor.value, task_timeout, workers)
    try:
        with watching() as watcher:
            report = run_fleet(engine, configurations, running, as_of, options, watcher)
    finally:
        running.close()
    RESULTS_FILE.write_text(json.dumps(report.document(), indent=2))
    return report


def show_report(report: RunReport, output: Output) -> None:
    if output == Output.json:
        emit_json(
            {
                **report.summary(),
                "failures": [
                    {"kind": r.kind, "identifier": r.identifier, "status": r.status, **(r.error or {})} for r in report.failures()
                ],
            }
        )
        return
    if not report.results:
        out.print("Nothing to do.")
        return
    counts = report.counts()
    text = f"{counts['landed']} landed · {counts['up_to_date']} up to date · {counts['failed']} failed · {counts['skipped']} skipped"
    out.print(f"{text} · {report.rows_written:,} rows · {report.seconds:.1f} s", highlight=False)
    _show_failures(report)


def _show_failures(report: RunReport) -> None:
    rows = [(r.kind, r.identifier, r.status, r.error["message"] if r.error else "held by another run") for r in report.failures()]
    if rows:
        emit_table("Not landed; repair, then msm-ray retry", ("kind", "identifier", "status", "reason"), rows)


def _day(value: datetime | None, form: str = "%Y-%m-%d") -> str | None:
    return value.strftime(form) if value else None


def _run_counts(summary: dict[str, Any] | None) -> tuple[Any, ...]:
    if not summary:
        return (None,) * 4
    return summary["landed"], summary["failed"] + summary["skipped"], f"{summary['rows_written']:,}", summary["seconds"]


if __name__ == "__main__":
    main()
