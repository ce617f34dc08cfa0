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
from typing import Any

import numpy as np
import pandas as pd
from common import emit, options
from in_memory import FEE, HELD, aligned, by_bt, construct, portfolio, random_bars, random_targets, seconds

ROUNDS = 3
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
    bars = random_bars(sessions_count)
    market = aligned(bars)
    targets = random_targets(portfolios)
    fleets = {name: [portfolio(i, target, spec) for i, target in enumerate(targets)] for name, spec in STRATEGIES.items()}
    days = sessions_count * portfolios
    closes = pd.DataFrame(market.prices, pd.DatetimeIndex(market.grid, tz="UTC"), market.assets)
    long = closes.rename_axis("time_index").melt(ignore_index=False, var_name="asset_identifier", value_name="close").reset_index()
    rows = [long.loc[long["asset_identifier"].isin(list(target)), :] for target in targets[:10]]
    weights = [np.array(list(target.values())) for target in targets]
    rates: dict[str, list[float]] = {}
    for _ in range(ROUNDS):
        for name, fleet in fleets.items():
            rates.setdefault(name, []).append(days / seconds(lambda fleet=fleet: construct(fleet, market)))
        from_bars = days / seconds(lambda: construct(fleets["immediate"], aligned(bars)))
        pandas_rate = len(rows) * sessions_count / seconds(lambda: [_by_pandas(r, w) for r, w in zip(rows, weights, strict=False)])
        bt_rate = sessions_count / seconds(lambda: by_bt(closes.tz_localize(None), targets[0]))
        rates.setdefault("vs_pandas", []).append(from_bars / pandas_rate)
        rates.setdefault("vs_bt", []).append(from_bars / bt_rate)
    agree = construct(fleets["immediate"][:1], market)[0].close
    np.testing.assert_allclose(agree, _by_pandas(rows[0], weights[0]), rtol=1e-12)
    result = {name: round(statistics.median(found), 1 if name.startswith("vs_") else 0) for name, found in rates.items()}
    print("\n".join(f"{name:28} {value:>14,.0f}" for name, value in result.items()), file=sys.stderr)
    emit({"portfolios": portfolios, "sessions": sessions_count, "assets": HELD, **result})


def _by_pandas(rows: Any, target: np.ndarray) -> np.ndarray:
    """What a user would write for one portfolio, from its bars as a query returns them."""
    closes = rows.pivot(index="time_index", columns="asset_identifier", values="close").sort_index()
    grown = (1.0 + closes.pct_change().fillna(0.0)).mul(target, axis=1)
    gross = grown.sum(axis=1)
    before = grown.div(gross, axis=0)
    before.iloc[0], gross.iloc[0] = 0.0, 1.0
    turnover = before.sub(target, axis=1).abs().sum(axis=1)
    return (gross * (1.0 - FEE * turnover)).cumprod().to_numpy()


if __name__ == "__main__":
    main()
