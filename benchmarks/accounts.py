"""1 000 accounts with 50 portfolio targets each, expanded through 500 portfolios of 50 assets; against a brute-force expansion.

python benchmarks/accounts.py [--quick]

Seconds are medians of three, of one process and of two Ray workers that are up. `statements` are those of one process, for a tenth of the
accounts and for all of them. `difference` is the largest one to the brute-force expansion, which walks over every target in Python; `sums`
the largest one between the exposure of a target and its own times the sum of its portfolio's weights.
"""

import statistics
import time
from collections.abc import Callable
from datetime import UTC, date, datetime
from typing import Any

import numpy as np
import pandas as pd
import synthetic
from common import counted_statements, emit, options, register, server
from sqlalchemy import Engine

import msm_core
from msm_core.api import Account, AccountAllocationModel, AccountTargetAllocation, Portfolio
from msm_core.database import transaction
from msm_core.services.current_weights import CurrentWeights
from msm_core.services.reads import read_targets
from msm_core.services.snapshots import TargetSnapshot, replace_target_positions
from msm_ray.account_fleet import FleetExposure, expand_fleet
from msm_ray.executors import LocalExecutor, RayExecutor
from msm_ray.run import run_fleet

TARGETS = 50
START, WANTED = date(2022, 10, 1), datetime(2022, 11, 1, tzinfo=UTC)


def main() -> None:
    accounts, portfolios = (100, 60) if options(__doc__).quick else (1_000, 500)
    with server() as fresh:
        engine = fresh(with_demo=False)
        as_of = _stored(engine, accounts, portfolios)
        names = [f"C{i:04d}" for i in range(accounts)]
        ray = RayExecutor()
        try:
            expand_fleet(engine, ray, as_of, names[:2])
            on_ray = [_timed(lambda: expand_fleet(engine, ray, as_of))[0] for _ in range(3)]
        finally:
            ray.close()
        local = [_timed(lambda: expand_fleet(engine, LocalExecutor(), as_of))[0] for _ in range(3)]
        statements = []
        for some in (names[: accounts // 10], names):
            with counted_statements() as sent:
                found = expand_fleet(engine, LocalExecutor(), as_of, some)
            statements.append(len(sent))
        assert not found.failures, found.failures
        netted = _timed(lambda: expand_fleet(engine, LocalExecutor(), as_of, net=True))[0]
        emit(
            {
                "accounts": accounts,
                "rows": len(found.exposure),
                "seconds": round(statistics.median(local), 2),
                "ray_seconds": round(statistics.median(on_ray), 2),
                "netted_seconds": round(netted, 2),
                "statements": statements,
                **_compared(engine, found, as_of),
            }
        )


def _timed(work: Callable[[], Any]) -> tuple[float, Any]:
    started = time.perf_counter()
    result = work()
    return time.perf_counter() - started, result


def _stored(engine: Engine, accounts: int, portfolios: int) -> datetime:
    """A fleet with some weeks of history, rebalanced monthly, so that weights have drifted; and accounts that want portfolios of it."""
    closes = synthetic.load(engine)
    fleet = synthetic.fleet(portfolios, "month_end", start=START)
    register(engine, fleet)
    as_of = synthetic.through(closes[-3])
    run_fleet(engine, fleet, LocalExecutor(), as_of)
    msm_core.start_engine()
    model = AccountAllocationModel.upsert(allocation_model_name="benchmark")
    made = Account.upsert_many([{"unique_identifier": f"C{i:04d}", "account_name": "benchmark"} for i in range(accounts)])
    own = {"account_allocation_model_uid": model.uid}
    allocations = [{"unique_identifier": f"{a.unique_identifier}-core", "account_uid": a.uid, **own} for a in made]
    known, random = [p.uid for p in Portfolio.filter()], np.random.default_rng(synthetic.SEED)
    snapshots = []
    for allocation in AccountTargetAllocation.upsert_many(allocations):
        chosen = random.choice(len(known), TARGETS, replace=False)
        weights = random.normal(0, 1 / TARGETS, TARGETS)
        positions = [{"portfolio_uid": known[j], "weight_notional_exposure": float(w)} for j, w in zip(chosen, weights, strict=True)]
        snapshots.append(TargetSnapshot(allocation, WANTED, positions))
    replace_target_positions(snapshots)
    return as_of


def _compared(engine: Engine, found: FleetExposure, as_of: datetime) -> dict[str, float]:
    """Against a loop over every target and every asset of its portfolio."""
    with transaction(engine, read_only=True) as connection:
        targets = read_targets(connection, None, as_of)
        weights = CurrentWeights(as_of, connection)(list(targets["portfolio_uid"].unique()))
    held: dict[Any, list[tuple[str, float]]] = {}
    for row in weights.itertuples(index=False):
        held.setdefault(row.portfolio_uid, []).append((str(row.asset_identifier), float(row.weight)))  # type: ignore[arg-type]
    wanted: dict[tuple[Any, ...], float] = {}
    for row in targets.itertuples(index=False):
        for asset, weight in held[row.portfolio_uid]:
            if weight:
                wanted[row.account, row.target, asset] = row.weight_notional_exposure * weight  # type: ignore[operator]
    rows = found.exposure
    keys = list(zip(rows["account"], rows["source_target"], rows["asset_identifier"], strict=True))
    assert len(keys) == len(wanted)
    difference = np.abs(rows["weight_notional_exposure"].to_numpy() - np.array([wanted[key] for key in keys])).max()
    totals = rows.groupby(["account", "source_target"])["weight_notional_exposure"].sum()
    sums = {portfolio: sum(weight for _, weight in positions) for portfolio, positions in held.items()}
    own = pd.Series(
        [e * sums[p] for e, p in zip(targets["weight_notional_exposure"], targets["portfolio_uid"], strict=True)],
        index=pd.MultiIndex.from_frame(targets[["account", "target"]]),
    )
    return {"difference": float(difference), "sums": float(np.abs(totals.to_numpy() - own.reindex(totals.index).to_numpy()).max())}


if __name__ == "__main__":
    main()
