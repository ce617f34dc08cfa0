"""Bars are read once in a run by each process, and what is kept is what would be read."""

from datetime import datetime
from typing import Any

import numpy as np
import pytest

from msm_core.data_nodes import kept_prices
from msm_core.data_nodes.kept_prices import KeptPrices
from msm_core.database import transaction
from msm_core.frames import Series
from msm_core.sources import Source, find_sources, read_prices
from tests import factories, mixed

NIGHT = factories.instant("2030-01-01")


@pytest.fixture
def days(engine):
    return mixed.open_market(engine, count=12).index


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[str], Any]]:
    """(assets, since) of each statement that is sent."""
    sent: list[tuple[list[str], Any]] = []

    def read(connection: Any, source: Source, column: str, assets: Any, since: Any, *rest: Any) -> dict[str, Series]:
        sent.append((list(assets), since))
        return read_prices(connection, source, column, assets, since, *rest)

    monkeypatch.setattr(kept_prices, "read_prices", read)
    return sent


class Reader:
    """One connection, one source; `ask` compares every answer with what the database says."""

    def __init__(self, connection: Any, kept: KeptPrices) -> None:
        self.connection, self.kept = connection, kept
        (self.source,) = find_sources(connection, ["ExternalPricesTS"])

    def ask(self, assets: str, since: datetime | None = None, world: str | None = "run 1", column: str = "close") -> None:
        names = [f"a{letter}" for letter in assets]
        found = self.kept.read(world, self.connection, self.source, column, names, since, NIGHT)
        expected = read_prices(self.connection, self.source, column, names, since, NIGHT)
        assert list(found) == list(expected)
        assert since is not None or set(expected) == set(names) - {"aZ"}
        for asset, bars in expected.items():
            for ours, theirs in zip(vars(found[asset]).values(), vars(bars).values(), strict=True):
                assert (ours is None) == (theirs is None)
                assert ours is None or ours.tobytes() == theirs.tobytes()


@pytest.fixture
def reader(engine):
    with transaction(engine, read_only=True) as connection:
        yield Reader(connection, KeptPrices())


def test_each_asset_is_read_once_in_a_run(days, reader, reads):
    reader.ask("012")
    reader.ask("123")
    reader.ask("30")
    assert [assets for assets, _ in reads] == [["a0", "a1", "a2"], ["a3"]]


def test_an_asset_without_bars_is_not_asked_for_again(days, reader, reads):
    reader.ask("0Z")
    reader.ask("Z0")
    assert len(reads) == 1


def test_what_begins_later_is_cut_from_what_is_kept_and_what_begins_earlier_is_read(days, reader, reads):
    fifth, eighth, after = days[5].to_pydatetime(), days[8].to_pydatetime(), factories.instant("2029-01-01")
    reader.ask("01", fifth)
    reader.ask("0", eighth)
    reader.ask("0", after)  # no bar of it: absent, as from the database
    reader.ask("012", days[2].to_pydatetime())
    reader.ask("01", fifth)
    assert [assets for assets, _ in reads] == [["a0", "a1"], ["a0", "a1", "a2"]]
    reader.ask("0")  # from the beginning
    assert reads[-1] == (["a0"], None)


def test_another_run_another_column_and_no_run_at_all_are_read_anew(days, reader, reads):
    reader.ask("0")
    reader.ask("0", column="volume")
    reader.ask("0", world="run 2")
    reader.ask("0", world="run 1")  # only one run is kept
    assert len(reads) == 4
    reader.ask("0", world=None)
    reader.ask("0", world=None)
    assert len(reads) == 6


def test_memory_is_bounded(days, reader, reads, monkeypatch):
    bars = 24 * 12  # 12 bars of 8 bytes, three times
    monkeypatch.setattr(kept_prices, "KEPT_BYTES_MAX", 3 * bars)
    reader.ask("01")
    reader.ask("12")  # a third fits
    assert reader.kept.size_bytes == 3 * bars
    reader.ask("23")  # a fourth does not: it takes the place of all others
    assert reader.kept.size_bytes == bars
    reader.ask("01234")
    assert reader.kept.size_bytes <= 3 * bars
    assert [assets for assets, _ in reads] == [["a0", "a1"], ["a2"], ["a3"], ["a0", "a1", "a2", "a4"]]


def test_what_is_kept_cannot_be_changed_by_who_is_given_it(days, reader):
    """A view of the numbers of all; nobody writes into one."""
    reader.ask("0", days[3].to_pydatetime())
    first = reader.kept.read("run 1", reader.connection, reader.source, "close", ["a0"], days[6].to_pydatetime(), NIGHT)["a0"]
    with pytest.raises(ValueError, match="read-only"):
        first.values[0] = np.nan
