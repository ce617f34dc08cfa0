"""The same portfolios valued in memory by our kernels, by `bt` and by `vectorbt`, in one run: how fast, and how far apart.

python benchmarks/peers.py [--quick]

Portfolios of 50 assets with fixed target weights over 2 500 sessions, fee 0.00018 of traded value, set back to the target at every session
or at month ends; prices in memory, one process. Medians of three rounds in which the engines take turns of 2 s or more (a run of `bt` is
longer): a busy machine slows them all, and memory is as cold, or warm, for one as for another.

ours      a batch of 100 portfolios from their bars: aligned, traded, valued, the weights and digests of the rows included
bt        one portfolio, another one in each round, with fractional positions
vectorbt  20 portfolios in one `from_orders` by target percent with shared cash, sales first; `value()` at every session. 5 or 100 in one
          call are as fast. Its wide frames are laid out and its code is compiled before the clock starts

Rates are in portfolio-years of 252 sessions per second; `vs_*` are medians of the ratios of each round. It is not quite the same work:
both peers simulate orders and record them one by one, ours trades vectors.

`relative_difference` is the greatest one of final values. Without a fee there is none but rounding, and the run fails above 1e-9. With a
fee they differ by whom it is taken from:

ours      from the whole: value * (1 - fee * turnover), and every asset has its target weight
bt        from the order: an asset ends beside its target by the fee of its own order. Some 1e-6
vectorbt  from the cash: the last purchases of a session are cut by what is missing. Some 1e-5

vectorbt is not among our dependencies (Apache 2.0 with the Commons Clause). Without it its part is null. With it, in an environment apart:

python -m venv peers && peers/bin/pip install -e '.[test]' vectorbt vectorbt-rust && peers/bin/python benchmarks/peers.py

Without vectorbt-rust it compiles by numba, once, for up to a minute.
"""

import gc
import importlib
import importlib.metadata
import importlib.util
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from common import emit, options
from in_memory import FEE, HELD, Bars, aligned, by_bt, construct, portfolio, random_bars, random_targets

ROUNDS = 3
YEAR = 252
AT_ONCE = 20  # portfolios in one call of vectorbt
CASH = 1e6
EVENTS = ("every_session", "month_end")
DISTRIBUTIONS = ("pandas", "numpy", "bt", "vectorbt", "vectorbt-rust")
ROUNDING = 1e-9
FEE_TAKEN_ELSEWHERE = {"bt": 1e-5, "vectorbt": 1e-4}  # no more than this, or it is something else

Final = dict[int, float]  # portfolio to last value
PerEvent = dict[str, float]


@dataclass(frozen=True)
class Task:
    bars: Bars
    closes: pd.DataFrame
    targets: list[dict[str, float]]

    @classmethod
    def random(cls, sessions: int, portfolios: int) -> "Task":
        bars = random_bars(sessions)
        market = aligned(bars)
        return cls(bars, pd.DataFrame(market.prices, pd.DatetimeIndex(market.grid), market.assets), random_targets(portfolios))


def _ours(task: Task, members: Sequence[int], event: str, fee: float) -> Callable[[], Final]:
    spec = {"kind": "immediate_signal", "rebalance_on": event}
    fleet = [portfolio(i, task.targets[i], spec, fee) for i in members]
    return lambda: {i: float(c.close[-1]) for i, c in zip(members, construct(fleet, aligned(task.bars)), strict=True)}


def _bt(task: Task, members: Sequence[int], event: str, fee: float) -> Callable[[], Final]:
    return lambda: {i: float(by_bt(task.closes, task.targets[i], event == "month_end", fee).iloc[-1]) for i in members}


def _vectorbt(task: Task, members: Sequence[int], event: str, fee: float) -> Callable[[], Final]:
    from_orders = importlib.import_module("vectorbt").Portfolio.from_orders
    wide = pd.concat({i: task.closes[list(task.targets[i])] for i in members}, axis=1)
    months = task.closes.index.to_numpy().astype("datetime64[M]")
    trades = np.append(months[1:] != months[:-1], True) if event == "month_end" else np.full(len(months), True)
    size = np.full(wide.shape, np.nan)
    size[trades] = [weight for i in members for weight in task.targets[i].values()]
    how: dict[str, Any] = {"size_type": "targetpercent", "group_by": 0, "cash_sharing": True, "call_seq": "auto", "freq": "1D"}
    return lambda: (from_orders(wide, size, **how, fees=fee, init_cash=CASH).value().iloc[-1] / CASH).to_dict()


ENGINES = {"ours": _ours, "bt": _bt, "vectorbt": _vectorbt}
PEERS = ("bt", "vectorbt")


def main() -> None:
    quick = options(__doc__).quick
    task = Task.random(*((195, 40) if quick else (2500, 100)))  # both end with a month
    turn_seconds = 0.5 if quick else 2.0
    found = [peer for peer in PEERS if _usable(peer)]
    rates, differences = _measured(task, found, turn_seconds)
    exact = {peer: _without_fee(task, peer) for peer in found}
    medians = {name: {event: round(statistics.median(of[event]), 1) for event in EVENTS} for name, of in rates.items()}
    for name, of in medians.items():
        print(f"{name:10}" + "".join(f"{of[event]:>12,.1f} {event}" for event in EVENTS) + "  portfolio-years/s", file=sys.stderr)
    emit(
        {
            "portfolios": len(task.targets),
            "sessions": len(task.closes),
            "assets": HELD,
            "rounds": ROUNDS,
            "portfolio_years_per_second": {name: medians.get(name) for name in ENGINES},
            **{f"vs_{peer}": _ratios(rates["ours"], rates[peer]) if peer in found else None for peer in PEERS},
            "relative_difference": {peer: differences.get(peer) for peer in PEERS},
            "relative_difference_without_fee": {peer: exact.get(peer) for peer in PEERS},
            "versions": _versions(),
        }
    )
    too_far = [p for p in found if not _within(exact[p], ROUNDING) or not _within(differences[p], FEE_TAKEN_ELSEWHERE[p])]
    if too_far:
        sys.exit(f"final values differ from those of {', '.join(too_far)} by more than rounding and fees explain")


def _usable(peer: str) -> bool:
    """Whether it is there and works beside our pandas; stderr says why not. Compiles what it compiles."""
    if importlib.util.find_spec(peer) is None:
        print(f"{peer} is left out: it is not installed", file=sys.stderr)
        return False
    small = Task.random(60, 2)
    try:
        for event in EVENTS:
            ENGINES[peer](small, (0, 1), event, FEE)()
    except Exception as error:  # of its import, or of a pandas that it does not know
        print(f"{peer} {_versions()[peer]} is left out, it does not work here: {error!r}", file=sys.stderr)
        return False
    return True


def _measured(task: Task, peers: Iterable[str], turn_seconds: float) -> tuple[dict[str, dict[str, list[float]]], dict[str, PerEvent]]:
    """Portfolio-years per second of each engine, event and round; the greatest relative difference of final values from ours."""
    rates = {name: {event: [] for event in EVENTS} for name in ("ours", *peers)}
    differences: dict[str, PerEvent] = {peer: dict.fromkeys(EVENTS, 0.0) for peer in peers}
    for event in EVENTS * ROUNDS:
        final: dict[str, Final] = {}
        for name in rates:
            members = _members(name, len(rates[name][event]), len(task.targets))
            taken, final[name] = _turn(ENGINES[name](task, members, event, FEE), turn_seconds)
            rates[name][event].append(len(members) * len(task.closes) / YEAR / taken)
        for peer, of in differences.items():
            of[event] = float(np.maximum(of[event], _apart(final["ours"], final[peer])))
    return rates, differences


def _turn(work: Callable[[], Final], least: float) -> tuple[float, Final]:
    """Mean seconds of as many repetitions as begin within `least` seconds, and what the last one found."""
    taken, runs, final = 0.0, 0, {}
    end = time.perf_counter() + least
    while not runs or time.perf_counter() < end:
        gc.collect()  # nobody pays for garbage of before
        started = time.perf_counter()
        final = work()
        taken, runs = taken + time.perf_counter() - started, runs + 1
    return taken / runs, final


def _members(name: str, turn: int, portfolios: int) -> range:
    return {"ours": range(portfolios), "bt": range(turn, turn + 1), "vectorbt": range(min(AT_ONCE, portfolios))}[name]


def _without_fee(task: Task, peer: str) -> PerEvent:
    members = _members(peer, 0, len(task.targets))
    return {event: _apart(_ours(task, members, event, 0.0)(), ENGINES[peer](task, members, event, 0.0)()) for event in EVENTS}


def _apart(ours: Final, theirs: Final) -> float:
    return float(np.max([abs(value / ours[i] - 1.0) for i, value in theirs.items()]))  # NaN if any is


def _within(found: PerEvent, limit: float) -> bool:
    return all(difference <= limit for difference in found.values())  # a NaN is not


def _ratios(ours: dict[str, list[float]], theirs: dict[str, list[float]]) -> PerEvent:
    return {event: round(statistics.median(a / b for a, b in zip(ours[event], theirs[event], strict=True)), 1) for event in EVENTS}


def _versions() -> dict[str, str | None]:
    def version(distribution: str) -> str | None:
        try:
            return importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            return None

    return {distribution: version(distribution) for distribution in DISTRIBUTIONS}


if __name__ == "__main__":
    main()
