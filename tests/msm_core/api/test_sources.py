"""Anyone's table becomes a price source by a row in the catalogue; what does not fit is named, and nothing is taken over in silence."""

import uuid
from collections.abc import Callable

import pytest
from sqlalchemy import Engine

from msm_core.api import get_source, list_sources, one_transaction, register_source
from msm_core.api.sources import source_facts, source_hints
from msm_core.database import transaction
from msm_core.errors import EngineNotStarted, MsmError, SourceConflict, SourceNotRegistered, SourceUnusable
from msm_core.identity import storage_uid
from msm_core.models import ExternalPricesStorage, TimeIndexMetaTable
from msm_core.sources import Source, read_prices
from tests import factories

EXTERNAL, CATALOGUE = ExternalPricesStorage.__tablename__, TimeIndexMetaTable.__tablename__
GRAIN = "asset_identifier text, time_index timestamptz, close float8"
ODD = 'Bars "100%s" {x}'  # a name of somebody else's
BAR = "('A', '2024-01-02 21:00Z', 1.5)"


@pytest.fixture
def bars(started: Engine) -> Engine:
    """A table `bars` of somebody else's."""
    factories.sql(started, f"CREATE TABLE bars ({GRAIN})")
    return started


def stored(engine: Engine, identifier: str) -> tuple[object, ...]:
    return factories.sql(engine, f"SELECT uid, xmin::text, t.* FROM {CATALOGUE} t WHERE identifier = %s", (identifier,))[0]


def hints(engine: Engine, source: Source) -> list[str]:
    with transaction(engine) as connection:
        return source_hints(connection, source)


# -- registering --------------------------------------------------------------------------------------------------------------


def test_a_strangers_table_with_an_odd_name_is_registered_and_read(started):
    """Breaks: names that need quoting are found, or read, as something else - or run as SQL."""
    name = ODD.replace('"', '""')
    factories.sql(started, 'CREATE SCHEMA "Vendor"')
    columns = 'asset_identifier varchar(20), time_index timestamptz, "Close" numeric(18,6), note text'
    factories.sql(started, f'CREATE TABLE "Vendor"."{name}" ({columns})')
    factories.sql(started, f'INSERT INTO "Vendor"."{name}" VALUES {BAR[:-1]}, \'n\')')
    source = register_source("VendorBars", f"Vendor.{ODD}", cadence="1440m")  # 1440 minutes are a day: one spelling is kept
    assert (source.uid, source.kind) == (storage_uid("VendorBars"), "prices")
    assert (source.table, source.cadence, source.time_label) == (f"Vendor.{ODD}", "1d", "close")
    assert source.columns["Close"] == "numeric(18,6)"
    assert source.numeric == ["Close"]
    assert source.readable
    with transaction(started) as connection:
        bars = read_prices(connection, source, "Close", ["A"], None, factories.instant("2024-01-03"))
    assert bars["A"].values.tolist() == [1.5]


def test_a_view_is_a_source(bars):
    """Breaks: people whose tables are shaped otherwise have no way in."""
    factories.sql(bars, "CREATE VIEW tidy AS SELECT asset_identifier, time_index, close * 2 AS close FROM bars")
    assert register_source("Tidy", "tidy", cadence="1h").cadence == "1h"
    assert "it is no plain table" in hints(bars, get_source("Tidy"))[0]


def test_again_writes_nothing_and_a_change_is_a_conflict(bars):
    """Breaks: a registration is rewritten each night, or changes in passing what stored portfolios were computed from."""
    factories.sql(bars, f"CREATE TABLE other ({GRAIN})")
    register_source("V", "bars", cadence="1h", description="first")
    before = stored(bars, "V")
    assert register_source("V", "public.bars", cadence="60m").table == "public.bars"  # the same table and cadence, spelled otherwise
    assert stored(bars, "V") == before
    with pytest.raises(SourceConflict) as caught:
        register_source("V", "other", cadence="1d", time_label="session_date")
    differences = "table public.bars, not public.other and cadence 1h, not 1d and time label close, not session_date"
    assert caught.value.facts == {"source": "V", "differences": differences}
    assert stored(bars, "V") == before
    register_source("V", "bars", cadence="1h", description="second")  # text about it is free
    assert factories.sql(bars, f"SELECT description FROM {CATALOGUE} WHERE identifier = 'V'") == [("second",)]
    replaced = register_source("V", "other", cadence="1d", time_label="session_date", replace=True)
    assert (replaced.uid, replaced.table, replaced.cadence, replaced.time_label) == (before[0], "public.other", "1d", "session_date")


def test_the_fingerprint_follows_the_live_columns(bars):
    """Breaks: a table that was altered looks as when it was registered."""
    fingerprints = []
    for statement in ("SELECT 1", "ALTER TABLE bars ADD volume bigint", "ALTER TABLE bars DROP volume"):
        factories.sql(bars, statement)
        register_source("V", "bars")
        fingerprints += factories.sql(bars, f"SELECT schema_fingerprint FROM {CATALOGUE} WHERE identifier = 'V'")
    assert fingerprints[0] == fingerprints[2] != fingerprints[1]


def test_everything_wrong_is_named_at_once(started):
    """Breaks: one problem per attempt, or a table that fails only in the night."""
    factories.sql(started, "CREATE TABLE bad (asset_identifier int, time_index timestamp, close text)")
    with pytest.raises(SourceUnusable) as caught:
        register_source("Bad", "bad", cadence="2d", time_label="later")  # type: ignore[arg-type]
    told = str(caught.value)
    for part in (
        "cadence 2d is longer than 1d",
        "'later' is neither close nor session_date",
        "must be text, not integer",
        "must be timestamp with time zone, not timestamp without time zone",
        "no numeric column",
        "make a view",
    ):
        assert part in told
    assert [s.identifier for s in list_sources()] == ["ExternalPricesTS"]


@pytest.mark.parametrize(
    ("identifier", "table", "options", "told"),
    [
        ("", "bars", {}, "is empty"),
        ("a\nb", "bars", {}, "control character"),
        ("x" * 256, "bars", {}, "256 characters"),
        ("V", "bars\x00", {}, "table .* NUL"),
        ("V", "Bars", {}, "capitals included"),
        ("V", '"bars"', {}, "without quotation marks"),
        ("V", "db.public.bars", {}, "schema.table at most"),
        ("V", "bars; DROP TABLE bars; --", {}, "there is no table"),
        ("V", "bars_pkey", {}, "there is no table"),
        ("V", "bars", {"cadence": "daily"}, "5m, 1h or 1d"),
        ("V", "bars", {"cadence": "9" * 30 + "d"}, "5m, 1h or 1d"),
        ("V", "bars", {"cadence": "1h", "time_label": "session_date"}, "daily bars only"),
        ("V", "bars", {"time_label": "session_date"}, "daily bars only"),
        ("V", "bars", {"description": "\x00"}, "NUL"),
        ("SignalWeightsTS", "bars", {}, "stores its signal_weights there"),
        ("SignalWeightsTS", "bars", {"replace": True}, "stores its signal_weights there"),
        ("InterpolatedPricesTS.0123", "bars", {}, "made by this system"),
        ("V", "msm__signal_weights", {}, "is storage SignalWeightsTS of this system"),
        ("ExternalPricesTS", "bars", {"replace": True}, "register bars under another identifier"),
    ],
)
def test_what_cannot_be_registered(bars, identifier, table, options, told):
    """Breaks: the catalogue points at nothing, at our own results, or our own storages are taken over."""
    before = factories.versions(bars, [CATALOGUE])
    with pytest.raises(MsmError, match=told):
        register_source(identifier, table, **options)
    assert factories.versions(bars, [CATALOGUE]) == before


def test_external_prices_change_their_cadence_only_on_request(started):
    """Breaks: the demo's source turns hourly because somebody registered it again."""
    before = stored(started, "ExternalPricesTS")
    assert register_source("ExternalPricesTS", EXTERNAL).cadence == "1d"
    assert stored(started, "ExternalPricesTS") == before
    with pytest.raises(SourceConflict, match="cadence 1d, not 1h"):
        register_source("ExternalPricesTS", EXTERNAL, cadence="1h")
    assert register_source("ExternalPricesTS", EXTERNAL, cadence="1h", replace=True).cadence == "1h"


def test_a_table_that_this_role_may_not_read(bars):
    """Breaks: a source is registered that every worker fails on; or one such source makes the whole list fail."""
    role = f"poor_{uuid.uuid4().hex[:8]}"
    factories.sql(bars, "CREATE SCHEMA closed")
    factories.sql(bars, f"CREATE TABLE closed.bars ({GRAIN})")
    register_source("Closed", "closed.bars")
    factories.sql(bars, f"CREATE ROLE {role}")
    factories.sql(bars, f"GRANT ALL ON {CATALOGUE} TO {role}")
    try:
        with one_transaction(TimeIndexMetaTable) as connection:
            connection.exec_driver_sql(f"SET LOCAL ROLE {role}")
            for table in ("bars", "closed.bars"):
                with pytest.raises(SourceUnusable, match="may not read it; GRANT"):
                    register_source("Mine", table)
            assert [(s.identifier, s.readable) for s in list_sources()] == [("Closed", False), ("ExternalPricesTS", False)]
    finally:
        factories.sql(bars, f"DROP OWNED BY {role}")
        factories.sql(bars, f"DROP ROLE {role}")


# -- reading ------------------------------------------------------------------------------------------------------------------


def test_all_sources_are_listed_however_many(bars):
    """Breaks: a silent limit - 500, once - hides the last ones."""
    insert = f"INSERT INTO {CATALOGUE} (uid, identifier, physical_table_name, kind, schema_fingerprint) SELECT gen_random_uuid(), "
    factories.sql(bars, f"{insert} 'S' || n, 'bars', 'prices', '' FROM generate_series(1, 600) n")
    factories.sql(bars, f"{insert} 'InterpolatedPricesTS.1', 'gone', 'interpolated_prices', ''")
    sources = {s.identifier: s for s in list_sources()}
    assert len(sources) == 602  # 600, ExternalPricesTS and the interpolated one; no signal weights, no portfolios
    assert sources["S600"].columns == sources["S1"].columns != {}
    assert sources["InterpolatedPricesTS.1"].columns == {}  # which tells that its table does not exist
    with pytest.raises(SourceNotRegistered, match=r"'nowhere' in the catalogue. Known: ExternalPricesTS, .* and 582 more"):
        get_source("nowhere")
    with pytest.raises(SourceNotRegistered):
        get_source("SignalWeightsTS")  # a storage, but no prices


def test_a_source_by_identifier_and_by_uid(bars):
    """Breaks: what a configuration holds (a uid) cannot be looked up."""
    source = register_source("V", "bars")
    assert get_source("V") == get_source(source.uid) == get_source(str(source.uid)) == source
    factories.sql(bars, "DROP TABLE bars")
    assert get_source("V").columns == {}
    assert "does not exist" in hints(bars, source)[0]


def test_hints_and_facts(bars):
    """Breaks: nobody learns why reading is slow and loading impossible, or an estimate passes for a count."""
    source = register_source("V", "bars", description="d")
    create = 'CREATE UNIQUE INDEX ON "public"."bars" (asset_identifier, time_index)'
    for index in ("", "CREATE INDEX ON bars (asset_identifier, time_index)", "CREATE UNIQUE INDEX ON bars (time_index)",
                  "CREATE UNIQUE INDEX ON bars (asset_identifier, time_index, close)",
                  "CREATE UNIQUE INDEX ON bars (asset_identifier, time_index) WHERE close > 0"):  # fmt: skip
        factories.sql(bars, index or "SELECT 1")
        assert create in hints(bars, source)[0]
    factories.sql(bars, f"INSERT INTO bars VALUES {BAR}")
    with transaction(bars) as connection:
        assert source_facts(connection, source)["estimated_rows"] is None  # never analysed
    factories.sql(bars, "CREATE UNIQUE INDEX ON bars (time_index, asset_identifier)")  # either order will do
    factories.sql(bars, "ANALYZE bars")
    with transaction(bars) as connection:
        facts = source_facts(connection, source)
    assert (facts["hints"], facts["estimated_rows"], facts["description"], facts["exists"]) == ([], 1, "d", True)


def test_an_engine_is_needed(engine: Engine, monkeypatch: pytest.MonkeyPatch):
    """Breaks: a list of some other database's sources."""
    calls: list[Callable[[], object]] = [list_sources, lambda: get_source("V"), lambda: register_source("V", "bars")]
    for call in calls:
        with pytest.raises(EngineNotStarted):
            call()
