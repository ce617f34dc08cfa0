"""The arithmetic of attribution. Expected quantities are worked by hand; the property is checked in fractions, which know no rounding."""

import math
import pickle
from fractions import Fraction

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from msm_core.errors import AllocationRefused
from msm_core.services.allocation import STRATEGIES, demands, not_above, plan

HELD = [("A", 1, 100.0, 0.0), ("B", -1, 50.0, 10.0), ("C", 1, 3.0, 3.0)]


def capacity(rows=HELD) -> pd.DataFrame:
    return pd.DataFrame(rows, columns=["asset_identifier", "direction", "held_quantity", "allocated_elsewhere"])


def asked(*rows: tuple) -> pd.DataFrame:
    return pd.DataFrame(rows, columns=["virtual_fund", "asset_identifier", "quantity"])


def allocated(attribution) -> list[tuple]:
    return list(attribution.allocations.itertuples(index=False, name=None))


def left(attribution) -> dict[str, float]:
    return attribution.residual.set_index("asset_identifier")["residual_quantity"].to_dict()


def problems(strategy: str, *rows: tuple) -> list[dict]:
    with pytest.raises(AllocationRefused) as refusal:
        plan(capacity(), asked(*rows), strategy)
    assert refusal.value.facts["count"] == len(refusal.value.facts["problems"])
    assert str(pickle.loads(pickle.dumps(refusal.value))) == str(refusal.value)
    return refusal.value.facts["problems"]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_what_fits_is_attributed_as_demanded_and_zero_asks_for_nothing(strategy):
    rows = [("g", "B", -15.0), ("f", "A", 60.0), ("f", "B", -25.0), ("f", "C", 0.0), ("f", "not held", -0.0)]
    attribution = plan(capacity(), asked(*rows), strategy)
    assert allocated(attribution) == [("f", "A", 1, 60.0, 60.0), ("f", "B", -1, 25.0, 25.0), ("g", "B", -1, 15.0, 15.0)]
    assert list(attribution.residual.itertuples(index=False, name=None)) == [
        ("A", 1, 100.0, 0.0, 60.0, 40.0),
        ("B", -1, 50.0, 10.0, 40.0, 0.0),
        ("C", 1, 3.0, 3.0, 0.0, 0.0),
    ]


def test_in_proportion_everybody_gets_the_same_fraction_of_what_is_scarce():
    # A: 100 free of 80 + 120 demanded: half. B: 40 free of 30 demanded: whole. C: nothing is free.
    rows = [("f", "A", 80.0), ("g", "A", 120.0), ("g", "B", -30.0), ("f", "C", 7.0)]
    attribution = plan(capacity(), asked(*rows), "proportional_attribution")
    assert allocated(attribution) == [
        ("f", "A", 1, 80.0, 40.0),
        ("f", "C", 1, 7.0, 0.0),
        ("g", "A", 1, 120.0, 60.0),
        ("g", "B", -1, 30.0, 30.0),
    ]
    assert left(attribution) == {"A": 0.0, "B": 10.0, "C": 0.0}


def test_shares_are_rounded_down_to_fifteen_digits():
    # 0.1 / 3 each; to 15 digits down 0.0333333333333333, and three of them leave 0.0000000000000001
    attribution = plan(capacity([("A", 1, 0.1, 0.0)]), asked(*((fund, "A", 1.0) for fund in "fgh")), "proportional_attribution")
    assert attribution.allocations["allocated_quantity"].tolist() == [0.0333333333333333] * 3
    assert left(attribution) == {"A": 1e-16}


@pytest.mark.parametrize("strategy", ["explicit", "strict_feasible"])
def test_all_or_nothing_tells_every_shortfall(strategy):
    # A: 60 + 41 of 100; B: 41 of 50 - 10; C: 1 of nothing; the short B does not fund a long one
    found = problems(strategy, ("f", "A", 60.0), ("g", "A", 41.0), ("f", "B", -41.0), ("f", "C", 1.0), ("g", "B", 5.0))
    assert [(p["asset_identifier"], p["direction"], p["demanded"], p["free"]) for p in found] == [
        ("A", 1, 101.0, 100.0),
        ("B", -1, 41.0, 40.0),
        ("B", 1, 5.0, 0.0),
        ("C", 1, 1.0, 0.0),
    ]
    assert found[1]["reason"] == "'B' short: 41.0 demanded, 40.0 free"


def test_shares_below_what_a_float_can_tell_are_nothing():
    # a third of 1e-323 is nearest to the least float there is, 5e-324; three of those would be more than 1e-323
    attribution = plan(capacity([("A", 1, 1e-323, 0.0)]), asked(*((fund, "A", 1e-323) for fund in "fgh")), "proportional_attribution")
    assert attribution.allocations["allocated_quantity"].tolist() == [0.0] * 3
    assert left(attribution) == {"A": 1e-323}


def test_shorts_fund_no_longs_in_proportion_either():
    attribution = plan(capacity(), asked(("f", "A", -10.0), ("g", "B", 10.0)), "proportional_attribution")
    assert attribution.allocations["allocated_quantity"].tolist() == [0.0, 0.0]
    assert left(attribution) == {"A": 100.0, "B": 40.0, "C": 0.0}


def test_the_last_bit_counts():
    # 0.1 + 0.2 is 0.3 in decimals, and 0.30000000000000004 in floats; a float sum would refuse the first, and 3 * 0.1 likewise
    whole = plan(capacity([("A", 1, 0.3, 0.0)]), asked(("f", "A", 0.1), ("g", "A", 0.2)))
    assert left(whole) == {"A": 0.0}
    # 1e16 + 1 is 1e16 in floats: a float sum would let the 1 through
    with pytest.raises(AllocationRefused, match=r"10000000000000001\.0 demanded"):
        plan(capacity([("A", 1, 1e16, 0.0)]), asked(("f", "A", 1e16), ("g", "A", 1.0)))


def test_an_attribution_that_exceeds_what_is_held_frees_nothing():
    attribution = plan(capacity([("A", 1, 5.0, 6.0)]), asked(("f", "A", 1.0)), "proportional_attribution")
    assert allocated(attribution) == [("f", "A", 1, 1.0, 0.0)]
    assert left(attribution) == {"A": 0.0}


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_unsound_demand_is_told(strategy):
    rows = [("f", "A", math.nan), ("f", "B", -math.inf), ("f", "Z", 1.0), ("g", "A", 1.0), ("g", "A", 0.0), ("h", "A", "many")]
    assert sorted(problem["reason"] for problem in problems(strategy, *rows)) == [
        "demand of 'f' for 'A': its quantity is not a finite number",
        "demand of 'f' for 'B': its quantity is not a finite number",
        "demand of 'f' for 'Z': the asset is not held",
        "demand of 'g' for 'A': the fund asks for this asset twice",
        "demand of 'h' for 'A': its quantity is not a finite number",
    ]


def test_unknown_strategies_missing_columns_and_problems_found_before_are_told():
    assert [p["reason"] for p in problems("fair", ("f", "A", 1.0))] == [f"strategy 'fair' is none of {', '.join(STRATEGIES)}"]
    with pytest.raises(AllocationRefused, match="column quantity of the demands is missing"):
        plan(capacity(), asked(("f", "A", 1.0)).drop(columns="quantity"))
    with pytest.raises(AllocationRefused, match=r"2 problems.*nobody"):
        plan(capacity(), asked(("f", "A", math.nan)), found=[{"reason": "nobody"}])


def test_nothing_held_and_nothing_demanded():
    for rows in (asked(), pd.DataFrame()):
        assert allocated(plan(capacity(), rows)) == []
        assert plan(capacity([]), rows).residual.empty


# -- properties -----------------------------------------------------------------------------------------------------------------------

quantities = st.one_of(st.floats(5e-324, 1e300), st.floats(0.01, 1e6), st.integers(1, 9).map(lambda n: n / 10))
signed = st.tuples(quantities, st.sampled_from([1, -1])).map(lambda pair: pair[0] * pair[1])
books = st.dictionaries(
    st.sampled_from("ABC"), st.tuples(st.sampled_from([1, -1]), quantities, st.one_of(st.just(0.0), quantities)), min_size=3
)
wishes = st.dictionaries(st.tuples(st.sampled_from("fghij"), st.sampled_from("ABC")), signed)


def meant(quantity: float) -> Fraction:
    return Fraction(repr(quantity))


@settings(max_examples=100, deadline=None)
@given(books, wishes, st.randoms())
def test_shares_are_the_same_fraction_for_all_and_never_more_than_what_is_free(book, wish, random):
    held = capacity([(asset, *row) for asset, row in book.items()])
    rows = [(*key, quantity) for key, quantity in wish.items()]
    attribution = plan(held, asked(*rows), "proportional_attribution")

    got = attribution.allocations
    for asset, (direction, quantity, elsewhere) in book.items():
        free = max(meant(quantity) - meant(elsewhere), Fraction(0))
        mine = got[(got["asset_identifier"] == asset) & (got["direction"] == direction)]
        gross = sum(map(meant, mine["requested_quantity"]), Fraction(0))
        total = sum(map(meant, mine["allocated_quantity"]), Fraction(0))
        assert total <= free
        scale = min(Fraction(1), free / gross) if gross else Fraction(0)
        for wanted, share in zip(mine["requested_quantity"], mine["allocated_quantity"], strict=True):
            due = meant(wanted) * scale
            assert meant(share) <= due
            assert meant(share) >= due * (1 - Fraction(1, 10**14)) or due < 1e-300  # floats this small have few digits
        rest = left(attribution)[asset]
        assert meant(rest) <= max(meant(quantity) - meant(elsewhere) - total, Fraction(0)) < meant(math.nextafter(rest, math.inf))
    assert (
        got.loc[~got["direction"].eq(got["asset_identifier"].map({a: row[0] for a, row in book.items()})), "allocated_quantity"] == 0
    ).all()

    random.shuffle(rows)
    pd.testing.assert_frame_equal(plan(held, asked(*rows), "proportional_attribution").allocations, got)
    pd.testing.assert_frame_equal(plan(held.iloc[::-1], asked(*rows), "proportional_attribution").residual, attribution.residual)


@settings(max_examples=200, deadline=None)
@given(books, wishes, st.sampled_from(["explicit", "strict_feasible"]))
def test_all_or_nothing_is_refused_exactly_where_one_sum_does_not_fit(book, wish, strategy):
    gross: dict[tuple[str, float], Fraction] = {}
    for (_, asset), quantity in wish.items():
        place = asset, math.copysign(1, quantity)
        gross[place] = gross.get(place, Fraction(0)) + meant(abs(quantity))
    fits = all(
        total <= (meant(book[asset][1]) - meant(book[asset][2]) if book[asset][0] == direction else 0)
        for (asset, direction), total in gross.items()
    )
    held, rows = capacity([(asset, *row) for asset, row in book.items()]), asked(*((*key, quantity) for key, quantity in wish.items()))
    if not fits:
        with pytest.raises(AllocationRefused):
            plan(held, rows, strategy)
    else:
        got = plan(held, rows, strategy).allocations
        assert got["allocated_quantity"].tolist() == got["requested_quantity"].tolist()
        assert len(got) == len(wish)


@given(st.decimals(0, 1, allow_nan=False, places=40))
def test_the_largest_float_that_is_not_above(quantity):
    found = not_above(quantity)
    assert meant(found) <= Fraction(quantity) < meant(math.nextafter(found, math.inf))


# -- demands of portfolios ------------------------------------------------------------------------------------------------------------


def money(*rows: tuple) -> pd.DataFrame:
    return pd.DataFrame(rows, columns=["virtual_fund", "portfolio_uid", "notional"])


def weights(*rows: tuple) -> pd.DataFrame:
    return pd.DataFrame(rows, columns=["portfolio_uid", "asset_identifier", "weight", "price"])


def test_demands_are_notional_times_weight_by_price():
    # 1000 * 0.5 / 20 = 25; 1000 * -0.25 / 5 = -50; 200 * 0.5 / 20 = 5; 200 * -0.25 / 5 = -10
    held = weights(("p", "A", 0.5, 20.0), ("p", "B", -0.25, 5.0), ("p", "C", 0.0, math.nan))
    found = demands(money(("f", "p", 1000.0), ("g", "p", 200.0)), held)
    assert list(found.itertuples(index=False, name=None)) == [("f", "A", 25.0), ("f", "B", -50.0), ("g", "A", 5.0), ("g", "B", -10.0)]
    assert demands(money(), weights()).empty


def test_numbers_that_give_no_demand_are_all_told():
    held = weights(("p", "A", 0.5, 0.0), ("p", "B", 0.5, np.inf), ("p", "C", np.nan, 5.0), ("p", "D", 0.5, -1.0), ("p", "E", 0.5, None))
    with pytest.raises(AllocationRefused) as refusal:
        demands(money(("f", "p", math.inf)), held)
    assert [problem["reason"] for problem in refusal.value.facts["problems"]] == [
        "notional inf of 'f' is not finite",
        "weight nan of 'C' is not finite",
        "price 0.0 of 'A' is not finite and above 0",
        "price inf of 'B' is not finite and above 0",
        "price -1.0 of 'D' is not finite and above 0",
        "price nan of 'E' is not finite and above 0",
    ]
