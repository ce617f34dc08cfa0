"""The write protocol, with two real connections: whatever comes between, a batch lands whole, once, and from what it claimed."""

import functools
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pandas as pd
import psycopg
import pytest
from sqlalchemy import Connection, Engine, exc

from msm_core import storage
from msm_core.configuration import PortfolioConfiguration
from msm_core.copying import Text
from msm_core.data_nodes import base
from msm_core.data_nodes.base import Batch, NodeResult, update_batch
from msm_core.data_nodes.construction import PortfolioKind
from msm_core.data_nodes.signals import SignalKind
from msm_core.database import retrying, transaction
from msm_core.errors import ProgressConflict
from msm_core.models import PortfoliosStorage, PortfolioWeightsStorage
from msm_ray import run as driver
from tests import factories

scheduled = factories.scheduled

ASSETS = [f"a{i}" for i in range(9)]
FIRST, SECOND = "2024-01-12", "2024-01-24"  # two nights


@pytest.fixture
def fleet(engine: Engine) -> list[PortfolioConfiguration]:
    """Eight portfolios that all trade from the first day on, over random prices of 20 sessions from 2024-01-02."""
    factories.open_market(engine, factories.walks("2024-01-02", 20, ASSETS))
    configurations = [
        factories.portfolio(f"p{i}", factories.equal(*ASSETS[: 2 + i]), accounting="target" if i % 2 else "drifted", lag=i % 3)
        for i in range(8)
    ]
    factories.register(engine, configurations)
    return configurations


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Retries and second questions come at once."""
    monkeypatch.setattr(base, "retrying", lambda: retrying().copy(sleep=lambda seconds: None))
    monkeypatch.setattr(driver, "BUSY_PAUSE_SECONDS", 0.02)


def prepared(engine: Engine, fleet: list[PortfolioConfiguration], as_of: str, **options: Any) -> Batch[Any]:
    """The portfolios of a plan as one batch, their signals already brought up to date."""
    plan = factories.plan(engine, fleet, as_of, **options)
    if signals := tuple(p.node for p in plan.signals if p.node):
        update_batch(engine, Batch(SignalKind(), signals, plan.as_of))
    return Batch(PortfolioKind(), tuple(p.node for p in plan.portfolios if p.node), plan.as_of)


def statuses(results: list[NodeResult]) -> dict[str, str]:
    return {r.identifier: r.status for r in results}


def outputs(engine: Engine) -> dict[str, Any]:
    """Everything that a portfolio batch may write: rows, progress and pointers, with the transactions that wrote them."""
    return factories.versions(engine, (*factories.OUTPUTS, factories.PROGRESS, "msm__portfolio"))


_references: dict[tuple[tuple[str, ...], tuple[str, ...]], dict[str, Any]] = {}


def reference(engine: Engine, fleet: list[PortfolioConfiguration], *nights: str) -> dict[str, Any]:
    """The digest of an undisturbed run, made once per session; afterwards nothing of it is left in the database."""
    key = (tuple(c.identifier for c in fleet), nights)
    if key not in _references:
        _references[key] = _undisturbed(engine, fleet, *nights)
    return _references[key]


def _undisturbed(engine: Engine, fleet: list[PortfolioConfiguration], *nights: str) -> dict[str, Any]:
    for night in nights:
        assert factories.run(engine, fleet, night, registered=True).exit_code == 0
    digest = factories.dump(engine)
    factories.sql(engine, f"TRUNCATE {', '.join(factories.OUTPUTS)}")
    factories.sql(engine, "UPDATE msm__data_node_update SET watermark = NULL, epoch = 0, row_count = 0, code_version = NULL")
    return digest


@pytest.fixture
def injected(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """`injected(module, name, before=..., after=...)` calls the test's function beside the real one, with the number of the call."""

    def install(module: Any, name: str, before: Callable[[int, Any], None] | None = None, after: Callable[[int, Any], None] | None = None):
        real, calls = getattr(module, name), [0]

        def around(*args: Any, **options: Any) -> Any:
            calls[0] += 1
            number = calls[0]
            if before:
                before(number, args)
            result = real(*args, **options)
            if after:
                after(number, args)
            return result

        monkeypatch.setattr(module, name, around)
        return calls

    return install


# -- compare and set --------------------------------------------------------------------------------------------------------------


def advance(scope: storage.Scope, before: storage.Progress, epoch: int, block: dict | None, replace: bool = False) -> storage.Advance:
    watermark = factories.instant("2024-02-01")
    return storage.Advance(scope, epoch, watermark, before.row_count + 1, "hash", "1", "digest", block, replace)


@pytest.mark.parametrize("replace", [False, True])
def test_one_stale_epoch_undoes_the_whole_commit(engine, fleet, replace):
    factories.run(engine, fleet, FIRST, registered=True)
    scopes = [storage.Scope(PortfoliosStorage, name) for name in ("p0", "p1", "p2")]
    with engine.connect() as connection:
        progress = storage.read_progress(connection, [s.uid for s in scopes])
    before = outputs(engine)

    def block(name: str) -> dict[str, Any]:
        times = pd.DatetimeIndex(["2024-02-01"]).to_numpy().astype("datetime64[us]")
        one = {column: pd.Series([1.0]).to_numpy() for column in ("close", "return", "calculated_close")}
        return {"portfolio_identifier": Text.constant(name, 1), "time_index": times, **one, "close_time": times}

    advances = [
        advance(scope, progress[scope.uid], progress[scope.uid].epoch - (scope.value == "p1"), block(scope.value), replace)
        for scope in scopes
    ]
    with pytest.raises(ProgressConflict, match="progress of 1 node"), transaction(engine) as connection:
        storage.commit_advances(connection, advances, None)
    assert outputs(engine) == before
    # with the right epochs the same commit lands
    with transaction(engine) as connection:
        storage.commit_advances(connection, [advance(s, progress[s.uid], progress[s.uid].epoch, block(s.value)) for s in scopes], None)
    assert {factories.progress(engine)["PortfoliosTS", s.value]["epoch"] for s in scopes} == {progress[s.uid].epoch + 1 for s in scopes}


def test_an_epoch_that_moves_between_claim_and_commit(engine, fleet, injected):
    """The unit is computed again from the new state: it lands once, equal to an undisturbed run."""
    expected = reference(engine, fleet, FIRST)

    def move(number: int, args: Any) -> None:
        if number <= 2:  # in the claiming transaction itself, so that the row lock does not forbid it
            args[0].exec_driver_sql("UPDATE msm__data_node_update SET epoch = epoch + 1 WHERE scope = 'p1'")

    batch = prepared(engine, fleet, FIRST)
    calls = injected(base, "claim", after=move)
    assert set(statuses(update_batch(engine, batch)).values()) == {"landed"}
    assert calls == [3]
    assert factories.dump(engine) == expected
    assert factories.progress(engine)["PortfoliosTS", "p1"]["epoch"] == 1


def test_an_epoch_that_always_moves_ends_with_nothing_written(engine, fleet, injected):
    batch = prepared(engine, fleet, FIRST)
    before = outputs(engine)
    move = "UPDATE msm__data_node_update SET epoch = epoch + 1 WHERE scope = 'p1'"
    injected(base, "claim", after=lambda number, args: args[0].exec_driver_sql(move))
    with pytest.raises(ProgressConflict):
        update_batch(engine, batch)
    assert outputs(engine) == before


def test_a_slow_driver_with_an_old_plan_is_rejected(engine, fleet):
    """The lesson: a driver that holds an old price must not overwrite what was restated meanwhile."""
    factories.run(engine, fleet, FIRST, registered=True)
    slow = prepared(engine, fleet, SECOND, full_refresh=True)
    prices = factories.walks("2024-01-02", 20, ASSETS).iloc[4:5] * 1.01
    factories.load_prices(engine, prices)  # a correction
    factories.run(engine, fleet, SECOND, registered=True, full_refresh=True)
    before = outputs(engine)
    slow_with_old_prices = Batch(slow.kind, slow.nodes, slow.as_of)
    assert set(statuses(update_batch(engine, slow_with_old_prices)).values()) == {"busy"}
    assert outputs(engine) == before


def test_a_slow_increment_is_rejected(engine, fleet):
    factories.run(engine, fleet, FIRST, registered=True)
    slow = prepared(engine, fleet, SECOND)
    factories.run(engine, fleet, SECOND, registered=True)
    before = outputs(engine)
    assert set(statuses(update_batch(engine, slow)).values()) == {"busy"}
    assert outputs(engine) == before


# -- claim ------------------------------------------------------------------------------------------------------------------------


@contextmanager
def held(engine: Engine, where: str) -> Iterator[None]:
    """Progress rows that a rival's transaction holds."""
    with factories.rival(engine) as rival:
        rival.execute(f"SELECT uid FROM msm__data_node_update WHERE {where} FOR UPDATE")  # type: ignore[arg-type]
        yield


@pytest.mark.parametrize("where", ["scope = 'p3'", "scope = 'p3' AND storage = 'PortfolioWeightsTS'"], ids=["all", "weights only"])
def test_a_node_that_a_rival_holds_is_busy_and_the_rest_lands(engine, fleet, where):
    batch = prepared(engine, fleet, FIRST)
    with held(engine, where):
        started = time.monotonic()
        results = update_batch(engine, batch)
        assert time.monotonic() - started < 5  # it does not wait
    assert statuses(results) == {f"p{i}": "busy" if i == 3 else "landed" for i in range(8)}
    assert factories.values(engine, "p3").empty
    assert factories.weights(engine, "p3").empty
    assert statuses(update_batch(engine, prepared(engine, fleet, FIRST))) == {"p3": "landed"}


def test_a_signal_that_a_rival_holds_is_busy(engine, fleet):
    plan = factories.plan(engine, fleet, FIRST)
    nodes = tuple(p.node for p in plan.signals if p.node)
    with held(engine, f"scope = '{nodes[0].identifier}'"):
        results = statuses(update_batch(engine, Batch(SignalKind(), nodes, plan.as_of)))
    assert [uid for uid, status in results.items() if status == "busy"] == [nodes[0].identifier]
    assert list(results.values()).count("landed") == len(nodes) - 1


def test_a_node_without_a_progress_row_is_never_written(engine, fleet):
    """No row, no claim: whoever is not registered cannot be fenced."""
    batch = prepared(engine, fleet, FIRST)
    factories.sql(engine, "DELETE FROM msm__data_node_update WHERE scope = 'p2'")
    assert statuses(update_batch(engine, batch))["p2"] == "busy"
    assert factories.values(engine, "p2").empty


# -- transient errors ---------------------------------------------------------------------------------------------------------------


def raise_once(error: BaseException) -> Callable[[int, Any], None]:
    def check(number: int, args: Any) -> None:
        if number == 1:
            raise error

    return check


def kill_backend_once(number: int, args: Any) -> None:
    """The connection is cut by the server, as in a restart."""
    if number == 1:
        pid = args[0].exec_driver_sql("SELECT pg_backend_pid()").scalar_one()
        factories.sql(args[0].engine, "SELECT pg_terminate_backend(%s)", (pid,))


SERIALIZATION = psycopg.errors.SerializationFailure("could not serialize access due to concurrent update")
PLACES: dict[str, tuple[Any, str, str, Callable[[int, Any], None]]] = {
    "claim": (base, "claim", "before", raise_once(SERIALIZATION)),
    "claim, wrapped by SQLAlchemy": (base, "claim", "before", raise_once(exc.OperationalError("claim", {}, SERIALIZATION))),
    "deadlock after the first COPY": (storage, "copy_in", "after", raise_once(psycopg.errors.DeadlockDetected("x"))),
    "lock timeout at progress": (storage, "_move_progress", "before", raise_once(psycopg.errors.LockNotAvailable("x"))),
    "backend killed after the claim": (base, "claim", "after", kill_backend_once),
    "backend killed after the first COPY": (storage, "copy_in", "after", kill_backend_once),
    "backend killed after progress": (storage, "_move_progress", "after", kill_backend_once),
}


@pytest.mark.parametrize(("module", "name", "when", "fault"), PLACES.values(), ids=PLACES)
def test_the_unit_is_repeated_after_a_transient_error(engine, fleet, injected, module, name, when, fault):
    expected = reference(engine, fleet, FIRST)
    batch = prepared(engine, fleet, FIRST)
    injected(module, name, **{when: fault})
    assert set(statuses(update_batch(engine, batch)).values()) == {"landed"}
    assert factories.dump(engine) == expected
    assert {row["epoch"] for row in factories.progress(engine).values() if row["storage"] == "PortfoliosTS"} == {1}


@pytest.mark.parametrize("fault", [raise_once(SERIALIZATION), kill_backend_once], ids=["serialization", "backend killed"])
def test_reading_what_others_own_is_repeated_too(engine, fleet, injected, fault):
    """The whole unit, its first transaction included (design.md section 7)."""
    batch = prepared(engine, fleet, FIRST)

    class Kind(PortfolioKind):
        def read_outside(self, connection: Connection, *rest: Any) -> Any:
            reads[0] += 1
            fault(reads[0], (connection,))
            return super().read_outside(connection, *rest)

    reads = [0]
    results = update_batch(engine, Batch(Kind(), batch.nodes, batch.as_of))
    assert set(statuses(results).values()) == {"landed"}
    assert reads == [2]


def test_an_error_that_repeating_cannot_help_is_not_repeated(engine, fleet, injected):
    batch = prepared(engine, fleet, FIRST)
    calls = injected(base, "claim", before=lambda number, args: (_ for _ in ()).throw(psycopg.errors.InsufficientPrivilege("x")))
    with pytest.raises(psycopg.errors.InsufficientPrivilege):
        update_batch(engine, batch)
    assert calls == [1]


@pytest.mark.parametrize("kind", ["portfolio", "signal"])
def test_a_commit_whose_answer_is_lost(engine, fleet, monkeypatch, kind):
    """It landed, and nobody knows: asked again, the epoch tells, and nothing is written twice."""
    expected = reference(engine, fleet, FIRST)
    batch = prepared(engine, fleet, FIRST)
    if kind == "signal":
        factories.sql(engine, "TRUNCATE msm__signal_weights")
        factories.sql(engine, "UPDATE msm__data_node_update SET watermark = NULL, epoch = 0, row_count = 0")
        plan = factories.plan(engine, fleet, FIRST)
        batch = Batch(SignalKind(), tuple(p.node for p in plan.signals if p.node), plan.as_of)
    real, lost = base.transaction, []

    @contextmanager
    def cut(engine: Engine, **options: Any) -> Iterator[Connection]:
        with real(engine, **options) as connection:
            yield connection
        if not options.get("read_only") and not lost:
            lost.append(True)
            raise psycopg.OperationalError("server closed the connection unexpectedly")

    monkeypatch.setattr(base, "transaction", cut)
    update_batch(engine, batch)
    assert lost
    report = factories.run(engine, fleet, FIRST, registered=True)
    assert report.exit_code == 0
    assert set(report.counts()) >= {"landed", "up_to_date"}
    assert factories.dump(engine) == expected
    assert {row["epoch"] for row in factories.progress(engine).values()} == {1}


# -- constraint errors --------------------------------------------------------------------------------------------------------------


def test_a_constraint_error_is_traced_to_its_culprit(engine, fleet):
    expected = reference(engine, [c for c in fleet if c.identifier != "p5"], FIRST)
    factories.sql(engine, "ALTER TABLE msm__portfolios ADD CONSTRAINT not_p5 CHECK (portfolio_identifier <> 'p5')")
    report = factories.run(engine, fleet, FIRST, registered=True)
    assert factories.statuses(report) == {f"p{i}": "failed" if i == 5 else "landed" for i in range(8)}
    assert "not_p5" in factories.messages(report)["p5"]
    assert factories.weights(engine, "p5").empty  # what belongs together stays together
    assert factories.progress(engine)["PortfolioWeightsTS", "p5"]["epoch"] == 0
    unused = [c.signal_uid for c in fleet if c.identifier == "p5"]
    factories.sql(engine, "DELETE FROM msm__signal_weights WHERE signal_uid = ANY(%s)", (unused,))
    assert factories.dump(engine) == expected


def test_several_culprits_and_a_count_of_attempts(engine, fleet, injected):
    factories.sql(engine, "ALTER TABLE msm__portfolio_weights ADD CONSTRAINT c CHECK (portfolio_identifier NOT IN ('p0', 'p7'))")
    batch = prepared(engine, fleet, FIRST)
    calls = injected(base, "_attempt")
    assert statuses(update_batch(engine, batch)) == {f"p{i}": "failed" if i in (0, 7) else "landed" for i in range(8)}
    # 8; 4 4; 2 2 2 2; 1 1 . . 1 1 -> 1 + 2 + 4 + 4: halves that hold a culprit are halved again, the others land at once
    assert calls == [11]


def test_rows_above_a_watermark_that_should_not_exist(engine, fleet):
    """Somebody wrote by hand: that portfolio fails by name, and nobody's rows are overwritten."""
    factories.sql(
        engine,
        'INSERT INTO msm__portfolios (portfolio_identifier, time_index, close, "return", calculated_close, close_time)'
        " VALUES ('p4', '2024-01-09 21:00Z', 42, 0, 42, '2024-01-09 21:00Z')",
    )
    report = factories.run(engine, fleet, FIRST, registered=True)
    assert factories.statuses(report) == {f"p{i}": "failed" if i == 4 else "landed" for i in range(8)}
    assert "pk_msm__portfolios" in factories.messages(report)["p4"]
    assert factories.values(engine, "p4")["close"].tolist() == [42.0]


def test_a_node_that_cannot_be_computed_fails_alone(engine, fleet):
    factories.sql(
        engine, "UPDATE msm__external_prices SET close = 'NaN' WHERE asset_identifier = 'a8' AND time_index = '2024-01-10 21:00Z'"
    )
    report = factories.run(engine, fleet, FIRST, registered=True)
    assert factories.statuses(report) == {f"p{i}": "failed" if i == 7 else "landed" for i in range(8)}  # a8 is p7's only
    message = factories.messages(report)["p7"]
    assert "a8" in message
    assert "2024-01-10 21:00Z" in message
    assert "nan" in message


# -- all or nothing -----------------------------------------------------------------------------------------------------------------


class Killed(BaseException):
    """Nobody's except clause may catch it."""


CRASHES: dict[str, tuple[Any, str, str, int]] = {
    "after the claim": (base, "claim", "after", 1),
    "before the first COPY": (storage, "copy_in", "before", 1),
    "between values and weights": (storage, "copy_in", "after", 1),
    "after both COPYs": (storage, "copy_in", "after", 2),
    "before progress": (storage, "_move_progress", "before", 1),
    "after progress": (storage, "_move_progress", "after", 1),
}


@pytest.mark.parametrize(("module", "name", "when", "count"), CRASHES.values(), ids=CRASHES)
@pytest.mark.parametrize("replace", [False, True], ids=["append", "replace"])
def test_a_crash_leaves_nothing_of_the_batch(engine, fleet, monkeypatch, injected, module, name, when, count, replace):
    expected = reference(engine, fleet, FIRST, SECOND)
    factories.run(engine, fleet, FIRST, registered=True)
    batch = prepared(engine, fleet, SECOND, full_refresh=replace)
    before = outputs(engine)

    def crash(number: int, args: Any) -> None:
        if number == count:
            raise Killed

    injected(module, name, **{when: crash})
    with pytest.raises(Killed):
        update_batch(engine, batch)
    assert outputs(engine) == before
    monkeypatch.undo()
    monkeypatch.setenv("MSM_DATABASE_URL", engine.url.set(drivername="postgresql").render_as_string(hide_password=False))
    factories.run(engine, fleet, SECOND, registered=True, full_refresh=replace)
    assert factories.dump(engine) == expected


def test_a_crash_in_the_last_step_takes_the_rows_along(engine, fleet):
    class Kind(PortfolioKind):
        def finish(self, *args: Any) -> None:
            super().finish(*args)
            raise Killed

    batch = prepared(engine, fleet, FIRST)
    before = outputs(engine)
    with pytest.raises(Killed):
        update_batch(engine, Batch(Kind(), batch.nodes, batch.as_of))
    assert outputs(engine) == before


def test_pointers_are_written_last(engine, fleet):  # R86
    batch = prepared(engine, fleet, FIRST)
    with factories.statements() as sent:
        update_batch(engine, batch)
    writes = [" ".join(s.split()[:2]) for s in sent if s.lstrip().startswith(("COPY", "UPDATE", "INSERT", "DELETE"))]
    assert writes == [
        'COPY "msm__portfolios"',
        'COPY "msm__portfolio_weights"',
        'UPDATE "msm__data_node_update"',
        'UPDATE "msm__portfolio"',
    ]


def test_a_replacement_is_atomic_for_readers(engine, fleet, injected):
    factories.run(engine, fleet, FIRST, registered=True)
    old = factories.dump(engine)
    factories.load_prices(engine, factories.walks("2024-01-02", 20, ASSETS, seed=99))
    seen = []
    look = lambda number, args: seen.append(factories.dump(engine))  # noqa: E731
    batch = prepared(engine, fleet, FIRST, full_refresh=True)
    old[factories.OUTPUTS[0]] = factories.dump(engine)[factories.OUTPUTS[0]]
    injected(storage, "_delete_scopes", after=look)
    injected(storage, "copy_in", after=look)
    injected(storage, "_move_progress", after=look)
    assert set(statuses(update_batch(engine, batch)).values()) == {"landed"}
    assert seen == [old] * 5  # two deletes, two COPYs, one progress
    new = factories.dump(engine)
    assert new != old
    assert [count for count, _ in new.values()] == [count for count, _ in old.values()]


# -- rivals -------------------------------------------------------------------------------------------------------------------------


def together(*tasks: Callable[[], Any]) -> list[Any]:
    """Results of all tasks, each in a thread of its own, started at the same moment."""
    barrier, found = threading.Barrier(len(tasks)), [None] * len(tasks)

    def work(place: int) -> None:
        barrier.wait()
        try:
            found[place] = tasks[place]()
        except BaseException as error:
            found[place] = error

    threads = [threading.Thread(target=work, args=(place,)) for place in range(len(tasks))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


@pytest.mark.parametrize("sizes", [(1, 1), (3, 2), (64, 64)])
def test_two_drivers_at_once_write_every_row_once(engine, fleet, sizes):  # R98, R99
    expected = reference(engine, fleet, FIRST, SECOND)
    for night in (FIRST, SECOND):
        tasks = [functools.partial(factories.run, engine, fleet, night, registered=True, batch_size=size) for size in sizes]
        reports = together(*tasks)
        assert [report.exit_code for report in reports] == [0, 0], reports
        for portfolio in {c.identifier for c in fleet}:
            assert sorted({factories.statuses(r)[portfolio] for r in reports}) in (["landed", "up_to_date"], ["landed"], ["up_to_date"])
    assert factories.dump(engine) == expected
    assert {row["epoch"] for (name, _), row in factories.progress(engine).items() if name == "PortfoliosTS"} == {2}


def test_a_nightly_run_and_a_manual_one_for_different_instants(engine, fleet):  # R99
    expected = reference(engine, fleet, SECOND)
    reports = together(*(lambda night=night: factories.run(engine, fleet, night, registered=True) for night in (FIRST, SECOND, FIRST)))
    assert [report.exit_code for report in reports] == [0, 0, 0], reports
    factories.run(engine, fleet, SECOND, registered=True)
    assert factories.dump(engine) == expected


def test_drivers_that_register_at_once(engine, fleet):
    again = [c for c in fleet for _ in range(1)]
    found = together(*(lambda: factories.register(engine, again) for _ in range(4)))
    assert found == [0, 0, 0, 0]


# -- lost state ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "loss",
    [
        "DELETE FROM msm__portfolios WHERE portfolio_identifier = 'p1' AND time_index = '2024-01-11 21:00Z'",
        "DELETE FROM msm__portfolios WHERE portfolio_identifier = 'p1'",
        "DELETE FROM msm__portfolio_weights WHERE portfolio_identifier = 'p1'",
    ],
    ids=["last value", "all values", "weights"],
)
def test_rows_that_do_not_reach_the_watermark(engine, fleet, loss):
    """It must not start afresh above what is stored, nor go on from nothing: it says what happened and what to do."""
    expected = reference(engine, fleet, FIRST, SECOND)
    factories.run(engine, fleet, FIRST, registered=True)
    factories.sql(engine, loss)
    report = factories.run(engine, fleet, SECOND, registered=True)
    assert factories.statuses(report) == {f"p{i}": "failed" if i == 1 else "landed" for i in range(8)}
    assert factories.messages(report)["p1"] == (
        "p1: progress says 2024-01-11T21:00:00+00:00, but the stored rows do not reach it. Compute it afresh with --full-refresh."
    )
    assert factories.run(engine, fleet, SECOND, registered=True, full_refresh=True).exit_code == 0
    assert factories.dump(engine) == expected


def test_both_progress_rows_of_a_portfolio_move_together(engine, fleet):
    factories.run(engine, fleet, FIRST, registered=True)
    rows = factories.progress(engine)
    for c in fleet:
        values, weights = (rows[s.logical_name(), c.identifier] for s in (PortfoliosStorage, PortfolioWeightsStorage))
        assert (values["watermark"], values["epoch"]) == (weights["watermark"], weights["epoch"])
        assert values["row_count"] == len(factories.values(engine, c.identifier))
        assert weights["row_count"] == len(factories.weights(engine, c.identifier))
