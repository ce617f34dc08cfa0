"""PortfolioReplicator: two assets by hand, scikit-learn on pandas returns, and the conditions that an optimum keeps."""

import hashlib
import json
import os
import random
import subprocess
import sys
import warnings

import numpy as np
import pandas as pd
import pytest
from sklearn.linear_model import ElasticNet, Lasso, LinearRegression

from msm_core.errors import FitFailed, PackageMissing
from msm_core.frames import Series, iso
from msm_core.price_sources import PublishedValues
from msm_core.signals import SIGNALS, PortfolioReplicator, portfolio_replicator
from tests.contracts import API_PRICES, ASSETS, GONE, LATE, WEEKDAYS, ComputedSignalContract, random_split

OTHER_PRICES = API_PRICES | {"time_index_meta_table_uid": "00000000-0000-0000-0000-000000000002"}
BASE = {
    "kind": "portfolio_replicator",
    "asset_list": ASSETS,
    "calendar_key": "WEEKDAYS",
    "price_source": API_PRICES,
    "target": {"asset": "SPX"},
    "method": "nnls",
}
LASSO = BASE | {"method": "lasso", "alpha": 2e-5}
ELASTIC = BASE | {"method": "elastic_net", "alpha": 4e-5, "l1_ratio": 0.7}
MIX = np.array([0.2, 0.1, 0.15, 0.0, 0.2, 0.05, 0.1, 0.0, 0.0, 0.1, 0.05])  # of ASSETS; they sum to 0.95
NAN = float("nan")


def signal(**fields) -> PortfolioReplicator:
    return PortfolioReplicator.model_validate(BASE | fields)


def prices_of(returns: list[float]) -> np.ndarray:
    return np.cumprod([1.0, *(1 + np.array(returns))])


def betas(target: list[float], *assets: list[float], **fields) -> list[float]:
    """The vector at the end of one window of returns; None is a missing first price."""
    names = [f"{i:02d}" for i in range(len(assets))]
    spec = signal(asset_list=names, window_sessions=len(target), **fields)
    windows = {"prices": np.array([[prices_of(a) for a in assets]]), "target": prices_of(target)[None, None, :]}
    return spec.target_weights(windows)[0].tolist()


class TestContract(ComputedSignalContract):
    payload = BASE
    respellings = [
        BASE | {"asset_list": list(reversed(ASSETS))},
        BASE | {"alpha": 0, "l1_ratio": 0.5, "window_sessions": 60.0, "target_price_column": "close"},
        BASE | {"target": {"asset": "SPX", "index": None}, "target_price_source": None},
        BASE | {"target_price_source": API_PRICES},  # its own
    ]
    others = [
        LASSO,
        LASSO | {"alpha": 3e-5},
        ELASTIC,
        ELASTIC | {"l1_ratio": 0.6},
        BASE | {"method": "lasso"},
        BASE | {"window_sessions": 61},
        BASE | {"target": {"asset": "SPY"}},
        BASE | {"target": {"index": "SPX"}},
        BASE | {"target": {"portfolio": "SPX"}},
        BASE | {"target_price_source": OTHER_PRICES},
        BASE | {"target_price_column": "open"},
        BASE | {"emit_on": "month_end"},
        BASE | {"asset_list": ASSETS[1:]},
        BASE | {"price_source": OTHER_PRICES},
    ]
    refused = [
        (BASE | {"target": {}}, "exactly one of asset, index, portfolio"),
        (BASE | {"target": {"asset": "SPX", "index": "SPX"}}, "exactly one of asset, index, portfolio"),
        (BASE | {"target": {"asset": ""}}, "at least 1 character"),
        (BASE | {"target": {"fund": "SPX"}}, "Extra inputs"),
        (BASE | {"target": {"asset": "MSFT"}}, "asset_list names MSFT, which is what is tracked"),
        (BASE | {"target": {"index": "SPX"}, "target_price_source": OTHER_PRICES}, "target_price_source is of a target that is an asset"),
        (BASE | {"target": {"index": "SPX"}, "target_price_column": "open"}, "target_price_column is of a target that is an asset"),
        (BASE | {"method": "ridge"}, "nnls"),
        (BASE | {"alpha": 1e-5}, "alpha is of lasso and elastic_net"),
        (BASE | {"alpha": -1e-5}, "greater than or equal to 0"),
        (LASSO | {"l1_ratio": 0.7}, "l1_ratio is of elastic_net"),
        (ELASTIC | {"l1_ratio": 0}, "greater than 0"),
        (BASE | {"window_sessions": 1}, "greater than or equal to 2"),
    ]

    def numbers(self, request):
        """The target is a mix of the assets, with a little of its own; it gains whenever they do."""
        assets = np.random.default_rng(3).normal(0.0005, 0.02, (len(ASSETS), len(self.times)))
        if request.name == "prices":
            return 100 * np.cumprod(1 + assets, axis=1)
        own = np.random.default_rng(4).normal(0, 0.002, len(self.times))
        return 1000 * np.cumprod(1 + (MIX[:, None] * assets).sum(axis=0) + own)[None, :]

    def returns(self) -> tuple[pd.DataFrame, pd.Series]:
        """As pandas sees them: of the assets, nothing after the delisting, and of the target."""
        bars = self.bars()
        series = {a: pd.Series(s.values, s.times) for name in bars for a, s in bars[name].items()}
        series[GONE] = series[GONE][: pd.Timestamp(self.delisted[GONE]) + pd.Timedelta(days=1)]
        frame = pd.DataFrame(series).reindex(self.sessions.closes).pct_change(fill_method=None)
        return frame[list(ASSETS)], frame["SPX"]

    @pytest.mark.parametrize(
        ("payload", "model"),
        [
            (BASE, lambda: LinearRegression(positive=True, fit_intercept=False)),
            (BASE | {"method": "lasso"}, lambda: LinearRegression(positive=True, fit_intercept=False)),
            (LASSO, lambda: Lasso(alpha=2e-5, positive=True, fit_intercept=False, max_iter=10**6, tol=1e-14)),
            (ELASTIC, lambda: ElasticNet(alpha=4e-5, l1_ratio=0.7, positive=True, fit_intercept=False, max_iter=10**6, tol=1e-14)),
        ],
        ids=["nnls", "lasso of alpha 0", "lasso", "elastic net"],
    )
    def test_scikit_learn_on_pandas_returns_comes_to_the_same_betas(self, payload, model):
        vectors = self.emit(SIGNALS.parse(payload | {"emit_on": "week_end"}), None, self.last)
        assets, target = self.returns()
        assert len(vectors.times) == 66  # 78 Fridays, less the 12 that have no 61 closes behind them
        for time, weights in zip(vectors.times, vectors.weights, strict=True):
            window = slice(assets.index.get_loc(time) - 59, assets.index.get_loc(time) + 1)
            x = assets.iloc[window].dropna(axis=1)
            expected = pd.Series(model().fit(x, target.iloc[window]).coef_, x.columns).reindex(ASSETS, fill_value=0.0)
            np.testing.assert_allclose(weights, expected, rtol=0, atol=1e-9)

    @pytest.mark.parametrize("payload", [LASSO, ELASTIC], ids=["lasso", "elastic net"])
    def test_penalised_fits_are_split_invariant_too(self, payload):
        spec, bars = SIGNALS.parse(payload | {"emit_on": "month_end", "window_sessions": 40}), self.bars()
        whole = self.emit_from(bars, None, self.last, spec)
        assert len(whole.times) == 17  # 18 month ends; January has 21 of the 41 closes
        for seed in range(200):
            since, parts = None, []
            for through in random_split(self.first, self.last, random.Random(seed)):
                parts.append(self.emit_from(bars, since, through, spec).weights)
                since = through
            assert np.concatenate(parts).tobytes() == whole.weights.tobytes()

    @pytest.mark.parametrize("payload", [BASE, LASSO, ELASTIC], ids=["nnls", "lasso", "elastic net"])
    def test_betas_keep_the_conditions_of_an_optimum(self, payload):
        # gradient of the loss g = x'(y - x b) / n - a (1 - r) b: equal to a r where b > 0, at most that where b = 0
        spec = SIGNALS.parse(payload | {"emit_on": "week_end"})
        ratio = {"lasso": 1.0}.get(spec.method, spec.l1_ratio)
        vectors, (assets, target) = self.emit(spec, None, self.last), self.returns()
        slack = 0
        for time, weights in zip(vectors.times, vectors.weights, strict=True):
            end = assets.index.get_loc(time) + 1
            x, y = assets.iloc[end - 60 : end].dropna(axis=1), target.iloc[end - 60 : end]
            b = weights[[ASSETS.index(a) for a in x.columns]]
            gradient = (x.mul(y - x.to_numpy() @ b, axis=0)).mean().to_numpy() - spec.alpha * (1 - ratio) * b
            assert (weights >= 0).all()
            np.testing.assert_allclose(gradient[b > 0], spec.alpha * ratio, rtol=0, atol=1e-10)
            assert (gradient <= spec.alpha * ratio + 1e-10).all()
            slack += int((gradient < spec.alpha * ratio - 1e-7).sum())
        assert slack > 10

    def test_an_exact_combination_gives_its_weights_back(self):
        bars = self.bars()
        fine = {a: s.values for a, s in bars["prices"].items() if a not in (LATE, "TSLA", GONE)}
        mix = {"AAPL": 0.3, "XOM": 0.5, "É": 0.1}
        returns = sum(w * (fine[a][1:] / fine[a][:-1] - 1) for a, w in mix.items())
        target = Series(self.times, 50 * prices_of(returns), np.full(len(self.times), np.nan))
        expected = np.array([mix.get(a, 0.0) for a in ASSETS])
        vectors = self.emit_from(bars | {"target": {"SPX": target}}, None, self.last)
        assert len(vectors.times) == 330
        np.testing.assert_allclose(vectors.weights, np.tile(expected, (330, 1)), rtol=0, atol=1e-12)

    def test_a_target_without_a_full_window_emits_nothing(self):
        bars, whole = self.bars(), self.emit(self.spec, None, self.last)
        gap = self.times[200]
        target = {"SPX": bars["target"]["SPX"].kept(self.times != gap)}
        vectors = self.emit_from(bars | {"target": target}, None, self.last)
        kept = (whole.times < gap) | (whole.times > self.times[260])  # the gap is in the 61 windows of 200..260
        assert np.array_equal(vectors.times, whole.times[kept])
        assert vectors.weights.tobytes() == whole.weights[kept].tobytes()
        late = {"SPX": bars["target"]["SPX"].kept(self.times > gap)}
        assert self.emit_from(bars | {"target": late}, None, self.last).times[0] == self.times[261]

    def test_a_fit_that_does_not_converge_is_told_with_its_time_and_without_a_warning(self, monkeypatch):
        monkeypatch.setattr(portfolio_replicator, "ITERATIONS_MAX", 2)
        spec = SIGNALS.parse(LASSO | {"emit_on": "month_end"})
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            with pytest.raises(FitFailed) as failed:
                self.emit(spec, None, self.last)
        assert caught == []
        first = iso(np.datetime64("2022-03-31T21:00", "us"))  # the first month end with 61 closes behind it
        told = f"signal portfolio_replicator: lasso found no weights at {first}: Objective did not converge. Change alpha"
        assert str(failed.value).startswith(told)

    def test_a_target_that_falls_silent_holds_the_signal_back(self):
        bars, early = self.bars(), self.times[-20]
        silent = bars | {"target": {"SPX": bars["target"]["SPX"].kept(self.times <= early)}}
        assert self.spec.computed_through(self.inputs(self.spec, silent, None, self.last, self.delisted), None, self.last) == early


def test_golden_nnls():
    # A moves on the first day only, B on the second only: b_A = 0.05 / 0.1, b_B = 0.05 / 0.2; nothing makes them sum to 1
    np.testing.assert_allclose(betas([0.05, 0.05], [0.1, 0.0], [0.0, 0.2]), [0.5, 0.25], rtol=1e-12)
    # against B the target falls: its beta would be -0.25, so it is 0
    np.testing.assert_allclose(betas([0.05, -0.05], [0.1, 0.0], [0.0, 0.2]), [0.5, 0.0], rtol=1e-12)
    # one asset, two days: b = (0.1 * 0.05 + 0.2 * 0.25) / (0.01 + 0.04) = 1.1; there is no intercept
    np.testing.assert_allclose(betas([0.05, 0.25], [0.1, 0.2]), [1.1], rtol=1e-12)


def test_golden_lasso():
    # separate days, so each alone: b = (x'y / 2 - a) / (x'x / 2). A: (0.0025 - 0.0005) / 0.005 = 0.4; B: (0.005 - 0.0005) / 0.02 = 0.225
    lasso = {"method": "lasso", "alpha": 0.0005}
    np.testing.assert_allclose(betas([0.05, 0.05], [0.1, 0.0], [0.0, 0.2], **lasso), [0.4, 0.225], rtol=1e-9)
    # a = 0.003 is more than A's 0.0025; B: (0.005 - 0.003) / 0.02 = 0.1
    np.testing.assert_allclose(betas([0.05, 0.05], [0.1, 0.0], [0.0, 0.2], **lasso | {"alpha": 0.003}), [0.0, 0.1], rtol=1e-9)
    assert betas([0.05, 0.05], [0.1, 0.0], [0.0, 0.2], **lasso | {"alpha": 0.0}) == betas([0.05, 0.05], [0.1, 0.0], [0.0, 0.2])


def test_golden_elastic_net():
    # b = (x'y / 2 - a r) / (x'x / 2 + a (1 - r)), a = 0.001, r = 0.25: A: (0.0025 - 0.00025) / (0.005 + 0.00075) = 0.00225 / 0.00575
    # B: (0.005 - 0.00025) / (0.02 + 0.00075) = 0.00475 / 0.02075
    net = {"method": "elastic_net", "alpha": 0.001, "l1_ratio": 0.25}
    expected = [0.00225 / 0.00575, 0.00475 / 0.02075]
    np.testing.assert_allclose(betas([0.05, 0.05], [0.1, 0.0], [0.0, 0.2], **net), expected, rtol=1e-9)


@pytest.mark.parametrize("fields", [{}, {"method": "lasso", "alpha": 1e-6}, {"method": "elastic_net", "alpha": 1e-6}])
def test_what_never_moves_has_no_beta(fields):
    assert betas([0.0, 0.0, 0.0], [0.1, 0.0, 0.1], [0.0, 0.2, 0.1], **fields) == [0.0, 0.0]
    assert betas([0.1, 0.0, 0.1], [0.1, 0.0, 0.1], [0.0, 0.0, 0.0], **fields)[1] == 0.0


def test_assets_without_a_full_window_are_left_out_and_the_others_do_not_notice():
    full = betas([0.05, 0.05], [0.1, 0.0], [0.0, 0.2])
    assert betas([0.05, 0.05], [NAN, 0.1], [0.1, 0.0], [0.05, NAN], [0.0, 0.2]) == [0.0, full[0], 0.0, full[1]]


def test_where_no_asset_is_left_or_the_target_lacks_a_price_nothing_is_emitted():
    assert np.isnan(betas([0.05, 0.05], [NAN, 0.1], [0.1, NAN])).all()
    assert np.isnan(betas([0.05, NAN], [0.1, 0.0], [0.0, 0.2])).all()


def test_more_assets_than_returns_is_no_error():
    rng = np.random.default_rng(5)
    found = betas(rng.normal(0, 0.01, 10).tolist(), *rng.normal(0, 0.01, (40, 10)).tolist())
    assert 0 < np.count_nonzero(found) <= 10


@pytest.mark.parametrize(
    ("target", "fields", "source", "column", "identifier"),
    [
        ({"asset": "SPX"}, {}, 1, "close", "SPX"),
        ({"asset": "SPX"}, {"target_price_source": OTHER_PRICES, "target_price_column": "settle"}, 2, "settle", "SPX"),
    ],
)
def test_the_target_that_is_an_asset_is_read_from_a_price_source(target, fields, source, column, identifier):
    prices, tracked = signal(target=target, price_column="open", **fields).requests
    assert (prices.name, prices.column, prices.identifiers, prices.source.source_uid.int) == ("prices", "open", ASSETS, 1)
    assert (tracked.name, tracked.column, tracked.identifiers, tracked.source.source_uid.int) == ("target", column, (identifier,), source)


@pytest.mark.parametrize("of", ["index", "portfolio"])
def test_an_index_or_a_portfolio_is_read_where_its_values_are_published(of):
    tracked = signal(target={of: "core"}).requests[1]
    assert (tracked.name, tracked.source, tracked.column, tracked.identifiers) == ("target", PublishedValues(of=of), "close", ("core",))
    assert signal(target={of: "MSFT"}).requests[1].identifiers == ("MSFT",)  # no asset, whatever it is called


@pytest.mark.parametrize(
    ("package", "fields"),
    [("sklearn.linear_model", {"method": "lasso", "alpha": 1e-6}), ("scipy.optimize", {}), ("threadpoolctl", {})],
)
def test_without_a_package_the_remedy_is_told(monkeypatch, package, fields):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(PackageMissing, match=f"portfolio_replicator needs {package}.*pip install scikit-learn"):
        betas([0.05, 0.05], [0.1, 0.0], [0.0, 0.2], **fields)
    assert np.isnan(betas([NAN, 0.05], [0.1, 0.0], **fields)).all()  # nothing to fit


BITS = """
import hashlib, json, numpy as np
import msm_core.data_nodes.prices
from msm_core.signals import SIGNALS
base = json.loads({base!r})
rng = np.random.default_rng(1)
common = rng.normal(0, 0.01, (1, 90))
for n in (12, 150):
    returns = rng.uniform(0.5, 1.5, (n, 1)) * common + rng.normal(0, 0.01, (n, 90))
    target = (rng.random((n, 1)) * returns).sum(axis=0)[None, :] * 2 / n
    full = [np.cumprod(1 + np.c_[np.zeros(len(r)), r], axis=1) for r in (returns, target)]
    prices, tracked = (np.array([p[:, i : i + 61] for i in range(0, 30, 5)]) for p in full)
    for method in ({{"method": "nnls"}}, {{"method": "lasso", "alpha": 2e-6}}, {{"method": "elastic_net", "alpha": 4e-6}}):
        spec = SIGNALS.parse(base | method | {{"asset_list": [f"{{i:03d}}" for i in range(n)]}})
        print(hashlib.sha256(spec.target_weights({{"prices": prices, "target": tracked}}).tobytes()).hexdigest())
"""


def test_the_same_bits_in_fresh_processes_with_one_thread_or_two():
    script = BITS.format(base=json.dumps(BASE))
    told = []
    for threads, seed in ((1, 0), (2, 77)):
        environment = os.environ | {"OPENBLAS_NUM_THREADS": str(threads), "OMP_NUM_THREADS": str(threads), "PYTHONHASHSEED": str(seed)}
        done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
        told.append(done.stdout.split())
    assert told[0] == told[1]
    assert len(set(told[0])) == 6
    assert hashlib.sha256().hexdigest() not in told[0]


def test_sessions_of_the_contract_hold_a_window():
    assert len(WEEKDAYS.closes) > signal().history_sessions == 61
