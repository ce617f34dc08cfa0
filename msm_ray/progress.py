"""Where a run stands: what is done of each stage, how fast, and how long the rest will take. Pure: the clock is the caller's.

Work is counted in the seconds that msm_ray/loads.py expects of a node, since one portfolio from 1990 is the work of a hundred nightly
increments. What is left of a stage takes as much longer, or less, than expected as what is done of it has taken; how much longer is not
known before it has begun. As many workers are busy as were, on average, since the first batch.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import NamedTuple
from uuid import UUID

from msm_core.data_nodes.base import NodeResult
from msm_ray.loads import load_of
from msm_ray.plan import Plan

STAGES = {"prices": "prices", "signal": "signals", "portfolio": "portfolios"}  # what people call the kinds of nodes, in their order
QUARANTINED = ("failed", "skipped")


class Standing(NamedTuple):
    """Of a stage, or of the whole run. Rates are averages since its first batch began; None = not known yet."""

    done: int
    total: int
    quarantined: int
    rows: int
    nodes_per_second: float | None
    rows_per_second: float | None
    eta_seconds: float | None


@dataclass
class Clock:
    """When the first batch began and the last one landed."""

    began: float | None = None
    landed: float = 0.0

    def tick(self, began: float, landed: float) -> None:
        self.began, self.landed = began if self.began is None else self.began, landed

    def per_second(self, amount: float) -> float | None:
        return amount / (self.landed - self.began) if self.began is not None and self.landed > self.began else None


@dataclass
class Stage:
    """The nodes of one kind.

    waiting        expected seconds of those that have not come to an end, by identifier; in all `expected_left`
    ended          status of the others
    worked         how many of them a worker has spent time on, `seconds` in all where `expected` ones were
    """

    waiting: dict[str, float] = field(default_factory=dict)
    ended: dict[str, str] = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=Counter)
    expected_left: float = 0.0
    rows: int = 0
    worked: int = 0
    seconds: float = 0.0
    expected: float = 0.0
    clock: Clock = field(default_factory=Clock)

    def plan(self, identifier: str, expected: float) -> None:
        """A node with work. One that has ended is none any more, unless a rival held it."""
        if identifier in self.waiting or self.ended.get(identifier, "busy") != "busy":
            return
        if self.ended.pop(identifier, None):
            self.counts["busy"] -= 1
        self.waiting[identifier] = expected
        self.expected_left += expected

    def end(self, result: NodeResult) -> bool:
        """Whether this is news: the node has not ended like this before."""
        expected, before = self.waiting.pop(result.identifier, 0.0), self.ended.get(result.identifier)
        self.expected_left = self.expected_left - expected if self.waiting else 0.0
        if before is not None:
            self.counts[before] -= 1
        self.ended[result.identifier] = result.status
        self.counts[result.status] += 1
        self.rows += result.rows
        if result.seconds > 0 and result.status != "busy":
            self.worked += 1
            self.seconds += result.seconds
            self.expected += expected
        return before != result.status

    @property
    def done(self) -> int:
        return len(self.ended)

    @property
    def total(self) -> int:
        return len(self.ended) + len(self.waiting)

    @property
    def quarantined(self) -> int:
        return sum(self.counts[status] for status in QUARANTINED)


class Following:
    """A run as seen from its plan and its results. Times are seconds of one monotonic clock; a call costs what is new, not the fleet.

    run_uid, as_of  None before there is a plan
    """

    def __init__(self) -> None:
        self.run_uid: UUID | None = None
        self.as_of: datetime | None = None
        self.stages = {kind: Stage() for kind in STAGES}
        self.clock = Clock()

    def planned(self, run_uid: UUID, plan: Plan) -> None:
        self.run_uid, self.as_of = run_uid, plan.as_of
        for (kind, identifier), node in plan.work().items():
            self.stages[kind].plan(identifier, load_of(node, plan.as_of).seconds)

    def landed(self, results: Sequence[NodeResult], now: float) -> list[NodeResult]:
        """Nodes that came to an end together. Returns those of them that had not ended like this before."""
        news = [r for r in results if self.stages[r.kind].end(r)]
        seconds = sum(r.seconds for r in results)
        if seconds > 0:  # else nobody worked on them
            for clock in (self.clock, *(self.stages[kind].clock for kind in {r.kind for r in results})):
                clock.tick(now - seconds, now)
        return news

    def standing(self, now: float, kind: str | None = None) -> Standing:
        """Of one stage, or of the whole run, whose ETA is known once every stage with something left has begun."""
        stages = [self.stages[kind]] if kind else list(self.stages.values())
        clock = self.stages[kind].clock if kind else self.clock
        rows = sum(s.rows for s in stages)
        return Standing(
            done=sum(s.done for s in stages),
            total=sum(s.total for s in stages),
            quarantined=sum(s.quarantined for s in stages),
            rows=rows,
            nodes_per_second=clock.per_second(sum(s.worked for s in stages)),
            rows_per_second=clock.per_second(rows),
            eta_seconds=self._eta_seconds([s for s in stages if s.waiting], now),
        )

    def _eta_seconds(self, left: Sequence[Stage], now: float) -> float | None:
        if not left:
            return 0.0
        workers = self.clock.per_second(sum(s.seconds for s in self.stages.values()))
        if not workers or not all(s.expected for s in left):
            return None
        work = sum(s.expected_left * s.seconds / s.expected for s in left)
        return max(work / workers - (now - self.clock.landed), 0.0)
