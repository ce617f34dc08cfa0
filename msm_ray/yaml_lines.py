"""YAML files as plain data that remembers its lines, and every problem of a set of files in one list.

1. `read_documents` parses the top file and what it includes into `Document`s: dicts, lists, text, numbers, and a line for each.
2. `build` turns plain data into a strict pydantic model; what pydantic finds becomes a problem at the line it is about.
3. `Problems` keeps them all, each once, until the end.
4. `Sections` sees the files as one; a `Matrix` writes one entry out for every combination of its values.

Only YAML's node graph is used, never a constructor: a tag cannot make an object, a date stays text until a model asks for a date.
"""

import difflib
import itertools
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any, Generic, TypeVar, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails
from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode
from ruamel.yaml.reader import ReaderError

from msm_core.errors import ConfigurationError, MsmError
from msm_core.identity import Kinds, Spec

Keys = tuple[str | int, ...]  # the way to a value: ("portfolios", 0, "id")
Model = TypeVar("Model", bound=BaseModel)
T = TypeVar("T")
D = TypeVar("D")
S = TypeVar("S", bound=Spec)

DEPTH_MAX = 50
COMBINATIONS_TOLD_MAX = 3  # problems of one value under a matrix
VALUES_MAX = 1_000_000  # aliases are expanded, so a few lines could otherwise fill the memory
TEXT_LENGTH_MAX = 60  # of a value quoted in a problem
TAG = "tag:yaml.org,2002:"
MERGE = f"{TAG}merge"
TEXT_TAGS = {TAG + name for name in ("str", "timestamp", "value")}
CONTROLS = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")  # would break a problem over lines, or a terminal
DURATION = re.compile(r"(\d{1,6})([smhd])")


# -- places and problems ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Document:
    """One file. Keys and list items are found by the way to them.

    lines     the line of each
    broken    values that could not be read; they are None in `data`, and nothing more is told about them
    readable  False when the file could not be parsed at all
    """

    name: str
    path: Path
    order: int
    data: dict[str, Any] = field(default_factory=dict)
    lines: dict[Keys, int] = field(default_factory=dict)
    broken: set[Keys] = field(default_factory=set)
    readable: bool = True


@dataclass(frozen=True)
class Place:
    """Where a value is written. What is not written here may come from `below`: the defaults under a portfolio.

    note  which combination of a matrix this is about
    """

    document: Document
    keys: Keys = ()
    below: "Place | None" = None
    note: str = ""

    def at(self, *keys: str | int) -> "Place":
        """The place of a nested value, in this document or below, wherever more of the way to it is written."""
        if self.below is not None and self.below.depth(keys) > self.depth(keys):
            return self.below.at(*keys)
        return Place(self.document, self.keys + keys, self.below.at(*keys) if self.below is not None else None, self.note)

    def depth(self, keys: Keys) -> int:
        """How many of `keys`, from the first, are written here."""
        return next((n for n in range(len(keys), 0, -1) if self.keys + keys[:n] in self.document.lines), 0)

    @property
    def line(self) -> int:
        """The line of the value or, when it is not written, of the nearest one around it."""
        lines = self.document.lines
        return next((lines[self.keys[:n]] for n in range(len(self.keys), 0, -1) if self.keys[:n] in lines), 1)

    def __str__(self) -> str:
        return f"{self.document.name}:{self.line}"


class Problems:
    """Everything found wrong so far, each thing once."""

    def __init__(self) -> None:
        self._found: dict[tuple[int, int, str, str], str] = {}
        self._combinations: Counter[tuple[int, int, str]] = Counter()

    def __len__(self) -> int:
        return len(self._found)

    def add(self, place: Place, message: str, line: int | None = None) -> None:
        """A problem at the line of the place, or at another. Of the combinations of a matrix only the first few are told."""
        way = way_text(place.keys)
        where = place.document.order, line or place.line, way
        if (*where, message) in self._found:
            return
        if place.note:
            self._combinations[where] += 1
            if self._combinations[where] > COMBINATIONS_TOLD_MAX:
                return
        text = ": ".join(part for part in (f"{place.document.name}:{where[1]}", way, message) if part) + place.note
        self._found[(*where, message)] = CONTROLS.sub(lambda match: json.dumps(match[0])[1:-1], text)

    def enough(self, place: Place) -> bool:
        """Whether another problem of this value, under a matrix, would be left out."""
        return self._combinations[place.document.order, place.line, way_text(place.keys)] >= COMBINATIONS_TOLD_MAX

    def raise_any(self) -> None:
        """Raises ConfigurationError with all of them, in the order of the files and their lines."""
        if self._found:
            ordered = sorted(self._found, key=lambda found: found[:2])
            raise ConfigurationError(problems=[self._found[found] for found in ordered])


def way_text(keys: Keys) -> str:
    """`portfolios[0].rebalance`."""
    return "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in keys).lstrip(".")


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """` - did you mean 'x'?`; when nothing is close, the first names that would do."""
    names = sorted(set(known))
    close = difflib.get_close_matches(name, names, n=1)
    if close:
        return f" - did you mean '{close[0]}'?"
    return f" - known: {', '.join(names[:12])}{', ...' if len(names) > 12 else ''}" if names else ""


# -- plain data to models -----------------------------------------------------------------------------------------------


def build(
    model: type[Model],
    data: Any,
    place: Place,
    problems: Problems,
    *,
    known: Iterable[str] | None = None,
    quiet: frozenset[str] = frozenset(),
) -> Model | None:
    """`data` as a `model`, or None after telling what is wrong.

    Types are strict: text is no number and true is no 1. The detour over JSON is what makes pydantic strict about these and still
    read a date from text.

    known  the keys to suggest from; the model's own fields when not given
    quiet  fields whose problems have been told already: nothing is built, but the others are looked at
    """
    if isinstance(data, Mapping):
        data, unusable = _with_durations(model, data, place, problems)
        quiet |= unusable
    text = json.dumps(data)
    built = attempt(lambda: model.model_validate_json(text, strict=True), place, problems, known or model.model_fields, quiet)
    return None if quiet else built


def attempt(
    make: Callable[[], T], place: Place, problems: Problems, known: Iterable[str] = (), quiet: frozenset[str] = frozenset()
) -> T | None:
    """What `make` returns, or None after telling what pydantic, or an error of ours, has to say."""
    try:
        return make()
    except ValidationError as error:
        for found in _causes(error):
            if not (found["loc"] and found["loc"][0] in quiet):
                _tell(found, set(known), place, problems)
    except MsmError as error:  # passes through pydantic unchanged
        problems.add(place, str(error))
    return None


def _causes(error: ValidationError) -> list[ErrorDetails]:
    """Without the list that is called too short because its items were refused."""
    found = error.errors(include_url=False)
    return [f for f in found if f["type"] != "too_short" or not any(o["loc"][: len(f["loc"])] == f["loc"] for o in found if o is not f)]


def _tell(found: ErrorDetails, known: set[str], place: Place, problems: Problems) -> None:
    keys = tuple(key for key in found["loc"] if key != "[key]")
    at = place.at(*keys)
    if at.keys in at.document.broken:
        return
    match found["type"]:
        case "extra_forbidden":
            suggestion = did_you_mean(str(keys[-1]), known) if len(keys) == 1 else ""
            # at the line of the key, by the way to the mapping it is in
            problems.add(Place(at.document, at.keys[:-1], note=place.note), f"unknown key '{keys[-1]}'{suggestion}", at.line)
        case "missing":
            problems.add(place.at(*keys[:-1]), f"missing key '{keys[-1]}'")
        case _:
            problems.add(at, _message(found))


# pydantic's words -> a YAML user's
WORDS = {
    "Input should be": "must be",
    "an object": "a mapping",
    "a valid array": "a list",
    "String should match pattern": "must match",
    " after validation": "",
}
EXAMPLES = {"date_": "must be a date such as 2020-01-31", "datetime_": "must be a time such as 2020-01-31T21:00:00Z"}
COMPLETE = {"value_error", "too_short", "too_long", "string_too_short", "string_too_long"}  # types of sentences that need no value


def _message(found: ErrorDetails) -> str:
    """Pydantic's sentence in the words of a YAML file, with the value."""
    kind, text, value = found["type"], found["msg"].removeprefix("Value error, "), found["input"]
    if kind == "value_error":
        return text
    for theirs, ours in WORDS.items():
        text = text.replace(theirs, ours)
    if kind in COMPLETE:
        return text
    text = next((example for start, example in EXAMPLES.items() if kind.startswith(start)), text) + f", not {shown(value)}"
    if kind == "string_type" and isinstance(value, bool | int | float):
        return f"{text} - put it in quotes"
    if kind == "literal_error" and isinstance(value, str):
        close = difflib.get_close_matches(value, re.findall(r"'([^']*)'", found["msg"]), n=1)
        return f"{text} - did you mean '{close[0]}'?" if close else text
    return text


def shown(value: Any) -> str:
    """A value as it may stand in a YAML file, cut when long."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= TEXT_LENGTH_MAX else f"{text[:TEXT_LENGTH_MAX]}..."


@cache
def _duration_fields(model: type[BaseModel]) -> frozenset[str]:
    return frozenset(name for name, f in model.model_fields.items() if timedelta in (f.annotation, *get_args(f.annotation)))


def _with_durations(
    model: type[BaseModel], data: Mapping[str, Any], place: Place, problems: Problems
) -> tuple[dict[str, Any], frozenset[str]]:
    """`data` with `3d` and `12h` in the form that pydantic reads (`P3D`, `PT12H`), and the keys of what is no duration, left out."""
    converted, unusable = dict(data), set()
    for name in _duration_fields(model) & data.keys():
        value = data[name]
        if value is None:
            continue
        match = DURATION.fullmatch(value) if isinstance(value, str) else None
        if match:
            number, unit = match.groups()
            converted[name] = f"P{number}D" if unit == "d" else f"PT{number}{unit.upper()}"
        else:
            problems.add(place.at(name), f"must be a duration such as 3d, 12h, 30m or 90s, not {shown(value)}")
            unusable.add(name)
            del converted[name]
    return converted, frozenset(unusable)


# -- sections and matrices ----------------------------------------------------------------------------------------------


class Sections:
    """The sections of all documents together. Values of a wrong type are left out: whoever checks the files tells about them."""

    def __init__(self, documents: list[Document], problems: Problems) -> None:
        self.documents = documents
        self.problems = problems
        self.complete = all(document.readable for document in documents)

    def check(self, top: type[BaseModel], included: type[BaseModel]) -> None:
        """Each document against the model of its sections; `signals:` with nothing under it counts as absent."""
        for document in self.documents:
            if document.readable:
                written = {key: value for key, value in document.data.items() if value is not None}
                build(included if document.order else top, written, Place(document), self.problems)

    def named(self, section: str, kind: type[T]) -> dict[str, tuple[T, Place]]:
        """The entries of a section by name, and where each is written; a name given twice is a problem."""
        found: dict[str, tuple[T, Place]] = {}
        for document in self.documents:
            for name, value in as_(dict, document.data.get(section)).items():
                place = Place(document, (section, name))
                if name in found:
                    self.problems.add(place, f"'{name}' is given twice, here and at {found[name][1]}")
                elif isinstance(value, kind):
                    found[name] = value, place
        return found

    def listed(self, section: str, below: Place) -> list[tuple[dict[str, Any], Place]]:
        """The entries of a section that is a list, in the order of the files, and where each is written."""
        return [
            (entry, Place(document, (section, i), below))
            for document in self.documents
            for i, entry in enumerate(as_(list, document.data.get(section)))
            if isinstance(entry, dict)
        ]

    def single(self, section: str, kind: type[T], default: D) -> tuple[T | D, Place]:
        """What only one document may have, and where."""
        found: list[tuple[T, Place]] = []
        for document in self.documents:
            value, place = document.data.get(section), Place(document, (section,))
            if isinstance(value, kind):
                found.append((value, place))
        for _, place in found[1:]:
            self.problems.add(place, f"is given twice, here and at {found[0][1]}")
        return found[0] if found else (default, Place(self.documents[0], (section,)))

    def lookup(self, names: Mapping[str, T], name: str, noun: str, place: Place) -> T | None:
        """What `name` stands for. An unknown one is told, unless it may be in a file that could not be read."""
        if name not in names and self.complete and not self.problems.enough(place):  # looking for close names takes time
            self.problems.add(place, f"unknown {noun} '{name}'{did_you_mean(name, names)}")
        return names.get(name)


def as_(kind: type[T], value: Any) -> T:
    """`value`, or an empty `kind` when it is something else."""
    return value if isinstance(value, kind) else kind()


BRACES = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]")


class Matrix:
    """A portfolio entry written out for every combination of its matrix.

    A text that is one placeholder takes the value as it is ("{top}" -> 5); inside a longer text it is spelled out. `{{` and `}}`
    are braces. Keys are texts too.
    """

    def __init__(self, entry: Mapping[str, Any], values: Mapping[str, list[Any]]) -> None:
        self.entry = {key: value for key, value in entry.items() if key != "matrix"}
        self.values = values
        self.size = math.prod(len(choices) for choices in values.values())

    def tell_faults(self, place: Place, problems: Problems) -> bool:
        """Whether there is a text with a placeholder that cannot be filled."""
        before = len(problems)
        for keys, text, is_key in _texts(self.entry, ()):
            for match in BRACES.finditer(text):
                if why := self._fault(match, text, is_key):
                    problems.add(place.at(*keys), why)
        return len(problems) > before

    def _fault(self, match: re.Match[str], text: str, is_key: bool) -> str:
        name = match[1]
        if match[0] in ("{{", "}}"):
            return ""
        if name is None:
            return f"{shown(text)} has a lone '{match[0]}'; write '{match[0] * 2}' for a brace"
        if name not in self.values:
            return f"unknown placeholder '{{{name}}}'{did_you_mean(name, self.values)}"
        if (is_key or match[0] != text) and any(value is None or isinstance(value, list | dict) for value in self.values[name]):
            return f"'{{{name}}}' stands in a {'key' if is_key else 'longer text'}, so its values must be texts or numbers"
        return ""

    def combinations(self, place: Place, problems: Problems) -> Iterator[tuple[dict[str, Any], Place]]:
        """Each entry, with a place that says which it is."""
        for choice in itertools.product(*self.values.values()):
            values = dict(zip(self.values, choice, strict=True))
            note = ", ".join(f"{key}={shown(value)}" for key, value in values.items())
            at = replace(place, note=f" (with {note})")
            try:
                yield _filled(self.entry, values), at
            except ValueError as error:
                problems.add(at, str(error))


def _texts(value: Any, keys: Keys) -> Iterator[tuple[Keys, str, bool]]:
    """Every text in `value`, the way to it, and whether it is a key."""
    if isinstance(value, str):
        yield keys, value, False
    elif isinstance(value, dict):
        for key, item in value.items():
            yield (*keys, key), key, True
            yield from _texts(item, (*keys, key))
    elif isinstance(value, list):
        for i, item in enumerate(value):
            yield from _texts(item, (*keys, i))


def _filled(value: Any, values: Mapping[str, Any]) -> Any:
    match value:
        case str():
            whole = BRACES.fullmatch(value)
            return values[whole[1]] if whole and whole[1] in values else _spelled(value, values)
        case dict():
            filled = {_spelled(key, values): _filled(item, values) for key, item in value.items()}
            if len(filled) < len(value):
                raise ValueError("two keys become the same one")
            return filled
        case list():
            return [_filled(item, values) for item in value]
    return value


def _spelled(text: str, values: Mapping[str, Any]) -> str:
    if "{" not in text and "}" not in text:
        return text

    def spell(match: re.Match[str]) -> str:
        if match[1] is None:
            return match[0][0]
        value = values[match[1]]
        return value if isinstance(value, str) else json.dumps(value)

    return BRACES.sub(spell, text)


# -- JSON Schema of the same --------------------------------------------------------------------------------------------

PLACEHOLDER = {"type": "string", "pattern": r"\{[A-Za-z_][A-Za-z0-9_]*\}"}


def schema_with_durations(schema: Any) -> Any:
    """A schema of pydantic's, with durations in our form."""
    return _walk(schema, lambda s: {"type": "string", "pattern": f"^{DURATION.pattern}$"} if s.get("format") == "duration" else s)


def schema_with_shorthands(
    cls: type[BaseModel], definition: Mapping[str, Any], shorthands: Mapping[str, tuple[str, Mapping[str, Any]]]
) -> dict[str, Any]:
    """The definition of a spec: `kind` is required, and a field may be given by its shorthand (key -> field, schema) instead."""
    required = {*definition.get("required", []), "kind"}
    taken = {key: short for key, short in shorthands.items() if takes(cls, key, short[0])}
    either = [{"oneOf": [{"required": [field]}, {"required": [key]}]} for key, (field, _) in taken.items() if field in required]
    required -= {field for field, _ in taken.values()}
    properties = definition["properties"] | {key: schema for key, (_, schema) in taken.items()}
    return {**definition, "properties": properties, "required": sorted(required), **({"allOf": either} if either else {})}


def schema_of_templates(definitions: Mapping[str, Any]) -> dict[str, Any]:
    """The same definitions for what stands under a matrix, each called `...Template`: a placeholder may stand for any value."""
    return {f"{name}Template": _walk(definition, _template) for name, definition in definitions.items()}


def _walk(value: Any, change: Callable[[dict[str, Any]], dict[str, Any]]) -> Any:
    """`value` with every mapping in it changed, the inner ones first."""
    if isinstance(value, list):
        return [_walk(item, change) for item in value]
    return change({key: _walk(item, change) for key, item in value.items()}) if isinstance(value, dict) else value


def _template(schema: dict[str, Any]) -> dict[str, Any]:
    if isinstance(schema.get("$ref"), str):
        return {"$ref": f"{schema['$ref']}Template"}
    typed = schema.get("type") in ("integer", "number", "boolean", "array")  # a mapping of a property called "type" is no schema
    narrowed = any(isinstance(schema.get(key), str | list) for key in ("enum", "const", "format", "pattern"))
    return {"anyOf": [schema, PLACEHOLDER]} if typed or narrowed else schema


# -- specs --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shorthand:
    """A short way to write one field, open to every spec that has the field and no other meaning for the short name.

    expand  the value of the field, or None after telling what is wrong
    """

    field: str
    expand: Callable[[Any, Place], Any]


class Built(Generic[S]):
    """Specs of one class; equal ones are built once and shared."""

    def __init__(self, cls: type[S], problems: Problems) -> None:
        self.cls = cls
        self.problems = problems
        self.built: dict[str, S] = {}

    def find(self, data: Any, place: Place) -> S | None:
        """The spec of a mapping, or None after telling what is wrong; what is no mapping is told by the section's model."""
        if not isinstance(data, dict):
            return None
        key = json.dumps(data, sort_keys=True)
        spec = self.built[key] if key in self.built else build(self.cls, data, place, self.problems)
        return None if spec is None else self.built.setdefault(key, spec)


class Specs(Generic[S]):
    """The named specs of one section, and the inline ones of portfolios; equal ones are built once and shared."""

    def __init__(self, sections: Sections, section: str, kinds: Kinds[S], shorthands: Mapping[str, Shorthand]) -> None:
        self.sections = sections
        self.kinds = kinds
        self.shorthands = shorthands
        self.built: dict[str, S] = {}
        self.named = {name: self.inline(data, place) for name, (data, place) in sections.named(section, dict).items()}

    def find(self, value: Any, place: Place) -> S | None:
        """The spec that a portfolio names or spells out; None for None, or after telling why not."""
        if isinstance(value, str):
            return self.sections.lookup(self.named, value, self.kinds.family, place)
        if isinstance(value, dict):
            return self.inline(value, place)
        if value is not None:
            self.sections.problems.add(place, f"must be a name, or a mapping with a 'kind', not {shown(value)}")
        return None

    def inline(self, data: Mapping[str, Any], place: Place) -> S | None:
        key = json.dumps(data, sort_keys=True)
        spec = self.built[key] if key in self.built else self._build(data, place)
        return None if spec is None else self.built.setdefault(key, spec)

    def _build(self, data: Mapping[str, Any], place: Place) -> S | None:
        kind = data.get("kind")
        cls = self.kinds.classes.get(kind) if isinstance(kind, str) else None
        if cls is None:
            self._tell_kind(data, place)
            return None
        shorthands = {key: short for key, short in self.shorthands.items() if takes(cls, key, short.field)}
        fields, wrong = self._written_out(data, place, shorthands)
        return build(cls, fields, place, self.sections.problems, known={*cls.model_fields, *shorthands}, quiet=wrong)

    def _tell_kind(self, data: Mapping[str, Any], place: Place) -> None:
        known = f"known kinds: {', '.join(sorted(self.kinds.classes))}"
        if "kind" in data:
            self.sections.problems.add(place.at("kind"), f"unknown {self.kinds.family} kind {shown(data['kind'])}; {known}")
        else:
            self.sections.problems.add(place, f"missing key 'kind'; {known}")

    def _written_out(
        self, data: Mapping[str, Any], place: Place, shorthands: Mapping[str, Shorthand]
    ) -> tuple[dict[str, Any], frozenset[str]]:
        """`data` with shorthands replaced by the fields they stand for, and the fields whose shorthand is wrong."""
        fields, wrong = dict(data), set()
        for key, short in shorthands.items():
            if key not in data:
                continue
            value = short.expand(fields.pop(key), place.at(key))
            if short.field in data:
                self.sections.problems.add(place.at(key), f"'{key}' and '{short.field}' say the same; give one of them")
            if value is None or short.field in data:
                wrong.add(short.field)
            fields[short.field] = value
        return fields, frozenset(wrong)


def takes(cls: type[BaseModel], key: str, field: str) -> bool:
    """Whether `key` may be written for `field` in specs of this class."""
    return field in cls.model_fields and key not in cls.model_fields


# -- reading ------------------------------------------------------------------------------------------------------------


def read_documents(path: Path, problems: Problems) -> list[Document]:
    """The file and everything that it includes, each file once, the top one first."""
    reader = _Files(path.resolve(), problems)
    reader.visit(path.resolve(), ())
    return list(reader.documents.values())


class _Files:
    """Follows `include`. Every file must lie under the directory of the top one, whatever links or patterns lead to it."""

    def __init__(self, top: Path, problems: Problems) -> None:
        self.base = top.parent
        self.problems = problems
        self.documents: dict[Path, Document] = {}

    def visit(self, path: Path, ancestors: tuple[Path, ...]) -> None:
        name = path.relative_to(self.base).as_posix()
        document = _read(path, name, len(self.documents), self.problems)
        self.documents[path] = document
        patterns = document.data.get("include")
        for i, pattern in enumerate(patterns if isinstance(patterns, list) else ()):
            place = Place(document, ("include", i))
            for found in self._matches(pattern, place):
                if found in (*ancestors, path):
                    chain = [p.relative_to(self.base).as_posix() for p in (*ancestors, path, found)]
                    self.problems.add(place, f"include cycle: {' -> '.join(chain[chain.index(chain[-1]) :])}")
                elif found not in self.documents:
                    self.visit(found, (*ancestors, path))

    def _matches(self, pattern: Any, place: Place) -> list[Path]:
        """The files of one `include` item; a pattern that matches nothing is a problem, because it would drop portfolios in silence."""
        if not isinstance(pattern, str):
            return []  # its type is told by whoever checks the sections
        folder = place.document.path.parent
        if Path(pattern).is_absolute() or ".." in Path(pattern).parts:
            self.problems.add(place, f"{shown(pattern)} must be a path below the directory of the top file, without '..'")
            return []
        try:
            found = [folder / pattern] if (folder / pattern).is_file() else [p for p in sorted(folder.glob(pattern)) if p.is_file()]
        except (ValueError, NotImplementedError, OSError) as error:
            self.problems.add(place, f"{shown(pattern)} is not a usable path: {error}")
            return []
        inside = [p.resolve() for p in found if p.resolve().is_relative_to(self.base)]
        if len(inside) < len(found):
            self.problems.add(place, f"{shown(pattern)} leads outside the directory of the top file")
        elif not found:
            self.problems.add(place, f"{shown(pattern)} matches no file")
        return inside


def _read(path: Path, name: str, order: int, problems: Problems) -> Document:
    """One parsed file; after a problem that leaves nothing to look at, one that is not `readable`."""

    def unreadable(line: int, message: str) -> Document:
        document = Document(name, path, order, readable=False)
        problems.add(Place(document), message, line)
        return document

    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        return unreadable(1, f"cannot be read: {error.strerror}")
    except UnicodeDecodeError as error:
        return unreadable(error.object[: error.start].count(b"\n") + 1, "is not UTF-8 text")
    try:
        yaml = YAML(typ="safe", pure=True)
        yaml.composer.warn_double_anchors = False  # legal YAML; a warning would go to stderr
        root = yaml.compose(text)
    except MarkedYAMLError as error:
        return unreadable(*_told_by_parser(error))
    except ReaderError as error:
        return unreadable(text.count("\n", 0, error.position) + 1, f"not valid YAML: {error.reason}")
    except YAMLError as error:
        return unreadable(1, f"not valid YAML: {error}")
    except RecursionError:
        return unreadable(1, f"nested deeper than {DEPTH_MAX} levels")
    if root is None:
        return unreadable(1, "the file is empty")
    if not isinstance(root, MappingNode):
        return unreadable(_line(root), "must be a mapping of sections (version, signals, portfolios, ...)")
    document = Document(name, path, order)
    try:
        document.data.update(_Values(document, problems).mapping(root, ()))
    except _TooMuch as error:
        return unreadable(error.line, str(error))
    return document


def _told_by_parser(error: MarkedYAMLError) -> tuple[int, str]:
    """Line and sentence of a syntax error, with the line where the unfinished thing began."""
    began, mark = error.context_mark, error.problem_mark or error.context_mark
    since = f" (from line {began.line + 1})" if began and mark and began.line != mark.line else ""
    why = ", ".join(part for part in (error.context and f"{error.context}{since}", error.problem) if part)
    return mark.line + 1 if mark else 1, f"not valid YAML: {why}"


class _TooMuch(Exception):
    def __init__(self, node: Node, message: str) -> None:
        super().__init__(message)
        self.line = _line(node)


class _Values:
    """Plain values of a node graph, and the line of each in the document."""

    def __init__(self, document: Document, problems: Problems) -> None:
        self.document = document
        self.problems = problems
        self.count = 0

    def mapping(self, node: MappingNode, keys: Keys, merges: int = 0) -> dict[str, Any]:
        """Keys are text and come once; `<<` brings in what is not there. Raises _TooMuch."""
        self._afford(node, len(keys) + merges)
        inherited: dict[str, Any] = {}
        for other in _merged(node):
            if not isinstance(other, MappingNode):
                self._tell(other, keys, "'<<' needs a mapping, or a list of mappings")
            else:
                inherited = self.mapping(other, keys, merges + 1) | inherited
        values: dict[str, Any] = {}
        own = [(key_node, value_node) for key_node, value_node in node.value if str(key_node.tag) != MERGE]
        for key_node, value_node in own:
            key = self._key(key_node, keys)
            if key in values:
                self._tell(key_node, keys, f"key '{key}' is given twice, here and at line {self.document.lines[(*keys, key)]}")
            elif key is not None:
                self.document.lines[(*keys, key)] = _line(key_node)
                values[key] = self._value(value_node, (*keys, key))
        return inherited | values

    def _key(self, node: Node, keys: Keys) -> str | None:
        if isinstance(node, ScalarNode) and str(node.tag) in TEXT_TAGS and self._storable(node, keys):
            return node.value
        text = f" {shown(node.value)}" if isinstance(node, ScalarNode) else ""
        self._tell(node, keys, f"the key{text} is not text - put it in quotes")
        return None

    def _value(self, node: Node, keys: Keys) -> Any:
        self._afford(node, len(keys))
        tag = str(node.tag)
        if isinstance(node, MappingNode) and tag == f"{TAG}map":
            return self.mapping(node, keys)
        if isinstance(node, SequenceNode) and tag == f"{TAG}seq":
            return [self._item(item, (*keys, i)) for i, item in enumerate(node.value)]
        if isinstance(node, ScalarNode):
            return self._scalar(node, tag, keys)
        return self._refuse(node, tag, keys)

    def _item(self, node: Node, keys: Keys) -> Any:
        self.document.lines[keys] = _line(node)
        return self._value(node, keys)

    def _scalar(self, node: ScalarNode, tag: str, keys: Keys) -> Any:
        text = node.value
        try:
            match tag.removeprefix(TAG):
                case "str" | "timestamp" | "value":
                    return text if self._storable(node, keys) else None
                case "null":
                    return None
                case "bool":
                    return {"true": True, "false": False}[text.lower()]
                case "int":
                    return _integer(text)
                case "float":
                    return self._finite(node, keys)
        except (ValueError, KeyError):
            return self._tell(node, keys, f"{shown(text)} is not a plain {tag.removeprefix(TAG)}")
        return self._refuse(node, tag, keys)

    def _finite(self, node: ScalarNode, keys: Keys) -> float | None:
        number = float(node.value.replace("_", "").lower().replace(".inf", "inf").replace(".nan", "nan"))
        if math.isfinite(number):
            return number
        return self._tell(node, keys, f"{node.value} is not a finite number")

    def _storable(self, node: ScalarNode, keys: Keys) -> bool:
        """Postgres and JSON take every text but these two."""
        if "\0" in node.value or any("\ud800" <= c <= "\udfff" for c in node.value):
            self._tell(node, keys, "the text holds a NUL or half of a surrogate pair")
            return False
        return True

    def _afford(self, node: Node, depth: int) -> None:
        self.count += 1
        if depth > DEPTH_MAX:
            raise _TooMuch(node, f"nested deeper than {DEPTH_MAX} levels")
        if self.count > VALUES_MAX:
            raise _TooMuch(node, f"more than {VALUES_MAX} values, aliases written out")

    def _refuse(self, node: Node, tag: str, keys: Keys) -> None:
        self._tell(node, keys, f"the tag {tag.replace(TAG, '!!')} is refused: a fleet file holds plain data only")

    def _tell(self, node: Node, keys: Keys, message: str) -> None:
        self.document.broken.add(keys)
        self.problems.add(Place(self.document, keys), message, _line(node))


def _merged(node: MappingNode) -> list[Node]:
    """What the `<<` keys of a mapping point at."""
    values = [value for key, value in node.value if str(key.tag) == MERGE]
    return [other for value in values for other in (value.value if isinstance(value, SequenceNode) else [value])]


def _line(node: Node) -> int:
    return node.start_mark.line + 1


def _integer(text: str) -> int:
    """YAML 1.2: 0x1F and 0o17 are marked, 012 is twelve."""
    digits = text.replace("_", "").lower()
    marked = digits.lstrip("+-")[:2] in ("0x", "0o", "0b")
    return int(digits, 0 if marked else 10)
