"""The loop of a run, against executors whose order, losses and rivals come from a seed; the batches themselves are real."""

import json
import random
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import pandas as pd
import psycopg
import pytest
from sqlalchemy import Engine

from msm_core import database
from msm_core.configuration import PortfolioConfiguration
from msm_core.data_nodes.base import NodeResult
from msm_core.errors import RunNotFound, StaleCode, StorageNotPrepared, WorkerLost
from msm_ray import executors, flight, ledger
from msm_ray import run as driver
from msm_ray.executors import Errand, LocalExecutor, Outcome, encode_batch, run_batch
from msm_ray.run import RunReport
from tests import factories
from tests.factories import equal, fixed, instant, messages, portfolio, run, schedule, sql, statuses

scheduled = factories.scheduled

ASSETS = [f"a{i}" for i in range(9)]
NIGHT, LATER = "2024-01-20", "2024-02-10"


class FakeExecutor:
    """Finishes payloads in an order drawn from a seed. `fault(number, payload)` may return what happens instead, or after, the batch."""

    def __init__(self, slots: int = 2, seed: int = 0, fault: Callable[[int, dict], str | None] = lambda number, payload: None) -> None:
        self.slots = slots
        self.fault = fault
        self.random = random.Random(seed)
        self.queue: list[tuple[int, str]] = []
        self.submitted: list[list[str]] = []  # identifiers, per batch
        self.log: list[tuple[str, str]] = []  # ("submit" | "done", identifier)
        self.most = 0

    def submit(self, ticket: int, kind: str, payload: str) -> None:
        assert ticket not in [t for t, _ in self.queue]
        self.queue.append((ticket, payload))
        self.submitted.append(identifiers(payload))
        self.log += [("submit", i) for i in identifiers(payload)]
        self.most = max(self.most, len(self.queue))

    def has_landed(self) -> bool:
        return bool(self.queue) and self.random.random() < 0.5

    def wait(self) -> tuple[int, Outcome]:
        ticket, payload = self.queue.pop(self.random.randrange(len(self.queue)))
        fault = self.fault(len(self.log), json.loads(payload))
        outcome: Outcome = WorkerLost(why="it was killed")
        if fault != "lost before":
            try:
                outcome = run_batch(payload)
            except Exception as error:
                outcome = error
        if fault == "lost after":
            outcome = WorkerLost(why="its reply was lost")
        self.log += [("done", i) for i in identifiers(payload)]
        return ticket, outcome

    def close(self) -> None:
        self.queue.clear()


def identifiers(payload: str | dict) -> list[str]:
    given = json.loads(payload) if isinstance(payload, str) else payload
    nodes = given["nodes"]
    if given["kind"] == "signal":
        return [executors.SignalWeights.model_validate(node).identifier for node in nodes]
    return [node["portfolio_configuration"]["portfolio_markets_configuration"]["portfolio_identifier"] for node in nodes]


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver, "BUSY_PAUSE_SECONDS", 0.01)


@pytest.fixture
def fleet(engine: Engine) -> list[PortfolioConfiguration]:
    """Ten portfolios of three signals, over 20 sessions from 2024-01-02."""
    market = factories.open_market(engine, factories.walks("2024-01-02", 20, ASSETS))
    signals = [equal(*ASSETS), fixed(a0=0.5, a8=0.3), schedule((market.index[0], {"a1": 1.0}), (market.index[9], {"a2": 0.7, "a1": 0.1}))]
    configurations = [portfolio(f"p{i}", signals[i % 3], fee=0.001, accounting=("drifted", "target")[i % 2]) for i in range(10)]
    factories.register(engine, configurations)
    return configurations


def wipe(engine: Engine) -> None:
    sql(engine, f"TRUNCATE {', '.join(factories.OUTPUTS)}")
    sql(engine, "UPDATE msm__data_node_update SET watermark = NULL, epoch = 0, row_count = 0")


def undisturbed(engine: Engine, fleet: list[PortfolioConfiguration], as_of: str) -> dict:
    assert run(engine, fleet, as_of, registered=True).exit_code == 0
    digest = factories.dump(engine)
    wipe(engine)
    sql(engine, "DELETE FROM msm__run")
    return digest


def ledger_rows(engine: Engine, run_uid: uuid.UUID) -> dict[str, dict[str, Any]]:
    rows = factories.frame(engine, "SELECT * FROM msm__run_node WHERE run_uid = %s", (run_uid,)).to_dict("records")
    return {row["identifier"]: row for row in rows}


@contextmanager
def broken_storage(engine: Engine, table: str, column: str, *names: str) -> Iterator[None]:
    """Rows of some scopes cannot be written: a failure that no plan foresees and that can be repaired."""
    refused = ", ".join(f"'{name}'" for name in names)
    sql(engine, f"ALTER TABLE {table} ADD CONSTRAINT broken CHECK ({column} NOT IN ({refused}))")
    yield
    sql(engine, f"ALTER TABLE {table} DROP CONSTRAINT broken")


# -- quarantine -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_a_failed_signal_skips_exactly_its_dependants(engine, fleet, seed):
    expected = undisturbed(engine, fleet, NIGHT)
    bad = fleet[1].signal_uid
    with broken_storage(engine, "msm__signal_weights", "signal_uid", bad):
        report = run(engine, fleet, NIGHT, registered=True, executor=FakeExecutor(seed=seed), batch_size=1 + seed)
    skipped = {"p1", "p4", "p7"}
    assert statuses(report) == {f"p{i}": "skipped" if f"p{i}" in skipped else "landed" for i in range(10)}
    assert statuses(report, "signal") == {c.signal_uid: "failed" if c.signal_uid == bad else "landed" for c in fleet}
    for name in skipped:
        assert f"signal {bad}" in messages(report)[name]
        assert factories.values(engine, name).empty
    assert (report.status, report.exit_code) == ("partial", 3)
    again = run(engine, fleet, NIGHT, registered=True)  # the next run picks it up without being told
    assert statuses(again) == {f"p{i}": "landed" if f"p{i}" in skipped else "up_to_date" for i in range(10)}
    assert factories.dump(engine) == expected


def test_a_failed_portfolio_stops_nobody(engine, fleet):
    expected = undisturbed(engine, fleet, NIGHT)
    with broken_storage(engine, "msm__portfolio_weights", "portfolio_identifier", "p3", "p8"):
        report = run(engine, fleet, NIGHT, registered=True, executor=FakeExecutor(seed=4))
    assert statuses(report) == {f"p{i}": "failed" if i in (3, 8) else "landed" for i in range(10)}
    assert run(engine, fleet, NIGHT, registered=True).counts()["landed"] == 2
    assert factories.dump(engine) == expected


def test_what_cannot_be_planned_fails_without_being_tried(engine, fleet):
    executor = FakeExecutor()
    report = run(engine, [*fleet, portfolio("ghost", equal("ghost"))], NIGHT, executor=executor)
    assert statuses(report)["ghost"] == "failed"
    assert report.counts()["landed"] == 10
    assert "ghost" not in {i for batch in executor.submitted for i in batch}
    row = ledger_rows(engine, report.run_uid)["ghost"]
    assert (row["status"], row["reason"], row["attempts"], row["error"]["reason"]) == ("failed", "invalid", 0, "unknown_assets")


# -- lost batches -----------------------------------------------------------------------------------------------------------------


def test_a_lost_batch_is_halved_until_the_culprit_stands_alone(engine, fleet):
    expected = undisturbed(engine, [c for c in fleet if c.identifier != "p6"], NIGHT)
    executor = FakeExecutor(fault=lambda number, payload: "lost before" if "p6" in identifiers(payload) else None)
    report = run(engine, fleet, NIGHT, registered=True, executor=executor)
    assert statuses(report) == {f"p{i}": "failed" if i == 6 else "landed" for i in range(10)}
    assert messages(report)["p6"].startswith("the worker was lost: it was killed")
    assert ledger_rows(engine, report.run_uid)["p6"]["error"]["reason"] == "worker_lost"
    assert factories.dump(engine) == expected
    with_p6 = [batch for batch in executor.submitted if "p6" in batch]
    assert len(with_p6) <= 5  # log2 of ten, and once alone
    assert with_p6[-1] == ["p6"]


def test_a_batch_that_is_too_large_lands_in_parts(engine, fleet):
    expected = undisturbed(engine, fleet, NIGHT)
    executor = FakeExecutor(fault=lambda number, payload: "lost before" if len(payload["nodes"]) > 2 else None)
    assert run(engine, fleet, NIGHT, registered=True, executor=executor).exit_code == 0
    assert factories.dump(engine) == expected


def test_a_lost_signal_skips_its_dependants(engine, fleet):
    bad = fleet[0].signal_uid
    executor = FakeExecutor(fault=lambda number, payload: "lost before" if bad in identifiers(payload) else None)
    report = run(engine, fleet, NIGHT, registered=True, executor=executor)
    assert statuses(report) == {f"p{i}": "skipped" if i % 3 == 0 else "landed" for i in range(10)}


def test_a_reply_that_is_lost_does_not_lose_the_work(engine, fleet):
    """The batch landed and nobody heard: asked again it is found up to date, and nothing is written twice."""
    expected = undisturbed(engine, fleet, NIGHT)
    executor = FakeExecutor(seed=5, fault=lambda number, payload: "lost after" if len(payload["nodes"]) > 1 else None)
    report = run(engine, fleet, NIGHT, registered=True, executor=executor)
    assert report.exit_code == 0, messages(report)
    assert set(statuses(report).values()) == {"up_to_date"}
    assert factories.dump(engine) == expected
    assert {row["epoch"] for row in factories.progress(engine).values()} == {1}


def test_a_worker_of_another_installation_is_refused(engine, fleet, monkeypatch):
    plan = factories.plan(engine, fleet, NIGHT)
    payload = encode_batch("signal", [p.node for p in plan.signals if p.node], Errand(plan.as_of))
    monkeypatch.setattr(executors, "code_version", lambda: "another")
    with pytest.raises(StaleCode, match="the worker runs code version another, the driver prices-"):
        run_batch(payload)
    assert sum(count for count, _ in factories.dump(engine).values()) == 0


def test_a_run_on_workers_of_another_installation_lands_nothing(engine, fleet, monkeypatch):
    class Elsewhere(LocalExecutor):
        def wait(self) -> tuple[int, Outcome]:
            with monkeypatch.context() as worker:
                worker.setattr(executors, "code_version", lambda: "another")
                return super().wait()

    report = run(engine, fleet, NIGHT, registered=True, executor=Elsewhere())
    assert (report.status, report.exit_code) == ("failed", 4)
    assert {r.error["reason"] for r in report.results if r.kind == "signal"} == {"stale_code"}
    assert sum(count for count, _ in factories.dump(engine).values()) == 0


# -- rivals -----------------------------------------------------------------------------------------------------------------------


class Rival:
    """Holds progress rows until the executor has waited `patience` times, then lands them itself or lets go."""

    def __init__(self, engine: Engine, where: str, then: Callable[[], None] = lambda: None, patience: int = 1) -> None:
        self.connection = psycopg.connect(engine.url.set(drivername="postgresql").render_as_string(hide_password=False))
        self.connection.execute(f"SELECT uid FROM msm__data_node_update WHERE {where} FOR UPDATE")  # type: ignore[arg-type]
        self.then, self.patience = then, patience

    def tick(self) -> None:
        self.patience -= 1
        if self.patience == 0:
            self.connection.close()
            self.then()


class BesideRival(LocalExecutor):
    def __init__(self, rival: Rival) -> None:
        super().__init__()
        self.rival = rival

    def wait(self) -> tuple[int, Outcome]:
        answer = super().wait()
        self.rival.tick()
        return answer


@pytest.mark.parametrize("lands", [True, False], ids=["the rival lands it", "the rival lets go"])
def test_a_busy_portfolio_is_asked_again(engine, fleet, lands):
    expected = undisturbed(engine, fleet, NIGHT)
    alone = [c for c in fleet if c.identifier == "p4"]
    then = (lambda: run(engine, alone, NIGHT, registered=True)) if lands else (lambda: None)
    rival = Rival(engine, "scope = 'p4'", then, patience=2)  # signals are the first batch, portfolios the second
    report = run(engine, fleet, NIGHT, registered=True, executor=BesideRival(rival))
    assert (report.exit_code, report.status) == (0, "landed")
    assert statuses(report) == {f"p{i}": "up_to_date" if i == 4 and lands else "landed" for i in range(10)}
    assert ledger_rows(engine, report.run_uid)["p4"]["status"] == statuses(report)["p4"]
    assert factories.dump(engine) == expected


@pytest.mark.parametrize("lands", [True, False], ids=["the rival lands it", "the rival lets go"])
def test_a_busy_signal_holds_back_its_dependants_for_a_moment(engine, fleet, lands):
    expected = undisturbed(engine, fleet, NIGHT)
    uid = fleet[0].signal_uid
    alone = [c for c in fleet if c.signal_uid == uid][:1]
    then = (lambda: run(engine, alone, NIGHT, registered=True)) if lands else (lambda: None)
    report = run(engine, fleet, NIGHT, registered=True, executor=BesideRival(Rival(engine, f"scope = '{uid}'", then)))
    assert (report.exit_code, report.status) == (0, "landed")
    assert set(statuses(report).values()) <= {"landed", "up_to_date"}
    assert set(statuses(report, "signal").values()) <= {"landed", "up_to_date"}
    assert report.failures() == []
    with engine.connect() as connection:
        assert ledger.unfinished(connection, report.run_uid) == []
    assert factories.dump(engine) == expected


def test_patience_ends(engine, fleet, monkeypatch):
    monkeypatch.setattr(driver, "BUSY_SECONDS_MAX", 0.2)
    rival = Rival(engine, "scope = 'p4'", patience=10_000)
    report = run(engine, fleet, NIGHT, registered=True, executor=BesideRival(rival))
    assert statuses(report) == {f"p{i}": "busy" if i == 4 else "landed" for i in range(10)}
    assert (report.status, report.exit_code) == ("partial", 3)
    with engine.connect() as connection:
        assert ledger.unfinished(connection, report.run_uid) == [("portfolio", "p4")]
    rival.connection.close()
    assert statuses(run(engine, fleet, NIGHT, registered=True))["p4"] == "landed"


@pytest.mark.parametrize("seed", range(10))
def test_whatever_happens_the_rows_are_the_same(engine, fleet, seed):
    """Random completion order, batches lost before and after they ran, a rival in between; then reruns until all has landed."""
    expected = undisturbed(engine, fleet, LATER)
    dice = random.Random(seed)
    rival = Rival(engine, f"scope = 'p{seed}'", patience=1 + seed % 3)

    def fault(number: int, payload: dict) -> str | None:
        rival.tick()
        return dice.choices([None, "lost before", "lost after"], [6, 1, 1])[0]

    for night in (NIGHT, LATER, LATER, LATER):
        executor = FakeExecutor(slots=1 + seed % 4, seed=seed, fault=fault)
        report = run(engine, fleet, night, registered=True, executor=executor, batch_size=1 + seed % 5)
        assert len([r for r in report.results if r.kind == "portfolio"]) == 10  # every node is accounted for, once
        assert executor.queue == []
    assert run(engine, fleet, LATER, registered=True).exit_code == 0
    assert factories.dump(engine) == expected
    rows = factories.progress(engine)
    assert all(row["row_count"] == len(factories.values(engine, name)) for (s, name), row in rows.items() if s == "PortfoliosTS")


# -- order ------------------------------------------------------------------------------------------------------------------------


def test_a_portfolio_waits_for_its_own_signal_and_for_no_other(engine, fleet):
    executor = FakeExecutor(slots=1, seed=1)
    run(engine, fleet, NIGHT, registered=True, executor=executor, batch_size=1)
    place = {entry: i for i, entry in enumerate(executor.log)}
    assert all(place["submit", c.identifier] > place["done", c.signal_uid] for c in fleet)
    last_signal = max(place["done", c.signal_uid] for c in fleet)
    assert any(place["submit", c.identifier] < last_signal for c in fleet)  # no barrier between signals and portfolios


@pytest.mark.parametrize(
    "garble",
    [lambda rs: rs[1:], lambda rs: [*rs, rs[0]], lambda rs: [replace(rs[0], identifier="stranger"), *rs[1:]]],
    ids=["too few", "one twice", "a stranger"],
)
def test_an_answer_about_other_nodes_than_those_asked_for_is_none(engine, fleet, garble):
    """The batch counts as lost: its halves are tried, and single nodes are answered for."""
    run(engine, fleet, NIGHT, registered=True)
    expected = factories.dump(engine)
    wipe(engine)

    class Garbling(LocalExecutor):
        def wait(self) -> tuple[int, Outcome]:
            ticket, outcome = super().wait()
            return ticket, garble(outcome) if isinstance(outcome, list) and len(outcome) > 1 else outcome

    report = run(engine, fleet, NIGHT, registered=True, executor=Garbling())
    assert report.exit_code == 0
    assert {r.identifier for r in report.results if r.kind == "portfolio"} == {c.identifier for c in fleet}
    assert factories.dump(engine) == expected


def test_batches_are_bounded_in_number_and_size(engine, fleet, monkeypatch):
    executor = FakeExecutor(slots=2)
    run(engine, fleet, NIGHT, registered=True, executor=executor, batch_size=3)
    assert executor.most <= 4  # two per slot
    assert max(len(batch) for batch in executor.submitted) <= 3
    wipe(engine)
    monkeypatch.setattr(flight, "BATCH_CELLS_MAX", 1)
    executor = FakeExecutor(slots=3)
    run(engine, fleet, NIGHT, registered=True, executor=executor)
    assert {len(batch) for batch in executor.submitted} == {1}
    assert sorted(i for batch in executor.submitted for i in batch if i.startswith("p") and len(i) == 2) == sorted(
        c.identifier for c in fleet
    )


def test_batches_go_in_the_order_of_their_keys(engine, fleet):
    """Rows then land at the right end of a primary key: 1.5 times as fast as from its end to its beginning."""
    executor = FakeExecutor(slots=1)
    run(engine, fleet, NIGHT, registered=True, executor=executor, batch_size=1)
    signals = {c.signal_uid for c in fleet}
    assert [i for batch in executor.submitted for i in batch if i in signals] == sorted(signals)
    assert len(signals) > 2


def test_a_payload_is_plain_data_without_an_address(engine, fleet, monkeypatch):
    seen = []
    monkeypatch.setattr(executors, "run_batch", lambda payload: seen.append(payload) or run_batch(payload))
    run(engine, fleet, NIGHT, registered=True, executor=LocalExecutor())
    assert seen
    for payload in seen:
        assert set(json.loads(payload)) == {"kind", "nodes", "as_of", "run_uid", "snapshot", "code_version"}
        for secret in (str(engine.url.host), str(engine.url.database), "postgres"):
            assert secret not in payload


# -- one state of the world -------------------------------------------------------------------------------------------------------


def test_a_run_sees_one_state_of_the_prices(engine, fleet):
    """Corrected, deleted and added bars in the middle of a run are not seen by its later batches, but by the next run."""
    expected = undisturbed(engine, fleet, LATER)
    changed = []

    class Meddling(LocalExecutor):
        def wait(self) -> tuple[int, Outcome]:
            answer = super().wait()
            if not changed:
                changed.append(True)
                sql(engine, "UPDATE msm__external_prices SET close = close * 2 WHERE time_index BETWEEN '2024-01-08' AND '2024-01-11'")
                sql(engine, "DELETE FROM msm__external_prices WHERE time_index > '2024-01-25'")
                sql(engine, "DELETE FROM msm__calendar_session WHERE local_date = '2024-01-17'")
                factories.register_assets(engine, ["new"])
            return answer

    report = run(engine, fleet, LATER, registered=True, executor=Meddling(), batch_size=1)
    assert changed
    assert report.exit_code == 0, messages(report)
    assert factories.dump(engine) == expected
    run(engine, fleet, LATER, registered=True, full_refresh=True)
    assert pd.Timestamp("2024-01-17 21:00Z") not in factories.values(engine, "p0").index
    assert factories.values(engine, "p0").index.max() == pd.Timestamp("2024-01-24 21:00Z")


def test_the_snapshot_outlives_the_idle_timeout(engine, fleet, monkeypatch):
    monkeypatch.setattr(database, "IDLE_TIMEOUT", "100ms")

    class Slow(LocalExecutor):
        def wait(self) -> tuple[int, Outcome]:
            sql(engine, "SELECT pg_sleep(0.3)")
            return super().wait()

    assert run(engine, fleet, NIGHT, registered=True, executor=Slow()).exit_code == 0


# -- the report and the ledger ----------------------------------------------------------------------------------------------------


def report_of(*portfolios: str, signals: tuple[str, ...] = ()) -> RunReport:
    results = [NodeResult("portfolio", str(i), status) for i, status in enumerate(portfolios)]  # type: ignore[arg-type]
    results += [NodeResult("signal", str(i), status) for i, status in enumerate(signals)]  # type: ignore[arg-type]
    return RunReport(uuid.uuid4(), datetime(2024, 1, 1, tzinfo=UTC), tuple(results), 1.0)


# Exit codes of design.md section 11: 0 all landed, 3 partial (some quarantined, the rest landed), 4 nothing landed
ENDS = [
    (report_of(), "landed", 0),
    (report_of("landed", "landed"), "landed", 0),
    (report_of("landed", "up_to_date", signals=("landed",)), "landed", 0),
    (report_of("up_to_date"), "landed", 0),
    (report_of("landed", "failed"), "partial", 3),
    (report_of("up_to_date", "skipped", signals=("failed",)), "partial", 3),
    (report_of("landed", "busy"), "partial", 3),
    (report_of("landed", signals=("failed",)), "partial", 3),
    (report_of("failed"), "failed", 4),
    (report_of("skipped", "skipped", signals=("failed",)), "failed", 4),
    (report_of("busy"), "failed", 4),
    (report_of(signals=("failed",)), "failed", 4),
]


@pytest.mark.parametrize(("report", "status", "code"), ENDS)
def test_how_a_run_ends(report, status, code):
    assert (report.status, report.exit_code) == (status, code)
    assert report.summary()["status"] == status
    assert json.loads(json.dumps(report.document()))["nodes"] == [json.loads(json.dumps(vars(r))) for r in report.results]


def test_the_ledger_tells_what_happened_to_every_node(engine, fleet):
    with broken_storage(engine, "msm__signal_weights", "signal_uid", fleet[2].signal_uid):
        report = run(engine, fleet, NIGHT, registered=True, batch_size=4, arguments={"select": "all"})
    ((as_of, status, arguments, finished, retry_of, submitter, summary),) = sql(
        engine, "SELECT as_of, status, arguments, finished_at >= started_at, retry_of, submitter, summary FROM msm__run"
    )
    assert (as_of, status, arguments, finished, retry_of) == (instant(NIGHT), "partial", {"select": "all"}, True, None)
    assert "@" in submitter
    assert (summary["landed"], summary["skipped"], summary["signals"]["failed"]) == (7, 3, 1)
    rows = ledger_rows(engine, report.run_uid)
    assert {i: row["status"] for i, row in rows.items()} == statuses(report) | statuses(report, "signal")
    assert {row["reason"] for row in rows.values()} == {"new"}
    assert (rows["p0"]["kind"], rows["p0"]["error"], rows["p0"]["watermark"]) == ("portfolio", None, pd.Timestamp("2024-01-19 21:00Z"))
    progress = factories.progress(engine)
    assert rows["p0"]["node_uid"] == progress["PortfoliosTS", "p0"]["uid"]
    assert progress["PortfoliosTS", "p0"]["run_uid"] == report.run_uid
    written = len(factories.values(engine, "p0")) + len(factories.weights(engine, "p0"))
    assert rows["p0"]["row_count"] == written
    assert report.rows_written == sum(count for count, _ in factories.dump(engine).values())
    assert set(rows["p2"]["error"]) == {"reason", "message"}


def test_progress_is_told_as_it_is_made(engine, fleet):
    told: list[NodeResult] = []

    class Listener(driver.Observer):
        def landed(self, results) -> None:
            told.extend(results)

    report = driver.run_fleet(engine, fleet, FakeExecutor(seed=3), instant(NIGHT), driver.Options(batch_size=2), Listener())
    assert sorted((r.kind, r.identifier) for r in told) == sorted((r.kind, r.identifier) for r in report.results)
    seconds = [r.seconds for r in report.results]
    assert min(seconds) > 0
    assert sum(seconds) <= report.seconds


@pytest.mark.parametrize(("error", "status"), [(KeyboardInterrupt, "cancelled"), (RuntimeError, "failed")])
def test_whatever_ends_a_run_its_row_says_so(engine, fleet, error, status):
    class Dying(LocalExecutor):
        def wait(self) -> tuple[int, Outcome]:
            answer = super().wait()
            if answer[1][0].kind == "portfolio":  # type: ignore[index]
                raise error
            return answer

    with pytest.raises(error):
        run(engine, fleet, NIGHT, registered=True, executor=Dying(), batch_size=4)
    assert sql(engine, "SELECT status, finished_at IS NOT NULL FROM msm__run") == [(status, True)]
    report = run(engine, fleet, NIGHT, registered=True)  # what landed stays, the rest follows
    assert report.exit_code == 0
    assert report.counts()["up_to_date"] == 4
    assert report.counts()["landed"] == 6


def test_an_unprepared_database_is_refused_before_the_ledger(engine, fleet):
    sql(engine, "DROP TABLE msm__portfolio_weights")
    with pytest.raises(StorageNotPrepared, match="msm__portfolio_weights"):
        run(engine, fleet, NIGHT, registered=True)
    assert sql(engine, "SELECT count(*) FROM msm__run") == [(0,)]


def test_nothing_to_run(engine):
    report = driver.run_fleet(engine, [], LocalExecutor(), instant(NIGHT))
    assert (report.exit_code, report.results) == (0, ())


def test_a_selected_signal_is_computed_for_nobody(engine, fleet):
    run(engine, fleet[2:3], "2024-01-10", registered=True)
    uid = fleet[2].signal_uid
    sql(engine, "DELETE FROM msm__external_prices WHERE time_index > '2024-01-10'")  # its portfolios cannot move
    report = run(engine, fleet[2:3], LATER, registered=True, signals_selected=[uid])
    assert statuses(report) == {"p2": "up_to_date"}
    assert statuses(report, "signal") == {uid: "landed"}


# -- retries ----------------------------------------------------------------------------------------------------------------------


def retry(engine: Engine, fleet: list[PortfolioConfiguration], run_: str | None = None) -> RunReport:
    """What `msm-ray retry` does: exactly what is unfinished, at the as-of of the first run."""
    with engine.connect() as connection:
        root, as_of = ledger.find_run(connection, run_)
        todo = set(ledger.unfinished(connection, root))
    chosen = [c for c in fleet if ("portfolio", c.identifier) in todo]
    return run(engine, chosen, as_of, registered=True, retry_of=root, signals_selected={uid for kind, uid in todo if kind == "signal"})


def unfinished(engine: Engine, root: uuid.UUID) -> set[str]:
    with engine.connect() as connection:
        return {identifier for _, identifier in ledger.unfinished(connection, root)}


def test_retries_add_up(engine, fleet):
    """Three repairs in three retries: each reruns what is still open of the whole chain, at the first run's as-of, and no more."""
    expected = undisturbed(engine, fleet, NIGHT)
    uid = fleet[0].signal_uid
    with broken_storage(engine, "msm__portfolios", "portfolio_identifier", "p2", "p4", "p5"):
        sql(engine, f"ALTER TABLE msm__signal_weights ADD CONSTRAINT more CHECK (signal_uid <> '{uid}')")
        first = run(engine, fleet, NIGHT, registered=True)
        root = first.run_uid
        assert unfinished(engine, root) == {uid, "p0", "p3", "p6", "p9", "p2", "p4", "p5"}
        sql(engine, "ALTER TABLE msm__signal_weights DROP CONSTRAINT more")
        second = retry(engine, fleet)
        assert statuses(second) == {
            "p0": "landed",
            "p3": "landed",
            "p6": "landed",
            "p9": "landed",
            "p2": "failed",
            "p4": "failed",
            "p5": "failed",
        }
        assert unfinished(engine, root) == {"p2", "p4", "p5"}
        sql(engine, "ALTER TABLE msm__portfolios DROP CONSTRAINT broken")
        sql(engine, "ALTER TABLE msm__portfolios ADD CONSTRAINT broken CHECK (portfolio_identifier NOT IN ('p5'))")
        third = retry(engine, fleet, str(second.run_uid)[:13])  # a retry of a retry belongs to the first run
        assert statuses(third) == {"p2": "landed", "p4": "landed", "p5": "failed"}
        assert unfinished(engine, root) == {"p5"}
    fourth = retry(engine, fleet, str(root))
    assert statuses(fourth) == {"p5": "landed"}
    assert unfinished(engine, root) == set()
    assert {r.as_of for r in (first, second, third, fourth)} == {instant(NIGHT)}
    assert sql(engine, "SELECT count(*) FROM msm__run WHERE retry_of = %s", (root,)) == [(3,)]
    assert factories.dump(engine) == expected


def test_the_run_to_retry_is_the_newest_with_something_open(engine, fleet):
    def found(run_: str | None = None) -> uuid.UUID:
        with engine.connect() as connection:
            return ledger.find_run(connection, run_)[0]

    with pytest.raises(RunNotFound, match="with anything to retry"):
        found()
    with pytest.raises(RunNotFound, match="no-such-run"):
        found("no-such-run")
    with broken_storage(engine, "msm__portfolios", "portfolio_identifier", "p2"):
        older = run(engine, fleet[2:3], "2024-01-10", registered=True)
        newer = run(engine, fleet[1:3], NIGHT, registered=True)
    healthy = run(engine, fleet[4:5], NIGHT, registered=True)
    assert found() == newer.run_uid
    assert found(str(healthy.run_uid)) == healthy.run_uid
    assert retry(engine, fleet, str(newer.run_uid)).exit_code == 0
    assert found() == older.run_uid  # the newer one has nothing open any more
    assert retry(engine, fleet).exit_code == 0
    with pytest.raises(RunNotFound, match="with anything to retry"):
        found()


def test_the_last_result_of_each_portfolio(engine, fleet):
    with broken_storage(engine, "msm__portfolios", "portfolio_identifier", "p2", "p3"):
        run(engine, fleet[:4], NIGHT, registered=True)
    run(engine, fleet[:3], NIGHT, registered=True)
    with engine.connect() as connection:
        results = ledger.last_results(connection)
        assert {i: r["status"] for i, r in results.items()} == {"p0": "up_to_date", "p1": "up_to_date", "p2": "landed", "p3": "failed"}
        assert results["p3"]["error"]["message"]
        assert results["p0"]["watermark"].astimezone(UTC) == instant("2024-01-19 21:00")
        assert ledger.failed_portfolios(connection) == {"p3"}
        runs = ledger.recent_runs(connection, 1)
    assert (len(runs), runs[0]["status"], runs[0]["summary"]["landed"]) == (1, "landed", 1)


def test_a_night_that_fails_says_so(engine, fleet):
    with broken_storage(engine, "msm__signal_weights", "signal_uid", *{c.signal_uid for c in fleet}):
        report = run(engine, fleet, NIGHT, registered=True)
    assert (report.status, report.exit_code) == ("failed", 4)
    assert sql(engine, "SELECT status FROM msm__run") == [("failed",)]
    assert retry(engine, fleet).exit_code == 0


def test_workers_have_their_first_batch_before_what_needs_no_work_is_recorded(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    closes = factories.open_market(engine, factories.walks("2024-01-02", 5, "AB"))
    old, new = portfolio("old", fixed(A=1.0)), portfolio("new", fixed(B=1.0))
    run(engine, [old], closes.index[-1])
    order: list[str] = []

    class Noting(LocalExecutor):
        def submit(self, ticket: int, kind: str, payload: str) -> None:
            order.append(f"submitted {kind}")
            super().submit(ticket, kind, payload)

    record = ledger.record

    def noted(engine: Engine, run_uid: uuid.UUID, results: Any, reasons: Any) -> None:
        order.extend(f"recorded {r.identifier}" for r in results if r.kind == "portfolio")
        record(engine, run_uid, results, reasons)

    monkeypatch.setattr(ledger, "record", noted)
    run(engine, [old, new], closes.index[-1], executor=Noting())
    assert order == ["submitted signal", "recorded old", "submitted portfolio", "recorded new"]
