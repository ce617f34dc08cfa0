"""Text for people about signals and rebalance strategies, under the uid of the specification. Never part of an identity."""

from msm_core.api.base import Row
from msm_core.api.fields import Json
from msm_core.models import RebalanceStrategyMetadataTable, SignalMetadataTable


class SignalMetadata(Row, table=SignalMetadataTable, key=("signal_uid",)):
    signal_uid: str
    signal_description: str | None = None


class RebalanceStrategyMetadata(Row, table=RebalanceStrategyMetadataTable, key=("rebalance_strategy_uid",)):
    rebalance_strategy_uid: str
    rebalance_strategy_description: str | None = None
    configuration_json: Json | None = None
