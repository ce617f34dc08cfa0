"""The first run of a fleet: 1 000 portfolios x 2 500 sessions x 50 assets out of 500, rebalanced daily and monthly, by two Ray workers.

python benchmarks/fleet_first.py [--quick] [--plain]

Three rounds of each style, each with portfolios of its own in the same growing tables, and each followed at once by its limit: the very
rows of the round copied into equal empty tables by as many processes, and the same prices read once (limit.py). `efficiency` = limit /
job, the median of the rounds. `vs_naive` is seconds per portfolio of naive.py over ours. Ray has started before the clock does, and the
workers have run something; everything else counts: plan, signals, ledger. Storages are spread over eight partitions, as is best for a first
load of daily weights (`msm-ray prepare --partitions 8`); with --plain they are not. About 30 GB of disk, half an hour; --quick is small.
"""

import statistics
import sys
import time
from typing import Any

import limit
import naive
import synthetic
from common import emit, options, peak_worker_mib, register, server

from msm_ray import prepare
from msm_ray.executors import RayExecutor
from msm_ray.run import run_fleet

ROUNDS = 3
PORTFOLIOS = {"every_session": 334, "month_end": 1_000}  # of a round; daily rounds are parts of one fleet of a thousand
QUICK_PORTFOLIOS = {"every_session": 8, "month_end": 24}
NAIVE_PORTFOLIOS = 8
PARTITIONS = 8


def main() -> None:
    chosen = options(__doc__, plain="storages without partitions")
    quick = chosen.quick
    portfolios = QUICK_PORTFOLIOS if quick else PORTFOLIOS
    found: dict[str, dict[str, Any]] = {}
    with server() as fresh:
        executor = RayExecutor()
        try:
            engine = fresh(with_demo=False)
            prepare.lay_out(engine, partitions=None if chosen.plain else PARTITIONS)
            closes = synthetic.load(engine)
            as_of = synthetic.through(closes[-2])
            warm = synthetic.fleet(2 * executor.slots, "month_end", prefix="warm", seed=ROUNDS)
            register(engine, warm)
            run_fleet(engine, warm, executor, as_of)
            for style in synthetic.STYLES:
                seconds, efficiency, rows = [], [], 0
                with peak_worker_mib() as peak:
                    for round_ in range(1 if quick else ROUNDS):
                        fleet = synthetic.fleet(portfolios[style], style, prefix=f"{style[0]}{round_}-", seed=round_)
                        register(engine, fleet)
                        started = time.perf_counter()
                        report = run_fleet(engine, fleet, executor, as_of)
                        seconds.append(time.perf_counter() - started)
                        assert report.counts()["landed"] == len(fleet), report.failures()[:3]
                        rows += report.rows_written
                        least = limit.measured(engine, fleet, executor.slots)
                        assert least.rows == report.rows_written, (least.rows, report.rows_written)
                        efficiency.append(least.seconds / seconds[-1])
                        print(
                            f"{style} round {round_}: {len(fleet)} portfolios, {report.rows_written:,} rows in {seconds[-1]:.1f} s; limit "
                            f"{least.copy_seconds:.1f} s + {least.read_seconds:.1f} s; efficiency {efficiency[-1]:.2f}",
                            file=sys.stderr,
                        )
                each = statistics.median(seconds) / portfolios[style]
                some = synthetic.fleet(2 if quick else NAIVE_PORTFOLIOS, style, prefix=f"{style[0]}0-")
                theirs = {
                    name: naive.seconds_per_portfolio(executor._ray, engine, some, style, as_of, events_only=events_only)
                    for name, events_only in (("events", True), ("usual", False))
                }
                found[style] = {
                    "portfolios": portfolios[style] * len(seconds),
                    "seconds": [round(s, 1) for s in seconds],
                    "rows": rows,
                    "efficiency": round(statistics.median(efficiency), 3),
                    "vs_naive": round(theirs["usual"] / each, 1),
                    "vs_naive_events": round(theirs["events"] / each, 1),
                    "peak_worker_mib": round(peak()),
                }
                print(f"{style}: {found[style]}", file=sys.stderr)
        finally:
            executor.close()
    emit({key: {style: facts[key] for style, facts in found.items()} for key in next(iter(found.values()))})


if __name__ == "__main__":
    main()
