"""Why a node is in the plan, over which window, and what stops it before anything is tried."""

import json
import uuid
from dataclasses import replace
from datetime import date, timedelta

import numpy as np
import pandas as pd
import pytest
from sqlalchemy import Engine

from msm_core.data_nodes import portfolios
from msm_core.data_nodes.interpolated_prices import Resolved
from msm_core.data_nodes.planning import plan_portfolio, plan_signal
from msm_core.data_nodes.portfolios import portfolio_code_version, portfolio_scopes
from msm_core.data_nodes.world import World
from msm_core.models import ExternalPricesStorage, SignalWeightsStorage
from msm_core.signals import EqualWeights
from msm_core.sources import AssetFacts, Source
from msm_core.storage import Progress, Scope
from msm_ray.plan import make_plan
from tests import factories
from tests.factories import equal, fixed, instant, portfolio, run, schedule

scheduled = factories.scheduled

LATE = "2024-12-30"


@pytest.fixture
def market(engine: Engine) -> pd.DataFrame:
    """Three assets over the weekdays from Tuesday 2024-01-02 to Monday 2024-01-15."""
    return factories.open_market(engine, factories.walks("2024-01-02", 10, ["A", "B", "C"]))


def reasons(engine: Engine, *configurations, as_of: str = LATE, **options) -> dict[str, str]:
    return {p.identifier: p.reason for p in factories.plan(engine, configurations, as_of, **options).portfolios}


# -- reasons ----------------------------------------------------------------------------------------------------------------------


def test_from_new_to_up_to_date(engine, market):
    p, q = portfolio("p", equal("A", "B")), portfolio("q", equal("C"))
    factories.register(engine, [p, q])
    assert reasons(engine, p, q) == {"p": "new", "q": "new"}
    run(engine, [p], "2024-01-05")
    assert reasons(engine, p, q) == {"p": "inputs advanced", "q": "new"}
    run(engine, [p], LATE)
    assert reasons(engine, p, q) == {"p": "up to date", "q": "new"}
    assert reasons(engine, p, as_of="2024-01-04") == {"p": "up to date"}  # an as-of in the past takes nothing back
    factories.load_prices(engine, pd.DataFrame({"A": [1.0]}, factories.closes_of("2024-01-16", 1)))
    assert reasons(engine, p) == {"p": "up to date"}  # B holds it back
    factories.load_prices(engine, pd.DataFrame({"B": [1.0]}, factories.closes_of("2024-01-16", 1)))
    assert reasons(engine, p) == {"p": "inputs advanced"}


CHANGES = {
    "fee": portfolio("p", equal("A", "B"), fee=0.001),
    "accounting": portfolio("p", equal("A", "B"), accounting="target"),
    "signal": portfolio("p", equal("A", "C")),
    "universe": portfolio("p", equal("A", "B", "C")),
    "strategy": portfolio("p", equal("A", "B"), lag=1),
    "price column": portfolio("p", equal("A", "B"), column="open"),
    "start": portfolio("p", equal("A", "B"), start_date=date(2024, 1, 4)),
    "staleness": portfolio("p", equal("A", "B"), staleness=timedelta(days=1)),
    "index": portfolio("p", equal("A", "B"), index="I"),
}


@pytest.mark.parametrize("changed", CHANGES.values(), ids=CHANGES)
def test_what_changes_numbers_is_a_configuration_change(engine, market, changed):
    factories.load_prices(engine, market, open=market * 1.01)
    run(engine, [portfolio("p", equal("A", "B"))], LATE)
    factories.register(engine, [changed])
    (planned,) = factories.plan(engine, [changed], LATE).portfolios
    assert planned.reason == "configuration changed"
    assert planned.start is None  # from the beginning
    assert planned.node.replace
    assert factories.statuses(run(engine, [changed], LATE)) == {"p": "landed"}
    assert reasons(engine, changed) == {"p": "up to date"}


def test_display_text_is_none(engine, market):  # the lesson: renaming a portfolio must not change its identity
    run(engine, [portfolio("p", equal("A", "B"))], LATE)
    renamed = portfolio("p", equal("B", "A"), portfolio_name="Rebalanced daily", description="text", tags=("core",), signal_name="1/N")
    factories.register(engine, [renamed])
    assert reasons(engine, renamed) == {"p": "up to date"}


def test_code_changed(engine, market, monkeypatch):
    p = portfolio("p", equal("A", "B"))
    run(engine, [p], LATE)
    monkeypatch.setattr(portfolios, "CODE_VERSION", "portfolios next")
    plan = factories.plan(engine, [p], LATE)
    assert [(x.reason, x.start, x.node.replace) for x in plan.portfolios] == [("code changed", None, True)]
    assert [x.reason for x in plan.signals] == ["up to date"]
    run(engine, [p], LATE)
    assert reasons(engine, p) == {"p": "up to date"}
    assert factories.progress(engine)["PortfoliosTS", "p"]["code_version"] == "portfolios next.1"


def test_signal_code_changed(engine, market, monkeypatch):
    p = portfolio("p", equal("A", "B"))
    run(engine, [p], "2024-01-05")
    monkeypatch.setattr(EqualWeights, "code_version", "signals next")
    before = factories.dump(engine)
    plan = factories.plan(engine, [p], LATE)
    assert [(x.reason, x.node.replace) for x in plan.signals] == [("code changed", True)]
    run(engine, [p], LATE)
    assert factories.dump(engine)[factories.OUTPUTS[0]] == before[factories.OUTPUTS[0]]  # replaced, not doubled
    assert factories.progress(engine)["SignalWeightsTS", p.signal_uid]["row_count"] == 2


def test_full_refresh(engine, market):
    p, q = portfolio("p", equal("A", "B")), portfolio("q", equal("C"))
    factories.register(engine, [p, q])
    run(engine, [p], LATE)
    assert reasons(engine, p, q, full_refresh=True) == {"p": "full refresh", "q": "new"}


def test_previous_failure(engine, market):
    p, q = portfolio("p", equal("A", "B")), portfolio("q", equal("C"))
    run(engine, [p, q], "2024-01-05")
    plan = factories.plan(engine, [p, q], LATE, failed_before={"p"})
    assert {x.identifier: x.reason for x in plan.portfolios} == {"p": "previous failure", "q": "inputs advanced"}
    assert plan.portfolios[0].start == instant("2024-01-04 21:00")
    run(engine, [p, q], LATE)
    assert reasons(engine, p, q, failed_before={"p"}) == {"p": "up to date", "q": "up to date"}


def test_a_failure_is_remembered_by_the_next_run(engine, market):
    p = portfolio("p", equal("A", "B"))
    factories.sql(engine, "UPDATE msm__external_prices SET close = 0 WHERE asset_identifier = 'B' AND time_index = '2024-01-05 21:00Z'")
    assert run(engine, [p], LATE).exit_code == 4
    factories.sql(engine, "UPDATE msm__external_prices SET close = 5 WHERE asset_identifier = 'B' AND time_index = '2024-01-05 21:00Z'")
    assert run(engine, [p], LATE).exit_code == 0
    factories.load_prices(engine, factories.walks("2024-01-16", 1, ["A", "B"]))
    run(engine, [p], LATE)
    found = factories.sql(
        engine,
        "SELECT n.reason, n.status FROM msm__run_node n JOIN msm__run r ON r.uid = n.run_uid WHERE kind = 'portfolio' ORDER BY started_at",
    )
    assert found == [("new", "failed"), ("previous failure", "landed"), ("inputs advanced", "landed")]


# -- windows ----------------------------------------------------------------------------------------------------------------------


def test_a_window_begins_at_the_watermark_and_names_what_limits_it(engine, market):  # R70
    factories.load_prices(engine, factories.walks("2024-01-16", 5, ["A", "C"]))
    fleet = [portfolio("ab", equal("A", "B")), portfolio("ac", equal("A", "C")), portfolio("over", equal("A", override_asset="B"))]
    run(engine, fleet, "2024-01-05")
    windows = {p.identifier: (p.start, p.end, p.limited_by) for p in factories.plan(engine, fleet, LATE).portfolios}
    begin = instant("2024-01-04 21:00")
    assert windows == {
        "ab": (begin, instant("2024-01-15 21:00"), "B"),
        "ac": (begin, instant("2024-01-22 21:00"), "A"),
        "over": (begin, instant("2024-01-15 21:00"), "B"),
    }
    windows = {p.identifier: (p.start, p.end, p.limited_by) for p in factories.plan(engine, fleet, "2024-01-10 12:00").portfolios}
    assert windows == dict.fromkeys(("ab", "ac", "over"), (begin, instant("2024-01-09 21:00"), "A"))  # the last bar by then


def test_what_is_held_is_required(engine, market):  # R70
    """B was bought and is no longer in the universe of the signal that the world knows: it still bounds the window."""
    signal = schedule(("2024-01-02 21:00Z", {"A": 1.0, "B": 0.0}))
    p = portfolio("p", signal)
    run(engine, [p], "2024-01-05")
    factories.sql(
        engine,
        "INSERT INTO msm__portfolio_weights (portfolio_identifier, time_index, asset_identifier, weight, weight_before, price_current)"
        " VALUES ('p', '2024-01-04 21:00Z', 'C', 0.5, 0, 1), ('p', '2024-01-04 21:00Z', 'A', 0.5, 0, 1)",
    )
    factories.sql(engine, "DELETE FROM msm__external_prices WHERE asset_identifier = 'C' AND time_index > '2024-01-09'")
    (planned,) = factories.plan(engine, [p], LATE).portfolios
    assert (planned.end, planned.limited_by) == (instant("2024-01-08 21:00"), "C")
    assert planned.node.held == ("A", "C")
    # computed afresh, the old holding is no matter
    (planned,) = factories.plan(engine, [p], LATE, full_refresh=True).portfolios
    assert (planned.end, planned.limited_by, planned.node.held) == (instant("2024-01-15 21:00"), "A", ())


def test_strangers_do_not_move_the_end(engine, market):  # R68, R71
    p = portfolio("p", equal("A", "B"))
    run(engine, [p], "2024-01-05")
    expected = factories.plan(engine, [p], LATE).portfolios
    factories.register_assets(engine, ["stale", "new"])
    factories.load_prices(engine, pd.DataFrame({"stale": [1.0]}, factories.closes_of("2023-01-02", 1)))
    factories.load_prices(engine, pd.DataFrame({"new": [1.0]}, factories.closes_of("2024-11-01", 1)))
    run(engine, [portfolio("q", equal("new")), portfolio("r", equal("C"))], LATE)
    assert factories.plan(engine, [p], LATE).portfolios == expected


def test_no_scope_no_guess(engine, market):  # R72
    """A signal that names no assets: never a table-wide window."""
    p = portfolio("p", schedule())
    (planned,) = factories.plan(engine, [p], LATE).portfolios
    assert (planned.reason, planned.node) == ("invalid", None)
    assert planned.error["reason"] == "scope_undetermined"
    report = run(engine, [p, portfolio("q", equal("A"))], LATE)
    assert factories.statuses(report) == {"p": "failed", "q": "landed"}


def test_a_plan_reads_and_decides_and_writes_nothing(engine, market):
    fleet = [portfolio("p", equal("A", "B")), portfolio("q", equal("ghost"))]
    factories.register(engine, fleet)
    before = factories.versions(engine)
    first, second = (factories.plan(engine, fleet, LATE) for _ in range(2))
    assert first == second
    assert factories.versions(engine) == before


def test_planning_takes_the_same_statements_for_any_fleet(engine, market):  # R100
    fleet = [portfolio(f"p{i}", equal("A", "B", "C") if i % 2 else equal("A")) for i in range(200)]
    factories.register(engine, fleet)
    counts = []
    for size in (2, 200):
        with factories.statements() as sent:
            factories.plan(engine, fleet[:size], LATE)
        counts.append(len([s for s in sent if s != ";"]))
    assert counts[0] == counts[1] <= 8


# -- what cannot work ---------------------------------------------------------------------------------------------------------------


def test_what_cannot_work_is_told_by_name(engine, market):  # R36, R69
    elsewhere = uuid.uuid4()
    factories.register_assets(engine, ["D", "E"])
    broken = {
        "unknown": portfolio("unknown", equal("A", "ghost", "spirit")),
        "missing": portfolio("missing", equal("A", "E", "D")),
        "column": portfolio("column", equal("A"), column="settle"),
        "text": portfolio("text", equal("A"), column="asset_identifier"),
        "empty": portfolio("empty", equal("A"), column="vwap"),
        "nowhere": portfolio("nowhere", equal("A"), source=elsewhere),
        "override": portfolio("override", equal("A", override_asset="ghost")),
    }
    plan = factories.plan(engine, [*broken.values(), portfolio("good", equal("A"))], LATE)
    errors = {p.identifier: p.error["message"] for p in plan.portfolios if p.error}
    assert set(errors) == set(broken)
    assert "ghost, spirit not registered as assets" in errors["unknown"]
    assert "ExternalPricesTS has no close for D, E" in errors["missing"]
    assert "no numeric column 'settle', only close, high, low, open, trade_count, volume, vwap" in errors["column"]
    assert "no numeric column 'asset_identifier'" in errors["text"]
    assert "ExternalPricesTS has no vwap for A" in errors["empty"]
    assert str(elsewhere) in errors["nowhere"]
    assert "ghost not registered" in errors["override"]
    assert {p.reason for p in plan.portfolios if p.error} == {"invalid"}
    assert list(plan.work()) == [("signal", equal("A").uid), ("portfolio", "good")]


def test_a_signal_that_cannot_even_be_asked_stops_only_its_own(engine, market):
    """Signals may be plugins: one that raises is a failed node, not a failed plan."""
    good = portfolio("good", equal("A"))
    working = schedule(("2024-01-02 21:00Z", {"A": 1.0}))
    run(engine, [portfolio("bad", working), good], "2024-01-05")
    broken = portfolio("bad", replace_broken(working))
    factories.register(engine, [broken])
    factories.sql(
        engine,
        "UPDATE msm__data_node_update SET watermark = '2024-01-02 21:00Z', code_version = %s, epoch = 1 WHERE scope = %s",
        (broken.signal.code_version, broken.signal_uid),
    )
    report = run(engine, [broken, good], LATE)
    assert factories.statuses(report)["good"] == "landed"
    assert factories.statuses(report)["bad"] in ("failed", "skipped")
    assert "broken on purpose" in " ".join(factories.messages(report).values())


def replace_broken(signal: factories.Scheduled) -> factories.Scheduled:
    return signal.model_copy(update={"broken": True})


# -- signals ------------------------------------------------------------------------------------------------------------------------


def test_a_signal_comes_along_when_it_is_needed(engine, market):
    p, q, r = portfolio("p", equal("A")), portfolio("q", equal("A")), portfolio("r", fixed(B=1.0))
    plan = factories.plan(engine, [p, q, r], LATE)
    assert sorted(s.identifier for s in plan.signals) == sorted({p.signal_uid, r.signal_uid})  # each distinct one once
    assert plan.upstream()["portfolio", "q"] == {("signal", p.signal_uid)}
    run(engine, [p, q, r], LATE)
    assert factories.plan(engine, [p, q, r], LATE).signals == ()
    chosen = factories.plan(engine, [p, q, r], LATE, signals_selected=[r.signal_uid])
    assert [(s.identifier, s.reason) for s in chosen.signals] == [(r.signal_uid, "up to date")]
    assert factories.plan(engine, [p, q], LATE, signals_selected=[r.signal_uid]).signals == ()  # nobody knows its parameters


def test_a_later_vector_is_due(engine, market):  # R75
    signal = schedule(("2024-01-03 21:00Z", {"A": 1.0}), ("2024-01-08 21:00Z", {"B": 1.0}))
    p = portfolio("p", signal)
    due = []
    for as_of in ("2024-01-02", "2024-01-05", "2024-01-06", "2024-01-09", LATE):
        due += [(s.reason, s.node is not None) for s in factories.plan(engine, [p], as_of, signals_selected=[signal.uid]).signals]
        run(engine, [p], as_of)
    assert due == [("new", True), ("new", True), ("up to date", False), ("inputs advanced", True), ("up to date", False)]
    assert factories.progress(engine)["SignalWeightsTS", signal.uid]["watermark"] == pd.Timestamp("2024-01-08 21:00Z")


# -- pure -----------------------------------------------------------------------------------------------------------------------------


NOTHING = Resolved({}, {}, {})
COLUMNS = {"time_index": "timestamp with time zone", "asset_identifier": "character varying(255)", "close": "double precision"}
SOURCE = Source(
    ExternalPricesStorage.storage_uid(), "ExternalPricesTS", "msm__external_prices", "prices", "1d", "close", {}, COLUMNS, readable=True
)


def world(
    watermark: str | None = None, configuration=None, epoch: int = 3, label: str = "close", held: tuple[str, ...] = (), **last: str
) -> World:
    """A world in which `last` says when each asset's last bar is; the first one is on the 2nd."""
    progress = {}
    if configuration is not None:
        for scope in portfolio_scopes(configuration):
            facts = (configuration.configuration_hash, portfolio_code_version(configuration))
            progress[scope.uid] = Progress(scope.uid, watermark and instant(watermark), epoch, 1, *facts)
    coverage = {asset: (instant("2024-01-02 21:00"), instant(time)) for asset, time in last.items()}
    source = replace(SOURCE, time_label=label)
    key = (SOURCE.uid, None)
    resolved = Resolved({key: source}, {}, {})
    known = dict.fromkeys([*last, *held], AssetFacts(None, None))
    return World(progress, {"p": held}, {}, resolved, known, {(key, "close"): coverage}, {}, {})


P = portfolio("p", equal("A", "B"))
WINDOWS = [
    # watermark, last bars, as_of -> end, limited by, reason
    (None, {"A": "2024-01-09", "B": "2024-01-08"}, "2024-01-31", ("2024-01-08", "B", "new")),
    (None, {"A": "2024-01-09", "B": "2024-01-09"}, "2024-01-31", ("2024-01-09", "A", "new")),
    (None, {"A": "2024-01-09", "B": "2024-01-09"}, "2024-01-08", ("2024-01-08", "as of", "new")),
    (None, {"A": "2024-01-09", "B": "2024-01-09", "C": "2024-01-03"}, "2024-01-05", ("2024-01-05", "as of", "new")),
    ("2024-01-05", {"A": "2024-01-09", "B": "2024-01-05", "C": "2024-01-09"}, "2024-01-31", ("2024-01-05", "B", "up to date")),
    ("2024-01-05", {"A": "2024-01-09", "B": "2024-01-06"}, "2024-01-31", ("2024-01-06", "B", "inputs advanced")),
    ("2024-01-05", {"A": "2024-01-09"}, "2024-01-31", ("2024-01-05", "B", "up to date")),  # all bars of B are gone
    ("2024-01-05", {"A": "2024-01-09", "B": "2024-01-09"}, "2024-01-04", ("2024-01-04", "as of", "up to date")),
]


@pytest.mark.parametrize(("watermark", "last", "as_of", "expected"), WINDOWS)
def test_windows(watermark, last, as_of, expected):
    known = world(watermark, P if watermark else None, **last)
    known.assets.update(dict.fromkeys("AB", AssetFacts(None, None)))
    planned = plan_portfolio(P, known, instant(as_of), full_refresh=False)
    assert (planned.end, planned.limited_by, planned.reason) == (instant(expected[0]), *expected[1:])
    assert (planned.node is None) == (planned.reason == "up to date")
    assert planned.start == (instant(watermark) if watermark else None)


def test_a_bar_labelled_by_its_date_becomes_known_later():
    """Stamped 00:00 of the 9th, it may be known as late as the 11th, wherever the exchange is."""
    planned = plan_portfolio(P, world(None, None, label="session_date", A="2024-01-09", B="2024-01-09"), instant("2024-01-31"), False)
    assert planned.end == instant("2024-01-11")


def test_the_plan_carries_the_epoch_that_it_saw():
    planned = plan_portfolio(P, world("2024-01-05", P, epoch=41, held=("A",), A="2024-01-09", B="2024-01-09"), instant(LATE), False)
    assert (planned.node.expected_epoch, planned.node.watermark, planned.node.held) == (41, instant("2024-01-05"), ("A",))
    assert json.loads(planned.node.model_dump_json())["watermark"] == "2024-01-05T00:00:00Z"


def test_signals_are_planned_from_their_own_progress():
    signal = schedule(("2024-01-03 21:00Z", {"A": 1.0}), ("2024-01-08 21:00Z", {"A": 0.5}))
    other = Scope(SignalWeightsStorage, "other").uid
    own = Scope(SignalWeightsStorage, signal.uid).uid

    def planned(progress: dict) -> tuple:
        found = plan_signal(signal, World(progress, {}, {}, NOTHING, {}, {}, {}, {}), instant("2024-01-31"), full_refresh=False)
        return found.reason, found.start, found.end

    later = Progress(other, instant("2024-06-01"), 9, 1, "x", signal.code_version)
    assert planned({other: later}) == ("new", None, instant("2024-01-31"))
    mine = Progress(own, instant("2024-01-03 21:00"), 2, 1, "x", signal.code_version)
    assert planned({own: mine}) == ("inputs advanced", mine.watermark, instant("2024-01-31"))
    mine = replace(mine, watermark=instant("2024-01-08 21:00"))
    assert planned({own: mine, other: later}) == ("up to date", mine.watermark, mine.watermark)


def test_a_plan_prints_as_plain_data():
    known = world(None, None, A="2024-01-09", B="2024-01-08")
    plan = make_plan([P, portfolio("q", equal("ghost"))], known, instant("2024-01-31"))
    document = json.loads(json.dumps(plan.document()))
    assert document["as_of"] == "2024-01-31T00:00:00+00:00"
    assert document["summary"] == {"prices": {}, "signals": {"new": 1}, "portfolios": {"new": 1, "invalid": 1}}
    assert document["portfolios"][0] == {"identifier": "p", "reason": "new", "end": "2024-01-08T00:00:00+00:00", "limited_by": "B"}
    assert document["portfolios"][1]["error"]["reason"] == "unknown_assets"


def test_nothing_depends_on_the_order_of_configurations():
    known = world(None, None, A="2024-01-09", B="2024-01-08", C="2024-01-07")
    fleet = [portfolio(f"p{i}", equal(*"ABC"[: 1 + i % 3])) for i in range(6)]
    forward, backward = (make_plan(order, known, instant("2024-01-31")) for order in (fleet, fleet[::-1]))
    assert set(forward.portfolios) == set(backward.portfolios)
    assert forward.signals == backward.signals
    assert forward.work().keys() == backward.work().keys()
    assert np.array_equal(sorted(map(str, forward.upstream())), sorted(map(str, backward.upstream())))
