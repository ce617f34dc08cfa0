"""Signal nodes: each distinct signal is computed once per run, whoever follows it."""

import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import numpy as np
from pydantic import AwareDatetime, BaseModel, ConfigDict
from sqlalchemy import Connection

from msm_core.configuration import AnySignal
from msm_core.copying import Block, Text
from msm_core.data_nodes.base import NodeResult, input_digest
from msm_core.data_nodes.calendars import resolve_calendars
from msm_core.data_nodes.interpolated_prices import resolve_sources
from msm_core.data_nodes.markets import Calendars, MarketKey, Markets, Need, Sources, read_markets
from msm_core.data_nodes.weight_files import read_weight_file
from msm_core.errors import InvalidWeight, MsmError, SourceUnusable, UnknownAssets
from msm_core.frames import SignalRows, earliest, iso, to_datetime, utc
from msm_core.models import SignalWeightsStorage
from msm_core.price_sources import PriceSource, PublishedValues
from msm_core.signals import Signal, Vectors
from msm_core.signals.base import Inputs, Request, WeightsLocation
from msm_core.signals.computed import ComputedSignal
from msm_core.sources import AssetFacts, delistings, read_assets, read_weight_rows
from msm_core.storage import Advance, ProgressRows, Scope


class SignalWeights(BaseModel):
    """The node that writes a signal's vectors to SignalWeightsStorage, under its own signal_uid.

    watermark, expected_epoch  progress that the plan saw; a node that has moved since is reported busy
    replace                    compute from scratch and replace everything that is stored
    signal_uid                 worked out by the driver; None = not yet
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    signal_weights_instance: AnySignal
    watermark: AwareDatetime | None = None
    replace: bool = False
    expected_epoch: int | None = None
    signal_uid: str | None = None

    def model_post_init(self, _context: Any) -> None:
        if self.signal_uid:
            self.signal_weights_instance.remember("uid", self.signal_uid)

    @property
    def identifier(self) -> str:
        return self.signal_weights_instance.uid

    @property
    def scopes(self) -> tuple[Scope, ...]:
        return (Scope(SignalWeightsStorage, self.identifier),)

    @property
    def data_node_uid(self) -> uuid.UUID:
        """Uid of its progress row, to which Portfolio rows point."""
        return self.scopes[0].uid

    @property
    def since(self) -> datetime | None:
        """Start of its window: its own watermark, never another signal's; None = from scratch."""
        return None if self.replace else self.watermark

    def dependencies(self) -> dict[str, PriceSource]:
        """What it reads: by name of the request, prices or published values; nothing for a signal that needs nothing."""
        signal = self.signal_weights_instance
        location = signal.weights_location
        read = {"weights": location.source} if location and location.source else {}
        return {**read, **{request.name: request.source for request in signal.requests}}

    def run(
        self, debug_mode: bool = True, update_tree: bool = True, force_update: bool = False, as_of: datetime | None = None
    ) -> NodeResult:
        """Bring this signal up to date in this process; see `PortfoliosDataNode.run` for the arguments."""
        from msm_core.data_nodes.local import run_signal  # it stands above this module

        return run_signal(self, as_of)


@dataclass(frozen=True)
class Outside:
    """Inputs that belong to others; `weights` are those of external signals, by signal uid."""

    sources: Sources
    calendars: Calendars
    markets: Markets
    assets: Mapping[str, AssetFacts]
    weights: Mapping[str, SignalRows | MsmError]
    as_of: datetime


@dataclass(frozen=True)
class SignalKind:
    """How a batch of signals is brought up to date."""

    name: str = "signal"

    def read_outside(self, connection: Connection, nodes: Sequence[SignalWeights], as_of: datetime, world: str | None) -> Outside:
        """Statements: one; where signals are computed one or two for sources, two for calendars, one per (source, column); one per table
        of weights."""
        signals = [node.signal_weights_instance for node in nodes]
        assets = read_assets(connection, {a for signal in signals for a in asset_names(signal)})
        read = [source for node in nodes for source in node.dependencies().values()]
        sources = resolve_sources(connection, read).sources if read else {}
        keys = {s.calendar_key for s in signals if isinstance(s, ComputedSignal)}
        calendars = resolve_calendars(connection, keys, as_of) if keys else {}
        markets = read_markets(connection, needs_of(nodes), sources, calendars, delistings(assets), as_of, inside=False, world=world)
        return Outside(sources, calendars, markets, assets, _read_weights(connection, nodes, sources, as_of), as_of)

    def read_inside(self, connection: Connection, nodes: Sequence[SignalWeights], progress: ProgressRows, outside: Outside) -> Markets:
        """One statement per (source, column) that this system writes."""
        world = (outside.sources, outside.calendars, delistings(outside.assets), outside.as_of)
        return {**outside.markets, **read_markets(connection, needs_of(nodes), *world, inside=True)}

    def update(self, node: SignalWeights, progress: ProgressRows, outside: Outside, inside: Markets, as_of: datetime) -> list[Advance]:
        signal, scope = node.signal_weights_instance, node.scopes[0]
        unknown = sorted(asset_names(signal) - outside.assets.keys())
        if unknown:
            raise UnknownAssets(owner=f"signal {node.identifier}", assets=", ".join(unknown))
        before = progress[scope.uid]
        since = None if node.replace or before.watermark is None else utc(before.watermark, "watermark")
        inputs = _inputs(node, outside, inside)
        through = utc(as_of, "as_of")
        if isinstance(signal, ComputedSignal):
            computed = signal.computed_through(inputs, since, through)
            if computed is None or (since is not None and computed <= since):
                return []
            through = computed
            assert inputs.sessions is not None
            inputs.sessions.require(through if since is None else since, through)
        vectors = signal.emit(since, through, inputs)
        if not isinstance(signal, ComputedSignal):
            if not len(vectors.times):
                return []
            through = vectors.times[-1]
        block, rows = _block(node.identifier, vectors)
        return [
            Advance(
                scope=scope,
                epoch=before.epoch,
                watermark=to_datetime(through),
                row_count=rows + (0 if node.replace else before.row_count),
                configuration_hash=node.identifier,
                code_version=signal.code_version,
                input_digest=input_digest(signal.universe, vectors.times, vectors.weights),
                block=block if rows else None,
                replace=node.replace,
            )
        ]

    def finish(self, connection: Connection, nodes: Sequence[SignalWeights]) -> None:
        return None


# -- reading ------------------------------------------------------------------------------------------------------------------


def asset_names(signal: Signal) -> set[str]:
    """Everything that must be a registered asset: its universe, and what it is given prices of."""
    return {*signal.universe, *(a for r in signal.requests if not isinstance(r.source, PublishedValues) for a in r.identifiers)}


def market_key(signal: ComputedSignal, request: Request) -> MarketKey:
    policy = signal.price_alignment_policy
    return MarketKey(request.source.key, request.column, signal.calendar_key, signal.frequency, policy, None, request.zero_allowed)


def needs_of(nodes: Iterable[SignalWeights]) -> list[Need]:
    """What computed signals must be given: their windows, and as much before them as a vector or its staleness looks back."""
    needs = []
    for node in nodes:
        signal = node.signal_weights_instance
        if isinstance(signal, ComputedSignal):
            history = max(signal.history_sessions, signal.stale_after_sessions or 0) + 1
            needs += [Need(market_key(signal, r), r.identifiers, node.since, history) for r in signal.requests]
    return needs


def _read_weights(
    connection: Connection, nodes: Sequence[SignalWeights], sources: Sources, as_of: datetime
) -> dict[str, SignalRows | MsmError]:
    """Rows of external weights; equal locations are read once."""
    groups: dict[tuple[Any, str, str | None], list[SignalWeights]] = {}
    for node in nodes:
        if location := node.signal_weights_instance.weights_location:
            groups.setdefault((location.source and location.source.key, location.column, location.path), []).append(node)
    found: dict[str, SignalRows | MsmError] = {}
    for members in groups.values():
        location = members[0].signal_weights_instance.weights_location
        since = earliest(node.since for node in members)
        assert location is not None
        try:
            rows: SignalRows | MsmError = _weights_at(connection, location, sources, since, as_of)
        except MsmError as error:
            rows = error
        found |= {node.identifier: rows for node in members}
    return found


def _weights_at(connection: Connection, location: WeightsLocation, sources: Sources, since: datetime | None, as_of: datetime) -> SignalRows:
    if location.source is None:
        assert location.path is not None
        return read_weight_file(location.path, location.column)
    source = sources[location.source.key]
    if isinstance(source, MsmError):
        raise source
    if location.column not in source.numeric:
        why = f"it has no numeric column {location.column!r}, only {', '.join(source.numeric)}; set weight_column"
        raise SourceUnusable(source=source.identifier, why=why)
    return read_weight_rows(connection, source, location.column, since, as_of)


def _inputs(node: SignalWeights, outside: Outside, markets: Markets) -> Inputs:
    """What one signal is given. Raises the error of an input that could not be read."""
    signal = node.signal_weights_instance
    rows = outside.weights.get(node.identifier)
    if isinstance(rows, MsmError):
        raise rows
    if not isinstance(signal, ComputedSignal):
        return Inputs(rows=rows)
    panels = {}
    for request in signal.requests:
        market = markets[market_key(signal, request)]
        if isinstance(market, MsmError):
            raise market
        panels[request.name] = market
    sessions = outside.calendars[signal.calendar_key]
    if isinstance(sessions, MsmError):
        raise sessions
    grid = max((panel.grid for panel in panels.values()), key=len)  # they all end at the as-of
    return Inputs(sessions, {r.name: panels[r.name].viewed(r.identifiers, grid) for r in signal.requests})


def _block(signal_uid: str, vectors: Vectors) -> tuple[Block, int]:
    """Rows of the vectors. Zeros are left out, as an absent asset means 0; an all-zero vector keeps one, or it would not exist."""
    bad = np.argwhere(~np.isfinite(vectors.weights))
    if len(bad):
        row, asset = (int(i) for i in bad[0])
        facts = {"asset": vectors.assets[asset], "time": iso(vectors.times[row]), "value": float(vectors.weights[row, asset])}
        raise InvalidWeight(owner=f"signal {signal_uid}", **facts)
    kept = vectors.weights != 0
    kept[~kept.any(axis=1), 0] = True
    row, asset = np.nonzero(kept)
    block = {
        "signal_uid": Text.constant(signal_uid, len(row)),
        "time_index": vectors.times[row],
        "asset_identifier": Text(asset, vectors.assets),
        "signal_weight": vectors.weights[row, asset],
    }
    return block, len(row)
