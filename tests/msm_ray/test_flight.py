"""How the nodes of a plan are sorted into batches. No database and no worker: replies are made up."""

import gc
import json
from collections import deque
from collections.abc import Mapping, Sequence
from datetime import UTC, date, datetime, timedelta
from types import MappingProxyType
from typing import Any

import pytest

from msm_core.configuration import PortfolioConfiguration
from msm_core.data_nodes.base import NodeResult
from msm_core.data_nodes.planning import NodePlan
from msm_core.data_nodes.portfolios import PortfoliosDataNode
from msm_core.data_nodes.signals import SignalWeights
from msm_core.garbage import collecting_seldom
from msm_core.signals import Signal
from msm_ray import flight
from msm_ray.executors import KINDS, Errand, Outcome, encode_batch
from msm_ray.flight import Flight
from msm_ray.loads import load_of
from msm_ray.plan import Plan
from tests import mixed
from tests.factories import equal, fixed, portfolio

AS_OF = datetime(2024, 1, 2, tzinfo=UTC)
YESTERDAY = AS_OF - timedelta(days=1)
LONG_AGO = date(2014, 1, 4)  # 3 650 days before


class Landing:
    """Everything lands, in the order in which it was submitted."""

    def __init__(self, slots: int) -> None:
        self.slots, self.queue, self.batches = slots, deque[tuple[int, list[tuple[str, str]]]](), list[tuple[str, list[str]]]()
        self.most = 0

    def submit(self, ticket: int, kind: str, payload: str) -> None:
        given = json.loads(payload)
        _, node_class = KINDS[given["kind"]]
        names = [node_class.model_validate(node).identifier for node in given["nodes"]]
        self.queue.append((ticket, [(given["kind"], name) for name in names]))
        self.batches.append((given["kind"], names))
        self.most = max(self.most, len(self.queue))

    def has_landed(self) -> bool:
        return bool(self.queue)

    def wait(self) -> tuple[int, Outcome]:
        ticket, keys = self.queue.popleft()
        return ticket, [NodeResult(kind, name, "landed") for kind, name in keys]

    def close(self) -> None:
        pass


def node(configuration: PortfolioConfiguration, since: datetime | None = YESTERDAY) -> NodePlan[PortfoliosDataNode]:
    made = PortfoliosDataNode(portfolio_configuration=configuration, watermark=since)
    return NodePlan(configuration.identifier, "inputs advanced", made)


def copies(identifier: str) -> Signal:
    return mixed.replicator(3, portfolio=identifier)


def flown(
    nodes: Sequence[NodePlan[PortfoliosDataNode]], slots: int = 2, signals: bool = False,
    partitions: Mapping[tuple[str, str], int] = MappingProxyType({}), **options: Any,
) -> Landing:  # fmt: skip
    """The batches in which these portfolios, and their signals if wanted, were brought up to date."""
    executor = Landing(slots)
    wanted = {p.node.portfolio_configuration.signal_uid: p.node.portfolio_configuration.signal for p in nodes if p.node} if signals else {}
    signal_nodes = [NodePlan(uid, "new", SignalWeights(signal_weights_instance=signal)) for uid, signal in wanted.items()]
    aloft = Flight(executor, Errand(AS_OF), **options)
    aloft.add(Plan(AS_OF, (), tuple(signal_nodes), tuple(nodes)), partitions)
    results = [r for batch in aloft.results() for r in batch]
    assert sorted(r.identifier for r in results) == sorted([*(p.identifier for p in nodes), *wanted])
    return executor


def fleet(count: int, start: date | None = None, on: str = "every_session", assets: int = 9) -> list[PortfolioConfiguration]:
    names = [f"A{i}" for i in range(assets)]
    return [portfolio(f"p{i:05}", equal(*names), on=on, start_date=start) for i in range(count)]


# -- loads --------------------------------------------------------------------------------------------------------------------------


def test_a_night_of_a_portfolio_is_two_sessions_at_most():
    [night] = [node(c) for c in fleet(1)]
    assert night.node is not None
    rows, cells, seconds = load_of(night.node, AS_OF)
    # one day is 5/7 of a session, and one more for the day that it is cut at: a value and 9 weights each; 9 prices and one of its own
    assert rows == pytest.approx(12 / 7 * 10)
    assert cells == pytest.approx(12 / 7 * 10)
    assert seconds == pytest.approx(1e-3 + 12 / 7 * 10 * 2.52e-6)


@pytest.mark.parametrize(("on", "events"), [("every_session", 1), ("week_end", 1 / 5), ("month_end", 1 / 21), ("quarter_end", 1 / 63)])
def test_rows_go_by_how_often_it_trades_and_cells_do_not(on, events):
    [first] = [node(c, since=None) for c in fleet(1, LONG_AGO, on)]
    assert first.node is not None
    sessions = 3650 * 5 / 7 + 1
    rows, cells, _ = load_of(first.node, AS_OF)
    assert rows == pytest.approx(sessions * (1 + 9 * events))
    assert cells == pytest.approx(sessions * 10)


# -- batches ------------------------------------------------------------------------------------------------------------------------


def test_a_night_is_a_few_batches_of_hundreds():
    executor = flown([node(c) for c in fleet(5_000)])
    sizes = [len(names) for _, names in executor.batches]
    assert max(sizes) <= flight.BATCH_NODES_MAX
    # 5 000 x 1.04 ms are 5.2 s: half of what is left for each of four in flight, and none below half a second but the last
    assert sizes[0] > 1_000
    assert all(size >= 470 for size in sizes[:-1])
    assert len(sizes) < 12


@pytest.mark.parametrize(("slots", "count"), [(2, 1_000), (2, 1_900), (4, 1_000), (1, 900)])
def test_a_little_work_goes_in_equal_parts_to_the_idle_workers(slots, count):
    sizes = [len(names) for _, names in flown([node(c) for c in fleet(count)], slots).batches]
    assert len(sizes) == slots
    assert max(sizes) <= 1.05 * count / slots


def test_a_first_run_is_cut_by_the_rows_that_fit_into_memory():
    executor = flown([node(c, since=None) for c in fleet(200, LONG_AGO, assets=90)])
    sizes = [len(names) for _, names in executor.batches]
    # 2 608 sessions x 91 rows: 12 of them are 2.9 million
    assert sizes[0] == 12
    assert sizes == sorted(sizes, reverse=True)  # smaller towards the end, so that all workers end together
    assert sizes[-1] <= 2


def test_prices_that_are_reckoned_with_bound_a_batch_too(monkeypatch):
    monkeypatch.setattr(flight, "BATCH_CELLS_MAX", 100_000)
    executor = flown([node(c, since=None) for c in fleet(40, LONG_AGO, "quarter_end")])
    assert max(len(names) for _, names in executor.batches) == 3  # 2 608 x 10 cells each


def test_batches_are_in_the_order_of_keys():
    executor = flown([node(c) for c in reversed(fleet(3_000))])
    names = [name for _, names in executor.batches for name in names]
    assert names == sorted(names)


def test_portfolios_go_in_the_order_of_keys_though_their_signals_land_in_another():
    """Signals land by uid, half of them first: what is inserted below the greatest key so far is the exception."""
    weights = [{f"A{k}": 0.1 for k in range(9)} | {"A0": 0.1 + i / 1_000} for i in range(100)]
    first = [portfolio(f"p{i:05}", fixed(**w), on="every_session", start_date=LONG_AGO) for i, w in enumerate(weights)]
    executor = flown([node(c, since=None) for c in first], signals=True)
    assert [len(names) for kind, names in executor.batches if kind == "signal"] == [50, 50]
    below, greatest = 0, ""
    for kind, names in executor.batches:
        if kind == "portfolio":
            below += sum(name < greatest for name in names)
            greatest = max(greatest, *names)
    assert below < 30


def test_nodes_that_share_no_prices_share_no_batch():
    nights, first = fleet(30), [node(c, since=None) for c in fleet(30, LONG_AGO)]
    others = [portfolio(f"x{i}", fixed(A0=1.0), column="open") for i in range(30)]
    executor = flown([*map(node, nights), *map(node, others)])
    assert sorted(len(names) for _, names in executor.batches) == [30, 30]
    executor = flown([*first, *map(node, others)])
    assert {names[0][0] for _, names in executor.batches} == {"p", "x"}
    assert all(len({name[0] for name in names}) == 1 for _, names in executor.batches)


def test_the_most_work_flies_first_and_what_others_wait_for_before_it():
    short = [portfolio(f"x{i}", fixed(A0=1.0), column="open") for i in range(40)]
    executor = flown([*map(node, short), *(node(c, since=None) for c in fleet(40, LONG_AGO))], slots=1)
    assert [names[0][0] for _, names in executor.batches][-1] == "x"
    executor = flown([node(c, since=None) for c in fleet(40, LONG_AGO)], slots=1, signals=True)
    assert executor.batches[0][0] == "signal"


def test_batches_that_fly_together_write_into_different_partitions():
    first = [node(c, since=None) for c in fleet(120, LONG_AGO, assets=90)]
    partitions = {("portfolio", p.identifier): i * 7 % 8 for i, p in enumerate(first)}  # 15 in each of eight
    executor = flown(first, slots=2, partitions=partitions)
    lanes = [{partitions["portfolio", name] % 2 for name in names} for _, names in executor.batches]
    assert all(len(lane) == 1 for lane in lanes)
    # they land in the order in which they were submitted, so two neighbours run at the same time: by turns they are even and odd
    assert [lane.pop() for lane in lanes[:12]] == [0, 1] * 6  # until the smaller half is done


def test_a_partition_is_no_reason_to_fly_before_or_after_others():
    short = [portfolio(f"x{i}", fixed(A0=1.0), column="open") for i in range(40)]
    first = [node(c, since=None) for c in fleet(40, LONG_AGO)]
    executor = flown([*map(node, short), *first], slots=1, partitions={("portfolio", p.identifier): 3 for p in first})
    order = [names[0][0] for _, names in executor.batches]
    assert (order[0], order[-1]) == ("p", "x")  # the most work first
    assert order == sorted(order)


def test_nodes_whose_partition_is_not_told_share_batches_as_ever():
    nights = [node(c) for c in fleet(400)]
    assert flown(nights, partitions={}).batches == flown(nights).batches


def test_no_more_than_two_batches_per_slot_are_in_flight():
    for slots in (1, 3):
        assert flown([node(c) for c in fleet(100)], slots, batch_size=2).most == 2 * slots


def test_a_further_plan_joins_those_under_way():
    """Two plans of four, one worker: what has landed is told without waiting, and makes room for the rest."""
    executor = Landing(slots=1)
    aloft = Flight(executor, Errand(AS_OF), batch_size=1)
    configurations = fleet(8)
    aloft.add(Plan(AS_OF, (), (), tuple(node(c) for c in configurations[:4])))
    assert [names for _, names in executor.batches] == [["p00000"], ["p00001"]]
    executor.has_landed = lambda: len(executor.queue) > 1  # type: ignore[method-assign] - then the next two are not there yet
    aloft.add(Plan(AS_OF, (), (), tuple(node(c) for c in configurations[4:])))
    told = [r.identifier for batch in aloft.landed() for r in batch]
    assert told == [f"p0000{i}" for i in range(7)]
    assert [r.identifier for batch in aloft.results() for r in batch] == ["p00007"]
    assert [name for _, names in executor.batches for name in names] == [c.identifier for c in configurations]


def test_whoever_waits_for_a_failure_is_told_before_a_further_plan():
    """c copies b, which copies a. All of them come to an end with a's batch, and none is lost when the next plan comes."""
    a, b, c = (portfolio(name, signal) for name, signal in zip("abc", (fixed(A=1.0), copies("a"), copies("b")), strict=True))
    signals = tuple(NodePlan(x.signal_uid, "new", SignalWeights(signal_weights_instance=x.signal)) for x in (b, c))
    executor = Landing(slots=1)
    aloft = Flight(executor, Errand(AS_OF))
    aloft.add(Plan(AS_OF, (), signals, tuple(map(node, (a, b, c))), {b.signal_uid: ("a",), c.signal_uid: ("b",)}))
    executor.wait = lambda: (executor.queue.popleft()[0], [NodeResult("portfolio", "a", "failed")])  # type: ignore[method-assign]
    told = [(r.identifier, r.status) for batch in aloft.landed() for r in batch]
    assert told == [("a", "failed"), *((name, "skipped") for name in (b.signal_uid, "b", c.signal_uid, "c"))]
    del executor.wait
    aloft.add(Plan(AS_OF, (), (), (node(fleet(1)[0]),)))
    assert [(r.identifier, r.status) for batch in aloft.results() for r in batch] == [("p00000", "landed")]


def test_a_batch_size_that_is_asked_for_is_the_size():
    executor = flown([node(c) for c in fleet(100)], batch_size=30)
    assert sorted(len(names) for _, names in executor.batches) == [10, 30, 30, 30]


# -- what travels -------------------------------------------------------------------------------------------------------------------


def test_a_worker_is_told_the_identities_and_does_not_work_them_out(monkeypatch):
    [configuration] = fleet(1)
    identities = (configuration.configuration_hash, configuration.signal_uid)
    sent = [
        PortfoliosDataNode(portfolio_configuration=configuration, identities=identities),
        SignalWeights(signal_weights_instance=configuration.signal, signal_uid=identities[1]),
    ]
    payloads = [json.loads(encode_batch(kind, [made], Errand(AS_OF))) for kind, made in zip(("portfolio", "signal"), sent, strict=True)]

    def identity_of(fields: Any) -> str:
        raise AssertionError("worked out again")

    for module in ("msm_core.configuration", "msm_core.signals.base"):
        monkeypatch.setattr(f"{module}.identity_of", identity_of)
    portfolio_node, signal_node = (KINDS[p["kind"]][1].model_validate(p["nodes"][0]) for p in payloads)
    assert isinstance(portfolio_node, PortfoliosDataNode)
    found = portfolio_node.portfolio_configuration
    assert (found.configuration_hash, found.signal_uid, signal_node.identifier) == (*identities, identities[1])
    with pytest.raises(AssertionError, match="worked out again"):  # a changed one is another one
        _ = found.signal.model_copy(update={"asset_list": ("B",)}).uid


def test_the_collector_is_itself_again_whatever_happened():
    before = gc.get_threshold()
    found = []

    @collecting_seldom()
    def fail() -> None:
        found.append(gc.get_threshold())
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert found[0] > before
    assert gc.get_threshold() == before


def test_two_that_hold_the_collector_back_at_once_leave_it_as_it_was():
    before = gc.get_threshold()
    first, second = collecting_seldom(), collecting_seldom()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)  # a run in another thread ends earlier
    assert gc.get_threshold() > before
    second.__exit__(None, None, None)
    assert gc.get_threshold() == before
