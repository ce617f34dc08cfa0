"""Storing a fleet: its calendars, identity rows and configurations."""

from sqlalchemy import Engine, inspect

import msm_core
from msm_core.api import Calendar, CalendarDate, CalendarSession
from msm_core.data_nodes.registration import read_configurations, register_portfolios
from msm_core.data_nodes.world import price_sources_of
from msm_core.database import transaction
from msm_core.models import PortfolioConfigurationTable
from msm_core.price_sources import PriceSource
from msm_ray.fleet import CalendarRequest, Fleet


def stored_price_sources(engine: Engine) -> list[PriceSource]:
    """Price sources of all stored portfolios; none where nothing can be stored yet."""
    with transaction(engine, read_only=True) as connection:
        if not inspect(connection).has_table(PortfolioConfigurationTable.__tablename__):
            return []
        return price_sources_of(read_configurations(connection).configurations)


def store_fleet(engine: Engine, fleet: Fleet) -> int:
    """Make everything stored that the fleet needs; returns how many configurations are new or changed. Idempotent."""
    msm_core.start_engine(models=[Calendar, CalendarDate, CalendarSession])
    for request in fleet.calendars:
        _store_calendar(request)
    with engine.begin() as connection:
        return register_portfolios(connection, fleet.portfolios)


def _store_calendar(request: CalendarRequest) -> None:
    """Materialise a calendar unless it is stored already and covers the range: scheduling takes the library a second."""
    stored = Calendar.get_or_none(unique_identifier=request.unique_identifier)
    if stored and stored.valid_from <= request.valid_from and stored.valid_to >= request.valid_to:
        return
    Calendar.create_from_pandas_calendar(
        source_identifier=request.pandas_calendar,
        unique_identifier=request.unique_identifier,
        display_name=request.display_name or request.unique_identifier,
        valid_from=request.valid_from,
        valid_to=request.valid_to,
        timezone=request.timezone,
    )
