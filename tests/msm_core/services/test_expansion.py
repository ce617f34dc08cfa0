"""Expansion of target positions: numbers worked by hand, and a brute-force expansion written for the test."""

import uuid
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from msm_core.errors import CyclicPortfolios, ResolverMissing, TargetsRefused, UnresolvedPortfolios
from msm_core.services.expansion import expand_portfolio_target_positions

EXPOSURES = ("weight_notional_exposure", "constant_notional_exposure", "single_asset_quantity")
A, B, C, P, Q, R = (uuid.UUID(int=i) for i in range(1, 7))


class Weights:
    """A resolver over a dictionary; a holding is (asset or portfolio, weight). It notes what it is asked."""

    def __init__(self, held: Mapping[uuid.UUID, Iterable[tuple[uuid.UUID, float]]], portfolios: Iterable[uuid.UUID] = (P, Q, R)) -> None:
        self.held, self.portfolios, self.asked = held, set(portfolios), list[list[uuid.UUID]]()

    def __call__(self, wanted: Sequence[uuid.UUID]) -> pd.DataFrame:
        self.asked.append(list(wanted))
        rows = [
            (p, None if held in self.portfolios else held, held if held in self.portfolios else None, weight)
            for p in wanted
            for held, weight in self.held.get(p, ())
        ]
        return pd.DataFrame(rows, columns=["portfolio_uid", "asset_uid", "held_portfolio_uid", "weight"])


def asset(uid: uuid.UUID, **exposure: Any) -> dict[str, Any]:
    return {"target_type": "asset", "asset_uid": uid, **exposure}


def mandate(uid: uuid.UUID, **exposure: Any) -> dict[str, Any]:
    return {"target_type": "portfolio", "portfolio_uid": uid, **exposure}


def told(expanded: pd.DataFrame, *columns: str) -> list[tuple[Any, ...]]:
    return [tuple(None if pd.isna(v) else v for v in row) for row in expanded[list(columns)].itertuples(index=False)]


def test_a_portfolio_target_is_its_exposure_times_the_weights() -> None:
    rows = [
        asset(A, weight_notional_exposure=0.25),
        mandate(P, weight_notional_exposure=-0.5),
        mandate(P, constant_notional_exposure=1000.0),
    ]
    weights = Weights({P: [(A, 0.75), (B, 0.125)]})  # 12.5 % of it is cash
    expanded = expand_portfolio_target_positions(rows, weights)
    assert told(expanded, "target_type", "asset_uid", "weight_notional_exposure", "constant_notional_exposure", "portfolio_weight") == [
        ("asset", A, 0.25, None, 1.0),
        ("asset", A, -0.375, None, 0.75),
        ("asset", B, -0.0625, None, 0.125),
        ("asset", A, None, 750.0, 0.75),
        ("asset", B, None, 125.0, 0.125),
    ]
    assert told(expanded, "source_target_type", "source_target_uid", "portfolio_uid") == [
        ("asset", A, None), *[("portfolio", P, P)] * 4,
    ]  # fmt: skip


def test_the_resolver_is_asked_once_for_all_portfolios() -> None:
    weights = Weights({P: [(A, 1.0)], Q: [(B, 1.0)]})
    expand_portfolio_target_positions([mandate(p, weight_notional_exposure=1.0) for p in (P, Q, P, Q, P)], weights)
    assert [sorted(asked) for asked in weights.asked] == [[P, Q]]


def test_portfolios_that_hold_portfolios_are_looked_through() -> None:
    # R = 0.5 Q + 0.25 A; Q = 0.5 P + 0.5 B; P = 0.5 A + 0.5 C
    weights = Weights({R: [(Q, 0.5), (A, 0.25)], Q: [(P, 0.5), (B, 0.5)], P: [(A, 0.5), (C, 0.5)]})
    expanded = expand_portfolio_target_positions([mandate(R, constant_notional_exposure=800.0)], weights)
    # A: 800*0.25 + 800*0.5*0.5*0.5 = 200 + 100; B: 800*0.5*0.5 = 200; C: 100
    found = expanded.groupby("asset_uid")["constant_notional_exposure"].sum().to_dict()
    assert found == {A: 300.0, B: 200.0, C: 100.0}
    assert set(told(expanded, "portfolio_uid", "asset_uid", "portfolio_weight")) == {
        (R, A, 0.25),
        (Q, B, 0.25),
        (P, A, 0.125),
        (P, C, 0.125),
    }
    assert weights.asked == [[R], [Q], [P]]  # a level at a time, no portfolio twice


def test_a_portfolio_that_is_held_twice_counts_twice_and_is_asked_for_once() -> None:
    weights = Weights({R: [(P, 0.5), (Q, 0.5)], Q: [(P, 1.0)], P: [(A, 1.0)]})
    expanded = expand_portfolio_target_positions(
        [mandate(R, weight_notional_exposure=1.0), mandate(P, weight_notional_exposure=1.0)], weights
    )
    assert told(expanded, "source_target_uid", "weight_notional_exposure") == [(R, 0.5), (R, 0.5), (P, 1.0)]
    assert [sorted(asked) for asked in weights.asked] == [[P, R], [Q]]


@pytest.mark.parametrize("held", [{P: [(P, 0.5), (A, 0.5)]}, {P: [(Q, 1.0)], Q: [(R, 1.0)], R: [(P, 0.1), (A, 0.9)]}])
def test_a_cycle_is_refused_by_name(held: Any) -> None:
    with pytest.raises(CyclicPortfolios) as refused:
        expand_portfolio_target_positions([mandate(P, weight_notional_exposure=1.0)], Weights(held))
    assert all(str(portfolio) in str(refused.value) for portfolio in held)


def test_a_portfolio_without_a_resolver_is_an_error_and_assets_need_none() -> None:
    with pytest.raises(ResolverMissing):
        expand_portfolio_target_positions([asset(A, single_asset_quantity=1.0), mandate(P, weight_notional_exposure=1.0)])
    expanded = expand_portfolio_target_positions([asset(A, single_asset_quantity=-3.0)])
    assert told(expanded, "asset_uid", "single_asset_quantity", "portfolio_weight") == [(A, -3.0, 1.0)]


def test_a_portfolio_of_which_no_weights_are_known_is_named() -> None:
    with pytest.raises(UnresolvedPortfolios, match=str(Q)):
        expand_portfolio_target_positions([mandate(p, weight_notional_exposure=1.0) for p in (P, Q)], Weights({P: [(A, 1.0)]}))
    with pytest.raises(UnresolvedPortfolios, match=str(R)):  # held, not asked for
        expand_portfolio_target_positions([mandate(P, weight_notional_exposure=1.0)], Weights({P: [(R, 1.0)]}))


def test_a_portfolio_that_is_all_cash_is_no_exposure_and_no_error() -> None:
    expanded = expand_portfolio_target_positions([mandate(P, weight_notional_exposure=1.0)], Weights({P: [(A, 0.0)]}))
    assert len(expanded) == 0
    assert "asset_uid" in expanded.columns


def test_other_columns_travel_along_and_the_order_is_kept() -> None:
    rows = [mandate(Q, weight_notional_exposure=1.0, account="x"), asset(C, weight_notional_exposure=2.0, account="y")]
    expanded = expand_portfolio_target_positions(pd.DataFrame(rows, index=[7, 7]), Weights({Q: [(B, 0.5), (A, 0.5)]}))
    assert told(expanded, "account", "asset_uid") == [("x", B), ("x", A), ("y", C)]


def test_netting_is_per_asset_and_kind_of_exposure() -> None:
    rows = [
        asset(A, weight_notional_exposure=0.25, account="x"),
        mandate(P, weight_notional_exposure=-0.5, account="x"),
        asset(A, constant_notional_exposure=100.0, account="x"),
        asset(A, single_asset_quantity=5.0, account="x"),
        asset(A, weight_notional_exposure=0.25, account="y"),
    ]
    netted = expand_portfolio_target_positions(rows, Weights({P: [(A, 0.5), (B, 0.5)]}), net=True)
    assert told(netted, "account", "asset_uid", *EXPOSURES) == [
        ("x", A, 0.0, None, None),
        ("x", B, -0.25, None, None),
        ("x", A, None, 100.0, None),
        ("x", A, None, None, 5.0),
        ("y", A, 0.25, None, None),
    ]
    assert netted["target_type"].eq("asset").all()


BROKEN: list[tuple[dict[str, Any], str]] = [
    ({"target_type": "index", "asset_uid": A, "weight_notional_exposure": 1.0}, "neither asset nor portfolio"),
    ({"target_type": None, "asset_uid": A, "weight_notional_exposure": 1.0}, "neither asset nor portfolio"),
    ({"target_type": "asset", "weight_notional_exposure": 1.0}, "asset_uid is missing"),
    ({"target_type": "portfolio", "weight_notional_exposure": 1.0}, "portfolio_uid is missing"),
    ({"target_type": "asset", "asset_uid": A, "portfolio_uid": P, "weight_notional_exposure": 1.0}, "one of them"),
    (asset(A), "exactly one exposure"),
    (asset(A, weight_notional_exposure=1.0, single_asset_quantity=1.0), "exactly one exposure"),
    (asset(A, weight_notional_exposure=float("nan")), "exactly one exposure"),
    (asset(A, weight_notional_exposure=float("inf")), "not finite"),
    (mandate(P, single_asset_quantity=1.0), "assets only"),
]


@pytest.mark.parametrize(("row", "why"), BROKEN)
def test_a_row_that_cannot_be_expanded_is_named(row: dict[str, Any], why: str) -> None:
    with pytest.raises(TargetsRefused, match=why) as refused:
        expand_portfolio_target_positions([asset(B, weight_notional_exposure=1.0), row], Weights({P: [(A, 1.0)]}))
    assert refused.value.facts["first"].startswith("row 1: ")


def test_every_problem_is_told_at_once() -> None:
    with pytest.raises(TargetsRefused) as refused:
        expand_portfolio_target_positions([row for row, _ in BROKEN])
    assert {int(text.split()[1][:-1]) for text in refused.value.facts["problems"]} == set(range(len(BROKEN)))


def test_text_in_place_of_a_number_and_a_missing_column_are_told() -> None:
    with pytest.raises(TargetsRefused, match="not a number"):
        expand_portfolio_target_positions([asset(A, weight_notional_exposure="much")])
    with pytest.raises(TargetsRefused, match="target_type"):
        expand_portfolio_target_positions([{"asset_uid": A, "weight_notional_exposure": 1.0}])


def test_nothing_expands_to_nothing() -> None:
    assert len(expand_portfolio_target_positions([])) == 0
    assert len(expand_portfolio_target_positions([], net=True)) == 0


# -- properties ---------------------------------------------------------------------------------------------------------------

ASSETS = [uuid.UUID(int=i) for i in range(1, 10)]
PORTFOLIOS = [uuid.UUID(int=100 + i) for i in range(5)]
numbers = st.floats(-2, 2).map(lambda x: round(x, 6))
books = st.fixed_dictionaries(  # a portfolio holds assets, and portfolios of a higher number
    {
        p: st.dictionaries(st.sampled_from([*ASSETS, *PORTFOLIOS[i + 1 :]]), numbers.filter(bool), min_size=1, max_size=9)
        for i, p in enumerate(PORTFOLIOS)
    }
)
targets = st.lists(
    st.one_of(
        st.builds(lambda uid, kind, x: asset(uid, **{kind: x}), st.sampled_from(ASSETS), st.sampled_from(EXPOSURES), numbers),
        st.builds(lambda uid, kind, x: mandate(uid, **{kind: x}), st.sampled_from(PORTFOLIOS), st.sampled_from(EXPOSURES[:2]), numbers),
    ),
    max_size=12,
)


def brute_force(row: Mapping[str, Any], book: Mapping[uuid.UUID, Mapping[uuid.UUID, float]]) -> dict[tuple[uuid.UUID, str], float]:
    """Exposure per (asset, kind) of one row, by walking down."""
    found: dict[tuple[uuid.UUID, str], float] = {}

    def walk(held: uuid.UUID, kind: str, exposure: float) -> None:
        if held in book:
            for inner, weight in book[held].items():
                walk(inner, kind, exposure * weight)
        else:
            found[held, kind] = found.get((held, kind), 0.0) + exposure

    for kind in EXPOSURES:
        if kind in row:
            walk(row.get("portfolio_uid") or row["asset_uid"], kind, row[kind])
    return found


@given(targets, books)
def test_expansion_agrees_with_walking_down(rows: list[dict[str, Any]], book: dict[uuid.UUID, dict[uuid.UUID, float]]) -> None:
    numbered = [{**row, "row": i} for i, row in enumerate(rows)]
    weights = Weights({p: held.items() for p, held in book.items()}, PORTFOLIOS)
    netted = expand_portfolio_target_positions(numbered, weights, net=True)
    found = {
        (row["row"], row["asset_uid"], kind): row[kind] for row in netted.to_dict("records") for kind in EXPOSURES if not pd.isna(row[kind])
    }
    wanted = {(i, *key): x for i, row in enumerate(rows) for key, x in brute_force(row, book).items()}
    assert found.keys() == wanted.keys()
    np.testing.assert_allclose([found[k] for k in wanted], list(wanted.values()), rtol=0, atol=1e-12)


@given(targets, books)
def test_sums_are_preserved(rows: list[dict[str, Any]], book: dict[uuid.UUID, dict[uuid.UUID, float]]) -> None:
    """Exposure of a target = its exposure times the sum of what its portfolio weighs, through all levels."""
    weights = Weights({p: held.items() for p, held in book.items()}, PORTFOLIOS)
    expanded = expand_portfolio_target_positions([{**row, "row": i} for i, row in enumerate(rows)], weights)
    records = expanded.to_dict("records")
    for i, row in enumerate(rows):
        for kind in EXPOSURES:
            whole = sum(x for (_, k), x in brute_force(row, book).items() if k == kind)
            assert abs(sum(r[kind] for r in records if r["row"] == i and not pd.isna(r[kind])) - whole) < 1e-12
