"""Execution against a second engine, which knows no arrays, no state and no batches; and what only the kernel can get wrong."""

from collections.abc import Mapping
from dataclasses import replace
from datetime import date, timedelta

import numpy as np
import pytest

from msm_core.configuration import PortfolioConfiguration
from msm_core.construction import construct, executed, finished, prepared
from msm_core.errors import EmptyWindow, InvalidPrice, MissingPrice, MissingRate
from msm_core.frames import Series
from msm_core.rebalance_strategy import (
    CalendarEvent,
    ImmediateSignal,
    LiquidityConstrained,
    RebalanceStrategy,
    Threshold,
    TimeWeighted,
    TrailingADVParticipation,
    VolumeParticipation,
    WeightLimits,
)
from tests.msm_core.rebalance_strategy.by_hand import EVER, NONE, closes, everywhere, hand, instant, left, near, weights_after
from tests.msm_core.rebalance_strategy.engine import simulate
from tests.runs import all_rows, random_inputs, trade_bits, weekdays

LIMITS = WeightLimits(maximum_weight=0.12, minimum_weight=-0.03, violation="clip")
BOTH: list[RebalanceStrategy] = [
    ImmediateSignal(calendar_key="NYC"),
    ImmediateSignal(calendar_key="NYC", rebalance_on="signal_change", limits=LIMITS),
    ImmediateSignal(calendar_key="NYC", rebalance_on="signal_change", execution_lag=1),
    CalendarEvent(calendar_key="NYC", schedule="weekly", weekday=2),
    CalendarEvent(calendar_key="NYC", event_type="fomc", event_offset=1, execution_lag=1),
    CalendarEvent(calendar_key="NYC", event_type="fomc", event_offset=-2),
    Threshold(calendar_key="NYC", absolute_band=0.01),
    Threshold(calendar_key="NYC", relative_band=0.1, rebalance_on="week_end", execution_lag=1),
    Threshold(calendar_key="NYC", absolute_band=0.02, relative_band=0.5),
    VolumeParticipation(calendar_key="NYC", max_percent_volume_in_bar=0.2),
    VolumeParticipation(calendar_key="NYC", max_percent_volume_in_bar=0.1, rebalance_on="signal_change", limits=LIMITS),
    VolumeParticipation(calendar_key="NYC", max_percent_volume_in_bar=0.1, rebalance_on="week_end", execution_lag=2),
    LiquidityConstrained(calendar_key="NYC", rebalance_on="signal_change"),
    LiquidityConstrained(calendar_key="NYC", available_liquidity_unit="quantity", max_liquidity_fraction=0.01, execution_lag=1),
    TrailingADVParticipation(calendar_key="NYC", lookback_sessions=2, max_bar_participation=0.3, rebalance_on="signal_change"),
    TrailingADVParticipation(calendar_key="NYC", lookback_sessions=1, max_daily_participation=0.3, execution_lag=1),
    TimeWeighted(calendar_key="NYC"),
    TimeWeighted(calendar_key="NYC", execution_lag=1, rebalance_on="signal_change"),
]
INTRADAY: list[RebalanceStrategy] = [
    CalendarEvent(calendar_key="NYC", event="market_open", schedule="weekly", weekday=0),
    CalendarEvent(calendar_key="NYC", event="market_open", execution_lag=1),
    VolumeParticipation(
        calendar_key="NYC", rebalance_start="10:00", rebalance_end="13:30", max_percent_volume_in_bar=0.3, rebalance_on="signal_change"
    ),
    TrailingADVParticipation(
        calendar_key="NYC", lookback_sessions=3, max_daily_participation=0.2, rebalance_start="10:30", rebalance_on="signal_change"
    ),
    TimeWeighted(calendar_key="NYC", rebalance_on="signal_change"),
    TimeWeighted(calendar_key="NYC", rebalance_on="signal_change", rebalance_start="11:15", rebalance_end="15:45"),
    TimeWeighted(calendar_key="NYC", execution_lag=1, rebalance_end="14:00"),
]


def cases() -> list[tuple[RebalanceStrategy, bool]]:
    return [*((s, False) for s in BOTH), *((s, True) for s in [*BOTH, *INTRADAY])]


@pytest.mark.parametrize(
    ("strategy", "intraday"), cases(), ids=[f"{i}-{s.kind}-{'30m' if d else '1d'}" for i, (s, d) in enumerate(cases())]
)
def test_agrees_with_the_second_engine(strategy, intraday):
    traded = 0
    for seed in range(12):
        one = random_inputs(seed, strategy, intraday=intraday)
        want = simulate(one, one.last.item())
        built = one.run(one.last)
        got = dict(zip([t.item() for t in built[0].times], built[0].calculated_close.tolist(), strict=True)) if built else {}
        assert list(got) == list(want.values), seed
        np.testing.assert_allclose(list(got.values()), list(want.values.values()), rtol=1e-12, err_msg=str(seed))
        if not built:
            continue
        (part,) = built
        trades = part.trades
        real = np.abs(trades.after - trades.before).sum(axis=1) > 1e-14
        assert [part.bars.times[r].item() for r in trades.rows[real]] == list(want.trades), seed
        for k, vector in zip(np.flatnonzero(real), want.trades.values(), strict=True):
            for a, asset in enumerate(part.assets):
                before, after = vector.get(asset, (0.0, 0.0))
                assert trades.before[k, a] == pytest.approx(before, rel=1e-11, abs=1e-13)
                assert trades.after[k, a] == pytest.approx(after, rel=1e-11, abs=1e-13)
        assert left(built) == near(want.left), seed
        traded += len(trades.rows)
    assert traded > 12


# -- delisting ----------------------------------------------------------------------------------------------------------------

GONE = {"delisted": {"B": "01-03"}}  # the last day of B is Wednesday 3 January


@pytest.mark.parametrize("on", ["every_session", "signal_change"])
def test_golden_a_delisted_asset_is_sold_at_its_last_price(on):
    # fee 1 %. 1 Jan half and half: 0.99. 3 Jan: A +10 %, B -20 %: 1 + 0.05 - 0.1 = 0.95; on 4 Jan A stands at 121: B's last price is 40
    # growth 1 + 0.105 - 0.1 = 1.005; before A 0.605 / 1.005, B 0.4 / 1.005; B is sold: fee 1 % of its weight
    # the target still says half and half: on signal_change nothing else happens, on every_session A is set to 0.5, and B's half is cash
    strategy = ImmediateSignal(calendar_key="X", rebalance_on=on)
    one = hand(strategy, "01-01", {"A": [100, 100, 110, 121, 133.1], "B": [50, 50, 40]}, [(EVER, {"A": 0.5, "B": 0.5})], fee=0.01, **GONE)
    built = everywhere(one, "01-05")
    a, b = 0.605 / 1.005, 0.4 / 1.005
    if on == "signal_change":
        assert weights_after(built) == near({"01-01": {"A": 0.5, "B": 0.5}, "01-04": {"A": a, "B": 0.0}})
        v4 = 0.99 * 1.005 * (1 - 0.01 * b)
        assert closes(built) == near({"01-01": 0.99, "01-02": 0.99, "01-03": 0.99 * 0.95, "01-04": v4, "01-05": v4 * (1 + a * 0.1)})
    else:
        assert weights_after(built)["01-04"] == near({"A": 0.5, "B": 0.0})
        assert weights_after(built)["01-05"] == {"A": 0.5}
        before3 = np.array([0.55, 0.4]) / 0.95
        v3 = 0.99 * 0.95 * (1 - 0.01 * np.abs(0.5 - before3).sum())
        # on 4 Jan from half and half of the day before: A +10 %: growth 1.05, before 11/21 and 10/21
        v4 = v3 * 1.05 * (1 - 0.01 * (1 / 42 + 10 / 21))
        assert closes(built)["01-04"] == near(v4)


def test_golden_a_delisted_asset_under_constant_mix():
    # R on 4 Jan: 0.5 x 10 % of A, nothing of B, and 1 % of the half that is sold; 5 Jan: 0.5 x 10 %
    strategy = ImmediateSignal(calendar_key="X", rebalance_on="signal_change")
    prices = {"A": [100, 100, 110, 121, 133.1], "B": [50, 50, 40]}
    one = hand(strategy, "01-01", prices, [(EVER, {"A": 0.5, "B": 0.5})], fee=0.01, accounting="target", **GONE)
    built = everywhere(one, "01-05")
    assert weights_after(built) == {"01-01": {"A": 0.5, "B": 0.5}, "01-04": {"A": 0.5, "B": 0.0}}
    v3 = 0.99 * (1 + 0.05 - 0.1)
    v4 = v3 * (1 + 0.05 - 0.005)
    assert closes(built) == near({"01-01": 0.99, "01-02": 0.99, "01-03": v3, "01-04": v4, "01-05": v4 * 1.05})


def test_golden_an_order_in_a_delisted_asset_is_dropped():
    # 0.1 a bar: B has 0.3 of 0.5 on 3 Jan; on 4 Jan it is sold whole, though no bar of it could take that; A goes on
    strategy = VolumeParticipation(calendar_key="X", rebalance_on="signal_change", max_percent_volume_in_bar=0.1, total_notional=1000.0)
    volumes = {"A": [100] * 5, "B": [100] * 3}
    one = hand(
        strategy, "01-01", {"A": [10] * 5, "B": [10] * 3}, [(EVER, {"A": 0.5, "B": 0.5})], volumes=volumes, accounting="target", **GONE
    )  # fmt: skip
    built = everywhere(one, "01-05")
    assert weights_after(built) == near(
        {
            "01-01": {"A": 0.1, "B": 0.1},
            "01-02": {"A": 0.2, "B": 0.2},
            "01-03": {"A": 0.3, "B": 0.3},
            "01-04": {"A": 0.4, "B": 0.0},
            "01-05": {"A": 0.5},
        }
    )
    assert left(everywhere(one, "01-04")) == {"A": 0.5}


def test_golden_a_sale_waits_for_no_window_and_no_decision():
    # intraday; B's last bar is 3 Jan 21:00; the first valuation time after it is 4 Jan 15:00, outside the window of the strategy
    strategy = TimeWeighted(calendar_key="X", rebalance_on="signal_change", rebalance_start="17:00", rebalance_end="19:00")
    prices = {"A": [10.0] * 22, "B": [10.0] * 15}
    one = hand(strategy, "01-01 21", prices, [(EVER, {"A": 0.5, "B": 0.5})], frequency="1h", **GONE)
    built = everywhere(one, "01-04")
    assert list(weights_after(built)) == ["01-02 18", "01-02 19", "01-04 15"]
    assert weights_after(built)["01-04 15"] == near({"A": 0.5, "B": 0.0})


def test_golden_a_delisted_target_gives_cash_to_a_fresh_portfolio():
    # the portfolio starts on 8 Jan, the first day that C has; B is gone by then: 0.3 stay cash
    strategy = ImmediateSignal(calendar_key="X")
    one = hand(strategy, "01-01", {"A": [10] * 7, "B": [50, 50, 40], "C": [10] * 7}, [(EVER, {"A": 0.4, "B": 0.3, "C": 0.3})], **GONE)
    late = one.series["C"].kept(np.arange(7) >= 5)
    built = everywhere(replace(one, series={**one.series, "C": late}), "01-09")
    assert weights_after(built) == {"01-08": {"A": 0.4, "C": 0.3}}


@pytest.mark.parametrize("strategy", [Threshold(calendar_key="X", absolute_band=0.5), CalendarEvent(calendar_key="X", schedule="weekly")])
def test_golden_a_delisted_asset_whatever_the_strategy(strategy):
    one = hand(strategy, "01-01", {"A": [10] * 5, "B": [10] * 3}, [(EVER, {"A": 0.5, "B": 0.5})], **GONE)
    assert weights_after(everywhere(one, "01-05")) == {"01-01": {"A": 0.5, "B": 0.5}, "01-04": {"A": 0.5, "B": 0.0}}


def test_a_delisting_after_the_last_bar_needs_the_bars_until_then():
    """B's last bar is 2 January; on 3 January, its last day, it is held and has no price."""
    strategy = ImmediateSignal(calendar_key="X")
    one = hand(strategy, "01-01", {"A": [10] * 5, "B": [10] * 2}, [(EVER, {"A": 0.5, "B": 0.5})], **GONE)
    with pytest.raises(MissingPrice, match="no close of B at 2024-01-03"):
        one.run(instant("01-05"))
    held = hand(
        strategy, "01-01", {"A": [10] * 5, "B": [10] * 2}, [(EVER, {"A": 0.5, "B": 0.5})], staleness=timedelta(days=1), **GONE
    )  # fmt: skip
    assert list(weights_after(everywhere(held, "01-05"))) == ["01-01", "01-04"]


# -- cash ---------------------------------------------------------------------------------------------------------------------


def rates_of(rates: Mapping[str, float]) -> Series:
    return Series(np.array([instant(t) for t in rates]), np.array(list(rates.values())), np.full(len(rates), NONE))


RATE = rates_of({"01-01 12": 0.036})  # 3.6 % a year of 360 days: 1 basis point a day
buy_once = ImmediateSignal(calendar_key="X", rebalance_on="signal_change")


@pytest.mark.parametrize("accounting", ["drifted", "target"])
def test_golden_cash_earns_its_rate_weekends_included(accounting):
    # 60 % A, which stands still; 0.4 in cash. Levels: Mo 1 1, Tu 2 1.0001, .., Fr 5 1.0001^4; Mo 8 x 1.0003 for three days
    one = hand(buy_once, "01-01", {"A": 10}, [(EVER, {"A": 0.6})], bars=6, rates=RATE, rate_fill=timedelta(days=30), accounting=accounting)
    levels = np.cumprod([1, 1.0001, 1.0001, 1.0001, 1.0001, 1.0003])
    built = everywhere(one, "01-08")
    days = np.array([0, 1, 1, 1, 1, 3])
    kept, set_back = 1 + 0.4 * (levels - 1), np.cumprod(1 + 0.4 * days * 0.0001)  # cash stays cash, and grows; or is 0.4 again every day
    want = kept if accounting == "drifted" else set_back
    assert list(closes(built).values()) == near(want.tolist())


@pytest.mark.parametrize("accounting", ["drifted", "target"])
@pytest.mark.parametrize("weight", [1.5, 1.0, 0.0, -0.5])
def test_golden_leverage_pays_and_shorts_earn(accounting, weight):
    # weights sum to 1.5: 0.5 are borrowed: 0.5 x 1 bp a day; to -0.5: 1.5 are in cash. Bought on 2 Jan
    vectors = [(EVER, {"A": weight}), ("01-04", {"A": 0.5})]
    one = hand(
        buy_once, "01-01", {"A": 10}, vectors, bars=5, rates=RATE, rate_fill=timedelta(days=30), accounting=accounting, fee=0.0,
        start_date=date(2024, 1, 2),
    )  # fmt: skip
    built = everywhere(one, "01-05")
    if weight == 0.0:  # nothing was bought: the first purchase is on 4 Jan, at a value of 1
        assert closes(built) == near({"01-04": 1.0, "01-05": 1 + 0.5 * 0.0001})
        return
    level = 1.0001**2 - 1 if accounting == "drifted" else None
    v4 = 1 + (1 - weight) * level if level is not None else (1 + (1 - weight) * 0.0001) ** 2
    assert closes(built) == near({"01-02": 1.0, "01-03": 1 + (1 - weight) * 0.0001, "01-04": v4, "01-05": v4 * (1 + 0.5 * 0.0001)})


@pytest.mark.parametrize("accounting", ["drifted", "target"])
def test_golden_cash_earns_nothing_before_the_first_purchase(accounting):
    """The account begins in 2023, the portfolio on 3 January: value 1.0 before the first purchase, fee 1 %."""
    rates = rates_of({"2023-12-01T12:00": 0.36})
    one = hand(
        buy_once, "01-01", {"A": 10}, [("01-03", {"A": 0.5})], bars=5, rates=rates, rate_fill=timedelta(days=90), accounting=accounting,
        fee=0.01,
    )  # fmt: skip
    one = replace(one, sessions=weekdays("2023-11-01", "2024-12-31"))
    assert closes(everywhere(one, "01-04")) == near({"01-03": 0.995, "01-04": 0.995 * (1 + 0.5 * 0.001)})
    early = replace(one, configuration=with_start(one.configuration, date(2024, 1, 1)))
    assert closes(everywhere(early, "01-04")) == near({"01-03": 0.995, "01-04": 0.995 * (1 + 0.5 * 0.001)})


def with_start(configuration: PortfolioConfiguration, start: date) -> PortfolioConfiguration:
    build = configuration.portfolio_build_configuration.model_copy(update={"start_date": start})
    return configuration.model_copy(update={"portfolio_build_configuration": build})


def test_golden_interest_is_part_of_the_drift():
    # A 0.5, cash 0.5 at 36 % / 360 = 0.1 % a day. 2 Jan: A +10 %: growth 1 + 0.05 + 0.0005; before 0.55 / 1.0505; fee 1 % of the gap to 0.5
    rates = rates_of({"01-01 12": 0.36})
    strategy = ImmediateSignal(calendar_key="X")
    one = hand(strategy, "01-01", {"A": [10, 11, 11]}, [(EVER, {"A": 0.5})], rates=rates, fee=0.01)
    built = everywhere(one, "01-03")
    v2 = 0.995 * 1.0505 * (1 - 0.01 * (0.55 / 1.0505 - 0.5))
    before3 = 0.5 / 1.0005
    assert built[0].trades.before[:, 0] == near([0, 0.55 / 1.0505, before3])
    assert closes(built) == near({"01-01": 0.995, "01-02": v2, "01-03": v2 * 1.0005 * (1 - 0.01 * (0.5 - before3))})


def test_golden_a_new_rate_counts_from_the_valuation_time_after_it():
    # published on 2 Jan at noon: the night of 1 to 2 Jan still earns 3.6 %; that of 2 to 3 Jan 7.2 %
    rates = rates_of({"01-01 12": 0.036, "01-02 12": 0.072})
    one = hand(buy_once, "01-01", {"A": 10}, [(EVER, {"A": 0.5})], bars=3, rates=rates, accounting="target")
    v2 = 1 + 0.5 * 0.0001
    assert closes(everywhere(one, "01-03")) == near({"01-01": 1.0, "01-02": v2, "01-03": v2 * (1 + 0.5 * 0.0002)})


def test_golden_intraday_cash_earns_by_the_hour():
    # 24 hours x 1 bp a day: an hour is 1/24 bp; overnight from 21:00 to 15:00 18 hours
    one = hand(buy_once, "01-01 20", {"A": 10}, [(EVER, {"A": 0.5})], bars=4, rates=RATE, frequency="1h", accounting="target")
    assert closes(everywhere(one, "01-02 16")) == near(
        {"01-01": 1.0, "01-02 15": 1 + 0.5 * 0.0001 * 18 / 24, "01-02 16": (1 + 0.5 * 0.0001 * 18 / 24) * (1 + 0.5 * 0.0001 / 24)}
    )


def test_a_rate_that_is_too_old_is_waited_for():
    # valid for less than 2 days from Mo 1 Jan 12:00: known at the closes of 1 and 2 Jan, so cash is known through the close of 3 Jan
    one = hand(buy_once, "01-01", {"A": 10}, [(EVER, {"A": 0.5})], bars=6, rates=RATE, rate_fill=timedelta(days=2))
    assert list(closes(everywhere(one, "01-08"))) == ["01-01", "01-02", "01-03"]
    market, vectors = one.night(None, instant("01-08"))
    assert vectors is not None
    with pytest.raises(MissingRate, match="RATE"):
        construct(one.configuration, market, vectors, None, instant("01-08"), one.cash(instant("01-08")))
    # published at a valuation time: two days later, to the instant, it is valid no more
    exact = replace(one, rates=rates_of({"01-01": 0.036}))
    assert list(closes(everywhere(exact, "01-08"))) == ["01-01", "01-02", "01-03"]
    more = replace(one, rates=rates_of({"01-01 12": 0.036, "01-03 12": 0.036, "01-05": 0.036}))
    assert list(closes(everywhere(more, "01-08"))) == ["01-01", "01-02", "01-03", "01-04", "01-05", "01-08"]


def test_a_gap_in_the_rate_stops_only_who_would_cross_it():
    # known for 1 and 2 Jan, not again before 4 Jan noon: nobody can go from 3 to 4 Jan; who begins on the 5th needs nothing of it
    rates = rates_of({"01-01 12": 0.036, "01-04 12": 0.036, "01-05 12": 0.036, "01-08 12": 0.036})
    one = hand(buy_once, "01-01", {"A": 10}, [(EVER, {"A": 0.5})], bars=7, rates=rates, rate_fill=timedelta(days=2))
    market, vectors = one.night(None, instant("01-09"))
    account = one.cash(instant("01-09"))
    assert vectors is not None
    assert account is not None
    assert [str(gap)[:10] for gap in account.gaps] == ["2024-01-04"]
    with pytest.raises(MissingRate, match="2024-01-04 21:00Z"):
        construct(one.configuration, market, vectors, None, instant("01-09"), account)
    late = one.configuration.portfolio_build_configuration.model_copy(update={"start_date": date(2024, 1, 5)})
    later = one.configuration.model_copy(update={"portfolio_build_configuration": late})
    built = construct(later, market, vectors, None, instant("01-09"), account)
    assert built is not None
    # bought on Friday the 5th; half earns 3.6 % / 360 a day: three days to Monday, one to Tuesday
    assert built.close == near([1, 1 + 0.5 * 0.0003, 1 + 0.5 * (1.0003 * 1.0001 - 1)])


# -- sums of weights ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("total", [-1.0, 0.0, 0.3, 1.0, 2.5])
@pytest.mark.parametrize("accounting", ["drifted", "target"])
def test_golden_weights_sum_to_anything(total, accounting):
    # A total + 1, B -1: A +1 %, B +2 %: 1 + (total + 1) x 0.01 - 0.02; without a rate cash earns nothing and debt costs nothing
    one = hand(buy_once, "01-01", {"A": [100, 101], "B": [100, 102]}, [(EVER, {"A": total + 1, "B": -1.0})], accounting=accounting)
    assert closes(everywhere(one, "01-02")) == near({"01-01": 1.0, "01-02": 1 + (total + 1) * 0.01 - 0.02})


# -- what only a kernel of many can get wrong ---------------------------------------------------------------------------------


def test_a_portfolio_without_a_price_fails_alone():
    """B's price is unusable on 3 January: who holds it fails by name; who does not, in the same batch, has its rows as always."""
    strategy = ImmediateSignal(calendar_key="X")
    one = hand(strategy, "01-01", {"A": [10, 11, 12, 13], "B": [10, 10, 10, 10]}, [(EVER, {"A": 0.5, "B": 0.5})])
    one = replace(one, series={**one.series, "B": replace(one.series["B"], values=np.array([10, 10, 0.0, 10]))})
    market, vectors = one.night(None, instant("01-04"))
    assert vectors is not None
    only = one.narrowed(["A"])
    windows = [
        prepared(mine.configuration, market, mine.vectors, None, instant("01-04")) for mine in (one, only, one.narrowed(["A", "B"]), only)
    ]
    done = executed([w for w in windows if w])
    alone = only.run(instant("01-04"))
    for window, trades in zip(windows, done, strict=True):
        assert window is not None
        assert not isinstance(trades, Exception)
        if window.assets == ("A",):
            built = finished(window, trades)
            assert built is not None
            assert all_rows([built]) == all_rows(alone)
        else:
            with pytest.raises(InvalidPrice, match="close of B at 2024-01-03"):
                finished(window, trades)


def test_a_strategy_that_fails_fails_its_own_portfolios():
    prices, vectors = {"A": [10] * 3}, [(EVER, {"A": 0.5})]
    never = TimeWeighted(calendar_key="X", rebalance_start="9:00", rebalance_end="20:00")
    windows = []
    one = hand(never, "01-01", prices, vectors)
    market, found = one.night(None, instant("01-03"))
    assert found is not None
    for strategy in (never, ImmediateSignal(calendar_key="X"), never):
        mine = hand(strategy, "01-01", prices, vectors)
        windows.append(prepared(mine.configuration, market, found, None, instant("01-03")))
    done = executed(windows)
    assert [isinstance(result, EmptyWindow) for result in done] == [True, False, True]


def test_strategies_that_trade_alike_are_executed_together():
    def key(strategy: RebalanceStrategy) -> str:
        return strategy.execution_key

    immediate = ImmediateSignal(calendar_key="X")
    assert key(immediate) == key(ImmediateSignal(calendar_key="Y", rebalance_on="month_end", execution_lag=3, limits=LIMITS))
    slow = VolumeParticipation(calendar_key="X")
    assert key(slow) == key(VolumeParticipation(calendar_key="X", rebalance_on="signal_change"))
    keys = [key(s) for s in (immediate, slow, TimeWeighted(calendar_key="X"), TimeWeighted(calendar_key="X", rebalance_end="22:00"))]
    keys += [key(VolumeParticipation(calendar_key="X", max_percent_volume_in_bar=0.02)), key(LiquidityConstrained(calendar_key="X"))]
    keys += [key(Threshold(calendar_key="X", absolute_band=b)) for b in (0.1, 0.2)]
    assert len(set(keys)) == len(keys)


def test_bars_before_the_first_row_of_a_night_were_traded_against_already():
    """A bar of last night's watermark is no new bar tonight, however the block of prices begins."""
    strategy = VolumeParticipation(calendar_key="X", rebalance_on="signal_change", max_percent_volume_in_bar=0.1, total_notional=1000.0)
    one = hand(
        strategy, "01-01", {"A": 10}, [(EVER, {"A": 0.5})], bars=5, volumes={"A": 100}, staleness=timedelta(days=5), accounting="target"
    )
    gap = one.series["A"].kept(np.array([True, True, False, False, True]))
    one = replace(one, series={"A": gap})
    assert weights_after(everywhere(one, "01-05")) == near({"01-01": {"A": 0.1}, "01-02": {"A": 0.2}, "01-05": {"A": 0.3}})


@pytest.mark.parametrize("seed", range(10))
def test_what_is_done_is_the_target_to_the_bit(seed):
    """before + (goal - before) may differ from goal in the last bit, and then the order would never be done."""
    rng = np.random.default_rng(seed)
    names = [f"A{i}" for i in range(12)]
    first, second = (dict(zip(names, rng.normal(0.0, 0.1, 12).tolist(), strict=True)) for _ in range(2))
    prices = {a: (rng.uniform(5, 50) * rng.uniform(0.98, 1.02, 4)).tolist() for a in names}
    strategy = VolumeParticipation(calendar_key="X", rebalance_on="signal_change", max_percent_volume_in_bar=0.1, total_notional=1000.0)
    volumes = {a: [3.0, 3.0, 3.0, 1e6] for a in names}
    one = hand(strategy, "01-01", prices, [(EVER, first), ("01-02", second)], volumes=volumes, accounting="target")
    built = everywhere(one, "01-04")
    assert weights_after(built)["01-04"] == second
    assert built[0].trades.order is None


def test_what_a_portfolio_used_is_its_own_when_another_one_goes_on():
    """The first ends at 16:00 of 3 January; the second goes on past 17:00, when A, which the first holds, has no price."""
    strategy = TrailingADVParticipation(
        calendar_key="X", rebalance_on="signal_change", lookback_sessions=2, max_daily_participation=0.1, max_bar_participation=0.5,
        total_notional=1000.0,
    )  # fmt: skip
    one = hand(
        strategy, "01-01 15", {"A": 10, "B": 10}, [("01-02", {"A": 0.5, "B": 0.2})], bars=25, frequency="1h",
        volumes={"A": 30, "B": 30},
    )  # fmt: skip
    kept = one.series["A"].times != instant("01-03 17")
    one = replace(one, series={**one.series, "A": one.series["A"].kept(kept)})
    market, _ = one.night(None, instant("01-04"))
    first, second = one, one.narrowed(["B"])
    windows = [
        prepared(mine.configuration, market, mine.vectors, None, instant(end)) for mine, end in ((first, "01-03 16"), (second, "01-04"))
    ]
    together, alone = executed([w for w in windows if w]), executed(windows[:1])  # type: ignore[arg-type]
    assert not isinstance(together[0], Exception)
    assert not isinstance(alone[0], Exception)
    assert trade_bits(together[0]) == trade_bits(alone[0])
    assert together[0].order is not None
    assert together[0].order.used.tolist() == near([0.21, 0.2])
