"""The verbs that recompute a fleet: `msm-ray run`, `retry` and `demo`."""

import json
import uuid
from collections.abc import Mapping
from datetime import datetime
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer
from sqlalchemy import Engine

from msm_core.configuration import PortfolioConfiguration
from msm_core.data_nodes.registration import read_configurations
from msm_core.database import get_engine, transaction
from msm_core.errors import RunNotFound
from msm_core.storage import verify_prepared
from msm_core.verification import checksum as compute_checksum
from msm_ray import ledger
from msm_ray import prepare as preparation
from msm_ray.cli_prepare import FileOption
from msm_ray.console import emit_json, emit_table, narrate, out
from msm_ray.executors import make_executor
from msm_ray.run import Options, RunReport, run_fleet
from msm_ray.session import choose_portfolios, connect, own_server, parse_as_of
from msm_ray.watch import MetricsOption, RunOutput, RunOutputOption, Watcher, watching


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


def run(
    file: FileOption = None,
    select_: SelectOption = None,
    as_of: AsOfOption = None,
    full_refresh: RefreshOption = False,
    executor: ExecutorOption = ExecutorName.ray,
    batch_size: BatchOption = None,
    workers: WorkersOption = None,
    task_timeout: TimeoutOption = 1800.0,
    metrics_file: MetricsOption = None,
    output: RunOutputOption = RunOutput.table,
) -> None:
    """Bring the fleet up to date. A portfolio that fails is named and left as it was; the rest land."""
    arguments = {"file": str(file) if file else None, "select": select_, "full_refresh": full_refresh, "executor": executor.value}
    with watching(output, metrics_file) as watcher:
        engine, at = connect(), parse_as_of(as_of)
        configurations, signals, unreadable = choose_portfolios(engine, file, select_)
        options = Options(batch_size, full_refresh, signals, unreadable, arguments=arguments)
        report = execute(engine, configurations, at, options, watcher, executor, workers, task_timeout)
    show_report(report, output)
    raise typer.Exit(report.exit_code)


def retry(
    run_: Annotated[
        str | None, typer.Argument(metavar="[RUN]", help="Run to retry, or the beginning of its uid; default: the last one.")
    ] = None,
    executor: ExecutorOption = ExecutorName.ray,
    batch_size: BatchOption = None,
    workers: WorkersOption = None,
    task_timeout: TimeoutOption = 1800.0,
    metrics_file: MetricsOption = None,
    output: RunOutputOption = RunOutput.table,
) -> None:
    """Run again exactly what failed or was skipped, at the original as-of."""
    report = None
    with watching(output, metrics_file) as watcher:
        engine = connect()
        if left := _left_over(engine, run_):
            options = Options(
                batch_size=batch_size,
                signals_selected=left.signals,
                unreadable=left.unreadable,
                retry_of=left.root,
                arguments={"retry": str(left.root), "executor": executor.value},
            )
            report = execute(engine, left.configurations, left.as_of, options, watcher, executor, workers, task_timeout)
    if report is None:
        _nothing_to_retry(output, watcher)
        return
    show_report(report, output)
    raise typer.Exit(report.exit_code)


class _LeftOver(NamedTuple):
    """What a run and its retries left unfinished; `unreadable` as in Options."""

    root: uuid.UUID
    as_of: datetime
    configurations: list[PortfolioConfiguration]
    signals: set[str]
    unreadable: Mapping[str, dict[str, str]]


def _left_over(engine: Engine, run_: str | None) -> _LeftOver | None:
    """None = nothing, of any run. Raises RunNotFound for a run that is named and not there."""
    with transaction(engine, read_only=True) as connection:
        verify_prepared(connection)
        try:
            root, at = ledger.find_run(connection, run_)
        except RunNotFound:
            if run_ is not None:
                raise
            return None
        todo = set(ledger.unfinished(connection, root))
        stored, unreadable = read_configurations(connection)
    chosen = [c for c in stored if ("portfolio", c.identifier) in todo]
    signals = {uid for kind, uid in todo if kind == "signal"}
    still = {identifier: facts for identifier, facts in unreadable.items() if ("portfolio", identifier) in todo}
    return _LeftOver(root, at, chosen, signals, still)


def _nothing_to_retry(output: RunOutput, watcher: Watcher) -> None:
    facts: dict[str, Any] = {"status": "nothing to retry", "landed": 0, "failed": 0, "rows_written": 0}
    if watcher.events:
        watcher.events.emit("run_finished", **facts)
    elif output == RunOutput.json:
        emit_json(facts)
    else:
        out.print("Nothing to retry: every node of every run has landed.")


def demo(
    portfolios: Annotated[int, typer.Option("--portfolios", "-n", min=1, max=100_000, help="Size of the fleet.")] = 200,
    executor: ExecutorOption = ExecutorName.ray,
    keep_db: Annotated[bool, typer.Option("--keep-db", help="Leave the embedded database running.")] = False,
    batch_size: BatchOption = None,
    workers: WorkersOption = None,
    output: RunOutputOption = RunOutput.table,
) -> None:
    """A fleet on real prices, from nothing: database, tables, bars, portfolios, valuation, picture. Again, it writes 0 rows."""
    server = None
    try:
        with watching(output, with_metrics=False) as watcher:
            server = own_server()
            report = _run_demo(portfolios, executor, batch_size, workers, watcher)
        _show_demo(get_engine(), report, output, watcher)
    finally:
        if server and not keep_db:
            get_engine().dispose()
            server.stop()
    raise typer.Exit(report.exit_code)


def _run_demo(portfolios: int, executor: ExecutorName, batch_size: int | None, workers: int | None, watcher: Watcher) -> RunReport:
    from msm_ray import demo as show

    engine = connect()
    preparation.prepare(engine)
    show.load(engine, narrate)
    configurations = show.fleet(engine, portfolios)
    narrate(f"fleet: {portfolios} portfolios over {len({c.signal_uid for c in configurations})} signals; running on {executor.value}")
    options = Options(batch_size=batch_size, arguments={"demo": portfolios, "executor": executor.value})
    return execute(engine, configurations, show.AS_OF, options, watcher, executor, workers)


def _show_demo(engine: Engine, report: RunReport, output: RunOutput, watcher: Watcher) -> None:
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
    if watcher.events:
        watcher.events.emit("demo_finished", checksum=digest, report=str(page))
        return
    if output == RunOutput.json:
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


def execute(
    engine: Engine,
    configurations: list[PortfolioConfiguration],
    as_of: datetime,
    options: Options,
    watcher: Watcher,
    executor: ExecutorName,
    workers: int | None,
    task_timeout: float = 1800.0,
) -> RunReport:
    """Run, and write `run_results.json`."""
    running = make_executor(executor.value, task_timeout, workers)
    try:
        report = run_fleet(engine, configurations, running, as_of, options, watcher)
    finally:
        running.close()
    RESULTS_FILE.write_text(json.dumps(report.document(), indent=2))
    return report


def result_document(report: RunReport) -> dict[str, Any]:
    """The summary, and every node that has not landed with its reason."""
    failures = [{"kind": r.kind, "identifier": r.identifier, "status": r.status, **(r.error or {})} for r in report.failures()]
    return {**report.summary(), "failures": failures}


def show_report(report: RunReport, output: RunOutput) -> None:
    if output == RunOutput.ndjson:
        return  # told already
    if output == RunOutput.json:
        emit_json(result_document(report))
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
