"""Snapshots of what accounts should hold and do hold, replaced whole. One road for one snapshot and for a thousand.

    replace_target_positions(TargetSnapshot("fund-core", noon, [TargetPosition(asset_uid=btc.uid, weight_notional_exposure=0.4)]))

All rows are checked before anything is written, and every problem is told. The number of statements does not depend on the number of
snapshots or rows; they land in one transaction, so that a reader sees each snapshot as it was or as it is, never a mixture.
"""

import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from typing import Any, NamedTuple, TypeVar

import pandas as pd
from pydantic import ValidationError
from sqlalchemy import Connection, RowMapping, Uuid, any_, literal, select
from sqlalchemy.dialects.postgresql import ARRAY

from msm_core.api import Account, AccountHoldingsSet, AccountTargetAllocation, PositionSet, Row, runtime, statements
from msm_core.api.checks import check_value, refusals, shown
from msm_core.api.statements import Name, name_of, table_of
from msm_core.errors import InvalidRow, SnapshotExists, SnapshotInUse, SnapshotRefused
from msm_core.models import (
    AccountHoldingsSetTable,
    AssetTable,
    DataNodeUpdateTable,
    MetaTable,
    PortfolioTable,
    PositionSetTable,
    VirtualFundHoldingsStorage,
    VirtualFundTable,
)
from msm_core.rows import upsert_rows, write_rows
from msm_core.services.snapshot_rows import AccountHolding, AwareInstant, SnapshotPart, TargetPosition

NAMED_MAX = 5  # snapshots or funds spelled out in an error
R = TypeVar("R", bound=Row)
Part = TypeVar("Part", bound=SnapshotPart)

# -- snapshots ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TargetSnapshot:
    """All that one allocation wants from `position_set_time` on; no positions = nothing.

    account_target_allocation  the row, its uid or its unique_identifier
    position_set_time          an aware datetime
    positions                  rows, mappings, or a DataFrame, in which NaN, NaT and None mean: not given
    source                     who decided them
    """

    account_target_allocation: AccountTargetAllocation | uuid.UUID | str
    position_set_time: datetime
    positions: pd.DataFrame | Iterable[TargetPosition | Mapping[str, Any]]
    source: str | None = None


@dataclass(frozen=True)
class HoldingsSnapshot:
    """All that one account held at `time_index`; no holdings = nothing. Fields as in TargetSnapshot.

    source_data_node_uid  progress row of the node that made it, if one did
    """

    account: Account | uuid.UUID | str
    time_index: datetime
    holdings: pd.DataFrame | Iterable[AccountHolding | Mapping[str, Any]]
    source_data_node_uid: uuid.UUID | None = None


class _Head(SnapshotPart):
    @property
    def time(self) -> datetime:
        return next(iter(dict(self).values()))


class _TargetHead(_Head):
    __model__ = PositionSetTable
    position_set_time: AwareInstant
    source: str | None = None


class _HoldingsHead(_Head):
    __model__ = AccountHoldingsSetTable
    time_index: AwareInstant
    source_data_node_uid: uuid.UUID | None = None


def replace_target_positions(snapshots: TargetSnapshot | Iterable[TargetSnapshot], *, overwrite: bool = False) -> list[PositionSet]:
    """Store the snapshots, all or none; returns their position sets in the order given.

    overwrite  a snapshot that exists is replaced whole, its source too; its set keeps its uid

    Raises SnapshotRefused with every problem, SnapshotExists, EngineNotStarted.
    """
    return _replace(PositionSet, TARGETS, snapshots, overwrite)


def replace_account_holdings(
    snapshots: HoldingsSnapshot | Iterable[HoldingsSnapshot], *, overwrite: bool = False
) -> list[AccountHoldingsSet]:
    """Store the snapshots, all or none; returns their holdings sets in the order given.

    overwrite  as in replace_target_positions

    Raises SnapshotRefused with every problem, SnapshotExists, EngineNotStarted, and SnapshotInUse for holdings that virtual funds draw on.
    """
    return _replace(AccountHoldingsSet, HOLDINGS, snapshots, overwrite)


# -- what is given, checked ---------------------------------------------------------------------------------------------------


class _Place(NamedTuple):
    """A column that names the rows of a registry."""

    model: type[MetaTable]
    column: str


class _Kind(NamedTuple):
    what: str
    snapshot: type[TargetSnapshot | HoldingsSnapshot]
    owner: type[Row]
    head: type[_Head]
    row: type[SnapshotPart]
    references: Mapping[str, _Place]  # by the field of head or row
    set_column: str
    views: tuple[type[MetaTable], ...] = ()  # what may draw on the rows

    @property
    def places(self) -> list[_Place]:
        return [*(_Place(self.owner.__model__, name) for name in ("uid", "unique_identifier")), *self.references.values()]

    @property
    def models(self) -> list[type[MetaTable]]:
        return [self.head.__model__, self.row.__model__, *(place.model for place in self.places), *self.views]


TARGETS = _Kind(
    "target positions", TargetSnapshot, AccountTargetAllocation, _TargetHead, TargetPosition,
    {"asset_uid": _Place(AssetTable, "uid"), "portfolio_uid": _Place(PortfolioTable, "uid")}, "position_set_uid",
)  # fmt: skip
HOLDINGS = _Kind(
    "account holdings", HoldingsSnapshot, Account, _HoldingsHead, AccountHolding,
    {"asset_identifier": _Place(AssetTable, "unique_identifier"), "source_data_node_uid": _Place(DataNodeUpdateTable, "uid")},
    "holdings_set_uid", (VirtualFundHoldingsStorage, VirtualFundTable),
)  # fmt: skip


class _Reference(NamedTuple):
    row: int | None
    field: str
    place: _Place
    value: Any


class _Read(NamedTuple):
    """A snapshot, checked as far as that goes without the database; refused parts are left out."""

    owner: _Reference | None
    head: _Head | None
    rows: list[SnapshotPart]
    references: list[_Reference]


class _Problems(list[dict[str, Any]]):
    def tell(self, snapshot: int, row: int | None, field: str, reason: str) -> None:
        self.append({"snapshot": snapshot, "row": row, "field": field, "reason": reason})

    def raise_any(self, what: str) -> None:
        if self:
            self.sort(key=lambda problem: (problem["snapshot"], -1 if problem["row"] is None else problem["row"]))
            first = ", ".join(f"{name} {self[0][name]}" for name in ("snapshot", "row") if self[0][name] is not None)
            first += f": {self[0]['field']}: {self[0]['reason']}"
            raise SnapshotRefused(what=what, count=len(self), first=first, problems=list(self))


def _read(kind: _Kind, place: int, snapshot: object, problems: _Problems) -> _Read:
    if not isinstance(snapshot, kind.snapshot):
        problems.tell(place, None, "", f"{shown(snapshot)} is no {kind.snapshot.__name__}")
        return _Read(None, None, [], [])
    (owner_name, owner), (time_name, time), (rows_name, given), (source_name, source) = vars(snapshot).items()
    tell = partial(problems.tell, place)
    references: list[_Reference] = []
    head = _validated(kind, kind.head, None, {time_name: time, source_name: source}, tell, references)
    rows: list[SnapshotPart] = []
    try:
        records = _records(given)
    except TypeError:
        records = []
        tell(None, rows_name, f"{shown(given)} is neither rows nor a DataFrame")
    for number, record in enumerate(records):
        if row := _validated(kind, kind.row, number, record, tell, references):
            rows.append(row)
    _tell_duplicates(references, tell)
    if owner_reference := _owner(kind, owner_name, owner, tell):
        references.append(owner_reference)
    return _Read(owner_reference, head, rows, references)


def _records(given: Any) -> list[Any]:
    if not isinstance(given, pd.DataFrame):
        return list(given)
    rows = given.to_dict("records")
    return [{name: value for name, value in row.items() if not (pd.api.types.is_scalar(value) and pd.isna(value))} for row in rows]


def _validated(
    kind: _Kind, type_: type[Part], row: int | None, given: Any, tell: Callable[..., None], references: list[_Reference]
) -> Part | None:
    """The typed row, or None and its problems told. What it refers to is kept either way, so that all of it is looked up."""
    raw = dict(given) if isinstance(given, type_) else given  # again: a copy of a row may have been given other values
    broken: set[str] = set()
    valid = None
    try:
        valid = type_.model_validate(raw)
    except ValidationError as error:
        for problem in error.errors():
            field, value = ".".join(map(str, problem["loc"])), problem["input"]
            broken.add(field)
            tell(row, field, problem["msg"] if value is None else f"{shown(value)}: {problem['msg']}")
    for field in kind.references.keys() & type_.model_fields.keys() - broken if isinstance(raw, Mapping) else ():
        if (value := raw.get(field)) is not None:
            place = kind.references[field]
            references.append(_Reference(row, field, place, uuid.UUID(str(value)) if place.column == "uid" else value))
    return valid


def _tell_duplicates(references: Sequence[_Reference], tell: Callable[..., None]) -> None:
    first: dict[Any, int | None] = {}
    for row, field, _, value in references:
        if first.setdefault((field, value), row) != row:
            tell(row, field, f"{shown(str(value))} is in row {first[field, value]} already. Give each once")


def _owner(kind: _Kind, field: str, owner: object, tell: Callable[..., None]) -> _Reference | None:
    model = kind.owner.__model__
    if isinstance(owner, kind.owner | uuid.UUID):
        return _Reference(None, field, _Place(model, "uid"), owner.uid if isinstance(owner, Row) else owner)
    if not isinstance(owner, str):
        return tell(None, field, f"{shown(owner)} is no {model.__concept__}, uid or unique_identifier")
    try:
        check_value(model, table_of(model).c["unique_identifier"], owner, is_key=True)
    except InvalidRow as error:
        return tell(None, field, error.facts["why"])
    return _Reference(None, field, _Place(model, "unique_identifier"), owner)


def _owners(connection: Connection, kind: _Kind, read: Sequence[_Read], problems: _Problems) -> list[RowMapping]:
    """Looks up all that the snapshots refer to, one statement for each kind of name. Tells what is unknown, and what is given twice."""
    wanted: dict[_Place, set[Any]] = {place: set() for place in kind.places}
    for reference in (reference for snapshot in read for reference in snapshot.references):
        wanted[reference.place].add(reference.value)
    found: dict[_Place, Mapping[Name, RowMapping]] = {
        place: statements.fetch(connection, table_of(place.model), (place.column,), [{place.column: value} for value in values])
        for place, values in wanted.items()
    }
    owners: list[RowMapping] = []
    first: dict[Name, int] = {}
    for number, snapshot in enumerate(read):
        for row, field, place, value in snapshot.references:
            if (value,) not in found[place]:
                concept = place.model.__concept__
                problems.tell(number, row, field, f"{shown(str(value))} names no {concept}. Store the {concept} first, or correct it")
        if snapshot.owner and snapshot.head and (owner := found[snapshot.owner.place].get((snapshot.owner.value,))):
            owners.append(owner)
            if first.setdefault((owner["uid"], snapshot.head.time), number) != number:
                again = first[owner["uid"], snapshot.head.time]
                problems.tell(number, None, snapshot.owner.field, f"it is the same snapshot as snapshot {again}. Give each once")
    return owners


# -- what is stored -----------------------------------------------------------------------------------------------------------


def _replace(stored: type[R], kind: _Kind, snapshots: Any, overwrite: bool) -> list[R]:
    problems = _Problems()
    given = [snapshots] if isinstance(snapshots, kind.snapshot) else list(snapshots)
    read = [_read(kind, number, snapshot, problems) for number, snapshot in enumerate(given)]
    with refusals(kind.row.__model__), runtime.one_transaction(*kind.models) as connection:
        owners = _owners(connection, kind, read, problems)
        problems.raise_any(kind.what)
        offered = {
            (owner["uid"], snapshot.head.time): {"uid": uuid.uuid4(), stored.__key__[0]: owner["uid"], **snapshot.head.model_dump()}
            for owner, snapshot in zip(owners, read, strict=True)
            if snapshot.head
        }
        names = {key: f"{owner['unique_identifier']} at {key[1].isoformat()}" for key, owner in zip(offered, owners, strict=True)}
        with refusals(stored.__model__):  # in order of the key: two writers never wait for each other in a circle
            found = upsert_rows(
                connection, stored.__model__, [offered[key] for key in sorted(offered)], key=stored.__key__, update=overwrite
            )
        keys = {row["uid"]: name_of(row, stored.__key__) for row in found}
        older = {uid: names[key] for uid, key in keys.items() if uid != offered[key]["uid"]}
        if older and not overwrite:
            raise SnapshotExists(what=kind.what, owners=_some(older.values()))
        _clear(connection, kind, older)
        heads = stored.get_many(offered)
        rows = [row.stored(head) for head, snapshot in zip(heads, read, strict=True) for row in snapshot.rows]
        write_rows(connection, kind.row.__model__, rows, key=[column.name for column in table_of(kind.row.__model__).primary_key])
    return heads


def _clear(connection: Connection, kind: _Kind, older: Mapping[uuid.UUID, str]) -> None:
    """Take the rows of snapshots away, which stay locked: who allocates from a snapshot, or replaces it too, waits."""
    uids = any_(literal(list(older), ARRAY(Uuid)))
    head = table_of(kind.head.__model__)
    connection.execute(select(head.c.uid).where(head.c.uid == uids).order_by(head.c.uid).with_for_update())
    if kind.views:
        view, fund = table_of(VirtualFundHoldingsStorage), table_of(VirtualFundTable)
        query = select(view.c.source_account_holdings_set_uid, fund.c.unique_identifier).distinct()
        query = query.join_from(view, fund, view.c.virtual_fund_uid == fund.c.uid).where(view.c.source_account_holdings_set_uid == uids)
        if used := connection.execute(query).all():
            raise SnapshotInUse(snapshots=_some({older[uid] for uid, _ in used}), funds=_some({fund for _, fund in used}))
    statements.remove(connection, table_of(kind.row.__model__), (kind.set_column,), [{kind.set_column: uid} for uid in older])


def _some(names: Iterable[str]) -> str:
    named = sorted(names)
    return ", ".join(named[:NAMED_MAX]) + (f" and {len(named) - NAMED_MAX} more" if len(named) > NAMED_MAX else "")
