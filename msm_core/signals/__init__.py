"""Signals: one file each, one line here."""

from msm_core.identity import Kinds
from msm_core.signals.base import CODE_VERSION, ConstantSignal, Signal, Vectors
from msm_core.signals.equal_weights import EqualWeights
from msm_core.signals.fixed_weights import AssetWeight, FixedWeights

SIGNALS: Kinds[Signal] = Kinds("signal")
SIGNALS.register(FixedWeights)
SIGNALS.register(EqualWeights)

__all__ = ["CODE_VERSION", "SIGNALS", "AssetWeight", "ConstantSignal", "EqualWeights", "FixedWeights", "Signal", "Vectors"]
