"""The plan: which nodes a run touches, why, and in which order. Pure once the world is read; printed by `msm-ray plan`.

1. Every configuration becomes a portfolio node and, once per distinct uid, a signal node; every asset whose prices are to be
   interpolated becomes a prices node, one per storage (data_nodes/planning.py decides each).
2. A node without work stays out of the graph; one that cannot work is a failure before anything is tried.
3. A portfolio waits for its signal and the prices of its assets, a signal for the prices and the portfolios that it is computed from,
   and nobody for anything else: edges are per node, never a barrier. A cycle is refused by name.
"""

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from types import MappingProxyType
from typing import Any

from msm_core.configuration import PortfolioConfiguration
from msm_core.data_nodes.base import NodeResult
from msm_core.data_nodes.dependencies import plan_nodes
from msm_core.data_nodes.interpolated_prices import InterpolatedAsset
from msm_core.data_nodes.planning import NodePlan, plan_prices, with_prices
from msm_core.data_nodes.portfolios import PortfoliosDataNode
from msm_core.data_nodes.signals import SignalWeights
from msm_core.data_nodes.world import World
from msm_core.errors import DependencyFailed

Key = tuple[str, str]  # (kind, identifier)
SKIPPED = DependencyFailed().reason
Work = InterpolatedAsset | SignalWeights | PortfoliosDataNode


@dataclass(frozen=True)
class Plan:
    """tracked: portfolios that a signal is computed from, by signal uid."""

    as_of: datetime
    prices: tuple[NodePlan[InterpolatedAsset], ...]
    signals: tuple[NodePlan[SignalWeights], ...]
    portfolios: tuple[NodePlan[PortfoliosDataNode], ...]
    tracked: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def nodes(self) -> Iterator[tuple[str, NodePlan[Any]]]:
        """(kind, plan) of every node."""
        for kind, plans in (("prices", self.prices), ("signal", self.signals), ("portfolio", self.portfolios)):
            yield from ((kind, plan) for plan in plans)

    def work(self) -> dict[Key, Work]:
        """Nodes with something to do, by key."""
        return {(kind, p.identifier): p.node for kind, p in self.nodes() if p.node is not None}

    def upstream(self) -> dict[Key, set[Key]]:
        """What each node waits for; only nodes of this plan's work are named."""
        work = self.work()
        prices = {(p.node.source_key, p.node.asset_identifier): ("prices", p.identifier) for p in self.prices if p.node}
        graph: dict[Key, set[Key]] = {}
        for key, node in work.items():
            needed: set[Key] = set()
            if isinstance(node, PortfoliosDataNode):
                configuration = node.portfolio_configuration
                source = configuration.price_source.key
                needed = {("signal", configuration.signal_uid)}
                if prices:
                    needed |= {prices.get((source, a), key) for a in node.assets}
            elif isinstance(node, SignalWeights):
                read = [(r.source.key, name) for r in node.signal_weights_instance.requests for name in r.identifiers]
                needed = {("portfolio", name) for name in self.tracked.get(node.identifier, ())}
                needed |= {prices[use] for use in read if use in prices}
            graph[key] = (needed & work.keys()) - {key}
        return graph

    def settled(self) -> list[NodeResult]:
        """Results that need no work: nodes that are up to date, and those that cannot be computed at all, or wait for one that cannot."""
        done = [NodeResult(kind, p.identifier, "up_to_date", watermark=p.end) for kind, p in self.nodes() if p.reason == "up to date"]
        return done + [
            NodeResult(kind, p.identifier, "skipped" if p.error["reason"] == SKIPPED else "failed", error=p.error, attempts=0)
            for kind, p in self.nodes()
            if p.error
        ]

    def reasons(self) -> dict[Key, str]:
        return {(kind, p.identifier): p.reason for kind, p in self.nodes()}

    def summary(self) -> dict[str, dict[str, int]]:
        """Nodes per reason, for each kind."""
        found = {"prices": self.prices, "signals": self.signals, "portfolios": self.portfolios}
        return {name: dict(Counter(p.reason for p in plans)) for name, plans in found.items()}

    def document(self) -> dict[str, Any]:
        """The plan as plain data."""
        return {
            "as_of": self.as_of.isoformat(),
            "summary": self.summary(),
            "prices": [_node_document(p) for p in self.prices if p.node],
            "signals": [_node_document(p) for p in self.signals],
            "portfolios": [_node_document(p) for p in self.portfolios],
        }


def make_plan(
    configurations: Sequence[PortfolioConfiguration],
    world: World,
    as_of: datetime,
    *,
    full_refresh: bool = False,
    failed_before: Collection[str] = (),
    signals_selected: Iterable[str] = (),
    unreadable: Mapping[str, dict[str, str]] = MappingProxyType({}),
) -> Plan:
    """`configurations` are the selected portfolios; `failed_before` names those whose last run failed.

    unreadable  stored portfolios whose configuration cannot be read, and why: they fail, the others do not

    A signal comes along when a portfolio that follows it has work, or when it is selected itself.
    """
    prices = plan_prices(world, as_of, full_refresh)
    world = with_prices(world, prices)
    planned = plan_nodes(configurations, world, as_of, full_refresh)
    portfolios = [replace(p, reason="previous failure") if p.node and p.identifier in failed_before else p for p in planned.portfolios]
    failed = {c.signal_uid for c in configurations if c.signal_uid in planned.signals and planned.signals[c.signal_uid].error}
    wanted = set(signals_selected) | failed | {p.node.portfolio_configuration.signal_uid for p in portfolios if p.node}
    signals = [planned.signals[uid] for uid in sorted(wanted & planned.signals.keys())]
    lost = [NodePlan[PortfoliosDataNode](identifier, "invalid", None, error=facts) for identifier, facts in unreadable.items()]
    return Plan(as_of, tuple(prices), tuple(signals), (*portfolios, *lost), planned.tracked)


def _node_document(plan: NodePlan[Any]) -> dict[str, Any]:
    facts: Mapping[str, Any] = {
        "identifier": plan.identifier,
        "reason": plan.reason,
        "start": plan.start.isoformat() if plan.start else None,
        "end": plan.end.isoformat() if plan.end else None,
        "limited_by": plan.limited_by,
        "error": plan.error,
    }
    return {name: value for name, value in facts.items() if value is not None}
