"""Where numbers are read from: frozen pointers to registered storages, never who writes them."""

from typing import Annotated, Any, Literal
from uuid import UUID

from pydantic import AfterValidator, BeforeValidator, SerializeAsAny

from msm_core.identity import Kinds, Spec, logical_identifier, storage_uid

SourceKey = tuple[UUID, tuple[str, str] | None]
PUBLISHED = {"portfolio": "PortfoliosTS", "index": "PortfolioIndexValuesTS"}


class PriceSource(Spec):
    """Any node that exposes price rows keyed by (time_index, asset_identifier); only where they are, never who wrote them."""

    @property
    def source_uid(self) -> UUID:
        """Catalogue uid of the storage that is read or, where there is a policy, of the one that is interpolated."""
        raise NotImplementedError

    @property
    def policy(self) -> tuple[str, str] | None:
        """(frequency, rule) of an interpolation; None: the storage is read as it is."""
        return None

    @property
    def asset_list(self) -> tuple[str, ...] | None:
        """Assets that an interpolation is for; None: those that the portfolios need."""
        return None

    @property
    def key(self) -> SourceKey:
        """What tells price sources apart; two of the same key read the same storage."""
        return self.source_uid, self.policy

    @property
    def pointer(self) -> "PriceSource":
        """What a configuration holds of this source: never a producer of prices, only where they are."""
        return self

    @property
    def identity_payload(self) -> dict[str, Any]:
        return self.model_dump(exclude_none=True)


PRICE_SOURCES: Kinds[PriceSource] = Kinds("price source")

AnyPriceSource = Annotated[SerializeAsAny[PriceSource], BeforeValidator(PRICE_SOURCES.parse), AfterValidator(lambda s: s.pointer)]


class PublishedValues(PriceSource):
    """Values that portfolios of this system publish, keyed by portfolio or by index: what a signal that tracks one reads."""

    kind: Literal["published_values"] = "published_values"
    of: Literal["portfolio", "index"]

    @property
    def source_uid(self) -> UUID:
        return storage_uid(logical_identifier(PUBLISHED[self.of]))
