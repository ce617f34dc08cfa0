"""Computed and external signals on a real database: what is stored, how far it is computed, and the same bits night by night."""

from datetime import UTC, timedelta
from typing import Any

import numpy as np
import pandas as pd
import pytest
from sqlalchemy import Engine

from msm_core.data_nodes.base import Batch, update_batch
from msm_core.data_nodes.interpolated_prices import InterpolatedPrices, InterpolatedPricesConfig
from msm_core.data_nodes.signals import SignalKind, SignalWeights
from msm_core.signals import InverseVolatility
from msm_ray import prepare
from msm_ray.store import stored_price_sources
from tests import factories, mixed
from tests.factories import instant, messages, portfolio, run, sql, statuses
from tests.mixed import (
    BENCH,
    DAILY,
    END,
    NINE,
    bits,
    computed_through,
    external,
    inverse,
    landed,
    momentum,
    nightly,
    replicator,
    vectors,
    wipe,
)

scheduled, strangers = factories.scheduled, mixed.strangers


def reasons(engine: Engine, fleet: Any, as_of: Any) -> dict[str, tuple[str, str | None]]:
    """Reason of every node of a plan, and what limits it."""
    return {p.identifier: (p.reason, p.limited_by) for _, p in factories.plan(engine, fleet, as_of).nodes()}


def close_of(day: str) -> Any:
    return instant(f"2024-{day} 21:00")


# -- numbers ----------------------------------------------------------------------------------------------------------------------


def test_inverse_volatility_is_stored_as_pandas_computes_it(engine):
    closes = mixed.open_market(engine)[list(NINE)]
    signal = inverse(window=10)
    landed(engine, [portfolio("p", signal)])
    deviation = closes.pct_change().rolling(10).std().dropna()  # the first full window ends with the 11th close
    expected = (1 / deviation).div((1 / deviation).sum(axis=1), axis=0)
    found = vectors(engine, signal.uid)
    assert list(found.index) == list(closes.index[10:])
    np.testing.assert_allclose(found.to_numpy(), expected.to_numpy(), rtol=1e-11)


def test_momentum_is_stored_as_pandas_ranks_it(engine):
    closes = mixed.open_market(engine)[list(NINE)]
    signal = momentum(emit_on="month_end")
    landed(engine, [portfolio("p", signal)])
    score = closes.shift(2) / closes.shift(7) - 1
    ends = [pd.Timestamp("2024-01-31 21:00Z"), pd.Timestamp("2024-02-29 21:00Z")]  # the last weekdays of January and February
    expected = (score.loc[ends].rank(axis=1, ascending=False) <= 3) / 3.0
    found = vectors(engine, signal.uid).reindex(columns=list(NINE), fill_value=0.0)
    assert list(found.index) == ends
    np.testing.assert_array_equal(found.to_numpy(), expected.to_numpy())


def test_weights_of_others_are_stored_as_they_are(engine, tmp_path):
    closes = mixed.open_market(engine)
    given = mixed.given_weights(closes.index[4:])
    table = mixed.register_table(engine, "given", signal_weight=given)
    file = tmp_path / "given.csv"
    long = given.stack().dropna().rename("w").rename_axis(["time_index", "asset_identifier"]).reset_index()
    long.to_csv(file, index=False)
    signals = [external(table), external(path=file, weight_column="w")]
    landed(engine, [portfolio(f"p{i}", signal) for i, signal in enumerate(signals)])
    for signal in signals:  # an asset without a row has 0, as has one with a 0
        pd.testing.assert_frame_equal(vectors(engine, signal.uid), given.fillna(0.0), check_names=False, check_freq=False, check_exact=True)


# -- the same bits ------------------------------------------------------------------------------------------------------------------


def test_night_by_night_and_in_batches_of_any_size_the_bits_are_those_of_one_run(engine, tmp_path):  # R98
    """Every kind of signal, each of two portfolios: computed, external, and replicators of an asset, an index, a portfolio, its copy."""
    closes = mixed.open_market(engine)
    fleet = mixed.of_every_kind(engine, closes, tmp_path)
    landed(engine, fleet)
    expected = bits(engine)
    assert all(len(vectors(engine, c.signal_uid)) for c in fleet)
    assert not any(factories.values(engine, c.identifier).empty for c in fleet)
    random = np.random.default_rng(31)
    for size, nights in ((1, 2), (3, 5), (None, 4)):
        wipe(engine)
        minutes = np.sort(random.integers(0, 63 * 24 * 60, nights))
        nightly(engine, fleet, [closes.index[0] + pd.Timedelta(minutes=int(m)) for m in minutes], batch_size=size, registered=True)
        landed(engine, fleet, registered=True, batch_size=size)
        assert bits(engine) == expected, size


def test_every_single_night_gives_the_bits_of_one_run(engine):  # R98
    """Windows of 2 to 12 sessions, night after night, with a gap in the prices that one signal bridges and another does not."""
    closes = mixed.open_market(engine, count=18)
    sql(engine, "DELETE FROM msm__external_prices WHERE asset_identifier = 'a4' AND time_index::date BETWEEN '2024-01-09' AND '2024-01-13'")
    stale = {"price_alignment_policy": mixed.held_for(9)}
    fleet = [
        portfolio("inverse", inverse(2, **stale), staleness=timedelta(days=9)),
        portfolio("exact", inverse(2), staleness=timedelta(days=9)),
        portfolio("asset", replicator(12, asset=BENCH), staleness=timedelta(days=9)),
        portfolio("portfolio", replicator(3, assets=NINE[:3], portfolio="inverse"), staleness=timedelta(days=9)),
    ]
    landed(engine, fleet)
    expected = bits(engine)
    wipe(engine)
    nightly(engine, fleet, closes.index, registered=True, batch_size=1)  # each reads for itself, no further back than it must
    assert bits(engine) == expected
    exact, held = (vectors(engine, fleet[i].signal_uid) for i in (1, 0))
    # closes of the 12th, 15th and 16th: that of the 12th is the bar of the 8th, which is read again that night
    assert exact.loc["2024-01-16 21:00Z", "a4"] == 0.0
    assert held.loc["2024-01-16 21:00Z", "a4"] > 0.0


def test_an_order_of_nodes_does_not_reach_the_bits(engine, tmp_path):  # R97
    closes = mixed.open_market(engine)
    fleet = mixed.of_every_kind(engine, closes, tmp_path)
    landed(engine, fleet[::-1], batch_size=3)
    expected = bits(engine)
    wipe(engine)
    for configuration in factories.plan(engine, fleet, END).portfolios:  # one by one, those that are waited for first
        landed(engine, [c for c in fleet if c.identifier == configuration.identifier], registered=True)
    assert bits(engine) == expected


# -- once per run -------------------------------------------------------------------------------------------------------------------


def test_a_signal_of_many_portfolios_is_computed_once(engine, monkeypatch):  # R73
    mixed.open_market(engine)
    calls: list[int] = []
    real = InverseVolatility.target_weights
    monkeypatch.setattr(InverseVolatility, "target_weights", lambda self, windows: calls.append(1) or real(self, windows))
    fleet = [portfolio(f"p{i}", inverse(), lag=i) for i in range(5)]
    report = landed(engine, fleet)
    assert statuses(report, "signal") == {fleet[0].signal_uid: "landed"}
    assert calls == [1]
    assert sql(engine, "SELECT count(*), count(DISTINCT time_index) FROM msm__signal_weights") == [(40 * 9, 40)]


def test_a_signal_that_is_there_is_not_computed_for_a_new_portfolio(engine, monkeypatch):
    mixed.open_market(engine)
    landed(engine, [portfolio("p", inverse())])
    monkeypatch.setattr(InverseVolatility, "target_weights", lambda self, windows: pytest.fail("it was computed again"))
    report = landed(engine, [portfolio("p", inverse()), portfolio("q", inverse(), lag=1)])
    assert statuses(report) == {"p": "up_to_date", "q": "landed"}


# -- how far ------------------------------------------------------------------------------------------------------------------------


def test_progress_tells_how_far_it_is_computed_although_nothing_was_emitted(engine):  # R75
    closes = mixed.open_market(engine)
    signal = momentum(emit_on="month_end")
    fleet = [portfolio("p", signal)]
    report = landed(engine, fleet, "2024-01-25")
    assert statuses(report, "signal") == {signal.uid: "landed"}
    assert computed_through(engine, signal.uid) == close_of("01-24")
    assert vectors(engine, signal.uid).empty
    assert statuses(report) == {"p": "up_to_date"}  # there is nothing to trade yet
    assert reasons(engine, fleet, "2024-01-25")[signal.uid] == ("up to date", "a0")  # its last bar is that of the 24th
    landed(engine, fleet, "2024-02-10")
    assert list(vectors(engine, signal.uid).index) == [pd.Timestamp("2024-01-31 21:00Z")]
    assert computed_through(engine, signal.uid) == close_of("02-09")
    assert factories.values(engine, "p").index.tolist() == list(closes.loc["2024-01-31":"2024-02-09"].index)


def test_nothing_is_read_from_before_its_window(engine):
    """A night reads the sessions that one vector looks back on: what is before them may have gone."""
    closes = mixed.open_market(engine)
    fleet = [portfolio("p", inverse(5)), portfolio("q", replicator(12, asset=BENCH))]
    landed(engine, fleet)
    expected = bits(engine)
    wipe(engine)
    landed(engine, fleet, closes.index[30])
    # the next vector is that of row 31; with 12 returns before it, it looks back to row 19
    sql(engine, "UPDATE msm__external_prices SET close = 'NaN' WHERE time_index < %s", (closes.index[16],))
    landed(engine, fleet)
    assert bits(engine) == expected


def test_later_rows_of_another_signal_never_move_its_start(engine):  # R71
    closes = mixed.open_market(engine)
    signal, other = inverse(), inverse(window=6)
    landed(engine, [portfolio("p", signal)])
    expected = bits(engine)
    wipe(engine)
    landed(engine, [portfolio("p", signal)], closes.index[20])
    landed(engine, [portfolio("o", other)])  # it is ahead now
    for stranger in ("0" * 32, "f" * 32):
        sql(engine, "INSERT INTO msm__signal_weights VALUES (%s, '2024-06-01', 'a0', 1)", (stranger,))
    landed(engine, [portfolio("p", signal)])
    found = bits(engine)
    key = f"SignalWeightsTS {signal.uid}"
    assert found[key] == expected[key]
    assert list(vectors(engine, signal.uid).index) == list(closes.index[5:])


def test_it_ends_where_its_universe_is_covered_and_the_plan_names_the_asset(engine):  # R70
    closes = mixed.open_market(engine)
    sql(engine, "DELETE FROM msm__external_prices WHERE asset_identifier = 'a6' AND time_index > %s", (closes.index[19],))
    narrow = inverse(asset_list=NINE[:5])
    fleet = [portfolio("p", inverse()), portfolio("q", narrow)]
    assert reasons(engine, fleet, END)[fleet[0].signal_uid] == ("new", "a6")
    landed(engine, fleet)
    assert computed_through(engine, fleet[0].signal_uid) == closes.index[19]
    assert computed_through(engine, narrow.uid) == closes.index[-1]
    assert reasons(engine, fleet, END) == {"p": ("up to date", "a6"), "q": ("up to date", "a0")}
    factories.load_prices(engine, closes[["a6"]].iloc[20:30])
    landed(engine, fleet)
    assert computed_through(engine, fleet[0].signal_uid) == closes.index[29]


def test_assets_without_any_price_are_named(engine):  # R69
    mixed.open_market(engine)
    factories.register_assets(engine, ["x", "y"])
    fleet = [
        portfolio("p", inverse(asset_list=(*NINE, "x", "y"))),
        portfolio("q", inverse(asset_list=("ghost",))),
        portfolio("r", inverse()),
    ]
    report = run(engine, fleet, END)
    assert statuses(report) == {"p": "skipped", "q": "failed", "r": "landed"}
    assert "ExternalPricesTS has no close for x, y" in messages(report)[fleet[0].signal_uid]
    assert "ghost not registered" in messages(report)["q"]


def silent_market(engine: Engine) -> pd.DataFrame:
    """The bars of a8 end with the 20th session, for good; those of a7 pause from the 25th to the 30th."""
    closes = mixed.open_market(engine)
    sql(engine, "DELETE FROM msm__external_prices WHERE asset_identifier = 'a8' AND time_index > %s", (closes.index[19],))
    bounds = (closes.index[24], closes.index[29])
    sql(engine, "DELETE FROM msm__external_prices WHERE asset_identifier = 'a7' AND time_index BETWEEN %s AND %s", bounds)
    return closes


def test_an_asset_that_is_silent_for_long_leaves_the_universe(engine):
    closes = silent_market(engine)
    waiting, going = inverse(), inverse(stale_after_sessions=3)
    nodes = [SignalWeights(signal_weights_instance=s) for s in (waiting, going)]
    last = closes.index[-1].to_pydatetime()
    for node in nodes:
        node.run(as_of=last)
    expected = bits(engine)
    assert computed_through(engine, waiting.uid) == closes.index[19]
    assert computed_through(engine, going.uid) == last
    kept = vectors(engine, going.uid)
    assert (kept["a8"].iloc[-25:] == 0).all()  # of the 45 sessions the last 25 are without it
    assert (kept["a8"].iloc[:15] > 0).all()
    wipe(engine)
    reached = []
    for night in closes.index:
        for node in nodes:
            node.run(as_of=night.to_pydatetime())
        reached.append(computed_through(engine, going.uid))
    assert bits(engine) == expected
    # silent for three sessions it is waited for, for a fourth it is not; so with a7, which is silent from row 24 to 29
    assert reached[19:28] == [closes.index[i] for i in (19, 19, 19, 19, 23, 23, 23, 23, 27)]


@pytest.mark.parametrize("source", ["prices", "caps"])
def test_when_everybody_is_silent_nobody_leaves(engine, source):
    """The bars of ten sessions come late, all of them; they are not passed over, and nightly is as in one run."""
    closes = mixed.open_market(engine)
    caps = mixed.register_table(engine, "caps", market_cap=closes[list(NINE)])
    node = SignalWeights(signal_weights_instance=mixed.market_cap(caps, stale_after_sessions=3))
    last = closes.index[-1].to_pydatetime()
    node.run(as_of=last)
    expected = bits(engine)
    wipe(engine)
    table = {"prices": "msm__external_prices", "caps": "caps"}[source]
    sql(engine, f"CREATE TABLE late AS SELECT * FROM {table} WHERE time_index BETWEEN '2024-01-23' AND '2024-02-06'")
    sql(engine, f"DELETE FROM {table} WHERE time_index BETWEEN '2024-01-23' AND '2024-02-06'")
    before = f"CREATE TABLE latest AS SELECT * FROM {table} WHERE time_index > '2024-02-06'"
    for query in (before, f"DELETE FROM {table} WHERE time_index > '2024-02-06'"):
        sql(engine, query)
    for night in closes.index[:25]:
        node.run(as_of=night.to_pydatetime())
    for query in (f"INSERT INTO {table} SELECT * FROM late", f"INSERT INTO {table} SELECT * FROM latest"):
        sql(engine, query)
    node.run(as_of=last)
    assert bits(engine) == expected


def test_a_portfolio_goes_on_without_an_asset_that_its_signal_has_let_go(engine):
    """It sells it at its last price, which its own policy allows; nightly as in one run."""
    closes = silent_market(engine)
    fleet = [portfolio("p", inverse(stale_after_sessions=3), staleness=timedelta(days=30))]
    landed(engine, fleet, closes.index[-1])
    expected = bits(engine)
    assert factories.values(engine, "p").index[-1] == closes.index[-1]
    wipe(engine)
    nightly(engine, fleet, closes.index[15:], registered=True)
    assert bits(engine) == expected


def test_a_portfolio_never_runs_ahead_of_a_signal_whose_own_source_lags(engine):
    """Capitalisations come two sessions after the prices. A vector that is due must be there before the session is traded."""
    closes = mixed.open_market(engine, count=18)
    caps = closes[list(NINE)] * 1e6
    source = mixed.register_table(engine, "caps", market_cap=caps.iloc[:1])
    fleet = [
        portfolio("p", mixed.market_cap(source)),
        portfolio("weekly", mixed.market_cap(source, emit_on="week_end"), lag=1),
        portfolio("fast", inverse()),
    ]
    reached = {}
    for i, night in enumerate(closes.index):
        if i >= 3:
            mixed.load_table(engine, "caps", market_cap=caps.iloc[i - 2 : i - 1])
        landed(engine, fleet, night)
        reached[night] = {c.identifier: factories.values(engine, c.identifier).index.max() for c in fleet}
    mixed.load_table(engine, "caps", market_cap=caps.iloc[-2:])
    landed(engine, fleet)
    found = bits(engine)
    for i, night in enumerate(closes.index[12:], 12):
        assert reached[night]["fast"] == night
        assert reached[night]["p"] == closes.index[i - 2]
    wipe(engine)
    landed(engine, fleet)
    assert bits(engine) == found


def test_a_signal_of_weekdays_for_a_portfolio_of_every_day(engine):
    """Prices at every midnight; the signal looks at weekdays' 21:00, the portfolio is valued at midnight, weekends too."""
    factories.store_calendar(engine)
    always = mixed.always_open(engine)
    days = pd.date_range("2024-01-03", periods=45, tz="UTC")
    closes = factories.walks("2024-01-02", 45, NINE).set_axis(days)
    factories.register_assets(engine, NINE)
    factories.load_prices(engine, closes)
    signal = inverse(price_alignment_policy=mixed.held_for(1))
    fleet = [portfolio("p", signal, calendar=always), portfolio("change", signal, calendar=always, on="signal_change", lag=1)]
    landed(engine, fleet)
    expected = bits(engine)
    emitted = vectors(engine, signal.uid).index
    assert {t.strftime("%H:%M") for t in emitted} == {"21:00"}
    assert {t.day_of_week for t in emitted} == {0, 1, 2, 3, 4}
    # five returns, so six weekdays from Wednesday the 3rd on: the sixth is Wednesday the 10th; known at the midnight after
    assert emitted[0] == pd.Timestamp("2024-01-10 21:00Z")
    assert factories.values(engine, "p").index.tolist() == list(days[days >= "2024-01-11 00:00Z"])
    wipe(engine)
    nightly(engine, fleet, pd.date_range("2024-01-08 10:00", periods=12, freq="71h", tz="UTC"), registered=True)
    landed(engine, fleet)
    assert bits(engine) == expected


def test_a_portfolio_is_valued_over_the_weekend_after_the_last_vector(engine):
    """Its own prices come every midnight, those of its signal on weekdays only: Friday's vector counts until Monday's may come."""
    factories.store_calendar(engine)
    always = mixed.always_open(engine)
    days = pd.date_range("2024-01-03", periods=14, tz="UTC")
    factories.register_assets(engine, NINE)
    factories.load_prices(engine, factories.walks("2024-01-02", 14, NINE).set_axis(days))
    weekdays = mixed.register_table(engine, "weekdays", close=factories.walks("2024-01-02", 9, NINE, seed=4))  # to Friday the 12th
    fleet = [portfolio("p", inverse(2, price_source=weekdays), calendar=always)]
    reached = []
    for night in pd.date_range("2024-01-12 22:00", periods=5, freq="1D", tz="UTC"):
        landed(engine, fleet, night)
        reached.append(factories.values(engine, "p").index[-1])
    # every midnight before Monday 21:00, when the next vector is due
    assert reached == [pd.Timestamp(f"2024-01-{day} 00:00Z") for day in (12, 13, 14, 15, 15)]


def test_a_portfolio_on_other_prices_goes_no_further_than_its_signal(engine):
    """The signal's source ends on the 10th session, the portfolio's on the last."""
    closes = mixed.open_market(engine)
    other = mixed.register_table(engine, "other", close=closes.iloc[:10])
    signal = inverse(price_source=other)
    fleet = [portfolio("p", signal), portfolio("monthly", inverse(price_source=other, emit_on="week_end"))]
    landed(engine, fleet)
    assert reasons(engine, fleet, END)["p"] == ("up to date", "signal")
    assert factories.values(engine, "p").index[-1] == closes.index[9]
    mixed.load_table(engine, "other", close=closes.iloc[10:])
    landed(engine, fleet)
    found = bits(engine)
    wipe(engine)
    landed(engine, fleet)
    assert bits(engine) == found


# -- replicators --------------------------------------------------------------------------------------------------------------------


def test_what_is_tracked_and_has_not_begun_is_waited_for(engine):
    closes = mixed.open_market(engine)
    fleet = [portfolio("copy", replicator(3, portfolio="first")), portfolio("first", inverse(window=10))]
    report = landed(engine, fleet, closes.index[4])  # too early for either
    assert statuses(report) == {"copy": "up_to_date", "first": "up_to_date"}
    landed(engine, fleet, closes.index[12])
    assert len(factories.values(engine, "first")) == 3
    assert vectors(engine, fleet[0].signal_uid).empty  # three values make two returns
    assert computed_through(engine, fleet[0].signal_uid) == closes.index[12]
    landed(engine, fleet)
    assert vectors(engine, fleet[0].signal_uid).index[0] == closes.index[13]


def test_what_is_tracked_and_unknown_is_named(engine):
    mixed.open_market(engine)
    fleet = [
        portfolio("copy", replicator(3, portfolio="nobody")),
        portfolio("index", replicator(3, index="NONE")),
        portfolio("p", inverse()),
    ]
    report = run(engine, fleet, END)
    assert statuses(report) == {"copy": "skipped", "index": "skipped", "p": "landed"}
    assert "PortfoliosTS has no close for nobody" in messages(report)["copy"]
    assert "PortfolioIndexValuesTS has no close for NONE" in messages(report)["index"]


def test_a_copy_of_one_asset_is_that_asset(engine):
    """Tracking 0.6 a2, traded back every session at no cost: by least squares the betas are exactly that."""
    closes = mixed.open_market(engine)
    fleet = [
        portfolio("tracked", factories.fixed(a2=0.6), fee=0.0, accounting="target"),
        portfolio("copy", replicator(12, portfolio="tracked"), fee=0.0),
    ]
    landed(engine, fleet)
    found = vectors(engine, fleet[1].signal_uid).reindex(columns=list(NINE), fill_value=0.0)
    np.testing.assert_allclose(found["a2"], 0.6, atol=1e-12)
    np.testing.assert_allclose(found.drop(columns="a2"), 0.0, atol=1e-12)
    assert list(found.index) == list(closes.index[12:])


# -- external weights ---------------------------------------------------------------------------------------------------------------


def test_vectors_that_come_late_are_taken_once_and_a_portfolio_waits_for_them(engine):
    closes = mixed.open_market(engine)
    given = mixed.given_weights(closes.index[4:])
    table = mixed.register_table(engine, "given", signal_weight=given.iloc[:6])
    fleet = [portfolio("p", external(table))]  # valid for a day, so until just before the next close
    landed(engine, fleet)
    assert factories.values(engine, "p").index[-1] == closes.index[9]
    assert (statuses(landed(engine, fleet)), reasons(engine, fleet, END)["p"][1]) == ({"p": "up_to_date"}, "signal")
    mixed.load_table(engine, "given", signal_weight=given.iloc[6:])
    landed(engine, fleet)
    found = bits(engine)
    wipe(engine)
    landed(engine, fleet)
    assert bits(engine) == found


def test_two_signals_of_one_table_go_on_each_from_its_own_progress(engine):
    closes = mixed.open_market(engine, count=20)
    table = mixed.register_table(engine, "given", signal_weight=mixed.given_weights(closes.index[2:]))
    fleet = [portfolio("p", external(table)), portfolio("q", external(table, forward_fill=timedelta(days=3)))]
    landed(engine, fleet)
    expected = bits(engine)
    wipe(engine)
    landed(engine, fleet, closes.index[6])
    landed(engine, fleet[:1], closes.index[12], registered=True)
    landed(engine, fleet, registered=True)  # one batch, one statement, two beginnings
    assert bits(engine) == expected


@pytest.mark.parametrize(
    ("asset", "weight", "told"),
    [("a1", "NaN", "signal_weight of a1 at 2024-02-06 21:00Z in"), ("stranger", "1", "gives stranger at 2024-02-06 21:00Z the weight 1.0")],
)
def test_a_weight_that_cannot_be_used_fails_only_its_own(engine, tmp_path, asset, weight, told):
    closes = mixed.open_market(engine)
    table = mixed.register_table(engine, "given", signal_weight=mixed.given_weights(closes.index[4:20]))
    sql(engine, "INSERT INTO given VALUES (%s, '2024-02-06 21:00Z', %s)", (asset, weight))
    fleet = [portfolio("p", external(table)), portfolio("q", inverse())]
    landed(engine, fleet, closes.index[10])  # what is later is not looked at
    report = run(engine, fleet, END)
    assert statuses(report) == {"p": "skipped", "q": "landed"}
    assert told in messages(report)["p"]
    assert factories.values(engine, "p").index[-1] == closes.index[10]


def test_a_file_that_is_not_there_fails_only_its_own(engine, tmp_path):
    mixed.open_market(engine)
    report = run(engine, [portfolio("p", external(path=tmp_path / "no.csv")), portfolio("q", inverse())], END)
    assert statuses(report) == {"p": "skipped", "q": "landed"}
    assert "there is no such file here" in messages(report)["p"]


def test_a_bad_number_is_told_with_asset_and_time(engine):
    closes = mixed.open_market(engine)
    sql(engine, "UPDATE msm__external_prices SET volume = -1 WHERE asset_identifier = 'a3' AND time_index = %s", (closes.index[9],))
    caps = mixed.register_table(engine, "caps", market_cap=closes[list(NINE)])
    fleet = [portfolio("p", mixed.market_cap(caps)), portfolio("q", inverse())]
    report = run(engine, fleet, END)
    assert statuses(report) == {"p": "skipped", "q": "landed"}
    assert "volume of a3 at 2024-01-15 21:00Z in ExternalPricesTS is -1.0" in messages(report)["p"]


# -- prices of their own ------------------------------------------------------------------------------------------------------------


def filled() -> InterpolatedPrices:
    config = {"source_price_instance": DAILY, "upsample_frequency_id": "1d", "intraday_bar_interpolation_rule": "ffill"}
    return InterpolatedPrices(interpolation_config=InterpolatedPricesConfig.model_validate(config))


def test_interpolated_prices_that_only_a_signal_uses(engine):  # R50
    """The portfolio trades on raw prices; `prepare` makes the signal's table, and the plan puts its prices before the signal."""
    closes = mixed.open_market(engine)
    sql(engine, "UPDATE msm__asset SET calendar_uid = (SELECT uid FROM msm__calendar)")
    sql(engine, "DELETE FROM msm__external_prices WHERE asset_identifier = 'a4' AND time_index = %s", (closes.index[20],))
    signal = inverse(price_source=filled())
    fleet = [portfolio("p", signal, staleness=timedelta(days=4)), portfolio("raw", inverse(), staleness=timedelta(days=4))]
    factories.register(engine, fleet)
    report = run(engine, fleet, END, registered=True)
    assert statuses(report) == {"p": "skipped", "raw": "landed"}
    assert "Run `msm-ray prepare`" in messages(report)["p"]
    prepare.prepare(engine, stored_price_sources(engine))
    plan = factories.plan(engine, fleet, END)
    prices = {key for key in plan.work() if key[0] == "prices"}
    assert {identifier.partition("/")[2] for _, identifier in prices} == set(NINE)
    assert plan.upstream()["signal", signal.uid] == prices
    assert plan.upstream()["portfolio", "p"] == {("signal", signal.uid)}
    landed(engine, fleet, registered=True)
    full, gap = vectors(engine, signal.uid), vectors(engine, fleet[1].signal_uid)
    assert full.loc[closes.index[20], "a4"] > 0
    assert gap.loc[closes.index[20], "a4"] == 0
    expected = bits(engine)
    wipe(engine)
    nightly(engine, fleet, closes.index[5::3], registered=True)
    landed(engine, fleet, registered=True)
    assert bits(engine) == expected


# -- one at a time ------------------------------------------------------------------------------------------------------------------


def test_a_computed_signal_runs_by_itself(engine):  # R66
    mixed.open_market(engine)
    node = SignalWeights(signal_weights_instance=inverse())
    assert node.dependencies() == {"prices": DAILY}
    results = [node.run(as_of=instant(t)) for t in ("2024-01-12", "2024-01-12", "2024-01-13")]
    # sessions from the 2nd: the sixth close is that of the 9th, so three vectors by the 11th
    assert [(r.status, r.rows) for r in results] == [("landed", 27), ("up_to_date", 0), ("landed", 9)]


def test_a_batch_computes_what_each_would_alone(engine):
    """Signals of several windows, sources and watermarks read one block of prices together."""
    closes = mixed.open_market(engine)
    other = mixed.register_table(engine, "other", close=closes)
    signals = [*(inverse(window) for window in (2, 5, 9)), momentum(), inverse(3, price_source=other), replicator(4, asset=BENCH)]
    nodes = tuple(SignalWeights(signal_weights_instance=s) for s in signals)
    for node in nodes:
        node.run(as_of=instant(END))
    alone = bits(engine)
    wipe(engine)
    for node in nodes[::2]:
        node.run(as_of=closes.index[25].to_pydatetime().astimezone(UTC))
    marks = [factories.progress(engine)["SignalWeightsTS", n.identifier]["watermark"] for n in nodes]
    ready = tuple(n.model_copy(update={"watermark": None if m is pd.NaT else m}) for n, m in zip(nodes, marks, strict=True))
    assert {r.status for r in update_batch(engine, Batch(SignalKind(), ready, instant(END)))} == {"landed"}
    assert bits(engine) == alone
