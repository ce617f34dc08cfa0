"""SQLAlchemy tables: the registry, the catalogue and ledger, the storages."""

from msm_core.models.assets import AssetTable, AssetTypeTable, IndexTable, IndexTypeTable
from msm_core.models.base import LOADED_NAMESPACE, MetaTable, RegistryTable, StorageTable
from msm_core.models.calendars import CalendarDateTable, CalendarEventTable, CalendarSessionTable, CalendarTable
from msm_core.models.operations import DataNodeUpdateTable, RunNodeTable, RunTable, TimeIndexMetaTable
from msm_core.models.portfolios import (
    PortfolioConfigurationTable,
    PortfolioGroupMembershipTable,
    PortfolioGroupTable,
    PortfolioMetadataTable,
    PortfolioTable,
    RebalanceStrategyMetadataTable,
    SignalMetadataTable,
)
from msm_core.models.storages import (
    STORAGES,
    ExternalPricesStorage,
    InterpolatedPricesStorage,
    PortfolioIndexValuesStorage,
    PortfolioRebalanceStateStorage,
    PortfoliosStorage,
    PortfolioWeightsStorage,
    SignalWeightsStorage,
)

__all__ = [
    "LOADED_NAMESPACE",
    "STORAGES",
    "AssetTable",
    "AssetTypeTable",
    "CalendarDateTable",
    "CalendarEventTable",
    "CalendarSessionTable",
    "CalendarTable",
    "DataNodeUpdateTable",
    "ExternalPricesStorage",
    "IndexTable",
    "IndexTypeTable",
    "InterpolatedPricesStorage",
    "MetaTable",
    "PortfolioConfigurationTable",
    "PortfolioGroupMembershipTable",
    "PortfolioGroupTable",
    "PortfolioIndexValuesStorage",
    "PortfolioMetadataTable",
    "PortfolioRebalanceStateStorage",
    "PortfolioTable",
    "PortfolioWeightsStorage",
    "PortfoliosStorage",
    "RebalanceStrategyMetadataTable",
    "RegistryTable",
    "RunNodeTable",
    "RunTable",
    "SignalMetadataTable",
    "SignalWeightsStorage",
    "StorageTable",
    "TimeIndexMetaTable",
]
