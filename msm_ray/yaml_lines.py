"""YAML files as one document of plain data, and everything found wrong with it, each thing at its line.

ruamel.yaml makes plain data of a graph of nodes, which is kept: a node knows its line. What the data must look like is pydantic's to say.
"""

import difflib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from glob import glob
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails
from ruamel.yaml import YAML
from ruamel.yaml.constructor import ConstructorError, SafeConstructor
from ruamel.yaml.error import YAMLError
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from msm_core.errors import MsmError

Keys = tuple[str | int, ...]  # the way to a value: ("portfolios", 0, "id")
Model = TypeVar("Model", bound=BaseModel)

TAG = "tag:yaml.org,2002:"


def shown(value: Any) -> str:
    """A value as it may stand in a YAML file, cut when long."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:60]}..."


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """` - did you mean 'x'?`; when nothing is close, the first names that would do."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1)
    return f" - did you mean '{close[0]}'?" if close else f" - known: {', '.join(names[:12])}" if names else ""


class _Constructor(SafeConstructor):
    """Plain data from plain YAML; every other tag is refused, and a date stays text until a model asks for a date."""

    yaml_constructors = {
        **{TAG + name: SafeConstructor.yaml_constructors[TAG + name] for name in ("map", "seq", "str", "int", "float", "bool", "null")},
        f"{TAG}timestamp": SafeConstructor.construct_yaml_str,
        None: SafeConstructor.construct_undefined,
    }

    def construct_mapping(self, node: MappingNode, deep: bool = False) -> Any:
        for key, _ in node.value:
            if key.tag not in (f"{TAG}str", f"{TAG}timestamp", f"{TAG}merge"):
                name = key.value if isinstance(key, ScalarNode) else "[...]"
                raise ConstructorError(None, None, f"the key {name} is not text - put it in quotes", key.start_mark)
        return super().construct_mapping(node, deep)


@dataclass(eq=False)
class File:
    """One file, `order`-th of its document. `root` is None when it could not be read."""

    name: str
    path: Path
    order: int
    root: Node | None = None
    data: dict[str, Any] = field(default_factory=dict)

    def read(self) -> tuple[int, str] | None:
        """Fills in `root` and `data`, or returns the line of what is wrong, and why."""
        content = b""
        try:
            if self.path.stat().st_size > 50_000_000:
                raise ValueError("larger than 50 MB")
            content = self.path.read_bytes()
            yaml = YAML(typ="safe", pure=True)
            yaml.Constructor = _Constructor
            yaml.composer.warn_double_anchors = False  # legal YAML; a warning would go to stderr
            root = yaml.compose(content.decode("utf-8-sig"))
            if not isinstance(root, MappingNode):
                raise ValueError("not a mapping of sections (version, signals, portfolios, ...)" if root else "the file is empty")
            plain = json.dumps(yaml.constructor.construct_document(root), ensure_ascii=False).encode()  # half surrogates are refused here
            self.root, self.data = root, {key: value for key, value in json.loads(plain).items() if value is not None}
        except (OSError, YAMLError, ValueError, KeyError, RecursionError) as error:  # ruamel passes Python's own on
            mark = getattr(error, "problem_mark", None)
            offset = getattr(error, "start" if isinstance(error, UnicodeDecodeError) else "position", 0)
            line = mark.line if mark else content.count(b"\n", 0, offset)
            why = getattr(error, "problem", None) or getattr(error, "strerror", None) or error
            return line + 1, f"cannot be read: {why}"

    def line(self, keys: Keys) -> int:
        """The line of a value or, when it is not written, of the nearest one around it."""
        node, line = self.root, 1
        for key in keys:
            found: list[tuple[Any, Any]] = []
            if isinstance(node, MappingNode):
                found = node.value[key : key + 1] if isinstance(key, int) else [pair for pair in node.value if pair[0].value == key]
            elif isinstance(node, SequenceNode) and isinstance(key, int):
                found = [(item, item) for item in node.value[key : key + 1]]
            if not found:
                break
            at, node = found[-1]  # the last: what a merge key brings in stands first
            line = at.start_mark.line + 1
        return line


class Document:
    """A file and all that it includes, as one; none outside the directory of the first, whatever links lead there."""

    def __init__(self, top: Path) -> None:
        self.data: dict[str, Any] = {}  # the sections of all files together: lists in the order of the files, names once
        self.broken: set[Keys] = set()  # the first two keys of each problem
        self.note = ""  # which combination of a matrix is looked at; part of every problem told
        self.problems: set[tuple[int, int, str]] = set()  # order of the file, line, sentence
        self._origins: dict[Keys, tuple[File, Keys]] = {}
        files: dict[Path, File] = {}
        base = top.resolve().parent
        for path in (waiting := [top.resolve()]):  # grows
            if path not in files:
                files[path] = file = File(path.relative_to(base).as_posix(), path, len(files))
                self._origins.setdefault((), (file, ()))
                if fault := file.read():
                    self._add(file, (), fault[1], fault[0])
                self._merge(file)
                waiting += self._included(file, base)
        self.complete = all(file.root for file in files.values())  # else an unknown name may be in what could not be read

    def _included(self, file: File, base: Path) -> Iterator[Path]:
        """The files of its patterns; one that matches nothing is a problem, because it would drop portfolios in silence."""
        patterns = file.data.get("include")
        for i, pattern in enumerate(patterns if isinstance(patterns, list) else ()):
            names = glob(str(pattern), root_dir=file.path.parent, recursive=True)
            found = sorted(path for name in names if (path := (file.path.parent / name).resolve()).is_file())
            if not found:
                self._add(file, ("include", i), f"{shown(pattern)} matches no file")
            elif not all(path.is_relative_to(base) for path in found):
                self._add(file, ("include", i), f"{shown(pattern)} leads outside the directory of the top file")
            else:
                yield from found

    def _merge(self, file: File) -> None:
        for section, value in file.data.items():
            whole = self.data.setdefault(section, type(value)() if isinstance(value, list | dict) else value)
            self._origins.setdefault((section,), (file, (section,)))
            if isinstance(value, list) and isinstance(whole, list):
                for i, item in enumerate(value):
                    self._origins[section, len(whole)] = file, (section, i)
                    whole.append(item)
            elif isinstance(value, dict) and isinstance(whole, dict):
                for name, item in value.items():
                    if (section, name) in self._origins:
                        self._add(file, (section, name), f"is given twice, here and at {self.where(section, name)}")
                    else:
                        self._origins[section, name] = file, (section, name)
                        whole[name] = item
            elif value != whole:
                self._add(file, (section,), f"is given twice, here and at {self.where(section)}")

    def entries(self, section: str) -> dict[Any, Any]:
        """A section by name, or by position; None for what is broken."""
        whole = {} if (section,) in self.broken else self.data.get(section, {})
        entries = enumerate(whole) if isinstance(whole, list) else whole.items()
        return {name: None if (section, name) in self.broken else entry for name, entry in entries}

    def _origin(self, keys: Keys) -> tuple[File, Keys]:
        """The file of a value, and the way to it there."""
        known = next(keys[:n] for n in (2, 1, 0) if keys[:n] in self._origins)
        file, way = self._origins[known]
        return file, way + keys[len(known) :]

    def where(self, *keys: str | int) -> str:
        file, way = self._origin(keys)
        return f"{file.name}:{file.line(way)}"

    def tell(self, keys: Keys, message: str) -> None:
        """A problem of the value that `keys` lead to."""
        self.broken.add(keys[:2])
        self._add(*self._origin(keys), message + self.note)

    def _add(self, file: File, way: Keys, message: str, line: int | None = None) -> None:
        line = line or file.line(way)
        path = "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in way).lstrip(".")
        text = ": ".join(part for part in (f"{file.name}:{line}", path, message) if part)
        self.problems.add((file.order, line, "".join(c if c.isprintable() else json.dumps(c)[1:-1] for c in text)))

    def check(self, model: type[Model], data: Any, keys: Keys, spelled: Mapping[str, str] = {}, plain: bool = True) -> Model | None:
        """`data` as a `model`, or None after telling what pydantic, or an error of ours, has to say.

        spelled  the names that fields go by in the file, where they are others
        plain    data of a file: by way of JSON, pydantic is strict about text, numbers and booleans, and still reads a date from text
        """
        try:
            if plain:
                return model.model_validate_json(json.dumps(_with_durations(model, data)), strict=True)
            return model.model_validate(data)
        except ValidationError as error:
            for found in error.errors(include_url=False):
                if found["type"] == "too_short" and len(found["input"]) >= found.get("ctx", {}).get("min_length", 0):
                    continue  # it is called short because its items were refused
                way = tuple(key for key in found["loc"] if key != "[key]")
                known = {*_fields(model, way[:-1]), *spelled.values()}
                self.tell((*keys, *(spelled.get(str(key), key) for key in way[:1]), *way[1:]), _message(found, way, known))
        except MsmError as error:  # passes through pydantic unchanged
            self.tell(keys, str(error))
        return None


def _message(found: ErrorDetails, way: Keys, known: Iterable[str]) -> str:
    """Pydantic's sentence, for people who write YAML."""
    text, value = found["msg"].removeprefix("Value error, ").replace("Input should be", "must be"), found["input"]
    if found["type"] in ("extra_forbidden", "unexpected_keyword_argument"):  # of a model, of a dataclass
        return f"unknown key{did_you_mean(str(way[-1]), known)}"
    if found["type"] == "missing":
        return "is missing"
    if found["type"] in ("value_error", "too_short", "string_too_short", "string_too_long"):  # whole sentences
        return text
    quote = found["type"] == "string_type" and isinstance(value, int | float)
    return f"{text}, not {shown(value)}{' - put it in quotes' if quote else ''}"


def _fields(hint: Any, keys: Keys) -> Iterable[str]:
    """Names of the fields of the model or dataclass that `keys` lead to from the type `hint`; none for what is no model."""
    for key in keys:
        fields = getattr(hint, "__pydantic_fields__", {})
        hint = fields[key].annotation if key in fields else next((a for a in reversed(get_args(hint)) if a is not ...), None)
        if isinstance(hint, UnionType):  # an optional section
            hint = next((a for a in get_args(hint) if hasattr(a, "__pydantic_fields__")), hint)
    return getattr(hint, "__pydantic_fields__", ())


def _with_durations(hint: Any, data: Any) -> Any:
    """`data` for the type `hint`, with 3d and 12h as pydantic reads them: P3D, PT12H."""
    if isinstance(data, str) and timedelta in (hint, *get_args(hint)) and data[:-1].isdecimal() and data[-1] in "smhd":
        return ("P" if data[-1] == "d" else "PT") + data.upper()
    if isinstance(data, dict) and (fields := getattr(hint, "model_fields", None)):
        return {key: _with_durations(fields[key].annotation, value) if key in fields else value for key, value in data.items()}
    return data
