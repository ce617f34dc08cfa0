"""Where the database is, what never shows, and what a transaction promises."""

import os
import pickle
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

import psycopg
import pytest
from sqlalchemy import Engine, text
from sqlalchemy.exc import DBAPIError

from msm_core import database
from msm_core.errors import (
    ConfigurationError,
    DatabaseNotConfigured,
    DatabaseUnavailable,
    MissingPrices,
    MsmError,
    ProgressConflict,
    UnsupportedDatabase,
)
from tests import factories

PASSWORD = "p@ss w%rd:Can4ry"  # every character that an address gives a meaning to
PARTS = ("p@ss", "ss w%rd", "w%rd", "Can4ry", quote("p@ss w%rd", safe=""), "p%40ss")
VARIABLES = ("MSM_DATABASE_URL", "MSM_DATABASE_URL_FILE", "MSM_HOME", "PGSERVICE", "PGHOST", "PGSERVICEFILE")


@pytest.fixture(autouse=True)
def nowhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No address in the environment, an empty working directory."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)


# -- resolution -----------------------------------------------------------------------------------------------------------------


def test_the_order_of_addresses(monkeypatch, tmp_path):
    home, mounted = tmp_path / "home", tmp_path / "mounted"
    home.mkdir()
    (home / "database_url").write_text("postgresql://embedded@h/db\n")
    mounted.write_text("postgresql://mounted@h/db\n")

    def chosen() -> str | None:
        return database.database_url().username

    monkeypatch.setenv("PGSERVICE", "nightly")
    assert chosen() is None  # libpq's own settings
    monkeypatch.setenv("MSM_HOME", str(home))
    assert chosen() == "embedded"
    monkeypatch.setenv("MSM_DATABASE_URL_FILE", str(mounted))
    assert chosen() == "mounted"
    monkeypatch.setenv("MSM_DATABASE_URL", "postgresql://direct@h/db")
    assert chosen() == "direct"
    monkeypatch.setenv("MSM_DATABASE_URL", "")
    assert chosen() == "mounted"


def test_home_is_dot_msm_of_the_working_directory(tmp_path):
    (tmp_path / ".msm").mkdir()
    (tmp_path / ".msm" / "database_url").write_text("postgresql://here@h/db")
    assert database.database_url().username == "here"


def test_the_address_is_read_afresh(monkeypatch, tmp_path):
    file = tmp_path / "url"
    monkeypatch.setenv("MSM_DATABASE_URL_FILE", str(file))
    for name in ("one", "two"):  # a rotated secret
        file.write_text(f"postgresql://{name}@h/db")
        assert database.database_url().username == name


def test_a_named_file_that_is_absent_is_not_passed_over(monkeypatch, tmp_path):
    """Else a job whose secret is not mounted would quietly work on another database."""
    (tmp_path / ".msm").mkdir()
    (tmp_path / ".msm" / "database_url").write_text("postgresql://embedded@h/db")
    monkeypatch.setenv("MSM_DATABASE_URL_FILE", str(tmp_path / "absent"))
    with pytest.raises(MsmError, match="absent"):
        database.database_url()


def test_nothing_configured_names_what_to_set(tmp_path):
    with pytest.raises(DatabaseNotConfigured) as caught:
        database.database_url()
    message = str(caught.value)
    for fact in ("MSM_DATABASE_URL", "MSM_DATABASE_URL_FILE", "msm-ray db start", str(tmp_path / ".msm" / "database_url")):
        assert fact in message


@pytest.mark.parametrize("scheme", ["postgres", "postgresql", "postgresql+psycopg", "postgresql+psycopg2", "postgresql+asyncpg"])
def test_every_spelling_of_postgres_uses_psycopg_3(monkeypatch, scheme):
    monkeypatch.setenv("MSM_DATABASE_URL", f"{scheme}://u:p@h:5/db")
    assert database.database_url().render_as_string() == "postgresql+psycopg://u:***@h:5/db"


def test_libpq_service_file(monkeypatch, tmp_path, server_url):
    """PGSERVICE alone is enough: libpq reads the file, nothing of it passes through us."""
    given = database.make_url(server_url)
    service = {"host": given.host, "port": given.port, "user": given.username, "password": given.password, "dbname": given.database}
    lines = [f"{key}={value}" for key, value in service.items() if value is not None]
    (tmp_path / "services").write_text("\n".join(["[nightly]", *lines, "application_name=from-the-service-file"]))
    monkeypatch.setenv("PGSERVICEFILE", str(tmp_path / "services"))
    monkeypatch.setenv("PGSERVICE", "nightly")
    engine = database.get_engine()
    with engine.connect() as connection:
        assert connection.exec_driver_sql("SELECT current_database()").scalar_one() == given.database
    engine.dispose()


# -- what never shows -----------------------------------------------------------------------------------------------------------


def leaks(text_: object) -> list[str]:
    return [part for part in PARTS if part in str(text_)]


@pytest.mark.parametrize("address", ["mysql://bob:Can4ry@h/db", "sqlite:///Can4ry.db", "oracle+oracledb://bob:Can4ry@h:1521/db"])
def test_another_database_is_refused_without_its_address(monkeypatch, address):
    monkeypatch.setenv("MSM_DATABASE_URL", address)
    with pytest.raises(ConfigurationError, match="only postgresql:// is supported") as caught:
        database.database_url()
    assert not leaks(caught.value)


BROKEN = {
    "no scheme": f"bob:{PASSWORD}@h/db",
    "a libpq string": f"host=h password='{PASSWORD}'",
    "unescaped @": "postgresql://bob:p@Can4ry@h/db",
    "unescaped @ and :": f"postgresql://bob:{PASSWORD}@h/db",
    "another database": f"mysql://bob:{PASSWORD}@h/db",
    "a port that is none": "postgresql://bob:x@h:Can4ry/db",
}


@pytest.mark.parametrize("address", BROKEN.values(), ids=BROKEN)
def test_a_broken_address_is_a_configuration_error_that_does_not_repeat_it(monkeypatch, address):
    """A special character that was not percent-encoded moves part of the password into host, port or database name."""
    monkeypatch.setenv("MSM_DATABASE_URL", address)
    with pytest.raises(ConfigurationError) as caught:
        database.database_url()
    assert not leaks(caught.value)
    assert not leaks(repr(caught.value.__cause__))


@pytest.fixture
def canary(monkeypatch: pytest.MonkeyPatch) -> str:
    address = f"postgresql://bob:{quote(PASSWORD, safe='')}@127.0.0.1:1/db"
    monkeypatch.setenv("MSM_DATABASE_URL", address)
    return address


TEXTS = {
    "raw": f"it is {PASSWORD}, they say",
    "quoted": f"it is {quote(PASSWORD, safe='')}, they say",
    "quoted, as urllib does by default": f"it is {quote(PASSWORD)}, they say",
    "address": f"cannot connect to postgresql://bob:{quote(PASSWORD, safe='')}@127.0.0.1:1/db now",
    "address, dialect and options": f"postgresql+psycopg://bob:{quote(PASSWORD, safe='')}@h/db?sslmode=require",
    "address with the raw password": f"cannot connect to postgresql://bob:{PASSWORD}@127.0.0.1:1/db now",
    "keyword": f"host=h password='{PASSWORD}' port=1",
    "keyword, bare": f"host=h password = {PASSWORD}",
    "repr of keywords": str({"host": "h", "password": PASSWORD}),
    "twice": f"{PASSWORD} and {PASSWORD}",
    "psycopg, half a password as host": f'failed to resolve host for "postgresql://bob:{PASSWORD}@h"',
}


@pytest.mark.parametrize("given", TEXTS.values(), ids=TEXTS)
def test_redaction(canary, given):
    cleaned = database.redact(given)
    assert not leaks(cleaned)
    assert "***" in cleaned


def test_redaction_keeps_the_rest(canary):
    assert database.redact(f"a {PASSWORD} b") == "a *** b"
    assert database.redact("relation msm__portfolio does not exist") == "relation msm__portfolio does not exist"
    assert database.redact(f"see postgresql://bob:{quote(PASSWORD, safe='')}@h:1/db, please") == "see postgresql://bob:***@h:1/db, please"


def test_redaction_knows_a_password_given_as_an_option(monkeypatch):
    monkeypatch.setenv("MSM_DATABASE_URL", f"postgresql://bob@127.0.0.1:1/db?password={quote(PASSWORD, safe='')}")
    assert not leaks(database.redact(f"it is {PASSWORD}"))


def test_redaction_without_any_address():
    assert database.redact("postgresql://bob:Can4ry@h/db") == "postgresql://bob:***@h/db"


def test_a_psycopg_error_text(canary, monkeypatch):
    """libpq and psycopg repeat what they were given: with unescaped characters, that is part of the password."""
    with pytest.raises(psycopg.Error) as caught:
        psycopg.connect(f"postgresql://bob:{PASSWORD}@127.0.0.1:1/db", connect_timeout=2)
    assert leaks(caught.value)  # this is what there is to hide
    assert not leaks(database.redact(str(caught.value)))


def test_an_engine_shows_no_password(canary):
    engine = database.get_engine()
    assert not leaks([engine, engine.url, database.where(engine.url)])
    with pytest.raises(DatabaseUnavailable, match=re.escape("127.0.0.1:1/db")) as caught:
        database.check_server(engine)
    error = pickle.loads(pickle.dumps(caught.value))
    assert not leaks([str(error), repr(error), error.facts, caught.value.__cause__])


def test_a_refused_password_is_not_repeated(server_url, monkeypatch):
    role = f"canary_{os.getpid()}"
    url = database.make_url(server_url)
    admin = url.set(drivername="postgresql").render_as_string(hide_password=False)
    with psycopg.connect(admin, autocommit=True) as connection:
        connection.execute(f"CREATE ROLE {role} LOGIN PASSWORD 'another'")  # type: ignore[arg-type]
        connection.execute(f"ALTER ROLE {role} CONNECTION LIMIT 0")  # type: ignore[arg-type]
        try:
            monkeypatch.setenv("MSM_DATABASE_URL", url.set(username=role, password=PASSWORD).render_as_string(hide_password=False))
            with pytest.raises(DatabaseUnavailable, match=role) as caught:
                database.check_server(database.get_engine())
            assert not leaks(caught.value)
        finally:
            connection.execute(f"DROP ROLE {role}")  # type: ignore[arg-type]


def test_values_stay_out_of_errors(engine):
    with pytest.raises(DBAPIError) as caught, engine.begin() as connection:
        connection.execute(text("SELECT 1 / 0 WHERE :value = :value"), {"value": "a client's secret"})
    assert "secret" not in str(caught.value)


# -- the server -----------------------------------------------------------------------------------------------------------------


def test_an_old_server_is_refused_by_name(engine, monkeypatch):
    ((found,),) = factories.sql(engine, "SELECT split_part(current_setting('server_version'), '.', 1)")
    database.check_server(engine)
    monkeypatch.setattr(database, "POSTGRES_VERSION_MIN", int(found))
    database.check_server(engine)
    monkeypatch.setattr(database, "POSTGRES_VERSION_MIN", int(found) + 1)
    with pytest.raises(UnsupportedDatabase) as caught:
        database.check_server(engine)
    assert str(caught.value) == f"the database is Postgres {found}; Postgres {int(found) + 1} or newer is needed."


def test_one_engine_per_address(engine, monkeypatch):
    assert database.get_engine() is engine
    assert engine.pool.size() == 1  # type: ignore[attr-defined]
    monkeypatch.setenv("MSM_DATABASE_URL", "postgresql://u@other/db")
    assert database.get_engine() is not engine


@contextmanager
def alone(engine: Engine) -> Iterator[Any]:
    """The only connection to the database: those that were closed before are gone from the server's list, too."""
    engine.dispose()
    address = engine.url.set(drivername="postgresql").render_as_string(hide_password=False)
    with psycopg.connect(address, autocommit=True) as connection:
        count = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()"
        while connection.execute(count).fetchone() != (1,):
            time.sleep(0.01)
        yield connection


def test_connections_left_are_counted_under_all_limits(engine):
    """As a role like any other."""
    role, name = f"few_{engine.url.database}", engine.url.database
    url = engine.url.set(username=role, password="few")
    plain = database._engine.__wrapped__(url.render_as_string(hide_password=False))
    address = url.set(drivername="postgresql").render_as_string(hide_password=False)

    def left(role_limit: int, database_limit: int) -> int | None:
        owner.execute(f"ALTER ROLE {role} CONNECTION LIMIT {role_limit}")
        owner.execute(f'ALTER DATABASE "{name}" CONNECTION LIMIT {database_limit}')
        return database.connections_left(plain)

    with alone(engine) as owner:
        owner.execute(f"CREATE ROLE {role} LOGIN PASSWORD 'few'")  # no member of the owner, so it does not see what that one does
        try:
            with psycopg.connect(address), psycopg.connect(address), psycopg.connect(address):
                assert left(10, -1) == 6  # 10 - 3 of the role - the one that asks
                assert left(-1, 10) == 5  # the owner's counts here
                assert left(10, 10) == 5
                assert left(8, 10) == 4
                assert left(2, 10) == 0
        finally:
            plain.dispose()
            owner.execute(f"DROP ROLE {role}")
            owner.execute(f'ALTER DATABASE "{name}" CONNECTION LIMIT -1')


def test_connections_left_of_the_server(engine):
    """A superuser keeps what is reserved for one, and no limit of a database binds it."""
    clients = "SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'client backend'"
    limits = ("max_connections", "superuser_reserved_connections", "reserved_connections")
    with alone(engine) as owner:
        most, *reserved = (int(owner.execute("SELECT coalesce(current_setting(%s, true), '0')", (name,)).fetchone()[0]) for name in limits)
        owner.execute(f'ALTER DATABASE "{engine.url.database}" CONNECTION LIMIT 1')
        database.connections_left(engine)  # from here on, its connection is among the clients
        found = [(database.connections_left(engine), owner.execute(clients).fetchone()[0]) for _ in range(20)]
        owner.execute(f'ALTER DATABASE "{engine.url.database}" CONNECTION LIMIT -1')
    assert any(left == most - sum(reserved) - used for left, used in found)  # others come and go on this server


@pytest.fixture
def engine(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> Engine:
    """The shared fixture ran before `nowhere` took the address away."""
    monkeypatch.setenv("MSM_DATABASE_URL", engine.url.set(drivername="postgresql").render_as_string(hide_password=False))
    return engine


# -- transactions ---------------------------------------------------------------------------------------------------------------


def setting(connection, name: str) -> str:
    return connection.exec_driver_sql("SELECT current_setting(%s)", (name,)).scalar_one()


def test_a_transaction_is_repeatable_read_in_utc_with_bounded_waits(engine):
    with engine.begin() as connection:
        defaults = {name: setting(connection, name) for name in ("statement_timeout", "lock_timeout", "TimeZone")}
    with database.transaction(engine) as connection:
        assert setting(connection, "transaction_isolation") == "repeatable read"
        assert setting(connection, "transaction_read_only") == "off"
        assert setting(connection, "TimeZone") == "UTC"
        for name in ("statement_timeout", "lock_timeout", "idle_in_transaction_session_timeout"):
            assert setting(connection, name) not in ("0", "")
    with engine.begin() as connection:  # the same pooled connection: nothing outlives the transaction
        assert {name: setting(connection, name) for name in defaults} == defaults
        assert setting(connection, "transaction_isolation") == "read committed"


def test_a_transaction_commits_or_leaves_nothing(engine):
    insert = "INSERT INTO msm__asset (uid, unique_identifier) VALUES (gen_random_uuid(), %s)"
    with database.transaction(engine) as connection:
        connection.exec_driver_sql(insert, ("kept",))
    with pytest.raises(DBAPIError, match="division by zero"), database.transaction(engine) as connection:
        connection.exec_driver_sql(f"{insert}; SELECT 1 / 0".replace("%s", "'lost'"))
    assert factories.sql(engine, "SELECT unique_identifier FROM msm__asset") == [("kept",)]


def test_a_read_only_transaction_cannot_write(engine):
    with pytest.raises(DBAPIError, match="read-only"), database.transaction(engine, read_only=True) as connection:
        connection.exec_driver_sql("DELETE FROM msm__asset")


def test_the_first_query_takes_the_snapshot(engine):
    """The claim must be the transaction's first look at the world, so the settings before it may not be."""
    with database.transaction(engine) as connection:
        factories.register_assets(engine, ["after the settings"])
        assert connection.exec_driver_sql("SELECT count(*) FROM msm__asset").scalar_one() == 1
        factories.register_assets(engine, ["after the first query"])
        assert connection.exec_driver_sql("SELECT count(*) FROM msm__asset").scalar_one() == 1


def test_an_exported_snapshot_shows_the_old_state(engine):
    def count(**options: object) -> int:
        with database.transaction(engine, read_only=True, **options) as connection:  # type: ignore[arg-type]
            return connection.exec_driver_sql("SELECT count(*) FROM msm__asset").scalar_one()

    factories.register_assets(engine, ["A"])
    with database.exported_snapshot(engine) as snapshot:
        factories.register_assets(engine, ["B"])
        assert (count(snapshot=snapshot), count()) == (1, 2)
        factories.sql(engine, "DELETE FROM msm__asset")
        assert (count(snapshot=snapshot), count(snapshot=snapshot), count()) == (1, 1, 0)
    with pytest.raises(DBAPIError) as caught:
        count(snapshot=snapshot)  # it lives as long as the transaction that exported it
    assert not database.is_transient(caught.value)


@pytest.mark.parametrize("snapshot", ["0'; DROP TABLE msm__asset; --", "", "0000 1", "../x"])
def test_what_is_no_snapshot_id_never_reaches_the_server(engine, snapshot):
    with pytest.raises(ConfigurationError, match="not a snapshot id"), database.transaction(engine, snapshot=snapshot):
        pass


# -- retries --------------------------------------------------------------------------------------------------------------------

# Source: https://www.postgresql.org/docs/current/errcodes-appendix.html; design.md section 7
STATES = {
    "40001": True,  # serialization_failure
    "40P01": True,  # deadlock_detected
    "55P03": True,  # lock_not_available
    "53300": True,  # too_many_connections
    "57P01": True,  # admin_shutdown
    "57P02": True,  # crash_shutdown
    "57P03": True,  # cannot_connect_now
    "57P05": True,  # idle_session_timeout: 57P0x
    "08000": True,  # connection_exception
    "08006": True,  # connection_failure
    "08P01": True,  # protocol_violation
    "23505": False,  # unique_violation
    "23514": False,  # check_violation
    "22P02": False,  # invalid_text_representation
    "42P01": False,  # undefined_table
    "42501": False,  # insufficient_privilege
    "53100": False,  # disk_full
    "25006": False,  # read_only_sql_transaction
    "57014": False,  # query_canceled: statement_timeout
}


@pytest.mark.parametrize(("state", "transient"), STATES.items())
def test_which_states_are_transient(state, transient):
    error = psycopg.errors.lookup(state)("x")
    wrapped = DBAPIError("SELECT 1", {}, error)
    assert (database.sqlstate(error), database.sqlstate(wrapped)) == (state, state)
    assert (database.is_transient(error), database.is_transient(wrapped)) == (transient, transient)


def test_other_errors():
    assert database.is_transient(psycopg.OperationalError("the connection is closed"))  # broke without a state
    assert database.is_transient(ProgressConflict(count=1, nodes="p"))
    assert not database.is_transient(MissingPrices(portfolio="p", source="s", column="c", assets="A"))
    assert not database.is_transient(ValueError("40001"))
    assert database.sqlstate(ValueError("x")) == ""


def test_a_killed_backend_is_transient(engine):
    with engine.connect() as connection:
        pid = connection.exec_driver_sql("SELECT pg_backend_pid()").scalar_one()
        factories.sql(engine, "SELECT pg_terminate_backend(%s)", (pid,))
        with pytest.raises(DBAPIError) as caught:
            connection.exec_driver_sql("SELECT 1")
    assert database.is_transient(caught.value)


def test_retrying_repeats_the_unit_and_gives_up_with_the_error_itself():
    def attempts(error: Exception, failures: int) -> int:
        count = 0
        for attempt in database.retrying().copy(sleep=lambda seconds: None):
            with attempt:
                count += 1
                if count <= failures:
                    raise error
        return count

    serialization = psycopg.errors.SerializationFailure("x")
    assert attempts(serialization, 3) == 4
    with pytest.raises(psycopg.errors.SerializationFailure):
        attempts(serialization, 1000)
    with pytest.raises(psycopg.errors.UniqueViolation):
        attempts(psycopg.errors.UniqueViolation("x"), 1)
