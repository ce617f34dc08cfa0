"""Fleet files: what they mean, what never changes an identity, and what is said about each mistake, at its line."""

import json
import pickle
import random
import re
import time
from datetime import date, timedelta
from pathlib import Path
from typing import Any, Literal
from uuid import UUID

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from msm_core.configuration import CashRate
from msm_core.data_nodes.interpolated_prices import InterpolatedPrices
from msm_core.data_nodes.prices import APIDataNode
from msm_core.errors import ConfigurationError
from msm_core.signals import SIGNALS, EqualWeights, FixedWeights, InverseVolatility
from msm_ray.fleet import fleet_json_schema, load_fleet
from tests.contracts import nest

EXAMPLE = Path(__file__).parents[2] / "examples" / "fleet.yaml"

# line numbers in the tests below count from `version` (line 1)
BASE = """\
version: 1
prices: { daily: { source: ExternalPricesTS } }
universes: { two: [MSFT, AAPL] }
signals: { equal: { kind: equal_weights, universe: two } }
rebalance: { daily: { kind: immediate_signal, calendar_key: XNYS } }
defaults: { prices: daily, rebalance: daily, signal: equal }
"""
PORTFOLIO = BASE + "portfolios: [ { id: p } ]\n"  # line 7


@pytest.fixture(autouse=True)
def default_namespace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MSM_AUTO_REGISTER_NAMESPACE", raising=False)


def write(folder: Path, files: dict[str, str]) -> Path:
    """Writes the files, and returns the path of the first."""
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    return folder / next(iter(files))


@pytest.fixture
def load(tmp_path: Path):
    return lambda text, **others: load_fleet(write(tmp_path, {"fleet.yaml": text, **others}))


@pytest.fixture
def problems(load):
    """The problems of a file that must have some."""

    def of(text: str, **others: str) -> list[str]:
        with pytest.raises(ConfigurationError) as caught:
            load(text, **others)
        return pickle.loads(pickle.dumps(caught.value)).facts["problems"]  # as they reach another process

    return of


def test_the_example_loads():
    fleet = load_fleet(EXAMPLE)
    matrix = [f"equal-tech-{on}-lag{lag}" for on in ("week_end", "month_end") for lag in (0, 1)]
    assert [p.identifier for p in fleet.portfolios] == [
        "equal-monthly",
        "equal-weekly",
        "sixty-forty",
        "equal-weekly-filled",
        "momentum-monthly",
        "calm-banded",
        "momentum-tracker",
        *matrix,
    ]
    momentum, calm, tracker = (p for p in fleet.portfolios if p.identifier in ("momentum-monthly", "calm-banded", "momentum-tracker"))
    assert {p.signal.price_source for p in (momentum, calm, tracker)} == {momentum.price_source}  # that of the defaults
    assert tracker.signal.target.portfolio == momentum.identifier
    assert calm.rebalance.limits.no_short
    assert [p.identifier for p in fleet.portfolios if p.price_source.policy == ("1d", "ffill")] == ["equal-weekly-filled"]
    calendar = {"pandas_calendar": "NYSE", "valid_from": date(1990, 1, 1), "valid_to": date(2023, 12, 31)}
    assert [c.model_dump(exclude_none=True) for c in fleet.calendars] == [calendar | {"unique_identifier": "XNYS"}]
    monthly, _, sixty, *_, last = fleet.portfolios
    assert (monthly.rebalance.rebalance_on, monthly.rebalance.execution_lag, monthly.index_identifier) == ("month_end", 1, "EQUAL10")
    assert sixty.signal == FixedWeights.from_signal_configuration(weights={"AAPL": 0.6, "MSFT": 0.4})
    markets = sixty.portfolio_markets_configuration
    assert (markets.tags, markets.portfolio_name, markets.signal_name) == (("core", "concentrated"), "AAPL 60, MSFT 40", "sixty-forty")
    assert (sixty.start_date, last.portfolio_markets_configuration.signal_name) == (date(2000, 1, 3), None)
    # its own fee, and from the defaults what it does not say
    assert (last.execution.commission_fee, last.execution.weight_accounting) == (0.0005, "drifted")


@pytest.mark.parametrize("namespace", ["", "prod"])
def test_a_source_is_an_identifier_or_a_uid(load, monkeypatch, namespace):
    monkeypatch.setenv("MSM_AUTO_REGISTER_NAMESPACE", namespace)
    uid = str(APIDataNode.build_from_identifier("ExternalPricesTS").source_uid)
    assert load(PORTFOLIO).portfolios == load(PORTFOLIO.replace("ExternalPricesTS", uid)).portfolios


@pytest.mark.parametrize(("assets", "expected"), [("", None), ("assets: two", ("AAPL", "MSFT")), ("assets: [XOM, AAPL]", ("AAPL", "XOM"))])
def test_prices_can_be_interpolated(load, assets, expected):
    entry = f"{{ source: ExternalPricesTS, interpolate: {{ frequency: 24h, rule: ffill, {assets} }} }}"
    (p,) = load(PORTFOLIO.replace("{ source: ExternalPricesTS }", entry)).portfolios
    assert isinstance(p.price_source, InterpolatedPrices)
    source = APIDataNode.build_from_identifier("ExternalPricesTS")
    assert p.price_source.dependencies() == {"source_prices": source}
    assert (p.price_source.source_uid, p.price_source.policy) == (source.source_uid, ("1d", "ffill"))
    assert p.price_source.asset_list == expected


def test_a_portfolio_overrides_the_defaults_key_by_key(load):
    defaults = """signal: equal, frequency: 1h, tags: [a, b], start_date: 2020-01-31, price_column: vwap,
  execution: { commission_fee: 0.001, weight_accounting: target },
  price_alignment_policy: { missing: hold, maximum_staleness: 3d }"""
    text = """
portfolios:
  - &p { id: p }
  - { id: q, execution: { commission_fee: 0 }, price_alignment_policy: { maximum_staleness: 12h }, tags: [c], frequency: 5m }
  - { <<: *p, id: r, start_date: null, price_column: close, execution: { weight_accounting: drifted } }
"""
    p, q, r = load(BASE.replace("signal: equal", defaults) + text).portfolios
    assert [(x.execution.commission_fee, x.execution.weight_accounting) for x in (p, q)] == [(0.001, "target"), (0.0, "target")]
    assert (p.alignment.missing, p.alignment.maximum_staleness) == ("hold", timedelta(days=3))
    assert (q.alignment.missing, q.alignment.maximum_staleness) == ("hold", timedelta(hours=12))
    assert (p.frequency, p.start_date, p.price_column) == (timedelta(hours=1), date(2020, 1, 31), "vwap")
    assert (q.portfolio_markets_configuration.tags, q.frequency) == (("c",), timedelta(minutes=5))
    assert (r.start_date, r.price_column, r.execution.weight_accounting) == (None, "close", "drifted")


def test_a_matrix_is_every_combination_with_typed_values(load):
    text = """
portfolios:
  - id: "{on}-{lag}-{{{fee}}}"
    matrix: { on: [week_end, month_end], lag: [0, 1], fee: [0.00018] }
    rebalance: { kind: immediate_signal, calendar_key: XNYS, rebalance_on: "{on}", execution_lag: "{lag}" }
    signal: { kind: fixed_weights, weights: { "A{lag}": 1.0 } }
    execution: { commission_fee: "{fee}" }
  - { id: "{top}" } # braces mean nothing without a matrix
"""
    *found, plain = load(BASE + text).portfolios
    assert [(p.identifier, p.rebalance.rebalance_on, p.rebalance.execution_lag, p.signal.universe) for p in found] == [
        (f"{on}-{lag}-{{0.00018}}", on, lag, (f"A{lag}",)) for on in ("week_end", "month_end") for lag in (0, 1)
    ]
    assert plain.identifier == "{top}"


def test_includes(load):
    fleet = load(
        BASE + "portfolios: [ { id: top } ]\ninclude: [fleet.d/*.yaml, more.yaml]",
        **{
            "fleet.d/b.yaml": "portfolios: [ { id: b, signal: from-a } ]",
            "fleet.d/a.yaml": "version: 1\nsignals: { from-a: { kind: equal_weights, asset_list: [KO] } }\ninclude: [deeper/c.yaml]",
            "fleet.d/deeper/c.yaml": "portfolios: [ { id: c } ]\ninclude: [c.yaml]",
            "more.yaml": "portfolios: [ { id: more } ]\ninclude: [fleet.d/deeper/c.yaml]",  # a file reached twice is read once
        },
    )
    assert [p.identifier for p in fleet.portfolios] == ["top", "b", "more", "c"]


MONTHLY = {"kind": "immediate_signal", "calendar_key": "XNYS", "rebalance_on": "month_end", "execution_lag": 1}
DEFAULTS = {
    "prices": "daily",
    "rebalance": "monthly",
    "execution": {"commission_fee": 0.0005, "weight_accounting": "target"},
    "price_alignment_policy": {"missing": "hold", "maximum_staleness": "1d"},
}
E: dict[str, Any] = {"id": "e", "signal": "equal", "execution": {"commission_fee": 0}}
FIXED = {"kind": "fixed_weights", "weights": {"AAPL": 0.6, "MSFT": 0.3}, "effective_from": "2020-01-01T00:00:00Z"}
DOCUMENT: dict[str, Any] = {
    "version": 1,
    "prices": {"daily": {"source": "ExternalPricesTS"}},
    "universes": {"u": ["AAPL", "MSFT", "XOM"]},
    "signals": {"equal": {"kind": "equal_weights", "universe": "u"}, "fixed": FIXED},
    "rebalance": {"monthly": MONTHLY},
    "defaults": DEFAULTS,
    "portfolios": [E, {"id": "f", "signal": "fixed", "start_date": "2021-02-03", "frequency": "1h"}],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fleets")


def hashes_of(folder: Path, document: dict[str, Any], comment: str = "") -> dict[str, str]:
    path = write(folder, {"fleet.yaml": comment + json.dumps(document)})
    return {p.identifier: p.configuration_hash for p in load_fleet(path).portfolios}


def shuffled(value: Any, order: random.Random) -> Any:
    """The same data with the keys of every mapping, and the assets of every universe, in another order."""
    if isinstance(value, dict):
        return {key: shuffled(value[key], order) for key in order.sample(list(value), len(value))}
    if isinstance(value, list) and value and isinstance(value[0], str):
        return order.sample(value, len(value))
    return [shuffled(item, order) for item in value] if isinstance(value, list) else value


@settings(max_examples=25, deadline=None)
@given(st.randoms(use_true_random=False), st.sampled_from(["", "# a comment\n", "%YAML 1.2\n---\n"]))
def test_key_order_and_comments_never_change_a_hash(folder, order, comment):
    assert hashes_of(folder, shuffled(DOCUMENT, order), comment) == hashes_of(folder, DOCUMENT)


@settings(max_examples=25, deadline=None)
@given(
    lags=st.lists(st.integers(0, 20), min_size=1, max_size=3, unique=True),
    fees=st.lists(st.floats(0, 0.99, allow_subnormal=False), min_size=1, max_size=3, unique=True),
)
def test_a_matrix_and_its_portfolios_written_out_hash_the_same(folder, lags, fees):
    def entry(identifier: str, lag: Any, execution: Any) -> dict[str, Any]:
        return {"id": identifier, "signal": "equal", "rebalance": MONTHLY | {"execution_lag": lag}, "execution": execution}

    matrix = {"lag": lags, "fee": fees}
    by_text = entry("p{lag}-{fee}", "{lag}", {"commission_fee": "{fee}"}) | {"matrix": matrix}
    by_mapping = entry("q{lag}", "{lag}", "{whole}") | {"matrix": {"lag": lags, "whole": [{"commission_fee": fees[0]}]}}
    written = [entry(f"p{lag}-{fee!r}", lag, {"commission_fee": fee}) for lag in lags for fee in fees]
    written += [entry(f"q{lag}", lag, {"commission_fee": fees[0]}) for lag in lags]
    found = hashes_of(folder, DOCUMENT | {"portfolios": [by_text, by_mapping]})
    assert found == hashes_of(folder, DOCUMENT | {"portfolios": written})


def test_the_file_a_thing_is_written_in_never_changes_a_hash(folder):
    top = {key: DOCUMENT[key] for key in ("version", "defaults")} | {"include": ["parts/*.yaml"]}
    write(folder, {f"parts/{i}.yaml": json.dumps({key: DOCUMENT[key]}) for i, key in enumerate(DOCUMENT) if key not in top})
    assert hashes_of(folder, top) == hashes_of(folder, DOCUMENT)


def test_yaml_is_not_part_of_a_hash(folder):
    entry = {"id": "p", "prices": "one", "signal": {"kind": "equal_weights", "asset_list": ["B", "A"]}, "rebalance": MONTHLY}
    document = {"version": 1, "prices": {"one": {"source": str(UUID(int=1))}}, "portfolios": [entry]}
    assert hashes_of(folder, document) == {"p": nest(EqualWeights(asset_list=("A", "B")), MONTHLY).configuration_hash}


@pytest.mark.parametrize(
    ("changes", "same"),
    [
        ({"tags": ["core"], "name": "A name", "description": "Some text", "publish_index": "INDEX", "id": "another"}, True),
        ({"price_column": "close", "frequency": "1d", "start_date": None, "execution": {"commission_fee": 0.0}}, True),  # defaults, said
        ({"price_alignment_policy": {"maximum_staleness": "24h"}}, True),
        ({"signal": {"kind": "equal_weights", "asset_list": ["XOM", "AAPL", "MSFT"]}, "rebalance": MONTHLY}, True),
        ({"execution": {"commission_fee": 0, "weight_accounting": "drifted"}}, False),
        ({"price_column": "open"}, False),
        ({"frequency": "1h"}, False),
        ({"start_date": "2021-02-03"}, False),
        ({"price_alignment_policy": {"maximum_staleness": "2d"}}, False),
        ({"signal": "fixed"}, False),
        ({"rebalance": MONTHLY | {"execution_lag": 0}}, False),
    ],
)
def test_only_what_changes_numbers_changes_a_hash(folder, changes, same):
    (changed,) = hashes_of(folder, DOCUMENT | {"portfolios": [E | changes]}).values()
    assert (changed == hashes_of(folder, DOCUMENT)["e"]) is same


@pytest.mark.parametrize(
    ("changes", "same"),
    [
        ({"assets": "u"}, True),
        ({"assets": ["XOM"]}, True),
        ({"frequency": "24h"}, True),
        ({"rule": "none"}, False),
        ({"frequency": "12h"}, False),
        (None, False),
    ],
)
def test_source_and_policy_are_the_identity_of_interpolated_prices(folder, changes, same):
    def hashes(source: str, interpolate: Any) -> dict[str, str]:
        return hashes_of(folder, DOCUMENT | {"prices": {"daily": {"source": source, "interpolate": interpolate}}})

    policy = {"frequency": "1d", "rule": "ffill"}
    uid = str(APIDataNode.build_from_identifier("ExternalPricesTS").source_uid)
    for source in ("ExternalPricesTS", uid):
        assert (hashes(source, changes and policy | changes) == hashes("ExternalPricesTS", policy)) is same
    assert hashes("another", policy) != hashes("ExternalPricesTS", policy)


# what is replaced in PORTFOLIO, or all of it | by what | line and what is told; * for words of libraries, and kinds that others register
MISTAKES = r"""
| # nothing | 1: cannot be read: the file is empty
| [] | 1: cannot be read: not a mapping of sections (version, signals, portfolios, ...)
| version: 1 | 1: has no portfolios: give at least one under 'portfolios'
| version: 1\nsignals: [\nsignals\n | 4: cannot be read: expected ',' or ']', but got '<stream end>'
| a: &a [*a] | 1: cannot be read: Circular reference detected
id: p | id: p,\ndescription: !!python/object/apply:os.system [true] | 8: cannot be read: could not determine a constructor for the tag *
version: 1 | version: 1\ncalendars: { X: { pandas_calendar: A, valid_from: x,\nvalid_to: 2020-01-01, timezone: M } } | 2: *from: * & 3: *
version: 1 | # none | 1: version: is missing
universe: two | universe: two, universe: two | 4: cannot be read: found duplicate key "universe" *
{ id: p } ] | { id: p } ]\nportfolio: [] | 8: portfolio: unknown key - did you mean 'portfolios'?
{ id: p } ] | { id: p } ]\nrun: {} | 8: run: unknown key - known: calendars, defaults, *
{ id: p } ] | { id: p } ]\nnamespace: prod | 8: namespace: this process has '': set MSM_AUTO_REGISTER_NAMESPACE, or correct the file
XNYS | XNYS,\n  execution_lagg: 1 | 6: rebalance.daily.execution_lagg: unknown key - did you mean 'execution_lag'?
XNYS | XNYS, execution_lag: true | 5: rebalance.daily.execution_lag: must be a valid integer, not true
kind: equal_weights | kind: equal | 4: signals.equal.kind: unknown kind "equal"; known kinds: equal_weights, external_weights*
kind: immediate_signal, | | 5: rebalance.daily.kind: is missing; known kinds: calendar_event*
universe: two | universe: tow | 4: signals.equal.universe: unknown universe 'tow' - did you mean 'two'?
universe: two | universe: two, asset_list: [A] | 4: signals.equal.universe: unknown key - known: asset_list, *
equal_weights, universe: two | fixed_weights, weights: { 9988: 1 } | 4: cannot be read: the key 9988 is not text - put it in quotes
equal_weights, universe: two | fixed_weights, weights: { A: .nan,\nB: '1' } | 4: *: * finite *, not NaN & 5: *.weights[1].*, not "1"
[MSFT, AAPL] | [AAPL, AAPL] | 3: universes.two: the universe names AAPL more than once
[MSFT, AAPL] | [\nTRUE] | 4: universes.two[0]: must be a valid string, not true - put it in quotes
source: | sourc: | 2: prices.daily.sourc: unknown key - did you mean 'source'? & 2: prices.daily.source: is missing
ExternalPricesTS | X, interpolate: { frequency: 1d,\nrule: fill } | 3: prices.daily.interpolate.rule: must be 'ffill' or 'none', not "fill"
ExternalPricesTS | X, interpolate: { frequency: daily,\nrule: none } | 2: prices.daily.interpolate.frequency: *, not "daily"
ExternalPricesTS | X, interpolate: {\nfrequency: 0d, rule: none } | 3: prices.daily.interpolate.frequency: *, not "0d"
ExternalPricesTS | X, interpolate: { frequency: 5, rule: none } | 2: prices.daily.interpolate.frequency: must be a valid string, not 5*
ExternalPricesTS | X, interpolate: {\nrulle: none } | 2: *.frequency: is missing & 2: *.rule: is missing & 3: *.rulle: unknown key*
ExternalPricesTS | X, interpolate: { frequency: 1d, rule: none,\nassets: tow } | 3: *.assets: unknown universe 'tow' - did you mean 'two'?
ExternalPricesTS | X, interpolate: 1d | 2: prices.daily.interpolate: *
ExternalPricesTS | X, interpolation: { frequency: 1d } | 2: prices.daily.interpolation: unknown key - did you mean 'interpolate'?
prices: daily | prices: dayly | 6: defaults.prices: unknown prices 'dayly' - did you mean 'daily'?
signal: equal | signal: equal, execution: { commission_fee: 2 } | 6: defaults.execution.commission_fee: must be less than 1, not 2*
id: p | | 7: portfolios[0].id: is missing
id: p | id: p, signal: null | 7: portfolios[0].signal: is missing, here and in 'defaults'
signal: equal | signal: null | 7: portfolios[0].signal: is missing, here and in 'defaults'
id: p | id: p,\n start_date: 1990-13-01 | 8: portfolios[0].start_date: must be a valid date in the format YYYY-MM-DD, *
id: p | id: p, frequency: 2d | 7: portfolios[0].*: portfolio_prices_frequency is 1d at most
id: p | id: p, price_alignment_policy: { maximum_stale: 3d } | 7: *: unknown key - did you mean 'maximum_staleness'?
id: p | id: p },\n{ id: p | 8: portfolios[1].id: 'p' is used twice, here and at fleet.yaml:7
id: p | id: p, publish_index: X },\n{ id: q, publish_index: X | 8: portfolios[1].publish_index: 'X' is used twice, here and at fleet.yaml:7
id: p | id: '' | 7: portfolios[0].id: String should have at least 1 character
id: p | id: "a\0b" | 7: portfolios[0].id: "a\u0000b" holds a control character
id: p | id: "e\u0301" | 7: portfolios[0].id: * is not in Unicode NFC; write "\u00e9"
id: p | id: p, signal: "a\eb" | 7: portfolios[0].signal: unknown signal 'a\u001bb' - known: equal
id: p | id: 'p{topp}', matrix: { top: [1] } | 7: portfolios[0]: '{topp}' is no text * - did you mean 'top'? (with top=1)
id: p | id: 'p{a}', matrix: { a: [[1]] } | 7: portfolios[0]: '{a}' is no text or number of the matrix* (with a=[1])
id: p | id: p, matrix: { top: [1, 2, 3] } | 7: portfolios[0].id: 'p' is used twice, here and at fleet.yaml:7 (with top=2)
id: p | id: '{a}', tags: { '{a}': 1, A: 1 }, matrix: { a: [A] } | 7: portfolios[0]: two keys become the same one (with a="A")
id: p | id: 'p{a}', execution: { commission_fee: '{a}' }, matrix: { a: [0, 1, 2] } | 7: *: must be less than 1, not 1 (with a=1)
"""


@pytest.mark.parametrize("mistake", MISTAKES.strip().splitlines())
def test_a_mistake_is_told_at_its_line(problems, mistake):
    old, new, expected = (part.strip() for part in mistake.split("|"))
    assert old in PORTFOLIO
    found = problems(PORTFOLIO.replace(old or PORTFOLIO, new.replace("\\n", "\n"), 1))
    patterns = [re.escape(f"fleet.yaml:{pattern}").replace(r"\*", ".*") for pattern in expected.split(" & ")]
    assert len(found) == len(patterns) and all(map(re.fullmatch, patterns, found)), found  # noqa: PT018


# one sentence each, in words of the file
OF_ASSETS = r"""
rule: none,\nassets: [A, A] | 3: prices.daily.interpolate.assets: asset_list names A more than once
rule: none,\nassets: [] | 3: prices.daily.interpolate.assets: Tuple should have at least 1 item after validation, not 0
rule: none,\nrulle: x | 3: prices.daily.interpolate.rulle: unknown key - did you mean 'rule'?
"""


@pytest.mark.parametrize("mistake", OF_ASSETS.strip().splitlines())
def test_a_mistake_in_an_interpolation_is_told_once(problems, mistake):
    policy, expected = mistake.split(" | ")
    text = PORTFOLIO.replace("ExternalPricesTS", f"X, interpolate: {{ frequency: 1d, {policy} }}".replace("\\n", "\n"))
    assert problems(text) == [f"fleet.yaml:{expected}"]


def test_files_that_cannot_be_read(tmp_path):
    write(tmp_path, {"deep.yaml": "a: " + "[" * 999})
    (tmp_path / "latin.yaml").write_bytes(b"version: 1\n# \xe9\n")
    for problem in (
        "none.yaml:1: cannot be read: No such file",
        "latin.yaml:2: cannot be read: 'utf",
        "deep.yaml:1: cannot be read: maximum",
    ):
        with pytest.raises(ConfigurationError, match=f"^{problem}"):
            load_fleet(tmp_path / problem.split(":")[0])


def test_everything_is_told_at_once(problems):
    text = """\
version: 1
prices: { daily: { sourc: X } }
signals: { equal: { kind: equal_weights, asset_list: [A], xyz: 5 } }
portfolios:
  - { id: a, signal: equal, rebalance: dayly, prices: daily }
  - { id: a, signal: equl, rebalance: { kind: nope }, prices: daily }
"""
    ways = "2: prices.daily.sourc, 2: prices.daily.source, 3: signals.equal.xyz, 5: portfolios[0].rebalance, 6: portfolios[1].id, "
    ways += "6: portfolios[1].rebalance.kind, 6: portfolios[1].signal"
    assert [": ".join(problem.split(": ")[:2]) for problem in problems(text)] == [f"fleet.yaml:{way}" for way in ways.split(", ")]


@pytest.mark.parametrize(
    ("pattern", "why"),
    [
        ("none.yaml", "matches no file"),
        ("fleet.d", "matches no file"),
        ("fleet.d/../../other.yaml", "leads outside the directory of the top file"),
        ("/etc/hostname", "leads outside the directory of the top file"),
        ("fleet.d/*.yaml", "leads outside the directory of the top file"),  # one of them is a link
        ("linked/other.yaml", "leads outside the directory of the top file"),
    ],
)
def test_includes_stay_under_the_top_file(tmp_path, pattern, why):
    write(tmp_path, {"other.yaml": "portfolios: []", "inside/fleet.d/a.yaml": "portfolios: []"})
    (tmp_path / "inside/fleet.d/link.yaml").symlink_to(tmp_path / "other.yaml")
    (tmp_path / "inside/linked").symlink_to(tmp_path)
    with pytest.raises(ConfigurationError) as caught:
        load_fleet(write(tmp_path, {"inside/fleet.yaml": PORTFOLIO + f"include:\n  - {pattern}\n"}))
    assert caught.value.facts["problems"] == [f'fleet.yaml:9: include[0]: "{pattern}" {why}']


def test_problems_across_files(problems):
    other = "signals: { equal: { kind: equal_weights, asset_list: [A] } }\ndefaults: { prices: daily }\nportfolios: [ { id: p } ]"
    assert problems(PORTFOLIO + "include: [other.yaml]", **{"other.yaml": other}) == [
        "other.yaml:1: signals.equal: is given twice, here and at fleet.yaml:4",
        "other.yaml:2: defaults.prices: is given twice, here and at fleet.yaml:6",
        "other.yaml:3: portfolios[0].id: 'p' is used twice, here and at fleet.yaml:7",
    ]
    # names that may be in what could not be read are not called unknown
    text = PORTFOLIO.replace("signal: equal", "signal: elsewhere") + "include: [broken.yaml]"
    (problem,) = problems(text, **{"broken.yaml": "signals: { elsewhere: {\n"})
    assert problem.startswith("broken.yaml:2: cannot be read")


class Momentum(EqualWeights):
    """A signal kind that fleet.py has never heard of."""

    kind: Literal["test_momentum"] = "test_momentum"  # pyright: ignore[reportIncompatibleVariableOverride]
    lookback: int
    stale_after: timedelta = timedelta(days=1)


def test_a_new_kind_needs_no_change_here(load, problems, monkeypatch):
    monkeypatch.setitem(SIGNALS.classes, "test_momentum", Momentum)
    spec = "{ kind: test_momentum, universe: two, lookback: 63, stale_after: 36h }"
    (p,) = load(PORTFOLIO.replace("id: p", f"id: p, signal: {spec}")).portfolios
    assert p.signal == Momentum(asset_list=("AAPL", "MSFT"), lookback=63, stale_after=timedelta(hours=36))
    (unknown, _) = problems(PORTFOLIO.replace("id: p", "id: p, signal: { kind: test_momentum, universe: two, lokback: 5 }"))
    assert unknown == "fleet.yaml:7: portfolios[0].signal.lokback: unknown key - did you mean 'lookback'?"
    (schema,) = (s for s in fleet_json_schema()["properties"]["signals"]["additionalProperties"]["anyOf"] if s.get("title") == "Momentum")
    assert {"kind", "asset_list", "universe", "lookback"} < set(schema["properties"])
    assert schema["required"] == ["kind", "lookback"]


def test_the_schema_accepts_what_loads_and_refuses_typing_errors():
    validator = pytest.importorskip("jsonschema").Draft202012Validator(fleet_json_schema())
    placeholder = {"id": "p{lag}", "rebalance": MONTHLY | {"execution_lag": "{lag}"}}
    assert validator.is_valid(DOCUMENT)
    daily = {"source": "X", "interpolate": {"frequency": "1d", "rule": "ffill", "assets": "u"}}
    assert validator.is_valid(DOCUMENT | {"prices": {"daily": daily}})
    assert validator.is_valid(DOCUMENT | {"portfolios": [placeholder | {"matrix": {"lag": [1, 2]}}]})
    for mistake in (
        {"portfolios": [placeholder]},
        {"portfolios": [{"id": "p", "tagss": []}]},
        {"signals": {"s": {"kind": "no_such_kind"}}},
        {"signals": {"s": {"asset_list": ["A"]}}},
        {"signals": {"s": FIXED | {"weights": {"A": "x"}}}},
        {"calendars": {"c": {"pandas_calendar": "NYSE"}}},
        {"prices": {"daily": daily | {"interpolate": {"frequency": "1d", "rule": "linear"}}}},
        {"prices": {"daily": daily | {"interpolate": {"rule": "none"}}}},
    ):
        assert not validator.is_valid(DOCUMENT | mistake), mistake


def test_ten_thousand_portfolios_load_in_seconds(folder):
    entry = {"id": "p-{fee}-{lag}", "rebalance": MONTHLY | {"execution_lag": "{lag}"}, "execution": {"commission_fee": "{fee}"}}
    matrix = {"fee": [i / 100_000 for i in range(1000)], "lag": list(range(10))}
    path = write(folder, {"fleet.yaml": json.dumps(DOCUMENT | {"portfolios": [E | entry | {"matrix": matrix}]})})
    started = time.perf_counter()
    portfolios = load_fleet(path).portfolios
    assert time.perf_counter() - started < 15.0  # 2 s on an idle core
    assert len(portfolios) == 10_000
    assert (len({id(p.signal) for p in portfolios}), len({id(p.rebalance) for p in portfolios})) == (1, 10)  # equal specs are one object


# -- signals with prices of their own, rates of cash, cycles ------------------------------------------------------------------------

SOURCES = """\
version: 1
prices:
  daily: { source: ExternalPricesTS }
  other: { source: other.bars }
  filled: { source: ExternalPricesTS, interpolate: { frequency: 1d, rule: ffill } }
universes: { two: [MSFT, AAPL] }
rebalance: { daily: { kind: immediate_signal, calendar_key: XNYS } }
defaults: { prices: daily, rebalance: daily }
"""
COMPUTED = "kind: inverse_volatility, universe: two, calendar_key: XNYS"
OTHER = APIDataNode.build_from_identifier("other.bars")
DAILY = APIDataNode.build_from_identifier("ExternalPricesTS")


def test_a_signal_names_its_prices_or_has_those_of_the_defaults(load):
    text = (
        SOURCES
        + f"""\
signals:
  named: {{ {COMPUTED}, prices: other }}
  spelled: {{ {COMPUTED}, price_source: other }}
  filled: {{ {COMPUTED}, prices: filled }}
  default: {{ {COMPUTED} }}
portfolios: [ {{ id: a, signal: named }}, {{ id: b, signal: spelled }}, {{ id: c, signal: filled }}, {{ id: d, signal: default }} ]
"""
    )
    a, b, c, d = load(text).portfolios
    assert a.signal == b.signal == InverseVolatility(asset_list=("AAPL", "MSFT"), calendar_key="XNYS", price_source=OTHER)
    assert (c.signal.price_source.source_uid, c.signal.price_source.policy) == (DAILY.source_uid, ("1d", "ffill"))
    assert d.signal.price_source == DAILY
    assert {p.price_source for p in (a, b, c, d)} == {DAILY}  # what a portfolio trades at is its own affair
    assert len({p.signal_uid for p in (a, b, c, d)}) == 3


def test_a_signal_takes_the_default_prices_and_not_those_of_its_portfolio(load):
    """A signal is what it is, whoever follows it."""
    text = SOURCES + f"signals: {{ s: {{ {COMPUTED} }} }}\nportfolios: [ {{ id: a, signal: s, prices: other }}, {{ id: b, signal: s }} ]"
    a, b = load(text).portfolios
    assert (a.signal.price_source, b.signal.price_source, a.signal_uid == b.signal_uid) == (DAILY, DAILY, True)
    assert (a.price_source, b.price_source) == (OTHER, DAILY)


def test_every_source_of_a_signal_is_a_name_of_the_prices_section(load):
    text = (
        SOURCES
        + """\
portfolios:
  - id: caps
    signal: { kind: market_cap, universe: two, calendar_key: XNYS, market_cap_source: other, min_number_of_assets: 1 }
  - id: weights
    signal: { kind: external_weights, universe: two, weights_source: other, weight_column: w }
  - id: copy
    signal:
      { kind: portfolio_replicator, universe: two, calendar_key: XNYS, method: nnls, target: { asset: SPY }, target_price_source: other }
"""
    )
    caps, weights, copy = load(text).portfolios
    assert (caps.signal.market_cap_source, caps.signal.price_source) == (OTHER, DAILY)
    assert weights.signal.weights_location.source == OTHER
    assert [r.source for r in copy.signal.requests] == [DAILY, OTHER]


def test_a_rate_of_cash_is_part_of_execution_key_by_key(load):
    rate = "cash_rate: { source: other, identifier: SOFR, column: rate, day_count: 360, forward_fill: 3d }"
    text = (
        SOURCES.replace("rebalance: daily }", f"rebalance: daily, execution: {{ {rate} }} }}")
        + """\
signals: { s: { kind: equal_weights, universe: two } }
portfolios:
  - { id: a, signal: s }
  - { id: b, signal: s, execution: { commission_fee: 0 } }
  - { id: c, signal: s, execution: { cash_rate: null } }
  - { id: d, signal: s, execution: { cash_rate: { source: daily, identifier: EONIA } } }
"""
    )
    a, b, c, d = (p.execution for p in load(text).portfolios)
    expected = CashRate(source=OTHER, identifier="SOFR", column="rate", day_count=360, forward_fill=timedelta(days=3))
    assert a.cash_rate == b.cash_rate == expected
    assert (b.commission_fee, c.cash_rate) == (0.0, None)
    assert d.cash_rate == CashRate(source=DAILY, identifier="EONIA")  # the rest are the defaults of a rate, not those of another one
    assert len({p.configuration_hash for p in load(text).portfolios}) == 4


TRACKING = "kind: portfolio_replicator, universe: two, calendar_key: XNYS, method: nnls"

# entries of the portfolios section, from line 10 on | line and what is told; see MISTAKES
OF_SOURCES = r"""
{ id: p, signal: { @C,\nprices: othr } } | 11: portfolios[0].signal.prices: unknown prices 'othr' - did you mean 'other'?
{ id: p, signal: { @C,\nprice_source: othr } } | 11: *.signal.price_source: unknown prices 'othr' - did you mean 'other'?
{ id: p, signal: { @C, prices: [other] } } | 10: portfolios[0].signal.*
{ id: p, signal: { kind: external_weights, universe: two,\nweights_source: x } } | 11: *.weights_source: unknown prices 'x' - known: *
{ id: p, signal: { kind: external_weights, universe: two } } | 10: portfolios[0].signal: give either weights_source or path
{ id: p, signal: { kind: external_weights, universe: two,\nweights_source: filled } } | 11: *: weights are read as they are stored: *
{ id: p, signal: { @C,\nwindow_sessions: 1 } } | 11: portfolios[0].signal.window_sessions: must be greater than or equal to 2, not 1*
{ id: p, signal: { @E }, execution: { cash_rate: { source: x,\nidentifier: A } } } | 10: *.cash_rate.source: unknown prices 'x' - known: *
{ id: p, signal: { @E }, execution: { cash_rate: {\nsource: other } } } | 10: portfolios[0].execution.cash_rate.identifier: is missing
{ id: p, signal: { @E }, execution: { cash_rate: { source: other, identifier: A, day_count: 252 } } } | 10: *.day_count: must be 360 or 365*
{ id: p, signal: { @T, target: { portfolio: p } } } | 10: *: the plan has a cycle: p -> p. Break it: *
{ id: p, signal: { @T, target: {} } } | 10: portfolios[0].signal.target: target is exactly one of asset, index, portfolio
"""


@pytest.mark.parametrize("mistake", OF_SOURCES.strip().splitlines())
def test_a_mistake_about_sources_is_told_at_its_line(problems, mistake):
    entry, expected = (part.strip() for part in mistake.split(" | "))
    for mark, text in (("@C", COMPUTED), ("@T", TRACKING), ("@E", "kind: equal_weights, universe: two"), ("\\n", "\n")):
        entry = entry.replace(mark, text)
    found = problems(SOURCES + f"portfolios:\n- {entry}")
    pattern = re.escape(f"fleet.yaml:{expected}").replace(r"\*", ".*")
    assert len(found) == 1, found
    assert re.fullmatch(pattern, found[0]), found


def test_each_member_of_a_cycle_is_told_at_its_line_and_nobody_else(problems, load):
    text = (
        SOURCES
        + f"""\
portfolios:
- {{ id: a, signal: {{ {TRACKING}, target: {{ portfolio: b }} }} }}
- {{ id: b, signal: {{ {TRACKING}, target: {{ index: C }} }} }}
- {{ id: c, signal: {{ {TRACKING}, target: {{ portfolio: a }} }}, publish_index: C }}
- {{ id: above, signal: {{ {TRACKING}, target: {{ portfolio: a }} }} }}
- {{ id: beside, signal: {{ {TRACKING}, target: {{ portfolio: of_another_fleet }} }} }}
"""
    )
    found = problems(text)
    assert [line.split(":")[1] for line in found] == ["10", "11", "12"]
    for place, line in enumerate(found):
        assert line.startswith(f"fleet.yaml:{10 + place}: portfolios[{place}].id: the plan has a cycle: ")
        assert any(cycle in line for cycle in ("a -> b -> c -> a", "b -> c -> a -> b", "c -> a -> b -> c"))
    assert len(load(text.replace("{ portfolio: a } }, publish", "{ asset: SPY } }, publish")).portfolios) == 5


def test_a_cycle_of_a_matrix_is_told_once_for_each(problems):
    text = (
        SOURCES
        + f"""\
portfolios:
- {{ id: "p{{i}}", matrix: {{ i: [1, 2] }}, signal: {{ {TRACKING}, target: {{ portfolio: "p{{i}}" }} }} }}
"""
    )
    found = problems(text)
    assert [re.sub(r".*cycle: ", "", line) for line in found] == [
        f"p{i} -> p{i}. Break it: no portfolio may depend on itself." for i in (1, 2)
    ]
    assert {line.split(":")[1] for line in found} == {"10"}


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | st.sampled_from(["", "equal", "daily", "1d", "{a}", "2020-01-31", "0.5"]),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(["kind", "weights", "universe", "a"]), inner, max_size=2),
    max_leaves=4,
)
KEYS = st.sampled_from(["signal", "rebalance", "prices", "frequency", "start_date", "execution", "price_alignment_policy", "tags"])


@settings(max_examples=100, deadline=None)
@given(st.dictionaries(KEYS | st.sampled_from(["id", "name", "publish_index", "matrix"]), PLAIN, max_size=3), st.dictionaries(KEYS, PLAIN))
def test_no_portfolio_is_dropped_in_silence(folder, changes, defaults):
    whole = {"id": "w", "signal": "equal", "rebalance": "monthly", "prices": "daily"}  # which no broken default takes away
    document = DOCUMENT | {"portfolios": [E | changes, whole], "defaults": DEFAULTS | defaults}
    try:
        assert len(hashes_of(folder, document)) >= 2
    except ConfigurationError as error:
        assert all(line.startswith("fleet.yaml:1: ") for line in error.facts["problems"])  # noqa: PT017


@settings(max_examples=100, deadline=None)
@given(st.text(st.sampled_from(list("ab:-[]{}#&*!|>'\"%@`,? \n\t<1.~")), max_size=40))
def test_any_text_is_refused_with_a_line(folder, text):
    with pytest.raises(ConfigurationError, match=r"fleet\.yaml:\d+: "):
        load_fleet(write(folder, {"fleet.yaml": text}))
