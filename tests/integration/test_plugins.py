"""R96: a package adds a signal and a rebalance strategy by entry points alone, and a broken one harms nobody.

The example is really installed: its wheel is built, and unpacked where a new process finds it, which is what installing a pure wheel does.
"""

import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from datetime import UTC
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from sqlalchemy import Engine, text

import msm_core
from msm_core.api import Asset, Calendar, CalendarDate, CalendarSession
from msm_core.data_nodes.prices import publish_prices
from tests import factories

ROOT = Path(__file__).parents[2]
PLUGIN = ROOT / "examples" / "plugin"
SIGNAL_GROUP, STRATEGY_GROUP = "msm_core.signals", "msm_core.rebalance_strategies"
FLEET = """
version: 1
prices: { daily: { source: ExternalPricesTS } }
defaults: { prices: daily }
portfolios:
  - id: cheap
    signal:
      kind: acme_low_price
      asset_list: [A, B, C]
      calendar_key: XNYS
      price_source: { kind: api_data_node, time_index_meta_table_uid: 00000000-0000-0000-0000-000000000001 }
      count: 2
    rebalance: { kind: acme_weekday, calendar_key: XNYS, weekday: wednesday }
"""
Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example's wheel, built without a network."""
    folder = tmp_path_factory.mktemp("wheel")
    built = subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)], cwd=PLUGIN, capture_output=True, text=True
    )
    assert built.returncode == 0, built.stderr
    (found,) = folder.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def site(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of installed packages: the example, and nothing else."""
    folder = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Runs Python in a new process that finds what is installed in some folders; it has no database."""

    def python(*arguments: str, sites: tuple[Path, ...] = (), **environment: str) -> "subprocess.CompletedProcess[str]":
        given = {name: value for name, value in os.environ.items() if not name.startswith(("MSM_", "PG"))}
        given |= {"PYTHONPATH": os.pathsep.join(map(str, (*sites, ROOT))), "MSM_HOME": str(tmp_path / "home"), **environment}
        return subprocess.run([sys.executable, *arguments], cwd=tmp_path, env=given, capture_output=True, text=True, timeout=120)

    return python


def install(site: Path, distribution: str, version: str, group: str, points: dict[str, str], **modules: str) -> Path:
    """A distribution as pip leaves it: modules, and their metadata."""
    info = site / f"{distribution.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n")
    (info / "entry_points.txt").write_text("\n".join([f"[{group}]", *(f"{kind} = {value}" for kind, value in points.items())]) + "\n")
    for name, code in modules.items():
        (site / f"{name}.py").write_text(code)
    return site


BROKEN = '''
from typing import Literal
import numpy as np
from msm_core.identity import Spec
from msm_core.signals.equal_weights import EqualWeights

class Good(EqualWeights):
    """Works."""
    kind: Literal["bad_but_good"] = "bad_but_good"

class Stranger(Spec):
    kind: Literal["bad_stranger"] = "bad_stranger"

class Misnamed(EqualWeights):
    kind: Literal["other_name"] = "other_name"

class Nameless(EqualWeights):
    kind: str = "bad_nameless"

class Taken(EqualWeights):
    kind: Literal["equal_weights"] = "equal_weights"

class Opaque(EqualWeights):
    model_config = {"arbitrary_types_allowed": True}
    kind: Literal["bad_opaque"] = "bad_opaque"
    table: np.ndarray

number = 3
'''
BROKEN_POINTS = {
    "bad_but_good": "bad_msm:Good",
    "bad_stranger": "bad_msm:Stranger",
    "bad_misnamed": "bad_msm:Misnamed",
    "bad_nameless": "bad_msm:Nameless",
    "equal_weights": "bad_msm:Taken",
    "bad_opaque": "bad_msm:Opaque",
    "bad_number": "bad_msm:number",
    "bad_absent": "bad_msm:Absent",
    "bad_import": "bad_import_msm:Signal",
    "bad_exit": "bad_exit_msm:Signal",
    "bad_value": "this is no path",
    "twice": "bad_msm:Good",
}
WHY = {  # kind -> what is said about it
    "bad_stranger": "bad_msm:Stranger is no subclass of Signal",
    "bad_misnamed": "bad_msm:Misnamed lacks the field kind: Literal['bad_misnamed'] = 'bad_misnamed'",
    "bad_nameless": "bad_msm:Nameless lacks the field kind: Literal['bad_nameless'] = 'bad_nameless'",
    "equal_weights": "the kind is there already",
    "bad_opaque": "the fields of bad_msm:Opaque are no JSON (PydanticInvalidForJsonSchema: ",
    "bad_number": "bad_msm:number is no subclass of Signal",
    "bad_absent": "bad_msm:Absent cannot be imported (AttributeError: module 'bad_msm' has no attribute 'Absent')",
    "bad_import": "bad_import_msm:Signal cannot be imported (ModuleNotFoundError: No module named 'no_such_module_of_msm')",
    "bad_exit": "bad_exit_msm:Signal cannot be imported (SystemExit: 7)",
    "bad_value": "this is no path cannot be imported (",
    "twice": "the kind is declared more than once",
}


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A distribution of which one class can be used, and a rival of one of its kinds."""
    site = tmp_path_factory.mktemp("broken")
    modules = {"bad_msm": BROKEN, "bad_import_msm": "import no_such_module_of_msm", "bad_exit_msm": "raise SystemExit(7)"}
    install(site, "bad-msm", "2.5", SIGNAL_GROUP, BROKEN_POINTS, **modules)
    return install(site, "rival", "1.0", SIGNAL_GROUP, {"twice": "bad_msm:Good"})


def told(done: "subprocess.CompletedProcess[str]") -> Any:
    """The JSON on stdout of what succeeded."""
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


# -- a plugin that is as it should be -----------------------------------------------------------------------------------------


def test_a_plugin_adds_a_signal_and_a_strategy_without_a_change_of_the_core(run: Run, site: Path):  # R96
    """Breaks: a kind of one's own needs an edit in msm_core."""
    listed = told(run("-m", "msm_ray.cli", "kinds", "--output", "json", sites=(site,)))
    origins = {(k["family"], k["kind"]): k["origin"] for k in listed["kinds"]}
    assert origins[("signal", "acme_low_price")] == origins[("rebalance strategy", "acme_weekday")] == "acme-msm 0.1"
    assert origins[("signal", "equal_weights")] == "built in"
    assert listed["left_out"] == []
    table = run("-m", "msm_ray.cli", "kinds", sites=(site,))
    line = next(line for line in table.stdout.splitlines() if "acme_low_price" in line)
    assert "acme-msm 0.1" in line
    assert "The cheapest assets of a universe by their newest price, in equal parts." in line
    assert table.stderr == ""
    assert "acme" not in run("-m", "msm_ray.cli", "kinds").stdout  # not installed, not there


def test_its_parameters_are_shown(run: Run, site: Path):  # R96
    shown = run("-m", "msm_ray.cli", "kinds", "acme_low_price", sites=(site,)).stdout
    assert "acme_low_price: signal, acme-msm 0.1" in shown
    row = next(line for line in shown.splitlines() if "how many assets are held" in line)
    assert [cell.strip() for cell in row.strip("│").split("│")] == ["count", "whole number", "3", "1 to 10000", "how many assets are held"]
    strategy = told(run("-m", "msm_ray.cli", "kinds", "acme_weekday", "-o", "json", sites=(site,)))
    weekday = next(p for p in strategy["parameters"] if p["name"] == "weekday")
    assert weekday["type"] == "monday | tuesday | wednesday | thursday | friday | saturday | sunday"
    assert weekday["required"] is True
    assert strategy["schema"]["properties"]["weekday"]["enum"][0] == "monday"


def test_a_fleet_file_names_its_kinds_and_the_uid_is_the_same_in_every_process(run: Run, site: Path, tmp_path: Path):  # R96, R5
    """Breaks: a plugin's specs have an identity that depends on the process."""
    (tmp_path / "fleet.yaml").write_text(FLEET)
    verb = ("-m", "msm_ray.cli", "validate", "-f", "fleet.yaml", "-o", "json")
    first, second = (told(run(*verb, sites=(site,), PYTHONHASHSEED=seed)) for seed in ("1", "2"))
    assert first == second
    assert first["portfolios"] == 1
    (tmp_path / "fleet.yaml").write_text(FLEET.replace("count: 2", "count: 1"))
    assert told(run(*verb, sites=(site,)))["configuration_hashes"] != first["configuration_hashes"]
    (tmp_path / "fleet.yaml").write_text(FLEET.replace("count: 2", "coumt: 2"))
    mistaken = run(*verb, sites=(site,))
    assert (mistaken.returncode, "did you mean 'count'?" in mistaken.stderr) == (2, True)


def test_what_its_readme_shows_is_valid(run: Run, site: Path, tmp_path: Path):
    shown = [line.removeprefix("    ") for line in (PLUGIN / "README.md").read_text().splitlines() if line.startswith("    ")]
    specs = [line for line in shown if line.startswith(("signals:", "rebalance:"))]
    assert len(specs) == 2
    entry = "portfolios: [{ id: p, prices: daily, signal: cheap, rebalance: wednesdays }]"
    fleet = "\n".join(["version: 1", "prices: { daily: { source: ExternalPricesTS } }", *specs, entry])
    (tmp_path / "fleet.yaml").write_text(fleet)
    assert told(run("-m", "msm_ray.cli", "validate", "-f", "fleet.yaml", "-o", "json", sites=(site,)))["portfolios"] == 1


COMPUTED = """
version: 1
calendars: { UTC247: { pandas_calendar: "24/7", valid_from: 2024-01-01, valid_to: 2024-12-31 } }
prices: { daily: { source: ExternalPricesTS } }
portfolios:
  - id: cheap
    prices: daily
    signal: { kind: acme_low_price, asset_list: [A, B, C, D, E, F, G, H, I], calendar_key: UTC247, price_source: daily, count: 2 }
    rebalance: { kind: acme_weekday, calendar_key: UTC247, weekday: wednesday }
"""


def test_a_portfolio_of_its_kinds_is_computed(run: Run, site: Path, engine: Engine, tmp_path: Path):  # R96
    """Bars at 00:00Z close the session before. A to I cost 10 to 18; A doubles in the session of Wednesday 2024-01-10.

    Wednesday 3rd: A and B are cheapest, half each. Wednesday 10th: V doubles by half, B and C are cheapest.
    """
    msm_core.start_engine(models=[Asset, Calendar, CalendarDate, CalendarSession])
    Asset.upsert_many([{"unique_identifier": a} for a in "ABCDEFGHI"])
    times = pd.date_range("2024-01-02", "2024-01-15", tz="UTC")
    wide = pd.DataFrame({a: 10.0 + i for i, a in enumerate("ABCDEFGHI")}, index=times)
    wide.loc["2024-01-11":, "A"] = 20.0
    publish_prices(engine, wide.rename_axis("time_index").reset_index().melt("time_index", var_name="asset_identifier", value_name="close"))
    (tmp_path / "fleet.yaml").write_text(COMPUTED)
    verbs = (("prepare", "-f", "fleet.yaml"), ("run", "--executor", "local", "--as-of", "2024-01-15", "-o", "json"))
    for verb in verbs:
        done = run("-m", "msm_ray.cli", *verb, sites=(site,), MSM_DATABASE_URL=os.environ["MSM_DATABASE_URL"])
        assert done.returncode == 0, done.stderr
    closes = factories.values(engine, "cheap")["close"]
    # bought for a fee of 1.8 bps; 0.5 * 2 + 0.5 = 1.5 on the 10th, when A 2/3, B 1/3 becomes B 1/2, C 1/2: turnover 2/3 + 1/6 + 1/2
    assert closes.iloc[0] == pytest.approx(1 - 0.00018, rel=1e-15)
    assert closes.iloc[-1] == pytest.approx((1 - 0.00018) * 1.5 * (1 - 0.00018 * 4 / 3), rel=1e-14)
    with engine.connect() as connection:
        rows = connection.execute(text("SELECT time_index, asset_identifier, weight FROM msm__portfolio_weights ORDER BY 1, 2")).all()
    assert [(f"{time.astimezone(UTC):%m-%d}", asset, weight) for time, asset, weight in rows] == [
        *[("01-04", "A", 0.5), ("01-04", "B", 0.5)],
        *[("01-11", "A", 0.0), ("01-11", "B", 0.5), ("01-11", "C", 0.5)],
    ]


def test_without_the_plugin_the_same_file_is_refused_by_name(run: Run, tmp_path: Path):  # R96
    (tmp_path / "fleet.yaml").write_text(FLEET)
    refused = run("-m", "msm_ray.cli", "validate", "-f", "fleet.yaml")
    assert refused.returncode == 2
    assert 'fleet.yaml:8: portfolios[0].signal.kind: unknown kind "acme_low_price"; known kinds: ' in refused.stderr
    assert 'unknown kind "acme_weekday"; known kinds: ' in refused.stderr


def test_editors_are_offered_its_kinds(run: Run, site: Path):
    schema = told(run("-m", "msm_ray.cli", "schema", sites=(site,)))
    for section, kind in (("signals", "acme_low_price"), ("rebalance", "acme_weekday")):
        offered = schema["properties"][section]["additionalProperties"]["anyOf"]
        specs = [schema["$defs"][option["$ref"].removeprefix("#/$defs/")] if "$ref" in option else option for option in offered]
        assert kind in {spec["properties"]["kind"]["const"] for spec in specs}


VERSIONS = "from msm_core.plugins import plugin_versions; print(plugin_versions())"


def test_workers_and_drivers_can_compare_their_plugins(run: Run, site: Path, broken: Path):
    """Only plugins that brought a kind count: bad-msm did, with one of its classes; its rival did not."""
    assert run("-c", VERSIONS).stdout == "\n"
    assert run("-c", VERSIONS, sites=(site,)).stdout == "acme-msm 0.1\n"
    assert run("-c", VERSIONS, sites=(site, broken)).stdout.splitlines()[-1] == "acme-msm 0.1, bad-msm 2.5"


def test_nothing_is_imported_before_it_is_asked_for(run: Run, site: Path, broken: Path):
    """Breaks: whoever uses what is built in pays for every plugin, or hears of those that are broken."""
    code = """
import sys
import msm_ray.cli
from msm_core.signals import SIGNALS
loaded = lambda: sorted({"acme_msm", "bad_msm", "bad_import_msm"} & set(sys.modules))
SIGNALS.parse({"kind": "equal_weights", "asset_list": ["A"]})
assert "fixed_weights" in SIGNALS.classes
print(loaded())
SIGNALS.classes["acme_low_price"]
print(loaded())
"""
    done = run("-c", code, sites=(site, broken))
    assert (done.stdout, done.stderr) == ("[]\n['acme_msm']\n", "")


def test_many_threads_that_ask_at_once_get_one_class(run: Run, site: Path):
    code = """
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from msm_core.signals import SIGNALS
barrier = Barrier(16)
def ask(i):
    barrier.wait()
    return len(SIGNALS.classes) if i % 2 else SIGNALS.classes["acme_low_price"]
with ThreadPoolExecutor(16) as pool:
    found = list(pool.map(ask, range(16)))
print(len(set(found[::2])), len(set(found[1::2])))
"""
    assert run("-c", code, sites=(site,)).stdout == "1 1\n"


# -- the numbers of the example -----------------------------------------------------------------------------------------------


@pytest.fixture
def acme(site: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.syspath_prepend(str(site))
    import acme_msm  # pyright: ignore[reportMissingImports]

    yield acme_msm
    del sys.modules["acme_msm"]


def test_low_price_holds_the_cheapest_in_equal_parts(acme: Any):
    """Nine assets, three vectors of a window of one close."""
    nan = np.nan
    closes = [
        [9.0, 8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0],  # the three last: 1, 2, 3
        [2.0, 5.0, 2.0, 5.0, 2.0, 5.0, 2.0, 5.0, nan],  # 2 is there four times: the first three of them
        [nan, nan, 4.0, nan, nan, 6.0, nan, nan, nan],  # two have a price: half each
        [nan] * 9,  # nothing is known: cash
    ]
    source = {"kind": "api_data_node", "time_index_meta_table_uid": "00000000-0000-0000-0000-000000000001"}
    import msm_core.data_nodes.prices  # noqa: F401 - it registers that kind of source

    signal = acme.LowPrice(asset_list=tuple("ABCDEFGHI"), calendar_key="XNYS", price_source=source)
    weights = signal.target_weights({"prices": np.array(closes)[:, :, None]})
    third = 1.0 / 3.0
    many = acme.LowPrice(asset_list=[f"{i:02}" for i in range(60)], calendar_key="XNYS", price_source=source)
    by_turns = many.target_weights({"prices": np.tile([2.0, 1.0], 30)[None, :, None]})  # 2, 1, 2, 1, ...: the first three of 30 ones
    assert by_turns.tolist() == [[0, third, 0, third, 0, third] + [0] * 54]
    assert weights.tolist() == [
        [0, 0, 0, 0, 0, 0, third, third, third],
        [third, 0, third, 0, third, 0, 0, 0, 0],
        [0, 0, 0.5, 0, 0, 0.5, 0, 0, 0],
        [0] * 9,
    ]


def test_weekday_decides_on_that_day_whatever_the_calendar_begins_with(acme: Any):
    """2024-01-03, 10 and 17 were Wednesdays; on the 10th there is no valid target."""
    from msm_core.sessions import Sessions

    for first in ("2024-01-01", "2024-01-02"):  # a calendar that was extended at its beginning
        days = np.arange(np.datetime64(first), np.datetime64("2024-01-19"))
        midnights = days.astype("datetime64[us]")
        sessions = Sessions("24/7", days, midnights, midnights + np.timedelta64(24, "h"), days[0], days[-1])
        target = np.where(days == np.datetime64("2024-01-10"), -1, 0)
        decided = acme.Weekday(calendar_key="24/7", weekday="wednesday").decisions(sessions, target, target < 0, len(days) - 1)
        assert days[decided].astype(str).tolist() == ["2024-01-03", "2024-01-17"]


# -- plugins that are not as they should be -----------------------------------------------------------------------------------


def test_a_broken_plugin_is_left_out_with_its_reason_and_the_rest_works(run: Run, site: Path, broken: Path):  # R96
    """Breaks: one bad package stops a fleet that does not use it, or nobody learns why its kind is missing."""
    done = run("-m", "msm_ray.cli", "kinds", "-o", "json", sites=(site, broken))
    listed = told(done)
    left_out = {row["kind"]: row for row in listed["left_out"]}
    assert left_out.keys() == WHY.keys()
    for kind, why in WHY.items():
        assert left_out[kind]["why"].startswith(why)
        assert left_out[kind]["plugin"] == ("bad-msm 2.5 and rival 1.0" if kind == "twice" else "bad-msm 2.5")
    origins = {k["kind"]: k["origin"] for k in listed["kinds"]}
    assert (origins["bad_but_good"], origins["acme_low_price"], origins["equal_weights"]) == ("bad-msm 2.5", "acme-msm 0.1", "built in")
    warnings = [line for line in done.stderr.splitlines() if "plugin left out" in line]
    assert len(warnings) == len(done.stderr.splitlines()) == len(WHY)  # one line each


def test_whoever_asks_for_a_kind_that_is_left_out_is_told_why(run: Run, broken: Path):
    code = """
import json, pickle, sys
from msm_core.errors import UnknownKind
from msm_core.signals import SIGNALS
told = {}
for kind in json.loads(sys.argv[1]):
    try:
        SIGNALS.parse({"kind": kind, "asset_list": ["A"]})
    except UnknownKind as error:
        assert str(pickle.loads(pickle.dumps(error))) == str(error)
        assert all(isinstance(fact, str) for fact in error.facts.values())
        told[kind] = str(error)
print(json.dumps(told))
"""
    kinds = [*WHY, "bad_but_good", "nowhere"]
    answers = json.loads(run("-c", code, json.dumps(kinds), sites=(broken,)).stdout.splitlines()[-1])
    assert answers.keys() == WHY.keys() - {"equal_weights"} | {"nowhere"}  # what is built in stays
    for kind in answers.keys() & WHY.keys():
        by = "bad-msm 2.5 and rival 1.0" if kind == "twice" else "bad-msm 2.5"
        assert answers[kind].startswith(f"signal kind '{kind}' is declared by {by}, which is left out: {WHY[kind]}")
    assert answers["nowhere"] == "signal kind 'nowhere' is not registered. Known kinds: " + ", ".join(
        sorted({"bad_but_good", *run("-c", "from msm_core.signals import SIGNALS; print(*SIGNALS.classes)").stdout.split()})
    ) + "."  # fmt: skip
    shown = run("-m", "msm_ray.cli", "kinds", "bad_import", sites=(broken,))
    error = " ".join(shown.stderr[shown.stderr.index("error: ") :].split())  # after the warnings
    assert (shown.returncode, error.startswith("error: signal kind 'bad_import' is declared by bad-msm 2.5")) == (2, True)
    assert WHY["bad_import"] in error


def test_a_plugin_that_registers_by_decorator_too_is_no_rival_of_itself(run: Run, tmp_path: Path):
    module = """
from typing import Literal
from msm_core.signals import SIGNALS
from msm_core.signals.equal_weights import EqualWeights

@SIGNALS.register
class Both(EqualWeights):
    kind: Literal["both"] = "both"

print(sorted(SIGNALS.classes)[:1])  # may look kinds up while it is imported
"""
    site = install(tmp_path / "both", "both", "3", SIGNAL_GROUP, {"both": "both_msm:Both"}, both_msm=module)
    done = run("-c", "from msm_core.signals import SIGNALS; print(SIGNALS.plugins(), SIGNALS.left_out())", sites=(site,))
    assert (done.stdout.splitlines()[-1], done.stderr) == ("{'both': 'both 3'} {}", "")


@pytest.mark.parametrize("metadata", [b"", b"Name: damaged\nVersion: \xff\n"])
def test_damaged_metadata_stop_nobody(run: Run, tmp_path: Path, metadata: bytes):
    site = install(tmp_path / "damaged", "damaged", "1", STRATEGY_GROUP, {"odd": "odd_msm:Odd"}, odd_msm="Odd = 1")
    (next(site.glob("*.dist-info")) / "METADATA").write_bytes(metadata)
    listed = told(run("-m", "msm_ray.cli", "kinds", "-o", "json", sites=(site,)))
    (row,) = listed["left_out"]
    assert (row["kind"], row["why"]) == ("odd", "odd_msm:Odd is no subclass of RebalanceStrategy")
    assert row["plugin"] == "a distribution without name and version"
