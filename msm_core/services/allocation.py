"""Who gets how much of what is held: the arithmetic of attributing holdings to virtual funds. Pure, and exact to the last bit.

Sums of floats depend on their order and can end above what is held. Here a quantity means the decimal of its shortest text, which is what
the database prints and people read; sums of those are exact, in `decimal` here and in `numeric` there, so that both always agree. Shares
are rounded down to 15 significant digits, as many as every float keeps through text and back: all shares together stay within the whole.
"""

import functools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from decimal import ROUND_DOWN, Context, Decimal, Inexact, InvalidOperation
from typing import Any, Literal, get_args

import numpy as np
import pandas as pd

from msm_core.errors import AllocationRefused

Strategy = Literal["explicit", "proportional_attribution", "strict_feasible"]
Problem = dict[str, Any]  # `reason`, and the facts that apply: virtual_fund, asset_identifier, direction, demanded, free
Place = tuple[str, int]  # asset_identifier, direction

STRATEGIES: tuple[str, ...] = get_args(Strategy)
SIDES = {1: "long", -1: "short"}
DEMAND_COLUMNS = ["virtual_fund", "asset_identifier", "quantity"]
ALLOCATION_COLUMNS = ["virtual_fund", "asset_identifier", "direction", "requested_quantity", "allocated_quantity"]
RESIDUAL_COLUMNS = ["asset_identifier", "direction", "held_quantity", "allocated_elsewhere", "allocated_quantity", "residual_quantity"]

EXACT = Context(prec=2_000, traps=[Inexact, InvalidOperation])  # sums and products of any floats fit; a digit lost would raise
SHARES = Context(prec=15, rounding=ROUND_DOWN)
NOTHING = Decimal(0)


@dataclass(frozen=True, eq=False)
class Attribution:
    """What `plan` returns: quantities are above 0, except allocated ones, which may be 0; `direction` has the sign.

    allocations  virtual_fund, asset_identifier, direction, requested_quantity, allocated_quantity, in that order
    residual     every row of the capacity: asset_identifier, direction, held_quantity, allocated_elsewhere, allocated_quantity,
                 residual_quantity, which can be attributed whole: it is never rounded up
    """

    allocations: pd.DataFrame
    residual: pd.DataFrame


def plan(capacity: pd.DataFrame, demands: pd.DataFrame, strategy: str = "explicit", *, found: Sequence[Problem] = ()) -> Attribution:
    """Attribute what is free of `capacity` to `demands`; their order changes nothing.

    capacity  asset_identifier, direction, held_quantity, allocated_elsewhere (which is not free); one row per asset and direction
    demands   virtual_fund, asset_identifier, quantity; the sign is the direction, 0 asks for nothing; one row per fund and asset
    strategy  explicit, strict_feasible: as demanded if all of it fits, else refused, every asset and direction told that falls short;
              proportional_attribution: of each asset and direction everybody gets the same fraction, min(1, free / demanded)
    found     problems that the caller knows of already

    Shorts fund no longs, nor longs shorts. Raises AllocationRefused with every problem.
    """
    held, elsewhere = _by_place(capacity, "held_quantity"), _by_place(capacity, "allocated_elsewhere")
    free = {place: max(EXACT.subtract(held[place], elsewhere[place]), NOTHING) for place in held}
    rows, problems = _checked(demands, {asset for asset, _ in held})
    problems = [*found, *problems]
    if strategy not in STRATEGIES:
        problems.append({"reason": f"strategy {strategy!a} is none of {', '.join(STRATEGIES)}"})
    places = list(zip(rows["asset_identifier"], rows["direction"].tolist(), strict=True))
    demanded = _sums(places, rows["requested_quantity"])
    short = sorted(place for place, gross in demanded.items() if gross > free.get(place, NOTHING))
    if strategy != "proportional_attribution":
        problems += [_shortfall(place, demanded[place], free.get(place, NOTHING)) for place in short]
    if problems:
        raise refused("attribution of holdings", problems)
    scaled = {place: (free.get(place, NOTHING), demanded[place]) for place in short}
    shares = [_share(quantity, scaled.get(place)) for place, quantity in zip(places, rows["requested_quantity"], strict=True)]
    rows["allocated_quantity"] = np.array(shares, np.float64)
    return Attribution(rows[ALLOCATION_COLUMNS], _residual(held, elsewhere, _sums(places, shares)))


def demands(notionals: pd.DataFrame, weights: pd.DataFrame) -> pd.DataFrame:
    """Demands of funds that hold their portfolios: virtual_fund, asset_identifier, quantity = notional * weight / price.

    notionals  virtual_fund, portfolio_uid, notional
    weights    portfolio_uid, asset_identifier, weight, price; a weight of 0 is dropped, and its price does not matter

    Raises AllocationRefused for a number that is not finite or a price that is not above 0, with every problem.
    """
    weights = weights.reindex(columns=["portfolio_uid", "asset_identifier", "weight", "price"])  # what is missing is not finite
    numbers = {name: pd.to_numeric(weights[name], errors="coerce").astype(np.float64) for name in ("weight", "price")}
    weights = weights.assign(**numbers)[numbers["weight"] != 0]
    notionals = notionals.astype({"notional": np.float64})
    prices = weights["price"]
    rules = [
        (notionals, ~np.isfinite(notionals["notional"]), "virtual_fund", "notional", "finite"),
        (weights, ~np.isfinite(weights["weight"]), "asset_identifier", "weight", "finite"),
        (weights, ~(np.isfinite(prices) & (prices > 0)), "asset_identifier", "price", "finite and above 0"),
    ]
    if problems := [
        {named: row[named], "reason": f"{number} {row[number]} of {row[named]!a} is not {needed}"}
        for rows, broken, named, number, needed in rules
        for row in rows[broken].to_dict("records")
    ]:
        raise refused("demands of portfolios", problems)
    rows = notionals.merge(weights, on="portfolio_uid")
    return rows.assign(quantity=rows["notional"] * rows["weight"] / rows["price"])[DEMAND_COLUMNS]


def refused(what: str, problems: Sequence[Problem]) -> AllocationRefused:
    return AllocationRefused(what=what, count=len(problems), first=problems[0]["reason"], problems=list(problems))


def exact(quantity: float | Decimal) -> Decimal:
    """The decimal that a quantity means."""
    return quantity if isinstance(quantity, Decimal) else Decimal(repr(float(quantity)))


def not_above(quantity: Decimal) -> float:
    """The largest float that does not mean more than `quantity`, which is 0 or more."""
    nearest = float(quantity)
    return nearest if exact(nearest) <= quantity else math.nextafter(nearest, 0.0)


# -- demands --------------------------------------------------------------------------------------------------------------------------


def _checked(demands: pd.DataFrame, held: set[str]) -> tuple[pd.DataFrame, list[Problem]]:
    """Sound demands, by fund and asset, with direction and requested_quantity, and what is wrong with the others."""
    if absent := [name for name in DEMAND_COLUMNS if name not in demands.columns and len(demands.columns)]:
        raise refused("attribution of holdings", [{"reason": f"column {name} of the demands is missing"} for name in absent])
    rows = demands.reindex(columns=DEMAND_COLUMNS).reset_index(drop=True)
    quantities = pd.to_numeric(rows["quantity"], errors="coerce").to_numpy(np.float64)
    asks = quantities != 0  # so does NaN
    rules = [
        (~np.isfinite(quantities), "its quantity is not a finite number"),
        (rows.duplicated(["virtual_fund", "asset_identifier"]).to_numpy(), "the fund asks for this asset twice"),
        (asks & ~rows["asset_identifier"].isin(held).to_numpy(), "the asset is not held"),
    ]
    problems = [_problem(rows, i, why) for broken, why in rules for i in np.flatnonzero(broken).tolist()]
    sound = asks & ~np.logical_or.reduce([broken for broken, _ in rules])
    rows = rows.assign(direction=np.sign(quantities), requested_quantity=np.abs(quantities))[sound]
    rows = rows.astype({"direction": np.int64}).sort_values(["virtual_fund", "asset_identifier"], ignore_index=True)
    return rows, problems


def _problem(rows: pd.DataFrame, i: int, why: str) -> Problem:
    fund, asset = str(rows["virtual_fund"].iloc[i]), str(rows["asset_identifier"].iloc[i])
    return {"virtual_fund": fund, "asset_identifier": asset, "reason": f"demand of {fund!a} for {asset!a}: {why}"}


def _shortfall(place: Place, demanded: Decimal, free: Decimal) -> Problem:
    asset, direction = place
    facts = {"asset_identifier": asset, "direction": direction, "demanded": float(demanded), "free": not_above(free)}
    return {**facts, "reason": f"{asset!a} {SIDES[direction]}: {demanded} demanded, {free} free"}


# -- quantities -----------------------------------------------------------------------------------------------------------------------


def _by_place(capacity: pd.DataFrame, name: str) -> dict[Place, Decimal]:
    return {(row[0], int(row[1])): exact(row[2]) for row in zip(*(capacity[c] for c in (*RESIDUAL_COLUMNS[:2], name)), strict=True)}


def _sums(places: Sequence[Place], quantities: Iterable[float]) -> dict[Place, Decimal]:
    sums: dict[Place, Decimal] = {}
    for place, quantity in zip(places, quantities, strict=True):
        sums[place] = EXACT.add(sums.get(place, NOTHING), exact(quantity))
    return sums


def _share(requested: float, scale: tuple[Decimal, Decimal] | None) -> float:
    """`requested`, or its share where `scale` is (free, demanded by all)."""
    if scale is None:
        return requested
    free, gross = scale
    return not_above(SHARES.divide(EXACT.multiply(exact(requested), free), gross))


def _residual(held: dict[Place, Decimal], elsewhere: dict[Place, Decimal], allocated: dict[Place, Decimal]) -> pd.DataFrame:
    def row(place: Place) -> tuple[str, int, float, float, float, float]:
        taken = (elsewhere[place], allocated.get(place, NOTHING))
        left = functools.reduce(EXACT.subtract, taken, held[place])
        return *place, float(held[place]), float(taken[0]), float(taken[1]), not_above(max(left, NOTHING))

    return pd.DataFrame([row(place) for place in sorted(held)], columns=RESIDUAL_COLUMNS)
