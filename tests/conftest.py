"""A real Postgres for every test: `MSM_TEST_DATABASE_URL`, or an embedded server of the session's own.

The schema is migrated once into a template. Each test that asks for `engine` gets an empty, prepared database: the one of the test before
with its rows taken out, or, where a test has changed the schema or holds locks, a new copy of the template (a copy costs 0.3 s).
"""

import os
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import Engine, NullPool, create_engine, make_url
from sqlalchemy.exc import DBAPIError

from msm_core import database
from msm_core.embedded import EmbeddedPostgres
from msm_core.models import MetaTable, TimeIndexMetaTable
from msm_ray import prepare

CATALOGUE = TimeIndexMetaTable.__tablename__
TEMPLATE = f"msm_template_{uuid.uuid4().hex[:8]}"


@pytest.fixture(scope="session")
def server_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of a server on which databases may be created."""
    if given := os.environ.get("MSM_TEST_DATABASE_URL"):
        yield given
        return
    server = EmbeddedPostgres(home=tmp_path_factory.mktemp("msm-home"))
    yield server.start(fsync=False)
    server.destroy()


def _run_sql(server_url: str, sql: str) -> None:
    engine = create_engine(make_url(server_url).set(drivername="postgresql+psycopg"), isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.exec_driver_sql(sql)
    engine.dispose()


@pytest.fixture(scope="session")
def template(server_url: str) -> Iterator[str]:
    _run_sql(server_url, f'CREATE DATABASE "{TEMPLATE}"')
    engine = create_engine(make_url(server_url).set(drivername="postgresql+psycopg", database=TEMPLATE))
    prepare.prepare(engine)
    engine.dispose()
    yield TEMPLATE
    _run_sql(server_url, f'DROP DATABASE "{TEMPLATE}" WITH (FORCE)')


class Databases:
    """Databases of the session, by what they were copied from; a clean one is lent again."""

    def __init__(self, server_url: str) -> None:
        self.server_url = server_url
        self.idle: tuple[str, str] | None = None  # name and schema fingerprint of a prepared database without rows
        self.catalogue: str | None = None  # the rows that `prepare` left, as JSON

    def lend(self, source: str, monkeypatch: pytest.MonkeyPatch, home: Path) -> Iterator[Engine]:
        name, self.idle = (self.idle[0] if self.idle and source == TEMPLATE else self.create(source)), None
        url = make_url(self.server_url).set(drivername="postgresql", database=name).render_as_string(hide_password=False)
        monkeypatch.setenv("MSM_DATABASE_URL", url)
        monkeypatch.setenv("MSM_HOME", str(home))
        engine = database.get_engine()
        schema = self.fingerprint(engine)
        if source == TEMPLATE and self.catalogue is None:
            with engine.connect() as connection:
                self.catalogue = connection.exec_driver_sql(f'SELECT jsonb_agg(t)::text FROM "{CATALOGUE}" t').scalar_one()
        yield engine
        engine.dispose()
        database._engine.cache_clear()  # the next test is attached to nothing
        if source == TEMPLATE and self.cleaned(name, schema):
            self.idle = name, schema
        else:
            _run_sql(self.server_url, f'DROP DATABASE "{name}" WITH (FORCE)')

    def create(self, source: str) -> str:
        name = f"msm_{uuid.uuid4().hex[:12]}"
        _run_sql(self.server_url, f'CREATE DATABASE "{name}" TEMPLATE "{source}"')
        return name

    def cleaned(self, name: str, schema: str) -> bool:
        """Take all rows out and put the catalogue back; False where that cannot be done, or the schema is not what it was."""
        engine = create_engine(make_url(self.server_url).set(drivername="postgresql+psycopg", database=name), poolclass=NullPool)
        try:
            if self.fingerprint(engine) != schema:
                return False
            with engine.begin() as connection:
                connection.exec_driver_sql("SET LOCAL lock_timeout = '1s'")
                tables = [f'"{table}"' for table in MetaTable.metadata.tables]
                query = " UNION ALL ".join(f"SELECT '{t}' WHERE EXISTS (SELECT FROM {t})" for t in tables)
                filled = connection.exec_driver_sql(query).scalars().all()
                connection.exec_driver_sql(f"TRUNCATE {', '.join(filled)} CASCADE")
                rows = f'SELECT * FROM jsonb_populate_recordset(NULL::"{CATALOGUE}", %s::jsonb)'
                connection.exec_driver_sql(f'INSERT INTO "{CATALOGUE}" {rows}', (self.catalogue,))
        except DBAPIError:
            return False
        return True

    def fingerprint(self, engine: Engine) -> str:
        """Tables, columns, constraints, triggers and rights of everything that is not the server's own."""
        with engine.connect() as connection:
            return str(connection.exec_driver_sql(FINGERPRINT).scalar_one())

    def close(self) -> None:
        if self.idle:
            _run_sql(self.server_url, f'DROP DATABASE "{self.idle[0]}" WITH (FORCE)')


FINGERPRINT = """
    SELECT md5(string_agg(fact, ',' ORDER BY fact)) FROM (
        SELECT n.nspname || coalesce(n.nspacl::text, '') AS fact FROM pg_namespace n WHERE n.nspname !~ '^(pg_|information_schema)'
        UNION ALL
        SELECT concat(c.oid, c.relname, c.relacl, (SELECT string_agg(concat(a.attname, a.atttypid, a.attnotnull, a.attisdropped), '')
                                                   FROM pg_attribute a WHERE a.attrelid = c.oid AND a.attnum > 0))
        FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace WHERE n.nspname !~ '^(pg_|information_schema)'
        UNION ALL
        SELECT concat(conname, conrelid, pg_get_constraintdef(oid)) FROM pg_constraint WHERE conrelid <> 0
        UNION ALL
        SELECT concat(tgname, tgrelid) FROM pg_trigger WHERE NOT tgisinternal
        UNION ALL
        SELECT concat(proname, pronamespace) FROM pg_proc p JOIN pg_namespace n ON n.oid = p.pronamespace WHERE n.nspname = 'public') f
"""


@pytest.fixture(scope="session")
def databases(server_url: str) -> Iterator[Databases]:
    lent = Databases(server_url)
    yield lent
    lent.close()


@pytest.fixture
def engine(databases: Databases, template: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Engine]:
    """An empty, prepared database; `MSM_DATABASE_URL` points at it for the length of the test."""
    yield from databases.lend(template, monkeypatch, tmp_path)


@pytest.fixture
def empty_engine(databases: Databases, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Engine]:
    """A fresh database without any table."""
    yield from databases.lend("template0", monkeypatch, tmp_path)
