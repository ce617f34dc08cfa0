"""`msm-ray accounts`: what accounts should hold, for all of them at once."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

import msm_core
from msm_core.database import transaction
from msm_core.errors import SnapshotRefused
from msm_core.services.snapshots import replace_account_holdings, replace_target_positions
from msm_core.storage import verify_prepared
from msm_ray.account_fleet import FleetExposure, expand_fleet
from msm_ray.cli_run import ExecutorName, ExecutorOption, TimeoutOption, WorkersOption
from msm_ray.cli_show import AsOfOption, ToOption, show_frame
from msm_ray.console import Output, OutputOption, emit_json, emit_table, err, out
from msm_ray.executors import make_executor
from msm_ray.export import check_path
from msm_ray.session import connect, parse_as_of
from msm_ray.snapshot_files import holdings_snapshots, target_snapshots

EXIT_NOTHING_STORED = 4
PROBLEMS_SHOWN = 20

accounts_app = typer.Typer(
    help="""Accounts: their target positions as exposure to assets.

    A target is an asset or a portfolio. A portfolio is a mandate: the target's exposure, times the weights that the portfolio has at the
    as-of (those of its last rebalance, drifted with prices since), is exposure to assets. No portfolio is computed here.""",
    no_args_is_help=True,
)


@accounts_app.command()
def expand(
    account: Annotated[list[str] | None, typer.Option("--account", "-a", help="Only this account. Repeat for more. Default: all.")] = None,
    as_of: AsOfOption = None,
    net: Annotated[bool, typer.Option("--net", help="One row per asset: long and short from several targets are set off.")] = False,
    executor: ExecutorOption = ExecutorName.local,
    workers: WorkersOption = None,
    task_timeout: TimeoutOption = 1800.0,
    output: OutputOption = Output.table,
    to: ToOption = None,
) -> None:
    """Expand the target positions in force into assets. An account that cannot be expanded is named (exit 3); the others are.

    Of every active allocation of an account the newest position set at or before the as-of is in force. Weights of a portfolio are
    those of its last valuation at or before the as-of.

    Example: msm-ray accounts expand --as-of 2024-06-28 --to exposure.parquet

    Of two accounts, what they should hold of each asset: msm-ray accounts expand -a custody-1 -a custody-2 --net
    """
    at = parse_as_of(as_of)
    if to is not None:
        check_path(to)
    engine = connect()
    with transaction(engine, read_only=True) as connection:
        verify_prepared(connection)
    running = make_executor(executor.value, task_timeout, workers)
    try:
        with _counting() as on_batch:
            found = expand_fleet(engine, running, at, account or None, net=net, on_batch=on_batch)
    finally:
        running.close()
    _show(found, output, to)
    raise typer.Exit(found.exit_code)


def _show(found: FleetExposure, output: Output, to: Path | None) -> None:
    summary = found.summary()
    show_frame("exposure", f"Exposure as of {summary['as_of']}", summary, found.exposure, output, to)
    if output == Output.table and found.failures:
        rows = [(failure["account"], failure["message"]) for failure in summary["failures"]]
        emit_table("Not expanded; repair, then expand again", ("account", "reason"), rows)


OverwriteOption = Annotated[bool, typer.Option("--overwrite", help="Replace snapshots that exist, each of them whole.")]
FileArgument = Annotated[Path, typer.Argument(help=".csv, .csv.gz or .parquet", dir_okay=False, exists=True)]


@accounts_app.command("load-targets")
def load_targets(file: FileArgument, overwrite: OverwriteOption = False, output: OutputOption = Output.table) -> None:
    """Store target positions from a file, all or none (exit 4): one snapshot per allocation and time, replaced whole.

    Columns: account_target_allocation, time_index (with an offset), target_type (asset or portfolio), target (its unique_identifier),
    and one of weight_notional_exposure, constant_notional_exposure and single_asset_quantity per row.

    Example: msm-ray accounts load-targets targets.csv --overwrite

    What `msm-ray show targets --to targets.csv` writes can be loaded again.
    """
    _load(file, target_snapshots, replace_target_positions, overwrite, output)


@accounts_app.command("load-holdings")
def load_holdings(file: FileArgument, overwrite: OverwriteOption = False, output: OutputOption = Output.table) -> None:
    """Store holdings from a file, all or none (exit 4): one snapshot per account and time, replaced whole.

    Columns: account, time_index (with an offset), asset_identifier, quantity (below 0 is short).

    Example: msm-ray accounts load-holdings holdings.parquet

    What `msm-ray show holdings --to holdings.parquet` writes can be loaded again.
    """
    _load(file, holdings_snapshots, replace_account_holdings, overwrite, output)


def _load(file: Path, read: Callable[[Path], list[Any]], replace: Callable[..., list[Any]], overwrite: bool, output: Output) -> None:
    connect()
    msm_core.start_engine()
    try:
        stored = replace(read(file), overwrite=overwrite)
    except SnapshotRefused as refused:
        if output == Output.json:
            emit_json({"stored": 0, "problems": refused.facts["problems"]})
        else:
            problems = refused.facts["problems"][:PROBLEMS_SHOWN]
            title = f"{refused.facts['count']} problems, nothing stored"
            emit_table(title, ("snapshot", "row", "field", "reason"), [tuple(problem.values()) for problem in problems])
        raise typer.Exit(EXIT_NOTHING_STORED) from None
    if output == Output.json:
        emit_json({"stored": len(stored), "problems": []})
    else:
        out.print(f"{file}: {len(stored)} snapshots stored", highlight=False, markup=False, soft_wrap=True)


@contextmanager
def _counting() -> Iterator[Callable[[int, int], None]]:
    """Accounts done, on a terminal."""
    if not err.is_terminal:
        yield lambda done, all_: None
        return
    columns = (TextColumn("accounts"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=err, transient=True) as progress:
        task = progress.add_task("accounts", total=None)
        yield lambda done, all_: progress.update(task, total=all_, advance=done)
