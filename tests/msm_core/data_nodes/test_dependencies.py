"""Who waits for whom: signals for the portfolios that they track, portfolios for their signals; and cycles, refused by name."""

from itertools import pairwise
from uuid import UUID

import pytest
from sqlalchemy import Engine

from msm_core.configuration import PortfolioConfiguration
from msm_core.data_nodes.dependencies import dependencies, independent_parts, upstream_of
from msm_core.data_nodes.interpolated_prices import InterpolatedPrices, InterpolatedPricesConfig
from msm_core.data_nodes.portfolios import PortfoliosDataNode
from msm_core.errors import CyclicPlan, NodeFailed
from msm_ray.session import choose_portfolios
from tests import factories, mixed
from tests.factories import equal, fixed, instant, messages, portfolio, run, schedule, sql, statuses
from tests.mixed import END, NINE, bits, inverse, landed, replicator

scheduled = factories.scheduled


def copy(identifier: str, *, publishes: str | None = None, window: int = 5, **target: str) -> PortfolioConfiguration:
    """A portfolio whose signal tracks something with three assets."""
    return portfolio(identifier, replicator(window, assets=NINE[:3], **target), index=publishes)


def chain() -> list[PortfolioConfiguration]:
    """d tracks the index of c, c tracks b, b tracks a; e stands beside them. Named against their order."""
    return [
        copy("1-d", index="INDEX"),
        copy("2-c", publishes="INDEX", portfolio="3-b"),
        copy("3-b", portfolio="4-a"),
        portfolio("4-a", equal(*NINE)),
        portfolio("5-e", fixed(a0=1.0)),
    ]


@pytest.fixture
def market(engine: Engine):
    return mixed.open_market(engine, count=40)


# -- edges, pure --------------------------------------------------------------------------------------------------------------------


def tracks(identifier: str, *portfolios: str, publishes: str | None = None, index: str | None = None) -> PortfolioConfiguration:
    """Of a portfolio only what it tracks matters here."""
    if not portfolios and index is None:
        return portfolio(identifier, equal("A"), index=publishes)
    target = {"index": index} if index else {"portfolio": portfolios[0]}
    return portfolio(identifier, replicator(3, **target), index=publishes)  # type: ignore[arg-type]


def test_each_comes_after_what_it_tracks():
    fleet = dependencies([tracks("a", "b"), tracks("b", index="I"), tracks("c", publishes="I"), tracks("d", "stored elsewhere")])
    assert [c.identifier for c in fleet.order if c.identifier != "d"] == ["c", "b", "a"]
    assert fleet.upstream == {"a": ("b",), "b": ("c",), "c": (), "d": ()}
    assert fleet.cyclic == {}


def test_upstream_of_is_everything_that_is_waited_for_in_order():
    configurations = [tracks("a", "b"), tracks("b", "c"), tracks("c"), tracks("x", "c"), tracks("y")]
    fleet = dependencies(configurations)
    assert [c.identifier for c in upstream_of([configurations[0]], fleet)] == ["c", "b"]
    assert [c.identifier for c in upstream_of(configurations[:2], fleet)] == ["c"]  # b is chosen itself
    assert upstream_of([configurations[4]], fleet) == []


@pytest.mark.parametrize(
    ("edges", "cyclic"),
    [
        ({"a": "a"}, {"a"}),
        ({"a": "b", "b": "a"}, {"a", "b"}),
        ({"a": "b", "b": "c", "c": "a", "d": "a", "e": None}, {"a", "b", "c"}),
        ({"a": "b", "b": "a", "c": "d", "d": "c", "e": "c"}, {"a", "b", "c", "d"}),
    ],
    ids=["itself", "two", "three, and one that waits for them", "two cycles"],
)
def test_the_members_of_a_cycle_are_named_and_nobody_else(edges, cyclic):
    fleet = dependencies([tracks(name, *([target] if target else [])) for name, target in edges.items()])
    assert set(fleet.cyclic) == cyclic
    assert len(fleet.order) == len(edges)
    for name, error in fleet.cyclic.items():
        path = error.facts["cycle"].split(" -> ")
        assert path[0] == path[-1]
        assert name in path
        assert all(edges[waits] == target for waits, target in pairwise(path))  # read: a waits for b


def test_a_cycle_through_an_index_is_one():
    fleet = dependencies([tracks("a", index="I"), tracks("b", "a", publishes="I")])
    assert set(fleet.cyclic) == {"a", "b"}


def test_a_thousand_links_are_no_recursion():
    configurations = [tracks(f"p{i:04}", f"p{i + 1:04}") for i in range(1500)]
    fleet = dependencies([*configurations, tracks("p1500")])
    assert [fleet.order[i].identifier for i in (0, 1, 1500)] == ["p1500", "p1499", "p0000"]
    assert len(upstream_of(configurations[:1], fleet)) == 1500


def test_parts_of_a_fleet_share_no_node():
    """In the first part what tracks, is tracked, or has a signal of those; whoever follows one signal stays together."""
    filled = {"upsample_frequency_id": "1d", "intraday_bar_interpolation_rule": "ffill"}
    daily = InterpolatedPricesConfig(source_time_index_meta_table_uid=UUID(int=1), **filled)
    names = ("B", "C", "D", "B", "E", "F", "D")
    loose = [portfolio(f"{i}{name}", equal(name)) for i, name in enumerate(names)]
    tied = [tracks("x", "y"), tracks("y"), portfolio("like y", equal("A"))]
    tied.append(portfolio("interpolated", equal("G"), prices=InterpolatedPrices(interpolation_config=daily)))
    fleet = [*loose[:3], *tied, *loose[3:]]
    parts = [[c.identifier for c in part] for part in independent_parts(fleet, 3)]
    assert parts == [["x", "y", "like y", "interpolated"], ["0B", "3B", "1C"], ["2D", "6D", "4E"], ["5F"]]
    assert [[c.identifier for c in part] for part in independent_parts(loose, 4)] == [["0B", "3B", "1C", "2D", "6D"], ["4E", "5F"]]
    assert independent_parts(fleet, len(fleet)) == [fleet]
    assert independent_parts([], 3) == [[]]
    assert independent_parts([tracks(c, d) for c, d in pairwise("abcdea")], 2) == [[tracks(c, d) for c, d in pairwise("abcdea")]]


# -- in a plan ----------------------------------------------------------------------------------------------------------------------


def test_a_plan_has_an_edge_from_the_tracked_portfolio_to_the_signal(engine, market):
    fleet = chain()
    plan = factories.plan(engine, fleet, END)
    d, c, b, a, e = fleet
    expected = {("portfolio", x.identifier): {("signal", x.signal_uid)} for x in fleet}
    expected |= {("signal", x.signal_uid): {("portfolio", t.identifier)} for x, t in ((d, c), (c, b), (b, a))}
    expected |= {("signal", x.signal_uid): set() for x in (a, e)}
    assert plan.upstream() == expected
    assert [p.identifier for p in plan.portfolios] == [x.identifier for x in fleet]  # reported in the order of the fleet


def test_one_run_goes_down_the_whole_chain(engine, market):
    """Each link needs five returns before its first vector: 40 sessions, less 5 for each."""
    fleet = chain()
    report = landed(engine, fleet, batch_size=1)
    assert set(statuses(report).values()) == {"landed"}
    lengths = {c.identifier: len(factories.values(engine, c.identifier)) for c in fleet}
    assert lengths == {"4-a": 40, "3-b": 35, "2-c": 30, "1-d": 25, "5-e": 40}
    order = [r.identifier for r in report.results if r.kind == "portfolio" and r.identifier != "5-e"]
    assert order == ["4-a", "3-b", "2-c", "1-d"]
    assert set(statuses(landed(engine, fleet)).values()) == {"up_to_date"}


def test_a_tracked_portfolio_that_lags_holds_back_those_who_wait_for_it(engine, market):
    sql(engine, "DELETE FROM msm__external_prices WHERE asset_identifier = 'a8' AND time_index > %s", (market.index[24],))
    fleet = chain()
    landed(engine, fleet)
    ends = {c.identifier: factories.values(engine, c.identifier).index[-1] for c in fleet}
    assert ends == dict.fromkeys(("4-a", "3-b", "2-c", "1-d"), market.index[24]) | {"5-e": market.index[-1]}
    factories.load_prices(engine, market[["a8"]].iloc[25:])
    landed(engine, fleet)
    late = bits(engine)
    mixed.wipe(engine)
    landed(engine, fleet)
    assert bits(engine) == late


# -- failures -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, None])
def test_a_tracked_portfolio_that_fails_skips_exactly_its_dependants(engine, market, batch_size):
    """The rows of b cannot be written; c and d wait for it, nobody else does."""
    fleet = [*chain(), copy("6-f", portfolio="4-a", window=6)]
    sql(engine, "ALTER TABLE msm__portfolios ADD CONSTRAINT broken CHECK (portfolio_identifier <> '3-b')")
    report = run(engine, fleet, END, batch_size=batch_size)
    assert statuses(report) == {
        "1-d": "skipped", "2-c": "skipped", "3-b": "failed", "4-a": "landed", "5-e": "landed", "6-f": "landed",
    }  # fmt: skip
    assert {statuses(report, "signal")[c.signal_uid] for c in fleet[:2]} == {"skipped"}
    assert messages(report)["2-c"].count("portfolio 3-b") == 1
    sql(engine, "ALTER TABLE msm__portfolios DROP CONSTRAINT broken")
    again = run(engine, fleet, END)
    assert statuses(again) == {"1-d": "landed", "2-c": "landed", "3-b": "landed"} | dict.fromkeys(("4-a", "5-e", "6-f"), "up_to_date")
    healed = bits(engine)
    mixed.wipe(engine)
    landed(engine, fleet)
    assert bits(engine) == healed


def test_a_tracked_portfolio_that_cannot_be_planned_skips_its_dependants(engine, market):
    fleet = [copy("c", portfolio="b"), copy("b", portfolio="a"), portfolio("a", fixed(ghost=1.0)), portfolio("e", equal(*NINE))]
    plan = factories.plan(engine, fleet, END)
    assert {p.identifier: p.error and p.error["reason"] for p in plan.portfolios} == {
        "a": "unknown_assets", "b": "dependency_failed", "c": "dependency_failed", "e": None,
    }  # fmt: skip
    report = run(engine, fleet, END)
    assert statuses(report) == {"a": "failed", "b": "skipped", "c": "skipped", "e": "landed"}
    assert "ghost" in messages(report)["c"]


def test_a_tracked_portfolio_whose_signal_fails_skips_its_dependants(engine, market):
    fleet = [copy("b", portfolio="a"), portfolio("a", schedule((market.index[0], {"a0": 1.0}), broken=True)), portfolio("e", equal(*NINE))]
    report = run(engine, fleet, END)
    assert statuses(report) == {"a": "skipped", "b": "skipped", "e": "landed"}
    assert "on purpose" in messages(report)["b"]


# -- cycles -------------------------------------------------------------------------------------------------------------------------


def cycle() -> list[PortfolioConfiguration]:
    return [
        copy("a", portfolio="b"),
        copy("b", portfolio="c"),
        copy("c", portfolio="a"),
        copy("d", portfolio="a"),
        portfolio("e", equal(*NINE)),
    ]


def test_a_cycle_fails_its_members_skips_who_waits_for_them_and_the_rest_lands(engine, market):
    fleet = cycle()
    plan = factories.plan(engine, fleet, END)
    assert {p.identifier: p.error and p.error["reason"] for p in plan.portfolios} == {
        **dict.fromkeys("abc", "cyclic_plan"), "d": "dependency_failed", "e": None,
    }  # fmt: skip
    report = run(engine, fleet, END)
    assert statuses(report) == {"a": "failed", "b": "failed", "c": "failed", "d": "skipped", "e": "landed"}
    assert {r.error["reason"] for r in report.results if r.error and r.identifier in "abc"} == {"cyclic_plan"}
    for name in "abc":
        told = messages(report)[name]
        assert "a -> b -> c" in told or "b -> c -> a" in told or "c -> a -> b" in told
    assert report.exit_code == 3


def test_a_cycle_that_is_broken_up_lands(engine, market):
    fleet = cycle()
    run(engine, fleet, END)
    mended = [*fleet[:2], portfolio("c", equal(*NINE[:4])), *fleet[3:]]
    assert set(statuses(landed(engine, mended)).values()) == {"landed", "up_to_date"}


# -- selections ---------------------------------------------------------------------------------------------------------------------


def test_a_selection_brings_along_what_is_waited_for(engine, market):
    fleet = chain()
    factories.register(engine, fleet)
    chosen = choose_portfolios(engine, None, ["portfolio:2-c"])
    assert [c.identifier for c in chosen.configurations] == ["2-c", "3-b", "4-a"]
    report = landed(engine, chosen.configurations)
    assert statuses(report) == {"2-c": "landed", "3-b": "landed", "4-a": "landed"}
    assert {c.identifier for c in choose_portfolios(engine, None, ["portfolio:4-a"]).configurations} == {"4-a"}
    by_signal = choose_portfolios(engine, None, [f"signal:{fleet[2].signal_uid}"])
    assert by_signal.signals == {fleet[2].signal_uid}
    assert "4-a" in {c.identifier for c in by_signal.configurations}  # which that signal tracks


def test_what_is_tracked_and_not_selected_is_read_as_it_is_stored(engine, market):
    fleet = chain()
    factories.register(engine, fleet)
    landed(engine, fleet[2:4], market.index[24], registered=True)
    before = factories.values(engine, "3-b")
    report = landed(engine, fleet[1:2], END, registered=True)  # c alone
    assert statuses(report) == {"2-c": "landed"}
    assert factories.values(engine, "2-c").index[-1] == before.index[-1]
    landed(engine, fleet)
    whole = bits(engine)
    mixed.wipe(engine)
    landed(engine, fleet)
    assert bits(engine) == whole


# -- one node at a time -------------------------------------------------------------------------------------------------------------


def test_a_node_that_runs_by_itself_brings_what_it_waits_for(engine, market):  # R66, R67
    fleet = chain()
    factories.register(engine, fleet[1:])
    node = PortfoliosDataNode(portfolio_configuration=fleet[0])
    result = node.run(as_of=instant(END))
    assert (result.status, result.watermark) == ("landed", market.index[-1])
    assert [len(factories.values(engine, c.identifier)) for c in fleet] == [25, 30, 35, 40, 0]  # e is nobody's upstream
    assert node.run(as_of=instant(END)).status == "up_to_date"
    alone = bits(engine)
    mixed.wipe(engine)
    landed(engine, fleet[:4])
    assert bits(engine) == alone


def test_without_its_tree_a_node_runs_alone(engine, market):  # R67
    fleet = chain()
    factories.register(engine, fleet)
    with pytest.raises(NodeFailed, match="no close for 4-a"):
        PortfoliosDataNode(portfolio_configuration=fleet[2]).run(as_of=instant(END), update_tree=False)
    assert factories.values(engine, "4-a").empty


def test_a_node_that_fails_upstream_is_told(engine, market):
    fleet = [copy("b", portfolio="a"), portfolio("a", fixed(ghost=1.0))]
    factories.register(engine, fleet)
    with pytest.raises(NodeFailed, match="ghost"):
        PortfoliosDataNode(portfolio_configuration=fleet[0]).run(as_of=instant(END))


def test_a_node_in_a_cycle_is_refused_and_not_stored(engine, market):
    a, b = copy("a", portfolio="b"), copy("b", portfolio="a")
    factories.register(engine, [b])
    before = sql(engine, "SELECT count(*) FROM msm__portfolio_configuration")
    with pytest.raises(CyclicPlan, match=r"a -> b -> a|b -> a -> b"):
        PortfoliosDataNode(portfolio_configuration=a).run(as_of=instant(END))
    assert sql(engine, "SELECT count(*) FROM msm__portfolio_configuration") == before
    with pytest.raises(CyclicPlan):
        PortfoliosDataNode(portfolio_configuration=copy("x", portfolio="x")).run(as_of=instant(END))


def test_a_node_above_a_cycle_is_refused_too(engine, market):
    factories.register(engine, cycle())
    with pytest.raises(CyclicPlan, match=r"a -> b -> c|b -> c -> a|c -> a -> b"):
        PortfoliosDataNode(portfolio_configuration=copy("z", portfolio="a")).run(as_of=instant(END))


def test_a_cycle_of_others_is_no_obstacle(engine, market):
    factories.register(engine, cycle())
    assert PortfoliosDataNode(portfolio_configuration=portfolio("e", inverse())).run(as_of=instant(END)).status == "landed"
