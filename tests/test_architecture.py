"""The bans of design.md sections 2 and 8, read off the syntax tree. Every ban is shown to catch a small bad module."""

import ast
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("msm_core", "msm_ray", "migrations", "examples", "jobs")  # benchmarks may drive what they compare with

Ban = Callable[[str, str], list[str]]


def sources() -> dict[str, str]:
    """Path relative to the root -> text."""
    paths = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
    return {path.relative_to(ROOT).as_posix(): path.read_text() for path in paths}


def imports(path: str, text: str) -> Iterator[tuple[int, str]]:
    """(line, absolute module) of every import, wherever it stands; `from a import b` yields `a` and `a.b`."""
    package = path.removesuffix(".py").split("/")[:-1]
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield node.lineno, module
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and name_of(node.func) in ("__import__", "importlib.import_module", "import_module"):
            yield from ((node.lineno, str(a.value)) for a in node.args[:1] if isinstance(a, ast.Constant))


def name_of(node: ast.expr) -> str:
    """`np.add.reduce` of that expression; what is not a name is `?`."""
    if isinstance(node, ast.Attribute):
        return f"{name_of(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else "?"


def imported_from(path: str, text: str, *modules: str) -> list[str]:
    found = {(line, name) for line, name in imports(path, text) for m in modules if name == m or name.startswith(f"{m}.")}
    return [f"{path}:{line} imports {name}" for line, name in sorted(found)]


# -- the bans -----------------------------------------------------------------------------------------------------------------

BASE = ("errors", "identity", "frames", "settings")
PURE_NAMES = (
    *("sessions", "alignment", "price_sources", "cash", "decisions", "valuation", "execution", "construction"),
    *("configuration", "interpolation"),
)
PURE = {f"msm_core/{name}.py" for name in (*BASE, *PURE_NAMES, "services/allocation")}
FAMILIES = ("msm_core/signals/", "msm_core/rebalance_strategy/")


def is_pure(path: str) -> bool:
    return path in PURE or path.startswith(FAMILIES)


def pure_modules_know_no_database_and_no_cluster(path: str, text: str) -> list[str]:
    return imported_from(path, text, "sqlalchemy", "psycopg", "alembic", "ray") if is_pure(path) else []


def pure_modules_import_pure_modules_only(path: str, text: str) -> list[str]:
    if not is_pure(path):
        return []
    allowed = [p.removesuffix(".py").strip("/").replace("/", ".") for p in (*PURE, *FAMILIES)]
    names = {
        name
        for _, name in imports(path, text)
        if name.startswith("msm_core.") and not f"{name}.".startswith(tuple(f"{a}." for a in allowed))
    }
    return imported_from(path, text, *names)


def the_domain_never_imports_the_driver(path: str, text: str) -> list[str]:
    return imported_from(path, text, "msm_ray") if path.startswith("msm_core/") else []


def ray_is_imported_by_executors_and_jobs_only(path: str, text: str) -> list[str]:
    return [] if path == "msm_ray/executors.py" or path.startswith("jobs/") else imported_from(path, text, "ray")


def signals_and_strategies_do_not_know_each_other(path: str, text: str) -> list[str]:
    """Neither family the other; nor one member another: each file stands on its family's base alone."""
    found = []
    for family, other in (FAMILIES, FAMILIES[::-1]):
        if not path.startswith(family):
            continue
        own = family.strip("/").replace("/", ".")
        found += imported_from(path, text, other.strip("/").replace("/", "."))
        if not path.endswith("/__init__.py"):
            bases = tuple(f"{own}.{base}" for base in ("base", "computed"))
            modules = {name for _, name in imports(path, text) if f"{name}.".startswith(tuple(f"{base}." for base in bases))}
            found += [bad for bad in imported_from(path, text, own) if bad.split(" imports ")[1] not in modules]
    return found


PERSISTED_NAMES = ("alignment", "cash", "decisions", "valuation", "execution", "construction", "frames", "interpolation")
PERSISTED = {f"msm_core/{name}.py" for name in PERSISTED_NAMES}
UNORDERED = {
    *("dot", "vdot", "inner", "einsum", "matmul", "tensordot", "reduceat", "bincount", "convolve", "correlate"),
    *("sum", "nansum", "fsum", "mean", "nanmean", "average", "std", "var", "nanstd", "nanvar", "cov", "corr", "corrcoef"),
    *("groupby", "rolling", "ewm", "expanding"),
}
# `begun` is a mask: a count of booleans is an integer, and integers add up in any order
COUNTS = {("msm_core/construction.py", "begun.sum")}


def sums_on_persisted_paths_are_ordered(path: str, text: str) -> list[str]:
    """Everything whose bits depend on shape, memory order or batch: design.md section 8, rules 2 and 4."""
    if path not in PERSISTED and not path.startswith(FAMILIES):
        return []
    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.BinOp | ast.AugAssign) and isinstance(node.op, ast.MatMult):
            found.append(f"{path}:{node.lineno} uses @")
        if isinstance(node, ast.Call) and (path, name_of(node.func)) not in COUNTS:
            parts = name_of(node.func).split(".")
            if parts[-1] in UNORDERED or parts[-2:] == ["add", "reduce"]:
                found.append(f"{path}:{node.lineno} calls {'.'.join(parts)}")
        if isinstance(node, ast.ImportFrom):
            found += [f"{path}:{node.lineno} imports {alias.name}" for alias in node.names if alias.name in UNORDERED]
    return found


CLOCKS = {
    "datetime.now",
    "datetime.utcnow",
    "datetime.today",
    "date.today",
    "time.time",
    "time.time_ns",
    "Timestamp.now",
    "Timestamp.utcnow",
}


def nothing_in_the_domain_reads_the_clock(path: str, text: str) -> list[str]:
    """A run fixes its as-of once; measuring how long something took (time.monotonic) is no clock."""
    if not path.startswith("msm_core/"):
        return []
    called = [(node.lineno, name_of(node.func)) for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call)]
    bad = [f"{path}:{line} calls {name}" for line, name in called if ".".join(name.split(".")[-2:]) in CLOCKS]
    return bad + imported_from(path, text, "time.time", "time.time_ns")


ACCOUNT_SIDE = ("msm_core/services/", "msm_core/models/", "msm_core/api/")
ACCOUNT_NAMES = ("account", "virtualfund", "positionset", "targetpositions", "snapshot")


def construction_never_knows_accounts(path: str, text: str) -> list[str]:
    """What makes portfolios imports nothing of the account side, under whatever name it stands there. R83, R85."""
    makes_portfolios = path.startswith("msm_core/") and not path.startswith(ACCOUNT_SIDE)
    if not makes_portfolios and path not in ("msm_ray/run.py", "msm_ray/flight.py", "msm_ray/plan.py", "msm_ray/ledger.py"):
        return []
    found = imported_from(path, text, "msm_core.services")
    ours = {(line, name) for line, name in imports(path, text) if name.startswith(("msm_core.models.", "msm_core.api."))}
    return found + [f"{path}:{line} imports {name}" for line, name in ours if name.split(".")[-1].lower().startswith(ACCOUNT_NAMES)]


BANS: list[Ban] = [
    pure_modules_know_no_database_and_no_cluster,
    pure_modules_import_pure_modules_only,
    the_domain_never_imports_the_driver,
    ray_is_imported_by_executors_and_jobs_only,
    signals_and_strategies_do_not_know_each_other,
    sums_on_persisted_paths_are_ordered,
    nothing_in_the_domain_reads_the_clock,
    construction_never_knows_accounts,
]


@pytest.mark.parametrize("ban", BANS, ids=lambda ban: ban.__name__)
def test_ban(ban):  # R3
    assert [bad for path, text in sources().items() for bad in ban(path, text)] == []


def test_the_bans_read_the_code_there_is():
    paths = set(sources())
    assert len(paths) > 40
    assert {path for path in paths if is_pure(path)} >= PURE - {"msm_core/interpolation.py"}
    assert {"msm_ray/executors.py", "msm_core/signals/fixed_weights.py", "msm_core/rebalance_strategy/immediate_signal.py"} <= paths


@pytest.mark.parametrize(
    ("ban", "path", "text"),
    [
        (pure_modules_know_no_database_and_no_cluster, "msm_core/valuation.py", "import sqlalchemy"),
        (pure_modules_know_no_database_and_no_cluster, "msm_core/errors.py", "from psycopg import sql"),
        (pure_modules_know_no_database_and_no_cluster, "msm_core/signals/x.py", "def f():\n    import ray.data"),
        (pure_modules_know_no_database_and_no_cluster, "msm_core/interpolation.py", "import importlib\nimportlib.import_module('ray')"),
        (pure_modules_import_pure_modules_only, "msm_core/frames.py", "from msm_core.storage import read_prices"),
        (pure_modules_import_pure_modules_only, "msm_core/rebalance_strategy/x.py", "from .. import database"),
        (pure_modules_import_pure_modules_only, "msm_core/identity.py", "from msm_core import models"),
        (the_domain_never_imports_the_driver, "msm_core/models/x.py", "import msm_ray"),
        (the_domain_never_imports_the_driver, "msm_core/data_nodes/x.py", "if True:\n    from msm_ray.plan import make_plan"),
        (ray_is_imported_by_executors_and_jobs_only, "msm_ray/run.py", "import ray"),
        (ray_is_imported_by_executors_and_jobs_only, "examples/x.py", "from ray import remote"),
        (ray_is_imported_by_executors_and_jobs_only, "msm_core/database.py", "import ray.util as util"),
        (signals_and_strategies_do_not_know_each_other, "msm_core/signals/x.py", "from msm_core.rebalance_strategy import ImmediateSignal"),
        (signals_and_strategies_do_not_know_each_other, "msm_core/rebalance_strategy/x.py", "from msm_core.signals.base import Signal"),
        (signals_and_strategies_do_not_know_each_other, "msm_core/signals/x.py", "from msm_core.signals.equal_weights import EqualWeights"),
        (signals_and_strategies_do_not_know_each_other, "msm_core/signals/x.py", "from msm_core.signals import EqualWeights"),
        (signals_and_strategies_do_not_know_each_other, "msm_core/signals/x.py", "from . import equal_weights"),
        (signals_and_strategies_do_not_know_each_other, "msm_core/signals/__init__.py", "from msm_core import rebalance_strategy"),
        (sums_on_persisted_paths_are_ordered, "msm_core/valuation.py", "a = b @ c"),
        (sums_on_persisted_paths_are_ordered, "msm_core/valuation.py", "a @= c"),
        (sums_on_persisted_paths_are_ordered, "msm_core/valuation.py", "a = (w * r).sum(axis=1)"),
        (sums_on_persisted_paths_are_ordered, "msm_core/valuation.py", "a = begun.sum()"),
        (sums_on_persisted_paths_are_ordered, "msm_core/construction.py", "a = np.sum(begun)"),
        (sums_on_persisted_paths_are_ordered, "msm_core/construction.py", "a = sum(w)"),
        (sums_on_persisted_paths_are_ordered, "msm_core/frames.py", "a = np.add.reduce(w)"),
        (sums_on_persisted_paths_are_ordered, "msm_core/frames.py", "a = np.add.reduceat(w, i)"),
        (sums_on_persisted_paths_are_ordered, "msm_core/signals/x.py", "a = np.einsum('tn,tn->t', w, r)"),
        (sums_on_persisted_paths_are_ordered, "msm_core/signals/x.py", "a = w.dot(r)"),
        (sums_on_persisted_paths_are_ordered, "msm_core/signals/x.py", "from numpy import matmul"),
        (sums_on_persisted_paths_are_ordered, "msm_core/signals/x.py", "a = prices.rolling(20).max()"),
        (sums_on_persisted_paths_are_ordered, "msm_core/signals/x.py", "a = prices.ewm(span=3)"),
        (sums_on_persisted_paths_are_ordered, "msm_core/rebalance_strategy/x.py", "a = np.mean(w)"),
        (sums_on_persisted_paths_are_ordered, "msm_core/interpolation.py", "a = frame.groupby('a')"),
        (nothing_in_the_domain_reads_the_clock, "msm_core/data_nodes/x.py", "from datetime import datetime\ndatetime.now()"),
        (nothing_in_the_domain_reads_the_clock, "msm_core/storage.py", "import datetime as dt\ndt.datetime.utcnow()"),
        (nothing_in_the_domain_reads_the_clock, "msm_core/x.py", "import time\ntime.time()"),
        (nothing_in_the_domain_reads_the_clock, "msm_core/x.py", "from time import time"),
        (nothing_in_the_domain_reads_the_clock, "msm_core/x.py", "pd.Timestamp.now('UTC')"),
        (construction_never_knows_accounts, "msm_core/data_nodes/x.py", "from msm_core.services.reads import read_holdings"),
        (construction_never_knows_accounts, "msm_core/storage.py", "from msm_core.models import VirtualFundHoldingsStorage"),
        (construction_never_knows_accounts, "msm_core/construction.py", "from msm_core.models.accounts import AccountTable"),
        (construction_never_knows_accounts, "msm_ray/run.py", "from msm_core.api import AccountHoldingsSet"),
        (construction_never_knows_accounts, "msm_ray/plan.py", "import msm_core.services.expansion"),
    ],
)
def test_each_ban_catches_a_bad_module(ban, path, text):
    assert len(ban(path, text)) >= 1


@pytest.mark.parametrize(
    ("path", "text"),
    [
        (
            "msm_core/valuation.py",
            "from msm_core.frames import ordered_sum\na = ordered_sum(w * r)\nb = np.cumprod(r)\nsummary = 'a.sum()'",
        ),
        ("msm_core/construction.py", "count = int(begun.sum())\nfrom msm_core.signals import Vectors"),
        ("msm_core/signals/x.py", "from msm_core.signals.base import Signal, Vectors\nfrom msm_core.sessions import Sessions"),
        ("msm_core/rebalance_strategy/x.py", "from msm_core.rebalance_strategy.base import RebalanceStrategy"),
        ("msm_core/storage.py", "import sqlalchemy\nimport time\ntime.monotonic()\ntotal = sum(counts)\nnow = 1"),
        ("msm_ray/executors.py", "import ray"),
        ("jobs/run_fleet.py", "import ray\nfrom msm_ray import run"),
        ("msm_ray/cli.py", "from datetime import datetime\ndatetime.now()"),
        ("msm_core/rayleigh.py", "import array"),
        ("msm_ray/account_fleet.py", "from msm_core.services.account_exposure import AccountExposure"),
        ("msm_core/services/x.py", "from msm_core.models import AccountTable\nfrom msm_core.storage import last_trades"),
    ],
)
def test_no_ban_catches_a_good_module(path, text):
    assert [bad for ban in BANS for bad in ban(path, text)] == []
