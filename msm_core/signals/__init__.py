"""Signals: one file each, one line here."""

from msm_core.identity import Kinds
from msm_core.signals.base import ConstantSignal, Signal, Vectors
from msm_core.signals.equal_weights import EqualWeights
from msm_core.signals.external_weights import ExternalWeights
from msm_core.signals.fixed_weights import AssetWeight, FixedWeights
from msm_core.signals.intraday_trend import IntradayTrend
from msm_core.signals.inverse_volatility import InverseVolatility
from msm_core.signals.market_cap import MarketCap, VolatilityControl
from msm_core.signals.momentum import Momentum
from msm_core.signals.portfolio_replicator import PortfolioReplicator, TrackedSeries
from msm_core.signals.skfolio_signal import SkfolioSignal

SIGNALS: Kinds[Signal] = Kinds("signal", Signal, group="msm_core.signals")
SIGNALS.register(FixedWeights)
SIGNALS.register(EqualWeights)
SIGNALS.register(InverseVolatility)
SIGNALS.register(Momentum)
SIGNALS.register(MarketCap)
SIGNALS.register(IntradayTrend)
SIGNALS.register(ExternalWeights)
SIGNALS.register(PortfolioReplicator)
SIGNALS.register(SkfolioSignal)

__all__ = [
    "SIGNALS",
    "AssetWeight",
    "ConstantSignal",
    "EqualWeights",
    "ExternalWeights",
    "FixedWeights",
    "IntradayTrend",
    "InverseVolatility",
    "MarketCap",
    "Momentum",
    "PortfolioReplicator",
    "Signal",
    "SkfolioSignal",
    "TrackedSeries",
    "Vectors",
    "VolatilityControl",
]
