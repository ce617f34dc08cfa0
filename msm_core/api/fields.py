"""What the fields of rows are declared with, and how writing gets the signature of the fields."""

from collections.abc import Callable
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any, ParamSpec, TypeVar
from zoneinfo import ZoneInfo

from pydantic import AfterValidator, ValidationInfo

from msm_core.errors import NaiveTimestamp

if TYPE_CHECKING:
    P = ParamSpec("P")
    R = TypeVar("R")

    class constructor_like:
        """A class method with the arguments of the row's own constructor, so that editors and type checkers know every field."""

        def __init__(self, function: Callable[..., object]) -> None: ...
        def __get__(self, instance: object, owner: Callable[P, R]) -> Callable[P, R]: ...
else:
    constructor_like = classmethod


def _in_utc(value: datetime, info: ValidationInfo) -> datetime:
    if value.tzinfo is None:
        raise NaiveTimestamp(what=info.context or info.field_name, value=value.isoformat())
    return value.astimezone(UTC)


def _zone(value: str) -> str:
    try:
        ZoneInfo(value)
    except (KeyError, ValueError, OSError):  # unknown, not a plain name, or a folder of the zone database
        raise ValueError("it is not an IANA time zone, such as America/New_York") from None
    return value


Instant = Annotated[datetime, AfterValidator(_in_utc)]  # an aware datetime, else NaiveTimestamp; kept in UTC
Zone = Annotated[str, AfterValidator(_zone)]
Json = dict[str, Any]
