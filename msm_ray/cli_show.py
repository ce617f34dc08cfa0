"""`msm-ray show`: what is stored, for people (a table), programs (JSON) and other tools (a file)."""

import re
from collections.abc import Mapping
from datetime import datetime, timedelta
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
import typer

import msm_core
from msm_core.api import Account, VirtualFund
from msm_core.frames import iso, utc
from msm_core.models import (
    AccountHoldingsStorage,
    MetaTable,
    PortfoliosStorage,
    PortfolioTable,
    PortfolioWeightsStorage,
    TargetPositionsStorage,
    VirtualFundHoldingsStorage,
)
from msm_core.services import reads
from msm_ray.console import Output, OutputOption, emit_json, emit_table, out
from msm_ray.export import check_path, write_frame
from msm_ray.session import connect, parse_as_of

ROWS_SHOWN = 40
DIGITS_SHOWN = 10  # significant ones, in tables

show_app = typer.Typer(
    help="""What is stored: weights and values of portfolios, holdings, targets and fund exposure of accounts.

    A table shows the first rows and says how many there are. --output json has all of them, and so has a file: --to FILE.csv.
    Both hold every column and every digit; a table leaves out uids and digits after the tenth.""",
    no_args_is_help=True,
)

PortfoliosArgument = Annotated[list[str] | None, typer.Argument(metavar="PORTFOLIO", help="Identifiers; default: all.")]
AccountsArgument = Annotated[list[str] | None, typer.Argument(metavar="ACCOUNT", help="Identifiers; default: all.")]
AsOfOption = Annotated[
    str | None, typer.Option("--as-of", help="What was known then: 2024-06-28 (the whole UTC day) or 2024-06-28T20:00:00Z. Default: now.")
]
ToOption = Annotated[Path | None, typer.Option("--to", help="Write all rows to this file: .csv, .csv.gz or .parquet.", dir_okay=False)]


@show_app.command()
def weights(
    portfolios: PortfoliosArgument = None, as_of: AsOfOption = None, output: OutputOption = Output.table, to: ToOption = None
) -> None:
    """The last weights of portfolios: what each asset weighed before and after it last traded, and at which price.

    Example: msm-ray show weights ew-monthly spx-repl --as-of 2024-06-28

    Of all portfolios, into a file: msm-ray show weights --to weights.parquet
    """
    at = _start(to, as_of, PortfolioTable, PortfolioWeightsStorage)
    _show("weights", {"as_of": at}, reads.latest_portfolio_weights(portfolios, as_of=at), output, to)


@show_app.command()
def values(
    portfolios: PortfoliosArgument = None,
    start: Annotated[str | None, typer.Option(help="First instant, included; a date is its 00:00 UTC. Default: the first value.")] = None,
    end: Annotated[str | None, typer.Option(help="Last instant, included; a date is the whole UTC day. Default: the last value.")] = None,
    latest: Annotated[bool, typer.Option("--latest", help="Only the last row of each portfolio.")] = False,
    output: OutputOption = Output.table,
    to: ToOption = None,
) -> None:
    """Values of portfolios: one row per session close, with the return since the one before.

    Example: msm-ray show values ew-monthly --start 2024-01-01 --end 2024-06-28 --to values.csv

    Where everything stands: msm-ray show values --latest
    """
    first, last = _bound("--start", start), _bound("--end", end)
    _start(to, None, PortfolioTable, PortfoliosStorage)
    found = reads.portfolio_values(portfolios, start=first, end=last, latest_only=latest)
    _show("values", {"start": first, "end": last}, found, output, to)


@show_app.command()
def holdings(accounts: AccountsArgument = None, as_of: AsOfOption = None, output: OutputOption = Output.table, to: ToOption = None) -> None:
    """What accounts hold, by their newest snapshot; a quantity below 0 is short.

    Example: msm-ray show holdings custody-1 --as-of 2024-06-28T20:00:00Z
    """
    at = _start(to, as_of, AccountHoldingsStorage)
    _show("holdings", {"as_of": at}, reads.account_holdings(accounts, as_of=at), output, to)


@show_app.command()
def targets(accounts: AccountsArgument = None, as_of: AsOfOption = None, output: OutputOption = Output.table, to: ToOption = None) -> None:
    """What accounts should hold: the target positions in force of their active allocations. A target is an asset or a portfolio.

    Example: msm-ray show targets custody-1 --output json
    """
    at = _start(to, as_of, TargetPositionsStorage)
    _show("targets", {"as_of": at}, reads.account_targets(accounts, as_of=at), output, to)


@show_app.command()
def exposure(
    virtual_funds: Annotated[list[str] | None, typer.Argument(metavar="FUND", help="Identifiers; default: all.")] = None,
    account: Annotated[list[str] | None, typer.Option("--account", help="Only funds of this account. Repeat for more.")] = None,
    as_of: AsOfOption = None,
    output: OutputOption = Output.table,
    to: ToOption = None,
) -> None:
    """What of the holdings is attributed to each virtual fund, by its newest allocation; a quantity below 0 is short.

    Example: msm-ray show exposure --account custody-1 --to exposure.csv.gz
    """
    from msm_core.services.virtual_funds import virtual_fund_exposure

    at = _start(to, as_of, VirtualFundHoldingsStorage)
    for row, names in ((VirtualFund, virtual_funds), (Account, account)):
        row.get_many(names or ())  # a name that is unknown is an error, and not a fund without exposure
    found = virtual_fund_exposure(accounts=account or None, virtual_funds=virtual_funds or None, as_of=at)
    _show("exposure", {"as_of": at}, found, output, to)


# -- options ------------------------------------------------------------------------------------------------------------------


def _start(to: Path | None, as_of: str | None, *models: type[MetaTable]) -> datetime:
    """Attach tables, and fix the as-of. What is wrong with the options is told before anything is read."""
    at = parse_as_of(as_of)
    if to is not None:
        check_path(to)
    connect()
    msm_core.start_engine(models=models)
    return at


def _bound(option: str, text: str | None) -> datetime | None:
    """An end of a span, of which both ends are included: a date starts at its 00:00 UTC and ends at that of the next day."""
    if text is None:
        return None
    instant = parse_as_of(text, option)
    is_date = re.fullmatch(r"\d{4}-\d{2}-\d{2}", text)
    return instant - timedelta(days=1) if is_date and option == "--start" else instant


# -- results ------------------------------------------------------------------------------------------------------------------


def _show(what: str, bounds: Mapping[str, datetime | None], frame: pd.DataFrame, output: Output, to: Path | None) -> None:
    told = {name: None if time is None else time.isoformat() for name, time in bounds.items()} | {"rows": len(frame)}
    show_frame(what, f"{what.capitalize()} {_span(bounds)}", told, frame, output, to)


def show_frame(what: str, title: str, told: Mapping[str, Any], frame: pd.DataFrame, output: Output, to: Path | None) -> None:
    """All rows into a file, or as JSON under the name `what` beside what is `told`; else the first of them as a table."""
    if to is not None:
        write_frame(frame, to)
    if output == Output.json:
        emit_json({**told, what: _records(frame)} if to is None else {**told, "file": str(to)})
    elif to is not None:
        out.print(f"{to}: {_count(frame)}", highlight=False, markup=False, soft_wrap=True)
    else:
        _print(title, frame)


def _span(bounds: Mapping[str, datetime | None]) -> str:
    named = {"as_of": "as of", "start": "from", "end": "to"}
    return " ".join(f"{named[name]} {iso(utc(time, name))}" for name, time in bounds.items() if time is not None)


def _print(title: str, frame: pd.DataFrame) -> None:
    """The first rows. A table that is cut off says so, below, where people look last."""
    columns = [name for name in frame.columns if not name.endswith("uid")]
    shown = frame.loc[:, columns].head(ROWS_SHOWN)
    emit_table(f"{title.strip()}: {_count(frame)}", columns, ([_cell(value) for value in row] for row in shown.itertuples(index=False)))
    if len(frame) > ROWS_SHOWN:
        hint = f"The first {ROWS_SHOWN} of {_count(frame)}. All of them: --to FILE.csv (.csv.gz, .parquet), or --output json."
        out.print(hint, highlight=False, markup=False, soft_wrap=True)


def _count(frame: pd.DataFrame) -> str:
    return f"{len(frame):,} rows" if len(frame) != 1 else "1 row"


def _cell(value: Any) -> str | None:
    if pd.isna(value):
        return None
    if isinstance(value, pd.Timestamp):
        return iso(utc(value, "time"))
    return f"{value:.{DIGITS_SHOWN}g}" if isinstance(value, float) else str(value)


def _records(frame: pd.DataFrame) -> list[dict[str, Any]]:
    return [{str(name): _json(value) for name, value in row.items()} for row in frame.to_dict("records")]


def _json(value: Any) -> Any:
    """NaN is no JSON, and a time is spelled as in CSV files."""
    if isinstance(value, pd.Timestamp):
        return value.isoformat()
    return None if pd.isna(value) else value
