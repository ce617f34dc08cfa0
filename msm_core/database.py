"""One engine per process, addresses that never show their password, and transactions with the isolation that the protocol needs."""

import functools
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote, unquote

import psycopg
from sqlalchemy import URL, Connection, Engine, create_engine, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, OperationalError
from tenacity import Retrying, retry_if_exception, stop_after_attempt, wait_random_exponential

from msm_core.errors import ConfigurationError, DatabaseNotConfigured, DatabaseUnavailable, MsmError, UnsupportedDatabase
from msm_core.settings import Settings

POSTGRES_VERSION_MIN = 15
TRANSIENT_SQLSTATES = ("40001", "40P01", "55P03", "53300", "57P01", "57P02", "57P03", "57P05")
TRANSIENT_SQLSTATE_CLASSES = ("08",)  # connection exceptions
ATTEMPTS_MAX = 8
IDLE_TIMEOUT = "60s"
STATEMENT_TIMEOUT = "600s"
LOCK_TIMEOUT = "10s"
SECRET_CHARS_MIN = 4  # shorter parts would blank out ordinary words


# -- addresses ------------------------------------------------------------------------------------------------------------


def database_url() -> URL:
    """Where the database is: `MSM_DATABASE_URL`, `MSM_DATABASE_URL_FILE`, the embedded one's url file, or libpq's own settings.

    Raises DatabaseNotConfigured. The address is resolved on each node and never travels with a task.
    """
    settings = Settings()
    if settings.database_url:
        return _parse(settings.database_url.get_secret_value())
    if settings.database_url_file:
        if not settings.database_url_file.exists():  # a secret that is not mounted must not mean another database
            raise ConfigurationError(problems=f"MSM_DATABASE_URL_FILE names {settings.database_url_file}, which does not exist")
        return _parse(settings.database_url_file.read_text().strip())
    if (path := embedded_url_file(settings)).exists():
        return _parse(path.read_text().strip())
    if os.environ.get("PGSERVICE") or os.environ.get("PGHOST"):
        return URL.create("postgresql+psycopg")  # libpq reads its service and password files itself
    raise DatabaseNotConfigured(url_file=str(embedded_url_file(settings)))


def embedded_url_file(settings: Settings) -> Path:
    return settings.state_path / "database_url"


def _parse(text: str) -> URL:
    """An address as a URL. The errors never repeat the text: it holds a password, and a badly written one may stand in any part."""
    authority = text.partition("://")[2].partition("/")[0]
    try:
        url = make_url(text)
    except (ArgumentError, ValueError):
        url = None
    if url is None or authority.count("@") > 1:
        form = "postgresql://user:password@host:port/name, special characters of the password percent-encoded (@ is %40)"
        raise ConfigurationError(problems=f"the database address is not of the form {form}") from None
    if not url.drivername.startswith("postgres"):
        raise ConfigurationError(problems=f"the database address is for {url.drivername}; only postgresql:// is supported")
    return url.set(drivername="postgresql+psycopg")


def where(url: URL) -> str:
    """Host, port and database of an address, without credentials."""
    return f"{url.host or 'local socket'}:{url.port or 5432}/{url.database or ''}"


def redact(text: str) -> str:
    """`text` with every password removed: those inside any address, and the configured one, however it is spelled or torn apart."""
    for secret in _secrets():
        text = text.replace(secret, "***")
    text = re.sub(r"(\w+://[^\s:/@]*):[^\s@]*@", r"\1:***@", text)
    return re.sub(r"(password\s*=\s*)('[^']*'|\S+)", r"\1***", text, flags=re.IGNORECASE)


def _secrets() -> list[str]:
    """Spellings of the configured password, longest first, and its parts between the characters at which parsers tear it."""
    try:
        url = database_url()
    except (MsmError, OSError):
        return []
    password = url.password or url.query.get("password")
    if not isinstance(password, str):
        return []
    pieces = re.split(r"([@:/\s])", password)
    parts = {"".join(pieces[i:j]) for i in range(len(pieces)) for j in range(i + 1, len(pieces) + 1)}
    spelled = {s for part in parts | {unquote(password)} for s in (part, quote(part, safe=""), quote(part))}
    return sorted((s for s in spelled if len(s) >= SECRET_CHARS_MIN), key=len, reverse=True)


# -- engine -----------------------------------------------------------------------------------------------------------------


def get_engine() -> Engine:
    """The engine of this process for the configured database; built once, one pooled connection."""
    return _engine(database_url().render_as_string(hide_password=False))


@functools.cache
def _engine(url: str) -> Engine:
    # hide_parameters: values belong to clients. prepare_threshold: prepared statements break behind pgbouncer.
    return create_engine(
        url,
        pool_size=1,
        max_overflow=4,  # of the driver, for moments
        pool_pre_ping=True,
        hide_parameters=True,
        connect_args={"prepare_threshold": None, "connect_timeout": 10, "application_name": "msm"},
    )


def check_server(engine: Engine) -> None:
    """Raises DatabaseUnavailable or UnsupportedDatabase."""
    try:
        with engine.connect() as connection:
            version = connection.exec_driver_sql("SHOW server_version_num").scalar_one()
    except OperationalError as error:
        raise DatabaseUnavailable(where=where(engine.url), why=redact(str(error.orig).strip().splitlines()[0])) from None
    if int(version) // 10000 < POSTGRES_VERSION_MIN:
        raise UnsupportedDatabase(found=f"Postgres {int(version) // 10000}", needed=POSTGRES_VERSION_MIN)


def connections_left(engine: Engine) -> int | None:
    """How many more connections the server grants now, to this role on this database; None behind a pooler, whose clients wait instead.

    What is reserved for superusers is left to them, even by one. A pooler is known by its cancel key, which is not that of the backend.
    """
    with engine.connect() as connection:
        backend, left = connection.exec_driver_sql(CONNECTIONS_LEFT).one()
        told: int = connection.connection.driver_connection.info.backend_pid  # type: ignore[union-attr]
    return left if told == backend else None


# A plain role does not see the type of other roles' sessions: those of a database then count as clients.
CONNECTIONS_LEFT = """
    WITH client AS (
        SELECT datid, usesysid FROM pg_stat_activity WHERE datid IS NOT NULL AND coalesce(backend_type, 'client backend') = 'client backend'
    )
    SELECT pg_backend_pid(), greatest(0, least(
        current_setting('max_connections')::int - current_setting('superuser_reserved_connections')::int
            - coalesce(current_setting('reserved_connections', true)::int, 0) - (SELECT count(*) FROM client),
        CASE WHEN rolconnlimit >= 0 AND NOT rolsuper THEN rolconnlimit - (SELECT count(*) FROM client WHERE usesysid = r.oid) END,
        CASE WHEN datconnlimit >= 0 AND NOT rolsuper THEN datconnlimit - (SELECT count(*) FROM client WHERE datid = d.oid) END))
    FROM pg_roles r, pg_database d WHERE rolname = session_user AND datname = current_database()
"""


@contextmanager
def transaction(engine: Engine, *, read_only: bool = False, snapshot: str | None = None) -> Iterator[Connection]:
    """A REPEATABLE READ transaction in UTC with bounded waits; under `snapshot` it sees exactly what the exporting one sees.

    Settings are SET LOCAL (they must not outlive the transaction behind pgbouncer) and sent in one round trip; none of them takes
    the snapshot, so the first query of the caller does.
    """
    settings = [f"SET TRANSACTION ISOLATION LEVEL REPEATABLE READ{', READ ONLY' if read_only else ''}"]
    if snapshot is not None:
        if not re.fullmatch(r"[0-9A-F-]+", snapshot):
            raise ConfigurationError(problems=f"{snapshot!r} is not a snapshot id")
        settings.append(f"SET TRANSACTION SNAPSHOT '{snapshot}'")
    settings += [
        "SET LOCAL TIME ZONE 'UTC'",
        f"SET LOCAL statement_timeout = '{STATEMENT_TIMEOUT}'",
        f"SET LOCAL lock_timeout = '{LOCK_TIMEOUT}'",
        f"SET LOCAL idle_in_transaction_session_timeout = '{IDLE_TIMEOUT}'",
    ]
    with engine.begin() as connection:
        connection.exec_driver_sql("; ".join(settings))
        yield connection


@contextmanager
def exported_snapshot(engine: Engine) -> Iterator[str]:
    """A snapshot id that other connections may read under, for as long as this context lives.

    Source: https://www.postgresql.org/docs/current/functions-admin.html#FUNCTIONS-SNAPSHOT-SYNCHRONIZATION
    """
    with transaction(engine, read_only=True) as connection:
        connection.detach()  # it is busy for the length of a run: the pool's one connection is for the work
        connection.exec_driver_sql("SET LOCAL idle_in_transaction_session_timeout = 0")
        yield str(connection.exec_driver_sql("SELECT pg_export_snapshot()").scalar_one())


# -- retries ------------------------------------------------------------------------------------------------------------------


def sqlstate(error: BaseException) -> str:
    """SQLSTATE of a database error, empty for any other; a connection that broke without one counts as 08006."""
    cause = error.orig if isinstance(error, DBAPIError) else error
    if not isinstance(cause, psycopg.Error):
        return ""
    return cause.sqlstate or ("08006" if isinstance(cause, psycopg.OperationalError) else "")


def is_transient(error: BaseException) -> bool:
    if isinstance(error, MsmError):
        return error.retryable
    state = sqlstate(error)
    return state in TRANSIENT_SQLSTATES or state[:2] in TRANSIENT_SQLSTATE_CLASSES


def retrying() -> Retrying:
    """Repeats a whole unit of work on transient errors, with jitter: `for attempt in retrying(): with attempt: ...`."""
    return Retrying(
        retry=retry_if_exception(is_transient),
        wait=wait_random_exponential(multiplier=0.05, max=5),
        stop=stop_after_attempt(ATTEMPTS_MAX),
        reraise=True,
    )
