"""Drifted values against `bt`, an independent engine, on 33 years of 20 real stocks: fixed dates, cash, and bands.

Data: daily closes of 20 members of the S&P 500, 1990-01-02..2022-12-28, 8313 sessions, read from the file that skfolio carries
(skfolio itself is not imported: scikit-learn takes seconds). bt holds fractional positions, pays nothing, and trades on the dates
that pandas groups here, so what is compared is the arithmetic: buying, drifting, setting back to 1/20 each.
Measured on two cores: monthly 2 s, daily 12 s, weekly and bands 2 s each, nearly all of it in bt.
"""

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import bt
import numpy as np
import pandas as pd
import pytest

from msm_core.alignment import align
from msm_core.construction import construct
from msm_core.frames import Series
from msm_core.sessions import Sessions
from msm_core.signals import EqualWeights, FixedWeights
from tests.contracts import nest

HOUR = np.timedelta64(1, "h")


@pytest.fixture(scope="module")
def prices() -> pd.DataFrame:
    found = importlib.util.find_spec("skfolio")
    assert found is not None
    assert found.submodule_search_locations
    (path,) = Path(found.submodule_search_locations[0]).rglob("sp500_dataset.csv.gz")
    frame = pd.read_csv(path, index_col=0, parse_dates=True)
    assert frame.shape == (8313, 20)
    assert frame.notna().all(axis=None)
    return frame[sorted(frame)]


def ours(prices: pd.DataFrame, strategy: Mapping[str, Any], invested: float = 1.0) -> pd.Series:
    """Published closes of a portfolio without fee that has the same weight of every stock, from prices to rows."""
    days = prices.index.to_numpy().astype("datetime64[D]")
    midnights = days.astype("datetime64[us]")
    sessions = Sessions("S&P", days, midnights + 14 * HOUR, midnights + 21 * HOUR, days[0], np.datetime64("2023-01-01"))
    weight = invested / len(prices.columns)
    signal = EqualWeights(asset_list=tuple(prices))
    if invested != 1.0:
        signal = FixedWeights.from_signal_configuration(weights=dict.fromkeys(prices, weight))
    plain = nest(signal, {"calendar_key": "S&P", **strategy}).model_dump()
    plain["portfolio_build_configuration"]["execution_configuration"]["commission_fee"] = 0.0
    configuration = type(nest()).model_validate(plain)
    assert configuration.execution.weight_accounting == "drifted"
    nothing = np.full(len(days), np.nan)
    series = {asset: Series(sessions.closes, prices[asset].to_numpy(np.float64), nothing) for asset in prices}
    market = align(series, list(prices), sessions, sessions.closes, configuration.alignment, "S&P", "close", "close")
    built = construct(configuration, market, signal.emit(None, sessions.closes[-1]), None, sessions.closes[-1])
    assert built is not None
    return pd.Series(built.close, pd.DatetimeIndex(built.times).normalize())


def theirs(prices: pd.DataFrame, dates: pd.DatetimeIndex, invested: float = 1.0, band: float | None = None) -> pd.Series:
    """bt's index of the same strategy; it stands at 100 until the first purchase. band: of RunIfOutOfBounds, a share of the target."""
    weights = dict.fromkeys(prices, invested / len(prices.columns))
    algorithms = [bt.algos.RunOnDate(*dates), bt.algos.SelectAll(), bt.algos.WeighSpecified(**weights)]
    algorithms += [bt.algos.RunIfOutOfBounds(band)] if band is not None else []
    algorithms += [bt.algos.Rebalance()]
    backtest = bt.Backtest(bt.Strategy("equal", algorithms), prices, integer_positions=False, progress_bar=False)
    return bt.run(backtest).prices["equal"].loc[dates[0] :] / 100.0


@pytest.mark.parametrize("rebalance_on", ["month_end", "every_session"])
def test_equal_weights_of_twenty_stocks(prices, rebalance_on):  # design.md section 6
    dates = prices.index if rebalance_on == "every_session" else pd.DatetimeIndex(prices.groupby(prices.index.to_period("M")).tail(1).index)
    got, want = ours(prices, {"kind": "immediate_signal", "rebalance_on": rebalance_on}), theirs(prices, dates)
    assert len(got) == {"month_end": 8292, "every_session": 8313}[rebalance_on]  # January 1990 has 22 sessions; the last of them buys
    assert got.index.equals(want.index)
    np.testing.assert_allclose(got.to_numpy(), want.to_numpy(), rtol=1e-12)
    assert got.iloc[-1] > 100  # 33 years of these stocks, not a flat line


@pytest.mark.parametrize("invested", [1.0, 0.6, 1.7])
def test_weekly_with_cash_or_debt(prices, invested):
    """The last session of each week, of 9 years; what is not invested earns nothing, what is borrowed costs nothing."""
    prices = prices.iloc[-2269:]
    dates = pd.DatetimeIndex(prices.groupby(prices.index.to_period("W-SUN")).tail(1).index)
    weekly = {"kind": "calendar_event", "schedule": "weekly", "weekday": 6}
    got, want = ours(prices, weekly, invested), theirs(prices, dates, invested)
    assert got.index.equals(want.index)
    np.testing.assert_allclose(got.to_numpy(), want.to_numpy(), rtol=1e-12)


@pytest.mark.parametrize(("band", "invested"), [(0.05, 1.0), (0.25, 1.0), (0.25, 0.6)])
def test_bands(prices, band, invested):
    """Asked at every close of 9 years: set back when any stock is more than a share of its target away."""
    prices = prices.iloc[-2269:]
    strategy = {"kind": "threshold", "relative_band": band}
    got, want = ours(prices, strategy, invested), theirs(prices, prices.index, invested, band)
    assert got.index.equals(want.index)
    np.testing.assert_allclose(got.to_numpy(), want.to_numpy(), rtol=1e-12)
    assert abs(got.iloc[-1] - ours(prices, {"kind": "immediate_signal"}, invested).iloc[-1]) > 1e-6
