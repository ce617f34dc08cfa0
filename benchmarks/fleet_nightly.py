"""One more session of a fleet: 1 000 portfolios with ten years stored, and 10 000 with one, 50 assets each, rebalanced every session.

python benchmarks/fleet_nightly.py [--quick]

Three nights of each, by two Ray workers that are up: what is asked for is the time after start-up. Stored configurations are read, the
run is planned, executed and recorded. `seconds` is the median; `statements` are those of one more night, run in one process so that
all of them are counted, which depend on the number of batches only. Loading the past takes most of the time, and 25 GB of disk.
"""

import gc
import statistics
import sys
import time
from datetime import date
from typing import Any

import synthetic
from common import counted_statements, emit, options, peak_worker_mib, register, server, settle
from sqlalchemy import Engine

from msm_core.configuration import PortfolioConfiguration
from msm_core.data_nodes.registration import read_configurations
from msm_core.database import transaction
from msm_ray.executors import Executor, LocalExecutor, RayExecutor
from msm_ray.run import RunReport, run_fleet

NIGHTS = 3
FLEETS = ((1_000, synthetic.FIRST), (10_000, date(2021, 12, 1)))
QUICK_FLEETS = ((100, date(2021, 12, 1)), (400, date(2022, 11, 1)))


def main() -> None:
    quick = options(__doc__).quick
    found: list[dict[str, Any]] = []
    with server() as fresh:
        executor = RayExecutor()
        try:
            for portfolios, start in QUICK_FLEETS if quick else FLEETS:
                engine = fresh(with_demo=False)
                found.append(_nights(engine, executor, synthetic.fleet(portfolios, "every_session", start=start)))
                print(f"{portfolios} portfolios since {start}: {found[-1]}", file=sys.stderr)
                _drop(engine)
        finally:
            executor.close()
    emit({key: [facts[key] for facts in found] for key in found[0]})


def _nights(engine: Engine, executor: Executor, fleet: list[PortfolioConfiguration]) -> dict[str, Any]:
    nights = NIGHTS + 1
    closes = synthetic.load(engine)
    register(engine, fleet)
    started = time.perf_counter()
    loaded = run_fleet(engine, fleet, executor, synthetic.through(closes[-1 - nights]))
    assert loaded.counts()["landed"] == len(fleet), loaded.failures()[:3]
    print(f"loaded {loaded.rows_written:,} rows in {time.perf_counter() - started:.0f} s", file=sys.stderr)
    settle(engine)
    portfolios = len(fleet)
    fleet.clear()
    gc.collect()
    seconds, planned, rows = [], [], 0
    with peak_worker_mib() as peak:
        for night in range(NIGHTS):
            started = time.perf_counter()
            report, reading = _night(engine, executor, closes[night - nights])
            seconds.append(time.perf_counter() - started)
            planned.append(reading)
            rows = report.rows_written
            assert report.counts()["landed"] == portfolios, report.failures()[:3]
    with counted_statements() as sent:
        _night(engine, LocalExecutor(), closes[-1])
    return {
        "portfolios": portfolios,
        "seconds": round(statistics.median(seconds), 2),
        "all_seconds": [round(s, 2) for s in seconds],
        "reading_configurations_seconds": round(statistics.median(planned), 2),
        "statements": len(sent),
        "rows": rows,
        "peak_worker_mib": round(peak()),
    }


def _night(engine: Engine, executor: Executor, close: Any) -> tuple[RunReport, float]:
    """Everything that `msm-ray run` does for the stored fleet, and how long of it reading the configurations took."""
    started = time.perf_counter()
    with transaction(engine, read_only=True) as connection:
        stored = read_configurations(connection)
    reading = time.perf_counter() - started
    return run_fleet(engine, stored.configurations, executor, synthetic.through(close)), reading


def _drop(engine: Engine) -> None:
    """Give the disk back."""
    with engine.begin() as connection:
        connection.exec_driver_sql("TRUNCATE msm__portfolio_weights, msm__portfolios")
    engine.dispose()


if __name__ == "__main__":
    main()
