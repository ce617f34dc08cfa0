"""SQL statements of one batch that brings 10, then 1 000 portfolios one session further.

python benchmarks/statements.py [--quick]
"""

import sys
from datetime import UTC, date, datetime
from typing import Any

from common import counted_statements, emit, options, register, server, starting

from msm_core.data_nodes import base
from msm_ray import demo, executors
from msm_ray.executors import LocalExecutor
from msm_ray.run import Options, run_fleet

BEFORE, AFTER = datetime(2022, 12, 20, tzinfo=UTC), datetime(2022, 12, 21, tzinfo=UTC)


def main() -> None:
    sizes = (10, 200) if options(__doc__).quick else (10, 1000)
    per_batch, per_run, rows = {}, {}, {}
    with server() as fresh:
        for size in sizes:
            engine = fresh()
            configurations = starting(demo.fleet(engine, size), date(2022, 6, 1))
            register(engine, configurations)
            run_fleet(engine, configurations, LocalExecutor(), BEFORE, Options(batch_size=size))
            batches: list[int] = []
            with counted_statements() as sent, _counting_batches(sent, batches):
                report = run_fleet(engine, configurations, LocalExecutor(), AFTER, Options(batch_size=size))
            assert report.counts()["landed"] == size
            per_batch[size], per_run[size], rows[size] = batches, len(sent), report.rows_written
            print(f"{size} portfolios: {batches} statements in batches, {len(sent)} in the run, {rows[size]} rows", file=sys.stderr)
            engine.dispose()
    emit({"portfolios": list(sizes), "per_batch": list(per_batch.values()), "per_run": list(per_run.values()), "rows": list(rows.values())})


class _counting_batches:
    """Notes how many statements each batch sends."""

    def __init__(self, sent: list[str], batches: list[int]) -> None:
        self.sent, self.batches = sent, batches

    def __enter__(self) -> None:
        self.original = executors.update_batch

        def counted(engine: Any, batch: Any) -> Any:
            before = len(self.sent)
            results = base.update_batch(engine, batch)
            self.batches.append(len(self.sent) - before)
            return results

        executors.update_batch = counted

    def __exit__(self, *_: object) -> None:
        executors.update_batch = self.original


if __name__ == "__main__":
    main()
