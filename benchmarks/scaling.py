"""Fleets of 100 to 30 000 portfolios over one year, rebalanced monthly: seconds, memory, and how they grow.

python benchmarks/scaling.py [--quick]

Each size is a first run into a fresh database by two Ray workers that are up; `seconds` are medians of three. `exponent` is the slope of
log seconds over log portfolios from 1 000 on (all sizes with --quick): 1 is flat in the number of portfolios. `flat` is the greatest cost
per portfolio from 1 000 on, over the least.
"""

import math
import resource
import statistics
import sys
import time

import numpy as np
import synthetic
from common import emit, options, peak_worker_mib, register, server, settle, warm_up
from sqlalchemy import Engine

from msm_ray.executors import RayExecutor
from msm_ray.run import run_fleet

SIZES = (100, 300, 1_000, 3_000, 10_000, 30_000)
QUICK_SIZES = (100, 300, 900)
SESSIONS_BEFORE = 252
ROUNDS = 3


def main() -> None:
    quick = options(__doc__).quick
    sizes, rounds = (QUICK_SIZES, 1) if quick else (SIZES, ROUNDS)
    taken = dict[int, list[float]]()
    with server() as fresh:
        executor = RayExecutor()
        try:
            with peak_worker_mib() as peak:
                for size in sizes * rounds:  # by turns: the machine's speed changes
                    engine = fresh(with_demo=False)
                    taken.setdefault(size, []).append(_seconds(engine, executor, size))
                    engine.dispose()
                    print(f"{size} portfolios: {taken[size][-1]:.1f} s, a worker held {peak():.0f} MiB so far", file=sys.stderr)
                memory = peak()
        finally:
            executor.close()
    seconds = [statistics.median(taken[size]) for size in sizes]
    large = [(n, s) for n, s in zip(sizes, seconds, strict=True) if n >= 1_000 or quick]
    slope = np.polyfit([math.log(n) for n, _ in large], [math.log(s) for _, s in large], 1)[0]
    each = [s / n for n, s in large]
    emit(
        {
            "portfolios": list(sizes),
            "seconds": [round(s, 2) for s in seconds],
            "all_seconds": [[round(s, 2) for s in taken[size]] for size in sizes],
            "exponent": round(float(slope), 3),
            "flat": round(max(each) / min(each), 2),
            "peak_worker_mib": round(memory),
            "peak_driver_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
        }
    )


def _seconds(engine: Engine, executor: RayExecutor, size: int) -> float:
    closes = synthetic.load(engine)
    fleet = synthetic.fleet(size, "month_end", start=closes[-1 - SESSIONS_BEFORE].date())
    register(engine, fleet)
    warm_up(engine, executor, synthetic.through(closes[-2]))
    started = time.perf_counter()
    report = run_fleet(engine, fleet, executor, synthetic.through(closes[-2]))
    seconds = time.perf_counter() - started
    assert report.counts()["landed"] == size, report.failures()[:3]
    settle(engine)
    return seconds


if __name__ == "__main__":
    main()
