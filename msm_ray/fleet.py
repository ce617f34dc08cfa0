"""fleet.yaml -> PortfolioConfiguration objects.

1. `yaml_lines.Document` reads the file and its includes as one; `FleetFile` checks it, key by key.
2. Signals, rebalance strategies and price sources are built, equal ones once; portfolios name them, or spell them out.
3. A matrix is written out, one portfolio for every combination; each portfolio gets the defaults under it.

Whatever is wrong is told together, at its line. Only the built objects are hashed: files, order, comments, matrices reach no identity.
"""

import itertools
import json
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Annotated, Any, Literal, get_args
from zoneinfo import ZoneInfo

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, GetJsonSchemaHandler, TypeAdapter

from msm_core.configuration import (
    CashRate,
    PortfolioBuildConfiguration,
    PortfolioConfiguration,
    PortfolioExecutionConfiguration,
    PortfolioMarketsConfig,
    PriceAlignmentPolicy,
)
from msm_core.data_nodes.dependencies import dependencies
from msm_core.data_nodes.interpolated_prices import InterpolatedPrices, InterpolatedPricesConfig
from msm_core.data_nodes.prices import APIDataNode
from msm_core.errors import ConfigurationError
from msm_core.garbage import collecting_seldom
from msm_core.identity import Kinds, Spec, current_namespace
from msm_core.interpolation import InterpolationRule
from msm_core.price_sources import PriceSource
from msm_core.rebalance_strategy import REBALANCE_STRATEGIES
from msm_core.signals import SIGNALS
from msm_core.signals.base import AssetIdentifier, sorted_unique
from msm_ray.yaml_lines import Document, Keys, did_you_mean, shown

PARTS = ("signal", "rebalance", "prices")  # of a portfolio, by name
KINDS: dict[str, tuple[str, Kinds[Any]]] = {"signal": ("signals", SIGNALS), "rebalance": ("rebalance", REBALANCE_STRATEGIES)}
SHORTHANDS: dict[str, tuple[str, dict[str, Any]]] = {  # key -> the field it stands for, of any kind that has it, and its JSON Schema
    "universe": ("asset_list", {"type": "string"}),
    "weights": ("asset_unique_identifier_weights", {"type": "object", "additionalProperties": {"type": "number"}}),
    "prices": ("price_source", {"type": "string"}),
}
SPELLED = {"upsample_frequency_id": "frequency", "intraday_bar_interpolation_rule": "rule", "asset_list": "assets"}
UID = re.compile(r"(?i)[0-9a-f]{8}-?([0-9a-f]{4}-?){3}[0-9a-f]{12}")
PLACEHOLDER = re.compile(r"\{\{|\}\}|\{([^{}]*)\}")


def _identifier(value: str) -> str:
    """Two spellings that look the same would be two portfolios, so only the composed one is taken."""
    if not unicodedata.is_normalized("NFC", value):
        raise ValueError(f"{shown(value)} is not in Unicode NFC; write {json.dumps(unicodedata.normalize('NFC', value))}")
    if any(unicodedata.category(c) in ("Cc", "Zl", "Zp") for c in value):
        raise ValueError(f"{json.dumps(value)} holds a control character")
    return value


@dataclass(frozen=True)
class AnyOf:
    """Annotation: the JSON Schema of whatever models there are by the time it is asked for, or of a name. Specs take shorthands."""

    models: Callable[[], Iterable[type[BaseModel]]]
    names: bool = False

    def __get_pydantic_json_schema__(self, _: Any, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        options: list[dict[str, Any]] = [{"type": "string"}] if self.names else []
        for model in self.models():
            options.append(handler(model.__pydantic_core_schema__))
            schema, short = handler.resolve_ref_schema(options[-1]), shorthands_of(model)
            schema["properties"].update({key: SHORTHANDS[key][1] for key in short.values()})
            required = {*schema.get("required", ()), *(["kind"] if issubclass(model, Spec) else ())}
            schema["required"] = sorted(required.difference(short))
        return {"anyOf": options}


def shorthands_of(model: type[BaseModel]) -> dict[str, str]:
    """Fields of specs of this class, and the shorthands that stand for them."""
    return {name: key for key, (name, _) in SHORTHANDS.items() if name in model.model_fields and key not in model.model_fields}


Identifier = Annotated[str, Field(min_length=1, max_length=255), AfterValidator(_identifier)]
Universe = Annotated[list[AssetIdentifier], Field(min_length=1), AfterValidator(lambda assets: list(sorted_unique(assets, "the universe")))]


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class CalendarEntry(Section):
    """A pandas-market-calendars calendar to materialise, both dates included."""

    pandas_calendar: str = Field(min_length=1, max_length=255)
    valid_from: date
    valid_to: date
    display_name: str | None = Field(default=None, max_length=255)
    timezone: Annotated[str, AfterValidator(lambda name: str(TypeAdapter(ZoneInfo).validate_python(name)))] | None = None


class CalendarRequest(CalendarEntry):
    unique_identifier: Identifier


class Interpolation(Section):
    """Bars without gaps, in a storage that `prepare` makes; `assets`: a universe, or a list, instead of what the portfolios need."""

    frequency: str = Field(pattern=r"^[1-9]\d{0,5}[mhd]$")
    rule: InterpolationRule
    assets: Annotated[Any, AnyOf(tuple, names=True)] = None


class PriceEntry(Section):
    """Where prices are: `source` is an identifier in the catalogue, or its uid."""

    source: str = Field(min_length=1, max_length=255)
    interpolate: Interpolation | None = None


class CashRateEntry(CashRate):
    source: str = Field(min_length=1, max_length=255)  # a name of the prices section


class ExecutionEntry(PortfolioExecutionConfiguration):
    cash_rate: CashRateEntry | None = None


class Defaults(Section):
    """What every portfolio has unless it says otherwise; `execution` and `price_alignment_policy` key by key."""

    signal: Annotated[Any, AnyOf(SIGNALS.classes.values, names=True)] = None
    rebalance: Annotated[Any, AnyOf(REBALANCE_STRATEGIES.classes.values, names=True)] = None
    prices: Annotated[Any, AnyOf(tuple, names=True)] = None  # a name only
    price_column: str | None = Field(default=None, min_length=1, max_length=63)
    frequency: str | None = Field(default=None, pattern=r"^[1-9]\d{0,5}[mhd]$", serialization_alias="portfolio_prices_frequency")
    start_date: date | None = None
    execution: ExecutionEntry = ExecutionEntry()
    price_alignment_policy: PriceAlignmentPolicy = PriceAlignmentPolicy()
    tags: tuple[Identifier, ...] = ()


class PortfolioEntry(Defaults):
    """One portfolio. Its signal, rebalance strategy and prices may come from the defaults."""

    id: Identifier = Field(serialization_alias="portfolio_identifier")
    name: str | None = Field(default=None, serialization_alias="portfolio_name")
    description: str | None = None
    publish_index: Identifier | None = Field(default=None, serialization_alias="portfolio_index_identifier")


class MatrixEntry(Section):
    """One portfolio for every combination of the values of a matrix: `{key}` in a text stands for one of them."""

    model_config = ConfigDict(extra="allow")  # the rest is a PortfolioEntry once the values are filled in

    id: str
    matrix: dict[Annotated[str, Field(pattern=r"^[A-Za-z_]\w*$")], Annotated[list[Any], Field(min_length=1)]] = Field(min_length=1)


class FleetFile(Section):
    """A fleet of portfolios, in one file or many. A name, and each key of the defaults, is given once in all of them."""

    version: Literal[1]
    namespace: str = ""
    calendars: dict[Identifier, CalendarEntry] = {}
    prices: dict[Identifier, PriceEntry] = {}
    universes: dict[Identifier, Universe] = {}
    signals: dict[Identifier, Annotated[dict[str, Any], AnyOf(SIGNALS.classes.values)]] = {}
    rebalance: dict[Identifier, Annotated[dict[str, Any], AnyOf(REBALANCE_STRATEGIES.classes.values)]] = {}
    defaults: Defaults = Defaults()
    portfolios: list[Annotated[dict[str, Any], AnyOf(lambda: (PortfolioEntry, MatrixEntry))]] = []
    include: list[str] = []


def fleet_json_schema() -> dict[str, Any]:
    """JSON Schema of a fleet file, with every registered kind. Editors use it; `load_fleet` checks more."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **FleetFile.model_json_schema()}


@dataclass(frozen=True)
class Fleet:
    """What a fleet file says, checked and complete. `prepare` makes sure of the calendars."""

    portfolios: tuple[PortfolioConfiguration, ...]
    calendars: tuple[CalendarRequest, ...]
    namespace: str | None


@collecting_seldom()
def load_fleet(path: Path) -> Fleet:
    """The fleet of a file and its includes. Raises ConfigurationError with every problem, one line each."""
    document = Document(Path(path))
    fleet = _Loader(document).load()
    if document.problems:
        raise ConfigurationError(problems=[text for *_, text in sorted(document.problems)])
    return fleet


class _Loader:
    """Puts the sections of a document together. What is wrong is told, and is None from then on."""

    def __init__(self, document: Document) -> None:
        self.document = document
        self.names: dict[str, dict[str, Any]] = {}  # key of a portfolio or a spec -> name -> what it stands for
        self.specs: dict[str, Spec | None] = {}  # by their text
        self.taken: dict[tuple[str, str], Keys] = {}  # identifiers of portfolios and indexes

    def load(self) -> Fleet:
        document = self.document
        document.check(FleetFile, document.data or {"version": 1}, ())
        self.names["universe"] = document.entries("universes")
        self.names["prices"] = {name: entry and self._prices(name, entry) for name, entry in document.entries("prices").items()}
        for key, (section, _) in KINDS.items():
            self.names[key] = {n: None if e is None else self._spec(key, e, (section, n)) for n, e in document.entries(section).items()}
        calendars = [CalendarRequest(unique_identifier=name, **entry) for name, entry in document.entries("calendars").items() if entry]
        namespace = document.data.get("namespace")
        if namespace is not None and namespace != (current := current_namespace()):
            document.tell(("namespace",), f"this process has '{current}': set MSM_AUTO_REGISTER_NAMESPACE, or correct the file")
        portfolios = tuple(self._portfolios())
        for identifier, error in dependencies(portfolios).cyclic.items():
            document.tell(next(keys for (key, name), keys in self.taken.items() if (key, name) == ("id", identifier)), str(error))
        if not portfolios and not document.problems:
            document.tell((), "has no portfolios: give at least one under 'portfolios'")
        return Fleet(portfolios, tuple(calendars), namespace)

    def _prices(self, name: str, entry: dict[str, Any]) -> PriceSource | None:
        source, keys = _source(entry["source"]), ("prices", name, "interpolate")
        if not (policy := entry.get("interpolate")):
            return source
        assets = policy.get("assets")
        if isinstance(assets, str) and (assets := self._find("universe", assets, (*keys, "assets"))) is None:
            return None
        fields = {"upsample_frequency_id": policy["frequency"], "intraday_bar_interpolation_rule": policy["rule"], "asset_list": assets}
        fields["source_price_instance"] = source
        config = self.document.check(InterpolatedPricesConfig, fields, keys, SPELLED, plain=False)
        return config and InterpolatedPrices(interpolation_config=config)

    def _portfolios(self) -> Iterator[PortfolioConfiguration]:
        for key, value in self.document.entries("defaults").items():
            if key in PARTS and value is not None:  # told even if no portfolio uses it
                self._find(key, value, ("defaults", key))
        self.defaults = self.document.entries("defaults")
        for i, written in self.document.entries("portfolios").items():
            if written is not None:
                for entry in self._combinations(written, ("portfolios", i)):
                    if portfolio := self._portfolio(entry, ("portfolios", i)):
                        yield portfolio
                    if ("portfolios", i) in self.document.broken:
                        break  # the first bad combination stands for the others
                self.document.note = ""

    def _combinations(self, written: dict[str, Any], keys: Keys) -> Iterator[dict[str, Any]]:
        """The entry itself or, with a matrix, one for every combination."""
        if "matrix" not in written:
            yield written
        elif checked := self.document.check(MatrixEntry, written, keys):
            template = {key: value for key, value in written.items() if key != "matrix"}
            for choice in itertools.product(*checked.matrix.values()):
                values = dict(zip(checked.matrix, choice, strict=True))
                self.document.note = f" (with {', '.join(f'{key}={shown(value)}' for key, value in values.items())})"
                try:
                    yield filled(template, values)
                except ValueError as error:
                    return self.document.tell(keys, str(error))

    def _portfolio(self, written: dict[str, Any], keys: Keys) -> PortfolioConfiguration | None:
        merged = {**self.defaults, **written}
        for key in ("execution", "price_alignment_policy"):
            if isinstance(written.get(key), dict):
                merged[key] = {**(self.defaults.get(key) or {}), **written[key]}
        given = {key: value for key, value in merged.items() if value is not None or key not in PortfolioEntry.model_fields}
        entry = self.document.check(PortfolioEntry, given, keys)
        rate = entry.execution.cash_rate if entry else None
        rate_source = self._find("prices", rate.source, (*keys, "execution", "cash_rate", "source")) if rate else None
        parts = {key: self._find(key, given[key], (*keys, key)) for key in PARTS if key in given}
        for key in PARTS:
            if key not in given and (key in written or ("defaults", key) not in self.document.broken):  # else it is told there
                self.document.tell((*keys, key), "is missing, here and in 'defaults'")
        for key in {"id", "publish_index"} & given.keys():
            if (name := (key, str(given[key]))) in self.taken:
                self.document.tell((*keys, key), f"'{name[1]}' is used twice, here and at {self.document.where(*self.taken[name])}")
            self.taken.setdefault(name, (*keys, key))
        if entry is None or len(parts) < len(PARTS) or any(part is None for part in parts.values()) or (rate and rate_source is None):
            return None
        return self.document.check(PortfolioConfiguration, _configuration(entry, rate_source, **parts), keys, plain=False)

    def _find(self, key: str, value: Any, keys: Keys) -> Any:
        """What a name stands for, or the spec that is spelled out."""
        if isinstance(value, str):
            if value not in self.names[key] and self.document.complete:
                self.document.tell(keys, f"unknown {key} '{value}'{did_you_mean(value, self.names[key])}")
            return self.names[key].get(value)
        if isinstance(value, dict) and key in KINDS:
            return self._spec(key, value, keys)
        return self.document.tell(keys, f"must be a name{' or a mapping' if key in KINDS else ''}, not {shown(value)}")

    def _with_sources(self, cls: type[Spec], data: dict[str, Any], keys: Keys) -> dict[str, Any] | None:
        """Price sources in place of names of the prices section; prices that a signal does not name are those of the defaults."""
        given = dict(data)
        for name, field in cls.model_fields.items():
            if not _takes_source(field.annotation):
                continue
            written = next((key for key in (name, "prices") if key in given and (key == name or name == "price_source")), None)
            value = given.pop(written) if written else None
            if value is None and name == "price_source":
                value = self.document.entries("defaults").get("prices")
            if isinstance(value, str):
                source = self._find("prices", value, (*keys, written or name))
                if source is None:
                    return None
                value = source.model_dump(mode="json")
            if value is not None:
                given[name] = value
        return given

    def _spec(self, key: str, data: dict[str, Any], keys: Keys) -> Spec | None:
        """The spec that is spelled out; equal ones are one object."""
        text = json.dumps([key, data], sort_keys=True)
        if spec := self.specs.get(text):
            return spec
        classes = KINDS[key][1].classes
        cls = classes.get(str(data.get("kind")))
        if cls is None and str(data.get("kind")) in KINDS[key][1].left_out():
            return self.document.tell((*keys, "kind"), str(KINDS[key][1].unknown(data["kind"])))
        if cls is None:
            what = f"unknown kind {shown(data['kind'])}" if "kind" in data else "is missing"
            return self.document.tell((*keys, "kind"), f"{what}; known kinds: {', '.join(sorted(classes))}")
        if (sourced := self._with_sources(cls, data, keys)) is None:
            return None
        data = sourced
        spelled = {name: short for name, short in shorthands_of(cls).items() if name not in data}
        fields = {name: value for name, value in data.items() if name not in spelled.values()}
        for name, short in spelled.items():
            if short == "universe" and short in data:
                if (assets := self._find(short, data[short], (*keys, short))) is None:
                    return None
                fields[name] = assets
            elif short in data:
                pairs = data[short].items() if isinstance(data[short], dict) else ()
                fields[name] = [{"unique_identifier": asset, "weight": weight} for asset, weight in pairs]
        self.specs[text] = spec = self.document.check(cls, fields, keys, spelled)
        return spec


def _takes_source(hint: Any) -> bool:
    """A field of that type holds a price source."""
    return hint is PriceSource or any(_takes_source(part) for part in get_args(hint))


def _source(source: str) -> APIDataNode:
    return APIDataNode.build_from_table_uid(source) if UID.fullmatch(source) else APIDataNode.build_from_identifier(source)


def filled(value: Any, values: Mapping[str, Any]) -> Any:
    """`value` with the values of a matrix in its texts; one that is nothing but a placeholder becomes the value, of whatever type."""
    if isinstance(value, dict):
        items = {_spelled(key, values): filled(item, values) for key, item in value.items()}
        if len(items) < len(value):
            raise ValueError("two keys become the same one")
        return items
    if isinstance(value, list):
        return [filled(item, values) for item in value]
    if not isinstance(value, str):
        return value
    whole = PLACEHOLDER.fullmatch(value)
    return values[whole[1]] if whole and whole[1] in values else _spelled(value, values)


def _spelled(text: str, values: Mapping[str, Any]) -> str:
    """`{key}` is a value, spelled out; `{{` and `}}` are braces. Raises ValueError."""

    def spell(match: re.Match[str]) -> str:
        if match[1] is None:
            return match[0][0]
        if not isinstance(values.get(match[1]), str | int | float):
            raise ValueError(f"'{match[0]}' is no text or number of the matrix{did_you_mean(match[1], values)}")
        return str(values[match[1]])

    return PLACEHOLDER.sub(spell, text)


def _configuration(
    entry: PortfolioEntry, rate_source: PriceSource | None, signal: Spec, rebalance: Spec, prices: PriceSource
) -> dict[str, Any]:
    """The documented nesting; what is None is left to its default."""
    execution = entry.execution.model_dump(exclude_none=True)
    if rate_source is not None:
        execution["cash_rate"] |= {"source": rate_source}
    given = entry.model_dump(by_alias=True, exclude_none=True)
    build = {key: value for key, value in given.items() if key in PortfolioBuildConfiguration.model_fields}
    markets = {key: value for key, value in given.items() if key in PortfolioMarketsConfig.model_fields}
    build |= {"price_source_instance": prices, "execution_configuration": execution}
    build["backtesting_weights_configuration"] = {"signal_weights_instance": signal, "rebalance_strategy_instance": rebalance}
    markets["signal_name"] = entry.signal if isinstance(entry.signal, str) else None
    return {"portfolio_build_configuration": build, "portfolio_markets_configuration": markets}
