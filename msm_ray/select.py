"""Selectors: which portfolios and signals of a fleet a command is about.

    --select "tag:core signal:equal+"        union: separated by spaces, or by repeating the option
    --select "tag:core,portfolio:ew-*"       intersection: separated by commas

One part is `[+]method:value[+]`; a bare word is `portfolio:word`. Values are shell globs (`*`, `?`, `[a-z]`), case counts.

    portfolio:p   the portfolio            tag:t      portfolios with the tag       asset:AAPL  portfolios whose signal names it
    signal:s      the signal alone         status:x   portfolios last seen so       reason:x    portfolios planned for that reason
    signal:s+     and what follows it      `s` is the signal's name in the fleet file, its kind or its uid

A selected portfolio always brings its own signal: its weights are made from the signal's vectors, so it cannot be brought up to date
without it. That is what dbt writes `+portfolio:p`, so a leading `+` is accepted and changes nothing. Nothing follows a portfolio, so
a trailing `+` changes something for signals only. Signals are brought in last: an intersection is one of what the parts name.

Names may hold any character: `"..."` takes what is inside as it is, a backslash the next character, as in a shell. So
`portfolio:"a, b"` has a comma and a space in its value, `portfolio:\\*` is the portfolio called `*`.
"""

import difflib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from msm_core.errors import SelectionError


@dataclass(frozen=True)
class Selectable:
    """What selectors know about one portfolio. `status` and `reason` are None before the ledger or the plan have been asked."""

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
    """One `method:value`. `pattern` is a glob in which what was quoted stands for itself; `text` is the value without quotes."""

    source: str
    method: str
    pattern: str
    text: str
    followers: bool


@dataclass(frozen=True)
class _Letter:
    """A character of an expression; a quoted one is never an operator."""

    character: str
    quoted: bool = False

    @property
    def glob(self) -> str:
        return f"[{self.character}]" if self.quoted and self.character in "*?[" else self.character


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
        for term in _terms(expression):
            chosen, alone = _intersection(term, fleet)
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
    wanted = {value for value in known if value == part.text or fnmatchcase(value, part.pattern)}
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
    close = difflib.get_close_matches(part.text, names, n=3, cutoff=0.5)
    return f"no {part.method} matches; {'close' if close else 'known'}: {', '.join(close or names[:5])}"


# -- grammar ------------------------------------------------------------------------------------------------------------


def _terms(expression: str) -> list[list[_Part]]:
    """The union's terms, each a list of parts to intersect."""
    words = [word for word in _split(_letters(expression), lambda c: c.isspace()) if word]
    if not words:
        raise SelectionError(selector=expression, why="it is empty")
    return [[_part(letters, expression) for letters in _split(word, lambda c: c == ",")] for word in words]


def _letters(expression: str) -> list[_Letter]:
    letters: list[_Letter] = []
    quoted = False
    characters = iter(expression)
    for character in characters:
        if character == "\\":
            following = next(characters, None)
            if following is None:
                raise SelectionError(selector=expression, why="it ends in a backslash; write \\\\ for one")
            letters.append(_Letter(following, quoted=True))
        elif character == '"':
            quoted = not quoted
        else:
            letters.append(_Letter(character, quoted))
    if quoted:
        raise SelectionError(selector=expression, why='a " is not closed')
    return letters


def _split(letters: Sequence[_Letter], separates: Callable[[str], bool]) -> list[list[_Letter]]:
    words: list[list[_Letter]] = [[]]
    for letter in letters:
        if not letter.quoted and separates(letter.character):
            words.append([])
        else:
            words[-1].append(letter)
    return words


def _part(letters: list[_Letter], expression: str) -> _Part:
    source = "".join(letter.character for letter in letters)
    plus = _Letter("+")
    value = letters[1:] if letters[:1] == [plus] else letters
    followers = value[-1:] == [plus]
    value = value[:-1] if followers else value
    colon = next((i for i, letter in enumerate(value) if letter == _Letter(":")), None)
    method = "portfolio" if colon is None else "".join(letter.character for letter in value[:colon])
    value = value if colon is None else value[colon + 1 :]
    if method not in METHODS:
        why = f"there is no method {method!r} (methods: {', '.join(METHODS)}); for an id with a colon write portfolio:{source}"
        raise SelectionError(selector=source, why=why)
    if not value:
        raise SelectionError(selector=source or expression, why="a value is missing" if source else "a part between commas is empty")
    text = "".join(letter.character for letter in value)
    return _Part(source, method, "".join(letter.glob for letter in value), text, followers)
