"""What every entry point does first, command line and jobs alike: find the database, choose the portfolios, fix the as-of."""

import os
import re
from collections.abc import Mapping, Sequence
from datetime import UTC, date, datetime, time, timedelta
from pathlib import Path
from typing import Any, NamedTuple

import structlog
from sqlalchemy import Engine

from msm_core.configuration import PortfolioConfiguration
from msm_core.data_nodes.dependencies import dependencies, upstream_of
from msm_core.data_nodes.registration import read_configurations
from msm_core.database import check_server, get_engine, transaction
from msm_core.embedded import EmbeddedPostgres, embedded
from msm_core.errors import ConfigurationError
from msm_core.settings import Settings
from msm_core.storage import verify_prepared
from msm_ray import ledger
from msm_ray.fleet import load_fleet
from msm_ray.select import Selectable, select
from msm_ray.store import store_fleet

log = structlog.get_logger()


def connect() -> Engine:
    """The configured database; the embedded one is started when nothing else is configured."""
    own_server()
    engine = get_engine()
    check_server(engine)
    return engine


def own_server() -> EmbeddedPostgres | None:
    """The embedded server, running, or None when the user has a database of their own."""
    settings = Settings()
    if settings.database_url or settings.database_url_file or os.environ.get("PGSERVICE") or os.environ.get("PGHOST"):
        return None
    server = embedded()
    if server.url() is None:
        log.info("starting the embedded Postgres", home=str(settings.state_path))
    server.start()
    return server


class Chosen(NamedTuple):
    """What a command is about: portfolios, signals by uid that were selected themselves, and stored portfolios that cannot be read."""

    configurations: list[PortfolioConfiguration]
    signals: frozenset[str]
    unreadable: Mapping[str, dict[str, str]]


def choose_portfolios(engine: Engine, file: Path | None, expressions: Sequence[str] | None) -> Chosen:
    """Of the file, which is stored first, or of what is stored; with the portfolios that the chosen ones wait for."""
    fleet = load_fleet(file) if file else None
    with engine.connect() as connection:
        verify_prepared(connection)
    if fleet:
        store_fleet(engine, fleet)
    with transaction(engine, read_only=True) as connection:
        configurations, unreadable = (list(fleet.portfolios), {}) if fleet else read_configurations(connection)
        results = ledger.last_results(connection)
    if not expressions:
        return Chosen(configurations, frozenset(), unreadable)
    chosen = select(expressions, [_selectable(c, results.get(c.identifier, {})) for c in configurations])
    own = [c for c in configurations if c.identifier in chosen.portfolios or c.signal_uid in chosen.signals]
    needed = {c.identifier for c in upstream_of(own, dependencies(configurations))} | chosen.portfolios
    return Chosen([c for c in configurations if c.identifier in needed], chosen.signals, {})


def _selectable(configuration: PortfolioConfiguration, result: dict[str, Any]) -> Selectable:
    markets = configuration.portfolio_markets_configuration
    return Selectable(
        identifier=configuration.identifier,
        tags=frozenset(markets.tags),
        signal_uid=configuration.signal_uid,
        signal_name=markets.signal_name,
        signal_kind=configuration.signal.kind,
        assets=frozenset(configuration.signal.universe),
        status=result.get("status"),
        reason=(result.get("error") or {}).get("reason"),
    )


def parse_as_of(text: str | None, option: str = "--as-of") -> datetime:
    """A date means the end of that UTC day; an instant needs an offset. The default is now, read here once and never below."""
    if text is None:
        return datetime.now(UTC)
    try:
        if re.fullmatch(r"\d{4}-\d{2}-\d{2}", text):
            return datetime.combine(date.fromisoformat(text), time(), UTC) + timedelta(days=1)
        instant = datetime.fromisoformat(text)
    except ValueError:
        raise ConfigurationError(problems=f"{option} {text}: neither a date (2024-06-28) nor an instant (2024-06-28T20:00:00Z)") from None
    if instant.tzinfo is None:
        raise ConfigurationError(problems=f"{option} {text}: an instant needs an offset, for example {text}Z")
    return instant.astimezone(UTC)
