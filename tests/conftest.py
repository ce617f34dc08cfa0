"""A real Postgres for every test: `MSM_TEST_DATABASE_URL`, or an embedded server of the session's own.

The schema is migrated once into a template; each test that asks for `engine` gets a fresh database copied from it.
"""

import os
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import Engine, create_engine, make_url

from msm_core import database
from msm_core.embedded import EmbeddedPostgres
from msm_ray import prepare

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


def _database(server_url: str, source: str, monkeypatch: pytest.MonkeyPatch, home: Path) -> Iterator[Engine]:
    name = f"msm_{uuid.uuid4().hex[:12]}"
    _run_sql(server_url, f'CREATE DATABASE "{name}" TEMPLATE "{source}"')
    url = make_url(server_url).set(drivername="postgresql", database=name).render_as_string(hide_password=False)
    monkeypatch.setenv("MSM_DATABASE_URL", url)
    monkeypatch.setenv("MSM_HOME", str(home))
    engine = database.get_engine()
    yield engine
    engine.dispose()
    _run_sql(server_url, f'DROP DATABASE "{name}" WITH (FORCE)')


@pytest.fixture
def engine(server_url: str, template: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Engine]:
    """A fresh, prepared database; `MSM_DATABASE_URL` points at it for the length of the test."""
    yield from _database(server_url, template, monkeypatch, tmp_path)


@pytest.fixture
def empty_engine(server_url: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Engine]:
    """A fresh database without any table."""
    yield from _database(server_url, "template0", monkeypatch, tmp_path)
