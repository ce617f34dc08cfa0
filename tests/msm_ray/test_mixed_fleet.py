"""Fleets of many kinds in one run: every signal and strategy side by side, kinds that are not there any more, lost batches."""

import json
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from sqlalchemy import Engine

from msm_core import start_engine
from msm_core.api import Asset
from msm_core.configuration import CashRate, PortfolioConfiguration
from msm_core.data_nodes.portfolios import PortfoliosDataNode
from msm_core.database import transaction
from msm_core.rebalance_strategy import (
    ImmediateSignal,
    RebalanceStrategy,
    Threshold,
    TimeWeighted,
    TrailingADVParticipation,
    VolumeParticipation,
    WeightLimits,
)
from msm_core.verification import verify
from msm_ray import cli
from msm_ray import run as driver
from msm_ray.plan import Plan
from msm_ray.session import choose_portfolios
from tests import factories, mixed
from tests.factories import CALENDAR, equal, fixed, instant, messages, portfolio, run, sql, statuses
from tests.mixed import DAILY, END, NINE, bits, inverse, landed, momentum, replicator, wipe
from tests.msm_ray.test_run import FakeExecutor

scheduled, strangers = factories.scheduled, mixed.strangers

ALL_DAY: dict[str, Any] = {"calendar_key": CALENDAR, "rebalance_start": "0:00", "rebalance_end": "24:00"}


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver, "BUSY_PAUSE_SECONDS", 0.01)


def of_everything(engine: Engine, folder: Path) -> tuple[pd.DataFrame, list[PortfolioConfiguration]]:
    """Every kind of signal under every kind of strategy, one after the other; a delisted asset, a rate of cash, limits of weights."""
    start_engine(models=[Asset])
    closes = mixed.open_market(engine, count=40)
    fleet = mixed.of_every_kind(engine, closes, folder)
    sql(engine, "DELETE FROM msm__external_prices WHERE asset_identifier = 'a8' AND time_index > %s", (closes.index[25],))
    Asset.upsert(unique_identifier="a8", delisted_on=closes.index[25].date())
    factories.load_prices(engine, pd.DataFrame({"RATE": [0.03, 0.05, 0.04]}, closes.index[[0, 12, 24]] - pd.Timedelta(days=1)))
    cash = CashRate(source=DAILY, identifier="RATE", forward_fill=timedelta(days=40))
    bounded = WeightLimits(maximum_weight=0.4, no_short=True, violation="clip")
    strategies: list[RebalanceStrategy] = [
        VolumeParticipation(**ALL_DAY, max_percent_volume_in_bar=0.01, total_notional=3e7),
        TrailingADVParticipation(**ALL_DAY, lookback_sessions=3, total_notional=5e8, rebalance_on="week_end"),
        TimeWeighted(**ALL_DAY, rebalance_on="signal_change", execution_lag=1),
        Threshold(calendar_key=CALENDAR, limits=bounded, absolute_band=0.02),
    ]
    more = [
        portfolio(
            f"{strategy.kind}-{i}",
            c.signal,
            rebalance=strategy,
            cash_rate=cash if i % 2 else None,
            accounting=("target", "drifted")[i % 2],
            staleness=timedelta(days=4),
        )
        for i, (c, strategy) in enumerate((c, strategies[(k // 2 + k) % 4]) for k, c in enumerate(fleet[::2]))
    ]
    return closes, [*fleet, *more]


# -- everything at once ---------------------------------------------------------------------------------------------------------------


def test_a_fleet_of_everything_night_by_night(engine, tmp_path):  # R98
    closes, fleet = of_everything(engine, tmp_path)
    landed(engine, fleet)
    expected = bits(engine)
    empty = [c.identifier for c in fleet if factories.values(engine, c.identifier).empty]
    assert empty == []
    with transaction(engine, read_only=True) as connection:
        assert verify(connection).violations == ()
    random = np.random.default_rng(17)
    for size, nights in ((5, 4), (None, 5)):
        wipe(engine)
        for minute in np.sort(random.integers(0, 56 * 24 * 60, nights)):
            landed(engine, fleet, closes.index[0] + pd.Timedelta(minutes=int(minute)), batch_size=size, registered=True)
        landed(engine, fleet, registered=True, batch_size=size)
        assert bits(engine) == expected, size


@pytest.mark.parametrize("size", [1, 4])
def test_a_fleet_that_is_planned_in_parts_has_the_same_bits(engine, tmp_path, monkeypatch, size):
    """Parts that are planned while others run, in any order of landing; each node is told once."""
    closes, fleet = of_everything(engine, tmp_path)
    landed(engine, fleet)
    expected = bits(engine)
    wipe(engine)
    monkeypatch.setattr(driver, "PART_PORTFOLIOS_MIN", size)
    monkeypatch.setattr(driver, "PARTS_MAX", 1_000)
    plans: list[list[str]] = []

    class Listener(driver.Observer):
        def planned(self, run_uid: Any, plan: Plan) -> None:
            plans.append([p.identifier for p in plan.portfolios])

    for night in (closes.index[20], END):
        plans.clear()
        executor, options = FakeExecutor(seed=size), driver.Options(batch_size=3, unreadable={"gone": {"reason": "r", "message": "m"}})
        report = driver.run_fleet(engine, fleet, executor, instant(night), options, Listener())
        assert report.status == "partial"  # for the unreadable one alone, told once
        assert [r.identifier for r in report.failures()] == ["gone"]
        assert len(plans) > 3
        names = sorted(name for plan in plans for name in plan)
        assert names == sorted(["gone", *(c.identifier for c in fleet)])
        assert sorted(r.identifier for r in report.results if r.kind == "portfolio") == names
    assert bits(engine) == expected


@pytest.mark.parametrize("seed", range(2))
def test_whatever_is_lost_the_rows_are_the_same(engine, tmp_path, seed):  # R97
    """A third of the batches never come back, half of those after they landed; what was not reached comes with the next runs."""
    closes = mixed.open_market(engine)
    fleet = mixed.of_every_kind(engine, closes, tmp_path)
    landed(engine, fleet)
    expected = bits(engine)
    wipe(engine)
    random = np.random.default_rng(seed)

    def fault(number: int, payload: dict) -> str | None:
        return {0: "lost before", 1: "lost after"}.get(int(random.integers(0, 6)))

    for night in (closes.index[20], closes.index[-1], END):
        run(engine, fleet, night, executor=FakeExecutor(seed=seed, fault=fault), batch_size=4, registered=True)
    landed(engine, fleet, registered=True)
    assert bits(engine) == expected


def test_nodes_start_in_no_other_order_than_they_wait(engine, tmp_path):
    closes = mixed.open_market(engine)
    fleet = mixed.of_every_kind(engine, closes, tmp_path)
    factories.register(engine, fleet)
    executor = FakeExecutor(seed=5)
    report = run(engine, fleet, END, executor=executor, batch_size=1, registered=True)
    assert report.exit_code == 0
    by_name = {c.identifier: c for c in fleet}
    waits = [(by_name[name].signal_uid, name) for name in by_name]
    waits += [("inverse-0", by_name["of-portfolio-0"].signal_uid), ("of-portfolio-1", by_name["of-copy-0"].signal_uid)]
    waits += [("caps-1", by_name["of-index-0"].signal_uid)]
    for first, then in waits:
        assert executor.log.index(("done", first)) < executor.log.index(("submit", then)), (first, then)


# -- kinds that are not there any more --------------------------------------------------------------------------------------------------


def forget_kind(engine: Engine, identifier: str, kind: str = "of_a_plugin") -> None:
    """The stored signal of that portfolio is of a kind that nobody has registered, as when a plugin is gone."""
    path = "{portfolio_build_configuration,backtesting_weights_configuration,signal_weights_instance,kind}"
    sql(
        engine,
        "UPDATE msm__portfolio_configuration c SET configuration = jsonb_set(c.configuration, %s, to_jsonb(%s::text)) "
        "FROM msm__portfolio p WHERE p.uid = c.portfolio_uid AND p.unique_identifier = %s",
        (path, kind, identifier),
    )


@pytest.fixture
def stored(engine: Engine) -> list[PortfolioConfiguration]:
    """Four stored portfolios: `bad` cannot be read any more, and `copy` tracks it."""
    mixed.open_market(engine, count=30)
    fleet = [
        portfolio("a", equal(*NINE)),
        portfolio("bad", inverse()),
        portfolio("c", momentum()),
        portfolio("copy", replicator(portfolio="bad")),
    ]
    factories.register(engine, fleet)
    return fleet


def test_a_kind_that_is_gone_fails_its_portfolio_and_the_rest_lands(engine, stored):
    landed(engine, stored, "2024-01-26", registered=True)
    forget_kind(engine, "bad")
    chosen = choose_portfolios(engine, None, None)
    assert [c.identifier for c in chosen.configurations] == ["a", "c", "copy"]
    assert set(chosen.unreadable) == {"bad"}
    before = factories.values(engine, "bad")
    report = run(engine, chosen.configurations, END, registered=True, unreadable=chosen.unreadable)
    assert {k: v for k, v in statuses(report).items() if k != "copy"} == {"a": "landed", "bad": "failed", "c": "landed"}
    (failed,) = (r for r in report.results if r.identifier == "bad")
    assert failed.error is not None
    assert failed.error["reason"] == "unknown_kind"
    assert "'of_a_plugin'" in failed.error["message"]
    assert "momentum" in failed.error["message"]  # what there is
    assert report.exit_code == 3
    assert factories.values(engine, "copy").index[-1] <= before.index[-1]  # it goes no further than what is stored of bad
    pd.testing.assert_frame_equal(factories.values(engine, "bad"), before)
    ledger = sql(
        engine, "SELECT status, reason, error->>'reason' FROM msm__run_node WHERE identifier = 'bad' ORDER BY recorded_at DESC LIMIT 1"
    )
    assert ledger == [("failed", "invalid", "unknown_kind")]


def test_a_kind_that_is_gone_is_in_the_plan(engine, stored):
    forget_kind(engine, "bad")
    chosen = choose_portfolios(engine, None, None)
    plan = factories.plan(engine, chosen.configurations[:2], END, unreadable=chosen.unreadable)
    shown = {p["identifier"]: (p["reason"], p.get("error", {}).get("reason")) for p in plan.document()["portfolios"]}
    assert shown == {"a": ("new", None), "c": ("new", None), "bad": ("invalid", "unknown_kind")}
    assert plan.document()["summary"]["portfolios"] == {"new": 2, "invalid": 1}


def test_a_strategy_or_a_source_that_is_gone_is_no_different(engine, stored):
    for identifier, where in (("a", "rebalance_strategy_instance"), ("c", "signal_weights_instance,price_source")):
        path = f"{{portfolio_build_configuration,backtesting_weights_configuration,{where},kind}}"
        sql(
            engine,
            "UPDATE msm__portfolio_configuration c SET configuration = jsonb_set(c.configuration, %s, '\"gone\"') "
            "FROM msm__portfolio p WHERE p.uid = c.portfolio_uid AND p.unique_identifier = %s",
            (path, identifier),
        )
    chosen = choose_portfolios(engine, None, None)
    assert {i: facts["reason"] for i, facts in chosen.unreadable.items()} == {"a": "unknown_kind", "c": "unknown_kind"}
    assert [c.identifier for c in chosen.configurations] == ["bad", "copy"]


def test_a_configuration_that_is_broken_in_another_way_is_told_too(engine, stored):
    sql(engine, "UPDATE msm__portfolio_configuration SET configuration = configuration - 'portfolio_build_configuration'")
    chosen = choose_portfolios(engine, None, None)
    assert (chosen.configurations, set(chosen.unreadable)) == ([], {"a", "bad", "c", "copy"})
    report = run(engine, [], END, unreadable=chosen.unreadable)
    assert (report.counts()["failed"], report.exit_code) == (4, 4)


Cli = Callable[..., tuple[int, Any]]


@pytest.fixture
def msm_ray(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Cli:
    """`msm-ray ... --output json` in this process: exit code and document."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: str) -> tuple[int, Any]:
        monkeypatch.setattr(sys, "argv", ["msm-ray", *arguments, "--output", "json"])
        capsys.readouterr()
        try:
            cli.main()
            code = 0
        except SystemExit as stop:
            code = int(stop.code or 0)
        return code, json.loads(capsys.readouterr().out)

    return call


def test_the_command_line_with_a_kind_that_is_gone(engine, stored, msm_ray):
    """plan and run tell it, retry tells it again and nothing else, and once it is mended retry lands it."""
    fleet = ("--executor", "local")
    forget_kind(engine, "bad")
    forget_kind(engine, "copy")
    code, plan = msm_ray("plan", "--as-of", "2024-12-29")
    assert (code, plan["summary"]["portfolios"]) == (0, {"new": 2, "invalid": 2})
    code, report = msm_ray("run", "--as-of", "2024-12-29", *fleet)
    assert (code, report["landed"], report["failed"]) == (3, 2, 2)
    code, report = msm_ray("retry", *fleet)
    assert (code, report["landed"], report["failed"]) == (4, 0, 2)
    forget_kind(engine, "bad", "inverse_volatility")
    forget_kind(engine, "copy", "portfolio_replicator")
    code, report = msm_ray("retry", *fleet)
    assert (code, report["landed"], report["failed"]) == (0, 2, 0)


def test_a_node_by_itself_does_not_mind_what_it_does_not_need(engine, stored):
    forget_kind(engine, "bad")
    assert PortfoliosDataNode(portfolio_configuration=stored[2]).run(as_of=instant(END)).status == "landed"


# -- limits -----------------------------------------------------------------------------------------------------------------------------


def test_a_target_beyond_its_limits_fails_its_portfolio_by_name(engine):
    mixed.open_market(engine, count=20)
    limited = ImmediateSignal(calendar_key=CALENDAR, limits=WeightLimits(maximum_weight=0.3))
    fleet = [
        portfolio("p", fixed(a0=0.5, a1=0.1), rebalance=limited),
        portfolio("q", fixed(a0=0.3, a1=0.1), rebalance=limited),
        portfolio("late", momentum(top_assets=2, emit_on="week_end"), rebalance=limited),
    ]
    report = run(engine, fleet, END)
    assert statuses(report) == {"p": "failed", "q": "landed", "late": "failed"}
    assert "the weight of a0 wanted at 2024-01-02 21:00Z is 0.5, outside -inf..0.3" in messages(report)["p"]
