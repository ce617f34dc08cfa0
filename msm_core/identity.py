"""Identity: what a specification is called, on every machine and every day.

A uid is a sha256 over canonical JSON. What changes numbers is inside it; what describes is not. The namespace is applied here
and nowhere else: to logical identifiers (`ns.Asset`), to physical tables (`msm__asset__ns`) and, by default, to node uids.
"""

import hashlib
import json
import math
import re
import uuid
from collections.abc import Mapping, Sequence
from datetime import UTC, date, datetime, timedelta
from enum import Enum
from typing import Any, Generic, TypeVar

import numpy as np
from pydantic import BaseModel, ConfigDict

from msm_core.errors import InvalidNamespace, NotCanonical, UnknownKind
from msm_core.settings import Settings

IDENTITY_VERSION = 1  # bump only with a migration: every stored uid depends on it
PHYSICAL_NAME_BYTES_MAX = 63  # Postgres truncates longer names in silence
EXACT_INTEGER_MAX = 2**53  # above it a float no longer names one integer


def canonical(value: Any, path: str = "$") -> Any:
    """`value` as plain JSON data in which equal meaning is equal text. Raises NotCanonical for NaN, infinities and unknown types."""
    match value:
        case None | bool() | str():
            return value
        case Enum():
            return canonical(value.value, path)
        case int():
            return int(value)
        case float() | np.floating():
            return _canonical_number(float(value), path)
        case datetime():
            if value.tzinfo is None:
                raise NotCanonical(value=value, path=path, why="it has no time zone")
            return value.astimezone(UTC).isoformat()
        case date() | uuid.UUID():
            return str(value)
        case timedelta():
            return _canonical_number(value.total_seconds(), path)
        case BaseModel():
            return canonical(value.model_dump(), path)
        case Mapping():
            plain = {str(key): canonical(item, f"{path}.{key}") for key, item in value.items()}
            if len(plain) < len(value):
                raise NotCanonical(value=repr(dict(value)), path=path, why="two of its keys, such as 1 and '1', are the same text")
            return plain
        case set() | frozenset():
            return sorted((canonical(item, f"{path}{{}}") for item in value), key=lambda item: json.dumps(item, sort_keys=True))
        case Sequence() if not isinstance(value, (bytes, bytearray, memoryview)):
            return [canonical(item, f"{path}[{i}]") for i, item in enumerate(value)]
    raise NotCanonical(value=repr(value), path=path, why=f"{type(value).__name__} is not a plain value")


def _canonical_number(value: float, path: str) -> int | float:
    """1 and 1.0 mean the same, so they read the same; -0.0 is 0."""
    if not math.isfinite(value):
        raise NotCanonical(value=value, path=path, why="it is not finite")
    return int(value) if value.is_integer() and abs(value) < EXACT_INTEGER_MAX else value


def canonical_json(payload: Mapping[str, Any]) -> str:
    return json.dumps(canonical(payload), sort_keys=True, separators=(",", ":"), allow_nan=False, ensure_ascii=False)


def identity(payload: Mapping[str, Any]) -> str:
    """The uid of a specification: 32 hex digits of sha256 over its canonical JSON, `kind` included."""
    if "version" in payload:
        raise NotCanonical(value=payload["version"], path="$.version", why="the name is taken by the version of the identity itself")
    body = canonical_json({"version": IDENTITY_VERSION, **payload})
    return hashlib.sha256(body.encode()).hexdigest()[:32]


def identity_uuid(payload: Mapping[str, Any]) -> uuid.UUID:
    """The same uid in the form that uuid columns take."""
    return uuid.UUID(hex=identity(payload))


class Spec(BaseModel):
    """A frozen description of a computation. What is in the fields is what is in the uid."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, validate_default=True)

    kind: str  # a field, not a ClassVar: nested specs must carry their kind into the parent's uid

    @property
    def uid(self) -> str:
        """Absent options are left out, so a later optional field does not rename everything that exists."""
        return identity(self.model_dump(exclude_none=True))


S = TypeVar("S", bound=Spec)
T = TypeVar("T", bound=Spec)


class Kinds(Generic[S]):
    """The registry of one family of specs: `kind` -> class. A configuration chooses by name; nothing is ever imported from it."""

    def __init__(self, family: str) -> None:
        self.family = family
        self.classes: dict[str, type[S]] = {}

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
            raise UnknownKind(family=self.family, kind=value.get("kind"), known=", ".join(sorted(self.classes)))
        return cls.model_validate(value)


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
    namespace = checked_namespace(hash_namespace)
    return identity_uuid({"kind": "data_node_update", "storage": storage_identifier, "scope": scope, "namespace": namespace})
