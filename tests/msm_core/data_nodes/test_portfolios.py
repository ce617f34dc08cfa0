"""Portfolios from prices to rows. Expected numbers are worked by hand, or come from the naive engine below: units and cash, plain loops."""

import os
import re
import subprocess
import sys
import textwrap
import uuid
from collections.abc import Sequence
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from sqlalchemy import Engine

import msm_core
from msm_core import identity
from msm_core.configuration import PortfolioConfiguration
from msm_core.data_nodes import construction
from msm_core.data_nodes.portfolios import PortfoliosDataNode, PortfolioWeights
from msm_core.data_nodes.signals import SignalWeights
from msm_core.errors import NodeFailed, StorageNotPrepared
from msm_core.models import PortfoliosStorage, PortfolioWeightsStorage, SignalWeightsStorage
from msm_core.storage import Scope
from tests import factories
from tests.factories import equal, fixed, portfolio, run, schedule

scheduled = factories.scheduled

NINE = [f"a{i}" for i in range(9)]
NEVER_LATER = "2024-12-30"


def prices(first: str = "2024-01-02", **columns: Sequence[float]) -> pd.DataFrame:
    """Closes by asset, one per session."""
    return pd.DataFrame(columns, factories.closes_of(first, len(next(iter(columns.values())))), dtype=float)


def landed(engine: Engine, configurations: Sequence[PortfolioConfiguration], as_of: str = NEVER_LATER, **options: Any) -> dict[str, str]:
    report = run(engine, configurations, as_of, **options)
    assert report.exit_code == 0, factories.messages(report)
    return factories.statuses(report)


def closes(engine: Engine, identifier: str) -> list[float]:
    return factories.values(engine, identifier)["close"].tolist()


def approx(values: Sequence[float]) -> Any:
    return pytest.approx(list(values), abs=1e-14)


# -- numbers by hand --------------------------------------------------------------------------------------------------------------

GOLDEN = {"A": (100, 110, 121, 121), "B": (50, 50, 55, 44)}


def test_constant_mix(engine):
    """The golden vector of design.md section 6: half each, f = 0.00018."""
    factories.open_market(engine, prices(**GOLDEN))
    landed(engine, [portfolio("p", fixed(A=0.5, B=0.5), accounting="target", fee=0.00018)])
    values = factories.values(engine, "p")
    # -f, then (10 % + 0) / 2, (10 % + 10 %) / 2, (0 - 20 %) / 2
    assert values["return"].tolist() == approx([-0.00018, 0.05, 0.10, -0.10])
    assert values["close"].tolist() == approx([0.99982, 1.049811, 1.1547921, 1.03931289])
    assert values["calculated_close"].tolist() == values["close"].tolist()
    assert [str(t) for t in values.index] == [f"2024-01-0{d} 21:00:00+00:00" for d in (2, 3, 4, 5)]
    assert len(factories.weights(engine, "p")) == 2  # nothing between events


def test_constant_mix_with_a_moving_target(engine):  # R76
    """The second golden vector: A = 1, .5, 0, 0 and B = 0, .5, 1, 1 with f = 0.01."""
    market = factories.open_market(engine, prices(**GOLDEN))
    targets = ({"A": 1.0}, {"A": 0.5, "B": 0.5}, {"B": 1.0})
    signal = schedule(*zip(market.index, targets, strict=False))
    landed(engine, [portfolio("p", signal, accounting="target", fee=0.01)])
    # day 2: +10 % on A, turnover 1 -> 0.09; day 3: (10 + 10) / 2 % - 0.01; day 4: -20 % on B
    assert factories.values(engine, "p")["return"].tolist() == approx([-0.01, 0.09, 0.09, -0.20])
    assert closes(engine, "p") == approx([0.99, 1.0791, 1.176219, 0.9409752])
    rows = factories.weights(engine, "p")
    assert rows["weight"].tolist() == [1.0, 0.5, 0.5, 0.0, 1.0]
    assert rows["weight_before"].tolist() == [0.0, 1.0, 0.0, 0.5, 0.5]
    assert [asset for _, asset in rows.index] == ["A", "A", "B", "A", "B"]


def test_drift_between_trades(engine):
    """Half each, bought once: V = 0.99 (1 + .5 (A/100 - 1) + .5 (B/50 - 1))."""
    factories.open_market(engine, prices(**GOLDEN))
    landed(engine, [portfolio("p", fixed(A=0.5, B=0.5), on="signal_change", fee=0.01)])
    assert closes(engine, "p") == approx([0.99, 0.99 * 1.05, 0.99 * 1.155, 0.99 * 1.045])
    assert len(factories.weights(engine, "p")) == 2


def test_daily_rebalance_of_drifted_weights(engine):
    """Day 2: A has become .55/1.05, so 2 * .025/1.05 = 1/21 is traded and V = 0.99 * 1.05 * (1 - .01/21)."""
    factories.open_market(engine, prices(A=(100, 110), B=(50, 50)))
    landed(engine, [portfolio("p", fixed(A=0.5, B=0.5), fee=0.01)])
    assert closes(engine, "p") == approx([0.99, 1.0395 * (1 - 0.01 / 21)])
    second = factories.weights(engine, "p").iloc[2:]
    assert second["weight"].tolist() == [0.5, 0.5]
    assert second["weight_before"].tolist() == approx([0.55 / 1.05, 0.5 / 1.05])


def test_what_leaves_the_signal_is_sold(engine):  # R76
    """The lesson: a row with weight 0, its fee, and the last return are not lost. Both gain 10 %, then B is sold for A."""
    market = factories.open_market(engine, prices(A=(100, 110, 110), B=(50, 55, 1)), volume=prices(A=(1, 2, 3), B=(7, 8, 9)))
    configuration = portfolio("p", schedule((market.index[0], {"A": 0.5, "B": 0.5}), (market.index[1], {"A": 1.0})), fee=0.01)
    for as_of in ("2024-01-03", "2024-01-04", "2024-01-05"):  # each night on its own: the holding comes from the last weights
        landed(engine, [configuration], as_of)
    # .99, then * 1.1 for the last return of both, * (1 - .01 (.5 + .5)) for the trade; B's crash comes too late to matter
    assert closes(engine, "p") == approx([0.99, 0.99 * 1.1 * 0.99, 0.99 * 1.1 * 0.99])
    sold = factories.weights(engine, "p").loc[(market.index[1], "B")]
    assert sold.tolist() == [0.0, pytest.approx(0.5, abs=1e-15), 55.0, 50.0, 8.0, 7.0]
    assert factories.weights(engine, "p").index.get_level_values(0).max() == market.index[1]


def test_everything_sold_and_bought_again(engine):
    """Cash earns nothing, pays nothing, and keeps the portfolio alive; a new purchase pays its fee."""
    market = factories.open_market(engine, prices(A=(100, 110, 220, 200, 300)))
    signal = schedule((market.index[0], {"A": 1.0}), (market.index[1], {"A": 0.0}), (market.index[3], {"A": 1.0}))
    for as_of in ("2024-01-03", "2024-01-04", "2024-01-05", "2024-01-06", "2024-01-09"):
        landed(engine, [portfolio("p", signal, fee=0.1)], as_of)
    # buy .9; +10 % then sell all, .1 fee: .891; cash; buy: .8019; 300/200
    assert closes(engine, "p") == approx([0.9, 0.891, 0.891, 0.8019, 1.20285])
    assert factories.weights(engine, "p")["weight"].tolist() == [1.0, 0.0, 1.0]


def test_cash_and_a_short(engine):
    """.5 long A, -.2 short B, .7 cash: no interest, 1 + .5 * 10 % - .2 * 20 %."""
    factories.open_market(engine, prices(A=(100, 110), B=(50, 60)))
    landed(engine, [portfolio("p", fixed(A=0.5, B=-0.2), on="signal_change", fee=0.0)])
    assert closes(engine, "p") == approx([1.0, 1 + 0.05 - 0.04])


def test_an_execution_lag_trades_later_at_the_later_price(engine):
    factories.open_market(engine, prices(A=(100, 110, 121), B=(1, 1, 1)))
    landed(engine, [portfolio("p", fixed(A=1.0), on="signal_change", lag=1, fee=0.0)])
    assert closes(engine, "p") == approx([1.0, 1.1])
    assert factories.values(engine, "p").index[0] == pd.Timestamp("2024-01-03 21:00Z")
    assert factories.weights(engine, "p")["price_current"].tolist() == [110.0]


@pytest.mark.parametrize("column", ["open", "close", "vwap"])
def test_the_price_column_drives_returns(engine, column):  # R60
    given = {"open": prices(A=(10, 20)), "vwap": prices(A=(10, 30)), "close": prices(A=(10, 40))}
    factories.open_market(engine, given.pop("close"), **given)
    landed(engine, [portfolio("p", fixed(A=1.0), column=column, fee=0.0)])
    assert closes(engine, "p") == [1.0, {"open": 2.0, "vwap": 3.0, "close": 4.0}[column]]
    assert factories.sql(engine, "SELECT backtest_table_price_column_name FROM msm__portfolio") == [(column,)]  # R19


def test_no_volume_is_null_and_not_an_obstacle(engine):  # R37
    factories.open_market(engine, prices(A=(100, 110)))
    landed(engine, [portfolio("p", fixed(A=1.0))])
    assert factories.weights(engine, "p")[["volume_current", "volume_before"]].isna().all(axis=None)


# -- override ---------------------------------------------------------------------------------------------------------------------


def test_an_override_asset_drives_the_published_close(engine):  # R77
    factories.open_market(engine, prices(A=(100, 110, 121, 110), X=(7.0, 7.7, 7.0, 14.0)))
    configuration = portfolio("p", equal("A", override_asset="X"), fee=0.0)
    landed(engine, [configuration], "2024-01-04")
    landed(engine, [configuration], "2024-01-05")  # the first return of an increment needs the price before it
    landed(engine, [configuration])
    values = factories.values(engine, "p")
    assert values["close"].tolist() == [7.0, 7.7, 7.0, 14.0]
    assert values["return"].tolist()[1:] == approx([7.7 / 7 - 1, 7 / 7.7 - 1, 1.0])
    assert values["calculated_close"].tolist() == approx([1.0, 1.1, 1.21, 1.1])
    assert set(factories.weights(engine, "p").index.get_level_values(1)) == {"A"}  # it is published, not held


def test_an_override_asset_bounds_the_window_and_is_never_filled_back(engine):  # R70, R77
    market = prices(A=(100, 110, 121, 110), X=(np.nan, 7.7, 7.0, np.nan))
    factories.open_market(engine, market)
    report = run(engine, [portfolio("p", equal("A", override_asset="X"), start_date=date(2024, 1, 2))], NEVER_LATER)
    assert factories.statuses(report) == {"p": "failed"}
    assert "X at 2024-01-02 21:00Z" in factories.messages(report)["p"]
    landed(engine, [portfolio("q", equal("A", override_asset="X"), start_date=date(2024, 1, 3))])
    assert closes(engine, "q") == [7.7, 7.0]


# -- windows ----------------------------------------------------------------------------------------------------------------------


def test_a_laggard_holds_back_its_own_portfolios_only(engine):  # R70, R71
    factories.open_market(engine, prices(A=(1, 2, 3, 4), B=(1, 2, np.nan, np.nan), C=(np.nan, np.nan, np.nan, 5)))
    landed(engine, [portfolio("a", fixed(A=1.0)), portfolio("ab", fixed(A=0.5, B=0.5)), portfolio("c", fixed(C=1.0))])
    assert [len(closes(engine, name)) for name in ("a", "ab", "c")] == [4, 2, 1]


def test_an_asset_that_is_still_held_bounds_the_window(engine):  # R70
    """B leaves the signal's universe with a new configuration of the signal only; its holding must still be valued and sold."""
    market = factories.open_market(engine, prices(A=(1, 1, 1, 1), B=(1, 1, np.nan, 1)))
    signal = schedule((market.index[0], {"A": 0.5, "B": 0.5}), (market.index[2], {"A": 1.0}))
    report = run(engine, [portfolio("p", signal)], NEVER_LATER)
    # on the third day B has to be sold and has no price
    assert factories.statuses(report) == {"p": "failed"}
    assert "no close of B at 2024-01-04 21:00Z" in factories.messages(report)["p"]
    landed(engine, [portfolio("p", signal)], "2024-01-04")
    assert len(closes(engine, "p")) == 2


def test_it_begins_when_every_asset_of_its_target_has_a_price(engine):
    factories.open_market(engine, prices(A=(1, 2, 3, 4), B=(np.nan, np.nan, 1, 1), C=(np.nan, np.nan, np.nan, 1)))
    landed(engine, [portfolio("p", schedule(("1970-01-01 00:00Z", {"A": 0.5, "B": 0.5, "C": 0.0})), fee=0.0)])
    assert factories.values(engine, "p").index.tolist() == list(factories.closes_of("2024-01-04", 2))


def test_a_start_date_is_taken_at_its_word(engine):
    factories.open_market(engine, prices(A=(1, 2, 3, 4), B=(np.nan, 1, 1, 1)))
    fleet = [
        portfolio("early", fixed(A=1.0, B=0.0), start_date=date(2024, 1, 2)),
        portfolio("late", fixed(A=1.0), start_date=date(2024, 1, 4)),
        portfolio("missing", fixed(A=0.5, B=0.5), start_date=date(2024, 1, 2)),
        portfolio("later still", fixed(A=1.0), start_date=date(2024, 6, 1)),
    ]
    report = run(engine, fleet, NEVER_LATER)
    assert factories.statuses(report) == {"early": "landed", "late": "landed", "missing": "failed", "later still": "up_to_date"}
    assert [len(closes(engine, name)) for name in ("early", "late", "missing")] == [4, 2, 0]
    assert "no close of B at 2024-01-02 21:00Z" in factories.messages(report)["missing"]


def test_missing_prices_are_named(engine):  # R69
    factories.open_market(engine, prices(A=(1, 2)))
    factories.register_assets(engine, ["B", "C"])
    report = run(engine, [portfolio("p", equal("A", "B", "C")), portfolio("q", equal("A"))], NEVER_LATER)
    assert factories.statuses(report) == {"p": "failed", "q": "landed"}
    assert "B, C" in factories.messages(report)["p"]
    assert "ExternalPricesTS" in factories.messages(report)["p"]


def test_a_gap_fails_and_is_never_a_return_of_zero(engine):
    factories.open_market(engine, prices(A=(1, np.nan, 3), B=(1, 1, 1)))
    fleet = [portfolio("fail", equal("A", "B")), portfolio("stale", equal("A", "B"), staleness=timedelta(days=1), fee=0.0)]
    report = run(engine, fleet, NEVER_LATER)
    assert factories.statuses(report) == {"fail": "failed", "stale": "landed"}
    message = factories.messages(report)["fail"]
    assert "no close of A at 2024-01-03 21:00Z (last bar 2024-01-02 21:00Z" in message
    # held at its last price for a day, then 3: half of A triples
    assert closes(engine, "stale") == approx([1.0, 1.0, 2.0])


@pytest.mark.parametrize("bad", ["NaN", "Infinity", "-Infinity", "0", "-5"])
def test_an_invalid_price_is_told_with_asset_time_and_value(engine, bad):
    factories.open_market(engine, prices(A=(1, 2, 3), B=(1, 1, 1)))
    factories.sql(
        engine, "UPDATE msm__external_prices SET close = %s WHERE asset_identifier = 'A' AND time_index = '2024-01-03 21:00Z'", (bad,)
    )
    fleet = [portfolio("p", equal("A", "B")), portfolio("b", equal("B")), portfolio("zero", fixed(A=0.0, B=1.0))]
    hold = portfolio("hold", equal("A", "B"), staleness=timedelta(days=1), missing="hold", fee=0.0)
    report = run(engine, [*fleet, hold], NEVER_LATER)
    assert factories.statuses(report) == {"p": "failed", "b": "landed", "zero": "landed", "hold": "landed"}
    expected = f"p: close of A at 2024-01-03 21:00Z is {float(bad)}; a price must be finite and above 0. Correct the source."
    assert factories.messages(report)["p"] == expected
    assert closes(engine, "hold") == approx([1.0, 1.0, 2.0])


def test_a_ruined_portfolio_fails_at_its_session(engine):
    """A short that triples: 1 - 2 * (3 - 1) < 0."""
    factories.open_market(engine, prices(A=(1, 1, 3)))
    report = run(engine, [portfolio("p", fixed(A=-2.0), on="signal_change", fee=0.0)], NEVER_LATER)
    assert "p: the value at 2024-01-04 21:00Z is -3.0" in factories.messages(report)["p"]
    landed(engine, [portfolio("p", fixed(A=-2.0), on="signal_change", fee=0.0)], "2024-01-04")
    assert closes(engine, "p") == approx([1.0, 1.0])


def test_a_signal_is_valid_strictly_shorter_than_its_forward_fill(engine):
    """Emitted at the close of the 2nd, a fill of one day ends at the close of the 3rd, exclusive: no target there, nothing to compute."""
    market = factories.open_market(engine, prices(A=(1, 2, 3, 4)))
    emitted = (market.index[0], {"A": 1.0})
    fleet = [
        portfolio("day", schedule(emitted, fill=timedelta(days=1))),
        portfolio("more", schedule(emitted, fill=timedelta(days=1, microseconds=1))),
        portfolio("none", schedule(emitted)),
    ]
    landed(engine, fleet)
    assert [len(closes(engine, c.identifier)) for c in fleet] == [1, 2, 4]


def test_the_calendar_decides_when_values_exist(engine):
    """Bars on a Saturday, and at noon, manufacture nothing; a holiday has no row."""
    factories.open_market(engine, prices(A=(1, 2, 3, 4)))  # Tuesday to Friday
    more = pd.DataFrame({"A": [9.0, 9.0, 5.0]}, pd.DatetimeIndex(["2024-01-06 21:00Z", "2024-01-04 12:00Z", "2024-01-08 21:00Z"]))
    factories.load_prices(engine, more)
    factories.sql(engine, "DELETE FROM msm__calendar_session WHERE local_date = '2024-01-03'")
    landed(engine, [portfolio("p", fixed(A=1.0), fee=0.0)])
    values = factories.values(engine, "p")
    assert [t.strftime("%a %H") for t in values.index] == ["Tue 21", "Thu 21", "Fri 21", "Mon 21"]
    assert values["close"].tolist() == approx([1.0, 3.0, 4.0, 5.0])


@pytest.mark.parametrize("last", ["2024-01-03", "2024-01-12"])
def test_a_calendar_that_ends_too_early_is_an_error(engine, last):  # R65
    """An incomplete calendar must not look like nothing to do."""
    factories.store_calendar(engine, "2024-01-01", last)
    factories.register_assets(engine, ["A"])
    factories.load_prices(engine, prices(A=[float(i + 1) for i in range(15)]))
    if last == "2024-01-12":
        landed(engine, [portfolio("p", fixed(A=1.0))], "2024-01-05")
    report = run(engine, [portfolio("p", fixed(A=1.0))], NEVER_LATER)
    assert factories.statuses(report) == {"p": "failed"}
    assert f"calendar WEEKDAYS covers 2024-01-01..{last}" in factories.messages(report)["p"]


def test_an_unknown_calendar_is_an_error(engine):
    factories.open_market(engine, prices(A=(1, 2)))
    report = run(engine, [portfolio("p", fixed(A=1.0), calendar="NO SUCH"), portfolio("q", fixed(A=1.0))], NEVER_LATER)
    assert factories.statuses(report) == {"p": "failed", "q": "landed"}
    assert "NO SUCH" in factories.messages(report)["p"]


# -- whose progress -----------------------------------------------------------------------------------------------------------------


def test_other_rows_have_no_say(engine):  # R68, R71, R73, R74, R75
    """Later and earlier rows of other portfolios, signals and assets, in every storage, with progress of their own or without."""
    market = factories.open_market(engine, prices(A=(1, 2, 3, 4), B=(1, 2, 1, 2)))
    signal = schedule((market.index[0], {"A": 1.0}), (market.index[2], {"B": 1.0}))
    configuration = portfolio("p", signal, fee=0.0)
    landed(engine, [configuration], "2024-01-03")
    for where, later in (("stranger", "2024-06-03"), ("p2", "2024-06-03"), ("P", "2023-06-01")):
        factories.sql(
            engine,
            'INSERT INTO msm__portfolios (portfolio_identifier, time_index, close, "return", calculated_close, close_time)'
            " VALUES (%s, %s, 9, 9, 9, now())",
            (where, later),
        )
        factories.sql(
            engine,
            "INSERT INTO msm__portfolio_weights (portfolio_identifier, time_index, asset_identifier, weight, weight_before, price_current)"
            " VALUES (%s, %s, 'A', .9, .1, 5)",
            (where, later),
        )
        factories.sql(
            engine,
            "INSERT INTO msm__signal_weights (signal_uid, time_index, asset_identifier, signal_weight) VALUES (%s, %s, 'A', 1)",
            (where, later),
        )
        for storage in ("PortfoliosTS", "PortfolioWeightsTS", "SignalWeightsTS"):
            factories.sql(
                engine,
                "INSERT INTO msm__data_node_update (uid, kind, storage, scope, watermark, epoch) VALUES (%s, 'x', %s, %s, %s, 5)",
                (uuid.uuid4(), storage, where, later),
            )
    factories.load_prices(engine, pd.DataFrame({"new": [1.0]}, pd.DatetimeIndex(["2024-06-03 21:00Z"])))
    factories.load_prices(engine, pd.DataFrame({"stale": [1.0]}, pd.DatetimeIndex(["2023-06-03 21:00Z"])))
    fresh = portfolio("fresh", fixed(A=1.0), fee=0.0)  # without an entry of its own it starts at the beginning
    landed(engine, [configuration, fresh])
    assert closes(engine, "p") == approx([1.0, 2.0, 3.0, 6.0])  # A doubles, 3/2, then B doubles
    assert closes(engine, "fresh") == approx([1.0, 2.0, 3.0, 4.0])


def test_a_thousand_assets_more_change_nothing(engine):  # R68
    market = factories.open_market(engine, factories.walks("2024-01-02", 30, NINE))
    fleet = factories.fleet(NINE, 10)
    nights = ("2024-01-20", "2024-02-09")
    for night in nights:
        landed(engine, fleet, night)
    expected = factories.dump(engine)
    wipe(engine)
    others = factories.walks("2023-12-20", 45, [f"a{i}" for i in range(9, 1009)], seed=5).iloc[::5]
    factories.load_prices(engine, others)
    assert others.index.max() > market.index.max()
    assert others.index.min() < market.index.min()
    for night in nights:
        landed(engine, fleet, night)
    assert factories.dump(engine) == expected


def wipe(engine: Engine) -> None:
    """Nothing was ever computed."""
    factories.sql(engine, f"TRUNCATE {', '.join(factories.OUTPUTS)}")
    factories.sql(engine, "UPDATE msm__data_node_update SET watermark = NULL, epoch = 0, row_count = 0")


# -- again and again ----------------------------------------------------------------------------------------------------------------


def test_asked_again_nothing_is_written(engine):  # R63, R64
    factories.open_market(engine, factories.walks("2024-01-02", 30, NINE))
    fleet = factories.fleet(NINE, 10)
    landed(engine, fleet)
    tables = (*factories.OUTPUTS, factories.PROGRESS, "msm__portfolio", "msm__portfolio_configuration", "msm__external_prices")
    before = factories.versions(engine, tables)
    for as_of in (NEVER_LATER, "2024-02-12 20:59", "2024-01-15", "2024-12-31"):  # an earlier as-of takes nothing back
        assert set(landed(engine, fleet, as_of).values()) == {"up_to_date"}
    assert factories.versions(engine, tables) == before


def test_a_forced_run_gives_the_same_rows(engine):  # R64
    factories.open_market(engine, factories.walks("2024-01-02", 30, NINE))
    fleet = factories.fleet(NINE, 10)
    landed(engine, fleet, "2024-01-24")
    landed(engine, fleet)
    before, epochs = factories.dump(engine), {k: row["epoch"] for k, row in factories.progress(engine).items()}
    assert "landed" in landed(engine, fleet, full_refresh=True).values()
    assert factories.dump(engine) == before
    rows = factories.progress(engine)
    assert all(row["epoch"] == epochs[k] + 1 for k, row in rows.items() if row["watermark"] is not pd.NaT and epochs[k])


def test_an_exhausted_window_does_not_ask_the_calendar(engine, monkeypatch):  # R63
    factories.open_market(engine, factories.walks("2024-01-02", 10, NINE))
    expiring = schedule(("2024-01-02 21:00Z", {"a0": 1.0}), fill=timedelta(days=3, microseconds=1))  # through Friday's close
    fleet = [portfolio("p", equal(*NINE)), portfolio("expired", expiring)]
    landed(engine, fleet)
    asked = []

    def spy(*args: Any) -> Any:
        asked.append(args)
        raise AssertionError("the calendar was asked")

    monkeypatch.setattr(construction, "resolve_calendars", spy)
    report = run(engine, fleet[:1], "2024-12-31")  # prices are exhausted
    assert (factories.statuses(report), report.rows_written, asked) == ({"p": "up_to_date"}, 0, [])
    report = run(engine, fleet[1:], "2024-12-31")  # prices go on, the signal's vector has expired
    assert (factories.statuses(report), report.rows_written, asked) == ({"expired": "up_to_date"}, 0, [])


# -- the same bits ------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def big(engine: Engine) -> list[PortfolioConfiguration]:
    factories.open_market(engine, factories.walks("2024-01-03", 75, NINE))  # to 2024-04-16, with a quarter's end
    return factories.fleet(NINE, 30)


def test_thirty_random_steps_equal_one_run(engine, big):  # R98
    landed(engine, big)
    expected = factories.dump(engine)
    # of these the vectors, of the 23rd of January at the latest, expire 60 days later: before the quarter's end that they wait for
    assert {c.identifier for c in big if not closes(engine, c.identifier)} == {"p009", "p019", "p029"}
    wipe(engine)
    generator = np.random.default_rng(23)
    minutes = np.sort(generator.integers(0, 108 * 24 * 60, 29))
    for minute in minutes:
        landed(engine, big, str(pd.Timestamp("2024-01-02") + pd.Timedelta(minutes=int(minute))), registered=True)
    landed(engine, big, registered=True)
    assert factories.dump(engine) == expected


def test_batches_do_not_reach_the_numbers(engine, big):  # R97, R98
    digests = []
    for size, order in ((64, 1), (7, -1), (1, 1)):
        landed(engine, big[::order], "2024-02-20", registered=bool(digests), batch_size=size)
        landed(engine, big[::order], registered=True, batch_size=size)
        digests.append(factories.dump(engine))
        wipe(engine)
    assert digests[0] == digests[1] == digests[2]


def test_one_by_one_equals_all_at_once(engine, big):  # R97
    landed(engine, big)
    expected = factories.dump(engine)
    wipe(engine)
    for configuration in reversed(big):
        landed(engine, [configuration], "2024-03-01", registered=True)
    landed(engine, big, registered=True)
    assert factories.dump(engine) == expected


def naive(market: pd.DataFrame, c: PortfolioConfiguration, vectors: list[tuple[pd.Timestamp, dict[str, float]]]) -> tuple[dict, dict]:
    """(value by time, {(time, asset): (weight, weight_before)}) of a portfolio, in units and cash, session after session."""
    times, fill = list(market.index), getattr(c.signal, "fill", None)
    valid: list[dict[str, float] | None] = []
    for t in times:
        known = [(s, v) for s, v in vectors if s <= t and (fill is None or t - s < fill)]
        valid.append(known[-1][1] if known else None)
    period = {"week_end": "W", "month_end": "M", "quarter_end": "Q"}.get(c.rebalance.rebalance_on)
    following = [*times[1:], times[-1] + pd.offsets.BDay()]
    events: dict[pd.Timestamp, dict[str, float]] = {}
    for i, t in enumerate(times):
        if valid[i] is None:
            continue
        if period:
            decide = t.tz_localize(None).to_period(period) != following[i].tz_localize(None).to_period(period)
        else:
            decide = c.rebalance.rebalance_on == "every_session" or i == 0 or valid[i] != valid[i - 1]
        if decide and i + c.rebalance.execution_lag < len(times):
            events[times[i + c.rebalance.execution_lag]] = valid[i]
    end = min(times[-1], *((vectors[-1][0] + fill - timedelta(microseconds=1),) if fill else ()), times[-1])
    fee, drifted = c.execution.commission_fee, c.execution.weight_accounting == "drifted"
    value, started, held, previous = 1.0, False, {}, {}
    values, trades = {}, {}
    for t in times:
        if t > end:
            break
        now = market.loc[t]
        if drifted:
            before = {a: w * now[a] / previous[a] for a, w in held.items()}
            growth = 1.0 + sum(before.values()) - sum(held.values())
            before = {a: w / growth for a, w in before.items()}
        else:
            before, growth = dict(held), 1.0 + sum(w * (now[a] / previous[a] - 1.0) for a, w in held.items())
        target = events.get(t)
        turnover = sum(abs(target.get(a, 0.0) - before.get(a, 0.0)) for a in {*target, *before}) if target is not None else 0.0
        if target is not None and turnover > 1e-13:
            trades |= {
                (t, a): (target.get(a, 0.0), before.get(a, 0.0)) for a in {*target, *before} if target.get(a, 0.0) or before.get(a, 0.0)
            }
            started = True
        value *= growth * (1.0 - fee * turnover) if drifted else growth - fee * turnover
        held = {a: w for a, w in (target if target is not None else before).items() if w}
        previous = now
        if started:
            values[t] = value
    return values, trades


def test_everything_agrees_with_the_naive_engine(engine, big):
    market = factories.walks("2024-01-03", 75, NINE)
    landed(engine, big, "2024-02-20")
    landed(engine, big)
    for c in big:
        if c.signal.kind == "scheduled":
            vectors = [(pd.Timestamp(t), v) for t, v in c.signal.vectors]
        else:
            vectors = [(pd.Timestamp(0, tz="UTC"), dict(zip(c.signal.universe, c.signal.weights().tolist(), strict=True)))]
        expected, trades = naive(market, c, vectors)
        found = factories.values(engine, c.identifier)["calculated_close"]
        assert list(found.index) == list(expected), c.identifier
        np.testing.assert_allclose(found.to_numpy(float), list(expected.values()), rtol=1e-12, err_msg=c.identifier)
        rows = factories.weights(engine, c.identifier)
        stored = {key: (w, b) for key, w, b in zip(rows.index, rows["weight"], rows["weight_before"], strict=True)}
        assert set(trades) <= set(stored), c.identifier
        for key, (weight, before) in trades.items():
            assert stored[key] == (pytest.approx(weight, abs=1e-12), pytest.approx(before, abs=1e-12)), (c.identifier, key)
        for key in set(stored) - set(trades):  # turnover of a rounding error is still a trade there
            assert abs(stored[key][0] - stored[key][1]) < 1e-12, (c.identifier, key)


def test_splits_and_batches_with_gaps_and_staleness(engine):
    """Ragged prices under `hold`: bars missing at random, several at other hours of the day, read over different windows."""
    generator = np.random.default_rng(3)
    market = factories.walks("2024-01-03", 40, NINE)
    holes = pd.DataFrame(generator.random(market.shape) < 0.25, market.index, market.columns)
    holes.iloc[[0, -1]] = False
    factories.open_market(engine, market.mask(holes))
    noon = market.iloc[::4] * 1.001
    factories.load_prices(engine, noon.set_axis(noon.index - pd.Timedelta(hours=9)))
    options = {"staleness": timedelta(days=6), "missing": "hold"}
    fleet = [portfolio(f"p{i}", equal(*NINE[: 3 + i]), lag=i % 2, accounting=("drifted", "target")[i % 2], **options) for i in range(6)]
    landed(engine, fleet)
    expected = factories.dump(engine)
    wipe(engine)
    for day in (1, 2, 9, 10, 16, 17, 30, 44, 45, 60):
        landed(engine, fleet, str(pd.Timestamp("2024-01-03 13:00") + pd.Timedelta(days=day)), registered=True, batch_size=1 + day % 3)
    landed(engine, fleet, registered=True)
    assert factories.dump(engine) == expected


# -- publication and pointers -------------------------------------------------------------------------------------------------------


def published(engine: Engine, index: str) -> list[tuple[Any, ...]]:
    query = 'SELECT time_index, close, "return" FROM msm__portfolio_index_values WHERE portfolio_index_identifier = %s ORDER BY 1'
    return factories.sql(engine, query, (index,))


def test_values_are_published_under_an_index(engine):  # R17, R22
    factories.open_market(engine, prices(**GOLDEN))
    fleet = [portfolio("p", fixed(A=1.0), index="I", fee=0.0), portfolio("plain", fixed(A=1.0), fee=0.0)]
    landed(engine, fleet, "2024-01-04")
    landed(engine, fleet)
    rows = published(engine, "I")
    assert [r[0] for r in rows] == list(factories.closes_of("2024-01-02", 4))
    assert [r[1] for r in rows] == approx([1.0, 1.1, 1.21, 1.21])
    assert [r[2] for r in rows] == approx([0.0, 0.1, 0.1, 0.0])
    assert factories.sql(engine, "SELECT count(*) FROM msm__portfolio_index_values") == [(4,)]
    linked = factories.sql(
        engine,
        "SELECT p.unique_identifier, i.unique_identifier FROM msm__portfolio p"
        " LEFT JOIN msm__index i ON i.uid = p.portfolio_index_uid ORDER BY 1",
    )
    assert linked == [("p", "I"), ("plain", None)]


def test_an_index_added_later_gets_the_whole_history(engine):
    factories.open_market(engine, prices(**GOLDEN))
    landed(engine, [portfolio("p", fixed(A=1.0))], "2024-01-04")
    before = factories.values(engine, "p")
    configuration = portfolio("p", fixed(A=1.0), index="I")
    landed(engine, [configuration])
    assert [r[0] for r in published(engine, "I")] == list(factories.closes_of("2024-01-02", 4))
    pd.testing.assert_frame_equal(factories.values(engine, "p").iloc[:2], before, check_exact=True)
    assert set(landed(engine, [configuration]).values()) == {"up_to_date"}
    landed(engine, [portfolio("p", fixed(A=1.0))])  # taken off again: what was published stays
    assert len(published(engine, "I")) == 4


def test_an_index_that_changes_hands_holds_its_new_publisher(engine):
    factories.open_market(engine, prices(A=(1, 2, 3), B=(1, 4, 16)))
    landed(engine, [portfolio("p", fixed(A=1.0), index="I", fee=0.0)])
    fleet = [portfolio("p", fixed(A=1.0), fee=0.0), portfolio("q", fixed(B=1.0), index="I", fee=0.0)]
    landed(engine, fleet)
    assert [r[1] for r in published(engine, "I")] == approx([1.0, 4.0, 16.0])
    assert closes(engine, "p") == approx([1.0, 2.0, 3.0])


def test_producers_are_on_the_portfolio_row(engine):  # R18, R86
    factories.open_market(engine, prices(A=(1, 2)))
    configuration = portfolio("p", fixed(A=1.0))
    factories.register(engine, [configuration])
    columns = "portfolio_data_node_uid, portfolio_weights_data_node_uid, signal_weights_data_node_uid"
    assert factories.sql(engine, f"SELECT {columns} FROM msm__portfolio") == [(None, None, None)]
    landed(engine, [configuration])
    rows = factories.progress(engine)
    scopes = [("PortfoliosTS", "p"), ("PortfolioWeightsTS", "p"), ("SignalWeightsTS", configuration.signal_uid)]
    assert factories.sql(engine, f"SELECT {columns} FROM msm__portfolio") == [tuple(rows[s]["uid"] for s in scopes)]
    storages = (PortfoliosStorage, PortfolioWeightsStorage, SignalWeightsStorage)
    assert [rows[s]["uid"] for s in scopes] == [Scope(t, s[1]).uid for t, s in zip(storages, scopes, strict=True)]


def test_a_run_writes_its_outputs_and_nothing_else(engine):  # R21, R62, R85
    factories.open_market(engine, factories.walks("2024-01-02", 10, NINE))
    fleet = factories.fleet(NINE, 5)
    factories.register(engine, fleet)
    tables, before = factories.relations(engine), factories.versions(engine)
    landed(engine, fleet, registered=True)
    landed(engine, fleet, registered=True, full_refresh=True)
    assert factories.relations(engine) == tables
    after = factories.versions(engine)
    written = {name for name in after if after[name] != before[name]}
    assert written == {*factories.OUTPUTS, factories.PROGRESS, "msm__portfolio", "msm__run", "msm__run_node"}
    assert {name: count for name, (count, _) in after.items() if "virtual" in name and count} == {}
    assert after["msm__asset"][0] == 9


def test_statements_do_not_depend_on_the_number_of_portfolios(engine):  # R100
    factories.open_market(engine, factories.walks("2024-01-02", 10, NINE))
    fleet = [portfolio(f"p{i:03}", equal(*NINE[: 2 + i % 7]), accounting=("drifted", "target")[i % 2]) for i in range(200)]
    landed(engine, fleet, "2024-01-12")
    counts = []
    for size, as_of in ((10, "2024-01-13"), (200, "2024-01-16")):
        with factories.statements() as sent:
            report = run(engine, fleet[:size], as_of, registered=True)
        assert report.counts()["landed"] == size
        counts.append(len([s for s in sent if s != ";"]))  # not the pool's pings
    assert counts[0] == counts[1]
    assert counts[0] < 40


def test_the_environment_is_not_read_for_every_node(engine, monkeypatch):
    """Reading settings takes a millisecond; asked for each uid, it was four fifths of a run."""
    factories.open_market(engine, factories.walks("2024-01-02", 10, NINE))
    fleet = [portfolio(f"p{i}", equal(*NINE[: 2 + i % 7])) for i in range(20)]
    factories.register(engine, fleet)
    reads: list[int] = []
    real = identity.Settings
    monkeypatch.setattr(identity, "Settings", lambda: reads.append(1) or real())
    counts = []
    for size in (2, 20):
        reads.clear()
        landed(engine, fleet[:size], f"2024-01-{size + 4:02}", registered=True)
        counts.append(len(reads))
    assert counts[0] == counts[1]


# -- one node at a time -------------------------------------------------------------------------------------------------------------


def test_a_node_runs_by_itself(engine):  # R66, R67
    factories.open_market(engine, prices(**GOLDEN))
    configuration = portfolio("p", fixed(A=0.5, B=0.5), accounting="target")
    node = PortfoliosDataNode(portfolio_configuration=configuration)
    dependencies = node.dependencies()
    assert dependencies == {
        "signal_weights": SignalWeights(signal_weights_instance=configuration.signal),
        "price_source": configuration.price_source,
    }
    first = node.run(debug_mode=True, update_tree=True, force_update=True, as_of=factories.instant("2024-01-04"))
    assert (first.status, first.rows) == ("landed", 4)  # two values, one vector of two
    again = node.run(as_of=factories.instant("2024-01-04"))
    assert (again.status, again.rows) == ("up_to_date", 0)
    assert node.run(as_of=factories.instant("2024-01-06")).status == "landed"
    assert PortfolioWeights(portfolio_configuration=configuration).run(as_of=factories.instant("2024-01-06")).status == "up_to_date"
    assert closes(engine, "p") == approx([0.99982, 1.049811, 1.1547921, 1.03931289])
    assert node.data_node_uid == factories.progress(engine)["PortfoliosTS", "p"]["uid"]
    with pytest.raises(NodeFailed, match="ghost not registered"):
        PortfoliosDataNode(portfolio_configuration=portfolio("q", fixed(ghost=1.0))).run(as_of=factories.instant("2024-01-04"))


def test_a_signal_node_runs_by_itself(engine):  # R66
    factories.register_assets(engine, ["A", "B"])
    signal = schedule(("2024-01-02 00:00Z", {"A": 1.0}), ("2024-01-09 00:00Z", {"B": 1.0}))
    node = SignalWeights(signal_weights_instance=signal)
    results = [node.run(as_of=factories.instant(t)) for t in ("2024-01-05", "2024-01-05", "2024-01-10")]
    assert [(r.status, r.rows) for r in results] == [("landed", 1), ("up_to_date", 0), ("landed", 1)]
    stored = factories.sql(engine, "SELECT asset_identifier, signal_weight, signal_uid FROM msm__signal_weights ORDER BY time_index")
    assert stored == [("A", 1.0, signal.uid), ("B", 1.0, signal.uid)]


# -- prepared, permitted, named -----------------------------------------------------------------------------------------------------


@pytest.fixture
def worker_role(engine: Engine, monkeypatch: pytest.MonkeyPatch):
    """From here on the process connects as a role that may read and write rows, and create nothing."""
    role = f"worker_{uuid.uuid4().hex[:8]}"
    factories.sql(engine, f"CREATE ROLE {role} LOGIN PASSWORD 'w'")
    factories.sql(engine, f"GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA public TO {role}")
    factories.sql(engine, "REVOKE CREATE ON SCHEMA public FROM PUBLIC")
    owner = os.environ["MSM_DATABASE_URL"]
    url = engine.url.set(drivername="postgresql", username=role, password="w").render_as_string(hide_password=False)
    monkeypatch.setenv("MSM_DATABASE_URL", url)
    worker = msm_core.database.get_engine()
    yield worker
    worker.dispose()
    monkeypatch.setenv("MSM_DATABASE_URL", owner)
    factories.sql(engine, f"DROP OWNED BY {role}")
    factories.sql(engine, f"DROP ROLE {role}")


def test_a_role_without_create_runs_everything(engine, worker_role):  # R58
    factories.open_market(engine, prices(A=(1, 2)))
    assert factories.sql(engine, "SELECT has_schema_privilege(%s, 'public', 'CREATE')", (worker_role.url.username,)) == [(False,)]
    tables = factories.relations(engine)
    landed(worker_role, [portfolio("p", fixed(A=1.0))])
    assert closes(engine, "p")
    assert factories.relations(engine) == tables


def test_what_is_not_prepared_is_refused_before_anything_is_written(engine, worker_role):  # R55, R56, R58
    factories.open_market(engine, prices(A=(1, 2)))
    configuration = portfolio("p", fixed(A=1.0))
    factories.register(engine, [configuration])
    factories.sql(engine, "DROP TABLE msm__portfolio_weights")  # the catalogue row stays: metadata alone is not preparation
    tables, before = factories.relations(engine), factories.versions(engine)
    for attempt in (
        lambda: run(worker_role, [configuration], NEVER_LATER, registered=True),
        lambda: PortfoliosDataNode(portfolio_configuration=configuration).run(),
        lambda: SignalWeights(signal_weights_instance=configuration.signal).run(),
    ):
        with pytest.raises(StorageNotPrepared, match=re.escape("missing: msm__portfolio_weights. Run `msm-ray prepare`")):
            attempt()
    assert factories.relations(engine) == tables
    assert factories.versions(engine) == before


NAMESPACED = """
    import json, sys
    from datetime import UTC, datetime
    from msm_core.data_nodes.portfolios import PortfoliosDataNode
    from msm_core.database import get_engine
    from msm_core.models import ExternalPricesStorage
    from msm_ray import prepare
    from tests import factories

    engine = get_engine()
    prepare.prepare(engine)
    suffix = sys.argv[1]
    for table in ("calendar", "calendar_session", "asset", "external_prices"):
        assert factories.sql(engine, "SELECT to_regclass(%s) IS NOT NULL", ("msm__" + table + suffix,)) == [(True,)]
    factories.sql(engine, f"INSERT INTO msm__asset{suffix} (uid, unique_identifier) VALUES (gen_random_uuid(), 'A')")
    factories.sql(engine, f"INSERT INTO msm__external_prices{suffix} (asset_identifier, time_index, close)"
                          " VALUES ('A', '2024-01-03 00:00Z', 1), ('A', '2024-01-04 00:00Z', 2)")
    configuration = factories.portfolio("p", factories.fixed(A=1.0), calendar="24/7", fee=0.0)
    node = PortfoliosDataNode(portfolio_configuration=configuration)
    report = factories.run(engine, [configuration], "2024-01-04")
    assert report.exit_code == 0, report
    print(json.dumps({
        "values": [row[0] for row in factories.sql(engine, f"SELECT close FROM msm__portfolios{suffix} ORDER BY time_index")],
        "tables": [name for (name,) in factories.sql(engine, "SELECT tablename::text FROM pg_tables WHERE schemaname='public' ORDER BY 1")],
        "storages": [row[0] for row in factories.sql(engine, f"SELECT identifier FROM msm__time_index_meta_table{suffix} ORDER BY 1")],
        "namespaces": [row[0] for row in factories.sql(engine, f"SELECT DISTINCT namespace FROM msm__time_index_meta_table{suffix}")],
        "progress": [row[0] for row in factories.sql(engine, f"SELECT DISTINCT storage FROM msm__data_node_update{suffix} ORDER BY 1")],
        "node": str(node.data_node_uid), "signal": configuration.signal_uid, "source": str(ExternalPricesStorage.storage_uid()),
    }))
"""


def in_namespace(namespace: str) -> dict[str, Any]:
    import json

    environment = {**os.environ, "MSM_AUTO_REGISTER_NAMESPACE": namespace, "PYTHONPATH": str(Path(msm_core.__file__).parents[1])}
    command = [sys.executable, "-c", textwrap.dedent(NAMESPACED), f"__{namespace}" if namespace else ""]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])  # before it, the log says that 24/7 is not stored


def test_namespaces_stand_beside_each_other(empty_engine):  # R5, R6, R7
    bare, named = in_namespace(""), in_namespace("desk1")
    assert bare["values"] == named["values"] == [1.0, 2.0]
    suffixed = [name for name in named["tables"] if name.endswith("__desk1")]
    assert {name.removesuffix("__desk1") for name in suffixed} == set(bare["tables"])
    assert set(named["tables"]) == {*bare["tables"], *suffixed}
    assert named["storages"] == [f"desk1.{name}" for name in bare["storages"]]
    assert (bare["namespaces"], named["namespaces"]) == ([""], ["desk1"])
    assert named["progress"] == [f"desk1.{name}" for name in bare["progress"]]
    assert named["node"] != bare["node"]  # the node's job hash is salted
    assert named["source"] != bare["source"]  # another storage
    assert named["signal"] == bare["signal"]  # a signal is what it is, wherever it is computed
