"""What a fleet needs in the registry before it can be computed: identities, descriptions, versions - and no history."""

import numpy as np
import pytest
from pydantic import ValidationError

from msm_core.data_nodes.registration import read_configurations
from msm_core.database import transaction
from msm_core.errors import ConfigurationError, IndexTaken
from msm_core.models import MetaTable
from msm_core.verification import verify
from tests import factories
from tests.factories import equal, fixed, portfolio, register, run, schedule

scheduled = factories.scheduled

REGISTRY = {
    "msm__portfolio",
    "msm__portfolio_configuration",
    "msm__signal_metadata",
    "msm__rebalance_strategy_metadata",
    "msm__data_node_update",
}


def stored(engine):
    with engine.connect() as connection:
        return read_configurations(connection).configurations


def versions_of(engine, identifier: str) -> list[tuple]:
    return factories.sql(
        engine,
        "SELECT version, c.configuration_hash, c.signal_uid FROM msm__portfolio_configuration c JOIN msm__portfolio p"
        " ON p.uid = c.portfolio_uid WHERE p.unique_identifier = %s ORDER BY 1",
        (identifier,),
    )


def test_registering_writes_identity_and_progress_rows_only(engine):  # R13, R15, R21, R85
    factories.store_calendar(engine)
    before = factories.versions(engine)
    assert register(engine, [portfolio("p", equal("A", "B")), portfolio("q", equal("A", "B"))]) == 2
    after = factories.versions(engine)
    assert {name for name in after if after[name] != before[name]} == REGISTRY
    counts = {name: count for name, (count, _) in after.items() if name in REGISTRY}
    assert counts == {
        "msm__portfolio": 2,
        "msm__portfolio_configuration": 2,
        "msm__signal_metadata": 1,
        "msm__rebalance_strategy_metadata": 1,
        "msm__data_node_update": 5,  # values and weights of each, and one signal
    }
    progress = factories.progress(engine)
    assert {(row["watermark"], row["epoch"], row["row_count"]) for row in progress.values()} == {(None, 0, 0)}


def test_stored_identities_are_taken_as_stored_and_verify_works_them_out_anew(engine):
    factories.store_calendar(engine)
    configurations = [portfolio("p", equal("A", "B")), portfolio("q", fixed(A=0.5, B=0.5))]
    register(engine, configurations)
    assert [(c.configuration_hash, c.signal_uid) for c in stored(engine)] == [(c.configuration_hash, c.signal_uid) for c in configurations]

    wrong = "0" * 32
    for column in ("configuration_hash", "signal_uid"):
        with transaction(engine, read_only=True) as connection:
            assert verify(connection).violations == ()
        change = f"UPDATE msm__portfolio_configuration SET {column} = %s WHERE {column} = %s"
        right = getattr(configurations[1], column)
        factories.sql(engine, change, (wrong, right))
        assert [getattr(c, column) for c in stored(engine)] == [getattr(configurations[0], column), wrong]
        with transaction(engine, read_only=True) as connection:
            (told,) = verify(connection).violations
        assert told == "Portfolio q: the identity stored with its configuration is not that of its content"
        factories.sql(engine, change, (right, wrong))


def test_registering_again_writes_nothing(engine):  # R11, R12
    factories.store_calendar(engine)
    fleet = [
        portfolio("p", equal("A"), tags=("core", "eu"), description="d", index="I"),
        portfolio("q", schedule(("2024-01-02 21:00Z", {"A": 0.1 + 0.2, "B": 1e-300})), portfolio_name="Q"),
    ]
    assert register(engine, fleet) == 2
    before = factories.versions(engine)
    assert register(engine, fleet) == 0
    assert register(engine, list(reversed(fleet))) == 0
    assert register(engine, []) == 0
    assert factories.versions(engine) == before


def test_a_registered_fleet_leaves_progress_alone(engine):
    factories.open_market(engine, factories.walks("2024-01-02", 5, ["A", "B"]))
    p = portfolio("p", equal("A"))
    run(engine, [p], "2024-12-30")
    before = factories.versions(engine, [factories.PROGRESS, *factories.OUTPUTS])
    register(engine, [p])
    assert factories.versions(engine, [factories.PROGRESS, *factories.OUTPUTS]) == before
    register(engine, [portfolio("p", equal("B"))])  # a change is not applied before it is run
    rows = factories.progress(engine)
    assert rows["PortfoliosTS", "p"]["configuration_hash"] == p.configuration_hash


def test_every_change_is_a_new_version_beside_the_old_ones(engine):
    first, second = portfolio("p", equal("A")), portfolio("p", equal("A", "B"), fee=0.0)
    renamed = portfolio("p", equal("A", "B"), fee=0.0, portfolio_name="two", description="text")
    assert [register(engine, [c]) for c in (first, second, renamed, renamed, first)] == [1, 1, 1, 0, 1]
    assert versions_of(engine, "p") == [
        (1, first.configuration_hash, first.signal_uid),
        (2, second.configuration_hash, second.signal_uid),
        (3, second.configuration_hash, second.signal_uid),  # text only: stored, and the same identity
        (4, first.configuration_hash, first.signal_uid),
    ]
    assert stored(engine) == [first]


def test_what_is_read_back_is_what_was_registered(engine):
    signals = [
        equal("A", "é", "it's", override_asset='"X"'),
        fixed(A=0.1 + 0.2, B=-1e-17, C=5e-324, D=1.7976931348623157e308),
        schedule(("2024-01-02 21:00:00.123456+05:30", {"A": 1 / 3}), fill=None),
    ]
    fleet = [portfolio(f"p {i} 🚀", s, fee=0.1 + 0.02, on="quarter_end", lag=3, tags=("z", "a")) for i, s in enumerate(signals)]
    register(engine, fleet)
    again = stored(engine)
    assert again == fleet
    assert [c.configuration_hash for c in again] == [c.configuration_hash for c in fleet]
    assert [c.signal_uid for c in again] == [c.signal_uid for c in fleet]


def test_a_large_fleet_is_read_whole(engine):
    """The lesson: a registry scan that stops at 500 rows and filters afterwards truncates in silence."""
    fleet = [portfolio(f"p{i:04}", equal("A", f"a{i % 7}")) for i in range(1200)]
    register(engine, fleet[:1])  # the engine's very first connection asks more
    counts = []
    for part in (fleet[:10], fleet):
        with factories.statements() as sent:
            register(engine, part)
        counts.append(len([s for s in sent if s != ";"]))
    assert counts[0] == counts[1]  # R100
    assert [c.identifier for c in stored(engine)] == [c.identifier for c in fleet]


def test_the_calendar_is_linked_when_it_is_stored(engine):  # R20, R24, R26
    uid = factories.store_calendar(engine, key="STORED")
    factories.sql(engine, "UPDATE msm__calendar SET source_identifier = 'SOURCE'")
    fleet = [portfolio(name, equal("A"), calendar=name) for name in ("STORED", "SOURCE", "NYSE")]
    register(engine, fleet)
    linked = dict(factories.sql(engine, "SELECT unique_identifier, calendar_uid FROM msm__portfolio"))
    assert linked == {"STORED": uid, "SOURCE": uid, "NYSE": None}
    factories.store_calendar(engine, key="SECOND")
    factories.sql(engine, "UPDATE msm__calendar SET source_identifier = 'BOTH'")
    register(engine, [portfolio("ambiguous", equal("A"), calendar="BOTH")])
    assert factories.sql(engine, "SELECT calendar_uid FROM msm__portfolio WHERE unique_identifier = 'ambiguous'") == [(None,)]


def test_descriptions_stand_apart(engine):  # R23
    register(
        engine, [portfolio("p", equal("A"), description="long", portfolio_name="short"), portfolio("q", equal("A"), portfolio_name="only")]
    )
    register(engine, [portfolio("r", equal("B"), signal_name="Half of B")])
    texts = dict(factories.sql(engine, "SELECT unique_identifier, description FROM msm__portfolio_metadata"))
    assert texts == {"p": "long", "q": "only"}
    signals = dict(factories.sql(engine, "SELECT signal_uid, signal_description FROM msm__signal_metadata"))
    assert signals[equal("B").uid] == "Half of B"
    assert "1 / N" in signals[equal("A").uid]
    ((strategy,),) = factories.sql(engine, "SELECT configuration_json FROM msm__rebalance_strategy_metadata")
    assert strategy == {"kind": "immediate_signal", "calendar_key": "WEEKDAYS", "rebalance_on": "every_session", "execution_lag": 0}


def test_tags_are_groups(engine):
    register(
        engine, [portfolio("p", equal("A"), tags=("core", "eu")), portfolio("q", equal("A"), tags=("core",)), portfolio("r", equal("A"))]
    )
    query = (
        "SELECT g.unique_identifier, p.unique_identifier FROM msm__portfolio_group_membership m"
        " JOIN msm__portfolio p ON p.uid = m.portfolio_uid JOIN msm__portfolio_group g ON g.uid = m.portfolio_group_uid ORDER BY 1, 2"
    )
    assert factories.sql(engine, query) == [("core", "p"), ("core", "q"), ("eu", "p")]


def test_a_long_price_column_is_not_cut_short(engine):  # R19
    """A name that is stored must be the name of a column: a part of it names nothing."""
    factories.sql(engine, "ALTER TABLE msm__external_prices ADD COLUMN settlement_price_adjusted float8")
    closes = factories.open_market(engine, factories.walks("2024-01-02", 2, ["A"]))
    factories.load_prices(engine, closes, settlement_price_adjusted=closes)
    report = run(engine, [portfolio("p", equal("A"), column="settlement_price_adjusted")], "2024-12-30")
    assert report.exit_code == 0
    assert factories.sql(engine, "SELECT backtest_table_price_column_name FROM msm__portfolio") == [("settlement_price_adjusted",)]


# -- one of each ----------------------------------------------------------------------------------------------------------------------


def test_a_portfolio_given_twice_is_refused(engine):
    before = factories.versions(engine)
    with pytest.raises(ConfigurationError, match="portfolio p is configured twice"):
        register(engine, [portfolio("p", equal("A")), portfolio("q", equal("A")), portfolio("p", equal("B"))])
    assert factories.versions(engine) == before


def test_an_index_has_one_publisher(engine):
    with pytest.raises(IndexTaken, match="index I would be published by both p and q"):
        register(engine, [portfolio("p", equal("A"), index="I"), portfolio("q", equal("A"), index="I")])


def test_an_index_has_one_publisher_across_registrations(engine):
    """Both would move the same progress row: each would take the other's values for its own and replace them."""
    factories.open_market(engine, factories.walks("2024-01-02", 5, ["A", "B"]))
    p, q = portfolio("p", equal("A"), index="I"), portfolio("q", equal("B"), index="I")
    run(engine, [p], "2024-12-30")
    published = "SELECT time_index, close FROM msm__portfolio_index_values ORDER BY 1"
    before = factories.sql(engine, published)
    with pytest.raises(IndexTaken, match="index I would be published by both p and q"):
        register(engine, [q])
    assert factories.sql(engine, published) == before


def test_an_index_may_change_hands(engine):
    register(engine, [portfolio("p", equal("A"), index="I")])
    register(engine, [portfolio("p", equal("A")), portfolio("q", equal("A"), index="I")])
    linked = dict(factories.sql(engine, "SELECT unique_identifier, portfolio_index_uid IS NOT NULL FROM msm__portfolio"))
    assert linked == {"p": False, "q": True}


def test_a_description_of_an_index_is_not_overwritten(engine):
    factories.sql(
        engine,
        "INSERT INTO msm__index (uid, unique_identifier, index_type, display_name) VALUES (gen_random_uuid(), 'I', 'mine', 'My index')",
    )
    register(engine, [portfolio("p", equal("A"), index="I")])
    assert factories.sql(engine, "SELECT index_type, display_name FROM msm__index") == [("mine", "My index")]


# -- identity -------------------------------------------------------------------------------------------------------------------------


def test_identity_holds_what_changes_numbers_and_nothing_else():  # R5
    base = portfolio("p", equal("A", "B"))
    same = [
        portfolio("other name", equal("B", "A")),
        portfolio("p", equal("A", "B"), portfolio_name="n", description="d", tags=("t",), signal_name="s", index="I"),
    ]
    assert {c.configuration_hash for c in same} == {base.configuration_hash}
    different = [
        portfolio("p", equal("A")),
        portfolio("p", fixed(A=0.5, B=0.5)),
        portfolio("p", equal("A", "B", override_asset="A")),
        portfolio("p", equal("A", "B"), fee=0.0),
        portfolio("p", equal("A", "B"), accounting="target"),
        portfolio("p", equal("A", "B"), on="week_end"),
        portfolio("p", equal("A", "B"), lag=1),
        portfolio("p", equal("A", "B"), calendar="NYSE"),
        portfolio("p", equal("A", "B"), column="open"),
        portfolio("p", equal("A", "B"), missing="hold"),
    ]
    hashes = {c.configuration_hash for c in different} | {base.configuration_hash}
    assert len(hashes) == len(different) + 1


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_fee_that_is_no_number_is_refused(value):
    with pytest.raises(ValidationError):
        portfolio("p", equal("A"), fee=value)


def test_every_table_of_the_registry_is_known_to_these_tests():
    assert set(MetaTable.metadata.tables) >= REGISTRY
