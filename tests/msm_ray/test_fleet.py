"""Fleet files: what they mean, what never changes an identity, and what is said about each mistake, at its line."""

import hashlib
import json
import pickle
import random
import time
from datetime import date, timedelta
from pathlib import Path
from typing import Any, Literal
from uuid import UUID

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from msm_core.errors import ConfigurationError
from msm_core.signals import SIGNALS, EqualWeights, FixedWeights
from msm_ray import fleet as fleet_module
from msm_ray.fleet import Fleet, fleet_json_schema, load_fleet

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


@pytest.fixture
def load(tmp_path: Path):
    """Writes files and loads the first; `fleet.yaml` when only a text is given."""

    def write_and_load(text: str = "", **others: str) -> Fleet:
        write(tmp_path, {"fleet.yaml": text, **others})
        return load_fleet(tmp_path / "fleet.yaml")

    return write_and_load


@pytest.fixture
def problems(load):
    """The problems of a file that must have some."""

    def of(text: str, **others: str) -> list[str]:
        with pytest.raises(ConfigurationError) as caught:
            load(text, **others)
        return caught.value.facts["problems"]

    return of


def write(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")


def hashes(fleet: Fleet) -> dict[str, str]:
    return {p.identifier: p.configuration_hash for p in fleet.portfolios}


# -- what a file means --------------------------------------------------------------------------------------------------


def test_the_example_loads():
    fleet = load_fleet(EXAMPLE)
    assert [p.identifier for p in fleet.portfolios] == [
        "equal-monthly",
        "equal-weekly",
        "sixty-forty",
        "equal-tech-week_end-lag0",
        "equal-tech-week_end-lag1",
        "equal-tech-month_end-lag0",
        "equal-tech-month_end-lag1",
    ]
    assert fleet.namespace is None
    (calendar,) = fleet.calendars
    assert (calendar.unique_identifier, calendar.pandas_calendar) == ("XNYS", "NYSE")
    assert (calendar.valid_from, calendar.valid_to) == (date(1990, 1, 1), date(2023, 12, 31))
    assert fleet.run.task_timeout == timedelta(minutes=10)
    monthly, _, sixty, *_, last = fleet.portfolios
    assert (monthly.rebalance.rebalance_on, monthly.rebalance.execution_lag) == ("month_end", 1)
    assert (monthly.portfolio_markets_configuration.signal_name, monthly.index_identifier) == ("equal", "EQUAL10")
    assert isinstance(sixty.signal, FixedWeights)
    assert (sixty.signal.universe, sixty.signal.weights().tolist()) == (("AAPL", "MSFT"), [0.6, 0.4])
    assert sixty.start_date == date(2000, 1, 3)
    assert sixty.portfolio_markets_configuration.tags == ("core", "concentrated")
    assert sixty.portfolio_markets_configuration.portfolio_name == "AAPL 60, MSFT 40"
    assert (last.rebalance.rebalance_on, last.rebalance.execution_lag) == ("month_end", 1)
    assert last.portfolio_markets_configuration.signal_name is None
    # its own fee, and from the defaults what it does not say
    assert (last.execution.commission_fee, last.execution.weight_accounting) == (0.0005, "drifted")


def test_a_source_is_an_identifier_or_a_uid(load, monkeypatch):
    def source_uid(text: str) -> UUID:
        return load(text).portfolios[0].price_source.source_uid

    def digest(identifier: str) -> UUID:
        body = f'{{"identifier":"{identifier}","kind":"time_index_meta_table","version":1}}'
        return UUID(hex=hashlib.sha256(body.encode()).hexdigest()[:32])

    assert source_uid(PORTFOLIO) == digest("ExternalPricesTS")
    uid = "6f1c52c6-8d3d-4f61-9a0e-0a3d0f8f0001"
    assert source_uid(PORTFOLIO.replace("ExternalPricesTS", uid)) == UUID(uid)
    monkeypatch.setenv("MSM_AUTO_REGISTER_NAMESPACE", "prod")
    assert source_uid(PORTFOLIO) == digest("prod.ExternalPricesTS")


def test_a_portfolio_overrides_the_defaults_key_by_key(load):
    p, q, r = load(
        BASE.replace(
            "signal: equal",
            "signal: equal, frequency: 1h, tags: [a, b], execution: { commission_fee: 0.001, weight_accounting: target }, "
            "price_alignment_policy: { missing: hold, maximum_staleness: 3d }, start_date: 2020-01-31, price_column: vwap",
        )
        + """
portfolios:
  - { id: p }
  - { id: q, execution: { commission_fee: 0 }, price_alignment_policy: { maximum_staleness: 12h }, tags: [c], frequency: 5m }
  - { id: r, start_date: null, price_column: close, execution: { weight_accounting: drifted } }
"""
    ).portfolios
    assert (p.execution.commission_fee, p.execution.weight_accounting) == (0.001, "target")
    assert (p.alignment.missing, p.alignment.maximum_staleness) == ("hold", timedelta(days=3))
    assert (p.frequency, p.start_date, p.price_column) == (timedelta(hours=1), date(2020, 1, 31), "vwap")
    assert (q.execution.commission_fee, q.execution.weight_accounting) == (0.0, "target")
    assert (q.alignment.missing, q.alignment.maximum_staleness) == ("hold", timedelta(hours=12))
    assert (q.portfolio_markets_configuration.tags, q.frequency) == (("c",), timedelta(minutes=5))
    assert (r.start_date, r.price_column, r.execution.weight_accounting) == (None, "close", "drifted")


def test_anchors_and_merge_keys(load):
    p, q = load(BASE + "portfolios:\n  - &p { id: p, tags: [a], start_date: 2020-01-31 }\n  - { <<: *p, id: q, tags: [b] }\n").portfolios
    assert (q.identifier, q.start_date, q.portfolio_markets_configuration.tags) == ("q", date(2020, 1, 31), ("b",))
    assert p.start_date == q.start_date


def test_a_matrix_is_every_combination_with_typed_values(load):
    text = """
portfolios:
  - id: "{on}-{lag}-{{{fee}}}"
    matrix: { on: [week_end, month_end], lag: [0, 1], fee: [0.00018] }
    rebalance: { kind: immediate_signal, calendar_key: XNYS, rebalance_on: "{on}", execution_lag: "{lag}" }
    signal: { kind: fixed_weights, weights: { "A{lag}": 1.0 } }
    execution: { commission_fee: "{fee}" }
    description: lag {lag}
"""
    found = [
        (
            p.identifier,
            p.rebalance.rebalance_on,
            p.rebalance.execution_lag,
            p.signal.universe,
            p.portfolio_markets_configuration.description,
        )
        for p in load(BASE + text).portfolios
    ]
    assert found == [
        ("week_end-0-{0.00018}", "week_end", 0, ("A0",), "lag 0"),
        ("week_end-1-{0.00018}", "week_end", 1, ("A1",), "lag 1"),
        ("month_end-0-{0.00018}", "month_end", 0, ("A0",), "lag 0"),
        ("month_end-1-{0.00018}", "month_end", 1, ("A1",), "lag 1"),
    ]


def test_braces_mean_nothing_without_a_matrix(load):
    assert load(BASE + "portfolios: [ { id: '{top}' } ]").portfolios[0].identifier == "{top}"


def test_equal_specs_are_one_object(load):
    inline = "{ kind: equal_weights, universe: two }"
    text = f"portfolios: [ {{ id: p }}, {{ id: q, signal: {inline} }}, {{ id: r, signal: {inline} }} ]"
    p, q, r = load(BASE + text).portfolios
    assert p.signal is q.signal is r.signal
    assert p.rebalance is q.rebalance
    assert p.execution is q.execution


def test_includes(load):
    fleet = load(
        BASE + "portfolios: [ { id: top } ]\ninclude: [fleet.d/*.yaml, more.yaml]",
        **{
            "fleet.d/b.yaml": "portfolios: [ { id: b, signal: from-a } ]",
            "fleet.d/a.yaml": "version: 1\nsignals: { from-a: { kind: equal_weights, asset_list: [KO] } }\ninclude: [deeper/c.yaml]",
            "fleet.d/deeper/c.yaml": "portfolios: [ { id: c } ]",
            "more.yaml": "portfolios: [ { id: more } ]\ninclude: [fleet.d/deeper/c.yaml]",  # a file reached twice is read once
        },
    )
    assert [p.identifier for p in fleet.portfolios] == ["top", "c", "b", "more"]


# -- identity -----------------------------------------------------------------------------------------------------------

DOCUMENT: dict[str, Any] = {
    "version": 1,
    "prices": {"daily": {"source": "ExternalPricesTS"}},
    "universes": {"u": ["AAPL", "MSFT", "XOM"]},
    "signals": {
        "equal": {"kind": "equal_weights", "universe": "u"},
        "fixed": {"kind": "fixed_weights", "weights": {"AAPL": 0.6, "MSFT": 0.3}, "effective_from": "2020-01-01T00:00:00Z"},
    },
    "rebalance": {"monthly": {"kind": "immediate_signal", "calendar_key": "XNYS", "rebalance_on": "month_end", "execution_lag": 1}},
    "defaults": {
        "prices": "daily",
        "rebalance": "monthly",
        "execution": {"commission_fee": 0.0005, "weight_accounting": "target"},
        "price_alignment_policy": {"missing": "hold", "maximum_staleness": "1d"},
    },
    "portfolios": [
        {"id": "e", "signal": "equal", "execution": {"commission_fee": 0}},
        {"id": "f", "signal": "fixed", "start_date": "2021-02-03", "frequency": "1h"},
    ],
}


def shuffled(value: Any, order: random.Random) -> Any:
    """The same data with the keys of every mapping, and the assets of every universe, in another order."""
    if isinstance(value, dict):
        keys = list(value)
        order.shuffle(keys)
        return {key: shuffled(value[key], order) for key in keys}
    if isinstance(value, list) and value and isinstance(value[0], str):
        return order.sample(value, len(value))
    return [shuffled(item, order) for item in value] if isinstance(value, list) else value


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fleets")


def hashes_of(folder: Path, document: dict[str, Any], comment: str = "") -> dict[str, str]:
    write(folder, {"fleet.yaml": comment + json.dumps(document)})
    return hashes(load_fleet(folder / "fleet.yaml"))


@settings(max_examples=25, deadline=None)
@given(st.randoms(use_true_random=False), st.sampled_from(["", "# a comment\n", "%YAML 1.2\n---\n"]))
def test_key_order_and_comments_never_change_a_hash(folder, order, comment):
    assert hashes_of(folder, shuffled(DOCUMENT, order), comment) == hashes_of(folder, DOCUMENT)


@settings(max_examples=25, deadline=None)
@given(
    lags=st.lists(st.integers(0, 20), min_size=1, max_size=3, unique=True),
    fees=st.lists(st.floats(0, 0.99, allow_subnormal=False), min_size=1, max_size=3, unique=True),
    inside=st.booleans(),
)
def test_a_matrix_and_its_portfolios_written_out_hash_the_same(folder, lags, fees, inside):
    def entry(identifier: str, lag: Any, fee: Any) -> dict[str, Any]:
        rebalance = {"kind": "immediate_signal", "calendar_key": "XNYS", "execution_lag": lag}
        return {"id": identifier, "signal": "equal", "rebalance": rebalance, "execution": {"commission_fee": fee}}

    def ids(i: int, k: int) -> str:
        return f"p{lags[i]}-{fees[k]!r}"

    whole = {"lag": lags, "fee": fees}
    nested = {"lag": lags, "execution": [{"commission_fee": fee} for fee in fees]}
    if inside:
        matrix = entry("p{lag}-{fee}", "{lag}", "{fee}") | {"matrix": whole}
        names = {(i, k): ids(i, k) for i in range(len(lags)) for k in range(len(fees))}
        written = [entry(ids(i, k), lag, fee) for i, lag in enumerate(lags) for k, fee in enumerate(fees)]
    else:  # a whole mapping as a value of the matrix, one lag only so that ids stay unique
        nested = {"execution": nested["execution"][:1], "lag": lags}
        matrix = entry("p{lag}", "{lag}", 0) | {"execution": "{execution}", "matrix": nested}
        names = {(i, 0): f"p{lag}" for i, lag in enumerate(lags)}
        written = [entry(f"p{lag}", lag, fees[0]) for lag in lags]
    by_matrix = hashes_of(folder, DOCUMENT | {"portfolios": [matrix]})
    assert by_matrix == hashes_of(folder, DOCUMENT | {"portfolios": written})
    assert set(by_matrix) == set(names.values())


def test_the_file_a_thing_is_written_in_never_changes_a_hash(folder):
    top = {key: DOCUMENT[key] for key in ("version", "defaults")} | {"include": ["parts/*.yaml"]}
    parts = {f"parts/{i}.yaml": json.dumps({key: DOCUMENT[key]}) for i, key in enumerate(DOCUMENT) if key not in top}
    write(folder, parts)
    assert hashes_of(folder, top) == hashes_of(folder, DOCUMENT)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("tags", ["core"]),
        ("name", "A name"),
        ("description", "Some text"),
        ("publish_index", "INDEX"),
        ("id", "another"),
        ("execution", {"commission_fee": 0.0, "weight_accounting": "target"}),  # the default, said again
        ("price_column", "close"),
        ("frequency", "1d"),
        ("start_date", None),
        ("price_alignment_policy", {"maximum_staleness": "24h"}),  # 24h is 1d
        ("rebalance", {"kind": "immediate_signal", "calendar_key": "XNYS", "rebalance_on": "month_end", "execution_lag": 1}),
        ("signal", {"kind": "equal_weights", "asset_list": ["XOM", "AAPL", "MSFT"]}),
    ],
)
def test_what_describes_or_repeats_never_changes_a_hash(folder, key, value):
    changed = DOCUMENT | {"portfolios": [DOCUMENT["portfolios"][0] | {key: value}]}
    assert list(hashes_of(folder, changed).values()) == [hashes_of(folder, DOCUMENT)["e"]]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("execution", {"commission_fee": 0, "weight_accounting": "drifted"}),
        ("price_column", "open"),
        ("frequency", "1h"),
        ("start_date", "2021-02-03"),
        ("price_alignment_policy", {"maximum_staleness": "2d"}),
        ("signal", "fixed"),
        ("rebalance", {"kind": "immediate_signal", "calendar_key": "XNYS", "rebalance_on": "month_end"}),
    ],
)
def test_what_changes_numbers_changes_the_hash(folder, key, value):
    changed = DOCUMENT | {"portfolios": [DOCUMENT["portfolios"][0] | {key: value}]}
    assert hashes_of(folder, changed)["e"] != hashes_of(folder, DOCUMENT)["e"]


# -- what is said about mistakes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        # the file as a whole
        ("", ["fleet.yaml:1: the file is empty"]),
        ("# nothing\n", ["fleet.yaml:1: the file is empty"]),
        ("- a\n", ["fleet.yaml:1: must be a mapping of sections (version, signals, portfolios, ...)"]),
        ("version: 1\n", ["fleet.yaml:1: has no portfolios: give at least one under 'portfolios'"]),
        (PORTFOLIO.replace("version: 1", "version: 2"), ["fleet.yaml:1: version: must be 1, not 2"]),
        (PORTFOLIO.replace("version: 1", "# none"), ["fleet.yaml:1: missing key 'version'"]),
        ("version: 1\nsignals: [\n", None),
        ("version: 1\n\tsignals: {}\n", None),
        (PORTFOLIO + "portfolios: []\n", ["fleet.yaml:8: key 'portfolios' is given twice, here and at line 7"]),
        (
            PORTFOLIO + "portfolio: []\n",
            ["fleet.yaml:8: unknown key 'portfolio' - did you mean 'portfolios'?"],
        ),
        (
            PORTFOLIO + "namespace: prod\n",
            [
                (
                    "fleet.yaml:8: namespace: 'prod' is not the namespace of this process (''); "
                    "set MSM_AUTO_REGISTER_NAMESPACE=prod before msm starts, or correct the file"
                )
            ],
        ),
        (PORTFOLIO + "? [a]\n: 1\n", ["fleet.yaml:8: the key is not text - put it in quotes"]),
        # specs
        (
            BASE + "portfolios:\n- id: p\n  rebalance:\n    kind: immediate_signal\n    calendar_key: XNYS\n    execution_lagg: 1\n",
            ["fleet.yaml:12: portfolios[0].rebalance: unknown key 'execution_lagg' - did you mean 'execution_lag'?"],
        ),
        (
            PORTFOLIO.replace("kind: equal_weights", "kind: equal_weight"),
            ['fleet.yaml:4: signals.equal.kind: unknown signal kind "equal_weight"; known kinds: equal_weights, fixed_weights'],
        ),
        (
            PORTFOLIO.replace("kind: immediate_signal, ", ""),
            ["fleet.yaml:5: rebalance.daily: missing key 'kind'; known kinds: immediate_signal"],
        ),
        (PORTFOLIO.replace("calendar_key: XNYS", ""), ["fleet.yaml:5: rebalance.daily: missing key 'calendar_key'"]),
        (
            PORTFOLIO.replace("XNYS", "XNYS, execution_lag: true"),
            ["fleet.yaml:5: rebalance.daily.execution_lag: must be a valid integer, not true"],
        ),
        (
            PORTFOLIO.replace("XNYS", "XNYS, rebalance_on: month"),
            [
                (
                    "fleet.yaml:5: rebalance.daily.rebalance_on: must be 'every_session', 'signal_change', 'week_end', 'month_end' "
                    "or 'quarter_end', not \"month\" - did you mean 'month_end'?"
                )
            ],
        ),
        (
            PORTFOLIO.replace("universe: two", "universe: tow"),
            ["fleet.yaml:4: signals.equal.universe: unknown universe 'tow' - did you mean 'two'?"],
        ),
        (
            PORTFOLIO.replace("universe: two", "universe: [A]"),
            ['fleet.yaml:4: signals.equal.universe: must be the name of a universe, not ["A"]'],
        ),
        (
            PORTFOLIO.replace("universe: two", "universe: two, asset_list: [A]"),
            ["fleet.yaml:4: signals.equal.universe: 'universe' and 'asset_list' say the same; give one of them"],
        ),
        (PORTFOLIO.replace("[MSFT, AAPL]", "[AAPL, AAPL]"), ["fleet.yaml:3: universes.two: the universe names AAPL more than once"]),
        (PORTFOLIO.replace("[MSFT, AAPL]", "[]"), ["fleet.yaml:3: universes.two: List should have at least 1 item, not 0"]),
        # a ticker that YAML reads as something else
        (
            PORTFOLIO.replace("[MSFT, AAPL]", "[TRUE]"),
            ["fleet.yaml:3: universes.two[0]: must be a valid string, not true - put it in quotes"],
        ),
        (
            PORTFOLIO.replace("[MSFT, AAPL]", "[9988]"),
            ["fleet.yaml:3: universes.two[0]: must be a valid string, not 9988 - put it in quotes"],
        ),
        (
            PORTFOLIO.replace("kind: equal_weights, universe: two", "kind: fixed_weights, weights: { 9988: 1 }"),
            [
                'fleet.yaml:4: signals.equal.weights: the key "9988" is not text - put it in quotes',
            ],
        ),
        (
            PORTFOLIO.replace("kind: equal_weights, universe: two", "kind: fixed_weights, weights: { A: .nan, B: x, C: '1' }"),
            [
                "fleet.yaml:4: signals.equal.weights.A: .nan is not a finite number",
                'fleet.yaml:4: signals.equal.weights.B: must be a valid number, not "x"',
                'fleet.yaml:4: signals.equal.weights.C: must be a valid number, not "1"',
            ],
        ),
        (
            PORTFOLIO.replace("universe: two", "universe: two, effective_from: 2020-01-01"),
            ['fleet.yaml:4: signals.equal.effective_from: must be a time such as 2020-01-31T21:00:00Z, not "2020-01-01"'],
        ),
        (PORTFOLIO.replace("source: ", "sourc: "), None),
        # defaults are told about once, where they are
        (
            PORTFOLIO.replace("signal: equal", "signal: equal, frequency: 1w"),
            ["fleet.yaml:6: defaults.frequency: frequency '1w' is not of the form 5m, 1h or 1d"],
        ),
        (
            PORTFOLIO.replace("signal: equal", "signal: equal, execution: { commission_fee: 2 }").replace(
                "id: p", "id: p, execution: { weight_accounting: target }"
            ),
            ["fleet.yaml:6: defaults.execution.commission_fee: must be less than 1, not 2"],
        ),
        (
            PORTFOLIO.replace("prices: daily", "prices: dayly"),
            ["fleet.yaml:6: defaults.prices: unknown price source 'dayly' - did you mean 'daily'?"],
        ),
        (PORTFOLIO.replace("signal: equal", "id: x"), None),
        # portfolios
        (PORTFOLIO.replace("id: p", ""), ["fleet.yaml:7: portfolios[0]: missing key 'id'"]),
        (PORTFOLIO.replace("id: p", "id: p, signal: null"), ["fleet.yaml:7: portfolios[0]: missing key 'signal', here or in 'defaults'"]),
        (
            PORTFOLIO.replace("id: p", "id: p, signal: false"),
            ["fleet.yaml:7: portfolios[0].signal: must be a name, or a mapping with a 'kind', not false"],
        ),
        (
            PORTFOLIO.replace("id: p", "id: p, signal: eqal"),
            ["fleet.yaml:7: portfolios[0].signal: unknown signal 'eqal' - did you mean 'equal'?"],
        ),
        (PORTFOLIO.replace("{ id: p }", "just text"), ['fleet.yaml:7: portfolios[0]: must be a mapping, not "just text"']),
        (
            PORTFOLIO.replace("id: p", "id: p, start_date: 1990-13-01"),
            ['fleet.yaml:7: portfolios[0].start_date: must be a date such as 2020-01-31, not "1990-13-01"'],
        ),
        (
            PORTFOLIO.replace("id: p", "id: p, start_date: 2020"),
            ["fleet.yaml:7: portfolios[0].start_date: must be a date such as 2020-01-31, not 2020"],
        ),
        (PORTFOLIO.replace("id: p", "id: p, frequency: 2d"), ['fleet.yaml:7: portfolios[0].frequency: frequency "2d" is longer than 1d']),
        (PORTFOLIO.replace("id: p", "id: p, tags: core"), ['fleet.yaml:7: portfolios[0].tags: must be a list, not "core"']),
        (
            PORTFOLIO.replace("id: p", "id: p, price_alignment_policy: { maximum_staleness: 3 }"),
            ["fleet.yaml:7: portfolios[0].price_alignment_policy.maximum_staleness: must be a duration such as 3d, 12h, 30m or 90s, not 3"],
        ),
        (
            BASE + "portfolios:\n- { id: p }\n- { id: q }\n- { id: p }\n",
            ["fleet.yaml:10: portfolios[2].id: 'p' is used twice, here and at fleet.yaml:8"],
        ),
        (
            BASE + "portfolios:\n- { id: p, publish_index: X }\n- { id: q, publish_index: X }\n",
            ["fleet.yaml:9: portfolios[1].publish_index: 'X' is used twice, here and at fleet.yaml:8"],
        ),
        # identifiers
        (PORTFOLIO.replace("id: p", "id: ''"), ["fleet.yaml:7: portfolios[0].id: String should have at least 1 character"]),
        (PORTFOLIO.replace("id: p", f"id: {'p' * 256}"), ["fleet.yaml:7: portfolios[0].id: String should have at most 255 characters"]),
        (PORTFOLIO.replace("id: p", 'id: "a\\tb"'), ['fleet.yaml:7: portfolios[0].id: "a\\tb" holds a control character']),
        (
            PORTFOLIO.replace("id: p", 'id: "e\\u0301"'),
            ['fleet.yaml:7: portfolios[0].id: "e\u0301" is not in Unicode NFC; write "\\u00e9"'],
        ),
        (PORTFOLIO.replace("id: p", 'id: "a\\0"'), ["fleet.yaml:7: portfolios[0].id: the text holds a NUL or half of a surrogate pair"]),
        (PORTFOLIO.replace("id: p", 'id: "\\ud800"'), ["fleet.yaml:7: portfolios[0].id: the text holds a NUL or half of a surrogate pair"]),
        (
            PORTFOLIO.replace("id: p", 'id: p, signal: "a\\nb\\e"'),
            ["fleet.yaml:7: portfolios[0].signal: unknown signal 'a\\nb\\u001b' - known: equal"],
        ),
        # matrices
        (
            PORTFOLIO.replace("id: p", "id: 'p{topp}', matrix: { top: [1] }"),
            ["fleet.yaml:7: portfolios[0].id: unknown placeholder '{topp}' - did you mean 'top'?"],
        ),
        (
            PORTFOLIO.replace("id: p", "id: 'p{', matrix: { top: [1] }"),
            ["fleet.yaml:7: portfolios[0].id: \"p{\" has a lone '{'; write '{{' for a brace"],
        ),
        (
            PORTFOLIO.replace("id: p", "id: p, matrix: { top: [1, 2] }"),
            ["fleet.yaml:7: portfolios[0].id: 'p' is used twice, here and by the same matrix: mention more of its keys (with top=2)"],
        ),
        (
            PORTFOLIO.replace("id: p", "id: p, matrix: { top: [] }"),
            ["fleet.yaml:7: portfolios[0].matrix.top: List should have at least 1 item, not 0"],
        ),
        (PORTFOLIO.replace("id: p", "id: p, matrix: { top: 5 }"), ["fleet.yaml:7: portfolios[0].matrix.top: must be a list, not 5"]),
        (
            PORTFOLIO.replace("id: p", "id: 'p{a}', matrix: { a: [[1]] }"),
            ["fleet.yaml:7: portfolios[0].id: '{a}' stands in a longer text, so its values must be texts or numbers"],
        ),
        (
            PORTFOLIO.replace("id: p", "id: p, signal: { kind: fixed_weights, weights: { '{a}': 1 } }, matrix: { a: [null] }"),
            ["fleet.yaml:7: portfolios[0].signal.weights.{a}: '{a}' stands in a key, so its values must be texts or numbers"],
        ),
        (
            PORTFOLIO.replace("id: p", "id: 'p{a}', signal: { kind: fixed_weights, weights: { '{a}': 1, A: 1 } }, matrix: { a: [A] }"),
            ['fleet.yaml:7: portfolios[0]: two keys become the same one (with a="A")'],
        ),
        (
            PORTFOLIO.replace("id: p", "id: 'p{a}', execution: { commission_fee: '{a}' }, matrix: { a: [0, 0.5, 1, 2] }"),
            [
                "fleet.yaml:7: portfolios[0].execution.commission_fee: must be less than 1, not 1 (with a=1)",
                "fleet.yaml:7: portfolios[0].execution.commission_fee: must be less than 1, not 2 (with a=2)",
            ],
        ),
        (
            PORTFOLIO.replace("id: p", "id: p, matrix: { a: &a [1,2,3,4,5,6,7,8,9,0], b: *a, c: *a, d: *a, e: *a, f: *a }"),
            ["fleet.yaml:7: portfolios[0]: a fleet has at most 100000 portfolios; the matrix makes 1000000"],
        ),
        # calendars and runs
        (
            PORTFOLIO + "calendars:\n  X: { pandas_calendar: NYSE, valid_from: 2020-01-02, valid_to: 2020-01-01 }",
            ["fleet.yaml:9: calendars.X.valid_to: valid_to 2020-01-01 is before valid_from 2020-01-02"],
        ),
        (
            PORTFOLIO
            + "calendars:\n  X:\n    pandas_calendar: NYSE\n    valid_from: yesterday\n    valid_to: 2020-01-01\n    timezone: Mars",
            [
                'fleet.yaml:11: calendars.X.valid_from: must be a date such as 2020-01-31, not "yesterday"',
                'fleet.yaml:13: calendars.X.timezone: "Mars" is not an IANA time zone such as America/New_York',
            ],
        ),
        (PORTFOLIO + "run: { executor: rai }", ["fleet.yaml:8: run.executor: must be 'local' or 'ray', not \"rai\" - did you mean 'ray'?"]),
    ],
)
def test_a_mistake_is_told_at_its_line(problems, text, expected):
    found = problems(text)
    assert all(line.startswith("fleet.yaml:") for line in found)
    if expected is not None:
        assert found == expected


def test_yaml_errors_name_their_line(problems):
    assert problems("version: 1\nsignals: [\nportfolios: []\n") == [
        "fleet.yaml:4: not valid YAML: while parsing a flow sequence (from line 2), expected ',' or ']', but got '<stream end>'"
    ]
    assert problems("a: b\n---\nc: d\n") == [
        "fleet.yaml:2: not valid YAML: expected a single document in the stream (from line 1), but found another document"
    ]
    assert problems('version: 1\na: "\x01"\n') == ["fleet.yaml:2: not valid YAML: special characters are not allowed"]


def test_unreadable_files(tmp_path):
    def problem(path: Path) -> str:
        with pytest.raises(ConfigurationError) as caught:
            load_fleet(path)
        return str(caught.value)

    assert problem(tmp_path / "none.yaml") == "none.yaml:1: cannot be read: No such file or directory"
    assert problem(tmp_path).endswith(":1: cannot be read: Is a directory")
    (tmp_path / "latin.yaml").write_bytes(b"version: 1\n# \xe9\n")
    assert problem(tmp_path / "latin.yaml") == "latin.yaml:2: is not UTF-8 text"


@pytest.mark.parametrize("tag", ["!!python/object/apply:os.system", "!!python/name:os.system", "!local", "!!set", "!!binary"])
def test_tags_are_refused_and_never_run(problems, tmp_path, monkeypatch, tag):
    monkeypatch.chdir(tmp_path)
    value = "{ x }" if tag == "!!set" else '"touch ran"' if tag == "!!binary" else '["touch ran"]'
    found = problems(PORTFOLIO.replace("id: p", f"id: p,\n  description: {tag} {value}"))
    assert found == [f"fleet.yaml:8: portfolios[0].description: the tag {tag} is refused: a fleet file holds plain data only"]
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "text",
    [
        "a: &a [*a]",
        "a: &a { <<: *a }",
        "a: &a { <<: [*a, *a, *a] }",
        "a: " + "[" * 60 + "]" * 60,
        "a: " + "[" * 700,
    ],
)
def test_endless_and_deep_files_are_refused(problems, text):
    assert problems(text) == ["fleet.yaml:1: nested deeper than 50 levels"]


def test_aliases_cannot_fill_the_memory(problems, monkeypatch):
    monkeypatch.setattr("msm_ray.yaml_lines.VALUES_MAX", 5_000)
    text = "a: &a [x, x, x, x, x, x, x, x, x, x]\nb: &b [*a, *a, *a, *a, *a, *a, *a, *a, *a, *a]\n"
    text += "c: &c [*b, *b, *b, *b, *b, *b, *b, *b, *b, *b]\nd: [*c, *c, *c, *c, *c, *c, *c, *c, *c, *c]\n"
    (problem,) = problems(text)
    assert problem.endswith("more than 5000 values, aliases written out")


def test_everything_is_told_at_once_and_crosses_a_process(problems, load):
    text = """\
version: 1
prices: { daily: { sourc: X } }
signals: { equal: { kind: equal_weights, asset_list: [A], xyz: 5 } }
portfolios:
  - { id: a, signal: equal, rebalance: dayly, prices: daily }
  - { id: a, signal: equl }
"""
    expected = [
        "fleet.yaml:2: prices.daily: missing key 'source'",
        "fleet.yaml:2: prices.daily: unknown key 'sourc' - did you mean 'source'?",
        "fleet.yaml:3: signals.equal: unknown key 'xyz' - known: asset_list, effective_from, kind, override_asset, universe",
        "fleet.yaml:5: portfolios[0].rebalance: unknown rebalance strategy 'dayly'",
        "fleet.yaml:6: portfolios[1].signal: unknown signal 'equl' - did you mean 'equal'?",
        "fleet.yaml:6: portfolios[1]: missing key 'rebalance', here or in 'defaults'",
        "fleet.yaml:6: portfolios[1]: missing key 'prices', here or in 'defaults'",
        "fleet.yaml:6: portfolios[1].id: 'a' is used twice, here and at fleet.yaml:5",
    ]
    assert problems(text) == expected
    with pytest.raises(ConfigurationError) as caught:
        load(text)
    assert str(pickle.loads(pickle.dumps(caught.value))) == "\n".join(expected)


def test_a_matrix_does_not_flood_the_list(problems):
    text = BASE + "portfolios: [ { id: 'p{i}', signal: 'no-{i}', matrix: { i: [1, 2, 3, 4, 5, 6, 7, 8, 9] } } ]"
    assert problems(text) == [f"fleet.yaml:7: portfolios[0].signal: unknown signal 'no-{i}' - known: equal (with i={i})" for i in (1, 2, 3)]


# -- includes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pattern", "why"),
    [
        ("none.yaml", '"none.yaml" matches no file'),
        ("fleet.d/*.yml", '"fleet.d/*.yml" matches no file'),
        ("fleet.d", '"fleet.d" matches no file'),
        ("../other.yaml", "\"../other.yaml\" must be a path below the directory of the top file, without '..'"),
        ("fleet.d/../../other.yaml", None),
        ("/etc/hostname", "\"/etc/hostname\" must be a path below the directory of the top file, without '..'"),
        ("fleet.d/link.yaml", '"fleet.d/link.yaml" leads outside the directory of the top file'),
        ("fleet.d/*.yaml", '"fleet.d/*.yaml" leads outside the directory of the top file'),
        ("linked/other.yaml", '"linked/other.yaml" leads outside the directory of the top file'),
        ("fleet.yaml", "include cycle: fleet.yaml -> fleet.yaml"),
    ],
)
def test_includes_stay_under_the_top_file(tmp_path, pattern, why):
    inside = tmp_path / "inside"
    write(tmp_path, {"other.yaml": "portfolios: []", "inside/fleet.d/a.yaml": "run: {}"})
    (inside / "fleet.d" / "link.yaml").symlink_to(tmp_path / "other.yaml")
    (inside / "linked").symlink_to(tmp_path)
    write(inside, {"fleet.yaml": PORTFOLIO + f"include:\n  - {pattern}\n"})
    with pytest.raises(ConfigurationError) as caught:
        load_fleet(inside / "fleet.yaml")
    (problem,) = caught.value.facts["problems"]
    assert problem.startswith("fleet.yaml:9: include[0]: ")
    assert why is None or problem == f"fleet.yaml:9: include[0]: {why}"


def test_a_link_to_the_top_file_is_followed_first(tmp_path):
    """As Kubernetes mounts a config map: every file is a link into a hidden directory."""
    write(tmp_path, {"..data/fleet.yaml": PORTFOLIO + "include: [more.yaml]", "..data/more.yaml": "portfolios: [ { id: q } ]"})
    (tmp_path / "fleet.yaml").symlink_to("..data/fleet.yaml")
    assert [p.identifier for p in load_fleet(tmp_path / "fleet.yaml").portfolios] == ["p", "q"]


def test_a_longer_cycle_is_named(problems):
    found = problems(PORTFOLIO + "include: [a.yaml]", **{"a.yaml": "include: [b.yaml]", "b.yaml": "include:\n- a.yaml"})
    assert found == ["b.yaml:2: include[0]: include cycle: a.yaml -> b.yaml -> a.yaml"]


def test_a_name_belongs_to_one_file(problems):
    other = """\
signals: { equal: { kind: equal_weights, asset_list: [A] } }
defaults: { prices: daily }
portfolios: [ { id: p } ]
"""
    assert problems(PORTFOLIO + "include: [other.yaml]", **{"other.yaml": other}) == [
        "other.yaml:1: signals.equal: 'equal' is given twice, here and at fleet.yaml:4",
        "other.yaml:2: defaults: is given twice, here and at fleet.yaml:6",
        "other.yaml:3: portfolios[0].id: 'p' is used twice, here and at fleet.yaml:7",
    ]


def test_names_of_a_broken_include_are_not_called_unknown(problems):
    text = PORTFOLIO.replace("signal: equal", "signal: elsewhere") + "include: [broken.yaml]"
    (problem,) = problems(text, **{"broken.yaml": "signals: { elsewhere: {\n"})
    assert problem.startswith("broken.yaml:2: not valid YAML")


# -- new kinds ----------------------------------------------------------------------------------------------------------


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
    assert problems(PORTFOLIO.replace("id: p", "id: p, signal: { kind: test_momentum, universe: two, lokback: 5 }")) == [
        "fleet.yaml:7: portfolios[0].signal: missing key 'lookback'",
        "fleet.yaml:7: portfolios[0].signal: unknown key 'lokback' - did you mean 'lookback'?",
    ]
    definition = fleet_json_schema()["$defs"]["Momentum"]
    assert set(definition["properties"]) == {
        "kind",
        "asset_list",
        "universe",
        "lookback",
        "stale_after",
        "effective_from",
        "override_asset",
    }
    assert definition["required"] == ["kind", "lookback"]


def test_the_schema_accepts_what_loads_and_refuses_typing_errors():
    jsonschema = pytest.importorskip("jsonschema")
    schema = fleet_json_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(schema)
    assert validator.is_valid(DOCUMENT)
    matrix = {
        "id": "p{lag}",
        "matrix": {"lag": [1, 2]},
        "rebalance": {"kind": "immediate_signal", "calendar_key": "X", "execution_lag": "{lag}"},
    }
    assert validator.is_valid(DOCUMENT | {"portfolios": [matrix]})
    for section, value in [
        ("portfolios", [{"id": "p", "rebalance": matrix["rebalance"]}]),  # a placeholder without a matrix
        ("portfolios", [{"id": "p", "tagss": []}]),
        ("portfolios", [{"signal": "equal"}]),
        ("portfolios", [{"id": "p", "price_alignment_policy": {"maximum_staleness": "3 days"}}]),
        ("signals", {"s": {"kind": "no_such_kind"}}),
        ("signals", {"s": {"asset_list": ["A"]}}),
        ("signals", {"s": {"kind": "equal_weights", "asset_list": ["A"], "universe": "u"}}),
        ("signals", {"s": {"kind": "fixed_weights", "weights": {"A": "x"}}}),
        ("calendars", {"c": {"pandas_calendar": "NYSE"}}),
        ("run", {"executor": "dask"}),
        ("versions", 1),
    ]:
        assert not validator.is_valid(DOCUMENT | {section: value}), (section, value)


# -- size, and whatever else may be in a file ---------------------------------------------------------------------------


def test_ten_thousand_portfolios_load_in_seconds(load):
    fees = ", ".join(f"{i / 100_000:.5f}" for i in range(1000))
    text = f"""
portfolios:
  - id: "p-{{fee}}-{{lag}}"
    matrix: {{ fee: [{fees}], lag: [0, 1, 2, 3, 4, 5, 6, 7, 8, 9] }}
    signal: {{ kind: equal_weights, universe: two }}
    rebalance: {{ kind: immediate_signal, calendar_key: XNYS, execution_lag: "{{lag}}" }}
    execution: {{ commission_fee: "{{fee}}" }}
"""
    started = time.perf_counter()
    portfolios = load(BASE + text).portfolios
    assert time.perf_counter() - started < 10.0  # 1.4 s on an idle core
    assert len(portfolios) == 10_000
    assert len({id(p.signal) for p in portfolios}) == 1
    assert len({id(p.rebalance) for p in portfolios}) == 10
    assert len({id(p.execution) for p in portfolios}) == 1000


def test_the_whole_fleet_is_capped(problems, monkeypatch):
    monkeypatch.setattr(fleet_module, "PORTFOLIOS_MAX", 3)
    text = BASE + "portfolios:\n- { id: 'p{i}', matrix: { i: [1, 2] } }\n- { id: q }\n- { id: r }\n"
    assert problems(text) == ["fleet.yaml:10: portfolios[2]: a fleet has at most 3 portfolios"]


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | st.sampled_from(["", "equal", "daily", "1d", "{a}", "2020-01-31", "0.5"]),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(["kind", "weights", "universe", "a"]), inner, max_size=2),
    max_leaves=4,
)
KEYS = ["id", "signal", "rebalance", "prices", "price_column", "frequency", "start_date", "execution", "price_alignment_policy", "tags"]


@settings(max_examples=100, deadline=None)
@given(
    st.dictionaries(st.sampled_from([*KEYS, "name", "description", "publish_index", "matrix"]), PLAIN, max_size=3),
    st.dictionaries(st.sampled_from(KEYS), PLAIN, max_size=1),
)
def test_no_portfolio_is_dropped_in_silence(folder, changes, defaults):
    document = DOCUMENT | {"portfolios": [DOCUMENT["portfolios"][0] | changes], "defaults": DOCUMENT["defaults"] | defaults}
    write(folder, {"fleet.yaml": json.dumps(document)})
    try:
        fleet = load_fleet(folder / "fleet.yaml")
    except ConfigurationError as error:
        problems = error.facts["problems"]
    else:
        problems = []
        assert len(fleet.portfolios) >= 1
    assert all(line.startswith("fleet.yaml:1: ") for line in problems)


@settings(max_examples=100, deadline=None)
@given(st.text(st.sampled_from(list("ab:-[]{}#&*!|>'\"%@`,? \n\t<1.~")), max_size=40))
def test_any_text_loads_or_is_refused(folder, text):
    write(folder, {"fleet.yaml": text})
    with pytest.raises(ConfigurationError, match=r"fleet\.yaml:\d+: "):
        load_fleet(folder / "fleet.yaml")
