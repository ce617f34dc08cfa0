"""The nodes of plans on their way: sorted into batches that share inputs, submitted, awaited. It knows executors by three methods.

A node's failure stops only what depends on it. A lost batch is halved and tried again until the culprit stands alone.
"""

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from heapq import heappop, heappush
from types import MappingProxyType
from typing import Any

import structlog

from msm_core.data_nodes.base import NodeResult, failure_facts
from msm_core.data_nodes.interpolated_prices import InterpolatedAsset
from msm_core.data_nodes.signals import SignalWeights
from msm_core.errors import CyclicPlan, DependencyFailed, UnexpectedReply
from msm_ray.executors import Errand, Executor, encode_batch
from msm_ray.loads import Load, load_of
from msm_ray.plan import Key, Plan, Work

log = structlog.get_logger()

BATCH_NODES_MAX = 1_024
BATCH_SECONDS = (0.5, 15.0)  # a task must be worth its overhead, and must not keep the others waiting at the end
PART_SLACK = 1.02  # an equal part may be a little larger: what is left over would be a batch of its own
BATCH_ROWS_MAX = 3_000_000  # bounds memory: a row is held twice for a while
BATCH_CELLS_MAX = 12_000_000  # bounds memory: prices and what is reckoned with them
UPSTREAM_FIRST = {"prices": 0, "signal": 1, "portfolio": 2}


class Flight:
    """The nodes of plans on their way: ready ones wait in groups that share inputs, batches fly, dependants of failures are skipped."""

    def __init__(self, executor: Executor, errand: Errand, batch_size: int | None = None) -> None:
        self.executor, self.errand, self.batch_size = executor, errand, batch_size
        self.work, self.upstream = dict[Key, Work](), dict[Key, set[Key]]()
        self.sorters: list[TopologicalSorter[Key]] = []
        self.sorter: dict[Key, TopologicalSorter[Key]] = {}
        self.partitions: dict[Key, int] = {}
        self.blocked: dict[Key, NodeResult] = {}
        self.loads: dict[Key, Load] = {}
        self.seconds_ready = defaultdict[tuple[Any, ...], float](float)  # of what waits, by group, whatever its lane
        self.waiting: dict[tuple[Any, ...], list[Key]] = defaultdict(list)  # heaps: the least key comes first
        self.flying: dict[int, list[Key]] = {}
        self.turns = defaultdict[int | None, int](int)  # the last ticket of each lane
        self.tickets = 0

    def add(self, plan: Plan, partitions: Mapping[Key, int] = MappingProxyType({})) -> None:
        """Nodes of one more plan, none of which stands in another; batches are submitted as far as workers are free. Raises CyclicPlan.

        partitions  where the rows of nodes lie, in storages that are spread over partitions: batches that fly together keep apart
                    there, because two backends that extend one index wait for each other
        """
        work, upstream = plan.work(), plan.upstream()
        sorter = TopologicalSorter(upstream)
        try:
            sorter.prepare()
        except CycleError as error:
            raise CyclicPlan(cycle=" -> ".join(f"{kind}:{identifier}" for kind, identifier in error.args[1])) from None
        self.sorters.append(sorter)
        self.sorter |= dict.fromkeys(work, sorter)
        self.work |= work
        self.upstream |= upstream
        self.partitions |= partitions
        self.loads |= {key: load_of(node, self.errand.as_of) for key, node in work.items()}
        self._collect_ready()  # nothing is skipped: what others have made ready has been collected
        self._fill()

    def landed(self) -> Iterator[list[NodeResult]]:
        """Yields as `results` does, and ends when it would have to wait."""
        while self.flying and self.executor.has_landed():
            yield self._land()
            yield from self._refill()

    def results(self) -> Iterator[list[NodeResult]]:
        """Yields the results of each batch, and of the nodes that its failures skip, until nothing is left."""
        yield from self._refill()
        while any(sorter.is_active() for sorter in self.sorters):
            if self.flying:
                yield self._land()
            yield from self._refill()

    def _refill(self) -> Iterator[list[NodeResult]]:
        while skipped := self._collect_ready():  # and then those that wait for them
            yield skipped
        self._fill()

    def _fill(self) -> None:
        while self.waiting and len(self.flying) < 2 * self.executor.slots:  # Ray starts when it is first asked for its slots
            self._submit(self._next_batch())

    def _collect_ready(self) -> list[NodeResult]:
        skipped = []
        for key in [key for sorter in self.sorters for key in sorter.get_ready()]:
            bad = next((self.blocked[up] for up in self.upstream[key] if up in self.blocked), None)
            if bad is None:
                alike = _group(key, self.work[key])
                heappush(self.waiting[(*alike, self._lane(key))], key)
                self.seconds_ready[alike] += self.loads[key].seconds
            else:
                skipped.append(self._skip(key, bad))
        return skipped

    def _skip(self, key: Key, bad: NodeResult) -> NodeResult:
        cause = f"{bad.kind} {bad.identifier} ({bad.error['message'] if bad.error else bad.status})"
        facts = failure_facts(DependencyFailed(upstream=cause))
        status = "busy" if bad.status == "busy" else "skipped"
        result = NodeResult(key[0], key[1], status, error=facts, attempts=0)
        self.blocked[key] = result
        self.sorter[key].done(key)
        return result

    def _lane(self, key: Key) -> int | None:
        """Each worker's share of the partitions; None = its rows may lie anywhere."""
        partition = self.partitions.get(key)
        return None if partition is None else partition % self.executor.slots

    def _next_batch(self) -> list[Key]:
        """The next nodes of a group: what others wait for comes first, then the most work.

        A batch is a share of all that is ready, so the last ones are small and all workers end together; never so small that it is not
        worth a task, nor too large for memory. What little is ready goes in equal parts to the workers that are idle. In the order of
        keys, as far as they are ready: rows then go to the right end of a primary key, which is its fast end. That is why a share of
        what is ready, not of what is left: while signals are landing, a larger one would take keys from all over.
        """
        group = self._next_group()
        waiting, batch, rows, cells, seconds = self.waiting[group], list[Key](), 0.0, 0.0, 0.0
        share = self._share()
        while waiting and len(batch) < (self.batch_size or BATCH_NODES_MAX):
            load = self.loads[waiting[0]]
            rows, cells, seconds = rows + load.rows, cells + load.cells, seconds + load.seconds
            if batch and (rows > BATCH_ROWS_MAX or cells > BATCH_CELLS_MAX or (seconds > share and not self.batch_size)):
                break
            batch.append(heappop(waiting))
            self.seconds_ready[group[:-1]] -= load.seconds
        if not waiting:
            del self.waiting[group]
        return batch

    def _next_group(self) -> tuple[Any, ...]:
        """Of the lanes of a group it is the turn of the one in which the fewest batches fly."""
        flying = Counter(self._lane(keys[0]) for keys in self.flying.values())

        def rank(group: tuple[Any, ...]) -> tuple[float, ...]:
            lane = group[-1]
            return UPSTREAM_FIRST[group[0]], -self.seconds_ready[group[:-1]], flying[lane], self.turns[lane]

        return min(self.waiting, key=rank)

    def _share(self) -> float:
        """Seconds of work that the next batch should have."""
        (least, most), idle = BATCH_SECONDS, self.executor.slots - len(self.flying)
        ready = sum(self.seconds_ready.values())
        if idle > 0 and ready <= 2 * least * idle:
            return ready / idle * PART_SLACK
        return min(max(ready / (2 * self.executor.slots), least), most)

    def _submit(self, keys: list[Key]) -> None:
        nodes = [self.work[key] for key in keys]
        kind, _ = keys[0]
        self.tickets += 1
        self.flying[self.tickets] = keys
        self.turns[self._lane(keys[0])] = self.tickets
        self.executor.submit(self.tickets, kind, encode_batch(kind, nodes, self.errand))

    def _land(self) -> list[NodeResult]:
        ticket, outcome = self.executor.wait()
        keys = self.flying.pop(ticket)
        if not isinstance(outcome, Exception) and sorted(keys) != sorted((r.kind, r.identifier) for r in outcome):
            outcome = UnexpectedReply(asked=len(keys), answered=len(outcome))
        if isinstance(outcome, Exception):
            return self._lost(keys, outcome)
        for result in outcome:
            key = (result.kind, result.identifier)
            if result.status in ("failed", "busy"):
                self.blocked[key] = result
            self.sorter[key].done(key)
        return outcome

    def _lost(self, keys: list[Key], error: Exception) -> list[NodeResult]:
        """A batch without an answer: two halves get another chance, a single node is quarantined."""
        if len(keys) > 1:
            log.warning("a batch was lost; trying its halves", nodes=len(keys), error=failure_facts(error)["message"])
            half = len(keys) // 2
            self._submit(keys[:half])
            self._submit(keys[half:])
            return []
        result = NodeResult(*keys[0], "failed", error=failure_facts(error))
        self.blocked[keys[0]] = result
        self.sorter[keys[0]].done(keys[0])
        return [result]


def _group(key: Key, node: Work) -> tuple[Any, ...]:
    """Nodes of one group read the same prices over a similar window."""
    if isinstance(node, InterpolatedAsset):
        return (key[0], node.source_key, node.since is None)
    if isinstance(node, SignalWeights):
        sources = sorted({str(source.key) for source in node.dependencies().values()})
        return (key[0], *sources, node.since is None)
    configuration = node.portfolio_configuration
    return (key[0], configuration.price_source.key, configuration.price_column, node.since is None)
