"""Rebalance strategies: one file each, one line here."""

from msm_core.identity import Kinds
from msm_core.rebalance_strategy.base import OrderStrategy, RebalanceOn, RebalanceStrategy, WeightLimits
from msm_core.rebalance_strategy.calendar_event import CalendarEvent
from msm_core.rebalance_strategy.immediate_signal import ImmediateSignal
from msm_core.rebalance_strategy.liquidity_constrained import LiquidityConstrained
from msm_core.rebalance_strategy.threshold import Threshold
from msm_core.rebalance_strategy.time_weighted import TimeWeighted
from msm_core.rebalance_strategy.trailing_adv_participation import TrailingADVParticipation
from msm_core.rebalance_strategy.volume_participation import VolumeParticipation

REBALANCE_STRATEGIES: Kinds[RebalanceStrategy] = Kinds("rebalance strategy", RebalanceStrategy, group="msm_core.rebalance_strategies")
REBALANCE_STRATEGIES.register(CalendarEvent)
REBALANCE_STRATEGIES.register(ImmediateSignal)
REBALANCE_STRATEGIES.register(LiquidityConstrained)
REBALANCE_STRATEGIES.register(Threshold)
REBALANCE_STRATEGIES.register(TimeWeighted)
REBALANCE_STRATEGIES.register(TrailingADVParticipation)
REBALANCE_STRATEGIES.register(VolumeParticipation)

__all__ = [
    "REBALANCE_STRATEGIES",
    "CalendarEvent",
    "ImmediateSignal",
    "LiquidityConstrained",
    "OrderStrategy",
    "RebalanceOn",
    "RebalanceStrategy",
    "Threshold",
    "TimeWeighted",
    "TrailingADVParticipation",
    "VolumeParticipation",
    "WeightLimits",
]
