"""Adapter that turns an estimator of skfolio into a signal. skfolio is an extra: it is imported when weights are computed, not before.

What may be asked of an estimator is written down here, with its default, so that a configuration means the same whichever version of
skfolio is installed, and nothing in one ever names a module or an object.

Left out: Random (not reproducible); NestedClustersOptimization and StackingOptimization (made of estimators), BenchmarkTracker (needs a
benchmark: see PortfolioReplicator); DistributionallyRobustCVaR (1 to 2 s a fit). Of risk measures, those that Clarabel does not solve
on ordinary data (edar; worst_realization, semi_variance in risk budgeting) or not within a second (gini_mean_difference).
"""

import warnings
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
import pandas as pd
from pydantic import Field, ValidationInfo, field_validator

from msm_core.errors import FitFailed, PackageMissing
from msm_core.frames import Floats
from msm_core.signals.base import AssetIdentifier
from msm_core.signals.computed import ComputedSignal, EmitOn

Number = Annotated[float, Field(strict=True)]  # an integer is one, true is none
Value = str | Number | dict[AssetIdentifier, Number]

BUDGETED_MEASURES = (
    *("variance", "standard_deviation", "semi_deviation", "mean_absolute_deviation", "first_lower_partial_moment"),
    *("cvar", "evar", "cdar", "max_drawdown", "average_drawdown", "ulcer_index"),
)
CONVEX_MEASURES = (*BUDGETED_MEASURES, "semi_variance", "worst_realization")
MEASURES = (*CONVEX_MEASURES, "edar", "gini_mean_difference")
OBJECTIVES = ("minimize_risk", "maximize_return", "maximize_utility", "maximize_ratio")


@dataclass(frozen=True)
class Parameter:
    """What a parameter may be: one of some words, or a number in lowest..highest; per asset where a mapping of assets is taken too.

    default  what the estimator is given when nothing is said; None: what it does without
    """

    default: str | float | None
    choices: tuple[str, ...] = ()
    lowest: float = -np.inf
    highest: float = np.inf
    per_asset: bool = False

    def checked(self, name: str, value: Value, assets: tuple[str, ...]) -> Value:
        """The value in its one spelling. Raises ValueError."""
        if self.choices:
            word = value.lower() if isinstance(value, str) else value
            if word not in self.choices:
                raise ValueError(f"{name} is {value!r}; it is one of {', '.join(self.choices)}")
            return word
        if not isinstance(value, dict):
            return self._in_range(name, value)
        if not self.per_asset or not value:
            raise ValueError(f"{name} is {value!r}; it is one number{', or one per asset' if self.per_asset else ''}")
        if strange := sorted(set(value) - set(assets)):
            raise ValueError(f"{name} names {', '.join(strange)}, not in asset_list")
        return {asset: self._in_range(name, number) for asset, number in sorted(value.items())}

    def _in_range(self, name: str, number: str | float) -> float:
        if isinstance(number, str) or not self.lowest <= number <= self.highest:
            raise ValueError(f"{name} is {number!r}; it is a number in {self.lowest:g}..{self.highest:g}")
        return number


def _number(default: float | None, lowest: float = -np.inf, highest: float = np.inf) -> Parameter:
    return Parameter(default, lowest=lowest, highest=highest)


def _bounds(lowest: float, highest: float) -> dict[str, Parameter]:
    return {
        "min_weights": Parameter(0.0, lowest=lowest, highest=highest, per_asset=True),
        "max_weights": Parameter(1.0, lowest=lowest, highest=highest, per_asset=True),
    }


def _measure(choices: tuple[str, ...]) -> dict[str, Parameter]:
    return {"risk_measure": Parameter("variance", choices)}


TAILS = {name: _number(0.95, 0.5, 0.9999) for name in ("cvar_beta", "evar_beta", "cdar_beta")}
BUDGETS = {"budget": _number(1.0, -10, 10), "max_short": _number(None, 0, 10), "max_long": _number(None, 0, 10)}
PENALTIES = {"l1_coef": _number(0.0, 0), "l2_coef": _number(0.0, 0)}
RATES = {"risk_free_rate": _number(0.0), "min_return": _number(None)}

ESTIMATORS: dict[str, dict[str, Parameter]] = {
    "EqualWeighted": {},
    "InverseVolatility": {},
    "HierarchicalRiskParity": {**_measure(MEASURES), **_bounds(0, 1)},
    "HierarchicalEqualRiskContribution": {**_measure(MEASURES), **_bounds(0, 1)},
    "RiskBudgeting": {
        **_measure(BUDGETED_MEASURES),
        **_bounds(0, 1),
        "risk_budget": Parameter(None, lowest=0, per_asset=True),
        "min_acceptable_return": _number(None),
        **TAILS,
    },
    "MaximumDiversification": {**_bounds(-10, 10), **BUDGETS, **PENALTIES},
    "MeanRisk": {
        "objective_function": Parameter("minimize_risk", OBJECTIVES),
        **_measure(CONVEX_MEASURES),
        "risk_aversion": _number(1.0, 0),
        "min_acceptable_return": _number(None),
        **_bounds(-10, 10),
        **BUDGETS,
        **PENALTIES,
        **RATES,
        **TAILS,
    },
}

PINNED: dict[str, Any] = {"solver": "CLARABEL", "solver_params": {"tol_gap_abs": 1e-9, "tol_gap_rel": 1e-9, "direct_solve_method": "qdldl"}}
SOLVED = ("RiskBudgeting", "MaximumDiversification", "MeanRisk")
Estimator = Literal[
    "EqualWeighted",
    "InverseVolatility",
    "HierarchicalRiskParity",
    "HierarchicalEqualRiskContribution",
    "RiskBudgeting",
    "MaximumDiversification",
    "MeanRisk",
]


class SkfolioSignal(ComputedSignal):
    """Weights of a skfolio estimator, fitted on the simple returns of a window of sessions.

    An asset without a price at every close of the window is left out: it has weight 0. With fewer than two others nothing is emitted.
    """

    kind: Literal["skfolio"] = "skfolio"
    emit_on: EmitOn = Field(default="month_end", description="sessions at which the estimator is fitted and a vector is emitted")
    estimator: Estimator = Field(description="class of skfolio.optimization")
    parameters: dict[str, Value] = Field(
        default={}, description="of the estimator, as in risk_measure: cvar; min_weights, max_weights and risk_budget may be per asset"
    )
    window_sessions: int = Field(default=252, ge=2, le=10_000, description="returns that each fit sees")

    @field_validator("parameters")
    @classmethod
    def _allowed(cls, given: dict[str, Value], info: ValidationInfo) -> dict[str, Value]:
        """In one spelling; what says no more than the default is left out."""
        if "estimator" not in info.data or "asset_list" not in info.data:
            return given  # their own complaint is enough
        known = ESTIMATORS[info.data["estimator"]]
        if strange := sorted(set(given) - set(known)):
            takes = f"it takes {', '.join(sorted(known))}" if known else "it takes none"
            raise ValueError(f"{info.data['estimator']} has no parameter {', '.join(strange)} here; {takes}")
        checked = {name: known[name].checked(name, value, info.data["asset_list"]) for name, value in sorted(given.items())}
        return {name: value for name, value in checked.items() if value != known[name].default}

    @property
    def history_sessions(self) -> int:
        return self.window_sessions + 1

    def target_weights(self, windows: dict[str, Floats]) -> Floats:
        prices = windows["prices"]
        with np.errstate(over="ignore", invalid="ignore"):  # an asset whose returns are not finite is left out
            returns = prices[..., 1:] / prices[..., :-1] - 1.0
        complete = np.all(np.isfinite(returns), axis=-1)
        fitted = np.count_nonzero(complete, axis=1) >= 2
        weights = np.where(fitted[:, None], np.zeros(complete.shape), np.nan)
        if fitted.any():
            with _one_thread(self.kind):
                for window in np.flatnonzero(fitted):
                    kept = complete[window]
                    weights[window, kept] = self._fit(returns[window, kept], np.flatnonzero(kept), int(window))
        return weights

    def _fit(self, returns: Floats, places: np.ndarray, window: int) -> Floats:
        """(k,) weights from returns (k, W) of the assets at those places of the universe."""
        frame = pd.DataFrame(np.ascontiguousarray(returns.T), columns=[self.universe[i] for i in places])
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                warnings.filterwarnings("error", message=".*may be inaccurate")  # a solver that gave up half-way
                weights = np.asarray(self._model().fit(frame).weights_, dtype=np.float64)
            if weights.shape != (len(places),) or not np.isfinite(weights).all():
                raise ValueError("its weights are not finite; does an asset never move in the window?")
        except Exception as error:  # of whichever library it is made of
            facts = {"why": _first_sentence(error), "remedy": "Change its parameters or window_sessions, or take another estimator"}
            raise FitFailed(signal=self.kind, estimator=self.estimator, window=window, time=f"window {window}", **facts) from None
        return weights

    def _model(self) -> Any:
        import skfolio.optimization
        from skfolio import RiskMeasure

        defaults = {name: parameter.default for name, parameter in ESTIMATORS[self.estimator].items()}
        values: dict[str, Any] = {**defaults, **self.parameters, **(PINNED if self.estimator in SOLVED else {})}
        for name, words in (("risk_measure", RiskMeasure), ("objective_function", skfolio.optimization.ObjectiveFunction)):
            if name in values:
                values[name] = words[values[name].upper()]
        return getattr(skfolio.optimization, self.estimator)(**values)


def _first_sentence(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].split(". ")[0].rstrip(".")


def _one_thread(kind: str) -> Any:
    """Linear algebra in one thread, as a context: how many threads there are changes the last bits (150 assets, covariance)."""
    try:
        import skfolio.optimization  # noqa: F401 - what is loaded later would not be limited
        from threadpoolctl import threadpool_limits
    except ImportError as error:
        raise PackageMissing(owner=f"signal {kind}", package=error.name, remedy="pip install 'msm-ray[skfolio]'") from None
    return threadpool_limits(limits=1)
