"""The first run of a fleet: 1 000 portfolios x 2 500 sessions x 50 assets out of 500, rebalanced daily and monthly, by two Ray workers.

python benchmarks/fleet_first.py [--quick] [--plain]

Three rounds of each style, each with portfolios of its own in the same growing tables, and each followed at once by its limit: the very
rows of the round copied into equal empty tables by as many processes, and the same prices read once (limit.py); and then by naive.py for
some of its portfolios, because the machine's speed changes. `efficiency` = limit / job and `vs_naive`, seconds per portfolio of naive.py
over ours, are medians of the rounds. Ray has started before the clock does, and the workers have run something; everything else counts:
plan, signals, ledger. Each style has a database of its own, laid out as is best for it: daily weights in eight partitions
(`msm-ray prepare --partitions 8`), monthly ones in plain tables; with --plain both are. About 30 GB of disk, half an hour; --quick is
small.
"""

import statistics
import sys
import time
from datetime import datetime
from typing import Any, NamedTuple

import limit
import naive
import synthetic
from common import emit, options, peak_worker_mib, register, server, settle, warm_up
from sqlalchemy import Engine

from msm_core.configuration import PortfolioConfiguration
from msm_core.rebalance_strategy import RebalanceOn
from msm_ray import prepare
from msm_ray.executors import RayExecutor
from msm_ray.run import run_fleet

ROUNDS = 3
PORTFOLIOS = {"every_session": 334, "month_end": 1_000}  # of a round; daily rounds are parts of one fleet of a thousand
QUICK_PORTFOLIOS = {"every_session": 8, "month_end": 24}
PARTITIONS = {"every_session": 8, "month_end": None}
NAIVE_PORTFOLIOS = 4


def main() -> None:
    chosen = options(__doc__, plain="storages without partitions")
    found: dict[str, dict[str, Any]] = {}
    with server() as fresh:
        executor = RayExecutor()
        try:
            for style in synthetic.STYLES:
                engine = fresh(with_demo=False)
                prepare.lay_out(engine, partitions=None if chosen.plain else PARTITIONS[style])
                found[style] = _measured(engine, executor, style, chosen.quick)
                print(f"{style}: {found[style]}", file=sys.stderr)
        finally:
            executor.close()
    emit({key: {style: facts[key] for style, facts in found.items()} for key in next(iter(found.values()))})


def _measured(engine: Engine, executor: RayExecutor, style: RebalanceOn, quick: bool) -> dict[str, Any]:
    closes = synthetic.load(engine)
    as_of = synthetic.through(closes[-2])
    warm_up(engine, executor, as_of)
    count, rounds = (QUICK_PORTFOLIOS if quick else PORTFOLIOS)[style], 1 if quick else ROUNDS
    with peak_worker_mib() as peak:
        done = [_round(engine, executor, synthetic.fleet(count, style, f"{style[0]}{i}-", seed=i), style, as_of) for i in range(rounds)]
        memory = peak()
    return {
        "portfolios": count * rounds,
        "seconds": [round(r.seconds, 1) for r in done],
        "rows": sum(r.rows for r in done),
        "efficiency": round(statistics.median(r.efficiency for r in done), 3),
        "vs_naive": round(statistics.median(r.vs_naive for r in done), 1),
        "vs_naive_events": round(statistics.median(r.vs_naive_events for r in done), 1),
        "peak_worker_mib": round(memory),
    }


class Round(NamedTuple):
    seconds: float
    rows: int
    efficiency: float
    vs_naive: float
    vs_naive_events: float


def _round(engine: Engine, executor: RayExecutor, fleet: list[PortfolioConfiguration], style: RebalanceOn, as_of: datetime) -> Round:
    """The job, its limit and the naive one, one after the other, in a database that has settled: the vacuum that autovacuum owes to the
    rows of the round before is not this round's."""
    register(engine, fleet)
    settle(engine)
    started = time.perf_counter()
    report = run_fleet(engine, fleet, executor, as_of)
    seconds = time.perf_counter() - started
    assert report.counts()["landed"] == len(fleet), report.failures()[:3]
    least = limit.measured(engine, fleet, executor.slots)
    assert least.rows == report.rows_written, (least.rows, report.rows_written)
    usual, events = (
        naive.seconds_per_portfolio(executor._ray, engine, fleet[:NAIVE_PORTFOLIOS], style, as_of, events_only=events_only)
        for events_only in (False, True)
    )
    each = seconds / len(fleet)
    done = Round(seconds, report.rows_written, least.seconds / seconds, usual / each, events / each)
    print(f"{style}, {len(fleet)} portfolios: {done}; {least}", file=sys.stderr)
    return done


if __name__ == "__main__":
    main()
