"""Signal nodes: each distinct signal is computed once per run, whoever follows it."""

import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

import numpy as np
from pydantic import BaseModel, ConfigDict
from sqlalchemy import Connection

from msm_core.configuration import AnySignal
from msm_core.copying import Block, Text
from msm_core.data_nodes.base import NodeResult, input_digest
from msm_core.errors import InvalidWeight, UnknownAssets
from msm_core.frames import iso, to_datetime, utc
from msm_core.models import SignalWeightsStorage
from msm_core.signals import CODE_VERSION, Vectors
from msm_core.storage import Advance, ProgressRows, Scope, known_assets


class SignalWeights(BaseModel):
    """The node that writes a signal's vectors to SignalWeightsStorage, under its own signal_uid."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    signal_weights_instance: AnySignal
    replace: bool = False
    expected_epoch: int | None = None

    @property
    def identifier(self) -> str:
        return self.signal_weights_instance.uid

    @property
    def scopes(self) -> tuple[Scope, ...]:
        return (Scope(SignalWeightsStorage, self.identifier),)

    @property
    def data_node_uid(self) -> uuid.UUID:
        """Uid of its progress row, to which Portfolio rows point."""
        return self.scopes[0].uid

    def dependencies(self) -> dict[str, BaseModel]:
        """Constant signals need nothing."""
        return {}

    def run(
        self, debug_mode: bool = True, update_tree: bool = True, force_update: bool = False, as_of: datetime | None = None
    ) -> NodeResult:
        """Bring this signal up to date in this process; see `PortfoliosDataNode.run` for the arguments."""
        from msm_core.data_nodes.local import run_signal  # it stands above this module

        return run_signal(self, as_of)


@dataclass(frozen=True)
class SignalKind:
    """How a batch of signals is brought up to date."""

    name: str = "signal"

    def read_outside(self, connection: Connection, nodes: Sequence[SignalWeights], as_of: datetime) -> set[str]:
        return known_assets(connection, {a for node in nodes for a in node.signal_weights_instance.universe})

    def read_inside(self, connection: Connection, nodes: Sequence[SignalWeights], progress: ProgressRows, outside: set[str]) -> None:
        return None

    def update(self, node: SignalWeights, progress: ProgressRows, outside: set[str], inside: None, as_of: datetime) -> list[Advance]:
        signal, scope = node.signal_weights_instance, node.scopes[0]
        unknown = [a for a in signal.universe if a not in outside]
        if unknown:
            raise UnknownAssets(owner=f"signal {node.identifier}", assets=", ".join(unknown))
        before = progress[scope.uid]
        since = None if node.replace or before.watermark is None else utc(before.watermark, "watermark")
        vectors = signal.emit(since, utc(as_of, "as_of"))
        if not len(vectors.times):
            return []
        block, rows = _block(node.identifier, vectors)
        return [
            Advance(
                scope=scope,
                epoch=before.epoch,
                watermark=to_datetime(vectors.times[-1]),
                row_count=rows + (0 if node.replace else before.row_count),
                configuration_hash=node.identifier,
                code_version=CODE_VERSION,
                input_digest=input_digest(signal.universe, vectors.times, vectors.weights),
                block=block,
                replace=node.replace,
            )
        ]

    def finish(self, connection: Connection, nodes: Sequence[SignalWeights]) -> None:
        return None


def _block(signal_uid: str, vectors: Vectors) -> tuple[Block, int]:
    """Rows of the vectors. Zeros are left out, as an absent asset means 0; an all-zero vector keeps one, or it would not exist."""
    bad = np.argwhere(~np.isfinite(vectors.weights))
    if len(bad):
        row, asset = (int(i) for i in bad[0])
        facts = {"asset": vectors.assets[asset], "time": iso(vectors.times[row]), "value": float(vectors.weights[row, asset])}
        raise InvalidWeight(owner=f"signal {signal_uid}", **facts)
    kept = vectors.weights != 0
    kept[~kept.any(axis=1), 0] = True
    row, asset = np.nonzero(kept)
    block = {
        "signal_uid": Text.constant(signal_uid, len(row)),
        "time_index": vectors.times[row],
        "asset_identifier": Text(asset, vectors.assets),
        "signal_weight": vectors.weights[row, asset],
    }
    return block, len(row)
