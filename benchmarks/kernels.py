"""Portfolio-days per second of each rebalance strategy, in one process, prices in memory; and the ratio to pandas and to bt.

python benchmarks/kernels.py [--quick]

100 portfolios of 50 assets out of 200 over 2 500 sessions: from aligned prices and signal vectors to values, weights and open orders, as a
batch computes them; no database. Portfolio-days per second; medians of the rounds.

vs_pandas  `immediate`, the aligning of the bars included, against what a user would write: one pandas pipeline per portfolio, from the long
           frame of its bars (pivot, returns, drifted weights, turnover, fee, compounding). Both do the same and agree to 1e-12.
vs_bt      the same against `bt` with fractional positions, which simulates orders
"""

import statistics
import sys
import time
import uuid
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
from common import emit, options

from msm_core.alignment import Market, PriceAlignmentPolicy, align
from msm_core.configuration import PortfolioConfiguration
from msm_core.construction import Construction, executed, finished, prepared
from msm_core.data_nodes.prices import APIDataNode
from msm_core.frames import Series
from msm_core.sessions import Sessions
from msm_core.signals import FixedWeights

ROUNDS = 3
ASSETS, HELD = 200, 50
FEE = 0.00018
SLOW = {"total_notional": 2e9}
STRATEGIES: dict[str, dict[str, Any]] = {
    "immediate": {"kind": "immediate_signal"},
    "immediate_month_end": {"kind": "immediate_signal", "rebalance_on": "month_end"},
    "threshold": {"kind": "threshold", "absolute_band": 0.002},
    "calendar_event": {"kind": "calendar_event", "schedule": "weekly", "weekday": 2},
    "time_weighted": {"kind": "time_weighted", "rebalance_on": "month_end"},
    "volume_participation": {"kind": "volume_participation", "rebalance_on": "month_end", **SLOW},
    "liquidity_constrained": {
        "kind": "liquidity_constrained",
        "rebalance_on": "month_end",
        **SLOW,
        "available_liquidity_column": "available",
        "max_liquidity_fraction": 0.01,
    },
    "trailing_adv_participation": {"kind": "trailing_adv_participation", "rebalance_on": "month_end", **SLOW},
}


def main() -> None:
    quick = options(__doc__).quick
    sessions_count, portfolios = (500, 20) if quick else (2500, 100)
    bars = _bars(sessions_count)
    market = _aligned(bars)
    weights = np.random.default_rng(2).dirichlet(np.ones(HELD), portfolios)
    held = [sorted(np.random.default_rng(i).choice(ASSETS, HELD, replace=False).tolist()) for i in range(portfolios)]
    fleets = {name: [_portfolio(i, market, held[i], weights[i], spec) for i in range(portfolios)] for name, spec in STRATEGIES.items()}
    days = sessions_count * portfolios
    closes = pd.DataFrame(market.prices, pd.DatetimeIndex(market.grid, tz="UTC"), market.assets)
    long = closes.rename_axis("time_index").melt(ignore_index=False, var_name="asset_identifier", value_name="close").reset_index()
    rows = [long.loc[long["asset_identifier"].isin([market.assets[a] for a in held[i]]), :] for i in range(10)]
    rates: dict[str, list[float]] = {}
    for _ in range(ROUNDS):
        for name, fleet in fleets.items():
            rates.setdefault(name, []).append(days / _seconds(lambda fleet=fleet: _construct(fleet, market)))
        from_bars = days / _seconds(lambda: _construct(fleets["immediate"], _aligned(bars)))
        pandas_rate = len(rows) * sessions_count / _seconds(lambda: [_by_pandas(r, w) for r, w in zip(rows, weights, strict=False)])
        bt_rate = sessions_count / _seconds(lambda: _by_bt(closes.iloc[:, held[0]], weights[0]))
        rates.setdefault("vs_pandas", []).append(from_bars / pandas_rate)
        rates.setdefault("vs_bt", []).append(from_bars / bt_rate)
    agree = _construct(fleets["immediate"][:1], market)[0].close
    np.testing.assert_allclose(agree, _by_pandas(rows[0], weights[0]), rtol=1e-12)
    result = {name: round(statistics.median(found), 1 if name.startswith("vs_") else 0) for name, found in rates.items()}
    print("\n".join(f"{name:28} {value:>14,.0f}" for name, value in result.items()), file=sys.stderr)
    emit({"portfolios": portfolios, "sessions": sessions_count, "assets": HELD, **result})


def _seconds(work: Callable[[], Any]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def _bars(count: int) -> tuple[Sessions, dict[str, Series]]:
    """Random walks with volumes, a bar at every close; liquidity stands for the column that a strategy asks for."""
    dates = pd.bdate_range("2012-01-02", periods=count).to_numpy().astype("datetime64[D]")
    closes = dates.astype("datetime64[us]") + np.timedelta64(21, "h")
    sessions = Sessions("benchmark", dates, closes - np.timedelta64(390, "m"), closes, dates[0] - 7, dates[-1] + 370)
    random = np.random.default_rng(1)
    steps = random.normal(0.0003, 0.015, (count, ASSETS))
    prices, volumes = 100 * np.cumprod(1 + steps, axis=0), random.lognormal(13, 1, (count, ASSETS))
    return sessions, {f"A{i:03}": Series(closes, prices[:, i], volumes[:, i], prices[:, i] * volumes[:, i]) for i in range(ASSETS)}


def _aligned(bars: tuple[Sessions, dict[str, Series]]) -> Market:
    sessions, series = bars
    return align(series, sorted(series), sessions, sessions.closes, PriceAlignmentPolicy(), "benchmark", "close", "close")


def _portfolio(i: int, market: Market, held: list[int], weights: np.ndarray, strategy: dict[str, Any]) -> PortfolioConfiguration:
    signal = FixedWeights.from_signal_configuration(weights={market.assets[a]: float(w) for a, w in zip(held, weights, strict=True)})
    return PortfolioConfiguration.model_validate(
        {
            "portfolio_build_configuration": {
                "price_source_instance": APIDataNode(time_index_meta_table_uid=uuid.UUID(int=1)),
                "execution_configuration": {"commission_fee": FEE},
                "backtesting_weights_configuration": {
                    "signal_weights_instance": signal,
                    "rebalance_strategy_instance": {"calendar_key": "benchmark", **strategy},
                },
            },
            "portfolio_markets_configuration": {"portfolio_identifier": f"p{i}"},
        }
    )


def _construct(fleet: list[PortfolioConfiguration], market: Market) -> list[Construction]:
    end = market.grid[-1]
    windows = [w for c in fleet if (w := prepared(c, market, c.signal.emit(None, end), None, end))]
    done = [finished(w, t) for w, t in zip(windows, executed(windows), strict=True) if not isinstance(t, Exception)]
    return [c for c in done if c is not None]


def _by_pandas(rows: Any, target: np.ndarray) -> np.ndarray:
    """What a user would write for one portfolio, from its bars as a query returns them."""
    closes = rows.pivot(index="time_index", columns="asset_identifier", values="close").sort_index()
    grown = (1.0 + closes.pct_change().fillna(0.0)).mul(target, axis=1)
    gross = grown.sum(axis=1)
    before = grown.div(gross, axis=0)
    before.iloc[0], gross.iloc[0] = 0.0, 1.0
    turnover = before.sub(target, axis=1).abs().sum(axis=1)
    return (gross * (1.0 - FEE * turnover)).cumprod().to_numpy()


def _by_bt(closes: pd.DataFrame, target: np.ndarray) -> Any:
    import bt  # not needed by anything else here

    bt.core.is_zero = lambda x: abs(x) < 1e-16
    algos = [
        bt.algos.RunDaily(run_on_first_date=True),
        bt.algos.WeighSpecified(**dict(zip(closes, target, strict=True))),
        bt.algos.Rebalance(),
    ]
    strategy = bt.Strategy("s", [bt.algos.SelectAll(), *algos])
    frame = closes.tz_localize(None)
    backtest = bt.Backtest(strategy, frame, integer_positions=False, commissions=lambda q, p: abs(q) * p * FEE, progress_bar=False)
    backtest.run()
    return backtest.strategy.prices


if __name__ == "__main__":
    main()
