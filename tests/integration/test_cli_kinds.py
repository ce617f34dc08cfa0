"""`msm-ray kinds`: what may be named by `kind`, and the parameters of one, read off the classes."""

import json
import sys
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import Annotated, Any, Literal
from uuid import UUID

import pytest
from pydantic import BaseModel, Field, PositiveInt, StringConstraints

from msm_core.identity import Spec
from msm_core.rebalance_strategy import REBALANCE_STRATEGIES, RebalanceStrategy
from msm_core.signals import SIGNALS
from msm_core.signals.equal_weights import EqualWeights
from msm_ray import cli, cli_kinds

Kinds = Callable[..., tuple[int, str, str]]


@pytest.fixture
def kinds(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Kinds:
    """Runs `msm-ray kinds ...`, without any database; exit code, stdout, stderr."""
    monkeypatch.setenv("MSM_DATABASE_URL", "postgresql://nobody@127.0.0.1:1/nothing")

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["msm-ray", "kinds", *arguments])
        code = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return run


class Colour(StrEnum):
    RED = "red"
    BLUE = "blue"


class Inner(Spec):
    """Settings within settings."""

    kind: Literal["inner"] = "inner"
    share: float = Field(default=0.5, gt=0, lt=1, description="part of it")
    needed: int = Field(description="has to be said")


class Pair(BaseModel):
    code: Annotated[str, StringConstraints(min_length=1, max_length=3)] | None
    factor: float = 1.0


class Everything(EqualWeights):
    """One field of every sort.

    A second paragraph.
    """

    kind: Literal["everything"] = "everything"
    whole: int = Field(ge=1, le=250, description="a number of things")
    wait: timedelta = Field(default=timedelta(hours=36), gt=timedelta(0))
    maybe: PositiveInt | None = None
    switch: bool = True
    colour: Colour = Colour.BLUE
    choice: Literal["a", "b"] = "a"
    since: datetime = datetime(1970, 1, 1, tzinfo=UTC)
    names: tuple[str, ...] = Field(default=(), max_length=12)
    point: tuple[float, int] = (0.0, 1)
    table: dict[str, float] = {}
    source: UUID | None = None
    either: int | str = 3
    even: int = Field(default=2, multiple_of=2)
    code: str = Field(default="x", pattern="^x+$", min_length=1)
    inner: Inner = Inner(share=0.25, needed=7)
    other_inner: Inner | None = None
    pairs: tuple[Pair, ...] = ()


def test_all_kinds_with_their_family_summary_and_origin(kinds: Kinds):
    code, printed, _ = kinds("--output", "json")
    listed = {(k["family"], k["kind"]): k for k in json.loads(printed)["kinds"]}
    assert code == 0
    assert {kind for family, kind in listed if family == "signal"} == set(SIGNALS.classes)
    assert {kind for family, kind in listed if family == "rebalance strategy"} == set(REBALANCE_STRATEGIES.classes)
    assert listed["signal", "equal_weights"] == {
        "family": "signal",
        "kind": "equal_weights",
        "summary": "1 / N for each of the N assets of a universe.",
        "origin": "built in",
    }
    code, table, _ = kinds()
    row = next(line for line in table.splitlines() if " equal_weights " in line)
    assert (code, [cell.strip() for cell in row.strip("│").split("│")]) == (0, [str(v) for v in listed["signal", "equal_weights"].values()])


def test_every_built_in_kind_says_what_it_does_and_can_be_shown(kinds: Kinds):
    for family in (SIGNALS, REBALANCE_STRATEGIES):
        for kind in family.classes:
            code, printed, _ = kinds(kind, "-o", "json")
            shown = json.loads(printed)
            assert (code, shown["family"], shown["kind"], bool(shown["summary"])) == (0, family.family, kind, True)
            described = [p for p in shown["parameters"] if "." not in p["name"]]
            assert {p["name"] for p in described} == set(shown["schema"]["properties"]) - {"kind"}
            assert {p["name"] for p in described if p["required"]} == set(shown["schema"].get("required", ())) - {"kind"}
            assert kinds(kind)[0] == 0


def rows(table: str) -> dict[str, list[str]]:
    """Rows of a printed table by their first cell; a folded row is put together."""
    found: dict[str, list[str]] = {}
    name = ""
    for line in table.splitlines():
        if line.startswith("│"):
            cells = [cell.strip() for cell in line.strip("│").split("│")]
            name = cells[0] or name
            before = found.get(name)
            found[name] = [f"{a} {b}".strip() for a, b in zip(before, cells, strict=True)] if before and not cells[0] else cells
    return found


def test_parameters_in_plain_words(kinds: Kinds, monkeypatch: pytest.MonkeyPatch):
    """Each row: name, type, default, bounds, meaning; written down from the class above by hand."""
    monkeypatch.setitem(SIGNALS.classes, "everything", Everything)
    code, printed, _ = kinds("everything")
    assert code == 0
    assert printed.startswith("everything: signal, built in\n\nOne field of every sort.\n\nA second paragraph.\n")
    found = rows(printed)
    expected: Sequence[Sequence[str]] = [
        ["whole", "whole number", "required", "1 to 250", "a number of things"],
        [
            "asset_list (or universe)",
            "list of text",
            "required",
            "at least 1 member",
            "assets that get 1 / N each; universe: a name of the universes section",
        ],
        ["wait", "duration, such as 5d or 12h", "36h", "above 0d"],
        ["maybe", "whole number or none", "none", "above 0"],
        ["switch", "true or false", "true", ""],
        ["colour", "red | blue", "blue", ""],
        ["choice", "a | b", "a", ""],
        ["since", "time with offset", "1970-01-01T00:00:00Z", ""],
        ["names", "list of text", "none", "at most 12 members"],
        ["point", "list of 2: number, whole number", "[0.0, 1]", ""],
        ["table", "mapping of text to number", "none", ""],
        ["source", "uid or none", "none", ""],
        ["either", "whole number or text", "3", ""],
        ["even", "whole number", "2", "a multiple of 2"],
        ["code", "text", "x", "at least 1 character, matches ^x+$"],
        ["inner", "settings", "as below", ""],
        ["inner.share", "number", "0.25", "above 0, below 1", "part of it"],
        ["inner.needed", "whole number", "7", "", "has to be said"],
        ["other_inner", "settings or none", "none", ""],
        ["other_inner.share", "number", "0.5", "above 0, below 1", "part of it"],
        ["other_inner.needed", "whole number", "required", "", "has to be said"],
        ["pairs", "list of settings", "none", ""],
        ["pairs[].code", "text or none", "required", "1 to 3 characters"],
        ["pairs[].factor", "number", "1.0", ""],
    ]
    for row in expected:
        assert found[row[0]][: len(row)] == list(row)
    names = [name for name in found if name in {row[0] for row in expected}]
    assert names == [row[0] for row in expected]  # required ones first, and those of the class itself before
    assert list(found).index("pairs[].factor") < list(found).index("override_asset")  # those of its bases
    assert "kind" not in found


def test_parameters_as_json(kinds: Kinds, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(SIGNALS.classes, "everything", Everything)
    shown = json.loads(kinds("everything", "-o", "json")[1])
    assert {"family", "kind", "summary", "origin", "parameters", "schema"} <= shown.keys()
    found = {p["name"]: p for p in shown["parameters"]}
    assert found["wait"] == {
        "name": "wait",
        "type": "duration, such as 5d or 12h",
        "required": False,
        "default": "36h",
        "bounds": "above 0d",
        "description": "",
        "shorthand": None,
    }
    assert (found["asset_list"]["shorthand"], found["names"]["default"], found["inner"]["default"]["needed"]) == ("universe", [], 7)
    assert shown["schema"]["properties"]["whole"] == {
        "description": "a number of things", "maximum": 250, "minimum": 1, "title": "Whole", "type": "integer"
    }  # fmt: skip


def test_a_name_of_both_families_is_shown_for_both(kinds: Kinds, monkeypatch: pytest.MonkeyPatch):
    class Namesake(RebalanceStrategy):
        """Has the name of a signal."""

        kind: Literal["equal_weights"] = "equal_weights"

    monkeypatch.setitem(REBALANCE_STRATEGIES.classes, "equal_weights", Namesake)
    code, printed, _ = kinds("equal_weights")
    assert code == 0
    assert "equal_weights: signal, built in" in printed
    assert "equal_weights: rebalance strategy, built in" in printed
    both = json.loads(kinds("equal_weights", "-o", "json")[1])["kinds"]
    assert [facts["family"] for facts in both] == ["signal", "rebalance strategy"]


def test_an_unknown_name_is_refused_with_what_is_close_to_it(kinds: Kinds):
    code, printed, told = kinds("equal_wieghts")
    assert (code, printed) == (2, "")
    assert told.startswith("error: no kind is called 'equal_wieghts' - did you mean 'equal_weights'?")
    code, printed, _ = kinds("no_such_kind", "-o", "json")
    error: Any = json.loads(printed)["error"]
    assert (code, error["reason"]) == (2, "configuration_error")
    assert "immediate_signal" in error["message"]  # nothing is close: what there is


def test_help_teaches(kinds: Kinds):
    code, printed, _ = kinds("--help")
    assert code == 0
    assert "Example: msm-ray kinds equal_weights" in printed


@pytest.mark.parametrize(
    ("duration", "text"),
    [(timedelta(days=5), "5d"), (timedelta(hours=36), "36h"), (timedelta(minutes=90), "90m"), (timedelta(seconds=61), "61s")],
)
def test_durations_are_shown_as_a_fleet_file_takes_them(duration, text):
    assert cli_kinds._duration(duration) == text
