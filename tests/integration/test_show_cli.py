"""`msm-ray show` as a user meets it: a table that says what it leaves out, JSON and files that leave out nothing."""

import gzip
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from sqlalchemy import Engine

from tests import accounts, factories
from tests.accounts import Book
from tests.integration import test_cli, test_cli_prices
from tests.msm_core.services.test_reads import hold, value, want, weigh

run_cli = test_cli.run_cli
small = accounts.small
Cli = Callable[..., tuple[int, Any]]
People = Callable[..., str]

JAN_2, JAN_3 = (datetime(2024, 1, day, 21, tzinfo=UTC) for day in (2, 3))
MIDNIGHT = datetime(2024, 1, 3, tzinfo=UTC)


@pytest.fixture
def people(run_cli: Cli, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> People:
    """What people see of `msm-ray show ...`, which succeeds."""
    return lambda *arguments: test_cli_prices.lines(capsys, monkeypatch, "show", *arguments)


def test_weights(small: Book, engine: Engine, run_cli: Cli, people: People) -> None:
    """Breaks: the weights of a day show what came later, or digits are lost on the way to a program."""
    weigh(
        engine, ("P00", MIDNIGHT, "A00", 0.1 + 0.2, 0.0, 10.0), ("P00", JAN_3, "A01", 1.0, 0.25, None), ("P01", JAN_2, "A00", 1.0, 0.0, 1.0)
    )
    code, document = run_cli("show", "weights", "P00", "--as-of", "2024-01-02")
    assert (code, document) == (
        0,
        {
            "as_of": "2024-01-03T00:00:00+00:00",
            "rows": 1,
            "weights": [
                {
                    "portfolio_identifier": "P00",
                    "time_index": "2024-01-03T00:00:00+00:00",
                    "asset_identifier": "A00",
                    "weight": 0.30000000000000004,
                    "weight_before": 0.0,
                    "price_current": 10.0,
                }
            ],
        },
    )
    found = run_cli("show", "weights")[1]["weights"]
    assert [(row["portfolio_identifier"], row["asset_identifier"], row["price_current"]) for row in found] == [
        ("P00", "A01", None),
        ("P01", "A00", 1.0),
    ]
    text = people("weights", "P00", "--as-of", "2024-01-02")
    assert "Weights as of 2024-01-03 00:00Z: 1 row " in text
    assert "│ 0.3 " in text
    assert text.endswith("exit 0")


def test_a_long_table_says_where_the_rest_is(small: Book, engine: Engine, run_cli: Cli, people: People, tmp_path: Path) -> None:
    """Breaks: somebody takes the first rows for all of them, or finds no way to get at the rest."""
    factories.sql(
        engine,
        'INSERT INTO msm__portfolios (portfolio_identifier, time_index, close, "return", calculated_close, close_time) '
        "SELECT 'P00', t, i, 0, 1, t FROM generate_series(1, 1200) i, "
        "LATERAL (SELECT '2020-01-01Z'::timestamptz + i * interval '1 day') d(t)",
    )
    text = people("values")
    assert "Values: 1,200 rows " in text
    assert (text.count("│ P00 "), "│ 40 " in text, "│ 41 " in text) == (40, True, False)
    assert "The first 40 of 1,200 rows. All of them: --to FILE.csv (.csv.gz, .parquet), or --output json." in text
    short = people("values", "--end", "2020-02-09")
    assert ("Values to 2020-02-10 00:00Z: 40 rows " in short, "All of them" in short) == (True, False)
    document = run_cli("show", "values")[1]
    assert (document["rows"], [row["close"] for row in document["values"]]) == (1200, [float(i) for i in range(1, 1201)])
    assert "values.csv: 1,200 rows\n" in people("values", "--to", "values.csv")
    lines = (tmp_path / "values.csv").read_text().splitlines()
    assert lines[0] == '"portfolio_identifier","time_index","close","return","calculated_close"'
    assert lines[1] == '"P00","2020-01-02T00:00:00Z",1,0,1'
    assert len(lines) == 1201
    told = run_cli("show", "values", "--to", "values.parquet")
    assert told == (0, {"start": None, "end": None, "rows": 1200, "file": "values.parquet"})
    assert pq.read_table(tmp_path / "values.parquet").num_rows == 1200


def test_a_span_of_values_has_both_its_days(small: Book, engine: Engine, run_cli: Cli) -> None:
    """Breaks: a date as --start leaves out that day, or one as --end takes in the next."""
    times = [JAN_2, MIDNIGHT, JAN_3, datetime(2024, 1, 4, tzinfo=UTC), datetime(2024, 1, 4, 0, 0, 1, tzinfo=UTC)]
    value(engine, *(("P00", time, 1.0 + i, 0.0, 1.0) for i, time in enumerate(times)))
    value(engine, ("P01", JAN_2, 9.0, 0.0, 1.0))

    def closes(*options: str) -> list[float]:
        return [row["close"] for row in run_cli("show", "values", *options)[1]["values"]]

    assert closes("P00", "--start", "2024-01-03", "--end", "2024-01-03") == [2.0, 3.0, 4.0]
    assert closes("P00", "--start", "2024-01-02T21:00:00Z", "--end", "2024-01-03T21:00:00+00:00") == [1.0, 2.0, 3.0]
    assert closes("--latest") == [5.0, 9.0]
    assert closes("--latest", "--end", "2024-01-03T16:00:00-05:00") == [3.0, 9.0]


def test_holdings_targets_and_exposure(small: Book, engine: Engine, run_cli: Cli, people: People, tmp_path: Path) -> None:
    """Breaks: what an account has, should have and attributes cannot be seen without SQL."""
    account, portfolio = small.accounts[0], small.portfolios[0]
    snapshot = hold(engine, account.uid, JAN_2, A00=10.0, A01=-4.0)
    hold(engine, account.uid, JAN_3, A02=1.0)
    found = run_cli("show", "holdings", "C00", "--as-of", "2024-01-02")[1]["holdings"]
    assert [(row["asset_identifier"], row["direction"], row["quantity"], row["holdings_set_uid"]) for row in found] == [
        ("A00", 1, 10.0, str(snapshot)),
        ("A01", -1, -4.0, str(snapshot)),
    ]
    assert "│ A02 " in people("holdings")

    allocation, held = small.allocations[0].uid, small.assets[0]
    wanted = (portfolio, "weight_notional_exposure", 0.5), (held, "single_asset_quantity", 3.0)
    positions = want(engine, allocation, JAN_2, *wanted)
    want(engine, allocation, datetime(2200, 1, 1, tzinfo=UTC))  # in force later, not now
    (asset, mandate) = run_cli("show", "targets")[1]["targets"]
    assert (asset["target"], asset["asset_uid"], asset["portfolio_uid"]) == ("A00", str(held.uid), None)
    assert (mandate["target"], mandate["weight_notional_exposure"], mandate["position_set_uid"]) == ("P00", 0.5, str(positions))
    assert mandate["single_asset_quantity"] is None
    text = people("targets", "C00")
    assert ("C00-core" in text, "uid" in text) == (True, False)
    people("targets", "--to", "targets.csv.gz")
    assert f'"{positions}"' in gzip.decompress((tmp_path / "targets.csv.gz").read_bytes()).decode()

    with factories.rival(engine) as connection:
        fund, view = connection.execute(
            "WITH f AS (INSERT INTO msm__virtual_fund (uid, unique_identifier, account_uid, target_portfolio_uid) "
            "VALUES (gen_random_uuid(), 'F1', %(account)s, %(portfolio)s) RETURNING uid) SELECT uid, gen_random_uuid() FROM f",
            {"account": account.uid, "portfolio": portfolio.uid},
        ).fetchall()[0]
        facts = {"fund": fund, "view": view, "source": snapshot, "account": account.uid, "time": JAN_2}
        connection.execute(
            "INSERT INTO msm__virtual_fund_holdings_set (uid, virtual_fund_uid, source_account_holdings_set_uid, account_uid, time_index) "
            "VALUES (%(view)s, %(fund)s, %(source)s, %(account)s, %(time)s)",
            facts,
        )
        connection.execute(
            "INSERT INTO msm__virtual_fund_holdings (virtual_fund_uid, time_index, asset_identifier, virtual_fund_holdings_set_uid, "
            "source_account_holdings_set_uid, allocated_quantity, direction) "
            "VALUES (%(fund)s, %(time)s, 'A01', %(view)s, %(source)s, 2.5, -1)",
            facts,
        )
    for options in ((), ("F1",), ("--account", "C00")):
        (attributed,) = run_cli("show", "exposure", *options)[1]["exposure"]
        assert (attributed["virtual_fund"], attributed["target_portfolio"], attributed["quantity"]) == ("F1", "P00", -2.5)
    assert run_cli("show", "exposure", "--as-of", "2024-01-01")[1]["rows"] == 0


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("weights", "P00", "Q9"), "no Portfolio row has unique_identifier 'Q9'"),
        (("values", "Q9"), "no Portfolio row has unique_identifier 'Q9'"),
        (("holdings", "C9"), "no Account row has unique_identifier 'C9'"),
        (("targets", "C9"), "no Account row has unique_identifier 'C9'"),
        (("exposure", "F9"), "no VirtualFund row has unique_identifier 'F9'"),
        (("exposure", "--account", "C9"), "no Account row has unique_identifier 'C9'"),
        (("weights", "--as-of", "yesterday"), "--as-of yesterday: neither a date"),
        (("values", "--start", "yesterday"), "--start yesterday: neither a date"),
        (("values", "--end", "2024-01-02T21:00"), "--end 2024-01-02T21:00: an instant needs an offset"),
        (("weights", "--to", "weights.xlsx"), ".csv, .csv.gz or .parquet"),
        (("weights", "--to", "absent/weights.csv"), "there is no directory absent"),
    ],
)
def test_mistakes_are_told(small: Book, run_cli: Cli, tmp_path: Path, arguments: tuple[str, ...], told: str) -> None:
    """Breaks: a misspelt name looks like nothing stored."""
    code, document = run_cli("show", *arguments)
    assert code in (1, 2)
    assert told in document["error"]["message"]
    assert list(tmp_path.glob("*.csv")) == []


def test_a_file_that_cannot_be_written_is_told_before_anything_is_read(small: Book, run_cli: Cli) -> None:
    """Breaks: ten minutes of reading end in a spelling mistake."""
    with factories.statements() as sent:
        assert run_cli("show", "weights", "--to", "weights.xlsx")[0] == 2
    assert sent == []


def test_help_teaches_by_example(people: People) -> None:
    """Breaks: somebody has to read the source to know what to type."""
    for verb in ("weights", "values", "holdings", "targets", "exposure"):
        assert f"Example: msm-ray show {verb}" in people(verb, "--help")
