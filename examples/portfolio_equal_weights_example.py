"""An equal-weights crypto portfolio from nothing, one step per function; the two scripts beside this file put the steps in order.

    portfolio_equal_weights_prepare_schema.py   makes tables: needs a database role that may create them
    portfolio_equal_weights_run.py              fills them: writes rows only, and refuses to start where a table is missing

    ExampleDailyBars -> ExternalPrices -> InterpolatedPrices -> PortfoliosDataNode <- SignalWeights
       a producer        its storage       gaps filled          weights and values    equal weights

Every step is idempotent and tells what it did. Nothing here reads a clock: bars end on LAST, and nothing later is used.
"""

import sys
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, date, datetime
from typing import Literal

import numpy as np
import pandas as pd
from sqlalchemy import Engine, select

import msm_core
from msm_core.api import Asset, Calendar, Index, Portfolio, get_source
from msm_core.configuration import (
    BacktestingWeightsConfig,
    PortfolioBuildConfiguration,
    PortfolioConfiguration,
    PortfolioExecutionConfiguration,
    PortfolioMarketsConfig,
    PriceTypeNames,
)
from msm_core.data_nodes.base import failure_facts
from msm_core.data_nodes.interpolated_prices import InterpolatedPrices, InterpolatedPricesConfig, resolve_sources, storage_of
from msm_core.data_nodes.portfolios import PortfoliosDataNode, PortfolioWeights
from msm_core.data_nodes.prices import ExternalPrices
from msm_core.data_nodes.signals import SignalWeights
from msm_core.errors import MsmError, StorageNotPrepared
from msm_core.models import InterpolatedPricesStorage, PortfoliosStorage, PortfolioWeightsStorage
from msm_core.rebalance_strategy import ImmediateSignal
from msm_core.signals import EqualWeights
from msm_core.sources import Source
from msm_core.storage import read_progress
from msm_ray.console import configure_logging
from msm_ray.prepare import Preparation, prepare

PREPARE = "python examples/portfolio_equal_weights_prepare_schema.py"
RUN = "python examples/portfolio_equal_weights_run.py"

ASSETS = ("asset-btc", "asset-eth", "asset-sol")
CALENDAR, INDEX, PORTFOLIO = "CRYPTO_24_7", "EXAMPLE_EQUAL_WEIGHTS", "example-equal-weights"
FIRST, LAST = date(2026, 5, 1), date(2026, 7, 31)  # sessions with bars; a 24/7 session closes at 00:00 UTC of the next day
VALID_TO = date(2026, 12, 31)  # of the calendar: it must know the end of the last week, or nobody can tell that a week has ended
AS_OF = datetime(2026, 8, 1, tzinfo=UTC)  # the close of LAST


def say(step: str, text: str) -> None:
    """One line of the story on the terminal."""
    print(f"{step:<10} {text}", flush=True)


def told(rows: int) -> str:
    """What a step that writes rows has to say."""
    return f"{rows:,} rows written" if rows else "nothing new"


# -- the bars: a producer of one's own ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Story:
    """How an example asset moves.

    moves    percent from one close to the next, over and over
    listed   date of its first session
    missing  dates without a bar: it traded, and the vendor lost the bar
    """

    first_close: float
    moves: tuple[int, ...]
    listed: date = FIRST
    missing: tuple[str, ...] = ()

    def bars(self, asset: str) -> pd.DataFrame:
        """Daily bars, each stamped at its end, in the form that `publish_prices` takes; 8 decimals, as exchanges quote crypto."""
        days = pd.date_range(self.listed, LAST, tz="UTC")
        moves = np.append(0, np.resize(self.moves, len(days) - 1))
        closes = (self.first_close * np.cumprod(1 + moves / 100)).round(8)
        opens = np.append(self.first_close, closes[:-1])
        bars = {
            "asset_identifier": asset,
            "time_index": days + pd.Timedelta(days=1),
            "open_time": days,
            "open": opens,
            "high": np.maximum(opens, closes),
            "low": np.minimum(opens, closes),
            "close": closes,
            "volume": 1000.0 + 100 * np.abs(moves),
        }
        return pd.DataFrame(bars).loc[~days.isin(pd.to_datetime(self.missing, utc=True))]


STORIES = {  # btc and eth begin as in the README, so both can live in one database
    "asset-btc": Story(100.0, (10, 10, -6, -4, 3, -8, -3)),
    "asset-eth": Story(50.0, (0, 10, -4, -7, 3)),
    # listed a month later, and with three bars missing: one in a week, two around a Sunday's rebalancing
    "asset-sol": Story(20.0, (5, -10, 8, 4, -2, -3), listed=date(2026, 5, 31), missing=("2026-06-04", "2026-06-13", "2026-06-14")),
}


class ExampleDailyBars(ExternalPrices):
    """Publishes made-up bars, always the same ones. A feed of your own is such a class: `update` asks the vendor.

    A portfolio never holds it. What a configuration keeps is where the bars are, so whoever writes them may change.
    """

    kind: Literal["example_daily_bars"] = "example_daily_bars"
    asset_identifiers: tuple[Literal["asset-btc", "asset-eth", "asset-sol"], ...]

    def update(self) -> pd.DataFrame:
        return pd.concat([STORIES[asset].bars(asset) for asset in self.asset_identifiers], ignore_index=True)


# -- what is configured -------------------------------------------------------------------------------------------------------


def source_bars() -> ExampleDailyBars:
    return ExampleDailyBars(asset_identifiers=ASSETS)


def price_source() -> InterpolatedPrices:
    """The bars without gaps. Source, its cadence, frequency and rule decide which table they are kept in; the assets do not."""
    return InterpolatedPrices(
        interpolation_config=InterpolatedPricesConfig(
            asset_list=ASSETS,
            intraday_bar_interpolation_rule="ffill",
            source_price_instance=source_bars(),
            upsample_frequency_id="1d",
        )
    )


def portfolio_configuration() -> PortfolioConfiguration:
    """A third of each asset, set right again at the end of every week; published as an index, too."""
    return PortfolioConfiguration(
        portfolio_build_configuration=PortfolioBuildConfiguration(
            price_source_instance=price_source(),
            price_column=PriceTypeNames.CLOSE,
            portfolio_prices_frequency="1d",
            execution_configuration=PortfolioExecutionConfiguration(commission_fee=0.00018),
            backtesting_weights_configuration=BacktestingWeightsConfig(
                signal_weights_instance=EqualWeights(asset_list=ASSETS),
                rebalance_strategy_instance=ImmediateSignal(calendar_key=CALENDAR, rebalance_on="week_end"),
            ),
        ),
        portfolio_markets_configuration=PortfolioMarketsConfig(
            portfolio_identifier=PORTFOLIO,
            portfolio_name="Example: BTC, ETH and SOL in equal weights",
            portfolio_index_identifier=INDEX,
            signal_name="equal-weights-crypto",
        ),
    )


# -- steps of the preparation -------------------------------------------------------------------------------------------------


def prepare_static_schema(engine: Engine) -> None:
    """Registry, storages that everybody has, and their catalogue rows, from which the configured table, no part of these, is derived."""
    done = prepare(engine)
    say("static", _applied(done))
    for name in done.repaired:
        say("", f"the catalogue had no cadence for {name}; it now has what the model declares")
    say("", f"{len(msm_core.start_engine().models)} tables attached")


def read_source() -> Source:
    """Where the bars are, by the catalogue. Its uid and cadence go into the name of the table; what a model says is not asked."""
    source = get_source(price_source().source_uid)
    say("source", f"{source.identifier}: uid {source.uid}, cadence {source.cadence}, table {source.table}")
    return source


def derive_storage(source: Source) -> None:
    """The storage class of our policy over that source: the same four components always give the same name."""
    storage = storage_of(price_source(), source)
    say("storage", f"{storage.logical_name()}: class {storage.__name__}, table {storage.__tablename__}")
    for name, value in storage.__metatable_extra_hash_components__.items():
        say("", f"{name} = {value}")


def prepare_configured_storage(engine: Engine) -> None:
    """Make that table. Whether it exists is seen by looking at it: a catalogue row alone is not a table."""
    say("dynamic", _applied(prepare(engine, [price_source()])))


def _applied(done: Preparation) -> str:
    return f"applied {', '.join(done.pending)}" if done.pending else "nothing new"


# -- steps of the run ---------------------------------------------------------------------------------------------------------


def find_storage(engine: Engine) -> type[InterpolatedPricesStorage]:
    """Attach every table as it is; a run makes none. Raises StorageNotPrepared before anything is written."""
    msm_core.start_engine()
    with engine.connect() as connection:
        resolved = resolve_sources(connection, [price_source()])
    found = resolved.sources[price_source().key]
    if isinstance(found, MsmError):
        raise found
    say("prepared", f"{found.identifier} is table {found.table}")
    return resolved.storages[price_source().key]


def register_calendar() -> Calendar:
    """Sessions are stored, so that a new release of pandas_market_calendars changes nothing by itself."""
    stored = Calendar.get_or_none(unique_identifier=CALENDAR)
    covers = stored is not None and stored.valid_from <= FIRST and stored.valid_to >= VALID_TO
    calendar = stored if stored and covers else Calendar.create_from_pandas_calendar("24/7", CALENDAR, "Crypto 24/7", FIRST, VALID_TO)
    text = f"{CALENDAR}: 24/7 of pandas_market_calendars, {calendar.valid_from} to {calendar.valid_to}, uid {calendar.uid}"
    say("calendar", f"{text}, {'nothing new' if covers else 'extended' if stored else 'created'}")
    return calendar


def register_assets(calendar: Calendar) -> None:
    """Prices are keyed by assets. Their calendar says when a bar is due, so interpolation goes by it."""
    known = {asset.unique_identifier for asset in Asset.get_many(ASSETS, missing_ok=True)}
    rows = [{"unique_identifier": asset, "asset_type": "crypto", "calendar_uid": calendar.uid} for asset in ASSETS]
    for asset in Asset.upsert_many(rows):
        say("asset", f"{asset.unique_identifier}: uid {asset.uid}, {'nothing new' if asset.unique_identifier in known else 'created'}")


def register_index() -> Index:
    """A portfolio is not an asset: what others may refer to its values by is an index."""
    known = Index.get_or_none(unique_identifier=INDEX)
    index = Index.upsert(unique_identifier=INDEX, index_type="portfolio", display_name="Example equal weights")
    say("index", f"{INDEX}: uid {index.uid}, {'nothing new' if known else 'created'}")
    return index


def publish_bars() -> None:
    """Only the example publishes: a portfolio takes the bars of whoever wrote them."""
    result = source_bars().run(as_of=AS_OF)
    say("bars", f"ExampleDailyBars -> {result.identifier}: {told(result.rows)}, the newest of {result.watermark:%Y-%m-%d %H:%M}Z")


def interpolate_bars(engine: Engine, storage: type[InterpolatedPricesStorage]) -> None:
    """One node per asset, each with progress of its own: one that is listed late holds back nobody."""
    for result in price_source().run(as_of=AS_OF):
        say("prices", f"InterpolatedPrices -> {result.identifier}: {told(result.rows)}, through {result.watermark:%Y-%m-%d %H:%M}Z")
    query = select(storage.asset_identifier, storage.time_index).where(storage.interpolated.is_(True)).order_by(storage.time_index)
    with engine.connect() as connection:
        filled = [f"{asset} of {time:%Y-%m-%d}" for asset, time in connection.execute(query)]
    say("", f"{len(filled)} bars are filled from the one before, and marked so: {', '.join(filled)}")


def run_portfolio(engine: Engine, configuration: PortfolioConfiguration) -> None:
    """The signal, then the portfolio: its weights and values are one update, and land together or not at all."""
    signal = SignalWeights(signal_weights_instance=configuration.signal)
    values = PortfoliosDataNode(portfolio_configuration=configuration)
    weights = PortfolioWeights(portfolio_configuration=configuration)
    say("portfolio", f"{values.identifier} depends on {' and '.join(values.dependencies())}")
    nodes = {"SignalWeights": signal.data_node_uid, "PortfolioWeights": weights.data_node_uid, "PortfoliosDataNode": values.data_node_uid}
    before = _stored_rows(engine, list(nodes.values()))
    signal.run(as_of=AS_OF)
    values.run(update_tree=False, as_of=AS_OF)  # what it depends on has just been run
    after = _stored_rows(engine, list(nodes.values()))
    for name, uid in nodes.items():
        say("", f"{name} {uid}: {told(after[uid] - before[uid])}, {after[uid]:,} stored")


def _stored_rows(engine: Engine, nodes: list[uuid.UUID]) -> dict[uuid.UUID, int]:
    """Rows that each node has written so far, by its progress row; one that never ran has none."""
    with engine.connect() as connection:
        progress = read_progress(connection, nodes)
    return {uid: progress[uid].row_count if uid in progress else 0 for uid in nodes}


def upsert_portfolio(configuration: PortfolioConfiguration, calendar: Calendar, index: Index) -> None:
    """The identity row points at calendar, index and producers. The run has set all of it; a portfolio of another origin is set so."""
    portfolio = Portfolio.upsert(
        unique_identifier=configuration.identifier,
        calendar_uid=calendar.uid,
        portfolio_index_uid=index.uid,
        signal_weights_data_node_uid=SignalWeights(signal_weights_instance=configuration.signal).data_node_uid,
        portfolio_weights_data_node_uid=PortfolioWeights(portfolio_configuration=configuration).data_node_uid,
        portfolio_data_node_uid=PortfoliosDataNode(portfolio_configuration=configuration).data_node_uid,
    )
    say("row", f"Portfolio {portfolio.unique_identifier}: uid {portfolio.uid}")
    for name, value in portfolio.model_dump(include={n for n in Portfolio.model_fields if n.endswith("_uid")}).items():
        say("", f"{name} = {value}")
    say("", "no virtual funds: they divide the holdings of an account, and how is for its owner to say")


# -- what is stored -----------------------------------------------------------------------------------------------------------


def read_values(engine: Engine) -> pd.DataFrame:
    """close and return by time."""
    columns = (PortfoliosStorage.time_index, PortfoliosStorage.close, PortfoliosStorage.return_)
    query = select(*columns).where(PortfoliosStorage.portfolio_identifier == PORTFOLIO).order_by(PortfoliosStorage.time_index)
    with engine.connect() as connection:
        return pd.read_sql(query, connection, index_col="time_index")


def read_weights(engine: Engine) -> pd.DataFrame:
    """weight_before and weight of every trade, by time and asset."""
    table = PortfolioWeightsStorage
    query = select(table.time_index, table.asset_identifier, table.weight_before, table.weight)
    query = query.where(table.portfolio_identifier == PORTFOLIO).order_by(table.time_index, table.asset_identifier)
    with engine.connect() as connection:
        return pd.read_sql(query, connection, index_col=["time_index", "asset_identifier"])


def main_of_script(main: Callable[[], None]) -> None:
    """Errors that msm raises on purpose become one sentence and an exit code: 2 where a table is missing, 1 otherwise."""
    configure_logging(verbose=False)
    try:
        main()
    except MsmError as error:
        print(f"error: {failure_facts(error)['message']}", file=sys.stderr)
        if not isinstance(error, StorageNotPrepared):
            sys.exit(1)
        print(f"For this example: {PREPARE}", file=sys.stderr)
        sys.exit(2)
