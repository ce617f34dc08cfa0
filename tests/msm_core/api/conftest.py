"""An attached engine, and what a test needs to see of the database behind the rows."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import pytest
from sqlalchemy import Engine, event

from msm_core import start_engine
from msm_core.models import MetaTable


@pytest.fixture
def started(engine: Engine) -> Engine:
    """A fresh database with every static table attached."""
    start_engine()
    return engine


@pytest.fixture
def statements(started: Engine) -> Callable[[], AbstractContextManager[list[str]]]:
    """`with statements() as sent:` collects the SQL that the block sends."""

    @contextmanager
    def collecting() -> Iterator[list[str]]:
        sent: list[str] = []

        def keep(connection: object, cursor: object, statement: str, *_: object) -> None:
            sent.append(statement)

        event.listen(started, "before_cursor_execute", keep)
        try:
            yield sent
        finally:
            event.remove(started, "before_cursor_execute", keep)

    return collecting


@pytest.fixture
def versions(started: Engine) -> Callable[[], dict[str, str]]:
    """Which transaction wrote each row of each table: the same before and after means that nothing was written."""

    def read() -> dict[str, str]:
        sql = "SELECT md5(string_agg(xmin::text || ' ' || t::text, ',' ORDER BY t::text)) FROM {} t"
        with started.connect() as connection:
            return {name: connection.exec_driver_sql(sql.format(name)).scalar_one() for name in MetaTable.metadata.tables}

    return read
