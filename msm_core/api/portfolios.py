"""Portfolio identity rows, the text about them, and groups of them. Weights and values are histories and live in storages."""

import uuid
from collections.abc import Iterable
from typing import Self

from sqlalchemy import select

from msm_core.api import runtime, statements
from msm_core.api.base import Row
from msm_core.api.checks import refusals
from msm_core.api.fields import Json
from msm_core.models import PortfolioGroupMembershipTable, PortfolioGroupTable, PortfolioMetadataTable, PortfolioTable
from msm_core.rows import write_rows

MEMBERSHIP_KEY = ("portfolio_group_uid", "portfolio_uid")


class Portfolio(Row, table=PortfolioTable, key=("unique_identifier",)):
    """The identity of a portfolio, and nothing else: writing it makes no asset, no index and no history.

    calendar_uid         calendar whose sessions value it; `calendar_name` is the deprecated spelling, kept as given
    portfolio_index_uid  index under which values are published; None = not published
    *_data_node_uid      progress rows of what produces its signal, weights and values; set by the run that lands them
    """

    unique_identifier: str
    calendar_name: str | None = None
    calendar_uid: uuid.UUID | None = None
    portfolio_index_uid: uuid.UUID | None = None
    portfolio_weights_data_node_uid: uuid.UUID | None = None
    signal_weights_data_node_uid: uuid.UUID | None = None
    portfolio_data_node_uid: uuid.UUID | None = None
    backtest_table_price_column_name: str = "close"


class PortfolioMetadata(Row, table=PortfolioMetadataTable, key=("unique_identifier",)):
    """Text under a portfolio's unique_identifier; it may be written before the portfolio and survives it."""

    unique_identifier: str
    description: str | None = None


class PortfolioGroup(Row, table=PortfolioGroupTable, key=("unique_identifier",)):
    """A set of portfolios; `tag:NAME` selects it in a run."""

    unique_identifier: str
    display_name: str | None = None
    description: str | None = None
    metadata_json: Json | None = None

    def add_portfolios(self, identifiers: Iterable[str]) -> Self:
        """Add portfolios by unique_identifier; those already in stay. Raises RowNotFound naming unknown ones, and then adds none."""
        with refusals(PortfolioGroupMembershipTable), runtime.one_transaction(PortfolioGroupMembershipTable) as connection:
            members = self._members(Portfolio.get_many(dict.fromkeys(identifiers)))
            write_rows(connection, PortfolioGroupMembershipTable, members, key=MEMBERSHIP_KEY, update=False)
        return self

    def remove_portfolios(self, identifiers: Iterable[str]) -> int:
        """Take portfolios out of the group; the portfolios stay. Unknown ones are out already. Returns how many left."""
        with runtime.one_transaction(PortfolioGroupMembershipTable) as connection:
            members = self._members(Portfolio.get_many(identifiers, missing_ok=True))
            return statements.remove(connection, statements.table_of(PortfolioGroupMembershipTable), MEMBERSHIP_KEY, members)

    def _members(self, portfolios: Iterable[Portfolio]) -> list[dict[str, uuid.UUID]]:
        return [{"portfolio_group_uid": self.uid, "portfolio_uid": portfolio.uid} for portfolio in portfolios]

    def portfolios(self) -> list[Portfolio]:
        """Every portfolio of the group, ordered by unique_identifier."""
        member = select(PortfolioGroupMembershipTable.portfolio_uid).where(PortfolioGroupMembershipTable.portfolio_group_uid == self.uid)
        query = select(statements.table_of(PortfolioTable)).where(PortfolioTable.uid.in_(member)).order_by(PortfolioTable.unique_identifier)
        with runtime.connection(PortfolioGroupMembershipTable, PortfolioTable) as connection:
            return [Portfolio._read(row) for row in connection.execute(query).mappings()]
