"""The one row type behind all registry records. A new kind of row is a table, a key and its fields:

    class Asset(Row, table=AssetTable, key=("unique_identifier",)):
        unique_identifier: str
        asset_type: str | None = None

Every operation is set-based: the number of statements does not depend on the number of rows. Rows are frozen; what an
operation returns is what is stored. Everything raises EngineNotStarted before `start_engine`, InvalidRow, naming field and
remedy, for what cannot be stored, and NaiveTimestamp for an instant without a time zone.
"""

import functools
import uuid
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any, ClassVar, Self, Unpack, get_type_hints

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError
from sqlalchemy import ColumnElement, Connection, RowMapping, String, Table, func, or_, select

from msm_core.api import runtime, statements
from msm_core.api.checks import check_text, check_value, refusals, shown
from msm_core.api.fields import constructor_like
from msm_core.api.statements import Name, name_of, table_of
from msm_core.errors import InvalidRow, RowNotFound
from msm_core.models import MetaTable, RegistryTable
from msm_core.rows import upsert_rows

NAMED_MAX = 5  # keys spelled out in an error


class Row(BaseModel):
    """A registry record. `uid` is made by the client and stable for the life of the row; the key names the row to people."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    __model__: ClassVar[type[RegistryTable]]
    __key__: ClassVar[tuple[str, ...]]

    uid: uuid.UUID = Field(default_factory=uuid.uuid4)

    def __init_subclass__(cls, *, table: type[RegistryTable], key: tuple[str, ...], **config: Unpack[ConfigDict]) -> None:
        super().__init_subclass__(**config)
        cls.__model__, cls.__key__ = table, key

    @classmethod
    def __pydantic_init_subclass__(cls, **_: object) -> None:
        if differing := set(cls.model_fields) ^ set(cls._table().columns.keys()):
            raise TypeError(f"{cls.__name__} and its table differ in {sorted(differing)}: declare each column in both")

    # -- writing --

    @constructor_like
    def create(cls, **fields: object) -> Self:
        """Insert one row. Raises InvalidRow if its key exists."""
        return cls.create_many([fields])[0]

    @constructor_like
    def upsert(cls, **fields: object) -> Self:
        """Insert one row, or change the one with its key. Only supplied fields are touched; a row that is equal is not written."""
        return cls.upsert_many([fields])[0]

    @classmethod
    def create_many(cls, rows: Iterable[Self | Mapping[str, object]]) -> list[Self]:
        """Insert all rows or, where a key exists, none (InvalidRow). Returns them in the order given."""
        payloads = [{"uid": uuid.uuid4(), **payload} for payload in cls._payloads(rows)]
        return cls._stored(payloads, update=False, remedy="exists already. Use upsert to change it")

    @classmethod
    def upsert_many(cls, rows: Iterable[Self | Mapping[str, object]]) -> list[Self]:
        """Insert or change rows in one transaction, two statements per set of supplied fields. Returns them in the order given."""
        return cls._stored(cls._payloads(rows), update=True, remedy="exists with another uid. Leave uid out")

    @classmethod
    def update(cls, row: Self | uuid.UUID, **fields: object) -> Self:
        """Change the named fields of one row. Raises RowNotFound. The key cannot change: histories are stored under it."""
        return cls.update_many([{"uid": _uid(row), **fields}])[0]

    @classmethod
    def update_many(cls, rows: Iterable[Mapping[str, object]]) -> list[Self]:
        """Change rows that exist, each named by its uid or its key; one transaction, two statements per set of supplied fields.

        Returns the rows in the order given. Raises RowNotFound, and then nothing is changed.
        """
        changes = [cls._change(row) for row in rows]
        groups: dict[tuple[tuple[str, ...], tuple[str, ...]], dict[Name, dict[str, Any]]] = defaultdict(dict)
        for by, change in changes:
            if groups[by, tuple(sorted(change))].setdefault(name_of(change, by), change) is not change:
                raise cls._invalid(f"{_spelled(by, name_of(change, by))} is given twice in one batch")
        found: dict[Name, RowMapping] = {}
        with cls._writing() as connection:
            for (by, supplied), group in groups.items():
                if columns := [name for name in supplied if name not in by]:
                    statements.change(connection, cls._table(), by, columns, list(group.values()))
                found |= cls._fetched(connection, by, list(group.values()))
        return [cls._read(found[name_of(change, by)]) for by, change in changes]

    @classmethod
    def delete(cls, row: Self | uuid.UUID) -> None:
        """Delete one row and what is defined to go with it. Raises RowNotFound, and InvalidRow while other rows refer to it."""
        if not cls.delete_many([row]):
            raise cls._not_found(("uid",), [(_uid(row),)])

    @classmethod
    def delete_many(cls, rows: Iterable[Self | uuid.UUID]) -> int:
        """Delete all that exist of `rows`, or, while other rows refer to one of them, none (InvalidRow). Returns how many there were."""
        names = [{"uid": cls._typed("uid", _uid(row))} for row in rows]
        with cls._writing() as connection:
            return statements.remove(connection, cls._table(), ("uid",), names)

    # -- reading --

    @classmethod
    def get(cls, **key: Any) -> Self:
        """The row with this uid, or with this business key. Raises RowNotFound."""
        row = cls.get_or_none(**key)
        if row is None:
            raise cls._not_found(tuple(key), [tuple(key.values())])
        return row

    @classmethod
    def get_or_none(cls, **key: Any) -> Self | None:
        """The row with this uid, or with this business key, or None."""
        name = key if set(key) == {"uid"} else cls._with_key(key)
        if set(name) not in ({"uid"}, set(cls.__key__)):
            raise cls._invalid(f"get takes uid, or {', '.join(cls.__key__)}. Use filter for other fields")
        return next(iter(cls.filter(**name)), None)

    @classmethod
    def get_many(cls, keys: Iterable[object], *, missing_ok: bool = False) -> list[Self]:
        """Rows by business key (a tuple where the key has several fields), in the order given, in one statement, without a limit.

        Raises RowNotFound naming the absent ones, unless `missing_ok`.
        """
        names = [key if isinstance(key, tuple) else (key,) for key in keys]
        wanted = [{k: cls._typed(k, v) for k, v in zip(cls.__key__, name, strict=True)} for name in names]
        with runtime.connection(cls.__model__) as connection:
            found = cls._fetched(connection, cls.__key__, wanted, missing_ok=missing_ok)
        return [cls._read(found[name]) for key in wanted if (name := name_of(key, cls.__key__)) in found]

    @classmethod
    def filter(cls, *, name_contains: str | None = None, limit: int | None = None, **equals: object) -> list[Self]:
        """Every row whose fields equal the given values, ordered by business key; all rows unless `limit` says otherwise.

        equals         `field=None` means: the field is null
        name_contains  part of a text of the key, or of display_name, in upper or lower case
        """
        if limit is not None and limit < 0:
            raise cls._invalid(f"limit is {limit}; it must be 0 or more, or None for all rows")
        table = cls._table()
        query = select(table).where(*cls._conditions(name_contains, equals)).order_by(*(table.c[k] for k in cls.__key__)).limit(limit)
        with runtime.connection(cls.__model__) as connection:
            return [cls._read(row) for row in connection.execute(query).mappings()]

    @classmethod
    def count(cls, *, name_contains: str | None = None, **equals: object) -> int:
        """How many rows `filter` would return."""
        query = select(func.count()).select_from(cls._table()).where(*cls._conditions(name_contains, equals))
        with runtime.connection(cls.__model__) as connection:
            return connection.execute(query).scalar_one()

    # -- what is given, checked --

    @classmethod
    def _payloads(cls, rows: Iterable[Self | Mapping[str, object]]) -> list[dict[str, Any]]:
        """Only what was supplied, typed and checked. A refusal names the row by its place in the batch."""
        payloads = []
        for place, row in enumerate(rows):
            supplied = {name: getattr(row, name) for name in row.model_fields_set} if isinstance(row, Row) else row
            try:
                payloads.append(cls._payload(supplied))
            except InvalidRow as error:
                raise cls._invalid(f"{error.facts['why']}{f' (row {place} of the batch)' if place else ''}") from None
        return payloads

    @classmethod
    def _payload(cls, supplied: Mapping[str, object]) -> dict[str, Any]:
        payload = cls._checked(cls._with_key(supplied))
        if absent := [name for name, field in cls.model_fields.items() if field.is_required() and name not in payload]:
            raise cls._invalid(f"{', '.join(absent)} must be given")
        return payload

    @classmethod
    def _change(cls, supplied: Mapping[str, object]) -> tuple[tuple[str, ...], dict[str, Any]]:
        by = ("uid",) if "uid" in supplied else cls.__key__
        change = cls._checked(supplied if "uid" in supplied else cls._with_key(supplied))
        if "uid" in supplied and (fixed := [k for k in cls.__key__ if k in change]):
            raise cls._invalid(f"{', '.join(fixed)} is the key and cannot change. Create a new row instead")
        return by, change

    @classmethod
    def _with_key(cls, supplied: Mapping[str, Any]) -> dict[str, Any]:
        """`supplied` with the whole business key in it: its parts may have defaults, such as session_label "regular"."""
        defaults = {k: cls.model_fields[k].default for k in cls.__key__ if not cls.model_fields[k].is_required()}
        complete = {**defaults, **supplied}
        if absent := [k for k in cls.__key__ if complete.get(k) is None]:
            raise cls._invalid(f"{', '.join(absent)} must be given: the key is {', '.join(cls.__key__)}")
        return complete

    @classmethod
    def _checked(cls, supplied: Mapping[str, object]) -> dict[str, Any]:
        checked = {name: cls._typed(name, value) for name, value in supplied.items()}
        for name, value in checked.items():
            check_value(cls.__model__, cls._table().c[name], value, is_key=name in cls.__key__)
        return checked

    @classmethod
    def _typed(cls, name: str, value: object) -> Any:
        """The value in the field's type."""
        if name not in cls.model_fields:
            raise cls._invalid(f"{name} is not a field. Known fields: {', '.join(cls.model_fields)}")
        try:
            typed = _field_type(cls, name).validate_python(value, context=f"{cls.__name__}.{name}")
        except ValidationError as error:
            problem = error.errors()[0]["msg"].removeprefix("Value error, ")
            raise cls._invalid(f"{name} {shown(value)}: {problem}") from None
        check_text(cls.__model__, name, typed)
        return typed

    @classmethod
    def _conditions(cls, name_contains: str | None, equals: Mapping[str, object]) -> list[ColumnElement[bool]]:
        columns = cls._table().c
        conditions: list[ColumnElement[bool]] = []
        for name, value in equals.items():
            typed = None if value is None and name in columns else cls._typed(name, value)
            conditions.append(columns[name].is_(None) if typed is None else columns[name] == typed)
        if name_contains is not None:
            texts = [c for c in columns if c.name in (*cls.__key__, "display_name") and isinstance(c.type, String)]
            if not texts:
                raise cls._invalid("name_contains needs a text in the key, and there is none. Filter by fields")
            check_text(cls.__model__, "name_contains", name_contains)
            conditions.append(or_(*(c.icontains(name_contains, autoescape=True) for c in texts)))
        return conditions

    # -- to and from the table --

    @classmethod
    @contextmanager
    def _writing(cls) -> Iterator[Connection]:
        with refusals(cls.__model__), runtime.connection(cls.__model__) as connection:
            yield connection

    @classmethod
    def _stored(cls, payloads: Sequence[dict[str, Any]], *, update: bool, remedy: str) -> list[Self]:
        names = [name_of(payload, cls.__key__) for payload in payloads]
        with cls._writing() as connection:
            rows = upsert_rows(connection, cls.__model__, payloads, key=cls.__key__, update=update)
            found = {name_of(row, cls.__key__): row for row in rows}
            for name, payload in zip(names, payloads, strict=True):
                row = found.get(name)
                if row is None or row["uid"] != payload.get("uid", row["uid"]):  # the key belongs to a row that was there before
                    raise cls._invalid(f"{_spelled(cls.__key__, name)} {remedy}")
        return [cls._read(found[name]) for name in names]

    @classmethod
    def _fetched(
        cls, connection: Connection, by: Sequence[str], wanted: Sequence[Mapping[str, Any]], *, missing_ok: bool = False
    ) -> dict[Name, RowMapping]:
        found = statements.fetch(connection, cls._table(), by, wanted)
        absent = [name for row in wanted if (name := name_of(row, by)) not in found]
        if absent and not missing_ok:
            raise cls._not_found(by, absent)
        return found

    @classmethod
    def _read(cls, stored: RowMapping) -> Self:
        """A stored row is not validated again; times come in the session's zone and leave in UTC. Unknown columns are ignored."""
        values: dict[str, Any] = {name: stored[name] for name in cls.model_fields}
        return cls.model_construct(set(values), **{k: v.astimezone(UTC) if isinstance(v, datetime) else v for k, v in values.items()})

    @classmethod
    def _table(cls) -> Table:
        return table_of(cls.__model__)

    @classmethod
    def _invalid(cls, why: str) -> InvalidRow:
        return InvalidRow(model=cls.__model__.__concept__, why=why)

    @classmethod
    def _not_found(cls, by: Sequence[str], absent: Sequence[Name]) -> RowNotFound:
        return not_found(cls.__model__, by, absent)


def not_found(model: type[MetaTable], by: Sequence[str], absent: Sequence[Name]) -> RowNotFound:
    """The error that names the first of the rows that there are not, each by the values of its key."""
    more = f" (and {len(absent) - NAMED_MAX} more)" if len(absent) > NAMED_MAX else ""
    return RowNotFound(model=model.__concept__, key=" or ".join(_spelled(by, name) for name in absent[:NAMED_MAX]) + more)


def _uid(row: Row | uuid.UUID) -> uuid.UUID:
    return row.uid if isinstance(row, Row) else row


@functools.cache
def _field_type(row: type[Row], name: str) -> TypeAdapter[Any]:
    return TypeAdapter(get_type_hints(row, include_extras=True)[name])


def _spelled(by: Sequence[str], name: Sequence[object]) -> str:
    return ", ".join(f"{k} {shown(v if isinstance(v, str) else str(v))}" for k, v in zip(by, name, strict=True))
