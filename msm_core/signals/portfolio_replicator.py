"""Portfolio replicator: the long-only mix of assets whose returns come nearest to those of something tracked."""

import warnings
from typing import Any, Literal, Self

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

from msm_core.errors import FitFailed, PackageMissing
from msm_core.frames import Floats
from msm_core.price_sources import AnyPriceSource, PriceSource, PublishedValues
from msm_core.signals.base import AssetIdentifier, Request
from msm_core.signals.computed import ComputedSignal

ITERATIONS_MAX = 100_000
TOLERANCE = 1e-12  # of the duality gap, relative to the sum of squares of the target's returns


class TrackedSeries(BaseModel):
    """What is tracked: an asset by its prices, or an index or a portfolio of this system by its published values."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    asset: AssetIdentifier | None = None
    index: AssetIdentifier | None = None
    portfolio: AssetIdentifier | None = None

    @model_validator(mode="after")
    def _one(self) -> Self:
        if len([value for _, value in self if value is not None]) != 1:
            raise ValueError("target is exactly one of asset, index, portfolio")
        return self


class PortfolioReplicator(ComputedSignal):
    """Tracking regression: non-negative betas of the target's returns on those of the assets, over a window of sessions.

    No intercept, and the betas are not rescaled: what they leave of 1 is cash. An asset without a price at every close of the window has
    weight 0. Nothing is emitted where the target lacks one, or every asset does.

    nnls         min |y - X b|^2, b >= 0 (Lawson and Hanson, by scipy.optimize.nnls)
    lasso        min |y - X b|^2 / (2 window_sessions) + alpha |b|_1, b >= 0 (scikit-learn's Lasso); alpha 0 is nnls
    elastic_net  with alpha l1_ratio |b|_1 + alpha (1 - l1_ratio) |b|^2 / 2 for a penalty (scikit-learn's ElasticNet); alpha 0 is nnls
    """

    kind: Literal["portfolio_replicator"] = "portfolio_replicator"
    target: TrackedSeries = Field(description="what is tracked: one of asset, index, portfolio")
    target_price_source: AnyPriceSource | None = Field(
        default=None, description="prices of the asset that is tracked; none: the signal's own price_source"
    )
    target_price_column: str = Field(default="close", min_length=1, max_length=63, description="column of the asset that is tracked")
    method: Literal["nnls", "lasso", "elastic_net"] = Field(description="the regression; see alpha")
    alpha: float = Field(default=0.0, ge=0.0, description="penalty of lasso and elastic_net, in squared returns: 0.00001 is light; 0: nnls")
    l1_ratio: float = Field(default=0.5, gt=0.0, le=1.0, description="share of the absolute penalty in that of elastic_net; 1: lasso")
    window_sessions: int = Field(default=60, ge=2, le=10_000, description="returns that each regression sees")

    @field_validator("target_price_source")
    @classmethod
    def _own_source_is_none(cls, source: PriceSource | None, info: ValidationInfo) -> PriceSource | None:
        return None if source == info.data.get("price_source") else source

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        published = self.target.asset is None
        wrong = {
            f"asset_list names {self.target.asset}, which is what is tracked: the answer would be that asset": self.target.asset
            in self.asset_list,
            "target_price_source is of a target that is an asset": published and self.target_price_source is not None,
            "target_price_column is of a target that is an asset": published and self.target_price_column != "close",
            "alpha is of lasso and elastic_net": self.method == "nnls" and self.alpha != 0,
            "l1_ratio is of elastic_net": self.method != "elastic_net" and self.l1_ratio != 0.5,
        }
        if problems := [why for why, is_wrong in wrong.items() if is_wrong]:
            raise ValueError("; ".join(problems))
        return self

    @property
    def history_sessions(self) -> int:
        return self.window_sessions + 1

    @property
    def requests(self) -> tuple[Request, ...]:
        return (*super().requests, self._target_request)

    @property
    def _target_request(self) -> Request:
        if self.target.asset is not None:
            return Request("target", self.target_price_source or self.price_source, self.target_price_column, (self.target.asset,))
        of: Literal["index", "portfolio"] = "index" if self.target.index is not None else "portfolio"
        identifier = self.target.index or self.target.portfolio
        assert identifier is not None
        return Request("target", PublishedValues(of=of), "close", (identifier,))

    @property
    def _is_penalised(self) -> bool:
        return self.method != "nnls" and self.alpha > 0

    def target_weights(self, windows: dict[str, Floats]) -> Floats:
        assets, target = _returns(windows["prices"]), _returns(windows["target"])[:, 0]
        complete = np.all(np.isfinite(assets), axis=-1)
        fitted = np.any(complete, axis=1) & np.all(np.isfinite(target), axis=-1)
        weights = np.where(fitted[:, None], np.zeros(complete.shape), np.nan)
        if fitted.any():
            with self._one_thread():
                for window in np.flatnonzero(fitted):
                    kept = complete[window]
                    weights[window, kept] = self._betas(assets[window, kept], target[window].copy(), int(window))
        return weights

    def _one_thread(self) -> Any:
        """Linear algebra in one thread, as a context: how many threads there are can change the last bits of a product."""
        try:  # before the limit: what is loaded later would not be limited
            import scipy.optimize  # noqa: F401

            if self._is_penalised:  # it takes seconds to load
                import sklearn.linear_model  # noqa: F401
            from threadpoolctl import threadpool_limits
        except ImportError as error:
            raise PackageMissing(owner=f"signal {self.kind}", package=error.name, remedy="pip install scikit-learn") from None
        return threadpool_limits(limits=1)

    def _betas(self, assets: Floats, target: Floats, window: int) -> Floats:
        """(k,) betas of one window: assets (k, W) and target (W,), contiguous, so that nothing but the window reaches the bits."""
        try:
            return self._penalised(assets, target) if self._is_penalised else self._nnls(assets, target)
        except (RuntimeError, ValueError, Warning) as error:
            facts = {"why": str(error).split(". ")[0].rstrip("."), "remedy": "Change alpha or window_sessions, or take another method"}
            raise FitFailed(signal=self.kind, estimator=self.method, window=window, time=f"window {window}", **facts) from None

    def _nnls(self, assets: Floats, target: Floats) -> Floats:
        from scipy.optimize import nnls

        return nnls(assets.T, target)[0]

    def _penalised(self, assets: Floats, target: Floats) -> Floats:
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.linear_model import ElasticNet  # its Lasso is this one with l1_ratio 1

        fixed: dict[str, Any] = {"positive": True, "fit_intercept": False, "selection": "cyclic"}
        fixed |= {"max_iter": ITERATIONS_MAX, "tol": TOLERANCE}
        ratio = 1.0 if self.method == "lasso" else self.l1_ratio
        model = ElasticNet(alpha=self.alpha, l1_ratio=ratio, **fixed)
        with warnings.catch_warnings():
            warnings.simplefilter("error", ConvergenceWarning)
            return model.fit(assets.T, target).coef_


def _returns(prices: Floats) -> Floats:
    """(E, n, W) simple returns of (E, n, W + 1) prices; not finite where a price is missing, or beyond all measure."""
    with np.errstate(over="ignore", invalid="ignore"):
        return prices[..., 1:] / prices[..., :-1] - 1.0
