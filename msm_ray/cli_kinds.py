"""`msm-ray kinds`: what a fleet file may name by `kind`, where it comes from, and which parameters it has.

Everything is read off the classes: the docstring, and the pydantic fields with their bounds and descriptions.
"""

import inspect
import re
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import asdict, dataclass
from datetime import date, datetime, timedelta
from enum import Enum
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin
from uuid import UUID

import typer
from pydantic import AwareDatetime, BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import to_jsonable_python

from msm_core.errors import ConfigurationError
from msm_core.identity import Kinds
from msm_core.plugins import FAMILIES
from msm_ray.console import Output, OutputOption, emit_json, emit_table, out
from msm_ray.fleet import shorthands_of
from msm_ray.yaml_lines import did_you_mean

BUILT_IN = "built in"
WORDS: dict[Any, str] = {
    bool: "true or false",
    int: "whole number",
    float: "number",
    str: "text",
    Any: "anything",
    type(None): "none",
    datetime: "time with offset",
    AwareDatetime: "time with offset",
    date: "date",
    timedelta: "duration, such as 5d or 12h",
    UUID: "uid",
    Path: "path",
}
SHORTHANDS = {  # what stands under such a key
    "universe": "universe: a name of the universes section",
    "prices": "prices: a name of the prices section",
    "weights": "weights: a mapping of assets to weights",
}
UNITS = ((timedelta(days=1), "d"), (timedelta(hours=1), "h"), (timedelta(minutes=1), "m"), (timedelta(seconds=1), "s"))


def kinds(
    name: Annotated[str | None, typer.Argument(metavar="NAME", help="A kind, for its parameters; without it, all of them.")] = None,
    output: OutputOption = Output.table,
) -> None:
    """Signals and rebalance strategies that a fleet file names by `kind`: built in, and of installed plugins. Needs no database.

    With NAME: what it does, and its parameters as fleet.yaml spells them: type, default or 'required', bounds, meaning.

    Example: msm-ray kinds equal_weights

    Then, in fleet.yaml: signals: { mine: { kind: equal_weights, asset_list: [AAPL, MSFT] } }

    A package adds kinds by the entry-point groups msm_core.signals and msm_core.rebalance_strategies; examples/plugin is one.
    """
    if name is None:
        _show_all(output)
        return
    found = [describe(family, name) for family in FAMILIES if name in family.classes]
    if not found:
        raise ConfigurationError(problems=_unknown(name))
    if output == Output.json:
        emit_json(found[0] if len(found) == 1 else {"kinds": found})
        return
    for facts in found:
        _show(facts)


def describe(family: Kinds[Any], kind: str) -> dict[str, Any]:
    """Everything about a kind, as plain data."""
    cls = family.classes[kind]
    return {
        **_head(family, kind),
        "docstring": inspect.cleandoc(cls.__doc__ or ""),
        "parameters": [asdict(parameter) for parameter in parameters(cls)],
        "schema": cls.model_json_schema(),
    }


def _head(family: Kinds[Any], kind: str) -> dict[str, Any]:
    summary = inspect.cleandoc(family.classes[kind].__doc__ or "").partition("\n")[0]
    return {"family": family.family, "kind": kind, "summary": summary, "origin": family.plugins().get(kind, BUILT_IN)}


def _unknown(name: str) -> str:
    reasons = [str(family.unknown(name)) for family in FAMILIES if name in family.left_out()]
    known = {kind for family in FAMILIES for kind in family.classes}
    return "\n".join(reasons) or f"no kind is called '{name}'{did_you_mean(name, known)}. All of them: msm-ray kinds"


# -- parameters ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Parameter:
    """One field, for people. `settings.x` is a field of a nested model, `list[].x` of each member of a list.

    default    plain data; none for a required one
    shorthand  key that stands for it in fleet.yaml
    """

    name: str
    type: str
    required: bool
    default: Any
    bounds: str
    description: str
    shorthand: str | None = None


def parameters(cls: type[BaseModel]) -> list[Parameter]:
    """Required ones first, then those of the class itself before those of its bases; nested models one level deep."""
    short = shorthands_of(cls)
    found = []
    for name, field in sorted(cls.model_fields.items(), key=lambda item: (not item[1].is_required(), -_depth(cls, item[0]))):
        if name != "kind":
            default = _default(field)
            found.append(_parameter(name, field, default, short.get(name)))
            found += _nested(name, field, default)
    return found


def _depth(cls: type[BaseModel], name: str) -> int:
    """How far down the line of classes a field came in."""
    line = [base for base in reversed(cls.__mro__) if issubclass(base, BaseModel)]
    return next(depth for depth, base in enumerate(line) if name in base.model_fields)


def _nested(name: str, field: FieldInfo, default: Any) -> Iterator[Parameter]:
    model, in_list = _model_of(field.annotation)
    if model is None:
        return
    for inner, inner_field in model.model_fields.items():
        if inner != "kind":
            set_by_default = isinstance(default, model)
            given = getattr(default, inner) if set_by_default else _default(inner_field)
            path = f"{name}{'[]' if in_list else ''}.{inner}"
            yield _parameter(path, inner_field, given, required=inner_field.is_required() and not set_by_default)


def _parameter(name: str, field: FieldInfo, default: Any, shorthand: str | None = None, required: bool | None = None) -> Parameter:
    return Parameter(
        name=name,
        type=in_words(field.annotation),
        required=field.is_required() if required is None else required,
        default=_duration(default) if isinstance(default, timedelta) else to_jsonable_python(default, fallback=str),
        bounds=bounds(field),
        description=field.description or "",
        shorthand=shorthand,
    )


def _default(field: FieldInfo) -> Any:
    if field.is_required():
        return None
    return "worked out" if field.default_factory_takes_validated_data else field.get_default(call_default_factory=True)


def _model_of(hint: Any) -> tuple[type[BaseModel] | None, bool]:
    """The model that a hint is about, and whether there may be many; none for one without settings, such as a price source."""
    if isinstance(hint, type) and issubclass(hint, BaseModel):
        return (hint if hint.model_fields.keys() - {"kind"} else None), False
    inner = [_model_of(part) for part in get_args(hint)] if get_origin(hint) is not Literal else []
    model, in_list = next(((model, in_list) for model, in_list in inner if model), (None, False))
    return model, in_list or (model is not None and _is_list(get_origin(hint)))


def _is_list(origin: Any) -> bool:
    return isinstance(origin, type) and issubclass(origin, Sequence | Set)


def in_words(hint: Any) -> str:
    """A type for people who do not write Python: `list of text`, `whole number or none`."""
    origin, arguments = get_origin(hint), get_args(hint)
    if hint in WORDS:
        return WORDS[hint]
    if origin is Annotated:
        return in_words(arguments[0])
    if origin is Literal:
        return " | ".join(str(value.value if isinstance(value, Enum) else value) for value in arguments)
    if origin in (Union, UnionType):
        return " or ".join(in_words(part) for part in sorted(arguments, key=lambda part: part is type(None)))
    if origin is tuple and arguments[-1:] != (...,):
        return f"list of {len(arguments)}: {', '.join(in_words(part) for part in arguments)}"
    if _is_list(origin):
        return f"list of {in_words(arguments[0])}"
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return f"mapping of {in_words(arguments[0])} to {in_words(arguments[1])}"
    if isinstance(hint, type) and issubclass(hint, Enum):
        return " | ".join(str(member.value) for member in hint)
    if isinstance(hint, type) and issubclass(hint, BaseModel) and hint.model_fields.keys() - {"kind"}:
        return "settings"
    return re.sub(r"(?<=[a-z])(?=[A-Z])", " ", getattr(hint, "__name__", str(hint))).lower()


def bounds(field: FieldInfo) -> str:
    """`1 to 250`, `above 0, below 1`, `at least 1 member`; pydantic keeps them as attributes of whatever annotates the field."""
    found: dict[str, Any] = {}
    options = get_args(field.annotation) if get_origin(field.annotation) in (Union, UnionType) else ()
    for note in [*field.metadata, *(note for option in options for note in getattr(option, "__metadata__", ()))]:
        for name in ("ge", "gt", "le", "lt", "multiple_of", "min_length", "max_length", "pattern"):
            if (value := getattr(note, name, None)) is not None:
                found.setdefault(name, _duration(value) if isinstance(value, timedelta) else value)
    texts = [_range(found.get("ge"), found.get("le"), "")]
    texts += [
        f"{word} {found[name]}" for name, word in (("gt", "above"), ("lt", "below"), ("multiple_of", "a multiple of")) if name in found
    ]
    unit = "characters" if "text" in in_words(field.annotation).split(" or ") else "members"
    texts.append(_range(found.get("min_length"), found.get("max_length"), f" {unit}"))
    texts += [f"matches {found['pattern']}"] if "pattern" in found else []
    return ", ".join(filter(None, texts))


def _range(lowest: Any, highest: Any, unit: str) -> str:
    if lowest is None and highest is None:
        return ""
    if lowest is not None and highest is not None:
        return f"{lowest} to {highest}{unit}"
    word, value = ("at least", lowest) if highest is None else ("at most", highest)
    return f"{word} {value}{unit.removesuffix('s') if value == 1 else unit}"


def _duration(value: timedelta) -> str:
    """As a fleet file takes it: 5d, 36h, 90m, 45s."""
    return next((f"{value // unit}{letter}" for unit, letter in UNITS if not value % unit), f"{value.total_seconds()}")


# -- showing ------------------------------------------------------------------------------------------------------------------


def _show_all(output: Output) -> None:
    rows = [_head(family, kind) for family in FAMILIES for kind in family.classes]
    broken = [
        {"family": family.family, "kind": kind, "plugin": plugin, "why": why}
        for family in FAMILIES
        for kind, (plugin, why) in family.left_out().items()
    ]
    if output == Output.json:
        emit_json({"kinds": rows, "left_out": broken})
        return
    columns = ("family", "kind", "what it does", "origin")
    emit_table("Kinds; for the parameters of one: msm-ray kinds NAME", columns, [tuple(row.values()) for row in rows])
    if broken:
        emit_table("Plugins that are left out", ("family", "kind", "plugin", "why"), [tuple(row.values()) for row in broken])


def _show(facts: Mapping[str, Any]) -> None:
    out.print(f"{facts['kind']}: {facts['family']}, {facts['origin']}\n\n{facts['docstring']}\n", markup=False, highlight=False)
    rows = [
        (
            p["name"] + (f" (or {p['shorthand']})" if p["shorthand"] else ""),
            p["type"],
            "required" if p["required"] else _plain(p["default"]),
            p["bounds"],
            "; ".join(filter(None, (p["description"], SHORTHANDS.get(p["shorthand"])))),
        )
        for p in facts["parameters"]
    ]
    emit_table("Parameters", ("parameter", "type", "default", "bounds", "what it is"), rows)


def _plain(default: Any) -> str:
    """A default as fleet.yaml spells it; that of nested settings stands in their own rows."""
    if isinstance(default, dict):
        return "as below" if default else "none"
    if isinstance(default, bool):
        return str(default).lower()
    return "none" if default in (None, []) else str(default)
