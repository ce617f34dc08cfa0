"""Decisions: when a portfolio takes a target from its signal, and when that becomes an order. Pure."""

from dataclasses import dataclass
from datetime import timedelta

import numpy as np

from msm_core.configuration import PortfolioConfiguration
from msm_core.frames import NEVER, Times
from msm_core.sessions import Sessions
from msm_core.signals import Vectors
from msm_core.valuation import Bars, Events


@dataclass(frozen=True)
class Instants:
    """When targets may be decided: `times` (D,), each in the session of index `session` (D,)."""

    times: Times
    session: np.ndarray


def decided_events(
    configuration: PortfolioConfiguration, sessions: Sessions, vectors: Vectors, bars: Bars, is_fresh: bool, after: np.datetime64,
    end: np.datetime64,
) -> Events:  # fmt: skip
    """Targets decided by `end`, and the rows at which they become orders, in (after, end]: `execution_lag` sessions later.

    A fresh portfolio decides at the first instant after `after`; an old one has decided since long before.
    """
    strategy = configuration.rebalance
    instants = _instants(configuration, sessions, after, end)
    starts = _starts(configuration, sessions, instants)
    timely = (starts <= end) & (instants.times <= end)  # NaT, a session beyond the calendar, is not
    target = vectors.valid_at(instants.times, configuration.signal.maximum_forward_fill)
    changed = _changed(vectors, target)
    first = int(np.searchsorted(instants.times, after, "right")) if is_fresh else 0
    changed[first : first + 1] = True
    through = int(np.flatnonzero(timely)[-1]) if timely.any() else -1
    decided = strategy.decisions(sessions, target, changed, through) & timely & (starts > after)
    decided[:first] = False
    kept = np.flatnonzero(decided)
    rows = np.searchsorted(bars.times, starts[kept])
    is_last = np.append(rows[1:] != rows[:-1], True) if len(rows) else np.zeros(0, bool)  # of several that become orders together
    kept, rows = kept[is_last], rows[is_last]
    is_used = np.zeros(len(vectors.times), bool)
    is_used[target[kept]] = True
    targets = vectors.weights[is_used]
    if vectors.assets != bars.assets:
        place = {asset: i for i, asset in enumerate(bars.assets)}
        wide = np.zeros((len(targets), len(bars.assets)))
        wide[:, [place[a] for a in vectors.assets]] = targets
        targets = wide
    which = (np.cumsum(is_used) - 1)[target[kept]]
    if strategy.limits is not None:
        first_use = np.unique(which, return_index=True)[1]
        targets = strategy.limits.applied(targets, bars.assets, bars.times[rows[first_use]], configuration.identifier)
    lagged = strategy.carries and strategy.execution_lag > 0
    active_from = sessions.opens[instants.session[kept] + strategy.execution_lag] if lagged else instants.times[kept]
    return Events(rows, targets, active_from, which)


def _instants(configuration: PortfolioConfiguration, sessions: Sessions, after: np.datetime64, end: np.datetime64) -> Instants:
    """Session closes; with `signal_change` on an intraday grid all valuation times; for a strategy of the open the first of a session.

    Of the window alone, and of what decides at its beginning, where decisions hang on nothing but the signal: a night is short.
    """
    strategy, every = configuration.rebalance, np.arange(len(sessions.closes))
    if strategy.trades_at_open:
        return Instants(sessions.first_times(configuration.frequency), every)
    by_bar = strategy.rebalance_on == "signal_change" and configuration.frequency < timedelta(days=1)
    if not (by_bar or strategy.decides_by_target):
        return Instants(sessions.closes, every)
    first = max(int(np.searchsorted(sessions.closes, after)) - strategy.execution_lag - 2, 0)
    window = slice(first, int(np.searchsorted(sessions.closes, end)) + 1)
    if not by_bar:
        return Instants(sessions.closes[window], every[window])
    times = sessions.part(window).valuation_times(configuration.frequency)
    return Instants(times, first + np.searchsorted(sessions.closes[window], times))


def _starts(configuration: PortfolioConfiguration, sessions: Sessions, instants: Instants) -> Times:
    """(D,) valuation time at which a target decided at each instant becomes an order; NaT beyond the calendar."""
    strategy = configuration.rebalance
    if strategy.execution_lag == 0:
        return instants.times
    starts = sessions.first_times(configuration.frequency) if strategy.carries or strategy.trades_at_open else sessions.closes
    session = instants.session + strategy.execution_lag
    return np.where(session < len(starts), starts[np.minimum(session, len(starts) - 1)], NEVER)


def _changed(vectors: Vectors, target: np.ndarray) -> np.ndarray:
    """(S,) the vector valid at a session differs in content from the one valid a session earlier."""
    previous = np.append(-1, target[:-1])
    changed = target != previous
    both = changed & (target >= 0) & (previous >= 0)
    changed[both] = (vectors.weights[target[both]] != vectors.weights[previous[both]]).any(axis=1)
    return changed
