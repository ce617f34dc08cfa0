"""Selectors: which portfolios and signals of a fleet a command is about.

    --select tag:core --select signal:equal+      union: the option repeated
    --select "tag:core,portfolio:ew-*"            intersection: separated by commas

One part is `[+]method:value[+]`; a bare word is `portfolio:word`. Values are shell globs (`*`, `?`, `[a-z]`), case counts.

    portfolio:p   the portfolio            tag:t      portfolios with the tag       asset:AAPL  portfolios whose signal names it
    signal:s      the signal alone         status:x   portfolios last seen so       reason:x    portfolios that failed for that reason
    signal:s+     and what follows it      `s` is the signal's name in the fleet file, its kind or its uid

A selected portfolio always brings its own signal, and the portfolios that the signal tracks: without them it cannot be brought up to
date. That is what dbt writes `+portfolio:p`, so a leading `+` is accepted and changes nothing. Nothing follows a portfolio, so
a trailing `+` changes something for signals only. Signals are brought in last: an intersection is one of what the parts name.

Names may hold any character: `\\,` is a comma, and in brackets a character stands for itself, `[*]`, `[[]`, or `[+]` at the end.
"""

import difflib
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from msm_core.errors import SelectionError


@dataclass(frozen=True)
class Selectable:
    """What selectors know about one portfolio.

    status, reason  of its last result, None before there is one; the reason only of a failure, for example missing_price
    """

    identifier: str
    tags: frozenset[str]
    signal_uid: str
    signal_name: str | None
    signal_kind: str
    assets: frozenset[str]
    status: str | None = None
    reason: str | None = None


@dataclass(frozen=True)
class Selection:
    """Portfolio identifiers and signal uids."""

    portfolios: frozenset[str]
    signals: frozenset[str]


@dataclass(frozen=True)
class _Part:
    """One `method:value`, as it was written in `source`."""

    source: str
    method: str
    value: str
    followers: bool


def _optional(value: str | None) -> frozenset[str]:
    return frozenset() if value is None else frozenset((value,))


METHODS: dict[str, Callable[[Selectable], frozenset[str]]] = {  # what a value is compared with
    "portfolio": lambda p: frozenset((p.identifier,)),
    "tag": lambda p: p.tags,
    "signal": lambda p: frozenset((p.signal_uid, p.signal_kind)) | _optional(p.signal_name),
    "asset": lambda p: p.assets,
    "status": lambda p: _optional(p.status),
    "reason": lambda p: _optional(p.reason),
}


def select(expressions: Sequence[str], fleet: Sequence[Selectable]) -> Selection:
    """What any of the expressions names; everything when there is none. Raises SelectionError when one names nothing."""
    if not expressions:
        return _with_signals(set(range(len(fleet))), set(), fleet)
    portfolios: set[int] = set()
    signals: set[str] = set()
    for expression in expressions:
        chosen, alone = _intersection([_part(part, expression) for part in re.split(r"(?<!\\),", expression)], fleet)
        portfolios |= chosen
        signals |= alone
    return _with_signals(portfolios, signals, fleet)


def _with_signals(portfolios: set[int], signals: set[str], fleet: Sequence[Selectable]) -> Selection:
    own = {fleet[i].signal_uid for i in portfolios}
    return Selection(frozenset(fleet[i].identifier for i in portfolios), frozenset(own | signals))


def _intersection(term: Sequence[_Part], fleet: Sequence[Selectable]) -> tuple[set[int], set[str]]:
    """Positions of portfolios and uids of signals that every part names."""
    portfolios, signals = _matches(term[0], fleet)
    for part in term[1:]:
        also, alone = _matches(part, fleet)
        portfolios &= also
        signals &= alone
    if not portfolios and not signals:
        source = ",".join(part.source for part in term)
        raise SelectionError(selector=source, why=f"each part matches something, but nothing matches all {len(term)}{_hint(term)}")
    return portfolios, signals


def _hint(term: Sequence[_Part]) -> str:
    alone = next((part.source for part in term if part.method == "signal" and not part.followers), None)
    return f"; {alone} is the signal alone, {alone}+ also the portfolios that follow it" if alone else ""


def _matches(part: _Part, fleet: Sequence[Selectable]) -> tuple[set[int], set[str]]:
    """Positions of portfolios and uids of signals that one part names."""
    values = METHODS[part.method]
    known = {value for values_of_one in {values(p) for p in fleet} for value in values_of_one}
    wanted = {value for value in known if value == part.value or fnmatchcase(value, part.value)}
    if not wanted:
        raise SelectionError(selector=part.source, why=_nothing(part, known))
    chosen = {i for i, p in enumerate(fleet) if not wanted.isdisjoint(values(p))}
    if part.method != "signal":
        return chosen, set()
    signals = {fleet[i].signal_uid for i in chosen}  # one signal may go by several names: whoever follows it, follows the uid
    return {i for i, p in enumerate(fleet) if part.followers and p.signal_uid in signals}, signals


def _nothing(part: _Part, known: Iterable[str]) -> str:
    if not (names := sorted(known)):
        return f"no portfolio has a {part.method}"
    close = difflib.get_close_matches(part.value, names, n=3, cutoff=0.5)
    return f"no {part.method} matches; {'close' if close else 'known'}: {', '.join(close or names[:5])}"


def _part(text: str, expression: str) -> _Part:
    source = text.strip()
    if not source:
        raise SelectionError(selector=expression, why="a part between commas is empty" if expression.strip() else "it is empty")
    written = source.removeprefix("+").removesuffix("+").replace("\\,", ",")
    method, colon, value = written.partition(":")
    if not colon:
        method, value = "portfolio", written
    if method not in METHODS:
        why = f"there is no method {method!r} (methods: {', '.join(METHODS)}); for an id with a colon write portfolio:{source}"
        raise SelectionError(selector=source, why=why)
    if not value:
        raise SelectionError(selector=source, why="a value is missing")
    return _Part(source, method, value, source.endswith("+"))
