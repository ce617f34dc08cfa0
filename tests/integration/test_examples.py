"""The example's two scripts as a user starts them, told by their terminal and by plain SQL; and the documented wiring, letter by letter."""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest
from sqlalchemy import Engine

import msm_core
from msm_core.api import Asset, Calendar
from msm_core.errors import StorageNotPrepared
from msm_core.models import SNAPSHOTS, AccountTable, VirtualFundHoldingsSetTable, VirtualFundTable
from msm_ray import prepare
from msm_ray.fleet import load_fleet
from tests.factories import relations, sql, values, versions

EXAMPLES = Path(__file__).parents[2] / "examples"
PREPARE = "python examples/portfolio_equal_weights_prepare_schema.py"
FILLED = "msm__interpolated_prices_2cb23d4b980f15ff"  # ExternalPricesTS, 1d, 1d, ffill; pinned: stored prices depend on that name
PORTFOLIO = "example-equal-weights"
FEE = 0.00018


def script(name: str, *options: str, code: int = 0) -> str:
    """What it prints; on stderr where it is to fail."""
    line = [sys.executable, str(EXAMPLES / f"portfolio_equal_weights_{name}.py"), *options]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stderr if code in (1, 2) else done.stdout


def count(engine: Engine, table: str) -> int:
    return sql(engine, f"SELECT count(*) FROM {table}")[0][0]


def test_a_run_refuses_before_prepare_and_creates_nothing(empty_engine: Engine) -> None:  # R56, R58
    told = script("run", code=2)
    assert "msm__external_prices" in told
    assert PREPARE in told
    assert relations(empty_engine) == []

    prepare.prepare(empty_engine)  # the static schema is not enough, nor is a catalogue row without its table
    sql(
        empty_engine,
        "INSERT INTO msm__time_index_meta_table (uid, identifier, namespace, physical_table_name, kind, schema_fingerprint) "
        "VALUES (gen_random_uuid(), %s, '', %s, 'interpolated_prices', '')",
        (f"InterpolatedPricesTS.{FILLED[-16:]}", FILLED),
    )
    tables, rows = relations(empty_engine), versions(empty_engine)
    told = script("run", code=2)
    assert f"missing: {FILLED}. Run" in told
    assert PREPARE in told
    assert (relations(empty_engine), versions(empty_engine)) == (tables, rows)


def test_prepare_schema(empty_engine: Engine) -> None:  # R50-R54, R57, R59
    pending = script("prepare_schema", "--check", code=10)
    assert f"pending    0001, 0002, 0003, 0004, {FILLED}\n" in pending
    ddl = script("prepare_schema", "--sql")
    assert "CREATE TABLE msm__external_prices (" in ddl
    assert f"CREATE TABLE {FILLED} (" in ddl
    assert relations(empty_engine) == []  # neither changed anything

    first = script("prepare_schema")
    ((uid, cadence),) = sql(empty_engine, "SELECT uid, cadence FROM msm__time_index_meta_table WHERE identifier = 'ExternalPricesTS'")
    policy = {
        "source_time_index_meta_table_uid": str(uid),
        "source_cadence": cadence,
        "upsample_frequency_id": "1d",
        "intraday_bar_interpolation_rule": "ffill",
    }
    steps = [
        "static     applied 0001, 0002, 0003, 0004",
        f"source     ExternalPricesTS: uid {uid}, cadence 1d, table msm__external_prices",
        f"storage    InterpolatedPricesTS.{FILLED[-16:]}: class InterpolatedPricesStorage_{FILLED[-16:]}, table {FILLED}",
        *(f"           {name} = {value}" for name, value in policy.items()),
        f"dynamic    applied {FILLED}",
        "next       python examples/portfolio_equal_weights_run.py",
    ]
    assert [line for line in first.splitlines() if "attached" not in line] == steps
    catalogued = "SELECT identity_components, cadence, strpos(revision, 'create_table') > 0 FROM msm__time_index_meta_table"
    assert sql(empty_engine, f"{catalogued} WHERE physical_table_name = %s", (FILLED,)) == [(policy, "1d", True)]
    assert count(empty_engine, FILLED) == 0

    tables, rows = relations(empty_engine), versions(empty_engine)
    again = script("prepare_schema")
    assert "static     nothing new\n" in again
    assert "dynamic    nothing new\n" in again
    assert script("prepare_schema", "--check").count("none") == 4
    assert (relations(empty_engine), versions(empty_engine)) == (tables, rows)

    # a cadence that somebody lost is what the policy is derived from: it is put back first; and a table that is gone is made again
    sql(empty_engine, f"UPDATE msm__time_index_meta_table SET cadence = NULL WHERE identifier = 'ExternalPricesTS'; DROP TABLE {FILLED}")
    again = script("prepare_schema")
    assert "the catalogue had no cadence for ExternalPricesTS" in again
    assert f"dynamic    applied {FILLED}" in again


STORED = {
    "msm__calendar": 1,
    "msm__calendar_session": 245,  # 2026-05-01 to 2026-12-31
    "msm__asset": 3,
    "msm__index": 1,
    "msm__portfolio": 1,
    "msm__external_prices": 243,  # May to July are 92 days; sol is listed on May 31, which leaves 62 less the 3 that are missing
    FILLED: 246,
    "msm__signal_weights": 3,
    "msm__portfolio_weights": 27,  # 9 Sundays from May 31 to July 26, 3 assets
    "msm__portfolios": 62,
    "msm__portfolio_index_values": 62,
}


def test_run(engine: Engine, tmp_path: Path) -> None:  # R59, R92-R95
    script("prepare_schema")
    tables = relations(engine)
    told = script("run", "--html", str(tmp_path / "picture.html"))
    assert relations(engine) == tables  # R58
    assert {table: count(engine, table) for table in STORED} == STORED
    for step in (
        f"prepared   InterpolatedPricesTS.{FILLED[-16:]} is table {FILLED}",
        "calendar   CRYPTO_24_7: 24/7 of pandas_market_calendars, 2026-05-01 to 2026-12-31, uid ",
        *(f"asset      asset-{name}: uid " for name in ("btc", "eth", "sol")),
        "index      EXAMPLE_EQUAL_WEIGHTS: uid ",
        "bars       ExampleDailyBars -> ExternalPricesTS: 243 rows written, the newest of 2026-08-01 00:00Z",
        f"prices     InterpolatedPrices -> InterpolatedPricesTS.{FILLED[-16:]}/asset-sol: 62 rows written, through 2026-08-01 00:00Z",
        "3 bars are filled from the one before, and marked so: asset-sol of 2026-06-05, asset-sol of 2026-06-14, asset-sol of 2026-06-15",
        f"portfolio  {PORTFOLIO} depends on signal_weights and price_source",
        *(f"{n} rows written, {n} stored" for n in (3, 27, 62)),
        f"row        Portfolio {PORTFOLIO}: uid ",
        "no virtual funds: ",  # R94
        f"the last 6 of 62 values of {PORTFOLIO}",
    ):
        assert step in told
    names = {name for _, name, *_ in tables}
    boundary = [model.__tablename__ for model in (*SNAPSHOTS, AccountTable, VirtualFundTable, VirtualFundHoldingsSetTable)]
    assert names.issuperset(boundary)
    assert [count(engine, table) for table in boundary] == [0] * 6

    pointers = """
        SELECT c.unique_identifier, i.unique_identifier, v.storage, v.scope, w.storage, w.scope, s.storage, s.scope
        FROM msm__portfolio p JOIN msm__calendar c ON c.uid = p.calendar_uid JOIN msm__index i ON i.uid = p.portfolio_index_uid
        JOIN msm__data_node_update v ON v.uid = p.portfolio_data_node_uid
        JOIN msm__data_node_update w ON w.uid = p.portfolio_weights_data_node_uid
        JOIN msm__data_node_update s ON s.uid = p.signal_weights_data_node_uid WHERE p.unique_identifier = %s"""
    ((signal,),) = sql(engine, "SELECT DISTINCT signal_uid FROM msm__signal_weights")
    producers = ("PortfoliosTS", PORTFOLIO, "PortfolioWeightsTS", PORTFOLIO, "SignalWeightsTS", signal)
    assert sql(engine, pointers, (PORTFOLIO,)) == [("CRYPTO_24_7", "EXAMPLE_EQUAL_WEIGHTS", *producers)]

    page = (tmp_path / "picture.html").read_text()
    assert PORTFOLIO in page
    assert "asset-sol" in page
    assert 'src="http' not in page  # it draws without a network

    before = versions(engine)
    told = script("run")
    assert versions(engine) == before
    assert "rows written" not in told
    assert told.count("nothing new") == 12  # calendar, 3 assets, index, bars, 3 interpolated assets, 3 nodes


def test_numbers(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    for name in ("portfolio_equal_weights_prepare_schema", "portfolio_equal_weights_run"):  # in this process: it is quicker
        monkeypatch.setattr(sys, "argv", [name])
        importlib.import_module(name).main()
    # sol moves 5, -10, 8 % to its close of June 3 (stamped June 4), 20 * 1.05 * 0.9 * 1.08 = 20.412; the bar of June 4 is missing;
    # then it has moved 4 and -2 %: 20.412 * 1.04 * 0.98 = 20.8039104
    rows = sql(
        engine,
        f"SELECT time_index::date::text, open_time::date::text, open, high, low, close, volume, interpolated FROM {FILLED} "
        "WHERE asset_identifier = 'asset-sol' AND time_index BETWEEN '2026-06-04' AND '2026-06-06' ORDER BY 1",
    )
    observed = ("2026-06-04", "2026-06-03", 18.9, 20.412, 18.9, 20.412, 1800.0, False)
    filled = ("2026-06-05", "2026-06-04", 20.412, 20.412, 20.412, 20.412, 0.0, True)
    assert [rows[0], rows[1]] == [pytest.approx(observed), pytest.approx(filled)]
    assert rows[2][5] == pytest.approx(20.8039104)

    # bought on May 31, the first Sunday on which all three have a price; then a third of each drifts until the next Sunday
    btc = [0.94, 0.9024, 0.929472, 0.85511424]  # -6, -4, 3, -8 %
    eth = [1.0, 1.1, 1.056, 0.98208]  # 0, 10, -4, -7 %
    sol = [1.05, 0.945, 1.0206, 1.0206]  # 5, -10, 8 %, no bar
    drifted = [(1 - FEE) * (b + e + s) / 3 for b, e, s in zip(btc, eth, sol, strict=True)]
    stored = values(engine, PORTFOLIO)
    assert stored.index[0].isoformat() == "2026-06-01T00:00:00+00:00"
    assert list(stored["close"][:5]) == pytest.approx([1 - FEE, *drifted], rel=1e-9)
    assert stored["return"].iloc[1] == pytest.approx(-0.01 / 3)  # (-6 + 0 + 5) / 3 %

    # on June 7 all have moved on: btc -3, 10, 10 %; eth 3, 0, 10 %; sol, its gap over, 4, -2, -3, 5 %; each is set to a third again
    grown = [0.85511424 * 0.97 * 1.21, 0.98208 * 1.03 * 1.1, 1.0206 * 1.04 * 0.98 * 0.97 * 1.05]
    before = [g / sum(grown) for g in grown]
    query = "SELECT weight_before, weight FROM msm__portfolio_weights WHERE time_index = '2026-06-08' ORDER BY asset_identifier"
    weights = sql(engine, query)
    assert [w for w, _ in weights] == pytest.approx(before, rel=1e-9)
    assert [w for _, w in weights] == pytest.approx([1 / 3] * 3)
    fee = FEE * sum(abs(1 / 3 - w) for w in before)
    assert stored["close"].iloc[7] == pytest.approx((1 - FEE) * sum(grown) / 3 * (1 - fee), rel=1e-9)


def test_both_scripts_explain_themselves() -> None:
    told = script("prepare_schema", "--help")
    assert "--check" in told
    assert "Then: python examples/portfolio_equal_weights_run.py" in told
    assert "--html PATH" in script("run", "--help")


# -- the documented wiring ----------------------------------------------------------------------------------------------------

IMPORTS = """
from msm_core.configuration import (
    BacktestingWeightsConfig, PortfolioBuildConfiguration, PortfolioConfiguration, PortfolioExecutionConfiguration,
    PortfolioMarketsConfig, PriceTypeNames,
)
from msm_core.data_nodes.interpolated_prices import InterpolatedPrices, InterpolatedPricesConfig
from msm_core.data_nodes.portfolios import PortfoliosDataNode
from msm_core.rebalance_strategy import ImmediateSignal
from msm_core.signals import FixedWeights
from portfolio_equal_weights_example import ExampleDailyBars
"""

# as the document has it, with its dots
WIRING = """
source_bars_node = ExampleDailyBars(asset_identifiers=["asset-btc", "asset-eth"])
source_bars_node.run(debug_mode=True, update_tree=False, force_update=True)

price_source = InterpolatedPrices(
    interpolation_config=InterpolatedPricesConfig(
        asset_list=["asset-btc", "asset-eth"],
        intraday_bar_interpolation_rule="ffill",
        source_price_instance=source_bars_node,
        upsample_frequency_id="1d",
    )
)

signal_weights = FixedWeights.from_signal_configuration(...)

portfolio_configuration = PortfolioConfiguration(
    portfolio_build_configuration=PortfolioBuildConfiguration(
        price_source_instance=price_source,
        price_column=PriceTypeNames.CLOSE,
        portfolio_prices_frequency="1d",
        execution_configuration=PortfolioExecutionConfiguration(...),
        backtesting_weights_configuration=BacktestingWeightsConfig(
            signal_weights_instance=signal_weights,
            rebalance_strategy_instance=ImmediateSignal(...),
        ),
    ),
    portfolio_markets_configuration=PortfolioMarketsConfig(...),
)
"""

DOTS = {
    "from_signal_configuration(...)": 'from_signal_configuration(weights={"asset-btc": 0.6, "asset-eth": 0.4})',
    "PortfolioExecutionConfiguration(...)": "PortfolioExecutionConfiguration(commission_fee=0.00018)",
    "ImmediateSignal(...)": 'ImmediateSignal(calendar_key="CRYPTO_24_7")',
    "PortfolioMarketsConfig(...)": 'PortfolioMarketsConfig(portfolio_identifier="btc-eth-target")',
}


def test_documented_wiring(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:  # R34, R35, R40, R44, R66, R67
    msm_core.start_engine(models=["Calendar", "CalendarDate", "CalendarSession", "Asset"])
    Calendar.create_from_pandas_calendar("24/7", "CRYPTO_24_7", "Crypto 24/7", valid_from="2026-05-01", valid_to="2026-12-31")
    Asset.upsert_many([{"unique_identifier": "asset-btc"}, {"unique_identifier": "asset-eth"}])
    monkeypatch.syspath_prepend(str(EXAMPLES))
    code = WIRING
    for dots, filled in DOTS.items():
        assert code.count(dots) == 1
        code = code.replace(dots, filled)
    names: dict = {}
    exec(compile(IMPORTS + code, "snippet", "exec"), names)
    source_bars, price_source, configuration = (names[n] for n in ("source_bars_node", "price_source", "portfolio_configuration"))
    assert count(engine, "msm__external_prices") == 2 * 92
    again = source_bars.run(debug_mode=True, update_tree=False, force_update=True)
    assert (again.status, again.rows) == ("up_to_date", 0)

    node = names["PortfoliosDataNode"](portfolio_configuration=configuration)
    upstream = node.dependencies()
    assert set(upstream) == {"signal_weights", "price_source"}
    assert upstream["signal_weights"].signal_weights_instance == names["signal_weights"]
    assert upstream["price_source"] == price_source
    # where the bars are, not who publishes them: the document is read back without the producer
    assert [source.kind for source in price_source.dependencies().values()] == ["api_data_node"]
    assert type(configuration).model_validate_json(configuration.model_dump_json()) == configuration
    assert "example_daily_bars" not in configuration.model_dump_json()

    tables = relations(engine)
    with pytest.raises(StorageNotPrepared, match=f"missing: {FILLED}. Run `msm-ray prepare`"):
        node.run()
    assert relations(engine) == tables
    assert prepare.prepare(engine, [price_source]).pending == (FILLED,)
    assert [result.rows for result in price_source.run()] == [92, 92]
    assert node.run().status == "landed"
    # as in the README: 1 - fee, then * 1.06 less the fee of setting 0.66 / 1.06 back to 0.6, then * 1.1 for both
    second = (1 - FEE) * 1.06 * (1 - FEE * 2 * (0.66 / 1.06 - 0.6))
    stored = values(engine, "btc-eth-target")["close"]
    assert list(stored[:3]) == pytest.approx([1 - FEE, second, second * 1.1], rel=1e-9)
    assert len(stored) == 92
    before = versions(engine)
    assert node.run().status == "up_to_date"
    assert versions(engine) == before


def test_the_fleet_example_interpolates(engine: Engine) -> None:
    configurations = load_fleet(EXAMPLES / "fleet.yaml").portfolios
    assert [c.identifier for c in configurations if c.price_source.policy == ("1d", "ffill")] == ["equal-weekly-filled"]
    assert prepare.check(engine, [c.price_source for c in configurations]).pending == (FILLED,)
