"""Immediate signal: trade to the target at the event's price."""

from typing import Literal

from msm_core.rebalance_strategy.base import RebalanceStrategy


class ImmediateSignal(RebalanceStrategy):
    """Trade the whole way to the valid target at the event's price. Volume is optional: reported when the source has it."""

    kind: Literal["immediate_signal"] = "immediate_signal"
