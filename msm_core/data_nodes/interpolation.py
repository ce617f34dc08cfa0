"""How interpolated prices are brought up to date: the assets of a storage and a calendar are read, computed and written together."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from uuid import UUID

import numpy as np
from sqlalchemy import Connection

from msm_core.copying import Block, Text
from msm_core.data_nodes.base import input_digest
from msm_core.data_nodes.calendars import resolve_calendars
from msm_core.data_nodes.interpolated_prices import InterpolatedAsset
from msm_core.errors import CalendarNotFound, MsmError, SourceNotRegistered, StateLost
from msm_core.frames import parse_frequency, to_datetime, utc
from msm_core.interpolation import CODE_VERSION, NUMBERS, Policy, PriceBars, interpolate
from msm_core.models import InterpolatedPricesStorage
from msm_core.sessions import Sessions
from msm_core.sources import Source, read_bars, read_carry, read_sources
from msm_core.storage import Advance, ProgressRows, read_sessions

AROUND_THE_CLOCK = "24/7"  # calendar of an asset that names none


@dataclass(frozen=True)
class Group:
    """Assets of one storage and one calendar, with the bars of the source that come after their watermarks."""

    nodes: Sequence[InterpolatedAsset]
    source: Source
    sessions: Sessions
    bars: PriceBars


@dataclass(frozen=True)
class Outside:
    """Groups, and what is wrong with the assets, by identifier, that are in none."""

    groups: Sequence[Group]
    errors: Mapping[str, MsmError]
    as_of: datetime


@dataclass(frozen=True)
class Rows:
    """What one asset gets, and a digest of what it was made from."""

    bars: PriceBars
    input_digest: str


@dataclass(frozen=True)
class PricesKind:
    """How a batch of assets is interpolated: all of a storage and a calendar together."""

    name: str = "prices"

    def read_outside(self, connection: Connection, nodes: Sequence[InterpolatedAsset], as_of: datetime, world: str | None) -> Outside:
        """Statements: two, one more per storage, and two more for assets that trade around the clock."""
        sources = read_sources(connection, {n.source_time_index_meta_table_uid for n in nodes})
        sessions = _node_sessions(connection, nodes, as_of)
        groups: list[Group] = []
        errors: dict[str, MsmError] = {}
        for members in _by_storage(nodes).values():
            source = sources.get(members[0].source_time_index_meta_table_uid)
            if source is None:
                uid = str(members[0].source_time_index_meta_table_uid)
                errors |= {n.identifier: SourceNotRegistered(source=uid, known="none of this batch") for n in members}
                continue
            usable: dict[UUID | None, list[InterpolatedAsset]] = defaultdict(list)
            for node in members:
                found = sessions[node.calendar_uid]
                if isinstance(found, MsmError):
                    errors[node.identifier] = found
                else:
                    usable[node.calendar_uid].append(node)
            groups += _read_groups(connection, source, list(usable.values()), sessions, as_of)
        return Outside(groups, errors, as_of)

    def read_inside(
        self, connection: Connection, nodes: Sequence[InterpolatedAsset], progress: ProgressRows, outside: Outside
    ) -> dict[str, Rows | MsmError]:
        """One statement per storage and calendar; then the numbers, of all assets together."""
        found: dict[str, Rows | MsmError] = dict(outside.errors)
        for group in outside.groups:
            first = group.nodes[0]
            assets, since = [n.asset_identifier for n in group.nodes], [n.since for n in group.nodes]
            carry = read_carry(connection, first.storage, assets, since)
            policy = Policy(
                group.source.identifier,
                parse_frequency(first.source_cadence),
                parse_frequency(first.upsample_frequency_id),
                first.intraday_bar_interpolation_rule,
                group.source.time_label,
            )
            made = interpolate(group.bars, assets, group.sessions, carry, policy, utc(outside.as_of, "as_of"))
            lost = ~np.isnat(carry.times) & np.isnan(carry.close)
            for i, (node, rows) in enumerate(zip(group.nodes, _per_asset(made.bars, group.bars, len(assets)), strict=True)):
                state_lost = StateLost(portfolio=node.identifier, watermark=str(node.since)) if lost[i] else None
                found[node.identifier] = state_lost or made.errors.get(i) or rows
        return found

    def update(
        self, node: InterpolatedAsset, progress: ProgressRows, outside: Outside, inside: Mapping[str, Rows | MsmError], as_of: datetime
    ) -> list[Advance]:
        rows, scope = inside[node.identifier], node.scopes[0]
        if isinstance(rows, MsmError):
            raise rows
        count = len(rows.bars.times)
        if not count and not (node.replace and progress[scope.uid].row_count):
            return []
        return [
            Advance(
                scope=scope,
                epoch=progress[scope.uid].epoch,
                watermark=to_datetime(rows.bars.times[-1]) if count else None,
                row_count=count + (0 if node.replace else progress[scope.uid].row_count),
                configuration_hash=node.configuration_hash,
                code_version=CODE_VERSION,
                input_digest=rows.input_digest,
                block=_block(node.asset_identifier, rows.bars) if count else None,
                replace=node.replace,
            )
        ]

    def finish(self, connection: Connection, nodes: Sequence[InterpolatedAsset]) -> None:
        return None


def _by_storage(nodes: Sequence[InterpolatedAsset]) -> dict[type[InterpolatedPricesStorage], list[InterpolatedAsset]]:
    groups: dict[type[InterpolatedPricesStorage], list[InterpolatedAsset]] = defaultdict(list)
    for node in sorted(nodes, key=lambda n: n.asset_identifier):
        groups[node.storage].append(node)
    return groups


def _node_sessions(connection: Connection, nodes: Sequence[InterpolatedAsset], as_of: datetime) -> dict[UUID | None, Sessions | MsmError]:
    """The sessions of each calendar that assets trade in, or why they are not known."""
    uids = {n.calendar_uid for n in nodes}
    stored = read_sessions(connection, [uid for uid in uids if uid is not None])
    found: dict[UUID | None, Sessions | MsmError] = {
        uid: stored.get(uid, CalendarNotFound(calendar=str(uid))) for uid in uids if uid is not None
    }
    if None in uids:
        found[None] = resolve_calendars(connection, [AROUND_THE_CLOCK], as_of)[AROUND_THE_CLOCK]
    return found


def _read_groups(
    connection: Connection,
    source: Source,
    groups: Sequence[Sequence[InterpolatedAsset]],
    sessions: Mapping[UUID | None, Sessions | MsmError],
    as_of: datetime,
) -> list[Group]:
    """The bars of all groups in one statement: the assets of a calendar lie side by side in it."""
    nodes = [node for group in groups for node in group]
    since = [n.since - source.margin if n.since else None for n in nodes]
    bars = read_bars(connection, source, [n.asset_identifier for n in nodes], since, as_of) if nodes else None
    made, begin = [], 0
    for group in groups:
        assert bars is not None
        rows = slice(*np.searchsorted(bars.asset, [begin, begin + len(group)]).tolist())
        calendar = sessions[group[0].calendar_uid]
        assert isinstance(calendar, Sessions)
        made.append(Group(group, source, calendar, bars.part(rows, begin)))
        begin += len(group)
    return made


def _per_asset(made: PriceBars, read: PriceBars, assets: int) -> Iterable[Rows]:
    """Rows of each asset, as views."""
    places = np.arange(assets + 1)
    given, used = (np.searchsorted(bars.asset, places).tolist() for bars in (made, read))
    for place in range(assets):
        origin = slice(used[place], used[place + 1])
        rows = made.part(slice(given[place], given[place + 1]))
        yield Rows(rows, input_digest(read.times[origin], read.numbers["close"][origin]))


def _block(asset: str, bars: PriceBars) -> Block:
    columns = {"open_time": bars.open_times, **{name: bars.numbers[name] for name in NUMBERS}, "interpolated": bars.interpolated}
    return {"asset_identifier": Text.constant(asset, len(bars.times)), "time_index": bars.times, **columns}
