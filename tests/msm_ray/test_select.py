"""Selectors over a fleet of five portfolios; every expected set is read off the table."""

import glob
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from msm_core.errors import SelectionError
from msm_ray.select import METHODS, Selectable, Selection, select


def portfolio(
    identifier: str,
    tags: str,
    signal: str,
    kind: str,
    assets: str,
    status: str | None = None,
    reason: str | None = None,
    name: str | None = "",
) -> Selectable:
    return Selectable(
        identifier=identifier,
        tags=frozenset(tags.split()),
        signal_uid=f"uid-{signal}",
        signal_name=signal if name == "" else name,
        signal_kind=kind,
        assets=frozenset(assets.split()),
        status=status,
        reason=reason,
    )


FLEET = [
    portfolio("ew-monthly", "core equity", "equal", "equal_weights", "AAPL MSFT", "failed", "new"),
    portfolio("ew-daily", "equity", "equal", "equal_weights", "AAPL MSFT", "done", "prices_corrected"),
    portfolio("sixty-forty", "core", "sixty", "fixed_weights", "AAPL BRK.B", "failed", "new"),
    portfolio("mom-63", "research", "m63", "momentum", "TSLA", name=None),
    portfolio("mom-126", "research", "m126", "momentum", "TSLA", name=None),
]

EQUAL, SIXTY, M63, M126 = "uid-equal", "uid-sixty", "uid-m63", "uid-m126"


@pytest.mark.parametrize(
    ("expressions", "portfolios", "signals"),
    [
        (["portfolio:ew-daily"], {"ew-daily"}, {EQUAL}),
        (["ew-daily"], {"ew-daily"}, {EQUAL}),
        (["+portfolio:ew-daily"], {"ew-daily"}, {EQUAL}),
        (["+ew-daily+"], {"ew-daily"}, {EQUAL}),
        (["ew-*"], {"ew-monthly", "ew-daily"}, {EQUAL}),
        (["portfolio:mom-[0-9][0-9]"], {"mom-63"}, {M63}),
        (["portfolio:mom-?26"], {"mom-126"}, {M126}),
        (["tag:core"], {"ew-monthly", "sixty-forty"}, {EQUAL, SIXTY}),
        (["signal:equal"], set(), {EQUAL}),
        (["signal:equal+"], {"ew-monthly", "ew-daily"}, {EQUAL}),
        (["signal:uid-equal"], set(), {EQUAL}),
        (["signal:momentum+"], {"mom-63", "mom-126"}, {M63, M126}),
        (["asset:BRK.B"], {"sixty-forty"}, {SIXTY}),
        (["asset:AAPL+"], {"ew-monthly", "ew-daily", "sixty-forty"}, {EQUAL, SIXTY}),
        (["asset:AAPL"], {"ew-monthly", "ew-daily", "sixty-forty"}, {EQUAL, SIXTY}),
        (["status:failed"], {"ew-monthly", "sixty-forty"}, {EQUAL, SIXTY}),
        (["reason:prices_*"], {"ew-daily"}, {EQUAL}),
        # union: several expressions
        (["ew-daily", "sixty-forty"], {"ew-daily", "sixty-forty"}, {EQUAL, SIXTY}),
        (["ew-daily", "signal:uid-m63"], {"ew-daily"}, {EQUAL, M63}),
        # intersection binds closer than union
        (["tag:core,asset:MSFT"], {"ew-monthly"}, {EQUAL}),
        (["tag:core, asset:MSFT", "mom-63"], {"ew-monthly", "mom-63"}, {EQUAL, M63}),
        (["signal:equal+,tag:core"], {"ew-monthly"}, {EQUAL}),  # the signal by itself has no tag, but the portfolio brings it
        (["signal:equal+,signal:equal_weights"], set(), {EQUAL}),
        ([], {p.identifier for p in FLEET}, {EQUAL, SIXTY, M63, M126}),
    ],
)
def test_select(expressions, portfolios, signals):
    assert select(expressions, FLEET) == Selection(frozenset(portfolios), frozenset(signals))


def test_a_signal_under_two_names_is_followed_under_both():
    fleet = [portfolio("a", "", "equal", "equal_weights", "A"), portfolio("b", "", "equal", "equal_weights", "A", name="also-equal")]
    assert select(["signal:also-equal+"], fleet).portfolios == {"a", "b"}


@pytest.mark.parametrize(
    ("expression", "selector", "why"),
    [
        ("ew-dialy", "ew-dialy", "close: ew-daily"),
        ("tag:cor", "tag:cor", "close: core"),
        ("tag:zzz", "tag:zzz", "known: core, equity, research"),
        ("signal:eqal+", "signal:eqal+", "close: equal"),
        ("ew-daily,asset:APPL", "asset:APPL", "close: AAPL"),
        ("tag:core,portfolio:EW-*", "portfolio:EW-*", "known: ew-daily"),  # case counts
        ("reason:stale", "reason:stale", "no reason matches"),
        ("tag:research,status:failed", "tag:research,status:failed", "nothing matches all 2"),
        ("signal:equal,tag:core", "signal:equal,tag:core", "signal:equal+ also the portfolios that follow it"),
        ("fx:eurusd", "fx:eurusd", "portfolio:fx:eurusd"),
        ("", "", "empty"),
        ("   ", "   ", "empty"),
        ("tag:", "tag:", "a value is missing"),
        ("+", "+", "a value is missing"),
        ("signal:+", "signal:+", "a value is missing"),
        ("tag:core,,ew-daily", "tag:core,,ew-daily", "between commas"),
        (",", ",", "between commas"),
    ],
)
def test_a_selector_that_cannot_be_used_is_named(expression, selector, why):
    with pytest.raises(SelectionError) as caught:
        select([expression], FLEET)
    assert caught.value.facts["selector"] == selector
    assert why in caught.value.facts["why"]
    assert repr(selector) in str(caught.value)


def test_nothing_known_of_a_method():
    with pytest.raises(SelectionError, match="no portfolio has a status"):
        select(["status:failed"], [portfolio("a", "", "s", "k", "A")])


@pytest.mark.parametrize(
    ("identifier", "expression"),
    [
        ("a, b", r"portfolio:a\, b"),
        ("a\\,b", r"a\\,b"),
        ("a+", "a[+]"),
        ("+a", "portfolio:+a"),
        ("fx:eurusd", "portfolio:fx:eurusd"),
        ('say "hi"', 'say "hi"'),
        ("*", "[*]"),
        ("a[1]", "a[1]"),  # the glob matches only a1, but the text is an id
        ("a[1]", "a[[]1]"),
    ],
)
def test_names_of_any_character(identifier, expression):
    fleet = [portfolio(identifier, "", "s", "k", "A"), portfolio("other", "", "t", "k", "A")]
    assert select([expression], fleet).portfolios == {identifier}


IDENTIFIERS = st.text(st.characters(exclude_categories=["Cc", "Cs", "Z"]), min_size=1, max_size=12)


@settings(deadline=None)
@given(st.sets(IDENTIFIERS, min_size=1, max_size=5), st.sampled_from(sorted(METHODS)))
def test_every_identifier_can_be_written(identifiers, method):
    fleet = [Selectable(i, frozenset({i}), i, i, i, frozenset({i}), i, i) for i in sorted(identifiers)]
    chosen = min(identifiers)
    written = glob.escape(chosen).replace(",", "\\,")
    selection = select([f"{method}:{written[:-1]}[+]" if written.endswith("+") else f"{method}:{written}"], fleet)
    assert selection.signals == {chosen}
    assert selection.portfolios == (set() if method == "signal" else {chosen})


@settings(deadline=None)
@given(st.text(max_size=30))
def test_any_text_selects_or_is_refused(expression):
    try:
        selection = select([expression], FLEET)
    except SelectionError:
        return
    assert selection.portfolios | selection.signals


def test_a_large_fleet_takes_a_moment():
    assets = frozenset(f"A{i}" for i in range(500))
    fleet = [Selectable(f"p{i}", frozenset({f"t{i % 7}"}), f"uid{i % 40}", None, "k", assets) for i in range(20_000)]
    started = time.perf_counter()
    selection = select(["asset:A7,tag:t3", "p1*"], fleet)
    assert time.perf_counter() - started < 5.0  # 0.1 s on an idle core
    # p1, p10-19, p100-199, p1000-1999, p10000-19999: 1 + 10 + 100 + 1000 + 10000; of the other 8889 those that are 3 modulo 7
    assert len(selection.portfolios) == 11_111 + sum(1 for i in range(20_000) if i % 7 == 3 and not str(i).startswith("1"))
