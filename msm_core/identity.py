"""Identity: what a specification is called, on every machine and every day.

A uid is a sha256 over canonical JSON. What changes numbers is inside it; what describes is not. The namespace is applied here
and nowhere else: to logical identifiers (`ns.Asset`), to physical tables (`msm__asset__ns`) and, by default, to node uids.
"""

import functools
import hashlib
import json
import math
import re
import threading
import uuid
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from datetime import UTC, date, datetime, timedelta
from enum import Enum
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Generic, Self, TypeVar, get_args

import numpy as np
import structlog
from pydantic import BaseModel, ConfigDict

from msm_core.errors import InvalidNamespace, NotCanonical, PluginLeftOut, UnknownKind
from msm_core.settings import Settings

IDENTITY_VERSION = 1  # bump only with a migration: every stored uid depends on it
PHYSICAL_NAME_BYTES_MAX = 63  # Postgres truncates longer names in silence
UIDS_KEPT = 2**18  # of nodes, in memory
EXACT_INTEGER_MAX = 2**53  # above it a float no longer names one integer


def canonical(value: Any) -> Any:
    """`value` as plain JSON data in which equal meaning is equal text. Raises NotCanonical for NaN, infinities and unknown types."""
    try:
        return _plain(value)
    except NotCanonical as error:
        raise _found_at(error, "$") from None


def _plain(value: Any) -> Any:
    """As `canonical`; the path in its error is relative. Every node of every fleet passes here: the usual types come first."""
    kind = type(value)
    if kind is str or value is None or kind is bool:
        return value
    if kind is float:
        return _canonical_number(value)
    if kind is dict:
        return _plain_mapping(value)
    if kind is tuple or kind is list:
        return _plain_sequence(value)
    match value:
        case Enum():
            return _plain(value.value)
        case str():
            return value
        case int():
            return int(value)
        case float() | np.floating():
            return _canonical_number(float(value))
        case datetime():
            if value.tzinfo is None:
                raise NotCanonical(value=value, path="", why="it has no time zone")
            return value.astimezone(UTC).isoformat()
        case date() | uuid.UUID():
            return str(value)
        case timedelta():
            return _canonical_number(value.total_seconds())
        case BaseModel():
            return _plain(value.model_dump())
        case Mapping():
            return _plain_mapping(value)
        case set() | frozenset():
            return sorted(_plain_sequence(list(value), "{{}}"), key=lambda item: json.dumps(item, sort_keys=True))
        case Sequence() if not isinstance(value, (bytes, bytearray, memoryview)):
            return _plain_sequence(value)
    raise NotCanonical(value=repr(value), path="", why=f"{type(value).__name__} is not a plain value")


def _plain_mapping(value: Mapping[Any, Any]) -> dict[str, Any]:
    key, plain = None, dict[str, Any]()
    try:
        for key, item in value.items():
            kind = type(item)  # most of what a fleet is made of: an asset and its weight
            plain[str(key)] = item if kind is str else _canonical_number(item) if kind is float else _plain(item)
    except NotCanonical as error:
        raise _found_at(error, f".{key}") from None
    if len(plain) < len(value):
        raise NotCanonical(value=repr(dict(value)), path="", why="two of its keys, such as 1 and '1', are the same text")
    return plain


def _plain_sequence(value: Sequence[Any], place: str = "[{}]") -> list[Any]:
    plain: list[Any] = []
    try:
        for item in value:
            plain.append(_plain(item))
    except NotCanonical as error:
        raise _found_at(error, place.format(len(plain))) from None
    return plain


def _found_at(error: NotCanonical, place: str) -> NotCanonical:
    return NotCanonical(**{**error.facts, "path": place + error.facts["path"]})


def _canonical_number(value: float) -> int | float:
    """1 and 1.0 mean the same, so they read the same; -0.0 is 0."""
    if not math.isfinite(value):
        raise NotCanonical(value=value, path="", why="it is not finite")
    return int(value) if value.is_integer() and abs(value) < EXACT_INTEGER_MAX else value


_text = json.JSONEncoder(sort_keys=True, separators=(",", ":"), allow_nan=False, ensure_ascii=False).encode


def canonical_json(payload: Mapping[str, Any]) -> str:
    return _text(canonical(payload))


def canonical_fields(payload: Mapping[str, Any]) -> dict[str, str]:
    """Canonical JSON of each value, by key: parts that can go into more than one whole."""
    return {key: _text(value) for key, value in canonical(payload).items()}


def joined(fields: Mapping[str, str]) -> str:
    """The canonical JSON of which `fields` are the parts."""
    return "{" + ",".join(f"{_text(key)}:{fields[key]}" for key in sorted(fields)) + "}"


def identity(payload: Mapping[str, Any]) -> str:
    """The uid of a specification: 32 hex digits of sha256 over its canonical JSON, `kind` included."""
    return identity_of(canonical_fields(payload))


def identity_of(fields: Mapping[str, str]) -> str:
    """The same, of a specification in canonical parts."""
    if "version" in fields:
        raise NotCanonical(value=fields["version"], path="$.version", why="the name is taken by the version of the identity itself")
    body = joined({"version": str(IDENTITY_VERSION), **fields})
    return hashlib.sha256(body.encode()).hexdigest()[:32]


def identity_uuid(payload: Mapping[str, Any]) -> uuid.UUID:
    """The same uid in the form that uuid columns take."""
    return uuid.UUID(hex=identity(payload))


class Spec(BaseModel):
    """A frozen description of a computation. What is in the fields is what is in the uid."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, validate_default=True, ignored_types=(functools.cached_property,)
    )

    kind: str  # a field, not a ClassVar: nested specs must carry their kind into the parent's uid

    @functools.cached_property
    def uid(self) -> str:
        """Worked out once: a run asks for it again and again."""
        return self._uid()

    def _uid(self) -> str:
        return identity_of(self.canonical_fields)

    @functools.cached_property
    def canonical_fields(self) -> dict[str, str]:
        """Canonical JSON of each field that is set, by name; what a portfolio's hash and its signal's uid are both made of is made once.

        Absent options are left out, so a later optional field does not rename everything that exists.
        """
        return canonical_fields(self.model_dump(exclude_none=True))

    def remember(self, name: str, value: str) -> None:
        """An identity that somebody else has worked out for this very spec: it costs more than all else of a node."""
        vars(self)[name] = value

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """As pydantic's, but without what was worked out for the original."""
        copied = super().model_copy(update=update, deep=deep)
        for name in vars(copied).keys() - type(self).model_fields.keys():
            del vars(copied)[name]
        return copied


S = TypeVar("S", bound=Spec)
T = TypeVar("T", bound=Spec)


class Kinds(Generic[S]):
    """The registry of one family of specs: `kind` -> class. A configuration chooses by name; nothing is ever imported from it.

    family  its name, for people
    base    what every class of it is a subclass of
    group   entry-point group in which installed distributions declare kinds of their own, `kind = "package.module:Class"`; none: no plugins
    """

    def __init__(self, family: str, base: type[Spec] = Spec, group: str | None = None) -> None:
        self.family = family
        self.classes: KindClasses[S] = KindClasses(family, base, group)

    def register(self, cls: type[T]) -> type[T]:
        """Class decorator. The class's `kind` must be a Literal with a default."""
        self.classes[str(cls.model_fields["kind"].default)] = cls  # type: ignore[assignment] - T is S's, which TypeVar cannot say
        return cls

    def parse(self, value: Any) -> Any:
        """Plain data as an instance of the class that its `kind` names; instances pass. Raises UnknownKind, or pydantic's errors."""
        if not isinstance(value, Mapping):
            return value
        cls = self.classes.get(str(value.get("kind")))
        if cls is None:
            raise self.unknown(value.get("kind"))
        return cls.model_validate(value)

    def unknown(self, kind: Any) -> UnknownKind:
        """The error for a kind that there is not; it says so when a plugin has it, but is left out."""
        facts = {"family": self.family, "kind": kind, "known": ", ".join(sorted(self.classes))}
        if refused := self.left_out().get(str(kind)):
            return PluginLeftOut(**facts, plugin=refused[0], why=refused[1])
        return UnknownKind(**facts)

    def plugins(self) -> dict[str, str]:
        """Kinds that plugins brought, and the `distribution version` of each."""
        self.classes.load_all()
        return dict(sorted(self.classes.origins.items()))

    def left_out(self) -> dict[str, tuple[str, str]]:
        """Kinds that plugins declare and that cannot be used: `distribution version`, and why."""
        self.classes.load_all()
        return dict(sorted(self.classes.refused.items()))


class KindClasses(MutableMapping[str, type[S]]):
    """Classes by kind: those that were registered, and those of plugins, each imported when it is first asked for, or when all are.

    A plugin that cannot be used is left out with a warning; nothing else suffers from it. A kind that two distributions declare is
    left out too: the order of an installation must not choose whose numbers they are.
    """

    def __init__(self, family: str, base: type[Spec], group: str | None) -> None:
        self.family, self.base, self.group = family, base, group
        self.origins: dict[str, str] = {}
        self.refused: dict[str, tuple[str, str]] = {}
        self._found: dict[str, type[S]] = {}
        self._declared: dict[str, list[EntryPoint]] | None = None if group else {}  # not looked at yet; None: not even at their names

    def __getitem__(self, kind: str) -> type[S]:
        if kind not in self._found:
            self._load(kind)
        return self._found[kind]

    def __setitem__(self, kind: str, cls: type[S]) -> None:
        self._found[kind] = cls
        self.origins.pop(kind, None)

    def __delitem__(self, kind: str) -> None:
        del self._found[kind]
        self.origins.pop(kind, None)

    def __iter__(self) -> Iterator[str]:
        """In order of registration, then those of plugins by name: whichever was asked for first."""
        self.load_all()
        return iter(sorted(self._found, key=lambda kind: (kind in self.origins, kind if kind in self.origins else "")))

    def __len__(self) -> int:
        self.load_all()
        return len(self._found)

    def load_all(self) -> None:
        for kind in self._names():
            self._load(kind)

    def _names(self) -> list[str]:
        with _LOADING:
            if self._declared is None:
                self._declared = {}
                for point in entry_points(group=str(self.group)):  # metadata alone, about 6 ms; nothing is imported
                    self._declared.setdefault(point.name, []).append(point)
            return sorted(self._declared)

    def _load(self, kind: str) -> None:
        with _LOADING:
            if kind not in self._names() or self._declared is None:
                return
            points = self._declared.pop(kind)  # before the import: a plugin may look kinds up while it is imported
            plugin = " and ".join(sorted({_distribution(point) for point in points}))
            found = self._checked(kind, points)
            if isinstance(found, str):
                self.refused[kind] = plugin, found
                log.warning("plugin left out", family=self.family, kind=kind, plugin=plugin, why=found)
            else:
                self._found[kind] = found
                self.origins[kind] = plugin

    def _checked(self, kind: str, points: list[EntryPoint]) -> Any:
        """The class that is declared, or why it cannot be used."""
        if len(points) > 1:
            return "the kind is declared more than once"
        try:
            cls = points[0].load()
        except (Exception, SystemExit) as error:  # whatever somebody else's module does when it is imported
            return f"{points[0].value} cannot be imported ({_told(error)})"
        if not (isinstance(cls, type) and issubclass(cls, self.base)):
            return f"{points[0].value} is no subclass of {self.base.__name__}"
        field = cls.model_fields["kind"]
        if get_args(field.annotation) != (kind,) or field.default != kind:
            return f"{points[0].value} lacks the field kind: Literal['{kind}'] = '{kind}'"
        if self._found.get(kind, cls) is not cls:
            return "the kind is there already"
        try:
            cls.model_json_schema()  # a configuration is stored as JSON
        except Exception as error:
            return f"the fields of {points[0].value} are no JSON ({_told(error)})"
        return cls


log = structlog.get_logger()
_LOADING = threading.RLock()  # of the module: a lock in a registry would keep it from being copied or pickled


def _distribution(point: EntryPoint) -> str:
    try:
        name, version = (point.dist.name, point.dist.version) if point.dist else (None, None)
    except Exception:  # the metadata are damaged
        name = version = None
    return f"{name} {version}" if name and version else "a distribution without name and version"


def _told(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


# -- namespace -----------------------------------------------------------------------------------------------------------


def current_namespace() -> str:
    """The namespace of this process; empty is the default namespace. Raises InvalidNamespace."""
    return checked_namespace(Settings().auto_register_namespace)


def checked_namespace(namespace: str | None) -> str:
    """An explicit namespace, or the process's own for None. Raises InvalidNamespace."""
    if namespace is None:
        return current_namespace()
    if namespace and not re.fullmatch(r"[a-z][a-z0-9_]{0,30}", namespace):
        raise InvalidNamespace(namespace=namespace)
    return namespace


def logical_identifier(name: str, namespace: str | None = None) -> str:
    """`name` in the default namespace, `ns.name` in another; never prefixed twice. An explicit namespace wins."""
    namespace = checked_namespace(namespace)
    return f"{namespace}.{name}" if namespace and not name.startswith(f"{namespace}.") else name


def physical_name(concept: str, namespace: str | None = None) -> str:
    """Table name of a concept, at most 63 bytes: a longer one ends in a hash of the whole, so two names never merge."""
    namespace = checked_namespace(namespace)
    name = f"msm__{concept}__{namespace}" if namespace else f"msm__{concept}"
    if len(name.encode()) <= PHYSICAL_NAME_BYTES_MAX:
        return name
    digest = hashlib.sha256(name.encode()).hexdigest()[:16]
    return f"{name.encode()[: PHYSICAL_NAME_BYTES_MAX - 17].decode(errors='ignore')}_{digest}"


def storage_uid(identifier: str) -> uuid.UUID:
    """Catalogue uid of a storage, from its logical identifier alone: the same in every database, so configurations hash the same."""
    return identity_uuid({"kind": "time_index_meta_table", "identifier": identifier})


def node_uid(storage_identifier: str, scope: str, hash_namespace: str | None = None) -> uuid.UUID:
    """Uid of the progress row of one (storage, scope). `hash_namespace` defaults to the process namespace."""
    return _node_uid(storage_identifier, scope, checked_namespace(hash_namespace))


@functools.lru_cache(maxsize=UIDS_KEPT)
def _node_uid(storage_identifier: str, scope: str, namespace: str | None) -> uuid.UUID:
    """`identity_uuid` of the four, which are canonical already: a fleet asks for several of each of its nodes."""
    fields = {"kind": "data_node_update", "storage": storage_identifier, "scope": scope, "namespace": namespace}
    return uuid.UUID(hex=hashlib.sha256(_text({"version": IDENTITY_VERSION, **fields}).encode()).hexdigest()[:32])
