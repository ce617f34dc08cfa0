"""`msm-ray prepare`: what is made, and what would be."""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from msm_core.data_nodes.world import price_sources_of
from msm_ray import prepare as preparation
from msm_ray.console import Output, OutputOption, emit_json, emit_table, err, out
from msm_ray.fleet import load_fleet
from msm_ray.layout import PARTITIONS_MAX, PARTITIONS_MIN, wish
from msm_ray.session import connect
from msm_ray.store import store_fleet, stored_price_sources

FileOption = Annotated[Path | None, typer.Option("--file", "-f", help="fleet.yaml; without it, what `prepare -f` stored.", dir_okay=False)]
EXIT_PARTIAL, EXIT_PENDING = 3, 10


def prepare(
    file: FileOption = None,
    check: Annotated[bool, typer.Option("--check", help="Change nothing; exit 10 when work is pending.")] = False,
    sql: Annotated[bool, typer.Option("--sql", help="Print the DDL that is pending, and change nothing.")] = False,
    partition_by_year: Annotated[
        bool, typer.Option("--partition-by-year", help="Give weights, signals and values a partition per year; only while they are empty.")
    ] = False,
    partitions: Annotated[
        int | None,
        typer.Option(
            min=PARTITIONS_MIN,
            max=PARTITIONS_MAX,
            help="Spread weights, signals and values over N partitions by portfolio (or signal): parallel first loads write faster; "
            "only while they are empty.",
            metavar="N",
        ),
    ] = None,
    output: OutputOption = Output.table,
) -> None:
    """Create and upgrade tables; with -f also store the fleet's calendars, identity rows and configurations. Idempotent.

    Tables of interpolated prices are made for the portfolios of the file or, without one, for the stored ones. Partitions that
    are missing are made every time; those of years, up to two years ahead.
    """
    wish(partition_by_year, partitions)  # refused before anything is made
    fleet = load_fleet(file) if file else None
    engine = connect()
    sources = price_sources_of(fleet.portfolios) if fleet else stored_price_sources(engine)
    if sql:
        sys.stdout.write(preparation.ddl(engine, sources, yearly=partition_by_year, partitions=partitions))
    elif check:
        _show_pending(preparation.check(engine, sources, yearly=partition_by_year, partitions=partitions), output)
    else:
        done = preparation.prepare(engine, sources)
        stored = store_fleet(engine, fleet) if fleet else None
        made = preparation.lay_out(engine, yearly=partition_by_year, partitions=partitions)  # the stored calendars say of which years
        _show_prepared(replace(done, pending=(*done.pending, *made)), stored, output)


def _show_pending(found: preparation.Preparation, output: Output) -> None:
    facts = {"pending": found.pending, "drifted": found.drifted, "missing": found.missing}
    problems = {"problems": found.problems} if found.problems else {}
    if output == Output.json:
        emit_json(facts | problems)
    else:
        out.print(" · ".join(f"{len(names)} {what}" for what, names in facts.items()))
        rows = [(what, name) for what, names in (facts | problems).items() for name in names]
        if rows:
            emit_table("To do: msm-ray prepare", ("what", "name"), rows)
    if not found.is_clean or found.problems:
        raise typer.Exit(EXIT_PARTIAL if found.is_clean else EXIT_PENDING)


def _show_prepared(done: preparation.Preparation, stored: int | None, output: Output) -> None:
    facts = {"pending": [], "drifted": [], "missing": done.missing}
    work = {"applied": done.pending, "repaired": done.repaired, "problems": done.problems}
    if output == Output.json:
        emit_json(facts | work | ({} if stored is None else {"configurations_stored": stored}))
    else:
        text = f", {stored} configurations new or changed" if stored is not None else ""
        out.print(f"Prepared: {len(done.pending)} revisions and tables applied{text}.")
        for name in done.repaired:
            out.print(f"Cadence of {name} was missing in the catalogue; it is now what the model declares.", highlight=False)
        for problem in done.problems:
            err.print(f"[red]not prepared:[/red] {escape(problem)}", highlight=False, soft_wrap=True)
    if done.problems:
        raise typer.Exit(EXIT_PARTIAL)
