"""Orders that take more than a night: what is left of them is stored with the rows, resumed, replaced, and gone when it must be."""

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import numpy as np
import pandas as pd
import pytest
from sqlalchemy import Engine

from msm_core import storage
from msm_core.configuration import PortfolioConfiguration
from msm_core.data_nodes.base import Batch, update_batch
from msm_core.data_nodes.construction import PortfolioKind
from msm_core.data_nodes.signals import SignalKind
from msm_core.database import transaction
from msm_core.rebalance_strategy import LiquidityConstrained, RebalanceStrategy, TimeWeighted, TrailingADVParticipation, VolumeParticipation
from msm_core.verification import verify
from tests import factories, mixed
from tests.factories import CALENDAR, equal, fixed, instant, messages, portfolio, run, schedule, sql, statuses
from tests.mixed import END, NINE, ORDERS, bits, landed, nightly, wipe

scheduled, strangers = factories.scheduled, mixed.strangers

ALL_DAY: dict[str, Any] = {"calendar_key": CALENDAR, "rebalance_start": "0:00", "rebalance_end": "24:00"}


def participating(percent: float = 0.01, notional: float = 10_000, **options: Any) -> VolumeParticipation:
    return VolumeParticipation(max_percent_volume_in_bar=percent, total_notional=notional, **ALL_DAY | options)


def trailing(notional: float, lookback: int = 3, **options: Any) -> TrailingADVParticipation:
    return TrailingADVParticipation(total_notional=notional, lookback_sessions=lookback, **ALL_DAY | options)


def open_orders(engine: Engine, identifier: str) -> list[tuple[Any, ...]]:
    """(time, asset, target weight, used weight) of what is left to do."""
    query = f"SELECT time_index, asset_identifier, target_weight, used_weight FROM {ORDERS} WHERE portfolio_identifier = %s ORDER BY 2"
    return sql(engine, query, (identifier,))


def violations(engine: Engine) -> tuple[str, ...]:
    with transaction(engine, read_only=True) as connection:
        return verify(connection).violations


def flat_market(engine: Engine, count: int = 8, volume: float = 1000.0) -> pd.DataFrame:
    """A and B at 100 for ever, 1 000 of each traded in every session: 1 % of a bar is 1 000 in money, a tenth of 10 000."""
    closes = pd.DataFrame(100.0, factories.closes_of("2024-01-02", count), ["A", "B"])
    return factories.open_market(engine, closes, volume=closes * 0 + volume)


# -- by hand ------------------------------------------------------------------------------------------------------------------------


def test_an_order_takes_as_many_nights_as_it_needs(engine):
    """A goes to .35 in steps of .1: .1, .2, .3, .35; what is left is stored at the watermark and gone when nothing is."""
    closes = flat_market(engine)
    fleet = [portfolio("p", fixed(A=0.35), rebalance=participating(rebalance_on="signal_change"), fee=0.0)]
    left = []
    for night in closes.index[:5]:
        landed(engine, fleet, night)
        left.append(open_orders(engine, "p"))
    assert left == [[(t, "A", 0.35, 0.0)] for t in closes.index[:3]] + [[], []]
    assert factories.weights(engine, "p")["weight"].tolist() == pytest.approx([0.1, 0.2, 0.3, 0.35], abs=1e-15)
    progress = factories.progress(engine)["PortfolioRebalanceStateTS", "p"]
    assert (progress["watermark"], progress["row_count"]) == (closes.index[4], 0)
    assert violations(engine) == ()


def test_a_newer_order_replaces_what_is_left_of_an_older_one(engine):
    """.35 is under way when .05 is decided: .1, .2, then down by .1, then the last .05; B, of the second order only, is bought too."""
    closes = flat_market(engine)
    signal = schedule((closes.index[0], {"A": 0.35}), (closes.index[2], {"A": 0.05, "B": 0.15}))
    fleet = [portfolio("p", signal, rebalance=participating(rebalance_on="signal_change"), fee=0.0)]
    for night in closes.index[:3]:
        landed(engine, fleet, night)
    assert open_orders(engine, "p") == [(closes.index[2], "A", 0.05, 0.0), (closes.index[2], "B", 0.15, 0.0)]
    landed(engine, fleet)
    assert open_orders(engine, "p") == []
    rows = factories.weights(engine, "p")["weight"].unstack()
    assert rows["A"].tolist() == pytest.approx([0.1, 0.2, 0.1, 0.05], abs=1e-15)
    assert rows["B"].tolist()[2:] == pytest.approx([0.1, 0.15], abs=1e-15)


def test_an_order_of_which_nothing_trades_yet_is_waited_with(engine):
    """No volume for two sessions: nothing is bought, the portfolio has not begun, and the order is not lost."""
    closes = flat_market(engine)
    sql(engine, "UPDATE msm__external_prices SET volume = 0 WHERE time_index <= %s", (closes.index[1],))
    fleet = [portfolio("p", fixed(A=0.15), rebalance=participating(rebalance_on="signal_change"), fee=0.0)]
    nightly(engine, fleet, closes.index)
    found = bits(engine)
    assert factories.weights(engine, "p")["weight"].tolist() == pytest.approx([0.1, 0.15], abs=1e-15)
    assert factories.values(engine, "p").index.tolist() == list(closes.index[2:])
    wipe(engine)
    landed(engine, fleet)
    assert bits(engine) == found


# -- the same bits ------------------------------------------------------------------------------------------------------------------


def strategies() -> dict[str, RebalanceStrategy]:
    """None of them gets a tenth of a portfolio done in a session: volumes are some 500 000, prices some 100."""
    return {
        "volume": participating(0.01, 2e8),
        "volume-change": participating(0.01, 6e7, rebalance_on="signal_change", execution_lag=1),
        "trailing": trailing(2e9, rebalance_on="week_end"),
        "trailing-lag": trailing(1e9, lookback=2, rebalance_on="month_end", execution_lag=2),
    }


def binding_fleet(closes: pd.DataFrame) -> list[PortfolioConfiguration]:
    random = np.random.default_rng(11)
    moving = schedule(*((t, dict(zip(NINE, random.uniform(-0.05, 0.2, 9).tolist(), strict=True))) for t in closes.index[2::6]))
    return [
        portfolio(f"{name}-{kind}", signal, rebalance=strategy, accounting=accounting)
        for name, strategy in strategies().items()
        for kind, signal, accounting in (("equal", equal(*NINE), "drifted"), ("moving", moving, "target"))
    ]


def test_night_by_night_and_in_batches_of_any_size_orders_are_those_of_one_run(engine):  # R98
    closes = mixed.open_market(engine, count=40)
    fleet = binding_fleet(closes)
    landed(engine, fleet)
    expected = bits(engine)
    assert sum(bool(open_orders(engine, c.identifier)) for c in fleet) >= 4  # it binds: orders are under way at the end
    assert violations(engine) == ()
    random = np.random.default_rng(13)
    for size, nights in ((1, 3), (3, 8), (None, 6)):
        wipe(engine)
        for minute in np.sort(random.integers(0, 56 * 24 * 60, nights)):
            landed(engine, fleet, closes.index[0] + pd.Timedelta(minutes=int(minute)), batch_size=size, registered=True)
            assert violations(engine) == ()
        landed(engine, fleet, registered=True)
        assert bits(engine) == expected, size


def intraday_market(engine: Engine, sessions: int = 5) -> pd.DatetimeIndex:
    """Half-hourly bars from 15:00 to 21:00, thirteen in a session, of nine assets."""
    days = pd.bdate_range("2024-01-02", periods=sessions, tz="UTC")
    times = pd.DatetimeIndex([day + pd.Timedelta(minutes=900 + 30 * i) for day in days for i in range(13)])
    closes = factories.walks("2024-01-02", len(times), NINE).set_axis(times)
    factories.open_market(engine, closes, volume=mixed.volumes(closes))
    return times


def test_an_order_is_resumed_in_the_middle_of_a_session(engine):
    """What the session has used up of its allowance is state too."""
    times = intraday_market(engine)
    options: dict[str, Any] = {"frequency": "30m", "fee": 0.001}
    fleet = [
        portfolio("trailing", equal(*NINE), rebalance=trailing(2e9, lookback=1, max_bar_participation=1.0), **options),
        portfolio("volume", equal(*NINE), rebalance=participating(0.01, 3e7, rebalance_start="16:00", rebalance_end="19:30"), **options),
        portfolio("time", equal(*NINE[:7]), rebalance=TimeWeighted(**ALL_DAY | {"rebalance_start": "15:30"}), **options),
    ]
    landed(engine, fleet)
    expected = bits(engine)
    wipe(engine)
    used = []
    for night in times[[4, 5, 17, 20, 21, 30, 44, 45, 46, 47, 60]]:
        landed(engine, fleet, night, registered=True)
        used.append(sum(row[3] for row in open_orders(engine, "trailing")))
    landed(engine, fleet, registered=True)
    assert bits(engine) == expected
    assert np.count_nonzero(used) > 5  # it was in the middle of a session's allowance


# -- one transaction ----------------------------------------------------------------------------------------------------------------


class Killed(BaseException):
    """Nobody's except clause may catch it."""


@pytest.mark.parametrize("table", ["msm__portfolios", "msm__portfolio_weights", ORDERS, "progress"])
def test_a_crash_at_any_table_leaves_nothing_and_the_order_goes_on(engine, monkeypatch, table):
    closes = mixed.open_market(engine, count=12)
    fleet = binding_fleet(closes)
    landed(engine, fleet, closes.index[5])
    landed(engine, fleet)
    expected = bits(engine)
    wipe(engine)
    landed(engine, fleet, closes.index[5])
    plan = factories.plan(engine, fleet, END)
    if signals := tuple(p.node for p in plan.signals if p.node):
        update_batch(engine, Batch(SignalKind(), signals, plan.as_of))
    batch = Batch(PortfolioKind(), tuple(p.node for p in plan.portfolios if p.node), plan.as_of)
    tables = (*factories.OUTPUTS, ORDERS, factories.PROGRESS, "msm__portfolio")
    before = factories.versions(engine, tables)
    real, seen = storage.copy_in, list[str]()

    def copy_in(connection: Any, name: str, *blocks: Any) -> Any:
        seen.append(name)
        if name == table:
            raise Killed
        return real(connection, name, *blocks)

    def killed(*args: Any) -> None:
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(storage, "copy_in", copy_in)
        if table == "progress":
            patched.setattr(storage, "_move_progress", killed)
        with pytest.raises(Killed):
            update_batch(engine, batch)
    assert seen[-1] == (ORDERS if table == "progress" else table)
    assert factories.versions(engine, tables) == before
    landed(engine, fleet)
    assert bits(engine) == expected


def test_orders_that_cannot_be_written_fail_their_portfolio_alone(engine):
    closes = mixed.open_market(engine, count=12)
    fleet = binding_fleet(closes)
    bad = fleet[0].identifier
    landed(engine, fleet)
    expected = bits(engine)
    wipe(engine)
    sql(engine, f"ALTER TABLE {ORDERS} ADD CONSTRAINT broken CHECK (portfolio_identifier <> '{bad}')")
    report = run(engine, fleet, END)
    assert {name for name, status in statuses(report).items() if status not in ("landed", "up_to_date")} == {bad}
    assert factories.values(engine, bad).empty  # its values and weights did not land either
    assert factories.weights(engine, bad).empty
    sql(engine, f"ALTER TABLE {ORDERS} DROP CONSTRAINT broken")
    landed(engine, fleet)
    assert bits(engine) == expected


# -- changes ------------------------------------------------------------------------------------------------------------------------


def reason(engine: Engine, fleet: Sequence[PortfolioConfiguration]) -> str:
    return factories.plan(engine, fleet, END).portfolios[0].reason


def test_orders_go_with_the_strategy_that_left_them(engine):
    closes = mixed.open_market(engine, count=15)
    slow, fast = portfolio("p", equal(*NINE), rebalance=participating(0.01, 5e8)), portfolio("p", equal(*NINE))
    landed(engine, [slow], closes.index[9])
    slow_rows = open_orders(engine, "p")
    assert len(slow_rows) == 9
    factories.register(engine, [fast])
    assert reason(engine, [fast]) == "configuration changed"
    landed(engine, [fast])
    assert open_orders(engine, "p") == []
    assert violations(engine) == ()
    assert factories.progress(engine)["PortfolioRebalanceStateTS", "p"]["row_count"] == 0
    changed = {**factories.dump(engine)}
    landed(engine, [fast], full_refresh=True)
    assert set(statuses(landed(engine, [fast])).values()) == {"up_to_date"}
    wipe(engine)
    landed(engine, [fast])
    assert factories.dump(engine) == changed
    # and back: what is stored of the immediate one is replaced, and orders are left again
    factories.register(engine, [slow])
    assert reason(engine, [slow]) == "configuration changed"
    landed(engine, [slow], closes.index[9])
    assert open_orders(engine, "p") == slow_rows
    assert violations(engine) == ()


def test_a_portfolio_that_is_recomputed_forgets_its_orders_first(engine):
    closes = mixed.open_market(engine, count=15)
    fleet = [portfolio("p", equal(*NINE), rebalance=participating(0.01, 5e8))]
    landed(engine, fleet, closes.index[9])
    landed(engine, fleet)
    expected = bits(engine)
    landed(engine, fleet, full_refresh=True)
    assert bits(engine) == expected
    landed(engine, [portfolio("p", equal(*NINE), rebalance=participating(0.01, 4e8))])
    assert violations(engine) == ()
    assert bits(engine) != expected


def test_an_asset_that_is_only_wanted_is_waited_for(engine):
    """B is wanted and cannot be bought; where its bars end, the window ends."""
    closes = flat_market(engine)
    sql(engine, "UPDATE msm__external_prices SET volume = 0 WHERE asset_identifier = 'B'")
    sql(engine, "DELETE FROM msm__external_prices WHERE asset_identifier = 'B' AND time_index > %s", (closes.index[3],))
    fleet = [portfolio("p", fixed(A=0.35, B=0.5), rebalance=participating(rebalance_on="signal_change"), fee=0.0)]
    landed(engine, fleet)
    assert factories.values(engine, "p").index[-1] == closes.index[3]
    assert [row[1] for row in open_orders(engine, "p")] == ["B"]


# -- volume -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "strategy",
    [participating(), trailing(1e6), LiquidityConstrained(**ALL_DAY | {"available_liquidity_column": "volume", "total_notional": 1e6})],
    ids=["volume", "trailing", "liquidity"],
)
def test_a_source_without_volume_is_refused_at_plan_time(engine, strategy):  # R37, R38
    closes = mixed.open_market(engine, count=10)
    source = mixed.register_table(engine, "closes_only", close=closes)
    fleet = [
        portfolio("p", equal(*NINE), prices=source, rebalance=strategy),
        portfolio("q", equal(*NINE), prices=source),
        portfolio("r", equal(*NINE), rebalance=strategy),
    ]
    planned = {p.identifier: p.error for p in factories.plan(engine, fleet, END).portfolios}
    assert planned["p"] == {
        "reason": "source_unusable",
        "message": "price source closes_only: the rebalance strategy needs its numeric column 'volume', which it does not have.",
    }
    assert planned["q"] is planned["r"] is None
    report = run(engine, fleet, END)
    assert statuses(report) == {"p": "failed", "q": "landed", "r": "landed"}
    assert messages(report)["p"] == planned["p"]["message"]
    assert factories.weights(engine, "q")[["volume_current", "volume_before"]].isna().all(axis=None)


def test_a_column_of_liquidity_is_read_beside_the_price(engine):
    """The source says in `depth` for how much money can be traded: 1 000 of 10 000, a tenth in each session."""
    closes = pd.DataFrame(100.0, factories.closes_of("2024-01-02", 6), ["A", "B"])
    factories.open_market(engine, closes)
    source = mixed.register_table(engine, "deep", close=closes, depth=closes * 0 + 1000.0)
    strategy = LiquidityConstrained(
        **ALL_DAY | {"available_liquidity_column": "depth", "total_notional": 10_000, "rebalance_on": "signal_change"}
    )
    fleet = [portfolio("p", fixed(A=0.35), prices=source, rebalance=strategy, fee=0.0)]
    nightly(engine, fleet, closes.index)
    found = bits(engine)
    assert factories.weights(engine, "p")["weight"].tolist() == pytest.approx([0.1, 0.2, 0.3, 0.35], abs=1e-15)
    wipe(engine)
    landed(engine, fleet)
    assert bits(engine) == found


def test_statements_do_not_depend_on_the_number_of_orders(engine):  # R100
    closes = mixed.open_market(engine, count=20)
    fleet = [portfolio(f"p{i:02}", equal(*NINE[: 2 + i % 7]), rebalance=participating(0.01, 1e8 + i), lag=0) for i in range(30)]
    landed(engine, fleet, closes.index[9])
    counts = []
    for size, night in ((3, closes.index[12]), (30, closes.index[15])):
        with factories.statements() as sent:
            landed(engine, fleet[:size], night, registered=True)
        counts.append(len([s for s in sent if s != ";"]))
    assert counts[0] == counts[1]


def test_a_bar_is_traded_against_once(engine):
    """The alignment holds its price over the session without a bar, but nothing is traded there."""
    closes = flat_market(engine)
    sql(engine, "DELETE FROM msm__external_prices WHERE asset_identifier = 'A' AND time_index = %s", (closes.index[1],))
    options: dict[str, Any] = {"staleness": timedelta(days=5), "missing": "hold", "fee": 0.0}
    fleet = [portfolio("p", fixed(A=0.25, B=0.05), rebalance=participating(rebalance_on="signal_change"), **options)]
    nightly(engine, fleet, closes.index)
    rows = factories.weights(engine, "p")["weight"].unstack()["A"]
    assert rows.index.tolist() == [closes.index[i] for i in (0, 2, 3)]
    assert rows.tolist() == pytest.approx([0.1, 0.2, 0.25], abs=1e-15)
    assert instant(closes.index[-1]) == factories.values(engine, "p").index[-1]
