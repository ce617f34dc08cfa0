"""Reads of weights, values, holdings and targets: whole, exact at their bounds, and one statement each.

What is read is put there by plain SQL; every expected row is written down here.
"""

import uuid
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import pandas as pd
import pytest
from sqlalchemy import Engine

from msm_core import start_engine
from msm_core.api import AccountAllocationModel, AccountTargetAllocation, Asset, Portfolio
from msm_core.errors import EngineNotStarted, NaiveTimestamp, RowNotFound
from msm_core.services import reads
from tests import accounts, factories
from tests.accounts import Book

small = accounts.small
NAN = float("nan")
JAN_2, JAN_3, JAN_4 = (datetime(2024, 1, day, 21, tzinfo=UTC) for day in (2, 3, 4))
TICK = pd.Timedelta(microseconds=1)

Read = Callable[..., pd.DataFrame]
READS: list[Read] = [reads.latest_portfolio_weights, reads.portfolio_values, reads.account_holdings, reads.account_targets]


def weigh(engine: Engine, *rows: tuple[Any, ...]) -> None:
    """Rows of portfolio, time, asset, weight, weight before, price."""
    columns = "portfolio_identifier, time_index, asset_identifier, weight, weight_before, price_current"
    with factories.rival(engine) as connection, connection.cursor() as cursor:
        cursor.executemany(f"INSERT INTO msm__portfolio_weights ({columns}) VALUES (%s, %s, %s, %s, %s, %s)", rows)


def value(engine: Engine, *rows: tuple[Any, ...]) -> None:
    """Rows of portfolio, time, close, return, calculated close."""
    columns = 'portfolio_identifier, time_index, close, "return", calculated_close, close_time'
    with factories.rival(engine) as connection, connection.cursor() as cursor:
        for row in rows:
            cursor.execute(f"INSERT INTO msm__portfolios ({columns}) VALUES (%s, %s, %s, %s, %s, %s)", (*row, row[1]))


def hold(engine: Engine, account: uuid.UUID, time: datetime, **quantities: float) -> uuid.UUID:
    """A holdings snapshot; below 0 is short. Returns its uid."""
    uid = uuid.uuid4()
    with factories.rival(engine) as connection:
        connection.execute("INSERT INTO msm__account_holdings_set (uid, account_uid, time_index) VALUES (%s, %s, %s)", (uid, account, time))
        for asset, quantity in quantities.items():
            connection.execute(
                "INSERT INTO msm__account_holdings (account_uid, time_index, asset_identifier, holdings_set_uid, quantity, direction) "
                "VALUES (%s, %s, %s, %s, %s, %s)",
                (account, time, asset, uid, abs(quantity), 1 if quantity > 0 else -1),
            )
    return uid


def want(engine: Engine, allocation: uuid.UUID, time: datetime, *rows: tuple[Asset | Portfolio, str, float]) -> uuid.UUID:
    """A position set; rows of target, exposure column, exposure. Returns its uid."""
    uid = uuid.uuid4()
    with factories.rival(engine) as connection:
        heads = "INSERT INTO msm__position_set (uid, account_target_allocation_uid, position_set_time) VALUES (%s, %s, %s)"
        connection.execute(heads, (uid, allocation, time))
        for target, column, exposure in rows:
            kind = "asset" if isinstance(target, Asset) else "portfolio"
            connection.execute(
                f"INSERT INTO msm__target_positions (position_set_uid, time_index, target_type, target_uid, {kind}_uid, {column}) "  # type: ignore[arg-type]
                "VALUES (%s, %s, %s, %s, %s, %s)",
                (uid, time, kind, target.uid, target.uid, exposure),
            )
    return uid


def rows(frame: pd.DataFrame, *columns: str) -> list[tuple[Any, ...]]:
    """Rows as plain values, None where a number is NaN."""
    kept = frame[list(columns)] if columns else frame
    return [tuple(None if cell != cell else cell for cell in row) for row in kept.itertuples(index=False)]


# -- weights ------------------------------------------------------------------------------------------------------------------


def test_the_last_vector_of_each_portfolio_is_read_whole(small: Book, engine: Engine) -> None:
    """Breaks: assets of an older vector are mixed in, a sold asset or an unknown price is lost, or rows have no order."""
    weigh(engine, ("P00", JAN_2, "A05", 1.0, 0.0, 10.0), ("P00", JAN_3, "A01", 0.75, 0.0, 7.5), ("P00", JAN_3, "A00", -0.25, 0.5, None))
    weigh(engine, ("P00", JAN_3, "A05", 0.0, 1.0, 11.0), ("P01", JAN_2, "A00", 0.1 + 0.2, 0.0, 10.0))
    assert rows(reads.latest_portfolio_weights()) == [
        ("P00", JAN_3, "A00", -0.25, 0.5, None),
        ("P00", JAN_3, "A01", 0.75, 0.0, 7.5),
        ("P00", JAN_3, "A05", 0.0, 1.0, 11.0),
        ("P01", JAN_2, "A00", 0.30000000000000004, 0.0, 10.0),
    ]


def test_as_of_includes_its_instant_and_nothing_later(small: Book, engine: Engine) -> None:
    """Breaks: a report of yesterday shows today, or misses what was stamped at the very instant."""
    weigh(engine, ("P00", JAN_2, "A00", 0.2, 0.0, 1.0), ("P00", JAN_3, "A00", 0.3, 0.2, 1.0), ("P01", JAN_3, "A00", 0.4, 0.0, 1.0))
    found = {time: rows(reads.latest_portfolio_weights(as_of=time), "portfolio_identifier", "weight") for time in (JAN_3, JAN_3 - TICK)}
    assert found == {JAN_3: [("P00", 0.3), ("P01", 0.4)], JAN_3 - TICK: [("P00", 0.2)]}
    assert rows(reads.latest_portfolio_weights(as_of=JAN_2 - TICK)) == []
    in_new_york = pd.Timestamp(JAN_3).tz_convert("America/New_York").to_pydatetime()
    assert rows(reads.latest_portfolio_weights(as_of=in_new_york), "weight") == [(0.3,), (0.4,)]


# -- values -------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def valued(small: Book, engine: Engine) -> Engine:
    """P00 on three days, P01 on the first two."""
    value(engine, ("P00", JAN_2, 1.0, 0.0, 1.0), ("P00", JAN_3, 1.5, 0.5, 1.25), ("P00", JAN_4, 0.75, -0.5, 0.625))
    value(engine, ("P01", JAN_3, 3.0, 0.5, 3.0), ("P01", JAN_2, 2.0, 1.0, 2.0))
    return engine


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [("P00", JAN_2), ("P00", JAN_3), ("P00", JAN_4), ("P01", JAN_2), ("P01", JAN_3)]),
        ({"start": JAN_3, "end": JAN_3}, [("P00", JAN_3), ("P01", JAN_3)]),
        ({"start": JAN_3 + TICK}, [("P00", JAN_4)]),
        ({"end": JAN_3 - TICK}, [("P00", JAN_2), ("P01", JAN_2)]),
        ({"start": JAN_4, "end": JAN_2}, []),
        ({"latest_only": True}, [("P00", JAN_4), ("P01", JAN_3)]),
        ({"latest_only": True, "end": JAN_3}, [("P00", JAN_3), ("P01", JAN_3)]),
        ({"latest_only": True, "end": JAN_3 - TICK}, [("P00", JAN_2), ("P01", JAN_2)]),
        ({"latest_only": True, "start": JAN_4}, [("P00", JAN_4)]),
        ({"portfolios": ["P01"], "latest_only": True}, [("P01", JAN_3)]),
        ({"portfolios": "P01"}, [("P01", JAN_2), ("P01", JAN_3)]),
        ({"portfolios": ["P01", "P00", "P01"], "start": JAN_3}, [("P00", JAN_3), ("P00", JAN_4), ("P01", JAN_3)]),
        ({"portfolios": []}, []),
    ],
)
def test_values_of_a_span_include_both_its_ends(valued: Engine, options: dict[str, Any], expected: list[tuple[str, datetime]]) -> None:
    """Breaks: the first or the last day of a report is missing, or a name given twice counts twice."""
    assert rows(reads.portfolio_values(**options), "portfolio_identifier", "time_index") == expected


def test_all_columns_of_values(valued: Engine) -> None:
    """Breaks: the published and the computed value change places."""
    assert rows(reads.portfolio_values("P00", start=JAN_3)) == [("P00", JAN_3, 1.5, 0.5, 1.25), ("P00", JAN_4, 0.75, -0.5, 0.625)]


def test_nothing_is_cut_off(small: Book, engine: Engine) -> None:
    """Breaks: a history of 5 000 sessions arrives as the first 500 or 1 000."""
    factories.sql(
        engine,
        'INSERT INTO msm__portfolios (portfolio_identifier, time_index, close, "return", calculated_close, close_time) '
        "SELECT p, t, 1 + i, 0, 1, t FROM unnest(ARRAY['P00', 'P01']) p, generate_series(0, 4999) i, "
        "LATERAL (SELECT '2000-01-03 21:00Z'::timestamptz + i * interval '1 day') d(t)",
    )
    found = reads.portfolio_values()
    assert found["close"].tolist() == [1.0 + i for i in range(5000)] * 2
    assert found["time_index"].iloc[-1] == pd.Timestamp("2000-01-03 21:00Z") + pd.Timedelta(days=4999)


# -- holdings -----------------------------------------------------------------------------------------------------------------


def test_holdings_are_those_of_the_newest_snapshot(engine: Engine) -> None:
    """Breaks: something sold long ago is still held, a short position looks long, or accounts mix."""
    start_engine()
    first, second, third = (a.uid for a in accounts.book(accounts=3).accounts)
    hold(engine, first, JAN_2, A00=1.0, A08=2.0)
    old = hold(engine, first, JAN_3, A03=2.5, A01=-4.0)
    new = hold(engine, first, JAN_4, A02=1.0)
    other = hold(engine, second, JAN_2, A00=7.0)
    hold(engine, third, JAN_2, A00=9.0)
    hold(engine, third, JAN_3)  # it holds nothing any more
    assert rows(reads.account_holdings(as_of=JAN_3)) == [
        ("C00", JAN_3, "A01", -1, -4.0, old),
        ("C00", JAN_3, "A03", 1, 2.5, old),
        ("C01", JAN_2, "A00", 1, 7.0, other),
    ]
    assert rows(reads.account_holdings(), "account", "holdings_set_uid") == [("C00", new), ("C01", other)]
    before = rows(reads.account_holdings(as_of=JAN_3 - TICK), "account", "quantity")
    assert before == [("C00", 1.0), ("C00", 2.0), ("C01", 7.0), ("C02", 9.0)]
    assert rows(reads.account_holdings(["C02"])) == []


# -- targets ------------------------------------------------------------------------------------------------------------------


def test_targets_are_the_newest_set_of_every_active_allocation(small: Book, engine: Engine) -> None:
    """Breaks: a mandate that ended is traded on, one of two mandates is forgotten, or exposures change their kind."""
    account, core = small.accounts[0], small.allocations[0]
    model = AccountAllocationModel.upsert(allocation_model_name="hedge")
    facts: dict[str, Any] = {"account_uid": account.uid, "account_allocation_model_uid": model.uid}
    hedge = AccountTargetAllocation.upsert(unique_identifier="C00-a-hedge", **facts)
    ended = AccountTargetAllocation.upsert(unique_identifier="C00-ended", is_active=False, **facts)
    (a0, a1, *_), (p0, p1) = small.assets, small.portfolios
    want(engine, core.uid, JAN_2, (a1, "single_asset_quantity", 5.0))
    newest = want(
        engine,
        core.uid,
        JAN_3,
        (p1, "weight_notional_exposure", 0.6),
        (a1, "constant_notional_exposure", -1000.0),
        (p0, "constant_notional_exposure", 50.0),
        (a0, "single_asset_quantity", 3.0),
    )
    hedged = want(engine, hedge.uid, JAN_2, (a0, "weight_notional_exposure", 0.1 + 0.2))
    want(engine, ended.uid, JAN_2, (a0, "weight_notional_exposure", 1.0))
    want(engine, core.uid, JAN_4)  # from then on it wants nothing
    head, other = ("C00", "C00-core", "core", newest, JAN_3), ("C00", "C00-a-hedge", "hedge", hedged, JAN_2)
    assert rows(reads.account_targets(as_of=JAN_3)) == [
        (*other, "asset", a0.uid, a0.uid, None, "A00", 0.30000000000000004, None, None),
        (*head, "asset", a0.uid, a0.uid, None, "A00", None, None, 3.0),
        (*head, "asset", a1.uid, a1.uid, None, "A01", None, -1000.0, None),
        (*head, "portfolio", p0.uid, None, p0.uid, "P00", None, 50.0, None),
        (*head, "portfolio", p1.uid, None, p1.uid, "P01", 0.6, None, None),
    ]
    assert rows(reads.account_targets(as_of=JAN_3 - TICK), "account_target_allocation", "target") == [
        ("C00-a-hedge", "A00"),
        ("C00-core", "A01"),
    ]
    assert rows(reads.account_targets(), "account_target_allocation") == [("C00-a-hedge",)]


def test_uids_of_targets_are_uids_or_none(small: Book, engine: Engine) -> None:
    """Breaks: NaN stands where the expansion looks for None, or text where it looks for a UUID."""
    half = "weight_notional_exposure", 0.5
    want(engine, small.allocations[0].uid, JAN_2, (small.assets[0], *half), (small.portfolios[0], *half))
    found = reads.account_targets()
    assert found["asset_uid"].tolist() == [small.assets[0].uid, None]
    assert found["portfolio_uid"].tolist() == [None, small.portfolios[0].uid]


# -- all reads ----------------------------------------------------------------------------------------------------------------


CROWD = """
    CREATE TEMP TABLE days AS SELECT t FROM unnest(ARRAY['2024-01-02 21:00Z', '2024-01-03 21:00Z']::timestamptz[]) t;
    INSERT INTO msm__portfolio_weights (portfolio_identifier, time_index, asset_identifier, weight, weight_before)
        SELECT unique_identifier, t, 'A00', 1, 0 FROM msm__portfolio, days;
    INSERT INTO msm__portfolios (portfolio_identifier, time_index, close, "return", calculated_close, close_time)
        SELECT unique_identifier, t, 1, 0, 1, t FROM msm__portfolio, days;
    INSERT INTO msm__account_holdings_set (uid, account_uid, time_index) SELECT gen_random_uuid(), uid, t FROM msm__account, days;
    INSERT INTO msm__account_holdings (account_uid, time_index, asset_identifier, holdings_set_uid, quantity)
        SELECT account_uid, time_index, 'A00', uid, 1 FROM msm__account_holdings_set;
    INSERT INTO msm__position_set (uid, account_target_allocation_uid, position_set_time)
        SELECT gen_random_uuid(), uid, t FROM msm__account_target_allocation, days;
    INSERT INTO msm__target_positions (position_set_uid, time_index, target_type, target_uid, asset_uid, weight_notional_exposure)
        SELECT s.uid, position_set_time, 'asset', a.uid, a.uid, 1 FROM msm__position_set s, msm__asset a WHERE unique_identifier = 'A00';
"""


@pytest.fixture
def crowd(engine: Engine) -> Engine:
    """300 portfolios and 300 accounts, each with one asset on each of two days."""
    start_engine()
    accounts.book(portfolios=300, accounts=300)
    factories.sql(engine, CROWD)
    return engine


def test_each_read_is_one_statement_for_any_number_of_owners(crowd: Engine) -> None:
    """Breaks: a fleet of 10 000 portfolios takes 10 000 round trips."""
    for read in READS:
        letter = "P" if "portfolio" in read.__name__ else "C"
        many = [f"{letter}{i:02d}" for i in range(300)]
        for names, count in ((many[:1], 1), (many, 300), (None, 300)):
            options = {"latest_only": True} if read is reads.portfolio_values else {}
            with factories.statements() as sent:
                found = read(names, **options)
            assert (len(found), len([s for s in sent if "SELECT" in s])) == (count, 1), (read.__name__, count)
            assert found.iloc[:, 0].tolist() == sorted(many[:count])


def test_the_newest_snapshot_is_found_by_its_key(crowd: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Breaks: a read of one day scans the whole history of every owner."""
    plans: list[str] = []
    fetch = reads.fetch

    def explained(connection: Any, statement: Any, parameters: Any) -> Any:
        plan = fetch(connection, reads.sql.SQL("EXPLAIN ") + statement, parameters)
        plans.append("\n".join(line for (line,) in plan))
        return fetch(connection, statement, parameters)

    factories.sql(crowd, "ANALYZE")
    monkeypatch.setattr(reads, "fetch", explained)
    for read in READS:
        read(**{"latest_only": True} if read is reads.portfolio_values else {})
    histories = ("portfolio_weights", "portfolios", "account_holdings", "account_holdings_set", "target_positions", "position_set")
    assert len(plans) == 4
    for plan in plans:
        assert "Scan Backward using" in plan
        assert not [name for name in histories if f"Seq Scan on msm__{name} " in plan], plan


@pytest.mark.parametrize("read", READS, ids=lambda read: read.__name__)
def test_unknown_names_are_named(small: Book, read: Read) -> None:
    """Breaks: a misspelt portfolio looks like one that holds nothing."""
    known = "P00" if "portfolio" in read.__name__ else "C00"
    with pytest.raises(RowNotFound, match="unique_identifier 'Q1' or unique_identifier 'Q2'") as caught:
        read(["Q2", known, "Q1"])
    assert caught.value.facts["model"] == ("Portfolio" if known == "P00" else "Account")
    with pytest.raises(RowNotFound, match=r"\(and 2 more\)"):
        read([f"Q{i}" for i in range(7)])


@pytest.mark.parametrize("read", READS, ids=lambda read: read.__name__)
def test_empty_answers_have_the_columns_and_types_of_full_ones(crowd: Engine, read: Read) -> None:
    """Breaks: code that works on a full fleet fails on the first day of a new one."""
    full, empty = read(), read([])
    assert len(full) > 0
    assert len(empty) == 0
    pd.testing.assert_series_equal(full.dtypes, empty.dtypes)
    assert str(full["time_index"].dtype) == "datetime64[us, UTC]"


def test_times_without_a_zone_are_refused(small: Book) -> None:
    """Breaks: the end of a report depends on where the server stands."""
    naive = datetime(2024, 1, 2)
    for read in (reads.latest_portfolio_weights, reads.account_holdings, reads.account_targets):
        with pytest.raises(NaiveTimestamp, match="as_of"):
            read(as_of=naive)
    with pytest.raises(NaiveTimestamp, match="start"):
        reads.portfolio_values(start=naive)
    with pytest.raises(NaiveTimestamp, match="end"):
        reads.portfolio_values(end=naive)


def test_an_engine_must_be_started(engine: Engine) -> None:
    """Breaks: a notebook reads another database than the one it attached."""
    for read in READS:
        with pytest.raises(EngineNotStarted):
            read()
