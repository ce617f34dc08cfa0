"""Who waits for whom: a portfolio for its signal, and a signal for the portfolios that it tracks. Planned in that order, cycles refused.

What shares neither work nor signals with the rest of a fleet can be planned apart from it (`independent_parts`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from graphlib import CycleError, TopologicalSorter

from msm_core.configuration import PortfolioConfiguration
from msm_core.data_nodes.base import failure_facts
from msm_core.data_nodes.interpolated_prices import InterpolatedPrices
from msm_core.data_nodes.planning import NodePlan, plan_portfolio, plan_signal
from msm_core.data_nodes.portfolios import PortfoliosDataNode
from msm_core.data_nodes.signals import SignalWeights
from msm_core.data_nodes.world import World, price_sources_of, with_coverage
from msm_core.errors import CyclicPlan, DependencyFailed
from msm_core.frames import BEGINNING
from msm_core.price_sources import PublishedValues, SourceKey
from msm_core.signals import Signal


@dataclass(frozen=True)
class Dependencies:
    """order: portfolios, each after those that its signal tracks; upstream: those, by portfolio; cyclic: what is wrong, by portfolio."""

    order: tuple[PortfolioConfiguration, ...]
    upstream: Mapping[str, tuple[str, ...]]
    cyclic: Mapping[str, CyclicPlan]


def dependencies(configurations: Sequence[PortfolioConfiguration]) -> Dependencies:
    """Of a fleet; a portfolio or index that is not in it is read as it is stored."""
    by_identifier = {c.identifier: c for c in configurations}
    publishers = {c.index_identifier: c.identifier for c in configurations if c.index_identifier}
    upstream = {c.identifier: _tracked(c.signal, by_identifier, publishers) for c in configurations}
    graph = {identifier: set(names) for identifier, names in upstream.items()}
    cyclic: dict[str, CyclicPlan] = {}
    while True:
        try:
            order = tuple(TopologicalSorter(graph).static_order())
            break
        except CycleError as error:
            members = error.args[1]  # the first and the last are the same; each comes before those that wait for it
            cycle = CyclicPlan(cycle=" -> ".join(reversed(members)))
            cyclic |= dict.fromkeys(members, cycle)
            graph = {i: (set() if i in cyclic else names) for i, names in graph.items()}
    return Dependencies(tuple(by_identifier[i] for i in order), upstream, cyclic)


def upstream_of(chosen: Sequence[PortfolioConfiguration], fleet: Dependencies) -> list[PortfolioConfiguration]:
    """Portfolios that the chosen ones wait for, directly or not, and that are not chosen themselves, in the order of the fleet."""
    named = {c.identifier for c in chosen}
    waiting, found = list(named), set[str]()
    while waiting:
        new = set(fleet.upstream.get(waiting.pop(), ())) - found - named
        found |= new
        waiting += new
    return [c for c in fleet.order if c.identifier in found]


def independent_parts(configurations: Sequence[PortfolioConfiguration], size: int) -> list[list[PortfolioConfiguration]]:
    """A fleet in parts of about `size` that share no node, each in the order given: none has to be planned, or to run, before another.

    Who follows one signal stays together; so do all that others are computed from, that are computed from others, or whose prices
    are interpolated, as the first part.
    """
    if len(configurations) <= size:
        return [list(configurations)]
    upstream = dependencies(configurations).upstream
    waited_for = {name for names in upstream.values() for name in names}
    tied = {c.signal_uid for c in configurations if c.identifier in waited_for or upstream[c.identifier] or _interpolates(c)}
    followers: dict[str, list[PortfolioConfiguration]] = {}
    for c in configurations:
        followers.setdefault("" if c.signal_uid in tied else c.signal_uid, []).append(c)
    parts = [tied_together] if (tied_together := followers.pop("", [])) else []
    part = list[PortfolioConfiguration]()
    for members in followers.values():
        part += members
        if len(part) >= size:
            parts.append(part)
            part = []
    return [*parts, part] if part else parts


def _interpolates(configuration: PortfolioConfiguration) -> bool:
    return any(isinstance(source, InterpolatedPrices) for source in price_sources_of([configuration]))


def tracks_values(signal: Signal) -> bool:
    """It is computed from values that portfolios of this system publish."""
    return any(isinstance(request.source, PublishedValues) for request in signal.requests)


def _tracked(signal: Signal, known: Mapping[str, object], publishers: Mapping[str, str]) -> tuple[str, ...]:
    found: set[str] = set()
    for request in signal.requests:
        if isinstance(request.source, PublishedValues):
            named = request.identifiers if request.source.of == "portfolio" else [publishers.get(i, "") for i in request.identifiers]
            found |= {name for name in named if name in known}
    return tuple(sorted(found))


@dataclass(frozen=True)
class NodePlans:
    """Plans of the portfolios, in the order given, of their signals by uid, and what each signal waits for."""

    portfolios: tuple[NodePlan[PortfoliosDataNode], ...]
    signals: Mapping[str, NodePlan[SignalWeights]]
    tracked: Mapping[str, tuple[str, ...]]


def plan_nodes(configurations: Sequence[PortfolioConfiguration], world: World, as_of: datetime, full_refresh: bool) -> NodePlans:
    """Every portfolio and every distinct signal; one that depends on what cannot work is skipped, a cycle is refused by name."""
    fleet = dependencies(configurations)
    signals: dict[str, NodePlan[SignalWeights]] = {}
    portfolios: dict[str, NodePlan[PortfoliosDataNode]] = {}
    published = (PublishedValues(of="portfolio").key, PublishedValues(of="index").key)
    coming: dict[SourceKey, dict[str, tuple[datetime, datetime]]] = {}
    for c in fleet.order:
        broken = next((portfolios[name] for name in fleet.upstream[c.identifier] if name in portfolios and portfolios[name].error), None)
        if error := fleet.cyclic.get(c.identifier):
            portfolios[c.identifier] = NodePlan(c.identifier, "invalid", None, error=failure_facts(error))
            continue
        if broken and broken.error:
            facts = failure_facts(DependencyFailed(upstream=f"portfolio {broken.identifier} ({broken.error['message']})"))
            portfolios[c.identifier] = NodePlan(c.identifier, "invalid", None, error=facts)
            continue
        if c.signal_uid not in signals:
            seen = with_coverage(world, coming) if fleet.upstream[c.identifier] else world
            signals[c.signal_uid] = plan_signal(c.signal, seen, as_of, full_refresh)
        plan = plan_portfolio(c, world, as_of, full_refresh, signals[c.signal_uid])
        portfolios[c.identifier] = plan
        if plan.node and plan.end:
            for key, identifier in zip(published, (c.identifier, c.index_identifier), strict=True):
                if identifier:
                    coming.setdefault(key, {})[identifier] = (BEGINNING, plan.end)
    tracked = {c.signal_uid: fleet.upstream[c.identifier] for c in configurations}
    return NodePlans(tuple(portfolios[c.identifier] for c in configurations), signals, tracked)
