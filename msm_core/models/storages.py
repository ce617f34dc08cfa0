"""The time-indexed storages: the static ones, and interpolated prices, one table per policy. `prepare` makes all of them."""

import functools
import threading
import uuid
from collections.abc import Mapping
from datetime import datetime
from typing import Any, ClassVar

from sqlalchemy import Boolean, CheckConstraint, Float, MetaData
from sqlalchemy.orm import Mapped, MappedColumn

from msm_core.identity import identity, logical_identifier
from msm_core.models.base import LOADED_NAMESPACE, NAMING, Identifier, StorageTable, column, instant

FINITE = "{0} > '-Infinity' AND {0} < 'Infinity'"  # NaN sorts above Infinity in Postgres, so this refuses it too
COMPONENTS = ("source_time_index_meta_table_uid", "source_cadence", "upsample_frequency_id", "intraday_bar_interpolation_rule")
DEFINING = threading.Lock()  # a table is defined once in a process
DIGEST_CHARS = 16  # of the policy, in the names of its storage; `prepare` and the runtime refuse two policies of one name
POSITIVE = "{0} > 0 AND {0} < 'Infinity'"


def _time_index(comment: str) -> MappedColumn[datetime]:
    return instant(comment, primary_key=True)


def _key(comment: str) -> MappedColumn[str]:
    return column(Identifier(), comment, primary_key=True)


def _number(comment: str, name: str | None = None, nullable: bool = True) -> MappedColumn[Any]:
    return column(Float(53), comment, name=name, nullable=nullable)


class PriceBarsStorage(StorageTable):
    """Price bars at the price grain. Kept physically by (asset, time), as they are read."""

    __abstract__ = True
    __scope__ = "asset_identifier"
    asset_identifier: Mapped[str] = _key("Asset.unique_identifier")
    time_index: Mapped[datetime] = _time_index("end of the bar, UTC")
    open_time: Mapped[datetime | None] = instant("start of the bar, UTC")
    open: Mapped[float | None] = _number("first price")
    high: Mapped[float | None] = _number("highest price")
    low: Mapped[float | None] = _number("lowest price")
    close: Mapped[float | None] = _number("last price")
    volume: Mapped[float | None] = _number("traded quantity, in the same share unit as the price")
    trade_count: Mapped[float | None] = _number("number of trades")
    vwap: Mapped[float | None] = _number("volume-weighted average price")
    interpolated: Mapped[bool | None] = column(Boolean, "made by an interpolation policy, not observed")


class ExternalPricesStorage(PriceBarsStorage):
    """Price bars published by anyone."""

    __concept__ = "ExternalPrices"
    __storage_kind__ = "prices"
    __cadence__ = "1d"


class InterpolatedPricesStorage(PriceBarsStorage):
    """Bars of a source under one interpolation policy, without gaps. The policy names the table and stands in no row of it.

    `configured` makes the class of one policy. Their tables are no part of the static schema: they have a MetaData of their own.
    """

    __abstract__ = True
    __storage_kind__ = "interpolated_prices"
    __metatable_extra_hash_components__: ClassVar[dict[str, str]]
    metadata = MetaData(naming_convention=NAMING)

    @classmethod
    def logical_name(cls) -> str:
        return logical_identifier(f"InterpolatedPricesTS.{cls.__concept__.rpartition('_')[2]}", LOADED_NAMESPACE)

    @staticmethod
    def configured(
        source_time_index_meta_table_uid: uuid.UUID, source_cadence: str, upsample_frequency_id: str, intraday_bar_interpolation_rule: str
    ) -> "type[InterpolatedPricesStorage]":
        """The storage of a policy: these four make its identity, and nothing else does."""
        policy = (source_cadence, upsample_frequency_id, intraday_bar_interpolation_rule)
        with DEFINING:
            return _configured(str(source_time_index_meta_table_uid), *policy)

    @classmethod
    def configured_by(cls, components: Mapping[str, str]) -> "type[InterpolatedPricesStorage]":
        """The storage of the identity components that a catalogue row holds."""
        uid, *policy = (components[name] for name in COMPONENTS)
        return cls.configured(uuid.UUID(uid), *policy)


@functools.cache
def _configured(*values: str) -> type[InterpolatedPricesStorage]:
    components = dict(zip(COMPONENTS, values, strict=True))
    digest = identity({"kind": "interpolated_prices_storage", **components})[:DIGEST_CHARS]
    source, cadence, frequency, rule = values
    members = {
        "__doc__": f"Bars of source {source} ({cadence}) at {frequency}, gaps: {rule}.",
        "__concept__": f"InterpolatedPrices_{digest}",
        "__cadence__": frequency,
        "__metatable_extra_hash_components__": components,
        "__module__": __name__,
    }
    return type(f"InterpolatedPricesStorage_{digest}", (InterpolatedPricesStorage,), members)


class SignalWeightsStorage(StorageTable):
    """Complete allocation vectors: an asset absent from a vector has target 0."""

    __concept__ = "SignalWeights"
    __storage_kind__ = "signal_weights"
    __scope__ = "signal_uid"
    __table_args__ = (CheckConstraint(FINITE.format("signal_weight"), name="finite"),)
    signal_uid: Mapped[str] = _key("identity of the signal")
    time_index: Mapped[datetime] = _time_index("emission: the vector is known from here on, UTC")
    asset_identifier: Mapped[str] = _key("Asset.unique_identifier")
    signal_weight: Mapped[float] = _number("target weight; negative is short", nullable=False)


class PortfolioWeightsStorage(StorageTable):
    """One complete vector per event at which something traded; nothing between events."""

    __concept__ = "PortfolioWeights"
    __storage_kind__ = "portfolio_weights"
    __scope__ = "portfolio_identifier"
    __table_args__ = (CheckConstraint(FINITE.format("weight") + " AND " + FINITE.format("weight_before"), name="finite"),)
    portfolio_identifier: Mapped[str] = _key("Portfolio.unique_identifier")
    time_index: Mapped[datetime] = _time_index("the event, UTC")
    asset_identifier: Mapped[str] = _key("Asset.unique_identifier")
    weight: Mapped[float] = _number("weight after the trade; 0 = sold", nullable=False)
    weight_before: Mapped[float] = _number("weight before the trade", nullable=False)
    price_current: Mapped[float | None] = _number("price traded at")
    price_before: Mapped[float | None] = _number("price at the event that struck the position; null where there was none")
    volume_current: Mapped[float | None] = _number("volume of the bar; null where the source has none")
    volume_before: Mapped[float | None] = _number("volume at the event that struck the position")


class PortfolioRebalanceStateStorage(StorageTable):
    """What a portfolio has still to do at its watermark: the unfinished part of its order, replaced with every update."""

    __concept__ = "PortfolioRebalanceState"
    __storage_kind__ = "rebalance_state"
    __scope__ = "portfolio_identifier"
    portfolio_identifier: Mapped[str] = _key("Portfolio.unique_identifier")
    time_index: Mapped[datetime] = _time_index("watermark of the portfolio, UTC")
    asset_identifier: Mapped[str] = _key("Asset.unique_identifier")
    target_weight: Mapped[float | None] = _number("weight that is still to be reached; null = nothing is to be done")
    active_from: Mapped[datetime | None] = instant("instant from which the order is active, UTC")
    used_weight: Mapped[float] = _number("sum of weight changes in the session of time_index", nullable=False)


class PortfoliosStorage(StorageTable):
    """One row per valuation time."""

    __concept__ = "Portfolios"
    __storage_kind__ = "portfolios"
    __scope__ = "portfolio_identifier"
    __table_args__ = (CheckConstraint(POSITIVE.format("close") + " AND " + POSITIVE.format("calculated_close"), name="positive"),)
    portfolio_identifier: Mapped[str] = _key("Portfolio.unique_identifier")
    time_index: Mapped[datetime] = _time_index("valuation time: a session close, UTC")
    close: Mapped[float] = _number("published value; starts from 1.0 before the first purchase", nullable=False)
    return_: Mapped[float] = _number("close / previous close - 1, fees included", "return", nullable=False)
    calculated_close: Mapped[float] = _number(
        "computed value, on which the recursion runs; differs from close under an override asset", nullable=False
    )
    close_time: Mapped[datetime] = instant("the same instant as time_index", nullable=False)


class PortfolioIndexValuesStorage(StorageTable):
    """Optional publication of a portfolio's values under an index."""

    __concept__ = "PortfolioIndexValues"
    __storage_kind__ = "portfolio_index"
    __scope__ = "portfolio_index_identifier"
    __table_args__ = (CheckConstraint(POSITIVE.format("close"), name="positive"),)
    portfolio_index_identifier: Mapped[str] = _key("Index.unique_identifier")
    time_index: Mapped[datetime] = _time_index("valuation time, UTC")
    close: Mapped[float] = _number("published value", nullable=False)
    return_: Mapped[float] = _number("close / previous close - 1", "return", nullable=False)
    close_time: Mapped[datetime] = instant("the same instant as time_index", nullable=False)


STORAGES: tuple[type[StorageTable], ...] = (
    ExternalPricesStorage,
    SignalWeightsStorage,
    PortfolioWeightsStorage,
    PortfoliosStorage,
    PortfolioIndexValuesStorage,
    PortfolioRebalanceStateStorage,
)
