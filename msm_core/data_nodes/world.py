"""The world that a fleet's plan is decided from: progress, what is held, and how far prices reach. Read set-based by the driver."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date, datetime
from functools import cached_property

from sqlalchemy import Connection

from msm_core.configuration import PortfolioConfiguration
from msm_core.data_nodes.interpolated_prices import Resolved, resolve_sources
from msm_core.data_nodes.portfolios import portfolio_scopes
from msm_core.data_nodes.signals import asset_names
from msm_core.errors import MsmError, SourceUnusable
from msm_core.models import SignalWeightsStorage
from msm_core.price_sources import PriceSource, SourceKey
from msm_core.signals import Signal
from msm_core.sources import AssetFacts, Source, price_coverage, read_assets
from msm_core.storage import ProgressRows, Scope, held_assets, read_progress

Bounds = Mapping[str, tuple[datetime, datetime]]  # first and last bar per asset


@dataclass(frozen=True)
class World:
    """What the plan of a fleet is decided from, all of it read in a fixed number of statements.

    needed     assets of each portfolio: its universe, what it holds, its override asset
    assets     those of them that are registered, and what the registry says of them
    coverage   of the prices that are read, by (source, column); where they are interpolated, of what is stored
    wanted     assets that are to be interpolated, by key
    originals  coverage of the bars that they are made from
    """

    progress: ProgressRows
    held: Mapping[str, tuple[str, ...]]
    needed: Mapping[str, set[str]]
    resolved: Resolved
    assets: Mapping[str, AssetFacts]
    coverage: Mapping[tuple[SourceKey, str], Bounds]
    wanted: Mapping[SourceKey, set[str]]
    originals: Mapping[SourceKey, Bounds]

    @cached_property
    def delisted(self) -> dict[str, date]:
        """Last trading days of the assets that have one."""
        return {asset: facts.delisted_on for asset, facts in self.assets.items() if facts.delisted_on is not None}


def read_world(
    connection: Connection, configurations: Sequence[PortfolioConfiguration], as_of: datetime, price_sources: Iterable[PriceSource] = ()
) -> World:
    """Statements: five, one more per (source, column), and where prices are interpolated one per storage and one more.

    price_sources  that are of interest beside those of the portfolios
    """
    held = held_assets(connection, [c.identifier for c in configurations])
    needed = {c.identifier: {*c.signal.universe, *held.get(c.identifier, ()), *c.signal.override} for c in configurations}
    uses = [*((p, None, ()) for p in price_sources), *_uses(configurations, needed)]
    resolved = resolve_sources(connection, [source for source, _, _ in uses])
    interpolated: dict[SourceKey, set[str]] = {key: set() for key in resolved.storages if isinstance(resolved.sources[key], Source)}
    wanted: dict[tuple[SourceKey, str], set[str]] = {}
    for price_source, column, assets in uses:
        if price_source.key in interpolated:
            interpolated[price_source.key].update(assets if price_source.asset_list is None else price_source.asset_list)
        if column is not None and source_error(resolved.sources[price_source.key], column) is None:
            wanted.setdefault((price_source.key, column), set()).update(assets)
    scopes = [s for c in configurations for s in (*portfolio_scopes(c, has_orders=True), Scope(SignalWeightsStorage, c.signal_uid))]
    scopes += [Scope(resolved.storages[key], asset) for key, assets in interpolated.items() for asset in assets]
    progress = read_progress(connection, {s.uid for s in scopes})
    named = (*needed.values(), *interpolated.values(), *map(asset_names, _signals(configurations)))
    known = read_assets(connection, {a for names in named for a in names})
    coverage: dict[tuple[SourceKey, str], Bounds] = {}
    for (key, column), names in wanted.items():
        source = resolved.sources[key]
        assert isinstance(source, Source)  # else it would have an error
        coverage[key, column] = price_coverage(connection, source, column, sorted(names), as_of)
    originals = {
        key: price_coverage(connection, resolved.origins[key], "close", sorted(names), as_of) for key, names in interpolated.items()
    }
    return World(progress, held, needed, resolved, known, coverage, interpolated, originals)


def with_coverage(world: World, coming: Mapping[SourceKey, Bounds]) -> World:
    """The world once what is `coming` in some sources is there."""
    coverage = {(key, column): {**stored, **coming.get(key, {})} for (key, column), stored in world.coverage.items()}
    return replace(world, coverage=coverage)


def price_sources_of(configurations: Sequence[PortfolioConfiguration]) -> list[PriceSource]:
    """Everything that a fleet reads numbers from, portfolios and their signals."""
    return [source for source, _, _ in _uses(configurations, {c.identifier: set() for c in configurations})]


def _signals(configurations: Sequence[PortfolioConfiguration]) -> list[Signal]:
    """Distinct ones, whoever follows them."""
    return list({c.signal_uid: c.signal for c in configurations}.values())


def _uses(
    configurations: Sequence[PortfolioConfiguration], needed: Mapping[str, set[str]]
) -> Iterable[tuple[PriceSource, str, Iterable[str]]]:
    """(source, column, assets) of everything that the fleet reads."""
    for c in configurations:
        yield c.price_source, c.price_column, needed[c.identifier]
        if rate := c.execution.cash_rate:
            yield rate.source, rate.column, (rate.identifier,)
    for signal in _signals(configurations):
        yield from ((request.source, request.column, request.identifiers) for request in signal.requests)
        if (location := signal.weights_location) and location.source:
            yield location.source, location.column, signal.universe


def source_error(source: Source | MsmError, column: str, liquidity_column: str | None = None) -> MsmError | None:
    """Why numbers of `column` cannot be read from a source, or a strategy cannot do without `liquidity_column`; None = they can."""
    if isinstance(source, MsmError):
        return source
    wrong = list(source.problems)
    if column not in source.numeric:
        wrong.append(f"it has no numeric column {column!r}, only {', '.join(source.numeric)}; correct the name of the column")
    if liquidity_column is not None and liquidity_column not in source.numeric:
        wrong.append(f"the rebalance strategy needs its numeric column {liquidity_column!r}, which it does not have")
    return SourceUnusable(source=source.identifier, why=wrong[0]) if wrong else None
