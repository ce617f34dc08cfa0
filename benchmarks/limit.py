"""How fast this machine's Postgres takes the rows of a run when nothing is computed: the limit that a job is measured against.

python benchmarks/limit.py [--quick]

The very rows that a fleet's run stored, encoded beforehand, are copied into equal empty tables, partitions included, by as many
processes as the run had workers, a transaction per piece as long as the run's own; and the prices that the run needed are read once.
"""

import multiprocessing
import multiprocessing.synchronize
import sys
import time
import traceback
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any, NamedTuple

import synthetic
from common import emit, options, register, server
from psycopg import sql
from sqlalchemy import Connection, Engine

from msm_core.configuration import PortfolioConfiguration
from msm_core.copying import driver_connection
from msm_core.database import get_engine, transaction
from msm_core.models import PortfoliosStorage, PortfolioWeightsStorage, SignalWeightsStorage
from msm_core.sources import find_sources, read_prices
from msm_core.storage import partitions_of
from msm_ray.executors import LocalExecutor
from msm_ray.run import run_fleet

STORAGES = (SignalWeightsStorage, PortfolioWeightsStorage, PortfoliosStorage)
PIECE_ROWS = 1_500_000  # of a process, held in memory as bytes
BARRIER: multiprocessing.synchronize.Barrier  # of the processes that copy together; each has it from its beginning


class Limit(NamedTuple):
    rows: int
    copy_seconds: float
    read_seconds: float

    @property
    def seconds(self) -> float:
        return self.copy_seconds + self.read_seconds


def measured(engine: Engine, fleet: Sequence[PortfolioConfiguration], processes: int) -> Limit:
    """The limit of what is stored of `fleet`. The tables of it are made for it, and dropped."""
    names = [c.identifier for c in fleet]
    with engine.begin() as connection:
        for storage in STORAGES:
            _make_equal(connection, storage)
        weights = connection.exec_driver_sql(
            f"SELECT count(*) FROM {PortfolioWeightsStorage.__tablename__} WHERE portfolio_identifier = ANY(%s)", (names,)
        ).scalar_one()
        lanes = partitions_of(connection, PortfolioWeightsStorage, names)
    pieces = max(round(weights / PIECE_ROWS / processes), 1)  # of each process
    lanes = lanes or {name: i * pieces * processes // len(names) for i, name in enumerate(names)}  # as batches are: neighbours together
    own = [[c for c in fleet if lanes[c.identifier] % processes == process] for process in range(processes)]
    shares = [[part[len(part) * i // pieces : len(part) * (i + 1) // pieces] for i in range(pieces)] for part in own]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, context, _share_barrier, (context.Barrier(processes),)) as pool:
        found = list(pool.map(_copy, [[([c.signal_uid for c in p], [c.identifier for c in p]) for p in parts] for parts in shares]))
    with engine.begin() as connection:
        for storage in STORAGES:
            connection.exec_driver_sql(f"DROP TABLE limit_{storage.__tablename__}")
    return Limit(sum(rows for rows, _ in found), max(seconds for _, seconds in found), _read_seconds(engine, fleet))


def _make_equal(connection: Connection, storage: Any) -> None:
    """An empty table like that of a storage, spread over as many partitions."""
    table, new = storage.__tablename__, f"limit_{storage.__tablename__}"
    modulus = connection.exec_driver_sql(f"SELECT count(*) FROM pg_inherits WHERE inhparent = '{table}'::regclass").scalar_one()
    connection.exec_driver_sql(f"DROP TABLE IF EXISTS {new}")
    spread = f"PARTITION BY HASH ({storage.__scope__})" if modulus else ""
    connection.exec_driver_sql(f"CREATE TABLE {new} (LIKE {table} INCLUDING ALL) {spread}")
    for remainder in range(modulus):
        bound = f"WITH (MODULUS {modulus}, REMAINDER {remainder})"
        connection.exec_driver_sql(f"CREATE TABLE {new}_{remainder} PARTITION OF {new} FOR VALUES {bound}")


def _share_barrier(barrier: multiprocessing.synchronize.Barrier) -> None:
    global BARRIER
    BARRIER = barrier


def _copy(scopes: Sequence[tuple[list[str], list[str]]]) -> tuple[int, float]:
    """Of each piece: fetch its rows as COPY's own bytes, wait for the others, send them; only the sending counts. Rows and seconds."""
    try:
        return _copied(scopes)
    except BaseException:
        traceback.print_exc()  # it may be another one's error that the pool tells
        BARRIER.abort()  # whoever waits for this one need not
        raise


def _copied(scopes: Sequence[tuple[list[str], list[str]]]) -> tuple[int, float]:
    engine, rows, seconds = get_engine(), 0, 0.0
    for signals, portfolios in scopes:
        given = {storage: _encoded(engine, storage, signals if storage is SignalWeightsStorage else portfolios) for storage in STORAGES}
        BARRIER.wait()
        started = time.perf_counter()
        with transaction(engine) as connection:
            for storage, encoded in given.items():
                statement = sql.SQL("COPY {} FROM STDIN (FORMAT BINARY)").format(sql.Identifier(f"limit_{storage.__tablename__}"))
                with driver_connection(connection).cursor() as cursor:
                    with cursor.copy(statement) as copy:
                        for chunk in encoded:
                            copy.write(chunk)
                    rows += cursor.rowcount
        BARRIER.wait()
        seconds += time.perf_counter() - started
    return rows, seconds


def _encoded(engine: Engine, storage: Any, scopes: list[str]) -> list[bytes]:
    statement = sql.SQL("COPY (SELECT * FROM {0} WHERE {1} = ANY({2}) ORDER BY {3}) TO STDOUT (FORMAT BINARY)").format(
        sql.Identifier(storage.__tablename__),
        sql.Identifier(storage.__scope__),
        sql.Literal(scopes),
        sql.SQL(", ").join(map(sql.Identifier, storage.key_columns())),
    )
    with transaction(engine, read_only=True) as connection, driver_connection(connection).cursor().copy(statement) as copy:
        return _chunked(copy)


def _chunked(rows: Any, size: int = 1 << 20) -> list[bytes]:
    chunks, waiting, length = [], [], 0
    for row in rows:
        waiting.append(bytes(row))
        length += len(row)
        if length >= size:
            chunks.append(b"".join(waiting))
            waiting, length = [], 0
    return [*chunks, b"".join(waiting)]


def _read_seconds(engine: Engine, fleet: Sequence[PortfolioConfiguration]) -> float:
    assets = sorted({a for c in fleet for a in c.signal.universe})
    with transaction(engine, read_only=True) as connection:
        (source,) = find_sources(connection, ["ExternalPricesTS"])
        started = time.perf_counter()
        read_prices(connection, source, "close", assets, None, synthetic.FOREVER)
        return time.perf_counter() - started


def main() -> None:
    portfolios = 16 if options(__doc__).quick else 64
    with server() as fresh:
        engine = fresh(with_demo=False)
        closes = synthetic.load(engine)
        found = {}
        for style in synthetic.STYLES:
            fleet = synthetic.fleet(portfolios, style, prefix=style)
            register(engine, fleet)
            run_fleet(engine, fleet, LocalExecutor(), synthetic.through(closes[-2]))
            found[style] = measured(engine, fleet, processes=2)
            print(f"{style}: {found[style]}", file=sys.stderr)
    emit(
        {
            "rows": {style: limit.rows for style, limit in found.items()},
            "seconds": {style: round(limit.seconds, 3) for style, limit in found.items()},
            "rows_per_second": {style: round(limit.rows / limit.copy_seconds) for style, limit in found.items()},
        }
    )


if __name__ == "__main__":
    main()
