"""What benchmarks share: a throw-away embedded Postgres, the demo's market, and a count of SQL statements."""

import argparse
import json
import os
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import date, datetime
from itertools import count
from pathlib import Path
from typing import Any

import psutil
import psycopg
import synthetic
from sqlalchemy import Engine

from msm_core.configuration import PortfolioConfiguration
from msm_core.data_nodes.registration import register_portfolios
from msm_core.database import get_engine, transaction
from msm_core.embedded import EmbeddedPostgres
from msm_core.verification import checksum
from msm_ray import demo, prepare
from msm_ray.executors import RayExecutor
from msm_ray.run import run_fleet

WARM_SEED = 3


def options(description: str | None, **switches: str) -> argparse.Namespace:
    """--quick, and `switches` by name with what each means."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="under 60 seconds, smaller")
    for name, meaning in switches.items():
        parser.add_argument(f"--{name}", action="store_true", help=meaning)
    return parser.parse_args()


def emit(result: dict[str, Any]) -> None:
    """One JSON object, as the last line."""
    print(json.dumps(result))


@contextmanager
def server() -> Iterator[Callable[..., Engine]]:
    """A server of its own, under a temporary MSM_HOME; calling the value makes a fresh database, with the demo's
    calendar and bars or empty."""
    with tempfile.TemporaryDirectory(prefix="msm-benchmark-") as home:
        os.chmod(home, 0o755)  # the server of a root user runs as another account, which must be able to enter
        os.environ["MSM_HOME"] = home
        embedded = EmbeddedPostgres(home=Path(home))
        server_url, address, made = embedded.start(), Path(home, "benchmark_url"), 0
        os.environ["MSM_DATABASE_URL_FILE"] = str(address)  # a file, for Ray workers that outlive a database
        os.environ.pop("MSM_DATABASE_URL", None)
        address.touch(0o600)

        def fresh(with_demo: bool = True) -> Engine:
            nonlocal made
            made += 1
            address.write_text(server_url)
            with get_engine().connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
                connection.exec_driver_sql(f"CREATE DATABASE benchmark_{made}")
            address.write_text(server_url.rsplit("/", 1)[0] + f"/benchmark_{made}")
            engine = get_engine()
            prepare.prepare(engine)
            if with_demo:
                demo.load(engine, lambda text: None)
            return engine

        try:
            yield fresh
        finally:
            embedded.destroy()


def point_at(engine: Engine) -> None:
    """Workers, and this process, find this database from here on."""
    url = engine.url.set(drivername="postgresql").render_as_string(hide_password=False)
    Path(os.environ["MSM_DATABASE_URL_FILE"]).write_text(url)


def settle(engine: Engine) -> None:
    """Do at once what the server owes to the rows so far, so that nothing that is measured later pays for them."""
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.exec_driver_sql("VACUUM ANALYZE")
        connection.exec_driver_sql("CHECKPOINT")


def warm_up(engine: Engine, executor: RayExecutor, as_of: datetime) -> None:
    """Workers have run something. Its names come before all others: what is measured is appended at the end of the tables."""
    fleet = synthetic.fleet(2 * executor.slots, "month_end", prefix="a", seed=WARM_SEED)
    register(engine, fleet)
    run_fleet(engine, fleet, executor, as_of)


def register(engine: Engine, configurations: list[PortfolioConfiguration]) -> None:
    with engine.begin() as connection:
        register_portfolios(connection, configurations)


def stored_checksum(engine: Engine) -> str:
    with transaction(engine, read_only=True) as connection:
        return checksum(connection)


def starting(configurations: list[PortfolioConfiguration], start: date) -> list[PortfolioConfiguration]:
    """The same portfolios, beginning at `start`."""
    builds = [c.portfolio_build_configuration.model_copy(update={"start_date": start}) for c in configurations]
    return [c.model_copy(update={"portfolio_build_configuration": b}) for c, b in zip(configurations, builds, strict=True)]


@contextmanager
def peak_worker_mib() -> Iterator[Callable[[], float]]:
    """The most memory (MiB, resident) that any Ray worker had since the context began, seen four times a second."""
    most, over, workers = [0], threading.Event(), list[psutil.Process]()

    def watch() -> None:
        for look in count():
            if over.wait(0.25):
                return
            if look % 8 == 0:  # a look at all processes takes too much of what is measured here
                workers[:] = [p for p in psutil.process_iter(["name"]) if (p.info["name"] or "").startswith("ray::")]
            for worker in workers:
                with suppress(psutil.Error):  # it has gone
                    most[0] = max(most[0], worker.memory_info().rss)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield lambda: most[0] / 2**20
    finally:
        over.set()
        thread.join()


@contextmanager
def counted_statements() -> Iterator[list[str]]:
    """Every statement and COPY that psycopg sends in this process, BEGIN and COMMIT apart."""
    sent: list[str] = []
    execute, copy = psycopg.Cursor.execute, psycopg.Cursor.copy

    def counted_execute(self: Any, query: Any, *arguments: Any, **keywords: Any) -> Any:
        sent.append(str(query))
        return execute(self, query, *arguments, **keywords)

    def counted_copy(self: Any, statement: Any, *arguments: Any, **keywords: Any) -> Any:
        sent.append(str(statement))
        return copy(self, statement, *arguments, **keywords)

    psycopg.Cursor.execute, psycopg.Cursor.copy = counted_execute, counted_copy  # type: ignore[method-assign]
    try:
        yield sent
    finally:
        psycopg.Cursor.execute, psycopg.Cursor.copy = execute, copy  # type: ignore[method-assign]
