"""Drifted values against `bt`, an independent engine, on 33 years of 20 real stocks.

Data: daily closes of 20 members of the S&P 500, 1990-01-02..2022-12-28, 8313 sessions, read from the file that skfolio carries
(skfolio itself is not imported: scikit-learn takes seconds). bt holds fractional positions, pays nothing, and trades on the dates
that pandas groups here, so what is compared is the arithmetic: buying, drifting, setting back to 1/20 each.
Measured on two cores: monthly 2 s, daily 12 s, nearly all of it in bt.
"""

import importlib.util
from pathlib import Path

import bt
import numpy as np
import pandas as pd
import pytest

from msm_core.construction import align, construct
from msm_core.frames import Series
from msm_core.sessions import Sessions
from msm_core.signals import EqualWeights
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


def ours(prices: pd.DataFrame, rebalance_on: str) -> pd.Series:
    """Published closes of an equal-weights portfolio without fee, from prices to rows."""
    days = prices.index.to_numpy().astype("datetime64[D]")
    midnights = days.astype("datetime64[us]")
    sessions = Sessions("S&P", days, midnights + 14 * HOUR, midnights + 21 * HOUR, days[0], np.datetime64("2022-12-31"))
    signal = EqualWeights(asset_list=tuple(prices))
    plain = nest(signal, {"kind": "immediate_signal", "calendar_key": "S&P", "rebalance_on": rebalance_on}).model_dump()
    plain["portfolio_build_configuration"]["execution_configuration"]["commission_fee"] = 0.0
    configuration = type(nest()).model_validate(plain)
    assert configuration.execution.weight_accounting == "drifted"
    nothing = np.full(len(days), np.nan)
    series = {asset: Series(sessions.closes, prices[asset].to_numpy(np.float64), nothing) for asset in prices}
    market = align(series, list(prices), sessions, sessions.closes, configuration.alignment, "S&P", "close", "close")
    built = construct(configuration, market, signal.emit(None, sessions.closes[-1]), None, sessions.closes[-1])
    assert built is not None
    return pd.Series(built.close, pd.DatetimeIndex(built.times).normalize())


def theirs(prices: pd.DataFrame, dates: pd.DatetimeIndex) -> pd.Series:
    """bt's index of the same strategy; it stands at 100 until the first purchase."""
    algorithms = [bt.algos.RunOnDate(*dates), bt.algos.SelectAll(), bt.algos.WeighEqually(), bt.algos.Rebalance()]
    backtest = bt.Backtest(bt.Strategy("equal", algorithms), prices, integer_positions=False, progress_bar=False)
    return bt.run(backtest).prices["equal"].loc[dates[0] :] / 100.0


@pytest.mark.parametrize("rebalance_on", ["month_end", "every_session"])
def test_equal_weights_of_twenty_stocks(prices, rebalance_on):  # design.md section 6
    dates = prices.index if rebalance_on == "every_session" else pd.DatetimeIndex(prices.groupby(prices.index.to_period("M")).tail(1).index)
    got, want = ours(prices, rebalance_on), theirs(prices, dates)
    assert len(got) == {"month_end": 8292, "every_session": 8313}[rebalance_on]  # January 1990 has 22 sessions; the last of them buys
    assert got.index.equals(want.index)
    np.testing.assert_allclose(got.to_numpy(), want.to_numpy(), rtol=1e-12)
    assert got.iloc[-1] > 100  # 33 years of these stocks, not a flat line
