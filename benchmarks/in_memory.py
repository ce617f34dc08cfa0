"""Prices and portfolios in memory, for the benchmarks of the arithmetic alone: 50 assets out of 200 each, fixed target weights."""

import time
import uuid
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd

from msm_core.alignment import Market, PriceAlignmentPolicy, align
from msm_core.configuration import PortfolioConfiguration
from msm_core.construction import Construction, executed, finished, prepared
from msm_core.data_nodes.prices import APIDataNode
from msm_core.frames import Series
from msm_core.sessions import Sessions
from msm_core.signals import FixedWeights

ASSETS, HELD = 200, 50
FEE = 0.00018  # of traded value

Bars = tuple[Sessions, dict[str, Series]]


def seconds(work: Callable[[], Any]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def random_bars(count: int) -> Bars:
    """Random walks with volumes, a bar at every close; liquidity stands for the column that a strategy asks for."""
    dates = pd.bdate_range("2012-01-02", periods=count).to_numpy().astype("datetime64[D]")
    closes = dates.astype("datetime64[us]") + np.timedelta64(21, "h")
    sessions = Sessions("benchmark", dates, closes - np.timedelta64(390, "m"), closes, dates[0] - 7, dates[-1] + 370)
    random = np.random.default_rng(1)
    steps = random.normal(0.0003, 0.015, (count, ASSETS))
    prices, volumes = 100 * np.cumprod(1 + steps, axis=0), random.lognormal(13, 1, (count, ASSETS))
    return sessions, {f"A{i:03}": Series(closes, prices[:, i], volumes[:, i], prices[:, i] * volumes[:, i]) for i in range(ASSETS)}


def aligned(bars: Bars) -> Market:
    sessions, series = bars
    return align(series, sorted(series), sessions, sessions.closes, PriceAlignmentPolicy(), "benchmark", "close", "close")


def random_targets(portfolios: int) -> list[dict[str, float]]:
    """Asset to weight, one for each portfolio; the assets in their order in the market."""
    weights = np.random.default_rng(2).dirichlet(np.ones(HELD), portfolios).tolist()
    held = [sorted(np.random.default_rng(i).choice(ASSETS, HELD, replace=False).tolist()) for i in range(portfolios)]
    return [{f"A{asset:03}": w for asset, w in zip(*pair, strict=True)} for pair in zip(held, weights, strict=True)]


def portfolio(i: int, target: dict[str, float], strategy: dict[str, Any], fee: float = FEE) -> PortfolioConfiguration:
    return PortfolioConfiguration.model_validate(
        {
            "portfolio_build_configuration": {
                "price_source_instance": APIDataNode(time_index_meta_table_uid=uuid.UUID(int=1)),
                "execution_configuration": {"commission_fee": fee},
                "backtesting_weights_configuration": {
                    "signal_weights_instance": FixedWeights.from_signal_configuration(weights=target),
                    "rebalance_strategy_instance": {"calendar_key": "benchmark", **strategy},
                },
            },
            "portfolio_markets_configuration": {"portfolio_identifier": f"p{i}"},
        }
    )


def construct(fleet: list[PortfolioConfiguration], market: Market) -> list[Construction]:
    end = market.grid[-1]
    windows = [w for c in fleet if (w := prepared(c, market, c.signal.emit(None, end), None, end))]
    done = [finished(w, t) for w, t in zip(windows, executed(windows), strict=True) if not isinstance(t, Exception)]
    return [c for c in done if c is not None]


def by_bt(closes: pd.DataFrame, target: dict[str, float], monthly: bool = False, fee: float = FEE) -> pd.Series:
    """Values of one portfolio by `bt`, with fractional positions; 1.0 before the first purchase."""
    import bt  # not needed by anything else here

    schedule = bt.algos.RunMonthly if monthly else bt.algos.RunDaily
    algos = [
        schedule(run_on_first_date=not monthly, run_on_end_of_period=monthly, run_on_last_date=True),
        bt.algos.SelectAll(),
        bt.algos.WeighSpecified(**target),
        bt.algos.Rebalance(),
    ]
    commissions = (lambda quantity, price: abs(quantity) * price * fee) if fee else None
    own = closes[list(target)]
    backtest = bt.Backtest(bt.Strategy("s", algos), own, integer_positions=False, commissions=commissions, progress_bar=False)
    backtest.run()
    return backtest.strategy.prices / 100.0
