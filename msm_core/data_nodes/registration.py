"""The identity rows that portfolios need before they can be computed, and their stored, versioned configurations."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from psycopg import sql
from pydantic import ValidationError
from sqlalchemy import Connection

from msm_core.configuration import PortfolioConfiguration
from msm_core.copying import fetch
from msm_core.data_nodes.base import failure_facts
from msm_core.data_nodes.portfolios import portfolio_scopes
from msm_core.errors import ConfigurationError, IndexTaken, MsmError
from msm_core.garbage import collecting_seldom
from msm_core.models import (
    IndexTable,
    PortfolioConfigurationTable,
    PortfolioGroupMembershipTable,
    PortfolioGroupTable,
    PortfolioMetadataTable,
    PortfolioTable,
    RebalanceStrategyMetadataTable,
    SignalMetadataTable,
    SignalWeightsStorage,
)
from msm_core.rows import upsert_rows, write_rows
from msm_core.storage import Scope, ensure_progress, find_calendars

Version = tuple[int, dict[str, Any]]  # number and document of a stored configuration


def register_portfolios(connection: Connection, configurations: Sequence[PortfolioConfiguration]) -> int:
    """Upsert what `configurations` need, in a fixed number of statements; returns how many configurations are new or changed.

    A changed configuration becomes a new version beside the old ones. Only identity and description are written, never history.
    Raises ConfigurationError for a portfolio given twice, IndexTaken for an index published by two.
    """
    _check_unique(configurations)
    _check_publishers(connection, configurations)
    _upsert_metadata(connection, configurations)
    stored = _newest_versions(connection, [c.identifier for c in configurations])
    portfolios = _upsert_portfolios(connection, configurations, stored)
    _upsert_groups(connection, configurations, portfolios)
    ensure_progress(connection, [s for c in configurations for s in (*portfolio_scopes(c), Scope(SignalWeightsStorage, c.signal_uid))])
    return _store_versions(connection, configurations, portfolios, stored)


class StoredFleet(NamedTuple):
    """What `prepare` stored: configurations in order of identifier, and what is wrong with those that cannot be read any more.

    A kind whose plugin is gone makes its own portfolios unreadable, and nobody else's.
    """

    configurations: list[PortfolioConfiguration]
    unreadable: dict[str, dict[str, str]]


@collecting_seldom()
def read_configurations(connection: Connection) -> StoredFleet:
    """The newest configuration of every stored portfolio; all of them, whatever their number.

    Their identities are those that were stored with them (`verify` works them out anew): hashing took a third of a night's planning.
    """
    statement = sql.SQL("""
        SELECT DISTINCT ON (p.unique_identifier) p.unique_identifier, c.configuration, c.configuration_hash, c.signal_uid
        FROM {configuration} c JOIN {portfolio} p ON p.uid = c.portfolio_uid
        ORDER BY p.unique_identifier, c.version DESC
    """).format(configuration=_name(PortfolioConfigurationTable), portfolio=_name(PortfolioTable))
    fleet = StoredFleet([], {})
    for identifier, stored, configuration_hash, signal_uid in fetch(connection, statement, {}):
        try:
            configuration = PortfolioConfiguration.model_validate(stored)
        except (MsmError, ValidationError) as error:
            fleet.unreadable[identifier] = failure_facts(error)
            continue
        configuration.identified(configuration_hash, signal_uid)
        fleet.configurations.append(configuration)
    return fleet


def _check_unique(configurations: Sequence[PortfolioConfiguration]) -> None:
    identifiers: set[str] = set()
    publishers: dict[str, str] = {}
    for c in configurations:
        if c.identifier in identifiers:
            raise ConfigurationError(problems=f"portfolio {c.identifier} is configured twice")
        identifiers.add(c.identifier)
        if c.index_identifier and publishers.setdefault(c.index_identifier, c.identifier) != c.identifier:
            raise IndexTaken(index=c.index_identifier, first=publishers[c.index_identifier], second=c.identifier)


def _check_publishers(connection: Connection, configurations: Sequence[PortfolioConfiguration]) -> None:
    """An index that a stored portfolio publishes may be taken over only together with that portfolio's giving it up."""
    publishers = {c.index_identifier: c.identifier for c in configurations if c.index_identifier}
    statement = sql.SQL("""
        SELECT i.unique_identifier, p.unique_identifier FROM {portfolio} p JOIN {index} i ON i.uid = p.portfolio_index_uid
        WHERE i.unique_identifier = ANY(%(indexes)s) AND p.unique_identifier <> ALL(%(here)s)
    """).format(portfolio=_name(PortfolioTable), index=_name(IndexTable))
    here = [c.identifier for c in configurations]
    for index, owner in fetch(connection, statement, {"indexes": list(publishers), "here": here}):
        raise IndexTaken(index=index, first=owner, second=publishers[index])


def _upsert_metadata(connection: Connection, configurations: Sequence[PortfolioConfiguration]) -> None:
    signals = {c.signal_uid: c.portfolio_markets_configuration.signal_name or c.signal.explanation() for c in configurations}
    rows = [{"signal_uid": uid, "signal_description": name} for uid, name in signals.items()]
    write_rows(connection, SignalMetadataTable, rows, key=("signal_uid",))
    strategies = {c.rebalance.uid: c.rebalance.model_dump(mode="json", exclude_none=True) for c in configurations}
    rows = [{"rebalance_strategy_uid": uid, "configuration_json": dump} for uid, dump in strategies.items()]
    write_rows(connection, RebalanceStrategyMetadataTable, rows, key=("rebalance_strategy_uid",))
    described = [(c.identifier, c.portfolio_markets_configuration) for c in configurations]
    rows = [
        {"unique_identifier": i, "description": m.description or m.portfolio_name}
        for i, m in described
        if m.description or m.portfolio_name
    ]
    write_rows(connection, PortfolioMetadataTable, rows, key=("unique_identifier",))


def _upsert_portfolios(
    connection: Connection, configurations: Sequence[PortfolioConfiguration], stored: Mapping[str, Version]
) -> dict[str, object]:
    """Portfolio rows by identifier -> uid. The calendar is linked when it is stored and unambiguous; an index given up is unlinked."""
    found = find_calendars(connection, {c.rebalance.calendar_key for c in configurations})
    calendars = {key: matches[0][1] for key, matches in found.items() if len(matches) == 1}
    names = sorted({c.index_identifier for c in configurations if c.index_identifier})
    rows = [{"unique_identifier": name, "index_type": "portfolio", "display_name": name} for name in names]
    found_indexes = upsert_rows(connection, IndexTable, rows, key=("unique_identifier",), update=False)
    indexes = {row["unique_identifier"]: row["uid"] for row in found_indexes}
    rows = []
    for c in configurations:
        row: dict[str, object] = {"unique_identifier": c.identifier, "backtest_table_price_column_name": c.price_column}
        if calendar := calendars.get(c.rebalance.calendar_key):
            row["calendar_uid"] = calendar
        if c.index_identifier:
            row["portfolio_index_uid"] = indexes[c.index_identifier]
        elif c.identifier in stored and stored[c.identifier][1]["portfolio_markets_configuration"]["portfolio_index_identifier"]:
            row["portfolio_index_uid"] = None
        rows.append(row)
    return {r["unique_identifier"]: r["uid"] for r in upsert_rows(connection, PortfolioTable, rows, key=("unique_identifier",))}


def _upsert_groups(connection: Connection, configurations: Sequence[PortfolioConfiguration], portfolios: dict[str, object]) -> None:
    """A tag is a portfolio group."""
    tags = {(tag, c.identifier) for c in configurations for tag in c.portfolio_markets_configuration.tags}
    rows = [{"unique_identifier": tag} for tag in {tag for tag, _ in tags}]
    groups = {r["unique_identifier"]: r["uid"] for r in upsert_rows(connection, PortfolioGroupTable, rows, key=("unique_identifier",))}
    rows = [{"portfolio_group_uid": groups[tag], "portfolio_uid": portfolios[i]} for tag, i in sorted(tags)]
    write_rows(connection, PortfolioGroupMembershipTable, rows, key=("portfolio_group_uid", "portfolio_uid"))


def _newest_versions(connection: Connection, identifiers: Sequence[str]) -> dict[str, Version]:
    statement = sql.SQL("""
        SELECT DISTINCT ON (p.unique_identifier) p.unique_identifier, c.version, c.configuration
        FROM {configuration} c JOIN {portfolio} p ON p.uid = c.portfolio_uid
        WHERE p.unique_identifier = ANY(%(identifiers)s) ORDER BY p.unique_identifier, c.version DESC
    """).format(configuration=_name(PortfolioConfigurationTable), portfolio=_name(PortfolioTable))
    found = fetch(connection, statement, {"identifiers": list(identifiers)})
    return {identifier: (version, document) for identifier, version, document in found}


def _store_versions(
    connection: Connection,
    configurations: Sequence[PortfolioConfiguration],
    portfolios: Mapping[str, object],
    stored: Mapping[str, Version],
) -> int:
    rows = []
    for c in configurations:
        version, newest = stored.get(c.identifier, (0, None))
        document = c.model_dump(mode="json")
        if document != newest:
            hashes = {"configuration_hash": c.configuration_hash, "signal_uid": c.signal_uid}
            rows.append({"portfolio_uid": portfolios[c.identifier], "version": version + 1, "configuration": document, **hashes})
    write_rows(connection, PortfolioConfigurationTable, rows, key=("portfolio_uid", "version"), update=False)
    return len(rows)


def _name(table: type) -> sql.Identifier:
    return sql.Identifier(table.__tablename__)
