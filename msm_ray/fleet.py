"""fleet.yaml -> PortfolioConfiguration objects.

1. `yaml_lines.read_documents` reads the file and its includes; every value keeps its line.
2. The sections of all files become one fleet: a name, and each of `namespace`, `defaults` and `run`, is given once.
3. Each portfolio gets the defaults under it; a matrix is written out, one portfolio for every combination.
4. Signals, rebalance strategies and price sources are looked up or built, each distinct one once (`Specs`), and shared.

Whatever is wrong is told together, at its line, in one ConfigurationError. Which file a thing is written in, in which order, with
which comments or by which matrix, reaches no identity: only the built objects are hashed.
"""

import json
import unicodedata
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import date, timedelta
from pathlib import Path
from typing import Annotated, Any, Literal
from uuid import UUID
from zoneinfo import available_timezones

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, FiniteFloat, PositiveInt, RootModel, ValidationInfo, field_validator
from pydantic.json_schema import models_json_schema

from msm_core.configuration import (
    BacktestingWeightsConfig,
    PortfolioBuildConfiguration,
    PortfolioConfiguration,
    PortfolioExecutionConfiguration,
    PortfolioMarketsConfig,
    PriceAlignmentPolicy,
    PriceSource,
)
from msm_core.data_nodes.prices import APIDataNode
from msm_core.errors import ConfigurationError
from msm_core.frames import parse_frequency
from msm_core.identity import current_namespace, logical_identifier, storage_uid
from msm_core.rebalance_strategy import REBALANCE_STRATEGIES
from msm_core.signals import SIGNALS, FixedWeights
from msm_core.signals.base import AssetIdentifier, sorted_unique
from msm_ray.yaml_lines import (
    Built,
    Document,
    Matrix,
    Place,
    Problems,
    Sections,
    Shorthand,
    Specs,
    attempt,
    build,
    read_documents,
    schema_of_templates,
    schema_with_durations,
    schema_with_shorthands,
    shown,
)

PORTFOLIOS_MAX = 100_000
UNPRINTABLE = {"Cc", "Cs", "Zl", "Zp"}  # Unicode categories: controls, surrogates, line and paragraph separators


# -- the format ---------------------------------------------------------------------------------------------------------


def _identifier(value: str) -> str:
    """Two spellings that look the same would be two portfolios, so only the composed one is taken."""
    if not unicodedata.is_normalized("NFC", value):
        raise ValueError(f"{shown(value)} is not in Unicode NFC; write {json.dumps(unicodedata.normalize('NFC', value))}")
    if any(unicodedata.category(c) in UNPRINTABLE for c in value):
        raise ValueError(f"{json.dumps(value)} holds a control character")
    return value


def _frequency(value: str) -> str:
    try:
        if parse_frequency(value) > timedelta(days=1):
            raise ValueError(f"frequency {shown(value)} is longer than 1d")
    except ConfigurationError as error:  # pydantic gives a place to ValueErrors only
        raise ValueError(str(error)) from None
    return value


def _time_zone(value: str) -> str:
    if value not in available_timezones():
        raise ValueError(f"{shown(value)} is not an IANA time zone such as America/New_York")
    return value


Identifier = Annotated[str, Field(min_length=1, max_length=255), AfterValidator(_identifier)]
Frequency = Annotated[str, AfterValidator(_frequency), Field(json_schema_extra={"pattern": r"^[1-9]\d*[mhd]$"})]
MatrixKey = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]
TimeZone = Annotated[str, AfterValidator(_time_zone)]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class CalendarEntry(_Section):
    """A pandas-market-calendars calendar to materialise, both dates included."""

    pandas_calendar: str = Field(min_length=1, max_length=255)
    valid_from: date
    valid_to: date
    display_name: str | None = Field(default=None, max_length=255)
    timezone: TimeZone | None = None

    @field_validator("valid_to")
    @classmethod
    def _not_reversed(cls, value: date, info: ValidationInfo) -> date:
        if value < info.data.get("valid_from", value):
            raise ValueError(f"valid_to {value} is before valid_from {info.data['valid_from']}")
        return value


class CalendarRequest(CalendarEntry):
    """A calendar that `prepare` makes sure of."""

    unique_identifier: Identifier


class PriceEntry(_Section):
    """Where prices are: `source` is an identifier in the catalogue, or its uid."""

    source: str = Field(min_length=1, max_length=255)


class Universe(RootModel[Annotated[list[AssetIdentifier], Field(min_length=1)]]):
    """A list of assets that signals share; the order means nothing."""

    @field_validator("root")
    @classmethod
    def _once_each(cls, assets: list[str]) -> list[str]:
        return list(sorted_unique(assets, "the universe"))


class Weights(RootModel[Annotated[dict[AssetIdentifier, FiniteFloat], Field(min_length=1)]]):
    """Weight of each asset; need not sum to 1, negative is short."""


class MatrixEntry(RootModel[Annotated[dict[MatrixKey, Annotated[list[Any], Field(min_length=1)]], Field(min_length=1)]]):
    """Values of each placeholder; there is one portfolio for every combination."""


class Defaults(_Section):
    """What every portfolio has unless it says otherwise; `execution` and `price_alignment_policy` key by key."""

    signal: Any = None  # these two are told about by Specs.find
    rebalance: Any = None
    prices: str | None = None
    price_column: Annotated[str, Field(min_length=1, max_length=63)] | None = None
    frequency: Frequency | None = None
    start_date: date | None = None
    execution: dict[str, Any] = {}
    price_alignment_policy: dict[str, Any] = {}
    tags: tuple[Identifier, ...] = ()


class PortfolioEntry(Defaults):
    """One portfolio or, with a `matrix`, one for every combination: `{key}` in a text stands for a value of the matrix."""

    id: Identifier
    name: str | None = None
    description: str | None = None
    publish_index: Identifier | None = None
    matrix: MatrixEntry | None = None


class RunPolicy(_Section):
    """How runs go; outside every identity. What is absent is up to the command line."""

    batch_size: PositiveInt | None = None
    executor: Literal["local", "ray"] | None = None
    task_timeout: timedelta | None = Field(default=None, gt=timedelta(0))


class FleetFile(_Section):
    """A fleet of portfolios. A name, and each of namespace, defaults and run, is given once in all files together."""

    version: Literal[1]
    namespace: str = ""
    calendars: dict[Identifier, dict[str, Any]] = {}
    prices: dict[Identifier, dict[str, Any]] = {}
    universes: dict[Identifier, list[Any]] = {}
    signals: dict[Identifier, dict[str, Any]] = {}
    rebalance: dict[Identifier, dict[str, Any]] = {}
    defaults: dict[str, Any] = {}
    portfolios: list[dict[str, Any]] = []
    run: dict[str, Any] = {}
    include: list[str] = []


class IncludedFile(FleetFile):
    version: Literal[1] = 1


@dataclass(frozen=True)
class Fleet:
    """What a fleet file says, checked and complete."""

    portfolios: tuple[PortfolioConfiguration, ...]
    calendars: tuple[CalendarRequest, ...]
    run: RunPolicy
    namespace: str | None


def load_fleet(path: Path) -> Fleet:
    """The fleet of a file and its includes. Raises ConfigurationError with every problem, one line each."""
    problems = Problems()
    fleet = _Loader(read_documents(Path(path), problems), problems).load()
    problems.raise_any()
    return fleet


# -- loading ------------------------------------------------------------------------------------------------------------

UNIVERSE, WEIGHTS = "asset_list", "asset_unique_identifier_weights"  # fields for which any spec that has them takes a short form


def _assets_of(name: Any, place: Place, sections: Sections, universes: Mapping[str, Universe | None]) -> list[str] | None:
    if not isinstance(name, str):
        return sections.problems.add(place, f"must be the name of a universe, not {shown(name)}")
    universe = sections.lookup(universes, name, "universe", place)
    return universe.root if universe else None


def _pairs_of(value: Any, place: Place, problems: Problems) -> list[dict[str, Any]] | None:
    if (weights := build(Weights, value, place, problems)) is None:
        return None
    return [pair.model_dump() for pair in FixedWeights.from_signal_configuration(weights=weights.root).asset_unique_identifier_weights]


def _source_uid(source: str) -> UUID:
    try:
        return UUID(source)
    except ValueError:
        return storage_uid(logical_identifier(source))


class _Loader:
    """The sections of all files, as one fleet."""

    def __init__(self, documents: list[Document], problems: Problems) -> None:
        self.sections = sections = Sections(documents, problems)
        self.problems = problems
        sections.check(FleetFile, IncludedFile)
        self.universes = {n: build(Universe, data, at, problems) for n, (data, at) in sections.named("universes", list).items()}
        self.sources = {n: self._source(data, at) for n, (data, at) in sections.named("prices", dict).items()}
        shorthands = {
            "universe": Shorthand(UNIVERSE, lambda value, at: _assets_of(value, at, sections, self.universes)),
            "weights": Shorthand(WEIGHTS, lambda value, at: _pairs_of(value, at, problems)),
        }
        self.signals = Specs(sections, "signals", SIGNALS, shorthands)
        self.strategies = Specs(sections, "rebalance", REBALANCE_STRATEGIES, shorthands)
        self.defaults, self.defaults_place = sections.single("defaults", dict, {})
        self.execution = Built(PortfolioExecutionConfiguration, problems)
        self.alignment = Built(PriceAlignmentPolicy, problems)
        self.taken: dict[str, dict[str, Place]] = {"id": {}, "publish_index": {}}

    def load(self) -> Fleet:
        build(Defaults, self.defaults, self.defaults_place, self.problems)
        self._resolved(self.defaults, self.defaults_place)  # so that a default is told about even if no portfolio uses it
        run = build(RunPolicy, *self.sections.single("run", dict, {}), self.problems)
        calendars = [self._calendar(n, data, at) for n, (data, at) in self.sections.named("calendars", dict).items()]
        portfolios = [p for entry, place in self._entries() if (p := self._portfolio(entry, place))]
        return Fleet(tuple(portfolios), tuple(c for c in calendars if c), run or RunPolicy(), self._namespace())

    def _source(self, data: Mapping[str, Any], place: Place) -> PriceSource | None:
        entry = build(PriceEntry, data, place, self.problems)
        return entry and APIDataNode(time_index_meta_table_uid=_source_uid(entry.source))

    def _calendar(self, name: str, data: Mapping[str, Any], place: Place) -> CalendarRequest | None:
        entry = build(CalendarEntry, data, place, self.problems)
        return entry and build(CalendarRequest, {**data, "unique_identifier": name}, place, self.problems)

    def _namespace(self) -> str | None:
        given, place = self.sections.single("namespace", str, None)
        if given is not None and given != (current := current_namespace()):
            fix = f"set MSM_AUTO_REGISTER_NAMESPACE={given} before msm starts" if given else "unset MSM_AUTO_REGISTER_NAMESPACE"
            self.problems.add(place, f"'{given}' is not the namespace of this process ('{current}'); {fix}, or correct the file")
        return given

    def _entries(self) -> Iterator[tuple[dict[str, Any], Place]]:
        """Every portfolio as it is written, matrices written out."""
        written = self.sections.listed("portfolios", self.defaults_place)
        if not written and not len(self.problems):
            self.problems.add(Place(self.sections.documents[0]), "has no portfolios: give at least one under 'portfolios'")
        room = PORTFOLIOS_MAX
        for entry, place in written:
            matrix = self._matrix(entry, place) if "matrix" in entry else None
            room -= matrix.size if matrix else 1
            if room < 0:
                made = f"; the matrix makes {matrix.size}" if matrix else ""
                self.problems.add(place, f"a fleet has at most {PORTFOLIOS_MAX} portfolios{made}")
                return
            if matrix:
                yield from matrix.combinations(place, self.problems)
            elif "matrix" not in entry:
                yield entry, place

    def _matrix(self, entry: Mapping[str, Any], place: Place) -> Matrix | None:
        values = build(MatrixEntry, entry["matrix"], place.at("matrix"), self.problems)
        matrix = values and Matrix(entry, values.root)
        return matrix if matrix and not matrix.tell_faults(place, self.problems) else None

    def _portfolio(self, written: Mapping[str, Any], place: Place) -> PortfolioConfiguration | None:
        merged = {**self.defaults, **written}
        for key in ("execution", "price_alignment_policy"):
            under, over = self.defaults.get(key), written.get(key)
            if isinstance(under, dict) and isinstance(over, dict):
                merged[key] = under | over
        entry = build(PortfolioEntry, merged, place, self.problems)
        parts = self._resolved(merged, place)
        for key in ("signal", "rebalance", "prices"):
            if merged.get(key) is None:
                self.problems.add(place, f"missing key '{key}', here or in 'defaults'")
        if not self._unique(merged, place) or entry is None or any(part is None for part in parts.values()):
            return None
        return attempt(lambda: _configuration(entry, parts), place, self.problems)

    def _unique(self, merged: Mapping[str, Any], place: Place) -> bool:
        """Tells when the id, or the index that it publishes, is another portfolio's already."""
        before = len(self.problems)
        for key, taken in self.taken.items():
            first = taken.setdefault(merged[key], place) if isinstance(merged.get(key), str) else place
            if first is not place:
                same = first.keys == place.keys and first.document is place.document
                where = "by the same matrix: mention more of its keys" if same else f"at {first.at(key)}"
                self.problems.add(place.at(key), f"'{merged[key]}' is used twice, here and {where}")
        return len(self.problems) == before

    def _resolved(self, merged: Mapping[str, Any], place: Place) -> dict[str, Any]:
        """The objects that the keys of a portfolio stand for; None for what is missing or wrong."""
        prices = merged.get("prices")
        return {
            "signal": self.signals.find(merged.get("signal"), place.at("signal")),
            "rebalance": self.strategies.find(merged.get("rebalance"), place.at("rebalance")),
            "prices": self.sections.lookup(self.sources, prices, "price source", place.at("prices")) if isinstance(prices, str) else None,
            "execution": self.execution.find(merged.get("execution", {}), place.at("execution")),
            "alignment": self.alignment.find(merged.get("price_alignment_policy", {}), place.at("price_alignment_policy")),
        }


def _configuration(entry: PortfolioEntry, parts: Mapping[str, Any]) -> PortfolioConfiguration:
    given = {"price_column": entry.price_column, "portfolio_prices_frequency": entry.frequency, "start_date": entry.start_date}
    return PortfolioConfiguration(
        portfolio_build_configuration=PortfolioBuildConfiguration(
            price_source_instance=parts["prices"],
            price_alignment_policy=parts["alignment"],
            execution_configuration=parts["execution"],
            backtesting_weights_configuration=BacktestingWeightsConfig(
                signal_weights_instance=parts["signal"], rebalance_strategy_instance=parts["rebalance"]
            ),
            **{field: value for field, value in given.items() if value is not None},
        ),
        portfolio_markets_configuration=PortfolioMarketsConfig(
            portfolio_identifier=entry.id,
            portfolio_name=entry.name,
            description=entry.description,
            tags=entry.tags,
            portfolio_index_identifier=entry.publish_index,
            signal_name=entry.signal if isinstance(entry.signal, str) else None,
        ),
    )


# -- JSON Schema --------------------------------------------------------------------------------------------------------


def fleet_json_schema() -> dict[str, Any]:
    """JSON Schema of a fleet file, with every registered kind. Editors use it; `load_fleet` checks more."""
    signals, strategies = tuple(SIGNALS.classes.values()), tuple(REBALANCE_STRATEGIES.classes.values())
    sections = (CalendarEntry, PriceEntry, Universe, Weights, RunPolicy, Defaults, PortfolioEntry)
    models = (FleetFile, *sections, PortfolioExecutionConfiguration, PriceAlignmentPolicy, *signals, *strategies)
    refs, schema = models_json_schema([(model, "validation") for model in models], ref_template="#/$defs/{model}")
    ref = {model: refs[(model, "validation")] for model in models}
    name = {model: ref[model]["$ref"].removeprefix("#/$defs/") for model in models}
    defs = schema_with_durations(schema["$defs"])
    shorthands = {"universe": (UNIVERSE, {"type": "string"}), "weights": (WEIGHTS, ref[Weights])}
    for cls in (*signals, *strategies):
        defs[name[cls]] = schema_with_shorthands(cls, defs[name[cls]], shorthands)
    signal, strategy = {"anyOf": [ref[cls] for cls in signals]}, {"anyOf": [ref[cls] for cls in strategies]}
    parts = {
        "signal": {"anyOf": [{"type": "string"}, signal]},
        "rebalance": {"anyOf": [{"type": "string"}, strategy]},
        "execution": ref[PortfolioExecutionConfiguration],
        "price_alignment_policy": ref[PriceAlignmentPolicy],
    }
    for model in (Defaults, PortfolioEntry):
        defs[name[model]]["properties"] |= parts
    file = defs.pop(name[FleetFile])
    properties = file["properties"]
    entries = (ref[CalendarEntry], ref[PriceEntry], ref[Universe], signal, strategy)
    for section, entry in zip(("calendars", "prices", "universes", "signals", "rebalance"), entries, strict=True):
        properties[section]["additionalProperties"] = entry
    template = {"$ref": f"{ref[PortfolioEntry]['$ref']}Template"}
    properties["portfolios"]["items"] = {"if": {"required": ["matrix"]}, "then": template, "else": ref[PortfolioEntry]}
    properties |= {"run": ref[RunPolicy], "defaults": ref[Defaults]}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **file, "$defs": defs | schema_of_templates(defs)}
