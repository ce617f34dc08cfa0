"""Rebalance strategies: one file each, one line here."""

from msm_core.identity import Kinds
from msm_core.rebalance_strategy.base import RebalanceOn, RebalanceStrategy
from msm_core.rebalance_strategy.immediate_signal import ImmediateSignal

REBALANCE_STRATEGIES: Kinds[RebalanceStrategy] = Kinds("rebalance strategy")
REBALANCE_STRATEGIES.register(ImmediateSignal)

__all__ = ["REBALANCE_STRATEGIES", "ImmediateSignal", "RebalanceOn", "RebalanceStrategy"]
