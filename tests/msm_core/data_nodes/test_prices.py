"""Bars from frames: published whole or not at all, checked, and again without a write."""

from datetime import datetime
from typing import Any, Literal

import numpy as np
import pandas as pd
import pytest
from sqlalchemy import Engine

import msm_core
from msm_core.data_nodes.prices import APIDataNode, ExternalPrices, publish_prices
from msm_core.errors import InvalidFrame, NaiveTimestamp, StorageNotPrepared, UnknownAssets
from msm_core.models import ExternalPricesStorage
from msm_core.price_sources import PRICE_SOURCES
from tests import factories

PRICES = ExternalPricesStorage.__tablename__


def frame(*bars: tuple[Any, ...], columns: tuple[str, ...] = ("close",)) -> pd.DataFrame:
    """`frame(("A", "2024-01-02 21:00Z", 1.5))`."""
    made = pd.DataFrame(bars, columns=["asset_identifier", "time_index", *columns])
    return made.assign(time_index=pd.to_datetime(made["time_index"], utc=True, format="ISO8601"))


def stored(engine: Engine, columns: str = "close") -> list[tuple[Any, ...]]:
    query = f"SELECT asset_identifier, to_char(time_index, 'MM-DD HH24:MI'), {columns} FROM {PRICES} ORDER BY 1, 2"
    return factories.sql(engine, query)


@pytest.fixture
def market(engine: Engine) -> Engine:
    factories.register_assets(engine, ["A", "B"])
    return engine


def test_bars_are_inserted_corrected_and_left_alone(market):
    """Breaks: a nightly load rewrites the history, a correction is lost, or a column that is not given is wiped."""
    bars = [("B", "2024-01-02 21:00Z", 2.0, 7.0), ("A", "2024-01-02 21:00Z", 1.0, np.nan), ("A", "2024-01-03 21:00Z", 1.5, 9.0)]
    assert publish_prices(market, frame(*bars, columns=("close", "volume"))) == 3
    before = factories.versions(market, [PRICES])
    assert publish_prices(market, frame(*bars[::-1], columns=("close", "volume"))) == 0
    assert factories.versions(market, [PRICES]) == before
    assert publish_prices(market, frame(("A", "2024-01-03 21:00Z", 1.6), ("A", "2024-01-02 21:00Z", 1.0))) == 1
    assert stored(market, "close, volume, interpolated") == [
        ("A", "01-02 21:00", 1.0, None, False),  # NaN is null
        ("A", "01-03 21:00", 1.6, 9.0, False),
        ("B", "01-02 21:00", 2.0, 7.0, False),
    ]


def test_a_bar_that_was_made_up_is_observed_now(market):
    """Breaks: a bar that somebody published stays marked as interpolated."""
    columns = "asset_identifier, time_index, close, interpolated"
    factories.sql(market, f"INSERT INTO {PRICES} ({columns}) VALUES ('A', '2024-01-02 21:00Z', 1, true)")
    assert publish_prices(market, frame(("A", "2024-01-02 21:00Z", 1.0))) == 1
    assert publish_prices(market, frame(("A", "2024-01-02 21:00Z", 1.0))) == 0
    assert stored(market, "interpolated") == [("A", "01-02 21:00", False)]


@pytest.mark.parametrize(
    ("column", "value", "told"),
    [
        ("close", 0.0, "close of B at 2024-01-03 21:00Z is 0.0; a price must be finite and above 0"),
        ("vwap", -1.5, "vwap of B at 2024-01-03 21:00Z is -1.5"),
        ("open", np.inf, "open of B at 2024-01-03 21:00Z is inf"),
        ("volume", -1.0, "volume of B at 2024-01-03 21:00Z is -1.0; volume must be finite and 0 or more"),
        ("trade_count", np.inf, "trade_count of B at 2024-01-03 21:00Z is inf"),
    ],
)
def test_a_value_that_is_no_price_is_named_and_nothing_is_stored(market, column, value, told):
    """Breaks: a wrong price is found by the portfolios, one night later, instead of by whoever loads it."""
    with pytest.raises(InvalidFrame) as caught:
        publish_prices(market, frame(("A", "2024-01-02 21:00Z", 1.0), ("B", "2024-01-03 21:00Z", value), columns=(column,)))
    assert told in str(caught.value)
    assert stored(market) == []


@pytest.mark.parametrize(
    ("bars", "told"),
    [
        (frame(("A", "2024-01-02 21:00Z", 1.0), ("A", "2024-01-02T22:00+01:00", 2.0)), "A has two bars at 2024-01-02 21:00Z"),
        (frame(("A", None, 1.0)), "row 0 has no asset_identifier"),
        (frame(("A", "2024-01-02 21:00Z", 1.0), (None, "2024-01-02 21:00Z", 1.0)), "row 1 has no asset_identifier"),
        (frame((5, "2024-01-02 21:00Z", 1.0)), "a text"),
        (frame(("A", "2024-01-02 21:00Z", 1.0), columns=("last",)), "last"),
        (frame(("A", "2024-01-02 21:00Z", 1.0)).assign(time_index=pd.Timestamp("2024-01-02")), "aware"),
        (frame(("Z", "2024-01-02 21:00Z", 1.0), ("A", "2024-01-02 21:00Z", 1.0)), "Z not registered"),
    ],
)
def test_a_frame_that_is_no_bars_is_refused(market, bars, told):
    """Breaks: a bar without an asset lands under another one's name, or half a frame is stored."""
    with pytest.raises((InvalidFrame, UnknownAssets), match=told):
        publish_prices(market, bars)
    assert stored(market) == []


# -- a producer of one's own --------------------------------------------------------------------------------------------------


class Vendor(ExternalPrices):
    """Two bars, of which the second is one day later."""

    kind: Literal["vendor"] = "vendor"
    close: float = 1.0

    def update(self) -> pd.DataFrame:
        return frame(("A", "2024-01-02 21:00Z", self.close), ("A", "2024-01-03 21:00Z", self.close + 1))


def test_a_producer_publishes_once_and_up_to_its_as_of(market):
    """Breaks: rerunning a producer writes, or a rerun of an old day sees what came later."""
    msm_core.start_engine()
    vendor = Vendor()
    first = vendor.run(as_of=factories.instant("2024-01-03"))
    assert (first.kind, first.identifier, first.status, first.rows) == ("prices", "ExternalPricesTS", "landed", 1)
    assert first.watermark == factories.instant("2024-01-02 21:00")
    assert (vendor.run().status, vendor.run(False, False, True).status) == ("landed", "up_to_date")
    assert stored(market) == [("A", "01-02 21:00", 1.0), ("A", "01-03 21:00", 2.0)]
    with pytest.raises(NaiveTimestamp):
        vendor.run(as_of=datetime(2024, 1, 3))


def test_a_configuration_never_holds_a_producer():
    """Breaks: a portfolio is named after who wrote its prices, or a configuration makes a worker run a vendor's code."""
    pointer = APIDataNode.build_from_identifier("ExternalPricesTS")
    assert Vendor(close=2.0).pointer == pointer
    assert "vendor" not in PRICE_SOURCES.classes
    made = factories.portfolio("p", factories.fixed(A=1.0)).portfolio_build_configuration.model_copy()
    assert type(made).model_validate({**dict(made), "price_source_instance": Vendor()}).price_source_instance == pointer


def test_a_producer_is_not_asked_before_the_tables_are_there(empty_engine, monkeypatch):
    """Breaks: an hour of downloads, and then nowhere to put them."""
    monkeypatch.setattr(Vendor, "update", lambda self: pytest.fail("asked"))
    with pytest.raises(StorageNotPrepared):
        Vendor().run()


def test_without_update_it_says_so(market):
    """Breaks: a base class that lands nothing and calls it done."""
    with pytest.raises(NotImplementedError):
        ExternalPrices().run()
