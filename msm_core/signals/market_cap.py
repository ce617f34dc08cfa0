"""Weights proportional to market capitalisation, among the assets that are liquid."""

from typing import Annotated, Literal, Self

import numpy as np
from pydantic import AfterValidator, Field, model_validator

from msm_core.alignment import Market
from msm_core.frames import NEVER, Floats, ordered_sum
from msm_core.identity import Spec
from msm_core.price_sources import AnyPriceSource
from msm_core.signals.base import Request
from msm_core.signals.computed import ComputedSignal

YEAR = 252  # sessions: a median dollar volume of a session becomes one of a year

Windows = Annotated[
    tuple[Annotated[int, Field(ge=1, le=10_000)], ...], Field(min_length=1), AfterValidator(lambda lengths: tuple(sorted(set(lengths))))
]


class VolatilityControl(Spec):
    """Weights are scaled down, never up, so that the portfolio's recent volatility is at most a target."""

    kind: Literal["volatility_control"] = "volatility_control"
    target_volatility: float = Field(default=0.1, gt=0, description="of a year, as a fraction")
    ewm_span: int = Field(default=21, ge=2, description="span of the exponential weights, in sessions: alpha = 2 / (span + 1)")
    ann_factor: float = Field(default=252, gt=0, description="sessions in a year")
    window_sessions: int = Field(default=252, ge=2, le=10_000, description="returns that are looked at")


class MarketCap(ComputedSignal):
    """Weights proportional to market capitalisation, among the assets that are liquid.

    dollar volume of a session = price * volume; one of which either is missing is left out, and nothing is filled.
    ATVR of w sessions = median dollar volume * 252 / capitalisation now. An asset is liquid when every window's ATVR is at least the
    minimum, and it traded in enough of the longest window's sessions whose volume is known.
    Of the liquid ones the greatest num_top_assets are kept (equal ones: first in bytewise order), each with its part of their sum.
    An asset needs price, volume and capitalisation at the session itself. Where fewer than min_number_of_assets are liquid, nothing is
    emitted: the vector before stays.
    """

    kind: Literal["market_cap"] = "market_cap"
    market_cap_source: AnyPriceSource = Field(description="where capitalisations are read, in the currency of price * volume")
    market_cap_column: str = Field(default="market_cap", min_length=1, max_length=63, description="numeric column of it")
    volume_column: str = Field(
        default="volume", min_length=1, max_length=63, description="column of the price source, in units of the asset"
    )
    minimum_atvr_ratio: float = Field(default=0.1, ge=0, description="least traded value of a year, as a fraction of the capitalisation")
    rolling_atvr_volume_windows: Windows = Field(default=(60, 360), description="sessions of each window that must reach that ratio")
    frequency_trading_percent: float = Field(default=0.9, ge=0, le=1, description="least share of sessions with volume, longest window")
    min_number_of_assets: int = Field(default=3, ge=1, description="liquid assets without which no vector is emitted")
    num_top_assets: int | None = Field(default=None, ge=1, description="greatest assets that are kept; none: all liquid ones")
    volatility_control: VolatilityControl | None = Field(default=None, description="scales the weights down; none: they sum to 1")

    @model_validator(mode="after")
    def _enough_assets(self) -> Self:
        if len(self.asset_list) < self.min_number_of_assets:
            raise ValueError(f"asset_list names {len(self.asset_list)} assets, fewer than min_number_of_assets {self.min_number_of_assets}")
        return self

    @property
    def history_sessions(self) -> int:
        returns = self.volatility_control.window_sessions if self.volatility_control else 0
        return max(*self.rolling_atvr_volume_windows, returns + 1)

    @property
    def requests(self) -> tuple[Request, ...]:
        return (
            *super().requests,
            Request("volume", self.price_source, self.volume_column, self.universe, zero_allowed=True),
            Request("market_cap", self.market_cap_source, self.market_cap_column, self.universe),
        )

    def _numbers(self, panel: Market, request: Request, through: np.datetime64) -> Floats:
        """As of any signal; but a volume is that of its own session, and a price alignment policy that holds prices holds none of it."""
        values = super()._numbers(panel, request, through)
        if request.name == "volume":
            session = np.searchsorted(panel.sessions.closes, panel.grid)
            before = np.where(session > 0, panel.sessions.closes[session - 1], NEVER)
            values[panel.bar_times <= before[:, None]] = np.nan
        return values

    def target_weights(self, windows: dict[str, Floats]) -> Floats:
        caps = windows["market_cap"][..., -1]
        kept = self._liquid(windows["prices"], windows["volume"], caps)
        enough = np.count_nonzero(kept, axis=1) >= self.min_number_of_assets
        if self.num_top_assets is not None:
            order = np.argsort(-np.where(kept, caps, 0), axis=1, kind="stable")
            kept &= np.argsort(order, axis=1, kind="stable") < self.num_top_assets
        caps = np.where(kept, caps, 0)
        weights = caps / np.where(enough, ordered_sum(caps), np.nan)[:, None]
        return weights if self.volatility_control is None else weights * self._scale(weights, windows["prices"])[:, None]

    def _liquid(self, prices: Floats, volumes: Floats, caps: Floats) -> np.ndarray:
        """(E, N) mask."""
        longest = volumes[..., -self.rolling_atvr_volume_windows[-1] :]
        known, traded = np.count_nonzero(~np.isnan(longest), axis=-1), np.count_nonzero(longest > 0, axis=-1)
        dollars = prices * volumes
        liquid = ~np.isnan(dollars[..., -1]) & ~np.isnan(caps) & (traded / np.maximum(known, 1) >= self.frequency_trading_percent)
        for length in self.rolling_atvr_volume_windows:
            liquid &= _median(dollars[..., -length:]) * YEAR / caps >= self.minimum_atvr_ratio  # false for NaN
        return liquid

    def _scale(self, weights: Floats, prices: Floats) -> Floats:
        """(E,) what brings the volatility of the last sessions, had the portfolio held today's weights, down to the target."""
        control = self.volatility_control
        assert control is not None
        prices = prices[..., -1 - control.window_sessions :]
        returns = prices[..., 1:] / prices[..., :-1] - 1
        returns = np.where((weights != 0)[..., None], returns, np.nan)
        portfolio = ordered_sum(np.moveaxis(np.where(np.isnan(returns), 0, returns * weights[..., None]), 1, 2))
        portfolio[np.isnan(returns).all(axis=1)] = np.nan  # before any of them was listed there is no return to speak of
        volatility = _ewm_deviation(portfolio, control.ewm_span) * np.sqrt(control.ann_factor)
        scaled = volatility > control.target_volatility  # false where it is unknown
        return np.where(scaled, control.target_volatility / np.where(scaled, volatility, 1), 1)


def _median(values: Floats) -> Floats:
    """Median over the last axis of the numbers there are; NaN where there is none."""
    ordered = np.sort(values, axis=-1)  # NaN last
    count = np.count_nonzero(~np.isnan(values), axis=-1)
    low, high = (np.take_along_axis(ordered, np.maximum(i, 0)[..., None], -1)[..., 0] for i in ((count - 1) // 2, count // 2))
    return np.where(count % 2 == 1, low, (low + high) / 2)


def _ewm_deviation(values: Floats, span: int) -> Floats:
    """Standard deviation over the last axis under exponential weights, the newest weighs 1; NaN where fewer than two are known.

    An unknown number is left out but ages those before it. Bias is corrected for reliability weights: V1**2 / (V1**2 - V2).
    Source: pandas.Series.ewm(span, adjust=True, ignore_na=False).std(bias=False), whose last element this is.
    """
    known = ~np.isnan(values)
    ages = np.cumprod(np.append(1.0, np.full(values.shape[-1] - 1, 1 - 2 / (span + 1))))[::-1]  # no pow: its bits are the platform's
    weight = np.where(known, ages, 0)
    total, squares = ordered_sum(weight), ordered_sum(weight * weight)
    enough = np.count_nonzero(known, axis=-1) > 1
    total = np.where(enough, total, np.nan)
    mean = ordered_sum(np.where(known, weight * values, 0)) / total
    away = np.where(known, values - mean[..., None], 0)
    return np.sqrt(ordered_sum(weight * (away * away)) * total / (total * total - squares))
