"""How much work a node is, before it is done: what batches are sized by, and what is left of a run is told from.

Rough on purpose, and never part of a result. What costs is measured on one machine (lab and benchmarks): Postgres writing a row with its
key is most of it, the numbers behind it a little, and a node has its own share of reading, checking and bookkeeping.
"""

from datetime import UTC, datetime, timedelta
from typing import NamedTuple

from msm_core.data_nodes.interpolated_prices import InterpolatedAsset
from msm_core.data_nodes.portfolios import PortfoliosDataNode
from msm_core.frames import parse_frequency
from msm_core.signals.computed import ComputedSignal
from msm_ray.plan import Work

NODE_SECONDS = 1e-3
ROW_SECONDS = 2.5e-6
CELL_SECONDS = 2e-8
SESSIONS_PER_DAY = 5 / 7
FRESH_SESSIONS = 5_000  # guess for a window without a start
PRICE_COLUMNS = 12  # of a bar, which travel along
WINDOW_WEIGHT = 0.1  # of a number in a signal's window, which is a view, against one of a portfolio's
DAY = timedelta(days=1)
EVENTS_PER_SESSION = {"every_session": 1.0, "week_end": 1 / 5, "month_end": 1 / 21, "quarter_end": 1 / 63, "signal_change": 1 / 21}


class Load(NamedTuple):
    """Rows that will be written, cells (valuation times x assets) that are computed with, and seconds of one core for all of it."""

    rows: float
    cells: float
    seconds: float

    @classmethod
    def of(cls, rows: float, cells: float) -> "Load":
        return cls(rows, cells, NODE_SECONDS + rows * ROW_SECONDS + cells * CELL_SECONDS)


def load_of(node: Work, as_of: datetime) -> Load:
    if isinstance(node, InterpolatedAsset):
        bars = _sessions(node.since, None, as_of) * (DAY / parse_frequency(node.source_cadence))
        return Load.of(bars, bars * PRICE_COLUMNS)
    if isinstance(node, PortfoliosDataNode):
        return _portfolio_load(node, as_of)
    signal = node.signal_weights_instance
    width = len(signal.universe)
    if not isinstance(signal, ComputedSignal):
        return Load.of(width, width)
    emitted = _sessions(node.since, None, as_of) * EVENTS_PER_SESSION.get(signal.emit_on, 1.0)
    return Load.of(emitted * width, emitted * width * max(signal.history_sessions * WINDOW_WEIGHT, 1.0))


def _portfolio_load(node: PortfoliosDataNode, as_of: datetime) -> Load:
    configuration = node.portfolio_configuration
    start = datetime.combine(configuration.start_date, datetime.min.time(), UTC) if configuration.start_date else None
    sessions = _sessions(node.since, start, as_of)
    bars, strategy = sessions * (DAY / configuration.frequency), configuration.rebalance
    events = bars if strategy.carries else sessions * EVENTS_PER_SESSION.get(strategy.rebalance_on, 1.0)
    width = len(node.assets)
    return Load.of(bars + events * width, bars * (width + 1))


def _sessions(since: datetime | None, start: datetime | None, as_of: datetime) -> float:
    """Sessions of a window that goes on from `since`, or begins at `start`."""
    begin = since or start
    return (FRESH_SESSIONS if begin is None else max((as_of - begin).days, 1) * SESSIONS_PER_DAY) + 1
