"""Identity: golden uids come from coreutils, `printf %s CANONICAL_JSON | sha256sum | cut -c1-32`, never from the code under test."""

import hashlib
import json
import os
import subprocess
import sys
import uuid
from datetime import UTC, date, datetime, timedelta, timezone
from enum import Enum, IntEnum, StrEnum
from pathlib import Path
from types import MappingProxyType
from typing import Literal
from zoneinfo import ZoneInfo

import numpy as np
import pandas as pd
import pytest

from msm_core.errors import InvalidNamespace, NotCanonical, UnknownKind
from msm_core.identity import (
    Kinds,
    Spec,
    canonical,
    canonical_json,
    current_namespace,
    identity,
    identity_uuid,
    logical_identifier,
    node_uid,
    physical_name,
)
from msm_core.price_sources import PriceSource
from msm_core.rebalance_strategy import RebalanceStrategy
from msm_core.signals import EqualWeights, FixedWeights, Signal
from tests.contracts import nest

NAMESPACE = "MSM_AUTO_REGISTER_NAMESPACE"
ROOT = Path(__file__).parents[2]

# -- golden uids --------------------------------------------------------------------------------------------------------------

PROGRAM = """
import json
from datetime import date, timedelta
from uuid import UUID
from msm_core.configuration import PortfolioConfiguration, PriceTypeNames
from msm_core.data_nodes.prices import APIDataNode
from msm_core.identity import identity, node_uid, storage_uid
from msm_core.rebalance_strategy import ImmediateSignal
from msm_core.signals import EqualWeights, FixedWeights

fixed = FixedWeights.from_signal_configuration(weights={"MSFT": 0.4, "AAPL": 0.6})
monthly = ImmediateSignal(calendar_key="24/7", rebalance_on="month_end", execution_lag=1)
portfolio = PortfolioConfiguration(
    portfolio_build_configuration={
        "price_source_instance": APIDataNode(time_index_meta_table_uid=UUID(int=1)),
        "price_column": PriceTypeNames.CLOSE,
        "start_date": date(2024, 1, 2),
        "price_alignment_policy": {"maximum_staleness": timedelta(days=3)},
        "backtesting_weights_configuration": {"signal_weights_instance": fixed, "rebalance_strategy_instance": monthly},
    },
    portfolio_markets_configuration={"portfolio_identifier": "p1", "portfolio_name": "One", "tags": ("core",)},
)
print(json.dumps({
    "fixed": fixed.uid,
    "equal": EqualWeights(asset_list=("É", "ETH", "BTC"), override_asset="SPY").uid,
    "monthly": monthly.uid,
    "portfolio": portfolio.configuration_hash,
    "signal of the portfolio": portfolio.signal_uid,
    "payload": identity({"b": {9: 2**53 + 1, 10: -7.0}, "a": (1.0, 2.5, True, None, '"é' + chr(92) + chr(10))}),
    "sets": identity({"assets": frozenset({"a", "b", "c", "d", "e", "f", "g", "h", "i"})}),
    "storage": storage_uid("ExternalPricesTS").hex,
    "storage in ns": storage_uid("ns.ExternalPricesTS").hex,
    "node": node_uid("PortfoliosTS", "p1").hex,
    "node in no namespace": node_uid("PortfoliosTS", "p1", "").hex,
    "node in ns": node_uid("PortfoliosTS", "p1", "ns").hex,
}))
"""

FIXED = "fa16a00d5c1297fd7a23e27883c58372"
# {"asset_unique_identifier_weights":[{"unique_identifier":"AAPL","weight":0.6},{"unique_identifier":"MSFT","weight":0.4}],
#  "effective_from":"1970-01-01T00:00:00+00:00","kind":"fixed_weights","version":1}, without the line break
GOLDEN = {
    "fixed": FIXED,
    # {"asset_list":["BTC","ETH","É"],"effective_from":"1970-01-01T00:00:00+00:00","kind":"equal_weights",
    #  "override_asset":"SPY","version":1}
    "equal": "b8b33b23f330f8e648e679fc34c4bd11",
    # {"calendar_key":"24/7","execution_lag":1,"kind":"immediate_signal","rebalance_on":"month_end","version":1}
    "monthly": "a00fead2429a86195cd3cb76de06d482",
    # {"kind":"portfolio","portfolio_build_configuration":{"backtesting_weights_configuration":{"kind":"backtesting_weights",
    #  "rebalance_strategy_instance":{monthly},"signal_weights_instance":{fixed}},"execution_configuration":{"commission_fee":0.00018,
    #  "kind":"execution","weight_accounting":"drifted"},"kind":"portfolio_build","portfolio_prices_frequency":"1d",
    #  "price_alignment_policy":{"kind":"price_alignment","maximum_staleness":259200,"missing":"fail"},"price_column":"close",
    #  "price_source_instance":{"kind":"api_data_node","time_index_meta_table_uid":"00000000-0000-0000-0000-000000000001"},
    #  "start_date":"2024-01-02"},"version":1}: nothing that only describes
    "portfolio": "50679a25d2d122d01f806b4fcd0ca55a",
    "signal of the portfolio": FIXED,
    # {"a":[1,2.5,true,null,"\"é\\\n"],"b":{"10":-7,"9":9007199254740993},"version":1}
    "payload": "9f9bd51cfa24295bc2330905a792588e",
    # {"assets":["a","b","c","d","e","f","g","h","i"],"version":1}
    "sets": hashlib.sha256(b'{"assets":["a","b","c","d","e","f","g","h","i"],"version":1}').hexdigest()[:32],
    # {"identifier":"ExternalPricesTS","kind":"time_index_meta_table","version":1}, and with ns.ExternalPricesTS
    "storage": "80bd2caaab2edc2bbbf4a451f70d5609",
    "storage in ns": "ef36ac9e354a61f68c5df976e3b1829a",
    # {"kind":"data_node_update","namespace":"","scope":"p1","storage":"PortfoliosTS","version":1}, and with "namespace":"ns"
    "node": "9145b9e3a26e6afa44ab193d5054a8df",
    "node in no namespace": "9145b9e3a26e6afa44ab193d5054a8df",
    "node in ns": "cdea1c35e156b34bbf9aee1f97a63f5c",
}


@pytest.mark.parametrize(("hash_seed", "namespace"), [("0", ""), ("1", ""), ("424242", "ns"), ("random", "other_1")])
def test_golden_uids_in_another_process(hash_seed, namespace):  # R5, R7
    environment = {**os.environ, "PYTHONHASHSEED": hash_seed, NAMESPACE: namespace, "TZ": "Asia/Kolkata", "PYTHONPATH": str(ROOT)}
    run = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, env=environment, check=True)
    uids = json.loads(run.stdout)
    golden = dict(GOLDEN)
    if namespace:  # only a node's uid takes the namespace of its process, when none is given
        golden["node"] = golden["node in ns"] if namespace == "ns" else uids["node"]
        assert uids["node"] != GOLDEN["node"]
    assert uids == golden


# -- canonical forms ----------------------------------------------------------------------------------------------------------


class Colour(Enum):
    RED = "red"


class Size(IntEnum):
    LARGE = 3


class Text(StrEnum):
    CLOSE = "close"


ALL_IN_A = (
    '{"asset_unique_identifier_weights":[{"unique_identifier":"A","weight":1}],"effective_from":"1970-01-01T00:00:00+00:00",'
    '"kind":"fixed_weights","override_asset":null}'
)
NOON = datetime(2024, 7, 1, 12, tzinfo=UTC)


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ((1, 1.0, np.float64(1), Size(3) - 2), "1"),
        ((0, 0.0, -0.0), "0"),
        ((-2, -2.0), "-2"),
        ((0.1, np.float64(0.1)), "0.1"),
        ((1e22,), "1e+22"),
        ((2**53 + 1,), "9007199254740993"),
        ((True,), "true"),
        ((None,), "null"),
        (("close", Text.CLOSE), '"close"'),
        ((Colour.RED,), '"red"'),
        ((Size.LARGE, 3.0), "3"),
        (
            (
                NOON,
                datetime(2024, 7, 1, 8, tzinfo=ZoneInfo("America/New_York")),  # UTC-4 in July
                datetime(2024, 7, 1, 17, 30, tzinfo=timezone(timedelta(hours=5, minutes=30))),
                pd.Timestamp("2024-07-01 14:00", tz="Europe/Berlin"),
            ),
            '"2024-07-01T12:00:00+00:00"',
        ),
        ((NOON.replace(microsecond=5),), '"2024-07-01T12:00:00.000005+00:00"'),
        ((date(2024, 7, 1),), '"2024-07-01"'),
        ((timedelta(days=1), timedelta(hours=24), 86400), "86400"),
        ((timedelta(milliseconds=1500),), "1.5"),
        ((uuid.UUID(int=1), "00000000-0000-0000-0000-000000000001"), '"00000000-0000-0000-0000-000000000001"'),
        (([1, 2.0], (1.0, 2)), "[1,2]"),
        (({"b", "a", "c"}, frozenset("cab")), '["a","b","c"]'),
        (({2, 10, 1.5},), "[1.5,10,2]"),  # any one order will do, but always that one
        (({(2, "x"), (1, "y")},), '[[1,"y"],[2,"x"]]'),
        (({"b": 1, "a": {"d": 1, "c": 2}}, {"a": {"c": 2.0, "d": 1.0}, "b": 1.0}), '{"a":{"c":2,"d":1},"b":1}'),
        ((MappingProxyType({1: "x"}), {"1": "x"}), '{"1":"x"}'),
        (("É😀\u2028",), '"É😀\u2028"'),
        (
            (FixedWeights.from_signal_configuration(weights={"A": 1}),),
            ALL_IN_A,
        ),
    ],
)
def test_equal_meaning_equal_text(values, text):
    for value in values:
        assert canonical_json({"v": value}) == f'{{"v":{text}}}'
        assert identity({"v": value}) == hashlib.sha256(f'{{"v":{text},"version":1}}'.encode()).hexdigest()[:32]


def test_other_meaning_other_text():
    values = [
        1,
        "1",
        True,
        "true",
        None,
        "null",
        [1],
        {"1": 1},
        1.5,
        "a",
        "A",
        "á",
        "a\u0301",
        [],
        {},
        "",
        2**53,
        2**53 + 1,
        [[1], 2],
        [1, [2]],
    ]
    assert len({canonical_json({"v": value}) for value in values}) == len(values)


def test_order_matters_where_it_is_meaning():
    assert identity({"v": [1, 2]}) != identity({"v": [2, 1]})
    assert identity({"a": 1, "b": 2}) == identity({"b": 2, "a": 1})
    assert identity({"a": 1, "b": 2}) != identity({"a": 2, "b": 1})


@pytest.mark.parametrize(
    ("value", "why"),
    [
        (float("nan"), "not finite"),
        (float("inf"), "not finite"),
        (-np.inf, "not finite"),
        (datetime(2024, 1, 1), "no time zone"),
        (pd.Timestamp("2024-01-01"), "no time zone"),
        (object(), "object is not a plain value"),
        (1j, "complex is not a plain value"),
        (np.array([1.0]), "ndarray is not a plain value"),
        (np.datetime64("2024-01-01"), "datetime64 is not a plain value"),
        (pd.Series([1.0]), "Series is not a plain value"),
        (iter([1]), "is not a plain value"),
        (print, "is not a plain value"),
        (int, "is not a plain value"),
        # a sequence of integers to Python, but not to a reader: b"ab" must not share the uid of [97, 98]
        (b"ab", "bytes is not a plain value"),
        (bytearray(b"ab"), "bytearray is not a plain value"),
        (memoryview(b"ab"), "memoryview is not a plain value"),
    ],
)
def test_refused_with_its_place(value, why):
    with pytest.raises(NotCanonical, match=why) as told:
        canonical({"weights": [1.0, {"AAPL": value}]})
    assert told.value.facts["path"] == "$.weights[1].AAPL"


def test_keys_that_would_merge_are_refused():
    """{1: ..., "1": ...} has two entries; a uid that forgets one would be shared by different meanings."""
    with pytest.raises(NotCanonical):
        canonical({1: "a", "1": "b"})


def test_uid_is_a_uuid_too():
    assert identity_uuid({"v": 1}) == uuid.UUID(hex=identity({"v": 1}))
    assert len(identity({"v": 1})) == 32


# -- specs --------------------------------------------------------------------------------------------------------------------


class Option(Spec):
    kind: Literal["option"] = "option"
    size: float = 1.0
    later: str | None = None


class Older(Spec):
    kind: Literal["option"] = "option"
    size: float = 1.0


def test_a_later_optional_field_renames_nothing():
    assert Option(size=2).uid == Older(size=2).uid
    assert Option(size=2, later="x").uid != Older(size=2).uid


@pytest.mark.parametrize("size", [float("nan"), float("inf"), -float("inf")])
def test_specs_refuse_what_has_no_identity(size):
    with pytest.raises(ValueError, match="finite number"):
        Option(size=size)


def test_registry_of_kinds():
    options: Kinds[Spec] = Kinds("option")
    assert options.register(Option) is Option
    assert options.parse({"kind": "option", "size": 3}) == Option(size=3)
    instance = Option(size=4)
    assert options.parse(instance) is instance
    for unknown in ({"kind": "tests.msm_core.test_identity:Option"}, {"size": 3}, {"kind": ["option"]}, {}):
        with pytest.raises(UnknownKind, match=r"is not registered\. Known kinds: option"):
            options.parse(unknown)


def test_description_is_not_identity():  # lesson: renaming a portfolio changes its identity
    plain = nest()
    described = plain.model_dump(mode="json")
    described["portfolio_markets_configuration"] |= {
        "portfolio_identifier": "renamed",
        "portfolio_name": "Other",
        "description": "text",
        "tags": ["a", "b"],
        "portfolio_index_identifier": "IDX",
        "signal_name": "name",
    }
    renamed = type(plain).model_validate(described)
    assert renamed.identifier == "renamed"
    assert renamed.configuration_hash == renamed.uid == plain.configuration_hash


@pytest.mark.parametrize(
    "change",
    [
        {"price_column": "vwap"},
        {"portfolio_prices_frequency": "1h"},
        {"start_date": "2024-01-02"},
        {"price_alignment_policy": {"missing": "hold"}},
        {"price_alignment_policy": {"maximum_staleness": 3600}},
        {"execution_configuration": {"commission_fee": 0.001}},
        {"execution_configuration": {"weight_accounting": "target"}},
        {"price_source_instance": {"kind": "api_data_node", "time_index_meta_table_uid": str(uuid.UUID(int=2))}},
    ],
)
def test_what_changes_numbers_is_identity(change):  # R5, R8
    plain = nest().model_dump(mode="json")
    changed = {**plain, "portfolio_build_configuration": plain["portfolio_build_configuration"] | change}
    assert nest().configuration_hash == type(nest()).model_validate(plain).configuration_hash
    assert type(nest()).model_validate(changed).configuration_hash != nest().configuration_hash


class Banded(RebalanceStrategy):
    kind: Literal["banded"] = "banded"
    band: float


class File(PriceSource):
    kind: Literal["file"] = "file"
    path: str


class Tilted(Signal):
    kind: Literal["tilted"] = "tilted"
    tilt: float


@pytest.mark.parametrize(
    "portfolio",
    [
        lambda number: nest(signal=Tilted(tilt=number)),
        lambda number: nest(strategy=Banded(calendar_key="X", band=number)),
        lambda number: nest(prices=File(path=f"{number}.parquet")),
    ],
)
def test_fields_of_subclasses_are_identity(portfolio):
    """A field annotated with the base class alone would drop them: different configurations, one uid."""
    assert portfolio(1).configuration_hash == portfolio(1).configuration_hash != portfolio(2).configuration_hash


def test_a_changed_copy_has_an_identity_of_its_own():
    original, other = nest(), nest(EqualWeights(asset_list=("A", "B")))
    before = original.configuration_hash, original.signal_uid  # worked out, and kept
    changed = original.model_copy(update={"portfolio_build_configuration": other.portfolio_build_configuration})
    assert (changed.configuration_hash, changed.signal_uid) == (other.configuration_hash, other.signal_uid)
    assert (original.configuration_hash, original.signal_uid) == before != (other.configuration_hash, other.signal_uid)


def test_defaults_spelled_out_are_the_defaults():  # R5
    plain = nest().model_dump(mode="json")
    spelled = plain["portfolio_build_configuration"] | {
        "price_column": "close",
        "portfolio_prices_frequency": "1d",
        "start_date": None,
        "price_alignment_policy": {"missing": "fail", "maximum_staleness": 0},
        "execution_configuration": {"commission_fee": 0.00018, "weight_accounting": "drifted"},
    }
    assert type(nest()).model_validate({**plain, "portfolio_build_configuration": spelled}).uid == nest().uid


def test_a_signal_is_one_whoever_consumes_it():
    signal = EqualWeights(asset_list=("A", "B"))
    portfolios = [nest(signal), nest(signal, {"kind": "immediate_signal", "calendar_key": "24/7"})]
    assert {p.signal_uid for p in portfolios} == {signal.uid}
    assert portfolios[0].uid != portfolios[1].uid


# -- namespace ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("process", "explicit", "logical", "physical"),
    [
        ("", None, "Asset", "msm__asset"),  # default: bare
        ("ns", None, "ns.Asset", "msm__asset__ns"),  # one rule for both
        ("ns", "own", "own.Asset", "msm__asset__own"),  # explicit wins
        ("ns", "", "Asset", "msm__asset"),
        ("", "own", "own.Asset", "msm__asset__own"),
    ],
)
def test_namespaces(monkeypatch, process, explicit, logical, physical):  # R6, R7
    monkeypatch.setenv(NAMESPACE, process)
    assert current_namespace() == process
    assert logical_identifier("Asset", explicit) == logical
    assert logical_identifier(logical, explicit) == logical  # never doubled
    assert physical_name("asset", explicit) == physical
    assert node_uid("Asset", "x", explicit) == node_uid("Asset", "x", process if explicit is None else explicit)


def test_a_name_that_only_looks_prefixed_is_prefixed(monkeypatch):
    monkeypatch.setenv(NAMESPACE, "ns")
    assert logical_identifier("nsAsset") == "ns.nsAsset"
    assert logical_identifier("other.Asset") == "ns.other.Asset"


def test_nodes_differ_by_storage_scope_and_namespace():  # R7
    uids = {node_uid(storage, scope, ns) for storage in ("A", "B") for scope in ("A", "B") for ns in ("", "a", "b")}
    assert len(uids) == 12


@pytest.mark.parametrize("namespace", ["Ns", "1a", "_a", "a-b", "a.b", "a b", "a" * 32, "é", 'a"; drop table x', "a\n"])
def test_invalid_namespaces_are_refused(monkeypatch, namespace):
    monkeypatch.setenv(NAMESPACE, namespace)
    for use in (current_namespace, lambda: logical_identifier("Asset"), lambda: physical_name("asset"), lambda: node_uid("A", "x")):
        with pytest.raises(InvalidNamespace, match=r"must match \^\[a-z\]\[a-z0-9_\]\{0,30\}\$"):
            use()


@pytest.mark.parametrize("namespace", ["a", "a" * 31, "a_1"])
def test_valid_namespaces(monkeypatch, namespace):
    monkeypatch.setenv(NAMESPACE, namespace)
    assert logical_identifier("Asset") == f"{namespace}.Asset"


# -- physical names -----------------------------------------------------------------------------------------------------------


def test_names_of_63_bytes_are_kept_and_longer_ones_end_in_a_hash():
    assert physical_name("a" * 58, "") == "msm__" + "a" * 58  # 5 + 58 = 63
    # printf %s msm__aaa...ax (60 a's) | sha256sum: 08e512f6f32e502a...; 63 - 17 = 46 bytes of the name before it, 5 + 41
    assert physical_name("a" * 60 + "x", "") == "msm__" + "a" * 41 + "_08e512f6f32e502a"


def test_long_names_never_merge():
    concepts = [f"{'interpolated_prices_' * 5}{tail}" for tail in range(200)] + ["é" * n for n in range(28, 90)]
    names = [physical_name(concept, namespace) for concept in concepts for namespace in ("", "a", "a" * 31)]
    assert len(set(names)) == len(names)
    assert max(len(name.encode()) for name in names) <= 63
    assert physical_name(concepts[0], "a") == physical_name(concepts[0], "a")
