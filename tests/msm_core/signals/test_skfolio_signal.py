"""SkfolioSignal: skfolio itself on pandas returns, and formulas that owe nothing to it."""

import inspect
import json
import os
import random
import subprocess
import sys
import warnings

import numpy as np
import pandas as pd
import pytest
import scipy.cluster.hierarchy as sch
import skfolio.optimization
from scipy.spatial.distance import squareform
from skfolio import RiskMeasure
from skfolio.optimization import MeanRisk, ObjectiveFunction

from msm_core.errors import FitFailed, PackageMissing
from msm_core.frames import iso
from msm_core.signals import SIGNALS, SkfolioSignal
from msm_core.signals.skfolio_signal import ESTIMATORS
from tests.contracts import API_PRICES, ASSETS, GONE, WEEKDAYS, ComputedSignalContract, random_split

BASE = {
    "kind": "skfolio",
    "asset_list": ASSETS,
    "calendar_key": "WEEKDAYS",
    "price_source": API_PRICES,
    "estimator": "InverseVolatility",
    "window_sessions": 60,
    "emit_on": "quarter_end",  # few fits, so that many splits are quick
}
HRP = BASE | {"estimator": "HierarchicalRiskParity"}
MEAN_RISK = BASE | {"estimator": "MeanRisk"}
BUDGETS = BASE | {"estimator": "RiskBudgeting"}
NAN = float("nan")

CHOSEN = {  # parameters of each estimator, and the same as skfolio spells them
    "EqualWeighted": ({}, {}),
    "InverseVolatility": ({}, {}),
    "HierarchicalRiskParity": ({"risk_measure": "cvar", "max_weights": 0.2}, {"risk_measure": RiskMeasure.CVAR, "max_weights": 0.2}),
    "HierarchicalEqualRiskContribution": ({"risk_measure": "semi_deviation"}, {"risk_measure": RiskMeasure.SEMI_DEVIATION}),
    "RiskBudgeting": ({"risk_budget": {"AAPL": 2, "XOM": 1.5, "É": 1}}, {"risk_budget": {"AAPL": 2, "XOM": 1.5, "É": 1}}),
    "MaximumDiversification": ({"max_weights": {"AAPL": 0.1, "XOM": 0.1}}, {"max_weights": {"AAPL": 0.1, "XOM": 0.1}}),
    "MeanRisk": (
        {"risk_measure": "cvar", "objective_function": "maximize_utility", "risk_aversion": 3, "cvar_beta": 0.9, "min_weights": -0.1},
        {
            "risk_measure": RiskMeasure.CVAR,
            "objective_function": ObjectiveFunction.MAXIMIZE_UTILITY,
            "risk_aversion": 3,
            "cvar_beta": 0.9,
            "min_weights": -0.1,
        },
    ),
}


def signal(**fields) -> SkfolioSignal:
    return SkfolioSignal.model_validate(BASE | fields)


def fit(returns: np.ndarray, **fields) -> np.ndarray:
    """(n,) the vector at the end of one window of returns (n, W)."""
    names = fields.pop("asset_list", [f"{i:02d}" for i in range(len(returns))])
    spec = signal(asset_list=names, window_sessions=returns.shape[1], **fields)
    prices = np.cumprod(1 + np.c_[np.zeros(len(returns)), returns], axis=1)
    return spec.target_weights({"prices": prices[None]})[0]


def market(assets: int = 9, sessions: int = 120, seed: int = 1) -> np.ndarray:
    """(n, W) returns with a common factor, of unlike volatility."""
    rng = np.random.default_rng(seed)
    common = rng.normal(0.0003, 0.01, sessions)
    return rng.uniform(0.3, 1.5, (assets, 1)) * common + rng.uniform(0.005, 0.02, (assets, 1)) * rng.standard_normal((assets, sessions))


class TestContract(ComputedSignalContract):
    payload = BASE
    periods = ()  # it is computed at quarter ends; other periods choose sessions as for every computed signal
    respellings = [
        BASE | {"asset_list": list(reversed(ASSETS))},
        BASE | {"parameters": {}, "window_sessions": 60.0, "price_column": "close"},
    ]
    others = [
        BASE | {"emit_on": "month_end"},
        BASE | {"window_sessions": 61},
        BASE | {"asset_list": ASSETS[1:]},
        BASE | {"price_column": "open"},
        BASE | {"estimator": "EqualWeighted"},
        HRP,
        HRP | {"parameters": {"risk_measure": "cvar"}},
        HRP | {"parameters": {"max_weights": 0.2}},
        HRP | {"parameters": {"max_weights": {"MSFT": 0.2}}},
        HRP | {"parameters": {"max_weights": {"XOM": 0.2}}},
        MEAN_RISK,
        MEAN_RISK | {"parameters": {"objective_function": "maximize_ratio"}},
        BUDGETS,
    ]
    refused = [
        (BASE | {"estimator": "Random"}, "EqualWeighted"),
        (BASE | {"estimator": "os.system"}, "EqualWeighted"),
        (BASE | {"estimator": "NestedClustersOptimization"}, "EqualWeighted"),
        (BASE | {"parameters": {"risk_measure": "cvar"}}, "InverseVolatility has no parameter risk_measure here; it takes none"),
        (
            HRP | {"parameters": {"prior_estimator": "x"}},
            "no parameter prior_estimator here; it takes max_weights, min_weights, risk_measure",
        ),
        (MEAN_RISK | {"parameters": {"solver": "SCS"}}, "has no parameter solver"),
        (MEAN_RISK | {"parameters": {"fallback": "x", "solver_params": "y"}}, "no parameter fallback, solver_params"),
        (MEAN_RISK | {"parameters": {"risk_measure": "edar"}}, "risk_measure is 'edar'; it is one of variance"),
        (BUDGETS | {"parameters": {"risk_measure": "worst_realization"}}, "it is one of variance"),
        (MEAN_RISK | {"parameters": {"risk_measure": 1}}, "it is one of variance"),
        (MEAN_RISK | {"parameters": {"objective_function": "os.system"}}, "it is one of minimize_risk"),
        (MEAN_RISK | {"parameters": {"risk_aversion": "much"}}, "risk_aversion is 'much'; it is a number in 0..inf"),
        (MEAN_RISK | {"parameters": {"risk_aversion": -1}}, r"risk_aversion is -1\.0; it is a number in 0\.\.inf"),
        (MEAN_RISK | {"parameters": {"risk_aversion": {"AAPL": 1}}}, "it is one number"),
        (MEAN_RISK | {"parameters": {"risk_aversion": True}}, "valid"),
        (MEAN_RISK | {"parameters": {"risk_aversion": NAN}}, "finite number"),
        (MEAN_RISK | {"parameters": {"risk_aversion": float("inf")}}, "finite number"),
        (MEAN_RISK | {"parameters": {"cvar_beta": 1}}, r"cvar_beta is 1\.0; it is a number in 0\.5\.\.0\.9999"),
        (MEAN_RISK | {"parameters": {"max_weights": [0.1]}}, "valid"),
        (MEAN_RISK | {"parameters": {"max_weights": {}}}, "it is one number, or one per asset"),
        (MEAN_RISK | {"parameters": {"max_weights": {"GHOST": 0.1, "AAPL": 0.1}}}, "max_weights names GHOST, not in asset_list"),
        (MEAN_RISK | {"parameters": {"max_weights": {"AAPL": "x"}}}, "valid"),
        (HRP | {"parameters": {"min_weights": {"AAPL": -0.1}}}, r"min_weights is -0\.1; it is a number in 0\.\.1"),
        (BASE | {"window_sessions": 1}, "greater than or equal to 2"),
    ]

    def test_returns_of_pandas_given_to_skfolio_come_to_the_same_weights(self):
        bars = {a: pd.Series(s.values, s.times) for a, s in self.bars()["prices"].items()}
        bars[GONE] = bars[GONE][: pd.Timestamp(self.delisted[GONE]) + pd.Timedelta(days=1)]
        returns = pd.DataFrame(bars).reindex(self.sessions.closes)[list(ASSETS)].pct_change(fill_method=None)
        for name, (parameters, direct) in CHOSEN.items():
            spec = SIGNALS.parse(BASE | {"estimator": name, "parameters": parameters})
            vectors = self.emit(spec, None, self.last)
            assert len(vectors.times) == 6, name  # the first of them has 64 closes
            for time, weights in zip(vectors.times, vectors.weights, strict=True):
                x = returns[: pd.Timestamp(time)].iloc[-60:].dropna(axis=1)
                model = getattr(skfolio.optimization, name)(**direct).fit(x)
                expected = pd.Series(model.weights_, x.columns).reindex(ASSETS, fill_value=0.0)
                np.testing.assert_allclose(weights, expected, rtol=0, atol=1e-7, err_msg=name)
            assert (vectors.weights == 0).any(), name  # somebody's window was not full

    @pytest.mark.parametrize("name", sorted(CHOSEN))
    def test_every_estimator_is_split_invariant(self, name):
        spec, bars = SIGNALS.parse(BASE | {"estimator": name, "parameters": CHOSEN[name][0]}), self.bars()
        whole = self.emit_from(bars, None, self.last, spec)
        for seed in range(5):
            since, parts = None, []
            for through in random_split(self.first, self.last, random.Random(seed)):
                parts.append(self.emit_from(bars, since, through, spec).weights)
                since = through
            assert np.concatenate(parts).tobytes() == whole.weights.tobytes()

    def test_a_fit_that_fails_is_told_with_its_time_and_without_a_warning(self):
        spec = SIGNALS.parse(MEAN_RISK | {"parameters": {"max_weights": 0.05}})  # 11 assets of at most 5 % never make 1
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            with pytest.raises(FitFailed) as failed:
                self.emit(spec, None, self.last)
        assert caught == []
        first = iso(np.datetime64("2022-03-31T21:00", "us"))  # the first quarter end with 61 closes behind it
        assert str(failed.value).startswith(f"signal skfolio: MeanRisk found no weights at {first}: Solver 'CLARABEL' failed. Change its")


def test_golden_inverse_volatility():
    # returns +-10 %, +-20 %, +-50 % around 0: deviations as 1 : 2 : 5, inverse 10 : 5 : 2
    found = fit(np.array([[0.1, -0.1], [0.2, -0.2], [0.5, -0.5]]))
    np.testing.assert_allclose(found, [10 / 17, 5 / 17, 2 / 17], rtol=1e-12)
    returns = market()
    inverse = 1 / returns.std(axis=1, ddof=1)
    np.testing.assert_allclose(fit(returns), inverse / inverse.sum(), rtol=1e-10)


def test_golden_equal_weighted():
    assert fit(market(10), estimator="EqualWeighted").tolist() == [0.1] * 10


def test_hierarchical_risk_parity_is_lopez_de_prados():
    # Source: Lopez de Prado (2016), Building diversified portfolios that outperform out of sample; Ward linkage as skfolio has it
    returns = market(11, 200, 4)
    covariance, correlation = np.cov(returns), np.corrcoef(returns)
    distance = np.sqrt(np.clip((1 - correlation) / 2, 0, None))
    np.fill_diagonal(distance, 0)
    condensed = squareform(distance, checks=False)
    order = sch.leaves_list(sch.optimal_leaf_ordering(sch.linkage(condensed, "ward"), condensed)).tolist()

    def variance(cluster):
        inverse = 1 / np.diag(covariance)[cluster]
        w = inverse / inverse.sum()
        return w @ covariance[np.ix_(cluster, cluster)] @ w

    expected = np.ones(11)

    def bisect(cluster):
        if len(cluster) > 1:
            left, right = cluster[: len(cluster) // 2], cluster[len(cluster) // 2 :]
            share = 1 - variance(left) / (variance(left) + variance(right))
            expected[left] *= share
            expected[right] *= 1 - share
            bisect(left)
            bisect(right)

    bisect(order)
    np.testing.assert_allclose(fit(returns, estimator="HierarchicalRiskParity"), expected, rtol=1e-9)


def test_least_variance_keeps_the_conditions_of_an_optimum():
    # marginal variance S w is one number for what is held, and at least that for what is not
    returns = market(9, 250, 5)
    found = fit(returns, estimator="MeanRisk")
    marginal = np.cov(returns) @ found / (found @ np.cov(returns) @ found)
    held = found > 1e-6
    assert 1 < held.sum() < 9
    np.testing.assert_allclose(marginal[held], 1, rtol=1e-3)  # as near as the solver comes
    assert (marginal[~held] > 1).all()
    np.testing.assert_allclose(found.sum(), 1, rtol=1e-9)


def test_risk_budgets_are_the_shares_of_the_variance():
    returns, budget = market(9, 250, 6), np.array([3.0, 1, 1, 1, 1, 1, 1, 1, 1])
    named = {f"{i:02d}": b for i, b in enumerate(budget)}
    found = fit(returns, estimator="RiskBudgeting", parameters={"risk_budget": named})
    share = found * (np.cov(returns) @ found) / (found @ np.cov(returns) @ found)
    np.testing.assert_allclose(share, budget / budget.sum(), atol=1e-4)
    equal = fit(returns, estimator="RiskBudgeting")
    np.testing.assert_allclose(equal * (np.cov(returns) @ equal) / (equal @ np.cov(returns) @ equal), 1 / 9, atol=1e-4)


def test_what_is_fitted_are_returns_and_not_prices():
    # both assets move alike, one of them a hundred times the price
    up_down = np.array([[0.01, -0.02, 0.03, -0.01], [-0.01, 0.02, -0.03, 0.01]])
    prices = np.cumprod(1 + np.c_[np.zeros(2), up_down], axis=1) * np.array([[1.0], [100.0]])
    spec = signal(asset_list=["A", "B"], window_sessions=4)
    np.testing.assert_allclose(spec.target_weights({"prices": prices[None]})[0], [0.5, 0.5], rtol=1e-12)


def test_assets_without_a_full_window_are_left_out_and_the_others_do_not_notice():
    returns = market(9)
    gaps = np.insert(returns, [2, 5], NAN, axis=0)  # two more, at places 2 and 6
    for name in ("InverseVolatility", "HierarchicalRiskParity", "MeanRisk"):
        found, full = fit(gaps, estimator=name), fit(returns, estimator=name)
        assert found[[2, 6]].tolist() == [0.0, 0.0]
        assert np.delete(found, [2, 6]).tobytes() == full.tobytes()


@pytest.mark.parametrize("whole", [0, 1])
def test_fewer_than_two_assets_emit_nothing(whole):
    returns = np.full((9, 20), NAN)
    returns[:whole] = market(1, 20)
    assert np.isnan(fit(returns)).all()
    returns[:2] = market(2, 20)
    assert np.isfinite(fit(returns)).all()


@pytest.mark.parametrize("name", ["InverseVolatility", "HierarchicalRiskParity"])
def test_an_asset_that_never_moves_fails_the_fit(name):
    returns = market(9)
    returns[4] = 0.0
    with pytest.raises(FitFailed, match=f"signal skfolio: {name} found no weights at window 0"):
        fit(returns, estimator=name)


def test_a_solution_that_is_said_to_be_inaccurate_is_none(monkeypatch):
    def half_way(self, x):
        warnings.warn("Solution may be inaccurate. Try changing the solver params", stacklevel=1)
        self.weights_ = np.full(x.shape[1], 1 / x.shape[1])
        return self

    monkeypatch.setattr(MeanRisk, "fit", half_way)
    with pytest.raises(FitFailed, match="Solution may be inaccurate"):
        fit(market(), estimator="MeanRisk")


@pytest.mark.parametrize("bad", [np.full(9, NAN), np.full(8, 0.125)])
def test_weights_that_are_none_are_refused(monkeypatch, bad):
    monkeypatch.setattr(MeanRisk, "fit", lambda self, x: setattr(self, "weights_", bad) or self)
    with pytest.raises(FitFailed, match="found no weights"):
        fit(market(), estimator="MeanRisk")


@pytest.mark.parametrize(
    ("name", "parameter"),
    [(e, "risk_measure") for e in ESTIMATORS if "risk_measure" in ESTIMATORS[e]] + [("MeanRisk", "objective_function")],
)
def test_every_word_that_is_allowed_works(name, parameter):
    returns = market(9, 120, 8) + 0.001
    found = {word: fit(returns, estimator=name, parameters={parameter: word}) for word in ESTIMATORS[name][parameter].choices}
    assert all(np.isfinite(w).all() and abs(w.sum() - 1) < 1e-6 for w in found.values())
    assert len({w.round(4).tobytes() for w in found.values()}) > len(found) / 2


def test_every_number_that_is_allowed_is_taken():
    numbers = {"min_return": 1e-4, "min_acceptable_return": 0.0, "risk_free_rate": 1e-4, "max_short": 0.1, "max_long": 1.2}
    for name, parameters in ESTIMATORS.items():
        for parameter, rule in parameters.items():
            if rule.choices:
                continue
            names = [f"{i:02d}" for i in range(9)]
            value = numbers.get(parameter, rule.default if rule.default is not None else dict.fromkeys(names, 1.0))
            assert np.isfinite(fit(market(seed=9) + 0.001, estimator=name, parameters={parameter: value})).all(), (name, parameter)


def test_defaults_are_those_of_skfolio_written_down():
    for name, parameters in ESTIMATORS.items():
        theirs = inspect.signature(getattr(skfolio.optimization, name)).parameters
        for parameter, rule in parameters.items():
            default = theirs[parameter].default
            assert rule.default == (default.name.lower() if isinstance(default, RiskMeasure | ObjectiveFunction) else default), parameter


def test_a_default_that_is_spelled_out_is_the_same_signal():
    spelled = {"risk_measure": "VARIANCE", "objective_function": "Minimize_Risk", "budget": 1, "min_weights": 0, "cvar_beta": 0.95}
    assert signal(estimator="MeanRisk", parameters=spelled) == signal(estimator="MeanRisk")
    assert signal(estimator="MeanRisk", parameters=spelled).uid == signal(estimator="MeanRisk").uid
    one = signal(estimator="MeanRisk", parameters={"risk_measure": "cvar", "max_weights": {"AAPL": 0.1, "XOM": 0.2}})
    other = signal(estimator="MeanRisk", parameters={"max_weights": {"XOM": 0.2, "AAPL": 0.1}, "risk_measure": "CVaR"})
    assert (one, one.uid) == (other, other.uid)


def test_without_skfolio_the_remedy_is_told_and_everything_else_works(monkeypatch):
    with_it = signal(estimator="MeanRisk", parameters={"risk_measure": "cvar"}).uid
    monkeypatch.setitem(sys.modules, "skfolio.optimization", None)
    assert signal(estimator="MeanRisk", parameters={"risk_measure": "cvar"}).uid == with_it
    with pytest.raises(PackageMissing, match=r"signal skfolio needs skfolio.* pip install 'msm-ray\[skfolio\]'"):
        fit(market())
    assert np.isnan(fit(np.full((9, 20), NAN))).all()  # nothing to fit


BITS = """
import hashlib, json, sys
import numpy as np
import msm_core.data_nodes.prices
from msm_core.signals import SIGNALS
heavy = [name for name in ("skfolio", "sklearn", "scipy", "cvxpy") if name in sys.modules]
assert not heavy, heavy
base, chosen = json.loads({base!r}), json.loads({chosen!r})
rng = np.random.default_rng(1)
n = 150
returns = rng.uniform(0.5, 1.5, (n, 1)) * rng.normal(0.0005, 0.01, (1, 252)) + rng.normal(0, 0.01, (n, 252))
prices = np.cumprod(1 + np.c_[np.zeros(n), returns], axis=1)[None]
for name, parameters in chosen.items():
    names = [f"{{i:03d}}" for i in range(n)]
    spec = SIGNALS.parse(base | {{"estimator": name, "parameters": parameters, "asset_list": names, "window_sessions": 252}})
    print(name, hashlib.sha256(spec.target_weights({{"prices": prices}}).tobytes()).hexdigest())
"""


def test_the_same_bits_in_fresh_processes_with_one_thread_or_two():
    # 150 assets: with fewer, products are too small for OpenBLAS to share them among threads
    chosen = {name: {} for name in CHOSEN}
    script = BITS.format(base=json.dumps(BASE), chosen=json.dumps(chosen))
    told = []
    for threads, seed in ((1, 0), (2, 77)):
        environment = os.environ | {"OPENBLAS_NUM_THREADS": str(threads), "OMP_NUM_THREADS": str(threads), "PYTHONHASHSEED": str(seed)}
        done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
        told.append(done.stdout.splitlines())
    assert told[0] == told[1]
    assert len({line.split()[1] for line in told[0]}) == len(CHOSEN)


def test_sessions_of_the_contract_hold_a_window():
    assert len(WEEKDAYS.closes) > signal().history_sessions == 61
    assert signal(window_sessions=252).history_sessions == 253
    assert SkfolioSignal.model_validate({k: v for k, v in BASE.items() if k != "emit_on"}).emit_on == "month_end"
