"""Small markets written down as tables: hours or days of 2024, weekdays 14:00 to 21:00 UTC, local time UTC."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import timedelta
from typing import Any

import numpy as np
import pytest

from msm_core.construction import Construction
from msm_core.frames import Series, SignalRows, parse_frequency
from msm_core.rebalance_strategy import RebalanceStrategy
from msm_core.sessions import Sessions
from msm_core.signals import Vectors
from tests.runs import YEAR, Inputs, Scripted, portfolio

NONE = float("nan")
EVER = "1970-01-01T00:00"
HOUR = np.timedelta64(1, "h")

Numbers = Sequence[float] | float


def instant(label: str) -> np.datetime64:
    """`01-02` is its close, 21:00; `01-02 15` an hour of it; else a whole timestamp."""
    if len(label) > 8:
        return np.datetime64(label, "us")
    return np.datetime64(f"2024-{label[:5]}T{label[6:] or '21'}:00", "us")


def hand(
    strategy: RebalanceStrategy,
    first: str,
    prices: Mapping[str, Numbers],
    vectors: Sequence[tuple[str, Mapping[str, float]]],
    *,
    volumes: Mapping[str, Numbers] | None = None,
    liquidity: Mapping[str, Numbers] | None = None,
    sessions: Sessions = YEAR,
    frequency: str = "1d",
    bars: int | None = None,
    delisted: Mapping[str, str] | None = None,
    rates: Series | None = None,
    rate_fill: timedelta = timedelta(days=7),
    **options: Any,
) -> Inputs:
    """Bars at the valuation times from `first` on, one per number (a single number: `bars` times)."""
    times = sessions.valuation_times(parse_frequency(frequency))
    times = times[times >= instant(first)]

    def column(numbers: Numbers | None) -> np.ndarray:
        listed = [numbers] * (bars or 1) if isinstance(numbers, float | int) else list(numbers or [])
        return np.array(listed, float)

    series = {}
    for asset, numbers in prices.items():
        values = column(numbers)
        others = [column((given or {}).get(asset, [NONE] * len(values))) for given in (volumes, liquidity)]
        series[asset] = Series(times[: len(values)], values, others[0], others[1])
    rows = sorted((instant(time), asset, weight) for time, vector in vectors for asset, weight in vector.items())
    weights = np.array([w for _, _, w in rows], float)
    targets = Vectors.from_rows(SignalRows(np.array([t for t, _, _ in rows], "datetime64[us]"), [a for _, a, _ in rows], weights))
    return Inputs(
        portfolio(Scripted(assets=tuple(prices)), strategy=strategy, frequency=frequency, cash=rates is not None, **options),
        series,
        targets,
        sessions,
        {a: np.datetime64(f"2024-{d}") for a, d in (delisted or {}).items()},
        rates,
        rate_fill,
    )


def label(time: np.datetime64) -> str:
    text = str(time)[5:13].replace("T", " ")
    return text.removesuffix(" 21")


def weights_after(parts: Sequence[Construction]) -> dict[str, dict[str, float]]:
    """Weights after each trade, by time; assets that are sold included."""
    return {
        label(part.bars.times[row]): {
            asset: float(after)
            for asset, after, before in zip(part.assets, part.trades.after[k], part.trades.before[k], strict=True)
            if after != 0 or before != 0
        }
        for part in parts
        for k, row in enumerate(part.trades.rows)
    }


def closes(parts: Sequence[Construction]) -> dict[str, float]:
    return {label(t): float(v) for part in parts for t, v in zip(part.times, part.calculated_close, strict=True)}


def left(parts: Sequence[Construction]) -> dict[str, float]:
    """Goals that are left."""
    order = parts[-1].trades.order
    return {} if order is None else {a: g for a, g in zip(parts[-1].assets, order.goals.tolist(), strict=True) if g == g}


def near(expected: Any) -> Any:
    if isinstance(expected, dict) and expected and isinstance(next(iter(expected.values())), dict):
        return {key: near(value) for key, value in expected.items()}
    return pytest.approx(expected, rel=1e-13, abs=1e-15)


def everywhere(one: Inputs, end: str) -> list[Construction]:
    """One run; every test of a strategy holds as well bar by bar, from stored state."""
    whole = one.run(instant(end))
    times = one.sessions.valuation_times(one.configuration.frequency)
    begin = max(series.times[0] for series in one.series.values())
    nights = one.run(*times[(times >= begin) & (times < instant(end))], instant(end))
    assert weights_after(nights) == weights_after(whole)
    assert closes(nights) == closes(whole)
    assert not whole or left(nights) == left(whole)
    return whole


def with_early_close(date: str, hour: int) -> Sessions:
    """YEAR, one session of which closes early."""
    early = YEAR.dates == np.datetime64(f"2024-{date}")
    return replace(YEAR, closes=np.where(early, YEAR.dates.astype("datetime64[us]") + hour * HOUR, YEAR.closes))


def with_holiday(*dates: str) -> Sessions:
    return YEAR.part(~np.isin(YEAR.dates, [np.datetime64(f"2024-{d}") for d in dates]))  # type: ignore[arg-type]
