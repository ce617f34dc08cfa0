"""Target positions in portfolios, expanded into exposure to assets. Pure: who wants it says by a resolver what portfolios hold.

A portfolio target is a mandate. Its exposure times the weight of each asset is exposure to that asset, and the shortfall of the weights
from 1 is cash, which is no row: exposures of one target add up to the target's times the sum of its portfolio's weights.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from graphlib import CycleError, TopologicalSorter
from typing import Any
from uuid import UUID

import numpy as np
import pandas as pd

from msm_core.errors import CyclicPortfolios, ResolverMissing, TargetsRefused, UnresolvedPortfolios
from msm_core.models.accounts import EXPOSURES

NEEDED = ("target_type", "asset_uid", "portfolio_uid", *EXPOSURES)
DERIVED = ("source_target_type", "source_target_uid", "portfolio_weight")

Resolver = Callable[[Sequence[UUID]], pd.DataFrame]
"""Weights of portfolios: rows portfolio_uid, asset_uid, weight; a row whose `held_portfolio_uid` is set holds a portfolio instead."""


def expand_portfolio_target_positions(
    rows: pd.DataFrame | Iterable[Mapping[str, Any]], portfolio_weight_resolver: Resolver | None = None, *, net: bool = False
) -> pd.DataFrame:
    """Every target as exposure to assets; asset rows pass through.

    rows     target positions: target_type, asset_uid or portfolio_uid, exactly one exposure; other columns travel along
    portfolio_weight_resolver  asked once for all portfolios, and once more for each level of portfolios that these hold
    net      one row per asset, kind of exposure and what else the rows tell, instead of one per target

    Returned beside the given columns: source_target_type and source_target_uid (the target), portfolio_uid (the portfolio that holds the
    asset; null where the asset is the target), portfolio_weight (weight in the target, through all levels; 1 for an asset). All rows are
    asset targets, in the order given, assets in the resolver's order. Netted, the sources are gone.

    Raises TargetsRefused with every problem by row, ResolverMissing, UnresolvedPortfolios, CyclicPortfolios.
    """
    targets = _checked(rows if isinstance(rows, pd.DataFrame) else pd.DataFrame(list(rows)))
    portfolios = list(targets.loc[targets["target_type"] == "portfolio", "portfolio_uid"].unique())
    expanded = _multiplied(targets, _looked_through(portfolios, portfolio_weight_resolver))
    return _netted(expanded) if net else expanded


# -- what is given ------------------------------------------------------------------------------------------------------------


def _checked(given: pd.DataFrame) -> pd.DataFrame:
    """With a column for every exposure and target, the exposures as float64, NaN where there is none."""
    targets = given.reset_index(drop=True).reindex(columns=list(dict.fromkeys((*given.columns, *NEEDED))))
    if len(given) and "target_type" not in given.columns:
        raise _refused(["column target_type is missing"])
    targets = targets.astype(dict.fromkeys(("target_type", "asset_uid", "portfolio_uid"), object))
    is_asset, is_portfolio = (targets["target_type"] == kind for kind in ("asset", "portfolio"))
    has_asset, has_portfolio = (targets[name].notna() for name in ("asset_uid", "portfolio_uid"))
    try:
        exposures = targets[list(EXPOSURES)].astype(np.float64)
    except (TypeError, ValueError) as error:
        raise _refused([f"an exposure is not a number ({error})"]) from None
    rules = [
        (~(is_portfolio | is_asset), "target_type is neither asset nor portfolio"),
        (is_asset & ~has_asset, "asset_uid is missing"),
        (is_portfolio & ~has_portfolio, "portfolio_uid is missing"),
        (has_asset & has_portfolio, "it names an asset and a portfolio; a target is one of them"),
        (exposures.notna().sum(axis=1) != 1, f"exactly one exposure must be given: {', '.join(EXPOSURES)}"),
        (np.isinf(exposures).any(axis=1), "its exposure is not finite"),
        (is_portfolio & exposures["single_asset_quantity"].notna(), "single_asset_quantity is of assets only"),
    ]
    if problems := [(int(row), why) for broken, why in rules for row in np.flatnonzero(broken.to_numpy(bool))]:
        raise _refused([f"row {row}: {why}" for row, why in sorted(problems)])
    targets[list(EXPOSURES)] = exposures
    return targets


def _refused(problems: list[str]) -> TargetsRefused:
    return TargetsRefused(count=len(problems), first=problems[0], problems=problems)


# -- what portfolios hold -----------------------------------------------------------------------------------------------------


def _looked_through(portfolios: Sequence[UUID], resolver: Resolver | None) -> pd.DataFrame:
    """Assets of each portfolio, through all levels: rows target (the portfolio asked for), holder, asset_uid, portfolio_weight."""
    positions = _resolved(portfolios, resolver)
    roots = np.array(portfolios, object)
    reached = pd.DataFrame({"target": roots, "holder": roots, "reached_weight": np.ones(len(roots))})
    found = [pd.DataFrame({"target": roots[:0], "holder": roots[:0], "asset_uid": roots[:0], "portfolio_weight": np.ones(0)})]
    while len(reached):
        held = reached.merge(positions, left_on="holder", right_on="portfolio_uid", how="inner", sort=False)
        held["portfolio_weight"] = held.pop("reached_weight") * held.pop("weight")
        nested = held["held_portfolio_uid"].notna()
        found.append(held.loc[~nested, ["target", "holder", "asset_uid", "portfolio_weight"]])
        reached = held.loc[nested, ["target", "held_portfolio_uid", "portfolio_weight"]].set_axis(
            ["target", "holder", "reached_weight"], axis=1
        )
    return pd.concat(found)


def _resolved(portfolios: Sequence[UUID], resolver: Resolver | None) -> pd.DataFrame:
    """Positions of `portfolios` and of all that they hold, each asked for once. Raises what cannot be resolved, and cycles."""
    found = [pd.DataFrame(columns=["portfolio_uid", "asset_uid", "held_portfolio_uid", "weight"])]
    known: set[UUID] = set()
    wanted = list(portfolios)
    if wanted and resolver is None:
        raise ResolverMissing(count=len(wanted))
    while wanted and resolver is not None:
        positions = resolver(wanted)
        if "held_portfolio_uid" not in positions.columns:
            positions = positions.assign(held_portfolio_uid=None)
        answered = set(positions["portfolio_uid"])
        if lost := [str(uid) for uid in wanted if uid not in answered]:
            raise UnresolvedPortfolios(portfolios=", ".join(lost))
        known.update(wanted)
        found.append(positions[positions["portfolio_uid"].isin(wanted) & (positions["weight"] != 0)])
        wanted = [uid for uid in found[-1]["held_portfolio_uid"].dropna().unique() if uid not in known]
    positions = pd.concat([frame for frame in found if len(frame)] or found).astype({"portfolio_uid": object, "held_portfolio_uid": object})
    _refuse_cycles(positions)
    return positions


def _refuse_cycles(positions: pd.DataFrame) -> None:
    nested = positions.loc[positions["held_portfolio_uid"].notna(), ["portfolio_uid", "held_portfolio_uid"]]
    graph: dict[UUID, set[UUID]] = {}
    for holder, held in nested.itertuples(index=False):
        graph.setdefault(holder, set()).add(held)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        raise CyclicPortfolios(cycle=" -> ".join(str(uid) for uid in reversed(error.args[1]))) from None


# -- exposures ----------------------------------------------------------------------------------------------------------------


def _multiplied(targets: pd.DataFrame, held: pd.DataFrame) -> pd.DataFrame:
    """One row per asset of each target, in the order of the targets."""
    own = targets.assign(
        source_target_type=targets["target_type"],
        source_target_uid=targets["asset_uid"].where(targets["target_type"] == "asset", targets["portfolio_uid"]),
    )
    expanded = own.merge(held, left_on="portfolio_uid", right_on="target", how="left", sort=False, suffixes=("", "_held"))
    is_portfolio = expanded["source_target_type"] == "portfolio"
    expanded = expanded[~is_portfolio | expanded["asset_uid_held"].notna()]  # a portfolio all in cash is no exposure
    is_portfolio = expanded["source_target_type"] == "portfolio"
    asset = expanded["asset_uid"].where(~is_portfolio, expanded["asset_uid_held"])
    weight = expanded["portfolio_weight"].where(is_portfolio, 1.0).astype(np.float64)
    expanded = expanded.assign(
        target_type="asset", asset_uid=asset, portfolio_uid=expanded["holder"], portfolio_weight=weight,
        **{name: expanded[name] * weight for name in EXPOSURES},
    )  # fmt: skip
    if "target_uid" in targets.columns:
        expanded["target_uid"] = asset
    return expanded[[*targets.columns, *DERIVED]].reset_index(drop=True)


def _netted(expanded: pd.DataFrame) -> pd.DataFrame:
    """Long and short of one asset set off against each other; each row still has exactly one exposure."""
    keys = [name for name in expanded.columns if name not in (*EXPOSURES, *DERIVED, "portfolio_uid", "metadata_json")]
    exposures = expanded[list(EXPOSURES)].to_numpy()
    kind = (~np.isnan(exposures)).argmax(axis=1)
    given = expanded[keys].assign(kind=kind, exposure=exposures[np.arange(len(kind)), kind])
    netted = given.groupby([*keys, "kind"], sort=False, dropna=False, as_index=False)["exposure"].sum()
    columns = {name: netted["exposure"].where(netted["kind"] == i) for i, name in enumerate(EXPOSURES)}
    return netted[keys].assign(**columns)
