"""Prepares that come all at once, and prepares that are killed: 20 rounds of 8 processes, then 50 deaths.

python benchmarks/prepare_storm.py [--quick]

Rounds begin, in turn, with a database at revision 0001 that has a source of minute bars under 40 policies, and with an empty one. Deaths
begin with the first. Their moment is drawn from the whole life of a prepare, the start of its interpreter included; tables are made two at
a time, so that there is a middle. Then the next prepare must complete, and its check be clean. The draws are fixed, the machine is not.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import cycle

from alembic import command
from common import emit, options, server
from sqlalchemy import Engine, inspect

from msm_core.data_nodes.interpolated_prices import InterpolatedPrices
from msm_core.database import database_url, get_engine
from msm_core.identity import storage_uid
from msm_core.models import ExternalPricesStorage
from msm_ray import prepare

PROCESSES, POLICIES, WAIT_SECONDS = 8, 40, 180
MINUTES = "vendor-minutes"
PREPARE = """
import json, sys
from msm_core.data_nodes.interpolated_prices import InterpolatedPrices
from msm_core.database import database_url, get_engine
from msm_ray import prepare
prepare.TABLES_MAX = int(sys.argv[2])
wanted = [InterpolatedPrices.model_validate(policy) for policy in json.loads(sys.argv[1])]
print(json.dumps(prepare.prepare(get_engine(), wanted).pending))
"""


@dataclass(frozen=True)
class Start:
    """A database to begin with, and the policies that are prepared in it."""

    template: str
    wanted: Sequence[InterpolatedPrices]


def main() -> None:
    quick = options(__doc__).quick
    rounds, kills = (3, 5) if quick else (20, 50)
    began = time.perf_counter()
    with server():
        databases = Databases(database_url().set(drivername="postgresql").render_as_string(hide_password=False))
        starts = databases.starts()
        errors, ratios = storm(databases, starts, rounds)
        deaths = Deaths(databases, starts[0], random.Random(1))
        deaths.die(kills)
    result = {"rounds": rounds, "processes": PROCESSES, "errors": errors, "tables_per_policy": max(ratios, key=lambda r: abs(r - 1))}
    result |= {"kills": kills, "killed_halfway": deaths.halfway, "completed": deaths.completed, "clean": deaths.clean}
    emit(result | {"seconds": round(time.perf_counter() - began, 1)})


def storm(databases: "Databases", starts: Sequence[Start], rounds: int) -> tuple[int, list[float]]:
    """Errors of all processes, and tables per policy of each round."""
    errors, ratios = 0, []
    for i, start in zip(range(rounds), cycle(starts), strict=False):
        with databases.fresh(start) as engine, processes(start, PROCESSES, tables_max=10) as running:
            made = []
            for process in running:
                printed, told = process.communicate(timeout=WAIT_SECONDS)
                if process.returncode:
                    errors += 1
                    print(told, file=sys.stderr)
                else:
                    made += json.loads(printed)
            errors += len(made) - len(set(made))  # the same work done twice
            errors += not prepare.check(engine, start.wanted).is_clean
            ratios.append(len(tables(engine)) / len(start.wanted))
        print(f"round {i + 1} of {rounds}, {start.template}: {errors} errors, {ratios[-1]:g} tables per policy", file=sys.stderr)
    return errors, ratios


class Deaths:
    """Prepares that were killed, and what the next one made of it."""

    def __init__(self, databases: "Databases", start: Start, chance: random.Random) -> None:
        self.databases, self.start, self.chance = databases, start, chance
        self.died = self.halfway = self.completed = self.clean = 0

    def die(self, kills: int) -> None:
        whole = self.life_seconds()
        while self.died < kills:
            delay = self.chance.uniform(0, whole)
            with self.databases.fresh(self.start) as engine, processes(self.start, 1, tables_max=2) as (process,):
                time.sleep(delay)
                process.kill()
                if process.wait() != -signal.SIGKILL:
                    continue  # it had just ended: that is no death
                made = len(tables(engine))
                self.died += 1
                self.halfway += 0 < made < POLICIES
                self.go_on(engine)
            counts = f"{made} of {POLICIES} tables; {self.completed} completed, {self.clean} clean"
            print(f"kill {self.died} of {kills} after {delay:.2f} of {whole:.2f} s: {counts}", file=sys.stderr)

    def life_seconds(self) -> float:
        """How long a prepare takes that nobody disturbs."""
        with self.databases.fresh(self.start):
            began = time.perf_counter()
            with processes(self.start, 1, tables_max=2) as (process,):
                _, told = process.communicate(timeout=WAIT_SECONDS)
            assert process.returncode == 0, told
            return time.perf_counter() - began

    def go_on(self, engine: Engine) -> None:
        """At once: the server may still be busy with what the dead one has asked for."""
        try:
            prepare.prepare(engine, self.start.wanted)
            self.completed += 1
        except Exception as error:
            print(f"after a death: {type(error).__name__}: {error}", file=sys.stderr)
        self.clean += prepare.check(engine, self.start.wanted).is_clean and len(tables(engine)) == POLICIES


@contextmanager
def processes(start: Start, count: int, tables_max: int) -> Iterator[list["subprocess.Popen[str]"]]:
    """`count` prepares of the database that the environment names; none outlives the block."""
    text = json.dumps([p.model_dump(mode="json") for p in start.wanted])
    line, pipe = [sys.executable, "-c", PREPARE, text, str(tables_max)], subprocess.PIPE
    running = [subprocess.Popen(line, stdout=pipe, stderr=pipe, text=True) for _ in range(count)]
    try:
        yield running
    finally:
        for process in running:
            process.kill()
            process.communicate()


def tables(engine: Engine) -> list[str]:
    """Tables of policies."""
    return [name for name in inspect(engine).get_table_names() if name.startswith("msm__interpolated_prices_")]


class Databases:
    """Throw-away databases of one server."""

    def __init__(self, url: str) -> None:
        self.url, self.admin, self.made = url, get_engine(), 0

    def execute(self, statement: str) -> None:
        with self.admin.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            connection.exec_driver_sql(statement)

    def starts(self) -> list[Start]:
        """A database with a revision to come and a source of policies, and an empty one."""
        self.execute("CREATE DATABASE empty")
        self.execute("CREATE DATABASE source")
        with self.connected("source") as engine, engine.begin() as connection:
            command.upgrade(prepare.alembic_config(connection), "0001")
            connection.exec_driver_sql("CREATE TABLE vendor_bars (asset_identifier text, time_index timestamptz, close float8)")
            connection.exec_driver_sql(
                "INSERT INTO msm__time_index_meta_table (uid, identifier, physical_table_name, kind, cadence, schema_fingerprint) "
                "VALUES (%s, %s, 'vendor_bars', 'prices', '1m', '')",
                (storage_uid(MINUTES), MINUTES),
            )
        daily = [_policy(str(ExternalPricesStorage.storage_uid()), "1d", rule) for rule in ("ffill", "none")]
        minutes = [_policy(str(storage_uid(MINUTES)), f"{i + 1}m", "ffill") for i in range(POLICIES)]
        return [Start("source", minutes), Start("empty", daily)]

    @contextmanager
    def connected(self, name: str) -> Iterator[Engine]:
        """The engine of a database, which `MSM_DATABASE_URL` names for the length of the block."""
        os.environ["MSM_DATABASE_URL"] = f"{self.url.rsplit('/', 1)[0]}/{name}"
        engine = get_engine()
        try:
            yield engine
        finally:
            engine.dispose()
            os.environ["MSM_DATABASE_URL"] = self.url

    @contextmanager
    def fresh(self, start: Start) -> Iterator[Engine]:
        self.made += 1
        name = f"storm_{self.made}"
        self.execute(f"CREATE DATABASE {name} TEMPLATE {start.template}")
        with self.connected(name) as engine:
            yield engine
        self.execute(f"DROP DATABASE {name} WITH (FORCE)")


def _policy(source: str, frequency: str, rule: str) -> InterpolatedPrices:
    config = {"source_time_index_meta_table_uid": source, "upsample_frequency_id": frequency, "intraday_bar_interpolation_rule": rule}
    return InterpolatedPrices.model_validate({"interpolation_config": config})


if __name__ == "__main__":
    main()
