"""What a user would write: a Ray task per portfolio, pandas, `to_sql`. Seconds per portfolio, everything included.

python benchmarks/naive.py [--quick]

Each task reads the bars of its assets, computes weights and values of all sessions in pandas, and writes both frames into tables equal to
ours; drifting weights are a frame of all sessions, whenever they are rebalanced. `events` is a more careful user, who keeps the weights of
rebalances only. Values and weights are those that msm-ray stores, to 1e-12: the comparison is of equals.
"""

import os
import sys
import time
from collections.abc import Sequence
from datetime import datetime
from typing import Any

import numpy as np
import pandas as pd
import synthetic
from common import emit, options, register, server
from sqlalchemy import Engine, create_engine, text

from msm_core.configuration import PortfolioConfiguration
from msm_core.models import ExternalPricesStorage, PortfoliosStorage, PortfolioWeightsStorage
from msm_ray.executors import LocalExecutor, RayExecutor
from msm_ray.run import run_fleet

FEE = 0.00018
AGREE = 1e-12
TABLES = {"naive_weights": PortfolioWeightsStorage, "naive_values": PortfoliosStorage}


def update(url: str, identifier: str, weights: dict[str, float], month_end: bool, through: datetime, events_only: bool) -> int:
    """One portfolio, from scratch; returns the rows written."""
    engine = create_engine(url)
    query = text(
        f"SELECT time_index, asset_identifier, close, volume FROM {ExternalPricesStorage.__tablename__} "
        "WHERE asset_identifier = ANY(:assets) AND time_index <= :through"
    )
    bars = pd.read_sql(query, engine, params={"assets": list(weights), "through": through})
    closes, volumes = (bars.pivot(index="time_index", columns="asset_identifier", values=v).sort_index() for v in ("close", "volume"))
    target = pd.Series(weights).reindex(closes.columns)
    months = pd.DatetimeIndex(closes.index).tz_localize(None).to_period("M")
    is_event = np.append(months[1:] != months[:-1], False) if month_end else np.ones(len(closes), bool)
    values, after_at, before_at, value, held = {}, {}, {}, 1.0, None
    previous = closes.iloc[0]
    for (time_index, prices), event in zip(closes.iterrows(), is_event, strict=True):
        if held is not None:
            grown = held * (prices / previous)
            value, before = value * grown.sum(), grown / grown.sum()
        else:
            before = target * 0.0
        after = target if event else before
        if event:
            value *= 1.0 - FEE * (after - before).abs().sum()
        if event or held is not None:
            held, values[time_index] = after, value
            if event or not events_only:
                after_at[time_index], before_at[time_index] = after, before
        previous = prices
    after, before = pd.DataFrame(after_at).T, pd.DataFrame(before_at).T
    traded, volume = closes.loc[after.index], volumes.loc[after.index]
    blocks = {"weight": after, "weight_before": before, "price_current": traded, "price_before": traded.shift()}
    blocks |= {"volume_current": volume, "volume_before": volume.shift()}
    rows = pd.DataFrame({name: block.stack(future_stack=True) for name, block in blocks.items()})
    rows = rows.rename_axis(["time_index", "asset_identifier"]).reset_index().assign(portfolio_identifier=identifier)
    series = pd.Series(values, name="close").rename_axis("time_index").reset_index()
    series["return"] = series["close"].pct_change().fillna(series["close"] - 1.0)
    series = series.assign(portfolio_identifier=identifier, calculated_close=series["close"], close_time=series["time_index"])
    rows.to_sql("naive_weights", engine, if_exists="append", index=False)
    series.to_sql("naive_values", engine, if_exists="append", index=False)
    engine.dispose()
    return len(rows) + len(series)


def seconds_per_portfolio(
    ray: Any, engine: Engine, fleet: Sequence[PortfolioConfiguration], style: str, through: datetime, events_only: bool = False
) -> float:
    """Wall-clock seconds of all tasks on the running Ray, over their number, into tables equal to ours."""
    with engine.begin() as connection:
        for name, storage in TABLES.items():
            connection.exec_driver_sql(f"DROP TABLE IF EXISTS {name}")
            connection.exec_driver_sql(f"CREATE TABLE {name} (LIKE {storage.__tablename__} INCLUDING ALL)")
    url = engine.url.render_as_string(hide_password=False)
    task = ray.remote(update)
    started = time.perf_counter()
    ray.get([task.remote(url, c.identifier, _weights(c), style == "month_end", through, events_only) for c in fleet])
    return (time.perf_counter() - started) / len(fleet)


def difference(engine: Engine) -> float:
    """The greatest difference from what msm-ray stores: of values, relative, and of weights, where both have a row."""
    with engine.connect() as connection:
        values, least = connection.exec_driver_sql(
            f"SELECT max(abs(n.close / v.close - 1)), count(n.close) - count(*) FROM {PortfoliosStorage.__tablename__} v "
            "LEFT JOIN naive_values n USING (portfolio_identifier, time_index) "
            "WHERE v.portfolio_identifier IN (SELECT portfolio_identifier FROM naive_values)"
        ).one()
        assert least == 0, "a session is missing"
        weights = connection.exec_driver_sql(
            f"SELECT max(abs(n.weight - v.weight) + abs(n.weight_before - v.weight_before)) FROM {PortfolioWeightsStorage.__tablename__} v "
            "JOIN naive_weights n USING (portfolio_identifier, time_index, asset_identifier)"
        ).scalar_one()
    return max(float(values), float(weights))


def _weights(configuration: PortfolioConfiguration) -> dict[str, float]:
    dumped = configuration.signal.model_dump()["asset_unique_identifier_weights"]
    return {pair["unique_identifier"]: pair["weight"] for pair in dumped}


def main() -> None:
    portfolios = 2 if options(__doc__).quick else 8
    with server() as fresh:
        engine = fresh(with_demo=False)
        closes = synthetic.load(engine)
        executor = RayExecutor()
        assert executor.slots
        found: dict[str, dict[str, float]] = {}
        try:
            for style in synthetic.STYLES:
                fleet = synthetic.fleet(portfolios, style, prefix=style)
                register(engine, fleet)
                as_of = synthetic.through(closes[-2])
                run_fleet(engine, fleet, LocalExecutor(), as_of)
                careful = seconds_per_portfolio(executor._ray, engine, fleet, style, as_of, events_only=True)
                usual = seconds_per_portfolio(executor._ray, engine, fleet, style, as_of)
                assert difference(engine) < AGREE
                found[style] = {"seconds": round(usual, 3), "events": round(careful, 3)}
                print(f"{style}: {found[style]} s per portfolio", file=sys.stderr)
        finally:
            executor.close()
    emit({"portfolios": portfolios, "processes": os.cpu_count(), "seconds_per_portfolio": found})


if __name__ == "__main__":
    main()
