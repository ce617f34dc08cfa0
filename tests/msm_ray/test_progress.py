"""Where a run stands, from results written down by hand, and what people and programs see of it; figures are worked in comments."""

import io
import json
import os
import subprocess
import sys
import uuid
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from msm_core.data_nodes.base import NodeResult
from msm_core.data_nodes.signals import SignalWeights
from msm_core.errors import SelectionError
from msm_core.signals import FixedWeights
from msm_ray import watch
from msm_ray.console import configure_logging
from msm_ray.progress import Following
from msm_ray.run import RunReport
from msm_ray.watch import RunOutput, bars, line, watching

RUN = uuid.UUID(int=7)
AS_OF = datetime(2024, 6, 28, tzinfo=UTC)


def following(**nodes: dict[str, float]) -> Following:
    """Nodes with work: identifier -> expected seconds, per kind."""
    made = Following()
    made.run_uid, made.as_of = RUN, AS_OF
    for kind, expected in nodes.items():
        for identifier, seconds in expected.items():
            made.stages[kind].plan(identifier, seconds)
    return made


def landed(identifiers: Iterable[str], seconds: float, kind: str = "portfolio", status: Any = "landed", rows: int = 0) -> list[NodeResult]:
    """A batch that took a worker `seconds`, shared out evenly as the workers do."""
    names = list(identifiers)
    error = {"reason": "missing_price", "message": "no bar"} if status in ("failed", "skipped") else None
    return [NodeResult(kind, name, status, rows, error=error, seconds=seconds / len(names)) for name in names]


class Planned:
    """A plan of `count` signals with work, as far as a follower asks."""

    as_of = AS_OF

    def __init__(self, count: int) -> None:
        signal = FixedWeights.from_signal_configuration(weights={"a": 0.5, "b": 0.5})
        self.found = {("signal", f"s{i:05d}"): SignalWeights(signal_weights_instance=signal) for i in range(count)}
        self.asked = 0

    def work(self) -> dict[tuple[str, str], SignalWeights]:
        self.asked += 1
        return self.found

    def nodes(self) -> list[tuple[str, Any]]:
        return [(kind, SimpleNamespace(node=node)) for (kind, _), node in self.found.items()]


# -- figures --------------------------------------------------------------------------------------------------------------------------


def test_the_eta_goes_by_work_and_not_by_nodes() -> None:
    run = following(portfolio={"small": 1, "large": 3})
    run.landed(landed(["small"], seconds=2), now=10)
    # 2 s where 1 was expected, 3 expected ones are left: 6 s of one worker, which was busy all the time (from 8 to 10)
    assert run.standing(10).eta_seconds == pytest.approx(6)
    assert run.standing(11.5).eta_seconds == pytest.approx(4.5)  # it runs down between batches
    assert run.standing(30).eta_seconds == 0


def test_the_eta_is_shared_by_the_workers_that_were_busy() -> None:
    run = following(portfolio={"a": 1, "b": 1, "c": 4})
    run.landed(landed(["a"], seconds=2), now=12)
    run.landed(landed(["b"], seconds=2), now=12)
    # both began at 10: 4 worker seconds in 2 s are 2 workers, and twice what was expected; 4 expected ones are 8 worker seconds: 4 s
    assert run.standing(12).eta_seconds == pytest.approx(4)


def test_each_stage_has_a_pace_of_its_own_and_the_whole_waits_for_all_of_them() -> None:
    run = following(signal={"s": 1, "t": 3}, portfolio={"p": 10, "q": 10})
    assert run.standing(0).eta_seconds is None
    run.landed(landed(["s"], seconds=2, kind="signal"), now=2)
    # a second expected is two, and 3 of signals are left; of portfolios nothing is known yet
    assert [run.standing(2, kind).eta_seconds for kind in ("signal", "portfolio", None)] == [6, None, None]
    run.landed(landed(["t"], seconds=6, kind="signal"), now=8)
    run.landed(landed(["p"], seconds=5), now=13)
    # portfolios take half of what was expected: 5 s for the 10 that are left
    assert [run.standing(13, kind).eta_seconds for kind in ("signal", "portfolio", None)] == [0, 5, 5]


def test_what_was_skipped_says_nothing_about_the_pace() -> None:
    run = following(portfolio={"a": 1, "b": 1, "c": 1})
    run.landed(landed(["a"], seconds=3), now=3)
    run.landed([NodeResult("portfolio", "b", "skipped", attempts=0)], now=3)
    assert run.standing(3).eta_seconds == 3


def test_rates_count_what_workers_did_since_the_first_batch_began() -> None:
    run = following(signal={"s": 1}, portfolio=dict.fromkeys("abcdef", 1.0))
    run.landed(landed(["up"], seconds=0, status="up_to_date"), now=50)  # settled by the plan: nobody worked
    assert run.standing(60).nodes_per_second is None
    run.landed(landed(["s"], seconds=1, kind="signal", rows=10), now=101)
    run.landed(landed("abcd", seconds=4, rows=25), now=105)
    run.landed([NodeResult("portfolio", "e", "skipped", attempts=0)], now=107)
    whole, portfolios = run.standing(110), run.standing(110, "portfolio")
    assert (whole.nodes_per_second, whole.rows_per_second) == (1.0, 22.0)  # 5 nodes, 110 rows, from 100 to 105
    assert (portfolios.nodes_per_second, portfolios.rows_per_second) == (1.0, 25.0)  # 4 nodes, 100 rows, from 101 to 105
    assert (whole.done, whole.total, whole.quarantined, whole.rows) == (7, 8, 1, 110)


def test_nodes_without_work_are_done_at_once() -> None:
    run = following()
    run.landed(landed("abc", seconds=0, status="up_to_date"), now=1)
    assert run.standing(5) == (3, 3, 0, 0, None, None, 0.0)


def test_a_node_that_a_rival_held_is_open_again_and_nothing_is_counted_twice() -> None:
    run, plan = Following(), Planned(3)
    run.planned(RUN, plan)  # type: ignore[arg-type]
    first = [*landed(["s00000"], 1, "signal"), *landed(["s00001"], 1, "signal", "busy"), *landed(["s00002"], 1, "signal", "failed")]
    assert run.landed(first, now=3) == first
    assert run.standing(3)[:3] == (3, 3, 1)
    run.planned(RUN, plan)  # type: ignore[arg-type] - the busy one again, and beside it those that have ended
    assert run.standing(4)[:3] == (2, 3, 1)
    again = [*landed(["s00001"], 1, "signal"), *landed(["s00002"], 1, "signal", "failed")]
    assert run.landed(again, now=6) == again[:1]  # the failure is no news
    assert run.standing(6)[:3] == (3, 3, 1)
    assert dict(+run.stages["signal"].counts) == {"landed": 2, "failed": 1}


def test_thirty_thousand_nodes_cost_what_is_new_in_each_batch() -> None:
    run, plan = Following(), Planned(30_000)
    run.planned(RUN, plan)  # type: ignore[arg-type]
    names = [identifier for _, identifier in plan.found]
    for first in range(0, 30_000, 10):
        run.landed(landed(names[first : first + 10], 0.01, "signal", rows=1), now=float(first))
        bars(run, 1.0, float(first), 80)
    assert plan.asked == 1
    assert run.standing(30_000.0)[:4] == (30_000, 30_000, 0, 30_000)
    assert run.stages["signal"].expected_left == 0.0


# -- for people -----------------------------------------------------------------------------------------------------------------------


def halfway() -> Following:
    """17 of 20 portfolios in 100 s, 2 of them bad, 12 345 rows each of the good; signals done; prices not wanted."""
    run = following(signal={"s": 5}, portfolio={f"p{i}": 1 for i in range(20)})
    run.landed(landed(["s"], 0.5, "signal", rows=1), now=0.5)
    run.landed(landed([f"p{i}" for i in range(15)], 90, rows=12_345), now=90.5)
    run.landed(landed(["p15", "p16"], 9.5, status="failed"), now=100)
    return run


def drawn(run: Following, width: int, elapsed: float = 100) -> list[str]:
    console = Console(file=io.StringIO(), width=width, force_terminal=False)
    console.print(bars(run, elapsed, 100, width))
    return [" ".join(row.replace("━", "").replace("╺", "").replace("╸", "").split()) for row in console.file.getvalue().splitlines()]  # type: ignore[attr-defined]


@pytest.mark.parametrize("width", [80, 100, 200])
def test_bars_show_every_stage_in_one_row_each(width: int) -> None:
    # portfolios: 3 left at 99.5 s per 17, one worker: 17.6 s; 17 and 185 175 rows over 99.5 s; 18 nodes over 100 s
    assert drawn(halfway(), width) == [
        "nodes nodes/s rows/s quarantined ETA",
        "signals 1/1 2.0 2.0 0 0:00",
        "portfolios 17/20 0.2 1,861 2 0:18",
        "elapsed 1:40 18/21 0.2 1,852 2 0:18",
    ]


def test_a_large_fleet_fits_into_eighty_columns() -> None:
    run = following(prices={f"x{i}": 1 for i in range(9_999)}, portfolio={f"p{i}": 1 for i in range(100_000)})
    run.landed(landed([f"x{i}" for i in range(8_000)], 4, "prices", rows=1_250), now=4)
    run.landed(landed([f"p{i}" for i in range(96_000)], 16), now=20)
    run.landed(landed([f"p{i}" for i in range(96_000, 99_999)], 16, status="failed"), now=36)
    # prices: 8,000 and ten million rows over 4 s; portfolios: 99,999 over 32 s; all of it over 36 s
    rows = drawn(run, 80, elapsed=7205)
    assert rows[1].startswith("prices 8,000/9,999 2,000 2,500,000 0 ")
    assert rows[2].startswith("portfolios 99,999/100,000 3,125 0.0 3,999 ")
    assert rows[3].startswith("elapsed 2:00:05 107,999/109,999 3,000 277,778 3,999 ")
    assert len(rows) == 4


def test_a_run_on_a_terminal_draws_there_and_leaves_stdout_to_the_events(tmp_path: Path) -> None:
    code = """
from msm_core.data_nodes.base import NodeResult
from msm_ray.watch import RunOutput, watching
with watching(RunOutput.ndjson) as watcher:
    watcher.landed([NodeResult("portfolio", "p", "landed", 7, seconds=1.0)])
"""
    ours, theirs = os.openpty()
    with (tmp_path / "events").open("w") as events, os.fdopen(theirs, "w") as terminal:
        subprocess.run([sys.executable, "-c", code], stdout=events, stderr=terminal, env={**os.environ, "TERM": "xterm"}, check=True)
    drawn_there = os.read(ours, 65536).decode()
    os.close(ours)
    assert "starting" in drawn_there
    assert "\x1b[" in drawn_there
    assert "{" not in drawn_there
    assert [json.loads(text)["event"] for text in (tmp_path / "events").read_text().splitlines()] == ["batch", "progress"]


def test_before_there_is_a_plan_the_time_runs() -> None:
    assert drawn(Following(), 80, elapsed=3725) == ["starting 1:02:05"]


def test_a_line_tells_the_same() -> None:
    assert line(halfway(), 100) == "signals 1/1 · portfolios 17/20 · 0.2 nodes/s · 1,852 rows/s · 2 quarantined · ETA 0:18"
    assert line(following(prices={"x": 1}), 0) == "prices 0/1 · - nodes/s · - rows/s · 0 quarantined · ETA -"


def test_off_a_terminal_there_is_a_line_now_and_then_and_nothing_that_moves(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch, "err", Console(stderr=True, force_terminal=True))  # as FORCE_COLOR does in continuous integration
    clock = iter([0.0, 5.0, 10.0, 12.0, 21.0])  # made, and four batches
    monkeypatch.setattr(watch, "time", SimpleNamespace(monotonic=lambda: next(clock), time=lambda: 0.0))
    configure_logging(verbose=False)
    with watching(RunOutput.table) as watcher:
        for name in "abcd":
            watcher.landed(landed([name], 1))
    told = capsys.readouterr()
    assert told.out == ""
    assert [text.split("portfolios ")[1].split(" ")[0] for text in told.err.splitlines()] == ["2/2", "4/4"]  # at 10 s and at 21 s


# -- for programs ---------------------------------------------------------------------------------------------------------------------


def report(*results: NodeResult) -> RunReport:
    return RunReport(RUN, AS_OF, results, 2.0)


def test_events_are_told_in_the_order_of_things(capsys: pytest.CaptureFixture[str]) -> None:
    with watching(RunOutput.ndjson) as watcher:
        watcher.planned(RUN, Planned(3))  # type: ignore[arg-type]
        results = [*landed(["s00000"], 1, "signal", rows=4), *landed(["s00001"], 0.5, "signal", "failed")]
        watcher.landed(results)
        watcher.landed([])  # a lost batch: nothing has come to an end
        held, left_out = NodeResult("signal", "s00002", "busy"), landed(["p"], 0, status="skipped")
        watcher.landed([held, *left_out])
        watcher.planned(RUN, Planned(0))  # type: ignore[arg-type]
        watcher.finished(report(*results, held))
    lines = [json.loads(text) for text in capsys.readouterr().out.splitlines()]
    assert all(datetime.fromisoformat(told.pop("time")).utcoffset() == UTC.utcoffset(None) for told in lines)
    counts = {"landed": 0, "up_to_date": 0, "failed": 0, "skipped": 0, "busy": 0}
    bad = {"kind": "signal", "identifier": "s00001", "status": "failed", "reason": "missing_price", "message": "no bar"}
    none = {"total": 0, "work": 0}
    nodes = {"prices": none, "signal": {"total": 3, "work": 3}, "portfolio": none}
    progress = lines.pop(3)
    assert progress["event"] == "progress"
    assert progress["nodes"]["signal"] == {"done": 2, "total": 3}
    assert (progress["quarantined"], progress["rows"]) == (1, 4)
    assert lines[:-1] == [
        {"event": "run_started", "run": str(RUN), "as_of": "2024-06-28T00:00:00+00:00", "nodes": nodes},
        {"event": "batch", "kind": "signal", **counts, "landed": 1, "failed": 1, "rows": 4, "seconds": 1.5},
        {"event": "node", **bad},
        {"event": "batch", "kind": "signal", **counts, "busy": 1, "rows": 0, "seconds": 0.0},
        {"event": "batch", "kind": "portfolio", **counts, "skipped": 1, "rows": 0, "seconds": 0},
        {"event": "node", **bad, "kind": "portfolio", "identifier": "p", "status": "skipped"},
        {"event": "run_continued", "run": str(RUN), "as_of": "2024-06-28T00:00:00+00:00", "nodes": {**nodes, "signal": none}},
        {"event": "node", "kind": "signal", "identifier": "s00002", "status": "busy"},
    ]
    assert lines[-1] == {"event": "run_finished", **report(*results, held).summary()}


@pytest.mark.parametrize(
    ("error", "reason", "message"),
    [
        (SelectionError(selector="x:y", why="unknown"), "selection_error", "cannot select 'x:y'"),
        (RuntimeError("no route to postgresql://u:canary-secret@h/d"), "node_failed", "RuntimeError"),
        (KeyboardInterrupt(), "cancelled", "interrupted"),
    ],
)
def test_what_ends_a_command_is_one_event(error: BaseException, reason: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(type(error)), watching(RunOutput.ndjson):
        raise error
    (text,) = capsys.readouterr().out.splitlines()
    told = json.loads(text)
    assert (told["event"], told["reason"]) == ("error", reason)
    assert message in told["message"]
    assert "canary-secret" not in text


def test_a_run_survives_a_reader_that_goes_away(monkeypatch: pytest.MonkeyPatch) -> None:
    reading, writing = os.pipe()
    with os.fdopen(writing, "w") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        os.close(reading)
        with watching(RunOutput.ndjson) as watcher:
            watcher.landed(landed(["a"], 1))
            watcher.landed(landed(["b"], 1))
    assert watcher.following.standing(0).done == 2


def test_the_lines_come_out_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    reading, writing = os.pipe()
    with os.fdopen(writing, "w") as pipe, os.fdopen(reading) as there:
        monkeypatch.setattr(sys, "stdout", pipe)
        with watching(RunOutput.ndjson) as watcher:
            watcher.landed(landed(["a"], 1))
            assert json.loads(there.readline())["event"] == "batch"  # while the run goes on
