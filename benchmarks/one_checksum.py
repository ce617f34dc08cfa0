"""The demo fleet by every road: executors, batch sizes, and 30 random --as-of steps. Prints how many distinct checksums there are.

python benchmarks/one_checksum.py [--quick]
"""

import random
import sys
import time
from datetime import timedelta
from typing import Any

from common import emit, options, register, server, starting, stored_checksum

from msm_ray import demo
from msm_ray.executors import make_executor
from msm_ray.run import Options, run_fleet

STEPS = 30
SEED = 20261122


def main() -> None:
    quick = options(__doc__).quick
    portfolios = 40 if quick else 200
    roads: list[tuple[str, str, int | None, int]] = [
        ("local", "local", None, 1),
        ("ray", "ray", None, 1),
        ("batch 1", "local", 1, 1),
        ("batch 7", "ray", 7, 1),
        ("batch 64", "local", 64, 1),
        (f"{STEPS} as-of steps", "local", None, STEPS),
    ]
    found: dict[str, str] = {}
    seconds: dict[str, float] = {}
    with server() as fresh:
        for name, executor_name, batch_size, steps in roads:
            engine = fresh()
            configurations = demo.fleet(engine, portfolios)
            if quick:
                configurations = starting(configurations, demo.FIRST.replace(year=2015))
                register(engine, configurations)
            started = time.perf_counter()
            executor = make_executor(executor_name)
            try:
                for as_of in _as_of_steps(steps):
                    report = run_fleet(engine, configurations, executor, as_of, Options(batch_size=batch_size))
                    assert report.status == "landed", report.failures()[:3]
            finally:
                executor.close()
            seconds[name] = round(time.perf_counter() - started, 1)
            found[name] = stored_checksum(engine)
            print(f"{name:18} {found[name][:16]}  {seconds[name]} s", file=sys.stderr)
            engine.dispose()
    emit({"portfolios": portfolios, "distinct": len(set(found.values())), "checksum": found["local"], "seconds": seconds})


def _as_of_steps(count: int) -> list[Any]:
    """`count` increasing instants, the last one the demo's as-of; seeded, so a failure can be repeated."""
    days = (demo.AS_OF.date() - demo.FIRST).days
    chosen = sorted(random.Random(SEED).sample(range(1, days), count - 1), reverse=True)
    return [demo.AS_OF - timedelta(days=d) for d in chosen] + [demo.AS_OF]


if __name__ == "__main__":
    main()
