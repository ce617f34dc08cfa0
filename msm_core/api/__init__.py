"""Typed rows: `from msm_core.api import Portfolio`, after `msm_core.start_engine(...)`."""

from msm_core.api.accounts import (
    Account,
    AccountAllocationModel,
    AccountGroup,
    AccountHoldingsSet,
    AccountTargetAllocation,
    PositionSet,
    VirtualFund,
    VirtualFundHoldingsSet,
)
from msm_core.api.assets import Asset, AssetType
from msm_core.api.base import Row
from msm_core.api.calendars import Calendar, CalendarDate, CalendarEvent, CalendarSession
from msm_core.api.indexes import Index, IndexType
from msm_core.api.market_metadata import RebalanceStrategyMetadata, SignalMetadata
from msm_core.api.portfolios import Portfolio, PortfolioGroup, PortfolioMetadata
from msm_core.api.runtime import Runtime, one_transaction, start_engine
from msm_core.api.sources import get_source, list_sources, register_source

__all__ = [
    "Account",
    "AccountAllocationModel",
    "AccountGroup",
    "AccountHoldingsSet",
    "AccountTargetAllocation",
    "Asset",
    "AssetType",
    "Calendar",
    "CalendarDate",
    "CalendarEvent",
    "CalendarSession",
    "Index",
    "IndexType",
    "Portfolio",
    "PortfolioGroup",
    "PortfolioMetadata",
    "PositionSet",
    "RebalanceStrategyMetadata",
    "Row",
    "Runtime",
    "SignalMetadata",
    "VirtualFund",
    "VirtualFundHoldingsSet",
    "get_source",
    "list_sources",
    "one_transaction",
    "register_source",
    "start_engine",
]
