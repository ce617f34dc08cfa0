"""Persistent interpolation: a price source of its own, and the nodes that write it, one per asset.

`InterpolatedPrices` is what a configuration holds: a source and a policy. Both name one storage, which `prepare` makes and the whole
fleet shares; each asset in it keeps progress of its own, so one that lags, or is listed later, holds back nobody else.
"""

import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import lru_cache
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, AwareDatetime, BaseModel, ConfigDict, Field, field_validator, model_validator
from sqlalchemy import Connection

from msm_core.data_nodes.base import NodeResult
from msm_core.data_nodes.prices import APIDataNode
from msm_core.errors import (
    MsmError,
    SourceNotRegistered,
    SourceUnusable,
    StorageCollision,
    StorageMismatch,
    StorageNotPrepared,
)
from msm_core.frames import format_frequency, parse_frequency
from msm_core.identity import Spec, identity
from msm_core.interpolation import InterpolationRule
from msm_core.models import InterpolatedPricesStorage
from msm_core.price_sources import PRICE_SOURCES, AnyPriceSource, PriceSource, SourceKey
from msm_core.signals.base import AssetIdentifier, sorted_unique
from msm_core.sources import Source, grain_problems, read_sources
from msm_core.storage import Scope

AssetList = Annotated[tuple[AssetIdentifier, ...], Field(min_length=1), AfterValidator(lambda assets: sorted_unique(assets, "asset_list"))]


class InterpolatedPricesConfig(Spec):
    """What is interpolated, and how.

    source_price_instance | source_time_index_meta_table_uid  exactly one: a node, or the catalogue uid of its storage
    upsample_frequency_id            length of a bar given out: the source's cadence, or for intraday bars a whole multiple of it
    intraday_bar_interpolation_rule  ffill: a gap is filled from the bar before it; none: a gap fails the asset
    asset_list                       assets to interpolate; None = those that the portfolios need. No part of the storage's identity
    """

    kind: Literal["interpolated_prices_config"] = "interpolated_prices_config"
    source_price_instance: AnyPriceSource | None = None
    source_time_index_meta_table_uid: uuid.UUID | None = None
    upsample_frequency_id: str
    intraday_bar_interpolation_rule: InterpolationRule
    asset_list: AssetList | None = None

    @field_validator("upsample_frequency_id")
    @classmethod
    def _one_spelling(cls, value: str) -> str:
        frequency = parse_frequency(value)
        if frequency > timedelta(days=1):
            raise ValueError("upsample_frequency_id is 1d at most")
        return format_frequency(frequency)

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.source_price_instance is None) == (self.source_time_index_meta_table_uid is None):
            raise ValueError("give exactly one of source_price_instance and source_time_index_meta_table_uid")
        if self.source_price_instance is not None and self.source_price_instance.policy is not None:
            raise ValueError("source_price_instance is interpolated already; give the source that it is made from")
        return self

    @property
    def source(self) -> PriceSource:
        """The source, however it is given."""
        if self.source_time_index_meta_table_uid is not None:
            return APIDataNode.build_from_table_uid(self.source_time_index_meta_table_uid)
        assert self.source_price_instance is not None
        return self.source_price_instance


@PRICE_SOURCES.register
class InterpolatedPrices(PriceSource):
    """Bars of a registered source without gaps, in a storage of their own that `msm-ray prepare` makes."""

    kind: Literal["interpolated_prices"] = "interpolated_prices"
    interpolation_config: InterpolatedPricesConfig

    @property
    def source_uid(self) -> uuid.UUID:
        return self.interpolation_config.source.source_uid

    @property
    def policy(self) -> tuple[str, str]:
        return self.interpolation_config.upsample_frequency_id, self.interpolation_config.intraday_bar_interpolation_rule

    @property
    def asset_list(self) -> tuple[str, ...] | None:
        return self.interpolation_config.asset_list

    @property
    def identity_payload(self) -> dict[str, object]:
        """Source and policy: how the source is given, and for which assets, changes no number."""
        frequency, rule = self.policy
        return {"kind": self.kind, "source": self.source_uid, "upsample_frequency_id": frequency, "intraday_bar_interpolation_rule": rule}

    def _uid(self) -> str:
        return identity(self.identity_payload)

    def dependencies(self) -> dict[str, PriceSource]:
        """The source that is interpolated."""
        return {"source_prices": self.interpolation_config.source}

    def run(
        self, debug_mode: bool = True, update_tree: bool = True, force_update: bool = False, as_of: datetime | None = None
    ) -> list[NodeResult]:
        """Bring the assets of `asset_list` up to date in this process; asked again, it writes nothing. One result per asset.

        debug_mode, update_tree, force_update  accepted for callers of the documented form: an update is idempotent, and the source
                                               belongs to whoever writes it
        Raises StorageNotPrepared, SourceNotRegistered, SourceUnusable, and NodeFailed with what is wrong with the first bad asset.
        """
        from msm_core.data_nodes.local import run_prices  # it stands above this module

        return run_prices(self, as_of)


@lru_cache(maxsize=2**17)
def _scope(storage: type[InterpolatedPricesStorage], asset: str) -> Scope:
    """The same object each time: the uid that it has worked out is asked for at every step of an update."""
    return Scope(storage, asset)


class InterpolatedAsset(BaseModel):
    """The node that writes one asset of one interpolated storage.

    calendar_uid               calendar of the asset; None = it trades around the clock
    watermark, expected_epoch  progress that the plan saw; a node that has moved since is reported busy
    replace                    compute from scratch and replace what is stored of the asset
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    source_time_index_meta_table_uid: uuid.UUID
    source_cadence: str
    upsample_frequency_id: str
    intraday_bar_interpolation_rule: InterpolationRule
    asset_identifier: str
    calendar_uid: uuid.UUID | None = None
    watermark: AwareDatetime | None = None
    replace: bool = False
    expected_epoch: int | None = None

    @property
    def storage(self) -> type[InterpolatedPricesStorage]:
        return InterpolatedPricesStorage.configured(
            self.source_time_index_meta_table_uid,
            self.source_cadence,
            self.upsample_frequency_id,
            self.intraday_bar_interpolation_rule,
        )

    @property
    def identifier(self) -> str:
        return f"{self.storage.logical_name()}/{self.asset_identifier}"

    @property
    def scopes(self) -> tuple[Scope, ...]:
        return (_scope(self.storage, self.asset_identifier),)

    @property
    def configuration_hash(self) -> str:
        """What its rows are computed by: the policy of the storage, and the asset's calendar."""
        return identity({"kind": "interpolated_asset", **self.storage.__metatable_extra_hash_components__, "calendar": self.calendar_uid})

    @property
    def source_key(self) -> SourceKey:
        """Key of the price sources that read what it writes."""
        return self.source_time_index_meta_table_uid, (self.upsample_frequency_id, self.intraday_bar_interpolation_rule)

    @property
    def since(self) -> datetime | None:
        return None if self.replace else self.watermark


# -- storages -----------------------------------------------------------------------------------------------------------------


def storage_of(price_source: PriceSource, source: Source) -> type[InterpolatedPricesStorage]:
    """The storage of a policy over a source, as the catalogue knows the source: `prepare` and every run derive it here.

    Raises SourceUnusable for a cadence that is not told, or that the policy's frequency does not fit.
    """
    assert price_source.policy is not None
    frequency, rule = price_source.policy
    if source.cadence is None:
        raise SourceUnusable(source=source.identifier, why="its cadence is not in the catalogue; register it with one, such as 1d or 5m")
    cadence, asked = parse_frequency(source.cadence), parse_frequency(frequency)
    day = timedelta(days=1)
    wrong = [
        *((True, problem) for problem in grain_problems(source.columns, readable=True)),  # rights are the reader's own affair
        (cadence > day, f"a cadence of {source.cadence} is longer than a day"),
        (cadence == day and asked != day, f"daily bars can only be given out as 1d, not {frequency}; correct upsample_frequency_id"),
        (asked % cadence != timedelta(0), f"{frequency} is no whole multiple of its cadence {source.cadence}; correct either"),
        (cadence < day and source.time_label != "close", "intraday bars must be stamped at their end: time label close"),
        ("close" not in source.numeric, f"it has no numeric column close, only {', '.join(source.numeric)}"),
    ]
    if why := next((reason for is_wrong, reason in wrong if is_wrong), None):
        raise SourceUnusable(source=source.identifier, why=why)
    return InterpolatedPricesStorage.configured(source.uid, format_frequency(cadence), frequency, rule)


@dataclass(frozen=True)
class Resolved:
    """Price sources of a fleet as the catalogue knows them, or the error that says why one cannot be used.

    sources   the storage that is read, by key
    storages  class of an interpolated one
    origins   the source that is interpolated
    """

    sources: Mapping[SourceKey, Source | MsmError]
    storages: Mapping[SourceKey, type[InterpolatedPricesStorage]]
    origins: Mapping[SourceKey, Source]


def resolve_sources(connection: Connection, price_sources: Iterable[PriceSource]) -> Resolved:
    """In one statement, or two where prices are interpolated."""
    wanted = {p.key: p for p in price_sources}
    registered = read_sources(connection, {p.source_uid for p in wanted.values()})
    sources: dict[SourceKey, Source | MsmError] = {}
    storages: dict[SourceKey, type[InterpolatedPricesStorage]] = {}
    for key, price_source in wanted.items():
        source = registered.get(price_source.source_uid)
        if source is None:
            known = ", ".join(sorted(s.identifier for s in registered.values())) or "none of this fleet's"
            sources[key] = SourceNotRegistered(source=str(price_source.source_uid), known=known)
        elif price_source.policy is None:
            sources[key] = source
        elif not source.readable:
            sources[key] = SourceUnusable(source=source.identifier, why=grain_problems(source.columns, source.readable)[0])
        else:
            try:
                storages[key] = storage_of(price_source, source)
            except MsmError as error:
                sources[key] = error
    configured = read_sources(connection, [s.storage_uid() for s in storages.values()]) if storages else {}
    sources |= {key: _checked(storage, configured.get(storage.storage_uid())) for key, storage in storages.items()}
    return Resolved(sources, storages, {key: registered[key[0]] for key in storages})


def _checked(storage: type[InterpolatedPricesStorage], found: Source | None) -> Source | MsmError:
    if found is None or not found.columns:
        return StorageNotPrepared(tables=storage.__tablename__)
    if dict(found.components) != storage.__metatable_extra_hash_components__:
        return StorageCollision(storage=found.identifier, stored=dict(found.components), given=storage.__metatable_extra_hash_components__)
    if absent := sorted(set(storage.__table__.columns.keys()) - set(found.columns)):
        return StorageMismatch(differences=f"{found.table}: it lacks {', '.join(absent)}")
    return found
