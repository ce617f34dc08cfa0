"""What nodes are given: prices read once for all who need them, in few statements; assets that are delisted; rates of cash."""

from collections.abc import Sequence
from datetime import date, timedelta
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import pytest
from sqlalchemy import Engine

from msm_core.alignment import Market, PriceAlignmentPolicy
from msm_core.api import Asset
from msm_core.configuration import CashRate, PortfolioConfiguration
from msm_core.data_nodes import markets
from msm_core.data_nodes.calendars import resolve_calendars
from msm_core.data_nodes.markets import read_markets
from msm_core.data_nodes.prices import APIDataNode
from msm_core.database import transaction
from msm_core.signals.base import Signal
from msm_core.sources import delistings, find_sources, read_assets, read_prices
from tests import factories, mixed
from tests.factories import CALENDAR, equal, fixed, messages, portfolio, run, sql, statuses
from tests.mixed import BENCH, DAILY, END, NINE, bits, inverse, landed, momentum, nightly, replicator, vectors, wipe

scheduled, strangers = factories.scheduled, mixed.strangers


def closes(engine: Engine, identifier: str) -> list[float]:
    return factories.values(engine, identifier)["close"].tolist()


def prices(**columns: Sequence[float]) -> pd.DataFrame:
    """Closes by asset, one per session from Tuesday 2024-01-02."""
    return pd.DataFrame(columns, factories.closes_of("2024-01-02", len(next(iter(columns.values())))), dtype=float)


# -- statements ---------------------------------------------------------------------------------------------------------------------


def sent_by(engine: Engine, fleet: Sequence[PortfolioConfiguration], as_of: Any) -> int:
    with factories.statements() as sent:
        report = landed(engine, fleet, as_of, registered=True, batch_size=64)
    assert set(statuses(report).values()) == {"landed"}
    assert set(statuses(report, "signal").values()) == {"landed"}
    return len([s for s in sent if s != ";"])  # not the pool's pings


def many(make: Any) -> list[PortfolioConfiguration]:
    return [portfolio(f"p{i:03}", make(i), lag=i % 3) for i in range(30)]


@pytest.mark.parametrize(
    "make",
    [
        lambda i: inverse(window=2 + i, asset_list=NINE[: 2 + i % 7]),
        lambda i: momentum(lookback_sessions=3 + i),
        lambda i: replicator(20 + i, asset=BENCH, assets=NINE[: 2 + i % 3]),
    ],
    ids=["inverse volatility", "momentum", "replicators of an asset"],
)
def test_statements_do_not_depend_on_the_number_of_signals_portfolios_and_assets(engine, make):  # R100
    """Three signals of one source and thirty: the same statements, in a first run and in the night after it."""
    market = mixed.open_market(engine, count=60)
    fleet = many(make)
    factories.register(engine, fleet)
    few, all_ = (sent_by(engine, part, market.index[-3]) for part in (fleet[:3], fleet[3:]))
    assert few == all_
    few, all_ = (sent_by(engine, part, market.index[-2]) for part in (fleet[:3], fleet[3:]))
    assert few == all_ < 60


def test_statements_do_not_depend_on_how_many_track_a_portfolio(engine):  # R100
    market = mixed.open_market(engine, count=60)
    tracked = [portfolio(f"t{i:02}", inverse(window=2 + i)) for i in range(20)]
    copies = [portfolio(f"c{i:02}", replicator(12, portfolio=f"t{i:02}")) for i in range(20)]
    factories.register(engine, tracked + copies)
    few, all_ = (sent_by(engine, [*tracked[part], *copies[part]], market.index[-3]) for part in (slice(0, 3), slice(3, 20)))
    assert few == all_


# -- read once ----------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str, int, Any]]:
    """(source, column, assets, since) of each block of prices that is asked for; nothing is kept from one to the next."""
    found: list[tuple[str, str, int, Any]] = []

    def read(world: Any, connection: Any, source: Any, column: str, assets: Any, since: Any, *rest: Any) -> Any:
        found.append((source.identifier, column, len(assets), since))
        return read_prices(connection, source, column, assets, since, *rest)

    monkeypatch.setattr(markets.KEPT, "read", read)
    monkeypatch.setattr(markets.KeptMarkets, "of", lambda *_: markets.KeptMarkets())
    return found


def test_signals_of_one_source_read_it_once_and_no_further_back_than_they_must(engine, reads):
    market = mixed.open_market(engine, count=40)
    signals: list[Signal] = [inverse(5), inverse(9, asset_list=NINE[:4]), momentum(lookback_sessions=12)]
    fleet = [portfolio(f"p{i}", signal) for i, signal in enumerate(signals)]
    landed(engine, fleet, market.index[29])
    assert reads == [("ExternalPricesTS", "close", 9, None)] * 2  # once for the signals, once for the portfolios
    reads.clear()
    landed(engine, fleet, market.index[31])
    (_, _, _, since), (_, _, _, since_portfolio) = reads
    # the longest window has 13 closes; of the first new vector, that of row 30, they are those of rows 18 to 30
    assert market.index[14] < since <= market.index[18]
    assert since_portfolio == market.index[29]


def test_a_source_that_cannot_be_read_fails_those_who_need_it(engine):
    market = mixed.open_market(engine, count=20)
    good, bad = (mixed.register_table(engine, name, close=market) for name in ("good", "bad"))
    sql(engine, "ALTER TABLE bad DROP CONSTRAINT bad_pkey")
    sql(engine, "INSERT INTO bad SELECT * FROM bad WHERE asset_identifier = 'a3' LIMIT 1")
    fleet = [
        portfolio("p", inverse(price_source=bad)),
        portfolio("q", inverse(price_source=good)),
        portfolio("r", equal(*NINE), prices=bad),
        portfolio("s", inverse(price_source=bad, asset_list=("a0",))),
        portfolio("t", equal(*NINE), prices=good),
    ]
    report = run(engine, fleet, END)
    assert statuses(report) == {"p": "skipped", "q": "landed", "r": "failed", "s": "skipped", "t": "landed"}
    assert "a3 has two bars at one time" in messages(report)["p"]
    alone = run(engine, [fleet[3]], END)  # of a0 alone, nothing is wrong; one weight of one asset is the whole
    assert statuses(alone) == {"s": "landed"}


def test_a_calendar_that_is_not_there_fails_those_who_need_it(engine):
    mixed.open_market(engine, count=20)
    fleet = [portfolio("p", inverse(calendar_key="NOWHERE")), portfolio("q", inverse()), portfolio("r", equal(*NINE), calendar="NOWHERE")]
    report = run(engine, fleet, END)
    assert statuses(report) == {"p": "skipped", "q": "landed", "r": "failed"}
    assert "NOWHERE" in messages(report)["p"]


def test_a_signal_of_a_source_that_is_not_registered_fails_alone(engine):
    mixed.open_market(engine, count=20)
    stranger = APIDataNode.build_from_identifier("nobody.bars")
    fleet = [portfolio("p", inverse(price_source=stranger)), portfolio("q", inverse()), portfolio("r", inverse(price_column="bid"))]
    plan = {p.identifier: p.error and p.error["reason"] for p in factories.plan(engine, fleet, END).signals if p.error}
    assert plan == {fleet[0].signal_uid: "source_not_registered", fleet[2].signal_uid: "source_unusable"}
    report = run(engine, fleet, END)
    assert statuses(report) == {"p": "skipped", "q": "landed", "r": "skipped"}
    assert "no numeric column 'bid'" in messages(report)["r"]


def test_bars_labelled_by_their_date_are_known_at_the_close(engine):
    """The same prices, stamped at midnight of their session: the same vectors, night by night, and never a day early."""
    market = mixed.open_market(engine, count=20)
    dated = mixed.register_table(engine, "dated", close=market.set_axis(market.index.normalize()))
    sql(engine, "UPDATE msm__time_index_meta_table SET time_label = 'session_date' WHERE identifier = 'dated'")
    stamped, labelled = inverse(), inverse(price_source=dated)
    fleet = [portfolio("p", stamped), portfolio("q", labelled)]
    for night in pd.date_range("2024-01-08 12:00", periods=12, freq="31h", tz="UTC"):
        landed(engine, fleet, night)
        assert len(vectors(engine, stamped.uid)) == len(vectors(engine, labelled.uid))
    landed(engine, fleet)
    pd.testing.assert_frame_equal(vectors(engine, stamped.uid), vectors(engine, labelled.uid), check_exact=True)


# -- delisting ----------------------------------------------------------------------------------------------------------------------


def delist(asset: str, day: str | None) -> None:
    Asset.upsert(unique_identifier=asset, delisted_on=None if day is None else date.fromisoformat(day))


@pytest.fixture
def started(engine: Engine) -> Engine:
    from msm_core import start_engine

    start_engine(models=[Asset])
    return engine


def test_a_delisted_asset_is_sold_at_its_last_price_in_the_next_session(started):
    """Half each. B ends at 8 on Thursday the 4th, its last day; on Friday it is sold at 8, and A alone earns from there.

    1, 1 + .5 (-.2) = .9 at 8 on the 3rd; A doubles on the 5th: from the 4th (.5 + .4) to (1 + .4) = 1.4; then cash .4, A 1 to 1.5: 1.9.
    """
    market = prices(A=(10, 10, 10, 20, 30), B=(10, 8, 8, np.nan, np.nan))
    factories.open_market(started, market)
    fleet = [portfolio("p", fixed(A=0.5, B=0.5), on="signal_change", fee=0.0)]
    landed(started, fleet)
    assert closes(started, "p") == pytest.approx([1.0, 0.9, 0.9])  # nobody knows yet why there are no bars
    delist("B", "2024-01-04")
    landed(started, fleet)
    assert closes(started, "p") == pytest.approx([1.0, 0.9, 0.9, 1.4, 1.9])
    sold = factories.weights(started, "p").loc[(market.index[3], "B")]
    assert sold[["weight", "price_current", "price_before"]].tolist() == [0.0, 8.0, 10.0]
    assert sold["weight_before"] == pytest.approx(0.4 / 1.4)
    assert factories.weights(started, "p").loc[(market.index[3], "A"), "weight"] == pytest.approx(1 / 1.4)


@pytest.mark.parametrize("as_of", ["2024-01-05 21:00", "2024-01-05 22:00", "2024-01-06 00:00"])
def test_it_is_sold_on_the_very_night(started, as_of):
    market = prices(A=(10, 10, 10, 20), B=(10, 8, 8, np.nan))
    factories.open_market(started, market)
    delist("B", "2024-01-04")
    signal = inverse(2, asset_list=("A", "B"))
    fleet = [portfolio("p", fixed(A=0.5, B=0.5), fee=0.0), portfolio("q", signal)]
    landed(started, fleet, "2024-01-04 22:00")
    landed(started, fleet, as_of)
    assert factories.values(started, "p").index[-1] == market.index[3]
    assert mixed.computed_through(started, signal.uid) == market.index[3]


def test_a_day_of_delisting_that_is_to_come_changes_nothing_yet(started):
    market = factories.open_market(started, prices(A=(10, 11, 12, 20), B=(10, 8, np.nan, np.nan)))
    delist("B", "2024-01-04")
    fleet = [portfolio("p", fixed(A=0.5, B=0.5), fee=0.0)]
    for as_of in ("2024-01-03 23:00", "2024-01-04 23:00"):
        landed(started, fleet, as_of)
        assert factories.values(started, "p").index[-1] == market.index[1]  # the bar of the 4th may still come


def of_delisted(engine: Engine) -> tuple[pd.DataFrame, list[PortfolioConfiguration]]:
    """Three of nine assets are delisted in turn, one of them after it was silent for a while; b0 long before all of it."""
    market = mixed.open_market(engine, count=36)
    factories.register_assets(engine, ["b0"])
    factories.load_prices(engine, pd.DataFrame({"b0": [5.0, 6.0]}, factories.closes_of("2024-01-02", 2)))
    for asset, row, day in (("a2", 10, 10), ("a5", 16, 19), ("a8", 22, 22)):
        sql(engine, "DELETE FROM msm__external_prices WHERE asset_identifier = %s AND time_index > %s", (asset, market.index[row]))
        delist(asset, str(market.index[day].date()))
    delist("b0", "2024-01-03")
    held: dict[str, Any] = {"staleness": timedelta(days=6)}  # over the days on which a5 is listed and silent
    fleet = [
        portfolio("equal", equal(*NINE, "b0"), start_date=date(2024, 1, 4), **held),
        portfolio("change", equal(*NINE), on="signal_change", accounting="target", **held),
        portfolio("monthly", equal(*NINE), on="month_end", lag=1, **held),
        portfolio("inverse", inverse(4), **held),
        portfolio("momentum", momentum(emit_on="week_end", long_short=True, top_assets=4), accounting="target", **held),
        portfolio("copy", replicator(14, asset=BENCH), **held),
        portfolio("stale", inverse(4, price_alignment_policy=mixed.held_for(3)), missing="hold", **held),
    ]
    return market, fleet


def test_delisted_assets_night_by_night(started):  # R98
    market, fleet = of_delisted(started)
    landed(started, fleet)
    expected = bits(started)
    for c in fleet:
        assert factories.values(started, c.identifier).index[-1] == market.index[-1], c.identifier
        held = factories.weights(started, c.identifier)["weight"].unstack().fillna(0.0).iloc[-1]
        assert (held.reindex(["a2", "a5", "a8"]).fillna(0.0) == 0).all(), c.identifier
    random = np.random.default_rng(3)
    for size, nights in ((1, 3), (3, 8)):
        wipe(started)
        for minute in np.sort(random.integers(0, 50 * 24 * 60, nights)):
            landed(started, fleet, market.index[0] + pd.Timedelta(minutes=int(minute)), batch_size=size, registered=True)
        landed(started, fleet, registered=True)
        assert bits(started) == expected, size


def test_signals_leave_out_what_is_delisted(started):
    market, fleet = of_delisted(started)
    landed(started, fleet)
    inverse_weights = vectors(started, fleet[3].signal_uid)
    for asset, last in (("a2", 10), ("a5", 16), ("a8", 22)):
        listed, gone = inverse_weights.loc[: market.index[last], asset], inverse_weights.loc[market.index[last + 1] :, asset]
        assert (listed > 0).all()
        assert (gone == 0).all()
    np.testing.assert_allclose(inverse_weights.sum(axis=1), 1.0, atol=1e-12)


def test_a_fleet_is_not_held_back_by_it_and_the_plan_says_so(started):
    market, fleet = of_delisted(started)
    limits = {p.identifier: p.limited_by for p in factories.plan(started, fleet, market.index[-1]).portfolios}
    assert set(limits.values()) <= {"a0", BENCH, "as of", "signal"}
    delist("a2", None)
    limits = {p.identifier: p.limited_by for p in factories.plan(started, fleet, market.index[-1]).portfolios}
    assert set(limits.values()) <= {"a2", "signal"}


def test_an_asset_that_was_delisted_and_never_priced_is_no_obstacle(started):
    market = mixed.open_market(started, count=12)
    factories.register_assets(started, ["gone"])
    fleet = [portfolio("p", equal(*NINE, "gone")), portfolio("q", inverse(asset_list=(*NINE, "gone")))]
    assert statuses(run(started, fleet, END)) == {"p": "failed", "q": "skipped"}
    delist("gone", "2023-12-29")
    landed(started, fleet)
    assert factories.values(started, "p").index[-1] == market.index[-1]
    assert (vectors(started, fleet[1].signal_uid).sum(axis=1) > 0.999).all()


# -- cash ---------------------------------------------------------------------------------------------------------------------------


def rate(fill: int = 4, **options: Any) -> CashRate:
    return CashRate(source=DAILY, identifier="RATE", forward_fill=timedelta(days=fill), day_count=360, **options)


def load_rates(engine: Engine, **by_day: float) -> None:
    """`load_rates(engine, d02=0.05)`: published at 20:00 of that day of January."""
    times = pd.DatetimeIndex([f"2024-01-{day[1:]} 20:00Z" for day in by_day])
    factories.load_prices(engine, pd.DataFrame({"RATE": list(by_day.values())}, times))


def test_cash_earns_its_rate(engine):
    """A never moves; .6 of the portfolio is cash at 3.6 % of 360 days, .0001 a day; from Friday to Monday three days."""
    factories.open_market(engine, prices(A=(10, 10, 10, 10, 10)))
    load_rates(engine, d01=0.036, d04=0.072)
    landed(engine, [portfolio("p", fixed(A=0.4), cash_rate=rate(), fee=0.0, on="signal_change")])
    # Tue 2nd, Wed 3rd and Thu 4th at .036; the rate of Thursday 20:00 is known at Thursday's close: .0002 to Friday, .0006 to Monday
    account = np.cumprod([1.0, 1.0001, 1.0001, 1.0002, 1.0006])
    assert closes(engine, "p") == pytest.approx((0.4 + 0.6 * account).tolist(), abs=1e-15)


def test_a_portfolio_waits_for_the_rate(engine):
    """Of Monday 20:00 and valid for four days: it counts at Thursday's close, so Friday is known, and not at Friday's: Monday is not."""
    market = factories.open_market(engine, prices(A=range(10, 20)))
    load_rates(engine, d01=0.036)
    fleet = [portfolio("p", fixed(A=0.4), cash_rate=rate(), fee=0.0), portfolio("plain", fixed(A=0.4), fee=0.0)]
    landed(engine, fleet)
    assert factories.values(engine, "p").index[-1] == market.index[3]
    assert factories.values(engine, "plain").index[-1] == market.index[-1]
    assert {p.identifier: p.limited_by for p in factories.plan(engine, fleet, market.index[-1]).portfolios}["p"] == "cash rate"
    load_rates(engine, d05=0.036)
    landed(engine, fleet)
    assert factories.values(engine, "p").index[-1] == market.index[5]  # Tuesday the 9th


def test_a_rate_that_is_missing_is_named(engine):
    factories.open_market(engine, prices(A=(10, 11, 12, 13)))
    fleet = [portfolio("p", fixed(A=0.4), cash_rate=rate()), portfolio("plain", fixed(A=0.4))]
    report = run(engine, fleet, END)
    assert statuses(report) == {"p": "failed", "plain": "landed"}
    assert messages(report)["p"].startswith("cash rate RATE of ExternalPricesTS is not known for any time.")
    load_rates(engine, d03=0.05)
    report = run(engine, fleet, END)
    assert statuses(report)["p"] == "failed"
    assert "is not known for 2024-01-02 21:00Z" in messages(report)["p"]
    assert {r.error["reason"] for r in report.results if r.error} == {"missing_rate"}
    later = portfolio("p", fixed(A=0.4), cash_rate=rate(), start_date=date(2024, 1, 3))
    landed(engine, [later])
    assert len(closes(engine, "p")) == 3


def test_a_rate_that_is_no_number_is_named(engine):
    factories.open_market(engine, prices(A=(10, 11, 12, 13)))
    load_rates(engine, d01=0.05)
    sql(engine, "INSERT INTO msm__external_prices (asset_identifier, time_index, close) VALUES ('RATE', '2024-01-03 20:00Z', 'Infinity')")
    report = run(engine, [portfolio("p", fixed(A=0.4), cash_rate=rate()), portfolio("plain", fixed(A=0.4))], END)
    assert statuses(report) == {"p": "failed", "plain": "landed"}
    assert "RATE at 2024-01-03 20:00Z" in messages(report)["p"]


def test_cash_night_by_night(engine):  # R98
    """Rates that come late, at odd hours, negative too; two conventions, drifted and target weights, a short that is more than all cash."""
    market = mixed.open_market(engine, count=36)
    random = np.random.default_rng(5)
    times = market.index[0].normalize() - pd.Timedelta(days=3) + pd.to_timedelta(np.arange(40) * 31, unit="h")
    table = mixed.register_table(engine, "rates", rate=pd.DataFrame({"RATE": random.uniform(-0.01, 0.08, 40)}, times))
    cash = CashRate(source=table, identifier="RATE", column="rate", forward_fill=timedelta(days=6))
    levered = fixed(**dict.fromkeys(NINE, 0.15))
    fleet = [
        portfolio("drifted", equal(*NINE[:5]), cash_rate=cash, on="week_end"),
        portfolio("levered", levered, cash_rate=cash, on="month_end", lag=1),
        portfolio("target", levered, cash_rate=cash.model_copy(update={"day_count": 360}), accounting="target"),
        portfolio("part", momentum(long_short=True), cash_rate=cash),
        portfolio("none", levered),
    ]
    landed(engine, fleet)
    expected = bits(engine)
    assert closes(engine, "levered") != closes(engine, "none")
    for size, step in ((1, 17), (3, 9), (None, 5)):
        wipe(engine)
        nightly(engine, fleet, market.index[::step], batch_size=size, registered=True)
        landed(engine, fleet, registered=True)
        assert bits(engine) == expected, size


def test_the_calendar_of_the_portfolio_counts_the_days_of_cash(engine):
    """Valued every day, cash grows at weekends too; all of the value is cash but a part that never moves."""
    always = mixed.always_open(engine)
    days = pd.date_range("2024-01-03", periods=6, tz="UTC")
    factories.register_assets(engine, ["A"])
    factories.load_prices(engine, pd.DataFrame({"A": [7.0] * 6, "RATE": [0.036] * 6}, days))
    landed(engine, [portfolio("p", fixed(A=0.5), calendar=always, cash_rate=rate(), fee=0.0, on="signal_change")])
    assert closes(engine, "p") == pytest.approx((0.5 + 0.5 * np.cumprod([1.0] + [1.0001] * 5)).tolist(), abs=1e-15)
    assert always != CALENDAR


# -- kept ---------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(6))
def test_a_block_that_is_kept_holds_what_would_be_made(engine, seed, monkeypatch):
    """Batches of one run ask for random assets from random times on; every answer is that of a process that keeps nothing."""
    random = np.random.default_rng(seed)
    days = mixed.open_market(engine, count=60).index
    sql(engine, f"UPDATE msm__asset SET delisted_on = '{days[30]:%Y-%m-%d}' WHERE unique_identifier = 'a4' RETURNING 1")
    as_of = factories.instant("2030-01-01")
    monkeypatch.setattr(markets, "MARKETS", markets.KeptMarkets())
    monkeypatch.setattr(markets, "KEPT_CELLS_MAX", int(random.choice([200, 6_000_000])))
    with transaction(engine, read_only=True) as connection:
        (source,) = find_sources(connection, ["ExternalPricesTS"])
        calendars = resolve_calendars(connection, [CALENDAR], as_of)
        key = markets.MarketKey((source.uid, None), "close", CALENDAR, timedelta(days=1), PriceAlignmentPolicy())
        shared = 0
        for _ in range(12):
            chosen = sorted(random.choice(NINE, random.integers(1, 9), replace=False))
            since = None if random.random() < 0.4 else days[int(random.integers(0, 59))].to_pydatetime()
            need = markets.Need(key, chosen, since, int(random.integers(0, 5)))
            gone = delistings(read_assets(connection, chosen))
            ask = partial(read_markets, connection, [need], {key.source: source}, calendars, gone, as_of, inside=False)
            before = [id(market) for market, _ in markets.MARKETS.made.values()]
            kept, fresh = ask(world="run 1")[key], ask()[key]
            shared += id(kept) in before
            assert isinstance(kept, Market)
            assert isinstance(fresh, Market)
            rows, columns = np.searchsorted(kept.grid, fresh.grid), kept.columns(fresh.assets)
            for name in ("prices", "bar_times", "fresh", "volumes", "liquidity"):
                ours, theirs = getattr(kept, name)[rows][:, columns], getattr(fresh, name)
                known = fresh.bar_times >= fresh.grid[0]  # of an older bar only who reads further back knows
                np.testing.assert_array_equal(ours[known], theirs[known])
            np.testing.assert_array_equal(kept.gone_from[columns], fresh.gone_from)
            seen = ~np.isnat(fresh.last_bar)
            np.testing.assert_array_equal(kept.last_bar[columns][seen], fresh.last_bar[seen])
    assert shared or markets.KEPT_CELLS_MAX == 200
