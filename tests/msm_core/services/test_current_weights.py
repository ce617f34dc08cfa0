"""Weights of portfolios between their trades, against numbers worked by hand and a re-computation from what is stored."""

from datetime import timedelta
from typing import Any
from uuid import UUID, uuid4

import numpy as np
import pandas as pd
import pytest
from sqlalchemy import Engine

from msm_core.database import transaction
from msm_core.errors import UnresolvedPortfolios
from msm_core.services.current_weights import CurrentPositions, CurrentWeights, read_current_positions
from tests import factories
from tests.factories import closes_of, fixed, instant, open_market, portfolio, run, sql, walks

scheduled = factories.scheduled
CLOSES = closes_of("2024-01-02", 4)  # Tuesday to Friday
PRICES = pd.DataFrame({"A": [100.0, 110.0, 120.0, 130.0], "B": [50.0, 50.0, 45.0, 40.0]}, CLOSES)


def uids(engine: Engine) -> dict[str, UUID]:
    return dict(sql(engine, "SELECT unique_identifier, uid FROM msm__portfolio"))  # type: ignore[arg-type]


def positions(engine: Engine, as_of: Any, names: list[str]) -> CurrentPositions:
    known = uids(engine)
    with transaction(engine, read_only=True) as connection:
        return read_current_positions(connection, [known[name] for name in names], instant(as_of))


def weights(found: CurrentPositions, name: str) -> dict[str, float]:
    rows = found.positions[found.positions["portfolio_identifier"] == name]
    return dict(zip(rows["asset_identifier"], rows["weight"], strict=True))


@pytest.fixture
def market(engine: Engine) -> Engine:
    open_market(engine, PRICES)
    return engine


def bought(name: str, signal: Any, **options: Any) -> Any:
    """A portfolio that buys on Tuesday, and then only when its signal says something new."""
    return portfolio(name, signal, on="signal_change", start_date=CLOSES[0].date(), **options)


def test_weights_drift_with_prices_and_what_they_lack_is_cash(market: Engine) -> None:
    run(market, [bought("p", fixed(A=0.5, B=0.25), fee=0.0), bought("q", fixed(A=-0.5), fee=0.01)], "2024-01-06")
    found = positions(market, CLOSES[2], ["p", "q"])
    assert not found.problems
    # Thursday: A 100 -> 120, B 50 -> 45; V = 1 + 0.5 * 0.2 - 0.25 * 0.1 = 1.075
    assert weights(found, "p") == pytest.approx({"A": 0.5 * 1.2 / 1.075, "B": 0.25 * 0.9 / 1.075}, abs=1e-15)
    # the fee is paid before: V grows by 1 - 0.5 * 0.2 = 0.9 from there
    assert weights(found, "q") == pytest.approx({"A": -0.5 * 1.2 / 0.9}, abs=1e-15)
    rows = found.positions
    assert rows["time_index"].eq(instant(CLOSES[2])).all()
    assert dict(zip(rows["asset_identifier"], rows["price"], strict=True)) == {"A": 120.0, "B": 45.0}


def test_they_are_those_of_the_last_valuation_at_or_before_the_as_of(market: Engine) -> None:
    run(market, [bought("p", fixed(A=0.5), fee=0.0)], "2024-01-06")
    at = {"2024-01-04 21:00": 0.6 / 1.1, "2024-01-04 20:59": 0.55 / 1.05, "2024-01-02 21:00": 0.5, "2024-02-01": 0.65 / 1.15}
    for as_of, weight in at.items():
        assert weights(positions(market, as_of, ["p"]), "p") == pytest.approx({"A": weight}, abs=1e-15), as_of
    before = positions(market, "2024-01-02 20:59", ["p"])
    assert len(before.positions) == 0
    assert "p has no weights at or before" in before.problems[uids(market)["p"]]


def test_a_trade_after_the_as_of_is_not_known_yet(market: Engine) -> None:
    signal = factories.schedule((CLOSES[0], {"A": 1.0}), (CLOSES[3], {"B": 1.0}))
    run(market, [portfolio("p", signal, on="signal_change", start_date=CLOSES[0].date())], "2024-01-06")
    assert weights(positions(market, CLOSES[2], ["p"]), "p") == {"A": 1.0}
    assert weights(positions(market, CLOSES[3], ["p"]), "p") == {"A": 0.0, "B": 1.0}


def test_under_target_accounting_weights_do_not_drift(market: Engine) -> None:
    run(market, [bought("p", fixed(A=0.5, B=0.25), accounting="target")], "2024-01-06")
    assert weights(positions(market, CLOSES[2], ["p"]), "p") == {"A": 0.5, "B": 0.25}


ASSETS = tuple("ABCDEFGHI")


def test_a_fleet_of_every_sort_agrees_with_the_formula_over_what_is_stored(engine: Engine) -> None:
    closes = open_market(engine, walks("2024-01-02", 75, ASSETS))
    fleet = factories.fleet(ASSETS, 30)
    run(engine, fleet, closes.index[-1])
    as_of = closes.index[-3] + timedelta(hours=1)
    found = positions(engine, as_of, [c.identifier for c in fleet])
    never = [c.identifier for c in fleet if factories.weights(engine, c.identifier).empty]  # their signal expired before the quarter's end
    assert found.problems.keys() == {uids(engine)[name] for name in never}
    drifted = 0
    for c in (c for c in fleet if c.identifier not in never):
        trades = factories.weights(engine, c.identifier).reset_index().query("time_index <= @as_of")
        trade = trades[trades["time_index"] == trades["time_index"].max()].set_index("asset_identifier")
        values = factories.values(engine, c.identifier)["calculated_close"]
        struck, at = trade["time_index"].iloc[0], values.index[values.index <= as_of][-1]
        wanted = trade["weight"]
        if c.execution.weight_accounting == "drifted":
            wanted = trade["weight"] * closes.loc[at, trade.index] / closes.loc[struck, trade.index] * values[struck] / values[at]
            drifted += struck < at
        assert weights(found, c.identifier) == pytest.approx(wanted.to_dict(), abs=1e-13)
    assert drifted > 5
    assert len(never) < 5


def test_statements_do_not_depend_on_the_number_of_portfolios(engine: Engine) -> None:
    closes = open_market(engine, walks("2024-01-02", 20, ASSETS))
    fleet = factories.fleet(ASSETS, 30)
    run(engine, fleet, closes.index[-1])
    counts = []
    for some in (fleet[:2], fleet):
        known = [uids(engine)[c.identifier] for c in some]
        with factories.statements() as sent, transaction(engine, read_only=True) as connection:
            read_current_positions(connection, known, instant(closes.index[-1]))
        counts.append(len(sent))
    assert counts[0] == counts[1] <= 15


def test_one_portfolio_that_cannot_be_priced_is_a_problem_of_its_own(market: Engine) -> None:
    run(market, [bought("p", fixed(A=1.0)), bought("q", fixed(B=1.0))], "2024-01-06")
    sql(market, "DELETE FROM msm__external_prices WHERE asset_identifier = 'A' AND time_index = %s", (CLOSES[2],))
    sql(market, "DELETE FROM msm__asset WHERE unique_identifier = 'B'")
    run(market, [bought("r", fixed(A=1.0))], "2024-01-04")
    found = positions(market, CLOSES[2], ["p", "q", "r"])
    known = uids(market)
    assert set(found.problems) == {known["p"], known["q"]}
    assert found.problems[known["p"]].startswith("p: ")
    assert "B" in found.problems[known["q"]]


def test_the_resolver_names_every_portfolio_without_weights_and_reads_each_once(market: Engine) -> None:
    run(market, [bought("p", fixed(A=1.0)), bought("q", fixed(B=1.0))], "2024-01-06")
    sql(market, "INSERT INTO msm__portfolio (uid, unique_identifier) VALUES (gen_random_uuid(), 'bare')")
    known, nobody = uids(market), uuid4()
    resolver = CurrentWeights(instant("2024-01-06"))
    assert set(resolver([known["p"]])["portfolio_uid"]) == {known["p"]}
    with pytest.raises(UnresolvedPortfolios) as lost:
        resolver([known["p"], known["bare"], nobody])
    assert "bare has no stored configuration" in str(lost.value)
    assert f"{nobody} (there is no such portfolio)" in str(lost.value)
    assert set(resolver([known["q"], known["p"]])["portfolio_uid"]) == {known["p"], known["q"]}
    with factories.statements() as sent:
        resolver([known["p"], known["q"]])
    assert not sent


def test_an_asset_that_stands_for_a_portfolio_is_looked_through(market: Engine) -> None:
    """Only its type makes it one: an asset that happens to be called like a portfolio is an asset."""
    run(market, [bought("A", fixed(B=1.0)), bought("B", fixed(A=1.0)), bought("p", fixed(A=0.5, B=0.5))], "2024-01-02 21:00")
    sql(market, "UPDATE msm__asset SET asset_type = 'portfolio' WHERE unique_identifier = 'A'")
    found = positions(market, "2024-01-02 21:00", ["p"]).positions.set_index("asset_identifier")
    assert found["held_portfolio_uid"].to_dict() == {"A": uids(market)["A"], "B": None}
    assert found["asset_uid"].isna().to_dict() == {"A": True, "B": False}
    assert found.loc["B", "asset_uid"] == dict(sql(market, "SELECT unique_identifier, uid FROM msm__asset"))["B"]


def test_nobody_has_no_positions(market: Engine) -> None:
    found = positions(market, "2024-01-06", [])
    assert len(found.positions) == 0
    assert found.positions["weight"].dtype == np.float64
