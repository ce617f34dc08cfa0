"""The rows of snapshots as people give them: typed, frozen, and strict. A row tells everything that is wrong with it at once."""

import uuid
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ModelWrapValidatorHandler, StrictBool, ValidationError, model_validator
from pydantic_core import ErrorDetails, InitErrorDetails, PydanticCustomError

from msm_core.api import AccountHoldingsSet, PositionSet
from msm_core.api.checks import check_text, check_value, shown
from msm_core.api.fields import Json
from msm_core.api.statements import table_of
from msm_core.errors import InvalidRow
from msm_core.models import AccountHoldingsStorage, MetaTable, TargetPositionsStorage
from msm_core.models.accounts import EXPOSURES


def _no_boolean(value: object) -> object:
    if type(value).__name__ in ("bool", "bool_"):  # numpy's too; both would pass for 0 and 1
        raise ValueError("it is a boolean, not a number")
    return value


def _instant(value: object) -> datetime:
    moment = datetime.fromisoformat(value) if isinstance(value, str) else value
    if not isinstance(moment, datetime):
        raise ValueError("it is no datetime")
    if moment.tzinfo is None:
        raise ValueError(f"it has no time zone. Give an offset, for example {moment.isoformat()}+00:00")
    try:
        utc = moment.astimezone(UTC)
        return datetime.combine(utc.date(), utc.timetz())  # a plain one: pandas' own has nanoseconds, which no table has
    except OverflowError:
        raise ValueError("it is outside the years 1 to 9999 in UTC") from None


def _differ(one: object, other: object) -> bool:
    try:
        return uuid.UUID(str(one)) != uuid.UUID(str(other))
    except ValueError:
        return False  # what is no uid is told on its own


def _problem(field: str, reason: str, value: object = None) -> InitErrorDetails:
    return InitErrorDetails(type=PydanticCustomError("snapshot", "{reason}", {"reason": reason}), loc=(field,), input=value)


def _reason(error: ErrorDetails) -> str:
    plainer = {"missing": "it must be given", "extra_forbidden": "it is not a field"}
    return plainer.get(error["type"], error["msg"].removeprefix("Value error, "))


AwareInstant = Annotated[datetime, BeforeValidator(_instant)]
Number = Annotated[float, BeforeValidator(_no_boolean), Field(strict=True, allow_inf_nan=False)]


class SnapshotPart(BaseModel):
    """What is given of a snapshot. None is the same as not given. Raises ValidationError with every problem of it."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    __model__: ClassVar[type[MetaTable]]

    @classmethod
    def _broken_rules(cls, told: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
        """(field, reason) of what is wrong between fields, and with values that the type lets pass."""
        for name in told.keys() & cls.model_fields.keys():
            try:
                check_text(cls.__model__, name, told[name])
                check_value(cls.__model__, table_of(cls.__model__).c[name], told[name], is_key=False)
            except InvalidRow as error:
                yield name, str(error.facts["why"]).removeprefix(f"{name} ").removeprefix(f"{shown(told[name])} ")

    def stored(self, head: Any) -> dict[str, Any]:
        """The row as its table has it."""
        return self.model_dump()

    @model_validator(mode="wrap")
    @classmethod
    def _whole(cls, given: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        """Problems between fields are told together with those of single fields."""
        if not isinstance(given, Mapping):
            return handler(given)
        told = {name: value for name, value in given.items() if value is not None}
        problems = [_problem(field, reason, told.get(field)) for field, reason in cls._broken_rules(told)]
        try:
            row = handler({name: value for name, value in told.items() if name != "asset_identifier" or name in cls.model_fields})
        except ValidationError as error:
            problems += [
                _problem(".".join(map(str, e["loc"])), _reason(e), None if e["type"] == "missing" else e["input"]) for e in error.errors()
            ]
        else:
            if not problems:
                return row
        raise ValidationError.from_exception_data(cls.__name__, problems)


class TargetPosition(SnapshotPart):
    """What an allocation wants of one asset or of one portfolio: exactly one target, and exactly one exposure to it; negative is short.

    target_type, target_uid     follow from asset_uid or portfolio_uid; where given, they must agree with it
    weight_notional_exposure    fraction of the account's notional
    constant_notional_exposure  amount of money
    single_asset_quantity       units of the asset; never of a portfolio
    """

    __model__ = TargetPositionsStorage
    asset_uid: uuid.UUID | None = None
    portfolio_uid: uuid.UUID | None = None
    target_type: Literal["asset", "portfolio"] | None = None
    target_uid: uuid.UUID | None = None
    weight_notional_exposure: Number | None = None
    constant_notional_exposure: Number | None = None
    single_asset_quantity: Number | None = None
    metadata_json: Json | None = None

    @classmethod
    def _broken_rules(cls, told: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
        yield from super()._broken_rules(told)
        if "asset_identifier" in told:
            yield "asset_identifier", "a target names its asset by asset_uid. Give Asset.get(unique_identifier=...).uid"
        targets = [name for name in ("asset_uid", "portfolio_uid") if name in told]
        exposures = [name for name in EXPOSURES if name in told]
        if len(targets) != 1:
            yield "asset_uid, portfolio_uid", f"{'both are' if targets else 'neither is'} given. A target is one asset or one portfolio"
        elif told.get("target_type") in ("asset", "portfolio") and f"{told['target_type']}_uid" != targets[0]:
            yield "target_type", f"it is {told['target_type']}, but {targets[0]} is given. Leave target_type out"
        if len(targets) == 1 and "target_uid" in told and _differ(told["target_uid"], told[targets[0]]):
            yield "target_uid", f"it is not {targets[0]}. Leave target_uid out"
        if len(exposures) != 1:
            yield ", ".join(EXPOSURES), f"{len(exposures)} are given. Give exactly one exposure"
        if "portfolio_uid" in told and "single_asset_quantity" in told:
            yield "single_asset_quantity", "a portfolio has no units. Give a weight or an amount of money"

    def stored(self, head: PositionSet) -> dict[str, Any]:
        derived = {"target_type": "portfolio" if self.asset_uid is None else "asset", "target_uid": self.asset_uid or self.portfolio_uid}
        return {**self.model_dump(), **derived, "position_set_uid": head.uid, "time_index": head.position_set_time}


class AccountHolding(SnapshotPart):
    """What an account holds of one asset, as its custodian sees it.

    asset_identifier   Asset.unique_identifier
    quantity           units, above 0; `direction` has the sign: 1 = long, -1 = short
    is_trade_snapshot  taken for a trade, which was due at `target_trade_time` (UTC)
    """

    __model__ = AccountHoldingsStorage
    asset_identifier: str
    quantity: Annotated[Number, Field(gt=0)]
    direction: Annotated[Literal[1, -1], BeforeValidator(_no_boolean)] = 1
    is_trade_snapshot: StrictBool | None = None
    target_trade_time: AwareInstant | None = None
    extra_details: Json | None = None

    def stored(self, head: AccountHoldingsSet) -> dict[str, Any]:
        return {**self.model_dump(), "holdings_set_uid": head.uid, "account_uid": head.account_uid, "time_index": head.time_index}
